"""Text that stands where audio or rows should: told by the first bytes of a file."""

import codecs

TEXT_BYTES = 400  # from which text is told from other bytes


def first_line(beginning: bytes) -> str | None:
    """Return the first line of a text, shortened; None if these bytes are no text."""
    encoding = "utf-16" if beginning[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8"
    decoder = codecs.getincrementaldecoder(encoding)()  # a character may be cut at the end
    try:
        text = decoder.decode(beginning).lstrip("\ufeff")
    except UnicodeDecodeError:
        return None
    if not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    return text.strip().partition("\n")[0].strip()[:40] or None
