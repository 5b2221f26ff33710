"""The page of an evaluation: its charts, its sentences, and the utterances to read and play.

Owns what `report.html` shows; `templates/report.html` owns the markup. Its numbers are those of
`summary.json`; it counts nothing.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from simpler_distil_whisper.evaluation.examples import Listing, ShownUtterance
from simpler_distil_whisper.evaluation.hypotheses import SystemSpeed
from simpler_distil_whisper.evaluation.summary import (
    ComparisonSummary,
    Rates,
    Summary,
    SystemSummary,
)
from simpler_distil_whisper.evaluation.text_report import FEW_BLOCKS, UNIT_NAMES
from simpler_distil_whisper.pages import TEMPLATES, count, percent, render, stacks

MOST_CHART_GROUPS = 15  # of a column
LONGEST_AXIS = 2  # times the largest rate; intervals that reach further are cut off
SMALL_P = 0.01
LARGEST_RATIO = 8  # of the largest to the smallest rate; beyond, the axis is stretched near 0
TICKS = (0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)

Place = Callable[[float], float]
"""Where on an axis a number lies, in percent of the axis."""

SIGN_NAMES = {
    "repetition": "repeats itself",
    "length_ratio": "much too long",
    "insertions": "many insertions",
    "output_on_silence": "text on silence",
    "known_phrase": "known phrase",
    "speed": "faster than speech",
}


class Mark(NamedTuple):
    """One system's dot and interval in a chart.

    Attributes:
        system: its number, from 0.
        value: rate and interval as text.
        at: place of the dot, in percent of the axis.
        low: place of the interval's lower end; None without an interval.
        high: place of its upper end.
        cut: which ends reach beyond the axis: "cut-left", "cut-right", both or "".
    """

    system: int
    value: str
    at: float
    low: float | None
    high: float | None
    cut: str


class Line(NamedTuple):
    """One line of a chart: its label, a note and the marks of the systems."""

    label: str
    note: str
    marks: list[Mark]


@dataclass(frozen=True)
class Chart:
    """Dots with their intervals, one line below the other.

    Attributes:
        lines: from top to bottom.
        ticks: place in percent and text of each tick of the axis.
        stretched: whether places go by square roots, which spreads numbers near 0.
        hidden: how many lines are not drawn.
    """

    lines: list[Line]
    ticks: list[tuple[float, str]]
    stretched: bool = False
    hidden: int = 0


@dataclass(frozen=True)
class Card:
    """An utterance that is shown in full, with the lists that it stands in."""

    index: int
    utterance: ShownUtterance
    badges: list[str]


def report_page(
    summary: Summary, listing: Listing, speeds: Mapping[str, SystemSpeed | None]
) -> str:
    """Return the page, which needs no other file but audio that is not embedded.

    Args:
        summary: the results.
        listing: the utterances that can be searched, and those that are shown in full.
        speeds: system -> its speed, if known. The speed is not in `summary.json`, which stays the
            same when inference is repeated on another machine.
    """
    names = list(summary.systems)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    corpus = {name: system.corpus for name, system in summary.systems.items()}
    return render(
        "report.html",
        summary=summary,
        names=names,
        confidence=percentage(summary.confidence),
        speeds=speeds,
        overall=rate_chart([("all utterances", corpus)]),
        differences=difference_chart(summary.comparisons, names),
        verdicts=[verdict(name, other, summary) for name, other in summary.comparisons.items()],
        groups=dict(group_charts(summary.systems)),
        cards=cards(listing),
        shown=len(listing.utterances),
        sign_names=SIGN_NAMES,
        unit_names=UNIT_NAMES,
        few_blocks=FEW_BLOCKS,
        data=embedded_json(search_data(listing.utterances, names)),
        script=script,
        script_source=f"'sha256-{digest}'",
        stacks=stacks,
    )


def embedded_json(value: object) -> str:
    """Return JSON that can stand in a script element: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def rate_chart(lines: Sequence[tuple[str, Mapping[str, Rates | None]]], hidden: int = 0) -> Chart:
    """Return the chart of error rates.

    Args:
        lines: label and, by system, rates of each line; None where a system has none.
        hidden: how many more lines there are.
    """
    known = [rates for _, by_system in lines for rates in by_system.values() if rates]
    ends = [end for rates in known for end in (rates.rate, rates.high) if end is not None]
    above_0 = [rates.rate for rates in known if rates.rate]
    # An axis as long as the longest interval would press all other marks together.
    top = max(min(max(ends, default=0), LONGEST_AXIS * max(above_0, default=1)), 0.01)
    stretched = _must_stretch(above_0)

    def place(rate: float) -> float:
        share = rate / top
        return float(round(100 * (math.sqrt(share) if stretched else share), 2))

    drawn = []
    for label, by_system in lines:
        marks = [
            _mark(index, _rate_with_interval(rates), rates.rate, rates.low, rates.high, place)
            for index, rates in enumerate(by_system.values())
            if rates and rates.rate is not None
        ]
        utterances = max((rates.utterances for rates in by_system.values() if rates), default=0)
        plural = "" if utterances == 1 else "s"
        drawn.append(Line(label, f"{count(utterances)} utterance{plural}", marks))
    return Chart(drawn, _ticks(top, place), stretched, hidden)


def difference_chart(comparisons: Mapping[str, ComparisonSummary], names: Sequence[str]) -> Chart:
    """Return the chart of differences to the baseline, around 0."""
    reach = max([0.001, *map(_reach, comparisons.values())])
    stretched = _must_stretch([abs(c.difference) for c in comparisons.values() if c.difference])

    def place(difference: float) -> float:
        share = abs(difference) / reach
        side = math.copysign(math.sqrt(share) if stretched else share, difference)
        return float(round(50 + 50 * side, 2))

    lines = []
    for name, comparison in comparisons.items():
        if comparison.difference is None:
            continue
        low, high = comparison.low, comparison.high
        value = points(comparison.difference)
        if low is not None and high is not None:
            value += f" ({points(low)} to {points(high)})"
        mark = _mark(names.index(name), value, comparison.difference, low, high, place)
        shares = f"better in {percent(comparison.better)}, worse in {percent(comparison.worse)}"
        lines.append(Line(name, shares, [mark]))
    half = reach * (0.25 if stretched else 0.5)
    ticks = [(place(tick), _short_points(tick)) for tick in (-reach, -half, 0.0, half, reach)]
    return Chart(lines, ticks, stretched)


def group_charts(systems: Mapping[str, SystemSummary]) -> Iterator[tuple[str, Chart]]:
    """Yield the chart of each column: its groups with the most utterances, in their order."""
    columns = dict.fromkeys(column for system in systems.values() for column in system.groups)
    for column in columns:
        by_system = {name: system.groups.get(column, {}) for name, system in systems.items()}
        sizes = {
            group: rates.utterances
            for groups in by_system.values()
            for group, rates in groups.items()
        }
        if len(sizes) < 2:
            continue
        largest = sorted(sizes, key=lambda group: -sizes[group])[:MOST_CHART_GROUPS]
        lines = [
            (group, {name: groups.get(group) for name, groups in by_system.items()})
            for group in sizes
            if group in largest
        ]
        yield column, rate_chart(lines, len(sizes) - len(lines))


def verdict(name: str, comparison: ComparisonSummary, summary: Summary) -> str:
    """Return the meaning of a comparison in a sentence that promises no more than is known."""
    baseline, difference = comparison.baseline, comparison.difference
    if difference is None:
        return f"{name} and {baseline} cannot be compared: no reference has a token."
    if difference == 0:
        result = f"{name} makes as many errors as {baseline}"
    else:
        size = points(abs(difference)).lstrip("+")
        kind = "more" if difference > 0 else "fewer"
        result = f"{name} makes {size} points {kind} errors than {baseline}"
    low, high = comparison.low, comparison.high
    if low is None or high is None:
        return f"{result}; too few utterances to say whether by chance."
    if low <= 0 <= high:
        meaning = "chance alone can do that"
    elif comparison.p_value <= SMALL_P:
        meaning = "chance alone hardly does that"
    else:
        meaning = "chance alone seldom does that"
    interval = f"{percentage(summary.confidence)} interval {points(low)} to {points(high)}"
    smallest_p = 1 / (summary.bootstrap_samples + 1)
    relation = "≤" if comparison.p_value <= smallest_p else "="
    return f"{result} ({interval}, p {relation} {comparison.p_value:.2g}): {meaning}."


def percentage(confidence: float) -> str:
    """Return 0.995 as "99.5 %", in as many digits as it has."""
    return f"{100 * confidence:g}\u202f%"


def points(difference: float) -> str:
    """Return a difference of rates in percentage points, with its sign."""
    return f"{100 * difference:+.2f}".replace("-", "\u2212").replace("+0.00", "0.00")


def cards(listing: Listing) -> list[Card]:
    """Return the utterances that are shown in full, each once, with the lists it stands in."""
    badges: dict[int, list[str]] = {}
    for words, lists in (
        ("differs most", listing.different),
        ("most errors", listing.worst),
    ):
        for name, indices in lists.items():
            for rank, index in enumerate(indices, 1):
                badges.setdefault(index, []).append(f"{words}: {name}, {rank}.")
    return [Card(index, listing.utterances[index], badges[index]) for index in badges]


def search_data(utterances: Sequence[ShownUtterance], names: Sequence[str]) -> dict[str, object]:
    """Return the data that the page's script searches; embedded audio stays in its card alone."""
    rows = []
    for utterance in utterances:
        embedded = (utterance.audio or "").startswith("data:")
        rows.append(asdict(replace(utterance, audio=None) if embedded else utterance))
    return {"systems": list(names), "signs": SIGN_NAMES, "utterances": rows}


def _reach(comparison: ComparisonSummary) -> float:
    """Return how far from 0 an axis must go for a comparison; a longer interval is cut off."""
    numbers = (comparison.difference, comparison.low, comparison.high)
    ends = sorted(abs(number) for number in numbers if number is not None)
    return min(ends[-1], LONGEST_AXIS * ends[-2:][0]) if ends else 0.0


def _must_stretch(sizes: Sequence[float]) -> bool:
    return bool(sizes) and max(sizes) > LARGEST_RATIO * min(sizes)


def _mark(
    system: int, value: str, middle: float, low: float | None, high: float | None, place: Place
) -> Mark:
    if low is None or high is None:
        return Mark(system, value, place(middle), None, None, "")
    left, right = place(low), place(high)
    cut = []
    if left < 0:
        cut.append("cut-left")
    if right > 100:
        cut.append("cut-right")
    return Mark(system, value, place(middle), max(left, 0.0), min(right, 100.0), " ".join(cut))


def _rate_with_interval(rates: Rates) -> str:
    rate = percent(rates.rate, 2)
    if rates.low is None or rates.high is None:
        return rate
    return f"{rate} ({100 * rates.low:.2f} to {100 * rates.high:.2f})"


def _short_points(difference: float) -> str:
    """Return a difference in percentage points as it stands below an axis."""
    return f"{100 * difference:+.3g}".replace("-", "\u2212") if difference else "0"


def _ticks(top: float, place: Place) -> list[tuple[float, str]]:
    """Return ticks at round rates from 0 to `top`, each with some distance to the one before."""
    ticks: list[tuple[float, str]] = []
    for rate in TICKS:
        if rate <= top and (not ticks or place(rate) - ticks[-1][0] >= 12):
            ticks.append((place(rate), f"{100 * rate:g}\u202f%"))
    return ticks
