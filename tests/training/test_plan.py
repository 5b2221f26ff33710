"""Which examples come when: every one as often as it should, in an order that can be computed."""

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpler_distil_whisper.training.options import BatchOptions, Schedule
from simpler_distil_whisper.training.plan import (
    MicroBatches,
    RunLength,
    TrainingPlan,
    Visit,
    run_length,
)


def make_plan(
    lengths: Sequence[int],
    size: int,
    bucketing: bool,
    seed: int,
    weights: list[float] | None = None,
) -> TrainingPlan:
    each = weights or [1.0] * len(lengths)
    return TrainingPlan(each, partial(length_in, lengths), size, bucketing, seed)


def length_in(lengths: Sequence[int], visit: Visit) -> int:
    return lengths[visit.example]


def examples_in(plan: TrainingPlan, step: int) -> list[int]:
    return [visit.example for visit in plan.step(step)]


PLAN = st.builds(
    make_plan,
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 3),
)


# The seed decides the order for good: a checkpoint's step is a place in it.


def test_the_order_is_what_it_has_always_been() -> None:
    plan = make_plan([5, 1, 9, 3, 7, 2, 8, 4, 6, 10], 2, True, 3)
    assert [examples_in(plan, step) for step in range(10)] == [
        *([6, 9], [0, 2], [1, 4], [5, 7], [3, 8]),
        *([3, 8], [7, 9], [4, 6], [1, 2], [5, 0]),
    ]
    plan = make_plan(range(40), 2, True, 3)
    assert [examples_in(plan, step) for step in range(10)] == [
        *([11, 12], [32, 33], [2, 3], [17, 20], [23, 30]),
        *([29, 35], [0, 4], [25, 28], [38, 39], [21, 22]),
    ]


@given(PLAN, st.integers(1, 4))
@settings(deadline=None)
def test_every_example_comes_once_per_epoch(plan: TrainingPlan, epochs: int) -> None:
    count = len(plan.length.args[0])
    # After so many steps both the epochs and the pools are whole.
    steps = epochs * count * plan.pool_steps
    visits = [visit for step in range(steps) for visit in plan.step(step)]
    assert sorted(visit.position for visit in visits) == list(range(len(visits)))
    uses = steps * plan.step_size // count
    # Each use is counted: the first is 0.
    expected = [(example, use) for example in range(count) for use in range(uses)]
    assert sorted((visit.example, visit.use) for visit in visits) == expected
    assert all(visit.use == visit.position // count for visit in visits)


@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 3))
@settings(deadline=None)
def test_no_example_comes_again_before_all_have_come(count: int, size: int, seed: int) -> None:
    plan = make_plan([1] * count, size, False, seed)
    seen: Counter[int] = Counter()
    for step in range(3 * count // size + 1):
        seen.update(examples_in(plan, step))
        counts = [seen[example] for example in range(count)]
        assert max(counts) - min(counts) <= 1


@given(PLAN, st.integers(0, 14))
@settings(deadline=None, max_examples=50)
def test_a_resumed_run_sees_the_tail_of_the_whole_run(plan: TrainingPlan, start: int) -> None:
    whole = [plan.step(step) for step in range(15)]
    again = make_plan(plan.length.args[0], plan.step_size, plan.pool_steps > 1, plan.seed)
    assert [again.step(step) for step in range(start, 15)] == whole[start:]
    # Nor does it matter what was asked before.
    assert [plan.step(step) for step in reversed(range(15))] == whole[::-1]
    assert all(len(step) == plan.step_size for step in whole)


@pytest.mark.parametrize("bucketing", [False, True])
@pytest.mark.parametrize(
    ("size", "processes", "accumulation"),
    [(12, 1, 1), (6, 2, 1), (6, 1, 2), (3, 2, 2), (1, 12, 1), (1, 4, 3), (2, 3, 2)],
)
def test_a_step_holds_the_same_examples_however_it_is_shared(
    bucketing: bool, size: int, processes: int, accumulation: int
) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 100).tolist()
    plan = make_plan(lengths, 12, bucketing, 5)
    steps = range(3, 20)
    lazy = [MicroBatches(plan, steps, size, rank, processes) for rank in range(processes)]
    shares = [list(share) for share in lazy]
    assert {len(share) for share in lazy} == {accumulation * len(steps)}
    for share in shares:
        assert [len(batch) for batch in share] == [size] * accumulation * len(steps)
    for place, number in enumerate(steps):
        own = slice(place * accumulation, (place + 1) * accumulation)
        used = [visit for share in shares for batch in share[own] for visit in batch]
        assert sorted(used) == sorted(plan.step(number))


def padding_share(plan: TrainingPlan, steps: int) -> float:
    lengths = [np.array([plan.length(visit) for visit in plan.step(s)]) for s in range(steps)]
    padded = sum(len(each) * each.max() for each in lengths)
    return 1 - sum(each.sum() for each in lengths) / padded


def test_bucketing_puts_similar_lengths_together() -> None:
    lengths = np.random.default_rng(0).lognormal(2.5, 0.6, 3000).astype(int) + 1
    shares = [padding_share(make_plan(lengths, 16, b, 0), 180) for b in (False, True)]
    assert shares[0] > 0.4
    assert shares[1] < 0.15


def test_bucketed_steps_do_not_come_sorted_and_their_neighbours_change() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 640)
    plan = make_plan(lengths, 16, True, 0)
    means = [lengths[examples_in(plan, step)].mean() for step in range(40)]
    rising = sum(a < b for a, b in zip(means, means[1:], strict=False))
    assert 10 < rising < 30

    def pairs(steps: range) -> set[tuple[int, int]]:
        return {
            pair
            for step in steps
            for pair in itertools.combinations(sorted(examples_in(plan, step)), 2)
        }

    met, met_again = pairs(range(40)), pairs(range(40, 80))
    assert len(met & met_again) < 0.3 * len(met)


@pytest.mark.parametrize("bucketing", [False, True])
def test_seeds_and_epochs_differ(bucketing: bool) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 64)
    first, same, other = (make_plan(lengths, 8, bucketing, seed) for seed in (0, 0, 1))
    orders = [[examples_in(plan, step) for step in range(8)] for plan in (first, same, other)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != [examples_in(first, step) for step in range(8, 16)]


# Weights.


def uses_in_epochs(plan: TrainingPlan, bounds: list[int]) -> list[Counter[int]]:
    """How often each example is used between neighbouring positions of the stream."""
    visits = [
        visit for step in range(-(-bounds[-1] // plan.step_size)) for visit in plan.step(step)
    ]
    return [
        Counter(visit.example for visit in visits if first <= visit.position < last)
        for first, last in itertools.pairwise(bounds)
    ]


def test_an_epoch_uses_the_rows_of_a_manifest_in_proportion_to_its_weight() -> None:
    weights = [1.0] * 5 + [2.0] * 3 + [0.5] * 4
    plan = make_plan([1] * 12, 1, False, 0, weights)
    epochs = uses_in_epochs(plan, [0, 13, 26, 39, 52])
    for epoch in epochs:
        assert all(epoch[example] == 1 for example in range(5))
        assert all(epoch[example] == 2 for example in range(5, 8))
        assert sum(epoch[example] for example in range(8, 12)) == 2
    for first, second in (epochs[:2], epochs[2:]):
        assert all(first[example] + second[example] == 1 for example in range(8, 12))


def test_rows_of_half_weight_do_not_always_come_together() -> None:
    plan = make_plan([1] * 40, 1, False, 0, [0.5] * 40)
    halves = {frozenset(epoch) for epoch in uses_in_epochs(plan, list(range(0, 401, 20)))}
    assert len(halves) == 20


@given(
    st.lists(st.sampled_from([0.05, 0.3, 0.5, 1.0, 1.7, 3.0]), min_size=1, max_size=30),
    st.integers(1, 5),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=40)
def test_in_the_long_run_every_row_is_used_in_proportion_to_its_weight(
    weights: list[float], size: int, seed: int
) -> None:
    plan = make_plan([1] * len(weights), size, False, seed, weights)
    steps = round(20 * sum(weights)) // size + 1
    visits = [visit for step in range(steps) for visit in plan.step(step)]
    assert [visit.position for visit in visits] == list(range(len(visits)))
    uses: dict[int, list[int]] = {example: [] for example in range(len(weights))}
    for visit in visits:
        uses[visit.example].append(visit.use)
    epochs = len(visits) / sum(weights)
    for example, weight in enumerate(weights):
        count = len(uses[example])
        # An epoch's order shuffles: two uses may be at either end of two epochs.
        assert abs(count - weight * epochs) <= 2 + weight
        assert len(set(uses[example])) == count
        assert max(uses[example], default=0) <= count + weight


def test_the_weights_decide_the_length_of_epochs() -> None:
    bucketed = make_plan(range(64), 4, True, 0, [2.0] * 64)
    assert bucketed.pool_steps == 8
    assert make_plan(range(64), 4, True, 0).pool_steps == 4


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        (100, RunLength(16, 75, 4, 19)),  # 12 epochs, at most
        (777, RunLength(16, 583, 29, 146)),  # 12 epochs
        (1600, RunLength(16, 1000, 50, 250)),  # 10
        (16_000, RunLength(16, 3000, 150, 750)),  # 3, at least
        (160_000, RunLength(16, 30_000, 500, 2000)),
    ],
)
def test_the_length_of_a_run_follows_from_its_rows(rows: int, length: RunLength) -> None:
    assert run_length(Schedule(), BatchOptions(), "auto", rows) == length


def test_a_length_that_is_given_stays() -> None:
    schedule = Schedule(warmup_steps=3, max_steps=70)
    assert run_length(schedule, BatchOptions(), None, 160) == RunLength(16, 70, 3, 10)
    schedule = Schedule(warmup_steps=0, epochs=2.5)
    assert run_length(schedule, BatchOptions(), 7, 160) == RunLength(16, 25, 0, 7)
