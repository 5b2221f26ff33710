"""Which tokens a Whisper may choose next.

Owns the list of tokens that are never text, and OpenAI's rules for timestamps. It works on the
logits of a whole batch at once and chooses nothing.
"""

import torch
from torch import Tensor

from simpler_distil_whisper.model.whisper import Whisper


class TokenRules:
    """The tokens that are allowed with or without timestamps, as changes of the logits.

    Attributes:
        end: the id of `<|endoftext|>`.
        timestamps: whether timestamp tokens are chosen.
    """

    def __init__(self, whisper: Whisper, timestamps: bool) -> None:
        tokens, generation = whisper.tokens, whisper.model.generation_config
        self.end = tokens.end
        self.timestamps = timestamps
        self._times = tokens.timestamps
        self._latest_initial: int | None = getattr(generation, "max_initial_timestamp_index", None)
        never = {*tokens.control, *(generation.suppress_tokens or ())} - {tokens.end}
        if timestamps:
            never -= set(self._times)
        size, device = whisper.model.config.vocab_size, whisper.model.device
        self._bias = torch.zeros(size, device=device, dtype=whisper.model.dtype)
        self._bias[sorted(never)] = -torch.inf
        self._initial_bias = self._bias.clone()
        self._initial_bias[list(generation.begin_suppress_tokens or ())] = -torch.inf
        self._numbers = torch.arange(len(self._times), device=device)

    def bias(self, step: int) -> Tensor:
        """Return [V]: 0 or minus infinity, to be added to the logits of the `step`-th token."""
        return self._bias if step else self._initial_bias

    def apply(self, logits: Tensor, tokens: Tensor) -> None:
        """Rule out, in place, what cannot follow; the same rules as openai/whisper's decoder.

        Timestamps come in pairs, the end of one segment and the start of the next; they do not
        decrease, and a segment takes time. The first token is a timestamp, up to the one that the
        generation config names. If the timestamps together are more probable than any single text
        token, the next token is a timestamp.

        Args:
            logits: float32 [R, V]: or log-probabilities; `bias` is added already.
            tokens: int64 [R, L]: the new tokens of each row so far, without the prompt.
        """
        if not self.timestamps:
            return
        first, stop = self._times.start, self._times.stop
        # What people have added to the vocabulary stands behind the timestamps.
        before, times, added = logits.tensor_split((first, stop), dim=1)
        if tokens.shape[1] == 0:
            before.fill_(-torch.inf)
            added.fill_(-torch.inf)
            if self._latest_initial is not None:
                times[:, self._latest_initial + 1 :] = -torch.inf
            return
        is_time = (tokens >= first) & (tokens < stop)
        after_time = is_time[:, -1]
        before_that = is_time[:, -2] if tokens.shape[1] > 1 else torch.ones_like(after_time)
        alone = after_time & ~before_that
        times.masked_fill_((after_time & before_that)[:, None], -torch.inf)
        for text in (logits[:, : self.end], added):
            text.masked_fill_(alone[:, None], -torch.inf)
        latest = torch.where(is_time, tokens - first, -1).amax(dim=1)  # they do not decrease
        earliest = torch.where(alone, latest, latest + 1).clamp(min=0)
        times.masked_fill_(self._numbers < earliest[:, None], -torch.inf)
        best = torch.cat([before.amax(dim=-1, keepdim=True), added], dim=1).amax(dim=-1)
        due = times.logsumexp(dim=-1) > best
        for text in (before, added):
            text.masked_fill_(due[:, None], -torch.inf)
