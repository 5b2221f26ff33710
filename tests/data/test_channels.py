"""Which channels of recordings become rows, and that everything that reads a row honours them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pydantic import ValidationError
from tiny import write_rows
from training_data import NI_HAO, make_select

from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.manifest import Manifest, read_manifest
from simpler_distil_whisper.data.options import Columns, ManifestData
from simpler_distil_whisper.decoding.hypothesis import Hypothesis
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.rows import (
    LabelColumns,
    Labeller,
    LabellingColumns,
    OutputColumns,
)
from simpler_distil_whisper.model.teacher_cache import _audio_key


def call(folder: Path, name: str = "call.wav", channels: int = 2) -> np.ndarray:
    """Write a recording with a constant in each channel; return float64 [S, C]."""
    samples = np.tile(np.arange(1, channels + 1) / 8, (16_000, 1))
    soundfile.write(folder / name, samples, 16_000)
    return samples


def read(folder: Path, channel: str, *rows: dict[str, Any]) -> Manifest:
    return read_manifest(write_rows(folder / "m.jsonl", list(rows)), Columns(), channel=channel)


def test_each_channel_becomes_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    call(tmp_path)
    call(tmp_path, "four.wav", 4)
    call(tmp_path, "mono.wav", 1)
    rows = [
        {"id": "a", "audio": "call.wav", "x": 1},
        {"id": "b", "audio": "mono.wav"},
        {"id": "gone", "audio": "gone.wav"},
        {"audio": "four.wav"},
        {"id": "d", "audio": "call.wav", "channel": "right"},
    ]
    (tmp_path / "text.wav").write_text("no audio", encoding="utf-8")
    manifest = read(tmp_path, "each", *rows, {"id": "e", "audio": "text.wav"})
    utterances = list(manifest.utterances)
    place = f"{tmp_path / 'm.jsonl'}:4"
    assert [(one.id, one.channel) for one in utterances] == [
        ("a-left", "left"),
        ("a-right", "right"),
        ("b", "mean"),
        *[(place, name) for name in ("left", "right", "3", "4")],
        ("d", "right"),
    ]
    assert utterances[1].row == {"id": "a-right", "audio": "call.wav", "x": 1, "channel": "right"}
    assert json.loads(utterances[1].json) == utterances[1].row
    assert [float(load_audio(*one.clip)[0]) for one in utterances[:7]] == [
        0.125, 0.25, 0.125, 0.125, 0.25, 0.375, 0.5
    ]  # fmt: skip
    # Each has a number of its own, by which results are kept.
    assert [one.number for one in utterances] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert [rejection.number for rejection in manifest.rejections] == [3, 9]
    assert manifest.row_count == 10
    assert "6 rows are 10, with one for each channel" in caplog.text
    assert manifest.utterances[3:5] == utterances[3:5]


def test_one_side_is_written_into_the_rows(tmp_path: Path) -> None:
    call(tmp_path)
    rows = [{"id": "a", "audio": "call.wav"}, {"id": "b", "audio": "call.wav", "channel": "left"}]
    rows += [{"id": "c", "audio": "call.wav", "channel": 2}]
    first, second, third = read(tmp_path, "right", *rows).utterances
    # Who counts from 0 is told so.
    zero = {"id": "d", "audio": "call.wav", "channel": 0}
    [rejection] = read(tmp_path, "mean", zero, zero | {"channel": "Left"}).rejections
    assert '"channel" is 0, which is no channel (the first is 1)' in rejection.reason
    assert (first.id, first.row["channel"], first.channel) == ("a", "right", "right")
    assert (second.channel, third.channel) == ("left", "2")
    assert load_audio(*third.clip).tolist() == load_audio(*first.clip).tolist()
    # A labelled row is trained on without further steps: it names its channel itself.
    again = read(tmp_path, "mean", first.row)
    assert again.utterances[0].clip == first.clip
    fingerprints = {read(tmp_path, channel, *rows).fingerprint for channel in ("mean", "right")}
    assert len(fingerprints) == 2


def test_numbers_are_channels_as_pandas_writes_them_in_a_column_with_gaps(tmp_path: Path) -> None:
    samples = call(tmp_path)
    rows = [{"audio": "call.wav", "channel": channel} for channel in (2.0, None, 1.5)]
    manifest = read(tmp_path, "left", *rows)
    second, gap = manifest.utterances
    assert (second.channel, gap.channel) == ("2", "left")
    assert load_audio(*second.clip)[0] == samples[0, 1]
    [rejection] = manifest.rejections
    assert '"channel" is 1.5, which is no channel' in rejection.reason


def test_a_column_with_another_meaning_is_not_lost(tmp_path: Path) -> None:
    call(tmp_path)
    row = {"id": "a", "audio": "call.wav", "channel": "news"}
    [utterance] = read(tmp_path, "mean", row).utterances
    assert (utterance.channel, utterance.row["channel"]) == ("mean", "news")
    [rejection] = read(tmp_path, "each", row).rejections
    assert "\"channel\" is 'news', which is no channel" in rejection.reason
    with pytest.raises(ValidationError, match=r"needs a name in columns\.channel"):
        ManifestData(manifest=tmp_path / "m.jsonl", channel="each", columns=Columns(channel=None))


def test_channels_have_cached_states_of_their_own(tmp_path: Path) -> None:
    call(tmp_path)
    utterances = list(read(tmp_path, "each", {"id": "a", "audio": "call.wav"}).utterances)
    utterances += read(tmp_path, "mean", {"id": "a", "audio": "call.wav"}).utterances
    keys = [json.dumps(_audio_key(utterance, "")) for utterance in utterances]
    assert len(set(keys)) == 3


def test_labels_of_both_channels_train(tmp_path: Path) -> None:
    call(tmp_path)
    row = {"id": "a", "audio": "call.wav", "text": "你好", "language": "zh"}
    columns = LabelColumns.from_config(
        LabellingColumns(), OutputColumns(), with_segments=False, with_unconverted=False
    )
    hypotheses = [Hypothesis(text, "zh", (1,), (), -0.1, 0.0, 1.0, 0.0, True) for text in "你好"]
    labels = [
        Labeller(columns, Scorer(Metric()), None).row(utterance, hypothesis, 1.0)
        for utterance, hypothesis in zip(
            read(tmp_path, "each", row).utterances, hypotheses, strict=True
        )
    ]
    examples = make_select(tmp_path)(*labels).examples
    assert [float(load_audio(*one.utterance.clip)[0]) for one in examples] == [0.125, 0.25]
    assert [list(one.tokens[4:-1]) for one in examples] == [NI_HAO[:3], NI_HAO[3:]]
