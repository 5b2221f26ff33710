"""Results handed from a worker process to its parent, in memory that no mount limits.

torch hands tensors over in files of /dev/shm. Docker makes it 64 MB small, and a result that does
not fit is dropped there, while the parent waits for it for ever. Owns nothing but the way of the
bytes.
"""

import io
import itertools
import mmap
import os
import pickle
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as torch allocates: other alignments can change the last bit of a product


class Parcel:
    """A value on its way to another process: what is pickled as a parcel is loaded as the value.

    Its bytes lie in an anonymous file, so a kill leaves nothing behind, and only the file's
    descriptor goes through the queue: a worker that is killed leaves no half of a message in it.
    """

    def __init__(self, value: object) -> None:
        """Copy the value's bytes; errors are raised here, not in the thread that feeds the queue.

        Raises:
            OSError: there is no room, or no descriptor left.
        """
        stream = io.BytesIO()
        buffers: list[pickle.PickleBuffer] = []
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
        parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
        self._sizes = [part.nbytes for part in parts]
        with os.fdopen(os.memfd_create("parcel"), "wb") as file:
            for start, part in zip(_starts(self._sizes), parts, strict=True):
                file.seek(start)
                file.write(part)
            file.flush()
            self._file = DupFd(file.fileno())

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what to pickle in place of the value."""
        return _unpacked, (self._file, self._sizes)


def parcel(value: object) -> object:
    """Return the value as a parcel where the system has anonymous files, else as it is."""
    return Parcel(value) if hasattr(os, "memfd_create") else value


class _Pickler(pickle.Pickler):
    """Leaves the bytes of tensors out of the stream, as pickle does with those of arrays."""

    def reducer_override(self, value: object) -> Any:
        if type(value) is not Tensor:
            return NotImplemented
        data = value.contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(data.data), value.dtype, value.shape)


def _tensor(data: memoryview, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)


def _unpacked(file: Any, sizes: Sequence[int]) -> object:
    """Return the value; its tensors lie in the file's memory, which goes with the last of them."""
    descriptor = file.detach()
    memory = memoryview(mmap.mmap(descriptor, 0))
    os.close(descriptor)
    stream, *buffers = (
        memory[start : start + size] for start, size in zip(_starts(sizes), sizes, strict=True)
    )
    return pickle.loads(stream, buffers=buffers)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Return where each part begins."""
    aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    return list(itertools.accumulate(aligned, initial=0))[:-1]
