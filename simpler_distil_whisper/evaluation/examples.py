"""Which utterances the report lists, and what it shows of them: texts, alignment, audio.

Owns the choice and the fetching of what was written before; the page is `report_page.py`'s. Called
by `eval.py`.
"""

import base64
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import soundfile

from simpler_distil_whisper.data.audio import SAMPLE_RATE, AudioError, load_audio
from simpler_distil_whisper.data.jsonl import Row, numbered_lines, parse_row
from simpler_distil_whisper.evaluation.facts import Clip, Facts, clip_of
from simpler_distil_whisper.evaluation.hypotheses import Examined, HypothesisColumns
from simpler_distil_whisper.evaluation.metrics import ErrorCounts
from simpler_distil_whisper.evaluation.tallies import SystemScores, length_groups

Positions = list[int]

MOST_UTTERANCES = 10_000  # in the page; a browser takes that many well


@dataclass(frozen=True)
class Choice:
    """Which utterances are shown, by their numbers.

    Attributes:
        shown: all of them, in the order of the baseline's file.
        worst: system -> those with most errors.
        different: system -> those at which it and the baseline differ by most errors.
    """

    shown: Positions
    worst: dict[str, Positions]
    different: dict[str, Positions]


def choose(systems: Mapping[str, SystemScores], number: int) -> Choice:
    """Return which utterances to show.

    Args:
        systems: their scores; the first is the baseline.
        number: how many of the worst and of the most different are listed of each system.
    """
    baseline, *others = systems
    errors = {name: scores.errors for name, scores in systems.items()}
    worst = {name: _largest(errors[name], number) for name in systems}
    different = {name: _largest(np.abs(errors[name] - errors[baseline]), number) for name in others}
    listed = itertools.chain(*worst.values(), *different.values())
    most = np.max(list(errors.values()), axis=0)
    rest = np.argsort(-most, kind="stable")[:MOST_UTTERANCES].tolist()
    shown = list(dict.fromkeys([*listed, *rest]))[:MOST_UTTERANCES]
    return Choice(sorted(shown), worst, different)


def describe(
    choice: Choice,
    examined: Sequence[Examined],
    systems: Mapping[str, SystemScores],
    facts: Facts,
    columns: HypothesisColumns,
    scored: Path,
    embed_audio: bool,
) -> list[dict[str, Any]]:
    """Return what the page shows of the chosen utterances, in the order of `choice.shown`.

    Args:
        choice: which they are.
        examined: what is known of the systems' files; the first is the baseline's.
        systems: their scores.
        facts: what is known of the utterances.
        columns: where a row holds what.
        scored: the utterances.jsonl that has their alignments.
        embed_audio: whether the audio of the listed ones becomes part of the page.
    """
    rows = _rows_of(choice, examined[0])
    with scored.open("rb") as file:

        def read(offset: int) -> Row:
            file.seek(offset)
            return parse_row(file.readline())

        found = {
            position: [read(int(scores.offsets[position])) for scores in systems.values()]
            for position in choice.shown
        }
    with_audio = set(itertools.chain(*choice.worst.values(), *choice.different.values()))
    baseline = next(iter(systems.values()))
    described = []
    for position in choice.shown:
        clip = clip_of(rows[position], columns, examined[0].system.path.parent)
        embed = embed_audio and position in with_audio
        described.append(
            {
                "id": found[position][0]["id"],
                "groups": _groups_of(position, facts, baseline),
                "reference": found[position][0]["reference"],
                "seconds": _known(facts.seconds[position]),
                "audio": clip and (_embedded(clip) if embed else _link(clip, scored.parent)),
                "systems": [_of_system(row) for row in found[position]],
            }
        )
    return described


def _largest(values: npt.NDArray[np.int64], number: int) -> Positions:
    """Return the positions of the largest values above 0, the largest first."""
    order = np.argsort(-values, kind="stable")[:number]
    return [int(position) for position in order if values[position] > 0]


def _rows_of(choice: Choice, baseline: Examined) -> dict[int, Row]:
    """Return the baseline's rows of the chosen utterances, found again in its file."""
    lines = list(baseline.lines.values())
    wanted = {lines[position]: position for position in choice.shown}
    return {
        wanted[line]: parse_row(content)
        for line, content in numbered_lines(baseline.system.path, "hypotheses")
        if line in wanted
    }


def _groups_of(position: int, facts: Facts, baseline: SystemScores) -> dict[str, str]:
    groups = {column: labels[position] or "unknown" for column, labels in facts.groups.items()}
    return groups | length_groups(facts.seconds[position], int(baseline.tokens[position]))


def _of_system(row: Row) -> dict[str, Any]:
    counts = ErrorCounts(**row.get(row["unit"], {}))  # none without a reference
    return {
        "hypothesis": row["hypothesis"],
        "rate": row["rate"],
        "errors": counts.errors,
        "tokens": counts.reference_tokens,
        "unit": row["unit"],
        "alignment": row["alignment"],
        "signs": row["signs"],
    }


def _embedded(clip: Clip) -> str | None:
    """Return the utterance's audio as MP3 in a data URI; None if it cannot be read."""
    try:
        samples = load_audio(clip.path, clip.start_seconds, clip.duration_seconds)
    except AudioError:
        return None
    content = io.BytesIO()
    soundfile.write(content, samples, SAMPLE_RATE, format="MP3")
    return f"data:audio/mpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _link(clip: Clip, folder: Path) -> str:
    """Return the file's address as seen from the report, with the part to play."""
    address = quote(os.path.relpath(clip.path, folder))
    if clip.start_seconds or clip.duration_seconds is not None:
        end = "" if clip.duration_seconds is None else clip.start_seconds + clip.duration_seconds
        address += f"#t={clip.start_seconds:g},{end if end == '' else format(end, 'g')}"
    return address


def _known(seconds: float) -> float | None:
    return None if seconds != seconds else round(seconds, 3)
