"""The result of an evaluation as a table for people, and in sentences.

Owns how `summary.json` reads in a terminal; its numbers are `tallies.py`'s. Called by `eval.py`.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

HEADER = ["system", "group", "utterances", "CER", "WER", "rate", "low", "high", "S", "D", "I"]
TEXT_COLUMNS = 2
UNIT_NAMES = {
    "character": "characters",
    "word": "words",
    "mixed": "Han characters and words of other scripts",
}
FEW_BLOCKS = 10  # with which intervals hold the truth less often than they say
MOST_VALUES = 20  # of a column in the table; all are in summary.json


def text_table(summary: dict[str, Any], columns: Sequence[str]) -> str:
    """Return the summary as an aligned table, with what else is worth knowing below it.

    Args:
        summary: summary.json.
        columns: the groups to show; others, such as lengths, are for the page.
    """
    rows = [HEADER]
    notes: list[str] = []
    for name, system in summary["systems"].items():
        rows += _system_rows(name, system, columns)
        notes += _notes(name, system, columns)
    notes += [_comparison_line(name, one) for name, one in summary["comparisons"].items()]
    notes += _block_notes(summary)
    widths = [max(_width(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = [_aligned(row, widths) for row in rows]
    legend = (
        "CER, WER: errors per reference character, per reference word. rate: in each utterance's "
        "unit, with its interval;\nof fewer than five utterances or blocks there is none. S, D, I: "
        "substitutions, deletions, insertions behind it."
    )
    return "\n".join([*lines, "", legend, *notes]) + "\n"


def _notes(name: str, system: dict[str, Any], columns: Sequence[str]) -> Iterator[str]:
    units = " and ".join(f"{n} in {UNIT_NAMES[unit]}" for unit, n in system["units"].items())
    if units:
        yield f"{name}: utterances counted: {units}."
    for column in columns:
        if (more := len(system["groups"].get(column, {})) - MOST_VALUES) > 0:
            yield f"{name}: {more} more values of {column} are in summary.json."
    invented = system["hallucination"]
    if invented["without_reference"]:
        yield f"{name}: {invented['without_reference']} utterances have no reference."
    if invented["any"]["utterances"]:
        signs = {sign: one["utterances"] for sign, one in invented["signs"].items()}
        shown = ", ".join(f"{sign.replace('_', ' ')} {n}" for sign, n in signs.items() if n)
        yield f"{name}: {invented['any']['utterances']} utterances look invented: {shown}."
    if switch := system["code_switch"]:
        rates = [_ratio(switch[script]["rate"]) for script in ("han", "latin")]
        yield (
            f"{name}: in {switch['utterances']} utterances that switch scripts, CER of the Han "
            f"characters {rates[0]}, WER of the Latin words {rates[1]}."
        )
    for why, count in system["rejected"].items():
        yield f"{name}: {count} rows rejected: {why}."


def _block_notes(summary: dict[str, Any]) -> Iterator[str]:
    if summary["blocks"] is None:
        return
    yield (
        f"Intervals are drawn over {summary['blocks']} blocks of utterances with the same "
        f"{summary['bootstrap_block_column']}."
    )
    if summary["blocks"] < FEW_BLOCKS:
        yield f"With fewer than {FEW_BLOCKS} blocks they are somewhat too narrow."


def _comparison_line(name: str, one: dict[str, Any]) -> str:
    if one["difference"] is None:
        return f"{name} and {one['baseline']}: no reference has a token to compare."
    interval = f" ({one['low']:+.4f} to {one['high']:+.4f})" if one["low"] is not None else ""
    return (
        f"{name} minus {one['baseline']}: {one['difference']:+.4f}{interval}, "
        f"p = {one['p_value']:.2g}; better in {one['better']:.1%} of the utterances, worse in "
        f"{one['worse']:.1%}."
    )


def _ratio(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.4f}"


def _system_rows(name: str, summary: dict[str, Any], columns: Sequence[str]) -> Iterator[list[str]]:
    yield _row(name, "all", summary["corpus"], summary)
    yield _row(name, "all, raw text", summary["raw"]["corpus"], summary["raw"])
    for column in columns:
        values = summary["groups"].get(column, {})
        largest = sorted(values, key=lambda value: -values[value]["utterances"])[:MOST_VALUES]
        for value, group in values.items():
            if value in largest:
                yield _row(name, f"{column} {value}", group, group)


def _row(system: str, group: str, chosen: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    rates = [usual["character"]["rate"], usual["word"]["rate"]]
    rates += [chosen["rate"], chosen["low"], chosen["high"]]
    edits = [chosen["substitutions"], chosen["deletions"], chosen["insertions"]]
    return [
        " ".join(system.split()),
        " ".join(group.split()),
        str(chosen["utterances"]),
        *map(_ratio, rates),
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
