"""The error rate up to which labels are worth learning from, suggested from the labels themselves.

Owns the rule and the sentences that explain what it has chosen. It reads no files.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from simpler_distil_whisper.data.jsonl import Row, is_number
from simpler_distil_whisper.data.manifest import MEASURED_SECONDS
from simpler_distil_whisper.labels.table import Flags, Numbers

THRESHOLD_STEPS = 50
THRESHOLDS = np.round(np.linspace(0, 0.5, THRESHOLD_STEPS + 1), 2)  # those that are tried
# A stricter threshold than one error in ten loses hours at which the teacher was nearly right; and
# no label may pass of which more than a fifth is wrong only because it is short.
LOWEST_FLOOR, HIGHEST_FLOOR = 0.1, 0.2
# A student of a teacher that errs often needs hours more than labels without errors: only what has
# more errors than this many times the teacher's usual rate is a failure.
TIMES_USUAL = 2
FEW_ROWS = 100  # whose rates say little about a threshold


@dataclass(frozen=True)
class Suggestion:
    """A threshold for data.max_error_rate, with its reasons.

    Attributes:
        max_error_rate: the threshold; None: no row speaks for one, and the other numbers are None.
        rows: how many rows "auto" keeps: up to the threshold, and those without a reference.
        hours: how many hours.
        share_of_hours: the same, as a share of all hours.
        knee: where the curve of hours bends.
        usual: the teacher's usual error rate: half of the hours have a lower one.
        one_slip: error rate of one wrong token in a reference of median length, rounded up.
        reasoning: the reasons, a sentence or two each.
    """

    max_error_rate: float | None
    rows: int | None
    hours: float | None
    share_of_hours: float | None
    knee: float | None
    usual: float | None
    one_slip: float | None
    reasoning: list[str]


def suggest_threshold(
    rates: Numbers, hours: Numbers, reference_tokens: Numbers, without_reference: Flags
) -> Suggestion:
    """Return the threshold that is worth its hours.

    The knee: hours kept, as a share of those that 0.50 keeps, rise with the threshold; the knee is
    where they are furthest above a straight rise, so that going on costs more errors than it gains
    hours. It is raised to the error rate of one wrong token in a reference of median length, within
    0.10 and 0.20, since a single slip in a short label is no failure; and to twice the usual error
    rate, at most to 0.50, or a teacher that errs often would leave its student few hours.

    Args:
        rates: float64 [rows]: error rates; NaN where there is none.
        hours: float64 [rows]: lengths of the audio.
        reference_tokens: float64 [rows]: lengths of the references; NaN where there is none.
        without_reference: bool [rows]: which rows the threshold does not apply to.
    """
    known = ~np.isnan(rates)
    if not known.any():
        why = (
            "No row has an error rate, because none has a reference. What is left to judge the "
            "labels by are the signs that need none."
        )
        return Suggestion(None, None, None, None, None, None, None, [why])
    kept = np.array([hours[rates <= threshold].sum() for threshold in THRESHOLDS])
    # Where it keeps nothing at all, there is no knee, and twice the usual rate is above 0.50.
    above_the_line = np.round(kept / (kept[-1] or 1) - THRESHOLDS / THRESHOLDS[-1], 9)
    knee = float(THRESHOLDS[above_the_line.argmax()])
    length = float(np.median(reference_tokens[known]))
    slip = math.ceil(round(100 / length, 6)) / 100
    floor = min(max(slip, LOWEST_FLOOR), HIGHEST_FLOOR)
    usual = _usual_rate(rates[known], hours[known])
    twice_usual = min(math.ceil(round(100 * TIMES_USUAL * usual, 6)) / 100, float(THRESHOLDS[-1]))
    threshold = max(knee, floor, twice_usual)
    passes = (rates <= threshold) | without_reference
    return Suggestion(
        max_error_rate=threshold,
        rows=int(passes.sum()),
        hours=round(float(hours[passes].sum()), 6),
        share_of_hours=round(float(hours[passes].sum() / hours.sum()), 6),
        knee=knee,
        usual=round(usual, 6),
        one_slip=slip,
        reasoning=[
            *_why_this(threshold, knee, floor, usual, length),
            *_what_it_leaves(threshold, rates, hours),
        ],
    )


def suggest_for_rows(rows: Iterable[Row], column: str) -> Suggestion:
    """Return the threshold that `suggest_threshold` suggests for labelled rows.

    Rows of other origin may lack what labelling writes: where the length of one is not known, all
    count alike, and a reference of unknown length excuses no slip.

    Args:
        rows: labelled rows, of one manifest or several; each is needed only once.
        column: the key under which the error rate stands.
    """
    keys = (column, MEASURED_SECONDS, "reference_tokens")
    values = [[row.get(key) for key in keys] for row in rows]
    known = [[value if is_number(value) else math.nan for value in three] for three in values]
    rates, seconds, reference_tokens = np.array(known, float).reshape(-1, len(keys)).T
    hours = seconds / 3600 if (seconds > 0).all() else np.ones(len(seconds))
    lengths = np.where(reference_tokens > 0, reference_tokens, math.inf)
    return suggest_threshold(rates, hours, lengths, np.isnan(rates))


def _usual_rate(rates: Numbers, hours: Numbers) -> float:
    """Return the median of error rates, weighted by hours."""
    order = np.argsort(rates)
    before = np.cumsum(hours[order])
    return float(rates[order][np.searchsorted(before, before[-1] / 2)])


def _why_this(
    threshold: float, knee: float, floor: float, usual: float, length: float
) -> Iterator[str]:
    """Yield the reasons for a threshold, one sentence or two each."""
    gain = f"{1 / THRESHOLD_STEPS:.0%} of the hours that 0.50 would keep"
    if knee:
        yield (
            f"The curve of hours has its knee at {knee:.2f}: up to there each 0.01 of threshold "
            f"buys on average more than {gain}, beyond it less."
        )
    else:
        yield f"Above 0, each 0.01 of threshold buys on average less than {gain}."
    if threshold == knee:
        return
    if threshold > floor:
        yield (
            f"Raised to {threshold:.2f}: this teacher usually has an error rate of {usual:.2f} "
            "(half of the hours have a higher one). Its student needs hours more than labels "
            "without errors, so only labels that are twice as wrong, or half wrong, are left out."
        )
    elif threshold > LOWEST_FLOOR:
        yield (
            f"Raised to {threshold:.2f}, because a reference has {length:g} tokens (median), of "
            f"which a single wrong one is an error rate of {1 / length:.3g}: a slip, no failure."
        )
    else:
        yield (
            f"Raised to {threshold:.2f}: published experiments (Gandhi et al. 2023) lost hours "
            "and gained nothing with lower ones."
        )


def _what_it_leaves(threshold: float, rates: Numbers, hours: Numbers) -> Iterator[str]:
    """Yield what a threshold keeps and leaves out, one sentence or two each."""
    known, beyond = ~np.isnan(rates), rates > threshold
    share = hours[rates <= threshold].sum() / hours[known].sum()
    if not share:
        yield (
            "Every error rate is above it. Such labels and references do not belong together: "
            "look whether language, script and columns are what they should be."
        )
        return
    if beyond.any():
        yield (
            f"Beyond it are {beyond.sum()} of {known.sum()} rows: their median error rate is "
            f"{np.median(rates[beyond]):.2f}, and {(rates[beyond] >= 0.5).sum()} of them are wrong "
            "in every second token or more."
        )
    else:
        yield "No row is beyond it."
    if known.sum() < FEW_ROWS:
        yield f"Only {known.sum()} rows have an error rate: look at them one by one."
    if share < 0.5:
        yield (
            f"It keeps only {share:.0%} of their hours: before you train, look at the worst rows. "
            "Teacher and references may differ in script, language or how numbers are written."
        )
