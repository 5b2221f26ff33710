"""Counts added up: error rates of a system, of its groups, and what else is counted of it.

Owns the sums and their shape in `summary.json`. It knows nothing of files and of how errors are
counted. Called by `eval.py`.
"""

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from simpler_distil_whisper.evaluation.hallucination import SIGN_LIMITS, SIGNS
from simpler_distil_whisper.evaluation.intervals import Comparison, Resampling, bootstrap_interval
from simpler_distil_whisper.evaluation.metrics import Edit, ErrorCounts, total
from simpler_distil_whisper.evaluation.scoring import Counts, Scored

NO_REFERENCE = -1  # in an array of errors
RATE_EDGES = np.round(np.linspace(0, 1, 21), 2)
MOST_CONFUSIONS = 20  # of a kind, in the summary
MOST_KEPT = 200_000  # different ones while counting; beyond, the rarer half is forgotten

AUDIO_LENGTH, REFERENCE_LENGTH = "audio length", "reference length"
SECONDS = (2, 5, 10, 20, 30)
TOKENS = (5, 10, 20, 50)
LENGTHS = {
    AUDIO_LENGTH: ["under 2 s", "2 to 5 s", "5 to 10 s", "10 to 20 s", "20 to 30 s", "from 30 s"],
    REFERENCE_LENGTH: [
        *("no token", "1 to 5 tokens", "6 to 10 tokens", "11 to 20 tokens", "21 to 50 tokens"),
        "over 50 tokens",
    ],
}


class Tally:
    """Error counts of utterances, or the sums of blocks of them, whichever is resampled.

    Equal counts are kept once with their number, so that a million utterances need little memory.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.utterances = 0
        self._alone: Counter[ErrorCounts] = Counter()
        self._blocks: dict[str, ErrorCounts] = {}

    def add(self, counts: ErrorCounts, block: str | None) -> None:
        """Add an utterance; one that belongs to no block stands for itself."""
        self.utterances += 1
        if block is None:
            self._alone[counts] += 1
        else:
            self._blocks[block] = self._blocks.get(block, ErrorCounts()) + counts

    def rates(self, resampling: Resampling) -> dict[str, Any]:
        """Return the corpus error rate, its interval and the counts behind it."""
        units = self._alone + Counter(self._blocks.values())
        counts = total(units)
        low, high = bootstrap_interval(units, resampling) or (None, None)
        return {
            "rate": counts.rate,
            "low": low,
            "high": high,
            **counts.as_dict(),
            "reference_tokens": counts.reference_tokens,
            "utterances": self.utterances,
        }


class Scores:
    """The tallies of some utterances: in the chosen unit and in both usual ones."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.chosen, self.character, self.word = Tally(), Tally(), Tally()

    def add(self, unit: str, counts: Counts, block: str | None) -> None:
        """Add one utterance, its counts given by unit."""
        self.chosen.add(counts[unit], block)
        self.character.add(counts["character"], block)
        self.word.add(counts["word"], block)

    def rates(self, resampling: Resampling) -> dict[str, Any]:
        """Return the rates in all three."""
        return {
            "corpus": self.chosen.rates(resampling),
            "character": self.character.rates(resampling),
            "word": self.word.rates(resampling),
        }


class Confusions:
    """How often which token is taken for which, left out or made up."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.found: dict[str, Counter[tuple[str, ...]]] = {
            "substitutions": Counter(),
            "deletions": Counter(),
            "insertions": Counter(),
        }

    def add(self, edits: Sequence[Edit]) -> None:
        """Count the tokens of an alignment that are not equal."""
        for edit in edits:
            if edit.kind == "substitute":
                pairs = zip(edit.reference, edit.hypothesis, strict=True)
                self.found["substitutions"].update(pairs)
            elif edit.kind == "delete":
                self.found["deletions"].update((token,) for token in edit.reference)
            elif edit.kind == "insert":
                self.found["insertions"].update((token,) for token in edit.hypothesis)
        for kind, counter in self.found.items():
            if len(counter) > MOST_KEPT:
                self.found[kind] = Counter(dict(counter.most_common(MOST_KEPT // 2)))

    def most_frequent(self) -> dict[str, list[list[Any]]]:
        """Return the most frequent of each kind as [token, ..., times], equal ones by the token."""
        return {
            kind: [
                [*tokens, times]
                for tokens, times in sorted(counter.items(), key=lambda one: (-one[1], one[0]))
            ][:MOST_CONFUSIONS]
            for kind, counter in self.found.items()
        }


class SystemScores:
    """All that is counted of one system.

    Attributes:
        errors: int64 [U]: in each utterance, in the chosen unit; `NO_REFERENCE` without one.
        tokens: int64 [U]: in each reference.
        offsets: int64 [U]: where in utterances.jsonl its line begins.
    """

    def __init__(self, utterances: int, rejected: Counter[str]) -> None:
        """Begin with nothing.

        Args:
            utterances: how many there will be.
            rejected: how many rows were not scored, by reason.
        """
        self.rejected = rejected
        self.errors: npt.NDArray[np.int64] = np.full(utterances, NO_REFERENCE)
        self.tokens: npt.NDArray[np.int64] = np.zeros(utterances, np.int64)
        self.offsets: npt.NDArray[np.int64] = np.zeros(utterances, np.int64)
        self.normalized, self.raw = Scores(), Scores()
        self.groups: dict[str, dict[str, Scores]] = {}
        self.units: Counter[str] = Counter()
        self.confusions = Confusions()
        self.signs: Counter[str] = Counter()
        self.phrases: Counter[str] = Counter()
        self._han, self._latin = Tally(), Tally()

    def add(
        self, position: int, scored: Scored, groups: Mapping[str, str | None], block: str | None
    ) -> None:
        """Add one utterance.

        Args:
            position: its number, from 0.
            scored: what was counted.
            groups: column -> the group it belongs to.
            block: the block of utterances that it is resampled with, if any.
        """
        self.signs.update(scored.signs)
        self.signs["any"] += bool(scored.signs)
        self.phrases.update(scored.phrases)
        if not scored.counts:
            return
        self.errors[position] = scored.chosen.errors
        self.tokens[position] = scored.chosen.reference_tokens
        self.units[scored.unit] += 1
        self.normalized.add(scored.unit, scored.counts, block)
        self.raw.add(scored.unit, scored.raw, block)
        self.confusions.add(scored.edits)
        for column, value in groups.items():
            values = self.groups.setdefault(column, {})
            values.setdefault(value or "unknown", Scores()).add(scored.unit, scored.counts, block)
        if scored.switched:
            self._han.add(scored.switched[0], block)
            self._latin.add(scored.switched[1], block)

    def summary(self, resampling: Resampling) -> dict[str, Any]:
        """Return this system's part of `summary.json`."""
        rates = self.normalized.rates(resampling)
        return {
            **rates,
            "raw": self.raw.rates(resampling),
            "groups": {
                column: {
                    value: _group(values[value], resampling) for value in _order(column, values)
                }
                for column, values in self.groups.items()
            },
            "code_switch": self._code_switch(resampling),
            "hallucination": self._hallucination(rates["corpus"]),
            "confusions": self.confusions.most_frequent(),
            "histogram": self._histogram(),
            "units": dict(sorted(self.units.items())),
            "rejected": dict(sorted(self.rejected.items())),
        }

    def _code_switch(self, resampling: Resampling) -> dict[str, Any] | None:
        if not self._han.utterances:
            return None
        return {
            "utterances": self._han.utterances,
            "han": self._han.rates(resampling),
            "latin": self._latin.rates(resampling),
        }

    def _hallucination(self, corpus: dict[str, Any]) -> dict[str, Any]:
        utterances, wanted = len(self.errors), corpus["reference_tokens"]
        said = wanted + corpus["insertions"] - corpus["deletions"]
        shown = {
            sign: {"utterances": self.signs[sign], "share": self.signs[sign] / utterances}
            for sign in (*SIGNS, "any")
        }
        return {
            "utterances": utterances,
            "without_reference": int((self.errors == NO_REFERENCE).sum()),
            "insertion_rate": corpus["insertions"] / wanted if wanted else None,
            "length_ratio": said / wanted if wanted else None,
            "any": shown.pop("any"),
            "signs": shown,
            "limits": SIGN_LIMITS,
            "phrases": dict(self.phrases.most_common()),
        }

    def _histogram(self) -> dict[str, Any]:
        known = self.errors != NO_REFERENCE
        rated = known & (self.tokens > 0)
        rates = self.errors[rated] / self.tokens[rated]
        # A bin holds its upper edge, so that a rate of 1 is in the last one.
        counts, _ = np.histogram(-rates[rates > 0], -RATE_EDGES[::-1])
        return {
            "edges": RATE_EDGES.tolist(),
            "utterances": counts[::-1].tolist(),
            "no_error": int((rates == 0).sum()),
            "above": int((rates > 1).sum()),
            "no_rate": int((known & (self.tokens == 0)).sum()),
        }


def length_groups(seconds: float, reference_tokens: int) -> dict[str, str]:
    """Return which of the built-in groups an utterance belongs to.

    Args:
        seconds: its length; NaN where it is not known.
        reference_tokens: how many tokens its reference has.
    """
    groups = {}
    if seconds == seconds:
        groups[AUDIO_LENGTH] = LENGTHS[AUDIO_LENGTH][bisect.bisect_right(SECONDS, seconds)]
    number = bisect.bisect_left(TOKENS, reference_tokens)
    groups[REFERENCE_LENGTH] = LENGTHS[REFERENCE_LENGTH][number + 1 if reference_tokens else 0]
    return groups


def comparison_summary(baseline: str, found: Comparison) -> dict[str, Any]:
    """Return a comparison's part of `summary.json`."""
    low, high = found.interval or (None, None)
    return {
        "baseline": baseline,
        "difference": found.difference,
        "low": low,
        "high": high,
        "p_value": found.p_value,
        "better": found.better,
        "worse": found.worse,
        "equal": found.equal,
    }


def _order(column: str, values: Mapping[str, Scores]) -> list[str]:
    """Return the values of a group in the order in which people look for them."""
    if column in LENGTHS:
        return [value for value in LENGTHS[column] if value in values]
    return sorted(values)


def _group(scores: Scores, resampling: Resampling) -> dict[str, Any]:
    rates = scores.rates(resampling)
    return {**rates.pop("corpus"), **rates}
