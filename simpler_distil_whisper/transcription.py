"""A whole manifest through the decoder: in fixed batches, shared between processes, resumable.

Owns the road from manifest to hypotheses that labelling and inference have in common; what becomes
of a hypothesis is theirs. Called by these two scripts.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from simpler_distil_whisper.batches import (
    SpeechBatch,
    SpeechDataset,
    in_batches,
    load_ahead,
)
from simpler_distil_whisper.decoding import Hypothesis, Transcriber
from simpler_distil_whisper.devices import leave_a_core_to_audio, peak_memory_megabytes
from simpler_distil_whisper.manifest import DataLimits, Manifest, RowResults
from simpler_distil_whisper.model_folder import ModelFolder
from simpler_distil_whisper.options import ModelOptions
from simpler_distil_whisper.run import DataError, Progress, Run, log, process_count, process_rank
from simpler_distil_whisper.whisper import Whisper, load_whisper, quieten_libraries


@dataclass(frozen=True)
class Transcribed:
    """One batch with its hypotheses.

    Attributes:
        batch: the utterances, and those of them whose audio could not be used.
        hypotheses: one per utterance of the batch.
        compute_seconds: what the model took for them, without audio decoding.
    """

    batch: SpeechBatch
    hypotheses: list[Hypothesis]
    compute_seconds: float


@dataclass
class Speed:
    """Sums over what one process has transcribed."""

    utterances: int = 0
    audio_seconds: float = 0.0
    compute_seconds: float = 0.0
    tokens: int = 0

    def add(self, done: Transcribed) -> None:
        """Count one batch."""
        self.utterances += len(done.hypotheses)
        self.audio_seconds += sum(done.batch.seconds)
        self.compute_seconds += done.compute_seconds
        self.tokens += sum(hypothesis.tokens for hypothesis in done.hypotheses)

    def report(self, transcriber: Transcriber) -> dict[str, object]:
        """Return the speed of all processes together; call it in every one of them.

        `rtfx` is seconds of audio per second of computing, the inverse of the real-time factor;
        audio decoding runs beside it and is not in it.
        """
        everyone: list[Speed] = gather_object([self])
        audio = sum(speed.audio_seconds for speed in everyone)
        # Processes work side by side: the slowest one decides.
        compute = max(speed.compute_seconds for speed in everyone)
        tokens = sum(speed.tokens for speed in everyone)
        model = transcriber.whisper.model
        return {
            "rtfx": round(audio / compute, 2) if compute else None,
            "tokens_per_second": round(tokens / compute, 1) if compute else None,
            "audio_seconds": round(audio, 3),
            "compute_seconds": round(compute, 3),
            "utterances": sum(speed.utterances for speed in everyone),
            "tokens": tokens,
            "batch_size": transcriber.options.batch_size,
            "processes": len(everyone),
            "parameters": model.num_parameters(),
            "peak_memory_megabytes": peak_memory_megabytes(model.device),
        }


def load_for_decoding(
    folder: ModelFolder, options: ModelOptions, state: PartialState, run: Run
) -> Whisper:
    """Return the model of a folder on this process's device, and note what "auto" has chosen."""
    quieten_libraries()
    leave_a_core_to_audio()
    whisper = load_whisper(folder, options.dtype, options.attention, state.device)
    chosen = {
        "device": str(state.device),
        "dtype": str(whisper.model.dtype).removeprefix("torch."),
        "attention": whisper.model.config._attn_implementation,
        "torch_threads": torch.get_num_threads(),
    }
    log.info("%s", ", ".join(f"{name} {value}" for name, value in chosen.items()))
    run.note(**chosen)
    return whisper


def transcribe_manifest(
    transcriber: Transcriber,
    manifest: Manifest,
    data: DataLimits,
    results: RowResults,
    run: Run,
) -> Iterator[Transcribed]:
    """Yield this process's share of the batches that have no results yet.

    Which utterances form a batch depends on the manifest and the batch size alone, so neither a
    resumed run nor the number of processes changes a single bit of what is computed.

    Raises:
        ConfigError: the results were begun with another manifest.
        DataError: more than `data.max_bad_fraction` of the rows has turned out unusable.
        Interrupted: a stop signal came; everything yielded before is in the results.
    """
    results.belong_to(manifest)
    batches = list(in_batches(manifest.utterances, transcriber.options.batch_size))
    own = batches[process_rank() :: process_count()]
    todo = [batch for batch in own if not {u.number for u in batch} <= results.done]
    dataset = SpeechDataset(todo, transcriber.whisper.feature_extractor, data)
    bad = len(manifest.rejections) + results.rejected_before
    total, left = sum(map(len, own)), sum(map(len, todo))
    with Progress("transcribing", "utterances", total, total - left) as progress:
        for batch in load_ahead(dataset, data.num_workers):
            run.stop_if_asked()
            started = time.perf_counter()
            hypotheses = _transcribe(transcriber, batch)
            yield Transcribed(batch, hypotheses, time.perf_counter() - started)
            progress.advance(len(batch.utterances) + len(batch.rejections))
            bad += len(batch.rejections)
            _stop_if_hopeless(bad, manifest, data, batch)
        run.stop_if_asked()


def _transcribe(transcriber: Transcriber, batch: SpeechBatch) -> list[Hypothesis]:
    if batch.input_features is None:
        return []
    return transcriber(batch.input_features, [u.language for u in batch.utterances])


def _stop_if_hopeless(bad: int, manifest: Manifest, data: DataLimits, batch: SpeechBatch) -> None:
    if batch.rejections and bad > data.max_bad_fraction * manifest.row_count:
        raise DataError(
            f"{bad} of {manifest.row_count} rows are unusable, data.max_bad_fraction is "
            f"{data.max_bad_fraction:g}. The last: {batch.rejections[-1].reason}"
        )
