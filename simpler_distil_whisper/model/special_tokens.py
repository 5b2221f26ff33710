"""The ids of a Whisper's special tokens, which differ between models: looked up by name."""

from dataclasses import dataclass

from transformers import WhisperTokenizer

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.options import Task
from simpler_distil_whisper.model.settings import is_added_word
from simpler_distil_whisper.text.languages import WHISPER_LANGUAGES

TIME_STEP = 0.02  # seconds from one timestamp to the next


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of special tokens, looked up by name, since they differ between models.

    Attributes:
        languages: code such as "zh" -> id; empty for an English-only model.
        no_speech: `<|nospeech|>`; None where the tokenizer has none.
        previous: `<|startofprev|>`, which precedes the previous text; None where there is none.
        timestamps: ids of `<|0.00|>`, `<|0.02|>`, ... up to the window's length.
        control: all ids that are never text, except `end`.
        added: id -> text of the words that people have added to the vocabulary, such as names. They
            stand behind the timestamps, and are text like any other.
    """

    start: int
    end: int
    no_timestamps: int
    transcribe: int | None
    translate: int | None
    no_speech: int | None
    previous: int | None
    timestamps: range
    languages: dict[str, int]
    control: tuple[int, ...]
    added: dict[int, str]

    def is_text(self, id: int) -> bool:
        """Return whether a token is a part of the text, neither special nor a timestamp."""
        return id < self.end or id in self.added

    def prompt(self, language: str | None, task: Task, timestamps: bool = False) -> list[int]:
        """Return the ids that precede the text: `<|startoftranscript|>`, language, task, ...

        Raises:
            ConfigError: the model has no token for the language or the task.
        """
        last = [] if timestamps else [self.no_timestamps]
        if not self.languages:
            if language not in (None, "en") or task == "translate":
                raise ConfigError(f"an English-only model cannot {task} {language}")
            return [self.start, *last]
        task_id = self.transcribe if task == "transcribe" else self.translate
        if language not in self.languages or task_id is None:
            raise ConfigError(f'the model has no token to {task} "{language}"')
        return [self.start, self.languages[language], task_id, *last]


def special_tokens(tokenizer: WhisperTokenizer, folder: ModelFolder) -> SpecialTokens:
    """Return the ids of a tokenizer's special tokens.

    Raises:
        ConfigError: a token is missing without which no Whisper can be run.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    try:
        start = vocabulary["<|startoftranscript|>"]
        end = vocabulary["<|endoftext|>"]
        no_timestamps = vocabulary["<|notimestamps|>"]
    except KeyError as error:
        raise ConfigError(f"{folder.processor}: the tokenizer has no token {error}") from None
    every_language = {code: vocabulary.get(f"<|{code}|>") for code in WHISPER_LANGUAGES}
    # After <|notimestamps|> come the timestamps, what people have added and, in some, padding.
    added = _added_words(tokenizer, end)
    times = range(no_timestamps + 1, no_timestamps + 2 + round(folder.window_seconds / TIME_STEP))
    # Words that were added to a tokenizer without timestamps have the ids of timestamps.
    lacks_times = times.stop > folder.config["vocab_size"] or not added.keys().isdisjoint(times)
    return SpecialTokens(
        start=start,
        end=end,
        no_timestamps=no_timestamps,
        transcribe=vocabulary.get("<|transcribe|>"),
        translate=vocabulary.get("<|translate|>"),
        no_speech=vocabulary.get("<|nospeech|>", vocabulary.get("<|nocaptions|>")),
        previous=vocabulary.get("<|startofprev|>"),
        timestamps=range(0) if lacks_times else times,
        languages={
            code: id
            for code, id in every_language.items()
            if id is not None and code in folder.languages
        },
        control=tuple(id for id in range(end + 1, folder.config["vocab_size"]) if id not in added),
        added=added,
    )


def _added_words(tokenizer: WhisperTokenizer, end: int) -> dict[int, str]:
    """Return id -> text of the tokens behind `end` that are no special tokens of any kind."""
    return {
        id: token.content
        for id, token in tokenizer.added_tokens_decoder.items()
        if id > end and is_added_word(token.content, token.special)
    }
