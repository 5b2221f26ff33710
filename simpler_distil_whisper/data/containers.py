"""What the structure of an audio file tells and libsndfile does not check.

Files that were joined, cut off, or written by a recorder that never came to write the size. Owns
the walk over chunks (WAV, RF64, W64, AIFF, CAF), pages (Ogg), frames (MP3) and headers (AU). It
decodes nothing.
"""

import os
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import BinaryIO, NamedTuple

FEW_BYTES = 512  # behind the audio; nobody misses them
MOST_CHUNKS = 10_000
# What stands for the size where it is not known yet, as in a pipe, is about 2 or 4 gigabytes.
UNKNOWN_SIZE = 2**31 - 2**16
UNKNOWN_LONG_SIZE = 2**62  # where lengths have 64 bits
IN_DS64 = 2**32 - 1  # the length of an RF64's audio, which stands in its chunk "ds64"
FLAC_START = b"fLaC\x00\x00\x00\x22"  # with the header of the block that is always the first
OGG_HEADER_BYTES, OGG_FIRST_PAGE = 27, 2
BLOCK_BYTES = 2**20  # searched at once

# Of MPEG audio, layer III: kilobits per second by index; those of MPEG 1, then of 2 and 2.5.
MP3_BITRATES = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
MP3_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}


class Chunks(NamedTuple):
    """How the chunks of a kind of file are written.

    Attributes:
        head: how many bytes are before the first chunk.
        header: a chunk's name and length.
        audio: the name of the chunk that holds the audio.
        unknown: from this length on, it stands for one that is not known.
        counted: how many bytes of its own header a length counts.
        alignment: chunks begin at a multiple of it, mostly.
    """

    head: int
    header: struct.Struct
    audio: bytes
    unknown: int = UNKNOWN_SIZE
    counted: int = 0
    alignment: int = 2


CHUNKS = {
    b"RIFF": Chunks(12, struct.Struct("<4sI"), b"data"),
    b"RIFX": Chunks(12, struct.Struct(">4sI"), b"data"),
    b"RF64": Chunks(12, struct.Struct("<4sI"), b"data", UNKNOWN_LONG_SIZE),
    b"BW64": Chunks(12, struct.Struct("<4sI"), b"data", UNKNOWN_LONG_SIZE),
    b"riff": Chunks(40, struct.Struct("<4s12xQ"), b"data", UNKNOWN_LONG_SIZE, 24, 8),  # W64
    b"FORM": Chunks(12, struct.Struct(">4sI"), b"SSND"),
    b"caff": Chunks(8, struct.Struct(">4sQ"), b"data", UNKNOWN_LONG_SIZE),
}
AU_HEADER_BYTES = 24  # at least
AU_LAYOUTS = {b".snd": ">4sIII", b"dns.": "<4sIII"}  # name, length of the header, length, encoding
OTHER_STARTS = {b"fLaC", b"OggS", *CHUNKS, *AU_LAYOUTS}  # of files, whatever they begin with


class Structure(NamedTuple):
    """What the structure of a file tells.

    Attributes:
        parts: where the files that it consists of begin and end; usually one.
        shortage: how many times what is there the header promises; 1: it promises no more.
        understated: whether audio follows on what the header counts.
        torn: whether the file ends in the midst of a page.
        frame_seconds: of an MP3 whose header does not count its bytes, the length of all frames,
            which an encoder's delay and padding belong to.
        frames_promised: whether a header tells how many frames there are.
    """

    parts: list[tuple[int, int]]
    shortage: float = 1.0
    understated: bool = False
    torn: bool = False
    frame_seconds: float | None = None
    frames_promised: bool = True


def read_structure(file: BinaryIO, *, thorough: bool) -> Structure:
    """Return what the structure of a file tells.

    Args:
        file: the file.
        thorough: whether all of it may be read, without which joined FLACs go unnoticed.
    """
    size = file.seek(0, os.SEEK_END)
    beginning = _read(file, 0, 12)
    if beginning[:4] == b"OggS":
        return _read_pages(file, size)
    if beginning[:4] == b"fLaC" and thorough:
        return _joined_at([0, *_positions(file, FLAC_START, 1)], size)
    if beginning[:4] in CHUNKS:
        return _read_chunks(file, size, beginning[:4])
    if beginning[:4] in AU_LAYOUTS:
        return _read_au(file, size, beginning[:4])
    if beginning[:3] == b"ID3" or beginning[:1] == b"\xff":
        return _read_mp3_frames(file, size)
    return Structure([(0, size)])


def _joined_at(starts: list[int], size: int) -> Structure:
    return Structure(list(pairwise([*starts, size])))


def _read(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _positions(file: BinaryIO, pattern: bytes, start: int) -> Iterator[int]:
    """Yield where a pattern stands in a file, from `start` on."""
    overlap = len(pattern) - 1
    while len(block := _read(file, start, BLOCK_BYTES)) > overlap:
        place = block.find(pattern)
        while place >= 0:
            yield start + place
            place = block.find(pattern, place + 1)
        start += len(block) - overlap


def _read_chunks(file: BinaryIO, size: int, magic: bytes) -> Structure:
    """Return the structure of a file of chunks, which begins with `magic`."""
    kind, header = CHUNKS[magic], CHUNKS[magic].header
    starts, position, audio_passed, long_length = [0], kind.head, False, IN_DS64
    for _ in range(MOST_CHUNKS):
        content = _read(file, position, header.size)
        if len(content) < header.size:
            break
        name, length = header.unpack(content)
        length = max(length - kind.counted, 0)
        there = size - position - header.size
        if name == b"ds64":
            long_length = int.from_bytes(_read(file, position + header.size + 8, 8), "little")
        elif name == kind.audio:
            audio_passed = True
            length = long_length if length == IN_DS64 else length
            if length > there:
                known = length < kind.unknown and there > 0
                return _joined_at(starts, size)._replace(shortage=length / there if known else 1.0)
            if length == 0 and there > FEW_BYTES:
                return _joined_at(starts, size)._replace(understated=True)
        elif name == magic:  # the next file begins
            starts.append(position)
            position, audio_passed = position + kind.head, False
            continue
        elif audio_passed and name in OTHER_STARTS:
            return _joined_at([*starts, position], size)
        elif audio_passed and not _is_name(name):
            understated = there > FEW_BYTES
            return _joined_at(starts, size)._replace(understated=understated)
        end = min(position + header.size + length, size)
        position = _next_chunk(file, end, kind.alignment)
    return _joined_at(starts, size)


def _next_chunk(file: BinaryIO, end: int, alignment: int) -> int:
    """Return where the chunk after one that ends there begins."""
    return end if _is_name(_read(file, end, 4)) else end + -end % alignment


def _is_name(name: bytes) -> bool:
    return len(name) == 4 and all(32 <= letter < 127 for letter in name)


def _read_au(file: BinaryIO, size: int, magic: bytes) -> Structure:
    """Return the structure of an AU file, which has one header and its audio; or of several."""
    starts = [0]
    while True:
        header = _read(file, starts[-1], 16).ljust(16, b"\0")
        _, offset, length, _ = struct.unpack(AU_LAYOUTS[magic], header)
        offset = max(offset, AU_HEADER_BYTES)
        there = size - starts[-1] - offset
        if length >= there:
            known = length < UNKNOWN_SIZE and there > 0
            return _joined_at(starts, size)._replace(shortage=length / there if known else 1.0)
        end = starts[-1] + offset + length
        if _read(file, end, 4) != magic:
            return _joined_at(starts, size)._replace(understated=size - end > FEW_BYTES)
        starts.append(end)


def _read_pages(file: BinaryIO, size: int) -> Structure:
    """Return the structure of an Ogg file: streams one after the other are parts."""
    starts, position, among_first = [0], 0, True
    while position < size:
        page = _read(file, position, OGG_HEADER_BYTES + 255)
        if page[:4] != b"OggS":
            position = next(_positions(file, b"OggS", position + 1), size)
            continue
        if len(page) < OGG_HEADER_BYTES:
            position = size + 1
            break
        is_first = bool(page[5] & OGG_FIRST_PAGE)
        if is_first and not among_first:
            starts.append(position)
        among_first = is_first
        lengths = page[OGG_HEADER_BYTES : OGG_HEADER_BYTES + page[26]]
        position += OGG_HEADER_BYTES + page[26] + sum(lengths)
    return _joined_at(starts, size)._replace(torn=position > size)


def _read_mp3_frames(file: BinaryIO, size: int) -> Structure:
    """Return the structure of an MP3: no frames are counted if its header counts all its bytes."""
    plain = Structure([(0, size)])
    start = next(_mp3_frames(file, _after_id3(file)), None)
    if start is None:
        return plain
    counted = _counted_bytes(_read(file, start[0], 256))
    if counted and abs(counted - (size - start[0])) < FEW_BYTES:
        return plain
    frames = _mp3_frames(file, start[0])
    if counted is not None:
        next(frames)  # the header's own frame
    total = sum(seconds for _, seconds in frames)
    return plain._replace(frame_seconds=total, frames_promised=counted is not None)


def _after_id3(file: BinaryIO) -> int:
    head = _read(file, 0, 10)
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    return 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))


def _counted_bytes(frame: bytes) -> int | None:
    """Return how many bytes the header in an MP3's first frame counts; 0: not told, None: none."""
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    if place < 0:
        return 0 if b"VBRI" in frame else None
    flags = frame[place + 7]
    if flags & 3 != 3:
        return 0
    return int.from_bytes(frame[place + 12 : place + 16], "big")


def _mp3_frames(file: BinaryIO, position: int) -> Iterator[tuple[int, float]]:
    """Yield the offset and the length in seconds of each frame; what is no frame is skipped."""
    while True:
        while frame := _mp3_frame(_read(file, position, 4)):
            yield position, frame[1]
            position += frame[0]
        for place in _positions(file, b"\xff", position + 1):
            frame = _mp3_frame(_read(file, place, 4))
            if frame and _mp3_frame(_read(file, place + frame[0], 4)):
                position = place
                break
        else:
            return


def _mp3_frame(header: bytes) -> tuple[int, float] | None:
    """Return a frame's length in bytes and in seconds; None if this is no header of layer III."""
    if len(header) < 4:
        return None
    version, bitrate, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if header[0] != 255 or header[1] & 0xE6 != 0xE2 or version == 1 or rate == 3:
        return None
    if not 0 < bitrate < 15:
        return None
    hertz, samples = MP3_RATES[version][rate], 1152 if version == 3 else 576
    kilobits = MP3_BITRATES[0 if version == 3 else 1][bitrate]
    return samples * kilobits * 125 // hertz + (header[2] >> 1 & 1), samples / hertz
