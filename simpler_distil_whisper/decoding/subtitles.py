"""Hypotheses as subtitles: SRT and WebVTT files.

Owns how segments become cues, how cues are written, and what the files are called. It goes by the
rows of `hypotheses.jsonl` alone, so that a run that was stopped writes the same files.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.run import log
from simpler_distil_whisper.text.languages import NEVER_SPACED

SubtitleFormat = Literal["srt", "vtt"]

LINE_CHARACTERS = 42
LINES = 2
MIN_SECONDS = 0.01  # of a cue: WebVTT has none that ends when it begins
STEM_BYTES = 200  # file systems take 255, with the ending and what a half-written file is called
# Where a line of a text without times can be broken: spaces, and characters that need none.
PIECE = re.compile(
    rf"\s*(?:{NEVER_SPACED.pattern}[^\w\s]*|(?:(?!{NEVER_SPACED.pattern})\S)+)", re.UNICODE
)
NOT_IN_NAMES = frozenset('/\\:*?"<>|')
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Cue:
    """What is shown from one time to another, in seconds."""

    start: float
    end: float
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Piece:
    """A part of a segment between two places at which it can be broken."""

    text: str
    start: float
    end: float


def write_subtitles(
    hypotheses: Path,
    formats: Sequence[SubtitleFormat],
    id_column: str | None,
    segments_column: str,
    seconds_of: Callable[[Row], float],
    stop_if_asked: Callable[[], None],
) -> Path:
    """Write the files of all rows, and return their folder, which is logged.

    A file is called by the id of its row, or by the number of its line; what a file system could
    not take is replaced, and where names are equal a number is added.

    Args:
        hypotheses: the finished `hypotheses.jsonl`.
        formats: which files to write for each row.
        id_column: where the rows have their ids; None: nowhere.
        segments_column: where they have their segments.
        seconds_of: the length of the audio of a row, asked where a segment has no end.
        stop_if_asked: raises if a stop signal came.
    """
    folder = hypotheses.with_name("subtitles")
    folder.mkdir(exist_ok=True)
    names = FileNames()
    with hypotheses.open("rb") as file:
        for number, line in enumerate(file, 1):
            stop_if_asked()
            row: Row = json.loads(line)
            id = row.get(id_column) if id_column else None
            name = names.new(str(number if id is None else id), number)
            segments = row[segments_column]
            if segments and segments[-1]["end_seconds"] is None:
                segments[-1]["end_seconds"] = seconds_of(row)
            cues = cues_of(segments)
            for format in formats:
                content = WRITERS[format](cues).encode(errors="replace")
                write_atomically(folder / f"{name}.{format}", content)
    log.info("%s: subtitles of each row", folder)
    return folder


def cues_of(segments: Sequence[Row]) -> list[Cue]:
    """Return the cues of the segments of a row, in order; none begins before another has ended.

    A segment with words that does not fit into two lines becomes several cues; one without is a
    single cue, of however many lines.
    """
    cues = [cue for segment in segments for cue in _segment_cues(segment)]
    separate = list[Cue]()
    for number, cue in enumerate(cues):
        start = max(cue.start, separate[-1].end if separate else 0.0)
        end = cue.end
        if number + 1 < len(cues) and start < cues[number + 1].start:
            end = min(end, cues[number + 1].start)
        separate.append(replace(cue, start=start, end=max(end, start + MIN_SECONDS)))
    return separate


def _segment_cues(segment: Row) -> Iterator[Cue]:
    words = segment.get("words")
    lines = _lines(_pieces(segment))
    at_once = LINES if words else len(lines) or 1
    for first in range(0, len(lines), at_once):
        shown = lines[first : first + at_once]
        texts = tuple(_text(line) for line in shown)
        yield Cue(shown[0][0].start, shown[-1][-1].end, texts)


def _pieces(segment: Row) -> list[_Piece]:
    """Return what a line can be broken between: words, or what `PIECE` finds if there are none.

    Words of scripts without spaces are tokens: "iP" and "hone" are one piece, and a vowel sign is
    one with its letter.
    """
    words = segment.get("words")
    if not words:
        start, end = segment["start_seconds"], segment["end_seconds"]
        return [_Piece(text, start, end) for text in PIECE.findall(segment["text"])]
    text = "".join(word["word"] for word in words)
    breaks = {match.start() for match in PIECE.finditer(text)}
    pieces, place = list[_Piece](), 0
    for word in words:
        if pieces and place not in breaks:
            before = pieces.pop()
            pieces.append(_Piece(before.text + word["word"], before.start, word["end"]))
        else:
            pieces.append(_Piece(word["word"], word["start"], word["end"]))
        place += len(word["word"])
    return pieces


def _lines(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Return the pieces line by line, at most 42 characters each unless a piece has more."""
    lines = list[list[_Piece]]()
    for piece in pieces:
        if lines and len(_text([*lines[-1], piece])) <= LINE_CHARACTERS:
            lines[-1].append(piece)
        else:
            lines.append([piece])
    return [line for line in lines if _text(line)]


def _text(pieces: Sequence[_Piece]) -> str:
    """Return the text of a line, in which line breaks are spaces."""
    return " ".join("".join(piece.text for piece in pieces).split())


def srt(cues: Sequence[Cue]) -> str:
    """Return the content of an SRT file; the arrow of its times, in a text, is one of one dash."""
    return "\n".join(
        f"{number}\n{_time(cue.start, ',')} --> {_time(cue.end, ',')}\n"
        + "".join(re.sub("-{2,}>", "->", line) + "\n" for line in cue.lines)
        for number, cue in enumerate(cues, 1)
    )


def vtt(cues: Sequence[Cue]) -> str:
    """Return the content of a WebVTT file."""
    escapes = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    return "WEBVTT\n" + "".join(
        f"\n{_time(cue.start, '.')} --> {_time(cue.end, '.')}\n"
        + "".join(line.translate(escapes) + "\n" for line in cue.lines)
        for cue in cues
    )


WRITERS: dict[SubtitleFormat, Callable[[Sequence[Cue]], str]] = {"srt": srt, "vtt": vtt}


def _time(seconds: float, point: str) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d}{point}{milliseconds % 1000:03d}"


class FileNames:
    """Names of files for ids, each different, also where upper and lower case are the same."""

    def __init__(self) -> None:
        self._taken = set[str]()
        self._numbers = Counter[str]()

    def new(self, id: str, number: int) -> str:
        """Return a name, without an ending, that no id before was given.

        Args:
            id: may be of any length and characters, and may be equal to another.
            number: of the row, if no character of the id can be used.
        """
        stem = safe_stem(id) or str(number)
        name = stem
        while (key := unicodedata.normalize("NFC", name.casefold())) in self._taken:
            self._numbers[stem] += 1
            name = f"{stem}-{self._numbers[stem] + 1}"
        self._taken.add(key)
        return name


def safe_stem(id: str) -> str:
    """Return an id as a file name without an ending; empty if there is no character to be used."""
    composed = unicodedata.normalize("NFC", id)
    usable = "".join(c if c.isprintable() and c not in NOT_IN_NAMES else "_" for c in composed)
    stem = usable.encode()[:STEM_BYTES].decode(errors="ignore").strip(" .")
    # Commands would take a leading dash for an option, and Windows these names for devices.
    return f"_{stem}" if stem.startswith("-") or WINDOWS_DEVICES.match(stem) else stem
