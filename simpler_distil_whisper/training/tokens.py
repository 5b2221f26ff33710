"""Labels -> what the decoder is given and learns to predict, as token ids.

Owns the order of the tokens: previous text, prompt, label with or without timestamps, end token.
Also which texts have no tokens that could be learnt. It reads no audio.
"""

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import WhisperTokenizer

from simpler_distil_whisper.data.manifest import Utterance
from simpler_distil_whisper.labels.filters import BROKEN_CHARACTER
from simpler_distil_whisper.model.settings import is_added_word
from simpler_distil_whisper.model.special_tokens import TIME_STEP, SpecialTokens
from simpler_distil_whisper.text.normalization import INVISIBLE
from simpler_distil_whisper.training.augment import View
from simpler_distil_whisper.training.losses import IGNORE_INDEX
from simpler_distil_whisper.training.options import TrainingData
from simpler_distil_whisper.training.plan import Drawn, Visit, draw


class Dropped(Exception):
    """What is not to be learnt: `kind` for the report, the message for rejected.jsonl."""

    def __init__(self, kind: str, reason: str) -> None:
        """Keep the kind; the reason is the exception's message."""
        super().__init__(reason)
        self.kind = kind


# Byte order marks, soft hyphens, zero-width spaces, direction marks and control characters: they
# belong to files and layout, not to speech. Not joiners, which change letters in many scripts.
UNSPOKEN = re.compile(
    r"[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"
    r"\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]"
)
LINE_BREAK = re.compile(r"\s*[\t-\r\x85\u2028\u2029]\s*")
IN_SPECIAL_BRACKETS = re.compile(r"<\|[^<|>]*\|>")


def learnt_text(text: str, complete: bool = True) -> str:
    """Return what is learnt of a label: one line, without characters that are no speech.

    Args:
        text: the label.
        complete: whether its end is that of the speech; else its last character may be broken.
    """
    lines = LINE_BREAK.sub("\n", UNSPOKEN.sub("", text)).removesuffix("\n")
    return lines.replace("\n", " ").rstrip("" if complete else BROKEN_CHARACTER)


class LabelTokenizer:
    """Turns the text of a label into token ids.

    Attributes:
        max_positions: how many tokens the decoder can be given.
    """

    def __init__(
        self, tokenizer: WhisperTokenizer, tokens: SpecialTokens, max_positions: int
    ) -> None:
        """Keep the model's tokenizer, special tokens and number of decoder positions."""
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.max_positions = max_positions
        self._special = frozenset({tokens.end, *tokens.control})

    @property
    def max_label_tokens(self) -> int:
        """The longest label that fits behind a prompt without timestamps.

        The end token needs no position: it is predicted, but never given to the decoder.
        """
        prompt_length = 4 if self.tokens.languages else 2  # start (language, task) no timestamps
        return self.max_positions - prompt_length

    def __call__(self, text: str, what: str = "label") -> "array[int]":
        """Return the token ids of a text.

        Args:
            text: only `learnt_text` of it is used, and no special tokens are added.
            what: "label", "segment" or "previous text"; only the last may hold characters of which
                bytes are missing.

        Raises:
            Dropped: it holds such a character, or special tokens such as `<|endoftext|>`.
        """
        learnt = learnt_text(text)
        if BROKEN_CHARACTER in learnt and what != "previous text":
            raise Dropped(f"broken character in {what}", f"the {what} holds U+FFFD: {learnt!r}")
        ids = array("i", self.tokenizer(learnt, add_special_tokens=False).input_ids)
        special = self.tokenizer.convert_ids_to_tokens(sorted(self._special.intersection(ids)))
        # Also those that this tokenizer lacks, or that a joiner keeps it from seeing.
        for name in IN_SPECIAL_BRACKETS.findall(INVISIBLE.sub("", learnt)):
            if name not in special and not is_added_word(name, special=False):
                special.append(name)
        if special:
            raise Dropped(
                f"special token in {what}",
                f"the {what} holds {', '.join(special)}, which is no speech",
            )
        return ids


class LabelSegment(NamedTuple):
    """A segment of a label; `end_seconds` is None where only its beginning is known."""

    start_seconds: float
    end_seconds: float | None
    tokens: "array[int]"


@dataclass(frozen=True, slots=True)
class Example:
    """An utterance with the tokens that the decoder learns.

    Attributes:
        utterance: where the audio is.
        seconds: its length, from the file's header.
        tokens: prompt, label and, of a complete label, the end token; without timestamps.
        prompt_length: how many of them are given, not learnt.
        weight: how often an epoch uses the example.
        segments: the label once more, with times; empty if it is not learnt with timestamps.
        previous: tokens of the text before it in the recording, as many as a decoder may be given.
        sampled: further texts of the teacher's, as `tokens` has the label.
        complete: whether the label's end is that of the speech, so that the end token is learnt.
    """

    utterance: Utterance
    seconds: float
    tokens: "array[int]"
    prompt_length: int
    weight: float = 1.0
    segments: tuple[LabelSegment, ...] = ()
    previous: Sequence[int] = ()
    complete: bool = True
    sampled: "tuple[array[int], ...]" = ()


class DecoderTokens(NamedTuple):
    """The token sequence of one visit.

    Attributes:
        tokens: previous text, prompt, label and, of a complete label, the end token.
        prompt_length: how many of them are given, not learnt.
    """

    tokens: Sequence[int]
    prompt_length: int


class VisitTokens:
    """Builds the token sequence of each visit.

    By chance with timestamps, with a sampled text instead of the label, or with previous text.

    Attributes:
        examples: to which the visits' numbers refer.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        data: TrainingData,
        tokens: SpecialTokens,
        max_positions: int,
        seed: int,
    ) -> None:
        """Keep the probabilities in `data`; the filters have checked that the tokens exist."""
        self.examples = examples
        self.data = data
        self.tokens = tokens
        self.max_positions = max_positions
        self.seed = seed

    def length(self, visit: Visit) -> int:
        """Return how many tokens a visit has."""
        return len(self.of(visit, View()).tokens)

    def of(self, visit: Visit, view: View) -> DecoderTokens:
        """Return the tokens of a visit, with timestamps as they are in the view of the audio."""
        example = self.examples[visit.example]
        tokens, prompt_length = list(example.tokens), example.prompt_length
        timestamps, previous = self.data.timestamp_probability, self.data.previous_text_probability
        sampled = self.data.sampled_text_probability
        if example.segments and self._happens(timestamps, Drawn.TIMESTAMPS, visit):
            # <|notimestamps|> is the last token of the prompt.
            prompt_length -= 1
            end = [self.tokens.end] if example.complete else []
            tokens = [*tokens[:prompt_length], *self._timed(example, view), *end]
        elif example.sampled and self._happens(sampled, Drawn.SAMPLED_TEXT, visit):
            # Another place, so other random numbers than those that decided whether.
            random = draw(self.seed, Drawn.SAMPLED_TEXT, visit.position, 1)
            tokens = [*example.sampled[random.integers(len(example.sampled))]]
        if example.previous and self._happens(previous, Drawn.PREVIOUS_TEXT, visit):
            # The last token is no input, <|startofprev|> is one more.
            room = self.max_positions - (len(tokens) - 1) - 1
            if room > 0:
                assert self.tokens.previous is not None
                given = [self.tokens.previous, *example.previous[-room:]]
                tokens, prompt_length = given + tokens, len(given) + prompt_length
        return DecoderTokens(tokens, prompt_length)

    def _happens(self, probability: float, what: Drawn, visit: Visit) -> bool:
        return draw(self.seed, what, visit.position).random() < probability

    def _timed(self, example: Example, view: View) -> list[int]:
        """Return the label with a timestamp before and after each segment."""
        timed = []
        for start, end, tokens in example.segments:
            timed += [self._timestamp(view.of_time(start)), *tokens]
            if end is not None:
                timed.append(self._timestamp(view.of_time(end)))
        return timed

    def _timestamp(self, seconds: float) -> int:
        times = self.tokens.timestamps
        return times.start + min(round(seconds / TIME_STEP), len(times) - 1)


def decoder_sequences(rows: Sequence[DecoderTokens], padding: int) -> tuple[Tensor, Tensor]:
    """Return decoder inputs and labels, both int64 [B, L], L the length of the longest row.

    They are built once, here, for teacher and student: each label is the token after its input.
    Padding is masked by its position, never by comparing ids, since Whisper pads with its end
    token, which must be learnt.

    Args:
        rows: at least one.
        padding: the id after the end of shorter rows.
    """
    # Position i is given tokens[i] and learns tokens[i + 1].
    length = max(len(row.tokens) for row in rows) - 1
    inputs = torch.full((len(rows), length), padding)
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    for number, (tokens, prompt_length) in enumerate(rows):
        end, first = len(tokens) - 1, prompt_length - 1
        inputs[number, :end] = torch.tensor(tokens[:-1])
        labels[number, first:end] = torch.tensor(tokens[prompt_length:])
    return inputs, labels
