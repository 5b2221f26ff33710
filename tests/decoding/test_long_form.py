"""Long recordings against transformers' long-form `generate`."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from tiny import SIXTEEN_KHZ, make_model_folder, read_rows
from torch import Tensor
from torch.nn import functional

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import long_log_mel
from simpler_distil_whisper.decoding.hypothesis import Hypothesis
from simpler_distil_whisper.decoding.long_form import transcribe_long
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.whisper import Whisper, load_whisper

DEMO = REPOSITORY / "demo_data"
LIMIT = 24
LANGUAGES = ["zh", "en", "ja"]
LOOPS_WILL_DO = {"compression_ratio_threshold": None, "repetition_threshold": None}

pytestmark = pytest.mark.usefixtures("one_thread")


def recording(seconds: float, seed: int) -> np.ndarray:
    """Noisy tones of different lengths and pauses."""
    random = np.random.default_rng(seed)
    pieces = []
    while sum(map(len, pieces)) < seconds * SIXTEEN_KHZ:
        time = np.arange(int(random.integers(3_000, 20_000))) / SIXTEEN_KHZ
        tone = np.sin(2 * np.pi * random.uniform(100, 3000) * time) * random.choice([0, 0.1, 0.5])
        pieces.append(tone + random.normal(0, 0.02, len(time)))
    return np.concatenate(pieces)[: round(seconds * SIXTEEN_KHZ)].astype(np.float32)


@pytest.fixture(scope="module")
def features(whisper: Whisper) -> list[Tensor]:
    waveforms = [recording(seconds, seed) for seed, seconds in enumerate((5.003, 2.01, 7.4))]
    return [long_log_mel(waveform, whisper.feature_extractor) for waveform in waveforms]


def transcribe(
    whisper: Whisper,
    features: Sequence[Tensor],
    languages: Sequence[str | None] = LANGUAGES,
    keys: Sequence[int] | None = None,
    **options: object,
) -> list[Hypothesis]:
    given = {"max_new_tokens": LIMIT, "long_form": "sequential", "batch_size": 2, **options}
    return transcribe_long(
        Transcriber(whisper, DecodingOptions(**given)), features, languages, keys
    )


def generated(
    whisper: Whisper, features: Tensor, language: str, **options: object
) -> list[tuple[float, float, list[int]]]:
    """The oracle: start, end and tokens of the segments of `generate`, one recording alone."""
    config = copy.deepcopy(whisper.model.generation_config)
    special = set(range(whisper.tokens.start, whisper.tokens.no_timestamps + 1))
    config.suppress_tokens = sorted(special | set(config.suppress_tokens))
    config.prev_sot_token_id = whisper.tokens.previous
    result = whisper.model.generate(
        features[None],
        generation_config=config,
        language=language,
        task="transcribe",
        return_timestamps=True,
        return_segments=True,
        max_new_tokens=LIMIT,
        temperature=0.0,
        **options,
    )
    segments = []
    for segment in result["segments"][0]:
        ids = segment["tokens"].tolist()
        # It keeps the start of the next segment with the last one of a window; openai does not.
        if len(ids) > 2 and ids[-2] in whisper.tokens.timestamps:
            ids.pop()
        segments.append((float(segment["start"]), float(segment["end"]), ids))
    return segments


def as_segments(hypothesis: Hypothesis) -> list[tuple[float, float, str]]:
    return [(s.start_seconds, s.end_seconds, s.text) for s in hypothesis.segments]


def assert_same(whisper: Whisper, feature: Tensor, mine: Hypothesis, theirs: list) -> None:
    assert list(mine.token_ids) == [id for _, _, ids in theirs for id in ids]
    end = feature.shape[1] / 100  # neither stops there, and our times do not go beyond it
    expected = []
    for start, stop, ids in theirs:
        # A text with a single timestamp, which is before it: there it ends where it begins.
        if sum(id in whisper.tokens.timestamps for id in ids) == 1:
            stop = start + whisper.window_seconds
        text = whisper.tokenizer.decode(ids, skip_special_tokens=True)
        expected.append((min(start, end), min(stop, end), text))
    assert [text for _, _, text in as_segments(mine)] == [text for _, _, text in expected]
    times = [time for start, stop, _ in as_segments(mine) for time in (start, stop)]
    their_times = [time for start, stop, _ in expected for time in (start, stop)]
    assert times == pytest.approx(their_times, abs=0.006)


@pytest.mark.parametrize(
    ("condition", "prompt"), [(True, None), (False, None), (True, "names: Ann")]
)
def test_same_segments_as_generate(
    whisper: Whisper, features: list[Tensor], condition: bool, prompt: str | None
) -> None:
    options = {"condition_on_previous_text": condition, "prompt": prompt}
    hypotheses = transcribe(whisper, features, **options, **LOOPS_WILL_DO)
    ids = Transcriber(whisper, DecodingOptions(prompt=prompt)).prompt_ids
    given = {"prompt_ids": torch.tensor([whisper.tokens.previous, *ids])} if prompt else {}
    for language, feature, hypothesis in zip(LANGUAGES, features, hypotheses, strict=True):
        theirs = generated(whisper, feature, language, condition_on_prev_tokens=condition, **given)
        assert_same(whisper, feature, hypothesis, theirs)
    assert sum(len(hypothesis.segments) for hypothesis in hypotheses) > 9


@pytest.mark.slow
def test_same_segments_as_generate_of_the_demo_teacher() -> None:
    whisper = load_whisper(read_model_folder(DEMO / "teacher", None, "model"))
    rows = read_rows(DEMO / "long.jsonl")
    features = [
        long_log_mel(load_audio(DEMO / row["audio"]), whisper.feature_extractor) for row in rows
    ]
    languages = [row["language"] for row in rows]
    hypotheses = transcribe(whisper, features, languages, **LOOPS_WILL_DO)
    for language, feature, hypothesis in zip(languages, features, hypotheses, strict=True):
        theirs = generated(whisper, feature, language, condition_on_prev_tokens=True)
        assert_same(whisper, feature, hypothesis, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_the_demo_teacher_transcribes_a_minute(form: str) -> None:
    """Nine characters of ten, and all of its segments at their times."""
    whisper = load_whisper(read_model_folder(DEMO / "teacher", None, "model"))
    row = read_rows(DEMO / "long.jsonl")[0]
    waveform = load_audio(DEMO / row["audio"])
    options = DecodingOptions(long_form=form, condition_on_previous_text=False)
    [hypothesis] = transcribe_long(
        Transcriber(whisper, options), [long_log_mel(waveform, whisper.feature_extractor)], ["zh"]
    )
    counts = Scorer(Metric()).count(row["text"], hypothesis.text, "zh")
    assert counts.rate is not None and counts.rate <= 0.10
    times = [time for s in hypothesis.segments for time in (s.start_seconds, s.end_seconds)]
    assert times == sorted(times) and times[-1] <= len(waveform) / SIXTEEN_KHZ
    assert len(hypothesis.segments) >= 15


@pytest.fixture
def _memory_full_of_nan() -> Iterator[None]:
    """What is never written must never be read, not even to be multiplied by zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_memory_full_of_nan")
@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_neither_batch_size_nor_order_nor_neighbours_matter(
    whisper: Whisper, features: list[Tensor], form: str
) -> None:
    together = transcribe(whisper, features, batch_size=8, long_form=form)
    backwards = transcribe(whisper, features[::-1], LANGUAGES[::-1], batch_size=2, long_form=form)
    alone = [
        transcribe(whisper, [feature], [language], batch_size=1, long_form=form)[0]
        for feature, language in zip(features, LANGUAGES, strict=True)
    ]
    for other in (backwards[::-1], alone):
        assert [(h.text, h.token_ids, h.segments) for h in other] == [
            (h.text, h.token_ids, h.segments) for h in together
        ]
        for mine, its in zip(together, other, strict=True):
            assert its.average_log_probability == pytest.approx(
                mine.average_log_probability, abs=1e-4
            )


@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_samples_do_not_depend_on_neighbours_but_on_keys(
    whisper: Whisper, features: list[Tensor], form: str
) -> None:
    options = {"temperatures": [0.7], "long_form": form}
    together = transcribe(whisper, features, keys=[5, 6, 7], **options)
    alone = transcribe(whisper, features[2:], ["ja"], keys=[7], **options)
    other = transcribe(whisper, features[2:], ["ja"], keys=[8], **options)
    assert alone[0].token_ids == together[2].token_ids != other[0].token_ids
    assert together[2].temperature == 0.7


@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_the_first_window_decides_the_language_of_the_recording(
    tmp_path: Path, features: list[Tensor], form: str
) -> None:
    path = make_model_folder(tmp_path, languages=["en", "zh", "ja"], talkative=True, seed=37)
    whisper = load_whisper(read_model_folder(path, None, "model"))
    # Louder or softer features make the random model detect different languages.
    features = [features[0], torch.cat([-features[0], features[0]], dim=1), 4 * features[0]]
    windows = torch.stack([feature[:, :200] for feature in features])
    detected = [h.language for h in Transcriber(whisper, DecodingOptions())(windows, [None] * 3)]
    assert len(set(detected)) > 1
    hypotheses = transcribe(whisper, features, [None] * 3, long_form=form)
    given = transcribe(whisper, features, detected, long_form=form)
    assert [h.language for h in hypotheses] == detected
    assert [h.token_ids for h in hypotheses] == [h.token_ids for h in given]


@pytest.mark.parametrize("all_fail", [False, True])
def test_text_sampled_hot_is_no_context(
    whisper: Whisper, features: list[Tensor], all_fail: bool
) -> None:
    """Nor is text where every attempt failed, the last one hot, whichever is taken."""

    def texts(temperature: float, condition: bool) -> list[str]:
        options = {"temperatures": [temperature], "condition_on_previous_text": condition}
        options |= LOOPS_WILL_DO
        if all_fail:
            options["temperatures"] = [0.0, temperature]
            options |= {"log_probability_threshold": 0.0, "no_speech_threshold": None}
        hypotheses = transcribe(whisper, features[:1], ["zh"], **options)
        assert {h.temperature for h in hypotheses} == {0.0 if all_fail else temperature}
        return [h.text for h in hypotheses]

    assert texts(0.6, condition=True) == texts(0.6, condition=False)
    assert texts(0.5, condition=True) != texts(0.5, condition=False)


@pytest.mark.parametrize("temperatures", [[0.0], [0.0, 0.4]])
def test_a_loop_is_no_context(
    whisper: Whisper, features: list[Tensor], temperatures: list[float]
) -> None:
    """Whatever the temperatures: labelling has one."""
    options = {"temperatures": temperatures, **LOOPS_WILL_DO}

    def texts(condition: bool, **limits: object) -> list[str]:
        given = {**options, **limits, "condition_on_previous_text": condition}
        return [h.text for h in transcribe(whisper, features, **given)]

    assert texts(condition=True) != texts(condition=False)
    every_text_is_a_loop = {"compression_ratio_threshold": 0.01}
    alone = texts(condition=False, **every_text_is_a_loop)
    assert texts(condition=True, **every_text_is_a_loop) == alone


@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_a_silent_recording_has_no_text(
    whisper: Whisper, features: list[Tensor], form: str
) -> None:
    silent = {"no_speech_threshold": 0.0, "log_probability_threshold": 0.0, "long_form": form}
    for hypothesis in transcribe(whisper, features, **silent):
        assert (hypothesis.text, hypothesis.token_ids, hypothesis.segments) == ("", (), ())
        assert hypothesis.average_log_probability < 0
        assert 0 < hypothesis.no_speech_probability < 1


def test_silent_windows_are_left_out(whisper: Whisper, features: list[Tensor]) -> None:
    """The second half is another sound, which the threshold makes silence."""
    sounds = torch.cat([features[0][:, :200], -2 * features[0][:, :400]], dim=1)
    windows = torch.stack(sounds.split(200, dim=1))
    options = {"timestamps": True, "max_new_tokens": LIMIT, "condition_on_previous_text": False}
    hypotheses = Transcriber(whisper, DecodingOptions(**options))(windows, ["zh"] * 3)
    probabilities = [h.no_speech_probability for h in hypotheses]
    threshold = (probabilities[0] + min(probabilities[1:])) / 2
    assert probabilities[0] < threshold < min(probabilities[1:])
    whole = transcribe(
        whisper,
        [sounds],
        ["zh"],
        no_speech_threshold=threshold,
        log_probability_threshold=0.0,
        long_form="chunked",
        **options,
    )[0]
    assert whole.text == hypotheses[0].text
    assert whole.no_speech_probability == pytest.approx(probabilities[0], rel=1e-4)


def test_the_evidence_is_that_of_the_windows(whisper: Whisper, features: list[Tensor]) -> None:
    sounds = features[0][:, :300]
    windows = torch.stack([sounds[:, :200], functional.pad(sounds[:, 133:], (0, 33))])
    options = {"max_new_tokens": 224, "no_speech_threshold": None}
    options |= {"log_probability_threshold": None, "compression_ratio_threshold": None}
    options["temperatures"] = [0.6]
    first = Transcriber(whisper, DecodingOptions(**options))(windows, ["zh"] * 2, [0, 133])
    options["temperatures"] = [0.6, 0.7]  # and the less probable one is sampled again
    options["log_probability_threshold"] = sum(h.average_log_probability for h in first) / 2
    hypotheses = Transcriber(whisper, DecodingOptions(**options))(windows, ["zh"] * 2, [0, 133])
    assert {h.temperature for h in hypotheses} == {0.6, 0.7}
    assert {h.complete for h in hypotheses} == {True, False}
    whole = transcribe(whisper, [sounds], ["zh"], long_form="chunked", **options)[0]
    kept = [len(segment.text) for segment in whole.segments]  # a token is a letter
    assert sum(kept) == whole.token_count
    assert [(s.start_seconds, s.end_seconds) for s in whole.segments] == [(0, 1.66), (1.66, 3)]
    weighted = sum(h.average_log_probability * n for h, n in zip(hypotheses, kept, strict=True))
    assert whole.average_log_probability == pytest.approx(weighted / sum(kept), abs=1e-5)
    silence = [h.no_speech_probability for h in hypotheses]
    assert whole.no_speech_probability == pytest.approx(min(silence), rel=1e-4)
    assert whole.compression_ratio == max(h.compression_ratio for h in hypotheses)
    assert whole.temperature == 0.7
    assert not whole.complete


def test_sequential_needs_timestamps(tmp_path: Path) -> None:
    path = make_model_folder(tmp_path, languages=["en"], window_seconds=2)
    whisper = load_whisper(read_model_folder(path, None, "model"))
    tokens = dataclasses.replace(whisper.tokens, timestamps=range(0))
    without = dataclasses.replace(whisper, tokens=tokens)
    with pytest.raises(ConfigError, match="long_form: sequential goes by timestamps"):
        Transcriber(without, DecodingOptions(long_form="sequential"))
