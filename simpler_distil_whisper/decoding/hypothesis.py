"""What decoding returns for an utterance: its text and the evidence of how good the text is.

Owns the types; it needs no torch, so that the scripts can import it at once.
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Segment:
    """The text between two timestamps.

    Attributes:
        start_seconds: from the beginning of the audio.
        end_seconds: likewise; None if the model gave no end: then it is the end of the audio.
        text: without special tokens.
    """

    start_seconds: float
    end_seconds: float | None
    text: str


class TimedToken(NamedTuple):
    """A token of text with its time in seconds, and its probability among the tokens of text."""

    id: int
    start: float
    end: float
    probability: float

    def shifted(self, seconds: float) -> "TimedToken":
        """Return the same some seconds later."""
        return self._replace(start=self.start + seconds, end=self.end + seconds)


@dataclass(frozen=True)
class TimedWord:
    """A word of a segment and when it was spoken.

    Attributes:
        word: with the space before it and the punctuation around it: the words of a segment are
            its text.
        start: seconds from the beginning of the audio.
        end: likewise.
        probability: the mean of its tokens, without the punctuation.
    """

    word: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class SegmentWithWords(Segment):
    """A segment from the start of its first word to the end of its last one."""

    words: tuple[TimedWord, ...]


@dataclass(frozen=True)
class WindowEvidence:
    """How probable the segments are that one window of a long recording contributes.

    Attributes:
        segment_tokens: the number of tokens of each of them, timestamps included.
        average_log_probability, no_speech_probability, temperature: of the whole window.
        complete: nothing is missing after them because of the limit of tokens.
    """

    segment_tokens: tuple[int, ...]
    average_log_probability: float
    no_speech_probability: float | None
    temperature: float
    complete: bool


@dataclass(frozen=True)
class Hypothesis:
    """The model's text for one utterance, and how probable it is.

    Attributes:
        text: without special tokens; with the space before the first word that real Whispers
            write, so that tokenising it gives the model's own tokens back.
        language: code of the language that was given or detected.
        token_ids: the tokens of the text and the timestamps, without the end token.
        segments: the texts between the timestamps; empty without timestamps.
        average_log_probability: of the tokens and the end token, natural logarithm.
        no_speech_probability: of `<|nospeech|>` as the first token; None if the model has none.
        compression_ratio: bytes of the text over its zlib-compressed bytes; high for loops.
        temperature: at which the tokens were sampled; 0 for the most probable ones.
        complete: the model ended the text itself; False if it reached `max_new_tokens`.
        windows: of a recording longer than the window: the evidence, window by window.
        sampled_texts: what else the model gave the audio, by chance, as far as it ended there.
    """

    text: str
    language: str
    token_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    average_log_probability: float
    no_speech_probability: float | None
    compression_ratio: float
    temperature: float
    complete: bool
    windows: tuple[WindowEvidence, ...] = ()
    sampled_texts: tuple[str, ...] = ()

    @property
    def token_count(self) -> int:
        """The number of tokens, without the end token."""
        return len(self.token_ids)

    def evidence(self) -> dict[str, object]:
        """Return the columns that a labelled row keeps besides the text, rounded."""
        no_speech = self.no_speech_probability
        return {
            "average_log_probability": round(self.average_log_probability, 4),
            "no_speech_probability": None if no_speech is None else round(no_speech, 4),
            "compression_ratio": round(self.compression_ratio, 3),
            "temperature": self.temperature,
            "complete": self.complete,
        }


def without_speech(language: str) -> Hypothesis:
    """Return the hypothesis of audio in which nobody speaks, which is not decoded: no text."""
    return Hypothesis(
        text="",
        language=language,
        token_ids=(),
        segments=(),
        average_log_probability=0.0,
        no_speech_probability=1.0,
        compression_ratio=0.0,
        temperature=0.0,
        complete=True,
    )


def compression_ratio(text: str) -> float:
    """Return the bytes of a text over its compressed bytes, openai/whisper's measure of loops."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))
