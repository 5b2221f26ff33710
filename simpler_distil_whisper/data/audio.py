"""Files and parts of files -> mono 16 kHz waveforms, or the reason why not.

Owns the choice of the channel, the scale and the resampling. It knows nothing of manifests, models
or torch: worker processes need nothing else.
"""

import contextlib
import functools
import io
import itertools
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeGuard

import numpy as np
import soxr

from simpler_distil_whisper.data.decoders import UNREADABLE_ERRORS, open_sound
from simpler_distil_whisper.data.plain_text import TEXT_BYTES, first_line
from simpler_distil_whisper.data.sound import (
    LONGEST_SECONDS,
    TOLERANCE_SECONDS,
    Block,
    CutOffError,
    DecodingError,
    Sound,
)
from simpler_distil_whisper.files import open_regular_file

log = logging.getLogger(__name__)

SAMPLE_RATE = 16_000  # of every Whisper
MEAN = "mean"
SIDES = ("left", "right")  # the first two channels; others are named by their number, from 1
# Others come from damaged headers, and of a second at 1 Hz 16,000 samples would be made up.
RATES = range(1_000, 1_000_001)
# Where the mean of two channels has so small a share of the power of the louder one, they cancel.
CANCELLING_POWER = 0.01
SILENT_POWER = 1e-6  # of a channel, compared with the other one's
AUDIBLE_POWER = 1e-6  # of full scale: -60 dB
# Decoders of lossy formats overshoot 1, but not by so much.
LARGEST_SAMPLE = 8.0
INTEGER_SCALES = (2.0**15, 2.0**23, 2.0**31)
# Of such integers, most are beyond 1; of samples among which some are damaged, few.
FEWEST_LOUD = 0.01
MOST_REMARKS = 20  # logged by a process


class AudioError(Exception):
    """This audio cannot be used; the message is the reason, without the path."""


class MissingAudio(AudioError):
    """The file is not there."""


class Clip(NamedTuple):
    """A file, or the part of it that the rest names; `load_audio(*clip)` loads it.

    Attributes:
        path: the file.
        start_seconds: where the part begins.
        duration_seconds: length of the part; None: to the end of the file.
        channel: "mean", "left", "right" or the number of a channel, from "1".
    """

    path: Path
    start_seconds: float = 0.0
    duration_seconds: float | None = None
    channel: str = MEAN


def load_audio(
    path: Path,
    start_seconds: float = 0.0,
    duration_seconds: float | None = None,
    channel: str = MEAN,
    *,
    min_seconds: float = 0.0,
    max_seconds: float = LONGEST_SECONDS,
) -> np.ndarray:
    """Return a file, or a part of it, as one channel at 16 kHz.

    Args:
        path: of any format that `decoders` reads, at any rate, with any number of channels.
        start_seconds: where the part begins.
        duration_seconds: length of the part; None: to the end of the file.
        channel: as in `Clip`. Where the mean would be silent, since two channels are in opposite
            phase or one of them is silent, the louder one takes its place.
        min_seconds: shorter audio is an error.
        max_seconds: longer audio is an error, which the header mostly shows before anything is
            decoded; more than a day never is taken.

    Returns:
        float32 [S]: the channel or the mean of all, resampled by soxr "HQ" (what `librosa.load`
            does), about -1 to 1; zeros where, by the time stamps, nothing was recorded.

    Raises:
        AudioError: the file is missing, undecodable, empty, damaged, cut off, not finite, too short
            or too long.
    """
    part, max_seconds = (start_seconds, duration_seconds), min(max_seconds, LONGEST_SECONDS)
    with _opened(path, thorough=True) as sound:
        _channel_index(channel, sound.channels)
        if not math.isnan(sound.seconds):
            # Checked to avoid decoding hours of audio; the decoded length decides.
            check_length(_part_seconds(sound, *part), 0.0, max_seconds + TOLERANCE_SECONDS)
        pieces = _read_mono(sound, part, channel, path, max_seconds)
        if not math.isnan(sound.seconds):
            _part_seconds(sound, *part)  # again: decoding may have found the file shorter
        if sound.remark:
            _log_once(path, sound.remark)
    if not sum(len(mono) for _, mono in pieces):
        raise AudioError("empty: it decodes to no samples")
    check_length(sum(len(mono) / rate for rate, mono in pieces), min_seconds, max_seconds)
    waveforms = [_resampled(_to_full_scale(mono, path), rate) for rate, mono in pieces]
    waveform = waveforms[0] if len(waveforms) == 1 else np.concatenate(waveforms)
    if not len(waveform):
        raise AudioError("empty: it is shorter than a sample at 16 kHz")
    return waveform


def audio_seconds(
    path: Path,
    start_seconds: float = 0.0,
    duration_seconds: float | None = None,
    channel: str = MEAN,
) -> float:
    """Return the length of a file, or of a part of it, from the header where that can be trusted.

    Raises:
        AudioError: the file cannot be opened, is cut off, has no such channel, or the part lies
            outside it.
    """
    with _opened(path, thorough=False) as sound:
        _channel_index(channel, sound.channels)
        if math.isnan(sound.seconds):
            status = path.stat()
            sound.seconds, sound.promised_seconds = _measured(
                path, status.st_size, status.st_mtime_ns
            )
        return _part_seconds(sound, start_seconds, duration_seconds)


def channel_count(path: Path) -> int:
    """Return how many channels a file has.

    Raises:
        AudioError: the file cannot be opened.
    """
    with _opened(path, thorough=False) as sound:
        return sound.channels


@functools.lru_cache(maxsize=1000)
def _measured(path: Path, size: int, modified: int) -> tuple[float, float]:
    """Return the length of a file and the promised one; many rows may be parts of it."""
    with _opened(path, thorough=False) as sound:
        sound.measure()
        return sound.seconds, sound.promised_seconds


@contextlib.contextmanager
def _opened(path: Path, *, thorough: bool) -> Iterator[Sound]:
    """Open a file to decode it; whatever fails with it is an AudioError."""
    try:
        with open_regular_file(path) as file:
            try:
                with contextlib.closing(open_sound(file, path.name, thorough=thorough)) as sound:
                    yield sound
            except (*UNREADABLE_ERRORS, DecodingError) as error:
                raise AudioError(_why_undecodable(file, error)) from None
    except OSError as error:
        if not os.path.exists(path):  # noqa: PTH110  # also where a disk does not answer
            raise MissingAudio("no such file") from None
        raise AudioError(f"cannot be opened: {error.strerror}") from None


@np.errstate(all="ignore")  # of NaN and the like, which is rejected later
def _read_mono(
    sound: Sound, part: tuple[float, float | None], channel: str, path: Path, max_seconds: float
) -> list[Block]:
    """Return the part as one channel: a rate and float32 [S] for each rate it was recorded in."""
    seconds = 0.0
    loudness = _Loudness(sound.channels)
    blocks: list[Block] = []
    # The file is read in blocks, so that all channels of half an hour are never in memory at once.
    for rate, samples in sound.blocks(*part):
        if rate not in RATES:
            raise AudioError(f"damaged: by its header, it has {rate} samples in a second")
        index = _channel_index(channel, samples.shape[1])  # whatever the header tells
        mono = samples.mean(axis=1) if index is None else samples[:, index]
        if index is None and samples.shape[1] == sound.channels > 1:
            loudness.add(samples, mono, rate)
        blocks.append((rate, mono))
        seconds += len(mono) / rate
        if math.isnan(sound.seconds) and seconds > max_seconds:  # days might fit into no memory
            raise AudioError(f"too long: no end in {seconds:.3f} s, the maximum is {max_seconds:g}")
    if loudness.mean_is_unfit:
        name = channel_name(loudness.loudest)
        _log_once(path, f"its channels cancel, or one is silent: the louder one, {name}, is used")
        return _read_mono(sound, part, name, path, max_seconds)
    return [
        (rate, np.concatenate([mono for _, mono in group]))
        for rate, group in itertools.groupby(blocks, key=lambda block: block[0])
    ]


class _Loudness:
    """How loud the channels are, and their mean.

    Attributes:
        powers: float64 [C]: the sum of the squares of each channel.
        cancel: whether the channels cancel each other for a while.
    """

    def __init__(self, channels: int) -> None:
        self.powers = np.zeros(channels)
        self.cancel = False

    @property
    def mean_is_unfit(self) -> bool:
        """Whether the loudest channel must take the place of the mean."""
        one_of_two_is_silent = len(self.powers) == 2 and bool(
            self.powers.min() < SILENT_POWER * self.powers.max()
        )
        return self.cancel or one_of_two_is_silent

    @property
    def loudest(self) -> int:
        """The channel with the largest power."""
        return int(self.powers.argmax())

    def add(self, samples: np.ndarray, mean: np.ndarray, rate: int) -> None:
        """Take in a block: float32 [S, C], and float32 [S], the mean of its channels."""
        length = min(rate // 2, len(samples)) or 1
        windows = len(samples) // length
        channels = np.square(samples[: windows * length], dtype=np.float64)
        powers = channels.reshape(windows, length, samples.shape[1]).mean(axis=1)
        mean_powers = np.square(mean[: windows * length], dtype=np.float64)
        loudest = powers.max(axis=1, initial=0.0)
        limit = loudest * (CANCELLING_POWER * (2 / samples.shape[1]) ** 2)
        is_low = mean_powers.reshape(windows, length).mean(axis=1) < limit
        self.cancel = self.cancel or bool((is_low & (loudest > AUDIBLE_POWER)).any())
        self.powers += channels.sum(axis=0)


def channel_name(index: int) -> str:
    """Return the name of a channel, counted from 0."""
    return SIDES[index] if index < len(SIDES) else str(index + 1)


def is_channel(name: object) -> TypeGuard[str]:
    """Return whether this names a channel, or the mean of all."""
    if not isinstance(name, str):
        return False
    return name in (MEAN, *SIDES) or (name.isascii() and name.isdecimal() and 0 < int(name) < 1000)


def _channel_index(name: str, channels: int) -> int | None:
    """Return which channel a name means, from 0; None: the mean of all.

    Raises:
        AudioError: the file has no such channel.
    """
    if name == MEAN:
        return None
    index = SIDES.index(name) if name in SIDES else int(name) - 1
    if index >= channels:
        raise AudioError(f'there is no channel "{name}": the file has {channels}')
    return index


def _to_full_scale(mono: np.ndarray, path: Path) -> np.ndarray:
    """Return samples of about -1 to 1, also where floating point holds the numbers of integers.

    Raises:
        AudioError: samples are not finite, or so large that they are none.
    """
    if not np.isfinite(mono).all():
        raise AudioError("not finite: some samples are NaN or infinite")
    largest = float(np.abs(mono).max(initial=0.0))
    if largest <= LARGEST_SAMPLE:
        return mono
    scale = next((scale for scale in INTEGER_SCALES if largest <= scale), None)
    loud = np.abs(mono) > 1
    if scale is None or loud.mean() < FEWEST_LOUD * (mono != 0).mean():
        raise AudioError(f"damaged: some samples are as large as {largest:.3g}, full scale is 1")
    _log_once(path, f"its samples reach {largest:.6g}: they are divided by {scale:.0f}")
    scaled: np.ndarray = mono / np.float32(scale)
    return scaled


def _resampled(mono: np.ndarray, rate: int) -> np.ndarray:
    if rate == SAMPLE_RATE:
        return mono
    resampled: np.ndarray = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    return resampled


def _part_seconds(sound: Sound, start: float, duration: float | None) -> float:
    """Return the length of a part of a file.

    Raises:
        AudioError: not all of it is there.
    """
    whole, promised = sound.seconds, sound.promised_seconds
    is_cut = not math.isnan(promised)
    cut = f"its header promises {promised:.3f} s" if promised < math.inf else "its end is missing"
    if whole == 0:
        raise AudioError("empty: by its header, it has no samples")
    if is_cut and duration is None:
        raise AudioError(
            f"cut off: {cut}, {whole:.3f} s are there; name a duration_seconds to use these"
        )
    though = f"; the file is cut off: {cut}" if is_cut else ""
    if start >= whole:
        raise AudioError(f"the part starts at {start:g} s, the file ends at {whole:.3f} s{though}")
    if duration is None:
        return whole - start
    if start + duration > whole + TOLERANCE_SECONDS:
        raise AudioError(
            f"the part ends at {start + duration:g} s, the file at {whole:.3f} s{though}"
        )
    return min(duration, whole - start)


def check_length(seconds: float, min_seconds: float, max_seconds: float) -> None:
    """Raise AudioError if audio is too short or too long."""
    if seconds < min_seconds:
        raise AudioError(f"too short: {seconds:.3f} s, the minimum is {min_seconds:g} s")
    if seconds > max_seconds:
        raise AudioError(f"too long: {seconds:.3f} s, the maximum is {max_seconds:g} s")


@functools.lru_cache(maxsize=1000)  # lets each remark come once, and counts them
def _log_once(path: Path, remark: str) -> None:
    logged = _log_once.cache_info().currsize
    if logged < MOST_REMARKS:
        log.warning("%s: %s", path, remark)
    elif logged == MOST_REMARKS:
        log.warning("more of such remarks are not logged")


def _why_undecodable(file: BinaryIO, error: Exception) -> str:
    """Return why an open file is no audio that can be used."""
    raw = io.FileIO(file.fileno(), closefd=False)  # libsndfile may have moved on behind the buffer
    raw.seek(0)
    beginning = raw.read(TEXT_BYTES)
    if not beginning:
        return "empty: the file has no bytes"
    if line := first_line(beginning):
        return f"is no audio (it begins with {line})"
    reason = getattr(error, "error_string", None) or str(error)
    remedy = "convert it to WAV, FLAC, Ogg or MP3"
    if isinstance(error, CutOffError):
        remedy = "download or copy it again"
    return f"cannot be decoded ({reason.strip().rstrip('.')}); {remedy}"
