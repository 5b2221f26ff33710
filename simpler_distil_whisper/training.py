"""The parts of the training loop: the two models together, optimizer, schedule, checkpoints.

The loop itself is in `trainer.py`, the only caller.
"""

import dataclasses
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.losses import LossTerms, distillation_loss
from simpler_distil_whisper.run import write_atomically
from simpler_distil_whisper.training_data import TrainingBatch


class TeacherAndStudent(nn.Module):
    """Student and frozen teacher on the same input; `forward` returns the loss terms.

    One module, so that gradients of several processes are averaged over everything between a batch
    and its loss. The teacher is not registered in it: it is neither trained nor saved.
    """

    def __init__(
        self,
        student: WhisperForConditionalGeneration,
        teacher: WhisperForConditionalGeneration,
        temperature: float,
        share_encoder: bool,
    ) -> None:
        """Put both into the mode in which they stay.

        Args:
            student: float32 parameters; those that require gradients are trained.
            teacher: any dtype. With a shared encoder its own is never run and can be dropped.
            temperature: of the teacher's and the student's distribution in the KL term.
            share_encoder: the teacher's decoder listens to the student's (frozen) encoder.
        """
        super().__init__()
        self.student = student
        self.__dict__["teacher"] = teacher.eval().requires_grad_(False)
        self.temperature = temperature
        self.share_encoder = share_encoder

    def train(self, mode: bool = True) -> "TeacherAndStudent":
        """Set the mode of the student, whose frozen encoder never drops anything out."""
        super().train(mode)
        encoder = self.student.model.encoder
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            encoder.eval()
        return self

    def forward(self, batch: TrainingBatch, encoder_states: Tensor | None = None) -> LossTerms:
        """Return the sums of both loss terms over the labels of a micro-batch.

        Args:
            batch: on the models' device.
            encoder_states: float [B, E, D]: those of a shared encoder, if they are known; None:
                they are computed from the batch.
        """
        student, teacher = self.student, self.__dict__["teacher"]
        features = batch.input_features
        # Called part by part: WhisperModel.forward would mask the features in place (SpecAugment),
        # and the teacher would hear what is left of them.
        if encoder_states is None:
            states = student.model.encoder(features).last_hidden_state
        else:
            states = encoder_states.to(student.dtype)
        with torch.no_grad():
            if self.share_encoder:
                teacher_states = states.to(teacher.dtype)
            else:
                teacher_states = teacher.model.encoder(features.to(teacher.dtype)).last_hidden_state
            taught = _decode(teacher, batch.decoder_input_ids, teacher_states)
        said = _decode(student, batch.decoder_input_ids, states)
        return distillation_loss(
            said,
            student.proj_out.weight,
            taught,
            teacher.proj_out.weight,
            batch.labels,
            self.temperature,
        )


def _decode(model: WhisperForConditionalGeneration, ids: Tensor, states: Tensor) -> Tensor:
    """Return float [B, L, D]: last decoder states."""
    decoded: Tensor = model.model.decoder(
        input_ids=ids, encoder_hidden_states=states, use_cache=False
    ).last_hidden_state
    return decoded


def encoders_are_equal(
    student: WhisperForConditionalGeneration, teacher: WhisperForConditionalGeneration
) -> bool:
    """Return whether both encoders compute the same: layers, width, mels and every weight.

    Compare before either is cast: rounding to another dtype makes equal weights differ.
    """
    ours, theirs = student.model.encoder.state_dict(), teacher.model.encoder.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == theirs[name].shape and torch.equal(ours[name], theirs[name])
        for name in ours
    )


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
        teacher_error_rate: scored once, since it never changes.
    """

    step: int = 0
    plan: str = ""
    best_error_rate: float | None = None
    teacher_error_rate: float | None = None


class Checkpoints:
    """The folder of resumable states: written beside and renamed, old ones rotated out."""

    def __init__(self, folder: Path, keep_last: int, accelerator: Accelerator) -> None:
        """Name the folder; it is made with the first checkpoint."""
        self.folder = folder
        self.keep_last = keep_last
        self.accelerator = accelerator

    def save(self, state: TrainerState) -> Path:
        """Save model, optimizer, random states and `state`; call it in every process."""
        whole = self.folder / f"step-{state.step:08d}"
        beside = self.folder / f".{whole.name}.tmp"
        if self.accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(beside))
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


class MetricsLog:
    """`metrics.jsonl`, one object per line, and the same numbers for TensorBoard if wanted.

    A run that resumes from a step first takes back what was logged after it.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool, enabled: bool) -> None:
        """Open both for a run that goes on after `first_step`; `enabled`: in the main process."""
        self._path = folder / "metrics.jsonl"
        self._writer = None
        self._enabled = enabled
        if not enabled:
            return
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            # From step 0 a run begins anew, and scores the teacher anew.
            kept = [line for line in lines if first_step and _step_of(line) <= first_step]
            write_atomically(self._path, "".join(kept).encode())
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "logs"), purge_step=first_step + 1)

    def log(self, step: int, values: dict[str, float | None]) -> None:
        """Append the values of one step; None, and what JSON has no number for, is kept as null."""
        if not self._enabled:
            return
        # A step that the gradient scaler of fp16 skips has an infinite norm.
        values = {
            name: v if v is not None and math.isfinite(v) else None for name, v in values.items()
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:  # a kill can tear the last line
        return math.inf
