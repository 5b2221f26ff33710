"""One run of one script: its command line, its output folder, its log, its signals, its exit code.

Owns everything that the five scripts share around their work, so that each script is only its work.
It knows nothing of audio or models. Called by the `__main__` block of each script.
"""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from simpler_distil_whisper.atomic import partial_path, write_atomically
from simpler_distil_whisper.config import Config, ConfigError, defaults_used, describe, load_config

log = logging.getLogger("simpler_distil_whisper")

USAGE = """\
Usage: {command} CONFIG.json            do the work
       {command} CONFIG.json --check    check config, files, rows and model; do no work
       {command} --help                 this text

Keys of the config (a path is relative to the working directory):
{keys}

Exit codes: 0 done, 1 bug, 2 config, 3 data, 130/143 interrupted with the work saved."""

# Keys that change how a run goes but not what it computes: a resumed run may change them.
HARMLESS_KEYS = {
    *("resume", "output_dir", "data.num_workers", "data.max_bad_fraction"),
    *("teacher_cache.max_gigabytes", "check.learning_rate_range_test"),
}
SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PACKAGES = ("torch", "transformers", "accelerate", "jiwer", "soundfile", "soxr", "numpy")

Prepared = TypeVar("Prepared")
Item = TypeVar("Item")


class DataError(Exception):
    """The data cannot be used; the script ends with exit code 3."""


class Interrupted(Exception):
    """A stop signal came and the work so far is saved; the script ends with 128 + signal number."""


class Run:
    """The output folder of one run: config copy, `run_info.json`, `log.txt`, stop signal.

    Attributes:
        folder: where this run writes; it exists.
        resumed: an earlier run of the same config has left work in the folder.
    """

    def __init__(
        self, name: str, config_path: Path, config: Any, *, overwrite: bool = False
    ) -> None:
        """Open the folder `config.output_dir` for a run of the script `name`.

        Raises:
            ConfigError: the folder holds something that this run must not touch.
        """
        self.name = name
        self.folder: Path = config.output_dir
        self.stop_signal: int | None = None
        self._parent = os.getppid()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{config_path}: output_dir: {self.folder} cannot be made: {error.strerror}"
            ) from None
        self._copy = self.folder / f"{name}.json"
        self._info_path = self.folder / "run_info.json"
        self.finished = not overwrite and _outcome_in(self._info_path) == "done"
        self.resumed = self._copy.exists() and not self._holds_no_work()
        if not is_main_process():
            return
        self._refuse_foreign_folder(config_path, config, overwrite)
        if self.finished:
            return
        if overwrite or not self.resumed:
            write_atomically(self._copy, config_path.read_bytes())
        self.info: dict[str, Any] = {
            "script": name,
            "outcome": "running",
            "resumed": self.resumed and not overwrite,
            "command": [Path(sys.executable).name, *sys.argv],
            "started": _now(),
            "ended": None,
            "processes": process_count(),
            "git_commit": _git_commit(),
            "versions": package_versions(),
            "config": config.model_dump(mode="json"),
        }
        self._save_info()

    def _refuse_foreign_folder(self, config_path: Path, config: Any, overwrite: bool) -> None:
        if self._holds_no_work():
            return
        way_out = 'choose another "output_dir"'
        if not self._copy.exists():
            raise ConfigError(
                f"{config_path}: output_dir: {self.folder} is not empty and holds no "
                f"{self._copy.name}, so another program made it; {way_out}"
            )
        if overwrite:
            return
        if getattr(config, "resume", "auto") == "never":
            raise ConfigError(
                f'{config_path}: output_dir: {self.folder} holds an earlier run; set "resume" to '
                f'"auto" to continue it, or {way_out}'
            )
        earlier = load_config(self._copy, type(config))
        before, after = (
            _flat(earlier.model_dump(mode="json")),
            _flat(config.model_dump(mode="json")),
        )
        keys = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
        if changed := [key for key in keys if key not in HARMLESS_KEYS]:
            lines = [f"  {key}: was {before.get(key)}, is {after.get(key)}" for key in changed]
            raise ConfigError(
                f"{config_path}: output_dir: {self.folder} holds a run of another config; "
                f"{way_out}, or restore these keys:\n" + "\n".join(lines)
            )

    def _holds_no_work(self) -> bool:
        """Return whether an earlier run has left no more than what stands here before its work.

        Such as one that was killed at its very start, or whose config did not fit its model.
        """
        files = [self._copy, self._info_path]
        beginnings = {*files, *map(partial_path, files), self.folder / "log.txt"}
        return beginnings.issuperset(self.folder.iterdir())

    def note(self, **facts: object) -> None:
        """Add facts such as the device to `run_info.json`."""
        if is_main_process():
            self.info.update(facts)
            self._save_info()

    def close(self, outcome: str) -> None:
        """Write down how the run ended: "done", "interrupted", "failed"."""
        self.note(outcome=outcome, ended=_now())

    @property
    def asked_to_stop(self) -> bool:
        """Whether a stop signal has come.

        A launcher that was killed could not pass the signal on to the processes it had started.
        """
        launcher_is_gone = process_count() > 1 and os.getppid() != self._parent
        return self.stop_signal is not None or launcher_is_gone

    def stop_if_asked(self) -> None:
        """Raise `Interrupted` if it is asked to stop; call it where all work so far is saved."""
        if self.asked_to_stop:
            raise Interrupted

    @contextlib.contextmanager
    def stop_signals(self) -> Iterator[None]:
        """Let the first SIGINT or SIGTERM only set `stop_signal`, the second one stop at once."""

        def on_signal(number: int, frame: object) -> None:
            if self.stop_signal:
                raise KeyboardInterrupt
            self.stop_signal = number
            log.warning("Stopping after this step, with the work saved (again: stop at once) ...")

        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, on_signal) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save_info(self) -> None:
        text = json.dumps(self.info, ensure_ascii=False, indent=2)
        write_atomically(self._info_path, text.encode())


def run_script(
    name: str,
    purpose: str | None,
    model: type[Config],
    prepare: Callable[[Config], Prepared],
    work: Callable[[Config, Prepared, Run], str],
    *,
    check: Callable[[Config, Prepared], None] | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> int:
    """Run one script from its command line and return its exit code.

    Args:
        name: the script's name without ".py".
        purpose: the script's docstring, shown by `--help`.
        model: the class of its config.
        prepare: checks everything that the config names and returns what `work` needs. It writes
            nothing, so that it is also what `--check` does, and it checks what needs no import of
            torch first, so that a mistake is answered at once.
        work: does the work and returns the closing words: what was written, what to run next.
        check: what `--check` does after `prepare`, if more; it leaves `output_dir` alone.
        overwrite: a new run in the same folder replaces its own results (for work of seconds).
        command: how it is called, if not as a script.
    """
    command = command or f"python {name}.py"
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    _log_to_stderr()
    if "--help" in arguments or "-h" in arguments:
        usage = USAGE.format(command=command, keys=describe(model))
        print(f"{(purpose or '').strip()}\n\n{usage}")
        return 0
    if len(arguments) != 1:
        print(f"Usage: {command} CONFIG.json [--check], or --help", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    run: Run | None = None
    try:
        config = load_config(path, model)
        if left_out := defaults_used(config):
            log.info(
                "%d keys not in the file took defaults: %s", len(left_out), "; ".join(left_out)
            )
        prepared = prepare(config)
        if "--check" in sys.argv[1:]:
            if check:
                check(config, prepared)
            log.info("%s: all checked, nothing done.", path)
            return 0
        run = Run(name, path, config, overwrite=overwrite)
        if run.finished:
            log.info("%s holds the finished run of this config; nothing to do.", run.folder)
            return 0
        with run.stop_signals(), _log_to_file(run.folder):
            closing_words = work(config, prepared, run)
            run.close("done")
            if is_main_process():
                log.info("%s", closing_words)
        return 0
    except ConfigError as error:
        return _fail(run, 2, str(error))
    except DataError as error:
        return _fail(run, 3, str(error))
    except (Interrupted, KeyboardInterrupt):
        number = (run.stop_signal if run else None) or signal.SIGINT
        _close(run, "interrupted")
        log.warning("Interrupted; run the same command again to continue.")
        return 128 + number
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
            return _fail(run, 3, f"{error}: make room, and run the same command again")
        where = f" The log is {run.folder / 'log.txt'}." if run else ""
        return _fail(run, 1, f"{traceback.format_exc()}This is a bug, please report it.{where}")


def process_rank() -> int:
    """Return this process's number among those that torchrun or accelerate launched, from 0."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return how many processes torchrun or accelerate launched."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process writes the files that exist once per run."""
    return process_rank() == 0


class Progress:
    """How far long work has come, and when it will end: a bar on a terminal, else lines in the log.

    Use it in a `with` block and call `advance`, or let it count the items `over` which a loop goes.
    Only the main process shows anything.
    """

    def __init__(self, what: str, unit: str, total: int, done: int = 0) -> None:
        """Start at `done` of `total`, where an earlier run had stopped."""
        self.what, self.unit, self.total, self.done = what, unit, total, done
        self._done_before = done
        self._started = self._shown = time.monotonic()
        hidden = not (is_main_process() and sys.stderr.isatty())
        self._bar = tqdm(desc=what, unit=f" {unit}", total=total, initial=done, disable=hidden)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, counting each when the loop comes back for the next."""
        with self:
            for item in items:
                yield item
                self.advance()

    def advance(self, count: int = 1) -> None:
        """Count what was done just now."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and is_main_process() and now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            each = (now - self._started) / (self.done - self._done_before)
            left = datetime.timedelta(seconds=round(each * (self.total - self.done)))
            where = f"{self.done} of {self.total} {self.unit}"
            log.info("%s: %s, about %s left", self.what, where, left)


def _fail(run: Run | None, code: int, message: str) -> int:
    log.error("%s", message)
    _close(run, "failed")
    return code


def _close(run: Run | None, outcome: str) -> None:
    if run:
        with contextlib.suppress(OSError):  # a full disk cannot take this either
            run.close(outcome)


class _AboveTheProgressBar(logging.Handler):
    """Writes to stderr without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    handler = _AboveTheProgressBar()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_main_process() else logging.WARNING)


@contextlib.contextmanager
def _log_to_file(folder: Path) -> Iterator[None]:
    if not is_main_process():
        yield
        return
    with (folder / "log.txt").open("a", encoding="utf-8") as file:
        handler: logging.StreamHandler[TextIO] = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        try:
            yield
        except Exception:
            log.handlers[-1].handle(
                log.makeRecord(log.name, logging.ERROR, "", 0, traceback.format_exc(), (), None)
            )
            raise
        finally:
            log.removeHandler(handler)


def _outcome_in(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["outcome"])
    except (OSError, ValueError, KeyError):
        return None


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    """Return {"a.b": value} for {"a": {"b": value}}."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


def package_versions() -> dict[str, str]:
    """Return Python's version and those of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _git_commit() -> str | None:
    """Return the commit of the code that runs, with "-dirty" if it was changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = Path(__file__).parent
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
