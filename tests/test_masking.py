"""Masked statistics, held against Python's statistics module, hand computation and closed-form gradients."""

import math
import statistics

import pytest
import torch

from rlhf_lessons.masking import check_same_shape, masked_mean, masked_var, masked_whiten, position_ids, real_steps

NAN, INF = math.nan, math.inf
STATISTICS = [masked_mean, masked_var, masked_whiten, lambda x, mask: masked_whiten(x, mask, shift_mean=False)]


def ragged(garbage=99.0, dtype=torch.float64):
    """Real values 1, 2, 3 (first row) and 6 (second row): mean 3, biased variance 3.5."""
    x = torch.tensor([[1, 2, 3, garbage], [6, garbage, garbage, garbage]], dtype=dtype)
    return x, torch.tensor([[True, True, True, False], [True, False, False, False]])


def test_mean_and_variance_by_hand():
    x, mask = ragged()
    assert masked_mean(x, mask) == 3.0
    assert masked_var(x, mask) == 3.5


def test_mean_weighs_tokens_and_not_rows():
    x, mask = ragged()
    mean_of_row_means = (2.0 + 6.0) / 2
    assert masked_mean(x, mask) != mean_of_row_means
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # rows of equal length: the two agree
    assert masked_mean(x) == x.mean(dim=1).mean()


def test_variance_is_biased():
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert masked_var(x).item() == pytest.approx(statistics.pvariance(x.flatten().tolist()), rel=1e-12)
    assert masked_var(torch.tensor([[4.0]])) == 0  # Bessel's correction would give NaN


@pytest.mark.equation("7.5")
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_of_each_real_value(shift_mean):
    x, mask = ragged()
    values = [1.0, 2.0, 3.0, 6.0]
    mean, std = statistics.fmean(values), math.sqrt(statistics.pvariance(values))
    expected = [(v - mean) / std + (0 if shift_mean else mean) for v in values]
    white = masked_whiten(x, mask, shift_mean=shift_mean)
    torch.testing.assert_close(white[mask], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (white[~mask] == 0).all()


@pytest.mark.equation("7.5")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-8)])
def test_whitened_mean_and_variance(dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    x = 5 + 3 * torch.randn(6, 9, dtype=dtype, generator=generator)
    mask = torch.arange(9) < torch.randint(1, 10, (6, 1), generator=generator)
    for shift_mean, mean in ((True, 0.0), (False, x[mask].mean().item())):
        white = masked_whiten(x, mask, shift_mean=shift_mean)[mask]
        assert white.dtype == dtype
        assert white.mean().item() == pytest.approx(mean, abs=10 * tolerance)
        assert white.var(correction=0).item() == pytest.approx(1, abs=tolerance)


def test_whitening_ignores_scale_and_shift_and_keeps_order():
    x, mask = ragged()
    torch.testing.assert_close(masked_whiten(7 * x - 20, mask), masked_whiten(x, mask), rtol=1e-8, atol=1e-8)
    assert (masked_whiten(x, mask)[0, :3].diff() > 0).all()


@pytest.mark.parametrize("size", [2.0**-40, 1.0, 2.0**40])
def test_epsilon_is_under_the_root_and_relative_to_the_size_of_what_is_whitened(size):
    spread = 16 * torch.finfo(torch.float64).eps  # a deviation as large as √(ε·mean x²)
    x = size * torch.tensor([[1 - spread, 1 + spread]], dtype=torch.float64)
    assert masked_whiten(x)[0, 1].item() == pytest.approx(math.sqrt(0.5), rel=1e-9)


@pytest.mark.parametrize("shape", [(8, 24), (128, 24), (500, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1, 100.1, 1000.1, 12345.678, -6e4])
def test_equal_values_whiten_to_zero_whatever_their_size(value, dtype, shape):
    """Where the mean is rounded, what is left over is noise, which is not to be divided by itself."""
    x = torch.full(shape, value, dtype=dtype)
    assert masked_whiten(x).abs().max() < 1e-6
    assert masked_var(x) <= (1e-7 * value) ** 2
    torch.testing.assert_close(masked_whiten(x, shift_mean=False), x.float() if x.dtype.itemsize == 2 else x)


@pytest.mark.parametrize("value", [0.1, 1000.1])
def test_values_that_differ_by_rounding_alone_are_not_blown_up(value):
    x = torch.tensor([value, value, value * (1 + 1.2e-7)])  # the third is the next number that float32 has
    assert x[2] > x[0]
    assert masked_whiten(x).abs().max() < 0.1


def test_constant_batch_whitens_to_zero_or_stays():
    x = torch.full((2, 3), 4.0)
    assert masked_whiten(x).tolist() == torch.zeros(2, 3).tolist()
    assert masked_whiten(x, shift_mean=False).tolist() == x.tolist()
    one = torch.tensor([[True, False, False]])
    assert masked_whiten(torch.tensor([[4.0, NAN, 1.0]]), one).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_what_stands_under_the_mask_changes_nothing(statistic, garbage):
    results = []
    for filler in (0.0, garbage):
        x, mask = ragged(filler)
        x.requires_grad_()
        out = statistic(x, mask)
        # A plain sum of white values is always 0, and so is its gradient.
        weights = torch.arange(1, out.numel() + 1, dtype=out.dtype).reshape(out.shape)
        (out * weights).sum().backward()
        results.append((out.detach(), x.grad))
    (out, grad), (dirty_out, dirty_grad) = results
    assert torch.equal(out, dirty_out)
    assert torch.equal(grad, dirty_grad)
    assert (dirty_grad[~mask] == 0).all() and dirty_grad[mask].any()


def test_gradients_in_closed_form():
    x, mask = ragged()
    x.requires_grad_()
    (mean_grad,) = torch.autograd.grad(masked_mean(x, mask), x)
    assert torch.equal(mean_grad, mask.double() / 4)
    (var_grad,) = torch.autograd.grad(masked_var(x, mask), x)
    torch.testing.assert_close(var_grad, torch.where(mask, 2 * (x.detach() - 3) / 4, 0.0))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_gradients_against_finite_differences(statistic):
    x, mask = ragged(garbage=0.5)
    assert torch.autograd.gradcheck(lambda x: statistic(x, mask), x.requires_grad_())


@pytest.mark.parametrize("statistic", STATISTICS)
def test_no_mask_is_a_mask_of_ones(statistic):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(statistic(x, None), statistic(x, torch.ones(3, 4, dtype=torch.bool)))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_bad_masks(statistic):
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"mask must have the shape of x, \(3, 2\); got \(2, 3\)"):
        statistic(x, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be a bool tensor; got torch.float32"):
        statistic(x, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"real step \(True\) in every row; got none in row 1"):
        statistic(x, torch.tensor([[True, False], [False, False], [False, False]]))


def test_real_steps_returns_the_mask():
    x, mask = ragged()
    assert real_steps(x, mask) is mask
    assert real_steps(x, None).dtype == torch.bool and real_steps(x, None).all()


def test_check_same_shape():
    a, b = torch.zeros(2, 3), torch.zeros(3, 2)
    check_same_shape(a=a, absent=None, same=a)
    check_same_shape(absent=None, b=b)
    with pytest.raises(ValueError, match=r"b must have the shape of a, \(2, 3\); got \(3, 2\)"):
        check_same_shape(a=a, absent=None, b=b)
    with pytest.raises(ValueError, match="c must have the shape of a"):
        check_same_shape(a=a, b=a, c=b)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_position_ids_by_hand(dtype):
    attention_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).to(dtype)
    positions = position_ids(attention_mask)
    assert positions.dtype == torch.long
    assert positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 1, 1, 1]]
