"""Compare one or several systems' hypotheses with the references: CER, WER and their intervals.

Reads hypotheses manifests (JSON Lines), matches the systems' rows by id and writes, over the
utterances that all systems have, `report.html` and `report.txt` for people, and `summary.json`,
`utterances.jsonl` (counts and alignment of each utterance) and `rejected.jsonl` (every row that was
not scored, and why) for machines. The first system is the baseline that others are compared with.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from pydantic import Field, field_validator

from simpler_distil_whisper.atomic import write_atomically, written_atomically
from simpler_distil_whisper.config import Seed, StrictModel
from simpler_distil_whisper.data.jsonl import to_line
from simpler_distil_whisper.evaluation.examples import ReportOptions, list_utterances
from simpler_distil_whisper.evaluation.facts import Facts, read_facts
from simpler_distil_whisper.evaluation.hallucination import HallucinationOptions, KnownPhrases
from simpler_distil_whisper.evaluation.html_report import report_page
from simpler_distil_whisper.evaluation.hypotheses import (
    ExaminedSystem,
    Hypotheses,
    HypothesisColumns,
    Name,
    match_systems,
)
from simpler_distil_whisper.evaluation.intervals import Resampling
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.evaluation.summary import Summary
from simpler_distil_whisper.evaluation.systems import compare_systems, score_system
from simpler_distil_whisper.evaluation.tallies import SystemScores
from simpler_distil_whisper.evaluation.text_report import text_table
from simpler_distil_whisper.run import Run, log
from simpler_distil_whisper.script import run_script
from simpler_distil_whisper.terminal import show

UTTERANCES = "utterances.jsonl"


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
        default=0.95, gt=0, lt=1, description="How often an interval should hold the true rate."
    )
    bootstrap_samples: int = Field(
        default=1000,
        ge=100,
        le=100_000,
        description="Corpora drawn for each interval and p-value.",
    )
    bootstrap_block_column: Name | None = Field(
        default=None,
        description="Column by which whole blocks of utterances are drawn, such as the speaker or "
        "the recording, whose errors go together; null draws utterance by utterance.",
    )
    seed: Seed = Field(default=0, description="Of the bootstrap.")
    report: ReportOptions = ReportOptions()

    @field_validator("hypotheses")
    @classmethod
    def _names_differ(cls, systems: list[Hypotheses]) -> list[Hypotheses]:
        names = [system.name for system in systems]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"each system needs a name of its own, these stand twice: {twice}")
        return systems

    def groups(self, baseline: ExaminedSystem) -> list[str]:
        """Return the columns by which the utterances are grouped."""
        speaker = self.columns.speaker
        speakers = [speaker] if speaker and speaker in baseline.columns else []
        return list(dict.fromkeys([*self.group_by, *speakers]))

    @property
    def required_columns(self) -> dict[str, list[str]]:
        """The columns that the baseline's file must have, by the key that names them."""
        keys = ["language", "audio"]
        named = {f"columns.{key}": getattr(self.columns, key) for key in keys}
        named["bootstrap_block_column"] = self.bootstrap_block_column
        return {"group_by": self.group_by} | {key: [name] for key, name in named.items() if name}


def prepare(config: Config) -> list[ExaminedSystem]:
    """Return, for each system, the lines of the utterances that all systems can be compared on.

    Raises:
        ConfigError: a file cannot be read, or has no column that the config names.
        DataError: no utterance is left.
    """
    systems = match_systems(config.hypotheses, config.columns, config.required_columns)
    lengths, speaker = config.columns.duration_seconds, config.columns.speaker
    if lengths and lengths not in systems[0].columns:
        log.info('No row has a column "%s": lengths are those of the audio files.', lengths)
    if speaker and speaker not in systems[0].columns:
        log.info('No row has a column "%s": no error rates of speakers are given.', speaker)
    log.info("%d utterances to compare.", len(systems[0].lines))
    return systems


def work(config: Config, systems: list[ExaminedSystem], run: Run) -> str:
    """Score every system, write the results and return where they are."""
    rejected = [row for system in systems for row in system.rejected]
    lines = "".join(to_line(row._asdict()) for row in rejected)
    write_atomically(run.folder / "rejected.jsonl", lines.encode())
    groups, blocks = config.groups(systems[0]), config.bootstrap_block_column
    facts = read_facts(systems[0], config.columns, groups, blocks)
    scores = score_systems(config, systems, facts, run)
    summary = summarize(config, facts, scores)
    content = json.dumps(asdict(summary), ensure_ascii=False, indent=2, allow_nan=False)
    write_atomically(run.folder / "summary.json", f"{content}\n".encode())
    table = text_table(summary, config.group_by)
    write_atomically(run.folder / "report.txt", table.encode())
    page_path = run.folder / "report.html"
    page_path.unlink(missing_ok=True)  # of an earlier run, whose numbers may be others
    if config.report.html:
        scored = run.folder / UTTERANCES
        listing = list_utterances(systems, scores, facts, config.columns, scored, config.report)
        speeds = {system.name: system.read_speed() for system in systems}
        page = report_page(summary, listing, speeds)
        write_atomically(page_path, page.encode())
    show(table)
    page_note = "report.html to look at, " if config.report.html else ""
    return (
        f"{run.folder} holds {page_note}report.txt (this table), summary.json, utterances.jsonl "
        f"and rejected.jsonl ({len(rejected)} rows)."
    )


def score_systems(
    config: Config, systems: list[ExaminedSystem], facts: Facts, run: Run
) -> dict[str, SystemScores]:
    """Write `utterances.jsonl`; return the scores of each system by its name."""
    scorer = Scorer(config.metric)
    phrases = KnownPhrases(config.hallucination.phrases, scorer)
    with written_atomically(run.folder / UTTERANCES) as file:
        return {
            system.name: score_system(system, facts, config.columns, scorer, phrases, file, run)
            for system in systems
        }


def summarize(config: Config, facts: Facts, scores: dict[str, SystemScores]) -> Summary:
    """Return the content of `summary.json`."""
    baseline = next(iter(scores.values()))
    resampling = Resampling(config.confidence, config.bootstrap_samples, config.seed)
    return Summary(
        unit=config.metric.unit,
        confidence=config.confidence,
        bootstrap_samples=config.bootstrap_samples,
        bootstrap_block_column=config.bootstrap_block_column,
        blocks=facts.block_count(baseline.has_reference),
        seed=config.seed,
        utterances=len(facts.positions),
        systems={name: system.summary(resampling) for name, system in scores.items()},
        comparisons=compare_systems(scores, facts.blocks, resampling),
    )


if __name__ == "__main__":
    sys.exit(run_script("eval", __doc__, Config, prepare, work, overwrite=True))
