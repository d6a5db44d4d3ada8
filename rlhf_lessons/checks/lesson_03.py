"""Lesson 03: the loss whose gradient is the policy gradient."""

import math

import torch
from torch import Tensor

from rlhf_lessons import policy_gradient
from rlhf_lessons.checks._harness import Case, Check, Wrong
from rlhf_lessons.checks._inputs import Draw, prefix_mask, transposed, under_padding


def real(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with zeros under the padding."""
    return x if mask is None else torch.where(mask, x, 0)


def tokens_of(x: Tensor, mask: Tensor | None) -> Tensor | int:
    """How many real tokens there are."""
    return x.numel() if mask is None else mask.sum()


# --- Exercise: policy_gradient_loss ------------------------------------------------------------


def policy_gradient_cases() -> list[Case]:
    d, single = Draw(301), Draw(302, torch.float32)

    def case(says: str, draw: Draw, mask: Tensor, garbage: float | None, layout=lambda x: x) -> Case:
        log_probs, weights = draw.log_probs(*mask.shape), draw.normal(*mask.shape)
        if garbage is None:
            return Case(says, {"log_probs": layout(log_probs), "weights": layout(weights)})
        inputs = {"log_probs": log_probs, "weights": weights}
        return Case(says, {k: layout(under_padding(v, mask, garbage)) for k, v in inputs.items()} | {"mask": mask})

    full, ragged = prefix_mask([3, 3], 3), prefix_mask([2, 4, 1], 4)
    return [
        case("a single token", d, full[:1, :1], None),
        case("one episode of two steps", d, full[:1, :2], None),
        case("two episodes of three steps, no mask", d, full, None),
        case("padding, with numbers under it", d, ragged, 30.0),
        case("padding, with NaN under it", d, ragged, math.nan),
        case("tensors that are not contiguous", d, ragged, 2.0, transposed),
        case("float32", single, ragged, 5.0),
    ]


policy_gradient_loss = Check(
    name="policy_gradient_loss",
    reference=policy_gradient.policy_gradient_loss,
    cases=policy_gradient_cases,
    gradient_of=("log_probs",),
    constants=("weights",),
    wrong=(
        Wrong(
            "the sign",
            lambda lp, w, mask=None: (real(lp, mask) * real(w, mask).detach()).sum() / len(lp),
            "This is the objective: its gradient points uphill, and an optimiser goes downhill. What is missing "
            "is the minus.",
        ),
        Wrong(
            "probabilities",
            lambda lp, w, mask=None: -(real(lp.exp(), mask) * real(w, mask).detach()).sum() / len(lp),
            "You weight the probabilities. The log-derivative trick turns ∇P into P·∇log P, and the P is in the "
            "sampling: log-probabilities are wanted.",
        ),
        Wrong(
            "mean over tokens",
            lambda lp, w, mask=None: -(real(lp, mask) * real(w, mask).detach()).sum() / tokens_of(lp, mask),
            "One token is right, several are not: you average over the tokens. log P(τ) is a sum over steps: sum "
            "over time, then average over episodes.",
        ),
        Wrong(
            "the mean over each episode",
            lambda lp, w, mask=None: (
                -(
                    (real(lp, mask) * real(w, mask).detach()).sum(1)
                    / (torch.ones_like(lp).sum(1) if mask is None else mask.sum(1))
                ).mean()
            ),
            "One token is right, several are not: you divide each episode by its length, so that a token of a long "
            "episode counts less. log P(τ) is a sum over steps.",
        ),
        Wrong(
            "the sum over episodes",
            lambda lp, w, mask=None: -(real(lp, mask) * real(w, mask).detach()).sum(),
            "One episode is right, two are not: sum over the steps, but average over the batch.",
        ),
        Wrong(
            "divided by the padded length",
            lambda lp, w, mask=None: -(real(lp, mask) * real(w, mask).detach()).mean(),
            "You average over all B·T positions, padding included: the same episode would count less in a longer "
            "batch. Sum over time, then divide by the number of episodes.",
        ),
        Wrong(
            "outside the sum",
            lambda lp, w, mask=None: -(real(lp, mask).sum(1) * real(w, mask).detach().sum(1)).mean(),
            "You multiply the two sums over time. Each step has a weight of its own: multiply first, then sum.",
        ),
        Wrong(
            "the mask dropped",
            lambda lp, w, mask=None: -(lp * w.detach()).sum() / len(lp),
            "Without a mask it is right, with one it is not: does the padding still enter the sum?",
        ),
        Wrong(
            "the mask multiplied on",
            lambda lp, w, mask=None: -(lp * w.detach() * (1 if mask is None else mask)).sum() / len(lp),
            "Numbers under the padding do no harm, NaN does: 0·NaN is NaN. Replace with torch.where(mask, x, 0) "
            "instead of multiplying by the mask.",
        ),
        Wrong(
            "the mask put on after",
            lambda lp, w, mask=None: -real(lp * w.detach(), mask).sum() / len(lp),
            "The value is right, its gradient is NaN under the padding: torch.where after the product is too "
            "late, since the gradient of the product is 0·NaN. Mask both factors first.",
        ),
        Wrong(
            "the weights not held constant",
            lambda lp, w, mask=None: -(real(lp, mask) * real(w, mask)).sum() / len(lp),
            "The value is right, but gradient also flows into the weights. They are numbers that came from the "
            "environment: weights.detach().",
        ),
        Wrong(
            "divided by the number of steps",
            lambda lp, w, mask=None: -(real(lp, mask) * real(w, mask).detach()).sum(0).mean(),
            "You divide by the number of steps where the number of episodes is wanted: sum over dim 1, mean over dim "
            "0.",
        ),
        Wrong(
            "one loss per episode",
            lambda lp, w, mask=None: -(real(lp, mask) * real(w, mask).detach()).sum(1),
            "You return one loss per episode; average them to a scalar.",
        ),
        Wrong(
            "one loss per token",
            lambda lp, w, mask=None: -(real(lp, mask) * real(w, mask).detach()),
            "You return one loss per token. Sum over the steps, then average over the episodes.",
        ),
        Wrong(
            "the weights forgotten",
            lambda lp, w, mask=None: -real(lp, mask).sum() / len(lp),
            "The weights are not used: this makes everything that was sampled likelier, the bad as well as the good.",
        ),
        Wrong(
            "the log-probabilities detached",
            lambda lp, w, mask=None: -(real(lp, mask).detach() * real(w, mask)).sum() / len(lp),
            "You detach the log-probabilities and leave the weights attached. It is the other way round: the gradient "
            "goes through log π.",
        ),
        Wrong(
            "the weights added",
            lambda lp, w, mask=None: -(real(lp, mask) + real(w, mask).detach()).sum() / len(lp),
            "You add the weights. Each log-probability is multiplied by its weight.",
        ),
        Wrong(
            "the sign of the weights lost",
            lambda lp, w, mask=None: -(real(lp, mask) * real(w, mask).detach().abs()).sum() / len(lp),
            "The weights have lost their sign: an action that did badly is to become less likely.",
        ),
    ),
)


# --- Bug hunt: the gradient through the return -------------------------------------------------


def surprise_loss(log_probs: Tensor, scores: Tensor, *, bonus: float) -> Tensor:
    """REINFORCE where each token earns −bonus·log π on top of the episode's score; returns are constants."""
    returns = scores - bonus * log_probs.sum(dim=1)
    return policy_gradient.policy_gradient_loss(log_probs, returns[:, None].expand_as(log_probs))


def return_cases() -> list[Case]:
    d, single = Draw(311), Draw(312, torch.float32)

    def case(says: str, draw: Draw, batch: int, steps: int, bonus: float) -> Case:
        return Case(says, {"log_probs": draw.log_probs(batch, steps), "scores": draw.normal(batch)}, {"bonus": bonus})

    return [
        case("no bonus", d, 2, 3, 0.0),
        case("a bonus of 0.5", d, 1, 2, 0.5),
        case("three episodes", d, 3, 4, 0.3),
        case("float32", single, 3, 2, 0.7),
    ]


def surprise_terms(log_probs: Tensor, returns: Tensor) -> Tensor:
    """−(1/B) Σ_b Σ_t log π · R, with whatever gradient the returns carry."""
    return -(log_probs * returns[:, None]).sum(1).mean()


gradient_through_return = Check(
    name="gradient_through_return",
    reference=surprise_loss,
    cases=return_cases,
    gradient_of=("log_probs",),
    explains=(
        "The fault let gradient flow through the return as well. There it adds b times the gradient of log π, "
        "weighted with log π itself, and the policy settled at 67% for the best token where 87% is right: as if the "
        "bonus were twice as large. "
        "The loss had the right value throughout, so no curve of it could tell. What shows it is a known answer (here "
        "softmax(score/b)), or an assertion that returns.requires_grad is False."
    ),
    wrong=(
        Wrong(
            "through the return",
            lambda lp, scores, *, bonus: surprise_terms(lp, scores - bonus * lp.sum(1)),
            "Without a bonus it is right, with one the value is right and the gradient is not: the return is made "
            "of log_probs, and gradient flows back through it. R(τ) is a number that was observed.",
        ),
        Wrong(
            "the wrong factor detached",
            lambda lp, scores, *, bonus: surprise_terms(lp.detach(), scores - bonus * lp.sum(1)),
            "You detach the log-probabilities and leave the return attached. It is the other way round: ∇log π is "
            "the score function, the return only weights it.",
        ),
        Wrong(
            "everything detached",
            lambda lp, scores, *, bonus: surprise_terms(lp.detach(), (scores - bonus * lp.sum(1)).detach()),
            "Now everything is detached and nothing has a gradient: detach the return alone, where it is made, "
            "and keep log_probs attached.",
        ),
        Wrong(
            "the bonus left out",
            lambda lp, scores, *, bonus: surprise_terms(lp, scores),
            "The gradient no longer flows through the return, but the bonus has gone from it too: keep its value, "
            "cut its gradient.",
        ),
        Wrong(
            "only today's bonus",
            lambda lp, scores, *, bonus: -(lp * (scores[:, None] - bonus * lp.detach())).sum(1).mean(),
            "Each step is weighted with its own bonus only. Here the whole return weights every step: sum the "
            "bonuses over time first.",
        ),
        Wrong(
            "the sign",
            lambda lp, scores, *, bonus: -surprise_terms(lp, (scores - bonus * lp.sum(1)).detach()),
            "The return is constant now, but the loss has lost its minus.",
        ),
        Wrong(
            "the bonus subtracted",
            lambda lp, scores, *, bonus: surprise_terms(lp, (scores + bonus * lp.sum(1)).detach()),
            "The return is constant now, but the bonus has changed its sign: surprise is −log π, and it is paid.",
        ),
        Wrong(
            "the mean over the steps",
            lambda lp, scores, *, bonus: -(lp * (scores - bonus * lp.sum(1)).detach()[:, None]).mean(),
            "The return is constant now, but the loss is a mean over all tokens. It was a sum over the steps, then a "
            "mean over the texts.",
        ),
        Wrong(
            "the mean bonus",
            lambda lp, scores, *, bonus: surprise_terms(lp, (scores - bonus * lp.mean(1)).detach()),
            "The return is constant now, but it holds the mean of the bonuses where it held their sum.",
        ),
        Wrong(
            "half the bonus",
            lambda lp, scores, *, bonus: surprise_terms(lp, scores - bonus / 2 * lp.sum(1)),
            "The policy would settle where it should, since the gradient through half the bonus doubles it. But the "
            "loss has another value now, of a return that nobody was paid. Leave the bonus; hold the return constant.",
        ),
        Wrong(
            "only the bonuses to come",
            lambda lp, scores, *, bonus: (
                -(lp * (scores[:, None] - bonus * lp.detach().flip(1).cumsum(1).flip(1))).sum(1).mean()
            ),
            "Each step is weighted with the bonuses from it on. That is right on average, as lesson 04 proves, but "
            "here the value must not change: the whole return weights every step.",
        ),
        Wrong(
            "the bonus beside the return",
            lambda lp, scores, *, bonus: surprise_terms(lp, scores) + bonus * lp.sum(1).mean(),
            "The bonus has become a term of its own. The gradient of Σ log π averages to 0, so it pays for nothing. "
            "The bonus belongs in the return, as a number.",
        ),
        Wrong(
            "summed over the texts",
            lambda lp, scores, *, bonus: len(lp) * surprise_terms(lp, (scores - bonus * lp.sum(1)).detach()),
            "The return is constant now, but you sum over the texts where their mean is wanted.",
        ),
    ),
)
