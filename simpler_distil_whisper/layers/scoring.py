"""How close a student with some of the teacher's decoder layers is to the teacher before training.

Owns the utterances on which sets of layers are scored, and the forward pass through any set. Which
sets are tried is decided in `search.py`, which rows are used in `rows.py`.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.data.manifest import Rejection, Utterance, first_reasons
from simpler_distil_whisper.data.options import DataLimits
from simpler_distil_whisper.decoding.batches import (
    SpeechBatch,
    SpeechReader,
    in_batches,
    speech_batches,
)
from simpler_distil_whisper.layers.search import Layers, LayerScore
from simpler_distil_whisper.model.memory import suitable_batch_size
from simpler_distil_whisper.model.teacher_cache import EncoderStateCache
from simpler_distil_whisper.model.whisper import Whisper
from simpler_distil_whisper.progress import Progress
from simpler_distil_whisper.run import DataError
from simpler_distil_whisper.training.losses import IGNORE_INDEX, distillation_loss
from simpler_distil_whisper.training.models import last_states
from simpler_distil_whisper.training.options import ONLY_KL
from simpler_distil_whisper.training.tokens import DecoderTokens, Example, decoder_sequences

DEFAULT_LIMITS = DataLimits()


class EncodedBatch(NamedTuple):
    """Some utterances, encoded once for all sets of layers.

    Attributes:
        inputs: int64 [B, L]: decoder inputs.
        labels: int64 [B, L]: IGNORE_INDEX where nothing is scored.
        encoder_states: float [B, E, D]: those of the student's encoder.
        residuals: float [B, N + 1, L, D]: the states before each of the teacher's N decoder layers,
            and after the last.
        teacher_states: float [B, L, D]: the teacher's last decoder states, normalised.
    """

    inputs: Tensor
    labels: Tensor
    encoder_states: Tensor
    residuals: Tensor
    teacher_states: Tensor

    def every_other(self, first: int) -> "EncodedBatch":
        """Return every second utterance, from the first (0) or the second (1)."""
        return EncodedBatch(*(tensor[first::2] for tensor in self))


class LayerScorer:
    """Scores sets of decoder layers on utterances that are encoded once.

    Attributes:
        tokens: how many a score is the mean of.
        rejections: the utterances whose audio turned out to be unusable.
        hits: of how many utterances the cache had the encoder states.
    """

    def __init__(
        self,
        whisper: Whisper,
        encoder_layers: Layers,
        labelled: Sequence[Example],
        stop_if_asked: Callable[[], None],
        cache: EncoderStateCache | None = None,
    ) -> None:
        """Encode the utterances and compute the teacher's decoder states.

        Args:
            whisper: the teacher, on the device that is to compute.
            encoder_layers: those that the student keeps.
            labelled: at least one; those of similar length share a batch.
            stop_if_asked: is called wherever stopping is safe.
            cache: of the teacher's encoder states, where the student keeps all encoder layers.

        Raises:
            DataError: no audio could be used, or the teacher's decoder states are not finite.
        """
        self.model: Any = whisper.model
        self.whisper = whisper
        self.encoder_layers = encoder_layers
        self.stop_if_asked = stop_if_asked
        self.cache = cache
        self.rejections: list[Rejection] = []
        self.hits = 0
        with torch.no_grad():
            self.batches = list(self._encoded_batches(labelled))
        self.tokens = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in self.batches)
        if not self.batches:
            reasons = first_reasons(self.rejections)
            raise DataError(f"layer_scoring: no audio could be used. The first:{reasons}")
        if not all(torch.isfinite(batch.teacher_states).all() for batch in self.batches):
            raise DataError("teacher.path: its weights are not finite, so nothing can be compared")

    @torch.no_grad()
    def __call__(self, sets: Sequence[Layers], words: str) -> dict[Layers, LayerScore]:
        """Return the score of each set.

        Batch by batch, because the keys and values of the encoder states in each layer take most of
        the time and memory: they are computed once, and kept for one batch at a time.

        Args:
            sets: sets of decoder layers.
            words: what they are, for the progress display.
        """
        sums = dict.fromkeys(sets, (0.0, 0.0))
        with Progress(words, "sets x batches", len(sets) * len(self.batches)) as progress:
            for batch in self.batches:
                decoder = _LayersOfOneBatch(self.model, batch.inputs, batch.encoder_states)
                # In lexical order neighbouring sets have the longest beginnings in common.
                for layers in sorted(sets):
                    self.stop_if_asked()
                    kl, agreed = self._sums(decoder.last_states(layers), batch)
                    sums[layers] = sums[layers][0] + kl, sums[layers][1] + agreed
                    progress.advance()
        scores = {}
        for layers, (kl, agreed) in sums.items():
            mean = kl / self.tokens if math.isfinite(kl) else math.inf
            scores[layers] = LayerScore(mean, agreed / self.tokens)
        return scores

    @torch.no_grad()
    def kl_of(self, decoder: Any, batches: Sequence[EncodedBatch]) -> float:
        """Return the KL of a student's decoder, in float32, summed over the tokens of batches."""
        kl = 0.0
        for batch in batches:
            self.stop_if_asked()
            states = last_states(decoder, batch.inputs, batch.encoder_states.float())
            kl += self._sums(states, batch)[0]
        return kl

    def _sums(self, student_states: Tensor, batch: EncodedBatch) -> tuple[float, float]:
        """Return the KL and the number of agreements, each summed over the batch's tokens."""
        head = self.model.proj_out.weight
        terms = distillation_loss(
            student_states, head, batch.teacher_states, head, batch.labels, ONLY_KL
        )
        return float(terms.kl), float(terms.agreement)

    def _encoded_batches(self, labelled: Sequence[Example]) -> Iterator[EncodedBatch]:
        """Yield the batches; all audio is decoded before the model, which then has all cores."""
        by_length = sorted(labelled, key=lambda item: len(item.tokens))
        groups = list(in_batches(by_length, suitable_batch_size(self.model)))
        speech = list(self._load_audio([[item.utterance for item in group] for group in groups]))
        encoding = Progress("encoding", "batches", len(groups))
        for group, loaded in encoding.over(zip(groups, speech, strict=True)):
            self.stop_if_asked()
            self.rejections += loaded.rejections
            self.hits += len(loaded.utterances) - len(loaded.waveforms)
            if loaded.utterances:
                usable = {utterance.number for utterance in loaded.utterances}
                rows = [item for item in group if item.utterance.number in usable]
                yield self._batch(rows, loaded)

    def _load_audio(self, groups: Sequence[Sequence[Utterance]]) -> Iterator[SpeechBatch]:
        read = SpeechReader(self.whisper.feature_extractor, DEFAULT_LIMITS, self.cache)
        reading = Progress("decoding audio", "batches", len(groups))
        for speech in reading.over(speech_batches(groups, read, DEFAULT_LIMITS.workers)):
            self.stop_if_asked()
            yield speech

    def _batch(self, rows: Sequence[Example], speech: SpeechBatch) -> EncodedBatch:
        device = self.model.device
        tokens = [DecoderTokens(row.tokens, row.prompt_length) for row in rows]
        inputs, labels = decoder_sequences(tokens, self.whisper.tokens.end)
        inputs, labels = inputs.to(device), labels.to(device)
        features = log_mel(speech.waveforms, self.whisper.feature_extractor, device)
        if self.cache and speech.cached:
            states = self.cache.complete(
                speech.cached.to(device), features, self.model.model.encoder
            ).to(self.model.dtype)
        else:
            states = self.whisper.encode(features)
        all_layers = tuple(range(self.model.config.decoder_layers))
        teacher = _LayersOfOneBatch(self.model, inputs, states)
        teacher_states = teacher.last_states(all_layers)
        if len(self.encoder_layers) < self.model.config.encoder_layers:
            with only(self.model.model.encoder, self.encoder_layers):
                states = self.whisper.encode(features)
        residuals = torch.stack(teacher.states, dim=1)
        return EncodedBatch(inputs, labels, states, residuals, teacher_states)


class _LayersOfOneBatch:
    """The teacher's decoder layers on one batch, in the order of one set after another.

    What two sets share is computed once: the keys and values of the encoder states in a layer, and
    the decoder states after the layers with which both sets begin. That is why this does not use
    `decoding/cached_decoder.py`, which runs all layers, token by token, with fused projections.
    """

    def __init__(self, model: Any, inputs: Tensor, encoder_states: Tensor) -> None:
        """Compute the token embeddings; both tensors are those of a `EncodedBatch`."""
        self.decoder = model.model.decoder
        self.heads: int = model.config.decoder_attention_heads
        self.encoder_states = encoder_states
        self.cross_keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self.layers: Layers = ()
        positions = self.decoder.embed_positions.weight[: inputs.shape[1]]
        self.states: list[Tensor] = [self.decoder.embed_tokens(inputs) + positions]

    def last_states(self, layers: Layers) -> Tensor:
        """Return float [B, L, D]: the last decoder states of a model with these layers."""
        pairs = zip(self.layers, layers, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        del self.states[shared + 1 :]
        for layer in layers[shared:]:
            self.states.append(self._layer_output(layer, self.states[-1]))
        self.layers = layers
        last: Tensor = self.decoder.layer_norm(self.states[-1])
        return last

    def _layer_output(self, number: int, states: Tensor) -> Tensor:
        """Return float [B, L, D]: the output of one layer, as transformers computes it.

        Padding needs no mask: it comes after all tokens, and no token attends to what follows it.
        """
        layer = self.decoder.layers[number]
        own, cross = layer.self_attn, layer.encoder_attn
        normed = layer.self_attn_layer_norm(states)
        queries, keys, values = (
            self._split(projection, normed) for projection in (own.q_proj, own.k_proj, own.v_proj)
        )
        attention = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        states = states + own.out_proj(attention.transpose(1, 2).flatten(2))
        queries = self._split(cross.q_proj, layer.encoder_attn_layer_norm(states))
        if number not in self.cross_keys_values:
            self.cross_keys_values[number] = (
                self._split(cross.k_proj, self.encoder_states),
                self._split(cross.v_proj, self.encoder_states),
            )
        attention = functional.scaled_dot_product_attention(
            queries, *self.cross_keys_values[number]
        )
        states = states + cross.out_proj(attention.transpose(1, 2).flatten(2))
        normed = layer.final_layer_norm(states)
        output: Tensor = states + layer.fc2(layer.activation_fn(layer.fc1(normed)))
        return output

    def _split(self, projection: nn.Module, states: Tensor) -> Tensor:
        """Return float [B, H, *, D/H]: the projection of states [B, *, D], head by head."""
        projected: Tensor = projection(states)
        return projected.view(*states.shape[:2], self.heads, -1).transpose(1, 2)


@contextlib.contextmanager
def only(part: Any, kept: Layers) -> Iterator[None]:
    """Reduce encoder or decoder of a model to some of its layers inside a `with` block."""
    all_layers = part.layers
    part.layers = nn.ModuleList(all_layers[number] for number in kept)
    try:
        yield
    finally:
        part.layers = all_layers
