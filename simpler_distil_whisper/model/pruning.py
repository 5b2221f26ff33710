"""Pruning: a copy of the teacher that keeps some of its layers.

Owns the choice of evenly spread layers, and renumbers everything that refers to a layer. It knows
nothing of files; layers are chosen by score in `layers/`.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing transformers takes seconds, choosing layers none
    from transformers import GenerationConfig, WhisperForConditionalGeneration


def spread_layers(available: int, count: int) -> list[int]:
    """Return `count` of `available` layer numbers, evenly spread, the first and the last included.

    A single layer is the last one. This is the choice of Gandhi et al. 2023 (section 3.1), with the
    rounding of their code: 32, 3 -> [0, 15, 31].

    Raises:
        ValueError: `count` is not between 1 and `available`.
    """
    if not 1 <= count <= available:
        raise ValueError(f"{count} layers of {available} cannot be kept")
    if count == 1:
        return [available - 1]
    return [i * (available - 1) // (count - 1) for i in range(count)]


def chosen_layers(available: int, count: int | None, indices: Sequence[int] | None) -> list[int]:
    """Return the layers that a config asks for: explicit `indices`, or `count` spread ones, or all.

    Raises:
        ValueError: a layer does not exist, is named twice or out of order, or the two disagree.
    """
    if indices is None:
        return spread_layers(available, available if count is None else count)
    kept = list(indices)
    if not kept or any(not 0 <= layer < available for layer in kept):
        raise ValueError(f"{kept}: the teacher's layers are 0 to {available - 1}")
    if kept != sorted(set(kept)):
        raise ValueError(f"{kept}: each layer once, in rising order")
    if count is not None and count != len(kept):
        raise ValueError(f"{kept} are {len(kept)} layers, but {count} are requested")
    return kept


def prune_whisper(
    teacher: "WhisperForConditionalGeneration",
    encoder_layers: Sequence[int],
    decoder_layers: Sequence[int],
) -> "WhisperForConditionalGeneration":
    """Return a new model with the named layers of the teacher and everything else copied.

    It is built from a new config and filled with the teacher's weights. Removing layers from the
    teacher's lists would leave the others their old `layer_idx`, by which they use the key-value
    cache.
    """
    config = copy.deepcopy(teacher.config)
    config.encoder_layers = len(encoder_layers)
    config.decoder_layers = len(decoder_layers)
    config.num_hidden_layers = len(encoder_layers)  # transformers: another name of encoder_layers
    student = type(teacher)(config).to(teacher.dtype)
    numbers = {
        f"model.{part}.layers.{old}.": f"model.{part}.layers.{new}."
        for part, kept in (("encoder", encoder_layers), ("decoder", decoder_layers))
        for new, old in enumerate(kept)
    }
    weights = {}
    for name, weight in teacher.state_dict().items():
        prefix = ".".join(name.split(".")[:4]) + "."
        if ".layers." not in name:
            weights[name] = weight
        elif prefix in numbers:
            weights[numbers[prefix] + name.removeprefix(prefix)] = weight
    student.load_state_dict(weights, strict=True)
    student.generation_config = _pruned_generation_config(teacher.generation_config, decoder_layers)
    return student.eval()


def _pruned_generation_config(
    teacher: "GenerationConfig", decoder_layers: Sequence[int]
) -> "GenerationConfig":
    """Return a deep copy in which `alignment_heads` name the student's layers, not the teacher's.

    They are [layer, head] pairs of the decoder, used for word timestamps. Those of pruned layers
    would be out of range. If none is left, the key is removed, so that users see that it is absent.
    """
    config = copy.deepcopy(teacher)
    heads = getattr(config, "alignment_heads", None)
    if heads is None:
        return config
    kept = [[decoder_layers.index(layer), head] for layer, head in heads if layer in decoder_layers]
    if kept:
        config.alignment_heads = kept
    else:
        del config.alignment_heads
    return config
