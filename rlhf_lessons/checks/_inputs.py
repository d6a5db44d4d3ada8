"""Inputs for the checks: seeded, so that every learner gets the same, and random, so that no two answers agree."""

import torch
from torch import Tensor


class Draw:
    """One seeded stream of random tensors; `dtype` is that of every float it gives."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers, mean 0 and standard deviation `scale`."""
        return scale * torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def log_probs(self, *shape: int) -> Tensor:
        """Log-probabilities of plausible tokens: between log 0.05 and log 0.95."""
        uniform = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (0.05 + 0.9 * uniform).log().to(self.dtype)

    def tokens(self, vocabulary: int, *shape: int) -> Tensor:
        """Token ids, uniform."""
        return torch.randint(vocabulary, shape, generator=self.generator)


def prefix_mask(lengths: list[int], steps: int) -> Tensor:
    """True on the first `lengths[b]` of `steps` positions: (B, T)."""
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


def under_padding(x: Tensor, mask: Tensor, garbage: float) -> Tensor:
    """x (B, T) with multiples of `garbage`, no two in a row alike, where mask is False."""
    return torch.where(mask, x, garbage * torch.linspace(1, 2, x.shape[1], dtype=x.dtype))


def transposed(x: Tensor) -> Tensor:
    """The same numbers, laid out in memory the other way round: not contiguous."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)
