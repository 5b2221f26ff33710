"""Where a long recording is cut into rows: at pauses between the teacher's segments.

Owns the section `segmentation` and the rule of cutting, on times alone. It reads no audio, which
`cut_rows` does, and writes no rows, which `recordings` does.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest

from pydantic import Field

from simpler_distil_whisper.config import NonNegativeFloat, PositiveFloat, StrictModel
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.labels.rows import RowLimits
from simpler_distil_whisper.model.options import DecodingOptions

TOLERANCE_SECONDS = 0.3  # by which the times of segments miss the pauses of the audio
PADDING_SECONDS = 0.2  # of silence that a row keeps before and after its speech
LONGEST_PAUSE_SECONDS = 2.0  # within a row

NO_SPEECH = "no speech in the audio of the text"
TEXT_GOES_ON = "the text may go on in the next segment, which has no speech"
NO_PAUSE = "no pause next to its segments"
NO_PAUSE_WITHIN = "no pause between segments for longer than a row may be"
SEGMENT_TOO_LONG = "a single segment is longer than a row may be"
NO_TEXT = "speech without text"


class SegmentationOptions(StrictModel):
    """Recordings longer than the model's window become rows that can be learnt from."""

    enabled: bool = Field(
        False,
        description="Cut long recordings at pauses between segments; needs decoding.long_form.",
    )
    max_seconds: PositiveFloat | None = Field(
        None, description="Longest row that is cut from a recording; null: the model's window."
    )
    min_silence_seconds: NonNegativeFloat = Field(
        0.2, description="Shortest pause in the audio at which a recording is cut."
    )

    def check(self, decoding: DecodingOptions, columns: Columns) -> None:
        """Raise ValueError if recordings cannot be cut with the other sections as they are."""
        if not self.enabled:
            return
        if decoding.long_form == "reject":
            raise ValueError('segmentation needs decoding.long_form: "sequential" or "chunked"')
        if decoding.long_form == "chunked" and not decoding.timestamps:
            raise ValueError(
                "segmentation of chunked recordings needs decoding.timestamps: without them it is "
                "not known when a segment ends"
            )
        if not (columns.start_seconds and columns.duration_seconds):
            raise ValueError(
                "segmentation needs names in data.columns.start_seconds and duration_seconds, "
                "under which its rows say where they are in the file"
            )


@dataclass(frozen=True)
class SegmentSpan:
    """When a segment is spoken, and how many tokens its text and timestamps have."""

    start: float
    end: float
    tokens: int


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording that becomes a row, or the reason why it does not.

    Attributes:
        start: seconds from the beginning of the recording.
        end: likewise.
        segments: which of the recording's segments it holds.
        reason: why it is rejected; None: it becomes a row.
    """

    start: float
    end: float
    segments: range
    reason: str | None = None

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


@dataclass(frozen=True)
class _Unit:
    """Segments between which no pause is confirmed, and the pauses around them, if there are."""

    segments: range
    before: int | None
    after: int | None

    @property
    def is_silent(self) -> bool:
        """Whether all of it lies in one pause."""
        return None not in (self.before, self.after) and self.before == self.after


def cut_at_pauses(
    segments: Sequence[SegmentSpan],
    speech: Sequence[tuple[float, float]],
    seconds: float,
    limits: RowLimits,
    min_silence: float,
) -> list[Piece]:
    """Return the pieces of a recording in order; what is in none of them holds no speech.

    A cut needs two witnesses: the teacher ends a segment there, and the audio is silent. Neighbours
    are joined up to the limits, unless speech without text or a long pause is between them.

    Args:
        segments: the teacher's, in order.
        speech: where somebody speaks, in order, by the audio.
        seconds: length of the recording.
        limits: what a row may hold.
        min_silence: shortest pause at which it may be cut.
    """
    pauses = _Pauses(speech, seconds, min_silence)
    units = list(_units(segments, pauses))
    pieces: list[Piece] = []
    previous: _Unit | None = None
    for unit, following in zip_longest(units, units[1:]):
        piece, joined = _piece(unit, segments, pauses, limits), None
        if piece.reason is None and _text_goes_on(unit, following, segments):
            piece = replace(piece, reason=TEXT_GOES_ON)
        if previous and piece.reason is None and previous.after == unit.before:
            joined = _joined(pieces[-1], piece, pauses.length(unit.before), segments, limits)
        if joined:
            pieces[-1] = joined
        else:
            pieces.append(piece)
        previous = unit if piece.reason is None else None
    return _with_speech_without_text(_apart(pieces, seconds), speech, seconds)


class _Pauses:
    """The stretches between speech, the recording's two ends included, however short."""

    def __init__(
        self, speech: Sequence[tuple[float, float]], seconds: float, min_silence: float
    ) -> None:
        edges = [0.0, *(time for span in speech for time in span), seconds]
        between = zip(edges[::2], edges[1::2], strict=True)
        ends = (0, len(speech))
        self.times = [
            (start, end)
            for number, (start, end) in enumerate(between)
            if number in ends or end - start >= min_silence
        ]
        self._ends = [end for _, end in self.times]

    def near(self, time: float) -> int | None:
        """Return the pause nearest to a time, at most `TOLERANCE_SECONDS` away; None: none is."""
        after = bisect_left(self._ends, time)
        near = [number for number in (after - 1, after) if 0 <= number < len(self.times)]
        number = min(near, key=lambda number: self._distance(number, time))
        return number if self._distance(number, time) <= TOLERANCE_SECONDS else None

    def _distance(self, number: int, time: float) -> float:
        start, end = self.times[number]
        return max(start - time, time - end, 0.0)

    def middle(self, number: int) -> float:
        """Return the time at which the rows on both sides of a short pause end and begin."""
        start, end = self.times[number]
        return (start + end) / 2

    def length(self, number: int | None) -> float:
        """Return how long a pause is."""
        start, end = self.times[number or 0]
        return end - start


def _units(segments: Sequence[SegmentSpan], pauses: _Pauses) -> Iterator[_Unit]:
    """Yield the runs of segments between which the recording must not be cut."""
    if not segments:
        return
    first, before = 0, pauses.near(segments[0].start)
    for number, (left, right) in enumerate(pairwise(segments), 1):
        after, following = pauses.near(left.end), pauses.near(right.start)
        confirmed = after is not None and following is not None and after <= following
        if confirmed or right.start - left.end > LONGEST_PAUSE_SECONDS:
            yield _Unit(range(first, number), before, after)
            first, before = number, following
    yield _Unit(range(first, len(segments)), before, pauses.near(segments[-1].end))


def _piece(
    unit: _Unit, segments: Sequence[SegmentSpan], pauses: _Pauses, limits: RowLimits
) -> Piece:
    """Return the piece of one unit, with some of the silence around it."""
    first, last = segments[unit.segments[0]], segments[unit.segments[-1]]
    start, end = first.start, last.end
    if unit.before is None or unit.after is None:
        return Piece(start, end, unit.segments, NO_PAUSE)
    if unit.before >= unit.after:
        return Piece(start, end, unit.segments, NO_SPEECH)
    start = max(pauses.times[unit.before][1] - PADDING_SECONDS, pauses.middle(unit.before))
    end = min(pauses.times[unit.after][0] + PADDING_SECONDS, pauses.middle(unit.after))
    if first.end < start - TOLERANCE_SECONDS or last.start > end + TOLERANCE_SECONDS:
        return Piece(first.start, last.end, unit.segments, NO_SPEECH)
    tokens = sum(segments[number].tokens for number in unit.segments)
    if end - start <= limits.seconds and tokens <= limits.tokens:
        return Piece(start, end, unit.segments)
    reason = NO_PAUSE_WITHIN if len(unit.segments) > 1 else SEGMENT_TOO_LONG
    return Piece(start, end, unit.segments, reason)


def _text_goes_on(unit: _Unit, following: _Unit | None, segments: Sequence[SegmentSpan]) -> bool:
    """Return whether the next unit, which has text but no speech, may belong to the speech of this.

    Teachers put the last words before a pause too late, into the pause.
    """
    if following is None or not following.is_silent or unit.after != following.before:
        return False
    silence = segments[following.segments.start].start - segments[unit.segments.stop - 1].end
    return silence <= TOLERANCE_SECONDS


def _joined(
    left: Piece, right: Piece, pause: float, segments: Sequence[SegmentSpan], limits: RowLimits
) -> Piece | None:
    """Return two neighbouring pieces as one; None if they do not fit into a row."""
    piece = Piece(left.start, right.end, range(left.segments.start, right.segments.stop))
    tokens = sum(segments[number].tokens for number in piece.segments)
    fits = piece.seconds <= limits.seconds and tokens <= limits.tokens
    return piece if fits and pause <= LONGEST_PAUSE_SECONDS else None


def _apart(pieces: Sequence[Piece], seconds: float) -> list[Piece]:
    """Return the pieces without overlaps: the rejected ones lose what is in others."""
    row_starts = [piece.start for piece in pieces if piece.reason is None]
    apart, before, rows = [], 0.0, 0
    for piece in pieces:
        if piece.reason is None:
            rows += 1
        else:
            next_row = row_starts[rows] if rows < len(row_starts) else seconds
            start = min(max(piece.start, before), next_row)
            piece = replace(piece, start=start, end=min(max(piece.end, start), next_row))
        apart.append(piece)
        before = piece.end
    return apart


def _with_speech_without_text(
    pieces: Sequence[Piece], speech: Sequence[tuple[float, float]], seconds: float
) -> list[Piece]:
    """Return the pieces, and between them what is speech by the audio but has no segment."""
    result: list[Piece] = []
    spans = iter(speech)
    span = next(spans, None)
    before, segment = 0.0, 0
    for piece in [*pieces, Piece(seconds, seconds, range(0))]:
        without_text = []
        while span and span[0] < piece.start:
            start, end = max(span[0], before), min(span[1], piece.start)
            if end - start > TOLERANCE_SECONDS:
                without_text.append((start, end))
            if span[1] > piece.start:
                break
            span = next(spans, None)
        if without_text:
            nothing = range(segment, segment)
            result.append(Piece(without_text[0][0], without_text[-1][1], nothing, NO_TEXT))
        result.append(piece)
        before, segment = piece.end, piece.segments.stop
    return result[:-1]
