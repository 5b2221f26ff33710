"""Long recordings against transformers' long-form `generate`, and the merging of chunks by hand."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from tiny import SIXTEEN_KHZ, make_model_folder, read_rows
from torch import Tensor
from torch.nn import functional
from transformers import WhisperTokenizer

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import long_log_mel
from simpler_distil_whisper.decoding.long_form import (
    Chunk,
    Sentence,
    Word,
    cut_at_timestamps,
    merged,
    seam,
    transcribe_long,
    words_of,
)
from simpler_distil_whisper.decoding.transcriber import Hypothesis, Transcriber
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.whisper import Whisper, load_whisper

DEMO = REPOSITORY / "demo_data"
LIMIT = 24
LANGUAGES = ["zh", "en", "ja"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    """A window of 2 s, and different words and timestamps for different audio."""
    path = make_model_folder(
        tmp_path_factory.mktemp("model"), languages=["en", "zh", "ja"], talkative=True, seed=53
    )
    return load_whisper(read_model_folder(path, None, "model"))


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


@pytest.mark.parametrize("seconds", [2.5, 61.237])
def test_the_log_mel_is_that_of_the_whole_recording_with_silence_after_it(
    whisper: Whisper, seconds: float
) -> None:
    waveform = recording(seconds, 3)
    extractor = whisper.feature_extractor
    padded = np.concatenate([waveform, np.zeros(30 * SIXTEEN_KHZ, dtype=np.float32)])
    expected = extractor(
        padded, sampling_rate=SIXTEEN_KHZ, truncation=False, padding="longest", return_tensors="pt"
    ).input_features[0]
    found = long_log_mel(waveform, extractor)
    assert found.shape == (80, int(seconds * 100))
    torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=0, atol=1e-5)


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
        # It keeps the start of the next sentence with the last one of a window; openai does not.
        if len(ids) > 2 and ids[-2] in whisper.tokens.timestamps:
            ids.pop()
        segments.append((float(segment["start"]), float(segment["end"]), ids))
    return segments


def as_segments(hypothesis: Hypothesis) -> list[tuple[float, float, str]]:
    return [(s.start_seconds, s.end_seconds, s.text) for s in hypothesis.segments]


def assert_same(whisper: Whisper, feature: Tensor, mine: Hypothesis, theirs: list) -> None:
    assert list(mine.token_ids) == [id for _, _, ids in theirs for id in ids]
    end = feature.shape[1] / 100  # neither stops there, and we say no times after it
    expected = [
        (min(start, end), min(stop, end), whisper.tokenizer.decode(ids, skip_special_tokens=True))
        for start, stop, ids in theirs
    ]
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
    heard = transcribe(whisper, features, **options)
    ids = Transcriber(whisper, DecodingOptions(prompt=prompt)).prompt_ids
    given = {"prompt_ids": torch.tensor([whisper.tokens.previous, *ids])} if prompt else {}
    for language, feature, hypothesis in zip(LANGUAGES, features, heard, strict=True):
        theirs = generated(whisper, feature, language, condition_on_prev_tokens=condition, **given)
        assert_same(whisper, feature, hypothesis, theirs)
    assert sum(len(hypothesis.segments) for hypothesis in heard) > 9


@pytest.mark.slow
def test_same_segments_as_generate_of_the_demo_teacher() -> None:
    whisper = load_whisper(read_model_folder(DEMO / "teacher", None, "model"))
    rows = read_rows(DEMO / "long.jsonl")
    features = [
        long_log_mel(load_audio(DEMO / row["audio"]), whisper.feature_extractor) for row in rows
    ]
    languages = [row["language"] for row in rows]
    heard = transcribe(whisper, features, languages)
    for language, feature, hypothesis in zip(languages, features, heard, strict=True):
        theirs = generated(whisper, feature, language, condition_on_prev_tokens=True)
        assert_same(whisper, feature, hypothesis, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_the_demo_teacher_hears_a_minute(form: str) -> None:
    """Nine characters of ten, and all of its sentences at their times."""
    whisper = load_whisper(read_model_folder(DEMO / "teacher", None, "model"))
    row = read_rows(DEMO / "long.jsonl")[0]
    waveform = load_audio(DEMO / row["audio"])
    options = DecodingOptions(long_form=form, condition_on_previous_text=False)
    [heard] = transcribe_long(
        Transcriber(whisper, options), [long_log_mel(waveform, whisper.feature_extractor)], ["zh"]
    )
    counts = Scorer(Metric()).count(row["text"], heard.text, "zh")
    assert counts.rate is not None and counts.rate <= 0.10
    times = [time for s in heard.segments for time in (s.start_seconds, s.end_seconds)]
    assert times == sorted(times) and times[-1] <= len(waveform) / SIXTEEN_KHZ
    assert len(heard.segments) >= 15


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
def test_draws_do_not_depend_on_neighbours_but_on_keys(
    whisper: Whisper, features: list[Tensor], form: str
) -> None:
    options = {"temperatures": [0.7], "long_form": form}
    together = transcribe(whisper, features, keys=[5, 6, 7], **options)
    alone = transcribe(whisper, features[2:], ["ja"], keys=[7], **options)
    other = transcribe(whisper, features[2:], ["ja"], keys=[8], **options)
    assert alone[0].token_ids == together[2].token_ids != other[0].token_ids
    assert together[2].temperature == 0.7


@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_the_first_window_tells_the_language_of_the_recording(
    tmp_path: Path, features: list[Tensor], form: str
) -> None:
    path = make_model_folder(tmp_path, languages=["en", "zh", "ja"], talkative=True, seed=37)
    whisper = load_whisper(read_model_folder(path, None, "model"))
    # Louder or softer features make the random model hear different languages.
    features = [features[0], torch.cat([-features[0], features[0]], dim=1), 4 * features[0]]
    windows = torch.stack([feature[:, :200] for feature in features])
    detected = [h.language for h in Transcriber(whisper, DecodingOptions())(windows, [None] * 3)]
    assert len(set(detected)) > 1
    heard = transcribe(whisper, features, [None] * 3, long_form=form)
    told = transcribe(whisper, features, detected, long_form=form)
    assert [h.language for h in heard] == detected
    assert [h.token_ids for h in heard] == [h.token_ids for h in told]


def test_what_was_drawn_hot_is_no_context(whisper: Whisper, features: list[Tensor]) -> None:
    """Nothing is probable enough here, so that every window is drawn at the last temperature."""
    always = {"log_probability_threshold": 0.0, "no_speech_threshold": None}

    def texts(hottest: float, condition: bool) -> list[str]:
        temperatures = [0.0, hottest]
        heard = transcribe(
            whisper,
            features[:1],
            ["zh"],
            temperatures=temperatures,
            condition_on_previous_text=condition,
            **always,
        )
        assert {h.temperature for h in heard} == {hottest}
        return [h.text for h in heard]

    assert texts(0.6, condition=True) == texts(0.6, condition=False)
    assert texts(0.5, condition=True) != texts(0.5, condition=False)


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
    """The second half is another sound, in which the model is told to hear no speech."""
    sounds = torch.cat([features[0][:, :200], -2 * features[0][:, :400]], dim=1)
    windows = torch.stack(sounds.split(200, dim=1))
    options = {"timestamps": True, "max_new_tokens": LIMIT, "condition_on_previous_text": False}
    heard = Transcriber(whisper, DecodingOptions(**options))(windows, ["zh"] * 3)
    probabilities = [h.no_speech_probability for h in heard]
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
    assert whole.text == heard[0].text
    assert whole.no_speech_probability == pytest.approx(probabilities[0], rel=1e-4)


A, B, C = 1, 2, 3  # words; times are 100, 101, ...


@pytest.mark.parametrize(
    ("ids", "expected", "advance"),
    [
        # pairs: whole sentences, and the rest is heard again
        ([100, A, 110, 110, B, 130, 130, C], [(0, 20, 3), (20, 60, 3)], 60),
        ([105, A, 110, 112, B, 130, 131], [(10, 20, 3), (24, 60, 3)], 60),
        # a single timestamp at the end: nothing follows it in this window
        ([100, A, 110, 110, B, 130], [(0, 20, 3), (20, 60, 3)], 200),
        ([100, A, 130], [(0, 60, 3)], 200),
        # no pair: one sentence, as long as the window if nothing else is said
        ([100, A, B, C], [(0, 200, 4)], 200),
        ([103, A, B], [(0, 6, 3)], 200),
        ([100], [(0, 200, 1)], 200),
        ([], [(0, 200, 0)], 200),
        # no time passes, and yet it goes on
        ([100, A, 100, 100, B], [(0, 0, 3)], 200),
    ],
)
def test_where_a_window_is_cut(ids: list[int], expected: list[tuple], advance: int) -> None:
    sentences, found = cut_at_timestamps(ids, 100, 200)
    assert [(s.start, s.end, len(s.ids)) for s in sentences] == expected
    assert found == advance
    flat = [id for sentence in sentences for id in sentence.ids]
    assert flat == ids[: len(flat)]


@given(st.lists(st.integers(90, 120), max_size=12), st.integers(1, 200))
def test_every_window_goes_on(ids: list[int], frames: int) -> None:
    ids = [100, *ids]
    for place in range(1, len(ids)):  # timestamps do not decrease
        if ids[place] >= 100:
            ids[place] = max(ids[place], *(id for id in ids[:place]))
    assert cut_at_timestamps(ids, 100, frames)[1] > 0


@pytest.fixture(scope="module")
def tokenizer() -> WhisperTokenizer:
    return WhisperTokenizer.from_pretrained(DEMO / "teacher")


def split(tokenizer: WhisperTokenizer, text: str) -> list[str]:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    words = words_of(ids, tokenizer.decode)
    assert [id for word in words for id in word.ids] == ids, "no token is lost"
    return [word.text for word in words]


def test_words_of_several_scripts(tokenizer: WhisperTokenizer) -> None:
    english = split(tokenizer, " Wednesday's train, please. It's 9.30!")
    assert english == [" Wednesday's", " train,", " please.", " It's", " 9.30!"]
    # Not in the demo's vocabulary: three and four tokens, one for each byte, to a character.
    assert len(tokenizer("龘𠮷", add_special_tokens=False).input_ids) == 7
    assert split(tokenizer, "龘𠮷，「好」嗎？") == ["龘", "𠮷，「", "好」", "嗎？"]
    assert split(tokenizer, "買 iPhone手機") == ["買", " iPhone", "手", "機"]
    assert split(tokenizer, " 안녕하세요 여러분") == [" 안녕하세요", " 여러분"]
    assert split(tokenizer, "ที่นี่") == ["ที่", "นี่"]


def test_bytes_that_are_no_character_are_words_too(tokenizer: WhisperTokenizer) -> None:
    half = tokenizer("龘", add_special_tokens=False).input_ids[:2]
    for ids in (half, half * 3, [*half, *tokenizer("好", add_special_tokens=False).input_ids]):
        words = words_of(ids, tokenizer.decode)
        assert [id for word in words for id in word.ids] == ids


@given(st.text(alphabet="我想订龘𠮷 ab.é한", max_size=12))
def test_no_character_is_cut(tokenizer: WhisperTokenizer, text: str) -> None:
    words = split(tokenizer, text)
    assert "".join(words) == tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    assert not any("\ufffd" in word for word in words)


def some_words(text: str) -> list[Word]:
    return [Word((number,), f" {word}") for number, word in enumerate(text.split())]


def merged_text(left: str, right: str, in_left: float, in_right: float) -> str:
    first, second = some_words(left), some_words(right)
    stop, begin = seam(first, second, in_left, in_right)
    assert 0 <= stop <= len(first)
    assert 0 <= begin <= len(second)
    return "".join(word.text for word in (*first[:stop], *second[begin:])).strip()


@pytest.mark.parametrize(
    ("left", "right", "in_left", "in_right", "expected"),
    [
        ("a b c d e f", "d e f g h", 3, 3, "a b c d e f g h"),
        # the overlap is not as long as the times make one think
        ("a b c d e f", "d e f g h", 1, 1, "a b c d e f g h"),
        ("a b c d e f", "d e f g h", 5, 5, "a b c d e f g h"),
        # the words at the edges are half in the window; case and signs tell where it began
        ("book a flight to Bos", "Fight to Boston. Yes", 3, 3, "book a flight to Boston. Yes"),
        ("my number is seven.", "Number is seven three", 3, 3, "my number is seven three"),
        ("we like to fly", "Fly now", 1, 1, "we like to Fly now"),
        # one chunk has heard a word more than the other
        ("a b c d e f g", "d e x f g h i", 4, 5, "a b c d e x f g h i"),
        # said twice, and said three times: the times tell which is which
        ("call her on Sunday call her", "Sunday call her on Monday", 3, 3,
         "call her on Sunday call her on Monday"),
        ("one one one one", "one one one one", 2, 2, "one one one one one one"),
        # the next chunk begins with the same word after a pause: nothing overlaps
        ("and then stop", "stop it now", 0, 0, "and then stop stop it now"),
        # nothing in common: half of the overlap each
        ("a b c d e f", "u v w x y z", 2, 2, "a b c d e v w x y z"),
        # characters of Chinese
        ("我 想 订 六 张 到", "六 张 到 西 安", 3, 3, "我 想 订 六 张 到 西 安"),
        # nothing was heard in one of them
        ("", "a b", 0, 1, "a b"),
        ("a b", "", 1, 0, "a b"),
        ("", "", 0, 0, ""),
    ],
)  # fmt: skip
def test_neighbours_are_merged(
    left: str, right: str, in_left: float, in_right: float, expected: str
) -> None:
    assert merged_text(left, right, in_left, in_right) == expected


def test_a_loop_does_not_eat_what_was_said_before_it() -> None:
    assert merged_text("x y a b c d x y", "x y " * 50, 2, 34).startswith("x y a b c d x")


NOTHING = Hypothesis("", "en", (), (), -1.0, None, 1.0, 0.0, complete=True)


def chunk(start: int, end: int, *sentences: tuple[int, int, str]) -> Chunk:
    """Letters are words, and their codes are their tokens."""
    said = [
        (Sentence(begin, stop, ()), [Word((ord(word),), f" {word}") for word in text])
        for begin, stop, text in sentences
    ]
    return Chunk(start, end, NOTHING, said)


def told(chunks: list[Chunk], *, timed: bool, pause: slice = slice(0)) -> list[tuple]:
    loud = torch.ones(chunks[-1].end, dtype=torch.bool)
    loud[pause] = False
    return [
        (sentence.start, sentence.end, "".join(map(chr, sentence.ids)))
        for part in merged(chunks, loud, timed)
        for sentence in part.sentences
    ]


def test_sentences_that_a_chunk_has_cut_are_made_whole() -> None:
    first = chunk(0, 200, (0, 60, "abc"), (90, 200, "def"))
    second = chunk(134, 334, (134, 230, "efg"), (240, 330, "hi"))
    expected = [(0, 60, "abc"), (90, 230, "defg"), (240, 330, "hi")]
    assert told([first, second], timed=True) == expected
    assert told([first], timed=True) == expected[:1] + [(90, 200, "def")]
    # the end of one sentence and the beginning of the next stay apart
    apart = [chunk(0, 200, (0, 160, "abcd")), chunk(134, 334, (134, 158, "d"), (162, 300, "efg"))]
    assert told(apart, timed=True) == [(0, 160, "abcd"), (162, 300, "efg")]


def test_without_timestamps_half_of_an_overlap_is_from_either_chunk() -> None:
    three = [chunk(0, 200, (0, 200, "abcd")), chunk(134, 334, (134, 334, "cdef"))]
    three.append(chunk(268, 400, (268, 400, "fgh")))
    expected = [(0, 167, "ab"), (167, 301, "cde"), (301, 400, "fgh")]
    found = told(three, timed=False)
    assert [(start, end) for start, end, _ in found] == [(start, end) for start, end, _ in expected]
    assert "".join(text for _, _, text in found) == "abcdefgh"


def test_pauses_tell_how_much_of_a_text_is_in_the_overlap() -> None:
    """Nothing in common: then half of what was probably said in the overlap is of either."""
    pair = [chunk(0, 200, (0, 200, "abcdef")), chunk(134, 334, (134, 334, "uvwxyz"))]
    texts = [
        "".join(text for _, _, text in told(pair, timed=False, pause=pause))
        for pause in (slice(0), slice(134, 200), slice(0, 134))
    ]
    assert texts == ["abcdevwxyz", "abcdefuvwxyz", "abcvwxyz"]


def test_a_silent_chunk_takes_nothing_from_its_neighbours() -> None:
    three = [chunk(0, 200, (0, 200, "abc")), chunk(134, 334), chunk(268, 468, (268, 468, "def"))]
    assert told(three, timed=False) == [(0, 167, "abc"), (301, 468, "def")]


def test_the_evidence_is_that_of_the_windows(whisper: Whisper, features: list[Tensor]) -> None:
    sounds = features[0][:, :300]
    windows = torch.stack([sounds[:, :200], functional.pad(sounds[:, 133:], (0, 33))])
    options = {"max_new_tokens": 224, "no_speech_threshold": None}
    options |= {"log_probability_threshold": None, "compression_ratio_threshold": None}
    greedy = Transcriber(whisper, DecodingOptions(**options))(windows, ["zh"] * 2)
    options["temperatures"] = [0.0, 0.3]  # and the less probable one is drawn again
    options["log_probability_threshold"] = sum(h.average_log_probability for h in greedy) / 2
    heard = Transcriber(whisper, DecodingOptions(**options))(windows, ["zh"] * 2, [0, 133])
    assert {h.temperature for h in heard} == {0.0, 0.3}
    assert {h.complete for h in heard} == {True, False}
    whole = transcribe(whisper, [sounds], ["zh"], long_form="chunked", **options)[0]
    kept = [len(segment.text) for segment in whole.segments]  # a token is a letter
    assert sum(kept) == whole.tokens
    assert [(s.start_seconds, s.end_seconds) for s in whole.segments] == [(0, 1.66), (1.66, 3)]
    weighted = sum(h.average_log_probability * n for h, n in zip(heard, kept, strict=True))
    assert whole.average_log_probability == pytest.approx(weighted / sum(kept), abs=1e-5)
    silence = [h.no_speech_probability for h in heard]
    assert whole.no_speech_probability == pytest.approx(min(silence), rel=1e-4)
    assert whole.compression_ratio == max(h.compression_ratio for h in heard)
    assert whole.temperature == 0.3
    assert not whole.complete


def test_sequential_needs_timestamps(tmp_path: Path) -> None:
    path = make_model_folder(tmp_path, languages=["en"], window_seconds=2)
    whisper = load_whisper(read_model_folder(path, None, "model"))
    tokens = dataclasses.replace(whisper.tokens, timestamps=range(0))
    without = dataclasses.replace(whisper, tokens=tokens)
    with pytest.raises(ConfigError, match="long_form: sequential goes by timestamps"):
        Transcriber(without, DecodingOptions(long_form="sequential"))


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_chunks_of_a_text_merge_to_that_text(length: int, size: int, data: st.DataObject) -> None:
    """All words differ, and the times are wrong by fewer words than the overlap has."""
    overlap = data.draw(st.integers(1, size - 1))
    wrong = data.draw(st.integers(1 - overlap, overlap - 1))
    assert_merges([str(number) for number in range(length)], size, overlap, overlap + wrong)


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=4), st.integers(2, 20), st.data())
def test_the_times_tell_how_often_something_was_said(
    piece: list[str], size: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(1, size - 1))
    assert_merges(piece * 12, size, overlap, overlap)


def assert_merges(text: list[str], size: int, overlap: int, expected: int) -> None:
    starts = range(0, max(len(text) - overlap, 1), size - overlap)
    chunks = [some_words(" ".join(text[start : start + size])) for start in starts]
    seams = [seam(left, right, expected, expected) for left, right in pairwise(chunks)]
    stops = [stop for stop, _ in seams] + [len(chunks[-1])]
    firsts = [0] + [first for _, first in seams]
    said = [
        word.text.strip()
        for chunk, first, stop in zip(chunks, firsts, stops, strict=True)
        for word in chunk[first:stop]
    ]
    assert said == text
