"""The product with the output head: from decoder states to the logits of all tokens."""

import torch
from torch import Tensor


def multiply_by_head(
    states: Tensor, head: Tensor, out: Tensor | None = None, spare: Tensor | None = None
) -> Tensor:
    """Return float [N, V]: the logits of decoder states.

    Args:
        states: float [N, D]: last decoder states.
        head: float [V, D]: output embedding, of the same dtype.
        out: float [N, V]: overwritten and returned; of a dtype that may be finer. None: new memory.
        spare: of the same size and dtype, contiguous; may be overwritten too.
    """
    if head.device.type == "cpu" and head.dtype == torch.float32:
        # With so large a matrix on the left, MKL takes 0.5 to 0.9 of the time for 2 to 160 rows.
        spare = None if spare is None else spare.view(len(head), -1)
        logits = torch.mm(head, states.T, out=spare).T
        return logits.contiguous() if out is None else out.copy_(logits)
    if out is None or out.dtype == states.dtype:
        return torch.mm(states, head.T, out=out)
    return out.copy_(states @ head.T)
