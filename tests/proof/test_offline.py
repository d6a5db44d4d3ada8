"""Offline. What DPO and IPO end at when every pair of texts is compared as often as there are annotators to do it, and
what pairs alone leave open; tables of a logit a text, so that policies are all distributions.
"""

import math

import pytest
import torch

from proof.worlds import seeded
from rlhf_lessons.exact import TabularPolicy, optimal_policy, sequence_kl
from rlhf_lessons.preferences import dpo_loss, ipo_loss, preference_probability

BETA = 0.5
PAIRS = {"dpo": dpo_loss, "ipo": ipo_loss}


def world(seed=0, *, count=6, beta=BETA):
    """log π_ref, rewards and log π* of texts to one prompt."""
    dice = seeded(seed)
    ref, rewards = (torch.randn(count, generator=dice, dtype=torch.float64) for _ in range(2))
    ref = ref.log_softmax(dim=0)
    return ref, rewards, optimal_policy(ref, rewards, kl_coef=beta)


def every_pair(count):
    return torch.combinations(torch.arange(count)).unbind(dim=1)


def expected_loss(logits, ref, pairs, share, *, loss="dpo", beta=BETA):
    """The mean loss where a share of the annotators prefers the first text of each pair."""
    log_probs, total = logits.log_softmax(dim=0), 0.0
    for a, b, p in zip(*pairs, share, strict=True):
        for chosen, rejected, weight in ((a, b, p), (b, a, 1 - p)):
            rows = (log_probs[chosen], log_probs[rejected], ref[chosen], ref[rejected])
            total = total + weight * PAIRS[loss](*(x[None] for x in rows), beta=beta)
    return total / len(share)


def minimised(logits, loss_of, steps=300):
    """L-BFGS, then Newton's method, until the gradient is rounding noise."""
    logits = logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=steps, tolerance_grad=1e-15, tolerance_change=0.0,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = loss_of(logits)
        loss.backward()
        return loss

    optimizer.step(closure)
    logits = logits.detach()
    for _ in range(2):  # Newton's steps from there; a constant added to all logits is left alone
        slope = torch.autograd.functional.jacobian(loss_of, logits)
        logits = logits - torch.linalg.pinv(torch.autograd.functional.hessian(loss_of, logits)) @ slope
    return logits.log_softmax(dim=0)


def variation(log_p, log_q):
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum()


@pytest.mark.equation("13.2", "8.4")
def test_dpo_is_minimal_at_the_optimal_policy(claim):
    gradients, distances, starts = [], [], []
    for seed in range(5):
        ref, rewards, best = world(seed)
        pairs = every_pair(6)
        share = preference_probability(rewards[pairs[0]], rewards[pairs[1]])
        at_best = best.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(expected_loss(at_best, ref, pairs, share), at_best)
        gradients.append(gradient)
        start = torch.randn(6, generator=seeded(50 + seed), dtype=torch.float64)
        starts.append(variation(start.log_softmax(0), best))
        end = minimised(start, lambda z, r=ref, p=pairs, s=share: expected_loss(z, r, p, s))
        distances.append(variation(end, best))
    text = "all pairs of 6 texts at their Bradley–Terry odds, 5 worlds: DPO's gradient at π* is 0"
    claim.equal("offline.gradient", text, torch.zeros(30), torch.cat(gradients), 1e-12)
    text = f"from random policies, {min(starts):.2f} to {max(starts):.2f} away in total variation, Newton ends at π*"
    claim.equal("offline.optimum", text, torch.zeros(5), torch.stack(distances), 1e-8)


@pytest.mark.equation("13.1", "13.2")
def test_the_gradient_of_dpo(claim):
    """−β σ(−β m) (∇log π(chosen) − ∇log π(rejected)), on texts of a language model that share their tokens' logits."""
    policy = TabularPolicy(3, 3, generator=seeded(1))
    texts, _ = policy.enumerate()
    ref = torch.randn(len(texts), generator=seeded(2), dtype=torch.float64).log_softmax(dim=0)
    exact, obtained = [], []
    for chosen, rejected in ((0, 1), (5, 20), (26, 3)):
        log_probs = policy.sequence_log_prob(texts)
        ours, theirs = log_probs[[chosen, rejected]], ref[[chosen, rejected]]
        loss = dpo_loss(ours[:1], ours[1:], theirs[:1], theirs[1:], beta=BETA)
        obtained.append(torch.autograd.grad(loss, policy.logits, retain_graph=True)[0].flatten())
        up, down = (torch.autograd.grad(x, policy.logits, retain_graph=True)[0].flatten() for x in ours)
        gap = BETA * (ours[0] - theirs[0] - ours[1] + theirs[1]).item()
        exact.append(-BETA / (1 + math.exp(gap)) * (up - down))
    claim.equal("offline.slope", "DPO's gradient is −β σ(−β m) (∇log π(chosen) − ∇log π(rejected))", exact, obtained)


@pytest.mark.equation("13.3", "13.1")
def test_where_ipo_stops(claim):
    ref, _, _ = world(3)
    one = (torch.tensor([0]), torch.tensor([1]))
    exact, obtained = [], []
    for share in (1.0, 0.9, 0.5, 0.2):
        for beta in (0.1, 0.5, 2.0):
            end = minimised(ref, lambda z, p=share, b=beta: expected_loss(z, ref, one, [p], loss="ipo", beta=b)) - ref
            exact.append(torch.tensor((2 * share - 1) / (2 * beta)))
            obtained.append(end[0] - end[1])
    text = "a pair that a share p prefers: IPO ends at a margin of (2p − 1)/(2β), so at 1/(2β) where all agree"
    claim.equal("offline.ipo", text, exact, obtained, 1e-6)
    exact, obtained = [], []
    for count in (2, 3, 6, 10):
        ref = torch.randn(count, generator=seeded(count), dtype=torch.float64).log_softmax(dim=0)
        pairs = every_pair(count)
        sure = torch.ones(len(pairs[0]), dtype=torch.float64)
        end = minimised(ref, lambda z, r=ref, p=pairs, s=sure: expected_loss(z, r, p, s, loss="ipo")) - ref
        exact.append(torch.full((count - 1,), 2 / count / (2 * BETA), dtype=torch.float64))
        obtained.append(end[:-1] - end[1:])
    text = "K texts in order, all pairs, all agree: IPO's neighbours end 2/K of 1/(2β) apart (K = 2, 3, 6, 10)"
    claim.equal("offline.ordered", text, exact, obtained, 1e-6)


@pytest.mark.equation("13.2")
def test_dpo_runs_away_where_all_agree(claim):
    ref, _, _ = world(3)
    logits, seen = ref.clone(), {}
    for step in range(1, 10_001):
        slope = logits.clone().requires_grad_()
        loss = expected_loss(slope, ref, (torch.tensor([0]), torch.tensor([1])), [1.0])
        (gradient,) = torch.autograd.grad(loss, slope)
        logits = logits - gradient
        if step in (100, 1_000, 10_000):
            seen[step] = float((logits - ref)[0] - (logits - ref)[1])
    values = {f"after {step:,} steps": margin for step, margin in reversed(seen.items())}
    text = "a pair on which all agree: under DPO the margin grows by log 10 / β = 4.6 for ten times the steps"
    claim.decreasing("offline.runaway", text, values, 4.0)


@pytest.mark.equation("13.2")
def test_what_pairs_leave_open(claim):
    """Only texts 0 and 1 of six are compared: the loss knows their margin, and nothing of the other four."""
    ref, _, _ = world(3)
    alone = (torch.tensor([0]), torch.tensor([1]))
    start = expected_loss(ref, ref, alone, [0.9])
    losses, shares = [], []
    for mass in (0.001, 0.5, 0.999):
        pair = (ref[:2].log_softmax(0) + math.log(1 - mass), ref[2:].log_softmax(0) + math.log(mass))
        logits = torch.cat(pair)
        losses.append(expected_loss(logits, ref, alone, [0.9]))
        shares.append(logits.exp()[2:].sum())
    text = "a pair of six texts is compared: DPO's loss is the same at .001, .5 and .999 of the mass on the other four"
    claim.equal("offline.open", text, [start] * 3, losses)
    assert torch.allclose(torch.stack(shares), torch.tensor([0.001, 0.5, 0.999], dtype=torch.float64))
    # A chosen text that the reference hardly writes: the margin opens downwards, and the rest gains most.
    ref = torch.tensor([0.01, 0.5, 0.29, 0.1, 0.06, 0.04], dtype=torch.float64).log()
    end = minimised(ref, lambda z: expected_loss(z, ref, alone, [0.9]))
    gained = {"compared by nobody": float(end.exp()[2:].sum() - 0.49), "preferred": float(end.exp()[0] - 0.01)}
    claim.decreasing(
        "offline.elsewhere", "most of what the rejected text loses goes to texts that nobody compared", gained, 0.1
    )
    claim.equal(
        "offline.margin", "the margin ends at log(.9/.1)/β", math.log(9) / BETA, (end - ref)[0] - (end - ref)[1], 1e-6
    )


@pytest.mark.equation("13.2", "13.1")
def test_without_a_reference_the_optimum_forgets_it(claim):
    ref, rewards, best = world(4)
    pairs = every_pair(6)
    share = preference_probability(rewards[pairs[0]], rewards[pairs[1]])
    nobody = torch.zeros(6, dtype=torch.float64)  # a reference that finds all texts alike cancels
    end = minimised(ref, lambda z: expected_loss(z, nobody, pairs, share))
    claim.equal("offline.forgotten", "without a reference in the loss the minimiser is exp(r/β), normalised",
                (rewards / BETA).log_softmax(0).exp(), end.exp(), 1e-8)  # fmt: skip
    kls = {"without a reference": sequence_kl(end, ref), "π*": sequence_kl(best, ref)}
    claim.decreasing("offline.price", "it is further from π_ref than π*", kls, 0.01)
