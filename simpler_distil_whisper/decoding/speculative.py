"""Speculative decoding: a student drafts tokens, and its teacher verifies several at once.

The results are the teacher's own greedy tokens; the student only changes the speed. Decoding one
token at a time is mostly fetching weights, and to read a few tokens at once costs hardly more
(Leviathan et al. 2023; with a distilled Whisper: Gandhi et al. 2023).

Letters of shapes: U utterances of a batch, R of which go on, k drafted tokens of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional

from simpler_distil_whisper.decoding.cached_decoder import (
    CachedDecoder,
    KeyValueCache,
    indices_to_keep,
)
from simpler_distil_whisper.decoding.search import (
    PromptedBatch,
    SearchResult,
    read_prompts,
    search_results,
)
from simpler_distil_whisper.decoding.token_rules import TokenRules
from simpler_distil_whisper.model.whisper import Whisper

# Measured on one CPU thread, one utterance at a time, 12 decoder layers of Whisper small and 2 of
# the student: to draft 5 tokens and verify them costs as much as 3.4 single tokens. 5 is best where
# 80 % or more of the drafts are accepted (80, 90, 95 %: 1.1, 1.4, 1.6 times as fast); where fewer
# than about 75 % are, it does not pay. The more rows a batch has, the less there is to gain.
DRAFT_TOKENS = 5


@dataclass(frozen=True)
class DraftCounts:
    """How many tokens were drafted, and how many of these were accepted.

    Attributes:
        drafted: tokens up to the end token, which is included.
        accepted: those of them that the teacher chose too.
    """

    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: "DraftCounts") -> "DraftCounts":
        return DraftCounts(self.drafted + other.drafted, self.accepted + other.accepted)


class Assistant:
    """A student that drafts for its teacher.

    Attributes:
        student: the loaded model.
        own_encoder: whether it needs an encoder of its own; if not, the two share the teacher's.
        draft_counts: sums over everything that it has drafted.
    """

    def __init__(self, student: Whisper, teacher: Whisper) -> None:
        """Share the teacher's encoder if the weights are equal; the student is a copy of it."""
        parts, teacher_parts = student.model.model, teacher.model.model
        self.own_encoder = not _same_weights(parts.encoder, teacher_parts.encoder)
        if not self.own_encoder:
            parts.encoder = teacher_parts.encoder
        self.student = student
        self.decoder = CachedDecoder(student.model)
        self.draft_counts = DraftCounts()

    def speculate(
        self,
        teacher: CachedDecoder,
        rules: TokenRules,
        batch: PromptedBatch,
        states: Tensor,
        prompts: Sequence[Sequence[int]],
    ) -> list[SearchResult]:
        """Return the teacher's greedy tokens, those of `greedy_or_sampled` at temperature 0.

        The student reads the same prompts as the teacher, and encoder states, float [U, E, D], of
        the encoder that it uses.
        """
        positions = self.student.model.config.max_target_positions
        cache = self.decoder.start(states, positions, uneven=True)
        read_prompts(self.decoder, cache, prompts)
        last = torch.tensor([prompt[-1] for prompt in prompts], device=states.device)
        speculation = _Speculation(teacher, self.decoder, rules, batch, cache, last)
        while len(speculation.rows):
            speculation.verify(speculation.draft())
        self.draft_counts += DraftCounts(*speculation.draft_counts.tolist())
        return search_results(speculation.tokens, batch.limits, speculation.total, rules.end)

    def report(self) -> dict[str, object]:
        """Return the counts of all processes together; call it in every one of them."""
        everyone = sum(gather_object([self.draft_counts]), DraftCounts())
        drafted, accepted = everyone.drafted, everyone.accepted
        return {
            "drafted_tokens": drafted,
            "accepted_tokens": accepted,
            "acceptance_rate": round(accepted / drafted, 4) if drafted else None,
        }


class _Speculation:
    """The drafting and verifying of one batch.

    The teacher's cache has all tokens but the last, the student's all but the last two: it costs
    the student no more to read both at once than to read one, and so it need not read the last
    token of its own draft just in case that all are accepted.

    Attributes:
        tokens: int64 [U, limit + 1]: the chosen tokens; behind them stand rejected drafts.
        total: float32 [U]: the log-probability of the chosen tokens.
        rows: int64 [R]: the utterances that go on.
        counts: int64 [R]: how many tokens they have.
        limits: int64 [R]: the most that they may have.
        last_two: int64 [R, 2]: their last two tokens, those of the prompt included.
        draft_counts: int64 [2]: how many tokens were drafted, and how many accepted.
    """

    def __init__(
        self,
        teacher: CachedDecoder,
        student: CachedDecoder,
        rules: TokenRules,
        batch: PromptedBatch,
        student_cache: KeyValueCache,
        last: Tensor,
    ) -> None:
        self.teacher, self.student, self.rules = teacher, student, rules
        self.teacher_cache, self.student_cache = batch.cache, student_cache
        count, device = len(last), last.device
        self.limits = batch.limits
        self.tokens = torch.full((count, int(batch.limits.max()) + 1), rules.end, device=device)
        self.total = torch.zeros(count, device=device)
        self.rows = torch.arange(count, device=device)
        self.counts = torch.zeros_like(self.rows)
        self.last_two = last[:, None].expand(-1, 2)
        self.draft_counts = torch.zeros(2, dtype=torch.int64, device=device)
        # The first token needs no draft: the prompt is treated as a draft that was just verified.
        batch.cache.advance(-1)
        student_cache.advance(-2)
        logits = teacher.logits(batch.states, rules.bias(0))
        rules.apply(logits, self.tokens[:, :0])
        self._accept(logits[:, None], self.tokens[:, :0])

    def draft(self) -> Tensor:
        """Return int64 [R, k]: the student's next tokens.

        Drafting ends where the first row reaches its limit, or when every row has an end token.
        """
        length = min(DRAFT_TOKENS, int((self.limits - self.counts).min()))
        tokens, before = self.last_two, self.student_cache.longest
        drafts = self.last_two[:, :0]
        for number in range(length):
            states = self.student.read(tokens, self.student_cache)[:, -1:]
            self.student_cache.advance(tokens.shape[1])
            logits = self.student.logits(states, self.rules.bias(1))
            self._apply_rules(logits, number)
            tokens = logits.argmax(-1)
            drafts = torch.cat([drafts, tokens], dim=1)
            self.tokens[self.rows, self.counts + number] = tokens[:, 0]
            if bool((drafts == self.rules.end).any(dim=1).all()):
                break
        self.student_cache.advance(before - self.student_cache.longest)
        return drafts

    def verify(self, drafts: Tensor) -> None:
        """Let the teacher read int64 [R, k], and accept the drafts that it would have chosen."""
        tokens = torch.cat([self.last_two[:, 1:], drafts], dim=1)
        states = self.teacher.read(tokens, self.teacher_cache)
        logits = self.teacher.logits(states, self.rules.bias(1))
        self._apply_rules(logits, 0)
        self._accept(logits, drafts)

    def _apply_rules(self, logits: Tensor, ahead: int) -> None:
        """Apply the rules to float32 [R, n, V]: n tokens in a row, behind `ahead` drafted ones.

        The rows have different numbers of tokens before, so shorter rows are padded in front with
        their first token: to repeat that timestamp changes nothing.
        """
        if not self.rules.timestamps:
            return
        numbers = torch.arange(logits.shape[1], device=logits.device)
        lengths = self.counts[:, None] + ahead + numbers
        longest = int(lengths.max())
        places = lengths[..., None] + torch.arange(-longest, 0, device=logits.device)
        before = self.tokens[self.rows[:, None, None], places.clamp(min=0)]
        self.rules.apply(logits.flatten(0, 1), before.flatten(0, 1))

    def _accept(self, logits: Tensor, drafts: Tensor) -> None:
        """Add the accepted drafts and the teacher's next token; drop the rows that have ended.

        Args:
            logits: float32 [R, k + 1, V]: of the teacher, for each drafted token and the next.
            drafts: int64 [R, k].
        """
        tokens = logits.argmax(-1)
        ends = tokens == self.rules.end
        accepted = (tokens[:, :-1] == drafts).cumprod(dim=1).bool()
        numbers = torch.arange(tokens.shape[1], device=tokens.device)
        places = self.counts[:, None] + numbers
        new = functional.pad(accepted, (1, 0), value=True) & ~_behind(ends)
        new &= places < self.limits[:, None]
        log_probability = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        self.total[self.rows] += log_probability.masked_fill(~new, 0.0).sum(dim=1)
        self.tokens[self.rows[:, None], places] = tokens
        drafted = ~_behind(drafts == self.rules.end)
        self.draft_counts += torch.stack([drafted.sum(), (drafted & accepted).sum()])
        count = accepted.sum(dim=1, keepdim=True)
        self.last_two = torch.cat([self.last_two[:, 1:], tokens], dim=1).gather(
            1, count + torch.arange(2, device=tokens.device)
        )
        self.counts = self.counts + new.sum(dim=1)
        self._drop_ended((new & ends).any(dim=1) | (self.counts == self.limits), count[:, 0] + 1)

    def _drop_ended(self, ended: Tensor, added: Tensor) -> None:
        """Count int64 [R] added tokens in both caches, and drop the rows that ended, bool [R]."""
        order = indices_to_keep(ended)
        for cache in (self.teacher_cache, self.student_cache):
            # A row that is dropped must no longer count as the longest.
            cache.advance(torch.where(ended, -cache.lengths, added))
            if len(order) < len(ended):
                cache.keep(order)
        self.rows, self.counts = self.rows[order], self.counts[order]
        self.limits, self.last_two = self.limits[order], self.last_two[order]


def _behind(ends: Tensor) -> Tensor:
    """Return bool [R, n]: the places behind the first end token, given the places of end tokens."""
    return ends.cumsum(dim=1) > ends


def _same_weights(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )
