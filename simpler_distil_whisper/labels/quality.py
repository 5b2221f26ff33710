"""How good the labels of a run are, in numbers: the content of `label_quality.json`.

Owns what is counted of the labels, for which bins and groups, and which rows are shown. The types
are in `quality_summary`. Rows without a label are for `rejected`, the look of the page for
`quality_page` and its template.
"""

import math
from pathlib import Path

import numpy as np
from pydantic import Field

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.data.jsonl import row_at
from simpler_distil_whisper.evaluation.metrics import Scorer, align
from simpler_distil_whisper.evaluation.scoring import compact
from simpler_distil_whisper.evaluation.tallies import HISTOGRAM_EDGES, rate_bins
from simpler_distil_whisper.labels.quality_summary import (
    Amount,
    Distribution,
    ErrorRateHistogram,
    Group,
    LabelQuality,
    ShownRow,
    Signs,
    ThresholdAmount,
)
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
from simpler_distil_whisper.labels.threshold import THRESHOLDS, suggest_threshold

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
    suggestion = suggest_threshold(rates, hours, lengths, table.without_reference)
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
    kept = ~suspicious if threshold is None else (rates <= threshold) | table.without_reference
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
