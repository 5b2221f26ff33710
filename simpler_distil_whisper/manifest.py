"""Manifests: audio lists as JSON lines, read with a reason for every row that is not usable.

Owns the type `Utterance`, the columns of a manifest, and `RowResults`, the files in which a run
that answers row by row keeps its answers so that a kill loses none. Called by all scripts but
eval.py.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import Field, model_validator

from simpler_distil_whisper.config import (
    ConfigError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Ratio,
    StrictModel,
)
from simpler_distil_whisper.jsonl import Row, RowError, numbered_lines, parse_row, to_line
from simpler_distil_whisper.run import (
    DataError,
    is_main_process,
    log,
    process_rank,
    write_atomically,
)
from simpler_distil_whisper.text import whisper_language


class Columns(StrictModel):
    """Which key of a row holds what."""

    id: str | None = Field("id", description="The row's id, for logs; null: the line number.")
    audio: str = Field("audio", description="Path of the audio file.")
    text: str = Field("text", description="Transcript; a row may lack it where none is needed.")
    language: str | None = Field(
        "language", description="Language of the row; null: no such column."
    )
    start_seconds: str | None = Field("start_seconds", description="Where a part of a file begins.")
    duration_seconds: str | None = Field("duration_seconds", description="How long the part is.")


class DataLimits(StrictModel):
    """Which utterances are used; part of the `data` section of three scripts."""

    min_duration_seconds: NonNegativeFloat = Field(0.1, description="Shorter audio is rejected.")
    max_duration_seconds: PositiveFloat | None = Field(
        None, description="Longer audio is rejected; null: the model's window."
    )
    max_utterances: PositiveInt | None = Field(
        None, description="Take only the first so many rows."
    )
    max_bad_fraction: Ratio = Field(
        0.1, description="End with exit code 3 when a larger share of the rows is unusable."
    )
    num_workers: NonNegativeInt = Field(
        1, description="Processes that decode audio ahead of the model; 0: the model's own process."
    )

    @model_validator(mode="after")
    def _min_below_max(self) -> "DataLimits":
        low, high = self.min_duration_seconds, self.max_duration_seconds
        if high is not None and low >= high:
            raise ValueError(f"min_duration_seconds {low} is not below max_duration_seconds {high}")
        return self


class ManifestData(DataLimits):
    """The `data` section of the scripts that answer row by row."""

    manifest: Path = Field(description="JSON lines, one utterance each.")
    columns: Columns = Columns()


@dataclass(frozen=True, slots=True)
class Utterance:
    """One usable row of a manifest: an audio file, or a part of one, with what is known of it.

    Attributes:
        number: position among the rows, from 0.
        place: "train.jsonl:17", for messages.
        json: the row, as text so that a million rows stay small in memory.
        audio: path of the file, found.
        start_seconds: where the part begins.
        duration_seconds: length of the part; None: to the end of the file.
        text: the transcript, verbatim; None: there is none.
        language: code that Whisper knows, such as "zh"; None: the row does not say.
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

    @property
    def row(self) -> Row:
        """The row as a dictionary, with all its fields."""
        row: Row = json.loads(self.json)
        return row


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row that is not used, and why; `row` is what stands in the manifest."""

    number: int
    place: str
    reason: str
    row: object


@dataclass(frozen=True)
class Manifest:
    """The rows of one manifest, each either usable or rejected."""

    path: Path
    utterances: list[Utterance]
    rejections: list[Rejection]

    @property
    def row_count(self) -> int:
        """How many rows were read."""
        return len(self.utterances) + len(self.rejections)

    def fingerprint(self) -> str:
        """Return a hash of all rows: another one is another manifest."""
        digest = hashlib.sha256()
        for utterance in self.utterances:
            digest.update(f"{utterance.number} {utterance.json}".encode())
        for rejection in self.rejections:
            digest.update(f"{rejection.number} {rejection.reason}".encode())
        return digest.hexdigest()

    def check(self, max_bad_fraction: float) -> "Manifest":
        """Return the manifest itself, having said what is unusable.

        Raises:
            DataError: more than `max_bad_fraction` of the rows is unusable, or all rows are.
        """
        summary = f"{self.path}: {self.row_count} rows, {len(self.rejections)} unusable"
        log.info("%s", summary)
        examples = "".join(f"\n  {r.place}: {r.reason}" for r in self.rejections[:5])
        too_many = len(self.rejections) > max_bad_fraction * self.row_count
        if too_many or not self.utterances:
            raise DataError(
                f"{summary}, data.max_bad_fraction is {max_bad_fraction:g}. The first:{examples}"
            )
        return self


def read_manifest(
    path: Path,
    columns: Columns,
    *,
    max_utterances: int | None = None,
    languages: Collection[str] | None = None,
    new_fields: Collection[str] = (),
) -> Manifest:
    """Return the rows of a manifest, each checked but its audio not opened.

    Args:
        path: the manifest.
        columns: which key holds what.
        max_utterances: take only the first so many rows.
        languages: codes that a row may name; None: all of Whisper's.
        new_fields: fields that the run adds; a row that has one already is rejected, since it would
            be lost.

    Raises:
        ConfigError: the manifest cannot be read.
        DataError: it has no rows.
    """
    utterances: list[Utterance] = []
    rejections: list[Rejection] = []
    for number, (line_number, line) in enumerate(numbered_lines(path, "manifest")):
        if max_utterances is not None and number >= max_utterances:
            log.info("%s: only the first %d rows are used (max_utterances)", path, max_utterances)
            break
        place = f"{path}:{line_number}"
        row: Row | None = None
        try:
            row = parse_row(line)
            utterance = _utterance(row, number, place, path.parent, columns)
            _check_language(utterance.language, languages)
            if taken := sorted(set(new_fields) & row.keys()):
                raise RowError(f"has {taken} already: choose other output_columns")
            utterances.append(utterance)
        except ValueError as error:
            unreadable = line.decode(errors="replace")
            rejections.append(
                Rejection(number, place, str(error), unreadable if row is None else row)
            )
    if not utterances and not rejections:
        raise DataError(f"{path}: the manifest has no rows")
    return Manifest(path, utterances, rejections)


def _utterance(row: Row, number: int, place: str, folder: Path, columns: Columns) -> Utterance:
    """Return the row as an utterance; ValueError says why it is unusable."""
    audio = row.get(columns.audio)
    if not isinstance(audio, str) or not audio:
        raise RowError(f'no audio path under "{columns.audio}"; the keys are {", ".join(row)}')
    text = row.get(columns.text)
    if text is not None and not isinstance(text, str):
        raise RowError(f'"{columns.text}" is not a string: {text!r}')
    language = row.get(columns.language) if columns.language else None
    identity = row.get(columns.id) if columns.id else None
    start = _seconds(row, columns.start_seconds)
    duration = _seconds(row, columns.duration_seconds)
    if duration == 0:
        raise RowError(f'"{columns.duration_seconds}" is 0')
    return Utterance(
        number=number,
        place=place,
        json=to_line(row),
        id=place if identity is None else str(identity),
        audio=_find_audio(audio, folder),
        start_seconds=start or 0.0,
        duration_seconds=duration,
        text=text,
        language=None if language is None else whisper_language(str(language)),
    )


def _check_language(language: str | None, known: Collection[str] | None) -> None:
    if language is not None and known is not None and language not in known:
        raise RowError(f'the model has no token for the language "{language}"')


def _seconds(row: Row, column: str | None) -> float | None:
    value = row.get(column) if column else None
    if value is None:
        return None
    # JSON as Python reads it knows NaN and Infinity; bool is an int.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise RowError(f'"{column}" is not a time in seconds: {value!r}')
    return float(value)


def _find_audio(name: str, folder: Path) -> Path:
    """Return the path as it is, if absolute; else relative to the manifest or working directory."""
    for path in (folder / name, Path(name)):
        try:
            if path.exists():
                return path
        except OSError as error:  # longer than a file name can be: a text in the wrong column
            raise RowError(f'no such file: "{name}": {error.strerror}') from None
    raise RowError(f'no such file: "{name}", neither in {folder} nor in the working directory')


class RowResults:
    """The answers of a run, row by row: flushed as they come, in the manifest's order at the end.

    Every process appends finished batches to its own file in `parts/`. A killed run loses at most
    the batch under way; the next one, with any number of processes, goes on from `done`. `finish`
    puts the rows in order into `name`, and those without an answer into `rejected.jsonl`.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Open the results of a run; what an earlier one left is in `done`."""
        self._answers = folder / name
        self._rejected = folder / "rejected.jsonl"
        self._parts = folder / "parts"
        self._parts.mkdir(parents=True, exist_ok=True)
        self._row_count: int | None = None
        self.done: set[int] = set()
        self.rejected_before = 0
        for part in sorted(self._parts.glob("*.jsonl")):
            for entry, _ in _entries(part):
                self.done.add(entry["number"])
                self.rejected_before += "answer" not in entry
        # A new file for each start: an earlier run may have had other processes.
        starts = len(list(self._parts.glob(f"{process_rank()}-*.jsonl")))
        self._own = (self._parts / f"{process_rank()}-{starts}.jsonl").open("a", encoding="utf-8")

    def belong_to(self, manifest: Manifest) -> None:
        """Refuse to go on with answers to the rows of another manifest: they are known by number.

        Raises:
            ConfigError: the manifest is not the one with which these results were begun.
        """
        self._row_count = manifest.row_count
        mark, expected = self._parts / "manifest.sha256", manifest.fingerprint()
        if mark.exists() and mark.read_text() != expected:
            raise ConfigError(
                f"output_dir: {self._parts.parent} holds answers to other rows than those that "
                f'{manifest.path} has now: restore it, or choose another "output_dir"'
            )
        if is_main_process():
            write_atomically(mark, expected.encode())

    def append(
        self, answers: Iterable[tuple[Utterance, Row]], rejected: Iterable[Rejection]
    ) -> None:
        """Keep the answers of one batch; once this returns, a kill does not lose them."""
        entries: list[Row] = [{"number": u.number, "answer": row} for u, row in answers]
        entries += [asdict(rejection) for rejection in rejected]
        self._own.write("".join(to_line(entry) for entry in entries))
        self._own.flush()
        os.fsync(self._own.fileno())

    def finish(
        self, unread: Iterable[Rejection], wait_for_everyone: Callable[[], None]
    ) -> tuple[int, int]:
        """Write the ordered files and remove the parts; return how many rows went into each.

        Args:
            unread: rows that were rejected when the manifest was read.
            wait_for_everyone: returns when every process has come here.
        """
        self._own.close()
        wait_for_everyone()
        counts = (0, 0)
        if is_main_process():
            counts = self._merge(unread)
            if self._row_count not in (None, sum(counts)):
                raise DataError(
                    f"{self._parts}: of {self._row_count} rows {sum(counts)} are accounted for; do "
                    "all processes write to one shared output_dir?"
                )
            for part in self._parts.iterdir():
                part.unlink()
            self._parts.rmdir()
        wait_for_everyone()
        return counts

    def _merge(self, unread: Iterable[Rejection]) -> tuple[int, int]:
        where = {
            entry["number"]: (part, offset)
            for part in sorted(self._parts.glob("*.jsonl"))
            for entry, offset in _entries(part)
        }
        early = {rejection.number: asdict(rejection) for rejection in unread}
        answered: list[str] = []
        rejected: list[str] = []
        files = {part: part.open("rb") for part, _ in where.values()}
        for number in sorted(where.keys() | early.keys()):
            if number in early:
                entry = early[number]
            else:
                part, offset = where[number]
                files[part].seek(offset)
                entry = json.loads(files[part].readline())
            if "answer" in entry:
                answered.append(to_line(entry["answer"]))
            else:
                rejected.append(rejection_line(Rejection(**entry)))
        for file in files.values():
            file.close()
        write_atomically(self._rejected, "".join(rejected).encode())
        write_atomically(self._answers, "".join(answered).encode())
        return len(answered), len(rejected)


def places_in(path: Path) -> set[str]:
    """Return the places of the rows that a `rejected.jsonl` accounts for; none if it is absent."""
    if not path.exists():
        return set()
    return {entry["place"] for entry, _ in _entries(path)}


def rejection_line(rejection: Rejection) -> str:
    """Return the line of `rejected.jsonl` that accounts for one row."""
    return to_line({"place": rejection.place, "reason": rejection.reason, "row": rejection.row})


def _entries(part: Path) -> Iterator[tuple[Row, int]]:
    """Yield every entry of a part file with its offset in bytes; a kill can tear the last line."""
    offset = 0
    with part.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line), offset
            offset += len(line)
