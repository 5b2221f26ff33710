"""Which models other programs can take, known without loading them or the model.

Owns the checks that cost nothing, so that a config that cannot work ends the command at once.
"""

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Literal

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.folder import LISTED, ModelFolder
from simpler_distil_whisper.model.settings import read_added_words
from simpler_distil_whisper.text.languages import WHISPER_LANGUAGES

Format = Literal["ctranslate2", "openai", "ggml"]

PROGRAMS: dict[Format, str] = {
    "ctranslate2": "CTranslate2",
    "openai": "openai-whisper",
    "ggml": "whisper.cpp",
}
REQUIRED_PACKAGES: dict[Format, tuple[str, ...]] = {
    "ctranslate2": ("ctranslate2", "faster-whisper"),
    "openai": ("openai-whisper",),
    "ggml": ("pywhispercpp",),
}
OPENAI_WINDOW_SECONDS = 30
OPENAI_VOCABULARIES = (51_864, 51_865, 51_866)  # English-only; multilingual; large-v3
FEWEST_MULTILINGUAL_TOKENS = 51_865  # by which programs tell whether a model is multilingual
OPENAI_TOKENS_BUT_LANGUAGES = 51_765  # one more where there are several languages
OPENAI_TEXT_TOKENS = 50_256  # likewise


def refuse_missing_packages(target: Format) -> None:
    """Raise ConfigError if a program that the format is made for is not installed."""
    for package in REQUIRED_PACKAGES[target]:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(
                f'variants: the format "{target}" is written and verified with {package}, which '
                "is not installed: python -m pip install './[export]'"
            ) from None


def refuse_unsuitable(target: Format, folder: ModelFolder) -> None:
    """Raise ConfigError, with every reason, if the program of a format cannot take a model."""
    checks: dict[Format, Callable[[ModelFolder], Iterator[str]]]
    checks = {"openai": why_not_openai, "ggml": why_not_whisper_cpp}
    if target in checks and (reasons := list(checks[target](folder))):
        raise ConfigError(
            f"variants: {folder.path} cannot become a model of {PROGRAMS[target]}: "
            + "; ".join(reasons)
        )


def why_not_openai(folder: ModelFolder) -> Iterator[str]:
    """Yield each reason why openai-whisper, in which much is fixed, cannot take a model."""
    config, width = folder.config, folder.config.get("d_model", 0)
    if folder.window_seconds != OPENAI_WINDOW_SECONDS:
        yield _other_window(folder)
    if config["vocab_size"] not in OPENAI_VOCABULARIES:
        known = ", ".join(map(str, OPENAI_VOCABULARIES))
        yield f"its vocabulary has {config['vocab_size']} tokens; OpenAI's own, built in, {known}"
    built_in = {
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
    }
    for key, expected in built_in.items():
        value = config.get(key, expected)
        if value != expected:
            yield f"its {key} is {value}, there it is {expected}"


def openai_language_count(vocab_size: int) -> int:
    """Return how many languages a vocabulary of this size has, if it is one of OpenAI's."""
    return vocab_size - OPENAI_TOKENS_BUT_LANGUAGES - (vocab_size >= FEWEST_MULTILINGUAL_TOKENS)


def why_not_whisper_cpp(folder: ModelFolder) -> Iterator[str]:
    """Yield each reason why whisper.cpp cannot take a model.

    As much is fixed as in openai-whisper, but text tokens may be any: the file brings them along.
    """
    if reasons := list(why_not_openai(folder)):
        yield from reasons
        return
    if reason := _taken_for_other(folder):
        yield reason
    size = folder.config["vocab_size"]
    names = ["endoftext", "startoftranscript"]
    names += list(WHISPER_LANGUAGES)[: openai_language_count(size)]
    names += ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    end = OPENAI_TEXT_TOKENS + (size >= FEWEST_MULTILINGUAL_TOKENS)
    for id, name in enumerate(names, end):
        if (actual := folder.vocabulary.get(f"<|{name}|>", id)) != id:
            yield f"<|{name}|>, token {id} there, is its token {actual}"
            return  # the others that follow are moved too


def why_not_faster_whisper(folder: ModelFolder) -> str | None:
    """Return why faster-whisper cannot take a model that CTranslate2 itself can; None: it can."""
    if folder.window_seconds != OPENAI_WINDOW_SECONDS:
        return _other_window(folder)
    if reason := _taken_for_other(folder):
        return reason
    # It takes every token behind the end token for a special one.
    if words := read_added_words(folder.processor, folder.vocabulary["<|endoftext|>"]):
        named = ", ".join(words[:LISTED])
        return f"it would leave the words out that were added to the vocabulary: {named}"
    return None


def _taken_for_other(folder: ModelFolder) -> str | None:
    size = folder.config["vocab_size"]
    if (size >= FEWEST_MULTILINGUAL_TOKENS) == bool(folder.languages):
        return None
    taken_for = "English-only" if folder.languages else "multilingual"
    return f"a model with a vocabulary of {size} tokens is taken for {taken_for}"


def _other_window(folder: ModelFolder) -> str:
    return f"its window is {folder.window_seconds:g} s, there it is {OPENAI_WINDOW_SECONDS} s"
