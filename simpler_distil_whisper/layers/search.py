"""Which sets of a teacher's layers to try for a student, and which of them is the best.

Owns the order of the trials; what a set is worth it is told. It knows nothing of models. Called by
`create_student_model.py`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from simpler_distil_whisper.model.pruning import spread_layers

FEW_SETS = 500  # all are tried: every 2 of 32 layers are 496, every 4 of 12 are 495

Layers = tuple[int, ...]  # in rising order


class Score(NamedTuple):
    """How far a student that keeps some layers is from its teacher before it has learnt anything.

    Attributes:
        kl: KL(teacher || student) per token, in nats; infinite where it is no number.
        agreement: share of the tokens for which both have the same one on top.
    """

    kl: float
    agreement: float


class ScoredLayers(NamedTuple):
    """A set of layers, how the search came upon it, and its score."""

    layers: Layers
    found_by: str
    score: Score


# Scores some sets; the words say what they are, for the log.
ScoreSets = Callable[[Sequence[Layers], str], dict[Layers, Score]]


def search_layers(available: int, wanted: int, score: ScoreSets) -> list[ScoredLayers]:
    """Return the sets of `wanted` of `available` layers that were tried, the best first.

    Where there are few, all are. Else evenly spaced ones, what greedy addition comes to (from
    none, always the layer that helps most), what greedy removal comes to (from all, always the
    layer that is missed least), and then, as long as one of them is better, those that differ from
    the best in one layer. The best of these need not be the best of all.
    """
    trials = _Trials(available, wanted, score)
    if sets_are_few(available, wanted):
        trials.best_of(itertools.combinations(range(available), wanted), "subset")
    else:
        trials.best_of(spaced_sets(available, wanted), "spaced")
        trials.add_greedily()
        trials.remove_greedily()
        trials.swap_from_the_best()
    return trials.ranked()


def sets_are_few(available: int, wanted: int) -> bool:
    """Return whether all sets are tried."""
    return math.comb(available, wanted) <= FEW_SETS


def describe_search(available: int, wanted: int) -> str:
    """Return in words which sets will be tried, and how many."""
    count = math.comb(available, wanted)
    if sets_are_few(available, wanted):
        return f"all {count:,} sets of {wanted} of {available} layers"
    spaced = len(spaced_sets(available, wanted))
    added = sum(range(available - wanted + 1, available + 1))
    removed = sum(range(wanted + 1, available + 1))
    swapped = wanted * (available - wanted)
    return (
        f"not all {count:,} sets of {wanted} of {available} layers, but {spaced} evenly spaced "
        f"ones, {added} by greedy addition, {removed} by greedy removal, and {swapped} by swaps of "
        "one layer, again after each swap that helps"
    )


def spaced_sets(available: int, wanted: int) -> list[Layers]:
    """Return the spread layers and all sets whose layers are the same distance apart."""
    widest = (available - 1) // max(1, wanted - 1)
    sets = [
        tuple(range(first, first + (wanted - 1) * distance + 1, distance))
        for distance in range(1, widest + 1)
        for first in range(available - (wanted - 1) * distance)
    ]
    return list(dict.fromkeys([tuple(spread_layers(available, wanted)), *sets]))


class _Trials:
    """The scores so far, and the steps of the search that add to them."""

    def __init__(self, available: int, wanted: int, score: ScoreSets) -> None:
        self.available, self.wanted, self.score = available, wanted, score
        self.scores: dict[Layers, Score] = {}
        self.found_by = {tuple(spread_layers(available, wanted)): "spread"}

    def best_of(self, sets: Iterable[Layers], step: str, words: str | None = None) -> Layers:
        """Return the best of some sets, after scoring those that are new."""
        sets = list(sets)
        if new := [layers for layers in sets if layers not in self.scores]:
            self.scores |= self.score(new, words or step)
        for layers in new:
            self.found_by.setdefault(layers, step)
        return min(sets, key=self._rank)

    def add_greedily(self) -> None:
        kept: Layers = ()
        while len(kept) < self.wanted:
            others = [layer for layer in range(self.available) if layer not in kept]
            sets = [tuple(sorted((*kept, layer))) for layer in others]
            size = len(kept) + 1
            kept = self.best_of(sets, "greedy addition", f"greedy addition: {size} layers")

    def remove_greedily(self) -> None:
        kept = tuple(range(self.available))
        while len(kept) > self.wanted:
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
                for kept in itertools.combinations(best, self.wanted - 1)
                for layer in others
            ]
            best = self.best_of([best, *swapped], "swap")

    def ranked(self) -> list[ScoredLayers]:
        """Return the sets of the wanted size, the best first."""
        sets = sorted(
            (layers for layers in self.scores if len(layers) == self.wanted), key=self._rank
        )
        return [ScoredLayers(one, self.found_by[one], self.scores[one]) for one in sets]

    def _rank(self, layers: Layers) -> tuple[float, Layers]:
        # Of equals the one with the earlier layers, so that the same is chosen every time.
        return self.scores[layers].kl, layers
