"""What it costs to read a manifest, and to learn the lengths of its files from their headers.

`python -m benchmarks.headers [FILES]` makes hard links of a few short clips, and a manifest without
lengths; then it prints the processor time and the time on the clock of reading the manifest: as it
is, and where every question whether a file exists takes a millisecond, as on a network; then of
sorting the rows by length: with the headers read one after the other, as labelling and inference
read them for the first time, and as another process or a later run finds them kept.
"""

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from benchmarks.clips import write_noise
from simpler_distil_whisper.data.audio import audio_seconds
from simpler_distil_whisper.data.manifest import read_manifest
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.decoding.batches import ByLength

CLIPS, GROUP = 8, 1024


def make_manifest(folder: Path, files: int) -> Path:
    """Write the clips, their links and the manifest."""
    clips = write_noise(folder, [(1 + number) / 10 for number in range(CLIPS)])
    path = folder / "manifest.jsonl"
    with path.open("w") as manifest:
        for number in range(files):
            os.link(clips[number % CLIPS], folder / f"{number}.wav")
            manifest.write(f'{{"audio": "{number}.wav"}}\n')
    return path


def measure(name: str, work: Callable[[], object]) -> None:
    """Print the time of some work."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{name:24}{processor:6.2f} s of processor time, {wall:6.2f} s on the clock", flush=True)


def after_a_millisecond(exists: Callable[[str], bool], path: str) -> bool:
    """Return whether a file exists."""
    time.sleep(0.001)
    return exists(path)


def main() -> None:
    """Measure all in turn."""
    files = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory() as name:
        path = make_manifest(Path(name), files)
        measure("manifest", lambda: read_manifest(path, Columns()))
        with mock.patch("os.path.exists", functools.partial(after_a_millisecond, os.path.exists)):
            measure("manifest on a network", lambda: read_manifest(path, Columns()))
        rows = list(read_manifest(path, Columns()).utterances)
        groups = [rows[start : start + GROUP] for start in range(0, files, GROUP)]
        by_length = ByLength(Path(name))
        measure("one after the other", lambda: [audio_seconds(*row.clip) for row in rows])
        measure("for the first time", lambda: [by_length(group) for group in groups])
        measure("kept", lambda: [by_length(group) for group in groups])


if __name__ == "__main__":
    main()
