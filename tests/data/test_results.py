"""Results row by row: none is lost, however many processes there are, whoever is killed."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from tiny import make_corpus, read_rows, write_rows

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.manifest import Manifest, read_manifest, reject
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.data.results import RowResults
from simpler_distil_whisper.run import DataError
from simpler_distil_whisper.shards import Shard, Shards

CLIP = "clip.wav"
GOOD = {"id": "u1", "audio": CLIP, "text": "好"}
COUNT, BATCH = 23, 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / CLIP).touch()
    return tmp_path


def read(folder: Path, *rows: object) -> Manifest:
    return read_manifest(write_rows(folder / "m.jsonl", list(rows)), Columns())


def open_results(folder: Path, manifest: Manifest) -> RowResults:
    results = RowResults(folder, "results.jsonl")
    results.open_for(manifest)
    return results


def make_manifest(folder: Path) -> Manifest:
    rows: list[object] = [{**GOOD, "id": f"第{n}句", "n": n} for n in range(COUNT)]
    rows[4], rows[11] = "{", {"audio": "gone.wav"}
    return read(folder, *rows)


def label(results: RowResults, manifest: Manifest, rank: int, processes: int, stop: int) -> int:
    """Do one process's share of the batches that have no results yet; return how many."""
    usable = manifest.utterances
    batches = [usable[start : start + BATCH] for start in range(0, len(usable), BATCH)]
    done = 0
    for batch in batches[rank::processes]:
        if results.done[[utterance.number for utterance in batch]].all():
            continue
        if done == stop:
            break
        bad = [utterance for utterance in batch if utterance.number % 7 == 6]
        good = [utterance for utterance in batch if utterance not in bad]
        results.append(
            [(row, row.row | {"label": f"聽到{row.number}"}) for row in good],
            [reject(row, "silent") for row in bad],
        )
        done += 1
    return done


def done_in(results: RowResults) -> set[int]:
    return set(np.flatnonzero(results.done).tolist())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def become(rank: int, processes: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(processes))

    return become


def run_together(
    folder: Path,
    manifest: Manifest,
    processes: int,
    become: Callable[[int, int], None],
    stop: int = 1_000,
) -> None:
    """Let several processes open, label and, unless they are stopped, finish."""
    everyone = []
    for rank in range(processes):
        become(rank, processes)
        everyone.append(open_results(folder, manifest))
    for rank, results in enumerate(everyone):
        label(results, manifest, rank, processes, stop)
    if stop < COUNT:
        return
    for rank in reversed(range(processes)):  # the main process merges when all have come
        become(rank, processes)
        everyone[rank].finish(manifest.rejections, lambda: None)


@pytest.fixture
def alone(folder: Path) -> dict[str, bytes]:
    """What one process writes that no one interrupts."""
    manifest = make_manifest(folder)
    results = open_results(folder / "alone", manifest)
    label(results, manifest, 0, 1, COUNT)
    assert results.finish(manifest.rejections, lambda: None) == (18, 5)
    return files(folder / "alone")


def test_results_stand_in_the_manifests_order_and_nothing_is_lost(
    folder: Path, alone: dict[str, bytes]
) -> None:
    assert sorted(alone) == ["rejected.jsonl", "results.jsonl"]
    assert not (folder / "alone" / "parts").exists()
    results = [json.loads(line) for line in alone["results.jsonl"].splitlines()]
    bad = [4, 6, 11, 13, 20]
    assert [row["n"] for row in results] == [n for n in range(COUNT) if n not in bad]
    first = {"id": "第0句", "audio": CLIP, "text": "好", "n": 0, "label": "聽到0"}
    assert alone["results.jsonl"].splitlines()[0].decode() == json.dumps(first, ensure_ascii=False)
    rejected = [json.loads(line) for line in alone["rejected.jsonl"].splitlines()]
    assert [row["place"] for row in rejected] == [f"{folder / 'm.jsonl'}:{n + 1}" for n in bad]
    assert [row["reason"] for row in rejected][1:4:2] == ["silent", "silent"]


@pytest.mark.parametrize("processes", [2, 3, 5, 9])
def test_several_processes_write_what_one_writes(
    folder: Path,
    alone: dict[str, bytes],
    processes: int,
    as_process: Callable[[int, int], None],
) -> None:
    run_together(folder / "out", make_manifest(folder), processes, as_process)
    assert files(folder / "out") == alone
    assert not (folder / "out" / "parts").exists()


def test_shards_write_what_one_process_writes(folder: Path, alone: dict[str, bytes]) -> None:
    manifest, count = make_manifest(folder), 3
    everyone = []
    for index in range(count):
        shards = Shards(folder / "out", Shard(index, count))
        shards.begin()
        results = RowResults(folder / "out", "results.jsonl", shards)
        results.open_for(manifest)
        label(results, manifest, index, count, COUNT)
        everyone.append((shards, results))
    assert [shards.end() is None for shards, _ in everyone] == [False, False, True]
    assert everyone[-1][1].rejected_so_far() == 3
    assert everyone[-1][1].finish(manifest.rejections, lambda: None) == (18, 5)
    assert files(folder / "out") == alone
    assert not list((folder / "out").rglob("parts"))
    # One that is started again does nothing again.
    again = RowResults(folder / "out", "results.jsonl", everyone[0][0])
    again.open_for(manifest)
    assert again.done.all()


def test_shards_of_an_edited_manifest_are_not_merged(folder: Path) -> None:
    for index, row in enumerate((GOOD, {**GOOD, "id": "another"})):
        manifest = read(folder, row, row)
        shards = Shards(folder / "out", Shard(index, 2))
        shards.begin()
        results = RowResults(folder / "out", "results.jsonl", shards)
        results.open_for(manifest)
        label(results, manifest, index, 2, COUNT)
    with pytest.raises(ConfigError, match="0-of-2 holds results of other rows"):
        results.finish([], lambda: None)


@pytest.mark.parametrize("depth", [1, 90, 101, 300, 500, *range(960, 1000, 3), 5000])
def test_a_row_nested_at_any_depth_is_used_or_rejected(folder: Path, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    rows = [f'{{"audio": "{name}", "x": {deep}}}' for name in (CLIP, "gone.wav")]
    manifest = read(folder, *rows, GOOD)
    results = open_results(folder, manifest)
    silent = [reject(utterance, "silent") for utterance in manifest.utterances]
    results.append([], silent)
    assert results.finish(manifest.rejections, lambda: None) == (0, 3)
    assert len(silent) == (2 if depth < 100 else 1)


@pytest.mark.parametrize("seed", range(8))
def test_a_run_killed_again_and_again_writes_what_one_writes(
    folder: Path, alone: dict[str, bytes], seed: int, as_process: Callable[[int, int], None]
) -> None:
    manifest, chance = make_manifest(folder), random.Random(seed)
    for _ in range(4):
        run_together(folder / "out", manifest, chance.randint(1, 4), as_process, stop=1)
        # A kill in the middle of a write tears the last line anywhere, even inside a character.
        for part in (folder / "out" / "parts").glob("*.[ar]*"):
            content = part.read_bytes()
            if content and chance.random() < 0.5:
                last = content.rstrip(b"\n").rfind(b"\n") + 1
                part.write_bytes(content[: chance.randrange(last, len(content))])
    run_together(folder / "out", manifest, chance.randint(1, 4), as_process)
    assert files(folder / "out") == alone


def test_what_is_done_is_not_done_again(
    folder: Path, as_process: Callable[[int, int], None]
) -> None:
    manifest = make_manifest(folder)
    run_together(folder / "out", manifest, 2, as_process, stop=2)
    as_process(0, 1)
    results = open_results(folder / "out", manifest)
    assert done_in(results) == {0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 13}
    assert label(results, manifest, 0, 1, COUNT) == 3  # of seven batches


def test_a_process_that_is_killed_keeps_every_batch_that_it_had_appended(folder: Path) -> None:
    manifest = make_manifest(folder)
    program = (
        f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}]\n"
        "from pathlib import Path\n"
        "from simpler_distil_whisper.data.manifest import read_manifest\n"
        "from simpler_distil_whisper.data.options import Columns\n"
        "from simpler_distil_whisper.data.results import RowResults\n"
        "manifest = read_manifest(Path('m.jsonl'), Columns())\n"
        "results = RowResults(Path('out'), 'results.jsonl')\n"
        "results.open_for(manifest)\n"
        "for row in manifest.utterances[:5]:\n"
        "    results.append([(row, row.row)], [])\n"
        "    print(row.number, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    appended = {int(process.stdout.readline()) for _ in range(5)}
    process.kill()
    process.wait()
    process.communicate()
    assert done_in(open_results(folder / "out", manifest)) == appended == {0, 1, 2, 3, 5}


def test_the_main_process_waits_for_the_others_before_it_merges(
    folder: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest(folder)
    monkeypatch.setenv("RANK", "1")
    late = open_results(folder / "out", manifest)
    monkeypatch.setenv("RANK", "0")
    main = open_results(folder / "out", manifest)
    label(main, manifest, 0, 2, COUNT)
    others_are_done = threading.Event()

    def wait() -> None:
        # What stands here happens while the main process waits.
        if not others_are_done.is_set():
            label(late, manifest, 1, 2, COUNT)
            others_are_done.set()

    main.finish(manifest.rejections, wait)
    assert files(folder / "out") == alone


def small_work(folder: Path) -> Manifest:
    return read(folder, GOOD, {**GOOD, "id": "二"}, {**GOOD, "id": "u3"}, "{", GOOD)


def keep_rows(results: RowResults, manifest: Manifest) -> None:
    """Keep results of all rows but the third, which is rejected, as one batch."""
    first, second, third, last = manifest.utterances
    rows = [(row, {"label": f"聽{row.number}"}) for row in (first, second, last)]
    results.append(rows, [reject(third, "silent")])


@pytest.fixture
def untouched(folder: Path) -> dict[str, bytes]:
    manifest = small_work(folder)
    results = open_results(folder / "untouched", manifest)
    keep_rows(results, manifest)
    assert results.finish(manifest.rejections, lambda: None) == (3, 2)
    return files(folder / "untouched")


@pytest.mark.parametrize(("kind", "rank"), [("results", 0), ("rejected", 1)])
def test_a_part_torn_at_any_byte_loses_no_row(
    folder: Path, untouched: dict[str, bytes], kind: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = small_work(folder)
    monkeypatch.setenv("RANK", str(rank))
    keep_rows(open_results(folder / "whole", manifest), manifest)
    monkeypatch.setenv("RANK", "0")  # goes on with what process `rank` had left
    size = (folder / f"whole/parts/{rank}.{kind}").stat().st_size
    for cut in (0, 1, *range(62, size + 1)):  # the first line is a hash of 64 digits
        shutil.rmtree(folder / "out", ignore_errors=True)
        shutil.copytree(folder / "whole", folder / "out")
        os.truncate(folder / f"out/parts/{rank}.{kind}", cut)
        results = open_results(folder / "out", manifest)
        keep_rows(results, manifest)
        assert results.finish(manifest.rejections, lambda: None) == (3, 2)
        assert files(folder / "out") == untouched, cut


def finish_and_be_killed(results: RowResults, manifest: Manifest, at: int) -> None:
    """Kill this process when it is about to change the folder for the `at`-th time."""
    left = itertools.count(at, -1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.rmdir")
        if (changes or (event == "open" and "w" in str(arguments[1]))) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    results.finish(manifest.rejections, lambda: None)


def test_a_run_killed_anywhere_in_its_end_goes_on_to_the_same_bytes(
    folder: Path, untouched: dict[str, bytes]
) -> None:
    manifest = small_work(folder)
    for at in itertools.count():
        out = folder / f"killed-{at}"
        results = open_results(out, manifest)
        keep_rows(results, manifest)
        process = multiprocessing.get_context("fork").Process(
            target=finish_and_be_killed, args=(results, manifest, at)
        )
        process.start()
        process.join(timeout=30)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        again = open_results(out, manifest)
        assert done_in(again) >= {0, 1, 2, 4}  # nothing is computed again
        assert again.finish(manifest.rejections, lambda: None) == (3, 2)
        assert files(out) == untouched
        assert not (out / "parts").exists()
    assert at == 8  # two files written and renamed, three parts and their folder removed


def test_rejections_of_all_processes_are_counted(
    folder: Path, as_process: Callable[[int, int], None]
) -> None:
    manifest = small_work(folder)
    first, second, third, last = manifest.utterances
    everyone = []
    for rank in range(2):
        as_process(rank, 2)
        everyone.append(open_results(folder / "out", manifest))
    assert [results.rejected_so_far() for results in everyone] == [0, 0]
    everyone[0].append([(first, {})], [reject(second, "x")])
    everyone[1].append([], [reject(third, "y")])
    assert [results.rejected_so_far() for results in everyone] == [2, 2]
    # The third row for the second time.
    everyone[1].append([], [reject(last, "z"), reject(third, "y")])
    assert [results.rejected_so_far() for results in everyone] == [3, 3]
    as_process(0, 1)
    assert open_results(folder / "out", manifest).rejected_so_far() == 3


def test_two_runs_cannot_work_in_one_folder(folder: Path) -> None:
    manifest = small_work(folder)
    ready, tell = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        results = open_results(folder / "out", manifest)
        tell.send("ready")
        time.sleep(60)
        results.finish([], lambda: None)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    try:
        assert ready.recv() == "ready"
        with pytest.raises(ConfigError, match="another run is at work"):
            open_results(folder / "out", manifest)
    finally:
        process.kill()
        process.join()
    open_results(folder / "out", manifest)


def test_results_of_an_edited_manifest_are_refused(tmp_path: Path) -> None:
    """They are kept by row number, which names another row once a row before it is gone."""
    make_corpus(tmp_path, 4)
    manifest = read_manifest(tmp_path / "zh-0.jsonl", Columns())
    results = open_results(tmp_path / "out", manifest)
    results.append([(manifest.utterances[0], {"label": "x"})], [])
    open_results(tmp_path / "out", manifest)
    write_rows(tmp_path / "zh-0.jsonl", list(read_rows(tmp_path / "zh-0.jsonl")[1:]))
    edited = read_manifest(tmp_path / "zh-0.jsonl", Columns())
    with pytest.raises(ConfigError, match="other rows"):
        open_results(tmp_path / "out", edited)


def test_a_row_without_result_is_never_called_done(tmp_path: Path) -> None:
    make_corpus(tmp_path, 3)
    manifest = read_manifest(tmp_path / "zh-0.jsonl", Columns())
    results = open_results(tmp_path / "out", manifest)
    results.append([(utterance, {}) for utterance in manifest.utterances[:2]], [])
    with pytest.raises(DataError, match="of 3 rows 2 are accounted for"):
        results.finish([], lambda: None)
