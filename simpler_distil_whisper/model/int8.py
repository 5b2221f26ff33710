"""Linear layers in whole numbers of 8 bits, for decoding on a CPU.

Weights are rounded once, those of each output in steps of their own. What they are multiplied by is
rounded at each call, each position in steps of its own, so that a text does not depend on what else
is in its batch. Sums are exact, in 32 bits, so every CPU computes the same.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.config import ConfigError

ENGINE = "fbgemm"
INPUT_STEPS = 255  # from the least value of a position to its greatest
# From 0 to the greatest weight, in both directions. Not 127: a CPU without instructions for these
# products adds them in pairs in 16 bits, and two of 255 * 127 would overflow.
WEIGHT_STEPS = 63
SMALLEST_STEP = 1e-30  # where all values are the same


class Int8Linear(nn.Module):
    """A linear layer whose products are of 8 bits; what goes in and comes out is float32.

    Attributes:
        weight: int8 [N, K]: in steps.
        steps: float32 [N]: how large they are for each output.
        bias: float32 [N].
    """

    weight: Tensor
    steps: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, steps: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("steps", steps)
        self.register_buffer("bias", bias)

    @classmethod
    def rounded(cls, linear: nn.Linear) -> "Int8Linear":
        """Return a linear layer with rounded weights."""
        weight = linear.weight.detach().float()
        steps = (weight.abs().amax(1) / WEIGHT_STEPS).clamp_min(SMALLEST_STEP)
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
        return cls((weight / steps[:, None]).round().to(torch.int8), steps, bias)

    @classmethod
    def joined(cls, layers: "Sequence[Int8Linear]") -> "Int8Linear":
        """Return one layer that computes what several compute of the same input."""
        parts = [(layer.weight, layer.steps, layer.bias) for layer in layers]
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))

    @functools.cached_property
    def _sums(self) -> Tensor:
        """float32 [N]: of the weights of each output."""
        return self.weight.sum(1) * self.steps

    @functools.cached_property
    def _packed(self) -> Any:
        """The weights in the order in which they are read."""
        weight = self.weight * self.steps[:, None]
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():  # torch has no other way to these products yet
            warnings.filterwarnings("ignore", "torch.quantize_per_", UserWarning)
            rounded = torch.quantize_per_channel(weight, self.steps, zeros, 0, torch.qint8)
        torch.backends.quantized.engine = ENGINE
        return torch.ops.quantized.linear_prepack(rounded, None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return float32 [..., N] of float32 [..., K]."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        least, most = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        step = ((most - least) / INPUT_STEPS).clamp_min(SMALLEST_STEP)
        # The first is a whole number of steps, so that 0 is exact: much of what GELU gives is near.
        first = (least / step).round()
        # W (first + count) step = W first step + (W count) step
        products = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            torch.addcmul(-first, flat, 1 / step), 1.0, 0, self._packed
        )
        outputs = torch.addcmul(self.bias, first * step, self._sums).addcmul_(products, step)
        return outputs.view(*inputs.shape[:-1], len(self.bias))


def round_linear_layers(model: WhisperForConditionalGeneration) -> None:
    """Replace all linear layers of encoder and decoder, and the output head, by `Int8Linear`.

    Raises:
        ConfigError: torch has no such products on the model's device.
    """
    engines = torch.backends.quantized.supported_engines
    known = (
        ENGINE in engines
        and hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
        and hasattr(torch, "quantize_per_channel")
    )
    if model.device.type != "cpu" or not known:
        raise ConfigError(
            f'model.dtype: "int8" needs an x86 CPU, and a torch that has {ENGINE}; here is torch '
            f'{torch.__version__} with {", ".join(engines)}, on {model.device}: set it to "auto"'
        )
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear.rounded(child))
