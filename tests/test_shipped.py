"""What is shipped beside the code: the five configs, the demo's data, and the README's figures."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import scripts
from conftest import REPOSITORY
from tiny import read_rows

from simpler_distil_whisper.config import StrictModel, key_paths, load_config
from simpler_distil_whisper.data.manifest import read_manifest
from simpler_distil_whisper.data.options import Columns

SCRIPTS = (
    "run_pseudo_labelling",
    "create_student_model",
    "run_distillation",
    "offline_inference",
    "eval",
    "export",
)
MODULES = {"export": "simpler_distil_whisper.export.__main__"}
DEMO = REPOSITORY / "demo_data"


def config_class(script: str) -> type[StrictModel]:
    module = importlib.import_module(MODULES.get(script, script))
    config: type[StrictModel] = module.Config
    return config


def paths_in(tree: Any, prefix: str = "") -> set[str]:
    """Key paths of a JSON tree; the items of a list of objects share theirs."""
    if isinstance(tree, list):
        return set().union(*(paths_in(item, prefix) for item in tree)) if tree else set()
    if not isinstance(tree, dict):
        return set()
    paths = set()
    for key, value in tree.items():
        paths |= {prefix + key} | paths_in(value, f"{prefix}{key}.")
    return paths


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shipped_config_is_valid_and_holds_every_key(script: str) -> None:
    path = REPOSITORY / f"{script}.json"
    load_config(path, config_class(script))
    assert paths_in(json.loads(path.read_text())) == {
        key for key, _ in key_paths(config_class(script))
    }


def test_the_commands_of_make_compare_have_valid_configs() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    commands = re.findall(r"python (\w+)\.py (demo/\w+\.json)", makefile)
    assert len(commands) == len(list((REPOSITORY / "demo").glob("*.json"))) == 3
    for script, config in commands:
        load_config(REPOSITORY / config, config_class(script))


def test_the_demo_is_small_enough_to_ship() -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(DEMO / "teacher") <= 6e6
    assert size(DEMO / "audio") <= 8e6


def test_no_sentence_and_no_voice_of_the_test_set_is_trained_or_validated_on() -> None:
    def bare(text: str) -> str:
        return "".join(c for c in text.lower() if unicodedata.category(c)[0] in "LN")

    rows = {split: read_rows(DEMO / f"{split}.jsonl") for split in ("train", "dev", "test")}
    for key, of in (("text", bare), ("speaker", str)):
        seen = {split: {of(row[key]) for row in rows[split]} for split in rows}
        assert not seen["test"] & (seen["train"] | seen["dev"]), key
        assert not seen["dev"] & seen["train"], key


@pytest.mark.parametrize("split", ["train", "dev", "test", "long"])
def test_every_row_of_the_demo_is_usable(split: str) -> None:
    manifest = read_manifest(DEMO / f"{split}.jsonl", Columns())
    assert manifest.rejections == []
    assert all(utterance.text and utterance.language for utterance in manifest.utterances)


def commands_in_readme() -> list[list[str]]:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.split("#")[0].split() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_readme_names_only_what_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    commands = commands_in_readme()
    assert len(commands) >= 10
    for command in commands:
        for word in command:
            if word.endswith((".py", ".json")):
                assert (REPOSITORY / word).is_file(), command
        if command[0] == "make":
            assert f"\n{command[1]}:" in makefile, command


def hurry(config: dict[str, Any]) -> dict[str, Any]:
    """The same config for a few rows and steps."""
    if "data" in config:
        config["data"]["max_utterances"] = 24
    if "schedule" in config:
        config["schedule"] |= {"epochs": None, "max_steps": 4, "warmup_steps": 1}
        config["validation"] |= {"every_steps": 4, "max_utterances": 8}
        config["optimizer"]["learning_rate"] = 1e-3
    return config


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_its_order(tmp_path: Path) -> None:
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in ("simpler_distil_whisper", "demo_data"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for path in REPOSITORY.glob("*.json"):
        (tmp_path / path.name).write_text(json.dumps(hurry(json.loads(path.read_text()))))
    commands = [command for command in commands_in_readme() if command[0] == "python"]
    assert len(commands) >= 7
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command[1:]], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert (tmp_path / "outputs/eval/summary.json").is_file()
    python = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    for code in python:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_bad_rows_of_the_demo_are_refused_one_by_one(tmp_path: Path) -> None:
    config = json.loads((REPOSITORY / "offline_inference.json").read_text())
    config["model"]["path"] = str(DEMO / "teacher")
    config["data"] |= {"manifest": str(DEMO / "bad_rows.jsonl"), "max_bad_fraction": 1.0}
    config["output_dir"] = str(tmp_path / "out")
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(config))
    script = str(REPOSITORY / "offline_inference.py")
    done = scripts.run([script, str(path)], tmp_path)
    assert done.returncode == 0, done.stderr
    answered = read_rows(tmp_path / "out/hypotheses.jsonl")
    rejected = read_rows(tmp_path / "out/rejected.jsonl")
    rows = (DEMO / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answered) + len(rejected) == len([row for row in rows if row.strip()])
    reasons = " ".join(row["reason"] for row in rejected)
    for reason in (
        "no such file",
        "no bytes",
        "cannot be decoded",
        "no samples",
        "NaN",
        "too short",
        "too long",
        "starts at",
        "no audio path",
        "not JSON",
    ):
        assert reason in reasons


@pytest.mark.slow
def test_the_shipped_teacher_has_the_error_rates_of_the_readme(tmp_path: Path) -> None:
    """The bounds leave room for another CPU's rounding, not for another model."""
    configs = {
        "offline_inference": json.loads((REPOSITORY / "offline_inference.json").read_text()),
        "eval": json.loads((REPOSITORY / "eval.json").read_text()),
    }
    configs["offline_inference"]["model"]["path"] = "demo_data/teacher"
    hypotheses = tmp_path / "offline_inference/hypotheses.jsonl"
    configs["eval"]["hypotheses"] = [{"name": "teacher", "path": str(hypotheses)}]
    for script, config in configs.items():
        config["output_dir"] = str(tmp_path / script)
        path = tmp_path / f"{script}.json"
        path.write_text(json.dumps(config))
        done = scripts.run([str(REPOSITORY / f"{script}.py"), str(path)], REPOSITORY)
        assert done.returncode == 0, done.stderr
    groups = json.loads((tmp_path / "eval/summary.json").read_text())["systems"]["teacher"]
    assert groups["groups"]["language"]["zh"]["character"]["rate"] <= 0.03
    assert groups["groups"]["language"]["en"]["word"]["rate"] <= 0.08
