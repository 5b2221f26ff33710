"""The teacher: a frozen Whisper whose last decoder states, read by its output head, are the target.

Owns the model, which is loaded only when something is not in the cache. It keeps nothing that it
computes.
"""

import functools

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.devices import torch_dtype
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.weights import output_head
from simpler_distil_whisper.model.whisper import Whisper, load_whisper
from simpler_distil_whisper.run import log
from simpler_distil_whisper.training.dataset import TrainingBatch
from simpler_distil_whisper.training.options import TeacherOptions


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
        log.info("teacher: loaded in %s on %s", self.dtype, self.device)
        model = self.load().model.requires_grad_(False)
        if self.shared_encoder:
            model.model.encoder = None  # the student's is used
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
    def decoder_states(self, batch: TrainingBatch, encoder_states: Tensor | None) -> Tensor:
        """Return float [B, L, D'], on the student's device: its last decoder states.

        Args:
            batch: on the student's device.
            encoder_states: float [B, E, D]: those of the shared encoder; None: it has its own.
        """
        with self.accelerator.autocast():
            if encoder_states is None:
                features = batch.input_features.to(self.device, self.dtype)
                # Not WhisperModel.forward, which may mask the features in place (SpecAugment).
                encoder_states = self.model.model.encoder(features).last_hidden_state
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
        device: torch.device = accelerator.device
        return device
    device = torch.device(options.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f'teacher.device: "{options.device}", but this machine has '
            f"{torch.cuda.device_count()} GPUs"
        )
    return device
