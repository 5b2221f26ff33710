"""Speech synthesis with espeak-ng, called in-process, with the start time of every word.

espeak-ng comes from the PyPI package espeakng-loader, a self-contained library with its voices.
"""

from __future__ import annotations

import ctypes
import functools
import random
from dataclasses import dataclass

import espeakng_loader
import numpy as np
import soxr

from demo.acoustics import SAMPLE_RATE
from demo.grammar import Sentence

# Voice variants of espeak-ng: the speakers. The splits share none. Whispering and robot voices
# are left out.
_VOICES = {
    "train": (
        "Alex adam Andrea Andy antonio aunty belinda benjamin boris caleb david Denis Diogo ed "
        "edward2 Gene gustave Henrique Hugo iven iven2 iven4 Jacky john kaukovalta klatt klatt4 "
        "m1 m2 m3 m4 m6 m7 f1 f3 f5 marcelo Marco Mario max Michael miguel Mike Nguyen norbert "
        "paul pedro quincy robert sandro shelby steph steph3 victor zac anika"
    ),
    "dev": "Alicia f2 m8 travis iven3 klatt2 edward rob",
    "test": "Annie f4 Michel steph2 m5 klatt3 Pablo Lee gene2 linda",
}
_ENGLISH_ACCENTS = {
    "train": ("en-us", "en", "en-gb-scotland", "en-us-nyc"),
    "dev": ("en-gb-x-rp", "en-us"),
    "test": ("en-gb-x-rp", "en-us"),
}
_MANDARIN_VOICE = "cmn-latn-pinyin"
_WORDS_PER_MINUTE = {"zh": (165, 255), "en": (140, 210)}

_OUTPUT_SYNCHRONOUS = 2
_CHARACTERS_UTF8 = 1
_PARAMETER_RATE, _PARAMETER_PITCH, _PARAMETER_RANGE = 1, 3, 4
_EVENT_LIST_END, _EVENT_WORD = 0, 1


class _Event(ctypes.Structure):
    """The espeak_EVENT structure of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


@dataclass(frozen=True)
class Speaker:
    """A synthesizer voice with its pitch and tempo.

    Attributes:
        voice: espeak-ng voice, such as "en-us+m1".
        rate: Words per minute.
        pitch: 0 to 99.
        pitch_range: 0 to 99.
        resampling: Factor by which pitch, formants and tempo are raised together.
    """

    voice: str
    rate: int
    pitch: int
    pitch_range: int
    resampling: float

    @property
    def name(self) -> str:
        """The voice without the Mandarin language code that all Mandarin voices share."""
        return self.voice.removeprefix(f"{_MANDARIN_VOICE}+")


@dataclass(frozen=True)
class Speech:
    """Clean speech of one sentence.

    Attributes:
        sentence: What is spoken.
        waveform: Samples at 16 kHz, without leading and trailing silence.
        boundaries: Start seconds of every unit, then the end of the last one.
    """

    sentence: Sentence
    waveform: np.ndarray
    boundaries: tuple[float, ...]


def draw_speaker(language: str, split: str, rng: random.Random) -> Speaker:
    """Draws one of the split's speakers for a language."""
    accent = _MANDARIN_VOICE if language == "zh" else rng.choice(_ENGLISH_ACCENTS[split])
    return Speaker(
        voice=f"{accent}+{rng.choice(_VOICES[split].split())}",
        rate=int(rng.uniform(*_WORDS_PER_MINUTE[language])),
        pitch=int(rng.uniform(25, 75)),
        pitch_range=int(rng.uniform(35, 75)),
        resampling=rng.uniform(0.9, 1.12),
    )


def speak(sentence: Sentence, speaker: Speaker) -> Speech | None:
    """Synthesizes a sentence, or returns None where the word events do not match the units."""
    synthesizer = _synthesizer()
    samples, events = synthesizer.synthesize(sentence.pronunciation, speaker)
    seconds = len(samples) / synthesizer.sample_rate
    starts = _unit_starts(sentence.pronunciation, events, seconds)
    if starts is None:
        return None
    rate = synthesizer.sample_rate * speaker.resampling
    waveform = soxr.resample(samples, rate, SAMPLE_RATE, quality="MQ")
    loud = np.flatnonzero(np.abs(waveform) > 0.01)
    if not loud.size:
        return None
    begin, end = max(0, int(loud[0]) - 200), int(loud[-1])
    boundaries = [max(0.0, s / speaker.resampling - begin / SAMPLE_RATE) for s in starts]
    boundaries.append((end - begin) / SAMPLE_RATE)
    return Speech(sentence, waveform[begin : end + 400], tuple(boundaries))


def _unit_starts(
    pronunciation: str, events: list[tuple[int, float]], seconds: float
) -> list[float] | None:
    """Start time of every word; words that espeak-ng joined ("on the") share their time evenly."""
    positions = [1]
    for word in pronunciation.split(" ")[:-1]:
        positions.append(positions[-1] + len(word) + 1)
    known = dict(events)
    known.setdefault(positions[0], 0.0)
    timed = [k for k, position in enumerate(positions) if position in known]
    # A position that belongs to no word means that the event list cannot be trusted.
    if len(timed) != len(known):
        return None
    times = [known[positions[k]] for k in timed]
    return np.interp(range(len(positions)), [*timed, len(positions)], [*times, seconds]).tolist()


class _Synthesizer:
    """The espeak-ng library, which is a singleton with callbacks."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate = self._library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 500, data, 0)
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak-ng does not start with the data in {data.decode()}")
        self._chunks: list[np.ndarray] = []
        self._events: list[tuple[int, float]] = []
        signature = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
        )
        # Kept as an attribute: the library holds only a pointer to it.
        self._callback = signature(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer, count: int, events: ctypes._Pointer) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != _EVENT_LIST_END:
            event = events[index]
            # The library closes an utterance with a word event at position 0.
            if event.type == _EVENT_WORD and event.text_position > 0:
                self._events.append((event.text_position, event.sample / self.sample_rate))
            index += 1
        return 0

    def synthesize(
        self, pronunciation: str, speaker: Speaker
    ) -> tuple[np.ndarray, list[tuple[int, float]]]:
        """Returns the waveform and the (text position, seconds) of the word events."""
        self._chunks.clear()
        self._events.clear()
        library = self._library
        if library.espeak_SetVoiceByName(speaker.voice.encode()):
            raise ValueError(f"espeak-ng has no voice {speaker.voice!r}")
        library.espeak_SetParameter(_PARAMETER_RATE, speaker.rate, 0)
        library.espeak_SetParameter(_PARAMETER_PITCH, speaker.pitch, 0)
        library.espeak_SetParameter(_PARAMETER_RANGE, speaker.pitch_range, 0)
        text = pronunciation.encode()
        library.espeak_Synth(text, len(text) + 1, 0, 0, 0, _CHARACTERS_UTF8, None, None)
        library.espeak_Synchronize()
        samples = np.concatenate(self._chunks).astype(np.float32) / 32768
        return samples, list(self._events)


@functools.cache
def _synthesizer() -> _Synthesizer:
    return _Synthesizer()
