"""Text as it is compared: what is made equal in the copies that errors are counted on.

Owns everything that decides what counts as "the same text"; it never changes a text that is kept.
Called by `metrics.py`.
"""

import functools
import re
import unicodedata
import warnings
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.text import UNSPACED, UNSPACED_CHARACTER, code_or_none

Step = Callable[[str], str]

# Joiners, direction marks, soft hyphens and variation selectors: two texts that differ only in
# these look the same. Not the zero-width space, which separates words.
INVISIBLE = re.compile(
    r"[\u00ad\u034f\u061c\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
    r"\U000e0000-\U000e0fff]"
)
DIGIT_GROUP_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
APOSTROPHES = "'\u2018\u2019\u02bc"
DECIMAL_SIGNS = ".,\u066b"
HAN_NUMERALS = "〇零一二三四五六七八九十百千万萬亿億两兩廿卅壹贰貳叁參肆伍陆陸柒捌玖拾佰仟"
HAN_POINT = re.compile(rf"(?<=[{HAN_NUMERALS}])點(?=[{HAN_NUMERALS}])")


class TextNormalization(StrictModel):
    """What is made equal before texts are compared; the texts that are kept stay as they are."""

    unicode: Literal["NFC", "NFKC"] | None = Field(
        default="NFKC",
        description="Unicode form; NFKC also unifies full-width and half-width, null leaves all.",
    )
    lowercase: bool = Field(default=True, description="Compare without regard to case.")
    remove_punctuation: bool = Field(
        default=True,
        description="Turn punctuation and symbols (also % and currency signs) of every script into "
        "spaces, except apostrophes inside words and decimal signs between digits; 1,000 becomes "
        "1000; invisible characters go.",
    )
    chinese_script: Literal["simplified", "traditional"] | None = Field(
        default=None,
        description="Compare Chinese in one script, converted by OpenCC; null converts nothing "
        "(right for Hokkien and Cantonese written in Han characters).",
    )
    whisper: Literal["auto", "english", "basic"] | None = Field(
        default="auto",
        description="Whisper's published normalisers, in place of the three steps above: "
        '"english" and "basic" for all rows, to compare with published figures; "auto" the English '
        "one (numbers, contractions, American spelling) for rows in English, the three steps above "
        "for all others and where no language is named, since the basic one destroys the vowel "
        "signs of Thai and Indic scripts; null never.",
    )
    fillers: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description='Words and phrases to leave out, such as "um" or "嗯": whole words in scripts '
        "with spaces, anywhere in others. The last step.",
    )
    numerals: bool = Field(
        default=False,
        description="Write numbers in Han characters, and the digits of all scripts, as 0-9, so "
        "that 二十三 is 23.",
    )


def make_normalizer(options: TextNormalization) -> Callable[[str, str | None], str]:
    """Return the function that normalises one text, given the language it is in, if known.

    Its own steps change nothing when they are used again. Whisper's English normaliser is kept as
    published, and can: it reads "one oh one" as "101", but "1 0 1" as it is.
    """
    own = _own_steps(options)
    english = [*_conversions_alone(options), _whisper_english]
    basic = [*_conversions_alone(options), _whisper_basic]
    without_fillers = _filler_remover(options)

    def normalize(text: str, language: str | None = None) -> str:
        steps = own
        if options.whisper == "basic":
            steps = basic
        elif options.whisper == "english" or (options.whisper == "auto" and is_english(language)):
            steps = english
        for step in steps:
            text = step(text)
        return without_fillers(" ".join(text.split()))

    return normalize


def is_english(language: str | None) -> bool:
    """Return whether a name or code is that of English."""
    return language is not None and code_or_none(language) == "en"


def _own_steps(options: TextNormalization) -> list[Step]:
    steps: list[Step] = []
    if options.remove_punctuation:
        # Before all else, because what an invisible character keeps apart can compose.
        steps.append(functools.partial(INVISIBLE.sub, ""))
    if options.unicode:
        steps.append(functools.partial(unicodedata.normalize, options.unicode))
    if options.lowercase:
        steps.append(str.lower)
        if options.unicode:
            steps.append(functools.partial(unicodedata.normalize, options.unicode))
    steps += _conversions(options)
    if options.remove_punctuation:
        steps.append(_without_punctuation)
    return steps


def _conversions(options: TextNormalization) -> list[Step]:
    steps: list[Step] = []
    if options.chinese_script:
        steps.append(_chinese_converter(options.chinese_script))
    if options.numerals:
        steps.append(_with_digits)
    return steps


def _conversions_alone(options: TextNormalization) -> list[Step]:
    """Return the conversions with the Unicode form that they need; nothing where none is wanted."""
    conversions = _conversions(options)
    if not conversions or options.unicode is None:
        return conversions
    return [functools.partial(unicodedata.normalize, options.unicode), *conversions]


@functools.cache
def _whisper_normalizers() -> tuple[Step, Step]:
    # Here, because most runs need neither.
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer(), BasicTextNormalizer()


def _whisper_english(text: str) -> str:
    return _whisper_normalizers()[0](text)


def _whisper_basic(text: str) -> str:
    return _whisper_normalizers()[1](text)


def _filler_remover(options: TextNormalization) -> Step:
    """Return what takes the fillers out of a text whose words are one space apart."""
    if not options.fillers:
        return str
    plain = make_normalizer(options.model_copy(update={"fillers": []}))
    # As English rows have them and as others do.
    found = {plain(filler, language) for filler in options.fillers for language in (None, "en")}
    # The longest first, or its beginning would go alone.
    fillers = sorted(found - {""}, key=lambda filler: (-len(filler), filler))
    if not fillers:
        return str
    pattern = re.compile("|".join(map(_filler_pattern, fillers)))

    def remove(text: str) -> str:
        times = 1
        while times:  # what one leaves can be the words of another
            text, times = pattern.subn(" ", text)
            text = " ".join(text.split())
        return text

    return remove


def _filler_pattern(filler: str) -> str:
    escaped = re.escape(filler)
    return escaped if UNSPACED_CHARACTER.search(filler) else rf"(?<!\S){escaped}(?!\S)"


def _with_digits(text: str) -> str:
    """Return the text with numbers in Han characters, and all decimal digits, as 0-9."""
    import cn2an  # here, because few runs need it

    text = HAN_POINT.sub("点", text.translate(DIGITS)).replace("卅", "三十")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about 万一, which is no number and stays
        return str(cn2an.transform(text, "cn2an"))


def _chinese_converter(script: Literal["simplified", "traditional"]) -> Callable[[str], str]:
    import opencc  # here, because few runs need it

    converter = opencc.OpenCC("t2s" if script == "simplified" else "s2t")

    def convert(text: str) -> str:
        # Twice, because OpenCC goes from 薴 by way of 苧 to 苎.
        return str(converter.convert(converter.convert(text)))

    return convert


class _DigitTable(dict[int, str]):
    """A table for `str.translate` that makes the decimal digits of every script those of ASCII."""

    def __missing__(self, code_point: int) -> str:
        value = unicodedata.decimal(chr(code_point), None)
        self[code_point] = chr(code_point) if value is None else str(value)
        return self[code_point]


DIGITS = _DigitTable()


class _PunctuationTable(dict[int, str]):
    """A table for `str.translate` that looks up each character's Unicode category once."""

    def __missing__(self, code_point: int) -> str:
        character = chr(code_point)
        if character in APOSTROPHES:
            replacement = "'"
        elif character in DECIMAL_SIGNS:
            replacement = character
        else:
            category = unicodedata.category(character)
            # Me: circles and boxes around other characters. Cc, Cf: control characters.
            blank = category[0] in "PS" or category in ("Me", "Cc", "Cf")
            replacement = " " if blank else character
        self[code_point] = replacement
        return replacement


PUNCTUATION_TO_SPACE = _PunctuationTable()


def _without_punctuation(text: str) -> str:
    text = DIGIT_GROUP_COMMA.sub("", text.translate(PUNCTUATION_TO_SPACE))
    stray = _stray_signs()
    found = 1
    while found:  # one sign that goes can leave the next one without its word
        text, found = stray.subn(" ", text)
    return text


@functools.cache
def _stray_signs() -> re.Pattern[str]:
    """Return what finds apostrophes, decimal signs and combining marks that belong to no word."""
    marks = "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c)[0] == "M")
    letter = rf"[^\s'{DECIMAL_SIGNS}{UNSPACED}]"
    return re.compile(
        rf"(?<!{letter})'|'(?!{letter})"
        rf"|(?<!\d)[{DECIMAL_SIGNS}]|[{DECIMAL_SIGNS}](?!\d)"
        rf"|(?<!\S)[{marks}]+"
    )
