"""The equations of lesson 13 by hand, and what a loss on preferences does not see."""

import math

import pytest
import torch

from rlhf_lessons.preferences import dpo_loss, ipo_loss, margins

F64 = torch.float64
HAND = [torch.tensor([x, x], dtype=F64) for x in (-1.0, -5.0, -2.0, -4.0)]  # margin (−1 + 2) − (−5 + 4) = 2


@pytest.mark.equation("13.1")
def test_margin_by_hand():
    for beta in (0.1, 7.0):
        assert margins(*HAND, beta).tolist() == [2, 2]


@pytest.mark.equation("13.2")
def test_odds_of_three_to_one():
    """β m = log 3: the implied rewards say that one of four annotators would contradict."""
    assert dpo_loss(*HAND, beta=math.log(3) / 2).item() == pytest.approx(-math.log(0.75))


@pytest.mark.equation("13.3")
def test_ipo_stops_at_its_margin():
    assert ipo_loss(*HAND, beta=0.25).item() == 0  # 1/(2β) = 2
    assert ipo_loss(HAND[1], HAND[0], HAND[3], HAND[2], beta=0.25).item() == 16


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_both_texts_may_become_rarer_together(loss):
    rarer = HAND[0] - 3, HAND[1] - 3, *HAND[2:]
    torch.testing.assert_close(loss(*rarer, beta=0.3), loss(*HAND, beta=0.3))


def test_dpo_stays_finite_far_away():
    far = [torch.tensor([x], requires_grad=i < 2) for i, x in enumerate((-900.0, -1.0, -20.0, -20.0))]
    loss = dpo_loss(*far, beta=1.0)
    loss.backward()
    assert loss.item() == 899 and far[0].grad.item() == -1
