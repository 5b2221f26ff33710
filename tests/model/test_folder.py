"""The facts of a model folder, and the mistakes in one that cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from tiny import make_model_folder, make_tokenizer, save_processor

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder

Make = Callable[..., Path]
EMBEDDING = "model.decoder.embed_tokens.weight"
FC1, FC2 = (f"model.decoder.layers.0.{name}.weight" for name in ("fc1", "fc2"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of English and Chinese with the window of the released ones."""
    folder = tmp_path_factory.mktemp("whole")
    return make_model_folder(folder, languages=["en", "zh"], window_seconds=30)


@pytest.fixture
def make(whole: Path, tmp_path: Path) -> Make:
    """Copy the model without some files, and with other values of some keys of JSON files."""

    def make(*without: str, name: str = "m", **changes: dict[str, Any] | str | bytes) -> Path:
        folder = shutil.copytree(whole, tmp_path / name)
        for file, change in changes.items():
            path = folder / file.replace("__", ".")
            if isinstance(change, dict):
                change = json.dumps(json.loads(path.read_bytes()) | change)
            path.write_bytes(change if isinstance(change, bytes) else change.encode())
        for file in without:
            (folder / file).unlink()
        return folder

    return make


def read(folder: Path, processor: Path | None = None) -> ModelFolder:
    return read_model_folder(folder, processor, "teacher")


def test_weights_that_are_not_looked_at_are_refused(make: Make) -> None:
    folder = make(config__json={"transformers_weights": "other.safetensors"})
    with pytest.raises(ConfigError, match=r"config\.json: transformers_weights"):
        read(folder)


def test_a_window_of_thirty_seconds(whole: Path) -> None:
    folder = read(whole)
    assert folder.window_seconds == 30.0
    assert folder.processor == folder.path == whole
    assert folder.languages == folder.row_languages == {"en", "zh"}
    assert folder.weight_bytes == (whole / "model.safetensors").stat().st_size


def test_a_short_window_comes_from_the_encoders_positions(tmp_path: Path) -> None:
    assert read(make_model_folder(tmp_path, window_seconds=5)).window_seconds == 5.0


def test_without_a_generation_config_the_tokenizer_knows_the_languages(make: Make) -> None:
    assert read(make("generation_config.json")).languages == {"en", "zh"}
    # One saved by an early version has the file but not the languages.
    early = make(name="early", generation_config__json='{"max_length": 448}')
    assert read(early).languages == {"en", "zh"}


def test_early_tokenizers_list_added_tokens_in_a_file_of_their_own(make: Make) -> None:
    folder = make("generation_config.json")
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    first = {token: id for token, id in added.items() if id < 260}
    others = {str(id): {"content": token} for token, id in added.items() if id >= 260}
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "added_tokens.json").write_text(json.dumps(first))
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": others}))
    expected = read(folder)
    (folder / "tokenizer.json").unlink()
    assert read(folder) == expected
    (folder / "merges.txt").unlink()
    with pytest.raises(ConfigError, match=r"teacher.processor: .* holds no merges.txt"):
        read(folder)


def test_an_english_only_model_takes_english_alone(make: Make) -> None:
    folder = read(make(generation_config__json={"is_multilingual": False}))
    assert folder.languages == frozenset()
    assert folder.row_languages == {"en"}
    folder.check_language_and_task("en", "transcribe", "decoding")
    with pytest.raises(ConfigError, match='decoding.language: .* has no token for "zh"; it has en'):
        folder.check_language_and_task("zh", "transcribe", "decoding")
    with pytest.raises(ConfigError, match="decoding.task: .* is an English-only model"):
        folder.check_language_and_task(None, "translate", "decoding")


def test_a_language_that_the_model_lacks_is_refused_by_key(whole: Path) -> None:
    folder = read(whole)
    for known in (None, "zh", "en"):
        folder.check_language_and_task(known, "translate", "data")
    with pytest.raises(ConfigError, match='data.language: .* for "yue"; it has en, zh'):
        folder.check_language_and_task("yue", "transcribe", "data")


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("config.json", "{", "teacher.path: .*config.json cannot be read"),
        ("config.json", "[" * 100_000, "teacher.path: .*config.json cannot be read"),
        ("config.json", "[]", "teacher.path: .*config.json holds no JSON object"),
        ("config.json", {"decoder_layers": 10**6}, "decoder_layers is 1000000, by the weights it"),
        ("config.json", {"d_model": None}, "d_model is missing, by the weights it is 16"),
        ("config.json", {"vocab_size": "1775"}, "vocab_size is '1775', by the weights it is 17"),
        ("config.json", {"encoder_attention_heads": 3}, "heads: does not divide d_model, which"),
        ("config.json", {"dropout": float("nan")}, "config.json: dropout: .*finite number"),
        ("config.json", {"suppress_tokens": [7, 99_999]}, "suppress_tokens.1: is beyond the voc"),
        ("generation_config.json", "{", "generation_config.json cannot be read"),
        ("generation_config.json", {"suppress_tokens": [1775]}, "whose last token is 1766"),
        ("generation_config.json", {"lang_to_id": {"<|zh|>": 9999}}, "lang_to_id.<|zh|>: is bey"),
        ("generation_config.json", {"alignment_heads": [3]}, "alignment_heads.0: Input should be"),
        ("preprocessor_config.json", {"hop_length": 80}, "processor: .* hop_length: .* be 160"),
        ("preprocessor_config.json", {"n_fft": 512}, "processor: .* n_fft: .* be 400"),
        ("preprocessor_config.json", {"feature_size": 128}, "makes 128 mel bins, .* takes 80"),
        ("preprocessor_config.json", {"chunk_length": 5}, "makes windows of 5 s, .* takes 30 s"),
        ("tokenizer.json", "{}", "processor: .*tokenizer.json holds no tokenizer that can be re"),
        ("tokenizer.json", b"\xff", "processor: .*tokenizer.json holds no tokenizer that can"),
        ("model.safetensors", b"", "model.safetensors: damaged or incomplete"),
        ("model.safetensors", b"version https://git-lfs.github.com", "pointer of Git LFS: run"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_key(
    make: Make, file: str, change: dict[str, Any] | str | bytes, problem: str
) -> None:
    folder = make(**{file: change})
    with pytest.raises(ConfigError, match=problem):
        read(folder)


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("config.json", "teacher.path: .* is no model folder: it holds no config.json"),
        ("model.safetensors", "teacher.path: .* holds no model.safetensors"),
        ("preprocessor_config.json", "teacher.processor: .* holds no feature extractor"),
        ("tokenizer.json", "teacher.processor: .* holds no tokenizer"),
    ],
)
def test_a_missing_file_is_named(make: Make, file: str, problem: str) -> None:
    folder = make(file)
    with pytest.raises(ConfigError, match=problem):
        read(folder)


def test_every_problem_stands_in_a_line(make: Make) -> None:
    folder = make(
        config__json={"encoder_layers": 9, "dropout": 2},
        generation_config__json={"suppress_tokens": "none"},
        preprocessor_config__json={"sampling_rate": 8000},
        tokenizer__json="",
    )
    with pytest.raises(ConfigError) as caught:
        read(folder)
    keys = [line.partition(": ")[0] for line in str(caught.value).splitlines()]
    assert keys == ["teacher.path"] * 3 + ["teacher.processor"] * 2


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: w.pop("model.encoder.conv2.bias"), "weights are missing: encoder.conv2.bias$"),
        (lambda w: w.pop("model.encoder.conv1.weight"), "weights are missing: encoder.conv1.weig"),
        (lambda w: w.update({FC1: w[FC1][:-1]}), r"decoder_ffn_dim is 32, by the weights it is 31"),
        (lambda w: w.update({FC1: w[FC1].astype("int8")}), "weights are I8, not floating point"),
        (lambda w: w.update({FC2: w[FC2].T.copy()}), r"shape \(32, 16\) instead of \(16, 32\): de"),
        (dict.clear, "weights are missing"),
        (
            lambda w: w.update({"encoder.blocks.0.mlp.0.bias": w.pop(EMBEDDING)}),
            "names of openai-whisper and MLX: name the model in transformers' format$",
        ),
    ],
)
def test_weights_that_are_no_whole_whisper_are_named(
    make: Make, change: Change, problem: str
) -> None:
    folder = make()
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=problem):
        read(folder)


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({"a": "../model.safetensors"}, "'../model.safetensors' is no name of a file in this fol"),
        ({"a": "/etc/passwd"}, "'/etc/passwd' is no name of a file in this folder"),
        ({"a": 1}, "1 is no name of a file in this folder"),
        ({"a": "model-1.safetensors"}, "names model-1.safetensors, which is missing"),
        ({}, "is empty"),
        ([], 'no "weight_map" can be read'),
    ],
)
def test_an_index_must_name_files_of_the_folder(
    make: Make, weight_map: object, problem: str
) -> None:
    folder = make("model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-2.safetensors").touch()
    with pytest.raises(ConfigError, match=problem):
        read(folder)


def test_settings_of_later_and_other_programs_may_stand_in_the_files(make: Make) -> None:
    """What is not relied on is not checked; ids may be null, or several for the end."""
    folder = make(
        config__json={"eos_token_id": [256, 257], "pad_token_id": None, "new_key": [None]},
        generation_config__json={"forced_decoder_ids": [[1, None]], "alignment_heads": [[25, 6]]},
        preprocessor_config__json={"mel_filters": [[0.0]], "processor_class": "WhisperProcessor"},
    )
    assert read(folder).languages == {"en", "zh"}


def test_tensors_that_no_whisper_has_are_named(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make()
    weights = load_file(folder / "model.safetensors")
    weights["ctc_head.weight"] = weights["model.encoder.conv1.bias"]
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    read(folder)
    assert "1 tensors that no Whisper has are not used: ctc_head.weight" in caplog.text


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        ({"languages": ["en", "zh"]}, {"languages": ["en"]}, "vocab_size 367, the teacher .* 366"),
        ({"window_seconds": 1}, {}, "has max_source_positions 50, the teacher .* has 100"),
        ({"max_target_positions": 100}, {}, "max_target_positions 100, the teacher .* has 448"),
        ({"mels": 128}, {"mels": 80}, "has num_mel_bins 128, the teacher .* has 80"),
        (
            {"languages": ["en", "zh"]},
            {"languages": ["en", "ja"]},
            r"has as token 259 <\|zh\|>, the teacher .* has <\|ja\|>",
        ),
    ],
)
def test_a_student_must_have_the_teachers_tokens_and_log_mels(
    tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], difference: str
) -> None:
    student = read(make_model_folder(tmp_path / "s", **{"window_seconds": 2, **ours}))
    teacher = read(make_model_folder(tmp_path / "t", window_seconds=2, **theirs))
    with pytest.raises(ConfigError, match=difference):
        student.check_copy_of(teacher)


def test_a_student_may_have_an_early_tokenizer(make: Make) -> None:
    """The first tokenizers on the Hub ended with <|notimestamps|>; the model knows them all."""
    teacher = make()
    save_processor(student := make(name="s"), make_tokenizer(["en", "zh"], -1), 80, 30)
    read(student).check_copy_of(read(teacher))


def test_the_processor_may_be_another_folder(make: Make, tmp_path: Path) -> None:
    tuned = make("preprocessor_config.json", "tokenizer.json", "generation_config.json")
    folder = read(tuned, make(name="base"))
    assert (folder.path, folder.processor) == (tuned, tmp_path / "base")
    assert folder.languages == {"en", "zh"}
    with pytest.raises(ConfigError, match=r"teacher.processor: .*nowhere holds no"):
        read(tuned, tmp_path / "nowhere")


def test_both_ways_of_saving_a_processor_are_known(make: Make) -> None:
    folder = make()
    extractor = json.loads((folder / "preprocessor_config.json").read_bytes())
    (folder / "preprocessor_config.json").unlink()
    new = folder / "processor_config.json"
    new.write_text(json.dumps({"feature_extractor": extractor}))
    assert read(folder).processor == folder
    new.write_text("{}")
    with pytest.raises(ConfigError, match="processor_config.json holds no feature_extractor"):
        read(folder)


def test_without_a_generation_config_an_english_only_model_is_known_by_its_size(
    tmp_path: Path,
) -> None:
    english = make_model_folder(tmp_path, english_only=True, vocab_size=51_864, width=4)
    (english / "generation_config.json").unlink()
    assert read(english).languages == frozenset()
