"""Files and parts of files -> mono 16 kHz waveforms, or the reason why not.

Owns decoding and resampling. It knows nothing of manifests, models or torch: worker processes need
nothing else.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # of every Whisper
# What soundfile raises; TypeError for headerless files, such as "speech.raw".
UNREADABLE_ERRORS = (soundfile.LibsndfileError, OSError, TypeError)
# Times in manifests are rounded, and an MP3's header may count the encoder's delay (20 ms).
TOLERANCE_SECONDS = 0.05
BLOCK_FRAMES = 2**20  # read at once


class AudioError(Exception):
    """This audio cannot be used; the message is the reason, without the path."""


class Clip(NamedTuple):
    """A file, or the part of it that the two times name; `load_audio(*clip)` loads it.

    Attributes:
        path: the file.
        start_seconds: where the part begins.
        duration_seconds: length of the part; None: to the end of the file.
    """

    path: Path
    start_seconds: float = 0.0
    duration_seconds: float | None = None


def load_audio(
    path: Path,
    start_seconds: float = 0.0,
    duration_seconds: float | None = None,
    *,
    min_seconds: float = 0.0,
    max_seconds: float = math.inf,
) -> np.ndarray:
    """Return a file, or a part of it, as one channel at 16 kHz.

    Args:
        path: any format that libsndfile reads, at any rate, with any number of channels.
        start_seconds: where the part begins.
        duration_seconds: length of the part; None: to the end of the file.
        min_seconds: shorter audio is an error.
        max_seconds: longer audio is an error, which the header shows before anything is decoded.

    Returns:
        float32 [S]: the mean of the channels, resampled by soxr "HQ" (what `librosa.load` does),
        about -1 to 1.

    Raises:
        AudioError: the file is missing, undecodable, empty, damaged, not finite, too short or too
            long.
    """
    try:
        with soundfile.SoundFile(path) as file:
            whole_seconds = file.frames / file.samplerate
            seconds = _part_seconds(whole_seconds, start_seconds, duration_seconds)
            check_length(seconds, 0.0, max_seconds + TOLERANCE_SECONDS)
            file.seek(round(start_seconds * file.samplerate))
            frames = -1 if duration_seconds is None else round(duration_seconds * file.samplerate)
            mono = _read_mono(file, frames)
            rate = file.samplerate
    except UNREADABLE_ERRORS as error:
        raise AudioError(_why_unreadable(path, error)) from None
    if len(mono) == 0:
        raise AudioError("empty: it decodes to no samples")
    # The header is checked only to avoid decoding hours of audio; the decoded length decides.
    check_length(len(mono) / rate, min_seconds, max_seconds)
    if not np.isfinite(mono).all():
        raise AudioError("not finite: some samples are NaN or infinite")
    if rate == SAMPLE_RATE:
        return mono
    resampled: np.ndarray = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    return resampled


def _read_mono(file: soundfile.SoundFile, frames: int) -> np.ndarray:
    """Return float32 [frames]: the mean of the channels of the next frames; -1: of all that follow.

    The file is read in blocks, so that all channels of half an hour are never in memory at once.
    """
    blocks = [np.zeros(0, dtype=np.float32)]
    while frames != 0:
        requested = BLOCK_FRAMES if frames < 0 else min(BLOCK_FRAMES, frames)
        block = file.read(requested, dtype="float32", always_2d=True)
        blocks.append(block.mean(axis=1))
        if len(block) < requested:
            break
        if frames > 0:
            frames -= requested
    return np.concatenate(blocks)


def audio_seconds(
    path: Path, start_seconds: float = 0.0, duration_seconds: float | None = None
) -> float:
    """Return the length of a file, or of a part of it, from the header alone.

    Raises:
        AudioError: the file cannot be opened or the part lies outside it.
    """
    try:
        info = soundfile.info(str(path))
    except UNREADABLE_ERRORS as error:
        raise AudioError(_why_unreadable(path, error)) from None
    return _part_seconds(info.frames / info.samplerate, start_seconds, duration_seconds)


def _part_seconds(whole: float, start: float, duration: float | None) -> float:
    if whole == 0:
        raise AudioError("empty: by its header, it has no samples")
    if start >= whole:
        raise AudioError(f"the part starts at {start:g} s, the file ends at {whole:.3f} s")
    if duration is None:
        return whole - start
    if start + duration > whole + TOLERANCE_SECONDS:
        raise AudioError(f"the part ends at {start + duration:g} s, the file at {whole:.3f} s")
    return min(duration, whole - start)


def check_length(seconds: float, min_seconds: float, max_seconds: float) -> None:
    """Raise AudioError if audio is too short or too long."""
    if seconds < min_seconds:
        raise AudioError(f"too short: {seconds:.3f} s, the minimum is {min_seconds:g} s")
    if seconds > max_seconds:
        raise AudioError(f"too long: {seconds:.3f} s, the maximum is {max_seconds:g} s")


def _why_unreadable(path: Path, error: Exception) -> str:
    # Unlike Path.exists, this does not raise for a name that is longer than file systems allow.
    if not os.path.exists(path):  # noqa: PTH110
        return "no such file"
    if path.is_file() and path.stat().st_size == 0:
        return "empty: the file has no bytes"
    reason = getattr(error, "error_string", None) or str(error)
    return f"cannot be decoded ({reason.strip().rstrip('.')}); convert it to WAV, FLAC, Ogg or MP3"
