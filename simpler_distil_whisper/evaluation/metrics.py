"""Error counts and error rates.

Owns the arithmetic of CER and WER: counts are added over utterances and divided once. It reads no
files and prints nothing. Called by labelling, by validation during training and by `eval.py`.
"""

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


class _AsTokens(jiwer.AbstractTransform):
    """What jiwer does to texts before it compares them: nothing, they are tokens already."""

    def __call__(self, texts: Any) -> Any:
        return texts


AS_TOKENS = _AsTokens()


class Edit(NamedTuple):
    """A run of neighbouring tokens with the same fate.

    Attributes:
        kind: "equal", "substitute" (the tokens pair up one to one), "delete" or "insert".
    """

    kind: str
    reference: list[str]
    hypothesis: list[str]


class Scorer:
    """Counts errors as a `Metric` says, on normalised copies of the texts.

    Attributes:
        normalize: makes the copy of one text that is compared, given its language if known.
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
        reference = self.normalize(reference, language)
        hypothesis = self.normalize(hypothesis, language)
        return count_errors(reference, hypothesis, self.unit(reference, hypothesis, language))


def align(reference: str, hypothesis: str, unit: Unit) -> list[Edit]:
    """Return a shortest way from the reference to the hypothesis, as runs of tokens in order."""
    ours, theirs = tokens(reference, unit), tokens(hypothesis, unit)
    found = jiwer.process_words([ours], [theirs], AS_TOKENS, AS_TOKENS)  # type: ignore[list-item]
    return [
        Edit(
            chunk.type,
            ours[chunk.ref_start_idx : chunk.ref_end_idx],
            theirs[chunk.hyp_start_idx : chunk.hyp_end_idx],
        )
        for chunk in found.alignments[0]
    ]


def count_edits(edits: Iterable[Edit]) -> ErrorCounts:
    """Return the error counts of an alignment."""
    counts = {"equal": 0, "substitute": 0, "delete": 0, "insert": 0}
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
