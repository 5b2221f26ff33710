"""The bare matrix products of a Whisper: no decoder of the same arithmetic can be faster.

Owns every product of encoder and decoder for a batch of windows, at its true size, in memory that
is allocated already, and nothing between them: no softmax, no normalisation, no choice of a token.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

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
    ways = [_fastest(_ways(product, device, dtype)) for product in products]

    @torch.inference_mode()
    def compute() -> None:
        for product, multiply in zip(products, ways, strict=True):
            for _ in range(product.times):
                multiply()

    return compute


def _ways(product: Product, device: torch.device, dtype: torch.dtype) -> list[Callable[[], Any]]:
    """Return how a product can be computed into memory that is there: from either side.

    The second factor is transposed, as weights are.
    """
    count, rows, inner, columns = product.count, product.rows, product.inner, product.columns
    left = torch.ones(count, rows, inner, device=device, dtype=dtype)
    right = torch.ones(count, columns, inner, device=device, dtype=dtype)
    out = torch.empty(count, rows, columns, device=device, dtype=dtype)
    if count > 1:
        return [functools.partial(torch.bmm, left, right.mT, out=out)]
    turned = out[0].view(columns, rows)
    return [
        functools.partial(torch.mm, left[0], right[0].T, out=out[0]),
        functools.partial(torch.mm, right[0], left[0].T, out=turned),
    ]


def _fastest(ways: list[Callable[[], Any]]) -> Callable[[], Any]:
    """Return the one that takes least processor time: libraries favour one side or the other."""

    def seconds(multiply: Callable[[], Any]) -> float:
        start = time.process_time()
        multiply()
        return time.process_time() - start

    return min(ways, key=lambda multiply: min(seconds(multiply) for _ in range(3)))
