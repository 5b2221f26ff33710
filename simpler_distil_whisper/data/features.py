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

DYNAMIC_RANGE = 8.0  # below the loudest value, in powers of ten
ROWS_AT_ONCE = 32  # whose spectra take 150 MB
CPU = torch.device("cpu")


def log_mel(
    waveforms: Sequence[np.ndarray], extractor: WhisperFeatureExtractor, device: torch.device = CPU
) -> Tensor:
    """Return float32 [B, M, T] on the device: log-mels of waveforms, padded to the window.

    On a CPU the values equal those of transformers' feature extractor without dither. That one
    returns them on the CPU; here they stay on the device.

    Args:
        waveforms: float32 [S] each: mono, 16 kHz; what is longer than the window is cut.
        extractor: the feature extractor of the model.
        device: where to compute them.
    """
    count, frames = len(waveforms), extractor.nb_max_frames
    result = torch.empty(count, extractor.feature_size, frames, device=device)
    on_gpu = device.type == "cuda"
    for start in range(0, len(waveforms), ROWS_AT_ONCE):
        rows = waveforms[start : start + ROWS_AT_ONCE]
        # Only from pinned memory does a copy to a GPU not wait for what that still has to do.
        padded = torch.zeros(len(rows), extractor.n_samples, pin_memory=on_gpu)
        for samples, waveform in zip(padded, rows, strict=True):
            own = torch.from_numpy(waveform[: len(samples)])
            samples[: len(own)] = own
        with torch.autocast(device.type, enabled=False):  # as validation switches on
            logs = _log_power(padded.to(device, non_blocking=on_gpu), extractor, center=True)
        floor = logs.amax(dim=(1, 2), keepdim=True) - DYNAMIC_RANGE
        result[start : start + len(rows)] = torch.maximum(logs, floor).add_(4.0).div_(4.0)
    return result


def _log_power(samples: Tensor, extractor: WhisperFeatureExtractor, *, center: bool) -> Tensor:
    """Return float32 [..., M, F]: the logarithm of the power in each mel bin.

    Args:
        samples: float32 [..., S].
        extractor: the feature extractor of the model.
        center: whether the first frame is centred on the first sample, and the last one left out.
    """
    hann = torch.hann_window(extractor.n_fft, device=samples.device)
    spectrum = torch.stft(
        samples,
        extractor.n_fft,
        extractor.hop_length,
        window=hann,
        center=center,
        return_complex=True,
    )
    if center:
        spectrum = spectrum[..., :-1]
    filters = torch.from_numpy(extractor.mel_filters).float()
    if on_gpu := samples.device.type == "cuda":
        filters = filters.pin_memory()
    filters = filters.to(samples.device, non_blocking=on_gpu).T
    # The product of a view would be slow on some CPUs.
    return (filters @ (spectrum.abs() ** 2).contiguous()).clamp_(min=1e-10).log10_()


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
    result = torch.empty(extractor.feature_size, len(samples) // hop)
    for first in range(0, result.shape[1], block):
        last = min(first + block, result.shape[1])
        begin, end = first * hop - half, (last - 1) * hop + half
        piece = samples[max(begin, 0) : end]
        if first == 0:  # the beginning is padded by reflection
            piece = torch.cat([samples[1 : half + 1].flip(0), piece])
        piece = functional.pad(piece, (0, end - begin - len(piece)))
        result[:, first:last] = _log_power(piece, extractor, center=False)
    return result.clamp_(min=float(result.max()) - DYNAMIC_RANGE).add_(4.0).div_(4.0)
