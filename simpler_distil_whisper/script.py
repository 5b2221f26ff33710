"""What every script has around its work: command line, log, signals, exit code.

So a script holds nothing but its stage.
"""

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from simpler_distil_whisper.atomic import IN_THE_WAY
from simpler_distil_whisper.config import (
    Config,
    ConfigError,
    defaults_used,
    help_table,
    load_config,
)
from simpler_distil_whisper.launch import (
    check_launch,
    is_main_process,
    process_count,
    process_rank,
)
from simpler_distil_whisper.run import DataError, ProcessLost, Run, log
from simpler_distil_whisper.stopping import Interrupted, StopSignal, handling, stop_at_once
from simpler_distil_whisper.terminal import (
    log_to_file,
    log_to_stderr,
    open_closed_streams,
    show,
)

USAGE = """\
Usage: {command} CONFIG.json            do the work
       {command} CONFIG.json --check    check config, files, rows and model; do no work
       {command} --help                 this text

Keys of the config (a path is relative to the working directory):
{keys}

Exit codes: 0 done, 1 bug, 2 config, 3 data, 129/130/143 interrupted with the work saved."""
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OUT_OF_REACH = (errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE)

Prepared = TypeVar("Prepared")


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
    open_closed_streams()
    log_to_stderr(log, logging.INFO if is_main_process() else logging.WARNING)
    if "--help" in arguments or "-h" in arguments:
        usage = USAGE.format(command=command, keys=help_table(model))
        show(f"{(purpose or '').strip()}\n\n{usage}\n")
        return 0
    if len(arguments) != 1:
        print(f"Usage: {command} CONFIG.json [--check], or --help", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    run: Run | None = None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(handling(stop_at_once))
            check_launch()
            config = _load_config(path, model)
            prepared = prepare(config)
            if "--check" in sys.argv[1:]:
                Run(name, path, config, overwrite=overwrite, looking=True)
                if check:
                    check(config, prepared)
                log.info("%s: all checked, nothing done.", path)
                return 0
            run = Run(name, path, config, overwrite=overwrite)
            stack.enter_context(log_to_file(log, run.log_file))
            _do_work(run, work, config, prepared)
            return 0
        except (Exception, KeyboardInterrupt) as error:
            return _exit_code(run, error)


def _load_config(path: Path, model: type[Config]) -> Config:
    config = load_config(path, model)
    folder: Path = config.output_dir  # type: ignore[attr-defined]
    way = next((part for part in (folder, *folder.parents) if os.path.lexists(part)), None)
    if way and not way.is_dir():  # noticed by `--check` as well, and before any work
        raise ConfigError(f"{path}: output_dir: {folder} cannot be made: {way} is no folder")
    if shard := getattr(getattr(config, "data", None), "shard", None):
        log.info("data.shard: shard %d of %d, counted from 0", *shard)
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
    with run.stop_signals():
        closing_words = work(config, prepared, run)
        run.close("done")
        log.info("%s", closing_words)


def _exit_code(run: Run | None, error: BaseException) -> int:
    """Log what ended a run, write it into `run_info.json`, and return the script's exit code."""
    # Of several processes that are asked to stop, one can miss another before it stops itself.
    is_stopping = run is not None and run.stop_signal and _is_of_a_connection(error)
    if is_stopping or isinstance(error, Interrupted | KeyboardInterrupt):
        number = run.stop_signal if run else None
        if number is None:
            number = error.args[0] if isinstance(error, StopSignal) else signal.SIGINT
        _close(run, "interrupted")
        log.warning("Interrupted; run the same command again to continue.")
        return 128 + number
    code, message = _code_and_message(run, error)
    log.error("%s", message)
    _close(run, "failed")
    return code


def _code_and_message(run: Run | None, error: BaseException) -> tuple[int, str]:
    """Return the exit code for an error, and what a person is told of it."""
    if isinstance(error, ConfigError):
        return 2, str(error)
    if isinstance(error, DataError):
        return 3, str(error)
    if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        # Where a file that is open already does not fit, the system names none.
        where = f" in {run.folder}" if run and not error.filename else ""
        return 3, f"{error}{where}: make room, and run the same command again"
    if isinstance(error, OSError) and run and error.errno in OUT_OF_REACH:
        return 3, f"{error}: see that it can be read and written, and run the same command again"
    if isinstance(error, OSError) and run is None:  # a folder that may not be read, for example
        return 2, f"{error.filename or 'the config'}: {error.strerror or error}"
    if place := _in_the_way(run, error):
        return 2, IN_THE_WAY.format(place)
    if _is_of_a_connection(error):
        return 3, (
            f"Process {process_rank()} lost another one, which has ended or did not answer: "
            f"{error}\nIts own message says why. Run the same command again to continue."
        )
    where = f" The log is {run.own_folder / 'log.txt'}." if run else ""
    return 1, f"{traceback.format_exc()}This is a bug, please report it.{where}"


def _in_the_way(run: Run | None, error: BaseException) -> Path | None:
    """Return what of a user's stands in the place of a file or folder of the run, if that is it."""
    if run is None or not isinstance(
        error, FileExistsError | IsADirectoryError | NotADirectoryError
    ):
        return None
    path = Path(error.filename2 or error.filename or "")
    if not path.is_relative_to(run.folder):
        return None
    return next(part for part in (path, *path.parents) if os.path.lexists(part))


def _is_of_a_connection(error: BaseException) -> bool:
    """Return whether the connection to another process has broken; gloo raises RuntimeErrors."""
    of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    of_torch = type(error).__module__.startswith("torch.distributed")
    return process_count() > 1 and (of_gloo or of_torch or isinstance(error, ProcessLost))


def _close(run: Run | None, outcome: str) -> None:
    if run:
        with contextlib.suppress(OSError):  # a full disk cannot take this either
            run.close(outcome)
