"""Labelled manifests -> training examples: which rows are learnt from, and why the others are not.

Owns the filters of the `data` section and their report of rows and hours for each reason.
"""

import contextlib
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from simpler_distil_whisper.config import ConfigError, NonNegativeFloat
from simpler_distil_whisper.data.audio import AudioError, audio_seconds, check_length
from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.data.manifest import (
    Manifest,
    Rejection,
    Utterance,
    first_reasons,
    reject,
)
from simpler_distil_whisper.decoding.batches import in_batches
from simpler_distil_whisper.files import read_files
from simpler_distil_whisper.labels.filters import (
    BROKEN_CHARACTER,
    INCOMPLETE,
    is_cut_off,
    why_dropped_by_error_rate,
)
from simpler_distil_whisper.labels.threshold import suggest_for_rows
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.special_tokens import special_tokens
from simpler_distil_whisper.model.whisper import load_tokenizer
from simpler_distil_whisper.progress import Progress
from simpler_distil_whisper.run import DataError, log
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

UNREADABLE = "unreadable audio"
BAD = ("unusable row", UNREADABLE)  # the reasons that count against max_bad_fraction
WITH_SEGMENTS = "with segments"
WITH_SAMPLED_TEXTS = "with sampled texts"
SAMPLED_TEXTS_LEFT_OUT = "without some of their sampled texts, which cannot be learnt"
WITHOUT_END = "learnt without an end token, since they were cut off"
CLEANED = "without their control characters and other characters that are no speech"


class Selection(NamedTuple):
    """The examples that passed all filters, and the rows that did not.

    Attributes:
        examples: what is trained on.
        rejections: every other row, with the reason.
        report: kind of reason, or "kept" -> {"rows": ..., "hours": ...}.
        max_error_rate: up to which rows were kept; None: any.
    """

    examples: list[Example]
    rejections: list[Rejection]
    report: dict[str, dict[str, float]]
    max_error_rate: float | None

    @property
    def epoch_size(self) -> float:
        """How many uses of examples make an epoch."""
        return sum(example.weight for example in self.examples)

    def check(self, max_bad_fraction: float) -> "Selection":
        """Return the selection itself, with the report logged.

        Raises:
            DataError: more than `max_bad_fraction` of the rows is unusable, or none is left.
        """
        for kind, count in self.report.items():
            log.info("training rows, %s: %d (%.2f h)", kind, count["rows"], count["hours"])
        bad = sum(self.report[kind]["rows"] for kind in BAD if kind in self.report)
        rows = len(self.examples) + len(self.rejections)
        if bad > max_bad_fraction * rows or not self.examples:
            raise DataError(
                f"of {rows} training rows {bad} are unusable, data.max_bad_fraction is "
                f"{max_bad_fraction:g}, and {len(self.examples)} pass the filters. "
                f"The first reasons:{first_reasons(self.rejections)}"
            )
        return self


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
    """Turns utterances into examples, or gives the reason why not."""

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

    def select(self, manifests: Sequence[Manifest]) -> Selection:
        """Return the examples of all manifests; rows and hours are counted for every reason."""
        examples: list[Example] = []
        rejections = [rejection for manifest in manifests for rejection in manifest.rejections]
        hours: dict[str, list[float]] = {"kept": [], "unusable row": [0.0] * len(rejections)}
        weights = self.data.train_weights or [1.0] * len(manifests)
        weighted = [
            (utterance, weight)
            for manifest, weight in zip(manifests, weights, strict=True)
            for utterance in manifest.utterances
        ]
        utterances = [utterance for utterance, _ in weighted]
        self.kept.clear()
        max_error_rate = self._max_error_rate(utterances)
        lengths = _lengths(utterances, self.data.min_duration_seconds, self.max_seconds)
        progress = Progress("reading rows and audio headers", "rows", len(utterances))
        for (utterance, weight), length in progress.over(zip(weighted, lengths, strict=True)):
            seconds = 0.0 if isinstance(length, Dropped) else length
            try:
                if isinstance(length, Dropped):
                    raise length
                examples.append(self.example(utterance, seconds, weight, max_error_rate))
                kind = "kept"
            except Dropped as dropped:
                kind = dropped.kind
                rejections.append(reject(utterance, str(dropped)))
            hours.setdefault(kind, []).append(seconds / 3600)
        report = {
            kind: {"rows": len(each), "hours": round(sum(each), 4)}
            for kind, each in hours.items()
            if each or kind == "kept"
        }
        self._log_how_they_are_learnt(examples)
        return Selection(examples, rejections, report, max_error_rate)

    def _max_error_rate(self, utterances: Sequence[Utterance]) -> float | None:
        """Return the config's highest error rate, or the one that these rows suggest."""
        if self.data.max_error_rate != "auto":
            return self.data.max_error_rate
        rows = (utterance.row for utterance in utterances)
        columns = self.data.columns
        suggestion = suggest_for_rows(rows, columns.error_rate)
        threshold = suggestion.max_error_rate
        if threshold is None:
            log.warning(
                'data.max_error_rate "auto": none, since no row has an error rate under "%s": '
                "the rows have no references, or labelling has not written them. What is under "
                '"%s" is learnt',
                columns.error_rate,
                columns.text,
            )
        else:
            reasoning = " ".join(suggestion.reasoning)
            log.info('data.max_error_rate "auto": %.2f. %s', threshold, reasoning)
        return threshold

    def _log_how_they_are_learnt(self, examples: Sequence[Example]) -> None:
        for kind, count in (+self.kept).items():
            log.info("kept training rows, %s: %d", kind, count)
        if self.data.timestamp_probability and not self.kept[WITH_SEGMENTS]:
            log.warning(
                "data.timestamp_probability is %g, but no row can be learnt with timestamps: set "
                "decoding.timestamps or pack.enabled when labelling",
                self.data.timestamp_probability,
            )
        if self.data.previous_text_probability:
            count = sum(bool(example.previous) for example in examples)
            write = log.info if count else log.warning
            write("kept training rows, with previous text: %d", count)

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


def _lengths(
    utterances: Sequence[Utterance], shortest: float, longest: float
) -> Iterator[float | Dropped]:
    """Yield the length of each utterance, or why it cannot be used.

    A length that the row states is relied on until the audio is decoded. Only the headers of others
    are read.
    """
    for some in in_batches(utterances, 1000):
        stated = [_trusted_seconds(utterance, shortest, longest) for utterance in some]
        unknown = [row for row, seconds in zip(some, stated, strict=True) if seconds is None]
        read = iter(read_files(_header_seconds, unknown))
        yield from (next(read) if seconds is None else seconds for seconds in stated)


def _trusted_seconds(utterance: Utterance, shortest: float, longest: float) -> float | None:
    """Return the length that a row states; None where its header is to be read.

    No row is dropped for a length that labelling has measured: the file may be another one by now.
    """
    stated = utterance.stated_seconds
    is_part = utterance.duration_seconds is not None
    return stated if stated is None or is_part or shortest <= stated <= longest else None


def _header_seconds(utterance: Utterance) -> float | Dropped:
    try:
        return audio_seconds(*utterance.clip)
    except AudioError as error:
        return Dropped(UNREADABLE, f"{utterance.audio}: {error}")
