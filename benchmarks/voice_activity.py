"""Where somebody speaks, by this project's detector and by librosa, with noise and music beneath.

    python -m benchmarks.voice_activity --manifest test.jsonl

Clips stand in one recording, all equally loud, with three seconds of nothing between them; then
noise or music is added to all of it. Missed: the share of loud frames of the clips, within 35 dB of
the loudest, that are not taken for speech. Invented: the share of the pauses, without 0.3 s at
their ends, that is. Librosa's function has no padding and joins nothing; this project's detector is
measured without both, too, and as it is by default.
"""

import argparse
from collections.abc import Callable

import librosa
import numpy as np

from benchmarks.clips import existing, spread_utterances
from simpler_distil_whisper.data.audio import SAMPLE_RATE, load_audio
from simpler_distil_whisper.data.speech_activity import FRAME, SpeechOptions, speech_spans

PAUSE = 3 * SAMPLE_RATE
EDGE = round(0.3 * SAMPLE_RATE)
LOUD_DECIBELS = 35.0
SPEECH_POWER = 0.01
SEPARATIONS = (20, 10, 5, 0)  # decibels from the speech down to what is beneath it
EXACTLY = SpeechOptions(min_silence_seconds=0.0, padding_seconds=0.0)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--manifest", type=existing, required=True)
    parser.add_argument("--clips", type=int, default=40)
    args = parser.parse_args()
    utterances = spread_utterances(args.manifest, args.clips)
    clips = [load_audio(*utterance.clip) for utterance in utterances]
    speech, is_loud, is_pause = recording_of(clips)
    detectors: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "this project": lambda sound: by_network(sound, SpeechOptions()),
        "without padding": lambda sound: by_network(sound, EXACTLY),
    }
    for decibels in (60, 30, 20):
        detectors[f"librosa, top_db {decibels}"] = lambda sound, db=decibels: by_librosa(sound, db)
    names = " | ".join(f"{name}: missed | invented" for name in detectors)
    print(f"{len(clips)} clips, {len(speech) / SAMPLE_RATE:.0f} s\n\n| beneath | {names} |")
    print("|---" * (1 + 2 * len(detectors)) + "|")
    random = np.random.default_rng(0)
    beneath = {"nothing": np.zeros_like(speech)}
    for kind, sound in (("noise", pink_noise(random, len(speech))), ("music", music(len(speech)))):
        sound *= np.sqrt(SPEECH_POWER / np.mean(sound**2))
        for decibels in SEPARATIONS:
            beneath[f"{kind}, {decibels} dB below"] = sound * 10 ** (-decibels / 20)
    for name, sound in beneath.items():
        mixed = (speech + sound).astype(np.float32)
        cells = []
        for detect in detectors.values():
            spoken = detect(mixed)
            cells += [f"{1 - spoken[is_loud].mean():.3f}", f"{spoken[is_pause].mean():.3f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def recording_of(clips: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return float32 [S], the clips with pauses; bool [F] each: loud frames, frames of pauses."""
    pieces, loud, pauses = [], [], []
    for clip in clips:
        clip = clip[: len(clip) // FRAME * FRAME]
        power = np.mean(clip.reshape(-1, FRAME) ** 2, axis=1)
        is_loud = power > power.max() * 10 ** (-LOUD_DECIBELS / 10)
        clip = clip * np.sqrt(SPEECH_POWER / power[is_loud].mean())
        pause = np.zeros(PAUSE // FRAME * FRAME, dtype=np.float32)
        inner = np.zeros(len(pause) // FRAME, dtype=bool)
        inner[EDGE // FRAME : -EDGE // FRAME] = True
        pieces += [clip, pause]
        loud += [is_loud, np.zeros_like(inner)]
        pauses += [np.zeros_like(is_loud), inner]
    return np.concatenate(pieces), np.concatenate(loud), np.concatenate(pauses)


def by_network(sound: np.ndarray, options: SpeechOptions) -> np.ndarray:
    """Return bool [F]: whether a frame is speech."""
    spans = speech_spans(sound, options)
    ends = [(span.start_seconds * SAMPLE_RATE, span.end_seconds * SAMPLE_RATE) for span in spans]
    return frames_within(np.array(ends).reshape(-1, 2), len(sound))


def by_librosa(sound: np.ndarray, decibels: float) -> np.ndarray:
    """Return bool [F]: whether a frame is louder than so many decibels below the loudest."""
    return frames_within(librosa.effects.split(sound, top_db=decibels), len(sound))


def frames_within(spans: np.ndarray, samples: int) -> np.ndarray:
    """Return bool [F]: whether the middle of a frame lies in a span, float [spans, 2]."""
    spoken = np.zeros(samples // FRAME, dtype=bool)
    for begin, end in spans:
        spoken[round(begin / FRAME) : round(end / FRAME)] = True
    return spoken


def pink_noise(random: np.random.Generator, samples: int) -> np.ndarray:
    """Return float64 [S]: noise of equal power in each octave."""
    spectrum = np.fft.rfft(random.normal(size=samples))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    return np.fft.irfft(spectrum, samples)


def music(samples: int) -> np.ndarray:
    """Return float64 [S]: plucked chords, two a second."""
    length = SAMPLE_RATE // 2
    time = np.arange(length) / SAMPLE_RATE
    chords = [(220, 277.2, 329.6), (174.6, 220, 261.6), (261.6, 329.6, 392), (196, 246.9, 293.7)]
    bars = []
    for chord in chords:
        tones = [
            np.sin(2 * np.pi * note * part * time) / part for note in chord for part in range(1, 6)
        ]
        bars += [sum(tones) * np.exp(-3 * time)] * 2
    tune = np.concatenate(bars)
    return np.tile(tune, samples // len(tune) + 1)[:samples]


if __name__ == "__main__":
    main()
