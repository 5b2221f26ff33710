"""One labelled recording -> the rows that it is cut into, and what is rejected of it.

Owns what stands in such a row: its own text, times, evidence, and part of the reference. Where the
recording is cut is up to `segmentation`, where its reference is to `alignment`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np

from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.data.speech_activity import SpeechOptions, speech_spans
from simpler_distil_whisper.decoding.hypothesis import Hypothesis, compression_ratio
from simpler_distil_whisper.evaluation.metrics import Scorer
from simpler_distil_whisper.labels.alignment import ReferencePart, reference_parts
from simpler_distil_whisper.labels.rows import (
    PART,
    PREVIOUS_TEXT,
    RECORDING,
    SEGMENTS,
    UNCONVERTED_SEGMENTS,
    WHY_NO_REFERENCE,
    WINDOWS,
    LabelColumns,
    RowLimits,
    error_rate,
    measure_label,
)
from simpler_distil_whisper.labels.segmentation import Piece, SegmentSpan, cut_at_pauses
from simpler_distil_whisper.text.languages import join_texts

# Of the text before a row: more than the 223 tokens that a decoder can be given of it.
PREVIOUS_CHARACTERS = 1500
OF_WHOLE_RECORDINGS = (WINDOWS, UNCONVERTED_SEGMENTS)


class CutRecording(TypedDict):
    """The rows that a recording is cut into, and the entries of `rejected_segments.jsonl`."""

    rows: list[Row]
    rejected: list[Row]


class _Segment(NamedTuple):
    """A segment of a recording with the evidence of the window that it comes from.

    Attributes:
        start, end: in seconds from the beginning of the recording.
        text: as it is written in labels.
        unconverted: as the teacher wrote it.
        tokens: how many it has, timestamps included.
        window: the evidence of its window.
        complete: nothing is missing after it because of the limit of tokens.
    """

    start: float
    end: float
    text: str
    unconverted: str
    tokens: int
    window: dict[str, Any]
    complete: bool


@dataclass(frozen=True)
class RecordingCutter:
    """Cuts labelled recordings into rows.

    Attributes:
        columns: which key of a row holds what.
        limits: what a row may hold.
        min_silence_seconds: shortest pause at which a recording may be cut.
        scorer: the one that has counted the error rates.
    """

    columns: LabelColumns
    limits: RowLimits
    min_silence_seconds: float
    scorer: Scorer

    def __call__(self, recording: Row, name: str) -> CutRecording:
        """Return what a recording is cut into.

        Args:
            recording: its labelled row, with the evidence of its windows.
            name: with which the ids of its rows begin.

        Raises:
            DataError: its audio cannot be read any more.
        """
        segments = _segments(recording)
        pieces = self._pieces(recording, segments)
        texts = [
            join_texts([segment.text for segment in _segments_in(piece, segments)])
            for piece in pieces
        ]
        references = self._references(recording, texts)
        given = recording.get(PREVIOUS_TEXT)
        previous = given if isinstance(given, str) else ""
        cut = CutRecording(rows=[], rejected=[])
        for piece, text, reference in zip(pieces, texts, references, strict=True):
            place = self._place(recording, piece)
            if piece.reason:
                row = {RECORDING: recording[RECORDING], **place, self.columns.label: text}
                entry = {"place": recording[RECORDING], "reason": piece.reason, "row": row}
                cut["rejected"].append(entry)
                continue
            number = len(cut["rows"]) + 1
            row = {key: recording[key] for key in recording if key not in OF_WHOLE_RECORDINGS}
            row |= {**place, PART: number, PREVIOUS_TEXT: previous}
            if self.columns.id:
                row[self.columns.id] = f"{name}-part-{number:04d}"
            row |= self._label(recording, _segments_in(piece, segments), piece, text, reference)
            cut["rows"].append(row)
            previous = join_texts([previous, text])[-PREVIOUS_CHARACTERS:]
        return cut

    def _pieces(self, recording: Row, segments: Sequence[_Segment]) -> list[Piece]:
        waveform = self.columns.load(recording)
        silence = self.min_silence_seconds
        speech = speech_spans(
            waveform, SpeechOptions(min_silence_seconds=silence, padding_seconds=0.0)
        )
        return cut_at_pauses(
            [SegmentSpan(segment.start, segment.end, segment.tokens) for segment in segments],
            [(span.start_seconds, span.end_seconds) for span in speech],
            recording["audio_seconds"],
            self.limits,
            silence,
        )

    def _references(self, recording: Row, texts: Sequence[str]) -> list[ReferencePart]:
        """Return the part of the recording's reference that belongs to each of the texts."""
        reference = recording[self.columns.reference]
        if reference is None:
            return [ReferencePart(None)] * len(texts)
        return reference_parts(reference, texts, recording["error_language"], self.scorer)

    def _place(self, recording: Row, piece: Piece) -> Row:
        """Return the columns that say where the audio of a piece is."""
        start_column, duration_column = self.columns.start_seconds, self.columns.duration_seconds
        assert start_column and duration_column, "the config is checked"
        first = self.columns.clip(recording).start_seconds
        start = math.ceil((first + piece.start) * 1000) / 1000
        # Nothing is rounded up, beyond what a row may hold or where the next one begins.
        duration = math.floor((first + piece.end - start) * 1000) / 1000
        return {
            self.columns.audio: recording[self.columns.audio],
            start_column: start,
            duration_column: max(duration, 0.0),
        }

    def _label(
        self,
        recording: Row,
        segments: Sequence[_Segment],
        piece: Piece,
        text: str,
        reference: ReferencePart,
    ) -> Row:
        """Return the columns of a row's label: the text, its reference and the evidence."""
        columns, scorer = self.columns, self.scorer
        language = recording["error_language"]
        label = {
            columns.label: text,
            columns.reference: reference.text,
            columns.error_rate: error_rate(reference.text, text, scorer, language),
            WHY_NO_REFERENCE: reference.reason,
            SEGMENTS: [_relative(segment, piece) for segment in segments],
        }
        if columns.unconverted:
            label[columns.unconverted] = join_texts([each.unconverted for each in segments])
        tokens = sum(segment.tokens for segment in segments)
        measured = measure_label(text, tokens, piece.seconds, reference.text, scorer, language)
        return label | _evidence(segments, text) | measured


def _segments_in(piece: Piece, segments: Sequence[_Segment]) -> Sequence[_Segment]:
    return segments[piece.segments.start : piece.segments.stop]


def _segments(recording: Row) -> list[_Segment]:
    """Return the segments of a labelled recording, each with the evidence of its window."""
    evidence = [
        (tokens, window, window["complete"] or number < len(window["segment_tokens"]))
        for window in recording[WINDOWS]
        for number, tokens in enumerate(window["segment_tokens"], 1)
    ]
    return [
        _Segment(
            segment["start_seconds"], segment["end_seconds"], segment["text"], unconverted, *rest
        )
        for segment, unconverted, rest in zip(
            recording[SEGMENTS], recording[UNCONVERTED_SEGMENTS], evidence, strict=True
        )
    ]


def _relative(segment: _Segment, piece: Piece) -> Row:
    """Return a segment with times from the beginning of its row, none of them outside it."""
    start, end = (
        round(min(max(time - piece.start, 0.0), piece.seconds), 2)
        for time in (segment.start, segment.end)
    )
    return {"start_seconds": start, "end_seconds": end, "text": segment.text}


def _evidence(segments: Sequence[_Segment], text: str) -> Row:
    """Return the evidence of a row: of the windows that its segments come from.

    The average log-probability counts each window by the tokens that the row has of it; of the
    others it is the worst value, but the compression ratio is the text's own.
    """
    windows = [segment.window for segment in segments]
    no_speech = [window["no_speech_probability"] for window in windows]
    log_probability = np.average(
        [window["average_log_probability"] for window in windows],
        weights=[max(segment.tokens, 1) for segment in segments],
    )
    return Hypothesis(
        text=text,
        language="",
        token_ids=(),
        segments=(),
        average_log_probability=float(log_probability),
        no_speech_probability=max((p for p in no_speech if p is not None), default=None),
        compression_ratio=compression_ratio(text),
        temperature=max(window["temperature"] for window in windows),
        complete=all(segment.complete for segment in segments),
    ).evidence()
