"""The utterances that the report shows: which they are, and their texts, alignments and audio.

Owns the choice and the reading; how they look is the business of `html_report.py`.
"""

import base64
import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import soundfile
from pydantic import Field

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.data.audio import SAMPLE_RATE, AudioError, Clip, load_audio
from simpler_distil_whisper.data.decoders import UNREADABLE_ERRORS
from simpler_distil_whisper.data.jsonl import Row, parse_row, placed_lines, row_at
from simpler_distil_whisper.evaluation.facts import Facts, find_clip
from simpler_distil_whisper.evaluation.hypotheses import ExaminedSystem, HypothesisColumns
from simpler_distil_whisper.evaluation.metrics import ErrorCounts
from simpler_distil_whisper.evaluation.tallies import SystemScores, length_groups

# In the page, unless more are listed: browsers stay quick with that many.
MOST_UTTERANCES = 10_000
LONGEST_EMBEDDED_SECONDS = 60.0  # an hour would be a page of many megabytes for each recording


class ReportOptions(StrictModel):
    """The page for a browser."""

    html: bool = Field(default=True, description="Write report.html.")
    worst_utterances: int = Field(
        default=20,
        ge=0,
        le=MOST_UTTERANCES,
        description="How many of those with most errors, and of those at which a system and the "
        "baseline differ most, are listed for each system.",
    )
    embed_audio: bool = Field(
        default=True,
        description="Put the audio of the listed utterances, if no longer than a minute, into the "
        "page; other audio, and all with false, is linked to its file.",
    )


@dataclass(frozen=True)
class ShownHypothesis:
    """One system's hypothesis of an utterance; `alignment` is that of `scoring.compact`."""

    hypothesis: str
    rate: float | None
    errors: int
    tokens: int
    unit: str
    alignment: list[list[str]]
    signs: list[str]


@dataclass(frozen=True)
class ShownUtterance:
    """What the page shows of an utterance; `audio` is a link or the audio itself as a data URI."""

    id: str
    groups: dict[str, str]
    reference: str | None
    seconds: float | None
    audio: str | None
    systems: list[ShownHypothesis]


@dataclass(frozen=True)
class Listing:
    """The utterances of the page.

    Attributes:
        utterances: all that can be searched, in the order of the baseline's file.
        worst: system -> indices of those with most errors, the worst first.
        different: system -> indices of those in which its errors and the baseline's differ most.
    """

    utterances: list[ShownUtterance]
    worst: dict[str, list[int]]
    different: dict[str, list[int]]


def list_utterances(
    systems: Sequence[ExaminedSystem],
    scores: Mapping[str, SystemScores],
    facts: Facts,
    columns: HypothesisColumns,
    scored: Path,
    options: ReportOptions,
) -> Listing:
    """Return the utterances to show.

    Args:
        systems: their files; the first is the baseline's.
        scores: system -> its scores.
        facts: what is known of the utterances.
        columns: which column of a row holds what.
        scored: the utterances.jsonl that holds their alignments.
        options: how many are listed, and whether their audio becomes part of the page.
    """
    choice = _choose(scores, options.worst_utterances)
    rows = _baseline_rows(systems[0], choice.shown)
    baseline = next(iter(scores.values()))
    utterances = []
    with scored.open("rb") as file:
        for position in choice.shown:
            lines = [row_at(file, int(system.offsets[position])) for system in scores.values()]
            clip = find_clip(rows[position], columns, systems[0].path.parent)
            embed = options.embed_audio and position in choice.listed
            seconds, tokens = facts.seconds[position], int(baseline.tokens[position])
            utterances.append(
                ShownUtterance(
                    id=lines[0]["id"],
                    groups=facts.group_values(position) | length_groups(seconds, tokens),
                    reference=lines[0]["reference"],
                    seconds=None if math.isnan(seconds) else round(seconds, 3),
                    audio=_audio_source(clip, embed, scored.parent),
                    systems=[_shown_hypothesis(line) for line in lines],
                )
            )
    return Listing(utterances, choice.indices(choice.worst), choice.indices(choice.different))


@dataclass(frozen=True)
class _Choice:
    """The positions of the utterances to show, as in `Listing`; `listed` are those of all lists."""

    shown: list[int]
    listed: set[int]
    worst: dict[str, list[int]]
    different: dict[str, list[int]]

    def indices(self, lists: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """Return lists of positions as lists of indices in `shown`."""
        index = {position: number for number, position in enumerate(self.shown)}
        return {system: [index[position] for position in lists[system]] for system in lists}


def _choose(scores: Mapping[str, SystemScores], number: int) -> _Choice:
    """Return which utterances to show, `number` of them in each list of each system."""
    name, *others = scores
    errors = {system: system_scores.errors for system, system_scores in scores.items()}
    worst = {system: _largest(errors[system], number) for system in scores}
    different = {
        system: _largest(np.abs(errors[system] - errors[name]), number) for system in others
    }
    most_errors = np.max(list(errors.values()), axis=0)
    by_errors = np.argsort(-most_errors, kind="stable")[:MOST_UTTERANCES].tolist()
    listed = set(itertools.chain(*worst.values(), *different.values()))
    shown = list(dict.fromkeys([*listed, *by_errors]))[: max(MOST_UTTERANCES, len(listed))]
    return _Choice(sorted(shown), listed, worst, different)


def _largest(values: npt.NDArray[np.int64], number: int) -> list[int]:
    """Return the positions of the largest values above 0, the largest first."""
    order = np.argsort(-values, kind="stable")[:number]
    return [int(position) for position in order if values[position] > 0]


def _baseline_rows(baseline: ExaminedSystem, positions: Sequence[int]) -> dict[int, Row]:
    """Return the baseline's rows of these utterances, read from its file again."""
    lines = list(baseline.lines.values())
    position_at = {lines[position]: position for position in positions}
    return {
        position_at[line]: parse_row(content)
        for line, _, content in placed_lines(baseline.path, "hypotheses")
        if line in position_at
    }


def _shown_hypothesis(line: Row) -> ShownHypothesis:
    """Return what the page shows of a line of `utterances.jsonl`."""
    counts = ErrorCounts(**line.get(line["unit"], {}))  # the line has none without a reference
    return ShownHypothesis(
        hypothesis=line["hypothesis"],
        rate=line["rate"],
        errors=counts.errors,
        tokens=counts.reference_tokens,
        unit=line["unit"],
        alignment=line["alignment"],
        signs=line["signs"],
    )


def _audio_source(clip: Clip | None, embed: bool, folder: Path) -> str | None:
    """Return what the page plays: the audio itself or a link as seen from its folder."""
    if clip is None:
        return None
    return (_embedded(clip) if embed else None) or _link(clip, folder)


def _embedded(clip: Clip) -> str | None:
    """Return the audio as MP3 in a data URI; None: too long, unreadable or not encodable."""
    content = io.BytesIO()
    try:
        # The encoder ends the whole process where samples are far beyond 1.
        samples = load_audio(*clip, max_seconds=LONGEST_EMBEDDED_SECONDS).clip(-1.0, 1.0)
        soundfile.write(content, samples, SAMPLE_RATE, format="MP3")
    except (AudioError, MemoryError, *UNREADABLE_ERRORS):
        return None
    return f"data:audio/mpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _link(clip: Clip, folder: Path) -> str:
    """Return the file's address as seen from the report, with the part to play."""
    address = quote(os.path.relpath(clip.path, folder))
    if clip.duration_seconds is not None:
        end = clip.start_seconds + clip.duration_seconds
        return f"{address}#t={clip.start_seconds:g},{end:g}"
    if clip.start_seconds:
        return f"{address}#t={clip.start_seconds:g},"
    return address
