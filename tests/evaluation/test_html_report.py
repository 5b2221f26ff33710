"""The report as text: everything escaped, whatever is missing, and no larger than it must be."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from simpler_distil_whisper.evaluation.examples import Listing, ShownHypothesis, ShownUtterance
from simpler_distil_whisper.evaluation.hallucination import SIGNS
from simpler_distil_whisper.evaluation.html_report import (
    difference_chart,
    embedded_json,
    points,
    rate_chart,
    report_page,
    verdict,
)
from simpler_distil_whisper.evaluation.summary import (
    CodeSwitchRates,
    ComparisonSummary,
    FrequentConfusions,
    GroupRates,
    HallucinationSummary,
    RateHistogram,
    Rates,
    RatesByUnit,
    SignCount,
    Summary,
    SystemSummary,
)

NASTY = "<script>document.title = 'owned'</script> & \"quotes\" ' \u2028 </script>"
Groups = dict[str, dict[str, GroupRates]]


def rates(rate: float | None, utterances: int = 10, width: float = 0.5) -> Rates:
    low, high = (None, None) if rate is None else (rate * (1 - width), rate * (1 + width))
    return Rates(rate, low, high, 9, 1, 0, 0, 10, utterances)


def group(rate: float | None, utterances: int = 10, width: float = 0.5) -> GroupRates:
    same = rates(rate, utterances, width)
    return GroupRates(**vars(same), character=same, word=same)


def system(rate: float | None = 0.1, groups: Groups | None = None) -> SystemSummary:
    has_rate = rate is not None
    return SystemSummary(
        corpus=rates(rate),
        character=rates(rate),
        word=rates(rate),
        raw=RatesByUnit(rates(rate), rates(rate), rates(rate)),
        groups=groups or {},
        code_switch=None,
        hallucination=HallucinationSummary(
            utterances=10,
            without_reference=0,
            insertion_rate=0.0 if has_rate else None,
            length_ratio=1.0 if has_rate else None,
            any=SignCount(0, 0.0),
            signs={sign: SignCount(0, 0.0) for sign in SIGNS},
            limits={},
            phrases={},
        ),
        confusions=FrequentConfusions([], [], []),
        histogram=RateHistogram([0, 0.5, 1.0], [3, 0], no_error=7, above=0, no_rate=0),
        units={"word": 10},
        rejected={},
    )


def comparison(
    difference: float | None, low: float | None, high: float | None, p_value: float
) -> ComparisonSummary:
    return ComparisonSummary("base", difference, low, high, p_value, 0.1, 0.2, 0.7)


def make_summary(
    systems: dict[str, SystemSummary], comparisons: dict[str, ComparisonSummary] | None = None
) -> Summary:
    return Summary("auto", 0.95, 1000, None, None, 0, 10, systems, comparisons or {})


HYPOTHESIS = ShownHypothesis(
    hypothesis="one won",
    rate=0.5,
    errors=1,
    tokens=2,
    unit="word",
    alignment=[["equal", "one", "one"], ["substitute", "two", "won"]],
    signs=[],
)


def utterance(name: str, count: int = 1, **keys: Any) -> ShownUtterance:
    shown = ShownUtterance(
        id=name,
        groups={"language": "en"},
        reference="one two",
        seconds=1.5,
        audio=None,
        systems=[HYPOTHESIS] * count,
    )
    return replace(shown, **keys)


def make_page(
    summary: Summary,
    utterances: Sequence[ShownUtterance] = (),
    worst: Mapping[str, list[int]] | None = None,
    different: Mapping[str, list[int]] | None = None,
) -> str:
    listing = Listing(list(utterances), dict(worst or {}), dict(different or {}))
    return report_page(summary, listing, dict.fromkeys(summary.systems))


def data_in(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def test_no_text_of_the_data_becomes_markup() -> None:
    hypothesis = replace(
        HYPOTHESIS,
        hypothesis=NASTY,
        signs=["speed"],
        alignment=[["substitute", NASTY, NASTY]],
    )
    shown = utterance(NASTY, systems=[hypothesis], reference=NASTY, groups={NASTY: NASTY})
    nasty = replace(
        system(0.1, {NASTY: {NASTY: group(0.1), "b": group(0.2)}}),
        confusions=FrequentConfusions([[NASTY, NASTY, 1]], [], []),
    )
    page = make_page(make_summary({NASTY: nasty}), [shown], worst={NASTY: [0]})
    assert page.count("<script") == page.count("</script>") == 2  # the data and the page's own
    assert "<script>document" not in page
    assert data_in(page)["utterances"][0]["reference"] == NASTY


def test_embedded_json_reads_back_and_ends_no_element() -> None:
    text = embedded_json([NASTY, "台灣 \U00020c96", None, 0.5])
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == [NASTY, "台灣 \U00020c96", None, 0.5]


@pytest.mark.parametrize(
    ("confidence", "shown"), [(0.95, "95"), (0.995, "99.5"), (0.9999, "99.99")]
)
def test_the_confidence_is_not_rounded(confidence: float, shown: str) -> None:
    systems = {"base": system(0.2), "other": system(0.1)}
    summary = make_summary(systems, {"other": comparison(-0.1, -0.2, -0.05, 0.001)})
    page = make_page(replace(summary, confidence=confidence))
    assert f"Intervals: {shown}\u202f%," in page
    assert f"({shown}\u202f% interval " in page


@pytest.mark.parametrize("rate", [None, 0.0, 0.1, 12.0])
def test_whatever_is_missing_the_page_is_made(rate: float | None) -> None:
    no_interval = replace(rates(rate), low=None, high=None)
    only = replace(
        system(rate),
        corpus=no_interval,
        code_switch=CodeSwitchRates(1, han=no_interval, latin=rates(None)),
        groups={"language": {"en": group(rate, utterances=1), "zh": group(rate)}},
    )
    hypothesis = replace(HYPOTHESIS, rate=None, signs=["repetition"])
    unknown = utterance("x", reference=None, seconds=None, systems=[hypothesis])
    page = make_page(make_summary({"only": only}), [unknown], worst={"only": [0]})
    assert "only" in page
    assert "1 utterance<" in page
    assert "– to –" not in page
    assert "None" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert make_page(make_summary({"only": only}))


def test_embedded_audio_stands_in_the_page_once() -> None:
    audio = "data:audio/mpeg;base64,AAAA"
    shown = [utterance("a", 2, audio=audio), utterance("b", 2, audio="../clips/b.wav#t=1,2")]
    systems = {"base": system(), "other": system()}
    summary = make_summary(systems, {"other": comparison(0.1, 0.0, 0.2, 0.5)})
    worst = {"base": [0], "other": [0]}
    page = make_page(summary, shown, worst, different={"other": [0, 1]})
    assert page.count(audio) == 1
    assert 'src="../clips/b.wav#t=1,2"' in page
    assert [row["audio"] for row in data_in(page)["utterances"]] == [None, "../clips/b.wav#t=1,2"]
    for badge in ("most errors: base, 1.", "most errors: other, 1.", "differs most: other, 2."):
        assert badge in page


def test_of_a_column_with_a_thousand_values_the_largest_are_drawn() -> None:
    speakers = {f"speaker {n:04d}": group(0.1, utterances=n) for n in range(1000)}
    page = make_page(make_summary({"a": system(0.1, {"speaker": speakers})}))
    assert "985 more are in" in page
    assert "speaker 0999" in page
    assert "speaker 0984" not in page


@pytest.mark.slow
def test_a_page_of_10_000_utterances_is_small_enough_to_send() -> None:
    shown = [utterance(f"utterance-{number}", 3) for number in range(10_000)]
    page = make_page(make_summary({name: system() for name in "abc"}), shown)
    assert len(page.encode()) < 10e6


def test_axes_spread_what_is_near_0_only_if_they_must() -> None:
    near = rate_chart([("all", {"a": rates(0.1), "b": rates(0.2)})])
    assert not near.stretched
    assert [mark.at for mark in near.lines[0].marks] == pytest.approx([100 / 3, 200 / 3], abs=0.01)
    far = rate_chart([("all", {"a": rates(0.01), "b": rates(1.0)})])
    assert far.stretched
    assert far.lines[0].marks[0].at == pytest.approx(100 * (0.01 / 1.5) ** 0.5, abs=0.01)
    # An interval that reaches far beyond all rates is cut off at the end of the axis.
    wide = replace(rates(0.1), high=9.0)
    cut = rate_chart([("all", {"a": wide})]).lines[0].marks[0]
    assert (cut.at, cut.high, cut.cut) == (50.0, 100.0, "cut-right")
    assert cut.value.endswith("to 900.00)")


def test_differences_lie_around_0() -> None:
    comparisons = {
        "better": comparison(-0.01, -0.02, 0.01, 0.3),
        "unknown": comparison(None, None, None, 1.0),
    }
    chart = difference_chart(comparisons, ["base", "better", "unknown"])
    assert [line.label for line in chart.lines] == ["better"]
    mark = chart.lines[0].marks[0]
    assert (mark.system, mark.low, mark.at, mark.high) == (1, 0.0, 25.0, 75.0)
    assert chart.ticks == [
        (0.0, "\u22122"),
        (25.0, "\u22121"),
        (50.0, "0"),
        (75.0, "+1"),
        (100.0, "+2"),
    ]


def test_a_small_difference_is_seen_beside_a_large_one() -> None:
    comparisons = {
        "close": comparison(0.01, 0.0025, 0.04, 0.01),
        "far": comparison(0.6, 0.4, 3.0, 0.01),
    }
    chart = difference_chart(comparisons, ["base", "close", "far"])
    assert chart.stretched
    close, far = (line.marks[0] for line in chart.lines)
    assert close.at == pytest.approx(50 + 50 * (0.01 / 1.2) ** 0.5, abs=0.01)
    assert (close.cut, far.cut, far.high) == ("", "cut-right", 100.0)
    assert chart.ticks[3] == (75.0, "+30")


@pytest.mark.parametrize(
    ("compared", "words"),
    [
        (comparison(0.0042, -0.001, 0.0095, 0.14), "chance alone can do that"),
        (comparison(-0.05, -0.08, -0.02, 1 / 1001), "chance alone hardly does that"),
        (comparison(-0.05, -0.08, -0.001, 0.04), "chance alone seldom does that"),
        (comparison(0.0, -0.01, 0.01, 1.0), "distilled makes as many errors as base"),
        (comparison(0.1, None, None, 0.5), "too few utterances to say whether by chance"),
        (comparison(None, None, None, 1.0), "no reference has a token"),
    ],
)
def test_a_verdict_promises_no_more_than_it_knows(compared: ComparisonSummary, words: str) -> None:
    assert words in verdict("distilled", compared, make_summary({}))


def test_a_verdict_in_full() -> None:
    better = comparison(-0.05, -0.08, -0.02, 1 / 1001)
    assert verdict("distilled", better, make_summary({})) == (
        "distilled makes 5.00 points fewer errors than base (95\u202f% interval \u22128.00 to "
        "\u22122.00, p ≤ 0.001): chance alone hardly does that."
    )
    assert points(0.000001) == points(-0.000001).replace("\u2212", "") == "0.00"
