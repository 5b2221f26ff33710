"""Mono 16 kHz waveforms -> log-mels, equal to transformers' and openai/whisper's."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import WhisperFeatureExtractor

from simpler_distil_whisper.data.audio import SAMPLE_RATE


def log_mel(waveforms: Sequence[object], extractor: WhisperFeatureExtractor) -> Tensor:
    """Return float32 [B, M, T]: the log-mels of mono 16 kHz waveforms, padded to the window."""
    features: Tensor = extractor(
        list(waveforms), sampling_rate=SAMPLE_RATE, return_tensors="pt"
    ).input_features
    return features


def long_log_mel(waveform: np.ndarray, extractor: WhisperFeatureExtractor) -> Tensor:
    """Return float32 [M, F]: the log-mel of a whole recording, one frame for each 10 ms.

    The same as openai/whisper's, where silence follows the end, and the maximum of the whole
    recording is what all of it is measured by. It is made window by window: the spectrum of half an
    hour would take gigabytes.

    Args:
        waveform: float32 [S], mono, 16 kHz, not shorter than the extractor's window.
        extractor: that of the model.
    """
    hop, half, block = extractor.hop_length, extractor.n_fft // 2, extractor.nb_max_frames
    samples = torch.from_numpy(waveform)
    window = torch.hann_window(extractor.n_fft)
    filters = torch.from_numpy(extractor.mel_filters).to(torch.float32).T
    log_mel = torch.empty(len(filters), len(samples) // hop)
    for first in range(0, log_mel.shape[1], block):
        last = min(first + block, log_mel.shape[1])
        begin, end = first * hop - half, (last - 1) * hop + half
        piece = samples[max(begin, 0) : end]
        if first == 0:  # before the beginning there is its mirror image
            piece = torch.cat([samples[1 : half + 1].flip(0), piece])
        piece = functional.pad(piece, (0, end - begin - len(piece)))
        spectrum = torch.stft(
            piece, extractor.n_fft, hop, window=window, center=False, return_complex=True
        )
        log_mel[:, first:last] = (filters @ spectrum.abs() ** 2).clamp_(min=1e-10).log10_()
    return log_mel.clamp_(min=float(log_mel.max()) - 8.0).add_(4.0).div_(4.0)
