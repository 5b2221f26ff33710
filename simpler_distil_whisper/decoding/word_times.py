"""When each word was spoken: the tokens of a text are aligned with the audio by cross-attention.

The method is that of openai/whisper (`timing.py`): some heads of a Whisper's cross-attention attend
to the audio of the token that comes next. The finished tokens are read once more in a single pass;
the cheapest path through the attention of these heads gives each token its time, and words get
those of their tokens. Owns that pass and the rules by which times of words are put right. Which
tokens are aligned, and with which audio, is up to `timed_segments.py` and `long_form.py`.

Letters of shapes besides those in `data/features.py`: U texts, P positions of their audio.
"""

import contextlib
import functools
import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.decoding.cached_decoder import CachedDecoder, KeyValueCache
from simpler_distil_whisper.decoding.chunks import whole_characters
from simpler_distil_whisper.decoding.hypothesis import (
    Segment,
    SegmentWithWords,
    TimedToken,
    TimedWord,
)
from simpler_distil_whisper.model.options import Task, written_language
from simpler_distil_whisper.model.special_tokens import TIME_STEP
from simpler_distil_whisper.model.whisper import Whisper
from simpler_distil_whisper.text.languages import NEVER_SPACED

MEDIAN_WIDTH = 7  # positions over which attention is smoothed
# Languages that openai/whisper cuts at every character, since spaces separate no words there.
CUT_AT_CHARACTERS = {"zh", "ja", "th", "lo", "my", "yue"}
PUNCTUATION = frozenset(string.punctuation)
# These, and a space alone, belong to the word that follows them.
BEFORE_A_WORD = frozenset("\"'“¿([{-") | {""}
AFTER_A_WORD = frozenset("\"'.。,，!！?？:：”)]}、")  # it belongs to the word before
ENDS_OF_SENTENCES = frozenset(".。!！?？")
MAX_USUAL_SECONDS = 0.7  # of a word, however slow the speech
# A first or last word that reaches this much beyond its segment has got the silence there as well.
MAX_SECONDS_OUTSIDE = 0.5


class TokenAligner:
    """Aligns tokens of text with their audio."""

    def __init__(self, whisper: Whisper, decoder: CachedDecoder, task: Task) -> None:
        """Choose the heads; nothing is computed yet.

        Args:
            whisper: the model.
            decoder: of the same model.
            task: for which the texts were decoded.
        """
        self.whisper = whisper
        self.decoder = decoder
        self.task = task
        self.heads = alignment_heads(whisper.model)

    @torch.inference_mode()
    def __call__(
        self,
        states: Tensor,
        languages: Sequence[str],
        texts: Sequence[Sequence[int]],
        seconds: Sequence[float],
    ) -> list[list[TimedToken]]:
        """Return the tokens of each text with times from the beginning of its encoder states.

        Args:
            states: float [U, E, D] or [U, E, D + D']: encoder states, as `Transcriber.encode`
                returns them.
            languages: the code of each text.
            texts: tokens; those that are no text are left out.
            seconds: how much of the states is audio; the rest is padding.
        """
        tokens, positions = self.whisper.tokens, self.decoder.decoder.max_target_positions
        states = states[..., : self.decoder.width]  # behind them are an assistant's own
        texts = [list(filter(tokens.is_text, text)) for text in texts]
        prompts = [tokens.prompt(language, self.task) for language in languages]
        rows = [
            torch.tensor([*prompt, *text, tokens.end][:positions])
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(states.device)
        cache = self.decoder.start(states, ids.shape[1], uneven=False)
        with _kept_queries(self.decoder, self.heads) as queries:
            decoded = self.decoder.read(ids, cache)
        timed = []
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            last, used = len(prompt) - 1, len(rows[row])
            audio = max(1, min(int(seconds[row] / TIME_STEP + 1e-6), states.shape[1]))
            attention = self._attention(queries, cache, row, used, audio)
            places = first_positions(-attention[last : last + len(text) + 1].double().cpu().numpy())
            logits = self.decoder.logits(decoded[row, last : last + len(text)])
            logits[:, [tokens.end, *tokens.control]] = -torch.inf
            chosen = torch.tensor(text, device=logits.device)[:, None]
            probabilities = logits.softmax(-1).gather(1, chosen)[:, 0].tolist()
            starts = (places * TIME_STEP).tolist()
            timed.append(
                [
                    TimedToken(id, start, end, probability)
                    for id, (start, end), probability in zip(
                        text, pairwise(starts), probabilities, strict=True
                    )
                ]
            )
        return timed

    def segments_with_words(
        self, timed: Sequence[tuple[Segment, Sequence[TimedToken]]], language: str
    ) -> list[Segment]:
        """Return the segments of an utterance with words, made of the tokens of each segment."""
        written = written_language(language, self.task)
        return segments_with_words(timed, written, self.whisper.text_of)

    def _attention(
        self, queries: dict[int, Tensor], cache: KeyValueCache, row: int, tokens: int, audio: int
    ) -> Tensor:
        """Return float32 [L, P]: the mean attention of the heads of one text, smoothed.

        Each head counts by how much more a token attends to a position than other tokens do.
        """
        total, count = torch.zeros(tokens, audio, device=cache.cross_attention.device), 0
        for layer, heads in self.heads.items():
            query = queries[layer][row, :tokens].view(tokens, self.decoder.heads, -1)
            keys = cache.cross_attention[layer][0, row, heads, :audio]
            scores = torch.matmul(query[:, heads].transpose(0, 1), keys.transpose(1, 2)).float()
            weights = (scores * self.decoder.head_width**-0.5).softmax(-1)
            deviation, mean = torch.std_mean(weights, dim=1, keepdim=True, unbiased=False)
            # A single position has all of the attention of every token, and no deviation.
            weights = (weights - mean) / deviation.clamp(min=torch.finfo(weights.dtype).tiny)
            total += median_filtered(weights).sum(0)
            count += len(heads)
        return total / count


@contextlib.contextmanager
def _kept_queries(decoder: CachedDecoder, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Keep the cross-attention queries of some layers, float [U, L, D], while tokens are read."""
    queries: dict[int, Tensor] = {}

    def keep(layer: int, _: nn.Module, __: object, output: Tensor) -> None:
        queries[layer] = output

    modules: Any = decoder.decoder.layers
    hooks = [
        modules[layer].encoder_attn.q_proj.register_forward_hook(functools.partial(keep, layer))
        for layer in layers
    ]
    try:
        yield queries
    finally:
        for hook in hooks:
            hook.remove()


def alignment_heads(model: WhisperForConditionalGeneration) -> dict[int, list[int]]:
    """Return the heads of each decoder layer whose attention follows the audio.

    The generation config names them; `model/pruning.py` renumbers those of layers that are kept,
    and `model/generation_config.py` leaves out those that a model does not have. Where none is
    left, all heads of the upper half of the layers are taken, as openai/whisper does for a model
    that it does not know.
    """
    chosen = defaultdict[int, list[int]](list)
    for layer, head in getattr(model.generation_config, "alignment_heads", None) or []:
        chosen[layer].append(head)
    layers, heads = model.config.decoder_layers, model.config.decoder_attention_heads
    return dict(chosen) or {layer: list(range(heads)) for layer in range(layers // 2, layers)}


def median_filtered(weights: Tensor) -> Tensor:
    """Return float [..., P]: the median of each position and its neighbours, mirrored at the ends.

    Fewer positions than half of the width have no such mirror image, and stay as they are.
    """
    half = MEDIAN_WIDTH // 2
    if weights.shape[-1] <= half:
        return weights
    padded = functional.pad(weights, (half, half), mode="reflect")
    return padded.unfold(-1, MEDIAN_WIDTH, 1).sort().values[..., half]


def first_positions(costs: np.ndarray) -> np.ndarray:
    """Return int64 [L]: the first position of each token on the cheapest path (DTW).

    The path leads from the first token at the first position to the last ones, and goes on to the
    next token, the next position, or both at once.

    Args:
        costs: float64 [L, P]: of each token at each position.
    """
    tokens, positions = costs.shape
    width = positions + 1  # of a table with a row and a column before the first ones
    own = np.pad(costs, ((1, 0), (1, 0))).ravel()
    # Single precision, and which of equals is taken, are openai/whisper's: so are the times then.
    totals = np.full(len(own), np.inf, dtype=np.float32)
    totals[0] = 0
    steps = np.zeros(len(own), dtype=np.int8)
    # On a diagonal of the table no cell depends on another: all of them are computed at once.
    for diagonal in range(2, tokens + positions + 1):
        first, last = max(1, diagonal - positions), min(tokens, diagonal - 1)
        cells = np.arange(first, last + 1) * positions + diagonal
        before = [totals[cells - distance] for distance in (width + 1, width, 1)]
        both, token, position = before
        step = np.where((both < token) & (both < position), 0, 2)
        step[(token < both) & (token < position)] = 1
        steps[cells] = step
        totals[cells] = own[cells] + np.choose(step, before)
    return _path_starts(steps.reshape(tokens + 1, width))


def _path_starts(steps: np.ndarray) -> np.ndarray:
    """Return int64 [L]: where the path enters each row of a table, followed from its end.

    Args:
        steps: int8 [L + 1, P + 1]: how the path has come to each cell: 0 from the token and the
            position before, 1 from the token before, 2 from the position before.
    """
    token, position = steps.shape[0] - 1, steps.shape[1] - 1
    starts = np.zeros(token, dtype=np.int64)
    while token > 0:
        starts[token - 1] = position - 1
        step = steps[token, position]
        token -= step != 2
        position -= step != 1
    return starts


def segments_with_words(
    timed: Sequence[tuple[Segment, Sequence[TimedToken]]],
    language: str,
    text_of: Callable[[Sequence[int]], str],
) -> list[Segment]:
    """Return segments with their words, from the first of which to the last they last now.

    Args:
        timed: the segments of an utterance, each with the tokens of its text.
        language: code of their language, by which texts are cut into words.
        text_of: decodes tokens.
    """
    spoken = [_spoken_words(tokens, language, text_of) for _, tokens in timed]
    lengths = [word.seconds for word in chain(*spoken) if word.seconds > 0]
    usual = min(MAX_USUAL_SECONDS, float(np.median(lengths))) if lengths else 0.0
    if usual:
        _shorten_around_sentence_ends(list(chain(*spoken)), 2 * usual)
    segments, silent_since = list[Segment](), 0.0
    for (segment, _), pieces in zip(timed, spoken, strict=True):
        words = [word.rounded() for word in _with_punctuation(pieces)]
        if not words:
            segments.append(segment)
            continue
        _shorten_after_pause(words, usual, silent_since)
        silent_since = _fit_into_segment(words, segment, usual)
        segments.append(_joined(segment, words, segments))
    return segments


@dataclass
class _SpokenWord:
    """A word, or a piece of punctuation, whose times may still be put right."""

    text: str
    start: float
    end: float
    probability: float

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.end - self.start

    def rounded(self) -> "_SpokenWord":
        """Return the same with times in hundredths: sums of steps of 20 ms are not exact."""
        return replace(self, start=round(self.start, 2), end=round(self.end, 2))


def _spoken_words(
    tokens: Sequence[TimedToken], language: str, text_of: Callable[[Sequence[int]], str]
) -> list[_SpokenWord]:
    """Return the words of a text, its punctuation apart."""
    words = []
    place = 0
    for text, ids in words_and_punctuation([token.id for token in tokens], language, text_of):
        own = tokens[place : place + len(ids)]
        place += len(ids)
        probability = sum(token.probability for token in own) / len(own)
        words.append(_SpokenWord(text, own[0].start, own[-1].end, probability))
    return words


def words_and_punctuation(
    ids: Sequence[int], language: str, text_of: Callable[[Sequence[int]], str]
) -> list[tuple[str, list[int]]]:
    """Return the words of a text, and punctuation as words of its own, each with its tokens.

    A word begins with a space; in languages without spaces every token of whole characters is a
    word. In their scripts it is one in any language: openai/whisper makes a Khmer sentence a single
    word, of which only the last second would keep its time.

    Args:
        ids: tokens of text.
        language: its code.
        text_of: decodes tokens.
    """
    words: list[tuple[str, list[int]]] = []
    for text, own in whole_characters(ids, text_of):
        unspaced = language in CUT_AT_CHARACTERS or NEVER_SPACED.match(text)
        if unspaced or text.startswith(" ") or text.strip() in PUNCTUATION or not words:
            words.append((text, own))
        else:
            before, earlier = words[-1]
            words[-1] = (before + text, earlier + own)
    return words


def _shorten_around_sentence_ends(words: Sequence[_SpokenWord], longest: float) -> None:
    """Take the pause between sentences from the mark that ends one or the word that begins one."""
    for before, word in pairwise(words):
        if word.seconds <= longest:
            continue
        if word.text in ENDS_OF_SENTENCES:
            word.end = word.start + longest
        elif before.text in ENDS_OF_SENTENCES:
            word.start = word.end - longest


def _with_punctuation(pieces: Sequence[_SpokenWord]) -> list[_SpokenWord]:
    """Return words with the punctuation around them, which changes neither time nor probability."""
    words: list[_SpokenWord] = []
    for piece in pieces:
        if words and piece.text in AFTER_A_WORD and not words[-1].text.endswith(" "):
            words[-1].text += piece.text
        elif words and words[-1].text.startswith(" ") and words[-1].text.strip() in BEFORE_A_WORD:
            words[-1] = replace(piece, text=words[-1].text + piece.text)
        else:
            words.append(piece)
    return words


def _shorten_after_pause(words: Sequence[_SpokenWord], usual: float, silent_since: float) -> None:
    """Take a pause before a segment from its first two words, to which the path has given it.

    Args:
        words: of the segment.
        usual: seconds of a word.
        silent_since: when the segment before has ended.
    """
    first, longest = words[0], 2 * usual
    second = words[1] if len(words) > 1 else None
    if first.end - silent_since <= 4 * usual:
        return
    both_long = second is not None and second.end - first.start > 2 * longest
    if not (both_long or first.seconds > longest):
        return
    if second is not None and second.seconds > longest:
        first.end = second.start = max(second.end / 2, second.end - longest)
    first.start = max(0.0, first.end - longest)


def _fit_into_segment(words: Sequence[_SpokenWord], segment: Segment, usual: float) -> float:
    """Keep the first and last word near the segment's timestamps; return when speech ends."""
    first, last = words[0], words[-1]
    start, end = segment.start_seconds, segment.end_seconds
    if first.start + MAX_SECONDS_OUTSIDE < start < first.end:
        first.start = max(0.0, min(first.end - usual, start))
    if end is not None and last.start < end < last.end - MAX_SECONDS_OUTSIDE:
        last.end = max(last.start + usual, end)
        return end
    return last.end


def _joined(
    segment: Segment, words: Sequence[_SpokenWord], before: Sequence[Segment]
) -> SegmentWithWords:
    """Return the segment with its words, none of which begins before another has ended."""
    timed, now = list[TimedWord](), (before[-1].end_seconds or 0.0) if before else 0.0
    for word in words:
        start = max(word.start, now)
        now = max(word.end, start)
        timed.append(
            TimedWord(word.text, round(start, 2), round(now, 2), round(word.probability, 4))
        )
    return SegmentWithWords(timed[0].start, timed[-1].end, segment.text, tuple(timed))
