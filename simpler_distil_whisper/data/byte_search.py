"""Looking through the bytes of a file of any size, a block at a time: for a pattern, for zeros.

It knows nothing of what the bytes mean.
"""

import errno
import os
from collections.abc import Iterator
from typing import BinaryIO

BLOCK_BYTES = 2**20  # searched at once
SEARCHED_BYTES = 2**27  # at most, where a structure does not tell its end
ZERO_BYTES = 2**24  # so many at the end are left out
MOST_ZERO_BYTES = 2**32  # looked through, where the file system does not tell of them


def read_at(file: BinaryIO, offset: int, count: int) -> bytes:
    """Return this many bytes from a place on, or as many of them as there are."""
    file.seek(offset)
    return file.read(count)


def positions_of(file: BinaryIO, pattern: bytes, start: int, end: int) -> Iterator[int]:
    """Yield where a pattern begins in a part of a file."""
    overlap = len(pattern) - 1
    while start < end:
        block = read_at(file, start, min(BLOCK_BYTES, end + overlap - start))
        if len(block) <= overlap:
            return
        place = block.find(pattern)
        while place >= 0:
            yield start + place
            place = block.find(pattern, place + 1)
        start += len(block) - overlap


def _end_of_written(file: BinaryIO, size: int) -> int:
    """Return where the last hole of a sparse file begins, if it reaches to the end."""
    if not hasattr(os, "SEEK_HOLE"):
        return size
    descriptor, end = file.fileno(), 0
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        while end < size:
            end = os.lseek(descriptor, end, os.SEEK_HOLE)
            if end < size:
                end = os.lseek(descriptor, end, os.SEEK_DATA)
    except OSError as error:
        return end if error.errno == errno.ENXIO else size  # no data behind the hole
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)
    return size


def end_of_content(file: BinaryIO, size: int) -> int:
    """Return where a file ends without the zeros at its end, if these are very many."""
    written = end = _end_of_written(file, size)
    while end > 0 and written - end < MOST_ZERO_BYTES:
        block = read_at(file, max(0, end - BLOCK_BYTES), min(end, BLOCK_BYTES))
        if rest := block.rstrip(b"\0"):
            end -= len(block) - len(rest)
            break
        end -= len(block)
    return end if size - end > ZERO_BYTES else size
