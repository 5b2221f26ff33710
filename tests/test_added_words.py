"""A word that was added to the teacher's vocabulary gets into the texts of its student."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from distilling import Setting, distil, load_model, write_config
from tiny import add_words, read_rows, write_rows

import create_student_model
import offline_inference
import run_pseudo_labelling
from simpler_distil_whisper.config import load_config
from simpler_distil_whisper.run import Run

DEMO = REPOSITORY / "demo_data"
WORD, ITS_FIRST_TOKEN = "浴室", "æµ´"


def run_in_this_process(script: ModuleType, output: Path, **config: Any) -> Path:
    """Do what a script does, without the seconds that another process takes to begin."""
    path = output.with_suffix(".json")
    path.write_text(json.dumps({"output_dir": str(output), **config}))
    checked = load_config(path, script.Config)
    run = Run(script.__name__, path, checked)
    with run.stop_signals():
        script.work(checked, script.prepare(checked), run)
    return output


@pytest.mark.slow
def test_an_added_word_is_labelled_learnt_and_written_by_the_student(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    teacher = add_words(shutil.copytree(DEMO / "teacher", tmp_path / "t"), {WORD: ITS_FIRST_TOKEN})
    rows = [row for row in read_rows(DEMO / "train.jsonl") if WORD in row["text"]][:6]
    rows = [row | {"audio": str(DEMO / row["audio"])} for row in rows]
    data = {"manifest": str(write_rows(tmp_path / "rows.jsonl", rows)), "num_workers": 0}
    decoding = {"batch_size": 6, "max_new_tokens": 40}
    labels = run_in_this_process(
        run_pseudo_labelling,
        tmp_path / "labels",
        teacher={"path": str(teacher)},
        data=data,
        decoding=decoding,
    )
    texts = [row["text"] for row in read_rows(labels / "pseudo_labels.jsonl")]
    assert sum(WORD in text for text in texts) >= 4
    student = run_in_this_process(
        create_student_model,
        tmp_path / "student",
        teacher={"path": str(teacher)},
        student={"decoder_layer_indices": [0, 1, 2]},
    )
    setting = Setting(teacher, student, labels / "pseudo_labels.jsonl")
    run = distil(write_config(tmp_path / "run", setting, schedule__max_steps=12))
    [word] = load_model(run / "final").tokens.added
    assert word == load_model(teacher).tokens.no_timestamps + 252  # behind the times of 5 s
    results = run_in_this_process(
        offline_inference,
        tmp_path / "results",
        model={"path": str(run / "final")},
        data=data,
        decoding=decoding,
    )
    hypotheses = [row["hypothesis"] for row in read_rows(results / "hypotheses.jsonl")]
    assert sum(WORD in text for text in hypotheses) >= 4
