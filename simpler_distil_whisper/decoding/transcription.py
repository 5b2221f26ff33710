"""A whole manifest through the decoder: in fixed batches, shared between processes, resumable.

Owns the road from manifest to hypotheses that labelling and inference have in common, and what
happens on it when memory does not suffice or too many rows fail; what becomes of a hypothesis is
theirs. Called by these two scripts.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache

from simpler_distil_whisper.data.manifest import DataLimits, Manifest, Utterance, Utterances, reject
from simpler_distil_whisper.data.results import RowResults
from simpler_distil_whisper.decoding.batches import (
    SpeechBatch,
    SpeechReader,
    batches_of,
    halved,
    joined,
    speech_batches,
    windows_by_length,
)
from simpler_distil_whisper.decoding.long_form import transcribe_long
from simpler_distil_whisper.decoding.transcriber import Hypothesis, Segment, Transcriber
from simpler_distil_whisper.model.devices import (
    decoding_dtype,
    leave_a_core_to_audio,
    out_of_memory,
    peak_memory_megabytes,
)
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.options import ModelOptions
from simpler_distil_whisper.model.teacher_cache import EncoderStateCache
from simpler_distil_whisper.model.whisper import Whisper, load_whisper, quieten_libraries
from simpler_distil_whisper.run import DataError, Progress, Run, log, process_count, process_rank

BATCHES_IN_A_WINDOW = 64  # whose rows are sorted by length together
SECONDS_IN_A_BATCH = 7200.0  # at most; the log-mel of an hour is up to 200 megabytes


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
            "batch_size": transcriber.batch_size,
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
    dtype = decoding_dtype(options.dtype, state.device)
    whisper = load_whisper(folder, dtype, options.attention, state.device)
    chosen = {
        "device": str(state.device),
        "dtype": str(whisper.model.dtype).removeprefix("torch."),
        "attention": whisper.model.config._attn_implementation,
        "torch_threads": torch.get_num_threads(),
    }
    log.info("%s", ", ".join(f"{name} {value}" for name, value in chosen.items()))
    run.note(**chosen)
    return whisper


def warm_up(transcriber: Transcriber) -> None:
    """Transcribe a batch of silence; if it does not fit into memory, no batch of rows will either.

    But theirs are decoded in halves then.
    """
    try:
        transcriber.warm_up()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    clear_device_cache()


def transcribe_manifest(
    transcriber: Transcriber,
    manifest: Manifest,
    data: DataLimits,
    results: RowResults,
    run: Run,
    cache: EncoderStateCache | None = None,
) -> Iterator[Transcribed]:
    """Yield this process's share of the batches that have no results yet.

    Which utterances form a batch depends on the manifest and the batch size alone, so neither a
    resumed run nor the number of processes changes a single bit of what is computed. The caller
    keeps each batch in the results before it asks for the next.

    Raises:
        ConfigError: the results were begun with another manifest.
        DataError: more than `data.max_bad_fraction` of the rows has turned out unusable.
        Interrupted: a stop signal came; everything yielded before is in the results.
    """
    results.open_for(manifest)
    _stop_if_hopeless(manifest, results, data)
    batches = own_batches(manifest.utterances, transcriber.batch_size, results.done, data)
    read = SpeechReader(
        transcriber.whisper.feature_extractor,
        data,
        cache,
        long_form=transcriber.options.long_form != "reject",
    )
    decode = functools.partial(_transcribe, transcriber, cache)
    # Each process shows the progress of its share, which is as large as those of the others.
    total = len(manifest.utterances) // process_count()
    done = int(results.done[manifest.utterances.numbers].sum()) // process_count()
    with Progress("transcribing", "utterances", total, done) as progress:
        for loaded in speech_batches(batches, read, data.num_workers):
            run.stop_if_asked()
            started = time.perf_counter()
            batch, hypotheses = decode_halving(decode, loaded)
            yield Transcribed(batch, hypotheses, time.perf_counter() - started)
            progress.advance(len(batch.utterances) + len(batch.rejections))
            if batch.rejections:
                _stop_if_hopeless(manifest, results, data, batch.rejections[-1].reason)
        run.stop_if_asked()


def own_batches(
    utterances: Utterances, size: int, done: np.ndarray, data: DataLimits
) -> Iterator[list[Utterance]]:
    """Yield this process's batches that have no results yet, each of utterances of similar length.

    They are cut from windows of consecutive rows that are sorted by length, the longest first: what
    does not fit into the memory is met early. A window is formed only when its turn comes, so that
    no start waits for the headers of a million files.

    Args:
        utterances: of the manifest.
        size: of a batch.
        done: bool [rows of the manifest]: which rows have results.
        data: how many workers read headers ahead.
    """
    numbers = np.array(utterances.numbers)
    length = BATCHES_IN_A_WINDOW * size
    starts = [
        start
        for start in range(0, len(utterances), length)
        if not done[numbers[start : start + length]].all()
    ]
    windows = (utterances[start : start + length] for start in starts)
    by_length = windows_by_length(windows, data.num_workers)
    for start, window in zip(starts, by_length, strict=True):
        batches = batches_of(window, size, SECONDS_IN_A_BATCH)
        for number, batch in enumerate(batches, start // size):
            own = number % process_count() == process_rank()
            if own and not done[[utterance.number for utterance in batch]].all():
                yield batch


def _transcribe(
    transcriber: Transcriber, cache: EncoderStateCache | None, batch: SpeechBatch
) -> list[Hypothesis]:
    languages = [utterance.language for utterance in batch.utterances]
    keys = [utterance.number for utterance in batch.utterances]
    count = batch.in_window
    hypotheses: list[Hypothesis] = []
    if cache and count:
        states = _encoder_states(batch, cache, transcriber)
        hypotheses = transcriber.from_encoder_states(states, languages[:count], keys=keys[:count])
    elif batch.input_features is not None:
        hypotheses = transcriber(batch.input_features, languages[:count], keys[:count])
    if batch.recordings:
        hypotheses += transcribe_long(
            transcriber, batch.recordings, languages[count:], keys[count:]
        )
    if transcriber.options.with_segments:
        hypotheses = [
            h if h.segments or not h.text else replace(h, segments=(Segment(0.0, seconds, h.text),))
            for h, seconds in zip(hypotheses, batch.seconds, strict=True)
        ]
    return hypotheses


def _encoder_states(
    batch: SpeechBatch, cache: EncoderStateCache, transcriber: Transcriber
) -> torch.Tensor:
    """Return float [B, E, D]: all encoder states, having computed and kept the missing ones."""
    model, features = transcriber.whisper.model, batch.input_features
    assert batch.cached is not None, "the reader has the cache too"
    wanted = torch.empty(0) if features is None else features
    states = cache.complete(
        batch.cached.to(model.device), wanted.to(model.device), model.model.encoder
    )
    return states.to(model.dtype)


def decode_halving(
    decode: Callable[[SpeechBatch], list[Hypothesis]], batch: SpeechBatch
) -> tuple[SpeechBatch, list[Hypothesis]]:
    """Return the batch with one hypothesis per utterance, decoded in halves if memory runs out.

    An utterance that runs out of memory even alone is among the rejections of the returned batch.
    """
    if not batch.utterances:
        return batch, []
    try:
        return batch, decode(batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    # Here the error is gone, and with it the tensors of the attempt, which its traceback held.
    clear_device_cache()
    if len(batch.utterances) == 1:
        why = f"out of memory even in a batch of its own: {reason}"
        rejections = [*batch.rejections, reject(batch.utterances[0], why)]
        return SpeechBatch([], None, [], rejections), []
    _say_once_that_memory_ran_out(len(batch.utterances))
    done = [decode_halving(decode, half) for half in halved(batch)]
    return joined([half for half, _ in done]), [each for _, found in done for each in found]


@functools.cache
def _say_once_that_memory_ran_out(batch_size: int) -> None:
    log.warning(
        "A batch of %d did not fit into the memory: it is decoded in halves, as others like it "
        "will be; a smaller decoding.batch_size would save these attempts.",
        batch_size,
    )


def _stop_if_hopeless(
    manifest: Manifest, results: RowResults, data: DataLimits, last_reason: str | None = None
) -> None:
    """Raise DataError if all processes together have rejected more rows than the config allows."""
    bad = len(manifest.rejections) + results.rejected_so_far()
    if bad > data.max_bad_fraction * manifest.row_count:
        example = f" The last: {last_reason}" if last_reason else ""
        raise DataError(
            f"{bad} of {manifest.row_count} rows are unusable, data.max_bad_fraction is "
            f"{data.max_bad_fraction:g}; the reasons are in {results.rejected_parts}.{example}"
        )
