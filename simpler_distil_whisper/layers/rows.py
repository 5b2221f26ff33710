"""Which rows of a labelled manifest decoder layers are scored on.

Owns the config section `layer_scoring` and the selection of rows; the scores are computed in
`scoring.py`. torch is imported only to tokenize labels.
"""

import math
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, field_validator

from simpler_distil_whisper.config import PositiveInt, StrictModel
from simpler_distil_whisper.data.audio import AudioError, audio_seconds, check_length
from simpler_distil_whisper.data.manifest import Utterance, first_reasons, read_manifest, reject
from simpler_distil_whisper.data.options import Columns, DataLimits
from simpler_distil_whisper.labels.evidence import is_cut_off
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.options import Task, whisper_code
from simpler_distil_whisper.run import DataError, log
from simpler_distil_whisper.text.normalization import is_blank

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


class Labelled(NamedTuple):
    """An utterance with the tokens of its label.

    Attributes:
        tokens: prompt, label and, unless the label was cut off, the end token.
        prompt_length: how many of them are given to the decoder and not scored.
    """

    utterance: Utterance
    tokens: list[int]
    prompt_length: int


class LabelReader:
    """Turns the rows of a manifest into labelled utterances."""

    def __init__(self, teacher: ModelFolder, language: str | None, task: Task) -> None:
        """Load the tokenizer.

        Args:
            teacher: the folder that it is in.
            language: of the rows that name none.
            task: what the labels are.
        """
        # These import torch, which takes seconds.
        from simpler_distil_whisper.model.whisper import load_tokenizer, special_tokens
        from simpler_distil_whisper.training.tokens import LabelTokenizer

        tokenizer = load_tokenizer(teacher)
        self.special = special_tokens(tokenizer, teacher)
        self.tokenize = LabelTokenizer(
            tokenizer, self.special, teacher.config["max_target_positions"]
        )
        self.language = language
        self.task = task
        self.window = teacher.window_seconds

    def __call__(self, utterance: Utterance) -> Labelled:
        """Return the utterance with the tokens of its label.

        Raises:
            AudioError: its audio is too long or too short, or its file is no audio.
            ConfigError: the teacher has no token for the task.
            ValueError: it has no label that can be given to the decoder.
        """
        if not utterance.text or is_blank(utterance.text):
            raise ValueError("it has no label")
        language = utterance.language or self.language
        if language is None and self.special.languages:
            raise ValueError("neither the row nor layer_scoring.language names the language")
        prompt = self.special.prompt(language, self.task)
        complete = not is_cut_off(utterance.row)
        label = self.tokenize(utterance.text, complete=complete)
        maximum = self.tokenize.max_label_tokens
        if len(label) > maximum:
            raise ValueError(f"label of {len(label)} tokens, the maximum is {maximum}")
        seconds = audio_seconds(*utterance.clip)
        check_length(seconds, DataLimits().min_duration_seconds, self.window)
        end = [self.special.end] if complete else []
        return Labelled(utterance, [*prompt, *label, *end], len(prompt))


def select_rows(options: LayerScoring, teacher: ModelFolder) -> "list[Labelled]":
    """Return the utterances to score on; log how many rows are unusable, and why.

    Raises:
        ConfigError: the manifest cannot be read, or the teacher has no token for the language.
        DataError: no row can be used.
    """
    teacher.check_language(options.language, "layer_scoring.language")
    assert options.manifest is not None
    manifest = read_manifest(options.manifest, options.columns, languages=teacher.row_languages)
    label = LabelReader(teacher, options.language, options.task)
    labelled: list[Labelled] = []
    rejections = list(manifest.rejections)
    for index in spread_order(len(manifest.utterances)):
        utterance = manifest.utterances[index]
        try:
            labelled.append(label(utterance))
        except (AudioError, ValueError) as error:
            rejections.append(reject(utterance, str(error)))
        if len(labelled) == options.max_utterances:
            break
    summary = f"layer_scoring: {len(labelled)} of {manifest.row_count} rows of {manifest.path}"
    reasons = first_reasons(rejections)
    if not labelled:
        raise DataError(f"{summary} can be used. The first reasons:{reasons}")
    if rejections:
        log.warning("%d rows are unusable. The first reasons:%s", len(rejections), reasons)
    if len(labelled) < options.max_utterances:
        summary += f": fewer than max_utterances {options.max_utterances}"
    log.info("%s", summary)
    return labelled


def spread_order(count: int) -> list[int]:
    """Return 0 to count - 1 in an order whose every beginning is evenly spread over all of them.

    Manifests are often sorted, by language for example, so that their first rows are not like the
    others. The fractional parts of multiples of the golden ratio are evenly spread in this way.
    """
    return sorted(range(count), key=lambda index: index * GOLDEN_RATIO % 1)
