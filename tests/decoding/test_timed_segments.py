"""Which segments the tokens with timestamps are cut into, by hand."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model_folder

from simpler_distil_whisper.decoding.hypothesis import Segment
from simpler_distil_whisper.decoding.timed_segments import cut_at_timestamps, segments_of
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.whisper import load_whisper


def test_sentences_stand_between_their_timestamps(tmp_path: Path) -> None:
    path = make_model_folder(tmp_path, languages=["en", "zh"], window_seconds=2)
    whisper = load_whisper(read_model_folder(path, None, "model"))
    time = whisper.tokens.timestamps.start
    a, b = (whisper.tokenizer(c, add_special_tokens=False).input_ids[0] for c in "ab")
    ids = [time, a, a, time + 25, time + 30, b, time + 61, time + 70, a]
    assert segments_of(ids, whisper) == [
        Segment(0.0, 0.5, "aa"),
        Segment(0.6, 1.22, "b"),
        Segment(1.4, None, "a"),
    ]
    assert segments_of([time, a, time + 5, time + 5], whisper) == [Segment(0.0, 0.1, "a")]
    assert segments_of([a, b], whisper) == []


A, B, C = 1, 2, 3  # words; times are 100, 101, ...


@pytest.mark.parametrize(
    ("ids", "expected", "advance"),
    [
        # pairs: whole segments, and the rest is decoded again
        ([100, A, 110, 110, B, 130, 130, C], [(0, 20, 3), (20, 60, 3)], 60),
        ([105, A, 110, 112, B, 130, 131], [(10, 20, 3), (24, 60, 3)], 60),
        # a single timestamp at the end: nothing follows it in this window
        ([100, A, 110, 110, B, 130], [(0, 20, 3), (20, 60, 3)], 200),
        ([100, A, 130], [(0, 60, 3)], 200),
        # no pair: one segment, as long as the window if no time is at its end
        ([100, A, B, C], [(0, 200, 4)], 200),
        ([103, A, B], [(0, 200, 3)], 200),
        ([100], [(0, 200, 1)], 200),
        ([], [(0, 200, 0)], 200),
        # no time passes, and yet it goes on
        ([100, A, 100, 100, B], [(0, 0, 3)], 200),
    ],
)
def test_where_a_window_is_cut(ids: list[int], expected: list[tuple], advance: int) -> None:
    segments, after = cut_at_timestamps(ids, range(100, 300), 200)
    assert [(s.start, s.end, len(s.ids)) for s in segments] == expected
    assert after == advance
    flat = [id for segment in segments for id in segment.ids]
    assert flat == ids[: len(flat)]


@given(st.lists(st.integers(90, 120), max_size=12), st.integers(1, 200))
def test_every_window_goes_on(ids: list[int], frames: int) -> None:
    ids = [100, *ids]
    for place in range(1, len(ids)):  # timestamps do not decrease
        if ids[place] >= 100:
            ids[place] = max(ids[place], *(id for id in ids[:place]))
    assert cut_at_timestamps(ids, range(100, 300), frames)[1] > 0
