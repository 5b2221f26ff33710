"""Which learning rate suits a student: short runs from the same weights over the same batches.

Not one run with a rising rate (Smith 2017, arXiv 1506.01186), whose late losses depend as much on
the steps before as on the rate: a handful of short runs takes as long, and compares what matters,
how low the loss comes in so many steps. Nothing is timed, so the same run chooses the same rate.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from simpler_distil_whisper.atomic import write_atomically, written_atomically
from simpler_distil_whisper.launch import is_main_process
from simpler_distil_whisper.run import DataError, log
from simpler_distil_whisper.stopping import Interrupted
from simpler_distil_whisper.training.dataset import TrainingBatch, TrainingSteps
from simpler_distil_whisper.training.optimizer import learning_rate_factor
from simpler_distil_whisper.training.trainer import Trainer

FIRST = 5e-4  # the rates that are tried are this one times a power of two
STRIDES = (2, 1)  # of the exponent: first each fourfold rate, then the ones between
LOWEST, HIGHEST = -9, 5  # exponents: 1e-6 and 1.6e-2
STEPS, WARMUP_STEPS = 20, 2  # of each run
FAR_OFF = 3.0  # factor between learning rates


class ShortRun(NamedTuple):
    """What became of the loss at one learning rate.

    Attributes:
        rate: the learning rate.
        losses: per token, before each step.
    """

    rate: float
    losses: list[float]

    @property
    def reached(self) -> float:
        """The mean loss of the last third; infinite if it is not a number."""
        last = self.losses[-max(1, len(self.losses) // 3) :]
        mean = sum(last) / len(last)
        return mean if math.isfinite(mean) else math.inf


class ShortRuns:
    """Runs of a few steps, each of which starts from the weights that the student has now."""

    def __init__(self, trainer: Trainer) -> None:
        """Copy the trained weights to the CPU, where they take no memory of the device."""
        self.trainer = trainer
        student = trainer.models.student.model
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self.weights = [parameter.detach().to("cpu", copy=True) for parameter in self.trained]
        self.scaler = trainer.accelerator.scaler  # of float16; else None
        self.scaling = self.scaler.state_dict() if self.scaler else {}

    def restore(self) -> None:
        """Give the student its weights back, and clear the optimizer's moments.

        The scale of float16, which falls with every step that diverges, is that of the start too.
        """
        with torch.no_grad():
            for parameter, weight in zip(self.trained, self.weights, strict=True):
                parameter.copy_(weight)
        if self.scaler:
            self.scaler.load_state_dict(self.scaling)
        self.trainer.optimizer.optimizer.state.clear()
        self.trainer.state.step = 0

    def run(self, steps: Iterable[Sequence[TrainingBatch]], rate: float) -> ShortRun:
        """Take a step with the micro-batches of each, at rates that rise and fall as in a run.

        At a constant rate, the best of short runs was measured to be half of that of whole runs.

        Raises:
            Interrupted: a stop signal came.
        """
        self.restore()
        losses = []
        for step, micro_batches in enumerate(steps):
            factor = learning_rate_factor("linear", step, WARMUP_STEPS, STEPS)
            if self.trainer.train_step(micro_batches, factor * rate):
                raise Interrupted
            loss = self.trainer.means.end()["train/loss"]
            losses.append(math.nan if loss is None else loss)
        self.restore()
        return ShortRun(rate, losses)


def decide_learning_rate(
    configured: float | Literal["auto"], trainer: Trainer, steps: TrainingSteps
) -> float:
    """Return the learning rate of a run, which a run that continues has in its state.

    Where the config leaves it open, it is chosen by short runs before the first step, and drawn in
    the run's folder.
    """
    if configured != "auto":
        return configured
    state = trainer.state
    if state.learning_rate is None:
        picture = trainer.run.folder / "learning_rate.png"
        state.learning_rate = range_test(ShortRuns(trainer), steps, picture)
    trainer.run.note(learning_rate=state.learning_rate)
    return state.learning_rate


def range_test(
    runs: ShortRuns, steps: TrainingSteps, picture: Path, configured: float | None = None
) -> float:
    """Compare learning rates in short runs; return the one with which the loss comes lowest.

    Of equal losses the lower rate is better: above it all may have diverged.

    Args:
        runs: from the student's weights.
        steps: what is trained on.
        picture: a PNG of the losses; a JSON file of the same name is written beside it.
        configured: is tried too, and if it is far from the best one, that is logged.

    Raises:
        DataError: the loss is finite at none.
    """
    log.info("comparing learning rates, in runs of %d steps each:", STEPS)

    def run_at(rate: float) -> ShortRun:
        # Also where the run has fewer: in a first step alone, all rates come to the same loss.
        run = runs.run(steps.since(0, STEPS), rate)
        log.info("  learning rate %-9.3g loss %.4f", rate, run.reached)
        return run

    tried = search(run_at)
    best = min(tried, key=lambda run: (run.reached, run.rate))
    if math.isinf(best.reached):
        raise DataError(
            f"the loss is not finite at any learning rate from {best.rate:.3g} on: look at labels, "
            'audio and student, or use precision "float32"'
        )
    if configured is not None:
        if configured not in [run.rate for run in tried]:
            tried.append(run_at(configured))
        _compare(tried, best, configured)
    _log_choice(best)
    if is_main_process():
        tried.sort()
        _draw(picture, tried, best.rate, configured)
        _write_numbers(picture.with_suffix(".json"), tried, best.rate, configured)
        log.info("%s and %s: the losses", picture, picture.with_suffix(".json").name)
    return best.rate


def search(run_at: Callable[[float], ShortRun]) -> list[ShortRun]:
    """Return the runs at learning rates around the best one, in the order in which they were made.

    Downhill from `FIRST`, in strides that become shorter: the loss falls towards the best rate from
    both sides, so where one side is lower the other is not tried. Of equal losses it goes to the
    lower rate.
    """
    tried: dict[int, ShortRun] = {}

    def reached(exponent: int) -> tuple[float, int]:
        if exponent not in tried:
            tried[exponent] = run_at(FIRST * 2.0**exponent)
        return tried[exponent].reached, exponent

    best = 0
    for stride in STRIDES:
        while True:
            sides = [e for e in (best - stride, best + stride) if LOWEST <= e <= HIGHEST]
            # First towards the lower of those tried on both sides, one stride further.
            sides.sort(key=lambda e: tried[2 * e - best].reached if 2 * e - best in tried else 0.0)
            lower = next((e for e in sides if reached(best) > reached(e)), None)
            if lower is None:
                break
            best = lower
    return list(tried.values())


def _log_choice(best: ShortRun) -> None:
    if best.rate <= FIRST * 2.0**LOWEST:
        log.warning(
            "no learning rate above %g came lower in %d steps: look at labels, audio and student "
            "before anything else",
            best.rate,
            STEPS,
        )
        return
    log.info("learning rate %g: its loss came lowest, to %.4f", best.rate, best.reached)


def _compare(tried: Sequence[ShortRun], best: ShortRun, configured: float) -> None:
    """Warn if the configured rate is far from the best one."""
    reached = {run.rate: run.reached for run in tried}
    if not best.rate / FAR_OFF <= configured <= best.rate * FAR_OFF:
        log.warning(
            "optimizer.learning_rate is %g, with which the loss came to %.4f; with %g it came to "
            '%.4f. Set it to "auto", or to that',
            configured,
            reached[configured],
            best.rate,
            best.reached,
        )


def _draw(picture: Path, tried: Sequence[ShortRun], best: float, configured: float | None) -> None:
    from matplotlib.figure import Figure  # it takes a second to import, and is seldom needed

    figure = Figure(figsize=(11, 4.5))
    margins = {"left": 0.08, "right": 0.98, "bottom": 0.12, "top": 0.93, "wspace": 0.2}
    over_steps, over_rates = figure.subplots(1, 2, gridspec_kw=margins)
    for run in tried:
        over_steps.plot(range(1, len(run.losses) + 1), run.losses, label=f"{run.rate:.3g}")
    over_steps.set(title="Loss at each learning rate", xlabel="optimizer step", ylabel="per token")
    shown = [run for run in tried if math.isfinite(run.reached)]
    over_rates.plot([run.rate for run in shown], [run.reached for run in shown], "o-")
    over_rates.axvline(best, color="#0b6bcb", label=f"lowest loss: {best:.3g}")
    if configured is not None:
        over_rates.axvline(
            configured, color="#c2571a", ls="dashed", label=f"configured: {configured:g}"
        )
    over_rates.set(title="Mean of the last third", xlabel="learning rate", xscale="log")
    over_rates.minorticks_off()  # their labels would cover each other
    over_rates.set_xticks([run.rate for run in shown], [f"{run.rate:.3g}" for run in shown])
    for axes in (over_steps, over_rates):
        axes.set(yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def _write_numbers(
    path: Path, tried: Sequence[ShortRun], best: float, configured: float | None
) -> None:
    numbers = {
        "lowest_loss_at": best,
        "configured": configured,
        "runs": [
            {
                "learning_rate": run.rate,
                "loss": run.reached if math.isfinite(run.reached) else None,
                "losses": [loss if math.isfinite(loss) else None for loss in run.losses],
            }
            for run in tried
        ],
    }
    write_atomically(path, json.dumps(numbers, indent=2).encode())
