"""Refitted layers: what is solved, and that it brings a student closer to its teacher."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_corpus, make_model_folder

from simpler_distil_whisper.layers import scoring
from simpler_distil_whisper.layers.choice import finalists, refitted_kl
from simpler_distil_whisper.layers.refit import RIDGE_TOKENS, refitted_decoder
from simpler_distil_whisper.layers.rows import LayerScoring, select_rows
from simpler_distil_whisper.layers.scoring import EncodedBatch, LayerScorer
from simpler_distil_whisper.layers.search import LayerScore, ScoredLayers
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.pruning import prune_whisper
from simpler_distil_whisper.model.whisper import load_whisper


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with four decoder layers, and 60 clips."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("refit")
    layout: dict[str, Any] = {"decoder_layers": 4, "talkative": True}
    make_model_folder(folder / "teacher", languages=["en", "zh"], seed=5, **layout)
    make_corpus(folder, 60)
    return folder


@pytest.fixture(scope="module")
def scorer(folder: Path) -> LayerScorer:
    model_folder = read_model_folder(folder / "teacher", None, "teacher")
    whisper = load_whisper(model_folder)
    labelled = select_rows(LayerScoring(manifest=folder / "zh-0.jsonl"), model_folder)
    encoder = tuple(range(whisper.model.config.encoder_layers))
    return LayerScorer(whisper, encoder, labelled, lambda: None)


def states_of(
    model: Any, batches: Sequence[EncodedBatch], place: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Of a model in transformers, at the real positions of all batches.

    Returns the activations of a layer's feed-forward part, what its product is added to, and the
    states before each layer and after the last one.
    """
    layer = model.model.decoder.layers[place]
    activations, before, states = [], [], []
    for batch in batches:
        real = torch.arange(batch.labels.shape[1]) <= torch.tensor(
            [[int(row.ge(0).nonzero().max())] for row in batch.labels]
        )
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            layer.fc2.register_forward_pre_hook(lambda _, x, seen=seen: seen.update(h=x[0])),
            layer.final_layer_norm.register_forward_pre_hook(
                lambda _, x, seen=seen: seen.update(a=x[0])
            ),
            model.model.decoder.layer_norm.register_forward_pre_hook(
                lambda _, x, seen=seen: seen.update(last=x[0])
            ),
        ]
        with torch.no_grad():
            result = model.model.decoder(
                input_ids=batch.inputs,
                encoder_hidden_states=batch.encoder_states,
                output_hidden_states=True,
            )
        for hook in hooks:
            hook.remove()
        activations.append(seen["h"][real].double().numpy())
        before.append(seen["a"][real].double().numpy())
        through = [*result.hidden_states[:-1], seen["last"]]
        states.append([each[real].double().numpy() for each in through])
    joined = [np.concatenate(each) for each in zip(*states, strict=True)]
    return np.concatenate(activations), np.concatenate(before), joined


def plainly_refitted(teacher: Any, layers: tuple[int, ...], batches: Sequence[EncodedBatch]) -> Any:
    """Return the student with each layer's ridge regression solved as a longer least squares."""
    student = prune_whisper(teacher, range(teacher.config.encoder_layers), layers)
    *_, wanted = states_of(teacher, batches, 0)
    for place, layer in enumerate(student.model.decoder.layers):
        h, before, _ = states_of(student, batches, place)
        target = wanted[layers[place + 1] if place + 1 < len(layers) else -1]
        h = np.column_stack([h, np.ones(len(h))])
        old = torch.cat([layer.fc2.weight, layer.fc2.bias[:, None]], 1).detach().double().numpy()
        penalty = RIDGE_TOKENS * (h**2).mean()
        rows = np.concatenate([h, np.sqrt(penalty) * np.eye(h.shape[1])])
        missing = np.concatenate([target - before - h @ old.T, np.zeros((h.shape[1], len(old)))])
        new = old + np.linalg.lstsq(rows, missing, rcond=None)[0].T
        with torch.no_grad():
            layer.fc2.weight.copy_(torch.from_numpy(new[:, :-1]))
            layer.fc2.bias.copy_(torch.from_numpy(new[:, -1]))
    return student


@pytest.mark.parametrize("layers", [(0, 3), (1, 2), (0, 1, 3)])
def test_each_last_product_solves_its_ridge_regression(
    scorer: LayerScorer, layers: tuple[int, ...]
) -> None:
    before = {name: weight.clone() for name, weight in scorer.model.state_dict().items()}
    decoder = refitted_decoder(scorer.model.model.decoder, layers, scorer.batches)
    expected = plainly_refitted(scorer.model, layers, scorer.batches).model.decoder
    own, theirs = decoder.state_dict(), expected.state_dict()
    assert own.keys() == theirs.keys()
    for name in own:
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(before[name], now) for name, now in scorer.model.state_dict().items())


def test_a_decoder_that_keeps_all_layers_stays_as_it_is(scorer: LayerScorer) -> None:
    teacher = scorer.model.model.decoder
    decoder = refitted_decoder(teacher, (0, 1, 2, 3), scorer.batches)
    for name, weight in decoder.state_dict().items():
        torch.testing.assert_close(weight, teacher.state_dict()[name], rtol=0, atol=1e-5)
    assert scorer.kl_of(decoder, scorer.batches) / scorer.tokens < 1e-6


def test_a_refitted_student_is_closer_on_clips_that_it_was_not_fitted_on(
    folder: Path, scorer: LayerScorer
) -> None:
    model_folder = read_model_folder(folder / "teacher", None, "teacher")
    labelled = select_rows(LayerScoring(manifest=folder / "zh-0.jsonl"), model_folder)
    encoder = tuple(range(scorer.model.config.encoder_layers))
    fitted_on, others = (
        LayerScorer(scorer.whisper, encoder, part, lambda: None)
        for part in (labelled[:40], labelled[40:])
    )
    sets = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    plain = others(sets, "")
    for layers in sets:
        decoder = refitted_decoder(scorer.model.model.decoder, layers, fitted_on.batches)
        assert others.kl_of(decoder, others.batches) / others.tokens < plain[layers].kl


def test_what_is_scored_was_not_fitted_on(folder: Path, scorer: LayerScorer) -> None:
    """Each half of the utterances by the layers that were fitted on the other half."""
    model_folder = read_model_folder(folder / "teacher", None, "teacher")
    labelled = select_rows(LayerScoring(manifest=folder / "zh-0.jsonl"), model_folder)
    by_length = sorted(labelled, key=lambda item: len(item.tokens))
    encoder = tuple(range(scorer.model.config.encoder_layers))
    # In batches of an even number every second row of a batch is every second one of all.
    assert all(len(batch.labels) % 2 == 0 for batch in scorer.batches)
    even, odd = (
        LayerScorer(scorer.whisper, encoder, by_length[first::2], lambda: None) for first in (0, 1)
    )
    kl = 0.0
    for fitted_on, others in ((even, odd), (odd, even)):
        decoder = refitted_decoder(scorer.model.model.decoder, (0, 3), fitted_on.batches)
        kl += others.kl_of(decoder, others.batches)
    assert refitted_kl(scorer, (0, 3)) == pytest.approx(kl / scorer.tokens, rel=1e-3)
    alone = LayerScorer(scorer.whisper, encoder, labelled[:1], lambda: None)
    assert refitted_kl(alone, (0, 3)) == pytest.approx(alone([(0, 3)], "")[0, 3].kl, rel=1e-4)


def test_a_memory_for_one_utterance_at_a_time_does_not_undo_the_refit(
    folder: Path, scorer: LayerScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large teacher on a small GPU has batches of one, of which none has a second half."""
    model_folder = read_model_folder(folder / "teacher", None, "teacher")
    labelled = select_rows(LayerScoring(manifest=folder / "zh-0.jsonl"), model_folder)
    encoder = tuple(range(scorer.model.config.encoder_layers))
    monkeypatch.setattr(scoring, "suitable_batch_size", lambda model: 1)
    one_by_one = LayerScorer(scorer.whisper, encoder, labelled, lambda: None)
    assert {len(batch.labels) for batch in one_by_one.batches} == {1}
    refitted = refitted_kl(one_by_one, (0, 3))
    assert refitted == pytest.approx(refitted_kl(scorer, (0, 3)), rel=1e-3)
    assert refitted < 0.99 * one_by_one([(0, 3)], "")[0, 3].kl


def test_the_spread_set_and_the_best_others_are_refitted() -> None:
    ranked = [
        ScoredLayers((0, number), "subset", LayerScore(float(number), 0.5)) for number in range(9)
    ]
    assert finalists(ranked, (0, 8)) == [(0, 8), *((0, number) for number in range(7))]
    assert finalists(ranked, (0, 2))[:4] == [(0, 2), (0, 0), (0, 1), (0, 3)]
    assert finalists(ranked[:1], (0, 5)) == [(0, 5), (0, 0)]
