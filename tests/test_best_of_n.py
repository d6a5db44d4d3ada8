"""Best-of-n by hand: its law, the bound on its KL, the mean of the best from more samples than n."""

import math

import pytest
import torch

from rlhf_lessons.exact import best_of_n, sequence_kl
from rlhf_lessons.kl import best_of_n_bound
from rlhf_lessons.scoring import best_of_mean


@pytest.mark.equation("14.1")
def test_the_better_of_two_by_hand():
    """The best, of chance 1/2, is missed only if both draws miss it; the two below share what is left, 1 to 3."""
    log_probs = torch.tensor([0.125, 0.5, 0.375], dtype=torch.float64).log()
    law = best_of_n(log_probs, torch.tensor([0.0, 1.0, 0.0]), 2).exp()
    torch.testing.assert_close(law, torch.tensor([0.0625, 0.75, 0.1875], dtype=torch.float64))


@pytest.mark.equation("14.2")
def test_the_bound_by_hand():
    assert best_of_n_bound(1) == 0
    assert best_of_n_bound(2) == pytest.approx(math.log(2) - 0.5)
    assert best_of_n_bound(4) == pytest.approx(2 * math.log(2) - 0.75)
    coin = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    kl = sequence_kl(best_of_n(coin, torch.tensor([0.0, 1.0]), 2), coin)
    assert kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5)) and kl < best_of_n_bound(2)
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"n must be at least 1; got {n}"):
            best_of_n_bound(n)


@pytest.mark.equation("14.3")
def test_the_better_of_two_from_three_by_hand():
    """Three pairs: the highest score wins two of them, the middle one the third."""
    scores, values = torch.tensor([[5.0, 1.0, 3.0]]), torch.tensor([[30.0, 7.0, 60.0]])
    assert best_of_mean(scores, values, 2).item() == pytest.approx((2 * 30 + 60) / 3)
