"""Lesson 14: best-of-n as a policy, and the mean of the best estimated from more samples than n."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lessons import exact, scoring
from rlhf_lessons.checks._harness import Case, Check, Wrong
from rlhf_lessons.checks._inputs import Draw

Law = Callable[..., Tensor]  # (log_probs, rewards, n) -> log-probabilities

# --- Exercise: best_of_n -----------------------------------------------------------------------


def law_cases() -> list[Case]:
    d = Draw(1401)
    worlds = {
        "three outcomes, rewards all different": (3, [0.0, 1.0, -2.0]),
        "five outcomes in mixed order": (5, [0.3, -1.0, 2.0, 0.7, -0.2]),
        "four outcomes, two of them equal in reward": (4, [1.0, 0.0, 1.0, -1.0]),
        "six outcomes, three levels": (6, [2.0, 0.0, 2.0, -1.0, 0.0, 2.0]),
        "all rewards equal": (4, [0.5, 0.5, 0.5, 0.5]),
    }
    made = {says: (d.normal(size).log_softmax(0), d.normal(0).new_tensor(r)) for says, (size, r) in worlds.items()}
    return [
        Case(f"{says}, n = {n}", {"log_probs": log_probs, "rewards": rewards, "n": n})
        for n in (1, 2, 3, 8)
        for says, (log_probs, rewards) in made.items()
    ]


def at_most(probs: Tensor, rewards: Tensor) -> Tensor:
    """P(reward ≤ r) at each outcome."""
    return (rewards[None, :] <= rewards[:, None]).to(probs) @ probs


def below(probs: Tensor, rewards: Tensor) -> Tensor:
    """P(reward < r) at each outcome."""
    return (rewards[None, :] < rewards[:, None]).to(probs) @ probs


def law(of: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]) -> Law:
    """The logarithm of `of`(p, F, F⁻, rewards, n), a formula for the law."""
    return lambda log_probs, rewards, n: of(
        p := log_probs.exp(), at_most(p, rewards), below(p, rewards), rewards, n
    ).log()


def one_by_one(log_probs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Outcomes put in order of reward, equal ones in the order in which they come."""
    order = rewards.argsort(stable=True)
    upto = log_probs[order].exp().cumsum(0)
    ahead = upto - log_probs[order].exp()
    return torch.empty_like(log_probs).scatter(0, order, (upto**n - ahead**n).log())


def ties(rewards: Tensor) -> Tensor:
    """How many outcomes have each outcome's reward."""
    return (rewards[None, :] == rewards[:, None]).sum(1)


def right_law(p: Tensor, upto: Tensor, under: Tensor, rewards: Tensor, n: int) -> Tensor:
    return p * (upto**n - under**n) / (upto - under)


best_of_n = Check(
    name="best_of_n",
    reference=exact.best_of_n,
    cases=law_cases,
    wrong=(
        Wrong(
            "equal rewards in the order of the list",
            one_by_one,
            "Where rewards differ it is right; where some are equal it is not. You put equal outcomes in an order, as "
            "if a later one beat an earlier one. Give the whole level its chance F(r)ⁿ − F(r⁻)ⁿ, then share it out in "
            "proportion to π.",
        ),
        Wrong(
            "equal rewards share equally",
            law(lambda p, upto, under, r, n: (upto**n - under**n) / ties(r)),
            "Where rewards differ it is right. Outcomes of equal reward share their level's chance equally in yours; "
            "the likelier one is also drawn more often: share in proportion to π.",
        ),
        Wrong(
            "each of equals gets the whole level",
            law(lambda p, upto, under, r, n: upto**n - under**n),
            "Where rewards differ it is right. Each of several equal outcomes gets the chance of their whole level, so "
            "the sum exceeds 1. Multiply by π(y) and divide by the level's mass, F(r) − F(r⁻).",
        ),
        Wrong(
            "F − π in place of F⁻",
            law(lambda p, upto, under, r, n: upto**n - (upto - p) ** n),
            "Where rewards differ it is right. Where some are equal, F(r) − π(y) is not F(r⁻): from the chance of at "
            "most r take that of the whole level, all outcomes of reward r, not of y alone.",
        ),
        Wrong(
            "not divided by the level",
            law(lambda p, upto, under, r, n: p * (upto**n - under**n)),
            "n = 1 must give π back, and yours gives π times its level's mass. Divide by that mass, F(r) − F(r⁻).",
        ),
        Wrong(
            "summed in the order of the list",
            law(lambda p, upto, under, r, n: p.cumsum(0) ** n - (p.cumsum(0) - p) ** n),
            "n = 1 is right, n = 2 is not: you add the probabilities up in the order of the list. F(r) adds those of "
            "all outcomes whose reward is at most r.",
        ),
        Wrong(
            "the density",
            law(lambda p, upto, under, r, n: n * p * upto ** (n - 1)),
            "n = 1 is right, n = 2 is not, and the sum exceeds 1. n·π(y)·F(r)ⁿ⁻¹ is the density of a continuous "
            "reward. Here other samples may be y itself: take the difference F(r)ⁿ − F(r⁻)ⁿ.",
        ),
        Wrong(
            "the density from below",
            law(lambda p, upto, under, r, n: n * p * under ** (n - 1)),
            "n = 1 is right, n = 2 is not: the sum is below 1. n·π(y)·F(r⁻)ⁿ⁻¹ is the chance that y is drawn once and "
            "all others are lower. It leaves out that y, or an equal, is drawn more than once.",
        ),
        Wrong(
            "the density, made to sum to 1",
            lambda log_probs, rewards, n: (
                (log_probs.exp() * at_most(log_probs.exp(), rewards) ** (n - 1)).log().log_softmax(0)
            ),
            "n = 1 is right, n = 2 is not. The density n·π(y)·F(r)ⁿ⁻¹ does not sum to 1 where outcomes have mass, and "
            "dividing by the sum hides it. Take the difference F(r)ⁿ − F(r⁻)ⁿ.",
        ),
        Wrong(
            "y among its own rivals",
            lambda log_probs, rewards, n: (
                (log_probs.exp() * at_most(log_probs.exp(), rewards) ** n).log().log_softmax(0)
            ),
            "n = 1 must give π back, and yours prefers high rewards there already. π(y)·F(r)ⁿ lets y compete with n "
            "others: n samples, the kept one included, are below or equal to r with chance F(r)ⁿ.",
        ),
        Wrong(
            "the chance to be at most r",
            law(lambda p, upto, under, r, n: upto**n),
            "F(r)ⁿ is the chance that all n samples are at most r. The best one *is* at r if, besides, not all are "
            "below it: subtract F(r⁻)ⁿ.",
        ),
        Wrong(
            "the lowest kept",
            lambda log_probs, rewards, n: law(right_law)(log_probs, -rewards, n),
            "n = 1 is right, n = 2 is not: you keep the lowest reward. F(r) = P(reward ≤ r), not ≥.",
        ),
        Wrong(
            "n + 1 samples",
            lambda log_probs, rewards, n: law(right_law)(log_probs, rewards, n + 1),
            "n = 1 must give π back, and yours is the law of the better of two. The exponent is n.",
        ),
        Wrong(
            "n − 1 samples",
            lambda log_probs, rewards, n: law(right_law)(log_probs, rewards, max(n - 1, 1)),
            "n = 1 is right, n = 2 is not: yours is the law of n − 1 samples. The exponent is n.",
        ),
        Wrong(
            "the factor alone",
            law(lambda p, upto, under, r, n: (upto**n - under**n) / (upto - under)),
            "You return the factor by which best-of-n changes π, not the law: log π(y) is missing.",
        ),
        Wrong(
            "probabilities",
            lambda log_probs, rewards, n: law(right_law)(log_probs, rewards, n).exp(),
            "You return probabilities; log-probabilities are wanted.",
        ),
        Wrong(
            "a tilt by the reward",
            lambda log_probs, rewards, n: (log_probs + (n - 1) * rewards).log_softmax(0),
            "π(y)·exp(r/β), made to sum to 1, is what a KL penalty leads to. Best-of-n knows only the order of the "
            "rewards, not their size.",
        ),
        Wrong(
            "log-probabilities in place of probabilities",
            lambda log_probs, rewards, n: law(right_law)(log_probs.exp().log_softmax(0), rewards, n),
            "n = 1 must give π back. The inputs are log-probabilities already: F adds up their exponentials, without "
            "another softmax.",
        ),
    ),
)

# --- Bug hunt: the same sample twice among the n -----------------------------------------------


def mean_cases() -> list[Case]:
    d = Draw(1411)
    shapes = {"one prompt, three samples": (1, 3), "two prompts, five samples": (2, 5), "three prompts, 12": (3, 12)}
    made = {says: (d.normal(*shape), d.normal(*shape)) for says, shape in shapes.items()}
    return [
        Case(f"{says}, n = {n}", {"scores": scores, "values": values, "n": n})
        for says, (scores, values) in made.items()
        for n in (1, 2, scores.shape[1])
    ]


def by_weights(weight: Callable[[int, int, int], float]) -> Callable[..., Tensor]:
    """The values in rising order of score, the j-th of m, from 1, weighted by `weight`(j, m, n)."""

    def mean_of_best(scores: Tensor, values: Tensor, n: int) -> Tensor:
        m = scores.shape[1]
        weights = values.new_tensor([weight(j, m, n) for j in range(1, m + 1)])
        return values.gather(1, scores.argsort(1)) @ weights

    return mean_of_best


def chunks(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """Samples taken n at a time, the best of each."""
    groups = scores.shape[1] // n
    split = scores[:, : groups * n].view(len(scores), groups, n)
    best = split.argmax(2, keepdim=True)
    return values[:, : groups * n].view_as(split).gather(2, best).mean((1, 2))


def picked(j: int, m: int, n: int) -> float:
    """The chance that the j-th is the highest of n different ones among m."""
    return math.comb(j - 1, n - 1) / math.comb(m, n)


same_sample_twice = Check(
    name="same_sample_twice",
    reference=scoring.best_of_mean,
    cases=mean_cases,
    explains=(
        "The colleague draws the n with replacement, so that one sample may be counted twice or more, as if it were "
        "several. n = 1 is right, and while n is far below m it hardly shows. At n = m the best sample is missed with "
        "chance (1 − 1/m)ᵐ ≈ 0.37: the curve bends down at its right end, where one looks for overoptimisation.\n"
        "What shows it: scores 1 … m as their own values. The best of m must be m, and the mean of the best of n is "
        "n(m+1)/(n+1)."
    ),
    wrong=(
        Wrong(
            "drawn with replacement",
            by_weights(lambda j, m, n: (j / m) ** n - ((j - 1) / m) ** n),
            "n = 1 is right, n = 2 is not: (j/m)ⁿ is the chance that n draws *with replacement* are all among the j "
            "lowest. The n are different samples: C(j, n)/C(m, n).",
        ),
        Wrong(
            "one rank too low",
            by_weights(lambda j, m, n: math.comb(j - 1, n) / math.comb(m, n)),
            "The weights are one rank off: with C(j−1, n) the j-th itself is not among the n. It is one of them, and "
            "the n − 1 others lie below it: C(j−1, n−1).",
        ),
        Wrong(
            "at most the j-th",
            by_weights(lambda j, m, n: math.comb(j, n) / math.comb(m, n)),
            "C(j, n)/C(m, n) is the chance that the best is at most the j-th. That it is the j-th is the difference "
            "from one j to the next, C(j−1, n−1)/C(m, n).",
        ),
        Wrong(
            "with the density",
            by_weights(lambda j, m, n: n / m * (j / m) ** (n - 1)),
            "n = 1 is right, n = 2 is not: n/m·(j/m)ⁿ⁻¹ is the slope of (j/m)ⁿ, which is still that of draws with "
            "replacement, and the weights do not sum to 1.",
        ),
        Wrong(
            "n at a time",
            chunks,
            "That is unbiased, but it uses one way to split the samples and wastes all others, and what is left over. "
            "Wanted is the mean over all C(m, n) choices.",
        ),
        Wrong(
            "the best values",
            lambda scores, values, n: by_weights(picked)(values, values, n),
            "You order by the values. The scores choose, and the values say what the chosen one is worth.",
        ),
        Wrong(
            "the lowest kept",
            lambda scores, values, n: by_weights(picked)(-scores, values, n),
            "n = 1 is right, n = 2 is not: the lowest score is kept.",
        ),
        Wrong(
            "the score of the best",
            lambda scores, values, n: by_weights(picked)(scores, scores, n),
            "You return the mean score of the best; wanted is the mean of its value.",
        ),
        Wrong(
            "the top n averaged",
            by_weights(lambda j, m, n: float(j > m - n) / n),
            "You average the n highest of all m. Best-of-n keeps one of n that were drawn.",
        ),
        Wrong(
            "averaged over the prompts",
            lambda scores, values, n: by_weights(picked)(scores, values, n).mean(),
            "You average over the prompts. Wanted is one number for each, (B,).",
        ),
    ),
)
