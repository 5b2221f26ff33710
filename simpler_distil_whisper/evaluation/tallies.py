"""Counts added up over utterances: error rates of a system and its groups, confusions, signs.

Owns the sums, from which it makes a system's part of `summary.json`. It reads no files and counts
no errors itself.
"""

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from simpler_distil_whisper.evaluation.hallucination import HALLUCINATION_LIMITS, SIGNS
from simpler_distil_whisper.evaluation.intervals import Resampling, bootstrap_interval
from simpler_distil_whisper.evaluation.metrics import Edit, ErrorCounts, total
from simpler_distil_whisper.evaluation.scoring import CountsByUnit, ScoredUtterance
from simpler_distil_whisper.evaluation.summary import (
    CodeSwitchRates,
    FrequentConfusions,
    GroupRates,
    HallucinationSummary,
    RateHistogram,
    Rates,
    RatesByUnit,
    SignCount,
    SystemSummary,
)

NO_REFERENCE = -1  # in an array of errors
HISTOGRAM_EDGES = np.round(np.linspace(0, 1, 21), 2)
MOST_CONFUSIONS = 20  # of a kind, in the summary
MOST_KEPT = 200_000  # distinct confusions while counting; beyond, the rarer half is dropped

AUDIO_LENGTH, REFERENCE_LENGTH = "audio length", "reference length"
AUDIO_LENGTH_EDGES = (2, 5, 10, 20, 30)  # seconds
REFERENCE_LENGTH_EDGES = (0, 5, 10, 20, 50)  # tokens
LENGTHS = {
    AUDIO_LENGTH: ["under 2 s", "2 to 5 s", "5 to 10 s", "10 to 20 s", "20 to 30 s", "from 30 s"],
    REFERENCE_LENGTH: [
        "no token",
        "1 to 5 tokens",
        "6 to 10 tokens",
        "11 to 20 tokens",
        "21 to 50 tokens",
        "over 50 tokens",
    ],
}


class Tally:
    """Error counts of utterances, or the sums of blocks of them, whichever is resampled.

    Equal counts are kept once with their number, so that a million utterances need little memory.
    """

    def __init__(self) -> None:
        self.utterances = 0
        self._alone: Counter[ErrorCounts] = Counter()
        self._blocks: dict[str, ErrorCounts] = {}

    def add(self, counts: ErrorCounts, block: str | None) -> None:
        """Add an utterance; without a block it is resampled by itself."""
        self.utterances += 1
        if block is None:
            self._alone[counts] += 1
        else:
            self._blocks[block] = self._blocks.get(block, ErrorCounts()) + counts

    def rates(self, resampling: Resampling) -> Rates:
        """Return the corpus error rate, its interval and the counts behind it."""
        units = self._alone + Counter(self._blocks.values())
        counts = total(units)
        low, high = bootstrap_interval(units, resampling) or (None, None)
        return Rates(
            rate=counts.rate,
            low=low,
            high=high,
            **asdict(counts),
            reference_tokens=counts.reference_tokens,
            utterances=self.utterances,
        )


class TalliesByUnit:
    """Tallies of the same utterances in each one's chosen unit, in characters and in words."""

    def __init__(self) -> None:
        self.chosen = Tally()
        self.character = Tally()
        self.word = Tally()

    def add(self, unit: str, counts: CountsByUnit, block: str | None) -> None:
        """Add an utterance, `unit` being its chosen one."""
        self.chosen.add(counts[unit], block)
        self.character.add(counts["character"], block)
        self.word.add(counts["word"], block)

    def rates(self, resampling: Resampling) -> RatesByUnit:
        """Return the rates in all three."""
        return RatesByUnit(
            self.chosen.rates(resampling),
            self.character.rates(resampling),
            self.word.rates(resampling),
        )


class Confusions:
    """How often each token is taken for another one, left out or inserted."""

    def __init__(self) -> None:
        self.substitutions: Counter[tuple[str, ...]] = Counter()
        self.deletions: Counter[tuple[str, ...]] = Counter()
        self.insertions: Counter[tuple[str, ...]] = Counter()

    def add(self, edits: Iterable[Edit]) -> None:
        """Count the tokens of an alignment that are not equal."""
        for edit in edits:
            if edit.kind == "substitute":
                self.substitutions.update(zip(edit.reference, edit.hypothesis, strict=True))
            elif edit.kind == "delete":
                self.deletions.update((token,) for token in edit.reference)
            elif edit.kind == "insert":
                self.insertions.update((token,) for token in edit.hypothesis)
        self.substitutions = _without_rarest(self.substitutions)
        self.deletions = _without_rarest(self.deletions)
        self.insertions = _without_rarest(self.insertions)

    def most_frequent(self) -> FrequentConfusions:
        """Return the most frequent of each kind; equally frequent ones in the order of tokens."""
        return FrequentConfusions(
            _most_frequent(self.substitutions),
            _most_frequent(self.deletions),
            _most_frequent(self.insertions),
        )


class SystemScores:
    """All that is counted of one system.

    Attributes:
        errors: int64 [U]: errors in each utterance, in the chosen unit; `NO_REFERENCE` without a
            reference.
        tokens: int64 [U]: tokens of each reference.
        offsets: int64 [U]: where in utterances.jsonl each utterance's line begins.
    """

    def __init__(self, utterances: int, rejected: Counter[str]) -> None:
        """Begin without an utterance.

        Args:
            utterances: how many there will be.
            rejected: reason -> rows that are not scored.
        """
        self.rejected = rejected
        self.errors: npt.NDArray[np.int64] = np.full(utterances, NO_REFERENCE)
        self.tokens: npt.NDArray[np.int64] = np.zeros(utterances, np.int64)
        self.offsets: npt.NDArray[np.int64] = np.zeros(utterances, np.int64)
        self.normalized, self.raw = TalliesByUnit(), TalliesByUnit()
        self.groups: dict[str, dict[str, TalliesByUnit]] = {}
        self.units: Counter[str] = Counter()
        self.confusions = Confusions()
        self.signs: Counter[str] = Counter()
        self.phrases: Counter[str] = Counter()
        self._han, self._latin = Tally(), Tally()

    def add(
        self, position: int, scored: ScoredUtterance, groups: Mapping[str, str], block: str | None
    ) -> None:
        """Add one utterance.

        Args:
            position: its number, from 0.
            scored: its scores.
            groups: column -> its group.
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
        for column, group in groups.items():
            tallies = self.groups.setdefault(column, {}).setdefault(group, TalliesByUnit())
            tallies.add(scored.unit, scored.counts, block)
        if scored.switched:
            han, latin = scored.switched
            self._han.add(han, block)
            self._latin.add(latin, block)

    @property
    def has_reference(self) -> npt.NDArray[np.bool_]:
        """Bool [U]: which utterances have a reference; the others have no errors to count."""
        has_reference: npt.NDArray[np.bool_] = self.errors != NO_REFERENCE
        return has_reference

    def summary(self, resampling: Resampling) -> SystemSummary:
        """Return this system's part of `summary.json`."""
        rates = self.normalized.rates(resampling)
        return SystemSummary(
            corpus=rates.corpus,
            character=rates.character,
            word=rates.word,
            raw=self.raw.rates(resampling),
            groups={
                column: _group_rates(column, tallies, resampling)
                for column, tallies in self.groups.items()
            },
            code_switch=self._code_switch(resampling),
            hallucination=self._hallucination(rates.corpus),
            confusions=self.confusions.most_frequent(),
            histogram=self._histogram(),
            units=dict(sorted(self.units.items())),
            rejected=dict(sorted(self.rejected.items())),
        )

    def _code_switch(self, resampling: Resampling) -> CodeSwitchRates | None:
        if not self._han.utterances:
            return None
        return CodeSwitchRates(
            self._han.utterances, self._han.rates(resampling), self._latin.rates(resampling)
        )

    def _hallucination(self, corpus: Rates) -> HallucinationSummary:
        tokens = corpus.reference_tokens
        hypothesis_tokens = tokens + corpus.insertions - corpus.deletions
        return HallucinationSummary(
            utterances=len(self.errors),
            without_reference=int((~self.has_reference).sum()),
            insertion_rate=corpus.insertions / tokens if tokens else None,
            length_ratio=hypothesis_tokens / tokens if tokens else None,
            any=self._sign_count("any"),
            signs={sign: self._sign_count(sign) for sign in SIGNS},
            limits=HALLUCINATION_LIMITS,
            phrases=dict(self.phrases.most_common()),
        )

    def _sign_count(self, sign: str) -> SignCount:
        return SignCount(self.signs[sign], self.signs[sign] / len(self.errors))

    def _histogram(self) -> RateHistogram:
        has_rate = self.has_reference & (self.tokens > 0)
        rates = self.errors[has_rate] / self.tokens[has_rate]
        return RateHistogram(
            edges=HISTOGRAM_EDGES.tolist(),
            utterances=[int(members.sum()) for members in rate_bins(rates)],
            no_error=int((rates == 0).sum()),
            above=int((rates > 1).sum()),
            no_rate=int((self.has_reference & (self.tokens == 0)).sum()),
        )


def rate_bins(rates: npt.NDArray[np.float64]) -> list[npt.NDArray[np.bool_]]:
    """Return, for each bin of `HISTOGRAM_EDGES`, which rates are in it; its upper edge is."""
    neighbours = zip(HISTOGRAM_EDGES[:-1], HISTOGRAM_EDGES[1:], strict=True)
    return [(rates > low) & (rates <= high) for low, high in neighbours]


def length_groups(seconds: float, reference_tokens: int) -> dict[str, str]:
    """Return the built-in groups of an utterance: how long its audio and its reference are.

    Args:
        seconds: length of the audio; NaN where it is not known.
        reference_tokens: tokens of the reference.
    """
    groups = {}
    if not math.isnan(seconds):
        index = bisect.bisect_right(AUDIO_LENGTH_EDGES, seconds)
        groups[AUDIO_LENGTH] = LENGTHS[AUDIO_LENGTH][index]
    index = bisect.bisect_left(REFERENCE_LENGTH_EDGES, reference_tokens)
    groups[REFERENCE_LENGTH] = LENGTHS[REFERENCE_LENGTH][index]
    return groups


def _group_rates(
    column: str, tallies: Mapping[str, TalliesByUnit], resampling: Resampling
) -> dict[str, GroupRates]:
    """Return the rates of each group of a column: lengths in ascending order, others by name."""
    order: Sequence[str] = LENGTHS.get(column) or sorted(tallies)
    groups = {}
    for group in order:
        if group in tallies:
            rates = tallies[group].rates(resampling)
            groups[group] = GroupRates(
                **asdict(rates.corpus), character=rates.character, word=rates.word
            )
    return groups


def _without_rarest(counter: Counter[tuple[str, ...]]) -> Counter[tuple[str, ...]]:
    """Return the counter itself or, if it is too large for memory, its more frequent half."""
    if len(counter) <= MOST_KEPT:
        return counter
    return Counter(dict(counter.most_common(MOST_KEPT // 2)))


def _most_frequent(counter: Counter[tuple[str, ...]]) -> list[list[str | int]]:
    """Return the most frequent items as [token, ..., times]."""
    ordered = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    return [[*tokens, times] for tokens, times in ordered[:MOST_CONFUSIONS]]
