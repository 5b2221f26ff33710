"""The rows that a labelled recording is cut into, on the demo's recording of half a minute."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY
from tiny import SIXTEEN_KHZ

from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.decoding.hypothesis import compression_ratio
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.cut_rows import CutRecording, RecordingCutter
from simpler_distil_whisper.labels.rows import (
    LabelColumns,
    LabellingColumns,
    OutputColumns,
    RowLimits,
)

DEMO = REPOSITORY / "demo_data/audio/long-en.opus"
# As the demo's teacher writes the beginning.
SEGMENTS = [
    (0.16, 1.68, " What is the weather in Berlin tomorrow?"),
    (1.74, 3.4, " Please book a flight to Berlin on Monday."),
    (3.7, 5.6, " My number is seven three six five one."),
    (5.78, 7.36, " What is the weather in London tomorrow?"),
    (7.8, 8.88, " Please play some music."),
    (9.04, 10.68, " Please book a flight to Boston on Monday."),
]
SECONDS = 10.9


def recording(**fields: Any) -> dict[str, Any]:
    windows = [
        {
            "segment_tokens": [10, 10, 10, 10],
            "average_log_probability": -0.1,
            "no_speech_probability": 0.02,
            "temperature": 0.0,
            "complete": True,
        },
        {
            "segment_tokens": [10, 30],
            "average_log_probability": -0.5,
            "no_speech_probability": 0.3,
            "temperature": 0.2,
            "complete": False,
        },
    ]
    return {
        "id": "call",
        "audio": str(DEMO),
        "duration_seconds": SECONDS,
        "language": "en",
        "error_language": "en",
        "speaker": "x",
        "text": "".join(text for _, _, text in SEGMENTS),
        "origin_text": None,
        "cer/wer": None,
        "unconverted_text": "all of it",
        "audio_seconds": SECONDS,
        "recording": "call",
        "windows": windows,
        "segments": [{"start_seconds": s, "end_seconds": e, "text": t} for s, e, t in SEGMENTS],
        "unconverted_segments": [text.upper() for _, _, text in SEGMENTS],
        **fields,
    }


def cut(seconds: float = 8.0, row: dict[str, Any] | None = None, **options: Any) -> CutRecording:
    columns = LabelColumns.from_config(
        LabellingColumns(),
        OutputColumns(),
        with_segments=True,
        with_unconverted=True,
        with_windows=True,
    )
    cutter = RecordingCutter(columns, RowLimits(seconds, 444), 0.1, Scorer(Metric()))
    return cutter(row or recording(), options.get("name", "call"))


def test_rows_by_hand() -> None:
    reference = " ".join(text.strip() for _, _, text in SEGMENTS).replace("music", "some jazz")
    first, second = cut(row=recording(origin_text=reference))["rows"]
    texts = [text for _, _, text in SEGMENTS]
    assert first["text"] == "".join(texts[:4])
    assert second["text"] == "".join(texts[4:])
    assert second["unconverted_text"] == "".join(texts[4:]).upper()
    assert first["origin_text"] + " " + second["origin_text"] == reference
    assert (first["cer/wer"], second["cer/wer"]) == (0.0, round(2 / 13, 6))
    assert second["reference_tokens"] == 13
    assert (first["id"], second["id"]) == ("call-part-0001", "call-part-0002")
    assert (second["recording"], second["part"], second["speaker"]) == ("call", 2, "x")
    assert (first["previous_text"], second["previous_text"]) == ("", "".join(texts[:4]))
    assert not {"windows", "unconverted_segments"} & first.keys()
    # The evidence is that of the windows from which the row's segments come.
    assert first["average_log_probability"] == -0.1
    assert second["average_log_probability"] == -0.5
    assert (first["no_speech_probability"], second["no_speech_probability"]) == (0.02, 0.3)
    assert (first["complete"], second["complete"]) == (True, False)
    assert second["compression_ratio"] == round(compression_ratio(second["text"]), 3)
    assert second["audio_seconds"] == second["duration_seconds"]
    assert second["tokens_per_second"] == round(40 / second["audio_seconds"], 4)


def test_a_row_that_mixes_windows_has_the_worst_of_both() -> None:
    [row] = cut(30.0)["rows"]
    assert row["average_log_probability"] == round((40 * -0.1 + 40 * -0.5) / 80, 4)
    assert (row["no_speech_probability"], row["temperature"]) == (0.3, 0.2)
    # A window's lost end concerns only the row that holds its last segment.
    assert row["complete"] is False


def test_times_of_segments_count_from_the_beginning_of_the_row() -> None:
    rows = cut()["rows"]
    for row in rows:
        times = [row["segments"][0]["start_seconds"], row["segments"][-1]["end_seconds"]]
        assert 0 <= times[0] <= times[1] <= row["duration_seconds"]
    start = rows[1]["start_seconds"]
    assert rows[1]["segments"][1]["start_seconds"] == pytest.approx(9.04 - start, abs=0.02)


def test_times_are_those_of_the_file_even_if_the_recording_is_a_part_of_it(tmp_path: Path) -> None:
    silence = np.zeros(5 * SIXTEEN_KHZ, np.float32)
    waveform = np.concatenate([silence, load_audio(DEMO, 0.0, SECONDS), silence])
    soundfile.write(tmp_path / "whole.flac", waveform, SIXTEEN_KHZ)
    whole = recording(audio=str(tmp_path / "whole.flac"), start_seconds=5.0)
    for inside, alone in zip(cut(row=whole)["rows"], cut()["rows"], strict=True):
        assert inside["start_seconds"] == pytest.approx(alone["start_seconds"] + 5)
        assert inside["segments"] == alone["segments"]
        assert inside["duration_seconds"] == alone["duration_seconds"]


def test_what_is_rejected_says_where_it_is_and_why() -> None:
    result = cut(7.0)
    assert [entry["reason"] for entry in result["rejected"]] == [
        "no pause between segments for longer than a row may be"
    ]
    [entry] = result["rejected"]
    assert entry["place"] == "call"
    assert entry["row"]["text"] == "".join(text for _, _, text in SEGMENTS[:4])
    assert entry["row"]["duration_seconds"] > 7
    assert result["rows"][0]["previous_text"] == ""


def test_the_previous_text_of_a_recording_goes_before_that_of_its_rows() -> None:
    rows = cut(row=recording(previous_text="Earlier."))["rows"]
    assert rows[0]["previous_text"] == "Earlier."
    assert rows[1]["previous_text"].startswith("Earlier. What is the weather")


def test_a_reference_that_does_not_fit_is_stated() -> None:
    row = cut(row=recording(origin_text="Nothing of this is spoken there."))["rows"][0]
    assert row["origin_text"] is None
    assert row["cer/wer"] is None
    assert row["why_no_reference"].startswith("where it begins or ends")
