"""How often a 95 % interval holds the true rate, and how often chance alone looks significant.

Whole evaluations are drawn from populations whose error rate is known, with errors as recognisers
make them: most utterances right, some wrong throughout, now and then one with invented text. Run
`python -m benchmarks.coverage`.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from simpler_distil_whisper.evaluation.intervals import (
    Resampling,
    paired_difference,
    ratio_interval,
)

Integers = npt.NDArray[np.int64]
Draw = Callable[[np.random.Generator, int], Integers]

EVALUATIONS = 2000
POPULATION = 2_000_000  # utterances whose corpus error rate stands for the truth


def careful(random: np.random.Generator, utterances: int) -> Integers:
    """Return int64 [U, 2], errors and tokens: a good system, 2 % errors in few utterances."""
    tokens = 1 + random.poisson(12, utterances)
    return np.stack([random.binomial(tokens, random.beta(0.15, 7, utterances)), tokens], axis=1)


def inventive(random: np.random.Generator, utterances: int) -> Integers:
    """Return the same of a system with 11 % errors, 1 % of its utterances with a tail of others."""
    tokens = 1 + random.poisson(12, utterances)
    errors = random.binomial(tokens, random.beta(0.25, 2.25, utterances))
    invented = (random.random(utterances) < 0.01) * random.geometric(1 / 15, utterances)
    return np.stack([errors + invented, tokens], axis=1)


def speakers(random: np.random.Generator, number: int) -> Integers:
    """Return the sums of so many speakers, about 20 utterances each, some of them unclear."""
    difficulty = 0.1 * random.gamma(1.5, 1 / 1.5, number)
    utterances = 1 + random.poisson(19, number)
    speaker = np.repeat(np.arange(number), utterances)
    tokens = 1 + random.poisson(12, len(speaker))
    chance = np.minimum(random.gamma(0.5, 2 * difficulty[speaker]), 0.95)
    errors = random.binomial(tokens, chance)
    sums = [np.bincount(speaker, weights=column) for column in (errors, tokens)]
    return np.stack(sums, axis=1).astype(np.int64)


def share_that_hold(
    draw: Draw, units: int, evaluations: int, samples: int = 500
) -> tuple[float, float]:
    """Return how often an interval of an evaluation of so many units holds the true rate.

    Ours, and that of the percentiles of resampled rates, which is what is mostly used.
    """
    random = np.random.default_rng(0)
    errors, tokens = draw(random, POPULATION // (20 if draw is speakers else 1)).sum(axis=0)
    ours = usual = 0
    for seed in range(evaluations):
        rows = draw(random, units)
        pairs = Counter(map(tuple, rows.tolist()))
        low, high = ratio_interval(pairs, Resampling(0.95, samples, seed)) or (0, 0)
        ours += low <= errors / tokens <= high
        low, high = percentile_interval(rows, samples, seed)
        usual += low <= errors / tokens <= high
    return ours / evaluations, usual / evaluations


def percentile_interval(rows: np.ndarray, samples: int, seed: int) -> tuple[float, float]:
    """Return the interval that holds 95 % of the rates of resampled corpora."""
    distinct, times = np.unique(rows, axis=0, return_counts=True)
    random = np.random.default_rng(seed)
    sums = random.multinomial(len(rows), times / len(rows), size=samples) @ distinct
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(low), float(high)


def swapped(random: np.random.Generator, utterances: int) -> Integers:
    """Return int64 [U, 3], both systems' errors and the tokens: two of the same quality.

    On each utterance a coin decides which of them is which.
    """
    errors, tokens = inventive(random, utterances).T
    other = random.permutation(errors * (random.random(utterances) < 0.5)) + errors // 2
    heads = random.random(utterances) < 0.5
    return np.stack([np.where(heads, other, errors), np.where(heads, errors, other), tokens], 1)


def worse(random: np.random.Generator, utterances: int) -> Integers:
    """Return the same of a system that makes most of the baseline's errors and invents some."""
    errors, tokens = inventive(random, utterances).T
    own = random.binomial(tokens, random.beta(0.3, 2, utterances))
    other = np.where(random.random(utterances) < 0.7, errors, own)
    other += (random.random(utterances) < 0.02) * random.geometric(1 / 10, utterances)
    return np.stack([errors, other, tokens], axis=1)


def differences_that_hold(
    draw: Draw, utterances: int, evaluations: int, samples: int = 500
) -> tuple[float, float]:
    """Return how often the interval of a difference holds the truth, and how often p < 0.05."""
    random = np.random.default_rng(0)
    own, other, tokens = draw(random, POPULATION).sum(axis=0)
    truth = 0.0 if draw is swapped else (other - own) / tokens
    held = significant = 0
    for seed in range(evaluations):
        difference = paired_difference(
            *draw(random, utterances).T, None, Resampling(0.95, samples, seed)
        )
        low, high = difference.interval or (1, 1)
        held += low <= truth <= high
        significant += difference.p_value < 0.05
    return held / evaluations, significant / evaluations


def main() -> None:
    """Print the table of docs/evaluation.md."""
    print("| what varies | units | ours hold the truth | percentiles do |\n|---|---|---|---|")
    for draw, name, sizes in (
        (careful, "good system, utterances", (30, 100, 300, 1000)),
        (inventive, "system that invents, utterances", (30, 100, 300, 1000)),
        (speakers, "speakers (blocks of 20 utterances)", (5, 10, 20, 50)),
    ):
        for units in sizes:
            ours, usual = share_that_hold(draw, units, EVALUATIONS)
            print(f"| {name} | {units} | {ours:.1%} | {usual:.1%} |", flush=True)
    print("\n| difference of | utterances | intervals that hold it | p < 0.05 |\n|---|---|---|---|")
    for draw, name in ((swapped, "two equal systems"), (worse, "one that invents more")):
        for units in (100, 300, 1000):
            held, significant = differences_that_hold(draw, units, EVALUATIONS)
            print(f"| {name} | {units} | {held:.1%} | {significant:.1%} |", flush=True)


if __name__ == "__main__":
    main()
