"""Whether an exported model still gives the same texts, clip by clip, as the model it was made of.

Owns the clips, the counts and the tables. The systems that transcribe the clips are given to it.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.data.audio import SAMPLE_RATE, AudioError, load_audio
from simpler_distil_whisper.data.jsonl import to_line
from simpler_distil_whisper.data.manifest import (
    Rejection,
    Utterance,
    refuse_vanished,
    reject_audio,
)
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.decoding.speed import Speed, write_speed
from simpler_distil_whisper.evaluation.intervals import bootstrap_interval
from simpler_distil_whisper.evaluation.metrics import Scorer, total
from simpler_distil_whisper.progress import Progress
from simpler_distil_whisper.run import DataError, Run

HYPOTHESIS = "hypothesis"  # the column, as offline inference calls it
SHORTEST_SECONDS = 0.1


class Transcript(NamedTuple):
    """What a system makes of one clip.

    Attributes:
        text: without special tokens.
        language: its code, as given or detected.
        tokens: how many were decoded.
    """

    text: str
    language: str
    tokens: int


# float32 [S] each, mono, 16 kHz, and their languages (None: to be detected) -> a transcript each.
TranscribeBatch = Callable[[Sequence[np.ndarray], Sequence[str | None]], list[Transcript]]


@dataclass(frozen=True)
class System:
    """A loaded model that transcribes, greedily and without timestamps.

    Attributes:
        library: the program that runs it, with its version.
        compute_type: what it computes in, which need not be what its weights are stored in.
        batch_size: how many clips it is given at once.
        weight_bytes: the size of its weights on disk.
        transcribe: transcribes one batch.
    """

    library: str
    compute_type: str
    batch_size: int
    weight_bytes: int
    transcribe: TranscribeBatch


class Transcription(NamedTuple):
    """The transcripts of all clips by one system, and how fast it was."""

    system: System
    transcripts: list[Transcript]
    speed: Speed


def usable_clips(
    utterances: Iterable[Utterance], window_seconds: float
) -> tuple[list[Utterance], list[Rejection]]:
    """Return the utterances whose audio can be decoded and fits into the window, and the others.

    Raises:
        DataError: audio has vanished since the manifest was read.
    """
    clips, rejections = [], []
    for utterance in utterances:
        try:
            load_audio(*utterance.clip, min_seconds=SHORTEST_SECONDS, max_seconds=window_seconds)
            clips.append(utterance)
        except AudioError as error:
            rejections.append(reject_audio(utterance, error))
    refuse_vanished(rejections)
    return clips, rejections


def _load(clip: Utterance) -> np.ndarray:
    """Return float32 [S]: the waveform of a clip that could be decoded before."""
    try:
        return load_audio(*clip.clip)
    except AudioError as error:
        rejection = reject_audio(clip, error)
        refuse_vanished([rejection])
        raise DataError(f"{clip.place}: {rejection.reason}, though it could be read") from None


def transcribe(
    name: str,
    system: System,
    clips: Sequence[Utterance],
    languages: Sequence[str | None],
    run: Run,
) -> Transcription:
    """Return a system's transcripts of the clips; its first clip is decoded twice, as a warm-up.

    Raises:
        DataError: the audio of a clip has vanished or changed.
    """
    size = system.batch_size
    transcripts: list[Transcript] = []
    speed = Speed()
    system.transcribe([_load(clips[0])], languages[:1])
    with Progress(f"{name} transcribes", "clips", len(clips)) as progress:
        for start in range(0, len(clips), size):
            run.stop_if_asked()
            waveforms = [_load(clip) for clip in clips[start : start + size]]
            started = time.perf_counter()
            batch = system.transcribe(waveforms, languages[start : start + size])
            elapsed = time.perf_counter() - started
            seconds = [len(waveform) / SAMPLE_RATE for waveform in waveforms]
            speed.add(seconds, elapsed, [transcript.tokens for transcript in batch])
            transcripts += batch
            progress.advance(len(waveforms))
    return Transcription(system, transcripts, speed)


def write_hypotheses(
    folder: Path,
    clips: Sequence[Utterance],
    transcription: Transcription,
    columns: Columns,
    parameters: int,
) -> None:
    """Write `hypotheses.jsonl` and `speed.json`, as offline inference does, for `eval.py`."""
    system, transcripts, speed = transcription
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for clip, transcript in zip(clips, transcripts, strict=True):
        row = clip.row | {columns.audio: str(clip.audio), HYPOTHESIS: transcript.text}
        if columns.language and clip.language is None:
            row[columns.language] = transcript.language
        lines.append(to_line(row))
    write_atomically(folder / "hypotheses.jsonl", "".join(lines).encode())
    report = speed.report(
        batch_size=system.batch_size,
        processes=1,
        parameters=parameters,
        peak_memory_megabytes=None,
        model_bytes=system.weight_bytes,
    )
    more = {"library": system.library, "compute_type": system.compute_type}
    write_speed(folder, report, more)


@dataclass(frozen=True)
class SystemReport:
    """How one system did: a row of the table.

    Attributes:
        library: the program that ran it, with its version.
        compute_type: what it computed in.
        weight_bytes: its size on disk.
        compression: how many times smaller that is than the original's.
        rtfx: seconds of audio per second of computing.
        error_rate, low, high: against the references, with its 95 % interval; None where unknown.
        identical: how many of its texts are the very texts of the original.
        clips: how many clips there are.
        difference: its error rate when the original's texts are the references.
        verified: whether it gives the original's texts; None: quantised, so it need not.
    """

    library: str
    compute_type: str
    weight_bytes: int
    compression: float
    rtfx: float
    error_rate: float | None
    low: float | None
    high: float | None
    identical: int
    clips: int
    difference: float | None
    verified: bool | None


def report_on(
    transcription: Transcription,
    original: Transcription,
    clips: Sequence[Utterance],
    scorer: Scorer,
    max_different: float | None,
) -> SystemReport:
    """Return how a system does beside the original.

    Args:
        transcription: the system's.
        original: that of the model it was made of.
        clips: what both have transcribed.
        scorer: counts errors.
        max_different: the largest share of clips in which its texts may differ; None: any.
    """
    system, transcripts, speed = transcription
    pairs = list(zip(original.transcripts, transcripts, strict=True))
    identical = sum(ours.text == theirs.text for ours, theirs in pairs)
    errors = [
        scorer.count(clip.text, transcript.text, transcript.language)
        for clip, transcript in zip(clips, transcripts, strict=True)
        if clip.text is not None
    ]
    differences = [scorer.count(ours.text, theirs.text, ours.language) for ours, theirs in pairs]
    low, high = bootstrap_interval(errors) or (None, None)
    verified = None
    if max_different is not None:
        verified = len(pairs) - identical <= max_different * len(pairs)
    return SystemReport(
        library=system.library,
        compute_type=system.compute_type,
        weight_bytes=system.weight_bytes,
        compression=original.system.weight_bytes / system.weight_bytes,
        rtfx=speed.audio_seconds / speed.compute_seconds,
        error_rate=total(errors).rate,
        low=low,
        high=high,
        identical=identical,
        clips=len(pairs),
        difference=total(differences).rate,
        verified=verified,
    )


def as_json(reports: dict[str, SystemReport], facts: dict[str, object]) -> str:
    """Return the content of `exports.json`."""
    systems = {
        name: {
            key: round(value, 6) if isinstance(value, float) else value
            for key, value in asdict(report).items()
        }
        for name, report in reports.items()
    }
    return json.dumps({**facts, "systems": systems}, ensure_ascii=False, indent=2) + "\n"


def as_table(reports: dict[str, SystemReport]) -> str:
    """Return the content of `exports.md`: a Markdown table that can also be read as it is."""
    header = [
        "system",
        "run by",
        "computes in",
        "MB",
        "compression",
        "CER/WER (95 % interval)",
        "texts as the original's",
        "difference",
        "times real time",
    ]
    rows = [_table_row(name, report) for name, report in reports.items()]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in [header, rule, *rows]]
    return "".join(f"| {line} |\n" for line in lines)


def _table_row(name: str, report: SystemReport) -> list[str]:
    return [
        f"{name} UNVERIFIED" if report.verified is False else name,
        report.library,
        report.compute_type,
        f"{report.weight_bytes / 1e6:.2f}",
        f"{report.compression:.1f}",
        _error_rate(report),
        f"{report.identical} of {report.clips}",
        "-" if report.difference is None else f"{report.difference:.4f}",
        f"{report.rtfx:.0f}",
    ]


def _error_rate(report: SystemReport) -> str:
    if report.error_rate is None:
        return "-"
    interval = "" if report.low is None else f" ({report.low:.4f} to {report.high:.4f})"
    return f"{report.error_rate:.4f}{interval}"
