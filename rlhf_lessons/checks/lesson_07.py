"""Lesson 07: PPO's clipped loss, and two signs that are easy to lose."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lessons import ppo
from rlhf_lessons.checks._harness import Case, Check, Wrong
from rlhf_lessons.checks._inputs import Draw, prefix_mask, transposed, under_padding
from rlhf_lessons.checks.lesson_03 import real, tokens_of
from rlhf_lessons.masking import masked_whiten

# --- Exercise: clipped_policy_loss -------------------------------------------------------------


def clipped_cases() -> list[Case]:
    d, single = Draw(701), Draw(702, torch.float32)
    ragged = prefix_mask([2, 5, 1], 5)

    def one(says: str, ratio: float, advantage: float) -> Case:
        old = torch.tensor([[-1.3]], dtype=torch.float64)
        inputs = {"log_probs": old + math.log(ratio), "old_log_probs": old}
        return Case(says, inputs | {"advantages": torch.full_like(old, advantage)}, {"clip_eps": 0.2})

    def some(says: str, draw: Draw, garbage: float | None, layout=lambda x: x, eps: float = 0.3) -> Case:
        old = draw.log_probs(3, 5)
        inputs = {
            "log_probs": old + draw.normal(3, 5, scale=0.5),
            "old_log_probs": old,
            "advantages": draw.normal(3, 5),
        }
        if garbage is None:
            return Case(says, {k: layout(x) for k, x in inputs.items()}, {"clip_eps": eps})
        inputs = {k: layout(under_padding(x, ragged, garbage)) for k, x in inputs.items()}
        return Case(says, inputs | {"mask": ragged}, {"clip_eps": eps})

    return [
        one("ratio 1.1, advantage 2: inside the range", 1.1, 2.0),
        one("ratio 1.5, advantage 2: clipped", 1.5, 2.0),
        one("ratio 0.5, advantage −2: clipped", 0.5, -2.0),
        one("ratio 0.5, advantage 2: outside, but not clipped", 0.5, 2.0),
        one("ratio 1.5, advantage −2: outside, but not clipped", 1.5, -2.0),
        some("three rows of five, no mask", d, None),
        some("padding, with numbers under it", d, 3.0),
        some("padding, with NaN under it", d, math.nan),
        some("tensors that are not contiguous", d, None, transposed, eps=0.1),
        some("float32", single, 2.0),
    ]


def misread(
    *,
    ratio: Callable[..., Tensor] = lambda new, old: (new - old).exp(),
    clip: Callable[..., Tensor] = lambda ratio, eps: ratio.clamp(1 - eps, 1 + eps),
    choose: Callable[..., Tensor] = torch.min,
    mean: Callable[..., Tensor] = lambda terms, mask: real(terms, mask).sum() / tokens_of(terms, mask),
    sign: float = -1.0,
    silence: bool = True,
) -> Callable[..., Tensor]:
    """The clipped loss with one thing read wrongly; silence: whether the padding is replaced before it is used."""

    def wrong_loss(log_probs, old_log_probs, advantages, mask=None, *, clip_eps):
        new, old, adv = (real(x, mask) if silence else x for x in (log_probs, old_log_probs, advantages.detach()))
        rho = ratio(new, old)
        return sign * mean(choose(rho * adv, clip(rho, clip_eps) * adv), mask)

    return wrong_loss


def mean_of_rows(terms: Tensor, mask: Tensor | None) -> Tensor:
    """Each row's mean first, then the mean of the rows."""
    counts = terms.shape[1] if mask is None else mask.sum(1)
    return (real(terms, mask).sum(1) / counts).mean()


def attached_advantages(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor | None = None, *, clip_eps: float
) -> Tensor:
    """The right loss, with the gradient into the advantages left on."""
    new, old, adv = (real(x, mask) for x in (log_probs, old_log_probs, advantages))
    rho = (new - old).exp()
    terms = torch.min(rho * adv, rho.clamp(1 - clip_eps, 1 + clip_eps) * adv)
    return -real(terms, mask).sum() / tokens_of(terms, mask)


clipped_policy_loss = Check(
    name="clipped_policy_loss",
    reference=ppo.clipped_policy_loss,
    cases=clipped_cases,
    gradient_of=("log_probs",),
    constants=("advantages",),
    wrong=(
        Wrong(
            "max for min",
            misread(choose=torch.max),
            "Ratio 1.1 is right, outside the range it is not: you take the better of the two where the worse is "
            "wanted. In the objective that is the min, −min(ρÂ, clip(ρ)Â); in the loss the max, max(−ρÂ, "
            "−clip(ρ)Â).",
        ),
        Wrong(
            "the sign",
            misread(sign=1.0),
            "This is the objective, which is to go up. An optimiser minimises: what is missing is the minus.",
        ),
        Wrong(
            "not clipped",
            misread(clip=lambda ratio, eps: ratio),
            "Inside the range it is right, outside it is not: nothing is clipped.",
        ),
        Wrong(
            "always clipped",
            misread(choose=lambda whole, clipped: clipped),
            "Where the ratio has gone the wrong way (down with Â > 0, up with Â < 0) the gradient must stay, or "
            "the policy cannot come back: take the min with the unclipped term.",
        ),
        Wrong(
            "only clipped from above",
            misread(clip=lambda ratio, eps: ratio.clamp(max=1 + eps)),
            "Â > 0 is right, Â < 0 is not: the ratio is clipped from above only.",
        ),
        Wrong(
            "the product clipped",
            lambda new, old, adv, mask=None, *, clip_eps: misread(
                choose=lambda whole, clipped: torch.min(whole, whole.clamp(1 - clip_eps, 1 + clip_eps))
            )(new, old, adv, mask, clip_eps=clip_eps),
            "You clip ρ·Â. The range is one of ratios: clip ρ first, then multiply by the advantage.",
        ),
        Wrong(
            "clipped around 0",
            misread(clip=lambda ratio, eps: ratio.clamp(-eps, eps)),
            "The clip range is centred on 1, the ratio of a policy that has not moved: 1 − ε to 1 + ε.",
        ),
        Wrong(
            "the ratio upside down",
            misread(ratio=lambda new, old: (old - new).exp()),
            "The ratio is upside down: new over old, exp(log_probs − old_log_probs).",
        ),
        Wrong(
            "the log-ratio",
            misread(ratio=lambda new, old: new - old),
            "The ratio lacks the exponential: log_probs − old_log_probs is its logarithm.",
        ),
        Wrong(
            "no gradient through the ratio",
            misread(ratio=lambda new, old: (new - old).detach().exp()),
            "The value is right, but the ratio is detached, so nothing learns. The old log-probabilities are "
            "constant, the new ones are not.",
        ),
        Wrong(
            "the sum over the tokens",
            misread(mean=lambda terms, mask: real(terms, mask).sum()),
            "One token is right, several are not: you sum over the tokens where their mean is wanted.",
        ),
        Wrong(
            "the mean over the padding too",
            misread(mean=lambda terms, mask: real(terms, mask).mean()),
            "You divide by all B·T positions: the mean is over the real tokens, so divide by mask.sum().",
        ),
        Wrong(
            "the mean of the rows' means",
            misread(mean=mean_of_rows),
            "You average each row first, so that a token of a short response weighs more. The mean is over all "
            "real tokens of the minibatch.",
        ),
        Wrong(
            "the mask dropped",
            lambda new, old, adv, mask=None, *, clip_eps: misread()(new, old, adv, clip_eps=clip_eps),
            "Without a mask it is right, with one it is not: does the padding still enter the mean?",
        ),
        Wrong(
            "masked at the end",
            misread(silence=False),
            "The value is right, but NaN under the padding reaches its gradient: masking after the exponential is "
            "too late. Replace log_probs, old_log_probs and advantages under the padding first.",
        ),
        Wrong(
            "the smaller of the ratios",
            lambda new, old, adv, mask=None, *, clip_eps: misread(
                choose=lambda whole, clipped: clipped, clip=lambda rho, eps: torch.min(rho, rho.clamp(1 - eps, 1 + eps))
            )(new, old, adv, mask, clip_eps=clip_eps),
            "Â > 0 is right, Â < 0 is not: above 1 + ε your loss is flat. A negative Â turns the order round, so the "
            "smaller ratio gives the larger product; the min is of the two products, whatever the sign of Â.",
        ),
        Wrong(
            "clipped on both sides where Â < 0",
            misread(choose=lambda whole, clipped: torch.where(whole > 0, torch.min(whole, clipped), clipped)),
            "Â > 0 is right, Â < 0 is not: above 1 + ε you clip there, too. A bad token that became likelier is to "
            "come back: ρÂ is the smaller of the two products, and it counts.",
        ),
        Wrong(
            "a ratio of logarithms",
            misread(ratio=lambda new, old: new / old),
            "You divide one logarithm by the other. The ratio is of probabilities: exp(log_probs − old_log_probs).",
        ),
        Wrong(
            "divided by the number of rows",
            misread(mean=lambda terms, mask: real(terms, mask).sum() / len(terms)),
            "One token is right, several are not: you sum over a row and divide by the number of rows. The mean is "
            "over all real tokens.",
        ),
        Wrong(
            "the ratio of the whole sequence",
            misread(ratio=lambda new, old: (new - old).sum(1, keepdim=True).exp()),
            "One token is right, several are not: this is the ratio of whole sequences, the product over a row. PPO "
            "clips each token by its own.",
        ),
        Wrong(
            "the advantages not held constant",
            attached_advantages,
            "The value is right, but gradient flows into the advantages. They are made from the critic, so the policy "
            "loss would train it to praise: advantages.detach().",
        ),
        Wrong(
            "ε written in",
            misread(clip=lambda rho, eps: rho.clamp(0.8, 1.2)),
            "ε = 0.2 is right, other values are not: 0.8 and 1.2 stand in your code. Use clip_eps.",
        ),
        Wrong(
            "the log-ratio clipped",
            misread(clip=lambda rho, eps: rho.log().clamp(-eps, eps).exp()),
            "You clip the log-ratio to ±ε. That is nearly the same for a small ε, and not the same: the range 1 − ε "
            "to 1 + ε is one of ratios.",
        ),
        Wrong(
            "only clipped from below",
            misread(clip=lambda rho, eps: rho.clamp(min=1 - eps)),
            "Â < 0 is right, Â > 0 is not: the ratio is clipped from below only.",
        ),
        Wrong(
            "the mask multiplied on",
            lambda new, old, adv, mask=None, *, clip_eps: misread(
                silence=False,
                mean=lambda terms, mask: (terms if mask is None else terms * mask).sum() / tokens_of(terms, mask),
            )(new, old, adv, mask, clip_eps=clip_eps),
            "Numbers under the padding do no harm, NaN does: 0·NaN is NaN. Replace with torch.where(mask, x, 0) "
            "before the exponential instead of multiplying by the mask.",
        ),
        Wrong(
            "one loss per token",
            misread(mean=lambda terms, mask: real(terms, mask)),
            "You return one loss per token; average over the real tokens.",
        ),
        Wrong(
            "the advantages whitened",
            lambda new, old, adv, mask=None, *, clip_eps: misread()(
                new,
                old,
                adv if adv.numel() == 1 else masked_whiten(adv, torch.ones_like(adv) > 0 if mask is None else mask),
                mask,
                clip_eps=clip_eps,
            ),
            "You whiten the advantages inside the loss. That is done once for the whole batch, never per minibatch: "
            "take them as they come.",
        ),
    ),
)


# --- Bug hunt: max for min, and the sign of the entropy ----------------------------------------


def policy_and_entropy_loss(
    ratio: Tensor, advantages: Tensor, entropy: Tensor, *, clip_eps: float, ent_coef: float
) -> Tensor:
    """The clipped policy loss minus the entropy bonus, means over all tokens."""
    policy = ppo.clipped_policy_loss(ratio.log(), torch.zeros_like(ratio), advantages, clip_eps=clip_eps)
    return ppo.ppo_loss(policy, torch.zeros_like(policy), entropy.mean(), vf_coef=0.0, ent_coef=ent_coef)


def two_bug_cases() -> list[Case]:
    d, single = Draw(711), Draw(712, torch.float32)

    def case(says: str, draw: Draw, batch: int, steps: int, spread: float, ent_coef: float) -> Case:
        inputs = {
            "ratio": (draw.normal(batch, steps) * spread).exp(),
            "advantages": draw.normal(batch, steps),
            "entropy": draw.normal(batch, steps).abs() + 0.5,
        }
        return Case(says, inputs, {"clip_eps": 0.2, "ent_coef": ent_coef})

    return [
        case("ratios inside the range, no entropy bonus", d, 1, 3, 0.05, 0.0),
        case("ratios far out, no entropy bonus", d, 2, 4, 1.0, 0.0),
        case("ratios inside the range, an entropy bonus", d, 1, 3, 0.05, 0.3),
        case("ratios far out, an entropy bonus", d, 3, 4, 1.0, 0.2),
        case("float32", single, 3, 4, 0.8, 0.1),
    ]


def suspect(choose: Callable[..., Tensor], sign: float) -> Callable[..., Tensor]:
    """The hunted function with its two suspects set: which of the terms is taken, and the sign of the entropy."""

    def wrong_loss(ratio, advantages, entropy, *, clip_eps, ent_coef):
        clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
        policy = -choose(ratio * advantages, clipped * advantages).mean()
        return policy + sign * ent_coef * entropy.mean()

    return wrong_loss


max_for_min = Check(
    name="max_for_min",
    reference=policy_and_entropy_loss,
    cases=two_bug_cases,
    gradient_of=("ratio", "entropy"),
    explains=(
        "There were two faults. With max for min, a ratio that has left the range for the better is still pushed on, "
        "and one that went the wrong way gets no gradient back: the largest ratio runs away. With a plus before it "
        "the entropy is minimised, and the policy is driven towards a single text. Both went unnoticed because the "
        "loss still falls. In a log, the clip fraction and the approximate KL give away the first, and an entropy "
        "that sinks to 0 the second."
    ),
    wrong=(
        Wrong(
            "both",
            suspect(torch.max, 1.0),
            "Both bugs are still there: the better of the two terms is taken where the pessimistic one is wanted, "
            "and the entropy has the wrong sign.",
        ),
        Wrong(
            "max for min",
            suspect(torch.max, -1.0),
            "The entropy is right now. The other bug remains: with the max a ratio that has left the range for "
            "the better is still pushed on. −min(ρÂ, clip(ρ)Â) is the pessimistic one.",
        ),
        Wrong(
            "the sign of the entropy",
            suspect(torch.min, 1.0),
            "The min is right now. The other bug remains: a loss is minimised, so an entropy that is added to it "
            "is driven to 0. To keep it up, subtract it.",
        ),
        Wrong(
            "the entropy dropped",
            suspect(torch.min, 0.0),
            "The min is right, but the entropy has gone from the loss: it belongs there, with the other sign.",
        ),
        Wrong(
            "no min at all",
            suspect(lambda whole, clipped: clipped, -1.0),
            "The clipped term alone loses the gradient where the ratio has gone the wrong way: the min of both is "
            "wanted.",
        ),
        Wrong(
            "everything flipped",
            lambda ratio, adv, entropy, *, clip_eps, ent_coef: (
                -suspect(torch.min, -1.0)(ratio, adv, entropy, clip_eps=clip_eps, ent_coef=ent_coef)
            ),
            "The sign of the whole is flipped: this is what PPO maximises, and the optimiser minimises.",
        ),
        Wrong(
            "clipped from above only",
            suspect(lambda whole, clipped: torch.min(whole, whole), -1.0),
            "Nothing is clipped any more: the min is of the unclipped and of the clipped term.",
        ),
        Wrong(
            "the sum of the entropy",
            lambda ratio, adv, entropy, *, clip_eps, ent_coef: suspect(torch.min, -entropy.numel())(
                ratio, adv, entropy, clip_eps=clip_eps, ent_coef=ent_coef
            ),
            "Both signs are right, but the entropy is summed where its mean is wanted.",
        ),
        Wrong(
            "the coefficient dropped",
            lambda ratio, adv, entropy, *, clip_eps, ent_coef: suspect(torch.min, -1.0)(
                ratio, adv, entropy, clip_eps=clip_eps, ent_coef=1.0
            ),
            "Both signs are right, but the entropy has lost its coefficient: ent_coef.",
        ),
        Wrong(
            "the smaller ratio",
            lambda ratio, adv, entropy, *, clip_eps, ent_coef: (
                -(torch.min(ratio, ratio.clamp(1 - clip_eps, 1 + clip_eps)) * adv).mean() - ent_coef * entropy.mean()
            ),
            "The min is of the two products. Yours is of the two ratios, which is the other choice where Â is "
            "negative.",
        ),
        Wrong(
            "the policy loss with the wrong sign",
            suspect(lambda whole, clipped: -torch.min(whole, clipped), -1.0),
            "The entropy is right now, but the policy term has lost its minus: this is what PPO maximises.",
        ),
    ),
)
