"""Subtitles: cues, their files, and the script that writes them."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from conftest import REPOSITORY, RunScript
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_corpus, make_model_folder, read_rows, write_rows, write_tone

from simpler_distil_whisper.decoding.subtitles import (
    LINE_CHARACTERS,
    Cue,
    FileNames,
    cues_of,
    srt,
    vtt,
    write_subtitles,
)


def segment(text: str, start: float, end: float | None, words: list[tuple] = ()) -> dict:
    row = {"start_seconds": start, "end_seconds": end, "text": text}
    if words:
        keys = ("word", "start", "end", "probability")
        row["words"] = [dict(zip(keys, (*word, 0.9), strict=True)) for word in words]
    return row


def spoken(text: str, start: float, seconds_per_word: float = 0.5) -> dict:
    """A segment whose words follow each other, each preceded by a space."""
    words, now = [], start
    for word in text.split():
        words.append((f" {word}", now, now + seconds_per_word))
        now += seconds_per_word
    return segment(f" {text}", start, now, words)


def test_both_formats_as_they_stand_in_a_file() -> None:
    segments = [segment(" One & <two>.", 0.0, 1.5), segment(" Three --> four.", 359_999.5, 360_001)]
    assert srt(cues_of(segments)) == (
        "1\n00:00:00,000 --> 00:00:01,500\nOne & <two>.\n\n"
        "2\n99:59:59,500 --> 100:00:01,000\nThree -> four.\n"
    )
    assert vtt(cues_of(segments)) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nOne &amp; &lt;two&gt;.\n\n"
        "99:59:59.500 --> 100:00:01.000\nThree --&gt; four.\n"
    )
    assert (srt([]), vtt([])) == ("", "WEBVTT\n")


def test_a_long_segment_is_split_at_its_words() -> None:
    text = (
        "the quick brown fox jumps over the lazy dog and then sleeps in the warm sun until noon "
        * 2
    )
    cues = cues_of([spoken(text.strip(), 2.0)])
    assert len(cues) == 3
    assert all(len(cue.lines) <= 2 for cue in cues)
    assert all(len(line) <= LINE_CHARACTERS for cue in cues for line in cue.lines)
    assert " ".join(line for cue in cues for line in cue.lines) == text.strip()
    first = len(" ".join(cues[0].lines).split())
    assert (cues[0].start, cues[0].end) == (2.0, 2.0 + 0.5 * first)
    assert cues[1].start == cues[0].end


def test_a_segment_without_words_is_one_cue_of_short_lines() -> None:
    [cue] = cues_of([segment(" word" * 40, 0.0, 20.0)])
    assert (cue.start, cue.end, len(cue.lines)) == (0.0, 20.0, 5)
    chinese = "我今天要去公園，" * 12
    [cue] = cues_of([segment(chinese, 0.0, 9.0)])
    assert "".join(cue.lines) == chinese
    assert all(len(line) <= LINE_CHARACTERS for line in cue.lines)
    assert not any(line.startswith("，") for line in cue.lines)
    long_word = "x" * 60
    assert cues_of([segment(f" a {long_word} b", 0.0, 1.0)])[0].lines == ("a", long_word, "b")


@pytest.mark.parametrize("before", range(30, 42))
@pytest.mark.parametrize("words", [[" kn", "owledge", " iP", "hone"], ["ที", "่", "น", "ี", "่"]])
def test_no_line_begins_within_a_word_or_with_a_vowel_sign(before: int, words: list[str]) -> None:
    """In scripts without spaces the words of a segment are tokens."""
    words = ["好"] * before + words
    timed = [(word, place * 0.2, place * 0.2 + 0.2) for place, word in enumerate(words)]
    cues = cues_of([segment("".join(words), 0.0, 9.0, timed)])
    lines = [line for cue in cues for line in cue.lines]
    assert "".join(lines).replace(" ", "") == "".join(words).replace(" ", "")
    assert all(len(line) <= LINE_CHARACTERS for line in lines)
    for line in lines:
        assert not line.startswith(("owledge", "hone"))
        assert not unicodedata.category(line[0]).startswith("M")


def test_a_text_never_breaks_a_cue_in_two() -> None:
    [cue] = cues_of([segment(" One\n\n2\r\n\u2028three", 0.0, 1.0), segment(" \n", 1.0, 2.0)])
    assert cue.lines == ("One 2 three",)
    arrows = srt(cues_of([segment("a --> b ---> c", 0.0, 1.0)]))
    assert arrows.count("-->") == 1, "that of the times"


times = st.floats(0, 100, allow_nan=False)
segments = st.lists(st.tuples(times, times, st.sampled_from(["a", " b c", "", "好"])), max_size=8)


@given(segments)
def test_cues_follow_each_other_whatever_the_times(rows: list[tuple[float, float, str]]) -> None:
    cues = cues_of([segment(text, start, end) for start, end, text in rows])
    assert len(cues) == sum(bool(text) for _, _, text in rows)
    now = 0.0
    for cue in cues:
        assert now <= cue.start < cue.end
        now = cue.end


def test_a_cue_ends_where_the_next_begins() -> None:
    cues = cues_of([segment("a", 0.0, 3.0), segment("b", 2.0, 4.0), segment("c", 1.0, 1.5)])
    assert [(cue.start, cue.end) for cue in cues[:2]] == [(0.0, 2.0), (2.0, 4.0)]
    assert cues[2].start == 4.0
    assert cues[0] == Cue(0.0, 2.0, ("a",))


def test_names_are_safe_and_each_is_another() -> None:
    ids = ["a", "a", "A", "a-2", "a/b", "a\\b", "..", "../../etc/passwd", ".hidden", "con", "-rf"]
    ids += [
        "電話 0001",
        "x" * 500,
        "x" * 500,
        "語" * 500,
        "",
        "\ud800",
        "e\u0301",
        "é",
        "a\nb",
        "NUL.x",
    ]
    names = FileNames()
    given = [names.new(id, number) for number, id in enumerate(ids, 1)]
    assert given[:5] == ["a", "a-2", "A-3", "a-2-2", "a_b"]
    assert given[11] == "電話 0001"
    assert len({name.casefold() for name in given}) == len(ids)
    for name in given:
        assert name and len(f".{name}.vtt.tmp".encode()) <= 255
        assert not set(name) & set('/\\:*?"<>|\n')
        assert not name.startswith((".", "-")) and not name.endswith((".", " "))
        assert name.lower().split(".")[0] not in ("con", "nul")
    again = FileNames()
    assert [again.new(id, number) for number, id in enumerate(ids, 1)] == given


def test_every_row_has_its_files(tmp_path: Path) -> None:
    """Also one without speech, one without an id, and one whose last segment has no end."""
    rows = [
        {"id": "a/b", "segments": [segment(" One.", 0.0, 1.0), segment(" Two.", 1.0, None)]},
        {"id": None, "segments": []},
        {"id": 7, "segments": [segment(" Three.", 0.0, 1.0)]},
    ]
    hypotheses = write_rows(tmp_path / "hypotheses.jsonl", rows)
    folder = write_subtitles(
        hypotheses, ["vtt"], "id", "segments", lambda row: 4.5, stop_if_asked=lambda: None
    )
    assert {path.name for path in folder.iterdir()} == {"a_b.vtt", "2.vtt", "7.vtt"}
    assert "00:00:01.000 --> 00:00:04.500\nTwo.\n" in (folder / "a_b.vtt").read_text()
    assert (folder / "2.vtt").read_text() == "WEBVTT\n"


def test_subtitles_without_times_are_refused(tmp_path: Path, run_script: RunScript) -> None:
    config = {"output_dir": "out", "model": {"path": "model"}, "data": {"manifest": "m.jsonl"}}
    done = run_script("offline_inference", config | {"subtitles": ["srt"]})
    assert done.returncode == 2
    assert "set decoding.timestamps or decoding.word_timestamps to true" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_files_of_a_run_and_of_one_that_was_stopped(
    tmp_path: Path, run_script: RunScript
) -> None:
    make_model_folder(tmp_path / "model", languages=["en", "zh"], talkative=True, seed=53)
    rows = read_rows(make_corpus(tmp_path, 6))
    write_tone(tmp_path / rows[2]["audio"], 5.5, seed=2)
    (tmp_path / rows[3]["audio"]).write_bytes(b"no audio")
    rows[1]["id"] = rows[0]["id"] = "call/1"
    del rows[4]["id"]
    write_rows(tmp_path / "m.jsonl", rows)
    config = {
        "output_dir": "out",
        "model": {"path": "model", "dtype": "float32"},
        "data": {"manifest": "m.jsonl", "max_bad_fraction": 0.5},
        "decoding": {"batch_size": 2, "max_new_tokens": 30, "long_form": "sequential"},
        "subtitles": ["srt", "vtt"],
    }
    config["decoding"] |= {"timestamps": True, "word_timestamps": True}
    done = run_script("offline_inference", config)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out/subtitles"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    stems = ["call_1", "call_1-2", "u2", "4", "u5"]
    assert set(whole) == {f"{stem}.{ending}" for stem in stems for ending in ("srt", "vtt")}
    for row, stem in zip(read_rows(tmp_path / "out/hypotheses.jsonl"), stems, strict=True):
        cues = cues_of(row["segments"])
        assert whole[f"{stem}.srt"] == srt(cues).encode()
        assert cues and row["segments"][0]["words"]
    # As if it had been killed after the first file, with another half-written.
    info = tmp_path / "out/run_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"outcome": "running"}))
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    (folder / ".u5.srt.tmp").write_bytes(b"1\n00:00")
    assert run_script("offline_inference", config).returncode == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "two.json").write_text(json.dumps(config | {"output_dir": "two"}))
    subprocess.run(
        [sys.executable, "-m", *command, str(REPOSITORY / "offline_inference.py"), "two.json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    two = tmp_path / "two/subtitles"
    assert {path.name: path.read_bytes() for path in two.iterdir()} == whole
