"""Short training runs: what they train, on what, and that the choice follows them."""

from typing import Any

import pytest
import torch
from tiny import make_corpus, make_model_folder

from simpler_distil_whisper.layers import trials
from simpler_distil_whisper.layers.choice import finalists
from simpler_distil_whisper.layers.rows import LayerScoring, select_rows
from simpler_distil_whisper.layers.scoring import EncodedBatch, LayerScorer
from simpler_distil_whisper.layers.search import LayerScore, ScoredLayers
from simpler_distil_whisper.layers.trials import Trials
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.pruning import prune_whisper
from simpler_distil_whisper.model.whisper import Whisper, load_whisper
from simpler_distil_whisper.run import Interrupted
from simpler_distil_whisper.training.losses import IGNORE_INDEX


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> LayerScorer:
    """Of a teacher with four decoder layers, the third of which does nothing, and 21 clips."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trials")
    make_model_folder(
        folder / "teacher", languages=["en", "zh"], decoder_layers=4, talkative=True, seed=5
    )
    make_corpus(folder, 21)
    model_folder = read_model_folder(folder / "teacher", None, "teacher")
    whisper = load_whisper(model_folder)
    idle = whisper.model.model.decoder.layers[2]
    for last in (idle.self_attn.out_proj, idle.encoder_attn.out_proj, idle.fc2):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    labelled = select_rows(LayerScoring(manifest=folder / "zh-0.jsonl"), model_folder)
    encoder = tuple(range(whisper.model.config.encoder_layers))
    return LayerScorer(whisper, encoder, labelled, lambda: None)


def plain_losses(
    teacher: Whisper, steps: list[EncodedBatch], layers: tuple[int, ...], rates: list[float]
) -> list[float]:
    """Train the student that would be made: by transformers, the formula and torch's AdamW."""
    encoder = range(teacher.model.config.encoder_layers)
    student: Any = prune_whisper(teacher.model, encoder, layers).requires_grad_(True)
    decoder = student.model.decoder
    optimizer = torch.optim.AdamW(decoder.parameters(), weight_decay=0.0)
    losses = []
    for batch, rate in zip(steps, rates, strict=True):
        states = decoder(
            input_ids=batch.inputs, encoder_hidden_states=batch.encoder_states
        ).last_hidden_state
        real = batch.labels != IGNORE_INDEX
        q = (student.proj_out(states)[real] / 2).log_softmax(-1)
        p = (teacher.model.proj_out(batch.teacher_states)[real] / 2).log_softmax(-1).detach()
        loss = 4 * (p.exp() * (p - q)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_a_run_trains_the_student_that_would_be_made(
    scorer: LayerScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "STEPS", 5)
    before = {name: weight.clone() for name, weight in scorer.model.state_dict().items()}
    runs = Trials(scorer.model, scorer.batches, lambda: None)
    assert sum(len(batch.labels) for batch in runs.steps[:2]) == 21
    rates = [0.01 / 3, 0.02 / 3, 0.01, 0.02 / 3, 0.01 / 3]  # of five steps, two of warm-up
    for layers in ((0, 3), (1, 2, 3)):
        expected = plain_losses(scorer.whisper, runs.steps, layers, rates)
        assert runs.run(layers, 0.01).losses == pytest.approx(expected, rel=1e-4)
        assert expected[-1] != pytest.approx(expected[0], rel=0.05)
    assert all(torch.equal(before[name], now) for name, now in scorer.model.state_dict().items())


def test_parts_hold_every_label_once_without_needless_padding(scorer: LayerScorer) -> None:
    parts = [part for batch in scorer.batches for part in batch.parts(4)]
    assert [len(part.labels) for part in parts] == [4] * 5 + [1]
    labels = [part.labels[part.labels != IGNORE_INDEX] for part in parts]
    assert sum(map(len, labels)) == scorer.tokens
    for part in parts:
        assert (part.labels[:, -1] != IGNORE_INDEX).any()
        assert part.inputs.shape == part.labels.shape == part.teacher_states.shape[:2]
    whole = torch.cat([batch.encoder_states for batch in scorer.batches])
    assert torch.equal(torch.cat([part.encoder_states for part in parts]), whole)


def test_a_layer_that_does_nothing_teaches_less_than_one_that_works(scorer: LayerScorer) -> None:
    losses = Trials(scorer.model, scorer.batches, lambda: None).losses([(0, 1, 3), (0, 2, 3)])
    assert losses[0, 1, 3] < 0.5 * losses[0, 2, 3]


def test_the_spread_set_and_the_best_others_are_trained() -> None:
    ranked = [
        ScoredLayers(layers, "subset", LayerScore(float(rank), 0.5))
        for rank, layers in enumerate([(0, 4), (2, 5), (1, 4), (0, 3), (0, 5)])
    ]
    assert finalists(ranked, (0, 5)) == [(0, 5), (0, 4), (2, 5), (1, 4)]
    assert finalists(ranked, (2, 5)) == [(2, 5), (0, 4), (1, 4), (0, 3)]
    assert finalists(ranked[:1], (0, 4)) == [(0, 4)]


def test_a_trial_can_be_stopped_at_every_step(scorer: LayerScorer) -> None:
    calls: list[None] = []

    def stop() -> None:
        calls.append(None)
        if len(calls) == 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        Trials(scorer.model, scorer.batches, stop).losses([(0, 1), (1, 2)])
