"""Compare one or several systems' hypotheses with the references: CER, WER and their intervals.

Reads hypotheses manifests (JSON Lines), matches the systems' rows by id and writes, over the
utterances that all systems have, `report.html` and `report.txt` for people, and `summary.json`,
`utterances.jsonl` (counts and alignment of each utterance) and `rejected.jsonl` (every row that was
not scored, and why) for machines. The first system is the baseline that others are compared with.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import Field, field_validator

from simpler_distil_whisper.atomic import write_atomically, written_atomically
from simpler_distil_whisper.config import NonNegativeInt, StrictModel
from simpler_distil_whisper.data.jsonl import to_line
from simpler_distil_whisper.evaluation.examples import choose, describe
from simpler_distil_whisper.evaluation.facts import Facts, read_facts
from simpler_distil_whisper.evaluation.hallucination import HallucinationOptions, KnownPhrases
from simpler_distil_whisper.evaluation.hypotheses import (
    Examined,
    Hypotheses,
    HypothesisColumns,
    Name,
    examine,
    keep_common_utterances,
    reasons,
    reference_in,
    refuse_missing_columns,
    usable_rows,
    why_empty,
)
from simpler_distil_whisper.evaluation.intervals import Comparison, Resampling, paired_difference
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.evaluation.scoring import Scored, compact, score
from simpler_distil_whisper.evaluation.tallies import (
    NO_REFERENCE,
    SystemScores,
    comparison_summary,
    length_groups,
)
from simpler_distil_whisper.evaluation.text_report import text_table
from simpler_distil_whisper.run import DataError, Progress, Run, log, run_script


class ReportOptions(StrictModel):
    """The page for a browser."""

    html: bool = Field(default=True, description="Write report.html.")
    worst_utterances: NonNegativeInt = Field(
        default=20,
        description="How many of those with most errors, and of those at which a system and the "
        "baseline differ most, are listed for each system.",
    )
    embed_audio: bool = Field(
        default=True,
        description="Put the audio of the listed utterances into the page; others, and all with "
        "false, are linked to their files.",
    )


class Config(StrictModel):
    """eval.json."""

    output_dir: Path = Field(description="Folder of the results; a new run replaces them.")
    hypotheses: list[Hypotheses] = Field(min_length=1, description="The systems to compare.")
    columns: HypothesisColumns = HypothesisColumns()
    metric: Metric = Metric()
    group_by: list[Name] = Field(
        default=[], description="Columns for whose values the error rates are also given."
    )
    hallucination: HallucinationOptions = HallucinationOptions()
    confidence: float = Field(
        default=0.95, gt=0, lt=1, description="Share of the bootstrap samples inside an interval."
    )
    bootstrap_samples: int = Field(
        default=1000, ge=100, description="Corpora drawn for each interval and p-value."
    )
    bootstrap_block_column: Name | None = Field(
        default=None,
        description="Column by which whole blocks of utterances are drawn, such as the speaker or "
        "the recording, whose errors go together; null draws utterance by utterance.",
    )
    seed: NonNegativeInt = Field(default=0, description="Of the bootstrap.")
    report: ReportOptions = ReportOptions()

    @property
    def groups(self) -> list[str]:
        """The columns by which the utterances are grouped."""
        speaker = [self.columns.speaker] if self.columns.speaker else []
        return list(dict.fromkeys([*self.group_by, *speaker]))

    @property
    def resampling(self) -> Resampling:
        """How intervals are drawn."""
        return Resampling(self.confidence, self.bootstrap_samples, self.seed)

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
        ConfigError: a file cannot be read, or has no column that the config names.
        DataError: no utterance is left.
    """
    references: dict[str, int] = {}
    examined = [examine(system, config.columns, references) for system in config.hypotheses]
    refuse_missing_columns(examined[0], columns_of_the_utterances(config))
    keep_common_utterances(examined)
    if not examined[0].lines:
        raise DataError(
            "No utterance can be compared. "
            + "\n".join(f"{one.system.path}: {why_empty(one)}" for one in examined)
        )
    for one in examined:
        if one.rejected:
            log.warning(
                "%s: %d of %d rows rejected:\n%s",
                *(one.system.name, len(one.rejected), len(one.rejected) + len(one.lines)),
                reasons(one.rejected),
            )
    lengths = config.columns.duration_seconds
    if lengths and lengths not in examined[0].columns:
        log.info('No row has a column "%s": lengths are those of the audio files.', lengths)
    log.info("%d utterances to compare.", len(examined[0].lines))
    return examined


def columns_of_the_utterances(config: Config) -> dict[str, list[str]]:
    """Return the columns that the first system's file must have, by the key that names them."""
    keys = ["language", "audio", "start_seconds", "speaker"]
    named = {f"columns.{key}": getattr(config.columns, key) for key in keys}
    named["bootstrap_block_column"] = config.bootstrap_block_column
    return {"group_by": config.group_by} | {key: [name] for key, name in named.items() if name}


def work(config: Config, examined: list[Examined], run: Run) -> str:
    """Score every system, write the results and return where they are."""
    rejected = [line for one in examined for line in one.rejected]
    write_atomically(
        run.folder / "rejected.jsonl",
        "".join(to_line(row._asdict()) for row in rejected).encode(),
    )
    facts = read_facts(examined[0], config.columns, config.groups, config.bootstrap_block_column)
    systems = {}
    with written_atomically(run.folder / "utterances.jsonl") as file:
        for one in examined:
            systems[one.system.name] = score_system(one, facts, config, file, run)
    summary = summarize(config, systems, facts)
    content = json.dumps(summary, ensure_ascii=False, indent=2, allow_nan=False)
    write_atomically(run.folder / "summary.json", f"{content}\n".encode())
    table = text_table(summary, config.group_by)
    write_atomically(run.folder / "report.txt", table.encode())
    if config.report.html:
        write_page(config, examined, systems, facts, summary, run)
    print(table, end="", flush=True)
    page = "report.html to look at, " if config.report.html else ""
    return (
        f"{run.folder} holds {page}report.txt (this table), summary.json, utterances.jsonl and "
        f"rejected.jsonl ({len(rejected)} rows)."
    )


def score_system(
    one: Examined, facts: Facts, config: Config, file: BinaryIO, run: Run
) -> SystemScores:
    """Return a system's scores and write each utterance's counts and alignment into `file`."""
    scorer = Scorer(config.metric)
    phrases = KnownPhrases(config.hallucination.phrases, scorer)
    scores = SystemScores(len(one.lines), Counter(row.reason for row in one.rejected))
    progress = Progress(f"scoring {one.system.name}", "utterances", len(one.lines))
    for utterance_id, row in progress.over(usable_rows(one)):
        run.stop_if_asked()
        position = facts.positions[utterance_id]
        reference = reference_in(row, config.columns)
        hypothesis = row[config.columns.hypothesis]
        seconds = facts.seconds[position]
        scored = score(
            scorer,
            phrases,
            reference,
            hypothesis,
            facts.languages[position],
            seconds=seconds if seconds > 0 else None,
            no_speech_probability=row.get("no_speech_probability"),
        )
        groups = {column: labels[position] for column, labels in facts.groups.items()}
        groups |= length_groups(seconds, scored.chosen.reference_tokens)
        scores.add(position, scored, groups, facts.blocks and facts.blocks[position])
        scores.offsets[position] = file.tell()
        texts = {"reference": reference, "hypothesis": hypothesis}
        details = {"id": utterance_id, "system": one.system.name, **texts, **details_of(scored)}
        file.write(to_line(details).encode())
    return scores


def details_of(scored: Scored) -> dict[str, Any]:
    """Return what `utterances.jsonl` says of an utterance besides its texts."""
    return {
        "unit": scored.unit,
        "rate": scored.chosen.rate,
        **{name: count.as_dict() for name, count in scored.counts.items()},
        "alignment": compact(scored.edits, scored.unit),
        "signs": scored.signs,
    }


def summarize(config: Config, systems: dict[str, SystemScores], facts: Facts) -> dict[str, Any]:
    """Return `summary.json`."""
    baseline, *others = systems
    return {
        "unit": config.metric.unit,
        "confidence": config.confidence,
        "bootstrap_samples": config.bootstrap_samples,
        "bootstrap_block_column": config.bootstrap_block_column,
        "blocks": len(np.unique(facts.blocks.numbers())) if facts.blocks else None,
        "seed": config.seed,
        "utterances": len(facts.positions),
        "systems": {name: one.summary(config.resampling) for name, one in systems.items()},
        "comparisons": {
            name: comparison_summary(
                baseline, compare_systems(systems[baseline], systems[name], facts, config)
            )
            for name in others
        },
    }


def compare_systems(
    baseline: SystemScores, system: SystemScores, facts: Facts, config: Config
) -> Comparison:
    """Return how a system does beside the baseline, on the utterances that have a reference."""
    known = baseline.errors != NO_REFERENCE
    return paired_difference(
        baseline.errors[known],
        system.errors[known],
        baseline.tokens[known],
        facts.blocks and facts.blocks.numbers()[known],
        config.resampling,
    )


def speed_beside(hypotheses: Path) -> dict[str, Any] | None:
    """Return how fast and how large the system is, if inference has left its `speed.json` there."""
    try:
        found = json.loads((hypotheses.parent / "speed.json").read_bytes())
        return {key: found.get(key) for key in ("rtfx", "parameters", "model_bytes")}
    except (OSError, ValueError, AttributeError):
        return None


def write_page(
    config: Config,
    examined: list[Examined],
    systems: dict[str, SystemScores],
    facts: Facts,
    summary: dict[str, Any],
    run: Run,
) -> None:
    """Write `report.html`."""
    from simpler_distil_whisper.evaluation.html_report import (
        report_page,  # only now: it takes a while
    )

    choice = choose(systems, config.report.worst_utterances)
    scored = run.folder / "utterances.jsonl"
    utterances = describe(
        choice, examined, systems, facts, config.columns, scored, config.report.embed_audio
    )
    number = {position: index for index, position in enumerate(choice.shown)}
    listed = {
        "worst": {name: [number[p] for p in found] for name, found in choice.worst.items()},
        "different": {name: [number[p] for p in found] for name, found in choice.different.items()},
        "shown": len(choice.shown),
        "utterances_in_all": len(facts.positions),
        "summary_file": "summary.json",
        "utterances_file": scored.name,
    }
    # Not in summary.json, which is the same whenever it is made; how fast inference was is not.
    speeds = {one.system.name: speed_beside(one.system.path) for one in examined}
    with_speed = {name: {**one, "speed": speeds[name]} for name, one in summary["systems"].items()}
    page = report_page({**summary, "systems": with_speed}, utterances, listed)
    write_atomically(run.folder / "report.html", page.encode())


if __name__ == "__main__":
    sys.exit(run_script("eval", __doc__, Config, prepare, work, overwrite=True))
