"""The product with the output head: from decoder states to logits. And the dtype of products."""

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


def dtype_of_products(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of products with weights of a dtype: autocast's, where that is on.

    Autocast would cast what is in another one at each of its uses, and keep every copy for the
    gradients: two of the encoder states in each decoder layer.
    """
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype
