"""Lesson 08: estimates of the KL divergence from samples, and the rewards that contain it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lessons import kl as divergence
from rlhf_lessons.checks._harness import Case, Check, Wrong
from rlhf_lessons.checks._inputs import Draw, prefix_mask, transposed, under_padding

KINDS = ("k1", "k2", "k3")

# --- Exercise: sampled_kl ----------------------------------------------------------------------


def sampled_kl_cases() -> list[Case]:
    d, single = Draw(801), Draw(802, torch.float32)

    def case(says: str, draw: Draw, kind: str, layout, *shape: int) -> Case:
        inputs = {name: layout(draw.log_probs(*shape)) for name in ("log_probs", "ref_log_probs")}
        return Case(f"{kind}, {says}", inputs, {"kind": kind})

    plain = [case("two tokens", d, kind, lambda x: x, 1, 2) for kind in KINDS]
    more = [case("two rows of three", d, kind, lambda x: x, 2, 3) for kind in KINDS]
    rest = [case("tensors that are not contiguous", d, "k3", transposed, 3, 4)]
    return plain + more + rest + [case("float32", single, kind, lambda x: x, 2, 3) for kind in KINDS]


def kinds(
    k1: Callable[[Tensor], Tensor] = lambda d: d,
    k2: Callable[[Tensor], Tensor] = lambda d: 0.5 * d.square(),
    k3: Callable[[Tensor], Tensor] = lambda d: (-d).exp() - 1 + d,
    difference: Callable[[Tensor, Tensor], Tensor] = torch.sub,
) -> Callable[..., Tensor]:
    """The three estimators of d = log π − log π_ref, some of them read wrongly."""
    formulas = {"k1": k1, "k2": k2, "k3": k3}
    return lambda log_probs, ref_log_probs, *, kind: formulas[kind](difference(log_probs, ref_log_probs))


sampled_kl = Check(
    name="sampled_kl",
    reference=divergence.sampled_kl,
    cases=sampled_kl_cases,
    gradient_of=("log_probs",),
    wrong=(
        Wrong(
            "the other direction",
            kinds(difference=lambda new, ref: ref - new),
            "k2 is right, k1 and k3 are not: the difference is the wrong way round. For KL(π‖π_ref), d = log π − "
            "log π_ref.",
        ),
        Wrong(
            "k3 with the sign of the other direction",
            kinds(k3=lambda d: d.exp() - 1 - d),
            "k1 and k2 are right, k3 is not: exp(d) − 1 − d is never negative either, but under the policy's own "
            "samples it does not estimate this KL. The ratio in it is π_ref/π, exp(−d).",
        ),
        Wrong(
            "k3 without the −1",
            kinds(k3=lambda d: (-d).exp() + d),
            "k1 and k2 are right, k3 is too large by 1: equal policies must give 0.",
        ),
        Wrong(
            "k3 with the sign of d lost",
            kinds(k3=lambda d: (-d).exp() - 1 - d),
            "k1 and k2 are right, k3 is not: exp(−d) − 1 − d has a slope of −2 at d = 0 and can be negative. The "
            "last term enters with a plus.",
        ),
        Wrong(
            "k3 without the control variate",
            kinds(k3=lambda d: (-d).exp() - 1),
            "k1 and k2 are right, k3 is not: exp(−d) − 1 has mean 0 under the policy. It is only the control "
            "variate; d itself has to be added.",
        ),
        Wrong(
            "k2 without the half",
            kinds(k2=lambda d: d.square()),
            "k1 and k3 are right, k2 is twice too large: ½ d².",
        ),
        Wrong(
            "k1 without its sign",
            kinds(k1=lambda d: d.abs()),
            "k2 and k3 are right, k1 is not: it may be negative for a single token, and only with its sign does "
            "its mean equal the KL. Leave out the abs.",
        ),
        Wrong(
            "k1 cut off at 0",
            kinds(k1=lambda d: d.clamp(min=0)),
            "k2 and k3 are right, k1 is not: you cut it off at 0. A KL is never negative, a one-sample estimate "
            "may be.",
        ),
        Wrong(
            "k1 weighted by the probability",
            lambda new, ref, *, kind: (new.exp() if kind == "k1" else 1) * kinds()(new, ref, kind=kind),
            "k2 and k3 are right, k1 is weighted by π once more. The tokens were already drawn from π: the p of Σ "
            "p (log p − log q) is in the sampling.",
        ),
        Wrong(
            "always k1",
            kinds(k2=lambda d: d, k3=lambda d: d),
            "k1 is right, k2 and k3 are not: kind is not used.",
        ),
        Wrong(
            "summed over the tokens",
            lambda new, ref, *, kind: divergence.sampled_kl(new, ref, kind=kind).sum(-1),
            "You sum over the tokens. Wanted is one estimate per token, (B, T).",
        ),
        Wrong(
            "a difference of probabilities",
            kinds(difference=lambda new, ref: new.exp() - ref.exp()),
            "d is made of probabilities; it is the difference of the log-probabilities.",
        ),
        Wrong(
            "averaged",
            lambda new, ref, *, kind: divergence.sampled_kl(new, ref, kind=kind).mean(),
            "You average over the tokens. Wanted is one estimate per token, (B, T).",
        ),
        Wrong(
            "the ratio of the logarithms",
            kinds(difference=lambda new, ref: new / ref),
            "You divide the log-probabilities; d is their difference.",
        ),
        Wrong(
            "k2 without the square",
            kinds(k2=lambda d: 0.5 * d),
            "k1 and k3 are right, k2 is not: the square is missing, ½ d².",
        ),
        Wrong(
            "k2 of the ratio",
            kinds(k2=lambda d: 0.5 * ((-d).exp() - 1).square()),
            "k1 and k3 are right, k2 is not: you square ratio − 1. It is the log-ratio that is squared.",
        ),
        Wrong(
            "k3 without the exponential",
            kinds(k3=lambda d: -d - 1 + d),
            "k1 and k2 are right, k3 is a constant: the exponential is missing, exp(−d) − 1 + d.",
        ),
        Wrong(
            "k3 of the probabilities",
            kinds(k3=lambda d: (-d).exp() * -d - (-d).exp() + 1),
            "k1 and k2 are right, k3 is not: with r = π_ref/π the mean of r log r − r + 1 under the policy is "
            "KL(π_ref‖π), the other direction. k3 is r − 1 − log r.",
        ),
        Wrong(
            "the reference alone",
            kinds(difference=lambda new, ref: new),
            "The reference is not used: d = log π − log π_ref.",
        ),
    ),
)


# --- Exercise: shaped_rewards; bug hunt: the score one step late -------------------------------


def shaped_cases(seed: int) -> list[Case]:
    d, single = Draw(seed), Draw(seed + 1, torch.float32)

    def case(says: str, draw: Draw, lengths: list[int], steps: int, kl_coef: float, garbage: float = 0.0) -> Case:
        mask = prefix_mask(lengths, steps)
        kl = under_padding(draw.normal(len(lengths), steps), mask, garbage)
        inputs = {"scores": draw.normal(len(lengths), scale=2) + 1, "kl": kl, "mask": mask}
        return Case(says, inputs, {"kl_coef": kl_coef})

    layout = case("kl that is not contiguous", d, [2, 5, 3], 5, 0.4)
    return [
        case("one full response, β = 0", d, [2], 2, 0.0),
        case("one full response, β = 0.5", d, [3], 3, 0.5),
        case("a padded response, β = 0", d, [2, 3], 4, 0.0),
        case("padded responses, β = 0.3", d, [2, 4, 1], 4, 0.3),
        case("numbers under the padding", d, [2, 4, 1], 4, 0.3, 30.0),
        case("NaN under the padding", d, [2, 4, 1], 5, 0.3, math.nan),
        Case(layout.says, layout.inputs | {"kl": transposed(layout.inputs["kl"])}, layout.options),
        case("float32", single, [2, 4, 1], 4, 0.2),
    ]


def last_step(mask: Tensor) -> Tensor:
    """True on each row's last real step."""
    return torch.arange(mask.shape[1]) == mask.sum(1, keepdim=True) - 1


def at(index: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """True on the step that `index` says, a number per row; beyond the end there is none."""
    return lambda mask: torch.arange(mask.shape[1]) == index(mask)[:, None]


def misread(
    *,
    price: float = -1.0,
    paid: Callable[[Tensor], Tensor] = lambda mask: mask,
    place: Callable[[Tensor], Tensor] = last_step,
    gain: Callable[[Tensor, float], Tensor] = lambda scores, beta: scores,
    clean: bool = True,
) -> Callable[..., Tensor]:
    """Shaped rewards with one thing read wrongly: the KL's sign, the steps that pay it, where the score goes."""

    def wrong_rewards(scores, kl, mask, *, kl_coef):
        toll = torch.where(paid(mask), price * kl_coef * kl, 0)
        rewards = toll + torch.where(place(mask), gain(scores, kl_coef)[:, None], 0)
        return torch.where(mask, rewards, 0) if clean else rewards

    return wrong_rewards


def toll_at_the_end(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """The whole sequence's KL charged on the last step."""
    total = torch.where(mask, kl, 0).sum(1)
    return torch.where(last_step(mask), (scores - kl_coef * total)[:, None], 0)


FIRST_PAD = at(lambda mask: mask.sum(1))
FIRST_PAD_OR_END = at(lambda mask: mask.sum(1).clamp(max=mask.shape[1] - 1))
LAST_POSITION = at(lambda mask: torch.full((len(mask),), mask.shape[1] - 1))
ONE_EARLY = at(lambda mask: (mask.sum(1) - 2).clamp(min=0))

shaped_rewards = Check(
    name="shaped_rewards",
    reference=divergence.shaped_rewards,
    cases=lambda: shaped_cases(811),
    wrong=(
        Wrong(
            "the sign of the KL",
            misread(price=1.0),
            "β = 0 is right, β = 0.5 is not: the KL is added. That pays the policy for leaving the reference; "
            "subtract it.",
        ),
        Wrong(
            "the score at the last position",
            misread(place=LAST_POSITION),
            "A full response is right, a padded one is not: the score goes to the last position, which is "
            "padding, and is lost. It belongs to the last real token.",
        ),
        Wrong(
            "the score left on the padding",
            misread(place=LAST_POSITION, clean=False),
            "A full response is right, a padded one is not: the score stands on the last position, which is "
            "padding, where no action was taken.",
        ),
        Wrong(
            "the score one step late",
            misread(place=FIRST_PAD),
            "The score is missing: it was left out, or put one step after the last real token and masked away. A "
            "response of n tokens ends at index n − 1.",
        ),
        Wrong(
            "the score on the first pad",
            misread(place=FIRST_PAD_OR_END, clean=False),
            "A full response is right, a padded one is not: the score stands on the first padding token, one step "
            "late.",
        ),
        Wrong(
            "the score one step early",
            misread(place=ONE_EARLY),
            "The score stands one step too early: on the token before the last real one.",
        ),
        Wrong(
            "the score on every token",
            misread(place=lambda mask: mask),
            "Every token gets the score. The reward model reads the whole response once: only the last token is paid.",
        ),
        Wrong(
            "the score on the first token",
            misread(place=at(lambda mask: torch.zeros_like(mask.sum(1)))),
            "The score stands on the first token. Nothing is known of a response before it has ended.",
        ),
        Wrong(
            "the score spread out",
            lambda scores, kl, mask, *, kl_coef: misread(place=lambda m: m)(
                scores / mask.sum(1), kl, mask, kl_coef=kl_coef
            ),
            "You spread the score evenly over the tokens. The sum is right, but reward-to-go then says that late "
            "tokens earned less: it comes on the last one.",
        ),
        Wrong(
            "the score scaled by β",
            misread(gain=lambda scores, beta: beta * scores),
            "The score is multiplied by β. β is the price of the KL alone.",
        ),
        Wrong(
            "the last token pays no KL",
            misread(paid=lambda mask: mask & ~last_step(mask)),
            "β = 0 is right, β = 0.5 is not: the last token's KL is overwritten by the score. It gets both: add.",
        ),
        Wrong(
            "the KL only at the end",
            toll_at_the_end,
            "The row's sum is right, but you charge the whole KL on the last token. Each token pays its own.",
        ),
        Wrong(
            "no KL",
            misread(price=0.0),
            "β = 0 is right, β = 0.5 is not: the KL penalty is missing.",
        ),
        Wrong(
            "the KL of the padding",
            misread(paid=torch.ones_like, clean=False),
            "The padding pays KL too: where mask is False the reward is 0.",
        ),
        Wrong(
            "β forgotten",
            lambda s, kl, m, *, kl_coef: misread()(s, kl, m, kl_coef=1.0),
            "The KL is subtracted in full: its coefficient, kl_coef, is not used.",
        ),
        Wrong(
            "the KL so far",
            lambda s, kl, m, *, kl_coef: misread()(s, torch.where(m, kl, 0).cumsum(1), m, kl_coef=kl_coef),
            "Each token pays the KL of all tokens so far. It pays its own.",
        ),
        Wrong(
            "the mean KL",
            lambda s, kl, m, *, kl_coef: misread()(
                s, (torch.where(m, kl, 0).sum(1) / m.sum(1))[:, None].expand_as(kl), m, kl_coef=kl_coef
            ),
            "The row's sum is right, but each token pays the mean of the row. It pays its own.",
        ),
        Wrong(
            "the mask multiplied on",
            lambda s, kl, m, *, kl_coef: -kl_coef * kl * m + last_step(m) * s[:, None],
            "Numbers under the padding of the KL do no harm, NaN does: 0·NaN is NaN. Replace with "
            "torch.where(mask, x, 0) "
            "instead of multiplying by the mask.",
        ),
        Wrong(
            "the score subtracted",
            misread(gain=lambda s, beta: -s),
            "The score has the wrong sign: it is what the response earns.",
        ),
        Wrong(
            "the absolute KL",
            lambda s, kl, m, *, kl_coef: misread()(s, kl.abs(), m, kl_coef=kl_coef),
            "You take the absolute value of the KL. An estimate for one token may be negative; only with its sign is "
            "the mean right.",
        ),
        Wrong(
            "the KL cut off at 0",
            lambda s, kl, m, *, kl_coef: misread()(s, kl.clamp(min=0), m, kl_coef=kl_coef),
            "You cut the KL off at 0. An estimate for one token may be negative; only with its sign is the mean right.",
        ),
        Wrong(
            "β on both",
            lambda s, kl, m, *, kl_coef: misread(gain=lambda s, beta: (1 - beta) * s)(s, kl, m, kl_coef=kl_coef),
            "You weigh score and KL with 1 − β and β. The score counts in full.",
        ),
    ),
)

late_score = Check(
    name="late_score",
    reference=divergence.shaped_rewards,
    cases=lambda: shaped_cases(821),
    explains=(
        "The fault put the score one step after the last real token, where it is padding. The sum of each row was "
        "right to the last digit, but nothing that masks ever read it: in the lesson the average score stayed at "
        "0.17, where the package reaches 1.98. "
        "Only responses of full length were paid, so the fault hides wherever there is no padding. In a log, the "
        "score does not rise and the KL stays near 0, since nothing pays the policy for moving."
    ),
    wrong=(
        Wrong(
            "on the first pad",
            misread(place=FIRST_PAD_OR_END, clean=False),
            "The score is still one step late: a response of n tokens has its last one at index n − 1, and index "
            "n is padding.",
        ),
        Wrong(
            "on the first pad, then masked",
            misread(place=FIRST_PAD_OR_END),
            "The padding is 0 now, and the score has gone with it: it still stands behind the last real token. Move "
            "it, do not mask it.",
        ),
        Wrong(
            "lost",
            misread(place=FIRST_PAD),
            "The score has gone, also from full responses: index n is not the last token of n, and the mask "
            "removes what is put there.",
        ),
        Wrong(
            "at the last position",
            misread(place=LAST_POSITION, clean=False),
            "Now the score stands at index T − 1 of every row. That is the end of the batch, not of the response.",
        ),
        Wrong(
            "one step early",
            misread(place=ONE_EARLY),
            "That was one step too many: the score now stands on the token before the last real one.",
        ),
        Wrong(
            "overwritten",
            misread(paid=lambda mask: mask & ~last_step(mask)),
            "The score stands where it should, but has overwritten the last token's KL penalty: add it.",
        ),
        Wrong(
            "the sign of the KL",
            misread(price=1.0),
            "The score stands where it should, but the KL penalty has lost its minus on the way.",
        ),
        Wrong(
            "on every token",
            misread(place=lambda mask: mask),
            "The score now stands on every token. It is paid once, on the last real one.",
        ),
        Wrong(
            "subtracted",
            misread(gain=lambda s, beta: -s),
            "The score stands where it should, but it is subtracted.",
        ),
        Wrong(
            "no KL",
            misread(price=0.0),
            "The score stands where it should, but the KL penalty has gone.",
        ),
        Wrong(
            "the mask multiplied on",
            lambda s, kl, m, *, kl_coef: -kl_coef * kl * m + last_step(m) * s[:, None],
            "The score stands where it should, but NaN under the padding comes through: 0·NaN is NaN. Keep the "
            "torch.where.",
        ),
        Wrong(
            "the first token",
            misread(place=at(lambda mask: torch.zeros_like(mask.sum(1)))),
            "The score now stands on the first token. It belongs to the last one that is real.",
        ),
    ),
)
