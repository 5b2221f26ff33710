"""Worker processes that compute ahead of the model or behind it, and recovery when one dies.

Owns the settings of the DataLoaders, and which item is given up when a worker dies. It knows
nothing of audio or models.
"""

import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from simpler_distil_whisper.data.parcels import parcel
from simpler_distil_whisper.run import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

MINUTES_FOR_A_RESULT = 30.0
SECONDS_BETWEEN_CHECKS = 5.0  # of whether the workers are alive
NO_MORE = object()
MOST_WORKERS = 8  # each holds two batches in memory


class LostResultError(DataError):
    """A worker process died, or did not finish in time; ends training with exit code 3."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"A process that reads audio is lost ({reason}). If it was killed, memory may have run "
            "out: lower data.num_workers. Run the same command again to continue"
        )
        self.reason = reason


@dataclass(frozen=True)
class WorkerDeath(Generic[Item]):
    """Takes the place of an item's result if a worker process was lost before it was there."""

    item: Item
    reason: str


def own_cores() -> int:
    """Return this process's share of the cores that the system lets it use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def suitable_workers() -> int:
    """Return how many processes keep the model busy: beside a GPU one core is left to its own."""
    if not torch.cuda.is_available():
        return 1
    return min(MOST_WORKERS, max(1, own_cores() - 1))


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, prefetch: int = 2
) -> Iterator[Result | WorkerDeath[Item]]:
    """Yield the function's results in order, computed by processes ahead of use.

    When a process dies or takes longer than `MINUTES_FOR_A_RESULT`, the first item without a result
    is given up, and new processes go on with the next. With several workers, or a `prefetch` above
    1, that need not be the item that killed the process: only one worker that prefetches 1 has a
    single item in hand.

    Args:
        function: computes the result of an item; runs in the workers.
        items: taken only as they are needed.
        workers: how many processes; with 0 the function runs in this process, without recovery.
        prefetch: how many items each worker has in hand.
    """
    remaining = iter(items)
    in_hand: deque[Item] = deque()

    def hand_out(source: Iterable[Item]) -> Iterator[Item]:
        for item in source:
            in_hand.append(item)
            yield item

    while True:
        again = list(in_hand)
        in_hand.clear()
        order = hand_out(itertools.chain(again, remaining))
        try:
            for result in load_ahead(function, order, workers, prefetch):
                in_hand.popleft()
                yield result
            return
        except LostResultError as lost:
            if not in_hand:
                raise
            reason = lost.reason
        yield WorkerDeath(in_hand.popleft(), reason)


def map_behind(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Yield the function's results in order, computed by a process while the next items are made.

    The results are up to three items late. Those of all items that were made are yielded, also
    where making the next one fails, before its error is raised. If the process is lost, this one
    computes what it had in hand.

    Args:
        function: computes the result of an item.
        items: made in this process, one after the other.
        workers: with 0 the function runs in this process, without delay.
    """
    errors: list[Exception] = []

    def made() -> Iterator[Item]:
        try:
            yield from items
        except Exception as error:
            errors.append(error)

    for result in map_ahead(function, made(), min(workers, 1)):
        yield function(result.item) if isinstance(result, WorkerDeath) else result
    if errors:
        raise errors[0]


def load_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    prefetch: int | None = None,
) -> Iterator[Result]:
    """Yield the function's results in order, computed by processes ahead of use.

    Raises:
        LostResultError: a process died, or the next result did not come in time.
    """
    if workers == 0:
        yield from map(function, items)
        return
    loader = DataLoader(
        _FunctionDataset(function),
        batch_size=None,
        sampler=_undisturbed(items),
        num_workers=workers,
        prefetch_factor=prefetch,
        timeout=SECONDS_BETWEEN_CHECKS,
        collate_fn=_unchanged,
        worker_init_fn=_leave_signals_to_the_main_process,
        # The default would draw a number from the random state on which the student's dropout
        # depends, and a resumed run, which makes its loader anew, would get other numbers.
        generator=torch.Generator(),
    )
    results = iter(loader)
    while (result := _next_result(results)) is not NO_MORE:
        yield result


def _next_result(results: Iterator[Any]) -> Any:
    """Return the next result, or NO_MORE; wait for it while the workers live and time is left."""
    deadline = time.monotonic() + 60 * MINUTES_FOR_A_RESULT
    while True:
        try:
            return next(results, NO_MORE)
        except (RuntimeError, OSError, EOFError) as error:
            reason = str(error).partition("\n")[0]
            if not _is_death(error):
                if not reason.startswith("DataLoader timed out"):
                    raise
                if time.monotonic() < deadline:
                    continue
                reason = f"no result within {MINUTES_FOR_A_RESULT:g} minutes"
        raise LostResultError(reason)


def _undisturbed(items: Iterable[Item]) -> Iterator[Item]:
    """Return an iterator for a DataLoader that reports a worker's death only with the next result.

    The DataLoader's own signal handler would raise in the midst of whatever the script does then.
    It is set before the first item is taken: then the one of now is put back.
    """
    signals = hasattr(signal, "SIGCHLD")  # not on Windows
    handler = signal.getsignal(signal.SIGCHLD) if signals else None

    def taken() -> Iterator[Item]:
        if signals:
            signal.signal(signal.SIGCHLD, handler)
        yield from items

    return taken()


def _is_death(error: Exception) -> bool:
    """Return whether an error reports a worker's death, not an error raised within a worker."""
    return not isinstance(error, RuntimeError) or str(error).startswith("DataLoader worker (pid")


class _FunctionDataset(Dataset[Any]):
    """Lets a DataLoader call a function: the indices are the items."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, item: Any) -> object:
        return parcel(self.function(item))


def _unchanged(item: Item) -> Item:
    return item


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Let only the process that saves the work be stopped; it then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # of a terminal that is closed; not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):  # neither on Windows nor on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_if_the_main_process_asks, daemon=True).start()


def _end_if_the_main_process_asks() -> None:
    """Wait for the main process's SIGTERM, and pass over those that SLURM sends to all processes.

    In a thread of its own, since the main one may hang in a damaged file.
    """
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.kill(os.getpid(), signal.SIGTERM)
