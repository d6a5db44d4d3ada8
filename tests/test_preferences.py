"""Bradley–Terry, held against the logistic function in Python and against counts whose best fit is known."""

import math

import pytest
import torch

from rlhf_lessons.preferences import bradley_terry_loss, dpo_loss, ipo_loss, preference_probability

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.equation("2.1")
def test_probability_by_hand():
    a, b = torch.tensor([0.0, math.log(3.0), 1.0], dtype=F64), torch.tensor([0.0, 0.0, 3.0], dtype=F64)
    expected = torch.tensor([0.5, 0.75, 1 / (1 + math.exp(2))], dtype=F64)
    torch.testing.assert_close(preference_probability(a, b), expected)


@pytest.mark.equation("2.1")
def test_probability_is_each_answers_share_of_its_strength():
    """Bradley and Terry's own form: with strengths e^a and e^b, a wins e^a / (e^a + e^b) of the time."""
    a, b = normal(20), normal(20, seed=1)
    torch.testing.assert_close(preference_probability(a, b), a.exp() / (a.exp() + b.exp()))
    torch.testing.assert_close(preference_probability(a, b) + preference_probability(b, a), torch.ones(20, dtype=F64))


def test_only_the_difference_counts():
    a, b = normal(5), normal(5, seed=1)
    torch.testing.assert_close(preference_probability(a + 30, b + 30), preference_probability(a, b))
    torch.testing.assert_close(bradley_terry_loss(a + 30, b + 30), bradley_terry_loss(a, b))


def test_gradient_of_the_probability():
    a, b = normal(5).requires_grad_(), normal(5, seed=1).requires_grad_()
    p = preference_probability(a, b)
    grad_a, grad_b = torch.autograd.grad(p.sum(), (a, b))
    torch.testing.assert_close(grad_a, (p * (1 - p)).detach())
    torch.testing.assert_close(grad_b, -grad_a)


@pytest.mark.equation("2.2")
def test_loss_by_hand():
    zero = torch.zeros(4, dtype=F64)
    assert bradley_terry_loss(zero, zero).item() == pytest.approx(math.log(2))
    chosen, rejected = torch.tensor([math.log(3.0), 0.0], dtype=F64), torch.tensor([0.0, math.log(3.0)], dtype=F64)
    expected = -(math.log(0.75) + math.log(0.25)) / 2
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected)


@pytest.mark.equation("2.2")
def test_loss_is_the_log_likelihood_of_the_comparisons():
    chosen, rejected = normal(6), normal(6, seed=1)
    strengths = [(math.exp(c), math.exp(r)) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    expected = -sum(math.log(c / (c + r)) for c, r in strengths) / 6
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_of_the_loss():
    chosen, rejected = normal(5).requires_grad_(), normal(5, seed=1).requires_grad_()
    bradley_terry_loss(chosen, rejected).backward()
    surprise = 1 - preference_probability(chosen, rejected).detach()
    torch.testing.assert_close(chosen.grad, -surprise / 5)
    torch.testing.assert_close(rejected.grad, surprise / 5)


def test_the_best_fit_reproduces_the_observed_share():
    """a won three of four comparisons: the likelihood is highest where P(a ≻ b) = 3/4, at a difference of log 3."""

    def slope(difference):
        a = torch.tensor(difference, dtype=F64, requires_grad=True)
        b = torch.tensor(0.0, dtype=F64)
        bradley_terry_loss(torch.stack([a, a, a, b]), torch.stack([b, b, b, a])).backward()
        return a.grad.item()

    assert slope(math.log(3)) == pytest.approx(0, abs=1e-12)
    assert slope(math.log(3) - 0.1) < 0 < slope(math.log(3) + 0.1)


def test_extreme_differences_stay_finite():
    chosen, rejected = torch.tensor([-1000.0, 1000.0], requires_grad=True), torch.tensor([0.0, 0.0])
    loss = bradley_terry_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == 500  # (1000 + 0) / 2
    assert chosen.grad.tolist() == [-0.5, 0]
    assert preference_probability(chosen.detach(), rejected).tolist() == [0, 1]


def test_bad_input():
    with pytest.raises(ValueError, match=r"b must have the shape of a, \(2,\); got \(3,\)"):
        preference_probability(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"rejected must have the shape of chosen, \(2,\); got \(1,\)"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match="chosen must hold at least one pair; got none"):
        bradley_terry_loss(torch.zeros(0), torch.zeros(0))


# --- A policy at once -------------------------------------------------------------------------------------------------

LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss}


def test_dpo_and_ipo_by_hand():
    """Margin of log-ratios: (−1 + 4) − (−2 + 3) = 2; at β = 1/2 DPO's odds are e, IPO's aim is 1."""
    texts = [torch.tensor([x], dtype=F64) for x in (-1.0, -4.0, -2.0, -3.0)]
    assert dpo_loss(*texts, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert ipo_loss(*texts, beta=0.5).item() == pytest.approx((2 - 1) ** 2)


def test_dpo_is_bradley_terry_on_the_reward_that_the_policy_implies():
    chosen, rejected, ref_chosen, ref_rejected = (normal(9, seed=seed) for seed in range(4))
    implied = bradley_terry_loss(0.3 * (chosen - ref_chosen), 0.3 * (rejected - ref_rejected))
    assert dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3).item() == pytest.approx(implied.item())
    assert dpo_loss(chosen, rejected, chosen, rejected, beta=0.3).item() == pytest.approx(math.log(2))


def test_dpo_s_gradient_weighs_a_pair_by_how_wrong_it_is():
    """β σ(−margin): the chosen text up, the rejected one down by as much, the reference untouched."""
    texts = [normal(5, seed=seed).requires_grad_() for seed in range(4)]
    loss = dpo_loss(*texts, beta=0.7)
    grads = torch.autograd.grad(loss, texts, allow_unused=True)
    margin = 0.7 * (texts[0] - texts[2] - texts[1] + texts[3])
    weight = 0.7 * torch.sigmoid(-margin) / 5
    torch.testing.assert_close(grads[0], -weight)
    torch.testing.assert_close(grads[1], weight)
    assert grads[2:] == (None, None)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_pairs_that_cannot_be_compared_are_refused(loss):
    four = [torch.zeros(3)] * 4
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"beta must be positive; got {beta}"):
            loss(*four, beta=beta)
    with pytest.raises(ValueError, match="rejected must have the shape of chosen"):
        loss(four[0], torch.zeros(2), *four[2:], beta=0.1)
    with pytest.raises(ValueError, match="chosen must hold at least one pair; got none"):
        loss(*[torch.zeros(0)] * 4, beta=0.1)
