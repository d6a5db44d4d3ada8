"""How much better an action was than the critic expected: TD residuals, n-step advantages, GAE.

Arguments, the same in every function here: `rewards`, `values`, `mask`, `terminated` are (B, T); values[b, t] is
V(s_t), the state in which action t is taken. A row is one episode unless `terminated` marks ends within it. After a
terminated step, and after a row's last real one, the next value is 0; `bootstrap_value` (B,) replaces that 0 after
the last real step of rows that were cut off rather than terminated. `gamma` γ and `lam` λ lie in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lessons.masking import check_same_shape, full_precision, real_steps
from rlhf_lessons.policy_gradient import check_discount, discounted_sum, next_is_real


def continues(mask: Tensor, terminated: Tensor | None) -> Tensor:
    """True where the recursion reaches into the next step: it is real and this one is not terminal. (B, T)."""
    return next_is_real(mask) if terminated is None else next_is_real(mask) & ~terminated


def next_values(values: Tensor, mask: Tensor, terminated: Tensor | None, bootstrap_value: Tensor | None) -> Tensor:
    """V(s_{t+1}) as it enters the TD residual: 0 after an end, the bootstrap after a cut. (B, T) -> (B, T)."""
    following = torch.where(continues(mask, terminated), F.pad(values[:, 1:], (0, 1)), 0)
    if bootstrap_value is None:
        return following
    if bootstrap_value.shape != values.shape[:1]:
        batch = tuple(values.shape[:1])
        raise ValueError(f"bootstrap_value must be (B,) = {batch}; got {tuple(bootstrap_value.shape)}")
    real_from_here = mask.long().flip(-1).cumsum(dim=-1).flip(-1)
    is_last = mask & (real_from_here == 1)
    bootstrapped = is_last if terminated is None else is_last & ~terminated
    return torch.where(bootstrapped, bootstrap_value[:, None], following)


def td_residuals(
    rewards: Tensor, values: Tensor, mask: Tensor | None = None, *,
    gamma: float, terminated: Tensor | None = None, bootstrap_value: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One step's surprise: what came plus what is now expected, minus what was expected.

        δ_t = r_t + γ V(s_{t+1}) − V(s_t)                                                               (Eq. 5.1)

    Shapes and ends as in the module's docstring; returns (B, T), 0 where mask is False. An unbiased estimate of
    A(s_t, a_t) when V is the policy's own value function. Raises ValueError for unequal shapes or γ outside [0, 1].
    Source: Sutton & Barto 2018, §6.1.
    """
    check_discount("gamma", gamma)
    check_same_shape(rewards=rewards, values=values, terminated=terminated)
    rewards, values, mask = full_precision(rewards), full_precision(values), real_steps(rewards, mask)
    following = next_values(values, mask, terminated, bootstrap_value)
    return torch.where(mask, rewards + gamma * following - values, 0)


def n_step_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor | None = None, *,
    gamma: float, n: int, terminated: Tensor | None = None, bootstrap_value: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Look n steps ahead, then trust the critic.

        A⁽ⁿ⁾_t = Σ_{k<n} γ^k r_{t+k} + γⁿ V(s_{t+n}) − V(s_t) = Σ_{k<n} γ^k δ_{t+k}                     (Eq. 5.2)

    Sums stop at the episode's end, so A⁽ⁿ⁾ is the Monte Carlo advantage for n ≥ what remains. Shapes and ends as in the
    module's docstring; returns (B, T), 0 where mask is False. Raises ValueError for n < 1.
    Source: Schulman et al. 2016, "High-dimensional continuous control using GAE", Eq. 11-14.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    residuals = td_residuals(rewards, values, mask, gamma=gamma, terminated=terminated, bootstrap_value=bootstrap_value)
    carry = gamma * continues(real_steps(rewards, mask), terminated).to(residuals.dtype)
    total = residuals
    for _ in range(min(n, rewards.shape[1]) - 1):
        total = residuals + carry * F.pad(total[:, 1:], (0, 1))
    return total


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None = None, *,
    gamma: float, lam: float, terminated: Tensor | None = None, bootstrap_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Generalised advantage estimation, all steps at once.

        Â_t = Σ_k (γλ)^k δ_{t+k},   R̂_t = Â_t + V(s_t)                                                  (Eq. 5.3)

    λ = 0 is the TD residual, λ = 1 the Monte Carlo return minus V. Shapes and ends as in the module's docstring;
    returns (advantages, returns), each (B, T), 0 where mask is False. Raises ValueError for unequal shapes, γ or λ
    outside [0, 1]. A doubling scan in log₂ T passes; `gae_recursion` is the definition, and its oracle.
    Source: Schulman et al. 2016, "High-dimensional continuous control using GAE", Eq. 16.
    """
    check_discount("lam", lam)
    residuals = td_residuals(rewards, values, mask, gamma=gamma, terminated=terminated, bootstrap_value=bootstrap_value)
    mask = real_steps(rewards, mask)
    advantages = discounted_sum(residuals, gamma * lam * continues(mask, terminated).to(residuals.dtype))
    return advantages, torch.where(mask, advantages + values, 0)


def gae_recursion(
    rewards: Tensor, values: Tensor, mask: Tensor | None = None, *,
    gamma: float, lam: float, terminated: Tensor | None = None, bootstrap_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Generalised advantage estimation as its recursion is written, from the last step back.

        Â_t = δ_t + γλ Â_{t+1},   Â after an episode's end = 0                                          (Eq. 5.4)

    Arguments, results and errors as in `gae`.
    Source: Schulman et al. 2016, "High-dimensional continuous control using GAE", Eq. 16.
    """
    check_discount("lam", lam)
    delta = td_residuals(rewards, values, mask, gamma=gamma, terminated=terminated, bootstrap_value=bootstrap_value)
    mask = real_steps(rewards, mask)
    same_episode = continues(mask, terminated)
    advantages = torch.zeros_like(delta)
    following = torch.zeros_like(delta[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = delta[:, t] + gamma * lam * torch.where(same_episode[:, t], following, 0)
        advantages[:, t] = following
    return advantages, torch.where(mask, advantages + values, 0)
