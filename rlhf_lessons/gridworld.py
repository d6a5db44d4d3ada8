"""A small grid as a finite Markov decision process whose every quantity is known exactly.

The agent walks a text map, may slip sideways, pays for each step and ends at a goal or in a pit.
Transitions and rewards are tensors, so V, Q, A, J and ∇J come from a linear solve (infinite
horizon) or from backward induction (finite horizon); the tiniest grids also list every trajectory.
Nothing here imports an estimator of the package.

Shapes: S states (the cells that are not walls, in reading order), A actions, T = `horizon` steps,
B trajectories. A policy is a tensor of probabilities (S, A). All floats are float64.

Two horizons, never mixed. `horizon=None`: the episode lasts until a terminal state, and values do
not depend on time. `horizon=T`: it also ends after T steps, the value of what lies beyond is 0, and
values carry a time axis in front: `V[torch.arange(T), states]` is the value at each step of sampled
`states` (B, T), `Q[torch.arange(T), states, actions]` that of each action.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}

GRIDS = {
    # Russell & Norvig, "Artificial Intelligence: A Modern Approach", the 4x3 world, chapter 17.
    "four_by_three": dict(text="...G\n.#.P\nS...", slip=0.2, step_reward=-0.04, gamma=1.0),
    # A longer walk beside pits: the short way is the risky one.
    "cliff": dict(text=".....\n.....\n..#..\nSPPPG", slip=0.1, step_reward=-0.04, gamma=0.95),
    # These two are small enough for `enumerate_trajectories`.
    "two_by_two": dict(text="S.\nPG", slip=0.2, step_reward=-0.1, gamma=0.9),
    "corridor": dict(text="S.G", slip=0.2, step_reward=-0.1, gamma=0.9, actions=("left", "right")),
}


@dataclass(frozen=True)
class Trajectories:
    """A batch of walks, in the shapes that the estimators take; entries are 0 where mask is False.

    `terminated` marks the step that enters a terminal state; a row without one was cut off by the
    horizon. `env_log_prob` = log p0(s_0) + Σ_t log P(s_{t+1}|s_t, a_t) is the environment's share.
    """

    states: Tensor  # (B, T) long
    actions: Tensor  # (B, T) long
    rewards: Tensor  # (B, T)
    next_states: Tensor  # (B, T) long
    mask: Tensor  # (B, T) bool
    terminated: Tensor  # (B, T) bool
    env_log_prob: Tensor  # (B,)

    def __len__(self) -> int:
        return len(self.states)

    @property
    def final_states(self) -> Tensor:
        """State after each row's last real step, (B,): where a bootstrap value belongs."""
        last = self.mask.sum(dim=1, keepdim=True) - 1
        return self.next_states.gather(1, last).squeeze(1)

    def log_prob(self, log_policy: Tensor) -> Tensor:
        """log P(τ|π) = log p0(s_0) + Σ_t [log P(s_{t+1}|s_t,a_t) + log π(a_t|s_t)].

        Shapes: log_policy (S, A), or (T, S, A) for a policy that depends on time -> (B,).
        Source: Sutton & Barto 2018, section 5.5.
        """
        time = torch.arange(self.states.shape[1])
        log_policy = log_policy.expand(len(time), *log_policy.shape[-2:])
        chosen = log_policy[time, self.states, self.actions]
        return self.env_log_prob + torch.where(self.mask, chosen, 0.0).sum(dim=1)


class GridWorld:
    """A finite Markov decision process on a text map.

    Cells: S start (several: uniform), G goal and P pit (terminal), # wall, . floor. A step into a
    wall or over the edge stays in place. With probability `slip` the agent moves at a right angle
    to where it wanted to go, each side equally often. The reward of a step is `step_reward`, plus
    `goal_reward` or `pit_reward` when it enters that cell. A terminal state leads to itself for 0.

    Attributes: num_states S, num_actions A, transition P(s'|s,a) (S, A, S), rewards r(s,a,s')
    (S, A, S), start (S,), terminal (S,) bool, gamma, actions (names), moves (A, 2) and coordinates
    (S, 2) as (row, column), walls (rows, columns) bool, text.
    Raises: ValueError on a ragged or unknown map, no start or goal, or a number out of range.
    """

    def __init__(
        self, text: str, *, slip: float = 0.0, step_reward: float = 0.0, goal_reward: float = 1.0,
        pit_reward: float = -1.0, gamma: float = 0.95, actions: tuple[str, ...] = tuple(MOVES),
    ) -> None:  # fmt: skip
        _check_map(text)
        _check_settings(slip, gamma, actions)
        self.text, self.gamma, self.actions = text, gamma, tuple(actions)
        lines = text.splitlines()
        cells = [(r, c) for r, line in enumerate(lines) for c, x in enumerate(line) if x != "#"]
        symbols = [lines[r][c] for r, c in cells]
        self.num_states, self.num_actions = len(cells), len(self.actions)
        self.coordinates = torch.tensor(cells)
        self.moves = torch.tensor([MOVES[action] for action in actions])
        self.walls = torch.tensor([[x == "#" for x in line] for line in lines])
        self.terminal = torch.tensor([x in "GP" for x in symbols])
        starts = torch.tensor([x == "S" for x in symbols]).double()
        self.start = starts / starts.sum()
        self.transition = _transition(cells, self.terminal, self.actions, slip)
        bonus = {"G": goal_reward, "P": pit_reward}
        arrival = torch.tensor([bonus.get(x, 0.0) for x in symbols], dtype=torch.float64)
        leaving = (~self.terminal).double()[:, None, None]
        self.rewards = ((step_reward + arrival) * leaving).expand_as(self.transition)

    @classmethod
    def named(cls, name: str, **overrides: float | str | tuple[str, ...]) -> "GridWorld":
        """One of `GRIDS`: "four_by_three", "cliff", "two_by_two" or "corridor"."""
        if name not in GRIDS:
            raise ValueError(f"name must be one of {', '.join(GRIDS)}; got {name!r}")
        return cls(**{**GRIDS[name], **overrides})

    def __repr__(self) -> str:
        return f"GridWorld(gamma={self.gamma})\n{self.text}"

    def uniform_policy(self) -> Tensor:
        """Every action equally likely, (S, A)."""
        return torch.full((self.num_states, self.num_actions), 1 / self.num_actions, dtype=torch.float64)

    def policy_evaluation(self, policy: Tensor, *, horizon: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Exact values of a policy, by one linear solve or, with a horizon, backward induction.

        V = (I − γ P_π)⁻¹ r_π,   Q(s,a) = Σ_s' P(s'|s,a) [r(s,a,s') + γ V(s')],
        A(s,a) = Q(s,a) − V(s)                                          (Eq. 4.2)

        where P_π and r_π average over a ~ π(·|s). With a horizon T the same Bellman equation runs
        backward in time from V_T = 0. Terminal states have value 0. Differentiable in the policy.

        Shapes: policy (S, A) -> V (S,), Q (S, A), A (S, A). With a horizon, policy (S, A) or
        (T, S, A) -> V (T, S), Q (T, S, A), A (T, S, A).
        Raises: ValueError if the policy is not one, or γ = 1 and the episode may never end.
        Source: Sutton & Barto 2018, section 3.5 (Bellman equation) and 4.1 (the linear system).
        """
        policy = self._checked_policy(policy, horizon)
        if horizon is None:
            step, reward = self._policy_chain(policy)
            identity = torch.eye(self.num_states, dtype=torch.float64)
            v = torch.linalg.solve(identity - self.gamma * step, reward)
            q = self._backup(v)
            return v, q, q - v.unsqueeze(-1)
        v, values, action_values = torch.zeros_like(self.start), [], []
        for t in reversed(range(horizon)):
            q = self._backup(v)
            v = (policy[t] * q).sum(dim=-1)
            values.append(v)
            action_values.append(q)
        v, q = torch.stack(values[::-1]), torch.stack(action_values[::-1])
        return v, q, q - v.unsqueeze(-1)

    def objective(self, policy: Tensor, *, horizon: int | None = None) -> Tensor:
        """J(π) = Σ_s p0(s) V(s), exact and differentiable: (S, A) -> ()."""
        values = self.policy_evaluation(policy, horizon=horizon)[0]
        return self.start @ (values if horizon is None else values[0])

    def objective_gradient(self, logits: Tensor, *, horizon: int | None = None) -> Tensor:
        """∇J of the softmax policy at its logits, by autograd through the exact J.

        Shapes: logits (S, A), or (T, S, A) with a horizon -> the same shape.
        Source: Sutton & Barto 2018, section 13.1.
        """
        logits = logits.detach().double().requires_grad_()
        with torch.enable_grad():
            objective = self.objective(logits.softmax(dim=-1), horizon=horizon)
        return torch.autograd.grad(objective, logits)[0]

    def discounted_visitation(self, policy: Tensor, *, horizon: int | None = None) -> Tensor:
        """How often the policy acts in each state, discounted: γ^t P(s_t = s), 0 at terminals.

        Summed over all t for `horizon=None`, (S,); with a horizon one row per step, (T, S). With
        it ∇J = Σ_s d(s) Σ_a ∇π(a|s) Q(s,a).
        Source: Sutton & Barto 2018, section 13.2 (the policy gradient theorem; η(s) on p. 199).
        """
        policy = self._checked_policy(policy, horizon)
        if horizon is None:
            step, _ = self._policy_chain(policy)
            identity = torch.eye(self.num_states, dtype=torch.float64)
            visits = torch.linalg.solve((identity - self.gamma * step).T, self.start)
            return torch.where(self.terminal, 0.0, visits)
        visits = [self.start]
        for t in range(horizon - 1):
            visits.append(self.gamma * visits[-1] @ self._policy_chain(policy[t])[0])
        return torch.where(self.terminal, 0.0, torch.stack(visits))

    def optimal_values(
        self, *, horizon: int | None = None, tolerance: float = 1e-12, max_sweeps: int = 100_000
    ) -> tuple[Tensor, Tensor]:
        """V* and Q* by value iteration; `Q.argmax(-1)` is an optimal policy.

        V(s) ← max_a Σ_s' P(s'|s,a) [r(s,a,s') + γ V(s')], until no value moves by `tolerance`, or
        exactly `horizon` times.

        Returns: V (S,), Q (S, A); with a horizon V (T, S), Q (T, S, A).
        Raises: ValueError if `max_sweeps` are too few, as with γ = 1 and a reward for never ending.
        Source: Sutton & Barto 2018, section 4.4.
        """
        v = torch.zeros_like(self.start)
        if horizon is not None:
            _check_at_least_one("horizon", horizon)
            sweeps = [self._backup(v)]
            for _ in range(horizon - 1):
                sweeps.append(self._backup(sweeps[-1].amax(dim=-1)))
            q = torch.stack(sweeps[::-1])
            return q.amax(dim=-1), q
        for _ in range(max_sweeps):
            q = self._backup(v)
            change = (q.amax(dim=-1) - v).abs().max()
            v = q.amax(dim=-1)
            if change < tolerance:
                return v, q
        raise ValueError(f"max_sweeps must be enough for the values to converge; got {max_sweeps}, and with gamma "
                         f"{self.gamma} they may never")  # fmt: skip

    @torch.no_grad()
    def sample(self, policy: Tensor, n: int, *, horizon: int, generator: torch.Generator | None = None) -> Trajectories:
        """Walks n times from the start: a batch (n, T), each row until terminal or the horizon.

        Shapes: policy (S, A) or (T, S, A).
        Raises: ValueError if the policy is not one or a size is below 1.
        """
        _check_at_least_one("n", n)
        _check_at_least_one("horizon", horizon)
        policy = self._checked_policy(policy, horizon)
        state = torch.multinomial(self.start, n, replacement=True, generator=generator)
        steps = []
        for t in range(horizon):
            action = torch.multinomial(policy[t][state], 1, generator=generator).squeeze(1)
            after = torch.multinomial(self.transition[state, action], 1, generator=generator).squeeze(1)
            steps.append(torch.stack([state, action, after], dim=-1))
            state = after
        return self._trajectories(torch.stack(steps, dim=1))

    def enumerate_trajectories(self, horizon: int, *, max_trajectories: int = 1_000_000) -> Trajectories:
        """Every walk of at most `horizon` steps that the environment allows, each once.

        P(τ|π) is `trajectories.log_prob(log_policy).exp()`; it sums to 1 for any policy.

        Returns: trajectories (N, T), in no promised order.
        Raises: ValueError if there are more than `max_trajectories`.
        """
        _check_at_least_one("horizon", horizon)
        edges = (self.transition > 0).nonzero()  # (E, 3): s, a, s'
        state = self.start.nonzero().flatten()
        paths = torch.empty(len(state), 0, 3, dtype=torch.long)
        for _ in range(horizon):
            # An ended walk takes one idle step, which the mask removes.
            allowed = ~self.terminal[edges[:, 0]] | (edges[:, 1] == 0)
            matches = (state[:, None] == edges[:, 0]) & allowed
            if (count := int(matches.sum())) > max_trajectories:
                raise ValueError(f"horizon must give at most {max_trajectories} trajectories; got at least {count}")
            row, edge = matches.nonzero(as_tuple=True)
            paths = torch.cat([paths[row], edges[edge].unsqueeze(1)], dim=1)
            state = edges[edge, 2]
        return self._trajectories(paths)

    def _trajectories(self, steps: Tensor) -> Trajectories:
        """Reads rewards, flags and probabilities off the tables: steps (B, T, 3) of s, a, s'."""
        mask = ~self.terminal[steps[..., 0]]
        s, a, after = torch.where(mask.unsqueeze(-1), steps, 0).unbind(dim=-1)
        log_moves = torch.where(mask, self.transition[s, a, after].log(), 0.0)
        rewards = torch.where(mask, self.rewards[s, a, after], 0.0)
        return Trajectories(
            states=s, actions=a, rewards=rewards, next_states=after, mask=mask,
            terminated=mask & self.terminal[after], env_log_prob=self.start[s[:, 0]].log() + log_moves.sum(dim=1),
        )  # fmt: skip

    def _backup(self, values: Tensor) -> Tensor:
        """One step of look-ahead: Q(s,a) from the values of the next states, (S,) -> (S, A)."""
        return (self.transition * (self.rewards + self.gamma * values)).sum(dim=-1)

    def _policy_chain(self, policy: Tensor) -> tuple[Tensor, Tensor]:
        """P_π (S, S) and r_π (S,); nothing leaves a terminal state, so that γ = 1 can be solved."""
        step = torch.einsum("sa,sap->sp", policy, self.transition)
        reward = torch.einsum("sa,sap,sap->s", policy, self.transition, self.rewards)
        return torch.where(self.terminal[:, None], 0.0, step), reward

    def _checked_policy(self, policy: Tensor, horizon: int | None) -> Tensor:
        """The policy in float64, with a time axis if there is a horizon."""
        shape = (self.num_states, self.num_actions)
        timed = horizon is not None and policy.shape == (horizon, *shape)
        if policy.shape != shape and not timed:
            raise ValueError(f"policy must have shape {shape}; got {tuple(policy.shape)}")
        policy = policy.double()
        valid = (policy >= 0).all(-1) & ((policy.sum(-1) - 1).abs() < 1e-6)
        if not valid.all():
            where = (~valid).nonzero()[0].tolist()
            found = policy[tuple(where)].tolist()
            raise ValueError(f"policy must be probabilities in each row; got {found} in row {where}")
        if horizon is not None:
            _check_at_least_one("horizon", horizon)
            return policy.expand(horizon, *shape)
        if self.gamma == 1:
            self._check_ends(policy)
        return policy

    def _check_ends(self, policy: Tensor) -> None:
        """With γ = 1 a value exists only where the policy can reach a terminal state."""
        step, _ = self._policy_chain(policy.detach())
        ends = self.terminal
        for _ in range(self.num_states):
            ends = ends | (step[:, ends].sum(dim=1) > 0)
        if not ends.all():
            stuck = (~ends).nonzero()[0].item()
            raise ValueError(f"policy must reach an end from every state, as gamma is 1; got no way from state {stuck}")


def _transition(cells: list[tuple[int, int]], terminal: Tensor, actions: tuple[str, ...], slip: float) -> Tensor:
    """P(s'|s,a), (S, A, S)."""
    index = {cell: s for s, cell in enumerate(cells)}
    transition = torch.zeros(len(cells), len(actions), len(cells), dtype=torch.float64)
    for s, (row, column) in enumerate(cells):
        for a, action in enumerate(actions):
            if terminal[s]:
                transition[s, a, s] = 1.0
                continue
            dr, dc = MOVES[action]
            outcomes = [(1 - slip, (dr, dc)), (slip / 2, (dc, dr)), (slip / 2, (-dc, -dr))]
            for chance, (down, right) in outcomes:
                transition[s, a, index.get((row + down, column + right), s)] += chance
    return transition


def _check_map(text: str) -> None:
    lines = text.splitlines()
    if len({len(line) for line in lines}) != 1:
        raise ValueError(f"text must have lines of one length; got {[len(x) for x in lines]}")
    unknown = set(text) - set("SGP#.\n")
    if unknown:
        raise ValueError(f"text must hold only the cells S G P # and .; got {sorted(unknown)}")
    for cell, meaning in (("S", "start"), ("G", "goal")):
        if cell not in text:
            raise ValueError(f"text must have a {meaning} cell {cell}; got {text!r}")


def _check_settings(slip: float, gamma: float, actions: tuple[str, ...]) -> None:
    for name, value in (("slip", slip), ("gamma", gamma)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1; got {value}")
    if not actions or len(set(actions)) < len(actions) or not set(actions) <= set(MOVES):
        raise ValueError(f"actions must be distinct names among {tuple(MOVES)}; got {actions}")


def _check_at_least_one(name: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{name} must be at least 1; got {size}")
