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
    limit = options.compression_ratio_threshold
    compresses = limit is not None and hypothesis.compression_ratio > limit
    return compresses or repeats_too_much(hypothesis.text, hypothesis.language, options)


def repeats_too_much(
    text: str, language: str, options: DecodingOptions, *, unfinished: bool = False
) -> bool:
    """Return whether a repetition in a text is too long.

    If it is `unfinished`, what follows may still change its last word or character. More text makes
    no repetition shorter, so what repeats too much will do so at its end too.
    """
    if options.repetition_threshold is None:
        return False
    pieces = tokens(text, unit_for(language, text))
    return longest_repetition(pieces[:-1] if unfinished else pieces) > options.repetition_threshold


def quality_of(hypothesis: Hypothesis, options: DecodingOptions) -> tuple[bool, bool, float]:
    """Return what is greater for the better of two hypotheses of the same audio.

    One that will do is better than one that fails, and a guess better than a loop; of two guesses
    the more probable one is. Loops are all equal: the more of it, the more probable is each token.
    """
    loop = is_loop(hypothesis, options)
    probability = 0.0 if loop else hypothesis.average_log_probability
    return not fails(hypothesis, options), not loop, probability


def _is_improbable(hypothesis: Hypothesis, options: DecodingOptions) -> bool:
    limit = options.log_probability_threshold
    return limit is not None and hypothesis.average_log_probability < limit
