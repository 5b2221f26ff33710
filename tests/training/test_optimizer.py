"""Which parameters decay, and the learning rate of each step."""

from pathlib import Path

import pytest
from distilling import load_model, prune
from tiny import make_model_folder
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.training.models import freeze
from simpler_distil_whisper.training.optimizer import learning_rate_factor, parameter_groups
from simpler_distil_whisper.training.options import Freeze, ScheduleKind


@pytest.fixture
def student(tmp_path: Path) -> WhisperForConditionalGeneration:
    teacher = make_model_folder(tmp_path / "teacher", languages=["en", "zh"], seed=1)
    return load_model(prune(teacher, tmp_path / "student")).model


# Parameters


def test_biases_and_norms_do_not_decay_and_everything_else_does(
    student: WhisperForConditionalGeneration,
) -> None:
    decayed, free = parameter_groups(student, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    for parameter in free["params"]:
        assert names[id(parameter)].endswith("bias") or "layer_norm" in names[id(parameter)]
    for parameter in decayed["params"]:
        assert names[id(parameter)].endswith("weight")
        assert "layer_norm" not in names[id(parameter)]


def test_every_trained_tensor_is_optimized_exactly_once(
    student: WhisperForConditionalGeneration,
) -> None:
    freeze(student, Freeze(encoder=False, decoder=False, embed_positions=False))
    listed = [p for group in parameter_groups(student, 0.1) for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert sum(p is student.proj_out.weight for p in listed) == 1  # tied to the token embedding
    assert student.proj_out.weight is student.model.decoder.embed_tokens.weight
    fixed = "model.encoder.embed_positions.weight"
    trained = {id(p) for name, p in student.named_parameters() if name != fixed}
    assert {id(p) for p in listed} == trained


# Learning rate


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate_by_hand(kind: ScheduleKind, factors: list[float]) -> None:
    """Three steps of warm-up in a run of seven."""
    rates = [learning_rate_factor(kind, step, 3, 7) for step in range(7)]
    assert rates == pytest.approx(factors)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_learning_rate_without_warm_up_starts_at_the_top(kind: ScheduleKind) -> None:
    assert learning_rate_factor(kind, 0, 0, 10) == 1.0
    assert all(learning_rate_factor(kind, step, 0, 10) > 0 for step in range(10))
    end = learning_rate_factor(kind, 10, 0, 10)
    assert end == pytest.approx(1.0 if kind == "constant" else 0.0)
