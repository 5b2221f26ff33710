"""One run of one script: its command line, its output folder, its log, its signals, its exit code.

Owns what all scripts have around their work, so that a script holds nothing but its stage. It knows
nothing of audio or models.
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
from simpler_distil_whisper.config import (
    Config,
    ConfigError,
    defaults_used,
    help_table,
    load_config,
)

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
    "resume",
    "output_dir",
    "data.num_workers",
    "data.max_bad_fraction",
    "teacher_cache.max_gigabytes",
    "check.learning_rate_range_test",
}
SECONDS_BETWEEN_LINES = 30.0  # of progress in the log, where stderr is no terminal
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PACKAGES = ("torch", "transformers", "accelerate", "jiwer", "soundfile", "soxr", "numpy")

Prepared = TypeVar("Prepared")
Item = TypeVar("Item")


class DataError(Exception):
    """The data cannot be used; the script ends with exit code 3."""


class Interrupted(Exception):
    """A stop signal came, and all work is saved; the script ends with code 128 + signal number."""


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
        remedy = 'choose another "output_dir"'
        if not self._copy.exists():
            raise ConfigError(
                f"{config_path}: output_dir: {self.folder} is not empty and holds no "
                f"{self._copy.name}, so another program made it; {remedy}"
            )
        if overwrite:
            return
        if getattr(config, "resume", "auto") == "never":
            raise ConfigError(
                f'{config_path}: output_dir: {self.folder} holds an earlier run; set "resume" to '
                f'"auto" to continue it, or {remedy}'
            )
        earlier = load_config(self._copy, type(config))
        before = _flat(earlier.model_dump(mode="json"))
        after = _flat(config.model_dump(mode="json"))
        keys = sorted((before.keys() | after.keys()) - HARMLESS_KEYS)
        if changed := [key for key in keys if before.get(key) != after.get(key)]:
            lines = [f"  {key}: was {before.get(key)}, is {after.get(key)}" for key in changed]
            raise ConfigError(
                f"{config_path}: output_dir: {self.folder} holds a run of another config; "
                f"{remedy}, or restore these keys:\n" + "\n".join(lines)
            )

    def _holds_no_work(self) -> bool:
        """Return whether the folder holds nothing but the files written before the work begins.

        For example after a run that was killed at once, or whose config did not fit its model.
        """
        files = [self._copy, self._info_path]
        written_first = {*files, *map(partial_path, files), self.folder / "log.txt"}
        return written_first.issuperset(self.folder.iterdir())

    def note(self, **facts: object) -> None:
        """Add facts such as the device to `run_info.json`."""
        if is_main_process():
            self.info.update(facts)
            self._save_info()

    def close(self, outcome: str) -> None:
        """Write into `run_info.json` how the run ended: "done", "interrupted" or "failed"."""
        self.note(outcome=outcome, ended=_now())

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
        """Let the first SIGINT or SIGTERM only set `stop_signal`; the second one stops at once."""

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
        prepare: checks all that the config names, first what needs no import of torch, and returns
            what `work` needs. It writes nothing: `--check` does the same.
        work: does the work and returns the closing words: what was written, what to run next.
        check: what `--check` does after `prepare`, if more; it leaves `output_dir` alone.
        overwrite: a new run in the same folder replaces its own results (for work of seconds).
        command: how the script is called, if not as "python NAME.py".
    """
    command = command or f"python {name}.py"
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    _log_to_stderr()
    if "--help" in arguments or "-h" in arguments:
        usage = USAGE.format(command=command, keys=help_table(model))
        print(f"{(purpose or '').strip()}\n\n{usage}")
        return 0
    if len(arguments) != 1:
        print(f"Usage: {command} CONFIG.json [--check], or --help", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    run: Run | None = None
    try:
        config = _load_config(path, model)
        prepared = prepare(config)
        if "--check" in sys.argv[1:]:
            if check:
                check(config, prepared)
            log.info("%s: all checked, nothing done.", path)
            return 0
        run = Run(name, path, config, overwrite=overwrite)
        _do_work(run, work, config, prepared)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return _exit_code(run, error)


def _load_config(path: Path, model: type[Config]) -> Config:
    config = load_config(path, model)
    if defaults := defaults_used(config):
        log.info("%d keys not in the file took defaults: %s", len(defaults), "; ".join(defaults))
    return config


def _do_work(
    run: Run,
    work: Callable[[Config, Prepared, Run], str],
    config: Config,
    prepared: Prepared,
) -> None:
    if run.finished:
        log.info("%s holds the finished run of this config; nothing to do.", run.folder)
        return
    with run.stop_signals(), _log_to_file(run.folder):
        closing_words = work(config, prepared, run)
        run.close("done")
        log.info("%s", closing_words)


def _exit_code(run: Run | None, error: BaseException) -> int:
    """Log what ended a run, write it into `run_info.json`, and return the script's exit code."""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        number = (run.stop_signal if run else None) or signal.SIGINT
        _close(run, "interrupted")
        log.warning("Interrupted; run the same command again to continue.")
        return 128 + number
    if isinstance(error, ConfigError):
        code, message = 2, str(error)
    elif isinstance(error, DataError):
        code, message = 3, str(error)
    elif isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        code, message = 3, f"{error}: make room, and run the same command again"
    else:
        where = f" The log is {run.folder / 'log.txt'}." if run else ""
        code, message = 1, f"{traceback.format_exc()}This is a bug, please report it.{where}"
    log.error("%s", message)
    _close(run, "failed")
    return code


def _close(run: Run | None, outcome: str) -> None:
    if run:
        with contextlib.suppress(OSError):  # a full disk cannot take this either
            run.close(outcome)


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
    """Progress of long work, with the time left: a bar on a terminal, otherwise lines in the log.

    Use it in a `with` block and call `advance`, or loop `over` the items. Only the main process
    shows anything.
    """

    def __init__(self, what: str, unit: str, total: int, done: int = 0) -> None:
        """Start at `done` of `total`, where an earlier run has stopped."""
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
        """Yield the items; each counts as done when the loop asks for the next."""
        with self:
            for item in items:
                yield item
                self.advance()

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and is_main_process() and now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            each = (now - self._started) / (self.done - self._done_before)
            left = datetime.timedelta(seconds=round(each * (self.total - self.done)))
            where = f"{self.done} of {self.total} {self.unit}"
            log.info("%s: %s, about %s left", self.what, where, left)


class _AboveTheProgressBar(logging.Handler):
    """Writes to stderr without breaking a progress bar."""

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
    """Return the commit of the running code, with "-dirty" if files have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = Path(__file__).parent
        result = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
