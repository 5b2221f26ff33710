"""Rooms, noise and transmission: makes clean synthesized speech sound like recordings."""

from __future__ import annotations

import io

import numpy as np
import soundfile
from scipy.fft import next_fast_len
from scipy.signal import butter, fftconvolve, sosfilt

SAMPLE_RATE = 16000
OPUS_COMPRESSION = 0.95


def room_impulse_response(rng: np.random.Generator) -> np.ndarray:
    """Returns a direct path followed by exponentially decaying noise (T60 of 0.08 to 0.5 s)."""
    reverberation_time = rng.uniform(0.08, 0.5)
    length = int(SAMPLE_RATE * reverberation_time)
    seconds = np.arange(length) / SAMPLE_RATE
    tail = rng.standard_normal(length) * np.exp(-6.9 * seconds / reverberation_time)
    tail *= 10 ** (-rng.uniform(2, 14) / 20) / np.sqrt((tail**2).sum())
    response = np.concatenate([np.zeros(int(rng.uniform(0.002, 0.02) * SAMPLE_RATE)), tail])
    response[0] = 1.0
    return response.astype(np.float32)


def background_noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Returns coloured noise of unit variance, some of it modulated or with mains hum."""
    transform_length = next_fast_len(length, real=True)
    frequencies = np.fft.rfftfreq(transform_length, 1 / SAMPLE_RATE)
    frequencies[0] = frequencies[1]
    colour = rng.choice([0.0, 0.5, 1.0, 1.5])
    spectrum = np.fft.rfft(rng.standard_normal(transform_length)) / frequencies**colour
    noise = np.fft.irfft(spectrum, transform_length)[:length]
    noise /= noise.std()
    kind = rng.random()
    if kind < 0.3:
        seconds = np.arange(length) / SAMPLE_RATE
        fundamental = rng.uniform(45, 130)
        for harmonic in range(1, 8):
            phase = 2 * np.pi * fundamental * harmonic * seconds + rng.uniform(0, 2 * np.pi)
            noise += rng.uniform(0, 1) * np.sin(phase)
    elif kind < 0.5:
        knots = np.linspace(0, length, 12)
        noise *= np.interp(np.arange(length), knots, rng.uniform(0.2, 1.5, 12))
    return (noise / noise.std()).astype(np.float32)


def transmit(speech: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Puts clean speech into a room, adds noise and changes its band and level.

    Args:
        speech: Clean waveform at 16 kHz.
        rng: Source of every choice.

    Returns:
        The recording, and the seconds by which the speech starts later in it.
    """
    recording = speech
    if rng.random() < 0.5:
        reverberant = fftconvolve(speech, room_impulse_response(rng))
        recording = reverberant[: len(speech) + SAMPLE_RATE // 8].astype(np.float32)
    if rng.random() < 0.2:
        band = [rng.uniform(100, 300), rng.uniform(3000, 5500)]
        recording = sosfilt(butter(2, band, "bandpass", fs=SAMPLE_RATE, output="sos"), recording)
    lead = int(rng.uniform(0.02, 0.25) * SAMPLE_RATE)
    tail = rng.uniform(0.3, 1.5) if rng.random() < 0.1 else rng.uniform(0.05, 0.3)
    recording = np.pad(recording, (lead, int(tail * SAMPLE_RATE)))
    if rng.random() > 0.15:
        level = np.sqrt((speech**2).mean()) * 10 ** (-rng.uniform(3, 35) / 20)
        recording = recording + level * background_noise(len(recording), rng)
    return set_level(recording, rng), lead / SAMPLE_RATE


def set_level(recording: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scales a recording so that its peak lies 1 to 14 dB below full scale."""
    peak = np.abs(recording).max() + 1e-6
    return (recording / peak * 10 ** (-rng.uniform(1, 14) / 20)).astype(np.float32)


def opus_round_trip(recording: np.ndarray) -> np.ndarray:
    """Returns a recording as it sounds after the Ogg-Opus coding of the shipped clips."""
    encoded = io.BytesIO()
    soundfile.write(
        encoded,
        recording,
        SAMPLE_RATE,
        format="OGG",
        subtype="OPUS",
        compression_level=OPUS_COMPRESSION,
    )
    encoded.seek(0)
    decoded, _ = soundfile.read(encoded, dtype="float32")
    return decoded
