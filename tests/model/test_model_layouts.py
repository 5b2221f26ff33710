"""Every layout of published Whispers: used for labels, pruned and distilled, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import LANGUAGES, Setting, distil, logged, prune, weights_in, write_config
from safetensors.torch import load_file, save_file
from tiny import make_model_folder, make_tokenizer, save_processor, write_rows, write_tone
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.model.devices import torch_dtype
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.weights import stored_dtype
from simpler_distil_whisper.model.whisper import Whisper, load_whisper, save_whisper
from simpler_distil_whisper.text.languages import WHISPER_LANGUAGES

Model = WhisperForConditionalGeneration
NINETY_NINE, HUNDRED = list(WHISPER_LANGUAGES)[:99], list(WHISPER_LANGUAGES)[:100]

# Layers, mel bins and languages of the released models; only the width is small.
RELEASED: dict[str, dict[str, Any]] = {
    "tiny": {"encoder_layers": 4, "decoder_layers": 4, "languages": NINETY_NINE},
    "base": {"encoder_layers": 6, "decoder_layers": 6, "languages": NINETY_NINE},
    "small": {"encoder_layers": 12, "decoder_layers": 12, "languages": NINETY_NINE},
    "medium": {"encoder_layers": 24, "decoder_layers": 24, "languages": NINETY_NINE},
    "large-v2": {"encoder_layers": 32, "decoder_layers": 32, "languages": NINETY_NINE},
    "large-v3": {
        "encoder_layers": 32,
        "decoder_layers": 32,
        "languages": HUNDRED,
        "mels": 128,
    },
    "large-v3-turbo": {
        "encoder_layers": 32,
        "decoder_layers": 4,
        "languages": HUNDRED,
        "mels": 128,
    },
    "tiny.en": {
        "encoder_layers": 4,
        "decoder_layers": 4,
        "english_only": True,
        "vocab_size": 51864,
    },
    "distil-large-v3": {
        "encoder_layers": 32,
        "decoder_layers": 2,
        "languages": HUNDRED,
        "mels": 128,
    },
}

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(folder: Path, **layout: Any) -> Path:
    return make_model_folder(folder, **{"languages": LANGUAGES, **layout})


def float16(folder: Path) -> Path:
    return plain(folder, dtype=torch.float16)


def bfloat16(folder: Path) -> Path:
    return plain(folder, dtype=torch.bfloat16)


def sharded(folder: Path) -> Path:
    plain(folder)
    model = Model.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def without_generation_config(folder: Path, **layout: Any) -> Path:
    plain(folder, **layout)
    (folder / "generation_config.json").unlink()
    return folder


def english_without_generation_config(folder: Path) -> Path:
    return without_generation_config(folder, english_only=True, vocab_size=51864)


def saved_as_whisper_model(folder: Path) -> Path:
    """As the class WhisperModel saves it: without the head, and with shorter names."""
    Model.from_pretrained(plain(folder)).model.save_pretrained(folder)
    assert not any(name.startswith("model.") for name in load_file(folder / "model.safetensors"))
    return folder


def forced_ids(folder: Path) -> Path:
    """As the first checkpoints were: any requested language would silently lose to these."""
    plain(folder, talkative=True, seed=53)
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, forced_decoder_ids=[[1, 259], [2, 261], [3, 265]])
    return folder


def generation_settings_in_config(folder: Path) -> Path:
    """As openai's were before there was a generation_config.json."""
    without_generation_config(folder)
    edit(
        folder / "config.json",
        suppress_tokens=[1, 2, 3],
        begin_suppress_tokens=[4, 256],
        forced_decoder_ids=[[1, 259], [2, 261], [3, 265]],
        max_length=448,
        torch_dtype="float32",
    )
    return folder


def early_generation_config(folder: Path) -> Path:
    """Made from the config by a version that knew no languages yet."""
    plain(folder)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    for name in ("lang_to_id", "task_to_id", "is_multilingual", "no_timestamps_token_id"):
        del settings[name]
    path.write_text(json.dumps(settings))
    return folder


def tokenizer_without_timestamps(folder: Path) -> Path:
    """The first tokenizers on the Hub ended with <|notimestamps|>; the model knows them all."""
    vocabulary = json.loads((plain(folder) / "config.json").read_text())["vocab_size"]
    save_processor(folder, make_tokenizer(LANGUAGES, -1), 80, 2)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == vocabulary
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


UNUSUAL = [
    float16,
    bfloat16,
    sharded,
    without_generation_config,
    english_without_generation_config,
    forced_ids,
    generation_settings_in_config,
    early_generation_config,
    tokenizer_without_timestamps,
]


def loaded(folder: Path, processor: Path | None = None, **options: Any) -> Whisper:
    return load_whisper(read_model_folder(folder, processor, "model"), **options)


def label(folder: Path, audio: Path, language: str | None = None) -> tuple[str, str]:
    whisper = loaded(folder)
    features = log_mel([load_audio(audio)], whisper.feature_extractor)
    options = DecodingOptions(max_new_tokens=6)
    hypothesis = Transcriber(whisper, options)(features, [language])[0]
    assert 0 < hypothesis.token_count <= 6 or hypothesis.complete
    assert "<|" not in hypothesis.text
    return hypothesis.text, hypothesis.language


def check_the_whole_road(teacher: Path, folder: Path, language: str) -> None:
    """Label, make a student, distil one step, label with the result."""
    audio = write_tone(folder / "a.wav")
    label(teacher, audio)
    assert label(teacher, audio, language)[1] == language
    student = prune(teacher, folder / "student")
    row = {"audio": "a.wav", "text": "abc", "language": language}
    setting = Setting(teacher, student, write_rows(folder / "train.jsonl", [row]))
    output = distil(
        write_config(folder / "run", setting, batch={"micro_batch_size": 1}, schedule__max_steps=1)
    )
    assert logged(output, "train/loss")[0] > 0
    final = weights_in(output / "final")
    assert {weight.dtype for weight in final.values()} == {torch.float32}
    assert label(output / "final", audio, language)[1] == language


QUICK = ("tiny",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in RELEASED],
)
def test_released_layouts(tmp_path: Path, name: str) -> None:
    layout = RELEASED[name]
    teacher = make_model_folder(tmp_path / "teacher", **layout)
    language = "en" if "english_only" in layout else "yue" if "128" in str(layout) else "zh"
    check_the_whole_road(teacher, tmp_path, language)


@pytest.mark.slow
@pytest.mark.parametrize("make", UNUSUAL, ids=lambda make: make.__name__)
def test_unusual_folders(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    teacher = make(tmp_path / "teacher")
    check_the_whole_road(teacher, tmp_path, "en" if "english" in make.__name__ else "zh")


def test_a_folder_of_whisper_model_has_the_same_weights(tmp_path: Path) -> None:
    whole, short = plain(tmp_path / "whole"), saved_as_whisper_model(tmp_path / "short")
    expected = loaded(whole).model.state_dict()
    for name, weight in loaded(short).model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_yue_shifts_the_tasks_by_one(tmp_path: Path) -> None:
    """Ids are looked up by name: the same prompt has other numbers in large-v3."""
    v2, v3 = (
        loaded(make_model_folder(tmp_path / str(len(codes)), languages=codes)).tokens
        for codes in (NINETY_NINE, HUNDRED)
    )
    assert "yue" not in v2.languages
    start, language, task, no_timestamps = v2.prompt("zh", "transcribe")
    assert v3.prompt("zh", "transcribe") == [start, language, task + 1, no_timestamps + 1]
    assert v3.prompt("yue", "transcribe")[1] == start + 100
    assert v3.no_speech == v2.no_speech + 1
    with pytest.raises(ConfigError, match="yue"):
        v2.prompt("yue", "transcribe")


@pytest.mark.parametrize("with_file", [True, False])
def test_an_english_only_model_is_given_no_language(tmp_path: Path, with_file: bool) -> None:
    # Real English-only tokenizers have all language tokens; the model does not know them.
    path = make_model_folder(tmp_path, english_only=True, vocab_size=51864)
    if not with_file:
        (path / "generation_config.json").unlink()
    whisper = loaded(path)
    names = ["<|startoftranscript|>", "<|notimestamps|>"]
    assert whisper.tokens.prompt(None, "transcribe") == whisper.tokenizer.convert_tokens_to_ids(
        names
    )
    assert whisper.model.generation_config.is_multilingual is False


def test_forced_ids_do_not_win_over_the_language(tmp_path: Path) -> None:
    audio = write_tone(tmp_path / "a.wav")
    old, new = forced_ids(tmp_path / "old"), plain(tmp_path / "new", talkative=True, seed=53)
    whisper = loaded(old)
    assert whisper.model.generation_config.forced_decoder_ids is None
    labels = [label(old, audio, language) for language in LANGUAGES]
    assert labels == [label(new, audio, language) for language in LANGUAGES]
    assert len(set(labels)) == len(LANGUAGES)


@pytest.mark.parametrize("with_file", [True, False])
def test_suppressed_tokens_may_stand_in_the_config_alone(tmp_path: Path, with_file: bool) -> None:
    folder = generation_settings_in_config(tmp_path / "m")
    if with_file:
        text = (plain(tmp_path / "new") / "generation_config.json").read_text()
        settings = json.loads(text)
        del settings["suppress_tokens"], settings["begin_suppress_tokens"]
        (folder / "generation_config.json").write_text(json.dumps(settings))
    generation = loaded(folder).model.generation_config
    assert generation.suppress_tokens == [1, 2, 3]
    assert generation.begin_suppress_tokens == [4, 256]
    assert generation.forced_decoder_ids is None


def test_a_repaired_generation_config_survives_saving(tmp_path: Path) -> None:
    for make in (without_generation_config, early_generation_config, generation_settings_in_config):
        folder = prune(make(tmp_path / make.__name__), tmp_path / f"{make.__name__} student")
        student = Model.from_pretrained(folder)
        # Without it, `generate` would stop after 20 tokens.
        assert student.generation_config.max_length == student.config.max_target_positions
        ids = student.generate(
            torch.zeros(1, 80, 200),
            language="zh",
            task="transcribe",
            max_new_tokens=2,
            force_unique_generate_call=True,
        )
        assert ids[0, :4].tolist() == loaded(folder).tokens.prompt("zh", "transcribe")


# Dtypes


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("requested", ["float32", "float16", "bfloat16"])
def test_the_dtype_is_the_requested_one(
    tmp_path: Path, stored: torch.dtype, requested: str
) -> None:
    folder = plain(tmp_path / "m", dtype=stored)
    model = loaded(folder, dtype=requested).model
    assert {p.dtype for p in model.parameters()} == {getattr(torch, requested)}
    assert {p.dtype for p in loaded(folder).model.parameters()} == {torch.float32}
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    facts["dtype"] = requested  # whatever it says
    (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    assert stored_dtype(read_model_folder(folder, None, "model")) == stored


def test_auto_is_float32_without_a_gpu(tmp_path: Path) -> None:
    assert torch_dtype("auto", torch.device("cpu")) == torch.float32
    assert loaded(float16(tmp_path / "m"), dtype="auto").model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_labels_on_a_cpu(tmp_path: Path, dtype: str) -> None:
    whisper = loaded(plain(tmp_path / "m"), dtype=dtype)
    features = torch.randn(2, 80, 200, generator=torch.Generator().manual_seed(0))
    hypotheses = Transcriber(whisper, DecodingOptions(max_new_tokens=5))(features, ["zh", "en"])
    assert all(h.average_log_probability < 0 for h in hypotheses)


# Folders that cannot be used


def move_processor(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        if path.name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
            path.rename(target / path.name)
    (folder / "processor_config.json").unlink(missing_ok=True)
    return target


def test_a_processor_may_live_elsewhere(tmp_path: Path) -> None:
    """A fine-tuned folder without one: it is named, and the student gets it."""
    folder = plain(tmp_path / "m")
    audio = write_tone(tmp_path / "a.wav")
    expected = label(folder, audio, "zh")
    processor = move_processor(folder, tmp_path / "processor")
    with pytest.raises(ConfigError, match=r"model\.processor: .* holds no feature extractor"):
        read_model_folder(folder, None, "model")
    whisper = loaded(folder, processor)
    student = tmp_path / "student"
    student.mkdir()
    save_whisper(whisper.model, whisper.processor_folder, student)
    assert label(student, audio, "zh") == expected


def test_a_folder_without_tokenizer_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = plain(tmp_path / "m")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        read_model_folder(folder, None, "teacher")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = plain(tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="pickled weights are not read"):
        loaded(folder)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = plain(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.decoder.layers.1.fc1.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"weights are missing: decoder\.layers\.1\.fc1"):
        loaded(folder)


def test_a_head_of_its_own_is_kept_where_config_json_says_so_and_else_refused(
    tmp_path: Path,
) -> None:
    folder = plain(tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.decoder.embed_tokens.weight"]
    # Saved twice, as by some trainers, it is still the embedding.
    weights["proj_out.weight"] = embedding.clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(loaded(folder).model.proj_out.weight, embedding)
    weights["proj_out.weight"] = 2 * embedding
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match='set "tie_word_embeddings" to false'):
        loaded(folder)
    edit(folder / "config.json", tie_word_embeddings=False)
    student = weights_in(prune(folder, tmp_path / "student"))
    assert torch.equal(student["proj_out.weight"], weights["proj_out.weight"])
    assert torch.equal(student["model.decoder.embed_tokens.weight"], embedding)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ConfigError):
        loaded(folder)


def test_a_torn_download_is_refused(tmp_path: Path) -> None:
    folder = plain(tmp_path / "m")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="damaged or incomplete"):
        loaded(folder)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = plain(tmp_path / "m")
    shutil.copy(plain(tmp_path / "wide", width=24) / "model.safetensors", folder)
    with pytest.raises(ConfigError):
        loaded(folder)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ({"mels": 128}, "mel bins"),
        ({"window_seconds": 4, "languages": LANGUAGES[:1]}, "windows of 4 s"),
        ({"languages": [*LANGUAGES, "ko"]}, "tokens|notimestamps"),
        ({"languages": LANGUAGES[:2]}, "notimestamps"),
    ],
    ids=["mels", "window", "more languages", "fewer languages"],
)
def test_the_processor_of_another_model_is_refused(
    tmp_path: Path, other: dict[str, Any], complaint: str
) -> None:
    folder = plain(tmp_path / "m")
    processor = plain(tmp_path / "other", **other)
    with pytest.raises(ConfigError, match=complaint):
        loaded(folder, processor)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    folder = plain(tmp_path / "m")
    edit(folder / "config.json", model_type="wav2vec2")
    with pytest.raises(ConfigError, match="wav2vec2"):
        loaded(folder)


def test_teacher_and_student_must_be_of_one_kind(tmp_path: Path) -> None:
    audio = write_tone(tmp_path / "a.wav")
    rows = write_rows(
        tmp_path / "t.jsonl", [{"audio": audio.name, "text": "abc", "language": "zh"}]
    )
    teacher = plain(tmp_path / "teacher")
    for name, layout in (
        ("num_mel_bins", {"mels": 128}),
        ("vocab_size", {"languages": ["en", "zh"]}),
    ):
        student = plain(tmp_path / name, **layout)
        with pytest.raises(ConfigError, match=name):
            distil(write_config(tmp_path / f"run {name}", Setting(teacher, student, rows)))
