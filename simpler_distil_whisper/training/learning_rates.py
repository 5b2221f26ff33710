"""Which learning rate suits a student: short runs from the same weights over the same batches.

Not one run with a rising rate (Smith 2017, arXiv 1506.01186), whose late losses depend as much on
the steps before as on the rate: a handful of short runs takes as long, and compares what matters,
how low the loss comes in so many steps.
"""

import io
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.run import log
from simpler_distil_whisper.training.dataset import TrainingBatch, TrainingSteps
from simpler_distil_whisper.training.trainer import Trainer

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SECONDS = 60.0  # for all rates together
STEPS = range(10, 31)  # of each run: fewer tell little, more change little
WARMUP_STEPS = 5  # Adam's first steps move every weight by the whole learning rate
FAR_OFF = 3.0  # factor between learning rates
CLOSE = 1.05  # factor between losses


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

    def restore(self) -> None:
        """Give the student its weights back, and clear the optimizer's moments."""
        with torch.no_grad():
            for parameter, weight in zip(self.trained, self.weights, strict=True):
                parameter.copy_(weight)
        self.trainer.optimizer.optimizer.state.clear()
        self.trainer.state.step = 0

    def run(self, steps: Iterable[Sequence[TrainingBatch]], rate: float) -> ShortRun:
        """Take a step with the micro-batches of each, at a constant rate after a warm-up."""
        self.restore()
        losses = []
        for step, micro_batches in enumerate(steps):
            warmup = min(1.0, (step + 1) / (WARMUP_STEPS + 1))
            self.trainer.train_step(micro_batches, warmup * rate)
            loss = self.trainer.means.end()["train/loss"]
            losses.append(math.nan if loss is None else loss)
        self.restore()
        return ShortRun(rate, losses)


def range_test(
    runs: ShortRuns,
    steps: TrainingSteps,
    configured: float,
    seconds_per_step: float,
    picture: Path,
) -> float | None:
    """Compare learning rates; log which suits, and how far from it the configured one is.

    Args:
        runs: from the student's weights.
        steps: what is trained on.
        configured: the learning rate of the config, which is tried too.
        seconds_per_step: decides how many steps each rate gets.
        picture: a PNG of the losses; a JSON file of the same name is written beside it.

    Returns:
        the suggestion; None if there is none.
    """
    rates = sorted({*RATES, configured})
    affordable = int(SECONDS / (seconds_per_step * len(rates)))
    count = max(STEPS.start, min(affordable, STEPS.stop - 1))
    seconds = len(rates) * count * seconds_per_step
    log.info("learning rates: %d runs of %d steps, about %.0f s", len(rates), count, seconds)
    tried: list[ShortRun] = []
    for rate in rates:
        tried.append(runs.run(itertools.islice(steps.since(0), count), rate))
        log.info("  %-8g loss %.4f", rate, tried[-1].reached)
        if not tried[-1].reached <= tried[0].reached:
            break  # higher ones would do more harm
    suggestion = suggested(tried)
    _log(suggestion, tried, configured)
    _write(picture, tried, suggestion, configured)
    return suggestion


def suggested(tried: Sequence[ShortRun]) -> float | None:
    """Return the rate with the lowest loss; None if that is the lowest rate, which learns little.

    The others are compared with the lowest rate, not with the first loss: some batches are harder.
    """
    best = min(tried, key=lambda run: run.reached)
    return None if best.rate == tried[0].rate else best.rate


def _log(suggestion: float | None, tried: Sequence[ShortRun], configured: float) -> None:
    steps, reached = len(tried[0].losses), {run.rate: run.reached for run in tried}
    if suggestion is None:
        log.warning(
            "no learning rate above %g came lower in %d steps: look at labels, audio and student "
            "before anything else",
            tried[0].rate,
            steps,
        )
        return
    lowest = reached[suggestion]
    as_good = [f"{rate:g}" for rate in reached if lowest < reached[rate] < CLOSE * lowest]
    log.info(
        "suggested optimizer.learning_rate: %g, whose loss was the lowest after %d steps%s",
        suggestion,
        steps,
        f"; hardly worse: {', '.join(as_good)}" if as_good else "",
    )
    if suggestion / FAR_OFF <= configured <= suggestion * FAR_OFF:
        return
    result = "the loss would rise: it did so at lower ones"
    if configured in reached:
        result = f"the loss came to {reached[configured]:.4f}"
    log.warning(
        "optimizer.learning_rate is %g, where %s; at %g it came to %.4f",
        configured,
        result,
        suggestion,
        reached[suggestion],
    )


def _write(
    picture: Path, tried: Sequence[ShortRun], suggestion: float | None, configured: float
) -> None:
    from matplotlib.figure import Figure  # it takes a second to import, and is seldom needed

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    over_steps, over_rates = figure.subplots(1, 2)
    for run in tried:
        over_steps.plot(range(1, len(run.losses) + 1), run.losses, label=f"{run.rate:g}")
    over_steps.set(title="Loss at each learning rate", xlabel="optimizer step", ylabel="per token")
    shown = [run for run in tried if math.isfinite(run.reached)]
    over_rates.plot([run.rate for run in shown], [run.reached for run in shown], "o-")
    over_rates.axvline(
        configured, color="#c2571a", ls="dashed", label=f"configured: {configured:g}"
    )
    if suggestion:
        over_rates.axvline(suggestion, color="#0b6bcb", label=f"suggested: {suggestion:g}")
    over_rates.set(title="Mean of the last third", xlabel="learning rate", xscale="log")
    for axes in (over_steps, over_rates):
        axes.set(yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    numbers = {
        "suggested": suggestion,
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
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(picture, buffer.getvalue())
    beside = picture.with_suffix(".json")
    write_atomically(beside, json.dumps(numbers, indent=2).encode())
    log.info("%s and %s: the losses", picture, beside.name)
