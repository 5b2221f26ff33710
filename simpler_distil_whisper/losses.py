"""The distillation loss: cross-entropy with the labels and divergence from the teacher, as sums.

Pure functions of tensors. Called by `training.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from simpler_distil_whisper.batches import IGNORE_INDEX


class LossTerms(NamedTuple):
    """Sums over the real tokens of a micro-batch, scalars.

    Sums, not means: added over micro-batches and processes and divided once by the tokens of the
    optimizer step, they weigh every token alike however the step was cut up.
    """

    cross_entropy: Tensor
    kl: Tensor
    tokens: Tensor


def distillation_loss(
    student_states: Tensor,
    student_head: Tensor,
    teacher_states: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    temperature: float,
) -> LossTerms:
    """Return the two terms of Gandhi et al. 2023, section 4.1, over the tokens that have a label.

    cross_entropy = sum -log p_S(label)
    kl = T² sum_v p_T(v) (log p_T(v) - log p_S(v)), both distributions at temperature T; T² keeps
    the gradient's size independent of T (Hinton et al. 2015, section 2).

    Real tokens are selected before the vocabulary product, so padding costs nothing there, and the
    softmaxes are in float32, since the tail of 51,866 probabilities is lost in bfloat16.

    Args:
        student_states: float [B, L, D]: last decoder states.
        student_head: float [V, D]: output embedding.
        teacher_states: float [B, L, D']: the teacher's for the same decoder input.
        teacher_head: float [V, D']: its output embedding.
        labels: int64 [B, L]: the next token, IGNORE_INDEX where the loss must not look.
        temperature: T > 0 of both distributions in `kl`.
    """
    real = labels != IGNORE_INDEX
    student_logits = functional.linear(student_states[real], student_head).float()
    with torch.no_grad():
        teacher_logits = functional.linear(teacher_states[real], teacher_head).float()
    cross_entropy = functional.cross_entropy(student_logits, labels[real], reduction="sum")
    kl = functional.kl_div(
        (student_logits / temperature).log_softmax(-1),
        (teacher_logits / temperature).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    return LossTerms(cross_entropy, temperature**2 * kl, real.sum())
