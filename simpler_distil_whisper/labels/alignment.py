"""One reference for a whole recording -> the part of it that belongs to each row.

Owns where the reference is cut, and when it is not known where. Nothing is guessed: a cut needs
matching tokens on both sides. "Tokens" are the characters or words that error rates count.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from simpler_distil_whisper.evaluation.metrics import Scorer, align
from simpler_distil_whisper.text.languages import MIXED_TOKEN, Unit, tokens

Integers = npt.NDArray[np.int64]

NEIGHBOURS = 20  # tokens of the hypothesis on either side of a cut that are looked at
MATCHES = 0.35  # share of them that must be in the reference, close to the cut
LONGEST_MISMATCH = 5  # tokens from a cut to the nearer match, and missing on one side alone

PLACE_UNKNOWN = "where it begins or ends in the reference is not known"
OPENING = ("Ps", "Pi")  # Unicode categories of what belongs to the word after it
WORDS: dict[Unit, re.Pattern[str]] = {
    "character": re.compile(r"\S"),
    "word": re.compile(r"\S+"),
    "mixed": MIXED_TOKEN,
}


@dataclass(frozen=True)
class ReferencePart:
    """What a reference has for one text of the hypothesis.

    Attributes:
        text: as the reference writes it, empty if it has nothing there; None: it is not known.
        reason: why it is not known.
    """

    text: str | None
    reason: str | None = None


@dataclass(frozen=True)
class _Written:
    """A text as it is written, and the tokens that are compared.

    Attributes:
        text: the text.
        tokens: normalised one by one; punctuation is none, and a word can be several.
        starts: the character at which the word of each token begins.
        ends: the character after it.
    """

    text: str
    tokens: list[str]
    starts: list[int]
    ends: list[int]

    def character(self, place: int) -> int:
        """Return the character at which the text is cut before a token; punctuation stays left."""
        if place in (0, len(self.tokens)):
            return len(self.text) if place else 0
        between = range(self.ends[place - 1], self.starts[place])
        opening = (at for at in between if unicodedata.category(self.text[at]) in OPENING)
        return next(opening, self.starts[place])

    def is_after_punctuation(self, place: int) -> bool:
        """Return whether a punctuation mark, or the text's end, stands before a token."""
        if place in (0, len(self.tokens)):
            return True
        before = self.text[self.ends[place - 1] - 1 : self.starts[place]]
        return any(unicodedata.category(character)[0] == "P" for character in before)


def reference_parts(
    reference: str, texts: Sequence[str], language: str | None, scorer: Scorer
) -> list[ReferencePart]:
    """Return the part of a reference that belongs to each of some consecutive texts.

    The parts follow each other as the texts do; together they are the reference if all are known.

    Args:
        reference: of all texts together, not normalised.
        texts: the hypothesis, piece by piece, not normalised.
        language: of all; None: the script of the reference decides.
        scorer: normalises the copies that are compared, and chooses the unit.
    """
    unit = scorer.unit(reference, "".join(texts), language)

    @functools.cache
    def tokens_of(word: str) -> list[str]:
        return tokens(scorer.normalize(word, language), unit)

    written = _written(reference, unit, tokens_of)
    hypotheses = [_written(text, unit, tokens_of).tokens for text in texts]
    places = _matching_places(written.tokens, [token for each in hypotheses for token in each])
    if not written.tokens:
        return [ReferencePart("")] * len(texts)
    cuts = [_cut(int(bound), places, written) for bound in np.cumsum([0, *map(len, hypotheses)])]
    return [_part(written, first, last) for first, last in pairwise(cuts)]


def _written(text: str, unit: Unit, tokens_of: Callable[[str], list[str]]) -> _Written:
    written = _Written(text, [], [], [])
    for match in WORDS[unit].finditer(text):
        for token in tokens_of(match.group()):
            written.tokens.append(token)
            written.starts.append(match.start())
            written.ends.append(match.end())
    return written


def _matching_places(reference: Sequence[str], hypothesis: Sequence[str]) -> Integers:
    """Return for each token of a hypothesis which one of the reference matches it; -1: none does.

    Of all alignments it is one with the fewest errors.
    """
    places = np.full(len(hypothesis), -1, np.int64)
    in_reference = in_hypothesis = 0
    for edit in align(" ".join(reference), " ".join(hypothesis), "word"):
        count = len(edit.hypothesis)
        if edit.kind == "equal":
            places[in_hypothesis : in_hypothesis + count] = in_reference + np.arange(count)
        in_reference += len(edit.reference)
        in_hypothesis += count
    return places


def _cut(bound: int, places: Integers, reference: _Written) -> int | None:
    """Return the token of a reference before which it is cut; None: that is not known.

    Args:
        bound: the token of the hypothesis before which a text begins.
        places: what `_matching_places` returns.
        reference: the reference.
    """
    first, stop = max(bound - NEIGHBOURS, 0), min(bound + NEIGHBOURS, len(places))
    left = [number for number in range(first, bound) if places[number] >= 0]
    right = [number for number in range(bound, stop) if places[number] >= 0]
    if (first < bound and not left) or (bound < stop and not right):
        return None
    low = int(places[left[-1]]) + 1 if left else 0
    high = int(places[right[0]]) if right else len(reference.tokens)
    near_left = sum(places[number] >= low - 2 * NEIGHBOURS for number in left)
    near_right = sum(places[number] < high + 2 * NEIGHBOURS for number in right)
    before = bound - left[-1] - 1 if left else 0
    after = right[0] - bound if right else 0
    if (
        min(before, after) > LONGEST_MISMATCH
        or abs(high - low - before - after) > LONGEST_MISMATCH
        or near_left < MATCHES * (bound - first)
        or near_right < MATCHES * (stop - bound)
    ):
        return None
    # Among tokens that match nothing: where a sentence ends, or else where the share is the same.
    likely = low + (high - low) * before / max(before + after, 1)
    if bound in (0, len(places)):
        likely = 0 if bound == 0 else len(reference.tokens)
    return min(
        range(low, high + 1),
        key=lambda place: (not reference.is_after_punctuation(place), abs(place - likely)),
    )


def _part(reference: _Written, first: int | None, last: int | None) -> ReferencePart:
    if first is None or last is None:
        return ReferencePart(None, PLACE_UNKNOWN)
    if last <= first:
        return ReferencePart("")
    return ReferencePart(
        reference.text[reference.character(first) : reference.character(last)].strip()
    )
