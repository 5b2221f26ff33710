"""What the dropped layers did, given to the last product of the kept layer before them.

Each decoder layer ends by adding W h + b to the states, h the activations of its feed-forward part.
W and b of a kept layer are fitted anew, by least squares on some utterances, so that the states
after it are those after the dropped layers that followed it in the teacher. The student has as many
parameters as before, and is close to its teacher before any training. ReplaceMe (Shopkhoev et al.
2025, arXiv 2505.02819) does the like with blocks of a language model: one linear map, folded into
the product before them.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from simpler_distil_whisper.layers.scoring import EncodedBatch, only
from simpler_distil_whisper.layers.search import Layers
from simpler_distil_whisper.training.cross_attention import use_fast_cross_attention
from simpler_distil_whisper.training.losses import IGNORE_INDEX
from simpler_distil_whisper.training.models import last_states

# The penalty on the change of W and b weighs as much as this many tokens: the fewer there are, the
# closer both stay to what they were. On Whisper base 23 are too few for a fit on 2,300 tokens and
# 230 are right; for one on 9,300 tokens it hardly matters.
RIDGE_TOKENS = 200


def refitted_decoder(teacher: Any, layers: Layers, batches: Sequence[EncodedBatch]) -> Any:
    """Return a student's decoder: these layers of the teacher's, refitted, in float32.

    Args:
        teacher: the decoder of a Whisper in transformers.
        layers: which are kept.
        batches: of utterances with the teacher's states.
    """
    with only(teacher, layers):
        decoder = copy.deepcopy(teacher).float().requires_grad_(False)
    use_fast_cross_attention(decoder)
    refit(decoder, layers, batches)
    return decoder


@torch.no_grad()
def refit(decoder: Any, layers: Layers, batches: Sequence[EncodedBatch]) -> None:
    """Fit the last product of each layer of a student's decoder, in place, from first to last.

    What a layer is given are the student's own states, after the layers before it were fitted.
    Without any utterance it stays as it is.

    Args:
        decoder: of a Whisper in transformers, in float32.
        layers: which of the teacher's layers it has.
        batches: of utterances with the teacher's states.
    """
    for place, layer in enumerate(decoder.layers):
        following = layers[place + 1] if place + 1 < len(layers) else -1
        weight = torch.cat([layer.fc2.weight, layer.fc2.bias[:, None]], 1).double()
        width = weight.shape[1]
        products = weight.new_zeros(width, width)
        missing = weight.new_zeros(width, len(weight))
        tokens = 0
        for batch in batches:
            given, before = _given_to_last_product(decoder, layer, batch)
            real = _real_positions(batch.labels)
            activations = torch.nn.functional.pad(given[real], (0, 1), value=1.0).double()
            added = (batch.residuals[:, following][real].float() - before[real]).double()
            products += activations.T @ activations
            missing += activations.T @ (added - activations @ weight.T)
            tokens += len(activations)
        if not tokens:
            return
        products.diagonal().add_(RIDGE_TOKENS / tokens * products.diagonal().mean())
        change = torch.linalg.solve(products, missing).T.float()
        layer.fc2.weight += change[:, :-1]
        layer.fc2.bias += change[:, -1]


def _given_to_last_product(decoder: Any, layer: Any, batch: EncodedBatch) -> tuple[Tensor, Tensor]:
    """Return float [B, L, F] and [B, L, D]: its activations, and the states that it adds to."""
    with _inputs_of(layer.fc2, layer.final_layer_norm) as seen:
        last_states(decoder, batch.inputs, batch.encoder_states.float())
    return seen[0], seen[1]


@contextmanager
def _inputs_of(*modules: Any) -> Iterator[dict[int, Tensor]]:
    """Record the input of some modules in what is run inside a `with` block."""
    seen: dict[int, Tensor] = {}

    def recorder(number: int) -> Any:
        return lambda _, inputs: seen.__setitem__(number, inputs[0])

    handles = [
        module.register_forward_pre_hook(recorder(number)) for number, module in enumerate(modules)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _real_positions(labels: Tensor) -> Tensor:
    """Return bool [B, L]: prompt and label, without the padding after them."""
    return (labels != IGNORE_INDEX).flip(1).cumsum(1).flip(1) > 0
