"""Transcribe a manifest with any Whisper folder: the teacher, a student, a distilled model.

Writes `hypotheses.jsonl`: the rows of the manifest, in order and with all their fields, the
hypothesis and, where they are asked for, its segments; `rejected.jsonl`: every other row, with the
reason; `speed.json`.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.config import RunOptions, StrictModel
from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.data.manifest import Manifest, ManifestData, Utterance, read_manifest
from simpler_distil_whisper.data.results import RowResults
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions, ModelOptions
from simpler_distil_whisper.run import Run, run_script

if TYPE_CHECKING:
    from simpler_distil_whisper.decoding.transcriber import Hypothesis


class AssistantOptions(StrictModel):
    """A student that drafts for the model: the same greedy text, sooner at a batch size of 1."""

    path: Path | None = Field(
        None, description="Model folder of a student of this model; null: it decodes alone."
    )
    processor: Path | None = Field(
        None, description="Folder of tokenizer and feature extractor; null: the student's own."
    )


class OutputColumns(StrictModel):
    """What the new columns are called."""

    hypothesis: str = Field("hypothesis", description="What the model heard.")
    segments: str = Field(
        "segments",
        description="What was said when, with decoding.timestamps or a decoding.long_form: a list "
        "of start_seconds, end_seconds and text.",
    )


class Config(RunOptions):
    """offline_inference.json."""

    model: ModelOptions
    assistant: AssistantOptions = AssistantOptions()
    data: ManifestData
    decoding: DecodingOptions = DecodingOptions()
    output_columns: OutputColumns = OutputColumns()

    @property
    def new_columns(self) -> list[str]:
        """The columns that the hypotheses add to the rows."""
        columns = self.output_columns
        return [columns.hypothesis, *([columns.segments] if self.decoding.with_segments else [])]

    @model_validator(mode="after")
    def _drafts_are_for_greedy_decoding(self) -> "Config":
        greedy = self.decoding.num_beams == 1 and self.decoding.temperatures[0] == 0
        if self.assistant.path is not None and not greedy:
            raise ValueError(
                "assistant.path is of no use unless decoding.num_beams is 1 and the first of "
                "decoding.temperatures is 0"
            )
        return self


def prepare(config: Config) -> tuple[ModelFolder, ModelFolder | None, Manifest]:
    """Return the folders of the model and its assistant, and the usable rows of the manifest."""
    folder = read_model_folder(config.model.path, config.model.processor, "model")
    folder.check_language(config.decoding.language, "decoding.language")
    assistant, data = config.assistant, config.data
    assistant_folder = (
        read_model_folder(assistant.path, assistant.processor, "assistant")
        if assistant.path
        else None
    )
    manifest = read_manifest(
        data.manifest,
        data.columns,
        max_utterances=data.max_utterances,
        languages=folder.row_languages,
        new_fields=config.new_columns,
    )
    return folder, assistant_folder, manifest.check(data.max_bad_fraction)


def work(
    config: Config, prepared: tuple[ModelFolder, ModelFolder | None, Manifest], run: Run
) -> str:
    """Write `hypotheses.jsonl`, `rejected.jsonl` and `speed.json`."""
    from simpler_distil_whisper.decoding.speculative import Assistant
    from simpler_distil_whisper.decoding.transcriber import Transcriber
    from simpler_distil_whisper.decoding.transcription import (
        Speed,
        load_for_decoding,
        transcribe_manifest,
        warm_up,
    )
    from simpler_distil_whisper.model.devices import join_processes
    from simpler_distil_whisper.model.whisper import load_whisper

    folder, assistant_folder, manifest = prepared
    state = join_processes()
    whisper = load_for_decoding(folder, config.model, state, run)
    assistant = None
    if assistant_folder:
        options = config.model
        student = load_whisper(assistant_folder, options.dtype, options.attention, state.device)
        assistant = Assistant(student, whisper)
    transcriber = Transcriber(whisper, config.decoding, config.seed, assistant)
    warm_up(transcriber)
    results = RowResults(run.folder, "hypotheses.jsonl")
    speed = Speed()
    for done in transcribe_manifest(transcriber, manifest, config.data, results, run):
        speed.add(done)
        answered = [
            (utterance, answered_row(utterance, hypothesis, config))
            for utterance, hypothesis in zip(done.batch.utterances, done.hypotheses, strict=True)
        ]
        results.append(answered, done.batch.rejections)
    report = speed.report(transcriber) | {"model_bytes": folder.weight_bytes}
    if assistant:
        report |= assistant.report()
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
    if config.decoding.with_segments:
        row[config.output_columns.segments] = [asdict(segment) for segment in hypothesis.segments]
    return row


if __name__ == "__main__":
    sys.exit(run_script("offline_inference", __doc__, Config, prepare, work))
