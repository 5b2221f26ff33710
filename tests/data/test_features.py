"""Log-mels of windows and of whole recordings against transformers' feature extractor."""

import numpy as np
import pytest
import torch
from tiny import SIXTEEN_KHZ
from transformers import WhisperFeatureExtractor

from simpler_distil_whisper.data.features import ROWS_AT_ONCE, log_mel, long_log_mel


@pytest.mark.parametrize("mels", [80, 128])
def test_log_mels_are_those_of_transformers_to_the_last_bit(mels: int) -> None:
    """Whatever the length is, whoever the neighbours are, and with autocast."""
    extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=2)
    random = np.random.default_rng(3)
    lengths = [0, 1, 159, 16_000, 31_999, 32_000, 40_000, *[20_000] * ROWS_AT_ONCE]
    waveforms = [random.normal(0, 0.1, length).astype(np.float32) for length in lengths]
    with torch.autocast("cpu", torch.bfloat16):
        features = log_mel(waveforms, extractor)
    assert features.shape == (len(waveforms), mels, 200)
    assert features.dtype == torch.float32
    for waveform, row in zip(waveforms, features, strict=True):
        alone = extractor(waveform, sampling_rate=SIXTEEN_KHZ, return_tensors="pt").input_features
        assert torch.equal(row, alone[0])
        assert torch.equal(row, log_mel([waveform], extractor)[0])


@pytest.mark.parametrize("seconds", [2.5, 61.237])
def test_the_log_mel_is_that_of_the_whole_recording_with_silence_after_it(
    seconds: float,
) -> None:
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    random = np.random.default_rng(3)
    loudness = np.repeat(random.choice([0.0, 0.05, 0.5], 700), 1500)  # pauses among loud noise
    samples = loudness * random.normal(0, 1, len(loudness)) + random.normal(0, 0.02, len(loudness))
    waveform = samples[: round(seconds * SIXTEEN_KHZ)].astype(np.float32)
    padded = np.concatenate([waveform, np.zeros(30 * SIXTEEN_KHZ, dtype=np.float32)])
    expected = extractor(
        padded, sampling_rate=SIXTEEN_KHZ, truncation=False, padding="longest", return_tensors="pt"
    ).input_features[0]
    features = long_log_mel(waveform, extractor)
    assert features.shape == (80, int(seconds * 100))
    torch.testing.assert_close(features, expected[:, : features.shape[1]], rtol=0, atol=1e-5)
