"""The result of an evaluation: one summary as JSON and the same numbers as a table for people.

Owns the shape of `summary.json`. It knows nothing of files and of how errors are counted. Called by
`eval.py`.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from simpler_distil_whisper.metrics import ErrorCounts, total

Interval = Callable[[Counter[ErrorCounts]], tuple[float, float] | None]

HEADER = ["system", "group", "utterances", "CER", "WER", "rate", "low", "high", "S", "D", "I"]
TEXT_COLUMNS = 2


@dataclass
class Scores:
    """How many utterances have which error counts, in the chosen unit and in both usual ones.

    Equal counts are kept once with their number, so that a million utterances need little memory.
    """

    chosen: Counter[ErrorCounts] = field(default_factory=Counter)
    character: Counter[ErrorCounts] = field(default_factory=Counter)
    word: Counter[ErrorCounts] = field(default_factory=Counter)

    def add(self, unit: str, counts: dict[str, ErrorCounts]) -> None:
        """Add one utterance, its counts given by unit."""
        self.chosen[counts[unit]] += 1
        self.character[counts["character"]] += 1
        self.word[counts["word"]] += 1


@dataclass
class SystemScores:
    """The scores of one system: of normalised and raw text, and by group.

    Attributes:
        groups: column -> value of that column -> scores of its utterances, normalised.
        units: how many utterances were counted in which unit.
        rejected: how many rows were not scored, by reason.
    """

    rejected: Counter[str]
    normalized: Scores = field(default_factory=Scores)
    raw: Scores = field(default_factory=Scores)
    groups: dict[str, dict[str, Scores]] = field(default_factory=dict)
    units: Counter[str] = field(default_factory=Counter)


def summarize(system: SystemScores, interval: Interval) -> dict[str, Any]:
    """Return a system's part of `summary.json`."""
    return {
        **_three_rates(system.normalized, interval),
        "raw": _three_rates(system.raw, interval),
        "groups": {
            column: {value: _group(values[value], interval) for value in sorted(values)}
            for column, values in system.groups.items()
        },
        "units": dict(sorted(system.units.items())),
        "rejected": dict(sorted(system.rejected.items())),
    }


def text_table(systems: dict[str, dict[str, Any]]) -> str:
    """Return the summaries as an aligned table, with the rejected rows and the units below it."""
    rows = [HEADER]
    notes = []
    for name, summary in systems.items():
        rows += _system_rows(name, summary)
        units = " and ".join(f"{count} in {unit}s" for unit, count in summary["units"].items())
        notes.append(f"{name}: utterances counted: {units}.")
        notes += [f"{name}: {n} rows rejected: {why}." for why, n in summary["rejected"].items()]
    widths = [max(_width(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = [_aligned(row, widths) for row in rows]
    legend = (
        "CER, WER: errors per reference character, per reference word. rate: in each utterance's "
        "unit, with its interval.\nS, D, I: substitutions, deletions, insertions behind the rate."
    )
    return "\n".join([*lines, "", legend, *notes]) + "\n"


def _rates(tally: Counter[ErrorCounts], interval: Interval) -> dict[str, Any]:
    counts = total(tally)
    low, high = interval(tally) or (None, None)
    return {
        "rate": counts.rate,
        "low": low,
        "high": high,
        **counts.as_dict(),
        "reference_tokens": counts.reference_tokens,
        "utterances": tally.total(),
    }


def _three_rates(scores: Scores, interval: Interval) -> dict[str, Any]:
    return {
        "corpus": _rates(scores.chosen, interval),
        "character": _rates(scores.character, interval),
        "word": _rates(scores.word, interval),
    }


def _group(scores: Scores, interval: Interval) -> dict[str, Any]:
    rates = _three_rates(scores, interval)
    return {**rates.pop("corpus"), **rates}


def _system_rows(name: str, summary: dict[str, Any]) -> Iterator[list[str]]:
    yield _row(name, "all", summary["corpus"], summary)
    yield _row(name, "all, raw text", summary["raw"]["corpus"], summary["raw"])
    for column, values in summary["groups"].items():
        for value, group in values.items():
            yield _row(name, f"{column} {value}", group, group)


def _row(system: str, group: str, chosen: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    rates = [usual["character"]["rate"], usual["word"]["rate"]]
    rates += [chosen["rate"], chosen["low"], chosen["high"]]
    edits = [chosen["substitutions"], chosen["deletions"], chosen["insertions"]]
    return [
        " ".join(system.split()),
        " ".join(group.split()),
        str(chosen["utterances"]),
        *("-" if rate is None else f"{rate:.4f}" for rate in rates),
        *map(str, edits),
    ]


def _aligned(row: list[str], widths: list[int]) -> str:
    cells = []
    for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
        padding = " " * (width - _width(cell))
        cells.append(cell + padding if index < TEXT_COLUMNS else padding + cell)
    return "  ".join(cells)


def _width(cell: str) -> int:
    """Return how many columns of a terminal the cell takes; a Chinese character takes two."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in cell)
    combining = sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in cell)
    return len(cell) + wide - combining
