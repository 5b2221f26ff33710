"""How long four processes take together if one of them is four times as slow as the others.

`python -m benchmarks.uneven_processes [SECONDS]` lets them take 200 batches, read two ahead, and
sleep that long for each, the second process four times as long. It prints the time of the whole as
a ratio of what is possible: 3.25 batches in those seconds. The batches are dealt as in labelling
and inference; no model is needed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simpler_distil_whisper.data.manifest import Utterance, read_manifest
from simpler_distil_whisper.data.options import Columns, DataLimits
from simpler_distil_whisper.launch import is_main_process, process_rank

PROCESSES, SLOW_RANK, SLOWNESS, BATCHES, SIZE = 4, 1, 4.0, 200, 4


def batch_size(batch: Sequence[Utterance]) -> int:
    """Return how many utterances a batch has; takes the place of reading their audio."""
    return len(batch)


def work(folder: Path, seconds: float) -> None:
    """Take batches until none is left; the main process prints how long all took."""
    from simpler_distil_whisper.data.workers import map_ahead
    from simpler_distil_whisper.decoding.transcription import own_batches
    from simpler_distil_whisper.model.processes import (
        SharedSums,
        join_processes,
        wait_for_everyone,
    )

    join_processes()
    rows = read_manifest(folder / "manifest.jsonl", Columns()).utterances
    sums, done = SharedSums(), np.zeros(len(rows), dtype=bool)
    wait_for_everyone()
    started, count = time.perf_counter(), 0
    for _ in map_ahead(batch_size, own_batches(rows, SIZE, done, DataLimits(), sums), 1):
        time.sleep(seconds * (SLOWNESS if process_rank() == SLOW_RANK else 1.0))
        count += 1
    sums.add("batches of all", count)
    wait_for_everyone()
    if is_main_process():
        whole = time.perf_counter() - started
        total = sums.add("batches of all", 0)
        ideal = total * seconds / (PROCESSES - 1 + 1 / SLOWNESS)
        print(
            f"{total} batches: {whole:.1f} s, {whole / ideal:.2f} times {ideal:.1f} s", flush=True
        )
    wait_for_everyone()
    print(f"process {process_rank()}: {count} batches", flush=True)


def main() -> None:
    """Write a manifest, and launch the processes."""
    seconds = sys.argv[1] if len(sys.argv) > 1 else "0.2"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.wav").touch()
        row = json.dumps({"audio": "x.wav", "duration_seconds": 1.0})
        (Path(folder) / "manifest.jsonl").write_text(f"{row}\n" * BATCHES * SIZE)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
        command = [sys.executable, *launcher, "-m", "benchmarks.uneven_processes"]
        subprocess.run([*command, seconds, folder], check=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        work(Path(sys.argv[2]), float(sys.argv[1]))
    else:
        main()
