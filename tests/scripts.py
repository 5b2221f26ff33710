"""Scripts run as processes of their own, forked from one that has done the imports.

The imports cost more than most runs of a tiny model. A run has its own arguments, folder, variables
and output, and ends with an exit code or by a signal, as `python SCRIPT.py` does. It does not show
what a script imports, nor obey variables that are read by what it imports.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

SECONDS = 300
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "simpler_distil_whisper.training.trainer",
        "simpler_distil_whisper.training.preflight",
        "simpler_distil_whisper.decoding.transcription",
        "simpler_distil_whisper.evaluation.html_report",
        "simpler_distil_whisper.labels.quality_page",
        "simpler_distil_whisper.layers.choice",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "pytest",
    ]
)


def start(
    command: list[str],
    folder: Path,
    output: tuple[Path, Path],
    before: Callable[[], object] | None = None,
) -> BaseProcess:
    """Start what `python COMMAND` does in a folder.

    Args:
        command: begins with the path of a script, or with "-m" and the name of a module.
        folder: the working directory of the run.
        output: the files to which stdout and stderr are appended.
        before: is called in the new process, and sent to it pickled.
    """
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):  # torch reads it when it is imported
        multiprocessing.forkserver.ensure_running()
        arguments = (command, folder, output, dict(os.environ), before)
        process = FORKS.Process(target=_run, args=arguments)
        process.start()
    return process


def run(
    command: list[str], folder: Path, before: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run what `python COMMAND` does in a folder to its end; see `start`."""
    with TemporaryDirectory() as captured:
        output = Path(captured, "stdout"), Path(captured, "stderr")
        process = start(command, folder, output, before)
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, SECONDS, *(p.read_bytes() for p in output))
        texts = [path.read_text(encoding="utf-8") for path in output]
    return subprocess.CompletedProcess(command, process.exitcode, *texts)


def run_afresh(
    command: list[str], folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` in a folder, in an interpreter that has imported nothing yet."""
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=folder,
        env={**os.environ, **variables},
        timeout=SECONDS,
    )


def _run(
    command: list[str],
    folder: Path,
    output: tuple[Path, Path],
    variables: dict[str, str],
    before: Callable[[], object] | None,
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as it is in a script, for its workers
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    if before:
        before()
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
