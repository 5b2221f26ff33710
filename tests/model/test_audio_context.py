"""An encoder that is given the clip alone: how much that is, and what it computes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model_folder

from simpler_distil_whisper.model.audio_context import AudioContext, stated_context
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.whisper import (
    Whisper,
    load_whisper,
    run_encoder,
    run_encoder_on_part,
    save_whisper,
)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    path = make_model_folder(tmp_path_factory.mktemp("model"), languages=["en"])
    return load_whisper(read_model_folder(path, None, "model"))


@pytest.mark.parametrize(
    ("seconds", "positions"),
    [(0.1, 50), (0.7, 50), (0.71, 100), (5.5, 300), (29.7, 1500), (30.0, 1500)],
)
def test_positions_by_hand(seconds: float, positions: int) -> None:
    """Fifty positions a second, 0.3 s of margin, rounded up to whole seconds."""
    assert AudioContext(0.3).positions(seconds, 1500) == positions


@given(st.floats(0.01, 30), st.floats(0, 2))
def test_the_clip_and_its_margin_have_room(seconds: float, margin: float) -> None:
    positions = AudioContext(margin).positions(seconds, 1500)
    assert positions == 1500 or positions >= 50 * (seconds + margin)
    assert positions <= 50 * (seconds + margin) + 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_whole_window_the_states_are_those_of_transformers(
    whisper: Whisper, dtype: torch.dtype
) -> None:
    encoder = whisper.model.model.encoder.to(dtype)
    features = torch.randn(3, 80, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        ours, theirs = run_encoder_on_part(encoder, features), encoder(features).last_hidden_state
    assert torch.equal(ours, theirs)
    encoder.float()


def test_fewer_positions_are_those_of_a_whisper_with_a_smaller_window(
    tmp_path: Path, whisper: Whisper
) -> None:
    path = make_model_folder(tmp_path / "smaller", languages=["en"], window_seconds=1)
    smaller = load_whisper(read_model_folder(path, None, "model")).model.model.encoder
    weights = whisper.model.model.encoder.state_dict()
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:50]
    smaller.load_state_dict(weights)
    features = torch.randn(2, 80, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        part = run_encoder(whisper.model.model.encoder, features[:, :, :100])
        assert torch.equal(part, smaller(features[:, :, :100]).last_hidden_state)
    assert part.shape[1] == 50


def test_a_folder_states_what_its_model_was_trained_for(tmp_path: Path, whisper: Whisper) -> None:
    assert whisper.audio_context is None
    path = make_model_folder(tmp_path / "teacher", languages=["en"])
    trained = load_whisper(read_model_folder(path, None, "model"))
    trained.model.config.audio_context = AudioContext(0.25).to_config()
    save_whisper(trained.model, trained.processor_folder, tmp_path / "student")
    folder = read_model_folder(tmp_path / "student", None, "model")
    assert stated_context(folder.config) == AudioContext(0.25)
    assert load_whisper(folder).audio_context == AudioContext(0.25)


@pytest.mark.parametrize("stated", [None, 3, "0.3", {}, {"margin_seconds": -1}, {"margin": 1}])
def test_what_states_nothing_sensible_is_no_context(stated: object) -> None:
    assert stated_context({"audio_context": stated}) is None
