"""The distillation loss: cross-entropy with the labels and divergence from the teacher, as sums.

The formula is `token_terms`; `_terms_and_gradient` is the same with its gradient by hand. A batch
passes through them in chunks, so that its logits never exist together.

Letters of shapes besides those in `data/features.py`: P positions with a label, C in a chunk.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from simpler_distil_whisper.model.head import dtype_of_products, multiply_by_head
from simpler_distil_whisper.training.options import Objective

IGNORE_INDEX = -100  # what torch's cross-entropy skips

# Tokens whose logits exist at a time. On a CPU 64 take 12 % longer, whose matrix products are too
# small, and 256 are no faster. A GPU needs more to be busy: those of 2,048 take 1.7 GB.
CHUNK_TOKENS, CHUNK_TOKENS_ON_GPU = 128, 2048


class LossTerms(NamedTuple):
    """Sums over some tokens, scalars.

    Sums, not means: added over micro-batches and processes and divided once by the tokens of the
    optimizer step, they weigh every token alike however the step was divided.

    Attributes:
        loss: the weighted sum of the terms.
        cross_entropy: without its weight.
        kl: T² KL without its weight; 0 without a teacher.
        agreement: tokens for which student and teacher have the same likeliest token; 0 without a
            teacher.
        tokens: how many there are.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    agreement: Tensor
    tokens: Tensor


def token_terms(
    logits: Tensor, teacher_log_probs: Tensor | None, labels: Tensor, objective: Objective
) -> LossTerms:
    """Return the loss of Gandhi et al. 2023, section 4.1, summed over some tokens.

    cross_entropy = sum -log p_S(label)
    kl = T² sum_v p_T(v) (log p_T(v) - log p_S(v)), both distributions at temperature T; T² keeps
    the gradient's size independent of T (Hinton et al. 2015, section 2).

    Args:
        logits: float [C, V]: the student's.
        teacher_log_probs: float [C, V]: log p_T at temperature T; None: there is no teacher.
        labels: int64 [C].
        objective: weights of the terms, and T.
    """
    log_probs = functional.log_softmax(logits, -1)
    cross_entropy = -log_probs.gather(1, labels[:, None]).sum()
    kl = agreement = cross_entropy.new_zeros(())
    if teacher_log_probs is not None:
        log_probs = functional.log_softmax(logits / objective.temperature, -1)
        divergence = teacher_log_probs.exp() * (teacher_log_probs - log_probs)
        kl = objective.temperature**2 * divergence.sum()
        likeliest = teacher_log_probs.gather(1, logits.argmax(-1, keepdim=True))
        same = likeliest == teacher_log_probs.amax(-1, keepdim=True)
        agreement = same.sum().to(kl.dtype)
    loss = objective.cross_entropy_weight * cross_entropy + objective.kl_weight * kl
    return LossTerms(loss, cross_entropy, kl, agreement, loss.new_full((), len(labels)))


def distillation_loss(
    student_states: Tensor,
    student_head: Tensor,
    teacher_states: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    objective: Objective,
    label_places: Tensor | None = None,
) -> LossTerms:
    """Return the terms of the loss over the tokens that have a label; only the loss has a gradient.

    The products with the heads are in autocast's dtype, without autocast in the heads' own; the
    softmaxes and the sum that is the head's gradient in float32, since the tail of 51,866
    probabilities is lost in bfloat16.

    Args:
        student_states: float [B, L, D]: last decoder states.
        student_head: float [V, D]: output embedding; it can be frozen.
        teacher_states: float [B, L, D']: the teacher's for the same decoder input; they get no
            gradient. None: there is no teacher.
        teacher_head: float [V, D']: its output embedding.
        labels: int64 [B, L]: the next token, IGNORE_INDEX at positions without a label.
        objective: weights of the terms, and the temperature T > 0.
        label_places: int64 [P]: which of the B x L positions have a label; None: they are looked
            up, which makes the CPU wait for a GPU.
    """
    if label_places is None:
        label_places = label_places_of(labels)
    terms = _LossInChunks.apply(  # type: ignore[no-untyped-call]
        student_states.flatten(0, 1),
        # Without gradients it must be detached: needs_input_grad of a trained head stays true.
        student_head if torch.is_grad_enabled() else student_head.detach(),
        None if teacher_states is None else teacher_states.flatten(0, 1),
        teacher_head,
        labels.flatten(),
        label_places,
        objective,
    )
    return LossTerms(*terms)


def label_places_of(labels: Tensor) -> Tensor:
    """Return int64 [P]: which positions have a label, counted through all rows."""
    return (labels.flatten() != IGNORE_INDEX).nonzero().flatten()


class _LossInChunks(torch.autograd.Function):
    """The loss of P positions. Its gradients are made in `forward`; `backward` scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_states: Tensor,
        student_head: Tensor,
        teacher_states: Tensor | None,
        teacher_head: Tensor | None,
        labels: Tensor,
        label_places: Tensor,
        objective: Objective,
    ) -> tuple[Tensor, ...]:
        """Return the terms of the positions that have a label, in the order of `LossTerms`.

        States are float [B x L, D], labels int64 [B x L], label_places int64 [P].
        """
        states, head = _in_dtype_of_product(student_states, student_head)
        teacher = None
        if teacher_states is not None and teacher_head is not None:
            teacher = _in_dtype_of_product(teacher_states, teacher_head)
        sum_dtype = torch.promote_types(head.dtype, torch.float32)
        needs_states, needs_head = ctx.needs_input_grad[:2]
        grad_states = torch.zeros_like(states, dtype=sum_dtype) if needs_states else None
        grad_head = torch.zeros_like(head, dtype=sum_dtype) if needs_head else None
        sums = torch.zeros(5, dtype=sum_dtype, device=head.device)
        # Allocated once: allocating and freeing for each chunk leaves holes in a CPU's memory.
        chunk_tokens = CHUNK_TOKENS_ON_GPU if head.is_cuda else CHUNK_TOKENS
        size = min(chunk_tokens, len(labels)), len(head)
        workspace = torch.empty(4, *size, dtype=sum_dtype, device=head.device)
        for places in torch.split(label_places, chunk_tokens):
            logits, log_p, gradient, log_q = workspace[:, : len(places)]
            if teacher is not None:
                # `logits` has the teacher's first, then the student's; `log_q` is free until then.
                multiply_by_head(teacher[0][places], teacher[1], logits, log_q)
                torch.log_softmax(logits.div_(objective.temperature), -1, out=log_p)
            chunk = states[places]
            multiply_by_head(chunk, head, logits, log_q)
            given = logits, None if teacher is None else log_p, labels[places], objective
            if not (needs_states or needs_head):
                sums += torch.stack(token_terms(*given))
                continue
            terms, gradient = _terms_and_gradient(*given, (gradient, log_q))
            sums += torch.stack(terms)
            grad_logits = gradient.to(head.dtype)
            if grad_states is not None:
                grad_states[places] = (grad_logits @ head).to(sum_dtype)
            if grad_head is not None:
                _add_product(grad_head, grad_logits.T, chunk)
        ctx.save_for_backward(grad_states, grad_head)
        ctx.dtypes = student_states.dtype, student_head.dtype
        loss, *others = sums
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients computed in `forward`."""
        # In place: a head's gradient is as large as the head.
        grad_states, grad_head = (
            None if buffer is None else buffer.mul_(grad_loss).to(dtype)
            for buffer, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_states, grad_head, None, None, None, None, None


def _in_dtype_of_product(states: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the dtype of their product: autocast's, or else the head's."""
    dtype = dtype_of_products(head.device, head.dtype)
    return states.to(dtype), head.to(dtype)


def _terms_and_gradient(
    logits: Tensor,
    teacher_log_probs: Tensor | None,
    labels: Tensor,
    objective: Objective,
    buffers: Sequence[Tensor],
) -> tuple[LossTerms, Tensor]:
    """Return `token_terms`, and float [C, V]: the gradient of their loss, in one of `buffers`.

    By hand and in place: autograd over `token_terms` takes 7 to 25 % longer on a CPU, and twice the
    memory. For one token, with p and q the softmaxes of teacher and student at temperature T,

    d cross_entropy / d logits = softmax(logits) - onehot(label)
    d kl / d logits = T (q - p)

    Args:
        logits: float [C, V]: the student's; overwritten.
        teacher_log_probs: float [C, V]: log p, overwritten; None: there is no teacher.
        labels: int64 [C].
        objective: weights of the terms, and T.
        buffers: two tensors of the logits' size, overwritten.
    """
    gradient, log_q = buffers
    temperature = objective.temperature
    torch.log_softmax(logits, -1, out=gradient)
    cross_entropy = -gradient.gather(1, labels[:, None]).sum()
    gradient.exp_()
    gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
    gradient *= objective.cross_entropy_weight
    loss = objective.cross_entropy_weight * cross_entropy
    tokens = loss.new_full((), len(labels))
    if teacher_log_probs is None:
        none = cross_entropy.new_zeros(())
        return LossTerms(loss, cross_entropy, none, none, tokens), gradient
    likeliest = teacher_log_probs.gather(1, logits.argmax(-1, keepdim=True))
    same = likeliest == teacher_log_probs.amax(-1, keepdim=True)  # faster than a second argmax
    torch.log_softmax(logits.div_(temperature), -1, out=log_q)
    p = torch.exp(teacher_log_probs, out=logits)
    kl = temperature**2 * teacher_log_probs.sub_(log_q).mul_(p).sum()
    gradient.add_(log_q.exp_().sub_(p), alpha=objective.kl_weight * temperature)
    loss = loss + objective.kl_weight * kl
    return LossTerms(loss, cross_entropy, kl, same.sum().to(kl.dtype), tokens), gradient


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a total whose dtype may be finer than theirs."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
