"""What people name instead of a Whisper's model folder, and what to do about each.

Owns the answers for paths that cannot be a model folder at all. Mistakes within a model folder are
for `settings.py` and `headers.py`.
"""

import contextlib
from pathlib import Path
from typing import Any

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.settings import read_json

SAVE_AGAIN = (
    "WhisperForConditionalGeneration.from_pretrained(FOLDER).save_pretrained(ANOTHER) of "
    "transformers writes safetensors"
)
NAME_THE_ORIGINAL = "name the model in transformers' format from which it was converted"

CHECKPOINT = (
    "a training checkpoint, from which a run continues, and no whole model: name the model that "
    'the run has written, such as "final" or "best" in its output_dir'
)

OPENAI = (
    "a checkpoint of openai-whisper or of a training: name the model in transformers' format, for "
    "example the one of the same name on the Hugging Face Hub"
)

# Files by which other things are known -> what these are, and what to do; the first that fits.
OTHER_THINGS = {
    "model.bin": f"a CTranslate2 model, as faster-whisper uses: {NAME_THE_ORIGINAL}",
    "ggml*.bin": f"a model of whisper.cpp: {NAME_THE_ORIGINAL}",
    "*.gguf": f"a model of whisper.cpp: {NAME_THE_ORIGINAL}",
    "optimizer.*": CHECKPOINT,
    "step-*/optimizer.*": CHECKPOINT,
    "trainer_state.json": CHECKPOINT,
    "pytorch_model*.bin": "a model whose weights are pickled; pickled weights are not read, since "
    f"they can run code. Where they come from is trusted: {SAVE_AGAIN}",
    "tf_model*.h5": "a model with TensorFlow's weights only: name one with safetensors",
    "flax_model*.msgpack": "a model with Flax's weights only: name one with safetensors",
    "weights.*": f"a model of MLX: {NAME_THE_ORIGINAL}",
    "*.onnx": f"an ONNX model: {NAME_THE_ORIGINAL}",
    "onnx/*.onnx": f"an ONNX model: {NAME_THE_ORIGINAL}",
    "*.mlmodelc": f"a Core ML model: {NAME_THE_ORIGINAL}",
    "openvino_*.xml": f"an OpenVINO model: {NAME_THE_ORIGINAL}",
    "*.nemo": "a NeMo model, not Whisper",
    "*.pt": OPENAI,
    "*.pth": OPENAI,
    "*.ckpt": OPENAI,
}

# Folders that hold model folders, and are none themselves.
COLLECTIONS = {
    "final/config.json": "the output folder of a distillation",
    "best/config.json": "the output folder of a distillation",
    "snapshots/*/config.json": "a folder of the Hub's cache",
    "models--*/snapshots/*/config.json": "the Hub's cache",
    "hub/models--*/snapshots/*/config.json": "the Hub's cache",
    "checkpoint-*/config.json": "the output folder of a trainer",
    "*/config.json": "a folder of model folders",
    "*/adapter_config.json": "a folder of PEFT adapters",
}

QUANTISED = (
    "a quantised model, which is not read: name the model from which it was made. If the weights "
    "here are floating point, delete quantization_config from config.json"
)
ADAPTER = (
    "a PEFT adapter, not a model: load it with peft's AutoPeftModelForSpeechSeq2Seq, write "
    "model.merge_and_unload().save_pretrained(FOLDER), and name that FOLDER, with the base model "
    "as processor. If the weights here are merged already, delete adapter_config.json"
)


def what_it_is(path: Path) -> str | None:
    """Return what a path is, if no model folder of a Whisper, and what to do; None: it may be one.

    A model folder with mistakes is a model folder.
    """
    if path.is_file():
        return f"a file, {_kind_of_file(path)}"
    if (path / "adapter_config.json").is_file():
        return ADAPTER
    config = dict[str, Any]()
    with contextlib.suppress(ConfigError):  # what is wrong with config.json is told later
        config = read_json(path / "config.json")
    if (model_type := config.get("model_type")) not in (None, "whisper"):
        return f"a {model_type!s:.40} model, not Whisper"
    if config.get("quantization_config"):
        return QUANTISED
    weights = [path / "model.safetensors", *path.glob("model-*.safetensors")]
    if any(map(Path.exists, weights)) and (path / "config.json").is_file():
        return None
    for pattern, answer in OTHER_THINGS.items():
        if any(path.glob(pattern)):
            return answer
    for pattern, answer in COLLECTIONS.items():
        if any(path.glob(pattern)):
            inside = sorted({str(file.parent) for each in COLLECTIONS for file in path.glob(each)})
            return f"{answer}; the models are in {', '.join(inside[:5])}: name one of them"
    return None


def how_to_get(path: Path) -> str:
    """Return the end of a message about a path where nothing is: a hint if it is a Hub's name."""
    is_name = len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()
    if not is_name:
        return ""
    return f" (nothing is downloaded: get it with hf download {path} --local-dir FOLDER)"


def _kind_of_file(path: Path) -> str:
    """Return what a file is, and what to name instead."""
    with path.open("rb") as file:
        begin = file.read(4)
    if begin in (b"lmgg", b"GGUF"):
        return OTHER_THINGS["*.gguf"]
    if answer := OTHER_THINGS.get(f"*{path.suffix}"):
        return answer
    return f"not a folder: name the model's folder, such as {path.parent}"
