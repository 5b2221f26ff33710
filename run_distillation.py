"""Train the student on the teacher's pseudo-labels and on its token distribution.

Writes `final/` and `best/` (complete Hugging Face model folders), `checkpoints/` from which a
stopped run continues, `metrics.jsonl`, `logs/` for TensorBoard, and `rejected.jsonl`: every
training row that is not used, with the reason.
"""

import math
import sys
from typing import TYPE_CHECKING, NamedTuple

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.manifest import Manifest, read_manifest
from simpler_distil_whisper.data.results import rejection_line
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder
from simpler_distil_whisper.run import (
    DataError,
    Run,
    is_main_process,
    log,
    process_count,
    run_script,
)
from simpler_distil_whisper.training.options import DistillationConfig, RunLength

if TYPE_CHECKING:
    from simpler_distil_whisper.training.dataset import Selection
    from simpler_distil_whisper.training.trainer import Trainer


class Prepared(NamedTuple):
    """What `prepare` has found and checked."""

    teacher: ModelFolder
    student: ModelFolder
    selection: "Selection"
    dev: Manifest | None
    length: RunLength


def prepare(config: DistillationConfig) -> Prepared:
    """Return both models' folders, the examples that pass all filters, and the dev rows."""
    data = config.data
    teacher = read_model_folder(config.teacher.path, config.teacher.processor, "teacher")
    student = read_model_folder(config.student.path, config.student.processor, "student")
    check_same_family(teacher, student)
    teacher.check_language(data.language, "data.language")
    manifests = [
        read_manifest(
            path, data.columns, max_utterances=data.max_utterances, languages=teacher.row_languages
        ).check(data.max_bad_fraction)
        for path in data.train_manifests
    ]
    dev = None
    if data.dev_manifest:
        limit, languages = config.validation.max_utterances, teacher.row_languages
        dev = read_manifest(
            data.dev_manifest, data.columns, max_utterances=limit, languages=languages
        ).check(data.max_bad_fraction)
    selection = select_examples(config, student, manifests)
    length = run_length(config, selection.epoch_size)
    return Prepared(teacher, student, selection, dev, length)


def check_same_family(teacher: ModelFolder, student: ModelFolder) -> None:
    """Raise ConfigError unless both models hear the same features and speak the same tokens."""
    for key in ("vocab_size", "num_mel_bins", "max_source_positions"):
        if teacher.config[key] != student.config[key]:
            raise ConfigError(
                f"student.path: {student.path} has {key} {student.config[key]}, the teacher "
                f"{teacher.path} has {teacher.config[key]}: the student must be a copy of its kind"
            )


def select_examples(
    config: DistillationConfig, student: ModelFolder, manifests: list[Manifest]
) -> "Selection":
    """Return the training examples, having said how many rows and hours each filter dropped."""
    from simpler_distil_whisper.model.whisper import load_tokenizer, special_tokens
    from simpler_distil_whisper.training.dataset import UNREADABLE, ExampleFilter

    tokenizer = load_tokenizer(student)
    tokens = special_tokens(tokenizer, student)
    positions = student.config["max_target_positions"]
    examples = ExampleFilter(config.data, tokens, tokenizer, student.window_seconds, positions)
    selection = examples.select(manifests)
    for kind, count in selection.report.items():
        log.info("training rows, %s: %d (%.2f h)", kind, count["rows"], count["hours"])
    bad = sum(selection.report.get(k, {"rows": 0})["rows"] for k in ("unusable row", UNREADABLE))
    rows = len(selection.examples) + len(selection.rejections)
    if bad > config.data.max_bad_fraction * rows or not selection.examples:
        reasons = "".join(f"\n  {r.place}: {r.reason}" for r in selection.rejections[:5])
        raise DataError(
            f"of {rows} training rows {bad} are unusable, data.max_bad_fraction is "
            f"{config.data.max_bad_fraction:g}, and {len(selection.examples)} pass the filters. "
            f"The first reasons:{reasons}"
        )
    return selection


def run_length(config: DistillationConfig, epoch_size: float) -> RunLength:
    """Return the optimizer steps that the config comes to, and say them."""
    batch, schedule = config.batch, config.schedule
    step_size = batch.micro_batch_size * batch.gradient_accumulation_steps * process_count()
    max_steps = schedule.max_steps or math.ceil((schedule.epochs or 0) * epoch_size / step_size)
    if schedule.warmup_steps >= max_steps:
        raise ConfigError(
            f"schedule.warmup_steps: {schedule.warmup_steps}, but the run has {max_steps} steps of "
            f"{step_size} utterances: the learning rate would never be reached"
        )
    log.info(
        "%d steps of %d utterances, %.1f epochs",
        max_steps,
        step_size,
        max_steps * step_size / epoch_size,
    )
    every = config.validation.every_steps or max(1, round(epoch_size / step_size))
    return RunLength(step_size, max_steps, every)


def check(config: DistillationConfig, prepared: Prepared) -> None:
    """Rehearse the run for a few steps, and say what is wrong and what it will cost."""
    from simpler_distil_whisper.model.whisper import quieten_libraries
    from simpler_distil_whisper.training.preflight import check_thoroughly, rehearsal

    if process_count() > 1:
        log.info("No step is rehearsed by several processes: for that, leave the launcher out.")
        return
    quieten_libraries()
    log.info("Rehearsing some steps, in a folder that is thrown away ...")
    with rehearsal(config) as (rehearsed, run):
        trainer = assemble(rehearsed, prepared, run)
        check_thoroughly(config, trainer, prepared.selection, prepared.dev)


def work(config: DistillationConfig, prepared: Prepared, run: Run) -> str:
    """Load both models, train the student, write `final/`."""
    from simpler_distil_whisper.model.whisper import quieten_libraries
    from simpler_distil_whisper.training.model_card import ModelCard, facts_of
    from simpler_distil_whisper.training.preflight import check_at_start

    quieten_libraries()
    if is_main_process():
        # A resumed run goes on with the file: training adds what turns out not to decode.
        if not (rejected := run.folder / "rejected.jsonl").exists():
            lines = map(rejection_line, prepared.selection.rejections)
            write_atomically(rejected, "".join(lines).encode())
        run.note(filters=prepared.selection.report)
    trainer = assemble(config, prepared, run)
    precision = trainer.accelerator.mixed_precision.replace("no", "float32")
    facts = facts_of(
        config, prepared.teacher, prepared.student, prepared.selection, prepared.length, precision
    )
    trainer.card = ModelCard(facts, run.folder / "metrics.jsonl")
    if not trainer.state.step:
        check_at_start(trainer, prepared.selection, prepared.dev)
    if prepared.dev:
        trainer.validate_on(prepared.dev)
    trainer.train(prepared.selection.examples)
    final = run.folder / "final"
    if is_main_process():
        trainer.save_student(final)
    trainer.accelerator.end_training()
    return (
        f"{final}: the distilled model.\nNext: python offline_inference.py offline_inference.json"
    )


def assemble(config: DistillationConfig, prepared: Prepared, run: Run) -> "Trainer":
    """Return the trainer, with the teacher and the student, each with its part of the cache."""
    from simpler_distil_whisper.model.devices import make_accelerator
    from simpler_distil_whisper.model.teacher_cache import open_training_caches
    from simpler_distil_whisper.model.weights import encoders_are_equal
    from simpler_distil_whisper.model.whisper import load_whisper
    from simpler_distil_whisper.training.models import computing_dtype
    from simpler_distil_whisper.training.teacher import Teacher
    from simpler_distil_whisper.training.trainer import Trainer

    accelerator = make_accelerator(config.precision, config.seed)
    shared = config.freeze.encoder and encoders_are_equal(prepared.student, prepared.teacher)
    student = load_whisper(prepared.student, "float32", config.teacher.attention)
    teacher = Teacher(prepared.teacher, config.teacher, accelerator, shared)
    options, computed = config.teacher_cache, computing_dtype(accelerator)
    if options.folder and options.encoder_states and not shared:
        log.warning(
            "teacher_cache.encoder_states: not used, since the student's encoder is trained or is "
            "another one"
        )
    of_use = {
        "encoder_states": options.encoder_states and shared,
        "decoder_states": options.decoder_states and config.objective.kl_weight > 0,
    }
    options = options.model_copy(update=of_use)
    states, teacher.decoder_cache = open_training_caches(
        options, prepared.teacher, student.feature_extractor, computed, teacher.numerics_key
    )
    return Trainer(config, prepared.length, run, accelerator, teacher, student, states)


if __name__ == "__main__":
    sys.exit(
        run_script("run_distillation", __doc__, DistillationConfig, prepare, work, check=check)
    )
