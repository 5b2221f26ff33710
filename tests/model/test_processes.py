"""Processes that come late, stop for a while, stop for too long, or are killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import REPOSITORY

from simpler_distil_whisper.model.processes import join_processes

WORK = """
import datetime, os, sys, time
from simpler_distil_whisper.model import processes
processes.FOR_THE_START = datetime.timedelta(seconds=90)
processes.join_processes()
print("joined", flush=True)
if os.environ["RANK"] == "1":
    sys.stdin.readline()  # its share of the work
processes.wait_for_everyone()
print("together", processes.smallest_of_all(5 - int(os.environ["RANK"])), flush=True)
if os.environ["RANK"] == "1":
    sys.stdin.readline()
processes.wait_for_everyone(datetime.timedelta(seconds=3))
"""
Start = Callable[[int], "subprocess.Popen[str]"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the process of a rank."""
    port = free_port()
    started: list[subprocess.Popen[str]] = []

    def start_rank(rank: int) -> "subprocess.Popen[str]":
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in launched.items()}
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORK],
            env={
                **os.environ,
                **environment,
                "MASTER_ADDR": "localhost",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(REPOSITORY),
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_rank
    for process in started:
        process.kill()
        process.communicate()


def says(process: "subprocess.Popen[str]", word: str) -> bool:
    assert process.stdout is not None
    return process.stdout.readline().startswith(word)


def go_on(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def start_together(start: Start) -> list["subprocess.Popen[str]"]:
    """Start two processes, the second one late and stopped for a while."""
    first = start(0)
    time.sleep(3)
    second = start(1)
    assert says(second, "joined")
    assert says(first, "joined")
    second.send_signal(signal.SIGSTOP)
    time.sleep(3)
    assert first.poll() is None
    second.send_signal(signal.SIGCONT)
    go_on(second)
    assert says(first, "together 4")
    assert says(second, "together 4")
    return [first, second]


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_who_is_late_is_waited_for_and_who_is_lost_is_named(
    start: Start, end: signal.Signals
) -> None:
    first, second = start_together(start)
    second.send_signal(end)
    _, stderr = first.communicate(timeout=30)
    assert first.returncode == 1
    assert "ProcessLost: process 0 waits for others in vain" in stderr
    assert "Rank 1 failed to pass monitoredBarrier" in stderr
    second.send_signal(signal.SIGCONT)


def test_convolutions_in_float32_are_not_computed_with_fewer_bits() -> None:
    join_processes()
    assert torch.backends.cudnn.allow_tf32 is False


@pytest.mark.gpu
def test_a_process_that_sees_only_its_own_gpu_trains_on_it() -> None:
    work = (
        "import torch; from simpler_distil_whisper.model.processes import make_accelerator;"
        "make_accelerator('float32', 0).prepare(torch.nn.Linear(1, 1))(torch.ones(1).cuda())"
    )
    of_torchrun = {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    done = subprocess.run(
        [sys.executable, "-c", work],
        env={
            **os.environ,
            **of_torchrun,
            "MASTER_PORT": str(free_port()),
            "CUDA_VISIBLE_DEVICES": visible,
            "PYTHONPATH": str(REPOSITORY),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
