"""What is known of the utterances that systems are compared on: language, groups, length, audio.

Owns the facts that belong to an utterance and not to a system; they are read from the rows of the
first system, the baseline. Called by `eval.py` and `listing.py`.
"""

import contextlib
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from simpler_distil_whisper.data.audio import AudioError, audio_seconds
from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.data.manifest import find_audio
from simpler_distil_whisper.evaluation.hypotheses import Examined, HypothesisColumns, usable_rows


class Clip(NamedTuple):
    """Where an utterance can be heard.

    Attributes:
        path: an audio file that exists.
        start_seconds: where in it the utterance begins.
        duration_seconds: how long it is; None to the end of the file.
    """

    path: Path
    start_seconds: float
    duration_seconds: float | None


class CategoryColumn:
    """A text for each utterance, each different text kept once."""

    def __init__(self) -> None:
        """Begin without an utterance."""
        self._numbers: dict[str | None, int] = {}
        self._texts: list[str | None] = []
        self._members = array("i")

    def append(self, text: str | None) -> None:
        """Add the next utterance's."""
        number = self._numbers.setdefault(text, len(self._texts))
        if number == len(self._texts):
            self._texts.append(text)
        self._members.append(number)

    def numbers(self) -> npt.NDArray[np.int64]:
        """Return int64 [U]: equal ones for equal texts, from 0; each None has one of its own."""
        members = np.array(self._members, np.int64)
        missing = members == self._numbers.get(None, -1)
        members[missing] = len(self._texts) + np.arange(missing.sum())
        return members

    def __getitem__(self, position: int) -> str | None:
        return self._texts[self._members[position]]


@dataclass
class Facts:
    """What the baseline's rows say of the utterances, about 8 bytes for each and each label.

    Attributes:
        positions: id -> number of the utterance, from 0.
        languages: what each row says of its language.
        groups: column -> its value in each row.
        blocks: value of the column by which utterances are resampled, if there is one.
        seconds: length of each utterance, NaN where it is not known.
    """

    positions: dict[str, int]
    languages: CategoryColumn
    groups: dict[str, CategoryColumn]
    blocks: CategoryColumn | None
    seconds: "array[float]"


def read_facts(
    baseline: Examined, columns: HypothesisColumns, group_by: Sequence[str], block: str | None
) -> Facts:
    """Return what the rows of the baseline say of the utterances that are compared."""
    facts = Facts(
        {}, CategoryColumn(), {name: CategoryColumn() for name in group_by}, None, array("d")
    )
    facts.blocks = CategoryColumn() if block else None
    for utterance_id, row in usable_rows(baseline):
        facts.positions[utterance_id] = len(facts.positions)
        language = row.get(columns.language) if columns.language else None
        facts.languages.append(language if isinstance(language, str) else None)
        for column, labels in facts.groups.items():
            labels.append(label(row.get(column)))
        if block and facts.blocks is not None:
            facts.blocks.append(None if row.get(block) is None else label(row[block]))
        facts.seconds.append(_seconds(row, columns, baseline.system.path.parent))
    return facts


def clip_of(row: Row, columns: HypothesisColumns, folder: Path) -> Clip | None:
    """Return where an utterance can be heard, if the row says so and the file exists.

    Args:
        row: the row of a hypotheses file.
        columns: where it holds what.
        folder: of that file; a relative path is tried from there, then from the working directory.
    """
    name = row.get(columns.audio) if columns.audio else None
    path = find_audio(name, str(folder)) if isinstance(name, str) else None
    start = _number(row, columns.start_seconds)
    return Clip(Path(path), start or 0.0, _number(row, columns.duration_seconds)) if path else None


def label(value: object) -> str:
    """Return the name of the group of rows with this value; a row without the column is "null"."""
    return value if isinstance(value, str) else json.dumps(value)


def _seconds(row: Row, columns: HypothesisColumns, folder: Path) -> float:
    duration = _number(row, columns.duration_seconds)
    if duration is None and columns.duration_seconds and (clip := clip_of(row, columns, folder)):
        with contextlib.suppress(AudioError):
            return audio_seconds(*clip)
    return math.nan if duration is None else duration


def _number(row: Row, column: str | None) -> float | None:
    value = row.get(column) if column else None
    # bool is an int.
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        return None
    return float(value)
