"""Self-contained HTML pages and Markdown, filled from templates.

Owns how numbers look on a page; the templates beside it own style, charts and words. It knows
nothing of what is reported.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import jinja2

from simpler_distil_whisper.text.languages import Unit, tokens

TEMPLATES = Path(__file__).parent / "templates"
LONGEST_RUN = 60  # tokens of one kind in a row that a page shows; report.js has the same


def render(template: str, **values: object) -> str:
    """Return a template filled with these values, each of them escaped."""
    return _environment().get_template(template).render(**values)


def stacks(alignment: Sequence[Sequence[str]], unit: Unit) -> Iterator[tuple[str, str, str]]:
    """Yield kind, reference token and hypothesis token of each pair in an alignment.

    Of a run longer than `LONGEST_RUN` tokens, such as a loop, only the beginning is yielded.
    """
    for kind, reference, hypothesis in alignment:
        pairs = list(zip_longest(tokens(reference, unit), tokens(hypothesis, unit), fillvalue=""))
        for reference_token, hypothesis_token in pairs[:LONGEST_RUN]:
            yield kind, reference_token, hypothesis_token
        more = len(pairs) - LONGEST_RUN
        if more > 0:
            rest = f"… {more} more"
            yield kind, rest if reference else "", rest if hypothesis else ""


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (count, percent, hours, number, cell):
        environment.filters[function.__name__] = function
    return environment


def cell(text: str) -> str:
    """Return a text for a cell of a Markdown table, with all markup escaped."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(text.split()))


def count(value: int) -> str:
    """Return 1234567 as "1 234 567", with spaces at which no line breaks."""
    return f"{value:,}".replace(",", "\u202f")


def percent(ratio: float | None, digits: int = 1) -> str:
    """Return 0.1234 as "12.3 %"; only 0 becomes 0 %, and nothing below 1 becomes 100 %."""
    if ratio is None:
        return "–"
    smallest = 10.0 ** -(digits + 2)
    if 0 < ratio < smallest:
        return f"< {smallest:.{digits}%}".replace("%", "\u202f%")
    shown = min(ratio, 1 - smallest) if ratio < 1 else ratio
    return f"{shown:.{digits}%}".replace("%", "\u202f%")


def hours(value: float | None) -> str:
    """Return a number of hours in hours, minutes or seconds, whichever suits its size."""
    if value is None:
        return "–"
    if value >= 100:
        return f"{count(round(value))}\u202fh"
    if value >= 1:
        return f"{value:.1f}\u202fh"
    seconds = round(value * 3600)
    if seconds >= 60:
        return f"{seconds // 60}\u202fmin {seconds % 60:02d}\u202fs"
    return f"{value * 3600:.1f}\u202fs"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with so many decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "\u2212")
