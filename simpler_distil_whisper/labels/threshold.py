"""The error rate up to which labels are worth learning from, suggested from the labels themselves.

Owns the rule and the sentences that explain what it has chosen. It reads no files.
"""

import math
from dataclasses import dataclass

import numpy as np

from simpler_distil_whisper.labels.table import Numbers

THRESHOLD_STEPS = 50
THRESHOLDS = np.round(np.linspace(0, 0.5, THRESHOLD_STEPS + 1), 2)  # those that are tried
# A stricter threshold than one error in ten loses hours at which the teacher was nearly right; and
# no label may pass of which more than a fifth is wrong only because it is short.
LOWEST_FLOOR, HIGHEST_FLOOR = 0.1, 0.2
FEW_ROWS = 100  # whose rates say little about a threshold


@dataclass(frozen=True)
class Suggestion:
    """A threshold for data.max_error_rate, with its reasons.

    Attributes:
        max_error_rate: the threshold; None: no row speaks for one, and the other numbers are None.
        rows: how many rows it keeps.
        hours: how many hours it keeps.
        share_of_hours: the same, as a share of all hours.
        knee: where the curve of hours bends.
        one_slip: error rate of one wrong token in a reference of median length, rounded up.
        reasoning: the reasons, a sentence or two each.
    """

    max_error_rate: float | None
    rows: int | None
    hours: float | None
    share_of_hours: float | None
    knee: float | None
    one_slip: float | None
    reasoning: list[str]


def suggest_threshold(rates: Numbers, hours: Numbers, reference_tokens: Numbers) -> Suggestion:
    """Return the threshold that is worth its hours.

    The knee: hours kept, as a share of those that 0.50 keeps, rise with the threshold; the knee is
    where they are furthest above a straight rise, so that going on costs more errors than it gains
    hours. It is raised to the error rate of one wrong token in a reference of median length, within
    0.10 and 0.20, since a single slip in a short label is no failure.

    Args:
        rates: float64 [rows]: error rates; NaN where there is none.
        hours: float64 [rows]: lengths of the audio.
        reference_tokens: float64 [rows]: lengths of the references; NaN where there is none.
    """
    known = ~np.isnan(rates)
    if not known.any():
        return _no_threshold(
            "No row has an error rate, because none has a reference. What is left to judge the "
            "labels by are the signs that need none."
        )
    kept = np.array([hours[rates <= threshold].sum() for threshold in THRESHOLDS])
    if not kept[-1]:
        return _no_threshold(
            "Every error rate is above 0.50. Such labels and references do not belong together: "
            "look whether language, script and columns are what they should be."
        )
    above_the_line = np.round(kept / kept[-1] - THRESHOLDS / THRESHOLDS[-1], 9)
    knee = float(THRESHOLDS[above_the_line.argmax()])
    length = float(np.median(reference_tokens[known]))
    slip = math.ceil(round(100 / length, 6)) / 100
    floor = min(max(slip, LOWEST_FLOOR), HIGHEST_FLOOR)
    threshold = max(knee, floor)
    passes = rates <= threshold
    return Suggestion(
        max_error_rate=threshold,
        rows=int(passes.sum()),
        hours=round(float(hours[passes].sum()), 6),
        share_of_hours=round(float(hours[passes].sum() / hours.sum()), 6),
        knee=knee,
        one_slip=slip,
        reasoning=_reasoning(threshold, knee, length, rates, hours),
    )


def _no_threshold(why: str) -> Suggestion:
    return Suggestion(None, None, None, None, None, None, [why])


def _reasoning(
    threshold: float, knee: float, length: float, rates: Numbers, hours: Numbers
) -> list[str]:
    """Return the reasons for a threshold, one sentence or two each."""
    known, beyond = ~np.isnan(rates), rates > threshold
    share = hours[rates <= threshold].sum() / hours.sum()
    gain = f"{1 / THRESHOLD_STEPS:.0%} of the hours that 0.50 would keep"
    reasons = []
    if knee:
        reasons.append(
            f"The curve of hours has its knee at {knee:.2f}: up to there each 0.01 of threshold "
            f"buys on average more than {gain}, beyond it less."
        )
    else:
        reasons.append(f"Above 0, each 0.01 of threshold buys on average less than {gain}.")
    if threshold > max(knee, LOWEST_FLOOR):
        reasons.append(
            f"Raised to {threshold:.2f}, because a reference has {length:g} tokens (median), of "
            f"which a single wrong one is an error rate of {1 / length:.3g}: a slip, no failure."
        )
    elif threshold > knee:
        reasons.append(
            f"Raised to {threshold:.2f}: published experiments (Gandhi et al. 2023) lost hours "
            "and gained nothing with lower ones."
        )
    if beyond.any():
        reasons.append(
            f"Beyond it are {beyond.sum()} of {known.sum()} rows: their median error rate is "
            f"{np.median(rates[beyond]):.2f}, and {(rates[beyond] >= 0.5).sum()} of them are wrong "
            "in every second token or more."
        )
    else:
        reasons.append("No row is beyond it.")
    if known.sum() < FEW_ROWS:
        reasons.append(f"Only {known.sum()} rows have an error rate: look at them one by one.")
    if share < 0.5:
        reasons.append(
            f"It keeps only {share:.0%} of all hours: before you train, look at the worst rows. "
            "Teacher and references may differ in script, language or how numbers are written."
        )
    return reasons
