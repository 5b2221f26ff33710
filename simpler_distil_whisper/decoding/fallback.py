"""Whether a hypothesis will do, or is sampled again at a higher temperature.

Owns the thresholds of openai/whisper and one that it lacks. It decodes nothing and needs no torch.
"""

from simpler_distil_whisper.decoding.hypothesis import Hypothesis
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.text.languages import longest_repetition, tokens, unit_for


def fails(hypothesis: Hypothesis, options: DecodingOptions) -> bool:
    """Return whether to sample again: a loop, or improbable text although there is speech."""
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
    ratio, length = options.compression_ratio_threshold, options.repetition_threshold
    if ratio is not None and hypothesis.compression_ratio > ratio:
        return True
    unit = unit_for(hypothesis.language, hypothesis.text)
    return length is not None and longest_repetition(tokens(hypothesis.text, unit)) > length


def quality_of(hypothesis: Hypothesis, options: DecodingOptions) -> tuple[bool, bool, float]:
    """Return what is greater for the better of two hypotheses of the same audio.

    One that will do is better than one that fails, and a guess better than a loop. Of two guesses
    the more probable one is the better, of two loops the one that repeats less: the longer a loop
    is, the more probable is its next token.
    """
    loop = is_loop(hypothesis, options)
    rest = -hypothesis.compression_ratio if loop else hypothesis.average_log_probability
    return not fails(hypothesis, options), not loop, rest


def _is_improbable(hypothesis: Hypothesis, options: DecodingOptions) -> bool:
    limit = options.log_probability_threshold
    return limit is not None and hypothesis.average_log_probability < limit
