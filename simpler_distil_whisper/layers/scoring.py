"""What a set of the teacher's decoder layers is worth: how close it is to the teacher, untaught.

Owns the utterances on which sets are scored, and their way through any of the layers. Which sets
are tried is `layer_search.py`'s. Called by `create_student_model.py`.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperTokenizer

from simpler_distil_whisper.data.audio import check_length
from simpler_distil_whisper.data.manifest import DataLimits, Rejection, Utterance, first_reasons
from simpler_distil_whisper.decoding.batches import (
    SpeechBatch,
    SpeechReader,
    in_batches,
    speech_batches,
)
from simpler_distil_whisper.layers.search import Layers, Score
from simpler_distil_whisper.model.devices import suitable_batch_size
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.options import Task
from simpler_distil_whisper.model.whisper import (
    SpecialTokens,
    Whisper,
    load_tokenizer,
    special_tokens,
)
from simpler_distil_whisper.run import DataError, Progress
from simpler_distil_whisper.training.dataset import Target, decoder_sequences
from simpler_distil_whisper.training.losses import IGNORE_INDEX, LossWeights, distillation_loss

ONLY_KL = LossWeights(cross_entropy=0.0, kl=1.0, temperature=1.0)
LIMITS = DataLimits()


class Labelled(NamedTuple):
    """An utterance, and what teacher and student are given and asked of it."""

    utterance: Utterance
    target: Target


class Labeller:
    """Turns the rows of a manifest into labelled utterances."""

    def __init__(self, teacher: ModelFolder, language: str | None, task: Task) -> None:
        """Read the tokenizer.

        Args:
            teacher: its folder.
            language: of the rows that name none.
            task: what the labels are.
        """
        self.tokenizer: WhisperTokenizer = load_tokenizer(teacher)
        self.tokens: SpecialTokens = special_tokens(self.tokenizer, teacher)
        self.language = language
        self.task = task
        self.window = teacher.window_seconds
        self.positions: int = teacher.config["max_target_positions"]

    def __call__(self, utterance: Utterance) -> Labelled:
        """Return the utterance with its tokens.

        Raises:
            AudioError: it is too long, say, or its file is no audio.
            ConfigError: the teacher has no token for the task.
            ValueError: it has no label that could be given to the decoder.
        """
        if not (utterance.text or "").strip():
            raise ValueError("it has no label")
        language = utterance.language or self.language
        if language is None and self.tokens.languages:
            raise ValueError("neither the row nor layer_scoring.language names the language")
        prompt = self.tokens.prompt(language, self.task)
        text = self.tokenizer(utterance.text, add_special_tokens=False).input_ids
        if not {self.tokens.end, *self.tokens.control}.isdisjoint(text):
            raise ValueError("the label holds special tokens, which are no speech")
        if len(prompt) + len(text) > self.positions:
            room = self.positions - len(prompt)
            raise ValueError(f"label of {len(text)} tokens, the maximum is {room}")
        check_length(utterance.header_seconds(), LIMITS.min_duration_seconds, self.window)
        return Labelled(utterance, Target([*prompt, *text, self.tokens.end], len(prompt)))


class _Batch(NamedTuple):
    """Some utterances, as layers need them.

    Attributes:
        inputs: int64 [B, L]: decoder inputs.
        labels: int64 [B, L]: IGNORE_INDEX where nothing is scored.
        audio: float [B, E, D]: the encoder states that the student hears.
        teacher: float [B, L, D]: the teacher's last decoder states.
    """

    inputs: Tensor
    labels: Tensor
    audio: Tensor
    teacher: Tensor


class LayerScorer:
    """Scores sets of decoder layers on utterances that were heard once.

    Attributes:
        tokens: how many a score is the mean of.
        rejections: the utterances whose audio turned out to be unusable.
    """

    def __init__(
        self,
        whisper: Whisper,
        encoder_layers: Layers,
        labelled: Sequence[Labelled],
        stop_if_asked: Callable[[], None],
    ) -> None:
        """Hear the utterances, and keep the teacher's answers.

        Args:
            whisper: the teacher, on the device that is to compute.
            encoder_layers: those that the student keeps.
            labelled: at least one; those of similar length share a batch.
            stop_if_asked: is called where stopping is safe.

        Raises:
            DataError: no audio could be used, or the teacher's answers are no numbers.
        """
        self.model: Any = whisper.model
        self.whisper = whisper
        self.encoder_layers = encoder_layers
        self.stop_if_asked = stop_if_asked
        self.rejections: list[Rejection] = []
        with torch.no_grad():
            self.batches = list(self._hear(labelled))
        self.tokens = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in self.batches)
        if not self.batches:
            reasons = first_reasons(self.rejections)
            raise DataError(f"layer_scoring: no audio could be used. The first:{reasons}")
        if not all(torch.isfinite(batch.teacher).all() for batch in self.batches):
            raise DataError("teacher.path: its weights are not finite, so nothing can be compared")

    @torch.no_grad()
    def __call__(self, sets: Sequence[Layers], words: str) -> dict[Layers, Score]:
        """Return the score of each set; `words` say what they are, for the progress.

        Batch by batch: the keys and values of the audio in each layer, which take most of the time
        and of the memory, are then computed once and kept for one batch alone.
        """
        sums = dict.fromkeys(sets, (0.0, 0.0))
        with Progress(words, "sets x batches", len(sets) * len(self.batches)) as progress:
            for batch in self.batches:
                walk = _Walk(self.model, batch.inputs, batch.audio)
                # In lexical order neighbours have the most layers in common.
                for layers in sorted(sets):
                    self.stop_if_asked()
                    kl, agreed = self._compare(walk.to_the_end_of(layers), batch)
                    sums[layers] = sums[layers][0] + kl, sums[layers][1] + agreed
                    progress.advance()
        return {
            layers: Score(kl / self.tokens if math.isfinite(kl) else math.inf, agreed / self.tokens)
            for layers, (kl, agreed) in sums.items()
        }

    def _compare(self, states: Tensor, batch: _Batch) -> tuple[float, float]:
        head = self.model.proj_out.weight
        terms = distillation_loss(states, head, batch.teacher, head, batch.labels, ONLY_KL)
        return float(terms.kl), float(terms.agreement)

    def _hear(self, labelled: Sequence[Labelled]) -> Iterator[_Batch]:
        """Yield the batches; all audio is decoded before the model, which then has all cores."""
        by_length = sorted(labelled, key=lambda one: len(one.target.tokens))
        groups = list(in_batches(by_length, suitable_batch_size(self.model)))
        speech = list(self._read([[one.utterance for one in group] for group in groups]))
        encoding = Progress("encoding", "batches", len(groups))
        for group, heard in encoding.over(zip(groups, speech, strict=True)):
            self.stop_if_asked()
            self.rejections += heard.rejections
            if heard.input_features is not None:
                usable = {utterance.number for utterance in heard.utterances}
                targets = [one.target for one in group if one.utterance.number in usable]
                yield self._batch(targets, heard.input_features)

    def _read(self, groups: Sequence[Sequence[Utterance]]) -> Iterator[SpeechBatch]:
        read = SpeechReader(self.whisper.feature_extractor, LIMITS)
        reading = Progress("decoding audio", "batches", len(groups))
        for speech in reading.over(speech_batches(groups, read, LIMITS.num_workers)):
            self.stop_if_asked()
            yield speech

    def _batch(self, targets: Sequence[Target], features: Tensor) -> _Batch:
        inputs, labels = (
            tensor.to(self.model.device)
            for tensor in decoder_sequences(targets, self.whisper.tokens.end)
        )
        audio = self.whisper.encode(features)
        everything = range(self.model.config.decoder_layers)
        teacher = _Walk(self.model, inputs, audio).to_the_end_of(tuple(everything))
        if len(self.encoder_layers) < self.model.config.encoder_layers:
            with _only(self.model.model.encoder, self.encoder_layers):
                audio = self.whisper.encode(features)
        return _Batch(inputs, labels, audio, teacher)


class _Walk:
    """A batch on its way through the layers of one set after the other.

    What two sets have in common is computed once: keys and values of the audio in a layer, and the
    states behind the layers with which the set before began.
    """

    def __init__(self, model: Any, inputs: Tensor, audio: Tensor) -> None:
        """Begin with the token embedding; `inputs` and `audio` are those of a `_Batch`."""
        self.decoder = model.model.decoder
        self.heads: int = model.config.decoder_attention_heads
        self.audio = audio
        self.heard: dict[int, tuple[Tensor, Tensor]] = {}
        self.layers: Layers = ()
        positions = self.decoder.embed_positions.weight[: inputs.shape[1]]
        self.states: list[Tensor] = [self.decoder.embed_tokens(inputs) + positions]

    def to_the_end_of(self, layers: Layers) -> Tensor:
        """Return float [B, L, D]: the last decoder states of a model with these layers."""
        pairs = zip(self.layers, layers, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        del self.states[shared + 1 :]
        for layer in layers[shared:]:
            self.states.append(self._through(layer, self.states[-1]))
        self.layers = layers
        last: Tensor = self.decoder.layer_norm(self.states[-1])
        return last

    def _through(self, number: int, states: Tensor) -> Tensor:
        """Return float [B, L, D]: what a layer makes of states.

        That is what transformers' layer computes; ours is that the audio's keys and values stay.
        Padding needs no mask: it lies behind all tokens, which never look ahead.
        """
        layer = self.decoder.layers[number]
        own, other = layer.self_attn, layer.encoder_attn
        normed = layer.self_attn_layer_norm(states)
        queries, keys, values = (
            self._split(each, normed) for each in (own.q_proj, own.k_proj, own.v_proj)
        )
        said = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        states = states + own.out_proj(said.transpose(1, 2).flatten(2))
        queries = self._split(other.q_proj, layer.encoder_attn_layer_norm(states))
        if number not in self.heard:
            keys, values = (self._split(each, self.audio) for each in (other.k_proj, other.v_proj))
            self.heard[number] = keys, values
        keys, values = self.heard[number]
        heard = functional.scaled_dot_product_attention(queries, keys, values)
        states = states + other.out_proj(heard.transpose(1, 2).flatten(2))
        normed = layer.final_layer_norm(states)
        through: Tensor = states + layer.fc2(layer.activation_fn(layer.fc1(normed)))
        return through

    def _split(self, projection: nn.Module, states: Tensor) -> Tensor:
        """Return float [B, H, *, D/H]: the projection of states [B, *, D], head by head."""
        projected: Tensor = projection(states)
        return projected.view(*states.shape[:2], self.heads, -1).transpose(1, 2)


@contextlib.contextmanager
def _only(part: Any, kept: Layers) -> Iterator[None]:
    """Let a part of the teacher have no other layers for a while."""
    whole = part.layers
    part.layers = nn.ModuleList(whole[number] for number in kept)
    try:
        yield
    finally:
        part.layers = whole
