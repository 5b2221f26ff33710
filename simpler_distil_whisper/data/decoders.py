"""Open audio files -> samples, by libsndfile or, where it reads less than is there, by FFmpeg.

Owns the choice between the two, and files that were joined. It mixes no channels and resamples
nothing.
"""

import math
import os
from collections.abc import Iterator
from typing import BinaryIO

import soundfile

from simpler_distil_whisper.data.byte_search import read_at
from simpler_distil_whisper.data.containers import (
    MOST_RECORDINGS,
    Structure,
    read_structures,
)
from simpler_distil_whisper.data.ffmpeg import FfmpegSound
from simpler_distil_whisper.data.libsndfile import LibsndfileSound
from simpler_distil_whisper.data.part_of_file import PartOfFile
from simpler_distil_whisper.data.plain_text import TEXT_BYTES, first_line
from simpler_distil_whisper.data.signatures import recording_begins
from simpler_distil_whisper.data.sound import Block, DecodingError, Sound

# What soundfile raises.
UNREADABLE_ERRORS = (soundfile.LibsndfileError, OSError, TypeError)
HEADERLESS = {".gsm": "GSM610", ".vox": "VOX_ADPCM"}  # of telephones: 8000 samples a second
GSM_FRAME_BYTES, GSM_SIGN = 33, 0xD  # the first four bits of each frame


def open_sound(file: BinaryIO, name: str, *, thorough: bool) -> Sound:
    """Return the audio of an open file.

    Args:
        file: at its beginning.
        name: of the file, whose ending tells what a file without a header is.
        thorough: whether all of the file may be read, without which joined FLACs go unnoticed.

    Raises:
        soundfile.LibsndfileError: libsndfile cannot open it.
        DecodingError: neither can FFmpeg.
    """
    structures = read_structures(file, thorough=thorough)
    if len(structures) > MOST_RECORDINGS:
        raise DecodingError(f"more than {MOST_RECORDINGS} recordings are joined in it")
    if len(structures) > 1:
        return _JoinedSounds(file, structures)
    [structure] = structures
    subtype = _headerless_subtype(file, os.path.splitext(name)[1].lower())  # noqa: PTH122
    if structure.begin or structure.patch or structure.end < file.seek(0, os.SEEK_END):
        return _open_recording(PartOfFile(file, structure), structure, subtype)
    return _open_recording(file, structure, subtype)


def _headerless_subtype(file: BinaryIO, ending: str) -> str | None:
    """Return how a file without a header is coded; None: it has one, or is not what its name says.

    Any bytes can be decoded in this way, so that everything else is ruled out first.
    """
    if ending not in HEADERLESS or recording_begins(file, 0):
        return None
    beginning = read_at(file, 0, TEXT_BYTES)
    if first_line(beginning):
        return None
    if ending == ".gsm" and any(byte >> 4 != GSM_SIGN for byte in beginning[::GSM_FRAME_BYTES]):
        return None
    return HEADERLESS[ending]


def _open_recording(
    file: "BinaryIO | PartOfFile", structure: Structure, headerless_subtype: str | None = None
) -> Sound:
    """Return the audio of a file that holds one recording.

    Args:
        file: the file.
        structure: what its structure tells.
        headerless_subtype: how it is coded, if it has no header.

    Raises:
        soundfile.LibsndfileError: libsndfile cannot open it.
        DecodingError: neither can FFmpeg.
    """
    try:
        sound = LibsndfileSound(file, structure, headerless_subtype)
    except UNREADABLE_ERRORS as error:
        reason = getattr(error, "error_string", None) or str(error)
        return FfmpegSound(file, structure, reason.strip().rstrip("."))
    if sound.is_trusted:
        return sound
    sound.close()
    return FfmpegSound(file, structure, remark=sound.remark)


class _JoinedSounds:
    """The audio of files that were joined: one after the other."""

    def __init__(self, file: BinaryIO, structures: list[Structure]) -> None:
        self._sounds = [_open_recording(PartOfFile(file, one), one) for one in structures]
        for sound in self._sounds:
            sound.measure()
        self.seconds = sum(sound.seconds for sound in self._sounds)
        # Without those that are whole: NaN is larger than nothing.
        missing = sum(max(0.0, one.promised_seconds - one.seconds) for one in self._sounds)
        self.promised_seconds = self.seconds + missing if missing else math.nan
        self.channels = min(sound.channels for sound in self._sounds)
        self.remark: str | None = f"{len(structures)} files joined, of which all is used"

    def measure(self) -> None:
        """Do nothing: the length is known."""

    def close(self) -> None:
        for sound in self._sounds:
            sound.close()

    def blocks(self, start_seconds: float, duration_seconds: float | None) -> Iterator[Block]:
        begin, end = start_seconds, math.inf
        if duration_seconds is not None:
            end = start_seconds + duration_seconds
        for sound in self._sounds:
            if begin < sound.seconds and end > 0:
                start = max(begin, 0.0)
                yield from sound.blocks(start, None if end >= sound.seconds else end - start)
            begin, end = begin - sound.seconds, end - sound.seconds
