"""Make a student: a copy of the teacher that keeps some of its layers.

Writes a complete Hugging Face model folder, with `layer_map.json` beside the weights that says
which teacher layer each student layer was.
"""

import json
import sys
from pathlib import Path

from pydantic import Field

from simpler_distil_whisper.config import ConfigError, PositiveInt, StrictModel
from simpler_distil_whisper.model_folder import ModelFolder, read_model_folder
from simpler_distil_whisper.pruning import chosen_layers, prune_whisper
from simpler_distil_whisper.run import DataError, Run, log, run_script, write_atomically


class Teacher(StrictModel):
    """The model that is copied."""

    path: Path = Field(description="Hugging Face model folder.")
    processor: Path | None = Field(
        None, description="Folder of tokenizer and feature extractor; null: the teacher's own."
    )


class Student(StrictModel):
    """What is kept of it."""

    encoder_layers: PositiveInt | None = Field(None, description="How many; null: all.")
    decoder_layers: PositiveInt | None = Field(None, description="How many; null: all.")
    encoder_layer_indices: list[int] | None = Field(
        None, description="Which, from 0; null: evenly spread, first and last kept."
    )
    decoder_layer_indices: list[int] | None = Field(
        None, description="Which, from 0; null: evenly spread, first and last kept."
    )


class Config(StrictModel):
    """create_student_model.json."""

    output_dir: Path = Field(description="The student's model folder.")
    teacher: Teacher
    student: Student


def prepare(config: Config) -> tuple[ModelFolder, dict[str, list[int]]]:
    """Return the teacher's folder and, for encoder and decoder, the teacher layers to keep."""
    teacher = read_model_folder(config.teacher.path, config.teacher.processor, "teacher")
    layer_map = {}
    for part in ("encoder", "decoder"):
        count = getattr(config.student, f"{part}_layers")
        indices = getattr(config.student, f"{part}_layer_indices")
        available = teacher.config[f"{part}_layers"]
        try:
            layer_map[part] = chosen_layers(available, count, indices)
        except ValueError as error:
            key = f"{part}_layers" if indices is None else f"{part}_layer_indices"
            raise ConfigError(f"student.{key}: {error}") from None
        log.info("%s: keeps layers %s of %d", part, layer_map[part], available)
    return teacher, layer_map


def work(config: Config, prepared: tuple[ModelFolder, dict[str, list[int]]], run: Run) -> str:
    """Write the student's folder and prove that it loads and runs."""
    import torch

    from simpler_distil_whisper.whisper import load_whisper, quieten_libraries, save_whisper

    quieten_libraries()
    folder, layer_map = prepared
    # On disk the student keeps the teacher's dtype; training loads it in float32 all the same.
    teacher = load_whisper(folder, dtype=folder.stored_dtype)
    student = prune_whisper(teacher.model, layer_map["encoder"], layer_map["decoder"])
    text = json.dumps({"teacher": str(folder.path), **layer_map}, indent=2)
    write_atomically(run.folder / "layer_map.json", text.encode())
    save_whisper(student, folder.processor, run.folder)

    saved = load_whisper(read_model_folder(run.folder, None, "output_dir"))
    features = torch.zeros(1, folder.config["num_mel_bins"], folder.window_frames)
    with torch.inference_mode():
        logits = saved.model(
            features, decoder_input_ids=torch.tensor([[saved.tokens.start]])
        ).logits
    if not torch.isfinite(logits).all():
        raise DataError(
            f"{folder.path}: its weights are not finite, so the student's are not either"
        )
    before, after = (model.num_parameters() for model in (teacher.model, student))
    return (
        f"{run.folder}: a student of {after / 1e6:.1f} M parameters (the teacher has "
        f"{before / 1e6:.1f} M).\nNext: python run_distillation.py run_distillation.json"
    )


if __name__ == "__main__":
    sys.exit(run_script("create_student_model", __doc__, Config, prepare, work))
