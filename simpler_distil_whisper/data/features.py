"""Mono 16 kHz waveforms -> log-mels, equal to those of transformers and openai/whisper.

Owns both kinds: padded to the model's window, and of a whole recording that is longer.

Letters of tensor shapes in this project: B batch, S samples, M mel bins (80 or 128), T log-mel
frames of a window (3000), F log-mel frames of a recording, E encoder positions (1500), D model
width, H attention heads, L tokens, V vocabulary. Modules that need other letters explain them.
"""

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

    The values are openai/whisper's: silence follows the end, and the whole recording is normalised
    by its maximum. The spectrum is computed one window at a time, since that of half an hour would
    take gigabytes.

    Args:
        waveform: float32 [S]: mono, 16 kHz, not shorter than the extractor's window.
        extractor: the feature extractor of the model.
    """
    hop, half, block = extractor.hop_length, extractor.n_fft // 2, extractor.nb_max_frames
    samples = torch.from_numpy(waveform)
    hann = torch.hann_window(extractor.n_fft)
    filters = torch.from_numpy(extractor.mel_filters).to(torch.float32).T
    result = torch.empty(len(filters), len(samples) // hop)
    for first in range(0, result.shape[1], block):
        last = min(first + block, result.shape[1])
        begin, end = first * hop - half, (last - 1) * hop + half
        piece = samples[max(begin, 0) : end]
        if first == 0:  # the beginning is padded by reflection
            piece = torch.cat([samples[1 : half + 1].flip(0), piece])
        piece = functional.pad(piece, (0, end - begin - len(piece)))
        spectrum = torch.stft(
            piece, extractor.n_fft, hop, window=hann, center=False, return_complex=True
        )
        result[:, first:last] = (filters @ spectrum.abs() ** 2).clamp_(min=1e-10).log10_()
    return result.clamp_(min=float(result.max()) - 8.0).add_(4.0).div_(4.0)
