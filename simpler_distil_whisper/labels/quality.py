"""How good the labels of a run are: the content of `label_quality.json`, as typed data.

Owns what is counted, for which bins and groups, and which rows are shown. How the page looks is
for `quality_page` and its template.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import Field

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.data.audio import AudioError, audio_seconds
from simpler_distil_whisper.data.jsonl import Row, placed_lines
from simpler_distil_whisper.evaluation.metrics import Scorer, align
from simpler_distil_whisper.evaluation.scoring import compact
from simpler_distil_whisper.labels.rows import PART, WHY_NO_REFERENCE, WINDOWS, LabelColumns
from simpler_distil_whisper.labels.table import (
    SIGN_LIMITS,
    Flags,
    LabelTable,
    Numbers,
    failure_signs,
    read_labels,
)
from simpler_distil_whisper.labels.threshold import THRESHOLDS, Suggestion, suggest_threshold

# Edges of the bins; those of the distributions also hold what is beyond the outer ones.
ERROR_RATE_BINS = np.round(np.linspace(0, 1, 21), 2)
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
        [], description="Columns for whose values it is also shown, besides language and speaker."
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


@dataclass
class RejectedKind:
    """The rejected rows with one kind of reason."""

    reason: str
    rows: int = 0
    hours: float = 0.0
    rows_of_unknown_length: int = 0


@dataclass(frozen=True)
class Rejected:
    """The rows without a label, by kind of reason."""

    rows: int
    hours: float
    reasons: list[RejectedKind]


@dataclass(frozen=True)
class Segmentation:
    """What has become of the recordings that were cut; the last three hours add up to the first.

    Attributes:
        recordings, hours: those longer than the model's window.
        rows, hours_in_rows: what they were cut into.
        hours_without_speech: what was left out.
        rejected: the stretches with speech or text that are in no row.
        rows_with_reference: how many rows have their own part of a reference.
        rows_without_reference: reason why a part of it is not known -> rows.
    """

    recordings: int
    hours: float
    rows: int
    hours_in_rows: float
    hours_without_speech: float
    rejected: Rejected
    rows_with_reference: int
    rows_without_reference: dict[str, int]


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
        signs=Signs(
            limits=SIGN_LIMITS,
            **{name: _amount(flags, hours) for name, flags in signs.items()},
            any=_amount(suspicious, hours),
            none=_amount(~suspicious, hours),
        ),
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


def summarize_segmentation(
    labels: Path, recordings: Path, rejected: Path, columns: LabelColumns
) -> Segmentation:
    """Return what has become of the recordings that were cut into rows.

    Args:
        labels: the labelled manifest.
        recordings: `recordings.jsonl`: the rows before they were cut.
        rejected: `rejected_segments.jsonl`.
        columns: which key of a row holds what.
    """
    lengths = [row["audio_seconds"] for row in _rows(recordings) if WINDOWS in row]
    rows = rows_with_reference = 0
    seconds = 0.0
    without_reference = Counter[str]()
    for row in _rows(labels):
        if PART in row:
            rows += 1
            seconds += row["audio_seconds"]
            rows_with_reference += row[columns.reference] is not None
            without_reference.update([row[WHY_NO_REFERENCE]] if row[WHY_NO_REFERENCE] else [])
    rejected_segments = summarize_rejected(rejected, columns, labels.parent)
    hours, hours_in_rows = _rounded(sum(lengths) / 3600), _rounded(seconds / 3600)
    return Segmentation(
        recordings=len(lengths),
        hours=hours,
        rows=rows,
        hours_in_rows=hours_in_rows,
        hours_without_speech=_rounded(hours - hours_in_rows - rejected_segments.hours),
        rejected=rejected_segments,
        rows_with_reference=rows_with_reference,
        rows_without_reference=dict(without_reference),
    )


def _rows(path: Path) -> Iterator[Row]:
    for _, _, line in placed_lines(path, "output_dir"):
        yield json.loads(line)


def summarize_rejected(path: Path, columns: LabelColumns, folder: Path) -> Rejected:
    """Return how many rows were rejected for which kind of reason, and how long their audio is.

    Args:
        path: `rejected.jsonl`.
        columns: which key of a row holds what.
        folder: the manifest's, from which relative paths begin.
    """
    kinds: dict[str, RejectedKind] = {}
    for _, _, line in placed_lines(path, "output_dir"):
        entry = json.loads(line)
        row = entry["row"] if isinstance(entry["row"], dict) else {}
        audio = row.get(columns.audio)
        audio = audio if isinstance(audio, str) else ""
        reason = _kind_of_reason(entry["reason"], audio)
        kind = kinds.setdefault(reason, RejectedKind(reason))
        kind.rows += 1
        seconds = _rejected_seconds(row, audio, columns, folder)
        if seconds is None:
            kind.rows_of_unknown_length += 1
        else:
            kind.hours += seconds / 3600
    ordered = sorted(kinds.values(), key=lambda kind: -kind.rows)
    return Rejected(
        rows=sum(kind.rows for kind in kinds.values()),
        hours=_rounded(sum(kind.hours for kind in kinds.values())),
        reasons=[replace(kind, hours=_rounded(kind.hours)) for kind in ordered],
    )


def _amount(rows: Flags, hours: Numbers) -> Amount:
    return Amount(int(rows.sum()), _rounded(hours[rows].sum()))


def _kept_by(maximum: float, rates: Numbers, hours: Numbers) -> ThresholdAmount:
    kept = _amount(rates <= maximum, hours)
    return ThresholdAmount(maximum, kept.rows, kept.hours)


def _rounded(value: float) -> float:
    return round(float(value), 6)


def _corpus_rate(rates: Numbers, reference_tokens: Numbers) -> float | None:
    """Return all errors over all reference tokens; the counts behind a rate are whole numbers."""
    known = ~np.isnan(rates)
    if not known.any():
        return None
    errors = np.round(rates[known] * reference_tokens[known])
    return _rounded(errors.sum() / reference_tokens[known].sum())


def _rate_histogram(rates: Numbers, hours: Numbers, threshold: float) -> ErrorRateHistogram:
    neighbours = zip(ERROR_RATE_BINS[:-1], ERROR_RATE_BINS[1:], strict=True)
    bins = [(rates > low) & (rates <= high) for low, high in neighbours]
    amounts = [_amount(members, hours) for members in bins]
    kept = rates <= threshold
    return ErrorRateHistogram(
        edges=ERROR_RATE_BINS.tolist(),
        rows=[amount.rows for amount in amounts],
        hours=[amount.hours for amount in amounts],
        rows_kept=[int((members & kept).sum()) for members in bins],
        no_error=_amount(rates == 0, hours),
        above=_amount(rates > ERROR_RATE_BINS[-1], hours),
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
        file.seek(table.offsets[index])
        row = json.loads(file.readline())
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


def _kind_of_reason(reason: str, audio: str) -> str:
    """Return what reasons of one kind have in common: no path, no numbers, no details."""
    if audio:
        reason = reason.partition(f"{audio}: ")[2] or reason
    beginning = re.split(r"[:;(\"\[]", reason, maxsplit=1)[0]
    return re.sub(r"\d+(\.\d+)?", "N", beginning).strip()


def _rejected_seconds(row: Row, audio: str, columns: LabelColumns, folder: Path) -> float | None:
    """Return how long the audio of a rejected row is: as the row states it, else by its header."""
    duration = _time_in(row, columns.duration_seconds)
    if duration is not None:
        return duration
    start = _time_in(row, columns.start_seconds) or 0.0
    for path in (folder / audio, Path(audio)):
        try:
            return audio_seconds(path, start)
        except (AudioError, ValueError):  # a name that no file can have
            continue
    return None


def _time_in(row: Row, column: str | None) -> float | None:
    """Return the seconds under a key; None where no possible time stands there."""
    value = row.get(column) if column else None
    return float(value) if isinstance(value, int | float) and 0 <= value < math.inf else None
