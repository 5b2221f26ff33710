"""Manifest rows -> batches of tensors, decoded in worker processes ahead of the model.

Owns the first half of both roads: utterance -> waveform -> log-mel, and for training the two token
sequences. It knows nothing of models. Called by the scripts.

Legend of all tensor shapes in this project: B batch, S samples, M mel bins (80 or 128), T log-mel
frames (3000), E encoder positions (1500), D model width, L label tokens, V vocabulary.
"""

import itertools
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import WhisperFeatureExtractor

from simpler_distil_whisper.audio import (
    SAMPLE_RATE,
    TOLERANCE_SECONDS,
    AudioError,
    audio_seconds,
    check_length,
    load_audio,
)
from simpler_distil_whisper.manifest import DataLimits, Rejection, Utterance, reject
from simpler_distil_whisper.run import log
from simpler_distil_whisper.teacher_cache import StoredStates, TeacherCache, joined_states

IGNORE_INDEX = -100  # what torch's cross-entropy skips

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class SpeechBatch:
    """Some utterances of a manifest, ready for the encoder.

    Attributes:
        utterances: those whose audio could be used.
        input_features: float32 [B, M, T]: their log-mels; None if there are none. With a cache,
            only of the rows that it lacks.
        seconds: how long each of them is.
        rejections: those whose audio could not.
        stored: what a teacher cache has of their encoder states; None: there is no cache.
        encoder_states: float [B, E, D]: all of them, once the missing ones are computed.
    """

    utterances: list[Utterance]
    input_features: torch.Tensor | None
    seconds: list[float]
    rejections: list[Rejection]
    stored: StoredStates | None = None
    encoder_states: torch.Tensor | None = None


class SpeechReader:
    """Turns utterances into batches: decodes their audio and computes the log-mels."""

    def __init__(
        self,
        extractor: WhisperFeatureExtractor,
        limits: DataLimits,
        cache: TeacherCache | None = None,
    ) -> None:
        """Remember the limits; nothing is read yet."""
        self.extractor = extractor
        self.cache = cache
        self.min_seconds = limits.min_duration_seconds
        # The extractor would silently cut what is longer than the model's window.
        window = float(extractor.chunk_length)
        self.max_seconds = min(limits.max_duration_seconds or window, window)

    def __call__(self, utterances: Sequence[Utterance]) -> SpeechBatch:
        """Return one batch; what cannot be decoded is in its `rejections`, with the reason."""
        waveforms, seconds, used, rejections = [], [], [], []
        stored = self.cache.look_up(utterances) if self.cache else None
        for row, utterance in enumerate(utterances):
            try:
                # With a cache the length is the header's, whether the states are found or not: a
                # run that is continued finds what it had computed, and is to write the same.
                length = self._header_seconds(utterance) if stored else 0.0
                if stored is None or row in stored.missing:
                    waveforms.append(self._load(utterance))
                seconds.append(length if stored else len(waveforms[-1]) / SAMPLE_RATE)
                used.append(row)
            except AudioError as error:
                rejections.append(reject(utterance, f"{utterance.audio}: {error}"))
            except MemoryError:
                rejections.append(reject(utterance, f"{utterance.audio}: too large for the memory"))
        features = log_mel(waveforms, self.extractor) if waveforms else None
        kept = stored.keep(used) if stored else None
        return SpeechBatch([utterances[row] for row in used], features, seconds, rejections, kept)

    def _load(self, utterance: Utterance) -> np.ndarray:
        return load_audio(
            utterance.audio,
            utterance.start_seconds,
            utterance.duration_seconds,
            min_seconds=self.min_seconds,
            max_seconds=self.max_seconds,
        )

    def _header_seconds(self, utterance: Utterance) -> float:
        part = (utterance.start_seconds, utterance.duration_seconds)
        seconds = audio_seconds(utterance.audio, *part)
        check_length(seconds, self.min_seconds, self.max_seconds + TOLERANCE_SECONDS)
        return seconds


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


def log_mel(waveforms: Sequence[object], extractor: WhisperFeatureExtractor) -> torch.Tensor:
    """Return float32 [B, M, T]: the log-mels of mono 16 kHz waveforms, padded to the window."""
    features: torch.Tensor = extractor(
        list(waveforms), sampling_rate=SAMPLE_RATE, return_tensors="pt"
    ).input_features
    return features


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


def longest_first(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Return utterances by length, those of equal length in the manifest's order.

    Rows of one length say about as much, so that a batch of them ends together.
    """
    return _by_length(utterances, [_seconds(utterance) for utterance in utterances])


def _by_length(utterances: Sequence[Utterance], seconds: Sequence[float]) -> list[Utterance]:
    order = sorted(range(len(utterances)), key=lambda index: -seconds[index])
    return [utterances[index] for index in order]


def _seconds(utterance: Utterance) -> float:
    """Return how long an utterance is: as the row says, else the header; 0 if neither does."""
    if utterance.duration_seconds is not None:
        return utterance.duration_seconds
    try:
        return audio_seconds(utterance.audio, utterance.start_seconds)
    except AudioError:
        return 0.0


def windows_by_length(
    windows: Iterable[Sequence[Utterance]], workers: int
) -> Iterator[list[Utterance]]:
    """Yield each window with the longest utterances first; headers are read in a worker ahead."""
    for found in ahead(longest_first, windows, min(workers, 1)):
        if isinstance(found, Died):
            rows = found.item
            each = ahead(_seconds, rows, 1, prefetch=1)
            yield _by_length(rows, [0.0 if isinstance(row, Died) else row for row in each])
        else:
            yield found


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
    return SpeechBatch(
        [utterance for batch in batches for utterance in batch.utterances],
        torch.cat(features) if features else None,
        [seconds for batch in batches for seconds in batch.seconds],
        [rejection for batch in batches for rejection in batch.rejections],
        joined_states([batch.stored for batch in batches if batch.stored is not None]),
    )


def halved(batch: SpeechBatch) -> tuple[SpeechBatch, SpeechBatch]:
    """Return the two halves of a batch of several utterances."""
    middle = len(batch.utterances) // 2
    assert middle, "there is nothing to halve"

    def part(rows: slice, rejections: list[Rejection]) -> SpeechBatch:
        features, states = batch.input_features, batch.encoder_states
        return SpeechBatch(
            batch.utterances[rows],
            features[rows] if features is not None and states is None else None,
            batch.seconds[rows],
            rejections,
            encoder_states=None if states is None else states[rows],
        )

    return part(slice(middle), batch.rejections), part(slice(middle, None), [])


@dataclass(frozen=True)
class Died(Generic[Item]):
    """Stands for the result of an item during which a worker process died."""

    item: Item
    reason: str


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, prefetch: int = 2
) -> Iterator[Result | Died[Item]]:
    """Yield the function's results in order, computed by processes ahead of use.

    When a process dies, the first item without a result is given up, and new processes go on with
    the next. With several workers, or a `prefetch` above 1, it need not be the item that is to
    blame: one worker that prefetches 1 has only one in hand.

    Args:
        function: what is computed for each item; runs in the workers.
        items: taken only as they are needed.
        workers: how many processes; with 0 it is this one, whose death nothing survives.
        prefetch: how many items each worker has in hand.
    """
    if workers == 0:
        yield from map(function, items)
        return
    rest = iter(items)
    in_hand: deque[Item] = deque()

    def handed_out(source: Iterable[Item]) -> Iterator[Item]:
        for item in source:
            in_hand.append(item)
            yield item

    died = True
    while died:
        again, died = list(in_hand), False
        in_hand.clear()
        loader = load_ahead(
            _Function(function), workers, handed_out(itertools.chain(again, rest)), prefetch
        )
        results = _iterate_undisturbed(loader)
        try:
            for result in results:
                in_hand.popleft()
                yield result
        except (RuntimeError, OSError, EOFError) as error:
            if not _is_death(error) or not in_hand:
                raise
            died, reason = True, str(error).partition("\n")[0]
        if died:
            yield Died(in_hand.popleft(), reason)


def _iterate_undisturbed(loader: DataLoader[Item]) -> Iterator[Item]:
    """Return an iterator that tells of a worker's death when it is asked for the next item.

    A DataLoader's own signal handler would raise in the midst of whatever the script does then.
    """
    if not hasattr(signal, "SIGCHLD"):  # Windows
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    results = iter(loader)
    signal.signal(signal.SIGCHLD, handler)
    return results


def _is_death(error: Exception) -> bool:
    """Return whether a worker's end, not an error within a worker, has raised this."""
    return not isinstance(error, RuntimeError) or str(error).startswith("DataLoader worker (pid")


class _Function(Dataset[Result]):
    """Lets a DataLoader call a function: the indices are the items."""

    def __init__(self, function: Callable[[Any], Result]) -> None:
        self.function = function

    def __getitem__(self, item: Any) -> Result:
        return self.function(item)


def load_ahead(
    dataset: Dataset[Item],
    workers: int,
    order: Iterable[Any] | None = None,
    prefetch: int | None = None,
) -> DataLoader[Item]:
    """Return an iterator over the items of a dataset, in order, made by processes ahead of use."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_main_process,
        # Else it would draw a number from the random state on which the student's dropout depends,
        # and a resumed run, which makes its loader anew, would go another way.
        generator=torch.Generator(),
    )


def _as_it_is(item: Item) -> Item:
    return item


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Let Ctrl-C reach only the process that saves the work; it then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
