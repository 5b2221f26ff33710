"""How good labels are: the signs of each, what each threshold would keep, and which rows are bad.

Owns the signs that need no reference, the rule that suggests a threshold, and the shape of
`label_quality.json`, of which the page is another view. It decodes no audio. Called by
`run_pseudo_labelling.py`.
"""

import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.config import NonNegativeInt, StrictModel
from simpler_distil_whisper.data.audio import AudioError, audio_seconds
from simpler_distil_whisper.data.jsonl import Row, placed_lines
from simpler_distil_whisper.evaluation.hallucination import (
    MAX_NO_SPEECH_PROBABILITY,
    MAX_REPETITION,
)
from simpler_distil_whisper.evaluation.metrics import Scorer, align
from simpler_distil_whisper.evaluation.scoring import compact
from simpler_distil_whisper.pages import render, stacks
from simpler_distil_whisper.text.languages import longest_repetition, tokens

Numbers = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

# Columns that `signs_of` adds to a labelled row.
SIGN_COLUMNS = (
    *("error_unit", "error_language", "reference_tokens", "audio_seconds", "tokens_per_second"),
    "longest_repetition",
)

# Beyond these a label looks like a failure. Both are where openai/whisper decodes again.
MAX_COMPRESSION_RATIO = 2.4
MIN_AVERAGE_LOG_PROBABILITY = -1.0
MAX_SPEED_FACTOR = 4.0  # to the median of the language, either way

STEPS = 50
GRID = np.round(np.linspace(0, 0.5, STEPS + 1), 2)  # thresholds that are tried
# A stricter threshold than one error in ten loses hours at which the teacher was nearly right; and
# no label may pass of which more than a fifth is wrong only because its sentence is short.
LOWEST_FLOOR, HIGHEST_FLOOR = 0.1, 0.2
FEW_ROWS = 100  # whose rates say little about a threshold

RATE_EDGES = np.round(np.linspace(0, 1, 21), 2)
MAX_GROUPS = 10_000  # values of a column that are told apart; later ones are counted together
OTHER_VALUES = "(other values)"

# What the distributions show: column -> edges of its bins; the outer bins hold all beyond them.
DISTRIBUTIONS = {
    "average_log_probability": np.round(np.linspace(-2, 0, 21), 2),
    "no_speech_probability": np.round(np.linspace(0, 1, 21), 2),
    "compression_ratio": np.round(np.linspace(0, 4, 21), 2),
    "tokens_per_second": np.round(np.linspace(0, 30, 31), 2),
    "longest_repetition": np.round(np.linspace(0, 40, 21), 2),
}


class QualityOptions(StrictModel):
    """What label_quality.json and label_quality.html show."""

    group_by: list[str] = Field(
        [], description="Columns for whose values it is also shown, beside language and speaker."
    )
    worst_rows: NonNegativeInt = Field(
        20, description="Rows that are shown with reference and label side by side."
    )


@dataclass(frozen=True)
class LabelColumns:
    """Which key of a labelled row holds what; None: no such column."""

    id: str | None
    audio: str
    start_seconds: str | None
    duration_seconds: str | None
    language: str | None
    label: str
    reference: str
    error_rate: str
    segments: str | None = None


def signs_of(
    hypothesis: str,
    tokens_said: int,
    seconds: float,
    reference: str | None,
    scorer: Scorer,
    language: str | None,
) -> Row:
    """Return what a labelled row tells about its label besides the decoder's own evidence.

    Args:
        hypothesis: the label, as it is.
        tokens_said: how many tokens of the model it has.
        seconds: how long the decoded audio is.
        reference: what was said, as it is; None where nobody has written it down.
        scorer: normalises both and chooses the unit.
        language: what decides the unit; None lets the script decide.
    """
    said = scorer.normalize(hypothesis, language)
    wanted = scorer.normalize(reference or "", language)
    unit = scorer.unit(wanted, said, language)
    return {
        "error_unit": None if reference is None else unit,
        "error_language": language,  # not the one that the model may have detected
        "reference_tokens": None if reference is None else len(tokens(wanted, unit)),
        "audio_seconds": round(seconds, 6),
        "tokens_per_second": round(tokens_said / seconds, 4),
        "longest_repetition": longest_repetition(tokens(said, unit)),
    }


@dataclass
class LabelTable:
    """The numbers of all rows of a labelled manifest, about 100 bytes each.

    Attributes:
        offsets: where in the file each row begins, by which the few that are shown are found again.
        numbers: column -> its value in each row; NaN where a row has none.
        empty, incomplete: whether the label has no text, whether it was cut off.
        groups: column -> which of `group_values` each row belongs to.
        group_values: column -> its values, as strings.
    """

    offsets: npt.NDArray[np.int64]
    numbers: dict[str, Numbers]
    empty: Flags
    incomplete: Flags
    groups: dict[str, npt.NDArray[np.int32]]
    group_values: dict[str, list[str]]

    @property
    def hours(self) -> Numbers:
        """The length of each row's audio."""
        return self.numbers["audio_seconds"] / 3600


def read_labels(path: Path, columns: LabelColumns, group_by: Iterable[str]) -> LabelTable:
    """Return the numbers in a labelled manifest, read row by row."""
    names = {"error_rate": columns.error_rate, "audio_seconds": "audio_seconds"}
    names |= {"reference_tokens": "reference_tokens"} | {name: name for name in DISTRIBUTIONS}
    offsets, flags = array("q"), (array("b"), array("b"))
    numbers = {name: array("d") for name in names}
    groups: dict[str, array[int]] = {column: array("i") for column in group_by}
    values: dict[str, dict[str, int]] = {column: {} for column in groups}
    for offset, row in _rows(path):
        offsets.append(offset)
        for name, column in names.items():
            value = row.get(column)
            numbers[name].append(math.nan if value is None else value)
        flags[0].append(not row[columns.label].strip())
        flags[1].append(row.get("complete") is False)
        for column, known in values.items():
            groups[column].append(_group_number(known, row.get(column)))
    return LabelTable(
        np.array(offsets, np.int64),
        {name: np.array(column, np.float64) for name, column in numbers.items()},
        np.array(flags[0], np.bool_),
        np.array(flags[1], np.bool_),
        {column: np.array(members, np.int32) for column, members in groups.items()},
        {column: list(known) for column, known in values.items()},
    )


def find_signs(table: LabelTable, language: str | None) -> dict[str, Flags]:
    """Return which rows show which sign of a failed label; none of them needs a reference.

    Args:
        table: the numbers.
        language: the column by whose values speeds are compared; None compares all rows.
    """
    numbers = table.numbers
    speed, median = numbers["tokens_per_second"], _median_speed(table, language)
    return {
        "compression_ratio": numbers["compression_ratio"] > MAX_COMPRESSION_RATIO,
        "average_log_probability": numbers["average_log_probability"] < MIN_AVERAGE_LOG_PROBABILITY,
        "no_speech_probability": numbers["no_speech_probability"] > MAX_NO_SPEECH_PROBABILITY,
        "longest_repetition": numbers["longest_repetition"] > MAX_REPETITION,
        "tokens_per_second": (speed * MAX_SPEED_FACTOR < median)
        | (speed > MAX_SPEED_FACTOR * median),
        "empty": table.empty,
        "incomplete": table.incomplete,
    }


def suggest_threshold(rates: Numbers, hours: Numbers, reference_tokens: Numbers) -> dict[str, Any]:
    """Return the threshold that is worth its hours, and why; None where nothing speaks for one.

    The knee: hours kept, as a share of those that 0.50 keeps, rise with the threshold; the knee is
    where they are furthest above a straight rise, so that going on costs more errors than it gains
    hours. It is raised to the error rate of one wrong token in a reference of median length, within
    0.10 and 0.20, since a single slip in a short sentence is no failure.

    Args:
        rates: error rate of each row, NaN where there is none.
        hours: length of each row's audio.
        reference_tokens: length of each reference; NaN where there is none.
    """
    known = ~np.isnan(rates)
    if not known.any():
        return _no_threshold(
            "No row has an error rate, because none has a reference. What is left to judge the "
            "labels by are the signs that need none."
        )
    kept = np.array([hours[rates <= threshold].sum() for threshold in GRID])
    if not kept[-1]:
        return _no_threshold(
            "Every error rate is above 0.50. Such labels and references do not belong together: "
            "look whether language, script and columns are what they should be."
        )
    above_the_line = np.round(kept / kept[-1] - GRID / GRID[-1], 9)
    knee = float(GRID[above_the_line.argmax()])
    length = float(np.median(reference_tokens[known]))
    slip = math.ceil(round(100 / length, 6)) / 100
    floor = min(max(slip, LOWEST_FLOOR), HIGHEST_FLOOR)
    threshold = max(knee, floor)
    keeps = rates <= threshold
    return {
        "max_error_rate": threshold,
        "rows": int(keeps.sum()),
        "hours": _rounded(hours[keeps].sum()),
        "share_of_hours": _rounded(hours[keeps].sum() / hours.sum()),
        "knee": knee,
        "one_slip": slip,
        "reasoning": _reasoning(threshold, knee, length, rates, hours),
    }


def _no_threshold(why: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("max_error_rate", "rows", "hours", "share_of_hours", "knee"))
    return {**nothing, "one_slip": None, "reasoning": [why]}


def _reasoning(
    threshold: float, knee: float, length: float, rates: Numbers, hours: Numbers
) -> list[str]:
    """Return the reasons for a threshold, one sentence or two each."""
    known, beyond = ~np.isnan(rates), rates > threshold
    share = hours[rates <= threshold].sum() / hours.sum()
    gain = f"{1 / STEPS:.0%} of the hours that 0.50 would keep"
    reasons = [
        f"The curve of hours has its knee at {knee:.2f}: up to there each 0.01 of threshold buys "
        f"on average more than {gain}, beyond it less."
        if knee
        else f"Above 0, each 0.01 of threshold buys on average less than {gain}."
    ]
    if threshold > max(knee, LOWEST_FLOOR):
        reasons.append(
            f"Raised to {threshold:.2f}, because a reference has {length:g} tokens (median), of "
            f"which a single wrong one is an error rate of {1 / length:.3g}: a slip, no failure."
        )
    elif threshold > knee:
        reasons.append(
            f"Raised to {threshold:.2f}: published experiments (Gandhi et al. 2023) lost hours "
            "and gained nothing with lower ones."
        )
    if beyond.any():
        reasons.append(
            f"Beyond it are {beyond.sum()} of {known.sum()} rows: their median error rate is "
            f"{np.median(rates[beyond]):.2f}, and {(rates[beyond] >= 0.5).sum()} of them are wrong "
            "in every second token or more."
        )
    else:
        reasons.append("No row is beyond it.")
    if known.sum() < FEW_ROWS:
        reasons.append(f"Only {known.sum()} rows have an error rate: look at them one by one.")
    if share < 0.5:
        reasons.append(
            f"It keeps only {share:.0%} of all hours: before you train, look at the worst rows. "
            "Teacher and references may differ in script, language or how numbers are written."
        )
    return reasons


def summarize_labels(
    path: Path, columns: LabelColumns, group_by: Sequence[str], scorer: Scorer, worst_rows: int
) -> dict[str, Any]:
    """Return `label_quality.json` but for the rejected rows.

    Args:
        path: the labelled manifest.
        columns: which key of a row holds what.
        group_by: columns for whose values the numbers are also given.
        scorer: the one that has counted the error rates.
        worst_rows: how many rows are shown with their alignment, in each of the lists.
    """
    wanted = [columns.language] if columns.language else []
    table = read_labels(path, columns, dict.fromkeys([*wanted, *group_by]))
    signs = find_signs(table, columns.language)
    rates, hours = table.numbers["error_rate"], table.hours
    lengths = table.numbers["reference_tokens"]
    suggestion = suggest_threshold(rates, hours, lengths)
    threshold = suggestion["max_error_rate"]
    suspicious = np.logical_or.reduce(list(signs.values()))
    shown = _rows_to_show(table, signs, threshold, worst_rows)
    return {
        "labels": path.name,
        "rows": len(rates),
        "hours": _rounded(hours.sum()),
        "rows_with_error_rate": int((~np.isnan(rates)).sum()),
        "error_rate": _corpus_rate(rates, lengths),
        "suggestion": suggestion,
        "thresholds": [
            {"max_error_rate": float(t), **_rows_and_hours(rates <= t, hours)} for t in GRID
        ],
        "histogram": _rate_histogram(rates, hours, threshold),
        "signs": {
            "limits": {
                "compression_ratio": MAX_COMPRESSION_RATIO,
                "average_log_probability": MIN_AVERAGE_LOG_PROBABILITY,
                "no_speech_probability": MAX_NO_SPEECH_PROBABILITY,
                "longest_repetition": MAX_REPETITION,
                "tokens_per_second": MAX_SPEED_FACTOR,
            },
            **{name: _rows_and_hours(flags, hours) for name, flags in signs.items()},
            "any": _rows_and_hours(suspicious, hours),
            "none": _rows_and_hours(~suspicious, hours),
        },
        "distributions": {
            name: _distribution(table.numbers[name], edges, signs[name])
            for name, edges in DISTRIBUTIONS.items()
        },
        "groups": {
            column: _groups(table, column, suspicious, threshold) for column in table.groups
        },
        **{
            name: [_shown_row(path, table, index, signs, columns, scorer) for index in indices]
            for name, indices in shown.items()
        },
    }


def summarize_rejected(path: Path, columns: LabelColumns, folder: Path) -> dict[str, Any]:
    """Return how many rows were rejected for which kind of reason, and how long their audio is.

    Args:
        path: `rejected.jsonl`.
        columns: which key of a row holds what.
        folder: the manifest's, from which relative paths begin.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for _, entry in _rows(path):
        row = entry["row"] if isinstance(entry["row"], dict) else {}
        audio = row.get(columns.audio)
        audio = audio if isinstance(audio, str) else ""
        kind = kinds.setdefault(
            _kind_of(entry["reason"], audio), {"rows": 0, "hours": 0.0, "rows_of_unknown_length": 0}
        )
        kind["rows"] += 1
        seconds = _rejected_seconds(row, audio, columns, folder)
        kind["rows_of_unknown_length"] += seconds is None
        kind["hours"] += (seconds or 0.0) / 3600
    ordered = sorted(kinds.items(), key=lambda item: -item[1]["rows"])
    return {
        "rows": sum(kind["rows"] for kind in kinds.values()),
        "hours": _rounded(sum(kind["hours"] for kind in kinds.values())),
        "reasons": [
            {"reason": name, **kind, "hours": _rounded(kind["hours"])} for name, kind in ordered
        ],
    }


def write_label_quality(folder: Path, summary: dict[str, Any]) -> None:
    """Write `label_quality.json` and the same as a page, `label_quality.html`."""
    content = json.dumps(summary, ensure_ascii=False, indent=1, allow_nan=False)
    write_atomically(folder / "label_quality.json", f"{content}\n".encode())
    histogram = summary["histogram"]
    page = render(
        "label_quality.html",
        quality=summary,
        kept_shares=[s["hours"] / (summary["hours"] or 1) for s in summary["thresholds"]],
        dropped_rows=[
            rows - kept
            for rows, kept in zip(histogram["rows"], histogram["rows_kept"], strict=True)
        ],
        stacks=stacks,
    )
    write_atomically(folder / "label_quality.html", page.encode())


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield every row of a file that the run has written, with its offset in bytes."""
    for _, offset, line in placed_lines(path, "output_dir"):
        yield offset, json.loads(line)


def _group_number(known: dict[str, int], value: object) -> int:
    name = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if name not in known and len(known) >= MAX_GROUPS:
        name = OTHER_VALUES
    return known.setdefault(name, len(known))


def _median_speed(table: LabelTable, language: str | None) -> Numbers:
    """Return, for each row, the median tokens per second of the rows in its language."""
    speed = table.numbers["tokens_per_second"]
    groups = table.groups[language] if language else np.zeros(len(speed), np.int32)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    median = np.empty(len(speed))
    for members in np.split(order, starts):
        median[members] = np.median(speed[members]) if len(members) else 0.0
    return median


def _rows_and_hours(which: Flags, hours: Numbers) -> dict[str, Any]:
    return {"rows": int(which.sum()), "hours": _rounded(hours[which].sum())}


def _rounded(value: float) -> float:
    return round(float(value), 6)


def _or_infinite(threshold: float | None) -> float:
    return math.inf if threshold is None else threshold


def _corpus_rate(rates: Numbers, reference_tokens: Numbers) -> float | None:
    """Return all errors over all reference tokens; the counts behind a rate are whole numbers."""
    known = ~np.isnan(rates)
    if not known.any():
        return None
    errors = np.round(rates[known] * reference_tokens[known])
    return _rounded(errors.sum() / reference_tokens[known].sum())


def _rate_histogram(rates: Numbers, hours: Numbers, threshold: float | None) -> dict[str, Any]:
    """Return rows and hours without any error, between neighbouring edges, and above the last."""
    neighbours = zip(RATE_EDGES[:-1], RATE_EDGES[1:], strict=True)
    bins = [(rates > low) & (rates <= high) for low, high in neighbours]
    each = [_rows_and_hours(members, hours) for members in bins]
    kept = rates <= _or_infinite(threshold)
    return {
        "edges": RATE_EDGES.tolist(),
        "rows": [one["rows"] for one in each],
        "hours": [one["hours"] for one in each],
        "rows_kept": [int((members & kept).sum()) for members in bins],
        "no_error": _rows_and_hours(rates == 0, hours),
        "above": _rows_and_hours(rates > RATE_EDGES[-1], hours),
    }


def _distribution(values: Numbers, edges: Numbers, suspicious: Flags) -> dict[str, Any]:
    """Return how one number is spread, and how many rows of each bin show it as a sign."""
    known = ~np.isnan(values)

    def rows_in_bins(which: Flags) -> list[int]:
        inside = values[which].clip(edges[0], edges[-1])
        counted: list[int] = np.histogram(inside, edges)[0].tolist()
        return counted

    levels = {"minimum": 0, "p05": 0.05, "median": 0.5, "p95": 0.95, "maximum": 1}
    return {
        name: round(float(np.quantile(values[known], level)), 4) if known.any() else None
        for name, level in levels.items()
    } | {
        "edges": edges.tolist(),
        "rows": rows_in_bins(known),
        "rows_suspicious": rows_in_bins(known & suspicious),
    }


def _groups(
    table: LabelTable, column: str, suspicious: Flags, threshold: float | None
) -> list[dict[str, Any]]:
    """Return the numbers of each value of a column, first the one that loses the most hours."""
    values, index, hours = table.group_values[column], table.groups[column], table.hours
    rates, lengths = table.numbers["error_rate"], table.numbers["reference_tokens"]

    def summed(weights: Numbers | Flags) -> Numbers:
        return np.bincount(index, weights, minlength=len(values)).astype(np.float64)

    known = ~np.isnan(rates)
    errors = summed(np.where(known, np.round(rates * lengths), 0))
    wanted = summed(np.where(known, lengths, 0))
    # Where no error rate decides, those rows are good that show no sign of failure.
    kept = ~suspicious if threshold is None else rates <= threshold
    rows, all_hours, suspicious_rows = summed(known | True), summed(hours), summed(suspicious)
    kept_rows, kept_hours = summed(kept), summed(hours * kept)
    return [
        {
            "value": values[group],
            "rows": int(rows[group]),
            "hours": _rounded(all_hours[group]),
            "error_rate": _rounded(errors[group] / wanted[group]) if wanted[group] else None,
            "rows_kept": int(kept_rows[group]),
            "hours_kept": _rounded(kept_hours[group]),
            "rows_suspicious": int(suspicious_rows[group]),
        }
        for group in np.lexsort((-all_hours, kept_hours - all_hours))
    ]


def _rows_to_show(
    table: LabelTable, signs: dict[str, Flags], threshold: float | None, number: int
) -> dict[str, list[int]]:
    """Return the rows with the highest rates, those just beyond the threshold, the most suspicious.

    The second list tells whether the threshold is where slips end and failures begin; the third
    holds rows that no error rate condemns, as far as there are such.
    """
    rates, hours = table.numbers["error_rate"], table.hours
    found: Numbers = np.sum(list(signs.values()), axis=0, dtype=np.float64)
    log_probability = np.nan_to_num(table.numbers["average_log_probability"])
    beyond = rates > _or_infinite(threshold)

    def first(which: Flags, most: int, *keys: Numbers) -> list[int]:
        """Return those of the rows that come first by the last key, then by those before it."""
        rows = np.flatnonzero(which)
        chosen: list[int] = rows[np.lexsort([key[rows] for key in keys])][:most].tolist()
        return chosen

    return {
        "worst_rows": first(rates > 0, number, -hours, -rates),
        "rows_beyond_threshold": first(beyond, number // 2, -hours, rates),
        "suspicious_rows": first((found > 0) & ~beyond, number, log_probability, -found),
    }


def _shown_row(
    path: Path,
    table: LabelTable,
    index: int,
    signs: dict[str, Flags],
    columns: LabelColumns,
    scorer: Scorer,
) -> dict[str, Any]:
    """Return one row with its alignment: of the normalised copies, [kind, reference, label]."""
    with path.open("rb") as file:
        file.seek(table.offsets[index])
        row = json.loads(file.readline())
    unit, reference = row["error_unit"], row[columns.reference]
    edits = []
    if reference is not None:
        said = scorer.normalize(row[columns.label], row["error_language"])
        wanted = scorer.normalize(reference, row["error_language"])
        edits = compact(align(wanted, said, unit), unit)
    return {
        "line": int(index) + 1,
        "id": row.get(columns.id) if columns.id else None,
        "audio": row[columns.audio],
        "audio_seconds": row["audio_seconds"],
        "language": row.get(columns.language) if columns.language else None,
        "error_rate": row[columns.error_rate],
        "unit": unit,
        "signs": [name for name, flags in signs.items() if flags[index]],
        "reference": reference,
        "label": row[columns.label],
        "alignment": edits,
    }


def _kind_of(reason: str, audio: str) -> str:
    """Return what reasons of one kind have in common: no path, no numbers, no details."""
    reason = reason.partition(f"{audio}: ")[2] or reason if audio else reason
    return re.sub(r"\d+(\.\d+)?", "N", re.split(r"[:;(\"\[]", reason, maxsplit=1)[0]).strip()


def _rejected_seconds(row: Row, audio: str, columns: LabelColumns, folder: Path) -> float | None:
    """Return how long a rejected row is, as it says itself or, from where it begins, its header."""
    start, duration = (
        row.get(column) if column else None
        for column in (columns.start_seconds, columns.duration_seconds)
    )
    if isinstance(duration, int | float) and 0 <= duration < math.inf:
        return float(duration)
    start = float(start) if isinstance(start, int | float) and 0 <= start < math.inf else 0.0
    for path in (folder / audio, Path(audio)):
        try:
            return audio_seconds(path, start)
        except (AudioError, ValueError):  # a name that no file can have
            continue
    return None
