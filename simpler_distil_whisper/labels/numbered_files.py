"""Numbered files, each written once by one of several processes.

Owns where the file of a number is, and who writes which. What stands in it is up to the caller.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from simpler_distil_whisper.launch import process_count, process_rank
from simpler_distil_whisper.progress import Progress
from simpler_distil_whisper.run import Run

FILES_IN_A_FOLDER = 1000


def numbered_file(folder: Path, number: int, ending: str) -> Path:
    """Return the file of a number, in a folder of a thousand."""
    return folder / f"{number // FILES_IN_A_FOLDER:03d}" / f"{number:06d}.{ending}"


def write_own_files(
    count: int,
    path_of: Callable[[int], Path],
    write: Callable[[int, Path], None],
    progress: tuple[str, str],
    run: Run,
    *,
    workers: int,
    at_once: int,
) -> None:
    """Write this process's share of the files; those of an earlier run stay as they are.

    Args:
        count: of files, of all processes together.
        path_of: number, from 0 -> its file.
        write: writes the file of a number, in a folder that is there.
        progress: what is done and to what, for the progress bar.
        run: asked whether to stop.
        workers: threads that write; 0 is like 1.
        at_once: how many files are written before a stop signal is looked for.

    Raises:
        Interrupted: a stop signal came.
    """

    def write_file(number: int) -> None:
        path = path_of(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(number, path)

    own = range(process_rank(), count, process_count())
    todo = [number for number in own if not path_of(number).exists()]
    shown = Progress(*progress, len(own), len(own) - len(todo))
    # Threads are enough: most of the time is that of libraries which release Python's global lock.
    with shown, ThreadPoolExecutor(max(workers, 1)) as pool:
        for start in range(0, len(todo), at_once):
            run.stop_if_asked()
            numbers = todo[start : start + at_once]
            list(pool.map(write_file, numbers))
            shown.advance(len(numbers))
        run.stop_if_asked()
