"""The facts of a model folder, and the mistakes in one that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder

# What the scripts read of openai/whisper-tiny's and -tiny.en's files.
CONFIG = {
    "model_type": "whisper",
    "vocab_size": 51865,
    "num_mel_bins": 80,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "max_source_positions": 1500,
    "max_target_positions": 448,
}
GENERATION = {"is_multilingual": True, "lang_to_id": {"<|en|>": 50259, "<|zh|>": 50260}}
TOKENS = '{"<|endoftext|>": 50257, "<|startoftranscript|>": 50258, "<|en|>": 1, "<|yue|>": 2}'


def make(folder: Path, *without: str, **files: Any) -> Path:
    """Write a folder as transformers 4 saves it, some files left out or replaced."""
    contents = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION,
        "model.safetensors": "weights",
        "preprocessor_config.json": {},
        "tokenizer.json": TOKENS,
    }
    contents |= {name.replace("__", "."): content for name, content in files.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name in contents.keys() - set(without):
        content = contents[name]
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def read(folder: Path, processor: Path | None = None) -> ModelFolder:
    return read_model_folder(folder, processor, "teacher")


def test_a_released_whisper_is_understood(tmp_path: Path) -> None:
    folder = read(make(tmp_path / "m"))
    assert (folder.window_frames, folder.window_seconds) == (3000, 30.0)
    assert folder.processor == folder.path == tmp_path / "m"
    assert folder.languages == folder.row_languages == {"en", "zh"}


def test_a_short_window_comes_from_the_encoders_positions(tmp_path: Path) -> None:
    config = {**CONFIG, "max_source_positions": 250}
    assert read(make(tmp_path / "m", config__json=config)).window_seconds == 5.0


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, "float32"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
        ({"torch_dtype": None}, "float32"),
    ],
)
def test_the_stored_dtype_has_an_old_and_a_new_key(
    tmp_path: Path, keys: dict[str, Any], dtype: str
) -> None:
    folder = read(make(tmp_path / "m", config__json={**CONFIG, **keys}))
    assert folder.stored_dtype == dtype


def test_without_a_generation_config_the_tokenizer_knows_the_languages(tmp_path: Path) -> None:
    assert read(make(tmp_path / "m", "generation_config.json")).languages == {"en", "yue"}
    # One saved by an early version has the file but not the languages.
    early = make(tmp_path / "early", generation_config__json={"max_length": 448})
    assert read(early).languages == {"en", "yue"}
    # Early tokenizers list the added tokens in a file of their own.
    slow = make(
        tmp_path / "slow",
        "generation_config.json",
        "tokenizer.json",
        vocab__json={"a": 1},
        added_tokens__json={"<|ja|>": 3, "<|transcribe|>": 4, "<|xx|>": 5},
    )
    assert read(slow).languages == {"ja"}


@pytest.mark.parametrize(
    "files",
    [
        {"generation_config__json": {"is_multilingual": False}},
        {
            "generation_config__json": {"max_length": 448},
            "config__json": {**CONFIG, "vocab_size": 51864},
        },
    ],
)
def test_an_english_only_model_takes_english_alone(tmp_path: Path, files: dict[str, Any]) -> None:
    folder = read(make(tmp_path / "m", **files))
    assert folder.languages == frozenset()
    assert folder.row_languages == {"en"}
    folder.check_language("en", "decoding.language")
    with pytest.raises(ConfigError, match='decoding.language: .* has no token for "zh"; it has en'):
        folder.check_language("zh", "decoding.language")


def test_a_language_that_the_model_lacks_is_refused_by_key(tmp_path: Path) -> None:
    folder = read(make(tmp_path / "m"))
    for known in (None, "zh", "en"):
        folder.check_language(known, "data.language")
    with pytest.raises(ConfigError, match='data.language: .* for "yue"; it has en, zh'):
        folder.check_language("yue", "data.language")


@pytest.mark.parametrize(
    ("without", "files", "problem"),
    [
        (["config.json"], {}, "teacher.path: .*config.json cannot be read"),
        ([], {"config__json": "{"}, "teacher.path: .*config.json cannot be read"),
        ([], {"config__json": "[]"}, "teacher.path: .*config.json holds no JSON object"),
        ([], {"config__json": {**CONFIG, "model_type": "wav2vec2"}}, "a wav2vec2 model, not Whi"),
        (
            [],
            {"config__json": {"model_type": "whisper"}},
            "config.json states no vocab_size, num_m",
        ),
        (["model.safetensors"], {}, r"teacher.path: .* holds no \*.safetensors weights$"),
        (
            ["model.safetensors"],
            {"pytorch_model__bin": "x"},
            r"holds no \*.safetensors weights \(pickled weights are not read",
        ),
        (["preprocessor_config.json"], {}, "teacher.processor: .* holds no feature extractor"),
        (["tokenizer.json"], {}, "teacher.processor: .* holds no tokenizer"),
        ([], {"generation_config__json": "{"}, "generation_config.json cannot be read"),
    ],
)
def test_of_a_folder_that_cannot_be_used_what_is_missing_is_named(
    tmp_path: Path, without: list[str], files: dict[str, Any], problem: str
) -> None:
    make(tmp_path / "m", *without, **files)
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path / "m")


@pytest.mark.parametrize("name", ["nowhere", "m/config.json"])
def test_a_path_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path / "m")
    with pytest.raises(ConfigError, match="teacher.path: no such folder"):
        read(tmp_path / name)


def test_the_processor_may_be_another_folder(tmp_path: Path) -> None:
    processor_files = ("preprocessor_config.json", "tokenizer.json")
    tuned = make(tmp_path / "tuned", "generation_config.json", *processor_files)
    folder = read(tuned, make(tmp_path / "base"))
    assert (folder.path, folder.processor) == (tuned, tmp_path / "base")
    assert folder.languages == {"en", "yue"}
    with pytest.raises(ConfigError, match=r"teacher.processor: .*nowhere holds no"):
        read(tuned, tmp_path / "nowhere")


def test_both_ways_of_saving_a_processor_are_known(tmp_path: Path) -> None:
    new = make(tmp_path / "m", "preprocessor_config.json", processor_config__json={})
    assert read(new).processor == new


def test_what_transformers_saves_is_understood(tmp_path: Path) -> None:
    from tiny import make_model_folder

    whole = make_model_folder(tmp_path / "m", languages=["zh", "en", "yue"], window_seconds=3)
    folder = read(whole)
    assert folder.languages == {"zh", "en", "yue"}
    assert folder.window_seconds == 3.0
    assert folder.stored_dtype == "float32"
    (whole / "generation_config.json").unlink()
    assert read(whole).languages == {"zh", "en", "yue"}
    english = make_model_folder(tmp_path / "en", languages=["en"], english_only=True)
    assert read(english).languages == frozenset()
