"""What the headers of a folder's weight files state, read without torch: names, shapes, dtypes.

Owns the check that the weights are a whole Whisper of the sizes in config.json. It is made before
anything is allocated, so that a wrong size cannot take all memory. It reads no values.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from simpler_distil_whisper.config import ConfigError

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
ATTENTIONS = {"encoder": ["self_attn"], "decoder": ["self_attn", "encoder_attn"]}
OTHER_NAMES = ("encoder.blocks.", "decoder.blocks.")  # of openai-whisper and of MLX
SHOWN = 3  # names of tensors in a message
LFS_POINTER = b"version https://git-lfs"

# The tensor and its axis by which the weights show a size of config.json.
SIZES = {
    "vocab_size": ("decoder.embed_tokens.weight", 0),
    "d_model": ("decoder.embed_tokens.weight", 1),
    "num_mel_bins": ("encoder.conv1.weight", 1),
    "max_source_positions": ("encoder.embed_positions.weight", 0),
    "max_target_positions": ("decoder.embed_positions.weight", 0),
    "encoder_ffn_dim": ("encoder.layers.0.fc1.weight", 0),
    "decoder_ffn_dim": ("decoder.layers.0.fc1.weight", 0),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored, under which name, and what its file's header states of it."""

    file: Path
    stored_name: str
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would load: one, or the shards that the index names.

    Raises:
        ConfigError: there are none, or the index names files that are not in the folder.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / INDEX
    if not index.is_file():
        raise ConfigError(f"{folder} holds no model.safetensors, nor {INDEX}")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f'{index}: no "weight_map" can be read from it: {error!r}') from None
    files = []
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{index}: {name!r} is no name of a file in this folder")
        if not (folder / name).is_file():
            raise ConfigError(f"{index}: names {name}, which is missing: download the folder again")
        files.append(folder / name)
    if not files:
        raise ConfigError(f'{index}: its "weight_map" is empty')
    return files


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder by name, sorted.

    Names are without the leading "model.", which folders saved from `WhisperModel` lack.

    Raises:
        ConfigError: a file is missing, damaged or incomplete.
    """
    tensors = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "np") as file:
                for stored_name in file.keys():  # noqa: SIM118
                    header = file.get_slice(stored_name)
                    shape, dtype = tuple(header.get_shape()), header.get_dtype()
                    name = stored_name.removeprefix("model.")
                    tensors[name] = StoredTensor(path, stored_name, dtype, shape)
        except (SafetensorError, OSError, ValueError) as error:
            with path.open("rb") as file:
                pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
            why = f"damaged or incomplete ({error}): get it again"
            if pointer:
                why = "a pointer of Git LFS: run git lfs pull in its folder"
            raise ConfigError(f"{path}: {why}") from None
    return dict(sorted(tensors.items()))


def sizes_of(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Return the sizes of config.json as the weights show them.

    Raises:
        ConfigError: a tensor that every Whisper has is missing, or has other axes.
    """
    sizes = {}
    for key, (name, axis) in SIZES.items():
        if name not in tensors:
            others = ", ".join([*tensors][:SHOWN]) or "no tensor"
            problem = f"weights are missing: {name}; it has {others} ..."
            if any(each.startswith(OTHER_NAMES) for each in tensors):
                problem += " These are names of openai-whisper and MLX: name the model in "
                problem += "transformers' format"
            raise ConfigError(f"{folder}: {problem}")
        shape = tensors[name].shape
        if len(shape) != (3 if "conv" in name else 2) or 0 in shape:
            raise ConfigError(f"{tensors[name].file}: {name} has the shape {list(shape)}")
        sizes[key] = shape[axis]
    for part in ("encoder", "decoder"):
        numbers = {m[1] for name in tensors if (m := re.match(rf"{part}\.layers\.(\d+)\.", name))}
        sizes[f"{part}_layers"] = len(numbers)
    return sizes


def size_problems(
    path: Path,
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    tensors: Mapping[str, StoredTensor],
) -> Iterator[str]:
    """Yield each way in which the content of a config.json and the tensors do not fit."""
    for key, size in sizes.items():
        stated = config.get(key)
        if type(stated) is not int or stated != size:
            shown = "is missing" if stated is None else f"is {stated!r:.40}"
            yield f"{path}: {key} {shown}, by the weights it is {size}"
    untied = config.get("tie_word_embeddings") is False
    expected = dict(_shapes(sizes, untied))
    if missing := [name for name in expected if name not in tensors]:
        yield f"{path.parent}: weights are missing: {_first(missing)}"
    present = [name for name in expected if name in tensors]
    if other := [name for name in present if tensors[name].shape != expected[name]]:
        shape, right = tensors[other[0]].shape, expected[other[0]]
        yield f"{path.parent}: weights of shape {shape} instead of {right}: {_first(other)}"
    if other := [name for name in present if tensors[name].dtype not in FLOATS]:
        dtype = tensors[other[0]].dtype
        yield (
            f"{path.parent}: weights are {dtype}, not floating point: {_first(other)}; "
            "quantised models are not read: name the model from which this one was made"
        )


def unused_tensors(sizes: Mapping[str, int], tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return the names of the tensors that a Whisper of these sizes does not have."""
    known = dict(_shapes(sizes, untied=True))
    return [name for name in tensors if name not in known]


def _shapes(sizes: Mapping[str, int], untied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor of a Whisper."""
    width, vocabulary = sizes["d_model"], sizes["vocab_size"]
    yield "encoder.conv1.weight", (width, sizes["num_mel_bins"], 3)
    yield "encoder.conv2.weight", (width, width, 3)
    yield "encoder.conv1.bias", (width,)
    yield "encoder.conv2.bias", (width,)
    yield "encoder.embed_positions.weight", (sizes["max_source_positions"], width)
    yield "decoder.embed_positions.weight", (sizes["max_target_positions"], width)
    yield "decoder.embed_tokens.weight", (vocabulary, width)
    if untied:
        yield "proj_out.weight", (vocabulary, width)
    for part, attentions in ATTENTIONS.items():
        norms = [f"{part}.layer_norm"]
        for layer in (f"{part}.layers.{number}" for number in range(sizes[f"{part}_layers"])):
            inner = sizes[f"{part}_ffn_dim"]
            yield f"{layer}.fc1.weight", (inner, width)
            yield f"{layer}.fc1.bias", (inner,)
            yield f"{layer}.fc2.weight", (width, inner)
            yield f"{layer}.fc2.bias", (width,)
            norms.append(f"{layer}.final_layer_norm")
            for attention in attentions:
                norms.append(f"{layer}.{attention}_layer_norm")
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    yield f"{layer}.{attention}.{projection}.weight", (width, width)
                    if projection != "k_proj":
                        yield f"{layer}.{attention}.{projection}.bias", (width,)
        for norm in norms:
            yield f"{norm}.weight", (width,)
            yield f"{norm}.bias", (width,)


def _first(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
