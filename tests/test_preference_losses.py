"""DPO's and IPO's losses by hand, and what they do with numbers at the edge."""

import math

import pytest
import torch

from rlhf_lessons.preferences import bradley_terry_loss, dpo_loss, ipo_loss, margins

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


FOUR = [normal(5, seed=seed) - 20 for seed in range(4)]


@pytest.mark.equation("13.1")
def test_margin_by_hand():
    rows = [torch.tensor([x], dtype=F64) for x in (-1.0, -5.0, -2.0, -4.0)]
    assert margins(*rows, 1.0).item() == 2  # (−1 + 2) − (−5 + 4)
    assert margins(*rows, 7.0).item() == 2


@pytest.mark.equation("13.2")
def test_dpo_is_bradley_terry_on_the_implied_rewards():
    chosen, rejected, ref_chosen, ref_rejected = FOUR
    rewards = 0.3 * (chosen - ref_chosen), 0.3 * (rejected - ref_rejected)
    torch.testing.assert_close(dpo_loss(*FOUR, beta=0.3), bradley_terry_loss(*rewards))


@pytest.mark.equation("13.2")
def test_dpo_starts_at_log_2():
    assert dpo_loss(FOUR[0], FOUR[1], FOUR[0], FOUR[1], beta=0.1).item() == pytest.approx(math.log(2))


@pytest.mark.equation("13.3")
def test_ipo_by_hand():
    rows = [torch.tensor([x, x], dtype=F64) for x in (-1.0, -5.0, -2.0, -4.0)]
    assert ipo_loss(*rows, beta=0.25).item() == 0  # the margin is 2 = 1/(2β)
    assert ipo_loss(*rows, beta=0.5).item() == 1
    assert ipo_loss(rows[1], rows[0], rows[3], rows[2], beta=0.25).item() == 16


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_the_reference_is_held_constant_and_only_ratios_count(loss):
    leaves = [x.clone().requires_grad_() for x in FOUR]
    loss(*leaves, beta=0.3).backward()
    assert all(x.grad is not None for x in leaves[:2]) and all(x.grad is None for x in leaves[2:])
    torch.testing.assert_close(leaves[0].grad, -leaves[1].grad)
    moved = FOUR[0] - 3, FOUR[1] - 3, FOUR[2], FOUR[3]  # both texts less likely by as much: nobody notices
    torch.testing.assert_close(loss(*moved, beta=0.3), loss(*FOUR, beta=0.3))


def test_dpo_stays_finite_far_away():
    far = [torch.tensor([x], requires_grad=i < 2) for i, x in enumerate((-900.0, -1.0, -20.0, -20.0))]
    loss = dpo_loss(*far, beta=1.0)
    loss.backward()
    assert loss.item() == 899 and far[0].grad.item() == -1


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_bad_input(loss):
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta must be positive"):
            loss(*FOUR, beta=beta)
    with pytest.raises(ValueError, match="ref_rejected must have the shape of chosen"):
        loss(*FOUR[:3], FOUR[3][:2], beta=0.1)
    with pytest.raises(ValueError, match="chosen must hold at least one pair; got none"):
        loss(*[torch.zeros(0)] * 4, beta=0.1)
