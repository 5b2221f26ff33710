"""How far long work has come: a bar on a terminal, otherwise lines in the log.

Owns how progress and the time left are shown. It does not count the work itself.
"""

import contextlib
import datetime
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from simpler_distil_whisper.launch import is_main_process
from simpler_distil_whisper.run import log

SECONDS_BETWEEN_LINES = 30.0  # in the log, where stderr is no terminal

Item = TypeVar("Item")


class Progress:
    """Progress of long work, with the time left: a bar on a terminal, otherwise lines in the log.

    Use it in a `with` block and call `advance`, or loop `over` the items. Only the main process
    shows anything.
    """

    def __init__(self, what: str, unit: str, total: int, done: int = 0) -> None:
        """Start at `done` of `total`, where an earlier run has stopped."""
        self.what, self.unit, self.total, self.done = what, unit, total, done
        self._done_before = done
        self._started = self._shown = time.monotonic()
        hidden = not (is_main_process() and sys.stderr.isatty())
        self._bar = tqdm(desc=what, unit=f" {unit}", total=total, initial=done, disable=hidden)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # the terminal has gone
            self._bar.close()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; each counts as done when the loop asks for the next."""
        with self:
            for item in items:
                yield item
                self.advance()

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self.done += count
        with contextlib.suppress(OSError):
            self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and is_main_process() and now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            each = (now - self._started) / (self.done - self._done_before)
            left = datetime.timedelta(seconds=round(each * (self.total - self.done)))
            where = f"{self.done} of {self.total} {self.unit}"
            log.info("%s: %s, about %s left", self.what, where, left)
