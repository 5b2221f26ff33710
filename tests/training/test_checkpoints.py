"""Checkpoints: restored exactly, the newest kept, the last one whole whatever happens."""

import resource
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
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
    assert checkpoints.restore_last() is None
    do_step(line, optimizer)
    checkpoints.save(TrainerState(1, 0.5, 0.25))
    do_step(line, optimizer)
    expected = line.weight.detach().clone()
    torch.rand(7)
    assert checkpoints.restore_last() == TrainerState(1, 0.5, 0.25)
    do_step(line, optimizer)  # the same random input again: random states are in the checkpoint
    assert torch.equal(line.weight, expected)


def test_the_newest_checkpoints_are_kept(tmp_path: Path, accelerator: Accelerator) -> None:
    trained_line(accelerator)
    checkpoints = Checkpoints(tmp_path, 2, accelerator)
    for step in (9, 10, 100, 1000):
        checkpoints.save(TrainerState(step))
        checkpoints.save(TrainerState(step))  # again, as a run that was set back does
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00001000"]
    assert checkpoints.restore_last() == TrainerState(1000)


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
    assert checkpoints.restore_last() == TrainerState(1)
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
    assert checkpoints.restore_last() == TrainerState(1)
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
    assert checkpoints.restore_last() == TrainerState(3)
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000004" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="step-00000004 is in the way"):
        checkpoints.save(TrainerState(4))
