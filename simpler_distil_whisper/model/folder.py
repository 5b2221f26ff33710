"""The facts of a Whisper model folder, read without loading torch or weights.

Owns the check by which a wrong path, a wrong file or an unknown language ends a script within a
second. It knows nothing of tensors; `weights.py` reads those, `whisper.py` loads the model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.folder_check import (
    FolderContent,
    read_content,
    window_seconds,
)
from simpler_distil_whisper.model.headers import weight_files
from simpler_distil_whisper.model.lookalikes import how_to_get, what_it_is
from simpler_distil_whisper.text.languages import WHISPER_LANGUAGES

ENGLISH_ONLY_VOCABULARY = 51_864  # openai/whisper: every multilingual vocabulary is larger
PROMPT_TOKENS = 4  # start, language, task and <|notimestamps|>
LISTED = 5  # differences in a message


@dataclass(frozen=True)
class ModelFolder:
    """Facts of one model folder.

    Attributes:
        path: the folder of weights and config.json.
        processor: the folder of tokenizer and feature extractor; often the same.
        config: config.json.
        languages: codes that the tokenizer has a token for; empty for an English-only model.
        vocabulary: token -> id.
    """

    path: Path
    processor: Path
    config: dict[str, Any]
    languages: frozenset[str]
    vocabulary: Mapping[str, int] = field(default_factory=dict, repr=False)

    @property
    def window_seconds(self) -> float:
        """The longest audio that the encoder takes at once: 30 s for every released Whisper."""
        return window_seconds(self.config)

    @property
    def label_tokens(self) -> int:
        """How many tokens a label may have, its timestamps included."""
        positions: int = self.config["max_target_positions"]
        return positions - PROMPT_TOKENS

    @property
    def weight_bytes(self) -> int:
        """The size of the weights on disk."""
        return sum(file.stat().st_size for file in weight_files(self.path))

    @property
    def row_languages(self) -> frozenset[str]:
        """The languages that rows of a manifest may name: "en" alone for an English-only model."""
        return self.languages or frozenset({"en"})

    def check_language_and_task(self, language: str | None, task: str, section: str) -> None:
        """Raise ConfigError if the model cannot be told to use the language or the task.

        Args:
            language: the code in a section of the config; None: it is detected.
            task: "transcribe" or "translate", in the same section.
            section: its name, for the message.
        """
        if language is not None and language not in self.row_languages:
            known = ", ".join(sorted(self.row_languages))
            raise ConfigError(
                f'{section}.language: {self.path} has no token for "{language}"; it has {known}'
            )
        if task == "translate" and not self.languages:
            raise ConfigError(f"{section}.task: {self.path} is an English-only model: transcribe")

    def check_fits(self, seconds: float | None, key: str) -> None:
        """Raise ConfigError if `seconds` (None: no limit of its own) are more than the window."""
        if seconds and seconds > self.window_seconds:
            raise ConfigError(
                f"{key}: {seconds:g} s is longer than the window of {self.path}, "
                f"{self.window_seconds:g} s"
            )

    def check_copy_of(self, teacher: "ModelFolder", key: str = "student") -> None:
        """Raise ConfigError unless the student named by `key` takes the teacher's input."""
        sizes = ("vocab_size", "num_mel_bins", "max_source_positions", "max_target_positions")
        facts = [(key, self.config[key], teacher.config[key]) for key in sizes]
        facts += [
            (f"as token {id}", ours, theirs)
            for id, ours, theirs in _other_tokens(self.vocabulary, teacher.vocabulary)
        ]
        if others := [fact for fact in facts if fact[1] != fact[2]]:
            problems = [
                f"{key}.path: {self.path} has {what} {ours}, the teacher {teacher.path} has "
                f"{theirs}: the student must be a copy of it with fewer layers"
                for what, ours, theirs in others[:LISTED]
            ]
            raise ConfigError("\n".join(problems))


def read_model_folder(path: Path, processor: Path | None, key: str) -> ModelFolder:
    """Return the facts of the model folder that the config key `key` names.

    Raises:
        ConfigError: it is no whole Whisper; the message lists every problem, one per line.
    """
    try:
        if not path.exists():
            raise ConfigError(f"{key}.path: no such folder: {path}{how_to_get(path)}")
        if answer := what_it_is(path):
            raise ConfigError(f"{key}.path: {path} is {answer}")
        if not (path / "config.json").exists():
            raise ConfigError(f"{key}.path: {path} is no model folder: it holds no config.json")
        content = read_content(path, processor or path, key)
    except OSError as error:
        raise ConfigError(f"{key}: a file of the model cannot be read: {error}") from None
    languages = _languages(content)
    return ModelFolder(path, processor or path, content.config, languages, content.vocabulary)


def _languages(content: FolderContent) -> frozenset[str]:
    """Return the codes of the languages that have a token; empty for an English-only model."""
    multilingual = content.generation.is_multilingual
    if multilingual is None:
        multilingual = content.config["vocab_size"] != ENGLISH_ONLY_VOCABULARY
    if not multilingual:
        return frozenset()
    tokens = content.generation.lang_to_id or content.vocabulary
    codes = {token[2:-2] for token in tokens if token.startswith("<|") and token.endswith("|>")}
    return frozenset(codes & WHISPER_LANGUAGES.keys())


def _other_tokens(
    ours: Mapping[str, int], theirs: Mapping[str, int]
) -> Iterator[tuple[int, str, str]]:
    """Yield each id that is another token in the other vocabulary; one may know more tokens."""
    their_tokens = {id: token for token, id in theirs.items()}
    for token, id in sorted(ours.items(), key=lambda item: item[1]):
        if their_tokens.get(id, token) != token:
            yield id, token, their_tokens[id]
