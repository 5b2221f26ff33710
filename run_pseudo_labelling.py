"""Let the teacher transcribe the training audio: manifest -> pseudo-labelled manifest.

Writes `pseudo_labels.jsonl`: the rows of the manifest, in order and with all their fields, in
which the teacher's hypothesis has taken the place of the text, the text is kept beside it, and
their error rate stands in a column by which run_distillation.py can filter; `rejected.jsonl`:
every other row, with the reason; `label_quality.json` and `label_quality.html`: how good the labels
are and which threshold suits them. With `pack`, also `packed_labels.jsonl`: the good labels, as
many to a row as fit into the model's window.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from simpler_distil_whisper.config import ConfigError, RunOptions, StrictModel
from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.data.manifest import (
    Columns,
    Manifest,
    ManifestData,
    Utterance,
    read_manifest,
)
from simpler_distil_whisper.data.results import RowResults
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.packing import (
    PACKED_LABELS,
    PackLimits,
    PackOptions,
    plan_packs,
    write_audio,
    write_packs,
)
from simpler_distil_whisper.labels.quality import (
    SIGN_COLUMNS,
    LabelColumns,
    QualityOptions,
    signs_of,
    summarize_labels,
    summarize_rejected,
    write_label_quality,
)
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder
from simpler_distil_whisper.model.options import CacheOptions, DecodingOptions, ModelOptions
from simpler_distil_whisper.run import Run, is_main_process, log, run_script

if TYPE_CHECKING:
    from simpler_distil_whisper.decoding.transcriber import Hypothesis

SEGMENTS = "segments"
PROMPT_TOKENS = 4  # start, language, task and <|notimestamps|>
NEW_COLUMNS = (
    *("average_log_probability", "no_speech_probability", "compression_ratio", "temperature"),
    *("complete", *SIGN_COLUMNS),
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

    @model_validator(mode="after")
    def _names_differ(self) -> "OutputColumns":
        names = [self.pseudo_label, self.reference, self.error_rate, *NEW_COLUMNS, SEGMENTS]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two columns would share the name {', '.join(twice)}")
        return self


class Config(RunOptions):
    """run_pseudo_labelling.json."""

    teacher: ModelOptions
    data: LabellingData
    decoding: DecodingOptions = DecodingOptions()
    metric: Metric = Metric()
    output_columns: OutputColumns = OutputColumns()
    quality: QualityOptions = QualityOptions()
    pack: PackOptions = PackOptions()
    teacher_cache: CacheOptions = CacheOptions()

    @property
    def label_columns(self) -> LabelColumns:
        """Which key of a labelled row holds what."""
        columns, output = self.data.columns, self.output_columns
        return LabelColumns(
            id=columns.id,
            audio=columns.audio,
            start_seconds=columns.start_seconds,
            duration_seconds=columns.duration_seconds,
            language=columns.language,
            label=output.pseudo_label,
            reference=output.reference,
            error_rate=output.error_rate,
            segments=SEGMENTS if self.decoding.with_segments else None,
        )

    @property
    def pack_columns(self) -> list[str]:
        """The columns whose values the parts of a pack share, besides the language."""
        if self.pack.group_by is not None:
            return self.pack.group_by
        return [self.data.columns.speaker] if self.data.columns.speaker else []

    @model_validator(mode="after")
    def _packs_have_something_in_common(self) -> "Config":
        if self.pack.enabled and self.pack.group_by is None and not self.data.columns.speaker:
            raise ValueError("pack.group_by needs columns where data.columns.speaker is null")
        return self


def prepare(config: Config) -> tuple[ModelFolder, Manifest]:
    """Return the teacher's folder and the usable rows of the manifest."""
    folder = read_model_folder(config.teacher.path, config.teacher.processor, "teacher")
    folder.check_language(config.decoding.language, "decoding.language")
    data, longest = config.data, config.pack.max_seconds
    if longest and longest > folder.window_seconds:
        raise ConfigError(
            f"pack.max_seconds: {longest:g} s is longer than the window of {folder.path}, "
            f"{folder.window_seconds:g} s"
        )
    # The text column is meant to change hands; a reference that an earlier run kept is not.
    new_fields = {*config.output_columns.model_dump().values(), *NEW_COLUMNS} - {data.columns.text}
    if config.decoding.with_segments:
        new_fields.add(SEGMENTS)
    manifest = read_manifest(
        data.manifest,
        data.columns,
        max_utterances=data.max_utterances,
        languages=folder.row_languages,
        new_fields=new_fields,
    )
    return folder, manifest.check(data.max_bad_fraction)


def work(config: Config, prepared: tuple[ModelFolder, Manifest], run: Run) -> str:
    """Write `pseudo_labels.jsonl` and `rejected.jsonl`."""
    from simpler_distil_whisper.decoding.transcriber import Transcriber
    from simpler_distil_whisper.decoding.transcription import (
        load_for_decoding,
        transcribe_manifest,
    )
    from simpler_distil_whisper.model.devices import join_processes
    from simpler_distil_whisper.model.teacher_cache import open_encoder_cache

    folder, manifest = prepared
    state = join_processes()
    teacher = load_for_decoding(folder, config.teacher, state, run)
    transcriber = Transcriber(teacher, config.decoding, config.seed)
    cache = open_encoder_cache(
        config.teacher_cache, folder, teacher.feature_extractor, teacher.model.dtype
    )
    scorer = Scorer(config.metric)
    results = RowResults(run.folder, "pseudo_labels.jsonl")
    for done in transcribe_manifest(transcriber, manifest, config.data, results, run, cache):
        labelled = [
            (utterance, labelled_row(utterance, hypothesis, seconds, scorer, config))
            for utterance, hypothesis, seconds in zip(
                done.batch.utterances, done.hypotheses, done.batch.seconds, strict=True
            )
        ]
        results.append(labelled, done.batch.rejections)
    kept, rejected = results.finish(manifest.rejections, state.wait_for_everyone)
    labels = run.folder / "pseudo_labels.jsonl"
    if state.is_main_process:
        assess(run.folder, config, scorer)
    written = f"{labels}: {kept} rows; {run.folder / 'rejected.jsonl'}: {rejected} rows.\n"
    if config.pack.enabled:
        written += pack(labels, folder, config, scorer, run, state.wait_for_everyone)
    return (
        f"{written}Look at {run.folder / 'label_quality.html'}.\n"
        "Next: python create_student_model.py create_student_model.json"
    )


def labelled_row(
    utterance: Utterance, hypothesis: "Hypothesis", seconds: float, scorer: Scorer, config: Config
) -> Row:
    """Return the row with the hypothesis as its text; the error rate is of normalised copies."""
    row, columns = utterance.row, config.output_columns
    # The unit must not depend on what the model has taken the language for.
    language = utterance.language or config.decoding.language
    rate = None
    if utterance.text is not None:
        rate = scorer.count(utterance.text, hypothesis.text, language).rate
    signs = signs_of(hypothesis.text, hypothesis.tokens, seconds, utterance.text, scorer, language)
    # The labelled manifest lies in another folder than the one that relative paths began from.
    row[config.data.columns.audio] = str(utterance.audio)
    row[columns.pseudo_label] = hypothesis.text
    row[columns.reference] = utterance.text
    row[columns.error_rate] = None if rate is None else round(rate, 6)
    if config.data.columns.language and utterance.language is None:
        row[config.data.columns.language] = hypothesis.language
    if config.decoding.with_segments:
        row[SEGMENTS] = [dataclasses.asdict(segment) for segment in hypothesis.segments]
    return row | hypothesis.evidence() | signs


def assess(folder: Path, config: Config, scorer: Scorer) -> None:
    """Write `label_quality.json` and `.html`, and say how many rows each threshold would keep."""
    columns = config.data.columns
    group_by = [columns.speaker, *config.quality.group_by]
    quality = summarize_labels(
        folder / "pseudo_labels.jsonl",
        config.label_columns,
        [column for column in group_by if column],
        scorer,
        config.quality.worst_rows,
    )
    quality["rejected"] = summarize_rejected(
        folder / "rejected.jsonl", config.label_columns, config.data.manifest.parent
    )
    write_label_quality(folder, quality)
    for step in (0, 5, 10, 20, 50):
        kept = quality["thresholds"][step]
        log.info(
            "data.max_error_rate %.2f keeps %d of %d rows",
            *(kept["max_error_rate"], kept["rows"], quality["rows"]),
        )
    if config.decoding.long_form != "reject":
        log.info("Rows longer than the model's window are labelled, but not learnt from.")
    suspicious = quality["signs"]["any"]["rows"]
    log.info("%d rows show a sign of a failed label that needs no reference.", suspicious)
    suggestion = quality["suggestion"]
    threshold = suggestion["max_error_rate"]
    chosen = "none" if threshold is None else f"{threshold:.2f}"
    log.info("Suggested data.max_error_rate: %s. %s", chosen, " ".join(suggestion["reasoning"]))


def pack(
    labels: Path,
    folder: ModelFolder,
    config: Config,
    scorer: Scorer,
    run: Run,
    wait_for_everyone: Callable[[], None],
) -> str:
    """Write `packed_labels.jsonl` and its audio; return what became of the labels, in words."""
    columns, shared = config.label_columns, config.pack_columns
    limits = PackLimits(
        seconds=config.pack.max_seconds or folder.window_seconds,
        tokens=folder.config["max_target_positions"] - PROMPT_TOKENS,
        error_rate=config.pack.max_error_rate,
    )
    plan = plan_packs(labels, columns, shared, limits)
    write_audio(labels, plan, columns, config.data.num_workers, run)
    wait_for_everyone()
    if is_main_process():
        if columns.language:
            shared = [columns.language, *shared]
        write_packs(labels, plan, columns, shared, scorer)
    reasons = "".join(f", {rows} left out ({why})" for why, rows in plan.left_out.items())
    packed = labels.with_name(PACKED_LABELS)
    return f"{packed}: {len(plan)} packs of {len(plan.offsets)} labels{reasons}.\n"


if __name__ == "__main__":
    sys.exit(run_script("run_pseudo_labelling", __doc__, Config, prepare, work))
