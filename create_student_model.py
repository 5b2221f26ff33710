"""Make a student: a copy of the teacher that keeps some of its layers.

Writes a complete Hugging Face model folder, with `layer_map.json` beside the weights that says
which teacher layer each student layer was. With `layer_scoring`, the decoder layers are those whose
student, before it has learnt anything, is closest to the teacher; `layer_scores.json` holds the
scores of all sets of layers that were tried.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field, field_validator

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.config import ConfigError, PositiveInt, StrictModel
from simpler_distil_whisper.data.audio import AudioError
from simpler_distil_whisper.data.manifest import Columns, first_reasons, read_manifest, reject
from simpler_distil_whisper.layers.search import ScoredLayers, describe_search, search_layers
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder
from simpler_distil_whisper.model.options import Task, whisper_code
from simpler_distil_whisper.model.pruning import chosen_layers, prune_whisper
from simpler_distil_whisper.run import DataError, Run, is_main_process, log, run_script

if TYPE_CHECKING:
    from simpler_distil_whisper.layers.scoring import Labelled

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


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
        None,
        description="Which, from 0: layer_scoring is not used then; null: those that score best, "
        "without layer_scoring evenly spread, first and last kept.",
    )


class LayerScoring(StrictModel):
    """Choosing decoder layers by KL(teacher || student that has learnt nothing) on some rows."""

    manifest: Path | None = Field(
        None,
        description="Labelled rows, such as pseudo_labels.jsonl; null: layers are not scored but "
        "evenly spread.",
    )
    columns: Columns = Columns()
    language: str | None = Field(None, description="Language of the rows that name none.")
    task: Task = Field("transcribe", description="What the labels are.")
    max_utterances: PositiveInt = Field(
        100,
        description="Usable rows to score on, spread over the manifest; what the encoder says of "
        "all of them stays in memory (large-v3: 4 MB each in 16 bits, 8 in float32).",
    )

    _code = field_validator("language")(whisper_code)


class Config(StrictModel):
    """create_student_model.json."""

    output_dir: Path = Field(description="The student's model folder.")
    teacher: Teacher
    student: Student
    layer_scoring: LayerScoring = LayerScoring()


class Prepared(NamedTuple):
    """What `prepare` has found and checked.

    Attributes:
        teacher: its folder.
        layer_map: encoder and decoder -> the teacher layers to keep; of the decoder those evenly
            spread if they are chosen by score.
        labelled: what is scored on; empty if the layers are not chosen by score.
    """

    teacher: ModelFolder
    layer_map: dict[str, list[int]]
    labelled: "list[Labelled]"


def prepare(config: Config) -> Prepared:
    """Return the teacher's folder, the layers to keep, and the utterances to choose them by."""
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
        if part == "decoder" and chosen_by_score(config, available):
            words = describe_search(available, len(layer_map[part]))
            log.info("decoder: keeps the layers that score best; scored are %s", words)
            return Prepared(teacher, layer_map, select_rows(config.layer_scoring, teacher))
        log.info("%s: keeps layers %s of %d", part, layer_map[part], available)
    return Prepared(teacher, layer_map, [])


def chosen_by_score(config: Config, available: int) -> bool:
    """Return whether decoder layers are chosen by score; say so if a manifest is of no use."""
    if config.layer_scoring.manifest is None:
        return False
    if config.student.decoder_layer_indices is not None:
        log.info("layer_scoring: not used, since student.decoder_layer_indices names the layers")
        return False
    if config.student.decoder_layers in (None, available):
        log.info("layer_scoring: not used, since the student keeps all decoder layers")
        return False
    return True


def select_rows(options: LayerScoring, teacher: ModelFolder) -> "list[Labelled]":
    """Return the utterances to score on, having said how many rows are of no use, and why."""
    teacher.check_language(options.language, "layer_scoring.language")
    assert options.manifest is not None
    manifest = read_manifest(options.manifest, options.columns, languages=teacher.row_languages)
    from simpler_distil_whisper.layers.scoring import Labeller  # which takes seconds

    label = Labeller(teacher, options.language, options.task)
    labelled: list[Labelled] = []
    unusable = list(manifest.rejections)
    for index in spread_order(len(manifest.utterances)):
        utterance = manifest.utterances[index]
        try:
            labelled.append(label(utterance))
        except (AudioError, ValueError) as error:
            unusable.append(reject(utterance, str(error)))
        if len(labelled) == options.max_utterances:
            break
    found = f"layer_scoring: {len(labelled)} of {manifest.row_count} rows of {manifest.path}"
    reasons = first_reasons(unusable)
    if not labelled:
        raise DataError(f"{found} can be used. The first reasons:{reasons}")
    if unusable:
        log.warning("%d rows are of no use. The first reasons:%s", len(unusable), reasons)
    fewer = len(labelled) < options.max_utterances
    log.info("%s%s", found, f": fewer than max_utterances {options.max_utterances}" * fewer)
    return labelled


def spread_order(count: int) -> list[int]:
    """Return 0 to count - 1 in an order of which each beginning is evenly spread over all.

    Manifests are often sorted, by language say, so that their first rows are not like the others.
    """
    return sorted(range(count), key=lambda index: index * GOLDEN_RATIO % 1)


def work(config: Config, prepared: Prepared, run: Run) -> str:
    """Write the student's folder and prove that it loads and runs."""
    if not is_main_process():  # there is nothing to share
        return ""
    import torch

    from simpler_distil_whisper.model.whisper import load_whisper, quieten_libraries, save_whisper

    quieten_libraries()
    folder, layer_map, labelled = prepared
    if labelled:
        layer_map["decoder"] = best_layers(config, prepared, run)
    # On disk the student keeps the teacher's dtype; training loads it in float32 all the same.
    teacher = load_whisper(folder, dtype=folder.stored_dtype)
    student = prune_whisper(teacher.model, layer_map["encoder"], layer_map["decoder"])
    run.stop_if_asked()
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


def best_layers(config: Config, prepared: Prepared, run: Run) -> list[int]:
    """Return the decoder layers that score best; write and show the scores."""
    import torch

    from simpler_distil_whisper.layers.scoring import LayerScorer
    from simpler_distil_whisper.model.whisper import load_whisper

    folder, layer_map, labelled = prepared
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_whisper(folder, "auto", device=device)
    log.info("layer_scoring: in %s on %s", teacher.model.dtype, device)
    scorer = LayerScorer(teacher, tuple(layer_map["encoder"]), labelled, run.stop_if_asked)
    for one in scorer.rejections:
        log.warning("not scored on: %s: %s", one.place, one.reason)
    scored = search_layers(folder.config["decoder_layers"], len(layer_map["decoder"]), scorer)
    facts = {
        "teacher": str(folder.path),
        "encoder": layer_map["encoder"],
        "manifest": str(config.layer_scoring.manifest),
        "utterances": len(labelled) - len(scorer.rejections),
        "tokens": scorer.tokens,
    }
    write_atomically(run.folder / "layer_scores.json", scores_as_json(facts, scored).encode())
    log.info("%s", table(scored))
    return list(scored[0].layers)


def scores_as_json(facts: dict[str, object], scored: Sequence[ScoredLayers]) -> str:
    """Return the content of layer_scores.json, where each set of layers has a line of its own."""
    rows = []
    for layers, found_by, (kl, agreement) in scored:
        known = round(kl, 6) if math.isfinite(kl) else None
        row = {"layers": layers, "kl": known, "agreement": round(agreement, 6)}
        rows.append(json.dumps({**row, "found_by": found_by}))
    text = json.dumps({**facts, "scores": []}, indent=2)
    lines = ",\n    ".join(rows)
    return text.replace('"scores": []', f'"scores": [\n    {lines}\n  ]') + "\n"


def table(scored: Sequence[ScoredLayers]) -> str:
    """Return the best sets and the spread one, for the log."""
    lines = [f"of {len(scored)} sets of decoder layers, by KL(teacher || student) per token:"]
    for rank, one in enumerate(scored, 1):
        if rank <= 5 or one.found_by == "spread":
            kl, agreement = one.score
            layers = " ".join(map(str, one.layers))
            lines.append(
                f"{rank:5}. {kl:8.4f}  top token {agreement:4.0%}  {layers}  ({one.found_by})"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_script("create_student_model", __doc__, Config, prepare, work))
