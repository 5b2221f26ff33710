"""A recording within a file, as a file of its own."""

import io
import os
from typing import BinaryIO

from simpler_distil_whisper.data.containers import Structure


class PartOfFile(io.BufferedIOBase):
    """A recording within a file, as a file: with the length in its header that it has."""

    def __init__(self, file: BinaryIO, structure: Structure) -> None:
        # By libsndfile, the position may be moved behind the buffer of the file.
        self._file = io.FileIO(file.fileno(), closefd=False)
        self._structure, self._position = structure, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Return the new position, or -1."""
        size = self._structure.end - self._structure.begin
        position = offset + {os.SEEK_CUR: self._position, os.SEEK_END: size}.get(whence, 0)
        if position < 0:
            return -1
        self._position = position
        return position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def read(self, count: int | None = -1, /) -> bytes:
        """Return the next bytes, as they should be."""
        place = self._structure.begin + self._position
        left = max(0, self._structure.end - place)
        self._file.seek(place)
        content = self._file.read(left if count is None or count < 0 else min(count, left))
        if self._structure.patch:
            start, right = self._structure.patch
            content = bytearray(content)
            for index, byte in enumerate(right, start - place):
                if 0 <= index < len(content):
                    content[index] = byte
        self._position += len(content)
        return bytes(content)
