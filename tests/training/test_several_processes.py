"""Two and four processes learn what one learns, share what they keep, and end together.

They are launched as one launches them. Nothing is dropped out, since each process has a random
state of its own.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from conftest import REPOSITORY
from distilling import Setting, largest_difference, logged, make_setting, weights_in, write_config
from tiny import read_rows, write_rows

STEPS = 6
CUTS = {1: (2, 4), 2: (2, 2), 4: (1, 2)}  # processes -> micro-batch, how many: always 8 utterances


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Labels of 1 to 50 tokens, with times and a past; one clip does not decode."""
    folder = tmp_path_factory.mktemp("setting")
    setting = make_setting(folder, 16, width=32)
    soundfile.write(folder / "5.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    rows = read_rows(setting.train)
    for row in rows:
        segment = {"start_seconds": 0.0, "end_seconds": 0.4, "text": row["text"]}
        row |= {"segments": [segment], "previous_text": "what was said"}
    write_rows(setting.train, rows)
    write_rows(folder / "dev.jsonl", [row for row in rows if row["id"] != "u5"])
    return setting


def config(output: Path, setting: Setting, processes: int, **changes: Any) -> Path:
    size, count = CUTS[processes]
    options: dict[str, Any] = {
        "batch": {"micro_batch_size": size, "gradient_accumulation_steps": count},
        "data": {
            "train_manifests": [str(setting.train)],
            "dev_manifest": str(setting.train.with_name("dev.jsonl")),
            "num_workers": 0,
            "max_bad_fraction": 0.5,
            "timestamp_probability": 0.5,
            "previous_text_probability": 0.5,
        },
        "augmentation": {
            "views": 1,
            "waveform": {"noise_db": [5.0, 10.0]},
            "spec_augment": {"time_masks": 1, "frequency_masks": 1},
        },
        "schedule__max_steps": STEPS,
        # A small epsilon would blow up rounding errors of gradients near 0.
        "optimizer": {"learning_rate": 1e-3, "epsilon": 1e-4},
        "validation": {"every_steps": 3, "decoding": {"batch_size": 4, "max_new_tokens": 12}},
        "checkpoints": {"every_steps": 4, "keep_last": 1},
        "logging": {"every_steps": 3, "tensorboard": False},
        "teacher_cache": {"folder": str(output.with_name("cache"))},
    }
    return write_config(output, setting, **{**options, **changes})


def launch(path: Path, processes: int, **options: Any) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = [str(REPOSITORY / "run_distillation.py"), str(path)]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), *script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code and what went to stderr; fail if the processes do not end."""
    try:
        stderr = process.communicate(timeout=240)[1]
    except subprocess.TimeoutExpired:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        raise
    return process.returncode, stderr


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory, setting: Setting) -> Path:
    path = config(tmp_path_factory.mktemp("one") / "run", setting, 1)
    code, stderr = ended(launch(path, 1))
    assert code == 0, stderr
    return path.with_suffix("")


@pytest.fixture(scope="module")
def by_several(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, setting: Setting
) -> tuple[int, Path]:
    """How many processes have done a run, and its folder."""
    processes = request.param
    path = config(tmp_path_factory.mktemp("several") / "run", setting, processes)
    code, stderr = ended(launch(path, processes))
    assert code == 0, stderr
    return processes, path.with_suffix("")


def assert_about_the_same_run(folder: Path, expected: Path) -> None:
    """As far as the order in which the parts of a sum are added can be told."""
    for name in ("loss", "cross_entropy", "kl", "agreement", "grad_norm", "learning_rate"):
        curves = [logged(run, f"train/{name}") for run in (folder, expected)]
        assert len(curves[0]) == 2
        assert curves[0] == pytest.approx(curves[1], rel=1e-5), name
    for who in ("teacher", "student"):
        rates = [logged(run, f"validation/{who}/error_rate") for run in (folder, expected)]
        assert rates[0] == rates[1]
    for name in ("final", "best"):
        assert largest_difference(weights_in(folder / name), weights_in(expected / name)) < 1e-5
    rejected = [read_rows(run / "rejected.jsonl") for run in (folder, expected)]
    assert rejected[0] == rejected[1]
    assert len(rejected[0]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("by_several", [2, 4], indirect=True)
def test_several_processes_train_like_one(by_one: Path, by_several: tuple[int, Path]) -> None:
    processes, folder = by_several
    assert_about_the_same_run(folder, by_one)
    infos = [json.loads((run / "run_info.json").read_text()) for run in (folder, by_one)]
    assert [info["processes"] for info in infos] == [processes, 1]
    for kind in ("encoder_states", "decoder_states"):
        counts = [info["teacher_cache"][kind] for info in infos]
        assert counts[0] == counts[1]
        assert counts[0]["hits"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("by_several", [2], indirect=True)
def test_fewer_processes_do_not_go_on_with_what_more_have_begun(
    tmp_path: Path, by_several: tuple[int, Path]
) -> None:
    """The same config is steps of another size then."""
    _, folder = by_several
    shutil.copytree(folder, tmp_path / "run")
    info = {"script": "run_distillation", "outcome": "running"}  # as if it was never done
    (tmp_path / "run/run_info.json").write_text(json.dumps(info))
    options = json.loads(folder.with_suffix(".json").read_text())
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**options, "output_dir": str(tmp_path / "run")}))
    code, stderr = ended(launch(path, 1))
    assert code == 2, stderr
    assert "belongs to other training rows or to steps of another size" in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.parametrize("later", [2, 1])
def test_processes_stopped_together_go_on_whatever_their_number(
    tmp_path: Path, setting: Setting, by_one: Path, later: int
) -> None:
    """With other micro-batches, so that a step holds the same rows."""
    path = config(tmp_path / "run", setting, 2)
    process = launch(path, 2)
    wait_for(tmp_path / "run/best/config.json", process)
    process.terminate()
    _, stderr = ended(process)
    assert "run the same command again to continue" in stderr
    [saved] = (tmp_path / "run/checkpoints").iterdir()
    assert saved.name in ("step-00000003", "step-00000004", "step-00000005")
    code, stderr = ended(launch(config(tmp_path / "run", setting, later), later))
    assert code == 0, stderr
    assert f"continuing after step {int(saved.name[-8:])}" in stderr
    assert_about_the_same_run(tmp_path / "run", by_one)


@pytest.mark.slow
def test_a_full_disk_in_one_process_ends_all(tmp_path: Path, setting: Setting) -> None:
    """Of a checkpoint the others write less, and wait for the one that cannot."""
    path = config(tmp_path / "run", setting, 2)
    largest = (150_000, resource.RLIM_INFINITY)
    process = launch(path, 2, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, largest))
    code, stderr = ended(process)
    assert code == 1, stderr  # the launcher's
    assert "make room, and run the same command again" in stderr
    assert not (tmp_path / "run/final/config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_was_killed_ends_all(tmp_path: Path, setting: Setting, rank: str) -> None:
    path = config(tmp_path / "run", setting, 2)
    process = launch(path, 2)
    wait_for(tmp_path / "run/best/config.json", process)
    launched = psutil.Process(process.pid).children()
    [victim] = [child for child in launched if child.environ().get("RANK") == rank]
    victim.kill()
    code, stderr = ended(process)
    assert code == 1, stderr
    assert not psutil.wait_procs(launched, timeout=60)[1]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.005)
