"""Ratios and weighted means, held against distributions small enough to sum over."""

import math

import pytest
import torch

from rlhf_lessons.importance import (
    bounded_exponent,
    effective_sample_size,
    importance_mean,
    importance_ratio,
    masked_ratio,
    sequence_ratio,
    truncated_ratio,
)

NAN, INF = math.nan, math.inf
F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.equation("6.2")
def test_ratio_by_hand():
    new, old = torch.tensor([0.5, 0.1, 0.3], dtype=F64), torch.tensor([0.25, 0.2, 0.3], dtype=F64)
    torch.testing.assert_close(importance_ratio(new.log(), old.log()), torch.tensor([2, 0.5, 1], dtype=F64))
    assert importance_ratio(torch.tensor([-800.0]), torch.tensor([-800.0])).item() == 1  # both underflow to 0
    assert importance_ratio(torch.tensor([-INF]), torch.tensor([-1.0])).item() == 0


@pytest.mark.equation("6.2")
def test_ratio_moves_an_expectation_from_one_policy_to_the_other():
    new, old, f = normal(6).log_softmax(0), normal(6, seed=1).log_softmax(0), normal(6, seed=2)
    ratio = importance_ratio(new, old)
    assert (old.exp() * ratio).sum().item() == pytest.approx(1)
    assert (old.exp() * ratio * f).sum().item() == pytest.approx((new.exp() * f).sum().item())


def test_gradient_of_the_ratio_is_ratio_times_score():
    log_probs, old = normal(5).requires_grad_(), normal(5, seed=1)
    ratio = importance_ratio(log_probs, old)
    (grad,) = torch.autograd.grad(ratio.sum(), log_probs)
    torch.testing.assert_close(grad, (log_probs.detach() - old).exp())


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 3.4028235e38), (F64, 1.7976931348623157e308)])
def test_an_exponent_is_bounded_and_keeps_its_gradient(dtype, largest):
    """To the bit the same up to the bound; beyond, e to the bound, and the gradient there. A NaN stays."""
    bound = 0.49 * math.log(largest)
    ordinary = torch.tensor([-INF, -1000.0, -1e-30, -0.0, 0.3, bound - 1e-3], dtype=dtype)
    assert torch.equal(bounded_exponent(ordinary), ordinary)
    far = torch.tensor([bound + 1, 1e5, 1e30, NAN], dtype=dtype, requires_grad=True)
    power = bounded_exponent(far).exp()
    power.sum().backward()
    assert power[:3].tolist() == pytest.approx([largest**0.49] * 3, rel=1e-4) and power[3].isnan()
    assert far.grad[:3].tolist() == power[:3].tolist()
    assert power[:3].square().isfinite().all()
    assert bounded_exponent(torch.tensor([INF], dtype=dtype)).item() == pytest.approx(bound)


def test_ratio_rejects_other_shapes():
    with pytest.raises(ValueError, match=r"old_log_probs must have the shape of log_probs, \(2, 3\); got \(3,\)"):
        importance_ratio(torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.equation("6.1")
def test_means_by_hand():
    f, weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([3.0, 0.0, 1.0])
    assert importance_mean(f, weights).item() == 9 / 3
    assert importance_mean(f, weights, self_normalized=True).item() == 9 / 4
    assert importance_mean(f, torch.ones(3)).item() == 3


@pytest.mark.equation("6.1")
def test_mean_over_a_full_sample_is_the_expectation_under_the_other_distribution():
    q = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    p, f = torch.tensor([0.1, 0.6, 0.3], dtype=F64), torch.tensor([2.0, -1.0, 4.0], dtype=F64)
    samples = torch.tensor([0, 0, 1, 2])  # each as often as it is likely under q
    expected = 0.1 * 2 - 0.6 + 0.3 * 4
    for self_normalized in (False, True):
        mean = importance_mean(f[samples], (p / q)[samples], self_normalized=self_normalized)
        assert mean.item() == pytest.approx(expected)


@pytest.mark.equation("6.1")
def test_the_plain_mean_is_unbiased_and_the_self_normalised_one_is_not():
    """Both, averaged exactly over all samples of size two."""
    q, p = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.2, 0.2, 0.6], dtype=F64)
    f = torch.tensor([1.0, 5.0, -2.0], dtype=F64)
    averages = {}
    for self_normalized in (False, True):
        averages[self_normalized] = sum(
            (q[i] * q[j] * importance_mean(f[[i, j]], (p / q)[[i, j]], self_normalized=self_normalized)).item()
            for i in range(3)
            for j in range(3)
        )
    assert averages[False] == pytest.approx((p * f).sum().item(), rel=1e-12)
    assert abs(averages[True] - (p * f).sum().item()) > 0.1


def test_self_normalised_mean_ignores_the_scale_and_stays_in_range():
    f, weights = normal(6), normal(6, seed=1).exp()
    mean = importance_mean(f, weights, self_normalized=True)
    torch.testing.assert_close(importance_mean(f, 1e6 * weights, self_normalized=True), mean)
    assert f.min() <= mean <= f.max()
    torch.testing.assert_close(importance_mean(f, 3 * weights), 3 * importance_mean(f, weights))


def test_mean_rejects_other_shapes():
    with pytest.raises(ValueError, match=r"weights must have the shape of f, \(3,\); got \(2,\)"):
        importance_mean(torch.zeros(3), torch.zeros(2))


@pytest.mark.equation("6.3")
def test_effective_sample_size_by_hand():
    assert effective_sample_size(torch.ones(7)).item() == 7
    assert effective_sample_size(torch.tensor([0.0, 5.0, 0.0])).item() == 1
    assert effective_sample_size(torch.tensor([1.0, 3.0], dtype=F64)).item() == pytest.approx(16 / 10)


@pytest.mark.equation("6.3")
def test_effective_sample_size_from_the_spread_of_the_weights():
    weights = normal(9).exp()
    variation = weights.var(correction=0) / weights.mean().square()
    torch.testing.assert_close(effective_sample_size(weights), 9 / (1 + variation))


@pytest.mark.equation("6.3")
def test_effective_sample_size_is_what_the_variance_of_a_mean_shows():
    """Values of variance 1 averaged with weights w have the variance of a plain mean over N_eff of them."""
    weights = normal(8, seed=3).exp()
    share = weights / weights.sum()
    torch.testing.assert_close(share.square().sum(), 1 / effective_sample_size(weights))


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1e30])
def test_effective_sample_size_ignores_the_scale(scale):
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert effective_sample_size(scale * weights).item() == pytest.approx(36 / 14, rel=1e-6)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1e-9], [1.0, NAN], [1.0, INF], []])
def test_effective_sample_size_rejects_bad_weights(weights):
    with pytest.raises(ValueError, match=r"weights must be finite, not negative and not all 0; got \["):
        effective_sample_size(torch.tensor(weights))


def test_ratio_of_a_text_is_the_geometric_mean_of_its_tokens():
    new, old = normal(3, 4), normal(3, 4, seed=1)
    mask = torch.arange(4) < torch.tensor([4, 1, 3])[:, None]
    tokens = importance_ratio(new, old)
    expected = [tokens[row][mask[row]].prod().item() ** (1 / length) for row, length in enumerate((4, 1, 3))]
    assert sequence_ratio(torch.where(mask, new, NAN), old, mask).tolist() == pytest.approx(expected)
    assert sequence_ratio(new, old).tolist() == pytest.approx(tokens.prod(dim=1).pow(0.25).tolist())
    with pytest.raises(ValueError, match="old_log_probs must have the shape of log_probs"):
        sequence_ratio(new, old[:, :2])


@pytest.mark.equation("16.1")
@pytest.mark.parametrize("cap", [1.0, 1.3, INF])
def test_the_cap_s_bias_is_what_it_cuts_off(cap):
    """E_μ[w] = 1 − E_μ[(π/μ − cap)⁺], summed over all tokens."""
    policy, sampler = normal(6).log_softmax(0), normal(6, seed=1).log_softmax(0)
    weights = truncated_ratio(policy.requires_grad_(), sampler, cap=cap)
    excess = ((policy - sampler).exp() - cap).clamp(min=0)
    assert (sampler.exp() * weights).sum().item() == pytest.approx(1 - (sampler.exp() * excess).sum().item())
    assert weights.max() <= cap and not weights.requires_grad
    assert (weights < (policy - sampler).exp() - 1e-12).any() == (cap < INF)


@pytest.mark.equation("16.2")
@pytest.mark.parametrize("cap", [1.2, 2.0, INF])
def test_a_mask_keeps_the_policy_s_probability_of_what_it_leaves(cap):
    """E_μ[w] = P_π(1/cap <= π/μ <= cap), and no weight between."""
    policy, sampler = normal(12).log_softmax(0), normal(12, seed=1).log_softmax(0)
    ratio = (policy - sampler).exp()
    weights = masked_ratio(policy.requires_grad_(), sampler, cap=cap)
    kept = (ratio < cap) & (ratio > 1 / cap)
    assert cap == INF or 0 < kept.sum() < len(kept)
    assert (sampler.exp() * weights).sum().item() == pytest.approx(policy.exp()[kept].sum().item())
    torch.testing.assert_close(weights, torch.where(kept, ratio.detach(), 0))
    assert not weights.requires_grad


def texts_of_two():
    """All texts of one or two of three tokens, the first of which ends a text: log-probabilities (7, 2) under two."""
    policies = []
    for seed in (0, 10):
        first, second = normal(3, seed=seed).log_softmax(0), normal(3, 3, seed=seed + 1).log_softmax(1)
        rows = [[first[0], torch.tensor(NAN, dtype=F64)]] + [[first[a], second[a, b]] for a in (1, 2) for b in range(3)]
        policies.append(torch.tensor(rows, dtype=F64))
    mask = torch.ones(7, 2, dtype=torch.bool)
    mask[0, 1] = False
    return *policies, mask


def test_the_weight_of_a_text_moves_its_expectation_to_the_policy():
    """The product over its tokens, padding left out; a text's own weight stands at each of them."""
    policy, sampler, mask = texts_of_two()
    under_policy, under_sampler = (torch.where(mask, x, 0).sum(dim=1).exp() for x in (policy, sampler))
    assert under_policy.sum().item() == pytest.approx(1) and under_sampler.sum().item() == pytest.approx(1)
    weights = truncated_ratio(policy, sampler, mask, cap=INF, level="sequence")
    assert torch.equal(weights, weights[:, :1] * mask)
    f = normal(7, seed=3)
    torch.testing.assert_close((under_sampler * weights[:, 0] * f).sum(), (under_policy * f).sum())
    capped = truncated_ratio(policy, sampler, mask, cap=1.1, level="sequence")[:, 0]
    torch.testing.assert_close(capped, (under_policy / under_sampler).clamp(max=1.1))
    kept = masked_ratio(policy, sampler, mask, cap=3.0, level="sequence")[:, 0]
    inside = (under_policy < 3 * under_sampler) & (under_sampler < 3 * under_policy)
    assert 0 < inside.sum() < 7
    torch.testing.assert_close(kept, torch.where(inside, under_policy / under_sampler, 0))
    tokens = truncated_ratio(policy, sampler, mask, cap=INF)
    torch.testing.assert_close(tokens[1:], (policy - sampler).exp()[1:])
    assert tokens[0, 1] == 0


def test_a_weight_of_neither_tokens_nor_texts_is_refused():
    with pytest.raises(ValueError, match="level must be token or sequence; got 'word'"):
        masked_ratio(torch.zeros(2), torch.zeros(2), cap=2.0, level="word")


@pytest.mark.parametrize("cap", [0.0, 0.99, NAN])
def test_a_cap_that_takes_from_every_token_is_refused(cap):
    with pytest.raises(ValueError, match=f"cap must be a number >= 1; got {cap}"):
        truncated_ratio(torch.zeros(2), torch.zeros(2), cap=cap)
