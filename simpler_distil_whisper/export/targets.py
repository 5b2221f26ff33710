"""Which models other programs can take, known without loading them or the model.

Owns the checks that cost nothing, so that a config that cannot work ends the command at once.
"""

import importlib.metadata
from collections.abc import Iterator
from typing import Literal

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.folder import LISTED, ModelFolder
from simpler_distil_whisper.model.settings import read_added_words

Format = Literal["ctranslate2", "openai"]

REQUIRED_PACKAGES: dict[Format, tuple[str, ...]] = {
    "ctranslate2": ("ctranslate2", "faster-whisper"),
    "openai": ("openai-whisper",),
}
OPENAI_WINDOW_SECONDS = 30
OPENAI_VOCABULARIES = (51_864, 51_865, 51_866)  # English-only; multilingual; large-v3
FEWEST_MULTILINGUAL_TOKENS = 51_865  # by which programs tell whether a model is multilingual


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


def why_not_faster_whisper(folder: ModelFolder) -> str | None:
    """Return why faster-whisper cannot take a model that CTranslate2 itself can; None: it can."""
    if folder.window_seconds != OPENAI_WINDOW_SECONDS:
        return _other_window(folder)
    size = folder.config["vocab_size"]
    if (size >= FEWEST_MULTILINGUAL_TOKENS) != bool(folder.languages):
        taken_for = "English-only" if folder.languages else "multilingual"
        return f"a model with a vocabulary of {size} tokens is taken for {taken_for}"
    # It takes every token behind the end token for a special one.
    if words := read_added_words(folder.processor, folder.vocabulary["<|endoftext|>"]):
        named = ", ".join(words[:LISTED])
        return f"it would leave the words out that were added to the vocabulary: {named}"
    return None


def _other_window(folder: ModelFolder) -> str:
    return f"its window is {folder.window_seconds:g} s, there it is {OPENAI_WINDOW_SECONDS} s"
