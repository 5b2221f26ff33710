"""Processes that compute ahead of the model, and whose death costs no more than what killed them.

It knows nothing of audio. Called by `batches.py` and by what loads training examples.
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
class Died(Generic[Item]):
    """Stands for the result of an item during which a worker process died."""

    item: Item
    reason: str


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, prefetch: int = 2
) -> Iterator[Result | Died[Item]]:
    """Yield the function's results in order, computed by processes ahead of use.

    When a process dies, the first item without a result is given up, and new processes go on with
    the next. With several workers, or a `prefetch` above 1, it need not be the item that is to
    blame: one worker that prefetches 1 has only one in hand.

    Args:
        function: what is computed for each item; runs in the workers.
        items: taken only as they are needed.
        workers: how many processes; with 0 it is this one, whose death nothing survives.
        prefetch: how many items each worker has in hand.
    """
    if workers == 0:
        yield from map(function, items)
        return
    rest = iter(items)
    in_hand: deque[Item] = deque()

    def handed_out(source: Iterable[Item]) -> Iterator[Item]:
        for item in source:
            in_hand.append(item)
            yield item

    died = True
    while died:
        again, died = list(in_hand), False
        in_hand.clear()
        loader = load_ahead(
            _Function(function), workers, handed_out(itertools.chain(again, rest)), prefetch
        )
        results = _iterate_undisturbed(loader)
        try:
            for result in results:
                in_hand.popleft()
                yield result
        except (RuntimeError, OSError, EOFError) as error:
            if not _is_death(error) or not in_hand:
                raise
            died, reason = True, str(error).partition("\n")[0]
        if died:
            yield Died(in_hand.popleft(), reason)


def _iterate_undisturbed(loader: DataLoader[Item]) -> Iterator[Item]:
    """Return an iterator that tells of a worker's death when it is asked for the next item.

    A DataLoader's own signal handler would raise in the midst of whatever the script does then.
    """
    if not hasattr(signal, "SIGCHLD"):  # Windows
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    results = iter(loader)
    signal.signal(signal.SIGCHLD, handler)
    return results


def _is_death(error: Exception) -> bool:
    """Return whether a worker's end, not an error within a worker, has raised this."""
    return not isinstance(error, RuntimeError) or str(error).startswith("DataLoader worker (pid")


class _Function(Dataset[Result]):
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
    """Return an iterator over the items of a dataset, in order, made by processes ahead of use."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_main_process,
        # Else it would draw a number from the random state on which the student's dropout depends,
        # and a resumed run, which makes its loader anew, would go another way.
        generator=torch.Generator(),
    )


def _as_it_is(item: Item) -> Item:
    return item


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Let Ctrl-C reach only the process that saves the work; it then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
