"""Make a student: a copy of the teacher that keeps some of its layers.

Writes a complete Hugging Face model folder, with `layer_map.json`: the teacher layer that each
student layer was copied from. With `layer_scoring`, the decoder layers are those with which a
student is closest to the teacher once each is fitted to what the dropped ones after it did;
`layer_scores.json` has the scores of all that were tried.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.config import ConfigError, NonNegativeInt, PositiveInt, StrictModel
from simpler_distil_whisper.launch import is_main_process
from simpler_distil_whisper.layers.rows import LayerScoring, select_rows
from simpler_distil_whisper.layers.search import describe_search
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder
from simpler_distil_whisper.model.options import CacheOptions, FolderOptions
from simpler_distil_whisper.model.pruning import chosen_layers, prune_whisper
from simpler_distil_whisper.run import DataError, Run, log
from simpler_distil_whisper.script import run_script

if TYPE_CHECKING:
    from simpler_distil_whisper.training.tokens import Example


class TeacherSource(FolderOptions):
    """The model that is copied."""


class Student(StrictModel):
    """What is kept of it."""

    encoder_layers: PositiveInt | None = Field(None, description="How many; null: all.")
    decoder_layers: PositiveInt | None = Field(None, description="How many; null: all.")
    encoder_layer_indices: list[NonNegativeInt] | None = Field(
        None, description="Which, from 0; null: evenly spread, first and last kept."
    )
    decoder_layer_indices: list[NonNegativeInt] | None = Field(
        None,
        description="Which, from 0: layer_scoring is not used then; null: those that score best, "
        "without layer_scoring evenly spread, first and last kept.",
    )


class Config(StrictModel):
    """create_student_model.json."""

    output_dir: Path = Field(description="The student's model folder.")
    teacher: TeacherSource
    student: Student
    layer_scoring: LayerScoring = LayerScoring()
    teacher_cache: CacheOptions = CacheOptions()


class Prepared(NamedTuple):
    """The teacher's folder, which of its layers to keep, and what decoder layers are scored on."""

    teacher: ModelFolder
    encoder: list[int]
    decoder: list[int]  # where they are chosen by score, only their number counts
    labelled: "list[Example]"  # empty where they are not


def prepare(config: Config) -> Prepared:
    """Return the teacher's folder, the layers to keep, and the utterances to score layers on."""
    teacher = read_model_folder(config.teacher.path, config.teacher.processor, "teacher")
    encoder = kept_layers(config.student, "encoder", teacher)
    log.info("encoder: keeps layers %s of %d", encoder, teacher.config["encoder_layers"])
    decoder = kept_layers(config.student, "decoder", teacher)
    available = teacher.config["decoder_layers"]
    if not chosen_by_score(config, available):
        log.info("decoder: keeps layers %s of %d", decoder, available)
        return Prepared(teacher, encoder, decoder, [])
    sets = describe_search(available, len(decoder))
    log.info(
        "decoder: keeps the layers that score best; scored are %s; then the best, refitted", sets
    )
    return Prepared(teacher, encoder, decoder, select_rows(config.layer_scoring, teacher))


def kept_layers(student: Student, part: str, teacher: ModelFolder) -> list[int]:
    """Return the layers of "encoder" or "decoder" that the config asks for."""
    count, indices = getattr(student, f"{part}_layers"), getattr(student, f"{part}_layer_indices")
    try:
        return chosen_layers(teacher.config[f"{part}_layers"], count, indices)
    except ValueError as error:
        key = f"{part}_layers" if indices is None else f"{part}_layer_indices"
        raise ConfigError(f"student.{key}: {error}") from None


def chosen_by_score(config: Config, available: int) -> bool:
    """Return whether decoder layers are chosen by score; log why a manifest is not used."""
    if config.layer_scoring.manifest is None:
        return False
    reason = None
    if config.student.decoder_layer_indices is not None:
        reason = "student.decoder_layer_indices names the layers"
    elif config.student.decoder_layers in (None, available):
        reason = "the student keeps all decoder layers"
    if reason:
        log.info("layer_scoring: not used, since %s", reason)
    return reason is None


def work(config: Config, prepared: Prepared, run: Run) -> str:
    """Write the student's model folder, and check that it loads and runs."""
    if not is_main_process():  # there is nothing to share
        return ""
    from simpler_distil_whisper.layers.choice import choose_layers
    from simpler_distil_whisper.model import whisper
    from simpler_distil_whisper.model.weights import stored_dtype

    whisper.quieten_libraries()
    folder, encoder, decoder, labelled = prepared
    if labelled:
        scores = choose_layers(
            folder,
            encoder,
            len(decoder),
            labelled,
            str(config.layer_scoring.manifest),
            config.teacher_cache,
            run.stop_if_asked,
        )
        write_atomically(run.folder / "layer_scores.json", scores.to_json().encode())
        decoder = scores.best()
    # On disk the student keeps the teacher's dtype; training loads it in float32 all the same.
    teacher = whisper.load_whisper(folder, dtype=stored_dtype(folder))
    student = prune_whisper(teacher.model, encoder, decoder)
    run.stop_if_asked()
    layer_map = {"teacher": str(folder.path), "encoder": encoder, "decoder": decoder}
    write_atomically(run.folder / "layer_map.json", json.dumps(layer_map, indent=2).encode())
    whisper.save_whisper(student, folder.processor, run.folder)
    saved = read_model_folder(run.folder, None, "output_dir")
    if not whisper.computes_finite_logits(whisper.load_whisper(saved)):
        raise DataError(f"{folder.path}: its logits are not finite, nor are the student's")
    before, after = (model.num_parameters() / 1e6 for model in (teacher.model, student))
    return (
        f"{run.folder}: a student of {after:.1f} M parameters (the teacher has {before:.1f} M).\n"
        "Next: python run_distillation.py run_distillation.json"
    )


if __name__ == "__main__":
    sys.exit(run_script("create_student_model", __doc__, Config, prepare, work))
