"""Bias. The expectation of each estimator, summed over everything that can happen, beside the exact ∇J or value; unless
a line says otherwise it covers 72 language models (vocabulary 3 to 6, length 2 to 5, with and without EOS, three
random policies, γ = 1, 0.9 and 0.5) and 12 gridworlds with slip.
"""

import pytest
import torch

from proof.worlds import (
    all_worlds,
    batches,
    expected_batch_gradient,
    expected_gradient,
    grid_world,
    language_world,
    language_worlds,
    seeded,
)
from rlhf_lessons.advantages import gae, gae_recursion, n_step_advantages, td_residuals
from rlhf_lessons.baselines import leave_one_out_baseline, optimal_baseline
from rlhf_lessons.exact import TabularPolicy, enumerate_sequences
from rlhf_lessons.gridworld import GridWorld
from rlhf_lessons.importance import effective_sample_size, importance_mean, importance_ratio
from rlhf_lessons.masking import masked_whiten
from rlhf_lessons.policy_gradient import action_log_probs, discounted_return, entropy, reward_to_go

LAMBDAS = [0.0, 0.3, 0.9, 0.95, 1.0]
AT_EVERY = "at λ = 0, 0.3, 0.9, 0.95 and 1"
BELOW_ONE = "at λ = 0, 0.3, 0.9 and 0.95"


def gradients(worlds, weights):
    """The exact ∇J of each world, and the expected gradient of the estimator with these weights."""
    return [w.gradient for w in worlds], [expected_gradient(w, weights(w)) for w in worlds]


def to_go(w):
    return reward_to_go(w.rewards, w.mask, gamma=w.gamma)


# --- What the expectations are made of ---------------------------------------------------------


@pytest.mark.equation("1.1")
@pytest.mark.equation("1.2")
def test_log_probabilities_multiply_to_the_probability_of_the_episode(claim):
    worlds = language_worlds()
    obtained = [torch.where(w.mask, w.log_probs(), 0).sum(dim=1).exp() for w in worlds]
    text = "the log-probabilities of a response's tokens add up to the log of its probability"
    claim.equal("bias.log_probs", text, [w.probs for w in worlds], obtained)


@pytest.mark.equation("3.1")
@pytest.mark.equation("3.2")
def test_expected_return_is_the_objective(claim):
    worlds = all_worlds()
    obtained = [w.probs @ discounted_return(w.rewards, w.mask, gamma=w.gamma) for w in worlds]
    claim.equal("bias.return", "the mean of the discounted return is J", [w.objective for w in worlds], obtained)


@pytest.mark.equation("4.2")
@pytest.mark.equation("4.1")
def test_reward_to_go_estimates_v_and_q(claim):
    worlds = all_worlds()
    given_state = [w.expected_given(to_go(w)) for w in worlds]
    text = "the mean of the reward-to-go after a state is V(s)"
    claim.equal("bias.to_go_v", text, [w.v for w in worlds], given_state)
    given_action = [w.expected_given(to_go(w), action=True) for w in worlds]
    text = "after a state and an action it is Q(s, a)"
    claim.equal("bias.to_go_q", text, [w.q for w in worlds], given_action)


@pytest.mark.equation("5.1")
@pytest.mark.equation("5.2")
def test_steps_of_an_exact_critic_estimate_the_advantage(claim):
    worlds, exact = all_worlds(), [w.q - w.v for w in all_worlds()]
    residuals = [td_residuals(w.rewards, w.v, w.mask, gamma=w.gamma) for w in worlds]
    obtained = [w.expected_given(x, action=True) for w, x in zip(worlds, residuals, strict=True)]
    claim.equal("bias.td", "with the exact V the mean of the TD residual is the advantage A(s, a)", exact, obtained)
    for n in (2, 3):
        steps = [n_step_advantages(w.rewards, w.v, w.mask, gamma=w.gamma, n=n) for w in worlds]
        obtained = [w.expected_given(x, action=True) for w, x in zip(worlds, steps, strict=True)]
        claim.equal(f"bias.{n}_step", f"and so is that of the {n}-step advantage", exact, obtained)


@pytest.mark.equation("5.4")
@pytest.mark.equation("5.3")
@pytest.mark.parametrize("function", [gae, gae_recursion])
def test_gae_of_an_exact_critic_estimates_the_advantage(claim, function):
    cases = [(w, lam) for w in all_worlds() for lam in LAMBDAS]
    pairs = [function(w.rewards, w.v, w.mask, gamma=w.gamma, lam=lam) for w, lam in cases]
    obtained = [w.expected_given(pair[0], action=True) for (w, _), pair in zip(cases, pairs, strict=True)]
    name, text = function.__name__, f"with the exact V the mean of `{function.__name__}` is A(s, a) {AT_EVERY}"
    claim.equal(f"bias.{name}_advantage", text, [w.q - w.v for w, _ in cases], obtained)
    obtained = [w.expected_given(pair[1]) for (w, _), pair in zip(cases, pairs, strict=True)]
    text = f"and the mean of its return, the critic's target, is V(s) {AT_EVERY}"
    claim.equal(f"bias.{name}_return", text, [w.v for w, _ in cases], obtained)


# --- Unbiased policy gradients -----------------------------------------------------------------


@pytest.mark.equation("3.3")
def test_full_return_reinforce(claim):
    def weights(w):
        return discounted_return(w.rewards, w.mask, gamma=w.gamma)[:, None].expand_as(w.rewards)

    claim.equal("bias.reinforce", "REINFORCE with the full return is unbiased", *gradients(all_worlds(), weights))


@pytest.mark.equation("4.1")
def test_reward_to_go(claim):
    text = "reward-to-go is unbiased, with γ^t in the weights"
    claim.equal("bias.reward_to_go", text, *gradients(all_worlds(), lambda w: w.discounts * to_go(w)))


def test_state_dependent_baselines(claim):
    # A random number for each state: if it is harmless, so is any function of the state.
    text = "a baseline that depends on the state alone, here at random, leaves the gradient unbiased"
    found = gradients(all_worlds(), lambda w: w.discounts * (to_go(w) - w.random_by_state()))
    claim.equal("bias.state_baseline", text, *found)
    text = "so does V(s)"
    claim.equal("bias.v_baseline", text, *gradients(all_worlds(), lambda w: w.discounts * (to_go(w) - w.v)))


def test_exact_advantage(claim):
    text = "weights A(s, a) = Q − V, both exact, give ∇J"
    claim.equal("bias.exact_advantage", text, *gradients(all_worlds(), lambda w: w.discounts * (w.q - w.v)))


def gae_gradients(worlds, lambdas, critic):
    """As `gradients`, of GAE with this critic, for each λ in each world."""
    exact, obtained = [], []
    for lam in lambdas:
        for w in worlds:
            advantages, _ = gae(w.rewards, critic(w), w.mask, gamma=w.gamma, lam=lam)
            exact.append(w.gradient)
            obtained.append(expected_gradient(w, w.discounts * advantages))
    return exact, obtained


@pytest.mark.equation("5.3")
def test_gae_with_the_exact_critic(claim):
    found = gae_gradients(all_worlds(), LAMBDAS, lambda w: w.v)
    claim.equal("bias.gae", f"GAE with the exact V is unbiased {AT_EVERY}", *found)


@pytest.mark.equation("5.3")
def test_gae_with_any_critic_at_lambda_one(claim):
    found = gae_gradients(all_worlds(), [1.0], lambda w: w.random_by_state())
    claim.equal("bias.gae_any_critic", "GAE with a random critic is unbiased at λ = 1", *found)


@pytest.mark.equation("4.4")
def test_leave_one_out_baseline(claim):
    for shape in ((3, 2, None), (3, 2, 1)):
        world = language_world(*shape)
        returns = world.rewards.sum(dim=1)

        def weights(numbers, returns=returns):
            return (returns[numbers] - leave_one_out_baseline(returns[numbers][None])[0])[:, None]

        ending = "without" if shape[2] is None else "with"
        text = f"the mean of the other samples is an unbiased baseline (all batches of 3, {ending} EOS)"
        claim.equal(
            f"bias.leave_one_out_{ending}_eos", text, world.gradient, expected_batch_gradient(world, 3, weights)
        )


def test_truncated_walk_with_a_bootstrap(claim):
    # The walk is cut after T steps, and the exact V of the endless problem stands in for the rest.
    horizon, gamma = 4, 0.9
    grid = GridWorld.named("two_by_two", gamma=gamma)
    logits = torch.randn(grid.num_states, grid.num_actions, generator=seeded(0), dtype=torch.float64).requires_grad_()
    policy = logits.softmax(dim=-1)
    v, q, _ = (x.detach() for x in grid.policy_evaluation(policy))
    visits = grid.discounted_visitation(policy.detach(), horizon=horizon).sum(dim=0)
    (exact,) = torch.autograd.grad((visits[:, None] * policy * q).sum(), logits)

    walks, world = grid.enumerate_trajectories(horizon), grid_world("two_by_two", horizon, gamma=gamma)
    values = torch.where(walks.mask, v[walks.states], 0)
    options = dict(gamma=gamma, terminated=walks.terminated, bootstrap_value=v[walks.final_states])
    obtained = [
        expected_gradient(world, world.discounts * gae(walks.rewards, values, walks.mask, lam=lam, **options)[0])
        for lam in LAMBDAS
    ]
    text = "a walk cut off after T steps and bootstrapped with V gives the first T steps' share of the endless ∇J"
    claim.equal("bias.bootstrap", text, [exact] * len(LAMBDAS), obtained)
    plain = [gae(walks.rewards, values, walks.mask, gamma=gamma, lam=lam)[0] for lam in LAMBDAS[:-1]]
    cut = [expected_gradient(world, world.discounts * advantages) for advantages in plain]
    text = "treating the cut as an end instead is biased at λ < 1"
    claim.biased("bias.no_bootstrap", text, [exact] * len(cut), cut, 0.001)


# --- Biased ones, with the size of their bias --------------------------------------------------


def test_leaving_out_the_discount_is_biased(claim):
    for name, weights in (("reward-to-go", to_go), ("the exact advantage", lambda w: w.q - w.v)):
        text = f"{name} without γ^t is biased at γ < 1, in every world"
        slug = name.replace(" ", "_").replace("-", "_")
        claim.biased(f"bias.no_discount_{slug}", text, *gradients(all_worlds(gammas=[0.9, 0.5]), weights), 0.001)
    text = "without γ^t at γ = 1 there is nothing to leave out"
    claim.equal("bias.no_discount_gamma_1", text, *gradients(all_worlds(gammas=[1.0]), to_go))


@pytest.mark.equation("5.3")
def test_gae_with_a_wrong_critic_is_biased(claim):
    # The error of the next state's value depends on which state the action leads to.
    found = gae_gradients(all_worlds(), LAMBDAS[:-1], lambda w: w.v + w.random_by_state())
    text = f"GAE with V plus a random error is biased {BELOW_ONE}, in every world"
    claim.biased("bias.gae_wrong_critic", text, *found, 1e-4)


@pytest.mark.equation("5.3")
def test_a_critic_off_by_a_constant(claim):
    fixed, ending = (language_worlds(fixed_length=kind) for kind in (True, False))
    text = f"a critic that is 10 too high does no harm {BELOW_ONE} where all episodes have one length"
    claim.equal("bias.gae_offset", text, *gae_gradients(fixed, LAMBDAS[:-1], lambda w: w.v + 10))
    text = f"where EOS ends some episodes early it is biased {BELOW_ONE}: ending looks 10 worse than going on"
    claim.biased("bias.gae_offset_eos", text, *gae_gradients(ending, LAMBDAS[:-1], lambda w: w.v + 10), 0.01)
    # No action changes what time it will be.
    found = gae_gradients(fixed, LAMBDAS[:-1], lambda w: w.v + torch.arange(w.mask.shape[1]) ** 2)
    claim.equal("bias.gae_clock", "nor does an error harm that depends on the time alone, at one length", *found)


def test_a_baseline_that_sees_the_action(claim):
    found = gradients(all_worlds(), lambda w: w.discounts * (to_go(w) - 0.5 * w.rewards))
    claim.biased("bias.action_baseline", "a baseline of half the action's own reward is biased", *found, 0.001)
    _, obtained = gradients(all_worlds(), lambda w: w.discounts * (to_go(w) - w.q))
    text = "Q(s, a) as a baseline removes the whole gradient"
    claim.equal("bias.q_baseline", text, [torch.zeros_like(x) for x in obtained], obtained)


def test_a_mean_that_includes_the_sample_itself(claim):
    world = language_world(3, 2)
    returns = world.rewards.sum(dim=1)
    obtained = expected_batch_gradient(world, 3, lambda n: (returns[n] - returns[n].mean())[:, None])
    text = "the mean of all K samples, own included, shrinks the gradient to exactly 1 − 1/K of itself (K = 3)"
    claim.equal("bias.own_mean", text, world.gradient * (1 - 1 / 3), obtained)


@pytest.mark.equation("4.3")
def test_the_optimal_baseline_estimated_from_its_own_samples(claim):
    world = language_world(3, 2)
    returns = world.rewards.sum(dim=1)
    probs = world.logits.detach().softmax(dim=-1)
    taken = probs[world.rows].gather(-1, world.actions[..., None]).squeeze(-1)
    norms = (1 - 2 * taken + probs[world.rows].square().sum(dim=-1)).sum(dim=1)

    def weights(numbers):
        return (returns[numbers] - optimal_baseline(norms[numbers], returns[numbers]))[:, None]

    text = "the optimal constant baseline, estimated from the three samples it is used on, is biased"
    claim.biased("bias.optimal_baseline", text, world.gradient, expected_batch_gradient(world, 3, weights), 0.01)


@pytest.mark.equation("7.5")
def test_whitened_advantages(claim):
    world = language_world(3, 2)
    advantages = to_go(world) - world.v
    obtained = expected_batch_gradient(world, 3, lambda numbers: masked_whiten(advantages[numbers]))
    rescaled = obtained * (obtained * world.gradient).sum() / obtained.square().sum()
    text = "advantages whitened in batches of 3 point elsewhere than ∇J, even at the length that fits best"
    claim.biased("bias.whitening", text, world.gradient, rescaled, 0.01)
    # With a uniform policy the list of all sequences, each once, is the population.
    policy = TabularPolicy(3, 3, scale=0.0)
    sequences, _ = policy.enumerate()
    returns = torch.randn(len(sequences), generator=seeded(0), dtype=torch.float64)
    (exact,) = torch.autograd.grad(policy.sequence_log_prob(sequences).exp() @ returns, policy.logits)
    white = masked_whiten(returns[:, None].expand_as(sequences))
    log_probs = action_log_probs(policy(sequences), sequences)
    (obtained,) = torch.autograd.grad((log_probs * white).sum() / len(sequences), policy.logits)
    text = "with the whole population's mean and deviation σ whitening only divides ∇J by σ: the bias is the batch's"
    scale = (returns.square().mean() - returns.mean().square()).sqrt()
    claim.equal("bias.whitening_population", text, exact / scale, obtained)


# --- Importance weights ------------------------------------------------------------------------


def off_policy(w, seed=7):
    """Another policy θ_old for this world's tree: its log-probabilities (N, T) and episode probabilities (N,)."""
    noise = torch.randn(w.logits.shape, generator=seeded(seed), dtype=torch.float64)
    old = w.log_probs(w.logits.detach() + 0.5 * noise)
    moved = torch.where(w.mask, old - w.log_probs().detach(), 0).sum(dim=1)
    return old, w.probs * moved.exp()


def surrogate_gradient(w, advantages, old_log_probs, old_probs):
    """∇ of E_old[Σ_t γ^t ρ_t A_t], the per-token ratio's surrogate."""
    ratio = importance_ratio(w.log_probs(), old_log_probs.detach())
    terms = torch.where(w.mask, w.discounts * ratio * advantages, 0).sum(dim=1)
    return torch.autograd.grad(old_probs @ terms, w.logits)[0]


@pytest.mark.equation("6.2")
def test_whole_sequence_ratio_is_exact_everywhere(claim):
    obtained = []
    for w in all_worlds():
        old, old_probs = off_policy(w)
        now, before = (torch.where(w.mask, x, 0).sum(dim=1) for x in (w.log_probs(), old))
        weights = importance_ratio(now, before).detach() * discounted_return(w.rewards, w.mask, gamma=w.gamma)
        obtained.append(expected_gradient(w, weights[:, None].expand_as(w.rewards), probs=old_probs))
    text = "samples of another policy, weighted with the whole sequence's ratio, give ∇J of this one"
    claim.equal("bias.sequence_ratio", text, [w.gradient for w in all_worlds()], obtained)


@pytest.mark.equation("6.2")
def test_ratio_up_to_the_step_is_enough_with_an_exact_advantage(claim):
    obtained = []
    for w in all_worlds():
        old, old_probs = off_policy(w)
        so_far = importance_ratio(w.log_probs(), old).detach().cumprod(dim=1)
        obtained.append(expected_gradient(w, w.discounts * so_far * (w.q - w.v), probs=old_probs))
    text = "the product of the ratios up to t, with this policy's exact A, is exact too"
    claim.equal("bias.ratio_so_far", text, [w.gradient for w in all_worlds()], obtained)


@pytest.mark.equation("6.2")
def test_per_token_ratio_at_and_away_from_the_old_policy(claim):
    worlds = all_worlds()
    at = [surrogate_gradient(w, w.q - w.v, w.log_probs(), w.probs) for w in worlds]
    text = "the per-token ratio's surrogate has the gradient ∇J at θ = θ_old"
    claim.equal("bias.token_ratio_at_old", text, [w.gradient for w in worlds], at)
    away = [surrogate_gradient(w, w.q - w.v, *off_policy(w)) for w in worlds]
    text = "away from θ_old it is biased, even with this policy's exact A: the states were visited by the old one"
    claim.biased("bias.token_ratio_away", text, [w.gradient for w in worlds], away, 1e-3)


@pytest.mark.equation("6.1")
def test_weighted_means(claim):
    world = language_world(3, 2)
    _, old_probs = off_policy(world)
    returns, weights = world.rewards.sum(dim=1), world.probs / old_probs
    numbers, _ = batches(world, 2)
    probs = old_probs[numbers].prod(dim=1)

    def expectation(**options):
        return probs @ torch.stack([importance_mean(returns[n], weights[n], **options) for n in numbers])

    text = "the weighted mean of two samples of another policy has the mean J"
    claim.equal("bias.importance_mean", text, world.objective, expectation())
    text = "divided by the sum of the weights instead, it is biased"
    biased = expectation(self_normalized=True)
    claim.biased("bias.self_normalized", text, world.objective, biased, 0.01)


@pytest.mark.equation("6.1")
def test_missing_support(claim):
    world = language_world(3, 2)
    seen = world.actions[:, 0] != 0  # the old policy never starts with token 0
    old_probs = torch.where(seen, world.probs, 0) / world.probs[seen].sum()
    weights = torch.where(seen, world.probs / old_probs, 0)
    obtained = old_probs @ torch.where(seen, weights * world.rewards.sum(dim=1), 0)
    text = "weights cannot restore what the old policy never samples"
    claim.biased("bias.missing_support", text, world.objective, obtained, 0.01)


@pytest.mark.equation("6.3")
def test_effective_sample_size(claim):
    # One sample of each outcome of a uniform proposal: weights N·p, whose size is 1/Σp², the perplexity of order 2.
    worlds = language_worlds(gammas=[1.0])
    obtained = [effective_sample_size(len(w.probs) * w.probs) for w in worlds]
    text = "for a policy's weights against a uniform proposal over all sequences, N_eff is 1/Σ p²"
    claim.equal("bias.effective_sample_size", text, [1 / w.probs.square().sum() for w in worlds], obtained)


@pytest.mark.equation("7.6")
def test_entropy_is_the_expected_surprise(claim):
    worlds = all_worlds(gammas=[1.0])
    exact = [w.expected_given(-w.log_probs().detach()) for w in worlds]
    obtained = [torch.where(w.mask, entropy(w.logits[w.rows]), 0) for w in worlds]
    text = "the entropy of a state's distribution is the mean of −log π of the action taken there"
    claim.equal("bias.entropy", text, exact, obtained)


def test_every_kind_of_world_is_there():
    worlds = language_worlds()
    sizes = {(w.logits.shape[1], w.mask.shape[1], w.fixed_length) for w in worlds}
    assert {size[0] for size in sizes} == {3, 4, 5, 6} and {size[1] for size in sizes} == {2, 3, 4, 5}
    assert {size[2] for size in sizes} == {True, False} and {w.gamma for w in worlds} == {1.0, 0.9, 0.5}
    assert len(worlds) == 72 and len(all_worlds()) == 84
    for w in all_worlds():
        assert w.probs.sum().item() == pytest.approx(1, abs=1e-12)
        assert w.gradient.abs().max() > 0.01
    assert len(enumerate_sequences(6, 5, eos_id=1)[0]) == 3906
