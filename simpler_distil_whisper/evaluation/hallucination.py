"""Signs that a system said what nobody said, with and without a reference.

Owns the limits beyond which a text looks invented; it counts no errors. Called by `scoring.py`, and
by `label_quality.py` for the limits that labels share.
"""

from collections import Counter
from collections.abc import Sequence

from pydantic import Field

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.evaluation.metrics import ErrorCounts, Scorer
from simpler_distil_whisper.text.languages import UNSPACED_CHARACTER, Unit, longest_repetition

MAX_REPETITION = 10  # tokens; what people say twice in a row is shorter
MAX_NO_SPEECH_PROBABILITY = 0.6  # beyond it openai/whisper takes the audio for silence
MAX_LENGTH_RATIO = 2.0  # tokens of the hypothesis to those of the reference
MAX_INSERTION_RATE = 0.5  # insertions to tokens of the reference
FEWEST_TOKENS = 3  # too many; less is a slip, however short the reference
# Tokens per second that nobody can say. Whole characters are slower than letters of an alphabet.
MAX_SPEED = {"character": 25.0, "word": 8.0, "mixed": 12.0}

LIMITS = {
    "repetition": MAX_REPETITION,
    "length_ratio": MAX_LENGTH_RATIO,
    "insertions": MAX_INSERTION_RATE,
    "output_on_silence": MAX_NO_SPEECH_PROBABILITY,
    "speed": MAX_SPEED,
}
SIGNS = ("repetition", "length_ratio", "insertions", "output_on_silence", "known_phrase", "speed")


class HallucinationOptions(StrictModel):
    """What counts as invented beside loops, lengths and text on silence."""

    phrases: list[str] = Field(
        [],
        description="Sentences that models are known to invent, such as thanks for watching; "
        "utterances are counted whose hypothesis holds one and whose reference does not.",
    )


class KnownPhrases:
    """Finds the phrases of a user's list in texts, compared as the metric compares."""

    def __init__(self, phrases: Sequence[str], scorer: Scorer) -> None:
        """Keep the phrases as they are; each language normalises them in its own way."""
        self._phrases, self._scorer = phrases, scorer
        self._normalized: dict[str | None, dict[str, str]] = {}

    def invented(self, reference: str | None, hypothesis: str, language: str | None) -> list[str]:
        """Return the phrases that a normalised hypothesis holds and its reference does not."""
        if not self._phrases:
            return []
        if language not in self._normalized:
            normalize = self._scorer.normalize
            self._normalized[language] = {p: normalize(p, language) for p in self._phrases}
        return [
            phrase
            for phrase, wanted in self._normalized[language].items()
            if _holds(hypothesis, wanted) and not _holds(reference or "", wanted)
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
    """Return which signs of an invented text an utterance shows, but for known phrases.

    Args:
        reference: its tokens; None where nobody has written down what was said.
        hypothesis: the system's tokens.
        unit: what a token is.
        counts: the errors; None without a reference.
        seconds: how long the audio is, if known.
        no_speech_probability: the decoder's own, if known; looked at only without a reference.
    """
    said, wanted = len(hypothesis), None if reference is None else len(reference)
    found = {"repetition": _loops(hypothesis, reference or [])}
    if wanted is None or counts is None:
        silent = (no_speech_probability or 0) > MAX_NO_SPEECH_PROBABILITY
    else:
        silent = wanted == 0
        found["length_ratio"] = said > MAX_LENGTH_RATIO * wanted and said - wanted >= FEWEST_TOKENS
        inserted = counts.insertions
        found["insertions"] = inserted > MAX_INSERTION_RATE * wanted and inserted >= FEWEST_TOKENS
    found["output_on_silence"] = silent and said > 0
    found["speed"] = bool(seconds) and said / seconds > MAX_SPEED[unit] if seconds else False
    return [sign for sign in SIGNS if found.get(sign)]


def _loops(hypothesis: Sequence[str], reference: Sequence[str]) -> bool:
    """Return whether a text repeats itself for long, and for longer than what was said."""
    # A loop cannot be longer than all tokens that occur twice, which are soon counted.
    again = sum(times for times in Counter(hypothesis).values() if times > 1)
    if again <= MAX_REPETITION:
        return False
    repeated = longest_repetition(hypothesis)
    return repeated > MAX_REPETITION and repeated > longest_repetition(reference)


def _holds(text: str, phrase: str) -> bool:
    """Return whether a phrase stands in a text, whole words of it where its script has words."""
    if not phrase:
        return False
    return phrase in text if UNSPACED_CHARACTER.search(phrase) else f" {phrase} " in f" {text} "
