"""The state of a training run on disk, from which a stopped run continues."""

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from simpler_distil_whisper.atomic import new_folder, refuse_others, write_atomically
from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.launch import is_main_process
from simpler_distil_whisper.run import DataError

OWN_NAME = re.compile(r"step-\d{8,}")


@dataclass
class TrainerState:
    """The progress of a run, saved with the weights in each checkpoint.

    Attributes:
        step: optimizer steps done.
        plan: hash of what the steps learn from; with another one the step number means nothing.
        best_error_rate: of the student on the dev manifest so far; None: not validated yet.
        validations_since_best: validations since then.
        teacher_error_rate: scored once, since it never changes.
        learning_rate: chosen before the first step; None: the config names it.
        unlogged: sums of the steps that no line of the log shows yet (`RunningMeans.sums`).
    """

    step: int = 0
    plan: str = ""
    best_error_rate: float | None = None
    validations_since_best: int = 0
    teacher_error_rate: float | None = None
    learning_rate: float | None = None
    unlogged: list[float] | None = None

    def record_validation(self, error_rate: float | None) -> bool:
        """Count a validation; return whether it is the best so far."""
        best = self.best_error_rate
        if error_rate is None or (best is not None and error_rate >= best):
            self.validations_since_best += 1
            return False
        self.best_error_rate, self.validations_since_best = error_rate, 0
        return True


class Checkpoints:
    """A folder of checkpoints: each is written under another name and renamed; old ones go."""

    def __init__(self, folder: Path, keep_last: int, accelerator: Accelerator) -> None:
        """Name the folder; it is made with the first checkpoint."""
        self.folder = folder
        self.keep_last = keep_last
        self.accelerator = accelerator
        accelerator.register_save_state_pre_hook(self._give_trained_weights)
        accelerator.register_load_state_pre_hook(self._load_trained_weights)

    def save(self, state: TrainerState) -> Path:
        """Save trained weights, optimizer, random states and `state`; call it in every process.

        Raises:
            ConfigError: somebody else's file or folder has its name.
            DataError: it cannot be written; the checkpoints before it are whole.
        """
        place = self.folder / f"step-{state.step:08d}"
        partial = self.folder / f".{place.name}.tmp"
        if is_main_process():
            if not _is_whole(place):
                refuse_others(place)
            new_folder(partial)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial))
        except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own
            shutil.rmtree(partial, ignore_errors=True)
            raise DataError(
                f"{place} cannot be written: {error}. The checkpoints before it are whole: make "
                "room, and run the same command again to continue"
            ) from None
        self.accelerator.wait_for_everyone()
        if is_main_process():
            text = json.dumps(dataclasses.asdict(state), indent=2)
            write_atomically(partial / "trainer_state.json", text.encode())
            for weights in partial.glob("*.safetensors"):
                shutil.copymode(partial / "trainer_state.json", weights)
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            for old in self._all()[: -self.keep_last]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return place

    def restore_last(self, plan: str) -> TrainerState:
        """Load the newest checkpoint into the prepared objects; return its state, or a new one.

        Args:
            plan: hash of what the steps of this run learn from.

        Raises:
            ConfigError: the checkpoint belongs to other steps, or lacks a trained weight.
        """
        checkpoints = self._all()
        if not checkpoints:
            return TrainerState(plan=plan)
        self.accelerator.load_state(str(checkpoints[-1]))
        text = (checkpoints[-1] / "trainer_state.json").read_text(encoding="utf-8")
        state = TrainerState(**json.loads(text))
        if state.plan != plan:
            raise ConfigError(
                f"resume: the checkpoint in {self.folder} belongs to other training rows or to "
                "steps of another size, so its step is no place in this run: restore the rows, and "
                "what batch.micro_batch_size, batch.gradient_accumulation_steps and the number of "
                'processes come to together, or choose another "output_dir"'
            )
        return state

    def _trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the trained parameters by the names that they have in one process."""
        parameters = self.accelerator.unwrap_model(model).named_parameters()
        return {name: value for name, value in parameters if value.requires_grad}

    def _give_trained_weights(
        self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str
    ) -> None:
        """Replace what accelerate would save: a frozen encoder is most of a student."""
        weights[:] = [
            {name: value.detach() for name, value in self._trained(model).items()}
            for model in models
        ]

    def _load_trained_weights(self, models: list[nn.Module], folder: str) -> None:
        """Load weights saved by any number of processes, with or without the frozen ones.

        Raises:
            ConfigError: a trained parameter is not among them.
        """
        while models:  # accelerate loads what is left in the list
            module = self.accelerator.unwrap_model(models.pop())
            path = Path(folder) / "model.safetensors"
            weights = {name.removeprefix("module."): w for name, w in load_file(path).items()}
            module.load_state_dict(weights, strict=False)
            tensors = module.state_dict(keep_vars=True)  # two names can share one
            loaded = {id(tensors[name]) for name in weights.keys() & tensors.keys()}
            for name, parameter in self._trained(module).items():
                if id(parameter) not in loaded:
                    raise ConfigError(
                        f"resume: {path} holds no {name}, which is trained now: restore the "
                        'student and "freeze", or choose another "output_dir"'
                    )

    def _all(self) -> list[Path]:
        """Return the folders of checkpoints; others that lie beside them are somebody else's."""
        folders = sorted(self.folder.glob("step-*"))
        return [path for path in folders if OWN_NAME.fullmatch(path.name) and _is_whole(path)]


def _is_whole(folder: Path) -> bool:
    return (folder / "trainer_state.json").is_file()
