"""Log-mels of whole recordings against transformers' feature extractor."""

import numpy as np
import pytest
import torch
from tiny import SIXTEEN_KHZ
from transformers import WhisperFeatureExtractor

from simpler_distil_whisper.data.features import long_log_mel


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
