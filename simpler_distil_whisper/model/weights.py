"""Single tensors of a model folder, read without building the model.

Owns what the weight files alone can answer: a hash of the weights, whether two encoders are equal,
the output head, the number of parameters.
"""

import functools
import hashlib
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.headers import StoredTensor, stored_tensors
from simpler_distil_whisper.model.settings import ConfigSettings

# Keys of config.json that encoder states depend on besides the weights and the audio.
ENCODER_SETTINGS = (
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "activation_function",
    "num_mel_bins",
    "max_source_positions",
    "scale_embedding",
)
DECODER_SETTINGS = ("decoder_layers", "decoder_attention_heads", "max_target_positions")
DTYPES = {  # by the names in the files
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
HEAD = "decoder.embed_tokens.weight"  # in Whisper the output head is the token embedding


def tensors_in(folder: Path, prefix: str) -> dict[str, StoredTensor]:
    """Return name -> place of the weights whose name begins with a prefix, sorted by name.

    Raises:
        ConfigError: there are none.
    """
    stored = stored_tensors(folder)
    tensors = {name: tensor for name, tensor in stored.items() if name.startswith(prefix)}
    if not tensors:
        what = f'whose name begins with "{prefix}"' if prefix else "at all"
        raise ConfigError(f"{folder}: holds no weights {what}")
    return tensors


def read_tensor(stored: StoredTensor) -> Tensor:
    """Return the values of a tensor, in the dtype of the file."""
    with safe_open(stored.file, "pt") as file:
        tensor: Tensor = file.get_tensor(stored.stored_name)
        return tensor


def stored_dtype(folder: ModelFolder) -> torch.dtype:
    """Return the dtype that the weights have on disk: of several one that rounds none of them.

    Raises:
        ConfigError: there are none.
    """
    stored = {tensor.dtype for tensor in tensors_in(folder.path, "").values()}
    dtypes = [dtype for name, dtype in DTYPES.items() if name in stored]
    return functools.reduce(torch.promote_types, dtypes)


def digest_of_weights(folder: Path, prefix: str = "") -> str:
    """Return a hash of the weights whose name begins with a prefix, however they are sharded.

    Raises:
        ConfigError: there are none.
    """
    digest = hashlib.sha256()
    for name, stored in tensors_in(folder, prefix).items():
        tensor = read_tensor(stored)
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def encoders_are_equal(one: ModelFolder, other: ModelFolder) -> bool:
    """Return whether both encoders compute the same: settings, and every weight in float32."""
    if _encoder_settings(one) != _encoder_settings(other):
        return False
    ours, theirs = tensors_in(one.path, "encoder."), tensors_in(other.path, "encoder.")
    return ours.keys() == theirs.keys() and all(
        torch.equal(read_tensor(ours[name]).float(), read_tensor(theirs[name]).float())
        for name in ours
    )


def _encoder_settings(folder: ModelFolder) -> dict[str, object]:
    """Return the settings of a folder's encoder, with transformers' value where it states none."""
    defaults = {name: field.default for name, field in ConfigSettings.model_fields.items()}
    return {name: folder.config.get(name, defaults.get(name)) for name in ENCODER_SETTINGS}


def output_head(folder: ModelFolder) -> Tensor:
    """Return [V, D], in the dtype of the file: the weights that turn decoder states into logits."""
    tensors = tensors_in(folder.path, "")
    untied = folder.config.get("tie_word_embeddings") is False and "proj_out.weight" in tensors
    name = "proj_out.weight" if untied else HEAD
    if name not in tensors:
        raise ConfigError(f"{folder.path}: holds no {name}")
    return read_tensor(tensors[name])


def parameter_count(folder: ModelFolder) -> int:
    """Return how many parameters a model has; what head and embedding share counts once."""
    tied = folder.config.get("tie_word_embeddings") is not False
    return sum(
        math.prod(tensor.shape)
        for name, tensor in tensors_in(folder.path, "").items()
        if not (tied and name == "proj_out.weight")
    )


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
