"""The evidence that a hypothesis carries."""

import zlib

from simpler_distil_whisper.decoding.hypothesis import Hypothesis, compression_ratio


def test_compression_ratio_by_hand() -> None:
    assert compression_ratio("") == 0.0
    loop = "你好" * 50  # 300 bytes of UTF-8
    assert compression_ratio(loop) == 300 / len(zlib.compress(loop.encode()))
    assert compression_ratio(loop) > 10 > 2.4 > 1 > compression_ratio("q8Zr")


def test_evidence_is_rounded_and_plain() -> None:
    hypothesis = Hypothesis("a", "zh", (65,), (), -0.123456, 0.654321, 1.23456, 0.2, complete=False)
    assert hypothesis.evidence() == {
        "average_log_probability": -0.1235,
        "no_speech_probability": 0.6543,
        "compression_ratio": 1.235,
        "temperature": 0.2,
        "complete": False,
    }
