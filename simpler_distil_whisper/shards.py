"""Jobs that do one run together without a connection: each does a share of it, a shard.

Owns `data.shard`, and the folder `shards` in the output folder, by which the jobs know of one
another. It does not know what a share consists of. Nothing here needs locks: a job writes files of
its own, and what all must agree on is decided by a rename.
"""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from simpler_distil_whisper.config import ConfigError

SHARDS_FOLDER = "shards"
VARIABLE = "SDW_SHARD"
MOST_SHARDS = 10_000
ENDED = "ended"
MERGED_BY = "merged_by"
OWN_NAME = re.compile(r"\d+-of-\d+|ended|merged_by|batch_size|lengths|\.\w+\.\w+")
SLURM = "SLURM_ARRAY_TASK_"


@dataclass(frozen=True)
class Shard:
    """One of `count` shares of the work; `index` counts from 0."""

    index: int
    count: int

    def owns(self, number: int) -> bool:
        """Return whether a piece of work is in this share.

        The pieces come by size, the largest first, and are dealt to and fro: 0, 1, 2, 2, 1, 0, 0,
        1, 2 ..., so that no share gets the larger one each time.
        """
        turn, place = divmod(number, self.count)
        return self.index == (place if turn % 2 == 0 else self.count - 1 - place)


WHOLE = Shard(0, 1)


def checked(pair: tuple[int, int]) -> tuple[int, int]:
    """Return a value of `data.shard`.

    Raises:
        ValueError: there is no such shard.
    """
    index, count = pair
    if not 0 < count <= MOST_SHARDS:
        raise ValueError(f"[{index}, {count}]: the second number, of shards, is 1 to {MOST_SHARDS}")
    if not 0 <= index < count:
        raise ValueError(f"[{index}, {count}]: shards are counted from 0, so to {count - 1}")
    return index, count


def shard_of_job(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Return what "auto" is in this job: the task of a job array; None: this is no such task.

    Raises:
        ValueError: the variables name no shard.
    """
    if text := environment.get(VARIABLE):
        match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
        if not match:
            raise ValueError(f'{VARIABLE} is "{text}"; it must be like "3/8": the fourth of eight')
        return int(match[1]), int(match[2])
    if f"{SLURM}ID" not in environment:
        return None
    names = [f"{SLURM}{name}" for name in ("ID", "COUNT", "MIN", "MAX")]
    values = [environment.get(name, "") for name in names]
    remedy = f"set {VARIABLE} to one like 3/8, the fourth of eight"
    if not all(re.fullmatch(r"\d{1,9}", value) for value in values):
        raise ValueError(
            f"{', '.join(names)} are {', '.join(values)}, which name no task: {remedy}"
        )
    task, count, first, last = map(int, values)
    if last - first + 1 != count:
        raise ValueError(
            f"the job array has {count} tasks from {first} to {last}: its numbers must follow one "
            f"another, as in --array=0-7, or {remedy}"
        )
    return task - first, count


class Shards:
    """All shards of a run, as they are on disk, and the one that this job does.

    Attributes:
        own: the share of this job.
        folder: `shards` in the output folder.
        merging: whether this job merges the results of all.
    """

    def __init__(self, output: Path, own: Shard) -> None:
        """Name the folders; `begin` makes them."""
        self.own = own
        self.folder = output / SHARDS_FOLDER
        self.merging = False

    @property
    def own_folder(self) -> Path:
        """Where this job writes until the results are merged."""
        return self._folder_of(self.own.index)

    @property
    def folders(self) -> list[Path]:
        """The folder of each shard; one that has not begun has none."""
        return [self._folder_of(index) for index in range(self.own.count)]

    def begin(self) -> None:
        """Make the folder of this shard, if `check` has no objection."""
        self.check()
        self.own_folder.mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        """Raise ConfigError if the run in the output folder has no shards, or not as many."""
        output = self.folder.parent
        is_empty = not output.is_dir() or not any(output.iterdir())
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else None
        if not is_empty and (names is None or not all(map(OWN_NAME.fullmatch, names))):
            raise ConfigError(
                f"output_dir: {output} is not empty and holds no run in shards; choose another "
                '"output_dir"'
            )
        for name in names or []:
            count = name.rpartition("-of-")[2]
            if count not in (name, str(self.own.count)):
                raise ConfigError(
                    f"output_dir: {output} holds a run in {count} shards, data.shard names "
                    f"{self.own.count}: keep their number. Where single tasks of a job array are "
                    f'started again, {VARIABLE} must name it, as in "{self.own.index}/{count}"'
                )

    def agree(self, name: str, value: int) -> int:
        """Return the number that the first of all shards has named; the same one for each."""
        return int(_first_choice(self.folder / name, str(value)))

    def end(self) -> str | None:
        """Note that this shard has ended; return what comes next, None: this job merges all.

        It merges if all shards have ended and no other one merges already. One that was killed
        while it merged goes on when it is started again.
        """
        ended = self.folder / ENDED
        ended.mkdir(exist_ok=True)
        # In the folder that is listed next: on NFS, this makes what others wrote there visible.
        (ended / str(self.own.index)).touch()
        names = set(os.listdir(ended))  # noqa: PTH208
        missing = [index for index in range(self.own.count) if str(index) not in names]
        index, count = self.own.index, self.own.count
        if missing:
            listed = ", ".join(map(self._described, missing[:50]))
            return (
                f"Shard {index} of {count} has ended. Missing: {listed}. The last one to end "
                "merges the results of all; start those again whose job has died."
            )
        first = int(_first_choice(self.folder / MERGED_BY, str(index)))
        self.merging = first == index
        if self.merging:
            return None
        return (
            f"All {count} shards have ended, and shard {first} merges their results; if its job "
            "has died, start it again."
        )

    def _folder_of(self, index: int) -> Path:
        return self.folder / f"{index}-of-{self.own.count}"

    def _described(self, index: int) -> str:
        return str(index) if self._folder_of(index).is_dir() else f"{index} (not begun)"


def _first_choice(folder: Path, choice: str) -> str:
    """Return the choice of the process that has called this first for a folder.

    It is the name of the only file in the folder. The folder is made elsewhere and renamed, which
    fails where it exists and is not empty.
    """
    if not folder.is_dir():
        own = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        own.mkdir()
        (own / choice).touch()
        with contextlib.suppress(OSError):
            own.rename(folder)
        shutil.rmtree(own, ignore_errors=True)
    return next(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
