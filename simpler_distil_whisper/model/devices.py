"""What this machine computes with: dtypes, attention, threads, memory.

Owns the meaning of "auto" in configs, as far as it depends on the machine.
"""

import ctypes
import os
import platform

import torch
from torch import Tensor, nn

from simpler_distil_whisper.data.workers import own_cores
from simpler_distil_whisper.model.options import Attention, Dtype
from simpler_distil_whisper.model.processes import has_bfloat16

LARGE_MODEL = 10_000_000  # parameters: less than Whisper tiny has
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h; in bytes


def torch_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that a config names; "auto": the fastest that training can use."""
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if has_bfloat16() else torch.float16


def decoding_dtype(
    dtype: Dtype, device: torch.device, stored: torch.dtype, for_training: bool = False
) -> torch.dtype:
    """Return the dtype to decode in.

    As `torch_dtype`, but on a GPU float16 for weights of float16, from which bfloat16 would take
    three bits, and bfloat16 on a CPU that computes in it. Measured on CPUs with AVX512-BF16, it is
    the fastest where nothing is trained.

    Args:
        dtype: what the config says.
        device: to decode on.
        stored: the dtype of the weights on disk.
        for_training: encoder states are kept for training, which computes in float32 on a CPU.
    """
    if dtype == "auto" and device.type == "cuda" and stored == torch.float16:
        return torch.float16
    if dtype == "auto" and device.type == "cpu" and _cpu_has_bfloat16() and not for_training:
        return torch.bfloat16
    return torch_dtype(dtype, device)


def suitable_attention(attention: Attention, device: torch.device, dtype: torch.dtype) -> str:
    """Return the attention that a config names; "auto": the fastest for the encoder.

    That is the fused kernel, except in bfloat16 on CPUs, where plain matrix products are faster.
    """
    if attention != "auto":
        return attention
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def encoder_batch_size(device: torch.device) -> int | None:
    """Return how many windows to encode at once; None: all.

    Measured on a CPU: the states of more than four windows do not fit into its caches between two
    encoder layers, which costs up to 29 %.
    """
    return None if device.type == "cuda" else 4


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; only from pinned memory does a copy to a GPU not wait for it.

    A copy from a GPU is always waited for: what reads it on the CPU would not wait.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def share_cores(model: nn.Module) -> None:
    """Let torch use this process's share of the cores; beside a small model, one is left to audio.

    Threads that wait for each other at every operation, on cores that are busy decoding audio, were
    measured to make a small model 20 times slower; beside a large one, decoding audio is nothing.
    The number of workers does not matter here: the number of threads decides the last bit of a sum,
    and the number of workers must change no result. OMP_NUM_THREADS, if set, is obeyed instead:
    whether by the user, or to 1 by torchrun for each of several processes, cannot be told apart.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for_audio = 1 if parameters < LARGE_MODEL else 0
    torch.set_num_threads(max(1, own_cores() - for_audio))


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones, where that is glibc.

    It would give back to the system each that is larger than 32 MB, and the system would fill the
    next one with zeros. Labelling with Whisper base was measured to take 5 % less processor time.
    Not for training, whose tensors are of many sizes: what is kept would be in pieces, and grow.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _cpu_has_bfloat16() -> bool:
    """Return whether the CPU has instructions for it; emulated, it is slower than float32."""
    # Private functions in torch 2.6 to 2.13; without them the result is False, so float32.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
