"""Intervals and p-values of error rates and of their differences, by resampling.

Owns the statistics. Utterances are resampled, or whole blocks of them (those of one speaker, one
recording) whose errors go together. It knows nothing of texts and files.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from simpler_distil_whisper.evaluation.metrics import ErrorCounts

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
ConfidenceInterval = tuple[float, float]

FEWEST_UNITS = 5  # utterances or blocks; fewer tell too little about how they vary
SMALLEST_ERROR = 0.2  # of a sample, as a share of the corpus's: see `ratio_interval`
RESAMPLED_CELLS = 2_000_000  # numbers of 8 bytes held at a time


class Resampling(NamedTuple):
    """How intervals and p-values are drawn.

    Attributes:
        confidence: how often an interval should hold the true value.
        samples: how many corpora are drawn.
        seed: the same seed and counts give the same results, whatever the order of the counts.
    """

    confidence: float = 0.95
    samples: int = 1000
    seed: int = 0


STANDARD = Resampling()


class Comparison(NamedTuple):
    """A system compared with the baseline over the same utterances.

    Attributes:
        difference: the system's corpus error rate minus the baseline's; None where no reference
            has a token.
        interval: the bootstrap's interval of the difference, widened to hold every difference that
            the test does not reject; None for too few utterances or blocks.
        p_value: how often a difference at least as large would arise if a coin decided for each
            utterance (or block) which of its two results belongs to which system.
        better: the share of utterances in which the system makes fewer errors.
        worse: the share in which it makes more.
        equal: the share in which it makes as many.
    """

    difference: float | None
    interval: ConfidenceInterval | None
    p_value: float
    better: float
    worse: float
    equal: float


def bootstrap_interval(
    counts: Iterable[ErrorCounts], resampling: Resampling = STANDARD
) -> ConfidenceInterval | None:
    """Return the interval of the corpus error rate.

    Args:
        counts: the counts of each utterance or, where they go together in blocks, the sum of each
            block; or a Counter of them.
        resampling: how it is drawn.

    Returns:
        The lower end, at least 0, and the upper end; None for fewer than `FEWEST_UNITS` utterances
        or blocks, and where no reference has a token.
    """
    pairs: Counter[tuple[int, int]] = Counter()
    for unit, times in Counter(counts).items():
        pairs[unit.errors, unit.reference_tokens] += times
    interval = ratio_interval(pairs, resampling)
    if interval is None:
        return None
    return max(interval[0], 0.0), interval[1]


def ratio_interval(
    pairs: Counter[tuple[int, int]], resampling: Resampling = STANDARD
) -> ConfidenceInterval | None:
    """Return the bootstrap-t interval of a ratio of sums.

    Percentiles of resampled ratios give intervals that are too narrow for few units and for skewed
    counts, and error counts are skewed. Here each sample's distance from the ratio is divided by
    that sample's own standard error (Efron and Tibshirani 1993, section 12.5), the linearised one
    of a ratio.

    Drawing n units with replacement is drawing from a multinomial how often each distinct pair
    comes up. A million utterances have few distinct pairs, so this is fast.

    Args:
        pairs: how often each (numerator, denominator) occurs among the units.
        resampling: how it is drawn.

    Returns:
        The lower and the upper end, or None as for `bootstrap_interval`.
    """
    units = pairs.total()
    distinct = np.array(sorted(pairs), dtype=np.float64)
    if units < FEWEST_UNITS or not distinct[:, 1].any():
        return None
    a, b = distinct.T
    values = np.stack([a, b, a * a, a * b, b * b], axis=1)
    times = np.array([pairs[pair] for pair in sorted(pairs)])
    ratio, error = _ratio_and_error(times @ values, units)
    tail = (1 - resampling.confidence) / 2
    if not error:
        # All units agree, so that resampling sees no variation. Units that differ may exist all the
        # same: their share is below this (the exact form of the rule of three).
        unseen = 1 - tail ** (1 / units)
        return float(ratio - unseen), float(ratio + unseen)
    random = np.random.default_rng(resampling.seed)

    def draw(samples: int) -> Floats:
        drawn: Floats = random.multinomial(units, times / units, size=samples) @ values
        return drawn

    sums = np.concatenate(list(_draw_in_parts(draw, resampling.samples, len(distinct))))
    ratios, errors = _ratio_and_error(sums[sums[:, 1] > 0], units)
    # Where few utterances are wrong, many samples have none of them, and an error of 0: infinitely
    # far, and by a floor that falls with the units the farther the more are right. With this one,
    # of one wrong utterance the true number is up to 6; by Poisson's distribution, up to 5.6.
    floor = error * max(units**-0.5, SMALLEST_ERROR)
    distances = (ratios - ratio) / np.maximum(errors, floor)
    low, high = np.quantile(distances, [1 - tail, tail])
    return float(ratio - low * error), float(ratio - high * error)


def paired_difference(
    baseline: Integers,
    system: Integers,
    reference_tokens: Integers,
    blocks: Integers | None = None,
    resampling: Resampling = STANDARD,
) -> Comparison:
    """Return how a system compares with the baseline on the same utterances.

    Args:
        baseline: int64 [U]: errors of the baseline in each utterance.
        system: int64 [U]: errors of the system in each utterance.
        reference_tokens: int64 [U]: tokens of each reference.
        blocks: int64 [U]: the number of each utterance's block; None: each utterance is resampled
            by itself.
        resampling: how interval and p-value are drawn.
    """
    differences = system - baseline
    better, worse, equal = (float(np.mean(np.sign(differences) == sign)) for sign in (-1, 1, 0))
    if blocks is not None:
        _, blocks = np.unique(blocks, return_inverse=True)
        differences = np.bincount(blocks, weights=differences).astype(np.int64)
        reference_tokens = np.bincount(blocks, weights=reference_tokens).astype(np.int64)
    if not reference_tokens.any():
        return Comparison(None, None, 1.0, better, worse, equal)
    pairs = Counter(zip(differences.tolist(), reference_tokens.tolist(), strict=True))
    interval = ratio_interval(pairs, resampling)
    p_value, not_rejected = _randomisation_test(pairs, resampling)
    # All signs are alike in two of 2**units tosses. Of too few units the test can reject nothing,
    # whatever the tosses that were drawn seem to tell.
    smallest = 2.0 ** (1 - (pairs.total() - pairs[0, 0]))
    p_value = max(p_value, smallest)
    if smallest >= 1 - resampling.confidence:
        interval = None
    if interval:
        # The bootstrap's interval is too narrow where a few utterances make most of the difference.
        interval = min(interval[0], not_rejected[0]), max(interval[1], not_rejected[1])
        if not np.isfinite(interval).all():  # too few utterances for the test to reject anything
            interval = None
    difference = float(differences.sum() / reference_tokens.sum())
    return Comparison(difference, interval, p_value, better, worse, equal)


def _ratio_and_error(sums: Floats, units: int) -> tuple[Floats, Floats]:
    """Return a ratio of sums and its standard error.

    Args:
        sums: float64 [..., 5]: the sums over the units of a, b, a², ab and b².
        units: how many units each sum is of.

    Returns:
        Two arrays float64 [...].
    """
    a, b, a_squared, a_times_b, b_squared = np.moveaxis(sums, -1, 0)
    ratio = a / b
    residual = a_squared - 2 * ratio * a_times_b + ratio**2 * b_squared
    # Squares that cancel out leave a rounding error, which must not be taken for variation.
    residual = np.where(residual > 1e-9 * a_squared, residual, 0.0)
    return ratio, np.sqrt(residual * units / (units - 1)) / b


def _draw_in_parts(draw: Callable[[int], Floats], samples: int, width: int) -> Iterator[Floats]:
    """Yield what `draw` returns for all samples, drawn in parts that fit into memory.

    Args:
        draw: (how many samples) -> what is drawn for them.
        samples: how many there are in all.
        width: how many numbers `draw` holds for one sample.
    """
    at_once = max(1, RESAMPLED_CELLS // width)
    for start in range(0, samples, at_once):
        yield draw(min(at_once, samples - start))


def _randomisation_test(
    pairs: Counter[tuple[int, int]], resampling: Resampling
) -> tuple[float, ConfidenceInterval]:
    """Return the two-sided p-value of a randomisation test, and the differences it does not reject.

    The test is that of Noreen (1989). A coin decides for each unit which system is which, that is,
    the sign of its difference d. Of m units with the same d and the same number of tokens n, the
    number that keep their sign is binomial. Let A and B be the sums of d and n with these signs, D
    and N the sums without. A toss is as extreme as the observation if |A| >= |D|. If the true
    difference were x, it would be as extreme if |A - xB| >= |D - xN|, which holds for x between
    (D - A) / (N - B) and (D + A) / (N + B). So the same tosses tell which x the test does not
    reject.

    Args:
        pairs: how often each (difference of errors, reference tokens) occurs among the units.
        resampling: how many tosses, and which confidence.
    """
    distinct = np.array(sorted(pairs), dtype=np.float64)
    times = np.array([pairs[pair] for pair in sorted(pairs)])
    random = np.random.default_rng(resampling.seed)

    def draw(samples: int) -> Floats:
        heads = random.binomial(times, 0.5, size=(samples, len(times)))
        signed: Floats = (2 * heads - times) @ distinct
        return signed

    signed = np.concatenate(list(_draw_in_parts(draw, resampling.samples, len(times))))
    observed = times @ distinct
    as_extreme = np.count_nonzero(np.abs(signed[:, 0]) >= abs(observed[0]))
    with np.errstate(divide="ignore", invalid="ignore"):  # where all signs are alike
        ends = np.stack([(observed - signed).T, (observed + signed).T])
        ends = ends[:, 0] / ends[:, 1]
    # 0 / 0 is a toss that is as extreme for every x.
    lowest = np.where(np.isnan(ends), -np.inf, ends).min(axis=0)
    highest = np.where(np.isnan(ends), np.inf, ends).max(axis=0)
    low = np.quantile(lowest, 1 - resampling.confidence, method="lower")
    high = np.quantile(highest, resampling.confidence, method="higher")
    p_value = (as_extreme + 1) / (resampling.samples + 1)
    return float(p_value), (float(low), float(high))
