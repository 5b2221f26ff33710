"""The bare matrix products of a Whisper: no decoder of the same arithmetic can be faster.

Owns every product of encoder and decoder for a batch of windows, at its true size, in memory that
is allocated already, and nothing between them: no softmax, no normalisation, no choice of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROMPT_TOKENS = 4


@dataclass(frozen=True)
class Product:
    """`times` products of [count, rows, inner] and [count, inner, columns]."""

    rows: int
    inner: int
    columns: int
    times: int = 1
    count: int = 1

    @property
    def flops(self) -> int:
        """The number of additions and multiplications."""
        return 2 * self.rows * self.inner * self.columns * self.times * self.count


def matrix_products(config: Any, windows: int, tokens: int) -> list[Product]:
    """Return all products for a batch of windows with `tokens` new tokens each.

    The prompt is read at once; the self-attention has its average number of keys in every step.
    """
    width, frames, positions = config.d_model, config.max_source_positions * 2, PROMPT_TOKENS
    states, head = windows * config.max_source_positions, width // config.encoder_attention_heads
    heads, layers = config.encoder_attention_heads, config.encoder_layers
    encoder = [
        Product(windows * frames, 3 * config.num_mel_bins, width),
        Product(states, 3 * width, width),
        Product(states, width, 3 * width, layers),
        Product(states, width, width, layers),
        Product(states, width, config.encoder_ffn_dim, layers),
        Product(states, config.encoder_ffn_dim, width, layers),
        # One window after the other: the scores of all windows would not fit into any cache.
        Product(states // windows, head, states // windows, layers * windows, heads),
        Product(states // windows, states // windows, head, layers * windows, heads),
    ]
    heads, layers = config.decoder_attention_heads, config.decoder_layers
    head, keys = width // heads, positions + tokens // 2
    decoder = [Product(states, width, 2 * width, layers)]
    for rows, times in ((positions * windows, 1), (windows, tokens - 1)):
        queries, steps = rows // windows, layers * times
        decoder += [
            Product(rows, width, 3 * width, steps),
            Product(rows, width, width, 3 * steps),
            Product(rows, width, config.decoder_ffn_dim, steps),
            Product(rows, config.decoder_ffn_dim, width, steps),
            Product(queries, head, keys, steps, windows * heads),
            Product(queries, keys, head, steps, windows * heads),
            Product(queries, head, config.max_source_positions, steps, windows * heads),
            Product(queries, config.max_source_positions, head, steps, windows * heads),
            Product(windows, width, config.vocab_size, times),
        ]
    return encoder + decoder


def bare_products(
    products: list[Product], device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """Return a function that computes all products once, one kind after the other."""
    operands = [_operands(product, device, dtype) for product in products]

    @torch.inference_mode()
    def compute() -> None:
        for product, (left, right, out) in zip(products, operands, strict=True):
            multiply: Any = torch.mm if product.count == 1 else torch.bmm
            for _ in range(product.times):
                multiply(left, right, out=out)

    return compute


def _operands(
    product: Product, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for both factors, the second transposed as weights are, and the result."""
    left = torch.ones(product.count, product.rows, product.inner, device=device, dtype=dtype)
    right = torch.ones(product.count, product.columns, product.inner, device=device, dtype=dtype)
    out = torch.empty(product.count, product.rows, product.columns, device=device, dtype=dtype)
    right = right.transpose(1, 2)
    return (left[0], right[0], out[0]) if product.count == 1 else (left, right, out)
