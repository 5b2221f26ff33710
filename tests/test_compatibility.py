"""The distilled model folder in plain transformers, without this project."""

import json
from pathlib import Path

import pytest
import torch
from distilling import Setting, distil, make_setting, write_config
from tiny import read_rows, write_rows
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    GenerationConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    pipeline,
)

from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.whisper import load_whisper

CLIPS = 4
LIMIT = 60


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("setting"), 4, mels=128)


@pytest.fixture(scope="module")
def final(tmp_path_factory: pytest.TempPathFactory, setting: Setting) -> Path:
    """A student that has learnt its four texts, so that no special token comes up by chance."""
    rows = [
        row | {"text": text}
        for row, text in zip(
            read_rows(setting.train), ("hello", "good day", "so long now", "bye"), strict=True
        )
    ]
    write_rows(setting.train, rows)
    path = write_config(
        tmp_path_factory.mktemp("run") / "out",
        setting,
        schedule={"max_steps": 100, "epochs": None, "warmup_steps": 10, "kind": "constant"},
        optimizer__learning_rate=2e-2,
        objective={"kl_weight": 0.0, "cross_entropy_weight": 1.0},
        freeze={"encoder": False},
        logging__every_steps=50,
    )
    return distil(path) / "final"


@pytest.fixture(scope="module")
def clips(setting: Setting) -> list[Path]:
    return [setting.train.parent / row["audio"] for row in read_rows(setting.train)]


@pytest.fixture(scope="module")
def ours(final: Path, clips: list[Path]) -> list[str]:
    whisper = load_whisper(read_model_folder(final, None, "model"))
    features = log_mel([load_audio(clip) for clip in clips], whisper.feature_extractor)
    transcriber = Transcriber(whisper, DecodingOptions(max_new_tokens=LIMIT))
    texts = [hypothesis.text for hypothesis in transcriber(features, ["en"] * CLIPS)]
    assert texts == ["hello", "good day", "so long now", "bye"], "else it has learnt too little"
    return texts


def generated(model: WhisperForConditionalGeneration, folder: Path, clips: list[Path]) -> list[str]:
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(
        [load_audio(clip) for clip in clips], sampling_rate=16_000, return_tensors="pt"
    )
    ids = model.generate(
        inputs.input_features, language="en", task="transcribe", max_new_tokens=LIMIT
    )
    return processor.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", [WhisperForConditionalGeneration, AutoModelForSpeechSeq2Seq])
def test_plain_transformers_predicts_the_same(
    final: Path, clips: list[Path], ours: list[str], kind: type
) -> None:
    model = kind.from_pretrained(final)
    assert isinstance(model, WhisperForConditionalGeneration)
    assert model.dtype == torch.float32
    assert generated(model, final, clips) == ours


def test_the_pipeline_predicts_the_same(final: Path, clips: list[Path], ours: list[str]) -> None:
    recognize = pipeline("automatic-speech-recognition", model=str(final), device="cpu")
    results = recognize(
        [{"raw": load_audio(clip), "sampling_rate": 16_000} for clip in clips],
        generate_kwargs={"language": "en", "task": "transcribe", "max_new_tokens": LIMIT},
    )
    assert [result["text"] for result in results] == ours


def test_every_part_of_the_processor_loads(final: Path, setting: Setting) -> None:
    processor = WhisperProcessor.from_pretrained(final)
    assert processor.feature_extractor.feature_size == 128
    assert WhisperFeatureExtractor.from_pretrained(final).chunk_length == 2
    ours, theirs = (WhisperTokenizer.from_pretrained(f) for f in (final, setting.teacher))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours("你好 hello").input_ids == theirs("你好 hello").input_ids


def test_the_generation_config_loads_whole(final: Path, setting: Setting) -> None:
    ours, theirs = (GenerationConfig.from_pretrained(f) for f in (final, setting.teacher))
    for name in ("lang_to_id", "task_to_id", "no_timestamps_token_id", "suppress_tokens"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.alignment_heads == [[0, 0], [0, 1]]
    assert not getattr(ours, "forced_decoder_ids", None)


def test_the_folder_holds_what_other_programs_look_for(final: Path) -> None:
    """faster-whisper reads the mel bins from preprocessor_config.json and nowhere else."""
    names = {path.name for path in final.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any(name.startswith(".") or name.endswith(".bin") for name in names)
    assert json.loads((final / "preprocessor_config.json").read_text())["feature_size"] == 128
    config = json.loads((final / "config.json").read_text())
    assert config["architectures"] == ["WhisperForConditionalGeneration"]
    assert config["dtype"] == "float32"
    assert not config.get("forced_decoder_ids")


def test_best_is_as_complete_as_final(tmp_path: Path, setting: Setting) -> None:
    path = write_config(
        tmp_path / "run", setting, data__dev_manifest=setting.train, schedule__max_steps=1
    )
    folder = distil(path)
    names = [sorted(p.name for p in (folder / part).iterdir()) for part in ("final", "best")]
    assert names[0] == names[1]
    WhisperForConditionalGeneration.from_pretrained(folder / "best")


def test_it_may_be_saved_and_trained_on_by_others(tmp_path: Path, final: Path) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(final)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    labels = torch.tensor([[258, 262, 266, 5, 6, 256]])
    loss = model(torch.zeros(1, 128, 200), labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    model.save_pretrained(tmp_path)
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.model.decoder.embed_tokens.weight, model.proj_out.weight)
