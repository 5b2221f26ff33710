"""Signs of invented text, with and without a reference."""

import pytest

from simpler_distil_whisper.evaluation.hallucination import KnownPhrases
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.evaluation.scoring import score_utterance

SCORER = Scorer(Metric())
NO_PHRASES = KnownPhrases([], SCORER)


def invented(reference: str | None, hypothesis: str, language: str) -> list[str]:
    phrases = KnownPhrases(["Thank you for watching!", "請訂閱"], SCORER)
    return score_utterance(SCORER, phrases, reference, hypothesis, language).phrases


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
        ("ha " * 12, "ha " * 12, "en", []),  # the reference repeats itself as often
        ("ha " * 12, "ha " * 13, "en", ["repetition"]),
        ("good morning all", "thank you for watching", "en", []),
        (None, "ha " * 11, "en", ["repetition"]),
        (None, "good morning", "en", []),
        (None, "", "en", []),
    ],
)
def test_signs(reference: str | None, hypothesis: str, language: str, signs: list[str]) -> None:
    scored = score_utterance(SCORER, NO_PHRASES, reference, hypothesis, language)
    assert sorted(scored.signs) == signs


def test_a_known_phrase_is_invented_only_where_the_reference_lacks_it() -> None:
    assert invented("bye", "Bye. Thank you, for watching", "en") == ["Thank you for watching!"]
    assert invented("thank you for watching", "thank you for watching", "en") == []
    phrases = KnownPhrases(["Thank you for watching!"], SCORER)
    scored = score_utterance(SCORER, phrases, None, "THANK YOU FOR WATCHING", "en")
    assert scored.signs == ["known_phrase"]
    # A phrase of a script with words must match whole words, one of Chinese can stand anywhere.
    assert invented(None, "thank you for watchingly", "en") == []
    assert invented("好", "好，請訂閱頻道", "zh") == ["請訂閱"]
    long = KnownPhrases(["請不吝點讚 訂閱"], SCORER)
    assert score_utterance(SCORER, long, None, "請不吝點讚訂閱轉發", "zh").signs == ["known_phrase"]


@pytest.mark.parametrize(
    ("language", "text", "seconds", "fast"),
    [("zh", "好" * 26, 1.0, True), ("zh", "好" * 24, 1.0, False), ("en", "a " * 9, 1.0, True)],
)
def test_nobody_speaks_so_fast(language: str, text: str, seconds: float, fast: bool) -> None:
    scored = score_utterance(SCORER, NO_PHRASES, text, text, language, seconds=seconds)
    assert ("speed" in scored.signs) == fast
    assert "speed" not in score_utterance(SCORER, NO_PHRASES, text, text, language).signs


@pytest.mark.parametrize(("probability", "silent"), [(0.9, True), (0.5, False), (None, False)])
def test_without_a_reference_the_decoder_recognizes_silence(
    probability: float | None, silent: bool
) -> None:
    def signs(reference: str | None) -> list[str]:
        return score_utterance(
            SCORER, NO_PHRASES, reference, "hm", "en", no_speech_probability=probability
        ).signs

    assert signs(None) == (["output_on_silence"] if silent else [])
    assert signs("hm") == []  # a reference counts for more than the decoder's probability
