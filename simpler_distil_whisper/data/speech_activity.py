"""Mono 16 kHz waveforms -> where in them somebody speaks.

Owns the voice activity detection: Silero's network, whose file comes with the package `silero-vad`
and is run by onnxruntime. What is done with the rest of a recording is up to others.
"""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from simpler_distil_whisper.config import NonNegativeFloat, Ratio, StrictModel
from simpler_distil_whisper.data.audio import SAMPLE_RATE

FRAME = 512  # samples for which the network gives a probability: 32 ms
CONTEXT = 64  # samples before each frame that it is given too
BLOCK_FRAMES = 2048  # given to the network at once: a minute
HYSTERESIS = 0.15  # speech goes on until the probability is this much below the threshold


class SpeechOptions(StrictModel):
    """What counts as speech."""

    threshold: Ratio = Field(
        0.5, description="Probability of speech, per 32 ms, from which it is taken for speech."
    )
    min_silence_seconds: NonNegativeFloat = Field(
        0.5, description="Shorter gaps between speech belong to it."
    )
    padding_seconds: NonNegativeFloat = Field(
        0.2, description="What is kept before and after speech, as far as there is anything."
    )


@dataclass(frozen=True)
class SpeechSpan:
    """A part of a recording in which somebody speaks.

    Attributes:
        start_seconds: from the beginning of the recording.
        end_seconds: likewise.
    """

    start_seconds: float
    end_seconds: float


def speech_spans(waveform: np.ndarray, options: SpeechOptions | None = None) -> list[SpeechSpan]:
    """Return where somebody speaks: in order, without overlaps, none of it empty.

    Args:
        waveform: float32 [S]: mono, 16 kHz.
        options: what counts as speech.
    """
    length = len(waveform) / SAMPLE_RATE
    return spans_of(speech_probabilities(waveform), length, options or SpeechOptions())


def spans_of(
    probabilities: np.ndarray, length_seconds: float, options: SpeechOptions
) -> list[SpeechSpan]:
    """Return the spans by the probabilities of speech, float32 [number of frames]."""
    padding, frame = options.padding_seconds, FRAME / SAMPLE_RATE
    # With less between them, two stretches would also touch once they are padded.
    shortest_pause = max(options.min_silence_seconds, 2 * padding)
    joined: list[tuple[int, int]] = []
    for first, stop in _stretches(probabilities, options.threshold):
        if joined and (first - joined[-1][1]) * frame <= shortest_pause:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((first, stop))
    return [
        SpeechSpan(max(first * frame - padding, 0.0), min(stop * frame + padding, length_seconds))
        for first, stop in joined
    ]


def muted(waveform: np.ndarray, spans: Sequence[SpeechSpan]) -> np.ndarray:
    """Return float32 [S]: the waveform with silence where nobody speaks."""
    result = np.zeros_like(waveform)
    for span in spans:
        first, stop = (round(t * SAMPLE_RATE) for t in (span.start_seconds, span.end_seconds))
        result[first:stop] = waveform[first:stop]
    return result


def speech_probabilities(waveform: np.ndarray) -> np.ndarray:
    """Return float32 [number of frames]: the probability of speech in each 32 ms of a waveform."""
    state = {name: np.zeros((1, 1, 128), dtype=np.float32) for name in ("h", "c")}
    probabilities = [np.zeros(0, dtype=np.float32)]
    for block in _blocks(waveform):
        values, state["h"], state["c"] = _network().run(
            ["speech_probs", "hn", "cn"], {"input": block, **state}
        )
        probabilities.append(values.reshape(-1))
    return np.concatenate(probabilities)


def _blocks(waveform: np.ndarray) -> Iterator[np.ndarray]:
    """Yield float32 [frames, CONTEXT + FRAME]: a minute of a waveform, padded with silence."""
    if len(waveform) == 0:
        return
    padded = np.pad(waveform, (CONTEXT, -len(waveform) % FRAME))
    frames = np.lib.stride_tricks.sliding_window_view(padded, CONTEXT + FRAME)[::FRAME]
    for start in range(0, len(frames), BLOCK_FRAMES):
        yield np.ascontiguousarray(frames[start : start + BLOCK_FRAMES], dtype=np.float32)


@functools.cache
def _network() -> Any:
    """Return the session that runs the network, on one thread of the CPU."""
    import onnxruntime

    # Importing the package itself would set torch to a single thread.
    spec = importlib.util.find_spec("silero_vad")
    assert spec is not None and spec.origin is not None, "a dependency of this package"
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = options.intra_op_num_threads = 1
    path = Path(spec.origin).parent / "data" / "silero_vad_16k_sequence.onnx"
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _stretches(probabilities: np.ndarray, threshold: float) -> Iterator[tuple[int, int]]:
    """Yield the first frame of each stretch of speech, and the one after its last."""
    near = np.concatenate([[False], probabilities >= threshold - HYSTERESIS, [False]])
    for first, stop in np.flatnonzero(near[1:] != near[:-1]).reshape(-1, 2).tolist():
        if probabilities[first:stop].max() >= threshold:
            yield first, stop
