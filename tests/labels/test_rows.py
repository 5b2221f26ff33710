"""The columns that labelling adds to a row."""

from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.rows import measure_label

SCORER = Scorer(Metric())


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
