"""Atomic writes: a file is replaced as a whole, or a kill leaves the old one.

Whole folders are removed or replaced only if they are marked as made here.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from simpler_distil_whisper.config import ConfigError

MARK = ".simpler-distil-whisper"  # a file in each folder that may be removed
IN_THE_WAY = "{} is in the way: no run has made it; move it, or choose another output_dir"


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


def new_folder(path: Path) -> Path:
    """Return a new folder, marked as ours, in the place of one that an earlier run has left.

    Raises:
        ConfigError: somebody else's file or folder is there.
    """
    remove_own(path)
    path.mkdir(parents=True)
    mark(path)
    return path


def mark(folder: Path) -> None:
    """Mark a folder as one that a later run may remove."""
    (folder / MARK).touch()


def remove_own(path: Path) -> None:
    """Remove a folder that is marked as ours, or is empty; do nothing if there is none.

    Raises:
        ConfigError: somebody else's file or folder is there.
    """
    refuse_others(path)
    if not path.is_dir():
        return
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARK:  # until the end, so that what a kill leaves is marked or empty
            entry.unlink()
    shutil.rmtree(path)


def refuse_others(path: Path) -> None:
    """Raise ConfigError if a file is in the place of a folder, or a folder that is not ours."""
    is_own = path.is_dir() and not path.is_symlink()
    is_own = is_own and ((path / MARK).is_file() or not any(path.iterdir()))
    if not is_own and os.path.lexists(path):  # also a link that leads nowhere
        raise ConfigError(IN_THE_WAY.format(path))
