"""Which labels go into a pack, and what its row and its audio hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    ALL_EVIDENCE,
    SIXTEEN_KHZ,
    make_corpus,
    make_model_folder,
    read_rows,
    write_rows,
    write_tone,
)

from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.packing import (
    PackOptions,
    PackPlan,
    packed_row,
    plan_packs,
    write_audio,
)
from simpler_distil_whisper.labels.rows import (
    LabelColumns,
    LabellingColumns,
    OutputColumns,
    RowLimits,
)
from simpler_distil_whisper.run import DataError

COLUMNS = LabelColumns.from_config(
    LabellingColumns(), OutputColumns(), with_segments=True, with_unconverted=False
)
SCORER = Scorer(Metric())
LIMITS = RowLimits(seconds=30.0, tokens=444)


def label(seconds: float = 10.0, **fields: object) -> dict[str, Any]:
    return {
        "audio": "a.wav",
        "text": "hello there",
        "language": "en",
        "origin_text": "hello there",
        "cer/wer": 0.0,
        "error_unit": "word",
        "error_language": None,
        "audio_seconds": seconds,
        "tokens_per_second": 2.0,
        "speaker": "x",
        **fields,
    }


def plan(
    folder: Path,
    rows: list[dict[str, Any]],
    limits: RowLimits = LIMITS,
    **options: float | list[str] | None,
) -> PackPlan:
    labels = write_rows(folder / "labels.jsonl", rows)
    return plan_packs(labels, COLUMNS, PackOptions(**options), limits)


def ids_in(folder: Path, packs: PackPlan) -> list[list[Any]]:
    labels = folder / "labels.jsonl"
    return [[row["id"] for row in packs.parts(labels, number)] for number in range(len(packs))]


def test_rows_of_one_speaker_fill_a_window_in_order(tmp_path: Path) -> None:
    rows = [
        label(10, id=0),
        label(12, id=1, speaker="y"),
        label(20, id=2),  # exactly 30 s together with the first
        label(1, id=3),
        label(18.0001, id=4, speaker="y"),
        label(2, id=5, language="zh"),
        label(2, id=6, speaker=None),
        label(2, id=7, speaker=None),
        label(3, id=8),
        label(2, id=9, speaker=""),
        label(2, id=10, speaker=" "),
        label(2, id=11, speaker=""),
    ]
    del rows[7]["speaker"]
    planned = plan(tmp_path, rows)
    alone = [[5], [6], [7], [9], [10], [11]]
    assert ids_in(tmp_path, planned) == [[0, 2], [1], [3, 8], [4], *alone]
    assert planned.alone == 5


def test_a_bad_label_enters_no_pack_and_is_counted(tmp_path: Path) -> None:
    rows = [
        label(id=0, **{"cer/wer": 0.1}),
        label(id=1, **{"cer/wer": 0.100001}),
        label(id=2, **{"cer/wer": None}),
        label(id=3, text=" "),
        label(30.1, id=4),
        label(id=5),
        label(id=6, text="\ufeff\u200d"),
        label(id=7, text="he\ufffdo"),
        label(id=8, **{"cer/wer": None, "reference_tokens": 0}),
    ]
    planned = plan(tmp_path, rows)
    assert ids_in(tmp_path, planned) == [[0, 5]]
    assert sum(planned.left_out.values()) + len(planned.offsets) == len(rows)
    assert planned.left_out == {
        "error rate above pack.max_error_rate": 1,
        "no error rate": 1,
        "text where the reference has none": 1,
        "no text": 2,
        "broken character": 1,
        "longer than a pack": 1,
    }
    everything = plan(tmp_path, rows, max_error_rate=None)
    assert ids_in(tmp_path, everything) == [[0, 1, 2], [5, 8]]


def test_a_label_that_the_teacher_doubts_enters_no_pack(tmp_path: Path) -> None:
    rows = [
        label(id=0, compression_ratio=12.96),
        label(id=1, average_log_probability=-1.2),
        label(id=2, no_speech_probability=0.93),
        label(id=3, complete=False),
        label(id=4, compression_ratio=2.4, no_speech_probability=0.6, complete=True),
    ]
    planned = plan(tmp_path, rows)
    assert ids_in(tmp_path, planned) == [[4]]
    assert planned.left_out == {
        "a loop": 1,
        "improbable label": 1,
        "no speech": 1,
        "incomplete label": 1,
    }
    everything = plan(
        tmp_path,
        rows,
        RowLimits(60.0, 444),
        max_error_rate=None,
        max_compression_ratio=None,
        min_average_log_probability=None,
        max_no_speech_probability=None,
    )
    assert ids_in(tmp_path, everything) == [[0, 1, 2, 4]]


def test_a_pack_is_not_too_long_for_the_decoder(tmp_path: Path) -> None:
    rows = [label(2, id=number, tokens_per_second=10.0) for number in range(5)]  # 20 + 2 tokens
    planned = plan(tmp_path, rows, RowLimits(30.0, 44))
    assert ids_in(tmp_path, planned) == [[0, 1], [2, 3], [4]]


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.floats(0.1, 40), st.sampled_from(["x", "y", None]), st.floats(0, 0.2)),
        max_size=30,
    )
)
def test_every_good_label_is_in_one_pack_that_fits(
    rows: list[tuple[float, str | None, float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("packs")
    labels = [
        label(seconds, id=number, speaker=speaker, **{"cer/wer": rate})
        for number, (seconds, speaker, rate) in enumerate(rows)
    ]
    planned = plan(folder, labels)
    packs = [planned.parts(folder / "labels.jsonl", pack) for pack in range(len(planned))]
    for parts in packs:
        assert parts
        assert sum(part["audio_seconds"] for part in parts) <= 30.0001
        assert len({part["speaker"] for part in parts}) == 1
        assert [part["id"] for part in parts] == sorted(part["id"] for part in parts)
        assert len(parts) == 1 or parts[0]["speaker"] is not None
    packed = sorted(part["id"] for parts in packs for part in parts)
    assert packed == [
        row["id"] for row in labels if row["cer/wer"] <= 0.1 and row["audio_seconds"] <= 30
    ]
    assert len(packed) + sum(planned.left_out.values()) == len(labels)


def test_a_segment_behind_the_end_of_its_audio_stays_out_of_the_next_part() -> None:
    beyond = [
        {"start_seconds": 0.0, "end_seconds": 2.2, "text": "好"},
        {"start_seconds": 2.7, "end_seconds": 2.9, "text": "嗎"},
    ]
    pack = packed_row([label(2.5, segments=beyond), label(1.5)], 0, COLUMNS, ["language"], SCORER)
    times = [(each["start_seconds"], each["end_seconds"]) for each in pack["segments"]]
    assert times == [(0.0, 2.2), (2.5, 2.5), (2.5, 4.0)]


def test_the_row_of_a_pack_by_hand() -> None:
    chinese = {"language": "zh", "error_unit": "character"}
    parts = [
        label(2.5, id="a", text="你好。", origin_text="你好", **chinese),
        label(
            3.0,
            id="b",
            text="我要 order一個",
            origin_text="我要 order两个",
            start_seconds=7.0,
            duration_seconds=3.0,
            segments=[
                {"start_seconds": 0.0, "end_seconds": 1.2, "text": "我要"},
                {"start_seconds": 1.2, "end_seconds": None, "text": " order一個"},
            ],
            **chinese,
            **{"cer/wer": 0.222222},
        ),
    ]
    assert packed_row(parts, 12, COLUMNS, ["language", "speaker"], SCORER) == {
        "id": "pack-000012",
        "audio": "packed/audio/000/000012.flac",
        "text": "你好。我要 order一個",
        "language": "zh",
        "speaker": "x",
        "origin_text": "你好我要 order两个",
        "cer/wer": 0.181818,  # 2 of 11, not the mean of 0 and 2 of 9
        "error_unit": "character",
        "error_language": None,
        "reference_tokens": 11,
        "audio_seconds": 5.5,
        "segments": [
            {"start_seconds": 0.0, "end_seconds": 2.5, "text": "你好。"},
            {"start_seconds": 2.5, "end_seconds": 3.7, "text": "我要"},
            {"start_seconds": 3.7, "end_seconds": 5.5, "text": " order一個"},
        ],
        "parts": [
            {"id": "a", "audio": "a.wav", "cer/wer": 0.0, "audio_seconds": 2.5}
            | {"offset_seconds": 0.0},
            {"id": "b", "audio": "a.wav", "start_seconds": 7.0, "duration_seconds": 3.0}
            | {"cer/wer": 0.222222, "audio_seconds": 3.0, "offset_seconds": 2.5},
        ],
    }


def test_packs_of_one_recording_have_audio_of_their_own(tmp_path: Path) -> None:
    rows = [label(channel=side, id=n, turn="q") for n, side in enumerate(["left", "left", "right"])]
    rows += [label(channel=None, id=3, turn="q")]
    group_by = ["audio", "channel", "turn"]
    packs = plan(tmp_path, rows, group_by=group_by)
    assert ids_in(tmp_path, packs) == [[0, 1], [2], [3]]
    assert packs.alone == 1
    row = packed_row(packs.parts(tmp_path / "labels.jsonl", 0), 0, COLUMNS, group_by, SCORER)
    assert (row["audio"], row["turn"]) == ("packed/audio/000/000000.flac", "q")
    assert "channel" not in row
    assert [part["channel"] for part in row["parts"]] == ["left", "left"]


def test_sampled_texts_of_the_parts_are_joined() -> None:
    columns = replace(COLUMNS, sampled_texts="sampled_texts")
    parts = [label(id=n, sampled_texts=texts) for n, texts in enumerate((["a", "b"], ["c"]))]
    assert packed_row(parts, 0, columns, [], SCORER)["sampled_texts"] == ["a c"]
    assert "sampled_texts" not in packed_row(parts, 0, COLUMNS, [], SCORER)
    from_a_recording = [*parts, label(id=2)]  # whose rows have none
    assert packed_row(from_a_recording, 0, columns, [], SCORER)["sampled_texts"] == []


def test_a_pack_with_a_part_without_reference_has_no_rate() -> None:
    parts = [label(id="a"), label(id="b", origin_text=None, **{"cer/wer": None})]
    row = packed_row(parts, 0, COLUMNS, [], SCORER)
    assert row["text"] == "hello there hello there"
    assert (row["origin_text"], row["cer/wer"], row["reference_tokens"]) == (None, None, None)


class NeverStopped:
    def stop_if_asked(self) -> None:
        """Nobody asks."""


def test_the_audio_of_a_pack_is_its_parts_one_after_the_other(tmp_path: Path) -> None:
    first = write_tone(tmp_path / "first.wav", 2.0, seed=1)
    second = write_tone(tmp_path / "second.wav", 1.5, rate=44_100, seed=2)
    rows = [
        label(1.0, id=0, audio=str(first), start_seconds=0.5, duration_seconds=1.0),
        label(1.5, id=1, audio=str(second)),
    ]
    planned = plan(tmp_path, rows)
    write_audio(tmp_path / "labels.jsonl", planned, COLUMNS, 2, NeverStopped())  # type: ignore[arg-type]
    path = tmp_path / "packed/audio/000/000000.flac"
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.frames) == (SIXTEEN_KHZ, 1, 40_000)
    expected = np.concatenate([load_audio(first)[8_000:24_000], load_audio(second)])
    np.testing.assert_allclose(load_audio(path), expected, atol=2**-15)
    # What is there is not made again; what is missing is.
    path.write_bytes(b"made before")
    write_audio(tmp_path / "labels.jsonl", planned, COLUMNS, 1, NeverStopped())  # type: ignore[arg-type]
    assert path.read_bytes() == b"made before"
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_audio_that_has_gone_is_named(tmp_path: Path) -> None:
    planned = plan(tmp_path, [label(audio=str(tmp_path / "gone.wav"))])
    with pytest.raises(DataError, match=r"gone\.wav: no such file"):
        write_audio(tmp_path / "labels.jsonl", planned, COLUMNS, 1, NeverStopped())  # type: ignore[arg-type]


@pytest.mark.slow
def test_packs_are_labelled_rows_to_train_on(tmp_path: Path, run_script: Any) -> None:
    """From recordings to packs and from packs to a student, by the scripts."""
    demo = REPOSITORY / "demo_data"  # whose teacher ends its texts: a label cut off is not packed
    rows = read_rows(demo / "train.jsonl")[:9]
    for number, row in enumerate(rows):
        row |= {"audio": str(demo / row["audio"]), "speaker": "abc"[number % 2]}
    write_rows(tmp_path / "train.jsonl", rows)
    labelling = {
        "output_dir": "labels",
        "teacher": {"path": str(demo / "teacher")},
        "data": {"manifest": "train.jsonl"},
        "decoding": {"batch_size": 4, "timestamps": True},
        "sampled_texts": {"count": 2},
        "pack": {"enabled": True, "max_error_rate": None, **ALL_EVIDENCE},
    }
    done = run_script("run_pseudo_labelling", labelling)
    assert done.returncode == 0, done.stderr
    labels = read_rows(tmp_path / "labels/pseudo_labels.jsonl")
    packs = read_rows(tmp_path / "labels/packed_labels.jsonl")
    assert f"{len(packs)} packs of 9 labels" in done.stderr
    assert 2 < len(packs) < 9
    assert sorted(part["id"] for pack in packs for part in pack["parts"]) == sorted(
        row["id"] for row in rows
    )
    for pack in packs:
        audio = load_audio(tmp_path / "labels" / pack["audio"])
        assert len(audio) / SIXTEEN_KHZ == pytest.approx(pack["audio_seconds"])
        assert pack["audio_seconds"] <= 5.0
        assert pack["segments"][-1]["end_seconds"] <= pack["audio_seconds"] + 0.001
    assert {"label_quality.json", "label_quality.html"} <= {
        path.name for path in (tmp_path / "labels").iterdir()
    }
    assert all(row["segments"] is not None for row in labels)
    assert {len(row["sampled_texts"]) for row in labels} == {2}
    assert {len(pack["sampled_texts"]) for pack in packs} == {2}
    assert any(set(row["sampled_texts"]) != {row["text"]} for row in labels)
    # A run that was killed while it packed goes on without labelling anything again.
    before = (tmp_path / "labels/packed_labels.jsonl").read_bytes()
    info = json.loads((tmp_path / "labels/run_info.json").read_text())
    (tmp_path / "labels/run_info.json").write_text(json.dumps(info | {"outcome": "running"}))
    (tmp_path / "labels/packed_labels.jsonl").unlink()
    (tmp_path / "labels/packed/audio/000/000001.flac").unlink()
    again = run_script("run_pseudo_labelling", labelling)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "labels/packed_labels.jsonl").read_bytes() == before
    assert (tmp_path / "labels/packed/audio/000/000001.flac").exists()
    distillation = {
        "output_dir": "student",
        "teacher": {"path": str(demo / "teacher")},
        "student": {"path": str(demo / "teacher")},
        "data": {
            "train_manifests": ["labels/packed_labels.jsonl"],
            "sampled_text_probability": 0.5,
            **ALL_EVIDENCE,
        },
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 1, "epochs": None, "max_steps": 2},
        "batch": {"micro_batch_size": 2},
    }
    done = run_script("run_distillation", distillation)
    assert done.returncode == 0, done.stderr
    assert f"kept training rows, with sampled texts: {len(packs)}" in done.stderr
    assert (tmp_path / "student/final/model.safetensors").exists()


def test_a_pack_longer_than_the_window_is_refused(tmp_path: Path, run_script: Any) -> None:
    make_model_folder(tmp_path / "teacher", languages=["en", "zh"], window_seconds=30)
    make_corpus(tmp_path, 1)
    config = {
        "output_dir": "labels",
        "teacher": {"path": "teacher"},
        "data": {"manifest": "zh-0.jsonl"},
        "pack": {"enabled": True, "max_seconds": 31.0},
    }
    done = run_script("run_pseudo_labelling", config)
    assert done.returncode == 2
    assert "pack.max_seconds: 31 s is longer than the window" in done.stderr
    assert not (tmp_path / "labels").exists()
