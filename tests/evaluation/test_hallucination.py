"""Signs of invented text, and what the two scripts of a switched utterance make of it."""

import pytest

from simpler_distil_whisper.evaluation.hallucination import KnownPhrases
from simpler_distil_whisper.evaluation.metrics import ErrorCounts, Metric, Scorer
from simpler_distil_whisper.evaluation.scoring import Scored, compact, score

SCORER = Scorer(Metric())


def scored(reference: str | None, hypothesis: str, language: str | None = None) -> Scored:
    phrases = KnownPhrases(["Thank you for watching!", "請訂閱"], SCORER)
    return score(SCORER, phrases, reference, hypothesis, language)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "language", "signs"),
    [
        ("你好嗎", "你好吗", "zh", []),
        ("", "", "zh", []),
        ("", "字幕", "zh", ["output_on_silence"]),
        ("", "thank you for watching", "en", ["insertions", "length_ratio", "output_on_silence"]),
        ("yes", "yes sir", "en", []),  # one word more is a slip, however short the reference
        ("yes", "yes sir yes we can", "en", ["insertions", "length_ratio"]),
        ("我們走", "我們走" * 4, "zh", ["insertions", "length_ratio", "repetition"]),
        ("ha " * 12, "ha " * 12, "en", []),  # it was said so often
        ("ha " * 12, "ha " * 13, "en", ["repetition"]),
        ("good morning all", "thank you for watching", "en", []),
        (None, "ha " * 11, "en", ["repetition"]),
        (None, "good morning", "en", []),
        (None, "", "en", []),
    ],
)
def test_signs(reference: str | None, hypothesis: str, language: str, signs: list[str]) -> None:
    found = score(SCORER, KnownPhrases([], SCORER), reference, hypothesis, language).signs
    assert sorted(found) == signs


def test_a_known_phrase_is_invented_only_where_nobody_said_it() -> None:
    assert scored("bye", "Bye. Thank you, for watching", "en").phrases == [
        "Thank you for watching!"
    ]
    assert scored("thank you for watching", "thank you for watching", "en").phrases == []
    assert scored(None, "THANK YOU FOR WATCHING", "en").signs == ["known_phrase"]
    # A phrase of a script with words is found as whole words, one of Chinese anywhere.
    assert scored(None, "thank you for watchingly", "en").phrases == []
    assert scored("好", "好，請訂閱頻道", "zh").phrases == ["請訂閱"]


@pytest.mark.parametrize(
    ("language", "text", "seconds", "fast"),
    [("zh", "好" * 26, 1.0, True), ("zh", "好" * 24, 1.0, False), ("en", "a " * 9, 1.0, True)],
)
def test_nobody_speaks_so_fast(language: str, text: str, seconds: float, fast: bool) -> None:
    phrases = KnownPhrases([], SCORER)
    found = score(SCORER, phrases, text, text, language, seconds=seconds).signs
    assert ("speed" in found) == fast
    assert "speed" not in score(SCORER, phrases, text, text, language).signs


@pytest.mark.parametrize(("probability", "silent"), [(0.9, True), (0.5, False), (None, False)])
def test_without_a_reference_the_decoder_tells_silence(
    probability: float | None, silent: bool
) -> None:
    found = score(
        SCORER, KnownPhrases([], SCORER), None, "hm", "en", no_speech_probability=probability
    )
    assert found.signs == (["output_on_silence"] if silent else [])
    # With a reference its words count, whatever the decoder thought.
    said = score(
        SCORER, KnownPhrases([], SCORER), "hm", "hm", "en", no_speech_probability=probability
    )
    assert said.signs == []


def test_counts_of_an_utterance_by_hand() -> None:
    found = scored("Hello, big world!", "hello word", "en")
    assert found.unit == "word"
    assert found.chosen == found.counts["word"] == ErrorCounts(1, 1, 1)
    assert found.counts["character"] == ErrorCounts(9, 0, 4)
    assert found.raw["word"] == ErrorCounts(0, 2, 1)
    assert compact(found.edits, "word") == [
        ["equal", "hello", "hello"],
        *compact(found.edits, "word")[1:],
    ]
    assert found.switched is None


def test_without_a_reference_nothing_is_counted() -> None:
    found = scored(None, "hello", "en")
    assert (found.counts, found.raw, found.chosen) == ({}, {}, ErrorCounts())
    assert compact(found.edits, found.unit) == [["insert", "", "hello"]]


def test_each_script_of_a_switched_utterance_is_compared_by_itself() -> None:
    found = scored("我要 order 一個 iPhone", "我 older 一各 iphone 吧", "zh")
    # Han: 我要一個 to 我一各吧 is 2 hits, 要 deleted, 個 for 各, 吧 inserted: or two substitutions.
    han, latin = found.switched or (ErrorCounts(), ErrorCounts())
    assert (han.errors, han.reference_tokens) == (3, 4)
    assert latin == ErrorCounts(hits=1, substitutions=1)
    assert scored("我要吃飯", "我要 rice", "zh").switched is None
    assert scored("order it", "叫它", "en").switched is None
    assert scored("Kポップの曲", "Kポップの曲", "ja").switched is None
