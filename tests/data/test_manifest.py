"""Manifests in, answers out: no row is lost, whatever stands in it, whoever is killed."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_corpus, read_rows, write_rows

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.manifest import Columns, Manifest, Rejection, read_manifest, reject
from simpler_distil_whisper.data.results import RowResults, rejection_line
from simpler_distil_whisper.run import DataError

CLIP = "clip.wav"
GOOD = {"id": "u1", "audio": CLIP, "text": "好"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a clip, not the working directory."""
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / CLIP).touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "data"


def write(folder: Path, *rows: object) -> Path:
    """Write a manifest; a string or bytes stand for themselves."""
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    path = folder / "m.jsonl"
    path.write_bytes(
        b"".join(x.encode() + b"\n" if isinstance(x, str) else x + b"\n" for x in lines)
    )
    return path


def read(folder: Path, *rows: object, **options: Any) -> Manifest:
    return read_manifest(write(folder, *rows), Columns(), **options)


def test_a_row_is_read_as_it_stands(folder: Path) -> None:
    row = {
        "id": "台-1",
        "audio": CLIP,
        "text": " 我 要 Order 2 杯咖啡。 ",
        "language": "zh-TW",
        "start_seconds": 1,
        "duration_seconds": 2.5,
        "speaker": {"name": "林", "age": 41.25, "tags": [None, True, "\U00020bb7"]},
    }
    (one,) = read(folder, json.dumps(row, ensure_ascii=False)).utterances
    assert (one.number, one.place, one.id) == (0, f"{folder / 'm.jsonl'}:1", "台-1")
    assert one.audio == folder / CLIP
    assert (one.start_seconds, one.duration_seconds) == (1.0, 2.5)
    assert one.text == " 我 要 Order 2 杯咖啡。 "
    assert one.language == "zh"
    assert one.row == row


def test_a_row_may_lack_everything_but_its_audio(folder: Path) -> None:
    nothing = {"id": None, "text": None, "language": None, "start_seconds": None}
    for row in ({"audio": CLIP}, {"audio": CLIP, **nothing, "duration_seconds": None}):
        (one,) = read(folder, row).utterances
        assert one.id == one.place == f"{folder / 'm.jsonl'}:1"
        assert (one.text, one.language) == (None, None)
        assert (one.start_seconds, one.duration_seconds) == (0.0, None)


def test_columns_say_which_key_holds_what(folder: Path) -> None:
    row = {"wav": CLIP, "said": "好", "audio": 3, "text": 4, "id": "x", "language": 5}
    columns = Columns(
        audio="wav", text="said", id=None, language=None, start_seconds=None, duration_seconds=None
    )
    (one,) = read_manifest(write(folder, row), columns).utterances
    assert (one.text, one.language, one.id) == ("好", None, one.place)


BAD_ROWS: list[tuple[object, str]] = [
    ('{"audio": "clip.wav"', "not JSON"),
    ("", ""),
    ("clip.wav", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('{"audio": "clip.wav", "n": ' + "9" * 5000 + "}", "not JSON"),
    ('["clip.wav"]', "list"),
    ("null", "not a JSON object"),
    ('"clip.wav"', "str"),
    ('{"audio": "clip.wav", "x": NaN}', "NaN or infinite"),
    ('{"audio": "clip.wav", "x": [-Infinity]}', "NaN or infinite"),
    ('{"audio": "clip.wav", "x": 1e999}', "NaN or infinite"),
    ('{"audio": "clip.wav", "x": "\\ud83d"}', "surrogate"),
    ('{"audio": "clip.wav", "\\udc00": 1}', "surrogate"),
    (b'{"audio": "clip.wav", "x": "\xe9"}', "not UTF-8"),
    ('{"audio": "clip.wav", "audio": "other.wav"}', 'has the key "audio" twice in one object'),
    ('{"audio": "clip.wav", "x": [{"y": 1, "z": 2, "y": 1}]}', 'has the key "y" twice'),
    ({"id": "n", "text": "好"}, 'no audio path under "audio"; the keys are id, text'),
    ({"audio": None}, 'no audio path under "audio"'),
    ({"audio": ""}, 'no audio path under "audio"'),
    ({"audio": ["clip.wav"]}, 'no audio path under "audio"'),
    ({"audio": {"path": "clip.wav"}}, 'no audio path under "audio"'),
    ({"audio": "nowhere.wav"}, 'no such file: "nowhere.wav"'),
    ({"audio": "嗨" * 300}, "no such file"),
    ({"audio": "cl\0ip.wav"}, "no such file"),
    ({**GOOD, "text": 5}, '"text" is not a string: 5'),
    ({**GOOD, "text": ["好"]}, '"text" is not a string'),
    ({**GOOD, "start_seconds": -0.1}, '"start_seconds" is not a time in seconds: -0.1'),
    ({**GOOD, "start_seconds": True}, '"start_seconds" is not a time in seconds: True'),
    ({**GOOD, "start_seconds": "1"}, "\"start_seconds\" is not a time in seconds: '1'"),
    ({**GOOD, "duration_seconds": -1}, '"duration_seconds" is not a time in seconds: -1'),
    ({**GOOD, "duration_seconds": 0}, '"duration_seconds" is 0'),
    ({**GOOD, "duration_seconds": 1e300}, '"duration_seconds" is not a time in seconds'),
    ({**GOOD, "language": "klingon"}, '"klingon" is no language that Whisper knows'),
    ({**GOOD, "language": ""}, '"" is no language'),
    ({**GOOD, "language": 7}, '"7" is no language'),
    ({**GOOD, "language": "taigi"}, 'use "zh"'),
    ({**GOOD, "language": "yue"}, 'the model has no token for the language "yue"'),
    ({**GOOD, "hypothesis": ""}, "has ['hypothesis'] already: rename them"),
]


def test_every_bad_row_is_accounted_for(folder: Path) -> None:
    rows: list[object] = [GOOD]
    for bad, _ in BAD_ROWS:
        rows += [bad, GOOD]
    manifest = read(folder, *rows, languages={"zh", "en"}, new_fields={"hypothesis"})
    expected = [
        (f"{folder / 'm.jsonl'}:{2 * number + 2}", reason, row)
        for number, (row, reason) in enumerate(BAD_ROWS)
        if row != ""
    ]
    assert [rejection.place for rejection in manifest.rejections] == [x[0] for x in expected]
    for rejection, (_, reason, row) in zip(manifest.rejections, expected, strict=True):
        assert reason in rejection.reason
        # The row itself stands in rejected.jsonl, as standard JSON.
        line = rejection_line(rejection)
        line.encode()
        assert line.count("\n") == 1
        kept = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert set(kept) == {"place", "reason", "row"}
        assert kept["row"] == (row.decode(errors="replace") if isinstance(row, bytes) else row)
    assert len(manifest.utterances) == len(BAD_ROWS) + 1
    assert manifest.row_count == 2 * len(BAD_ROWS)  # a blank line is no row
    numbers = [one.number for one in (*manifest.utterances, *manifest.rejections)]
    assert sorted(numbers) == list(range(manifest.row_count))


def test_a_text_or_language_key_that_no_one_asked_for_rejects_nothing(folder: Path) -> None:
    assert read(folder, {**GOOD, "language": "yue", "hypothesis": "x"}).rejections == []


def test_blank_lines_byte_order_mark_and_windows_line_ends(folder: Path) -> None:
    path = folder / "m.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \t\n" + line + b"\n\n" + line)
    manifest = read_manifest(path, Columns())
    assert manifest.rejections == []
    assert [one.place for one in manifest.utterances] == [f"{path}:{n}" for n in (1, 4, 6)]
    assert [one.number for one in manifest.utterances] == [0, 1, 2]


def test_separators_of_unicode_end_no_row(folder: Path) -> None:
    text = "一\u2028二\u2029三\x85四\x1c五"
    (one,) = read(folder, json.dumps({**GOOD, "text": text}, ensure_ascii=False)).utterances
    assert one.text == text


@given(st.lists(st.sampled_from([GOOD, *(row for row, _ in BAD_ROWS), " "]), max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_rows_out_and_rows_rejected_are_the_rows_in(folder: Path, rows: list[object]) -> None:
    in_file = [row for row in rows if not isinstance(row, str) or row.strip()]
    if not in_file:
        with pytest.raises(DataError, match="has no rows"):
            read(folder, *rows)
        return
    manifest = read(folder, *rows)
    everything = sorted([*manifest.utterances, *manifest.rejections], key=lambda one: one.number)
    assert [one.number for one in everything] == list(range(len(in_file)))
    places = [int(one.place.rpartition(":")[2]) for one in everything]
    assert places == [
        number for number, row in enumerate(rows, 1) if not isinstance(row, str) or row.strip()
    ]


@pytest.mark.parametrize("depth", [1, 90, 101, 300, 500, *range(960, 1000, 3), 5000])
def test_a_row_nested_at_any_depth_is_used_or_rejected(folder: Path, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    rows = [f'{{"audio": "{name}", "x": {deep}}}' for name in (CLIP, "gone.wav")]
    manifest = read(folder, *rows, GOOD)
    results = open_results(folder, manifest)
    silent = [Rejection(one.number, one.place, "silent", one.row) for one in manifest.utterances]
    results.append([], silent)
    assert results.finish(manifest.rejections, lambda: None) == (0, 3)
    assert len(silent) == (2 if depth < 100 else 1)


def test_a_long_list_is_not_deep(folder: Path) -> None:
    assert read(folder, {**GOOD, "words": [["好", 0.1]] * 500}).rejections == []


def test_a_path_is_sought_beside_the_manifest_then_in_the_working_directory(folder: Path) -> None:
    here = Path.cwd()
    (here / "only_here.wav").touch()
    (here / CLIP).touch()
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.wav").touch()
    names = [CLIP, "only_here.wav", "sub/deep.wav", str(here / CLIP), f"../elsewhere/{CLIP}"]
    found = [one.audio for one in read(folder, *({"audio": name} for name in names)).utterances]
    assert found[0] == folder / CLIP
    assert found[1].resolve() == here / "only_here.wav"
    assert found[2] == folder / "sub" / "deep.wav"
    assert found[3] == here / CLIP
    assert found[4].resolve() == here / CLIP


def test_max_utterances_takes_the_first_rows_good_or_bad(folder: Path) -> None:
    manifest = read(folder, "", GOOD, "{", {**GOOD, "id": "u2"}, GOOD, "{", max_utterances=3)
    assert [one.id for one in manifest.utterances] == ["u1", "u2"]
    assert len(manifest.rejections) == 1
    assert read(folder, GOOD, max_utterances=9).row_count == 1


@pytest.mark.parametrize(("bad", "ok"), [(0, True), (1, True), (2, False), (3, False)])
def test_too_many_bad_rows_are_a_data_error(folder: Path, bad: int, ok: bool) -> None:
    manifest = read(folder, *([GOOD] * (10 - bad)), *(["{"] * bad))
    if ok:
        assert manifest.check(0.1) is manifest  # exactly the fraction is not above it
        return
    with pytest.raises(DataError) as caught:
        manifest.check(0.1)
    assert f"10 rows, {bad} unusable" in str(caught.value)
    assert f"m.jsonl:{11 - bad}: not JSON" in str(caught.value)


def test_a_manifest_without_a_usable_row_is_a_data_error(folder: Path) -> None:
    with pytest.raises(DataError, match="2 rows, 2 unusable"):
        read(folder, "{", "{").check(1.0)
    for rows in ((), ("", "  ")):
        with pytest.raises(DataError, match="the manifest has no rows"):
            read(folder, *rows)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_a_manifest_that_cannot_be_opened_is_the_configs_mistake(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_manifest(folder / name, Columns())


# Only where a row stands is kept in memory.


def test_a_row_is_read_again_whenever_it_is_asked_for(folder: Path) -> None:
    rows = [{**GOOD, "id": f"第{n}句", "n": n} for n in range(9)]
    found = read(folder, "", *rows[:4], "{", *rows[4:]).utterances
    assert len(found) == 9
    assert [one.row for one in found] == rows
    assert [one.number for one in found] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert found[4].row == rows[4]
    assert found[-1].place == f"{folder / 'm.jsonl'}:11"
    assert [one.row for one in found[2:7:2]] == [rows[2], rows[4], rows[6]]
    assert found[9:] == []
    with pytest.raises(IndexError):
        found[9]
    elsewhere = pickle.loads(pickle.dumps(found))
    assert list(elsewhere) == list(found)


def test_a_million_rows_are_small(folder: Path) -> None:
    """Measured by what a worker process is sent; the rows themselves are 100 times as much."""
    row = {**GOOD, "text": "好" * 500}
    sizes = [len(pickle.dumps(read(folder, *[row] * n))) for n in (1000, 3000)]
    assert (sizes[1] - sizes[0]) / 2000 < 32


def test_a_file_that_is_gone_since_is_still_a_row(folder: Path) -> None:
    found = read(folder, GOOD, {**GOOD, "audio": "sub/x.wav"}).utterances
    (folder / CLIP).unlink()
    assert found[0].audio == folder / CLIP


@pytest.mark.parametrize("change", ["longer", "other", "gone"])
def test_a_manifest_that_changes_under_a_run_is_noticed(folder: Path, change: str) -> None:
    manifest = read(folder, GOOD, {**GOOD, "id": "u2"})
    assert manifest.utterances[1].id == "u2"
    path = manifest.path
    if change == "gone":
        path.unlink()
    else:
        text = path.read_text()
        path.write_text(text + text if change == "longer" else text.replace("u1", "u3"))
        os.utime(path, (1, 1))
    for ask in (lambda: manifest.utterances[0], lambda: list(manifest.utterances)):
        with pytest.raises(DataError, match=r"m\.jsonl has changed while this run reads it"):
            ask()


def test_a_manifest_that_can_be_read_only_once_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(ConfigError, match="not an ordinary file"):
        read_manifest(folder / "pipe", Columns())


def test_the_fingerprint_is_that_of_the_rows_used(folder: Path) -> None:
    rows = [GOOD, {**GOOD, "id": "u2"}, {**GOOD, "audio": "later.wav"}]
    prints = [
        read(folder, *rows).fingerprint(),
        read(folder, *rows[:2]).fingerprint(),
        read(folder, "", *rows[:2]).fingerprint(),  # its places are others
        read(folder, rows[1], rows[0]).fingerprint(),
    ]
    assert len(set(prints)) == 4
    assert read(folder, *rows, max_utterances=2).fingerprint() == prints[1]
    (folder / "later.wav").touch()
    assert read(folder, *rows).fingerprint() != prints[0]  # a row more is used


# Answers: several processes, kills, resumption.

COUNT, BATCH = 23, 3


def open_results(folder: Path, manifest: Manifest) -> RowResults:
    results = RowResults(folder, "answers.jsonl")
    results.open_for(manifest)
    return results


def make_manifest(folder: Path) -> Manifest:
    rows: list[object] = [{**GOOD, "id": f"第{n}句", "n": n} for n in range(COUNT)]
    rows[4], rows[11] = "{", {"audio": "gone.wav"}
    return read(folder, *rows)


def answer(results: RowResults, manifest: Manifest, rank: int, processes: int, stop: int) -> int:
    """Do one process's share of the batches that have no answers yet; return how many."""
    usable = manifest.utterances
    batches = [usable[start : start + BATCH] for start in range(0, len(usable), BATCH)]
    done = 0
    for batch in batches[rank::processes]:
        if results.done[[one.number for one in batch]].all():
            continue
        if done == stop:
            break
        bad = [one for one in batch if one.number % 7 == 6]
        results.append(
            [(one, one.row | {"said": f"聽到{one.number}"}) for one in batch if one not in bad],
            [Rejection(one.number, one.place, "silent", one.row) for one in bad],
        )
        done += 1
    return done


def done_in(results: RowResults) -> set[int]:
    return set(np.flatnonzero(results.done).tolist())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def become(rank: int, processes: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(processes))

    return become


def run_together(
    folder: Path,
    manifest: Manifest,
    processes: int,
    become: Callable[[int, int], None],
    stop: int = 1_000,
) -> None:
    """Let several processes open, answer and, unless they are stopped, finish."""
    everyone = []
    for rank in range(processes):
        become(rank, processes)
        everyone.append(open_results(folder, manifest))
    for rank, results in enumerate(everyone):
        answer(results, manifest, rank, processes, stop)
    if stop < COUNT:
        return
    for rank in reversed(range(processes)):  # the main process merges when all have come
        become(rank, processes)
        everyone[rank].finish(manifest.rejections, lambda: None)


@pytest.fixture
def alone(folder: Path) -> dict[str, bytes]:
    """What one process writes that no one interrupts."""
    manifest = make_manifest(folder)
    results = open_results(folder / "alone", manifest)
    answer(results, manifest, 0, 1, COUNT)
    assert results.finish(manifest.rejections, lambda: None) == (18, 5)
    return files(folder / "alone")


def test_answers_stand_in_the_manifests_order_and_nothing_is_lost(
    folder: Path, alone: dict[str, bytes]
) -> None:
    assert sorted(alone) == ["answers.jsonl", "rejected.jsonl"]
    assert not (folder / "alone" / "parts").exists()
    answered = [json.loads(line) for line in alone["answers.jsonl"].splitlines()]
    bad = [4, 6, 11, 13, 20]
    assert [row["n"] for row in answered] == [n for n in range(COUNT) if n not in bad]
    first = {"id": "第0句", "audio": CLIP, "text": "好", "n": 0, "said": "聽到0"}
    assert alone["answers.jsonl"].splitlines()[0].decode() == json.dumps(first, ensure_ascii=False)
    rejected = [json.loads(line) for line in alone["rejected.jsonl"].splitlines()]
    assert [row["place"] for row in rejected] == [f"{folder / 'm.jsonl'}:{n + 1}" for n in bad]
    assert [row["reason"] for row in rejected][1:4:2] == ["silent", "silent"]


@pytest.mark.parametrize("processes", [2, 3, 5, 9])
def test_several_processes_write_what_one_writes(
    folder: Path,
    alone: dict[str, bytes],
    processes: int,
    as_process: Callable[[int, int], None],
) -> None:
    run_together(folder / "out", make_manifest(folder), processes, as_process)
    assert files(folder / "out") == alone
    assert not (folder / "out" / "parts").exists()


@pytest.mark.parametrize("seed", range(8))
def test_a_run_killed_again_and_again_writes_what_one_writes(
    folder: Path, alone: dict[str, bytes], seed: int, as_process: Callable[[int, int], None]
) -> None:
    manifest, chance = make_manifest(folder), random.Random(seed)
    for _ in range(4):
        run_together(folder / "out", manifest, chance.randint(1, 4), as_process, stop=1)
        # A kill in the middle of a write tears the last line anywhere, even inside a character.
        for part in (folder / "out" / "parts").glob("*.[ar]*"):
            content = part.read_bytes()
            if content and chance.random() < 0.5:
                last = content.rstrip(b"\n").rfind(b"\n") + 1
                part.write_bytes(content[: chance.randrange(last, len(content))])
    run_together(folder / "out", manifest, chance.randint(1, 4), as_process)
    assert files(folder / "out") == alone


def test_what_is_done_is_not_done_again(
    folder: Path, as_process: Callable[[int, int], None]
) -> None:
    manifest = make_manifest(folder)
    run_together(folder / "out", manifest, 2, as_process, stop=2)
    as_process(0, 1)
    results = open_results(folder / "out", manifest)
    assert done_in(results) == {0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 13}
    assert answer(results, manifest, 0, 1, COUNT) == 3  # of seven batches


def test_a_process_that_is_killed_keeps_every_batch_that_it_had_appended(folder: Path) -> None:
    manifest = make_manifest(folder)
    program = (
        f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}]\n"
        "from pathlib import Path\n"
        "from simpler_distil_whisper.data.manifest import Columns, read_manifest\n"
        "from simpler_distil_whisper.data.results import RowResults\n"
        "manifest = read_manifest(Path('m.jsonl'), Columns())\n"
        "results = RowResults(Path('out'), 'answers.jsonl')\n"
        "results.open_for(manifest)\n"
        "for one in manifest.utterances[:5]:\n"
        "    results.append([(one, one.row)], [])\n"
        "    print(one.number, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    appended = {int(process.stdout.readline()) for _ in range(5)}
    process.kill()
    process.wait()
    process.communicate()
    assert done_in(open_results(folder / "out", manifest)) == appended == {0, 1, 2, 3, 5}


def test_the_main_process_waits_for_the_others_before_it_merges(
    folder: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest(folder)
    monkeypatch.setenv("RANK", "1")
    late = open_results(folder / "out", manifest)
    monkeypatch.setenv("RANK", "0")
    main = open_results(folder / "out", manifest)
    answer(main, manifest, 0, 2, COUNT)
    others_are_done = threading.Event()

    def wait() -> None:
        # What stands here happens while the main process waits.
        if not others_are_done.is_set():
            answer(late, manifest, 1, 2, COUNT)
            others_are_done.set()

    main.finish(manifest.rejections, wait)
    assert files(folder / "out") == alone


def small_work(folder: Path) -> Manifest:
    return read(folder, GOOD, {**GOOD, "id": "二"}, {**GOOD, "id": "u3"}, "{", GOOD)


def keep_rows(results: RowResults, manifest: Manifest) -> None:
    """Answer all rows but the third, which is rejected, as one batch."""
    first, second, third, last = manifest.utterances
    answers = [(one, {"said": f"聽{one.number}"}) for one in (first, second, last)]
    results.append(answers, [reject(third, "silent")])


@pytest.fixture
def untouched(folder: Path) -> dict[str, bytes]:
    manifest = small_work(folder)
    results = open_results(folder / "untouched", manifest)
    keep_rows(results, manifest)
    assert results.finish(manifest.rejections, lambda: None) == (3, 2)
    return files(folder / "untouched")


@pytest.mark.parametrize(("kind", "rank"), [("answers", 0), ("rejected", 1)])
def test_a_part_torn_at_any_byte_loses_no_row(
    folder: Path, untouched: dict[str, bytes], kind: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = small_work(folder)
    monkeypatch.setenv("RANK", str(rank))
    keep_rows(open_results(folder / "whole", manifest), manifest)
    monkeypatch.setenv("RANK", "0")  # goes on with what process `rank` had left
    size = (folder / f"whole/parts/{rank}.{kind}").stat().st_size
    for cut in (0, 1, *range(62, size + 1)):  # the first line is a hash of 64 digits
        shutil.rmtree(folder / "out", ignore_errors=True)
        shutil.copytree(folder / "whole", folder / "out")
        os.truncate(folder / f"out/parts/{rank}.{kind}", cut)
        results = open_results(folder / "out", manifest)
        keep_rows(results, manifest)
        assert results.finish(manifest.rejections, lambda: None) == (3, 2)
        assert files(folder / "out") == untouched, cut


def finish_and_be_killed(results: RowResults, manifest: Manifest, at: int) -> None:
    """Kill this process when it is about to change the folder for the `at`-th time."""
    left = itertools.count(at, -1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.rmdir")
        if (changes or (event == "open" and "w" in str(arguments[1]))) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    results.finish(manifest.rejections, lambda: None)


def test_a_run_killed_anywhere_in_its_end_goes_on_to_the_same_bytes(
    folder: Path, untouched: dict[str, bytes]
) -> None:
    manifest = small_work(folder)
    for at in itertools.count():
        out = folder / f"killed-{at}"
        results = open_results(out, manifest)
        keep_rows(results, manifest)
        process = multiprocessing.get_context("fork").Process(
            target=finish_and_be_killed, args=(results, manifest, at)
        )
        process.start()
        process.join(timeout=30)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        again = open_results(out, manifest)
        assert done_in(again) >= {0, 1, 2, 4}  # nothing is computed again
        assert again.finish(manifest.rejections, lambda: None) == (3, 2)
        assert files(out) == untouched
        assert not (out / "parts").exists()
    assert at == 8  # two files written and renamed, three parts and their folder removed


def test_rejections_of_all_processes_are_counted(
    folder: Path, as_process: Callable[[int, int], None]
) -> None:
    manifest = small_work(folder)
    first, second, third, last = manifest.utterances
    everyone = []
    for rank in range(2):
        as_process(rank, 2)
        everyone.append(open_results(folder / "out", manifest))
    assert [one.rejected_so_far() for one in everyone] == [0, 0]
    everyone[0].append([(first, {})], [reject(second, "x")])
    everyone[1].append([], [reject(third, "y")])
    assert [one.rejected_so_far() for one in everyone] == [2, 2]
    everyone[1].append(
        [], [reject(last, "z"), reject(third, "y")]
    )  # the latter for the second time
    assert [one.rejected_so_far() for one in everyone] == [3, 3]
    as_process(0, 1)
    assert open_results(folder / "out", manifest).rejected_so_far() == 3


def test_two_runs_cannot_work_in_one_folder(folder: Path) -> None:
    manifest = small_work(folder)
    ready, tell = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        results = open_results(folder / "out", manifest)
        tell.send("ready")
        time.sleep(60)
        results.finish([], lambda: None)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    try:
        assert ready.recv() == "ready"
        with pytest.raises(ConfigError, match="another run is at work"):
            open_results(folder / "out", manifest)
    finally:
        process.kill()
        process.join()
    open_results(folder / "out", manifest)


def test_answers_to_an_edited_manifest_are_not_gone_on_with(tmp_path: Path) -> None:
    """They are kept by row number, which names another row once a row before it is gone."""
    make_corpus(tmp_path, 4)
    manifest = read_manifest(tmp_path / "zh-0.jsonl", Columns())
    results = open_results(tmp_path / "out", manifest)
    results.append([(manifest.utterances[0], {"heard": "x"})], [])
    open_results(tmp_path / "out", manifest)
    write_rows(tmp_path / "zh-0.jsonl", list(read_rows(tmp_path / "zh-0.jsonl")[1:]))
    edited = read_manifest(tmp_path / "zh-0.jsonl", Columns())
    with pytest.raises(ConfigError, match="other rows"):
        open_results(tmp_path / "out", edited)


def test_a_row_without_answer_is_never_called_done(tmp_path: Path) -> None:
    make_corpus(tmp_path, 3)
    manifest = read_manifest(tmp_path / "zh-0.jsonl", Columns())
    results = open_results(tmp_path / "out", manifest)
    results.append([(utterance, {}) for utterance in manifest.utterances[:2]], [])
    with pytest.raises(DataError, match="of 3 rows 2 are accounted for"):
        results.finish([], lambda: None)
