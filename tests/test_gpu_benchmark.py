"""The look at a GPU runs on a CPU too, at the size of a toy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY


@pytest.mark.slow
def test_every_stage_has_a_result_and_a_failed_one_stops_no_other(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--out"]
    path = tmp_path / "gpu.json"
    done = subprocess.run(
        [*command, str(path)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    results = json.loads(path.read_text())
    assert done.returncode == 0, results
    assert len(results) == 12
    assert all(each["equal"] == each["of"] for each in list(results["tokens"].values())[:-1])
    assert results["loss"]["relative_error_of_gradient"] < 1e-4
    assert results["resume"]["largest_difference"] < 1e-6

    failing = [*command, str(path), "--stages", "steps,loss"]  # without the models
    done = subprocess.run(failing, cwd=REPOSITORY, capture_output=True, timeout=300)
    results = json.loads(path.read_text())
    assert done.returncode == 1
    assert "failed" in results["steps"] and "relative_error" in results["loss"]
