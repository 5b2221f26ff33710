"""Scoring on dev: against references, over the whole corpus, teacher once, best kept."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import jiwer
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
from tiny import read_rows, write_rows, write_tone

from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.decoding.batches import SpeechBatch
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.decoding.transcription import transcribe_batch
from simpler_distil_whisper.evaluation.metrics import total
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.whisper import load_whisper
from simpler_distil_whisper.run import DataError
from simpler_distil_whisper.stopping import Interrupted
from simpler_distil_whisper.training import validation

PLAIN = {
    "unit": "character",
    "normalization": {
        **{"unicode": None, "lowercase": False, "remove_punctuation": False},
        "whisper": None,  # which would take a random model's hypotheses for fillers
    },
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("setting"))


def hypotheses_by(model: Path, rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """A model's hypothesis of each row alone, without spaces, which character counts leave out."""
    whisper = load_whisper(read_model_folder(model, None, "model"))
    transcriber = Transcriber(whisper, DecodingOptions(max_new_tokens=12))
    texts = []
    for row in rows:
        features = log_mel([load_audio(folder / row["audio"])], whisper.feature_extractor)
        texts.append(transcriber(features, [row["language"]])[0].text)
    return ["".join(text.split()) for text in texts]


def dev_rows(folder: Path, count: int = 5, languages: str = "en") -> list[dict[str, Any]]:
    names = languages.split()
    rows = []
    for number in range(count):
        write_tone(folder / f"dev{number}.wav", 0.3 + 0.25 * number, seed=100 + number)
        language = names[number % len(names)]
        rows.append({"id": f"d{number}", "audio": f"dev{number}.wav", "language": language})
    return rows


def score_student(output: Path, setting: Setting, dev: Path, **changes: Any) -> Any:
    options = {"schedule__max_steps": 1, "validation__metric": PLAIN, "data__dev_manifest": dev}
    trainer, *_ = assemble(write_config(output, setting, **{**options, **changes}))
    assert trainer.validation
    return trainer.validation.score(trainer.models.student)


def test_rates_are_of_the_whole_corpus(tmp_path: Path, setting: Setting) -> None:
    """Utterances of very different length: the mean of their rates would be another number."""
    rows = dev_rows(tmp_path)
    hypotheses = hypotheses_by(setting.student, rows, tmp_path)
    # The first is short and wrong, the others are long and right but for some characters.
    references = ["xy", *(text + "tail"[:number] for number, text in enumerate(hypotheses[1:]))]
    for row, reference in zip(rows, references, strict=True):
        row["text"] = reference
    score = score_student(tmp_path / "run", setting, write_rows(tmp_path / "dev.jsonl", rows))
    assert score.error_rate == pytest.approx(jiwer.cer(references, hypotheses))
    each = [jiwer.cer(r, h) for r, h in zip(references, hypotheses, strict=True)]
    assert abs(score.error_rate - sum(each) / len(each)) > 0.1


def test_a_person_is_the_reference_and_not_the_pseudo_label(
    tmp_path: Path, setting: Setting
) -> None:
    rows = dev_rows(tmp_path)
    for row, text in zip(rows, hypotheses_by(setting.student, rows, tmp_path), strict=True):
        row |= {"text": "a pseudo label", "origin_text": text, "cer/wer": 0.9}
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    assert score_student(tmp_path / "run", setting, dev).error_rate == 0.0
    columns = {"reference": "text"}
    swapped = score_student(tmp_path / "swapped", setting, dev, data__columns=columns)
    assert swapped.error_rate > 0.5


def test_rows_nobody_has_transcribed_are_not_scored(tmp_path: Path, setting: Setting) -> None:
    rows = dev_rows(tmp_path)
    hypotheses = hypotheses_by(setting.student, rows, tmp_path)
    for row in rows:
        row |= {"text": "a pseudo label", "origin_text": None}
    rows[2]["origin_text"] = hypotheses[2] + "??"
    score = score_student(tmp_path / "run", setting, write_rows(tmp_path / "dev.jsonl", rows))
    assert total(score.counts["en"]).deletions == 2
    assert total(score.counts["en"]).reference_tokens == len(hypotheses[2]) + 2
    rows[2]["origin_text"] = None
    columns = r'"origin_text" \(data.columns.reference\) nor under "text" \(data.columns.text\)'
    with pytest.raises(DataError, match=f"{columns}, so nothing can be scored"):
        score_student(tmp_path / "none", setting, write_rows(tmp_path / "none.jsonl", rows))


def test_translations_are_scored_as_english(tmp_path: Path, setting: Setting) -> None:
    """The row names what is spoken, Chinese, whose texts would be counted in characters."""
    rows = dev_rows(tmp_path, languages="zh")
    for row in rows:
        row["text"] = "one two three"
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    score = score_student(
        tmp_path / "run",
        setting,
        dev,
        data__task="translate",
        validation__metric={**PLAIN, "unit": "auto"},
    )
    assert total(score.counts["zh"]).reference_tokens == 3 * len(rows)


@pytest.mark.parametrize(("reference", "seconds"), [("", 0.5), (" ?", 0.5), ("abc", 3.0)])
def test_a_run_does_not_begin_where_no_dev_row_can_be_scored(
    tmp_path: Path, setting: Setting, reference: str, seconds: float
) -> None:
    """It would stop early, since no validation is better than the one before it."""
    write_tone(tmp_path / "dev.wav", seconds)
    row = {"audio": "dev.wav", "language": "en", "text": reference}
    dev = write_rows(tmp_path / "dev.jsonl", [row])
    options = {"every_steps": 1, "early_stopping_patience": 1}
    path = write_config(tmp_path / "run", setting, data__dev_manifest=dev, validation=options)
    with pytest.raises(DataError, match=r"dev\.jsonl: no row .* nothing can be scored"):
        distil(path)


def test_no_training_filter_touches_dev(tmp_path: Path, setting: Setting) -> None:
    rows = dev_rows(tmp_path)
    for row, text in zip(rows, hypotheses_by(setting.student, rows, tmp_path), strict=True):
        row |= {"text": "too long a label" * 20, "origin_text": text + "x", "cer/wer": 1.0}
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    train = [row | {"cer/wer": 0.1} for row in read_rows(setting.train)]
    kept = setting._replace(train=write_rows(setting.train.parent / "rated.jsonl", train))
    free = score_student(tmp_path / "free", kept, dev)
    strict = score_student(
        tmp_path / "strict",
        kept,
        dev,
        data__max_error_rate=0.2,
        data__min_duration_seconds=0.7,
        data__max_duration_seconds=0.9,
        data__max_label_tokens=30,
    )
    assert strict.counts == free.counts
    assert total(free.counts["en"]).deletions == len(rows)


def test_what_does_not_fit_into_the_memory_is_scored_in_parts(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row | {"text": "abc"} for row in dev_rows(tmp_path)]
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    whole = score_student(tmp_path / "whole", setting, dev)
    sizes = []

    def transcribe_few(transcriber: Transcriber, cache: None, batch: SpeechBatch) -> Any:
        sizes.append(len(batch.utterances))
        if len(batch.utterances) > 2:
            torch.empty(1 << 60, dtype=torch.uint8)
        return transcribe_batch(transcriber, cache, batch)

    monkeypatch.setattr(validation, "transcribe_batch", transcribe_few)
    assert score_student(tmp_path / "parts", setting, dev).counts == whole.counts
    assert sizes == [4, 2, 2, 1]


def test_only_the_first_utterances_if_asked(tmp_path: Path, setting: Setting) -> None:
    rows = [row | {"text": "abc"} for row in dev_rows(tmp_path)]
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    score = score_student(tmp_path / "run", setting, dev, validation__max_utterances=2)
    assert total(score.counts["en"]).reference_tokens == 2 * len("abc")


def test_each_language_has_its_rate(tmp_path: Path, setting: Setting) -> None:
    rows = dev_rows(tmp_path, languages="en zh")
    hypotheses = hypotheses_by(setting.student, rows, tmp_path)
    for row, text in zip(rows, hypotheses, strict=True):
        row["text"] = text if row["language"] == "zh" else text + "!"
    score = score_student(tmp_path / "run", setting, write_rows(tmp_path / "dev.jsonl", rows))
    values = score.values("v/")
    assert values["v/error_rate/zh"] == 0.0
    assert values["v/error_rate/en"] > 0.0
    characters = sum(len(row["text"]) for row in rows)
    assert values["v/error_rate"] == pytest.approx(3 / characters)


@pytest.mark.slow
def test_the_number_of_the_student_is_the_one_of_its_folder(
    tmp_path: Path, setting: Setting
) -> None:
    """What training logs last is what final/ scores, batch by batch or alone."""
    rows = [row | {"text": "abcde"} for row in dev_rows(tmp_path)]
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    options = {
        "data__dev_manifest": dev,
        "validation__metric": PLAIN,
        "optimizer__learning_rate": 5e-3,
        "schedule__max_steps": 8,
    }
    folder = distil(write_config(tmp_path / "run", setting, **options))
    texts = hypotheses_by(folder / "final", rows, tmp_path)
    rate = jiwer.cer(["abcde"] * len(rows), texts)
    assert logged(folder, "validation/student/error_rate")[-1] == pytest.approx(rate)
    assert texts != hypotheses_by(setting.student, rows, tmp_path)
    texts = hypotheses_by(setting.teacher, rows, tmp_path)
    rate = jiwer.cer(["abcde"] * len(rows), texts)
    assert logged(folder, "validation/teacher/error_rate") == [pytest.approx(rate)]


@pytest.mark.slow
def test_validation_comes_when_it_is_due(tmp_path: Path, setting: Setting) -> None:
    rows = [row | {"text": "abcde"} for row in dev_rows(tmp_path, 2)]
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    options: dict[str, Any] = {"data__dev_manifest": dev, "schedule__max_steps": 5}
    for every, steps in ((2, [2, 4, 5]), (None, [2, 4, 5]), (5, [5])):
        # Eight clips in steps of four: an epoch has two steps.
        path = write_config(
            tmp_path / str(every), setting, validation__every_steps=every, **options
        )
        lines = read_rows(distil(path) / "metrics.jsonl")
        assert [r["step"] for r in lines if "validation/student/error_rate" in r] == steps


@pytest.mark.slow
def test_the_teacher_is_scored_once_even_if_the_run_is_stopped(
    tmp_path: Path, setting: Setting
) -> None:
    rows = [row | {"text": "abcde"} for row in dev_rows(tmp_path, 2)]
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    path = write_config(tmp_path / "run", setting, data__dev_manifest=dev)
    trainer, train, *_ = assemble(path)
    with trainer.run.stop_signals(), pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
        train()
    trainer, train, *_ = assemble(path)
    assert trainer.state.step == 1
    assert not trainer.models.teacher.loaded, "not scored again"
    train()
    lines = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in lines if "validation/teacher/error_rate" in r] == [0]


@pytest.mark.slow
def test_the_teacher_is_not_scored_unless_asked(tmp_path: Path, setting: Setting) -> None:
    rows = [row | {"text": "abcde"} for row in dev_rows(tmp_path, 2)]
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    path = write_config(
        tmp_path / "run", setting, data__dev_manifest=dev, validation__score_teacher=False
    )
    folder = distil(path)
    assert not logged(folder, "validation/teacher/error_rate")
    assert logged(folder, "validation/student/error_rate")


@pytest.mark.slow
def test_best_is_the_student_of_the_lowest_rate(tmp_path: Path, setting: Setting) -> None:
    """The references are the untrained student's hypotheses, so training makes it worse."""
    rows = dev_rows(tmp_path)
    for row, text in zip(rows, hypotheses_by(setting.student, rows, tmp_path), strict=True):
        row["text"] = text
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    path = write_config(
        tmp_path / "run",
        setting,
        data__dev_manifest=dev,
        validation__every_steps=1,
        validation__metric=PLAIN,
        schedule__max_steps=6,
        optimizer__learning_rate=2e-3,
    )
    trainer, train, *_ = assemble(path)
    after: list[dict[str, torch.Tensor]] = []
    trainer.optimizer.optimizer.register_step_post_hook(
        lambda *_: after.append(
            {k: v.clone() for k, v in trainer.models.student.model.state_dict().items()}
        )
    )
    train()
    rates = logged(tmp_path / "run", "validation/student/error_rate")
    first_best = rates.index(min(rates))
    assert rates[-1] > min(rates), "else the last student is the best one and nothing is shown"
    best = weights_in(tmp_path / "run" / "best")
    kept = {name: after[first_best][name] for name in best}
    assert largest_difference(best, kept) == 0
    hypotheses = hypotheses_by(tmp_path / "run" / "best", rows, tmp_path)
    assert jiwer.cer([row["text"] for row in rows], hypotheses) == pytest.approx(min(rates))


@pytest.mark.slow
def test_best_is_not_kept_unless_asked_and_not_without_dev(
    tmp_path: Path, setting: Setting
) -> None:
    rows = [row | {"text": "abcde"} for row in dev_rows(tmp_path, 2)]
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    path = write_config(
        tmp_path / "run", setting, data__dev_manifest=dev, checkpoints={"keep_best": False}
    )
    assert not (distil(path) / "best").exists()
    assert not (distil(write_config(tmp_path / "no_dev", setting)) / "best").exists()


def test_dev_rows_without_audio_are_not_scored(tmp_path: Path, setting: Setting) -> None:
    rows = [row | {"text": "abcde"} for row in dev_rows(tmp_path)]
    (tmp_path / "dev1.wav").write_bytes(b"no audio at all")
    score = score_student(tmp_path / "run", setting, write_rows(tmp_path / "dev.jsonl", rows))
    assert total(score.counts["en"]).reference_tokens == (len(rows) - 1) * len("abcde")


@pytest.mark.slow
def test_a_model_is_scored_as_it_is_and_left_so(tmp_path: Path, setting: Setting) -> None:
    """Scoring is free of dropout, and training goes on with it."""
    config = json.loads((setting.student / "config.json").read_text())
    other = tmp_path / "student"
    other.mkdir()
    for path in setting.student.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"dropout": 0.5}))
    rows = [row | {"text": "abcde"} for row in dev_rows(tmp_path)]
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    path = write_config(
        tmp_path / "run",
        setting._replace(student=other),
        data__dev_manifest=dev,
        validation__every_steps=1,
        validation__metric=PLAIN,
        optimizer__learning_rate=1e-12,
    )
    trainer, train, *_ = assemble(path)
    training = []
    trainer.optimizer.optimizer.register_step_pre_hook(
        lambda *_: training.append(trainer.models.student.model.model.decoder.training)
    )
    train()
    rates = logged(tmp_path / "run", "validation/student/error_rate")
    assert len(set(rates)) == 1
    texts = hypotheses_by(setting.student, rows, tmp_path)
    assert rates[0] == pytest.approx(jiwer.cer(["abcde"] * len(rows), texts))
    assert training == [True] * 4
