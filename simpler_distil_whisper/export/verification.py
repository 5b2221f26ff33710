"""Whether an exported model still says the same: clip by clip, beside the model it was made of.

Owns the clips, the counting and the tables; the systems that transcribe are given to it. Called by
`export.py`.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.data.audio import SAMPLE_RATE, AudioError, load_audio
from simpler_distil_whisper.data.jsonl import to_line
from simpler_distil_whisper.data.manifest import Columns, Rejection, Utterance, reject
from simpler_distil_whisper.decoding.speed import Speed, write_speed
from simpler_distil_whisper.evaluation.intervals import bootstrap_interval
from simpler_distil_whisper.evaluation.metrics import Scorer, total
from simpler_distil_whisper.run import Progress, Run

HYPOTHESIS = "hypothesis"  # the column, as offline inference calls it
SHORTEST_SECONDS = 0.1


class Answer(NamedTuple):
    """What a system heard in a clip: its text, the language's code, how many tokens it said."""

    text: str
    language: str
    tokens: int


# float32 [S] each, mono, 16 kHz, and their languages (None: to be detected) -> one answer each.
Listen = Callable[[Sequence[np.ndarray], Sequence[str | None]], list[Answer]]


@dataclass(frozen=True)
class System:
    """A loaded model that transcribes, greedily and without timestamps.

    Attributes:
        library: what runs it, with its version.
        compute_type: what it computes in, which need not be what its weights are kept in.
        batch_size: how many clips it is given at once.
        weight_bytes: the size of its weights on disk.
    """

    library: str
    compute_type: str
    batch_size: int
    weight_bytes: int
    listen: Listen


class Heard(NamedTuple):
    """What a system made of all clips, and how long the clips and its computing were."""

    answers: list[Answer]
    audio_seconds: float
    compute_seconds: float


def usable_clips(
    utterances: Iterable[Utterance], window_seconds: float
) -> tuple[list[Utterance], list[Rejection]]:
    """Return the utterances whose audio can be decoded and fits into the window, and the others."""
    clips, rejections = [], []
    for utterance in utterances:
        try:
            _waveform(utterance, window_seconds)
            clips.append(utterance)
        except AudioError as error:
            rejections.append(reject(utterance, f"{utterance.audio}: {error}"))
    return clips, rejections


def transcribe(
    name: str,
    system: System,
    clips: Sequence[Utterance],
    languages: Sequence[str | None],
    run: Run,
) -> Heard:
    """Return what a system hears in the clips; its first clip, heard twice, warms it up."""
    size = system.batch_size
    answers: list[Answer] = []
    audio = compute = 0.0
    system.listen([_waveform(clips[0])], languages[:1])
    with Progress(f"{name} transcribes", "clips", len(clips)) as progress:
        for start in range(0, len(clips), size):
            run.stop_if_asked()
            waveforms = [_waveform(clip) for clip in clips[start : start + size]]
            started = time.perf_counter()
            answers += system.listen(waveforms, languages[start : start + size])
            compute += time.perf_counter() - started
            audio += sum(map(len, waveforms)) / SAMPLE_RATE
            progress.advance(len(waveforms))
    return Heard(answers, audio, compute)


def _waveform(clip: Utterance, window_seconds: float = float("inf")) -> np.ndarray:
    return load_audio(
        clip.audio,
        clip.start_seconds,
        clip.duration_seconds,
        min_seconds=SHORTEST_SECONDS,
        max_seconds=window_seconds,
    )


def write_hypotheses(
    folder: Path,
    clips: Sequence[Utterance],
    heard: Heard,
    system: System,
    columns: Columns,
    parameters: int,
) -> None:
    """Write `hypotheses.jsonl` and `speed.json`, as offline inference does, for `eval.py`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for clip, answer in zip(clips, heard.answers, strict=True):
        row = clip.row | {columns.audio: str(clip.audio), HYPOTHESIS: answer.text}
        if columns.language and clip.language is None:
            row[columns.language] = answer.language
        lines.append(to_line(row))
    write_atomically(folder / "hypotheses.jsonl", "".join(lines).encode())
    speed = Speed(
        utterances=len(clips),
        audio_seconds=heard.audio_seconds,
        compute_seconds=heard.compute_seconds,
        tokens=sum(answer.tokens for answer in heard.answers),
    )
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
class Report:
    """How one system did; each variant's is a row of the table.

    Attributes:
        weight_bytes: its size on disk.
        compression: how many times smaller that is than the original's.
        rtfx: seconds of audio per second of computing.
        error_rate, low, high: against what was said, and its 95 % interval; None where unknown.
        identical: how many of the clips it gives the very text of the original.
        clips: of how many.
        difference: the error rate with the original's texts for references.
        verified: whether it says what the original says; None: quantised, so it need not.
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


def compare(
    system: System,
    heard: Heard,
    original: tuple[System, Heard],
    clips: Sequence[Utterance],
    scorer: Scorer,
    max_different: float | None,
) -> Report:
    """Return how a system does beside the original.

    Args:
        system: what has transcribed.
        heard: what it heard.
        original: the model that it was made of, and what that heard.
        clips: what both listened to.
        scorer: counts errors.
        max_different: the share of clips in which it may say something else; None: it may in all.
    """
    first, reference = original
    pairs = list(zip(reference.answers, heard.answers, strict=True))
    identical = sum(ours.text == theirs.text for ours, theirs in pairs)
    errors = [
        scorer.count(clip.text, answer.text, answer.language)
        for clip, answer in zip(clips, heard.answers, strict=True)
        if clip.text is not None
    ]
    low, high = bootstrap_interval(errors) or (None, None)
    return Report(
        library=system.library,
        compute_type=system.compute_type,
        weight_bytes=system.weight_bytes,
        compression=first.weight_bytes / system.weight_bytes,
        rtfx=heard.audio_seconds / heard.compute_seconds,
        error_rate=total(errors).rate,
        low=low,
        high=high,
        identical=identical,
        clips=len(pairs),
        difference=total(scorer.count(a.text, b.text, a.language) for a, b in pairs).rate,
        verified=None
        if max_different is None
        else len(pairs) - identical <= max_different * len(pairs),
    )


def as_json(reports: dict[str, Report], facts: dict[str, object]) -> str:
    """Return the content of `exports.json`."""
    systems: dict[str, dict[str, Any]] = {
        name: {
            key: round(value, 6) if isinstance(value, float) else value
            for key, value in asdict(report).items()
        }
        for name, report in reports.items()
    }
    return json.dumps({**facts, "systems": systems}, ensure_ascii=False, indent=2) + "\n"


def as_table(reports: dict[str, Report]) -> str:
    """Return the content of `exports.md`: a Markdown table that can also be read as it is."""
    heads = ["system", "heard by", "computes in", "MB", "compression", "CER/WER (95 % interval)"]
    heads += ["texts as the original's", "difference", "times real time"]
    rows = [heads, ["-"] * len(heads)]
    for name, one in reports.items():
        said = {True: "", None: "", False: " UNVERIFIED"}[one.verified]
        rows.append(
            [
                name + said,
                one.library,
                one.compute_type,
                f"{one.weight_bytes / 1e6:.2f}",
                f"{one.compression:.1f}",
                _interval(one),
                f"{one.identical} of {one.clips}",
                "-" if one.difference is None else f"{one.difference:.4f}",
                f"{one.rtfx:.0f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    rows[1] = ["-" * width for width in widths]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _interval(one: Report) -> str:
    if one.error_rate is None:
        return "-"
    between = "" if one.low is None else f" ({one.low:.4f} to {one.high:.4f})"
    return f"{one.error_rate:.4f}{between}"
