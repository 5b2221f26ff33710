"""Which rows are trained on, and the reason for each that is not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny import make_tokenizer, write_rows, write_tone
from training_data import (
    ALWAYS,
    EN,
    END,
    HI,
    NEVER,
    NI_HAO,
    NO_TIMESTAMPS,
    START,
    TIME,
    TRANSCRIBE,
    WINDOW,
    ZH,
    Select,
    decoder_tokens,
    make_select,
    make_special_tokens,
    make_visit_tokens,
    row,
    timed_row,
    visits_to,
)

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.manifest import read_manifest
from simpler_distil_whisper.training import selection as training_selection
from simpler_distil_whisper.training.augment import View
from simpler_distil_whisper.training.filters import ExampleFilter
from simpler_distil_whisper.training.options import TrainingData
from simpler_distil_whisper.training.plan import Visit
from simpler_distil_whisper.training.selection import select_examples
from simpler_distil_whisper.training.tokens import LabelTokenizer, decoder_sequences


@pytest.fixture
def select(tmp_path: Path) -> Select:
    return make_select(tmp_path)


def test_headers_are_read_only_where_no_row_gives_the_length(
    select: Select, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def seconds_of(path: Path, *part: object) -> float:
        opened.append(path)
        return 1.0

    monkeypatch.setattr(training_selection, "audio_seconds", seconds_of)
    rows = [row(duration_seconds=0.5), row(audio_seconds=0.75), row(), row(audio_seconds="1 s")]
    seconds = [example.seconds for example in select(*rows).examples]
    assert seconds == [0.5, 0.75, 1.0, 1.0]
    assert len(opened) == 2
    # A file that is another one by now is not dropped for the length of the old one.
    rows = [row(audio_seconds=40.0), row(audio_seconds=0.01)]
    assert [example.seconds for example in select(*rows).examples] == [1.0, 1.0]


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|0.50|>"])
def test_a_transcript_cannot_hold_a_special_token(select: Select, token: str) -> None:
    selection = select(row(text=f"你好{token}"), row(text="<|> <|hello|>", language="en"))
    assert [example.utterance.text for example in selection.examples] == ["<|> <|hello|>"]
    (rejection,) = selection.rejections
    assert token in rejection.reason
    assert selection.report["special token in label"]["rows"] == 1


@pytest.mark.parametrize(
    ("fields", "data", "kind", "reason"),
    [
        ({"text": ""}, {}, "no label", '"text" is empty'),
        ({"text": " \n"}, {}, "no label", '"text" is empty'),
        ({"text": None}, {}, "no label", '"text" is empty'),
        (
            {"language": None},
            {},
            "no language",
            "neither the row nor the config names the language",
        ),
        ({}, {"max_error_rate": 0.1}, "no error rate", '"cer/wer" is empty'),
        ({"cer/wer": "0.1"}, {"max_error_rate": 0.1}, "no error rate", "is not a number: '0.1'"),
        ({"cer/wer": True}, {"max_error_rate": 1}, "no error rate", "is not a number: True"),
        (
            {"cer/wer": None, "reference_tokens": 0},
            {"max_error_rate": 0.1},
            "text where the reference has none",
            "the reference has no speech",
        ),
        ({"cer/wer": 0.1001}, {"max_error_rate": 0.1}, "error rate above maximum", "0.1001, above"),
        ({}, {"min_duration_seconds": 1.001}, "too short", "1.000 s, the minimum is 1.001 s"),
        ({}, {"max_duration_seconds": 0.999}, "too long", "1.000 s, the maximum is 0.999 s"),
        ({}, {"max_label_tokens": 5}, "label too long", "label of 6 tokens, the maximum is 5"),
        ({"text": "\ufeff \u200b\x00"}, {}, "no label", '"text" is empty'),
        ({"text": "\u200d\ufe0f\u3164\u2062"}, {}, "no label", '"text" is empty'),
        ({"text": "你\ufffd好"}, {}, "broken character in label", "the label holds U+FFFD"),
        ({"compression_ratio": 2.41}, {}, "a loop", '"compression_ratio" is 2.41, above 2.4'),
        ({"average_log_probability": -1.01}, {}, "improbable label", "is -1.01, below -1"),
        ({"no_speech_probability": 0.93}, {}, "no speech", "is 0.93, above 0.6"),
        ({"compression_ratio": "3"}, {}, "unusable evidence", "is not a number: '3'"),
        ({"complete": False}, {}, "incomplete label", "the label was cut off"),
        ({"audio": "text.wav"}, {}, "unreadable audio", "text.wav: is no audio"),
        ({"start_seconds": 1.5}, {}, "unreadable audio", "the part starts at 1.5 s"),
        ({"audio": "nowhere.wav"}, {}, "unusable row", "no such file"),
    ],
)
def test_each_filter_gives_the_reason_for_what_it_drops(
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
        ({"compression_ratio": 2.4, "average_log_probability": -1, "complete": True}, {}),
        ({"no_speech_probability": None, "compression_ratio": None}, {}),
        ({"compression_ratio": 13}, {"max_compression_ratio": None}),
        ({"average_log_probability": -3}, {"min_average_log_probability": None}),
        ({"no_speech_probability": 1}, {"max_no_speech_probability": None}),
        ({"audio": "window.wav"}, {}),
    ],
)
def test_each_limit_still_belongs_to_what_is_kept(
    select: Select, tmp_path: Path, fields: dict, data: dict
) -> None:
    write_tone(tmp_path / "window.wav", float(WINDOW))
    assert len(select(row(**fields), **data).examples) == 1


def test_the_evidence_is_of_pseudo_labels_alone(select: Select) -> None:
    doubtful = {"compression_ratio": 9.0, "complete": False, "origin_text": "你好", "text": "你"}
    references = select(row(**doubtful), columns={"text": "origin_text"})
    assert [list(example.tokens[-2:]) for example in references.examples] == [[NI_HAO[-1], END]]


def test_a_label_that_was_cut_off_is_learnt_without_an_end_token(select: Select) -> None:
    cut = timed_row((0, 0.5, "H"), (0.5, None, "i\ufffd"), complete=False)
    examples = select(cut, incomplete_labels="without_end", **ALWAYS).examples
    _, labels = decoder_sequences(decoder_tokens(examples), END)
    assert labels[0, -len(HI) :].tolist() == HI
    timed = make_visit_tokens(examples, **ALWAYS).of(visits_to(0)[0], View())
    times = [TIME, HI[0], TIME + 25, TIME + 25, HI[1]]
    assert list(timed.tokens) == [START, EN, TRANSCRIBE, *times]


@pytest.mark.parametrize(
    ("text", "learnt"),
    [
        ("\ufeffHi", "Hi"),
        ("H\u00adi\x00", "Hi"),
        ("\u200eH\u200bi\u2060", "Hi"),
        ("H\r\n i\n", "H i"),
        ("\nHi", " Hi"),
        ("ن\u200cم", "ن\u200cم"),  # joiners change letters
    ],
)
def test_characters_that_are_no_speech_are_not_learnt(
    select: Select, text: str, learnt: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        cleaned, plain = select(row(text=text), row(text=learnt)).examples
    assert cleaned.tokens == plain.tokens
    assert len(caplog.messages) == (text != learnt)


@pytest.mark.parametrize("hidden", ["\u200b", "\u200d", "\ufe0f", "\u2062"])
def test_a_hidden_character_does_not_hide_a_special_token(select: Select, hidden: str) -> None:
    (rejection,) = select(row(text=f"a<|end{hidden}oftext|>")).rejections
    assert rejection.reason == "the label holds <|endoftext|>, which is no speech"


@pytest.mark.parametrize("token", ["<|de|>", "<|30.00|>", "<|nocaptions|>"])
def test_special_tokens_that_the_model_lacks_are_no_speech_either(
    select: Select, token: str
) -> None:
    selection = select(row(text=f"你好{token}"))
    assert selection.report["special token in label"]["rows"] == 1


def test_a_label_that_was_cut_off_and_cleaned_is_counted(
    select: Select, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        select(row(text="\ufeffH\ufffd", complete=False), incomplete_labels="without_end")
        select(row(text="H\ufffd", complete=False), incomplete_labels="without_end")
    assert sum("no speech" in message for message in caplog.messages) == 1


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
        inputs, _ = decoder_sequences(decoder_tokens(selection.examples), END)
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


def test_auto_drops_what_the_labels_themselves_suggest(
    select: Select, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of two seconds, usually with one error in seven; one has no reference."""
    rates = [0.14] * 40 + [0.28, 0.29, 0.9, None]
    rows = [row(reference_tokens=7, audio_seconds=2.0, **{"cer/wer": rate}) for rate in rates]
    with caplog.at_level("INFO"):
        selection = select(*rows, max_error_rate="auto")
    assert selection.max_error_rate == 0.28
    kept = [example.utterance.row["cer/wer"] for example in selection.examples]
    assert kept == [0.14] * 40 + [0.28, None]
    assert [rejection.reason for rejection in selection.rejections] == [
        '"cer/wer" is 0.29, above 0.28',
        '"cer/wer" is 0.9, above 0.28',
    ]
    assert 'data.max_error_rate "auto": 0.28. ' in caplog.text
    assert "usually has an error rate of 0.14" in caplog.text


def test_auto_drops_no_row_where_none_has_a_reference(
    select: Select, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        selection = select(row(), row(**{"cer/wer": None}), max_error_rate="auto")
    assert (selection.max_error_rate, len(selection.examples)) == (None, 2)
    assert 'no row has an error rate under "cer/wer"' in caplog.text
    assert 'What is under "text" is learnt' in caplog.text


def test_auto_drops_labels_of_which_none_belongs_to_its_reference(
    select: Select, caplog: pytest.LogCaptureFixture
) -> None:
    rates = [0.9] * 20 + [None]
    rows = [row(reference_tokens=7, audio_seconds=2.0, **{"cer/wer": rate}) for rate in rates]
    with caplog.at_level("INFO"):
        selection = select(*rows, max_error_rate="auto")
    assert (selection.max_error_rate, len(selection.examples)) == (0.5, 1)
    assert "do not belong together" in caplog.text


def test_auto_drops_text_where_every_reference_is_empty(select: Select) -> None:
    silence = row(reference_tokens=0, **{"cer/wer": None})
    selection = select(silence, row(), max_error_rate="auto")
    assert (selection.max_error_rate, len(selection.examples)) == (None, 1)


def test_seconds_are_those_of_the_part(select: Select) -> None:
    (example,) = select(row(start_seconds=0.25, duration_seconds=0.5)).examples
    assert example.seconds == 0.5


def test_references_can_be_learnt_instead_of_pseudo_labels(select: Select) -> None:
    rows = [row(text="xyz", origin_text="你好"), row(text="xyz", origin_text=None)]
    selection = select(*rows, columns={"text": "origin_text"})
    (example,) = selection.examples
    assert list(example.tokens[4:]) == [*NI_HAO, END]
    assert selection.rejections[0].reason == '"origin_text" is empty'


# Weights


def test_each_manifest_needs_a_weight() -> None:
    paths = [Path("a"), Path("b")]
    with pytest.raises(ValidationError, match="has 3 weights, but there are 2 train_manifests"):
        TrainingData(train_manifests=paths, train_weights=[1.0, 1.0, 2.0])
    with pytest.raises(ValidationError, match="greater than or equal to 0.001"):
        TrainingData(train_manifests=paths, train_weights=[1.0, 0.0])
    with pytest.raises(ValidationError, match="train_manifests names a file twice"):
        TrainingData(train_manifests=[paths[0], paths[0]])


def test_rows_carry_the_weight_of_their_manifest(tmp_path: Path) -> None:
    write_tone(tmp_path / "a.wav", 1.0)
    paths = [write_rows(tmp_path / f"{n}.jsonl", [row()] * n) for n in (1, 2)]
    section = TrainingData(train_manifests=paths, train_weights=[0.5, 2.0])
    tokens, tokenizer = make_special_tokens("zh", "en"), make_tokenizer(["zh", "en"], WINDOW)
    filters = ExampleFilter(section, LabelTokenizer(tokenizer, tokens, 448), float(WINDOW))
    selection = select_examples([read_manifest(path, section.columns) for path in paths], filters)
    assert [example.weight for example in selection.examples] == [0.5, 2.0, 2.0]
    assert selection.epoch_size == 4.5


# Timestamps and previous text


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
    # They do not matter where timestamps are not requested.
    assert len(select(broken, row(), **NEVER).examples) == 2


def test_sampled_texts_that_cannot_be_learnt_are_left_out(
    select: Select, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bad = ["a<|en|>", "a\ufffd", " ", "x" * 30]
    rows = [row(sampled_texts=[*bad, "Hi"]), row(sampled_texts=bad), row()]
    rows += [row(sampled_texts=5), row(sampled_texts=[None])]
    selection = select(*rows, positions=20, sampled_text_probability=0.5)
    prompt = [START, ZH, TRANSCRIBE, NO_TIMESTAMPS]
    sampled = [[*map(list, example.sampled)] for example in selection.examples]
    assert sampled == [[[*prompt, *HI, END]], [], [], [], []]
    assert "with sampled texts: 1" in caplog.text
    assert "without some of their sampled texts, which cannot be learnt: 4" in caplog.text
    assert all(not example.sampled for example in select(*rows).examples)


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
    visit_tokens = make_visit_tokens(examples, positions=20, **ALWAYS)
    sequences = [list(visit_tokens.of(visit, View()).tokens) for visit in visits_to(*range(6))]
    assert [NO_TIMESTAMPS in tokens for tokens in sequences] == [True, False, *[True] * 4]
    # A segment without text is left out.
    spaces_and_letters = [220, 39, TIME + 25, TIME + 40, 72, 220, TIME + 50, END]
    assert sequences[1] == [START, EN, TRANSCRIBE, TIME, *spaces_and_letters]
    assert caplog.messages == [
        "kept training rows, without timestamps, since their segments are not the label: 1",
        "kept training rows, with segments: 1",
        "kept training rows, without timestamps, since with them they are too long: 1",
        "kept training rows, without segments: 3",
    ]


def test_requesting_timestamps_and_having_none_is_warned_of(
    select: Select, caplog: pytest.LogCaptureFixture
) -> None:
    select(row(), **ALWAYS, previous_text_probability=0.5)
    # Whether messages below warnings are in it depends on the level that other tests have set.
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    timed, previous = [record.getMessage() for record in warnings]
    assert timed.startswith("data.timestamp_probability is 1, but no row can be learnt with")
    assert previous == "kept training rows, with previous text: 0"


@pytest.mark.parametrize(("letters", "timed"), [(14, True), (15, False)])
def test_timestamps_are_learnt_where_the_decoder_has_room_for_them(
    select: Select, letters: int, timed: bool
) -> None:
    (example,) = select(timed_row((0, 1, "x" * letters)), positions=19, **ALWAYS).examples
    tokens = make_visit_tokens([example], positions=19, **ALWAYS).of(Visit(0, 0, 0), View()).tokens
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
    tokens = replace(make_special_tokens("zh", "en"), **missing)
    section = TrainingData(train_manifests=[Path("p")], **data)
    tokenizer = make_tokenizer(["zh", "en"], WINDOW)
    with pytest.raises(ConfigError, match=f"^data.{next(iter(data))}: the model has no "):
        ExampleFilter(section, LabelTokenizer(tokenizer, tokens, 448), float(WINDOW))
    off = TrainingData(train_manifests=[Path("p")])
    ExampleFilter(off, LabelTokenizer(tokenizer, tokens, 448), float(WINDOW))
