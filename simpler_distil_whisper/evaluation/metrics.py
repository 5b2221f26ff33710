"""Error counts and error rates: the arithmetic of CER and WER.

Counts are added over utterances and divided once, so that a corpus's rate is not a mean of rates.
It reads no files and knows nothing of intervals.
"""

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jiwer
from pydantic import Field

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.text.languages import Unit, tokens, unit_for
from simpler_distil_whisper.text.normalization import TextNormalization, make_normalizer


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
    """How many tokens of a hypothesis and its reference agree and differ; counts add up."""

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
        """How many edits turn the reference into the hypothesis."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference_tokens(self) -> int:
        """How many tokens the reference has."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float | None:
        """Errors per reference token; None where the reference has no token.

        It is None and not infinity, because an insertion into an empty reference still counts in a
        sum, where the other utterances' tokens are the denominator.
        """
        return self.errors / self.reference_tokens if self.reference_tokens else None


class _AsTokens(jiwer.AbstractTransform):
    """Hands jiwer the tokens as they are, which else it would make from texts itself."""

    def __call__(self, texts: Any) -> Any:
        return texts


AS_TOKENS = _AsTokens()


class Edit(NamedTuple):
    """A run of neighbouring tokens that are edited alike.

    Attributes:
        kind: "equal", "substitute" (the tokens pair up one to one), "delete" or "insert".
        reference: the tokens of the reference; none for "insert".
        hypothesis: the tokens of the hypothesis; none for "delete".
    """

    kind: str
    reference: list[str]
    hypothesis: list[str]


class Scorer:
    """Counts errors by the rules of a `Metric`, on normalised copies of the texts.

    Attributes:
        normalize: (text, language or None) -> the copy that is compared.
    """

    def __init__(self, metric: Metric) -> None:
        # Of a label, errors are counted and other things measured: it is normalised for each.
        self.normalize = functools.lru_cache(maxsize=4)(make_normalizer(metric.normalization))
        self._metric, self._unit = metric, metric.unit

    def __reduce__(self) -> tuple[type["Scorer"], tuple[Metric]]:
        """Return how another process makes the same scorer."""
        return Scorer, (self._metric,)

    def unit(self, reference: str | None, hypothesis: str, language: str | None) -> Unit:
        """Return the unit in which this pair of normalised texts is counted, never "auto".

        The hypothesis decides only where there is no reference, and so no error to count: else two
        systems could be compared in two units.
        """
        if self._unit != "auto":
            return self._unit
        return unit_for(language, hypothesis if reference is None else reference)

    def count(self, reference: str, hypothesis: str, language: str | None = None) -> ErrorCounts:
        """Return the errors of a hypothesis; both texts are given before normalisation."""
        reference = self.normalize(reference, language)
        hypothesis = self.normalize(hypothesis, language)
        return count_errors(reference, hypothesis, self.unit(reference, hypothesis, language))


def align(reference: str, hypothesis: str, unit: Unit) -> list[Edit]:
    """Return an alignment with the fewest errors, as runs of tokens in order."""
    reference_tokens, hypothesis_tokens = tokens(reference, unit), tokens(hypothesis, unit)
    output = jiwer.process_words(
        [reference_tokens],  # type: ignore[list-item]
        [hypothesis_tokens],  # type: ignore[list-item]
        AS_TOKENS,
        AS_TOKENS,
    )
    return [
        Edit(
            chunk.type,
            reference_tokens[chunk.ref_start_idx : chunk.ref_end_idx],
            hypothesis_tokens[chunk.hyp_start_idx : chunk.hyp_end_idx],
        )
        for chunk in output.alignments[0]
    ]


def count_edits(edits: Iterable[Edit]) -> ErrorCounts:
    """Return the error counts of an alignment."""
    counts: Counter[str] = Counter()
    for edit in edits:
        counts[edit.kind] += max(len(edit.reference), len(edit.hypothesis))
    return ErrorCounts(
        hits=counts["equal"],
        substitutions=counts["substitute"],
        deletions=counts["delete"],
        insertions=counts["insert"],
    )


def count_errors(reference: str, hypothesis: str, unit: Unit) -> ErrorCounts:
    """Return the counts of an alignment with the fewest errors between two texts.

    Nothing is normalised, but whitespace never counts as a character. Where several alignments have
    as few errors, the counts are those of one of them.
    """
    return count_edits(align(reference, hypothesis, unit))


def total(per_utterance: Iterable[ErrorCounts]) -> ErrorCounts:
    """Return the sum of the counts of utterances, or of a Counter of them.

    The rate of the sum is the corpus's error rate.
    """
    summed = [0, 0, 0, 0]
    for counts, times in Counter(per_utterance).items():
        summed[0] += times * counts.hits
        summed[1] += times * counts.substitutions
        summed[2] += times * counts.deletions
        summed[3] += times * counts.insertions
    return ErrorCounts(*summed)
