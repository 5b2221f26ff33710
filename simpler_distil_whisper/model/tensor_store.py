"""Named tensors on disk, shared by any number of processes: what the teacher cache is made of.

A tensor is written as a whole or not at all, and checked when it is read, so neither a kill nor a
damaged disk can make a wrong one. What the tensors are is up to `teacher_cache.py`.
"""

import contextlib
import json
import re
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from simpler_distil_whisper.model.weights import bytes_of
from simpler_distil_whisper.run import log

TENSOR = "states"  # the name of the one tensor in each file
TEMPORARY_NAME = re.compile(r"[0-9a-f]{32}\.unfinished")
SECONDS_OF_A_WRITE = 86_400  # the process that has been writing a file for longer is gone


class TensorStore:
    """Named tensors on disk, one file each: bounded in size, checked when read.

    Any number of processes may read and write one store at once. A name is "kind/group/key". Each
    group has a list of its files' sizes, so that nobody has to look at a million files; a group
    that is no longer needed can be deleted as a folder.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Open or make a store.

        Raises:
            OSError: the folder cannot be made or written.
        """
        self.folder = folder
        self.max_bytes = max_bytes
        self._writing = folder / "writing"
        self._full = False
        self._sums: dict[Path, tuple[int, int]] = {}  # list of sizes -> bytes read of it, their sum
        self._writing.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished_files()

    def read(self, name: str) -> Tensor | None:
        """Return a tensor exactly as it was written; None if it is missing, damaged or private."""
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(TENSOR)
                if file.metadata() == _label(name, tensor):
                    return tensor
            problem = "its checksum is not that of its content"
        except FileNotFoundError:
            return None
        except PermissionError as error:
            self._stop_adding(f"cannot be read ({error})")
            return None
        except (SafetensorError, OSError, ValueError) as error:
            problem = str(error)
        log.warning("%s: damaged (%s): not used, computed again", path, problem)
        return None

    def write(self, name: str, tensor: Tensor) -> None:
        """Keep a contiguous CPU tensor; a store that is full keeps nothing, and warns once."""
        path = self._path(name)
        content = save({TENSOR: tensor}, metadata=_label(name, tensor))
        try:
            # An existing file is damaged, or another process was faster: replacing adds nothing.
            if not path.exists() and self._is_full(len(content)):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._temporary_file(content) as temporary:
                if not path.exists():
                    # Before the file: a kill between the two leaves room unused, not overused.
                    with (path.parents[1] / "sizes.txt").open("ab") as sizes:
                        sizes.write(b"%d\n" % len(content))
                temporary.replace(path)
        except OSError as error:
            self._stop_adding(f"cannot be written ({error})")

    def used(self) -> int:
        """Return the bytes that all processes together have written."""
        lists = list(self.folder.glob("*/*/sizes.txt"))
        self._sums = {path: self._sums.get(path, (0, 0)) for path in lists}
        for path in lists:
            offset, total = self._sums[path]
            with path.open("rb") as file:
                file.seek(offset)
                whole, newline, _ = file.read().rpartition(b"\n")
            total += sum(int(size) for size in whole.split() if size.isdigit())
            self._sums[path] = (offset + len(whole) + len(newline), total)
        return sum(total for _, total in self._sums.values())

    def write_about(self, group: str, facts: dict[str, object]) -> None:
        """Write `about.json` into a group's folder, which tells people what its tensors are."""
        path = self.folder / group / "about.json"
        if path.exists():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._temporary_file(json.dumps(facts, indent=2).encode()) as temporary:
                temporary.replace(path)
        except OSError as error:  # somebody else's folder, for example
            self._stop_adding(f"cannot be written ({error})")

    def _path(self, name: str) -> Path:
        group, _, key = name.rpartition("/")
        return self.folder / group / key[:2] / f"{key}.safetensors"

    def _is_full(self, more: int) -> bool:
        if not self._full and self.used() + more > self.max_bytes:
            self._stop_adding(f"is full (teacher_cache.max_gigabytes {self.max_bytes / 1e9:g})")
        return self._full

    def _stop_adding(self, why: str) -> None:
        if not self._full:
            log.warning("teacher cache %s %s: what is missing is not added", self.folder, why)
        self._full = True

    @contextlib.contextmanager
    def _temporary_file(self, content: bytes) -> Iterator[Path]:
        """Write a file under a unique name, from which it can be moved to its place as a whole."""
        temporary = self._writing / f"{uuid.uuid4().hex}.unfinished"
        try:
            # No fsync: a file that a power failure has torn is recognised as damaged when read.
            temporary.write_bytes(content)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _remove_unfinished_files(self) -> None:
        for path in self._writing.iterdir():
            if not TEMPORARY_NAME.fullmatch(path.name):  # somebody else's
                continue
            with contextlib.suppress(OSError):  # another process may be doing the same
                if path.stat().st_mtime < time.time() - SECONDS_OF_A_WRITE:
                    path.unlink()


class BackgroundWriter:
    """Writes batches of tensors into a store in a thread, while the model computes the next ones.

    What is not written yet when the process is killed will be missing, and computed again.
    """

    def __init__(self, store: TensorStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, "teacher-cache")  # begins with the first batch
        self._writing: deque[Future[None]] = deque()

    def __reduce__(self) -> tuple[type["BackgroundWriter"], tuple[TensorStore]]:
        """Return how another process makes one, which has a thread of its own."""
        return BackgroundWriter, (self._store,)

    def keep(
        self,
        names: Sequence[str | None],
        tensors: Sequence[Tensor],
        *,
        after: Callable[[], object] | None = None,
        wait: bool = False,
    ) -> None:
        """Write contiguous tensors on the CPU under their names; None: not this one.

        It returns at once, but if the disk is slower than the model it waits for the batch before.

        Args:
            names: of the tensors.
            tensors: one for each name.
            after: returns when they have their values; called in the thread.
            wait: return only when they are written: on a CPU, whose cores have no time to give.
        """
        self.finish(but=1)
        self._writing.append(self._thread.submit(self._write, names, tensors, after))
        if wait:
            self.finish()

    def finish(self, but: int = 0) -> None:
        """Return once all batches are written but the last few."""
        while len(self._writing) > but:
            self._writing.popleft().result()

    def _write(
        self,
        names: Sequence[str | None],
        tensors: Sequence[Tensor],
        after: Callable[[], object] | None,
    ) -> None:
        if after:
            after()
        for name, tensor in zip(names, tensors, strict=True):
            if name:
                self._store.write(name, tensor)


def _label(name: str, tensor: Tensor) -> dict[str, str]:
    """Return a file's metadata, by which damage and files under a wrong name are recognised."""
    checksum = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return {"name": name, "crc32": f"{zlib.crc32(bytes_of(tensor), checksum):08x}"}
