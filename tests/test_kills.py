"""A labelling run killed at 25 random moments, by one process and by two, loses no row."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY
from tiny import make_corpus, make_model_folder, read_rows, write_rows

KILLS, ROWS = 25, 60
RESULTS = ("pseudo_labels.jsonl", "rejected.jsonl")


def start(folder: Path, processes: int) -> subprocess.Popen[bytes]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    command += [str(REPOSITORY / "run_pseudo_labelling.py"), "config.json"]
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
    for running in [*launched.children(recursive=True), launched]:
        try:
            running.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a config and 60 rows, some of which are bad."""
    folder = tmp_path_factory.mktemp("kills")
    make_model_folder(folder / "teacher", languages=["en", "zh"], talkative=True, seed=53)
    rows = read_rows(make_corpus(folder, ROWS))
    for row in rows[7:50:20]:
        (folder / row["audio"]).write_bytes(b"no audio")
    write_rows(folder / "train.jsonl", [*rows[:20], "{", *rows[20:]])
    config = {
        "output_dir": "out",
        "teacher": {"path": "teacher"},
        "data": {"manifest": "train.jsonl"},
        "decoding": {"batch_size": 2, "max_new_tokens": 60},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_a_run_killed_at_25_moments_writes_the_same_bytes(folder: Path) -> None:
    began = time.monotonic()
    assert start(folder, 1).wait(timeout=600) == 0, (folder / "log.txt").read_text()
    seconds = time.monotonic() - began
    whole = {name: (folder / "out" / name).read_bytes() for name in RESULTS}
    assert len(whole["pseudo_labels.jsonl"].splitlines()) == ROWS - 3
    assert len(whole["rejected.jsonl"].splitlines()) == 4
    shutil.rmtree(folder / "out")
    chance = random.Random(0)
    killed = finished = kept = 0
    while killed < KILLS or finished == 0:
        process = start(folder, 1 + killed % 2)
        try:
            # Towards the end of a run, whose first half is imports.
            patience = seconds * chance.uniform(0.2, 1.3) if killed < KILLS else 600
            code = process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            killed += 1
            kept = max(kept, len(list((folder / "out").glob("parts/*.answers"))))
            continue
        assert code == 0, (folder / "log.txt").read_text()[-3000:]
        assert {name: (folder / "out" / name).read_bytes() for name in RESULTS} == whole
        assert not (folder / "out/parts").exists()
        finished += 1
        shutil.rmtree(folder / "out")
    assert kept, "no kill has fallen into the work"
    print(f"\n{killed} kills, {finished} runs finished, {seconds:.1f} s uninterrupted")


@pytest.mark.slow
def test_processes_whose_launcher_was_killed_end_and_leave_their_rows(folder: Path) -> None:
    """Their launcher can tell them nothing; the next start is refused as long as they work."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    process = start(folder, 2)
    launched = psutil.Process(process.pid)
    parts = folder / "out/parts"
    while sum(path.read_bytes().count(b"\n") for path in parts.glob("*.answers")) < 6:
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
