"""What lies beside a distilled model: true, complete, and nothing that nobody should read."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from distilling import Setting, distil, logged, make_setting, write_config
from tiny import read_rows, write_rows

from simpler_distil_whisper.evaluation.intervals import bootstrap_interval
from simpler_distil_whisper.evaluation.metrics import ErrorCounts, Metric
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.weights import parameter_count
from simpler_distil_whisper.model.whisper import load_whisper
from simpler_distil_whisper.pages import render
from simpler_distil_whisper.training.model_card import scores_at
from simpler_distil_whisper.training.validation import Score


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("a-customer's-secret")
    setting = make_setting(folder)
    (setting.student / "layer_map.json").write_text(
        json.dumps({"teacher": str(setting.teacher), "encoder": [0, 1], "decoder": [1]})
    )
    rows = read_rows(setting.train)
    for number, row in enumerate(rows):
        row |= {"origin_text": row["text"], "cer/wer": 0.9 if number == 3 else 0.0}
    rows[5]["language"] = "zh"
    write_rows(setting.train, rows)
    return setting


@pytest.fixture(scope="module")
def folder(setting: Setting) -> Path:
    dev = write_rows(setting.train.parent / "dev.jsonl", read_rows(setting.train))
    changes = {"data__dev_manifest": dev, "data__max_error_rate": 0.5}
    changes |= {"validation__every_steps": 2, "validation__score_teacher": True}
    return distil(write_config(setting.train.parent / "out", setting, **changes))


def facts_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "distillation.json").read_text(encoding="utf-8"))


def test_the_facts_are_those_of_the_run(folder: Path, setting: Setting) -> None:
    facts = facts_in(folder / "final")
    assert facts["teacher"]["decoder_layers"] == 2
    assert facts["student"]["decoder_layers"] == 1
    assert facts["student"]["layer_map"] == {"encoder": [0, 1], "decoder": [1]}
    assert facts["teacher"]["parameters"] > facts["student"]["parameters"]
    assert facts["data"]["rows"] == 7
    assert facts["data"]["languages"] == {"en": 6, "zh": 1}
    assert [count["rows"] for count in facts["data"]["left_out"].values()] == [1]
    assert facts["data"]["filters"]["max_error_rate"] == 0.5
    assert facts["recipe"]["optimizer"]["learning_rate"] == 1e-3
    assert facts["recipe"]["utterances_per_step"] == 4
    assert facts["window_seconds"] == read_model_folder(setting.student, None, "x").window_seconds


def test_each_folder_has_the_scores_of_its_own_weights(folder: Path) -> None:
    rates = logged(folder, "validation/student/error_rate")
    assert len(rates) == 2
    final, best = facts_in(folder / "final"), facts_in(folder / "best")
    assert final["steps"] == 4
    assert final["dev"]["student"]["error_rate"] == rates[1]
    assert best["dev"]["student"]["error_rate"] == min(rates)
    assert best["steps"] == (2 if rates[0] <= rates[1] else 4)
    teacher = logged(folder, "validation/teacher/error_rate")
    assert final["dev"]["teacher"]["error_rate"] == teacher[0]


def test_nothing_in_the_folder_tells_where_it_was_made(folder: Path) -> None:
    for name in ("final", "best"):
        for path in (folder / name).iterdir():
            content = path.read_bytes()
            assert b"secret" not in content, path
            assert str(Path.home()).encode() not in content or path.suffix == ".safetensors", path


def test_the_card_reads_as_a_card(folder: Path) -> None:
    card = (folder / "final" / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["language"] == ["en", "zh"]
    assert matter["library_name"] == "transformers"
    assert "license" not in matter
    assert "# license:" in front
    facts = facts_in(folder / "final")
    assert f"7 utterances, {facts['data']['hours'] * 3600:.1f}\u202fs" in body
    assert "decoder layers 1\n" in body
    rate = facts["dev"]["student"]["error_rate"]
    assert f"| student | {rate:.2%} |".replace("%", "\u202f%") in body
    for row in re.findall(r"(?m)^\|.*\|$", body):
        assert row.count("|") > 3


@pytest.mark.parametrize(
    ("people", "kl_weight", "learnt"),
    [
        (False, 1.0, "written by the teacher, and the teacher's distribution over tokens (["),
        (False, 0.0, "written by the teacher."),
        (True, 0.0, "written by people."),
    ],
)
def test_what_the_student_has_learnt_from_is_what_the_card_says(
    setting: Setting, tmp_path: Path, people: bool, kl_weight: float, learnt: str
) -> None:
    columns = {"text": "origin_text" if people else "text"}
    changes = {"data__columns": columns, "objective__kl_weight": kl_weight}
    out = distil(write_config(tmp_path / "run", setting, schedule__max_steps=1, **changes))
    card = " ".join((out / "final" / "README.md").read_text(encoding="utf-8").split())
    assert learnt in card
    assert ("its teacher's errors" in card) == (not people)
    assert ("distribution over tokens" in card) == (kl_weight > 0)
    assert (logged(out, "train/kl") == [None]) == (kl_weight == 0)


@pytest.mark.slow
def test_a_run_without_dev_is_described_as_such(setting: Setting, tmp_path: Path) -> None:
    out = distil(write_config(tmp_path / "plain", setting, schedule__max_steps=1))
    assert facts_in(out / "final")["dev"] is None
    assert "was not scored" in (out / "final" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_student_from_elsewhere_has_no_layer_map(setting: Setting, tmp_path: Path) -> None:
    (setting.student / "layer_map.json").rename(tmp_path / "away.json")
    try:
        out = distil(write_config(tmp_path / "foreign", setting, schedule__max_steps=1))
    finally:
        (tmp_path / "away.json").rename(setting.student / "layer_map.json")
    assert facts_in(out / "final")["student"]["layer_map"] is None
    assert "began as a copy" not in (out / "final" / "README.md").read_text(encoding="utf-8")


def test_strange_names_break_no_table_and_bring_no_markup(folder: Path) -> None:
    facts = facts_in(folder / "final")
    facts["teacher"]["name"] = "a|b\n<script>alert(1)</script>"
    facts["data"]["left_out"] = {"x|y": {"rows": 1, "hours": 0.1}}
    card = render("model_card.md", **facts)
    assert "<script>" not in card
    assert "a\\|b &lt;script&gt;" in card
    assert "| x\\|y | 1 |" in card


@pytest.mark.parametrize("scores", [{"error_rate": 0.5, "low": None}, {"error_rate": 0.5}])
def test_a_score_without_an_interval_is_shown_without(
    folder: Path, scores: dict[str, float | None]
) -> None:
    facts = facts_in(folder / "final")
    facts["dev"]["teacher"] = scores
    assert "| teacher | 50.00\u202f% | – |" in render("model_card.md", **facts)


@pytest.mark.parametrize("unit", get_args(Metric.model_fields["unit"].annotation))
def test_the_unit_of_the_metric_is_written_out(folder: Path, unit: str) -> None:
    facts = facts_in(folder / "final")
    facts["dev_metric"]["unit"] = unit
    card = render("model_card.md", **facts)
    assert re.search(r"counted in\n(characters|words)", card)


def test_a_default_language_that_no_row_needs_is_not_claimed(
    setting: Setting, tmp_path: Path
) -> None:
    changes = {"data__language": "ja", "schedule__max_steps": 1}
    out = distil(write_config(tmp_path / "named", setting, **changes))
    assert facts_in(out / "final")["data"]["languages"] == {"en": 7, "zh": 1}


def test_parameters_are_counted_as_transformers_counts_them(setting: Setting) -> None:
    for path in (setting.teacher, setting.student):
        model_folder = read_model_folder(path, None, "model")
        model = load_whisper(model_folder).model
        assert parameter_count(model_folder) == sum(p.numel() for p in set(model.parameters()))
        assert isinstance(next(model.parameters()), torch.nn.Parameter)


def test_scores_are_found_by_step(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "validation/teacher/error_rate": 0.1, "validation/teacher/low": 0.05},
        {"step": 2, "validation/student/error_rate": 0.5},
        {"step": 3, "train/loss": 1.0},
    ]
    metrics = write_rows(tmp_path / "metrics.jsonl", rows)
    assert scores_at(metrics, 2) == {
        "student": {"error_rate": 0.5},
        "teacher": {"error_rate": 0.1, "low": 0.05},
    }
    assert scores_at(metrics, 3) is None


def test_a_score_has_the_interval_of_its_utterances() -> None:
    counts = [ErrorCounts(9, number % 3) for number in range(30)]
    halves = {"en": Counter(counts[:15]), "zh": Counter(counts[15:])}
    values = Score(halves, []).values("")
    assert (values["low"], values["high"]) == bootstrap_interval(counts)
    assert values["error_rate"] == 30 / 300
