"""Loading, completing and saving Whisper model folders.

Owns the quirks of folders in transformers' format: dtypes, tokenizers, the files that make a folder
complete. It does not decode; the quirks of the model's layers are dealt with where these are run,
in `decoding/cached_decoder.py` and `layers/scoring.py`.
"""

import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import (
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from simpler_distil_whisper.atomic import MARK, new_folder, remove_own
from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.audio_context import AudioContext, stated_context
from simpler_distil_whisper.model.devices import encoder_batch_size, suitable_attention, torch_dtype
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.folder_check import FRAMES_PER_POSITION
from simpler_distil_whisper.model.generation_config import completed_generation_config
from simpler_distil_whisper.model.int8 import round_linear_layers
from simpler_distil_whisper.model.options import Attention, DecodingDtype
from simpler_distil_whisper.model.special_tokens import SpecialTokens, special_tokens
from simpler_distil_whisper.model.weights import read_tensor, tensors_in
from simpler_distil_whisper.run import DataError

# Files besides weights and configs that make a folder usable, in any version of transformers and in
# CTranslate2. They are copied byte for byte, since no version of transformers writes all of them.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "normalizer.json",
)


@dataclass(frozen=True)
class Whisper:
    """A loaded model with its tokenizer, feature extractor and special tokens.

    Attributes:
        processor_folder: where tokenizer and feature extractor came from, to be copied from there.
    """

    model: WhisperForConditionalGeneration
    tokenizer: WhisperTokenizer
    feature_extractor: WhisperFeatureExtractor
    tokens: SpecialTokens
    processor_folder: Path

    @property
    def window_seconds(self) -> float:
        """The longest audio that the encoder takes at once."""
        return float(self.feature_extractor.chunk_length)

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without timestamps and other special tokens."""
        added, decode = self.tokens.added, self.tokenizer.decode
        text_ids = filter(self.tokens.is_text, ids)
        # The tokenizer would take the letters of an added "Müller" for bytes: "M\ufffdller". And
        # cleaning up would change the spaces before punctuation, and with them the tokens.
        return "".join(
            "".join(added[id] for id in some)
            if are_added
            else str(decode(list(some), clean_up_tokenization_spaces=False))
            for are_added, some in itertools.groupby(text_ids, added.__contains__)
        )

    @property
    def audio_context(self) -> AudioContext | None:
        """What the model was trained to be given of the window; None: all of it."""
        return stated_context(self.model.config.to_dict())

    @torch.no_grad()  # not inference_mode, whose tensors training could not use
    def encode(self, features: Tensor, encoder: Any = None) -> Tensor:
        """Return the encoder states, a few windows at a time, so that memory stays bounded.

        Args:
            features: float [B, M, T]: log-mels, of any dtype and on any device; of a part of the
                window where T is smaller.
            encoder: a copy of the model's, with weights of another dtype; None: the model's own.

        Returns:
            float [B, E, D], E being T / 2
        """
        model = self.model
        groups = torch.split(features, encoder_batch_size(model.device) or len(features))
        states = [
            run_encoder(encoder or model.model.encoder, group.to(model.device, model.dtype))
            for group in groups
        ]
        return torch.cat(states)


def run_encoder(encoder: Any, features: Tensor) -> Tensor:
    """Return float [B, E, D]: the encoder states of log-mels, also of less than a window.

    Args:
        encoder: of a Whisper in transformers.
        features: float [B, M, T]: T is even, and at most the window's.
    """
    if features.shape[-1] < FRAMES_PER_POSITION * encoder.max_source_positions:
        return run_encoder_on_part(encoder, features)
    states: Tensor = encoder(features).last_hidden_state
    return states


def run_encoder_on_part(encoder: Any, features: Tensor) -> Tensor:
    """Return float [B, E, D]: as `run_encoder`, of any part of the window.

    transformers' forward pass takes nothing but a whole one, of which this computes the same bits.
    """
    states = functional.gelu(encoder.conv1(features))
    states = functional.gelu(encoder.conv2(states)).permute(0, 2, 1)
    states = states + encoder.embed_positions.weight[: states.shape[1]]
    states = functional.dropout(states, p=encoder.dropout, training=encoder.training)
    for layer in encoder.layers:
        output = layer(states, None)
        # Layers of some versions of transformers return a tuple.
        states = output[0] if isinstance(output, tuple) else output
    normalized: Tensor = encoder.layer_norm(states)
    return normalized


def load_whisper(
    folder: ModelFolder,
    dtype: DecodingDtype | torch.dtype = "float32",
    attention: Attention = "auto",
    device: torch.device | str = "cpu",
) -> Whisper:
    """Return the model of a folder in evaluation mode, whatever dtype its weights have on disk.

    Raises:
        ConfigError: a file cannot be loaded, weights are not finite or contradict config.json, the
            attention implementation is not installed, or there are no products of 8 bits here.
    """
    device, rounded = torch.device(device), dtype == "int8"
    if isinstance(dtype, str):
        dtype = torch.float32 if dtype == "int8" else torch_dtype(dtype, device)
    # Without `dtype`, transformers 5 keeps the file's: float16 weights would train in float16.
    with _blamed_on(folder.path):
        model, report = WhisperForConditionalGeneration.from_pretrained(
            folder.path,
            dtype=dtype,
            attn_implementation=suitable_attention(attention, device, dtype),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    # transformers leaves missing weights at random values, with no more than a warning.
    if missing := sorted(set(report["missing_keys"]) - {"proj_out.weight"}):
        raise ConfigError(f"{folder.path}: weights are missing: {', '.join(missing[:5])} ...")
    _check_head(model, folder)
    _check_finite(model, folder)
    tokenizer = load_tokenizer(folder)
    with _blamed_on(folder.processor):
        extractor = WhisperFeatureExtractor.from_pretrained(folder.processor, local_files_only=True)
    tokens = special_tokens(tokenizer, folder)
    model.generation_config = completed_generation_config(model, tokens)
    model.to(device).eval()
    if rounded:
        round_linear_layers(model)
    return Whisper(model, tokenizer, extractor, tokens, folder.processor)


def load_tokenizer(folder: ModelFolder) -> WhisperTokenizer:
    """Return the tokenizer of a model folder.

    Raises:
        ConfigError: its files cannot be loaded, or contradict each other.
    """
    with _blamed_on(folder.processor):
        tokenizer = WhisperTokenizer.from_pretrained(folder.processor, local_files_only=True)
    # A token more in added_tokens.json than in tokenizer.json moves the ids of all that follow.
    loaded: dict[str, int] = tokenizer.get_vocab()
    stated = {**loaded, **folder.vocabulary}
    moved = [token for token, id in loaded.items() if id != stated[token]]
    if moved or max(loaded.values()) >= folder.config["vocab_size"]:
        token = max(moved or loaded, key=loaded.__getitem__)
        raise ConfigError(
            f"{folder.processor}: the files of the tokenizer contradict each other: {token} is "
            f"token {loaded[token]} of {folder.config['vocab_size']}, or {stated[token]}; save the "
            "tokenizer again with save_pretrained of transformers"
        )
    return tokenizer


@contextlib.contextmanager
def _blamed_on(folder: Path) -> Iterator[None]:
    """Turn whatever a library raises while it loads a folder's files into a ConfigError."""
    try:
        yield
    except Exception as error:  # a wrong file makes transformers fail with any class
        what = " ".join(str(error).split())
        raise ConfigError(f"{folder}: cannot be loaded: {type(error).__name__}: {what}") from error


def _check_head(model: WhisperForConditionalGeneration, folder: ModelFolder) -> None:
    """Raise ConfigError if the output head is not the token embedding, though config.json says so.

    transformers would decode with this head; whatever is built from config.json has room for one.
    """
    embedding = model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and model.proj_out.weight is not embedding:
        raise ConfigError(
            f"{folder.path}: by config.json the output head is the token embedding, but the "
            "weights hold another one, proj_out.weight: if it was trained, set "
            '"tie_word_embeddings" to false in config.json; if not, save the model without it'
        )


def _check_finite(model: WhisperForConditionalGeneration, folder: ModelFolder) -> None:
    """Raise ConfigError if a weight is NaN or infinite: nothing could be computed with it."""
    for name, weight in model.named_parameters():
        # The extremes are NaN if any value is; ten times as fast as looking at each value.
        if torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all():
            continue
        plain_name = name.removeprefix("model.")
        stored = read_tensor(tensors_in(folder.path, plain_name)[plain_name])
        if torch.isfinite(stored).all():
            remedy = f'some are too large for {model.dtype}: set the dtype "float32"'
        else:
            remedy = "the file is damaged, or the training that wrote it has diverged"
        raise ConfigError(f"{folder.path}: the weights {name} are not finite: {remedy}")


def save_whisper(
    model: WhisperForConditionalGeneration,
    processor_folder: Path,
    folder: Path,
    documents: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write a complete model folder; a kill leaves no half-written one that could be loaded.

    Args:
        model: saved in its own dtype as safetensors.
        processor_folder: where tokenizer and feature extractor are copied from, byte for byte.
        folder: files of the same names are replaced, one by one; others stay.
        documents: file name -> content of further files to write beside the model.

    Raises:
        ConfigError: a folder that is not ours is in the way.
        DataError: the weights cannot be written.
    """
    partial = new_folder(folder / ".writing")
    try:
        model.save_pretrained(partial)
    except SafetensorError as error:  # no OSError, also where the disk is full
        raise DataError(
            f"{folder} cannot be written: {error}: make room, and run the same command again"
        ) from None
    for weights in partial.glob("*.safetensors"):
        shutil.copymode(partial / MARK, weights)  # which safetensors lets nobody else read
    copy_processor(processor_folder, partial)
    for name, content in documents.items():
        (partial / name).write_bytes(content)
    # config.json comes last: without it, no program takes the folder for a model.
    files = [path for path in partial.iterdir() if path.name != MARK]
    for path in sorted(files, key=lambda path: path.name == "config.json"):
        path.replace(folder / path.name)
    remove_own(partial)


def copy_processor(source: Path, folder: Path) -> None:
    """Copy the files of tokenizer and feature extractor into a model folder."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "preprocessor_config.json").exists():
        # transformers 5 saves processor_config.json instead; faster-whisper, which does not know
        # that file, would assume 80 mel bins, also for large-v3.
        WhisperFeatureExtractor.from_pretrained(source, local_files_only=True).save_pretrained(
            folder
        )


@torch.inference_mode()
def computes_finite_logits(whisper: Whisper) -> bool:
    """Return whether the model, given silence and its start token, computes finite logits."""
    extractor = whisper.feature_extractor
    features = torch.zeros(1, extractor.feature_size, extractor.nb_max_frames)
    start = torch.tensor([[whisper.tokens.start]])
    logits = whisper.model(features, decoder_input_ids=start).logits
    return bool(torch.isfinite(logits).all())


def quieten_libraries() -> None:
    """Keep the libraries' progress bars and advice out of the log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning per worker process
    transformers.utils.logging.disable_progress_bar()
    for name in ("transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
