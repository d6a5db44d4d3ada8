"""What may be subtracted from a return without moving the expected gradient: anything that does not see the action."""

import torch
from torch import Tensor

from rlhf_lessons.masking import check_same_shape, full_precision, inverse_deviation


def leave_one_out_baseline(returns: Tensor) -> Tensor:
    """For each of K samples of a prompt, the mean return of the other K − 1.

        b_k = (1/(K−1)) Σ_{j≠k} R_j                                                                     (Eq. 4.4)

    returns (B, K), K ≥ 2 -> (B, K). Sample k's own action does not enter b_k, so the gradient stays unbiased; the mean
    over all K would see it. Raises ValueError for K < 2.
    Source: Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    """
    if returns.ndim != 2 or returns.shape[1] < 2:
        raise ValueError(f"returns must be (B, K) with K >= 2 samples a prompt; got shape {tuple(returns.shape)}")
    returns = full_precision(returns)
    return (returns.sum(dim=1, keepdim=True) - returns) / (returns.shape[1] - 1)


def optimal_baseline(score_norms_sq: Tensor, returns: Tensor) -> Tensor:
    """The constant that minimises the total variance of (R − b)·∇log P(τ).

        b* = E[‖∇log P‖² R] / E[‖∇log P‖²]                                                              (Eq. 4.3)

    score_norms_sq ‖∇log P(τ)‖² (N,), returns (N,) -> (). Returns weighted by how far each sample moves θ. Estimated
    from the same samples it is meant for, it sees their actions: a small bias. Raises ValueError for other shapes or
    when every norm is zero.
    Source: Greensmith, Bartlett & Baxter 2004, "Variance reduction techniques for gradient estimates in RL".
    """
    check_same_shape(score_norms_sq=score_norms_sq, returns=returns)
    if returns.ndim != 1:
        raise ValueError(f"returns must be (N,); got shape {tuple(returns.shape)}")
    score_norms_sq, returns = full_precision(score_norms_sq), full_precision(returns)
    total = score_norms_sq.sum()
    if total.device.type == "cpu" and total == 0:
        raise ValueError("score_norms_sq must have a positive entry; got only 0")
    return (score_norms_sq * returns).sum() / total


def group_advantages(rewards: Tensor, group: Tensor, *, scale: str = "group") -> Tensor:
    """How much better a response was than the others to its prompt, on average.

        A_i = (R_i − mean_g R) / σ,   σ = 1, the group's or the batch's standard deviation              (Eq. 12.1)

    rewards (N,), group (N,) long, equal for responses to one draw of a prompt -> (N,). scale: "none", "group" or
    "batch"; deviations are biased, of the centred rewards in the batch's case, and equal rewards give 0. Raises
    ValueError for unequal shapes or another scale.
    Source: Shao et al. 2024, "DeepSeekMath", §4.1.2 ("group"); Liu et al. 2025, "Understanding R1-Zero-like training"
    ("none"); Hu et al. 2025, "REINFORCE++" ("batch").
    """
    check_same_shape(rewards=rewards, group=group)
    if scale not in ("none", "group", "batch"):
        raise ValueError(f"scale must be one of none, group, batch; got {scale!r}")
    rewards = full_precision(rewards)
    _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)

    def group_mean(x: Tensor) -> Tensor:
        """Of each row's group."""
        return (torch.zeros_like(counts, dtype=x.dtype).index_add(0, index, x) / counts)[index]

    centred = rewards - group_mean(rewards)
    if scale == "none":
        return centred
    mean = group_mean if scale == "group" else Tensor.mean
    return centred * inverse_deviation(mean(centred.square()), mean(rewards.square()))
