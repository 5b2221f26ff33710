"""Which rows of a labelled manifest decoder layers are scored on.

Owns the config section `layer_scoring` and the selection of rows; the scores are computed in
`scoring.py`. torch is imported only to tokenize labels.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from simpler_distil_whisper.config import PositiveInt, StrictModel
from simpler_distil_whisper.data.audio import AudioError, audio_seconds
from simpler_distil_whisper.data.manifest import first_reasons, read_manifest, reject
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.options import Task, whisper_code
from simpler_distil_whisper.run import DataError, log

if TYPE_CHECKING:
    from simpler_distil_whisper.training.tokens import Example

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


class LayerScoring(StrictModel):
    """Choosing decoder layers by KL(teacher || student) on some rows, before any training."""

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
        description="Usable rows to score on, spread over the manifest; the states of all of them "
        "stay in memory (large-v3: 8 MB for 50 tokens in 16 bits, 16 in float32).",
    )

    _code = field_validator("language")(whisper_code)


def select_rows(options: LayerScoring, teacher: ModelFolder) -> "list[Example]":
    """Return the utterances to score on; log how many rows are unusable, and why.

    Raises:
        ConfigError: the manifest cannot be read, or the teacher has no token for the language.
        DataError: no row can be used.
    """
    from simpler_distil_whisper.training.filters import example_filter
    from simpler_distil_whisper.training.options import TrainingColumns, TrainingData
    from simpler_distil_whisper.training.tokens import Dropped

    teacher.check_language_and_task(options.language, options.task, "layer_scoring")
    assert options.manifest is not None
    manifest = read_manifest(options.manifest, options.columns, languages=teacher.row_languages)
    # By the filters of training, but for the teacher's evidence, whose limits another config names.
    data = TrainingData(
        train_manifests=[options.manifest],
        columns=TrainingColumns(**options.columns.model_dump()),
        language=options.language,
        task=options.task,
        max_compression_ratio=None,
        min_average_log_probability=None,
        max_no_speech_probability=None,
        incomplete_labels="without_end",
    )
    filters = example_filter(data, teacher)
    examples: list[Example] = []
    rejections = list(manifest.rejections)
    for index in spread_order(len(manifest.utterances)):
        utterance = manifest.utterances[index]
        try:
            examples.append(filters.example(utterance, audio_seconds(*utterance.clip)))
        except (AudioError, Dropped) as error:
            rejections.append(reject(utterance, str(error)))
        if len(examples) == options.max_utterances:
            break
    summary = f"layer_scoring: {len(examples)} of {manifest.row_count} rows of {manifest.path}"
    reasons = first_reasons(rejections)
    if not examples:
        raise DataError(f"{summary} can be used. The first reasons:{reasons}")
    if rejections:
        log.warning("%d rows are unusable. The first reasons:%s", len(rejections), reasons)
    if len(examples) < options.max_utterances:
        summary += f": fewer than max_utterances {options.max_utterances}"
    log.info("%s", summary)
    return examples


def spread_order(count: int) -> list[int]:
    """Return 0 to count - 1 in an order whose every beginning is evenly spread over all of them.

    Manifests are often sorted, by language for example, so that their first rows are not like the
    others. The fractional parts of multiples of the golden ratio are evenly spread in this way.
    """
    return sorted(range(count), key=lambda index: index * GOLDEN_RATIO % 1)
