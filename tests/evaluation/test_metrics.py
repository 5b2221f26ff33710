"""Error counts and intervals: by hand, by property, and against counts from outside the project."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rapidfuzz.distance import Levenshtein

from simpler_distil_whisper.evaluation.metrics import (
    ErrorCounts,
    Metric,
    Scorer,
    align,
    count_errors,
    total,
)
from simpler_distil_whisper.text.languages import Unit, tokens
from simpler_distil_whisper.text.normalization import TextNormalization

UNITS = st.sampled_from(["character", "word", "mixed"])
TEXTS = st.one_of(st.text(), st.text(alphabet="ab 好\u3000", max_size=30))
COUNTS = st.builds(ErrorCounts, *[st.integers(0, 50)] * 4)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "unit", "counts"),
    [
        ("", "", "character", (0, 0, 0, 0)),
        ("", "你好嗎", "character", (0, 0, 0, 3)),
        ("", "a b", "word", (0, 0, 0, 2)),
        ("你好嗎", "", "character", (0, 0, 3, 0)),
        ("你 好", "你好", "character", (2, 0, 0, 0)),
        ("你\u3000好 ", "你好嗎", "character", (2, 0, 0, 1)),
        ("她很擔心大兒子", "她很謝的大兒子", "character", (5, 2, 0, 0)),
        ("\U00020000好", "\U00020001好", "character", (1, 1, 0, 0)),
        ("the cat sat", "the cat  sat down", "word", (3, 0, 0, 1)),
        ("the cat sat", "a cat", "word", (1, 1, 1, 0)),
        ("Ａ b", "A b", "word", (1, 1, 0, 0)),
        ("我要 order 一個", "我要older一個", "mixed", (4, 1, 0, 0)),
    ],
)
def test_counts_by_hand(
    reference: str, hypothesis: str, unit: Unit, counts: tuple[int, int, int, int]
) -> None:
    assert count_errors(reference, hypothesis, unit) == ErrorCounts(*counts)


@settings(deadline=None)
@given(TEXTS, TEXTS, UNITS)
def test_counts_cover_both_texts(reference: str, hypothesis: str, unit: Unit) -> None:
    counts = count_errors(reference, hypothesis, unit)
    assert counts.reference_tokens == len(tokens(reference, unit))
    assert counts.hits + counts.substitutions + counts.insertions == len(tokens(hypothesis, unit))
    assert counts.errors == Levenshtein.distance(tokens(reference, unit), tokens(hypothesis, unit))
    assert (counts.errors == 0) == (tokens(reference, unit) == tokens(hypothesis, unit))


@settings(deadline=None)
@given(TEXTS, TEXTS, UNITS)
def test_an_alignment_replays_to_both_texts(reference: str, hypothesis: str, unit: Unit) -> None:
    edits = align(reference, hypothesis, unit)
    assert [t for edit in edits for t in edit.reference] == tokens(reference, unit)
    assert [t for edit in edits for t in edit.hypothesis] == tokens(hypothesis, unit)
    for edit in edits:
        assert (edit.kind == "equal") == (edit.reference == edit.hypothesis)
        if edit.kind == "substitute":
            assert len(edit.reference) == len(edit.hypothesis)


@settings(deadline=None)
@given(st.lists(COUNTS, max_size=6))
def test_counts_of_a_corpus_are_sums_and_its_rate_is_divided_once(
    counts: list[ErrorCounts],
) -> None:
    whole = sum(counts, ErrorCounts())
    assert total(counts) == total(Counter(counts)) == whole
    assert whole.errors == sum(count.errors for count in counts)
    reference_tokens = sum(count.reference_tokens for count in counts)
    assert whole.reference_tokens == reference_tokens
    assert whole.rate == (whole.errors / reference_tokens if reference_tokens else None)


def test_corpus_rate_is_no_mean_of_utterance_rates() -> None:
    long, short = ErrorCounts(hits=9, substitutions=1), ErrorCounts(substitutions=2)
    assert total([long, short]).rate == 3 / 12


def test_an_empty_reference_has_no_rate_but_its_insertions_count() -> None:
    empty = ErrorCounts(insertions=3)
    assert empty.rate is None
    assert ErrorCounts().rate is None
    assert total([empty, ErrorCounts(hits=10)]).rate == 0.3


def test_the_scorer_compares_normalised_copies_in_the_unit_of_the_language() -> None:
    scorer = Scorer(Metric())
    assert scorer.count("約。", "約", "zh") == ErrorCounts(hits=1)
    assert scorer.count("Hello, World!", "hello word", "en") == ErrorCounts(1, 1)
    assert scorer.count("I've 2 colours", "I have two colors", "en") == ErrorCounts(hits=4)
    assert scorer.count("I've 2 colours", "I have two colors", "de").errors == 4
    assert scorer.count("你好嗎？", "你 好", None) == ErrorCounts(hits=2, deletions=1)
    assert scorer.count("", "你好嗎", None) == ErrorCounts(insertions=3)
    assert scorer.count("…", "by the way", None) == ErrorCounts(insertions=8)
    assert scorer.count("", "by the way", "en") == ErrorCounts(insertions=3)
    words = Scorer(Metric(unit="word", normalization=TextNormalization(lowercase=False)))
    assert words.count("Hello 你好", "hello 你好", "zh") == ErrorCounts(1, 1)


def test_a_misspelt_unit_is_refused() -> None:
    with pytest.raises(ValidationError, match="unit"):
        Metric.model_validate({"unit": "wer"})


PAIR_FILES = ["sclite_generated", "sctk_testsuite", "jiwer_testsuite", "edge_cases"]


def read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def scored(pair: dict[str, Any]) -> ErrorCounts:
    reference, hypothesis = pair["ref"], pair["hyp"]
    if pair.get("char_spaces") == "kept":  # jiwer counts inner spaces as characters: we never do
        reference, hypothesis = (t.strip().replace(" ", "␣") for t in (reference, hypothesis))
    return count_errors(reference, hypothesis, "character" if pair["unit"] == "char" else "word")


def test_counts_are_the_oracles(wer_oracle: Path) -> None:
    determined = 0
    for pair in (pair for name in PAIR_FILES for pair in read(wer_oracle / f"{name}.jsonl")):
        counts = scored(pair)
        assert counts.errors == pair["edit_distance"], pair
        assert counts.reference_tokens == pair["ref_len"], pair
        if pair["split_unique"] and pair["min_edit_agrees"]:
            determined += 1
            expected = ErrorCounts(pair["hits"], pair["subs"], pair["dels"], pair["ins"])
            assert counts == expected, pair
    assert determined == 861


def test_corpus_totals_are_the_oracles(wer_oracle: Path) -> None:
    pairs = {p["id"]: p for name in PAIR_FILES for p in read(wer_oracle / f"{name}.jsonl")}
    corpora = list(read(wer_oracle / "corpus_level.jsonl"))
    assert len(corpora) == 25
    assert sum("empties" in corpus["id"] for corpus in corpora) == 2
    for corpus in corpora:
        members = [pairs[pair_id] for pair_id in corpus["pair_ids"]]
        counts = total(map(scored, members))
        assert counts.reference_tokens == corpus["ref_tokens"], corpus["id"]
        assert counts.errors == corpus["edit_distance"], corpus["id"]
        if all(pair["min_edit_agrees"] for pair in members):
            assert counts.rate == pytest.approx(corpus["error_rate"], abs=1e-9), corpus["id"]
