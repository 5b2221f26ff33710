"""Whole manifests through the decoder: in fixed batches, shared between processes, resumable.

Owns the loop that labelling and inference have in common, the batches of a manifest, and what
happens when memory runs out or too many rows fail. What is done with a hypothesis is up to the
scripts.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache

from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.data.manifest import (
    Manifest,
    Rejection,
    Utterance,
    Utterances,
    refuse_vanished,
    reject,
)
from simpler_distil_whisper.data.options import DataLimits
from simpler_distil_whisper.data.results import RowResults
from simpler_distil_whisper.decoding.batches import (
    ByLength,
    SpeechBatch,
    SpeechReader,
    batches_within,
    groups_by_length,
    halved,
    joined,
    speech_batches,
    with_recordings_together,
)
from simpler_distil_whisper.decoding.hypothesis import Hypothesis, Segment, without_speech
from simpler_distil_whisper.decoding.long_form import transcribe_long
from simpler_distil_whisper.decoding.timed_segments import with_words
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.launch import is_main_process, process_count, process_rank
from simpler_distil_whisper.model.memory import Room, out_of_memory
from simpler_distil_whisper.model.processes import SharedSums, smallest_of_all, wait_for_everyone
from simpler_distil_whisper.model.teacher_cache import EncoderStateCache
from simpler_distil_whisper.progress import Progress
from simpler_distil_whisper.run import DataError, ProcessLost, Run, log
from simpler_distil_whisper.shards import WHOLE, Shard

BATCHES_OF_A_GROUP = 64  # whose rows are sorted by length together
MAX_BATCH_SECONDS = 7200.0  # the log-mel of an hour takes up to 200 megabytes
# On a GPU a step for many recordings takes hardly longer than for few, so several batches of them
# are decoded as one; larger batches would not do, since each worker holds two in memory.
RECORDINGS_AT_ONCE = 64
SECONDS_AT_ONCE = 8 * MAX_BATCH_SECONDS


@dataclass(frozen=True)
class TranscribedBatch:
    """One batch with its hypotheses.

    Attributes:
        utterances: those whose audio can be used.
        hypotheses: one for each of them.
        seconds: the length of each.
        compute_seconds: how long the model took for them, without audio decoding.
    """

    utterances: list[Utterance]
    hypotheses: list[Hypothesis]
    seconds: list[float]
    compute_seconds: float


def transcribe_manifest(
    transcriber: Transcriber,
    manifest: Manifest,
    data: DataLimits,
    results: RowResults,
    run: Run,
    cache: EncoderStateCache | None = None,
) -> Iterator[TranscribedBatch]:
    """Yield those batches without results that this process takes: a fast one takes more of them.

    Which utterances form a batch depends on the manifest and the batch size alone, so on a CPU
    neither a resumed run nor the number of processes or shards changes a single bit. The
    rejections are in the results when a batch is yielded; its hypotheses the caller has to append.

    Raises:
        ConfigError: the results were begun with another manifest.
        DataError: more than `data.max_bad_fraction` of the rows is unusable; or, in the end, the
            audio of some has vanished.
        Interrupted: a stop signal came; everything yielded before is in the results.
    """
    results.open_for(manifest)
    _check_rejections(manifest, results, data)
    _agree_on_batch_size(transcriber, results, run)
    shard = run.shards.own if run.shards else WHOLE
    sums = SharedSums()
    loaded_batches = _loaded_batches(transcriber, manifest, data, results, sums, shard, cache, run)
    decode = functools.partial(transcribe_batch, transcriber, cache)
    total = len(manifest.utterances) // shard.count
    done = int(results.done[manifest.utterances.numbers].sum())
    vanished: list[Rejection] = []
    with Progress("transcribing", "utterances", total, done) as progress:
        for loaded in loaded_batches:
            run.stop_if_asked()
            started = time.perf_counter()
            batch, hypotheses = decode_halving(decode, loaded, transcriber.room)
            seconds = time.perf_counter() - started
            results.append([], batch.rejections)
            yield TranscribedBatch(batch.utterances, hypotheses, batch.seconds, seconds)
            rows = sums.add("rows", len(batch.utterances) + len(batch.rejections))
            progress.advance(done + rows - progress.done)  # of all processes
            silent = sum(not batch.speech.get(row.number, True) for row in batch.utterances)
            sums.add("without speech", silent)
            if batch.rejections:
                new = [rejection for rejection in batch.rejections if rejection.vanished]
                vanished += new
                count = sums.add("vanished", len(new))
                _check_rejections(manifest, results, data, count, batch.rejections[-1].reason)
        run.stop_if_asked()
    if cache:
        cache.finish()
    wait_for_everyone()
    _refuse_vanished_anywhere(vanished)
    if transcriber.options.speech_filter and is_main_process():  # it keeps the sums, and ends first
        silent = sums.add("without speech", 0)
        log.info("%d rows without speech have an empty text (decoding.voice_activity)", silent)


def _loaded_batches(
    transcriber: Transcriber,
    manifest: Manifest,
    data: DataLimits,
    results: RowResults,
    sums: SharedSums,
    shard: Shard,
    cache: EncoderStateCache | None,
    run: Run,
) -> Iterator[SpeechBatch]:
    """Return this process's batches with their audio; on a GPU with many recordings in each."""
    batches = own_batches(
        manifest.utterances,
        transcriber.batch_size,
        results.done,
        data,
        sums,
        shard,
        results.lengths_folder,
    )
    read = SpeechReader(
        transcriber.whisper.feature_extractor,
        data,
        cache,
        decoding=transcriber.options,
        multilingual=bool(transcriber.whisper.tokens.languages),
    )
    loaded = speech_batches(batches, read, data.workers)
    on_gpu = transcriber.whisper.model.device.type == "cuda"
    if not on_gpu or transcriber.options.long_form != "sequential":
        return loaded
    most = min(RECORDINGS_AT_ONCE, transcriber.room.rows)
    return with_recordings_together(loaded, most, SECONDS_AT_ONCE, run.stop_if_asked)


def _agree_on_batch_size(transcriber: Transcriber, results: RowResults, run: Run) -> None:
    """Let every process form the batches that the run was begun with.

    With different sizes, rows would be skipped or transcribed twice. What "auto" chooses depends on
    the memory, which can differ between processes, and between a run and its continuation.
    """
    size = smallest_of_all(transcriber.batch_size)
    if is_main_process():
        size = results.begun_with("batch_size", size)
    [size] = broadcast_object_list([size])
    transcriber.batch_size, transcriber.room = size, Room(min(size, transcriber.room.rows))
    run.note(batch_size=size)


def end_of_shard(run: Run) -> str | None:
    """Return the closing words of a shard whose results another one merges.

    None: this job merges them now, or there are no shards. To be called in every process, when all
    of its rows are in the results.
    """
    if run.shards is None:
        return None
    wait_for_everyone()
    [words] = broadcast_object_list([run.shards.end() if is_main_process() else None])
    return cast("str | None", words)


def own_batches(
    utterances: Utterances,
    size: int,
    done: np.ndarray,
    data: DataLimits,
    sums: SharedSums,
    shard: Shard = WHOLE,
    lengths_folder: Path | None = None,
) -> Iterator[list[Utterance]]:
    """Yield batches that have no results yet, each of utterances of similar length.

    Each process takes the next batch of a group that no other one has taken, so that a slow one
    takes fewer. They begin with different groups, also those of other shards, whose headers they
    then need not read again, and end with what is left of all.

    Groups of consecutive rows are sorted by length, the longest first, and cut into batches: what
    does not fit into the memory is met early. A group is sorted only when its turn comes, so that
    no start waits for the headers of a million files.

    Args:
        utterances: of the manifest.
        size: of a batch.
        done: bool [rows of the manifest]: which rows have results.
        data: how many workers read headers ahead.
        sums: count how many batches of each group are taken.
        shard: whose batches are taken.
        lengths_folder: where the lengths that headers tell are kept; None: nowhere.
    """
    numbers = np.array(utterances.numbers)
    length = BATCHES_OF_A_GROUP * size
    starts = [
        start
        for start in range(0, len(utterances), length)
        if not done[numbers[start : start + length]].all()
    ]
    process = shard.index * process_count() + process_rank()
    first = len(starts) * process // (shard.count * process_count())
    starts = starts[first:] + starts[:first]
    groups = (utterances[start : start + length] for start in starts)
    by_length = groups_by_length(groups, data.workers, ByLength(lengths_folder))
    for start, group in zip(starts, by_length, strict=True):
        numbered = enumerate(batches_within(group, size, MAX_BATCH_SECONDS), start // size)
        batches = [batch for number, batch in numbered if shard.owns(number)]
        # The processes draw tickets from one counter, so each batch is taken once.
        while (ticket := sums.add(f"batches from {start}", 1) - 1) < len(batches):
            if not done[[utterance.number for utterance in batches[ticket]]].all():
                yield batches[ticket]


def transcribe_batch(
    transcriber: Transcriber, cache: EncoderStateCache | None, batch: SpeechBatch
) -> list[Hypothesis]:
    """Return one hypothesis for each utterance of a batch, short-form or long-form.

    Args:
        transcriber: of the model.
        cache: of its encoder's states, with which the batch was read; None: there is none.
        batch: not empty.
    """
    languages = [utterance.language for utterance in batch.utterances]
    keys = [utterance.number for utterance in batch.utterances]
    count = batch.short_form_count
    hypotheses = _transcribe_short(transcriber, cache, batch) if count else []
    if batch.recordings:
        hypotheses += transcribe_long(
            transcriber,
            batch.recordings,
            languages[count:],
            keys[count:],
            [batch.speech.get(number) for number in keys[count:]],
        )
    if transcriber.options.speech_filter:
        hypotheses = [
            hypothesis if batch.speech[number] else without_speech(hypothesis.language)
            for number, hypothesis in zip(keys, hypotheses, strict=True)
        ]
    if transcriber.options.with_segments or transcriber.aligner:
        return [
            _with_segments(hypothesis, seconds)
            for hypothesis, seconds in zip(hypotheses, batch.seconds, strict=True)
        ]
    return hypotheses


def _transcribe_short(
    transcriber: Transcriber, cache: EncoderStateCache | None, batch: SpeechBatch
) -> list[Hypothesis]:
    """Return one hypothesis for each utterance of a batch that fits into the window."""
    utterances = batch.utterances[: batch.short_form_count]
    seconds = batch.seconds[: batch.short_form_count]
    states = _encoder_states(batch, cache, transcriber, seconds)
    languages = [utterance.language for utterance in utterances]
    keys = [utterance.number for utterance in utterances]
    hypotheses = transcriber.from_encoder_states(states, languages, keys=keys)
    if transcriber.sampled_texts.count:
        hypotheses = transcriber.with_sampled_texts(states, hypotheses, keys)
    if transcriber.aligner:
        return with_words(transcriber.aligner, states, hypotheses, seconds)
    return hypotheses


def _with_segments(hypothesis: Hypothesis, seconds: float) -> Hypothesis:
    """Return the hypothesis with its segments; a text without timestamps is a single segment."""
    if hypothesis.segments or not hypothesis.text:
        return hypothesis
    return replace(hypothesis, segments=(Segment(0.0, seconds, hypothesis.text),))


def _encoder_states(
    batch: SpeechBatch,
    cache: EncoderStateCache | None,
    transcriber: Transcriber,
    seconds: Sequence[float],
) -> torch.Tensor:
    """Return float [U, E, D]: the states of utterances of so many seconds, as `encode` does.

    A cache keeps those of whole windows; those that it lacks are stored in it.
    """
    model = transcriber.whisper.model
    features = log_mel(batch.waveforms, transcriber.whisper.feature_extractor, model.device)
    if cache is None:
        return transcriber.encode(features, [transcriber.encoder_positions(s) for s in seconds])
    assert batch.cached is not None, "the reader has the cache too"
    assert transcriber.audio_context is None, "the cache keeps the states of whole windows"
    states = cache.complete(batch.cached.to(model.device), features, model.model.encoder)
    return states.to(model.dtype)


def decode_halving(
    decode: Callable[[SpeechBatch], list[Hypothesis]], batch: SpeechBatch, room: Room
) -> tuple[SpeechBatch, list[Hypothesis]]:
    """Return the batch with one hypothesis per utterance, decoded in halves if memory runs out.

    An utterance for which memory runs out even alone is among the rejections of the returned batch.

    Args:
        decode: decodes a batch; recordings `room.rows` windows at a time.
        batch: some utterances.
        room: what has fitted before; what does not fit now is not tried again.
    """
    count, windows = len(batch.utterances), batch.short_form_count
    if not count:
        return batch, []
    reason = None
    if windows <= room.rows:
        try:
            hypotheses = decode(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        else:
            room.has_fitted(windows or room.rows)
            return batch, hypotheses
        # The error is gone now, and with it the tensors of the attempt, which its traceback held.
        clear_device_cache()
        _warn_of_halving(count)
        if windows in (0, count):  # else either the clips or the recordings took the memory
            tried = windows or room.rows
            room.has_not_fitted(tried)
            if not windows and tried > 1:  # the same recordings, fewer windows at a time
                return decode_halving(decode, batch, room)
    if count == 1:
        why = f"out of memory even in a batch of its own: {reason}"
        rejections = [*batch.rejections, reject(batch.utterances[0], why)]
        return SpeechBatch([], [], [], rejections), []
    done = [decode_halving(decode, half, room) for half in halved(batch)]
    hypotheses = [hypothesis for _, part in done for hypothesis in part]
    return joined([half for half, _ in done]), hypotheses


@functools.cache
def _warn_of_halving(batch_size: int) -> None:
    """Warn, once for each size."""
    log.warning(
        "A batch of %d did not fit into the memory: it is decoded in halves, and so are later "
        "ones; a smaller decoding.batch_size, in a new output_dir, would save the attempt.",
        batch_size,
    )


def _refuse_vanished_anywhere(vanished: list[Rejection]) -> None:
    """Raise DataError in each process if audio of one of them has vanished; results are kept."""
    if smallest_of_all(-len(vanished)):
        refuse_vanished(vanished)
        raise ProcessLost("Another process misses audio that has vanished: see its message.")


def _check_rejections(
    manifest: Manifest,
    results: RowResults,
    data: DataLimits,
    vanished: int = 0,
    last_reason: str | None = None,
) -> None:
    """Raise DataError if all processes together have rejected more rows than the config allows."""
    bad = len(manifest.rejections) + results.rejected_so_far() + vanished
    if bad > data.max_bad_fraction * manifest.row_count:
        example = f" The last: {last_reason}" if last_reason else ""
        raise DataError(
            f"{bad} of {manifest.row_count} rows are unusable, data.max_bad_fraction is "
            f"{data.max_bad_fraction:g}; the reasons are in {results.rejected_parts}.{example}"
        )
