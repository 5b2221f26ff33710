"""Audio that FFmpeg decodes, with silence where nothing was recorded."""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from simpler_distil_whisper.data.containers import Structure
from simpler_distil_whisper.data.part_of_file import PartOfFile
from simpler_distil_whisper.data.pauses import Timeline
from simpler_distil_whisper.data.sound import (
    BLOCK_FRAMES,
    LONGEST_SECONDS,
    TOLERANCE_SECONDS,
    Block,
    CutOffError,
    DecodingError,
)

# Playlists, by which a file could make FFmpeg open other files, are not among them.
FFMPEG_FORMATS = "aac,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,flac,flv,matroska,webm,mov,mp4,mp3,"
FFMPEG_FORMATS += "mpeg,mpegts,ogg,tta,w64,wav,wv"
# In these the header promises a length; of others, FFmpeg estimates it by the bit rate.
PROMISING_FORMATS = {"asf", "flac", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}
# Of the lengths in the headers of videos and the like.
CONTAINER_TOLERANCE_SECONDS = 0.25
PAUSED = "by its time stamps nothing was recorded for a while, which is silence"
MOST_BYTES_BETWEEN = 2**26  # two pieces of audio; FFmpeg would look for more for ever


class FfmpegSound:
    """Audio that FFmpeg decodes: always from the beginning, since it seeks inexactly."""

    def __init__(
        self,
        file: BinaryIO | PartOfFile,
        structure: Structure,
        reason: str | None = None,
        remark: str | None = None,
    ) -> None:
        """Open the file once, to see whether it is audio.

        Args:
            file: the file.
            structure: what its structure tells.
            reason: why libsndfile does not read it.
            remark: what is odd about it, if not what its structure tells.
        """
        self._file, self._structure, self._reason = file, structure, reason
        self._lost_seconds = 0.0
        self.seconds = self.promised_seconds = math.nan
        self.remark = remark or structure.remark
        with self._opened() as (_, stream):
            self.channels = stream.codec_context.channels

    def measure(self) -> None:
        """Decode the file, so that `seconds` is known."""
        for _ in self.blocks(0.0, None):
            pass

    def close(self) -> None:
        """Do nothing: nothing is kept open."""

    def blocks(self, start_seconds: float, duration_seconds: float | None) -> Iterator[Block]:
        """Yield the samples of a part, or as many of them as there are; zeros for pauses.

        Raises:
            DecodingError: FFmpeg cannot decode them.
        """
        with self._opened() as (container, stream):
            self._lost_seconds, position, rate = 0.0, 0, 1
            for rate, samples in self._decoded(container, stream):
                # Samples are counted, not seconds, so that a part is exactly what it is cut from.
                start, end = round(start_seconds * rate) - position, len(samples)
                if duration_seconds is not None:
                    end = min(end, start + round(duration_seconds * rate))
                yield rate, samples[max(start, 0) : max(end, 0)]
                if end < len(samples):
                    return
                position += len(samples)
            if self._ration.left <= 0:
                raise DecodingError(f"{MOST_BYTES_BETWEEN // 2**20} MiB of it are no audio")
            self.seconds = position / rate
            self._compare(self._promised(container, stream))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Open the file; give the container and its stream of audio."""
        import av

        file = self._file
        if not isinstance(file, PartOfFile):
            # libsndfile may have moved on behind the buffer.
            file = _FileForC(file.fileno(), closefd=False)
        file.seek(0)
        self._ration = _Rationed(file)
        options = {"format_whitelist": FFMPEG_FORMATS}
        try:
            with av.open(self._ration, options=options, metadata_errors="replace") as container:
                stream = container.streams.best("audio")
                if stream is None:
                    raise self._error("no audio in it")
                if stream.codec_context is None:
                    raise DecodingError("its audio is in a format that FFmpeg does not know")
                yield container, stream
        except av.FFmpegError as error:
            raise self._error(self._reason or error.strerror) from None

    def _error(self, reason: str | None) -> DecodingError:
        """Return the error of a file that FFmpeg does not open, by the reason if it is whole."""
        if self._structure.torn:
            return CutOffError("it ends in the midst of a page")
        if self._structure.lacks_index:
            return CutOffError("it ends before its index is complete")
        return DecodingError(reason)

    def _decoded(self, container: Any, stream: Any) -> Iterator[Block]:
        """Yield everything that can be decoded, and silence where nothing was recorded."""
        import av

        convert, form = av.AudioResampler(format="flt"), None
        for frame, pause in self._frames(container, stream):
            if pause:
                self.remark = self.remark or PAUSED
                yield from _silence(pause, frame.rate, frame.layout.nb_channels)
            if form not in (None, (frame.rate, frame.layout.name)):
                convert = av.AudioResampler(format="flt")
            form = frame.rate, frame.layout.name
            for converted in convert.resample(frame):
                channels = converted.layout.nb_channels
                yield frame.rate, converted.to_ndarray().reshape(-1, channels)

    def _frames(self, container: Any, stream: Any) -> Iterator[tuple[Any, float]]:
        """Yield the frames, each with the seconds of the pause before it; note how much is lost.

        Raises:
            DecodingError: by its time stamps, the pauses are longer than any recording.
        """
        import av

        packets, timeline = container.demux(stream), Timeline(container)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.FFmpegError):
                return
            timeline.reach(packet)
            try:
                frames = packet.decode()
            except av.FFmpegError:
                timeline.lost_seconds += float((packet.duration or 0) * stream.time_base)
                frames = []
            if frames:
                self._ration.left = MOST_BYTES_BETWEEN
            for frame in frames:
                pause, paused = timeline.pause_before(frame), timeline.paused_seconds
                if paused > LONGEST_SECONDS:
                    raise DecodingError(f"its time stamps leave out {paused:.0f} s")
                yield frame, pause
            self._lost_seconds = timeline.lost_seconds

    def _promised(self, container: Any, stream: Any) -> float:
        """Return the length by the header; 0 where it tells none, or FFmpeg only estimates it."""
        if self._structure.shortage > 1:
            return self.seconds * self._structure.shortage
        frames_are_counted = self._structure.frame_seconds and self._structure.frames_promised
        if container.format.name not in PROMISING_FORMATS and not frames_are_counted:
            return 0.0
        if stream.duration:
            return float(stream.duration * stream.time_base)
        if container.duration and not container.streams.video:
            # Of a Matroska, it is the time at the end, whatever that at the beginning is.
            return float(container.duration - max(container.start_time or 0, 0)) / 1e6
        return 0.0

    def _compare(self, promised: float) -> None:
        """Note what is missing, now that everything is decoded.

        Raises:
            DecodingError: a part in the midst cannot be decoded.
        """
        tolerance = 0.0 if self._lost_seconds else CONTAINER_TOLERANCE_SECONDS
        if self._structure.torn:
            self.promised_seconds = math.inf
        elif promised > self.seconds + tolerance:
            self.promised_seconds = promised
        elif self._lost_seconds > TOLERANCE_SECONDS:
            raise DecodingError(f"damaged: {self._lost_seconds:.3f} s of it are lost")


class _FileForC(io.FileIO):
    """Answers a C library that seeks where no file can be; it would print an exception."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Return the new position, or -1."""
        try:
            return super().seek(offset, whence)
        except (OSError, ValueError):
            return -1


class _Rationed:
    """A file for FFmpeg, which ends where too much of it is no audio: all of it may be damaged.

    Attributes:
        left: how many bytes may be read until there is audio.
    """

    def __init__(self, file: "BinaryIO | PartOfFile") -> None:
        self._file, self.left = file, MOST_BYTES_BETWEEN
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        """Return the next bytes; none if there was no audio for too long."""
        content = self._file.read(count) if self.left > 0 else b""
        self.left -= max(len(content), 1)
        return content


def _silence(seconds: float, rate: int, channels: int) -> Iterator[Block]:
    """Yield zeros, in blocks."""
    left = round(seconds * rate)
    while left > 0:
        yield rate, np.zeros((min(BLOCK_FRAMES, left), channels), np.float32)
        left -= BLOCK_FRAMES
