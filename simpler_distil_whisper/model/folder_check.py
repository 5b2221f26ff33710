"""Reads all files of a model folder but the weights' values, and lists every problem at once.

Owns what must fit together: weights, config.json, generation_config.json, tokenizer and feature
extractor. What a single file must be like is for `settings.py` and `headers.py`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.headers import (
    StoredTensor,
    size_problems,
    sizes_of,
    stored_tensors,
    unused_tensors,
)
from simpler_distil_whisper.model.settings import (
    ConfigSettings,
    FeatureSettings,
    GenerationSettings,
    checked,
    read_features,
    read_json,
    read_vocabulary,
)
from simpler_distil_whisper.run import log

FRAMES_PER_POSITION = 2  # the encoder's second convolution halves the log-mel frames
FRAMES_PER_SECOND = 100
FEATURE_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
REQUIRED_TOKENS = ("<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>")

Sizes = Mapping[str, int]  # as the weights show them; empty where these cannot be read
Content = TypeVar("Content")


class FolderContent(NamedTuple):
    """What the files of a model folder hold, checked."""

    config: dict[str, Any]
    generation: GenerationSettings
    vocabulary: dict[str, int]


class _Problems:
    """What is wrong with a folder; where a file cannot be read, the others still are."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, key: str, problems: Iterable[str]) -> None:
        """Add problems, each with the config key that names the folder."""
        self.lines += [f"{key}: {problem}" for problem in problems]

    def attempt(self, key: str, read: Callable[..., Content], *arguments: object) -> Content | None:
        """Return what `read` returns; None if it raises ConfigError, whose lines are noted."""
        try:
            return read(*arguments)
        except ConfigError as error:
            self.note(key, str(error).splitlines())
            return None


def read_content(path: Path, processor: Path, key: str) -> FolderContent:
    """Return what the files of a model folder hold, if all of them can be used together.

    Raises:
        ConfigError: they cannot; the message lists every problem, one per line.
    """
    problems = _Problems()
    tensors = problems.attempt(f"{key}.path", stored_tensors, path)
    sizes = None if tensors is None else problems.attempt(f"{key}.path", sizes_of, path, tensors)
    tensors, sizes = tensors or {}, sizes or {}
    config = _read_config(path, tensors, sizes, key, problems)
    generation = _read_generation(path, sizes, key, problems)
    vocabulary = _read_processor(path, processor, sizes, generation, key, problems)
    if problems.lines:
        raise ConfigError("\n".join(problems.lines))
    if unused := unused_tensors(sizes, tensors):
        names = ", ".join(unused[:3])
        log.warning("%s: %d tensors that no Whisper has are not used: %s", path, len(unused), names)
    return FolderContent(config, generation, vocabulary)


def _read_config(
    path: Path, tensors: dict[str, StoredTensor], sizes: Sizes, key: str, problems: _Problems
) -> dict[str, Any]:
    file = path / "config.json"
    config = problems.attempt(f"{key}.path", read_json, file)
    if config is None:
        return {}
    problems.attempt(f"{key}.path", checked, ConfigSettings, config, file, sizes)
    if sizes:
        problems.note(f"{key}.path", size_problems(file, config, sizes, tensors))
    return config


def _read_generation(path: Path, sizes: Sizes, key: str, problems: _Problems) -> GenerationSettings:
    file = path / "generation_config.json"
    settings = None
    if file.is_file() and (content := problems.attempt(f"{key}.path", read_json, file)):
        settings = problems.attempt(
            f"{key}.path", checked, GenerationSettings, content, file, sizes
        )
    return settings or GenerationSettings()


def _read_processor(
    path: Path,
    processor: Path,
    sizes: Sizes,
    generation: GenerationSettings,
    key: str,
    problems: _Problems,
) -> dict[str, int]:
    """Return the vocabulary; note what is wrong with the tokenizer and the feature extractor."""
    key = f"{key}.processor"
    if missing := list(_missing_parts(processor)):
        problems.note(key, missing)
        return {}
    features = problems.attempt(key, read_features, processor)
    vocabulary = problems.attempt(key, read_vocabulary, processor)
    misfits: list[str] = []
    if features and sizes:
        misfits += _feature_misfits(features, sizes, path)
    if vocabulary is not None:
        misfits += _vocabulary_misfits(vocabulary, sizes, generation, path)
    remedy = "set the processor of the right model"
    problems.note(key, (f"{processor}: {misfit}; {remedy}" for misfit in misfits))
    return vocabulary or {}


def _missing_parts(processor: Path) -> Iterator[str]:
    for files, what in ((FEATURE_FILES, "feature extractor"), (TOKENIZER_FILES, "tokenizer")):
        if not any((processor / name).is_file() for name in files):
            yield (
                f"{processor} holds no {what} ({' or '.join(files)}); name the folder that does, "
                "usually that of the model from which this one was fine-tuned"
            )
    is_early = (processor / "vocab.json").is_file() and not (processor / "tokenizer.json").is_file()
    if is_early and not (processor / "merges.txt").is_file():
        yield f"{processor} holds no merges.txt, without which vocab.json is of no use: get it too"


def _feature_misfits(features: FeatureSettings, sizes: Sizes, path: Path) -> Iterator[str]:
    """Yield what of a feature extractor is another model's."""
    mels, seconds = sizes["num_mel_bins"], window_seconds(sizes)
    if features.feature_size != mels:
        yield f"makes {features.feature_size} mel bins, {path} takes {mels}"
    if features.chunk_length != seconds:
        yield f"makes windows of {features.chunk_length} s, {path} takes {seconds:g} s"


def _vocabulary_misfits(
    vocabulary: Mapping[str, int], sizes: Sizes, generation: GenerationSettings, path: Path
) -> Iterator[str]:
    """Yield what of a tokenizer is another model's, or no Whisper's."""
    for token in REQUIRED_TOKENS:
        if token not in vocabulary:
            yield f"the tokenizer has no token {token}"
    last = max(vocabulary.values(), default=0)
    if sizes and last >= sizes["vocab_size"]:
        yield f"has tokens up to {last}, {path} knows {sizes['vocab_size']}"
    if len(set(vocabulary.values())) < len(vocabulary):
        id, count = Counter(vocabulary.values()).most_common(1)[0]
        names = ", ".join(token for token, each in vocabulary.items() if each == id)
        yield f"the tokenizer's files contradict each other: {count} tokens are {id}: {names:.80}"
    # Ids can differ though the sizes fit: large-v3 has one language, and so one token, more.
    for token, theirs in (
        ("<|startoftranscript|>", generation.decoder_start_token_id),
        ("<|notimestamps|>", generation.no_timestamps_token_id),
    ):
        ours = vocabulary.get(token)
        if None not in (ours, theirs) and ours != theirs:
            yield f"its {token} is token {ours}, that of {path} is {theirs}"


def window_seconds(sizes: Mapping[str, Any]) -> float:
    """Return the longest audio that the encoder takes at once."""
    frames: int = sizes["max_source_positions"] * FRAMES_PER_POSITION
    return frames / FRAMES_PER_SECOND
