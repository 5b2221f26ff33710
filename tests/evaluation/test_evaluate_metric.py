"""The error rate through the interface of `evaluate`: the same numbers, offline."""

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import REPOSITORY

from simpler_distil_whisper.evaluation.metrics import ErrorCounts, Metric, Scorer, total

DRAWN = random.Random(0)
ALPHABET = "ab 你好嗎。,\U00020000\u0358"
REFERENCES, PREDICTIONS = (
    by_hand + ["".join(DRAWN.choices(ALPHABET, k=DRAWN.randrange(12))) for _ in range(300)]
    for by_hand in (
        ["她很擔心大兒子。", "Hello, big world!", "", "你好", "twenty one dogs"],
        ["她很謝的大兒子", "hello word", "thank you", "", "21 dogs"],
    )
)

PROGRAM = """
import json, sys
from simpler_distil_whisper.evaluation.evaluate_metric import ErrorRate
from simpler_distil_whisper.evaluation.metrics import Metric
import evaluate

references, predictions = json.loads(sys.argv[1])
metric = ErrorRate(Metric(unit="character"), language="en")
whole = metric.compute(predictions=predictions, references=references)
for start in range(0, len(references), 100):
    part = slice(start, start + 100)
    metric.add_batch(predictions=predictions[part], references=references[part])
batched = metric.compute()
metric.add(prediction="a", reference="b")
both = evaluate.combine([ErrorRate(), ErrorRate(Metric(unit="character"))])
combined = both.compute(predictions=["a b"], references=["a c"])
single = metric.compute()
nothing = metric.compute(predictions=[], references=[])
print(json.dumps([whole, batched, single, nothing, combined]))
"""


@pytest.mark.slow
def test_evaluate_gives_the_same_numbers_without_network_and_files(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([REFERENCES, PREDICTIONS])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
        },
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    whole, batched, single, nothing, combined = json.loads(done.stdout.splitlines()[-1])
    scorer = Scorer(Metric(unit="character"))
    counts = total(map(scorer.count, REFERENCES, PREDICTIONS, ["en"] * len(REFERENCES)))
    assert whole == batched == expected(counts)
    assert single == expected(ErrorCounts(substitutions=1))
    assert nothing == expected(ErrorCounts())
    assert {1 / 2} == {rate for name, rate in combined.items() if name.endswith("error_rate")}
    assert [path for path in home.rglob("*") if path.is_file()] == []


def expected(counts: ErrorCounts) -> dict[str, float | int | None]:
    return {
        "error_rate": counts.rate,
        **asdict(counts),
        "reference_tokens": counts.reference_tokens,
    }
