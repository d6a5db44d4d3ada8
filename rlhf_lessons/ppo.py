"""PPO's clipped losses and the diagnostics that say whether an update went too far.

`log_probs`, `old_log_probs`, `advantages`, `values`, `old_values`, `returns`, `mask` are (B, T); the losses average
over the minibatch's real tokens, unless `over` says otherwise, and are minimised. What was recorded at rollout time is
named `old_*` and held constant. `clip_eps` is one ε, or two, (down, up), for a range that is not symmetric.
"""

import torch
from torch import Tensor

from rlhf_lessons import masking
from rlhf_lessons.importance import importance_ratio, sequence_ratio
from rlhf_lessons.masking import check_same_shape, full_precision, masked_mean, masked_var, real_steps

ClipEps = float | tuple[float, float]


def check_clip(clip_eps: ClipEps) -> tuple[float, float]:
    """How far the ratio may go down and up. Raises ValueError unless both are > 0."""
    low, high = clip_eps if isinstance(clip_eps, tuple) else (clip_eps, clip_eps)
    if not (low > 0 and high > 0):
        raise ValueError(f"clip_eps must be positive; got {clip_eps}")
    return low, high


def clip_ratio(ratio: Tensor, clip_eps: ClipEps) -> Tensor:
    """The ratio, held in [1 − ε, 1 + ε], or in [1 − ε_low, 1 + ε_high]."""
    low, high = check_clip(clip_eps)
    return ratio.clamp(1 - low, 1 + high)


def aggregate(x: Tensor, mask: Tensor | None = None, *, over: str, constant: float | None = None) -> Tensor:
    """One number from a batch's per-token terms: what weighs the same, a token or a text.

        tokens: Σ_bt x_bt / Σ_b |y_b|,   sequences: (1/B) Σ_b (1/|y_b|) Σ_t x_bt,
        constant: (1/B) Σ_b (1/c) Σ_t x_bt                                                              (Eq. 12.2)

    x, mask (B, T) -> (). over: "tokens", "sequences" or "constant" (which needs c > 0, the same for every batch, e.g.
    the longest response allowed). Only the last is a mean over texts of sums over tokens, as the policy gradient is;
    the first two divide by lengths, which the policy chooses. Raises ValueError for another `over`, and for a constant
    that is missing or not positive where `over` needs one.
    Source: Shao et al. 2024, "DeepSeekMath", Eq. 3 (sequences); Yu et al. 2025, "DAPO", §3.3 (tokens); Liu et al.
    2025, "Understanding R1-Zero-like training", §3.1 (constant).
    """
    if over not in ("tokens", "sequences", "constant"):
        raise ValueError(f"over must be one of tokens, sequences, constant; got {over!r}")
    if over == "constant" and not (constant is not None and constant > 0):
        raise ValueError(f'constant must be a number > 0 where over is "constant"; got {constant}')
    if over == "tokens":
        return masked_mean(x, mask)
    mask = real_steps(x, mask)
    divisor = constant if over == "constant" else mask.sum(dim=-1)
    return (torch.where(mask, full_precision(x), 0).sum(dim=-1) / divisor).mean()


def policy_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor | None = None, *, level: str) -> Tensor:
    """The ratio that weighs each token: its own, or (level "sequence") its text's, (B, T) -> (B, T).

    Raises ValueError for a level that is neither "token" nor "sequence".
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level must be token or sequence; got {level!r}")
    if level == "token":
        return importance_ratio(log_probs, old_log_probs)
    return sequence_ratio(log_probs, old_log_probs, mask)[:, None].expand_as(log_probs)


def policy_terms(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_eps: ClipEps, *, mask: Tensor | None = None,
    level: str = "token",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The two candidates of each token's loss, −ρ·Â and −clip(ρ)·Â: the larger one is the pessimistic bound."""
    ratio = policy_ratio(log_probs, old_log_probs, mask, level=level)
    return -ratio * advantages, -clip_ratio(ratio, clip_eps) * advantages


def clipped_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor | None = None, *, clip_eps: ClipEps,
    level: str = "token", over: str = "tokens", constant: float | None = None,
) -> Tensor:  # fmt: skip
    """PPO's policy loss: no reward for moving a token's ratio out of [1 − ε, 1 + ε].

        L = mean_t max(−ρ_t Â_t, −clip(ρ_t, 1−ε, 1+ε) Â_t)  =  −mean_t min(ρ_t Â_t, clip(ρ_t) Â_t)      (Eq. 7.1)

    All (B, T) -> (). The gradient is 0 only where Â = 0, Â > 0 and ρ > 1+ε, or Â < 0 and ρ < 1−ε; everywhere else a
    step is taken, also where ρ is far out on the wrong side: a finite one where it would overflow. level: "token", or
    "sequence" for one ratio a text; over, constant: those of `aggregate`, in the place of the mean over tokens. Raises
    ValueError for unequal shapes, clip_eps ≤ 0, another level, or what `aggregate` refuses.
    Source: Schulman et al. 2017, "Proximal policy optimization algorithms", Eq. 7; Yu et al. 2025, "DAPO", §3.1 (two
    ε); Zheng et al. 2025, "Group sequence policy optimization", §4.1 (sequence).
    """
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    mask = real_steps(log_probs, mask)
    # Padding is silenced before the exponential: a NaN or an overflow there would reach the gradient as 0·∞.
    log_probs, old_log_probs = torch.where(mask, log_probs, 0), torch.where(mask, old_log_probs, 0).detach()
    terms = policy_terms(log_probs, old_log_probs, advantages.detach(), clip_eps, mask=mask, level=level)
    return aggregate(torch.max(*terms), mask, over=over, constant=constant)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None = None, *, clip_eps: float
) -> Tensor:
    """Squared error of the critic, blind to gains from moving further than ε from the old value.

        L = ½ mean_t max((V − R̂)², (V_old + clip(V − V_old, −ε, ε) − R̂)²)                               (Eq. 7.3)

    All (B, T) -> (). Raises ValueError for unequal shapes or clip_eps ≤ 0 (∞ switches the clip off).
    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences", released code.
    """
    check_clip(clip_eps)
    check_same_shape(values=values, old_values=old_values, returns=returns)
    mask = real_steps(values, mask)
    values, old_values, returns = (torch.where(mask, full_precision(x), 0) for x in (values, old_values, returns))
    old_values, returns = old_values.detach(), returns.detach()
    clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    return 0.5 * masked_mean(torch.max((values - returns).square(), (clipped - returns).square()), mask)


def ppo_loss(policy_loss: Tensor, value_loss: Tensor, entropy: Tensor, *, vf_coef: float, ent_coef: float) -> Tensor:
    """The whole of what is minimised: entropy enters with a minus, since more of it is to be kept.

        L = L_policy + c_v L_value − c_H H                                                              (Eq. 7.7)

    Scalars -> (). Source: Schulman et al. 2017, "Proximal policy optimization algorithms", Eq. 9 (there as an
    objective).
    """
    policy_loss, value_loss, entropy = map(full_precision, (policy_loss, value_loss, entropy))
    return policy_loss + vf_coef * value_loss - ent_coef * entropy


def clip_fraction(
    ratio: Tensor, mask: Tensor | None = None, *, clip_eps: ClipEps, advantages: Tensor | None = None
) -> Tensor:
    """Share of the real tokens whose ratio has left the clip range.

        mean_t 1[|ρ_t − 1| > ε];   with advantages: mean_t 1[clip(ρ_t) Â_t < ρ_t Â_t]                   (Eq. 7.2)

    ratio, mask, advantages (B, T) -> (). With `advantages` only the tokens count whose gradient the clip removes;
    without them all that are outside, which is a larger number. Raises ValueError for unequal shapes or clip_eps ≤ 0.
    Source: Huang et al. 2022, "The 37 implementation details of PPO" (first form); Ziegler et al. 2019, code (second).
    """
    check_same_shape(ratio=ratio, advantages=advantages)
    ratio = full_precision(ratio)
    if advantages is None:
        outside = clip_ratio(ratio, clip_eps) != ratio
    else:
        outside = clip_ratio(ratio, clip_eps) * advantages < ratio * advantages
    return masked_mean(outside.to(ratio.dtype), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of the returns' variance that the critic foresaw.

        1 − Var(R̂ − V) / Var(R̂)                                                                         (Eq. 7.4)

    values, returns, mask of one shape -> (): 1 for a perfect critic, 0 for a constant one, negative for a harmful one;
    0 where the returns differ by rounding alone.
    With λ < 1 the returns contain V, which flatters it. Raises ValueError when the shapes disagree.
    Source: Huang et al. 2022, "The 37 implementation details of PPO", debug variables.
    """
    check_same_shape(values=values, returns=returns)
    mask = real_steps(returns, mask)
    returns, values = (torch.where(mask, full_precision(x), 0) for x in (returns, values))
    variance = masked_var(returns, mask)
    flat = variance <= masking.rounding_variance(masked_mean(returns.square(), mask))
    return torch.where(flat, 0, 1 - masked_var(returns - values, mask) / torch.where(flat, 1, variance))
