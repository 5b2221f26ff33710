"""What is known of the compared utterances: language, groups, length, audio.

Owns the facts that belong to an utterance and not to a system. They are read from the rows of the
first system, the baseline.
"""

import contextlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from simpler_distil_whisper.data.audio import AudioError, Clip, audio_seconds
from simpler_distil_whisper.data.jsonl import UNKNOWN, Row, category, seconds_in
from simpler_distil_whisper.data.manifest import clip_of
from simpler_distil_whisper.data.row_checks import find_audio
from simpler_distil_whisper.evaluation.hypotheses import (
    ExaminedSystem,
    HypothesisColumns,
    usable_rows,
)


class CategoryColumn:
    """The value of one column for each utterance; each distinct value is kept once."""

    def __init__(self) -> None:
        self._numbers: dict[str | None, int] = {}
        self._values: list[str | None] = []
        self._members = array("i")

    def append(self, value: str | None) -> None:
        """Add the value of the next utterance."""
        number = self._numbers.setdefault(value, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        self._members.append(number)

    def numbers(self) -> npt.NDArray[np.int64]:
        """Return int64 [U]: equal numbers for equal values; each None has a number of its own."""
        members = np.array(self._members, np.int64)
        missing = members == self._numbers.get(None, -1)
        members[missing] = len(self._values) + np.arange(missing.sum())
        return members

    def __getitem__(self, position: int) -> str | None:
        return self._values[self._members[position]]


@dataclass
class Facts:
    """What the baseline's rows tell of the utterances, in a few bytes for each.

    Attributes:
        positions: id -> number of the utterance, from 0.
        languages: the language of each utterance; None where the row has none.
        groups: column -> the group of each utterance; None where the row has none.
        blocks: the block of each utterance, by which it is resampled, None where the row has none;
            None without such a column.
        seconds: length of each utterance; NaN where it is not known.
    """

    positions: dict[str, int]
    languages: CategoryColumn
    groups: dict[str, CategoryColumn]
    blocks: CategoryColumn | None
    seconds: "array[float]"

    def block_count(self, has_reference: npt.NDArray[np.bool_]) -> int | None:
        """Return how many blocks are resampled; None without such a column.

        Args:
            has_reference: bool [U]: which utterances have errors to count.
        """
        return None if self.blocks is None else len(np.unique(self.blocks.numbers()[has_reference]))

    def block(self, position: int) -> str | None:
        """Return the block of an utterance; None if it is resampled by itself."""
        return None if self.blocks is None else self.blocks[position]

    def group_values(self, position: int) -> dict[str, str]:
        """Return the group of an utterance in each column."""
        return {column: values[position] or UNKNOWN for column, values in self.groups.items()}


def read_facts(
    baseline: ExaminedSystem,
    columns: HypothesisColumns,
    group_by: Sequence[str],
    block_column: str | None,
) -> Facts:
    """Return what the rows of the baseline tell of the compared utterances.

    Args:
        baseline: the first system.
        columns: which column holds what.
        group_by: the columns by which the utterances are grouped.
        block_column: the column by which they are resampled, if any.
    """
    facts = Facts(
        positions={},
        languages=CategoryColumn(),
        groups={column: CategoryColumn() for column in group_by},
        blocks=CategoryColumn() if block_column else None,
        seconds=array("d"),
    )
    for utterance_id, row in usable_rows(baseline):
        facts.positions[utterance_id] = len(facts.positions)
        language = row.get(columns.language) if columns.language else None
        facts.languages.append(language if isinstance(language, str) else None)
        for column, values in facts.groups.items():
            values.append(category(row.get(column)))
        if facts.blocks is not None and block_column:
            facts.blocks.append(category(row.get(block_column)))
        facts.seconds.append(_seconds(row, columns, baseline.path.parent))
    return facts


def find_clip(row: Row, columns: HypothesisColumns, folder: Path) -> Clip | None:
    """Return the audio of an utterance; None if the row names none or the file does not exist.

    Args:
        row: the row of a hypotheses file.
        columns: which column holds what.
        folder: where that file is; a relative path is tried from there, then from the working
            directory.
    """
    name = row.get(columns.audio) if columns.audio else None
    path = find_audio(name, str(folder)) if isinstance(name, str) else None
    return None if path is None else clip_of(row, path, columns)


def _seconds(row: Row, columns: HypothesisColumns, folder: Path) -> float:
    """Return the length of an utterance, if need be from the audio file's header; NaN: unknown."""
    duration = seconds_in(row, columns.duration_seconds)
    if duration is not None:
        return duration
    clip = find_clip(row, columns, folder) if columns.duration_seconds else None
    if clip:
        with contextlib.suppress(AudioError):
            return audio_seconds(*clip)
    return math.nan
