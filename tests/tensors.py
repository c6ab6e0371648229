"""Random tensors by seed, and comparison by the largest value: what tests of several kinds share."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def clustered(count: int, seed: int, D: int = 24, centres: int = 30, spread: float = 0.6) -> Tensor:
    """Rows [count, D] float32 around centres, which are the same for every seed."""
    chance = generator(seed)
    middle = torch.randn(centres, D, generator=generator(99))
    return middle[torch.randint(centres, (count,), generator=chance)] + spread * torch.randn(count, D, generator=chance)


def close(got: Tensor, want: Tensor, tolerance: float, at_least: float = 0.0) -> None:
    """Within `tolerance` of the largest value of `want`, or of `at_least`."""
    largest = max([at_least, *want.detach().abs().flatten().tolist()])
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * largest, check_dtype=False)
