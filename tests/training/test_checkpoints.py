"""Checkpoints: restored exactly, the newest kept, the last one whole whatever happens."""

import resource
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.run import DataError
from simpler_distil_whisper.training.checkpoints import Checkpoints, TrainerState


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def trained_line(accelerator: Accelerator) -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    line = nn.Linear(3, 3)
    return accelerator.prepare(line, torch.optim.AdamW(line.parameters()))


def do_step(line: nn.Linear, optimizer: torch.optim.AdamW) -> None:
    line(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_restored_checkpoint_goes_on_as_if_nothing_had_been(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    line, optimizer = trained_line(accelerator)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, accelerator)
    assert checkpoints.restore_last("plan") == TrainerState(plan="plan")
    do_step(line, optimizer)
    checkpoints.save(TrainerState(1, "plan", 0.25))
    do_step(line, optimizer)
    expected = line.weight.detach().clone()
    torch.rand(7)
    assert checkpoints.restore_last("plan") == TrainerState(1, "plan", 0.25)
    do_step(line, optimizer)  # the same random input again: random states are in the checkpoint
    assert torch.equal(line.weight, expected)


class Tied(nn.Module):
    """A frozen layer, a trained one, and another name for the trained one's weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.decoder = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.decoder.weight


def prepared(seed: int, folder: Path) -> tuple[Tied, Checkpoints]:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model = Tied(seed)
    model, _ = accelerator.prepare(model, torch.optim.AdamW([*model.decoder.parameters()]))
    return model, Checkpoints(folder, 1, accelerator)


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(tmp_path: Path) -> None:
    first, checkpoints = prepared(1, tmp_path)
    place = checkpoints.save(TrainerState(1))
    assert load_file(place / "model.safetensors").keys() == {"decoder.weight", "decoder.bias"}
    second, checkpoints = prepared(2, tmp_path)
    assert checkpoints.restore_last("") == TrainerState(1)
    assert torch.equal(second.head.weight, first.decoder.weight)
    assert not torch.equal(second.encoder.weight, first.encoder.weight)


@pytest.mark.parametrize("kept_name", ["decoder", "head"])
def test_checkpoints_of_before_are_read(tmp_path: Path, kept_name: str) -> None:
    """They hold all weights, shared ones once, and those of several processes with a prefix."""
    first, checkpoints = prepared(1, tmp_path)
    place = checkpoints.save(TrainerState(1))
    names = ("encoder.weight", "encoder.bias", f"{kept_name}.weight", "decoder.bias")
    whole = {f"module.{name}": first.state_dict()[name] for name in names}
    save_file(whole, place / "model.safetensors")
    second, checkpoints = prepared(2, tmp_path)
    checkpoints.restore_last("")
    for name, weight in second.state_dict().items():
        assert torch.equal(weight, first.state_dict()[name])


def test_a_checkpoint_without_a_trained_weight_is_refused(tmp_path: Path) -> None:
    _, checkpoints = prepared(1, tmp_path)
    place = checkpoints.save(TrainerState(1))
    save_file({"decoder.weight": torch.zeros(3, 3)}, place / "model.safetensors")
    _, checkpoints = prepared(2, tmp_path)
    with pytest.raises(ConfigError, match="holds no decoder.bias, which is trained now"):
        checkpoints.restore_last("")


def test_the_newest_checkpoints_are_kept(tmp_path: Path, accelerator: Accelerator) -> None:
    trained_line(accelerator)
    checkpoints = Checkpoints(tmp_path, 2, accelerator)
    for step in (9, 10, 100, 1000):
        checkpoints.save(TrainerState(step))
        checkpoints.save(TrainerState(step))  # again, as a run that was set back does
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00001000"]
    assert checkpoints.restore_last("") == TrainerState(1000)


def test_a_save_that_was_killed_leaves_the_last_checkpoint(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, optimizer = trained_line(accelerator)
    checkpoints = Checkpoints(tmp_path, 1, accelerator)
    checkpoints.save(TrainerState(1))
    saved = line.weight.detach().clone()
    do_step(line, optimizer)
    whole_save = accelerator.save_state

    def killed(folder: str) -> None:
        whole_save(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(accelerator, "save_state", killed)
        checkpoints.save(TrainerState(2))
    assert checkpoints.restore_last("") == TrainerState(1)
    assert torch.equal(line.weight, saved)
    checkpoints.save(TrainerState(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    """Stood in for by the largest file that this process may write."""
    line, optimizer = trained_line(accelerator)
    checkpoints = Checkpoints(tmp_path, 1, accelerator)
    do_step(line, optimizer)
    checkpoints.save(TrainerState(1))
    saved = line.weight.detach().clone()
    do_step(line, optimizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot be written.*checkpoints before it are whole"):
            checkpoints.save(TrainerState(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.restore_last("") == TrainerState(1)
    assert torch.equal(line.weight, saved)


def test_what_somebody_keeps_beside_the_checkpoints_stays(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    trained_line(accelerator)
    checkpoints = Checkpoints(tmp_path, 1, accelerator)
    checkpoints.save(TrainerState(1))
    kept = shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001-good")
    (tmp_path / "step-00000000").mkdir()
    notes = tmp_path / "step-00000000" / "notes.txt"
    notes.write_text("mine", encoding="utf-8")
    for step in (2, 3):
        checkpoints.save(TrainerState(step))
    assert (kept / "trainer_state.json").exists()
    assert notes.exists()
    assert not (tmp_path / "step-00000001").exists()
    assert checkpoints.restore_last("") == TrainerState(3)
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000004" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="step-00000004 is in the way"):
        checkpoints.save(TrainerState(4))
