"""Samples from one policy, expectations under another: ratios, weighted means and what they cost."""

import math

import torch
from torch import Tensor

from rlhf_lessons.masking import check_same_shape, full_precision, real_steps


def bounded_exponent(x: Tensor) -> Tensor:
    """x, but at most 0.49 times the logarithm of the largest float, so that eˣ and its square are finite.

    x -> the same shape, bit by bit the same below the bound (43 in float32). The gradient is 1 at every finite x: what
    lies beyond is pulled back as hard as at the bound, and an overflow that nothing depends on does not become 0·∞.
    """
    bound = 0.49 * math.log(torch.finfo(x.dtype).max)
    # nan_to_num: ∞ − ∞ is NaN. A NaN in x is not above the bound and stays what it is.
    return torch.where(x > bound, bound + (x - x.detach()).nan_to_num(), x)


def importance_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """How much more likely the new policy makes what the old one sampled.

        ρ_t = π(a_t|s_t) / π_old(a_t|s_t) = exp(log π − log π_old)                                      (Eq. 6.2)

    log_probs, old_log_probs of one shape -> that shape. Per token it leaves out the ratio of the states' probabilities:
    the whole sequence's weight is the product of its ratios. At most some 10¹⁸: see `bounded_exponent`.
    Raises ValueError when the shapes disagree.
    Source: Schulman et al. 2017, "Proximal policy optimization algorithms", §2.2 and §3.
    """
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs)
    return bounded_exponent(full_precision(log_probs) - full_precision(old_log_probs)).exp()


def sequence_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """One ratio a text: the geometric mean of its tokens' ratios, so that length alone does not make it explode.

        s = (π(y|x) / π_old(y|x))^(1/|y|) = exp((1/|y|) Σ_t (log π − log π_old))                        (Eq. 12.3)

    log_probs, old_log_probs, mask (B, T) -> (B,). The text's own importance weight is s to the power |y|: weighting by
    s instead is biased (lower variance is what it buys). Raises ValueError for unequal shapes.
    Source: Zheng et al. 2025, "Group sequence policy optimization", §4.1.
    """
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs)
    mask = real_steps(log_probs, mask)
    difference = torch.where(mask, full_precision(log_probs) - full_precision(old_log_probs), 0)
    return bounded_exponent(difference.sum(dim=-1) / mask.sum(dim=-1)).exp()


def sampler_ratio(
    log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor | None = None, *, cap: float, level: str = "token"
) -> Tensor:
    """π/μ of each token, or (level "sequence") the product over its text, given to all of its tokens; no gradient.

    log_probs, sampler_log_probs, mask of one shape -> that shape, 0 where mask is False. What `truncated_ratio` and
    `masked_ratio` share, refusals included: ValueError for unequal shapes, for another level, and unless cap ≥ 1, below
    which every token would lose weight where the two agree.
    """
    check_same_shape(log_probs=log_probs, sampler_log_probs=sampler_log_probs)
    if not cap >= 1:
        raise ValueError(f"cap must be a number >= 1; got {cap}")
    if level not in ("token", "sequence"):
        raise ValueError(f"level must be token or sequence; got {level!r}")
    mask = real_steps(log_probs, mask)
    difference = torch.where(mask, full_precision(log_probs) - full_precision(sampler_log_probs), 0).detach()
    if level == "sequence":
        difference = difference.sum(dim=-1, keepdim=True).expand_as(difference)
    return torch.where(mask, bounded_exponent(difference).exp(), 0)


def truncated_ratio(
    log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor | None = None, *, cap: float, level: str = "token"
) -> Tensor:
    """The weight that makes good for a sampler whose probabilities are not quite the policy's, capped.

        w = min(π/μ, cap),   π/μ of the token a_t, or of the whole text y                               (Eq. 16.1)

    Arguments, shape and refusals as those of `sampler_ratio`; the weight has no gradient: it weighs a loss. The cap (∞:
    none) bounds the variance and costs a bias, E_μ[w] = 1 − E_μ[(π/μ − cap)⁺]. Source: Ionides 2008, "Truncated
    importance sampling"; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    return sampler_ratio(log_probs, sampler_log_probs, mask, cap=cap, level=level).clamp(max=cap)


def masked_ratio(
    log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor | None = None, *, cap: float, level: str = "token"
) -> Tensor:
    """The same weight, but 0 where the two disagree by more than a factor of `cap`: such samples are left out.

        w = π/μ · 1[1/cap ≤ π/μ ≤ cap],   so that E_μ[w] = P_π(1/cap ≤ π/μ ≤ cap)                       (Eq. 16.2)

    Arguments, shape and refusals as those of `sampler_ratio`; no gradient. Source: Ling Team 2025, arXiv 2510.18855
    (IcePop: tokens, between two bounds); Liu et al. 2025, "When speed kills stability: demystifying RL collapse from
    the training-inference mismatch" (whole texts, cut off above).
    """
    ratio = sampler_ratio(log_probs, sampler_log_probs, mask, cap=cap, level=level)
    return torch.where((ratio >= 1 / cap) & (ratio <= cap), ratio, 0)


def importance_mean(f: Tensor, weights: Tensor, *, self_normalized: bool = False) -> Tensor:
    """Mean of f under p, from samples of q, with weights w = p/q.

        E_p[f] ≈ (1/N) Σ_i w_i f_i,   or self-normalised   Σ_i w_i f_i / Σ_i w_i                        (Eq. 6.1)

    f, weights (N,) -> (). The first is unbiased where q > 0 wherever p·f ≠ 0; the second is biased but consistent,
    works with unnormalised weights and never leaves the range of f. Raises ValueError when the shapes disagree.
    Source: Owen 2013, "Monte Carlo theory, methods and examples", ch. 9.
    """
    check_same_shape(f=f, weights=weights)
    f, weights = full_precision(f), full_precision(weights)
    return (weights * f).sum() / (weights.sum() if self_normalized else f.numel())


def effective_sample_size(weights: Tensor) -> Tensor:
    """How many equally weighted samples the weighted ones are worth.

        N_eff = (Σ_i w_i)² / Σ_i w_i²                                                                   (Eq. 6.3)

    weights (N,), not negative -> (), between 1 and N. Raises ValueError when none is positive.
    Source: Kong 1992, "A note on importance sampling using standardized weights".
    """
    if weights.device.type == "cpu" and not (torch.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(f"weights must be finite, not negative and not all 0; got {weights.tolist()!s:.80}")
    weights = full_precision(weights)
    scaled = weights / weights.max()  # the ratio does not depend on the scale, but squares of huge weights overflow
    return scaled.sum().square() / scaled.square().sum()
