"""Variance. Total variances of one-sample gradient estimates, summed over all episodes: the usual ranking in one stated
world, its reverse in another, the constant that minimises, and how GAE trades bias for variance.
"""

import pytest
import torch

from proof.worlds import (
    batches,
    finish_language_world,
    language_world,
    moments,
    single_gradients,
)
from rlhf_lessons.advantages import gae
from rlhf_lessons.baselines import optimal_baseline
from rlhf_lessons.exact import TabularPolicy, exact_moments, per_sample_gradients, prefix_ids
from rlhf_lessons.policy_gradient import discounted_return, reward_to_go

LAMBDAS = [0.0, 0.25, 0.5, 0.75, 0.9, 1.0]


def stated_world(seed=0):
    """Three tokens, four steps, no EOS, γ = 1; a random policy and a random reward N(0, 1) at every step."""
    return language_world(3, 4, seed=seed)


def reversed_world():
    """Three tokens, two steps: each token's reward takes back what the one before it earned.

    Token 0 comes with probability 0.9 and, first, pays 5; the others pay nothing. As second token 0 pays 5 after any
    start, a rare token −(what the first one paid). So where a rare token's large score vector is multiplied, the full
    return is 0 and its parts are not.
    """
    policy = TabularPolicy(3, 2, scale=0.0)
    with torch.no_grad():
        policy.logits += torch.tensor([0.9, 0.05, 0.05], dtype=torch.float64).log()
    sequences, mask = policy.enumerate()
    first, second = sequences.unbind(dim=1)
    earned = 5.0 * (first == 0)
    rewards = torch.stack([earned, torch.where(second == 0, 5.0, -earned)], dim=1).double()
    ids = prefix_ids(sequences)
    return finish_language_world(policy, sequences, mask, ids[:, :-1] + torch.tensor([0, 9]), rewards, 1.0)


def ranking(w):
    """Total variance of ∇J's one-sample estimate, by the weights that it uses."""
    to_go = reward_to_go(w.rewards, w.mask, gamma=w.gamma)
    full = discounted_return(w.rewards, w.mask, gamma=w.gamma)[:, None].expand_as(to_go)
    weights = {"full return": full, "reward-to-go": to_go, "to-go − V(s)": to_go - w.v, "exact A(s, a)": w.q - w.v}
    return {name: moments(w, single_gradients(w, x))[1] for name, x in weights.items()}


def test_usual_ranking(claim):
    text = "in the stated world (3 tokens, 4 steps, a random reward at each, γ = 1) the usual ranking holds"
    claim.decreasing("variance.ranking", text, ranking(stated_world()), 0.1)
    # A is the conditional mean of to-go − V given state and action. Where every state has logits of its own, as here,
    # each coordinate of the gradient hears of one state alone, and the step is a theorem: Rao and Blackwell's.
    found = [ranking(w) for w in (*map(stated_world, range(1, 8)), reversed_world())]
    worst = min(found, key=lambda x: float(x["to-go − V(s)"] - x["exact A(s, a)"]))
    text = (
        "in seven more random worlds and the reversed one the last step holds too, as it must where each state has "
        "its own logits (narrowest shown)"
    )
    claim.decreasing("variance.rao_blackwell", text, dict(list(worst.items())[2:]), 0.01)


def test_reversed_ranking(claim):
    variances = ranking(reversed_world())
    del variances["exact A(s, a)"]
    text = "where each reward takes back the one before, the same three rank in reverse"
    claim.decreasing("variance.reversed", text, dict(reversed(variances.items())), 0.1)


def test_terminal_reward_only(claim):
    w = stated_world()
    only_last = torch.cat([torch.zeros_like(w.rewards[:, :-1]), w.rewards[:, -1:]], dim=1)
    full = discounted_return(only_last, gamma=1.0)[:, None].expand_as(only_last)
    text = "with one reward, at the end, and γ = 1, reward-to-go is the full return and saves nothing"
    exact, obtained = (moments(w, single_gradients(w, x))[1] for x in (full, reward_to_go(only_last, gamma=1.0)))
    claim.equal("variance.terminal_reward", text, exact, obtained)


def test_variance_is_that_of_the_oracle(claim):
    # Second route: score vectors from the oracle, its own moments.
    w = stated_world()
    log_probs = w.logits[w.rows].log_softmax(-1).gather(-1, w.actions[..., None]).squeeze(-1)
    scores = per_sample_gradients(log_probs, w.logits)
    to_go = w.rewards.flip(1).cumsum(1).flip(1)
    exact = exact_moments(w.probs.log(), (scores * to_go[..., None]).sum(dim=1))[1].sum()
    text = "the variance of reward-to-go by the package's loss and by the oracle's score vectors"
    claim.equal("variance.two_routes", text, exact, ranking(w)["reward-to-go"])


def test_mean_of_a_batch(claim):
    w = language_world(3, 2)
    single = single_gradients(w, discounted_return(w.rewards, gamma=1.0)[:, None].expand_as(w.rewards))
    numbers, probs = batches(w, 3)
    means = single[numbers].mean(dim=1)
    centre = probs @ means
    obtained = probs @ (means - centre).square().sum(dim=1)
    text = "the mean of 3 independent episodes has a third of the variance, whatever its distribution"
    claim.equal("variance.batch", text, moments(w, single)[1] / 3, obtained)


@pytest.mark.equation("4.3")
def test_optimal_constant_baseline(claim):
    w = stated_world()
    returns = discounted_return(w.rewards, gamma=1.0)
    scores = single_gradients(w, torch.ones_like(w.rewards))

    def variance(b):
        return moments(w, scores * (returns - b)[:, None])[1]

    # The variance is a parabola in b: three points give its lowest one.
    low, middle, high = (variance(b) for b in (-1.0, 0.0, 1.0))
    vertex = 0.5 * (low - high) / (low - 2 * middle + high)
    # Every episode once, weighted by its probability.
    best = optimal_baseline(w.probs * scores.square().sum(dim=1), returns)
    text = "the optimal constant baseline lies where the variance's parabola is lowest"
    claim.equal("variance.optimal_baseline", text, vertex, best)
    others = {"the mean return": variance(w.objective), "b*": variance(best)}
    text = "it beats the mean return, the baseline that is used most"
    claim.decreasing("variance.mean_baseline", text, others, 1e-3)
    around = min(variance(best + step) for step in (-1.0, -0.01, 0.01, 1.0))
    claim.decreasing("variance.nearby", "and its neighbours", {"best neighbour": around, "b*": variance(best)}, 1e-5)


@pytest.mark.equation("5.3")
def test_bias_and_variance_of_gae(claim):
    w = stated_world()

    def curve(critic):
        advantages = [gae(w.rewards, critic, gamma=1.0, lam=lam)[0] for lam in LAMBDAS]
        found = [moments(w, single_gradients(w, x)) for x in advantages]
        bias = [float((mean - w.gradient.flatten()).square().sum()) for mean, _ in found]
        return bias, [float(variance) for _, variance in found]

    names = [f"λ={lam:g}" for lam in LAMBDAS]
    bias, variance = curve(w.v + 0.5 * w.random_by_state())
    text = "with a critic off by N(0, ¼) in each state GAE's squared bias falls as λ rises"
    claim.decreasing("variance.gae_bias", text, dict(zip(names, bias, strict=True)), 1e-3)
    claim.equal("variance.gae_bias_at_1", "to exactly 0 at λ = 1", 0.0, bias[-1])
    text = "while the variance of one sample rises"
    claim.decreasing("variance.gae", text, dict(list(zip(names, variance, strict=True))[::-1]), 0.01)
    error = {name: b + v / 16 for name, b, v in zip(names, bias, variance, strict=True)}
    for other in ("λ=0", "λ=1"):
        text = f"so the mean squared error of 16 samples is lower in between than at {other}"
        pair = {other: error[other], "λ=0.75": error["λ=0.75"]}
        claim.decreasing(f"variance.gae_error_{other[2:]}", text, pair, 0.01)
    good_bias, good_variance = curve(w.v)
    text = "with the exact V the variance rises over the whole range"
    claim.decreasing("variance.gae_exact_critic", text, dict(list(zip(names, good_variance, strict=True))[::-1]), 1e-3)
    claim.equal("variance.gae_exact_bias", "and there is no bias at any λ", torch.zeros(6), torch.tensor(good_bias))
