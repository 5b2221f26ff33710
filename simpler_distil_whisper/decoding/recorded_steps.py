"""Steps of the decoder for few rows on a GPU, recorded once and replayed by a single launch.

A step of one token is hundreds of small kernels. For few rows the device runs them faster than the
CPU can launch them: at the end of a batch, when most rows have ended, in a long recording, which is
decoded window after window, and in small models. A CUDA graph launches all of them at once.

Letters of shapes as in `cached_decoder.py`.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.decoding.cached_decoder import CachedDecoder, KeyValueCache
from simpler_distil_whisper.model.memory import out_of_memory
from simpler_distil_whisper.run import log

MOST_ROWS = 16  # with more rows the device is the slower one
ROW_COUNTS = (1, 4, MOST_ROWS)
LENGTHS = (64, 128, 256)  # of the tokens that are attended to; the last is all that there can be
TOLERANCE = 0.05  # of the largest value: far above the rounding of 16 bits, far below an error

Step: TypeAlias = Callable[[], Tensor]


def cuda_graph(step: Step) -> Step:
    """Return what replays a step; the tensors that it reads and writes must stay where they are.

    Raises:
        RuntimeError: the step cannot be recorded, or its recording computes something else.
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # a recording that waits for the device would be void
    try:
        expected = step()  # the first time, libraries allocate what must not be recorded
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    # If recording fails, the outer context returns to this stream. Threads that write a cache or
    # pin memory meanwhile do no harm.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        output = step()
    output.fill_(torch.nan)
    graph.replay()
    difference = (output - expected).abs().max()
    if not difference <= TOLERANCE * expected.abs().max():
        raise RuntimeError(f"the replayed step differs by {float(difference):.3g}")

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class RecordingDecoder(CachedDecoder):
    """A decoder whose steps of one token for few rows are recorded.

    A recording computes fixed shapes at fixed places. So batches with few rows left move into
    memory that stays, one batch at a time, and a step is computed for the next larger of a few row
    counts and lengths: further rows are ignored, further tokens hidden.

    Everything else is computed as by `CachedDecoder`: several tokens at once, beams, and rows with
    an audio context.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        rows: int = MOST_ROWS,
        record: Callable[[Step], Step] = cuda_graph,
    ) -> None:
        """Allocate the memory of some rows; nothing is recorded yet.

        Args:
            model: as for `CachedDecoder`.
            rows: the most that are recorded.
            record: makes a step replayable.
        """
        super().__init__(model)
        config, device = model.config, model.device
        self._capacity: int = config.max_target_positions
        self._record = record
        self._row_counts = sorted({min(count, rows) for count in ROW_COUNTS})
        self._lengths = [n for n in LENGTHS if n < self._capacity] + [self._capacity]
        shape = (len(self._layers), 2, rows, self.heads)
        own, cross = (
            torch.zeros(*shape, length, self.head_width, dtype=model.dtype, device=device)
            for length in (self._capacity, config.max_source_positions)
        )
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._memory = KeyValueCache(own, cross, None, lengths, longest=0, even=False)
        self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._inside: KeyValueCache | None = None
        self._replays: dict[tuple[int, int], Step] = {}

    def read(self, ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Return float [R, L, D], as `CachedDecoder.read` does."""
        if not self._can_replay(ids, cache):
            return super().read(ids, cache)
        self._move_in(cache)
        rows = len(ids)
        self._ids[:rows], self._memory.lengths[:rows] = ids, cache.lengths
        count = next(count for count in self._row_counts if count >= rows)
        length = next(length for length in self._lengths if length > cache.longest)
        if (count, length) not in self._replays:
            self._try_to_record(count, length)
        replay = self._replays.get((count, length))
        # The next replay writes to the same place.
        return super().read(ids, cache) if replay is None else replay()[:rows].clone()

    def _try_to_record(self, rows: int, length: int) -> None:
        try:
            self._replays[rows, length] = self._record(self._step(rows, length))
        except RuntimeError as error:
            log.warning("Steps of the decoder are not recorded: %s", error)
            self._row_counts = []

    def _can_replay(self, ids: Tensor, cache: KeyValueCache) -> bool:
        rows, count = ids.shape
        return (
            count == 1
            and rows <= max(self._row_counts, default=0)
            and cache.padding_mask is None
            # No beams, which share the keys and values of the cross-attention.
            and cache.self_attention.shape[2] == cache.cross_attention.shape[2]
            and cache.self_attention.shape[4] == self._capacity
            and cache.cross_attention.shape[4] == self._memory.cross_attention.shape[4]
        )

    def _move_in(self, cache: KeyValueCache) -> None:
        """Let the memory that stays hold the cache, in place of the one before."""
        if cache is self._inside:
            return
        rows, used, memory = len(cache.lengths), cache.longest, self._memory
        memory.self_attention.zero_()  # What is hidden is multiplied by zero: it must be finite.
        memory.self_attention[:, :, :rows, :, :used] = cache.self_attention[:, :, :, :, :used]
        memory.cross_attention[:, :, :rows] = cache.cross_attention
        cache.self_attention = memory.self_attention[:, :, :rows]
        cache.cross_attention = memory.cross_attention[:, :, :rows]
        self._inside = cache

    def _step(self, rows: int, length: int) -> Step:
        """Return a step of the memory that stays: fixed shapes, at fixed places."""
        fixed = replace(
            self._memory,
            self_attention=self._memory.self_attention[:, :, :rows],
            cross_attention=self._memory.cross_attention[:, :, :rows],
            lengths=self._memory.lengths[:rows],
            longest=length - 1,
        )
        return functools.partial(super().read, self._ids[:rows], fixed)


def fastest_decoder(model: WhisperForConditionalGeneration, rows: int) -> CachedDecoder:
    """Return a decoder that records steps, of no more rows, on a GPU that has room for that."""
    if model.device.type == "cuda":
        try:
            return RecordingDecoder(model, min(rows, MOST_ROWS))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
    return CachedDecoder(model)
