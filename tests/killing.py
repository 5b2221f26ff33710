"""Runs of scripts that die at a chosen import, operation on files, or byte."""

import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import NamedTuple

import scripts
from conftest import REPOSITORY

# `python -c DYING_OF_IMPORTS NUMBER SCRIPT.py SCRIPT.json`: killed at import NUMBER.
DYING_OF_IMPORTS = """
import os, runpy, signal, sys

del sys.argv[0]
left = [int(sys.argv.pop(0))]

def on_event(event, arguments):
    if event == "import":
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(on_event)
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Death(NamedTuple):
    """When a run is killed.

    Attributes:
        operation: at this one of its operations on files, before it is done; from 1, 0: never.
        size: within the write that would make a file larger, in bytes.
        imports: when it imports this one of the modules that it needs; from 1, 0: never.
    """

    operation: int = 0
    size: int | None = None
    imports: int = 0


def start(script: str, folder: Path, death: Death = Death()) -> BaseProcess:  # noqa: B008
    """Start what `python SCRIPT.py SCRIPT.json` does in a folder; its output is in `output.txt`."""
    output = folder / "output.txt"
    output.unlink(missing_ok=True)  # it would reach the size at which the run dies before any other
    before = partial(_prepare_death, folder, death)
    return scripts.start(_command(script), folder, (output, output), before)


def run(script: str, folder: Path, death: Death = Death()) -> int | None:  # noqa: B008
    """Run a script to its end or its death; return its exit code."""
    if death.imports:
        dying = [sys.executable, "-c", DYING_OF_IMPORTS, f"{death.imports}", *_command(script)]
        variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(dying, cwd=folder, env=variables, timeout=300).returncode
    process = start(script, folder, death)
    process.join(timeout=300)
    return process.exitcode


def operations(folder: Path) -> int:
    """Return how many operations the last run has come to, if it was not killed."""
    return int((folder / "operations.txt").read_text())


def _command(script: str) -> list[str]:
    name = [str(REPOSITORY / f"{script}.py")]
    if script == "export":
        name = ["-m", "simpler_distil_whisper.export"]
    return [*name, f"{script}.json"]


def _prepare_death(folder: Path, death: Death) -> None:
    if death.size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        limit_files(death.size)
        # Workers hand over tensors in files; the run itself is to die.
        os.register_at_fork(after_in_child=partial(limit_files, resource.RLIM_INFINITY))
    count = _count_operations(folder / "out", death.operation)
    Finalize(None, lambda: (folder / "operations.txt").write_text(f"{count[0]}"), exitpriority=0)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _count_operations(folder: Path, last: int) -> list[int]:
    """Count this process's operations below a folder, and kill it at the last one."""
    count, own, sync = [0], os.getpid(), os.fsync

    def another() -> None:
        count[0] += 1
        if count[0] == last:
            os.kill(own, signal.SIGKILL)
            time.sleep(60)

    def on_event(event: str, arguments: tuple[object, ...]) -> None:
        if os.getpid() != own or not (event in CHANGES or event == "open"):
            return
        path, flags = arguments[0], arguments[-1]
        if not isinstance(path, str | os.PathLike) or not _is_below(os.fspath(path), folder):
            return
        if event in CHANGES or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
            another()

    def counted_sync(file: int) -> None:
        if os.getpid() == own:
            another()
        sync(file)

    sys.addaudithook(on_event)
    os.fsync = counted_sync
    return count


def _is_below(path: str | bytes, folder: Path) -> bool:
    return os.fsdecode(path).startswith((f"{folder}", "out"))
