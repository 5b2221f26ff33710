"""What a row of a manifest has to be, and where its audio is.

Owns the checks of one row; which rows there are is read in `manifest.py`.
"""

import errno
import functools
import os
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from simpler_distil_whisper.config import LONGEST_QUOTE, shortened
from simpler_distil_whisper.data.audio import MEAN, SIDES, AudioError, channel_count, is_channel
from simpler_distil_whisper.data.jsonl import (
    LONGEST_ROW,
    Row,
    RowError,
    check_text,
    is_number,
    parse_row,
    quoted,
    seconds_in,
)
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.text.languages import whisper_language

UNSET = -1  # no channel is forced on the row
MOST_CHANNELS = 100  # of a file
# Where audio is, by the path in its row: in the manifest's folder, in the working directory, or in
# either of them under a name that is composed otherwise.
IN_FOLDER, IN_WORKING_DIRECTORY, OTHER_SPELLING = range(3)
NOTHING_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}


class GoodRow(NamedTuple):
    """The channels of which rows are made, where the audio is, and whether there is a text.

    Where it is: IN_FOLDER or another.
    """

    channels: list[int]
    base: int
    has_text: bool


class BadRow(NamedTuple):
    """Why a row is not used, and its content."""

    reason: str
    content: object


@dataclass(frozen=True)
class RowCheck:
    """What a row has to be; the arguments of `read_manifest`."""

    folder: str
    columns: Columns
    languages: Collection[str] | None
    new_fields: frozenset[str]
    channel: str

    def __call__(self, line: bytes) -> GoodRow | BadRow:
        """Return what becomes of the row in one line."""
        row: Row | None = None
        try:
            row = parse_row(line)
            self._check_values(row)
            path, base = self._audio(row)
            self._check_language(row)
            self._check_new_fields(row)
            has_text = row.get(self.columns.text) is not None
            return GoodRow(self._channels(row, path), base, has_text)
        except ValueError as error:
            content = _readable(line) if row is None else row
            return BadRow(shortened(str(error), 1000), content)

    def _check_values(self, row: Row) -> None:
        columns = self.columns
        audio = row.get(columns.audio)
        if not isinstance(audio, str) or not audio:
            raise RowError(
                f'no audio path under "{columns.audio}" (columns.audio); the keys are '
                f"{', '.join(row)}"
            )
        check_text(row.get(columns.text), columns.text)
        identity = row.get(columns.id) if columns.id else None
        if isinstance(identity, bool | list | dict):
            raise RowError(f'"{columns.id}" is neither a string nor a number: {quoted(identity)}')
        for column in (columns.start_seconds, columns.duration_seconds):
            value = row.get(column) if column else None
            if value is not None and seconds_in(row, column) is None:
                raise RowError(f'"{column}" is not a time in seconds: {quoted(value)}')
        if columns.duration_seconds and row.get(columns.duration_seconds) == 0:
            raise RowError(f'"{columns.duration_seconds}" is 0')

    def _audio(self, row: Row) -> tuple[str, int]:
        """Return the path of the audio of a row, and where it is: IN_FOLDER or another."""
        audio = row[self.columns.audio]
        path, base = _search(audio, self.folder)
        if path is None:
            if reason := _why_hidden(os.path.join(self.folder, audio)):  # noqa: PTH118
                raise RowError(f'"{audio}" cannot be opened: {reason}')
            places = f"neither in {self.folder} nor in the working directory"
            raise RowError(f'no such file: "{audio}", {places}')
        return path, base

    def _check_language(self, row: Row) -> None:
        language, known = row_language(row, self.columns), self.languages
        if language is not None and known is not None and language not in known:
            raise RowError(f'the model has no token for the language "{language}"')

    def _check_new_fields(self, row: Row) -> None:
        if not self.new_fields.isdisjoint(row):
            names = sorted(self.new_fields.intersection(row))
            raise RowError(
                f"has {names} already, which the run would write: rename them, or name other "
                "output_columns where these come from there"
            )

    def _channels(self, row: Row, path: str) -> list[int]:
        """Return the channels, from 0, of which rows are made; `UNSET`: the row stays as it is.

        Raises:
            RowError: its column for the channel holds something else, which would be lost, or its
                audio cannot be opened.
        """
        column = self.columns.channel
        value = row.get(column) if column else None
        if named_channel(row, column):
            return [UNSET]
        # A word may have another meaning and stay, a number hardly: most likely 0 is the first.
        if value is not None and (self.channel != MEAN or is_number(value)):
            raise RowError(
                f'"{column}" is {value!r}, which is no channel (the first is 1): name another '
                "data.columns.channel"
            )
        if self.channel == MEAN:
            return [UNSET]
        if self.channel in SIDES:
            return [SIDES.index(self.channel)]
        try:
            count = channel_count(Path(path))
        except AudioError as error:
            raise RowError(f"{path}: {error}") from None
        if count > MOST_CHANNELS:
            raise RowError(f"{path}: it has {count} channels")
        return list(range(count)) if count > 1 else [UNSET]


def _readable(line: bytes) -> str:
    """Return a line that is no row; of one that is too long for a row, the beginning."""
    content = line if len(line) <= LONGEST_ROW else line[:LONGEST_QUOTE]
    return content.decode(errors="replace")


def row_language(row: Row, columns: Columns) -> str | None:
    """Return the code of the language that a row names; None if it names none.

    Raises:
        ValueError: Whisper has no such language.
    """
    name = row.get(columns.language) if columns.language else None
    if name is None:
        return None
    if not isinstance(name, str):
        raise RowError(f'"{columns.language}" is not a string: {quoted(name)}')
    if not name.strip():  # tables export a missing value as blank
        return None
    code = _whisper_language(shortened(name))
    if isinstance(code, ValueError):
        raise code
    return code


@functools.lru_cache(maxsize=1000)
def _whisper_language(name: str) -> str | ValueError:
    """Return the code of a name; cached, since the search for similar names takes a millisecond."""
    try:
        return whisper_language(name)
    except ValueError as error:
        return error


def named_channel(row: Row, column: str | None) -> str | None:
    """Return the channel that a row names in a column, as a name or number; None: it names none."""
    value = row.get(column) if column else None
    if isinstance(value, float) and value.is_integer():  # so tables write a column with gaps
        value = int(value)
    name = value.lower() if isinstance(value, str) else str(value) if is_number(value) else None
    return name if is_channel(name) else None


def find_audio(name: str, folder: str) -> str | None:
    """Return the path of an audio file, which may be relative to `folder`; None if there is none.

    A path that does not exist in `folder` is tried relative to the working directory. Names are
    the same in whichever Unicode form their letters are written: macOS decomposes them.
    """
    return _search(name, folder)[0]


def audio_path(name: str, folder: str, base: int) -> str:
    """Return the path of an audio file that existed when the manifest was read.

    One that has gone since then is rejected when it is loaded, like damaged audio.
    """
    in_folder = os.path.join(folder, name)  # noqa: PTH118
    if base == OTHER_SPELLING:
        return find_audio(name, folder) or in_folder
    return name if base == IN_WORKING_DIRECTORY else in_folder


def _search(name: str, folder: str) -> tuple[str | None, int]:
    """Return what `find_audio` returns, and where it is: IN_FOLDER or another."""
    # Not with Path, which alone would take longer than all other checks of a row.
    paths = (os.path.join(folder, name), name)  # noqa: PTH118
    for path, base in zip(paths, (IN_FOLDER, IN_WORKING_DIRECTORY), strict=True):
        if os.path.exists(path):  # noqa: PTH110
            return path, base
    forms = () if name.isascii() else map(_in_another_form, paths)
    return next(filter(None, forms), None), OTHER_SPELLING


def _why_hidden(path: str) -> str | None:
    """Return why a path cannot be followed, such as "Permission denied"; None: nothing is there.

    `os.path.exists`, by which audio is looked for, does not tell these apart.
    """
    try:
        os.stat(path)  # noqa: PTH116
    except OSError as error:
        return None if error.errno in NOTHING_THERE else error.strerror
    except ValueError:  # no file can have the name
        return None
    return None


def _in_another_form(path: str) -> str | None:
    """Return the path of a file whose folders and name are composed or decomposed otherwise."""
    existing = ""
    for part in Path(path).parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        candidates = (os.path.join(existing, form) for form in forms)  # noqa: PTH118
        match = next(filter(os.path.exists, candidates), None)
        if match is None:
            return None
        existing = match
    return existing
