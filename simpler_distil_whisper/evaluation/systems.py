"""Whole systems: each scored over all utterances, and compared with the baseline.

Owns the loop over a system's rows and the lines of `utterances.jsonl`. What is counted of an
utterance, and the sums, are the business of other modules.
"""

from collections import Counter
from collections.abc import Mapping
from typing import BinaryIO

from simpler_distil_whisper.data.jsonl import is_number, to_line
from simpler_distil_whisper.evaluation.facts import CategoryColumn, Facts
from simpler_distil_whisper.evaluation.hallucination import KnownPhrases
from simpler_distil_whisper.evaluation.hypotheses import (
    ExaminedSystem,
    HypothesisColumns,
    read_reference,
    usable_rows,
)
from simpler_distil_whisper.evaluation.intervals import Resampling, paired_difference
from simpler_distil_whisper.evaluation.metrics import Scorer
from simpler_distil_whisper.evaluation.scoring import score_utterance
from simpler_distil_whisper.evaluation.summary import ComparisonSummary
from simpler_distil_whisper.evaluation.tallies import SystemScores, length_groups
from simpler_distil_whisper.progress import Progress
from simpler_distil_whisper.run import Run


def score_system(
    system: ExaminedSystem,
    facts: Facts,
    columns: HypothesisColumns,
    scorer: Scorer,
    phrases: KnownPhrases,
    file: BinaryIO,
    run: Run,
) -> SystemScores:
    """Return a system's scores.

    Args:
        system: its rows.
        facts: what is known of the utterances.
        columns: which column of a row holds what.
        scorer: normalises the texts and chooses the unit.
        phrases: the phrases known to be invented.
        file: each utterance's texts, counts and alignment are appended to it, as JSON lines.
        run: a signal to stop it ends the loop.
    """
    scores = SystemScores(len(system.lines), Counter(row.reason for row in system.rejected))
    progress = Progress(f"scoring {system.name}", "utterances", len(system.lines))
    for utterance_id, row in progress.over(usable_rows(system)):
        run.stop_if_asked()
        position = facts.positions[utterance_id]
        reference, hypothesis = read_reference(row, columns), row[columns.hypothesis]
        seconds, probability = facts.seconds[position], row.get("no_speech_probability")
        scored = score_utterance(
            scorer,
            phrases,
            reference,
            hypothesis,
            facts.languages[position],
            seconds=seconds if seconds > 0 else None,
            no_speech_probability=probability if is_number(probability) else None,
        )
        groups = facts.group_values(position)
        groups |= length_groups(seconds, scored.chosen.reference_tokens)
        scores.add(position, scored, groups, facts.block(position))
        scores.offsets[position] = file.tell()
        texts = {"reference": reference, "hypothesis": hypothesis}
        line = {"id": utterance_id, "system": system.name, **texts, **scored.as_row()}
        file.write(to_line(line).encode())
    return scores


def compare_systems(
    scores: Mapping[str, SystemScores], blocks: CategoryColumn | None, resampling: Resampling
) -> dict[str, ComparisonSummary]:
    """Return how each system but the first compares with the first, the baseline.

    Utterances without a reference are left out, and without any there is nothing to compare.

    Args:
        scores: system -> its scores.
        blocks: the block of each utterance; None: utterances are resampled by themselves.
        resampling: how intervals and p-values are drawn.
    """
    name, *others = scores
    baseline = scores[name]
    has_reference = baseline.has_reference
    if not has_reference.any():
        return {}
    comparisons = {}
    for other in others:
        comparison = paired_difference(
            baseline.errors[has_reference],
            scores[other].errors[has_reference],
            baseline.tokens[has_reference],
            None if blocks is None else blocks.numbers()[has_reference],
            resampling,
        )
        low, high = comparison.interval or (None, None)
        comparisons[other] = ComparisonSummary(
            baseline=name,
            difference=comparison.difference,
            low=low,
            high=high,
            p_value=comparison.p_value,
            better=comparison.better,
            worse=comparison.worse,
            equal=comparison.equal,
        )
    return comparisons
