"""Tensors to store, and what the folder of a store then holds."""

from pathlib import Path

import torch


def some_tensor(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (5, 3)), generator=torch.Generator().manual_seed(seed))


def entries_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in entries_in(folder))
