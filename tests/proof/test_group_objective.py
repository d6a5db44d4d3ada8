"""What group methods maximise. Right or wrong texts, p the share that is right: every group of the texts that a small
policy can write, each with its chance, so that the expected gradient of a group method is a sum; beside it c(p, G)·∇p.
"""

import itertools
import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_lessons.baselines import group_advantages, leave_one_out_baseline
from rlhf_lessons.exact import TabularPolicy
from rlhf_lessons.importance import importance_ratio, sequence_ratio
from rlhf_lessons.ppo import clipped_policy_loss

LONGEST = 4  # tokens of a text of `lengths_world`
AGGREGATIONS = {
    "tokens": dict(over="tokens"), "sequences": dict(over="sequences"),
    "constant": dict(over="constant", constant=LONGEST),
}  # fmt: skip


class Texts(NamedTuple):
    """All that a policy can write: log_probs (N, T) with a gradient to `theta`, mask (N, T), right (N,) 0 or 1."""

    theta: Tensor
    log_probs: Tensor
    mask: Tensor
    right: Tensor

    @property
    def chances(self) -> Tensor:
        """Of each text, (N,)."""
        return self.log_probs.sum(dim=1).exp()

    @property
    def p(self) -> Tensor:
        """The share that is right, ()."""
        return self.chances @ self.right

    def gradient(self, of: Tensor) -> Tensor:
        """By θ, flat."""
        return torch.autograd.grad(of, self.theta, retain_graph=True)[0].flatten()


def tree(seed: int) -> Texts:
    """15 texts of at most 3 tokens, a row of logits for every prefix; those with token 0 exactly twice are right."""
    policy = TabularPolicy(3, 3, eos_id=2, generator=torch.Generator().manual_seed(seed))
    texts, mask = policy.enumerate()
    right = (((texts == 0) & mask).sum(dim=1) == 2).double()
    return Texts(policy.logits, policy.log_probs(texts), mask, right)


def lengths_world(theta: Tensor) -> Texts:
    """A first token decides whether a text is right; then it ends or goes on, up to 4 tokens.

    theta: the log-odds of a right first token, then of going on after a right one, and after a wrong one; or a single
    one of going on, for both.
    """
    first, *on = theta.unbind()
    rows, mask = [], []
    for sign, go in ((1, on[0]), (-1, on[-1])):
        for steps in range(LONGEST):
            ended = steps < LONGEST - 1  # the last one is cut off
            tokens = [sign * first] + [go] * steps + [-go] * ended
            real = len(tokens)
            rows.append(torch.stack(tokens + [torch.zeros_like(go)] * (LONGEST - real)))
            mask.append([t < real for t in range(LONGEST)])
    mask = torch.tensor(mask)
    log_probs = torch.where(mask, torch.nn.functional.logsigmoid(torch.stack(rows)), 0)
    return Texts(theta, log_probs, mask, torch.tensor([1.0] * LONGEST + [0.0] * LONGEST, dtype=torch.float64))


def advantages_of(right: Tensor, scale: str) -> Tensor:
    """One group's advantages by the package's function."""
    if scale == "leave one out":
        return right - leave_one_out_baseline(right[None])[0]
    return group_advantages(right, torch.zeros(len(right), dtype=torch.long), scale=scale)


def expected_gradient(texts: Texts, size: int, scale: str, *, mixed: bool = False, **options) -> Tensor:
    """E[−∇ loss] of one group of `size` texts, ρ = 1. mixed: given that not all of its rewards are equal.

    options: of `clipped_policy_loss`.
    """
    chances, old = texts.chances.detach(), texts.log_probs.detach()
    total, kept = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for group in itertools.combinations_with_replacement(range(len(old)), size):
        rows, orders = torch.tensor(group), math.factorial(size)
        for repeats in Counter(group).values():
            orders //= math.factorial(repeats)
        if texts.right[rows].unique().numel() == 1:  # advantages are 0
            continue
        advantages = advantages_of(texts.right[rows], scale)[:, None].expand_as(old[rows])
        loss = clipped_policy_loss(
            texts.log_probs[rows], old[rows], advantages, texts.mask[rows], clip_eps=0.2, **options
        )
        total, kept = total - orders * chances[rows].prod() * loss, kept + orders * chances[rows].prod()
    return texts.gradient(total / kept if mixed else total)


def group_constant(p: float, size: int) -> float:
    """c(p, G) of GRPO, by the lemma: E[the group's deviation] / (p (1 − p)), the share right being binomial."""
    k = torch.arange(size + 1, dtype=torch.float64)
    ways = math.lgamma(size + 1) - torch.lgamma(k + 1) - torch.lgamma(size - k + 1)
    chances = (ways + k * math.log(p) + (size - k) * math.log1p(-p)).exp()
    return float(chances @ (k / size * (1 - k / size)).sqrt()) / (p * (1 - p))


WORLDS = [tree(seed) for seed in (1, 5)]
THETA = [-0.7, -0.5, 0.4]  # of `lengths_world`: wrong texts are longer than right ones
SUM = dict(over="constant", constant=1)  # a sum over tokens


# --- c(p, G) ∇p --------------------------------------------------------------------------------------


@pytest.mark.equation("4.4")
def test_rloo_has_the_gradient_of_the_share_that_is_right(claim):
    exact = [texts.gradient(texts.p) for texts in WORLDS for _ in (2, 3)]
    obtained = [expected_gradient(texts, size, "leave one out", **SUM) for texts in WORLDS for size in (2, 3)]
    claim.equal("objective.rloo", "RLOO, summed over tokens: E[g] = ∇p, G = 2, 3", exact, obtained)


@pytest.mark.equation("12.1")
def test_a_mean_that_holds_the_text_itself_is_short_by_one_in_g(claim):
    exact = [(size - 1) / size * texts.gradient(texts.p) for texts in WORLDS for size in (2, 3)]
    obtained = [expected_gradient(texts, size, "none", **SUM) for texts in WORLDS for size in (2, 3)]
    text = "the group's mean subtracted (Dr. GRPO): E[g] = (G−1)/G ∇p, G = 2, 3"
    claim.equal("objective.none", text, exact, obtained)


@pytest.mark.equation("12.1")
def test_grpo_has_a_multiple_of_it(claim):
    pairs = [(texts, size) for texts in WORLDS for size in (2, 3)]
    pairs.append((lengths_world(torch.tensor(THETA, dtype=torch.float64, requires_grad=True)), 4))
    exact = [group_constant(float(texts.p.detach()), size) * texts.gradient(texts.p) for texts, size in pairs]
    obtained = [expected_gradient(texts, size, "group", **SUM) for texts, size in pairs]
    text = "GRPO, summed over tokens: E[g] = E[σ_group]/(p(1−p)) ∇p, G = 2, 3, 4"
    claim.equal("objective.group", text, exact, obtained)


@pytest.mark.parametrize(("p", "size", "known"), [
    (0.5, 2, 1.0), (0.1, 2, 1.0), (0.1, 3, 2**0.5), (0.9, 3, 2**0.5),  # one deviation only: no p in it
    (0.5, 4, 4 * (2 * 4 * 3**0.5 / 4 + 6 / 2) / 16),
])  # fmt: skip
def test_the_constant_by_hand(p, size, known):
    assert group_constant(p, size) == pytest.approx(known, abs=1e-12)


def test_large_groups_maximise_the_arcsine(claim):
    shares = torch.tensor([0.05, 0.25, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.grad((2 * shares.sqrt().asin()).sum(), shares)[0]
    obtained = torch.tensor([group_constant(p, 100_000) for p in shares.tolist()], dtype=torch.float64)
    text = "GRPO's c(p, G) for G = 100,000 is the derivative of 2 arcsin √p, p = 0.05 to 0.9"
    claim.equal("objective.arcsine", text, exact, obtained, 1e-3, digits=4)


def test_small_shares_are_held_down_by_the_size_of_the_group(claim):
    exact = [(size - 1) ** 0.5 for size in (2, 4, 8, 16)]
    obtained = [group_constant(1e-9, size) for size in (2, 4, 8, 16)]
    text = "GRPO's c(p, G) → √(G−1) as p → 0, G = 2, 4, 8, 16"
    claim.equal("objective.rare", text, torch.tensor(exact), torch.tensor(obtained), 1e-6)


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16, 64])
@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.97])
def test_the_constant_rises_with_the_group_towards_its_limit(p, size):
    assert group_constant(p, size) < group_constant(p, 2 * size) < 1 / (p * (1 - p)) ** 0.5


def test_resampled_groups_weigh_rare_successes_more(claim):
    exact, obtained = [], []
    for texts, size, scale in itertools.product(WORLDS, (2, 3), ("none", "group")):
        p = float(texts.p.detach())
        constant = (size - 1) / size if scale == "none" else group_constant(p, size)
        exact.append(constant / (1 - p**size - (1 - p) ** size) * texts.gradient(texts.p))
        obtained.append(expected_gradient(texts, size, scale, mixed=True, **SUM))
    text = "given a group that is not all right or all wrong (DAPO): E[g] = c ∇p / (1 − p^G − (1−p)^G), G = 2, 3"
    claim.equal("objective.mixed", text, exact, obtained)


# --- Lengths -----------------------------------------------------------------------------------------


@pytest.mark.equation("12.2")
@pytest.mark.parametrize("over", ["sequences", "tokens"])
def test_dividing_by_lengths_turns_the_gradient(claim, over):
    """The mean over a group's tokens far less than that over each text's own."""
    cosines = [
        torch.cosine_similarity(texts.gradient(texts.p), expected_gradient(texts, 3, "group", **AGGREGATIONS[over]), 0)
        for texts in WORLDS
    ]
    text = f"GRPO with a mean over {over}: E[g] is no multiple of ∇p (cosine), G = 3"
    claim.biased(f"objective.{over}", text, [1.0] * 2, cosines, 0.04 if over == "sequences" else 1e-3, digits=4)


@pytest.mark.equation("12.2")
@pytest.mark.parametrize("over", AGGREGATIONS)
def test_length_that_says_nothing_of_correctness_is_left_alone(claim, over):
    texts = lengths_world(torch.tensor([-0.7, 0.4], dtype=torch.float64, requires_grad=True))
    found = [expected_gradient(texts, 3, scale, **AGGREGATIONS[over])[1] for scale in ("none", "group")]
    text = f"length independent of correctness, mean over {over}: the expected gradient of going on, G = 3"
    claim.equal(f"objective.free_{over}", text, torch.zeros(2, dtype=torch.float64), torch.stack(found))


@pytest.mark.equation("12.2")
def test_only_a_constant_leaves_length_alone_where_right_texts_are_shorter(claim):
    """What the text goes on to say does not make it right: the gradient of p by going on is 0."""
    texts = lengths_world(torch.tensor(THETA, dtype=torch.float64, requires_grad=True))
    zero = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(texts.gradient(texts.p)[1:], zero, atol=1e-12, rtol=0)
    found = {over: expected_gradient(texts, 3, "group", **AGGREGATIONS[over])[1:] for over in AGGREGATIONS}
    text = "length after a right and after a wrong start, mean over {}: the expected gradient of going on, G = 3"
    claim.equal("objective.bound_constant", text.format("a constant"), zero, found["constant"])
    for over, bound in (("sequences", 0.01), ("tokens", 0.005)):
        claim.biased(f"objective.bound_{over}", text.format(over), zero, found[over], bound)
        assert found[over][0] < 0 < found[over][1], "right texts get shorter, wrong ones longer"


@pytest.mark.equation("12.2")
def test_the_pull_of_a_mean_over_sequences(claim):
    texts = lengths_world(torch.tensor(THETA, dtype=torch.float64, requires_grad=True))
    obtained = expected_gradient(texts, 3, "group", **AGGREGATIONS["sequences"])[1:]
    p, right, inverse = texts.p, texts.right.bool(), 1 / texts.mask.sum(dim=1)
    given_right = (texts.chances * inverse)[right].sum() / texts.chances[right].sum()
    given_wrong = (texts.chances * inverse)[~right].sum() / texts.chances[~right].sum()
    constant = group_constant(float(p.detach()), 3) * float((p * (1 - p)).detach())
    exact = constant * texts.gradient(given_right - given_wrong)[1:]
    text = "mean over sequences: the pull on lengths is c p(1−p) ∇(E[1/|y|; right] − E[1/|y|; wrong])"
    claim.equal("objective.pull", text, exact, obtained)


# --- One ratio a text --------------------------------------------------------------------------------


@pytest.mark.equation("12.3")
def test_before_the_first_step_one_ratio_a_text_is_a_mean_over_sequences(claim):
    exact = [expected_gradient(texts, 2, "group", **AGGREGATIONS["sequences"]) for texts in WORLDS]
    obtained = [expected_gradient(texts, 2, "group", level="sequence", over="sequences") for texts in WORLDS]
    text = "GSPO at ρ = 1: its expected gradient is GRPO's with a mean over sequences"
    claim.equal("objective.gspo", text, exact, obtained)


@pytest.mark.equation("12.3")
def test_the_geometric_mean_is_a_biased_weight_and_its_power_is_not(claim):
    old, new = WORLDS
    chances, length = old.chances.detach(), old.mask.sum(dim=1)
    weight = sequence_ratio(new.log_probs.detach(), old.log_probs.detach(), old.mask)
    one = torch.ones((), dtype=torch.float64)
    claim.equal("objective.power", "E_old[s^|y|] = 1, s the sequence ratio", one, chances @ weight**length)
    claim.biased("objective.geometric", "E_old[s] of the sequence ratio s is not 1", one, chances @ weight, 0.02)
    whole = importance_ratio(new.log_probs.detach(), old.log_probs.detach()).prod(dim=1)
    torch.testing.assert_close(weight**length, whole, atol=1e-12, rtol=1e-12)
    assert chances @ weight.square() < 0.8 * (chances @ whole.square()), "what is bought is variance"
