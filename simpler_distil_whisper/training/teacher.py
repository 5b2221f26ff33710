"""The teacher, as a student hears of it: its answer to a batch, and the head that reads the answer.

Owns the frozen model, which is loaded only when something is not in the cache. Called by
`trainer.py`.
"""

import functools

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.devices import torch_dtype
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.teacher_cache import DecoderStateCache
from simpler_distil_whisper.model.weights import output_head
from simpler_distil_whisper.model.whisper import Whisper, load_whisper
from simpler_distil_whisper.run import log
from simpler_distil_whisper.training.dataset import TrainingBatch
from simpler_distil_whisper.training.options import TeacherOptions


class Teacher:
    """A frozen Whisper that is asked what it would say next, at every place of a label.

    Attributes:
        dtype: of its weights.
        device: where it runs.
        head: float [V, D'], on the student's device: makes logits of last decoder states.
        answers: where its answers are kept; None: nowhere.
    """

    def __init__(
        self,
        folder: ModelFolder,
        options: TeacherOptions,
        accelerator: Accelerator,
        shared_encoder: bool,
    ) -> None:
        """Read the output head; the model waits until it is needed.

        Args:
            folder: where the model is.
            options: dtype, attention and device of it.
            accelerator: of the student.
            shared_encoder: it listens to the student's encoder, which computes the same as its own.
        """
        self.folder, self.options, self.accelerator = folder, options, accelerator
        self.shared_encoder = shared_encoder
        self.decoder_cache: DecoderStateCache | None = None
        self.device = device_of(options, accelerator)
        self.dtype = torch_dtype(options.dtype, self.device)
        self.head = output_head(folder).to(accelerator.device, self.dtype)

    def load(self) -> Whisper:
        """Return the whole model, to be scored; it is the caller's, and gone with it."""
        return load_whisper(self.folder, self.dtype, self.options.attention, self.device)

    @functools.cached_property
    def model(self) -> WhisperForConditionalGeneration:
        """The model, from when it is asked for the first time."""
        log.info("teacher: loaded in %s on %s", self.dtype, self.device)
        model = self.load().model.requires_grad_(False)
        if self.shared_encoder:
            model.model.encoder = None  # the student's is heard
        return model

    @property
    def numerics_key(self) -> str:
        """What decides a last bit of its answers beside weights and input, for the cache's keys."""
        heard = "the student's encoder" if self.shared_encoder else "its own encoder"
        return f"{self.dtype} weights on {self.device.type}, {heard}"

    @property
    def loaded(self) -> bool:
        """Whether the model was ever asked."""
        return "model" in self.__dict__

    def decoder_states(self, batch: TrainingBatch, encoder_states: Tensor | None) -> Tensor:
        """Return float [B, L, D'], on the student's device: last decoder states for a batch.

        Args:
            batch: on the student's device.
            encoder_states: float [B, E, D]: those of the shared encoder; None if there is none.
        """
        if self.decoder_cache is None or batch.cached_decoder_states is None:
            return self._compute(batch, encoder_states)
        return self.decoder_cache.complete(
            batch.cached_decoder_states, lambda: self._compute(batch, encoder_states)
        )

    @torch.no_grad()
    def _compute(self, batch: TrainingBatch, encoder_states: Tensor | None) -> Tensor:
        with self.accelerator.autocast():
            if encoder_states is None:
                heard = batch.input_features.to(self.device, self.dtype)
                # Not WhisperModel.forward, which may mask the features in place (SpecAugment).
                encoder_states = self.model.model.encoder(heard).last_hidden_state
            states: Tensor = self.model.model.decoder(
                input_ids=batch.decoder_input_ids.to(self.device),
                encoder_hidden_states=encoder_states.to(self.device, self.dtype),
                use_cache=False,
            ).last_hidden_state
        return states.to(self.accelerator.device)


def device_of(options: TeacherOptions, accelerator: Accelerator) -> torch.device:
    """Return where the teacher runs.

    Raises:
        ConfigError: this machine has no such device.
    """
    if options.device is None:
        found: torch.device = accelerator.device
        return found
    device = torch.device(options.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f'teacher.device: "{options.device}", but this machine has '
            f"{torch.cuda.device_count()} GPUs"
        )
    return device
