"""Fixed batches of similar length for any number of processes; memory and rows that fail."""

import heapq
import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, RunScript
from tiny import make_corpus, make_model_folder, read_rows, write_rows, write_tone

from simpler_distil_whisper.data.manifest import Manifest, Rejection, Utterance, read_manifest
from simpler_distil_whisper.data.options import Columns, DataLimits
from simpler_distil_whisper.decoding import batches, loading, transcription
from simpler_distil_whisper.decoding.batches import SpeechBatch, halved
from simpler_distil_whisper.decoding.transcription import (
    decode_halving,
    own_batches,
)
from simpler_distil_whisper.model import memory
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.memory import Room
from simpler_distil_whisper.model.options import InferenceDecodingOptions, ModelOptions
from simpler_distil_whisper.model.processes import SharedSums
from simpler_distil_whisper.model.teacher_cache import CachedEncoderStates
from simpler_distil_whisper.model.whisper import load_whisper
from simpler_distil_whisper.shards import WHOLE, Shard

SIZE = 3


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """50 rows with their lengths, two of them unusable; groups of four batches."""
    monkeypatch.setattr(transcription, "BATCHES_OF_A_GROUP", 4)
    (tmp_path / "x.wav").touch()
    rows: list[object] = [
        {"audio": "x.wav", "duration_seconds": 0.1 + 7 * number % 13} for number in range(50)
    ]
    rows[5] = rows[30] = "{"
    return read_manifest(write_rows(tmp_path / "m.jsonl", rows), Columns())


def taken(
    manifest: Manifest,
    costs: list[float],
    done: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    ahead: int = 0,
    shard: Shard = WHOLE,
) -> tuple[list[list[list[int]]], float]:
    """The rows of each batch that each process takes, and when the last process has ended.

    The costs are how long each process needs for a batch; it reads some batches ahead.
    """
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    sums = SharedSums()
    monkeypatch.setenv("WORLD_SIZE", str(len(costs)))
    limits = DataLimits(num_workers=0)
    sources = [own_batches(manifest.utterances, SIZE, done, limits, sums, shard) for _ in costs]
    in_hand: list[deque[list[int]]] = [deque() for _ in costs]
    work: list[list[list[int]]] = [[] for _ in costs]
    clock = [(0.0, rank) for rank in range(len(costs))]
    ends = 0.0
    while clock:
        now, rank = heapq.heappop(clock)
        monkeypatch.setenv("RANK", str(rank))
        for batch in itertools.islice(sources[rank], ahead + 1 - len(in_hand[rank])):
            in_hand[rank].append([utterance.number for utterance in batch])
        if in_hand[rank]:
            work[rank].append(in_hand[rank].popleft())
            ends = max(ends, now + costs[rank])
            heapq.heappush(clock, (now + costs[rank], rank))
    return work, ends


@pytest.fixture
def shares(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[int]]]:
    """The numbers of the rows in each batch of some processes together."""

    def share(processes: int, done: np.ndarray, shard: Shard = WHOLE) -> list[list[int]]:
        work, _ = taken(manifest, [1.0] * processes, done, monkeypatch, shard=shard)
        return [batch for own in work for batch in own]

    return share


def test_batches_hold_rows_of_similar_length_the_longest_first(
    manifest: Manifest, shares: Callable[..., list[list[int]]]
) -> None:
    batches = shares(1, np.zeros(50, dtype=bool))
    assert sorted(number for batch in batches for number in batch) == sorted(
        utterance.number for utterance in manifest.utterances
    )
    assert {len(batch) for batch in batches} == {SIZE}  # 48 rows
    seconds = {
        utterance.number: utterance.duration_seconds or 0.0 for utterance in manifest.utterances
    }
    group = 4 * SIZE
    usable = [utterance.number for utterance in manifest.utterances]
    for start in range(0, len(usable), group):
        here = batches[start // SIZE : start // SIZE + 4]
        order = [number for batch in here for number in batch]
        expected = sorted(usable[start : start + group], key=lambda n: (-seconds[n], n))
        assert order == expected


@pytest.mark.parametrize("processes", [2, 3, 7, 40])
def test_any_number_of_processes_forms_the_same_batches(
    shares: Callable[..., list[list[int]]], processes: int
) -> None:
    nothing = np.zeros(50, dtype=bool)
    alone = shares(1, nothing)
    assert sorted(shares(processes, nothing)) == sorted(alone)
    in_shards = [shares(2, nothing, Shard(index, processes)) for index in range(processes)]
    assert sorted(batch for share in in_shards for batch in share) == sorted(alone)


@pytest.mark.parametrize("costs", [[4.0, 1.0, 1.0, 1.0], [1.0, 1.0, 4.0, 1.0], [1.0, 2.0, 8.0]])
def test_a_slow_process_takes_fewer_batches(
    costs: list[float], manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads two batches ahead; the whole takes at most 1.4 times what is possible."""
    rows: list[object] = [{"audio": "x.wav", "duration_seconds": 1.0} for _ in range(600)]
    many = read_manifest(write_rows(manifest.path.with_name("many.jsonl"), rows), Columns())
    work, ends = taken(many, costs, np.zeros(600, dtype=bool), monkeypatch, ahead=2)
    assert sum(map(len, work)) == 200
    assert ends <= 1.4 * 200 / sum(1 / cost for cost in costs)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_done_the_other_batches_stay_as_they_are(
    shares: Callable[..., list[list[int]]], seed: int
) -> None:
    """A batch of which a kill has torn a part away is computed again with all its rows."""
    chance = np.random.default_rng(seed)
    alone = shares(1, np.zeros(50, dtype=bool))
    done = np.zeros(50, dtype=bool)
    for batch in alone:
        done[batch] = chance.random() < 0.7
    done[chance.integers(50, size=3)] = False
    left = [batch for batch in alone if not done[batch].all()]
    assert sorted(shares(3, done)) == sorted(left)


@pytest.mark.usefixtures("manifest")
def test_no_header_is_read_before_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without their length: those of a group that is done are not even opened."""
    opened: list[Path] = []

    def length(audio: Path, *_: object) -> float:
        opened.append(audio)
        return 1.0

    monkeypatch.setattr(batches, "audio_seconds", length)
    path = write_rows(tmp_path / "rows.jsonl", [{"audio": "x.wav"} for _ in range(24)])
    utterances = read_manifest(path, Columns()).utterances
    done = np.repeat([True, False], 12)
    limits = DataLimits(num_workers=0)
    first = next(own_batches(utterances, SIZE, done, limits, SharedSums()))
    assert [utterance.number for utterance in first] == [12, 13, 14]
    assert len(opened) == 12


def make_batch(count: int) -> SpeechBatch:
    rows = [
        Utterance(n, f"m:{n}", "{}", str(n), Path("x"), 0.0, None, None, None) for n in range(count)
    ]
    waveforms = [np.full(3, number, dtype=np.float32) for number in range(count)]
    return SpeechBatch(rows, waveforms, [1.0] * count, [Rejection(99, "m:99", "broken", {})])


def decoder_with_room_for(rows: int, too_large: float = -1) -> Callable[[SpeechBatch], list[float]]:
    """A decoder that asks torch for too much memory for larger batches, or for one row."""

    def decode(batch: SpeechBatch) -> list[float]:
        values = [waveform[0].item() for waveform in batch.waveforms]
        if len(values) > rows or too_large in values:
            torch.empty(1 << 60, dtype=torch.uint8)
        return values

    return decode


@pytest.mark.parametrize("room", [1, 2, 3, 5, 8, 9])
def test_a_batch_too_large_for_the_memory_is_decoded_in_parts(room: int) -> None:
    batch, values = decode_halving(decoder_with_room_for(room), make_batch(9), Room(9))  # type: ignore[arg-type]
    assert values == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert [utterance.number for utterance in batch.utterances] == values
    assert batch.seconds == [1.0] * 9
    assert [rejection.reason for rejection in batch.rejections] == ["broken"]


def test_a_row_too_large_for_the_memory_is_rejected_and_no_other() -> None:
    batch, values = decode_halving(decoder_with_room_for(4, 5.0), make_batch(9), Room(9))  # type: ignore[arg-type]
    assert values == [0, 1, 2, 3, 4, 6, 7, 8]
    assert [utterance.number for utterance in batch.utterances] == values
    assert [rejection.number for rejection in batch.rejections] == [99, 5]
    assert batch.rejections[1].reason.startswith("out of memory even in a batch of its own: ")
    assert [waveform[0] for waveform in batch.waveforms] == values


def test_what_did_not_fit_is_not_tried_again() -> None:
    tried: list[int] = []

    def decode(batch: SpeechBatch) -> list[int]:
        tried.append(len(batch.utterances))
        if len(batch.utterances) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [utterance.number for utterance in batch.utterances]

    room = Room(8)
    for _ in range(3):
        assert decode_halving(decode, make_batch(8), room)[1] == list(range(8))  # type: ignore[arg-type]
    assert tried == [8, 4, *[2] * 4, *[2] * 4, *[2] * 4]


def test_one_row_too_large_does_not_make_later_batches_small() -> None:
    room = Room(8)
    decode_halving(decoder_with_room_for(8, 5.0), make_batch(8), room)  # type: ignore[arg-type]
    assert room.rows == 4


def test_a_recording_is_decoded_with_fewer_windows_at_a_time() -> None:
    room, tried = Room(8), list[int]()

    def decode(batch: SpeechBatch) -> list[int]:
        tried.append(room.rows)
        if room.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [utterance.number for utterance in batch.utterances]

    rows = make_batch(3).utterances
    batch = SpeechBatch(rows, None, [60.0] * 3, [], [torch.zeros(2, 9)] * 3)
    assert decode_halving(decode, batch, room)[1] == [0, 1, 2]  # type: ignore[arg-type]
    assert tried == [8, 4, 2]


def test_one_recording_too_large_does_not_make_later_batches_small() -> None:
    room = Room(64)

    def decode(batch: SpeechBatch) -> list[int]:
        if batch.utterances[0].number == 3:
            raise MemoryError
        return [utterance.number for utterance in batch.utterances]

    for utterance in make_batch(6).utterances:
        recording = SpeechBatch([utterance], [], [60.0], [], [torch.zeros(2, 9)])
        decode_halving(decode, recording, room)  # type: ignore[arg-type]
    assert room.rows == 64


def test_another_error_is_no_lack_of_memory() -> None:
    def decode(batch: SpeechBatch) -> list[int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        decode_halving(decode, make_batch(2), Room(2))  # type: ignore[arg-type]


def test_each_half_keeps_what_the_cache_has_of_it() -> None:
    """Five windows, of which the cache lacks the second and the fifth, and two recordings."""
    utterances = make_batch(7).utterances
    batch = SpeechBatch(
        utterances,
        [np.array([1.0]), np.array([4.0])],
        [float(number) for number in range(7)],
        [],
        [torch.tensor(5.0), torch.tensor(6.0)],
        CachedEncoderStates(torch.tensor([0.0, 2.0, 3.0]), {1: "b", 4: None}),
    )
    windows, recordings = halved(batch)
    first, second = halved(windows)
    assert [len(part.utterances) for part in (windows, recordings, first, second)] == [5, 2, 2, 3]
    assert [each.item() for each in recordings.recordings] == [5.0, 6.0]
    for part, cached, samples, missing in (
        (first, [0.0], [1.0], {1: "b"}),
        (second, [2.0, 3.0], [4.0], {2: None}),
    ):
        assert part.cached is not None
        assert part.cached.states.tolist() == cached
        assert np.concatenate(part.waveforms).tolist() == samples
        assert part.cached.missing == missing
        assert not part.recordings
    assert second.seconds == [2.0, 3.0, 4.0]


def test_a_lack_of_memory_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcription.log, "handlers", [caplog.handler])
    monkeypatch.setattr(transcription.log, "propagate", False)
    transcription._warn_of_halving.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            decode_halving(decoder_with_room_for(4), make_batch(7), Room(7))  # type: ignore[arg-type]
    assert caplog.text.count("A batch of 7 did not fit into the memory") == 1


def test_an_assistant_computes_in_the_dtype_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs that compute in bfloat16, "auto" is that; the two have encoders of their own."""
    monkeypatch.setattr(loading, "decoding_dtype", lambda *_: torch.bfloat16)
    folders = [
        read_model_folder(make_model_folder(tmp_path / str(seed), seed=seed), None, "model")
        for seed in (1, 2)
    ]
    device, run = torch.device("cpu"), SimpleNamespace(note=lambda **_: None)
    options = (
        ModelOptions(path=folders[0].path),
        InferenceDecodingOptions(batch_size=1, max_new_tokens=5),
    )
    transcriber = loading.load_transcriber(*folders, *options, 0, device, run)  # type: ignore[arg-type]
    assert transcriber.assistant is not None and transcriber.assistant.own_encoder
    assert transcriber.assistant.student.model.dtype == torch.bfloat16


def labelling_config(
    folder: Path, rows: list[object], batch_size: int | str = 2, **data: object
) -> Path:
    write_rows(folder / "train.jsonl", rows)
    config = {
        "output_dir": "out",
        "teacher": {"path": "teacher", "dtype": "float32"},
        "data": {"manifest": "train.jsonl", **data},
        "decoding": {"batch_size": batch_size, "max_new_tokens": 5},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


LABELLING = REPOSITORY / "run_pseudo_labelling.py"


def label(
    folder: Path, config: Path, processes: int, script: Path = LABELLING
) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), str(config)]
    path = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def labelling_after(code: str, folder: Path) -> Path:
    """A script that does what run_pseudo_labelling.py does, after something else."""
    script = folder / "label.py"
    script.write_text(
        f"{code}\nimport runpy, sys\nsys.argv[0] = 'run_pseudo_labelling.py'\n"
        f"runpy.run_path({str(LABELLING)!r}, run_name='__main__')\n"
    )
    return script


OTHER_MEMORY = """
import os
from simpler_distil_whisper.model import memory
memory.CPU_CACHE_BYTES = {sizes}[int(os.environ.get("RANK", "0"))]
"""


@pytest.mark.slow
def test_processes_with_other_memories_form_the_same_batches(tmp_path: Path) -> None:
    """The second has room for fewer rows; the run goes on where there is more room again."""
    make_model_folder(tmp_path / "teacher", languages=["en", "zh"])
    rows = read_rows(make_corpus(tmp_path, 40))
    (tmp_path / rows[20]["audio"]).write_bytes(b"no audio")
    rows[20]["duration_seconds"] = 0.01  # comes last
    config = labelling_config(tmp_path, rows, "auto", max_bad_fraction=0.0)
    whole = read_model_folder(tmp_path / "teacher", None, "teacher")
    window = memory._cache_bytes(load_whisper(whole).model, beams=1)
    script = labelling_after(OTHER_MEMORY.format(sizes=[7 * window, 5 * window]), tmp_path)
    done = label(tmp_path, config, 2, script)
    assert "rows are unusable" in done.stderr
    assert (tmp_path / "out/parts/batch_size.begun").read_text() == "5"
    config.write_text(
        config.read_text().replace('"max_bad_fraction": 0.0', '"max_bad_fraction": 1')
    )
    done = label(tmp_path, config, 1, script)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/run_info.json").read_text())["batch_size"] == 5
    assert len(read_rows(tmp_path / "out/pseudo_labels.jsonl")) == 39


ONE_IS_LATE = """
import os, time
from simpler_distil_whisper.decoding import transcription
wait = transcription.wait_for_everyone

def wait_and_dawdle():
    wait()
    time.sleep(3 * int(os.environ["RANK"]))

transcription.wait_for_everyone = wait_and_dawdle
"""


@pytest.mark.slow
def test_the_main_process_may_end_before_the_others(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "teacher", languages=["en", "zh"])
    config = labelling_config(tmp_path, read_rows(make_corpus(tmp_path, 6)))
    settings = json.loads(config.read_text())
    settings["decoding"]["voice_activity"] = {"enabled": True}
    config.write_text(json.dumps(settings))
    script = labelling_after(ONE_IS_LATE, tmp_path)
    done = label(tmp_path, config, 2, script)
    assert done.returncode == 0, done.stderr
    assert "6 rows without speech have an empty text" in done.stderr
    assert len(read_rows(tmp_path / "out/pseudo_labels.jsonl")) == 6


AUDIO_VANISHES = """
import os
from simpler_distil_whisper.decoding import transcription
decode = transcription.decode_halving

def decode_once_it_is_gone(*arguments):
    if os.path.exists("audio/0007.wav"):
        os.rename("audio/0007.wav", "elsewhere.wav")
    return decode(*arguments)

transcription.decode_halving = decode_once_it_is_gone
"""


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [True, False])
def test_audio_that_vanishes_costs_no_row(tmp_path: Path, comes_back: bool) -> None:
    make_model_folder(tmp_path / "teacher", languages=["en", "zh"])
    rows = read_rows(make_corpus(tmp_path, 8))
    for number, row in enumerate(rows):  # the last is the shortest, whose turn comes last
        row["duration_seconds"] = 0.39 - number / 100
    config = labelling_config(tmp_path, rows, max_bad_fraction=0.5, num_workers=0)
    script = labelling_after(AUDIO_VANISHES, tmp_path)
    done = label(tmp_path, config, 1, script)
    assert done.returncode == 3
    assert "Audio has vanished since the manifest was read" in done.stderr
    assert rows_in(tmp_path / "out/parts") == 7
    if comes_back:
        (tmp_path / "elsewhere.wav").rename(tmp_path / "audio/0007.wav")
    assert label(tmp_path, config, 1).returncode == 0
    labels = read_rows(tmp_path / "out/pseudo_labels.jsonl")
    assert [row["id"] for row in labels] == [row["id"] for row in rows[: 8 if comes_back else 7]]
    rejected = read_rows(tmp_path / "out/rejected.jsonl")
    assert ["no such file" in entry["reason"] for entry in rejected] == [True] * (not comes_back)


@pytest.mark.slow
def test_files_that_come_and_go_between_two_starts_cost_no_result(tmp_path: Path) -> None:
    """Row 2 is missing at first; that of row 0 has gone when the run continues."""
    make_model_folder(tmp_path / "teacher", languages=["en", "zh"])
    rows = read_rows(make_corpus(tmp_path, 8))
    config = labelling_config(tmp_path, rows, max_bad_fraction=0.3)
    (tmp_path / rows[2]["audio"]).rename(tmp_path / "elsewhere.wav")
    script = labelling_after(STOPS_BEFORE_MERGING, tmp_path)
    assert label(tmp_path, config, 1, script).returncode == 9
    (tmp_path / "elsewhere.wav").rename(tmp_path / rows[2]["audio"])
    (tmp_path / rows[0]["audio"]).unlink()
    done = label(tmp_path, config, 1)
    assert done.returncode == 0, done.stderr
    assert len(read_rows(tmp_path / "out/pseudo_labels.jsonl")) == 8
    assert read_rows(tmp_path / "out/rejected.jsonl") == []


STOPS_BEFORE_MERGING = """
from simpler_distil_whisper.data import results

def stop(*_):
    raise SystemExit(9)

results.RowResults.finish = stop
"""


ONE_WORKS_ON = """
import os, pathlib, time
from simpler_distil_whisper.decoding import transcription
decode = transcription.decode_halving

def decode_for_long(*arguments):
    while os.environ["RANK"] == "1" and not pathlib.Path("go").exists():
        time.sleep(0.1)
    return decode(*arguments)

transcription.decode_halving = decode_for_long
"""


@pytest.mark.slow
def test_a_process_that_waits_is_interrupted_like_the_others(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "teacher", languages=["en", "zh"])
    config = labelling_config(tmp_path, read_rows(make_corpus(tmp_path, 8)))
    script = labelling_after(ONE_WORKS_ON, tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.Popen(
        [sys.executable, *launcher, str(script), str(config)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while rows_in(tmp_path / "out/parts") < 6 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)  # for the main process nothing is left: it waits for the other
        run.terminate()
        time.sleep(1)
        (tmp_path / "go").touch()
        run.wait(60)
    finally:
        run.kill()
    assert json.loads((tmp_path / "out/run_info.json").read_text())["outcome"] == "interrupted"
    assert label(tmp_path, config, 1).returncode == 0
    assert len(read_rows(tmp_path / "out/pseudo_labels.jsonl")) == 8


def rows_in(parts: Path) -> int:
    """How many results there are; each file has a line more."""
    return sum(path.read_bytes().count(b"\n") - 1 for path in parts.glob("*.results"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_hopeless_run_stops_early(tmp_path: Path, processes: int) -> None:
    """Counted over all processes: the bad rows lie so that neither alone has met too many."""
    make_model_folder(tmp_path / "teacher", languages=["en", "zh"])
    rows = read_rows(make_corpus(tmp_path, 100))
    for row in rows[10:35]:
        (tmp_path / row["audio"]).write_bytes(b"no audio")
        row["duration_seconds"] = 9.0  # so that they come first
    config = labelling_config(tmp_path, rows, max_bad_fraction=0.2)
    done = label(tmp_path, config, processes)
    assert done.returncode == (3 if processes == 1 else 1)  # torchrun's own
    assert "of 100 rows are unusable, data.max_bad_fraction is 0.2" in done.stderr
    assert "is no audio" in done.stderr
    # One process may have done many good rows before the other meets its first bad one.
    assert rows_in(tmp_path / "out/parts") < 75
    # A second start does not go on to the next bad row.
    again = label(tmp_path, config, 1)
    assert again.returncode == 3
    assert "rows are unusable" in again.stderr
    # The key may be changed for the rest.
    config = labelling_config(tmp_path, rows, max_bad_fraction=0.3)
    assert label(tmp_path, config, processes).returncode == 0
    assert len(read_rows(tmp_path / "out/pseudo_labels.jsonl")) == 75
    assert len(read_rows(tmp_path / "out/rejected.jsonl")) == 25


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_short_and_long_rows_in_one_manifest(
    form: str, tmp_path: Path, run_script: RunScript
) -> None:
    """The window is 2 s; row 2 is three windows long, row 4 is a part of it, row 6 is broken."""
    make_model_folder(tmp_path / "model", languages=["en", "zh"], talkative=True, seed=53)
    rows = read_rows(make_corpus(tmp_path, 8))
    write_tone(tmp_path / rows[2]["audio"], 5.5, seed=2)
    rows[4] |= {"audio": rows[2]["audio"], "start_seconds": 1.0, "duration_seconds": 1.5}
    (tmp_path / rows[6]["audio"]).write_bytes(b"no audio")
    config = {
        "output_dir": "out",
        "model": {"path": "model", "dtype": "float32"},
        "data": {"manifest": "m.jsonl", "max_bad_fraction": 0.5},
        "decoding": {"batch_size": 3, "max_new_tokens": 30, "long_form": form},
    }
    write_rows(tmp_path / "m.jsonl", rows)
    assert run_script("offline_inference", config).returncode == 0
    hypotheses = {row["id"]: row for row in read_rows(tmp_path / "out/hypotheses.jsonl")}
    assert list(hypotheses) == ["u0", "u1", "u2", "u3", "u4", "u5", "u7"]
    for row in hypotheses.values():
        assert row["segments"] and row["hypothesis"]
        assert all(s["start_seconds"] <= s["end_seconds"] for s in row["segments"])
    assert hypotheses["u2"]["segments"][-1]["end_seconds"] > 4
    assert hypotheses["u4"]["segments"] == [
        {"start_seconds": 0.0, "end_seconds": 1.5, "text": hypotheses["u4"]["hypothesis"]}
    ]
    # Without the long one and with it, the others' texts are the same.
    write_rows(tmp_path / "m.jsonl", [row for row in rows if row["id"] != "u2"])
    again = run_script("offline_inference", config | {"output_dir": "short"})
    assert again.returncode == 0
    for row in read_rows(tmp_path / "short/hypotheses.jsonl"):
        assert row["hypothesis"] == hypotheses[row["id"]]["hypothesis"]
