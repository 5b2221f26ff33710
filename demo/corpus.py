"""The clips that the teacher is trained on, and the shards of features that it is trained on."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperProcessor

from demo.acoustics import SAMPLE_RATE, background_noise, opus_round_trip, set_level, transmit
from demo.grammar import draw_sentence
from demo.synthesis import Speaker, Speech, draw_speaker, speak
from demo.tokenizer import WINDOW_SECONDS, build_processor

WINDOW_SAMPLES = WINDOW_SECONDS * SAMPLE_RATE
MEL_FRAMES_PER_SECOND = 100
ENCODER_FRAMES_PER_SECOND = 50
_MANDARIN_SHARE = 0.68
_SILENCE_SHARE = 0.03
_TWO_SENTENCES_SHARE = 0.08
_CODEC_SHARE = 0.05
_SENTENCES_PER_RECORDING = (3, 9)
_RECORDING_CODEC_SHARE = 0.15


@dataclass(frozen=True)
class Segment:
    """A sentence in a clip, with its seconds.

    Attributes:
        text: Transcript.
        start: Second where it begins.
        end: Second where it ends.
        boundaries: Start seconds of its units, then the end of the last one.
        cut: Whether the window ends before it does.
    """

    text: str
    start: float
    end: float
    boundaries: tuple[float, ...]
    cut: bool = False


@dataclass(frozen=True)
class Clip:
    """A recording with the sentences that are spoken in it.

    Attributes:
        waveform: Samples at 16 kHz.
        language: "zh" or "en".
        speaker: Name of the voice.
        segments: Sentences in their order; none in silence.
        units: Characters or words with their start and end seconds.
    """

    waveform: np.ndarray
    language: str
    speaker: str
    segments: tuple[Segment, ...]
    units: tuple[tuple[str, float, float], ...]


def draw_speech(language: str, split: str, speaker: Speaker, rng: random.Random) -> Speech:
    """Draws and speaks a sentence of the split."""
    while True:
        speech = speak(draw_sentence(language, split, rng), speaker)
        if speech is not None:
            return speech


def draw_clip(language: str, split: str, rng: random.Random) -> Clip:
    """Draws a recording of one sentence that fits the window."""
    while True:
        speaker = draw_speaker(language, split, rng)
        clip = record([draw_speech(language, split, speaker, rng)], speaker, rng)
        if len(clip.waveform) <= WINDOW_SAMPLES:
            return clip


def record(speeches: list[Speech], speaker: Speaker, rng: random.Random) -> Clip:
    """Joins sentences of one speaker with short gaps, in one room with one noise."""
    pieces: list[np.ndarray] = []
    segments: list[Segment] = []
    units: list[tuple[str, float, float]] = []
    length = 0
    for speech in speeches:
        if pieces:
            pieces.append(np.zeros(int(rng.uniform(0.1, 0.6) * SAMPLE_RATE), np.float32))
            length += len(pieces[-1])
        times = [length / SAMPLE_RATE + seconds for seconds in speech.boundaries]
        segments.append(_segment(speech.sentence.text, times))
        units += zip(speech.sentence.units, times[:-1], times[1:], strict=True)
        pieces.append(speech.waveform)
        length += len(speech.waveform)
    generator = np.random.default_rng(rng.getrandbits(64))
    waveform, lead = transmit(np.concatenate(pieces), generator)
    return Clip(
        waveform,
        speeches[0].sentence.language,
        speaker.name,
        tuple(_segment(s.text, [time + lead for time in s.boundaries]) for s in segments),
        tuple((unit, start + lead, end + lead) for unit, start, end in units),
    )


def _segment(text: str, boundaries: list[float]) -> Segment:
    return Segment(text, boundaries[0], boundaries[-1], boundaries=tuple(boundaries))


def _draw_silence(language: str, rng: random.Random) -> Clip:
    generator = np.random.default_rng(rng.getrandbits(64))
    noise = background_noise(int(rng.uniform(0.3, WINDOW_SECONDS) * SAMPLE_RATE), generator)
    waveform = set_level(noise, generator) * np.float32(10 ** -rng.uniform(0, 2))
    return Clip(waveform, language, "noise", (), ())


def _draw_two_sentences(language: str, split: str, rng: random.Random) -> Clip:
    """A window of two sentences; the second may be cut by the end of the window."""
    while True:
        speaker = draw_speaker(language, split, rng)
        clip = record([draw_speech(language, split, speaker, rng) for _ in range(2)], speaker, rng)
        if clip.segments[1].start < WINDOW_SECONDS - 0.2:
            return _cut(clip)


def _cut(clip: Clip) -> Clip:
    segments = [replace(s, cut=s.end >= WINDOW_SECONDS) for s in clip.segments]
    units = tuple(unit for unit in clip.units if unit[2] <= WINDOW_SECONDS)
    waveform = clip.waveform[:WINDOW_SAMPLES]
    return Clip(waveform, clip.language, clip.speaker, tuple(segments), units)


def draw_training_clip(two_sentences: float, rng: random.Random) -> Clip:
    """Draws a clip of the training mixture, with a given share of two-sentence windows."""
    language = "zh" if rng.random() < _MANDARIN_SHARE else "en"
    kind = rng.random()
    if kind < _SILENCE_SHARE:
        clip = _draw_silence(language, rng)
    elif kind < _SILENCE_SHARE + two_sentences:
        clip = _draw_two_sentences(language, "train", rng)
    else:
        clip = draw_clip(language, "train", rng)
    return with_codec(clip) if rng.random() < _CODEC_SHARE else clip


def draw_recording(split: str, rng: random.Random) -> Clip:
    """Draws several sentences of one speaker, from which training cuts its windows."""
    language = "zh" if rng.random() < _MANDARIN_SHARE else "en"
    speaker = draw_speaker(language, split, rng)
    count = rng.randint(*_SENTENCES_PER_RECORDING)
    clip = record([draw_speech(language, split, speaker, rng) for _ in range(count)], speaker, rng)
    return with_codec(clip) if rng.random() < _RECORDING_CODEC_SHARE else clip


def with_codec(clip: Clip) -> Clip:
    """Returns the clip as it sounds after the coding of the shipped clips."""
    waveform = opus_round_trip(clip.waveform)
    return Clip(waveform, clip.language, clip.speaker, clip.segments, clip.units)


def write_shard(path: Path, clips: list[Clip], processor: WhisperProcessor) -> None:
    """Writes the features and frame labels of clips, cropped to their length, and their texts."""
    features, labels, rows = [], [], []
    start = 0
    for clip in clips:
        mel = _log_mel(clip, processor)
        frames = _frame_count(clip, mel.shape[1])
        features.append(mel[:, :frames].T.astype(np.float16))
        labels.append(_frame_labels(clip, frames // 2, processor))
        segments = [asdict(segment) for segment in clip.segments]
        # The level of digital silence depends on the loudest frame of the clip.
        rows.append(
            {
                "start": start,
                "frames": frames,
                "silence": float(mel.min()),
                "language": clip.language,
                "segments": segments,
            }
        )
        start += frames
    path.mkdir(parents=True, exist_ok=True)
    np.save(path / "features.npy", np.concatenate(features))
    np.save(path / "labels.npy", np.concatenate(labels))
    # Written last: its presence means that the shard is complete.
    (path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def _log_mel(clip: Clip, processor: WhisperProcessor) -> np.ndarray:
    """Log-mel features, (80, frames): of the padded window, or of all of a longer recording."""
    samples = len(clip.waveform)
    samples = WINDOW_SAMPLES if samples <= WINDOW_SAMPLES else samples + SAMPLE_RATE // 10
    return processor.feature_extractor(
        clip.waveform, sampling_rate=SAMPLE_RATE, return_tensors="np", max_length=samples
    ).input_features[0]


def _frame_count(clip: Clip, limit: int) -> int:
    """Mel frames up to the end of the clip and of the analysis windows that reach into it."""
    frames = len(clip.waveform) * MEL_FRAMES_PER_SECOND // SAMPLE_RATE + 4
    return min(limit, frames // 2 * 2)


def _frame_labels(clip: Clip, count: int, processor: WhisperProcessor) -> np.ndarray:
    """The token that is spoken in each encoder frame, <|endoftext|> where there is none."""
    tokenizer = processor.tokenizer
    labels = np.full(count, tokenizer.eos_token_id, np.int16)
    for unit, start, end in clip.units:
        tokens = tokenizer(unit, add_special_tokens=False).input_ids
        bounds = np.linspace(start, end, len(tokens) + 1) * ENCODER_FRAMES_PER_SECOND
        for token, low, high in zip(tokens, bounds[:-1], bounds[1:], strict=True):
            labels[int(low) : max(int(low) + 1, int(high))] = token
    return labels


def main() -> None:
    """Synthesizes one training shard, or the development shard."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path, help="folder of the shard")
    parser.add_argument("--split", choices=("train", "dev"), default="train")
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0, help="another one for every shard")
    parser.add_argument("--two-sentences", type=float, default=_TWO_SENTENCES_SHARE)
    parser.add_argument("--recordings", action="store_true", help="several sentences per clip")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kind = "recordings" if args.recordings else "shard"
    rng = random.Random(f"{args.split} {kind} {args.seed}")
    if args.recordings:
        clips = [draw_recording(args.split, rng) for _ in range(args.clips)]
    elif args.split == "train":
        clips = [draw_training_clip(args.two_sentences, rng) for _ in range(args.clips)]
    else:
        languages = [("zh", "zh", "en")[k % 3] for k in range(args.clips)]
        clips = [with_codec(draw_clip(language, "dev", rng)) for language in languages]
    write_shard(args.output, clips, build_processor())
    print(f"{args.output}: {sum(len(c.waveform) for c in clips) / SAMPLE_RATE / 3600:.2f} hours")


if __name__ == "__main__":
    main()
