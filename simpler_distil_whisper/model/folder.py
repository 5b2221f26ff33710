"""The facts of a Whisper model folder, read from its JSON files without loading torch or weights.

Owns the checks by which a wrong path, a missing file or an unknown language ends a script within a
second. It knows nothing of tensors; `weights.py` reads those, `whisper.py` loads the model.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.options import Dtype
from simpler_distil_whisper.text.languages import WHISPER_LANGUAGES

FRAMES_PER_POSITION = 2  # the encoder's second convolution halves the log-mel frames
SECONDS_PER_FRAME = 0.01
ENGLISH_ONLY_VOCABULARY = 51_864  # openai/whisper: every multilingual vocabulary is larger

# Keys of config.json that the scripts read before they load the model; every Whisper has them all.
SIZES = (
    "vocab_size",
    "num_mel_bins",
    "max_source_positions",
    "max_target_positions",
    "encoder_layers",
    "decoder_layers",
)
FEATURE_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class ModelFolder:
    """Facts of one model folder.

    Attributes:
        path: the folder of weights and config.json.
        processor: the folder of tokenizer and feature extractor; often the same.
        config: config.json.
        languages: codes that the tokenizer has a token for; empty for an English-only model.
    """

    path: Path
    processor: Path
    config: dict[str, Any]
    languages: frozenset[str]

    @property
    def window_frames(self) -> int:
        """How many log-mel frames the encoder takes: 3000 for every released Whisper."""
        positions: int = self.config["max_source_positions"]
        return positions * FRAMES_PER_POSITION

    @property
    def window_seconds(self) -> float:
        """The longest audio that the encoder takes at once: 30 s for every released Whisper."""
        return self.window_frames * SECONDS_PER_FRAME

    @property
    def weight_bytes(self) -> int:
        """The size of the weights on disk."""
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))

    @property
    def stored_dtype(self) -> Dtype:
        """The dtype of the weights on disk, as config.json states it."""
        stated = self.config.get("dtype") or self.config.get("torch_dtype")
        if stated == "float16":
            return "float16"
        return "bfloat16" if stated == "bfloat16" else "float32"

    @property
    def row_languages(self) -> frozenset[str]:
        """The languages that rows of a manifest may name: "en" alone for an English-only model."""
        return self.languages or frozenset({"en"})

    def check_language(self, language: str | None, key: str) -> None:
        """Raise ConfigError if the model cannot be told to use `language` (None: detect it)."""
        if language is None or language in self.row_languages:
            return
        known = ", ".join(sorted(self.row_languages))
        raise ConfigError(f'{key}: {self.path} has no token for "{language}"; it has {known}')

    def check_copy_of(self, teacher: "ModelFolder") -> None:
        """Raise ConfigError unless this student takes the teacher's log-mels and tokens."""
        for key in ("vocab_size", "num_mel_bins", "max_source_positions"):
            if self.config[key] != teacher.config[key]:
                raise ConfigError(
                    f"student.path: {self.path} has {key} {self.config[key]}, the teacher "
                    f"{teacher.path} has {teacher.config[key]}: the student must be a copy of it "
                    "with fewer layers"
                )


def read_model_folder(path: Path, processor: Path | None, key: str) -> ModelFolder:
    """Return the facts of the model folder that the config key `key` names.

    Raises:
        ConfigError: it is no loadable Whisper folder; the message names what is missing.
    """
    if not path.is_dir():
        raise ConfigError(f"{key}.path: no such folder: {path}")
    config = _read_json(path / "config.json", key)
    if config.get("model_type") != "whisper":
        raise ConfigError(f"{key}.path: {path} is a {config.get('model_type')} model, not Whisper")
    if missing := [name for name in SIZES if not isinstance(config.get(name), int)]:
        raise ConfigError(f"{key}.path: {path / 'config.json'} states no {', '.join(missing)}")
    if not any(path.glob("*.safetensors")):
        hint = ""
        if any(path.glob("*.bin")):
            hint = ' (pickled weights are not read: "pytorch_model.bin" can run code)'
        raise ConfigError(f"{key}.path: {path} holds no *.safetensors weights{hint}")
    source = processor or path
    for files, what in ((FEATURE_FILES, "feature extractor"), (TOKENIZER_FILES, "tokenizer")):
        if not any((source / name).is_file() for name in files):
            raise ConfigError(
                f"{key}.processor: {source} holds no {what} ({' or '.join(files)}); name the "
                "folder that does, usually that of the model from which this one was fine-tuned"
            )
    return ModelFolder(path, source, config, _languages(path, source, config, key))


def _languages(path: Path, processor: Path, config: dict[str, Any], key: str) -> frozenset[str]:
    """Return the codes of the languages that have a token; empty for an English-only model."""
    generation = path / "generation_config.json"
    settings = _read_json(generation, key) if generation.is_file() else {}
    multilingual = settings.get("is_multilingual")
    if multilingual is None:
        multilingual = config.get("vocab_size") != ENGLISH_ONLY_VOCABULARY
    if not multilingual:
        return frozenset()
    tokens = set(settings.get("lang_to_id") or ())
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"):
        if not tokens and (processor / name).is_file():
            text = (processor / name).read_text(encoding="utf-8")
            tokens = set(re.findall(r"<\|[a-z]{2,3}\|>", text))
    return frozenset(token.strip("<|>") for token in tokens) & WHISPER_LANGUAGES.keys()


def _read_json(path: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}.path: {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{key}.path: {path} holds no JSON object")
    return content
