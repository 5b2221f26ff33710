"""Systems compared with the baseline."""

from collections import Counter

import numpy as np

from simpler_distil_whisper.evaluation.intervals import Resampling
from simpler_distil_whisper.evaluation.systems import compare_systems
from simpler_distil_whisper.evaluation.tallies import SystemScores


def test_a_comparison_without_tokens_has_no_difference() -> None:
    scores = {name: SystemScores(6, Counter()) for name in ("teacher", "student")}
    for system in scores.values():
        system.errors = np.zeros(6, np.int64)  # of six empty references
    comparison = compare_systems(scores, None, Resampling(samples=100))["student"]
    assert comparison.difference is comparison.low is comparison.high is None
    assert (comparison.baseline, comparison.p_value) == ("teacher", 1.0)
