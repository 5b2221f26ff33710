"""What has no label: rejected rows by their reasons, and what was cut out of recordings.

Owns these parts of `label_quality.json`; `quality` owns the rest, about the labels.
"""

import contextlib
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from simpler_distil_whisper.data.audio import AudioError, audio_seconds
from simpler_distil_whisper.data.jsonl import Row, own_rows, seconds_in
from simpler_distil_whisper.data.row_checks import find_audio
from simpler_distil_whisper.labels.rows import PART, WHY_NO_REFERENCE, WINDOWS, LabelColumns


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
    lengths = [row["audio_seconds"] for _, row in own_rows(recordings) if WINDOWS in row]
    rows = rows_with_reference = 0
    seconds = 0.0
    without_reference = Counter[str]()
    for _, row in own_rows(labels):
        if PART in row:
            rows += 1
            seconds += row["audio_seconds"]
            rows_with_reference += row[columns.reference] is not None
            without_reference.update([row[WHY_NO_REFERENCE]] if row[WHY_NO_REFERENCE] else [])
    rejected_segments = summarize_rejected(rejected, columns, labels.parent)
    hours, hours_in_rows = round(sum(lengths) / 3600, 6), round(seconds / 3600, 6)
    return Segmentation(
        recordings=len(lengths),
        hours=hours,
        rows=rows,
        hours_in_rows=hours_in_rows,
        hours_without_speech=round(hours - hours_in_rows - rejected_segments.hours, 6),
        rejected=rejected_segments,
        rows_with_reference=rows_with_reference,
        rows_without_reference=dict(without_reference),
    )


def summarize_rejected(path: Path, columns: LabelColumns, folder: Path) -> Rejected:
    """Return how many rows were rejected for which kind of reason, and how long their audio is.

    Args:
        path: `rejected.jsonl`.
        columns: which key of a row holds what.
        folder: the manifest's, from which relative paths begin.
    """
    kinds: dict[str, RejectedKind] = {}
    for _, entry in own_rows(path):
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
        hours=round(sum((kind.hours for kind in kinds.values()), 0.0), 6),
        reasons=[replace(kind, hours=round(kind.hours, 6)) for kind in ordered],
    )


def _kind_of_reason(reason: str, audio: str) -> str:
    """Return what reasons of one kind have in common: no path, no numbers, no details."""
    if audio:  # whose letters a reason can have composed otherwise than the row
        reason, audio = (unicodedata.normalize("NFC", text) for text in (reason, audio))
        reason = reason.partition(f"{audio}: ")[2] or reason
    beginning = re.split(r"[:;(\"\[]", reason, maxsplit=1)[0]
    return re.sub(r"\d+(\.\d+)?", "N", beginning).strip()


def _rejected_seconds(row: Row, audio: str, columns: LabelColumns, folder: Path) -> float | None:
    """Return how long the audio of a rejected row is: as the row states it, else by its header."""
    duration = seconds_in(row, columns.duration_seconds)
    if duration is not None:
        return duration
    path = find_audio(audio, str(folder))
    with contextlib.suppress(AudioError):
        start = seconds_in(row, columns.start_seconds) or 0.0
        return audio_seconds(Path(path), start) if path else None
    return None
