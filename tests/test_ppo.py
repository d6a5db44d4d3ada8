"""PPO's losses and diagnostics, held against Python loops and against a table of what each gradient must be."""

import math
import statistics

import pytest
import torch

from rlhf_lessons.policy_gradient import policy_gradient_loss
from rlhf_lessons.ppo import (
    aggregate,
    check_clip,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    policy_terms,
    ppo_loss,
)

NAN, INF = math.nan, math.inf
F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def prefix_mask(lengths, steps):
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


def one(value):
    return torch.tensor([[value]], dtype=F64)


# --- the policy's loss -------------------------------------------------------------------------


@pytest.mark.equation("7.1")
@pytest.mark.parametrize(
    "ratio, advantage, objective, gradient_flows",
    [
        # Â > 0: more of the action is wanted.
        (0.5, 2.0, 0.5 * 2, True),
        (1.1, 2.0, 1.1 * 2, True),
        (1.5, 2.0, 1.2 * 2, False),  # already much more of it
        # Â < 0: less of the action is wanted.
        (0.5, -2.0, 0.8 * -2, False),  # already much less of it
        (0.9, -2.0, 0.9 * -2, True),
        (1.5, -2.0, 1.5 * -2, True),
    ],
)
def test_the_six_regions(ratio, advantage, objective, gradient_flows):
    log_probs = one(math.log(ratio)).requires_grad_()
    loss = clipped_policy_loss(log_probs, one(0.0), one(advantage), clip_eps=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-objective)
    assert log_probs.grad.item() == pytest.approx(-ratio * advantage if gradient_flows else 0.0)


LARGE = torch.finfo(torch.float32).max ** 0.49


@pytest.mark.parametrize("log_ratio", [80.0, 89.0, 1e3, 1e30, INF])
@pytest.mark.parametrize(
    ("advantage", "expected"), [(1.0, 0.0), (1e-30, 0.0), (0.0, 0.0), (-0.0, 0.0), (-1.0, LARGE / 2)]
)
def test_a_ratio_that_would_overflow(log_ratio, advantage, expected):
    """No gradient where the clip or a zero takes it away; where it pulls back, a large one that is finite."""
    log_probs = torch.tensor([[0.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-log_ratio, -1.0]])
    loss = clipped_policy_loss(log_probs, old, torch.tensor([[advantage, 1.0]]), clip_eps=0.2)
    loss.backward()
    assert loss.isfinite() and log_probs.grad[0, 1] == -0.5
    if expected == 0 or log_ratio < INF:
        assert log_probs.grad[0, 0].item() == pytest.approx(expected, rel=1e-4)


def test_a_ratio_that_underflows_leaves_no_nan():
    log_probs = torch.tensor([[-200.0, -INF]], requires_grad=True)
    clipped_policy_loss(log_probs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), clip_eps=0.2).backward()
    assert log_probs.grad.tolist() == [[0, 0]]


@pytest.mark.equation("7.1")
def test_policy_loss_against_the_loop():
    log_probs, old, advantages = (normal(3, 5, seed=seed) for seed in range(3))
    lengths = [5, 2, 4]
    terms = []
    for b, length in enumerate(lengths):
        for t in range(length):
            ratio, advantage = math.exp(log_probs[b, t] - old[b, t]), advantages[b, t].item()
            terms.append(-min(ratio * advantage, min(max(ratio, 0.7), 1.3) * advantage))
    loss = clipped_policy_loss(log_probs, old, advantages, prefix_mask(lengths, 5), clip_eps=0.3)
    assert loss.item() == pytest.approx(statistics.fmean(terms), rel=1e-12)


def test_at_the_old_policy_the_gradient_is_the_policy_gradient_per_token():
    log_probs, advantages, mask = normal(3, 4).requires_grad_(), normal(3, 4, seed=1), prefix_mask([4, 2, 1], 4)
    (clipped,) = torch.autograd.grad(
        clipped_policy_loss(log_probs, log_probs.detach(), advantages, mask, clip_eps=0.2), log_probs
    )
    (plain,) = torch.autograd.grad(policy_gradient_loss(log_probs, advantages, mask), log_probs)
    torch.testing.assert_close(clipped, plain * 3 / 7)  # a mean over 7 tokens, not over 3 episodes


def test_a_wide_clip_leaves_the_importance_weighted_objective():
    log_probs, old, advantages = (normal(3, 5, seed=seed) for seed in range(3))
    expected = -((log_probs - old).exp() * advantages).mean()
    torch.testing.assert_close(clipped_policy_loss(log_probs, old, advantages, clip_eps=INF), expected)
    assert clipped_policy_loss(log_probs, old, advantages, clip_eps=0.1) > expected  # the bound is pessimistic


def test_policy_terms_by_hand():
    unclipped, clipped = policy_terms(one(math.log(2)), one(0.0), one(3.0), 0.25)
    assert (unclipped.item(), clipped.item()) == (pytest.approx(-6), pytest.approx(-3.75))


def test_policy_loss_against_finite_differences():
    old, advantages, mask = normal(2, 4), normal(2, 4, seed=1), prefix_mask([4, 3], 4)
    log_probs = (old + normal(2, 4, seed=2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(x, old, advantages, mask, clip_eps=0.2), log_probs)


def test_no_gradient_into_what_was_recorded():
    new, old, third = (normal(2, 3, seed=seed).requires_grad_() for seed in range(3))
    clipped_policy_loss(new, old, third, clip_eps=0.2).backward()
    assert new.grad.any() and old.grad is None and third.grad is None
    new.grad = None
    clipped_value_loss(new, old, third, clip_eps=0.2).backward()
    assert new.grad.any() and old.grad is None and third.grad is None


@pytest.mark.parametrize("loss_function", [clipped_policy_loss, clipped_value_loss])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e5])
def test_losses_ignore_what_stands_under_the_mask(loss_function, garbage):
    mask, results = prefix_mask([4, 1, 2], 4), []
    for filler in (0.0, garbage):
        inputs = [torch.where(mask, normal(3, 4, seed=seed), filler * (-1) ** seed) for seed in range(3)]
        inputs[0].requires_grad_()
        loss = loss_function(*inputs, mask, clip_eps=0.2)
        loss.backward()
        results.append((loss.detach(), inputs[0].grad))
    (loss, grad), (dirty_loss, dirty_grad) = results
    assert torch.equal(loss, dirty_loss) and torch.equal(grad, dirty_grad)
    assert (grad[~mask] == 0).all() and grad[mask].any()


@pytest.mark.parametrize("loss_function", [clipped_policy_loss, clipped_value_loss])
def test_micro_batches_weighted_by_their_tokens_make_the_batch(loss_function):
    inputs, lengths = [normal(4, 5, seed=seed) for seed in range(3)], [5, 1, 2, 4]
    mask = prefix_mask(lengths, 5)
    whole = loss_function(*inputs, mask, clip_eps=0.2)
    halves = [loss_function(*(x[rows] for x in inputs), mask[rows], clip_eps=0.2) for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(whole, (6 * halves[0] + 6 * halves[1]) / 12)
    uneven = [loss_function(*(x[rows] for x in inputs), mask[rows], clip_eps=0.2) for rows in ([0], [1, 2, 3])]
    torch.testing.assert_close(whole, (5 * uneven[0] + 7 * uneven[1]) / 12)


# --- the critic's loss -------------------------------------------------------------------------


@pytest.mark.equation("7.3")
@pytest.mark.parametrize(
    "value, target, expected, gradient_flows",
    [
        # The old value is 1, the clip 0.5: the clipped value is 1.5, 1.25 or 0.5.
        (3.0, 5.0, (1.5 - 5) ** 2, False),  # further towards the target than allowed
        (3.0, 0.0, 3.0**2, True),  # moved the wrong way
        (3.0, 2.0, 1.0, True),  # overshot: further from the target than the clipped value
        (1.25, 5.0, (1.25 - 5) ** 2, True),
        (1.25, 0.0, 1.25**2, True),
        (-2.0, -6.0, (0.5 + 6) ** 2, False),
        (-2.0, 4.0, 6.0**2, True),
    ],
)
def test_the_regions_of_the_value_clip(value, target, expected, gradient_flows):
    values = one(value).requires_grad_()
    loss = clipped_value_loss(values, one(1.0), one(target), clip_eps=0.5)
    loss.backward()
    assert loss.item() == 0.5 * expected
    assert values.grad.item() == (value - target if gradient_flows else 0.0)


@pytest.mark.equation("7.3")
def test_value_loss_against_the_loop():
    values, old, returns = (normal(3, 5, seed=seed) for seed in range(3))
    lengths = [1, 5, 3]
    terms = []
    for b, length in enumerate(lengths):
        for t in range(length):
            v, v_old, target = (x[b, t].item() for x in (values, old, returns))
            clipped = min(max(v, v_old - 0.2), v_old + 0.2)
            terms.append(max((v - target) ** 2, (clipped - target) ** 2) / 2)
    loss = clipped_value_loss(values, old, returns, prefix_mask(lengths, 5), clip_eps=0.2)
    assert loss.item() == pytest.approx(statistics.fmean(terms), rel=1e-12)


def test_an_infinite_clip_leaves_half_the_squared_error():
    values, old, returns = (normal(3, 5, seed=seed) for seed in range(3))
    expected = torch.nn.functional.mse_loss(values, returns) / 2
    torch.testing.assert_close(clipped_value_loss(values, old, returns, clip_eps=INF), expected)


def test_value_loss_against_finite_differences():
    values, old, returns = normal(2, 4).requires_grad_(), normal(2, 4, seed=1), normal(2, 4, seed=2)
    mask = prefix_mask([4, 3], 4)
    assert torch.autograd.gradcheck(lambda x: clipped_value_loss(x, old, returns, mask, clip_eps=0.2), values)


# --- the whole loss ----------------------------------------------------------------------------


@pytest.mark.equation("7.7")
def test_entropy_is_rewarded_and_errors_are_not():
    parts = [torch.tensor(value, requires_grad=True) for value in (1.0, 10.0, 100.0)]
    loss = ppo_loss(*parts, vf_coef=0.5, ent_coef=0.01)
    assert loss.item() == pytest.approx(1 + 5 - 1)
    loss.backward()
    assert [part.grad.item() for part in parts] == pytest.approx([1.0, 0.5, -0.01])


# --- diagnostics -------------------------------------------------------------------------------


@pytest.mark.equation("7.2")
def test_the_two_clip_fractions_differ():
    ratio = torch.tensor([[0.5, 0.5, 1.1, 1.5, 1.5, 9.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0, NAN]])
    mask = prefix_mask([5], 6)
    assert clip_fraction(ratio, mask, clip_eps=0.2).item() == pytest.approx(4 / 5)
    # Of those four only two have lost their gradient.
    assert clip_fraction(ratio, mask, clip_eps=0.2, advantages=advantages).item() == pytest.approx(2 / 5)
    assert clip_fraction(ratio, clip_eps=0.6).item() == pytest.approx(1 / 6)
    assert clip_fraction(torch.ones(2, 3), clip_eps=0.2).item() == 0


@pytest.mark.equation("7.2")
def test_clip_fraction_with_advantages_counts_the_tokens_without_a_gradient():
    old, advantages, mask = normal(4, 9), normal(4, 9, seed=1), prefix_mask([9, 3, 1, 6], 9)
    log_probs = (old + 0.4 * normal(4, 9, seed=2)).requires_grad_()
    clipped_policy_loss(log_probs, old, advantages, mask, clip_eps=0.2).backward()
    silent = (log_probs.grad[mask] == 0).double().mean()
    ratio = (log_probs - old).exp().detach()
    torch.testing.assert_close(clip_fraction(ratio, mask, clip_eps=0.2, advantages=advantages), silent)
    assert 0 < silent < clip_fraction(ratio, mask, clip_eps=0.2) < 1


@pytest.mark.equation("7.4")
def test_explained_variance_by_hand():
    returns = torch.tensor([[1.0, 2.0, 3.0]], dtype=F64)
    assert explained_variance(returns, returns).item() == 1
    assert explained_variance(returns + 5, returns).item() == pytest.approx(1)  # an offset explains no less
    assert explained_variance(torch.full((1, 3), 7.0, dtype=F64), returns).item() == pytest.approx(0, abs=1e-7)
    assert explained_variance(-returns, returns).item() == pytest.approx(1 - 4)
    off_by_one_at_the_end = torch.tensor([[1.0, 2.0, 4.0]], dtype=F64)
    assert explained_variance(off_by_one_at_the_end, returns).item() == pytest.approx(1 - (2 / 9) / (2 / 3))


@pytest.mark.equation("7.4")
def test_explained_variance_against_the_statistics_module():
    values, returns, mask = normal(3, 5), normal(3, 5, seed=1) + 2, prefix_mask([5, 1, 3], 5)
    errors = (returns - values)[mask].tolist()
    expected = 1 - statistics.pvariance(errors) / statistics.pvariance(returns[mask].tolist())
    assert explained_variance(values, returns, mask).item() == pytest.approx(expected, rel=1e-6)


def test_explained_variance_of_the_best_line_is_the_squared_correlation():
    values, returns = normal(40), normal(40, seed=1) + normal(40)
    correlation = torch.corrcoef(torch.stack([values, returns]))[0, 1]
    slope = correlation * returns.std() / values.std()
    assert explained_variance(slope * values, returns).item() == pytest.approx(correlation.item() ** 2, rel=1e-6)


@pytest.mark.parametrize("garbage", [NAN, INF, 1e30])
def test_diagnostics_ignore_what_stands_under_the_mask(garbage):
    mask = prefix_mask([4, 1, 2], 4)
    clean, dirty = (
        [torch.where(mask, normal(3, 4, seed=seed).exp(), filler) for seed in range(2)] for filler in (0.0, garbage)
    )
    for measure in (
        lambda a, b: clip_fraction(a, mask, clip_eps=0.2),
        lambda a, b: clip_fraction(a, mask, clip_eps=0.2, advantages=b - 1),
        lambda a, b: explained_variance(a, b, mask),
    ):
        assert torch.equal(measure(*clean), measure(*dirty))


@pytest.mark.parametrize("size", [0.0, 3.0, 1000.1])
def test_where_returns_do_not_vary_there_is_nothing_to_explain(size):
    returns = torch.full((20, 24), size)
    assert explained_variance(torch.randn(20, 24), returns).item() == 0
    returns[0, 0] = returns[0, 0].nextafter(torch.tensor(torch.inf))
    assert explained_variance(torch.ones(20, 24), returns).item() == 0
    assert explained_variance(torch.ones(2), torch.tensor([1.0, math.nan])).isnan()


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_eps", [0.0, -0.2, NAN])
def test_clip_eps_must_be_positive(clip_eps):
    x = torch.ones(1, 2)
    for call in (
        lambda: check_clip(clip_eps),
        lambda: clipped_policy_loss(x, x, x, clip_eps=clip_eps),
        lambda: clipped_value_loss(x, x, x, clip_eps=clip_eps),
        lambda: clip_fraction(x, clip_eps=clip_eps),
    ):
        with pytest.raises(ValueError, match=f"clip_eps must be positive; got {clip_eps}"):
            call()


@pytest.mark.parametrize(
    "call, names",
    [
        (lambda *x: clipped_policy_loss(*x, clip_eps=0.2), ["log_probs", "old_log_probs", "advantages"]),
        (lambda *x: clipped_value_loss(*x, clip_eps=0.2), ["values", "old_values", "returns"]),
        (lambda r, a: clip_fraction(r, clip_eps=0.2, advantages=a), ["ratio", "advantages"]),
        (explained_variance, ["values", "returns"]),
    ],
)
def test_shapes_must_agree(call, names):
    for position in range(1, len(names)):
        inputs = [torch.zeros(2, 3)] * len(names)
        inputs[position] = torch.zeros(3, 2)
        message = rf"{names[position]} must have the shape of {names[0]}, \(2, 3\); got \(3, 2\)"
        with pytest.raises(ValueError, match=message):
            call(*inputs)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_has_no_mean(shape):
    x = torch.ones(shape)
    for call in (clipped_policy_loss, clipped_value_loss):
        with pytest.raises(ValueError, match="x must hold at least one value; got shape"):
            call(x, x, x, clip_eps=0.2)


def test_masks_are_checked():
    x = torch.ones(2, 2)
    empty = prefix_mask([2, 0], 2)
    for call in (
        lambda mask: clipped_policy_loss(x, x, x, mask, clip_eps=0.2),
        lambda mask: clipped_value_loss(x, x, x, mask, clip_eps=0.2),
        lambda mask: clip_fraction(x, mask, clip_eps=0.2),
        lambda mask: explained_variance(x, x, mask),
    ):
        with pytest.raises(ValueError, match="mask must have a real step .*; got none in row 1"):
            call(empty)
        with pytest.raises(ValueError, match="mask must be a bool tensor; got torch.int64"):
            call(empty.long())


# --- beyond PPO: two ε, one ratio a text, other means -------------------------------------------


def test_three_means_by_hand():
    """Two texts, of one token and of three."""
    x, mask = torch.tensor([[6.0, NAN, NAN], [1.0, 2.0, 3.0]], dtype=F64), prefix_mask([1, 3], 3)
    assert aggregate(x, mask, over="tokens").item() == pytest.approx(12 / 4)
    assert aggregate(x, mask, over="sequences").item() == pytest.approx((6 + 2) / 2)
    assert aggregate(x, mask, over="constant", constant=4).item() == pytest.approx(12 / (2 * 4))


def test_means_agree_where_all_texts_are_of_one_length():
    x, mask = normal(3, 5), torch.ones(3, 5, dtype=torch.bool)
    means = [aggregate(x, mask, over=over).item() for over in ("tokens", "sequences")]
    assert means == pytest.approx([aggregate(x, mask, over="constant", constant=5).item()] * 2)
    assert aggregate(x, over="sequences").item() == pytest.approx(x.mean().item())


@pytest.mark.parametrize("over, constant", [("tokens", None), ("sequences", None), ("constant", 7.0)])
def test_what_stands_at_padding_reaches_no_mean_and_no_gradient(over, constant):
    x, mask = normal(3, 4), prefix_mask([1, 4, 2], 4)
    clean = aggregate(torch.where(mask, x, 0), mask, over=over, constant=constant)
    x = torch.where(mask, x, NAN).requires_grad_()
    found = aggregate(x, mask, over=over, constant=constant)
    (grad,) = torch.autograd.grad(found, x)
    assert found.item() == clean.item() and not grad[~mask].any() and grad.isfinite().all()


def test_means_that_are_no_means_are_refused():
    x = normal(2, 3)
    with pytest.raises(ValueError, match="over must be one of tokens, sequences, constant; got 'rows'"):
        aggregate(x, over="rows")
    for constant in (None, 0, -1.0, NAN):
        with pytest.raises(ValueError, match=f'constant must be a number > 0 where over is "constant"; got {constant}'):
            aggregate(x, over="constant", constant=constant)


def test_the_clip_may_be_wider_above():
    """ε = 0.2 down and 0.5 up: 1.4 is inside, 1.6 is not, 0.7 is not."""
    slopes = []
    for ratio, advantage in ((1.4, 1.0), (1.6, 1.0), (0.7, -1.0), (0.9, -1.0)):
        log_probs = one(math.log(ratio)).requires_grad_()
        clipped_policy_loss(log_probs, one(0.0), one(advantage), clip_eps=(0.2, 0.5)).backward()
        slopes.append(bool(log_probs.grad.any()))
    assert slopes == [True, False, False, True]
    ratio, advantages = torch.tensor([[1.4, 1.6, 0.7, 0.9]]), torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    assert clip_fraction(ratio, clip_eps=(0.2, 0.5), advantages=advantages).item() == 0.5
    assert clip_fraction(ratio, clip_eps=(0.2, 0.5)).item() == 0.5
    for wrong in ((0.2, 0.0), (-0.1, 0.2)):
        with pytest.raises(ValueError, match="clip_eps must be positive; got"):
            clipped_policy_loss(one(0.0), one(0.0), one(1.0), clip_eps=wrong)


def test_one_ratio_a_text_by_hand():
    """Ratios 2 and 8 have the geometric mean 4; the second text, of one token, its own 1/2."""
    log_probs = torch.tensor([[2.0, 8.0], [0.5, 9.0]], dtype=F64).log().requires_grad_()
    mask, advantages = prefix_mask([2, 1], 2), torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], dtype=F64)
    old = torch.zeros(2, 2, dtype=F64)
    loss = clipped_policy_loss(log_probs, old, advantages, mask, clip_eps=0.6, level="sequence", over="sequences")
    assert loss.item() == pytest.approx((4 + 0.5) / 2)
    (grad,) = torch.autograd.grad(loss, log_probs)
    expected = torch.tensor([[4 / 2 / 2, 4 / 2 / 2], [0.5 / 2, 0.0]], dtype=F64)
    torch.testing.assert_close(grad, expected)
    with pytest.raises(ValueError, match="level must be token or sequence; got 'text'"):
        clipped_policy_loss(log_probs, old, advantages, mask, clip_eps=0.2, level="text")
