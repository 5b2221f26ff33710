"""Open audio files -> samples, by libsndfile or, where it reads less than is there, by FFmpeg.

Owns the choice between the two, what a file promises against what it holds, and the silence where
nothing was recorded. It mixes no channels and resamples nothing.
"""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np
import soundfile

from simpler_distil_whisper.data.byte_search import read_at
from simpler_distil_whisper.data.containers import (
    MOST_RECORDINGS,
    UNDERSTATED,
    Structure,
    read_structures,
    recording_begins,
    recording_behind,
)
from simpler_distil_whisper.data.pauses import Timeline
from simpler_distil_whisper.data.plain_text import TEXT_BYTES, first_line

# What soundfile raises.
UNREADABLE_ERRORS = (soundfile.LibsndfileError, OSError, TypeError)
# Times in manifests are rounded, and encoders add and drop some milliseconds.
TOLERANCE_SECONDS = 0.05
# The frames of an MP3 hold as much more than its audio: the encoder's delay and padding.
MP3_PADDING_SECONDS = 0.2
# Of the lengths in the headers of videos and the like.
CONTAINER_TOLERANCE_SECONDS = 0.25
BLOCK_FRAMES = 2**20  # read at once
MP3_LEAD_FRAMES = 2**13
MOST_FRAMES = 2**48  # a FLAC of unknown length has more, by its header
HEADERLESS = {".gsm": "GSM610", ".vox": "VOX_ADPCM"}  # of telephones: 8000 samples a second
GSM_FRAME_BYTES, GSM_SIGN = 33, 0xD  # the first four bits of each frame
# Playlists, by which a file could make FFmpeg open other files, are not among them.
FFMPEG_FORMATS = "aac,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,flac,flv,matroska,webm,mov,mp4,mp3,"
FFMPEG_FORMATS += "mpeg,mpegts,ogg,tta,w64,wav,wv"
# In these the header promises a length; of others, FFmpeg estimates it by the bit rate.
PROMISING_FORMATS = {"asf", "flac", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}
LONGEST_SECONDS = 86_400.0  # of one row, which takes six gigabytes of memory, and of its pauses
PAUSED = "by its time stamps nothing was recorded for a while, which is silence"
MOST_BYTES_BETWEEN = 2**26  # two pieces of audio; FFmpeg would look for more for ever

Block = tuple[int, np.ndarray]  # the sample rate, float32 [S, C]


class DecodingError(Exception):
    """A file that cannot be decoded; the message is the reason in a few words."""


class CutOffError(DecodingError):
    """A file that ends too early for any of it to be decoded."""


class Sound(Protocol):
    """The audio of an open file.

    Attributes:
        seconds: its length; NaN until all of it is decoded, where only that tells.
        promised_seconds: the length by its header, where less is there; infinite where the end is
            missing, but nothing tells how much that is; NaN: it is whole.
        channels: how many.
        remark: what is odd about it, for the log.
    """

    seconds: float
    promised_seconds: float
    channels: int
    remark: str | None

    def blocks(self, start_seconds: float, duration_seconds: float | None) -> Iterator[Block]:
        """Yield the samples of a part, or as many of them as there are; zeros for pauses.

        Raises:
            soundfile.LibsndfileError: libsndfile cannot decode them.
            DecodingError: FFmpeg cannot decode them.
        """
        ...

    def measure(self) -> None:
        """Decode the file if need be, so that `seconds` is known."""
        ...

    def close(self) -> None:
        """Free what decoding takes."""
        ...


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
        return _open_recording(_Part(file, structure), structure, subtype)
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
    file: "BinaryIO | _Part", structure: Structure, headerless_subtype: str | None = None
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
        sound = _LibsndfileSound(file, structure, headerless_subtype)
    except UNREADABLE_ERRORS as error:
        reason = getattr(error, "error_string", None) or str(error)
        return _FfmpegSound(file, structure, reason.strip().rstrip("."))
    if sound.is_trusted:
        return sound
    sound.close()
    return _FfmpegSound(file, structure, remark=sound.remark)


class _SeeksForC:
    """Answers C libraries that seek where no file can be; they would print an exception."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Return the new position, or -1."""
        try:
            return super().seek(offset, whence)  # type: ignore[misc, no-any-return]
        except (OSError, ValueError):
            return -1


class _FileForC(_SeeksForC, io.FileIO):
    pass


class _Rationed:
    """A file for FFmpeg, which ends where too much of it is no audio: all of it may be damaged.

    Attributes:
        left: how many bytes may be read until there is audio.
    """

    def __init__(self, file: "BinaryIO | _Part") -> None:
        self._file, self.left = file, MOST_BYTES_BETWEEN
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        """Return the next bytes; none if there was no audio for too long."""
        content = self._file.read(count) if self.left > 0 else b""
        self.left -= max(len(content), 1)
        return content


class _Part(io.BufferedIOBase):
    """A recording within a file, as a file: with the length in its header that it has."""

    def __init__(self, file: BinaryIO, structure: Structure) -> None:
        # By libsndfile, the position may be moved behind the buffer of the file.
        self._file = io.FileIO(file.fileno(), closefd=False)
        self._structure, self._position = structure, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Return the new position, or -1."""
        size = self._structure.end - self._structure.begin
        position = offset + {os.SEEK_CUR: self._position, os.SEEK_END: size}.get(whence, 0)
        if position < 0:
            return -1
        self._position = position
        return position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def read(self, count: int | None = -1, /) -> bytes:
        """Return the next bytes, as they should be."""
        place = self._structure.begin + self._position
        left = max(0, self._structure.end - place)
        self._file.seek(place)
        content = self._file.read(left if count is None or count < 0 else min(count, left))
        if self._structure.patch:
            start, right = self._structure.patch
            content = bytearray(content)
            for index, byte in enumerate(right, start - place):
                if 0 <= index < len(content):
                    content[index] = byte
        self._position += len(content)
        return bytes(content)


class _LibsndfileSound:
    """Audio that libsndfile decodes; `is_trusted` tells whether its idea of the length is right."""

    def __init__(
        self, file: BinaryIO | _Part, structure: Structure, headerless_subtype: str | None
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
        self._file.close()

    def blocks(self, start_seconds: float, duration_seconds: float | None) -> Iterator[Block]:
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
        if isinstance(self._raw, _Part):
            return
        position = os.lseek(self._raw.fileno(), 0, os.SEEK_CUR)
        if place := recording_behind(self._raw, position):
            raise DecodingError(f"at byte {place}, another recording follows on it")

    def _by_ffmpeg(self, start_seconds: float, duration_seconds: float | None) -> Iterator[Block]:
        ffmpeg = _FfmpegSound(self._raw, Structure(0, 0))
        yield from ffmpeg.blocks(start_seconds, duration_seconds)
        if not math.isnan(ffmpeg.seconds):
            self.seconds, self.promised_seconds = ffmpeg.seconds, ffmpeg.promised_seconds


def _open_with_libsndfile(
    file: BinaryIO | _Part, headerless_subtype: str | None
) -> soundfile.SoundFile:
    headerless: dict[str, object] = {}
    if headerless_subtype:
        headerless = {"format": "RAW", "subtype": headerless_subtype}
        headerless |= {"samplerate": 8000, "channels": 1}
    if isinstance(file, _Part):
        file.seek(0)
        return soundfile.SoundFile(file, **headerless)
    # By its descriptor libsndfile reads much faster than through Python, from where that stands.
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    return soundfile.SoundFile(file.fileno(), closefd=False, **headerless)


class _JoinedSounds:
    """The audio of files that were joined: one after the other."""

    def __init__(self, file: BinaryIO, structures: list[Structure]) -> None:
        self._sounds = [_open_recording(_Part(file, one), one) for one in structures]
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


class _FfmpegSound:
    """Audio that FFmpeg decodes: always from the beginning, since it seeks inexactly."""

    def __init__(
        self,
        file: BinaryIO | _Part,
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
        for _ in self.blocks(0.0, None):
            pass

    def close(self) -> None:
        """Do nothing: nothing is kept open."""

    def blocks(self, start_seconds: float, duration_seconds: float | None) -> Iterator[Block]:
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
        if not isinstance(file, _Part):
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


def _silence(seconds: float, rate: int, channels: int) -> Iterator[Block]:
    """Yield zeros, in blocks."""
    left = round(seconds * rate)
    while left > 0:
        yield rate, np.zeros((min(BLOCK_FRAMES, left), channels), np.float32)
        left -= BLOCK_FRAMES
