"""Transcribe a manifest with any Whisper folder: the teacher, a student, a distilled model.

Writes `hypotheses.jsonl`: the rows of the manifest, in order and with all their fields, with the
hypothesis and, if the config asks for them, its segments; `rejected.jsonl`: every other row, with
the reason; `speed.json`; for each row the subtitles that the config names, in `subtitles/`.
"""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from simpler_distil_whisper.config import RunOptions, StrictModel
from simpler_distil_whisper.data.audio import audio_seconds
from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.data.manifest import (
    Manifest,
    Utterance,
    clip_of,
    read_manifest,
    still_readable,
)
from simpler_distil_whisper.data.options import ManifestData
from simpler_distil_whisper.data.results import RowResults
from simpler_distil_whisper.decoding.hypothesis import Hypothesis, Segment
from simpler_distil_whisper.decoding.speed import (
    SPEED,
    Speed,
    SpeedReport,
    speed_of_shards,
    write_speed,
)
from simpler_distil_whisper.decoding.subtitles import SubtitleFormat, write_subtitles
from simpler_distil_whisper.launch import is_main_process
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder
from simpler_distil_whisper.model.options import (
    AssistantOptions,
    InferenceDecodingOptions,
    ModelOptions,
)
from simpler_distil_whisper.run import Run
from simpler_distil_whisper.script import run_script

if TYPE_CHECKING:
    import torch

HYPOTHESES = "hypotheses.jsonl"

Prepared = tuple[ModelFolder, ModelFolder | None, Manifest]


class OutputColumns(StrictModel):
    """What the new columns are called."""

    hypothesis: str = Field("hypothesis", description="The model's text.")
    segments: str = Field(
        "segments",
        description="With decoding.timestamps, word_timestamps or long_form: a list of "
        "start_seconds, end_seconds, text and, if they are timed, words.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "OutputColumns":
        if self.hypothesis == self.segments:
            raise ValueError(f"two columns would share the name {self.segments}")
        return self


class Config(RunOptions):
    """offline_inference.json."""

    model: ModelOptions
    assistant: AssistantOptions = AssistantOptions()
    data: ManifestData
    decoding: InferenceDecodingOptions = InferenceDecodingOptions()
    output_columns: OutputColumns = OutputColumns()
    subtitles: list[SubtitleFormat] = Field(
        [], description="Files to write for each row, in the folder subtitles: srt, vtt."
    )

    @model_validator(mode="after")
    def _subtitles_need_times(self) -> "Config":
        if self.subtitles and not (self.decoding.timestamps or self.decoding.word_timestamps):
            raise ValueError(
                "subtitles need times: set decoding.timestamps or decoding.word_timestamps to true"
            )
        return self

    @model_validator(mode="after")
    def _assistant_needs_greedy_decoding(self) -> "Config":
        greedy = self.decoding.num_beams == 1 and self.decoding.temperatures[0] == 0
        if self.assistant.path is not None and not greedy:
            raise ValueError(
                "assistant.path is of no use unless decoding.num_beams is 1 and the first of "
                "decoding.temperatures is 0"
            )
        return self


def prepare(config: Config) -> Prepared:
    """Return the folders of the model and its assistant, and the usable rows of the manifest."""
    folder = read_model_folder(config.model.path, config.model.processor, "model")
    folder.check_language_and_task(config.decoding.language, config.decoding.task, "decoding")
    assistant, data, columns = config.assistant, config.data, config.output_columns
    assistant_folder = None
    if assistant.path:
        assistant_folder = read_model_folder(assistant.path, assistant.processor, "assistant")
        assistant_folder.check_copy_of(folder, "assistant")
    new_fields = [columns.hypothesis]
    if config.decoding.with_segments:
        new_fields.append(columns.segments)
    manifest = read_manifest(
        data.manifest,
        data.columns,
        max_utterances=data.max_utterances,
        channel=data.channel,
        languages=folder.row_languages,
        new_fields=new_fields,
    )
    return folder, assistant_folder, manifest.check(data.max_bad_fraction, count_texts=True)


def work(config: Config, prepared: Prepared, run: Run) -> str:
    """Write `hypotheses.jsonl`, `rejected.jsonl`, `speed.json` and the subtitles."""
    from simpler_distil_whisper.decoding.transcription import end_of_shard
    from simpler_distil_whisper.model.processes import join_processes, wait_for_everyone

    device = join_processes()
    results = RowResults(run.folder, HYPOTHESES, run.shards)
    report = transcribe_rows(config, prepared, device, results, run)
    if closing_words := end_of_shard(run):
        return closing_words
    _, _, manifest = prepared
    written, rejected = results.finish(manifest.rejections, wait_for_everyone)
    if is_main_process():
        if run.shards:
            report = speed_of_shards(run.shards.folders, report)
            write_speed(run.folder, report, {})
        if config.subtitles:
            subtitle_rows(config, run)
    return (
        f"{run.folder / HYPOTHESES}: {written} rows; "
        f"{run.folder / 'rejected.jsonl'}: {rejected} rows.\n"
        f"{report.rtfx or '?'} times faster than real time. Next: python eval.py eval.json"
    )


def transcribe_rows(
    config: Config, prepared: Prepared, device: "torch.device", results: RowResults, run: Run
) -> SpeedReport:
    """Transcribe what has no results yet, write how fast that was, and return it."""
    from simpler_distil_whisper.decoding.loading import load_transcriber, speed_report
    from simpler_distil_whisper.decoding.transcription import transcribe_manifest
    from simpler_distil_whisper.model.processes import wait_for_everyone

    folder, assistant_folder, manifest = prepared
    transcriber = load_transcriber(
        folder, assistant_folder, config.model, config.decoding, config.seed, device, run
    )
    speed = Speed()
    for done in transcribe_manifest(transcriber, manifest, config.data, results, run):
        tokens = [hypothesis.token_count for hypothesis in done.hypotheses]
        speed.add(done.seconds, done.compute_seconds, tokens)
        rows = [
            (decoded[0], result_row(*decoded, config))
            for decoded in zip(done.utterances, done.hypotheses, done.seconds, strict=True)
        ]
        results.append(rows)
    wait_for_everyone()
    report = speed_report(speed, transcriber, folder)
    drafts = transcriber.assistant.report() if transcriber.assistant else {}
    speed_file = run.own_folder / SPEED
    if is_main_process() and (report.utterances or not speed_file.exists()):
        write_speed(run.own_folder, report, drafts)
    return report


def subtitle_rows(config: Config, run: Run) -> None:
    """Write the subtitles of all rows.

    Raises:
        DataError: audio that was transcribed cannot be read any more.
    """
    columns = config.data.columns

    def seconds_of(row: Row) -> float:
        path = row[columns.audio]
        with still_readable(path, "transcribed"):
            return audio_seconds(*clip_of(row, path, columns))

    write_subtitles(
        run.folder / HYPOTHESES,
        config.subtitles,
        columns.id,
        config.output_columns.segments,
        seconds_of,
        run.stop_if_asked,
    )


def result_row(utterance: Utterance, hypothesis: Hypothesis, seconds: float, config: Config) -> Row:
    """Return the row with the hypothesis, and with a path that holds from the working directory.

    Args:
        utterance: the row of the manifest.
        hypothesis: the model's.
        seconds: length of the audio.
        config: names the columns.
    """
    row, columns = utterance.row, config.output_columns
    row[config.data.columns.audio] = str(utterance.audio)
    if config.data.columns.language and utterance.language is None:
        row[config.data.columns.language] = hypothesis.language
    row[columns.hypothesis] = hypothesis.text.strip()
    if config.decoding.with_segments:
        row[columns.segments] = [segment_row(segment, seconds) for segment in hypothesis.segments]
    return row


def segment_row(segment: Segment, seconds: float) -> Row:
    """Return a segment as it is written: none of its times is behind the end of the audio.

    Models put the end of the last one some tenths of a second too late, into the padding.
    """
    row: Row = asdict(segment)
    for timed in (row, *row.get("words", ())):
        for key in ("start_seconds", "end_seconds", "start", "end"):
            if timed.get(key) is not None:
                timed[key] = min(timed[key], seconds)
    return row


if __name__ == "__main__":
    sys.exit(run_script("offline_inference", __doc__, Config, prepare, work))
