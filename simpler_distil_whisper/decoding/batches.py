"""Manifest rows -> batches of tensors, decoded in worker processes ahead of the model.

Owns the first half of both roads: utterance -> waveform -> log-mel, and for training the two token
sequences. It knows nothing of models. Called by the scripts.

Legend of all tensor shapes in this project: B batch, S samples, M mel bins (80 or 128), T log-mel
frames (3000), E encoder positions (1500), D model width, L label tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import WhisperFeatureExtractor

from simpler_distil_whisper.data.audio import (
    SAMPLE_RATE,
    AudioError,
    check_length,
)
from simpler_distil_whisper.data.features import log_mel, long_log_mel
from simpler_distil_whisper.data.manifest import DataLimits, Rejection, Utterance, reject
from simpler_distil_whisper.data.workers import Died, ahead
from simpler_distil_whisper.model.teacher_cache import (
    CachedEncoderStates,
    EncoderStateCache,
    joined_states,
)
from simpler_distil_whisper.run import log

Item = TypeVar("Item")


@dataclass(frozen=True)
class SpeechBatch:
    """Some utterances of a manifest, ready for the encoder.

    Attributes:
        utterances: those whose audio could be used, those longer than the model's window last.
        input_features: float32 [B, M, T]: log-mels of the others; None if there are none. With a
            cache, only of the rows that it lacks.
        seconds: how long each utterance is.
        rejections: those whose audio could not.
        recordings: float32 [M, F] each: log-mels of those that are longer than the window.
        cached: what a teacher cache has of the others' encoder states; None: there is no cache.
    """

    utterances: list[Utterance]
    input_features: Tensor | None
    seconds: list[float]
    rejections: list[Rejection]
    recordings: list[Tensor] = field(default_factory=list)
    cached: CachedEncoderStates | None = None

    @property
    def in_window(self) -> int:
        """How many utterances are not longer than the model's window."""
        return len(self.utterances) - len(self.recordings)


class SpeechReader:
    """Turns utterances into batches: decodes their audio and computes the log-mels."""

    def __init__(
        self,
        extractor: WhisperFeatureExtractor,
        limits: DataLimits,
        cache: EncoderStateCache | None = None,
        *,
        long_form: bool = False,
    ) -> None:
        """Remember the limits; nothing is read yet.

        Args:
            extractor: that of the model.
            limits: which lengths are used.
            cache: where encoder states may be already.
            long_form: whether audio longer than the model's window is used.
        """
        self.extractor = extractor
        self.cache = cache
        self.min_seconds = limits.min_duration_seconds
        self.window = float(extractor.chunk_length)
        # The extractor would silently cut what is longer than the model's window.
        longest = math.inf if long_form else self.window
        self.max_seconds = min(limits.max_duration_seconds or longest, longest)

    def __call__(self, utterances: Sequence[Utterance]) -> SpeechBatch:
        """Return one batch; what cannot be decoded is in its `rejections`, with the reason."""
        if self.max_seconds <= self.window:
            return self._read_windows(utterances)
        recordings = [one for one in utterances if self._is_long(one)]
        windows = [one for one in utterances if one not in recordings]
        return joined([self._read_windows(windows), self._read_recordings(recordings)])

    def _is_long(self, utterance: Utterance) -> bool:
        try:
            return utterance.header_seconds() > self.window
        except AudioError:  # which is also what decoding it will come to
            return False

    def _read_recordings(self, utterances: Sequence[Utterance]) -> SpeechBatch:
        """Return a batch of utterances longer than the window."""
        batch = SpeechBatch([], None, [], [])
        for utterance in utterances:
            try:
                waveform = utterance.load_audio(self.min_seconds, self.max_seconds)
                batch.recordings.append(long_log_mel(waveform, self.extractor))
            except (AudioError, MemoryError) as error:
                batch.rejections.append(reject(utterance, why_unusable(utterance, error)))
            else:
                batch.utterances.append(utterance)
                batch.seconds.append(len(waveform) / SAMPLE_RATE)
        return batch

    def _read_windows(self, utterances: Sequence[Utterance]) -> SpeechBatch:
        """Return a batch of utterances no longer than the window."""
        waveforms, seconds, used, rejections = [], [], [], []
        cached = self.cache.look_up(utterances) if self.cache else None
        for row, utterance in enumerate(utterances):
            try:
                # With a cache the length is the header's, whether the states are found or not: a
                # run that is continued finds what it had computed, and is to write the same.
                if cached:
                    length = utterance.header_seconds()
                    check_length(length, self.min_seconds, self.max_seconds)
                if cached is None or row in cached.missing:
                    waveforms.append(utterance.load_audio(self.min_seconds, self.max_seconds))
                seconds.append(length if cached else len(waveforms[-1]) / SAMPLE_RATE)
                used.append(row)
            except (AudioError, MemoryError) as error:
                rejections.append(reject(utterance, why_unusable(utterance, error)))
        features = log_mel(waveforms, self.extractor) if waveforms else None
        kept = cached.keep(used) if cached else None
        rows = [utterances[row] for row in used]
        return SpeechBatch(rows, features, seconds, rejections, cached=kept)


class SpeechDataset(Dataset[SpeechBatch]):
    """Batches of utterances; each is decoded and turned into log-mels when it is asked for."""

    def __init__(
        self,
        batches: Sequence[Sequence[Utterance]],
        extractor: WhisperFeatureExtractor,
        limits: DataLimits,
    ) -> None:
        """Keep what is needed to make the batches; nothing is read yet."""
        self.batches = batches
        self.read = SpeechReader(extractor, limits)

    def __len__(self) -> int:
        """Return how many batches there are."""
        return len(self.batches)

    def __getitem__(self, index: int) -> SpeechBatch:
        """Return one batch."""
        return self.read(self.batches[index])


def why_unusable(utterance: Utterance, error: Exception) -> str:
    """Return the reason for a rejection."""
    reason = "too large for the memory" if isinstance(error, MemoryError) else str(error)
    return f"{utterance.audio}: {reason}"


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


def longest_first(utterances: Sequence[Utterance]) -> list[tuple[Utterance, float]]:
    """Return utterances and their seconds by length; those of equal length stay in order.

    Rows of one length say about as much, so that a batch of them ends together.
    """
    return _by_length(utterances, [_seconds(utterance) for utterance in utterances])


def _by_length(
    utterances: Sequence[Utterance], seconds: Iterable[float]
) -> list[tuple[Utterance, float]]:
    return sorted(zip(utterances, seconds, strict=True), key=lambda timed: -timed[1])


def _seconds(utterance: Utterance) -> float:
    """Return how long an utterance is: as the row says, else the header; 0 if neither does."""
    if utterance.duration_seconds is not None:
        return utterance.duration_seconds
    try:
        return utterance.header_seconds()
    except AudioError:
        return 0.0


def windows_by_length(
    windows: Iterable[Sequence[Utterance]], workers: int
) -> Iterator[list[tuple[Utterance, float]]]:
    """Yield each window with the longest utterances first; headers are read in a worker ahead."""
    for found in ahead(longest_first, windows, min(workers, 1)):
        if isinstance(found, Died):
            each = ahead(_seconds, found.item, 1, prefetch=1)
            seconds = (0.0 if isinstance(length, Died) else length for length in each)
            yield _by_length(found.item, seconds)
        else:
            yield found


def batches_of(
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

    A row whose decoding ends the process, as damaged audio can through a bug of a library, or the
    memory of the machine, is rejected; the others of its batch are not.
    """
    for found in ahead(read, batches, workers):
        yield _row_by_row(found, read) if isinstance(found, Died) else found


def _row_by_row(died: "Died[Sequence[Utterance]]", read: SpeechReader) -> SpeechBatch:
    log.warning("A worker died (%s); its batch is read row by row", died.reason)
    rows = []
    for found in ahead(read, ([row] for row in died.item), 1, prefetch=1):
        if isinstance(found, Died):
            reason = f"{found.item[0].audio}: a process that decodes it dies ({found.reason})"
            rows.append(SpeechBatch([], None, [], [reject(found.item[0], reason)]))
        else:
            rows.append(found)
    return joined(rows)


def joined(batches: Sequence[SpeechBatch]) -> SpeechBatch:
    """Return several batches as one."""
    features = [batch.input_features for batch in batches if batch.input_features is not None]

    def windows_first(rows: Callable[[SpeechBatch], list[Item]]) -> list[Item]:
        windows = [row for batch in batches for row in rows(batch)[: batch.in_window]]
        return windows + [row for batch in batches for row in rows(batch)[batch.in_window :]]

    return SpeechBatch(
        windows_first(lambda batch: batch.utterances),
        torch.cat(features) if features else None,
        windows_first(lambda batch: batch.seconds),
        [rejection for batch in batches for rejection in batch.rejections],
        [recording for batch in batches for recording in batch.recordings],
        joined_states([batch.cached for batch in batches if batch.cached is not None]),
    )


def halved(batch: SpeechBatch) -> tuple[SpeechBatch, SpeechBatch]:
    """Return a batch of several utterances in two parts: windows and recordings, or two halves."""
    middle = batch.in_window
    if middle in (0, len(batch.utterances)):
        middle = len(batch.utterances) // 2
    assert middle, "there is nothing to halve"

    def part(rows: range, rejections: list[Rejection]) -> SpeechBatch:
        windows = [row for row in rows if row < batch.in_window]
        with_features = batch.cached.missing if batch.cached else range(batch.in_window)
        places = [place for place, row in enumerate(sorted(with_features)) if row in rows]
        features = batch.input_features
        return SpeechBatch(
            [batch.utterances[row] for row in rows],
            features[places] if features is not None and places else None,
            [batch.seconds[row] for row in rows],
            rejections,
            [batch.recordings[row - batch.in_window] for row in rows if row >= batch.in_window],
            batch.cached.keep(windows) if batch.cached else None,
        )

    whole = range(len(batch.utterances))
    return part(whole[:middle], batch.rejections), part(whole[middle:], [])
