"""Linear layers in whole numbers of 8 bits: exact sums of rounded numbers, alike in any batch."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, RunScript
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model_folder, read_rows
from torch import Tensor, nn

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.int8 import Int8Linear, round_linear_layers
from simpler_distil_whisper.model.whisper import Whisper, load_whisper

TEACHER = str(REPOSITORY / "demo_data/teacher")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    folder = make_model_folder(tmp_path_factory.mktemp("whisper"), seed=8)
    return load_whisper(read_model_folder(folder, None, "model"))


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


@torch.inference_mode()
def rounded_product(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return Int8Linear.rounded(layer)(inputs)


def test_a_product_worked_out_by_hand() -> None:
    # Steps of the weights: 63 / 63 = 1 and 126 / 63 = 2, so 31.4 becomes 31, and 63.2 becomes 64.
    # Steps of the inputs: (205 - -50) / 255 = 1 and (5.1 - 0) / 255 = 0.02; 7.4 becomes 7.
    weight = torch.tensor([[63.0, 31.4, -1.0], [-126.0, 63.2, 0.0]])
    inputs = torch.tensor([[205.0, -50.0, 7.4], [0.0, 5.1, 0.04]])
    expected = [
        [63 * 205 - 31 * 50 - 7 + 0.5, -126 * 205 - 64 * 50 + 0.25],
        [31 * 5.1 - 0.04 + 0.5, 64 * 5.1 + 0.25],
    ]
    outputs = rounded_product(linear(weight, torch.tensor([0.5, 0.25])), inputs)
    torch.testing.assert_close(outputs, torch.tensor(expected), rtol=1e-6, atol=0)


def test_the_largest_products_do_not_overflow() -> None:
    weight = torch.full((16, 4096), 63.0)
    inputs = torch.full((3, 4096), 255.0)
    inputs[:, 0] = 0.0
    assert (rounded_product(linear(weight), inputs) == 63 * 255 * 4095).all()
    assert (rounded_product(linear(-weight), inputs) == -63 * 255 * 4095).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 300), outputs=st.integers(1, 80))
def test_no_output_is_further_off_than_half_a_step_of_each_number_allows(
    seed: int, width: int, outputs: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, inputs, bias = (
        torch.randn(*shape, generator=generator)
        for shape in ((outputs, width), (7, width), (outputs,))
    )
    weight[-1] = 0.0
    inputs[1] = 0.0
    inputs[2] = 3.7
    inputs[3, 0] = 80.0
    inputs[4] = nn.functional.gelu(inputs[4])
    layer = linear(weight, bias)
    weight_steps = weight.abs().amax(1) / 63
    input_steps = (inputs.amax(1) - inputs.amin(1)) / 255
    # What starts at a whole number of steps may end half a step too early: a whole one, at most.
    furthest = (
        weight_steps / 2 * inputs.abs().sum(1, keepdim=True)
        + input_steps[:, None] * weight.abs().sum(1)
        + input_steps[:, None] * weight_steps * width
    )
    difference = (rounded_product(layer, inputs) - layer(inputs)).abs()
    assert (difference <= furthest + 1e-4).all()


def test_a_position_is_computed_alike_in_any_batch() -> None:
    inputs = torch.randn(5, 40, 96, generator=torch.Generator().manual_seed(1))
    inputs[2] *= 100
    layer = Int8Linear.rounded(nn.Linear(96, 50))
    with torch.inference_mode():
        together = layer(inputs)
        assert torch.equal(together[1], layer(inputs[1]))
        assert torch.equal(together[3, 7:8], layer(inputs[3, 7:8]))


def test_joined_layers_compute_what_each_of_them_does() -> None:
    layers = [Int8Linear.rounded(nn.Linear(32, outputs)) for outputs in (8, 5)]
    inputs = torch.randn(3, 32)
    with torch.inference_mode():
        each = torch.cat([layer(inputs) for layer in layers], dim=1)
        assert torch.equal(Int8Linear.joined(layers)(inputs), each)


def test_all_linear_layers_of_a_model_are_rounded_and_nothing_else(whisper: Whisper) -> None:
    model = copy.deepcopy(whisper.model)
    round_linear_layers(model)
    kinds = [type(module) for module in model.modules()]
    assert nn.Linear not in kinds
    # Six in each layer of the encoder, ten in each of the decoder, and the head.
    config = model.config
    assert kinds.count(Int8Linear) == 6 * config.encoder_layers + 10 * config.decoder_layers + 1
    assert torch.equal(model.model.decoder.embed_tokens.weight, whisper.model.proj_out.weight)


def test_a_device_without_such_products_is_named(whisper: Whisper) -> None:
    model = copy.deepcopy(whisper.model).to("meta")
    with pytest.raises(ConfigError, match='model.dtype: "int8" needs an x86 CPU.* on meta: set it'):
        round_linear_layers(model)


def test_inference_writes_nearly_the_texts_of_float32_and_the_same_in_any_way(
    tmp_path: Path, run_script: RunScript
) -> None:
    def inference(name: str, dtype: str, batch_size: int, **more: object) -> list[Any]:
        config = {
            "output_dir": name,
            "model": {"path": TEACHER, "dtype": dtype},
            "data": {"manifest": str(REPOSITORY / "demo_data/test.jsonl"), "max_utterances": 12},
            "decoding": {"batch_size": batch_size},
        }
        done = run_script("offline_inference", {**config, **more})
        assert done.returncode == 0, done.stderr
        assert f"dtype {dtype}," in done.stderr
        return read_rows(tmp_path / name / "hypotheses.jsonl")

    exact, rounded = inference("float32", "float32", 8), inference("int8", "int8", 8)
    texts = [
        (one["hypothesis"], other["hypothesis"]) for one, other in zip(exact, rounded, strict=True)
    ]
    assert sum(one == other for one, other in texts) >= 10
    speed = [
        json.loads((tmp_path / name / "speed.json").read_text()) for name in ("float32", "int8")
    ]
    assert speed[0]["parameters"] == speed[1]["parameters"]
    assert inference("alone", "int8", 1) == rounded
    assert inference("drafted", "int8", 8, assistant={"path": TEACHER}) == rounded


@pytest.mark.parametrize("script", ["run_pseudo_labelling", "run_distillation"])
def test_a_teacher_is_not_rounded(script: str, run_script: RunScript) -> None:
    config = json.loads((REPOSITORY / f"{script}.json").read_text())
    config["teacher"]["dtype"] = "int8"
    refused = run_script(script, config, "--check")
    assert refused.returncode == 2
    assert "teacher.dtype" in refused.stderr
