"""The five scripts one after the other, as a user runs them: processes, files in and out."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scripts
from conftest import REPOSITORY
from tiny import ALL_EVIDENCE, make_corpus, make_model_folder, read_rows, write_rows

STEPS = [
    "run_pseudo_labelling",
    "create_student_model",
    "run_distillation",
    "offline_inference",
    "eval",
]
# What a second run of the same configs must reproduce bit by bit.
REPRODUCED = [
    "run_pseudo_labelling/pseudo_labels.jsonl",
    "run_pseudo_labelling/rejected.jsonl",
    "create_student_model/model.safetensors",
    "create_student_model/layer_map.json",
    "run_distillation/final/model.safetensors",
    "run_distillation/best/model.safetensors",
    "offline_inference/hypotheses.jsonl",
    "eval/summary.json",
    "eval/utterances.jsonl",
]
# Python imports this before anything else when its folder is on the path. Sockets within the
# machine stay: the audio workers hand over tensors through them.
NO_NETWORK = """
import socket

def refuse(*arguments, **keywords):
    raise RuntimeError(f"the network was asked for: {arguments}")

real_connect = socket.socket.connect

def connect(self, address):
    return real_connect(self, address) if self.family == socket.AF_UNIX else refuse(address)

socket.socket.connect = connect
socket.getaddrinfo = refuse
"""

Config = dict[str, Any]


def chain_configs(out: str) -> dict[str, Config]:
    """The five configs of one chain, with relative paths; results go below `out`."""
    decoding = {"batch_size": 3, "max_new_tokens": 24}
    teacher = {"path": "teacher"}
    return {
        "run_pseudo_labelling": {
            "output_dir": f"{out}/run_pseudo_labelling",
            "teacher": teacher,
            "data": {"manifest": "train.jsonl", "max_bad_fraction": 0.5},
            "decoding": decoding,
        },
        "create_student_model": {
            "output_dir": f"{out}/create_student_model",
            "teacher": teacher,
            "student": {"decoder_layers": 2},
            "layer_scoring": {
                "manifest": f"{out}/run_pseudo_labelling/pseudo_labels.jsonl",
                "max_utterances": 4,
            },
        },
        "run_distillation": {
            "output_dir": f"{out}/run_distillation",
            "teacher": teacher,
            "student": {"path": f"{out}/create_student_model"},
            "data": {
                "train_manifests": [f"{out}/run_pseudo_labelling/pseudo_labels.jsonl"],
                "dev_manifest": "zh-100.jsonl",
                "incomplete_labels": "without_end",
                **ALL_EVIDENCE,
            },
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"warmup_steps": 2, "epochs": None, "max_steps": 8},
            "batch": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
            "validation": {"every_steps": 4, "decoding": decoding},
            "checkpoints": {"every_steps": 3},
            "logging": {"every_steps": 1},
        },
        "offline_inference": {
            "output_dir": f"{out}/offline_inference",
            "model": {"path": f"{out}/run_distillation/final"},
            "data": {"manifest": "zh-100.jsonl"},
            "decoding": decoding,
        },
        "eval": {
            "output_dir": f"{out}/eval",
            "hypotheses": [{"name": "s", "path": f"{out}/offline_inference/hypotheses.jsonl"}],
        },
    }


def run_config(folder: Path, step: str, config: Path) -> subprocess.CompletedProcess[str]:
    command = [str(REPOSITORY / f"{step}.py"), str(config)]
    return scripts.run(command, folder, before=block_network)


def block_network() -> None:
    exec(NO_NETWORK, {})


def run_config_afresh(folder: Path, step: str, config: Path) -> subprocess.CompletedProcess[str]:
    command = [str(REPOSITORY / f"{step}.py"), str(config)]
    variables = {"PYTHONPATH": str(folder / "no-network"), "HF_HUB_OFFLINE": ""}
    return scripts.run_afresh(command, folder, **variables)


def run_chain(
    folder: Path,
    configs: dict[str, Config],
    run: Callable[..., subprocess.CompletedProcess[str]] = run_config,
) -> None:
    """Run the five steps, each of which must succeed."""
    for step in STEPS:
        path = folder / f"{step}.json"
        path.write_text(json.dumps(configs[step], indent=1), encoding="utf-8")
        done = run(folder, step, path)
        assert done.returncode == 0, f"{step}: {done.stderr}"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole chain has run, without a network."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "no-network").mkdir()
    (folder / "no-network" / "sitecustomize.py").write_text(NO_NETWORK)
    layout = {"languages": ["en", "zh"], "decoder_layers": 4, "talkative": True}
    make_model_folder(folder / "teacher", **layout)
    rows = read_rows(make_corpus(folder, 10))
    rows[4]["note"] = "字段保留"
    (folder / "audio" / "broken.wav").write_bytes(b"RIFF nothing")
    write_rows(
        folder / "train.jsonl",
        [
            *rows[:5],
            {"id": "broken", "audio": "audio/broken.wav", "text": "坏", "language": "zh"},
            {"id": "none", "audio": "audio/none.wav", "text": "无", "language": "zh"},
            *rows[5:],
        ],
    )
    make_corpus(folder, 5, start=100)
    run_chain(folder, chain_configs("out"))
    return folder


def test_the_network_block_of_these_tests_blocks(chain: Path) -> None:
    program = chain / "asks.py"
    program.write_text("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')")
    blocked = scripts.run([str(program)], chain, before=block_network)
    variables = {"PYTHONPATH": str(chain / "no-network")}
    blocked_afresh = scripts.run_afresh([str(program)], chain, **variables)
    for done in (blocked, blocked_afresh):
        assert done.returncode == 1
        assert "the network was asked for" in done.stderr


def test_every_row_is_accounted_for_in_order(chain: Path) -> None:
    rows = read_rows(chain / "train.jsonl")
    labelled = read_rows(chain / "out/run_pseudo_labelling/pseudo_labels.jsonl")
    rejected = read_rows(chain / "out/run_pseudo_labelling/rejected.jsonl")
    assert [row["id"] for row in labelled] == [f"u{number}" for number in range(10)]
    assert [row["row"]["id"] for row in rejected] == ["broken", "none"]
    assert [row["place"] for row in rejected] == ["train.jsonl:6", "train.jsonl:7"]
    assert "is no audio" in rejected[0]["reason"]
    assert "no such file" in rejected[1]["reason"]
    assert len(labelled) + len(rejected) == len(rows)


def test_the_label_takes_the_text_column_and_nothing_else_is_lost(chain: Path) -> None:
    before = {row["id"]: row for row in read_rows(chain / "train.jsonl")}
    for row in read_rows(chain / "out/run_pseudo_labelling/pseudo_labels.jsonl"):
        original = before[row["id"]]
        assert row["origin_text"] == original["text"]
        assert row["text"] != original["text"]
        assert row["cer/wer"] is None or 0 <= row["cer/wer"] < float("inf")
        assert row.get("note") == original.get("note")
        assert set(row) > set(original)


def test_each_folder_holds_the_config_byte_for_byte_and_how_it_ended(chain: Path) -> None:
    for step in STEPS:
        copy = chain / "out" / step / f"{step}.json"
        assert copy.read_bytes() == (chain / f"{step}.json").read_bytes()
        info = json.loads((chain / "out" / step / "run_info.json").read_text())
        assert info["outcome"] == "done"
        assert info["versions"]["transformers"]


def test_a_finished_run_logs_that_and_touches_nothing(chain: Path) -> None:
    results = chain / "out/run_pseudo_labelling"
    before = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    done = run_config(chain, "run_pseudo_labelling", chain / "run_pseudo_labelling.json")
    assert done.returncode == 0
    assert "nothing to do" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in results.iterdir()} == before


def test_the_log_of_training_is_whole(chain: Path) -> None:
    rows = read_rows(chain / "out/run_distillation/metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 9))
    scored = {row["step"] for row in rows if "validation/student/error_rate" in row}
    assert scored == {4, 8}
    assert len([row for row in rows if "validation/teacher/error_rate" in row]) == 1
    kept = sorted(path.name for path in (chain / "out/run_distillation/checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000006"]
    assert list((chain / "out/run_distillation/logs").glob("events.*"))


@pytest.mark.slow
def test_the_copies_of_the_configs_reproduce_every_bit(chain: Path) -> None:
    """Each step here imports for itself, as a user's does, with the network blocked from then."""
    configs = {}
    for step in STEPS:
        copy = (chain / "out" / step / f"{step}.json").read_text()
        configs[step] = json.loads(copy.replace('"out/', '"again/'))
    run_chain(chain, configs, run_config_afresh)
    for name in REPRODUCED:
        first, second = chain / "out" / name, chain / "again" / name
        assert first.read_bytes() == second.read_bytes(), name


def start(folder: Path, step: str, config: Path) -> subprocess.Popen[bytes]:
    script = str(REPOSITORY / f"{step}.py")
    log = (folder / "killed.log").open("ab")
    return subprocess.Popen(
        [sys.executable, script, str(config)],
        cwd=folder,
        stderr=log,
        start_new_session=True,
    )


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until the run has got so far that a stop falls into its work."""
    for _ in range(1200):
        if ready() or process.poll() is not None:
            return
        time.sleep(0.05)
    raise AssertionError("the run never got so far")


def write_long_config(chain: Path, name: str, step: str) -> Path:
    """Write a config with more clips and smaller batches, so that a stop falls into the work."""
    if not (chain / "zh-500.jsonl").exists():
        make_corpus(chain, 60, start=500)
    configs = chain_configs(name)
    labelling = configs["run_pseudo_labelling"]
    labelling["data"]["manifest"] = "zh-500.jsonl"
    labelling["decoding"] = {"batch_size": 2, "max_new_tokens": 200}
    distillation = configs["run_distillation"]
    distillation["student"]["path"] = "out/create_student_model"
    distillation["data"]["train_manifests"] = ["out/run_pseudo_labelling/pseudo_labels.jsonl"]
    distillation["schedule"] = {"warmup_steps": 2, "epochs": None, "max_steps": 60}
    distillation["validation"]["every_steps"] = 20
    path = chain / f"{name}.json"
    path.write_text(json.dumps(configs[step]))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_labelling_goes_on_to_the_same_bytes(chain: Path, number: signal.Signals) -> None:
    whole = chain / "whole/run_pseudo_labelling/pseudo_labels.jsonl"
    if not whole.exists():
        path = write_long_config(chain, "whole", "run_pseudo_labelling")
        assert run_config(chain, "run_pseudo_labelling", path).returncode == 0
    path = write_long_config(chain, f"stopped-{number.name}", "run_pseudo_labelling")
    results = chain / f"stopped-{number.name}" / "run_pseudo_labelling"
    for stop in range(3):
        process = start(chain, "run_pseudo_labelling", path)
        parts = results / "parts"
        wait_until(lambda parts=parts, stop=stop: part_lines(parts) > 8 * stop + 2, process)
        time.sleep(random.Random(stop).uniform(0, 0.1))
        os.killpg(process.pid, number)  # its workers too, as a job scheduler does
        code = process.wait(timeout=60)
        assert code == (-9 if number == signal.SIGKILL else 128 + number)
        assert not (results / "pseudo_labels.jsonl").exists()
        expected = "running" if number == signal.SIGKILL else "interrupted"
        assert json.loads((results / "run_info.json").read_text())["outcome"] == expected
    assert run_config(chain, "run_pseudo_labelling", path).returncode == 0
    assert (results / "pseudo_labels.jsonl").read_bytes() == whole.read_bytes()
    assert not (results / "parts").exists()


def part_lines(parts: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in parts.glob("*.results"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_distillation_goes_on_to_the_same_weights(
    chain: Path, number: signal.Signals
) -> None:
    whole = chain / "whole-training/run_distillation"
    if not whole.exists():
        path = write_long_config(chain, "whole-training", "run_distillation")
        assert run_config(chain, "run_distillation", path).returncode == 0
    path = write_long_config(chain, f"training-{number.name}", "run_distillation")
    results = chain / f"training-{number.name}" / "run_distillation"
    for stop in range(3):
        process = start(chain, "run_distillation", path)
        log = results / "metrics.jsonl"
        wait_until(
            lambda log=log, stop=stop: (
                log.exists()
                and max((row["step"] for row in read_whole_rows(log)), default=0) > 14 * stop + 8
            ),
            process,
        )
        os.killpg(process.pid, number)  # its workers too, as a job scheduler does
        code = process.wait(timeout=60)
        assert code == (-9 if number == signal.SIGKILL else 128 + number)
        assert not (results / "final").exists()
    assert run_config(chain, "run_distillation", path).returncode == 0
    for name in ("final/model.safetensors", "best/model.safetensors"):
        assert (results / name).read_bytes() == (whole / name).read_bytes(), name
    timeless = [
        [{k: v for k, v in row.items() if "per_second" not in k} for row in read_rows(folder)]
        for folder in (results / "metrics.jsonl", whole / "metrics.jsonl")
    ]
    assert timeless[0] == timeless[1]


def read_whole_rows(path: Path) -> list[Config]:
    return [json.loads(line) for line in path.read_bytes().splitlines(True) if line[-1:] == b"\n"]


@pytest.mark.slow
def test_two_processes_label_the_same_bytes(chain: Path) -> None:
    whole = chain / "out/run_pseudo_labelling"
    config = chain_configs("two")["run_pseudo_labelling"]
    path = chain / "two.json"
    path.write_text(json.dumps(config))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(REPOSITORY / "run_pseudo_labelling.py"),
            str(path),
        ],
        cwd=chain,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name in ("pseudo_labels.jsonl", "rejected.jsonl"):
        two = chain / "two/run_pseudo_labelling" / name
        assert two.read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_the_scripts_run_on_real_speech(real_speech: Path, chain: Path) -> None:
    """Columns of other names, three languages, a window of 30 s, clips that are too long for it."""
    layout = {"window_seconds": 30, "width": 32, "decoder_layers": 3, "talkative": True}
    make_model_folder(chain / "wide", **layout)
    languages = ("zh-TW", "zh-CN", "en")
    rows = [row for row in read_rows(real_speech / "manifest.jsonl") if row["lang"] in languages]
    for row in rows:
        row["path"] = str(real_speech / row["path"])
    write_rows(chain / "real.jsonl", rows)
    configs = chain_configs("real")
    columns = {"audio": "path", "language": "lang", "id": None}
    data = {"manifest": "real.jsonl", "columns": columns}
    decoding = {"batch_size": 8, "max_new_tokens": 30}
    for step, key in (("run_pseudo_labelling", "teacher"), ("offline_inference", "model")):
        configs[step] |= {"data": data, "decoding": decoding, key: {"path": "wide"}}
    configs["create_student_model"]["teacher"] = {"path": "wide"}
    configs["create_student_model"]["layer_scoring"]["columns"] = columns
    configs["run_distillation"] |= {"teacher": {"path": "wide"}}
    configs["run_distillation"]["data"] |= {"dev_manifest": "real.jsonl", "columns": columns}
    configs["run_distillation"]["schedule"]["max_steps"] = 3
    configs["offline_inference"]["model"] = {"path": "real/run_distillation/final"}
    configs["eval"] |= {"columns": {"id": None, "language": "lang"}, "group_by": ["lang"]}
    run_chain(chain, configs)
    too_long = [row for row in rows if row["duration"] > 30]
    for step, name in (
        ("run_pseudo_labelling", "pseudo_labels"),
        ("offline_inference", "hypotheses"),
    ):
        transcribed = read_rows(chain / "real" / step / f"{name}.jsonl")
        rejected = read_rows(chain / "real" / step / "rejected.jsonl")
        assert len(transcribed) + len(rejected) == len(rows)
        assert [row["row"]["path"] for row in rejected] == [row["path"] for row in too_long]
        assert all("too long" in row["reason"] for row in rejected)
    summary = json.loads((chain / "real/eval/summary.json").read_text())
    assert set(summary["systems"]["s"]["groups"]["lang"]) == set(languages)
