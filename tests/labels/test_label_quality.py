"""What label_quality.json and its page say, checked against counts made by hand."""

import html.parser
import json
import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_rows, write_tone

from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.quality import (
    LabelColumns,
    signs_of,
    suggest_threshold,
    summarize_labels,
    summarize_rejected,
    write_label_quality,
)

COLUMNS = LabelColumns(
    id="id",
    audio="audio",
    start_seconds="start_seconds",
    duration_seconds="duration_seconds",
    language="language",
    label="text",
    reference="origin_text",
    error_rate="cer/wer",
)
SCORER = Scorer(Metric())


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
        **signs_of(label, tokens, seconds, reference, SCORER, language),
        **fields,
    }


def summarize(folder: Path, rows: list[dict[str, Any]], *group_by: str, worst: int = 3) -> Any:
    return summarize_labels(
        write_rows(folder / "pseudo_labels.jsonl", rows), COLUMNS, group_by, SCORER, worst
    )


def test_the_signs_of_a_row_by_hand() -> None:
    signs = signs_of("No, no, NO! Yes.", 9, 2.0, "No no yes", SCORER, "en")
    assert signs == {
        "error_unit": "word",
        "error_language": "en",
        "reference_tokens": 3,
        "audio_seconds": 2.0,
        "tokens_per_second": 4.5,
        "longest_repetition": 3,
    }
    chinese = signs_of("谢谢谢谢。我", 6, 3.0, None, SCORER, "zh")
    assert (chinese["longest_repetition"], chinese["reference_tokens"]) == (4, None)
    assert chinese["error_unit"] is None


def test_rows_hours_and_rates_by_hand(tmp_path: Path) -> None:
    rows = [
        labelled("a b c d", "a b c d", speaker="x"),  # 0 errors
        labelled("a b c d", "a b c e", speaker="x"),  # 1 of 4
        labelled("a b", "z z z z z z", speaker="y", seconds=72.0, tokens=144),  # 6 of 2
        labelled(None, "a b", speaker=None),
    ]
    quality = summarize(tmp_path, rows, "speaker")
    assert (quality["rows"], quality["rows_with_error_rate"], quality["hours"]) == (4, 3, 0.05)
    assert quality["error_rate"] == pytest.approx(7 / 10)
    kept = {step["max_error_rate"]: (step["rows"], step["hours"]) for step in quality["thresholds"]}
    assert len(kept) == 51
    assert (kept[0.0], kept[0.24], kept[0.25], kept[0.5]) == (
        *((1, 0.01), (1, 0.01)),
        *((2, 0.02), (2, 0.02)),
    )
    histogram = quality["histogram"]
    assert (histogram["no_error"]["rows"], histogram["above"]["rows"]) == (1, 1)
    assert histogram["rows"].index(1) == 4  # 0.20 to 0.25
    assert sum(histogram["rows"]) == 1
    by_speaker = {group["value"]: group for group in quality["groups"]["speaker"]}
    assert by_speaker["x"]["error_rate"] == pytest.approx(1 / 8)
    assert by_speaker["y"]["error_rate"] == 3.0
    assert by_speaker["null"]["error_rate"] is None
    assert {name: group["rows"] for name, group in by_speaker.items()} == {
        "x": 2,
        "y": 1,
        "null": 1,
    }
    assert [row["line"] for row in quality["worst_rows"]] == [3, 2]
    assert quality["worst_rows"][1]["alignment"] == [
        ["equal", "a b c", "a b c"],
        ["substitute", "d", "e"],
    ]


@pytest.mark.parametrize(
    ("sign", "bad", "good"),
    [
        ("compression_ratio", {"compression_ratio": 2.41}, {"compression_ratio": 2.4}),
        *(
            (f"{name}", {name: bad}, {name: good})
            for name, bad, good in [
                ("average_log_probability", -1.01, -1.0),
                ("no_speech_probability", 0.61, 0.6),
                ("no_speech_probability", 0.61, None),
                ("longest_repetition", 11, 10),
                ("tokens_per_second", 8.1, 8.0),
                ("tokens_per_second", 0.49, 0.5),
            ]
        ),
        ("incomplete", {"complete": False}, {"complete": True}),
        ("empty", {"text": " "}, {"text": "x"}),
    ],
)
def test_each_sign_without_references(
    tmp_path: Path, sign: str, bad: dict[str, Any], good: dict[str, Any]
) -> None:
    usual = [labelled(None, "hello there") for _ in range(6)]  # 2 tokens a second
    # Another language may be spoken faster: its rows say nothing about this one's.
    fast = [labelled(None, "hola", language="es", tokens=720) for _ in range(9)]
    quality = summarize(tmp_path, [*usual, usual[0] | bad, usual[0] | good, *fast])
    counts = {name: value["rows"] for name, value in quality["signs"].items() if name != "limits"}
    assert {name for name, rows in counts.items() if rows} == {sign, "any", "none"}
    assert (counts[sign], counts["any"], counts["none"]) == (1, 1, 16)
    assert quality["signs"]["none"]["hours"] == 0.16
    assert [row["line"] for row in quality["suspicious_rows"]] == [7]
    assert quality["suspicious_rows"][0]["signs"] == [sign]
    assert quality["suggestion"]["max_error_rate"] is None
    assert "signs" in quality["suggestion"]["reasoning"][0]
    assert quality["worst_rows"] == []


def suggest(rates: list[float], tokens: float = 20, hours: list[float] | None = None) -> Any:
    number = len(rates)
    return suggest_threshold(
        np.array(rates, float),
        np.array(hours or [1.0] * number),
        np.full(number, tokens, float),
    )


@pytest.mark.parametrize(
    ("rates", "tokens", "threshold"),
    [
        ([0.0] * 1000, 20, 0.1),  # nothing to tell apart
        ([0.0] * 1000, 8, 0.13),  # one slip is allowed, which in 8 tokens is 0.125
        ([0.0] * 1000, 2, 0.2),  # but no label that is half wrong
        ([0.0, 0.0], 20, 0.1),
        ([0.0, 0.9], 20, 0.1),
        ([0.04] * 700 + [0.12] * 200 + [0.9] * 100, 20, 0.12),
        ([0.02] * 700 + [0.35] * 300, 20, 0.1),  # two heaps: the good one
        ([0.02] * 100 + [0.3] * 900, 20, 0.3),  # two heaps: nearly all is in the other
        ([0.7] * 30 + [0.14] * 70, 20, 0.14),
    ],
)
def test_the_threshold_lies_where_hours_end_and_failures_begin(
    rates: list[float], tokens: float, threshold: float
) -> None:
    random.Random(0).shuffle(rates)
    assert suggest(rates, tokens)["max_error_rate"] == threshold


def test_hours_not_rows_decide() -> None:
    rates = [0.03] * 60 + [0.25] * 40
    assert suggest(rates)["max_error_rate"] == 0.1
    assert suggest(rates, hours=[0.1] * 60 + [1.0] * 40)["max_error_rate"] == 0.25


def test_the_reasoning_names_the_numbers() -> None:
    suggestion = suggest([0.04] * 300 + [0.6] * 100, 8)
    assert (suggestion["rows"], suggestion["share_of_hours"]) == (300, 0.75)
    words = " ".join(suggestion["reasoning"])
    assert "100 of 400 rows" in words
    assert "median error rate is 0.60" in words
    assert "8 tokens" in words
    assert "look at them one by one" not in words
    assert "look at them one by one" in " ".join(suggest([0.0, 0.1])["reasoning"])
    assert "keeps only 20%" in " ".join(suggest([0.0] * 40 + [0.9] * 160)["reasoning"])


@pytest.mark.parametrize("rates", [[], [math.nan] * 3, [0.6, 2.0]])
def test_no_threshold_is_made_up(rates: list[float]) -> None:
    suggestion = suggest(rates)
    assert suggestion["max_error_rate"] is None
    assert suggestion["reasoning"]


def test_rejected_rows_by_kind_of_reason(tmp_path: Path) -> None:
    write_tone(tmp_path / "long.wav", 3.6)
    write_tone(tmp_path / "longer.wav", 7.2)
    entries = [
        {"reason": f"{tmp_path}/{name}: too long: {seconds} s, the maximum is 1 s", "row": row}
        for name, seconds, row in [
            ("long.wav", "3.600", {"audio": "long.wav"}),
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
    found = summarize_rejected(write_rows(tmp_path / "r.jsonl", entries), COLUMNS, tmp_path)
    assert (found["rows"], found["hours"]) == (6, 0.003014)
    assert [(k["reason"], k["rows"], k["rows_of_unknown_length"]) for k in found["reasons"]] == [
        ("too long", 2, 0),
        ("no such file", 2, 2),
        ("not JSON", 1, 1),
        ("too short", 1, 0),
    ]


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


NOTHING_REJECTED = {"rows": 0, "hours": 0.0, "reasons": []}


def page_of(folder: Path, rows: list[dict[str, Any]]) -> Page:
    quality = summarize(folder, rows, "speaker")
    write_label_quality(folder, quality | {"rejected": NOTHING_REJECTED})
    assert json.loads((folder / "label_quality.json").read_text(encoding="utf-8"))["rows"] == len(
        rows
    )
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
        [labelled("", "said though nothing was said")],
        [labelled("a b", "c d")],
        [labelled("a", "a", no_speech_probability=None)],
    ],
    ids=["no rows", "no reference", "empty reference", "all wrong", "English-only model"],
)
def test_the_page_of_an_unusual_set_is_made_too(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    page = page_of(tmp_path, rows)
    assert "Which labels to keep" in page.words
    assert "nan" not in page.words.lower()


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    text = "word " * 200
    row = labelled(text, text)
    rows = [row | {"id": str(number)} for number in range(2000)]
    path = write_rows(tmp_path / "pseudo_labels.jsonl", rows)
    assert path.stat().st_size > 4e6
    del rows
    tracemalloc.start()
    summarize_labels(path, COLUMNS, [], SCORER, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6
