"""The distillation loss against arithmetic by hand and against torch on the full logits."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from simpler_distil_whisper.batches import IGNORE_INDEX
from simpler_distil_whisper.losses import LossTerms, distillation_loss

# Three tokens, one position. With an identity head the states are the logits.
TEACHER = np.array([0.7, 0.2, 0.1])
STUDENT = np.array([0.25, 0.5, 0.25])


def terms_of(
    student: np.ndarray, teacher: np.ndarray, label: int, temperature: float = 1.0
) -> LossTerms:
    """The loss of one position whose probabilities are given."""
    head = torch.eye(len(student))
    states = [torch.tensor(np.log(p), dtype=torch.float32)[None, None] for p in (student, teacher)]
    return distillation_loss(states[0], head, states[1], head, torch.tensor([[label]]), temperature)


def random_case(
    seed: int = 0, student_width: int = 6, teacher_width: int = 10
) -> dict[str, Tensor]:
    """Two utterances of 5 positions over 11 tokens: prompt first, padding behind one."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    labels = torch.randint(0, 11, (2, 5), generator=random)
    labels[:, 0] = IGNORE_INDEX
    labels[0, 3:] = IGNORE_INDEX
    return {
        "student_states": normal(2, 5, student_width),
        "student_head": normal(11, student_width),
        "teacher_states": normal(2, 5, teacher_width),
        "teacher_head": normal(11, teacher_width),
        "labels": labels,
    }


def with_gradients(case: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = ("student_states", "student_head")
    return {k: v.clone().requires_grad_(k in leaves) for k, v in case.items()}


def test_cross_entropy_by_hand() -> None:
    assert float(terms_of(STUDENT, TEACHER, 1).cross_entropy) == pytest.approx(math.log(2))
    assert float(terms_of(STUDENT, TEACHER, 2).cross_entropy) == pytest.approx(math.log(4))


def test_kl_by_hand_is_from_teacher_to_student() -> None:
    # 0.7 ln(0.7/0.25) + 0.2 ln(0.2/0.5) + 0.1 ln(0.1/0.25); 0.429813 is the other way round
    by_hand = 0.7 * math.log(2.8) + 0.2 * math.log(0.4) + 0.1 * math.log(0.4)
    assert by_hand == pytest.approx(0.445847, abs=1e-6)
    assert float(terms_of(STUDENT, TEACHER, 0).kl) == pytest.approx(by_hand, abs=1e-6)
    reversed_kl = float(terms_of(TEACHER, STUDENT, 0).kl)
    assert reversed_kl == pytest.approx(0.429813, abs=1e-6)


def test_temperature_softens_both_distributions_and_scales_the_kl_alone() -> None:
    # At T = 2 a probability becomes its root, normalised.
    teacher, student = (np.sqrt(p) / np.sqrt(p).sum() for p in (TEACHER, STUDENT))
    by_hand = 4 * float((teacher * np.log(teacher / student)).sum())
    warm = terms_of(STUDENT, TEACHER, 1, temperature=2.0)
    assert float(warm.kl) == pytest.approx(by_hand, abs=1e-6)
    assert float(warm.cross_entropy) == pytest.approx(math.log(2))


def test_high_temperatures_leave_the_size_of_the_gradient() -> None:
    """With T² the gradient tends to (student - teacher logits) / V, Hinton et al. 2015, eq. 4."""

    def gradient(temperature: float) -> Tensor:
        student = torch.tensor([[[0.3, -0.2, -0.1]]], requires_grad=True)
        teacher = torch.tensor([[[-0.5, 0.1, 0.4]]])
        head, label = torch.eye(3), torch.tensor([[0]])
        distillation_loss(student, head, teacher, head, label, temperature).kl.backward()
        return student.grad.flatten()

    limit = (torch.tensor([0.3, -0.2, -0.1]) - torch.tensor([-0.5, 0.1, 0.4])) / 3
    assert torch.allclose(gradient(100.0), limit, atol=2e-3)
    assert torch.allclose(gradient(10.0), limit, atol=2e-2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_equals_the_plain_formula_on_full_logits(temperature: float) -> None:
    case = with_gradients(random_case())
    terms = distillation_loss(**case, temperature=temperature)
    (0.8 * terms.cross_entropy + 1.3 * terms.kl).backward()

    plain = with_gradients(random_case())
    student = plain["student_states"] @ plain["student_head"].T
    teacher = plain["teacher_states"] @ plain["teacher_head"].T
    mask = plain["labels"] != IGNORE_INDEX
    cross_entropy = functional.cross_entropy(
        student.transpose(1, 2), plain["labels"], ignore_index=IGNORE_INDEX, reduction="sum"
    )
    p = (teacher / temperature).softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    kl = temperature**2 * ((p * (p.log() - log_q)).sum(-1) * mask).sum()
    (0.8 * cross_entropy + 1.3 * kl).backward()

    assert int(terms.tokens) == 6
    torch.testing.assert_close(terms.cross_entropy, cross_entropy)
    torch.testing.assert_close(terms.kl, kl)
    for name in ("student_states", "student_head"):
        torch.testing.assert_close(case[name].grad, plain[name].grad)


def test_only_tokens_with_a_label_count() -> None:
    """Whatever stands at prompt and padding changes neither loss nor gradient."""
    quiet, noisy = with_gradients(random_case()), random_case()
    ignored = noisy["labels"] == IGNORE_INDEX
    noisy["student_states"][ignored] += 100.0
    noisy["teacher_states"][ignored] -= 50.0
    noisy = with_gradients(noisy)
    losses = []
    for case in (quiet, noisy):
        terms = distillation_loss(**case, temperature=2.0)
        losses.append(terms.cross_entropy + terms.kl)
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(quiet["student_head"].grad, noisy["student_head"].grad)
    assert torch.equal(quiet["student_states"].grad, noisy["student_states"].grad)
    assert not noisy["student_states"].grad[ignored].any()


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    case = random_case(student_width=10)
    case["student_states"] = case["teacher_states"].clone().requires_grad_()
    case["student_head"] = case["teacher_head"]
    kl = distillation_loss(**case, temperature=2.0).kl
    kl.backward()
    assert float(kl.detach()) == pytest.approx(0.0, abs=1e-5)
    assert case["student_states"].grad.abs().max() < 1e-5


def test_the_teacher_gets_no_gradient() -> None:
    case = {k: v.requires_grad_(v.is_floating_point()) for k, v in random_case().items()}
    terms = distillation_loss(**case, temperature=2.0)
    (terms.cross_entropy + terms.kl).backward()
    assert case["teacher_states"].grad is None
    assert case["teacher_head"].grad is None


def test_sums_of_parts_are_the_sum_of_the_whole() -> None:
    case = random_case()
    whole = distillation_loss(**case, temperature=2.0)
    heads = {k: case.pop(k) for k in ("student_head", "teacher_head")}
    parts = [
        distillation_loss(**heads, **{k: v[row : row + 1] for k, v in case.items()}, temperature=2)
        for row in range(2)
    ]
    for together, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(together, first + second)


def test_nothing_labelled_is_zero_and_not_nan() -> None:
    case = with_gradients(random_case())
    case["labels"] = torch.full((2, 5), IGNORE_INDEX)
    terms = distillation_loss(**case, temperature=2.0)
    (terms.cross_entropy + terms.kl).backward()
    assert [float(term.detach()) for term in terms] == [0.0, 0.0, 0.0]
    assert not case["student_head"].grad.any()


def test_softmaxes_are_in_float32_under_autocast() -> None:
    """Only the product with the vocabulary may be rounded: then the loss is exact on its result."""
    random = torch.Generator().manual_seed(0)
    states = [torch.randn(4, 30, 16, generator=random) for _ in range(2)]
    heads = [torch.randn(5000, 16, generator=random) for _ in range(2)]
    labels = torch.randint(0, 5000, (4, 30), generator=random)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = distillation_loss(states[0], heads[0], states[1], heads[1], labels, 2.0)
    student, teacher = (
        (s.bfloat16() @ h.bfloat16().T).double().flatten(0, 1)
        for s, h in zip(states, heads, strict=True)
    )
    cross_entropy = functional.cross_entropy(student, labels.flatten(), reduction="sum")
    p, log_q = (teacher / 2).softmax(-1), (student / 2).log_softmax(-1)
    kl = 4 * (p * (p.log() - log_q)).sum()
    assert terms.kl.dtype == terms.cross_entropy.dtype == torch.float32
    assert float(terms.cross_entropy) == pytest.approx(float(cross_entropy), rel=1e-6)
    assert float(terms.kl) == pytest.approx(float(kl), rel=1e-5)
