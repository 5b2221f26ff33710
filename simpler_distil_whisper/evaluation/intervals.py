"""How far error rates and their differences can be trusted: intervals and p-values by resampling.

Owns the statistics. What is resampled are utterances, or whole blocks of them (a speaker's, a
recording's) whose errors go together; it knows nothing of texts and files. Called by `report.py`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from simpler_distil_whisper.evaluation.metrics import ErrorCounts

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

FEWEST = 5  # utterances or blocks; fewer tell too little about how they vary
RESAMPLED_CELLS = 2_000_000  # numbers of 8 bytes held at a time


class Resampling(NamedTuple):
    """How intervals and p-values are drawn.

    Attributes:
        confidence: how often an interval is to hold the true value.
        samples: how many corpora are drawn.
        seed: the same seed and counts give the same results, in whatever order the counts come.
    """

    confidence: float = 0.95
    samples: int = 1000
    seed: int = 0


STANDARD = Resampling()


class Comparison(NamedTuple):
    """A system beside the baseline, over the same utterances.

    Attributes:
        difference: the system's corpus error rate minus the baseline's; None without any token.
        interval: of the difference: the bootstrap's, widened to hold every difference that the
            test does not reject; None where there are too few utterances or blocks.
        p_value: how often a difference at least as large comes up if each utterance's (or block's)
            two results belong to the one or the other system by the toss of a coin.
        better, worse, equal: the share of utterances with fewer, more, as many errors.
    """

    difference: float | None
    interval: Interval | None
    p_value: float
    better: float
    worse: float
    equal: float


def bootstrap_interval(
    counts: Iterable[ErrorCounts], resampling: Resampling = STANDARD
) -> Interval | None:
    """Return the interval of the corpus error rate.

    Args:
        counts: of each utterance or, where they go together in blocks, the sum of each block; or a
            Counter of them.
        resampling: how it is drawn.

    Returns:
        The lower end, at least 0, and the upper end; None for fewer than `FEWEST` utterances or
        blocks, and where no reference has a token.
    """
    pairs: Counter[tuple[int, int]] = Counter()
    for one, times in Counter(counts).items():
        pairs[one.errors, one.reference_tokens] += times
    interval = ratio_interval(pairs, resampling)
    return interval and (max(interval[0], 0.0), interval[1])


def ratio_interval(
    pairs: Counter[tuple[int, int]], resampling: Resampling = STANDARD
) -> Interval | None:
    """Return the bootstrap-t interval of a ratio of sums.

    Plain percentiles of resampled ratios are too narrow for few units and for lopsided counts, as
    errors are. Here each sample's distance from the ratio is measured in that sample's own standard
    error (Efron and Tibshirani 1993, section 12.5), which is the linearised one of a ratio.

    Drawing n units with replacement is drawing how often each distinct pair comes up, which is a
    multinomial: a million utterances have few distinct pairs.

    Args:
        pairs: how often each (numerator, denominator) stands among the units.
        resampling: how it is drawn.

    Returns:
        The lower and the upper end, or None as for `bootstrap_interval`.
    """
    units = pairs.total()
    distinct = np.array(sorted(pairs), dtype=np.float64)
    if units < FEWEST or not distinct[:, 1].any():
        return None
    over, under = distinct.T
    values = np.stack([over, under, over * over, over * under, under * under], axis=1)
    times = np.array([pairs[pair] for pair in sorted(pairs)])
    ratio, error = _ratio_and_error(times @ values, units)
    tail = (1 - resampling.confidence) / 2
    if not error:
        # All units agree, so that resampling sees no variation. The share of units that differ, and
        # yet none was drawn, is below this (the rule of three, of which it is the exact form).
        unseen = 1 - tail ** (1 / units)
        return float(ratio - unseen), float(ratio + unseen)
    random = np.random.default_rng(resampling.seed)

    def draw(samples: int) -> Floats:
        drawn: Floats = random.multinomial(units, times / units, size=samples) @ values
        return drawn

    sums = np.concatenate(list(_in_parts(draw, resampling.samples, len(distinct))))
    ratios, errors = _ratio_and_error(sums[sums[:, 1] > 0], units)
    # A sample that happens to hold no variation would be infinitely far away. The floor, an error
    # in one of `units` samples' variance, keeps it far.
    distances = (ratios - ratio) / np.maximum(errors, error / units**0.5)
    low, high = np.quantile(distances, [1 - tail, tail])
    return float(ratio - low * error), float(ratio - high * error)


def compare(
    baseline: Integers,
    system: Integers,
    reference_tokens: Integers,
    blocks: Integers | None = None,
    resampling: Resampling = STANDARD,
) -> Comparison:
    """Return how a system does beside the baseline on the same utterances.

    Args:
        baseline: int64 [U]: errors of the baseline in each utterance.
        system: int64 [U]: errors of the system.
        reference_tokens: int64 [U].
        blocks: int64 [U]: the number of the block that each utterance belongs to; None where
             utterances stand for themselves.
        resampling: how interval and p-value are drawn.
    """
    differences = system - baseline
    signs = [float(np.mean(np.sign(differences) == sign)) for sign in (-1, 1, 0)]
    if blocks is not None:
        _, blocks = np.unique(blocks, return_inverse=True)
        differences = np.bincount(blocks, weights=differences).astype(np.int64)
        reference_tokens = np.bincount(blocks, weights=reference_tokens).astype(np.int64)
    if not reference_tokens.any():
        return Comparison(None, None, 1.0, *signs)
    pairs = Counter(zip(differences.tolist(), reference_tokens.tolist(), strict=True))
    interval = ratio_interval(pairs, resampling)
    p_value, not_rejected = _toss(pairs, resampling)
    if interval:
        # Few utterances with large differences are where resampling is too sure of itself.
        interval = min(interval[0], not_rejected[0]), max(interval[1], not_rejected[1])
        if not np.isfinite(interval).all():  # so few that the test cannot reject anything
            interval = None
    return Comparison(float(differences.sum() / reference_tokens.sum()), interval, p_value, *signs)


def _ratio_and_error(sums: Floats, units: int) -> tuple[Floats, Floats]:
    """Return ratio and standard error of sums [..., 5] of a, b, a², ab, b² over the units."""
    over, under, over_squared, product, under_squared = np.moveaxis(sums, -1, 0)
    ratio = over / under
    residual = over_squared - 2 * ratio * product + ratio**2 * under_squared
    # What rounding leaves of squares that cancel out is no variation.
    residual = np.where(residual > 1e-9 * over_squared, residual, 0.0)
    return ratio, np.sqrt(residual * units / (units - 1)) / under


def _in_parts(draw: Callable[[int], Floats], samples: int, width: int) -> Iterator[Floats]:
    """Yield so many drawn samples, of `width` numbers each, as many at a time as memory allows."""
    at_once = max(1, RESAMPLED_CELLS // width)
    for start in range(0, samples, at_once):
        yield draw(min(at_once, samples - start))


def _toss(pairs: Counter[tuple[int, int]], resampling: Resampling) -> tuple[float, Interval]:
    """Return the two-sided p-value of a randomisation test (Noreen 1989), and what it lets stand.

    A coin decides of each unit which system is which, that is the sign of its difference d. Of m
    units with the same d and tokens n, how many keep their sign is binomial. With A and B the sums
    of d and n so signed, D and N the plain sums, a toss is as extreme as what was seen if
    |A| >= |D|; and if the true difference were x, if |A - xB| >= |D - xN|, which holds for x
    between (D - A) / (N - B) and (D + A) / (N + B). So the x which the test does not reject are
    found from the same tosses.
    """
    distinct = np.array(sorted(pairs), dtype=np.float64)
    times = np.array([pairs[pair] for pair in sorted(pairs)])
    random = np.random.default_rng(resampling.seed)

    def draw(samples: int) -> Floats:
        heads = random.binomial(times, 0.5, size=(samples, len(times)))
        signed: Floats = (2 * heads - times) @ distinct
        return signed

    signed = np.concatenate(list(_in_parts(draw, resampling.samples, len(times))))
    seen = times @ distinct
    as_extreme = np.count_nonzero(np.abs(signed[:, 0]) >= abs(seen[0]))
    with np.errstate(divide="ignore", invalid="ignore"):  # where all signs are alike
        ends = np.stack([(seen - signed).T, (seen + signed).T])
        ends = ends[:, 0] / ends[:, 1]
    # 0 / 0 is a toss that is as extreme whatever x is.
    lowest = np.where(np.isnan(ends), -np.inf, ends).min(axis=0)
    highest = np.where(np.isnan(ends), np.inf, ends).max(axis=0)
    low = np.quantile(lowest, 1 - resampling.confidence, method="lower")
    high = np.quantile(highest, resampling.confidence, method="higher")
    p_value = (as_extreme + 1) / (resampling.samples + 1)
    return float(p_value), (float(low), float(high))
