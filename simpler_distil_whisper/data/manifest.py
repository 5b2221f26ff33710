"""Manifests: audio lists as JSON lines, read with a reason for every row that is not usable.

Owns the type `Utterance`. It decodes no audio; that is done when an utterance is loaded.
"""

import codecs
import contextlib
import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, overload

from simpler_distil_whisper.data.audio import (
    MEAN,
    AudioError,
    Clip,
    MissingAudio,
    channel_name,
)
from simpler_distil_whisper.data.jsonl import (
    PlacedLine,
    Row,
    other_format,
    parse_row,
    placed_lines,
    seconds_in,
    to_line,
)
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.data.row_checks import (
    UNSET,
    BadRow,
    GoodRow,
    RowCheck,
    audio_path,
    named_channel,
    row_language,
)
from simpler_distil_whisper.files import open_regular_file, version_of
from simpler_distil_whisper.run import DataError, log

# On a network, to ask whether a file exists takes a millisecond: many are asked for at once, in
# parts, since a thread takes longer to begin than a local disk to answer.
THREADS, ROWS_OF_A_THREAD = 32, 32
BYTES_AT_ONCE = 2**26  # of rows
MEASURED_SECONDS = "audio_seconds"  # the column of lengths that labelling has measured


@contextlib.contextmanager
def still_readable(audio: str, when: str) -> Iterator[None]:
    """Raise DataError for the AudioError of a file that could be read before, `when` it was."""
    try:
        yield
    except AudioError as error:
        raise DataError(
            f"{audio}: {error}. It was readable when it was {when}; run the same command again "
            "once it is there"
        ) from None


class _PartColumns(Protocol):
    """The columns that say which part of a file a row is; None: there is no such column."""

    @property
    def start_seconds(self) -> str | None: ...

    @property
    def duration_seconds(self) -> str | None: ...

    @property
    def channel(self) -> str | None: ...


def clip_of(row: Row, path: str, columns: _PartColumns) -> Clip:
    """Return the audio of a row, of a manifest or of hypotheses, that is in this file."""
    return Clip(
        Path(path),
        seconds_in(row, columns.start_seconds) or 0.0,
        seconds_in(row, columns.duration_seconds),
        named_channel(row, columns.channel) or MEAN,
    )


@dataclass(frozen=True, slots=True)
class Utterance:
    """One usable row of a manifest: an audio file, or a part of one, with text and language.

    Attributes:
        number: position among the rows, from 0.
        place: "train.jsonl:17", for messages.
        json: the row as it is in the manifest, with the channel that the config gives it.
        audio: path of the file, relative to the working directory or absolute.
        start_seconds: where the part begins.
        duration_seconds: length of the part; None: to the end of the file.
        text: the transcript, verbatim; None: there is none.
        language: code that Whisper knows, such as "zh"; None: the row names none.
        channel: as in `Clip`.
    """

    number: int
    place: str
    json: str
    id: str
    audio: Path
    start_seconds: float
    duration_seconds: float | None
    text: str | None
    language: str | None
    channel: str = MEAN

    @property
    def row(self) -> Row:
        """The row as a dictionary, with all its fields."""
        row: Row = json.loads(self.json)
        return row

    @property
    def stated_seconds(self) -> float | None:
        """Its length by the row: that of its part, or what labelling measured; None: neither."""
        if self.duration_seconds is not None:
            return self.duration_seconds
        return seconds_in(self.row, MEASURED_SECONDS) or None

    @property
    def clip(self) -> Clip:
        """The file, or part of a file, that holds its audio."""
        return Clip(self.audio, self.start_seconds, self.duration_seconds, self.channel)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row that is not used, and why.

    Attributes:
        number: of the row.
        place: of the row, as a person finds it.
        reason: why it is not used.
        row: its content in the manifest.
        vanished: its audio was there when the manifest was read, and may come back.
    """

    number: int
    place: str
    reason: str
    row: object
    vanished: bool = False


def reject(utterance: Utterance, reason: str) -> Rejection:
    """Return the rejection of a row that has turned out to be unusable."""
    return Rejection(utterance.number, utterance.place, reason, utterance.row)


def reject_audio(utterance: Utterance, error: AudioError | MemoryError) -> Rejection:
    """Return the rejection of a row whose audio cannot be used."""
    reason = "too large for the memory" if isinstance(error, MemoryError) else str(error)
    rejection = reject(utterance, f"{utterance.audio}: {reason}")
    return replace(rejection, vanished=isinstance(error, MissingAudio))


def refuse_vanished(rejections: Iterable[Rejection]) -> None:
    """Raise DataError if some audio has vanished: without it, results would be others."""
    if vanished := [rejection for rejection in rejections if rejection.vanished]:
        raise DataError(
            f"Audio has vanished since the manifest was read:{first_reasons(vanished)}\n"
            "Run the same command again once it is there."
        )


def first_reasons(rejections: Sequence[Rejection]) -> str:
    """Return the first few reasons for a message, each with its first row on a line of its own."""
    counts = Counter(rejection.reason for rejection in rejections)
    firsts = {rejection.reason: rejection.place for rejection in reversed(rejections)}
    lines = []
    for reason, count in itertools.islice(counts.items(), 5):
        more = f" (and {count - 1} more such rows)" if count > 1 else ""
        lines.append(f"\n  {firsts[reason]}: {reason}{more}")
    return "".join(lines)


class Utterances(Sequence[Utterance]):
    """The usable rows of a manifest, in order; each is read from the file when it is accessed.

    Only the offset of each row is kept in memory, so that a million rows take 25 megabytes.

    Attributes:
        numbers: the position of each utterance among all rows.
        each_channel: whether rows are made of each channel of a file.
    """

    def __init__(self, path: Path, columns: Columns, *, each_channel: bool = False) -> None:
        """Begin without rows; note size and time of the file, to notice when it changes."""
        self.path = path
        self.columns = columns
        self.each_channel = each_channel
        self.numbers = array("q")
        self._lines = array("q")
        self._offsets = array("q")
        self._channels = array("b")
        self._bases = array("b")
        self._version = version_of(self.path)

    def append(self, number: int, line: int, offset: int, channel: int, base: int) -> None:
        """Add a row by the number of its line, from 1, its offset in bytes, and the rest."""
        self.numbers.append(number)
        self._lines.append(line)
        self._offsets.append(offset)
        self._channels.append(channel)
        self._bases.append(base)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...

    @overload
    def __getitem__(self, index: slice) -> list[Utterance]: ...

    def __getitem__(self, index: int | slice) -> Utterance | list[Utterance]:
        """Return one utterance, or a list of them.

        Raises:
            DataError: the manifest is no longer the file that was checked.
        """
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            return list(self._read(chosen))
        return next(self._read([chosen]))

    def __iter__(self) -> Iterator[Utterance]:
        return self._read(range(len(self)))

    def check_unchanged(self) -> None:
        """Raise DataError if the manifest is no longer the file that was checked."""
        if version_of(self.path) != self._version:
            raise DataError(f"{self.path} has changed while this run reads it: start the run again")

    def _read(self, indices: Iterable[int]) -> Iterator[Utterance]:
        self.check_unchanged()
        folder = str(self.path.parent)
        with open_regular_file(self.path) as file:
            for index in indices:
                file.seek(self._offsets[index])
                line = file.readline().strip()
                row, channel = parse_row(line), self._channels[index]
                if channel != UNSET:
                    row = _of_channel(row, channel, self.columns, in_id=self.each_channel)
                    line = to_line(row).strip().encode()
                audio = audio_path(row[self.columns.audio], folder, self._bases[index])
                number, place = self.numbers[index], f"{self.path}:{self._lines[index]}"
                yield _utterance(row, line, number, place, audio, self.columns)


@dataclass(frozen=True)
class Manifest:
    """The rows of one manifest, each either usable or rejected.

    Attributes:
        fingerprint: a hash of all rows, and of what numbers them beyond their order.
        texts: how many of the usable rows have a text.
    """

    path: Path
    utterances: Utterances
    rejections: list[Rejection]
    fingerprint: str
    texts: int

    @property
    def row_count(self) -> int:
        """The number of rows that were read."""
        return len(self.utterances) + len(self.rejections)

    def check(self, max_bad_fraction: float, *, count_texts: bool = False) -> "Manifest":
        """Log how many rows are unusable, and return the manifest itself.

        Args:
            max_bad_fraction: more unusable rows are refused.
            count_texts: log also how many rows have a text, where they may lack it.

        Raises:
            ConfigError: the manifest can no longer be read.
            DataError: more than `max_bad_fraction` of the rows is unusable, or all rows are.
        """
        summary = f"{self.path}: {self.row_count} rows, {len(self.rejections)} unusable"
        column = self.utterances.columns.text
        texts = f', {self.texts or "none"} with a text under "{column}"' if count_texts else ""
        log.info("%s%s", summary, texts)
        too_many = len(self.rejections) > max_bad_fraction * self.row_count
        if self.utterances and not too_many:
            return self
        if not any(isinstance(rejection.row, dict) for rejection in self.rejections):
            _, _, first_line = next(placed_lines(self.path, "manifest"))
            if reason := other_format(first_line):
                raise DataError(f"{self.path}: {reason}")
        examples = first_reasons(self.rejections)
        raise DataError(
            f"{summary}, data.max_bad_fraction is {max_bad_fraction:g}. The first:{examples}"
        )


def read_manifest(
    path: Path,
    columns: Columns,
    *,
    max_utterances: int | None = None,
    languages: Collection[str] | None = None,
    new_fields: Collection[str] = (),
    channel: str = MEAN,
) -> Manifest:
    """Return the rows of a manifest, checked without decoding their audio.

    Args:
        path: the manifest.
        columns: which key holds what.
        max_utterances: take only the first rows, at most this many.
        languages: codes that a row may name; None: all of Whisper's.
        new_fields: fields that the run adds; a row that already has one is rejected, since its
            value would be lost.
        channel: of rows that name none, as in `ManifestData`; with "each", the headers of all audio
            files are read.

    Raises:
        ConfigError: the manifest cannot be read.
        DataError: it has no rows, or changes while it is read.
    """
    each_channel = channel == "each"
    utterances = Utterances(path, columns, each_channel=each_channel)
    check = RowCheck(str(path.parent), columns, languages, frozenset(new_fields), channel)
    rejections: list[Rejection] = []
    digest = hashlib.sha256(b"" if channel == MEAN else channel.encode())
    lines = placed_lines(path, "manifest")
    rows = number = texts = 0
    used = itertools.islice(lines, max_utterances)
    for (line_number, offset, line), row in _checked(used, check):
        rows += 1
        digest.update(b"%d %s\n" % (line_number, line))
        if isinstance(row, BadRow):
            digest.update(b"rejected\n" if each_channel else b"")
            place = f"{path}:{line_number}"
            rejections.append(Rejection(number, place, row.reason, row.content))
            number += 1
            continue
        digest.update(b"%d" % len(row.channels) if each_channel else b"")
        for one in row.channels:
            utterances.append(number, line_number, offset, one, row.base)
            number += 1
            texts += row.has_text
    if next(lines, None):
        log.info("%s: only the first %d rows are used (max_utterances)", path, rows)
    if each_channel:
        log.info("%s: %d rows are %d, with one for each channel", path, rows, number)
    utterances.check_unchanged()
    if not utterances and not rejections:
        raise DataError(f"{path}: the manifest has no rows")
    return Manifest(path, utterances, rejections, digest.hexdigest(), texts)


def _checked(
    lines: Iterator[PlacedLine], check: RowCheck
) -> Iterator[tuple[PlacedLine, GoodRow | BadRow]]:
    """Yield each line with what becomes of it; threads wait for the file system."""

    def check_some(some: Sequence[PlacedLine]) -> list[GoodRow | BadRow]:
        return [check(line) for _, _, line in some]

    with ThreadPoolExecutor(THREADS) as pool:
        while some := _next_lines(lines):
            starts = range(0, len(some), ROWS_OF_A_THREAD)
            parts = [some[start : start + ROWS_OF_A_THREAD] for start in starts]
            for part, results in zip(parts, pool.map(check_some, parts), strict=True):
                yield from zip(part, results, strict=True)


def _next_lines(lines: Iterator[PlacedLine]) -> list[PlacedLine]:
    """Return some lines, which together do not take much memory; empty at the end."""
    some: list[PlacedLine] = []
    size = 0
    for placed in itertools.islice(lines, THREADS * ROWS_OF_A_THREAD):
        some.append(placed)
        size += len(placed[-1])
        if size > BYTES_AT_ONCE:
            break
    return some


def _of_channel(row: Row, channel: int, columns: Columns, *, in_id: bool) -> Row:
    """Return a row with the name of its channel, also in its id if there is a row of each."""
    assert columns.channel
    name = channel_name(channel)
    if in_id and columns.id and row.get(columns.id) is not None:
        row = row | {columns.id: f"{row[columns.id]}-{name}"}
    return row | {columns.channel: name}


def _utterance(
    row: Row, line: bytes, number: int, place: str, audio: str, columns: Columns
) -> Utterance:
    """Return the utterance of a row that has been checked."""
    identity = row.get(columns.id) if columns.id else None
    clip = clip_of(row, audio, columns)
    return Utterance(
        number=number,
        place=place,
        json=line.removeprefix(codecs.BOM_UTF8).decode(),
        id=place if identity is None else str(identity),
        audio=clip.path,
        start_seconds=clip.start_seconds,
        duration_seconds=clip.duration_seconds,
        channel=clip.channel,
        text=row.get(columns.text),
        language=row_language(row, columns),
    )
