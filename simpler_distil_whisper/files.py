"""Opening files that others have named, many of them where that is slow, and locking our own.

A path can lead to a pipe, which is waited for, or to a device that never ends: only files on disk
are read.
"""

import errno
import hashlib
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

if sys.platform != "win32":
    import fcntl

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger("simpler_distil_whisper")

# With O_NONBLOCK, a pipe that nobody writes to is opened at once. Windows lacks it.
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
KERNEL_FOLDERS = (Path("/proc"), Path("/sys"))  # regular files by name alone; some never end
FILES_AT_ONCE = 8
FIRST_FILES = 32  # tell whether files are at hand
SECONDS_AT_HAND = 0.002
LONGEST_NAME = 255
OF_A_MODEL = ("*config.json", "tokenizer.json", "*.safetensors")
PARTS, PART_BYTES = 256, 2**16  # of a file that is looked at
LONGEST_PATH = 4000
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def read_files(read: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return what each item's file tells, in order; several are read at once where that is slow.

    On a network a file takes milliseconds to open, and many are waited for together. Threads that
    read what is at hand get in each other's way: they were measured to take five times as long.
    """
    started = time.perf_counter()
    results = [read(item) for item in items[:FIRST_FILES]]
    rest = items[FIRST_FILES:]
    if time.perf_counter() - started <= SECONDS_AT_HAND * len(results):
        return [*results, *map(read, rest)]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        return [*results, *pool.map(read, rest)]


def open_regular_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Return a file on disk, opened to be read.

    Raises:
        OSError: it cannot be opened, or is something else, such as a pipe; `strerror` is the
            reason in words.
    """
    try:
        descriptor = os.open(path, FLAGS)
    except ValueError:
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    try:
        _check_on_disk(os.fstat(descriptor))
    except OSError as error:
        os.close(descriptor)
        raise OSError(error.errno, error.strerror, str(path)) from None
    return os.fdopen(descriptor, "rb")


def fingerprint(path: Path) -> str:
    """Return a hash by which to tell whether a file, or a model's folder, holds the same as before.

    Of a large file, parts are read that are evenly spread: in trained weights each one changes.

    Raises:
        OSError: it cannot be read.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for pattern in OF_A_MODEL for file in path.glob(pattern))
    digest = hashlib.sha256()
    for file in files:
        with open_regular_file(file) as content:
            size = os.fstat(content.fileno()).st_size
            digest.update(f"{size} ".encode())
            for start in range(0, size, max(PART_BYTES, size // PARTS)):
                content.seek(start)
                digest.update(content.read(PART_BYTES))
    return digest.hexdigest()


def why_impossible(path: Path) -> str | None:
    """Return why no file can have this path; None if one can."""
    try:
        parts = [os.fsencode(part) for part in path.parts]
    except ValueError:
        return "holds half a character (a lone surrogate), which no path can"
    if any(b"\0" in part for part in parts):
        return "holds a NUL character, which no path can"
    if any(len(part) > LONGEST_NAME for part in parts):
        return f"holds a name of more than {LONGEST_NAME} bytes, which file systems do not take"
    if len(os.fsencode(path)) > LONGEST_PATH:
        return f"is longer than {LONGEST_PATH} bytes, which systems do not take"
    return None


def _check_on_disk(status: os.stat_result) -> None:
    """Raise OSError if an open file is none on disk."""
    kind = KINDS.get(stat.S_IFMT(status.st_mode))
    if stat.S_ISREG(status.st_mode):
        kernel = [folder.stat().st_dev for folder in KERNEL_FOLDERS if folder.is_mount()]
        kind = "a file of the kernel" if status.st_dev in kernel else None
        if kind is None:
            return
    raise OSError(errno.EINVAL, f"it is {kind or 'something else'}, not a file on disk")


def read_regular_file(path: str | os.PathLike[str], largest: int) -> bytes:
    """Return the content of a file on disk.

    Raises:
        OSError: as `open_regular_file`, or it has more than `largest` bytes.
    """
    with open_regular_file(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise OSError(errno.EINVAL, f"it has more than {largest} bytes", str(path))
    return content


def version_of(path: Path) -> tuple[int, int] | None:
    """Return what changes with a file's content: its size and time; None if there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # no file can have the name
        return None
    return status.st_size, status.st_mtime_ns


def lock(file: IO[Any]) -> bool:
    """Return whether this process alone now holds a file that it writes, until it ends.

    Where the file system has no locks, that is taken for granted, with a warning.
    """
    if sys.platform != "win32":
        try:
            # Unlike locks of flock, these are not inherited by workers, which outlive a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            log.warning(
                "%s cannot be locked (%s): let no other run write to the same folder",
                file.name,
                error.strerror,
            )
    return True
