"""Signs of invented text (hallucination), with and without a reference.

Owns the signs and the limits beyond which a text looks invented. It counts no errors, and it does
not decide which utterances are kept.
"""

from collections import Counter
from collections.abc import Sequence

from pydantic import Field

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.evaluation.metrics import ErrorCounts, Scorer
from simpler_distil_whisper.text.languages import (
    UNSPACED_CHARACTER,
    Unit,
    longest_repetition,
    without_spaces,
)

MAX_REPETITION = 10  # tokens; what people repeat is shorter
MAX_NO_SPEECH_PROBABILITY = 0.6  # beyond it openai/whisper takes improbable text for silence
MAX_LENGTH_RATIO = 2.0  # tokens of the hypothesis per token of the reference
MAX_INSERTION_RATE = 0.5  # insertions per token of the reference
FEWEST_TOKENS = 3  # fewer surplus tokens are a slip, however short the reference
# Tokens per second; nobody speaks faster. Han characters are spoken more slowly than letters.
MAX_SPEED = {"character": 25.0, "word": 8.0, "mixed": 12.0}

HALLUCINATION_LIMITS = {
    "repetition": MAX_REPETITION,
    "length_ratio": MAX_LENGTH_RATIO,
    "insertions": MAX_INSERTION_RATE,
    "output_on_silence": MAX_NO_SPEECH_PROBABILITY,
    "speed": MAX_SPEED,
}
SIGNS = ("repetition", "length_ratio", "insertions", "output_on_silence", "known_phrase", "speed")


class HallucinationOptions(StrictModel):
    """What counts as invented besides loops, lengths and text on silence."""

    phrases: list[str] = Field(
        [],
        description="Phrases that models are known to invent, such as thanks for watching; "
        "utterances are counted whose hypothesis holds one and whose reference does not.",
    )


class KnownPhrases:
    """Finds the phrases of a user's list in texts that are normalised for the metric."""

    def __init__(self, phrases: Sequence[str], scorer: Scorer) -> None:
        self._phrases = phrases
        self._scorer = scorer
        self._normalized: dict[str | None, dict[str, str]] = {}  # language -> phrase -> normalised

    def invented(self, reference: str | None, hypothesis: str, language: str | None) -> list[str]:
        """Return the phrases that a normalised hypothesis holds and its reference does not."""
        if not self._phrases:
            return []
        if language not in self._normalized:
            self._normalized[language] = {
                phrase: self._scorer.normalize(phrase, language) for phrase in self._phrases
            }
        return [
            phrase
            for phrase, normalized in self._normalized[language].items()
            if _holds(hypothesis, normalized) and not _holds(reference or "", normalized)
        ]


def signs_in(
    reference: Sequence[str] | None,
    hypothesis: Sequence[str],
    unit: Unit,
    counts: ErrorCounts | None,
    *,
    seconds: float | None,
    no_speech_probability: float | None,
) -> list[str]:
    """Return the signs of invented text that an utterance shows, but for known phrases.

    Args:
        reference: the tokens of the normalised reference; None where there is none.
        hypothesis: the tokens of the normalised hypothesis.
        unit: what a token is.
        counts: the errors; None without a reference.
        seconds: length of the audio, if known.
        no_speech_probability: the decoder's own, if known; used only without a reference.
    """
    length = len(hypothesis)
    shown = {"repetition": _loops(hypothesis, reference or [])}
    if reference is None or counts is None:
        silent = (no_speech_probability or 0) > MAX_NO_SPEECH_PROBABILITY
    else:
        silent = len(reference) == 0
        shown["length_ratio"] = (
            length > MAX_LENGTH_RATIO * len(reference) and length - len(reference) >= FEWEST_TOKENS
        )
        shown["insertions"] = (
            counts.insertions > MAX_INSERTION_RATE * len(reference)
            and counts.insertions >= FEWEST_TOKENS
        )
    shown["output_on_silence"] = silent and length > 0
    if seconds:
        shown["speed"] = length / seconds > MAX_SPEED[unit]
    return [sign for sign in SIGNS if shown.get(sign)]


def _loops(hypothesis: Sequence[str], reference: Sequence[str]) -> bool:
    """Return whether the hypothesis has a long repetition, longer than the reference has."""
    # A loop cannot be longer than all tokens that occur twice, and these are quickly counted.
    repeated = sum(times for times in Counter(hypothesis).values() if times > 1)
    if repeated <= MAX_REPETITION:
        return False
    longest = longest_repetition(hypothesis)
    return longest > MAX_REPETITION and longest > longest_repetition(reference)


def _holds(text: str, phrase: str) -> bool:
    """Return whether a text holds a phrase: as whole words, if its script separates words."""
    if not phrase:
        return False
    if UNSPACED_CHARACTER.search(phrase):
        return without_spaces(phrase) in without_spaces(text)
    return f" {phrase} " in f" {text} "
