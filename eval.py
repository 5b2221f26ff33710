"""Compare one or several systems' hypotheses with the references: CER, WER and their intervals.

Reads hypotheses manifests (JSON Lines), matches the systems' rows by id and writes, over the
utterances that all systems have, `summary.json`, `utterances.jsonl` (counts and alignment of each
utterance), `rejected.jsonl` (every row that was not scored, and why) and `report.txt`.
"""

import contextlib
import functools
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

from pydantic import Field, field_validator
from tqdm import tqdm

from simpler_distil_whisper.config import (
    ConfigError,
    NonNegativeInt,
    PositiveInt,
    StrictModel,
)
from simpler_distil_whisper.metrics import (
    Edit,
    ErrorCounts,
    Metric,
    Scorer,
    align,
    bootstrap_interval,
    count_edits,
    count_errors,
)
from simpler_distil_whisper.report import Scores, SystemScores, summarize, text_table
from simpler_distil_whisper.run import (
    DataError,
    Run,
    progress_options,
    run_script,
    write_atomically,
)
from simpler_distil_whisper.text import Unit

log = logging.getLogger("simpler_distil_whisper")

Name = Annotated[str, Field(min_length=1)]


class Hypotheses(StrictModel):
    """One system's answers."""

    name: Name = Field(description="What the system is called in the results.")
    path: Path = Field(description="JSON Lines file, one utterance per line.")


class Columns(StrictModel):
    """Where a row holds what."""

    id: Name | None = Field(
        default="id",
        description="Column of the utterance's id, by which the systems' rows are matched; null "
        "matches them by line number.",
    )
    reference: Name = Field(default="text", description="Column of the human transcript.")
    hypothesis: Name = Field(default="hypothesis", description="Column of the system's text.")
    language: Name | None = Field(
        default="language",
        description='Column that decides the unit where metric.unit is "auto"; with null, and in '
        "rows whose language Whisper does not know, the reference's script decides.",
    )


class Config(StrictModel):
    """Every key of eval.json."""

    output_dir: Path = Field(description="Folder of the results; a new run replaces them.")
    hypotheses: list[Hypotheses] = Field(min_length=1, description="The systems to compare.")
    columns: Columns = Columns()
    metric: Metric = Metric()
    group_by: list[Name] = Field(
        default=[], description="Columns for whose values the error rates are also given."
    )
    confidence: float = Field(
        default=0.95, gt=0, lt=1, description="Share of the bootstrap samples inside an interval."
    )
    bootstrap_samples: PositiveInt = Field(
        default=1000, description="Corpora drawn, utterance by utterance, for each interval."
    )
    seed: NonNegativeInt = Field(default=0, description="Of the bootstrap.")

    @field_validator("hypotheses")
    @classmethod
    def _names_differ(cls, systems: list[Hypotheses]) -> list[Hypotheses]:
        names = [system.name for system in systems]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"each system needs a name of its own, these stand twice: {twice}")
        return systems


class RowError(Exception):
    """A row that cannot be scored; the message is the reason, the same for all rows like it."""


class Rejected(NamedTuple):
    """A row that is not scored, as `rejected.jsonl` lists it."""

    system: str
    where: str
    id: str | None
    reason: str


@dataclass
class Examined:
    """What the first reading of one system's file found.

    Attributes:
        lines: id -> line number of each row that can be scored.
        columns: every column that some row has.
    """

    system: Hypotheses
    lines: dict[str, int] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)

    def reject(self, line: int, utterance_id: str | None, reason: str) -> None:
        """Note down why the row at `line` is not scored."""
        where = f"{self.system.path}:{line}"
        self.rejected.append(Rejected(self.system.name, where, utterance_id, reason))


def prepare(config: Config) -> list[Examined]:
    """Return, for each system, the lines of the utterances that all systems can be compared on.

    Raises:
        ConfigError: a file cannot be read, or has no column that `columns.language` or `group_by`
            names.
        DataError: no utterance is left.
    """
    references: dict[str, int] = {}
    examined = [examine(system, config.columns, references) for system in config.hypotheses]
    refuse_missing_columns(examined, config)
    keep_common_utterances(examined)
    for one in examined:
        if one.rejected:
            log.warning(
                "%s: %d of %d rows rejected:\n%s",
                *(one.system.name, len(one.rejected), len(one.rejected) + len(one.lines)),
                reasons(one.rejected),
            )
    if not examined[0].lines:
        raise DataError(
            "No utterance can be compared. "
            + "\n".join(f"{one.system.path}: {why_empty(one)}" for one in examined)
        )
    log.info("%d utterances to compare.", len(examined[0].lines))
    return examined


def work(config: Config, examined: list[Examined], run: Run) -> str:
    """Score every system, write the results and return where they are."""
    rejected = [line for one in examined for line in one.rejected]
    write_atomically(
        run.folder / "rejected.jsonl", b"".join(json_line(row._asdict()) for row in rejected)
    )
    interval = functools.partial(
        bootstrap_interval,
        confidence=config.confidence,
        samples=config.bootstrap_samples,
        seed=config.seed,
    )
    systems = {}
    with replacing(run.folder / "utterances.jsonl") as file:
        for one in examined:
            scores = score_system(one, config, file, run)
            systems[one.system.name] = summarize(scores, interval)
    summary = {
        "unit": config.metric.unit,
        "confidence": config.confidence,
        "bootstrap_samples": config.bootstrap_samples,
        "seed": config.seed,
        "systems": systems,
    }
    content = json.dumps(summary, ensure_ascii=False, indent=2, allow_nan=False)
    write_atomically(run.folder / "summary.json", f"{content}\n".encode())
    table = text_table(systems)
    write_atomically(run.folder / "report.txt", table.encode())
    print(table, end="", flush=True)
    return (
        f"{run.folder} holds report.txt (this table), summary.json, utterances.jsonl and "
        f"rejected.jsonl ({len(rejected)} rows)."
    )


def examine(system: Hypotheses, columns: Columns, references: dict[str, int]) -> Examined:
    """Return which rows of a system's file can be scored.

    Args:
        system: whose file is read.
        columns: where a row holds what.
        references: id -> hash of its reference in the systems before; this system's are added.

    Raises:
        ConfigError: the file cannot be read.
    """
    found = Examined(system)
    try:
        for line, content in numbered_lines(system.path):
            utterance_id = None
            try:
                row = parse_row(content)
                found.columns.update(row)
                utterance_id = id_of(row, line, columns)
                reference = text_in(row, columns.reference)
                text_in(row, columns.hypothesis)
                if utterance_id in found.lines:
                    raise RowError("its id stands in an earlier row, which is taken")
                if references.setdefault(utterance_id, hash(reference)) != hash(reference):
                    raise RowError("an earlier system has another reference for this id")
                found.lines[utterance_id] = line
            except RowError as problem:
                found.reject(line, utterance_id, str(problem))
    except OSError as error:
        raise ConfigError(f"hypotheses: cannot read {system.path}: {error.strerror}") from None
    return found


def refuse_missing_columns(examined: list[Examined], config: Config) -> None:
    """Raise ConfigError if a file with rows has nowhere a column that the config asks for."""
    wanted = {"group_by": config.group_by}
    if config.columns.language:
        wanted["columns.language"] = [config.columns.language]
    problems = [
        f'{key}: no row of {one.system.path} has a column "{column}"; '
        f"columns found: {', '.join(sorted(one.columns))}"
        for one in examined
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


def score_system(one: Examined, config: Config, file: BinaryIO, run: Run) -> SystemScores:
    """Return a system's scores and write each utterance's counts and alignment into `file`."""
    scorer = Scorer(config.metric)
    scores = SystemScores(rejected=Counter(row.reason for row in one.rejected))
    scores.groups = {column: {} for column in config.group_by}
    columns = config.columns
    rows = usable_rows(one)
    progress = progress_options(f"Scoring {one.system.name}", "utterance")
    for utterance_id, row in tqdm(rows, total=len(one.lines), **progress):
        run.stop_if_asked()
        reference, hypothesis = row[columns.reference], row[columns.hypothesis]
        raw = (reference, hypothesis)
        reference, hypothesis = scorer.normalize(reference), scorer.normalize(hypothesis)
        language = row.get(columns.language) if columns.language else None
        unit = scorer.unit(reference, hypothesis, language if isinstance(language, str) else None)
        edits = align(reference, hypothesis, unit)
        counts = counts_by_unit(reference, hypothesis, unit, edits)
        scores.units[unit] += 1
        scores.normalized.add(unit, counts)
        scores.raw.add(unit, counts_by_unit(*raw, unit, align(*raw, unit)))
        for column, groups in scores.groups.items():
            groups.setdefault(label(row.get(column)), Scores()).add(unit, counts)
        details = {
            "id": utterance_id,
            "system": one.system.name,
            "unit": unit,
            "rate": counts[unit].rate,
            **{name: count.as_dict() for name, count in counts.items()},
            "reference": reference,
            "hypothesis": hypothesis,
            "alignment": compact(edits, unit),
        }
        file.write(json_line(details))
    return scores


def counts_by_unit(
    reference: str, hypothesis: str, unit: Unit, edits: list[Edit]
) -> dict[str, ErrorCounts]:
    """Return the counts in characters, in words and, from its alignment, in the chosen unit."""
    counts = {"character": None, "word": None, unit: count_edits(edits)}
    return {
        name: known or count_errors(reference, hypothesis, name) for name, known in counts.items()
    }


def compact(edits: Sequence[Edit], unit: Unit) -> list[list[str]]:
    """Return an alignment as [kind, reference text, hypothesis text] for each run of tokens."""
    between = "" if unit == "character" else " "
    return [[e.kind, between.join(e.reference), between.join(e.hypothesis)] for e in edits]


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield number, line


def usable_rows(one: Examined) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield id and row of each utterance to score, in the order of the file."""
    ids = {line: utterance_id for utterance_id, line in one.lines.items()}
    for line, content in numbered_lines(one.system.path):
        if line in ids:
            yield ids[line], parse_row(content)


def parse_row(content: bytes) -> dict[str, Any]:
    """Return the JSON object in one line.

    Raises:
        RowError: the line holds no JSON object.
    """
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise RowError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise RowError("not JSON") from None
    if not isinstance(row, dict):
        raise RowError("not a JSON object")
    return row


def id_of(row: dict[str, Any], line: int, columns: Columns) -> str:
    """Return the row's id as a string: its line number where there is no id column.

    Raises:
        RowError: the row's id is neither a string nor an integer.
    """
    if columns.id is None:
        return str(line)
    if type(row.get(columns.id)) is int:
        return str(row[columns.id])
    return text_in(row, columns.id)


def text_in(row: dict[str, Any], column: str) -> str:
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
    if not is_unicode(value):
        raise RowError(f'column "{column}" holds half a character (a lone surrogate)')
    return value


def is_unicode(text: str) -> bool:
    """Return whether the text can be written as UTF-8; half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def label(value: object) -> str:
    """Return the name of the group of rows with this value; a row without the column is "null"."""
    return value if isinstance(value, str) and is_unicode(value) else json.dumps(value)


def reasons(rejected: list[Rejected]) -> str:
    """Return how many rows were rejected for each reason, and where the first of them stands."""
    first = {row.reason: row.where for row in reversed(rejected)}
    counts = Counter(row.reason for row in rejected).most_common()
    return "\n".join(f"  {count} x {why}, first at {first[why]}" for why, count in counts)


def why_empty(one: Examined) -> str:
    """Return what is wrong with a file none of whose rows is left."""
    if not one.rejected:
        return "the file has no rows"
    found = f"; columns found: {', '.join(sorted(one.columns))}" if one.columns else ""
    return f"all {len(one.rejected)} rows rejected{found}\n{reasons(one.rejected)}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that takes the place of the one at `path` only when it is whole."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("wb") as file:
        yield file
    beside.replace(path)


def json_line(row: dict[str, Any]) -> bytes:
    """Return a row of a JSON Lines file."""
    return f"{json.dumps(row, ensure_ascii=False)}\n".encode()


if __name__ == "__main__":
    sys.exit(run_script("eval", __doc__, Config, prepare, work, overwrite=True))
