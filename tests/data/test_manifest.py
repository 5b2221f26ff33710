"""Manifests: every row is used or rejected with a reason, whatever it holds."""

import gzip
import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.manifest import Manifest, read_manifest
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.data.results import rejection_line
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
    (utterance,) = read(folder, json.dumps(row, ensure_ascii=False)).utterances
    assert (utterance.number, utterance.place, utterance.id) == (
        0,
        f"{folder / 'm.jsonl'}:1",
        "台-1",
    )
    assert utterance.audio == folder / CLIP
    assert (utterance.start_seconds, utterance.duration_seconds) == (1.0, 2.5)
    assert utterance.text == " 我 要 Order 2 杯咖啡。 "
    assert utterance.language == "zh"
    assert utterance.row == row


def test_a_row_may_lack_everything_but_its_audio(folder: Path) -> None:
    nothing = {"id": None, "text": None, "language": None, "start_seconds": None}
    for row in ({"audio": CLIP}, {"audio": CLIP, **nothing, "duration_seconds": None}):
        (utterance,) = read(folder, row).utterances
        assert utterance.id == utterance.place == f"{folder / 'm.jsonl'}:1"
        assert (utterance.text, utterance.language) == (None, None)
        assert (utterance.start_seconds, utterance.duration_seconds) == (0.0, None)


def test_columns_name_the_keys_of_the_rows(folder: Path) -> None:
    row = {"wav": CLIP, "label": "好", "audio": 3, "text": 4, "id": "x", "language": 5}
    columns = Columns(
        audio="wav", text="label", id=None, language=None, start_seconds=None, duration_seconds=None
    )
    (utterance,) = read_manifest(write(folder, row), columns).utterances
    assert (utterance.text, utterance.language, utterance.id) == ("好", None, utterance.place)


BAD_ROWS: list[tuple[object, str]] = [
    ('{"audio": "clip.wav"', "not JSON"),
    ("", ""),
    ("clip.wav", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('{"audio": "clip.wav", "n": ' + "9" * 301 + "}", "not JSON: a number of more than 300 digits"),
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
    (
        {"id": "n", "text": "好"},
        'no audio path under "audio" (columns.audio); the keys are id, text',
    ),
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
    ({**GOOD, "start_seconds": True}, '"start_seconds" is not a time in seconds: true'),
    ({**GOOD, "start_seconds": "1"}, '"start_seconds" is not a time in seconds: "1"'),
    ({**GOOD, "duration_seconds": -1}, '"duration_seconds" is not a time in seconds: -1'),
    ({**GOOD, "duration_seconds": 0}, '"duration_seconds" is 0'),
    ({**GOOD, "duration_seconds": 10**299}, '"duration_seconds" is not a time in seconds'),
    ({**GOOD, "duration_seconds": 1e300}, '"duration_seconds" is not a time in seconds'),
    ({**GOOD, "language": "klingon"}, '"klingon" is no language that Whisper knows'),
    ({**GOOD, "language": 7}, '"language" is not a string: 7'),
    ({**GOOD, "language": "taigi"}, 'use "zh"'),
    ({**GOOD, "language": "yue"}, 'the model has no token for the language "yue"'),
    (
        {**GOOD, "hypothesis": ""},
        "has ['hypothesis'] already, which the run would write: rename them",
    ),
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
    numbers = [row.number for row in (*manifest.utterances, *manifest.rejections)]
    assert sorted(numbers) == list(range(manifest.row_count))


def test_a_text_or_language_key_that_no_one_asked_for_rejects_nothing(folder: Path) -> None:
    assert read(folder, {**GOOD, "language": "yue", "hypothesis": "x"}).rejections == []


def test_blank_lines_byte_order_mark_and_windows_line_ends(folder: Path) -> None:
    path = folder / "m.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \t\n" + line + b"\n\n" + line)
    manifest = read_manifest(path, Columns())
    assert manifest.rejections == []
    assert [row.place for row in manifest.utterances] == [f"{path}:{n}" for n in (1, 4, 6)]
    assert [row.number for row in manifest.utterances] == [0, 1, 2]


def test_separators_of_unicode_end_no_row(folder: Path) -> None:
    text = "一\u2028二\u2029三\x85四\x1c五"
    (utterance,) = read(folder, json.dumps({**GOOD, "text": text}, ensure_ascii=False)).utterances
    assert utterance.text == text


@given(st.lists(st.sampled_from([GOOD, *(row for row, _ in BAD_ROWS), " "]), max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_rows_out_and_rows_rejected_are_the_rows_in(folder: Path, rows: list[object]) -> None:
    in_file = [row for row in rows if not isinstance(row, str) or row.strip()]
    if not in_file:
        with pytest.raises(DataError, match="has no rows"):
            read(folder, *rows)
        return
    manifest = read(folder, *rows)
    everything = sorted([*manifest.utterances, *manifest.rejections], key=lambda row: row.number)
    assert [row.number for row in everything] == list(range(len(in_file)))
    places = [int(row.place.rpartition(":")[2]) for row in everything]
    assert places == [
        number for number, row in enumerate(rows, 1) if not isinstance(row, str) or row.strip()
    ]


def test_a_long_list_is_not_deep(folder: Path) -> None:
    assert read(folder, {**GOOD, "words": [["好", 0.1]] * 500}).rejections == []


def test_a_path_is_sought_beside_the_manifest_then_in_the_working_directory(folder: Path) -> None:
    here = Path.cwd()
    (here / "only_here.wav").touch()
    (here / CLIP).touch()
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.wav").touch()
    names = [CLIP, "only_here.wav", "sub/deep.wav", str(here / CLIP), f"../elsewhere/{CLIP}"]
    manifest = read(folder, *({"audio": name} for name in names))
    paths = [utterance.audio for utterance in manifest.utterances]
    assert paths[0] == folder / CLIP
    assert paths[1].resolve() == here / "only_here.wav"
    assert paths[2] == folder / "sub" / "deep.wav"
    assert paths[3] == here / CLIP
    assert paths[4].resolve() == here / CLIP


def test_a_path_that_cannot_be_followed_does_not_lead_nowhere(folder: Path) -> None:
    """A folder that may not be entered is the usual reason, but root may enter them all."""
    (folder / "loop").symlink_to("loop")
    [rejection] = read(folder, {"audio": "loop/clip.wav"}).rejections
    assert rejection.reason == (
        '"loop/clip.wav" cannot be opened: Too many levels of symbolic links'
    )


def test_max_utterances_takes_the_first_rows_good_or_bad(folder: Path) -> None:
    manifest = read(folder, "", GOOD, "{", {**GOOD, "id": "u2"}, GOOD, "{", max_utterances=3)
    assert [row.id for row in manifest.utterances] == ["u1", "u2"]
    assert len(manifest.rejections) == 1
    assert read(folder, GOOD, max_utterances=9).row_count == 1


def test_rows_with_the_same_fault_take_one_line(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(folder, *[{"wav": CLIP, "id": "x"}] * 7, "{").check(0.1)
    _, first, second = str(caught.value).split("\n")
    assert first.endswith(
        'm.jsonl:1: no audio path under "audio" (columns.audio); the keys are wav, id '
        "(and 6 more such rows)"
    )
    assert "m.jsonl:8: not JSON" in second


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        ([GOOD, {**GOOD, "text": None}, {"audio": CLIP, "transcript": "好"}], "1 with a text"),
        ([{"audio": CLIP, "transcript": "好"}], "none with a text"),
    ],
)
def test_the_log_says_how_many_rows_have_a_text(
    folder: Path, caplog: pytest.LogCaptureFixture, rows: list[object], shown: str
) -> None:
    caplog.set_level("INFO")
    read(folder, *rows).check(0.1, count_texts=True)
    assert f'{len(rows)} rows, 0 unusable, {shown} under "text"' in caplog.text


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


ROWS = [GOOD] * 3
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(ROWS).encode(), "it is a JSON array; it must have one JSON object per line"),
        (json.dumps(ROWS, indent=2).encode(), "it is a JSON array"),
        (b"\xef\xbb\xbf" + json.dumps(ROWS).encode(), "it is a JSON array"),
        (f"[\n{LINES.replace('}', '},', 2)}]\n".encode(), "it is a JSON array"),
        (b"audio,text\nclip.wav,\xe5\xa5\xbd\n", "it is a table or other text; it must have one"),
        (gzip.compress(LINES.encode(), mtime=0), "it is compressed by gzip; unpack it"),
        (LINES.encode("utf-16"), "it is in UTF-16; save it as UTF-8"),
    ],
)
def test_a_manifest_in_another_format_is_named_not_judged_line_by_line(
    folder: Path, content: bytes, reason: str
) -> None:
    (folder / "m.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_manifest(folder / "m.jsonl", Columns()).check(0.1)
    assert str(caught.value).startswith(f"{folder / 'm.jsonl'}: {reason}")


@pytest.mark.parametrize("rows", [["# clips", {"audio": "0.wav"}], ["{", "{"], [b"\0\1"]])
def test_a_manifest_that_may_be_json_lines_is_judged_by_its_rows(
    folder: Path, rows: list[object]
) -> None:
    with pytest.raises(DataError, match=f"{len(rows)} unusable, data.max_bad_fraction is 1"):
        read(folder, *rows).check(1.0)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_a_manifest_that_cannot_be_opened_is_the_configs_mistake(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_manifest(folder / name, Columns())


# Only where a row stands is kept in memory.


def test_a_row_is_read_again_whenever_it_is_asked_for(folder: Path) -> None:
    rows = [{**GOOD, "id": f"第{n}句", "n": n} for n in range(9)]
    utterances = read(folder, "", *rows[:4], "{", *rows[4:]).utterances
    assert len(utterances) == 9
    assert [row.row for row in utterances] == rows
    assert [row.number for row in utterances] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert utterances[4].row == rows[4]
    assert utterances[-1].place == f"{folder / 'm.jsonl'}:11"
    assert [row.row for row in utterances[2:7:2]] == [rows[2], rows[4], rows[6]]
    assert utterances[9:] == []
    with pytest.raises(IndexError):
        utterances[9]
    elsewhere = pickle.loads(pickle.dumps(utterances))
    assert list(elsewhere) == list(utterances)


def test_a_million_rows_are_small(folder: Path) -> None:
    """Measured by what a worker process is sent; the rows themselves are 100 times as much."""
    row = {**GOOD, "text": "好" * 500}
    sizes = [len(pickle.dumps(read(folder, *[row] * n))) for n in (1000, 3000)]
    assert (sizes[1] - sizes[0]) / 2000 < 32


def test_a_file_that_is_gone_since_is_still_a_row(folder: Path) -> None:
    utterances = read(folder, GOOD, {**GOOD, "audio": "sub/x.wav"}).utterances
    (folder / CLIP).unlink()
    assert utterances[0].audio == folder / CLIP


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
    with pytest.raises(ConfigError, match="not a file on disk"):
        read_manifest(folder / "pipe", Columns())


def test_the_fingerprint_is_that_of_the_rows_used(folder: Path) -> None:
    rows = [GOOD, {**GOOD, "id": "u2"}, {**GOOD, "audio": "later.wav"}]
    prints = [
        read(folder, *rows).fingerprint,
        read(folder, *rows[:2]).fingerprint,
        read(folder, "", *rows[:2]).fingerprint,  # its places are others
        read(folder, rows[1], rows[0]).fingerprint,
    ]
    assert len(set(prints)) == 4
    assert read(folder, *rows, max_utterances=2).fingerprint == prints[1]
    (folder / "later.wav").touch()
    assert read(folder, *rows).fingerprint == prints[0]  # whatever files are there


def test_rows_do_not_wait_for_a_slow_file_system_one_after_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = os.path.exists

    def slowly_exists(path: str) -> bool:
        time.sleep(0.01)
        return exists(path)

    monkeypatch.setattr(os.path, "exists", slowly_exists)
    rows = [GOOD, {**GOOD, "audio": "nowhere.wav"}] * 300
    began = time.monotonic()
    manifest = read(folder, *rows)
    assert len(list(manifest.utterances)) == len(manifest.rejections) == 300
    assert time.monotonic() - began < 3  # one by one, 9 seconds
    assert [rejection.number for rejection in manifest.rejections] == list(range(1, 600, 2))
