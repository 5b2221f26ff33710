"""The search for layers: which sets are tried and which is ranked, when scores are known."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpler_distil_whisper.layers.search import (
    Layers,
    LayerScore,
    ScoredLayers,
    describe_search,
    search_layers,
    sets_are_few,
    spaced_sets,
)
from simpler_distil_whisper.model.pruning import spread_layers


def search(
    available: int, count: int, kl: Callable[[Layers], float]
) -> tuple[list[ScoredLayers], list[Layers]]:
    """Return the ranking by a score, and every set that was scored, in order."""
    scored: list[Layers] = []

    def score(sets: Sequence[Layers], words: str) -> dict[Layers, LayerScore]:
        assert words
        scored.extend(sets)
        return {layers: LayerScore(kl(layers), 0.5) for layers in sets}

    return search_layers(available, count, score), scored


def test_where_there_are_few_sets_all_are_tried_once() -> None:
    ranked, scored = search(4, 2, lambda layers: abs(layers[0] - 1) + abs(layers[1] - 2))
    assert sorted(scored) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert [each.layers for each in ranked][0] == (1, 2)
    assert [each.score.kl for each in ranked] == [0, 1, 1, 2, 2, 2]
    assert {each.layers for each in ranked if each.found_by == "spread"} == {(0, 3)}


@pytest.mark.parametrize(
    ("available", "count", "few"),
    [(4, 2, True), (32, 2, True), (12, 4, True), (12, 5, False), (32, 3, False), (24, 16, False)],
)
def test_few_are_up_to_500(available: int, count: int, few: bool) -> None:
    assert sets_are_few(available, count) == few


def test_spaced_sets_by_hand() -> None:
    # Distances 1 and 2, after the spread one, whose distances are 2, 2 and 1.
    assert spaced_sets(6, 4) == [(0, 1, 3, 5), (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5)]
    assert spaced_sets(3, 1) == [(2,), (0,), (1,)]
    assert spaced_sets(5, 3) == [(0, 2, 4), (0, 1, 2), (1, 2, 3), (2, 3, 4)]


@given(st.sets(st.integers(0, 13), min_size=6, max_size=6))
def test_many_layers_each_good_by_itself_are_found(planted: set[int]) -> None:
    ranked, scored = search(14, 6, lambda layers: len(planted - set(layers)))
    assert set(ranked[0].layers) == planted
    assert ranked[0].score.kl == 0
    assert len(scored) == len(set(scored)) < math.comb(14, 6)
    kls = [each.score.kl for each in ranked]
    assert kls == sorted(kls)
    assert {len(each.layers) for each in ranked} == {6}
    assert [each.found_by for each in ranked if list(each.layers) == spread_layers(14, 6)] == [
        "spread"
    ]


def test_layers_that_are_only_good_together_are_found_by_removal() -> None:
    """Addition never takes the first of them, since alone it is worse than any other layer."""
    together = {4, 6, 9, 10, 11, 12}

    def kl(layers: Layers) -> float:
        return 1 if together <= set(layers) else 2 + len(together & set(layers))

    ranked, _ = search(14, 6, kl)
    assert ranked[0] == ScoredLayers((4, 6, 9, 10, 11, 12), "greedy removal", LayerScore(1, 0.5))


def test_a_neighbour_of_the_best_is_found_by_a_swap() -> None:
    best, neighbour = (0, 2, 5, 7, 10, 13), (0, 2, 5, 7, 10, 12)
    assert list(best) == spread_layers(14, 6)
    ranked, _ = search(14, 6, lambda layers: {best: 0.5, neighbour: 0.0}.get(layers, 1.0))
    assert [(each.layers, each.found_by) for each in ranked[:2]] == [
        (neighbour, "swap"),
        (best, "spread"),
    ]


@pytest.mark.parametrize(("available", "count"), [(5, 2), (14, 6)])
def test_of_equals_the_earliest_layers_are_kept(available: int, count: int) -> None:
    ranked, _ = search(available, count, lambda layers: 1.0)
    assert ranked[0].layers == tuple(range(count))
    assert [each.layers for each in ranked] == sorted(each.layers for each in ranked)


def test_a_set_whose_score_is_no_number_comes_last() -> None:
    ranked, _ = search(4, 2, lambda layers: math.inf if layers == (0, 1) else 1.0)
    assert ranked[-1].layers == (0, 1)


def test_the_plan_states_the_numbers() -> None:
    assert describe_search(32, 2) == "all 496 sets of 2 of 32 layers"
    words = describe_search(12, 5)
    # Spaced: 8 at distance 1, 4 at distance 2, the spread one. Addition: 12 + 11 + 10 + 9 + 8.
    # Removal: 12 + 11 + 10 + 9 + 8 + 7 + 6. Swaps: 5 kept times 7 others.
    for count in ("not all 792", "13 evenly", "50 by greedy", "63 by greedy", "35 by swaps"):
        assert count in words
    _, scored = search(12, 5, lambda layers: sum(layers) % 7)
    assert len(scored) <= 13 + 50 + 63 + 35 * 3
    assert {layers for layers in scored if len(layers) == 11} == set(
        itertools.combinations(range(12), 11)
    )
