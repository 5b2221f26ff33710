"""What is counted of an utterance, by hand; the two scripts of a switched utterance."""

from simpler_distil_whisper.evaluation.hallucination import KnownPhrases
from simpler_distil_whisper.evaluation.metrics import ErrorCounts, Metric, Scorer
from simpler_distil_whisper.evaluation.scoring import ScoredUtterance, compact, score_utterance

SCORER = Scorer(Metric())
NO_PHRASES = KnownPhrases([], SCORER)


def scored(reference: str | None, hypothesis: str, language: str) -> ScoredUtterance:
    return score_utterance(SCORER, NO_PHRASES, reference, hypothesis, language)


def test_counts_of_an_utterance_by_hand() -> None:
    utterance = scored("Hello, big world!", "hello word", "en")
    assert utterance.unit == "word"
    assert utterance.chosen == utterance.counts["word"] == ErrorCounts(1, 1, 1)
    assert utterance.counts["character"] == ErrorCounts(9, 0, 4)
    assert utterance.raw["word"] == ErrorCounts(0, 2, 1)
    assert compact(utterance.edits, "word") == [
        ["equal", "hello", "hello"],
        *compact(utterance.edits, "word")[1:],
    ]
    assert utterance.switched is None


def test_without_a_reference_nothing_is_counted() -> None:
    utterance = scored(None, "hello", "en")
    assert (utterance.counts, utterance.raw, utterance.chosen) == ({}, {}, ErrorCounts())
    assert compact(utterance.edits, utterance.unit) == [["insert", "", "hello"]]


def test_each_script_of_a_switched_utterance_is_compared_by_itself() -> None:
    utterance = scored("我要 order 一個 iPhone", "我 older 一各 iphone 吧", "zh")
    # Han: 我要一個 to 我一各吧 is 2 hits, 要 deleted, 個 for 各, 吧 inserted: or two substitutions.
    han, latin = utterance.switched or (ErrorCounts(), ErrorCounts())
    assert (han.errors, han.reference_tokens) == (3, 4)
    assert latin == ErrorCounts(hits=1, substitutions=1)
    assert scored("我要吃飯", "我要 rice", "zh").switched is None
    assert scored("order it", "叫它", "en").switched is None
    assert scored("Kポップの曲", "Kポップの曲", "ja").switched is None
