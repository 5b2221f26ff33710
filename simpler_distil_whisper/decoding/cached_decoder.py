"""A Whisper's decoder, run token by token with a cache of keys and values.

The weights are those of transformers' decoder; the order of the work is ours. Cross-attention keys
and values are computed once per utterance, those of the self-attention are written into memory
allocated at the start, and rows that have ended are dropped. Tokens are chosen by `search.py`.

Letters of shapes besides those in `data/features.py`: U utterances, K beams of each, R = U * K.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.model.head import multiply_by_head
from simpler_distil_whisper.model.int8 import Int8Linear

Product: TypeAlias = Callable[[Tensor], Tensor]
QUERIES, KEYS_VALUES = "q_proj", ("k_proj", "v_proj")  # transformers' names


@dataclass
class KeyValueCache:
    """Keys and values of R rows of tokens about U utterances.

    Attributes:
        self_attention: float [layers, 2, R, H, capacity, D/H]: keys and values of the tokens so
            far.
        cross_attention: float [layers, 2, U, H, E, D/H]: keys and values of the encoder states.
        padding_mask: float [U, 1, 1, E]: added to the scores: minus infinity for encoder states
            that are padding, else 0; None: none is.
        lengths: int64 [R]: how many tokens each row has; memory behind them is overwritten.
        longest: the greatest of the lengths.
        even: whether all lengths are the same.
    """

    self_attention: Tensor
    cross_attention: Tensor
    padding_mask: Tensor | None
    lengths: Tensor
    longest: int
    even: bool

    def repeat(self, beams: int) -> None:
        """Make `beams` rows of each."""
        self.self_attention = self.self_attention.repeat_interleave(beams, dim=2)
        self.lengths = self.lengths.repeat_interleave(beams)

    def reorder(self, rows: Tensor) -> None:
        """Continue row i from the tokens of row `rows[i]`, which is of the same utterance."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        there = rows[moved]
        self.self_attention[:, :, moved, :, : self.longest] = self.self_attention[
            :, :, there, :, : self.longest
        ]

    def keep(self, order: Tensor, beams: int = 1) -> None:
        """Keep some utterances and drop the others.

        Args:
            order: int64 [U']: the old indices of those to keep, as `indices_to_keep` orders them:
                most stay in place, and only the few that move are copied.
            beams: rows of each utterance.
        """
        places = torch.arange(len(order), device=order.device)
        moved = order != places
        here, there = places[moved], order[moved]
        self.cross_attention[:, :, here] = self.cross_attention[:, :, there]
        self.cross_attention = self.cross_attention[:, :, : len(order)]
        if self.padding_mask is not None:
            self.padding_mask = self.padding_mask[order]
        if beams > 1:
            offsets = torch.arange(beams, device=order.device)
            here = (here[:, None] * beams + offsets).flatten()
            there = (there[:, None] * beams + offsets).flatten()
        self.self_attention[:, :, here, :, : self.longest] = self.self_attention[
            :, :, there, :, : self.longest
        ]
        self.self_attention = self.self_attention[:, :, : len(order) * beams]
        self.lengths[here] = self.lengths[there]
        self.lengths = self.lengths[: len(order) * beams]
        if not self.even and len(order):  # the longest may be gone
            self._measure()

    def advance(self, count: Tensor | int) -> None:
        """Add to the lengths: the same number for all rows, or int64 [R]."""
        self.lengths = self.lengths + count
        if isinstance(count, int):  # then no GPU need be waited for
            self.longest += count
        else:
            self._measure()

    def _measure(self) -> None:
        self.longest = int(self.lengths.max())
        self.even = bool((self.lengths == self.longest).all())


def indices_to_keep(ended: Tensor) -> Tensor:
    """Return int64 [U']: the indices of the utterances to keep, given bool [U]: which have ended.

    Gaps are filled from the end, so that as few utterances as possible change their place.
    """
    alive = (~ended).nonzero()[:, 0]
    count = len(alive)
    order = torch.arange(count, device=ended.device)
    order[ended[:count]] = alive[alive >= count]
    return order


class CachedDecoder:
    """The decoder of a Whisper with a cache of preallocated memory.

    It copies the projections of queries, keys and values, which it fuses: make it anew when the
    weights have changed.
    """

    def __init__(self, model: WhisperForConditionalGeneration) -> None:
        self.model = model
        self.decoder = model.model.decoder
        config = model.config
        self.heads: int = config.decoder_attention_heads
        self.width: int = config.d_model
        self.head_width = self.width // self.heads
        # One query a row is a few small matrix products: fused kernels only pay for many queries.
        self.explicit_attention = (
            config._attn_implementation == "eager" or model.device.type == "cpu"
        )
        self._head = _head(model)
        self._layers: list[Any] = list(self.decoder.layers)
        with torch.no_grad():
            self._self_projections = [
                _fused(layer.self_attn, QUERIES, *KEYS_VALUES) for layer in self._layers
            ]
            self._cross_projections = [
                _fused(layer.encoder_attn, *KEYS_VALUES) for layer in self._layers
            ]

    def start(self, states: Tensor, capacity: int, *, uneven: bool) -> KeyValueCache:
        """Return a cache with the cross-attention keys and values of some utterances, and no token.

        Args:
            states: float [U, E, D]: encoder states; NaN behind those of an utterance that has fewer
                than others.
            capacity: the most tokens that a row can have, its prompt included.
            uneven: whether the rows will come to have different lengths.
        """
        count, positions, _ = states.shape
        padding, padding_mask = states[..., 0].isnan(), None
        if padding.any():
            states = states.masked_fill(padding[..., None], 0.0)
            padding_mask = states.new_zeros(count, 1, 1, positions)
            padding_mask.masked_fill_(padding[:, None, None], -torch.inf)
        shape = (count, positions, 2, self.heads, self.head_width)
        first = self._cross_projections[0](states)
        cross = first.new_empty(len(self._layers), 2, count, self.heads, positions, self.head_width)
        for layer, project in enumerate(self._cross_projections):
            projected = first if layer == 0 else project(states)
            cross[layer] = projected.view(shape).permute(2, 0, 3, 1, 4)
        tokens = cross.new_empty(len(self._layers), 2, count, self.heads, capacity, self.head_width)
        if uneven:  # What a shorter row has not written is multiplied by its attention of zero.
            tokens.zero_()
        lengths = torch.zeros(count, dtype=torch.int64, device=states.device)
        return KeyValueCache(tokens, cross, padding_mask, lengths, longest=0, even=True)

    def read(self, ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Return float [R, L, D]: decoder states of the next tokens of each row.

        Their keys and values are written into the cache, but not counted: call
        `KeyValueCache.advance` with the number of tokens to keep.

        Args:
            ids: int64 [R, L]: the tokens that follow those in the cache.
            cache: of the tokens before them.
        """
        count = ids.shape[1]
        positions = cache.lengths[:, None] + torch.arange(count, device=ids.device)
        hidden = self.decoder.embed_tokens(ids) + self.decoder.embed_positions.weight[positions]
        visible = cache.longest + count
        mask = None
        if count > 1 or not cache.even:
            later = torch.arange(visible, device=ids.device) > positions[..., None]
            mask = torch.zeros(later.shape, dtype=hidden.dtype, device=ids.device)
            mask = mask.masked_fill_(later, torch.finfo(mask.dtype).min)[:, None]
        for number, layer in enumerate(self._layers):
            normed = layer.self_attn_layer_norm(hidden)
            queries, keys, values = self._project_and_append(number, normed, positions, cache)
            output = self._attend(queries, keys[:, :, :visible], values[:, :, :visible], mask)
            hidden = hidden + layer.self_attn.out_proj(_joined(output))
            normed = layer.encoder_attn_layer_norm(hidden)
            hidden = hidden + layer.encoder_attn.out_proj(self._cross_attend(number, normed, cache))
            normed = layer.final_layer_norm(hidden)
            hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(normed)))
        states: Tensor = self.decoder.layer_norm(hidden)
        return states

    def logits(self, states: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return float32 [..., V]: the logits of decoder states.

        Args:
            states: float [..., D]: decoder states.
            bias: float [V]: added; minus infinity for tokens that are ruled out.
        """
        # Autocast, in which a student in training is scored, would round them.
        with torch.autocast(states.device.type, enabled=False):
            logits = self._head(states.flatten(0, -2)).float()
        if bias is not None:
            logits += bias
        return logits.view(*states.shape[:-1], logits.shape[-1])

    def _project_and_append(
        self, number: int, normed: Tensor, positions: Tensor, cache: KeyValueCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries of the new tokens, and the keys and values of all tokens."""
        rows, count, _ = normed.shape
        fused = self._self_projections[number](normed)
        new = fused.view(rows, count, 3, self.heads, self.head_width)
        queries, new_keys, new_values = new.unbind(2)
        keys, values = cache.self_attention[number]
        if cache.even:
            places = slice(cache.longest, cache.longest + count)
            keys[:, :, places] = new_keys.transpose(1, 2)
            values[:, :, places] = new_values.transpose(1, 2)
        else:
            row = torch.arange(rows, device=normed.device)[:, None]
            keys[row, :, positions], values[row, :, positions] = new_keys, new_values
        return queries.transpose(1, 2), keys, values

    def _cross_attend(self, number: int, normed: Tensor, cache: KeyValueCache) -> Tensor:
        """Return float [R, L, D]: the attention output of the new tokens over the encoder states.

        The beams of an utterance share its keys, so they are further queries, not further rows.
        """
        rows, count, width = normed.shape
        keys, values = cache.cross_attention[number]
        queries = self._layers[number].encoder_attn.q_proj(normed)
        queries = queries.view(len(keys), -1, self.heads, self.head_width).transpose(1, 2)
        output = self._attend(queries, keys, values, cache.padding_mask)
        return _joined(output).view(rows, count, width)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Return float [R, H, L, D/H]: scaled dot-product attention."""
        if not self.explicit_attention:
            return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        scores = torch.matmul(queries * self.head_width**-0.5, keys.transpose(-1, -2))
        if mask is not None:
            scores = scores + mask
        return torch.matmul(scores.softmax(-1), values)


def _fused(attention: nn.Module, *names: str) -> Product:
    """Return the product with several projections of the same input, as one."""
    projections = [getattr(attention, name) for name in names]
    if isinstance(projections[0], Int8Linear):
        return Int8Linear.joined(projections)
    # Whisper's keys have no bias.
    biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in projections]
    weight = torch.cat([p.weight for p in projections])
    return functools.partial(functional.linear, weight=weight, bias=torch.cat(biases))


def _head(model: WhisperForConditionalGeneration) -> Product:
    """Return what makes [N, V] logits of [N, D] decoder states."""
    if isinstance(model.proj_out, Int8Linear):
        return model.proj_out
    # In float32 on a GPU, where it costs little: 16 bits round the differences of logits away.
    head = model.proj_out.weight.detach()
    head = head.float() if model.device.type == "cuda" else head
    return lambda states: multiply_by_head(states.to(head.dtype), head)


def _joined(heads: Tensor) -> Tensor:
    """Return float [R, L, D] of [R, H, L, D/H]."""
    return heads.transpose(1, 2).flatten(2)
