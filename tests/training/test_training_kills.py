"""A training run that is killed, stopped or out of disk at any moment ends as if nothing had been.

The student has dropout, and each step draws timestamps, previous text and views: all
of it must come back.
"""

import json
import random
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripts
import soundfile
from conftest import REPOSITORY
from distilling import Setting, assert_same_run, make_setting, write_config
from killing import limit_files
from tiny import read_rows, write_rows

STEPS, CLIPS = 8, 10


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Clips of which one does not decode, which shows only when it is learnt from."""
    folder = tmp_path_factory.mktemp("setting")
    setting = make_setting(folder, CLIPS, width=32)
    config = setting.student / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout": 0.2}))
    soundfile.write(folder / "3.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    rows = read_rows(setting.train)
    for row in rows:
        segment = {"start_seconds": 0.0, "end_seconds": 0.4, "text": row["text"]}
        row |= {"segments": [segment], "previous_text": "what was said"}
    write_rows(setting.train, [*rows, {"id": "no audio", "audio": "nowhere.wav", "text": "a"}])
    write_rows(folder / "dev.jsonl", [row for row in rows if row["id"] != "u3"])
    return setting


def full_config(output: Path, setting: Setting, cached: bool, **changes: Any) -> Path:
    """A run in which whatever has a state has one; no two of its intervals are of one length."""
    options: dict[str, Any] = {
        "data": {
            "train_manifests": [str(setting.train)],
            "dev_manifest": str(setting.train.with_name("dev.jsonl")),
            "num_workers": 1,
            "max_bad_fraction": 0.5,
            "timestamp_probability": 0.5,
            "previous_text_probability": 0.5,
        },
        "augmentation": {
            "views": 1,
            "waveform": {"noise_db": [5.0, 10.0]},
            "spec_augment": {"time_masks": 1, "frequency_masks": 1},
        },
        "batch": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
        "schedule__max_steps": STEPS,
        "optimizer": {"learning_rate": 5e-3},
        "checkpoints": {"every_steps": 2, "keep_last": 1},
        "validation": {
            "every_steps": 3,
            "early_stopping_patience": 5,
            "decoding": {"batch_size": 4, "max_new_tokens": 12},
        },
        "logging": {"every_steps": 4, "tensorboard": False},
    }
    if cached:
        options["teacher_cache"] = {"folder": str(output.with_name("cache"))}
    return write_config(output, setting, **{**options, **changes})


def start(path: Path, largest_file: int | None = None) -> BaseProcess:
    """Start `python run_distillation.py config.json`, its log in stderr.txt."""
    log = path.with_name("stderr.txt")
    log.unlink(missing_ok=True)
    limit = partial(limit_files, largest_file) if largest_file is not None else None
    command = [str(REPOSITORY / "run_distillation.py"), str(path)]
    return scripts.start(command, path.parent, (log, log), limit)


def finish(path: Path, largest_file: int | None = None) -> tuple[int | None, str]:
    """Run to the end; return the exit code and what it wrote to stderr."""
    process = start(path, largest_file)
    process.join(timeout=300)
    return process.exitcode, path.with_name("stderr.txt").read_text()


@pytest.fixture(scope="module", params=[False, True], ids=["without_cache", "with_cache"])
def never_stopped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, setting: Setting
) -> tuple[bool, Path]:
    """Whether a run has a cache, and its folder."""
    path = full_config(tmp_path_factory.mktemp("whole") / "run", setting, request.param)
    code, stderr = finish(path)
    assert code == 0, stderr
    return request.param, path.with_suffix("")


def moments() -> list[tuple[str, float]]:
    """The file whose coming starts the clock, and how many seconds later the kill comes at most."""
    steps = [f"step-{step:08d}" for step in range(2, STEPS + 1, 2)]
    files = [("", 0.5), ("", 1.5), ("metrics.jsonl", 0.05)]
    for step in steps:
        # Soon after the last one, a run on a fast machine has ended.
        longest = 0.02 if step == steps[-1] else 0.3
        files += [(f"checkpoints/.{step}.tmp", 0.002), (f"checkpoints/{step}", longest)]
    files.insert(5, ("best/.writing", 0.01))
    return [*files, ("final/.writing", 0.01)]


@pytest.mark.slow
def test_a_run_killed_at_13_moments_ends_as_if_never_stopped(
    tmp_path: Path, setting: Setting, never_stopped: tuple[bool, Path]
) -> None:
    cached, expected = never_stopped
    path = full_config(tmp_path / "run", setting, cached)
    folder = tmp_path / "run"
    chance = random.Random(int(cached))
    left: list[str] = []
    names = [name for name, _ in moments()]
    for place, (name, longest) in enumerate(moments()):
        process = start(path)
        # On a fast machine, the run before it may have come further already.
        while process.is_alive() and not any((folder / each).exists() for each in names[place:]):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, longest))
        process.kill()
        process.join()
        assert process.exitcode == -9, (name, (tmp_path / "stderr.txt").read_text())
        left += [path.name for path in folder.glob("*/.*")]
    code, stderr = finish(path)
    assert code == 0, stderr
    assert_same_run(folder, expected)
    assert not list(folder.glob("*/.*"))
    assert any(name.startswith(".step-") for name in left), "no kill has fallen into a checkpoint"
    assert ".writing" in left, "no kill has fallen into the writing of a model"


def without_workers(path: Path) -> None:
    options = json.loads(path.read_text())
    options["data"]["num_workers"] = 0
    path.write_text(json.dumps(options))


def kill_after(path: Path, name: str) -> None:
    """Kill a run as soon as it has written a file."""
    process = start(path)
    while process.is_alive() and not (path.with_suffix("") / name).exists():
        time.sleep(0.002)
    process.kill()
    process.join()


@pytest.mark.slow
@pytest.mark.parametrize("never_stopped", [True], indirect=True)
def test_a_run_stopped_at_any_step_ends_as_if_never_stopped(
    tmp_path: Path, setting: Setting, never_stopped: tuple[bool, Path]
) -> None:
    """It saves the step in which it was stopped, though no checkpoint was due."""
    cached, expected = never_stopped
    checkpoints = {"every_steps": 100}
    path = full_config(tmp_path / "run", setting, cached, checkpoints=checkpoints)
    folder = tmp_path / "run"
    process = start(path)
    while process.is_alive() and not (folder / "best/config.json").exists():
        time.sleep(0.002)
    time.sleep(random.Random(2 + cached).uniform(0, 0.2))
    process.terminate()
    process.join()
    stderr = (tmp_path / "stderr.txt").read_text()
    assert process.exitcode == 143, stderr
    assert "run the same command again to continue" in stderr
    [saved] = (folder / "checkpoints").iterdir()
    assert 3 <= int(saved.name.removeprefix("step-")) < STEPS
    code, stderr = finish(path)
    assert code == 0, stderr
    assert_same_run(folder, expected)


@pytest.mark.slow
@pytest.mark.parametrize("never_stopped", [False], indirect=True)
@pytest.mark.parametrize("what", ["checkpoints", "best", "final"])
def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(
    tmp_path: Path, setting: Setting, never_stopped: tuple[bool, Path], what: str
) -> None:
    """Stood in for by the largest file that the run may write."""
    cached, expected = never_stopped
    every = 100 if what == "best" else 4
    path = full_config(tmp_path / "run", setting, cached, checkpoints={"every_steps": every})
    without_workers(path)  # whose shared memory the limit would be for, too
    folder = tmp_path / "run"
    until = {"checkpoints": "checkpoints/step-00000004", "final": "checkpoints/step-00000008"}
    kill_after(path, until.get(what, "metrics.jsonl"))
    whole = {file: file.read_bytes() for file in folder.glob("checkpoints/*/*")}
    code, stderr = finish(path, largest_file=250_000)
    assert code == 3, stderr
    assert "make room, and run the same command again" in stderr
    assert what in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert {file: file.read_bytes() for file in folder.glob("checkpoints/*/*")} == whole
    assert not (folder / "final/config.json").exists()
    code, stderr = finish(path)
    assert code == 0, stderr
    assert_same_run(folder, expected)
