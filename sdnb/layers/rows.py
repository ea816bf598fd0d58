"""The rows that modules are tried on; drawn once, since every layer is tried on the same ones."""

from functools import lru_cache

import torch
from torch import Tensor

FEW = 8  # rows of a kind


@lru_cache(maxsize=32)
def random_rows(d: int, device: torch.device, seed: int, n: int = FEW) -> Tensor:
    """Standard normal rows, drawn on the CPU: the same on every device. Not to be written to.

    Args:
        d: their length.
        device: where they live.
        seed: of the draw.
        n: how many.

    Returns:
        Shape (n, d).
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float32).to(device)


@lru_cache(maxsize=4)
def zero_and_basis_rows(d: int, device: torch.device) -> Tensor:
    """Zero, and some rows of the identity. Not to be written to.

    Args:
        d: their length.
        device: where they live.

    Returns:
        Shape (9, d), of fewer dimensions than 8 fewer.
    """
    some = torch.randperm(d, generator=torch.Generator().manual_seed(5))[:FEW]
    rows = torch.zeros(len(some) + 1, d, dtype=torch.float32)
    rows[torch.arange(len(some)) + 1, some] = 1
    return rows.to(device)
