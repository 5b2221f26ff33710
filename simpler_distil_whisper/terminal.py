"""What reaches the terminal and the log: text in which nothing can act on the terminal.

Texts, names and paths come from others' files. Sent as they are, escape sequences in them could
clear the screen, and marks of direction could show one path as another. Files keep them. Owns where
a logger's records go, and in which form.
"""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

# Controls other than tab and line end, line separators, overrides of direction, half characters.
ACTING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return a text in which control characters are shown by their escapes in Python."""
    return ACTING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def visible_in_line(text: str) -> str:
    """Return a text for one line or one cell of a table: also tabs and line ends are shown."""
    return visible(text).replace("\t", "\\t").replace("\n", "\\n")


def open_closed_streams() -> None:
    """Let what a parent has closed lead nowhere: the next file that is opened would take its place.

    Python has None where stdin, stdout or stderr was closed when it started.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def show(text: str) -> None:
    """Print a text; a reader that has gone, such as `head`, is no error."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = visible(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(shown, end="", flush=True)
    except OSError:
        # Else Python would complain at its end about what it could not print.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class VisibleFormatter(logging.Formatter):
    """Formats log records so that nothing in them acts on the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as it is shown."""
        return visible(super().format(record))


class AboveTheProgressBar(logging.Handler):
    """Writes to stderr without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless the terminal has gone."""
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


class LogFile(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to a file; what a full disk cannot take is left to the work itself to report."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Leave the record out."""


def log_to_stderr(log: logging.Logger, level: int) -> None:
    """Let a logger write what is at least of this level to stderr, and nothing anywhere else."""
    handler = AboveTheProgressBar()
    handler.setFormatter(VisibleFormatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(level)


@contextlib.contextmanager
def log_to_file(log: logging.Logger, file: TextIO | None) -> Iterator[None]:
    """Let a logger write to a file as well, which is closed at the end; None: to none."""
    if file is None:
        yield
        return
    handler = LogFile(file)
    handler.setFormatter(VisibleFormatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):  # of a full disk; only now does its lock end
            file.close()
