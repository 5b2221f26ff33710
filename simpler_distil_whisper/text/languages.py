"""Languages and scripts: names of languages, what an error rate counts, repetition, joining.

Owns what the package knows of languages. The "tokens" here are the characters or words that error
rates count, not a model's tokens.
"""

import difflib
import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

Unit = Literal["auto", "character", "word", "mixed"]
"""What an error rate counts; "auto" becomes "character" or "word" for each utterance."""

# The language tokens of large-v3; models before it have all of these but `yue`.
# fmt: off
WHISPER_LANGUAGES: dict[str, str] = {
    "en": "english", "zh": "chinese", "de": "german", "es": "spanish", "ru": "russian",
    "ko": "korean", "fr": "french", "ja": "japanese", "pt": "portuguese", "tr": "turkish",
    "pl": "polish", "ca": "catalan", "nl": "dutch", "ar": "arabic", "sv": "swedish",
    "it": "italian", "id": "indonesian", "hi": "hindi", "fi": "finnish", "vi": "vietnamese",
    "he": "hebrew", "uk": "ukrainian", "el": "greek", "ms": "malay", "cs": "czech",
    "ro": "romanian", "da": "danish", "hu": "hungarian", "ta": "tamil", "no": "norwegian",
    "th": "thai", "ur": "urdu", "hr": "croatian", "bg": "bulgarian", "lt": "lithuanian",
    "la": "latin", "mi": "maori", "ml": "malayalam", "cy": "welsh", "sk": "slovak",
    "te": "telugu", "fa": "persian", "lv": "latvian", "bn": "bengali", "sr": "serbian",
    "az": "azerbaijani", "sl": "slovenian", "kn": "kannada", "et": "estonian",
    "mk": "macedonian", "br": "breton", "eu": "basque", "is": "icelandic", "hy": "armenian",
    "ne": "nepali", "mn": "mongolian", "bs": "bosnian", "kk": "kazakh", "sq": "albanian",
    "sw": "swahili", "gl": "galician", "mr": "marathi", "pa": "punjabi", "si": "sinhala",
    "km": "khmer", "sn": "shona", "yo": "yoruba", "so": "somali", "af": "afrikaans",
    "oc": "occitan", "ka": "georgian", "be": "belarusian", "tg": "tajik", "sd": "sindhi",
    "gu": "gujarati", "am": "amharic", "yi": "yiddish", "lo": "lao", "uz": "uzbek",
    "fo": "faroese", "ht": "haitian creole", "ps": "pashto", "tk": "turkmen",
    "nn": "nynorsk", "mt": "maltese", "sa": "sanskrit", "lb": "luxembourgish",
    "my": "myanmar", "bo": "tibetan", "tl": "tagalog", "mg": "malagasy", "as": "assamese",
    "tt": "tatar", "haw": "hawaiian", "ln": "lingala", "ha": "hausa", "ba": "bashkir",
    "jw": "javanese", "su": "sundanese", "yue": "cantonese",
}
# fmt: on

# Other names -> Whisper's code: the first twelve are Whisper's own, the others are what data sets
# and the ISO 639 standards call the same languages.
# fmt: off
LANGUAGE_ALIASES: dict[str, str] = {
    "burmese": "my", "valencian": "ca", "flemish": "nl", "haitian": "ht", "castilian": "es",
    "letzeburgesch": "lb", "pushto": "ps", "panjabi": "pa", "moldavian": "ro",
    "moldovan": "ro", "sinhalese": "si", "mandarin": "zh",
    "cmn": "zh", "zho": "zh", "zh-yue": "yue", "simplified chinese": "zh",
    "traditional chinese": "zh", "mandarin chinese": "zh", "putonghua": "zh", "farsi": "fa",
    "jv": "jw", "iw": "he", "in": "id", "ji": "yi", "nb": "no", "fil": "tl", "filipino": "tl",
}
# fmt: on

HOKKIEN_NAMES = {
    "hokkien",
    "nan",
    "taiwanese",
    "minnan",
    "min nan",
    "min-nan",
    "southern min",
    "taigi",
    "tai-gi",
    "hoklo",
    "zh-min-nan",
    "taiwanese hokkien",
}

# Written without spaces between words, or (Korean) with spaces that even careful writers set
# differently: such languages are scored by character.
CHARACTER_LANGUAGES = {"zh", "yue", "ja", "ko", "th", "lo", "my", "km", "bo"}

# Inside a regular expression's brackets. Planes 2 and 3 hold nothing but Han characters.
HAN_AND_KANA = (
    r"\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3041-\u3096\u309d-\u309f"
    r"\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\uf900-\ufaff\uff66-\uff9f\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
OTHER_UNSPACED = (
    r"\u0e01-\u0e4e\u0e80-\u0ece\u0edc-\u0edf\u0f40-\u0fbc\u1000-\u103f\u1050-\u109d\u1780-\u17d3"
    r"\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa7f"
)
HANGUL = r"\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7fb"
UNSPACED = HAN_AND_KANA + OTHER_UNSPACED + HANGUL

NEVER_SPACED_SCRIPTS = HAN_AND_KANA + OTHER_UNSPACED

SPOKEN_PIECE = re.compile(rf"[{NEVER_SPACED_SCRIPTS}]|\d+|[^\s\d{NEVER_SPACED_SCRIPTS}]+")
MIXED_TOKEN = re.compile(rf"[{HAN_AND_KANA}]|[^\s{HAN_AND_KANA}]+")
UNSPACED_CHARACTER = re.compile(rf"[{UNSPACED}]")
SPACED_WORD = re.compile(rf"[^\W_{UNSPACED}]+")
# Korean, though counted by character, has spaces between words.
NEVER_SPACED = re.compile(rf"[{NEVER_SPACED_SCRIPTS}]")

LONGEST_NGRAM = 100  # tokens; loops of longer pieces are not looked for
CELLS_AT_ONCE = 1_000_000  # of its search: a few arrays of as many numbers


def is_hokkien(name: str) -> bool:
    """Return whether a code, a locale or an English name means Hokkien (Taiwanese, Min Nan)."""
    key = _name_key(name)
    return not HOKKIEN_NAMES.isdisjoint((key, key.split("-")[0]))


def _name_key(name: str) -> str:
    return " ".join(name.lower().replace("_", "-").split())


def whisper_language(name: str) -> str:
    """Return Whisper's code of a language given as a code, a locale or an English name.

    Raises:
        ValueError: Whisper has no such language; the message suggests what to write instead.
    """
    if is_hokkien(name):
        raise ValueError(
            f'"{name}": Whisper has no token for Hokkien (Taiwanese, Min Nan); use "zh", under '
            "which it learns and writes Hokkien in Han characters"
        )
    key = _name_key(name)
    base = key.split("-")[0]
    names = {
        **{english: code for code, english in WHISPER_LANGUAGES.items()},
        **{code: code for code in WHISPER_LANGUAGES},
        **LANGUAGE_ALIASES,
    }
    # "zh-TW", "pt_BR" and "zh-Hant-TW" name a language and a place or a script.
    for candidate in (key, "-".join(key.split("-")[:2]), base):
        if candidate in names:
            return names[candidate]
    near = difflib.get_close_matches(key, names, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else '; write a code such as "en" or "zh"'
    raise ValueError(f'"{name}" is no language that Whisper knows{hint}')


def without_spaces(text: str) -> str:
    """Return a text without any whitespace."""
    return "".join(text.split())


def tokens(text: str, unit: Unit) -> list[str]:
    """Return the characters or words of a text that an error rate in this unit counts.

    Args:
        text: the text, normalised or not.
        unit: "character": Unicode code points without whitespace; "word": what whitespace
            separates; "mixed": each Han character and kana by itself, all else by words.

    Raises:
        ValueError: the unit is "auto", which `unit_for` turns into one of the others.
    """
    if unit == "character":
        return list(without_spaces(text))
    if unit == "word":
        return text.split()
    if unit == "mixed":
        return MIXED_TOKEN.findall(text)
    raise ValueError(f'no text can be split by the unit "{unit}"')


def unit_for(language: str | None, text: str) -> Unit:
    """Return the unit that suits a language: "character" or "word".

    A word error rate of a language without spaces is all or nothing: one wrong character makes the
    whole sentence one wrong word.

    Args:
        language: a name or code; if it is None or unknown to Whisper, the script of `text` decides,
            and where that has neither letters nor digits it is "character".
        text: the reference.
    """
    code = code_or_none(language) if language else None
    if code:
        return "character" if code in CHARACTER_LANGUAGES else "word"
    # A whole word counts as much as one character: an English brand name must not outweigh the
    # Chinese sentence around it.
    unspaced, words = len(UNSPACED_CHARACTER.findall(text)), len(SPACED_WORD.findall(text))
    return "character" if unspaced >= words else "word"


def words_and_characters(text: str) -> list[str]:
    """Return what a text says in any script: words and numbers, or single characters.

    Characters stand alone in scripts that have no spaces between words.
    """
    return SPOKEN_PIECE.findall(text)


def longest_repetition(pieces: Sequence[str], copies: int = 2) -> int:
    """Return the length, in tokens, of the longest immediate repetition of an n-gram.

    "one two one two one two three" has "one two" three times in a row, which is 6 words; an
    incomplete last copy does not count. 0 if nothing stands at least `copies` times in a row.
    N-grams have up to `LONGEST_NGRAM` tokens, so that the time is proportional to the length of the
    text.
    """
    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(piece, len(numbers)) for piece in pieces])
    largest = min(LONGEST_NGRAM, len(codes) // copies)
    at_once = max(1, CELLS_AT_ONCE // max(len(codes), 1))
    firsts = range(1, largest + 1, at_once)
    return max(
        (_longest_of(codes, range(n, min(n + at_once, largest + 1)), copies) for n in firsts),
        default=0,
    )


def _longest_of(codes: np.ndarray, sizes: range, copies: int) -> int:
    """Return what `longest_repetition` does, for n-grams of these sizes."""
    n, places = np.array(sizes)[:, None], np.arange(len(codes))
    same = (places >= n) & (codes[places - n] == codes)  # as the token n places before
    before = np.maximum.accumulate(np.where(same, -1, places), axis=1)  # the last that is not
    # If m successive tokens each equal the token n places before, n + m tokens repeat.
    repeated = n + (places - before)
    return int((repeated // n * n).max(initial=0, where=repeated >= copies * n))


def join_texts(texts: Sequence[str]) -> str:
    """Return the texts one after the other, separated by a space unless their script has none.

    There is no space where both neighbours are characters of such a script or full-width signs. A
    space at the very beginning stays, because real Whispers predict one.
    """
    joined = ""
    for text in texts:
        if not joined.strip():
            joined = text.rstrip()
            continue
        following = text.strip()
        together = _never_spaced(reversed(joined)) and _never_spaced(following)
        joined = f"{joined}{'' if together else ' '}{following}".rstrip()
    return joined


def _never_spaced(characters: Iterable[str]) -> bool:
    """Return whether the first letter, digit or full-width sign is of a script without spaces."""
    for character in characters:
        if unicodedata.east_asian_width(character) in "WF" and not character.isalnum():
            return True
        if character.isalnum():
            return bool(NEVER_SPACED.match(character))
    return False


@functools.lru_cache(maxsize=1024)
def code_or_none(language: str) -> str | None:
    """Return Whisper's code of a language, or None if it knows no such language."""
    try:
        return whisper_language(language)
    except ValueError:
        return None
