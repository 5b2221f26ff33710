"""AdamW over the student's trained parameters, and the learning rate of each step."""

import math
from typing import Any

import torch
from torch import nn

from simpler_distil_whisper.training.options import OptimizerOptions, ScheduleKind


def parameter_groups(
    model: nn.Module, weight_decay: float, encoder_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Return the trained parameters for an optimizer: no decay on biases and layer norms.

    Args:
        model: a Whisper, or a module that holds one.
        weight_decay: of the other parameters.
        encoder_factor: the encoder's learning rate, as a share of that of the rest: "lr_scale" of
            its groups.
    """
    # named_parameters() yields a tensor that two names share, like the output head, once.
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for scale in dict.fromkeys((1.0, encoder_factor)):
        groups |= {(scale, True): [], (scale, False): []}
    for name, parameter in trained:
        scale = encoder_factor if "model.encoder." in name else 1.0
        groups[scale, parameter.ndim >= 2].append(parameter)
    return [
        {"params": params, "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        for (scale, decayed), params in groups.items()
    ]


def make_optimizer(
    model: nn.Module, options: OptimizerOptions, encoder_factor: float = 1.0
) -> torch.optim.AdamW:
    """Return the optimizer of a model's trained parameters; see `parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model, options.weight_decay, encoder_factor),
        lr=0.0,  # each step sets its own
        betas=(options.betas[0], options.betas[1]),
        eps=options.epsilon,
        fused=True,
    )


def learning_rate_factor(kind: ScheduleKind, step: int, warmup_steps: int, max_steps: int) -> float:
    """Return the learning rate of step `step`, counted from 0, as a share of the highest one.

    It rises linearly over the warm-up, is 1 in the step after it, then stays or falls so that it
    would be 0 at `max_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
