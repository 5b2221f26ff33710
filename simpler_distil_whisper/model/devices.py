"""What this machine computes with: devices, processes, dtypes, threads, memory.

Owns the meaning of "auto" in configs, as far as it depends on the machine.
"""

import datetime
import os
import sys
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, set_seed
from accelerate.utils.memory import should_reduce_batch_size
from transformers import WhisperForConditionalGeneration

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.options import Attention, Dtype
from simpler_distil_whisper.run import process_count

# A process may wait for hours until another one has labelled, validated or saved; the libraries'
# time-out of ten minutes would end both.
PATIENCE = datetime.timedelta(days=1)
# In messages of torch on a CPU and of CUDA's libraries, besides the errors that accelerate knows.
OUT_OF_MEMORY = ("not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
NOT_JOINED = "accelerate has not joined all processes"
CPU_CACHE_BYTES = 2 * 2**30  # for the decoder's keys and values


def join_processes() -> PartialState:
    """Return this process's device and its connection to the others, if several were launched."""
    state = PartialState(cpu=_several_on_cpu(), timeout=PATIENCE)
    assert state.num_processes == process_count(), NOT_JOINED
    return state


def make_accelerator(
    precision: Literal["auto", "float32", "bf16", "fp16"], seed: int
) -> Accelerator:
    """Return the accelerator for training on this device, with all random states seeded.

    Raises:
        ConfigError: the device cannot compute in this precision, or the launcher shards models.
    """
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "").lower() in ("1", "true"):
            raise ConfigError(
                f"the launcher asks for {plugin}, which splits a model into parts: a student fits "
                "into one GPU, so launch with plain data parallelism (DDP). For a teacher that "
                'leaves it no room: teacher.dtype "bfloat16", teacher.device, or a '
                "teacher_cache.folder"
            )
    gpu = torch.cuda.is_available()
    if precision == "fp16" and not gpu:
        raise ConfigError('precision: "fp16" needs a GPU; "float32" and "bf16" run everywhere')
    if precision == "auto":
        precision = "bf16" if gpu and _has_bfloat16() else "float32"
    set_seed(seed)
    try:
        accelerator = Accelerator(
            mixed_precision="no" if precision == "float32" else precision,
            cpu=_several_on_cpu(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:  # of a precision that this build of torch has not
        if precision == "float32":
            raise
        raise ConfigError(f'precision: "{precision}": {error}; use "float32"') from None
    assert accelerator.num_processes == process_count(), NOT_JOINED
    return accelerator


def torch_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that a config names; "auto": the fastest that training can use."""
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if _has_bfloat16() else torch.float16


def decoding_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to decode in: as `torch_dtype`, but bfloat16 on a CPU that computes in it.

    Measured on CPUs with AVX512-BF16, it is the fastest where nothing is trained.
    """
    if dtype == "auto" and device.type == "cpu" and _cpu_has_bfloat16():
        return torch.bfloat16
    return torch_dtype(dtype, device)


def suitable_attention(attention: Attention, device: torch.device, dtype: torch.dtype) -> str:
    """Return the attention that a config names; "auto": the fastest for the encoder.

    That is the fused kernel, except in bfloat16 on CPUs, where plain matrix products are faster.
    """
    if attention != "auto":
        return attention
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def suitable_batch_size(model: WhisperForConditionalGeneration) -> int:
    """Return how many windows to decode at once: as many as fit into the device's memory.

    Larger batches read the weights less often. The whole memory counts, not what is free now: a
    resumed run must form the same batches.
    """
    config, size = model.config, model.dtype.itemsize
    positions = config.max_source_positions + config.max_target_positions
    cache = 2 * config.decoder_layers * positions * config.d_model * size
    logits = 4 * config.vocab_size * 4
    if model.device.type != "cuda":
        return int(min(32, max(1, CPU_CACHE_BYTES // (cache + logits))))
    encoder = 16 * config.max_source_positions * config.d_model * size
    memory = torch.cuda.get_device_properties(model.device).total_memory
    room = memory // 2 - model.num_parameters() * size
    return int(min(256, max(1, room // (cache + logits + encoder))))


def encoder_batch_size(device: torch.device) -> int | None:
    """Return how many windows to encode at once; None: all.

    Measured on a CPU: the states of more than four windows do not fit into its caches between two
    encoder layers, which costs up to 29 %.
    """
    return None if device.type == "cuda" else 4


def leave_a_core_to_audio() -> None:
    """Let torch use all cores of this process's share but one, on which audio is decoded.

    Threads that wait for each other at every operation, on cores that are busy decoding audio, were
    measured to make a small model 20 times slower. The number of workers does not matter here: the
    number of threads decides the last bit of a sum, and the number of workers must change no
    result. OMP_NUM_THREADS, if set, is obeyed instead.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, (cores or 1) // local_processes - 1))


def peak_memory_megabytes(device: torch.device) -> int:
    """Return the most memory that this process has used: of the GPU, if it computes on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    import resource  # not on Windows

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes // (2**20 if sys.platform == "darwin" else 2**10)


def out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory is exhausted: each device has its own message."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY)


def _cpu_has_bfloat16() -> bool:
    """Return whether the CPU has instructions for it; emulated, it is slower than float32."""
    # Private functions in torch 2.6 to 2.13; without them the result is False, so float32.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _has_bfloat16() -> bool:
    """Return whether the GPU computes in bfloat16 itself; emulated, it is slower than float32."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _several_on_cpu() -> bool:
    """Return whether accelerate has to be told that the launched processes share the CPU.

    It would otherwise take each of them for the only one, and each would do all of the work.
    """
    return process_count() > 1 and not torch.cuda.is_available()
