"""A script killed at any moment loses nothing, and what it leaves never looks finished."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY
from distilling import make_setting, write_config
from killing import Death, operations, run
from tiny import make_corpus, read_rows, write_rows

ROWS = 30
KILLS = int(os.environ.get("SDW_KILLS", "200"))  # over all scripts
RESULTS = ("pseudo_labels.jsonl", "rejected.jsonl")
TELLING_TIME = {"log.txt", "run_info.json", "speed.json", "metrics.jsonl", "exports.json"}
TELLING_TIME |= {"exports.md", "training_curves.png", "README.md", "distillation.json"}
# The file that tells that a script has done its work, and those that are whole then.
FINISHED = {
    "run_pseudo_labelling": ("pseudo_labels.jsonl", ["pseudo_labels.jsonl", "rejected.jsonl"]),
    "create_student_model": ("config.json", ["config.json", "model.safetensors"]),
    "run_distillation": ("final/config.json", ["final/config.json", "final/model.safetensors"]),
    "offline_inference": ("hypotheses.jsonl", ["hypotheses.jsonl", "rejected.jsonl"]),
    "eval": ("summary.json", ["summary.json"]),
    "export": (
        "ctranslate2-float32",
        ["ctranslate2-float32/model.bin", "ctranslate2-float32/config.json"],
    ),
}


def start(folder: Path, processes: int) -> subprocess.Popen[bytes]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    command += [str(REPOSITORY / "run_pseudo_labelling.py"), "run_pseudo_labelling.json"]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a run with its processes and their workers, none of which can tidy up."""
    launched = psutil.Process(process.pid)
    launched.suspend()  # so that it starts no other meanwhile
    running = [*launched.children(recursive=True), launched]
    for each in running:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(timeout=60)
    psutil.wait_procs(running, timeout=60)  # until then, one of them may hold the folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config for each script, and 30 rows, some of which are bad."""
    folder = tmp_path_factory.mktemp("kills")
    setting = make_setting(folder)
    rows = read_rows(make_corpus(folder, ROWS))
    for row in rows[7:30:10]:
        (folder / row["audio"]).write_bytes(b"no audio")
    write_rows(folder / "rows.jsonl", [*rows[:20], "{", *rows[20:]])
    write_rows(folder / "texts.jsonl", [{**row, "hypothesis": row["text"][1:]} for row in rows])
    clips = read_rows(REPOSITORY / "demo_data/test.jsonl")[:2]
    for clip in clips:
        clip["audio"] = str(REPOSITORY / "demo_data" / clip["audio"])
    write_rows(folder / "clips.jsonl", clips)
    decoding = {"batch_size": 4, "max_new_tokens": 12}
    configs: dict[str, dict[str, Any]] = {
        "run_pseudo_labelling": {"teacher": {"path": "teacher"}, "decoding": decoding},
        "create_student_model": {
            "teacher": {"path": "teacher"},
            "student": {"decoder_layers": 1},
            "layer_scoring": {"manifest": "train.jsonl", "max_utterances": 4},
        },
        "offline_inference": {"model": {"path": "teacher"}, "decoding": decoding},
        "eval": {"hypotheses": [{"name": "a", "path": "texts.jsonl"}], "bootstrap_samples": 100},
        "export": {
            "model": {"path": str(REPOSITORY / "demo_data/teacher")},
            "variants": [{"format": "ctranslate2", "quantization": "float32"}],
            "verification": {"manifest": "clips.jsonl"},
        },
    }
    for name in ("run_pseudo_labelling", "offline_inference"):
        configs[name]["data"] = {"manifest": "rows.jsonl", "max_bad_fraction": 0.5}
    write_config(
        folder / "out",
        setting,
        checkpoints={"every_steps": 2, "keep_last": 1},
        data={"train_manifests": ["train.jsonl"], "dev_manifest": "train.jsonl", "num_workers": 0},
        validation={
            "every_steps": 3,
            "max_utterances": 4,
            "decoding": {"batch_size": 4, "max_new_tokens": 12},
        },
    ).rename(folder / "run_distillation.json")
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps({"output_dir": "out", **config}))
    return folder


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text(encoding="utf-8")[-3000:]


def planned_deaths(kills: int, operations: int, largest: int) -> list[Death]:
    """Deaths at operations all over a run, in a random order, some within a write or an import."""
    chance = random.Random(kills)
    deaths = [Death(operation=1 + number * operations // kills) for number in range(kills)]
    chance.shuffle(deaths)
    deaths[2::4] = [Death(size=chance.randrange(largest)) for _ in deaths[2::4]]
    deaths[5::10] = [Death(imports=chance.randrange(1, 400)) for _ in deaths[5::10]]
    return deaths


def results(folder: Path) -> dict[str, bytes]:
    """The files below `out`, but for those that tell the time."""
    return {
        str(path.relative_to(folder / "out")): path.read_bytes()
        for path in sorted((folder / "out").rglob("*"))
        if path.is_file() and path.name not in TELLING_TIME
    }


@pytest.mark.parametrize("total", [40, pytest.param(KILLS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", FINISHED)
def test_a_script_killed_at_any_operation_ends_as_if_it_had_not_been(
    script: str, total: int, folder: Path
) -> None:
    """Each run goes on from what the killed one before has left, until one ends before its death.

    That one is compared with a run that was never killed, and the next one begins anew. Until a
    run has ended, no half-written file has the name of a finished one.
    """
    shutil.rmtree(folder / "out", ignore_errors=True)
    assert run(script, folder) == 0, output(folder)
    whole, last = results(folder), operations(folder)
    mark, names = FINISHED[script]
    assert set(names) <= whole.keys()
    shutil.rmtree(folder / "out")
    kills = total // len(FINISHED)
    for death in [*planned_deaths(kills, last, max(map(len, whole.values()))), Death()]:
        while (code := run(script, folder, death)) == 0:
            assert results(folder) == whole, death
            shutil.rmtree(folder / "out")
            if death == Death():
                return
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ), (code, death, output(folder))
        if (folder / "out" / mark).exists():
            now = results(folder)
            assert {name for name in names if now.get(name) != whole[name]} == set(), death


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_while_it_imports_or_works_writes_the_same_bytes(
    folder: Path, processes: int
) -> None:
    shutil.rmtree(folder / "out", ignore_errors=True)
    assert run("run_pseudo_labelling", folder) == 0
    whole = results(folder)
    assert len(whole["pseudo_labels.jsonl"].splitlines()) == ROWS - 3
    assert len(whole["rejected.jsonl"].splitlines()) == 4
    shutil.rmtree(folder / "out")
    process = start(folder, processes)
    time.sleep(0.5)
    kill_tree(process)
    process = start(folder, processes)
    while not list((folder / "out").glob("parts/*.results")):
        assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.01)
    kill_tree(process)
    assert not (folder / "out/pseudo_labels.jsonl").exists()
    assert run("run_pseudo_labelling", folder) == 0
    assert results(folder) == whole


@pytest.mark.slow
def test_processes_whose_launcher_was_killed_end_and_leave_their_rows(folder: Path) -> None:
    """Their launcher can tell them nothing; the next start is refused as long as they work."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    path = folder / "run_pseudo_labelling.json"
    usual = path.read_text()
    config = json.loads(usual)
    config["decoding"] |= {"batch_size": 1, "max_new_tokens": 200}  # much is left to do at the kill
    path.write_text(json.dumps(config))
    process = start(folder, 2)
    launched = psutil.Process(process.pid)
    parts = folder / "out/parts"
    while sum(path.read_bytes().count(b"\n") for path in parts.glob("*.results")) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    left = launched.children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(left, timeout=60)
    for survivor in alive:
        survivor.kill()
    assert not alive
    assert not (folder / "out" / RESULTS[0]).exists()
    assert start(folder, 1).wait(timeout=600) == 0
    assert len(read_rows(folder / "out" / RESULTS[0])) == ROWS - 3
    path.write_text(usual)
