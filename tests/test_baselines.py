"""Baselines, held against loops, against the definition of an optimum and against a bandit's exact moments."""

import math

import pytest
import torch

from rlhf_lessons.baselines import group_advantages, leave_one_out_baseline, optimal_baseline

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.equation("4.4")
def test_leave_one_out_by_hand():
    returns = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 3.0]], dtype=F64)
    expected = torch.tensor([[11 / 3, 10 / 3, 3, 2], [1, 1, 1, 0]], dtype=F64)
    torch.testing.assert_close(leave_one_out_baseline(returns), expected)
    assert leave_one_out_baseline(torch.tensor([[4.0, 9.0]])).tolist() == [[9, 4]]


@pytest.mark.equation("4.4")
@pytest.mark.parametrize("samples", [2, 3, 8])
def test_leave_one_out_against_the_loop(samples):
    returns = normal(3, samples)
    baseline = leave_one_out_baseline(returns)
    for b in range(3):
        for k in range(samples):
            others = [returns[b, j].item() for j in range(samples) if j != k]
            assert baseline[b, k].item() == pytest.approx(sum(others) / len(others), rel=1e-12)


def test_leave_one_out_does_not_see_its_own_sample():
    jacobian = torch.autograd.functional.jacobian(leave_one_out_baseline, normal(1, 4))[0, :, 0]
    torch.testing.assert_close(jacobian, (1 - torch.eye(4, dtype=F64)) / 3)


def test_advantage_over_leave_one_out_is_a_stretched_deviation_from_the_mean():
    returns = normal(3, 5)
    advantage = returns - leave_one_out_baseline(returns)
    torch.testing.assert_close(advantage, 5 / 4 * (returns - returns.mean(dim=1, keepdim=True)))


@pytest.mark.parametrize("shape", [(3, 1), (4,), (2, 3, 4)])
def test_leave_one_out_rejects_other_shapes(shape):
    with pytest.raises(ValueError, match=r"returns must be \(B, K\) with K >= 2 .*got shape \(" + str(shape[0])):
        leave_one_out_baseline(torch.zeros(shape))


@pytest.mark.equation("4.3")
def test_optimal_baseline_by_hand():
    assert optimal_baseline(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])).item() == 14 / 4
    returns = torch.tensor([1.0, 2.0, 6.0])
    assert optimal_baseline(torch.full((3,), 7.0), returns).item() == 3  # equal norms: the plain mean
    assert optimal_baseline(torch.tensor([0.0, 5.0, 0.0]), returns).item() == 2


@pytest.mark.equation("4.3")
def test_optimal_baseline_minimises_the_variance_of_a_bandit():
    probs = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    actions = torch.tensor([0, 0, 1, 2])  # each action as often as it is likely: means over these are expectations
    scores = torch.eye(3, dtype=F64)[actions] - probs  # ∇ log π of a softmax
    returns = torch.tensor([3.0, -1.0, 5.0], dtype=F64)[actions]

    def total_variance(b):
        gradients = (returns - b)[:, None] * scores
        return (gradients - gradients.mean(dim=0)).square().sum(dim=1).mean()

    best = optimal_baseline(scores.square().sum(dim=1), returns)
    for step in (-1.0, -1e-3, 1e-3, 1.0):
        assert total_variance(best) < total_variance(best + step)
    # The variance is a parabola in b: three values give its lowest point.
    low, mid, high = (total_variance(b).item() for b in (-1.0, 0.0, 1.0))
    assert best.item() == pytest.approx((low - high) / (2 * (low - 2 * mid + high)), rel=1e-9)
    assert not math.isclose(best.item(), returns.mean().item(), rel_tol=0.01)


def test_optimal_baseline_rejects_bad_input():
    with pytest.raises(ValueError, match=r"returns must have the shape of score_norms_sq, \(3,\); got \(2,\)"):
        optimal_baseline(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"returns must be \(N,\); got shape \(2, 3\)"):
        optimal_baseline(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="score_norms_sq must have a positive entry; got only 0"):
        optimal_baseline(torch.zeros(3), torch.ones(3))


# --- Groups ---------------------------------------------------------------------------------------


@pytest.mark.equation("12.1")
def test_group_advantages_by_hand():
    """Groups {1, 3, 5} and {0, 4}, mixed up: means 3 and 2, biased variances 8/3 and 4, of all centred rewards 16/5."""
    rewards, group = torch.tensor([1.0, 0.0, 3.0, 4.0, 5.0], dtype=F64), torch.tensor([7, 2, 7, 2, 7])
    centred = torch.tensor([-2.0, -2.0, 0.0, 2.0, 2.0], dtype=F64)
    deviation = torch.tensor([8 / 3, 4, 8 / 3, 4, 8 / 3], dtype=F64).sqrt()
    for scale, expected in (("none", centred), ("group", centred / deviation), ("batch", centred / (16 / 5) ** 0.5)):
        torch.testing.assert_close(group_advantages(rewards, group, scale=scale), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, -12345.678, 1e30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_equal_rewards_give_no_advantage(scale, value, dtype):
    if dtype == torch.float16 and abs(value) > 65504:
        value = 60000.0
    found = group_advantages(torch.full((24,), value, dtype=dtype), torch.arange(24) // 8, scale=scale)
    assert found.dtype == (F64 if dtype == F64 else torch.float32)
    assert found.abs().max() <= (0.1 if scale != "none" else 1e-6 * abs(value))


def test_rewards_that_differ_little_but_truly_are_scaled():
    rewards = torch.tensor([1000.0, 1000.1, 1000.0, 1000.1])
    found = group_advantages(rewards, torch.zeros(4, dtype=torch.long), scale="group")
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, -1.0, 1.0]), atol=2e-3, rtol=0)


def test_group_advantages_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="scale must be one of none, group, batch; got 'std'"):
        group_advantages(torch.zeros(4), torch.zeros(4, dtype=torch.long), scale="std")
    with pytest.raises(ValueError, match=r"group must have the shape of rewards, \(4,\); got \(3,\)"):
        group_advantages(torch.zeros(4), torch.zeros(3, dtype=torch.long), scale="none")
