"""The report as text: everything escaped, whatever is missing, and no larger than it must be."""

import json
import re
from typing import Any

import pytest

from simpler_distil_whisper.evaluation.html_report import (
    difference_chart,
    embedded_json,
    points,
    rate_chart,
    report_page,
    verdict,
)

Row = dict[str, Any]
NASTY = "<script>document.title = 'owned'</script> & \"quotes\" ' \u2028 </script>"


def rates(rate: float | None, utterances: int = 10, width: float = 0.5) -> Row:
    low, high = (None, None) if rate is None else (rate * (1 - width), rate * (1 + width))
    counts = {"hits": 9, "substitutions": 1, "deletions": 0, "insertions": 0}
    tokens = {"reference_tokens": 10, "utterances": utterances}
    return {"rate": rate, "low": low, "high": high, **counts, **tokens}


def system(rate: float | None = 0.1, groups: Row | None = None, **keys: Any) -> Row:
    sign = {"utterances": 0, "share": 0.0}
    names = ("repetition", "length_ratio", "insertions", "output_on_silence", "known_phrase")
    three = {"corpus": rates(rate), "character": rates(rate), "word": rates(rate)}
    return {
        **three,
        "raw": three,
        "groups": groups or {},
        "code_switch": None,
        "hallucination": {
            "utterances": 10,
            "without_reference": 0,
            "insertion_rate": None if rate is None else 0.0,
            "length_ratio": None if rate is None else 1.0,
            "any": sign,
            "signs": {name: sign for name in (*names, "speed")},
            "limits": {},
            "phrases": {},
        },
        "confusions": {"substitutions": [], "deletions": [], "insertions": []},
        "histogram": {
            "edges": [0, 0.5, 1.0],
            "utterances": [3, 0],
            "no_error": 7,
            "above": 0,
            "no_rate": 0,
        },
        "speed": None,
        "units": {"word": 10},
        "rejected": {},
        **keys,
    }


def comparison(difference: float | None, low: float | None, high: float | None, p: float) -> Row:
    shares = {"better": 0.1, "worse": 0.2, "equal": 0.7}
    ends = {"difference": difference, "low": low, "high": high, "p_value": p}
    return {"baseline": "base", **ends, **shares}


def summary_of(systems: Row, comparisons: Row | None = None) -> Row:
    return {
        "unit": "auto",
        "confidence": 0.95,
        "bootstrap_samples": 1000,
        "bootstrap_block_column": None,
        "blocks": None,
        "seed": 0,
        "utterances": 10,
        "systems": systems,
        "comparisons": comparisons or {},
    }


def utterance(name: str, systems: int = 1, **keys: Any) -> Row:
    heard = {
        "hypothesis": "one won",
        "rate": 0.5,
        "errors": 1,
        "tokens": 2,
        "unit": "word",
        "alignment": [["equal", "one", "one"], ["substitute", "two", "won"]],
        "signs": [],
    }
    facts = {"id": name, "groups": {"language": "en"}, "reference": "one two", "seconds": 1.5}
    return {**facts, "audio": None, "systems": [heard] * systems, **keys}


def listed(**keys: Any) -> Row:
    files = {"summary_file": "summary.json", "utterances_file": "utterances.jsonl"}
    return {"worst": {}, "different": {}, "utterances_in_all": 1, "shown": 1, **files, **keys}


def data_in(page: str) -> Row:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_no_text_of_the_data_becomes_markup() -> None:
    heard = {**utterance("x")["systems"][0], "hypothesis": NASTY, "signs": ["speed"]}
    heard["alignment"] = [["substitute", NASTY, NASTY]]
    rows = [{**utterance(NASTY), "systems": [heard], "reference": NASTY, "groups": {NASTY: NASTY}}]
    confusions = {"substitutions": [[NASTY, NASTY, 1]], "deletions": [], "insertions": []}
    one = system(0.1, {NASTY: {NASTY: rates(0.1), "b": rates(0.2)}}, confusions=confusions)
    page = report_page(summary_of({NASTY: one}), rows, listed(worst={NASTY: [0]}))
    assert page.count("<script") == page.count("</script>") == 2  # the data and the page's own
    assert "<script>document" not in page
    assert data_in(page)["utterances"][0]["reference"] == NASTY


def test_embedded_json_reads_back_and_ends_no_element() -> None:
    text = embedded_json([NASTY, "台灣 \U00020c96", None, 0.5])
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == [NASTY, "台灣 \U00020c96", None, 0.5]


@pytest.mark.parametrize("rate", [None, 0.0, 0.1, 12.0])
def test_whatever_is_missing_the_page_is_made(rate: float | None) -> None:
    one = system(rate)
    one["corpus"]["low"] = one["corpus"]["high"] = None
    one["code_switch"] = {"utterances": 1, "han": one["corpus"], "latin": rates(None)}
    one["groups"] = {"language": {"en": rates(rate, utterances=1), "zh": rates(rate)}}
    unknown = utterance("x", reference=None, seconds=None)
    unknown["systems"] = [{**unknown["systems"][0], "rate": None, "signs": ["repetition"]}]
    page = report_page(summary_of({"only": one}), [unknown], listed(worst={"only": [0]}))
    assert "only" in page
    assert "1 utterance<" in page
    assert "– to –" not in page
    assert "None" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert report_page(summary_of({"only": one}), [], listed())


def test_embedded_audio_stands_in_the_page_once() -> None:
    audio = "data:audio/mpeg;base64,AAAA"
    rows = [utterance("a", 2, audio=audio), utterance("b", 2, audio="../clips/b.wav#t=1,2")]
    both = {"worst": {"base": [0], "other": [0]}, "different": {"other": [0, 1]}}
    systems = {"base": system(), "other": system()}
    found = {"other": comparison(0.1, 0.0, 0.2, 0.5)}
    page = report_page(summary_of(systems, found), rows, listed(**both))
    assert page.count(audio) == 1
    assert 'src="../clips/b.wav#t=1,2"' in page
    assert [one["audio"] for one in data_in(page)["utterances"]] == [None, "../clips/b.wav#t=1,2"]
    for badge in ("most errors: base, 1.", "most errors: other, 1.", "differs most: other, 2."):
        assert badge in page


def test_of_a_column_with_a_thousand_values_the_largest_are_drawn() -> None:
    values = {f"speaker {n:04d}": rates(0.1, utterances=n) for n in range(1000)}
    page = report_page(summary_of({"a": system(0.1, {"speaker": values})}), [], listed())
    assert "985 more are in" in page
    assert "speaker 0999" in page
    assert "speaker 0984" not in page


def test_a_page_of_10_000_utterances_is_small_enough_to_send() -> None:
    rows = [utterance(f"utterance-{number}", 3) for number in range(10_000)]
    systems = {name: system() for name in "abc"}
    page = report_page(summary_of(systems), rows, listed(utterances_in_all=10_000))
    assert len(page.encode()) < 10e6


def test_axes_spread_what_is_near_0_only_if_they_must() -> None:
    near = rate_chart([("all", {"a": rates(0.1), "b": rates(0.2)})])
    assert not near.stretched
    assert [mark.at for mark in near.lines[0].marks] == pytest.approx([100 / 3, 200 / 3], abs=0.01)
    far = rate_chart([("all", {"a": rates(0.01), "b": rates(1.0)})])
    assert far.stretched
    assert far.lines[0].marks[0].at == pytest.approx(100 * (0.01 / 1.5) ** 0.5, abs=0.01)
    # An interval that reaches far beyond all rates is cut off at the end of the axis.
    wide = {**rates(0.1), "high": 9.0}
    cut = rate_chart([("all", {"a": wide})]).lines[0].marks[0]
    assert (cut.at, cut.high, cut.cut) == (50.0, 100.0, "cut-right")
    assert cut.value.endswith("to 900.00)")


def test_differences_lie_around_0() -> None:
    found = {
        "better": comparison(-0.01, -0.02, 0.01, 0.3),
        "unknown": comparison(None, None, None, 1.0),
    }
    chart = difference_chart(found, ["base", "better", "unknown"])
    assert [line.label for line in chart.lines] == ["better"]
    mark = chart.lines[0].marks[0]
    assert (mark.system, mark.low, mark.at, mark.high) == (1, 0.0, 25.0, 75.0)
    assert chart.ticks == [
        *((0.0, "\u22122"), (25.0, "\u22121"), (50.0, "0")),
        *((75.0, "+1"), (100.0, "+2")),
    ]


def test_a_small_difference_is_seen_beside_a_large_one() -> None:
    found = {"close": comparison(0.01, 0.0025, 0.04, 0.01), "far": comparison(0.6, 0.4, 3.0, 0.01)}
    chart = difference_chart(found, ["base", "close", "far"])
    assert chart.stretched
    close, far = (line.marks[0] for line in chart.lines)
    assert close.at == pytest.approx(50 + 50 * (0.01 / 1.2) ** 0.5, abs=0.01)
    assert (close.cut, far.cut, far.high) == ("", "cut-right", 100.0)
    assert chart.ticks[3] == (75.0, "+30")


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (comparison(0.0042, -0.001, 0.0095, 0.14), "chance alone can do that"),
        (comparison(-0.05, -0.08, -0.02, 1 / 1001), "chance alone hardly does that"),
        (comparison(-0.05, -0.08, -0.001, 0.04), "chance alone seldom does that"),
        (comparison(0.0, -0.01, 0.01, 1.0), "distilled makes as many errors as base"),
        (comparison(0.1, None, None, 0.5), "too few utterances to say whether by chance"),
        (comparison(None, None, None, 1.0), "no reference has a token"),
    ],
)
def test_a_verdict_promises_no_more_than_it_knows(one: Row, words: str) -> None:
    assert words in verdict("distilled", one, summary_of({}))


def test_a_verdict_in_full() -> None:
    one = comparison(-0.05, -0.08, -0.02, 1 / 1001)
    assert verdict("distilled", one, summary_of({})) == (
        "distilled makes 5.00 points fewer errors than base (95\u202f% interval \u22128.00 to "
        "\u22122.00, p ≤ 0.001): chance alone hardly does that."
    )
    assert points(0.000001) == points(-0.000001).replace("\u2212", "") == "0.00"
