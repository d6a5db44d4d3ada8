"""Another sampler. Texts drawn by a coarse copy of the policy, its logits rounded to multiples of 2, and weighted for
the policy's own gradient: every text listed, so that the bias of each weight is a sum and no sample is drawn.
"""

import functools
import math

import pytest
import torch

from proof.worlds import World, expected_gradient, language_world
from rlhf_lessons.exact import exact_values, state_visitation
from rlhf_lessons.importance import masked_ratio, sequence_ratio, truncated_ratio
from rlhf_lessons.policy_gradient import action_log_probs, discounted_return

SHAPES = [(3, 5, 2), (4, 4, 0), (5, 3, None)]
CAPS = (1.0, 1.5, 2.0, 4.0)
WORLDS = [(shape, seed) for shape in SHAPES for seed in range(2)]


@functools.cache
def drawn(shape: tuple, seed: int) -> tuple[World, torch.Tensor, torch.Tensor]:
    """A world, the sampler's log-probabilities log μ (N, T) in it, 0 in the padding, and each text's return (N,)."""
    world = language_world(*shape, seed=seed)
    coarse = 2 * (world.logits.detach() / 2).round()
    sampler = torch.where(world.mask, action_log_probs(coarse[world.rows], world.actions), 0)
    return world, sampler, discounted_return(world.rewards, world.mask, gamma=1.0)


def log_ratio(world: World, sampler: torch.Tensor) -> torch.Tensor:
    """log π/μ of each whole text: (N,)."""
    return torch.where(world.mask, world.log_probs().detach() - sampler, 0).sum(dim=1)


def found(weigh, shape, seed) -> torch.Tensor:
    """E_μ[Σ_t w_t R ∇log π], the weights by `weigh(log_probs, sampler_log_probs, mask)`."""
    world, sampler, returns = drawn(shape, seed)
    weights = weigh(world.log_probs(), sampler, world.mask)
    return expected_gradient(world, weights * returns[:, None], probs=sampler.sum(dim=1).exp())


def of_policy(share, shape, seed) -> torch.Tensor:
    """E_π[share(w) R ∇log π], w = π/μ of the text: which part of the policy's own gradient is kept."""
    world, sampler, returns = drawn(shape, seed)
    kept = share(log_ratio(world, sampler).exp()) * returns
    return expected_gradient(world, kept[:, None].expand_as(sampler))


def whole(weigh, cap):
    return lambda *given: weigh(*given, cap=cap, level="sequence")


@pytest.mark.equation("16.1")
def test_whole_weights_without_a_cap_have_no_bias(claim):
    exact = [drawn(*at)[0].gradient for at in WORLDS]
    obtained = [found(whole(truncated_ratio, math.inf), *at) for at in WORLDS]
    claim.equal("corrections.sequence", "a text's own weight π/μ, no cap: the expected gradient is ∇J", exact, obtained)


@pytest.mark.equation("16.1")
def test_a_cap_keeps_the_share_cap_over_w_of_what_is_above_it(claim):
    pairs = [(cap, at) for cap in CAPS for at in WORLDS]
    exact = [of_policy(lambda w, cap=cap: (cap / w).clamp(max=1), *at) for cap, at in pairs]
    obtained = [found(whole(truncated_ratio, cap), *at) for cap, at in pairs]
    text = "a text's weight capped at 1, 1.5, 2, 4: E_π[min(1, cap/w) R ∇log π], so that the bias is what is above it"
    claim.equal("corrections.truncated", text, exact, obtained)


@pytest.mark.equation("16.2")
def test_a_mask_keeps_nothing_outside_of_its_band(claim):
    pairs = [(cap, at) for cap in CAPS[1:] for at in WORLDS]
    exact = [of_policy(lambda w, cap=cap: ((w <= cap) & (w >= 1 / cap)).double(), *at) for cap, at in pairs]
    obtained = [found(whole(masked_ratio, cap), *at) for cap, at in pairs]
    text = "a text's weight masked at 1.5, 2, 4: E_π[R ∇log π] over the texts with 1/cap ≤ w ≤ cap alone"
    claim.equal("corrections.masked", text, exact, obtained)


@pytest.mark.equation("16.1")
def test_the_mean_of_a_capped_weight(claim):
    """In every state of every world, over the tokens that the sampler may choose there."""
    exact, obtained = [], []
    for cap in CAPS:
        for at in WORLDS:
            world, _, _ = drawn(*at)
            policy = world.logits.detach().log_softmax(dim=-1)
            sampler = (2 * (world.logits.detach() / 2).round()).log_softmax(dim=-1)
            excess = ((policy - sampler).exp() - cap).clamp(min=0)
            exact.append(1 - (sampler.exp() * excess).sum(dim=-1))
            obtained.append((sampler.exp() * truncated_ratio(policy, sampler, cap=cap)).sum(dim=-1))
    claim.equal("corrections.mean", "E_μ[min(π/μ, cap)] = 1 − E_μ[(π/μ − cap)⁺] in every state", exact, obtained)


def test_the_second_moment_of_a_capped_weight_is_at_most_the_cap():
    """min(w, cap)² ≤ cap·w, whose mean under μ is the cap."""
    for cap in CAPS:
        for at in WORLDS:
            world, sampler, _ = drawn(*at)
            weights = truncated_ratio(world.log_probs(), sampler, world.mask, cap=cap, level="sequence")[:, 0]
            assert sampler.sum(dim=1).exp() @ weights.square() <= cap


@pytest.mark.equation("16.1")
def test_weights_of_tokens_correct_the_choice_and_nothing_else(claim):
    """States as often as the sampler comes there, and what the sampler earns from there on."""
    exact, obtained = [], []
    for at in WORLDS:
        world, sampler, _ = drawn(*at)
        _, q, _ = exact_values(sampler, world.rewards, world.actions, world.mask, gamma=1.0)
        reach = state_visitation(sampler, world.mask)
        terms = {}  # one for each state and token, however many texts pass there
        for row, step in world.mask.nonzero().tolist():
            key = int(world.states[row, step]), int(world.actions[row, step])
            terms.setdefault(key, (row, step))
        rows, steps = torch.tensor(list(terms.values())).unbind(dim=1)
        chance = world.log_probs()[rows, steps].exp()  # with its gradient: ∇π
        total = (reach[rows, steps] * chance * q[rows, steps]).sum()
        exact.append(torch.autograd.grad(total, world.logits)[0])
        obtained.append(found(functools.partial(truncated_ratio, cap=math.inf), *at))
    text = "a token's own weight, no cap: Σ_s P_μ(s) Σ_a ∇π(a|s) Q_μ(s, a), the sampler's states and its Q"
    claim.equal("corrections.token", text, exact, obtained)


@pytest.mark.parametrize(("id", "text", "weigh", "bound"), [
    ("none", "no weights: the expected gradient is not ∇J", lambda x, y, mask: mask.double(), 0.05),
    ("token_bias", "a token's own weight, no cap: nor is this", lambda *given: truncated_ratio(*given, cap=math.inf),
     0.02),
    ("geometric", "the geometric mean of a text's ratios: nor is this",
     lambda *given: sequence_ratio(*given)[:, None].expand_as(given[0]), 0.05),
    ("masked_bias", "a text's weight masked at 2: nor is this", whole(masked_ratio, 2.0), 0.05),
    ("truncated_bias", "a text's weight capped at 2: nor is this", whole(truncated_ratio, 2.0), 0.005),
])  # fmt: skip
def test_the_others_are_biased(claim, id, text, weigh, bound):
    exact = [drawn(*at)[0].gradient for at in WORLDS]
    claim.biased(f"corrections.{id}", text, exact, [found(weigh, *at) for at in WORLDS], bound)


def test_the_mean_of_the_geometric_mean_is_not_1(claim):
    exact = [torch.ones(()) for _ in WORLDS]
    obtained = []
    for at in WORLDS:
        world, sampler, _ = drawn(*at)
        weights = sequence_ratio(world.log_probs().detach(), sampler, world.mask)
        obtained.append(sampler.sum(dim=1).exp() @ weights)
    claim.biased("corrections.geometric_mean", "E_μ of the geometric mean is not 1", exact, obtained, 0.002)
