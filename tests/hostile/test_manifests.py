"""Any bytes as a manifest or as hypotheses: each row is used, or rejected with the reason."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import RunScript
from tiny import make_model_folder, read_rows, write_rows, write_tone

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.jsonl import LONGEST_ROW, placed_lines
from simpler_distil_whisper.data.manifest import Manifest, read_manifest
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.evaluation.hypotheses import (
    Hypotheses,
    HypothesisColumns,
    match_systems,
)
from simpler_distil_whisper.run import DataError

ODD_VALUES = """
null true false -1 0 0.5 1e-320 1e308 1e400 NaN -Infinity 1000000000000000000000000000000 ""
"\\u0000" "a\\u0000.wav" "\\ud800" "\\u001b[2J" "\\u202e" "zh" "klingon" "EN" "1.5" "/dev/zero"
"pipe" "."
"/proc/self/mem" [] [1] {} {"a":[]} "a.wav" "../a.wav" "\\r\\n" "<|endoftext|>" "\\ufeff" "\\u00a0"
""".split()  # noqa: SIM905
ODD_VALUES += [
    "9" * 400,
    "9" * 5000,
    '"' + "長" * 300 + '"',
    "[" * 99 + "]" * 99,
    "[" * 9999,
    '" "',
]
GOOD = {"id": "u", "audio": "a.wav", "text": "一", "language": "zh", "duration_seconds": 0.5}
GOOD |= {
    "start_seconds": 0.1,
    "hypothesis": "二",
    "speaker": "s",
    "origin_text": "三",
    "cer/wer": 0,
}
GOOD |= {"segments": [{"start_seconds": 0.0, "end_seconds": 0.4, "text": "一"}]}
GOOD |= {"previous_text": "零"}


def odd_row(chance: random.Random, number: int) -> bytes:
    """Return a line in which something is odd, or which is no row at all."""
    row: dict[str, Any] = {**GOOD, "id": f"u{number}"}
    values = {}
    for place in range(chance.choice([0, 1, 1, 2, 5])):
        values[f'"@{place}@"'] = chance.choice(ODD_VALUES)
        row[chance.choice([*GOOD, "more"])] = f"@{place}@"
    if chance.random() < 0.2:
        del row[chance.choice(list(row))]
    text = json.dumps(row, ensure_ascii=chance.random() < 0.5)
    for mark, value in values.items():
        text = text.replace(mark, value)
    line = text.encode("utf-8", "surrogatepass")
    kind = chance.randrange(20)
    if kind == 0:
        return line[: chance.randrange(len(line))]
    if kind == 1:
        at = chance.randrange(len(line))
        return line[:at] + bytes([chance.randrange(256)]) + line[at + 1 :]
    if kind == 2:
        return chance.choice([b"[]", b"1", b'"a"', b"null", b"{}", b"\xef\xbb\xbf", b"\0" * 100])
    if kind == 3:
        return text.encode("utf-16", "surrogatepass")
    return line.replace(b"{", b'{"id": 1, ', 1) if kind == 4 else line


def write_odd_rows(path: Path, seed: int, count: int) -> int:
    """Write a manifest of odd rows; return how many lines are not blank."""
    chance = random.Random(seed)
    content = b"\n".join(odd_row(chance, number) for number in range(count))
    path.write_bytes(content)
    return sum(1 for line in content.split(b"\n") if line.strip(b" \t\n\r\x0b\f"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    write_tone(folder / "a.wav")
    os.mkfifo(folder / "pipe")
    return folder


def check(folder: Path, seeds: range, count: int) -> None:
    for seed in seeds:
        rows = write_odd_rows(folder / "m.jsonl", seed, count)
        manifest = read_manifest(folder / "m.jsonl", Columns())
        assert manifest.row_count == rows, seed
        assert len(list(manifest.utterances)) + len(manifest.rejections) == rows, seed
        assert all(rejection.reason for rejection in manifest.rejections)
        assert max(len(rejection.reason) for rejection in manifest.rejections) < 1100
        assert rows // 20 < len(manifest.rejections) < rows
        (system,) = match_systems(
            [Hypotheses(name="a", path=folder / "m.jsonl")], HypothesisColumns(), {}
        )
        assert len(system.lines) + len(system.rejected) == rows, seed


def test_odd_rows_are_used_or_rejected(folder: Path) -> None:
    check(folder, range(2), 75)


@pytest.mark.slow
def test_many_odd_rows_are_used_or_rejected(folder: Path) -> None:
    first = int(os.environ.get("SDW_SEED", "1000"))
    check(folder, range(first, first + int(os.environ.get("SDW_INPUTS", "3000")) // 100), 100)


def reason_against(folder: Path, **cells: object) -> str | None:
    """Return why a row is rejected that differs in these cells from one that is used."""
    write_rows(folder / "m.jsonl", [{**GOOD, **cells}])
    manifest: Manifest = read_manifest(folder / "m.jsonl", Columns())
    if not manifest.rejections:
        return None
    (rejection,) = manifest.rejections
    assert rejection.place == f"{folder / 'm.jsonl'}:1"
    return rejection.reason


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"id": ["a"]}, '"id" is neither a string nor a number: ["a"]'),
        ({"id": True}, '"id" is neither a string nor a number: true'),
        ({"id": 7}, None),
        ({"language": ""}, None),
        ({"language": " \t"}, None),
        ({"language": 7}, '"language" is not a string: 7'),
        ({"language": ["zh"]}, '"language" is not a string: ["zh"]'),
        ({"text": {"a": 1}}, '"text" is not a string: {"a": 1}'),
        ({"text": "a" * 1_000_001}, '"text" has more than 1000000 characters'),
        ({"start_seconds": -0.1}, '"start_seconds" is not a time in seconds: -0.1'),
        ({"start_seconds": "1"}, '"start_seconds" is not a time in seconds: "1"'),
        ({"duration_seconds": True}, '"duration_seconds" is not a time in seconds: true'),
        ({"duration_seconds": 10**400}, "not JSON: a number of more than 300 digits: 1000"),
        ({"audio": "長" * 300}, "no such file"),
        ({"audio": "a\0.wav"}, "no such file"),
        ({"audio": 3}, 'no audio path under "audio"'),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_done_with_an_odd_cell(
    folder: Path, cells: dict[str, object], reason: str | None
) -> None:
    given = reason_against(folder, **cells)
    assert given == reason if reason is None else (given or "").startswith(reason)


def test_a_language_that_is_blank_is_none(folder: Path) -> None:
    write_rows(folder / "m.jsonl", [{**GOOD, "language": " "}])
    (utterance,) = read_manifest(folder / "m.jsonl", Columns()).utterances
    assert utterance.language is None


def test_a_row_that_is_too_long_is_rejected_and_the_next_one_is_used(folder: Path) -> None:
    long = json.dumps(GOOD).encode() + b" " * (2 * LONGEST_ROW) + b"x\n"
    (folder / "m.jsonl").write_bytes(long + json.dumps(GOOD).encode())
    manifest = read_manifest(folder / "m.jsonl", Columns())
    (rejection,) = manifest.rejections
    assert rejection.reason == "longer than the 32 MiB that a row may have"
    assert len(str(rejection.row)) < 1000
    (utterance,) = manifest.utterances
    assert (utterance.number, utterance.place) == (1, f"{folder / 'm.jsonl'}:2")
    assert utterance.row == GOOD


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "/proc/self/maps", ".", "a\0b", "長" * 300])
def test_what_is_no_file_on_disk_is_no_manifest(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="^manifest: .* cannot be read: "):
        read_manifest(folder / name, Columns())
    with pytest.raises(ConfigError, match="^hypotheses: .* cannot be read: "):
        list(placed_lines(folder / name, "hypotheses"))


def test_many_keys_and_one_key_twice_are_answered_at_once(folder: Path) -> None:
    keys = ", ".join(f'"k{number}": 1' for number in range(100_000))
    write_rows(folder / "m.jsonl", [f'{{{keys}, "k0": 2}}', f"{{{keys}}}", GOOD])
    first, second = read_manifest(folder / "m.jsonl", Columns()).rejections
    assert first.reason == 'has the key "k0" twice in one object'
    assert len(second.reason) < 1100


def test_a_manifest_of_nothing_but_odd_bytes_is_an_error_of_the_data(folder: Path) -> None:
    (folder / "m.jsonl").write_bytes(bytes(range(256)) * 100)
    with pytest.raises(DataError, match="100 rows, 100 unusable|unusable"):
        read_manifest(folder / "m.jsonl", Columns()).check(1.0)


def config_for(script: str, folder: Path) -> dict[str, Any]:
    model = {"path": str(folder / "model")}
    data = {"manifest": "odd.jsonl", "max_bad_fraction": 1.0, "num_workers": 0}
    decoding = {"max_new_tokens": 4, "batch_size": 8}
    if script == "eval":
        groups = ["language", "speaker", "more"]
        return {"output_dir": "out", "hypotheses": [{"name": "\x1b[2J", "path": "odd.jsonl"}]} | {
            "group_by": groups,
            "columns": {"speaker": "speaker", "audio": "audio"},
        }
    if script == "offline_inference":
        return {"output_dir": "out", "model": model, "data": data, "decoding": decoding} | {
            "output_columns": {"hypothesis": "new", "segments": "new_segments"}
        }
    names = {"pseudo_label": "label", "reference": "reference", "error_rate": "rate"}
    return {"output_dir": "out", "teacher": model, "data": data, "decoding": decoding} | {
        "output_columns": names,
        "quality": {"group_by": ["more", "segments"]},
    }


RESULTS = {
    "eval": "utterances.jsonl",
    "offline_inference": "hypotheses.jsonl",
    "run_pseudo_labelling": "pseudo_labels.jsonl",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", RESULTS)
def test_rows_out_and_rejected_are_the_rows_in(
    script: str, tmp_path: Path, run_script: RunScript
) -> None:
    make_model_folder(tmp_path / "model", languages=["en", "zh"], talkative=True)
    write_tone(tmp_path / "a.wav")
    os.mkfifo(tmp_path / "pipe")
    rows = write_odd_rows(tmp_path / "odd.jsonl", 7, 300)
    done = run_script(script, config_for(script, tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr + (tmp_path / "out/log.txt").read_text()
    used = read_rows(tmp_path / "out" / RESULTS[script])
    rejected = read_rows(tmp_path / "out" / "rejected.jsonl")
    assert len(used) > 20
    assert len(used) + len(rejected) == rows


@pytest.mark.slow
def test_training_on_odd_rows_is_rehearsed(tmp_path: Path, run_script: RunScript) -> None:
    make_model_folder(tmp_path / "model", languages=["en", "zh"], talkative=True)
    write_tone(tmp_path / "a.wav")
    write_odd_rows(tmp_path / "odd.jsonl", 8, 300)
    model = {"path": "model"}
    data = {"train_manifests": ["odd.jsonl"], "dev_manifest": "odd.jsonl", "num_workers": 0}
    data |= {"max_bad_fraction": 1.0, "timestamp_probability": 0.5, "max_error_rate": 0.5}
    data |= {"previous_text_probability": 0.5}
    config = {"output_dir": "out", "teacher": model, "student": model, "data": data}
    config |= {"schedule": {"warmup_steps": 0, "epochs": None, "max_steps": 2}}
    done = run_script("run_distillation", config, "--check")
    assert done.returncode in (0, 3), done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
