"""Times of words against openai-whisper's own, with the same random weights, and by hand."""

import copy
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from openai_layout import make_openai_whisper, openai_tokenizer
from tiny import SIXTEEN_KHZ, add_words, make_corpus, make_model_folder, read_rows

from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import log_mel, long_log_mel
from simpler_distil_whisper.decoding import timed_segments
from simpler_distil_whisper.decoding.hypothesis import (
    Hypothesis,
    Segment,
    SegmentWithWords,
    TimedToken,
    TimedWord,
)
from simpler_distil_whisper.decoding.long_form import transcribe_long
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.decoding.word_times import (
    alignment_heads,
    first_positions,
    median_filtered,
    segments_with_words,
    words_and_punctuation,
)
from simpler_distil_whisper.export.formats import write_openai
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.pruning import prune_whisper
from simpler_distil_whisper.model.whisper import Whisper, load_whisper

TEXTS = [
    ("en", ' He paid $30.50, (in cash) for a "well-known" book... didn\'t he?'),
    ("de", " Ja! Das war’s. „Gut“, sagte sie — 3.000 Leute."),
    ("zh", "我今天去了公園。你呢？好的，iPhone 15！"),
    ("ja", "「そうですね」と言った。𠮷野家、🎉です"),
    ("th", "สวัสดีครับ ยินดีต้อนรับ"),
    ("ru", " Привет, мир; как дела?"),
    ("ko", " 안녕하세요. 반갑습니다!"),
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("language", "text"), TEXTS)
def test_words_are_those_of_openai_whisper(language: str, text: str) -> None:
    theirs = pytest.importorskip("whisper.tokenizer").get_tokenizer(True, language=language)
    ids = theirs.encode(text)
    words, tokens = theirs.split_to_word_tokens([*ids, theirs.eot])
    mine = words_and_punctuation(ids, language, theirs.decode)
    assert mine == list(zip(words[:-1], tokens[:-1], strict=True))


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("km", "ភាសាខ្មែរគឺជាភាសាកំណើត"),
        ("bo", "བོད་སྐད་ཡིན་པ་རེད།"),
        ("en", " He said 我今天想跟大家介紹一下"),
    ],
)
def test_a_sentence_without_spaces_is_not_one_word(language: str, text: str) -> None:
    """Of which only the end would be left, since words that last too long are shortened."""
    theirs = pytest.importorskip("whisper.tokenizer").get_tokenizer(True, language=language)
    tokens = [
        TimedToken(id, place * 0.2, place * 0.2 + 0.2, 0.9)
        for place, id in enumerate(theirs.encode(text))
    ]
    whole = Segment(0.0, tokens[-1].end, text)
    [segment] = segments_with_words([(whole, tokens)], language, theirs.decode)
    assert (segment.start_seconds, segment.end_seconds) == (0.0, round(tokens[-1].end, 2))
    assert "".join(word.word for word in segment.words) == text
    assert max(len(word.word.strip()) for word in segment.words) <= 4


def test_tokens_that_are_no_characters_are_not_lost() -> None:
    theirs = pytest.importorskip("whisper.tokenizer").get_tokenizer(True, language="zh")
    ids = theirs.encode("語")[:-1] + theirs.encode("a") + theirs.encode("語")[:-1]
    mine = words_and_punctuation(ids, "zh", theirs.decode)
    assert [id for _, own in mine for id in own] == ids


def plain_path_starts(costs: np.ndarray) -> list[int]:
    """The oracle: the textbook's table, cell by cell."""
    tokens, positions = costs.shape
    best = {(-1, -1): (0.0, [])}
    for i in range(tokens):
        for j in range(positions):
            before = [best.get(c) for c in ((i - 1, j - 1), (i - 1, j), (i, j - 1))]
            total, path = min((b for b in before if b), key=lambda b: b[0])
            best[i, j] = (total + costs[i, j], [*path, (i, j)])
    path = best[tokens - 1, positions - 1][1]
    return [next(j for i, j in path if i == token) for token in range(tokens)]


sizes = st.tuples(st.integers(1, 6), st.integers(1, 8))
floats = st.floats(-9, 9, width=32)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 20))
matrices = arrays.arrays(np.float32, shapes, elements=floats)


@given(sizes, st.integers(0, 2**32 - 1))
def test_the_path_is_the_cheapest(size: tuple[int, int], seed: int) -> None:
    costs = np.random.default_rng(seed).normal(size=size)
    assert first_positions(costs).tolist() == plain_path_starts(costs)


@given(matrices)
def test_the_median_is_numpys(weights: np.ndarray) -> None:
    mine = median_filtered(torch.from_numpy(weights)).numpy()
    if weights.shape[1] <= 3:
        assert (mine == weights).all()
        return
    padded = np.pad(weights, ((0, 0), (3, 3)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 7, axis=1)
    assert (mine == np.median(windows, axis=-1)).all()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Whisper, Any]:
    """A random Whisper, and the same in openai-whisper."""
    openai = pytest.importorskip("whisper")
    folder = tmp_path_factory.mktemp("model")
    path = make_openai_whisper(folder / "ours", openai_tokenizer())
    mine = load_whisper(read_model_folder(path, None, "model"))
    write_openai(mine, "float32", folder / "theirs")
    theirs = openai.load_model(str(folder / "theirs/model.pt"), device="cpu")
    return mine, theirs


@pytest.mark.parametrize("heads", [[[1, 0]], None])
def test_times_are_those_of_openai_whisper(
    both: tuple[Whisper, Any], heads: list | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several texts of different lengths at once, some of two segments."""
    mine, theirs = both
    timing = pytest.importorskip("whisper.timing")
    tokenizer = pytest.importorskip("whisper.tokenizer")
    for compiled in ("dtw_cpu", "backtrace"):  # to compile them takes longer than to run them
        monkeypatch.setattr(timing, compiled, getattr(timing, compiled).py_func)
    monkeypatch.setattr(mine.model.generation_config, "alignment_heads", heads)
    mask = torch.zeros(2, 2, dtype=torch.bool)
    mask[1, 0 if heads else slice(None)] = True
    theirs.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(len(TEXTS), 80, 3000)))
    transcriber = Transcriber(mine, DecodingOptions(), word_timestamps=True)
    seconds = [4.0 + 0.333 * row for row in range(len(TEXTS))]
    languages = [language for language, _ in TEXTS]
    theirs_of = [tokenizer.get_tokenizer(True, language=code) for code in languages]
    texts = [each.encode(text) for each, (_, text) in zip(theirs_of, TEXTS, strict=True)]
    states = transcriber.encode(features.float())
    timed = transcriber.aligner(states, languages, texts, seconds)
    for row, ids in enumerate(texts):
        text_of = theirs_of[row].decode
        begins = [place for place, id in enumerate(ids) if place > 5 and text_of([id])[0] == " "]
        parts = [ids[: begins[0]], ids[begins[0] :]] if begins else [ids]
        bounds = [(0.0, 2.0), (2.5, 3.9)][: len(parts)]
        segments = [
            {"seek": 0, "start": start, "end": end, "tokens": part}
            for (start, end), part in zip(bounds, parts, strict=True)
        ]
        timing.add_word_timestamps(
            segments=segments,
            model=theirs,
            tokenizer=theirs_of[row],
            mel=features[row].float(),
            num_frames=round(seconds[row] * SIXTEEN_KHZ) // 160,
            last_speech_timestamp=0.0,
        )
        rest = iter(timed[row])
        own = [
            (Segment(start, end, text_of(part)), list(islice(rest, len(part))))
            for (start, end), part in zip(bounds, parts, strict=True)
        ]
        result = segments_with_words(own, languages[row], transcriber.text_of)
        for segment, expected in zip(result, segments, strict=True):
            assert isinstance(segment, SegmentWithWords)
            assert [w.word for w in segment.words] == [w["word"] for w in expected["words"]]
            for word, other in zip(segment.words, expected["words"], strict=True):
                assert (word.start, word.end, word.probability) == pytest.approx(
                    (other["start"], other["end"], other["probability"]), abs=0.006
                ), (TEXTS[row], word, other)
            assert (segment.start_seconds, segment.end_seconds) == (
                segment.words[0].start,
                segment.words[-1].end,
            )


def words_of(tokens: list[tuple[str, float, float]], start: float, end: float) -> list[TimedWord]:
    timed = [TimedToken(number, s, e, 0.5) for number, (_, s, e) in enumerate(tokens)]
    text = "".join(word for word, _, _ in tokens)
    [segment] = segments_with_words(
        [(Segment(start, end, text), timed)],
        "en",
        lambda ids: "".join(tokens[id][0] for id in ids),
    )
    assert isinstance(segment, SegmentWithWords)
    return [(word.word, word.start, word.end) for word in segment.words]


def test_pauses_are_no_part_of_words() -> None:
    words = [(" a", 0.0, 0.2), (" b", 0.2, 0.4), (".", 0.4, 2), (" c", 2, 4), (" d", 4, 4.2)]
    assert words_of(words, 0.0, 4.2) == [
        (" a", 0.0, 0.2),
        (" b.", 0.2, 0.4),
        (" c", 3.6, 4.0),  # twice as long as usual
        (" d", 4.0, 4.2),
    ]
    late = [(" a", 0.0, 3.0), (" b", 3.0, 3.2), (" c", 3.2, 3.4), (" d", 3.4, 3.6)]
    assert words_of(late, 0.0, 3.6)[0] == (" a", 2.6, 3.0)
    # A last word that is far longer than its segment ends with it.
    long = [(" a", 0.0, 0.2), (" b", 0.2, 0.4), (" c", 0.4, 2.0)]
    assert words_of(long, 0.0, 0.8)[-1] == (" c", 0.4, 0.8)


@pytest.fixture(scope="module")
def waveforms(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    folder = tmp_path_factory.mktemp("corpus")
    return [load_audio(folder / row["audio"]) for row in read_rows(make_corpus(folder, 4))]


def with_words(
    whisper: Whisper, waveforms: Sequence[np.ndarray], **options: object
) -> list[Hypothesis]:
    transcriber = Transcriber(whisper, DecodingOptions(**options), word_timestamps=True)
    states = transcriber.encode(log_mel(waveforms, whisper.feature_extractor))
    hypotheses = transcriber.from_encoder_states(states, ["en"] * len(waveforms))
    seconds = [len(waveform) / SIXTEEN_KHZ for waveform in waveforms]
    return timed_segments.with_words(transcriber.aligner, states, hypotheses, seconds)


def long_with_words(
    whisper: Whisper, waveforms: Sequence[np.ndarray], **options: object
) -> list[Hypothesis]:
    transcriber = Transcriber(
        whisper, DecodingOptions(batch_size=2, **options), word_timestamps=True
    )
    features = [long_log_mel(waveform, whisper.feature_extractor) for waveform in waveforms]
    return transcribe_long(transcriber, features, ["en"] * len(waveforms))


def assert_words_fit(hypothesis: Hypothesis, seconds: float) -> None:
    now = 0.0
    for segment in hypothesis.segments:
        assert isinstance(segment, SegmentWithWords)
        assert "".join(word.word for word in segment.words) == segment.text
        for word in segment.words:
            assert now <= word.start <= word.end <= seconds + 0.006
            assert 0 <= word.probability <= 1
            now = word.end
    assert now > 0


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("beams", [1, 2])
def test_words_of_a_batch_are_those_of_its_rows_alone(
    whisper: Whisper, waveforms: list[np.ndarray], timestamps: bool, beams: int
) -> None:
    options = {"timestamps": timestamps, "num_beams": beams, "max_new_tokens": 40}
    together = with_words(whisper, waveforms, **options)
    for waveform, hypothesis in zip(waveforms, together, strict=True):
        [alone] = with_words(whisper, [waveform], **options)
        assert alone.segments == hypothesis.segments
        assert_words_fit(hypothesis, len(waveform) / SIXTEEN_KHZ)
        assert "".join(s.text for s in hypothesis.segments) == hypothesis.text


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_words_of_long_recordings(
    whisper: Whisper, waveforms: list[np.ndarray], form: str, timestamps: bool
) -> None:
    recordings = [np.concatenate(waveforms), np.concatenate(waveforms[1:] * 2)]
    options = {"timestamps": timestamps, "max_new_tokens": 24, "long_form": form}
    hypotheses = long_with_words(whisper, recordings, **options)
    for waveform, hypothesis in zip(recordings, hypotheses, strict=True):
        assert_words_fit(hypothesis, len(waveform) / SIXTEEN_KHZ)
        assert hypothesis.segments[-1].end_seconds > 2  # seconds: the window
    plain = Transcriber(whisper, DecodingOptions(batch_size=2, **options))
    features = [long_log_mel(waveform, whisper.feature_extractor) for waveform in recordings]
    without = transcribe_long(plain, features, ["en"] * 2)
    assert [h.token_ids for h in without] == [h.token_ids for h in hypotheses]
    assert [[s.text for s in h.segments] for h in without] == [
        [s.text for s in h.segments] for h in hypotheses
    ]


def test_added_words_have_times(tmp_path: Path, waveforms: list[np.ndarray]) -> None:
    """In one window and in recordings, with timestamps and without."""
    folder = make_model_folder(tmp_path, languages=["en", "zh", "ja"], talkative=True, seed=53)
    whisper = load_whisper(read_model_folder(add_words(folder, {"浴室": "p"}), None, "model"))
    for timestamps in (False, True):
        options = {"timestamps": timestamps, "max_new_tokens": 60}
        hypotheses = with_words(whisper, waveforms, **options)
        for waveform, hypothesis in zip(waveforms, hypotheses, strict=True):
            assert_words_fit(hypothesis, len(waveform) / SIXTEEN_KHZ)
            assert "".join(segment.text for segment in hypothesis.segments) == hypothesis.text
        recording = np.concatenate(waveforms)
        hypotheses += long_with_words(whisper, [recording], long_form="sequential", **options)
        assert_words_fit(hypotheses[-1], len(recording) / SIXTEEN_KHZ)
        words = [word for h in hypotheses for segment in h.segments for word in segment.words]
        assert any("浴室" in word.word and word.probability > 0 for word in words)


def test_a_text_that_fills_all_positions_has_times(
    whisper: Whisper, waveforms: list[np.ndarray]
) -> None:
    transcriber = Transcriber(whisper, DecodingOptions(), word_timestamps=True)
    states = transcriber.encode(log_mel(waveforms[:2], whisper.feature_extractor))
    texts = [[65] * 444, []]
    full, empty = transcriber.aligner(states, ["en", "zh"], texts, [0.4, 0.02])
    assert len(full) == 444 and empty == []
    assert full[-1].end <= 0.4


def test_heads_are_those_of_the_layers_that_are_left(
    whisper: Whisper, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert alignment_heads(whisper.model) == {1: [0, 1]}
    last_only = prune_whisper(whisper.model, [0, 1], [1])
    assert alignment_heads(last_only) == {0: [0, 1]}
    first_only = prune_whisper(whisper.model, [0, 1], [0])  # which none of them was in
    assert alignment_heads(first_only) == {0: [0, 1]}
    config = copy.deepcopy(whisper.model.generation_config)
    monkeypatch.setattr(whisper.model, "generation_config", config)
    config.alignment_heads = None
    assert alignment_heads(whisper.model) == {1: [0, 1]}
