"""The figures of `speed.json`, by hand."""

import json
from dataclasses import asdict
from pathlib import Path

from simpler_distil_whisper.decoding.speed import Speed, speed_side_by_side, write_speed

SYSTEM = {"batch_size": 2, "parameters": 9, "peak_memory_megabytes": None, "model_bytes": 36}


def test_ratios_are_of_sums_and_the_slowest_process_decides(tmp_path: Path) -> None:
    first, second = Speed(), Speed()
    first.add([1.5, 2.5], 0.5, [3, 4])
    first.add([6.0], 1.5, [8])
    second.add([2.0004], 1.0, [5])
    report = speed_side_by_side([first, second]).report(processes=2, **SYSTEM)
    assert asdict(report) == {
        "rtfx": 6.0,
        "tokens_per_second": 10.0,
        "audio_seconds": 12.0,
        "compute_seconds": 2.0,
        "utterances": 4,
        "tokens": 20,
        "batch_size": 2,
        "processes": 2,
        "parameters": 9,
        "peak_memory_megabytes": None,
        "model_bytes": 36,
    }
    write_speed(tmp_path, report, {"library": "x"})
    written = json.loads((tmp_path / "speed.json").read_text())
    assert list(written.items()) == [*asdict(report).items(), ("library", "x")]


def test_without_work_there_is_no_speed() -> None:
    report = Speed().report(processes=1, **SYSTEM)
    assert (report.rtfx, report.tokens_per_second, report.compute_seconds) == (None, None, 0.0)
