"""The parts of the training loop: both models together, optimizer, schedule, checkpoints, log."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from distilling import prune
from tiny import make_model_folder, read_rows
from torch import nn
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.model_folder import read_model_folder
from simpler_distil_whisper.training import (
    Checkpoints,
    MetricsLog,
    TeacherAndStudent,
    TrainerState,
    encoders_are_equal,
    freeze,
    learning_rate_factor,
    parameter_groups,
)
from simpler_distil_whisper.training_data import TrainingBatch
from simpler_distil_whisper.whisper import load_whisper

Model = WhisperForConditionalGeneration


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Teacher and student."""
    folder = tmp_path_factory.mktemp("models")
    teacher = make_model_folder(folder / "teacher", languages=["en", "zh"], seed=1)
    return teacher, prune(teacher, folder / "student")


@pytest.fixture
def teacher(folders: tuple[Path, Path]) -> Model:
    return load_whisper(read_model_folder(folders[0], None, "teacher")).model


@pytest.fixture
def student(folders: tuple[Path, Path]) -> Model:
    return load_whisper(read_model_folder(folders[1], None, "student")).model


def random_batch(seed: int = 0) -> TrainingBatch:
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(3, 80, 200, generator=random)
    inputs = torch.randint(0, 250, (3, 9), generator=random)
    labels = torch.randint(0, 250, (3, 9), generator=random)
    labels[:, :3] = labels[1, 5:] = -100
    return TrainingBatch(features, inputs, labels, 1.0, [])


# Parameters


def test_biases_and_norms_do_not_decay_and_everything_else_does(student: Model) -> None:
    decayed, free = parameter_groups(student, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    for parameter in free["params"]:
        assert names[id(parameter)].endswith("bias") or "layer_norm" in names[id(parameter)]
    for parameter in decayed["params"]:
        assert names[id(parameter)].endswith("weight")
        assert "layer_norm" not in names[id(parameter)]


def test_every_trained_tensor_is_optimized_exactly_once(student: Model) -> None:
    freeze(student, encoder=False, decoder=False, embed_positions=False)
    listed = [p for group in parameter_groups(student, 0.1) for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert sum(p is student.proj_out.weight for p in listed) == 1  # tied to the token embedding
    assert student.proj_out.weight is student.model.decoder.embed_tokens.weight
    fixed = "model.encoder.embed_positions.weight"
    trained = {id(p) for name, p in student.named_parameters() if name != fixed}
    assert {id(p) for p in listed} == trained


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_freezing(student: Model, encoder: bool, decoder: bool, positions: bool) -> None:
    freeze(student, encoder=encoder, decoder=decoder, embed_positions=positions)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    expected = {
        name
        for name, _ in student.named_parameters()
        if not (encoder and name.startswith("model.encoder."))
        and not (decoder and name.startswith("model.decoder."))
        and not (positions and name == "model.decoder.embed_positions.weight")
        and name != "model.encoder.embed_positions.weight"
    }
    assert trained == expected
    assert student.proj_out.weight.requires_grad is not decoder


# Learning rate


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate_by_hand(kind: str, factors: list[float]) -> None:
    """Three steps of warm-up in a run of seven."""
    found = [learning_rate_factor(kind, step, 3, 7) for step in range(7)]
    assert found == pytest.approx(factors)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_learning_rate_without_warm_up_starts_at_the_top(kind: str) -> None:
    assert learning_rate_factor(kind, 0, 0, 10) == 1.0
    assert all(learning_rate_factor(kind, step, 0, 10) > 0 for step in range(10))
    end = learning_rate_factor(kind, 10, 0, 10)
    assert end == pytest.approx(1.0 if kind == "constant" else 0.0)


# Two models


def test_encoders_are_equal_only_if_every_weight_is(teacher: Model, student: Model) -> None:
    assert encoders_are_equal(student, teacher)
    with torch.no_grad():
        student.model.encoder.layers[1].fc2.bias[3] += 1e-6
    assert not encoders_are_equal(student, teacher)


@pytest.mark.parametrize(
    "other", [{"encoder_layers": 1}, {"width": 24}, {"mels": 128}, {"seed": 2}], ids=str
)
def test_encoders_of_other_shapes_are_not_equal(
    tmp_path: Path, teacher: Model, other: dict[str, int]
) -> None:
    path = make_model_folder(tmp_path, **{"languages": ["en", "zh"], "seed": 1, **other})
    assert not encoders_are_equal(
        load_whisper(read_model_folder(path, None, "student")).model, teacher
    )


def test_loss_is_that_of_both_models_alone(teacher: Model, student: Model) -> None:
    """transformers' own forward pass of each model on the same decoder input is the oracle."""
    batch = random_batch()
    terms = TeacherAndStudent(student, teacher, 2.0, share_encoder=False)(batch)
    ours, theirs = (
        model.eval()(batch.input_features, decoder_input_ids=batch.decoder_input_ids).logits
        for model in (student, teacher)
    )
    cross_entropy = nn.functional.cross_entropy(
        ours.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
    )
    p, log_q = (theirs / 2).softmax(-1), (ours / 2).log_softmax(-1)
    kl = 4 * ((p * (p.log() - log_q)).sum(-1) * (batch.labels != -100)).sum()
    torch.testing.assert_close(terms.cross_entropy, cross_entropy)
    torch.testing.assert_close(terms.kl, kl)
    assert int(terms.tokens) == int((batch.labels != -100).sum())


def test_the_student_of_all_layers_agrees_with_its_teacher(teacher: Model) -> None:
    student = copy.deepcopy(teacher)
    terms = TeacherAndStudent(student, teacher, 2.0, share_encoder=False)(random_batch())
    assert float(terms.kl.detach()) == pytest.approx(0.0, abs=1e-4)


def test_a_shared_encoder_changes_neither_loss_nor_gradient(teacher: Model, student: Model) -> None:
    freeze(student, encoder=True, decoder=False, embed_positions=False)
    results = []
    for shared in (True, False):
        models = TeacherAndStudent(student, teacher, 2.0, shared).train()
        models.zero_grad()
        terms = models(random_batch())
        (terms.cross_entropy + terms.kl).backward()
        grads = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        results.append([terms.cross_entropy, terms.kl, *grads])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_shared_encoder_is_run_once(teacher: Model, student: Model) -> None:
    freeze(student, encoder=True, decoder=False, embed_positions=False)
    calls: list[str] = []
    teacher.model.encoder.register_forward_hook(lambda *_: calls.append("teacher"))
    student.model.encoder.register_forward_hook(lambda *_: calls.append("student"))
    TeacherAndStudent(student, teacher, 2.0, share_encoder=True)(random_batch())
    assert calls == ["student"]


def test_dropout_is_off_in_teacher_and_frozen_encoder_and_on_in_what_is_trained(
    teacher: Model, student: Model
) -> None:
    for model in (teacher, student):
        for module in model.modules():
            for name in ("dropout", "activation_dropout", "layerdrop"):
                if hasattr(module, name):
                    setattr(module, name, 0.5)
    batch, heard, taught = random_batch(), [], []
    student.model.encoder.register_forward_hook(lambda m, i, o: heard.append(o[0]))
    teacher.model.decoder.register_forward_hook(lambda m, i, o: taught.append(o[0]))
    freeze(student, encoder=True, decoder=False, embed_positions=False)
    models = TeacherAndStudent(student, teacher, 2.0, share_encoder=True)
    losses = {float(models.train()(batch).kl.detach()) for _ in range(4)}
    assert all(torch.equal(heard[0], other) for other in heard)
    assert all(torch.equal(taught[0], other) for other in taught)
    assert len(losses) > 1, "the student's decoder is trained with dropout"

    freeze(student, encoder=False, decoder=False, embed_positions=False)
    heard.clear()
    for _ in range(2):
        models.train()(batch)
    assert not torch.equal(heard[0], heard[1]), "an encoder that is trained has its dropout"
    heard.clear()
    for _ in range(2):
        models.eval()(batch)
    assert torch.equal(heard[0], heard[1])


def test_the_teacher_hears_the_whole_audio_whatever_the_student_config_masks(
    teacher: Model, student: Model
) -> None:
    """transformers' SpecAugment would write zeros into the features that both are given."""
    for model in (student, teacher):
        model.config.apply_spec_augment = True
        model.config.mask_time_prob = model.config.mask_feature_prob = 0.9
    batch = random_batch()
    before = batch.input_features.clone()
    heard = []
    teacher.model.encoder.register_forward_hook(lambda m, i, o: heard.append(i[0]))
    freeze(student, encoder=False, decoder=False, embed_positions=False)
    TeacherAndStudent(student, teacher, 2.0, share_encoder=False).train()(batch)
    assert torch.equal(batch.input_features, before)
    assert torch.equal(heard[0], before)


def test_the_teacher_is_no_part_of_what_is_trained_or_saved(teacher: Model, student: Model) -> None:
    models = TeacherAndStudent(student, teacher, 2.0, share_encoder=False).train()
    assert {name.split(".")[0] for name in models.state_dict()} == {"student"}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training


# Checkpoints


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def trained_line(accelerator: Accelerator) -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    return accelerator.prepare(line := nn.Linear(3, 3), torch.optim.AdamW(line.parameters()))


def do_step(line: nn.Linear, optimizer: torch.optim.AdamW) -> None:
    line(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_restored_checkpoint_goes_on_as_if_nothing_had_been(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    line, optimizer = trained_line(accelerator)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, accelerator)
    assert checkpoints.restore_last() is None
    do_step(line, optimizer)
    checkpoints.save(TrainerState(1, 0.5, 0.25))
    do_step(line, optimizer)
    expected = line.weight.detach().clone()
    torch.rand(7)
    assert checkpoints.restore_last() == TrainerState(1, 0.5, 0.25)
    do_step(line, optimizer)  # the same random input again: random states are in the checkpoint
    assert torch.equal(line.weight, expected)


def test_the_newest_checkpoints_are_kept(tmp_path: Path, accelerator: Accelerator) -> None:
    trained_line(accelerator)
    checkpoints = Checkpoints(tmp_path, 2, accelerator)
    for step in (9, 10, 100, 1000):
        checkpoints.save(TrainerState(step))
        checkpoints.save(TrainerState(step))  # again, as a run that was set back does
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00001000"]
    assert checkpoints.restore_last() == TrainerState(1000)


def test_a_save_that_was_killed_leaves_the_last_checkpoint(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, optimizer = trained_line(accelerator)
    checkpoints = Checkpoints(tmp_path, 1, accelerator)
    checkpoints.save(TrainerState(1))
    saved = line.weight.detach().clone()
    do_step(line, optimizer)
    whole_save = accelerator.save_state

    def killed(folder: str) -> None:
        whole_save(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(accelerator, "save_state", killed)
        checkpoints.save(TrainerState(2))
    assert checkpoints.restore_last() == TrainerState(1)
    assert torch.equal(line.weight, saved)
    checkpoints.save(TrainerState(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


# The log


def test_the_log_is_cut_back_to_where_a_run_goes_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False, enabled=True)
    for step in range(1, 6):
        log.log(step, {"train/loss": step / 2, "validation/error_rate": None})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # a kill tears the last line
    log = MetricsLog(tmp_path, 3, tensorboard=False, enabled=True)
    log.log(4, {"train/loss": 7.0})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1] == {"step": 4, "train/loss": 7.0}
    assert rows[0]["validation/error_rate"] is None


def test_a_run_without_checkpoint_begins_its_log_anew(tmp_path: Path) -> None:
    for _ in range(2):
        log = MetricsLog(tmp_path, 0, tensorboard=False, enabled=True)
        log.log(0, {"validation/teacher/error_rate": 0.5})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_the_log_stays_json_where_a_number_is_not_finite(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False, enabled=True)
    log.log(1, {"train/grad_norm": float("inf"), "train/kl": float("nan"), "train/loss": 1.0})
    [row] = read_rows(tmp_path / "metrics.jsonl")
    assert row == {"step": 1, "train/grad_norm": None, "train/kl": None, "train/loss": 1.0}


def test_other_processes_write_no_log(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0, tensorboard=True, enabled=False).log(1, {"train/loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, tensorboard=True, enabled=True)
    log.log(1, {"train/loss": 0.5, "validation/error_rate": None})
    log.log(2, {"train/loss": 0.25})
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1]) == {
        "step": 2,
        "train/loss": 0.25,
    }
    assert math.isclose(len(events.Tags()["scalars"]), 1)
