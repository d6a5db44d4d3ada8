"""Divergences, shaped rewards and controllers, held against sums over a whole vocabulary and sequences by hand."""

import math

import pytest
import torch

from rlhf_lessons.kl import AdaptiveKL, FixedKL, exact_kl, sampled_kl, shaped_rewards

NAN, INF = math.nan, math.inf
F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def prefix_mask(lengths, steps):
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


# --- exact -------------------------------------------------------------------------------------


@pytest.mark.equation("8.1")
def test_exact_kl_by_hand_and_its_direction():
    even, skewed = torch.tensor([0.5, 0.5], dtype=F64).log(), torch.tensor([0.75, 0.25], dtype=F64).log()
    assert exact_kl(even, skewed).item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert exact_kl(skewed, even).item() == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert exact_kl(even, even).item() == 0


@pytest.mark.equation("8.1")
def test_exact_kl_against_python():
    logits, ref_logits = 3 * normal(2, 3, 5), 3 * normal(2, 3, 5, seed=1)
    kl = exact_kl(logits, ref_logits)
    assert kl.shape == (2, 3) and (kl > 0).all()
    for b in range(2):
        for t in range(3):
            p, q = ([math.exp(z) for z in x[b, t].tolist()] for x in (logits, ref_logits))
            p, q = [w / sum(p) for w in p], [w / sum(q) for w in q]
            expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert kl[b, t].item() == pytest.approx(expected, rel=1e-10)


def test_exact_kl_ignores_a_shift_of_the_logits():
    logits, ref_logits = normal(4, 6), normal(4, 6, seed=1)
    torch.testing.assert_close(exact_kl(logits + 50, ref_logits - 50), exact_kl(logits, ref_logits))


def test_gradient_of_the_exact_kl():
    """∂KL/∂z_v = p_v (log(p_v/q_v) − KL)   and   ∂KL/∂z_ref,v = q_v − p_v."""
    logits, ref_logits = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    kl = exact_kl(logits, ref_logits)
    grad, ref_grad = torch.autograd.grad(kl.sum(), (logits, ref_logits))
    p, q = logits.detach().softmax(-1), ref_logits.detach().softmax(-1)
    torch.testing.assert_close(grad, p * ((p / q).log() - kl.detach()[:, None]))
    torch.testing.assert_close(ref_grad, q - p)


def test_tokens_that_the_policy_cannot_pick_cost_nothing():
    logits = torch.tensor([0.3, 1.2, -INF, -INF], dtype=F64, requires_grad=True)
    ref_logits = torch.tensor([1.0, 0.0, 2.0, -INF], dtype=F64)
    kl = exact_kl(logits, ref_logits)
    (grad,) = torch.autograd.grad(kl, logits)
    p, q = logits.detach().softmax(-1)[:2], ref_logits.softmax(-1)[:2]
    torch.testing.assert_close(kl.detach(), (p * (p / q).log()).sum())
    torch.testing.assert_close(grad[:2], p * ((p / q).log() - kl.detach()))
    assert grad[2:].tolist() == [0, 0]


def test_a_token_that_the_reference_cannot_pick_costs_everything():
    assert exact_kl(torch.zeros(2), torch.tensor([0.0, -INF])).item() == INF


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(half):
    logits, ref_logits = normal(3, 50).to(half), normal(3, 50, seed=1).to(half)
    kl = exact_kl(logits, ref_logits)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), exact_kl(logits.double(), ref_logits.double()), rtol=1e-4, atol=1e-6)


# --- sampled -----------------------------------------------------------------------------------


@pytest.mark.equation("8.2")
def test_sampled_kl_by_hand():
    log_probs, ref_log_probs = torch.tensor([math.log(0.5)], dtype=F64), torch.tensor([math.log(0.25)], dtype=F64)
    d = math.log(2)  # the policy likes the token twice as much
    assert sampled_kl(log_probs, ref_log_probs, kind="k1").item() == pytest.approx(d)
    assert sampled_kl(log_probs, ref_log_probs, kind="k2").item() == pytest.approx(d * d / 2)
    assert sampled_kl(log_probs, ref_log_probs, kind="k3").item() == pytest.approx(0.5 - 1 + d)
    assert sampled_kl(ref_log_probs, log_probs, kind="k1").item() == pytest.approx(-d)
    assert sampled_kl(ref_log_probs, log_probs, kind="k3").item() == pytest.approx(2 - 1 - d)


@pytest.mark.equation("8.2")
def test_expectations_over_the_policys_tokens():
    log_p, log_q = normal(6).log_softmax(0), normal(6, seed=1).log_softmax(0)
    exact = exact_kl(log_p, log_q)
    mean = {kind: (log_p.exp() * sampled_kl(log_p, log_q, kind=kind)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(mean["k1"], exact)
    torch.testing.assert_close(mean["k3"], exact)
    assert abs(mean["k2"] - exact) > 0.01 * exact
    # For a policy that hardly moved k2 is right to first order.
    near = (log_p + 1e-3 * normal(6, seed=2)).log_softmax(0)
    k2 = (near.exp() * sampled_kl(near, log_p, kind="k2")).sum()
    torch.testing.assert_close(k2, exact_kl(near, log_p), rtol=5e-3, atol=0)


def test_signs():
    log_p, log_q = normal(50).log_softmax(0), normal(50, seed=1).log_softmax(0)
    assert (sampled_kl(log_p, log_q, kind="k1") < 0).any()
    assert (sampled_kl(log_p, log_q, kind="k2") >= 0).all()
    assert (sampled_kl(log_p, log_q, kind="k3") >= 0).all()


@pytest.mark.equation("8.2")
def test_expected_gradients_as_losses():
    """Tokens drawn from the policy, then held fixed: nothing, ∇KL(π‖π_ref) and ∇KL(π_ref‖π)."""
    logits, ref_logits = normal(5).requires_grad_(), normal(5, seed=1)
    log_p, log_q = logits.log_softmax(0), ref_logits.log_softmax(0)

    def expected_gradient(kind):
        loss = (log_p.detach().exp() * sampled_kl(log_p, log_q, kind=kind)).sum()
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    (forward,) = torch.autograd.grad(exact_kl(logits, ref_logits), logits)
    (reverse,) = torch.autograd.grad(exact_kl(ref_logits, logits), logits)
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(5, dtype=F64))
    torch.testing.assert_close(expected_gradient("k2"), forward)
    torch.testing.assert_close(expected_gradient("k3"), reverse)


def test_k3_keeps_its_digits_near_zero():
    d = torch.tensor([1e-3, -1e-3])  # exp(−d) − 1 would leave 5e-7 among rounding errors of 6e-8
    torch.testing.assert_close(sampled_kl(d, torch.zeros(2), kind="k3"), d.square() / 2, rtol=2e-3, atol=0)


def test_k3_that_would_overflow_keeps_a_finite_gradient_and_none_where_nothing_is_asked():
    log_probs = torch.tensor([-200.0, -300.0, -1e30], requires_grad=True)
    k3 = sampled_kl(log_probs, torch.tensor([-1.0, -1.0, -1.0]), kind="k3")
    (k3 * torch.tensor([1.0, 0.0, 1.0])).sum().backward()
    large = torch.finfo(torch.float32).max ** 0.49
    assert k3.isfinite().all() and k3[0].item() == pytest.approx(large, rel=1e-4)
    assert log_probs.grad.tolist() == [pytest.approx(-large, rel=1e-4), 0, pytest.approx(-large, rel=1e-4)]


def test_sampled_kl_rejects_bad_input():
    with pytest.raises(ValueError, match='kind must be "k1", "k2" or "k3"; got \'k4\''):
        sampled_kl(torch.zeros(2), torch.zeros(2), kind="k4")
    with pytest.raises(ValueError, match=r"ref_log_probs must have the shape of log_probs, \(2,\); got \(3,\)"):
        sampled_kl(torch.zeros(2), torch.zeros(3), kind="k1")
    with pytest.raises(ValueError, match=r"ref_logits must have the shape of logits, \(2, 3\); got \(3,\)"):
        exact_kl(torch.zeros(2, 3), torch.zeros(3))


# --- shaped rewards ----------------------------------------------------------------------------


@pytest.mark.equation("8.3")
def test_shaped_rewards_by_hand():
    kl = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, NAN], [6.0, INF, NAN]])
    scores = torch.tensor([10.0, 20.0, 30.0])
    rewards = shaped_rewards(scores, kl, prefix_mask([3, 2, 1], 3), kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 1, 10 - 1.5], [-2, 20 - 2.5, 0], [30 - 3, 0, 0]]


@pytest.mark.equation("8.3")
def test_shaped_rewards_sum_to_the_score_minus_the_toll():
    log_probs, ref_log_probs, scores = normal(4, 6), normal(4, 6, seed=1), normal(4, seed=2)
    lengths = [6, 3, 1, 5]
    kl = sampled_kl(log_probs, ref_log_probs, kind="k1")
    rewards = shaped_rewards(scores, kl, prefix_mask(lengths, 6), kl_coef=0.3)
    for row, length in enumerate(lengths):
        sequence_log_ratio = log_probs[row, :length].sum() - ref_log_probs[row, :length].sum()
        torch.testing.assert_close(rewards[row].sum(), scores[row] - 0.3 * sequence_log_ratio)


def test_without_a_toll_only_the_last_real_token_is_rewarded():
    rewards = shaped_rewards(torch.tensor([2.0, 3.0]), torch.ones(2, 4), prefix_mask([4, 2], 4), kl_coef=0.0)
    assert rewards.tolist() == [[0, 0, 0, 2], [0, 3, 0, 0]]
    # A response may also start after padding, or have a gap.
    mask = torch.tensor([[False, True, True, False], [True, False, True, False]])
    rewards = shaped_rewards(torch.tensor([2.0, 3.0]), torch.ones(2, 4), mask, kl_coef=1.0)
    assert rewards.tolist() == [[0, -1, 1, 0], [-1, 0, 2, 0]]


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_gradient_of_the_shaped_rewards(garbage):
    kl = torch.tensor([[1.0, 2.0, garbage]], requires_grad=True)
    scores = torch.tensor([5.0], requires_grad=True)
    shaped_rewards(scores, kl, prefix_mask([2], 3), kl_coef=0.25).sum().backward()
    assert kl.grad.tolist() == [[-0.25, -0.25, 0]]
    assert scores.grad.tolist() == [1]


def test_shaped_rewards_reject_bad_input():
    scores, kl, mask = torch.zeros(2), torch.zeros(2, 3), prefix_mask([3, 1], 3)
    for kl_coef in (-0.1, NAN):
        with pytest.raises(ValueError, match=f"kl_coef must not be negative; got {kl_coef}"):
            shaped_rewards(scores, kl, mask, kl_coef=kl_coef)
    for shape in ((3,), (2, 1), ()):
        with pytest.raises(ValueError, match=r"scores must be \(B,\) = \(2,\); got \("):
            shaped_rewards(torch.zeros(shape), kl, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match="mask must have the shape of x"):
        shaped_rewards(scores, kl, mask.T, kl_coef=0.1)
    with pytest.raises(ValueError, match="mask must have a real step .*; got none in row 0"):
        shaped_rewards(scores, kl, prefix_mask([0, 1], 3), kl_coef=0.1)


# --- controllers -------------------------------------------------------------------------------


@pytest.mark.equation("8.5")
def test_adaptive_coefficient_follows_a_fixed_sequence():
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    assert controller.coef == 0.15
    expected = 0.15
    for kl, n, factor in [
        (60.0, 1_000, 1 + 0.2 * 0.1),  # far above the target: the step is clipped
        (6.6, 1_000, 1 + 0.1 * 0.1),
        (6.0, 1_000, 1.0),
        (5.7, 2_000, 1 - 0.05 * 0.2),
        (0.0, 2_000, 1 - 0.2 * 0.2),  # far below
        (-3.0, 500, 1 - 0.2 * 0.05),  # a sampled KL may be negative
    ]:
        controller.update(kl, n)
        expected *= factor
        assert controller.coef == pytest.approx(expected, rel=1e-12)


@pytest.mark.equation("8.5")
def test_adaptive_coefficient_rests_at_the_target_and_moves_towards_it():
    controller = AdaptiveKL(0.2, target=3.0, horizon=100)
    for _ in range(50):
        controller.update(3.0, 64)
    assert controller.coef == 0.2
    # A world where KL = 0.5/β rests at β = 1/6.
    for _ in range(500):
        controller.update(0.5 / controller.coef, 64)
    assert controller.coef == pytest.approx(1 / 6, rel=1e-6)


@pytest.mark.equation("8.5")
@pytest.mark.parametrize("n", [50, 51, 10_000])
def test_adaptive_coefficient_refuses_batches_that_could_take_it_to_0(n):
    """At n = 5·horizon the largest step down is by all of it."""
    controller = AdaptiveKL(0.1, target=6.0, horizon=10)
    with pytest.raises(ValueError, match=f"n must be less than five times horizon = 10; got {n}"):
        controller.update(0.0, n)
    assert controller.coef == 0.1
    for _ in range(20):
        controller.update(0.0, 49)
    assert 0 < controller.coef < 1e-30


@pytest.mark.parametrize("kl", [NAN, INF, -INF])
def test_adaptive_coefficient_refuses_a_kl_that_is_not_finite(kl):
    controller = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    with pytest.raises(ValueError, match=f"kl must be finite; got {kl}"):
        controller.update(kl, 128)
    assert controller.coef == 0.1


@pytest.mark.parametrize("name", ["init", "target", "horizon"])
@pytest.mark.parametrize("bad", [0, -1, NAN])
def test_adaptive_coefficient_rejects_bad_settings(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be positive; got {bad}"):
        AdaptiveKL(**({"init": 0.1, "target": 6.0, "horizon": 100} | {name: bad}))


def test_fixed_coefficient_stays():
    controller = FixedKL(0.05)
    controller.update(1e6, 512)
    assert controller.coef == 0.05
    assert FixedKL(0.0).coef == 0
    for bad in (-0.1, NAN):
        with pytest.raises(ValueError, match=f"kl_coef must not be negative; got {bad}"):
            FixedKL(bad)
