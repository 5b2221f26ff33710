"""Results computed by processes ahead of use, some of which die."""

import os
import signal

import pytest

from simpler_distil_whisper.data.workers import WorkerDeath, map_ahead


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


def fail(item: int) -> int:
    raise RuntimeError(f"a bug at {item}")


def test_an_error_in_a_worker_is_no_death() -> None:
    with pytest.raises(RuntimeError, match="a bug at 7"):
        list(map_ahead(fail, [7], 1))
