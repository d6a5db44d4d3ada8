"""Best-of-n as a policy. Every text of a small language model listed, so that its law, its KL and its mean reward are
sums; beside them what the package's functions say, and what every choice of n among m samples would give.
"""

import itertools
import math

import pytest
import torch

from proof.worlds import seeded
from rlhf_lessons.exact import TabularPolicy, best_of_n, optimal_policy, sequence_kl
from rlhf_lessons.kl import best_of_n_bound
from rlhf_lessons.scoring import best_of_mean

NS = (2, 4, 16, 64, 256)
REWARDS = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)  # of each token; the last one ends a text


def small_world(seed=0, levels=None):
    """log π (N,) of the 121 texts of at most 5 tokens, and their rewards: all different, or rounded to levels."""
    policy = TabularPolicy(3, 5, eos_id=2, scale=0.5, generator=seeded(seed))
    texts, mask = policy.enumerate()
    rewards = (REWARDS[texts] * mask).sum(dim=1)
    if levels is None:
        rewards = rewards + 0.1 * torch.randn(len(texts), generator=seeded(seed + 1), dtype=torch.float64)
    return policy.sequence_log_prob(texts).detach(), rewards


WORLDS = [small_world(seed) for seed in range(3)] + [small_world(seed, levels=True) for seed in range(3)]


@pytest.mark.equation("14.1")
def test_the_law_is_that_of_all_that_n_draws_can_be(claim):
    expected, found = [], []
    for seed in range(3):
        log_probs = torch.randn(5, generator=seeded(seed), dtype=torch.float64).log_softmax(0)
        rewards = [0.5, 2.0, 0.5, -1.0, 2.0]
        for n in (1, 2, 4):
            law = torch.zeros(5, dtype=torch.float64)
            for drawn in itertools.product(range(5), repeat=n):
                best = max(rewards[i] for i in drawn)
                kept = [i for i in drawn if rewards[i] == best]
                for i in kept:
                    law[i] += log_probs[list(drawn)].sum().exp() / len(kept)
            expected.append(law)
            found.append(best_of_n(log_probs, torch.tensor(rewards), n).exp())
    text = "the chance to keep each of five outcomes, two pairs of them equal in reward, over all draws of n"
    claim.equal("best_of_n.law", text, expected, found)


@pytest.mark.equation("14.2")
def test_the_bound_is_the_kl_of_a_continuous_reward_and_no_discrete_policy_reaches_it(claim):
    # The kept sample's place on [0, 1], u = F(reward), has the density n·u^(n−1); as ever finer outcomes, its KL.
    fine = torch.full((200_000,), 1 / 200_000, dtype=torch.float64).log()
    kls = [sequence_kl(best_of_n(fine, torch.arange(200_000), n), fine) for n in (1, *NS)]
    text = "with 200,000 equally likely outcomes the KL of best-of-n is log n − (n−1)/n, n from 1 to 256"
    claim.equal("best_of_n.continuous", text, [best_of_n_bound(n) for n in (1, *NS)], kls, 1e-6)

    small, bounds = [], []
    for n in NS:
        bounds.append(best_of_n_bound(n))
        small.append(max(sequence_kl(best_of_n(log_p, r, n), log_p) for log_p, r in WORLDS))
    text = "in worlds of 121 texts the KL stays below the bound, for each n from 2 to 256"
    claim.biased("best_of_n.below", text, bounds, small, 1e-3)
    assert all(x < y for x, y in zip(small, bounds, strict=True))


def test_equal_rewards_make_the_kl_smaller_and_the_top_s_chance_bounds_it(claim):
    for seed in range(3):
        (log_p, apart), (_, equal) = small_world(seed), small_world(seed, levels=True)
        for n in NS:
            finer, coarser = (sequence_kl(best_of_n(log_p, r, n), log_p) for r in (apart, equal))
            assert coarser < finer - 1e-3
    tops, limits = [], []
    for seed in range(3):
        log_p = torch.randn(6, generator=seeded(seed), dtype=torch.float64).log_softmax(0)
        rewards = torch.tensor([1.0, 3.0, 0.0, 3.0, 2.0, 1.0])
        tops.append(-log_p[rewards == 3].logsumexp(0))
        limits.append(sequence_kl(best_of_n(log_p, rewards, 4096), log_p))
    text = "as n grows the KL tends to −log of the chance of the highest reward, n = 4,096"
    claim.equal("best_of_n.top", text, tops, limits)


@pytest.mark.equation("14.3")
def test_the_mean_over_all_choices_of_n_among_m(claim):
    scores, values = torch.randn(2, 3, 8, generator=seeded(4), dtype=torch.float64)
    expected, found, replaced = [], [], []
    for n in (1, 2, 5, 8):
        best = [
            values[row, list(picked)][scores[row, list(picked)].argmax()]
            for row in range(3)
            for picked in itertools.combinations(range(8), n)
        ]
        expected.append(torch.stack(best).view(3, -1).mean(1))
        found.append(best_of_mean(scores, values, n))
        share = torch.arange(9, dtype=torch.float64) / 8
        replaced.append(scores.gather(1, scores.argsort(1)) @ (share**n).diff())
    text = "the value of the best of n, mean over all ways to pick n of 8 samples"
    claim.equal("best_of_n.mean", text, expected, found)
    highest = [best_of_mean(scores, scores, n) for n in (2, 5, 8)]
    claim.biased(
        "best_of_n.replaced", "drawn with replacement the best of n scores too low", highest, replaced[1:], 0.02
    )


def test_the_estimate_is_unbiased_for_the_law_s_mean_reward(claim):
    """Every draw of four samples of a small policy, weighted by its chance."""
    log_p = torch.randn(4, generator=seeded(5), dtype=torch.float64).log_softmax(0)
    rewards = torch.tensor([1.0, 0.2, 1.0, -0.5], dtype=torch.float64)
    gold = torch.tensor([0.3, 0.6, -1.0, 0.1], dtype=torch.float64)
    draws = torch.cartesian_prod(*[torch.arange(4)] * 4)
    chance = log_p[draws].sum(1).exp()
    exact = [best_of_n(log_p, rewards, n).exp() @ gold for n in (1, 2, 3, 4)]
    found = [chance @ best_of_mean(rewards[draws], gold[draws], n) for n in (1, 2, 3, 4)]
    text = "the expected estimate from four samples, over all 256 draws, is the law's own mean gold reward"
    claim.equal("best_of_n.unbiased", text, exact, found)


def test_best_of_n_earns_less_than_the_best_policy_of_its_kl(claim):
    earned = []
    for log_p, rewards in WORLDS:
        for n in (2, 8, 32):
            best = best_of_n(log_p, rewards, n)
            budget = sequence_kl(best, log_p)
            low, high = 1e-3, 1e3  # the price β at which the tilted policy has this KL
            for _ in range(200):
                beta = math.sqrt(low * high)
                tilted = optimal_policy(log_p, rewards, kl_coef=beta)
                low, high = (beta, high) if sequence_kl(tilted, log_p) > budget else (low, beta)
            earned.append((tilted.exp() @ rewards, best.exp() @ rewards))
    closest = min(earned, key=lambda pair: pair[0] - pair[1])
    text = "of equal KL, the policy tilted by exp(r/β) earns more than best-of-n, n = 2, 8, 32 in six worlds"
    claim.decreasing("best_of_n.frontier", text, dict(zip(("tilted", "best of n"), closest, strict=True)), 1e-4)
