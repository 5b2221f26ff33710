"""Teacher and student on the same micro-batch: from log-mels and tokens to the terms of the loss.

Owns both models: what each is given, which of the student's parameters are trained, when the
teacher is loaded, and the use of the caches. The formula of the loss is in `losses.py`.
"""

import copy
import functools

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, WhisperForConditionalGeneration

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.devices import moved, torch_dtype
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.folder_check import FRAMES_PER_POSITION
from simpler_distil_whisper.model.head import dtype_of_products
from simpler_distil_whisper.model.options import TeacherCacheOptions
from simpler_distil_whisper.model.teacher_cache import (
    DecoderStateCache,
    EncoderStateCache,
    dtype_of_states,
    open_store,
)
from simpler_distil_whisper.model.weights import output_head
from simpler_distil_whisper.model.whisper import Whisper, load_whisper, run_encoder
from simpler_distil_whisper.run import log
from simpler_distil_whisper.training.cross_attention import use_fast_cross_attention
from simpler_distil_whisper.training.dataset import NO_CACHES, StateCaches, TrainingBatch
from simpler_distil_whisper.training.losses import LossTerms, distillation_loss
from simpler_distil_whisper.training.options import Freeze, Objective, TeacherOptions


class TeacherAndStudent:
    """Both models on the same input.

    Attributes:
        module: the student with its loss, as `accelerator` has prepared it; its parameters are what
            is trained.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        teacher: "Teacher",
        student: Whisper,
        objective: Objective,
        caches: StateCaches = NO_CACHES,
    ) -> None:
        """Combine both; which of the student's parameters are trained is set before (`freeze`)."""
        self.accelerator, self.teacher, self.student = accelerator, teacher, student
        self.objective = objective
        self.caches = caches
        self.module: nn.Module = StudentWithLoss(student.model, teacher.head, objective)

    @property
    def precision(self) -> str:
        """The dtype of the student's products: "float32", "bf16" or "fp16"."""
        precision: str = self.accelerator.mixed_precision
        return "float32" if precision == "no" else precision

    def loss_terms(self, batch: TrainingBatch) -> LossTerms:
        """Return the sums of the loss terms over the labels of a micro-batch.

        Args:
            batch: on the student's device.
        """
        encoder_states = self._encoder_states(batch)
        teacher_states = None
        if self.objective.uses_teacher:
            teacher_states = self._teacher_states(batch, encoder_states)
        terms: LossTerms = self.module(batch, encoder_states, teacher_states)
        return terms

    @torch.no_grad()
    def _encoder_states(self, batch: TrainingBatch) -> Tensor | None:
        """Return float [B, E, D] of a frozen encoder; None where it is trained."""
        if _is_trained(self.student.model.model.encoder):
            return None
        encoder = self._frozen_encoder
        cache, cached = self.caches.encoder, batch.cached_encoder_states
        with self.accelerator.autocast():
            if cache and cached and self.teacher.shared_encoder:
                return cache.complete(cached, batch.input_features, encoder)
            return self.student.encode(batch.input_features, encoder)

    @functools.cached_property
    def _frozen_encoder(self) -> nn.Module:
        """The student's encoder, in evaluation mode; under autocast a copy of it, cast once."""
        encoder: nn.Module = self.student.model.model.encoder.eval()
        dtype = computing_dtype(self.accelerator)
        if dtype == torch.float32:
            return encoder
        return cast_products(copy.deepcopy(encoder), dtype)

    def _teacher_states(self, batch: TrainingBatch, encoder_states: Tensor | None) -> Tensor:
        """Return float [B, L, D']: the teacher's last decoder states, from the cache if it can."""

        @functools.cache  # once for all rows that the cache lacks; never if it lacks none
        def encoder_states_for_teacher() -> Tensor:
            if encoder_states is not None and self.teacher.shared_encoder:
                return encoder_states
            return self.teacher.encoder_states(batch, self.caches.encoder)

        def compute_rows(rows: list[int], length: int) -> Tensor:
            input_ids = batch.decoder_input_ids[rows, :length]
            return self.teacher.decoder_states(input_ids, encoder_states_for_teacher()[rows])

        cache, cached = self.caches.decoder, batch.cached_decoder_states
        if cache and cached:
            return cache.complete(cached, compute_rows)
        return self.teacher.decoder_states(batch.decoder_input_ids, encoder_states_for_teacher())


class StudentWithLoss(nn.Module):
    """The student and its loss as one module.

    One module, so that gradients of several processes are averaged over everything between a batch
    and its loss. Of the teacher it holds only the output head, which is no parameter of it.
    """

    def __init__(
        self, student: WhisperForConditionalGeneration, teacher_head: Tensor, objective: Objective
    ) -> None:
        """Keep the parts of the loss.

        Args:
            student: float32 parameters; those that require gradients are trained.
            teacher_head: float [V, D'], any dtype.
            objective: weights of the terms of the loss.
        """
        super().__init__()
        self.student = student
        use_fast_cross_attention(student.model.decoder)
        # A plain tensor is neither parameter nor buffer: it is not trained, saved or sent by DDP.
        self.teacher_head = teacher_head.detach()
        self.objective = objective

    def train(self, mode: bool = True) -> "StudentWithLoss":
        """Set the mode of the student, whose frozen encoder never uses dropout."""
        super().train(mode)
        if not _is_trained(self.student.model.encoder):
            self.student.model.encoder.eval()
        return self

    def forward(
        self, batch: TrainingBatch, encoder_states: Tensor | None, teacher_states: Tensor | None
    ) -> LossTerms:
        """Return the sums of the loss terms.

        Args:
            batch: on the student's device.
            encoder_states: float [B, E, D]; None: the student's encoder, which is trained, computes
                them from the batch.
            teacher_states: float [B, L, D']: the teacher's last decoder states; None: the loss
                does not use them.
        """
        if encoder_states is not None:
            decoder_states = self._decoder_states(batch.decoder_input_ids, encoder_states)
        else:
            decoder_states = self._states_by_positions(batch)
        return distillation_loss(
            decoder_states,
            self.student.proj_out.weight,
            teacher_states,
            None if teacher_states is None else self.teacher_head,
            batch.labels,
            self.objective,
            batch.label_places,
        )

    def _states_by_positions(self, batch: TrainingBatch) -> Tensor:
        """Return float [B, L, D]: the last decoder states, from an encoder that is trained.

        Rows with the same number of positions are computed together, so none is padded or masked.
        """
        # Not WhisperModel.forward, which may mask the features in place (SpecAugment): the teacher
        # would be given what is left of them.
        encoder, features = self.student.model.encoder, batch.input_features
        window = features.shape[-1] // FRAMES_PER_POSITION
        positions = torch.tensor(batch.positions or [window] * len(features))
        counts = sorted(set(positions.tolist()))
        groups = [torch.nonzero(positions == count).flatten() for count in counts]
        order = torch.cat(groups).argsort()
        states = []
        for count, group in zip(counts, groups, strict=True):
            rows = moved(group, features.device)
            part = run_encoder(encoder, features[rows, :, : FRAMES_PER_POSITION * count])
            states.append(self._decoder_states(batch.decoder_input_ids[rows], part))
        return torch.cat(states)[moved(order, features.device)]

    def _decoder_states(self, input_ids: Tensor, encoder_states: Tensor) -> Tensor:
        dtype = self.student.dtype
        # What comes back to an encoder that is trained is added up in float32.
        if not encoder_states.requires_grad:
            dtype = dtype_of_products(encoder_states.device, dtype)
        return last_states(self.student.model.decoder, input_ids, encoder_states.to(dtype))


class Teacher:
    """A frozen Whisper that predicts the next token at every position of a label.

    Attributes:
        dtype: of its weights.
        device: where it runs.
        head: float [V, D'], on the student's device: the output head, which makes logits of the
            last decoder states.
    """

    def __init__(
        self,
        folder: ModelFolder,
        options: TeacherOptions,
        accelerator: Accelerator,
        shared_encoder: bool,
    ) -> None:
        """Read the output head; the model is loaded when it is first needed.

        Args:
            folder: the teacher's model folder.
            options: its dtype, attention and device.
            accelerator: of the student.
            shared_encoder: it uses the student's encoder, which computes the same as its own.

        Raises:
            ConfigError: this machine lacks the device.
        """
        self.folder, self.options, self.accelerator = folder, options, accelerator
        self.shared_encoder = shared_encoder
        self.device = device_of(options, accelerator)
        self.dtype = torch_dtype(options.dtype, self.device)
        self.head = output_head(folder).to(accelerator.device, self.dtype)

    def load(self) -> Whisper:
        """Return the whole model, for scoring; nothing here holds on to it."""
        return load_whisper(self.folder, self.dtype, self.options.attention, self.device)

    @functools.cached_property
    def model(self) -> WhisperForConditionalGeneration:
        """The model, loaded on first use."""
        model = self.load().model.requires_grad_(False)
        log.info("teacher: loaded in %s on %s", self.dtype, self.device)
        use_fast_cross_attention(model.model.decoder)
        if self.shared_encoder:
            model.model.encoder = None  # the student's is used
        # A teacher on another device is not in autocast's reach, which casts their input.
        if self.dtype == torch.float32 and self.device.type == self.accelerator.device.type:
            cast_products(model.model, computing_dtype(self.accelerator))
        return model

    @property
    def numerics_key(self) -> str:
        """What the last bits of its states depend on beside weights and input, for cache keys."""
        encoder = "the student's encoder" if self.shared_encoder else "its own encoder"
        return f"{self.dtype} weights on {self.device.type}, {encoder}"

    @property
    def loaded(self) -> bool:
        """Whether the model was ever needed."""
        return "model" in self.__dict__

    @torch.no_grad()
    def encoder_states(self, batch: TrainingBatch, cache: EncoderStateCache | None) -> Tensor:
        """Return float [B, E, D], on the teacher's device: the states of an encoder of its own.

        Args:
            batch: on the student's device, with all log-mels.
            cache: where they may be already.
        """
        features, cached = batch.input_features, batch.cached_encoder_states
        # Not WhisperModel.forward, which may mask the features in place (SpecAugment).
        encoder = self.model.model.encoder
        with self.accelerator.autocast():
            if cache and cached:
                missing = features[list(cached.missing)].to(self.device, self.dtype)
                return cache.complete(cached.to(self.device), missing, encoder)
            states: Tensor = encoder(features.to(self.device, self.dtype)).last_hidden_state
        return states

    @torch.no_grad()
    def decoder_states(self, input_ids: Tensor, encoder_states: Tensor) -> Tensor:
        """Return float [B, L, D'], on the student's device: its last decoder states.

        Args:
            input_ids: int64 [B, L]: the decoder's input tokens.
            encoder_states: float [B, E, D].
        """
        with self.accelerator.autocast():
            states = last_states(
                self.model.model.decoder,
                input_ids.to(self.device),
                encoder_states.to(self.device, dtype_of_products(self.device, self.dtype)),
            )
        return states.to(self.accelerator.device)


def open_caches(
    options: TeacherCacheOptions, teacher: Teacher, student: Whisper, objective: Objective
) -> StateCaches:
    """Return the caches that a config names, of the states that are of use.

    Those of the decoder are kept only for the teacher's part of the loss. Those of the encoder are
    given to the student too where it shares the encoder; where not, they serve only for decoder
    states that are not kept yet.

    Raises:
        ConfigError: the folder cannot be written, or the cache's dtype is finer than the
            computation's.
    """
    if (store := open_store(options)) is None:
        return NO_CACHES
    compute_dtype = computing_dtype(teacher.accelerator)
    dtype = dtype_of_states(options, compute_dtype, teacher.accelerator.device)
    folder, extractor = teacher.folder, student.feature_extractor
    encoder = decoder = None
    if options.encoder_states and (teacher.shared_encoder or objective.uses_teacher):
        encoder = EncoderStateCache(store, dtype, folder, extractor)
    if options.decoder_states and objective.uses_teacher:
        encoder_dtype = dtype if encoder else compute_dtype
        numerics = (
            f"{teacher.numerics_key}, {compute_dtype} products, {encoder_dtype} encoder states"
        )
        decoder = DecoderStateCache(store, dtype, folder, extractor, numerics)
    return StateCaches(encoder, decoder, teacher.shared_encoder)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def computing_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of the products in the student's forward pass."""
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return autocast.get(accelerator.mixed_precision, torch.float32)


def last_states(decoder: nn.Module, input_ids: Tensor, encoder_states: Tensor) -> Tensor:
    """Return float [B, L, D]: a decoder's last states for whole sequences, int64 [B, L]."""
    # Without a cache, even an empty one that is not used, transformers looks at the positions for
    # several sequences in a row, and the CPU has to wait for a GPU in every forward pass.
    unused = EncoderDecoderCache(DynamicCache(), DynamicCache())
    states: Tensor = decoder(
        input_ids=input_ids,
        encoder_hidden_states=encoder_states,
        past_key_values=unused,
        use_cache=False,
    ).last_hidden_state
    return states


def cast_products(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a frozen module whose weights of products are in a dtype, set in place.

    Autocast would cast them anew at each use. Other weights stay as they are: under autocast the
    module computes the same bits.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv1d):
            part.to(dtype)
    return module


def freeze(student: WhisperForConditionalGeneration, options: Freeze) -> None:
    """Set in place which parameters of the student are trained.

    The output head is frozen with the token embedding, also where it is no copy of it.
    """
    student.requires_grad_(True)
    student.model.encoder.requires_grad_(not options.encoder)
    # Whisper's encoder positions are fixed sinusoids, never parameters to train.
    student.model.encoder.embed_positions.requires_grad_(False)
    student.model.decoder.requires_grad_(not options.decoder)
    if options.decoder or options.embed_tokens:
        student.model.decoder.embed_tokens.requires_grad_(False)
        student.proj_out.requires_grad_(False)
    if options.embed_positions:
        student.model.decoder.embed_positions.requires_grad_(False)


def keep_all_layers(student: WhisperForConditionalGeneration) -> None:
    """Let no layer be left out by chance in training, in place: a student has few.

    The config of a model that was pre-trained so asks for it still.
    """
    for part in (student.model.encoder, student.model.decoder):
        if part.layerdrop:
            log.info("layerdrop %g of the model's config is not used", part.layerdrop)
        part.layerdrop = 0.0


def device_of(options: TeacherOptions, accelerator: Accelerator) -> torch.device:
    """Return where the teacher runs.

    Raises:
        ConfigError: this machine has no such device.
    """
    if options.device is None:
        device: torch.device = accelerator.device
        return device
    device = torch.device(options.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f'teacher.device: "{options.device}", but this machine has '
            f"{torch.cuda.device_count()} GPUs"
        )
    return device
