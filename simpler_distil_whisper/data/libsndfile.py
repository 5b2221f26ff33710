"""Audio that libsndfile decodes, and whether its idea of the length is right."""

import math
import os
from collections.abc import Iterator
from typing import BinaryIO

import soundfile

from simpler_distil_whisper.data.containers import UNDERSTATED, Structure
from simpler_distil_whisper.data.ffmpeg import FfmpegSound
from simpler_distil_whisper.data.part_of_file import PartOfFile
from simpler_distil_whisper.data.signatures import recording_behind
from simpler_distil_whisper.data.sound import (
    BLOCK_FRAMES,
    TOLERANCE_SECONDS,
    Block,
    DecodingError,
)

# The frames of an MP3 hold as much more than its audio: the encoder's delay and padding.
MP3_PADDING_SECONDS = 0.2
MP3_LEAD_FRAMES = 2**13
MOST_FRAMES = 2**48  # a FLAC of unknown length has more, by its header


class LibsndfileSound:
    """Audio that libsndfile decodes; `is_trusted` tells whether its idea of the length is right."""

    def __init__(
        self, file: BinaryIO | PartOfFile, structure: Structure, headerless_subtype: str | None
    ) -> None:
        self._raw = file
        self._file = _open_with_libsndfile(file, headerless_subtype)
        self.channels = self._file.channels
        self.seconds = self._file.frames / self._file.samplerate
        self.promised_seconds = math.inf if structure.torn else math.nan
        self.remark = structure.remark
        self.is_trusted = self._file.frames < MOST_FRAMES and not structure.paused
        if structure.shortage > 1:
            self._promise(self.seconds * structure.shortage)
        elif self._file.format == "MP3" and structure.frame_seconds is not None:
            self._compare_frames(structure.frame_seconds, structure.frames_promised)

    def _promise(self, seconds: float) -> None:
        if seconds > self.seconds + TOLERANCE_SECONDS:
            self.promised_seconds = seconds

    def _compare_frames(self, seconds: float, promised: bool) -> None:
        """Compare an MP3's length by its header, or as estimated, with that of all its frames."""
        padding = MP3_PADDING_SECONDS if promised else 0.001
        if seconds > self.seconds + padding:
            self.remark = UNDERSTATED
        is_cut = promised and seconds < self.seconds - TOLERANCE_SECONDS
        self.is_trusted = not is_cut and self.remark is None
        if not promised:
            self.seconds = seconds

    def measure(self) -> None:
        """Do nothing: the length is known."""

    def close(self) -> None:
        """Close libsndfile's file."""
        self._file.close()

    def blocks(self, start_seconds: float, duration_seconds: float | None) -> Iterator[Block]:
        """Yield the samples of a part, or as many of them as there are.

        Raises:
            DecodingError: neither library can decode them, or another recording follows.
        """
        rate = self._file.samplerate
        position = round(start_seconds * rate)
        # Behind the last frame of a FLAC, libsndfile would look for another one.
        left = self._file.frames - position
        if duration_seconds is not None:
            left = min(left, round(duration_seconds * rate))
        try:
            skipped = self._go_to(position)
            while left > 0:
                requested = min(BLOCK_FRAMES, left)
                block = self._file.read(requested + skipped, dtype="float32", always_2d=True)
                block, skipped = block[skipped:], 0
                yield rate, block
                position, left = position + len(block), left - len(block)
                if len(block) < requested:
                    self._end_at(position / rate)
                    return
            if duration_seconds is None and self._file.format == "FLAC":
                self._check_that_nothing_follows()
        except soundfile.LibsndfileError:  # FFmpeg decodes what is there of a FLAC that is cut off
            rest = None if duration_seconds is None else left / rate
            yield from self._by_ffmpeg(position / rate, rest)

    def _go_to(self, position: int) -> int:
        """Go to a sample, or to one before; return how many samples are to be skipped then."""
        if not self._file.seekable():
            return position
        # The decoder of MP3 begins with wrong samples, for it lacks what was before. They must be
        # skipped in the same call of `read`, since soundfile seeks after each.
        before = min(position, MP3_LEAD_FRAMES) if self._file.format == "MP3" else 0
        self._file.seek(position - before)
        return before

    def _end_at(self, seconds: float) -> None:
        """Note that no more is there, even if more was promised."""
        if seconds < self.seconds - TOLERANCE_SECONDS:
            self.promised_seconds, self.seconds = self.seconds, seconds

    def _check_that_nothing_follows(self) -> None:
        """Raise DecodingError if a recording of another kind was joined to a FLAC.

        Only its decoder knows where a FLAC ends.
        """
        if isinstance(self._raw, PartOfFile):
            return
        position = os.lseek(self._raw.fileno(), 0, os.SEEK_CUR)
        if place := recording_behind(self._raw, position):
            raise DecodingError(f"at byte {place}, another recording follows on it")

    def _by_ffmpeg(self, start_seconds: float, duration_seconds: float | None) -> Iterator[Block]:
        ffmpeg = FfmpegSound(self._raw, Structure(0, 0))
        yield from ffmpeg.blocks(start_seconds, duration_seconds)
        if not math.isnan(ffmpeg.seconds):
            self.seconds, self.promised_seconds = ffmpeg.seconds, ffmpeg.promised_seconds


def _open_with_libsndfile(
    file: BinaryIO | PartOfFile, headerless_subtype: str | None
) -> soundfile.SoundFile:
    headerless: dict[str, object] = {}
    if headerless_subtype:
        headerless = {"format": "RAW", "subtype": headerless_subtype}
        headerless |= {"samplerate": 8000, "channels": 1}
    if isinstance(file, PartOfFile):
        file.seek(0)
        return soundfile.SoundFile(file, **headerless)
    # By its descriptor libsndfile reads much faster than through Python, from where that stands.
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    return soundfile.SoundFile(file.fileno(), closefd=False, **headerless)
