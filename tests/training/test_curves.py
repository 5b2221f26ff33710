"""training_curves.png: drawn from whatever metrics.jsonl holds, in words for people."""

from pathlib import Path

from simpler_distil_whisper.training.curves import DRAWINGS, draw_curves
from simpler_distil_whisper.training.log import MetricsLog


def test_the_curves_are_drawn_from_whatever_is_there(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False, enabled=True)
    picture = tmp_path / "training_curves.png"
    log.log(0, {"validation/teacher/error_rate": 0.1})
    draw_curves(tmp_path / "metrics.jsonl", picture)
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    for step in range(1, 80):
        log.log(step, {"train/kl": 2 / step, "train/cross_entropy": None, "train/agreement": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 80, "train/lo')  # a kill tears the last line
    draw_curves(tmp_path / "metrics.jsonl", picture)
    assert picture.read_bytes() != first


def test_the_curves_are_labelled_in_words_not_in_names_of_the_code() -> None:
    for title, unit, legend in DRAWINGS:
        assert "_" not in "".join([title, unit, *legend.values()])
