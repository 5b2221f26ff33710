"""Recordings become the rows of the labelled manifest, however often the run is stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from test_cut_rows import SECONDS, recording
from tiny import read_rows, write_rows

from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.quality import QualityOptions
from simpler_distil_whisper.labels.quality_page import assess_labels
from simpler_distil_whisper.labels.recordings import cut_recordings
from simpler_distil_whisper.labels.rows import LabelColumns, LabellingColumns, OutputColumns
from simpler_distil_whisper.labels.segmentation import SegmentationOptions
from simpler_distil_whisper.model import processes
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.run import DataError
from simpler_distil_whisper.stopping import Interrupted

COLUMNS = LabelColumns.from_config(
    LabellingColumns(),
    OutputColumns(),
    with_segments=True,
    with_unconverted=False,
    with_windows=True,
)
SCORER = Scorer(Metric())
FILES = ("pseudo_labels.jsonl", "rejected_segments.jsonl")
SHORT = {
    **{key: value for key, value in recording().items() if key not in ("windows", "recording")},
    "id": "short",
    "no_speech_probability": 0.0,
    "average_log_probability": -0.1,
    "compression_ratio": 1.0,
    "longest_repetition": 0,
    "tokens_per_second": 7.0,
    "reference_tokens": None,
    "error_unit": None,
}


class Stop:
    """A run that is stopped after some recordings."""

    def __init__(self, after: float) -> None:
        self.left = after

    def stop_if_asked(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupted


def cut(folder: Path, after: float = float("inf"), seconds: float = 8.0) -> None:
    cut_recordings(
        folder / "pseudo_labels.jsonl",
        COLUMNS,
        SegmentationOptions(enabled=True, max_seconds=seconds, min_silence_seconds=0.1),
        read_model_folder(REPOSITORY / "demo_data/teacher", None, "teacher"),
        SCORER,
        Stop(after),  # type: ignore[arg-type]
        workers=1,
    )


def prepared(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir()
    write_rows(folder / "recordings.jsonl", list(rows))
    write_rows(folder / "rejected.jsonl", [])
    return folder


def test_a_stopped_run_and_several_processes_write_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [recording(), SHORT, recording(speaker="y"), recording(id=None, recording="m.jsonl:4")]
    whole = prepared(tmp_path / "whole", *rows)
    cut(whole)
    ids = [row["id"] for row in read_rows(whole / "pseudo_labels.jsonl")]
    assert ids == [
        "call-part-0001",
        "call-part-0002",
        "short",
        "call-2-part-0001",
        "call-2-part-0002",
        "m.jsonl:4-part-0001",
        "m.jsonl:4-part-0002",
    ]
    assert read_rows(whole / "pseudo_labels.jsonl")[2] == SHORT
    assert {path.name for path in whole.iterdir()} == {*FILES, "recordings.jsonl", "rejected.jsonl"}

    stopped = prepared(tmp_path / "stopped", *rows)
    for after in (0, 1, 2):
        with pytest.raises(Interrupted):
            cut(stopped, after)
        assert not (stopped / "pseudo_labels.jsonl").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "wait_for_everyone", lambda: None)
    (stopped / "segmentation/mine.txt").touch()
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        cut(stopped)
    assert [path.name for path in stopped.glob("segmentation/*")] == ["mine.txt"]
    for name in FILES:
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_a_row_of_any_length_is_kept(tmp_path: Path) -> None:
    long = SHORT | {"note": "\0" * 6 * 2**20}
    folder = prepared(tmp_path / "out", long, recording())
    cut(folder)
    rows = read_rows(folder / "pseudo_labels.jsonl")
    assert rows[0] == long
    assert [row["id"] for row in rows[1:]] == ["call-part-0001", "call-part-0002"]


def test_all_hours_are_accounted_for(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "out", recording(), SHORT, recording(origin_text="Nothing of it"))
    cut(folder, seconds=7.0)
    assess_labels(
        folder / "pseudo_labels.jsonl", COLUMNS, QualityOptions(), SCORER, folder / "nowhere"
    )
    quality = json.loads((folder / "label_quality.json").read_text())["segmentation"]
    assert (quality["recordings"], quality["rows"]) == (2, 2)
    assert quality["hours"] == pytest.approx(2 * SECONDS / 3600, abs=1e-6)
    assert quality["rejected"]["reasons"][0]["rows"] == 2
    rejected = sum(
        entry["row"]["duration_seconds"] for entry in read_rows(folder / "rejected_segments.jsonl")
    )
    assert quality["rejected"]["hours"] == pytest.approx(rejected / 3600, abs=1e-6)
    total = (
        quality["hours_in_rows"] + quality["hours_without_speech"] + quality["rejected"]["hours"]
    )
    assert total == pytest.approx(quality["hours"], abs=1e-6)
    assert 0 <= quality["hours_without_speech"] < quality["hours"] / 10
    assert sum(quality["rows_without_reference"].values()) == 1
    assert "Recordings cut into rows" in (folder / "label_quality.html").read_text()


def test_a_single_recording_is_not_called_several(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = prepared(tmp_path / "out", recording())
    cut(folder)
    with caplog.at_level("INFO", logger="simpler_distil_whisper"):
        assess_labels(
            folder / "pseudo_labels.jsonl", COLUMNS, QualityOptions(), SCORER, folder / "nowhere"
        )
    assert "long recordings: 1, 0.00 h; cut into rows: 2, " in caplog.text
    assert "1 recording of " in (folder / "label_quality.html").read_text()


def test_audio_that_has_gone_is_named(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "out", recording(audio="gone.flac"))
    with pytest.raises(DataError, match=r"gone\.flac: no such file\. It was readable"):
        cut(folder)
