"""The learning rate that "auto" comes to: the one that learns most in a short run."""

import json
import math
from pathlib import Path

import pytest
import torch
from distilling import Setting, assemble, distil, logged, make_setting, warnings_in, write_config
from hypothesis import given
from hypothesis import strategies as st

import run_distillation
from simpler_distil_whisper.config import load_config
from simpler_distil_whisper.run import DataError, Run
from simpler_distil_whisper.stopping import Interrupted
from simpler_distil_whisper.training import learning_rates
from simpler_distil_whisper.training.learning_rates import (
    FIRST,
    STEPS,
    ShortRun,
    ShortRuns,
    range_test,
    search,
)

AUTO = {"optimizer__learning_rate": "auto", "schedule__max_steps": 4}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("setting"))


def valley(rate: float, best: float) -> ShortRun:
    """A loss that rises on both sides of the best rate, and is no number far above it."""
    distance = math.log2(rate / best)
    return ShortRun(rate, [1 + distance**2 if distance < 4 else math.nan] * 3)


def test_what_a_short_run_came_to() -> None:
    assert ShortRun(1.0, [9.0, 3.0, 2.0, 1.0]).reached == 1.0
    assert ShortRun(1.0, [9.0] * 4 + [2.0, 4.0]).reached == 3.0
    assert ShortRun(1e-2, [2.0, math.nan, math.nan]).reached == math.inf


@given(st.floats(1e-6, 1.6e-2))
def test_the_search_comes_within_the_root_of_two_of_the_best_rate(best: float) -> None:
    tried = search(lambda rate: valley(rate, best))
    lowest = min(tried, key=lambda run: run.reached).rate
    assert best / 1.42 <= lowest <= best * 1.42
    assert len({run.rate for run in tried}) == len(tried)


def test_the_search_at_rates_of_real_models_takes_few_runs() -> None:
    for best in (1e-4, 3e-4, 1e-3, 2e-3):
        assert len(search(lambda rate, best=best: valley(rate, best))) <= 6  # type: ignore[misc]
    tried = search(lambda rate: valley(rate, 2.5e-4))
    assert [run.rate for run in tried] == [5e-4, 1.25e-4, 3.125e-5, 2.5e-4]  # not 2e-3, nor 6e-5


def test_the_search_ends_where_every_rate_diverges() -> None:
    assert len(search(lambda rate: ShortRun(rate, [math.nan]))) <= 9


def test_the_search_ends_where_no_rate_learns() -> None:
    """The loss rises with the rate, as where labels and audio do not belong together."""
    tried = search(lambda rate: ShortRun(rate, [rate]))
    assert min(run.rate for run in tried) == FIRST * 2.0**learning_rates.LOWEST


def test_no_rate_is_chosen_where_every_rate_diverges(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _, steps, _ = assemble(write_config(tmp_path / "run", setting))
    runs = ShortRuns(trainer)
    monkeypatch.setattr(runs, "run", lambda steps, rate: ShortRun(rate, [math.nan]))
    with pytest.raises(DataError, match=r"not finite at any learning rate from 9\.77e-07 on"):
        range_test(runs, steps, tmp_path / "curve.png")


@pytest.mark.slow
def test_the_range_test_warns_of_a_rate_far_off(
    tmp_path: Path, setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_config(tmp_path / "run", setting, schedule__max_steps=40)
    trainer, _, steps, _ = assemble(path)
    picture = tmp_path / "somewhere" / "curve.png"
    chosen = range_test(ShortRuns(trainer), steps, picture, configured=1e-7)
    assert 3e-4 <= chosen <= 1.6e-2
    assert picture.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(picture.with_suffix(".json").read_text())
    assert numbers["lowest_loss_at"] == chosen
    reached = {run["learning_rate"]: run["loss"] for run in numbers["runs"]}
    assert list(reached) == sorted(reached)
    assert min(reached, key=lambda rate: reached[rate]) == chosen
    assert {len(run["losses"]) for run in numbers["runs"]} == {STEPS}
    assert len({run["losses"][0] for run in numbers["runs"]}) == 1  # the same start and batch
    assert [text for text in warnings_in(caplog) if "optimizer.learning_rate is 1e-07" in text]


def test_a_run_chooses_its_rate_once(tmp_path: Path, setting: Setting) -> None:
    """It trains as if the rate had been configured, also after a stop, and the record has it."""
    folder = distil(write_config(tmp_path / "auto", setting, **AUTO))
    chosen = json.loads((folder / "run_info.json").read_text())["learning_rate"]
    assert json.loads((folder / "learning_rate.json").read_text())["lowest_loss_at"] == chosen
    rates = logged(folder, "train/learning_rate")
    assert rates == pytest.approx([chosen * factor for factor in (1, 0.75, 0.5, 0.25)])
    facts = json.loads((folder / "final" / "distillation.json").read_text())
    assert facts["recipe"]["optimizer"]["learning_rate"] == chosen
    assert facts["recipe"]["schedule"]["max_steps"] == 4
    assert f"learning rate {chosen}," in (folder / "final" / "README.md").read_text("utf-8")
    given = {**AUTO, "optimizer__learning_rate": chosen}
    other = distil(write_config(tmp_path / "given", setting, **given))
    assert not (other / "learning_rate.png").exists()
    weights = [(each / "final" / "model.safetensors").read_bytes() for each in (folder, other)]
    assert weights[0] == weights[1]


def test_the_rate_of_a_run_of_one_step_is_no_lower_than_that_of_a_longer_one(
    tmp_path: Path, setting: Setting
) -> None:
    """The short runs are whole ones: in a first step alone all rates come to the same loss."""
    chosen = []
    for steps in (1, 20):
        name = str(steps)
        trainer, _, learnt, _ = assemble(
            write_config(tmp_path / name, setting, schedule__max_steps=steps)
        )
        picture = tmp_path / name / "curve.png"
        chosen.append(range_test(ShortRuns(trainer), learnt, picture))
        runs = json.loads(picture.with_suffix(".json").read_text())["runs"]
        assert {len(run["losses"]) for run in runs} == {STEPS}
    assert chosen[0] >= chosen[1] / 2  # the batches are others


@pytest.mark.slow
def test_a_run_that_continues_keeps_its_rate(tmp_path: Path, setting: Setting) -> None:
    path = write_config(tmp_path / "run", setting, **AUTO, checkpoints={"every_steps": 2})
    trainer, train, *_ = assemble(path)
    save = trainer.save_checkpoint

    def stop_after_two() -> None:
        save()
        raise Interrupted

    trainer.save_checkpoint = stop_after_two  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        train()
    chosen = trainer.state.learning_rate
    (tmp_path / "run" / "learning_rate.png").unlink()
    trainer, train, *_ = assemble(path)
    train()
    assert trainer.state.learning_rate == chosen
    assert not (tmp_path / "run" / "learning_rate.png").exists()  # not compared again
    assert json.loads((tmp_path / "run" / "run_info.json").read_text())["learning_rate"] == chosen
    assert logged(tmp_path / "run", "train/learning_rate")[2:] == pytest.approx(
        [chosen * factor for factor in (0.5, 0.25)]  # type: ignore[operator]
    )


def test_short_runs_leave_the_scale_of_float16_as_it_was(tmp_path: Path, setting: Setting) -> None:
    trainer, *_ = assemble(write_config(tmp_path / "run", setting))
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    runs = ShortRuns(trainer)
    before = scaler.state_dict()
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight])
    scaler.scale(weight * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < before["scale"]
    runs.restore()
    assert scaler.state_dict() == before


def test_a_stop_while_rates_are_compared(tmp_path: Path, setting: Setting) -> None:
    trainer, train, *_ = assemble(write_config(tmp_path / "run", setting, **AUTO))
    trainer.run.stop_signal = 15
    with pytest.raises(Interrupted):
        train()
    assert trainer.state.learning_rate is None


def test_switching_the_range_test_on_does_not_hinder_resuming(
    tmp_path: Path, setting: Setting
) -> None:
    for enabled in (False, True):
        changed = {"check": {"learning_rate_range_test": enabled}}
        path = write_config(tmp_path / "run", setting, **changed)
        run = Run("run_distillation", path, load_config(path, run_distillation.Config))
        (run.folder / "checkpoints").mkdir(exist_ok=True)
    assert run.resumed
