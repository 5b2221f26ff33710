"""Counts added up: rates of systems and groups, blocks, histogram, confusions, signs."""

from collections import Counter

import numpy as np
import pytest

from simpler_distil_whisper.evaluation.hallucination import KnownPhrases
from simpler_distil_whisper.evaluation.intervals import Resampling, bootstrap_interval
from simpler_distil_whisper.evaluation.metrics import ErrorCounts, Metric, Scorer
from simpler_distil_whisper.evaluation.scoring import score_utterance
from simpler_distil_whisper.evaluation.summary import FrequentConfusions, SignCount
from simpler_distil_whisper.evaluation.tallies import (
    AUDIO_LENGTH,
    REFERENCE_LENGTH,
    Confusions,
    SystemScores,
    Tally,
    length_groups,
)

FAST = Resampling(samples=100)
SCORER = Scorer(Metric())
PHRASES = KnownPhrases([], SCORER)


def make_system(*pairs: tuple[str | None, str]) -> SystemScores:
    scores = SystemScores(len(pairs), Counter())
    for position, (reference, hypothesis) in enumerate(pairs):
        scored = score_utterance(SCORER, PHRASES, reference, hypothesis, None)
        scores.add(position, scored, {"half": str(position % 2)}, None)
    return scores


def test_a_tally_of_blocks_resamples_their_sums() -> None:
    alone, blocks = Tally(), Tally()
    random = np.random.default_rng(0)
    sums: dict[str, ErrorCounts] = {}
    for number in range(60):
        counts = ErrorCounts(*map(int, random.integers(0, 9, 4)))
        speaker = str(number % 6)
        sums[speaker] = sums.get(speaker, ErrorCounts()) + counts
        alone.add(counts, None)
        blocks.add(counts, speaker)
    by_utterance, by_block = alone.rates(FAST), blocks.rates(FAST)
    assert by_utterance.rate == by_block.rate
    assert by_utterance.utterances == by_block.utterances == 60
    assert (by_block.low, by_block.high) == bootstrap_interval(sums.values(), FAST)
    assert (by_utterance.low, by_utterance.high) != (by_block.low, by_block.high)


def test_an_utterance_without_a_block_is_resampled_by_itself() -> None:
    tally = Tally()
    tally.add(ErrorCounts(5, 1), "a")
    for _ in range(4):
        tally.add(ErrorCounts(5, 1), None)
    tally.add(ErrorCounts(5, 2), "a")
    expected = bootstrap_interval([ErrorCounts(10, 3), *[ErrorCounts(5, 1)] * 4], FAST)
    assert (tally.rates(FAST).low, tally.rates(FAST).high) == expected


def test_histogram_counts_every_utterance_with_a_reference_once() -> None:
    scores = make_system(
        ("a b c d", "a b c d"),
        ("a b c d", "a b c x"),  # 0.25
        ("a b", "x y"),  # 1
        ("a", "x y z"),  # 3
        ("", "a"),
        (None, "a"),
    )
    histogram = scores.summary(FAST).histogram
    counts = dict(zip(histogram.edges[1:], histogram.utterances, strict=True))
    assert {edge: count for edge, count in counts.items() if count} == {0.25: 1, 1.0: 1}
    assert (histogram.no_error, histogram.above, histogram.no_rate) == (1, 1, 1)


def test_rows_without_a_reference_count_for_signs_alone() -> None:
    summary = make_system(("one two", "one"), (None, "ha " * 20)).summary(FAST)
    assert summary.corpus.utterances == 1
    invented = summary.hallucination
    assert (invented.utterances, invented.without_reference) == (2, 1)
    assert invented.signs["repetition"] == SignCount(utterances=1, share=0.5)
    assert invented.any == SignCount(utterances=1, share=0.5)
    assert (invented.insertion_rate, invented.length_ratio) == (0.0, 0.5)
    nothing = make_system((None, "one")).summary(FAST)
    assert nothing.corpus.rate is None
    assert nothing.hallucination.length_ratio is None


def test_most_frequent_confusions() -> None:
    confusions = Confusions()
    for reference, hypothesis in [("他說話", "她說話"), ("他來了", "她來"), ("好", "好的")]:
        confusions.add(score_utterance(SCORER, PHRASES, reference, hypothesis, "zh").edits)
    assert confusions.most_frequent() == FrequentConfusions(
        substitutions=[["他", "她", 2]],
        deletions=[["了", 1]],
        insertions=[["的", 1]],
    )


@pytest.mark.parametrize(
    ("seconds", "tokens", "groups"),
    [
        (1.99, 0, {AUDIO_LENGTH: "under 2 s", REFERENCE_LENGTH: "no token"}),
        (2.0, 1, {AUDIO_LENGTH: "2 to 5 s", REFERENCE_LENGTH: "1 to 5 tokens"}),
        (29.9, 5, {AUDIO_LENGTH: "20 to 30 s", REFERENCE_LENGTH: "1 to 5 tokens"}),
        (30.0, 6, {AUDIO_LENGTH: "from 30 s", REFERENCE_LENGTH: "6 to 10 tokens"}),
        (float("nan"), 51, {REFERENCE_LENGTH: "over 50 tokens"}),
    ],
)
def test_lengths(seconds: float, tokens: int, groups: dict[str, str]) -> None:
    assert length_groups(seconds, tokens) == groups


def test_lengths_are_in_order_and_other_groups_by_name() -> None:
    scores = SystemScores(4, Counter())
    for position, length in enumerate((60, 3, 15, 0)):
        scored = score_utterance(SCORER, PHRASES, "a " * length, "a", "en")
        groups = length_groups(3.0, length) | {"speaker": "abcd"[3 - position]}
        scores.add(position, scored, groups, None)
    groups = scores.summary(FAST).groups
    assert list(groups[REFERENCE_LENGTH]) == [
        "no token",
        "1 to 5 tokens",
        "11 to 20 tokens",
        "over 50 tokens",
    ]
    assert list(groups["speaker"]) == ["a", "b", "c", "d"]
