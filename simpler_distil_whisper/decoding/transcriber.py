"""Encoder states -> hypotheses with their evidence, for audio up to the model's window.

Owns the prompts, the language detection and the attempts at higher temperatures. `search.py` finds
the tokens, `fallback.py` says whether they will do, and `long_form.py` cuts longer audio into
windows. It reads and writes no files.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.decoding.cached_decoder import CachedDecoder, KeyValueCache
from simpler_distil_whisper.decoding.fallback import fails, quality_of, repeats_too_much
from simpler_distil_whisper.decoding.hypothesis import Hypothesis, compression_ratio
from simpler_distil_whisper.decoding.recorded_steps import fastest_decoder
from simpler_distil_whisper.decoding.search import (
    PromptedBatch,
    Sampling,
    SearchResult,
    beam_search,
    greedy_or_sampled,
    read_prompts,
)
from simpler_distil_whisper.decoding.speculative import Assistant, DraftCounts
from simpler_distil_whisper.decoding.timed_segments import segments_of
from simpler_distil_whisper.decoding.token_rules import TokenRules
from simpler_distil_whisper.decoding.word_times import TokenAligner
from simpler_distil_whisper.model.audio_context import AudioContext
from simpler_distil_whisper.model.folder_check import FRAMES_PER_POSITION
from simpler_distil_whisper.model.memory import Room, suitable_batch_size
from simpler_distil_whisper.model.options import DecodingOptions, SampledTexts
from simpler_distil_whisper.model.whisper import Whisper

NO_SAMPLED_TEXTS = SampledTexts()
SAMPLED_TEXT = 10_000  # in the seed, where for a hypothesis the number of the attempt stands
TOKENS_TO_SPARE = 8  # of a sampled text, above twice the tokens of the hypothesis


@dataclass(frozen=True)
class _Utterances:
    """What is decoded together.

    Attributes:
        codes: of their languages; None of English models.
        prompts: the tokens before each text.
        keys: a number for each, from which its random numbers are made.
        assistant_states: float [B, E, D']: their encoder states for the assistant.
        timestamps: whether to decode with timestamps.
    """

    codes: Sequence[str | None]
    prompts: list[list[int]]
    keys: Sequence[int]
    assistant_states: Tensor
    timestamps: bool

    def only(self, rows: list[int]) -> "_Utterances":
        """Return some of them."""
        return replace(
            self,
            codes=[self.codes[row] for row in rows],
            prompts=[self.prompts[row] for row in rows],
            keys=[self.keys[row] for row in rows],
            assistant_states=self.assistant_states[rows],
        )


class Transcriber:
    """A loaded Whisper that turns batches of log-mels into hypotheses.

    Attributes:
        batch_size: how many utterances to give it at once.
        room: how many of them have proved to fit into the memory.
        prompt_ids: tokens of the option `prompt`.
        aligner: gives words their times; None if none are requested.
    """

    def __init__(
        self,
        whisper: Whisper,
        options: DecodingOptions,
        seed: int = 0,
        assistant: Assistant | None = None,
        *,
        word_timestamps: bool = False,
        audio_context: AudioContext | None = None,
        record_steps: bool = False,
        sampled_texts: SampledTexts = NO_SAMPLED_TEXTS,
    ) -> None:
        """Prepare what does not change from batch to batch.

        Args:
            whisper: the model.
            options: how it is decoded.
            seed: by which tokens are sampled at temperatures above 0.
            assistant: drafts for the model at temperature 0, which changes the speed alone.
            word_timestamps: whether hypotheses are given the times of their words.
            audio_context: how much of the window the encoder is given; None: all of it.
            record_steps: whether to spend memory of a GPU on `RecordingDecoder`, where it is of
                use: the model's weights, its dtype and the process's current device stay.
            sampled_texts: what `with_sampled_texts` gives.

        Raises:
            ConfigError: the model lacks a token that the options need, or the options make no use
                of the assistant.
        """
        _check_options(whisper, options, assistant)
        self.whisper = whisper
        self.options = options
        self.seed = seed
        self.positions: int = whisper.model.config.max_target_positions
        # As in openai/whisper, one half of the positions is for the previous text.
        self.max_new_tokens = options.max_new_tokens or self.positions // 2
        self._rules = {timestamps: TokenRules(whisper, timestamps) for timestamps in (False, True)}
        self.prompt_ids = prompt_ids(whisper, options.prompt) if options.prompt else ()
        self.audio_context = audio_context
        self.assistant = assistant
        self.sampled_texts = sampled_texts
        self.batch_size = self._batch_size()
        self.room = Room(self.batch_size)
        self.decoder = self._decoder(record_steps)
        # Recorded steps have one row for each utterance, not one for each of its sampled texts.
        apart = sampled_texts.count > 0 and type(self.decoder) is not CachedDecoder
        self._sampling_decoder = CachedDecoder(whisper.model) if apart else self.decoder
        self.aligner = (
            TokenAligner(whisper, self.decoder, options.task) if word_timestamps else None
        )

    def _batch_size(self) -> int:
        if self.options.batch_size != "auto":
            return self.options.batch_size
        student = self.assistant.student.model if self.assistant else None
        return suitable_batch_size(
            self.whisper.model, self.options.num_beams, student, self.sampled_texts.count
        )

    def _decoder(self, record_steps: bool) -> CachedDecoder:
        recordable = (
            self.options.num_beams == 1 and self.assistant is None and self.audio_context is None
        )
        if record_steps and recordable:
            return fastest_decoder(self.whisper.model, self.batch_size)
        return CachedDecoder(self.whisper.model)

    def __call__(
        self, features: Tensor, languages: Sequence[str | None], keys: Sequence[int] | None = None
    ) -> list[Hypothesis]:
        """Return one hypothesis per utterance; see `from_encoder_states`.

        Args:
            features: float [B, M, T]: log-mels, on any device.
            languages: the code of each utterance; None leaves it to the options or the model.
            keys: a number for each utterance, from which its random numbers are made.

        Raises:
            ConfigError: the model has no token for a language.
        """
        return self.from_encoder_states(self.encode(features), languages, keys=keys)

    def encoder_positions(self, seconds: float) -> int:
        """Return how many encoder positions audio of some length is given."""
        window: int = self.whisper.model.config.max_source_positions
        return self.audio_context.positions(seconds, window) if self.audio_context else window

    @torch.inference_mode()
    def encode(self, features: Tensor, positions: Sequence[int] | None = None) -> Tensor:
        """Return float [B, E, D]: the encoder states of log-mels, float [B, M, T].

        Rows with the same number of positions are encoded together, so none is padded before it is
        encoded. If the assistant has an encoder of its own, its states stand behind them:
        [B, E, D + D'].

        Args:
            features: log-mels.
            positions: of each row; E is the most of them, and the states of other rows end in NaN
                (`CachedDecoder.start`). None: those of the whole window, for all.
        """
        if positions is None:
            return self._encode(features)
        counts = sorted(set(positions))
        if len(counts) == 1:
            return self._encode(features[..., : FRAMES_PER_POSITION * counts[0]])
        encoded: dict[int, Tensor] = {}
        for count in counts:
            rows = [row for row, own in enumerate(positions) if own == count]
            states = self._encode(features[rows][..., : FRAMES_PER_POSITION * count])
            encoded |= zip(rows, states, strict=True)
        return nn.utils.rnn.pad_sequence(
            [encoded[row] for row in range(len(positions))],
            batch_first=True,
            padding_value=torch.nan,
        )

    def _encode(self, features: Tensor) -> Tensor:
        states = self.whisper.encode(features)
        if self.assistant is not None and self.assistant.own_encoder:
            states = torch.cat([states, self.assistant.student.encode(features)], dim=-1)
        return states

    @torch.inference_mode()
    def detect_languages(self, states: Tensor) -> list[str | None]:
        """Return the languages by encoder states, as `encode` returns; None of English models."""
        states, _ = self._split(states)
        cache = self.decoder.start(states, self.positions, uneven=False)
        return self._languages([None] * len(states), cache)

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

        A hypothesis that looks like a loop or a guess is sampled again at the next of the options'
        temperatures. Where all fail, the most probable that is no loop is returned, of loops alone
        the last.

        Args:
            states: float [B, E, D] or [B, E, D + D']: encoder states, as `encode` returns them.
            languages: the code of each utterance; None leaves it to the options or the model.
            previous: tokens of the text before each utterance; None: the option `prompt`.
            keys: a number for each utterance, from which, with the seed, its random numbers are
                made, whatever else is in the batch.
            timestamps: whether to decode with timestamps; None: as the options say.

        Raises:
            ConfigError: the model has no token for a language.
        """
        timestamps = self.options.timestamps if timestamps is None else timestamps
        states, assistant_states = self._split(states)
        previous = previous or [self.prompt_ids] * len(languages)
        uneven = self.assistant is not None or len({len(tokens) for tokens in previous}) > 1
        cache = self.decoder.start(states, self.positions, uneven=uneven)
        codes = self._languages(languages, cache)
        prompts = [
            self._previous_text_ids(tokens)
            + self.whisper.tokens.prompt(code, self.options.task, timestamps)
            for tokens, code in zip(previous, codes, strict=True)
        ]
        keys = keys or [0] * len(codes)
        utterances = _Utterances(codes, prompts, keys, assistant_states, timestamps)
        hypotheses = self._search(cache, utterances, 0)
        del cache  # else two would have to fit into the memory
        self._decode_again(hypotheses, states, utterances, uneven)
        return hypotheses

    def _decode_again(
        self, hypotheses: list[Hypothesis], states: Tensor, utterances: _Utterances, uneven: bool
    ) -> None:
        """Replace hypotheses that fail by better ones of the next temperatures."""
        quality = functools.partial(quality_of, options=self.options)
        rows = list(range(len(hypotheses)))
        for attempt in range(1, len(self.options.temperatures)):
            rows = [row for row in rows if fails(hypotheses[row], self.options)]
            if not rows:
                return
            cache = self.decoder.start(states[rows], self.positions, uneven=uneven)
            again = self._search(cache, utterances.only(rows), attempt)
            del cache
            for row, hypothesis in zip(rows, again, strict=True):
                # Of two loops the later one: what came before may have been cut off.
                hypotheses[row] = max(hypothesis, hypotheses[row], key=quality)

    @torch.inference_mode()
    def with_sampled_texts(
        self, states: Tensor, hypotheses: Sequence[Hypothesis], keys: Sequence[int]
    ) -> list[Hypothesis]:
        """Return hypotheses with further texts, sampled without timestamps.

        A text that does not end within about twice the hypothesis is a loop, and left out.

        Args:
            states: float [B, E, D]: encoder states, as `encode` returns them.
            hypotheses: what was decoded from them.
            keys: as in `from_encoder_states`.
        """
        count, temperature = self.sampled_texts.count, self.sampled_texts.temperature
        decoder = self._sampling_decoder
        prompts = [
            self._previous_text_ids(self.prompt_ids)
            + self.whisper.tokens.prompt(hypothesis.language, self.options.task)
            for hypothesis in hypotheses
        ]
        room = self.positions - len(prompts[0])
        most = [min(2 * len(each.token_ids) + TOKENS_TO_SPARE, room) for each in hypotheses]
        limits = torch.tensor(most, device=states.device)
        cache = decoder.start(states, len(prompts[0]) + max(most), uneven=False)
        prompted = read_prompts(decoder, cache, prompts)[:, -1]
        randoms = self._randoms(
            [(SAMPLED_TEXT, key, number) for key in keys for number in range(count)], limits
        )
        batch, sampling = PromptedBatch(cache, prompted, limits), Sampling(temperature, randoms)
        texts = iter(greedy_or_sampled(decoder, self._rules[False], batch, sampling, count))
        return [
            replace(
                hypothesis,
                sampled_texts=tuple(
                    self.text_of(text.ids) for text in islice(texts, count) if text.complete
                ),
            )
            for hypothesis in hypotheses
        ]

    def warm_up(self) -> None:
        """Transcribe silence, so that no measured time includes the costs of a start.

        On a GPU it is a whole batch, which shows whether it fits; on a CPU, where that would take
        minutes, one utterance.
        """
        rows = 1 if self.whisper.model.device.type == "cpu" else self.batch_size
        silence = log_mel([np.zeros(0, np.float32)], self.whisper.feature_extractor)
        language = next(iter(self.whisper.tokens.languages), None)
        self(silence.expand(rows, -1, -1), [language] * rows)
        if self.assistant is not None:
            self.assistant.draft_counts = DraftCounts()

    def _split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoder states of the model and of its assistant, which may be the same."""
        width = self.decoder.width
        if self.assistant is not None and self.assistant.own_encoder:
            return states[..., :width], states[..., width:]
        return states, states

    def _languages(self, languages: Sequence[str | None], cache: KeyValueCache) -> list[str | None]:
        """Return the code of each utterance: its own, that of the options, or the detected one."""
        known = [language or self.options.language for language in languages]
        if not self.whisper.tokens.languages or None not in known:
            return known
        codes = list(self.whisper.tokens.languages)
        ids = torch.tensor(
            list(self.whisper.tokens.languages.values()), device=cache.lengths.device
        )
        start = torch.full_like(cache.lengths, self.whisper.tokens.start)[:, None]
        # The start token is not counted in the cache, so the prompt will overwrite it.
        logits = self.decoder.logits(self.decoder.read(start, cache)[:, 0])
        detected = [codes[best] for best in logits[:, ids].argmax(-1).tolist()]
        return [language or guess for language, guess in zip(known, detected, strict=True)]

    def _previous_text_ids(self, previous: Sequence[int]) -> list[int]:
        """Return the tokens of the previous text for the prompt; of a long one, only the end."""
        before = self.whisper.tokens.previous
        if not previous or before is None:
            return []
        return [before, *previous[-(self.positions // 2 - 1) :]]

    def _search(
        self, cache: KeyValueCache, utterances: _Utterances, attempt: int
    ) -> list[Hypothesis]:
        """Return one hypothesis per utterance, at the temperature of an attempt."""
        prompts = utterances.prompts
        states = read_prompts(self.decoder, cache, prompts)
        device = states.device
        rows = torch.arange(len(prompts), device=device)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        limits = (self.positions - 1 - last).clamp(max=self.max_new_tokens)
        batch = PromptedBatch(cache, states[rows, last], limits)
        starts = [prompt.index(self.whisper.tokens.start) for prompt in prompts]
        no_speech = self._no_speech(states[rows, torch.tensor(starts, device=device)])
        temperature, beams = self.options.temperatures[attempt], self.options.num_beams
        decoder, rules = self.decoder, self._rules[utterances.timestamps]
        # A loop is sampled again: its end need not be waited for, unless this attempt is the last.
        last_attempt = attempt + 1 == len(self.options.temperatures)
        loop_test = None if last_attempt else self._repeats_already
        if temperature > 0:
            randoms = self._randoms([(attempt, key) for key in utterances.keys], limits)
            sampling = Sampling(temperature, randoms)
            results = greedy_or_sampled(decoder, rules, batch, sampling, loop_test=loop_test)
        elif beams > 1:
            results = beam_search(decoder, rules, batch, beams)
        elif self.assistant is not None:
            encoded = utterances.assistant_states
            results = self.assistant.speculate(decoder, rules, batch, encoded, prompts)
        else:
            results = greedy_or_sampled(decoder, rules, batch, loop_test=loop_test)
        return [
            self._hypothesis(result, code or "en", probability, temperature)
            for result, code, probability in zip(results, utterances.codes, no_speech, strict=True)
        ]

    def _repeats_already(self, ids: Sequence[int]) -> bool:
        """Return whether a text repeats itself too much, whatever follows these tokens."""
        return repeats_too_much(self.text_of(ids), self.options, unfinished=True)

    def _randoms(self, streams: Sequence[tuple[int, ...]], limits: Tensor) -> Tensor:
        """Return float32 [R, longest limit]: numbers from 0 to 1, a stream for each row."""
        longest = int(limits.max())
        rows = [np.random.default_rng([self.seed, *stream]).random(longest) for stream in streams]
        return torch.tensor(np.stack(rows), dtype=torch.float32, device=limits.device)

    def _no_speech(self, start_states: Tensor) -> list[float | None]:
        """Return the no-speech probabilities, from the decoder states of the start tokens."""
        token = self.whisper.tokens.no_speech
        if token is None:
            return [None] * len(start_states)
        logits = self.decoder.logits(start_states)
        probabilities: list[float | None] = logits.softmax(-1)[:, token].tolist()
        return probabilities

    def _hypothesis(
        self, result: SearchResult, language: str, no_speech: float | None, temperature: float
    ) -> Hypothesis:
        text = self.text_of(result.ids)
        return Hypothesis(
            text=text,
            language=language,
            token_ids=tuple(result.ids),
            segments=tuple(segments_of(result.ids, self.whisper)),
            average_log_probability=result.log_probability / (len(result.ids) + result.complete),
            no_speech_probability=no_speech,
            compression_ratio=compression_ratio(text),
            temperature=temperature,
            complete=result.complete,
        )

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without timestamps."""
        return self.whisper.text_of(ids)


def _check_options(whisper: Whisper, options: DecodingOptions, assistant: Assistant | None) -> None:
    """Raise ConfigError for options that the model has no tokens for, or the assistant no use."""
    if options.timestamps and not whisper.tokens.timestamps:
        raise ConfigError("decoding.timestamps: the model has no timestamp tokens")
    if options.long_form == "sequential" and not whisper.tokens.timestamps:
        raise ConfigError(
            "decoding.long_form: sequential goes by timestamps, for which the model has no "
            "tokens; set it to chunked"
        )
    if assistant is not None and options.num_beams > 1:
        raise ConfigError(
            f"assistant.path: drafts are of no use to {options.num_beams} beams; name no "
            "assistant, or set decoding.num_beams to 1"
        )


def prompt_ids(whisper: Whisper, prompt: str) -> tuple[int, ...]:
    """Return the tokens of a text that the model takes for the text before the audio.

    Raises:
        ConfigError: the model has no token for previous text, or the text has a special token.
    """
    if whisper.tokens.previous is None:
        raise ConfigError("decoding.prompt: the model has no token <|startofprev|>")
    ids = whisper.tokenizer(" " + prompt.strip(), add_special_tokens=False).input_ids
    if special := [id for id in ids if not whisper.tokens.is_text(id)]:
        token = whisper.tokenizer.convert_ids_to_tokens(special[0])
        raise ConfigError(f"decoding.prompt: {token} is no text; take it out")
    return tuple(ids)
