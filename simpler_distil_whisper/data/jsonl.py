"""JSON lines: one object per line, read with a reason for every line that holds none.

Owns what counts as a row; which fields a row needs is decided in `row_checks.py` and elsewhere.
"""

import codecs
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from simpler_distil_whisper.config import ConfigError, shortened
from simpler_distil_whisper.data.plain_text import TEXT_BYTES, first_line
from simpler_distil_whisper.files import open_regular_file

Row = dict[str, Any]
PlacedLine = tuple[int, int, bytes]  # number, from 1, offset and bytes of a line

LONGEST_ROW = 2**25  # bytes
LONGEST_TEXT = 1_000_000  # characters; tokenizers and alignments take memory by the length
LONGEST_SECONDS = 1e9
UNKNOWN = "unknown"  # in reports, the group of the rows that `category` gives no name
MOST_DIGITS = 300  # of a whole number, which can then be a float too
DEEPEST = 100  # nested levels of a row; Python can neither copy nor pickle ten times as many
GZIP_START = b"\x1f\x8b"


class RowError(ValueError):
    """A row that cannot be used; the message is the reason."""


def placed_lines(path: Path, key: str) -> Iterator[PlacedLine]:
    """Yield the number, from 1, the offset in bytes and the bytes of each line that is not blank.

    Of a line that is too long to be a row, only the beginning is yielded.

    Args:
        path: the file.
        key: the config key that names it, for the message.

    Raises:
        ConfigError: the file cannot be read.
    """
    offset = 0
    try:
        with open_regular_file(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_ROW + 1), b""), 1):
                if len(line) > LONGEST_ROW:
                    yield number, offset, line
                elif not line.isspace():
                    yield number, offset, line.strip()
                while line and not line.endswith(b"\n"):
                    offset += len(line)
                    line = file.readline(LONGEST_ROW)
                offset += len(line)
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror}") from None


def own_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the offset in bytes and the content of each row of a file in the output folder.

    Rows written here may be longer than those that are read: escapes and new columns add to them.

    Raises:
        ConfigError: the file cannot be read.
    """
    offset = 0
    try:
        with open_regular_file(path) as file:
            for line in file:
                if not line.isspace():
                    yield offset, json.loads(line)
                offset += len(line)
    except OSError as error:
        raise ConfigError(f"output_dir: {path} cannot be read: {error.strerror}") from None


def row_at(file: BinaryIO, offset: int) -> Row:
    """Return the row that begins at an offset in bytes."""
    file.seek(offset)
    row: Row = json.loads(file.readline())
    return row


def parse_row(line: bytes) -> Row:
    """Return the JSON object in one line.

    Raises:
        RowError: the line is too long, or holds no object, or one that standard JSON in UTF-8
            cannot represent, or the same key twice, so that a value would be lost.
    """
    if len(line) > LONGEST_ROW:
        raise RowError(f"longer than the {LONGEST_ROW // 2**20} MiB that a row may have")
    try:
        row = _decoder.decode(line.removeprefix(codecs.BOM_UTF8).decode())
        if b"\\u" in line:
            to_line(row).encode()
        if line.count(b"[") + line.count(b"{") > DEEPEST and _depth(row) > DEEPEST:
            raise RecursionError
    except RowError:
        raise
    except UnicodeDecodeError:
        raise RowError("not UTF-8") from None
    except UnicodeEncodeError:
        raise RowError("holds half a character (a lone surrogate)") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg}") from None
    except RecursionError:
        raise RowError("not JSON: nested too deeply") from None
    except ValueError:  # of `int`
        raise RowError("not JSON: a number is too long") from None
    if not isinstance(row, dict):
        raise RowError(f"not a JSON object but {type(row).__name__}")
    return row


def other_format(line: bytes) -> str | None:
    """Return what a file is instead of JSON lines, by its first line, and what to do; or None."""
    if line.startswith(GZIP_START):
        return "it is compressed by gzip; unpack it"
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it is in UTF-16; save it as UTF-8"
    text = first_line(line[:TEXT_BYTES])
    if text is None or text.startswith("{"):
        return None
    kind = "a JSON array" if text.startswith("[") else "a table or other text"
    return f"it is {kind}; it must have one JSON object per line"


def to_line(row: object) -> str:
    """Return a row as a line, with its line end."""
    return _encoder.encode(row) + "\n"


def check_text(value: object, column: str) -> None:
    """Raise RowError if the value of a column is neither a text of a usable length nor null."""
    if value is not None and not isinstance(value, str):
        raise RowError(f'"{column}" is not a string: {quoted(value)}')
    if value is not None and len(value) > LONGEST_TEXT:
        raise RowError(f'"{column}" has more than {LONGEST_TEXT} characters')


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value of a row is a number; `true`, an int in Python, is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def category(value: object) -> str | None:
    """Return the name of the group of rows with this value of a column; None if it tells nothing.

    Tables export a missing value as a blank one: such rows have nothing in common.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def quoted(value: object) -> str:
    """Return a value of a row for a message."""
    return shortened(to_line(value).strip())


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise RowError(f"has the key {shortened(json.dumps(key))} twice in one object")
    return row


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise RowError(f"not JSON: a number is NaN or infinite: {number:.20}")
    return value


def _whole(number: str) -> int:
    if len(number) > MOST_DIGITS:
        raise RowError(f"not JSON: a number of more than {MOST_DIGITS} digits: {number:.20}")
    return int(number)


# What Python can read but not write again would end a run when it writes a result. Hence `_finite`,
# and in `parse_row` the encoding of rows with escapes, which alone can hold half a character.
_decoder = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_finite, parse_int=_whole, parse_constant=_finite
)
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def _depth(value: object) -> int:
    """Return how deeply lists and objects are nested."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def seconds_in(row: Row, column: str | None) -> float | None:
    """Return the time under a key; None if there is no key, or what stands there can be no time."""
    value = row.get(column) if column else None
    return float(value) if is_number(value) and 0 <= value < LONGEST_SECONDS else None
