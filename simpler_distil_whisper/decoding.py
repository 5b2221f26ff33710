"""The batched decoder: log-mels -> encoder states -> tokens -> hypotheses with their evidence.

Greedy decoding of audio up to the model's window, the same tokens as transformers' `generate` in
float32. It reads and writes no files. Called by labelling, inference and validation.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from simpler_distil_whisper.options import DecodingOptions
from simpler_distil_whisper.whisper import Whisper


@dataclass(frozen=True)
class Hypothesis:
    """What the model heard in one utterance, and how sure it was.

    Attributes:
        text: without special tokens; with the space before the first word that real Whispers say,
            so that tokenising it gives the model's own tokens back.
        language: the code that was given or detected.
        tokens: how many tokens the text has.
        average_log_probability: of the tokens and the end token, natural logarithm.
        no_speech_probability: of `<|nospeech|>` as the first token; None if the model has none.
        compression_ratio: bytes of the text over its zlib-compressed bytes; loops score high.
        complete: the model ended the text itself, not the limit `max_new_tokens`.
    """

    text: str
    language: str
    tokens: int
    average_log_probability: float
    no_speech_probability: float | None
    compression_ratio: float
    complete: bool

    def evidence(self) -> dict[str, object]:
        """Return what a row of results keeps beside the text, rounded to what is meaningful."""
        silence = self.no_speech_probability
        return {
            "average_log_probability": round(self.average_log_probability, 4),
            "no_speech_probability": None if silence is None else round(silence, 4),
            "compression_ratio": round(self.compression_ratio, 3),
            "complete": self.complete,
        }


@dataclass(frozen=True)
class Decoded:
    """Greedy tokens of one batch.

    Attributes:
        tokens: int64 [B, L]: new tokens without the prompt, end token and what follows included.
        log_probability: float32 [B]: sum over the tokens up to and with the end token.
        no_speech: float32 [B]: probability of `<|nospeech|>` right after `<|startoftranscript|>`.
    """

    tokens: Tensor
    log_probability: Tensor
    no_speech: Tensor | None


class Transcriber:
    """A loaded Whisper that turns batches of log-mels into hypotheses."""

    def __init__(self, whisper: Whisper, options: DecodingOptions) -> None:
        """Prepare the masks of tokens that are never text."""
        self.whisper = whisper
        self.options = options
        model, tokens = whisper.model, whisper.tokens
        # openai/whisper's model has as many positions as two texts: the half before is for context.
        positions = model.config.max_target_positions
        prompt_length = 4 if tokens.languages else 2
        limit = options.max_new_tokens or positions // 2
        self.max_new_tokens = min(limit, positions - prompt_length)
        generation = model.generation_config
        never = {*tokens.control, *(generation.suppress_tokens or ())} - {tokens.end}
        first = never | set(generation.begin_suppress_tokens or ())
        self._never, self._never_first = (
            torch.tensor(sorted(ids), device=model.device) for ids in (never, first)
        )

    @torch.inference_mode()
    def __call__(self, features: Tensor, languages: Sequence[str | None]) -> list[Hypothesis]:
        """Return one hypothesis per utterance.

        Args:
            features: float [B, M, T]: log-mels, on any device.
            languages: the code of each utterance, or None where the options or the model decide.

        Raises:
            ConfigError: the model has no token for a language.
        """
        model = self.whisper.model
        features = features.to(model.device, model.dtype)
        states: Tensor = model.model.encoder(features).last_hidden_state
        return self.from_encoder_states(states, languages)

    def warm_up(self) -> None:
        """Transcribe one batch of silence, so that what is measured later pays for no start-up."""
        config, extractor = self.whisper.model.config, self.whisper.feature_extractor
        shape = (self.options.batch_size, config.num_mel_bins, extractor.nb_max_frames)
        language = next(iter(self.whisper.tokens.languages), None)
        self(torch.zeros(shape), [language] * self.options.batch_size)

    @torch.inference_mode()
    def from_encoder_states(
        self, states: Tensor, languages: Sequence[str | None]
    ) -> list[Hypothesis]:
        """Return one hypothesis per utterance from encoder states, float [B, E, D]."""
        known = [language or self.options.language for language in languages]
        if self.whisper.tokens.languages and None in known:
            detected = self._detect_languages(states)
            known = [language or found for language, found in zip(known, detected, strict=True)]
        prompts = [self.whisper.tokens.prompt(code, self.options.task) for code in known]
        decoded = self._greedy(states, torch.tensor(prompts, device=states.device))
        return [self._hypothesis(row, known[row] or "en", decoded) for row in range(len(languages))]

    def _detect_languages(self, states: Tensor) -> list[str]:
        """Return the most probable language code after `<|startoftranscript|>`, per utterance."""
        codes = list(self.whisper.tokens.languages)
        ids = torch.tensor(list(self.whisper.tokens.languages.values()), device=states.device)
        start = torch.full((len(states), 1), self.whisper.tokens.start, device=states.device)
        logits = self._logits(self._decoder_states(start, states, None)[:, -1])
        return [codes[best] for best in logits[:, ids].argmax(-1).tolist()]

    def _greedy(self, states: Tensor, prompts: Tensor) -> Decoded:
        """Decode until every utterance has ended or is at the limit.

        Args:
            states: float [B, E, D]: encoder states.
            prompts: int64 [B, P]: `<|startoftranscript|>`, language, task, `<|notimestamps|>`.
        """
        end = self.whisper.tokens.end
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        hidden = self._decoder_states(prompts, states, cache)
        no_speech = self._no_speech(hidden[:, 0])
        total = torch.zeros(len(states), device=states.device)
        ended = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        new: list[Tensor] = []
        while len(new) < self.max_new_tokens:
            logits = self._logits(hidden[:, -1])
            logits[:, self._never if new else self._never_first] = -torch.inf
            token = logits.argmax(-1).masked_fill(ended, end)
            chosen = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
            total += chosen.masked_fill(ended, 0.0)
            new.append(token)
            ended |= token == end
            if ended.all() or len(new) == self.max_new_tokens:
                break
            hidden = self._decoder_states(token[:, None], states, cache)
        return Decoded(torch.stack(new, dim=1), total, no_speech)

    def _decoder_states(
        self, ids: Tensor, states: Tensor, cache: EncoderDecoderCache | None
    ) -> Tensor:
        """Return float [B, L, D]: decoder states of the ids that follow those in the cache."""
        decoder = self.whisper.model.model.decoder
        decoded: Tensor = decoder(
            input_ids=ids,
            encoder_hidden_states=states,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return decoded

    def _logits(self, states: Tensor) -> Tensor:
        """Return float32 [B, V] of decoder states [B, D]: a tail in bfloat16 would be lost."""
        logits: Tensor = self.whisper.model.proj_out(states)
        return logits.float()

    def _no_speech(self, start_states: Tensor) -> Tensor | None:
        token = self.whisper.tokens.no_speech
        return None if token is None else self._logits(start_states).softmax(-1)[:, token]

    def _hypothesis(self, row: int, language: str, decoded: Decoded) -> Hypothesis:
        ids = decoded.tokens[row].tolist()
        complete = self.whisper.tokens.end in ids
        length = ids.index(self.whisper.tokens.end) if complete else len(ids)
        # Cleaning up would change the spaces before punctuation, and with them the tokens.
        tokenizer = self.whisper.tokenizer
        text = str(tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False))
        return Hypothesis(
            text=text,
            language=language,
            tokens=length,
            average_log_probability=float(decoded.log_probability[row]) / (length + complete),
            no_speech_probability=(
                None if decoded.no_speech is None else float(decoded.no_speech[row])
            ),
            compression_ratio=compression_ratio(text),
            complete=complete,
        )


def compression_ratio(text: str) -> float:
    """Return the bytes of a text over its compressed bytes, openai/whisper's measure of loops."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))
