"""Each check of a run's beginning: silent where all is well, heard where one thing is wrong."""

import json
import math
import random
import re
import shutil
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
from distilling import Assembled, Setting, assemble, distil, make_setting, write_config
from tiny import read_rows, write_rows, write_tone

import run_distillation
from simpler_distil_whisper import run
from simpler_distil_whisper.config import ConfigError, load_config
from simpler_distil_whisper.data.manifest import Manifest, read_manifest
from simpler_distil_whisper.run import DataError, Interrupted, Run
from simpler_distil_whisper.training import learning_rate_test, preflight
from simpler_distil_whisper.training.data_checks import (
    check_hours,
    check_labels,
    check_references,
    check_shared_audio,
)
from simpler_distil_whisper.training.dataset import TrainingBatch, TrainingSteps
from simpler_distil_whisper.training.filters import Selection
from simpler_distil_whisper.training.learning_rate_test import (
    RATES,
    ShortRun,
    ShortRuns,
    range_test,
    suggested,
)
from simpler_distil_whisper.training.models import Teacher
from simpler_distil_whisper.training.options import TrainingColumns
from simpler_distil_whisper.training.preflight import (
    agreement_of_unpruned,
    check_agreement,
    check_at_start,
    check_learning_rate,
    check_thoroughly,
)
from simpler_distil_whisper.training.tokens import Example

SIGNS = {"average_log_probability": -0.1, "compression_ratio": 1.1}


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


def read(path: Path, **columns: str) -> Manifest:
    return read_manifest(path, TrainingColumns(**columns))


def first_batch(steps: TrainingSteps) -> TrainingBatch:
    return next(steps.since(0))[0]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


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
def test_a_student_with_all_layers_says_what_the_teacher_says(
    tmp_path: Path, setting: Setting, options: dict[str, Any], most: float
) -> None:
    trainer, _, steps, _ = assemble(write_config(tmp_path / "run", setting, **options))
    found = check_agreement(trainer, steps)
    assert found is not None
    assert abs(found.kl) < most
    assert found.same > 0.9
    assert found.tokens == first_batch(steps).label_tokens
    teacher = trainer.models.teacher.folder
    assert (teacher.config["decoder_layers"], teacher.path) == (2, setting.teacher)


def test_models_that_are_given_different_things_end_the_run(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher gets its tokens one place late, as where labels are shifted twice."""
    answer = Teacher.decoder_states

    def late(self: Teacher, batch: TrainingBatch, states: torch.Tensor | None) -> torch.Tensor:
        return answer(self, batch, states).roll(1, dims=1)

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


def test_the_student_itself_does_not_say_what_the_teacher_says(
    tmp_path: Path, setting: Setting
) -> None:
    """The check compares whole models: the pruned student's own KL is far from 0."""
    trainer, _, steps, _ = assemble(write_config(tmp_path / "run", setting))
    batch = first_batch(steps)
    terms = trainer.models.loss_terms(batch)
    assert float(terms.kl / terms.tokens) > 0.01
    assert agreement_of_unpruned(trainer.models, batch).kl < 1e-6


# Labels


def examples_of(
    folder: Path, rows: list[dict[str, Any]], setting: Setting, **data: Any
) -> tuple[Assembled, list[Example]]:
    """The examples of some rows on the setting's first clip."""
    audio = str(setting.train.parent / "0.wav")
    common = {"audio": audio, "language": "en"}
    train = write_rows(folder / "rows.jsonl", [common | row for row in rows])
    changes = {f"data__{name}": value for name, value in data.items()}
    assembled = assemble(write_config(folder / "run", setting._replace(train=train), **changes))
    return assembled, assembled.prepared.selection.examples


def adding_spaces(setting: Setting, folder: Path) -> Setting:
    """The setting with a student whose tokenizer begins every text with a space."""
    student = shutil.copytree(setting.student, folder / "adding_spaces")
    path = student / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "add_prefix_space": True}), encoding="utf-8")
    return setting._replace(student=student)


TIMED = {
    "text": "Ab Cd. 好的",
    "segments": [
        {"start_seconds": 0.0, "end_seconds": 0.2, "text": "Ab Cd."},
        {"start_seconds": 0.2, "end_seconds": None, "text": "好的"},
    ],
}


def test_labels_that_come_back_are_left_in_peace(
    tmp_path: Path, setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    long_past = {"text": "x", "previous_text": "語" * 400}  # 3 tokens each: cut within a character
    rows = [{"text": "  Two  spaces \n"}, TIMED, TIMED | {"previous_text": "Before."}, long_past]
    options = {"timestamp_probability": 0.5, "previous_text_probability": 0.5}
    (trainer, _, steps, _), examples = examples_of(tmp_path, rows, setting, **options)
    assert check_labels(examples, steps.visit_tokens.data, trainer.models.student) == 0
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"text": "ab"}, {}),
        ({"text": " ab", "previous_text": "Before."}, {"previous_text_probability": 0.1}),
    ],
)
def test_text_that_its_tokens_do_not_give_back(
    tmp_path: Path,
    setting: Setting,
    caplog: pytest.LogCaptureFixture,
    row: dict[str, Any],
    options: dict[str, float],
) -> None:
    rows = [{"text": " ab", "previous_text": " Before."}] * 9 + [row]
    spaced = adding_spaces(setting, tmp_path)
    data = {"max_bad_fraction": 0.1, **options}
    (trainer, _, steps, _), examples = examples_of(tmp_path, rows, spaced, **data)
    section = steps.visit_tokens.data
    assert check_labels(examples, section, trainer.models.student) == 1
    text = "Before." if options else "ab"
    [warning] = warnings_in(caplog)
    assert f'rows.jsonl:10: "{text}"' in warning.replace("previous text ", "")
    assert f'comes back as " {text}"' in warning
    with pytest.raises(DataError, match="1 of 10 rows"):
        strict = section.model_copy(update={"max_bad_fraction": 0.05})
        check_labels(examples, strict, trainer.models.student)


def test_a_million_labels_are_not_all_read(
    tmp_path: Path, setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _, steps, prepared = assemble(write_config(tmp_path / "run", setting))
    with caplog.at_level("INFO"):
        examples = prepared.selection.examples * 1000
        check_labels(examples, steps.visit_tokens.data, trainer.models.student)
    assert "200 labels, those looked at, survive" in caplog.text


# Dev


@pytest.mark.parametrize(
    ("row", "columns", "fault"),
    [
        ({}, {}, False),
        (SIGNS, {}, True),
        (SIGNS | {"origin_text": "said"}, {}, False),
        (SIGNS | {"origin_text": None}, {}, False),
        (SIGNS | {"said": "said"}, {}, True),
        (SIGNS | {"said": "said"}, {"reference": "said"}, False),
        (SIGNS | {"origin_text": "said"}, {"reference": "text"}, True),
    ],
)
def test_a_dev_row_without_a_reference_of_its_own(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    row: dict[str, Any],
    columns: dict[str, str],
    fault: bool,
) -> None:
    write_tone(tmp_path / "a.wav")
    good = {"audio": "a.wav", "text": "a"}
    path = write_rows(tmp_path / "dev.jsonl", [good, good | row])
    manifest = read(path, **columns)
    assert check_references(manifest, TrainingColumns(**columns)) == int(fault)
    assert [f"{path}:2" in text for text in warnings_in(caplog)] == [True] * fault


def shared(tmp_path: Path, setting: Setting, train: dict[str, Any], dev: dict[str, Any]) -> int:
    """Return how many of the training rows, one of them as given, are heard in dev."""
    folder = setting.train.parent
    rows = [{"audio": str(folder / "1.wav")}, {"audio": str(folder / "2.wav")} | train]
    _, examples = examples_of(tmp_path, [{"text": "a"} | row for row in rows], setting)
    path = write_rows(tmp_path / "dev.jsonl", [{"audio": str(folder / "3.wav")}, dev])
    return check_shared_audio(examples, read(path))


def test_audio_in_train_and_dev(
    tmp_path: Path, setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    clip, other = (setting.train.parent / name for name in ("2.wav", "7.wav"))
    assert clip.stat().st_size == other.stat().st_size  # the same length, not the same sound
    link, copy = tmp_path / "link.wav", tmp_path / "copy.wav"
    link.symlink_to(clip)
    shutil.copy(clip, copy)
    begin = {"duration_seconds": 0.4}
    rest = {"start_seconds": 0.4, "duration_seconds": 0.4}
    across = {"start_seconds": 0.2, "duration_seconds": 0.4}
    for train, dev, expected in [
        ({}, {"audio": str(other)}, 0),
        ({}, {"audio": str(clip)}, 1),
        ({}, {"audio": str(link)}, 1),
        ({}, {"audio": str(copy)}, 1),
        (begin, {"audio": str(clip)} | rest, 0),
        (begin, {"audio": str(clip)} | across, 1),
        (begin, {"audio": str(copy)} | rest, 0),
        (begin, {"audio": str(copy)} | across, 1),
        (rest, {"audio": str(clip)}, 1),
    ]:
        caplog.clear()
        assert shared(tmp_path, setting, train, dev) == expected, (train, dev)
        heard = [
            text for text in warnings_in(caplog) if "share audio with data.dev_manifest" in text
        ]
        assert len(heard) == expected
        for text in heard:
            assert f"{tmp_path}/rows.jsonl:2 and {tmp_path}/dev.jsonl:2" in text


def test_files_as_large_as_a_dev_file_are_read_only_so_far(
    tmp_path: Path,
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    copy = tmp_path / "copy.wav"
    shutil.copy(setting.train.parent / "2.wav", copy)
    monkeypatch.setattr("simpler_distil_whisper.training.data_checks.BYTES_COMPARED", 1000)
    with caplog.at_level("INFO"):
        assert shared(tmp_path, setting, {}, {"audio": str(copy)}) == 0
    assert "0 of 1 files as large as a dev file were compared" in caplog.text


# Hours


@pytest.mark.parametrize(("hours", "warned"), [(24.9, True), (25.0, False), (250.0, False)])
def test_little_audio(hours: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert check_hours(Selection([], [], {"kept": {"rows": 1, "hours": hours}})) == hours
    assert ["30 % from 25" in text for text in warnings_in(caplog)] == [True] * warned


# The learning rate


@pytest.mark.parametrize(("rate", "falls"), [(1e-3, True), (10.0, False), (1e30, False)])
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
    monkeypatch.setattr(learning_rate_test, "RATES", rates)
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


def test_the_range_test_of_an_earlier_config_stands_in_no_ones_way(
    tmp_path: Path, setting: Setting
) -> None:
    for wanted in (False, True):
        changed = {"check": {"learning_rate_range_test": wanted}}
        path = write_config(tmp_path / "run", setting, **changed)
        run = Run("run_distillation", path, load_config(path, run_distillation.Config))
        (run.folder / "checkpoints").mkdir(exist_ok=True)
    assert run.resumed


# All of it


def test_all_is_well(
    tmp_path: Path, setting: Setting, dev: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing is wrong but the hours, only they are warned of; costs are said."""
    path = write_config(tmp_path / "run", setting, data__dev_manifest=dev, schedule__max_steps=30)
    trainer, _, steps, prepared = assemble(path)
    caplog.clear()
    with caplog.at_level("INFO"):
        check_thoroughly(trainer, steps, prepared.selection, prepared.dev, 1e-3, None)
    assert [text[:4] for text in warnings_in(caplog)] == ["only"]
    tokens = sum(len(row["text"]) + 1 for row in read_rows(setting.train))
    assert re.search(rf"kept: 8 rows, 0.00 h, {tokens} label tokens", caplog.text)
    # 30 steps, 2 an epoch: dev 15 times, and once with the teacher.
    number = r"[\d.e-]+"
    assert re.search(rf"about 0:\d\d:\d\d: 30 steps of {number} s, 16 times dev of", caplog.text)
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
    _, found = check_run(write_config(tmp_path / "run", setting, data__dev_manifest=dev))
    assert abs(found.pop("unpruned_kl")) < 1e-6
    assert found == {
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


def test_a_check_neither_fills_a_cache_nor_loads_a_teacher_that_none_needs(
    tmp_path: Path, setting: Setting
) -> None:
    options = {"teacher_cache__folder": tmp_path / "cache", "checkpoints__every_steps": 9}
    first, found = check_run(write_config(tmp_path / "first", setting, **options))
    assert found["unpruned_agreement"] == 1.0
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    first.train()
    second, found = check_run(write_config(tmp_path / "second", setting, **options))
    assert not second.trainer.models.teacher.loaded
    assert found.keys() == {"hours", "labels_not_given_back"}


# From the command line


def exit_code_of_check(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("simpler_distil_whisper.run._log_to_stderr", lambda: None)
    monkeypatch.setattr(sys, "argv", ["run_distillation.py", str(path), "--check"])
    parts = (run_distillation.prepare, run_distillation.work)
    return run.run_script(
        "run_distillation", "", run_distillation.Config, *parts, check=run_distillation.check
    )


def test_check_leaves_nothing_behind(
    tmp_path: Path,
    setting: Setting,
    dev: Path,
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
    found = re.search(
        r" 6 steps of (\S+) s that fill the teacher cache, 24 of (\S+) s", caplog.text
    )
    assert found
    assert float(found[2]) < float(found[1])
    assert set(tmp_path.rglob("*")) == before


def test_check_ends_with_the_code_of_what_it_found(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = adding_spaces(setting, tmp_path)
    assert exit_code_of_check(write_config(tmp_path / "data", spaced), monkeypatch) == 3
    answer = Teacher.decoder_states
    monkeypatch.setattr(Teacher, "decoder_states", lambda *given: answer(*given).roll(1, dims=1))
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
