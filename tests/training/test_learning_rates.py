"""The range test of learning rates: it suggests one that learns."""

import json
import math
from pathlib import Path

import pytest
from distilling import Setting, assemble, make_setting, warnings_in, write_config

import run_distillation
from simpler_distil_whisper.config import load_config
from simpler_distil_whisper.run import Run
from simpler_distil_whisper.training import learning_rates
from simpler_distil_whisper.training.learning_rates import (
    RATES,
    ShortRun,
    ShortRuns,
    range_test,
    suggested,
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("setting"))


def test_the_lowest_loss_is_suggested() -> None:
    worst = ShortRun(1e-5, [2.0, 2.0, 1.9])
    good = ShortRun(1e-3, [2.0, 1.5, 1.0])
    lucky = ShortRun(1e-4, [2.0, 0.1, 1.8])
    broken = ShortRun(1e-2, [2.0, math.nan, math.nan])
    assert broken.reached == math.inf
    assert ShortRun(1.0, [9.0, 3.0, 2.0, 1.0]).reached == 1.0
    assert ShortRun(1.0, [9.0] * 4 + [2.0, 4.0]).reached == 3.0
    assert suggested([worst, lucky, good, broken]) == 1e-3
    assert suggested([worst, broken]) is None


@pytest.mark.parametrize(
    ("configured", "rates"),
    [(1e-6, (1e-5, 1e-3, 1.0)), pytest.param(3e-3, RATES, marks=pytest.mark.slow)],
)
def test_the_range_test_finds_what_learns(
    tmp_path: Path,
    setting: Setting,
    configured: float,
    rates: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(learning_rates, "RATES", rates)
    path = write_config(
        tmp_path / "run", setting, optimizer__learning_rate=configured, schedule__max_steps=40
    )
    trainer, _, steps, _ = assemble(path)
    picture = tmp_path / "somewhere" / "curve.png"
    suggestion = range_test(ShortRuns(trainer), steps, configured, 60.0, picture)
    assert suggestion is not None
    assert 3e-4 <= suggestion <= 1e-2
    assert picture.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(picture.with_suffix(".json").read_text())
    assert numbers["suggested"] == suggestion
    reached = {run["learning_rate"]: run["loss"] for run in numbers["runs"]}
    assert configured in reached
    assert min(reached, key=lambda rate: reached[rate]) == suggestion
    assert {len(run["losses"]) for run in numbers["runs"]} == {10}
    assert len({run["losses"][0] for run in numbers["runs"]}) == 1  # the same start and batch
    far_off = [text for text in warnings_in(caplog) if "optimizer.learning_rate is 1e-06" in text]
    assert len(far_off) == (configured == 1e-6)


def test_switching_the_range_test_on_does_not_hinder_resuming(
    tmp_path: Path, setting: Setting
) -> None:
    for enabled in (False, True):
        changed = {"check": {"learning_rate_range_test": enabled}}
        path = write_config(tmp_path / "run", setting, **changed)
        run = Run("run_distillation", path, load_config(path, run_distillation.Config))
        (run.folder / "checkpoints").mkdir(exist_ok=True)
    assert run.resumed
