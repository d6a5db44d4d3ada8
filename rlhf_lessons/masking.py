"""Means, variances and whitening over the real tokens of a batch, and the checks of shape that every estimator shares.

The meaning of a mask is stated here once and is the same in every module. `mask` is a bool tensor shaped like the
values it goes with, True on real steps. Where it is False the output is 0, and whatever stood there (NaN too) changes
neither the result nor any gradient. Half precision is computed in float32.
"""

import torch
from torch import Tensor

ROUNDINGS = 16  # what differs by no more than so many units in the last place is taken for equal


def full_precision(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_same_shape(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors have the shape of the first; None stands for an absent one."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = given[0]
    for name, tensor in given[1:]:
        if tensor.shape != first.shape:
            wanted = f"the shape of {first_name}, {tuple(first.shape)}"
            raise ValueError(f"{name} must have {wanted}; got {tuple(tensor.shape)}")


def real_steps(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mask as given, or one that is True everywhere; a row without a real step, or no rows, raises ValueError.

    Reading the mask's values would stop a GPU's queue, so there only its shape and dtype are checked.
    """
    if x.numel() == 0:
        raise ValueError(f"x must hold at least one value; got shape {tuple(x.shape)}")
    if mask is None:
        return torch.ones_like(x, dtype=torch.bool)
    check_same_shape(x=x, mask=mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor; got {mask.dtype}")
    if mask.device.type == "cpu" and mask.ndim > 0:
        empty = ~mask.any(dim=-1)
        if empty.any():
            row = int(empty.flatten().nonzero()[0])
            raise ValueError(f"mask must have a real step (True) in every row; got none in row {row}")
    return mask


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the real tokens of the whole batch: Σ x·m / Σ m. x, mask: same shape. Returns a scalar."""
    mask = real_steps(x, mask)
    return torch.where(mask, full_precision(x), 0).sum() / mask.sum()


def centred(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """x minus its mean over the real tokens; 0 where mask is False. x, mask: same shape; returns that shape."""
    mask = real_steps(x, mask)
    x = torch.where(mask, full_precision(x), 0)
    for _ in range(2):  # the second time takes away what the first mean was rounded by: equal values give exactly 0
        x = torch.where(mask, x - masked_mean(x, mask), 0)
    return x


def masked_var(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Biased variance over the real tokens: mean of (x − mean)², without Bessel's correction. Returns a scalar."""
    return masked_mean(centred(x, mask).square(), mask)


def masked_whiten(x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True) -> Tensor:
    """Scale to variance 1 over the real tokens and, with shift_mean, shift to mean 0.

        x̂ = (x − mean) / √(var + ε·mean x²),  plus mean if not shift_mean                               (Eq. 7.5)

    x, mask: same shape; returns that shape, 0 where mask is False. ε is the square of 16 roundings, relative to the
    size of x, so that equal values give 0 and what differs by rounding alone is not blown up to size 1.
    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences", released code, core.py.
    """
    mask = real_steps(x, mask)
    x = torch.where(mask, full_precision(x), 0)  # before the square: the gradient of NaN² would be 0·NaN
    centre = centred(x, mask)
    white = centre * inverse_deviation(masked_mean(centre.square(), mask), masked_mean(x.square(), mask))
    return torch.where(mask, white if shift_mean else white + masked_mean(x, mask), 0)


def rounding_variance(mean_square: Tensor) -> Tensor:
    """ε·E[x²], ε the square of 16 roundings: the variance that rounding alone may give to values of this size."""
    return (ROUNDINGS * torch.finfo(mean_square.dtype).eps) ** 2 * mean_square


def inverse_deviation(variance: Tensor, mean_square: Tensor) -> Tensor:
    """1/√(var + ε·E[x²]), ε as in `rounding_variance`. Finite where all values are 0.

    variance, mean_square: of the same values, same shape -> that shape.
    """
    tiny = torch.finfo(variance.dtype).tiny
    return torch.rsqrt((variance + rounding_variance(mean_square)).clamp(min=tiny))


def position_ids(attention_mask: Tensor) -> Tensor:
    """Position of each token counted from its row's first real one, so that left padding shifts nothing.

    position_t = max(0, Σ_{s≤t} m_s − 1);   attention_mask (B, L), 1 on real tokens -> (B, L) long.
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
