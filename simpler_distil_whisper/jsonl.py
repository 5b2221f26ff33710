"""JSON lines: one object a line, read with a reason for every line that holds none.

Called by `manifest.py` and `hypotheses.py`, whose files are JSON lines.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simpler_distil_whisper.config import ConfigError

Row = dict[str, Any]


DEEPEST = 100  # levels of a row; with ten times as many Python can neither copy nor send it


class RowError(ValueError):
    """A row that cannot be used; the message is the reason."""


def numbered_lines(path: Path, key: str) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of each line that is not blank.

    Args:
        path: the file.
        key: the config key that names it, for the message.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, line.strip()
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror}") from None


def parse_row(line: bytes) -> Row:
    """Return the JSON object in one line.

    Raises:
        RowError: the line holds no object, or one that standard JSON in UTF-8 cannot hold.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
        # What Python reads but cannot write again would end the run when an answer is kept.
        to_line(row).encode()
        if _depth(row) > DEEPEST:
            raise RecursionError
    except UnicodeDecodeError:
        raise RowError("not UTF-8") from None
    except UnicodeEncodeError:
        raise RowError("holds half a character (a lone surrogate)") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg}") from None
    except RecursionError:
        raise RowError("not JSON: nested too deeply") from None
    except ValueError:
        raise RowError("not JSON: a number is NaN, infinite or too long") from None
    if not isinstance(row, dict):
        raise RowError(f"not a JSON object but {type(row).__name__}")
    return row


def to_line(row: object) -> str:
    """Return the line that holds a row, with its end."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _depth(value: object) -> int:
    """Return how many lists and objects stand within each other."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)
