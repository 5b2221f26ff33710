"""Single tensors of a model folder, read without building the model.

Owns what the weight files alone can answer: a hash of the weights, whether two encoders are equal,
the output head, the number of parameters.
"""

import hashlib
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.folder import ModelFolder

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
HEAD = "decoder.embed_tokens.weight"  # Whisper's output head is its token embedding


def tensors_in(folder: Path, prefix: str) -> dict[str, Path]:
    """Return name -> file of the weights whose name begins with a prefix, sorted by name.

    Names are without the leading "model.", which folders saved from `WhisperModel` lack.

    Raises:
        ConfigError: there are none.
    """
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("model-*.safetensors"))
    tensors: dict[str, Path] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            names = [name.removeprefix("model.") for name in file.keys()]  # noqa: SIM118
        tensors |= {name: path for name in names if name.startswith(prefix)}
    if not tensors:
        what = f'whose name begins with "{prefix}"' if prefix else "at all"
        raise ConfigError(f"{folder}: holds no weights {what}")
    return dict(sorted(tensors.items()))


def read_tensor(path: Path, name: str) -> Tensor:
    """Return one tensor of a file by its name without "model."."""
    with safe_open(path, "pt") as file:
        prefix = "" if name in set(file.keys()) else "model."
        tensor: Tensor = file.get_tensor(prefix + name)
        return tensor


def digest_of_weights(folder: Path, prefix: str = "") -> str:
    """Return a hash of the weights whose name begins with a prefix, however they are sharded.

    Raises:
        ConfigError: there are none.
    """
    digest = hashlib.sha256()
    for name, path in tensors_in(folder, prefix).items():
        tensor = read_tensor(path, name)
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def encoders_are_equal(one: ModelFolder, other: ModelFolder) -> bool:
    """Return whether both encoders compute the same: settings, and every weight in float32."""
    if any(one.config.get(name) != other.config.get(name) for name in ENCODER_SETTINGS):
        return False
    ours, theirs = tensors_in(one.path, "encoder."), tensors_in(other.path, "encoder.")
    return ours.keys() == theirs.keys() and all(
        torch.equal(read_tensor(ours[name], name).float(), read_tensor(theirs[name], name).float())
        for name in ours
    )


def output_head(folder: ModelFolder) -> Tensor:
    """Return [V, D], in the dtype of the file: the weights that turn decoder states into logits."""
    tensors = tensors_in(folder.path, "")
    untied = folder.config.get("tie_word_embeddings") is False and "proj_out.weight" in tensors
    name = "proj_out.weight" if untied else HEAD
    if name not in tensors:
        raise ConfigError(f"{folder.path}: holds no {name}")
    return read_tensor(tensors[name], name)


def parameter_count(folder: ModelFolder) -> int:
    """Return how many parameters a model has; what head and embedding share counts once."""
    tied = folder.config.get("tie_word_embeddings") is not False
    total = 0
    for name, path in tensors_in(folder.path, "").items():
        if tied and name == "proj_out.weight":
            continue
        with safe_open(path, "pt") as file:
            stored = name if name in set(file.keys()) else f"model.{name}"
            total += math.prod(file.get_slice(stored).get_shape())
    return total


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
