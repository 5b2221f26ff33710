"""Where recordings are cut: only where a segment ends and the audio is silent."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.labels.rows import RowLimits
from simpler_distil_whisper.labels.segmentation import (
    NO_PAUSE,
    NO_PAUSE_WITHIN,
    NO_SPEECH,
    NO_TEXT,
    SEGMENT_TOO_LONG,
    TEXT_GOES_ON,
    TOLERANCE_SECONDS,
    Piece,
    SegmentationOptions,
    SegmentSpan,
    cut_at_pauses,
)
from simpler_distil_whisper.model.options import DecodingOptions

LIMITS = RowLimits(seconds=10.0, tokens=40)


def cut(
    segments: list[tuple[float, float]],
    speech: list[tuple[float, float]],
    seconds: float,
    limits: RowLimits = LIMITS,
    tokens: int = 5,
) -> list[Piece]:
    timed = [SegmentSpan(start, end, tokens) for start, end in segments]
    return cut_at_pauses(timed, speech, seconds, limits, 0.2)


def shown(pieces: list[Piece]) -> list[tuple[float, float, list[int], str | None]]:
    return [(round(p.start, 2), round(p.end, 2), list(p.segments), p.reason) for p in pieces]


def test_neighbours_are_joined_up_to_the_limit_and_cut_in_the_pause() -> None:
    speech = [(0.5, 4.0), (4.5, 9.0), (9.3, 14.0)]
    # The teacher's times are those of its windows: a little late, and without the silence.
    pieces = cut([(0.0, 4.2), (4.2, 9.1), (9.1, 15.0)], speech, 15.0)
    assert shown(pieces) == [(0.3, 9.15, [0, 1], None), (9.15, 14.2, [2], None)]
    few_tokens = cut([(0.0, 4.2), (4.2, 9.1), (9.1, 15.0)], speech, 15.0, RowLimits(10.0, 9))
    assert [list(piece.segments) for piece in few_tokens] == [[0], [1], [2]]


def test_no_cut_where_the_audio_goes_on() -> None:
    # Between the first two segments somebody speaks on; between the last two there is a pause.
    speech = [(0.0, 8.0), (8.4, 12.0)]
    pieces = cut([(0.0, 4.0), (4.0, 8.0), (8.4, 12.0)], speech, 12.0)
    assert [list(piece.segments) for piece in pieces] == [[0, 1], [2]]
    rejected = cut([(0.0, 6.0), (6.0, 12.0), (12.4, 15.0)], [(0.0, 12.0), (12.4, 15.0)], 15.0)
    assert shown(rejected) == [
        (0.0, 12.2, [0, 1], NO_PAUSE_WITHIN),
        (12.2, 15.0, [2], None),
    ]


def test_no_cut_inside_a_segment_however_long_its_pauses() -> None:
    pieces = cut([(0.0, 12.0)], [(0.0, 5.0), (6.0, 12.0)], 12.0)
    assert shown(pieces) == [(0.0, 12.0, [0], SEGMENT_TOO_LONG)]


def test_no_row_has_more_tokens_than_the_limit() -> None:
    pieces = cut([(0.0, 2.0), (6.0, 8.0)], [(0.0, 2.0), (6.0, 8.0)], 12.0, RowLimits(10.0, 4))
    assert [piece.reason for piece in pieces] == [SEGMENT_TOO_LONG] * 2


def test_a_long_pause_is_left_out() -> None:
    pieces = cut([(0.0, 2.0), (6.0, 8.0)], [(0.0, 2.0), (6.0, 8.0)], 12.0)
    assert shown(pieces) == [(0.0, 2.2, [0], None), (5.8, 8.2, [1], None)]


def test_speech_without_text_is_in_no_row_but_rejected() -> None:
    speech = [(0.0, 2.0), (2.5, 3.5), (4.0, 6.0), (8.0, 9.0)]
    pieces = cut([(0.0, 2.0), (4.0, 6.0)], speech, 10.0)
    assert shown(pieces) == [
        (0.0, 2.2, [0], None),
        (2.5, 3.5, [], NO_TEXT),
        (3.8, 6.2, [1], None),
        (8.0, 9.0, [], NO_TEXT),
    ]
    assert shown(cut([], [(1.0, 2.0), (3.0, 4.0)], 5.0)) == [(1.0, 4.0, [], NO_TEXT)]
    assert cut([], [], 5.0) == []


def test_text_without_speech_is_rejected() -> None:
    pieces = cut([(0.0, 2.0), (4.0, 6.0), (8.0, 9.0)], [(0.0, 2.0), (8.0, 9.0)], 9.0)
    assert [(list(p.segments), p.reason) for p in pieces] == [
        ([0], None),
        ([1], NO_SPEECH),
        ([2], None),
    ]


def test_words_that_a_teacher_puts_into_a_pause_cost_the_row_before_too() -> None:
    # The second segment may be the end of what is spoken until 2.0, so that text must not be lost.
    pieces = cut([(0.0, 2.0), (2.1, 4.0), (8.0, 9.0)], [(0.0, 2.0), (8.0, 9.0)], 9.0)
    assert [(list(p.segments), p.reason) for p in pieces] == [
        ([0], TEXT_GOES_ON),
        ([1], NO_SPEECH),
        ([2], None),
    ]


def test_a_segment_that_begins_or_ends_in_speech_is_rejected() -> None:
    pieces = cut([(3.0, 5.0), (5.5, 8.0)], [(0.0, 5.0), (5.5, 8.0)], 8.0)
    assert [(list(p.segments), p.reason) for p in pieces] == [
        ([], NO_TEXT),
        ([0], NO_PAUSE),
        ([1], None),
    ]


@pytest.mark.parametrize(
    ("decoding", "columns", "message"),
    [
        ({}, {}, "segmentation needs decoding.long_form"),
        ({"long_form": "chunked"}, {}, "needs decoding.timestamps"),
        ({"long_form": "sequential"}, {"start_seconds": None}, "data.columns.start_seconds"),
        ({"long_form": "chunked", "timestamps": True}, {"duration_seconds": None}, "duration_sec"),
    ],
)
def test_a_config_that_cannot_cut_is_refused(
    decoding: dict[str, Any], columns: dict[str, Any], message: str
) -> None:
    sections = (DecodingOptions(**decoding), Columns(**columns))
    SegmentationOptions().check(*sections)
    with pytest.raises(ValueError, match=message):
        SegmentationOptions(enabled=True).check(*sections)


ROUNDING = 1e-9
times = st.lists(st.integers(0, 3000), max_size=40, unique=True).map(sorted)


def spans(edges: list[int]) -> list[tuple[float, float]]:
    return [(a / 50, b / 50) for a, b in zip(edges[::2], edges[1::2], strict=False)]


@settings(max_examples=60, deadline=None)
@given(segments=times, speech=times, contiguous=st.booleans())
# The first segment, and the last one, has no speech, but its neighbour is too near for a pause.
@example(segments=[0, 117, 216, 271], speech=[143, 232], contiguous=False)
@example(segments=[0, 16, 58, 59], speech=[0, 32], contiguous=False)
# Half of this pause is not the same number, added to its start and taken from its end.
@example(segments=[0, 1, 11, 496], speech=[0, 1, 11, 496], contiguous=False)
def test_pieces_hold_every_segment_once_and_are_cut_in_silence(
    segments: list[int], speech: list[int], contiguous: bool
) -> None:
    timed = [(a / 50, b / 50) for a, b in pairwise(segments)] if contiguous else spans(segments)
    spoken = spans(speech)
    pieces = cut(timed, spoken, 60.0)
    assert [number for piece in pieces for number in piece.segments] == list(range(len(timed)))
    bounds = [time for piece in pieces for time in (piece.start, piece.end)]
    assert bounds == sorted(bounds)
    assert not bounds or (bounds[0] >= 0 and bounds[-1] <= 60)
    for piece in pieces:
        if piece.reason is None:
            assert piece.seconds <= LIMITS.seconds
            for edge in (piece.start, piece.end):
                assert not any(start < edge < end for start, end in spoken)
            # No more of a segment is outside its row than the teacher's times can be wrong.
            first, last = timed[piece.segments[0]], timed[piece.segments[-1]]
            assert first[1] > piece.start - TOLERANCE_SECONDS - ROUNDING
            assert last[0] < piece.end + TOLERANCE_SECONDS + ROUNDING
    left_out = sum(min(b, 60.0) - a for a, b in spoken) - sum(
        max(min(b, p.end) - max(a, p.start), 0.0) for a, b in spoken for p in pieces
    )
    # Nothing but slivers of speech is in no piece.
    assert left_out <= TOLERANCE_SECONDS * (len(pieces) + 1) * max(len(spoken), 1)
