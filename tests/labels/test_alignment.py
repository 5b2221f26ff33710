"""Which part of a recording's reference belongs to each row, and when that is not known."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.labels.alignment import (
    PLACE_UNKNOWN,
    ReferencePart,
    reference_parts,
)

SCORER = Scorer(Metric())
ENGLISH = [
    "the weather in berlin was cold that winter and nobody came to see us",
    "she opened the window looked at the empty street and began to laugh",
    "for twenty years he had written letters to a brother whom he never met",
    "our train leaves at nine so we should be at the station before half past eight",
]
CHINESE = [
    "今天上午我們去圖書館借了三本關於歷史的書",
    "銀行離這裡不遠走路大概五分鐘就到了",
    "他說明年春天要搬到上海去住因為工作在那裡",
]


def parts(reference: str, texts: list[str], language: str | None) -> list[ReferencePart]:
    return reference_parts(reference, texts, language, SCORER)


def written(reference: str, texts: list[str], language: str | None) -> list[str | None]:
    return [part.text for part in parts(reference, texts, language)]


def test_parts_keep_the_writing_of_the_reference() -> None:
    reference = (
        "“The weather in Berlin was COLD that winter, and nobody came to see us.” “She opened the "
        "window, looked at the empty street — and began to laugh!” For 20 years, he'd written "
        "letters to a brother (whom he never met)."
    )
    assert written(reference, ENGLISH[:3], "en") == [
        "“The weather in Berlin was COLD that winter, and nobody came to see us.”",
        "“She opened the window, looked at the empty street — and began to laugh!”",
        "For 20 years, he'd written letters to a brother (whom he never met).",
    ]


def test_chinese_is_aligned_by_character_in_either_script() -> None:
    sentences = [
        "今天上午，我们去图书馆，借了三本关于历史的书。",
        "「银行离这里不远，走路大概五分钟就到了！」",
        "他说：明年春天要搬到上海去住，因为工作在那里。",
    ]
    assert written("".join(sentences), CHINESE, "zh") == sentences


def test_errors_near_a_cut_move_it_to_the_end_of_a_sentence() -> None:
    texts = [ENGLISH[0].replace("to see us", "to cease"), ENGLISH[1].replace("she", "he", 1)]
    reference = f"{ENGLISH[0].capitalize()}. {ENGLISH[1].capitalize()}."
    assert written(reference, texts, "en") == [
        f"{ENGLISH[0].capitalize()}.",
        f"{ENGLISH[1].capitalize()}.",
    ]


def test_a_foreign_paragraph_at_a_cut_leaves_both_sides_unknown() -> None:
    foreign = "once upon a time there lived an old king who was the father of seven daughters"
    reference = " ".join([ENGLISH[0], foreign, *ENGLISH[1:]])
    aligned = parts(reference, ENGLISH, "en")
    assert [part.text for part in aligned] == [None, None, *ENGLISH[2:]]
    assert aligned[0].reason == aligned[1].reason == PLACE_UNKNOWN


def test_a_foreign_beginning_and_end_leave_the_outer_rows_unknown() -> None:
    foreign = "chapter seven of the annual report which the committee never published"
    assert written(f"{foreign} {' '.join(ENGLISH)}", ENGLISH, "en") == [None, *ENGLISH[1:]]
    assert written(f"{' '.join(ENGLISH)} {foreign}", ENGLISH, "en") == [*ENGLISH[:-1], None]


def test_what_the_reference_lacks_is_not_given_to_a_neighbour() -> None:
    aligned = parts(" ".join([ENGLISH[0], *ENGLISH[2:]]), ENGLISH, "en")
    assert [part.text for part in aligned] == [None, None, None, ENGLISH[3]]
    short = parts(" ".join(ENGLISH[:2]), [ENGLISH[0], "yes I see", ENGLISH[1]], "en")
    assert [part.text for part in short] == [ENGLISH[0], "", ENGLISH[1]]
    assert short[1].reason is None


@pytest.mark.parametrize("reference", ["", " \n", "…!"])
def test_a_reference_without_words_has_none_for_any_text(reference: str) -> None:
    assert written(reference, ENGLISH, "en") == [""] * 4


def test_texts_of_another_recording_match_nothing() -> None:
    assert written(" ".join(reversed(CHINESE)), ENGLISH, "en") == [None] * 4


WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "nlrst"]
sentence_words = st.lists(st.sampled_from(WORDS), min_size=6, max_size=14)


def misrecognized(words: list[str], seed: int, rate: float) -> list[str]:
    """The words with some of them replaced, doubled or left out."""
    chance = random.Random(seed)
    result: list[str] = []
    for word in words:
        kind = chance.random() / rate
        result += [word] if kind >= 1 else [[], [chance.choice(WORDS)], [word, word]][int(3 * kind)]
    return result


@settings(max_examples=30, deadline=None)
@given(spoken=st.lists(sentence_words, min_size=1, max_size=6), seed=st.integers(0, 99))
def test_parts_together_are_the_reference(spoken: list[list[str]], seed: int) -> None:
    chance = random.Random(seed)
    sentence = [" ".join(words).capitalize() + chance.choice(".!?") for words in spoken]
    texts = [" ".join(misrecognized(words, seed, 0.1)) for words in spoken]
    aligned = written(" ".join(sentence), texts, "de")
    if None not in aligned:
        assert " ".join(aligned) == " ".join(sentence)  # type: ignore[arg-type]
    perfect = written(" ".join(sentence), [" ".join(words) for words in spoken], "de")
    assert None in perfect or perfect == sentence


@settings(max_examples=40, deadline=None)
@given(
    spoken=st.lists(sentence_words, min_size=3, max_size=8),
    place=st.integers(0, 100),
    length=st.integers(5, 60),
    lost=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_damaged_reference_gives_no_wrong_part_without_a_sign(
    spoken: list[list[str]], place: int, length: int, lost: bool, seed: int
) -> None:
    """Each row's part is its own sentence, or unknown, or its error rate shows the difference."""
    chance = random.Random(seed)
    words = [word for sentence in spoken for word in sentence]
    place %= len(words)
    # Words of another text, or a stretch of the reference that is missing.
    foreign = [chance.choice(WORDS).upper() + "x" for _ in range(0 if lost else length)]
    damaged = words[:place] + foreign + words[place + (length if lost else 0) :]
    texts = [" ".join(sentence) for sentence in spoken]
    aligned = parts(" ".join(damaged), texts, "de")
    end = 0
    for part, sentence, text in zip(aligned, spoken, texts, strict=True):
        begin, end = end, end + len(sentence)
        if part.text is not None and part.text != text:
            assert SCORER.count(part.text, text, "de").errors >= 1
        if end + 10 <= place or begin - 10 >= place + (length if lost else 0):
            assert part.text == text


def test_an_hour_is_aligned_in_seconds() -> None:
    chance = random.Random(0)
    words = [chance.choice(WORDS) + chance.choice(WORDS) for _ in range(10_000)]
    rows = [words[start : start + 80] for start in range(0, len(words), 80)]
    texts = [" ".join(misrecognized(row, number, 0.15)) for number, row in enumerate(rows)]
    began = time.process_time()
    aligned = parts(" ".join(words), texts, "en")
    assert time.process_time() - began < 5
    right = sum(part.text == " ".join(row) for part, row in zip(aligned, rows, strict=True))
    assert right > 60
    assert sum(part.text is None for part in aligned) < 10
