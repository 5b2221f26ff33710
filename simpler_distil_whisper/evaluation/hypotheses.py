"""Hypotheses files: which rows can be compared, the same utterances for all systems.

Owns the reading and matching of what inference, or another tool, has written; it counts no errors.
Called by `eval.py`.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from simpler_distil_whisper.config import ConfigError, StrictModel
from simpler_distil_whisper.data.jsonl import Row, RowError, numbered_lines, parse_row

Name = Annotated[str, Field(min_length=1)]


class Hypotheses(StrictModel):
    """One system's answers."""

    name: Name = Field(description="What the system is called in the results.")
    path: Path = Field(description="JSON Lines file, one utterance per line.")


class HypothesisColumns(StrictModel):
    """Where a row holds what."""

    id: Name | None = Field(
        default="id",
        description="Column of the utterance's id, by which the systems' rows are matched; null "
        "matches them by line number.",
    )
    reference: Name | None = Field(
        default="text",
        description="Column of the human transcript. Of rows in which it is null, and of all rows "
        "if this key is null, only the signs of invented text are counted.",
    )
    hypothesis: Name = Field(default="hypothesis", description="Column of the system's text.")
    language: Name | None = Field(
        default="language",
        description='Column that decides the unit where metric.unit is "auto", and how texts are '
        "normalised; with null, and in rows whose language Whisper does not know, the reference's "
        "script decides.",
    )
    audio: Name | None = Field(
        default=None, description="Column of the audio file, which the report then plays."
    )
    start_seconds: Name | None = Field(
        default=None, description="Column of where in the file the utterance begins."
    )
    duration_seconds: Name | None = Field(
        default=None,
        description="Column of its length, by which error rates are grouped; where it is missing, "
        "the audio file's header tells it.",
    )
    speaker: Name | None = Field(
        default=None, description="Column of the speaker, for whom error rates are also given."
    )

    @model_validator(mode="after")
    def _texts_differ(self) -> "HypothesisColumns":
        if self.reference == self.hypothesis:
            raise ValueError(
                f'reference and hypothesis are both "{self.hypothesis}": a text compared with '
                "itself has no errors"
            )
        return self


class Rejected(NamedTuple):
    """A row that is not scored, as `rejected.jsonl` lists it."""

    system: str
    place: str
    id: str | None
    reason: str


@dataclass
class Examined:
    """What the first reading of one system's file found.

    Attributes:
        lines: id -> line number of each row that can be compared.
        columns: every column that some row has.
    """

    system: Hypotheses
    lines: dict[str, int] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)

    def reject(self, line: int, utterance_id: str | None, reason: str) -> None:
        """Note down why the row at `line` is not scored."""
        place = f"{self.system.path}:{line}"
        self.rejected.append(Rejected(self.system.name, place, utterance_id, reason))


def examine(system: Hypotheses, columns: HypothesisColumns, references: dict[str, int]) -> Examined:
    """Return which rows of a system's file can be scored.

    Args:
        system: whose file is read.
        columns: where a row holds what.
        references: id -> hash of its reference in the systems before; this system's are added.

    Raises:
        ConfigError: the file cannot be read.
    """
    found = Examined(system)
    for line, content in numbered_lines(system.path, "hypotheses"):
        utterance_id = None
        try:
            row = parse_row(content)
            found.columns.update(row)
            utterance_id = id_of(row, line, columns)
            reference = reference_in(row, columns)
            text_in(row, columns.hypothesis)
            if utterance_id in found.lines:
                raise RowError("its id stands in an earlier row, which is taken")
            if references.setdefault(utterance_id, hash(reference)) != hash(reference):
                raise RowError("an earlier system has another reference for this id")
            found.lines[utterance_id] = line
        except RowError as problem:
            found.reject(line, utterance_id, str(problem))
    return found


def refuse_missing_columns(one: Examined, wanted: dict[str, list[str]]) -> None:
    """Raise ConfigError if a file with rows has nowhere a column that a config key names.

    Args:
        one: the file.
        wanted: config key -> the columns that it names.
    """
    problems = [
        f'{key}: no row of {one.system.path} has a column "{column}"; '
        f"columns found: {', '.join(sorted(one.columns))}"
        for key, columns in wanted.items()
        for column in columns
        if one.columns and column not in one.columns
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def keep_common_utterances(examined: list[Examined]) -> None:
    """Reject the rows whose utterance another system lacks, so that all are scored on the same."""
    common = set.intersection(*(set(one.lines) for one in examined))
    for one in examined:
        others = [other for other in examined if other is not one]
        for utterance_id in [key for key in one.lines if key not in common]:
            lacking = [f'"{o.system.name}"' for o in others if utterance_id not in o.lines]
            line = one.lines[utterance_id]
            one.reject(line, utterance_id, f"no usable row with this id in {', '.join(lacking)}")
        one.lines = {key: line for key, line in one.lines.items() if key in common}


def usable_rows(one: Examined) -> Iterator[tuple[str, Row]]:
    """Yield id and row of each utterance to score, in the order of the file."""
    ids = {line: utterance_id for utterance_id, line in one.lines.items()}
    for line, content in numbered_lines(one.system.path, "hypotheses"):
        if line in ids:
            yield ids[line], parse_row(content)


def id_of(row: Row, line: int, columns: HypothesisColumns) -> str:
    """Return the row's id as a string: its line number where there is no id column.

    Raises:
        RowError: the row's id is neither a string nor an integer.
    """
    if columns.id is None:
        return str(line)
    if type(row.get(columns.id)) is int:
        return str(row[columns.id])
    return text_in(row, columns.id)


def text_in(row: Row, column: str) -> str:
    """Return the text in a column.

    Raises:
        RowError: there is none.
    """
    if column not in row:
        raise RowError(f'no column "{column}"')
    value = row[column]
    if value is None:
        raise RowError(f'column "{column}" is null')
    if not isinstance(value, str):
        raise RowError(f'column "{column}" is not a string')
    return value


def reference_in(row: Row, columns: HypothesisColumns) -> str | None:
    """Return what was said; None where nobody has written it down.

    Raises:
        RowError: there is no such column, or no text in it.
    """
    if columns.reference is None or row.get(columns.reference, "") is None:
        return None
    return text_in(row, columns.reference)


def reasons(rejected: list[Rejected]) -> str:
    """Return how many rows were rejected for each reason, and where the first of them stands."""
    first = {row.reason: row.place for row in reversed(rejected)}
    counts = Counter(row.reason for row in rejected).most_common()
    return "\n".join(f"  {count} x {why}, first at {first[why]}" for why, count in counts)


def why_empty(one: Examined) -> str:
    """Return what is wrong with a file none of whose rows is left."""
    if not one.rejected:
        return "the file has no rows"
    found = f"; columns found: {', '.join(sorted(one.columns))}" if one.columns else ""
    return f"all {len(one.rejected)} rows rejected{found}\n{reasons(one.rejected)}"
