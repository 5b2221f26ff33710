"""Audio longer than the model's window: where to cut it, and how the parts become one transcript.

Sequential, as openai/whisper's `transcribe`: the next window begins where the last whole sentence
of this one ended, and is told what was said before. Chunked: windows that overlap at fixed places,
all decoded at once, and merged where neighbours say the same. Owns the log-mel of a whole recording
and everything between windows; what is in one window is up to `decoding.py`. Called by
`transcription.py`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from simpler_distil_whisper.data.audio import SAMPLE_RATE
from simpler_distil_whisper.decoding.batches import in_batches
from simpler_distil_whisper.decoding.transcriber import Hypothesis, Segment, Transcriber
from simpler_distil_whisper.text.languages import NEVER_SPACED, join_texts

FRAMES_PER_STEP = 2  # timestamps count the encoder's positions, two frames each
HOTTEST_CONTEXT = 0.5  # openai/whisper: what was drawn at a higher temperature is no good context
OVERLAP = 1 / 3  # of a chunk with the next one, as in transformers' pipeline
BYTES_OF_A_CHARACTER = 4  # at most, in UTF-8


@dataclass(frozen=True)
class Sentence:
    """What was said between two timestamps.

    Attributes:
        start: frames from the beginning of the window or of the recording.
        end: likewise.
        ids: its tokens.
    """

    start: int
    end: int
    ids: tuple[int, ...]

    def later(self, frames: int) -> "Sentence":
        """Return the same some frames later."""
        return Sentence(self.start + frames, self.end + frames, self.ids)


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
        """What makes two words the same, one of which may be the first of what was heard."""
        return "".join(filter(str.isalnum, self.text.casefold())) or self.text.strip()


@dataclass(frozen=True)
class Part:
    """What one window has contributed to a transcript.

    Attributes:
        hypothesis: all that was heard in it.
        sentences: what of it is kept, from the beginning of the recording; nothing of silence.
        complete: nothing is missing because the limit was reached.
    """

    hypothesis: Hypothesis
    sentences: list[Sentence]
    complete: bool

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that are kept."""
        return tuple(id for sentence in self.sentences for id in sentence.ids)


@dataclass(frozen=True)
class Chunk:
    """One of the overlapping windows.

    Attributes:
        start: its first frame in the recording.
        end: the frame after its last.
        hypothesis: what was heard in it.
        sentences: the same with the words of each, from the beginning of the recording; without
            timestamps one as long as the chunk, and nothing in a silent one.
    """

    start: int
    end: int
    hypothesis: Hypothesis
    sentences: list[tuple[Sentence, list[Word]]]

    @property
    def words(self) -> list[Word]:
        """The words of all sentences."""
        return [word for _, words in self.sentences for word in words]

    def words_within(self, begin: int, end: int, loud: Tensor) -> float:
        """Return about how many of its words are between two frames, as its loud frames tell."""
        count = 0.0
        for sentence, words in self.sentences:
            first, last = max(sentence.start, begin), max(min(sentence.end, end), 0)
            within, whole = loud[first:last].sum(), loud[sentence.start : sentence.end].sum()
            count += len(words) * float(within / whole.clamp(min=1))
        return count

    def part(self, first: int, stop: int) -> Part:
        """Return what it contributes if these of its words are kept."""
        place, kept = 0, []
        for sentence, words in self.sentences:
            some = words[max(first - place, 0) : max(stop - place, 0)]
            place += len(words)
            if some:
                ids = tuple(id for word in some for id in word.ids)
                kept.append(Sentence(sentence.start, sentence.end, ids))
        return Part(self.hypothesis, kept, self.hypothesis.complete)


@dataclass
class _Recording:
    """A recording and what has been heard of it so far.

    Attributes:
        features: float32 [M, F]: its log-mel.
        language: its code; None until the first window has told it.
        key: a number that tells it from others, for drawing tokens.
        context: the tokens that its next window is told.
        seek: the frame at which its next window begins.
        parts: what each window has contributed.
    """

    features: Tensor
    language: str | None
    key: int
    context: list[int]
    seek: int = 0
    parts: list[Part] = field(default_factory=list)

    @property
    def frames(self) -> int:
        """How many there are."""
        return self.features.shape[1]


def transcribe_long(
    transcriber: Transcriber,
    features: Sequence[Tensor],
    languages: Sequence[str | None],
    keys: Sequence[int] | None = None,
) -> list[Hypothesis]:
    """Return one hypothesis for each recording, however long, in the way the options say.

    Several are decoded side by side, `transcriber.batch_size` windows at a time; none depends on
    the others. The hypothesis of a recording has, of those of its windows,

    - the texts, with a space between them unless their script has none, and the tokens, in
      sequential form with the timestamps, which count from the beginning of each window;
    - the segments, with times from the beginning of the recording: what was said between two
      timestamps, or where there are none, what each chunk has contributed;
    - the average log-probability, each window weighted by how many of its tokens are kept;
    - the no-speech probability of the window that is the least likely to be silent;
    - the greatest compression ratio and temperature: one loop or one guess is enough to be told;
    - `complete`, if no window has lost its end to the limit.

    Of windows in which nothing was said, only the no-speech probability counts, unless all are
    such.

    Args:
        transcriber: the model and its options; `long_form` is "chunked", or else it is sequential.
        features: float32 [M, F] each: what `long_log_mel` returns.
        languages: the code of each recording, or None where the options or the model, by the first
            window, decide.
        keys: numbers that tell the recordings apart, for drawing tokens.

    Raises:
        ConfigError: the model has no token for a language.
    """
    recordings = [
        _Recording(
            feature, language or transcriber.options.language, key, list(transcriber.prompt_ids)
        )
        for feature, language, key in zip(
            features, languages, keys or [0] * len(features), strict=True
        )
    ]
    if transcriber.options.long_form == "chunked":
        _transcribe_chunks(transcriber, recordings)
    else:
        _transcribe_in_sequence(transcriber, recordings)
    return [_whole(transcriber, recording) for recording in recordings]


def _transcribe_in_sequence(transcriber: Transcriber, recordings: list[_Recording]) -> None:
    """Hear window after window of each recording, of as many recordings at a time as fit."""
    waiting = recordings
    while waiting:
        group = waiting[: transcriber.batch_size]
        windows = [(recording, recording.seek) for recording in group]
        contexts = [recording.context for recording in group]
        hypotheses = _hear(transcriber, windows, contexts, timestamps=True)
        for recording, hypothesis in zip(group, hypotheses, strict=True):
            _take(transcriber, recording, hypothesis)
        waiting = [recording for recording in waiting if recording.seek < recording.frames]


def _hear(
    transcriber: Transcriber,
    windows: Sequence[tuple[_Recording, int]],
    contexts: list[list[int]] | None = None,
    timestamps: bool | None = None,
) -> list[Hypothesis]:
    """Return the hypotheses of some windows, each given by its recording and first frame."""
    size = _window_frames(transcriber)
    features = []
    for recording, start in windows:
        window = recording.features[:, start : start + size]
        # Zeros are not silence, but what openai/whisper fills the last window with.
        features.append(functional.pad(window, (0, size - window.shape[1])))
    hypotheses = transcriber.from_encoder_states(
        transcriber.encode(torch.stack(features)),
        [recording.language for recording, _ in windows],
        previous=contexts,
        # Below 2 ** 32 is the place in the recording: each window has its own luck.
        keys=[(recording.key << 32) + start for recording, start in windows],
        timestamps=timestamps,
    )
    for (recording, _), hypothesis in zip(windows, hypotheses, strict=True):
        recording.language = hypothesis.language
    return hypotheses


def _take(transcriber: Transcriber, recording: _Recording, hypothesis: Hypothesis) -> None:
    """Add what was heard in the window at `seek`, and seek to where the next one begins."""
    frames = min(_window_frames(transcriber), recording.frames - recording.seek)
    if transcriber.is_silence(hypothesis):
        recording.parts.append(Part(hypothesis, [], complete=True))
        recording.seek += frames
        return
    first_time = transcriber.whisper.tokens.no_timestamps + 1
    sentences, advance = cut_at_timestamps(hypothesis.token_ids, first_time, frames)
    said = [
        sentence.later(recording.seek)
        for sentence in sentences
        if sentence.start < sentence.end and transcriber.text_of(sentence.ids).strip()
    ]
    # What the limit has cut off is heard again where the next window begins within this one.
    part = Part(hypothesis, said, hypothesis.complete or advance < frames)
    recording.parts.append(part)
    recording.seek += advance
    recording.context += part.ids
    options = transcriber.options
    if not options.condition_on_previous_text or hypothesis.temperature > HOTTEST_CONTEXT:
        recording.context = []


def cut_at_timestamps(
    ids: Sequence[int], first_time: int, frames: int
) -> tuple[list[Sentence], int]:
    """Return the sentences of a window, and after how many frames the next window begins.

    The rules are openai/whisper's. Two timestamps in a row end one sentence and begin the next:
    what comes after the last such pair is not whole, and is heard again from there. But a text that
    ends in one timestamp says that nothing follows, and one without pairs has no place to be cut
    at: then the next window begins where this one ends.

    Args:
        ids: what was said, with timestamps.
        first_time: the token of 0.00 s; greater ones are later.
        frames: of the window, as far as the recording goes.
    """
    is_time = [id >= first_time for id in ids]
    ends = [place for place in range(1, len(ids)) if is_time[place - 1] and is_time[place]]
    if not ends:
        times = [id - first_time for id in ids if id >= first_time]
        end = times[-1] * FRAMES_PER_STEP if times else 0
        return [Sentence(0, end or frames, tuple(ids))], frames
    nothing_follows = is_time[-2:] == [False, True]
    if nothing_follows:
        ends.append(len(ids))
    sentences = []
    for begin, end in pairwise([0, *ends]):
        start, stop = ((ids[place] - first_time) * FRAMES_PER_STEP for place in (begin, end - 1))
        sentences.append(Sentence(start, stop, tuple(ids[begin:end])))
    # A sentence without length, which the rules of timestamps forbid, must not hold us up for ever.
    return sentences, frames if nothing_follows else sentences[-1].end or frames


def _transcribe_chunks(transcriber: Transcriber, recordings: list[_Recording]) -> None:
    """Hear all chunks of all recordings, in full batches, and merge those of each recording."""
    size = _window_frames(transcriber)
    overlap = round(size * OVERLAP)
    # A chunk that has no more than what the one before it overlaps it by would tell nothing new.
    places = [
        (number, start)
        for number, recording in enumerate(recordings)
        for start in range(0, max(recording.frames - overlap, 1), size - overlap)
    ]
    # The first chunk tells the language of the others.
    first = [(n, start) for n, start in places if start == 0 and recordings[n].language is None]
    later = sorted(set(places) - set(first))
    heard: dict[tuple[int, int], Hypothesis] = {}
    for group in (
        *in_batches(first, transcriber.batch_size),
        *in_batches(later, transcriber.batch_size),
    ):
        hypotheses = _hear(transcriber, [(recordings[number], start) for number, start in group])
        heard.update(zip(group, hypotheses, strict=True))
    for number, recording in enumerate(recordings):
        chunks = [
            _chunk(transcriber, heard[place], place[1], recording.frames)
            for place in places
            if place[0] == number
        ]
        loud = loud_frames(recording.features)
        recording.parts = merged(chunks, loud, transcriber.options.timestamps)


def _chunk(transcriber: Transcriber, hypothesis: Hypothesis, start: int, frames: int) -> Chunk:
    """Return the chunk that begins at a frame of a recording of so many."""
    end = min(start + _window_frames(transcriber), frames)
    if transcriber.is_silence(hypothesis):
        return Chunk(start, end, hypothesis, [])
    first_time = transcriber.whisper.tokens.no_timestamps + 1
    found = between_timestamps(hypothesis.token_ids, first_time, end - start)
    sentences = [(s.later(start), words_of(s.ids, transcriber.text_of)) for s in found]
    return Chunk(start, end, hypothesis, sentences)


def between_timestamps(ids: Sequence[int], first_time: int, frames: int) -> list[Sentence]:
    """Return what was said between timestamps, without them.

    Args:
        ids: what was said.
        first_time: the token of 0.00 s; greater ones are later.
        frames: of the window, at whose ends sentences begin and end that have no timestamps.
    """
    sentences, words, start = [], list[int](), 0
    for id in ids:
        if id < first_time:
            words.append(id)
            continue
        now = (id - first_time) * FRAMES_PER_STEP
        if words:
            sentences.append(Sentence(start, now, tuple(words)))
            words = []
        start = now
    if words:
        sentences.append(Sentence(start, max(start, frames), tuple(words)))
    return sentences


def words_of(ids: Sequence[int], text_of: Callable[[Sequence[int]], str]) -> list[Word]:
    """Return the words of a text, which are all of its tokens in order.

    In a script without spaces a character is a word. The tokens of one character stay together:
    each of them can be less, for they are made of bytes.

    Args:
        ids: tokens of text.
        text_of: what they say.
    """
    words: list[Word] = []
    pending: list[int] = []
    for place, id in enumerate(ids, 1):
        pending.append(id)
        text = text_of(pending)
        half_a_character = text.endswith("\ufffd") and len(pending) < BYTES_OF_A_CHARACTER
        if half_a_character and place < len(ids):
            continue
        if words and _goes_on(words[-1].text, text):
            words[-1] = Word((*words[-1].ids, *pending), words[-1].text + text)
        else:
            words.append(Word(tuple(pending), text))
        pending = []
    return words


def _goes_on(word: str, text: str) -> bool:
    """Return whether a text belongs to the word before it."""
    if not text or not word.strip():
        return True
    if not text[0].isalnum():  # spaces begin words; punctuation and vowel signs do not
        return not text[0].isspace()
    return not NEVER_SPACED.match(text) and not NEVER_SPACED.match(word[-1])


def merged(chunks: Sequence[Chunk], loud: Tensor, timed: bool) -> list[Part]:
    """Return what each chunk of a recording contributes.

    Args:
        chunks: in order.
        loud: bool [F]: the loud frames of the recording.
        timed: the sentences have timestamps.
    """
    parts, first, begin = list[Part](), 0, 0
    for left, right in pairwise([*chunks, None]):
        assert left is not None
        stop, following, middle = len(left.words), 0, left.end
        if right is not None:
            within = [chunk.words_within(right.start, left.end, loud) for chunk in (left, right)]
            stop, following = seam(left.words, right.words, *within)
            middle = (right.start + left.end) // 2
        part = left.part(first, stop)
        if not timed:  # all that is known: half of an overlap is told by either neighbour
            part = replace(part, sentences=[Sentence(begin, middle, part.ids)][: len(part.ids)])
        elif parts and parts[-1].sentences and part.sentences:
            _unite(parts[-1].sentences, part.sentences)
        parts.append(part)
        first, begin = following, middle
    return parts


def _unite(before: list[Sentence], after: list[Sentence]) -> None:
    """Make one of the last and the first sentence if two chunks have heard parts of the same."""
    one, other = before[-1], after[0]
    both = min(one.end, other.end) - max(one.start, other.start)
    if both > min(one.end - one.start, other.end - other.start) / 2:
        start, end = min(one.start, other.start), max(one.end, other.end)
        before[-1] = Sentence(start, end, one.ids + other.ids)
        del after[0]


def seam(
    left: Sequence[Word], right: Sequence[Word], in_left: float, in_right: float
) -> tuple[int, int]:
    """Return how many words to keep of a chunk, and how many to leave out of the next one.

    The last words of one are the first of the other, but for what was heard differently, as it is
    at the edges. Every way to lay them over each other is looked at. What speaks for it is each
    word that meets its like, and the more the rarer it is; what speaks against it is each word by
    which it is off from where the times say. The cut is in the middle of the longest agreement.
    Where nothing speaks for any way, the times alone decide.

    Args:
        left: words of a chunk.
        right: words of the next one.
        in_left: how many of them should be in the overlap.
        in_right: likewise.
    """
    if not left or not right:
        return len(left), 0
    # The lesser, since where a model is caught in a loop it says far too much.
    expected = len(left) - min(in_left, in_right)
    counts = Counter(word.key for word in (*left, *right))
    places = defaultdict[str, list[int]](list)
    for place, word in enumerate(right):
        places[word.key].append(place)
    # By how many words `right` begins after `left`: the places of `left` that meet their like.
    meetings = defaultdict[int, list[int]](list)
    for place, word in enumerate(left):
        for other in places[word.key]:
            meetings[place - other].append(place)

    def merit(shift: int) -> float:
        return sum(2 / counts[left[i].key] for i in meetings[shift]) - abs(shift - expected)

    best = max(meetings, key=merit, default=None)
    if best is None or merit(best) <= 0:
        return len(left) - round(in_left / 2), round(in_right / 2)
    cut = _middle_of_longest_run(meetings[best])
    return cut, cut - best


def _middle_of_longest_run(places: list[int]) -> int:
    """Return the middle of the most successive numbers among some that rise."""
    runs = defaultdict[int, list[int]](list)
    for number, place in enumerate(places):
        runs[place - number].append(place)  # which is the same all along a run
    longest = max(runs.values(), key=len)
    return longest[len(longest) // 2]


def loud_frames(features: Tensor) -> Tensor:
    """Return bool [F]: where a recording, float32 [M, F], is nearer to its loudest than to silence.

    Of the words of a chunk about as many are in a part of it as of its loud frames.
    """
    loudness = features.mean(dim=0)
    quiet, loud = loudness.quantile(torch.tensor([0.05, 0.95])).tolist()
    return loudness.ge((quiet + loud) / 2)


def _whole(transcriber: Transcriber, recording: _Recording) -> Hypothesis:
    """Return the hypothesis of a recording; `transcribe_long` says what is in it."""
    every = [part.hypothesis for part in recording.parts]
    silence = [h.no_speech_probability for h in every if h.no_speech_probability is not None]
    parts = [part for part in recording.parts if part.ids] or recording.parts
    heard = [part.hypothesis for part in parts]
    weights = [max(len(part.ids), 1) for part in parts]
    weighted = sum(h.average_log_probability * w for h, w in zip(heard, weights, strict=True))
    return Hypothesis(
        text=join_texts([transcriber.text_of(part.ids) for part in parts]),
        language=every[0].language,
        token_ids=tuple(id for part in parts for id in part.ids),
        segments=tuple(
            _segment(transcriber, recording, sentence)
            for part in parts
            for sentence in part.sentences
        ),
        average_log_probability=weighted / sum(weights),
        no_speech_probability=min(silence, default=None),
        compression_ratio=max(h.compression_ratio for h in heard),
        temperature=max(h.temperature for h in heard),
        complete=all(part.complete for part in parts),
    )


def _segment(transcriber: Transcriber, recording: _Recording, sentence: Sentence) -> Segment:
    """Return a sentence with times in seconds, none of them after the end of the recording."""
    second = SAMPLE_RATE / transcriber.whisper.feature_extractor.hop_length
    start, end = (min(f, recording.frames) / second for f in (sentence.start, sentence.end))
    return Segment(round(start, 2), round(end, 2), transcriber.text_of(sentence.ids))


def _window_frames(transcriber: Transcriber) -> int:
    frames: int = transcriber.whisper.feature_extractor.nb_max_frames
    return frames
