"""Hypotheses files: the rows that can be compared, the same utterances for every system.

Owns the reading and matching of what inference, or another tool, has written. It counts no errors.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from simpler_distil_whisper.config import ConfigError, StrictModel, shortened
from simpler_distil_whisper.data.jsonl import (
    LONGEST_ROW,
    Row,
    RowError,
    check_text,
    is_number,
    parse_row,
    placed_lines,
    quoted,
)
from simpler_distil_whisper.files import read_regular_file, version_of
from simpler_distil_whisper.run import DataError, log

Name = Annotated[str, Field(min_length=1)]

MOST_OF_ANYTHING = 1e18  # bytes, parameters, real time


class Hypotheses(StrictModel):
    """One system's hypotheses."""

    name: Name = Field(description="What the system is called in the results.")
    path: Path = Field(description="JSON Lines file, one utterance per line.")


class HypothesisColumns(StrictModel):
    """Which column of a hypotheses file holds what."""

    id: Name | None = Field(
        default="id",
        description="Column of the utterance's id, by which the systems' rows are matched; null: "
        "they are matched by line number.",
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
        "script decides. Of translations it is the language that was spoken: set null.",
    )
    audio: Name | None = Field(
        default=None, description="Column of the audio file, which the report then plays."
    )
    start_seconds: Name | None = Field(
        default="start_seconds",
        description="Column of where in the file the utterance begins; at its beginning in rows "
        "without the column.",
    )
    duration_seconds: Name | None = Field(
        default=None,
        description="Column of its length, by which error rates are grouped; where it is missing, "
        "the audio file's header tells it.",
    )
    channel: Name | None = Field(
        default="channel", description="Column of the channel that was transcribed."
    )
    speaker: Name | None = Field(
        default=None,
        description="Column of the speaker, for whom error rates are also given; optional.",
    )

    @model_validator(mode="after")
    def _texts_differ(self) -> "HypothesisColumns":
        if self.reference == self.hypothesis:
            raise ValueError(
                f'reference and hypothesis are both "{self.hypothesis}": a text compared with '
                "itself has no errors"
            )
        return self


class RejectedRow(NamedTuple):
    """A row that is not scored, as `rejected.jsonl` lists it."""

    system: str
    place: str
    id: str | None
    reason: str


class SystemSpeed(NamedTuple):
    """How fast and how large a system is; None where inference has not measured it."""

    rtfx: float | None
    parameters: float | None
    model_bytes: float | None


@dataclass
class ExaminedSystem:
    """The rows of one system's file after the first reading.

    Attributes:
        name: of the system.
        path: of its file.
        version: of its file, as `version_of` returns it.
        lines: id -> line number of each row that can be compared.
        rejected: the other rows.
        columns: every column that some row has.
    """

    name: str
    path: Path
    version: tuple[int, int] | None
    lines: dict[str, int] = field(default_factory=dict)
    rejected: list[RejectedRow] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)

    def reject(self, line: int, utterance_id: str | None, reason: str) -> None:
        """Record why the row at `line` is not scored."""
        place = f"{self.path}:{line}"
        self.rejected.append(RejectedRow(self.name, place, utterance_id, reason))

    def read_speed(self) -> SystemSpeed | None:
        """Return what the `speed.json` beside the file tells; None if there is none to be read."""
        path = self.path.parent / "speed.json"
        if not path.exists():
            return None
        try:
            speed = parse_row(read_regular_file(path, LONGEST_ROW))
            return SystemSpeed(*(_measured(speed.get(key)) for key in SystemSpeed._fields))
        except (OSError, RowError) as error:
            log.warning("%s: not used, the report shows no speed: %s", path, error)
            return None


def _measured(value: object) -> float | None:
    """Return a number from `speed.json`; None if nothing was measured.

    Raises:
        RowError: it is none.
    """
    if value is None:
        return None
    if is_number(value) and 0 <= value < MOST_OF_ANYTHING:
        return value
    raise RowError(f"{quoted(value)} is not a number that can be measured")


def match_systems(
    systems: Sequence[Hypotheses],
    columns: HypothesisColumns,
    required: Mapping[str, Sequence[str]],
) -> list[ExaminedSystem]:
    """Return, for each system, the rows of the utterances that all systems have.

    Rows that cannot be used, or whose reference differs from that of an earlier system, are
    rejected with a warning.

    Args:
        systems: the files; the first is the baseline's.
        columns: which column holds what.
        required: config key -> the columns that the baseline's file must have.

    Raises:
        ConfigError: a file cannot be read, or a required column is missing.
        DataError: no utterance is left.
    """
    references: dict[str, int] = {}
    examined = [_examine(system, columns, references) for system in systems]
    _refuse_missing_columns(examined[0], required)
    _keep_common_utterances(examined)
    for system in examined:
        if system.rejected:
            rejected, rows = len(system.rejected), len(system.rejected) + len(system.lines)
            reasons = _reasons(system.rejected)
            log.warning("%s: %d of %d rows rejected:\n%s", system.name, rejected, rows, reasons)
    return examined


def usable_rows(system: ExaminedSystem) -> Iterator[tuple[str, Row]]:
    """Yield id and row of each utterance to score, in the order of the file.

    Raises:
        DataError: it is no longer the file that was examined.
    """
    ids = {line: utterance_id for utterance_id, line in system.lines.items()}
    for line, _, content in placed_lines(system.path, "hypotheses"):
        if line in ids:
            yield ids[line], parse_row(content)
    if version_of(system.path) != system.version:
        raise DataError(f"{system.path} has changed while it was read: run the same command again")


def read_reference(row: Row, columns: HypothesisColumns) -> str | None:
    """Return the reference; None where nobody has transcribed the utterance.

    Raises:
        RowError: there is no such column, or no text in it.
    """
    if columns.reference is None or row.get(columns.reference, "") is None:
        return None
    return _read_text(row, columns.reference, "columns.reference")


def _examine(
    hypotheses: Hypotheses, columns: HypothesisColumns, references: dict[str, int]
) -> ExaminedSystem:
    """Return which rows of one file can be scored.

    Args:
        hypotheses: the file.
        columns: which column holds what.
        references: id -> hash of the reference in earlier systems; those of this one are added.
    """
    system = ExaminedSystem(hypotheses.name, hypotheses.path, version_of(hypotheses.path))
    for line, _, content in placed_lines(system.path, "hypotheses"):
        utterance_id = None
        try:
            row = parse_row(content)
            system.columns.update(row)
            utterance_id = _read_id(row, line, columns)
            reference = read_reference(row, columns)
            _read_text(row, columns.hypothesis, "columns.hypothesis")
            if utterance_id in system.lines:
                raise RowError("its id stands in an earlier row, which is taken")
            if references.setdefault(utterance_id, hash(reference)) != hash(reference):
                raise RowError("an earlier system has another reference for this id")
            system.lines[utterance_id] = line
        except RowError as problem:
            system.reject(line, utterance_id, shortened(str(problem), 1000))
    return system


def _refuse_missing_columns(system: ExaminedSystem, required: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError if no row of a system's file has a column that the config names.

    Args:
        system: the system; a file without any row is left to `_keep_common_utterances`.
        required: config key -> the columns that it names.
    """
    problems = [
        f'{key}: no row of {system.path} has a column "{shortened(column)}"; '
        f"columns found: {', '.join(sorted(system.columns))}"
        for key, columns in required.items()
        for column in columns
        if system.columns and column not in system.columns
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _keep_common_utterances(systems: Sequence[ExaminedSystem]) -> None:
    """Reject the rows whose utterance another system lacks, so that all are scored on the same.

    Raises:
        DataError: no utterance is left.
    """
    common = set.intersection(*(set(system.lines) for system in systems))
    usable = {system.name: system.lines for system in systems}  # before any row is left out
    for system in systems:
        for utterance_id, line in system.lines.items():
            if utterance_id not in common:
                lacking = [
                    f'"{name}"' for name, lines in usable.items() if utterance_id not in lines
                ]
                reason = f"no usable row with this id in {', '.join(lacking)}"
                system.reject(line, utterance_id, reason)
        system.lines = {key: line for key, line in system.lines.items() if key in common}
    if not common:
        raise DataError(
            "No utterance can be compared. "
            + "\n".join(f"{system.path}: {_why_empty(system)}" for system in systems)
        )


def _read_id(row: Row, line: int, columns: HypothesisColumns) -> str:
    """Return the row's id as a string: the line number if there is no id column.

    Raises:
        RowError: the row's id is neither a string nor a number.
    """
    if columns.id is None:
        return str(line)
    if is_number(row.get(columns.id)):
        return str(row[columns.id])
    return _read_text(row, columns.id, "columns.id; with null, rows are matched by line number")


def _read_text(row: Row, column: str, key: str) -> str:
    """Return the text in the column that a key of the config names.

    Raises:
        RowError: the row has no such column, or no text in it.
    """
    if column not in row:
        raise RowError(f'no column "{column}" ({key})')
    value = row[column]
    if value is None:
        raise RowError(f'column "{column}" is null')
    if not isinstance(value, str):
        raise RowError(f'column "{column}" is not a string')
    check_text(value, column)
    return value


def _reasons(rejected: Sequence[RejectedRow]) -> str:
    """Return how many rows were rejected for each reason, and where the first of them stands."""
    first = {row.reason: row.place for row in reversed(rejected)}
    counts = Counter(row.reason for row in rejected).most_common()
    return "\n".join(f"  {count} x {why}, first at {first[why]}" for why, count in counts)


def _why_empty(system: ExaminedSystem) -> str:
    """Return what is wrong with a file of which no row is left."""
    if not system.rejected:
        return "the file has no rows"
    reasons = _reasons(system.rejected)
    columns = f"; columns found: {', '.join(sorted(system.columns))}" if system.columns else ""
    return f"all {len(system.rejected)} rows rejected{columns}\n{reasons}"
