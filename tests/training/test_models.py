"""Teacher and student together: the loss, the shared encoder, what is trained and what is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from distilling import load_model, prune
from tiny import make_model_folder
from torch import nn
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder
from simpler_distil_whisper.model.weights import encoders_are_equal, output_head
from simpler_distil_whisper.model.whisper import Whisper
from simpler_distil_whisper.training import models as training_models
from simpler_distil_whisper.training.dataset import TrainingBatch
from simpler_distil_whisper.training.models import (
    StudentWithLoss,
    Teacher,
    TeacherAndStudent,
    freeze,
)
from simpler_distil_whisper.training.options import Freeze, Objective, TeacherOptions

Model = WhisperForConditionalGeneration
OBJECTIVE = Objective(cross_entropy_weight=1.0, kl_weight=1.0, temperature=2.0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Teacher and student."""
    folder = tmp_path_factory.mktemp("models")
    teacher = make_model_folder(folder / "teacher", languages=["en", "zh"], seed=1)
    return teacher, prune(teacher, folder / "student")


def make_teacher(folder: Path, shared_encoder: bool = False, precision: str = "no") -> Teacher:
    AcceleratorState._reset_state(reset_partial_state=True)
    options = TeacherOptions(path=folder, dtype="float32")
    facts = read_model_folder(folder, None, "teacher")
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    return Teacher(facts, options, accelerator, shared_encoder)


@pytest.fixture
def teacher(folders: tuple[Path, Path]) -> Teacher:
    return make_teacher(folders[0])


@pytest.fixture
def whisper(folders: tuple[Path, Path]) -> Whisper:
    """The student as a whole."""
    return load_model(folders[1])


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


# Freezing


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_freezing(
    folders: tuple[Path, Path],
    encoder: bool,
    decoder: bool,
    tokens: bool,
    positions: bool,
    tied: bool,
) -> None:
    student = Model.from_pretrained(folders[1], tie_word_embeddings=tied)
    # A config in which both are frozen is refused.
    options = Freeze.model_construct(
        encoder=encoder, decoder=decoder, embed_tokens=tokens, embed_positions=positions
    )
    freeze(student, options)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    expected = {
        name
        for name, _ in student.named_parameters()
        if not (encoder and name.startswith("model.encoder."))
        and not (decoder and name.startswith("model.decoder."))
        and not (tokens and name == "model.decoder.embed_tokens.weight")
        and not ((tokens or decoder) and name == "proj_out.weight")
        and not (positions and name == "model.decoder.embed_positions.weight")
        and name != "model.encoder.embed_positions.weight"
    }
    assert trained == expected
    assert student.proj_out.weight.requires_grad is not (decoder or tokens)


# Equal encoders, and the head


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
    """As for a float32 student of a float16 teacher; the same weights in other heads differ."""
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


def test_a_setting_that_is_left_out_is_the_usual_one(tmp_path: Path) -> None:
    """Folders of other programs leave out what transformers writes into every student's."""
    full = make_model_folder(tmp_path / "full", languages=["en"], seed=1)
    config = json.loads((full / "config.json").read_text())
    assert config.keys() >= {"scale_embedding", "activation_function"}

    def folder(name: str, **changed: object) -> ModelFolder:
        shutil.copytree(full, tmp_path / name)
        content = {key: value for key, value in (config | changed).items() if value is not None}
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        return read_model_folder(tmp_path / name, None, "model")

    usual = read_model_folder(full, None, "model")
    assert encoders_are_equal(
        folder("short", scale_embedding=None, activation_function=None), usual
    )
    assert not encoders_are_equal(folder("scaled", scale_embedding=True), usual)
    assert not encoders_are_equal(folder("relu", activation_function="relu"), usual)


@pytest.mark.parametrize(
    "other", [{"encoder_layers": 1}, {"width": 24}, {"mels": 128}, {"seed": 2}], ids=str
)
def test_encoders_of_other_shapes_are_not_equal(
    tmp_path: Path, folders: tuple[Path, Path], other: dict[str, int]
) -> None:
    path = make_model_folder(tmp_path, **{"languages": ["en", "zh"], "seed": 1, **other})
    first, second = (read_model_folder(folder, None, "model") for folder in (path, folders[0]))
    assert not encoders_are_equal(first, second)


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


# The loss of both


def test_loss_is_that_of_both_models_alone(
    folders: tuple[Path, Path], teacher: Teacher, whisper: Whisper
) -> None:
    """transformers' own forward pass of each model on the same decoder input is the oracle."""
    batch = random_batch()
    terms = together(teacher, whisper).loss_terms(batch)
    ours, theirs = (
        load_model(folder)
        .model(batch.input_features, decoder_input_ids=batch.decoder_input_ids)
        .logits
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
    terms = together(teacher, load_model(folders[0])).loss_terms(random_batch())
    assert float(terms.kl.detach()) == pytest.approx(0.0, abs=1e-4)
    assert int(terms.agreement) == int(terms.tokens)


def test_a_shared_encoder_changes_neither_loss_nor_gradient(folders: tuple[Path, Path]) -> None:
    results = []
    for shared in (True, False):
        whisper = load_model(folders[1])
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
    batch_sizes: list[int] = []
    encoder = whisper.model.model.encoder
    encoder.register_forward_hook(lambda m, i, o: batch_sizes.append(len(i[0])))
    together(teacher, whisper).loss_terms(random_batch())
    assert batch_sizes == [3]
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
    batch, encoder_states, decoder_states = random_batch(), [], []
    student.model.encoder.register_forward_hook(lambda m, i, o: encoder_states.append(o[0]))
    teacher.model.model.decoder.register_forward_hook(lambda m, i, o: decoder_states.append(o[0]))
    freeze(student, Freeze(encoder=True, decoder=False, embed_positions=False))
    models = together(teacher, whisper)
    models.module.train()
    losses = {float(models.loss_terms(batch).kl.detach()) for _ in range(4)}
    assert all(torch.equal(encoder_states[0], other) for other in encoder_states)
    assert all(torch.equal(decoder_states[0], other) for other in decoder_states)
    assert len(losses) > 1, "the student's decoder is trained with dropout"

    models.teacher = make_teacher(folders[0])
    freeze(student, Freeze(encoder=False, decoder=False, embed_positions=False))
    encoder_states.clear()
    models.module.train()
    for _ in range(2):
        models.loss_terms(batch)
    assert not torch.equal(encoder_states[0], encoder_states[1]), (
        "an encoder that is trained has its dropout"
    )
    encoder_states.clear()
    models.module.eval()
    for _ in range(2):
        models.loss_terms(batch)
    assert torch.equal(encoder_states[0], encoder_states[1])


def test_the_teacher_is_given_unmasked_features_whatever_the_student_config_masks(
    teacher: Teacher, whisper: Whisper
) -> None:
    """transformers' SpecAugment would write zeros into the features that both are given."""
    for model in (whisper.model, teacher.model):
        model.config.apply_spec_augment = True
        model.config.mask_time_prob = model.config.mask_feature_prob = 0.9
    batch = random_batch()
    before = batch.input_features.clone()
    features = []
    teacher.model.model.encoder.register_forward_hook(lambda m, i, o: features.append(i[0]))
    freeze(whisper.model, Freeze(encoder=False, decoder=False, embed_positions=False))
    models = together(teacher, whisper)
    models.module.train()
    models.loss_terms(batch)
    assert torch.equal(batch.input_features, before)
    assert torch.equal(features[0], before)


def test_the_teacher_is_no_part_of_what_is_trained_or_saved(
    teacher: Teacher, student: Model
) -> None:
    module = StudentWithLoss(student, teacher.head, OBJECTIVE).train()
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training


def test_encoder_states_are_cast_once_and_no_bit_is_another(
    teacher: Teacher, student: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = StudentWithLoss(student, teacher.head, OBJECTIVE).eval()
    freeze(student, Freeze(encoder=True, decoder=False, embed_positions=False))
    batch = random_batch()
    with torch.no_grad():
        states = student.model.encoder(batch.input_features).last_hidden_state
    given: list[torch.dtype] = []
    results = []
    for layer in student.model.decoder.layers:
        for product in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj):
            product.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype))
    for expected in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            terms = module(batch, states, torch.zeros(3, 9, states.shape[-1]))
        module.zero_grad()
        terms.loss.backward()
        gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        results.append([*terms, *gradients])
        assert set(given) == {expected}
        given.clear()
        monkeypatch.setattr(training_models, "dtype_of_products", lambda device, dtype: dtype)
    assert len(results[0]) > 20
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_frozen_weights_are_cast_once_and_no_bit_is_another(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for cast in (
        training_models.cast_products,
        lambda module, dtype: module,
    ):  # as it is, and without
        monkeypatch.setattr(training_models, "cast_products", cast)
        for shared in (True, False):
            teacher, student = make_teacher(folders[0], shared, "bf16"), load_model(folders[1])
            freeze(student.model, Freeze(encoder=True, decoder=False, embed_positions=False))
            both = together(teacher, student)
            with teacher.accelerator.autocast():
                terms = both.loss_terms(random_batch().to(torch.device("cpu")))
            terms.loss.backward()
            gradients = [p.grad for p in student.model.parameters() if p.grad is not None]
            results.append([*terms, *gradients])
            layers = [both._frozen_encoder.layers[0].fc1, teacher.model.model.decoder.layers[0].fc1]
            expected = torch.float32 if len(results) > 2 else torch.bfloat16
            assert all(layer.weight.dtype == expected for layer in layers)
            assert {p.dtype for p in student.model.parameters()} == {torch.float32}
    for own, autocast in zip(results[:2], results[2:], strict=True):
        assert len(own) > 20
        assert all(torch.equal(*pair) for pair in zip(own, autocast, strict=True))


def test_no_value_is_looked_at_before_the_step_ends(whisper: Whisper) -> None:
    """A tensor without values, as a GPU's that is not done: whoever looks at one fails."""
    meta = torch.device("meta")
    freeze(whisper.model, Freeze(encoder=True, decoder=False, embed_positions=False))
    student = whisper.model.to(meta)
    head = student.proj_out.weight.detach()
    batch = random_batch().to(meta)
    with torch.no_grad():
        states = student.model.encoder(batch.input_features).last_hidden_state
    width = student.config.d_model
    terms = StudentWithLoss(student, head, OBJECTIVE)(
        batch, states, torch.empty(3, 9, width, device=meta)
    )
    terms.loss.backward()
    assert terms.loss.is_meta
