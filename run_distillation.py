"""Train the student on the teacher's pseudo-labels and on its token distribution.

Writes `final/` and `best/` (complete Hugging Face model folders), `checkpoints/` from which a
stopped run continues, `metrics.jsonl`, `logs/` for TensorBoard, and `rejected.jsonl`: every
training row that is not used, with the reason.
"""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, model_validator

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.config import RunOptions
from simpler_distil_whisper.data.manifest import Manifest, read_manifest
from simpler_distil_whisper.data.results import rejection_line
from simpler_distil_whisper.launch import is_main_process, process_count
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder
from simpler_distil_whisper.model.options import TeacherCacheOptions
from simpler_distil_whisper.progress import Progress
from simpler_distil_whisper.run import Run, log
from simpler_distil_whisper.script import run_script
from simpler_distil_whisper.stopping import Interrupted
from simpler_distil_whisper.training import options
from simpler_distil_whisper.training.plan import RunLength, run_length

if TYPE_CHECKING:  # these import torch, which takes seconds
    from simpler_distil_whisper.training.dataset import TrainingSteps
    from simpler_distil_whisper.training.models import TeacherAndStudent
    from simpler_distil_whisper.training.selection import Selection
    from simpler_distil_whisper.training.trainer import Trainer


class Config(RunOptions):
    """run_distillation.json."""

    teacher: options.TeacherOptions
    student: options.StudentOptions
    data: options.TrainingData
    objective: options.Objective = options.Objective()
    freeze: options.Freeze = options.Freeze()
    audio_context: options.AudioContextOptions = options.AudioContextOptions()
    optimizer: options.OptimizerOptions = options.OptimizerOptions()
    schedule: options.Schedule = options.Schedule()
    batch: options.BatchOptions = options.BatchOptions()
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        "auto",
        description="Of the computation; weights stay float32. auto: bf16 on GPUs that have it.",
    )
    activation_checkpointing: bool = Field(
        False, description="Compute the student's layers twice rather than keep all activations."
    )
    compile: bool = Field(
        False, description="torch.compile the student's decoder: minutes at first, then faster."
    )
    augmentation: options.Augmentation = options.Augmentation()
    teacher_cache: TeacherCacheOptions = TeacherCacheOptions()
    validation: options.ValidationOptions = options.ValidationOptions()
    checkpoints: options.CheckpointOptions = options.CheckpointOptions()
    logging: options.LoggingOptions = options.LoggingOptions()
    check: options.CheckOptions = options.CheckOptions()

    @model_validator(mode="after")
    def _context_needs_a_trained_encoder(self) -> "Config":
        if self.audio_context.enabled and self.freeze.encoder:
            raise ValueError(
                "audio_context.enabled trains the encoder: set freeze.encoder to false"
            )
        return self

    @model_validator(mode="after")
    def _sampled_texts_are_the_teachers(self) -> "Config":
        data, columns = self.data, self.data.columns
        people_label = columns.text == columns.reference and self.objective.cross_entropy_weight > 0
        if people_label and data.sampled_text_probability > 0:
            raise ValueError(
                f'data.columns.text is the column of references, "{columns.text}", but in '
                f"data.sampled_text_probability {data.sampled_text_probability:g} of the uses the "
                "student would learn a text of the teacher's in their place: set it to 0, or "
                "objective.cross_entropy_weight"
            )
        return self

    @model_validator(mode="after")
    def _patience_needs_dev_rows(self) -> "Config":
        if self.validation.early_stopping_patience and not self.data.dev_manifest:
            raise ValueError("validation.early_stopping_patience needs a data.dev_manifest")
        return self


class Prepared(NamedTuple):
    """The models' folders, the rows to learn from and to validate on, and the run's length."""

    teacher: ModelFolder
    student: ModelFolder
    selection: "Selection"
    dev: Manifest | None
    length: RunLength


def prepare(config: Config) -> Prepared:
    """Return both models' folders, the examples that pass all filters, and the dev rows."""
    data = config.data
    teacher = read_model_folder(config.teacher.path, config.teacher.processor, "teacher")
    student = read_model_folder(config.student.path, config.student.processor, "student")
    student.check_copy_of(teacher)
    teacher.check_language_and_task(data.language, data.task, "data")

    def read(path: Path, max_utterances: int | None) -> Manifest:
        languages = teacher.row_languages
        manifest = read_manifest(
            path, data.columns, max_utterances=max_utterances, languages=languages
        )
        return manifest.check(data.max_bad_fraction)

    manifests = [read(path, data.max_utterances) for path in data.train_manifests]
    dev = None
    if data.dev_manifest:
        dev = read(data.dev_manifest, config.validation.max_utterances)
    from simpler_distil_whisper.training.filters import example_filter
    from simpler_distil_whisper.training.selection import select_examples

    selection = select_examples(manifests, example_filter(data, student))
    selection.check(data.max_bad_fraction)
    every_steps, epoch_size = config.validation.every_steps, selection.epoch_size
    length = run_length(config.schedule, config.batch, every_steps, epoch_size)
    return Prepared(teacher, student, selection, dev, length)


def work(config: Config, prepared: Prepared, run: Run) -> str:
    """Load both models, train the student, write `final/`."""
    from simpler_distil_whisper.model.whisper import quieten_libraries
    from simpler_distil_whisper.training.preflight import check_at_start

    quieten_libraries()
    if is_main_process():
        # A run that continues adds to the file: training finds rows that do not decode.
        if not (rejected := run.folder / "rejected.jsonl").exists():
            lines = map(rejection_line, prepared.selection.rejections)
            write_atomically(rejected, "".join(lines).encode())
        run.note(filters=prepared.selection.report)
    trainer, steps = assemble(config, prepared, run)
    if not trainer.state.step:
        check_at_start(trainer, steps, prepared.selection, prepared.dev)
    train(config, trainer, steps)
    trainer.save_student("final")
    trainer.accelerator.end_training()
    return (
        f"{run.folder / 'final'}: the distilled model.\n"
        "Next: python offline_inference.py offline_inference.json"
    )


def train(config: Config, trainer: "Trainer", steps: "TrainingSteps") -> None:
    """Take the optimizer steps that are left; log, validate and save when it is due.

    Raises:
        Interrupted: a stop signal came; the last step is in a checkpoint.
    """
    from simpler_distil_whisper.training.learning_rates import decide_learning_rate
    from simpler_distil_whisper.training.optimizer import learning_rate_factor

    state, length, schedule = trainer.state, steps.length, config.schedule
    trainer.score_teacher()
    highest_rate = decide_learning_rate(config.optimizer.learning_rate, trainer, steps)
    steps_left = steps.since(state.step)
    trainer.means.start_clock()
    with Progress("training", "steps", length.max_steps, state.step) as progress:
        while state.step < length.max_steps and not trainer.has_stopped_improving():
            factor = learning_rate_factor(
                schedule.kind, state.step, length.warmup_steps, length.max_steps
            )
            stop = trainer.train_step(next(steps_left), highest_rate * factor)  # counts state.step
            progress.advance()
            last = state.step == length.max_steps
            if last or state.step % config.logging.every_steps == 0:
                trainer.log_means()
            if last or state.step % length.validate_every == 0:
                trainer.validate()
            if stop or state.step % config.checkpoints.every_steps == 0:
                trainer.save_checkpoint()
            if stop and not last:
                trainer.close()
                raise Interrupted
    trainer.close()
    if trainer.validation is None:  # else validate() has drawn them, with the last score
        trainer.draw_curves()


def assemble(config: Config, prepared: Prepared, run: Run) -> tuple["Trainer", "TrainingSteps"]:
    """Return the trainer, which holds both models, and what it learns from in each step."""
    from simpler_distil_whisper.training.dataset import TrainingSteps
    from simpler_distil_whisper.training.model_card import ModelCard, facts_of
    from simpler_distil_whisper.training.trainer import Trainer
    from simpler_distil_whisper.training.validation import Validation

    teacher, student, selection, dev, length = prepared
    models = load_models(config, teacher, student)
    steps = TrainingSteps(
        selection.examples,
        length,
        models.student,
        data=config.data,
        batch=config.batch,
        augmentation=config.augmentation,
        audio_context=config.audio_context,
        seed=config.seed,
        caches=models.caches,
    )
    views = steps.views.count
    facts = facts_of(config, teacher, student, selection, length, models.precision, views)
    run.note(steps=length._asdict(), views=views)
    trainer = Trainer(
        run,
        steps.digest,
        models,
        optimizer=config.optimizer,
        batch=config.batch,
        checkpoints=config.checkpoints,
        card=ModelCard(facts, run.folder / "metrics.jsonl"),
        encoder_factor=config.audio_context.encoder_factor,
        max_bad_rows=config.data.max_bad_fraction * len(selection.examples),
        validation=Validation(dev, config.data, config.validation, models) if dev else None,
        tensorboard=config.logging.tensorboard,
    )
    return trainer, steps


def load_models(
    config: Config, teacher_folder: ModelFolder, student_folder: ModelFolder
) -> "TeacherAndStudent":
    """Return both models as they are trained, with the caches of the teacher's states."""
    from simpler_distil_whisper.model.audio_context import AudioContext
    from simpler_distil_whisper.model.processes import make_accelerator
    from simpler_distil_whisper.model.weights import encoders_are_equal
    from simpler_distil_whisper.model.whisper import load_whisper
    from simpler_distil_whisper.training import models

    accelerator = make_accelerator(config.precision, config.seed)
    shared_encoder = config.freeze.encoder and encoders_are_equal(student_folder, teacher_folder)
    teacher = models.Teacher(teacher_folder, config.teacher, accelerator, shared_encoder)
    student = load_whisper(student_folder, "float32", config.teacher.attention)
    models.freeze(student.model, config.freeze)
    models.keep_all_layers(student.model)
    if config.audio_context.enabled:
        context = AudioContext(config.audio_context.margin_seconds)
        student.model.config.audio_context = context.to_config()
    elif student.audio_context:
        log.warning(
            "student.path: %s was trained for an audio context, and this run gives it the whole "
            "window: its folder will no longer state one, unless audio_context.enabled is true",
            student_folder.path,
        )
        student.model.config.audio_context = None
    if config.activation_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        student.model.model.decoder.compile(dynamic=True)
    caches = models.open_caches(config.teacher_cache, teacher, student, config.objective)
    return models.TeacherAndStudent(accelerator, teacher, student, config.objective, caches)


def check(config: Config, prepared: Prepared) -> None:
    """Rehearse the run for a few steps, and log what is wrong and what it will cost."""
    from simpler_distil_whisper.model.whisper import quieten_libraries
    from simpler_distil_whisper.training.preflight import check_thoroughly

    if process_count() > 1:
        log.info("No step is rehearsed by several processes: for that, leave the launcher out.")
        return
    quieten_libraries()
    log.info("Rehearsing some steps, in a folder that is thrown away ...")
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "output_dir": Path(folder, "run"),
            "compile": False,  # which takes minutes to begin
            "teacher_cache": config.teacher_cache.elsewhere(Path(folder, "cache")),
            "logging": options.LoggingOptions(tensorboard=False),
        }
        rehearsal = config.model_copy(update=changes)
        path = Path(folder, "config.json")
        path.write_text(rehearsal.model_dump_json(), encoding="utf-8")
        run = Run("run_distillation", path, rehearsal)
        trainer, steps = assemble(rehearsal, prepared, run)
        rate, picture = config.optimizer.learning_rate, None
        if rate == "auto" or config.check.learning_rate_range_test:
            output_dir = config.output_dir.resolve()  # which has a name, also if it is "."
            picture = output_dir.with_name(f"{output_dir.name}.learning_rate.png")
        try:
            check_thoroughly(trainer, steps, prepared.selection, prepared.dev, rate, picture)
        finally:
            steps.caches.finish()  # before the folder is removed


if __name__ == "__main__":
    sys.exit(run_script("run_distillation", __doc__, Config, prepare, work, check=check))
