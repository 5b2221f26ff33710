"""Utterances -> batches of waveforms, read in worker processes ahead of the model.

Owns the reading of audio for decoding, the order by length, and the rejection of audio that cannot
be used. It builds no token sequences and runs no model. `data/features.py` explains the letters of
tensor shapes.
"""

import contextlib
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor
from transformers import WhisperFeatureExtractor

from simpler_distil_whisper.data.audio import (
    SAMPLE_RATE,
    AudioError,
    audio_seconds,
    check_length,
    load_audio,
)
from simpler_distil_whisper.data.features import long_log_mel
from simpler_distil_whisper.data.manifest import Rejection, Utterance, reject, reject_audio
from simpler_distil_whisper.data.options import DataLimits
from simpler_distil_whisper.data.results import LENGTHS
from simpler_distil_whisper.data.speech_activity import SpeechSpan, muted, speech_spans
from simpler_distil_whisper.data.workers import WorkerDeath, map_ahead
from simpler_distil_whisper.files import read_files
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.teacher_cache import (
    CachedEncoderStates,
    EncoderStateCache,
    joined_states,
)
from simpler_distil_whisper.run import log

Item = TypeVar("Item")


@dataclass(frozen=True)
class SpeechBatch:
    """Some utterances of a manifest, and their audio.

    Attributes:
        utterances: those whose audio can be used: first the short-form ones, then the long-form
            ones, which are longer than the model's window.
        waveforms: float32 [S] each: of the short-form utterances, with a cache only of the missing
            ones.
        seconds: length of each utterance.
        rejections: the utterances whose audio cannot be used.
        recordings: float32 [M, F] each: log-mels of the long-form utterances.
        cached: what the cache has of the short-form utterances' encoder states; None: no cache.
        speech: where somebody speaks, by the number of the utterance, if it was looked for.
    """

    utterances: list[Utterance]
    waveforms: list[np.ndarray]
    seconds: list[float]
    rejections: list[Rejection]
    recordings: list[Tensor] = field(default_factory=list)
    cached: CachedEncoderStates | None = None
    speech: dict[int, list[SpeechSpan]] = field(default_factory=dict)

    @property
    def short_form_count(self) -> int:
        """The number of utterances that are not longer than the model's window."""
        return len(self.utterances) - len(self.recordings)


class SpeechReader:
    """Turns utterances into batches: decodes their audio.

    The log-mels of long-form utterances are computed here too, those of others by the model's
    device.
    """

    def __init__(
        self,
        extractor: WhisperFeatureExtractor,
        limits: DataLimits,
        cache: EncoderStateCache | None = None,
        *,
        decoding: DecodingOptions | None = None,
        multilingual: bool = True,
    ) -> None:
        """Set which lengths are used; nothing is read yet.

        Args:
            extractor: the feature extractor of the model.
            limits: which lengths are used.
            cache: is asked for encoder states first.
            decoding: whether audio longer than the model's window is used, and in which audio
                speech is looked for; None: neither.
            multilingual: whether the model detects the language of recordings that name none: in
                the window that begins with the first speech, which has to be known then.
        """
        self.extractor, self.cache = extractor, cache
        self.min_seconds = limits.min_duration_seconds
        self.window = float(extractor.chunk_length)
        decoding = decoding or DecodingOptions()
        self.voice_activity = decoding.speech_filter
        self.detects_language = multilingual and decoding.language is None
        # The extractor would silently cut what is longer than the model's window.
        longest = self.window if decoding.long_form == "reject" else math.inf
        self.max_seconds = min(limits.max_duration_seconds or longest, longest)

    def __call__(self, utterances: Sequence[Utterance]) -> SpeechBatch:
        """Return one batch; audio that cannot be used is in its `rejections`, with the reason."""
        if self.max_seconds <= self.window:
            return self._read_short_form(utterances)
        short_form, long_form = list[Utterance](), list[Utterance]()
        for utterance in utterances:
            if self._is_long_form(utterance):
                long_form.append(utterance)
            else:
                short_form.append(utterance)
        return joined([self._read_short_form(short_form), self._read_long_form(long_form)])

    def _is_long_form(self, utterance: Utterance) -> bool:
        try:
            return audio_seconds(*utterance.clip) > self.window
        except AudioError:  # decoding it will fail too, and give the reason
            return False

    def _read_long_form(self, utterances: Sequence[Utterance]) -> SpeechBatch:
        """Return a batch of utterances longer than the window."""
        batch = SpeechBatch([], [], [], [])
        for utterance in utterances:
            try:
                waveform = self._load(utterance)
                if self.voice_activity or (self.detects_language and not utterance.language):
                    spans = speech_spans(waveform, self.voice_activity)
                    batch.speech[utterance.number] = spans
                    if self.voice_activity:
                        waveform = muted(waveform, spans)
                batch.recordings.append(long_log_mel(waveform, self.extractor))
            except (AudioError, MemoryError) as error:
                batch.rejections.append(reject_audio(utterance, error))
            else:
                batch.utterances.append(utterance)
                batch.seconds.append(len(waveform) / SAMPLE_RATE)
        return batch

    def _read_short_form(self, utterances: Sequence[Utterance]) -> SpeechBatch:
        """Return a batch of utterances no longer than the window."""
        waveforms: list[np.ndarray] = []
        seconds, used, rejections = [], [], []
        cached = self.cache.look_up(utterances) if self.cache else None
        speech: dict[int, list[SpeechSpan]] = {}
        for row, utterance in enumerate(utterances):
            try:
                # With a cache the length is the header's, for hits and misses alike: a resumed
                # run, for which more rows are hits, must write the same numbers.
                if cached:
                    length = audio_seconds(*utterance.clip)
                    check_length(length, self.min_seconds, self.max_seconds)
                is_missing = cached is None or row in cached.missing
                if is_missing or self.voice_activity:
                    waveform = self._load(utterance)
                if self.voice_activity:
                    speech[utterance.number] = speech_spans(waveform, self.voice_activity)
                if is_missing:
                    waveforms.append(waveform)
                seconds.append(length if cached else len(waveforms[-1]) / SAMPLE_RATE)
                used.append(row)
            except (AudioError, MemoryError) as error:
                rejections.append(reject_audio(utterance, error))
        kept = cached.keep(used) if cached else None
        rows = [utterances[row] for row in used]
        return SpeechBatch(rows, waveforms, seconds, rejections, cached=kept, speech=speech)

    def _load(self, utterance: Utterance) -> np.ndarray:
        return load_audio(
            *utterance.clip, min_seconds=self.min_seconds, max_seconds=self.max_seconds
        )


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last one shorter."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class ByLength:
    """Sorts utterances by length, the longest first; those of equal length stay in order.

    Texts of utterances of one length end at about the same time, and so do rows of their batch.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Choose where lengths are kept that only headers tell; None: nowhere.

        Other processes and later runs, with the same manifest, then need not open the files.
        """
        self._folder = folder

    def __call__(self, utterances: Sequence[Utterance]) -> list[tuple[Utterance, float]]:
        """Return utterances and their seconds."""
        if all(utterance.stated_seconds is not None for utterance in utterances):
            return _longest_first(utterances, map(_seconds, utterances))
        name = f"{utterances[0].number}-{len(utterances)}"
        path = self._folder / f"{name}.{LENGTHS}" if self._folder else None
        seconds = _kept_seconds(path, len(utterances)) if path else None
        if seconds is None:
            seconds = np.array(read_files(_seconds, utterances))
            if path:
                own = path.with_name(f"{name}.{uuid.uuid4().hex}.{LENGTHS}")
                own.write_bytes(seconds.tobytes())
                own.replace(path)
        return _longest_first(utterances, seconds.tolist())


def _longest_first(
    utterances: Sequence[Utterance], seconds: Iterable[float]
) -> list[tuple[Utterance, float]]:
    return sorted(zip(utterances, seconds, strict=True), key=lambda timed: -timed[1])


def _kept_seconds(path: Path, count: int) -> np.ndarray | None:
    """Return the lengths that a file holds; None if it is not there, or torn."""
    with contextlib.suppress(FileNotFoundError):
        content = path.read_bytes()
        if len(content) == count * np.dtype(np.float64).itemsize:
            return np.frombuffer(content)
    return None


def _seconds(utterance: Utterance) -> float:
    """Return the length of an utterance by its row, else by the header; 0 if neither gives it."""
    stated = utterance.stated_seconds
    if stated is not None:
        return stated
    try:
        return audio_seconds(*utterance.clip)
    except AudioError:
        return 0.0


def groups_by_length(
    groups: Iterable[Sequence[Utterance]], workers: int, by_length: ByLength
) -> Iterator[list[tuple[Utterance, float]]]:
    """Yield each group with the longest utterances first; a worker reads the headers ahead."""
    for result in map_ahead(by_length, groups, min(workers, 1)):
        if isinstance(result, WorkerDeath):
            each = map_ahead(_seconds, result.item, 1, prefetch=1)
            seconds = (0.0 if isinstance(length, WorkerDeath) else length for length in each)
            yield _longest_first(result.item, seconds)
        else:
            yield result


def batches_within(
    timed: Iterable[tuple[Utterance, float]], size: int, max_seconds: float
) -> Iterator[list[Utterance]]:
    """Yield batches of at most `size` utterances and `max_seconds` of audio, but at least one."""
    batch: list[Utterance] = []
    total = 0.0
    for utterance, seconds in timed:
        if batch and (len(batch) == size or total + seconds > max_seconds):
            yield batch
            batch, total = [], 0.0
        batch.append(utterance)
        total += seconds
    if batch:
        yield batch


def speech_batches(
    batches: Iterable[Sequence[Utterance]], read: SpeechReader, workers: int
) -> Iterator[SpeechBatch]:
    """Yield what the reader makes of each batch, in worker processes ahead of use.

    A row whose decoding kills the process, through a bug of a library or for lack of memory, is
    rejected; the others of its batch are not.
    """
    for result in map_ahead(read, batches, workers):
        yield _row_by_row(result, read) if isinstance(result, WorkerDeath) else result


def _row_by_row(death: "WorkerDeath[Sequence[Utterance]]", read: SpeechReader) -> SpeechBatch:
    log.warning("A worker died (%s); its batch is read row by row", death.reason)
    rows = []
    for result in map_ahead(read, ([utterance] for utterance in death.item), 1, prefetch=1):
        if isinstance(result, WorkerDeath):
            [utterance] = result.item
            reason = f"{utterance.audio}: a process that decodes it dies ({result.reason})"
            rows.append(SpeechBatch([], [], [], [reject(utterance, reason)]))
        else:
            rows.append(result)
    return joined(rows)


def joined(batches: Sequence[SpeechBatch]) -> SpeechBatch:
    """Return several batches as one."""

    def short_form_first(rows_of: Callable[[SpeechBatch], list[Item]]) -> list[Item]:
        short_form = [row for batch in batches for row in rows_of(batch)[: batch.short_form_count]]
        long_form = [row for batch in batches for row in rows_of(batch)[batch.short_form_count :]]
        return short_form + long_form

    return SpeechBatch(
        short_form_first(lambda batch: batch.utterances),
        [waveform for batch in batches for waveform in batch.waveforms],
        short_form_first(lambda batch: batch.seconds),
        [rejection for batch in batches for rejection in batch.rejections],
        [recording for batch in batches for recording in batch.recordings],
        joined_states([batch.cached for batch in batches if batch.cached is not None]),
        {number: spans for batch in batches for number, spans in batch.speech.items()},
    )


def with_recordings_together(
    batches: Iterable[SpeechBatch],
    count: int,
    max_seconds: float,
    stop_if_asked: Callable[[], None],
) -> Iterator[SpeechBatch]:
    """Yield the batches, long-form utterances apart and more of them at once.

    Args:
        batches: of short-form and long-form utterances.
        count: how many long-form utterances suffice.
        max_seconds: of audio; one batch may have more.
        stop_if_asked: is called before each batch that is waited for.
    """
    together: SpeechBatch | None = None
    for batch in batches:
        stop_if_asked()
        if not batch.recordings:
            yield batch
            continue
        recordings = batch
        if batch.short_form_count:
            short_form, recordings = halved(batch)
            yield short_form
        if together and sum(together.seconds) + sum(recordings.seconds) > max_seconds:
            yield together
            together = None
        together = joined([together, recordings]) if together else recordings
        if len(together.recordings) >= count:
            yield together
            together = None
    if together:
        yield together


def halved(batch: SpeechBatch) -> tuple[SpeechBatch, SpeechBatch]:
    """Return a batch of several utterances in two parts: short and long form, or two halves."""
    middle = batch.short_form_count
    if middle in (0, len(batch.utterances)):
        middle = len(batch.utterances) // 2
    assert middle, "there is nothing to halve"

    def part(rows: range, rejections: list[Rejection]) -> SpeechBatch:
        short_form = [row for row in rows if row < batch.short_form_count]
        long_form = [row for row in rows if row >= batch.short_form_count]
        missing = batch.cached.missing if batch.cached else range(batch.short_form_count)
        return SpeechBatch(
            [batch.utterances[row] for row in rows],
            [w for row, w in zip(sorted(missing), batch.waveforms, strict=True) if row in rows],
            [batch.seconds[row] for row in rows],
            rejections,
            [batch.recordings[row - batch.short_form_count] for row in long_form],
            batch.cached.keep(short_form) if batch.cached else None,
            batch.speech,
        )

    whole = range(len(batch.utterances))
    return part(whole[:middle], batch.rejections), part(whole[middle:], [])
