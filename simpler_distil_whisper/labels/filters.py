"""The filters of labels: which of them are not learnt from, by error rate or by evidence.

Owns the limits of what the teacher itself tells of a label, and the decision for one labelled row,
for packs and for training alike. The error rate and the evidence are written by
run_pseudo_labelling.py; what is done with a row that is dropped is up to the stage.
"""

from pydantic import Field

from simpler_distil_whisper.config import PositiveFloat, Ratio, StrictModel
from simpler_distil_whisper.data.jsonl import Row, is_number
from simpler_distil_whisper.evaluation.hallucination import MAX_NO_SPEECH_PROBABILITY
from simpler_distil_whisper.labels.rows import WHY_NO_REFERENCE

# Where openai/whisper decodes again, with a higher temperature.
MAX_COMPRESSION_RATIO = 2.4
MIN_AVERAGE_LOG_PROBABILITY = -1.0

NO_ERROR_RATE = "no error rate"
ABOVE_MAXIMUM = "error rate above maximum"
NO_SPEECH = "text where the reference has none"
UNUSABLE_EVIDENCE = "unusable evidence"
INCOMPLETE = "incomplete label"
BROKEN_CHARACTER = "\ufffd"  # in the text of tokens that are only some of a character's bytes


def why_dropped_by_error_rate(
    row: Row, column: str, maximum: float | None, *, required: bool = True
) -> tuple[str, str] | None:
    """Return why its error rate drops a row, as a kind to count and a reason; None: it stays.

    Args:
        row: a labelled row whose label is not empty.
        column: the key under which its error rate stands.
        maximum: the highest rate that stays; None keeps every row, even one without a rate.
        required: whether a row without a reference is dropped. One that has none only because its
            part of the recording's could not be found is dropped even so.
    """
    if maximum is None:
        return None
    rate = row.get(column)
    # Of no tokens there is no rate, but each token of the label is an error.
    if rate is None and row.get("reference_tokens") == 0:
        return NO_SPEECH, "the reference has no speech, but the label has text"
    if rate is None and (why := row.get(WHY_NO_REFERENCE)):
        return NO_ERROR_RATE, f"the label does not match the recording's reference: {why}"
    if rate is None and not required:
        return None
    if rate is None:
        return NO_ERROR_RATE, f'"{column}" is empty, so max_error_rate cannot hold'
    if not is_number(rate):
        return NO_ERROR_RATE, f'"{column}" is not a number: {rate!r}'
    if rate > maximum:
        return ABOVE_MAXIMUM, f'"{column}" is {rate}, above {maximum:g}'
    return None


class EvidenceLimits(StrictModel):
    """Labels beyond these limits are not used; rows without the column are not affected."""

    max_compression_ratio: PositiveFloat | None = Field(
        MAX_COMPRESSION_RATIO,
        description="Labels that compress better are loops and not used; null: all are used.",
    )
    min_average_log_probability: float | None = Field(
        MIN_AVERAGE_LOG_PROBABILITY,
        ge=-1000,
        le=0,
        description="Labels that the teacher thought less probable are not used; null: all are.",
    )
    max_no_speech_probability: Ratio | None = Field(
        MAX_NO_SPEECH_PROBABILITY,
        description="Labels of audio that is silence or noise with a higher probability are not "
        "used; null: all are.",
    )

    def why_dropped_by_evidence(self, row: Row) -> tuple[str, str] | None:
        """Return why the evidence drops a row, as a kind to count and a reason; None: it stays."""
        for column, limit, sign, kind in (
            ("compression_ratio", self.max_compression_ratio, 1, "a loop"),
            ("average_log_probability", self.min_average_log_probability, -1, "improbable label"),
            ("no_speech_probability", self.max_no_speech_probability, 1, "no speech"),
        ):
            value = row.get(column)
            if limit is None or value is None:
                continue
            if not is_number(value):
                return UNUSABLE_EVIDENCE, f'"{column}" is not a number: {value!r}'
            if sign * value > sign * limit:
                beyond = "above" if sign > 0 else "below"
                return kind, f'{kind}: "{column}" is {value:g}, {beyond} {limit:g}'
        return None


def is_cut_off(row: Row) -> bool:
    """Return whether the limit of tokens cut the label off, so that its end is not the speech's."""
    return row.get("complete") is False
