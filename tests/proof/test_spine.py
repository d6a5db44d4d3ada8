"""Spine. From the policy gradient theorem to the clip: what a surrogate from an old policy's samples leaves out, and
what bounds it, on grids (every state and step) and on text worlds that are listed completely.
"""

import functools
import itertools

import pytest
import torch

from proof.worlds import language_worlds, seeded
from rlhf_lessons.exact import TabularPolicy, exact_values
from rlhf_lessons.gridworld import GridWorld
from rlhf_lessons.importance import importance_mean, importance_ratio
from rlhf_lessons.kl import exact_kl
from rlhf_lessons.policy_gradient import action_log_probs
from rlhf_lessons.ppo import policy_terms

STEPS = (0.01, 0.1, 0.5, 1.0, 3.0)


class Pair:
    """An old and a new policy on a grid of finite horizon T, and what the oracle says of both."""

    def __init__(self, name: str, horizon: int, gamma: float, seed: int, size: float) -> None:
        self.grid, self.horizon, self.gamma = GridWorld.named(name, gamma=gamma), horizon, gamma
        shape = (self.grid.num_states, self.grid.num_actions)
        start, step = (torch.randn(shape, generator=seeded(s), dtype=torch.float64) for s in (seed, seed + 100))
        self.old_logits, self.new_logits = start, start + size * step
        self.old, self.new = self.old_logits.softmax(-1), self.new_logits.softmax(-1)
        self.advantage = self.grid.policy_evaluation(self.old, horizon=horizon)[2]  # (T, S, A)
        self.visits_old, self.visits_new = (self.visits(policy) for policy in (self.old, self.new))
        self.gain = (self.new * self.advantage).sum(-1)  # (T, S)

    def visits(self, policy):
        return self.grid.discounted_visitation(policy, horizon=self.horizon)

    @property
    def change(self):
        return self.grid.objective(self.new, horizon=self.horizon) - self.grid.objective(self.old, horizon=self.horizon)

    @property
    def lemma(self):
        return (self.visits_new * self.gain).sum()

    @property
    def surrogate(self):
        """E_old[Σ_t γ^t ρ_t A_t], with the package's ratio."""
        ratio = importance_ratio(self.new.log(), self.old.log())
        return (self.visits_old[..., None] * self.old * ratio * self.advantage).sum()

    @property
    def alpha(self):
        """Largest total variation distance between both policies' actions in a state."""
        return (self.new - self.old).abs().sum(-1)[~self.grid.terminal].max() / 2

    @property
    def bound(self):
        """4 α² max|A| Σ_t t γ^t."""
        weight = sum(t * self.gamma**t for t in range(self.horizon))
        return 4 * self.alpha**2 * self.advantage.abs().max() * weight


@functools.cache
def pairs() -> list[Pair]:
    worlds = [("four_by_three", 20), ("cliff", 12), ("two_by_two", 6)]
    return [
        Pair(name, horizon, gamma, seed, size)
        for (name, horizon), gamma, seed, size in itertools.product(worlds, (1.0, 0.9), range(2), STEPS)
    ]


def test_policy_gradient_theorem(claim):
    exact, obtained = [], []
    for pair in pairs():
        logits = pair.old_logits.clone().requires_grad_()
        value = (pair.visits_old * (logits.softmax(-1) * pair.advantage).sum(-1)).sum()
        obtained.append(torch.autograd.grad(value, logits)[0])
        exact.append(pair.grid.objective_gradient(pair.old_logits, horizon=pair.horizon))
    text = "∇J = Σ_t Σ_s γ^t P(s_t = s) Σ_a ∇π(a|s) A(s, a): how often a state is met is not differentiated"
    claim.equal("spine.theorem", text, exact, obtained)


def test_performance_difference_lemma_on_grids(claim):
    text = "J_new − J_old is the mean, over the new policy's walks, of the old policy's advantages"
    claim.equal("spine.lemma", text, [p.change for p in pairs()], [p.lemma for p in pairs()])
    far = [p for p in pairs() if p.alpha > 0.1]
    text = "over the old policy's states, as in the surrogate, it is not"
    claim.biased("spine.surrogate", text, [p.change for p in far], [p.surrogate for p in far], 1e-5)
    left_out = [((p.visits_new - p.visits_old) * p.gain).sum() for p in pairs()]
    text = "what the surrogate leaves out is the change of the visits times what the new policy gains there"
    claim.equal("spine.left_out", text, [p.change - p.surrogate for p in pairs()], left_out)


def test_performance_difference_lemma_on_texts(claim):
    exact, obtained = [], []
    for world in language_worlds(gammas=[1.0, 0.5], seeds=range(1)):
        step = torch.randn(world.logits.shape, generator=seeded(5), dtype=torch.float64)
        now = torch.where(world.mask, world.log_probs(world.logits.detach() + step), 0).sum(1).exp()
        discounts = world.discounts
        exact.append((now - world.probs) @ (world.rewards * discounts).sum(1))
        obtained.append(now @ torch.where(world.mask, discounts * (world.q - world.v), 0).sum(1))
    claim.equal("spine.lemma_texts", "the same for language models", exact, obtained)


def test_left_out_is_of_second_order(claim):
    left = [p.change - p.surrogate for p in (Pair("four_by_three", 20, 1.0, 0, size) for size in (0.0002, 0.0001))]
    text = "half the step, a quarter of what is left out"
    claim.equal("spine.second_order", text, 4.0, left[0] / left[1], 0.05, digits=2)


def test_bound(claim):
    slack = min((p.bound - (p.change - p.surrogate).abs()) / p.bound for p in pairs())
    text = "4 α² max|A| Σ_t t γ^t is more than the surrogate's error, α the largest total variation in a state"
    claim.record("spine.bound", text, "error < bound", f"{1 - slack:.4f} of it at most", float(slack), 0.0, above=True)
    by_kl = []
    for p in pairs():
        divergence = exact_kl(p.old_logits, p.new_logits)[~p.grid.terminal].max()
        by_kl.append(divergence - 2 * p.alpha**2)
    text = "and 2α² is at most the largest KL in a state (Pinsker), which may take its place"
    least = float(min(by_kl))
    claim.record("spine.pinsker", text, "KL ≥ 2α²", f"KL − 2α² ≥ {least:.6f}", least, 0.0, above=True, count=len(by_kl))


def test_the_bounds_two_factors(claim):
    """Visits drift by at most 2tα, a state's gain is at most 2α max|A|; γ = 1."""
    room = []
    for p in (p for p in pairs() if p.gamma == 1.0):
        drift = (p.visits_new - p.visits_old).abs().sum(-1)
        room.append((2 * torch.arange(p.horizon) * p.alpha - drift)[1:].min())
        room.append((2 * p.alpha * p.advantage.abs().max() - p.gain.abs()).min())
    claim.record(
        "spine.factors", "its two factors: visits move by at most 2tα, a state's gain by 2α max|A|", "each ≤",
        f"room {float(min(room)):.6f}", float(min(room)), 0.0, above=True, count=len(room),
    )  # fmt: skip


def two_token_world(first, second):
    """π(a), and π(+1) after a and after b: token log-probabilities (4, 2) of all texts."""
    policy = TabularPolicy(2, 2)
    texts, _ = policy.enumerate()
    table = torch.tensor([[first, 1 - first], *([p, 1 - p] for p in second)], dtype=torch.float64)
    return action_log_probs(table.log()[policy.rows(texts)], texts), texts


@pytest.mark.equation("7.1")
def test_the_clip_does_not_inherit_the_bound(claim):
    old, texts = two_token_world(0.9, (0.5, 0.5))
    new, _ = two_token_world(0.1, (0.6, 0.4))
    score = 1 - 2.0 * texts[:, 1].double()
    advantage = exact_values(old, score, texts, gamma=1.0)[2]
    change = (new.sum(1).exp() - old.sum(1).exp()) @ score
    promise = -(old.sum(1).exp() @ torch.max(*policy_terms(new, old, advantage, 0.2)).sum(1))
    surrogate = old.sum(1).exp() @ ((new - old).exp() * advantage).sum(1)
    text = "the clipped objective is no lower bound of the change of J: here it promises a gain and J falls"
    claim.decreasing("spine.clip", text, {"promise": promise, "0": 0.0, "change of J": change}, 0.1)
    assert promise <= surrogate + 1e-12  # pessimistic about the surrogate, as it is said to be


def test_fisher_is_the_curvature_of_kl(claim):
    """KL(old ‖ old + Δ) in one state, softmax of logits."""
    logits = torch.randn(5, generator=seeded(1), dtype=torch.float64)
    step = torch.randn(5, generator=seeded(2), dtype=torch.float64)
    pi = logits.softmax(-1)
    fisher = torch.diag(pi) - torch.outer(pi, pi)
    # F = E[∇log π ∇log πᵀ], the row for token a is 1[v = a] − π(v)
    scores = torch.eye(5, dtype=torch.float64) - pi
    mean = scores.T @ (pi[:, None] * scores)
    claim.equal("spine.fisher", "for a softmax E[∇log π ∇log πᵀ] = diag π − ππᵀ", fisher, mean)
    hessian = torch.autograd.functional.hessian(lambda x: exact_kl(logits, x), logits)
    claim.equal("spine.hessian", "it is the second derivative of KL(old‖new) at the old policy", fisher, hessian)
    errors = [exact_kl(logits, logits + s * step) - s**2 * (step @ fisher @ step) / 2 for s in (0.004, 0.002)]
    text = "½ΔᵀFΔ is KL up to third order: half the step, an eighth of the error"
    claim.equal("spine.fisher_order", text, 8.0, errors[0] / errors[1], 0.2, digits=2)


def test_the_natural_gradient_of_a_table_is_the_advantage(claim):
    exact, obtained = [], []
    for p in (p for p in pairs() if p.gamma == 1.0):
        visits = p.visits_old.sum(0)
        mean = (p.visits_old[..., None] * p.advantage).sum(0) / visits.clamp(min=1e-300)[:, None]
        times = p.old * (mean - (p.old * mean).sum(-1, keepdim=True))  # (diag π − ππᵀ) x
        obtained.append(visits[:, None] * times)
        exact.append(p.grid.objective_gradient(p.old_logits, horizon=p.horizon))
    text = "F times the advantage (mean over a state's visits) is ∇J: the natural gradient of a table of logits"
    claim.equal("spine.natural_gradient", text, exact, obtained)


@pytest.mark.equation("6.1")
def test_bias_of_the_self_normalised_mean(claim):
    """All batches of N outcomes; 1/x = ∫ e^(−ux) du gives larger ones."""
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    f, w = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64), p / q
    mean, log_u = p @ f, torch.linspace(-40, 12, 20_001, dtype=torch.float64)

    def expectation(n):
        u = log_u.exp()
        one, weighted = ((q * x * (-u[:, None] * w).exp()).sum(1) for x in (torch.ones(3).double(), w * f))
        return torch.trapezoid(n * u * weighted * one ** (n - 1), log_u)

    listed = 0.0
    for batch in itertools.product(range(3), repeat=3):
        rows = torch.tensor(batch)
        listed += q[rows].prod() * importance_mean(f[rows], w[rows], self_normalized=True)
    claim.equal("spine.ratio_mean", "the mean of Eq. 6.1's quotient over all batches of 3", listed, expectation(3))
    limit = -(q * w**2 * (f - mean)).sum()
    text = "its bias is −E_q[w²(f − E_p f)]/N to first order (here N = 4,000): it vanishes"
    claim.equal("spine.ratio_bias", text, limit, 4000 * (expectation(4000) - mean), 5e-3, digits=3)
