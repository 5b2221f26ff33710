"""Writes the shipped demo clips and their manifests."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from demo.acoustics import OPUS_COMPRESSION, SAMPLE_RATE
from demo.corpus import Clip, draw_clip, draw_speech, record
from demo.synthesis import draw_speaker


@dataclass(frozen=True)
class SplitPlan:
    """How many clips a split has, and how strongly its Opus files are compressed."""

    mandarin: int
    english: int
    compression: float


@dataclass(frozen=True)
class FileKind:
    """A file format with the sample rate and channels that it is written with."""

    extension: str
    rate: int
    channels: int


# The training clips are many: the stronger compression keeps the repository small.
_PLANS = {
    "train": SplitPlan(580, 190, 0.97),
    "dev": SplitPlan(44, 22, OPUS_COMPRESSION),
    "test": SplitPlan(300, 100, OPUS_COMPRESSION),
}
_OPUS = FileKind("opus", SAMPLE_RATE, 1)
# The first short clips of a split are written in these kinds instead.
_OTHER_KINDS = {
    "train": (
        FileKind("wav", 44100, 1),
        FileKind("wav", 8000, 2),
        FileKind("wav", 22050, 1),
        FileKind("wav", 8000, 1),
        FileKind("flac", 44100, 1),
        FileKind("flac", 22050, 2),
        FileKind("flac", 16000, 1),
        FileKind("flac", 8000, 1),
        FileKind("mp3", 44100, 2),
        FileKind("mp3", 44100, 1),
        FileKind("mp3", 22050, 1),
        FileKind("mp3", 16000, 1),
    ),
    "dev": (FileKind("wav", 22050, 1), FileKind("flac", 44100, 1), FileKind("mp3", 22050, 2)),
    "test": (FileKind("wav", 22050, 1), FileKind("flac", 22050, 1), FileKind("mp3", 44100, 1)),
}
_SHORT_SECONDS = 2.0
_LONG_RECORDINGS = {"zh": ("audio/long.opus", 60.0), "en": ("audio/long-en.opus", 30.0)}
_SESSION_SECONDS = 60.0


def write_split(split: str, folder: Path) -> None:
    """Writes the manifest of a split and its clips."""
    plan, rng = _PLANS[split], random.Random(f"{split} clips")
    rows = write_clips(split, folder, plan, rng, _OTHER_KINDS[split])
    if split == "train":
        rows += _write_session(folder, plan.compression)
    write_manifest(folder / f"{split}.jsonl", rows)


def write_clips(
    split: str,
    folder: Path,
    plan: SplitPlan,
    rng: random.Random,
    other_kinds: Sequence[FileKind] = (),
) -> list[dict[str, Any]]:
    """Writes clips of a split, each with a text of its own; returns the rows of their manifest.

    The first short clips are written in the other kinds, the others as Opus.
    """
    languages = ["zh"] * plan.mandarin + ["en"] * plan.english
    rng.shuffle(languages)
    kinds = list(other_kinds)
    texts: set[str] = set()
    rows = []
    for number, language in enumerate(languages, start=1):
        clip = draw_clip(language, split, rng)
        while clip.segments[0].text in texts:
            clip = draw_clip(language, split, rng)
        texts.add(clip.segments[0].text)
        short = len(clip.waveform) < _SHORT_SECONDS * SAMPLE_RATE
        kind = kinds.pop(0) if short and kinds else _OPUS
        audio = f"audio/{split}/{number:04d}.{kind.extension}"
        write_audio(folder / audio, clip.waveform, kind, plan.compression)
        rows.append(
            {
                "id": f"{split}-{language}-{number:04d}",
                "audio": audio,
                "text": clip.segments[0].text,
                "language": language,
                "speaker": clip.speaker,
            }
        )
    return rows


def write_audio(path: Path, waveform: np.ndarray, kind: FileKind, compression: float) -> None:
    """Writes a waveform at 16 kHz as a file of some kind; stereo has the right channel lower."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = soxr.resample(waveform, SAMPLE_RATE, kind.rate)
    if kind.channels == 2:
        samples = np.stack([samples, 0.7 * samples], axis=1)
    samples = np.clip(samples, -1.0, 1.0)
    if kind.extension == "opus":
        options = {"format": "OGG", "subtype": "OPUS", "compression_level": compression}
        soundfile.write(path, samples, kind.rate, **options)
    else:
        soundfile.write(path, samples, kind.rate)


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes one JSON object per line."""
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _record_long(language: str, split: str, seconds: float, rng: random.Random) -> Clip:
    """Returns a recording of sentences by one speaker, at least so many seconds long."""
    speaker = draw_speaker(language, split, rng)
    speeches, length = [], 0.0
    while length < seconds:
        speeches.append(draw_speech(language, split, speaker, rng))
        # The mean gap that record() leaves is 0.35 s.
        length += speeches[-1].boundaries[-1] + 0.35
    return record(speeches, speaker, rng)


def _write_session(folder: Path, compression: float) -> list[dict[str, Any]]:
    """A recording whose sentences are addressed by their time, one row each."""
    clip = _record_long("zh", "train", _SESSION_SECONDS, random.Random("train session"))
    audio = "audio/train/session.opus"
    write_audio(folder / audio, clip.waveform, _OPUS, compression)
    rows = []
    for number, segment in enumerate(clip.segments, start=1):
        # The shortest gap is 0.1 s: half of it on either side.
        start = round(segment.start - 0.05, 2)
        rows.append(
            {
                "id": f"train-zh-session-{number:02d}",
                "audio": audio,
                "text": segment.text,
                "language": "zh",
                "speaker": clip.speaker,
                "start_seconds": start,
                "duration_seconds": round(segment.end + 0.05 - start, 2),
            }
        )
    return rows


def write_long_recordings(folder: Path) -> None:
    """Writes recordings of many test sentences, each with its whole transcript in one row."""
    rows = []
    for language, (audio, seconds) in _LONG_RECORDINGS.items():
        clip = _record_long(language, "test", seconds, random.Random(f"{language} long"))
        write_audio(folder / audio, clip.waveform, _OPUS, OPUS_COMPRESSION)
        space = " " if language == "en" else ""
        rows.append(
            {
                "id": f"long-{language}",
                "audio": audio,
                "text": space.join(segment.text for segment in clip.segments),
                "language": language,
                "speaker": clip.speaker,
            }
        )
    write_manifest(folder / "long.jsonl", rows)


def write_bad_rows(folder: Path) -> None:
    """Writes a manifest in which some rows are good and every other one has its own fault."""
    audio = folder / "audio" / "bad"
    audio.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    noise = (0.1 * rng.standard_normal(SAMPLE_RATE)).astype(np.float32)
    (audio / "no-bytes.wav").write_bytes(b"")
    (audio / "random-bytes.opus").write_bytes(rng.bytes(2000))
    soundfile.write(audio / "no-samples.wav", noise[:0], SAMPLE_RATE)
    soundfile.write(audio / "too-short.wav", noise[:400], SAMPLE_RATE)
    with_nan = noise[:4000].copy()
    with_nan[1000:1010] = np.nan
    soundfile.write(audio / "nan-samples.wav", with_nan, SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(audio / "truncated.flac", noise, SAMPLE_RATE)
    whole = (audio / "truncated.flac").read_bytes()
    (audio / "truncated.flac").write_bytes(whole[: len(whole) // 3])
    manifest = (folder / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    good = [json.loads(line) for line in manifest[:3]]
    write_manifest(folder / "bad_rows.jsonl", [*good[:2], *_bad_rows(good[0]["text"]), good[2]])
    with (folder / "bad_rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "invalid-json", "audio": "audio/bad/too-short.wav", "text": "未完\n')


def _bad_rows(text: str) -> list[dict[str, Any]]:
    files = (
        "missing.wav",
        "no-bytes.wav",
        "random-bytes.opus",
        "truncated.flac",
        "no-samples.wav",
        "nan-samples.wav",
        "too-short.wav",
    )
    common = {"text": text, "language": "zh", "speaker": "none"}
    rows: list[dict[str, Any]] = [
        {"id": Path(name).stem, "audio": f"audio/bad/{name}", **common} for name in files
    ]
    session: dict[str, Any] = {"audio": "audio/train/session.opus", **common}
    rows += [
        {"id": "too-long", **session, "start_seconds": 1.0, "duration_seconds": 45.0},
        {"id": "beyond-the-end", **session, "start_seconds": 500.0, "duration_seconds": 2.0},
        {"id": "no-audio-key", **common},
        {"id": "empty-text", **session, "text": "", "start_seconds": 1.0, "duration_seconds": 2.0},
    ]
    return rows


def main() -> None:
    """Writes all clips and manifests."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path, help="the demo data folder")
    args = parser.parse_args()
    for split in _PLANS:
        write_split(split, args.output)
    write_long_recordings(args.output)
    write_bad_rows(args.output)


if __name__ == "__main__":
    main()
