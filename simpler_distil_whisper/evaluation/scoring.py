"""One utterance of one system: its errors in every unit, its alignment, the signs it shows.

Owns what is counted of an utterance; adding up is `report.py`'s. Called by `eval.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from simpler_distil_whisper.evaluation.hallucination import KnownPhrases, signs_in
from simpler_distil_whisper.evaluation.metrics import (
    Edit,
    ErrorCounts,
    Scorer,
    align,
    count_edits,
    count_errors,
)
from simpler_distil_whisper.text.languages import HAN_AND_KANA, Unit, tokens

Counts = dict[str, ErrorCounts]

HAN_OR_KANA = re.compile(rf"[{HAN_AND_KANA}]")
KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff]")
LATIN = re.compile(r"[a-z\u00c0-\u024f\u1e00-\u1eff]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Scored:
    """An utterance as a system heard it.

    Attributes:
        unit: what is counted, never "auto".
        counts: errors by unit, of the normalised texts: the chosen unit, "character" and "word";
            empty without a reference.
        raw: the same of the texts as they are.
        edits: the alignment in the chosen unit; without a reference all of it is inserted.
        switched: for a reference in both scripts, the errors of its Han characters alone and of
            its Latin words alone.
        signs: signs of an invented text.
        phrases: the known phrases that were invented.
    """

    unit: Unit
    counts: Counts
    raw: Counts
    edits: list[Edit]
    switched: tuple[ErrorCounts, ErrorCounts] | None
    signs: list[str]
    phrases: list[str]

    @property
    def chosen(self) -> ErrorCounts:
        """Return the errors in the chosen unit; none at all without a reference."""
        return self.counts.get(self.unit, ErrorCounts())


def score(
    scorer: Scorer,
    phrases: KnownPhrases,
    reference: str | None,
    hypothesis: str,
    language: str | None,
    *,
    seconds: float | None = None,
    no_speech_probability: float | None = None,
) -> Scored:
    """Return what there is to count of an utterance, the texts given as they are.

    Args:
        scorer: normalises the texts and chooses the unit.
        phrases: the phrases known to be invented.
        reference: what was said; None where nobody has written it down.
        hypothesis: what the system heard.
        language: decides unit and normalisation; None lets the script decide.
        seconds: length of the audio, if known.
        no_speech_probability: the decoder's own, if known.
    """
    wanted = None if reference is None else scorer.normalize(reference, language)
    heard = scorer.normalize(hypothesis, language)
    unit = scorer.unit(wanted or "", heard, language)
    edits = align(wanted or "", heard, unit)
    counts: Counts = {}
    raw: Counts = {}
    switched = None
    if reference is not None and wanted is not None:
        counts = _counts(wanted, heard, unit, edits)
        raw = _counts(reference, hypothesis, unit, align(reference, hypothesis, unit))
        switched = _by_script(wanted, heard)
    signs = signs_in(
        None if wanted is None else tokens(wanted, unit),
        tokens(heard, unit),
        unit,
        counts.get(unit),
        seconds=seconds,
        no_speech_probability=no_speech_probability,
    )
    invented = phrases.invented(wanted, heard, language)
    signs += ["known_phrase"] if invented else []
    return Scored(unit, counts, raw, edits, switched, signs, invented)


def compact(edits: Sequence[Edit], unit: Unit) -> list[list[str]]:
    """Return an alignment as [kind, reference text, hypothesis text] for each run of tokens."""
    between = "" if unit == "character" else " "
    return [[e.kind, between.join(e.reference), between.join(e.hypothesis)] for e in edits]


def _counts(reference: str, hypothesis: str, unit: Unit, edits: list[Edit]) -> Counts:
    """Return the counts in characters, in words and, from its alignment, in the chosen unit."""
    counts = {"character": None, "word": None, unit: count_edits(edits)}
    return {
        name: known or count_errors(reference, hypothesis, name) for name, known in counts.items()
    }


def _by_script(reference: str, hypothesis: str) -> tuple[ErrorCounts, ErrorCounts] | None:
    """Return the errors of the Han characters alone and of the Latin words alone.

    Each script is taken out of both texts and compared by itself, so that no alignment across
    scripts has to be divided. None unless the reference has both, and for Japanese.
    """
    if not (HAN_OR_KANA.search(reference) and LATIN.search(reference)) or KANA.search(reference):
        return None
    texts = [tokens(text, "mixed") for text in (reference, hypothesis)]
    han = [" ".join(token for token in text if HAN_OR_KANA.match(token)) for text in texts]
    latin = [" ".join(token for token in text if LATIN.search(token)) for text in texts]
    return count_errors(han[0], han[1], "character"), count_errors(latin[0], latin[1], "word")
