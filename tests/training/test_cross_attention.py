"""Cross-attention without keys and values: transformers' results and gradients, at less cost."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperDecoder

from simpler_distil_whisper.training.cross_attention import CrossAttention, use_fast_cross_attention

WIDTH, HEADS, POSITIONS, ROWS = 32, 4, 50, 3
HEAD_WIDTH = WIDTH // HEADS


def decoders(dropout: float = 0.0) -> tuple[WhisperDecoder, WhisperDecoder]:
    """Return a decoder as transformers has it, and the same with the other cross-attention."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=40,
        d_model=WIDTH,
        decoder_layers=2,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=64,
        attention_dropout=dropout,
        pad_token_id=0,
    )
    theirs = WhisperDecoder(config).double().eval()
    for parameter in theirs.parameters():  # biases are zero at first
        torch.nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(theirs)
    use_fast_cross_attention(ours)
    return theirs, ours


def results(decoder: WhisperDecoder, length: int) -> list[Tensor]:
    """Return the last states, and the gradients of all parameters and of the encoder states."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 40, (ROWS, length), generator=generator)
    dtype = next(decoder.parameters()).dtype
    states = torch.randn(ROWS, POSITIONS, WIDTH, generator=generator, dtype=dtype)
    states.requires_grad_()
    output = decoder(input_ids=ids, encoder_hidden_states=states).last_hidden_state
    weights = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    inputs = [states, *decoder.parameters()]
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    return [output.detach(), *gradients]


def flops(module: torch.nn.Module, *inputs: Tensor, **states: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, **states)
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [1, 2, HEAD_WIDTH - 1, HEAD_WIDTH, HEAD_WIDTH + 3])
def test_states_and_all_gradients_are_those_of_transformers(length: int) -> None:
    theirs, ours = (results(decoder, length) for decoder in decoders())
    assert len(theirs) == len(ours) > 40
    for expected, found in zip(theirs, ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_few_tokens_cost_a_share_of_what_keys_and_values_cost() -> None:
    """Of the multiplications, 2 L H E D instead of 2 E D² (and 2 L E D) of one layer."""
    config = WhisperConfig(d_model=WIDTH, decoder_attention_heads=HEADS)
    config._attn_implementation = "sdpa"
    attention = WhisperAttention(WIDTH, HEADS, is_decoder=True, layer_idx=0, config=config)
    tokens, states = torch.randn(1, 2, WIDTH), torch.randn(1, 1500, WIDTH)
    theirs = flops(attention, tokens, key_value_states=states)
    attention.__class__ = CrossAttention
    ours = flops(attention, tokens, key_value_states=states)
    products = 2 * 1500 * WIDTH  # of a token with one head's width of the states, both of its uses
    assert theirs >= 2 * products * WIDTH
    assert 2 * products * 2 * HEADS <= ours < 1.05 * 2 * products * 2 * HEADS


@pytest.mark.parametrize("positions", [1, 2, 10, POSITIONS, 1500])
def test_it_never_costs_more(positions: int) -> None:
    theirs, ours = decoders()
    for decoder in (theirs, ours):  # a fused attention's multiplications are not counted
        decoder.config._attn_implementation = "eager"
    states = torch.zeros(1, positions, WIDTH, dtype=torch.float64)
    shares = []
    for length in range(1, 2 * HEAD_WIDTH):
        ids = torch.ones(1, length, dtype=torch.int64)
        costs = [flops(each, ids, encoder_hidden_states=states) for each in (ours, theirs)]
        shares.append(costs[0] / costs[1])
    assert max(shares) == 1.0  # many tokens have keys and values
    assert (min(shares) < 0.7) == (positions >= 10)


def test_dropout_and_autocast_compute_the_bits_of_transformers() -> None:
    theirs, ours = decoders(dropout=0.5)
    pair = []
    for decoder in (theirs.train(), ours.train()):
        torch.manual_seed(1)
        pair.append(results(decoder, 3))
    assert all(torch.equal(*both) for both in zip(*pair, strict=True))

    theirs, ours = (decoder.float() for decoder in decoders())
    with torch.autocast("cpu", torch.bfloat16):
        pair = [results(decoder, 3) for decoder in (theirs, ours)]
    assert all(torch.equal(*both) for both in zip(*pair, strict=True))


def test_where_it_is_not_used_a_compiled_decoder_has_one_variant_for_all_lengths() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compiled.append(graph)
        return graph.forward

    attention = decoders()[1].float().layers[0].encoder_attn
    step = torch.compile(attention, dynamic=True, backend=backend)
    states = torch.randn(ROWS, POSITIONS, WIDTH)
    for length in (2, POSITIONS + 1):  # only with the first one it would be cheaper
        with torch.autocast("cpu", torch.bfloat16):
            step(torch.randn(ROWS, length, WIDTH), states)
    assert len(compiled) == 1


def test_parameters_keep_their_names_and_values() -> None:
    theirs, ours = (decoder.state_dict() for decoder in decoders())
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
