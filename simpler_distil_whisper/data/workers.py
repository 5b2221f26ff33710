"""Worker processes that compute ahead of the model, and recovery when one of them dies.

Owns the settings of the DataLoaders, and which item is given up when a worker dies. It knows
nothing of audio or models.
"""

import itertools
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class WorkerDeath(Generic[Item]):
    """Takes the place of an item's result if a worker process died before it was there."""

    item: Item
    reason: str


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, prefetch: int = 2
) -> Iterator[Result | WorkerDeath[Item]]:
    """Yield the function's results in order, computed by processes ahead of use.

    When a process dies, the first item without a result is given up, and new processes go on with
    the next. With several workers, or a `prefetch` above 1, that need not be the item that killed
    the process: only one worker that prefetches 1 has a single item in hand.

    Args:
        function: computes the result of an item; runs in the workers.
        items: taken only as they are needed.
        workers: how many processes; with 0 the function runs in this process, without recovery.
        prefetch: how many items each worker has in hand.
    """
    if workers == 0:
        yield from map(function, items)
        return
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
        loader = load_ahead(_FunctionDataset(function), workers, order, prefetch)
        results = _iterate_undisturbed(loader)
        try:
            for result in results:
                in_hand.popleft()
                yield result
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not _is_death(error) or not in_hand:
                raise
            reason = str(error).partition("\n")[0]
        yield WorkerDeath(in_hand.popleft(), reason)


def _iterate_undisturbed(loader: DataLoader[Item]) -> Iterator[Item]:
    """Return an iterator that reports a worker's death when it is asked for the next item.

    The DataLoader's own signal handler would raise in the midst of whatever the script does then.
    """
    if not hasattr(signal, "SIGCHLD"):  # Windows
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    results = iter(loader)
    signal.signal(signal.SIGCHLD, handler)
    return results


def _is_death(error: Exception) -> bool:
    """Return whether an error reports a worker's death, not an error raised within a worker."""
    return not isinstance(error, RuntimeError) or str(error).startswith("DataLoader worker (pid")


class _FunctionDataset(Dataset[Result]):
    """Lets a DataLoader call a function: the indices are the items."""

    def __init__(self, function: Callable[[Any], Result]) -> None:
        self.function = function

    def __getitem__(self, item: Any) -> Result:
        return self.function(item)


def load_ahead(
    dataset: Dataset[Item],
    workers: int,
    order: Iterable[Any] | None = None,
    prefetch: int | None = None,
) -> DataLoader[Item]:
    """Return an iterable of a dataset's items, in order, loaded by processes ahead of use."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=_unchanged,
        worker_init_fn=_leave_signals_to_the_main_process,
        # The default would draw a number from the random state on which the student's dropout
        # depends, and a resumed run, which makes its loader anew, would get other numbers.
        generator=torch.Generator(),
    )


def _unchanged(item: Item) -> Item:
    return item


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Let Ctrl-C reach only the process that saves the work; it then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
