"""The facts of this machine that decide a benchmark's figures, and its peak speed."""

import importlib.metadata
import platform
import statistics
import time
from pathlib import Path

import torch

from simpler_distil_whisper.data.workers import own_cores
from simpler_distil_whisper.model.processes import has_bfloat16

PACKAGES = ("torch", "transformers", "ctranslate2", "openai-whisper")
# With these instructions bfloat16 and int8 products are several times as fast as float32's.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices that measure the peak


def print_facts(device: torch.device, threads: int) -> None:
    """Print `machine_facts` as a Markdown list."""
    print("\n".join(f"- {line}" for line in machine_facts(device, threads)), flush=True)


def machine_facts(device: torch.device, threads: int) -> list[str]:
    """Return processor, instructions, threads and versions, a line for each."""
    name = _cpu_info("model name") or platform.processor()
    lines = [f"CPU: {name}, {threads} of {own_cores()} threads"]
    flags = cpu_flags()
    lines.append(
        "instructions: " + ", ".join(f"{'' if flag in flags else 'no '}{flag}" for flag in FLAGS)
    )
    if device.type == "cuda":
        lines.append(f"GPU: {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}")
    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    lines.append(f"Python {platform.python_version()}, " + ", ".join(versions))
    return lines


def cpu_flags() -> set[str]:
    """Return the instruction sets in /proc/cpuinfo; an empty set where there is no such file."""
    return set(_cpu_info("flags").split())


def computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 has its own instructions; emulated, it is slower than float32."""
    if device.type == "cuda":
        return has_bfloat16()
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of one large matrix product, the median of ten."""
    size = PEAK_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_info(key: str) -> str:
    """Return what /proc/cpuinfo says of the first core; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
