"""The output folder of one run: what may go on there, what is written beside the results.

It knows nothing of audio or models beyond the names of a few config keys.
"""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from simpler_distil_whisper.atomic import partial_path, write_atomically
from simpler_distil_whisper.config import LARGEST_CONFIG, ConfigError, load_config
from simpler_distil_whisper.files import fingerprint, lock, read_regular_file
from simpler_distil_whisper.launch import is_main_process, process_count
from simpler_distil_whisper.shards import SHARDS_FOLDER, Shard, Shards
from simpler_distil_whisper.stopping import Interrupted, StopSignal, handling

log = logging.getLogger("simpler_distil_whisper")

# Keys that change how a run goes but not what it computes: a resumed run may change them.
HARMLESS_KEYS = {
    "resume",
    "output_dir",
    "data.num_workers",
    "data.shard",  # of one run there is a config for each
    "data.max_bad_fraction",
    "batch.micro_batch_size",  # the steps' size, a product of these, is in the checkpoints
    "batch.gradient_accumulation_steps",
    "activation_checkpointing",
    "validation.decoding.batch_size",
    "teacher_cache.max_gigabytes",
    "check.learning_rate_range_test",
}
WRITTEN = {"output_dir", "teacher_cache.folder"}  # the paths of a config that are no input
LARGEST_INFO = 2**24  # bytes of `run_info.json`
ANOTHER_RUN = "another run is at work in {}; end it, or wait until it has ended"
PACKAGES = ("torch", "transformers", "accelerate", "jiwer", "soundfile", "soxr", "numpy")


class DataError(Exception):
    """The data cannot be used; the script ends with exit code 3."""


class ProcessLost(DataError):
    """Another process of the run has ended, or does not answer."""


class Run:
    """The output folder of one run: config copy, `run_info.json`, `log.txt`, stop signal.

    Attributes:
        folder: where this run writes its results; it exists.
        shards: of the run that this job does a share of; None: it does all.
        own_folder: where config copy, `run_info.json` and log are: with shards, that of this one.
        resumed: an earlier run of the same config has left work in the folder.
        finished: it has even done all of it.
        log_file: `log.txt`, locked as long as this process lives; None in other processes than the
            main one, and where nothing is left to do.
    """

    def __init__(
        self,
        name: str,
        config_path: Path,
        config: Any,
        *,
        overwrite: bool = False,
        looking: bool = False,
    ) -> None:
        """Open the folder `config.output_dir` for a run of the script `name`.

        Args:
            name: the script's name.
            config_path: its JSON file.
            config: what is in it.
            overwrite: as in `run_script`.
            looking: only tell whether the run could begin; nothing is made or written.

        Raises:
            ConfigError: the folder holds something that this run must not touch.
        """
        self.name = name
        self._config_path, self._config, self._overwrite = config_path, config, overwrite
        self.folder: Path = config.output_dir
        shard = getattr(getattr(config, "data", None), "shard", None)
        self.shards = Shards(self.folder, Shard(*shard)) if shard else None
        self.own_folder = self.shards.own_folder if self.shards else self.folder
        self.stop_signal: int | None = None
        self._parent = os.getppid()
        if not looking:
            self._make_folders()
        elif self.shards:
            self.shards.check()
        self._inputs = _inputs_of(config) if is_main_process() else {}
        self._copy = self.own_folder / f"{name}.json"
        self._info_path = self.own_folder / "run_info.json"
        self.log_file: TextIO | None = None
        self._read_earlier_run()
        if is_main_process():
            self._refuse_foreign_folder()
            if not self.finished and not looking:
                self._begin()

    def _make_folders(self) -> None:
        try:
            if self.shards:
                self.shards.begin()
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refusal(f"{self.folder} cannot be made: {error.strerror}") from None

    def _read_earlier_run(self) -> None:
        """Note what an earlier run has left in the folder."""
        self._is_ours = _info_in(self._info_path).get("script") == self.name
        info = _info_in(self.folder / self._info_path.name)
        is_done = (info.get("script"), info.get("outcome")) == (self.name, "done")
        self.finished = self._is_ours and is_done and not self._overwrite
        self.resumed = self._copy.exists() and not self._holds_no_work()

    def _begin(self) -> None:
        """Lock the folder against other runs, and write what comes before the work."""
        self.log_file = (self.own_folder / "log.txt").open("a", encoding="utf-8")
        if not lock(self.log_file):
            raise self._refusal(ANOTHER_RUN.format(self.own_folder))
        self._read_earlier_run()  # again: the run that has had the lock until now may have ended
        self._refuse_foreign_folder()
        if self.finished:
            return
        self.info: dict[str, Any] = {
            "script": self.name,
            "outcome": "running",
            "resumed": self.resumed and not self._overwrite,
            "command": [Path(sys.executable).name, *map(_in_utf8, sys.argv)],
            "started": _now(),
            "ended": None,
            "processes": process_count(),
            "git_commit": _git_commit(),
            "versions": package_versions(),
            "config": self._config.model_dump(mode="json"),
            "inputs": self._inputs,
        }
        self._save_info()  # first of all, since it marks the folder as ours
        if self._overwrite or not self.resumed:
            write_atomically(self._copy, read_regular_file(self._config_path, LARGEST_CONFIG))

    def _refuse_foreign_folder(self) -> None:
        if self.shards:
            for copy in self.folder.glob(f"{SHARDS_FOLDER}/*/{self._copy.name}"):
                self._refuse_another_config(copy)
        if self._holds_no_work():
            return
        remedy = 'choose another "output_dir"'
        if not (self._is_ours and self._copy.exists()):
            if (self.folder / SHARDS_FOLDER).is_dir():
                raise self._refusal(
                    f"{self.folder} holds a run in shards: set data.shard, or {remedy}"
                )
            raise self._refusal(
                f"{self.folder} is not empty and holds no {self._copy.name} and run_info.json of "
                f"{self.name}, so another program made it; {remedy}"
            )
        if self._overwrite:
            return
        if getattr(self._config, "resume", "auto") == "never":
            raise self._refusal(
                f'{self.folder} holds an earlier run; set "resume" to "auto" to continue it, or '
                f"{remedy}"
            )
        self._refuse_another_config(self._copy)
        self._refuse_other_inputs()

    def _refuse_other_inputs(self) -> None:
        earlier = _info_in(self._info_path).get("inputs")
        earlier = earlier if isinstance(earlier, dict) else {}
        if changed := [path for path, now in self._inputs.items() if earlier.get(path, now) != now]:
            raise self._refusal(
                f"{self.folder} holds a run that has read something else in {', '.join(changed)}; "
                'choose another "output_dir", or restore what was there'
            )

    def _refuse_another_config(self, copy: Path) -> None:
        earlier = load_config(copy, type(self._config))
        before = _flat(earlier.model_dump(mode="json"))
        after = _flat(self._config.model_dump(mode="json"))
        keys = sorted((before.keys() | after.keys()) - HARMLESS_KEYS)
        if changed := [key for key in keys if before.get(key) != after.get(key)]:
            lines = [
                f"  {key}: was {_in_json(before.get(key))}, is {_in_json(after.get(key))}"
                for key in changed
            ]
            raise self._refusal(
                f'{self.folder} holds a run of another config; choose another "output_dir", or '
                "restore these keys:\n" + "\n".join(lines)
            )

    def _refusal(self, problem: str) -> ConfigError:
        return ConfigError(f"{self._config_path}: output_dir: {problem}")

    def _holds_no_work(self) -> bool:
        """Return whether the folder holds nothing but the files written before the work begins.

        For example after a run that was killed at once, or whose config did not fit its model.
        """
        files = [self._copy, self._info_path]
        written_first = {*map(partial_path, files), self.own_folder / "log.txt"}
        if self._is_ours:
            written_first.update(files)
        there = self.own_folder.iterdir() if self.own_folder.is_dir() else ()
        return all(path in written_first and path.is_file() for path in there)

    def note(self, **facts: object) -> None:
        """Add facts such as the device to `run_info.json`."""
        if is_main_process():
            self.info.update(facts)
            self._save_info()

    def close(self, outcome: str) -> None:
        """Write into `run_info.json` how the run ended: "done", "interrupted" or "failed".

        Beside results that this job has merged, it leaves what tells that the run is done.
        """
        self.note(outcome=outcome, ended=_now())
        if outcome == "done" and self.shards and self.shards.merging:
            for path in (self._copy, self._info_path):
                write_atomically(self.folder / path.name, path.read_bytes())

    @property
    def asked_to_stop(self) -> bool:
        """Whether a stop signal has come, or the launcher of several processes is gone.

        A launcher that was killed cannot pass a signal on to the processes that it has started.
        """
        launcher_is_gone = process_count() > 1 and os.getppid() != self._parent
        return self.stop_signal is not None or launcher_is_gone

    def stop_if_asked(self) -> None:
        """Raise `Interrupted` if a stop was requested; to be called where all work is saved."""
        if self.asked_to_stop:
            raise Interrupted

    @contextlib.contextmanager
    def stop_signals(self) -> Iterator[None]:
        """Let the first stop signal only set `stop_signal`; the second one stops at once."""

        def on_signal(number: int, frame: object) -> None:
            if self.stop_signal:
                raise StopSignal(number)
            self.stop_signal = number
            log.warning("Stopping after this step, with the work saved (again: stop at once) ...")

        with handling(on_signal):
            yield

    def _save_info(self) -> None:
        text = json.dumps(self.info, ensure_ascii=False, indent=2)
        write_atomically(self._info_path, text.encode())


def _inputs_of(config: Any) -> dict[str, str]:
    """Return the paths that a config reads, each with a fingerprint of what is there."""
    named: list[object] = []
    for key, value in _flat(config.model_dump()).items():
        if key not in WRITTEN:
            named += value if isinstance(value, list) else [value]
    inputs = {}
    for path in named:
        with contextlib.suppress(OSError):
            if isinstance(path, Path):
                inputs[str(path)] = fingerprint(path)
    return inputs


def _info_in(path: Path) -> dict[str, Any]:
    """Return the content of a `run_info.json`; empty if it is none."""
    try:
        info = json.loads(read_regular_file(path, LARGEST_INFO))
    except (OSError, ValueError, RecursionError):
        return {}
    return info if isinstance(info, dict) else {}


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    """Return {"a.b": value} for {"a": {"b": value}}."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


def _in_json(value: object) -> str:
    """Return the value of a key as its user writes it, such as null."""
    return json.dumps(value, ensure_ascii=False)


def package_versions() -> dict[str, str]:
    """Return Python's version and those of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _git_commit() -> str | None:
    """Return the commit of the running code, with "-dirty" if files have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = Path(__file__).parent
        result = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _in_utf8(argument: str) -> str:
    """Return an argument of the command line, whose bytes need not be UTF-8, with escapes."""
    return argument.encode(errors="backslashreplace").decode()


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
