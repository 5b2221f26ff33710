"""The numbers of all labelled rows as arrays, and the signs of failed labels that they show.

Owns the limits beyond which a label looks like a failure. No sign needs a reference, and no text is
kept, so that a million rows fit into memory.
"""

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from simpler_distil_whisper.data.jsonl import UNKNOWN, category, own_rows
from simpler_distil_whisper.evaluation.hallucination import (
    MAX_NO_SPEECH_PROBABILITY,
    MAX_REPETITION,
)
from simpler_distil_whisper.labels.filters import (
    MAX_COMPRESSION_RATIO,
    MIN_AVERAGE_LOG_PROBABILITY,
    is_cut_off,
)
from simpler_distil_whisper.labels.rows import WHY_NO_REFERENCE, LabelColumns
from simpler_distil_whisper.text.normalization import is_blank

Numbers = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MAX_SPEED_FACTOR = 4.0  # to the median of the language, either way
SIGN_LIMITS = {
    "compression_ratio": MAX_COMPRESSION_RATIO,
    "average_log_probability": MIN_AVERAGE_LOG_PROBABILITY,
    "no_speech_probability": MAX_NO_SPEECH_PROBABILITY,
    "longest_repetition": MAX_REPETITION,
    "tokens_per_second": MAX_SPEED_FACTOR,
}

MAX_GROUPS = 10_000  # values of a column that are told apart; later ones are counted together
OTHER_VALUES = "(other values)"


@dataclass(frozen=True)
class LabelTable:
    """The numbers of all rows of a labelled manifest, about 100 bytes each.

    Attributes:
        path: the labelled manifest.
        offsets: where in the file each row begins, to read the few rows that are shown.
        numbers: name -> its value in each row; NaN where a row has none.
        empty: which labels have no text.
        incomplete: which labels were cut off by the limit of tokens.
        without_reference: which labels nothing can be compared with. Not those of rows whose part
            of the recording's reference was looked for and not found.
        groups: column -> which of `group_values` each row belongs to.
        group_values: column -> its values, as strings.
    """

    path: Path
    offsets: npt.NDArray[np.int64]
    numbers: dict[str, Numbers]
    empty: Flags
    incomplete: Flags
    without_reference: Flags
    groups: dict[str, npt.NDArray[np.int32]]
    group_values: dict[str, list[str]]

    @property
    def hours(self) -> Numbers:
        """The length of each row's audio."""
        return self.numbers["audio_seconds"] / 3600


def read_labels(path: Path, columns: LabelColumns, group_by: Iterable[str]) -> LabelTable:
    """Return the numbers in a labelled manifest, read row by row."""
    names = {
        "error_rate": columns.error_rate,
        "audio_seconds": "audio_seconds",
        "reference_tokens": "reference_tokens",
    }
    names |= {name: name for name in SIGN_LIMITS}
    offsets, empty, incomplete, without_reference = array("q"), array("b"), array("b"), array("b")
    numbers = {name: array("d") for name in names}
    groups: dict[str, array[int]] = {column: array("i") for column in group_by}
    values: dict[str, dict[str, int]] = {column: {} for column in groups}
    for offset, row in own_rows(path):
        offsets.append(offset)
        for name, column in names.items():
            value = row.get(column)
            numbers[name].append(math.nan if value is None else value)
        empty.append(is_blank(row[columns.label]))
        incomplete.append(is_cut_off(row))
        compared = row[columns.reference] is not None or row.get(WHY_NO_REFERENCE)
        without_reference.append(not compared)
        for column, known in values.items():
            groups[column].append(_group_number(known, row.get(column)))
    return LabelTable(
        path=path,
        offsets=np.array(offsets, np.int64),
        numbers={name: np.array(column, np.float64) for name, column in numbers.items()},
        empty=np.array(empty, np.bool_),
        incomplete=np.array(incomplete, np.bool_),
        without_reference=np.array(without_reference, np.bool_),
        groups={column: np.array(members, np.int32) for column, members in groups.items()},
        group_values={column: list(known) for column, known in values.items()},
    )


def failure_signs(table: LabelTable, language: str | None) -> dict[str, Flags]:
    """Return for each sign of a failed label which rows show it.

    Args:
        table: the numbers.
        language: the column by whose values speeds are compared; None: all rows are compared.
    """
    numbers = table.numbers
    speed, median = numbers["tokens_per_second"], _median_speed(table, language)
    return {
        "compression_ratio": numbers["compression_ratio"] > MAX_COMPRESSION_RATIO,
        "average_log_probability": numbers["average_log_probability"] < MIN_AVERAGE_LOG_PROBABILITY,
        "no_speech_probability": numbers["no_speech_probability"] > MAX_NO_SPEECH_PROBABILITY,
        "longest_repetition": numbers["longest_repetition"] > MAX_REPETITION,
        "tokens_per_second": (speed * MAX_SPEED_FACTOR < median)
        | (speed > MAX_SPEED_FACTOR * median),
        "empty": table.empty,
        "incomplete": table.incomplete,
    }


def _group_number(known: dict[str, int], value: object) -> int:
    name = category(value) or UNKNOWN
    if name not in known and len(known) >= MAX_GROUPS:
        name = OTHER_VALUES
    return known.setdefault(name, len(known))


def _median_speed(table: LabelTable, language: str | None) -> Numbers:
    """Return, for each row, the median tokens per second of the rows in its language."""
    speed = table.numbers["tokens_per_second"]
    groups = table.groups[language] if language else np.zeros(len(speed), np.int32)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    median = np.empty(len(speed))
    for members in np.split(order, starts):
        median[members] = np.median(speed[members]) if len(members) else 0.0
    return median
