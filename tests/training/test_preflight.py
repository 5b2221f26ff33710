"""The checks of a run's beginning: silent where all is well, clear where one thing is wrong."""

import json
import math
import random
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import RunScript
from distilling import (
    Assembled,
    Setting,
    adding_spaces,
    assemble,
    distil,
    make_setting,
    warnings_in,
    write_config,
)
from tiny import read_rows, write_rows, write_tone

import run_distillation
from simpler_distil_whisper.config import ConfigError, load_config
from simpler_distil_whisper.script import run_script
from simpler_distil_whisper.stopping import Interrupted
from simpler_distil_whisper.training import preflight
from simpler_distil_whisper.training.dataset import TrainingBatch, TrainingSteps
from simpler_distil_whisper.training.learning_rates import ShortRuns
from simpler_distil_whisper.training.models import Teacher
from simpler_distil_whisper.training.preflight import (
    agreement_of_unpruned,
    check_agreement,
    check_at_start,
    check_learning_rate,
    check_thoroughly,
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("setting"))


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips that are not trained on."""
    folder = tmp_path_factory.mktemp("dev")
    rows = []
    for number in (100, 101):
        write_tone(folder / f"{number}.wav", 0.7, seed=number)
        rows.append({"audio": f"{number}.wav", "text": "abc", "language": "en"})
    return write_rows(folder / "dev.jsonl", rows)


def first_batch(steps: TrainingSteps) -> TrainingBatch:
    return next(steps.since(0))[0]


# Teacher and student, unpruned


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 1e-6),
        ({"freeze__encoder": False}, 1e-6),
        ({"objective__temperature": 3.0}, 1e-6),
        ({"teacher__dtype": "bfloat16"}, 0.05),
        ({"precision": "bf16"}, 0.05),
    ],
)
def test_a_student_with_all_layers_agrees_with_the_teacher(
    tmp_path: Path, setting: Setting, options: dict[str, Any], most: float
) -> None:
    trainer, _, steps, _ = assemble(write_config(tmp_path / "run", setting, **options))
    agreement = check_agreement(trainer, steps)
    assert agreement is not None
    assert abs(agreement.kl) < most
    assert agreement.same > 0.9
    assert agreement.tokens == first_batch(steps).label_tokens
    teacher = trainer.models.teacher.folder
    assert (teacher.config["decoder_layers"], teacher.path) == (2, setting.teacher)


def test_models_that_are_given_different_things_end_the_run(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher gets its tokens one place late, as where labels are shifted twice."""
    decoder_states = Teacher.decoder_states

    def late(self: Teacher, batch: TrainingBatch, states: torch.Tensor | None) -> torch.Tensor:
        return decoder_states(self, batch, states).roll(1, dims=1)

    path = write_config(tmp_path / "run", setting)
    monkeypatch.setattr(Teacher, "decoder_states", late)
    with pytest.raises(ConfigError, match=r"do not agree: KL [\d.e+]+ per token") as error:
        distil(path)
    kl = float(re.findall(r"KL ([\d.e+]+)", str(error.value))[0])
    assert kl > 0.1
    assert not list((tmp_path / "run").glob("metrics.jsonl"))


def test_numbers_that_are_not_finite_end_the_run(tmp_path: Path, setting: Setting) -> None:
    trainer, _, steps, _ = assemble(write_config(tmp_path / "run", setting))
    trainer.models.teacher.head *= math.inf
    with pytest.raises(ConfigError, match="KL nan .* teacher.dtype"):
        check_agreement(trainer, steps)


def test_nothing_is_compared_where_the_teacher_has_no_part(
    tmp_path: Path, setting: Setting
) -> None:
    trainer, _, steps, _ = assemble(
        write_config(tmp_path / "run", setting, objective__kl_weight=0.0)
    )
    assert check_agreement(trainer, steps) is None
    assert not trainer.models.teacher.loaded


def test_the_pruned_student_does_not_agree_with_the_teacher(
    tmp_path: Path, setting: Setting
) -> None:
    """The check compares whole models: the pruned student's own KL is far from 0."""
    trainer, _, steps, _ = assemble(write_config(tmp_path / "run", setting))
    batch = first_batch(steps)
    terms = trainer.models.loss_terms(batch)
    assert float(terms.kl / terms.tokens) > 0.01
    assert agreement_of_unpruned(trainer.models, batch).kl < 1e-6


# The learning rate


@pytest.mark.parametrize(("rate", "falls"), [(1e-3, True), (10.0, False), (1e9, False)])
def test_a_learning_rate_that_raises_the_loss(
    tmp_path: Path, setting: Setting, rate: float, falls: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_config(tmp_path / "run", setting, optimizer__learning_rate=rate)
    trainer, _, steps, _ = assemble(path)
    before = {name: p.clone() for name, p in trainer.models.student.model.state_dict().items()}
    check_learning_rate(ShortRuns(trainer), next(steps.since(0)), rate)
    assert ["should fall" in text for text in warnings_in(caplog)] == [True] * (not falls)
    # Nothing is left of it for what is tried next.
    after = trainer.models.student.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not trainer.optimizer.state
    assert trainer.state.step == 0


# All of it


def test_all_is_well(
    tmp_path: Path, setting: Setting, dev: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing is wrong but the hours, only they are warned of; the costs are logged."""
    path = write_config(tmp_path / "run", setting, data__dev_manifest=dev, schedule__max_steps=30)
    trainer, _, steps, prepared = assemble(path)
    caplog.clear()
    with caplog.at_level("INFO"):
        check_thoroughly(trainer, steps, prepared.selection, prepared.dev, 1e-3, None)
    assert [text[:4] for text in warnings_in(caplog)] == ["only"]
    tokens = sum(len(row["text"]) + 1 for row in read_rows(setting.train))
    assert re.search(rf"kept: 8 rows, 0.00 h, {tokens} label tokens", caplog.text)
    # Dev four times, and once with the teacher.
    number = r"[\d.e-]+"
    assert re.search(rf"about 0:\d\d:\d\d: 30 steps of {number} s, 5 times dev of", caplog.text)
    assert re.search(r"memory: at most \d+ MB so far", caplog.text)
    assert re.search(r"unpruned, agree: KL [\d.e-]+ per token, .* 100.0%", caplog.text)


def check_run(path: Path) -> tuple[Assembled, dict[str, float]]:
    """Do the checks at a run's start; return what run_info.json then holds of them."""
    assembled = assemble(path)
    trainer, _, steps, prepared = assembled
    check_at_start(trainer, steps, prepared.selection, prepared.dev)
    info = json.loads((trainer.run.folder / "run_info.json").read_text())
    return assembled, info["check"]


def test_a_run_notes_what_was_checked(tmp_path: Path, setting: Setting, dev: Path) -> None:
    _, checked = check_run(write_config(tmp_path / "run", setting, data__dev_manifest=dev))
    assert abs(checked.pop("unpruned_kl")) < 1e-6
    assert checked == {
        "unpruned_agreement": 1.0,
        "hours": 0.0016,  # 5.8 s
        "labels_not_given_back": 0,
        "dev_rows_with_labels_for_references": 0,
        "train_rows_heard_in_dev": 0,
    }


def test_a_run_goes_the_same_way_whether_it_was_checked_or_not(
    tmp_path: Path, setting: Setting
) -> None:
    trainer, _, steps, prepared = assemble(write_config(tmp_path / "run", setting))
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    weights = {name: w.clone() for name, w in trainer.models.student.model.state_dict().items()}
    check_at_start(trainer, steps, prepared.selection, None)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    after = trainer.models.student.model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert trainer.state.step == 0


def test_a_continued_run_is_not_checked_again(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path / "run", setting)
    trainer, train, *_ = assemble(path)
    trainer.run.stop_signal = signal.SIGTERM
    with pytest.raises(Interrupted):
        train()
    monkeypatch.setattr(preflight, "check_at_start", lambda *_: pytest.fail("checked again"))
    distil(path)


@pytest.mark.slow
def test_a_check_neither_fills_a_cache_nor_loads_a_teacher_that_none_needs(
    tmp_path: Path, setting: Setting
) -> None:
    options = {"teacher_cache__folder": tmp_path / "cache", "checkpoints__every_steps": 9}
    first, checked = check_run(write_config(tmp_path / "first", setting, **options))
    assert checked["unpruned_agreement"] == 1.0
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    first.train()
    second, checked = check_run(write_config(tmp_path / "second", setting, **options))
    assert not second.trainer.models.teacher.loaded
    assert checked.keys() == {"hours", "labels_not_given_back"}


# From the command line


def exit_code_of_check(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("simpler_distil_whisper.script.log_to_stderr", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["run_distillation.py", str(path), "--check"])
    parts = (run_distillation.prepare, run_distillation.work)
    return run_script(
        "run_distillation", "", run_distillation.Config, *parts, check=run_distillation.check
    )


@pytest.mark.slow
def test_check_leaves_nothing_behind(
    tmp_path: Path,
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    options = {"teacher_cache__folder": tmp_path / "cache", "schedule__max_steps": 30}
    augmentation = {"views": 2, "waveform": {"gain_db": [-3.0, 3.0]}}
    path = write_config(tmp_path / "run", setting, augmentation=augmentation, **options)
    before = set(tmp_path.rglob("*"))
    with caplog.at_level("INFO"):
        assert exit_code_of_check(path, monkeypatch) == 0
    # Three versions of 8 clips, 4 a step.
    match = re.search(
        r" 6 steps of (\S+) s that fill the teacher cache, 24 of (\S+) s", caplog.text
    )
    assert match
    assert float(match[2]) < float(match[1])
    assert set(tmp_path.rglob("*")) == before


def test_the_exit_code_of_check_tells_what_is_wrong(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = adding_spaces(setting, tmp_path)
    assert exit_code_of_check(write_config(tmp_path / "data", spaced), monkeypatch) == 3
    decoder_states = Teacher.decoder_states
    monkeypatch.setattr(
        Teacher, "decoder_states", lambda *given: decoder_states(*given).roll(1, dims=1)
    )
    assert exit_code_of_check(write_config(tmp_path / "models", setting), monkeypatch) == 2
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_check_draws_the_learning_rates_beside_the_output_folder(
    tmp_path: Path, setting: Setting, run_script: RunScript
) -> None:
    output = tmp_path / "out"
    path = write_config(output, setting, check={"learning_rate_range_test": True})
    done = run_script("run_distillation", path, "--check")
    assert done.returncode == 0, done.stderr
    assert "all checked, nothing done" in done.stderr
    assert "unpruned, agree" in done.stderr
    names = {"out.json", "out.learning_rate.json", "out.learning_rate.png"}
    assert {file.name for file in tmp_path.iterdir()} == names
    # What stands there is no hindrance to the run itself.
    done = run_script("run_distillation", path)
    assert done.returncode == 0, done.stderr
    assert "only 0.00 h of audio" in (output / "log.txt").read_text()


def test_several_processes_do_not_wait_for_each_other(
    tmp_path: Path,
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = load_config(write_config(tmp_path / "run", setting), run_distillation.Config)
    prepared = run_distillation.prepare(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level("INFO"):
        run_distillation.check(config, prepared)
    assert "leave the launcher out" in caplog.text


def test_a_row_in_a_language_that_the_model_lacks_is_rejected(
    tmp_path: Path, setting: Setting
) -> None:
    rows = [{"text": "a", "language": code} for code in ("en", "zh", "yue", "en")]
    audio = str(setting.train.parent / "0.wav")
    train = write_rows(tmp_path / "rows.jsonl", [row | {"audio": audio} for row in rows])
    lacking = setting._replace(train=train)
    path = write_config(tmp_path / "run", lacking, data__max_bad_fraction=0.5)
    selection = run_distillation.prepare(load_config(path, run_distillation.Config)).selection
    assert len(selection.examples) == 3
    [rejection] = selection.rejections
    assert (rejection.place, "yue" in rejection.reason) == (f"{train}:3", True)
