"""The clips that a benchmark is run on: of a manifest, or noise."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile

from simpler_distil_whisper.data.audio import SAMPLE_RATE
from simpler_distil_whisper.data.manifest import Utterance, read_manifest
from simpler_distil_whisper.data.options import Columns


def existing(name: str) -> Path:
    """Return the path that an option names; else the command ends before it has begun."""
    if not (path := Path(name)).exists():
        raise argparse.ArgumentTypeError(f"no such file or folder: {name}")
    return path


def spread_utterances(manifest: Path, count: int) -> list[Utterance]:
    """Return at most `count` utterances, evenly spread over a manifest."""
    utterances = list(read_manifest(manifest, Columns()).utterances)
    return utterances[:: max(1, len(utterances) // count)][:count]


def write_noise(folder: Path, lengths: Iterable[float]) -> list[Path]:
    """Write clips of noise of so many seconds."""
    noise, paths = np.random.default_rng(0), []
    for number, seconds in enumerate(lengths):
        paths.append(folder / f"noise-{number}.wav")
        samples = noise.normal(0, 0.1, round(seconds * SAMPLE_RATE))
        soundfile.write(paths[-1], samples, SAMPLE_RATE)
    return paths
