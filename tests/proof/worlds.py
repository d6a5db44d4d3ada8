"""Worlds small enough to list everything that can happen in them.

A `World` is a list of all N episodes with their exact probabilities, and what the oracle says of it: J, ∇J, V and Q.
The policy is tabular, a row of logits for each state, so a gradient is compared state by state: a policy that shares
parameters between states has a gradient that is a linear image of this one.

The oracle's side (`objective`, `gradient`, `v`, `q`, `probs`) calls no estimator of the package: it is autograd through
the sum over all sequences for language models, and backward induction for gridworlds. The estimator's side,
`expected_gradient`, hands the package's loss every episode at once, each weighted by how often it occurs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lessons.exact import (
    TabularPolicy,
    enumerate_sequences,
    exact_expectation,
    exact_values,
    prefix_ids,
)
from rlhf_lessons.gridworld import GridWorld
from rlhf_lessons.policy_gradient import action_log_probs, policy_gradient_loss


@dataclass(frozen=True, eq=False)
class World:
    """N episodes of at most T steps, A actions; `logits` (S, A) is the parameter θ, a leaf that requires grad."""

    name: str
    gamma: float
    logits: Tensor
    rows: Tensor  # (N, T) row of `logits` in which each step acts
    actions: Tensor  # (N, T)
    mask: Tensor  # (N, T)
    rewards: Tensor  # (N, T)
    states: Tensor  # (N, T) a number for each state; steps at different times are different states
    probs: Tensor  # (N,) P(τ|θ), exact, constant
    objective: Tensor  # () J(θ)
    gradient: Tensor  # (S, A) ∇J(θ)
    v: Tensor  # (N, T)
    q: Tensor  # (N, T)
    fixed_length: bool

    @property
    def discounts(self) -> Tensor:
        """γ^t, (T,)."""
        return self.gamma ** torch.arange(self.mask.shape[1], dtype=torch.float64)

    def log_probs(self, logits: Tensor | None = None) -> Tensor:
        """log π(a_t|s_t) by the package's function, (N, T), differentiable in the logits."""
        return action_log_probs((self.logits if logits is None else logits)[self.rows], self.actions)

    def random_by_state(self, seed: int = 0) -> Tensor:
        """A random number for each state, N(0, 1), read at each step: (N, T)."""
        return torch.randn(int(self.states.max()) + 1, generator=seeded(seed), dtype=torch.float64)[self.states]

    def expected_given(self, x: Tensor, *, action: bool = False) -> Tensor:
        """E[x_t | s_t], or with `action` E[x_t | s_t, a_t]: the mean over all episodes that pass there, (N, T)."""
        ids = self.states * self.logits.shape[1] + self.actions if action else self.states
        ids = ids.masked_fill(~self.mask, int(ids.max()) + 1)  # what is masked makes a group of its own
        weights = self.probs[:, None].expand_as(x)
        zeros = torch.zeros(int(ids.max()) + 1, dtype=torch.float64)
        total = zeros.index_add(0, ids.flatten(), (weights * x).flatten())
        share = zeros.index_add(0, ids.flatten(), weights.flatten())
        return torch.where(self.mask, (total / share)[ids], 0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def language_world(
    vocab_size: int, length: int, eos_id: int | None = None, *, gamma: float = 1.0, seed: int = 0
) -> World:
    """A language model with a random logit and a random reward N(0, 1) for every token after every prefix."""
    generator = seeded(seed)
    policy = TabularPolicy(vocab_size, length, eos_id=eos_id, generator=generator)
    sequences, mask = policy.enumerate()
    ids = prefix_ids(sequences)
    states = ids[:, :-1] + torch.arange(length) * len(sequences)
    table = torch.randn(length, len(sequences), generator=generator, dtype=torch.float64)
    rewards = torch.where(mask, table.gather(1, ids[:, 1:].T).T, 0)
    return finish_language_world(policy, sequences, mask, states, rewards, gamma)


def finish_language_world(policy, sequences, mask, states, rewards, gamma) -> World:
    """Ask the oracle about a policy and the rewards (N, T) of its sequences."""
    returns = (rewards * gamma ** torch.arange(rewards.shape[1], dtype=torch.float64)).sum(dim=1)
    objective = exact_expectation(policy.sequence_log_prob, returns, sequences)
    (gradient,) = torch.autograd.grad(objective, policy.logits)
    v, q, _ = exact_values(policy.log_probs(sequences).detach(), rewards, sequences, mask, gamma=gamma)
    length = policy.length
    return World(
        name=f"language V={policy.vocab_size} L={length} eos={policy.eos_id} gamma={gamma}",
        gamma=gamma,
        logits=policy.logits,
        rows=policy.rows(sequences),
        actions=sequences,
        mask=mask,
        rewards=rewards,
        states=states,
        probs=policy.sequence_log_prob(sequences).exp().detach(),
        objective=objective.detach(),
        gradient=gradient,
        v=v,
        q=q,
        fixed_length=bool(mask.all()),
    )


@functools.cache
def grid_world(name: str, horizon: int, *, gamma: float, seed: int = 0) -> World:
    """Every walk of a gridworld that slips, cut off after `horizon` steps; a random policy."""
    grid = GridWorld.named(name, gamma=gamma)
    logits = torch.randn(grid.num_states, grid.num_actions, generator=seeded(seed), dtype=torch.float64)
    logits.requires_grad_()
    walks = grid.enumerate_trajectories(horizon)
    policy = logits.detach().softmax(dim=-1)
    v, q, _ = grid.policy_evaluation(policy, horizon=horizon)
    time = torch.arange(horizon)
    return World(
        name=f"grid {name} T={horizon} gamma={gamma}",
        gamma=gamma,
        logits=logits,
        rows=walks.states,
        actions=walks.actions,
        mask=walks.mask,
        rewards=walks.rewards,
        states=walks.states + time * grid.num_states,
        probs=walks.log_prob(policy.log()).exp(),
        objective=grid.objective(policy, horizon=horizon),
        gradient=grid.objective_gradient(logits, horizon=horizon),
        v=torch.where(walks.mask, v[time, walks.states], 0),
        q=torch.where(walks.mask, q[time, walks.states, walks.actions], 0),
        fixed_length=False,
    )


SHAPES = [(3, 5, None), (3, 5, 2), (4, 4, None), (4, 4, 0), (5, 3, None), (5, 3, 4), (6, 2, None), (6, 5, 1)]
GRIDS = [("corridor", 6), ("two_by_two", 4)]
GAMMAS = [1.0, 0.9, 0.5]


def language_worlds(*, gammas=GAMMAS, seeds=range(3), fixed_length: bool | None = None) -> list[World]:
    """Vocabulary 3 to 6, length 2 to 5, with and without EOS, three random policies each."""
    worlds = [language_world(*shape, gamma=g, seed=seed) for shape in SHAPES for g in gammas for seed in seeds]
    return [world for world in worlds if fixed_length in (None, world.fixed_length)]


def all_worlds(*, gammas=GAMMAS) -> list[World]:
    """The language models, and two gridworlds that slip."""
    grids = [grid_world(*grid, gamma=g, seed=seed) for grid in GRIDS for g in gammas for seed in range(2)]
    return language_worlds(gammas=gammas) + grids


def expected_gradient(world: World, weights: Tensor, *, probs: Tensor | None = None) -> Tensor:
    """E[Σ_t w_t ∇log π(a_t|s_t)], exactly, by one call of the package's `policy_gradient_loss`; the sign is ∇J's.

    The loss averages over its rows, so row n is given N·P(n) times its weights. weights (N, T); `probs` (N,) replaces
    the policy's own probabilities where another policy sampled.
    """
    probs = world.probs if probs is None else probs
    weights = weights * (len(probs) * probs)[:, None]
    loss = policy_gradient_loss(world.log_probs(), weights, world.mask)
    return -torch.autograd.grad(loss, world.logits)[0]


def single_gradients(world: World, weights: Tensor) -> Tensor:
    """What the package's loss gives for each episode alone: one-sample estimates of ∇J, (N, S·A)."""
    # Each episode gets a copy of θ of its own, so one backward pass tells their gradients apart.
    logits = world.logits.detach()[world.rows].requires_grad_()  # (N, T, A)
    loss = len(weights) * policy_gradient_loss(action_log_probs(logits, world.actions), weights, world.mask)
    by_step = -torch.autograd.grad(loss, logits)[0]
    rows = world.rows[..., None].expand_as(by_step)
    return by_step.new_zeros(len(weights), *world.logits.shape).scatter_add(1, rows, by_step).flatten(1)


def moments(world: World, estimates: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean (D,) and total variance () of one-sample estimates (N, D)."""
    mean = (world.probs[:, None] * estimates).sum(dim=0)
    return mean, (world.probs * (estimates - mean).square().sum(dim=1)).sum()


def batches(world: World, size: int) -> tuple[Tensor, Tensor]:
    """Every batch of `size` independent episodes: their numbers (M, size) and probabilities (M,)."""
    numbers, _ = enumerate_sequences(len(world.probs), size)
    return numbers, world.probs[numbers].prod(dim=1)


def expected_batch_gradient(world: World, size: int, weights_of: Callable[[Tensor], Tensor]) -> Tensor:
    """E[(1/K) Σ_k Σ_t w_kt ∇log π] where the weights (K, T) of a batch may depend on all of it.

    weights_of: the numbers (K,) of a batch's episodes -> (K, T) or (K, 1).
    """
    total = torch.zeros_like(world.rewards)
    for numbers, prob in zip(*batches(world, size), strict=True):
        total.index_add_(0, numbers, (prob / size * weights_of(numbers)).expand(size, total.shape[1]))
    return expected_gradient(world, total, probs=torch.ones_like(world.probs))
