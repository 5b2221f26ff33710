"""The tokens of a batch of utterances: greedy decoding, sampling and beam search.

Every search returns for each utterance the tokens that it would return for the utterance alone;
utterances that have ended leave the batch. Which tokens are allowed is up to `token_rules.py`.

Letters of shapes as in `cached_decoder.py`, and P prompt tokens, C candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from simpler_distil_whisper.decoding.cached_decoder import (
    CachedDecoder,
    KeyValueCache,
    indices_to_keep,
)
from simpler_distil_whisper.decoding.token_rules import TokenRules

# How often a GPU is asked which rows have ended: each time the CPU waits for it.
STEPS_BETWEEN_CHECKS = 8
STEPS_BETWEEN_LOOP_TESTS = 32
IMPOSSIBLE = -1e9  # transformers' score of what is no candidate; finite, so that sums stay so


# Given the tokens so far, returns whether they repeat themselves, whatever follows.
LoopTest: TypeAlias = Callable[[list[int]], bool]


@dataclass(frozen=True)
class SearchResult:
    """The tokens of one utterance.

    Attributes:
        ids: the new tokens, without the end token.
        complete: the model chose the end token itself, before the limit.
        log_probability: natural logarithm, summed over the tokens and the end token. A greedy
            search takes it after the rules, as openai/whisper, a beam search before, as `generate`.
    """

    ids: list[int]
    complete: bool
    log_probability: float


@dataclass
class PromptedBatch:
    """A batch whose prompts are in the cache.

    A search is given such a batch, the decoder that made its cache, and the rules by which tokens
    are allowed.

    Attributes:
        cache: of U rows, one for each utterance; a search uses it up.
        states: float [U, D]: decoder states of the last tokens of the prompts.
        limits: int64 [U]: the most new tokens of each.
    """

    cache: KeyValueCache
    states: Tensor
    limits: Tensor


class Sampling(NamedTuple):
    """How tokens are drawn.

    Attributes:
        temperature: above 0, by which logits are divided.
        randoms: float [R, limit]: a number from 0 to 1 for each token, so that the tokens of no
            row depend on other rows.
    """

    temperature: float
    randoms: Tensor


def read_prompts(
    decoder: CachedDecoder, cache: KeyValueCache, prompts: Sequence[Sequence[int]]
) -> Tensor:
    """Put the prompts into an empty cache and return their decoder states, float [U, P, D].

    Shorter prompts are padded at the end; no token attends to the padding.
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


def greedy_or_sampled(
    decoder: CachedDecoder,
    rules: TokenRules,
    batch: PromptedBatch,
    sampling: Sampling | None = None,
    texts_per_utterance: int = 1,
    loop_test: LoopTest | None = None,
) -> list[SearchResult]:
    """Return the most probable tokens one after the other, or sampled ones.

    Args:
        decoder: made the cache of the batch.
        rules: by which tokens are allowed.
        batch: is used up.
        sampling: how tokens are drawn; None: the most probable ones are taken.
        texts_per_utterance: R / U; the rows of an utterance stand one after the other.
        loop_test: a text that repeats itself is cut off there; None: none is.
    """
    cache, states, limits = batch.cache, batch.states, batch.limits.clone()
    if texts_per_utterance > 1:
        cache.repeat(texts_per_utterance)
        states = states.repeat_interleave(texts_per_utterance, dim=0)
        limits = limits.repeat_interleave(texts_per_utterance)
    longest, count = int(limits.max()), len(limits)
    chosen = torch.full((count, longest), rules.end, device=states.device)
    total = torch.zeros(count, device=states.device)
    rows = torch.arange(count, device=states.device)
    ended = torch.zeros(count, dtype=torch.bool, device=states.device)
    # Rows are read on until then: that stays within the memory if all prompts are equally long.
    check_every = STEPS_BETWEEN_CHECKS if states.is_cuda and cache.even else 1
    for step in range(longest):
        logits = decoder.logits(states, rules.bias(step))
        rules.apply(logits, chosen[rows, :step])
        if sampling is None:
            token = logits.argmax(-1)
        else:
            randoms = sampling.randoms[rows, step]
            token = inverse_transform_sample(logits / sampling.temperature, randoms)
        # On a CPU several times faster than the logit of the token minus the logsumexp.
        log_probability = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        chosen[rows, step] = token.masked_fill_(ended, rules.end)
        total[rows] += log_probability.masked_fill_(ended, 0.0)
        if loop_test and (step + 1) % STEPS_BETWEEN_LOOP_TESTS == 0:
            so_far = zip(rows.tolist(), chosen[rows, : step + 1].tolist(), strict=True)
            limits[[row for row, ids in so_far if loop_test(ids)]] = step + 1
        ended |= (token == rules.end) | (limits[rows] == step + 1)
        if step + 1 == longest:
            break
        if (step + 1) % check_every == 0:
            kept = _drop_ended(cache, ended.view(-1, texts_per_utterance))
            if len(kept) == 0:
                break
            if len(kept) < len(rows):
                rows, token, ended = rows[kept], token[kept], ended[kept]
        states = decoder.read(token[:, None], cache)[:, -1]
        cache.advance(1)
    return search_results(chosen, limits, total, rules.end)


def _drop_ended(cache: KeyValueCache, ended: Tensor) -> Tensor:
    """Drop utterances from a cache, each with the last of its texts, unless all have ended.

    Args:
        cache: of U C rows.
        ended: bool [U, C]: which texts of each utterance have ended.

    Returns:
        int64 [R]: the rows that are left.
    """
    order = indices_to_keep(ended.all(1))
    if 0 < len(order) < len(ended):
        cache.keep(order, ended.shape[1])
    return torch.arange(ended.numel(), device=order.device).view_as(ended)[order].flatten()


def inverse_transform_sample(logits: Tensor, randoms: Tensor) -> Tensor:
    """Return int64 [R]: the token of logits [R, V] in whose share a row's random number falls."""
    sums = logits.softmax(-1).cumsum(-1)
    total = sums[:, -1]
    # Rounding can turn a number below 1 into 1; it must stay in the share of a possible token.
    targets = torch.minimum(randoms.to(sums) * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(sums, targets[:, None], right=True)[:, 0]
    # A GPU adds up in blocks, whose rounding gives tokens that are ruled out a share of 1e-7.
    return or_most_probable(drawn, logits) if logits.is_cuda else drawn


def or_most_probable(tokens: Tensor, logits: Tensor) -> Tensor:
    """Return tokens, int64 [R], with the most probable one in place of one that is ruled out."""
    possible = logits.gather(1, tokens[:, None])[:, 0] > -torch.inf
    return torch.where(possible, tokens, logits.argmax(-1))


def search_results(tokens: Tensor, limits: Tensor, total: Tensor, end: int) -> list[SearchResult]:
    """Return the tokens of each utterance up to the end token or the limit.

    Args:
        tokens: int64 [U, L]: the chosen tokens; what stands behind the end token is ignored.
        limits: int64 [U]: the most tokens of each.
        total: float32 [U]: their log-probability.
        end: the end token.
    """
    results = []
    for ids, limit, log_probability in zip(
        tokens.tolist(), limits.tolist(), total.tolist(), strict=True
    ):
        complete = end in ids[:limit]
        kept = ids[: ids.index(end)] if complete else ids[:limit]
        results.append(SearchResult(kept, complete, log_probability))
    return results


def beam_search(
    decoder: CachedDecoder, rules: TokenRules, batch: PromptedBatch, beams: int
) -> list[SearchResult]:
    """Return the best token sequences of a beam search, the same as transformers' `generate`.

    A beam's score is the sum of its log-probabilities over its number of tokens, the end token
    included. The log-probabilities are those before the rules, so that a beam pays for the tokens
    that were ruled out. An utterance ends when its best open beam is worse than its worst ended
    beam.
    """
    search = _Beams(rules.end, batch.limits, beams)
    cache, states = batch.cache, batch.states.repeat_interleave(beams, dim=0)
    cache.repeat(beams)
    for step in range(int(batch.limits.max())):
        scores = decoder.logits(states).log_softmax(-1) + rules.bias(step)
        rules.apply(scores, search.open[:, :, :step].flatten(0, 1))
        parents, tokens = search.extend(scores, step)
        cache.reorder(parents)
        order = indices_to_keep(search.ended)
        if len(order) == 0:
            break
        if len(order) < len(search.ended):
            cache.keep(order, beams)
            tokens = tokens[order]
            search.keep(order)
        states = decoder.read(tokens.view(-1, 1), cache)[:, -1]
        cache.advance(1)
    return search.results


class _Beams:
    """The open and the ended beams of U utterances.

    Attributes:
        open: int64 [U, K, limit]: tokens of the open beams.
        open_scores: float32 [U, K]: their summed log-probabilities.
        best: int64 [U, K, limit]: tokens of the best ended beams.
        best_scores: float32 [U, K]: their average log-probabilities, best first.
        best_lengths: int64 [U, K]: how many tokens they have; 0 where no beam has ended yet.
        ended: bool [U]: utterances whose result cannot get better.
        places: int64 [U]: their places in the whole batch.
        results: of the whole batch; complete once every utterance has ended.
    """

    def __init__(self, end: int, limits: Tensor, beams: int) -> None:
        count, longest, device = len(limits), int(limits.max()), limits.device
        self.end, self.beams = end, beams
        self.limits = limits
        self.places = torch.arange(count, device=device)
        self.open = torch.full((count, beams, longest), end, device=device)
        # All beams begin alike: only the first may go on, or all would stay the same.
        self.open_scores = torch.zeros(count, beams, device=device)
        self.open_scores[:, 1:] = IMPOSSIBLE
        self.best = self.open.clone()
        self.best_scores = torch.full((count, beams), IMPOSSIBLE, device=device)
        self.best_lengths = torch.zeros(count, beams, dtype=torch.int64, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.results: list[SearchResult] = [SearchResult([], False, 0.0)] * count

    def extend(self, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Extend the open beams by their best next tokens, and keep the best of those that end.

        Args:
            scores: float32 [R, V]: log-probabilities of the next tokens.
            step: how many tokens the beams have.

        Returns:
            int64 [R]: the row of the cache that each open beam continues, and int64 [U, K]: the
            last token of each open beam.
        """
        count, vocabulary = len(self.ended), scores.shape[-1]
        scores = scores.view(count, self.beams, vocabulary) + self.open_scores[:, :, None]
        # Each beam can end in one way only: of 2 K candidates at least K go on.
        top, places = scores.flatten(1).topk(2 * self.beams)
        parents, tokens = places // vocabulary, places % vocabulary
        candidates = self.open.gather(1, _along(parents, self.open))
        candidates[:, :, step] = tokens
        stops = (tokens == self.end) | (self.limits == step + 1)[:, None]
        self._keep_best(candidates, top, stops, step + 1)
        going_on = top + stops * IMPOSSIBLE
        order = going_on.topk(self.beams).indices
        order = order.gather(1, beside_parents(parents.gather(1, order)))
        self.open_scores = going_on.gather(1, order)
        self.open = candidates.gather(1, _along(order, candidates))
        self._end_utterances(step + 1)
        first_rows = torch.arange(count, device=top.device)[:, None] * self.beams
        rows = parents.gather(1, order) + first_rows
        return rows.flatten(), tokens.gather(1, order)

    def keep(self, order: Tensor) -> None:
        """Keep the utterances with these indices."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[order])

    def _keep_best(self, candidates: Tensor, top: Tensor, stops: Tensor, length: int) -> None:
        """Keep the best ended beams; only the first K candidates may end."""
        may_end = stops & (torch.arange(top.shape[1], device=top.device) < self.beams)
        averages = top / length + ~may_end * IMPOSSIBLE
        merged = torch.cat([self.best_scores, averages], dim=1)
        texts = torch.cat([self.best, candidates], dim=1)
        lengths = torch.cat([self.best_lengths, torch.where(may_end, length, 0)], dim=1)
        self.best_scores, order = merged.topk(self.beams)
        self.best = texts.gather(1, _along(order, texts))
        self.best_lengths = lengths.gather(1, order)

    def _end_utterances(self, length: int) -> None:
        """Set which utterances have ended, and their results."""
        all_beams_ended = (self.best_lengths > 0).all(dim=1)
        hopeless = self.open_scores.amax(dim=1) / length <= self.best_scores[:, -1]
        self.ended = (all_beams_ended & hopeless) | (self.limits == length)
        for row in self.ended.nonzero()[:, 0].tolist():
            ids = self.best[row, 0, : self.best_lengths[row, 0]].tolist()
            complete = ids[-1] == self.end
            log_probability = float(self.best_scores[row, 0]) * len(ids)
            self.results[int(self.places[row])] = SearchResult(
                ids[:-1] if complete else ids, complete, log_probability
            )


def beside_parents(parents: Tensor) -> Tensor:
    """Return int64 [U, K]: an order of beams in which few have to change their place.

    Of the beams that continue the same one, the first takes its place, where keys and values of its
    tokens lie already; the others take the places of beams that nobody continues. [2, 2, 0]
    gives [2, 1, 0]: beams 2 and 0 take the places of their parents 0 and 2, beam 1 the one left.

    Args:
        parents: int64 [U, K]: the place of the beam that each continues.
    """
    places = torch.arange(parents.shape[1], device=parents.device)
    first = ~(parents[:, :, None] == parents[:, None, :]).tril(-1).any(dim=2)
    takes = (parents[:, :, None] == places) & first[:, :, None]  # [U, beam, place]
    free = ~takes.any(dim=1)
    others = first.long().argsort(dim=1, stable=True)  # those that are not the first, then the rest
    number = (free.cumsum(dim=1) - 1).clamp(min=0)
    return torch.where(free, others.gather(1, number), takes.long().argmax(dim=1))


def _along(indices: Tensor, beams: Tensor) -> Tensor:
    """Return int64 [U, C, L]: the indices [U, C] by which to gather from beams [U, K, L]."""
    return indices[:, :, None].expand(-1, -1, beams.shape[2])
