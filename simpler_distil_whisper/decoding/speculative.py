"""Speculative decoding: a student drafts, and its teacher reads several tokens at once.

What comes out are the teacher's own greedy tokens; the student only decides how fast. Decoding one
token at a time is mostly fetching weights, and to read a few tokens at once costs hardly more
(Leviathan et al. 2023; with a distilled Whisper: Gandhi et al. 2023). Called by `decoding.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.decoding.cached_decoder import (
    CachedDecoder,
    DecoderCache,
    places_to_keep,
)
from simpler_distil_whisper.decoding.search import Found, Start, found, read_prompts
from simpler_distil_whisper.decoding.token_rules import TokenRules
from simpler_distil_whisper.model.whisper import Whisper

# Measured on one CPU thread, one utterance at a time, 12 decoder layers of Whisper small and 2 of
# the student: to draft 5 tokens and to read 6 costs as much as 3.4 single tokens. It is the best
# number where 80 % or more are accepted (of 80, 90 and 95 %: 1.1, 1.4 and 1.6 times as fast); where
# fewer than about 75 % are, 5 does not pay. The more rows a batch has, the less there is to gain.
DRAFT_TOKENS = 5


@dataclass(frozen=True)
class Drafts:
    """How much was drafted, and how much of it the teacher would have said itself.

    Attributes:
        drafted: tokens, end tokens included; those behind one are not counted.
        accepted: the tokens of them that were said.
    """

    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: "Drafts") -> "Drafts":
        return Drafts(self.drafted + other.drafted, self.accepted + other.accepted)


class Assistant:
    """A student that drafts for its teacher.

    Attributes:
        student: the loaded model.
        own_encoder: whether it has one; else it uses the teacher's, and its copy is let go.
        drafts: the sums over everything that it has drafted.
    """

    def __init__(self, student: Whisper, teacher: Whisper) -> None:
        """Compare the two.

        Raises:
            ConfigError: they do not take the same audio, or do not have the same tokens.
        """
        if difference := _difference(student, teacher):
            raise ConfigError(
                f"assistant.path: it cannot draft for the model: {difference}. "
                "Name a student of that model, or null"
            )
        parts, teachers_parts = student.model.model, teacher.model.model
        self.own_encoder = not _same_weights(parts.encoder, teachers_parts.encoder)
        if not self.own_encoder:
            parts.encoder = teachers_parts.encoder
        self.student = student
        self.decoder = CachedDecoder(student.model)
        self.drafts = Drafts()

    def speculate(
        self,
        teacher: CachedDecoder,
        rules: TokenRules,
        start: Start,
        states: Tensor,
        prompts: Sequence[Sequence[int]],
    ) -> list[Found]:
        """Return the teacher's most probable tokens, those of `search.sample` at temperature 0.

        Args:
            teacher: the decoder whose cache `start` has.
            rules: what may be said.
            start: the batch; its cache is used up.
            states: float [U, E, D]: of the encoder that the assistant uses.
            prompts: those that the teacher has read.
        """
        positions = self.student.model.config.max_target_positions
        cache = self.decoder.start(states, positions, uneven=True)
        read_prompts(self.decoder, cache, prompts)
        last = torch.tensor([prompt[-1] for prompt in prompts], device=states.device)
        speculation = _Speculation(teacher, self.decoder, rules, start, cache, last)
        while len(speculation.rows):
            speculation.judge(speculation.draft())
        self.drafts += Drafts(*speculation.tally.tolist())
        return speculation.results()

    def report(self) -> dict[str, object]:
        """Return what was drafted in all processes together; call it in every one of them."""
        everyone = sum(gather_object([self.drafts]), Drafts())
        drafted, accepted = everyone.drafted, everyone.accepted
        return {
            "drafted_tokens": drafted,
            "accepted_tokens": accepted,
            "acceptance_rate": round(accepted / drafted, 4) if drafted else None,
        }


class _Speculation:
    """A batch of U utterances, of which R go on.

    The teacher's cache has all tokens but the last, the student's all but the last two: to read
    both at once costs the student no more than one, and the last token of its own draft it then
    need not read, just in case that all are accepted.

    Attributes:
        said: int64 [U, limit + 1]: the tokens of each utterance; behind them, what was rejected.
        total: float32 [U]: their log-probability.
        rows: int64 [R]: which utterances go on.
        counts: int64 [R]: how many tokens they have.
        limits: int64 [R]: the most that they may have.
        pair: int64 [R, 2]: their last two tokens, those of the prompt included.
        tally: int64 [2]: how many tokens were drafted, and how many accepted.
    """

    def __init__(
        self,
        teacher: CachedDecoder,
        student: CachedDecoder,
        rules: TokenRules,
        start: Start,
        student_cache: DecoderCache,
        last: Tensor,
    ) -> None:
        self.teacher, self.student, self.rules = teacher, student, rules
        self.teacher_cache, self.student_cache = start.cache, student_cache
        count, device = len(last), last.device
        self.all_limits = self.limits = start.limits
        self.said = torch.full((count, int(start.limits.max()) + 1), rules.end, device=device)
        self.total = torch.zeros(count, device=device)
        self.rows = torch.arange(count, device=device)
        self.counts = torch.zeros_like(self.rows)
        self.pair = last[:, None].expand(-1, 2)
        self.tally = torch.zeros(2, dtype=torch.int64, device=device)
        # The first token needs no draft: it is as if the last of the prompt had just been judged.
        start.cache.advance(-1)
        student_cache.advance(-2)
        logits = teacher.logits(start.hidden, rules.bias(0))
        rules.apply(logits, self.said[:, :0])
        self._say(logits[:, None], self.said[:, :0])

    def draft(self) -> Tensor:
        """Return int64 [R, k]: what the student would say next.

        No row's draft is longer than any row's limit allows, or than until all have ended.
        """
        length = min(DRAFT_TOKENS, int((self.limits - self.counts).min()))
        tokens, before = self.pair, self.student_cache.longest
        drafts = self.pair[:, :0]
        for number in range(length):
            hidden = self.student.read(tokens, self.student_cache)[:, -1:]
            self.student_cache.advance(tokens.shape[1])
            logits = self.student.logits(hidden, self.rules.bias(1))
            self._rule_out(logits, number)
            tokens = logits.argmax(-1)
            drafts = torch.cat([drafts, tokens], dim=1)
            self.said[self.rows, self.counts + number] = tokens[:, 0]
            if bool((drafts == self.rules.end).any(dim=1).all()):
                break
        self.student_cache.advance(before - self.student_cache.longest)
        return drafts

    def judge(self, drafts: Tensor) -> None:
        """Let the teacher read int64 [R, k] and say what it would have said without them."""
        tokens = torch.cat([self.pair[:, 1:], drafts], dim=1)
        states = self.teacher.read(tokens, self.teacher_cache)
        logits = self.teacher.logits(states, self.rules.bias(1))
        self._rule_out(logits, 0)
        self._say(logits, drafts)

    def results(self) -> list[Found]:
        """Return what was found, once no row goes on."""
        columns = self.said.tolist(), self.all_limits.tolist(), self.total.tolist()
        return [
            found(ids, limit, self.rules.end, log_probability)
            for ids, limit, log_probability in zip(*columns, strict=True)
        ]

    def _rule_out(self, logits: Tensor, ahead: int) -> None:
        """Apply the rules to float32 [R, n, V], n tokens in a row of which `ahead` are drafted.

        The rows have different numbers of tokens before, so the shorter ones are filled up in front
        with their first token: to have said that timestamp twice changes nothing.
        """
        if not self.rules.timestamps:
            return
        numbers = torch.arange(logits.shape[1], device=logits.device)
        lengths = self.counts[:, None] + ahead + numbers
        longest = int(lengths.max())
        places = lengths[..., None] + torch.arange(-longest, 0, device=logits.device)
        said = self.said[self.rows[:, None, None], places.clamp(min=0)]
        self.rules.apply(logits.flatten(0, 1), said.flatten(0, 1))

    def _say(self, logits: Tensor, drafts: Tensor) -> None:
        """Choose tokens up to the first that is not the draft's, and let go who has ended.

        Args:
            logits: float32 [R, k + 1, V]: of the teacher, for each drafted token and the next.
            drafts: int64 [R, k].
        """
        tokens = logits.argmax(-1)
        ends = tokens == self.rules.end
        agreed = (tokens[:, :-1] == drafts).cumprod(dim=1).bool()
        numbers = torch.arange(tokens.shape[1], device=tokens.device)
        places = self.counts[:, None] + numbers
        new = functional.pad(agreed, (1, 0), value=True) & ~_behind(ends)
        new &= places < self.limits[:, None]
        chosen = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        self.total[self.rows] += chosen.masked_fill(~new, 0.0).sum(dim=1)
        self.said[self.rows[:, None], places] = tokens
        drafted = ~_behind(drafts == self.rules.end)
        self.tally += torch.stack([drafted.sum(), (drafted & agreed).sum()])
        count = agreed.sum(dim=1, keepdim=True)
        self.pair = torch.cat([self.pair[:, 1:], tokens], dim=1).gather(
            1, count + torch.arange(2, device=tokens.device)
        )
        self.counts = self.counts + new.sum(dim=1)
        self._go_on((new & ends).any(dim=1) | (self.counts == self.limits), count[:, 0] + 1)

    def _go_on(self, ended: Tensor, more: Tensor) -> None:
        """Count int64 [R] tokens into both caches, and drop the rows that have ended, bool [R]."""
        order = places_to_keep(ended)
        for cache in (self.teacher_cache, self.student_cache):
            # Whoever leaves is no longer to count for the longest row.
            cache.advance(torch.where(ended, -cache.lengths, more))
            if len(order) < len(ended):
                cache.keep(order)
        self.rows, self.counts, self.limits, self.pair = (
            values[order] for values in (self.rows, self.counts, self.limits, self.pair)
        )


def _behind(ends: Tensor) -> Tensor:
    """Return bool [R, n]: what stands behind an end token, given where these are."""
    return ends.cumsum(dim=1) > ends


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, its = one.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def _difference(student: Whisper, teacher: Whisper) -> str | None:
    """Return in what a student differs from a model that it is to draft for, if in anything."""
    for name, what in (
        ("num_mel_bins", "mel bins"),
        ("max_source_positions", "positions of audio"),
        ("max_target_positions", "positions of text"),
        ("vocab_size", "tokens"),
    ):
        mine, its = (getattr(whisper.model.config, name) for whisper in (student, teacher))
        if mine != its:
            return f"it has {mine} {what}, the model {its}"
    vocabularies = [whisper.tokenizer.get_vocab() for whisper in (student, teacher)]
    if vocabularies[0] == vocabularies[1]:
        return None
    mine, its = ({id: token for token, id in words.items()} for words in vocabularies)
    id = min(id for id in mine.keys() | its.keys() if mine.get(id) != its.get(id))
    return f"its token {id} is {mine.get(id)}, that of the model {its.get(id)}"
