"""Training with an audio context: the student is given the clip alone, the teacher the window."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from distilling import (
    Setting,
    assemble,
    distil,
    largest_difference,
    logged,
    make_setting,
    weights_in,
    write_config,
)

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.audio_context import AudioContext
from simpler_distil_whisper.training.dataset import AudioContexts, TrainingBatch
from simpler_distil_whisper.training.options import AudioContextOptions
from simpler_distil_whisper.training.plan import Visit

SECTION = {
    "enabled": True,
    "margin_seconds": 0.1,
    "jitter_seconds": 0.2,
    "full_window_probability": 0.25,
    "encoder_learning_rate_factor": 0.5,
}
TRAINED = {"audio_context": SECTION, "freeze": {"encoder": False}}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("setting"))


def test_margins_and_whole_windows_are_drawn_by_the_place_in_the_plan() -> None:
    contexts = AudioContexts(AudioContextOptions.model_validate(SECTION), 1500, seed=0)
    drawn = [contexts.positions(Visit(0, position, 0), 4.75) for position in range(2000)]
    again = [contexts.positions(Visit(3, position, 7), 4.75) for position in range(2000)]
    assert drawn == again
    counts = Counter(drawn)
    assert counts.keys() == {250, 300, 1500}  # 4.85 to 5.05 s, or all of it
    assert 0.2 < counts[1500] / 2000 < 0.3
    assert 0.15 < counts[300] / (counts[250] + counts[300]) < 0.35  # beyond 5.0 s


def test_rows_of_unequal_context_are_computed_as_if_each_were_alone(
    tmp_path: Path, setting: Setting
) -> None:
    trainer, _, steps, _ = assemble(write_config(tmp_path / "run", setting, **TRAINED))
    batch = next(steps.since(0))[0]
    assert batch.positions is not None
    assert len(set(batch.positions)) > 1
    module = trainer.models.module
    with torch.no_grad():
        together = module._states_by_positions(batch)
        for row in range(len(batch.labels)):
            alone = TrainingBatch(
                batch.input_features[row : row + 1],
                batch.decoder_input_ids[row : row + 1],
                batch.labels[row : row + 1],
                0.0,
                [],
                batch.positions[row : row + 1],
            )
            own = module._states_by_positions(alone)[0]
            torch.testing.assert_close(together[row], own, rtol=1e-4, atol=1e-5)


def test_at_the_whole_window_the_loss_is_that_without_an_audio_context(
    tmp_path: Path, setting: Setting
) -> None:
    whole = {**SECTION, "full_window_probability": 1.0, "encoder_learning_rate_factor": 1.0}
    runs = {
        "with": {**TRAINED, "audio_context": whole},
        "without": {"freeze": {"encoder": False}},
    }
    folders = {
        name: distil(write_config(tmp_path / name, setting, **changes))
        for name, changes in runs.items()
    }
    losses = {name: logged(folder, "train/loss") for name, folder in folders.items()}
    assert losses["with"] == losses["without"]
    weights = [weights_in(folder / "final") for folder in folders.values()]
    assert largest_difference(*weights) == 0


def test_encoder_and_decoder_learn_at_rates_of_their_own(tmp_path: Path, setting: Setting) -> None:
    trainer, _, steps, _ = assemble(write_config(tmp_path / "run", setting, **TRAINED))
    trainer.train_step(next(steps.since(0)), 1e-3)
    rates = {
        name: group["lr"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
        for name, own in trainer.models.module.named_parameters()
        if own is parameter
    }
    assert {rate for name, rate in rates.items() if "model.encoder." in name} == {5e-4}
    assert {rate for name, rate in rates.items() if "model.decoder." in name} == {1e-3}


def test_a_distilled_folder_states_its_context(tmp_path: Path, setting: Setting) -> None:
    folder = distil(write_config(tmp_path / "run", setting, **TRAINED))
    config = json.loads((folder / "final" / "config.json").read_text(encoding="utf-8"))
    assert AudioContext(**config["audio_context"]) == AudioContext(0.1)


def test_a_folder_no_longer_states_a_context_that_was_not_trained(
    tmp_path: Path, setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    trained = distil(write_config(tmp_path / "run", setting, **TRAINED)) / "final"
    again = write_config(tmp_path / "again", setting, student={"path": str(trained)})
    trainer, *_ = assemble(again)
    assert trainer.models.student.audio_context is None
    assert "its folder will no longer state one" in caplog.text


def test_the_encoder_must_be_trained(tmp_path: Path, setting: Setting) -> None:
    with pytest.raises(ConfigError, match=r"set freeze\.encoder to false"):
        assemble(write_config(tmp_path / "run", setting, audio_context=SECTION))
