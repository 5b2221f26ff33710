"""A labelled row -> the example that is learnt from, or the reason why it is not.

Owns the filters of the `data` section. What becomes of whole manifests is up to `selection`.
"""

import contextlib
import math
from array import array
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from simpler_distil_whisper.config import ConfigError, NonNegativeFloat
from simpler_distil_whisper.data.audio import AudioError, check_length
from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.data.manifest import (
    Utterance,
)
from simpler_distil_whisper.labels.filters import (
    BROKEN_CHARACTER,
    INCOMPLETE,
    is_cut_off,
    why_dropped_by_error_rate,
)
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.special_tokens import special_tokens
from simpler_distil_whisper.model.whisper import load_tokenizer
from simpler_distil_whisper.text.languages import without_spaces
from simpler_distil_whisper.text.normalization import is_blank
from simpler_distil_whisper.training.options import TrainingData
from simpler_distil_whisper.training.tokens import (
    Dropped,
    Example,
    LabelSegment,
    LabelTokenizer,
    learnt_text,
)

WITH_SEGMENTS = "with segments"
WITH_SAMPLED_TEXTS = "with sampled texts"
SAMPLED_TEXTS_LEFT_OUT = "without some of their sampled texts, which cannot be learnt"
WITHOUT_END = "learnt without an end token, since they were cut off"
CLEANED = "without their control characters and other characters that are no speech"


class _Segment(BaseModel):
    """What each of a row's segments must hold; it may hold more."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    start_seconds: NonNegativeFloat
    end_seconds: NonNegativeFloat | None
    text: str


_SEGMENTS = TypeAdapter(list[_Segment])


def example_filter(data: TrainingData, model: ModelFolder) -> "ExampleFilter":
    """Return the filter of what a model can be given.

    Raises:
        ConfigError: the model lacks a token that the config needs.
    """
    tokenizer = load_tokenizer(model)
    tokens = special_tokens(tokenizer, model)
    label_tokenizer = LabelTokenizer(tokenizer, tokens, model.config["max_target_positions"])
    return ExampleFilter(data, label_tokenizer, model.window_seconds)


class ExampleFilter:
    """Turns utterances into examples, or gives the reason why not.

    Attributes:
        max_seconds: the longest audio.
        kept: how the examples so far are learnt -> how many.
    """

    def __init__(
        self, data: TrainingData, label_tokenizer: LabelTokenizer, window_seconds: float
    ) -> None:
        """Resolve the limits that the config leaves to the model.

        Raises:
            ConfigError: the model lacks a token that the config needs.
        """
        tokens = label_tokenizer.tokens
        if data.timestamp_probability and not tokens.timestamps:
            raise ConfigError("data.timestamp_probability: the model has no timestamp tokens")
        if data.previous_text_probability and tokens.previous is None:
            raise ConfigError(
                "data.previous_text_probability: the model has no token <|startofprev|>"
            )
        self.data = data
        self.tokens = tokens
        self.label_tokenizer = label_tokenizer
        self.max_positions = label_tokenizer.max_positions
        self.max_seconds = min(data.max_duration_seconds or window_seconds, window_seconds)
        longest = label_tokenizer.max_label_tokens
        self.max_label_tokens = min(data.max_label_tokens or longest, longest)
        self.kept: Counter[str] = Counter()

    def example(
        self,
        utterance: Utterance,
        seconds: float,
        weight: float = 1.0,
        max_error_rate: float | None = None,
    ) -> Example:
        """Return the example that is made of an utterance.

        Args:
            utterance: a row.
            seconds: its length.
            weight: how often an epoch uses it.
            max_error_rate: of the label; None: any.

        Raises:
            Dropped: it is not to be learnt.
            ConfigError: the model has no token for the task.
        """
        row, columns = utterance.row, self.data.columns
        # A label that a person wrote is not what the teacher's evidence is about.
        by_teacher = columns.text != columns.reference
        complete = not (by_teacher and is_cut_off(row))
        text = learnt_text(utterance.text or "", complete)
        if is_blank(text):
            raise Dropped("no label", f'"{columns.text}" is empty')
        self._check_error_rate(row, max_error_rate)
        if by_teacher:
            self._check_evidence(row)
        self._check_length(seconds)
        label = self._label_tokens(text)
        prompt = self.tokens.prompt(self._language(utterance), self.data.task)
        previous = self._previous(utterance)
        segments = self._timed_segments(utterance, text, len(prompt) - 1, complete)
        sampled = self._sampled(utterance, prompt)
        end = [self.tokens.end] if complete else []
        self.kept[WITHOUT_END] += not complete
        cut_off = "" if complete else BROKEN_CHARACTER
        self.kept[CLEANED] += text != (utterance.text or "").rstrip(cut_off)
        tokens = array("i", [*prompt, *label, *end])
        return Example(
            utterance, seconds, tokens, len(prompt), weight, segments, previous, complete, sampled
        )

    def _check_error_rate(self, row: Row, maximum: float | None) -> None:
        required = self.data.max_error_rate != "auto"
        if maximum is None and not required:
            maximum = math.inf  # text where the reference has no speech is dropped even so
        column = self.data.columns.error_rate
        if dropped := why_dropped_by_error_rate(row, column, maximum, required=required):
            raise Dropped(*dropped)

    def _check_evidence(self, row: Row) -> None:
        """Raise Dropped if the teacher's evidence speaks against its label."""
        if is_cut_off(row) and self.data.incomplete_labels == "drop":
            raise Dropped(
                INCOMPLETE,
                "the label was cut off: label with more decoding.max_new_tokens, or set "
                "data.incomplete_labels to without_end",
            )
        if dropped := self.data.why_dropped_by_evidence(row):
            raise Dropped(*dropped)

    def _check_length(self, seconds: float) -> None:
        try:
            check_length(seconds, self.data.min_duration_seconds, self.max_seconds)
        except AudioError as error:
            kind, _, _ = str(error).partition(":")
            raise Dropped(kind, str(error)) from None

    def _label_tokens(self, text: str) -> "array[int]":
        label, limit = self.label_tokenizer(text), self.max_label_tokens
        if len(label) > limit:
            raise Dropped("label too long", f"label of {len(label)} tokens, the maximum is {limit}")
        return label

    def _language(self, utterance: Utterance) -> str | None:
        """Return the language of the prompt; None only if the model has no tokens for any."""
        language = utterance.language or self.data.language
        if language is None and self.tokens.languages:
            raise Dropped("no language", "neither the row nor the config names the language")
        return language

    def _previous(self, utterance: Utterance) -> Sequence[int]:
        """Return the tokens of the previous text, as far back as a decoder is given them."""
        column = self.data.columns.previous_text
        text = utterance.row.get(column) if self.data.previous_text_probability else None
        if text is not None and not isinstance(text, str):
            raise Dropped("unusable previous text", f'"{column}" is not a string: {text!r}')
        if text is None or is_blank(text):
            return ()
        # As in openai/whisper: half of the positions, <|startofprev|> included, is for the past.
        return self.label_tokenizer(text, "previous text")[-(self.max_positions // 2 - 1) :]

    def _sampled(self, utterance: Utterance, prompt: Sequence[int]) -> "tuple[array[int], ...]":
        """Return the sampled texts that can be learnt, each with prompt and end token."""
        column = self.data.columns.sampled_texts
        texts = utterance.row.get(column) if self.data.sampled_text_probability else None
        if texts is None:
            return ()
        sampled = []
        texts = texts if isinstance(texts, list) else [texts]
        for text in texts:
            with contextlib.suppress(Dropped):
                tokens = self.label_tokenizer(text) if isinstance(text, str) else ()
                if 0 < len(tokens) <= self.max_label_tokens and not is_blank(learnt_text(text)):
                    sampled.append(array("i", [*prompt, *tokens, self.tokens.end]))
        self.kept[WITH_SAMPLED_TEXTS] += bool(sampled)
        self.kept[SAMPLED_TEXTS_LEFT_OUT] += len(sampled) < len(texts)
        return tuple(sampled)

    def _timed_segments(
        self, utterance: Utterance, label: str, prompt_length: int, complete: bool
    ) -> tuple[LabelSegment, ...]:
        """Return the label's segments with times; none if it is to be learnt without timestamps.

        Args:
            utterance: whose segments they are.
            label: the text that is learnt.
            prompt_length: how many tokens stand before the first timestamp.
            complete: whether the label was not cut off.
        """
        if not self.data.timestamp_probability:
            return ()
        segments = self._segments(utterance)
        texts = [learnt_text(each.text, complete) for each in segments]
        tokens = [self.label_tokenizer(text, "segment") for text in texts]
        timed = tuple(
            LabelSegment(each.start_seconds, each.end_seconds, own)
            for each, own in zip(segments, tokens, strict=True)
        )
        positions = prompt_length + sum(len(each.tokens) + 2 for each in timed)
        if not segments:
            kind = "without segments"
        elif without_spaces("".join(texts)) != without_spaces(label):
            # Spaces do not count: between segments that are joined there may be one or none.
            kind = "without timestamps, since their segments are not the label"
        elif positions > self.max_positions:
            kind = "without timestamps, since with them they are too long"
        else:
            kind = WITH_SEGMENTS
        self.kept[kind] += 1
        return timed if kind == WITH_SEGMENTS else ()

    def _segments(self, utterance: Utterance) -> list[_Segment]:
        """Return a row's segments, without those that have no text.

        Raises:
            Dropped: they are malformed, or their times go back.
        """
        column, kind = self.data.columns.segments, "malformed segments"
        try:
            segments = _SEGMENTS.validate_python(utterance.row.get(column) or [])
        except ValidationError as error:
            problem = error.errors()[0]
            where = "".join(f"[{part!r}]" for part in problem["loc"])
            raise Dropped(kind, f'"{column}"{where}: {problem["msg"]}') from None
        times = [time for each in segments for time in (each.start_seconds, each.end_seconds)]
        if None in times[:-1]:
            raise Dropped(kind, f'"{column}": only the last segment may lack its end')
        known = [time for time in times if time is not None]
        if known != sorted(known):
            raise Dropped(kind, f'"{column}": the times go back: {known}')
        return [each for each in segments if not is_blank(each.text)]
