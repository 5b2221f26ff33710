"""Stop signals: what they raise, and who handles them."""

import contextlib
import signal
from collections.abc import Callable, Iterator

STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Interrupted(Exception):
    """A stop signal came, and all work is saved; the script ends with code 128 + signal number."""


class StopSignal(KeyboardInterrupt):
    """A stop signal came where there is no work to save; its number is the only argument."""


@contextlib.contextmanager
def handling(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle stop signals, but not a SIGHUP that `nohup` has ignored.

    A SIGINT is handled even so: shells have it ignored in what scripts run in the background, but
    whoever sends one there means it.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    hangup = getattr(signal, "SIGHUP", None)
    handled = {
        number: old
        for number, old in before.items()
        if number != hangup or old is not signal.SIG_IGN
    }
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in handled.items():
            signal.signal(number, old)


def stop_at_once(number: int, frame: object) -> None:
    """Raise `StopSignal`: there is no work to save yet."""
    raise StopSignal(number)
