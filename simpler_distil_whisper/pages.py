"""Reports for the eye: self-contained HTML pages and Markdown, filled from templates.

Owns how numbers look on a page; the templates beside it own style, charts and words. It knows
nothing of what is reported. Called by `label_quality.py`,
`report_page.py` and `model_card.py`.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import jinja2

from simpler_distil_whisper.text.languages import Unit, tokens

TEMPLATES = Path(__file__).parent / "templates"
LONGEST_RUN = 60  # tokens of one kind in a row that a page shows


def render(template: str, **values: object) -> str:
    """Return the page that a template makes of these values, each of them escaped."""
    return _environment().get_template(template).render(**values)


def stacks(alignment: Sequence[Sequence[str]], unit: Unit) -> Iterator[tuple[str, str, str]]:
    """Yield kind, reference token and hypothesis token of each place of an alignment.

    Of what goes on and on, such as a loop, the page shows the beginning.
    """
    for kind, reference, hypothesis in alignment:
        ours, theirs = tokens(reference, unit), tokens(hypothesis, unit)
        pairs = list(zip_longest(ours, theirs, fillvalue=""))
        for our, their in pairs[:LONGEST_RUN]:
            yield kind, our, their
        if (more := len(pairs) - LONGEST_RUN) > 0:
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
    filters = (count, percent, hours, number, cell)
    environment.filters |= {one.__name__: one for one in filters}
    return environment


def cell(text: str) -> str:
    """Return a text as it can stand in a table of Markdown, nothing in it being markup."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(text.split()))


def count(value: int) -> str:
    """Return 1234567 as "1 234 567", with spaces that do not break."""
    return f"{value:,}".replace(",", "\u202f")


def percent(ratio: float | None, digits: int = 1) -> str:
    """Return 0.1234 as "12.3 %"; what is little but not nothing does not look like nothing."""
    if ratio is None:
        return "–"
    least = 10.0 ** -(digits + 2)
    if 0 < ratio < least:
        return f"< {least:.{digits}%}".replace("%", "\u202f%")
    shown = min(ratio, 1 - least) if ratio < 1 else ratio
    return f"{shown:.{digits}%}".replace("%", "\u202f%")


def hours(value: float | None) -> str:
    """Return hours in the unit in which people would say them."""
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
    """Return a number with so many decimals, or a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "\u2212")
