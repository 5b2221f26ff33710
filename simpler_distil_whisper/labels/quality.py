"""How good the labels of a run are: the content of `label_quality.json`, as typed data.

Owns what is counted of the labels, for which bins and groups, and which rows are shown. Rows
without a label are for `rejected`, the look of the page for `quality_page` and its template.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.data.jsonl import row_at
from simpler_distil_whisper.evaluation.metrics import Scorer, align
from simpler_distil_whisper.evaluation.scoring import compact
from simpler_distil_whisper.evaluation.tallies import HISTOGRAM_EDGES, rate_bins
from simpler_distil_whisper.labels.rejected import Rejected, Segmentation
from simpler_distil_whisper.labels.rows import LabelColumns
from simpler_distil_whisper.labels.table import (
    SIGN_LIMITS,
    Flags,
    LabelTable,
    Numbers,
    failure_signs,
    read_labels,
)
from simpler_distil_whisper.labels.threshold import THRESHOLDS, Suggestion, suggest_threshold

# Edges of the bins, of which the outer ones also hold what is beyond them.
DISTRIBUTION_BINS = {
    "average_log_probability": np.round(np.linspace(-2, 0, 21), 2),
    "no_speech_probability": np.round(np.linspace(0, 1, 21), 2),
    "compression_ratio": np.round(np.linspace(0, 4, 21), 2),
    "tokens_per_second": np.round(np.linspace(0, 30, 31), 2),
    "longest_repetition": np.round(np.linspace(0, 40, 21), 2),
}


class QualityOptions(StrictModel):
    """What label_quality.json and label_quality.html show."""

    group_by: list[str] = Field(
        [], description="Columns by which quality is also shown, besides language and speaker."
    )
    worst_rows: int = Field(
        20,
        ge=0,
        le=10_000,
        description="Rows that are shown with reference and label side by side.",
    )


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


def summarize_labels(
    labels: Path,
    columns: LabelColumns,
    options: QualityOptions,
    scorer: Scorer,
    rejected: Rejected,
    segmentation: Segmentation | None = None,
) -> LabelQuality:
    """Return how good the rows of a labelled manifest are.

    Args:
        labels: the labelled manifest.
        columns: which key of a row holds what.
        options: for which groups, and how many rows are shown in each of the lists.
        scorer: the one that has counted the error rates.
        rejected: the rows that have no label.
        segmentation: how recordings were cut into rows; None: none were.
    """
    group_by = [columns.language, columns.speaker, *options.group_by]
    table = read_labels(labels, columns, dict.fromkeys(column for column in group_by if column))
    signs = failure_signs(table, columns.language)
    suspicious = np.logical_or.reduce(list(signs.values()))
    rates, hours = table.numbers["error_rate"], table.hours
    lengths = table.numbers["reference_tokens"]
    suggestion = suggest_threshold(rates, hours, lengths)
    threshold = suggestion.max_error_rate
    ceiling = math.inf if threshold is None else threshold
    worst, beyond, dubious = (
        [_shown_row(table, index, signs, columns, scorer) for index in indices]
        for indices in _rows_to_show(table, signs, ceiling, options.worst_rows)
    )
    return LabelQuality(
        labels=labels.name,
        rows=len(rates),
        hours=_rounded(hours.sum()),
        rows_with_error_rate=int((~np.isnan(rates)).sum()),
        error_rate=_corpus_rate(rates, lengths),
        suggestion=suggestion,
        thresholds=[_kept_by(float(maximum), rates, hours) for maximum in THRESHOLDS],
        histogram=_rate_histogram(rates, hours, ceiling),
        signs=_signs(signs, suspicious, hours),
        distributions={
            name: _distribution(table.numbers[name], edges, signs[name])
            for name, edges in DISTRIBUTION_BINS.items()
        },
        groups={column: _groups(table, column, suspicious, threshold) for column in table.groups},
        worst_rows=worst,
        rows_beyond_threshold=beyond,
        suspicious_rows=dubious,
        rejected=rejected,
        segmentation=segmentation,
    )


def _amount(rows: Flags, hours: Numbers) -> Amount:
    return Amount(int(rows.sum()), _rounded(hours[rows].sum()))


def _kept_by(maximum: float, rates: Numbers, hours: Numbers) -> ThresholdAmount:
    kept = _amount(rates <= maximum, hours)
    return ThresholdAmount(maximum, kept.rows, kept.hours)


def _rounded(value: float) -> float:
    return round(float(value), 6)


def _corpus_rate(rates: Numbers, reference_tokens: Numbers) -> float | None:
    """Return all errors over all reference tokens; the counts behind a rate are whole numbers.

    Rows whose reference is empty have no rate, and what their labels invent is not counted.
    """
    known = ~np.isnan(rates)
    if not known.any():
        return None
    errors = np.round(rates[known] * reference_tokens[known])
    return _rounded(errors.sum() / reference_tokens[known].sum())


def _rate_histogram(rates: Numbers, hours: Numbers, threshold: float) -> ErrorRateHistogram:
    bins = rate_bins(rates)
    amounts = [_amount(members, hours) for members in bins]
    kept = rates <= threshold
    return ErrorRateHistogram(
        edges=HISTOGRAM_EDGES.tolist(),
        rows=[amount.rows for amount in amounts],
        hours=[amount.hours for amount in amounts],
        rows_kept=[int((members & kept).sum()) for members in bins],
        no_error=_amount(rates == 0, hours),
        above=_amount(rates > HISTOGRAM_EDGES[-1], hours),
    )


def _signs(signs: dict[str, Flags], suspicious: Flags, hours: Numbers) -> Signs:
    return Signs(
        limits=SIGN_LIMITS,
        **{name: _amount(flags, hours) for name, flags in signs.items()},
        any=_amount(suspicious, hours),
        none=_amount(~suspicious, hours),
    )


def _distribution(values: Numbers, edges: Numbers, suspicious: Flags) -> Distribution:
    known = ~np.isnan(values)

    def quantile(level: float) -> float | None:
        return round(float(np.quantile(values[known], level)), 4) if known.any() else None

    def rows_in_bins(rows: Flags) -> list[int]:
        inside = values[rows].clip(edges[0], edges[-1])
        counted: list[int] = np.histogram(inside, edges)[0].tolist()
        return counted

    return Distribution(
        minimum=quantile(0),
        p05=quantile(0.05),
        median=quantile(0.5),
        p95=quantile(0.95),
        maximum=quantile(1),
        edges=edges.tolist(),
        rows=rows_in_bins(known),
        rows_suspicious=rows_in_bins(known & suspicious),
    )


def _groups(
    table: LabelTable, column: str, suspicious: Flags, threshold: float | None
) -> list[Group]:
    """Return the rows by the values of a column, first the one that loses the most hours."""
    values, index, hours = table.group_values[column], table.groups[column], table.hours
    rates, lengths = table.numbers["error_rate"], table.numbers["reference_tokens"]

    def summed(weights: Numbers | Flags) -> Numbers:
        return np.bincount(index, weights, minlength=len(values)).astype(np.float64)

    known = ~np.isnan(rates)
    errors = summed(np.where(known, np.round(rates * lengths), 0))
    reference_tokens = summed(np.where(known, lengths, 0))
    # Where no error rate decides, those rows are good that show no sign of failure.
    kept = ~suspicious if threshold is None else rates <= threshold
    rows, all_hours = summed(np.ones(len(rates))), summed(hours)
    kept_rows, kept_hours = summed(kept), summed(hours * kept)
    suspicious_rows = summed(suspicious)
    return [
        Group(
            value=values[group],
            rows=int(rows[group]),
            hours=_rounded(all_hours[group]),
            error_rate=_rounded(errors[group] / reference_tokens[group])
            if reference_tokens[group]
            else None,
            rows_kept=int(kept_rows[group]),
            hours_kept=_rounded(kept_hours[group]),
            rows_suspicious=int(suspicious_rows[group]),
        )
        for group in np.lexsort((-all_hours, kept_hours - all_hours))
    ]


def _rows_to_show(
    table: LabelTable, signs: dict[str, Flags], threshold: float, number: int
) -> tuple[list[int], list[int], list[int]]:
    """Return the worst rows, those just beyond the threshold, and the most suspicious others.

    The second list tells whether the threshold is where slips end and failures begin; the third
    holds rows that no error rate condemns, as far as there are such.
    """
    rates, hours = table.numbers["error_rate"], table.hours
    sign_counts: Numbers = np.sum(list(signs.values()), axis=0, dtype=np.float64)
    log_probability = np.nan_to_num(table.numbers["average_log_probability"])
    beyond = rates > threshold

    def first(candidates: Flags, most: int, *keys: Numbers) -> list[int]:
        """Return the candidates that come first by the last key, then by those before it."""
        rows = np.flatnonzero(candidates)
        chosen: list[int] = rows[np.lexsort([key[rows] for key in keys])][:most].tolist()
        return chosen

    return (
        first(rates > 0, number, -hours, -rates),
        first(beyond, number // 2, -hours, rates),
        first((sign_counts > 0) & ~beyond, number, log_probability, -sign_counts),
    )


def _shown_row(
    table: LabelTable,
    index: int,
    signs: dict[str, Flags],
    columns: LabelColumns,
    scorer: Scorer,
) -> ShownRow:
    with table.path.open("rb") as file:
        row = row_at(file, table.offsets[index])
    unit, reference = row["error_unit"], row[columns.reference]
    alignment = []
    if reference is not None:
        language = row["error_language"]
        normalized_reference = scorer.normalize(reference, language)
        normalized_label = scorer.normalize(row[columns.label], language)
        alignment = compact(align(normalized_reference, normalized_label, unit), unit)
    return ShownRow(
        line=index + 1,
        id=row.get(columns.id) if columns.id else None,
        audio=row[columns.audio],
        audio_seconds=row["audio_seconds"],
        language=row.get(columns.language) if columns.language else None,
        error_rate=row[columns.error_rate],
        unit=unit,
        signs=[name for name, flags in signs.items() if flags[index]],
        reference=reference,
        label=row[columns.label],
        alignment=alignment,
    )
