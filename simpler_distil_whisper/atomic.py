"""Atomic writes: a file is replaced as a whole, or a kill leaves the old one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the content of a file atomically."""
    with written_atomically(path) as file:
        file.write(content)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write to; it replaces `path` at the end of the `with` block."""
    partial = partial_path(path)
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def partial_path(path: Path) -> Path:
    """Return the path that a file has until all of its content is written."""
    return path.with_name(f".{path.name}.tmp")
