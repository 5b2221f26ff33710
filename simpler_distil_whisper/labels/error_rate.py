"""The filter by error rate: which pseudo-labels are too far from their references to learn from.

Owns the decision for one labelled row. The rate itself comes from run_pseudo_labelling.py; what is
done with a row that is dropped is up to the stage.
"""

from simpler_distil_whisper.data.jsonl import Row, is_number

NO_ERROR_RATE = "no error rate"
ABOVE_MAXIMUM = "error rate above maximum"
NO_SPEECH = "text where the reference has none"


def why_dropped(
    row: Row, column: str, maximum: float | None, *, required: bool = True
) -> tuple[str, str] | None:
    """Return why the filter drops a row, as a kind to count and a reason; None if it stays.

    Args:
        row: a labelled row whose label is not empty.
        column: the key under which its error rate stands.
        maximum: the highest rate that stays; None keeps every row, even one without a rate.
        required: whether a row without a rate is dropped.
    """
    if maximum is None:
        return None
    rate = row.get(column)
    # Of no tokens there is no rate, but each token of the label is an error.
    if rate is None and row.get("reference_tokens") == 0:
        return NO_SPEECH, "the reference has no speech, but the label has text"
    if rate is None and not required:
        return None
    if rate is None:
        return NO_ERROR_RATE, f'"{column}" is empty, so max_error_rate cannot hold'
    if not is_number(rate):
        return NO_ERROR_RATE, f'"{column}" is not a number: {rate!r}'
    if rate > maximum:
        return ABOVE_MAXIMUM, f'"{column}" is {rate}, above {maximum:g}'
    return None
