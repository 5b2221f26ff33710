"""Where the detector sees speech: in the demo's clips, between known silences and under noise."""

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from tiny import SIXTEEN_KHZ, read_rows

from simpler_distil_whisper.data import speech_activity
from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.speech_activity import SpeechOptions, speech_spans

DEMO = REPOSITORY / "demo_data"
RANDOM = np.random.default_rng(7)


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [load_audio(DEMO / row["audio"]) for row in read_rows(DEMO / "test.jsonl")[:3]]


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SIXTEEN_KHZ), dtype=np.float32)


def between_silences(clips: list[np.ndarray], seconds: float) -> tuple[np.ndarray, list[list]]:
    """Return the clips with silence around each, and where they are, in seconds."""
    pieces, places, now = [silence(seconds)], [], seconds
    for clip in clips:
        pieces += [clip, silence(seconds)]
        places.append([now, now + len(clip) / SIXTEEN_KHZ])
        now = places[-1][1] + seconds
    return np.concatenate(pieces), places


@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_each_clip_between_silences_is_a_span(clips: list[np.ndarray], noise: float) -> None:
    waveform, places = between_silences(clips, 3.0)
    waveform = waveform + noise * RANDOM.standard_normal(len(waveform)).astype(np.float32)
    spans = speech_spans(waveform, SpeechOptions(min_silence_seconds=2.0))
    placed = [[span.start_seconds, span.end_seconds] for span in spans]
    assert np.array(placed) == pytest.approx(np.array(places), abs=0.6)


@pytest.mark.parametrize("level", [0.0, 0.003, 0.1])
def test_there_is_no_speech_in_silence_noise_and_tones(level: float) -> None:
    time = np.arange(8 * SIXTEEN_KHZ) / SIXTEEN_KHZ
    noise = level * RANDOM.standard_normal(len(time))
    tone = level * np.sin(2 * np.pi * 440 * time)
    for waveform in (noise, tone):
        assert speech_spans(waveform.astype(np.float32)) == []


def test_shortest_waveforms() -> None:
    assert [speech_spans(silence(seconds)) for seconds in (0.0, 1e-4, 0.032, 0.05)] == [[]] * 4


@given(
    st.lists(st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.7, 1.0]), max_size=40),
    st.sampled_from([0.1, 0.5, 0.6]),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
)
def test_spans_are_in_order_apart_and_within_the_audio(
    probabilities: list[float], threshold: float, pause: float, padding: float
) -> None:
    options = SpeechOptions(threshold=threshold, min_silence_seconds=pause, padding_seconds=padding)
    frame = speech_activity.FRAME / SIXTEEN_KHZ
    length = max(len(probabilities) * frame - 0.01, 0.0)
    spans = speech_activity.spans_of(np.array(probabilities, dtype=np.float32), length, options)
    ends = [time for span in spans for time in (span.start_seconds, span.end_seconds)]
    assert ends == sorted(set(ends))
    assert all(0 <= time <= length for time in ends)
    for number, probability in enumerate(probabilities):
        if probability >= threshold:
            middle = min((number + 0.5) * frame, length)
            assert any(span.start_seconds <= middle <= span.end_seconds for span in spans)
    for left, right in zip(spans, spans[1:], strict=False):
        assert right.start_seconds - left.end_seconds + 2 * padding > pause - 1e-6
