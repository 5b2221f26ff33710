"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves either the old one or the whole new one."""
    with written_atomically(path) as file:
        file.write(content)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file, for what is written bit by bit, that takes its place only when it is whole."""
    beside = partial_path(path)
    with beside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def partial_path(path: Path) -> Path:
    """Return where the content of a file stands until all of it is written."""
    return path.with_name(f".{path.name}.tmp")
