"""From labelled manifests to the examples of a training run, and the order in which they are used.

Owns the filters, each of which says what it dropped, the two token sequences of an example, and the
plan that makes the order reproducible. Called by `run_distillation.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import WhisperFeatureExtractor, WhisperTokenizer

from simpler_distil_whisper.audio import SAMPLE_RATE, AudioError, audio_seconds, load_audio
from simpler_distil_whisper.batches import IGNORE_INDEX, log_mel
from simpler_distil_whisper.manifest import Manifest, Rejection, Utterance
from simpler_distil_whisper.run import Progress
from simpler_distil_whisper.teacher_cache import StoredStates, TeacherCache
from simpler_distil_whisper.training_options import TrainingData
from simpler_distil_whisper.whisper import SpecialTokens

UNREADABLE = "unreadable audio"  # the kind of reason that counts against max_bad_fraction
POOL_OF_STEPS = 32  # how many optimizer steps' utterances are sorted by length together


@dataclass(frozen=True, slots=True)
class Example:
    """An utterance with the tokens that the decoder is to learn.

    Attributes:
        utterance: where the audio is.
        seconds: how long it is, from the file's header.
        tokens: prompt, label and end token.
        prompt_length: how many of them are given, not learnt.
    """

    utterance: Utterance
    seconds: float
    tokens: list[int]
    prompt_length: int


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
        """Resolve the limits that the config leaves to the model."""
        self.data = data
        self.tokens = tokens
        self.tokenizer = tokenizer
        self.max_seconds = min(data.max_duration_seconds or window_seconds, window_seconds)
        # Inputs are the prompt and the label; the end token is only ever predicted.
        longest = max_positions - (4 if tokens.languages else 2)
        self.max_label_tokens = min(data.max_label_tokens or longest, longest)
        self.special = frozenset({tokens.end, *tokens.control})

    def select(self, manifests: Sequence[Manifest]) -> Selection:
        """Return the examples of all manifests; rows and hours are counted for every reason."""
        examples: list[Example] = []
        rejections = [rejection for manifest in manifests for rejection in manifest.rejections]
        hours: dict[str, list[float]] = {"kept": [], "unusable row": [0.0] * len(rejections)}
        utterances = [utterance for manifest in manifests for utterance in manifest.utterances]
        progress = Progress("reading audio headers", "rows", len(utterances))
        for utterance in progress.over(utterances):
            seconds = 0.0
            try:
                seconds = _header_seconds(utterance)
                examples.append(self._example(utterance, seconds))
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
        return Selection(examples, rejections, report)

    def _example(self, utterance: Utterance, seconds: float) -> Example:
        if not (utterance.text or "").strip():
            raise Dropped("no label", f'"{self.data.columns.text}" is empty')
        self._check_error_rate(utterance)
        if seconds < self.data.min_duration_seconds:
            minimum = self.data.min_duration_seconds
            raise Dropped("too short", f"too short: {seconds:.3f} s, the minimum is {minimum:g} s")
        if seconds > self.max_seconds:
            maximum = self.max_seconds
            raise Dropped("too long", f"too long: {seconds:.3f} s, the maximum is {maximum:g} s")
        text = self.tokenizer(utterance.text, add_special_tokens=False).input_ids
        if len(text) > self.max_label_tokens:
            limit = self.max_label_tokens
            raise Dropped("label too long", f"label of {len(text)} tokens, the maximum is {limit}")
        if special := self.special.intersection(text):
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(special)))
            raise Dropped("special token in label", f"the label holds {names}, which is no speech")
        language = utterance.language or self.data.language
        if language is None and self.tokens.languages:
            raise Dropped("no language", "neither the row nor data.language names the language")
        prompt = self.tokens.prompt(language, self.data.task)
        return Example(utterance, seconds, [*prompt, *text, self.tokens.end], len(prompt))

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


def _header_seconds(utterance: Utterance) -> float:
    try:
        return audio_seconds(utterance.audio, utterance.start_seconds, utterance.duration_seconds)
    except AudioError as error:
        raise Dropped(UNREADABLE, f"{utterance.audio}: {error}") from None


class TrainingPlan:
    """Which examples each optimizer step learns from, computed from the step's number alone.

    One endless stream of shuffled epochs is cut into steps of equal size. So there is no smaller
    last step to weigh wrongly, a resumed run goes on where it stopped, and a step holds the same
    examples however many processes and micro-batches share it.
    """

    def __init__(self, lengths: Sequence[int], step_size: int, bucketing: bool, seed: int) -> None:
        """Remember the plan.

        Args:
            lengths: tokens of each example.
            step_size: examples of one optimizer step, in all processes together.
            bucketing: fill steps with examples of similar length, so that less is padded.
            seed: of the shuffling.
        """
        self.lengths = np.asarray(lengths)
        self.step_size = step_size
        self.seed = seed
        steps_per_epoch = max(1, len(lengths) // step_size)
        # A pool far smaller than an epoch, or neighbours in length would always meet again.
        self.pool_steps = max(1, min(POOL_OF_STEPS, steps_per_epoch // 4)) if bucketing else 1
        self._pool: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._epoch: dict[int, np.ndarray] = {}

    def step(self, number: int) -> list[int]:
        """Return the examples of step `number`, from 0, the shortest first."""
        pool, place = divmod(number, self.pool_steps)
        if self._pool[0] != pool:
            self._pool = (pool, self._make_pool(pool))
        chosen: list[int] = self._pool[1][place].tolist()
        return chosen

    def _make_pool(self, pool: int) -> np.ndarray:
        """Return int64 [pool steps, step size]: examples, sorted by length within the pool."""
        size = self.pool_steps * self.step_size
        positions = range(pool * size, (pool + 1) * size)
        examples = np.array([self._at(position) for position in positions])
        by_length = examples[np.argsort(self.lengths[examples], kind="stable")]
        steps = by_length.reshape(self.pool_steps, self.step_size)
        return np.random.default_rng([self.seed, 1, pool]).permutation(steps)

    def _at(self, position: int) -> int:
        """Return the example at a position of the endless stream."""
        epoch, place = divmod(position, len(self.lengths))
        if epoch not in self._epoch:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.lengths))
            self._epoch = {epoch: order}
        return int(self._epoch[epoch][place])


class MicroBatches:
    """One process's micro-batches, in the order of their use; each is computed when asked for."""

    def __init__(
        self, plan: TrainingPlan, steps: range, size: int, rank: int, processes: int
    ) -> None:
        """Remember which share this is: `size` examples at a time, those of process `rank`."""
        self.plan, self.steps, self.size = plan, steps, size
        self.rank, self.processes = rank, processes
        self.per_step = plan.step_size // (size * processes)

    def __len__(self) -> int:
        """Return how many there are over all steps."""
        return len(self.steps) * self.per_step

    def __getitem__(self, index: int) -> list[int]:
        """Return the examples of one micro-batch; those of the processes alternate in length."""
        step, place = divmod(index, self.per_step)
        start = (place * self.processes + self.rank) * self.size
        return self.plan.step(self.steps[step])[start : start + self.size]


@dataclass(frozen=True)
class TrainingBatch:
    """One micro-batch.

    Attributes:
        input_features: float32 [N, M, T]: log-mels; with a cache, only of the rows that it lacks.
        decoder_input_ids: int64 [B, L]: prompt and label, given to teacher and student alike.
        labels: int64 [B, L]: for each input the next token, IGNORE_INDEX within prompt and padding.
        seconds: of audio.
        rejections: examples whose audio could not be used; their rows have no label at all.
        stored: what a cache has of the encoder states; None: there is no cache.
    """

    input_features: Tensor
    decoder_input_ids: Tensor
    labels: Tensor
    seconds: float
    rejections: list[Rejection]
    stored: StoredStates | None = None

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
            stored=None if self.stored is None else self.stored.to(device),
        )


class TrainingDataset(Dataset[TrainingBatch]):
    """Micro-batches of examples; each is decoded when it is asked for."""

    def __init__(
        self,
        examples: Sequence[Example],
        batches: MicroBatches | Sequence[Sequence[int]],
        extractor: WhisperFeatureExtractor,
        padding: int,
        cache: TeacherCache | None = None,
    ) -> None:
        """Keep what is needed to make the batches; nothing is read yet."""
        self.examples = examples
        self.batches = batches
        self.extractor = extractor
        self.padding = padding
        self.cache = cache

    def __len__(self) -> int:
        """Return how many micro-batches there are."""
        return len(self.batches)

    def __getitem__(self, index: int) -> TrainingBatch:
        """Return one micro-batch."""
        examples = [self.examples[number] for number in self.batches[index]]
        decoder_input_ids, labels = decoder_sequences(examples, self.padding)
        stored = None
        if self.cache:
            stored = self.cache.look_up([example.utterance for example in examples])
        seconds, waveforms, rejections = 0.0, [], []
        for row, example in enumerate(examples):
            if stored and row not in stored.missing:
                seconds += example.seconds
                continue
            utterance = example.utterance
            try:
                waveform = load_audio(
                    utterance.audio,
                    utterance.start_seconds,
                    utterance.duration_seconds,
                    # The extractor would cut what a wrong header had let pass.
                    max_seconds=float(self.extractor.chunk_length),
                )
            except AudioError as error:
                # Silence without labels: the processes stay in step, and nothing is learnt from it.
                waveform = np.zeros(SAMPLE_RATE, dtype=np.float32)
                labels[row] = IGNORE_INDEX
                if stored:
                    stored.missing[row] = None
                reason = f"{utterance.audio}: {error}"
                rejections.append(
                    Rejection(utterance.number, utterance.place, reason, utterance.row)
                )
            waveforms.append(waveform)
            seconds += len(waveform) / SAMPLE_RATE
        features = log_mel(waveforms, self.extractor) if waveforms else torch.empty(0)
        return TrainingBatch(features, decoder_input_ids, labels, seconds, rejections, stored)


def decoder_sequences(examples: Sequence[Example], padding: int) -> tuple[Tensor, Tensor]:
    """Return decoder inputs and labels, both int64 [B, L], L the longest of these examples.

    Built once, here, for teacher and student: each label is the token after its input. What is
    masked is found by length, never by comparing ids, since Whisper pads with its end token, which
    must be learnt.

    Args:
        examples: at least one.
        padding: the id after the end of shorter sequences.
    """
    length = max(len(example.tokens) for example in examples) - 1
    inputs = torch.full((len(examples), length), padding)
    labels = torch.full((len(examples), length), IGNORE_INDEX)
    for row, example in enumerate(examples):
        end, first = len(example.tokens) - 1, example.prompt_length - 1
        inputs[row, :end] = torch.tensor(example.tokens[:-1])
        labels[row, first:end] = torch.tensor(example.tokens[example.prompt_length :])
    return inputs, labels
