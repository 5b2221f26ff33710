"""Compare one or several systems' hypotheses with the references: CER, WER and their intervals.

Reads hypotheses manifests (JSON Lines), matches the systems' rows by id and writes, over the
utterances that all systems have, `summary.json`, `utterances.jsonl` (counts and alignment of each
utterance), `rejected.jsonl` (every row that was not scored, and why) and `report.txt`.
"""

import contextlib
import functools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from pydantic import Field, field_validator

from simpler_distil_whisper.config import NonNegativeInt, PositiveInt, StrictModel
from simpler_distil_whisper.hypotheses import (
    Columns,
    Examined,
    Hypotheses,
    Name,
    examine,
    keep_common_utterances,
    reasons,
    refuse_missing_columns,
    usable_rows,
    why_empty,
)
from simpler_distil_whisper.jsonl import to_line
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
    Progress,
    Run,
    log,
    run_script,
    write_atomically,
)
from simpler_distil_whisper.text import Unit


class Config(StrictModel):
    """eval.json."""

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


def prepare(config: Config) -> list[Examined]:
    """Return, for each system, the lines of the utterances that all systems can be compared on.

    Raises:
        ConfigError: a file cannot be read, or has no column that `columns.language` or `group_by`
            names.
        DataError: no utterance is left.
    """
    references: dict[str, int] = {}
    examined = [examine(system, config.columns, references) for system in config.hypotheses]
    language = config.columns.language
    wanted = {"group_by": config.group_by, "columns.language": [language] if language else []}
    refuse_missing_columns(examined, wanted)
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
        run.folder / "rejected.jsonl",
        "".join(to_line(row._asdict()) for row in rejected).encode(),
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


def score_system(one: Examined, config: Config, file: BinaryIO, run: Run) -> SystemScores:
    """Return a system's scores and write each utterance's counts and alignment into `file`."""
    scorer = Scorer(config.metric)
    scores = SystemScores(rejected=Counter(row.reason for row in one.rejected))
    scores.groups = {column: {} for column in config.group_by}
    columns = config.columns
    progress = Progress(f"scoring {one.system.name}", "utterances", len(one.lines))
    for utterance_id, row in progress.over(usable_rows(one)):
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
        file.write(to_line(details).encode())
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


def label(value: object) -> str:
    """Return the name of the group of rows with this value; a row without the column is "null"."""
    return value if isinstance(value, str) else json.dumps(value)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that takes the place of the one at `path` only when it is whole."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("wb") as file:
        yield file
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(run_script("eval", __doc__, Config, prepare, work, overwrite=True))
