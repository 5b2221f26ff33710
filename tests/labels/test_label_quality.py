"""The content of label_quality.json and its page, checked against counts made by hand."""

import html.parser
import json
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny import write_rows, write_tone

from simpler_distil_whisper.data.manifest import read_manifest
from simpler_distil_whisper.data.results import rejection_line
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.filters import why_dropped_by_error_rate
from simpler_distil_whisper.labels.quality import QualityOptions, summarize_labels
from simpler_distil_whisper.labels.quality_page import assess_labels, write_label_quality
from simpler_distil_whisper.labels.quality_summary import LabelQuality
from simpler_distil_whisper.labels.rejected import Rejected, summarize_rejected
from simpler_distil_whisper.labels.rows import (
    LabelColumns,
    LabellingColumns,
    OutputColumns,
    measure_label,
)

COLUMNS = LabelColumns.from_config(
    LabellingColumns(speaker=None),
    OutputColumns(),
    with_segments=False,
    with_unconverted=False,
)
SCORER = Scorer(Metric())
NONE_REJECTED = Rejected(rows=0, hours=0.0, reasons=[])


def labelled(
    reference: str | None, label: str, *, seconds: float = 36.0, tokens: int = 72, **fields: object
) -> dict[str, Any]:
    """A row as run_pseudo_labelling.py writes it, good unless `fields` say otherwise."""
    language = str(fields.get("language", "en"))
    rate = None if reference is None else SCORER.count(reference, label, language).rate
    return {
        "audio": "a.wav",
        "text": label,
        "language": language,
        "origin_text": reference,
        "cer/wer": None if rate is None else round(rate, 6),
        "average_log_probability": -0.1,
        "no_speech_probability": 0.01,
        "compression_ratio": 1.0,
        "complete": True,
        **measure_label(label, tokens, seconds, reference, SCORER, language),
        **fields,
    }


def summarize(folder: Path, rows: list[dict[str, Any]], *group_by: str) -> LabelQuality:
    labels = write_rows(folder / "pseudo_labels.jsonl", rows)
    options = QualityOptions(group_by=list(group_by), worst_rows=3)
    return summarize_labels(labels, COLUMNS, options, SCORER, NONE_REJECTED)


def test_rows_hours_and_rates_by_hand(tmp_path: Path) -> None:
    rows = [
        labelled("a b c d", "a b c d", speaker="x"),  # 0 errors
        labelled("a b c d", "a b c e", speaker="x"),  # 1 of 4
        labelled("a b", "z z z z z z", speaker="y", seconds=72.0, tokens=144),  # 6 of 2
        labelled(None, "a b", speaker=None),
        labelled(None, "a b", speaker=" "),
    ]
    quality = asdict(summarize(tmp_path, rows, "speaker"))
    assert (quality["rows"], quality["rows_with_error_rate"], quality["hours"]) == (5, 3, 0.06)
    assert quality["error_rate"] == pytest.approx(7 / 10)
    kept = {step["max_error_rate"]: (step["rows"], step["hours"]) for step in quality["thresholds"]}
    assert len(kept) == 51
    assert (kept[0.0], kept[0.24], kept[0.25], kept[0.5]) == (
        (1, 0.01),
        (1, 0.01),
        (2, 0.02),
        (2, 0.02),
    )
    histogram = quality["histogram"]
    assert (histogram["no_error"]["rows"], histogram["above"]["rows"]) == (1, 1)
    assert histogram["rows"].index(1) == 4  # 0.20 to 0.25
    assert sum(histogram["rows"]) == 1
    by_speaker = {group["value"]: group for group in quality["groups"]["speaker"]}
    assert by_speaker["x"]["error_rate"] == pytest.approx(1 / 8)
    assert by_speaker["y"]["error_rate"] == 3.0
    assert by_speaker["unknown"]["error_rate"] is None
    assert {name: group["rows"] for name, group in by_speaker.items()} == {
        "x": 2,
        "y": 1,
        "unknown": 2,
    }
    assert [row["line"] for row in quality["worst_rows"]] == [3, 2]
    assert quality["worst_rows"][1]["alignment"] == [
        ["equal", "a b c", "a b c"],
        ["substitute", "d", "e"],
    ]


def test_what_auto_keeps_is_what_training_keeps(tmp_path: Path) -> None:
    """Rows without a reference are learnt from; not those whose part of it was not found."""
    rows = [
        labelled("a b c d", "a b c d"),
        labelled("a b c d", "z z z z"),
        labelled("", "a b"),
        labelled(None, "a b", speaker="y"),
        labelled(None, "a b", speaker="y", why_no_reference="its place is not known"),
    ]
    quality = summarize(tmp_path, rows, "speaker")
    assert (quality.suggestion.rows, quality.suggestion.hours) == (2, 0.02)
    by_speaker = {group.value: group.rows_kept for group in quality.groups["speaker"]}
    assert by_speaker == {"unknown": 1, "y": 1}
    threshold = quality.suggestion.max_error_rate
    dropped = [why_dropped_by_error_rate(row, "cer/wer", threshold, required=False) for row in rows]
    assert [reason is None for reason in dropped] == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("sign", "bad", "good"),
    [
        ("compression_ratio", {"compression_ratio": 2.41}, {"compression_ratio": 2.4}),
        (
            "average_log_probability",
            {"average_log_probability": -1.01},
            {"average_log_probability": -1.0},
        ),
        ("no_speech_probability", {"no_speech_probability": 0.61}, {"no_speech_probability": 0.6}),
        ("no_speech_probability", {"no_speech_probability": 0.61}, {"no_speech_probability": None}),
        ("longest_repetition", {"longest_repetition": 11}, {"longest_repetition": 10}),
        ("tokens_per_second", {"tokens_per_second": 8.1}, {"tokens_per_second": 8.0}),
        ("tokens_per_second", {"tokens_per_second": 0.49}, {"tokens_per_second": 0.5}),
        ("incomplete", {"complete": False}, {"complete": True}),
        ("empty", {"text": " "}, {"text": "x"}),
    ],
)
def test_each_sign_without_references(
    tmp_path: Path, sign: str, bad: dict[str, Any], good: dict[str, Any]
) -> None:
    usual = [labelled(None, "hello there") for _ in range(6)]  # 2 tokens a second
    # Another language may be spoken faster: its rows must not count for this one.
    fast = [labelled(None, "hola", language="es", tokens=720) for _ in range(9)]
    quality = asdict(summarize(tmp_path, [*usual, usual[0] | bad, usual[0] | good, *fast]))
    counts = {name: value["rows"] for name, value in quality["signs"].items() if name != "limits"}
    assert {name for name, rows in counts.items() if rows} == {sign, "any", "none"}
    assert (counts[sign], counts["any"], counts["none"]) == (1, 1, 16)
    assert quality["signs"]["none"]["hours"] == 0.16
    assert [row["line"] for row in quality["suspicious_rows"]] == [7]
    assert quality["suspicious_rows"][0]["signs"] == [sign]
    assert quality["suggestion"]["max_error_rate"] is None
    assert "signs" in quality["suggestion"]["reasoning"][0]
    assert quality["worst_rows"] == []


def test_rejected_rows_by_kind_of_reason(tmp_path: Path) -> None:
    write_tone(tmp_path / "löng.wav", 3.6)
    write_tone(tmp_path / "longer.wav", 7.2)
    entries = [
        {"reason": f"{tmp_path}/{name}: too long: {seconds} s, the maximum is 1 s", "row": row}
        for name, seconds, row in [
            ("löng.wav", "3.600", {"audio": "lo\u0308ng.wav"}),
            ("longer.wav", "7.200", {"audio": str(tmp_path / "longer.wav")}),
        ]
    ]
    entries += [
        {"reason": 'no such file: "x.wav", neither here nor there', "row": {"audio": "x.wav"}},
        {"reason": "not JSON: Expecting value", "row": "{"},
    ]
    # Of a recording the part that the row names, and a name that no file can have.
    part = {"audio": "longer.wav", "start_seconds": 0.0, "duration_seconds": 0.05}
    entries += [
        {"reason": "too short: 0.050 s, the minimum is 0.1 s", "row": part},
        {"reason": 'no such file: "x": File name too long', "row": {"audio": "x" * 5000}},
    ]
    rejected = summarize_rejected(write_rows(tmp_path / "r.jsonl", entries), COLUMNS, tmp_path)
    assert (rejected.rows, rejected.hours) == (6, 0.003014)
    assert [(kind.reason, kind.rows, kind.rows_of_unknown_length) for kind in rejected.reasons] == [
        ("too long", 2, 0),
        ("no such file", 2, 2),
        ("not JSON", 1, 1),
        ("too short", 1, 0),
    ]


def test_a_rejected_line_that_is_longer_written_than_read_is_counted(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b"\0" * 6 * 2**20 + b"\n")  # six times as long, escaped
    [rejection] = read_manifest(tmp_path / "m.jsonl", LabellingColumns()).rejections
    path = tmp_path / "rejected.jsonl"
    path.write_text(rejection_line(rejection) * 2, encoding="utf-8")
    [kind] = summarize_rejected(path, COLUMNS, tmp_path).reasons
    assert (kind.reason, kind.rows) == ("not JSON", 2)


class Page(html.parser.HTMLParser):
    """The elements and the words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words += data


def page_of(folder: Path, rows: list[dict[str, Any]]) -> Page:
    write_label_quality(folder, summarize(folder, rows, "speaker"))
    content = json.loads((folder / "label_quality.json").read_text(encoding="utf-8"))
    assert content["rows"] == len(rows)
    return Page((folder / "label_quality.html").read_text(encoding="utf-8"))


def test_what_a_row_holds_is_shown_and_never_run(tmp_path: Path) -> None:
    attack = "</span><script>alert(1)</script><img src=x onerror=alert(2)>"
    rows = [
        labelled(attack, f"{attack} & more", speaker=attack, id=attack, audio=attack),
        labelled("fine", "fine", speaker="b"),
    ]
    page = page_of(tmp_path, rows)
    assert page.words.count(attack) >= 4
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "object"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = page_of(tmp_path, [labelled("a b", "a c"), labelled("a", "a")])
    for _, attributes in page.elements:
        assert not {"src", "href", "xlink:href", "srcset"} & attributes.keys()
    text = (tmp_path / "label_quality.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert text.count("url(") == text.count("url(#hatch)")


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [labelled(None, "only a label")],
        [labelled("", "words on silence")],
        [labelled("a b", "c d")],
        [labelled("a", "a", no_speech_probability=None)],
    ],
    ids=["no rows", "no reference", "empty reference", "all wrong", "English-only model"],
)
def test_the_page_of_an_unusual_set_is_made_too(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    page = page_of(tmp_path, rows)
    assert "Which labels to keep" in page.words
    assert "nan" not in page.words.lower()


@pytest.mark.parametrize(("reference", "thresholds"), [("a b", 5), (None, 0)])
def test_thresholds_are_logged_where_there_are_references(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reference: str | None, thresholds: int
) -> None:
    labels = write_rows(tmp_path / "pseudo_labels.jsonl", [labelled(reference, "a b")])
    write_rows(tmp_path / "rejected.jsonl", [])
    with caplog.at_level("INFO"):
        assess_labels(labels, COLUMNS, QualityOptions(), SCORER, tmp_path)
    assert caplog.text.count(" of 1 rows") == thresholds
    assert 'data.max_error_rate "auto" takes ' in caplog.text


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    text = "word " * 200
    row = labelled(text, text)
    rows = [row | {"id": str(number)} for number in range(2000)]
    path = write_rows(tmp_path / "pseudo_labels.jsonl", rows)
    assert path.stat().st_size > 4e6
    del rows
    tracemalloc.start()
    summarize_labels(path, COLUMNS, QualityOptions(worst_rows=3), SCORER, NONE_REJECTED)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6
