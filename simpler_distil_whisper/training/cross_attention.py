"""Cross-attention of a few tokens over many encoder positions, without keys and values.

Whisper projects all E encoder positions to keys and values in every decoder layer, however few
tokens look at them: 2 E D² multiplications, and as many for the gradients of the two weights. With
the queries q [L, d] of one head, its rows W_k and W_v [d, D] of the weights and the encoder states
x [E, D],

    q (x W_kᵀ)ᵀ = (q W_k) xᵀ    and    a (x W_vᵀ + b_v) = (a x) W_vᵀ + b_v,

since each row of the attention a [L, E] sums to 1. All H heads take 2 L H E D multiplications for
the products with x on the right-hand sides: L / d of those for keys and values, as H d = D.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperAttention


class CrossAttention(WhisperAttention):  # type: ignore[misc]  # transformers has no types
    """transformers' cross-attention, which does without keys and values where that is faster.

    That is measured on CPUs; a GPU's fused kernels need keys and values.
    """

    def forward(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **options: Any
    ) -> Any:
        """Return float [B, L, D] and None, or what transformers returns.

        Args:
            hidden_states: float [B, L, D]: of the tokens.
            key_value_states: float [B, E, D]: the encoder states.
            options: what else transformers' layers pass on.
        """
        states = key_value_states
        if states is None or not self._is_cheaper(hidden_states, states, options):
            return super().forward(hidden_states, key_value_states, **options)
        rows, length, width = hidden_states.shape
        heads = self.num_heads, self.head_dim
        queries = (self.q_proj(hidden_states) * self.scaling).view(rows, length, *heads)
        weight = self.k_proj.weight.view(*heads, width)
        queries = torch.einsum("BLHd,HdD->BHLD", queries, weight).flatten(1, 2)
        attention = (queries @ states.transpose(1, 2)).softmax(-1)
        attended = (attention @ states).view(rows, self.num_heads, length, width)
        weight = self.v_proj.weight.view(*heads, width)
        values = torch.einsum("BHLD,HdD->BLHd", attended, weight).flatten(2) + self.v_proj.bias
        return self.out_proj(values), None

    def _is_cheaper(self, hidden_states: Tensor, states: Tensor, options: dict[str, Any]) -> bool:
        """Return whether the right-hand sides take fewer multiplications, and nothing forbids them.

        Left, for a row, 2 E D (D + L); right 2 L D (H E + D).
        """
        # Sizes come last: torch.compile makes a variant for each answer to what depends on them.
        if (
            states.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or (self.training and self.dropout)
            or options.get("attention_mask") is not None
            or options.get("output_attentions")
        ):
            return False
        length, positions = hidden_states.shape[1], states.shape[1]
        left = positions * (self.embed_dim + length)
        right = length * (self.num_heads * positions + self.embed_dim)
        cheaper: bool = right < left
        return cheaper


def use_fast_cross_attention(decoder: nn.Module) -> None:
    """Let the layers of a Whisper decoder in transformers use `CrossAttention`, in place."""
    layers: Any = decoder.layers
    for layer in layers:
        layer.encoder_attn.__class__ = CrossAttention  # not its parameters, nor their names
