"""Manifest rows -> batches of tensors, decoded in worker processes ahead of the model.

Owns the first half of both roads: utterance -> waveform -> log-mel, and for training the two token
sequences. It knows nothing of models. Called by the scripts.

Legend of all tensor shapes in this project: B batch, S samples, M mel bins (80 or 128), T log-mel
frames (3000), E encoder positions (1500), D model width, L label tokens, V vocabulary.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import WhisperFeatureExtractor

from simpler_distil_whisper.audio import SAMPLE_RATE, AudioError, load_audio
from simpler_distil_whisper.manifest import DataLimits, Rejection, Utterance

IGNORE_INDEX = -100  # what torch's cross-entropy skips

Item = TypeVar("Item")


@dataclass(frozen=True)
class SpeechBatch:
    """Some utterances of a manifest, ready for the encoder.

    Attributes:
        utterances: those whose audio could be used.
        input_features: float32 [B, M, T]: their log-mels; None if there are none.
        seconds: how long each of them is.
        rejections: those whose audio could not.
    """

    utterances: list[Utterance]
    input_features: torch.Tensor | None
    seconds: list[float]
    rejections: list[Rejection]


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
        self.extractor = extractor
        self.min_seconds = limits.min_duration_seconds
        # The extractor would silently cut what is longer than the model's window.
        window = float(extractor.chunk_length)
        self.max_seconds = min(limits.max_duration_seconds or window, window)

    def __len__(self) -> int:
        """Return how many batches there are."""
        return len(self.batches)

    def __getitem__(self, index: int) -> SpeechBatch:
        """Return one batch; what cannot be decoded is in its `rejections`, with the reason."""
        waveforms, used, rejections = [], [], []
        for utterance in self.batches[index]:
            try:
                waveforms.append(
                    load_audio(
                        utterance.audio,
                        utterance.start_seconds,
                        utterance.duration_seconds,
                        min_seconds=self.min_seconds,
                        max_seconds=self.max_seconds,
                    )
                )
                used.append(utterance)
            except AudioError as error:
                reason = f"{utterance.audio}: {error}"
                rejections.append(
                    Rejection(utterance.number, utterance.place, reason, utterance.row)
                )
        seconds = [len(waveform) / SAMPLE_RATE for waveform in waveforms]
        features = log_mel(waveforms, self.extractor) if waveforms else None
        return SpeechBatch(used, features, seconds, rejections)


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


def load_ahead(dataset: Dataset[Item], workers: int) -> DataLoader[Item]:
    """Return an iterator over the items of a dataset, in order, made by processes ahead of use."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_main_process,
        # Else it would draw a number from the random state on which the student's dropout depends,
        # and a resumed run, which makes its loader anew, would go another way.
        generator=torch.Generator(),
    )


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Let Ctrl-C reach only the process that saves the work; it then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
