"""The content of `speed.json`: how fast a system has transcribed, and how large it is.

Owns the sums over batches, the rounding and the keys. It measures nothing and knows no model:
offline inference and the check of exported models give it their figures.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from simpler_distil_whisper.atomic import write_atomically

SPEED = "speed.json"


@dataclass(frozen=True)
class SpeedReport:
    """The keys of `speed.json` that every system has, in order.

    Attributes:
        rtfx: seconds of audio per second of computing, the inverse of the real-time factor; None
            if nothing was computed.
        tokens_per_second: new tokens per second of computing; None if nothing was computed.
        audio_seconds: of all utterances together.
        compute_seconds: of the slowest process; audio decoding runs beside it and is not counted.
        utterances: how many were transcribed.
        tokens: how many were decoded, without end tokens.
        batch_size: of each process.
        processes: how many worked side by side.
        parameters: of the model.
        peak_memory_megabytes: of the first process; None if it was not measured.
        model_bytes: size of the weights on disk.
    """

    rtfx: float | None
    tokens_per_second: float | None
    audio_seconds: float
    compute_seconds: float
    utterances: int
    tokens: int
    batch_size: int
    processes: int
    parameters: int
    peak_memory_megabytes: int | None
    model_bytes: int


@dataclass
class Speed:
    """Sums over the utterances that one process, or all of them, have transcribed."""

    utterances: int = 0
    audio_seconds: float = 0.0
    compute_seconds: float = 0.0
    tokens: int = 0

    def add(
        self, audio_seconds: Sequence[float], compute_seconds: float, tokens: Iterable[int]
    ) -> None:
        """Count one batch: the audio and the tokens of each utterance, and the time for all."""
        self.utterances += len(audio_seconds)
        self.audio_seconds += sum(audio_seconds)
        self.compute_seconds += compute_seconds
        self.tokens += sum(tokens)

    def report(
        self,
        *,
        batch_size: int,
        processes: int,
        parameters: int,
        peak_memory_megabytes: int | None,
        model_bytes: int,
    ) -> SpeedReport:
        """Return the sums and the ratios, rounded, with what is known of the system."""
        compute = self.compute_seconds
        return SpeedReport(
            rtfx=round(self.audio_seconds / compute, 2) if compute else None,
            tokens_per_second=round(self.tokens / compute, 1) if compute else None,
            audio_seconds=round(self.audio_seconds, 3),
            compute_seconds=round(compute, 3),
            utterances=self.utterances,
            tokens=self.tokens,
            batch_size=batch_size,
            processes=processes,
            parameters=parameters,
            peak_memory_megabytes=peak_memory_megabytes,
            model_bytes=model_bytes,
        )


def speed_side_by_side(processes: Sequence[Speed]) -> Speed:
    """Return the speed of processes that worked at the same time: the slowest one decides."""
    return Speed(
        utterances=sum(speed.utterances for speed in processes),
        audio_seconds=sum(speed.audio_seconds for speed in processes),
        compute_seconds=max(speed.compute_seconds for speed in processes),
        tokens=sum(speed.tokens for speed in processes),
    )


def speed_of_shards(folders: Iterable[Path], own: SpeedReport) -> SpeedReport:
    """Return the speed of jobs side by side, whose `speed.json` are in these folders."""
    reports = [json.loads((folder / SPEED).read_bytes()) for folder in folders]
    sums = [field.name for field in fields(Speed)]
    speeds = [Speed(**{name: report[name] for name in sums}) for report in reports]
    return speed_side_by_side(speeds).report(
        batch_size=own.batch_size,
        processes=sum(report["processes"] for report in reports),
        parameters=own.parameters,
        peak_memory_megabytes=own.peak_memory_megabytes,
        model_bytes=own.model_bytes,
    )


def write_speed(folder: Path, report: SpeedReport, more: Mapping[str, object]) -> None:
    """Write `speed.json`; `more` are the keys that only this kind of system has."""
    content = json.dumps({**asdict(report), **more}, indent=2)
    write_atomically(folder / SPEED, content.encode())
