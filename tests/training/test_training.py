"""The parts of the training loop: both models together, optimizer, schedule, checkpoints, log."""

import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from distilling import prune
from tiny import make_model_folder, read_rows
from torch import nn
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.weights import encoders_are_equal, output_head
from simpler_distil_whisper.model.whisper import Whisper, load_whisper
from simpler_distil_whisper.run import DataError
from simpler_distil_whisper.training.checkpoints import Checkpoints, TrainerState
from simpler_distil_whisper.training.dataset import TrainingBatch
from simpler_distil_whisper.training.log import MetricsLog, draw_curves
from simpler_distil_whisper.training.models import (
    StudentWithLoss,
    Teacher,
    TeacherAndStudent,
    freeze,
)
from simpler_distil_whisper.training.optimizer import learning_rate_factor, parameter_groups
from simpler_distil_whisper.training.options import Freeze, Objective, Schedule, TeacherOptions

Model = WhisperForConditionalGeneration
OBJECTIVE = Objective(cross_entropy_weight=1.0, kl_weight=1.0, temperature=2.0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Teacher and student."""
    folder = tmp_path_factory.mktemp("models")
    teacher = make_model_folder(folder / "teacher", languages=["en", "zh"], seed=1)
    return teacher, prune(teacher, folder / "student")


def make_teacher(folder: Path, shared_encoder: bool = False) -> Teacher:
    AcceleratorState._reset_state(reset_partial_state=True)
    options = TeacherOptions(path=folder, dtype="float32")
    facts = read_model_folder(folder, None, "teacher")
    return Teacher(facts, options, Accelerator(cpu=True), shared_encoder)


def load(folder: Path) -> Whisper:
    return load_whisper(read_model_folder(folder, None, "model"))


@pytest.fixture
def teacher(folders: tuple[Path, Path]) -> Teacher:
    return make_teacher(folders[0])


@pytest.fixture
def whisper(folders: tuple[Path, Path]) -> Whisper:
    """The student as a whole."""
    return load(folders[1])


@pytest.fixture
def student(whisper: Whisper) -> Model:
    return whisper.model


def together(teacher: Teacher, student: Whisper) -> TeacherAndStudent:
    return TeacherAndStudent(teacher.accelerator, teacher, student, OBJECTIVE)


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
    freeze(student, Freeze(encoder=False, decoder=False, embed_positions=False))
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
    # A config in which both are frozen is refused.
    options = Freeze.model_construct(encoder=encoder, decoder=decoder, embed_positions=positions)
    freeze(student, options)
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


def schedule(kind: Any, warmup_steps: int) -> Schedule:
    return Schedule(kind=kind, warmup_steps=warmup_steps)


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
    found = [learning_rate_factor(schedule(kind, 3), step, 7) for step in range(7)]
    assert found == pytest.approx(factors)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_learning_rate_without_warm_up_starts_at_the_top(kind: str) -> None:
    assert learning_rate_factor(schedule(kind, 0), 0, 10) == 1.0
    assert all(learning_rate_factor(schedule(kind, 0), step, 10) > 0 for step in range(10))
    end = learning_rate_factor(schedule(kind, 0), 10, 10)
    assert end == pytest.approx(1.0 if kind == "constant" else 0.0)


# Two models


def test_encoders_are_equal_only_if_every_weight_is(
    tmp_path: Path, folders: tuple[Path, Path], student: Model
) -> None:
    teacher, other = (read_model_folder(folder, None, "model") for folder in folders)
    assert encoders_are_equal(other, teacher)
    shutil.copytree(folders[1], tmp_path / "other")
    with torch.no_grad():
        student.model.encoder.layers[1].fc2.bias[3] += 1e-6
    student.save_pretrained(tmp_path / "other")
    assert not encoders_are_equal(read_model_folder(tmp_path / "other", None, "model"), teacher)


def test_an_encoder_stored_in_another_dtype_is_equal_if_its_values_are(tmp_path: Path) -> None:
    """A student in float32 of a teacher in float16; but not one of which only the names agree."""
    half = make_model_folder(tmp_path / "half", languages=["en"], seed=1, dtype=torch.float16)
    shutil.copytree(half, tmp_path / "whole")
    Model.from_pretrained(half, dtype=torch.float32).save_pretrained(tmp_path / "whole")
    shutil.copytree(half, tmp_path / "heads")
    config = json.loads((half / "config.json").read_text())
    (tmp_path / "heads" / "config.json").write_text(
        json.dumps(config | {"encoder_attention_heads": 4})
    )
    folders = [
        read_model_folder(tmp_path / name, None, "model") for name in ("half", "whole", "heads")
    ]
    assert encoders_are_equal(folders[0], folders[1])
    assert not encoders_are_equal(folders[0], folders[2])


@pytest.mark.parametrize(
    "other", [{"encoder_layers": 1}, {"width": 24}, {"mels": 128}, {"seed": 2}], ids=str
)
def test_encoders_of_other_shapes_are_not_equal(
    tmp_path: Path, folders: tuple[Path, Path], other: dict[str, int]
) -> None:
    path = make_model_folder(tmp_path, **{"languages": ["en", "zh"], "seed": 1, **other})
    one, two = (read_model_folder(folder, None, "model") for folder in (path, folders[0]))
    assert not encoders_are_equal(one, two)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_read_without_the_model(
    tmp_path: Path, folders: tuple[Path, Path], tied: bool
) -> None:
    shutil.copytree(folders[0], tmp_path / "model")
    model = Model.from_pretrained(folders[0], tie_word_embeddings=tied)
    if not tied:
        model.proj_out.weight = nn.Parameter(model.proj_out.weight.detach() + 1)
    model.save_pretrained(tmp_path / "model")
    again = Model.from_pretrained(tmp_path / "model")
    head = output_head(read_model_folder(tmp_path / "model", None, "model"))
    assert torch.equal(head, again.proj_out.weight)
    assert torch.equal(head, again.model.decoder.embed_tokens.weight) is tied


def test_loss_is_that_of_both_models_alone(
    folders: tuple[Path, Path], teacher: Teacher, whisper: Whisper
) -> None:
    """transformers' own forward pass of each model on the same decoder input is the oracle."""
    batch = random_batch()
    terms = together(teacher, whisper).loss_terms(batch)
    ours, theirs = (
        load(folder).model(batch.input_features, decoder_input_ids=batch.decoder_input_ids).logits
        for folder in reversed(folders)
    )
    cross_entropy = nn.functional.cross_entropy(
        ours.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
    )
    p, log_q = (theirs / 2).softmax(-1), (ours / 2).log_softmax(-1)
    kl = 4 * ((p * (p.log() - log_q)).sum(-1) * (batch.labels != -100)).sum()
    agreement = ((ours.argmax(-1) == theirs.argmax(-1)) & (batch.labels != -100)).sum()
    torch.testing.assert_close(terms.cross_entropy, cross_entropy)
    torch.testing.assert_close(terms.kl, kl)
    assert int(terms.tokens) == int((batch.labels != -100).sum())
    assert int(terms.agreement) == int(agreement) < int(terms.tokens)


def test_the_student_of_all_layers_agrees_with_its_teacher(
    folders: tuple[Path, Path], teacher: Teacher
) -> None:
    terms = together(teacher, load(folders[0])).loss_terms(random_batch())
    assert float(terms.kl.detach()) == pytest.approx(0.0, abs=1e-4)
    assert int(terms.agreement) == int(terms.tokens)


def test_a_shared_encoder_changes_neither_loss_nor_gradient(folders: tuple[Path, Path]) -> None:
    results = []
    for shared in (True, False):
        whisper = load(folders[1])
        freeze(whisper.model, Freeze(encoder=True, decoder=False, embed_positions=False))
        models = together(make_teacher(folders[0], shared), whisper)
        models.module.train()
        terms = models.loss_terms(random_batch())
        terms.loss.backward()
        grads = [p.grad.clone() for p in whisper.model.parameters() if p.grad is not None]
        results.append([terms.cross_entropy, terms.kl, *grads])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_shared_encoder_is_run_once(folders: tuple[Path, Path], whisper: Whisper) -> None:
    freeze(whisper.model, Freeze(encoder=True, decoder=False, embed_positions=False))
    teacher = make_teacher(folders[0], shared_encoder=True)
    heard: list[int] = []
    whisper.model.model.encoder.register_forward_hook(lambda m, i, o: heard.append(len(i[0])))
    together(teacher, whisper).loss_terms(random_batch())
    assert heard == [3]
    assert teacher.model.model.encoder is None


def test_without_a_part_of_the_teachers_it_is_never_loaded(
    teacher: Teacher, whisper: Whisper
) -> None:
    objective = Objective(cross_entropy_weight=1.0, kl_weight=0.0, temperature=2.0)
    terms = TeacherAndStudent(teacher.accelerator, teacher, whisper, objective).loss_terms(
        random_batch()
    )
    assert not teacher.loaded
    assert torch.equal(terms.loss, terms.cross_entropy)


def test_dropout_is_off_in_teacher_and_frozen_encoder_and_on_in_what_is_trained(
    folders: tuple[Path, Path], whisper: Whisper
) -> None:
    teacher, student = make_teacher(folders[0], shared_encoder=True), whisper.model
    for model in (teacher.model, student):
        for module in model.modules():
            for name in ("dropout", "activation_dropout", "layerdrop"):
                if hasattr(module, name):
                    setattr(module, name, 0.5)
    batch, heard, taught = random_batch(), [], []
    student.model.encoder.register_forward_hook(lambda m, i, o: heard.append(o[0]))
    teacher.model.model.decoder.register_forward_hook(lambda m, i, o: taught.append(o[0]))
    freeze(student, Freeze(encoder=True, decoder=False, embed_positions=False))
    models = together(teacher, whisper)
    models.module.train()
    losses = {float(models.loss_terms(batch).kl.detach()) for _ in range(4)}
    assert all(torch.equal(heard[0], other) for other in heard)
    assert all(torch.equal(taught[0], other) for other in taught)
    assert len(losses) > 1, "the student's decoder is trained with dropout"

    models.teacher = make_teacher(folders[0])
    freeze(student, Freeze(encoder=False, decoder=False, embed_positions=False))
    heard.clear()
    models.module.train()
    for _ in range(2):
        models.loss_terms(batch)
    assert not torch.equal(heard[0], heard[1]), "an encoder that is trained has its dropout"
    heard.clear()
    models.module.eval()
    for _ in range(2):
        models.loss_terms(batch)
    assert torch.equal(heard[0], heard[1])


def test_the_teacher_hears_the_whole_audio_whatever_the_student_config_masks(
    teacher: Teacher, whisper: Whisper
) -> None:
    """transformers' SpecAugment would write zeros into the features that both are given."""
    for model in (whisper.model, teacher.model):
        model.config.apply_spec_augment = True
        model.config.mask_time_prob = model.config.mask_feature_prob = 0.9
    batch = random_batch()
    before = batch.input_features.clone()
    heard = []
    teacher.model.model.encoder.register_forward_hook(lambda m, i, o: heard.append(i[0]))
    freeze(whisper.model, Freeze(encoder=False, decoder=False, embed_positions=False))
    models = together(teacher, whisper)
    models.module.train()
    models.loss_terms(batch)
    assert torch.equal(batch.input_features, before)
    assert torch.equal(heard[0], before)


def test_the_teacher_is_no_part_of_what_is_trained_or_saved(
    teacher: Teacher, student: Model
) -> None:
    module = StudentWithLoss(student, teacher.head, OBJECTIVE).train()
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training


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


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    """Stood in for by the largest file that this process may write."""
    line, optimizer = trained_line(accelerator)
    checkpoints = Checkpoints(tmp_path, 1, accelerator)
    do_step(line, optimizer)
    checkpoints.save(TrainerState(1))
    saved = line.weight.detach().clone()
    do_step(line, optimizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot be written.*checkpoints before it are whole"):
            checkpoints.save(TrainerState(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.restore_last() == TrainerState(1)
    assert torch.equal(line.weight, saved)


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


def test_the_curves_are_drawn_from_whatever_is_there(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False, enabled=True)
    picture = tmp_path / "training_curves.png"
    log.log(0, {"validation/teacher/error_rate": 0.1})
    draw_curves(tmp_path / "metrics.jsonl", picture)
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    for step in range(1, 80):
        log.log(step, {"train/kl": 2 / step, "train/cross_entropy": None, "train/agreement": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 80, "train/lo')  # a kill tears the last line
    draw_curves(tmp_path / "metrics.jsonl", picture)
    assert picture.read_bytes() != first
