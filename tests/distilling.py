"""Distillation runs of tiny models in the tests' own process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import make_model_folder, read_rows, write_rows, write_tone

import run_distillation
from simpler_distil_whisper.config import load_config
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.pruning import prune_whisper
from simpler_distil_whisper.model.whisper import Whisper, load_whisper, save_whisper
from simpler_distil_whisper.run import Run
from simpler_distil_whisper.training.dataset import TrainingSteps
from simpler_distil_whisper.training.trainer import Trainer

LANGUAGES = ["en", "zh", "ja"]


class Setting(NamedTuple):
    """What a distillation needs."""

    teacher: Path
    student: Path
    train: Path


def make_setting(folder: Path, examples: int = 8, **layout: Any) -> Setting:
    """A teacher of two decoder layers, a student of one, and labelled clips of uneven length."""
    torch.set_num_threads(1)
    options = {"languages": LANGUAGES, "talkative": True, "seed": 53, **layout}
    teacher = make_model_folder(folder / "teacher", **options)
    student = prune(teacher, folder / "student")
    rows = []
    for number in range(examples):
        text = "abcdefgh"[: 1 + number % 8] * (1 + 3 * (number % 3))
        write_tone(folder / f"{number}.wav", 0.4 + 0.2 * (number % 5), seed=number)
        rows.append({"id": f"u{number}", "audio": f"{number}.wav", "text": text, "language": "en"})
    return Setting(teacher, student, write_rows(folder / "train.jsonl", rows))


def prune(teacher: Path, folder: Path) -> Path:
    """Write a student with the teacher's encoder and its last decoder layer."""
    whisper = load_model(teacher)
    layers = whisper.model.config
    model = prune_whisper(whisper.model, range(layers.encoder_layers), [layers.decoder_layers - 1])
    folder.mkdir()
    save_whisper(model, whisper.processor_folder, folder)
    return folder


def load_model(folder: Path) -> Whisper:
    return load_whisper(read_model_folder(folder, None, "model"))


def write_config(output: Path, setting: Setting, **changes: Any) -> Path:
    """Write a config for quick runs; `changes` are dotted keys with __ for the dot."""
    config: dict[str, Any] = {
        "output_dir": str(output),
        "teacher": {"path": str(setting.teacher), "dtype": "float32"},
        "student": {"path": str(setting.student)},
        "data": {"train_manifests": [str(setting.train)], "num_workers": 0},
        "schedule": {"warmup_steps": 0, "max_steps": 4, "epochs": None},
        "optimizer": {"learning_rate": 1e-3},
        "batch": {"micro_batch_size": 4},
        "precision": "float32",
        "validation": {"decoding": {"batch_size": 4, "max_new_tokens": 12}},
        "logging": {"every_steps": 1, "tensorboard": False},
        "freeze": {},
        "objective": {},
        "checkpoints": {},
        "teacher_cache": {},
        "augmentation": {},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = str(value) if isinstance(value, Path) else value
        else:
            config[section] = value
    path = output.with_suffix(".json")
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


class Assembled(NamedTuple):
    """What run_distillation.py has before its first step, and its training loop."""

    trainer: Trainer
    train: Callable[[], None]
    steps: TrainingSteps
    prepared: run_distillation.Prepared


def assemble(path: Path) -> Assembled:
    """Do what run_distillation.py does before the first step."""
    config, run = _begin(path)
    prepared = run_distillation.prepare(config)
    trainer, steps = run_distillation.assemble(config, prepared, run)

    def train() -> None:
        run_distillation.train(config, trainer, steps)

    return Assembled(trainer, train, steps, prepared)


def distil(path: Path) -> Path:
    """Do all that run_distillation.py does; return the output folder."""
    config, run = _begin(path)
    with run.stop_signals():
        run_distillation.work(config, run_distillation.prepare(config), run)
    return run.folder


def _begin(path: Path) -> tuple[run_distillation.Config, Run]:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    config = load_config(path, run_distillation.Config)
    return config, Run("run_distillation", path, config)


def adding_spaces(setting: Setting, folder: Path) -> Setting:
    """The setting with a student whose tokenizer begins every text with a space."""
    student = shutil.copytree(setting.student, folder / "adding_spaces")
    path = student / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "add_prefix_space": True}), encoding="utf-8")
    return setting._replace(student=student)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def logged(folder: Path, name: str) -> list[Any]:
    """The values of one name in metrics.jsonl, in order."""
    return [row[name] for row in read_rows(folder / "metrics.jsonl") if name in row]


def logged_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the machine: the speed."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if "per_second" not in k} for row in rows]


def assert_same_run(folder: Path, expected: Path) -> None:
    """Both runs have learnt, logged and rejected the same, to the last bit."""
    for name in ("final", "best"):
        assert largest_difference(weights_in(folder / name), weights_in(expected / name)) == 0
    assert logged_rows(folder) == logged_rows(expected)
    rejected = [(run / "rejected.jsonl").read_text() for run in (folder, expected)]
    assert rejected[0] == rejected[1]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
