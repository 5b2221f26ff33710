"""The frames of MP3 and AAC: which bytes are one, how long it is, and where the next one lies.

Owns their headers, and the tags of an MP3 that stand before them or count them. It decodes nothing.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import BinaryIO

from simpler_distil_whisper.data.byte_search import SEARCHED_BYTES, positions_of, read_at

CHAINED_FRAMES = 4  # by which frames are told from other bytes
# Of MPEG audio, layer III: kilobits per second by index; those of MPEG 1, then of 2 and 2.5.
MP3_BITRATES = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
FRAME_HEADER_BYTES = 7
ADTS_RATES = (  # of AAC, by index
    *(96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050),
    *(16_000, 12_000, 11_025, 8_000, 7_350),
)
MP3_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}

# Reads the header of a frame: its length in bytes and in seconds; None: it is none.
FrameOf = Callable[[bytes], tuple[int, float] | None]


def after_id3(file: BinaryIO, position: int) -> int:
    """Return where the ID3 tag ends that begins there; the same place if none does."""
    head = read_at(file, position, 10)
    if head[:3] != b"ID3" or len(head) < 10:
        return position
    shifted = (byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    return position + 10 + sum(shifted)


def counted_bytes(frame: bytes) -> int | None:
    """Return how many bytes the header in an MP3's first frame counts; 0: not told, None: none."""
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    if place < 0:
        return 0 if b"VBRI" in frame else None
    flags = frame[place + 7]
    if flags & 3 != 3:
        return 0
    return int.from_bytes(frame[place + 12 : place + 16], "big")


def _chain(file: BinaryIO, position: int, frame_of: FrameOf) -> Iterator[tuple[int, int, float]]:
    """Yield offset, length in bytes and in seconds of frames, one directly behind the other."""
    while frame := frame_of(read_at(file, position, FRAME_HEADER_BYTES)):
        yield position, *frame
        position += frame[0]


def _is_chain(file: BinaryIO, position: int, frame_of: FrameOf, frames: int) -> bool:
    """Return whether as many frames begin there, one directly behind the other."""
    return len(list(itertools.islice(_chain(file, position, frame_of), frames))) == frames


def frames_begin(file: BinaryIO, position: int) -> bool:
    """Return whether frames of MP3 or AAC begin there, enough to be told from other bytes."""
    kinds = (mp3_frame, adts_frame)
    return any(_is_chain(file, position, kind, CHAINED_FRAMES) for kind in kinds)


def frames_of(
    file: BinaryIO, position: int, size: int, frame_of: FrameOf
) -> Iterator[tuple[int, int, float]]:
    """Yield offset, length in bytes and in seconds of a file's frames; other bytes are skipped.

    Args:
        file: the file.
        position: where to begin.
        size: of the file.
        frame_of: `mp3_frame` or `adts_frame`.
    """
    while True:
        for frame in _chain(file, position, frame_of):
            yield frame
            position = frame[0] + frame[1]
        position = after_id3(file, position)
        for place in positions_of(file, b"\xff", position, min(size, position + SEARCHED_BYTES)):
            if _is_chain(file, place, frame_of, 2):
                position = place
                break
        else:
            return


def mp3_frame(header: bytes) -> tuple[int, float] | None:
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


def adts_frame(header: bytes) -> tuple[int, float] | None:
    """Return a frame's length in bytes and in seconds; None if this is no header of AAC."""
    if len(header) < FRAME_HEADER_BYTES or header[0] != 255 or header[1] & 0xF6 != 0xF0:
        return None
    rate = header[2] >> 2 & 15
    length = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    if rate >= len(ADTS_RATES) or length < FRAME_HEADER_BYTES:
        return None
    return length, 1024 / ADTS_RATES[rate]
