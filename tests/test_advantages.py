"""Advantages, held against plain loops, a matrix inverse, the sums of their definitions and worlds with known values.

The loops here work on Python floats, one row at a time, and share nothing with the package.
"""

import math

import pytest
import torch

from rlhf_lessons.advantages import gae, gae_recursion, n_step_advantages, td_residuals
from rlhf_lessons.kl import shaped_rewards
from rlhf_lessons.policy_gradient import reward_to_go

NAN, INF = math.nan, math.inf
F64 = torch.float64
FORMS = [gae, gae_recursion]
ESTIMATORS = {
    "td_residuals": lambda *a, **k: td_residuals(*a, gamma=0.9, **k),
    "n_step_advantages": lambda *a, **k: n_step_advantages(*a, gamma=0.9, n=2, **k),
    "gae": lambda *a, **k: gae(*a, gamma=0.9, lam=0.8, **k)[0],
    "gae returns": lambda *a, **k: gae(*a, gamma=0.9, lam=0.8, **k)[1],
    "gae_recursion": lambda *a, **k: gae_recursion(*a, gamma=0.9, lam=0.8, **k)[0],
    "gae_recursion returns": lambda *a, **k: gae_recursion(*a, gamma=0.9, lam=0.8, **k)[1],
}
each_estimator = pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS.keys())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def prefix_mask(lengths, steps):
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


def world(seed=0, rows=4, steps=7):
    """Random rewards and values, rows of random length, ends strewn in, a bootstrap value for each row."""
    lengths = torch.randint(1, steps + 1, (rows,), generator=seeded(seed)).tolist()
    return {
        "rewards": normal(rows, steps, seed=seed + 100),
        "values": normal(rows, steps, seed=seed + 200),
        "mask": prefix_mask(lengths, steps),
        "terminated": torch.rand(rows, steps, generator=seeded(seed + 300)) < 0.3,
        "bootstrap_value": normal(rows, seed=seed + 400),
    }


def episodes(data, row):
    """The row as a list of episodes, each ((step, reward, value), ...) and the value after its last step."""
    lists = {name: tensor[row].tolist() for name, tensor in data.items() if name != "bootstrap_value"}
    steps = [t for t, real in enumerate(lists["mask"]) if real]
    found, current = [], []
    for t in steps:
        current.append((t, lists["rewards"][t], lists["values"][t]))
        if lists["terminated"][t]:
            found.append((current, 0.0))
            current = []
    return found + ([(current, data["bootstrap_value"][row].item())] if current else [])


def by_definition(data, advantage):
    """advantage(rewards, values) for every step; values holds one more: what follows the last step."""
    out = torch.zeros_like(data["rewards"])
    for row in range(len(out)):
        for steps, last_value in episodes(data, row):
            rewards = [r for _, r, _ in steps]
            values = [v for _, _, v in steps] + [last_value]
            for i, (t, _, _) in enumerate(steps):
                out[row, t] = advantage(rewards[i:], values[i:])
    return out


def n_step(rewards, values, gamma, n):
    n = min(n, len(rewards))
    return sum(gamma**k * r for k, r in enumerate(rewards[:n])) + gamma**n * values[n] - values[0]


def lambda_average(rewards, values, gamma, lam):
    """(1−λ) Σ_{n<N} λ^{n−1} A⁽ⁿ⁾ + λ^{N−1} A⁽ᴺ⁾: the tail takes what is left of the weight."""
    last = len(rewards)
    inner = sum(lam ** (n - 1) * n_step(rewards, values, gamma, n) for n in range(1, last))
    return (1 - lam) * inner + lam ** (last - 1) * n_step(rewards, values, gamma, last)


def discounted_residuals(rewards, values, gamma, lam):
    """Σ_k (γλ)^k δ_{t+k} with every residual written out."""
    residuals = [r + gamma * values[k + 1] - values[k] for k, r in enumerate(rewards)]
    return sum((gamma * lam) ** k * residual for k, residual in enumerate(residuals))


# --- by hand -----------------------------------------------------------------------------------

REWARDS = torch.tensor([[1.0, 2.0, 4.0]], dtype=F64)
VALUES = torch.tensor([[2.0, 4.0, 8.0]], dtype=F64)


@pytest.mark.equation("5.1")
def test_residuals_by_hand():
    assert td_residuals(REWARDS, VALUES, gamma=0.5).tolist() == [[1 + 2 - 2, 2 + 4 - 4, 4 - 8]]
    cut_off = td_residuals(REWARDS, VALUES, gamma=0.5, bootstrap_value=torch.tensor([6.0], dtype=F64))
    assert cut_off.tolist() == [[1, 2, 4 + 3 - 8]]
    shorter = td_residuals(REWARDS, VALUES, prefix_mask([2], 3), gamma=0.5)
    assert shorter.tolist() == [[1, 2 - 4, 0]]
    ended = td_residuals(REWARDS, VALUES, gamma=0.5, terminated=torch.tensor([[True, False, False]]))
    assert ended.tolist() == [[1 - 2, 2, -4]]


@pytest.mark.equation("5.2")
def test_n_step_by_hand():
    assert n_step_advantages(REWARDS, VALUES, gamma=0.5, n=1).tolist() == [[1, 2, -4]]
    assert n_step_advantages(REWARDS, VALUES, gamma=0.5, n=2).tolist() == [[1 + 1 + 2 - 2, 2 + 2 - 4, 4 - 8]]
    assert n_step_advantages(REWARDS, VALUES, gamma=0.5, n=3).tolist() == [[1 + 1 + 1 - 2, 0, -4]]
    assert n_step_advantages(REWARDS, VALUES, gamma=0.5, n=50).tolist() == [[1, 0, -4]]


@pytest.mark.equation("5.4")
@pytest.mark.equation("5.3")
@pytest.mark.parametrize("form", FORMS)
def test_gae_by_hand(form):
    advantages, returns = form(REWARDS, VALUES, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1 + 0.25 * (2 - 1), 2 - 0.25 * 4, -4]]
    assert returns.tolist() == [[3.25, 5, 4]]


# --- by definition, on random worlds with ends, cuts and padding -----------------------------------


@pytest.mark.equation("5.1")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_residuals_by_definition(seed, gamma):
    data = world(seed)
    expected = by_definition(data, lambda r, v: r[0] + gamma * v[1] - v[0])
    torch.testing.assert_close(td_residuals(**data, gamma=gamma), expected)


@pytest.mark.equation("5.2")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 100])
def test_n_step_by_definition(seed, gamma, n):
    data = world(seed)
    expected = by_definition(data, lambda r, v: n_step(r, v, gamma, n))
    torch.testing.assert_close(n_step_advantages(**data, gamma=gamma, n=n), expected)


@pytest.mark.equation("5.4")
@pytest.mark.equation("5.3")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (1.0, 0.95), (0.99, 0.0), (0.99, 1.0), (0.0, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("definition", [discounted_residuals, lambda_average])
@pytest.mark.parametrize("form", FORMS)
def test_gae_by_definition(form, definition, gamma, lam, seed):
    data = world(seed)
    expected = by_definition(data, lambda r, v: definition(r, v, gamma, lam))
    advantages, returns = form(**data, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, torch.where(data["mask"], expected + data["values"], 0))


@pytest.mark.equation("5.3")
@pytest.mark.parametrize("form", FORMS)
def test_gae_solves_a_linear_system(form):
    """Â = δ + γλ S Â with S the shift, so Â = (I − γλ S)⁻¹ δ."""
    rewards, values = normal(1, 6), normal(1, 6, seed=1)
    shift = torch.diag(torch.ones(5, dtype=F64), 1)
    residuals = rewards[0] + 0.9 * shift @ values[0] - values[0]
    expected = torch.linalg.solve(torch.eye(6, dtype=F64) - 0.9 * 0.8 * shift, residuals)
    torch.testing.assert_close(form(rewards, values, gamma=0.9, lam=0.8)[0][0], expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMS)
def test_the_two_ends_of_lambda(form, seed):
    data = world(seed)
    zero, one = (form(**data, gamma=0.9, lam=lam)[0] for lam in (0.0, 1.0))
    torch.testing.assert_close(zero, td_residuals(**data, gamma=0.9))
    torch.testing.assert_close(one, n_step_advantages(**data, gamma=0.9, n=7))
    # Without cuts, λ = 1 is the Monte Carlo return minus V.
    rewards, values, mask = data["rewards"], data["values"], data["mask"]
    advantages, returns = form(rewards, values, mask, gamma=0.9, lam=1.0)
    torch.testing.assert_close(returns, reward_to_go(rewards, mask, gamma=0.9))
    torch.testing.assert_close(advantages, torch.where(mask, reward_to_go(rewards, mask, gamma=0.9) - values, 0))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 4096)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (F64, 1e-10)])
def test_scan_and_recursion_agree_at_every_length(shape, dtype, tolerance):
    rewards, values = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    for fast, slow in zip(*(form(rewards, values, gamma=0.999, lam=0.99) for form in FORMS), strict=True):
        assert fast.dtype == slow.dtype == dtype
        torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_a_true_critic_of_a_world_without_chance_is_never_surprised(lam):
    rewards, mask = normal(3, 6), prefix_mask([6, 4, 1], 6)
    values = reward_to_go(rewards, mask, gamma=0.9)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=lam)
    torch.testing.assert_close(advantages, torch.zeros(3, 6, dtype=F64))
    torch.testing.assert_close(returns, values)


# --- ends and cuts -----------------------------------------------------------------------------


@each_estimator
def test_two_episodes_in_a_row_are_two_rows(estimate):
    rewards, values = normal(2, 4), normal(2, 4, seed=1)
    terminated = torch.zeros(1, 8, dtype=torch.bool)
    terminated[0, 3] = True
    in_a_row = estimate(rewards.view(1, 8), values.view(1, 8), terminated=terminated)
    torch.testing.assert_close(in_a_row.view(2, 4), estimate(rewards, values))


@each_estimator
def test_bootstrap_stands_for_the_step_that_was_cut_off(estimate):
    """A further step that pays V and ends surprises nobody, so it must change nothing before it."""
    rewards, values, last = normal(2, 4), normal(2, 4, seed=1), normal(2, 1, seed=2)
    longer = estimate(torch.cat([rewards, last], 1), torch.cat([values, last], 1))
    torch.testing.assert_close(estimate(rewards, values, bootstrap_value=last[:, 0]), longer[:, :4])


@each_estimator
def test_bootstrap_goes_to_the_last_real_step(estimate):
    rewards, values, bootstrap = normal(1, 6), normal(1, 6, seed=1), torch.tensor([3.0], dtype=F64)
    padded = estimate(rewards, values, prefix_mask([4], 6), bootstrap_value=bootstrap)
    torch.testing.assert_close(padded[:, :4], estimate(rewards[:, :4], values[:, :4], bootstrap_value=bootstrap))
    assert padded[:, 4:].tolist() == [[0, 0]]


@each_estimator
def test_bootstrap_of_zero_is_none(estimate):
    data = world(3)
    zero = data | {"bootstrap_value": torch.zeros(4, dtype=F64)}
    assert torch.equal(estimate(**zero), estimate(**data | {"bootstrap_value": None}))


@each_estimator
@pytest.mark.parametrize("garbage", [5.0, NAN, INF])
def test_bootstrap_is_ignored_where_the_last_step_is_terminated(estimate, garbage):
    rewards, values, mask = normal(2, 5), normal(2, 5, seed=1), prefix_mask([5, 3], 5)
    terminated = torch.zeros(2, 5, dtype=torch.bool)
    terminated[0, 4] = terminated[1, 2] = True
    bootstrap = torch.full((2,), garbage, dtype=F64)
    ended = estimate(rewards, values, mask, terminated=terminated, bootstrap_value=bootstrap)
    assert torch.equal(ended, estimate(rewards, values, mask))


@each_estimator
def test_a_gap_in_the_mask_is_an_end(estimate):
    rewards, values = normal(1, 5), normal(1, 5, seed=1)
    mask = torch.tensor([[True, True, False, True, True]])
    out = estimate(rewards, values, mask)
    torch.testing.assert_close(out[:, :2], estimate(rewards[:, :2], values[:, :2]))
    torch.testing.assert_close(out[:, 3:], estimate(rewards[:, 3:], values[:, 3:]))
    assert out[0, 2] == 0


# --- the mask ----------------------------------------------------------------------------------


@each_estimator
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e300])
def test_edits_after_eos_change_nothing(estimate, garbage):
    outputs, gradients = [], []
    mask = prefix_mask([5, 2, 1], 5)
    for filler in (0.0, garbage):
        rewards, values = (torch.where(mask, normal(3, 5, seed=seed), filler).requires_grad_() for seed in (0, 1))
        out = estimate(rewards, values, mask, bootstrap_value=normal(3, seed=2))
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append(torch.stack([rewards.grad, values.grad]))
    assert torch.equal(*outputs) and torch.equal(*gradients)
    assert (outputs[1][~mask] == 0).all() and (gradients[1][:, ~mask] == 0).all()
    assert gradients[1].isfinite().all() and gradients[1][0].any()


@each_estimator
def test_padding_changes_nothing(estimate):
    rewards, values, mask = normal(2, 4), normal(2, 4, seed=1), prefix_mask([4, 2], 4)
    padded = [torch.nn.functional.pad(x, (0, 3), value=7.0) for x in (rewards, values)]
    longer = estimate(*padded, prefix_mask([4, 2], 7))
    torch.testing.assert_close(longer[:, :4], estimate(rewards, values, mask))


@each_estimator
def test_inputs_stay_as_they_are(estimate):
    data = world(1)
    before = {name: tensor.clone() for name, tensor in data.items()}
    estimate(**data)
    assert all(torch.equal(data[name], before[name]) for name in data)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_advantages(form):
    """∂Â_t/∂r_s = (γλ)^(s−t) for s ≥ t, and R̂ = Â + V passes the value's own gradient on as well."""
    rewards, values = normal(1, 4).requires_grad_(), normal(1, 4, seed=1).requires_grad_()
    advantages, returns = form(rewards, values, gamma=0.5, lam=0.5)
    (grad,) = torch.autograd.grad(advantages[0, 1], rewards, retain_graph=True)
    assert grad.tolist() == [[0, 1, 0.25, 0.0625]]
    (grad,) = torch.autograd.grad(advantages[0, 2], values, retain_graph=True)
    assert grad.tolist() == [[0, 0, -1, 0.5 - 0.25]]
    (grad,) = torch.autograd.grad(returns[0, 2], values)
    assert grad.tolist() == [[0, 0, 0, 0.25]]


# --- the score of a text -----------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_score_reaches_back_from_eos_by_powers_of_lambda(form):
    """With γ = 1, V = 0 and β = 0 the EOS token's advantage is the score, and k tokens earlier λ^k of it."""
    mask = prefix_mask([6, 4, 1], 6)
    rewards = shaped_rewards(torch.tensor([2.0, -3.0, 1.0]), torch.ones(3, 6), mask, kl_coef=0.0)
    advantages, _ = form(rewards, torch.zeros(3, 6), mask, gamma=1.0, lam=0.95)
    for row, (length, score) in enumerate([(6, 2.0), (4, -3.0), (1, 1.0)]):
        expected = [score * 0.95 ** (length - 1 - t) for t in range(length)] + [0] * (6 - length)
        assert advantages[row].tolist() == pytest.approx(expected, rel=1e-6)


# --- bad input ---------------------------------------------------------------------------------


@each_estimator
def test_every_estimator_rejects_bad_shapes(estimate):
    rewards, values = torch.zeros(2, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"values must have the shape of rewards, \(2, 3\); got \(3, 2\)"):
        estimate(rewards, values.T)
    with pytest.raises(ValueError, match=r"terminated must have the shape of rewards, \(2, 3\); got \(2,\)"):
        estimate(rewards, values, terminated=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must have the shape of x, \(2, 3\); got \(3, 2\)"):
        estimate(rewards, values, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must have a real step .*; got none in row 1"):
        estimate(rewards, values, prefix_mask([1, 0], 3))
    for shape in ((3,), (2, 1), (2, 3)):
        with pytest.raises(ValueError, match=r"bootstrap_value must be \(B,\) = \(2,\); got \(" + str(shape[0])):
            estimate(rewards, values, bootstrap_value=torch.zeros(shape))


@pytest.mark.parametrize("bad", [-0.1, 1.01, NAN])
def test_every_estimator_rejects_bad_discounts(bad):
    x = torch.zeros(1, 2)
    message = f"must be between 0 and 1; got {bad}"
    for estimate in (
        lambda: td_residuals(x, x, gamma=bad),
        lambda: n_step_advantages(x, x, gamma=bad, n=1),
        lambda: gae(x, x, gamma=bad, lam=1.0),
        lambda: gae_recursion(x, x, gamma=bad, lam=1.0),
    ):
        with pytest.raises(ValueError, match="gamma " + message):
            estimate()
    for form in FORMS:
        with pytest.raises(ValueError, match="lam " + message):
            form(x, x, gamma=1.0, lam=bad)


@pytest.mark.parametrize("n", [0, -1])
def test_n_step_rejects_n_below_one(n):
    with pytest.raises(ValueError, match=f"n must be at least 1; got {n}"):
        n_step_advantages(torch.zeros(1, 2), torch.zeros(1, 2), gamma=1.0, n=n)
