"""From labelled manifests to the examples of a training run, and to its batches.

Owns the filters, each of which says what it dropped, and the two token sequences of each visit to
an example. Called by `run_distillation.py`, and by `trainer.py` in worker processes.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import Dataset
from transformers import WhisperFeatureExtractor, WhisperTokenizer

from simpler_distil_whisper.config import ConfigError, NonNegativeFloat
from simpler_distil_whisper.data.audio import SAMPLE_RATE, AudioError, load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.data.manifest import Manifest, Rejection, Utterance, reject
from simpler_distil_whisper.model.teacher_cache import (
    CachedDecoderStates,
    CachedEncoderStates,
    DecoderStateCache,
    EncoderStateCache,
)
from simpler_distil_whisper.model.whisper import TIME_STEP, SpecialTokens
from simpler_distil_whisper.run import Progress, log
from simpler_distil_whisper.training.augment import View, Views
from simpler_distil_whisper.training.losses import IGNORE_INDEX
from simpler_distil_whisper.training.options import TrainingData
from simpler_distil_whisper.training.plan import Drawn, MicroBatches, Visit, draw

UNREADABLE = "unreadable audio"  # the kind of reason that counts against max_bad_fraction
WITH_SEGMENTS = "with segments"


class TimedTokens(NamedTuple):
    """A sentence of a label; `end_seconds` is None where only its beginning is known."""

    start_seconds: float
    end_seconds: float | None
    tokens: "array[int]"


@dataclass(frozen=True, slots=True)
class Example:
    """An utterance with the tokens that the decoder is to learn.

    Attributes:
        utterance: where the audio is.
        seconds: how long it is, from the file's header.
        tokens: prompt, label and end token, without timestamps.
        prompt_length: how many of them are given, not learnt.
        weight: how often an epoch uses it.
        sentences: the label once more, with times; empty if it is not learnt with timestamps.
        previous: tokens of what was said before, at most what a decoder is given of it.
    """

    utterance: Utterance
    seconds: float
    tokens: "array[int]"
    prompt_length: int
    weight: float = 1.0
    sentences: tuple[TimedTokens, ...] = ()
    previous: Sequence[int] = ()


class Dropped(Exception):
    """An utterance is not trained on; `kind` is what the report counts, the text is the reason."""

    def __init__(self, kind: str, reason: str) -> None:
        """Keep both."""
        super().__init__(reason)
        self.kind = kind


class Selection(NamedTuple):
    """The examples that passed all filters, and what became of the others.

    Attributes:
        examples: what is trained on.
        rejections: every other row, with the reason.
        report: kind of reason, or "kept" -> {"rows": ..., "hours": ...}.
    """

    examples: list[Example]
    rejections: list[Rejection]
    report: dict[str, dict[str, float]]

    @property
    def epoch_size(self) -> float:
        """How many uses of examples make an epoch."""
        return sum(example.weight for example in self.examples)


class _Segment(BaseModel):
    """What must stand in a row's segments; there may be more."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    start_seconds: NonNegativeFloat
    end_seconds: NonNegativeFloat | None
    text: str


class ExampleFilter:
    """Turns utterances into examples, or says why not."""

    def __init__(
        self,
        data: TrainingData,
        tokens: SpecialTokens,
        tokenizer: WhisperTokenizer,
        window_seconds: float,
        max_positions: int,
    ) -> None:
        """Resolve the limits that the config leaves to the model.

        Raises:
            ConfigError: the model lacks a token that the config needs.
        """
        if data.timestamp_probability and not tokens.timestamps:
            raise ConfigError("data.timestamp_probability: the model has no timestamp tokens")
        if data.previous_text_probability and tokens.previous is None:
            raise ConfigError(
                "data.previous_text_probability: the model has no token <|startofprev|>"
            )
        self.data = data
        self.tokens = tokens
        self.tokenizer = tokenizer
        self.max_seconds = min(data.max_duration_seconds or window_seconds, window_seconds)
        self.max_positions = max_positions
        self.timed: Counter[str] = Counter()
        # Inputs are the prompt and the label; the end token is only ever predicted.
        longest = max_positions - (4 if tokens.languages else 2)
        self.max_label_tokens = min(data.max_label_tokens or longest, longest)
        self.special = frozenset({tokens.end, *tokens.control})

    def select(self, manifests: Sequence[Manifest]) -> Selection:
        """Return the examples of all manifests; rows and hours are counted for every reason."""
        examples: list[Example] = []
        rejections = [rejection for manifest in manifests for rejection in manifest.rejections]
        hours: dict[str, list[float]] = {"kept": [], "unusable row": [0.0] * len(rejections)}
        weights = self.data.train_weights or [1.0] * len(manifests)
        utterances = [
            (utterance, weight)
            for manifest, weight in zip(manifests, weights, strict=True)
            for utterance in manifest.utterances
        ]
        self.timed.clear()
        progress = Progress("reading audio headers", "rows", len(utterances))
        for utterance, weight in progress.over(utterances):
            seconds = 0.0
            try:
                seconds = _header_seconds(utterance)
                examples.append(self._example(utterance, seconds, weight))
                kind = "kept"
            except Dropped as dropped:
                kind = dropped.kind
                rejections.append(
                    Rejection(utterance.number, utterance.place, str(dropped), utterance.row)
                )
            hours.setdefault(kind, []).append(seconds / 3600)
        report = {
            kind: {"rows": len(each), "hours": round(sum(each), 4)}
            for kind, each in hours.items()
            if each or kind == "kept"
        }
        self._say_what_can_be_drawn(examples)
        return Selection(examples, rejections, report)

    def _say_what_can_be_drawn(self, examples: Sequence[Example]) -> None:
        for kind, count in self.timed.items():
            log.info("kept training rows, %s: %d", kind, count)
        if self.data.timestamp_probability and not self.timed[WITH_SEGMENTS]:
            log.warning(
                "data.timestamp_probability is %g, but no row can be learnt with timestamps: set "
                "decoding.timestamps or pack.enabled when labelling",
                self.data.timestamp_probability,
            )
        if self.data.previous_text_probability:
            count = sum(bool(example.previous) for example in examples)
            say = log.info if count else log.warning
            say("kept training rows, with previous text: %d", count)

    def _example(self, utterance: Utterance, seconds: float, weight: float) -> Example:
        if not (utterance.text or "").strip():
            raise Dropped("no label", f'"{self.data.columns.text}" is empty')
        self._check_error_rate(utterance)
        if seconds < self.data.min_duration_seconds:
            minimum = self.data.min_duration_seconds
            raise Dropped("too short", f"too short: {seconds:.3f} s, the minimum is {minimum:g} s")
        if seconds > self.max_seconds:
            maximum = self.max_seconds
            raise Dropped("too long", f"too long: {seconds:.3f} s, the maximum is {maximum:g} s")
        text = self._tokens_of(utterance.text or "", "label")
        if len(text) > self.max_label_tokens:
            limit = self.max_label_tokens
            raise Dropped("label too long", f"label of {len(text)} tokens, the maximum is {limit}")
        language = utterance.language or self.data.language
        if language is None and self.tokens.languages:
            raise Dropped("no language", "neither the row nor data.language names the language")
        prompt = self.tokens.prompt(language, self.data.task)
        previous = self._previous(utterance)
        sentences = self._sentences(utterance, len(prompt) - 1)
        tokens = array("i", [*prompt, *text, self.tokens.end])
        return Example(utterance, seconds, tokens, len(prompt), weight, sentences, previous)

    def _tokens_of(self, text: str, what: str) -> "array[int]":
        ids = array("i", self.tokenizer(text, add_special_tokens=False).input_ids)
        if special := self.special.intersection(ids):
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(special)))
            reason = f"the {what} holds {names}, which is no speech"
            raise Dropped(f"special token in {what}", reason)
        return ids

    def _previous(self, utterance: Utterance) -> Sequence[int]:
        """Return the tokens of what was said before, as far back as a decoder is given them."""
        column = self.data.columns.previous_text
        text = utterance.row.get(column) if self.data.previous_text_probability else None
        if text is not None and not isinstance(text, str):
            raise Dropped("unusable previous text", f'"{column}" is not a string: {text!r}')
        if text is None or not text.strip():
            return ()
        # As in openai/whisper: half of the positions, <|startofprev|> included, is for the past.
        return self._tokens_of(text, "previous text")[-(self.max_positions // 2 - 1) :]

    def _sentences(self, utterance: Utterance, prompt_length: int) -> tuple[TimedTokens, ...]:
        """Return the label's sentences with times; none if it is to be learnt without timestamps.

        Args:
            utterance: whose segments they are.
            prompt_length: how many tokens stand before the first timestamp.
        """
        if not self.data.timestamp_probability:
            return ()
        segments = self._segments(utterance)
        sentences = tuple(
            TimedTokens(each.start_seconds, each.end_seconds, self._tokens_of(each.text, "segment"))
            for each in segments
        )
        positions = prompt_length + sum(len(tokens) + 2 for _, _, tokens in sentences)
        if not segments:
            kind = "without segments"
        elif _letters("".join(each.text for each in segments)) != _letters(utterance.text or ""):
            kind = "without timestamps, since their segments are not the label"
        elif positions > self.max_positions:
            kind = "without timestamps, since with them they are too long"
        else:
            kind = WITH_SEGMENTS
        self.timed[kind] += 1
        return sentences if kind == WITH_SEGMENTS else ()

    def _segments(self, utterance: Utterance) -> list[_Segment]:
        """Return what a row says of when its sentences were said, sentences without text left out.

        Raises:
            Dropped: that cannot be so.
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
        return [each for each in segments if each.text.strip()]

    def _check_error_rate(self, utterance: Utterance) -> None:
        maximum, column = self.data.max_error_rate, self.data.columns.error_rate
        if maximum is None:
            return
        rate = utterance.row.get(column)
        if rate is None:
            raise Dropped("no error rate", f'"{column}" is empty, so max_error_rate cannot hold')
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise Dropped("no error rate", f'"{column}" is not a number: {rate!r}')
        if rate > maximum:
            raise Dropped("error rate above maximum", f'"{column}" is {rate}, above {maximum:g}')


_SEGMENTS = TypeAdapter(list[_Segment])


def _letters(text: str) -> str:
    """Return a text without spaces: where texts are joined, there may be one or none."""
    return "".join(text.split())


def _header_seconds(utterance: Utterance) -> float:
    try:
        return utterance.header_seconds()
    except AudioError as error:
        raise Dropped(UNREADABLE, f"{utterance.audio}: {error}") from None


class Target(NamedTuple):
    """What the decoder is given and is to learn at one visit.

    Attributes:
        tokens: previous text, prompt, label and end token.
        prompt_length: how many of them are given, not learnt.
    """

    tokens: Sequence[int]
    prompt_length: int


class Targets:
    """What the decoder is to learn at each visit: with timestamps or previous text, as is drawn."""

    def __init__(
        self,
        examples: Sequence[Example],
        data: TrainingData,
        tokens: SpecialTokens,
        max_positions: int,
        seed: int,
    ) -> None:
        """Remember what is drawn how often; the filter has made sure that the tokens exist."""
        self.examples = examples
        self.data = data
        self.tokens = tokens
        self.max_positions = max_positions
        self.seed = seed

    def length(self, visit: Visit) -> int:
        """Return how many tokens a visit has."""
        return len(self.target(visit, View()).tokens)

    def target(self, visit: Visit, view: View) -> Target:
        """Return the tokens of a visit, with the times of the view that it hears."""
        example = self.examples[visit.example]
        tokens, prompt_length = list(example.tokens), example.prompt_length
        timestamps, previous = self.data.timestamp_probability, self.data.previous_text_probability
        if example.sentences and self._draw(timestamps, Drawn.TIMESTAMPS, visit):
            # <|notimestamps|> is the last token of the prompt.
            prompt_length -= 1
            tokens = [*tokens[:prompt_length], *self._timed(example, view), self.tokens.end]
        if example.previous and self._draw(previous, Drawn.PREVIOUS_TEXT, visit):
            # The end token is no input, <|startofprev|> is one more.
            room = self.max_positions - len(tokens)
            if room > 0:
                assert self.tokens.previous is not None
                given = [self.tokens.previous, *example.previous[-room:]]
                tokens, prompt_length = given + tokens, len(given) + prompt_length
        return Target(tokens, prompt_length)

    def _draw(self, probability: float, what: Drawn, visit: Visit) -> bool:
        return draw(self.seed, what, visit.position).random() < probability

    def _timed(self, example: Example, view: View) -> list[int]:
        """Return the label with a timestamp before and after each sentence, as the view has it."""
        timed = []
        for start, end, tokens in example.sentences:
            timed += [self._timestamp(view.of_time(start)), *tokens]
            if end is not None:
                timed.append(self._timestamp(view.of_time(end)))
        return timed

    def _timestamp(self, seconds: float) -> int:
        times = self.tokens.timestamps
        return times.start + min(round(seconds / TIME_STEP), len(times) - 1)


@dataclass(frozen=True)
class TrainingBatch:
    """One micro-batch.

    Attributes:
        input_features: float32 [N, M, T]: log-mels; with a cache, only of the rows that it lacks.
        decoder_input_ids: int64 [B, L]: prompt and label, given to teacher and student alike.
        labels: int64 [B, L]: for each input the next token, IGNORE_INDEX within prompt and padding.
        seconds: of audio.
        rejections: examples whose audio could not be used; their rows have no label at all.
        cached_encoder_states: what a cache has of the encoder states; None: there is no cache.
        cached_decoder_states: what a cache has of the teacher's decoder states, likewise.
    """

    input_features: Tensor
    decoder_input_ids: Tensor
    labels: Tensor
    seconds: float
    rejections: list[Rejection]
    cached_encoder_states: CachedEncoderStates | None = None
    cached_decoder_states: CachedDecoderStates | None = None

    @property
    def label_tokens(self) -> int:
        """How many tokens the loss looks at."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> "TrainingBatch":
        """Return the batch with its tensors on a device."""
        return replace(
            self,
            input_features=self.input_features.to(device, non_blocking=True),
            decoder_input_ids=self.decoder_input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            cached_encoder_states=None
            if self.cached_encoder_states is None
            else self.cached_encoder_states.to(device),
            cached_decoder_states=None
            if self.cached_decoder_states is None
            else self.cached_decoder_states.to(device),
        )


class TrainingDataset(Dataset[TrainingBatch]):
    """Micro-batches of visits; each is decoded when it is asked for."""

    def __init__(
        self,
        batches: MicroBatches | Sequence[Sequence[Visit]],
        targets: Targets,
        views: Views,
        extractor: WhisperFeatureExtractor,
        cache: EncoderStateCache | None = None,
        answers: DecoderStateCache | None = None,
    ) -> None:
        """Keep what is needed to make the batches; nothing is read yet.

        Args:
            batches: the visits of each.
            targets: what is learnt at a visit.
            views: what is heard at a visit.
            extractor: of both models.
            cache: where encoder states may be already.
            answers: where the teacher's answers may be already.
        """
        self.batches = batches
        self.targets = targets
        self.views = views
        self.extractor = extractor
        self.cache = cache
        self.answers = answers

    def __len__(self) -> int:
        """Return how many micro-batches there are."""
        return len(self.batches)

    def __getitem__(self, index: int) -> TrainingBatch:
        """Return one micro-batch."""
        visits = self.batches[index]
        examples = [self.targets.examples[visit.example] for visit in visits]
        views = [
            self.views.of(example.utterance, example.seconds, visit.use, visit.position)
            for example, visit in zip(examples, visits, strict=True)
        ]
        targets = [self.targets.target(*each) for each in zip(visits, views, strict=True)]
        # Whisper pads with its end token.
        decoder_input_ids, labels = decoder_sequences(targets, self.targets.tokens.end)
        cached_encoder_states, answers = self._look_up(examples, views, targets)
        heard, seconds, rejections = [], 0.0, []
        for row, (example, view) in enumerate(zip(examples, views, strict=True)):
            if cached_encoder_states and row not in cached_encoder_states.missing:
                seconds += example.seconds
                continue
            try:
                waveform = self._load(example.utterance)
                heard.append((view, view.of_waveform(waveform)))
            except AudioError as error:
                # Silence without labels: the processes stay in step, and nothing is learnt from it.
                waveform = np.zeros(SAMPLE_RATE, dtype=np.float32)
                heard.append((View(), waveform))
                labels[row] = IGNORE_INDEX
                for cached in (cached_encoder_states, answers):
                    if cached and row in cached.missing:
                        cached.missing[row] = None
                utterance = example.utterance
                rejections.append(reject(utterance, f"{utterance.audio}: {error}"))
            seconds += len(waveform) / SAMPLE_RATE
        features = self._log_mels(heard)
        return TrainingBatch(
            features, decoder_input_ids, labels, seconds, rejections, cached_encoder_states, answers
        )

    def _look_up(
        self, examples: Sequence[Example], views: Sequence[View], targets: Sequence[Target]
    ) -> tuple[CachedEncoderStates | None, CachedDecoderStates | None]:
        """Return what the caches have; views that never come again are not kept in them."""
        utterances = [example.utterance for example in examples]
        keys = [view.key if view.reusable else None for view in views]
        inputs = [target.tokens[:-1] for target in targets]
        cached_encoder_states = self.cache.look_up(utterances, keys) if self.cache else None
        answers = self.answers.look_up(utterances, keys, inputs) if self.answers else None
        return cached_encoder_states, answers

    def _log_mels(self, heard: Sequence[tuple[View, np.ndarray]]) -> Tensor:
        """Return float32 [N, M, T]: the log-mels of the views' waveforms, with their masks."""
        if not heard:
            return torch.empty(0)
        features = log_mel([waveform for _, waveform in heard], self.extractor)
        for (view, waveform), one in zip(heard, features, strict=True):
            view.mask(one, len(waveform))
        return features

    def _load(self, utterance: Utterance) -> np.ndarray:
        return load_audio(
            utterance.audio,
            utterance.start_seconds,
            utterance.duration_seconds,
            # The extractor would cut what a wrong header had let pass.
            max_seconds=float(self.extractor.chunk_length),
        )


def decoder_sequences(targets: Sequence[Target], padding: int) -> tuple[Tensor, Tensor]:
    """Return decoder inputs and labels, both int64 [B, L], L the longest of these targets.

    Built once, here, for teacher and student: each label is the token after its input. What is
    masked is found by length, never by comparing ids, since Whisper pads with its end token, which
    must be learnt.

    Args:
        targets: at least one.
        padding: the id after the end of shorter sequences.
    """
    length = max(len(target.tokens) for target in targets) - 1
    inputs = torch.full((len(targets), length), padding)
    labels = torch.full((len(targets), length), IGNORE_INDEX)
    for row, (tokens, prompt_length) in enumerate(targets):
        end, first = len(tokens) - 1, prompt_length - 1
        inputs[row, :end] = torch.tensor(tokens[:-1])
        labels[row, first:end] = torch.tensor(tokens[prompt_length:])
    return inputs, labels
