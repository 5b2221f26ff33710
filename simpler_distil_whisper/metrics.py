"""Error counts, error rates and their intervals.

Owns the arithmetic of CER and WER: counts are added over utterances and divided once. It reads no
files and prints nothing. Called by labelling, by validation during training and by `eval.py`.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pydantic import Field
from rapidfuzz.distance import Levenshtein

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.text import (
    TextNormalization,
    Unit,
    make_normalizer,
    tokens,
    unit_for,
)

RESAMPLED_CELLS = 2_000_000  # numbers of 8 bytes held at a time by the bootstrap


class Metric(StrictModel):
    """How a hypothesis is compared with its reference."""

    unit: Unit = Field(
        default="auto",
        description='What is counted. "auto": characters for languages written without spaces and '
        'for Korean, words for others; "mixed": Han characters and kana one by one, else words.',
    )
    normalization: TextNormalization = TextNormalization()


@dataclass(frozen=True, slots=True, order=True)
class ErrorCounts:
    """How a hypothesis differs from its reference, in tokens; counts of utterances add up."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        """Return the counts of both together."""
        return ErrorCounts(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    @property
    def errors(self) -> int:
        """Return how many edits turn the reference into the hypothesis."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference_tokens(self) -> int:
        """Return how many tokens the reference has."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float | None:
        """Return errors per reference token, or None where the reference has no token.

        None and not infinity: an insertion into an empty reference still counts in a sum, where
        the other utterances' tokens are the denominator.
        """
        return self.errors / self.reference_tokens if self.reference_tokens else None

    def as_dict(self) -> dict[str, int]:
        """Return the four counts by name."""
        return {
            "hits": self.hits,
            "substitutions": self.substitutions,
            "deletions": self.deletions,
            "insertions": self.insertions,
        }


class Edit(NamedTuple):
    """A run of neighbouring tokens with the same fate.

    Attributes:
        kind: "equal", "replace" (the tokens pair up one to one), "delete" or "insert".
    """

    kind: str
    reference: list[str]
    hypothesis: list[str]


class Scorer:
    """Counts errors as a `Metric` says, on normalised copies of the texts.

    Attributes:
        normalize: makes the copy of one text that is compared.
    """

    def __init__(self, metric: Metric) -> None:
        """Prepare the normalisation once for many utterances."""
        self.normalize = make_normalizer(metric.normalization)
        self._unit = metric.unit

    def unit(self, reference: str, hypothesis: str, language: str | None) -> Unit:
        """Return the unit in which this pair of texts is counted, never "auto"."""
        if self._unit != "auto":
            return self._unit
        return unit_for(language, reference or hypothesis)

    def count(self, reference: str, hypothesis: str, language: str | None = None) -> ErrorCounts:
        """Return the errors of a hypothesis, both texts given as they are."""
        reference, hypothesis = self.normalize(reference), self.normalize(hypothesis)
        return count_errors(reference, hypothesis, self.unit(reference, hypothesis, language))


def align(reference: str, hypothesis: str, unit: Unit) -> list[Edit]:
    """Return a shortest way from the reference to the hypothesis, as runs of tokens in order."""
    ours, theirs = tokens(reference, unit), tokens(hypothesis, unit)
    return [
        Edit(step.tag, ours[step.src_start : step.src_end], theirs[step.dest_start : step.dest_end])
        for step in Levenshtein.opcodes(ours, theirs)
    ]


def count_edits(edits: Iterable[Edit]) -> ErrorCounts:
    """Return the error counts of an alignment."""
    counts = {"equal": 0, "replace": 0, "delete": 0, "insert": 0}
    for edit in edits:
        counts[edit.kind] += max(len(edit.reference), len(edit.hypothesis))
    return ErrorCounts(*counts.values())


def count_errors(reference: str, hypothesis: str, unit: Unit) -> ErrorCounts:
    """Return the fewest substitutions, deletions and insertions between two texts.

    Nothing is normalised, but whitespace never counts as a character. Where several alignments are
    equally short, the split into the three kinds is one of theirs.
    """
    return count_edits(align(reference, hypothesis, unit))


def total(per_utterance: Iterable[ErrorCounts]) -> ErrorCounts:
    """Return the summed counts of utterances, or of a Counter of them; its rate is the corpus's."""
    summed = [0, 0, 0, 0]
    for counts, times in Counter(per_utterance).items():
        summed[0] += times * counts.hits
        summed[1] += times * counts.substitutions
        summed[2] += times * counts.deletions
        summed[3] += times * counts.insertions
    return ErrorCounts(*summed)


def bootstrap_interval(
    per_utterance: Iterable[ErrorCounts],
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of the corpus error rate over utterances.

    Drawing n utterances with replacement is drawing how often each distinct pair (errors, reference
    tokens) comes up, which is a multinomial: a million utterances have few distinct pairs. Samples
    without any reference token have no rate and are left out.

    Args:
        per_utterance: the counts of each utterance, or a Counter of them.
        confidence: the share of the samples' rates that lies inside the interval.
        samples: how many corpora are drawn.
        seed: the same seed and counts give the same interval, in whatever order they come.

    Returns:
        The lower and the upper end; None for fewer than two utterances, which tell nothing about
        how utterances vary, and where no reference has a token.
    """
    pairs: Counter[tuple[int, int]] = Counter()
    for counts, times in Counter(per_utterance).items():
        pairs[counts.errors, counts.reference_tokens] += times
    utterances = sum(pairs.values())
    if utterances < 2 or not any(reference_tokens for _, reference_tokens in pairs):
        return None
    distinct = sorted(pairs)
    values = np.array(distinct, dtype=np.int64)
    shares = np.array([pairs[pair] for pair in distinct]) / utterances
    random = np.random.default_rng(seed)
    rows = max(1, RESAMPLED_CELLS // len(distinct))
    sums = np.concatenate(
        [
            random.multinomial(utterances, shares, size=min(rows, samples - start)) @ values
            for start in range(0, samples, rows)
        ]
    )
    errors, reference_tokens = sums[sums[:, 1] > 0].T
    if not len(errors):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(errors / reference_tokens, [tail, 1 - tail])
    return float(low), float(high)
