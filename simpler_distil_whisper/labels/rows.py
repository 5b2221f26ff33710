"""The labelled row: its columns, and how it is made of a row of the manifest and a hypothesis.

Owns the names of the columns, with the sections of run_pseudo_labelling.json that choose them, what
is measured of a single label, and how much a row may hold. What all labels amount to is in
`quality`.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.data.audio import Clip, load_audio
from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.data.manifest import (
    MEASURED_SECONDS,
    Utterance,
    clip_of,
    still_readable,
)
from simpler_distil_whisper.data.options import Columns, ManifestData
from simpler_distil_whisper.evaluation.metrics import Scorer
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.options import Task, written_language
from simpler_distil_whisper.text.chinese import Script, chinese_converter, is_chinese
from simpler_distil_whisper.text.languages import longest_repetition, tokens

if TYPE_CHECKING:
    from simpler_distil_whisper.decoding.hypothesis import Hypothesis
    from simpler_distil_whisper.decoding.transcription import TranscribedBatch

SEGMENTS, SAMPLED_TEXTS = "segments", "sampled_texts"
# Of recordings that are cut into rows, until they are: the evidence of each window, and the text
# of each segment before it was written in `output_script`.
RECORDING, WINDOWS, UNCONVERTED_SEGMENTS = "recording", "windows", "unconverted_segments"
# Of the rows that they are cut into, besides the recording.
PART, PREVIOUS_TEXT, WHY_NO_REFERENCE = "part", "previous_text", "why_no_reference"
# Not the previous text: rows may bring some, and that of a recording begins with its own.
CUT_COLUMNS = (RECORDING, WINDOWS, UNCONVERTED_SEGMENTS, PART, WHY_NO_REFERENCE)
# The columns that are added under fixed names: the decoder's evidence, then `measure_label`'s.
NEW_COLUMNS = (
    "average_log_probability",
    "no_speech_probability",
    "compression_ratio",
    "temperature",
    "complete",
    "error_unit",
    "error_language",
    "reference_tokens",
    MEASURED_SECONDS,
    "tokens_per_second",
    "longest_repetition",
)


class LabellingColumns(Columns):
    """Which key of a row holds what."""

    speaker: str | None = Field(
        "speaker", description="Who speaks, for label_quality and pack; null: no such column."
    )


class LabellingData(ManifestData):
    """The rows to label."""

    columns: LabellingColumns = LabellingColumns()


class OutputColumns(StrictModel):
    """What the new columns are called."""

    pseudo_label: str = Field("text", description="The teacher's hypothesis.")
    reference: str = Field("origin_text", description="The row's own text, verbatim, or null.")
    error_rate: str = Field(
        "cer/wer", description="Of the hypothesis; null where there is no text to compare with."
    )
    unconverted_label: str = Field(
        "unconverted_text",
        description="The hypothesis as the teacher wrote it; only with output_script.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "OutputColumns":
        names = [*self.model_dump().values(), *NEW_COLUMNS, SEGMENTS, SAMPLED_TEXTS, *CUT_COLUMNS]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two columns would share the name {', '.join(twice)}")
        return self


@dataclass(frozen=True)
class RowLimits:
    """What a row cut from a recording, or a pack, may hold, so that training refuses none.

    Attributes:
        seconds: of audio.
        tokens: of text and timestamps.
    """

    seconds: float
    tokens: int


def row_limits(max_seconds: float | None, teacher: ModelFolder) -> RowLimits:
    """Return the limits of a teacher's window and decoder; `max_seconds`, unless None, is lower."""
    return RowLimits(max_seconds or teacher.window_seconds, teacher.label_tokens)


@dataclass(frozen=True)
class LabelColumns:
    """Which key of a labelled row holds what; None: no such column.

    With windows, a recording's row holds what is needed to cut it into rows.
    """

    id: str | None
    audio: str
    start_seconds: str | None
    duration_seconds: str | None
    language: str | None
    label: str
    reference: str
    error_rate: str
    segments: str | None = None
    speaker: str | None = None
    unconverted: str | None = None
    with_windows: bool = False
    channel: str | None = None
    sampled_texts: str | None = None

    @classmethod
    def from_config(
        cls,
        columns: LabellingColumns,
        output: OutputColumns,
        *,
        with_segments: bool,
        with_unconverted: bool,
        with_windows: bool = False,
        with_sampled_texts: bool = False,
    ) -> "LabelColumns":
        """Return the columns of the manifest together with the new ones."""
        return cls(
            id=columns.id,
            audio=columns.audio,
            start_seconds=columns.start_seconds,
            duration_seconds=columns.duration_seconds,
            language=columns.language,
            label=output.pseudo_label,
            reference=output.reference,
            error_rate=output.error_rate,
            segments=SEGMENTS if with_segments else None,
            speaker=columns.speaker,
            unconverted=output.unconverted_label if with_unconverted else None,
            with_windows=with_windows,
            channel=columns.channel,
            sampled_texts=SAMPLED_TEXTS if with_sampled_texts else None,
        )

    @property
    def of_audio(self) -> tuple[str, str | None, str | None, str | None]:
        """The columns that say where a row's audio is: file, beginning, length and channel."""
        return self.audio, self.start_seconds, self.duration_seconds, self.channel

    def clip(self, row: Row) -> Clip:
        """Return the file, or part of a file, that holds the audio of a labelled row."""
        return clip_of(row, row[self.audio], self)

    def load(self, row: Row) -> npt.NDArray[np.float32]:
        """Return the audio of a labelled row, float32 [S].

        Raises:
            DataError: it cannot be read any more.
        """
        with still_readable(row[self.audio], "labelled"):
            return load_audio(*self.clip(row))

    def new_fields(self, text_column: str) -> set[str]:
        """Return the fields that a row must not have yet, since labelling would overwrite them.

        The text column is meant to be replaced, and so is a length, by the measured one: they are
        not among them. A reference that an earlier run has kept is.
        """
        fields = {self.label, self.reference, self.error_rate, *NEW_COLUMNS}
        fields -= {text_column, MEASURED_SECONDS}
        fields |= {name for name in (self.segments, self.unconverted) if name}
        fields.add(SAMPLED_TEXTS)  # another teacher's would be learnt, also where none are made now
        if self.with_windows:
            fields |= set(CUT_COLUMNS)
        return fields


@dataclass(frozen=True)
class Labeller:
    """Makes labelled rows of what the teacher has transcribed; a process of its own can do it.

    Attributes:
        columns: which key of the labelled row holds what.
        scorer: counts the errors, on normalised copies of the texts.
        default_language: the language of rows that name none; None: it is not known.
        script: in which Chinese labels are written; None: as the teacher wrote them.
        task: what the teacher does with what it hears.
    """

    columns: LabelColumns
    scorer: Scorer
    default_language: str | None
    script: Script | None = None
    task: Task = "transcribe"

    def __call__(self, batch: "TranscribedBatch") -> list[tuple[Utterance, Row]]:
        """Return each utterance of a batch with its labelled row."""
        return [
            (decoded[0], self.row(*decoded))
            for decoded in zip(batch.utterances, batch.hypotheses, batch.seconds, strict=True)
        ]

    def row(self, utterance: Utterance, hypothesis: "Hypothesis", seconds: float) -> Row:
        """Return the row of the manifest with the hypothesis as its text and the new columns.

        Args:
            utterance: the row.
            hypothesis: the teacher's.
            seconds: length of the decoded audio.
        """
        columns, scorer = self.columns, self.scorer
        # Not the detected language: the unit of the error rate must not depend on the model.
        language = written_language(utterance.language or self.default_language, self.task)
        as_decoded = hypothesis
        if self.script and is_chinese(language or hypothesis.language):
            hypothesis = in_script(hypothesis, self.script)
        row = utterance.row
        # A relative path would no longer be right: the labelled manifest lies in another folder.
        row[columns.audio] = str(utterance.audio)
        row[columns.label] = hypothesis.text
        row[columns.reference] = utterance.text
        row[columns.error_rate] = error_rate(utterance.text, hypothesis.text, scorer, language)
        if columns.language and utterance.language is None:
            row[columns.language] = hypothesis.language
        if columns.unconverted:
            row[columns.unconverted] = as_decoded.text
        if columns.segments:
            row[columns.segments] = [asdict(segment) for segment in hypothesis.segments]
        if columns.sampled_texts:
            row[columns.sampled_texts] = [*hypothesis.sampled_texts]
        if columns.with_windows and hypothesis.windows:
            row[RECORDING] = utterance.id
            row[WINDOWS] = [asdict(window) for window in hypothesis.windows]
            row[UNCONVERTED_SEGMENTS] = [segment.text for segment in as_decoded.segments]
        measured = measure_label(
            hypothesis.text, hypothesis.token_count, seconds, utterance.text, scorer, language
        )
        return row | hypothesis.evidence() | measured


def in_script(hypothesis: "Hypothesis", script: Script) -> "Hypothesis":
    """Return a Chinese hypothesis whose texts and segments are written in a script."""
    convert = chinese_converter(script)
    segments = tuple(
        replace(segment, text=convert(segment.text)) for segment in hypothesis.segments
    )
    text = convert(hypothesis.text)
    # Phrases that two segments share may be converted differently as a whole.
    if "".join(segment.text for segment in hypothesis.segments) == hypothesis.text:
        text = "".join(segment.text for segment in segments)
    sampled_texts = tuple(map(convert, hypothesis.sampled_texts))
    return replace(hypothesis, text=text, segments=segments, sampled_texts=sampled_texts)


def error_rate(
    reference: str | None, label: str, scorer: Scorer, language: str | None
) -> float | None:
    """Return the error rate of a label, rounded; None where there is nothing to compare it with."""
    if reference is None:
        return None
    rate = scorer.count(reference, label, language).rate
    return None if rate is None else round(rate, 6)


def measure_label(
    label: str,
    token_count: int,
    seconds: float,
    reference: str | None,
    scorer: Scorer,
    language: str | None,
) -> Row:
    """Return the columns that describe a label, besides the decoder's own evidence.

    Args:
        label: the text, not normalised.
        token_count: how many of the model's tokens it has.
        seconds: length of the decoded audio.
        reference: the row's own text, not normalised; None: it has none.
        scorer: normalises both texts and chooses the unit.
        language: decides the unit; None: the script of the text decides.
    """
    normalized_label = scorer.normalize(label, language)
    normalized_reference = None if reference is None else scorer.normalize(reference, language)
    unit = scorer.unit(normalized_reference, normalized_label, language)
    counted = None if normalized_reference is None else len(tokens(normalized_reference, unit))
    return {
        "error_unit": None if reference is None else unit,
        "error_language": language,  # of the text, not the one that the model may have detected
        "reference_tokens": counted,
        MEASURED_SECONDS: round(seconds, 6),
        "tokens_per_second": round(token_count / seconds, 4),
        "longest_repetition": longest_repetition(tokens(normalized_label, unit)),
    }
