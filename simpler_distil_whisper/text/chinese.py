"""Traditional and Simplified Chinese: which languages are Chinese, and conversion by OpenCC.

The same sentence can be written in either script, and a Whisper writes now one, now the other.
"""

import functools
from collections.abc import Callable
from typing import Literal

from simpler_distil_whisper.text.languages import code_or_none, is_hokkien

Script = Literal["simplified", "traditional", "taiwan", "hong_kong"]

# Not "t2s", which leaves the 著 of 看著 as it is in Taiwan.
OPENCC_CONFIGS: dict[Script, str] = {
    "simplified": "tw2s",
    "traditional": "s2t",
    "taiwan": "s2tw",
    "hong_kong": "s2hk",
}
CHINESE_CODES = ("zh", "yue")


def is_chinese(language: str | None) -> bool:
    """Return whether a language is Mandarin, Cantonese or Hokkien; not if none is named.

    A text alone does not tell: 驚 and 飛 are ordinary characters in Japanese, which conversion
    would change.
    """
    if language is None:
        return False
    return is_hokkien(language) or code_or_none(language) in CHINESE_CODES


@functools.cache
def chinese_converter(script: Script) -> Callable[[str], str]:
    """Return the function that writes a Chinese text in a script."""
    import opencc  # imported here, because not every run needs it

    converter = opencc.OpenCC(OPENCC_CONFIGS[script])

    def convert(text: str) -> str:
        # In parts, because OpenCC drops what follows a NUL. Twice, because it converts 薴 to 苧,
        # and 苧 to 苎.
        return "\0".join(converter.convert(converter.convert(part)) for part in text.split("\0"))

    return convert
