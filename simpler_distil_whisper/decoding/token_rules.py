"""Which tokens a Whisper may say next.

Owns the lists of what is never text, and OpenAI's grammar of timestamps; it works on the logits of
a whole batch at once. Called by `search.py` and `speculative.py`.
"""

import torch
from torch import Tensor

from simpler_distil_whisper.model.whisper import Whisper


class TokenRules:
    """What may be said with or without timestamps, as additions to the logits and changes of them.

    Attributes:
        end: the id of `<|endoftext|>`.
        timestamps: whether they are said.
    """

    def __init__(self, whisper: Whisper, timestamps: bool) -> None:
        tokens, generation = whisper.tokens, whisper.model.generation_config
        self.end = tokens.end
        self.timestamps = timestamps
        self._begin = tokens.no_timestamps + 1
        self._latest_first: int | None = getattr(generation, "max_initial_timestamp_index", None)
        never = {*tokens.control, *(generation.suppress_tokens or ())} - {tokens.end}
        if timestamps:
            never -= set(range(self._begin, self._begin + len(tokens.timestamps)))
        size, device = whisper.model.config.vocab_size, whisper.model.device
        self._later = torch.zeros(size, device=device, dtype=whisper.model.dtype)
        self._later[sorted(never)] = -torch.inf
        self._first = self._later.clone()
        self._first[list(generation.begin_suppress_tokens or ())] = -torch.inf
        self._numbers = torch.arange(size - self._begin, device=device)

    def bias(self, step: int) -> Tensor:
        """Return [V]: 0 or minus infinity, to be added to the logits of the `step`-th token."""
        return self._later if step else self._first

    def apply(self, logits: Tensor, said: Tensor) -> None:
        """Rule out, in place, what cannot follow; the same rules as openai/whisper's decoder.

        Timestamps come in pairs, the end of one sentence and the start of the next; they do not
        decrease, and a sentence takes time. The first token is one. Where the timestamps together
        are likelier than any single word, one of them is next.

        Args:
            logits: float32 [R, V]: or log-probabilities; `bias` is added already.
            said: int64 [R, L]: the tokens of each row so far, without what was put before them.
        """
        if not self.timestamps:
            return
        words, times = logits[:, : self._begin], logits[:, self._begin :]
        if said.shape[1] == 0:
            words.fill_(-torch.inf)
            if self._latest_first is not None:
                times[:, self._latest_first + 1 :] = -torch.inf
            return
        is_time = said >= self._begin
        after_time = is_time[:, -1]
        before_that = is_time[:, -2] if said.shape[1] > 1 else torch.ones_like(after_time)
        alone = after_time & ~before_that
        times.masked_fill_((after_time & before_that)[:, None], -torch.inf)
        logits[:, : self.end].masked_fill_(alone[:, None], -torch.inf)
        latest = (said - self._begin).amax(dim=1)  # below 0 if there is none; they don't decrease
        earliest = torch.where(alone, latest, latest + 1).clamp(min=0)
        times.masked_fill_(self._numbers < earliest[:, None], -torch.inf)
        due = times.logsumexp(dim=-1) > words.amax(dim=-1)
        words.masked_fill_(due[:, None], -torch.inf)
