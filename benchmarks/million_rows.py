"""Time and memory that a run of a million rows takes to begin, to be continued and to end.

`python -m benchmarks.million_rows [ROWS]` makes a manifest of a few short clips in a temporary
folder and measures, each in its own process: reading the manifest; continuing a run in which nine
tenths of the rows have results, until the first batch is formed; merging all results. No model is
needed: this is what a run does beside the model's work.
"""

import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.clips import write_noise
from simpler_distil_whisper.data.manifest import Manifest, read_manifest
from simpler_distil_whisper.data.options import Columns, DataLimits
from simpler_distil_whisper.data.results import RowResults

CLIPS, BATCH = 8, 16
TEXT = "我要 order 一個 iPhone 十五, thank you very much 謝謝"


def make_manifest(folder: Path, rows: int) -> None:
    """Write the clips and the manifest."""
    clips = write_noise(folder, [(1 + number) / 2 for number in range(CLIPS)])
    with (folder / "manifest.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = {
                "id": f"call-{number:07d}",
                "audio": clips[number % CLIPS].name,
                "text": f"{TEXT} {number}",
                "language": "zh",
                "speaker": f"speaker {number % 500}",
                "session": {"room": number % 7, "microphones": [1, 2.5]},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read(folder: Path) -> Manifest:
    """Read the manifest."""
    return read_manifest(folder / "manifest.jsonl", Columns())


def label(results: RowResults, manifest: Manifest, until: float) -> None:
    """Append results of the rows that have none, up to a fraction of all; many at once."""
    end = round(until * len(manifest.utterances))
    for start in range(0, end, 10_000):
        rows = slice(start, min(start + 10_000, end))
        if not results.done[rows].all():
            chunk = manifest.utterances[rows]
            results.append([(row, row.row | {"pseudo": row.text}) for row in chunk], [])


def stage_read(folder: Path) -> Iterator[str]:
    """Read the manifest."""
    yield "read"
    read(folder)


def stage_label(folder: Path) -> Iterator[str]:
    """Give nine tenths of the rows results."""
    manifest, results = read(folder), RowResults(folder, "results.jsonl")
    results.open_for(manifest)
    yield "label"
    label(results, manifest, 0.9)


def stage_continue(folder: Path) -> Iterator[str]:
    """Continue the run: read the manifest and the parts, form the first batch."""
    from simpler_distil_whisper.decoding.transcription import own_batches
    from simpler_distil_whisper.model.processes import SharedSums

    yield "read"
    manifest, results = read(folder), RowResults(folder, "results.jsonl")
    yield "read the parts"
    results.open_for(manifest)
    yield "form the first batch"
    rows, done = manifest.utterances, results.done
    first = next(own_batches(rows, BATCH, done, DataLimits(), SharedSums()))
    assert len(first) == BATCH


def stage_finish(folder: Path) -> Iterator[str]:
    """Merge all results."""
    manifest, results = read(folder), RowResults(folder, "results.jsonl")
    results.open_for(manifest)
    label(results, manifest, 1.0)
    yield "finish"
    counts = results.finish(manifest.rejections, lambda: None)
    assert counts == (manifest.row_count, 0)


STAGES = {
    stage.__name__: stage for stage in (stage_read, stage_label, stage_continue, stage_finish)
}


def measure(stage: str, folder: Path) -> None:
    """Print the time of each step of a stage, and the most memory that the process has used."""
    steps, name, clocks = [], "", (0.0, 0.0)
    for step in itertools.chain(STAGES[stage](folder), [""]):
        before, clocks = clocks, (time.perf_counter(), time.process_time())
        wall, cpu = (now - then for now, then in zip(clocks, before, strict=True))
        if name:
            steps.append(f"{name} {wall:.1f} s ({cpu:.1f} s of CPU)")
        name = step
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
    print(f"{stage.removeprefix('stage_'):10}{', '.join(steps)}; {megabytes} MB", flush=True)


def main() -> None:
    """Measure all stages in turn."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        make_manifest(Path(folder), rows)
        megabytes = (Path(folder) / "manifest.jsonl").stat().st_size / 1e6
        print(f"{rows} rows, {megabytes:.0f} MB", flush=True)
        for stage in STAGES:
            command = [sys.executable, "-m", "benchmarks.million_rows", stage, folder]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in STAGES:
        measure(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
