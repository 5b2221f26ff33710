"""Overlapping chunks, cut into words and merged by hand-made examples and by properties."""

from itertools import pairwise

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperTokenizer

from simpler_distil_whisper.decoding.chunks import (
    Chunk,
    SegmentTokens,
    Word,
    merged,
    seam,
    words_of,
)
from simpler_distil_whisper.decoding.hypothesis import Hypothesis


@pytest.fixture(scope="module")
def tokenizer() -> WhisperTokenizer:
    return WhisperTokenizer.from_pretrained(REPOSITORY / "demo_data" / "teacher")


def split(tokenizer: WhisperTokenizer, text: str) -> list[str]:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    words = words_of(ids, tokenizer.decode)
    assert [id for word in words for id in word.ids] == ids, "no token is lost"
    return [word.text for word in words]


def test_words_of_several_scripts(tokenizer: WhisperTokenizer) -> None:
    english = split(tokenizer, " Wednesday's train, please. It's 9.30!")
    assert english == [" Wednesday's", " train,", " please.", " It's", " 9.30!"]
    # Not in the demo's vocabulary: three and four tokens, one for each byte, to a character.
    assert len(tokenizer("龘𠮷", add_special_tokens=False).input_ids) == 7
    assert split(tokenizer, "龘𠮷，「好」嗎？") == ["龘", "𠮷，「", "好」", "嗎？"]
    assert split(tokenizer, "買 iPhone手機") == ["買", " iPhone", "手", "機"]
    assert split(tokenizer, " 안녕하세요 여러분") == [" 안녕하세요", " 여러분"]
    assert split(tokenizer, "ที่นี่") == ["ที่", "นี่"]


def test_bytes_that_are_no_character_are_words_too(tokenizer: WhisperTokenizer) -> None:
    half = tokenizer("龘", add_special_tokens=False).input_ids[:2]
    for ids in (half, half * 3, [*half, *tokenizer("好", add_special_tokens=False).input_ids]):
        words = words_of(ids, tokenizer.decode)
        assert [id for word in words for id in word.ids] == ids


@given(st.text(alphabet="我想订龘𠮷 ab.é한", max_size=12))
def test_no_character_is_cut(tokenizer: WhisperTokenizer, text: str) -> None:
    words = split(tokenizer, text)
    assert "".join(words) == tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    assert not any("\ufffd" in word for word in words)


def some_words(text: str) -> list[Word]:
    return [Word((number,), f" {word}") for number, word in enumerate(text.split())]


def merged_text(left: str, right: str, in_left: float, in_right: float) -> str:
    first, second = some_words(left), some_words(right)
    stop, begin = seam(first, second, in_left, in_right)
    assert 0 <= stop <= len(first)
    assert 0 <= begin <= len(second)
    return "".join(word.text for word in (*first[:stop], *second[begin:])).strip()


@pytest.mark.parametrize(
    ("left", "right", "in_left", "in_right", "expected"),
    [
        ("a b c d e f", "d e f g h", 3, 3, "a b c d e f g h"),
        # the overlap is not as long as the times suggest
        ("a b c d e f", "d e f g h", 1, 1, "a b c d e f g h"),
        ("a b c d e f", "d e f g h", 5, 5, "a b c d e f g h"),
        # the words at the edges are half in the window; case and signs tell where it began
        ("book a flight to Bos", "Fight to Boston. Yes", 3, 3, "book a flight to Boston. Yes"),
        ("my number is seven.", "Number is seven three", 3, 3, "my number is seven three"),
        ("we like to fly", "Fly now", 1, 1, "we like to Fly now"),
        # one chunk has a word more than the other
        ("a b c d e f g", "d e x f g h i", 4, 5, "a b c d e x f g h i"),
        # repeated two or three times: the times decide
        ("call her on Sunday call her", "Sunday call her on Monday", 3, 3,
         "call her on Sunday call her on Monday"),
        ("one one one one", "one one one one", 2, 2, "one one one one one one"),
        # the next chunk begins with the same word after a pause: nothing overlaps
        ("and then stop", "stop it now", 0, 0, "and then stop stop it now"),
        # nothing in common: half of the overlap each
        ("a b c d e f", "u v w x y z", 2, 2, "a b c d e v w x y z"),
        # nothing in common, since one of them has written nothing of the overlap
        ("a b c d e f", "u v w x y z", 0, 4, "a b c d e f u v w x y z"),
        ("a b c d e f", "u v w x y z", 4, 0, "a b c d e f u v w x y z"),
        # characters of Chinese
        ("我 想 订 六 张 到", "六 张 到 西 安", 3, 3, "我 想 订 六 张 到 西 安"),
        # one of them has no words
        ("", "a b", 0, 1, "a b"),
        ("a b", "", 1, 0, "a b"),
        ("", "", 0, 0, ""),
    ],
)  # fmt: skip
def test_neighbours_are_merged(
    left: str, right: str, in_left: float, in_right: float, expected: str
) -> None:
    assert merged_text(left, right, in_left, in_right) == expected


def test_a_loop_does_not_eat_the_text_before_it() -> None:
    assert merged_text("x y a b c d x y", "x y " * 50, 2, 34).startswith("x y a b c d x")


NOTHING = Hypothesis("", "en", (), (), -1.0, None, 1.0, 0.0, complete=True)


def chunk(start: int, end: int, *segments: tuple[int, int, str]) -> Chunk:
    """Letters are words, and their codes are their tokens."""
    timed = [
        (SegmentTokens(begin, stop, ()), [Word((ord(word),), f" {word}") for word in text])
        for begin, stop, text in segments
    ]
    return Chunk(start, end, NOTHING, timed)


def merged_segments(chunks: list[Chunk], *, timed: bool, pause: slice = slice(0)) -> list[tuple]:
    loud = torch.ones(chunks[-1].end, dtype=torch.bool)
    loud[pause] = False
    return [
        (segment.start, segment.end, "".join(map(chr, segment.ids)))
        for part in merged(chunks, loud, timed)
        for segment in part.segments
    ]


def test_sentences_that_a_chunk_has_cut_are_made_whole() -> None:
    first = chunk(0, 200, (0, 60, "abc"), (90, 200, "def"))
    second = chunk(134, 334, (134, 230, "efg"), (240, 330, "hi"))
    expected = [(0, 60, "abc"), (90, 230, "defg"), (240, 330, "hi")]
    assert merged_segments([first, second], timed=True) == expected
    assert merged_segments([first], timed=True) == expected[:1] + [(90, 200, "def")]
    # the end of one segment and the beginning of the next stay apart
    apart = [chunk(0, 200, (0, 160, "abcd")), chunk(134, 334, (134, 158, "d"), (162, 300, "efg"))]
    assert merged_segments(apart, timed=True) == [(0, 160, "abcd"), (162, 300, "efg")]


def test_segments_of_two_chunks_share_the_time_that_both_claim() -> None:
    """Too little of it for parts of one segment: they stay two."""
    pair = [chunk(0, 200, (0, 100, "ab"), (100, 190, "cd")), chunk(134, 334, (150, 330, "efgh"))]
    texts = merged_segments(pair, timed=True)
    assert [(start, end) for start, end, _ in texts] == [(0, 100), (100, 170), (170, 330)]
    # the segment that is made of two goes on over the next one
    first = chunk(0, 200, (80, 200, "abcd"))
    second = chunk(134, 334, (134, 180, "cd"), (180, 198, "e"), (210, 300, "fgh"))
    expected = [(80, 180, "abcd"), (180, 198, "e"), (210, 300, "fgh")]
    assert merged_segments([first, second], timed=True) == expected


@st.composite
def drawn_chunks(draw: st.DrawFn) -> list[Chunk]:
    """Chunks of 200 frames whose texts and times have nothing to do with each other."""
    chunks = []
    for start in range(0, 134 * draw(st.integers(1, 5)), 134):
        times = sorted(draw(st.lists(st.integers(start, start + 200), max_size=8)))
        texts = [draw(st.text(alphabet="abc", min_size=1, max_size=4)) for _ in times[1::2]]
        segments = zip(times[::2], times[1::2], texts, strict=False)
        chunks.append(chunk(start, start + 200, *segments))
    return chunks


@given(drawn_chunks())
def test_no_segment_begins_before_the_end_of_the_one_before(chunks: list[Chunk]) -> None:
    segments = merged_segments(chunks, timed=True)
    times = [time for start, end, _ in segments for time in (start, end)]
    assert times == sorted(times)
    starts = [start for start, _, _ in segments]
    assert starts == sorted(set(starts))


def test_without_timestamps_half_of_an_overlap_is_from_either_chunk() -> None:
    three = [chunk(0, 200, (0, 200, "abcd")), chunk(134, 334, (134, 334, "cdef"))]
    three.append(chunk(268, 400, (268, 400, "fgh")))
    expected = [(0, 167, "ab"), (167, 301, "cde"), (301, 400, "fgh")]
    segments = merged_segments(three, timed=False)
    assert [(start, end) for start, end, _ in segments] == [
        (start, end) for start, end, _ in expected
    ]
    assert "".join(text for _, _, text in segments) == "abcdefgh"


def test_pauses_tell_how_much_of_a_text_is_in_the_overlap() -> None:
    """Nothing in common: then half of the words that are probably in the overlap are of either."""
    pair = [chunk(0, 200, (0, 200, "abcdef")), chunk(134, 334, (134, 334, "uvwxyz"))]
    texts = [
        "".join(text for _, _, text in merged_segments(pair, timed=False, pause=pause))
        for pause in (slice(0), slice(134, 200), slice(0, 134))
    ]
    assert texts == ["abcdevwxyz", "abcdefuvwxyz", "abcvwxyz"]


def test_a_sentence_that_only_the_next_chunk_has_whole_loses_no_word() -> None:
    """With timestamps a chunk ends with its last whole sentence, often before the overlap."""
    pair = [chunk(0, 300, (0, 190, "abcdef")), chunk(200, 500, (210, 310, "uvwx"))]
    assert merged_segments(pair, timed=True) == [(0, 190, "abcdef"), (210, 310, "uvwx")]


def test_no_word_is_lost_where_only_one_of_two_chunks_has_a_text() -> None:
    """The first ends with a sentence, the next begins behind one of which it has only the end."""
    first = chunk(0, 300, (0, 230, "abcdefgh"))
    second = chunk(200, 500, (240, 300, "uvw"), (300, 480, "xyz"))
    expected = [(0, 230, "abcdefgh"), (240, 300, "uvw"), (300, 480, "xyz")]
    assert merged_segments([first, second], timed=True) == expected


def test_a_whole_sentence_is_not_mended_with_the_rest_of_one() -> None:
    """With other words for the same 50 frames, the first chunk is right; none behind is lost."""
    first = chunk(0, 300, (0, 190, "abcd"), (190, 250, "efg"))
    second = chunk(200, 500, (200, 250, "uv"), (250, 300, "wx"), (300, 480, "yz"))
    expected = [(0, 190, "abcd"), (190, 250, "efg"), (250, 300, "wx"), (300, 480, "yz")]
    assert merged_segments([first, second], timed=True) == expected
    # A sentence that goes on behind the first chunk keeps what of it is there.
    second = chunk(200, 500, (200, 300, "uvwx"), (300, 480, "yz"))
    expected = [(0, 190, "abcd"), (190, 300, "efgwx"), (300, 480, "yz")]
    assert merged_segments([first, second], timed=True) == expected


def test_a_silent_chunk_takes_nothing_from_its_neighbours() -> None:
    three = [chunk(0, 200, (0, 200, "abc")), chunk(134, 334), chunk(268, 468, (268, 468, "def"))]
    assert merged_segments(three, timed=False) == [(0, 167, "abc"), (301, 468, "def")]


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_chunks_of_a_text_merge_to_that_text(length: int, size: int, data: st.DataObject) -> None:
    """All words differ, and the times are wrong by fewer words than the overlap has."""
    overlap = data.draw(st.integers(1, size - 1))
    wrong = data.draw(st.integers(1 - overlap, overlap - 1))
    assert_merges([str(number) for number in range(length)], size, overlap, overlap + wrong)


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=4), st.integers(2, 20), st.data())
def test_the_times_decide_how_often_a_text_is_repeated(
    piece: list[str], size: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(1, size - 1))
    assert_merges(piece * 12, size, overlap, overlap)


def assert_merges(text: list[str], size: int, overlap: int, expected: int) -> None:
    starts = range(0, max(len(text) - overlap, 1), size - overlap)
    chunks = [some_words(" ".join(text[start : start + size])) for start in starts]
    seams = [seam(left, right, expected, expected) for left, right in pairwise(chunks)]
    stops = [stop for stop, _ in seams] + [len(chunks[-1])]
    firsts = [0] + [first for _, first in seams]
    words = [
        word.text.strip()
        for chunk, first, stop in zip(chunks, firsts, stops, strict=True)
        for word in chunk[first:stop]
    ]
    assert words == text
