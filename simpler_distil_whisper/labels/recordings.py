"""Labelled recordings longer than the model's window -> a manifest of rows to learn from.

Owns the files. What stands in a row is up to `cut_rows`, where a recording is cut to
`segmentation`.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simpler_distil_whisper.atomic import write_atomically, written_atomically
from simpler_distil_whisper.data.jsonl import own_rows, row_at, to_line
from simpler_distil_whisper.evaluation.metrics import Scorer
from simpler_distil_whisper.labels.cut_rows import RecordingCutter
from simpler_distil_whisper.labels.numbered_files import numbered_file, write_own_files
from simpler_distil_whisper.labels.rows import RECORDING, WINDOWS, LabelColumns, row_limits
from simpler_distil_whisper.labels.segmentation import SegmentationOptions
from simpler_distil_whisper.launch import is_main_process
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.run import Run

RECORDINGS = "recordings.jsonl"
REJECTED_SEGMENTS = "rejected_segments.jsonl"
CUT_FOLDER = "segmentation"  # until the rows of all recordings are there


@dataclass(frozen=True)
class _Recording:
    """A labelled recording.

    Attributes:
        number: among all that are cut.
        offset: of its row in `recordings.jsonl`, in bytes.
        name: with which the ids of its rows begin, unlike that of any other recording.
    """

    number: int
    offset: int
    name: str

    def rows_path(self, folder: Path) -> Path:
        """Return the file that keeps its rows until those of all recordings are there."""
        return numbered_file(folder / CUT_FOLDER, self.number, "json")


def cut_recordings(
    labels: Path,
    columns: LabelColumns,
    options: SegmentationOptions,
    teacher: ModelFolder,
    scorer: Scorer,
    run: Run,
    *,
    workers: int,
) -> str:
    """Write the labelled manifest: the rows of `recordings.jsonl`, the long ones cut into rows.

    Returns a sentence about the files.

    Every process calls it: each cuts its share, the main one writes the manifest, and beside it
    `rejected_segments.jsonl`. What an earlier run has cut stays as it is.

    Args:
        labels: the labelled manifest to write; `recordings.jsonl` lies beside it.
        columns: which key of a row holds what.
        options: how recordings are cut.
        teacher: whose window and decoder are the limits.
        scorer: the one that has counted the error rates.
        run: asked whether to stop.
        workers: threads that cut.

    Raises:
        DataError: the audio of a recording cannot be read any more, or no row is left.
        Interrupted: a stop signal came.
    """
    from simpler_distil_whisper.model.processes import wait_for_everyone

    recordings = _long_recordings(labels.with_name(RECORDINGS))
    if not labels.exists():
        limits = row_limits(options.max_seconds, teacher)
        cutter = RecordingCutter(columns, limits, options.min_silence_seconds, scorer)
        _cut_own(recordings, labels, cutter, run, max(workers, 1))
        wait_for_everyone()
        if is_main_process():
            _merge(labels, recordings)
    if is_main_process():
        _tidy_up(labels.parent, recordings)
    wait_for_everyone()
    rejected = labels.with_name(REJECTED_SEGMENTS)
    return f"{labels}: the same, cut into rows; {rejected}: what of it is in no row, and why.\n"


def _cut_own(
    recordings: Sequence[_Recording], labels: Path, cutter: RecordingCutter, run: Run, workers: int
) -> None:
    """Write the rows of this process's share; those that an earlier run has cut stay."""

    def cut(number: int, path: Path) -> None:
        with labels.with_name(RECORDINGS).open("rb") as file:
            row = row_at(file, recordings[number].offset)
        write_atomically(path, to_line(cutter(row, recordings[number].name)).encode())

    write_own_files(
        len(recordings),
        lambda number: recordings[number].rows_path(labels.parent),
        cut,
        ("cutting", "recordings"),
        run,
        workers=workers,
        at_once=workers,
    )


def _long_recordings(path: Path) -> list[_Recording]:
    """Return those recordings of a file that were decoded window by window."""
    recordings, names, copies = list[_Recording](), set[str](), Counter[str]()
    for offset, row in own_rows(path):
        if WINDOWS not in row:
            continue
        name = row[RECORDING]
        while name in names:
            copies[row[RECORDING]] += 1
            name = f"{row[RECORDING]}-{copies[row[RECORDING]] + 1}"
        names.add(name)
        recordings.append(_Recording(len(recordings), offset, name))
    return recordings


def _merge(labels: Path, recordings: Sequence[_Recording]) -> None:
    """Write the rows of all recordings in their order, and what is rejected of them."""
    cut = {recording.offset: recording.rows_path(labels.parent) for recording in recordings}
    with (
        written_atomically(labels) as kept,
        written_atomically(labels.with_name(REJECTED_SEGMENTS)) as rejected,
    ):
        for offset, row in own_rows(labels.with_name(RECORDINGS)):
            if offset not in cut:
                kept.write(to_line(row).encode())
                continue
            content = json.loads(cut[offset].read_bytes())
            kept.writelines(to_line(row).encode() for row in content["rows"])
            rejected.writelines(to_line(entry).encode() for entry in content["rejected"])


def _tidy_up(folder: Path, recordings: Sequence[_Recording]) -> None:
    """Remove the files that `_cut_own` has written, and the folders that this leaves empty."""
    paths = [recording.rows_path(folder) for recording in recordings]
    for path in paths:
        path.unlink(missing_ok=True)
    for own in [*dict.fromkeys(path.parent for path in paths), folder / CUT_FOLDER]:
        with contextlib.suppress(OSError):  # it is not there, or somebody else's file is in it
            own.rmdir()
