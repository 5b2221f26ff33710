"""The distillation loss against arithmetic by hand and against torch on the full logits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from simpler_distil_whisper.training.losses import (
    CHUNK_TOKENS,
    IGNORE_INDEX,
    LossTerms,
    _terms_and_gradient,
    distillation_loss,
    token_terms,
)
from simpler_distil_whisper.training.options import Objective

# Three tokens, one position. With an identity head the states are the logits.
TEACHER = np.array([0.7, 0.2, 0.1])
STUDENT = np.array([0.25, 0.5, 0.25])


def make_objective(cross_entropy_weight: float, kl_weight: float, temperature: float) -> Objective:
    return Objective(
        cross_entropy_weight=cross_entropy_weight, kl_weight=kl_weight, temperature=temperature
    )


OBJECTIVE = make_objective(0.8, 1.3, 2.0)
VOCABULARY = 23
LEARNING = ("student_states", "student_head")

pytestmark = pytest.mark.usefixtures("one_thread")


def position_terms(
    student: np.ndarray, teacher: np.ndarray, label: int, temperature: float = 1.0
) -> LossTerms:
    """The loss of one position whose probabilities are given."""
    head = torch.eye(len(student))
    states = [torch.tensor(np.log(p), dtype=torch.float32)[None, None] for p in (student, teacher)]
    objective = OBJECTIVE.model_copy(update={"temperature": temperature})
    return distillation_loss(states[0], head, states[1], head, torch.tensor([[label]]), objective)


def random_case(
    lengths: tuple[int, ...] = (2, 4),
    student_width: int = 6,
    teacher_width: int = 10,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Utterances of some real tokens each: a prompt of one first, padding behind."""
    random = torch.Generator().manual_seed(0)
    rows, positions = len(lengths), max(lengths) + 2
    labels = torch.full((rows, positions), IGNORE_INDEX)
    for row, length in enumerate(lengths):
        labels[row, 1 : length + 1] = torch.randint(0, VOCABULARY, (length,), generator=random)
    sizes = {
        "student_states": (rows, positions, student_width),
        "student_head": (VOCABULARY, student_width),
        "teacher_states": (rows, positions, teacher_width),
        "teacher_head": (VOCABULARY, teacher_width),
    }
    case = {k: torch.randn(*size, generator=random).to(dtype) for k, size in sizes.items()}
    return {
        k: v.requires_grad_(k in LEARNING) if v.is_floating_point() else v
        for k, v in {**case, "labels": labels}.items()
    }


def plain_terms(case: dict[str, Tensor], objective: Objective) -> LossTerms:
    """The formula on the full logits, in float64."""
    exact = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    student = exact["student_states"] @ exact["student_head"].T
    teacher = exact["teacher_states"] @ exact["teacher_head"].T
    real = case["labels"] != IGNORE_INDEX
    cross_entropy = functional.cross_entropy(
        student.transpose(1, 2), case["labels"], ignore_index=IGNORE_INDEX, reduction="sum"
    )
    p = (teacher / objective.temperature).softmax(-1)
    log_q = (student / objective.temperature).log_softmax(-1)
    kl = objective.temperature**2 * ((p * (p.log() - log_q)).sum(-1) * real).sum()
    agreement = ((student.argmax(-1) == teacher.argmax(-1)) & real).sum()
    loss = objective.cross_entropy_weight * cross_entropy + objective.kl_weight * kl
    return LossTerms(loss, cross_entropy, kl, agreement, real.sum())


def gradients(loss: Tensor, case: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [case[name] for name in LEARNING]))


def assert_like_plain(
    case: dict[str, Tensor], objective: Objective = OBJECTIVE, scale: float = 1.0, **near: float
) -> None:
    """Compare every term and both gradients with the plain formula."""
    near = near or {"rtol": 1e-5, "atol": 1e-5}
    terms, plain = distillation_loss(**case, objective=objective), plain_terms(case, objective)
    for ours, theirs in zip(terms, plain, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), **near)
    for ours, theirs in zip(
        gradients(scale * terms.loss, case), gradients(scale * plain.loss, case), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=near["rtol"], atol=scale * near["atol"])


def test_cross_entropy_by_hand() -> None:
    assert float(position_terms(STUDENT, TEACHER, 1).cross_entropy) == pytest.approx(math.log(2))
    assert float(position_terms(STUDENT, TEACHER, 2).cross_entropy) == pytest.approx(math.log(4))


def test_kl_by_hand_is_from_teacher_to_student() -> None:
    # 0.7 ln(0.7/0.25) + 0.2 ln(0.2/0.5) + 0.1 ln(0.1/0.25); 0.429813 is the other way round
    by_hand = 0.7 * math.log(2.8) + 0.2 * math.log(0.4) + 0.1 * math.log(0.4)
    assert by_hand == pytest.approx(0.445847, abs=1e-6)
    assert float(position_terms(STUDENT, TEACHER, 0).kl) == pytest.approx(by_hand, abs=1e-6)
    reversed_kl = float(position_terms(TEACHER, STUDENT, 0).kl)
    assert reversed_kl == pytest.approx(0.429813, abs=1e-6)


def test_agreement_by_hand() -> None:
    likes_the_first = np.array([0.5, 0.1, 0.4])
    assert float(position_terms(STUDENT, TEACHER, 0).agreement) == 0
    assert float(position_terms(likes_the_first, TEACHER, 2).agreement) == 1


def test_temperature_softens_both_distributions_and_scales_the_kl_alone() -> None:
    # At T = 2 a probability becomes its root, normalised.
    teacher, student = (np.sqrt(p) / np.sqrt(p).sum() for p in (TEACHER, STUDENT))
    by_hand = 4 * float((teacher * np.log(teacher / student)).sum())
    warm = position_terms(STUDENT, TEACHER, 1, temperature=2.0)
    assert float(warm.kl) == pytest.approx(by_hand, abs=1e-6)
    assert float(warm.cross_entropy) == pytest.approx(math.log(2))


def test_high_temperatures_leave_the_size_of_the_gradient() -> None:
    """With T² the gradient tends to (student - teacher logits) / V, Hinton et al. 2015, eq. 4."""

    def gradient(temperature: float) -> Tensor:
        student = torch.tensor([[[0.3, -0.2, -0.1]]], requires_grad=True)
        teacher = torch.tensor([[[-0.5, 0.1, 0.4]]])
        head, label = torch.eye(3), torch.tensor([[0]])
        objective = make_objective(0.0, 1.0, temperature)
        distillation_loss(student, head, teacher, head, label, objective).loss.backward()
        assert student.grad is not None
        return student.grad.flatten()

    limit = (torch.tensor([0.3, -0.2, -0.1]) - torch.tensor([-0.5, 0.1, 0.4])) / 3
    assert torch.allclose(gradient(100.0), limit, atol=2e-3)
    assert torch.allclose(gradient(10.0), limit, atol=2e-2)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
@pytest.mark.parametrize(("cross_entropy", "kl"), [(0.8, 1.3), (0.0, 1.0), (1.0, 0.0)])
def test_equals_the_plain_formula_on_full_logits(
    temperature: float, cross_entropy: float, kl: float
) -> None:
    assert_like_plain(
        random_case((7, 1, 40)),
        make_objective(cross_entropy, kl, temperature),
    )


@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_gradient_by_hand_is_that_of_the_formula(with_teacher: bool) -> None:
    random = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 9, VOCABULARY, dtype=torch.float64, generator=random)
    log_probs = (teacher / OBJECTIVE.temperature).log_softmax(-1) if with_teacher else None
    labels = torch.randint(0, VOCABULARY, (9,), generator=random)
    learning = logits.clone().requires_grad_()
    terms = token_terms(learning, log_probs, labels, OBJECTIVE)
    (expected,) = torch.autograd.grad(terms.loss, learning)
    buffers = torch.empty(2, *logits.shape, dtype=torch.float64)
    by_hand, gradient = _terms_and_gradient(logits, log_probs, labels, OBJECTIVE, list(buffers))
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(tuple(by_hand), tuple(term.detach() for term in terms))


@pytest.mark.parametrize("tokens", [CHUNK_TOKENS + more for more in (-1, 0, 1, CHUNK_TOKENS, 300)])
def test_no_chunk_boundary_shows(tokens: int) -> None:
    assert_like_plain(random_case((tokens - 50, 50)), rtol=1e-5, atol=1e-4)


def test_in_float64_it_is_exact() -> None:
    assert_like_plain(random_case((200, 7), dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [65536.0, 1 / 3000])
def test_what_the_loss_is_multiplied_by_reaches_the_gradients(scale: float) -> None:
    """Gradient scaling and the mean over an optimizer step's tokens."""
    assert_like_plain(random_case(), scale=scale)


def test_a_head_that_is_the_embedding_too_gets_both_gradients() -> None:
    ids = torch.tensor([[1, 2, 2, 3, 4, 5], [6, 7, 8, 9, 1, 1]])

    def gradient(exact: bool) -> Tensor:
        case = random_case(teacher_width=6)
        embedding = case["student_head"]
        case["student_states"] = functional.embedding(ids, embedding).tanh()
        terms = (
            plain_terms(case, OBJECTIVE)
            if exact
            else distillation_loss(**case, objective=OBJECTIVE)
        )
        terms.loss.backward()
        assert embedding.grad is not None
        return embedding.grad

    torch.testing.assert_close(gradient(exact=False), gradient(exact=True))


def test_gradients_add_up_over_micro_batches() -> None:
    whole = random_case((5, 9, 3, 7))
    distillation_loss(**whole, objective=OBJECTIVE).loss.backward()
    parts = random_case((5, 9, 3, 7))
    for rows in (slice(0, 3), slice(3, 4)):
        part = {k: v if k.endswith("head") else v[rows] for k, v in parts.items()}
        distillation_loss(**part, objective=OBJECTIVE).loss.backward()
    for name in LEARNING:
        torch.testing.assert_close(parts[name].grad, whole[name].grad)


def test_sums_of_parts_are_the_sum_of_the_whole() -> None:
    case = random_case()
    whole = distillation_loss(**case, objective=OBJECTIVE)
    parts = [
        distillation_loss(
            **{k: v if k.endswith("head") else v[row : row + 1] for k, v in case.items()},
            objective=OBJECTIVE,
        )
        for row in range(2)
    ]
    for together, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(together, first + second)


def test_only_tokens_with_a_label_count() -> None:
    """Whatever stands at prompt and padding changes neither loss nor gradient."""
    quiet, noisy = random_case(), random_case()
    ignored = noisy["labels"] == IGNORE_INDEX
    with torch.no_grad():
        noisy["student_states"][ignored] += 100.0
        noisy["teacher_states"][ignored] -= 50.0
    losses = [distillation_loss(**case, objective=OBJECTIVE).loss for case in (quiet, noisy)]
    assert torch.equal(*losses)
    (states, head), (other_states, other_head) = (
        gradients(loss, case) for loss, case in zip(losses, (quiet, noisy), strict=True)
    )
    assert torch.equal(states, other_states)
    assert torch.equal(head, other_head)
    assert not states[ignored].any()


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    case = random_case(student_width=10)
    case["teacher_states"], case["teacher_head"] = case["student_states"], case["student_head"]
    terms = distillation_loss(**case, objective=make_objective(0.0, 1.0, 2.0))
    assert float(terms.kl) == pytest.approx(0.0, abs=1e-5)
    assert terms.agreement == terms.tokens
    assert max(gradient.abs().max() for gradient in gradients(terms.loss, case)) < 1e-5


def test_the_teacher_gets_no_gradient() -> None:
    case = {k: v.requires_grad_(v.is_floating_point()) for k, v in random_case().items()}
    distillation_loss(**case, objective=OBJECTIVE).loss.backward()
    assert case["teacher_states"].grad is None
    assert case["teacher_head"].grad is None


def test_without_a_teacher_only_the_labels_are_learnt() -> None:
    case = random_case()
    objective = make_objective(1.0, 0.0, 2.0)
    with_teacher = distillation_loss(**case, objective=objective)
    alone = {**case, "teacher_states": None, "teacher_head": None}
    terms = distillation_loss(**alone, objective=objective)
    assert torch.equal(terms.loss, with_teacher.loss)
    assert terms.kl == terms.agreement == 0
    for ours, theirs in zip(
        gradients(terms.loss, case), gradients(with_teacher.loss, case), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_nothing_labelled_is_zero_and_not_nan() -> None:
    case = random_case()
    case["labels"] = torch.full_like(case["labels"], IGNORE_INDEX)
    terms = distillation_loss(**case, objective=OBJECTIVE)
    assert [float(term.detach()) for term in terms] == [0.0] * 5
    for gradient, name in zip(gradients(terms.loss, case), LEARNING, strict=True):
        assert torch.equal(gradient, torch.zeros_like(case[name]))


class Shapes(TorchDispatchMode):
    """Remembers the shape of every tensor that takes memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        given = {each.untyped_storage().data_ptr() for each in tensors}
        for each in result if isinstance(result, list | tuple) else [result]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given:
                self.seen.append(tuple(each.shape))
        return result


def shapes_made(case: dict[str, Tensor], backward: bool = True) -> list[tuple[int, ...]]:
    with Shapes() as shapes:
        loss = distillation_loss(**case, objective=OBJECTIVE).loss
        if backward:
            loss.backward()
    return shapes.seen


def test_the_logits_of_more_than_a_chunk_never_exist() -> None:
    """Four tensors of a chunk are taken at once, and no more for more tokens."""
    for tokens in (4 * CHUNK_TOKENS, 9 * CHUNK_TOKENS + 5):
        shapes = shapes_made(random_case((tokens, 17)))
        wide = sorted((shape for shape in shapes if VOCABULARY in shape), key=math.prod)
        assert wide.pop() == (4, CHUNK_TOKENS, VOCABULARY)
        assert math.prod(wide.pop()) < CHUNK_TOKENS * VOCABULARY


def test_a_frozen_head_costs_no_gradient() -> None:
    case = random_case((200, 17))
    assert (VOCABULARY, 6) in shapes_made(case)
    frozen = {**case, "student_states": case["student_states"].detach().requires_grad_()}
    frozen["student_head"] = case["student_head"].detach()
    assert (VOCABULARY, 6) not in shapes_made(frozen)
    assert frozen["student_states"].grad is not None
    torch.testing.assert_close(frozen["student_states"].grad, case["student_states"].grad)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_makes_no_gradients(context: type) -> None:
    case = random_case((200, 17))
    learnt = distillation_loss(**case, objective=OBJECTIVE)
    with context():
        shapes = shapes_made(case, backward=False)
        terms = distillation_loss(**case, objective=OBJECTIVE)
    assert (VOCABULARY, 6) not in shapes
    assert not terms.loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(terms, learnt, strict=True))


def test_only_the_loss_has_a_gradient_and_only_once() -> None:
    terms = distillation_loss(**random_case(), objective=OBJECTIVE)
    assert [term.requires_grad for term in terms] == [True, False, False, False, False]
    terms.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        terms.loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmaxes_are_in_float32_under_autocast(dtype: torch.dtype) -> None:
    """Only the product with the vocabulary may be rounded: then the loss is exact on its result."""
    random = torch.Generator().manual_seed(0)
    states = [torch.randn(4, 30, 16, generator=random) for _ in range(2)]
    heads = [torch.randn(5000, 16, generator=random) for _ in range(2)]
    labels = torch.randint(0, 5000, (4, 30), generator=random)
    with torch.autocast("cpu", dtype=dtype):
        terms = distillation_loss(states[0], heads[0], states[1], heads[1], labels, OBJECTIVE)
    student, teacher = (
        (s.to(dtype) @ h.to(dtype).T).double().flatten(0, 1)
        for s, h in zip(states, heads, strict=True)
    )
    cross_entropy = functional.cross_entropy(student, labels.flatten(), reduction="sum")
    p, log_q = (teacher / 2).softmax(-1), (student / 2).log_softmax(-1)
    kl = 4 * (p * (p.log() - log_q)).sum()
    assert terms.kl.dtype == terms.cross_entropy.dtype == torch.float32
    assert float(terms.cross_entropy) == pytest.approx(float(cross_entropy), rel=1e-6)
    assert float(terms.kl) == pytest.approx(float(kl), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast_are_those_within_its_rounding(dtype: torch.dtype) -> None:
    case = random_case((100 * CHUNK_TOKENS,), student_width=16)
    with torch.autocast("cpu", dtype=dtype):
        loss = distillation_loss(**case, objective=OBJECTIVE).loss
    for ours, theirs, name in zip(
        gradients(loss, case),
        gradients(plain_terms(case, OBJECTIVE).loss, case),
        LEARNING,
        strict=True,
    ):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.8 * torch.finfo(dtype).eps, name
    assert [
        gradient.dtype
        for gradient in torch.autograd.grad(
            distillation_loss(**case, objective=OBJECTIVE).loss, [case[n] for n in LEARNING]
        )
    ] == [torch.float32] * 2


def test_a_half_precision_teacher_is_multiplied_in_its_own_dtype() -> None:
    case = random_case((30, 5))
    rounded = {k: v.bfloat16() if k.startswith("teacher") else v for k, v in case.items()}
    terms = distillation_loss(**rounded, objective=OBJECTIVE)
    teacher = (rounded["teacher_states"] @ rounded["teacher_head"].T).double()
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    plain = plain_terms({**case, "teacher_states": teacher, "teacher_head": identity}, OBJECTIVE)
    assert float(terms.kl) == pytest.approx(float(plain.kl.detach()), rel=1e-5)
