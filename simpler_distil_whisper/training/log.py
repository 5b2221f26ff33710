"""The records of a training run: means over the last steps, metrics.jsonl, lost rows.

Owns what is written there; the numbers come from the trainer.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.data.manifest import Rejection
from simpler_distil_whisper.data.results import rejection_line
from simpler_distil_whisper.model.processes import sums_over_processes
from simpler_distil_whisper.run import DataError, log
from simpler_distil_whisper.training.dataset import TrainingBatch
from simpler_distil_whisper.training.losses import LossTerms


class RunningMeans:
    """Means of the loss terms since the last line of the log, over all processes together."""

    def __init__(
        self, device: torch.device, uses_teacher: bool, carried: Sequence[float] | None = None
    ) -> None:
        """Start with empty sums.

        Args:
            device: where the loss terms are.
            uses_teacher: the loss depends on the teacher.
            carried: what `sums` returned for the checkpoint from which the run continues.
        """
        self.device = device
        self.uses_teacher = uses_teacher
        self._restart()
        if carried is not None:
            self._carried = torch.tensor(carried, dtype=torch.float64)

    def start_clock(self) -> None:
        """Start measuring the speed, before the first step."""
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the speed what is done meanwhile."""
        stopped = time.perf_counter()
        yield
        self._started += time.perf_counter() - stopped

    def add(self, terms: LossTerms, batch: TrainingBatch) -> None:
        """Count one micro-batch; nothing waits for the device here."""
        self._terms.append(torch.stack([term.detach().float() for term in terms]))
        self._seconds += batch.seconds

    def end_step(self, grad_norm: torch.Tensor, learning_rate: float) -> None:
        """Keep the gradient norm and learning rate of a step; the log shows the last one's."""
        self._grad_norm, self._learning_rate = grad_norm, learning_rate

    def end(self) -> dict[str, float | None]:
        """Return the means per token, and the speed; start again with empty sums."""
        sums = self._new_sums()
        loss, cross_entropy, kl, agreement, tokens = (self._carried + sums)[:5].tolist()
        new_tokens, new_seconds = sums[4:].tolist()
        elapsed = time.perf_counter() - self._started
        values: dict[str, float | None] = {
            "train/loss": loss / tokens if tokens else None,
            "train/cross_entropy": cross_entropy / max(tokens, 1),
            "train/kl": kl / max(tokens, 1) if self.uses_teacher else None,
            "train/agreement": agreement / max(tokens, 1) if self.uses_teacher else None,
            "train/grad_norm": float(self._grad_norm),
            "train/learning_rate": self._learning_rate,
            "train/tokens_per_second": new_tokens / elapsed,
            "train/audio_seconds_per_second": new_seconds / elapsed,
        }
        self._restart()
        return values

    def sums(self) -> list[float]:
        """Return the sums since the last line, for a checkpoint; call it in every process."""
        sums: list[float] = (self._carried + self._new_sums()).tolist()
        return sums

    def _new_sums(self) -> torch.Tensor:
        """Return float64 [6] on the CPU: loss terms, tokens, seconds since this process started."""
        none = torch.zeros(5, device=self.device)
        terms = torch.stack([none, *self._terms]).cpu().double().sum(0)
        own = torch.cat([terms, torch.tensor([self._seconds], dtype=torch.float64)])
        return sums_over_processes(own)

    def _restart(self) -> None:
        self._terms: list[torch.Tensor] = []
        self._seconds = 0.0
        self._carried = torch.zeros(6, dtype=torch.float64)
        self._started = time.perf_counter()


class MetricsLog:
    """`metrics.jsonl`, one object per line, and the same numbers for TensorBoard.

    A run that continues after a step first removes the lines that were logged after it.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool, enabled: bool) -> None:
        """Open both for a run that continues after `first_step`.

        Args:
            folder: of the run.
            first_step: optimizer steps done so far.
            tensorboard: write for TensorBoard too.
            enabled: False in all processes but the main one, where nothing is written.
        """
        self._path = folder / "metrics.jsonl"
        self._writer = None
        self._enabled = enabled
        if not enabled:
            return
        if self._path.exists():
            # From step 0 a run starts again, and scores the teacher again.
            rows = read_metrics(self._path) if first_step else []
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= first_step]
            write_atomically(self._path, "".join(kept).encode())
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "logs"), purge_step=first_step + 1)

    def log(self, step: int, values: dict[str, float | None]) -> None:
        """Append the values of one step; None, NaN and infinity become null."""
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


class RejectionLog:
    """Examples whose audio cannot be decoded although its header was good: each is written once."""

    def __init__(self, path: Path, most: float) -> None:
        """Open the run's rejected.jsonl, which holds the rows that the filters dropped.

        Args:
            path: the file.
            most: how many examples may be added.
        """
        self._path, self._most = path, most
        self._known: set[str] = set()
        self._end = 0  # of what has been read
        self._read_on()
        self._known_before = len(self._known)

    def add(self, rejections: Iterable[Rejection]) -> None:
        """Append the rejections that no process has written yet.

        Raises:
            DataError: these are too many.
        """
        for rejection in rejections:
            if rejection.place not in self._known:
                self._read_on()  # the other processes add to it too
            if rejection.place in self._known:
                continue
            self._known.add(rejection.place)
            log.warning("not learnt from: %s: %s", rejection.place, rejection.reason)
            with self._path.open("ab+") as file:
                if file.tell():  # a full disk can have torn the last line
                    file.seek(-1, os.SEEK_END)
                    file.write(b"" if file.read() == b"\n" else b"\n")
                file.write(rejection_line(rejection).encode())
            if (count := len(self._known) - self._known_before) > self._most:
                raise DataError(
                    f"{count} training rows do not decode, more than data.max_bad_fraction allows; "
                    f"the reasons are in {self._path}"
                )

    def _read_on(self) -> None:
        """Take in the new lines; one that a kill or a full disk has torn is none."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._end)
            for line in file:
                with contextlib.suppress(ValueError):
                    self._known.add(json.loads(line)["place"])
                if line.endswith(b"\n"):
                    self._end += len(line)


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a metrics.jsonl; a last line that a kill has torn is none."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
