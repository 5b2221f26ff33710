"""What the baseline's rows tell of the utterances."""

from pathlib import Path
from typing import Any

import numpy as np
from tiny import write_rows

from simpler_distil_whisper.evaluation.facts import Facts, read_facts
from simpler_distil_whisper.evaluation.hypotheses import (
    Hypotheses,
    HypothesisColumns,
    match_systems,
)


def facts_of(folder: Path, *speakers: Any) -> Facts:
    rows = [
        {"id": str(number), "text": "yes", "hypothesis": "no", "speaker": speaker}
        for number, speaker in enumerate(speakers)
    ]
    systems = [Hypotheses(name="a", path=write_rows(folder / "a.jsonl", rows))]
    [baseline] = match_systems(systems, HypothesisColumns(), {})
    return read_facts(baseline, HypothesisColumns(), ["speaker"], "speaker")


def test_rows_without_a_speaker_are_one_group_and_no_block(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, "x", None, "", " ", 7, "x", ["語"])
    groups = [facts.group_values(position)["speaker"] for position in range(7)]
    assert groups == ["x", "unknown", "unknown", "unknown", "7", "x", '["語"]']
    blocks = [facts.block(position) for position in range(7)]
    assert blocks == ["x", None, None, None, "7", "x", '["語"]']


def test_blocks_are_counted_where_there_is_something_to_count(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, "x", "x", None, None, "y", "y", "z")
    assert facts.block_count(np.ones(7, bool)) == 5
    assert facts.block_count(np.array([1, 0, 1, 0, 0, 0, 1], bool)) == 3
