"""The columns that labelling adds to a row."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import write_rows

from simpler_distil_whisper.data.manifest import Utterance, read_manifest
from simpler_distil_whisper.decoding.hypothesis import Hypothesis, Segment
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.rows import (
    LabelColumns,
    Labeller,
    LabellingColumns,
    OutputColumns,
    measure_label,
)
from simpler_distil_whisper.text.chinese import Script

SCORER = Scorer(Metric())


@pytest.fixture
def utterance(tmp_path: Path) -> Utterance:
    """A row with a reference, whose audio is not needed."""
    path = write_rows(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "头发在台湾看着"}])
    (tmp_path / "a.wav").touch()
    [utterance] = read_manifest(path, LabellingColumns()).utterances
    return utterance


def test_the_measurements_of_a_label_by_hand() -> None:
    measured = measure_label("No, no, NO! Yes.", 9, 2.0, "No no yes", SCORER, "en")
    assert measured == {
        "error_unit": "word",
        "error_language": "en",
        "reference_tokens": 3,
        "audio_seconds": 2.0,
        "tokens_per_second": 4.5,
        "longest_repetition": 3,
    }
    chinese = measure_label("谢谢谢谢。我", 6, 3.0, None, SCORER, "zh")
    assert (chinese["longest_repetition"], chinese["reference_tokens"]) == (4, None)
    assert chinese["error_unit"] is None


def decoded(*texts: str, language: str = "zh") -> Hypothesis:
    """A hypothesis of some segments."""
    segments = tuple(Segment(float(n), n + 1.0, text) for n, text in enumerate(texts))
    evidence = (-0.1, 0.0, 1.0, 0.0, True)
    return Hypothesis("".join(texts), language, (1,) * 9, segments, *evidence)


@pytest.mark.parametrize(
    ("script", "written"),
    [
        ("simplified", ("头发在台湾", "看着")),
        ("traditional", ("頭髮在臺灣", "看著")),
        ("taiwan", ("頭髮在臺灣", "看著")),
        ("hong_kong", ("頭髮在台灣", "看著")),
        (None, ("頭髮在台湾", "看著")),
    ],
)
def test_labels_are_written_in_the_script_that_is_asked_for(
    utterance: Utterance, script: Script | None, written: tuple[str, str]
) -> None:
    columns = LabelColumns.from_config(
        LabellingColumns(),
        OutputColumns(),
        with_segments=True,
        with_unconverted=script is not None,
        with_sampled_texts=True,
    )
    hypothesis = replace(decoded("頭髮在台湾", "看著"), sampled_texts=("看著頭髮", "你好"))
    row = Labeller(columns, SCORER, "zh", script).row(utterance, hypothesis, 2.0)
    assert row["text"] == "".join(written)
    assert tuple(segment["text"] for segment in row["segments"]) == written
    assert row["sampled_texts"] == [written[1] + written[0][:2], "你好"]
    assert row["cer/wer"] == 0.0  # whichever script it is in
    assert row.get("unconverted_text") == (None if script is None else "頭髮在台湾看著")
    japanese = decoded("驚", language="ja")
    row = Labeller(columns, SCORER, None, script).row(utterance, japanese, 2.0)
    assert row["text"] == "驚"


def test_translations_are_compared_as_the_english_that_they_are(utterance: Utterance) -> None:
    columns = LabelColumns.from_config(
        LabellingColumns(), OutputColumns(), with_segments=False, with_unconverted=False
    )
    spoken = replace(utterance, language="zh", text="It is five o'clock now.")
    hypothesis = decoded("It's 5 o'clock now.")
    row = Labeller(columns, SCORER, "zh", task="translate").row(spoken, hypothesis, 2.0)
    assert (row["error_unit"], row["error_language"]) == ("word", "en")
    assert row["cer/wer"] == 0.0  # by Whisper's normaliser of English
