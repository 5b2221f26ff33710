"""The texts of overlapping chunks -> one text: where neighbours are cut, and what each contributes.

Owns the pieces of a recording's transcript and the merging of chunks, which looks at words and
times alone. It decodes nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from simpler_distil_whisper.decoding.hypothesis import Hypothesis, TimedToken
from simpler_distil_whisper.text.languages import NEVER_SPACED

MAX_CHARACTER_BYTES = 4  # in UTF-8


@dataclass(frozen=True)
class SegmentTokens:
    """The tokens of a segment, with times in frames.

    Attributes:
        start: from the beginning of the window or of the recording.
        end: likewise.
        ids: the tokens.
        timed: those of text with their times; empty if none are requested.
    """

    start: int
    end: int
    ids: tuple[int, ...]
    timed: tuple[TimedToken, ...] = ()

    def shifted(self, frames: int) -> "SegmentTokens":
        """Return the same some frames later."""
        return replace(self, start=self.start + frames, end=self.end + frames)


@dataclass(frozen=True)
class Word:
    """The shortest piece of a text at which it may be cut: a word, or one character of Chinese.

    Attributes:
        ids: its tokens.
        text: with the space before it and the punctuation after it.
    """

    ids: tuple[int, ...]
    text: str

    @property
    def key(self) -> str:
        """Equal for words that count as the same; case does not matter."""
        return "".join(filter(str.isalnum, self.text.casefold())) or self.text.strip()


@dataclass(frozen=True)
class Part:
    """What one window contributes to a transcript.

    Attributes:
        hypothesis: of the whole window.
        segments: the part of it that is kept, timed from the beginning of the recording; none of
            a silent window.
        complete: nothing is missing because of the limit of tokens.
    """

    hypothesis: Hypothesis
    segments: list[SegmentTokens]
    complete: bool

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that are kept."""
        return tuple(id for segment in self.segments for id in segment.ids)


@dataclass(frozen=True)
class Chunk:
    """One of the overlapping windows.

    Attributes:
        start: its first frame in the recording.
        end: the frame after its last.
        hypothesis: of the whole window.
        segments: the same with the words of each, timed from the beginning of the recording;
            without timestamps one as long as the chunk, and none in a silent chunk.
    """

    start: int
    end: int
    hypothesis: Hypothesis
    segments: list[tuple[SegmentTokens, list[Word]]]

    @property
    def words(self) -> list[Word]:
        """The words of all segments."""
        return [word for _, words in self.segments for word in words]

    def words_within(self, begin: int, end: int, loud: Tensor) -> float:
        """Return about how many of its words are between two frames, by its loud frames."""
        count = 0.0
        for segment, words in self.segments:
            first, last = max(segment.start, begin), max(min(segment.end, end), 0)
            within, whole = loud[first:last].sum(), loud[segment.start : segment.end].sum()
            count += len(words) * float(within / whole.clamp(min=1))
        return count

    def part(self, first: int, stop: int) -> Part:
        """Return its contribution if only words `first` to `stop` are kept."""
        place, kept = 0, []
        for segment, words in self.segments:
            begin = max(first - place, 0)
            some = words[begin : max(stop - place, 0)]
            place += len(words)
            if some:
                ids = tuple(id for word in some for id in word.ids)
                left_out = sum(len(word.ids) for word in words[:begin])
                timed = segment.timed[left_out : left_out + len(ids)]
                kept.append(replace(segment, ids=ids, timed=timed))
        return Part(self.hypothesis, kept, self.hypothesis.complete)


def words_of(ids: Sequence[int], text_of: Callable[[Sequence[int]], str]) -> list[Word]:
    """Return the words of a text; together they have all of its tokens, in order.

    In a script without spaces a character is a word.

    Args:
        ids: tokens of text.
        text_of: decodes tokens.
    """
    words: list[Word] = []
    for text, own in whole_characters(ids, text_of):
        if words and _continues(words[-1].text, text):
            words[-1] = Word((*words[-1].ids, *own), words[-1].text + text)
        else:
            words.append(Word(tuple(own), text))
    return words


def whole_characters(
    ids: Sequence[int], text_of: Callable[[Sequence[int]], str]
) -> Iterator[tuple[str, list[int]]]:
    """Yield the shortest texts that end with a whole character, each with its tokens.

    Tokens are made of bytes, so a character can have several of them.

    Args:
        ids: tokens of text.
        text_of: decodes tokens.
    """
    pending: list[int] = []
    for place, id in enumerate(ids, 1):
        pending.append(id)
        text = text_of(pending)
        half_a_character = text.endswith("\ufffd") and len(pending) < MAX_CHARACTER_BYTES
        if place == len(ids) or not half_a_character:
            yield text, pending
            pending = []


def _continues(word: str, text: str) -> bool:
    """Return whether a text belongs to the word before it."""
    if not text or not word.strip():
        return True
    if not text[0].isalnum():  # spaces begin words; punctuation and vowel signs do not
        return not text[0].isspace()
    return not NEVER_SPACED.match(text) and not NEVER_SPACED.match(word[-1])


def merged(chunks: Sequence[Chunk], loud: Tensor, timed: bool) -> list[Part]:
    """Return the contribution of each chunk of a recording.

    Args:
        chunks: in order.
        loud: bool [F]: the loud frames of the recording.
        timed: the segments have timestamps.
    """
    parts, first, begin = list[Part](), 0, 0
    for left, right in pairwise([*chunks, None]):
        assert left is not None
        stop, next_first, middle = len(left.words), 0, left.end
        if right is not None:
            in_both = _claimed_by_both(left, right)
            in_left, in_right = (each.words_within(*in_both, loud) for each in (left, right))
            stop, next_first = seam(left.words, right.words, in_left, in_right, timed=timed)
            middle = (right.start + left.end) // 2
        part = left.part(first, stop)
        if not timed:  # Without timestamps each neighbour gets half of the time of an overlap.
            timed_ids = tuple(token for segment in part.segments for token in segment.timed)
            segments = [SegmentTokens(begin, middle, part.ids, timed_ids)] if part.ids else []
            part = replace(part, segments=segments)
        elif parts and parts[-1].segments and part.segments:
            _unite(parts[-1].segments, part.segments)
        parts.append(part)
        first, begin = next_first, middle
    _put_in_order(parts)
    return parts


def _claimed_by_both(left: Chunk, right: Chunk) -> tuple[int, int]:
    """Return the first and the last frame of the overlap for which both chunks have a text.

    With timestamps that is often less than the overlap, or nothing: a chunk ends with its last
    whole sentence, and may begin after a sentence of which it has only the end.
    """
    begin, end = right.start, left.end
    if left.segments and right.segments:
        (last, _), (first, _) = left.segments[-1], right.segments[0]
        begin, end = max(begin, first.start), min(end, last.end)
    return begin, max(begin, end)


def _unite(before: list[SegmentTokens], after: list[SegmentTokens]) -> None:
    """Make one of the last and the first segment if two chunks have parts of the same segment."""
    left, right = before[-1], after[0]
    shared = min(left.end, right.end) - max(left.start, right.start)
    if shared > min(left.end - left.start, right.end - right.start) / 2:
        start, end = min(left.start, right.start), max(left.end, right.end)
        before[-1] = SegmentTokens(start, end, left.ids + right.ids, left.timed + right.timed)
        del after[0]


def _put_in_order(parts: Sequence[Part]) -> None:
    """Let each segment begin after the one before it has begun, and not before that has ended.

    The boundary of two chunks is somewhere in the time that the segments on both sides claim.
    """
    before: list[SegmentTokens] = []  # it ends with the segment before
    for part in parts:
        segments = part.segments[:]
        part.segments.clear()
        for segment in segments:
            if before and segment.start <= before[-1].start:
                before[-1] = replace(
                    before[-1],
                    end=max(before[-1].end, segment.end),
                    ids=before[-1].ids + segment.ids,
                    timed=before[-1].timed + segment.timed,
                )
                continue
            if before and segment.start < before[-1].end:
                is_within = segment.end <= before[-1].end
                boundary = segment.start if is_within else (segment.start + before[-1].end) // 2
                before[-1] = replace(before[-1], end=boundary)
                segment = replace(segment, start=boundary)
            part.segments.append(segment)
            before = part.segments


def seam(
    left: Sequence[Word],
    right: Sequence[Word],
    in_left: float,
    in_right: float,
    *,
    timed: bool = False,
) -> tuple[int, int]:
    """Return how many words to keep of a chunk, and how many to leave out of the next one.

    The last words of one chunk are the first of the next, except for errors, which are likely at
    the edges. Every shift of one over the other is tried. Each pair of equal words speaks for a
    shift, rare words more; each word of difference from the shift that the times suggest speaks
    against it. The cut is in the middle of the longest run of equal words. If nothing speaks for
    any shift, the times alone decide: each chunk gets half of the words that should be in both; but
    with timestamps the first one keeps all of them, since it ends with a whole sentence, while the
    next one mostly begins within a sentence, in place of which the model can make up another.

    Args:
        left: words of a chunk.
        right: words of the next one.
        in_left: how many words of `left` should be in the time for which both have a text.
        in_right: likewise.
        timed: the chunks have timestamps.
    """
    if not left or not right:
        return len(left), 0
    # The lesser of the two, since a model that is caught in a loop writes far too many words.
    expected = len(left) - min(in_left, in_right)
    counts = Counter(word.key for word in (*left, *right))
    places = defaultdict[str, list[int]](list)
    for place, word in enumerate(right):
        places[word.key].append(place)
    # By how many words `right` begins after `left` -> the places of `left` with an equal word.
    matches = defaultdict[int, list[int]](list)
    for place, word in enumerate(left):
        for other in places[word.key]:
            matches[place - other].append(place)

    def merit(shift: int) -> float:
        return sum(2 / counts[left[i].key] for i in matches[shift]) - abs(shift - expected)

    best = max(matches, key=merit, default=None)
    if best is None or merit(best) <= 0:
        if timed:
            return len(left), round(in_right)
        if min(in_left, in_right) < 1:
            return len(left), 0
        return len(left) - round(in_left / 2), round(in_right / 2)
    cut = _middle_of_longest_run(matches[best])
    return cut, cut - best


def _middle_of_longest_run(places: list[int]) -> int:
    """Return the middle of the longest run of consecutive numbers among rising ones."""
    runs = defaultdict[int, list[int]](list)
    for number, place in enumerate(places):
        runs[place - number].append(place)  # the difference is the same all along a run
    longest = max(runs.values(), key=len)
    return longest[len(longest) // 2]


def loud_frames(features: Tensor) -> Tensor:
    """Return bool [F]: where a log-mel, float32 [M, F], is nearer to its loudest than to silence.

    Words are spread over these frames when it is estimated how many are in a part of a chunk.
    """
    loudness = features.mean(dim=0)
    quiet, loud = loudness.quantile(torch.tensor([0.05, 0.95])).tolist()
    return loudness.ge((quiet + loud) / 2)
