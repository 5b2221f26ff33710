"""Time stamps -> the pauses in a recording, in which nothing was recorded.

Owns what is a pause, what is damage and what a clock that runs too fast. It decodes nothing: it is
given the packets and frames of FFmpeg (`Timeline`), or the pages of an Ogg Opus (`OpusPages`).
"""

import struct
from typing import Any

# In these a time stamp may lie ahead of the audio so far: nothing was recorded in between.
TIMED_FORMATS = {"flv", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "ogg"}
# Here audio lies closely behind audio; between what does not, some is damaged.
DENSE_FORMATS = {"flv", "matroska,webm"}
DENSE_BYTES = 512  # between packets, at most
PAUSE_SECONDS = 0.1
# At a pause, time stamps jump; those of a clock that is too fast run ahead little by little.
JUMP_SECONDS = 0.005
OGG_HEADER = struct.Struct("<4sxBqII4xB")  # name, flags, time, stream, number, count of lengths
OGG_CONTINUED = 1
OPUS_RATE = 48_000  # of the times on its pages
OPUS_BYTES = 8  # of a page's content, by which its packets are known


class Timeline:
    """Finds the pauses between frames, by their times.

    Attributes:
        lost_seconds: how much could not be decoded, or was damaged; no pause.
        paused_seconds: of all pauses so far.
    """

    def __init__(self, container: Any) -> None:
        """Start at the beginning of a container of FFmpeg."""
        name = container.format.name
        self._is_timed = name in TIMED_FORMATS
        self._is_dense = name in DENSE_FORMATS and len(container.streams) == 1
        self.lost_seconds = self._decoded_seconds = self.paused_seconds = self._ahead = 0.0
        self._first_time: float | None = None
        self._position = self._end = self._bytes_between = 0

    def reach(self, packet: Any) -> None:
        """Go on to the next packet; several may share a position, since they share a block."""
        if packet.pos is not None:
            start = self._end if packet.pos == self._position else packet.pos
            self._bytes_between = start - self._end if self._end else 0
            self._position, self._end = packet.pos, start + packet.size

    def pause_before(self, frame: Any) -> float:
        """Return how many seconds nothing was recorded before the next frame; mostly 0."""
        pause = self._missing_before(frame)
        if self._is_dense and self._bytes_between > DENSE_BYTES:
            self.lost_seconds += pause
            pause = 0.0
        self.paused_seconds += pause
        self._decoded_seconds += frame.samples / frame.rate
        return pause

    def _missing_before(self, frame: Any) -> float:
        """Return by how many seconds a frame's time jumps ahead of what there is so far."""
        if not self._is_timed or frame.pts is None:
            return 0.0
        time = float(frame.pts * frame.time_base)
        so_far = self._decoded_seconds + self.paused_seconds + self.lost_seconds
        if self._first_time is None:
            self._first_time = time - so_far
        before, self._ahead = self._ahead, time - self._first_time - so_far
        if self._ahead < PAUSE_SECONDS or self._ahead < before + JUMP_SECONDS:
            return 0.0
        missing, self._ahead = self._ahead, 0.0
        return missing


class OpusPages:
    """Compares the times on the pages of an Opus stream with the packets that they hold.

    Attributes:
        paused: whether more than a moment is missing between the packets.
    """

    def __init__(self) -> None:
        """Start before the first page."""
        self.paused = False
        self._stream: int | None = None
        self._number = self._time = self._ahead = self._packet_samples = 0

    def add(self, page: bytes, lengths: bytes) -> None:
        """Take in the next page.

        Args:
            page: how it begins: header, lengths and some of the content.
            lengths: of the pieces of packets in it; one of less than 255 bytes ends a packet.
        """
        _, flags, time, stream, number, count = OGG_HEADER.unpack_from(page)
        content = page[OGG_HEADER.size + count :]
        if content[:OPUS_BYTES] == b"OpusHead":
            self._stream = stream
        follows, self._number = number == self._number + 1, number
        if stream != self._stream or time <= 0:  # no packet of audio ends in it
            return
        if not flags & OGG_CONTINUED and len(content) > 1:
            self._packet_samples = _opus_samples(*content[:2])
        packets = sum(length < 255 for length in lengths)
        if self._time and follows:  # otherwise pages are lost
            self._ahead += time - self._time - packets * self._packet_samples
            self.paused = self.paused or self._ahead > PAUSE_SECONDS * OPUS_RATE
        self._time = time


def _opus_samples(kind: int, count: int) -> int:
    """Return how many samples, at 48 kHz, a packet of Opus with these first bytes has."""
    mode = kind >> 3
    if mode < 12:
        tenths = (100, 200, 400, 600)[mode & 3]
    elif mode < 16:
        tenths = (100, 200)[mode & 1]
    else:
        tenths = (25, 50, 100, 200)[mode & 3]
    frames = (1, 2, 2, count & 63)[kind & 3]
    return frames * tenths * OPUS_RATE // 10_000
