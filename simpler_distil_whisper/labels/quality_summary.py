"""The content of `label_quality.json`: amounts, histograms, groups and rows to look at, typed.

The fields of a class are the keys of its JSON object, in order. Nothing is computed here. The parts
that `rejected` and `threshold` make have their types there.
"""

from dataclasses import dataclass

from simpler_distil_whisper.labels.rejected import Rejected, Segmentation
from simpler_distil_whisper.labels.threshold import Suggestion


@dataclass(frozen=True)
class Amount:
    """How many rows, and how long their audio is."""

    rows: int
    hours: float


@dataclass(frozen=True)
class ThresholdAmount:
    """What a threshold keeps."""

    max_error_rate: float
    rows: int
    hours: float


@dataclass(frozen=True)
class ErrorRateHistogram:
    """The error rates in bins, each of which holds its upper edge.

    Attributes:
        edges: of the bins.
        rows, hours: in each bin.
        rows_kept: those of the rows that the suggested threshold keeps.
        no_error: the rows without any error, which are in no bin.
        above: the rows above the last edge.
    """

    edges: list[float]
    rows: list[int]
    hours: list[float]
    rows_kept: list[int]
    no_error: Amount
    above: Amount


@dataclass(frozen=True)
class Signs:
    """The rows that show each sign of a failed label, any of them, or none."""

    limits: dict[str, float]
    compression_ratio: Amount
    average_log_probability: Amount
    no_speech_probability: Amount
    longest_repetition: Amount
    tokens_per_second: Amount
    empty: Amount
    incomplete: Amount
    any: Amount
    none: Amount


@dataclass(frozen=True)
class Distribution:
    """How one number of the labels is spread; the quantiles are None where no row has it.

    Attributes:
        minimum, p05, median, p95, maximum: quantiles.
        edges: of the bins.
        rows: in each bin.
        rows_suspicious: those of the rows whose number is a sign of a failed label.
    """

    minimum: float | None
    p05: float | None
    median: float | None
    p95: float | None
    maximum: float | None
    edges: list[float]
    rows: list[int]
    rows_suspicious: list[int]


@dataclass(frozen=True)
class Group:
    """The rows that share a value of a column.

    Attributes:
        value: of the column.
        rows, hours: all of them.
        error_rate: of all that have a reference; None where none has.
        rows_kept, hours_kept: with the suggested threshold; without one, those that show no sign.
        rows_suspicious: those that show a sign of a failed label.
    """

    value: str
    rows: int
    hours: float
    error_rate: float | None
    rows_kept: int
    hours_kept: float
    rows_suspicious: int


@dataclass(frozen=True)
class ShownRow:
    """One row to look at; `alignment` is of the normalised texts: [kind, reference, label]."""

    line: int
    id: object
    audio: str
    audio_seconds: float
    language: str | None
    error_rate: float | None
    unit: str | None
    signs: list[str]
    reference: str | None
    label: str
    alignment: list[list[str]]


@dataclass(frozen=True)
class LabelQuality:
    """The content of `label_quality.json`, in its order.

    Attributes:
        labels: name of the labelled manifest.
        rows, hours: of all labels.
        rows_with_error_rate: how many have a reference to count errors with.
        error_rate: all errors over all reference tokens.
        suggestion: the suggested threshold.
        thresholds: what each threshold would keep.
        histogram: the error rates.
        signs: the signs of failed labels.
        distributions: the numbers behind these signs.
        groups: column -> the rows by its values, first the one that loses the most hours.
        worst_rows: rows with the highest error rates.
        rows_beyond_threshold: rows just above it, where slips should end and failures begin.
        suspicious_rows: rows with the most signs, among those that the threshold keeps.
        rejected: the rows without a label.
        segmentation: how recordings were cut into rows; None: none were.
    """

    labels: str
    rows: int
    hours: float
    rows_with_error_rate: int
    error_rate: float | None
    suggestion: Suggestion
    thresholds: list[ThresholdAmount]
    histogram: ErrorRateHistogram
    signs: Signs
    distributions: dict[str, Distribution]
    groups: dict[str, list[Group]]
    worst_rows: list[ShownRow]
    rows_beyond_threshold: list[ShownRow]
    suspicious_rows: list[ShownRow]
    rejected: Rejected
    segmentation: Segmentation | None
