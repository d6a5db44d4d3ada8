"""Lesson 06: the importance ratio, and where importance sampling cannot work."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lessons import importance
from rlhf_lessons.checks._harness import Case, Check, Wrong, with_epsilon
from rlhf_lessons.checks._inputs import Draw, transposed

# --- Exercise: importance_ratio ----------------------------------------------------------------


def ratio_cases() -> list[Case]:
    d, single = Draw(601), Draw(602, torch.float32)
    names = ("log_probs", "old_log_probs")
    drop = single.normal(2, 3, scale=0.2)
    far = torch.tensor([[-150.0, -90.0, -1.0], [-3.0, -200.0, -120.0]])
    return [
        Case("a single token", {name: d.log_probs(1, 1) for name in names}),
        Case("two rows of three tokens", {name: d.log_probs(2, 3) for name in names}),
        Case("ratios far from 1", {name: d.normal(3, 4, scale=2) - 3 for name in names}),
        Case("tensors that are not contiguous", {name: transposed(d.log_probs(3, 4)) for name in names}),
        Case("float32", {name: single.log_probs(2, 3) for name in names}),
        Case("float32, probabilities too small to hold", {"log_probs": far + drop, "old_log_probs": far}),
    ]


importance_ratio = Check(
    name="importance_ratio",
    reference=importance.importance_ratio,
    cases=ratio_cases,
    gradient_of=("log_probs",),
    wrong=(
        Wrong(
            "upside down",
            lambda new, old: (old - new).exp(),
            "The ratio is upside down: the policy whose expectation is wanted stands on top, the one that sampled "
            "below.",
        ),
        Wrong(
            "the log-ratio",
            lambda new, old: new - old,
            "This is the logarithm of the ratio. Take the exponential: equal policies should give 1, not 0.",
        ),
        Wrong(
            "the ratio of the logarithms",
            lambda new, old: new / old,
            "You divide one log-probability by the other. Dividing probabilities is subtracting their logarithms.",
        ),
        Wrong(
            "the difference of the probabilities",
            lambda new, old: new.exp() - old.exp(),
            "You subtract the probabilities; a ratio divides them.",
        ),
        Wrong(
            "the new probability alone",
            lambda new, old: new.exp(),
            "This is the new policy's probability; divide it by the old one's.",
        ),
        Wrong(
            "the ratio of the whole sequence",
            lambda new, old: (new - old).sum(-1).exp(),
            "One token is right, several are not: this is the ratio of whole sequences. Wanted is one per token, "
            "(B, T).",
        ),
        Wrong(
            "the running product",
            lambda new, old: (new - old).cumsum(-1).exp(),
            "One token is right, several are not: you multiply up the ratios of all tokens so far. That is the "
            "exact weight of a prefix; PPO's ratio is of the one token.",
        ),
        Wrong(
            "clipped",
            lambda new, old: (new - old).exp().clamp(0.8, 1.2),
            "You clip the ratio already. That is the next lesson's, and it takes the gradient away with it.",
        ),
        Wrong(
            "cut off from the gradient",
            lambda new, old: (new - old).detach().exp(),
            "The values are right, but detached: the gradient of the ratio is how the new policy learns. Only the "
            "old log-probabilities are constants.",
        ),
        Wrong(
            "probabilities divided",
            lambda new, old: new.exp() / old.exp(),
            "Ordinary probabilities are right, tiny ones are not: both round to 0, and 0/0 is NaN. Subtract the "
            "logarithms first, then take one exponential.",
        ),
        Wrong(
            "squeezed",
            lambda new, old: (new - old).exp().squeeze(),
            "Several rows are right, a single token is not: squeeze() drops every dimension of size 1. Keep the shape "
            "(B, T).",
        ),
        Wrong(
            "the mean over the sequence",
            lambda new, old: (new - old).mean(-1, keepdim=True).exp().expand_as(new),
            "One token is right, several are not: you average the log-ratios of a row. Each token has its own ratio.",
        ),
        Wrong(
            "first order",
            lambda new, old: 1 + new - old,
            "Near 1 it is nearly right, far from it is not: 1 + d is the beginning of the series of exp(d).",
        ),
        Wrong(
            "normalised",
            lambda new, old: (new - old).exp() / (new - old).exp().sum(),
            "Your ratios sum to 1: they are normalised over the batch. That makes another estimator, with a bias; "
            "wanted are the plain ratios.",
        ),
        Wrong(
            "the logarithm of the difference",
            lambda new, old: (new.exp() - old.exp()).exp(),
            "You take the exponential of a difference of probabilities. Subtract the logarithms.",
        ),
        *with_epsilon(
            lambda eps: lambda new, old: new.exp() / (old.exp() + eps),
            "exp of the difference never divides by 0.",
        ),
    ),
)


# --- Bug hunt: missing support -----------------------------------------------------------------


def has_support(p: Tensor, q: Tensor, f: Tensor) -> Tensor:
    """Whether q > 0 wherever p·f ≠ 0: samples of q can then give E_p[f]."""
    return ((q > 0) | (p * f == 0)).all()


def yes_or_no(my_has_support: Callable[..., bool | Tensor]) -> Callable[..., Tensor]:
    """The learner's function, with True or False as a tensor; a ValueError says no."""

    def answer(p, q, f):
        try:
            said = my_has_support(p, q, f)
        except ValueError:
            return torch.tensor(False)
        return torch.tensor(said) if isinstance(said, bool) else said

    return answer


def support_cases() -> list[Case]:
    d = Draw(611)

    def case(says: str, p: list[float], q: list[float], f: list[float]) -> Case:
        inputs = {"p": p, "q": q, "f": f}
        return Case(says, {name: torch.tensor(x, dtype=torch.float64) for name, x in inputs.items()})

    random = {"p": d.normal(6).softmax(0), "q": d.normal(6).softmax(0), "f": d.normal(6)}
    holes = {"p": random["p"], "q": random["q"].masked_fill(torch.arange(6) == 4, 0), "f": random["f"]}
    return [
        case("q covers everything", [0.5, 0.5], [0.9, 0.1], [1.0, 2.0]),
        case("q misses a value that p takes", [0.5, 0.5], [1.0, 0.0], [1.0, 2.0]),
        case("q misses a value where f < 0", [0.5, 0.5], [1.0, 0.0], [1.0, -2.0]),
        case("q misses a value where f = 0", [0.5, 0.5], [1.0, 0.0], [1.0, 0.0]),
        case("q misses a value that p never takes", [1.0, 0.0], [1.0, 0.0], [1.0, 2.0]),
        case("q misses a value where p and f are 0", [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]),
        case("p misses a value that q takes", [1.0, 0.0], [0.5, 0.5], [1.0, 2.0]),
        case("q gives a value a chance of 1e-9", [0.5, 0.5], [1 - 1e-9, 1e-9], [1.0, 2.0]),
        case("gains and losses under the hole cancel", [0.4, 0.3, 0.3], [1.0, 0.0, 0.0], [1.0, 2.0, -2.0]),
        case("two holes, one of them harmless", [0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 3.0, 1.0]),
        Case("six values, q covers everything", random),
        Case("six values, q misses one", holes),
    ]


missing_support = Check(
    name="missing_support",
    reference=has_support,
    cases=support_cases,
    adapt=yes_or_no,
    explains=(
        "The fault looked for infinite weights among samples in which there are none: a value that q never gives is "
        "never drawn, so its weight never appears. The estimate came out at 0.90 ± 0.00 where the truth is 2.90. It "
        "is the worst kind of error: more samples only make it more certain, and the effective sample size looks "
        "healthy. One number in a log tells: the weights' mean is 0.60, not 1, and the missing 0.40 is what p has "
        "where q never goes. In PPO a sampler with top-k or top-p makes such holes, and there even this number looks "
        "healthy as long as the stored log-probabilities are those of the whole softmax. Then look at what was never "
        "sampled: does the policy give it any probability?"
    ),
    wrong=(
        Wrong(
            "always yes",
            lambda p, q, f: True,
            "It never says no. A value that q never gives leaves no trace in the samples: no ratio becomes "
            "infinite, the estimate is just wrong. Look at q where p·f ≠ 0.",
        ),
        Wrong(
            "always no",
            lambda p, q, f: False,
            "It never says yes. Where q covers everything, importance sampling is exact in expectation.",
        ),
        Wrong(
            "f forgotten",
            lambda p, q, f: bool(((q > 0) | (p == 0)).all()),
            "Too strict: where f = 0 nothing is missed when q never goes there. What must be covered is p·f ≠ 0.",
        ),
        Wrong(
            "q positive everywhere",
            lambda p, q, f: bool((q > 0).all()),
            "Too strict: you ask for q > 0 everywhere. Where p or f is 0 there is nothing to miss.",
        ),
        Wrong(
            "p forgotten",
            lambda p, q, f: bool(((q > 0) | (f == 0)).all()),
            "Too strict: where p = 0 the value never counts, whatever f says of it.",
        ),
        Wrong(
            "the wrong way round",
            lambda p, q, f: bool(((p > 0) | (q == 0)).all()),
            "The wrong way round: q may go where p never goes (those samples get weight 0). It must not stay away "
            "from where p·f ≠ 0.",
        ),
        Wrong(
            "only positive f",
            lambda p, q, f: bool(((q > 0) | (p * f <= 0)).all()),
            "A hole under a negative f is missed: p·f ≠ 0 is the condition, not p·f > 0.",
        ),
        Wrong(
            "holes that cancel",
            lambda p, q, f: bool((p * f)[q == 0].sum() == 0),
            "You sum p·f over the holes. There it happens to cancel, but each value must be covered by itself.",
        ),
        Wrong(
            "a threshold",
            lambda p, q, f: bool(((q > 1e-6) | (p * f == 0)).all()),
            "You call a small q a missing one. With 1e-9 the variance is enormous, but the estimate is unbiased: "
            "only q = 0 is missing support.",
        ),
        Wrong(
            "f and p only together",
            lambda p, q, f: bool(((q > 0) | ((p == 0) & (f == 0))).all()),
            "Too strict: a value is harmless where p = 0 or f = 0, not only where both are.",
        ),
        Wrong(
            "the sum under the hole not zero",
            lambda p, q, f: bool((p * f)[q == 0].sum() <= 0),
            "You sum p·f over the holes and look at its sign. Each hole counts by itself, whatever its sign.",
        ),
        Wrong(
            "the answer inverted",
            lambda p, q, f: not bool(((q > 0) | (p * f == 0)).all()),
            "The condition is right and the answer inverted: True where samples of q can give the expectation.",
        ),
    ),
)
