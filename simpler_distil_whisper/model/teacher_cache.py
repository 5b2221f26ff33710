"""The teacher's encoder and decoder states, kept on disk so that no later run computes them again.

Owns the keys, which are made of contents and never of file names. Rows are looked up where they are
loaded, in worker processes (`look_up`); what is missing is computed and added where the teacher
runs (`complete`). It does not run the decoder itself; files are up to `tensor_store.py`.

Letters of shapes besides those in `data/features.py`: C cached rows of a batch.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.manifest import Utterance
from simpler_distil_whisper.files import open_regular_file
from simpler_distil_whisper.model.devices import moved, torch_dtype
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.options import CacheOptions
from simpler_distil_whisper.model.processes import has_bfloat16
from simpler_distil_whisper.model.tensor_store import BackgroundWriter, TensorStore
from simpler_distil_whisper.model.weights import (
    DECODER_SETTINGS,
    ENCODER_SETTINGS,
    digest_of_weights,
)
from simpler_distil_whisper.run import log

# To be raised whenever audio decoding, resampling or log-mels come to give other values: older
# entries would then differ from what would be computed.
FEATURE_RECIPE = 4
FEATURE_SETTINGS = ("feature_size", "chunk_length", "sampling_rate", "n_fft", "hop_length")


class _CachedStates:
    """What both kinds of cached states share: `missing`, which each describes."""

    missing: dict[int, str | None]

    def do_not_keep(self, row: int) -> None:
        """Let the states of a row, if they are missing, be computed but not kept."""
        if row in self.missing:
            self.missing[row] = None


@dataclass(frozen=True)
class CachedEncoderStates(_CachedStates):
    """The encoder states of a batch, as far as they are cached.

    Attributes:
        states: float [C, E, D], in the cache's dtype: those of the cached rows, in order.
        missing: row -> name under which its states will be kept; None: they will not.
    """

    states: Tensor
    missing: dict[int, str | None]

    def keep(self, rows: Sequence[int]) -> "CachedEncoderStates":
        """Return the states of some rows, in rising order, which are numbered from 0 again."""
        total = len(self.states) + len(self.missing)
        cached = [row for row in range(total) if row not in self.missing]
        place = {row: number for number, row in enumerate(cached)}
        return CachedEncoderStates(
            self.states[[place[row] for row in rows if row in place]],
            {new: self.missing[row] for new, row in enumerate(rows) if row in self.missing},
        )

    def to(self, device: torch.device) -> "CachedEncoderStates":
        """Return the same on a device."""
        return replace(self, states=moved(self.states, device))


def joined_states(parts: Sequence[CachedEncoderStates]) -> CachedEncoderStates | None:
    """Return the rows of several batches as one; None if there are no batches."""
    if not parts:
        return None
    missing: dict[int, str | None] = {}
    first = 0
    for part in parts:
        missing |= {first + row: name for row, name in part.missing.items()}
        first += len(part.states) + len(part.missing)
    return CachedEncoderStates(torch.cat([part.states for part in parts]), missing)


class _StateCache:
    """States of one kind of one teacher: a group in a store.

    A run with a cache always uses states in the cache's dtype, cached or just computed. A CPU
    computes every row alone: its results depend neither on the other rows of a batch nor on the
    hits. A GPU, whose last bits vary anyway, computes all missing rows at once.

    Attributes:
        dtype: of the states.
        hits: rows whose states `complete` has taken from the cache.
        misses: rows whose states were computed.
    """

    def __init__(
        self,
        kind: str,
        store: TensorStore,
        dtype: torch.dtype,
        teacher: ModelFolder,
        facts: dict[str, object],
    ) -> None:
        """Derive the group's name from the facts on which the states depend."""
        self.store = store
        self.dtype = dtype
        self.hits = self.misses = 0
        self._writer = BackgroundWriter(store)
        facts = {**facts, "dtype": str(dtype)}
        self.group = f"{kind}/{_digest(facts)}"
        store.write_about(self.group, {"teacher": str(teacher.path.resolve()), **facts})

    def finish(self) -> None:
        """Return once everything that `complete` has computed is on disk, or cannot be."""
        self._writer.finish()


class EncoderStateCache(_StateCache):
    """The encoder states of one teacher."""

    def __init__(
        self,
        store: TensorStore,
        dtype: torch.dtype,
        teacher: ModelFolder,
        extractor: WhisperFeatureExtractor,
    ) -> None:
        """Find the states in the store that belong to this teacher.

        Args:
            store: where the states are kept.
            dtype: in which they are kept.
            teacher: whose encoder computes them.
            extractor: what makes the encoder's input.
        """
        self.shape = (teacher.config["max_source_positions"], teacher.config["d_model"])
        facts = {
            "encoder_weights": digest_of_weights(teacher.path, "encoder."),
            **_encoder_facts(teacher, extractor),
        }
        super().__init__("encoder_states", store, dtype, teacher, facts)

    def entry_name(self, utterance: Utterance, view: str | None = "") -> str | None:
        """Return the name of the states of one view of an utterance.

        Args:
            utterance: whose audio it is.
            view: how the audio was altered; empty: not at all; None: in a way never used again.

        Returns:
            None if the states are not kept, or the audio file cannot be read.
        """
        key = _audio_key(utterance, view)
        return f"{self.group}/{_digest(key)}" if key else None

    def look_up(
        self, utterances: Sequence[Utterance], views: Sequence[str | None] | None = None
    ) -> CachedEncoderStates:
        """Return the cached states of some utterances, or of one view of each."""
        cached: list[Tensor] = []
        missing: dict[int, str | None] = {}
        for row, utterance in enumerate(utterances):
            name = self.entry_name(utterance, views[row] if views else "")
            states = self.store.read(name) if name else None
            if states is None:
                missing[row] = name
            else:
                cached.append(states)
        none = torch.empty(0, *self.shape, dtype=self.dtype)
        return CachedEncoderStates(torch.stack(cached) if cached else none, missing)

    @torch.no_grad()
    def complete(
        self, cached: CachedEncoderStates, input_features: Tensor, encoder: nn.Module
    ) -> Tensor:
        """Encode and keep the missing rows, and return the states of all rows.

        Args:
            cached: what `look_up` has returned, on the encoder's device.
            input_features: float [N, M, T]: log-mels of the missing rows, in order.
            encoder: the teacher's, in evaluation mode.

        Returns:
            float [B, E, D] in the cache's dtype. Those of a GPU are kept later: see `finish`.
        """
        missing = cached.missing
        self.hits += len(cached.states)
        self.misses += len(missing)
        if not missing:
            return cached.states
        count = len(cached.states) + len(missing)
        states = cached.states.new_empty(count, *self.shape)
        states[[row for row in range(count) if row not in missing]] = cached.states
        dtype = next(encoder.parameters()).dtype
        places = torch.tensor(list(missing), device=states.device)
        at_once = 1 if states.device.type == "cpu" else len(missing)
        parts = (torch.split(tensor, at_once) for tensor in (places, input_features))
        for rows, features in zip(*parts, strict=True):
            states[rows] = encoder(features.to(dtype)).last_hidden_state.to(self.dtype)
        if any(missing.values()):
            self._keep(list(missing.values()), states[places])
        return states

    def _keep(self, names: Sequence[str | None], states: Tensor) -> None:
        """Let states be written under the names of their rows."""
        if states.device.type != "cuda":
            self._writer.keep(names, [*states.cpu()], wait=states.device.type == "cpu")
            return
        # The writer waits for the GPU: this thread goes on to launch what is next.
        self._writer.finish(but=1)  # so that at most two batches are in pinned memory
        copy = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
        copy.copy_(states, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(states.device))
        device = states.device

        def wait_for_copy() -> None:
            with torch.cuda.device(device):  # a thread would begin with the first GPU
                copied.synchronize()

        self._writer.keep(names, [*copy], after=wait_for_copy)


@dataclass(frozen=True)
class CachedDecoderStates(_CachedStates):
    """The teacher's last decoder states of a batch, as far as they are cached.

    Attributes:
        padded: float [B, L, D], in the cache's dtype: zeros for missing rows and after a row's end;
            empty if all rows are missing.
        lengths: how many states each row has.
        missing: row -> name under which its states will be kept; None: they will not.
    """

    padded: Tensor
    lengths: list[int]
    missing: dict[int, str | None]

    def to(self, device: torch.device) -> "CachedDecoderStates":
        """Return the same on a device."""
        return replace(self, padded=moved(self.padded, device))


class DecoderStateCache(_StateCache):
    """The last decoder states of one teacher, from which its output head computes the logits.

    They take a hundredth of the space of the logits and lose nothing.
    """

    def __init__(
        self,
        store: TensorStore,
        dtype: torch.dtype,
        teacher: ModelFolder,
        extractor: WhisperFeatureExtractor,
        numerics: str,
    ) -> None:
        """Find the states in the store, as an `EncoderStateCache` does.

        Which they are also depends on `numerics`: the dtypes and devices of the computation, on
        which the last bits depend.
        """
        self.width: int = teacher.config["d_model"]
        facts = {
            "weights": digest_of_weights(teacher.path),
            **_encoder_facts(teacher, extractor),
            "decoder": {name: teacher.config.get(name) for name in DECODER_SETTINGS},
            "computing": numerics,
        }
        super().__init__("decoder_states", store, dtype, teacher, facts)

    def look_up(
        self,
        utterances: Sequence[Utterance],
        views: Sequence[str | None],
        sequences: Sequence[Sequence[int]],
    ) -> CachedDecoderStates:
        """Return the cached states of one view of each utterance.

        Args:
            utterances: whose audio the teacher is given.
            views: as in `EncoderStateCache.entry_name`.
            sequences: the decoder's input tokens, without padding.
        """
        cached: dict[int, Tensor] = {}
        missing: dict[int, str | None] = {}
        for row, (utterance, view, ids) in enumerate(
            zip(utterances, views, sequences, strict=True)
        ):
            key = _audio_key(utterance, view)
            name = f"{self.group}/{_digest([*key, list(ids)])}" if key else None
            states = self.store.read(name) if name else None
            if states is None:
                missing[row] = name
            else:
                cached[row] = states
        lengths = [len(ids) for ids in sequences]
        padded = torch.zeros(len(lengths) if cached else 0, max(lengths), self.width).to(self.dtype)
        for row, states in cached.items():
            padded[row, : lengths[row]] = states
        return CachedDecoderStates(padded, lengths, missing)

    def complete(
        self, cached: CachedDecoderStates, compute: Callable[[list[int], int], Tensor]
    ) -> Tensor:
        """Return float [B, L, D] in the cache's dtype, and keep what was missing: see `finish`.

        Args:
            cached: what `look_up` has returned.
            compute: returns float [N, l, D]: the first l states of some rows of the batch.
        """
        self.hits += len(cached.lengths) - len(cached.missing)
        self.misses += len(cached.missing)
        if not cached.missing:
            return cached.padded
        lengths = cached.lengths
        states = cached.padded.new_zeros(len(lengths), max(lengths), self.width)
        states[: len(cached.padded)] = cached.padded
        new: dict[int, str | None] = {}
        for row, name in cached.missing.items():
            # Batches are looked up ahead of their use: it may have been kept since then.
            kept = self.store.read(name) if name else None
            if kept is None:
                new[row] = name
            else:
                states[row, : lengths[row]] = kept.to(states.device)
        on_cpu = states.device.type == "cpu"
        alone, together = [[row] for row in new], [list(new)] if new else []
        for rows in alone if on_cpu else together:
            longest = max(lengths[row] for row in rows)
            states[rows, :longest] = compute(rows, longest).to(self.dtype)
        if any(new.values()):
            copies = zip(new, states[[*new]].cpu(), strict=True)
            own = [copy[: lengths[row]] for row, copy in copies]
            self._writer.keep([*new.values()], own, wait=on_cpu)
        return states


def open_store(options: CacheOptions) -> TensorStore | None:
    """Return the store that a config names; None if it names none.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if options.folder is None:
        return None
    try:
        store = TensorStore(options.folder, round(options.max_gigabytes * 1e9))
        used = store.used()
    except OSError as error:
        raise ConfigError(
            f"teacher_cache.folder: {options.folder} cannot be written: {error}"
        ) from None
    log.info(
        "teacher cache %s: %.3f of %g GB used", options.folder, used / 1e9, options.max_gigabytes
    )
    return store


def dtype_of_states(
    options: CacheOptions, computed: torch.dtype, device: torch.device
) -> torch.dtype:
    """Return the dtype in which states that are computed on a device are kept: the config's.

    "auto" is the one in which they are computed, or on a GPU without bfloat16 float16: there
    labelling computes in float16, and training, in float32, can do with the same states.

    Raises:
        ConfigError: it is finer than the one in which they were computed.
    """
    if options.dtype == "auto":
        labels_coarser = device.type == "cuda" and not has_bfloat16()
        return torch.float16 if labels_coarser else computed
    dtype = torch_dtype(options.dtype, device)
    if torch.finfo(dtype).eps < torch.finfo(computed).eps:
        raise ConfigError(
            f'teacher_cache.dtype: "{options.dtype}" is finer than {computed}, in which the '
            'teacher computes: choose "auto"'
        )
    return dtype


def open_encoder_cache(
    options: CacheOptions,
    teacher: ModelFolder,
    extractor: WhisperFeatureExtractor,
    computed: torch.dtype,
    device: torch.device,
) -> EncoderStateCache | None:
    """Return the cache of encoder states that a config names; None if it names none.

    Args:
        options: the config's section. "auto" is the dtype in which layers are scored and, if it is
            not told otherwise, a student is trained on the device, or `computed` if that is
            coarser.
        teacher: whose encoder is run.
        extractor: what makes its input.
        computed: the dtype in which the encoder computes.
        device: where it does.

    Raises:
        ConfigError: the folder cannot be written, or the cache's dtype is finer than `computed`.
    """
    if (store := open_store(options)) is None:
        return None
    dtype = dtype_of_states(options, computed, device)
    if options.dtype == "auto":
        trained_in = torch_dtype("auto", device)
        dtype = max(dtype, trained_in, key=lambda dtype: torch.finfo(dtype).eps)
    return EncoderStateCache(store, dtype, teacher, extractor)


def audio_digest(path: Path) -> str:
    """Return a hash of a file's bytes; a file that many rows are parts of is read only once.

    Raises:
        OSError: it cannot be read.
    """
    facts = path.stat()
    return _digest_of_file(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=2**14)
def _digest_of_file(path: Path, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with open_regular_file(path) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _encoder_facts(teacher: ModelFolder, extractor: WhisperFeatureExtractor) -> dict[str, object]:
    """Return what encoder states depend on besides the weights and the audio."""
    return {
        "encoder": {name: teacher.config.get(name) for name in ENCODER_SETTINGS},
        "features": {name: getattr(extractor, name, None) for name in FEATURE_SETTINGS},
        "feature_recipe": FEATURE_RECIPE,
    }


def _audio_key(utterance: Utterance, view: str | None) -> list[object] | None:
    """Return what identifies one view of an utterance's audio by its content.

    None if the view is never used again, or the file cannot be read.
    """
    if view is None:
        return None
    try:
        audio = audio_digest(utterance.audio)
    except OSError:
        return None
    part = [audio, utterance.start_seconds, utterance.duration_seconds, utterance.channel]
    return [*part, view] if view else part
