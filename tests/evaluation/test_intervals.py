"""Intervals and p-values: against plain resampling, by hand, and how often they hold the truth."""

import tracemalloc
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import coverage
from simpler_distil_whisper.evaluation.intervals import (
    Resampling,
    bootstrap_interval,
    paired_difference,
)
from simpler_distil_whisper.evaluation.metrics import ErrorCounts, total

COUNTS = st.builds(ErrorCounts, *[st.integers(0, 50)] * 4)


def drawn(number: int, seed: int = 7) -> list[ErrorCounts]:
    random = np.random.default_rng(seed)
    return [ErrorCounts(*map(int, random.integers(0, (20, 4, 3, 3)))) for _ in range(number)]


def test_interval_is_that_of_plain_bootstrap_t() -> None:
    counts = drawn(60)
    pairs = np.array([(count.errors, count.reference_tokens) for count in counts], float)

    def ratio_and_error(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        errors, tokens = np.moveaxis(sample, -1, 0)
        ratio = errors.sum(-1) / tokens.sum(-1)
        residuals = errors - ratio[..., None] * tokens
        return ratio, np.sqrt((residuals**2).sum(-1) * 60 / 59) / tokens.sum(-1)

    random = np.random.default_rng(3)
    ratio, error = ratio_and_error(pairs[None])
    ratios, errors = ratio_and_error(pairs[random.integers(0, 60, (40_000, 60))])
    quantiles = np.quantile((ratios - ratio) / errors, [0.95, 0.05])
    expected = ratio[0] - quantiles * error[0]
    interval = bootstrap_interval(counts, Resampling(confidence=0.9, samples=40_000, seed=1))
    assert interval == pytest.approx(expected, abs=0.03 * (expected[1] - expected[0]))


@settings(deadline=None)
@given(st.lists(COUNTS, min_size=2, max_size=9), st.randoms())
def test_interval_does_not_depend_on_the_order_of_utterances(
    counts: list[ErrorCounts], random: Any
) -> None:
    first = bootstrap_interval(counts, Resampling(0.95, 200, seed=3))
    random.shuffle(counts)
    assert bootstrap_interval(counts, Resampling(0.95, 200, seed=3)) == first
    assert bootstrap_interval(Counter(counts), Resampling(0.95, 200, seed=3)) == first
    if first:
        assert 0 <= first[0] <= (total(counts).rate or 0) <= first[1] < float("inf")


def test_interval_follows_seed_confidence_and_size() -> None:
    few = drawn(12)
    low, high = bootstrap_interval(few) or (0, 0)
    assert low < (total(few).rate or 0) < high
    assert bootstrap_interval(few, Resampling(seed=1)) != (low, high)
    narrow_low, narrow_high = bootstrap_interval(few, Resampling(confidence=0.5)) or (0, 0)
    assert low < narrow_low < narrow_high < high
    many_low, many_high = bootstrap_interval(few * 100) or (0, 0)
    assert many_high - many_low < (high - low) / 5


def test_there_is_no_interval_without_something_to_vary_or_to_divide_by() -> None:
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([ErrorCounts(hits=3, deletions=1)] * 4) is None
    assert bootstrap_interval([ErrorCounts(insertions=2)] * 50) is None


@pytest.mark.parametrize(
    ("counts", "rate"), [(ErrorCounts(hits=9), 0.0), (ErrorCounts(deletions=7), 1.0)]
)
def test_no_error_in_300_utterances_does_not_mean_never(counts: ErrorCounts, rate: float) -> None:
    # The largest p with (1 - p)^300 >= 0.025.
    unseen = 1 - 0.025 ** (1 / 300)
    expected = (max(rate - unseen, 0), rate + unseen)
    assert bootstrap_interval([counts] * 300) == pytest.approx(expected)
    assert unseen == pytest.approx(0.0122, abs=1e-4)


def test_one_wrong_utterance_can_be_several() -> None:
    low, high = bootstrap_interval([ErrorCounts(8, 2)] + [ErrorCounts(10)] * 199) or (0, 0)
    # By Poisson's distribution, of one seen the true mean is 0.025 to 5.6.
    assert low < 0.001 < 0.004 < high < 0.03


@pytest.mark.parametrize(("wrong", "most"), [(1, 7), (2, 14), (3, 21), (4, 14)])
def test_few_wrong_utterances_are_few_however_many_are_right(wrong: int, most: int) -> None:
    """By Poisson's distribution, up to 5.6, 7.2, 8.8 and 10.2 may have been expected."""
    for right in (100, 400, 10_000):
        counts = Counter({ErrorCounts(9, 1): wrong, ErrorCounts(10): right - wrong})
        _, high = bootstrap_interval(counts) or (0, 0)
        assert 2 * wrong < high * 10 * right < most
    differences = np.zeros(10_000, np.int64)
    differences[:wrong] = 1
    comparison = paired_difference(
        np.zeros_like(differences), differences, np.full_like(differences, 10)
    )
    if comparison.interval:
        assert comparison.interval[1] < 1.1 * most / 100_000


def test_interval_of_20_000_different_utterances_takes_less_than_100_megabytes() -> None:
    random = np.random.default_rng(0)
    counts = [ErrorCounts(*map(int, random.integers(0, 10**6, 4))) for _ in range(20_000)]
    tracemalloc.start()
    bootstrap_interval(counts, Resampling(samples=300))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def arrays(*columns: list[int]) -> list[np.ndarray]:
    return [np.array(column) for column in columns]


def test_comparison_by_hand() -> None:
    comparison = paired_difference(*arrays([3, 0, 1, 0, 5, 2], [1, 0, 2, 0, 0, 0], [10] * 6))
    assert comparison.difference == -8 / 60
    assert (comparison.better, comparison.worse, comparison.equal) == (3 / 6, 1 / 6, 2 / 6)
    # Of the 16 ways to sign 2, 1, 5, 2, those at least 8 from 0: +8 (the 1 other way), +10 and both
    # turned round.
    tosses = [abs(np.dot(signs, [2, 1, 5, 2])) >= 8 for signs in product((-1, 1), repeat=4)]
    assert sum(tosses) == 4
    many = paired_difference(
        *arrays([3, 0, 1, 0, 5, 2], [1, 0, 2, 0, 0, 0], [10] * 6), None, Resampling(samples=20_000)
    )
    assert many.p_value == pytest.approx(4 / 16, abs=0.01)


def test_equal_systems_differ_by_nothing_and_that_is_no_certainty() -> None:
    same = np.arange(100) % 3
    comparison = paired_difference(same, same, np.full(100, 10))
    assert (comparison.difference, comparison.p_value, comparison.equal) == (0.0, 1.0, 1.0)
    low, high = comparison.interval or (0, 0)
    assert low == -high < 0


def test_a_large_difference_is_seen() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(5, 20, 300)
    baseline, other = random.binomial(tokens, 0.3), random.binomial(tokens, 0.1)
    comparison = paired_difference(baseline, other, tokens)
    assert comparison.p_value == 1 / 1001
    low, high = comparison.interval or (0, 0)
    assert low < -0.2 < high < -0.1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=5, max_size=40))
def test_what_the_test_does_not_reject_is_in_the_interval(rows: list[tuple[int, int, int]]) -> None:
    comparison = paired_difference(*np.array(rows).T, None, Resampling(0.95, 400))
    if comparison.interval and comparison.difference is not None:
        assert comparison.interval[0] <= comparison.difference <= comparison.interval[1]
        if comparison.p_value > 0.06:
            assert comparison.interval[0] <= 0 <= comparison.interval[1]


def test_where_no_difference_can_be_rejected_there_is_no_interval() -> None:
    comparison = paired_difference(*arrays([0] * 5, [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]))
    assert (comparison.difference, comparison.p_value, comparison.interval) == (1.0, 1.0, None)
    # Of five utterances all signs are alike in 2 of 32 tosses, of seven in 2 of 128.
    for number, known in ((5, False), (7, True)):
        counts = np.arange(number)
        comparison = paired_difference(counts, counts + 1 + counts % 2, counts + 9)
        assert (comparison.interval is not None) == known


@pytest.mark.parametrize("seed", range(100))
def test_of_five_utterances_no_seed_rejects_anything(seed: int) -> None:
    errors, more = np.random.default_rng(seed).integers(0, 6, (2, 5))
    tokens = np.array([9, 10, 11, 12, 13])
    baseline, other, lengths = (np.append(each, 0) for each in (errors, errors + more + 1, tokens))
    comparison = paired_difference(baseline, other, lengths, None, Resampling(seed=seed))
    assert comparison.interval is None
    assert comparison.p_value >= 2 / 32


def test_turning_the_systems_round_turns_the_difference_round() -> None:
    random = np.random.default_rng(5)
    errors, other = random.integers(0, 5, (2, 200))
    tokens = random.integers(5, 20, 200)
    there, back = paired_difference(errors, other, tokens), paired_difference(other, errors, tokens)
    assert there.difference == -(back.difference or 0)
    assert (there.better, there.worse) == (back.worse, back.better)
    assert there.p_value == pytest.approx(back.p_value, abs=0.05)


def test_blocks_are_resampled_whole() -> None:
    """Ten times the same utterance of each speaker tells no more than one."""
    once = drawn(20)
    pairs = np.array([(counts.errors, counts.reference_tokens) for counts in once])
    errors, tokens = np.repeat(pairs, 10, axis=0).T
    speakers = np.repeat(np.arange(20) * 7, 10)  # their numbers need not be dense
    nothing = np.zeros(200, int)
    low, high = paired_difference(nothing, errors, tokens, speakers).interval or (0, 0)
    single = paired_difference(nothing[:20], pairs[:, 0], pairs[:, 1]).interval
    assert (low, high) == pytest.approx(single, rel=1e-9)
    alone_low, alone_high = paired_difference(nothing, errors, tokens).interval or (0, 0)
    assert alone_high - alone_low < 0.5 * (high - low)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "units"),
    [
        (coverage.careful, 300),
        (coverage.inventive, 300),
        (coverage.speakers, 20),
    ],
)
def test_95_percent_intervals_hold_the_truth_so_often(draw: coverage.Draw, units: int) -> None:
    ours, usual = coverage.share_that_hold(draw, units, evaluations=1000)
    assert 0.93 <= ours <= 0.97
    assert usual < ours + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("draw", [coverage.swapped, coverage.worse])
def test_intervals_of_differences_hold_the_truth_so_often(draw: coverage.Draw) -> None:
    held, significant = coverage.differences_that_hold(draw, 500, evaluations=1000)
    assert 0.93 <= held <= 0.97
    if draw is coverage.swapped:
        assert 0.035 <= significant <= 0.065
