"""Results computed by processes ahead of use, some of which die, hang, or are short of /dev/shm."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from simpler_distil_whisper.data import workers
from simpler_distil_whisper.data.options import DataLimits
from simpler_distil_whisper.data.workers import (
    LostResultError,
    WorkerDeath,
    load_ahead,
    map_ahead,
    map_behind,
)


def die_at_three(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def test_what_is_computed_ahead_comes_in_order_and_survives_a_death() -> None:
    assert list(map_ahead(die_at_three, [0, 1, 2], 0)) == [0, 1, 4]
    assert list(map_ahead(die_at_three, [5, 4, 6], 2)) == [25, 16, 36]
    assert list(map_ahead(die_at_three, [], 1)) == []
    before = signal.getsignal(signal.SIGCHLD)
    results = list(map_ahead(die_at_three, iter([1, 3, 2, 5]), 1, prefetch=1))
    assert [result for result in results if not isinstance(result, WorkerDeath)] == [1, 4, 25]
    assert isinstance(results[1], WorkerDeath)
    assert results[1].item == 3
    assert "exited unexpectedly" in results[1].reason
    # Else the next death would interrupt the script wherever it is.
    assert signal.getsignal(signal.SIGCHLD) is before


@pytest.mark.parametrize("workers", [0, 1])
def test_what_was_made_before_an_error_is_computed_all_the_same(workers: int) -> None:
    def until_it_fails() -> Iterator[int]:
        yield from [1, 2, 4, 5, 6]
        raise RuntimeError("no more of it")

    results = map_behind(die_at_three, until_it_fails(), workers)
    assert [next(results) for _ in range(5)] == [1, 4, 16, 25, 36]
    with pytest.raises(RuntimeError, match="no more of it"):
        next(results)


@pytest.mark.slow
def test_what_is_computed_behind_takes_no_time_of_what_makes_it() -> None:
    """The process still computes the first results while the last items are made."""
    made = []

    def items() -> Iterator[int]:
        for item in range(5):
            made.append(item)
            yield item

    results = map_behind(die_unless_here, items(), 1)
    assert next(results) == (0, False)
    assert made == [0, 1, 2]
    assert [item for item, _ in results] == [1, 2, 3, 4]


@pytest.mark.slow
def test_results_of_a_process_that_dies_are_computed_here() -> None:
    assert [result for result, _ in map_behind(die_unless_here, [1, 3, 2], 1)] == [1, 3, 2]


def die_unless_here(item: int) -> tuple[int, bool]:
    here = multiprocessing.parent_process() is None
    if item == 3 and not here:
        os.kill(os.getpid(), signal.SIGKILL)
    return item, here


def test_on_a_cpu_one_process_reads_ahead_unless_a_number_is_given() -> None:
    if not torch.cuda.is_available():
        assert DataLimits().workers == DataLimits(num_workers="auto").workers == 1
    assert [DataLimits(num_workers=count).workers for count in (0, 3)] == [0, 3]


def fail(item: int) -> int:
    raise RuntimeError(f"a bug at {item}")


def test_an_error_in_a_worker_is_no_death() -> None:
    with pytest.raises(RuntimeError, match="a bug at 7"):
        list(map_ahead(fail, [7], 1))


def hang_at_three(item: int) -> int:
    if item == 3:
        time.sleep(600)
    return item * item


@pytest.mark.slow
def test_a_worker_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SECONDS_BETWEEN_CHECKS", 0.2)
    monkeypatch.setattr(workers, "MINUTES_FOR_A_RESULT", 1 / 60)
    results = list(map_ahead(hang_at_three, [1, 3, 2], 1, prefetch=1))
    assert results == [1, WorkerDeath(3, "no result within 0.0166667 minutes"), 4]


@pytest.mark.slow
def test_a_dead_worker_ends_what_cannot_do_without_its_result() -> None:
    results = load_ahead(die_at_three, [2, 3], 1, prefetch=1)
    assert next(results) == 4
    with pytest.raises(LostResultError, match="exited unexpectedly.*lower data.num_workers"):
        next(results)


@dataclass
class Batch:
    """What a batch can hold."""

    states: torch.Tensor
    none: torch.Tensor
    scalar: torch.Tensor
    part: torch.Tensor
    array: np.ndarray


def make_batch(size: int) -> Batch:
    numbers = torch.arange(size, dtype=torch.float32)
    return Batch(
        (numbers / 3).bfloat16(),
        torch.empty(0, 4),
        torch.tensor(2.5),
        numbers.view(-1, 2).T[:, 1:],
        np.arange(3) > 1,
    )


def load_large_batches() -> None:
    """Compare what comes from workers with what is made here."""
    sizes = [4_000_000, 2_000_000, 10]
    for expected, batch in zip(
        map(make_batch, sizes), load_ahead(make_batch, sizes, 2), strict=True
    ):
        for name in vars(expected):
            here, there = getattr(expected, name), getattr(batch, name)
            assert here.dtype == there.dtype
            assert here.shape == there.shape
            assert (here == there).all()
        batch.states += 1  # a batch is its reader's own


@pytest.mark.slow
def test_batches_larger_than_shared_memory_arrive_whole() -> None:
    """As in Docker, where /dev/shm has 64 MB; here it has one."""
    script = "import test_workers; test_workers.load_large_batches(); print('all the same')"
    small = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", small, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    result = subprocess.run(
        [*command, sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{REPOSITORY / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == "all the same\n", result.stderr
