"""The page of an evaluation: what its numbers say, drawn, and the utterances to read and hear.

Owns what `report.html` shows and in which words; `templates/report.html` owns the markup. It counts
nothing. Called by `eval.py`.
"""

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from simpler_distil_whisper.evaluation.text_report import FEW_BLOCKS, UNIT_NAMES
from simpler_distil_whisper.pages import TEMPLATES, count, percent, render, stacks

MOST_VALUES = 15  # of a column in a chart
BEYOND = 2  # times the largest rate: as far as an axis goes
SMALL_P = 0.01
STRETCH = 8  # the largest rate to the smallest, beyond which small ones would all lie at 0
TICKS = (0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)

Place = Callable[[float], float]

SIGN_NAMES = {
    "repetition": "repeats itself",
    "length_ratio": "much too long",
    "insertions": "many insertions",
    "output_on_silence": "text on silence",
    "known_phrase": "known phrase",
    "speed": "faster than speech",
}


class Mark(NamedTuple):
    """One system's dot and interval, places in percent of the axis; an interval may be missing.

    What reaches beyond the axis is `cut` off there: "cut-left", "cut-right", both or "".
    """

    system: int
    value: str
    at: float
    low: float | None
    high: float | None
    cut: str


class Line(NamedTuple):
    """One line of a chart: what it is about, and the marks of the systems."""

    label: str
    note: str
    marks: list[Mark]


@dataclass(frozen=True)
class Chart:
    """Dots with their intervals, one line below the other.

    Attributes:
        lines: from top to bottom.
        ticks: place in percent and text of each tick of the axis.
        stretched: whether places go by square roots, which spreads what is near 0.
        hidden: how many lines are not drawn.
    """

    lines: list[Line]
    ticks: list[tuple[float, str]]
    stretched: bool = False
    hidden: int = 0


def report_page(
    summary: Mapping[str, Any],
    utterances: Sequence[Mapping[str, Any]],
    listed: Mapping[str, Any],
) -> str:
    """Return the page, which needs nothing outside itself but audio that is not embedded.

    Args:
        summary: summary.json.
        utterances: those that can be searched, as `listing.describe` returns them.
        listed: which of them are shown in full, by their index: `worst` and `different`, both
            system -> indices; and the names of the files beside the page.
    """
    systems = summary["systems"]
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return render(
        "report.html",
        summary=summary,
        names=list(systems),
        overall=rate_chart([("all utterances", {n: s["corpus"] for n, s in systems.items()})]),
        differences=difference_chart(summary["comparisons"], list(systems)),
        verdicts=[verdict(name, one, summary) for name, one in summary["comparisons"].items()],
        groups=dict(group_charts(systems)),
        cards=list(cards(utterances, listed, list(systems))),
        listed=listed,
        sign_names=SIGN_NAMES,
        unit_names=UNIT_NAMES,
        few_blocks=FEW_BLOCKS,
        data=embedded_json(search_data(utterances, list(systems))),
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


def rate_chart(lines: Sequence[tuple[str, Mapping[str, Any]]], hidden: int = 0) -> Chart:
    """Return the chart of error rates.

    Args:
        lines: each a label, and by system the rates of it; None where a system has none.
        hidden: how many more lines there are.
    """
    known = [one for _, by_system in lines for one in by_system.values() if one]
    ends = [one[key] for one in known for key in ("rate", "high") if one[key] is not None]
    rates = [one["rate"] for one in known if one["rate"]]
    # What reaches further is cut off there: one interval must not press all others together.
    top = max(min(max(ends, default=0), BEYOND * max(rates, default=1)), 0.01)
    stretched = bool(rates) and max(rates) > STRETCH * min(rates)

    def place(rate: float) -> float:
        share = rate / top
        return float(round(100 * (math.sqrt(share) if stretched else share), 2))

    drawn = []
    for label, by_system in lines:
        marks = [
            _mark(index, _with_interval(percent(one["rate"], 2), one), one["rate"], one, place)
            for index, one in enumerate(by_system.values())
            if one and one["rate"] is not None
        ]
        utterances = max((one["utterances"] for one in by_system.values() if one), default=0)
        drawn.append(Line(label, _utterances(utterances), marks))
    return Chart(drawn, _ticks(0.0, top, place), stretched, hidden)


def difference_chart(comparisons: Mapping[str, Any], names: Sequence[str]) -> Chart:
    """Return the chart of differences to the baseline, around 0."""
    known = {name: one for name, one in comparisons.items() if one["difference"] is not None}
    ends = [
        sorted(abs(one[key]) for key in ("difference", "low", "high") if one[key] is not None)
        for one in known.values()
    ]
    reach = max([*(min(one[-1], BEYOND * one[-2:][0]) for one in ends), 0.001])

    sizes = [abs(one["difference"]) for one in known.values() if one["difference"]]
    stretched = bool(sizes) and max(sizes) > STRETCH * min(sizes)

    def place(difference: float) -> float:
        share = abs(difference) / reach
        side = math.copysign(math.sqrt(share) if stretched else share, difference)
        return float(round(50 + 50 * side, 2))

    lines = []
    for name, one in known.items():
        value = points(one["difference"])
        if one["low"] is not None:
            value += f" ({points(one['low'])} to {points(one['high'])})"
        mark = _mark(names.index(name), value, one["difference"], one, place)
        shares = f"better in {percent(one['better'])}, worse in {percent(one['worse'])}"
        lines.append(Line(name, shares, [mark]))
    half = reach * (0.25 if stretched else 0.5)
    ticks = [(place(value), _in_short(value)) for value in (-reach, -half, 0.0, half, reach)]
    return Chart(lines, ticks, stretched)


def group_charts(systems: Mapping[str, Any]) -> Iterator[tuple[str, Chart]]:
    """Yield the chart of each column: its values with the most utterances, in their order."""
    columns = dict.fromkeys(column for one in systems.values() for column in one["groups"])
    for column in columns:
        groups = {name: one["groups"].get(column, {}) for name, one in systems.items()}
        values = dict.fromkeys(value for one in groups.values() for value in one)
        if len(values) < 2:
            continue

        sizes = Counter(
            {value: rates["utterances"] for one in groups.values() for value, rates in one.items()}
        )
        largest = {value for value, _ in sizes.most_common(MOST_VALUES)}
        lines = [
            (value, {name: one.get(value) for name, one in groups.items()})
            for value in values
            if value in largest
        ]
        yield column, rate_chart(lines, len(values) - len(lines))


def verdict(name: str, one: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Return what a comparison says, in a sentence that promises no more than it knows."""
    if one["difference"] is None:
        return f"{name} and {one['baseline']} cannot be compared: no reference has a token."
    size = points(abs(one["difference"])).lstrip("+")
    kind = "more" if one["difference"] > 0 else "fewer"
    seen = f"{name} makes {size} points {kind} errors than {one['baseline']}"
    if not one["difference"]:
        seen = f"{name} makes as many errors as {one['baseline']}"
    if one["low"] is None:
        return f"{seen}; too few utterances to say whether by chance."
    confidence = f"{summary['confidence']:.0%}".replace("%", "\u202f%")
    interval = f"{confidence} interval {points(one['low'])} to {points(one['high'])}"
    chance = one["low"] <= 0 <= one["high"]
    meaning = "chance alone can do that"
    if not chance:
        often = "hardly" if one["p_value"] <= SMALL_P else "seldom"
        meaning = f"chance alone {often} does that"
    least = 1 / (summary["bootstrap_samples"] + 1)
    p_value = f"p {'≤' if one['p_value'] <= least else '='} {one['p_value']:.2g}"
    return f"{seen} ({interval}, {p_value}): {meaning}."


def points(difference: float) -> str:
    """Return a difference of rates in percentage points, with its sign."""
    return f"{100 * difference:+.2f}".replace("-", "\u2212").replace("+0.00", "0.00")


def cards(
    utterances: Sequence[Mapping[str, Any]], listed: Mapping[str, Any], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield each utterance that is shown in full, once, with the lists that it stands in."""
    badges: dict[int, list[str]] = {}
    for kind, words in (("different", "differs most"), ("worst", "most errors")):
        for name, indices in listed[kind].items():
            for rank, index in enumerate(indices, 1):
                badges.setdefault(index, []).append(f"{words}: {name}, {rank}.")
    for index, found in badges.items():
        utterance = utterances[index]
        heard = [
            {**one, "name": name} for name, one in zip(names, utterance["systems"], strict=True)
        ]
        yield {**utterance, "index": index, "badges": found, "heard": heard}


def search_data(utterances: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return what the page's script searches; audio that is part of the page stays in its card."""
    rows = []
    for one in utterances:
        embedded = (one["audio"] or "").startswith("data:")
        rows.append({**one, "audio": None if embedded else one["audio"]})
    return {"systems": list(names), "signs": SIGN_NAMES, "utterances": rows}


def _mark(system: int, value: str, middle: float, one: Mapping[str, Any], place: Place) -> Mark:
    if one["low"] is None:
        return Mark(system, value, place(middle), None, None, "")
    low, high = place(one["low"]), place(one["high"])
    cut = " ".join(["cut-left"] * (low < 0) + ["cut-right"] * (high > 100))
    return Mark(system, value, place(middle), max(low, 0.0), min(high, 100.0), cut)


def _with_interval(rate: str, one: Mapping[str, Any]) -> str:
    if one["low"] is None:
        return rate
    return f"{rate} ({100 * one['low']:.2f} to {100 * one['high']:.2f})"


def _utterances(number: int) -> str:
    return f"{count(number)} utterance{'s' if number != 1 else ''}"


def _in_short(difference: float) -> str:
    """Return a difference in percentage points as it stands below an axis."""
    return f"{100 * difference:+.3g}".replace("-", "\u2212") if difference else "0"


def _ticks(low: float, high: float, place: Place) -> list[tuple[float, str]]:
    """Return ticks at round rates, none too near to the one before it."""
    ticks: list[tuple[float, str]] = []
    for rate in TICKS:
        if low <= rate <= high and (not ticks or place(rate) - ticks[-1][0] >= 12):
            ticks.append((place(rate), f"{100 * rate:g}\u202f%"))
    return ticks
