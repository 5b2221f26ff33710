"""The parts of a search that need no model."""

import pytest
import torch

from simpler_distil_whisper.decoding.search import (
    beside_parents,
    inverse_transform_sample,
    or_most_probable,
)


def test_tokens_are_drawn_in_proportion_to_their_probability() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 3.0, 2.0, -torch.inf]])
    randoms = torch.linspace(0, 1, 100_001)[:-1]
    tokens = inverse_transform_sample(logits.expand(len(randoms), -1), randoms)
    shares = tokens.bincount(minlength=5) / len(randoms)
    assert shares == pytest.approx(logits.softmax(-1)[0], abs=2e-5)
    assert inverse_transform_sample(logits, torch.tensor([0.0])).tolist() == [0], (
        "not what is impossible"
    )
    assert inverse_transform_sample(logits, torch.tensor([1.0])).tolist() == [3]
    drawn = torch.tensor([0, 1, 3, 4])  # by rounding also what is impossible
    assert or_most_probable(drawn, logits.expand(4, -1)).tolist() == [0, 2, 3, 2]


def test_beams_stay_where_the_tokens_lie_that_they_continue() -> None:
    parents = torch.randint(5, (200, 5), generator=torch.Generator().manual_seed(0))
    order = beside_parents(parents)
    assert torch.equal(order.sort(dim=1).values, torch.arange(5).expand(200, 5)), "each once"
    stay = (parents.gather(1, order) == torch.arange(5)).sum(dim=1)
    assert stay.tolist() == [len(set(row)) for row in parents.tolist()]
    assert beside_parents(torch.tensor([[2, 2, 0]])).tolist() == [[2, 1, 0]]
