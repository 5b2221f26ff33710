"""How many windows fit into the memory, and which errors mean that they do not."""

from pathlib import Path

import pytest
import torch
from tiny import make_model_folder
from torch import distributed

from simpler_distil_whisper.decoding.cached_decoder import CachedDecoder
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.memory import (
    CPU_CACHE_BYTES,
    _cache_bytes,
    out_of_memory,
    suitable_batch_size,
)
from simpler_distil_whisper.model.options import DecodingOptions, SampledTexts
from simpler_distil_whisper.model.whisper import Whisper, load_whisper

# torch 2.6 has none: there it is a plain RuntimeError.
AcceleratorError = getattr(torch, "AcceleratorError", RuntimeError)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.05 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(h)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        distributed.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:2251, unhandled cuda error\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
            "Cuda failure 2 'out of memory'"
        ),
        distributed.DistBackendError("Last error:\nFailed to CUDA calloc async 6291456 bytes"),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("std::bad_alloc"),
        MemoryError("Unable to allocate 9 TiB"),
    ],
)
def test_errors_of_many_kinds_mean_a_lack_of_memory(error: Exception) -> None:
    try:
        raise error
    except Exception as raised:
        assert out_of_memory(raised)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        distributed.DistBackendError("NCCL error: remote process exited or there was a network"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    ],
)
def test_other_errors_do_not(error: Exception) -> None:
    assert not out_of_memory(error)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    folder: Path = make_model_folder(tmp_path_factory.mktemp("memory") / "m", languages=["en"])
    return load_whisper(read_model_folder(folder, None, "model"))


def allocated(whisper: Whisper, rows: int) -> tuple[int, int, int]:
    """Bytes of tokens, encoder states and logits of a window with several rows of tokens."""
    config = whisper.model.config
    states = torch.zeros(1, config.max_source_positions, config.d_model)
    cache = CachedDecoder(whisper.model).start(states, config.max_target_positions, uneven=False)
    if rows > 1:
        cache.repeat(rows)
    logits = 4 * rows * config.vocab_size * 4
    return cache.self_attention.nbytes, cache.cross_attention.nbytes, logits


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_what_a_window_takes_is_what_the_decoder_allocates(whisper: Whisper, beams: int) -> None:
    tokens, states, logits = allocated(whisper, beams)
    copies = tokens if beams > 1 else 0  # of the beams that change places
    assert _cache_bytes(whisper.model, beams) == tokens + copies + states + logits


@pytest.mark.parametrize("texts", [1, 2, 5])
def test_sampled_texts_take_what_is_allocated_for_them_once(whisper: Whisper, texts: int) -> None:
    assert _cache_bytes(whisper.model, 1, texts) == sum(allocated(whisper, texts))


def test_of_beams_and_sampled_texts_those_count_that_take_more(whisper: Whisper) -> None:
    (beams, states, _), (_, _, logits) = allocated(whisper, 4), allocated(whisper, 5)
    assert _cache_bytes(whisper.model, 4, 5) == 2 * beams + states + logits
    assert _cache_bytes(whisper.model, 2, 5) == _cache_bytes(whisper.model, 1, 5)


def test_a_transcriber_has_room_for_its_sampled_texts(
    whisper: Whisper, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = _cache_bytes(whisper.model, 1, 5)
    monkeypatch.setattr("simpler_distil_whisper.model.memory.CPU_CACHE_BYTES", 20 * window)
    options = DecodingOptions(batch_size="auto")
    assert Transcriber(whisper, options, sampled_texts=SampledTexts(count=5)).batch_size == 20


def test_what_is_computed_besides_takes_its_share(
    whisper: Whisper, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = _cache_bytes(whisper.model, 1)
    assert CPU_CACHE_BYTES // window > 32
    assert suitable_batch_size(whisper.model) == 32
    monkeypatch.setattr("simpler_distil_whisper.model.memory.CPU_CACHE_BYTES", 20 * window)
    assert suitable_batch_size(whisper.model) == 20
    assert suitable_batch_size(whisper.model, assistant=whisper.model) == 10
    assert suitable_batch_size(whisper.model, beams=5) < 10
