"""What a view does to sound, log-mel and times, and that it is the same for everyone who asks."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import WhisperFeatureExtractor

from simpler_distil_whisper.data.audio import SAMPLE_RATE
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.data.manifest import Utterance
from simpler_distil_whisper.training.augment import Mask, View, Views
from simpler_distil_whisper.training.options import Augmentation

WINDOW = 2.0
EVERYTHING = {
    "waveform": {
        "speed": [0.5, 2.0],
        "noise_db": [-5.0, 30.0],
        "gain_db": [-12.0, 12.0],
        "shift_seconds": 1.5,
    },
    "spec_augment": {
        "time_masks": 3,
        "max_time_seconds": 0.6,
        "frequency_masks": 2,
        "max_mels": 40,
    },
}


def utterance(name: str = "a/0.wav", start: float = 0.0) -> Utterance:
    return Utterance(0, "p", "{}", "i", Path("/data", name), start, None, "t", "zh")


def make_views(seed: int = 0, **options: Any) -> Views:
    return Views(Augmentation.model_validate(options), 1.0, WINDOW, seed)


def drawn(seconds: float, use: int = 0, **options: Any) -> View:
    """A view that is not the clip itself."""
    return make_views(**{"views": None, **options}).of(utterance(), seconds, use, use)


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """A tone that swells and fades, no two moments alike."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    sound = np.sin(2 * np.pi * (200 + 100 * seed) * time) * (0.2 + 0.1 * np.sin(9 * time))
    return sound.astype(np.float32)


def decibels(ratio: float) -> float:
    return 10 * math.log10(ratio)


def power(waveform: np.ndarray) -> float:
    return float(np.mean(np.square(waveform, dtype=np.float64)))


# Waveforms.


@pytest.mark.parametrize("speed", [0.5, 0.92, 1.08, 2.0])
def test_speed_changes_length_and_pitch_by_its_factor(speed: float) -> None:
    clip = speech(1.0)
    fast = View(speed=speed).of_waveform(clip)
    assert fast.dtype == np.float32
    assert abs(len(fast) - len(clip) / speed) <= 1
    spectrum = np.abs(np.fft.rfft(fast))
    peak = np.argmax(spectrum) * SAMPLE_RATE / len(fast)
    assert peak == pytest.approx(200 * speed, rel=0.01)
    assert decibels(power(fast) / power(clip)) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("ratio", [-5.0, 0.0, 20.0])
@pytest.mark.parametrize("loudness", [0.001, 1.0])
def test_noise_is_as_loud_as_asked(ratio: float, loudness: float) -> None:
    clip = speech(1.0) * np.float32(loudness)
    noisy = View(noise_db=ratio, noise_start=12345).of_waveform(clip)
    assert decibels(power(clip) / power(noisy - clip)) == pytest.approx(ratio, abs=0.1)


def test_noise_is_pink_and_each_view_has_its_own() -> None:
    clip = speech(2.0)
    noises = [
        View(noise_db=0.0, noise_start=start).of_waveform(clip) - clip
        for start in (0, 500_000, 1_000_000)
    ]
    for noise in noises:
        spectrum = np.abs(np.fft.rfft(noise)) ** 2
        hertz = np.fft.rfftfreq(len(noise), 1 / SAMPLE_RATE)
        octaves = [
            spectrum[(hertz >= low) & (hertz < 2 * low)].sum() for low in (250, 500, 1000, 2000)
        ]
        assert max(octaves) < 1.6 * min(octaves)
    correlations = np.corrcoef(noises) - np.eye(3)
    assert np.abs(correlations).max() < 0.1


def test_noise_on_silence_stays_silence() -> None:
    silence = np.zeros(1000, dtype=np.float32)
    assert np.array_equal(View(noise_db=10.0).of_waveform(silence), silence)


def test_gain_is_in_decibels() -> None:
    clip = speech(0.5)
    louder = View(gain_db=6.0).of_waveform(clip)
    np.testing.assert_allclose(louder, clip * 10 ** (6 / 20), rtol=1e-5)


def test_a_shift_is_silence_before_the_clip() -> None:
    clip = speech(0.5)
    late = View(shift_seconds=0.25, gain_db=3.0, noise_db=10.0).of_waveform(clip)
    assert len(late) == 12000
    assert not late[:4000].any()
    same = View(gain_db=3.0, noise_db=10.0).of_waveform(clip)
    assert np.array_equal(late[4000:], same)


def test_the_clip_itself_stays_as_it_is() -> None:
    clip = speech(0.5)
    assert View().of_waveform(clip) is clip
    assert View().key == ""
    assert View().of_time(1.25) == 1.25


def test_a_view_leaves_the_clip_alone() -> None:
    clip = speech(0.5)
    before = clip.copy()
    View(speed=1.1, noise_db=5.0, gain_db=9.0, shift_seconds=0.1).of_waveform(clip)
    assert np.array_equal(clip, before)


@given(st.floats(0.05, WINDOW), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_a_view_is_audible_and_within_the_window(seconds: float, use: int) -> None:
    view = drawn(seconds, use, **EVERYTHING)
    clip = speech(seconds)
    waveform = view.of_waveform(clip)
    # A header's seconds are exact to a sample.
    assert len(waveform) <= WINDOW * SAMPLE_RATE + 1
    assert waveform.dtype == np.float32
    assert np.isfinite(waveform).all()
    assert waveform.any()
    assert 0 <= view.of_time(0.0) <= view.of_time(seconds) <= WINDOW + 1e-9
    assert abs(view.of_time(seconds) * SAMPLE_RATE - len(waveform)) <= 2


# Times follow the sound.


def test_a_click_is_at_the_time_of_the_view() -> None:
    clip = np.zeros(SAMPLE_RATE, dtype=np.float32)
    clip[12_000] = 1.0  # at 0.75 s
    for use in range(20):
        view = drawn(1.0, use, waveform={"speed": [0.7, 1.4], "shift_seconds": 0.5})
        seconds = np.argmax(np.abs(view.of_waveform(clip))) / SAMPLE_RATE
        assert seconds == pytest.approx(view.of_time(0.75), abs=2e-4)


# Masks.


EXTRACTOR = WhisperFeatureExtractor(feature_size=80, chunk_length=int(WINDOW))


def masked_log_mel(view: View, clip: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A view's log-mel without and with its masks, and its samples."""
    waveform = view.of_waveform(clip)
    before = log_mel([waveform], EXTRACTOR)[0]
    after = before.clone()
    view.mask(after, len(waveform))
    return before, after, len(waveform)


def test_masks_by_hand() -> None:
    noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    masks = (Mask(0.0, 10), Mask(0.5, 20))
    view = View(shift_seconds=0.5, time_masks=masks, frequency_masks=(Mask(1.0, 7),))
    before, after, _ = masked_log_mel(view, noise)
    # The speech stands in frames 50 to 150: the first mask at its beginning, the second around 100.
    expected = before.clone()
    expected[:, 50:60] = expected[:, 90:110] = expected[73:, 50:150] = before.max() - 2
    assert torch.equal(after, expected)
    # That is what the extractor makes of digital silence beside this sound.
    assert float(before[:, 170:].max()) == float(before.max() - 2)


@given(st.floats(0.05, WINDOW), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_masks_leave_half_of_the_speech_and_all_of_the_rest(seconds: float, use: int) -> None:
    view = drawn(seconds, use, **EVERYTHING)
    before, after, samples = masked_log_mel(view, speech(seconds))
    changed = before != after
    first, last = math.ceil(round(view.shift_seconds * SAMPLE_RATE) / 160), -(-samples // 160)
    assert not changed[:, :first].any()
    assert not changed[:, last:].any()
    assert (after[changed] == before.max() - 2).all()
    spoken = changed[:, first:last]
    whole_frames, whole_bands = spoken.all(dim=0), spoken.all(dim=1)
    assert whole_frames.sum() <= spoken.shape[1] // 2
    assert whole_bands.sum() <= 40
    assert sum(mask.width for mask in view.time_masks) <= 3 * 60
    assert all(0 <= mask.place <= 1 for mask in (*view.time_masks, *view.frequency_masks))


def test_masks_are_drawn_up_to_their_widest_and_everywhere() -> None:
    spec = {"time_masks": 1, "max_time_seconds": 0.1, "frequency_masks": 2, "max_mels": 5}
    views = [drawn(1.0, use, spec_augment=spec) for use in range(300)]
    times = [view.time_masks[0] for view in views]
    assert {mask.width for mask in times} == set(range(11))
    assert {mask.width for view in views for mask in view.frequency_masks} == set(range(6))
    assert min(mask.place for mask in times) < 0.05
    assert max(mask.place for mask in times) > 0.95
    assert all(len(view.frequency_masks) == 2 for view in views)


# Which view.


def test_parameters_are_spread_over_their_bounds() -> None:
    views = [drawn(0.3, use, **EVERYTHING) for use in range(400)]
    for values, low, high in (
        ([view.speed for view in views], 0.5, 2.0),
        ([view.noise_db for view in views], -5.0, 30.0),
        ([view.gain_db for view in views], -12.0, 12.0),
        ([view.shift_seconds for view in views], 0.0, 1.5),
    ):
        histogram, _ = np.histogram(values, bins=4, range=(low, high))
        assert sum(histogram) == 400
        assert min(histogram) > 60


def test_the_views_of_a_clip_are_the_same_in_every_run_and_place() -> None:
    options = {"views": 3, **EVERYTHING}
    clip = utterance("a/0.wav", 1.5)
    moved = Utterance(7, "q", "{}", "j", Path("elsewhere/a/0.wav"), 1.5, None, "u", None)
    for use in range(4):
        view = make_views(0, **options).of(clip, 1.0, use, use)
        assert make_views(9, **options).of(moved, 1.0, use, 100 + use) == view
        assert make_views(0, **options).of(clip, 1.0, use + 4, 5000) == view
        assert view.reusable
    keys = [make_views(0, **options).of(clip, 1.0, use, use).key for use in range(4)]
    assert len(set(keys)) == 4
    assert keys.count("") == 1


def test_clips_have_views_of_their_own() -> None:
    views = make_views(0, views=1, **EVERYTHING)
    others = [("a/1.wav", 0.0), ("b/0.wav", 0.0), ("a/0.wav", 2.0), ("a/0.wav", 0.0)]
    keys = {
        views.of(utterance(name, start), 1.0, use, 0).key
        for name, start in others
        for use in (0, 1)
    }
    assert len(keys) == 5  # four views, and the clips themselves


def test_views_that_never_come_again_depend_on_seed_and_position() -> None:
    options = {"views": None, **EVERYTHING}
    view = make_views(0, **options).of(utterance(), 1.0, 0, 5)
    assert make_views(0, **options).of(utterance(), 1.0, 3, 5) == view
    assert make_views(0, **options).of(utterance(), 1.0, 0, 6).key != view.key
    assert make_views(1, **options).of(utterance(), 1.0, 0, 5).key != view.key
    assert not view.reusable
    assert view.key


def test_a_key_holds_all_that_was_drawn() -> None:
    view = View(
        speed=1.05,
        noise_db=12.5,
        noise_start=7,
        gain_db=-3.0,
        shift_seconds=0.2,
        time_masks=(Mask(0.5, 10),),
        frequency_masks=(Mask(0.25, 4), Mask(0.75, 6)),
    )
    assert json.loads(view.key) == {
        "recipe": 1,
        "speed": 1.05,
        "noise_db": 12.5,
        "noise_start": 7,
        "gain_db": -3.0,
        "shift_seconds": 0.2,
        "time_masks": [[0.5, 10]],
        "frequency_masks": [[0.25, 4], [0.75, 6]],
    }


# The config.


def test_without_options_every_use_is_the_clip_itself() -> None:
    views = make_views()
    assert all(views.of(utterance(), 1.0, use, use) == View() for use in range(5))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"views": 2}, "views is 2, but nothing in waveform and spec_augment is switched on"),
        ({"views": None}, "views is null, but nothing in waveform and spec_augment"),
        ({"views": 1, "waveform": {"speed": [1.1, 0.9]}}, "speed [1.1, 0.9]: the lowest value"),
        ({"views": 1, "waveform": {"noise_db": [9.0, 3.0]}}, "noise_db [9.0, 3.0]: the lowest"),
        ({"views": 1, "waveform": {"speed": [0.4, 1.0]}}, "speed [0.4, 1.0]: must lie within"),
        ({"views": 1, "waveform": {"speed": [1.0, 2.1]}}, "speed [1.0, 2.1]: must lie within"),
        ({"views": 1, "waveform": {"speed": [1.0]}}, "at least 2 items"),
        ({"views": 1, "waveform": {"speed": [1.0, 1.1, 1.2]}}, "at most 2 items"),
        ({"views": 1, "waveform": {"shift_seconds": 0.0}}, "greater than 0"),
        ({"views": -1}, "greater than or equal to 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Augmentation.model_validate(options)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("hours", "options", "count"),
    [
        (0.9, {"views": "auto", **EVERYTHING}, 3),
        (1.0, {"views": "auto", **EVERYTHING}, 0),
        (0.9, {"views": "auto"}, 0),  # nothing would differ
        (0.9, {"views": 0, **EVERYTHING}, 0),  # one key switches views off
        (9.0, {"views": 2, **EVERYTHING}, 2),
        (0.9, {"views": None, **EVERYTHING}, None),
    ],
)
def test_how_many_views_a_clip_has(
    hours: float, options: dict[str, Any], count: int | None
) -> None:
    assert Augmentation.model_validate(options).views_for(hours) == count
