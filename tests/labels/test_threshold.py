"""The suggested threshold, on distributions of error rates made by hand."""

import math
import random

import numpy as np
import pytest

from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.labels.threshold import (
    Suggestion,
    suggest_for_rows,
    suggest_threshold,
)


def suggest(rates: list[float], tokens: float = 20, hours: list[float] | None = None) -> Suggestion:
    number = len(rates)
    return suggest_threshold(
        np.array(rates, float),
        np.array(hours or [1.0] * number),
        np.full(number, tokens, float),
        np.zeros(number, bool),
    )


@pytest.mark.parametrize(
    ("rates", "tokens", "threshold"),
    [
        ([0.0] * 1000, 20, 0.1),  # nothing to tell apart
        ([0.0] * 1000, 8, 0.13),  # one slip is allowed, which in 8 tokens is 0.125
        ([0.0] * 1000, 2, 0.2),  # but no label that is half wrong
        ([0.0, 0.0], 20, 0.1),
        ([0.0, 0.9], 20, 0.1),
        ([0.04] * 700 + [0.12] * 200 + [0.9] * 100, 20, 0.12),
        ([0.02] * 700 + [0.35] * 300, 20, 0.1),  # two heaps: the good one
        ([0.02] * 300 + [0.12] * 700, 20, 0.24),  # two heaps: nearly all is in the other
        ([0.7] * 30 + [0.14] * 70, 20, 0.28),  # twice as wrong as usual, and no more
        ([0.0] * 200 + [0.3] * 600 + [0.45] * 100 + [0.55] * 100, 20, 0.5),  # a poor teacher
    ],
)
def test_the_threshold_lies_where_hours_end_and_failures_begin(
    rates: list[float], tokens: float, threshold: float
) -> None:
    random.Random(0).shuffle(rates)
    assert suggest(rates, tokens).max_error_rate == threshold


def test_hours_not_rows_decide() -> None:
    rates = [0.03] * 60 + [0.25] * 40
    assert suggest(rates).max_error_rate == 0.1
    assert suggest(rates, hours=[0.1] * 60 + [1.0] * 40).max_error_rate == 0.5


def test_the_reasoning_names_the_numbers() -> None:
    suggestion = suggest([0.04] * 300 + [0.6] * 100, 8)
    assert (suggestion.rows, suggestion.share_of_hours) == (300, 0.75)
    words = " ".join(suggestion.reasoning)
    assert "100 of 400 rows" in words
    assert "median error rate is 0.60" in words
    assert "8 tokens" in words
    assert "look at them one by one" not in words
    assert "look at them one by one" in " ".join(suggest([0.0, 0.1]).reasoning)
    assert "usually has an error rate of 0.14" in " ".join(suggest([0.14] * 200).reasoning)
    assert "keeps only 20%" in " ".join(suggest([0.0] * 40 + [0.9] * 160).reasoning)


@pytest.mark.parametrize("rates", [[], [math.nan] * 3])
def test_no_threshold_is_made_up(rates: list[float]) -> None:
    suggestion = suggest(rates)
    assert suggestion.max_error_rate is None
    assert suggestion.reasoning


def test_labels_and_references_that_do_not_belong_together_are_left_out_and_named() -> None:
    suggestion = suggest([0.6, 2.0, math.nan])
    assert (suggestion.max_error_rate, suggestion.rows) == (0.5, 0)
    assert "do not belong together" in " ".join(suggestion.reasoning)


def test_rows_without_a_reference_are_no_loss_of_the_threshold() -> None:
    assert "keeps only" not in " ".join(suggest([0.0] * 120 + [math.nan] * 1000).reasoning)


def labelled(rates: list[float | None], **fields: float) -> list[Row]:
    return [{"cer/wer": rate, **fields} for rate in rates]


def test_rows_have_the_threshold_of_the_page_of_their_labels() -> None:
    rates = [0.0] * 60 + [0.25] * 40
    rows = [
        *labelled(rates[:60], audio_seconds=360.0, reference_tokens=8),
        *labelled(rates[60:], audio_seconds=3600.0, reference_tokens=8),
        *labelled([None] * 500, audio_seconds=3600.0, reference_tokens=0),
    ]
    hours = [0.1] * 60 + [1.0] * 40
    assert suggest_for_rows(rows[:100], "cer/wer") == suggest(rates, 8, hours)
    assert suggest_for_rows(rows, "cer/wer").max_error_rate == 0.5


def test_rows_without_what_labelling_writes_count_alike() -> None:
    rates: list[float | None] = [0.0] * 60 + [0.25] * 40
    rows = labelled(rates[:60]) + labelled(rates[60:], audio_seconds=3600.0)
    suggestion = suggest_for_rows(rows, "cer/wer")
    assert (suggestion.max_error_rate, suggestion.one_slip) == (0.1, 0.0)
    assert suggest_for_rows(rows, "another").max_error_rate is None
    nothing = labelled(rates, reference_tokens=0)  # of which there is no rate: it is unknown too
    assert suggest_for_rows(nothing, "cer/wer").one_slip == 0.0
