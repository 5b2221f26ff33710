"""Shards: jobs without a connection do one run together, and exactly one of them merges."""

import json
import multiprocessing
import re
from pathlib import Path

import pytest
from killing import Death, operations, run
from tiny import make_corpus, make_model_folder, read_rows, write_rows

from offline_inference import Config
from simpler_distil_whisper.config import ConfigError, load_config
from simpler_distil_whisper.shards import Shard, Shards, shard_of_job

FORK = multiprocessing.get_context("fork")
TELLING_TIME = {"log.txt", "run_info.json", "speed.json", "run_pseudo_labelling.json"}


def array(task: int, first: int, last: int, count: int | None = None) -> dict[str, str]:
    numbers = {"ID": task, "MIN": first, "MAX": last, "COUNT": count or last - first + 1}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, None),
        ({"SDW_SHARD": ""}, None),
        ({"SDW_SHARD": "3/8"}, (3, 8)),
        ({"SDW_SHARD": " 3 / 8 "}, (3, 8)),
        (array(0, 0, 7), (0, 8)),
        (array(4, 1, 4), (3, 4)),
        (array(5, 5, 5) | {"SDW_SHARD": "5/8"}, (5, 8)),
    ],
)
def test_auto_is_the_task_of_a_job_array(
    environment: dict[str, str], shard: tuple[int, int] | None
) -> None:
    assert shard_of_job(environment) == shard


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SDW_SHARD": "3"}, 'SDW_SHARD is "3"; it must be like "3/8"'),
        ({"SDW_SHARD": "-1/8"}, "it must be like"),
        ({"SDW_SHARD": "²/8"}, "it must be like"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "which name no task: set SDW_SHARD"),
        (array(3, 1, 7, count=3), "the job array has 3 tasks from 1 to 7"),
        (array(4, 0, 8, count=3), "its numbers must follow one another"),
    ],
)
def test_an_array_that_names_no_shard_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shard_of_job(environment)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[4, 4]", "data.shard: [4, 4]: shards are counted from 0, so to 3"),
        ("[-1, 4]", "data.shard.0: Input should be greater than or equal to 0, found -1"),
        ("[0, 0]", "data.shard.1: Input should be greater than 0, found 0"),
        ("[0]", "data.shard"),
        ('"3/4"', "data.shard"),
        ('"auto"', 'data.shard: SDW_SHARD is "x"'),
    ],
)
def test_a_shard_that_is_none_is_answered_with_its_key(
    value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDW_SHARD", "x")
    config = tmp_path / "config.json"
    data = f'{{"manifest": "m.jsonl", "shard": {value}}}'
    config.write_text(f'{{"output_dir": "out", "model": {{"path": "x"}}, "data": {data}}}')
    with pytest.raises(ConfigError, match=re.escape(f"config.json: {message}")):
        load_config(config, Config)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_work_is_dealt_whole_and_fairly(count: int) -> None:
    """The batches of each group of 64 come with the longest first."""
    numbers = range(64 * 2 * count)
    shares = [[n for n in numbers if Shard(index, count).owns(n)] for index in range(count)]
    assert sorted(number for share in shares for number in share) == list(numbers)
    seconds = [sum(64 - number % 64 for number in share) for share in shares]
    assert max(seconds) == min(seconds)


def shards(folder: Path, index: int, count: int) -> Shards:
    opened = Shards(folder / "out", Shard(index, count))
    opened.begin()
    return opened


def test_each_end_tells_which_shards_are_missing_and_the_last_one_merges(tmp_path: Path) -> None:
    first, third = (shards(tmp_path, index, 4) for index in (0, 2))
    first_words, third_words = first.end(), third.end()
    assert first_words and "Shard 0 of 4 has ended. Missing: 1 (not begun), 2, 3 (" in first_words
    assert third_words and "Missing: 1 (not begun), 3 (not begun)." in third_words
    assert shards(tmp_path, 3, 4).end()
    second = shards(tmp_path, 1, 4)
    assert second.end() is None and second.merging
    # It goes on if it was killed; the others leave the work to it.
    assert shards(tmp_path, 1, 4).end() is None
    words = third.end()
    assert words and "shard 1 merges their results" in words and not third.merging


def test_of_shards_that_end_at_the_same_time_one_merges(tmp_path: Path) -> None:
    count = 6
    together, answers = FORK.Barrier(count), FORK.Queue()

    def work(index: int) -> None:
        own = shards(tmp_path, index, count)
        together.wait()
        size = own.agree("batch_size", index + 10)
        together.wait()
        answers.put((own.end() is None, size))

    jobs = [FORK.Process(target=work, args=(index,)) for index in range(count)]
    for job in jobs:
        job.start()
    merging, sizes = zip(*(answers.get(timeout=60) for _ in jobs), strict=True)
    for job in jobs:
        job.join()
    assert sum(merging) == 1
    assert len(set(sizes)) == 1 and sizes[0] in range(10, 10 + count)
    left = {path.name for path in (tmp_path / "out/shards").iterdir()}
    assert left == {*(f"{n}-of-{count}" for n in range(count)), "ended", "merged_by", "batch_size"}


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    shards(tmp_path, 0, 4)
    with pytest.raises(ConfigError, match=r'in 4 shards, .* 1: .* SDW_SHARD .* "0/4"'):
        shards(tmp_path, 0, 1)
    for name in ("a/out/results.txt", "b/out/shards/train-00001.tar"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
        with pytest.raises(ConfigError, match="holds no run in shards"):
            shards(tmp_path / name[0], 0, 4)


ROWS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows of which some are bad, and a model for both scripts."""
    folder = tmp_path_factory.mktemp("shards")
    make_model_folder(folder / "model", languages=["en", "zh"], talkative=True, seed=53)
    rows = read_rows(make_corpus(folder, ROWS))
    for row in rows[7:50:20]:
        (folder / row["audio"]).write_bytes(b"no audio")
    write_rows(folder / "rows.jsonl", [*rows[:20], "{", *rows[20:]])
    return folder


def start(folder: Path, script: str, shard: object, death: Death = Death()) -> int | None:  # noqa: B008
    config = {
        "output_dir": "out",
        "teacher" if script == "run_pseudo_labelling" else "model": {"path": "model"},
        "data": {"manifest": "rows.jsonl", "max_bad_fraction": 0.5, "shard": shard},
        "decoding": {"batch_size": 4, "max_new_tokens": 20},
    }
    (folder / f"{script}.json").write_text(json.dumps(config))
    (folder / "output.txt").write_text("")
    return run(script, folder, death)


def results(folder: Path) -> dict[str, bytes]:
    paths = [path for path in (folder / "out").iterdir() if path.is_file()]
    return {path.name: path.read_bytes() for path in paths if path.name not in TELLING_TIME}


@pytest.mark.slow
def test_shards_that_are_killed_write_what_one_job_writes(folder: Path) -> None:
    name = "run_pseudo_labelling"
    assert start(folder, name, None) == 0
    whole = results(folder)
    assert {"pseudo_labels.jsonl", "rejected.jsonl", "label_quality.html"} <= whole.keys()
    middle = operations(folder) // 6
    (folder / "out").rename(folder / "whole")
    assert start(folder, name, [2, 3]) == 0
    assert "Missing: 0 (not begun), 1 (not begun)." in (folder / "output.txt").read_text()
    assert start(folder, name, [0, 3], Death(operation=middle)) != 0
    assert start(folder, name, None) == 2
    assert "holds a run in shards: set data.shard" in (folder / "output.txt").read_text()
    assert start(folder, name, [1, 3]) == 0
    assert "Missing: 0." in (folder / "output.txt").read_text()
    assert not results(folder)
    parts = sum(path.stat().st_size for path in (folder / "out").rglob("*.results"))
    assert start(folder, name, [0, 3], Death(operation=2 * middle)) != 0
    assert parts <= sum(path.stat().st_size for path in (folder / "out").rglob("*.results"))
    assert start(folder, name, [0, 3]) == 0
    assert results(folder) == whole
    assert not list((folder / "out").rglob("parts"))
    for shard in (None, [1, 3]):
        assert start(folder, name, shard) == 0
        assert "nothing to do" in (folder / "output.txt").read_text()
    (folder / "out").rename(folder / "labels in shards")


@pytest.mark.slow
def test_the_speed_of_shards_is_that_of_all_side_by_side(folder: Path) -> None:
    for shard in ([0, 2], [1, 2]):
        assert start(folder, "offline_inference", shard) == 0
    assert len(read_rows(folder / "out/hypotheses.jsonl")) == ROWS - 3
    parts = [
        json.loads((folder / f"out/shards/{shard}-of-2/speed.json").read_bytes())
        for shard in range(2)
    ]
    speed = json.loads((folder / "out/speed.json").read_bytes())
    assert speed["utterances"] == sum(part["utterances"] for part in parts) == ROWS - 3
    assert min(part["utterances"] for part in parts) >= 24
    assert speed["processes"] == 2
    assert speed["compute_seconds"] == max(part["compute_seconds"] for part in parts)
