"""Encoder states -> hypotheses with their evidence, for audio up to the model's window.

Owns the prompts, the languages and when to try again; `search.py` finds the tokens, and
`long_form.py` cuts longer audio into windows. It reads and writes no files. Called by labelling,
inference and validation.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.decoding.cached_decoder import CachedDecoder, DecoderCache
from simpler_distil_whisper.decoding.search import Found, Start, beam_search, read_prompts, sample
from simpler_distil_whisper.decoding.speculative import Assistant, Drafts
from simpler_distil_whisper.decoding.token_rules import TokenRules
from simpler_distil_whisper.model.devices import suitable_batch_size
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.whisper import TIME_STEP, Whisper


@dataclass(frozen=True)
class Segment:
    """What was said between two timestamps.

    Attributes:
        start_seconds: from the beginning of the audio.
        end_seconds: likewise; None where the model has not said it, so: to the end of the audio.
        text: without special tokens.
    """

    start_seconds: float
    end_seconds: float | None
    text: str


@dataclass(frozen=True)
class Hypothesis:
    """What the model heard in one utterance, and how sure it was.

    Attributes:
        text: without special tokens; with the space before the first word that real Whispers say,
            so that tokenising it gives the model's own tokens back.
        language: the code that was given or detected.
        token_ids: the tokens of the text and the timestamps, without the end token.
        segments: the sentences between the timestamps; none without timestamps.
        average_log_probability: of the tokens and the end token, natural logarithm.
        no_speech_probability: of `<|nospeech|>` as the first token; None if the model has none.
        compression_ratio: bytes of the text over its zlib-compressed bytes; loops score high.
        temperature: at which the tokens were drawn; 0: the most probable ones.
        complete: the model ended the text itself, not the limit `max_new_tokens`.
    """

    text: str
    language: str
    token_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    average_log_probability: float
    no_speech_probability: float | None
    compression_ratio: float
    temperature: float
    complete: bool

    @property
    def tokens(self) -> int:
        """How many tokens the model has said, without the end token."""
        return len(self.token_ids)

    def evidence(self) -> dict[str, object]:
        """Return what a row of results keeps beside the text, rounded to what is meaningful."""
        silence = self.no_speech_probability
        return {
            "average_log_probability": round(self.average_log_probability, 4),
            "no_speech_probability": None if silence is None else round(silence, 4),
            "compression_ratio": round(self.compression_ratio, 3),
            "temperature": self.temperature,
            "complete": self.complete,
        }


class Transcriber:
    """A loaded Whisper that turns batches of log-mels into hypotheses.

    Attributes:
        batch_size: how many utterances to give it at once.
        prompt_ids: tokens of the option `prompt`.
    """

    def __init__(
        self,
        whisper: Whisper,
        options: DecodingOptions,
        seed: int = 0,
        assistant: Assistant | None = None,
    ) -> None:
        """Prepare what does not change from batch to batch.

        Args:
            whisper: the model.
            options: how it is decoded.
            seed: by which tokens are drawn at temperatures above 0.
            assistant: drafts for the model at temperature 0; that changes the speed alone.

        Raises:
            ConfigError: the model lacks a token that the options need, or the assistant is of no
                use to them.
        """
        self.whisper = whisper
        self.options = options
        self.seed = seed
        self.decoder = CachedDecoder(whisper.model)
        self.positions: int = whisper.model.config.max_target_positions
        # openai/whisper's model has as many positions as two texts: the half before is for context.
        self.max_new_tokens = options.max_new_tokens or self.positions // 2
        self.batch_size = (
            suitable_batch_size(whisper.model)
            if options.batch_size == "auto"
            else options.batch_size
        )
        self._rules = {timed: TokenRules(whisper, timed) for timed in (False, True)}
        if options.timestamps and not whisper.tokens.timestamps:
            raise ConfigError("decoding.timestamps: the model has no timestamp tokens")
        if options.long_form == "sequential" and not whisper.tokens.timestamps:
            raise ConfigError(
                "decoding.long_form: sequential goes by timestamps, for which the model has no "
                "tokens; set it to chunked"
            )
        self.prompt_ids = prompt_ids(whisper, options.prompt) if options.prompt else ()
        self.assistant = assistant
        if assistant is not None and options.num_beams > 1:
            raise ConfigError(
                f"assistant.path: drafts are of no use to {options.num_beams} beams; name no "
                "assistant, or set decoding.num_beams to 1"
            )

    def __call__(
        self, features: Tensor, languages: Sequence[str | None], keys: Sequence[int] | None = None
    ) -> list[Hypothesis]:
        """Return one hypothesis per utterance; see `from_encoder_states`.

        Args:
            features: float [B, M, T]: log-mels, on any device.
            languages: the code of each utterance, or None where the options or the model decide.
            keys: numbers that tell the utterances apart, for drawing tokens.

        Raises:
            ConfigError: the model has no token for a language.
        """
        return self.from_encoder_states(self.encode(features), languages, keys=keys)

    @torch.inference_mode()
    def encode(self, features: Tensor) -> Tensor:
        """Return float [B, E, D]: the encoder states of log-mels, float [B, M, T].

        If there is an assistant with an encoder of its own, its states stand behind them: [B, E,
        D + D'].
        """
        states = self.whisper.encode(features)
        if self.assistant is not None and self.assistant.own_encoder:
            states = torch.cat([states, self.assistant.student.encode(features)], dim=-1)
        return states

    @torch.inference_mode()
    def from_encoder_states(
        self,
        states: Tensor,
        languages: Sequence[str | None],
        *,
        previous: Sequence[Sequence[int]] | None = None,
        keys: Sequence[int] | None = None,
        timestamps: bool | None = None,
    ) -> list[Hypothesis]:
        """Return one hypothesis per utterance.

        Where a hypothesis looks like a loop or like guessing, it is drawn again at the next of the
        options' temperatures.

        Args:
            states: float [B, E, D] or [B, E, D + D']: encoder states, as `encode` returns them.
            languages: the code of each utterance, or None where the options or the model decide.
            previous: tokens of what was said before each utterance; None: the option `prompt`.
            keys: numbers that tell the utterances apart: tokens are drawn by these and the seed,
                whatever else is in the batch.
            timestamps: whether they are said; None: as the options say.

        Raises:
            ConfigError: the model has no token for a language.
        """
        timed = self.options.timestamps if timestamps is None else timestamps
        states, assistants_states = self._divided(states)
        pasts = previous or [self.prompt_ids] * len(languages)
        uneven = self.assistant is not None or len({len(past) for past in pasts}) > 1
        cache = self.decoder.start(states, self.positions, uneven=uneven)
        codes = self._known_languages(languages, cache)
        tokens = self.whisper.tokens
        prompts = [
            self._context(past) + tokens.prompt(code, self.options.task, timed)
            for past, code in zip(pasts, codes, strict=True)
        ]
        keys = keys or [0] * len(codes)
        rows = list(range(len(codes)))
        hypotheses: dict[int, Hypothesis] = {}
        for attempt in range(len(self.options.temperatures)):
            if attempt:
                rows = [row for row in rows if self._fails(hypotheses[row])]
                if not rows:
                    break
                cache = self.decoder.start(states[rows], self.positions, uneven=uneven)
            again = [prompts[row] for row in rows]
            found, silence = self._search(
                cache, again, [keys[row] for row in rows], attempt, timed, assistants_states[rows]
            )
            for place, row in enumerate(rows):
                temperature = self.options.temperatures[attempt]
                hypotheses[row] = self._hypothesis(
                    found[place], codes[row] or "en", silence[place], temperature
                )
        return [hypotheses[row] for row in range(len(codes))]

    def warm_up(self) -> None:
        """Transcribe one batch of silence, so that what is measured later pays for no start-up."""
        config, extractor = self.whisper.model.config, self.whisper.feature_extractor
        shape = (self.batch_size, config.num_mel_bins, extractor.nb_max_frames)
        language = next(iter(self.whisper.tokens.languages), None)
        self(torch.zeros(shape), [language] * self.batch_size)
        if self.assistant is not None:
            self.assistant.drafts = Drafts()

    def _divided(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoder states of the model, and of its assistant: its own, or the same."""
        width = self.decoder.width
        if self.assistant is not None and self.assistant.own_encoder:
            return states[..., :width], states[..., width:]
        return states, states

    def _known_languages(
        self, languages: Sequence[str | None], cache: DecoderCache
    ) -> list[str | None]:
        """Return the code of each utterance: its own, that of the options, or the detected one."""
        known = [language or self.options.language for language in languages]
        if not self.whisper.tokens.languages or None not in known:
            return known
        codes = list(self.whisper.tokens.languages)
        ids = torch.tensor(list(self.whisper.tokens.languages.values()), device=cache.text.device)
        start = torch.full_like(cache.lengths, self.whisper.tokens.start)[:, None]
        # It is not counted into the cache, so the prompt is written over it.
        logits = self.decoder.logits(self.decoder.read(start, cache)[:, 0])
        detected = [codes[best] for best in logits[:, ids].argmax(-1).tolist()]
        return [language or found for language, found in zip(known, detected, strict=True)]

    def _context(self, previous: Sequence[int]) -> list[int]:
        """Return the tokens that tell the model what was said before: the end of it, if long."""
        before = self.whisper.tokens.previous
        if not previous or before is None:
            return []
        return [before, *previous[-(self.positions // 2 - 1) :]]

    def _search(
        self,
        cache: DecoderCache,
        prompts: list[list[int]],
        keys: list[int],
        attempt: int,
        timed: bool,
        assistants_states: Tensor,
    ) -> tuple[list[Found], list[float | None]]:
        """Return the tokens of each utterance, and the probability that there is no speech."""
        states = read_prompts(self.decoder, cache, prompts)
        every = torch.arange(len(prompts), device=states.device)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=states.device)
        limits = (self.positions - 1 - last).clamp(max=self.max_new_tokens)
        start = Start(cache, states[every, last], limits)
        starts = [prompt.index(self.whisper.tokens.start) for prompt in prompts]
        silence = self._no_speech(states[every, torch.tensor(starts, device=states.device)])
        temperature = self.options.temperatures[attempt]
        rules = self._rules[timed]
        if temperature > 0:
            longest = int(limits.max())
            draws = [np.random.default_rng([self.seed, attempt, k]).random(longest) for k in keys]
            randoms = torch.tensor(np.stack(draws), dtype=torch.float32, device=states.device)
            return sample(self.decoder, rules, start, temperature, randoms), silence
        if self.options.num_beams > 1:
            return beam_search(self.decoder, rules, start, self.options.num_beams), silence
        if self.assistant is not None:
            return self.assistant.speculate(
                self.decoder, rules, start, assistants_states, prompts
            ), silence
        return sample(self.decoder, rules, start), silence

    def _no_speech(self, start_states: Tensor) -> list[float | None]:
        token = self.whisper.tokens.no_speech
        if token is None:
            return [None] * len(start_states)
        probabilities: list[float | None] = (
            self.decoder.logits(start_states).softmax(-1)[:, token].tolist()
        )
        return probabilities

    def _fails(self, hypothesis: Hypothesis) -> bool:
        """Return whether to draw it again: a loop, or improbable and yet not silence."""
        options = self.options
        limit = options.compression_ratio_threshold
        if self._is_improbable(hypothesis) and self.is_silence(hypothesis):
            return False
        if limit is not None and hypothesis.compression_ratio > limit:
            return True
        return self._is_improbable(hypothesis)

    def is_silence(self, hypothesis: Hypothesis) -> bool:
        """Return whether nothing was said: no speech is probable, and the text is improbable."""
        limit, probability = self.options.no_speech_threshold, hypothesis.no_speech_probability
        if limit is None or probability is None or probability <= limit:
            return False
        return self.options.log_probability_threshold is None or self._is_improbable(hypothesis)

    def _is_improbable(self, hypothesis: Hypothesis) -> bool:
        limit = self.options.log_probability_threshold
        return limit is not None and hypothesis.average_log_probability < limit

    def _hypothesis(
        self, found: Found, language: str, silence: float | None, temperature: float
    ) -> Hypothesis:
        text = self.text_of(found.ids)
        return Hypothesis(
            text=text,
            language=language,
            token_ids=tuple(found.ids),
            segments=tuple(self.segments_of(found.ids)),
            average_log_probability=found.log_probability / (len(found.ids) + found.complete),
            no_speech_probability=silence,
            compression_ratio=compression_ratio(text),
            temperature=temperature,
            complete=found.complete,
        )

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without timestamps."""
        words = [id for id in ids if id < self.whisper.tokens.end]
        # Cleaning up would change the spaces before punctuation, and with them the tokens.
        return str(self.whisper.tokenizer.decode(words, clean_up_tokenization_spaces=False))

    def segments_of(self, ids: Sequence[int]) -> list[Segment]:
        """Return the sentences between timestamps."""
        segments, words = [], list[int]()
        start: float | None = None
        for id in ids:
            if id < self.whisper.tokens.end:
                words.append(id)
                continue
            seconds = (id - self.whisper.tokens.timestamps.start) * TIME_STEP
            if start is not None and words:
                segments.append(Segment(round(start, 2), round(seconds, 2), self.text_of(words)))
                words, start = [], None
            else:
                start = seconds
        if start is not None and words:
            segments.append(Segment(round(start, 2), None, self.text_of(words)))
        return segments


def prompt_ids(whisper: Whisper, prompt: str) -> tuple[int, ...]:
    """Return the tokens of a text that the model is to take for what was said before.

    Raises:
        ConfigError: the model does not know of such texts, or it names a special token.
    """
    if whisper.tokens.previous is None:
        raise ConfigError("decoding.prompt: the model has no token <|startofprev|>")
    ids = whisper.tokenizer(" " + prompt.strip(), add_special_tokens=False).input_ids
    if special := [id for id in ids if id >= whisper.tokens.end]:
        token = whisper.tokenizer.convert_ids_to_tokens(special[0])
        raise ConfigError(f"decoding.prompt: {token} is no text; take it out")
    return tuple(ids)


def compression_ratio(text: str) -> float:
    """Return the bytes of a text over its compressed bytes, openai/whisper's measure of loops."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))
