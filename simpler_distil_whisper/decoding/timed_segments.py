"""Tokens with timestamps -> segments: when each begins and ends, and which tokens are its own.

Owns the three ways to read such tokens: of an utterance in seconds (`segments_of`), and in frames
of a window whose rest may be decoded again (`cut_at_timestamps`) or of a chunk
(`between_timestamps`). It decodes nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise

from torch import Tensor

from simpler_distil_whisper.decoding.chunks import SegmentTokens
from simpler_distil_whisper.decoding.hypothesis import Hypothesis, Segment, TimedToken
from simpler_distil_whisper.decoding.word_times import TokenAligner
from simpler_distil_whisper.model.folder_check import FRAMES_PER_POSITION
from simpler_distil_whisper.model.special_tokens import TIME_STEP
from simpler_distil_whisper.model.whisper import Whisper


def segments_of(ids: Sequence[int], whisper: Whisper) -> list[Segment]:
    """Return the texts between timestamps; none of tokens without timestamps."""
    return [segment for segment, _ in _segments_and_ids(ids, whisper)]


def with_words(
    aligner: TokenAligner,
    states: Tensor,
    hypotheses: Sequence[Hypothesis],
    seconds: Sequence[float],
) -> list[Hypothesis]:
    """Return hypotheses about whole utterances, their segments with words.

    Args:
        aligner: of the model that has decoded them.
        states: float [B, E, D] or [B, E, D + D']: encoder states, as `Transcriber.encode` returns
            them.
        hypotheses: what was decoded from them.
        seconds: the length of each utterance.
    """
    languages = [hypothesis.language for hypothesis in hypotheses]
    timed = aligner(states, languages, [each.token_ids for each in hypotheses], seconds)
    results = []
    for hypothesis, tokens, end in zip(hypotheses, timed, seconds, strict=True):
        segments = aligner.segments_with_words(
            _segments_and_tokens(hypothesis, tokens, end, aligner.whisper), hypothesis.language
        )
        results.append(replace(hypothesis, segments=tuple(segments)))
    return results


def _segments_and_tokens(
    hypothesis: Hypothesis, tokens: Sequence[TimedToken], end: float, whisper: Whisper
) -> list[tuple[Segment, list[TimedToken]]]:
    """Return the segments, each with its own tokens; one up to the end if there are no times."""
    segments = _segments_and_ids(hypothesis.token_ids, whisper)
    if not segments and tokens:
        return [(Segment(0.0, end, hypothesis.text), list(tokens))]
    rest = iter(tokens)
    return [(segment, list(islice(rest, len(ids)))) for segment, ids in segments]


def _segments_and_ids(ids: Sequence[int], whisper: Whisper) -> list[tuple[Segment, list[int]]]:
    """Return the texts between timestamps, each with its tokens."""
    segments, text_ids = [], list[int]()
    start: float | None = None
    for id in ids:
        if whisper.tokens.is_text(id):
            text_ids.append(id)
            continue
        seconds = (id - whisper.tokens.timestamps.start) * TIME_STEP
        if start is not None and text_ids:
            segment = Segment(round(start, 2), round(seconds, 2), whisper.text_of(text_ids))
            segments.append((segment, text_ids))
            text_ids, start = [], None
        else:
            start = seconds
    if start is not None and text_ids:
        segments.append((Segment(round(start, 2), None, whisper.text_of(text_ids)), text_ids))
    return segments


def cut_at_timestamps(
    ids: Sequence[int], times: range, frames: int
) -> tuple[list[SegmentTokens], int]:
    """Return the segments of a window, and after how many frames the next window begins.

    The rules are openai/whisper's. Two timestamps in a row end one segment and begin the next: the
    text after the last such pair may not be whole, and is decoded again from there. But if the text
    ends in a single timestamp, nothing follows in this window, and a text without pairs cannot be
    cut: then the next window begins where this one ends. Timestamps count the encoder's positions.

    Unlike there, a text without pairs that has a timestamp before it, but none at its end, does not
    end where it begins. Models that have not learnt timestamps may write that.

    Args:
        ids: tokens with timestamps.
        times: the tokens of 0.00 s, 0.02 s and so on.
        frames: of the window, as far as the recording goes.
    """
    is_time = [id in times for id in ids]
    ends = [place for place in range(1, len(ids)) if is_time[place - 1] and is_time[place]]
    if not ends:
        has_end = len(ids) > 1 and is_time[-1]
        end = (ids[-1] - times.start) * FRAMES_PER_POSITION if has_end else frames
        return [SegmentTokens(0, end or frames, tuple(ids))], frames
    nothing_follows = is_time[-2:] == [False, True]
    if nothing_follows:
        ends.append(len(ids))
    segments = []
    for begin, end in pairwise([0, *ends]):
        start = (ids[begin] - times.start) * FRAMES_PER_POSITION
        stop = (ids[end - 1] - times.start) * FRAMES_PER_POSITION
        segments.append(SegmentTokens(start, stop, tuple(ids[begin:end])))
    # After a segment that ends at 0, which the timestamp rules forbid, the loop would never end.
    advance = frames if nothing_follows else segments[-1].end or frames
    return segments, advance


def between_timestamps(ids: Sequence[int], times: range, frames: int) -> list[SegmentTokens]:
    """Return the segments between timestamps, without the timestamps.

    Args:
        ids: tokens.
        times: the tokens of 0.00 s, 0.02 s and so on.
        frames: of the window, at whose ends segments begin and end that have no timestamps.
    """
    segments, text_ids, start = [], list[int](), 0
    for id in ids:
        if id not in times:
            text_ids.append(id)
            continue
        now = (id - times.start) * FRAMES_PER_POSITION
        if text_ids:
            segments.append(SegmentTokens(start, now, tuple(text_ids)))
            text_ids = []
        start = now
    if text_ids:
        segments.append(SegmentTokens(start, max(start, frames), tuple(text_ids)))
    return segments
