"""The content of `summary.json`: error rates, signs, confusions and comparisons, typed.

The fields of a class are the keys of its JSON object, in order. Nothing is computed here.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """A corpus error rate, its interval and the counts behind it.

    Attributes:
        rate: errors per reference token; None where no reference has a token.
        low: lower end of the interval; None where there is no interval.
        high: upper end.
    """

    rate: float | None
    low: float | None
    high: float | None
    hits: int
    substitutions: int
    deletions: int
    insertions: int
    reference_tokens: int
    utterances: int


@dataclass(frozen=True)
class RatesByUnit:
    """Rates of the same utterances in each one's chosen unit, in characters and in words."""

    corpus: Rates
    character: Rates
    word: Rates


@dataclass(frozen=True)
class GroupRates(Rates):
    """Rates of a group of utterances in the chosen unit, and in characters and in words."""

    character: Rates
    word: Rates


@dataclass(frozen=True)
class CodeSwitchRates:
    """Rates of each script alone, in the utterances whose reference has both."""

    utterances: int
    han: Rates
    latin: Rates


@dataclass(frozen=True)
class SignCount:
    """In how many utterances a sign was seen, and in which share of all."""

    utterances: int
    share: float


@dataclass(frozen=True)
class HallucinationSummary:
    """Signs of invented text.

    Attributes:
        insertion_rate: insertions per reference token.
        length_ratio: tokens of the hypotheses per token of the references.
        any: utterances with at least one sign.
        limits: sign -> the limit beyond which it counts.
        phrases: known phrase -> in how many utterances it was invented.
    """

    utterances: int
    without_reference: int
    insertion_rate: float | None
    length_ratio: float | None
    any: SignCount
    signs: dict[str, SignCount]
    limits: Mapping[str, object]
    phrases: dict[str, int]


@dataclass(frozen=True)
class FrequentConfusions:
    """The most frequent errors, each as [token, times] or [reference, hypothesis, times]."""

    substitutions: list[list[str | int]]
    deletions: list[list[str | int]]
    insertions: list[list[str | int]]


@dataclass(frozen=True)
class RateHistogram:
    """How many utterances have which error rate.

    Attributes:
        edges: of the bins; a bin holds its upper edge.
        utterances: in each bin.
        no_error: utterances without an error, which are in no bin.
        above: utterances with a rate above the last edge.
        no_rate: utterances whose reference has no token.
    """

    edges: list[float]
    utterances: list[int]
    no_error: int
    above: int
    no_rate: int


@dataclass(frozen=True)
class SystemSummary(RatesByUnit):
    """All that is reported of one system.

    Attributes:
        raw: rates of the texts before normalisation.
        groups: column -> group -> rates.
        code_switch: None where no reference has both scripts.
        units: unit -> utterances counted in it.
        rejected: reason -> rows that were not scored.
    """

    raw: RatesByUnit
    groups: dict[str, dict[str, GroupRates]]
    code_switch: CodeSwitchRates | None
    hallucination: HallucinationSummary
    confusions: FrequentConfusions
    histogram: RateHistogram
    units: dict[str, int]
    rejected: dict[str, int]


@dataclass(frozen=True)
class ComparisonSummary:
    """A system compared with the baseline; what the numbers mean, `intervals.Comparison` tells."""

    baseline: str
    difference: float | None
    low: float | None
    high: float | None
    p_value: float
    better: float
    worse: float
    equal: float


@dataclass(frozen=True)
class Summary:
    """The whole of `summary.json`.

    Attributes:
        blocks: how many blocks of utterances were resampled; None: utterances were.
        systems: name -> what is reported; the first is the baseline.
        comparisons: name of each other system -> how it compares with the baseline.
    """

    unit: str
    confidence: float
    bootstrap_samples: int
    bootstrap_block_column: str | None
    blocks: int | None
    seed: int
    utterances: int
    systems: dict[str, SystemSummary]
    comparisons: dict[str, ComparisonSummary]
