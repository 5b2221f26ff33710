"""Packs: several short labelled utterances in one window, as one row with one audio file.

Owns which labels may be packed, which of them go together, and the rows and files that this makes.
A student that learns from full windows does not learn that speech ends after a few words.
"""

import io
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
from pydantic import Field

from simpler_distil_whisper.atomic import write_atomically, written_atomically
from simpler_distil_whisper.config import PositiveFloat, Ratio
from simpler_distil_whisper.data.audio import SAMPLE_RATE
from simpler_distil_whisper.data.jsonl import Row, category, own_rows, row_at, to_line
from simpler_distil_whisper.evaluation.metrics import Scorer
from simpler_distil_whisper.labels.filters import (
    ABOVE_MAXIMUM,
    BROKEN_CHARACTER,
    INCOMPLETE,
    EvidenceLimits,
    is_cut_off,
    why_dropped_by_error_rate,
)
from simpler_distil_whisper.labels.numbered_files import numbered_file, write_own_files
from simpler_distil_whisper.labels.rows import LabelColumns, RowLimits, row_limits
from simpler_distil_whisper.launch import is_main_process
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.run import Run
from simpler_distil_whisper.text.languages import join_texts
from simpler_distil_whisper.text.normalization import is_blank

Integers = npt.NDArray[np.int64]

PACKED_LABELS = "packed_labels.jsonl"
PACKS_BETWEEN_STOPS = 32  # how many are written before a stop signal is looked for
ROUNDING_SECONDS = 1e-5  # by which the sum of rounded lengths may exceed the window


class PackOptions(EvidenceLimits):
    """Utterances of one speaker joined into windows; the labels one by one are written anyway."""

    enabled: bool = Field(
        False, description="Also write packed_labels.jsonl and the audio files that it names."
    )
    max_seconds: PositiveFloat | None = Field(
        None, description="Longest audio of a pack; null: the model's window."
    )
    max_error_rate: Ratio | None = Field(
        0.1,
        description="Labels with a higher error rate, or with none, enter no pack; null: all do.",
    )
    group_by: list[str] | None = Field(
        None,
        description="Columns whose values the parts of a pack share, such as that of a recording; "
        "null: the speaker's. A row without such a value is a pack of its own.",
    )

    def shared_columns(self, columns: LabelColumns) -> list[str]:
        """Return the columns whose values the parts of a pack share, besides the language."""
        if self.group_by is not None:
            return self.group_by
        return [columns.speaker] if columns.speaker else []


@dataclass
class _OpenPack:
    """A pack to which rows may still be added, and what it holds so far."""

    number: int
    seconds: float = 0.0
    tokens: int = 0

    def has_room_for(self, row: Row, limits: RowLimits) -> bool:
        seconds, tokens = self.seconds + row["audio_seconds"], self.tokens + _tokens(row)
        return seconds <= limits.seconds + ROUNDING_SECONDS and tokens <= limits.tokens

    def add(self, row: Row) -> None:
        self.seconds += row["audio_seconds"]
        self.tokens += _tokens(row)


@dataclass(frozen=True)
class PackPlan:
    """Which rows form which pack, about 16 bytes a row.

    Attributes:
        offsets: int64 [parts]: the byte in the labelled manifest at which each part's row begins,
            pack by pack.
        starts: int64 [packs + 1]: the index in `offsets` at which each pack begins.
        left_out: reason -> how many rows are in no pack.
        alone: how many rows lack the values by which rows are packed together.
    """

    offsets: Integers
    starts: Integers
    left_out: Counter[str]
    alone: int

    def __len__(self) -> int:
        """Return how many packs there are."""
        return len(self.starts) - 1

    def parts(self, labels: Path, number: int) -> list[Row]:
        """Return the labelled rows of one pack, in order."""
        offsets = self.offsets[self.starts[number] : self.starts[number + 1]]
        with labels.open("rb") as file:
            return [row_at(file, offset) for offset in offsets]


def pack_labels(
    labels: Path,
    columns: LabelColumns,
    options: PackOptions,
    teacher: ModelFolder,
    scorer: Scorer,
    run: Run,
    *,
    workers: int,
) -> str:
    """Write `packed_labels.jsonl` and its audio; return a sentence that accounts for all labels.

    Every process calls it: each writes its share of the audio, the main one the rows.

    Args:
        labels: the labelled manifest.
        columns: which key of a row holds what.
        options: which labels are packed, and how.
        teacher: whose window and decoder are the limits.
        scorer: the one that has counted the error rates.
        run: asked whether to stop.
        workers: threads that write audio.

    Raises:
        DataError: the audio of a part cannot be read any more.
        Interrupted: a stop signal came.
    """
    from simpler_distil_whisper.model.processes import wait_for_everyone

    shared = options.shared_columns(columns)
    plan = plan_packs(labels, columns, options, row_limits(options.max_seconds, teacher))
    write_audio(labels, plan, columns, workers, run)
    wait_for_everyone()
    if is_main_process():
        language = [columns.language] if columns.language else []
        write_packs(labels, plan, columns, language + shared, scorer)
    reasons = "".join(f", {rows} left out ({why})" for why, rows in plan.left_out.items())
    packed = labels.with_name(PACKED_LABELS)
    counts = f"{packed}: {len(plan)} packs of {len(plan.offsets)} labels{reasons}.\n"
    if not plan.alone:
        return counts
    return counts + (
        f"{plan.alone} labels are packs of their own, since their rows lack {', '.join(shared)}: "
        "pack.group_by names the columns whose values the parts of a pack share.\n"
    )


def plan_packs(
    labels: Path, columns: LabelColumns, options: PackOptions, limits: RowLimits
) -> PackPlan:
    """Return which rows form which pack; within a group they stay in the manifest's order.

    Each row joins the open pack of its group; if it does not fit in, it opens the group's next one.

    Args:
        labels: the labelled manifest.
        columns: which key of a row holds what.
        options: which labels are packed, and what the parts of a pack share besides the language.
        limits: what a pack may hold.
    """
    shared = options.shared_columns(columns)
    offsets, packs, left_out = array("q"), array("q"), Counter[str]()
    open_packs: dict[str | None, _OpenPack] = {}
    count = alone = 0
    for offset, row in own_rows(labels):
        if reason := _why_left_out(row, columns, options, limits):
            left_out[reason] += 1
            continue
        group = _group(row, columns, shared)
        pack = open_packs.get(group)
        if pack is None or not pack.has_room_for(row, limits):
            pack = _OpenPack(count)
            count += 1
        pack.add(row)
        if group is None:
            alone += 1
        else:
            open_packs[group] = pack
        offsets.append(offset)
        packs.append(pack.number)
    pack_numbers = np.array(packs, np.int64)
    order = np.argsort(pack_numbers, kind="stable")
    starts = np.searchsorted(pack_numbers[order], np.arange(count + 1))
    return PackPlan(np.array(offsets, np.int64)[order], starts, left_out, alone)


def packed_row(
    parts: Sequence[Row],
    number: int,
    columns: LabelColumns,
    shared: Sequence[str],
    scorer: Scorer,
) -> Row:
    """Return the row of one pack: a labelled row like others, with `segments` and `parts`.

    `segments` have their times in the packed audio: the teacher's segments, or each whole part
    where there are none. `parts` tells where each part comes from. The error rate is that of the
    joined texts, so that every token counts the same.

    Args:
        parts: the labelled rows, in order.
        number: of the pack.
        columns: which key of a row holds what.
        shared: columns whose value is the same in all parts.
        scorer: the one that has counted the error rates.
    """
    label = join_texts([part[columns.label] for part in parts])
    references = [part[columns.reference] for part in parts]
    reference = None if None in references else join_texts(references)
    language = parts[0]["error_language"]
    rate = tokens = None
    if reference is not None:
        counts = scorer.count(reference, label, language)
        rate, tokens = counts.rate, counts.reference_tokens
    own = {columns.id, *columns.of_audio}  # they tell where a part's audio is, not the pack's
    ends = np.cumsum([part["audio_seconds"] for part in parts]).round(6).tolist()
    starts = [0.0, *ends[:-1]]
    return {
        **({columns.id: f"pack-{number:06d}"} if columns.id else {}),
        columns.audio: str(audio_path(number)),
        **{name: parts[0].get(name) for name in shared if name not in own},
        columns.label: label,
        **_joined_sampled_texts(parts, columns),
        columns.reference: reference,
        columns.error_rate: None if rate is None else round(rate, 6),
        "error_unit": parts[0]["error_unit"],
        "error_language": language,
        "reference_tokens": tokens,
        "audio_seconds": ends[-1],
        "segments": [
            segment
            for start, part in zip(starts, parts, strict=True)
            for segment in _segments(part, start, columns)
        ],
        "parts": [_origin(part, start, columns) for start, part in zip(starts, parts, strict=True)],
    }


def _joined_sampled_texts(parts: Sequence[Row], columns: LabelColumns) -> Row:
    """Return the column of sampled texts: as many as all parts have; none without the column."""
    if columns.sampled_texts is None:
        return {}
    joined = zip(*(part.get(columns.sampled_texts) or [] for part in parts), strict=False)
    return {columns.sampled_texts: [*map(join_texts, joined)]}


def audio_path(number: int) -> Path:
    """Return the audio file of a pack, relative to the folder of `packed_labels.jsonl`."""
    return numbered_file(Path("packed", "audio"), number, "flac")


def write_packs(
    labels: Path,
    plan: PackPlan,
    columns: LabelColumns,
    shared: Sequence[str],
    scorer: Scorer,
) -> None:
    """Write `packed_labels.jsonl` beside the labels, once the audio of all packs is there."""
    with written_atomically(labels.with_name(PACKED_LABELS)) as file:
        for number in range(len(plan)):
            parts = plan.parts(labels, number)
            file.write(to_line(packed_row(parts, number, columns, shared, scorer)).encode())


def write_audio(
    labels: Path, plan: PackPlan, columns: LabelColumns, workers: int, run: Run
) -> None:
    """Write this process's share of the audio files; files of an earlier run stay as they are.

    Raises:
        DataError: the audio of a part cannot be read any more.
        Interrupted: a stop signal came.
    """

    def write(number: int, path: Path) -> None:
        """Write the audio of all parts, one after the other, as 16 kHz mono FLAC."""
        waveform = np.concatenate([columns.load(part) for part in plan.parts(labels, number)])
        content = io.BytesIO()  # of a full disk, libsndfile does not always tell
        soundfile.write(content, waveform, SAMPLE_RATE, "PCM_16", format="FLAC")
        write_atomically(path, content.getvalue())

    write_own_files(
        len(plan),
        lambda number: labels.parent / audio_path(number),
        write,
        ("packing", "packs"),
        run,
        workers=workers,
        at_once=PACKS_BETWEEN_STOPS,
    )


def _why_left_out(
    row: Row, columns: LabelColumns, options: PackOptions, limits: RowLimits
) -> str | None:
    label = row[columns.label]
    if is_blank(label):
        return "no text"
    if BROKEN_CHARACTER in label:  # for which training would drop the whole pack
        return "broken character"
    if dropped := why_dropped_by_error_rate(row, columns.error_rate, options.max_error_rate):
        kind, _ = dropped
        return "error rate above pack.max_error_rate" if kind == ABOVE_MAXIMUM else kind
    if is_cut_off(row):
        return INCOMPLETE
    if doubt := options.why_dropped_by_evidence(row):
        return doubt[0]
    if row["audio_seconds"] > limits.seconds + ROUNDING_SECONDS:
        return "longer than a pack"
    return None


def _tokens(row: Row) -> int:
    """Return how many tokens the label takes, with a timestamp before it and one after it."""
    return round(float(row["tokens_per_second"]) * float(row["audio_seconds"])) + 2


def _group(row: Row, columns: LabelColumns, shared: Sequence[str]) -> str | None:
    """Return a key that is equal for rows that may be packed together; None: with no other row."""
    values = [row.get(column) for column in shared]
    if None in map(category, values):
        return None
    language = row.get(columns.language) if columns.language else None
    return json.dumps([language, row["error_unit"], row["error_language"], *values])


def _segments(part: Row, start: float, columns: LabelColumns) -> list[Row]:
    """Return the segments of a part, with times from the beginning of the pack.

    A time that a model has put behind the end of the audio is not let into the next part.
    """
    seconds = part["audio_seconds"]
    whole = {"start_seconds": 0.0, "end_seconds": seconds, "text": part[columns.label]}
    segments = part.get(columns.segments) if columns.segments else None
    return [
        {
            "start_seconds": round(start + min(segment["start_seconds"], seconds), 3),
            "end_seconds": round(start + _end_within(segment, seconds), 3),
            "text": segment["text"],
        }
        for segment in segments or [whole]
    ]


def _end_within(segment: Row, seconds: float) -> float:
    """Return where a segment ends; the last one of a part may lack its end, or overshoot it."""
    end: float | None = segment["end_seconds"]
    return seconds if end is None else min(end, seconds)


def _origin(part: Row, start: float, columns: LabelColumns) -> Row:
    """Return where a part of a pack comes from and where in the pack it begins."""
    names = (columns.id, *columns.of_audio, columns.error_rate, "audio_seconds")
    known = {name: part[name] for name in names if name is not None and name in part}
    return {**known, "offset_seconds": start}
