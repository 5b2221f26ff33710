"""Visits to examples -> micro-batches of log-mels, tokens and cached states, loaded ahead of use.

Owns what a training batch is and how it is made: audio, its altered view, its log-mel, both token
sequences, and what the caches hold. The order of the visits is in `plan.py`, the tokens in
`tokens.py`.
"""

import copy
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import WhisperFeatureExtractor

from simpler_distil_whisper.data.audio import SAMPLE_RATE, AudioError, load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.data.manifest import Rejection, reject_audio
from simpler_distil_whisper.data.sound import TOLERANCE_SECONDS
from simpler_distil_whisper.data.workers import load_ahead
from simpler_distil_whisper.launch import process_count, process_rank
from simpler_distil_whisper.model.audio_context import AudioContext
from simpler_distil_whisper.model.devices import moved
from simpler_distil_whisper.model.teacher_cache import (
    CachedDecoderStates,
    CachedEncoderStates,
    DecoderStateCache,
    EncoderStateCache,
)
from simpler_distil_whisper.model.whisper import Whisper
from simpler_distil_whisper.run import log
from simpler_distil_whisper.training.augment import View, Views
from simpler_distil_whisper.training.losses import IGNORE_INDEX, label_places_of
from simpler_distil_whisper.training.options import (
    AudioContextOptions,
    Augmentation,
    BatchOptions,
    TrainingData,
)
from simpler_distil_whisper.training.plan import (
    Drawn,
    MicroBatches,
    RunLength,
    TrainingPlan,
    Visit,
    draw,
)
from simpler_distil_whisper.training.tokens import (
    DecoderTokens,
    Example,
    VisitTokens,
    decoder_sequences,
)


class StateCaches(NamedTuple):
    """Where the teacher's states are kept; None: they are not.

    Attributes:
        encoder: states of its encoder.
        decoder: last states of its decoder.
        shared_encoder: the student's decoder is given the same encoder states. Else its own encoder
            needs every log-mel, and those of the teacher's serve for what `decoder` lacks.
    """

    encoder: EncoderStateCache | None = None
    decoder: DecoderStateCache | None = None
    shared_encoder: bool = True

    def finish(self) -> None:
        """Return once everything that was computed is kept."""
        for cache in (self.encoder, self.decoder):
            if cache:
                cache.finish()


NO_CACHES = StateCaches()


@dataclass(frozen=True)
class TrainingBatch:
    """One micro-batch.

    Attributes:
        input_features: float32 [N, M, T]: log-mels; where a cache holds the encoder states that
            both models share, only of the rows that it lacks.
        decoder_input_ids: int64 [B, L]: prompt and label, given to teacher and student alike.
        labels: int64 [B, L]: for each input the next token, IGNORE_INDEX within prompt and padding.
        seconds: of audio.
        rejections: examples whose audio could not be used; their rows have no label at all.
        positions: of the student's encoder for each row; None: the whole window for all.
        cached_encoder_states: what the cache holds of the teacher's; None: there is no cache, or
            they are of no use.
        cached_decoder_states: what the cache holds of the teacher's; None: there is no cache.
        label_places: int64 [P]: which of the B x L positions have a label, once it is on a device.
    """

    input_features: Tensor
    decoder_input_ids: Tensor
    labels: Tensor
    seconds: float
    rejections: list[Rejection]
    positions: list[int] | None = None
    cached_encoder_states: CachedEncoderStates | None = None
    cached_decoder_states: CachedDecoderStates | None = None
    label_places: Tensor | None = None

    @property
    def label_tokens(self) -> int:
        """How many tokens the loss looks at."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> "TrainingBatch":
        """Return the batch, loaded on the CPU, with its tensors on a device.

        The places of its labels are looked up here: on a GPU that would be waited for.
        """
        encoder_states, decoder_states = self.cached_encoder_states, self.cached_decoder_states
        return replace(
            self,
            input_features=moved(self.input_features, device),
            decoder_input_ids=moved(self.decoder_input_ids, device),
            labels=moved(self.labels, device),
            label_places=moved(label_places_of(self.labels), device),
            cached_encoder_states=encoder_states and encoder_states.to(device),
            cached_decoder_states=decoder_states and decoder_states.to(device),
        )


class TrainingDataset(Dataset[TrainingBatch]):
    """The micro-batches of some visits; each is made when it is asked for, in a worker process."""

    def __init__(
        self,
        micro_batches: MicroBatches | Sequence[Sequence[Visit]],
        visit_tokens: VisitTokens,
        views: Views,
        extractor: WhisperFeatureExtractor,
        caches: StateCaches = NO_CACHES,
        contexts: "AudioContexts | None" = None,
    ) -> None:
        """Keep what the batches are made of; nothing is read yet.

        Args:
            micro_batches: the visits of each.
            visit_tokens: the tokens of a visit.
            views: the version of the audio that a visit uses.
            extractor: of both models.
            caches: where the teacher's states may be already.
            contexts: how much of the window the student is given; None: all of it.
        """
        self.micro_batches = micro_batches
        self.visit_tokens = visit_tokens
        self.views = views
        self.extractor = extractor
        self.caches = caches
        self.contexts = contexts

    def __len__(self) -> int:
        """Return how many micro-batches there are."""
        return len(self.micro_batches)

    def __getitem__(self, index: int) -> TrainingBatch:
        """Return one micro-batch."""
        visits = self.micro_batches[index]
        examples = [self.visit_tokens.examples[visit.example] for visit in visits]
        views = [
            self.views.of(example.utterance, example.seconds, visit.use, visit.position)
            for example, visit in zip(examples, visits, strict=True)
        ]
        tokens = [self.visit_tokens.of(*pair) for pair in zip(visits, views, strict=True)]
        # Whisper pads with its end token.
        decoder_input_ids, labels = decoder_sequences(tokens, self.visit_tokens.tokens.end)
        encoder_states, decoder_states = self._look_up(examples, views, tokens)
        clips: list[tuple[View, np.ndarray]] = []
        positions: list[int] = []
        seconds, rejections = 0.0, []
        for row, (example, view) in enumerate(zip(examples, views, strict=True)):
            if self.caches.shared_encoder and encoder_states and row not in encoder_states.missing:
                seconds += example.seconds
                continue
            try:
                waveform = self._load(example)
                clips.append((view, self._altered(waveform, view, example)))
            except AudioError as error:
                # Silence without labels: the processes stay in step, and nothing is learnt from it.
                waveform = np.zeros(SAMPLE_RATE, dtype=np.float32)
                clips.append((View(), waveform))
                labels[row] = IGNORE_INDEX
                for states in (encoder_states, decoder_states):
                    if states:
                        states.do_not_keep(row)
                rejections.append(reject_audio(example.utterance, error))
            seconds += len(waveform) / SAMPLE_RATE
            if self.contexts:
                length = len(clips[-1][1]) / SAMPLE_RATE
                positions.append(self.contexts.positions(visits[row], length))
        features = self._log_mels(clips)
        return TrainingBatch(
            features,
            decoder_input_ids,
            labels,
            seconds,
            rejections,
            positions or None,
            encoder_states,
            decoder_states,
        )

    def _look_up(
        self, examples: Sequence[Example], views: Sequence[View], tokens: Sequence[DecoderTokens]
    ) -> tuple[CachedEncoderStates | None, CachedDecoderStates | None]:
        """Return what the caches hold; views that are used only once are not kept in them."""
        encoder, decoder, shared = self.caches
        utterances = [example.utterance for example in examples]
        keys = [view.key if view.reusable else None for view in views]
        inputs = [row.tokens[:-1] for row in tokens]
        decoder_states = decoder.look_up(utterances, keys, inputs) if decoder else None
        teacher_runs = decoder_states is None or decoder_states.missing
        if encoder and (shared or teacher_runs):
            return encoder.look_up(utterances, keys), decoder_states
        return None, decoder_states

    def _load(self, example: Example) -> np.ndarray:
        # The feature extractor would cut what a wrong header had let pass.
        max_seconds = float(self.extractor.chunk_length)
        return load_audio(*example.utterance.clip, max_seconds=max_seconds)

    def _altered(self, waveform: np.ndarray, view: View, example: Example) -> np.ndarray:
        """Return the view of a waveform.

        Raises:
            AudioError: its end would be cut off, since the view was drawn for a shorter clip.
        """
        altered = view.of_waveform(waveform)
        longest = self.extractor.n_samples + TOLERANCE_SECONDS * SAMPLE_RATE
        if len(altered) > max(longest, len(waveform)):
            raise AudioError(
                f"it has {len(waveform) / SAMPLE_RATE:.3f} s, not {example.seconds:.3f} s: slowed "
                "down or later, it is longer than the window: correct its length in the manifest"
            )
        return altered

    def _log_mels(self, clips: Sequence[tuple[View, np.ndarray]]) -> Tensor:
        """Return float32 [N, M, T]: the log-mels of the views' waveforms, with their masks."""
        if not clips:
            return torch.empty(0)
        features = log_mel([waveform for _, waveform in clips], self.extractor)
        for (view, waveform), log_mels in zip(clips, features, strict=True):
            view.mask(log_mels, len(waveform))
        return features


class AudioContexts:
    """How much of the window the student's encoder is given at each use of a clip."""

    def __init__(self, options: AudioContextOptions, window: int, seed: int) -> None:
        """Remember what may be drawn.

        Args:
            options: the config's section.
            window: encoder positions of the whole window.
            seed: by which margins are drawn.
        """
        self.options, self.window, self.seed = options, window, seed

    def positions(self, visit: Visit, seconds: float) -> int:
        """Return the encoder positions for one use of a clip of so many seconds."""
        random = draw(self.seed, Drawn.AUDIO_CONTEXT, visit.position)
        if random.random() < self.options.full_window_probability:
            return self.window
        margin = self.options.margin_seconds + self.options.jitter_seconds * random.random()
        return AudioContext(margin).positions(seconds, self.window)


class TrainingSteps:
    """What one process learns from in each optimizer step.

    Attributes:
        length: of the run.
        visit_tokens: the tokens of each visit, and the examples.
        views: the version of the audio that a visit uses.
        caches: where the teacher's states may be already.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        length: RunLength,
        student: Whisper,
        data: TrainingData,
        batch: BatchOptions,
        augmentation: Augmentation,
        audio_context: AudioContextOptions,
        seed: int,
        caches: StateCaches,
    ) -> None:
        """Plan the steps; nothing is read yet."""
        positions = student.model.config.max_target_positions
        self.length, self.caches = length, caches
        self.visit_tokens = VisitTokens(examples, data, student.tokens, positions, seed)
        hours = sum(example.seconds for example in examples) / 3600
        self.views = Views(augmentation, hours, student.window_seconds, seed)
        count = self.views.count
        log.info("views of each clip: %s", "a new one at each use" if count is None else count)
        self.extractor = student.feature_extractor
        self.contexts = None
        if audio_context.enabled:
            window = student.model.config.max_source_positions
            self.contexts = AudioContexts(audio_context, window, seed)
        self.plan = TrainingPlan(
            [example.weight for example in examples],
            self.visit_tokens.length,
            length.step_size,
            batch.length_bucketing,
            seed,
        )
        self.micro_batch_size, self.workers = batch.micro_batch_size, data.workers

    @property
    def digest(self) -> str:
        """A hash of what the steps learn from: a step's number has a meaning only with it."""
        digest = hashlib.sha256(str(self.length).encode())
        for example in self.visit_tokens.examples:
            digest.update(f"{example.utterance.json} {example.tokens} {example.weight}".encode())
        return digest.hexdigest()

    def since(self, step: int, end: int | None = None) -> Iterator[tuple[TrainingBatch, ...]]:
        """Yield this process's micro-batches of each step from `step` on, counted from 0.

        Args:
            step: the first.
            end: the step before which they end, also beyond the run; None: that of the run.
        """
        steps = range(step, self.length.max_steps if end is None else end)
        size, rank, processes = self.micro_batch_size, process_rank(), process_count()
        own = MicroBatches(self.plan, steps, size, rank, processes)
        dataset = TrainingDataset(
            own, self.visit_tokens, self.views, self.extractor, self.caches, self.contexts
        )
        loader = load_ahead(dataset.__getitem__, range(len(dataset)), self.workers)
        for _ in steps:
            yield tuple(itertools.islice(loader, own.per_step))

    def without_caches(self) -> "TrainingSteps":
        """Return the same steps, for which both models compute everything."""
        steps = copy.copy(self)
        steps.caches = NO_CACHES
        return steps
