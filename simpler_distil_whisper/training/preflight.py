"""Checked before hours are spent: the rows, both models on one batch, a few steps of the real loop.

Called by `run_distillation.py`: `check_at_start` before the first step of a run, `check_thoroughly`
with `--check`, in a folder that is thrown away.
"""

import contextlib
import dataclasses
import datetime
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.manifest import Manifest
from simpler_distil_whisper.model.devices import peak_memory_megabytes
from simpler_distil_whisper.model.pruning import prune_whisper
from simpler_distil_whisper.model.whisper import load_whisper
from simpler_distil_whisper.run import Run, is_main_process, log
from simpler_distil_whisper.training.data_checks import check_data
from simpler_distil_whisper.training.dataset import Example, Selection, TrainingBatch
from simpler_distil_whisper.training.learning_rate_test import ShortRuns, range_test
from simpler_distil_whisper.training.losses import LossWeights
from simpler_distil_whisper.training.models import TeacherAndStudent, computing_dtype
from simpler_distil_whisper.training.options import (
    DistillationConfig,
    LoggingOptions,
)
from simpler_distil_whisper.training.trainer import Trainer
from simpler_distil_whisper.training.validation import Validation

TIMED_STEPS = 5
TIMED_SECONDS = 20.0
TIMED_ROWS = 16  # of dev
STEPS_ON_ONE_BATCH = 10
GIGABYTES = 2.0  # of a teacher cache that is thrown away
BYTES_OF_LEARNING = 12  # per trained weight, in float32: its gradient and Adam's two moments


class Agreement(NamedTuple):
    """How alike teacher and student are at the label tokens of a batch.

    Attributes:
        kl: KL(teacher || student) per token, in nats, at temperature 1.
        same: share of the tokens with the same one on top.
        tokens: how many.
    """

    kl: float
    same: float
    tokens: int


def check_at_start(trainer: Trainer, selection: Selection, dev: Manifest | None) -> None:
    """Do what takes seconds, before the first step; the results are in `run_info.json`.

    Raises:
        ConfigError: a student that is all of the teacher would not say what the teacher says.
        DataError: too many labels are not what their tokens say.
    """
    if not is_main_process():
        return
    found: dict[str, object] = {**check_data(selection, dev, trainer.config.data, trainer.student)}
    answers = first_group(trainer, selection)[0].cached_decoder_states
    # Where all answers are in a cache no teacher is loaded, and none for this.
    if (answers is None or answers.missing) and (agreement := check_agreement(trainer, selection)):
        found |= {"unpruned_kl": agreement.kl, "unpruned_agreement": agreement.same}
    trainer.run.note(check=found)


@contextlib.contextmanager
def rehearsal(config: DistillationConfig) -> Iterator[tuple[DistillationConfig, Run]]:
    """Give a config and a run that do the same, but leave nothing behind.

    A teacher cache is another one, empty at first; and what takes minutes to begin is left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        cache = config.teacher_cache
        if cache.folder:
            elsewhere = {"folder": Path(folder, "cache"), "max_gigabytes": GIGABYTES}
            cache = cache.model_copy(update=elsewhere)
        rehearsed = config.model_copy(
            update={
                "output_dir": Path(folder, "run"),
                "compile": False,
                "optimizer": config.optimizer.model_copy(update={"average_decay": None}),
                "teacher_cache": cache,
                "logging": LoggingOptions(tensorboard=False),
            }
        )
        path = Path(folder, "config.json")
        path.write_text(rehearsed.model_dump_json(), encoding="utf-8")
        yield rehearsed, Run("run_distillation", path, rehearsed)


def check_thoroughly(
    config: DistillationConfig, trainer: Trainer, selection: Selection, dev: Manifest | None
) -> None:
    """Do all checks, and say what a run will cost.

    Args:
        config: of the run.
        trainer: of a rehearsal of it.
        selection: what is trained on.
        dev: the rows of validation.

    Raises:
        ConfigError: a student that is all of the teacher would not say what the teacher says, or
            memory does not suffice.
        DataError: too many labels are not what their tokens say, or no dev row has a reference.
    """
    check_data(selection, dev, config.data, trainer.student)
    runs = ShortRuns(trainer)
    first, later = time_steps(trainer, selection.examples), None
    runs.restore()
    if config.teacher_cache.folder:  # now the same steps find in it what they need
        later = time_steps(trainer, selection.examples)
        runs.restore()
    say_memory(trainer)  # before more is in it than in a run
    check_agreement(trainer, selection)
    check_learning_rate(runs, first_group(trainer, selection))
    say_time(trainer, selection, dev, first, later)
    if config.check.learning_rate_range_test:
        folder = config.output_dir
        picture = folder.with_name(f"{folder.name}.learning_rate.png")
        range_test(runs, selection.examples, later or first, picture)


def first_group(trainer: Trainer, selection: Selection) -> Sequence[TrainingBatch]:
    """Return the micro-batches of the next step."""
    return next(trainer.micro_batches_of_each_step(selection.examples))


def check_agreement(trainer: Trainer, selection: Selection) -> Agreement | None:
    """Compare the teacher with a student that is all of it, given the same as in training.

    Returns:
        how alike they are; None if the loss has no part of the teacher's.

    Raises:
        ConfigError: they are not.
    """
    if not trainer.models.weights.kl:
        return None
    with _without_caches(trainer):
        found = agreement_of_unpruned(trainer, first_group(trainer, selection)[0])
    if not found.tokens:  # no audio of the batch can be read, of which is told elsewhere
        return None
    coarse = {trainer.teacher.dtype, computing_dtype(trainer.accelerator)} != {torch.float32}
    most, least = (0.05, 0.9) if coarse else (1e-4, 0.99)
    said = (
        f"KL {found.kl:.2g} per token, the same likeliest token at {found.same:.1%} of "
        f"{found.tokens} tokens"
    )
    if not (found.kl <= most and found.same >= least):
        raise ConfigError(
            f"teacher and student, unpruned, do not agree: {said}; expected are at most {most:g} "
            f"and at least {least:.0%}. A student with all the teacher's layers must say what the "
            "teacher says. Numbers that are not finite are too large for their dtype: set "
            'teacher.dtype "float32" or "bfloat16". Else the two are not given the same: please '
            "report this bug"
        )
    log.info("teacher and student, unpruned, agree: %s", said)
    return found


def agreement_of_unpruned(trainer: Trainer, batch: TrainingBatch) -> Agreement:
    """Return how alike the teacher and a student with all its layers are, on the student's road."""
    # Both are made on the CPU.
    with torch.random.fork_rng(devices=[]):  # a run goes the same way whether it was checked or not
        whole = load_whisper(trainer.teacher.folder, "float32", trainer.config.teacher.attention)
        layers = whole.model.config
        model = prune_whisper(
            whole.model, range(layers.encoder_layers), range(layers.decoder_layers)
        )
    model.requires_grad_(False).to(trainer.accelerator.device)
    student = dataclasses.replace(whole, model=model)
    weights = LossWeights(cross_entropy=0.0, kl=1.0, temperature=1.0)
    models = TeacherAndStudent(trainer.accelerator, trainer.teacher, student, weights)
    with torch.no_grad(), trainer.accelerator.autocast():
        terms = models.terms(batch.to(trainer.accelerator.device))
    kl, same, tokens = (float(each) for each in (terms.kl, terms.agreement, terms.tokens))
    return Agreement(kl / max(tokens, 1), same / max(tokens, 1), int(tokens))


@contextlib.contextmanager
def _without_caches(trainer: Trainer) -> Iterator[None]:
    """Let both models compute all for a while, with nothing found and nothing kept."""
    models, teacher = trainer.models, trainer.teacher
    caches = models.cache, teacher.decoder_cache
    models.cache = teacher.decoder_cache = None
    try:
        yield
    finally:
        models.cache, teacher.decoder_cache = caches


def check_learning_rate(runs: ShortRuns, group: Sequence[TrainingBatch]) -> None:
    """Warn if some steps on one batch do not lower its loss."""
    rate = runs.config.optimizer.learning_rate
    losses = runs.run([group] * STEPS_ON_ONE_BATCH, rate).losses
    said = f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses) - 1} steps on one batch"
    if losses[-1] < losses[0]:
        log.info("optimizer.learning_rate %g: %s", rate, said)
    else:
        log.warning(
            "optimizer.learning_rate %g: %s: it should fall. Lower the learning rate, by the range "
            'test if you like (--check with "check": {"learning_rate_range_test": true})',
            *(rate, said),
        )


def time_steps(trainer: Trainer, examples: Sequence[Example]) -> float:
    """Return how many seconds a step takes, audio included, after the first one."""
    ends = [time.perf_counter()]
    for group in trainer.micro_batches_of_each_step(examples):
        trainer.train_step(group)
        trainer.means.end()  # which waits for the device
        ends.append(time.perf_counter())
        trainer.state.step += 1
        late = ends[-1] - ends[0] > TIMED_SECONDS
        if len(ends) > TIMED_STEPS + 1 or (late and len(ends) > 2):
            break
    steady = ends[1:] if len(ends) > 2 else ends  # the first step waits for much
    return (steady[-1] - steady[0]) / (len(steady) - 1)


def time_validation(trainer: Trainer, dev: Manifest) -> float:
    """Return about how many seconds it takes to score the student on the dev rows."""
    options = trainer.config.validation
    validation = Validation(
        dev, trainer.config.data, options.decoding, options.metric, trainer.accelerator
    )
    rows = len(validation.utterances)
    validation.utterances = validation.utterances[:TIMED_ROWS]
    trainer.models.module.eval()
    started = time.perf_counter()
    validation.score(trainer.student)
    return (time.perf_counter() - started) * rows / len(validation.utterances)


def say_time(
    trainer: Trainer,
    selection: Selection,
    dev: Manifest | None,
    first: float,
    later: float | None,
) -> None:
    """Say how long the run will take.

    Args:
        trainer: of a rehearsal of it.
        selection: what is trained on.
        dev: the rows of validation.
        first: seconds of a step that finds nothing in a teacher cache.
        later: seconds of one that finds all; None: there is no cache.
    """
    length, views = trainer.length, trainer.config.augmentation.views
    tokens = sum(len(each.tokens) - each.prompt_length for each in selection.examples)
    log.info(
        "kept: %d rows, %.2f h, %d label tokens",
        *(len(selection.examples), selection.report["kept"]["hours"], tokens),
    )
    filling = steps = length.max_steps
    if later is not None and views is not None:
        filling = min(steps, math.ceil((1 + views) * selection.epoch_size / length.step_size))
    seconds, said = filling * first, f"{filling} steps of {first:.2g} s"
    if later is not None and filling < steps:
        seconds += (steps - filling) * later
        said += f" that fill the teacher cache, {steps - filling} of {later:.2g} s"
    if dev:
        times = math.ceil(steps / length.validate_every) + trainer.config.validation.score_teacher
        each = time_validation(trainer, dev)
        seconds += times * each
        said += f", {times} times dev of {each:.2g} s"
    log.info("time: about %s: %s", datetime.timedelta(seconds=round(seconds)), said)


def say_memory(trainer: Trainer) -> None:
    """Say how much memory the steps so far have taken, and for what."""
    parameters = list(trainer.student.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    teacher = 0
    if trainer.teacher.loaded:
        teacher = sum(p.numel() * p.element_size() for p in trainer.teacher.model.parameters())
    log.info(
        "memory: at most %d MB so far; of it student %.0f MB, teacher %.0f MB, gradients and "
        "optimizer of %.1f M trained parameters %.0f MB",
        peak_memory_megabytes(trainer.accelerator.device),
        *(4 * sum(p.numel() for p in parameters) / 2**20, teacher / 2**20),
        *(trained / 1e6, BYTES_OF_LEARNING * trained / 2**20),
    )
