"""Labels are the same whether the model's process measures them or one behind it."""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_corpus, make_model_folder, read_rows

import run_pseudo_labelling
from simpler_distil_whisper.config import load_config
from simpler_distil_whisper.data import workers
from simpler_distil_whisper.run import Run
from simpler_distil_whisper.stopping import Interrupted

map_behind = workers.map_behind


def label(folder: Path, name: str, stop_at: int | None = None) -> Path:
    path = folder / f"{name}.json"
    config = {
        "output_dir": str(folder / name),
        "teacher": {"path": str(folder / "teacher"), "dtype": "float32"},
        "data": {
            "manifest": str(folder / "train.jsonl"),
            "num_workers": 0,
            "max_bad_fraction": 0.5,
        },
        "decoding": {"batch_size": 2, "max_new_tokens": 5},
    }
    path.write_text(json.dumps(config))
    checked = load_config(path, run_pseudo_labelling.Config)
    run = Run("run_pseudo_labelling", path, checked)
    if stop_at is not None:
        parts = folder / name / "parts"
        stops = iter([False] * stop_at)
        run.stop_if_asked = lambda: stop_when_no_more(stops)  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            run_pseudo_labelling.work(checked, run_pseudo_labelling.prepare(checked), run)
        return parts
    run_pseudo_labelling.work(checked, run_pseudo_labelling.prepare(checked), run)
    return folder / name / "pseudo_labels.jsonl"


def stop_when_no_more(stops: Iterator[bool]) -> None:
    if next(stops, True):
        raise Interrupted


def test_the_labels_are_the_same_and_a_stop_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    make_model_folder(tmp_path / "teacher", languages=["en", "zh"], talkative=True)
    corpus = make_corpus(tmp_path, 9)
    corpus.rename(tmp_path / "train.jsonl")
    (tmp_path / read_rows(tmp_path / "train.jsonl")[4]["audio"]).write_bytes(b"no audio")
    expected = label(tmp_path, "here").read_bytes()

    def behind(function: Callable[[Any], Any], items: Iterable[Any], _: int) -> Iterator[Any]:
        return map_behind(function, items, 1)

    monkeypatch.setattr(workers, "map_behind", behind)
    assert label(tmp_path, "behind").read_bytes() == expected
    parts = label(tmp_path, "stopped", stop_at=3)
    assert (parts / "0.results").read_bytes().count(b"\n") - 1 >= 3 * 2 - 1, "but for the rejected"
    assert multiprocessing.active_children() == []
    assert label(tmp_path, "stopped").read_bytes() == expected
