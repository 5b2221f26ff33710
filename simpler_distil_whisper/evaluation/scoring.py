"""The scores of one utterance of one system: errors in every unit, alignment, signs.

Owns what is counted of a pair of texts. It adds nothing up and reads no files.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from simpler_distil_whisper.data.jsonl import Row
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

CountsByUnit = dict[str, ErrorCounts]

HAN_OR_KANA = re.compile(rf"[{HAN_AND_KANA}]")
KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff]")
LATIN = re.compile(r"[a-z\u00c0-\u024f\u1e00-\u1eff]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ScoredUtterance:
    """What is counted of a hypothesis.

    Attributes:
        unit: what is counted, never "auto".
        counts: unit -> errors of the normalised texts, in the chosen unit, in "character" and in
            "word"; empty without a reference.
        raw: the same for the texts before normalisation.
        edits: the alignment in the chosen unit; without a reference every token is inserted.
        switched: for a reference in both scripts, the errors of its Han characters alone and of
            its Latin words alone.
        signs: signs of invented text.
        phrases: the known phrases that were invented.
    """

    unit: Unit
    counts: CountsByUnit
    raw: CountsByUnit
    edits: list[Edit]
    switched: tuple[ErrorCounts, ErrorCounts] | None
    signs: list[str]
    phrases: list[str]

    @property
    def chosen(self) -> ErrorCounts:
        """The errors in the chosen unit; all 0 without a reference."""
        return self.counts.get(self.unit, ErrorCounts())

    def as_row(self) -> Row:
        """Return the fields that `utterances.jsonl` has besides id, system and texts."""
        return {
            "unit": self.unit,
            "rate": self.chosen.rate,
            **{unit: asdict(counts) for unit, counts in self.counts.items()},
            "alignment": compact(self.edits, self.unit),
            "signs": self.signs,
        }


def score_utterance(
    scorer: Scorer,
    phrases: KnownPhrases,
    reference: str | None,
    hypothesis: str,
    language: str | None,
    *,
    seconds: float | None = None,
    no_speech_probability: float | None = None,
) -> ScoredUtterance:
    """Return what is counted of a hypothesis; both texts are given before normalisation.

    Args:
        scorer: normalises the texts and chooses the unit.
        phrases: the phrases known to be invented.
        reference: the human transcript; None where there is none.
        hypothesis: the system's text.
        language: decides unit and normalisation; None: the script decides.
        seconds: length of the audio, if known.
        no_speech_probability: the decoder's own, if known.
    """
    normalized_reference = None if reference is None else scorer.normalize(reference, language)
    normalized = scorer.normalize(hypothesis, language)
    unit = scorer.unit(normalized_reference, normalized, language)
    edits = align(normalized_reference or "", normalized, unit)
    counts: CountsByUnit = {}
    raw: CountsByUnit = {}
    switched = None
    if reference is not None and normalized_reference is not None:
        counts = _count_by_unit(normalized_reference, normalized, unit, edits)
        raw = _count_by_unit(reference, hypothesis, unit, align(reference, hypothesis, unit))
        switched = _count_by_script(normalized_reference, normalized)
    signs = signs_in(
        None if normalized_reference is None else tokens(normalized_reference, unit),
        tokens(normalized, unit),
        unit,
        counts.get(unit),
        seconds=seconds,
        no_speech_probability=no_speech_probability,
    )
    invented = phrases.invented(normalized_reference, normalized, language)
    if invented:
        signs.append("known_phrase")
    return ScoredUtterance(unit, counts, raw, edits, switched, signs, invented)


def compact(edits: Sequence[Edit], unit: Unit) -> list[list[str]]:
    """Return an alignment as [kind, reference text, hypothesis text] for each run of tokens."""
    separator = "" if unit == "character" else " "
    return [
        [edit.kind, separator.join(edit.reference), separator.join(edit.hypothesis)]
        for edit in edits
    ]


def _count_by_unit(
    reference: str, hypothesis: str, chosen: Unit, edits: Sequence[Edit]
) -> CountsByUnit:
    """Return the counts in characters, in words and in the chosen unit, given its alignment."""
    units: dict[Unit, None] = dict.fromkeys(("character", "word", chosen))
    return {
        unit: count_edits(edits) if unit == chosen else count_errors(reference, hypothesis, unit)
        for unit in units
    }


def _count_by_script(reference: str, hypothesis: str) -> tuple[ErrorCounts, ErrorCounts] | None:
    """Return the errors of the Han characters alone and of the Latin words alone.

    Each script is taken out of both texts and compared by itself, so that no alignment across
    scripts has to be divided. None unless the reference has both; None for Japanese.
    """
    both_scripts = HAN_OR_KANA.search(reference) and LATIN.search(reference)
    if not both_scripts or KANA.search(reference):
        return None
    texts = [tokens(text, "mixed") for text in (reference, hypothesis)]
    han = [" ".join(token for token in text if HAN_OR_KANA.match(token)) for text in texts]
    latin = [" ".join(token for token in text if LATIN.search(token)) for text in texts]
    return count_errors(han[0], han[1], "character"), count_errors(latin[0], latin[1], "word")
