"""From encoder states to tokens: greedy decoding, sampling and beam search.

Every search takes a batch of utterances and answers for each as if it were alone; utterances that
have ended leave the batch. Called by `decoding.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simpler_distil_whisper.decoding.cached_decoder import (
    CachedDecoder,
    DecoderCache,
    places_to_keep,
)
from simpler_distil_whisper.decoding.token_rules import TokenRules

# How often a GPU is asked which rows have ended: to ask is to wait for it.
STEPS_BETWEEN_CHECKS = 8
IMPOSSIBLE = -1e9  # transformers' score of what is no candidate, finite so that it can be added to


@dataclass(frozen=True)
class Found:
    """The tokens of one utterance.

    Attributes:
        ids: new tokens, without the end token.
        complete: the model said the end token itself, before the limit.
        log_probability: natural logarithm, summed over the tokens and the end token.
    """

    ids: list[int]
    complete: bool
    log_probability: float


@dataclass
class Start:
    """A batch whose prompts have been read.

    Attributes:
        cache: of U rows, one for each utterance.
        hidden: float [U, D]: decoder states of the last tokens of the prompts.
        limits: int64 [U]: the most new tokens of each.
    """

    cache: DecoderCache
    hidden: Tensor
    limits: Tensor


def read_prompts(
    decoder: CachedDecoder, cache: DecoderCache, prompts: Sequence[Sequence[int]]
) -> Tensor:
    """Put the prompts into an empty cache and return float [U, P, D], their decoder states.

    Shorter prompts are padded behind; nothing ever sees the padding.
    """
    device = cache.lengths.device
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    states = decoder.read(ids.to(device), cache)
    lengths = [len(prompt) for prompt in prompts]
    same = len(set(lengths)) == 1
    cache.advance(lengths[0] if same else torch.tensor(lengths, device=device))
    return states


def sample(
    decoder: CachedDecoder,
    rules: TokenRules,
    start: Start,
    temperature: float = 0.0,
    randoms: Tensor | None = None,
) -> list[Found]:
    """Return the most probable next token again and again, or at a temperature a random one.

    Args:
        decoder: whose cache `start` has.
        rules: what may be said.
        start: the batch; its cache is used up.
        temperature: by which the logits are divided; 0 is greedy.
        randoms: float [U, limit]: a number from 0 to 1 for each token that is drawn, so that no
            utterance's luck depends on another's.
    """
    cache, hidden, limits = start.cache, start.hidden, start.limits
    longest, count = int(limits.max()), len(limits)
    said = torch.full((count, longest), rules.end, device=hidden.device)
    total = torch.zeros(count, device=hidden.device)
    rows = torch.arange(count, device=hidden.device)
    ended = torch.zeros(count, dtype=torch.bool, device=hidden.device)
    pace = STEPS_BETWEEN_CHECKS if hidden.is_cuda and cache.even else 1
    for step in range(longest):
        logits = decoder.logits(hidden, rules.bias(step))
        rules.apply(logits, said[rows, :step])
        if temperature == 0 or randoms is None:
            token = logits.argmax(-1)
        else:
            token = drawn(logits / temperature, randoms[rows, step])
        # Several times faster than the chosen logit less logsumexp, on a CPU.
        chosen = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        said[rows, step] = token.masked_fill_(ended, rules.end)
        total[rows] += chosen.masked_fill_(ended, 0.0)
        ended |= (token == rules.end) | (limits[rows] == step + 1)
        if step + 1 == longest:
            break
        if (step + 1) % pace == 0 and bool(ended.any()):
            order = places_to_keep(ended)
            if len(order) == 0:
                break
            cache.keep(order)
            rows, token, ended = rows[order], token[order], ended[order]
        hidden = decoder.read(token[:, None], cache)[:, -1]
        cache.advance(1)
    return [
        found(ids, limit, rules.end, log_probability)
        for ids, limit, log_probability in zip(
            said.tolist(), limits.tolist(), total.tolist(), strict=True
        )
    ]


def drawn(logits: Tensor, randoms: Tensor) -> Tensor:
    """Return int64 [R]: the token of logits [R, V] in whose share a row's random number falls."""
    sums = logits.softmax(-1).cumsum(-1)
    total = sums[:, -1]
    # Rounded, a number below 1 may be 1; it must stay below the total, in a possible token's share.
    targets = torch.minimum(randoms.to(sums) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, targets[:, None], right=True)[:, 0]


def found(ids: list[int], limit: int, end: int, log_probability: float) -> Found:
    """Return the tokens up to the end token or the limit."""
    complete = end in ids[:limit]
    return Found(ids[: ids.index(end)] if complete else ids[:limit], complete, log_probability)


def beam_search(decoder: CachedDecoder, rules: TokenRules, start: Start, beams: int) -> list[Found]:
    """Return the best of the texts that several beams find, as transformers' `generate` does.

    A beam's score is the sum of its log-probabilities over its number of tokens, the end token
    included. The log-probabilities are those before the rules, so that a beam pays for what it was
    not allowed to say. An utterance ends when its best open beam is worse than its worst ended one.

    Args:
        decoder: whose cache `start` has.
        rules: what may be said.
        start: the batch; its cache is used up.
        beams: how many.
    """
    search = _Beams(rules.end, start.limits, beams)
    cache, hidden = start.cache, start.hidden.repeat_interleave(beams, dim=0)
    cache.repeat(beams)
    for step in range(int(start.limits.max())):
        scores = decoder.logits(hidden).log_softmax(-1) + rules.bias(step)
        rules.apply(scores, search.running[:, :, :step].flatten(0, 1))
        parents, tokens = search.extend(scores, step)
        cache.reorder(parents)
        order = places_to_keep(search.ended)
        if len(order) == 0:
            break
        if len(order) < len(search.ended):
            cache.keep(order, beams)
            tokens = tokens[order]
            search.keep(order)
        hidden = decoder.read(tokens.view(-1, 1), cache)[:, -1]
        cache.advance(1)
    return search.results


class _Beams:
    """The open and the ended beams of U utterances.

    Attributes:
        running: int64 [U, K, limit]: tokens of the open beams.
        ended: bool [U]: utterances that cannot get better.
        results: the answer for each utterance of the batch that has ended.
    """

    def __init__(self, end: int, limits: Tensor, beams: int) -> None:
        count, longest, device = len(limits), int(limits.max()), limits.device
        self.end, self.beams = end, beams
        self.limits = limits
        self.places = torch.arange(count, device=device)
        self.running = torch.full((count, beams, longest), end, device=device)
        # All beams begin alike: only the first may go on, or all would say the same.
        self.scores = torch.zeros(count, beams, device=device)
        self.scores[:, 1:] = IMPOSSIBLE
        self.best = self.running.clone()
        self.best_scores = torch.full((count, beams), IMPOSSIBLE, device=device)
        self.best_lengths = torch.zeros(count, beams, dtype=torch.int64, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.results: list[Found] = [Found([], False, 0.0)] * count

    def extend(self, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Let the best continuations go on and keep those that have ended.

        Args:
            scores: float32 [U * K, V]: log-probabilities of the next tokens.
            step: how many tokens the beams have.

        Returns:
            int64 [U * K]: the row of the cache that each open beam comes from, and int64 [U, K],
            the tokens that the open beams have said now.
        """
        count, vocabulary = len(self.ended), scores.shape[-1]
        scores = scores.view(count, self.beams, vocabulary) + self.scores[:, :, None]
        # Each beam can end in one way: of twice as many candidates enough go on.
        top, places = scores.flatten(1).topk(2 * self.beams)
        parents, tokens = places // vocabulary, places % vocabulary
        candidates = self.running.gather(1, _along(parents, self.running))
        candidates[:, :, step] = tokens
        stops = (tokens == self.end) | (self.limits == step + 1)[:, None]
        self._collect(candidates, top, stops, step + 1)
        self.scores, order = (top + stops * IMPOSSIBLE).topk(self.beams)
        self.running = candidates.gather(1, _along(order, candidates))
        self._end(step + 1)
        rows = (
            parents.gather(1, order) + torch.arange(count, device=top.device)[:, None] * self.beams
        )
        return rows.flatten(), tokens.gather(1, order)

    def keep(self, order: Tensor) -> None:
        """Keep the utterances in these places."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[order])

    def _collect(self, candidates: Tensor, top: Tensor, stops: Tensor, length: int) -> None:
        """Keep the best ended beams; only the first K candidates may end."""
        may_end = stops & (torch.arange(top.shape[1], device=top.device) < self.beams)
        averages = top / length + ~may_end * IMPOSSIBLE
        merged = torch.cat([self.best_scores, averages], dim=1)
        texts = torch.cat([self.best, candidates], dim=1)
        lengths = torch.cat([self.best_lengths, torch.where(may_end, length, 0)], dim=1)
        self.best_scores, order = merged.topk(self.beams)
        self.best = texts.gather(1, _along(order, texts))
        self.best_lengths = lengths.gather(1, order)

    def _end(self, length: int) -> None:
        """Find out which utterances have ended, and write down their results."""
        all_beams_ended = (self.best_lengths > 0).all(dim=1)
        hopeless = self.scores[:, 0] / length <= self.best_scores[:, -1]
        self.ended = (all_beams_ended & hopeless) | (self.limits == length)
        for row in self.ended.nonzero()[:, 0].tolist():
            ids = self.best[row, 0, : self.best_lengths[row, 0]].tolist()
            complete = ids[-1] == self.end
            log_probability = float(self.best_scores[row, 0]) * len(ids)
            self.results[int(self.places[row])] = Found(
                ids[:-1] if complete else ids, complete, log_probability
            )


def _along(places: Tensor, beams: Tensor) -> Tensor:
    """Return int64 [U, C, L]: the places [U, C] by which to gather from beams [U, K, L]."""
    return places[:, :, None].expand(-1, -1, beams.shape[2])
