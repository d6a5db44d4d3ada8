"""The leash: how far the policy has moved from the reference, and what moving costs.

All divergences are KL(policy ‖ reference), in nats.
"""

import math

import torch
from torch import Tensor

from rlhf_lessons.importance import bounded_exponent
from rlhf_lessons.masking import check_same_shape, full_precision, real_steps
from rlhf_lessons.policy_gradient import policy_gradient_loss, reward_to_go


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL divergence of the next-token distributions, summed over the whole vocabulary.

        KL(π ‖ π_ref)(s_t) = Σ_v π(v|s_t) (log π(v|s_t) − log π_ref(v|s_t))                             (Eq. 8.1)

    logits, ref_logits (..., V) -> (...), in nats, never negative. Raises ValueError when the shapes disagree.
    Source: Kullback & Leibler 1951, "On information and sufficiency".
    """
    check_same_shape(logits=logits, ref_logits=ref_logits)
    log_probs = full_precision(logits).log_softmax(dim=-1)
    ref_log_probs = full_precision(ref_logits).log_softmax(dim=-1)
    probs = log_probs.exp()
    # p log p → 0 as p → 0: a token that the policy never picks costs nothing, whatever the reference thinks of it.
    log_ratio = torch.where(probs > 0, log_probs - ref_log_probs, 0)
    return (probs * log_ratio).sum(dim=-1)


def sampled_kl(log_probs: Tensor, ref_log_probs: Tensor, *, kind: str) -> Tensor:
    """One-sample estimates of the KL from tokens that the policy drew; d = log π − log π_ref.

        k1 = d,   k2 = ½ d²,   k3 = exp(−d) − 1 + d                                                     (Eq. 8.2)

    log_probs, ref_log_probs of one shape -> that shape, in nats. In expectation over the policy's tokens k1 and k3
    equal the KL; k1 may be negative for a single token, k3 never; k2 is biased but close for small d. As losses, with
    the states held fixed, their expected gradients are 0, ∇KL(π‖π_ref) and ∇KL(π_ref‖π). The exponential is at most
    some 10¹⁸: see `importance.bounded_exponent`. Raises ValueError for another kind or unequal shapes.
    Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    check_same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs)
    difference = full_precision(log_probs) - full_precision(ref_log_probs)
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return torch.expm1(bounded_exponent(-difference)) + difference
    raise ValueError(f'kind must be "k1", "k2" or "k3"; got {kind!r}')


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """The reward of each token: a toll for leaving the reference, and the score on the last real token.

        r_t = −β·kl_t + 1[t is the last real token]·score                                               (Eq. 8.3)

    scores (B,), kl (B, T), mask (B, T) -> (B, T), 0 where mask is False. With kl = log π − log π_ref the row sums to
    score − β·(log π(y|x) − log π_ref(y|x)). Raises ValueError for unequal shapes or kl_coef < 0.
    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences", §2.
    """
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef must not be negative; got {kl_coef}")
    if scores.shape != kl.shape[:1]:
        raise ValueError(f"scores must be (B,) = {tuple(kl.shape[:1])}; got {tuple(scores.shape)}")
    scores, kl, mask = full_precision(scores), full_precision(kl), real_steps(kl, mask)
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, steps, -1).amax(dim=1, keepdim=True)
    rewards = -kl_coef * kl + torch.where(steps == last, scores[:, None], 0)
    return torch.where(mask, rewards, 0)


def sequence_kl_loss(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """The leash as a loss: its expected gradient is that of the KL of whole texts, its value is no KL.

        L = (1/B) Σ_b Σ_t log π(a_t|s_t) · D_t,   D_t = Σ_{t'≥t} (log π − log π_ref)(a_t'|s_t') held constant
                                                                                                        (Eq. 11.1)

    log_probs, ref_log_probs, mask (B, T) of texts that the policy drew -> (). E[∇L] = ∇KL(π(y|x) ‖ π_ref(y|x)): what
    k1 in the reward gives, with each token charged for the tolls that it can still influence. Raises ValueError for
    unequal shapes.
    Source: Tang & Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL".
    """
    tolls = reward_to_go(sampled_kl(log_probs, ref_log_probs, kind="k1"), mask, gamma=1.0)
    return policy_gradient_loss(log_probs, -tolls, mask)  # which holds its weights constant


def best_of_n_bound(n: int) -> float:
    """What the KL of best-of-n from the policy that it samples cannot exceed.

        KL(best of n ‖ π) ≤ log n − (n−1)/n                                                             (Eq. 14.2)

    In nats per response. Equality holds for continuous rewards alone; in a discrete world with n > 1 the KL is smaller,
    the more so the more probability has one and the same reward. Raises ValueError if n is below 1.
    Source: Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy".
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    return math.log(n) - (n - 1) / n


class FixedKL:
    """A coefficient β that stays as it is: `coef`."""

    def __init__(self, kl_coef: float) -> None:
        if not kl_coef >= 0:
            raise ValueError(f"kl_coef must not be negative; got {kl_coef}")
        self.coef = kl_coef

    def update(self, kl: float, n: int) -> None:
        """Leave `coef` alone, whatever the batch's KL."""


class AdaptiveKL:
    """A coefficient β that steers the KL per sequence to a target: `coef`.

        β ← β · (1 + clip(KL/target − 1, −0.2, 0.2) · n / horizon)                                      (Eq. 8.5)

    init: the first β; target: nats per sequence; horizon: episodes. Raises ValueError unless all are positive.
    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences", §2.2.
    """

    def __init__(self, init: float, target: float, horizon: int) -> None:
        for name, value in (("init", init), ("target", target), ("horizon", horizon)):
            if not value > 0:
                raise ValueError(f"{name} must be positive; got {value}")
        self.coef, self.target, self.horizon = init, target, horizon

    def update(self, kl: float, n: int) -> None:
        """kl: the batch's mean KL per sequence, in nats; n: episodes in the batch.

        Raises ValueError for a KL that is not finite, or so many episodes that β could fall to 0 or below.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl must be finite; got {kl}")
        if not n < 5 * self.horizon:
            raise ValueError(f"n must be less than five times horizon = {self.horizon}; got {n}")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon
