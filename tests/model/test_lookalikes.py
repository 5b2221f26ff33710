"""What is answered where a path names no model folder of a Whisper."""

import json
import re
from pathlib import Path

import pytest

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.folder import read_model_folder

WHISPER = json.dumps({"model_type": "whisper"}).encode()
OTHER_FOLDERS = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], r"PEFT .*merge_and_unload"),
    "adapter beside weights": (
        ["adapter_config.json", "config.json", "model.safetensors"],
        "delete adapter_config.json",
    ),
    "faster-whisper": (["model.bin", "config.json", "vocabulary.json"], "CTranslate2 .*converted"),
    "ggml": (["ggml-large-v3.bin"], "a model of whisper.cpp: name the model in transformers'"),
    "openai": (["large-v3.pt"], "a checkpoint of openai-whisper or of a training: name the model"),
    "pickled": (
        ["config.json", "pytorch_model.bin"],
        r"pickled weights are not read, .*save_pretrained\(",
    ),
    "pickled shards": (
        ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
        "pickled weights are not read",
    ),
    "variants": (["config.json", "model.fp16.safetensors", "pytorch_model.bin"], "pickled"),
    "flax": (["config.json", "flax_model.msgpack"], "Flax's weights only"),
    "flax shards": (["config.json", "flax_model-00001-of-00002.msgpack"], "Flax's weights only"),
    "tensorflow shards": (["config.json", "tf_model-00001-of-00002.h5"], "TensorFlow's weights"),
    "core ml": (["config.json", "AudioEncoder.mlmodelc/model.mil"], "a Core ML model"),
    "openvino": (["config.json", "openvino_encoder_model.xml"], "an OpenVINO model"),
    "lightning": (["epoch=1.ckpt"], "or of a training: name the model"),
    "sharded checkpoint": (["trainer_state.json", "optimizer_0/x.distcp"], "training checkpoint"),
    "adapters": (["checkpoint-9/adapter_config.json"], "PEFT adapters; .*/checkpoint-9: name"),
    "onnx": (["config.json", "onnx/decoder_model.onnx"], "an ONNX model"),
    "mlx": (["config.json", "weights.npz"], "a model of MLX"),
    "checkpoint": (
        ["model.safetensors", "optimizer.bin", "trainer_state.json"],
        'a training checkpoint, .*"final" or "best" in its output_dir',
    ),
    "checkpoints": (["step-00000100/optimizer.bin"], "a training checkpoint"),
    "distillation": (
        ["run_distillation.json", "best/config.json", "final/config.json"],
        "output folder of a distillation; the models are in .*/best, .*/final: name one of them",
    ),
    "trainer": (["checkpoint-500/config.json"], "the models are in .*/checkpoint-500: name"),
    "cached model": (["refs/main", "snapshots/a1b2/config.json"], r"Hub's cache; .*snapshots/a1b2"),
    "cache": (["models--o--w/snapshots/a1b2/config.json"], "Hub's cache; .*snapshots/a1b2: name"),
    "home": (["token", "hub/models--o--w/snapshots/a1/config.json"], "Hub's cache; .*/a1: name"),
    "nothing": ([], "is no model folder: it holds no config.json"),
}


def answer_to(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_model_folder(path, None, "teacher")
    assert str(caught.value).startswith("teacher.path: ")
    return str(caught.value)


@pytest.mark.parametrize(("files", "expected"), OTHER_FOLDERS.values(), ids=list(OTHER_FOLDERS))
def test_a_folder_of_something_else(tmp_path: Path, files: list[str], expected: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(WHISPER)
    answer = answer_to(tmp_path)
    assert re.search(expected, answer), answer
    assert len(answer.splitlines()) == 1


@pytest.mark.parametrize("kind", ["wav2vec2", "llama"])
def test_another_model(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "model.safetensors").touch()
    assert answer_to(tmp_path).endswith(f"is a {kind} model, not Whisper")


def test_a_quantised_model(tmp_path: Path) -> None:
    config = {"model_type": "whisper", "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    assert "a quantised model, which is not read: name the model from" in answer_to(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("large-v3.pt", b"PK\x03\x04", "a file, a checkpoint of openai-whisper"),
        ("ggml-base.bin", b"lmgg\0\0\0\0", "a file, a model of whisper.cpp"),
        ("config.json", b"{}", "a file, not a folder: name the model's folder, such as "),
        ("model.safetensors", b"", "a file, not a folder: name the model's folder, such as "),
    ],
)
def test_a_file(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in answer_to(tmp_path / name)


def test_a_name_of_the_hub_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "hf download openai/whisper-base --local-dir" in answer_to(Path("openai/whisper-base"))
    assert answer_to(tmp_path / "outputs").endswith(f"no such folder: {tmp_path / 'outputs'}")
