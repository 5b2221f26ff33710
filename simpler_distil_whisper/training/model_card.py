"""What a distilled model is and where it comes from, for people (`README.md`) and for machines.

Owns what goes into a model folder beside the model. Such folders are handed on, so the card holds
no path, and of the manifests only how much they hold.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpler_distil_whisper import __version__
from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.data.jsonl import LONGEST_ROW, Row
from simpler_distil_whisper.files import read_regular_file
from simpler_distil_whisper.labels.filters import EvidenceLimits
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.weights import parameter_count
from simpler_distil_whisper.pages import render
from simpler_distil_whisper.run import log, package_versions
from simpler_distil_whisper.training.log import read_metrics
from simpler_distil_whisper.training.plan import RunLength
from simpler_distil_whisper.training.selection import Selection

SHAPE = ("encoder_layers", "decoder_layers", "d_model", "num_mel_bins", "vocab_size")
RECIPE = ("objective", "freeze", "audio_context", "optimizer", "seed")
FILTERS = (
    *EvidenceLimits.model_fields,
    "incomplete_labels",
    "train_weights",
    "min_duration_seconds",
    "max_duration_seconds",
    "max_label_tokens",
    "task",
    "timestamp_probability",
    "previous_text_probability",
    "sampled_text_probability",
)


class LayerMap(StrictModel):
    """What create_student_model.py writes: the teacher layer of each student layer."""

    teacher: str
    encoder: list[int]
    decoder: list[int]


class ModelCard:
    """The two documents of a model folder."""

    def __init__(self, facts: dict[str, Any], metrics: Path) -> None:
        """Keep what does not change during the run.

        Args:
            facts: as `facts_of` returns them.
            metrics: the run's metrics.jsonl, which has the scores.
        """
        self._facts, self._metrics = facts, metrics

    def documents(self, step: int, learning_rate: float | None = None) -> dict[str, bytes]:
        """Return file name -> content for the model as it is after so many steps.

        Args:
            step: how many there were.
            learning_rate: the highest, where the run has chosen it; None: the config names it.
        """
        facts = {**self._facts, "steps": step, "dev": scores_at(self._metrics, step)}
        if learning_rate is not None:
            optimizer = {**facts["recipe"]["optimizer"], "learning_rate": learning_rate}
            facts["recipe"] = {**facts["recipe"], "optimizer": optimizer}
        text = json.dumps(facts, ensure_ascii=False, indent=2, allow_nan=False)
        return {
            "distillation.json": f"{text}\n".encode(),
            "README.md": render("model_card.md", **facts).encode(),
        }


def facts_of(
    config: StrictModel,
    teacher: ModelFolder,
    student: ModelFolder,
    selection: Selection,
    length: RunLength,
    precision: str,
    views: int | None,
) -> dict[str, Any]:
    """Return what is known of a run before its first step, with what "auto" has come to."""
    settings = config.model_dump(mode="json")
    default = settings["data"]["language"] or "unknown"
    languages = Counter(example.utterance.language or default for example in selection.examples)
    columns = settings["data"]["columns"]
    left_out = {kind: count for kind, count in selection.report.items() if kind != "kept"}
    return {
        "teacher": {"name": teacher.path.resolve().name, **_size(teacher)},
        "student": {**_size(student), "layer_map": _layer_map(student.path)},
        "window_seconds": student.window_seconds,
        "data": {
            "manifests": len(settings["data"]["train_manifests"]),
            **selection.report["kept"],
            "languages": dict(sorted(languages.items())),
            "labels": "references" if columns["text"] == columns["reference"] else "hypotheses",
            "left_out": left_out,
            "filters": {
                "max_error_rate": selection.max_error_rate,
                **{name: settings["data"][name] for name in FILTERS},
            },
        },
        "recipe": {
            **{name: settings[name] for name in RECIPE},
            "augmentation": {**settings["augmentation"], "views": views},
            "schedule": {
                "kind": settings["schedule"]["kind"],
                "warmup_steps": length.warmup_steps,
                "max_steps": length.max_steps,
            },
            "precision": precision,
            "utterances_per_step": length.step_size,
        },
        "dev_metric": settings["validation"]["metric"],
        "dev_decoding": settings["validation"]["decoding"],
        "versions": {"simpler_distil_whisper": __version__, **package_versions()},
    }


def scores_at(metrics: Path, step: int) -> dict[str, Any] | None:
    """Return the scores on dev after a step, of student and teacher; None if it was not scored."""
    rows = read_metrics(metrics)
    student = _last_scores([row for row in rows if row["step"] == step], "student")
    return student and {"student": student, "teacher": _last_scores(rows, "teacher")}


def _last_scores(rows: Sequence[Row], model: str) -> dict[str, Any] | None:
    prefix = f"validation/{model}/"
    for row in reversed(rows):
        if names := [name for name in row if name.startswith(prefix)]:
            return {name.removeprefix(prefix): row[name] for name in names}
    return None


def _size(folder: ModelFolder) -> dict[str, Any]:
    shape = {name: folder.config[name] for name in SHAPE}
    return {**shape, "parameters": parameter_count(folder)}


def _layer_map(student: Path) -> dict[str, Any] | None:
    """Return which teacher layers the student was made of; None if no layer_map.json tells it."""
    path = student / "layer_map.json"
    if not path.exists():
        return None
    try:
        layer_map = LayerMap.model_validate_json(read_regular_file(path, LONGEST_ROW))
        return layer_map.model_dump(include={"encoder", "decoder"})
    except (OSError, ValueError) as error:
        log.warning("%s: not used in the model card: %s", path, error)
        return None
