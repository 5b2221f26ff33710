"""From two long recordings to a trained student, with the shipped configs."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from tiny import read_rows, write_rows

RunScript = Callable[..., "subprocess.CompletedProcess[str]"]
DEMO = REPOSITORY / "demo_data"


def shipped(name: str, output: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((REPOSITORY / f"{name}.json").read_text(encoding="utf-8"))
    config["output_dir"] = output
    config["teacher"]["path"] = str(DEMO / "teacher")
    if "teacher_cache" in config:
        config["teacher_cache"]["folder"] = "cache"
    return config


def write_manifest(path: Path) -> Path:
    """The demo's long recordings, one as a part of its file, and a clip."""
    long_chinese, long_english = read_rows(DEMO / "long.jsonl")
    clip = {**read_rows(DEMO / "dev.jsonl")[0], "id": "clip"}
    rows = [long_chinese, {**long_english, "start_seconds": 3.55, "text": None}, clip]
    return write_rows(path, [{**row, "audio": str(DEMO / row["audio"])} for row in rows])


@pytest.mark.slow
def test_a_student_learns_from_long_recordings(tmp_path: Path, run_script: RunScript) -> None:
    config = shipped("run_pseudo_labelling", "labels")
    config["data"]["manifest"] = str(write_manifest(tmp_path / "calls.jsonl"))
    config["decoding"]["long_form"] = "sequential"
    config["segmentation"]["enabled"] = True
    config["pack"].update(enabled=True, max_error_rate=0.5)
    done = run_script("run_pseudo_labelling", config)
    assert done.returncode == 0, done.stderr

    labels = read_rows(tmp_path / "labels/pseudo_labels.jsonl")
    rows = [row for row in labels if "part" in row]
    assert [row["id"] for row in labels if "part" not in row] == ["clip"]
    assert {row["recording"] for row in rows} == {"long-zh", "long-en"}
    assert len({row["id"] for row in labels}) == len(labels) > 15
    assert all(row["start_seconds"] >= 3.5 for row in rows if row["recording"] == "long-en")
    with_reference = [row for row in rows if row["origin_text"] is not None]
    assert len(with_reference) >= 8
    # The teacher errs in one character of twenty; a part of another row would be all wrong.
    assert sorted(row["cer/wer"] for row in with_reference)[len(with_reference) // 2] < 0.1
    assert read_rows(tmp_path / "labels/packed_labels.jsonl")

    config = shipped("create_student_model", "student")
    config["student"]["decoder_layer_indices"] = [0, 3]
    done = run_script("create_student_model", config)
    assert done.returncode == 0, done.stderr
    config = shipped("run_distillation", "run")
    config["student"]["path"] = "student"
    config["data"].update(
        train_manifests=["labels/pseudo_labels.jsonl"],
        dev_manifest=None,
        max_error_rate=None,
        timestamp_probability=0.5,
        previous_text_probability=0.5,
    )
    config["schedule"].update(epochs=None, max_steps=3, warmup_steps=1)
    config["optimizer"].update(learning_rate=1e-3)
    config["batch"].update(micro_batch_size=4)
    done = run_script("run_distillation", config)
    assert done.returncode == 0, done.stderr
    assert f"kept training rows, with segments: {len(labels)}" in done.stderr
    assert "kept training rows, with previous text" in done.stderr
    assert (tmp_path / "run/final/model.safetensors").exists()
    assert read_rows(tmp_path / "run/rejected.jsonl") == []
