"""Fixtures of several test files: folders of outside data, and scripts run as a user runs them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """Run a script of the repository, by name, in the test's folder.

    The config is a dictionary, written to `config.json`, or the path of a file.
    """

    def run(
        name: str, config: dict[str, Any] | Path | None = None, *flags: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        path = config
        if isinstance(config, dict):
            path = tmp_path / "config.json"
            path.write_text(json.dumps(config), encoding="utf-8")
        command = [sys.executable, str(REPOSITORY / f"{name}.py"), *flags]
        command += [str(path)] if path else []
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            cwd=tmp_path,
            env={**os.environ, **environment},
            timeout=300,
        )

    return run
