"""Which sets of a teacher's decoder layers are tried for a student, and in what order.

Owns the search alone: a function that it is given scores the sets. It knows nothing of models.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from simpler_distil_whisper.model.pruning import spread_layers

FEW_SETS = 500  # all are tried: every 2 of 32 layers are 496, every 4 of 12 are 495

Layers = tuple[int, ...]  # in rising order


class LayerScore(NamedTuple):
    """How far a student that keeps some layers is from its teacher before any training.

    Attributes:
        kl: KL(teacher || student) per token, in nats; infinite where it is not finite.
        agreement: share of the positions at which both rank the same token first.
    """

    kl: float
    agreement: float


class ScoredLayers(NamedTuple):
    """A set of layers, the step of the search that tried it first, and its score."""

    layers: Layers
    found_by: str
    score: LayerScore


# Takes the sets and a few words for the progress display.
ScoreSets = Callable[[Sequence[Layers], str], dict[Layers, LayerScore]]


def search_layers(available: int, count: int, score: ScoreSets) -> list[ScoredLayers]:
    """Return the sets of `count` of `available` layers that were tried, the best first.

    If there are at most `FEW_SETS`, all are tried. Otherwise: evenly spaced sets; greedy addition
    (from no layer, always add the one that helps most); greedy removal (from all layers, always
    remove the one that is missed least); then, as long as this improves the score, all sets that
    differ from the best one in a single layer. The best of these need not be the best of all.
    """
    trials = _Trials(available, count, score)
    if sets_are_few(available, count):
        trials.best_of(itertools.combinations(range(available), count), "subset")
    else:
        trials.best_of(spaced_sets(available, count), "spaced")
        trials.add_greedily()
        trials.remove_greedily()
        trials.swap_from_the_best()
    return trials.ranked()


def sets_are_few(available: int, count: int) -> bool:
    """Return whether there are few enough sets to try them all."""
    return math.comb(available, count) <= FEW_SETS


def describe_search(available: int, count: int) -> str:
    """Return a phrase for the log: which sets will be tried, and how many."""
    total = math.comb(available, count)
    if sets_are_few(available, count):
        return f"all {total:,} sets of {count} of {available} layers"
    spaced = len(spaced_sets(available, count))
    added = sum(range(available - count + 1, available + 1))
    removed = sum(range(count + 1, available + 1))
    swapped = count * (available - count)
    return (
        f"not all {total:,} sets of {count} of {available} layers, but {spaced} evenly spaced "
        f"ones, {added} by greedy addition, {removed} by greedy removal, and {swapped} by swaps of "
        "one layer, again after each swap that helps"
    )


def spaced_sets(available: int, count: int) -> list[Layers]:
    """Return the evenly spread set, then all sets with the same distance between neighbours."""
    widest = (available - 1) // max(1, count - 1)
    sets = [
        tuple(range(first, first + (count - 1) * distance + 1, distance))
        for distance in range(1, widest + 1)
        for first in range(available - (count - 1) * distance)
    ]
    return list(dict.fromkeys([tuple(spread_layers(available, count)), *sets]))


class _Trials:
    """The scores so far, and the steps of the search that add to them."""

    def __init__(self, available: int, count: int, score: ScoreSets) -> None:
        self.available, self.count, self.score = available, count, score
        self.scores: dict[Layers, LayerScore] = {}
        self.found_by = {tuple(spread_layers(available, count)): "spread"}

    def best_of(self, sets: Iterable[Layers], step: str, words: str | None = None) -> Layers:
        """Score the new sets, and return the best of all the given ones."""
        sets = list(sets)
        if new := [layers for layers in sets if layers not in self.scores]:
            self.scores |= self.score(new, words or step)
        for layers in new:
            self.found_by.setdefault(layers, step)
        return min(sets, key=self._rank)

    def add_greedily(self) -> None:
        kept: Layers = ()
        while len(kept) < self.count:
            others = [layer for layer in range(self.available) if layer not in kept]
            sets = [tuple(sorted((*kept, layer))) for layer in others]
            size = len(kept) + 1
            kept = self.best_of(sets, "greedy addition", f"greedy addition: {size} layers")

    def remove_greedily(self) -> None:
        kept = tuple(range(self.available))
        while len(kept) > self.count:
            sets = list(itertools.combinations(kept, len(kept) - 1))
            size = len(kept) - 1
            kept = self.best_of(sets, "greedy removal", f"greedy removal: {size} layers")

    def swap_from_the_best(self) -> None:
        best, before = self.ranked()[0].layers, None
        while best != before:
            before = best
            others = [layer for layer in range(self.available) if layer not in best]
            swapped = [
                tuple(sorted((*kept, layer)))
                for kept in itertools.combinations(best, self.count - 1)
                for layer in others
            ]
            best = self.best_of([best, *swapped], "swap")

    def ranked(self) -> list[ScoredLayers]:
        """Return the scored sets of the right size, the best first."""
        sets = [layers for layers in self.scores if len(layers) == self.count]
        return [
            ScoredLayers(layers, self.found_by[layers], self.scores[layers])
            for layers in sorted(sets, key=self._rank)
        ]

    def _rank(self, layers: Layers) -> tuple[float, Layers]:
        # Of equal sets the one with the earlier layers, so that every run chooses the same.
        return self.scores[layers].kl, layers
