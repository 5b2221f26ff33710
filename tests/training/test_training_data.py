"""What is trained on, as which tokens, in which order; and what is not, and why."""

import json
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import make_model_folder, make_tokenizer, write_rows, write_tone
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.data.manifest import Utterance, read_manifest
from simpler_distil_whisper.data.workers import load_ahead
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.packing import packed_row
from simpler_distil_whisper.labels.rows import LabelColumns
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder
from simpler_distil_whisper.model.teacher_cache import EncoderStateCache, TensorStore
from simpler_distil_whisper.model.whisper import SpecialTokens, special_tokens
from simpler_distil_whisper.training.augment import View, Views
from simpler_distil_whisper.training.dataset import (
    StateCaches,
    TrainingBatch,
    TrainingDataset,
)
from simpler_distil_whisper.training.filters import ExampleFilter, Selection
from simpler_distil_whisper.training.options import Augmentation, TrainingData
from simpler_distil_whisper.training.plan import Visit
from simpler_distil_whisper.training.tokens import (
    DecoderTokens,
    Example,
    LabelTokenizer,
    VisitTokens,
    decoder_sequences,
)

WINDOW = 2
# The tokenizer's 256 bytes come first: those that print by their value, then the others.
END, START, ZH, EN, TRANSLATE, TRANSCRIBE, NO_TIMESTAMPS = 256, 257, 258, 259, 260, 261, 265
PREVIOUS, TIME = 263, 266  # <|startofprev|>, <|0.00|>
NI_HAO = [160, 121, 254, 161, 98, 121]  # 你好: E4 BD A0, E5 A5 BD
HI = [39, 72]


def model_facts(*languages: str) -> ModelFolder:
    config = {"vocab_size": 400, "max_target_positions": 448, "max_source_positions": 50 * WINDOW}
    return ModelFolder(Path("m"), Path("m"), config, frozenset(languages))


def tokens_of_a_model(*languages: str) -> SpecialTokens:
    return special_tokens(make_tokenizer(["zh", "en"], WINDOW), model_facts(*languages))


Select = Callable[..., Selection]


@pytest.fixture
def select(tmp_path: Path) -> Select:
    """Pass rows through the filters of a `data` section."""

    def passed(
        *rows: dict[str, Any] | str, english_only: bool = False, positions: int = 448, **data: Any
    ) -> Selection:
        path = write_rows(tmp_path / "train.jsonl", list(rows))
        section = TrainingData(train_manifests=[path], **data)
        tokenizer = make_tokenizer(["zh", "en"], WINDOW)
        tokens = tokens_of_a_model(*(() if english_only else ("zh", "en")))
        filters = ExampleFilter(
            section, LabelTokenizer(tokenizer, tokens, positions), float(WINDOW)
        )
        return filters.select([read_manifest(path, section.columns)])

    write_tone(tmp_path / "a.wav", 1.0)
    return passed


def row(**fields: Any) -> dict[str, Any]:
    return {"audio": "a.wav", "text": "你好", "language": "zh", **fields}


def visit_tokens_of(examples: list[Example], positions: int = 448, **data: Any) -> VisitTokens:
    section = TrainingData(train_manifests=[Path("p")], **data)
    return VisitTokens(examples, section, tokens_of_a_model("zh", "en"), positions, 0)


def plain(examples: list[Example]) -> list[DecoderTokens]:
    return [DecoderTokens(example.tokens, example.prompt_length) for example in examples]


# Two token sequences, by hand.


def test_a_chinese_and_an_english_sentence_by_hand(select: Select) -> None:
    examples = select(row(), row(text="Hi", language="en")).examples
    assert list(examples[0].tokens) == [START, ZH, TRANSCRIBE, NO_TIMESTAMPS, *NI_HAO, END]
    assert list(examples[1].tokens) == [START, EN, TRANSCRIBE, NO_TIMESTAMPS, *HI, END]
    assert [example.prompt_length for example in examples] == [4, 4]
    inputs, labels = decoder_sequences(plain(examples), END)
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.tolist() == [
        [START, ZH, TRANSCRIBE, NO_TIMESTAMPS, *NI_HAO],
        [START, EN, TRANSCRIBE, NO_TIMESTAMPS, *HI, END, END, END, END],
    ]
    # The end token is learnt once, although it also is what pads; nothing else of the padding is.
    assert labels.tolist() == [
        [-100, -100, -100, *NI_HAO, END],
        [-100, -100, -100, *HI, END, -100, -100, -100, -100],
    ]


def test_an_english_only_model_has_a_short_prompt(select: Select) -> None:
    (example,) = select(row(text="Hi", language="en"), english_only=True).examples
    assert list(example.tokens) == [START, NO_TIMESTAMPS, *HI, END]
    inputs, labels = decoder_sequences(plain([example]), END)
    assert inputs.tolist() == [[START, NO_TIMESTAMPS, *HI]]
    assert labels.tolist() == [[-100, *HI, END]]


def test_task_and_default_language_stand_in_the_prompt(select: Select) -> None:
    examples = select(row(), row(language=None), language="english", task="translate").examples
    assert [list(example.tokens[:4]) for example in examples] == [
        [START, ZH, TRANSLATE, NO_TIMESTAMPS],
        [START, EN, TRANSLATE, NO_TIMESTAMPS],
    ]


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|0.50|>"])
def test_a_transcript_cannot_hold_a_special_token(select: Select, token: str) -> None:
    selection = select(row(text=f"你好{token}"), row(text="<|> <|hello|>", language="en"))
    assert [example.utterance.text for example in selection.examples] == ["<|> <|hello|>"]
    (rejection,) = selection.rejections
    assert token in rejection.reason
    assert selection.report["special token in label"]["rows"] == 1


def examples_of(lengths: list[int]) -> list[Example]:
    one = Utterance(0, "p", "{}", "i", Path("a"), 0.0, None, "t", "zh")
    random = np.random.default_rng(0)
    prompt = [START, ZH, TRANSCRIBE, NO_TIMESTAMPS]
    return [
        Example(one, 1.0, array("i", [*prompt, *random.integers(0, 257, length), END]), 4)
        for length in lengths
    ]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 300))
def test_each_label_is_the_token_after_its_input(lengths: list[int], padding: int) -> None:
    examples = examples_of(lengths)
    inputs, labels = decoder_sequences(plain(examples), padding)
    assert inputs.shape == labels.shape == (len(lengths), max(lengths) + 4)
    for example, given_, learnt in zip(examples, inputs.tolist(), labels.tolist(), strict=True):
        length = len(example.tokens)
        assert given_[: length - 1] == list(example.tokens[:-1])
        assert given_[length - 1 :] == [padding] * (len(given_) - length + 1)
        assert learnt[:3] == [-100] * 3
        assert learnt[3 : length - 1] == list(example.tokens[4:])
        assert learnt[length - 1 :] == [-100] * (len(given_) - length + 1)


def test_padding_never_reaches_the_loss(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m", languages=["zh", "en"], window_seconds=WINDOW)
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    examples = examples_of([3, 17, 8])
    features = torch.randn(3, 80, WINDOW * 100, generator=torch.Generator().manual_seed(0))
    losses = []
    for padding in (END, START, 7):
        inputs, labels = decoder_sequences(plain(examples), padding)
        with torch.inference_mode():
            logits = model(features, decoder_input_ids=inputs).logits
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
        )
        losses.append(each.sum(dim=1))
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    # Alone, without any padding, an example has the same loss.
    for number, example in enumerate(examples):
        inputs, labels = decoder_sequences(plain([example]), END)
        with torch.inference_mode():
            logits = model(features[number : number + 1], decoder_input_ids=inputs).logits[0]
        alone = torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum")
        torch.testing.assert_close(alone, losses[0][number], rtol=1e-4, atol=1e-4)


# Filters.


@pytest.mark.parametrize(
    ("fields", "data", "kind", "reason"),
    [
        ({"text": ""}, {}, "no label", '"text" is empty'),
        ({"text": " \n"}, {}, "no label", '"text" is empty'),
        ({"text": None}, {}, "no label", '"text" is empty'),
        ({"language": None}, {}, "no language", "neither the row nor data.language"),
        ({}, {"max_error_rate": 0.1}, "no error rate", '"cer/wer" is empty'),
        ({"cer/wer": "0.1"}, {"max_error_rate": 0.1}, "no error rate", "is not a number: '0.1'"),
        ({"cer/wer": True}, {"max_error_rate": 1}, "no error rate", "is not a number: True"),
        ({"cer/wer": 0.1001}, {"max_error_rate": 0.1}, "error rate above maximum", "0.1001, above"),
        ({}, {"min_duration_seconds": 1.001}, "too short", "1.000 s, the minimum is 1.001 s"),
        ({}, {"max_duration_seconds": 0.999}, "too long", "1.000 s, the maximum is 0.999 s"),
        ({}, {"max_label_tokens": 5}, "label too long", "label of 6 tokens, the maximum is 5"),
        ({"audio": "text.wav"}, {}, "unreadable audio", "text.wav: cannot be decoded"),
        ({"start_seconds": 1.5}, {}, "unreadable audio", "the part starts at 1.5 s"),
        ({"audio": "nowhere.wav"}, {}, "unusable row", "no such file"),
    ],
)
def test_each_filter_says_what_it_drops(
    select: Select, tmp_path: Path, fields: dict, data: dict, kind: str, reason: str
) -> None:
    (tmp_path / "text.wav").write_text("no audio", encoding="utf-8")
    selection = select(row(**fields), **data)
    assert selection.examples == []
    (rejection,) = selection.rejections
    assert reason in rejection.reason
    assert rejection.place == f"{tmp_path / 'train.jsonl'}:1"
    assert rejection.row == row(**fields)
    assert selection.report.keys() == {"kept", kind}
    assert selection.report["kept"] == {"rows": 0, "hours": 0}
    assert selection.report[kind]["rows"] == 1


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({"cer/wer": 0.1}, {"max_error_rate": 0.1}),
        ({"cer/wer": 0}, {"max_error_rate": 0}),
        ({"cer/wer": 5.0}, {}),
        ({"cer/wer": "?"}, {}),
        ({"rate": 0.2}, {"max_error_rate": 0.2, "columns": {"error_rate": "rate"}}),
        ({}, {"min_duration_seconds": 1.0}),
        ({}, {"max_duration_seconds": 1.0}),
        ({"duration_seconds": 0.5}, {"max_duration_seconds": 0.5}),
        ({}, {"max_label_tokens": 6}),
        ({"audio": "window.wav"}, {}),
    ],
)
def test_each_limit_still_belongs_to_what_is_kept(
    select: Select, tmp_path: Path, fields: dict, data: dict
) -> None:
    write_tone(tmp_path / "window.wav", float(WINDOW))
    assert len(select(row(**fields), **data).examples) == 1


def test_audio_longer_than_the_window_is_dropped_whatever_the_config_allows(
    select: Select, tmp_path: Path
) -> None:
    write_tone(tmp_path / "long.wav", WINDOW + 0.001)
    selection = select(row(audio="long.wav"), max_duration_seconds=30.0)
    assert selection.report["too long"]["rows"] == 1


@pytest.mark.parametrize(("english_only", "prompt"), [(False, 4), (True, 2)])
def test_the_longest_label_is_what_the_decoder_can_hold(
    select: Select, english_only: bool, prompt: int
) -> None:
    texts = ["x" * (20 - prompt), "x" * (21 - prompt)]
    rows = [row(text=text, language="en") for text in texts]
    for data in ({}, {"max_label_tokens": 400}):
        selection = select(*rows, english_only=english_only, positions=20, **data)
        assert [len(example.tokens) for example in selection.examples] == [21]
        inputs, _ = decoder_sequences(plain(selection.examples), END)
        assert inputs.shape == (1, 20)
        assert selection.report["label too long"]["rows"] == 1


def test_the_report_counts_rows_and_hours_of_every_reason(select: Select, tmp_path: Path) -> None:
    for seconds in (0.5, 1.5, 1.9):
        write_tone(tmp_path / f"{seconds}.wav", seconds)
    rows: list[dict[str, Any] | str] = [
        row(audio="1.5.wav"),
        row(audio="1.9.wav", **{"cer/wer": 0.0}),
        "{",
        row(audio="1.5.wav", **{"cer/wer": 0.9}),
        row(audio="1.5.wav", **{"cer/wer": 0.8}),
        row(audio="0.5.wav", **{"cer/wer": 0.1}),
    ]
    many = [entry for entry in rows for _ in range(100)]
    selection = select(*many, max_error_rate=0.5, min_duration_seconds=0.6)
    assert selection.report == {
        "kept": {"rows": 100, "hours": 0.0528},
        "unusable row": {"rows": 100, "hours": 0.0},
        "no error rate": {"rows": 100, "hours": 0.0417},
        "error rate above maximum": {"rows": 200, "hours": 0.0833},
        "too short": {"rows": 100, "hours": 0.0139},
    }
    assert len(selection.examples) + len(selection.rejections) == 600
    assert sum(count["rows"] for count in selection.report.values()) == 600


def test_seconds_are_those_of_the_part(select: Select) -> None:
    (example,) = select(row(start_seconds=0.25, duration_seconds=0.5)).examples
    assert example.seconds == 0.5


# Timestamps and previous text, by hand: <|0.00|> is 266, <|0.02|> is 267, ...


def timed_row(*segments: tuple[float, float | None, str], **fields: Any) -> dict[str, Any]:
    text = "".join(text for _, _, text in segments)
    rows = [{"start_seconds": s, "end_seconds": e, "text": text} for s, e, text in segments]
    return row(**{"text": text, "language": "en", "segments": rows, **fields})


NEVER, ALWAYS = {"timestamp_probability": 0.0}, {"timestamp_probability": 1.0}


def test_a_label_with_timestamps_by_hand(select: Select) -> None:
    there = [ord(letter) - 33 for letter in "there"]
    timed = timed_row((0.0, 0.42, "Hi"), (0.5, 1.0, "there"))
    examples = select(timed, **ALWAYS).examples
    tokens = visit_tokens_of(examples, **ALWAYS).of(Visit(0, 0, 0), View())
    # 0.42 s is 21 steps of 0.02 s, 0.5 s 25, 1 s 50.
    said = [TIME, *HI, TIME + 21, TIME + 25, *there, TIME + 50, END]
    assert list(tokens.tokens) == [START, EN, TRANSCRIBE, *said]
    inputs, labels = decoder_sequences([tokens], END)
    # The first timestamp is learnt, and <|notimestamps|> is nowhere.
    assert inputs[0].tolist() == [START, EN, TRANSCRIBE, *said[:-1]]
    assert labels[0].tolist() == [-100, -100, *said]
    untimed = visit_tokens_of(examples, **NEVER).of(Visit(0, 0, 0), View())
    assert list(untimed.tokens) == [START, EN, TRANSCRIBE, NO_TIMESTAMPS, *HI, *there, END]


@pytest.mark.parametrize(
    ("start", "end", "times"),
    [
        (0.0, 0.009, (0, 0)),
        (0.011, 0.029, (1, 1)),
        (1.234, 1.999, (62, 100)),
        (1.5, 7.0, (75, 100)),  # capped at the window
        (0.3, None, (15, None)),  # the model did not say the end
    ],
)
def test_times_are_rounded_to_timestamps_of_the_window(
    select: Select, start: float, end: float | None, times: tuple[int, int | None]
) -> None:
    (example,) = select(timed_row((start, end, "Hi")), **ALWAYS).examples
    tokens = visit_tokens_of([example], **ALWAYS).of(Visit(0, 0, 0), View()).tokens
    last = [] if times[1] is None else [TIME + times[1]]
    assert list(tokens) == [START, EN, TRANSCRIBE, TIME + times[0], *HI, *last, END]


def test_an_english_only_model_learns_timestamps_after_its_short_prompt(select: Select) -> None:
    examples = select(timed_row((0, 1, "Hi")), english_only=True, **ALWAYS).examples
    tokens = visit_tokens_of(examples, **ALWAYS).of(Visit(0, 0, 0), View()).tokens
    assert list(tokens) == [START, TIME, *HI, TIME + 50, END]


def test_previous_text_by_hand(select: Select) -> None:
    data = {"previous_text_probability": 1.0}
    examples = select(row(previous_text="Hi"), row(previous_text=" "), row(), **data).examples
    visit_tokens = visit_tokens_of(examples, **data)
    given, *without = [visit_tokens.of(visit, View()) for visit in visits_of(0, 1, 2)]
    prompt = [PREVIOUS, *HI, START, ZH, TRANSCRIBE, NO_TIMESTAMPS]
    assert list(given.tokens) == [*prompt, *NI_HAO, END]
    inputs, labels = decoder_sequences([given], END)
    assert inputs[0].tolist() == [*prompt, *NI_HAO]
    # None of it is learnt, <|startoftranscript|> included.
    assert labels[0].tolist() == [-100] * 6 + [*NI_HAO, END]
    # Rows without it never get that of their neighbours.
    assert [list(tokens.tokens) for tokens in without] == [
        [START, ZH, TRANSCRIBE, NO_TIMESTAMPS, *NI_HAO, END]
    ] * 2


def test_previous_text_and_timestamps_by_hand(select: Select) -> None:
    data = {"previous_text_probability": 1.0, **ALWAYS}
    examples = select(timed_row((0, 1, "Hi"), previous_text="你好"), **data).examples
    tokens, prompt_length = visit_tokens_of(examples, **data).of(Visit(0, 0, 0), View())
    assert list(tokens[:prompt_length]) == [PREVIOUS, *NI_HAO, START, EN, TRANSCRIBE]
    assert list(tokens[prompt_length:]) == [TIME, *HI, TIME + 50, END]


@pytest.mark.parametrize("label", [1, 5, 14, 15, 16])
def test_only_the_end_of_a_long_previous_text_is_given(select: Select, label: int) -> None:
    data = {"previous_text_probability": 1.0}
    long_ago = row(text="x" * label, previous_text="abc" * 100 + "Hi")
    (example,) = select(long_ago, positions=20, **data).examples
    visit_tokens = visit_tokens_of([example], positions=20, **data)
    tokens = list(visit_tokens.of(Visit(0, 0, 0), View()).tokens)
    inputs, _ = decoder_sequences([DecoderTokens(tokens, tokens.index(START) + 4)], END)
    # Half of 20 positions, and no more than the label leaves: 4 are the prompt's.
    given = min(10, 20 - 4 - label)
    given = given if given > 1 else 0  # <|startofprev|> alone would say nothing
    assert inputs.shape == (1, 4 + label + given)
    assert tokens.index(START) == given
    assert tokens[-label - 5 :] == [START, ZH, TRANSCRIBE, NO_TIMESTAMPS, *[87] * label, END]
    if given:
        assert tokens[:given] == [PREVIOUS, *[*[64, 65, 66] * 3, *HI][12 - given :]]


SEGMENTS: list[tuple[Any, str]] = [
    ("Hi", "Input should be a valid list"),
    ([{"start_seconds": 0.0, "text": "Hi"}], "[0]['end_seconds']: Field required"),
    ([{"start_seconds": "0", "end_seconds": 1, "text": "Hi"}], "[0]['start_seconds']: Input"),
    ([{"start_seconds": -0.1, "end_seconds": 1, "text": "Hi"}], "greater than or equal to 0"),
    ([{"start_seconds": 0, "end_seconds": 1, "text": None}], "[0]['text']: Input should be a"),
    ([{"start_seconds": 1.0, "end_seconds": 0.5, "text": "Hi"}], "the times go back: [1.0, 0.5]"),
    (
        [
            {"start_seconds": 0.5, "end_seconds": 1, "text": "H"},
            {"start_seconds": 0.4, "end_seconds": 1, "text": "i"},
        ],
        "the times go back: [0.5, 1.0, 0.4, 1.0]",
    ),
    (
        [
            {"start_seconds": 0, "end_seconds": None, "text": "H"},
            {"start_seconds": 0.4, "end_seconds": 1, "text": "i"},
        ],
        "only the last segment may lack its end",
    ),
]


@pytest.mark.parametrize(("segments", "reason"), SEGMENTS)
def test_malformed_segments_are_dropped_with_the_reason(
    select: Select, segments: Any, reason: str
) -> None:
    broken = row(text="Hi", segments=segments)
    selection = select(broken, row(), **ALWAYS)
    assert [example.utterance.text for example in selection.examples] == ["你好"]
    (rejection,) = selection.rejections
    assert rejection.reason.startswith('"segments"')
    assert reason in rejection.reason
    assert selection.report["malformed segments"]["rows"] == 1
    # Who does not ask for them does not care.
    assert len(select(broken, row(), **NEVER).examples) == 2


def test_unusable_previous_text_is_dropped_with_the_reason(select: Select) -> None:
    rows = [row(previous_text=["你好"]), row(previous_text="a<|en|>"), row(previous_text=None)]
    selection = select(*rows, previous_text_probability=0.5)
    assert len(selection.examples) == 1
    assert [rejection.reason for rejection in selection.rejections] == [
        "\"previous_text\" is not a string: ['你好']",
        "the previous text holds <|en|>, which is no speech",
    ]
    assert len(select(*rows).examples) == 3


def test_rows_that_cannot_be_timed_are_learnt_without_and_counted(
    select: Select, caplog: pytest.LogCaptureFixture
) -> None:
    other = timed_row((0, 1, "Hi"), text="Ho")
    spaced = timed_row((0, 0.5, " H"), (0.5, 0.8, " "), (0.8, 1, "i "), text="H i")
    long = timed_row((0, 0.1, "abcdefg"), (0.2, 0.3, "hijklmn"))
    rows = [other, spaced, long, row(), row(segments=[]), row(segments=None)]
    with caplog.at_level("INFO"):
        examples = select(*rows, positions=20, **ALWAYS).examples
    visit_tokens = visit_tokens_of(examples, positions=20, **ALWAYS)
    sequences = [list(visit_tokens.of(visit, View()).tokens) for visit in visits_of(*range(6))]
    assert [NO_TIMESTAMPS in tokens for tokens in sequences] == [True, False, *[True] * 4]
    # What has no text is no sentence.
    spaces_and_letters = [220, 39, TIME + 25, TIME + 40, 72, 220, TIME + 50, END]
    assert sequences[1] == [START, EN, TRANSCRIBE, TIME, *spaces_and_letters]
    assert caplog.messages == [
        "kept training rows, without timestamps, since their segments are not the label: 1",
        "kept training rows, with segments: 1",
        "kept training rows, without timestamps, since with them they are too long: 1",
        "kept training rows, without segments: 3",
    ]


def test_asking_for_timestamps_and_having_none_is_worth_a_warning(
    select: Select, caplog: pytest.LogCaptureFixture
) -> None:
    select(row(), **ALWAYS, previous_text_probability=0.5)
    # What is said beside the warnings is seen or not, as other tests have left the log.
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    timed, previous = caplog.messages
    assert timed.startswith("data.timestamp_probability is 1, but no row can be learnt with")
    assert previous == "kept training rows, with previous text: 0"


@pytest.mark.parametrize(("letters", "timed"), [(14, True), (15, False)])
def test_timestamps_are_learnt_where_the_decoder_has_room_for_them(
    select: Select, letters: int, timed: bool
) -> None:
    (example,) = select(timed_row((0, 1, "x" * letters)), positions=19, **ALWAYS).examples
    tokens = visit_tokens_of([example], positions=19, **ALWAYS).of(Visit(0, 0, 0), View()).tokens
    assert (NO_TIMESTAMPS not in tokens) == timed
    assert len(tokens) - 1 <= 19


@pytest.mark.parametrize(
    ("data", "missing"),
    [
        ({"timestamp_probability": 0.1}, {"timestamps": range(0)}),
        ({"previous_text_probability": 0.1}, {"previous": None}),
    ],
)
def test_a_model_without_the_tokens_is_refused_by_the_name_of_the_key(
    data: dict[str, float], missing: dict[str, Any]
) -> None:
    tokens = replace(tokens_of_a_model("zh", "en"), **missing)
    section = TrainingData(train_manifests=[Path("p")], **data)
    tokenizer = make_tokenizer(["zh", "en"], WINDOW)
    with pytest.raises(ConfigError, match=f"^data.{next(iter(data))}: the model has no "):
        ExampleFilter(section, LabelTokenizer(tokenizer, tokens, 448), float(WINDOW))
    off = TrainingData(train_manifests=[Path("p")])
    ExampleFilter(off, LabelTokenizer(tokenizer, tokens, 448), float(WINDOW))


def test_timestamps_and_previous_text_are_drawn_at_each_visit(select: Select) -> None:
    data = {"timestamp_probability": 0.3, "previous_text_probability": 0.6}
    examples = select(timed_row((0, 1, "Hi"), previous_text="Hi"), **data).examples
    visit_tokens = visit_tokens_of(examples, **data)
    visits = [Visit(0, position, position) for position in range(1000)]
    drawn = [list(visit_tokens.of(visit, View()).tokens) for visit in visits]
    timed = np.array([NO_TIMESTAMPS not in tokens for tokens in drawn])
    continued = np.array([tokens[0] == PREVIOUS for tokens in drawn])
    assert abs(timed.mean() - 0.3) < 0.06
    assert abs(continued.mean() - 0.6) < 0.06
    # One says nothing about the other.
    assert abs((timed & continued).mean() - 0.18) < 0.05
    assert [visit_tokens.length(visit) for visit in visits] == [len(tokens) for tokens in drawn]
    # The same whoever asks, and when.
    again = visit_tokens_of(examples, **data)
    assert [list(again.of(visit, View()).tokens) for visit in visits[::-1]] == drawn[::-1]


def test_a_packed_row_that_fills_the_window_is_learnt_with_its_times(
    select: Select, tmp_path: Path
) -> None:
    columns = LabelColumns(
        **{name: name for name in ("id", "audio", "start_seconds", "duration_seconds", "language")},
        label="text",
        reference="origin_text",
        error_rate="cer/wer",
        segments="segments",
    )
    parts: list[Row] = [
        {
            "audio": "a.wav",
            "text": text,
            "origin_text": text,
            "error_unit": "word",
            "error_language": None,
        }
        | {"audio_seconds": 1.0, "language": "en"}
        for text in ("Hi", "there")
    ]
    pack = packed_row(parts, 0, columns, ["language"], Scorer(Metric()))
    write_tone(tmp_path / str(pack["audio"]), float(WINDOW))
    selection = select(pack, max_error_rate=0, previous_text_probability=1.0, **ALWAYS)
    (example,) = selection.examples
    assert example.seconds == WINDOW
    batch = dataset_of([example], [[0]], **ALWAYS)[0]
    there = [ord(letter) - 33 for letter in "there"]
    said = [TIME, *HI, TIME + 50, TIME + 50, *there, TIME + 100]
    assert batch.labels[0].tolist() == [-100, -100, *said, END]
    assert batch.input_features.shape == (1, 80, 100 * WINDOW)


def test_what_people_said_can_be_learnt_instead_of_pseudo_labels(select: Select) -> None:
    rows = [row(text="xyz", origin_text="你好"), row(text="xyz", origin_text=None)]
    selection = select(*rows, columns={"text": "origin_text"})
    (example,) = selection.examples
    assert list(example.tokens[4:]) == [*NI_HAO, END]
    assert selection.rejections[0].reason == '"origin_text" is empty'


def test_each_manifest_needs_a_weight() -> None:
    paths = [Path("a"), Path("b")]
    with pytest.raises(ValidationError, match="has 3 weights, but there are 2 train_manifests"):
        TrainingData(train_manifests=paths, train_weights=[1.0, 1.0, 2.0])
    with pytest.raises(ValidationError, match="greater than 0"):
        TrainingData(train_manifests=paths, train_weights=[1.0, 0.0])


def test_rows_carry_the_weight_of_their_manifest(tmp_path: Path) -> None:
    write_tone(tmp_path / "a.wav", 1.0)
    paths = [write_rows(tmp_path / f"{n}.jsonl", [row()] * n) for n in (1, 2)]
    section = TrainingData(train_manifests=paths, train_weights=[0.5, 2.0])
    tokens, tokenizer = tokens_of_a_model("zh", "en"), make_tokenizer(["zh", "en"], WINDOW)
    filters = ExampleFilter(section, LabelTokenizer(tokenizer, tokens, 448), float(WINDOW))
    selection = filters.select([read_manifest(path, section.columns) for path in paths])
    assert [example.weight for example in selection.examples] == [0.5, 2.0, 2.0]
    assert selection.epoch_size == 4.5


# Batches.


def visits_of(*examples: int, use: int = 0) -> list[Visit]:
    return [Visit(example, 100 * use + example, use) for example in examples]


def dataset_of(
    examples: list[Example],
    batches: list[list[int]] | list[list[Visit]],
    *,
    augmentation: dict[str, Any] | None = None,
    cache: EncoderStateCache | None = None,
    **data: Any,
) -> TrainingDataset:
    options = Augmentation.model_validate(augmentation or {})
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW)
    visits = [
        [Visit(each, each, 0) if isinstance(each, int) else each for each in batch]
        for batch in batches
    ]
    views = Views(options, float(WINDOW), 0)
    return TrainingDataset(
        visits, visit_tokens_of(examples, **data), views, extractor, StateCaches(cache)
    )


@pytest.fixture
def dataset(select: Select, tmp_path: Path) -> TrainingDataset:
    for number, seconds in enumerate((0.5, 1.25, 2.0)):
        write_tone(tmp_path / f"{number}.wav", seconds, seed=number)
    rows = [row(audio="0.wav"), row(audio="1.wav", text="Hi", language="en"), row(audio="2.wav")]
    return dataset_of(select(*rows).examples, [[2, 0, 1], [1]])


def test_a_batch_pairs_each_sound_with_its_own_label(dataset: TrainingDataset) -> None:
    batch = dataset[0]
    assert len(dataset) == 2
    assert batch.input_features.shape == (3, 80, WINDOW * 100)
    assert batch.decoder_input_ids[:, 1].tolist() == [ZH, ZH, EN]
    assert batch.seconds == 3.75
    assert batch.label_tokens == 7 + 7 + 3
    assert batch.rejections == []
    alone = dataset[1]
    assert torch.equal(alone.input_features[0], batch.input_features[2])
    assert alone.labels.tolist() == [[-100, -100, -100, *HI, END]]


def test_a_file_that_breaks_during_training_teaches_nothing(
    dataset: TrainingDataset, tmp_path: Path
) -> None:
    whole = dataset[0]
    (tmp_path / "0.wav").write_bytes(b"no longer audio")
    batch = dataset[0]
    (rejection,) = batch.rejections
    assert rejection.reason.startswith(f"{tmp_path / '0.wav'}: cannot be decoded")
    assert rejection.place == f"{tmp_path / 'train.jsonl'}:1"
    assert json.loads(json.dumps(rejection.row)) == row(audio="0.wav")
    assert (batch.labels[1] == -100).all()
    assert batch.label_tokens == 7 + 3
    assert torch.isfinite(batch.input_features).all()
    # The other rows, and the shape that processes agree on, stay as they were.
    for before, after in (
        (whole.input_features, batch.input_features),
        (whole.decoder_input_ids, batch.decoder_input_ids),
        (whole.labels, batch.labels),
    ):
        assert before.shape == after.shape
        assert torch.equal(before[[0, 2]], after[[0, 2]])


def test_the_other_labels_of_a_row_do_not_matter(dataset: TrainingDataset) -> None:
    batch = dataset[0].to(torch.device("cpu"))
    assert torch.equal(batch.labels, dataset[0].labels)
    assert (batch.seconds, batch.label_tokens) == (3.75, 17)


# Views in batches.


SPEED_AND_NOISE = {"waveform": {"speed": [0.8, 1.25], "noise_db": [5.0, 20.0]}}


def epochs_of(dataset: TrainingDataset, uses: int, **options: Any) -> list[TrainingBatch]:
    """The same three clips, once in each of some epochs."""
    examples = list(dataset.visit_tokens.examples)
    visits = [visits_of(0, 1, 2, use=use) for use in range(uses)]
    other = dataset_of(examples, visits, **options)
    return [other[number] for number in range(len(other))]


def kinds(batches: list[TrainingBatch], row: int) -> list[int]:
    """Number what is heard of a clip in each epoch, the same sound by the same number."""
    seen: list[torch.Tensor] = []
    numbers = []
    for batch in batches:
        heard = batch.input_features[row]
        known = [n for n, other in enumerate(seen) if torch.equal(heard, other)]
        numbers.append(known[0] if known else len(seen))
        if not known:
            seen.append(heard)
    return numbers


def test_epochs_use_the_clip_and_its_views_in_turn(dataset: TrainingDataset) -> None:
    (clean,) = epochs_of(dataset, 1)
    batches = epochs_of(dataset, 6, augmentation={"views": 2, **SPEED_AND_NOISE})
    firsts = set()
    for row_number in range(3):
        assert kinds(batches, row_number) == [0, 1, 2, 0, 1, 2]
        as_they_are = [
            torch.equal(batch.input_features[row_number], clean.input_features[row_number])
            for batch in batches
        ]
        assert sum(as_they_are[:3]) == 1
        firsts.add(as_they_are.index(True))
    assert len(firsts) > 1
    for batch in batches:
        assert torch.equal(batch.labels, clean.labels)
        assert batch.seconds == clean.seconds


def test_without_a_number_of_views_every_use_is_another(dataset: TrainingDataset) -> None:
    batches = epochs_of(dataset, 5, augmentation={"views": None, **SPEED_AND_NOISE})
    assert all(kinds(batches, number) == [0, 1, 2, 3, 4] for number in range(3))


@pytest.mark.parametrize("views", [2, None])
def test_what_is_heard_depends_on_the_visit_alone(
    dataset: TrainingDataset, views: int | None
) -> None:
    spec = {"time_masks": 1, "frequency_masks": 1}
    options = {"augmentation": {"views": views, "spec_augment": spec, **SPEED_AND_NOISE}}
    whole = epochs_of(dataset, 4, **options)
    visits = [visits_of(example, use=use) for use in range(4) for example in range(3)]
    alone = dataset_of(list(dataset.visit_tokens.examples), visits, **options)
    loaded = list(load_ahead(alone, 2))
    for number, batch in enumerate(loaded):
        use, example = divmod(number, 3)
        torch.testing.assert_close(batch.input_features[0], whole[use].input_features[example])


def test_timestamps_follow_the_view(select: Select) -> None:
    (example,) = select(timed_row((0.2, 0.8, "Hi")), **ALWAYS).examples
    tokens = visit_tokens_of([example], **ALWAYS).of(
        Visit(0, 0, 0), View(speed=1.25, shift_seconds=0.3)
    )
    # 0.2 / 1.25 + 0.3 is 0.46, 0.8 / 1.25 + 0.3 is 0.94.
    assert list(tokens.tokens[3:]) == [TIME + 23, *HI, TIME + 47, END]


def test_only_views_that_come_again_are_kept(dataset: TrainingDataset, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m", languages=["zh", "en"], window_seconds=WINDOW)
    teacher = read_model_folder(folder, None, "teacher")
    store = TensorStore(tmp_path / "cache", 10**9)
    cache = EncoderStateCache(store, torch.float32, teacher, dataset.extractor)
    encoder = WhisperForConditionalGeneration.from_pretrained(folder).eval().model.encoder
    for views, again in ((1, 0), (None, 3)):
        options = {"augmentation": {"views": views, **SPEED_AND_NOISE}, "cache": cache}
        first, second = epochs_of(dataset, 2, **options)
        for batch in (first, second):
            assert batch.cached_encoder_states is not None
            assert set(batch.cached_encoder_states.missing) == {0, 1, 2}
            assert all(
                (name is None) == (views is None)
                for name in batch.cached_encoder_states.missing.values()
            )
            cache.complete(batch.cached_encoder_states, batch.input_features, encoder)
        for batch, uncached in zip(
            epochs_of(dataset, 2, **options),
            epochs_of(dataset, 2, augmentation=options["augmentation"]),
            strict=True,
        ):
            assert batch.cached_encoder_states is not None
            assert len(batch.cached_encoder_states.missing) == again
            assert batch.seconds == pytest.approx(uncached.seconds)
            states = cache.complete(batch.cached_encoder_states, batch.input_features, encoder)
            expected = encoder(uncached.input_features).last_hidden_state
            torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def test_a_broken_file_is_silence_in_every_view(dataset: TrainingDataset, tmp_path: Path) -> None:
    options = {"augmentation": {"views": None, **SPEED_AND_NOISE}}
    (whole,) = epochs_of(dataset, 1, **options)
    (tmp_path / "0.wav").write_bytes(b"no longer audio")
    (batch,) = epochs_of(dataset, 1, **options)
    assert (batch.labels[0] == -100).all()
    assert torch.equal(batch.input_features[1:], whole.input_features[1:])
    assert batch.input_features[0].unique().numel() == 1
