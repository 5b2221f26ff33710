"""Loading and saving model folders: special tokens, complete folders, saves that are killed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import make_model_folder
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.whisper import Whisper, copy_processor, load_whisper, save_whisper

LANGUAGES = ["en", "zh"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path / "model", languages=LANGUAGES)


def loaded(folder: Path, **options: str) -> Whisper:
    return load_whisper(read_model_folder(folder, None, "model"), **options)


def test_prompts_by_hand(folder: Path) -> None:
    # 256 byte tokens, then end, start, en, zh, translate, transcribe, startoflm, startofprev, ...
    tokens = loaded(folder).tokens
    assert (tokens.end, tokens.start, tokens.no_speech, tokens.no_timestamps) == (
        256,
        257,
        264,
        265,
    )
    assert tokens.languages == {"en": 258, "zh": 259}
    assert tokens.prompt("zh", "transcribe") == [257, 259, 261, 265]
    assert tokens.prompt("en", "translate") == [257, 258, 260, 265]


@pytest.mark.parametrize(("language", "task"), [("fr", "transcribe"), (None, "transcribe")])
def test_a_multilingual_model_must_be_told_a_language_that_it_has(
    folder: Path, language: str | None, task: str
) -> None:
    with pytest.raises(ConfigError, match="no token"):
        loaded(folder).tokens.prompt(language, task)


def test_no_control_token_is_text_and_no_text_is_control(tmp_path: Path) -> None:
    """Some pad the vocabulary for speed: what follows the timestamps is no text either."""
    whisper = loaded(make_model_folder(tmp_path, languages=LANGUAGES, vocab_size=400))
    assert whisper.tokens.control == tuple(range(257, 400))


def test_an_older_name_of_the_silence_token(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<|nospeech|>", "<|nocaptions|>"))
    assert loaded(folder).tokens.no_speech == 264


def test_a_tokenizer_that_is_not_whispers_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<|notimestamps|>", "<|something|>"))
    with pytest.raises(ConfigError, match="<|notimestamps|>"):
        loaded(folder)


def test_a_loaded_model_is_ready_to_be_run(folder: Path) -> None:
    whisper = loaded(folder)
    assert not whisper.model.training
    assert whisper.window_seconds == 2.0
    assert whisper.model.config._attn_implementation == "sdpa"
    assert loaded(folder, attention="eager").model.config._attn_implementation == "eager"


@pytest.mark.skipif(bool(importlib.util.find_spec("flash_attn")), reason="it is installed")
def test_attention_that_is_not_installed_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?i)flash"):
        loaded(folder, attention="flash_attention_2")


def test_saving_and_loading_changes_no_weight(tmp_path: Path, folder: Path) -> None:
    before = loaded(folder)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "layer_map.json").write_text("{}")
    save_whisper(before.model, before.processor_folder, copy)
    after = loaded(copy)
    weights = after.model.state_dict()
    for name, weight in before.model.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert after.tokens == before.tokens
    assert (copy / "layer_map.json").exists(), "what else is in the folder stays"
    modes = {path.stat().st_mode for path in copy.iterdir()}
    assert len(modes) == 1, "who may read one file may read the weights"


@pytest.mark.parametrize("moved", [0, 1, 4])
def test_a_killed_save_leaves_no_half_model(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    whisper = loaded(folder)
    target = tmp_path / "final"
    target.mkdir()
    moves: list[Path] = []
    move = Path.replace

    def killed(source: Path, goal: Path) -> Path:
        if len(moves) == moved:
            raise KeyboardInterrupt
        moves.append(source)
        return move(source, goal)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        save_whisper(whisper.model, whisper.processor_folder, target)
    assert len(moves) == moved
    with pytest.raises(ConfigError):
        read_model_folder(target, None, "model")
    save_whisper(whisper.model, whisper.processor_folder, target)
    loaded(target)
    assert not (target / ".writing").exists()


def test_the_processor_of_a_new_folder_is_made_readable_for_old_programs(tmp_path: Path) -> None:
    source = make_model_folder(tmp_path / "m", languages=LANGUAGES, mels=128)
    settings = json.loads((source / "preprocessor_config.json").read_text())
    (source / "preprocessor_config.json").unlink()
    (source / "processor_config.json").write_text(json.dumps({"feature_extractor": settings}))
    target = tmp_path / "copy"
    target.mkdir()
    copy_processor(source, target)
    assert json.loads((target / "preprocessor_config.json").read_text())["feature_size"] == 128


def test_two_names_of_one_tensor_stay_one(folder: Path) -> None:
    model: WhisperForConditionalGeneration = loaded(folder).model
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


@pytest.mark.parametrize(
    ("value", "dtype", "remedy"),
    [
        (torch.nan, "float32", "the file is damaged"),
        (-torch.inf, "float32", "the file is damaged"),
        (1e30, "float16", 'some are too large for torch.float16: set the dtype "float32"'),
    ],
)
def test_weights_that_are_not_finite_are_named(
    folder: Path, value: float, dtype: str, remedy: str
) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        model.model.encoder.layers[1].fc1.bias[5] = value
    model.save_pretrained(folder)
    with pytest.raises(ConfigError, match=rf"model.encoder.layers.1.fc1.bias are not.*{remedy}"):
        loaded(folder, dtype=dtype)


def test_alignment_heads_of_the_teacher_are_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "generation_config.json"
    settings = json.loads(path.read_bytes())
    path.write_text(json.dumps({**settings, "alignment_heads": [[25, 6], [1, 0], [0, 9]]}))
    assert loaded(folder).model.generation_config.alignment_heads == [[1, 0]]
    assert "alignment_heads: 2 of 3 are not in this model" in caplog.text


def test_settings_that_transformers_does_not_write_are_left_out(
    folder: Path, tmp_path: Path
) -> None:
    path = folder / "generation_config.json"
    unused = {"temperature": 0.2, "top_k": 5, "length_penalty": 2.0, "output_scores": True}
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **unused, "max_length": 100}))
    whisper = loaded(folder)
    save_whisper(whisper.model, folder, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_bytes())
    assert not unused.keys() & saved.keys()
    assert saved["max_length"] == 100


@pytest.mark.parametrize(
    ("stated", "saved"), [(None, 256), (5, 256), ([5], 256), (256, 256), ([5, 256], [5, 256])]
)
def test_a_saved_model_ends_with_its_tokenizers_end_token(
    folder: Path, tmp_path: Path, stated: object, saved: object
) -> None:
    for path in (folder / "config.json", folder / "generation_config.json"):
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "eos_token_id": stated}))
    save_whisper(loaded(folder).model, folder, tmp_path / "saved")
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert model.generation_config.eos_token_id == saved


def with_tokens(folder: Path, **ids: int) -> Path:
    """Write tokens that the tokenizer lacks, or has under other ids, into its config."""
    path = folder / "tokenizer_config.json"
    tokens = json.loads((folder / "tokenizer.json").read_bytes())["added_tokens"]
    known = {token.pop("id"): token for token in tokens}
    known |= {id: known[257] | {"content": f"<|{name}|>"} for name, id in ids.items()}
    settings = json.loads(path.read_bytes()) | {"added_tokens_decoder": known}
    path.write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_a_token_that_would_move_the_ids_of_others_is_refused_unloaded(
    folder: Path, file: str
) -> None:
    if file == "added_tokens.json":
        (folder / file).write_text(json.dumps({"<|new|>": 0}))
    else:
        with_tokens(folder, new=0)
    with pytest.raises(ConfigError, match=r"contradict each other: 2 tokens are 0: <\|new\|>, !;"):
        read_model_folder(folder, None, "model")


def test_one_file_may_have_another_name_of_a_special_token(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<|nocaptions|>": 264}))
    assert loaded(folder).tokens.no_speech == 264


def test_tokenizer_files_that_contradict_each_other_are_refused(folder: Path) -> None:
    """What is loaded is compared with what the files state."""
    with pytest.raises(ConfigError, match="files of the tokenizer contradict each other"):
        loaded(with_tokens(folder, zh=258, en=259))


def test_an_error_of_a_library_is_a_message_about_the_folder(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "mask_time_length": "x"}))
    with pytest.raises(ConfigError, match="cannot be loaded: .*mask_time_length"):
        loaded(folder)
