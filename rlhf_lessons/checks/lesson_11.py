"""Lesson 11: losses judged by their expected gradient, not by their value.

Many losses have the gradient of the KL in expectation, so none of them is the right one. An answer is asked about all
texts of a small world, or all tokens of a state, and its gradients are averaged with the policy's own probabilities.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lessons import exact
from rlhf_lessons import kl as divergence
from rlhf_lessons.checks._harness import Case, Check, Wrong
from rlhf_lessons.checks._inputs import Draw
from rlhf_lessons.checks._wording import Refused, describe_type
from rlhf_lessons.policy_gradient import action_log_probs, reward_to_go

# --- Exercise: kl_loss, for whole texts ---------------------------------------------------------


def small_world(logits: Tensor, ref_logits: Tensor, *, length: int, eos_id: int | None, garbage: float) -> tuple:
    """All texts of two tabular policies: log-probabilities (N, T) of both, the mask, `garbage` under the padding."""
    policy = exact.TabularPolicy(logits.shape[1], length, eos_id=eos_id)
    texts, mask = policy.enumerate()
    rows = policy.rows(texts)
    log_probs, ref = (action_log_probs(z[rows], texts) for z in (logits, ref_logits))
    # What stands under the padding depends on the policy as well: a loss that reads it gets a gradient from it.
    return torch.where(mask, log_probs, garbage + log_probs), torch.where(mask, ref, 2 * garbage), mask


def expected_gradient(loss_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of a batch -> its expected gradient by the logits, over all batches of two independent texts."""

    def gradient(logits: Tensor, ref_logits: Tensor, **world: object) -> Tensor:
        logits = logits.detach().requires_grad_()
        log_probs, ref, mask = small_world(logits, ref_logits, **world)
        probs = exact.sequence_log_prob(log_probs, mask).exp().detach()
        total = 0
        for pair in itertools.product(range(len(probs)), repeat=2):
            rows = list(pair)
            loss = loss_of(log_probs[rows], ref[rows], mask[rows])
            if loss is NotImplemented:
                return NotImplemented
            total = total + probs[rows].prod() * scalar(loss)
        return torch.autograd.grad(total, logits)[0]

    return gradient


def scalar(loss: object) -> Tensor:
    """The loss, if it is one number with a gradient; Refused otherwise."""
    if not isinstance(loss, Tensor):
        raise Refused(f"Your function returns {describe_type(loss)}; a torch.Tensor is wanted.")
    if loss.shape != ():
        raise Refused(f"Your function returns a tensor of shape {tuple(loss.shape)}; a loss is a single number, ().")
    return differentiable(loss)


def differentiable(loss: Tensor) -> Tensor:
    """The same; Refused where no gradient comes back from it."""
    if not loss.requires_grad:
        raise Refused("No gradient comes back from your loss, and it is judged by its gradient: is all of it detached?")
    return loss


def kl_loss_cases() -> list[Case]:
    d, single = Draw(1101), Draw(1102, torch.float32)

    def case(says: str, draw: Draw, vocabulary: int, length: int, eos_id: int | None, garbage: float = 0.0) -> Case:
        states = sum(vocabulary**t for t in range(length))
        inputs = {name: draw.normal(states, vocabulary) for name in ("logits", "ref_logits")}
        return Case(says, inputs, {"length": length, "eos_id": eos_id, "garbage": garbage})

    return [
        case("texts of one token, of three", d, 3, 1, None),
        case("texts of two tokens", d, 2, 2, None),
        case("texts of one to three tokens, an end among them", d, 2, 3, 1),
        case("numbers under the padding", d, 3, 2, 2, 3.0),
        case("NaN under the padding", d, 2, 3, 1, math.nan),
        case("float32", single, 2, 2, 1),
    ]


def kl_loss_gradient(logits: Tensor, ref_logits: Tensor, **world: object) -> Tensor:
    """What the package's loss gives on average; the lesson's exact check says that it is the gradient of the KL."""
    return expected_gradient(divergence.sequence_kl_loss)(logits, ref_logits, **world)


def with_parts(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A loss of log π and d = log π − log π_ref, both (B, T) and 0 under the padding: its sum over t, a mean over b."""

    def of_batch(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
        log_probs, ref = torch.where(mask, log_probs, 0), torch.where(mask, ref_log_probs, 0)
        return loss(log_probs, log_probs - ref).sum(1).mean()

    return of_batch


def to_go(x: Tensor) -> Tensor:
    """Each step's sum of what follows, itself included."""
    return reward_to_go(x, gamma=1.0)


def k3(d: Tensor) -> Tensor:
    """Eq. 8.2's third, of d."""
    return (-d).exp() - 1 + d


def right(lp: Tensor, d: Tensor) -> Tensor:
    """The package's own, before it is summed."""
    return lp * to_go(d.detach())


kl_loss = Check(
    name="kl_loss",
    reference=kl_loss_gradient,
    cases=kl_loss_cases,
    adapt=expected_gradient,
    outputs=("the expected gradient",),
    wrong=(
        Wrong(
            "k1 as a loss",
            with_parts(lambda lp, d: d),
            "The expected gradient of your loss is 0. k1 has the right value, but differentiated with the texts held "
            "it is ∇log π, whose mean is 0. The KL's gradient comes from which texts are drawn.",
        ),
        Wrong(
            "each token for itself",
            with_parts(lambda lp, d: 0.5 * d.square()),
            "Right for texts of one token, wrong for longer ones: each token pays its own d_t alone, and knows nothing "
            "of the tolls that come after it because of it. (k2 of each token does this; so does ratio × k3; so does "
            "log π times the token's own toll, or the tolls up to it.)",
        ),
        Wrong(
            "k3 of each token",
            with_parts(lambda lp, d: k3(d)),
            "Already wrong for texts of one token: k3 as a loss has ∇KL(π_ref‖π), the other direction. For longer ones "
            "it leaves out the later tolls as well.",
        ),
        Wrong(
            "k3 in the reward",
            with_parts(lambda lp, d: lp * to_go(k3(d.detach()))),
            "The tolls are k3. Its value is unbiased, but held constant as a toll it lacks half of the gradient, the "
            "one that k3 has as a loss. Only for k1 is that half 0.",
        ),
        Wrong(
            "k2 in the reward",
            with_parts(lambda lp, d: lp * to_go(0.5 * d.detach().square())),
            "The tolls are k2, never negative: a token that the policy says too rarely is charged too, and pushed "
            "further down. A toll must be able to be a refund: k1.",
        ),
        Wrong(
            "k3 of the whole text",
            lambda lp, ref, m: k3(torch.where(m, lp - ref, 0).sum(1)).mean(),
            "You are right to take the text as a whole. But k3 as a loss has ∇KL(π_ref‖π), of texts as of tokens.",
        ),
        Wrong(
            "k2 of the tolls to go",
            with_parts(lambda lp, d: 0.5 * to_go(d).square() * (d != 0)),
            "You square the sums to go and add them up: their gradients reach the later tokens once for each sum that "
            "they are in. Either one square, of the whole text's sum, or log π times the sums to go, held constant.",
        ),
        Wrong(
            "k3 of the tolls to go",
            with_parts(lambda lp, d: k3(to_go(d))),
            "Already wrong for texts of one token: k3 as a loss has ∇KL(π_ref‖π). And sums to go, each a loss of its "
            "own, charge a later token once for each sum that it is in.",
        ),
        Wrong(
            "the sign",
            with_parts(lambda lp, d: -right(lp, d)),
            "The sign is wrong: descending this loss leads away from the reference. Rewards are −toll and ascended; a "
            "loss has the toll with a plus. (d is log π − log π_ref.)",
        ),
        Wrong(
            "the tolls not held constant",
            with_parts(lambda lp, d: lp * to_go(d)),
            "The tolls are not held constant: by the product rule log π times their gradient is added. .detach() them.",
        ),
        Wrong(
            "the text's toll not held constant",
            with_parts(lambda lp, d: lp.sum(1, True) * d.sum(1, True)),
            "The toll D of the text is not held constant: by the product rule log π times its gradient is added. "
            ".detach() it.",
        ),
        Wrong(
            "a mean over tokens",
            lambda lp, ref, m: with_parts(right)(lp, ref, m) * len(m) / m.sum(),
            "Texts that do not all have the same length are wrong, or every text is by a factor: you divide by a "
            "number of tokens, which the policy chooses. Sum over a text's tokens, then the mean over the batch.",
        ),
        Wrong(
            "a mean over each text's tokens",
            lambda lp, ref, m: (right(torch.where(m, lp, 0), torch.where(m, lp - ref, 0)).sum(1) / m.sum(1)).mean(),
            "You divide each text's sum by its own length, so that a nat costs less in a long text. Sum over the "
            "tokens, then the mean over the batch.",
        ),
        Wrong(
            "twice too long",
            lambda lp, ref, m: len(m) * with_parts(right)(lp, ref, m),
            "The direction is right and the gradient twice too long: the batches here are of two texts, of which the "
            "mean is wanted, not the sum. If you take the mean already: k2 is ½ d², with the half.",
        ),
        Wrong(
            "the mask forgotten",
            lambda lp, ref, m: right(lp, lp - ref).sum(1).mean(),
            "What stands under the padding gets into your loss: torch.where(mask, x, 0) for both log-probabilities "
            "before anything else.",
        ),
        Wrong(
            "the mask forgotten in k2",
            lambda lp, ref, m: 0.5 * (lp - ref).sum(1).square().mean(),
            "The formula is right, but D also sums what stands under the padding: torch.where(mask, x, 0) for both "
            "log-probabilities before the sum.",
        ),
        Wrong(
            "the mask multiplied on",
            lambda lp, ref, m: right(lp * m, (lp - ref) * m).sum(1).mean(),
            "Numbers under the padding do no harm, NaN does: 0·NaN is NaN. torch.where(mask, x, 0) before anything "
            "else.",
        ),
    ),
)


# --- Bug hunt: the other direction ---------------------------------------------------------------


def expected_token_gradient(loss_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of tokens, (N,) -> (N,), -> its expected gradient by a state's logits (V,)."""

    def gradient(logits: Tensor, ref_logits: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        log_probs, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
        losses = loss_of(log_probs, ref)
        if losses is NotImplemented:
            return NotImplemented
        if not isinstance(losses, Tensor):
            raise Refused(f"Your function returns {describe_type(losses)}; a torch.Tensor is wanted.")
        if losses.shape != logits.shape:
            raise Refused(f"Your function returns shape {tuple(losses.shape)}; one loss a token is wanted, (N,).")
        return torch.autograd.grad(log_probs.detach().exp() @ differentiable(losses), logits)[0]

    return gradient


def other_way_cases() -> list[Case]:
    d, single = Draw(1111), Draw(1112, torch.float32)

    def case(says: str, draw: Draw, tokens: int, scale: float) -> Case:
        return Case(says, {name: draw.normal(tokens, scale=scale) for name in ("logits", "ref_logits")})

    return [
        case("three tokens, close to the reference", d, 3, 0.2),
        case("four tokens", d, 4, 1.0),
        case("six tokens, far from the reference", d, 6, 2.0),
        case("float32", single, 4, 1.0),
    ]


def token_kl_gradient(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """The gradient of KL(π‖π_ref) in one state, over the whole vocabulary."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(divergence.exact_kl(logits, ref_logits), logits)[0]


other_way = Check(
    name="other_way",
    reference=token_kl_gradient,
    cases=other_way_cases,
    adapt=expected_token_gradient,
    outputs=("the expected gradient",),
    explains=(
        "k3's mean is KL(π‖π_ref), so the number in the log was right all along. Its gradient with the tokens held is "
        "that of KL(π_ref‖π), and a policy follows gradients, not values. The two differ most where π is far above "
        "π_ref: there the right pull grows with d, while k3's, 1 − exp(−d), never exceeds 1. So the favourite token, "
        "0.01 under the reference, went up to 0.54, where π* has 0.08. No curve shows it; comparing an expected "
        "gradient with an exact one in a state that can be listed does."
    ),
    wrong=(
        Wrong(
            "k3, its tokens held",
            lambda lp, ref: k3(lp - ref),
            "This still descends KL(π_ref‖π). k3's value is right; held tokens cost it the half of its gradient that "
            "says which tokens are drawn. Which of the three has the right gradient as a loss, or what must k3 be "
            "multiplied by, to get that half back?",
        ),
        Wrong(
            "k1",
            lambda lp, ref: lp - ref,
            "Now the expected gradient is 0: k1 as a loss is nothing.",
        ),
        Wrong(
            "the log-ratio turned round",
            lambda lp, ref: k3(ref - lp),
            "You turned the log-ratio round: exp(d) − 1 − d. That is k3 for samples of the reference. On the policy's "
            "own tokens its mean is no KL, and its gradient grows like exp(d).",
        ),
        Wrong(
            "the sign",
            lambda lp, ref: -0.5 * (lp - ref).square(),
            "The right gradient with the wrong sign: this loss leads away from the reference.",
        ),
        Wrong(
            "k2 without the half",
            lambda lp, ref: (lp - ref).square(),
            "Right but for a factor of 2: k2 is ½ d².",
        ),
        Wrong(
            "weighted by the probability",
            lambda lp, ref: lp.exp() * (lp - ref),
            "The tokens are already drawn from π: its p is in the sampling, and you multiply by it once more.",
        ),
        Wrong(
            "k3 as a toll",
            lambda lp, ref: lp * k3((lp - ref).detach()),
            "Now you have only the other half: log π times k3 held constant says which tokens are drawn and has lost "
            "k3's own gradient. Both halves together are right.",
        ),
        Wrong(
            "k2 as a toll",
            lambda lp, ref: lp * 0.5 * (lp - ref).detach().square(),
            "k2 held constant is a toll that is never a refund: a token said too rarely is pushed further down. As a "
            "toll take k1; k2 is right where it is differentiated itself.",
        ),
        Wrong(
            "the toll not held constant",
            lambda lp, ref: lp * (lp - ref),
            "d is not held constant: log π times its gradient is added. .detach() it.",
        ),
    ),
)
