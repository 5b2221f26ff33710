"""The clips of a manifest that a benchmark is run on."""

from pathlib import Path

from simpler_distil_whisper.data.manifest import Utterance, read_manifest
from simpler_distil_whisper.data.options import Columns


def spread_utterances(manifest: Path, count: int) -> list[Utterance]:
    """Return at most `count` utterances, evenly spread over a manifest."""
    utterances = list(read_manifest(manifest, Columns()).utterances)
    return utterances[:: max(1, len(utterances) // count)][:count]
