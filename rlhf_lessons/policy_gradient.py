"""The score-function (REINFORCE) gradient and what it is made of: log-probabilities, entropy and returns.

Rewards and log-probabilities are (B, T), a row an episode, a column a step. `gamma` is the discount γ in [0, 1];
log-probabilities and entropies are in nats.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lessons.masking import check_same_shape, full_precision, real_steps


def check_discount(name: str, value: float) -> None:
    """Raise ValueError unless 0 ≤ value ≤ 1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1; got {value}")


def action_log_probs(logits: Tensor, actions: Tensor) -> Tensor:
    """Log-probability of each action that was taken.

        log π(a_t|s_t) = z_t[a_t] − log Σ_v exp z_t[v]                                                  (Eq. 1.1)

    logits z (..., V), actions (...) long -> (...), in nats. Half-precision logits are computed in float32.
    Raises ValueError when the shapes disagree.
    """
    if logits.shape[:-1] != actions.shape:
        raise ValueError(
            f"actions must have the shape of logits without its last dimension, {tuple(logits.shape[:-1])}; "
            f"got {tuple(actions.shape)}"
        )
    loss = F.cross_entropy(full_precision(logits).reshape(-1, logits.shape[-1]), actions.reshape(-1), reduction="none")
    return -loss.view(actions.shape)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each action distribution, the quantity that an entropy bonus rewards.

        H(s_t) = −Σ_v p_v log p_v = logsumexp z_t − Σ_v p_v z_t[v],   p = softmax z_t                   (Eq. 7.6)

    logits (..., V) -> (...), in nats: 0 for a certain choice, log V for a uniform one. A logit of −∞ counts as
    probability 0.
    """
    log_probs = full_precision(logits).log_softmax(dim=-1)
    # A forbidden action has log p = −∞ and p = 0; the limit of p log p is 0, but −∞·0 is NaN.
    log_probs = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def discounted_sum(x: Tensor, carry: Tensor) -> Tensor:
    """Solve y_t = x_t + c_t·y_{t+1} with y_T = 0 for all t at once.

    A doubling scan: after k passes y_t holds the first 2^k terms of the sum and c_t the factor with which the next
    block enters, so log₂ T passes suffice. x, carry: (B, T) -> (B, T). No division, so c may be 0.
    Source: Hillis & Steele 1986, "Data parallel algorithms".
    """
    steps = 1
    while steps < x.shape[-1]:
        x = torch.cat([torch.addcmul(x[..., :-steps], carry[..., :-steps], x[..., steps:]), x[..., -steps:]], dim=-1)
        carry = F.pad(carry[..., :-steps] * carry[..., steps:], (0, steps))
        steps *= 2
    return x


def next_is_real(mask: Tensor) -> Tensor:
    """True where the step after this one belongs to the same episode: (B, T) -> (B, T)."""
    return mask & F.pad(mask[..., 1:], (0, 1), value=False)


def discounted_return(rewards: Tensor, mask: Tensor | None = None, *, gamma: float) -> Tensor:
    """Discounted sum of an episode's rewards, seen from its first step.

        R(τ) = Σ_t γ^t r_t                                                                              (Eq. 3.1)

    rewards, mask (B, T) -> (B,). γ = 1 is allowed: episodes are finite. Raises ValueError for γ outside [0, 1].
    Source: Sutton & Barto 2018, §3.3.
    """
    check_discount("gamma", gamma)
    rewards, mask = full_precision(rewards), real_steps(rewards, mask)
    steps = torch.arange(rewards.shape[1], dtype=rewards.dtype, device=rewards.device)
    discount = torch.full_like(steps, gamma) ** steps
    return (torch.where(mask, rewards, 0) * discount).sum(dim=-1)


def reward_to_go(rewards: Tensor, mask: Tensor | None = None, *, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each step on: what an action can still influence.

        G_t = Σ_{t'≥t} γ^(t'−t) r_t'                                                                    (Eq. 4.1)

    rewards, mask (B, T) -> (B, T), 0 where mask is False. With γ < 1, ∇J needs G_t weighted by γ^t; the usual form
    without it is biased. Raises ValueError for γ outside [0, 1].
    Source: Sutton & Barto 2018, §13.3 (the REINFORCE box).
    """
    check_discount("gamma", gamma)
    mask = real_steps(rewards, mask)
    rewards = torch.where(mask, full_precision(rewards), 0)
    return discounted_sum(rewards, gamma * next_is_real(mask).to(rewards.dtype))


def policy_gradient_loss(log_probs: Tensor, weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """The loss whose gradient estimates −∇J: descending it ascends J.

        L = −(1/B) Σ_b Σ_t log π(a_t|s_t) · w_t                                                         (Eq. 3.3)

    log_probs, weights, mask (B, T) -> (). Summed over time and averaged over episodes, so that its gradient is that
    of the expected return and not of a return per token. The weights (returns, advantages) are held constant:
    no gradient flows into them. Raises ValueError when the shapes disagree.
    Source: Williams 1992, "Simple statistical gradient-following algorithms".
    """
    check_same_shape(log_probs=log_probs, weights=weights)
    mask = real_steps(log_probs, mask)
    # Both factors are masked: 0·NaN would be NaN.
    terms = torch.where(mask, full_precision(log_probs), 0) * torch.where(mask, full_precision(weights.detach()), 0)
    return -terms.sum() / log_probs.shape[0]
