"""The result of an evaluation as a table and sentences for a terminal.

Owns the layout of `report.txt`. Its numbers are those of `summary.json`; it computes none.
"""

import unicodedata
from collections.abc import Iterator, Sequence

from simpler_distil_whisper.evaluation.summary import (
    ComparisonSummary,
    GroupRates,
    Rates,
    RatesByUnit,
    Summary,
    SystemSummary,
)
from simpler_distil_whisper.terminal import visible_in_line

HEADER = ["system", "group", "utterances", "CER", "WER", "rate", "low", "high", "S", "D", "I"]
TEXT_COLUMNS = 2
UNIT_NAMES = {
    "character": "characters",
    "word": "words",
    "mixed": "Han characters and words of other scripts",
}
FEW_BLOCKS = 10  # with fewer, intervals hold the truth less often than their confidence
MOST_TABLE_GROUPS = 20  # of a column; all are in summary.json


def text_table(summary: Summary, columns: Sequence[str]) -> str:
    """Return the summary as an aligned table, with notes below it.

    Args:
        summary: the results.
        columns: the columns whose groups are shown; others, such as lengths, are for the page.
    """
    rows = [HEADER]
    notes: list[str] = []
    for name, system in summary.systems.items():
        rows += _system_rows(name, system, columns)
        notes += _notes(name, system, columns)
    notes += [_comparison_note(name, other) for name, other in summary.comparisons.items()]
    notes += _block_notes(summary)
    widths = [max(_width(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = [_aligned(row, widths) for row in rows]
    legend = (
        "CER, WER: errors per reference character, per reference word. rate: in each utterance's "
        "unit, with its interval;\nof fewer than five utterances or blocks there is none. S, D, I: "
        "substitutions, deletions, insertions behind it."
    )
    return "\n".join([*lines, "", legend, *map(visible_in_line, notes)]) + "\n"


def _notes(name: str, system: SystemSummary, columns: Sequence[str]) -> Iterator[str]:
    units = " and ".join(f"{n} in {UNIT_NAMES[unit]}" for unit, n in system.units.items())
    if units:
        yield f"{name}: utterances counted: {units}."
    for column in columns:
        more = len(system.groups.get(column, {})) - MOST_TABLE_GROUPS
        if more > 0:
            yield f"{name}: {more} more values of {column} are in summary.json."
    invented = system.hallucination
    if invented.without_reference:
        yield f"{name}: {invented.without_reference} utterances have no reference."
    if invented.any.utterances:
        signs = ", ".join(
            f"{sign.replace('_', ' ')} {count.utterances}"
            for sign, count in invented.signs.items()
            if count.utterances
        )
        yield f"{name}: {invented.any.utterances} utterances look invented: {signs}."
    if switch := system.code_switch:
        yield (
            f"{name}: in {switch.utterances} utterances that switch scripts, CER of the Han "
            f"characters {_rate(switch.han.rate)}, WER of the Latin words "
            f"{_rate(switch.latin.rate)}."
        )
    for reason, rows in system.rejected.items():
        yield f"{name}: {rows} rows rejected: {reason}."


def _block_notes(summary: Summary) -> Iterator[str]:
    if not summary.blocks:
        return
    yield (
        f"Intervals are drawn over {summary.blocks} blocks of utterances with the same "
        f"{summary.bootstrap_block_column}."
    )
    if summary.blocks < FEW_BLOCKS:
        yield f"With fewer than {FEW_BLOCKS} blocks they are somewhat too narrow."


def _comparison_note(name: str, comparison: ComparisonSummary) -> str:
    if comparison.difference is None:
        return f"{name} and {comparison.baseline}: no reference has a token to compare."
    interval = ""
    if comparison.low is not None:
        interval = f" ({comparison.low:+.4f} to {comparison.high:+.4f})"
    return (
        f"{name} minus {comparison.baseline}: {comparison.difference:+.4f}{interval}, "
        f"p = {comparison.p_value:.2g}; better in {comparison.better:.1%} of the utterances, "
        f"worse in {comparison.worse:.1%}."
    )


def _system_rows(name: str, system: SystemSummary, columns: Sequence[str]) -> Iterator[list[str]]:
    yield _row(name, "all", system.corpus, system)
    yield _row(name, "all, raw text", system.raw.corpus, system.raw)
    for column in columns:
        groups = system.groups.get(column, {})
        largest = sorted(groups, key=lambda name: -groups[name].utterances)[:MOST_TABLE_GROUPS]
        for group, rates in groups.items():
            if group in largest:
                yield _row(name, f"{column} {group}", rates, rates)


def _row(system: str, group: str, chosen: Rates, by_unit: RatesByUnit | GroupRates) -> list[str]:
    return [
        visible_in_line(" ".join(system.split())),
        visible_in_line(" ".join(group.split())),
        str(chosen.utterances),
        _rate(by_unit.character.rate),
        _rate(by_unit.word.rate),
        _rate(chosen.rate),
        _rate(chosen.low),
        _rate(chosen.high),
        str(chosen.substitutions),
        str(chosen.deletions),
        str(chosen.insertions),
    ]


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.4f}"


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
