"""The distillation loss: cross-entropy with the labels and divergence from the teacher, as sums.

Pure functions of tensors. Called by `training.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100  # what torch's cross-entropy skips

# Tokens whose logits exist at a time. On a CPU 64 take 12 % longer, whose matrix products are too
# small, and 256 are no faster.
CHUNK_TOKENS = 128


class LossWeights(NamedTuple):
    """loss = cross_entropy * CE + kl * T² KL, with both distributions in KL at T = temperature."""

    cross_entropy: float
    kl: float
    temperature: float


class LossTerms(NamedTuple):
    """Sums over the real tokens of a micro-batch, scalars.

    Sums, not means: added over micro-batches and processes and divided once by the tokens of the
    optimizer step, they weigh every token alike however the step was cut up.

    Attributes:
        loss: the weighted sum of both terms, the only one with a gradient.
        cross_entropy: without its weight.
        kl: T² KL without its weight; 0 without a teacher.
        agreement: tokens for which student and teacher have the same one on top; 0 without a
            teacher.
        tokens: all real ones.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    agreement: Tensor
    tokens: Tensor


def distillation_loss(
    student_states: Tensor,
    student_head: Tensor,
    teacher_states: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    weights: LossWeights,
) -> LossTerms:
    """Return the loss of Gandhi et al. 2023, section 4.1, over the tokens that have a label.

    cross_entropy = sum -log p_S(label)
    kl = T² sum_v p_T(v) (log p_T(v) - log p_S(v)), both distributions at temperature T; T² keeps
    the gradient's size independent of T (Hinton et al. 2015, section 2).

    The logits of a batch are never there together: real tokens pass through both heads some at a
    time, and their share of the gradient is made before their logits are dropped. The products
    are in autocast's dtype, without autocast in the heads' own; the softmaxes and the sum that is
    the head's gradient in float32, since the tail of 51,866 probabilities is lost in bfloat16.

    Args:
        student_states: float [B, L, D]: last decoder states.
        student_head: float [V, D]: output embedding; it can be frozen.
        teacher_states: float [B, L, D']: the teacher's for the same decoder input; they get no
            gradient. None: there is no teacher.
        teacher_head: float [V, D']: its output embedding.
        labels: int64 [B, L]: the next token, IGNORE_INDEX where the loss must not look.
        weights: of both terms, and the temperature T > 0 of `kl`.
    """
    loss, cross_entropy, kl, agreement = _LossInChunks.apply(  # type: ignore[no-untyped-call]
        student_states.flatten(0, 1),
        # Under no_grad a frozen head, for a function is not told that no gradient is wanted.
        student_head if torch.is_grad_enabled() else student_head.detach(),
        None if teacher_states is None else teacher_states.flatten(0, 1),
        teacher_head,
        labels.flatten(),
        weights,
    )
    return LossTerms(loss, cross_entropy, kl, agreement, (labels != IGNORE_INDEX).sum())


class _LossInChunks(torch.autograd.Function):
    """The loss of N positions. Its gradients are made in `forward`; `backward` scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_states: Tensor,
        student_head: Tensor,
        teacher_states: Tensor | None,
        teacher_head: Tensor | None,
        labels: Tensor,
        weights: LossWeights,
    ) -> tuple[Tensor, ...]:
        """Return loss, cross-entropy, KL and agreement; states are [N, D], labels [N]."""
        states, head = _in_dtype_of_product(student_states, student_head)
        teacher = None
        if teacher_states is not None and teacher_head is not None:
            teacher = _in_dtype_of_product(teacher_states, teacher_head)
        exact = torch.promote_types(head.dtype, torch.float32)
        sums = torch.zeros(3, dtype=exact, device=head.device)
        grad_states, grad_head = (
            torch.zeros_like(each, dtype=exact) if wanted else None
            for each, wanted in zip((states, head), ctx.needs_input_grad, strict=False)
        )
        # Taken once: what is taken and given back for each chunk leaves holes in a CPU's memory.
        size = min(CHUNK_TOKENS, len(labels)), len(head)
        workspace = torch.empty(4, *size, dtype=exact, device=head.device)
        real = (labels != IGNORE_INDEX).nonzero().flatten()
        for places in torch.split(real, CHUNK_TOKENS):
            logits, target, *others = workspace[:, : len(places)]
            if teacher is not None:
                _multiply(teacher[0][places], teacher[1].T, out=logits)
                torch.log_softmax(logits.div_(weights.temperature), -1, out=target)
            chosen = states[places]
            _multiply(chosen, head.T, out=logits)
            terms, gradient = _terms_and_gradient(
                logits, None if teacher is None else target, labels[places], weights, others
            )
            sums += terms
            gradient = gradient.to(head.dtype)
            if grad_states is not None:
                grad_states[places] = (gradient @ head).to(exact)
            if grad_head is not None:
                _add_product(grad_head, gradient.T, chosen)
        ctx.save_for_backward(grad_states, grad_head)
        ctx.dtypes = student_states.dtype, student_head.dtype
        cross_entropy, kl, agreement = sums
        ctx.mark_non_differentiable(cross_entropy, kl, agreement)
        loss = weights.cross_entropy * cross_entropy + weights.kl * kl
        return loss, cross_entropy, kl, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that were made, times that of the loss."""
        # In place: a head's gradient is as large as the head.
        grad_states, grad_head = (
            None if made is None else made.mul_(of_loss).to(dtype)
            for made, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_states, grad_head, None, None, None, None


def _in_dtype_of_product(states: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as autocast would have them for their product, or else in the head's dtype."""
    device = head.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else head.dtype
    return states.to(dtype), head.to(dtype)


def _terms_and_gradient(
    logits: Tensor,
    target: Tensor | None,
    labels: Tensor,
    weights: LossWeights,
    others: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return what some tokens add to the sums, and the gradient of their loss.

    Args:
        logits: float [C, V]: the student's; overwritten.
        target: float [C, V]: the teacher's log-probabilities at the temperature, overwritten; None:
            there is no teacher.
        labels: int64 [C].
        weights: of the terms.
        others: two more tensors of this size to write to.

    Returns:
        float [3]: cross-entropy, KL and agreement; float [C, V]: the gradient for the logits, in
        one of `others`.
    """
    gradient, log_q = others
    torch.log_softmax(logits, -1, out=gradient)
    cross_entropy = -gradient.gather(1, labels[:, None]).sum()
    gradient.exp_()
    gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
    gradient *= weights.cross_entropy
    if target is None:
        return torch.stack([cross_entropy, *cross_entropy.new_zeros(2)]), gradient
    said = target.gather(1, logits.argmax(-1, keepdim=True))
    agreement = (said == target.amax(-1, keepdim=True)).sum()  # faster than a second argmax
    torch.log_softmax(logits.div_(weights.temperature), -1, out=log_q)
    p = torch.exp(target, out=logits)
    kl = weights.temperature**2 * target.sub_(log_q).mul_(p).sum()
    gradient.add_(log_q.exp_().sub_(p), alpha=weights.kl * weights.temperature)
    return torch.stack([cross_entropy, kl, agreement]), gradient


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left @ right to a tensor, which may be finer than both."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a total, which may be finer than both."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
