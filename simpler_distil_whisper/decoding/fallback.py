"""Whether a hypothesis will do, or is sampled again at a higher temperature.

Owns the rule, which is openai/whisper's but for short loops. It decodes nothing and needs no torch.
"""

from simpler_distil_whisper.decoding.hypothesis import Hypothesis
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.text.languages import longest_repetition, words_and_characters
from simpler_distil_whisper.text.normalization import (
    DECIMAL_SIGNS,
    TextNormalization,
    make_normalizer,
)

COPIES_OF_A_LOOP = 3  # people say a sentence twice

_without_signs = make_normalizer(TextNormalization(chinese_script=None, whisper=None))
_DECIMAL_SIGNS_TO_SPACES = dict.fromkeys(map(ord, DECIMAL_SIGNS), " ")


def fails(hypothesis: Hypothesis, options: DecodingOptions) -> bool:
    """Return whether to sample again: a loop, or improbable text although there is speech.

    A loop fails even where it would be silence. openai/whisper keeps it there if it is improbable,
    but how probable the whole of it is, nobody knows of a loop that was cut off.
    """
    guess = _is_improbable(hypothesis, options) and not is_silence(hypothesis, options)
    return guess or is_loop(hypothesis, options)


def is_silence(hypothesis: Hypothesis, options: DecodingOptions) -> bool:
    """Return whether there is no speech: that is probable, and the text is improbable."""
    limit, probability = options.no_speech_threshold, hypothesis.no_speech_probability
    if limit is None or probability is None or probability <= limit:
        return False
    return options.log_probability_threshold is None or _is_improbable(hypothesis, options)


def is_loop(hypothesis: Hypothesis, options: DecodingOptions) -> bool:
    """Return whether the text repeats itself.

    openai/whisper goes by compression alone, which shows long loops. The text of a few seconds
    hardly compresses even if half of it is one word, so its longest repetition is looked at too.
    """
    limit = options.compression_ratio_threshold
    compresses = limit is not None and hypothesis.compression_ratio > limit
    return compresses or repeats_too_much(hypothesis.text, options)


def repeats_too_much(text: str, options: DecodingOptions, *, unfinished: bool = False) -> bool:
    """Return whether a text has a long repetition, whatever its signs and case.

    If it is `unfinished`, what follows may still change its last word or character. More text makes
    no repetition shorter, so what repeats too much will do so at its end too.
    """
    limit = options.repetition_threshold
    if limit is None:
        return False
    pieces = words_and_characters(_without_signs(text, None).translate(_DECIMAL_SIGNS_TO_SPACES))
    return longest_repetition(pieces[:-1] if unfinished else pieces, COPIES_OF_A_LOOP) > limit


def quality_of(hypothesis: Hypothesis, options: DecodingOptions) -> tuple[bool, float]:
    """Return what is greater for the better of two hypotheses of the same audio.

    Any text is better than a loop, and of texts the more probable one; so what will do is better
    than what fails. Loops are all equal: the more of it, the more probable is each token.
    """
    loop = is_loop(hypothesis, options)
    return not loop, 0.0 if loop else hypothesis.average_log_probability


def _is_improbable(hypothesis: Hypothesis, options: DecodingOptions) -> bool:
    limit = options.log_probability_threshold
    return limit is not None and hypothesis.average_log_probability < limit
