"""The decoders that are compared: this project's, and those that people use.

All of them take the same log-mels, have the same weights, decode greedily with the language given,
and return token ids. The peers are optional: those that are not installed, or do not take a model,
are left out, and the table gives the reason.
"""

import functools
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import computes_in_bfloat16
from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.export.formats import openai_name
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import Attention, DecodingDtype, DecodingOptions, Dtype
from simpler_distil_whisper.model.special_tokens import special_tokens
from simpler_distil_whisper.model.whisper import Whisper, load_tokenizer, load_whisper

OURS, HUGGING_FACE = "this decoder", "HF generate"
CTRANSLATE2, OPENAI = "CTranslate2", "openai-whisper"

# float [B, M, T] on the CPU, and B language codes -> B lists of token ids without the end token.
Decode = Callable[[Tensor, Sequence[str]], list[list[int]]]


class Unavailable(Exception):
    """A system cannot be measured here; the message is the reason."""


@dataclass(frozen=True)
class Model:
    """What all systems load.

    Attributes:
        folder: a Hugging Face model folder.
        device: where it runs.
        max_new_tokens: the most tokens of a clip, for every decoder.
        threads: of the CPU.
    """

    folder: Path
    device: torch.device
    max_new_tokens: int
    threads: int


@dataclass(frozen=True)
class System:
    """A decoder in one setting.

    Attributes:
        kind: the decoder.
        setting: what else tells it from others of its kind.
        load: returns the function that decodes, or raises Unavailable.
    """

    kind: str
    setting: str
    dtype: str
    batch_size: int
    load: Callable[[Model], Decode]

    @property
    def name(self) -> str:
        """Its name in the tables."""
        setting = f" {self.setting}" if self.setting else ""
        return f"{self.kind} {self.dtype}{setting}, batch {self.batch_size}"


def all_systems(device: torch.device, batch_sizes: Sequence[int]) -> Iterator[System]:
    """Yield the systems to compare on a device; the ratios refer to the first one.

    On a CPU that is transformers' `generate` with one utterance at a time in float32; on a GPU,
    where nobody does that, with a batch.
    """
    largest = max(batch_sizes)
    if device.type == "cpu":
        dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
        compute_types: tuple[str, ...] = ("float32", "int8")
        sizes = sorted({1, *batch_sizes})
    else:
        dtypes, compute_types = ("bfloat16",), ("bfloat16", "int8_bfloat16")
        sizes = sorted(batch_sizes, reverse=True)
    for dtype in dtypes:
        for size in sizes:
            yield _hugging_face(dtype, "sdpa", size)
        if device.type == "cpu":
            yield _hugging_face(dtype, "eager", largest)
    for dtype in (*dtypes, "int8") if device.type == "cpu" else dtypes:
        for size in sizes:
            yield System(OURS, "", dtype, size, functools.partial(_load_ours, dtype, size))
    for compute_type in compute_types:
        for size in sizes:
            load = functools.partial(_load_ctranslate2, compute_type)
            yield System(CTRANSLATE2, "", compute_type, size, load)
    if device.type == "cpu":
        for size in sorted({1, largest}):
            yield System(OPENAI, "", "float32", size, _load_openai)


def _hugging_face(dtype: Dtype, attention: Attention, size: int) -> System:
    load = functools.partial(_load_hugging_face, dtype, attention)
    return System(HUGGING_FACE, attention, dtype, size, load)


@functools.lru_cache(maxsize=8)
def _whisper(model: Model, dtype: DecodingDtype, attention: Attention) -> Whisper:
    if dtype == "bfloat16" and not computes_in_bfloat16(model.device):
        raise Unavailable("the CPU has no bfloat16 instructions (avx512_bf16 or amx_bf16)")
    folder = read_model_folder(model.folder, None, "model")
    try:
        return load_whisper(folder, dtype, attention, model.device)
    except ConfigError as error:  # this version of torch may have no products of int8
        raise Unavailable(str(error)) from error


def _load_ours(dtype: DecodingDtype, size: int, model: Model) -> Decode:
    options = DecodingOptions(batch_size=size, max_new_tokens=model.max_new_tokens)
    transcriber = Transcriber(_whisper(model, dtype, "auto"), options)

    def decode(features: Tensor, languages: Sequence[str]) -> list[list[int]]:
        return [list(hypothesis.token_ids) for hypothesis in transcriber(features, languages)]

    return decode


def _load_hugging_face(dtype: Dtype, attention: Attention, model: Model) -> Decode:
    whisper = _whisper(model, dtype, attention)

    @torch.inference_mode()
    def decode(features: Tensor, languages: Sequence[str]) -> list[list[int]]:
        rows = whisper.model.generate(
            features.to(whisper.model.device, whisper.model.dtype),
            language=[f"<|{code}|>" for code in languages],
            task="transcribe",
            max_new_tokens=model.max_new_tokens,
            do_sample=False,
            num_beams=1,
        ).tolist()
        whisper.tokenizer.batch_decode(rows, skip_special_tokens=True)  # as the others do
        return [_before(whisper.tokens.end, row) for row in rows]

    return decode


@functools.lru_cache(maxsize=8)
def _converted(model: Model, compute_type: str) -> Any:
    ctranslate2 = _peer("ctranslate2")
    with tempfile.TemporaryDirectory() as folder:
        try:
            converter = ctranslate2.converters.TransformersConverter(str(model.folder))
            converter.convert(folder, force=True)
            return ctranslate2.models.Whisper(
                folder,
                device=model.device.type,
                compute_type=compute_type,
                intra_threads=model.threads,
            )
        except (RuntimeError, ValueError) as error:
            raise Unavailable(str(error)) from error


def _load_ctranslate2(compute_type: str, model: Model) -> Decode:
    """Load the engine of faster-whisper, here without the latter's work around it."""
    ctranslate2 = _peer("ctranslate2")
    engine = _converted(model, compute_type)
    folder = read_model_folder(model.folder, None, "model")
    tokenizer = load_tokenizer(folder)
    tokens = special_tokens(tokenizer, folder)

    def decode(features: Tensor, languages: Sequence[str]) -> list[list[int]]:
        mels = ctranslate2.StorageView.from_array(np.ascontiguousarray(features.numpy()))
        prompts = [tokens.prompt(code, "transcribe") for code in languages]
        # It stops at half of `max_length`: the other half is for the previous text.
        limit = 2 * model.max_new_tokens
        results = engine.generate(mels, prompts, beam_size=1, max_length=limit)
        rows = [list(result.sequences_ids[0]) for result in results]
        tokenizer.batch_decode(rows, skip_special_tokens=True)
        return rows

    return decode


def _load_openai(model: Model) -> Decode:
    """Load openai/whisper's own code, with the weights under its names."""
    openai = _peer("whisper")
    whisper = _whisper(model, "float32", "sdpa")
    config = whisper.model.config
    if config.vocab_size < 51_864:
        raise Unavailable("openai-whisper knows its own vocabularies only")
    dimensions = openai.model.ModelDimensions(
        n_mels=config.num_mel_bins,
        n_audio_ctx=config.max_source_positions,
        n_audio_state=config.d_model,
        n_audio_head=config.encoder_attention_heads,
        n_audio_layer=config.encoder_layers,
        n_vocab=config.vocab_size,
        n_text_ctx=config.max_target_positions,
        n_text_state=config.d_model,
        n_text_head=config.decoder_attention_heads,
        n_text_layer=config.decoder_layers,
    )
    copy = openai.model.Whisper(dimensions).eval()
    weights = {openai_name(name): value for name, value in whisper.model.state_dict().items()}
    weights.pop("proj_out.weight")  # the same tensor as the token embedding
    copy.load_state_dict(weights)

    def decode(features: Tensor, languages: Sequence[str]) -> list[list[int]]:
        (language,) = set(languages)  # one for the whole batch
        options = openai.DecodingOptions(
            language=language,
            without_timestamps=True,
            sample_len=model.max_new_tokens,
            suppress_tokens=list(whisper.model.generation_config.suppress_tokens),
            fp16=False,
        )
        return [list(result.tokens) for result in openai.decode(copy, features, options)]

    return decode


def _peer(package: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f'the package "{package}" is not installed')
    return importlib.import_module(package)


def _before(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
