"""Fixtures of several test files: outside data, a model, states of this process, scripts as run."""

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import scripts

REPOSITORY = Path(__file__).parents[1]
RunScript = Callable[..., subprocess.CompletedProcess[str]]


def folder_named_by(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} names no folder")
    folder = Path(value)
    assert folder.is_dir(), f"{variable} is {value}, which is no folder"
    return folder


@pytest.fixture(scope="session")
def real_speech() -> Path:
    """Recordings of people, with a manifest.jsonl that states the length of each."""
    return folder_named_by("SDW_REAL_SPEECH")


@pytest.fixture(scope="session")
def cases() -> Path:
    """Small inputs that failed once."""
    return folder_named_by("SDW_CASES")


@pytest.fixture(scope="session")
def wer_oracle() -> Path:
    """Pairs of texts whose errors other programs have counted."""
    return folder_named_by("SDW_WER_ORACLE")


@pytest.fixture(scope="module")
def one_thread() -> None:
    """Let torch use one thread, so that sums are the same to the last bit."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A window of 2 s; 96 to 224 tokens, other words and timestamps for different audio."""
    from tiny import make_model_folder

    from simpler_distil_whisper.model.folder import read_model_folder
    from simpler_distil_whisper.model.whisper import load_whisper

    path = make_model_folder(
        tmp_path_factory.mktemp("model"), languages=["en", "zh", "ja"], talkative=True, seed=53
    )
    return load_whisper(read_model_folder(path, None, "model"))


@pytest.fixture
def no_remarks_yet() -> None:
    """A process logs only so many remarks; a test with this is one that has logged none."""
    from simpler_distil_whisper.data import audio

    audio._log_once.cache_clear()


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """Run a script of the repository, by name, in the test's folder.

    The config is a dictionary, written to `config.json`, or the path of a file.
    """
    return partial(_run_script, tmp_path, scripts.run)


@pytest.fixture
def run_script_afresh(tmp_path: Path) -> RunScript:
    """The same by a new interpreter, which imports what the script needs; keywords are variables.

    To be used where it matters what is imported, or a variable that is read by an import.
    """
    return partial(_run_script, tmp_path, scripts.run_afresh)


def _run_script(
    folder: Path,
    run: RunScript,
    name: str,
    config: dict[str, Any] | Path | None = None,
    *flags: str,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    path = config
    if isinstance(config, dict):
        path = folder / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
    command = [str(REPOSITORY / f"{name}.py"), *flags, *([str(path)] if path else [])]
    return run(command, folder, **variables)
