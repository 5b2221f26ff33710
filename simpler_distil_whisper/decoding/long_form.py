"""Recordings longer than the model's window: where to cut them, and how the parts are joined.

Sequential, as openai/whisper's `transcribe`: the next window begins where the last whole segment of
this one ended, and is given the previous text. Chunked: windows that overlap at fixed places, all
decoded at once, and merged by `chunks.py`. A single window is up to `transcriber.py`, the log-mel
of a recording up to `data/features.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional

from simpler_distil_whisper.data.speech_activity import SpeechSpan
from simpler_distil_whisper.decoding.batches import in_batches
from simpler_distil_whisper.decoding.chunks import (
    Chunk,
    Part,
    SegmentTokens,
    loud_frames,
    merged,
    words_of,
)
from simpler_distil_whisper.decoding.fallback import fails, is_loop, is_silence
from simpler_distil_whisper.decoding.hypothesis import (
    Hypothesis,
    Segment,
    TimedToken,
    WindowEvidence,
    without_speech,
)
from simpler_distil_whisper.decoding.timed_segments import (
    between_timestamps,
    cut_at_timestamps,
)
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.model.folder_check import FRAMES_PER_SECOND
from simpler_distil_whisper.text.languages import join_texts

MAX_CONTEXT_TEMPERATURE = 0.5  # openai/whisper: text sampled at a higher one is no good context
OVERLAP = 1 / 3  # of a chunk with the next one, as in transformers' pipeline


@dataclass
class _Recording:
    """A recording and the parts of its transcript so far.

    Attributes:
        features: float32 [M, F]: its log-mel.
        language: its code; None until it is detected, and of a model for English.
        key: a number for the recording, from which its random numbers are made.
        context: the tokens of the previous text that its next window is given.
        speech: first and last frame of each part with speech; None: everything is decoded.
        seek: the frame at which its next window begins.
        parts: what each window has contributed.
    """

    features: Tensor
    language: str | None
    key: int
    context: list[int]
    speech: list[tuple[int, int]] | None = None
    seek: int = 0
    parts: list[Part] = field(default_factory=list)

    @property
    def frames(self) -> int:
        """The number of its log-mel frames."""
        return self.features.shape[1]

    def has_speech(self, first: int, last: int) -> bool:
        """Return whether something between two frames is to be decoded."""
        if self.speech is None:
            return True
        return any(begin <= last and first <= end for begin, end in self.speech)

    def seek_speech(self) -> None:
        """Seek to what is to be decoded next; if there is no more, to the end."""
        if self.speech is not None:
            later = [begin for begin, end in self.speech if end > self.seek]
            self.seek = max(self.seek, later[0]) if later else self.frames


_Window = tuple[_Recording, int]  # a recording, and a frame of it at which a window begins


def transcribe_long(
    transcriber: Transcriber,
    features: Sequence[Tensor],
    languages: Sequence[str | None],
    keys: Sequence[int] | None = None,
    speech: Sequence[Sequence[SpeechSpan] | None] | None = None,
) -> list[Hypothesis]:
    """Return one hypothesis for each recording, however long.

    Several are decoded side by side, `transcriber.room.rows` windows at a time; none depends on
    the others. The hypothesis of a recording is made of those of its windows:

    - text and tokens: joined, the texts with a space between them unless their script has none, the
      tokens in sequential form with timestamps, which count from the beginning of each window;
    - segments: timed from the beginning of the recording; without timestamps one for each chunk;
    - average log-probability: each window weighted by how many of its tokens are kept;
    - no-speech probability: of the window that is the least likely to be silent;
    - compression ratio and temperature: the greatest, since one loop or one guess is bad enough;
    - `complete`: no window has lost its end to the limit;
    - windows: the evidence of each.

    Of silent windows only the no-speech probability counts, unless all windows are silent.

    Args:
        transcriber: the model and its options; `long_form` is "chunked", or else it is sequential.
        features: float32 [M, F] each: what `long_log_mel` returns.
        languages: the code of each recording; None leaves it to the options, or to the model,
            which detects it in a window that begins with the first speech.
        keys: a number for each recording, from which its random numbers are made.
        speech: where somebody speaks in each recording; with the option `voice_activity` nothing
            else is decoded. None: it is not known.

    Raises:
        ConfigError: the model has no token for a language.
    """
    default_language = transcriber.options.language
    recordings = [
        _Recording(feature, language or default_language, key, list(transcriber.prompt_ids))
        for feature, language, key in zip(
            features, languages, keys or [0] * len(features), strict=True
        )
    ]
    _note_speech(transcriber, recordings, speech or [None] * len(recordings))
    if transcriber.options.long_form == "chunked":
        _transcribe_chunks(transcriber, recordings)
    else:
        _transcribe_sequentially(transcriber, recordings)
    return [_whole(transcriber, recording) for recording in recordings]


def _note_speech(
    transcriber: Transcriber,
    recordings: list[_Recording],
    speech: Sequence[Sequence[SpeechSpan] | None],
) -> None:
    """Set what is decoded of each recording and, if it is not known, the language."""
    options = transcriber.options.speech_filter
    unknown: list[_Window] = []
    for recording, spans in zip(recordings, speech, strict=True):
        if options is not None and spans is not None:
            padding = _frame(options.padding_seconds)
            recording.speech = [
                (_frame(span.start_seconds), _frame(span.end_seconds)) for span in spans
            ]
            # No text begins in the padding behind speech. There is none where the recording ends.
            recording.speech = [
                (begin, end - padding if end < recording.frames else end)
                for begin, end in recording.speech
            ]
        if recording.language is None and transcriber.whisper.tokens.languages:
            unknown.append((recording, _frame(spans[0].start_seconds) if spans else 0))
    for group in in_batches(unknown, transcriber.room.rows):
        languages = transcriber.detect_languages(_encode_windows(transcriber, group))
        for (recording, _), language in zip(group, languages, strict=True):
            recording.language = language


def _transcribe_sequentially(transcriber: Transcriber, recordings: list[_Recording]) -> None:
    """Decode window after window of each recording, a batch of recordings at a time."""
    waiting = _unfinished(recordings)
    while waiting:
        group = waiting[: transcriber.room.rows]
        windows = [(recording, recording.seek) for recording in group]
        contexts = [recording.context for recording in group]
        states = _encode_windows(transcriber, windows)
        hypotheses = _decode_windows(transcriber, windows, states, contexts, timestamps=True)
        for recording, hypothesis in zip(group, hypotheses, strict=True):
            _add_window(transcriber, recording, hypothesis)
        if transcriber.aligner:
            parts = [recording.parts[-1] for recording in group]
            timed = _aligned(transcriber, windows, states, [part.ids for part in parts])
            for part, tokens in zip(parts, timed, strict=True):
                part.segments[:] = _with_tokens(transcriber, part.segments, tokens)
        waiting = _unfinished(waiting)


def _unfinished(recordings: Sequence[_Recording]) -> list[_Recording]:
    """Move each recording to what is decoded next; return those that are not at their ends."""
    for recording in recordings:
        recording.seek_speech()
    return [recording for recording in recordings if recording.seek < recording.frames]


def _encode_windows(transcriber: Transcriber, windows: Sequence[_Window]) -> Tensor:
    """Return float [B, E, D]: the encoder states of some windows."""
    size = _window_frames(transcriber)
    features = []
    for recording, start in windows:
        window = recording.features[:, start : start + size]
        # openai/whisper pads the last window with zeros, although they are not silence.
        features.append(functional.pad(window, (0, size - window.shape[1])))
    positions = [_positions(transcriber, *window) for window in windows]
    return transcriber.encode(torch.stack(features), positions)


def _positions(transcriber: Transcriber, recording: _Recording, start: int) -> int:
    """Return how many encoder positions the window is given that begins at a frame."""
    frames = min(_window_frames(transcriber), recording.frames - start)
    return transcriber.encoder_positions(frames / FRAMES_PER_SECOND)


def _decode_windows(
    transcriber: Transcriber,
    windows: Sequence[_Window],
    states: Tensor,
    contexts: list[list[int]] | None = None,
    timestamps: bool | None = None,
) -> list[Hypothesis]:
    """Return the hypotheses of some windows.

    Args:
        transcriber: the model and its options.
        windows: the recording and the first frame of each.
        states: float [B, E, D]: their encoder states.
        contexts: tokens of the text before each; None: the option `prompt`.
        timestamps: whether to decode with timestamps; None: as the options say.
    """
    return transcriber.from_encoder_states(
        states,
        [recording.language for recording, _ in windows],
        # The place in the recording is below 2 ** 32: each window has random numbers of its own.
        keys=[(recording.key << 32) + start for recording, start in windows],
        previous=contexts,
        timestamps=timestamps,
    )


def _aligned(
    transcriber: Transcriber,
    windows: Sequence[_Window],
    states: Tensor,
    texts: Sequence[Sequence[int]],
) -> list[list[TimedToken]]:
    """Return the tokens of the texts of some windows, timed from the beginning of the recording.

    Args:
        transcriber: the model and its options.
        windows: the recording and the first frame of each.
        states: float [B, E, D]: their encoder states.
        texts: tokens of each.
    """
    assert transcriber.aligner is not None, "no times of words are requested"
    size = _window_frames(transcriber)
    languages = [recording.language or "en" for recording, _ in windows]
    frames = [min(size, recording.frames - start) for recording, start in windows]
    seconds = [count / FRAMES_PER_SECOND for count in frames]
    timed = transcriber.aligner(states, languages, texts, seconds)
    return [
        [token.shifted(start / FRAMES_PER_SECOND) for token in tokens]
        for (_, start), tokens in zip(windows, timed, strict=True)
    ]


def _with_tokens(
    transcriber: Transcriber, segments: Sequence[SegmentTokens], tokens: Sequence[TimedToken]
) -> list[SegmentTokens]:
    """Return the segments of a window with their share of the timed tokens of its text."""
    rest, is_text = iter(tokens), transcriber.whisper.tokens.is_text
    return [
        replace(segment, timed=tuple(islice(rest, sum(map(is_text, segment.ids)))))
        for segment in segments
    ]


def _add_window(transcriber: Transcriber, recording: _Recording, hypothesis: Hypothesis) -> None:
    """Add the part of the window at `seek`, and seek to the beginning of the next one."""
    frames = min(_window_frames(transcriber), recording.frames - recording.seek)
    if is_silence(hypothesis, transcriber.options):
        recording.parts.append(Part(hypothesis, [], complete=True))
        recording.seek += frames
        return
    times = transcriber.whisper.tokens.timestamps
    segments, advance = cut_at_timestamps(hypothesis.token_ids, times, frames)
    kept = [
        segment.shifted(recording.seek)
        for segment in segments
        if segment.start < segment.end and transcriber.text_of(segment.ids).strip()
    ]
    kept = [segment for segment in kept if recording.has_speech(segment.start, segment.end)]
    # What the limit has cut off is decoded again if the next window begins within this one.
    part = Part(hypothesis, kept, hypothesis.complete or advance < frames)
    recording.parts.append(part)
    recording.seek += advance
    recording.context += part.ids
    options = transcriber.options
    given_up = fails(hypothesis, options)  # after an attempt at every temperature
    temperature = options.temperatures[-1] if given_up else hypothesis.temperature
    # Loops beget loops, also where the only temperature is 0, as when labelling.
    no_context = temperature > MAX_CONTEXT_TEMPERATURE or is_loop(hypothesis, options)
    if no_context or not options.condition_on_previous_text:
        recording.context = []


def _transcribe_chunks(transcriber: Transcriber, recordings: list[_Recording]) -> None:
    """Decode all chunks of all recordings, in full batches, and merge those of each recording."""
    size = _window_frames(transcriber)
    overlap = round(size * OVERLAP)
    # A chunk that ends in its overlap with the one before would add nothing.
    starts = [range(0, max(each.frames - overlap, 1), size - overlap) for each in recordings]
    with_speech = [
        (number, start)
        for number, recording in enumerate(recordings)
        for start in starts[number]
        if recording.has_speech(start, start + size)
    ]
    hypotheses: dict[tuple[int, int], Hypothesis] = {}
    timed: dict[tuple[int, int], list[TimedToken]] = {}
    for group in in_batches(with_speech, transcriber.room.rows):
        windows = [(recordings[number], start) for number, start in group]
        states = _encode_windows(transcriber, windows)
        results = _decode_windows(transcriber, windows, states)
        hypotheses.update(zip(group, results, strict=True))
        if transcriber.aligner:
            texts = [hypothesis.token_ids for hypothesis in results]
            aligned = _aligned(transcriber, windows, states, texts)
            timed.update(zip(group, aligned, strict=True))
    for number, recording in enumerate(recordings):
        chunks = []
        for start in starts[number]:
            place = number, start
            tokens = timed.get(place, [])
            chunks.append(_chunk(transcriber, hypotheses.get(place), start, recording, tokens))
        loud = loud_frames(recording.features)
        recording.parts = merged(chunks, loud, transcriber.options.timestamps)


def _chunk(
    transcriber: Transcriber,
    hypothesis: Hypothesis | None,
    start: int,
    recording: _Recording,
    tokens: Sequence[TimedToken],
) -> Chunk:
    """Return the chunk that begins at a frame; without a hypothesis, one that is not decoded.

    Its `tokens` have times from the beginning of the recording; there are none if none are
    requested.
    """
    end = min(start + _window_frames(transcriber), recording.frames)
    if hypothesis is None or is_silence(hypothesis, transcriber.options):
        return Chunk(start, end, hypothesis or _no_text(recording), [])
    times = transcriber.whisper.tokens.timestamps
    timed = between_timestamps(hypothesis.token_ids, times, end - start)
    timed = [s.shifted(start) for s in _with_tokens(transcriber, timed, tokens)]
    segments = [
        (segment, words_of(segment.ids, transcriber.text_of))
        for segment in timed
        if recording.has_speech(segment.start, segment.end)
    ]
    return Chunk(start, end, hypothesis, segments)


def _whole(transcriber: Transcriber, recording: _Recording) -> Hypothesis:
    """Return the hypothesis of a recording, as `transcribe_long` describes it."""
    if not recording.parts:
        return _no_text(recording)
    windows = [part.hypothesis for part in recording.parts]
    no_speech = [h.no_speech_probability for h in windows if h.no_speech_probability is not None]
    parts = [part for part in recording.parts if part.ids] or recording.parts
    kept = [part.hypothesis for part in parts]
    weights = [max(len(part.ids), 1) for part in parts]
    weighted = sum(h.average_log_probability * w for h, w in zip(kept, weights, strict=True))
    return Hypothesis(
        text=join_texts([transcriber.text_of(part.ids) for part in parts]),
        language=windows[0].language,
        token_ids=tuple(id for part in parts for id in part.ids),
        segments=tuple(_segments(transcriber, recording, parts)),
        average_log_probability=weighted / sum(weights),
        no_speech_probability=min(no_speech, default=None),
        compression_ratio=max(h.compression_ratio for h in kept),
        temperature=max(h.temperature for h in kept),
        complete=all(part.complete for part in parts),
        windows=tuple(_evidence(part) for part in parts),
    )


def _no_text(recording: _Recording) -> Hypothesis:
    return without_speech(recording.language or "en")


def _evidence(part: Part) -> WindowEvidence:
    """Return how probable the segments are that one window contributes."""
    window = part.hypothesis
    return WindowEvidence(
        segment_tokens=tuple(len(segment.ids) for segment in part.segments),
        average_log_probability=window.average_log_probability,
        no_speech_probability=window.no_speech_probability,
        temperature=window.temperature,
        complete=part.complete,
    )


def _segments(
    transcriber: Transcriber, recording: _Recording, parts: Sequence[Part]
) -> list[Segment]:
    """Return the segments of all parts, none of which lasts longer than the recording."""
    timed = []
    for segment in (segment for part in parts for segment in part.segments):
        frames = (min(frame, recording.frames) for frame in (segment.start, segment.end))
        start, end = (round(frame / FRAMES_PER_SECOND, 2) for frame in frames)
        timed.append((Segment(start, end, transcriber.text_of(segment.ids)), segment.timed))
    if not transcriber.aligner:
        return [segment for segment, _ in timed]
    return transcriber.aligner.segments_with_words(timed, recording.language or "en")


def _frame(seconds: float) -> int:
    return round(seconds * FRAMES_PER_SECOND)


def _window_frames(transcriber: Transcriber) -> int:
    frames: int = transcriber.whisper.feature_extractor.nb_max_frames
    return frames
