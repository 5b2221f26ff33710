"""Rows of several systems matched by their ids."""

from pathlib import Path

import pytest
from tiny import write_rows

from simpler_distil_whisper.evaluation.hypotheses import (
    ExaminedSystem,
    Hypotheses,
    HypothesisColumns,
    SystemSpeed,
    match_systems,
    usable_rows,
)
from simpler_distil_whisper.run import DataError


def test_only_the_systems_that_lack_an_utterance_are_named(tmp_path: Path) -> None:
    ids = {"first": "abc", "second": "ab", "third": "ac"}
    systems = []
    for name, letters in ids.items():
        rows = [{"id": letter, "text": "yes", "hypothesis": "no"} for letter in letters]
        systems.append(Hypotheses(name=name, path=write_rows(tmp_path / f"{name}.jsonl", rows)))
    matched = match_systems(systems, HypothesisColumns(), {})
    assert [list(system.lines) for system in matched] == [["a"], ["a"], ["a"]]
    assert [(row.system, row.id, row.reason) for system in matched for row in system.rejected] == [
        ("first", "b", 'no usable row with this id in "third"'),
        ("first", "c", 'no usable row with this id in "second"'),
        ("second", "b", 'no usable row with this id in "third"'),
        ("third", "c", 'no usable row with this id in "second"'),
    ]


def test_a_file_that_changes_under_an_evaluation_is_noticed(tmp_path: Path) -> None:
    rows = [{"id": letter, "text": letter, "hypothesis": letter} for letter in "ab"]
    path = write_rows(tmp_path / "a.jsonl", rows)
    [system] = match_systems([Hypotheses(name="a", path=path)], HypothesisColumns(), {})
    assert [utterance_id for utterance_id, _ in usable_rows(system)] == ["a", "b"]
    write_rows(path, rows[::-1])
    with pytest.raises(DataError, match="has changed while it was read"):
        list(usable_rows(system))


@pytest.mark.parametrize(
    "content", ['{"rtfx": "fast"}', '{"rtfx": [1]}', '{"parameters": true}', "[]", "{", "[" * 9999]
)
def test_a_speed_that_cannot_be_read_costs_no_evaluation(tmp_path: Path, content: str) -> None:
    system = ExaminedSystem("a", tmp_path / "hypotheses.jsonl", (0, 0))
    (tmp_path / "speed.json").write_text(content, encoding="utf-8")
    assert system.read_speed() is None
    (tmp_path / "speed.json").write_text('{"rtfx": 2, "more": "x"}', encoding="utf-8")
    assert system.read_speed() == SystemSpeed(2, None, None)
