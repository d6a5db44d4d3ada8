"""Log-probabilities, entropy, returns and the score-function loss, held against sums written out by hand."""

import itertools
import math

import pytest
import torch

from rlhf_lessons.policy_gradient import (
    action_log_probs,
    check_discount,
    discounted_return,
    discounted_sum,
    entropy,
    full_precision,
    next_is_real,
    policy_gradient_loss,
    reward_to_go,
)

NAN, INF = math.nan, math.inf
F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def prefix_mask(lengths, steps):
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


def softmax(row):
    """Python's own softmax, shifted so that nothing overflows."""
    weights = [math.exp(z - max(row)) for z in row]
    return [w / sum(weights) for w in weights]


# --- action_log_probs --------------------------------------------------------------------------


@pytest.mark.equation("1.1")
def test_action_log_probs_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [5.0, 5.0]]], dtype=F64)  # probabilities 1/4, 3/4; 1/2, 1/2
    log_probs = action_log_probs(logits, torch.tensor([[1, 0]]))
    torch.testing.assert_close(log_probs, torch.tensor([[math.log(0.75), math.log(0.5)]], dtype=F64))


@pytest.mark.equation("1.1")
def test_action_log_probs_against_python():
    logits, actions = normal(2, 3, 5) * 4, torch.randint(5, (2, 3), generator=seeded(1))
    log_probs = action_log_probs(logits, actions)
    for b, t in itertools.product(range(2), range(3)):
        expected = math.log(softmax(logits[b, t].tolist())[actions[b, t]])
        assert log_probs[b, t].item() == pytest.approx(expected, rel=1e-12)


def test_action_probabilities_sum_to_one_and_ignore_a_shift():
    logits = normal(4, 6)
    every_action = torch.stack([action_log_probs(logits, torch.full((4,), a)) for a in range(6)], dim=-1)
    torch.testing.assert_close(every_action.exp().sum(-1), torch.ones(4, dtype=F64))
    shifted = action_log_probs(logits + 100, torch.full((4,), 2))
    torch.testing.assert_close(shifted, every_action[:, 2])


def test_gradient_of_a_log_probability_is_onehot_minus_softmax():
    logits, actions = normal(3, 4).requires_grad_(), torch.tensor([0, 3, 1])
    (grad,) = torch.autograd.grad(action_log_probs(logits, actions).sum(), logits)
    torch.testing.assert_close(grad, torch.eye(4, dtype=F64)[actions] - logits.detach().softmax(-1))


def test_forbidden_and_extreme_logits():
    logits = torch.tensor([[1e4, 0.0, -INF]], requires_grad=True)
    log_prob = action_log_probs(logits, torch.tensor([1]))
    assert log_prob.item() == -1e4
    log_prob.sum().backward()
    assert logits.grad.tolist() == [[-1.0, 1.0, 0.0]]
    assert action_log_probs(logits, torch.tensor([2])).item() == -INF


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(half):
    logits = (normal(2, 3, 50) * 3).to(half)
    actions = torch.randint(50, (2, 3), generator=seeded(2))
    for f in (lambda z: action_log_probs(z, actions), entropy):
        assert f(logits).dtype == torch.float32
        torch.testing.assert_close(f(logits).double(), f(logits.double()), rtol=1e-5, atol=1e-5)
    assert full_precision(logits).dtype == torch.float32
    assert full_precision(logits.double()).dtype == F64


def test_action_log_probs_rejects_other_shapes():
    with pytest.raises(ValueError, match=r"actions must have the shape .* \(2, 3\); got \(3, 2\)"):
        action_log_probs(torch.zeros(2, 3, 4), torch.zeros(3, 2, dtype=torch.long))


# --- entropy -----------------------------------------------------------------------------------


@pytest.mark.equation("7.6")
def test_entropy_by_hand():
    assert entropy(torch.zeros(7, dtype=F64)).item() == pytest.approx(math.log(7))
    assert entropy(torch.tensor([0.0, -INF, -INF])).item() == 0
    quarter = torch.tensor([0.0, math.log(3.0)], dtype=F64)
    assert entropy(quarter).item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


@pytest.mark.equation("7.6")
def test_entropy_against_python_and_both_forms_agree():
    logits = normal(2, 3, 5) * 3
    h = entropy(logits)
    for b, t in itertools.product(range(2), range(3)):
        expected = -sum(p * math.log(p) for p in softmax(logits[b, t].tolist()))
        assert h[b, t].item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(h, logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1))


def test_gradient_of_the_entropy():
    logits = normal(3, 4).requires_grad_()
    h = entropy(logits)
    (grad,) = torch.autograd.grad(h.sum(), logits)
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(grad, -p * (p.log() + h.detach()[:, None]))


def test_entropy_with_a_forbidden_action():
    logits = torch.tensor([0.3, -INF, 1.2], dtype=F64, requires_grad=True)
    h = entropy(logits)
    (grad,) = torch.autograd.grad(h, logits)
    rest = torch.tensor([0.3, 1.2], dtype=F64, requires_grad=True)
    (rest_grad,) = torch.autograd.grad(entropy(rest), rest)
    torch.testing.assert_close(h, entropy(rest))
    torch.testing.assert_close(grad[[0, 2]], rest_grad)
    assert grad[1] == 0


def test_entropy_of_extreme_logits_is_finite():
    h = entropy(torch.tensor([[1e4, -1e4, 0.0], [1e30, 0.0, -1e30]]))
    assert h.tolist() == [0.0, 0.0]


# --- the scan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 13, 64, 100])
def test_scan_against_the_loop(steps):
    x, carry = normal(3, steps, seed=steps), torch.rand(3, steps, generator=seeded(steps), dtype=F64)
    carry[0, steps // 2] = 0
    expected, following = torch.zeros(3, steps, dtype=F64), torch.zeros(3, dtype=F64)
    for t in reversed(range(steps)):
        following = x[:, t] + carry[:, t] * following
        expected[:, t] = following
    torch.testing.assert_close(discounted_sum(x, carry), expected)


def test_next_is_real_by_hand():
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    assert next_is_real(mask).int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]


# --- returns -----------------------------------------------------------------------------------


@pytest.mark.equation("3.1")
def test_discounted_return_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, NAN, NAN]], dtype=F64)
    mask = prefix_mask([3, 1], 3)
    assert discounted_return(rewards, mask, gamma=0.5).tolist() == [1 + 1 + 1, 8]
    assert discounted_return(rewards, mask, gamma=1.0).tolist() == [7, 8]
    assert discounted_return(rewards, mask, gamma=0.0).tolist() == [1, 8]


@pytest.mark.equation("3.1")
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.99, 1.0])
def test_discounted_return_against_python(gamma):
    rewards, lengths = normal(4, 6), [6, 3, 1, 5]
    got = discounted_return(rewards, prefix_mask(lengths, 6), gamma=gamma)
    for b, length in enumerate(lengths):
        expected = sum(gamma**t * r for t, r in enumerate(rewards[b, :length].tolist()))
        assert got[b].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.equation("4.1")
def test_reward_to_go_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, NAN, INF]], dtype=F64)
    mask = prefix_mask([3, 1], 3)
    assert reward_to_go(rewards, mask, gamma=0.5).tolist() == [[3, 4, 4], [8, 0, 0]]
    assert reward_to_go(rewards, mask, gamma=1.0).tolist() == [[7, 6, 4], [8, 0, 0]]
    assert reward_to_go(rewards, mask, gamma=0.0).tolist() == [[1, 2, 4], [8, 0, 0]]


@pytest.mark.equation("4.1")
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.99, 1.0])
def test_reward_to_go_against_python(gamma):
    rewards, lengths = normal(4, 6), [6, 3, 1, 5]
    got = reward_to_go(rewards, prefix_mask(lengths, 6), gamma=gamma)
    for b, t in itertools.product(range(4), range(6)):
        expected = sum(gamma ** (s - t) * rewards[b, s].item() for s in range(t, lengths[b]))
        assert got[b, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_reward_to_go_begins_with_the_discounted_return():
    rewards, mask = normal(4, 7), prefix_mask([7, 2, 1, 4], 7)
    first = reward_to_go(rewards, mask, gamma=0.9)[:, 0]
    torch.testing.assert_close(first, discounted_return(rewards, mask, gamma=0.9))


def test_reward_to_go_does_not_reach_over_a_gap():
    mask = torch.tensor([[True, False, True]])
    assert reward_to_go(torch.tensor([[1.0, 50.0, 2.0]]), mask, gamma=1.0).tolist() == [[1, 0, 2]]


def test_gradient_of_the_returns_is_the_discount():
    rewards = torch.tensor([[1.0, 2.0, 3.0, NAN]], dtype=F64, requires_grad=True)
    mask = prefix_mask([3], 4)
    (grad,) = torch.autograd.grad(discounted_return(rewards, mask, gamma=0.5).sum(), rewards)
    assert grad.tolist() == [[1, 0.5, 0.25, 0]]
    (grad,) = torch.autograd.grad(reward_to_go(rewards, mask, gamma=0.5).sum(), rewards)
    assert grad.tolist() == [[1, 1.5, 1.75, 0]]


@pytest.mark.parametrize("estimator", [discounted_return, reward_to_go])
def test_returns_reject_bad_input(estimator):
    rewards = torch.zeros(2, 3)
    for gamma in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=f"gamma must be between 0 and 1; got {gamma}"):
            estimator(rewards, gamma=gamma)
    with pytest.raises(ValueError, match="mask must have the shape of x"):
        estimator(rewards, torch.ones(3, 2, dtype=torch.bool), gamma=1.0)
    with pytest.raises(ValueError, match="mask must have a real step .*; got none in row 0"):
        estimator(rewards, torch.zeros(2, 3, dtype=torch.bool), gamma=1.0)


def test_check_discount_names_the_argument():
    check_discount("lam", 0.0)
    check_discount("lam", 1.0)
    with pytest.raises(ValueError, match="lam must be between 0 and 1; got 2"):
        check_discount("lam", 2)


# --- the loss ----------------------------------------------------------------------------------


@pytest.mark.equation("3.3")
def test_loss_sums_over_time_and_averages_over_episodes():
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    weights = torch.tensor([[10.0, 1.0], [2.0, 100.0]])
    mask = prefix_mask([2, 1], 2)
    assert policy_gradient_loss(log_probs, weights, mask).item() == (10 + 2 + 6) / 2
    assert policy_gradient_loss(log_probs, weights).item() == (10 + 2 + 6 + 400) / 2


def test_gradient_of_the_loss_and_what_is_held_constant():
    log_probs = normal(3, 4).requires_grad_()
    weights, mask = normal(3, 4, seed=1).requires_grad_(), prefix_mask([4, 2, 1], 4)
    policy_gradient_loss(log_probs, weights, mask).backward()
    torch.testing.assert_close(log_probs.grad, torch.where(mask, -weights.detach() / 3, 0))
    assert weights.grad is None


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_loss_ignores_what_stands_under_the_mask(garbage):
    log_probs = torch.tensor([[-1.0, garbage]], requires_grad=True)
    loss = policy_gradient_loss(log_probs, torch.tensor([[2.0, garbage]]), prefix_mask([1], 2))
    loss.backward()
    assert loss.item() == 2 and log_probs.grad.tolist() == [[-2, 0]]


def two_step_world():
    """Three actions, two steps; the second step's logits depend on the first action. All nine episodes."""
    first, second = normal(3, seed=3).requires_grad_(), normal(3, 3, seed=4).requires_grad_()
    actions = torch.tensor(list(itertools.product(range(3), range(3))))
    logits = torch.stack([first.expand(9, 3), second[actions[:, 0]]], dim=1)
    # The first reward depends on the first action alone.
    rewards = torch.stack([normal(3, seed=5)[actions[:, 0]], normal(9, seed=6)], dim=1)
    return (first, second), actions, logits, rewards


@pytest.mark.equation("3.3")
@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("weighting", ["return", "reward to go"])
def test_expected_gradient_is_that_of_the_expected_return(gamma, weighting):
    parameters, actions, logits, rewards = two_step_world()
    discount = torch.tensor([1.0, gamma], dtype=F64)
    episode_probs = logits.softmax(-1).gather(-1, actions[..., None]).squeeze(-1).prod(dim=1)
    objective = (episode_probs * (rewards * discount).sum(dim=1)).sum()
    expected = torch.autograd.grad(objective, parameters, retain_graph=True)

    if weighting == "return":
        weights = discounted_return(rewards, gamma=gamma)[:, None].expand(9, 2)
    else:
        weights = discount * reward_to_go(rewards, gamma=gamma)
    log_probs = action_log_probs(logits, actions)
    loss = sum(
        episode_probs[i].detach() * policy_gradient_loss(log_probs[i : i + 1], weights[i : i + 1]) for i in range(9)
    )
    for got, want in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(-got, want)


def test_loss_rejects_bad_input():
    with pytest.raises(ValueError, match=r"weights must have the shape of log_probs, \(2, 3\); got \(2,\)"):
        policy_gradient_loss(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="mask must have a real step .*; got none in row 1"):
        policy_gradient_loss(torch.zeros(2, 3), torch.zeros(2, 3), prefix_mask([1, 0], 3))
