"""Normalisation: what is made equal in the copies of texts on which errors are counted.

Owns all that decides whether two texts count as the same. Texts that are written to files are never
normalised.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from simpler_distil_whisper.config import StrictModel
from simpler_distil_whisper.text.chinese import chinese_converter, is_chinese
from simpler_distil_whisper.text.languages import (
    HAN_AND_KANA,
    OTHER_UNSPACED,
    UNSPACED,
    code_or_none,
)
from simpler_distil_whisper.text.numerals import with_digits

Step = Callable[[str], str]

# Joiners, direction marks, soft hyphens, fillers, variation selectors and the other characters that
# Unicode has programs ignore: two texts that differ in these alone look the same. And the line by
# which Arabic words are drawn out. Not the zero-width space, which separates words.
INVISIBLE = re.compile(
    r"[\u00ad\u034f\u061c\u0640\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
THOUSANDS_SIGN = "\u066c"  # of Arabic
DIGIT_GROUPS = re.compile(rf"(?<!\d)\d{{1,3}}(?:[,{THOUSANDS_SIGN}]\d{{3}})+(?!\d)")
# Quotation marks, modifier letters, accents that stand alone and primes, as people type them, and
# the geresh of Hebrew.
APOSTROPHES = "'`\u00b4\u02b9\u02bb\u02bc\u055a\u05f3\u2018\u2019\u201b\u2032\uff07\uff40"
DECIMAL_SIGNS = ".,\u066b"
# Not brackets: Whisper's normalisers delete what stands in ASCII's.
FULL_WIDTH = {
    ord(c): ord(c) - 0xFEE0 for c in map(chr, range(0xFF01, 0xFF5F)) if c not in "（）［］＜＞｛｝"
}
PLAIN_APOSTROPHES = str.maketrans(dict.fromkeys(APOSTROPHES, "'"))
# What NFKC would make a comma between decimals of, although it may only group digits, and letters.
NO_DECIMAL_COMMAS = dict.fromkeys(map(ord, "，﹐︐"), THOUSANDS_SIGN)
NO_LETTERS = dict.fromkeys(map(ord, "™℠"), " ")
BEFORE_UNICODE_FORM = PLAIN_APOSTROPHES | NO_DECIMAL_COMMAS | NO_LETTERS
# NFKC would make periods of these, after Whisper's normalisers have looked for periods.
SMALL_SIGNS = {ord(c): unicodedata.normalize("NFKC", c) for c in "﹐﹒﹣﹩﹪․"}
PERIODS = re.compile(r"\.{2,}")  # Whisper's English normaliser would make "5 ." of "five..."
ELLIPSES = dict.fromkeys(map(ord, "…‥⋯︙"), " ")
# Not the tab and line ends, at which texts are split into words anyway.
CONTROLS = dict.fromkeys([*range(9), *range(14, 28), *range(127, 160), 0x200B], " ")
PLAIN_SIGNS = FULL_WIDTH | SMALL_SIGNS | ELLIPSES | CONTROLS | PLAIN_APOSTROPHES
# Of scripts with spaces around words. Korean is one: a filler can be a syllable of a word there.
SPACED_CHARACTER = rf"[^\s{HAN_AND_KANA}{OTHER_UNSPACED}]"
BESIDES_PUBLISHED = [r"\bkinda\b", r"\bsorta\b", r"\bdunno\b", r"\bcause\b"]


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
    chinese_script: Literal["auto", "simplified", "traditional"] | None = Field(
        default="auto",
        description='Compare Chinese in one script, converted by OpenCC. "auto": in Simplified, in '
        'rows whose language is Chinese, Cantonese or Hokkien. "simplified" and "traditional": in '
        "all rows but those in Japanese and Korean. null converts nothing.",
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
        "with spaces, anywhere in others. They are looked for after all other steps.",
    )
    numerals: bool = Field(
        default=False,
        description="Write numbers in Han characters, and the digits of all scripts, as 0-9, so "
        "that 二十三 is 23; before Whisper's normalisers.",
    )


def make_normalizer(options: TextNormalization) -> Callable[[str, str | None], str]:
    """Return the function that normalises one text, given the language it is in, if known.

    Our own steps are idempotent. Whisper's English normaliser, kept as published, is not: it turns
    "double oh seven" into "007", and that into "7".
    """
    if options.chinese_script is not None:
        in_own_script = make_normalizer(options.model_copy(update={"chinese_script": None}))
    own = _own_steps(options)
    before = [_with_plain_signs, *_conversions_alone(options), _without_unclosed_brackets]
    english, basic = [*before, _whisper_english], [*before, _whisper_basic]
    fillers = _filler_pattern(options)

    def normalize(text: str, language: str | None = None) -> str:
        if options.chinese_script and not _is_converted(options, language):
            return in_own_script(text, language)
        steps = own
        if options.whisper == "basic":
            steps = basic
        elif options.whisper == "english" or (options.whisper == "auto" and is_english(language)):
            steps = english
        text = _in_turn(steps, text)
        while fillers and (rest := fillers.sub(" ", text)) != text:
            # The rest can form another filler, or hold a sign that has lost its word.
            text = _in_turn(own if steps is own else [], rest)
        return text

    return normalize


def _is_converted(options: TextNormalization, language: str | None) -> bool:
    if options.chinese_script == "auto":
        return is_chinese(language)
    return language is None or code_or_none(language) not in ("ja", "ko")


def is_english(language: str | None) -> bool:
    """Return whether a name or code is that of English."""
    return language is not None and code_or_none(language) == "en"


def _in_turn(steps: Sequence[Step], text: str) -> str:
    for step in steps:
        text = step(text)
    return " ".join(text.split())


def _own_steps(options: TextNormalization) -> list[Step]:
    steps: list[Step] = []
    if options.remove_punctuation:
        # First of all: characters that an invisible one separates can compose once it is gone.
        steps.append(_with_signs_that_stay)
    form: list[Step] = []
    if options.unicode:
        form.append(functools.partial(unicodedata.normalize, options.unicode))
    steps += form
    if form and options.remove_punctuation:
        # Again, since a form makes such characters of some others: of ŉ an apostrophe and an n.
        steps += [_with_signs_that_stay, *form]
    if options.lowercase:
        steps += [str.lower, *form]
    script = _script_conversion(options)
    punctuation: list[Step] = [_without_punctuation] if options.remove_punctuation else []
    steps += script + punctuation
    if options.numerals:
        # Both again: OpenCC keeps the 干 of 一干 but not of 1干, and 百分之五 has become 5%.
        steps += [with_digits, *script, *punctuation]
    return steps


def _conversions_alone(options: TextNormalization) -> list[Step]:
    """Return the steps before Whisper's normalisers, with the Unicode form that they need."""
    conversions = _script_conversion(options)
    if options.numerals:
        conversions += [_with_joined_digits, with_digits]
    if conversions and options.unicode:
        conversions.insert(0, functools.partial(unicodedata.normalize, options.unicode))
    return conversions


def _script_conversion(options: TextNormalization) -> list[Step]:
    if options.chinese_script is None:
        return []
    script = "simplified" if options.chinese_script == "auto" else options.chinese_script
    return [chinese_converter(script)]


@functools.cache
def _whisper_normalizers() -> tuple[Step, Step]:
    # Imported here, because most runs need neither.
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    english = EnglishTextNormalizer()
    # The package adds these patterns to the published ones, which leave "cause" alone.
    for pattern in BESIDES_PUBLISHED:
        english.replacers.pop(pattern, None)
    return english, BasicTextNormalizer()


def is_blank(text: str) -> bool:
    """Return whether a text is empty, or holds nothing that can be seen."""
    return not INVISIBLE.sub("", text).translate(CONTROLS).strip()


def _with_signs_that_stay(text: str) -> str:
    """Return a text without invisible characters, whose signs no Unicode form makes others of."""
    return INVISIBLE.sub("", text).translate(BEFORE_UNICODE_FORM)


def _with_joined_digits(text: str) -> str:
    """Return a text with 1000 for 1,000."""
    return DIGIT_GROUPS.sub(lambda match: re.sub(r"\D", "", match[0]), text)


def _with_plain_signs(text: str) -> str:
    """Return a text as Whisper's normalisers expect it, which know only ASCII's apostrophe."""
    return PERIODS.sub(" ", INVISIBLE.sub("", text).translate(PLAIN_SIGNS))


def _without_unclosed_brackets(text: str) -> str:
    """Return a text whose brackets without an end are other signs, which are left out as they are.

    For each of them, Whisper's normalisers would look through all of the text behind it.
    """
    for opening, closing in (("<[", ">]"), ("(", ")")):
        end = 1 + max(map(text.rfind, closing))
        text = text[:end] + text[end:].translate(dict.fromkeys(map(ord, opening), "~"))
    return text


def _whisper_english(text: str) -> str:
    english, basic = _whisper_normalizers()
    try:
        return english(text)
    except AssertionError:  # a number with more digits than Python reads, from a loop
        return basic(text)


def _whisper_basic(text: str) -> str:
    return _whisper_normalizers()[1](text)


def _filler_pattern(options: TextNormalization) -> re.Pattern[str] | None:
    """Return a pattern of the fillers in a normalised text; None if there are none."""
    if not options.fillers:
        return None
    plain = make_normalizer(options.model_copy(update={"fillers": []}))
    # As they are in normalised rows: in English, in Chinese and in languages left as they are.
    languages = (None, "en", "zh", "ja")
    fillers = {plain(filler, language) for filler in options.fillers for language in languages}
    # The longest first: otherwise only the beginning of a longer filler would be removed.
    ordered = sorted(fillers - {""}, key=lambda filler: (-len(filler), filler))
    return re.compile("|".join(map(_whole_words, ordered))) if ordered else None


def _whole_words(filler: str) -> str:
    before = rf"(?<!{SPACED_CHARACTER})" if re.match(SPACED_CHARACTER, filler) else ""
    after = rf"(?!{SPACED_CHARACTER})" if re.match(SPACED_CHARACTER, filler[-1]) else ""
    return before + re.escape(filler) + after


class _PunctuationTable(dict[int, str]):
    """A table for `str.translate` that looks up each character's Unicode category once."""

    def __missing__(self, code_point: int) -> str:
        character = chr(code_point)
        if character in APOSTROPHES[0] + DECIMAL_SIGNS:
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
    text = _with_joined_digits(text).translate(PUNCTUATION_TO_SPACE)
    stray = _stray_signs()
    removed = 1
    while removed:  # removing one sign can leave the one before without its word
        text, removed = stray.subn(" ", text)
    return text


@functools.cache
def _stray_signs() -> re.Pattern[str]:
    """Return a pattern of apostrophes, decimal signs and combining marks that belong to no word."""
    marks = "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c)[0] == "M")
    letter = rf"[^\s'{DECIMAL_SIGNS}{UNSPACED}]"
    first = (
        rf"(?<!{letter})'|'(?!{letter})"
        rf"|(?<!\d)[{DECIMAL_SIGNS}]|[{DECIMAL_SIGNS}](?!\d)"
        rf"|(?<!\S)[{marks}]"
    )
    return re.compile(rf"(?:{first})['{DECIMAL_SIGNS}{marks}]*")  # what follows has no word either
