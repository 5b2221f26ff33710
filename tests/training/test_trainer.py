"""Training runs of tiny models: what an optimizer step does, and what a stop must not change."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import REPOSITORY
from distilling import (
    Setting,
    assemble,
    assert_same_run,
    distil,
    largest_difference,
    load_model,
    logged,
    make_setting,
    weights_in,
    write_config,
)
from tiny import read_rows, write_rows
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.manifest import read_manifest
from simpler_distil_whisper.decoding.hypothesis import Hypothesis
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.rows import (
    LabelColumns,
    Labeller,
    LabellingColumns,
    OutputColumns,
)
from simpler_distil_whisper.run import DataError
from simpler_distil_whisper.stopping import Interrupted
from simpler_distil_whisper.training.optimizer import learning_rate_factor
from simpler_distil_whisper.training.options import ScheduleKind
from simpler_distil_whisper.training.trainer import Trainer

Model = WhisperForConditionalGeneration


RUNNING = b'{"script": "run_distillation", "outcome": "running"}'  # of a run that was killed


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("setting"))


def before_each_step(trainer: Trainer, action: Callable[[torch.optim.Optimizer], None]) -> None:
    """Call `action` with the optimizer, gradients in place, before each of its steps."""
    trainer.optimizer.optimizer.register_step_pre_hook(lambda opt, args, kwargs: action(opt))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    named = trainer.models.student.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def first_gradients(path: Path) -> dict[str, torch.Tensor]:
    trainer, train, *_ = assemble(path)
    collected: list[dict[str, torch.Tensor]] = []
    before_each_step(trainer, lambda opt: collected.append(gradients(trainer)))
    train()
    return collected[0]


def change_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


# One optimizer step


def test_how_a_step_is_cut_up_changes_nothing(tmp_path: Path, setting: Setting) -> None:
    """Labels are 1 to 50 tokens long: means of micro-batches would weigh them by batch."""
    # A large epsilon, or Adam would blow up rounding errors of gradients near 0.
    common = {"optimizer__epsilon": 1e-2, "optimizer__learning_rate": 1e-2}
    whole = write_config(tmp_path / "whole", setting, batch__micro_batch_size=8, **common)
    cuts = {(4, 2), (2, 4), (1, 8)}
    expected = weights_in(distil(whole) / "final")
    for size, count in cuts:
        batch = {"micro_batch_size": size, "gradient_accumulation_steps": count}
        cut = write_config(tmp_path / f"cut{size}", setting, batch=batch, **common)
        assert largest_difference(weights_in(distil(cut) / "final"), expected) < 1e-6
        losses = [logged(tmp_path / name, "train/loss") for name in ("whole", f"cut{size}")]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    before = weights_in(setting.student)
    assert largest_difference(expected, before) > 1e-3


def test_a_step_follows_the_mean_over_all_its_tokens(tmp_path: Path, setting: Setting) -> None:
    """The oracle: transformers' forward pass of one utterance after the other, unpadded."""
    options = {
        "batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 2},
        "schedule__max_steps": 1,
        "objective": {"cross_entropy_weight": 0.5, "kl_weight": 2.0, "temperature": 3.0},
        "optimizer": {"max_grad_norm": None},
    }
    path = write_config(tmp_path / "run", setting, **options)
    trainer, _, steps, _ = assemble(path)
    teacher, student = (Model.from_pretrained(f) for f in (setting.teacher, setting.student))
    loss, tokens = torch.zeros(()), 0
    for example in steps.visit_tokens.examples:
        features = trainer.models.student.feature_extractor(
            load_audio(example.utterance.audio), sampling_rate=16_000, return_tensors="pt"
        ).input_features
        ids = torch.tensor([example.tokens])
        ours, theirs = (
            model(features, decoder_input_ids=ids[:, :-1]).logits[0, 3:].double()
            for model in (student, teacher)
        )
        labels = ids[0, 4:]
        p, log_q = (theirs / 3).softmax(-1).detach(), (ours / 3).log_softmax(-1)
        kl = 9 * (p * (p.log() - log_q)).sum()
        cross_entropy = -ours.log_softmax(-1)[range(len(labels)), labels].sum()
        loss, tokens = loss + 0.5 * cross_entropy + 2.0 * kl, tokens + len(labels)
    (loss / tokens).backward()
    actual = first_gradients(path)
    assert logged(tmp_path / "run", "train/loss") == pytest.approx(
        [float(loss.detach() / tokens)], rel=1e-5
    )
    for name, gradient in actual.items():
        expected = dict(student.named_parameters())[name].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
    assert len(actual) > 20


def test_prompt_is_given_and_not_learnt(tmp_path: Path, setting: Setting) -> None:
    _, _, steps, _ = assemble(write_config(tmp_path / "run", setting))
    tokens = sum(len(example.tokens) - 4 for example in steps.visit_tokens.examples)
    rows = read_rows(setting.train)
    assert tokens == sum(len(row["text"]) + 1 for row in rows)


def test_both_models_are_given_the_label_in_the_script_that_it_was_written_in(
    tmp_path: Path, setting: Setting
) -> None:
    """The student is its teacher: KL is 0 only where both are given the same tokens."""
    columns = LabelColumns.from_config(
        LabellingColumns(), OutputColumns(), with_segments=False, with_unconverted=True
    )
    hypothesis = Hypothesis("頭髮在臺灣", "zh", (1,) * 9, (), -0.1, 0.0, 1.0, 0.0, True)
    chinese = [row | {"language": "zh"} for row in read_rows(setting.train)]
    manifest = write_rows(setting.train.with_name("zh.jsonl"), chinese)
    rows = [
        Labeller(columns, Scorer(Metric()), None, "simplified").row(utterance, hypothesis, 1.0)
        for utterance in read_manifest(manifest, LabellingColumns()).utterances
    ]
    train = write_rows(tmp_path / "labels.jsonl", rows)
    options = {"schedule__max_steps": 1, "batch": {"micro_batch_size": 8}}
    path = write_config(
        tmp_path / "run", Setting(setting.teacher, setting.teacher, train), **options
    )
    [(batch,)] = assemble(path).steps.since(0)
    whisper = load_model(setting.teacher)
    for inputs, labels in zip(batch.decoder_input_ids, batch.labels, strict=True):
        assert whisper.text_of(labels[labels >= 0].tolist()) == "头发在台湾"
        assert whisper.text_of(inputs.tolist()) == "头发在台湾"
    run = distil(path)
    assert logged(run, "train/kl") == pytest.approx([0.0], abs=1e-5)
    assert logged(run, "train/cross_entropy")[0] > 1
    assert logged(run, "train/agreement") == [1.0]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_learning_rate_is_the_schedules(
    tmp_path: Path, setting: Setting, kind: ScheduleKind
) -> None:
    schedule = {"kind": kind, "warmup_steps": 3, "max_steps": 7, "epochs": None}
    path = write_config(tmp_path / "run", setting, schedule=schedule, optimizer__learning_rate=2e-3)
    trainer, train, *_ = assemble(path)
    rates: list[float] = []
    before_each_step(trainer, lambda opt: rates.extend({g["lr"] for g in opt.param_groups}))
    train()
    assert rates == pytest.approx([2e-3 * learning_rate_factor(kind, n, 3, 7) for n in range(7)])
    assert logged(tmp_path / "run", "train/learning_rate") == rates


def test_the_learning_rate_scales_the_first_step(tmp_path: Path, setting: Setting) -> None:
    """Adam's first step moves each weight by the learning rate, whatever its gradient."""
    options = {"schedule__max_steps": 1, "optimizer__learning_rate": 3e-4}
    final = weights_in(distil(write_config(tmp_path / "run", setting, **options)) / "final")
    assert largest_difference(final, weights_in(setting.student)) == pytest.approx(3e-4, rel=1e-2)


def test_every_optimizer_key_has_its_effect(tmp_path: Path, setting: Setting) -> None:
    options = {"betas": [0.8, 0.95], "epsilon": 1e-6, "weight_decay": 0.03, "learning_rate": 1e-5}
    trainer, *_ = assemble(write_config(tmp_path / "run", setting, optimizer=options))
    decayed, free = trainer.optimizer.param_groups
    for group in (decayed, free):
        assert tuple(group["betas"]) == (0.8, 0.95)
        assert group["eps"] == 1e-6
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.03, 0.0)


def test_gradients_are_clipped_to_the_norm_and_their_own_norm_is_logged(
    tmp_path: Path, setting: Setting
) -> None:
    norms = {}
    for limit in (1e-3, None):
        path = write_config(
            tmp_path / str(limit), setting, optimizer__max_grad_norm=limit, schedule__max_steps=1
        )
        norm = torch.stack([g.norm() for g in first_gradients(path).values()]).norm()
        norms[limit] = float(norm)
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[None] > 1e-2
    for limit in (1e-3, None):
        assert logged(tmp_path / str(limit), "train/grad_norm") == pytest.approx([norms[None]])


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float16, "float32"),
        pytest.param(torch.float16, "bf16", marks=pytest.mark.slow),
        (torch.bfloat16, "bf16"),
        pytest.param(torch.bfloat16, "float32", marks=pytest.mark.slow),
    ],
)
def test_weights_are_trained_in_float32_whatever_the_checkpoint_has(
    tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    setting = make_setting(tmp_path, 4, dtype=dtype)
    path = write_config(
        tmp_path / "run", setting, precision=precision, schedule__max_steps=2, teacher__dtype="auto"
    )
    trainer, train, *_ = assemble(path)
    seen: set[torch.dtype] = set()
    before_each_step(trainer, lambda opt: seen.update(g.dtype for g in gradients(trainer).values()))
    train()
    assert seen == {torch.float32}
    assert {p.dtype for p in trainer.models.student.model.parameters()} == {torch.float32}
    moments = [state["exp_avg"].dtype for state in trainer.optimizer.state.values()]
    assert moments
    assert set(moments) == {torch.float32}


def test_bf16_precision_computes_in_bf16(tmp_path: Path, setting: Setting) -> None:
    dtypes = []
    for precision in ("float32", "bf16"):
        trainer, train, *_ = assemble(
            write_config(tmp_path / precision, setting, precision=precision, schedule__max_steps=1)
        )
        layer = trainer.models.student.model.model.decoder.layers[0].fc1
        layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        train()
        final = trainer.run.folder
        assert logged(final, "train/loss")[0] > 0
    assert dtypes == [torch.float32, torch.bfloat16]
    losses = [logged(tmp_path / p, "train/loss")[0] for p in ("float32", "bf16")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what fp16 needs")
def test_fp16_without_a_gpu_is_refused(tmp_path: Path, setting: Setting) -> None:
    with pytest.raises(ConfigError, match="fp16"):
        assemble(write_config(tmp_path / "run", setting, precision="fp16"))


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_would_cut_the_model_into_parts_is_refused(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What `accelerate launch` sets for its processes."""
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    with pytest.raises(ConfigError, match=f"{way}.*plain data parallelism"):
        assemble(write_config(tmp_path / "run", setting))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_teacher_runs_in_its_dtype(tmp_path: Path, setting: Setting, dtype: str) -> None:
    trainer, train, *_ = assemble(
        write_config(tmp_path / "run", setting, teacher__dtype=dtype, schedule__max_steps=1)
    )
    assert {p.dtype for p in trainer.models.teacher.model.parameters()} == {getattr(torch, dtype)}
    train()
    info = json.loads((tmp_path / "run" / "run_info.json").read_text())
    # Compared before the cast: rounding the teacher alone must not unshare the encoder.
    assert (info["teacher_dtype"], info["shared_encoder"]) == (dtype, True)


# What is trained and what is not


@pytest.mark.parametrize("frozen", [True, False])
def test_teacher_and_frozen_encoder_stay_and_the_rest_moves(
    tmp_path: Path, setting: Setting, frozen: bool
) -> None:
    path = write_config(tmp_path / "run", setting, freeze={"encoder": frozen})
    trainer, train, *_ = assemble(path)
    models = (trainer.models.teacher.model, trainer.models.student.model)
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    train()
    teacher, student = (model.state_dict() for model in models)
    assert largest_difference(teacher, before[0]) == 0
    moved = {name for name in student if not torch.equal(student[name], before[1][name])}
    parts = {name.split(".")[1] for name in moved if name != "proj_out.weight"}
    assert parts == {"decoder"} if frozen else {"encoder", "decoder"}
    assert "model.encoder.embed_positions.weight" not in moved
    assert "model.decoder.layers.0.fc1.weight" in moved


def test_shared_and_separate_encoders_give_the_same_first_loss(
    tmp_path: Path, setting: Setting
) -> None:
    losses, shared = [], []
    for frozen in (True, False):
        path = write_config(
            tmp_path / str(frozen), setting, freeze={"encoder": frozen}, schedule__max_steps=1
        )
        folder = distil(path)
        losses.append([logged(folder, f"train/{name}") for name in ("kl", "cross_entropy")])
        shared.append(json.loads((folder / "run_info.json").read_text())["shared_encoder"])
    assert losses[0] == losses[1]
    assert shared == [True, False]


def test_an_encoder_that_differs_is_not_shared(tmp_path: Path, setting: Setting) -> None:
    """Of the same shape, but fine-tuned: the teacher must go on using its own."""
    other = tmp_path / "other"
    shutil.copytree(setting.student, other)
    model = Model.from_pretrained(other)
    with torch.no_grad():
        model.model.encoder.layers[0].fc1.weight += 0.05
    model.save_pretrained(other)
    folder = distil(
        write_config(tmp_path / "run", setting._replace(student=other), schedule__max_steps=1)
    )
    assert json.loads((folder / "run_info.json").read_text())["shared_encoder"] is False
    trainer, train, *_ = assemble(write_config(tmp_path / "again", setting._replace(student=other)))
    encoder_states: list[torch.Tensor] = []
    encoder = trainer.models.teacher.model.model.encoder
    encoder.register_forward_hook(lambda module, inputs, output: encoder_states.append(output[0]))
    train()
    assert len(encoder_states) == 4


@pytest.mark.slow
def test_one_batch_can_be_overfitted(tmp_path: Path) -> None:
    """From other texts to every text of four clips: the whole way from audio to text works."""
    setting = make_setting(tmp_path, 4)
    path = write_config(
        tmp_path / "run",
        setting,
        schedule={"max_steps": 150, "epochs": None, "warmup_steps": 10, "kind": "constant"},
        optimizer__learning_rate=2e-2,
        objective={"kl_weight": 0.0, "cross_entropy_weight": 1.0},
        freeze={"encoder": False},
        data__dev_manifest=setting.train,
        validation={"every_steps": 150, "decoding": {"max_new_tokens": 60}},
        logging__every_steps=50,
    )
    folder = distil(path)
    losses = logged(folder, "train/loss")
    assert losses[-1] < 0.02 < 1 < losses[0]
    assert logged(folder, "validation/student/error_rate") == [0.0]
    assert logged(folder, "validation/teacher/error_rate")[0] > 0.5


def test_the_teacher_alone_teaches(tmp_path: Path, setting: Setting) -> None:
    path = write_config(
        tmp_path / "run",
        setting,
        objective={"kl_weight": 1.0, "cross_entropy_weight": 0.0},
        schedule__max_steps=40,
        optimizer__learning_rate=5e-3,
        logging__every_steps=10,
    )
    kl = logged(distil(path), "train/kl")
    assert kl[-1] < 0.5 * kl[0]


@pytest.mark.slow
def test_unreadable_audio_is_not_learnt_from(tmp_path: Path, setting: Setting) -> None:
    """It shows in the middle of the run; the step goes on with the others."""
    shutil.copytree(setting.train.parent, tmp_path / "data", ignore=shutil.ignore_patterns("tea*"))
    train = tmp_path / "data" / "train.jsonl"
    broken = np.full(16_000, np.nan)  # in its header nothing is wrong
    soundfile.write(tmp_path / "data" / "3.wav", broken, 16_000, subtype="FLOAT")
    path = write_config(
        tmp_path / "run",
        setting._replace(train=train),
        batch={"micro_batch_size": 8},
        schedule__max_steps=1,
        data__max_bad_fraction=0.5,
    )
    folder = distil(path)
    rejected = read_rows(folder / "rejected.jsonl")
    assert len(rejected) == 1
    assert "3.wav: not finite" in rejected[0]["reason"]
    write_atomically(folder / "run_info.json", RUNNING)  # as if it was killed
    assert read_rows(distil(path) / "rejected.jsonl") == rejected
    others = write_rows(
        tmp_path / "data" / "others.jsonl", [row for row in read_rows(train) if row["id"] != "u3"]
    )
    without = write_config(
        tmp_path / "without",
        setting._replace(train=others),
        batch={"micro_batch_size": 7},
        schedule__max_steps=1,
    )
    distil(without)
    losses = [logged(tmp_path / name, "train/loss") for name in ("run", "without")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("vanishing", ["train", "dev"])
def test_audio_that_vanishes_ends_the_run(tmp_path: Path, vanishing: str) -> None:
    """It would go on without labels, or compare error rates of other rows."""
    setting = make_setting(tmp_path, 8)
    folder = setting.train.parent
    dev = write_rows(
        folder / "dev.jsonl",
        [{**row, "audio": f"dev/{row['audio']}"} for row in read_rows(setting.train)],
    )
    shutil.copytree(
        folder, folder / "dev", ignore=lambda _, names: [n for n in names if not n.endswith(".wav")]
    )
    changes = {"data__dev_manifest": dev, "validation__every_steps": 2, "data__num_workers": 0}
    trainer, train, *_ = assemble(
        write_config(tmp_path / "run", setting, schedule__max_steps=4, **changes)
    )

    def remove(_: object) -> None:
        for path in (folder if vanishing == "train" else folder / "dev").glob("*.wav"):
            path.unlink()

    before_each_step(trainer, remove)
    with pytest.raises(DataError, match="Audio has vanished since the manifest was read"):
        train()
    assert not (tmp_path / "run/rejected.jsonl").exists()


# Stopping and going on


@pytest.fixture(scope="module")
def dropout_setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Dropout makes every step depend on the random state, and the order of files on the seed."""
    setting = make_setting(tmp_path_factory.mktemp("dropout"))
    change_config(setting.student, dropout=0.2)
    return setting


def long_run(output: Path, setting: Setting, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "schedule__max_steps": 8,
        "checkpoints": {"every_steps": 3, "keep_last": 1},
        "data__dev_manifest": setting.train,
        "validation__every_steps": 2,
    }
    return write_config(output, setting, **{**options, **changes})


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory, dropout_setting: Setting) -> Path:
    return distil(long_run(tmp_path_factory.mktemp("runs") / "whole", dropout_setting))


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_never_stopped(
    tmp_path: Path, dropout_setting: Setting, never_stopped: Path
) -> None:
    path = long_run(tmp_path / "run", dropout_setting)
    trainer, train, *_ = assemble(path)
    steps: list[int] = []

    def stop_in_fourth_step(optimizer: torch.optim.Optimizer) -> None:
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    before_each_step(trainer, stop_in_fourth_step)
    with trainer.run.stop_signals(), pytest.raises(Interrupted):
        train()
    assert len(steps) in (4, 5)
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [f"step-{len(steps):08d}"]
    assert_same_run(distil(path), never_stopped)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, dropout_setting: Setting, never_stopped: Path
) -> None:
    path = long_run(tmp_path / "run", dropout_setting)
    trainer, train, *_ = assemble(path)
    steps: list[int] = []

    def die_in_sixth_step(optimizer: torch.optim.Optimizer) -> None:
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt

    before_each_step(trainer, die_in_sixth_step)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert_same_run(distil(path), never_stopped)


@pytest.mark.slow
def test_a_run_that_died_before_any_checkpoint_begins_anew(
    tmp_path: Path, dropout_setting: Setting, never_stopped: Path
) -> None:
    path = long_run(tmp_path / "run", dropout_setting)
    trainer, train, *_ = assemble(path)

    def die(optimizer: torch.optim.Optimizer) -> None:
        raise KeyboardInterrupt

    before_each_step(trainer, die)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert_same_run(distil(path), never_stopped)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_one_does_not(
    tmp_path: Path, dropout_setting: Setting, never_stopped: Path
) -> None:
    assert_same_run(distil(long_run(tmp_path / "same", dropout_setting)), never_stopped)
    other = distil(long_run(tmp_path / "other", dropout_setting, seed=1))
    assert largest_difference(weights_in(other / "final"), weights_in(never_stopped / "final")) > 0


@pytest.mark.slow
def test_workers_change_nothing(
    tmp_path: Path, dropout_setting: Setting, never_stopped: Path
) -> None:
    path = long_run(tmp_path / "run", dropout_setting, data__num_workers=1)
    assert_same_run(distil(path), never_stopped)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(
    tmp_path: Path, setting: Setting
) -> None:
    path = write_config(
        tmp_path / "run",
        setting,
        optimizer={"learning_rate": 1e9, "weight_decay": 1.0, "max_grad_norm": None},
        schedule__max_steps=30,
        checkpoints={"every_steps": 1, "keep_last": 50},
        logging__every_steps=10,
    )
    with pytest.raises(DataError, match="learning_rate"):
        distil(path)
    for checkpoint in (tmp_path / "run").glob("checkpoints/step-*"):
        for name, weight in weights_in(checkpoint).items():
            assert torch.isfinite(weight).all(), (checkpoint.name, name)


# Two processes


def launch(path: Path, processes: int, script: str = "run_distillation") -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    subprocess.run(
        [sys.executable, *launcher, str(REPOSITORY / f"{script}.py"), str(path)],
        check=True,
        cwd=path.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=200,
    )


@pytest.mark.slow
def test_two_processes_label_like_one(tmp_path: Path, setting: Setting) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        config = {
            "output_dir": str(tmp_path / name),
            "teacher": {"path": str(setting.teacher)},
            "data": {"manifest": str(setting.train), "num_workers": 0},
            "decoding": {"batch_size": 3, "max_new_tokens": 40},
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config))
        launch(path, processes, "run_pseudo_labelling")
    labels = [(tmp_path / name / "pseudo_labels.jsonl").read_bytes() for name in ("one", "two")]
    assert labels[0] == labels[1]
    assert len(labels[0].splitlines()) == 8


def test_a_checkpoint_of_other_rows_is_not_gone_on_from(
    tmp_path: Path, dropout_setting: Setting
) -> None:
    """One row less is learnt from, since its audio has gone."""
    first, *rows = read_rows(dropout_setting.train)
    folder = dropout_setting.train.parent
    shutil.copy(folder / first["audio"], folder / "gone_later.wav")
    rows.append({**first, "audio": "gone_later.wav"})
    train_rows = write_rows(folder / "other_rows.jsonl", rows)
    other_setting = dropout_setting._replace(train=train_rows)
    path = long_run(tmp_path / "run", other_setting, data__max_bad_fraction=0.5)
    trainer, train, *_ = assemble(path)
    trainer.run.stop_signal = 15
    with pytest.raises(Interrupted):
        train()
    (folder / "gone_later.wav").unlink()
    with pytest.raises(ConfigError, match="other training rows"):
        assemble(path)


# Less memory, more speed


def test_activation_checkpointing_computes_layers_twice_and_changes_nothing(
    tmp_path: Path, setting: Setting
) -> None:
    results = {}
    for enabled in (False, True):
        path = write_config(tmp_path / str(enabled), setting, activation_checkpointing=enabled)
        trainer, train, *_ = assemble(path)
        calls: list[int] = []
        trainer.models.student.model.model.decoder.layers[0].fc1.register_forward_hook(
            lambda module, inputs, output, calls=calls: calls.append(1)
        )
        train()
        results[enabled] = len(calls), logged(tmp_path / str(enabled), "train/loss")
    assert results[True][0] == 2 * results[False][0] == 8
    assert results[True][1] == pytest.approx(results[False][1], rel=1e-6)


@pytest.mark.gpu  # it passes on a CPU too, in minutes
def test_a_compiled_student_learns_the_same(tmp_path: Path, setting: Setting) -> None:
    losses = [
        logged(
            distil(write_config(tmp_path / str(enabled), setting, compile=enabled)), "train/loss"
        )
        for enabled in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    weights = weights_in(tmp_path / "True" / "final")
    assert weights.keys() == weights_in(tmp_path / "False" / "final").keys()


def test_the_teachers_device_is_used_or_refused(tmp_path: Path, setting: Setting) -> None:
    trainer, *_ = assemble(write_config(tmp_path / "cpu", setting, teacher=on(setting, "cpu")))
    assert trainer.models.teacher.device == torch.device("cpu")
    path = write_config(tmp_path / "gpu", setting, teacher=on(setting, "cuda:99"))
    with pytest.raises(ConfigError, match=r'teacher\.device: "cuda:99", but this machine has'):
        assemble(path)


def test_no_layer_is_left_out_by_chance(tmp_path: Path, setting: Setting) -> None:
    student = shutil.copytree(setting.student, tmp_path / "student")
    config = json.loads((student / "config.json").read_text())
    config |= {"decoder_layerdrop": 0.9, "encoder_layerdrop": 0.9}
    (student / "config.json").write_text(json.dumps(config))
    dropping = setting._replace(student=student)
    trainer, *_ = assemble(write_config(tmp_path / "run", dropping))
    usual, *_ = assemble(write_config(tmp_path / "usual", setting))
    decoder = trainer.models.student.model.model.decoder.train()
    assert decoder.layerdrop == 0
    ids, states = torch.tensor([[1, 2, 3]]), torch.zeros(1, 4, decoder.config.d_model)
    assert torch.equal(
        decoder(ids, encoder_hidden_states=states).last_hidden_state,
        usual.models.student.model.model.decoder(ids, encoder_hidden_states=states)[0],
    )


def on(setting: Setting, device: str) -> dict[str, str]:
    return {"path": str(setting.teacher), "device": device}


def test_where_memory_ends_the_keys_to_change_are_named(tmp_path: Path, setting: Setting) -> None:
    trainer, train, *_ = assemble(write_config(tmp_path / "run", setting))

    def exhaust(*call: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    trainer.models.student.model.model.decoder.register_forward_hook(exhaust)
    with pytest.raises(ConfigError, match=r"step 1: memory does not suffice .*2\.00 GiB") as caught:
        train()
    assert "batch.micro_batch_size below 4" in str(caught.value)
    assert "activation_checkpointing true" in str(caught.value)


def test_another_error_is_not_taken_for_the_end_of_memory(tmp_path: Path, setting: Setting) -> None:
    trainer, train, *_ = assemble(write_config(tmp_path / "run", setting))

    def fail(*call: object) -> None:
        raise RuntimeError("shapes do not match")

    trainer.models.student.model.model.decoder.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train()


def never_better(output: Path, setting: Setting, every: int, patience: int) -> Path:
    """With a learning rate that changes no weight the first score stays the best."""
    patient = {"every_steps": every, "early_stopping_patience": patience}
    return write_config(
        output,
        setting,
        data__dev_manifest=setting.train,
        optimizer__learning_rate=1e-12,
        schedule={"max_steps": 50, "epochs": None, "warmup_steps": 0},
        validation={**patient, "score_teacher": False},
        checkpoints={"every_steps": 2},
    )


@pytest.mark.slow
def test_a_run_that_gets_no_better_stops_early(tmp_path: Path, setting: Setting) -> None:
    path = never_better(tmp_path / "run", setting, every=2, patience=2)
    folder = distil(path)
    assert len(logged(folder, "train/loss")) == 6
    assert len(logged(folder, "validation/student/error_rate")) == 3
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_that_has_stopped_early_is_not_taken_up_again(
    tmp_path: Path, setting: Setting
) -> None:
    path = never_better(tmp_path / "run", setting, every=1, patience=1)
    folder = distil(path)
    assert len(logged(folder, "train/loss")) == 2
    # As if it was killed between its last checkpoint and its end.
    write_atomically(folder / "run_info.json", RUNNING)
    shutil.rmtree(folder / "final")
    distil(path)
    assert len(logged(folder, "train/loss")) == 2
    assert (folder / "final" / "config.json").exists()
