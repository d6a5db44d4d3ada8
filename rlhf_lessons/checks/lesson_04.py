"""Lesson 04: reward-to-go, and a baseline that must not see the action."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lessons import baselines, policy_gradient
from rlhf_lessons.checks._harness import Case, Check, Wrong
from rlhf_lessons.checks._inputs import Draw, prefix_mask, transposed, under_padding
from rlhf_lessons.checks.lesson_03 import real

OfSteps = Callable[[Tensor, Tensor], Tensor]  # a number, or yes or no, for each pair of steps t and u

# --- Exercise: reward_to_go --------------------------------------------------------------------


def reward_to_go_cases() -> list[Case]:
    d, single = Draw(401), Draw(402, torch.float32)
    ragged = prefix_mask([2, 4, 1], 4)

    def masked(says: str, draw: Draw, garbage: float, gamma: float) -> Case:
        return Case(
            says, {"rewards": under_padding(draw.normal(3, 4), ragged, garbage), "mask": ragged}, {"gamma": gamma}
        )

    return [
        Case("two steps, γ = 1", {"rewards": d.normal(1, 2)}, {"gamma": 1.0}),
        Case("γ = 0", {"rewards": d.normal(2, 3)}, {"gamma": 0.0}),
        Case("γ = 0.9", {"rewards": d.normal(2, 3)}, {"gamma": 0.9}),
        Case("five steps, γ = 0.5", {"rewards": d.normal(3, 5)}, {"gamma": 0.5}),
        Case("a single step", {"rewards": d.normal(2, 1)}, {"gamma": 0.9}),
        masked("padding, with numbers under it", d, 30.0, 0.8),
        masked("padding, with NaN under it", d, math.nan, 0.8),
        Case("rewards that are not contiguous", {"rewards": transposed(d.normal(3, 5))}, {"gamma": 0.7}),
        masked("float32", single, 3.0, 0.9),
    ]


def power_sum(rewards: Tensor, mask: Tensor | None, exponent: OfSteps, counts: OfSteps = lambda t, u: u >= t) -> Tensor:
    """Σ_u γ^exponent(t, u) r_u over the u that count, as one matrix product, masked."""
    kept = rewards if mask is None else torch.where(mask, rewards, 0)
    t, u = torch.meshgrid(*[torch.arange(rewards.shape[1])] * 2, indexing="ij")
    weights = torch.where(counts(t, u), exponent(t, u).to(rewards.dtype), 0)
    total = kept @ weights.T
    return total if mask is None else torch.where(mask, total, 0)


def summed(power: OfSteps, counts: OfSteps = lambda t, u: u >= t) -> Callable[..., Tensor]:
    """A wrong reward-to-go: discount γ^power(t, u), rewards u that count for step t."""
    return lambda rewards, mask=None, *, gamma: power_sum(
        rewards, mask, lambda t, u: gamma ** power(t, u).clamp(min=0).to(rewards.dtype), counts
    )


def summed_in_float32(rewards: Tensor, mask: Tensor | None = None, *, gamma: float) -> Tensor:
    """The right sum, with powers of γ that are rounded to float32."""
    return power_sum(rewards, mask, lambda t, u: gamma ** (u - t).clamp(min=0))


def divided_by_powers(rewards: Tensor, mask: Tensor | None = None, *, gamma: float) -> Tensor:
    """The sum discounted from the start of the episode, divided by γ^t, which may be 0."""
    powers = gamma ** torch.arange(rewards.shape[1])
    return (real(rewards, mask) * powers).flip(1).cumsum(1).flip(1) / powers


reward_to_go = Check(
    name="reward_to_go",
    reference=policy_gradient.reward_to_go,
    cases=reward_to_go_cases,
    wrong=(
        Wrong(
            "the full return at every step",
            summed(lambda t, u: u, lambda t, u: u >= 0),
            "Every step gets the full return. An action cannot influence rewards that came before it: leave those out.",
        ),
        Wrong(
            "the rewards so far",
            summed(lambda t, u: t - u, lambda t, u: u <= t),
            "You sum what came before each step. Reward-to-go is what comes from it on: run from the last step back.",
        ),
        Wrong(
            "today's reward left out",
            summed(lambda t, u: u - t - 1, lambda t, u: u > t),
            "The reward of the step itself is missing: r_t comes after action a_t, so the sum starts at t' = t.",
        ),
        Wrong(
            "discounted from the start of the episode",
            summed(lambda t, u: u),
            "γ = 1 is right, γ = 0.9 is not: you discount from the episode's start, γ^t'. From step t on it is "
            "γ^(t'−t).",
        ),
        Wrong(
            "divided by γ^t",
            divided_by_powers,
            "γ = 1 is right, γ = 0 is NaN: you discount from the episode's start and divide by γ^t, 0/0 there. The "
            "recursion from the last step back needs no division.",
        ),
        Wrong(
            "powers in single precision",
            summed_in_float32,
            "Right, but for rounding: gamma ** torch.arange(T) is float32, whatever the rewards are. Give arange the "
            "dtype of the rewards.",
        ),
        Wrong(
            "discounted once too often",
            summed(lambda t, u: u - t + 1),
            "γ = 1 is right, γ = 0 is not: the step's own reward is discounted too, γ^(t'−t+1). It should count "
            "in full.",
        ),
        Wrong(
            "not discounted",
            summed(lambda t, u: 0 * u),
            "γ = 1 is right, everything else is not: γ is not used.",
        ),
        Wrong(
            "one factor for all later rewards",
            summed(lambda t, u: (u > t).long()),
            "Two steps are right, more are not: you multiply all later rewards by a single γ. Each further step "
            "takes another factor: G_t = r_t + γ·G_{t+1}.",
        ),
        Wrong(
            "only one step ahead",
            summed(lambda t, u: u - t, lambda t, u: (u >= t) & (u <= t + 1)),
            "You look one step ahead only. Is G_{t+1} in the recursion, or just r_{t+1}, as in a loop that runs "
            "forwards?",
        ),
        Wrong(
            "in reversed order",
            lambda rewards, mask=None, *, gamma: policy_gradient.reward_to_go(rewards, mask, gamma=gamma).flip(-1),
            "The numbers are right and in reversed order: they were collected from the last step back and not "
            "turned round.",
        ),
        Wrong(
            "the mask dropped",
            lambda rewards, mask=None, *, gamma: policy_gradient.reward_to_go(rewards, gamma=gamma),
            "Without a mask it is right, with one it is not: rewards under the padding leak back into the episode.",
        ),
        Wrong(
            "masked only at the end",
            lambda rewards, mask=None, *, gamma: torch.where(
                torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask,
                policy_gradient.reward_to_go(rewards, gamma=gamma),
                0,
            ),
            "The padding of the result is 0, as it should be, but the padding of the rewards was already in the "
            "sums: mask the rewards before the recursion.",
        ),
        Wrong(
            "the mask multiplied on",
            lambda r, mask=None, *, gamma: (
                policy_gradient.reward_to_go(r if mask is None else r * mask, gamma=gamma)
                * (1 if mask is None else mask)
            ),
            "Numbers under the padding of the rewards do no harm, NaN does: 0·NaN is NaN. Replace with "
            "torch.where(mask, x, 0) "
            "instead of multiplying by the mask.",
        ),
        Wrong(
            "the last step left out",
            lambda r, mask=None, *, gamma: torch.cat(
                [policy_gradient.reward_to_go(real(r, mask), gamma=gamma)[:, :-1], torch.zeros_like(r[:, :1])], dim=1
            ),
            "The last step is 0: the recursion starts at T − 2 there, or writes nothing for it. G of the last step is "
            "its reward.",
        ),
        Wrong(
            "γ forgotten, 0.99 for it",
            lambda r, mask=None, *, gamma: policy_gradient.reward_to_go(r, mask, gamma=0.99),
            "A γ of 0.99 stands in your code: use the argument.",
        ),
        Wrong(
            "one return per episode",
            lambda r, mask=None, *, gamma: policy_gradient.reward_to_go(r, mask, gamma=gamma)[:, 0],
            "You return the return of each episode, (B,). Wanted is one number per step, (B, T): what comes from "
            "there on.",
        ),
        Wrong(
            "summed over the batch",
            lambda r, mask=None, *, gamma: policy_gradient.reward_to_go(real(r, mask).T, gamma=gamma).T,
            "You sum over dim 0, so that one episode collects the rewards of the others. Time is dim 1.",
        ),
        Wrong(
            "the mean of what follows",
            lambda r, mask=None, *, gamma: (
                policy_gradient.reward_to_go(r, mask, gamma=gamma) / torch.arange(r.shape[1], 0, -1)
            ),
            "You take the mean of the rewards that follow where their sum is wanted.",
        ),
    ),
)


# --- Bug hunt: a baseline that peeks at the action ---------------------------------------------


def leave_one_out_advantages(returns: Tensor) -> Tensor:
    """Each sample's return minus the mean of the other samples of its prompt: (B, K) -> (B, K)."""
    return returns - baselines.leave_one_out_baseline(returns)


def peeking_cases() -> list[Case]:
    d, single = Draw(411), Draw(412, torch.float32)
    return [
        Case("two samples of one prompt", {"returns": d.normal(1, 2)}),
        Case("four samples of three prompts", {"returns": d.normal(3, 4)}),
        Case("a large common offset", {"returns": d.normal(2, 3) + 100}),
        Case("returns that are not contiguous", {"returns": transposed(d.normal(4, 3))}),
        Case("float32", {"returns": single.normal(3, 5)}),
    ]


peeking_baseline = Check(
    name="peeking_baseline",
    reference=leave_one_out_advantages,
    cases=peeking_cases,
    explains=(
        "The fault let each sample take part in its own baseline. Then what is left is (K−1)/K of what it should be: "
        "with K = 2 the direction was right, cosine 1.00, and the gradient half as long as the true one. So it went "
        "unnoticed: a run learns, but as if its learning rate had been halved, and Adam hides even that. No curve in a "
        "log says so; what does is the gradient beside an exact one, or a test with two samples, 1 and 0, whose "
        "advantages must be 1 and −1."
    ),
    wrong=(
        Wrong(
            "the mean over all K",
            lambda r: r - r.mean(1, keepdim=True),
            "The baseline still sees the action: sample k's own return is in the mean that is subtracted from it, "
            "which shrinks every gradient by (K−1)/K. Average the others.",
        ),
        Wrong(
            "divided by K",
            lambda r: r - (r.sum(1, keepdim=True) - r) / r.shape[1],
            "Sample k is no longer in the sum, but still in the count: K − 1 others are left.",
        ),
        Wrong(
            "the sum of the others",
            lambda r: r - (r.sum(1, keepdim=True) - r),
            "You subtract the sum of the other returns where their mean is wanted.",
        ),
        Wrong(
            "across the prompts",
            lambda r: r - (r.sum() - r) / max(r.numel() - 1, 1),
            "You average over the samples of all prompts. That does not peek, but a hard prompt's samples would "
            "all look bad: compare within a prompt.",
        ),
        Wrong(
            "the wrong dimension",
            lambda r: r - r.mean(0, keepdim=True),
            "You average over the prompts (dim 0); the samples of one prompt stand in a row (dim 1). And leave "
            "each sample out of its own mean.",
        ),
        Wrong(
            "the best of all",
            lambda r: r - r.amax(1, keepdim=True),
            "You subtract the best return, and the best sample subtracts itself: a baseline that sees its action.",
        ),
        Wrong(
            "no baseline",
            lambda r: r.clone(),
            "Without any baseline nothing peeks, but the noise is back. Subtract the mean of the other samples.",
        ),
        Wrong(
            "the baseline itself",
            baselines.leave_one_out_baseline,
            "This is the baseline, and the right one. Return what is left of the returns when it is subtracted.",
        ),
        Wrong(
            "standardised",
            lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, correction=0, keepdim=True) + 1e-8),
            "You divide by the standard deviation, as GRPO does. It contains the sample's own return, and so does "
            "the mean.",
        ),
        Wrong(
            "only the count changed",
            lambda r: r - r.sum(1, keepdim=True) / (r.shape[1] - 1),
            "You divide by K − 1, but the sum still holds the sample itself: take its own return out of it.",
        ),
        Wrong(
            "the sign",
            lambda r: baselines.leave_one_out_baseline(r) - r,
            "The sign is flipped: the return minus the baseline, so that a sample better than the others is positive.",
        ),
        Wrong(
            "the median",
            lambda r: r - r.median(1, keepdim=True).values,
            "You subtract the median of all K. The sample itself takes part in it: it still sees the action.",
        ),
        Wrong(
            "the first sample",
            lambda r: r - r[:, :1],
            "You subtract the first sample from all. That does not peek for the others, but the first subtracts "
            "itself and is always 0.",
        ),
        Wrong(
            "the next sample",
            lambda r: r - r.roll(-1, 1),
            "You subtract one other sample. That does not peek and is right on average, but it is noisy: with two "
            "samples it is right, with more average all the others.",
        ),
        Wrong(
            "the sum instead of the mean of all",
            lambda r: r - r.sum(1, keepdim=True),
            "You subtract the sum of all K returns. Wanted is the mean, and of the others only.",
        ),
    ),
)
