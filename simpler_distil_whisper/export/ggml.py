"""A Whisper as one ggml file, which whisper.cpp loads, and whisper.cpp at work on it.

Owns what is known of whisper.cpp, which runs in the package pywhispercpp, imported only where it is
needed. Weights have openai-whisper's names there too; these are for `formats`.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from simpler_distil_whisper.data.audio import SAMPLE_RATE
from simpler_distil_whisper.export.formats import (
    openai_dimensions,
    openai_weights,
    padded_one_by_one,
    suppresses_blank,
    with_version,
)
from simpler_distil_whisper.export.verification import System, Transcript
from simpler_distil_whisper.model.options import Task
from simpler_distil_whisper.model.whisper import Whisper

MODEL_FILE = "ggml-model.bin"
MAGIC = 0x67676D6C  # "ggml"
FLOAT32, FLOAT16 = 0, 1  # types
DIMENSIONS = (  # in the order of the file
    "n_vocab",
    "n_audio_ctx",
    "n_audio_state",
    "n_audio_head",
    "n_audio_layer",
    "n_text_ctx",
    "n_text_state",
    "n_text_head",
    "n_text_layer",
    "n_mels",
)


def write_ggml(whisper: Whisper, target: Path) -> None:
    """Write `ggml-model.bin`, in float16: sizes, filters of the log-mel, text tokens, weights."""
    sizes = openai_dimensions(whisper)
    filters = whisper.feature_extractor.mel_filters.T.astype("<f4")
    tokens = text_tokens(whisper)
    target.mkdir()
    with (target / MODEL_FILE).open("wb") as file:
        file.write(_integers(MAGIC, *(sizes[name] for name in DIMENSIONS), FLOAT16))
        file.write(_integers(*filters.shape) + filters.tobytes())
        file.write(_integers(len(tokens)))
        for token in tokens:
            file.write(_integers(len(token)) + token)
        for name, weight in openai_weights(whisper).items():
            file.write(_tensor(name, weight))


def text_tokens(whisper: Whisper) -> list[bytes]:
    """Return the bytes of each token before the end token; whisper.cpp knows those behind it."""
    bytes_of = {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}
    tokens = whisper.tokenizer.convert_ids_to_tokens(list(range(whisper.tokens.end)))
    return [b"".join(bytes_of.get(c, c.encode()) for c in token or "") for token in tokens]


def _tensor(name: str, weight: Tensor) -> bytes:
    """Return a weight as it stands in the file, which names the innermost dimension first."""
    if name in ("encoder.conv1.bias", "encoder.conv2.bias"):
        weight = weight[:, None]  # as it is added there, to [channels, positions]
    # Which weights are kept in float32 is built into the program.
    is_matrix = name.endswith(".weight") and weight.ndim > 1
    values = weight.numpy().astype("<f2" if is_matrix else "<f4")
    kind = _integers(values.ndim, len(name), FLOAT16 if is_matrix else FLOAT32)
    return kind + _integers(*reversed(values.shape)) + name.encode() + values.tobytes()


def _integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def ggml_system(whisper: Whisper, target: Path, task: Task) -> System:
    """Return an exported `ggml-model.bin` in whisper.cpp."""
    from pywhispercpp.model import Model

    path, window = target / MODEL_FILE, round(whisper.window_seconds * SAMPLE_RATE)
    model = Model(
        str(path),
        redirect_whispercpp_logs_to=None,
        context_params={"use_gpu": False},
        **_options(whisper, task),
    )

    def transcribe(padded: np.ndarray, language: str | None) -> Transcript:
        segments = model.transcribe(padded, language=language or "en")
        text = "".join(segment.text for segment in segments).strip()
        # How many it has decoded the package does not tell.
        tokens = len(whisper.tokenizer.encode(text, add_special_tokens=False))
        return Transcript(text, language or "en", tokens)

    size, transcribe_batch = path.stat().st_size, padded_one_by_one(window, transcribe)
    return System(with_version("pywhispercpp"), "float16", 1, size, transcribe_batch)


def _options(whisper: Whisper, task: Task) -> dict[str, Any]:
    """Return the options by which whisper.cpp decodes as this project: greedily, in one go."""
    return {
        "n_threads": torch.get_num_threads(),
        "print_progress": False,
        "translate": task == "translate",
        "no_timestamps": True,
        "temperature_inc": 0.0,  # no other temperature is tried
        "no_speech_thold": 1.0,
        # It takes no list of tokens, but has that of OpenAI's models built in.
        "suppress_nst": bool(whisper.model.generation_config.suppress_tokens),
        "suppress_blank": suppresses_blank(whisper),
    }
