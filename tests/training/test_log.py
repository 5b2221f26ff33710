"""metrics.jsonl and TensorBoard: one row a step, whatever ends the run."""

import json
import math
from pathlib import Path

import pytest
from tiny import read_rows

from simpler_distil_whisper.data.manifest import Rejection
from simpler_distil_whisper.data.results import rejection_line
from simpler_distil_whisper.run import DataError
from simpler_distil_whisper.training.log import MetricsLog, RejectionLog


def test_the_log_is_cut_back_to_where_a_run_goes_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False, enabled=True)
    for step in range(1, 6):
        log.log(step, {"train/loss": step / 2, "validation/error_rate": None})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # a kill tears the last line
    log = MetricsLog(tmp_path, 3, tensorboard=False, enabled=True)
    log.log(4, {"train/loss": 7.0})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1] == {"step": 4, "train/loss": 7.0}
    assert rows[0]["validation/error_rate"] is None


def test_a_run_without_checkpoint_begins_its_log_anew(tmp_path: Path) -> None:
    for _ in range(2):
        log = MetricsLog(tmp_path, 0, tensorboard=False, enabled=True)
        log.log(0, {"validation/teacher/error_rate": 0.5})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_the_log_stays_json_where_a_number_is_not_finite(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False, enabled=True)
    log.log(1, {"train/grad_norm": float("inf"), "train/kl": float("nan"), "train/loss": 1.0})
    [row] = read_rows(tmp_path / "metrics.jsonl")
    assert row == {"step": 1, "train/grad_norm": None, "train/kl": None, "train/loss": 1.0}


def test_other_processes_write_no_log(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0, tensorboard=True, enabled=False).log(1, {"train/loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, tensorboard=True, enabled=True)
    log.log(1, {"train/loss": 0.5, "validation/error_rate": None})
    log.log(2, {"train/loss": 0.25})
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1]) == {
        "step": 2,
        "train/loss": 0.25,
    }
    assert math.isclose(len(events.Tags()["scalars"]), 1)


def test_a_torn_line_of_rejections_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    rejections = [Rejection(n, f"train.jsonl:{n}", "damaged 資料", {"n": n}) for n in range(4)]
    lines = [rejection_line(rejection) for rejection in rejections]
    whole = (lines[0] + lines[1]).encode()
    torn = whole[: whole.rindex("料".encode()) + 1]  # within a character; the disk was full
    path.write_bytes(torn)
    RejectionLog(path, 4).add(rejections[2:3])
    RejectionLog(path, 4).add(rejections)
    content = torn + b"\n" + "".join([lines[2], lines[1], lines[3]]).encode()
    assert path.read_bytes() == content


def test_a_last_rejection_without_line_end_is_known(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    first, second = (Rejection(n, f"train.jsonl:{n}", "damaged", {}) for n in range(2))
    path.write_text(rejection_line(first).strip(), encoding="utf-8")
    RejectionLog(path, 4).add([first, second])
    assert [row["place"] for row in read_rows(path)] == [first.place, second.place]


def test_rejections_of_others_are_known_and_too_many_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    dropped, *rejections = (Rejection(n, f"m.jsonl:{n}", "damaged", {}) for n in range(5))
    path.write_text(rejection_line(dropped), encoding="utf-8")  # by a filter
    first, second = RejectionLog(path, 3), RejectionLog(path, 3)
    first.add(rejections[:2])
    second.add(rejections[:3])
    assert len(read_rows(path)) == 4
    with pytest.raises(DataError, match="4 training rows do not decode"):
        first.add([Rejection(9, "m.jsonl:9", "damaged", {})])
