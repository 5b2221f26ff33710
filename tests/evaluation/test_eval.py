"""The evaluation script as its user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripts
import soundfile
from conftest import REPOSITORY
from tiny import read_rows, write_rows

Row = dict[str, Any]

ROWS: list[Row] = [
    {"id": "a", "text": "她很擔心大兒子。", "hypothesis": "她很謝的大兒子", "language": "zh"},
    {"id": "b", "text": "Hello, big world!", "hypothesis": "hello word", "language": "en"},
    {"id": "c", "text": "你好", "hypothesis": "", "language": "zh-TW"},
    {"id": "d", "text": "", "hypothesis": "thank you", "language": "en"},
]
OLD_COLUMNS = ["id", "reference", "hypothesis", "language"]
NO_PAGE = {"html": False, "worst_utterances": 20, "embed_audio": False}


def config_for(folder: Path, *paths: Path, **keys: Any) -> Row:
    systems = [{"name": path.stem, "path": str(path)} for path in paths]
    shipped = json.loads((REPOSITORY / "eval.json").read_text(encoding="utf-8"))
    columns = {name: shipped["columns"][name] for name in OLD_COLUMNS}
    own = {"output_dir": str(folder / "out"), "hypotheses": systems, "columns": columns}
    return {**shipped, **own, "report": NO_PAGE, **keys}


def evaluate(folder: Path, config: Row, *flags: str) -> subprocess.CompletedProcess[str]:
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return scripts.run([str(REPOSITORY / "eval.py"), str(path), *flags], folder)


def summary_in(folder: Path) -> Row:
    return json.loads((folder / "out" / "summary.json").read_text(encoding="utf-8"))


def counts(part: Row) -> tuple[int, int, int, int, int, int]:
    names = ["hits", "substitutions", "deletions", "insertions", "reference_tokens", "utterances"]
    return tuple(part[name] for name in names)


def test_summary_of_one_system_by_hand(tmp_path: Path) -> None:
    done = evaluate(tmp_path, config_for(tmp_path, write_rows(tmp_path / "one.jsonl", [*ROWS])))
    assert done.returncode == 0, done.stderr
    system = summary_in(tmp_path)["systems"]["one"]
    # zh by character: 5 hits 2 subs, then 2 dels; en by word: 1 hit 1 sub 1 del, then 2 insertions.
    assert counts(system["corpus"]) == (6, 3, 3, 2, 12, 4)
    assert system["corpus"]["rate"] == 8 / 12
    assert system["corpus"]["low"] is None  # four utterances tell nothing about how they vary
    assert system["units"] == {"character": 2, "word": 2}
    # Words: "她很…" 1 sub, "hello big world" 1 hit 1 sub 1 del, "你好" 1 del, 2 insertions.
    assert counts(system["word"]) == (1, 2, 2, 2, 5, 4)
    # Characters: 5 hits 2 subs; "hellobigworld" to "helloword" 9 hits 4 dels; 2 dels; 8 insertions.
    assert counts(system["character"]) == (14, 2, 6, 8, 22, 4)
    # Raw: "。" is one deletion more, "Hello, big world!" to "hello word" is 2 subs and 1 deletion.
    assert counts(system["raw"]["corpus"]) == (5, 4, 4, 2, 13, 4)
    groups = system["groups"]["language"]
    assert list(groups) == ["en", "zh", "zh-TW"]
    assert counts(groups["en"]) == (1, 1, 1, 2, 3, 2)
    assert counts(groups["en"]["character"]) == (9, 0, 4, 8, 13, 2)
    assert (groups["zh-TW"]["rate"], groups["zh-TW"]["low"]) == (1.0, None)


def test_each_utterance_is_listed_with_its_counts_and_alignment(tmp_path: Path) -> None:
    rows = [*ROWS, {"id": 7, "text": "…", "hypothesis": "", "language": None}]
    evaluate(tmp_path, config_for(tmp_path, write_rows(tmp_path / "one.jsonl", rows)))
    utterances = {row["id"]: row for row in read_rows(tmp_path / "out" / "utterances.jsonl")}
    assert list(utterances) == ["a", "b", "c", "d", "7"]
    assert utterances["b"] == {
        "id": "b",
        "system": "one",
        "unit": "word",
        "rate": 2 / 3,
        "character": {"hits": 9, "substitutions": 0, "deletions": 4, "insertions": 0},
        "word": {"hits": 1, "substitutions": 1, "deletions": 1, "insertions": 0},
        "reference": "Hello, big world!",
        "hypothesis": "hello word",
        "alignment": utterances["b"]["alignment"],
        "signs": [],
    }
    # Of the normalised copies, in which Chinese is in one script.
    assert utterances["a"]["alignment"] == [
        ["equal", "她很", "她很"],
        ["substitute", "担心", "谢的"],
        ["equal", "大儿子", "大儿子"],
    ]
    assert utterances["c"]["alignment"] == [["delete", "你好", ""]]
    assert [utterances[key]["rate"] for key in ("a", "c", "d", "7")] == [2 / 7, 1.0, None, None]


def test_the_table_is_printed_and_written(tmp_path: Path) -> None:
    done = evaluate(tmp_path, config_for(tmp_path, write_rows(tmp_path / "one.jsonl", [*ROWS])))
    assert done.stdout == (tmp_path / "out" / "report.txt").read_text(encoding="utf-8")
    table = [line.split() for line in done.stdout.splitlines()]
    assert table[0][:5] == ["system", "group", "utterances", "CER", "WER"]
    assert table[1][:6] == ["one", "all", "4", "0.7273", "1.2000", "0.6667"]
    assert table[1][-3:] == ["3", "3", "2"]
    assert table[5][:6] == ["one", "language", "zh-TW", "1", "1.0000", "1.0000"]
    assert table[5][6:9] == ["1.0000", "-", "-"]
    assert str(tmp_path / "out") in done.stderr


def test_a_page_that_is_not_wanted_does_not_stay(tmp_path: Path) -> None:
    paths = [write_rows(tmp_path / "one.jsonl", ROWS)]
    page = tmp_path / "out" / "report.html"
    for html in (True, False):
        done = evaluate(tmp_path, config_for(tmp_path, *paths, report={**NO_PAGE, "html": html}))
        assert done.returncode == 0, done.stderr
        assert page.exists() == html


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(tmp_path: Path, closed: str) -> None:
    config = config_for(tmp_path, write_rows(tmp_path / "one.jsonl", ROWS))
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    command = f"{sys.executable} {REPOSITORY / 'eval.py'} config.json {closed}"
    assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == 0
    assert summary_in(tmp_path)["utterances"] == 4


def test_a_second_run_replaces_the_results_with_identical_ones(tmp_path: Path) -> None:
    config = config_for(tmp_path, write_rows(tmp_path / "one.jsonl", [*ROWS, "{"]))
    names = ["summary.json", "utterances.jsonl", "rejected.jsonl", "report.txt", "eval.json"]
    contents = []
    for _ in range(2):
        assert evaluate(tmp_path, config).returncode == 0
        contents.append([(tmp_path / "out" / name).read_bytes() for name in names])
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in contents[0][0]
    assert not list((tmp_path / "out").glob(".*"))
    again = evaluate(tmp_path, {**config, "seed": 1, "confidence": 0.5})
    assert again.returncode == 0, again.stderr
    assert summary_in(tmp_path)["confidence"] == 0.5


BAD_ROWS: list[tuple[Row | str, str]] = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "not a JSON object but list"),
    ("[1]", "not a JSON object but list"),
    (
        {"text": "x", "hypothesis": "x"},
        'no column "id" (columns.id; with null, rows are matched by line number)',
    ),
    ({"id": True, "text": "x", "hypothesis": "x"}, 'column "id" is not a string'),
    ({"id": "n", "text": 5, "hypothesis": "x"}, 'column "text" is not a string'),
    ({"id": "m", "hypothesis": "x"}, 'no column "text" (columns.reference)'),
    ({"id": "s", "text": "x", "hypothesis": 3}, 'column "hypothesis" is not a string'),
    ({"id": "t", "text": "x"}, 'no column "hypothesis"'),
    ('{"id": "u", "text": "\\ud800", "hypothesis": "x"}', "a lone surrogate"),
    ({**ROWS[0], "hypothesis": "別的"}, "its id stands in an earlier row"),
]


def test_no_bad_row_is_lost(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "one.jsonl", [*ROWS, *(row for row, _ in BAD_ROWS), ""])
    with path.open("ab") as file:
        file.write(b'{"id": "\xff"}\n')
    done = evaluate(tmp_path, config_for(tmp_path, path))
    assert done.returncode == 0, done.stderr
    rejected = read_rows(tmp_path / "out" / "rejected.jsonl")
    assert [row["place"] for row in rejected] == [
        *(f"{path}:{len(ROWS) + number}" for number in range(1, len(BAD_ROWS) + 1)),
        f"{path}:{len(ROWS) + len(BAD_ROWS) + 2}",
    ]
    for row, reason in zip(rejected, [*(why for _, why in BAD_ROWS), "not UTF-8"], strict=True):
        assert reason in row["reason"]
    system = summary_in(tmp_path)["systems"]["one"]
    assert system["corpus"]["utterances"] == len(ROWS)
    assert sum(system["rejected"].values()) == len(rejected)
    assert system["rejected"]["not a JSON object but list"] == 2
    assert "2 x not a JSON object but list, first at" in done.stderr
    assert "one: 2 rows rejected: not a JSON object but list." in done.stdout


def test_systems_are_compared_over_the_utterances_that_all_have(tmp_path: Path) -> None:
    second = [
        {**ROWS[3], "hypothesis": ""},
        {**ROWS[0], "hypothesis": ROWS[0]["text"]},
        {**ROWS[1], "text": "Another reference."},
        {**ROWS[0], "id": "only here"},
    ]
    first_path = write_rows(tmp_path / "first.jsonl", [*ROWS])
    second_path = write_rows(tmp_path / "second.jsonl", [*second])
    done = evaluate(tmp_path, config_for(tmp_path, first_path, second_path))
    assert done.returncode == 0, done.stderr
    first, other = (summary_in(tmp_path)["systems"][name] for name in ("first", "second"))
    assert counts(first["corpus"]) == (5, 2, 0, 2, 7, 2)
    assert counts(other["corpus"]) == (7, 0, 0, 0, 7, 2)
    rejected = read_rows(tmp_path / "out" / "rejected.jsonl")
    assert [(row["system"], row["id"], row["reason"]) for row in rejected] == [
        ("first", "b", 'no usable row with this id in "second"'),
        ("first", "c", 'no usable row with this id in "second"'),
        ("second", "b", "an earlier system has another reference for this id"),
        ("second", "only here", 'no usable row with this id in "first"'),
    ]


def test_without_an_id_column_systems_are_matched_by_line(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "first.jsonl", [ROWS[0], ROWS[1], ROWS[2]])
    second = write_rows(tmp_path / "second.jsonl", [ROWS[0], "{", ROWS[2]])
    columns = {"id": None, "reference": "text", "hypothesis": "hypothesis", "language": None}
    done = evaluate(tmp_path, config_for(tmp_path, first, second, columns=columns))
    assert done.returncode == 0, done.stderr
    ids = [(row["system"], row["id"]) for row in read_rows(tmp_path / "out" / "utterances.jsonl")]
    assert ids == [("first", "1"), ("first", "3"), ("second", "1"), ("second", "3")]


def test_mixed_unit_and_other_columns(tmp_path: Path) -> None:
    row = {"key": 3, "human": "我要 order", "machine": "我 older", "speaker": 5}
    path = write_rows(tmp_path / "one.jsonl", [row, {**row, "key": "4", "speaker": "五"}])
    columns = {"id": "key", "reference": "human", "hypothesis": "machine", "language": None}
    metric = {"unit": "mixed", "normalization": {}}
    config = config_for(tmp_path, path, columns=columns, metric=metric, group_by=["speaker"])
    done = evaluate(tmp_path, config)
    assert done.returncode == 0, done.stderr
    system = summary_in(tmp_path)["systems"]["one"]
    assert counts(system["corpus"]) == (2, 2, 2, 0, 6, 2)
    assert {value: counts(group) for value, group in system["groups"]["speaker"].items()} == {
        "5": (1, 1, 1, 0, 3, 1),
        "五": (1, 1, 1, 0, 3, 1),
    }
    assert "mixed" in read_rows(tmp_path / "out" / "utterances.jsonl")[0]


def many_rows(errors: int, speakers: int = 6) -> list[Row]:
    """Return 60 rows of ten words, the first so many of which have one word wrong."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return [
        {
            "id": str(number),
            "text": " ".join(words),
            "hypothesis": " ".join(["x", *words[1:]] if number < errors else words),
            "speaker": f"s{number % speakers}",
        }
        for number in range(60)
    ]


PLAIN = {"unit": "word", "normalization": {"whisper": None}}


def test_systems_are_compared_with_the_first(tmp_path: Path) -> None:
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", many_rows(errors))
        for name, errors in (("base", 30), ("good", 2), ("same", 30))
    ]
    columns = {"id": "id", "reference": "text", "hypothesis": "hypothesis", "language": None}
    keys = {"columns": columns, "metric": PLAIN, "group_by": []}
    done = evaluate(tmp_path, config_for(tmp_path, *paths, **keys))
    assert done.returncode == 0, done.stderr
    comparisons = summary_in(tmp_path)["comparisons"]
    assert list(comparisons) == ["good", "same"]
    good = comparisons["good"]
    assert good["baseline"] == "base"
    assert good["difference"] == pytest.approx(-28 / 600)
    assert good["low"] < -28 / 600 < good["high"] < 0
    assert good["p_value"] < 0.01
    assert (good["better"], good["worse"], good["equal"]) == (28 / 60, 0, 32 / 60)
    assert (comparisons["same"]["difference"], comparisons["same"]["p_value"]) == (0, 1)
    assert "good minus base: -0.0467 (-0.0" in done.stdout
    assert "better in 46.7% of the utterances, worse in 0.0%." in done.stdout


def test_blocks_make_intervals_as_wide_as_the_speakers_differ(tmp_path: Path) -> None:
    # All errors are those of six of the twelve speakers.
    path = write_rows(tmp_path / "one.jsonl", sorted(many_rows(30, 12), key=lambda row: row["id"]))
    rows = read_rows(path)
    for row in rows:
        wrong = int(row["speaker"][1:]) < 6
        row["hypothesis"] = row["text"].replace("one", "x") if wrong else row["text"]
    rows.append(rows[0] | {"id": "silence", "text": None, "speaker": "nobody"})
    path = write_rows(tmp_path / "one.jsonl", rows)
    columns = {"id": "id", "reference": "text", "hypothesis": "hypothesis", "language": None}
    widths = []
    for block in (None, "speaker"):
        keys = {"columns": columns, "metric": PLAIN, "group_by": []}
        keys |= {"bootstrap_block_column": block}
        assert evaluate(tmp_path, config_for(tmp_path, path, **keys)).returncode == 0
        corpus = summary_in(tmp_path)["systems"]["one"]["corpus"]
        assert corpus["rate"] == 0.05
        widths.append(corpus["high"] - corpus["low"])
        assert summary_in(tmp_path)["blocks"] == (12 if block else None)
    assert widths[1] > 1.7 * widths[0]


def test_rows_without_a_reference_are_searched_for_invented_text(tmp_path: Path) -> None:
    rows: list[Row | str] = [
        *ROWS,
        {"id": "e", "text": None, "hypothesis": "la " * 30, "language": "en"},
        {"id": "f", "text": None, "hypothesis": "Thank you for watching!", "language": "en"},
    ]
    path = write_rows(tmp_path / "one.jsonl", rows)
    keys = {"hallucination": {"phrases": ["thank you for watching"]}}
    done = evaluate(tmp_path, config_for(tmp_path, path, **keys))
    assert done.returncode == 0, done.stderr
    system = summary_in(tmp_path)["systems"]["one"]
    assert system["corpus"]["utterances"] == 4
    invented = system["hallucination"]
    assert (invented["utterances"], invented["without_reference"]) == (6, 2)
    assert invented["phrases"] == {"thank you for watching": 1}
    signs = {row["id"]: row["signs"] for row in read_rows(tmp_path / "out" / "utterances.jsonl")}
    assert signs["e"] == ["repetition"]
    assert signs["f"] == ["known_phrase"]
    assert signs["d"] == ["output_on_silence"]
    assert "one: 2 utterances have no reference." in done.stdout
    assert "3 utterances look invented: repetition 1, output on silence 1, known phrase 1" in (
        done.stdout
    )
    # Two systems of which none can be compared; another tool wrote probabilities as strings.
    other = [row | {"no_speech_probability": "0.9"} for row in read_rows(path)]
    paths = [path, write_rows(tmp_path / "two.jsonl", other)]
    columns = {"id": "id", "reference": None, "hypothesis": "hypothesis", "language": "language"}
    done = evaluate(tmp_path, config_for(tmp_path, *paths, columns=columns))
    assert done.returncode == 0, done.stderr
    summary = summary_in(tmp_path)
    assert summary["systems"]["one"]["corpus"]["rate"] is None
    assert summary["systems"]["one"]["hallucination"] == summary["systems"]["two"]["hallucination"]
    assert summary["comparisons"] == {}


def test_rows_without_speakers_are_scored_all_the_same(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "one.jsonl", [*ROWS])
    done = evaluate(tmp_path, config_for(tmp_path, path, columns={"speaker": "speaker"}))
    assert done.returncode == 0, done.stderr
    assert 'No row has a column "speaker"' in done.stderr
    assert "speaker" not in summary_in(tmp_path)["systems"]["one"]["groups"]


def test_ids_may_be_numbers(tmp_path: Path) -> None:
    rows = [{**row, "id": number + 0.0} for number, row in enumerate(ROWS)]
    done = evaluate(tmp_path, config_for(tmp_path, write_rows(tmp_path / "one.jsonl", rows)))
    assert done.returncode == 0, done.stderr
    assert summary_in(tmp_path)["systems"]["one"]["corpus"]["utterances"] == len(ROWS)


def test_what_is_known_of_an_utterance_is_read_from_the_first_system(tmp_path: Path) -> None:
    audio = tmp_path / "clip.wav"
    soundfile.write(audio, np.zeros(16_000 * 3), 16_000)
    rich = [{**row, "audio": "clip.wav", "city": "台北"} for row in ROWS]
    rich[0]["seconds"] = 11
    rich[1]["audio"] = "nowhere.wav"
    bare = [{key: row[key] for key in ("id", "text", "hypothesis")} for row in ROWS]
    paths = [write_rows(tmp_path / "rich.jsonl", rich), write_rows(tmp_path / "bare.jsonl", bare)]
    columns = {"audio": "audio", "duration_seconds": "seconds", "language": "language"}
    config = config_for(tmp_path, *paths, columns=columns, group_by=["city"])
    done = evaluate(tmp_path, config)
    assert done.returncode == 0, done.stderr
    systems = summary_in(tmp_path)["systems"]
    assert systems["rich"]["corpus"] == systems["bare"]["corpus"]
    assert systems["rich"]["units"] == systems["bare"]["units"]
    groups = systems["bare"]["groups"]
    assert groups["city"]["台北"]["utterances"] == 4
    lengths = {name: group["utterances"] for name, group in groups["audio length"].items()}
    assert lengths == {"2 to 5 s": 2, "10 to 20 s": 1}
    lengths = {name: group["utterances"] for name, group in groups["reference length"].items()}
    assert lengths == {"no token": 1, "1 to 5 tokens": 2, "6 to 10 tokens": 1}


def test_speed_and_size_are_read_beside_the_hypotheses(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "one.jsonl", [*ROWS])
    config = config_for(tmp_path, path, report={**NO_PAGE, "html": True})
    speed = {"rtfx": 12.5, "parameters": 1_960_000, "model_bytes": 4_000_000, "tokens": 7}
    contents = []
    for content in (json.dumps(speed), "["):
        (tmp_path / "speed.json").write_text(content)
        assert evaluate(tmp_path, config).returncode == 0
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        shown = [words in page for words in ("<td>12.5</td>", "1.96 M", "4 MB")]
        assert shown == [content != "["] * 3
        contents.append((tmp_path / "out" / "summary.json").read_bytes())
    assert contents[0] == contents[1]  # no figure of today's speed is in it


def page_data(folder: Path) -> Row:
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    return {**json.loads(match[1]), "page": page}


def test_the_page_shows_the_same_utterances_whatever_order_the_files_have(tmp_path: Path) -> None:
    first = [
        {**row, "audio": "clip.wav", "start_seconds": 0.5, "seconds": 1} for row in many_rows(0)
    ]
    first[7]["audio"] = "gone.wav"
    del first[5]["start_seconds"]
    second = [{**row} for row in many_rows(0)]
    second[7]["hypothesis"] = "x y z"
    second[9]["hypothesis"] = "x"
    second.reverse()
    soundfile.write(tmp_path / "clip.wav", np.zeros(32_000), 16_000)
    paths = [write_rows(tmp_path / f"{n}.jsonl", rows) for n, rows in (("a", first), ("b", second))]
    columns = {"language": None, "audio": "audio", "duration_seconds": "seconds"}
    keys: Row = {"columns": columns, "metric": PLAIN, "group_by": []}
    for embed in (True, False):
        keys["report"] = {"html": True, "worst_utterances": 2, "embed_audio": embed}
        done = evaluate(tmp_path, config_for(tmp_path, *paths, **keys))
        assert done.returncode == 0, done.stderr
        data = page_data(tmp_path)
        by_id = {row["id"]: row for row in data["utterances"]}
        assert len(by_id) == 60
        assert [system["errors"] for system in by_id["7"]["systems"]] == [0, 10]
        assert [system["errors"] for system in by_id["9"]["systems"]] == [0, 10]
        assert by_id["3"]["audio"] == "../clip.wav#t=0.5,1.5"
        assert by_id["5"]["audio"] == "../clip.wav#t=0,1"
        assert by_id["7"]["audio"] is None
        assert by_id["9"]["seconds"] == 1
        assert ("data:audio/mpeg;base64," in data["page"]) == embed
        cards = re.findall(r'<article class="row" id="u(\d+)">', data["page"])
        assert sorted(cards) == ["7", "9"]


def test_audio_of_more_than_a_minute_is_linked(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", np.zeros(61 * 16_000), 16_000)
    rows: list[Row] = [
        {**ROWS[0], "audio": "long.wav", "hypothesis": "quite another text"},
        {**ROWS[1], "audio": "long.wav", "seconds": 60, "hypothesis": "quite another text"},
    ]
    path = write_rows(tmp_path / "one.jsonl", rows)
    columns = {"audio": "audio", "duration_seconds": "seconds"}
    report = {"html": True, "worst_utterances": 2, "embed_audio": True}
    done = evaluate(tmp_path, config_for(tmp_path, path, columns=columns, report=report))
    assert done.returncode == 0, done.stderr
    page = page_data(tmp_path)["page"]
    sources = re.findall(r'<audio controls preload="none" src="([^",]+)', page)
    assert sorted(sources) == ["../long.wav", "data:audio/mpeg;base64"]


def test_a_transcript_cannot_change_the_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    path = write_rows(tmp_path / "one.jsonl", [{**ROWS[0], "hypothesis": evil}, *ROWS[1:]])
    report = {"html": True, "worst_utterances": 4, "embed_audio": True}
    done = evaluate(tmp_path, config_for(tmp_path, path, report=report))
    assert done.returncode == 0, done.stderr
    data = page_data(tmp_path)
    assert "<script>alert" not in data["page"]
    assert "<img" not in data["page"]
    assert data["utterances"][0]["systems"][0]["hypothesis"] == evil


@pytest.mark.parametrize("rows", [[], [{**ROWS[0], "text": 1}], ["nonsense", ""]])
def test_nothing_to_compare_is_a_data_error_that_writes_nothing(
    tmp_path: Path, rows: list[Row | str]
) -> None:
    path = write_rows(tmp_path / "one.jsonl", rows)
    done = evaluate(tmp_path, config_for(tmp_path, path))
    assert done.returncode == 3
    assert "No utterance can be compared" in done.stderr
    assert (f"{path}:1" if rows else "has no rows") in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_wrong_reference_column_is_refused_with_the_columns_that_exist(tmp_path: Path) -> None:
    columns = {"id": "id", "reference": "txt", "hypothesis": "hypothesis", "language": None}
    path = write_rows(tmp_path / "one.jsonl", [*ROWS])
    done = evaluate(tmp_path, config_for(tmp_path, path, columns=columns))
    assert done.returncode == 3
    assert '4 x no column "txt"' in done.stderr
    assert "columns found: hypothesis, id, language, text" in done.stderr


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"confidense": 0.9}, 'Did you mean "confidence"'),
        ({"confidence": 95}, "confidence"),
        ({"hypotheses": []}, "hypotheses"),
        ({"hypotheses": [{"name": "x", "path": "nowhere.jsonl"}]}, "nowhere.jsonl cannot be read"),
        ({"hypotheses": [{"name": "x", "path": "."}]}, ". cannot be read"),
        ({"hypotheses": [{"name": "x", "path": "p"}] * 2}, "stand twice: ['x']"),
        ({"metric": {"unit": "wer", "normalization": {}}}, "metric.unit"),
        ({"group_by": ["speaker"]}, 'has a column "speaker"; columns found: hypothesis, id'),
        ({"columns": {"language": "lang"}}, "columns.language: no row of"),
    ],
)
def test_a_config_error_has_exit_code_2_and_no_traceback(
    tmp_path: Path, keys: Row, message: str
) -> None:
    path = write_rows(tmp_path / "one.jsonl", [*ROWS])
    done = evaluate(tmp_path, config_for(tmp_path, path, **keys))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_check_does_no_work(tmp_path: Path) -> None:
    config = config_for(tmp_path, write_rows(tmp_path / "one.jsonl", [*ROWS, "{"]))
    done = evaluate(tmp_path, config, "--check")
    assert done.returncode == 0
    assert "1 of 5 rows rejected" in done.stderr
    assert "4 utterances to compare" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("seed", "code"), [(0, 0), ("zero", 2)])
def test_it_loads_neither_torch_nor_transformers(tmp_path: Path, seed: object, code: int) -> None:
    config = config_for(tmp_path, write_rows(tmp_path / "one.jsonl", [*ROWS]), seed=seed)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    program = (
        "import runpy, sys\n"
        "sys.argv = ['eval.py', 'config.json']\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(REPOSITORY / 'eval.py')!r}, run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    print(exit.code, {'torch', 'transformers'} & sys.modules.keys())\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == f"{code} set()", done.stderr


def test_the_shipped_config_names_every_key_and_runs(tmp_path: Path) -> None:
    (tmp_path / "outputs" / "inference").mkdir(parents=True)
    rows = [{**row, "audio": "none.wav", "speaker": "x"} for row in ROWS]
    write_rows(tmp_path / "outputs" / "inference" / "hypotheses.jsonl", rows)
    command = [str(REPOSITORY / "eval.py"), str(REPOSITORY / "eval.json")]
    done = scripts.run_afresh(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "took defaults" not in done.stderr
    copy = tmp_path / "outputs" / "eval" / "eval.json"
    assert copy.read_bytes() == (REPOSITORY / "eval.json").read_bytes()
