"""The results of labelling and inference, row by row, kept so that a kill loses none.

Owns the parts to which each process appends its finished rows, the files into which they are merged
in the manifest's order at the end, and the form of `rejected.jsonl`, which training writes too.
"""

import contextlib
import heapq
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from simpler_distil_whisper.atomic import write_atomically, written_atomically
from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.jsonl import Row, to_line
from simpler_distil_whisper.data.manifest import Manifest, Rejection, Utterance
from simpler_distil_whisper.files import lock
from simpler_distil_whisper.launch import is_main_process, process_rank
from simpler_distil_whisper.run import ANOTHER_RUN, DataError
from simpler_distil_whisper.shards import Shards

# Endings of the parts' names.
RESULTS = "results"
REJECTED = "rejected"
BEGUN_WITH = "begun"
LENGTHS = "lengths"
ROWS_AT_ONCE = 10_000  # that are merged
OWN_NAME = re.compile(
    rf"\d+\.({RESULTS}|{REJECTED}|lock)|\w+\.{BEGUN_WITH}|\d+-\d+(\.\w+)?\.{LENGTHS}"
)


class RowResults:
    """The results of a run, row by row: flushed at once, merged in the manifest's order at the end.

    Each process appends its finished rows to two files of its own in `parts/`, one of results and
    one of rejections. A killed run loses only what was not appended; the next run, with any number
    of processes, continues from `done`. `finish` merges the results into the file `name`, the
    rejections into `rejected.jsonl`, and removes the parts. Until `name` exists, all rows are in
    the parts; once it exists, the parts are no longer needed. With shards, each has parts of its
    own, and one of them merges those of all.

    Attributes:
        done: bool [rows of the manifest]: which of them have a result or a rejection.
        lengths_folder: for files with the lengths of the rows, which end with the parts.
    """

    def __init__(self, folder: Path, name: str, shards: Shards | None = None) -> None:
        """Name the files; `open_for` opens them."""
        self._results = folder / name
        self._rejected = folder / "rejected.jsonl"
        self._shards = shards
        self._folder = (shards.own_folder if shards else folder) / "parts"
        self._folders = [each / "parts" for each in (shards.folders if shards else [folder])]
        self.lengths_folder = shards.folder / LENGTHS if shards else self._folder
        self._manifest_hash = b""
        self._counted: dict[Path, tuple[int, int]] = {}
        self.done = np.zeros(0, dtype=bool)

    def open_for(self, manifest: Manifest) -> None:
        """Read the parts of an earlier run, and open this process's own parts.

        Raises:
            ConfigError: the parts are of another manifest, in which the row numbers mean other
                rows, or another run is at work in the same folder.
        """
        self._manifest_hash = manifest.fingerprint.encode()
        self.done = np.zeros(manifest.row_count, dtype=bool)
        for folder in (self._folder, self.lengths_folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder / f"{process_rank()}.lock").open("ab")
        if not lock(self._lock):
            raise ConfigError(f"output_dir: {ANOTHER_RUN.format(self._folder.parent)}")
        for kind in (RESULTS, REJECTED):
            for part in self._parts(kind, [self._folder]):
                self.done[part.numbers] = True
        self.done |= self._merged()  # only now: another shard may be merging
        self._own = {kind: self._open_own(kind) for kind in (RESULTS, REJECTED)}

    def append(
        self, results: Iterable[tuple[Utterance, Row]], rejections: Iterable[Rejection] = ()
    ) -> None:
        """Keep the results of one batch; once this returns, a kill does not lose them.

        Rows whose audio has vanished are left to a later run.
        """
        self._append(RESULTS, [(utterance.number, to_line(row)) for utterance, row in results])
        lasting = [rejection for rejection in rejections if not rejection.vanished]
        self._append(REJECTED, _numbered_lines(lasting))

    def begun_with(self, name: str, number: int) -> int:
        """Return the number that the run was begun with; if it begins now, this one, for later."""
        if self._shards:
            return self._shards.agree(name, number)
        path = self._folder / f"{name}.{BEGUN_WITH}"
        if not path.exists():
            write_atomically(path, str(number).encode())
        return int(path.read_text())

    @property
    def rejected_parts(self) -> str:
        """A pattern of the files that hold the rejections until `finish`."""
        folder = self._shards.folder / "*" / "parts" if self._shards else self._folder
        return str(folder / f"*.{REJECTED}")

    def rejected_so_far(self) -> int:
        """Return how many rows all processes have rejected, in earlier runs and in this one."""
        for path in _own_files(self._folders, REJECTED):
            end, lines = self._counted.get(path, (0, -1))  # the first line is no row
            with path.open("rb") as file:
                file.seek(end)
                new = file.read()
            self._counted[path] = (end + len(new), lines + new.count(b"\n"))
        return sum(max(0, lines) for _, lines in self._counted.values())

    def finish(
        self, unread: Iterable[Rejection], wait_for_everyone: Callable[[], None]
    ) -> tuple[int, int]:
        """Merge and remove the parts; return the numbers of results and of rejections.

        Args:
            unread: rows that were rejected when the manifest was read; some of them may have been
                done before, and their audio has vanished since.
            wait_for_everyone: returns when every process has called it.

        Raises:
            DataError: a row has neither a result nor a rejection.
        """
        for file in self._own.values():
            file.close()
        wait_for_everyone()
        counts = (0, 0)
        if is_main_process():
            if not self._merged():
                self._merge(unread)
            counts = (_count_lines(self._results), _count_lines(self._rejected))
            self._check_complete(sum(counts))
            folders = [*self._folders, *({self.lengths_folder} - {self._folder})]
            for path in _own_files(folders):
                path.unlink()
            for folder in folders:
                with contextlib.suppress(OSError):  # somebody else's file is in it
                    folder.rmdir()
        wait_for_everyone()
        return counts

    def _merged(self) -> bool:
        """Return whether an earlier run was stopped after it had merged its results."""
        return self._results.exists()

    def _parts(self, kind: str, folders: Iterable[Path]) -> list["_PartFile"]:
        parts = [_read_part(path) for path in sorted(_own_files(folders, kind))]
        for part in parts:
            if part.manifest_hash not in (b"", self._manifest_hash):
                raise ConfigError(
                    f"output_dir: {part.path.parents[1]} holds results of other rows than those "
                    "that data.manifest has now, or of other channels of their audio: restore what "
                    'was there, or choose another "output_dir"'
                )
        return parts

    def _open_own(self, kind: str) -> BinaryIO:
        path = self._folder / f"{process_rank()}.{kind}"
        file = path.open("ab")
        part = _read_part(path)
        file.truncate(part.end)  # a kill can tear the last line
        if not part.manifest_hash:
            file.write(self._manifest_hash + b"\n")
            file.flush()
        return file

    def _append(self, kind: str, lines: list[tuple[int, str]]) -> None:
        # A batch that a kill has torn is computed again as a whole: some rows are already kept.
        new = [f"{number}\t{line}" for number, line in lines if not self.done[number]]
        if new:
            self._own[kind].write("".join(new).encode())
            self._own[kind].flush()
            os.fsync(self._own[kind].fileno())
            self.done[[number for number, _ in lines]] = True

    def _merge(self, unread: Iterable[Rejection]) -> None:
        results, rejected = (
            _RowsInParts(self._parts(kind, self._folders)) for kind in (RESULTS, REJECTED)
        )
        never_read = [
            (number, line.encode())
            for number, line in _numbered_lines(unread)
            if number not in results and number not in rejected
        ]
        self._check_complete(len(results) + len(rejected) + len(never_read))
        with written_atomically(self._rejected) as file:
            file.writelines(line for _, line in heapq.merge(rejected, never_read))
        with written_atomically(self._results) as file:
            file.writelines(line for _, line in results)

    def _check_complete(self, count: int) -> None:
        if count != len(self.done):
            raise DataError(
                f"{self._folder.parent}: of {len(self.done)} rows {count} are accounted for; do "
                "all processes write to one shared output_dir?"
            )


class _PartFile(NamedTuple):
    """The content of a part file: a hash of the manifest, then the number and line of each row.

    Attributes:
        manifest_hash: empty if the process was killed before it had written it.
        numbers: int64 [rows]
        offsets: int64 [rows]: where the line of each row begins, in bytes.
        end: where the last whole line ends.
    """

    path: Path
    manifest_hash: bytes
    numbers: np.ndarray
    offsets: np.ndarray
    end: int


def _read_part(path: Path) -> _PartFile:
    numbers, offsets = array("q"), array("q")
    with path.open("rb") as file:
        first = file.readline()
        end = len(first) if first.endswith(b"\n") else 0
        for line in file:
            number, tab, _ = line.partition(b"\t")
            if not (number.isdigit() and tab and line.endswith(b"\n")):
                break
            numbers.append(int(number))
            offsets.append(end + len(number) + len(tab))
            end += len(line)
    return _PartFile(path, first.strip() if end else b"", _int64(numbers), _int64(offsets), end)


def _int64(*parts: "array[int] | np.ndarray") -> np.ndarray:
    return np.concatenate([np.array(part, dtype=np.int64) for part in parts] or [np.zeros(0, int)])


class _RowsInParts:
    """Number and line of every row in some parts, in the order of the numbers."""

    def __init__(self, parts: list[_PartFile]) -> None:
        """Note the part and the offset of each row: 24 bytes, however long its line is."""
        self._paths = [part.path for part in parts]
        which = [np.full(len(part.numbers), place) for place, part in enumerate(parts)]
        self._numbers, first = np.unique(
            _int64(*(part.numbers for part in parts)), return_index=True
        )
        self._which = _int64(*which)[first]
        self._offsets = _int64(*(part.offsets for part in parts))[first]

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, number: int) -> bool:
        place = np.searchsorted(self._numbers, number)
        return bool(place < len(self) and self._numbers[place] == number)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for start in range(0, len(self), ROWS_AT_ONCE):  # there may be thousands of parts
            some = slice(start, start + ROWS_AT_ONCE)
            which, offsets = self._which[some], self._offsets[some].tolist()
            lines = [b""] * len(which)
            for place in np.unique(which):
                with self._paths[place].open("rb") as file:
                    for row in np.flatnonzero(which == place).tolist():
                        file.seek(offsets[row])
                        lines[row] = file.readline()
            yield from zip(self._numbers[some].tolist(), lines, strict=True)


def _own_files(folders: Iterable[Path], kind: str = "*") -> list[Path]:
    """Return the files of all processes; others that lie in the folders are somebody else's."""
    paths = (path for folder in folders for path in folder.glob(f"*.{kind}"))
    return [path for path in paths if OWN_NAME.fullmatch(path.name)]


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def rejection_line(rejection: Rejection) -> str:
    """Return the line of `rejected.jsonl` for one row."""
    return to_line({"place": rejection.place, "reason": rejection.reason, "row": rejection.row})


def _numbered_lines(rejections: Iterable[Rejection]) -> list[tuple[int, str]]:
    """Return the row number and the line of `rejected.jsonl` for each rejection."""
    return [(rejection.number, rejection_line(rejection)) for rejection in rejections]
