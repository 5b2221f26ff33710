"""Let the teacher transcribe the training audio: manifest -> pseudo-labelled manifest.

Writes `pseudo_labels.jsonl`: the rows of the manifest, in order and with all their fields, in
which the teacher's hypothesis has taken the place of the text, the text is kept beside it, and
their error rate stands in a column by which run_distillation.py can filter; `rejected.jsonl`:
every other row, with the reason; `label_quality.json` and `label_quality.html`: how good the labels
are and which threshold suits them. With `segmentation`, recordings longer than the model's window
are cut into rows; whole they stand in `recordings.jsonl`. With `pack`, also `packed_labels.jsonl`:
the good labels, as many to a row as fit into the model's window.
"""

import sys
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from simpler_distil_whisper.config import RunOptions
from simpler_distil_whisper.data.manifest import Manifest, read_manifest
from simpler_distil_whisper.data.results import RowResults
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.packing import PackOptions, pack_labels
from simpler_distil_whisper.labels.quality import QualityOptions
from simpler_distil_whisper.labels.quality_page import assess_labels
from simpler_distil_whisper.labels.recordings import RECORDINGS, cut_recordings
from simpler_distil_whisper.labels.rows import LabelColumns, Labeller, LabellingData, OutputColumns
from simpler_distil_whisper.labels.segmentation import SegmentationOptions
from simpler_distil_whisper.launch import is_main_process
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder
from simpler_distil_whisper.model.options import (
    CacheOptions,
    DecodingOptions,
    SampledTexts,
    TeacherModelOptions,
)
from simpler_distil_whisper.run import Run, log
from simpler_distil_whisper.script import run_script
from simpler_distil_whisper.text.chinese import Script

if TYPE_CHECKING:
    import torch

Prepared = tuple[ModelFolder, Manifest]


class Config(RunOptions):
    """run_pseudo_labelling.json."""

    teacher: TeacherModelOptions
    data: LabellingData
    decoding: DecodingOptions = DecodingOptions()
    sampled_texts: SampledTexts = SampledTexts()
    metric: Metric = Metric()
    output_columns: OutputColumns = OutputColumns()
    output_script: Script | None = Field(
        None, description="In which the labels of Chinese rows are written; null: as decoded."
    )
    segmentation: SegmentationOptions = SegmentationOptions()
    quality: QualityOptions = QualityOptions()
    pack: PackOptions = PackOptions()
    teacher_cache: CacheOptions = CacheOptions()

    @property
    def label_columns(self) -> LabelColumns:
        """Which key of a labelled row holds what."""
        return LabelColumns.from_config(
            self.data.columns,
            self.output_columns,
            with_segments=self.decoding.with_segments,
            with_unconverted=self.output_script is not None,
            with_windows=self.segmentation.enabled,
            with_sampled_texts=self.sampled_texts.count > 0,
        )

    @model_validator(mode="after")
    def _packs_have_something_in_common(self) -> "Config":
        if self.pack.enabled and self.pack.group_by is None and not self.data.columns.speaker:
            raise ValueError("pack.group_by needs columns where data.columns.speaker is null")
        return self

    @model_validator(mode="after")
    def _recordings_can_be_cut(self) -> "Config":
        self.segmentation.check(self.decoding, self.data.columns)
        return self


def prepare(config: Config) -> Prepared:
    """Return the teacher's folder and the usable rows of the manifest."""
    folder = read_model_folder(config.teacher.path, config.teacher.processor, "teacher")
    folder.check_language_and_task(config.decoding.language, config.decoding.task, "decoding")
    folder.check_fits(config.pack.max_seconds, "pack.max_seconds")
    folder.check_fits(config.segmentation.max_seconds, "segmentation.max_seconds")
    data = config.data
    manifest = read_manifest(
        data.manifest,
        data.columns,
        max_utterances=data.max_utterances,
        channel=data.channel,
        languages=folder.row_languages,
        new_fields=config.label_columns.new_fields(data.columns.text),
    )
    return folder, manifest.check(data.max_bad_fraction, count_texts=True)


def work(config: Config, prepared: Prepared, run: Run) -> str:
    """Label the rows, assess the labels, pack them if the config asks for it."""
    from simpler_distil_whisper.decoding.transcription import end_of_shard
    from simpler_distil_whisper.model.processes import join_processes, wait_for_everyone

    folder, manifest = prepared
    device = join_processes()
    scorer = Scorer(config.metric)
    columns = config.label_columns
    labels = run.folder / "pseudo_labels.jsonl"
    labelled = run.folder / RECORDINGS if config.segmentation.enabled else labels
    results = RowResults(run.folder, labelled.name, run.shards)
    label_rows(config, prepared, device, results, run)
    if closing_words := end_of_shard(run):
        return closing_words
    kept, rejected = results.finish(manifest.rejections, wait_for_everyone)

    summary = f"{labelled}: {kept} rows; {run.folder / 'rejected.jsonl'}: {rejected} rows.\n"
    workers = config.data.workers
    if config.segmentation.enabled:
        summary += cut_recordings(
            labels, columns, config.segmentation, folder, scorer, run, workers=workers
        )
    if is_main_process():
        assess_labels(labels, columns, config.quality, scorer, config.data.manifest.parent)
        if config.decoding.long_form != "reject" and not config.segmentation.enabled:
            log.info(
                "Only with segmentation can rows longer than the model's window be learnt from."
            )
    if config.pack.enabled:
        summary += pack_labels(labels, columns, config.pack, folder, scorer, run, workers=workers)
    return (
        f"{summary}Look at {run.folder / 'label_quality.html'}.\n"
        "Next: python create_student_model.py create_student_model.json"
    )


def label_rows(
    config: Config, prepared: Prepared, device: "torch.device", results: RowResults, run: Run
) -> None:
    """Let the teacher transcribe what has no results yet, and measure the labels."""
    from simpler_distil_whisper.data.workers import map_behind
    from simpler_distil_whisper.decoding.loading import load_for_decoding
    from simpler_distil_whisper.decoding.transcriber import Transcriber
    from simpler_distil_whisper.decoding.transcription import transcribe_manifest
    from simpler_distil_whisper.model.teacher_cache import open_encoder_cache

    folder, manifest = prepared
    caching = config.teacher_cache.folder is not None
    teacher = load_for_decoding(folder, config.teacher, device, run, for_training=caching)
    transcriber = Transcriber(
        teacher,
        config.decoding,
        config.seed,
        record_steps=True,
        sampled_texts=config.sampled_texts,
    )
    model, extractor = teacher.model, teacher.feature_extractor
    cache = open_encoder_cache(config.teacher_cache, folder, extractor, model.dtype, model.device)
    label = Labeller(
        config.label_columns,
        Scorer(config.metric),
        config.decoding.language,
        config.output_script,
        config.decoding.task,
    )
    batches = transcribe_manifest(transcriber, manifest, config.data, results, run, cache)
    # A GPU would wait while the labels are measured; the cores of a CPU are busy decoding.
    workers = config.data.workers if teacher.model.device.type != "cpu" else 0
    for rows in map_behind(label, batches, workers):
        results.append(rows)


if __name__ == "__main__":
    sys.exit(run_script("run_pseudo_labelling", __doc__, Config, prepare, work))
