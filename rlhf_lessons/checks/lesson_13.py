"""Lesson 13: a policy fitted to preferences, without a reward model between."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lessons import preferences
from rlhf_lessons.checks._harness import Case, Check, Wrong
from rlhf_lessons.checks._inputs import Draw

NAMES = ("chosen", "rejected", "ref_chosen", "ref_rejected")


def preference_cases(seed: int) -> list[Case]:
    """Log-probabilities of texts of some ten tokens: the two policies differ by a few nats."""
    d, single = Draw(seed), Draw(seed + 1, torch.float32)

    def case(says: str, draw: Draw, count: int, beta: float, layout: Callable = lambda x: x) -> Case:
        return Case(says, {name: layout(draw.normal(count, scale=3) - 20) for name in NAMES}, {"beta": beta})

    far = zip(NAMES, ([-2.0, -900.0, -30.0], [-900.0, -2.0, -31.0], [-20.0] * 3, [-21.0] * 3), strict=True)
    return [
        case("one pair, β = 1", d, 1, 1.0),
        case("one pair, β = 0.2", d, 1, 0.2),
        case("two pairs, β = 1", d, 2, 1.0),
        case("seven pairs, β = 0.3", d, 7, 0.3),
        case("tensors that are not contiguous", d, 4, 0.5, lambda x: torch.stack([x, x], 1)[:, 0]),
        case("float32", single, 5, 0.3),
        Case("float32, texts hundreds of nats apart", {n: torch.tensor(x) for n, x in far}, {"beta": 1.0}),
    ]


def implied_gap(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """The margin, times β."""
    return beta * (chosen - rejected - ref_chosen + ref_rejected)


def loss_of(
    gap: Callable[..., Tensor] = implied_gap,
    cost: Callable[[Tensor], Tensor] = lambda gap: -F.logsigmoid(gap),
    over: Callable[[Tensor], Tensor] = torch.mean,
) -> Callable[..., Tensor]:
    """The loss with one thing read wrongly: the gap of the rewards, what a gap costs, how costs are joined."""

    def wrong_loss(*log_probs: Tensor, beta: float) -> Tensor:
        return over(cost(gap(*log_probs, beta)))

    return wrong_loss


# --- Exercise: dpo_loss ------------------------------------------------------------------------

dpo_loss = Check(
    name="dpo_loss",
    reference=preferences.dpo_loss,
    cases=lambda: preference_cases(1301),
    gradient_of=("chosen", "rejected"),
    wrong=(
        Wrong(
            "the sign",
            loss_of(cost=F.logsigmoid),
            "This is the log-likelihood of the comparisons. Training follows a loss downhill: the minus is missing.",
        ),
        Wrong(
            "chosen and rejected swapped",
            loss_of(gap=lambda c, r, rc, rr, beta: beta * (r - c - rr + rc)),
            "The gap has the wrong sign, so that the rejected text is pushed up: chosen and rejected are swapped, "
            "or policy and reference.",
        ),
        Wrong(
            "no reference",
            loss_of(gap=lambda c, r, rc, rr, beta: beta * (c - r)),
            "The reference is missing. The implied reward of a text is β log(π/π_ref), not β log π: without π_ref "
            "the best policy is exp(r/β), normalised, whatever the reference finds likely.",
        ),
        Wrong(
            "the reference added",
            loss_of(gap=lambda c, r, rc, rr, beta: beta * (c - r + rc - rr)),
            "The reference enters with the wrong sign: from each log-probability of the policy, that of the "
            "reference is subtracted.",
        ),
        Wrong(
            "one reference only",
            loss_of(gap=lambda c, r, rc, rr, beta: beta * (c - rc - r)),
            "Only the chosen text is compared with the reference. Both rewards are log-ratios.",
        ),
        Wrong(
            "β forgotten",
            loss_of(gap=lambda c, r, rc, rr, beta: c - r - rc + rr),
            "β = 1 is right, β = 0.2 is not: beta is not used. It scales the gap of the log-ratios.",
        ),
        Wrong(
            "β outside",
            lambda *args, beta: beta * loss_of()(*args, beta=1.0),
            "β = 1 is right, β = 0.2 is not: beta stands before the logarithm, where it is no more than a learning "
            "rate. It belongs inside, on the gap.",
        ),
        Wrong(
            "divided by β",
            loss_of(gap=lambda c, r, rc, rr, beta: (c - r - rc + rr) / beta),
            "β = 1 is right, β = 0.2 is not: you divide by beta. From π* = π_ref exp(r/β)/Z follows "
            "r = β log(π*/π_ref) + β log Z: times β.",
        ),
        Wrong(
            "β on the policy alone",
            loss_of(gap=lambda c, r, rc, rr, beta: beta * (c - r) - (rc - rr)),
            "β = 1 is right, β = 0.2 is not: beta scales the policy's part of the gap, but not the reference's.",
        ),
        Wrong(
            "no logarithm",
            loss_of(cost=lambda gap: -torch.sigmoid(gap)),
            "This is −σ(gap), without the logarithm: where the policy is most wrong it no longer learns.",
        ),
        Wrong(
            "one minus the probability",
            loss_of(cost=lambda gap: 1 - torch.sigmoid(gap)),
            "This is 1 − σ(gap), how often the annotators would contradict. Wanted is the negative log-likelihood of "
            "what they said, −log σ(gap).",
        ),
        Wrong(
            "no sigmoid",
            loss_of(cost=lambda gap: -gap),
            "The log σ is missing: the gap itself is maximised, with the same force however large it is already.",
        ),
        Wrong(
            "σ, then log",
            loss_of(cost=lambda gap: -torch.sigmoid(gap).log()),
            "Right until texts are hundreds of nats apart: then σ rounds to 0, and its logarithm is −∞. "
            "F.logsigmoid does both in one step.",
        ),
        Wrong(
            "ratios without the logarithm",
            loss_of(gap=lambda c, r, rc, rr, beta: beta * ((c - rc).exp() - (r - rr).exp())),
            "You subtract the ratios π/π_ref themselves. The implied reward is β times the logarithm of the ratio, "
            "which is what subtracting log-probabilities gives.",
        ),
        Wrong(
            "IPO",
            lambda *args, beta: preferences.ipo_loss(*args, beta=beta),
            "That is IPO's loss, the squared distance of the gap to 1/(2β). Asked for is DPO's, −log σ.",
        ),
        Wrong(
            "summed",
            loss_of(over=torch.sum),
            "One pair is right, two are not: you sum over the pairs. Wanted is the mean.",
        ),
        Wrong(
            "the gaps averaged first",
            lambda *args, beta: -F.logsigmoid(implied_gap(*args, beta).mean()),
            "One pair is right, two are not: you average the gaps and take −log σ once. Each pair has its own loss; "
            "the mean comes last.",
        ),
        Wrong(
            "not averaged",
            loss_of(over=lambda x: x),
            "You return a loss for each pair, (N,). Wanted is their mean, a single number.",
        ),
    ),
)  # fmt: skip


# --- Bug hunt: a reference that cancels --------------------------------------------------------

lost_reference = Check(
    name="lost_reference",
    reference=preferences.dpo_loss,
    cases=lambda: preference_cases(1311),
    gradient_of=("chosen", "rejected"),
    explains=(
        "The fault subtracted one number from both log-probabilities, and what both have in common is gone in their "
        "difference: the reference stood in the code and not in the loss. Nothing failed, since the loss fell as low "
        "as it should and the pairs ended at the annotators' odds. But the policy that it is lowest at is exp(r/β), "
        "normalised, whatever the reference finds likely: in the lesson it writes the ungrammatical answer in 10 of "
        "100 texts, π* in 2 of 10,000. In a log, the loss of the first step shows it: where π = π_ref it must be "
        "log 2 = 0.693, whatever the pairs."
    ),
    wrong=(
        Wrong(
            "one mean for both",
            loss_of(gap=lambda c, r, rc, rr, beta: beta * ((c - (rc + rr) / 2) - (r - (rc + rr) / 2))),
            "The reference still cancels: what is subtracted from both log-probabilities alike is gone in their "
            "difference. What is the loss where π = π_ref?",
        ),
        Wrong(
            "one reference only",
            loss_of(gap=lambda c, r, rc, rr, beta: beta * (c - rc - r)),
            "The chosen text has its reference now; the rejected one has none.",
        ),
        Wrong(
            "the references exchanged",
            loss_of(gap=lambda c, r, rc, rr, beta: beta * ((c - rr) - (r - rc))),
            "The reference no longer cancels, but each text got the other one's, or the reference is added where it "
            "should be subtracted.",
        ),
        Wrong(
            "half of it",
            loss_of(gap=lambda c, r, rc, rr, beta: beta * (c - r - (rc - rr) / 2)),
            "Each text has its reference, but only half of it: the mean over the pair is still there.",
        ),
        Wrong(
            "β lost",
            loss_of(gap=lambda c, r, rc, rr, beta: c - r - rc + rr),
            "The reference is right now, but beta has gone.",
        ),
    ),
)  # fmt: skip
