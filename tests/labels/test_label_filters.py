"""Which labelled rows the error-rate filter drops, and the reasons it gives."""

import pytest

from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.filters import why_dropped_by_error_rate
from simpler_distil_whisper.labels.rows import error_rate, measure_label

COLUMN = "cer/wer"


@pytest.mark.parametrize("row", [{COLUMN: 0}, {COLUMN: 0.1}])
def test_a_rate_up_to_the_maximum_stays(row: Row) -> None:
    assert why_dropped_by_error_rate(row, COLUMN, 0.1) is None


@pytest.mark.parametrize("row", [{}, {COLUMN: None, "reference_tokens": 3}])
def test_a_row_without_a_rate_stays_where_none_is_required(row: Row) -> None:
    assert why_dropped_by_error_rate(row, COLUMN, 0.1, required=False) is None


@pytest.mark.parametrize("required", [True, False])
def test_a_row_that_does_not_match_its_recordings_reference_is_dropped(required: bool) -> None:
    row = {COLUMN: None, "reference_tokens": None, "why_no_reference": "its place is not known"}
    kind, reason = why_dropped_by_error_rate(row, COLUMN, 0.1, required=required) or ("", "")
    assert kind == "no error rate"
    assert reason == "the label does not match the recording's reference: its place is not known"
    assert why_dropped_by_error_rate(row, COLUMN, None) is None


@pytest.mark.parametrize("reference", ["", " ", "[laughter]", "…"])
@pytest.mark.parametrize("required", [True, False])
def test_text_for_what_the_transcript_says_is_no_speech_is_dropped(
    reference: str, required: bool
) -> None:
    scorer = Scorer(Metric())
    label = "Thank you for watching."
    row = measure_label(label, 5, 2.0, reference, scorer, "en")
    row[COLUMN] = error_rate(reference, label, scorer, "en")
    kind, reason = why_dropped_by_error_rate(row, COLUMN, 0.1, required=required) or ("", "")
    assert kind == "text where the reference has none"
    assert reason == "the reference has no speech, but the label has text"
    assert why_dropped_by_error_rate(row, COLUMN, None) is None


@pytest.mark.parametrize("row", [{}, {COLUMN: None}, {COLUMN: 7.5}])
def test_without_a_maximum_every_row_stays(row: Row) -> None:
    assert why_dropped_by_error_rate(row, COLUMN, None) is None


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({}, "no error rate", '"cer/wer" is empty, so max_error_rate cannot hold'),
        ({COLUMN: None}, "no error rate", '"cer/wer" is empty, so max_error_rate cannot hold'),
        ({COLUMN: True}, "no error rate", '"cer/wer" is not a number: True'),
        ({COLUMN: "0.05"}, "no error rate", "\"cer/wer\" is not a number: '0.05'"),
        ({COLUMN: 0.25}, "error rate above maximum", '"cer/wer" is 0.25, above 0.1'),
    ],
)
def test_a_dropped_row_has_a_kind_and_a_reason(row: Row, kind: str, reason: str) -> None:
    assert why_dropped_by_error_rate(row, COLUMN, 0.1) == (kind, reason)
