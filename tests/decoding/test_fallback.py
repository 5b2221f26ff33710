"""Whether a hypothesis will do, and which of two is the better."""

import pytest

from simpler_distil_whisper.decoding.fallback import (
    fails,
    is_loop,
    is_silence,
    quality_of,
    repeats_too_much,
)
from simpler_distil_whisper.decoding.hypothesis import Hypothesis, compression_ratio
from simpler_distil_whisper.model.options import DecodingOptions

SHIPPED = DecodingOptions()
WORDS = "the cat sat on a mat and saw two dogs"


def hypothesis(
    text: str = WORDS, log_probability: float = -0.2, no_speech: float = 0.0
) -> Hypothesis:
    return Hypothesis(
        text=text,
        language="en",
        token_ids=(),
        segments=(),
        average_log_probability=log_probability,
        no_speech_probability=no_speech,
        compression_ratio=compression_ratio(text),
        temperature=0.0,
        complete=True,
    )


@pytest.mark.parametrize(
    "text",
    [
        "很" * 11,
        "他说 公司董事董事董事董事董事董事。",
        "團隊的目價心別的目價心別的目價心別",  # three copies of five
        "CN6.6.6.6.6.6.6.6.6.6.6.",
        "no " * 11,
        "Eat this meal, and have a meal, and have a meal, and have a meal.",
        "ครับ" * 3,
    ],
)
def test_a_repetition_of_more_than_ten_is_a_loop(text: str) -> None:
    options = DecodingOptions(compression_ratio_threshold=None)
    assert is_loop(hypothesis(text), options)
    never = DecodingOptions(compression_ratio_threshold=None, repetition_threshold=None)
    assert not is_loop(hypothesis(text), never)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "很" * 10,
        "no " * 10,
        "你叫什么名字?你叫什么名字?你",
        "ありがとうございます。ありがとうございます。",
        "I don't know what you mean. I don't know what you mean.",
        "这个 very very very very good",
        "对,对,对,对,对,对,对",
        "他说...............对",
        "一共是1000000000000元",
    ],
)
def test_what_people_repeat_is_no_loop(text: str) -> None:
    assert not is_loop(hypothesis(text), SHIPPED)


def test_compression_shows_no_loop_of_a_short_text() -> None:
    short = hypothesis("目使為恒學士" + "時" * 12)
    assert short.compression_ratio < 2.4 and is_loop(short, SHIPPED)
    assert not is_loop(short, DecodingOptions(repetition_threshold=None))


def test_compression_shows_a_loop_with_variations() -> None:
    varied = hypothesis(" ".join(f"and then {number} times" for number in range(40)))
    assert varied.compression_ratio > 2.4 and is_loop(varied, SHIPPED)
    assert not is_loop(varied, DecodingOptions(compression_ratio_threshold=None))


@pytest.mark.parametrize(
    ("log_probability", "no_speech", "silence", "failed"),
    [
        (-0.9, 0.0, False, False),
        (-1.1, 0.0, False, True),
        (-1.1, 0.7, True, False),
        (-0.9, 0.7, False, False),
    ],
)
def test_improbable_text_fails_unless_it_is_silence_but_a_loop_always(
    log_probability: float, no_speech: float, silence: bool, failed: bool
) -> None:
    guess = hypothesis(log_probability=log_probability, no_speech=no_speech)
    assert (is_silence(guess, SHIPPED), fails(guess, SHIPPED)) == (silence, failed)
    loop = hypothesis("no " * 20, log_probability=log_probability, no_speech=no_speech)
    assert fails(loop, SHIPPED)


def test_the_better_of_two() -> None:
    best_first = [
        hypothesis(log_probability=-0.5),
        hypothesis(log_probability=-0.9),
        hypothesis(log_probability=-1.2),  # a guess
        hypothesis(log_probability=-3.0),
        hypothesis("no " * 20, log_probability=-0.1),  # a loop, however probable
    ]
    values = [quality_of(each, SHIPPED) for each in best_first]
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
    assert quality_of(hypothesis("no " * 99), SHIPPED) == values[-1], "loops are equal"


def test_the_last_word_of_an_unfinished_text_may_still_change() -> None:
    def repeats(text: str) -> bool:
        return repeats_too_much(text, SHIPPED, unfinished=True)

    assert not repeats("no " * 10 + "no")  # becomes "north"
    assert repeats("no " * 11 + "no")
    assert not repeats("很" * 11)
    assert repeats("很" * 12)
