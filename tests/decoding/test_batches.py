"""Utterances become log-mels in the manifest's order, or rejections with a reason."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_rows, write_tone
from transformers import WhisperFeatureExtractor

from simpler_distil_whisper.data.audio import audio_seconds
from simpler_distil_whisper.data.manifest import Utterance, read_manifest
from simpler_distil_whisper.data.options import Columns, DataLimits
from simpler_distil_whisper.decoding import batches as module
from simpler_distil_whisper.decoding.batches import (
    ByLength,
    SpeechBatch,
    SpeechReader,
    groups_by_length,
    halved,
    in_batches,
    joined,
    speech_batches,
    with_recordings_together,
)
from simpler_distil_whisper.model.options import DecodingOptions

WINDOW = 2


@pytest.fixture(scope="module")
def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW)


def utterances(folder: Path, *rows: dict[str, Any]) -> list[Utterance]:
    manifest = read_manifest(write_rows(folder / "m.jsonl", list(rows)), Columns())
    assert manifest.rejections == []
    return list(manifest.utterances)


def clips(folder: Path, *seconds: float) -> list[Utterance]:
    for number, length in enumerate(seconds):
        write_tone(folder / f"{number}.wav", length, seed=number)
    return utterances(folder, *({"audio": f"{number}.wav"} for number in range(len(seconds))))


def same_audio(one: SpeechBatch, other: SpeechBatch) -> bool:
    return len(one.waveforms) == len(other.waveforms) and all(
        map(np.array_equal, one.waveforms, other.waveforms)
    )


def test_the_samples_are_those_of_the_files(
    tmp_path: Path, extractor: WhisperFeatureExtractor
) -> None:
    batch = SpeechReader(extractor, DataLimits())(clips(tmp_path, 0.5, 2.0, 1.3))
    assert batch.seconds == [0.5, 2.0, 1.3]
    for number, waveform in enumerate(batch.waveforms):
        samples, _ = soundfile.read(tmp_path / f"{number}.wav", dtype="float32")
        assert np.array_equal(waveform, samples)


def test_parts_of_a_file_are_cut_out(tmp_path: Path, extractor: WhisperFeatureExtractor) -> None:
    write_tone(tmp_path / "long.wav", 6.0)
    row = {"audio": "long.wav", "start_seconds": 3.5, "duration_seconds": 1.5}
    batch = SpeechReader(extractor, DataLimits())(utterances(tmp_path, row))
    samples, _ = soundfile.read(tmp_path / "long.wav", dtype="float32")
    assert batch.seconds == [1.5]
    assert np.array_equal(batch.waveforms[0], samples[56_000:80_000])


@pytest.mark.parametrize(
    ("language", "multilingual", "sought"),
    [(None, True, {0}), ("en", True, set()), (None, False, set())],
)
def test_speech_is_sought_where_a_language_is_to_be_detected(
    tmp_path: Path,
    extractor: WhisperFeatureExtractor,
    language: str | None,
    multilingual: bool,
    sought: set[int],
) -> None:
    """Only for the recording that names none; never for a model for English."""
    for name in "ab":
        write_tone(tmp_path / f"{name}.wav", 3.0)
    rows = utterances(tmp_path, {"audio": "a.wav"}, {"audio": "b.wav", "language": "zh"})
    decoding = DecodingOptions(long_form="chunked", language=language)
    read = SpeechReader(extractor, DataLimits(), decoding=decoding, multilingual=multilingual)
    batch = read(rows)
    assert len(batch.recordings) == 2
    assert batch.speech.keys() == sought


def test_what_cannot_be_used_is_rejected_and_the_others_are_not(
    tmp_path: Path, extractor: WhisperFeatureExtractor
) -> None:
    lengths = {"short": 0.05, "a": 0.1, "b": 2.0, "long": 2.01, "c": 1.0}
    for name, seconds in lengths.items():
        write_tone(tmp_path / f"{name}.wav", seconds)
    (tmp_path / "text.wav").write_text("no audio", encoding="utf-8")
    names = ["short", "a", "text", "b", "long", "c", "gone"]
    (tmp_path / "gone.wav").touch()
    rows = utterances(tmp_path, *({"audio": f"{name}.wav", "n": name} for name in names))
    (tmp_path / "gone.wav").unlink()
    batch = SpeechReader(extractor, DataLimits())(rows)
    assert [utterance.row["n"] for utterance in batch.utterances] == ["a", "b", "c"]
    assert batch.seconds == [0.1, 2.0, 1.0]
    assert len(batch.waveforms) == 3
    reasons = {r.row["n"]: r.reason for r in batch.rejections}  # type: ignore[index]
    assert list(reasons) == ["short", "text", "long", "gone"]
    for name, why in zip(
        reasons,
        ["too short: 0.050 s", "is no audio", "too long: 2.010", "no such"],
        strict=True,
    ):
        assert reasons[name].startswith(f"{tmp_path / name}.wav: {why}")
    assert [rejection.number for rejection in batch.rejections] == [0, 2, 4, 6]
    assert [rejection.place for rejection in batch.rejections] == [
        f"{tmp_path}/m.jsonl:{n}" for n in (1, 3, 5, 7)
    ]


@pytest.mark.parametrize(
    ("maximum", "used"), [(None, [0.5, 1.0, 2.0]), (1.0, [0.5, 1.0]), (30.0, [0.5, 1.0, 2.0])]
)
def test_no_limit_of_the_config_is_wider_than_the_models_window(
    tmp_path: Path, extractor: WhisperFeatureExtractor, maximum: float | None, used: list[float]
) -> None:
    limits = DataLimits(max_duration_seconds=maximum)
    batch = SpeechReader(extractor, limits)(clips(tmp_path, 0.5, 1.0, 2.0, 2.5))
    assert batch.seconds == used
    assert len(batch.rejections) == 4 - len(used)


def test_a_batch_without_a_usable_utterance_has_no_audio(
    tmp_path: Path, extractor: WhisperFeatureExtractor
) -> None:
    batch = SpeechReader(extractor, DataLimits())(clips(tmp_path, 2.5, 3.0))
    assert (batch.utterances, batch.waveforms, batch.seconds) == ([], [], [])
    assert len(batch.rejections) == 2


@given(st.lists(st.integers(), max_size=30), st.integers(1, 8))
def test_batches_are_the_items_in_order(items: list[int], size: int) -> None:
    batches = list(in_batches(iter(items), size))
    assert [item for batch in batches for item in batch] == items
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(0 < len(batch) <= size for batch in batches)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_neither_the_order_nor_a_bit(
    tmp_path: Path, extractor: WhisperFeatureExtractor, workers: int
) -> None:
    rows = clips(tmp_path, 1.9, 0.2, 2.5, 1.0, 0.7)
    read = SpeechReader(extractor, DataLimits())
    own = list(speech_batches([[row] for row in rows], read, 0))
    theirs = list(speech_batches([[row] for row in rows], read, workers))
    assert [batch.utterances for batch in own] == [[] if row is rows[2] else [row] for row in rows]
    for mine, other in zip(own, theirs, strict=True):
        assert mine.utterances == other.utterances
        assert mine.rejections == other.rejections
        assert same_audio(mine, other)


def test_signals_of_others_leave_the_workers_alone(
    tmp_path: Path, extractor: WhisperFeatureExtractor
) -> None:
    rows = clips(tmp_path, *[0.5] * 8)
    before = set(multiprocessing.active_children())
    batches = speech_batches([[row] for row in rows], SpeechReader(extractor, DataLimits()), 1)
    loaded = [next(batches)]
    (worker,) = set(multiprocessing.active_children()) - before
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    if sys.platform == "linux":  # as SLURM does, which sends it to all processes of a step
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    loaded += batches
    assert [batch.utterances for batch in loaded] == [[row] for row in rows]


def test_a_worker_can_be_ended_although_the_script_handles_the_signal(
    tmp_path: Path, extractor: WhisperFeatureExtractor
) -> None:
    rows = clips(tmp_path, *[0.5] * 8)
    handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        before = set(multiprocessing.active_children())
        batches = speech_batches([[row] for row in rows], SpeechReader(extractor, DataLimits()), 1)
        next(batches)
        (worker,) = set(multiprocessing.active_children()) - before
        worker.terminate()
        worker.join(timeout=10)
        assert worker.exitcode == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_a_batch_halved_and_joined_is_the_batch(
    tmp_path: Path, extractor: WhisperFeatureExtractor
) -> None:
    batch = SpeechReader(extractor, DataLimits())(clips(tmp_path, 0.5, 2.5, 1.9, 0.2))
    first, second = halved(batch)
    assert [len(half.utterances) for half in (first, second)] == [1, 2]
    again = joined([first, second])
    assert again.utterances == batch.utterances
    assert again.seconds == batch.seconds == [0.5, 1.9, 0.2]
    assert again.rejections == batch.rejections != []
    assert same_audio(again, batch)


def test_the_longest_come_first_and_equals_stay_in_order(tmp_path: Path) -> None:
    for name, seconds in {"a": 0.5, "b": 2.0, "c": 1.0}.items():
        write_tone(tmp_path / f"{name}.wav", seconds)
    (tmp_path / "broken.wav").write_text("no audio")
    rows = utterances(
        tmp_path,
        {"audio": "a.wav"},
        {"audio": "broken.wav"},
        {"audio": "c.wav", "duration_seconds": 0.5},
        {"audio": "b.wav", "start_seconds": 0.7},
        {"audio": "c.wav"},
        {
            "audio": "broken.wav",
            "duration_seconds": 1.1,
        },  # the length that a row gives needs no file
        {"audio": "c.wav"},
    )
    by_length = [row.number for row, _ in ByLength()(rows)]
    assert by_length == [3, 5, 4, 6, 0, 2, 1]
    for workers in (0, 2):
        groups = list(groups_by_length([rows, rows[:2]], workers, ByLength()))
        assert [[row.number for row, _ in group] for group in groups] == [by_length, [0, 1]]


def test_lengths_are_kept_and_no_header_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"a": 0.5, "b": 2.0, "c": 1.0}.items():
        write_tone(tmp_path / f"{name}.wav", seconds)
    rows = utterances(
        tmp_path,
        {"audio": "a.wav"},
        {"audio": "b.wav"},
        {"audio": "c.wav", "duration_seconds": 0.7},
        {"audio": "c.wav"},
    )
    opened: list[Path] = []

    def seconds_of(path: Path, *part: object) -> float:
        opened.append(path)
        return audio_seconds(path, *part)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "audio_seconds", seconds_of)
    kept = tmp_path / "kept"
    kept.mkdir()
    first = ByLength(kept)(rows)
    assert [(row.number, seconds) for row, seconds in first] == [(1, 2), (3, 1), (2, 0.7), (0, 0.5)]
    assert len(opened) == 3
    assert ByLength(kept)(rows) == first
    assert ByLength(kept)(rows[2:3]) == [(rows[2], 0.7)]  # its row tells
    labelled = utterances(tmp_path, {"audio": "b.wav", "audio_seconds": 2.0})
    assert ByLength(kept)(labelled) == [(labelled[0], 2.0)]
    assert len(opened) == 3
    (path,) = kept.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert ByLength(kept)(rows) == first
    assert len(opened) == 6


class DeadlyReader(SpeechReader):
    """Dies at the file deadly.wav, as a library with a bug does at damaged audio."""

    def __call__(self, utterances: Sequence[Utterance]) -> SpeechBatch:
        if any(utterance.audio.name == "deadly.wav" for utterance in utterances):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(utterances)


# The dead worker's half of a connection is torch's to close.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_that_kills_its_worker_is_rejected_and_no_other(
    tmp_path: Path, extractor: WhisperFeatureExtractor, workers: int
) -> None:
    rows = clips(tmp_path, *[0.3 + 0.1 * number for number in range(12)])
    write_tone(tmp_path / "deadly.wav", 1.0)
    (deadly,) = utterances(tmp_path, {"audio": "deadly.wav"})
    batches = [rows[:4], [*rows[4:6], deadly, *rows[6:8]], rows[8:]]
    read = DeadlyReader(extractor, DataLimits())
    loaded = list(speech_batches(iter(batches), read, workers))
    assert [batch.utterances for batch in loaded] == [rows[:4], rows[4:8], rows[8:]]
    for batch in loaded:
        expected = SpeechReader(extractor, DataLimits())(batch.utterances)
        assert batch.seconds == expected.seconds
        assert same_audio(batch, expected)
    (rejection,) = [rejection for batch in loaded for rejection in batch.rejections]
    assert rejection.place == deadly.place
    assert "deadly.wav: a process that decodes it dies" in rejection.reason


@pytest.mark.parametrize(
    ("count", "seconds", "numbers"),
    [
        (2, 100.0, [[0], [2], [1, 3], [6], [5]]),
        (9, 100.0, [[0], [2], [6], [1, 3, 5]]),
        (9, 6.0, [[0], [2], [1, 3], [6], [5]]),
        (9, 1.0, [[0], [2], [1], [3], [6], [5]]),
    ],
)
def test_recordings_of_several_batches_come_together(
    tmp_path: Path,
    extractor: WhisperFeatureExtractor,
    count: int,
    seconds: float,
    numbers: list[list[int]],
) -> None:
    """None of the short clips waits for them."""
    read = SpeechReader(extractor, DataLimits(), decoding=DecodingOptions(long_form="sequential"))
    lengths = [1.0, 3.0, 1.5, 2.5, 0.05, 4.0, 0.5]
    rows = clips(tmp_path, *lengths)
    stops: list[None] = []
    together = list(
        with_recordings_together(
            map(read, in_batches(rows, 2)), count, seconds, lambda: stops.append(None)
        )
    )
    assert [[utterance.number for utterance in batch.utterances] for batch in together] == numbers
    for batch in together:
        assert len(batch.recordings) in (0, len(batch.utterances))
        assert batch.seconds == [
            [1.0, 3.0, 1.5, 2.5, 0, 4.0, 0.5][u.number] for u in batch.utterances
        ]
    assert [r.number for batch in together for r in batch.rejections] == [4]
    assert len(stops) == 4
