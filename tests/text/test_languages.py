"""Language names and tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpler_distil_whisper.text.languages import (
    LONGEST_NGRAM,
    WHISPER_LANGUAGES,
    join_texts,
    longest_repetition,
    tokens,
    unit_for,
    whisper_language,
    words_and_characters,
)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("zh", "zh"),
        ("mandarin", "zh"),
        ("Chinese", "zh"),
        ("zh-TW", "zh"),
        ("zh_CN", "zh"),
        ("zh-Hant-TW", "zh"),
        ("cmn", "zh"),
        ("zh-yue", "yue"),
        ("CANTONESE", "yue"),
        ("castilian", "es"),
        ("pt_BR", "pt"),
        ("haitian creole", "ht"),
        ("Burmese", "my"),
        ("en-US", "en"),
        ("jv", "jw"),
    ],
)
def test_language_names_and_locales_have_whispers_code(name: str, code: str) -> None:
    assert whisper_language(name) == code


def test_every_language_of_whisper_is_known_by_code_and_by_name() -> None:
    assert len(WHISPER_LANGUAGES) == 100
    for code, name in WHISPER_LANGUAGES.items():
        assert whisper_language(code) == whisper_language(name.title()) == code


def test_languages_are_those_of_transformers() -> None:
    whisper = pytest.importorskip("transformers.models.whisper.tokenization_whisper")
    assert whisper.LANGUAGES == WHISPER_LANGUAGES
    for name, code in whisper.TO_LANGUAGE_CODE.items():
        assert whisper_language(name) == code


@pytest.mark.parametrize("name", ["hokkien", "nan", "nan-TW", "Taiwanese", "minnan", "zh-min-nan"])
def test_hokkien_is_answered_with_the_token_to_use(name: str) -> None:
    with pytest.raises(ValueError, match='no token for Hokkien.*use "zh"'):
        whisper_language(name)


def test_a_misspelt_language_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match='"Englsh".*did you mean "english"'):
        whisper_language("Englsh")
    with pytest.raises(ValueError, match="no language that Whisper knows"):
        whisper_language("")


def test_tokens_of_each_unit() -> None:
    text = " 我要 order一個\u3000iPhone 15 \U00020000カー々ắx\n"
    assert tokens(text, "word") == ["我要", "order一個", "iPhone", "15", "\U00020000カー々ắx"]
    assert tokens(text, "mixed") == [
        *("我", "要", "order", "一", "個", "iPhone", "15", "\U00020000", "カ", "ー", "々", "ắx")
    ]
    assert tokens(" 好 a\u0301\t\U00020000", "character") == ["好", "a", "\u0301", "\U00020000"]
    with pytest.raises(ValueError, match="auto"):
        tokens(text, "auto")


@settings(deadline=None)
@given(st.text())
def test_every_unit_keeps_all_but_the_whitespace(text: str) -> None:
    dense = "".join(text.split())
    assert all("".join(tokens(text, unit)) == dense for unit in ("character", "word", "mixed"))


@pytest.mark.parametrize(
    ("language", "text", "unit"),
    [
        ("zh-TW", "hello", "character"),
        ("Cantonese", "", "character"),
        ("ja", "", "character"),
        ("ko", "", "character"),
        ("thai", "", "character"),
        ("lo", "", "character"),
        ("my", "", "character"),
        ("km", "", "character"),
        ("bo", "", "character"),
        ("en", "你好", "word"),
        ("vi", "", "word"),
        (None, "我要 order 一個 iPhone 15", "character"),
        (None, "I said 好 to them", "word"),
        (None, "かな カナ", "character"),
        (None, "안녕하세요", "character"),
        (None, "สวัสดี", "character"),
        (None, "ສະບາຍດີ", "character"),
        (None, "សួស្តី", "character"),
        (None, "မင်္ဂလာပါ", "character"),
        (None, "བཀྲ་ཤིས", "character"),
        (None, "\U00020000\U00020001", "character"),
        (None, "नमस्ते दुनिया", "word"),
        (None, "", "character"),
        ("nan", "食飯", "character"),
        ("nan", "tsia̍h pn̄g", "word"),
    ],
)
def test_unit_follows_the_language_and_else_the_script(
    language: str | None, text: str, unit: str
) -> None:
    assert unit_for(language, text) == unit


@pytest.mark.parametrize(
    ("text", "covered"),
    [
        ("", 0),
        ("a", 0),
        ("a b a", 0),  # a copy that does not follow at once is none
        ("a a", 2),
        ("a a a b b", 3),
        ("one two one two one two three", 6),
        ("x y z y z q", 4),
        ("a b a b a", 4),  # the last copy is not whole
        ("a b c a b c", 6),
        ("a a b a a b", 6),  # longer than the two in a row within
        (" ".join(["x"] * 50), 50),
        (" ".join(map(str, [*range(LONGEST_NGRAM)] * 2)), 2 * LONGEST_NGRAM),
        (" ".join(map(str, [*range(LONGEST_NGRAM + 1)] * 2)), 0),
    ],
)
def test_the_longest_repetition_by_hand(text: str, covered: int) -> None:
    assert longest_repetition(text.split()) == covered


@given(st.lists(st.sampled_from("abc"), max_size=24), st.integers(2, 4))
def test_the_longest_repetition_is_what_trying_everything_finds(
    pieces: list[str], fewest: int
) -> None:
    best = 0
    for start in range(len(pieces)):
        for n in range(1, len(pieces) // 2 + 1):
            copies = 1
            while (
                pieces[start + copies * n : start + (copies + 1) * n] == pieces[start : start + n]
            ):
                copies += 1
            if copies >= fewest and start + n <= len(pieces):
                best = max(best, copies * n)
    assert longest_repetition(pieces, fewest) == best


def test_the_longest_repetition_of_a_long_text() -> None:
    """Of hours; sizes are then looked for a few at a time."""
    pieces = [str(number) for number in range(60_000)]
    pieces[40_000:40_030] = ["so", "it", "goes"] * 10
    pieces[50_000:50_040] = pieces[50_040:50_080]
    assert longest_repetition(pieces) == 80
    assert longest_repetition(pieces, 3) == 30


def test_words_and_characters_of_any_script() -> None:
    assert words_and_characters("我買iPhone16 了 감사합니다 ครับ カナ don't") == [
        *"我買", "iPhone", "16", "了", "감사합니다", *"ครับ", *"カナ", "don't"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        ([], ""),
        (["  ", "", "你好"], "你好"),
        (["你好。", "再见"], "你好。再见"),
        (["你好!", "再见"], "你好!再见"),  # signs of half width tell nothing
        ([" Hello there.", " How are you?"], " Hello there. How are you?"),
        (["Hello", "there "], "Hello there"),
        (["我要 order", "好的"], "我要 order 好的"),
        (["我要 order。", "OK"], "我要 order。 OK"),
        (["房间是957", "88"], "房间是957 88"),
        (["안녕하세요", "네"], "안녕하세요 네"),  # Korean has spaces
        (["สวัสดี", "ครับ"], "สวัสดีครับ"),
        (["こんにちは", "ラーメン"], "こんにちはラーメン"),
        (["我要", "", "吃饭"], "我要吃饭"),
    ],
)
def test_texts_are_joined_as_their_script_is_written(texts: list[str], joined: str) -> None:
    assert join_texts(texts) == joined
