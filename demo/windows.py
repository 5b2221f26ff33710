"""Windows cut out of recordings of several sentences, as decoding of long recordings meets them.

Sequential decoding begins a window where the last sentence ended, chunked decoding anywhere. The
label of a window follows from what openai's `transcribe` does with it: of a sentence that the
window's end cuts, only the start time is predicted, and the next window repeats it whole.
"""

from __future__ import annotations

import random
from typing import Any

from demo.tokenizer import WINDOW_SECONDS

_FRAMES_PER_SECOND = 100
_AT_SENTENCE_SHARE = 0.7
_AFTER_THE_END_SHARE = 0.4
# Chunked decoding needs plain text, sequential decoding timestamps.
_TIMED_SHARES = {True: 0.75, False: 0.3}
_ZERO_PADDING_SHARE = 0.5
# In seconds: units this little outside the window still count as spoken in it, and a sentence that
# begins so soon after it is announced.
_TOLERANCE = 0.04
_FORESIGHT = 0.1


def cut_windows(row: dict[str, Any], rng: random.Random) -> list[dict[str, Any]]:
    """Cuts about as many windows out of a recording as it has sentences.

    Args:
        row: A shard's row about a recording.
        rng: Source of every choice.

    Returns:
        Rows like those of single clips, with three keys more: `timed` (whether the label has
        timestamps), `previous` (segments before the window) and `padding` (the feature value that
        follows where the recording ends within the window).
    """
    windows = []
    for index in range(len(row["segments"]) + (rng.random() < _AFTER_THE_END_SHARE)):
        at_sentence = index == len(row["segments"]) or rng.random() < _AT_SENTENCE_SHARE
        if at_sentence:
            begin = _pause_before(row["segments"], index, rng)
        else:
            begin = rng.uniform(0, row["frames"] / _FRAMES_PER_SECOND - 1)
        frame = max(0, round(begin * _FRAMES_PER_SECOND / 2) * 2)
        window = _cut_window(row, frame, rng.random() < _TIMED_SHARES[at_sentence])
        if window is not None:
            # Digital silence, or the zeros with which openai's decoder fills the last window.
            zeros = rng.random() < _ZERO_PADDING_SHARE
            windows.append(window | {"padding": 0.0 if zeros else row["silence"]})
    return windows


def _pause_before(segments: list[dict[str, Any]], index: int, rng: random.Random) -> float:
    """A second in the pause before a sentence, most often about where the one before it ends."""
    if index == 0:
        return rng.choice((0.0, rng.uniform(0, segments[0]["start"])))
    end = segments[index - 1]["end"]
    if index == len(segments) or rng.random() < 0.6:
        return end + rng.gauss(0, 0.05)
    return rng.uniform(end - 0.1, segments[index]["start"])


def _cut_window(row: dict[str, Any], frame: int, timed: bool) -> dict[str, Any] | None:
    """Returns the window from a frame on; None if it is empty or holds only part of a unit."""
    frames = min(WINDOW_SECONDS * _FRAMES_PER_SECOND, row["frames"] - frame)
    begin = frame / _FRAMES_PER_SECOND
    audible = [
        segment
        for segment in row["segments"]
        if segment["end"] > begin + _TOLERANCE
        and segment["start"] < begin + WINDOW_SECONDS + _FORESIGHT
    ]
    segments: list[dict[str, Any]] = []
    for segment in audible:
        spoken = _spoken_part(segment, row["language"], begin)
        if timed and segments and segment["end"] > begin + WINDOW_SECONDS + _TOLERANCE:
            start = min(segment["start"] - begin, WINDOW_SECONDS)
            segments.append({"text": "", "start": start, "end": WINDOW_SECONDS, "cut": True})
        elif spoken:
            segments.append(spoken)
    if frames < 2 or (audible and not segments):
        return None
    return {
        "start": row["start"] + frame,
        "frames": frames,
        "silence": row["silence"],
        "language": row["language"],
        "segments": segments,
        "timed": timed,
        "previous": _previous(row["segments"], begin),
    }


def _spoken_part(segment: dict[str, Any], language: str, begin: float) -> dict[str, Any] | None:
    """Returns the units of a sentence that lie in the window, timed from the window's start."""
    text, times = segment["text"], segment["boundaries"]
    units = text.split(" ") if language == "en" else [*text[:-2], text[-2:]]
    spans = zip(units, times[:-1], times[1:], strict=True)
    low, high = begin - _TOLERANCE, begin + WINDOW_SECONDS + _TOLERANCE
    inside = [span for span in spans if span[1] >= low and span[2] <= high]
    if not inside:
        return None
    return {
        "text": (" " if language == "en" else "").join(unit for unit, _, _ in inside),
        "start": max(0.0, inside[0][1] - begin),
        "end": inside[-1][2] - begin,
        "cut": False,
    }


def _previous(segments: list[dict[str, Any]], begin: float) -> list[dict[str, Any]]:
    """The sentences before the window, timed as if each had begun a window of its own."""
    previous, end = [], 0.0
    for segment in segments:
        if segment["end"] > begin + _FORESIGHT:
            break
        times = {"start": segment["start"] - end, "end": segment["end"] - end}
        previous.append({"text": segment["text"], **times, "cut": False})
        end = segment["end"]
    return previous
