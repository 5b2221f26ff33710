"""Let the teacher transcribe the training audio: manifest -> pseudo-labelled manifest.

Writes `pseudo_labels.jsonl`: the rows of the manifest, in order and with all their fields, in
which the teacher's hypothesis has taken the place of the text, the text is kept beside it, and
their error rate stands in a column by which run_distillation.py can filter; and `rejected.jsonl`:
every other row, with the reason.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.jsonl import Row
from simpler_distil_whisper.manifest import (
    Manifest,
    ManifestData,
    RowResults,
    Utterance,
    read_manifest,
)
from simpler_distil_whisper.metrics import Metric, Scorer
from simpler_distil_whisper.model_folder import ModelFolder, read_model_folder
from simpler_distil_whisper.options import DecodingOptions, ModelOptions
from simpler_distil_whisper.run import Run, log, run_script

if TYPE_CHECKING:
    from simpler_distil_whisper.decoding import Hypothesis

EVIDENCE = ("average_log_probability", "no_speech_probability", "compression_ratio", "complete")


class OutputColumns(StrictModel):
    """What the new columns are called."""

    pseudo_label: str = Field("text", description="The teacher's hypothesis.")
    reference: str = Field("origin_text", description="The row's own text, verbatim, or null.")
    error_rate: str = Field(
        "cer/wer", description="Of the hypothesis; null where there is no text to compare with."
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "OutputColumns":
        names = [self.pseudo_label, self.reference, self.error_rate, *EVIDENCE]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two columns would share the name {', '.join(twice)}")
        return self


class Config(StrictModel):
    """run_pseudo_labelling.json."""

    output_dir: Path = Field(description="Folder that this run makes.")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue what is in output_dir; never: refuse if it has results."
    )
    teacher: ModelOptions
    data: ManifestData
    decoding: DecodingOptions = DecodingOptions()
    metric: Metric = Metric()
    output_columns: OutputColumns = OutputColumns()


def prepare(config: Config) -> tuple[ModelFolder, Manifest]:
    """Return the teacher's folder and the usable rows of the manifest."""
    folder = read_model_folder(config.teacher.path, config.teacher.processor, "teacher")
    folder.check_language(config.decoding.language, "decoding.language")
    data = config.data
    # The text column is meant to change hands; a reference that an earlier run kept is not.
    new_fields = {*config.output_columns.model_dump().values(), *EVIDENCE} - {data.columns.text}
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
    from simpler_distil_whisper.decoding import Transcriber
    from simpler_distil_whisper.devices import join_processes
    from simpler_distil_whisper.transcription import (
        load_for_decoding,
        transcribe_manifest,
    )

    folder, manifest = prepared
    state = join_processes()
    teacher = load_for_decoding(folder, config.teacher, state, run)
    transcriber = Transcriber(teacher, config.decoding)
    scorer = Scorer(config.metric)
    results = RowResults(run.folder, "pseudo_labels.jsonl")
    for done in transcribe_manifest(transcriber, manifest, config.data, results, run):
        labelled = [
            (utterance, labelled_row(utterance, hypothesis, scorer, config))
            for utterance, hypothesis in zip(done.batch.utterances, done.hypotheses, strict=True)
        ]
        results.append(labelled, done.batch.rejections)
    kept, rejected = results.finish(manifest.rejections, state.wait_for_everyone)
    labels = run.folder / "pseudo_labels.jsonl"
    if state.is_main_process:
        log_error_rates(labels, config.output_columns.error_rate)
    return (
        f"{labels}: {kept} rows; {run.folder / 'rejected.jsonl'}: {rejected} rows.\n"
        "Next: python create_student_model.py create_student_model.json"
    )


def labelled_row(
    utterance: Utterance, hypothesis: "Hypothesis", scorer: Scorer, config: Config
) -> Row:
    """Return the row with the hypothesis as its text; the error rate is of normalised copies."""
    row, columns = utterance.row, config.output_columns
    rate = None
    if utterance.text is not None:
        # The unit must not depend on what the model has taken the language for.
        language = utterance.language or config.decoding.language
        rate = scorer.count(utterance.text, hypothesis.text, language).rate
    # The labelled manifest lies in another folder than the one that relative paths began from.
    row[config.data.columns.audio] = str(utterance.audio)
    row[columns.pseudo_label] = hypothesis.text
    row[columns.reference] = utterance.text
    row[columns.error_rate] = None if rate is None else round(rate, 6)
    if config.data.columns.language and utterance.language is None:
        row[config.data.columns.language] = hypothesis.language
    return row | hypothesis.evidence()


def log_error_rates(labels: Path, column: str) -> None:
    """Say how many rows each threshold of run_distillation.json would keep."""
    with labels.open(encoding="utf-8") as file:
        rates = [json.loads(line)[column] for line in file]
    known = [rate for rate in rates if rate is not None]
    for threshold in (0.0, 0.05, 0.1, 0.2, 0.5):
        kept = sum(rate <= threshold for rate in known)
        log.info("data.max_error_rate %.2f keeps %d of %d rows", threshold, kept, len(rates))


if __name__ == "__main__":
    sys.exit(run_script("run_pseudo_labelling", __doc__, Config, prepare, work))
