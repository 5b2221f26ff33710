"""How recordings begin, and so where another one follows in the same file.

Owns their signatures; those of MP3 and AAC, which have none but their frames, are for `frames`.
"""

import re
from collections.abc import Iterable
from typing import BinaryIO

from simpler_distil_whisper.data.byte_search import SEARCHED_BYTES, positions_of, read_at
from simpler_distil_whisper.data.frames import after_id3, frames_begin

FLAC_BUFFER_BYTES = 2**14  # read ahead by a decoder, and more
TAG_BYTES = 2**16  # behind an MP3, and before another recording
FLAC_START = b"fLaC\x00\x00\x00\x22"  # with the header of the block that is always the first
EBML_START = b"\x1a\x45\xdf\xa3"  # of Matroska and WebM
BOX_NAME = b"ftyp"  # of the first box of an MP4, behind its length
# What is searched for, and what has to stand there.
SIGNATURES = {
    b"RIFF": rb"RIFF.{4}(WAVE|AVI )",
    b"RIFX": rb"RIFX.{4}WAVE",
    b"RF64": rb"RF64.{4}WAVE",
    b"BW64": rb"BW64.{4}WAVE",
    b"riff\x2e\x91\xcf\x11": rb"riff",
    b"FORM": rb"FORM.{4}AIF[FC]",
    b"caff\x00\x01\x00\x00": rb"caff",
    b".snd\x00\x00": rb".{4}\x00\x00.{6}\x00\x00\x00[\x01-\x1b]",
    b"dns.": rb".{6}\x00\x00.{4}[\x01-\x1b]\x00\x00\x00",
    FLAC_START: rb"fLaC",
    b"OggS\x00\x02": rb".{6}\x00{8}",
    BOX_NAME: rb"\x00\x00\x00[\x0c-\x80]ftyp",
    EBML_START: rb".{4}([\x80-\xff]|\x01\x00).{0,6}\x42\x86",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": rb"\x30",  # WMA
    b"#!AMR": rb"#!AMR(-WB)?\n",
    b"wvpk": rb"wvpk.{4}[\x02-\x10]\x04.{6}\x00{4}",  # the block of its first sample
}
SIGNATURE_BYTES = 32


def next_recording(
    file: BinaryIO, start: int, end: int, names: Iterable[bytes] = SIGNATURES
) -> int | None:
    """Return where another recording begins in a part of a file, by one of these signatures."""
    first: int | None = None
    for name in names:
        before = 4 if name == BOX_NAME else 0
        last = end if first is None else first
        for position in positions_of(file, name, start + before, last + before):
            content = read_at(file, position - before, SIGNATURE_BYTES)
            if re.match(SIGNATURES[name], content, re.DOTALL):
                first = position - before
                break
    return first


def recording_begins(file: BinaryIO, position: int) -> bool:
    """Return whether a recording begins there."""
    start = after_id3(file, position)
    if next_recording(file, start, start + 1) == start:
        return True
    return frames_begin(file, start)


def recording_behind(file: BinaryIO, position: int) -> int | None:
    """Return where a recording begins behind a FLAC, which a decoder has read up to there."""
    start = max(1, position - FLAC_BUFFER_BYTES)
    if following := next_recording(file, start, start + SEARCHED_BYTES):
        return following
    places = positions_of(file, b"\xff", start, position + TAG_BYTES)
    return next((place for place in places if recording_begins(file, place)), None)
