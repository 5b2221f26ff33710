"""Opening files that others have named: a path can lead to a pipe, a device or a folder.

A pipe is waited for, and some devices never end: only files on disk are read.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

# With O_NONBLOCK, a pipe that nobody writes to is opened at once. Windows lacks it.
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
KERNEL_FOLDERS = (Path("/proc"), Path("/sys"))  # regular files by name alone; some never end
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


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
