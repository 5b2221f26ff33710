"""The evidence that a hypothesis carries."""

import json
import zlib
from pathlib import Path

from tiny import write_rows, write_tone

from offline_inference import Config, result_row
from simpler_distil_whisper.data.manifest import read_manifest
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.decoding.hypothesis import (
    Hypothesis,
    Segment,
    SegmentWithWords,
    TimedWord,
    compression_ratio,
)


def test_compression_ratio_by_hand() -> None:
    assert compression_ratio("") == 0.0
    loop = "你好" * 50  # 300 bytes of UTF-8
    assert compression_ratio(loop) == 300 / len(zlib.compress(loop.encode()))
    assert compression_ratio(loop) > 10 > 2.4 > 1 > compression_ratio("q8Zr")


def test_evidence_is_rounded_and_plain() -> None:
    hypothesis = Hypothesis("a", "zh", (65,), (), -0.123456, 0.654321, 1.23456, 0.2, complete=False)
    assert hypothesis.evidence() == {
        "average_log_probability": -0.1235,
        "no_speech_probability": 0.6543,
        "compression_ratio": 1.235,
        "temperature": 0.2,
        "complete": False,
    }


def test_no_time_in_the_results_is_behind_the_end_of_the_audio(tmp_path: Path) -> None:
    """Into the padding behind 1.5 s of audio, a model has put the ends and a whole segment."""
    write_tone(tmp_path / "a.wav", 1.5)
    manifest = write_rows(tmp_path / "m.jsonl", [{"audio": "a.wav"}])
    [utterance] = read_manifest(manifest, Columns()).utterances
    words = (TimedWord(" one", 0.9, 1.2, 0.9), TimedWord(" two", 1.3, 1.7, 0.9))
    segments = (
        Segment(0.0, 0.8, " Yes."),
        SegmentWithWords(0.9, 1.7, " one two", words),
        Segment(1.7, 1.84, " bye"),
        Segment(1.84, None, " you"),
    )
    config = Config.model_validate_json(
        json.dumps(
            {
                "output_dir": "out",
                "model": {"path": "model"},
                "data": {"manifest": str(manifest)},
                "decoding": {"timestamps": True, "word_timestamps": True},
            }
        )
    )
    text = "".join(segment.text for segment in segments)
    hypothesis = Hypothesis(text, "en", (), segments, -0.1, 0.0, 1.0, 0.0, complete=True)
    row = result_row(utterance, hypothesis, 1.5, config)
    assert row["hypothesis"] == "Yes. one two bye you"
    times = [(each["start_seconds"], each["end_seconds"]) for each in row["segments"]]
    assert times == [(0.0, 0.8), (0.9, 1.5), (1.5, 1.5), (1.5, None)]
    spoken = [(word["word"], word["start"], word["end"]) for word in row["segments"][1]["words"]]
    assert spoken == [(" one", 0.9, 1.2), (" two", 1.3, 1.5)]
    assert hypothesis.segments == segments  # labels are learnt with the model's own times
