"""The choice of the utterances that the report shows."""

from collections import Counter
from pathlib import Path

import pytest
from tiny import write_rows

from simpler_distil_whisper.evaluation import examples
from simpler_distil_whisper.evaluation.examples import Listing, ReportOptions, list_utterances
from simpler_distil_whisper.evaluation.facts import read_facts
from simpler_distil_whisper.evaluation.hypotheses import (
    Hypotheses,
    HypothesisColumns,
    match_systems,
)
from simpler_distil_whisper.evaluation.tallies import SystemScores

ERRORS = {"teacher": [5, 0, 0, 1, 4, 0], "student": [0, 3, 6, 1, 4, 0]}


def list_of(folder: Path, number: int) -> Listing:
    """Return what is shown of six utterances with these errors, `number` of them in each list."""
    rows = [{"id": letter, "text": "yes", "hypothesis": "no"} for letter in "abcdef"]
    systems = [Hypotheses(name=name, path=write_rows(folder / name, rows)) for name in ERRORS]
    columns = HypothesisColumns()
    matched = match_systems(systems, columns, {})
    texts = {"reference": "yes", "hypothesis": "no", "unit": "word", "rate": 1.0}
    lines = [{"id": row["id"], **texts, "alignment": [], "signs": []} for row in rows]
    scored = write_rows(folder / "utterances.jsonl", lines)
    scores = {}
    for name, errors in ERRORS.items():
        scores[name] = SystemScores(len(rows), Counter())
        scores[name].errors[:] = errors
        scores[name].offsets[:] = [
            number * len(scored.read_bytes()) // len(rows) for number in range(len(rows))
        ]
    facts = read_facts(matched[0], columns, [], None)
    options = ReportOptions(worst_utterances=number)
    return list_utterances(matched, scores, facts, columns, scored, options)


@pytest.mark.parametrize(
    ("most", "expected"), [(1, "ace"), (3, "ace"), (4, "abce"), (5, "abcde"), (10, "abcdef")]
)
def test_whatever_is_listed_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, expected: str
) -> None:
    """Three utterances are in lists; up to the page's limit, others with most errors are added."""
    monkeypatch.setattr(examples, "MOST_UTTERANCES", most)
    listing = list_of(tmp_path, 2)
    shown = [utterance.id for utterance in listing.utterances]
    assert shown == list(expected)
    worst = {name: [shown[index] for index in listing.worst[name]] for name in ERRORS}
    assert worst == {"teacher": ["a", "e"], "student": ["c", "e"]}
    assert [shown[index] for index in listing.different["student"]] == ["c", "a"]
