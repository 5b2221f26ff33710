"""AdamW over the student's trained parameters, and the learning rate of each step."""

import math
from typing import Any

import torch
from torch import nn

from simpler_distil_whisper.training.options import OptimizerOptions, ScheduleKind


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters for an optimizer: no decay on biases and layer norms."""
    # parameters() yields a tensor that two names share, like the output head, once.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, options: OptimizerOptions) -> torch.optim.AdamW:
    """Return the optimizer of a model's trained parameters."""
    return torch.optim.AdamW(
        parameter_groups(model, options.weight_decay),
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
