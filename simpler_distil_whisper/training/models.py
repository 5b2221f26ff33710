"""The parts of the training loop: the two models together, optimizer, schedule, checkpoints.

The loop itself is in `trainer.py`, the only caller.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.model.teacher_cache import EncoderStateCache
from simpler_distil_whisper.model.whisper import Whisper
from simpler_distil_whisper.run import DataError
from simpler_distil_whisper.training.dataset import TrainingBatch
from simpler_distil_whisper.training.losses import LossTerms, LossWeights, distillation_loss
from simpler_distil_whisper.training.options import OptimizerOptions
from simpler_distil_whisper.training.teacher import Teacher


class TeacherAndStudent:
    """Both models on the same input: from a micro-batch to its loss terms.

    Attributes:
        module: the student with its loss, as `accelerator` has prepared it; its parameters are what
            is trained.
        cache: of the encoder states, where both models share a frozen encoder.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        teacher: Teacher,
        student: Whisper,
        weights: LossWeights,
        cache: EncoderStateCache | None = None,
    ) -> None:
        """Put both together; what of the student is trained is decided before (`freeze`)."""
        self.accelerator, self.teacher, self.student = accelerator, teacher, student
        self.weights = weights
        self.cache = cache
        self.module: nn.Module = StudentWithLoss(student.model, teacher.head, weights)

    def terms(self, batch: TrainingBatch) -> LossTerms:
        """Return the sums of the loss terms over the labels of a micro-batch.

        Args:
            batch: on the student's device.
        """
        states = self._encoder_states(batch)
        teacher_states = None
        if self.weights.kl:
            teacher_states = self.teacher.decoder_states(
                batch, states if self.teacher.shared_encoder else None
            )
        terms: LossTerms = self.module(batch, states, teacher_states)
        return terms

    @torch.no_grad()
    def _encoder_states(self, batch: TrainingBatch) -> Tensor | None:
        """Return float [B, E, D] of a frozen encoder; None where it is trained."""
        encoder = self.student.model.model.encoder
        if _is_trained(encoder):
            return None
        encoder.eval()
        with self.accelerator.autocast():
            if self.cache and batch.cached_encoder_states:
                return self.cache.complete(
                    batch.cached_encoder_states, batch.input_features, encoder
                )
            return self.student.encode(batch.input_features)


class StudentWithLoss(nn.Module):
    """The student and what it is to be like, as one module.

    One module, so that gradients of several processes are averaged over everything between a batch
    and its loss. Of the teacher it knows only the output head, which is no parameter of it.
    """

    def __init__(
        self, student: WhisperForConditionalGeneration, teacher_head: Tensor, weights: LossWeights
    ) -> None:
        """Keep all three.

        Args:
            student: float32 parameters; those that require gradients are trained.
            teacher_head: float [V, D'], any dtype.
            weights: of the parts of the loss.
        """
        super().__init__()
        self.student = student
        self.__dict__["teacher_head"] = teacher_head
        self.weights = weights

    def train(self, mode: bool = True) -> "StudentWithLoss":
        """Set the mode of the student, whose frozen encoder never drops anything out."""
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
        model = self.student.model
        if encoder_states is None:
            # Not WhisperModel.forward, which may mask the features in place (SpecAugment): the
            # teacher would hear what is left of them.
            encoder_states = model.encoder(batch.input_features).last_hidden_state
        said = model.decoder(
            input_ids=batch.decoder_input_ids,
            encoder_hidden_states=encoder_states.to(self.student.dtype),
            use_cache=False,
        ).last_hidden_state
        return distillation_loss(
            said,
            self.student.proj_out.weight,
            teacher_states,
            None if teacher_states is None else self.__dict__["teacher_head"],
            batch.labels,
            self.weights,
        )


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def computing_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of the products in the student's forward pass."""
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return autocast.get(accelerator.mixed_precision, torch.float32)


def freeze(
    student: WhisperForConditionalGeneration, encoder: bool, decoder: bool, embed_positions: bool
) -> None:
    """Decide which parameters of the student are trained.

    Args:
        student: changed in place.
        encoder: freeze all of the encoder.
        decoder: freeze all of the decoder, and with its token embedding the output head, which is
            the same tensor.
        embed_positions: freeze the decoder's position embedding.
    """
    student.requires_grad_(True)
    student.model.encoder.requires_grad_(not encoder)
    # Whisper's encoder positions are fixed sinusoids, never parameters to train.
    student.model.encoder.embed_positions.requires_grad_(False)
    student.model.decoder.requires_grad_(not decoder)
    if embed_positions:
        student.model.decoder.embed_positions.requires_grad_(False)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters for an optimizer: no decay on biases and layer norms."""
    # parameters() yields a tensor that two names share, like the output head, once.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, options: OptimizerOptions) -> torch.optim.AdamW:
    """Return the optimizer of a model's trained parameters."""
    return torch.optim.AdamW(
        parameter_groups(model, options.weight_decay),
        lr=options.learning_rate,
        betas=(options.betas[0], options.betas[1]),
        eps=options.epsilon,
        fused=True,
    )


def learning_rate_factor(
    kind: Literal["linear", "cosine", "constant"], step: int, warmup_steps: int, max_steps: int
) -> float:
    """Return the learning rate of step `step`, counted from 0, as a share of the highest one.

    It rises linearly over the warm-up, is 1 in the step after it, then stays or falls so that it
    would be 0 at `max_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2


@dataclass
class TrainerState:
    """Where a run is, beside the weights: kept in each checkpoint.

    Attributes:
        step: optimizer steps done.
        plan: hash of what the steps are made of; with another one the number means nothing.
        best_error_rate: of the student on the dev manifest so far; None: not validated yet.
        validations_since_best: how many found nothing better.
        teacher_error_rate: scored once, since it never changes.
        unlogged: sums of the steps that no line of the log shows yet (`RunningMeans.sums`).
    """

    step: int = 0
    plan: str = ""
    best_error_rate: float | None = None
    validations_since_best: int = 0
    teacher_error_rate: float | None = None
    unlogged: list[float] | None = None


class MovingAverage:
    """Exponential moving average of the trained weights, which is what is scored and saved.

    Accelerate keeps it in the checkpoints, since it has the methods of what can be kept there.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        """Begin with the weights as they are.

        Args:
            parameters: of the student; those that are trained are averaged.
            decay: share of the old average that stays at each step. In the first steps it is less,
                or the untrained weights would stay in it.
        """
        self.trained: list[Tensor] = [p for p in parameters if p.requires_grad]
        self.average = [parameter.detach().clone() for parameter in self.trained]
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after a step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.average, self.trained, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the student have the averaged weights for a while."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def leave_in_place(self) -> None:
        """Let the student have the averaged weights for good."""
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, average in zip(self.trained, self.average, strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint has kept."""
        self.steps = state["steps"]
        for average, kept in zip(self.average, state["average"], strict=True):
            average.copy_(kept)


class Checkpoints:
    """The folder of resumable states: written beside and renamed, old ones rotated out."""

    def __init__(self, folder: Path, keep_last: int, accelerator: Accelerator) -> None:
        """Name the folder; it is made with the first checkpoint."""
        self.folder = folder
        self.keep_last = keep_last
        self.accelerator = accelerator

    def save(self, state: TrainerState) -> Path:
        """Save model, optimizer, random states and `state`; call it in every process.

        Raises:
            DataError: it cannot be written; the ones before are whole.
        """
        whole = self.folder / f"step-{state.step:08d}"
        beside = self.folder / f".{whole.name}.tmp"
        if self.accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(beside))
        except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own
            shutil.rmtree(beside, ignore_errors=True)
            raise DataError(
                f"{whole} cannot be written: {error}. The checkpoints before it are whole: make "
                "room, and run the same command again to continue"
            ) from None
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            text = json.dumps(dataclasses.asdict(state), indent=2)
            write_atomically(beside / "trainer_state.json", text.encode())
            shutil.rmtree(whole, ignore_errors=True)
            beside.rename(whole)
            for old in self._all()[: -self.keep_last]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return whole

    def restore_last(self) -> TrainerState | None:
        """Load the newest checkpoint into the prepared objects; None if there is none."""
        if not (found := self._all()):
            return None
        self.accelerator.load_state(str(found[-1]))
        text = (found[-1] / "trainer_state.json").read_text(encoding="utf-8")
        return TrainerState(**json.loads(text))

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))
