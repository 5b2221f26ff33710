"""Transcribe a manifest with any Whisper folder: the teacher, a student, a distilled model.

Writes `hypotheses.jsonl`: the rows of the manifest, in order and with all their fields, and the
hypothesis; `rejected.jsonl`: every other row, with the reason; `speed.json`.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.jsonl import Row
from simpler_distil_whisper.manifest import (
    Manifest,
    ManifestData,
    RowResults,
    Utterance,
    read_manifest,
)
from simpler_distil_whisper.model_folder import ModelFolder, read_model_folder
from simpler_distil_whisper.options import DecodingOptions, ModelOptions
from simpler_distil_whisper.run import Run, run_script, write_atomically

if TYPE_CHECKING:
    from simpler_distil_whisper.decoding import Hypothesis


class OutputColumns(StrictModel):
    """What the new column is called."""

    hypothesis: str = Field("hypothesis", description="What the model heard.")


class Config(StrictModel):
    """offline_inference.json."""

    output_dir: Path = Field(description="Folder that this run makes.")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue what is in output_dir; never: refuse if it has results."
    )
    model: ModelOptions
    data: ManifestData
    decoding: DecodingOptions = DecodingOptions()
    output_columns: OutputColumns = OutputColumns()


def prepare(config: Config) -> tuple[ModelFolder, Manifest]:
    """Return the model's folder and the usable rows of the manifest."""
    folder = read_model_folder(config.model.path, config.model.processor, "model")
    folder.check_language(config.decoding.language, "decoding.language")
    data = config.data
    manifest = read_manifest(
        data.manifest,
        data.columns,
        max_utterances=data.max_utterances,
        languages=folder.row_languages,
        new_fields={config.output_columns.hypothesis},
    )
    return folder, manifest.check(data.max_bad_fraction)


def work(config: Config, prepared: tuple[ModelFolder, Manifest], run: Run) -> str:
    """Write `hypotheses.jsonl`, `rejected.jsonl` and `speed.json`."""
    from simpler_distil_whisper.decoding import Transcriber
    from simpler_distil_whisper.devices import join_processes
    from simpler_distil_whisper.transcription import (
        Speed,
        load_for_decoding,
        transcribe_manifest,
    )

    folder, manifest = prepared
    state = join_processes()
    whisper = load_for_decoding(folder, config.model, state, run)
    transcriber = Transcriber(whisper, config.decoding)
    transcriber.warm_up()
    results = RowResults(run.folder, "hypotheses.jsonl")
    speed = Speed()
    for done in transcribe_manifest(transcriber, manifest, config.data, results, run):
        speed.add(done)
        answered = [
            (utterance, answered_row(utterance, hypothesis, config))
            for utterance, hypothesis in zip(done.batch.utterances, done.hypotheses, strict=True)
        ]
        results.append(answered, done.batch.rejections)
    report = speed.report(transcriber)
    written, rejected = results.finish(manifest.rejections, state.wait_for_everyone)
    hypotheses = run.folder / "hypotheses.jsonl"
    if state.is_main_process:
        text = json.dumps(report, indent=2)
        write_atomically(run.folder / "speed.json", text.encode())
    return (
        f"{hypotheses}: {written} rows; {run.folder / 'rejected.jsonl'}: {rejected} rows.\n"
        f"{report['rtfx'] or '?'} times faster than real time. Next: python eval.py eval.json"
    )


def answered_row(utterance: Utterance, hypothesis: "Hypothesis", config: Config) -> Row:
    """Return the row with the hypothesis, and its audio's path as it holds from this folder."""
    row = utterance.row
    row[config.data.columns.audio] = str(utterance.audio)
    if config.data.columns.language and utterance.language is None:
        row[config.data.columns.language] = hypothesis.language
    row[config.output_columns.hypothesis] = hypothesis.text.strip()
    return row


if __name__ == "__main__":
    sys.exit(run_script("offline_inference", __doc__, Config, prepare, work))
