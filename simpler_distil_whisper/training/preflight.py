"""Checks before hours are spent: the rows, both models on one batch, the time of a few steps.

Owns `check_at_start`, which takes seconds and precedes the first step of a run, and
`check_thoroughly`, which is `--check` on a rehearsal of the run.
"""

import copy
import dataclasses
import datetime
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.manifest import Manifest
from simpler_distil_whisper.launch import is_main_process
from simpler_distil_whisper.model.memory import out_of_memory, peak_memory_megabytes
from simpler_distil_whisper.model.pruning import prune_whisper
from simpler_distil_whisper.model.whisper import load_whisper
from simpler_distil_whisper.run import log
from simpler_distil_whisper.training.data_checks import check_data
from simpler_distil_whisper.training.dataset import TrainingBatch, TrainingSteps
from simpler_distil_whisper.training.learning_rates import ShortRuns, range_test
from simpler_distil_whisper.training.models import TeacherAndStudent, computing_dtype
from simpler_distil_whisper.training.options import ONLY_KL
from simpler_distil_whisper.training.selection import Selection
from simpler_distil_whisper.training.trainer import Trainer
from simpler_distil_whisper.training.validation import Validation

TIMED_STEPS = 5
TIMED_SECONDS = 20.0
TIMED_ROWS = 16  # of dev
STEPS_ON_ONE_BATCH = 10
BYTES_PER_TRAINED_WEIGHT = 12  # in float32: its gradient and Adam's two moments


class Agreement(NamedTuple):
    """How alike teacher and student are at the label tokens of a batch.

    Attributes:
        kl: KL(teacher || student) per token, in nats, at temperature 1.
        same: share of the tokens for which both have the same likeliest token.
        tokens: how many.
    """

    kl: float
    same: float
    tokens: int


def check_at_start(
    trainer: Trainer, steps: TrainingSteps, selection: Selection, dev: Manifest | None
) -> None:
    """Check rows and models before the first step; the results are in `run_info.json`.

    Raises:
        ConfigError: a student with all the teacher's layers would not agree with the teacher.
        DataError: too many labels do not survive the tokenizer.
    """
    if not is_main_process():
        return
    student = trainer.models.student
    results: dict[str, object] = {**check_data(selection, dev, steps.visit_tokens.data, student)}
    cached = first_micro_batches(steps)[0].cached_decoder_states
    # Where a cache has all decoder states no teacher is loaded, and none for this.
    if cached is None or cached.missing:
        agreement = check_agreement(trainer, steps)
        if agreement:
            results |= {"unpruned_kl": agreement.kl, "unpruned_agreement": agreement.same}
    trainer.run.note(check=results)


def check_thoroughly(
    trainer: Trainer,
    steps: TrainingSteps,
    selection: Selection,
    dev: Manifest | None,
    learning_rate: float | Literal["auto"],
    picture: Path | None,
) -> None:
    """Do all checks, and log what a run will cost.

    Args:
        trainer: of a rehearsal of the run.
        steps: what it learns from.
        selection: the training rows.
        dev: the rows of validation.
        learning_rate: the configured one.
        picture: where the comparison of learning rates is drawn; None: there is none.

    Raises:
        ConfigError: a student with all the teacher's layers would not agree with the teacher, or
            memory does not suffice.
        DataError: too many labels do not survive the tokenizer.
    """
    check_data(selection, dev, steps.visit_tokens.data, trainer.models.student)
    runs = ShortRuns(trainer)
    uncached, cached = time_steps(trainer, steps), None
    runs.restore()
    steps.caches.finish()
    if steps.caches.encoder or steps.caches.decoder:
        # The same steps, whose states the caches now hold.
        cached = time_steps(trainer, steps)
        runs.restore()
    log_memory(trainer)  # before more is in it than in a run
    check_agreement(trainer, steps)
    log_time(trainer, steps, selection, uncached, cached)
    configured = None if learning_rate == "auto" else learning_rate
    if picture:
        range_test(runs, steps, picture, configured)
    if configured:
        check_learning_rate(runs, first_micro_batches(steps), configured)


def first_micro_batches(steps: TrainingSteps) -> Sequence[TrainingBatch]:
    """Return the micro-batches of the first step."""
    return next(steps.since(0))


def check_agreement(trainer: Trainer, steps: TrainingSteps) -> Agreement | None:
    """Compare the teacher with a student that has all its layers, on the input of training.

    Returns:
        how alike they are; None if the loss does not depend on the teacher, or memory does not
            suffice for this.

    Raises:
        ConfigError: they differ.
    """
    models = trainer.models
    if not models.objective.uses_teacher:
        return None
    try:
        agreement = agreement_of_unpruned(models, first_micro_batches(steps.without_caches())[0])
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        log.warning(
            "teacher and student, unpruned, are not compared: memory does not suffice for a third "
            "model beside them"
        )
        return None
    if not agreement.tokens:  # no audio of the batch can be read, which is reported elsewhere
        return None
    coarse = {models.teacher.dtype, computing_dtype(models.accelerator)} != {torch.float32}
    max_kl, min_same = (0.05, 0.9) if coarse else (1e-4, 0.99)
    result = (
        f"KL {agreement.kl:.2g} per token, the same likeliest token at {agreement.same:.1%} of "
        f"{agreement.tokens} tokens"
    )
    if not (agreement.kl <= max_kl and agreement.same >= min_same):
        raise ConfigError(
            f"teacher and student, unpruned, do not agree: {result}; expected are at most "
            f"{max_kl:g} and at least {min_same:.0%}. A student with all the teacher's layers must "
            "predict what the teacher predicts. Numbers that are not finite are too large for "
            'their dtype: set teacher.dtype "float32" or "bfloat16". Else the two are not given '
            "the same input: please report this bug"
        )
    log.info("teacher and student, unpruned, agree: %s", result)
    return agreement


def agreement_of_unpruned(models: TeacherAndStudent, batch: TrainingBatch) -> Agreement:
    """Return how alike the teacher and a student with all its layers are, computed as in training.

    Args:
        models: teacher and student of the run.
        batch: without cached states.
    """
    teacher, accelerator = models.teacher, models.accelerator
    # Both are made on the CPU; a run draws the same random numbers whether it was checked or not.
    with torch.random.fork_rng(devices=[]):
        whole = load_whisper(teacher.folder, "float32", teacher.options.attention)
        layers = whole.model.config
        model = prune_whisper(
            whole.model, range(layers.encoder_layers), range(layers.decoder_layers)
        )
    model.requires_grad_(False).to(accelerator.device)
    student = dataclasses.replace(whole, model=model)
    unpruned = TeacherAndStudent(accelerator, teacher, student, ONLY_KL)
    with torch.no_grad(), accelerator.autocast():
        terms = unpruned.loss_terms(batch.to(accelerator.device))
    kl, same, tokens = float(terms.kl), float(terms.agreement), int(terms.tokens)
    return Agreement(kl / max(tokens, 1), same / max(tokens, 1), tokens)


def check_learning_rate(
    runs: ShortRuns, micro_batches: Sequence[TrainingBatch], learning_rate: float
) -> None:
    """Warn if some steps on one batch do not lower its loss."""
    losses = runs.run([micro_batches] * STEPS_ON_ONE_BATCH, learning_rate).losses
    result = f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses) - 1} steps on one batch"
    if losses[-1] < losses[0]:
        log.info("optimizer.learning_rate %g: %s", learning_rate, result)
    else:
        log.warning(
            'optimizer.learning_rate %g: %s: it should fall. Lower it, or set it to "auto"',
            learning_rate,
            result,
        )


def time_steps(trainer: Trainer, steps: TrainingSteps) -> float:
    """Return how many seconds a step takes, audio included, without the first one."""
    ends = [time.perf_counter()]
    for micro_batches in steps.since(0):
        trainer.train_step(micro_batches, learning_rate=0.0)
        trainer.means.end()  # which waits for the device
        ends.append(time.perf_counter())
        late = ends[-1] - ends[0] > TIMED_SECONDS
        if len(ends) > TIMED_STEPS + 1 or (late and len(ends) > 2):
            break
    steady = ends[1:] if len(ends) > 2 else ends  # the first step waits for much
    return (steady[-1] - steady[0]) / (len(steady) - 1)


def time_validation(trainer: Trainer, validation: Validation) -> float:
    """Return about how many seconds it takes to score the student on the dev rows."""
    sample = copy.copy(validation)
    sample.utterances = validation.utterances[:TIMED_ROWS]
    trainer.models.module.eval()
    started = time.perf_counter()
    with trainer.advise_when_out_of_memory():
        sample.score(trainer.models.student)
    elapsed = time.perf_counter() - started
    return elapsed * len(validation.utterances) / len(sample.utterances)


def log_time(
    trainer: Trainer,
    steps: TrainingSteps,
    selection: Selection,
    uncached: float,
    cached: float | None,
) -> None:
    """Log how long the run will take.

    Args:
        trainer: of a rehearsal of it.
        steps: what it learns from.
        selection: the training rows.
        uncached: seconds of a step for which the caches hold nothing.
        cached: seconds of one for which they hold everything; None: there are no caches.
    """
    length, views = steps.length, steps.views.count
    tokens = sum(len(each.tokens) - each.prompt_length for each in selection.examples)
    hours = selection.report["kept"]["hours"]
    log.info("kept: %d rows, %.2f h, %d label tokens", len(selection.examples), hours, tokens)
    filling = length.max_steps
    if cached is not None and views is not None:
        uses = (1 + views) * selection.epoch_size
        filling = min(length.max_steps, math.ceil(uses / length.step_size))
    seconds, parts = filling * uncached, f"{filling} steps of {uncached:.2g} s"
    if cached is not None and filling < length.max_steps:
        rest = length.max_steps - filling
        seconds += rest * cached
        parts += f" that fill the teacher cache, {rest} of {cached:.2g} s"
    if trainer.validation:
        times = math.ceil(length.max_steps / length.validate_every)
        times += trainer.validation.options.score_teacher
        each = time_validation(trainer, trainer.validation)
        seconds += times * each
        parts += f", {times} times dev of {each:.2g} s"
    log.info("time: about %s: %s", datetime.timedelta(seconds=round(seconds)), parts)


def log_memory(trainer: Trainer) -> None:
    """Log how much memory the steps so far have taken, and for what."""
    models = trainer.models
    parameters = list(models.student.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    teacher = 0
    if models.teacher.loaded:
        teacher = sum(p.numel() * p.element_size() for p in models.teacher.model.parameters())
    log.info(
        "memory: at most %s MB so far; of it student %.0f MB, teacher %.0f MB, gradients and "
        "optimizer of %.1f M trained parameters %.0f MB",
        peak_memory_megabytes(trainer.accelerator.device),
        4 * sum(p.numel() for p in parameters) / 2**20,
        teacher / 2**20,
        trained / 1e6,
        BYTES_PER_TRAINED_WEIGHT * trained / 2**20,
    )
