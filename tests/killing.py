"""Runs of scripts in processes that die at a chosen operation on files, or at a chosen byte."""

import os
import resource
import signal
import sys
import time
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import NamedTuple

import scripts
from conftest import REPOSITORY

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Death(NamedTuple):
    """When a run is killed.

    Attributes:
        operation: at this one of its operations on files, before it is done; from 1, 0: never.
        size: within the write that would make a file larger, in bytes.
    """

    operation: int = 0
    size: int | None = None


def start(script: str, folder: Path, death: Death = Death()) -> BaseProcess:  # noqa: B008
    """Start what `python SCRIPT.py SCRIPT.json` does in a folder; its output is in `output.txt`."""
    name = [str(REPOSITORY / f"{script}.py")]
    if script == "export":
        name = ["-m", "simpler_distil_whisper.export"]
    output = folder / "output.txt"
    before = partial(_prepare_death, folder, death)
    return scripts.start([*name, f"{script}.json"], folder, (output, output), before)


def run(script: str, folder: Path, death: Death = Death()) -> int | None:  # noqa: B008
    """Run a script to its end or its death; return its exit code."""
    process = start(script, folder, death)
    process.join(timeout=300)
    return process.exitcode


def operations(folder: Path) -> int:
    """Return how many operations the last run has come to, if it was not killed."""
    return int((folder / "operations.txt").read_text())


def _prepare_death(folder: Path, death: Death) -> None:
    if death.size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (death.size, resource.RLIM_INFINITY))
    count = _count_operations(folder / "out", death.operation)
    Finalize(None, lambda: (folder / "operations.txt").write_text(f"{count[0]}"), exitpriority=0)


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
