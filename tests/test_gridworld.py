"""The grid's exact answers, held against published values, hand computation and second routes."""

import itertools

import pytest
import torch

from rlhf_lessons.gridworld import GRIDS, GridWorld

TINY = [("corridor", 5), ("two_by_two", 3)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_logits(world, *, horizon=None, seed=0):
    shape = (world.num_states, world.num_actions)
    shape = shape if horizon is None else (horizon, *shape)
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def random_policy(world, **kwargs):
    return random_logits(world, **kwargs).softmax(-1)


def always(world, action):
    policy = torch.zeros(world.num_states, world.num_actions, dtype=torch.float64)
    policy[:, world.actions.index(action)] = 1
    return policy


def discounted(trajectories, gamma):
    horizon = trajectories.rewards.shape[1]
    return trajectories.rewards @ gamma ** torch.arange(horizon, dtype=torch.float64)


# --- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_transitions_are_distributions(name):
    world = GridWorld.named(name)
    assert world.transition.dtype == world.rewards.dtype == torch.float64
    assert (world.transition >= 0).all()
    torch.testing.assert_close(world.transition.sum(-1), torch.ones(world.num_states, world.num_actions).double())
    assert world.start.sum().item() == pytest.approx(1)
    ends = world.terminal.nonzero().flatten()
    assert (world.transition[ends, :, ends] == 1).all()
    assert (world.rewards[ends] == 0).all()


def test_transitions_by_hand():
    world = GridWorld("S#\n.G\nP.", slip=0.2, step_reward=-0.1, goal_reward=2.0, pit_reward=-3.0)
    # States: 0 S, 1 floor, 2 goal, 3 pit, 4 floor.
    up, right, down, left = range(4)
    assert world.transition[0, right].tolist() == pytest.approx([0.9, 0.1, 0, 0, 0])
    assert world.transition[0, down].tolist() == pytest.approx([0.2, 0.8, 0, 0, 0])
    assert world.transition[1, right].tolist() == pytest.approx([0.1, 0, 0.8, 0.1, 0])
    assert world.transition[1, down].tolist() == pytest.approx([0, 0.1, 0.1, 0.8, 0])
    assert world.transition[4, left].tolist() == pytest.approx([0, 0, 0.1, 0.8, 0.1])
    assert world.rewards[1, right].tolist() == pytest.approx([-0.1, -0.1, 1.9, -3.1, -0.1])
    assert world.terminal.tolist() == [False, False, True, True, False]
    assert world.coordinates.tolist() == [[0, 0], [1, 0], [1, 1], [2, 0], [2, 1]]
    assert world.moves.tolist() == [[-1, 0], [0, 1], [1, 0], [0, -1]]


def test_two_starts_are_equally_likely():
    world = GridWorld("SS\n.G")
    assert world.start.tolist() == [0.5, 0.5, 0, 0]
    walks = world.enumerate_trajectories(2)
    probs = walks.log_prob(world.uniform_policy().log()).exp()
    shares = torch.zeros_like(world.start).index_add(0, walks.states[:, 0], probs)
    torch.testing.assert_close(shares, world.start)  # a walk's probability includes its start's


# --- evaluation --------------------------------------------------------------------------------


@pytest.mark.equation("4.2")
def test_corridor_by_hand():
    """Always right: a step works with 0.8, and with 0.2 the agent stays."""
    world = GridWorld.named("corridor")
    v, q, a = world.policy_evaluation(always(world, "right"))
    near = (0.8 * 0.9 + 0.2 * -0.1) / (1 - 0.9 * 0.2)
    far = (-0.1 + 0.9 * 0.8 * near) / (1 - 0.9 * 0.2)
    assert v.tolist() == pytest.approx([far, near, 0])
    left = -0.1 + 0.9 * (0.8 * far + 0.2 * near)  # from the middle cell
    assert q[1].tolist() == pytest.approx([left, near])
    assert a[1].tolist() == pytest.approx([left - near, 0])
    assert (q[2] == 0).all()


@pytest.mark.equation("4.2")
def test_two_steps_of_the_corridor_by_hand():
    world = GridWorld.named("corridor")
    v, q, _ = world.policy_evaluation(always(world, "right"), horizon=2)
    last = 0.8 * 0.9 + 0.2 * -0.1
    assert v[1].tolist() == pytest.approx([-0.1, last, 0])
    first = -0.1 + 0.9 * (0.8 * last + 0.2 * -0.1)
    assert v[0].tolist() == pytest.approx([first, last + 0.9 * 0.2 * last, 0])
    assert q.shape == (2, 3, 2)


@pytest.mark.equation("4.2")
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("name", GRIDS)
def test_linear_solve_is_the_limit_of_backward_induction(name, gamma):
    world = GridWorld.named(name, gamma=gamma)
    policy = random_policy(world)
    v, q, a = world.policy_evaluation(policy)
    long = world.policy_evaluation(policy, horizon=3_000)
    for solved, iterated in zip((v, q, a), long, strict=True):
        torch.testing.assert_close(solved, iterated[0])
    torch.testing.assert_close((policy * a).sum(-1), torch.zeros_like(v))
    assert (v[world.terminal] == 0).all() and (q[world.terminal] == 0).all()


@pytest.mark.equation("4.2")
@pytest.mark.parametrize("horizon", [None, 8])
def test_objective_matches_the_mean_of_sampled_returns(horizon):
    world = GridWorld.named("cliff")
    policy = random_policy(world)
    walks = world.sample(policy, 2_000, horizon=horizon or 300, generator=seeded(1))
    returns = discounted(walks, world.gamma)
    error = returns.std() / len(returns) ** 0.5
    exact = world.objective(policy, horizon=horizon)
    assert abs((returns.mean() - exact) / error) < 4
    other = world.objective(policy, horizon=2)
    assert abs((returns.mean() - other) / error) > 10  # the test can tell them apart


def test_gamma_one_needs_a_policy_that_ends():
    world = GridWorld("S.G", gamma=1.0, actions=("left", "right"))
    with pytest.raises(
        ValueError, match="policy must reach an end from every state, as gamma is 1; got no way from state 0"
    ):
        world.policy_evaluation(always(world, "left"))
    with pytest.raises(ValueError, match="as gamma is 1"):
        world.discounted_visitation(always(world, "left"))
    v, _, _ = world.policy_evaluation(always(world, "left"), horizon=4)
    assert v[0, 0] == 0
    discounting = GridWorld("S.G", gamma=0.9, step_reward=-1.0, actions=("left", "right"))
    v, _, _ = discounting.policy_evaluation(always(world, "left"))
    assert v[0].item() == pytest.approx(-10)


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon, timed", [(None, False), (4, False), (4, True)])
@pytest.mark.parametrize("name", ["corridor", "two_by_two", "four_by_three"])
def test_gradient_matches_finite_differences(name, horizon, timed):
    world = GridWorld.named(name)
    logits = random_logits(world, horizon=horizon if timed else None)
    gradient = world.objective_gradient(logits, horizon=horizon)
    assert gradient.shape == logits.shape
    for index in itertools.islice(itertools.product(*map(range, logits.shape)), 0, None, 3):
        step = torch.zeros_like(logits)
        step[index] = 1e-6
        up, down = (world.objective(x.softmax(-1), horizon=horizon) for x in (logits + step, logits - step))
        assert gradient[index].item() == pytest.approx(((up - down) / 2e-6).item(), abs=1e-8)


@pytest.mark.parametrize("horizon", [None, 6])
@pytest.mark.parametrize("name", GRIDS)
def test_gradient_matches_the_policy_gradient_theorem(name, horizon):
    world = GridWorld.named(name)
    logits = random_logits(world)
    policy = logits.softmax(-1)
    visits = world.discounted_visitation(policy, horizon=horizon)
    _, _, a = world.policy_evaluation(policy, horizon=horizon)
    # For a softmax, Σ_a ∇π(a|s) Q(s,a) has the coordinates π(a|s) A(s,a).
    terms = visits.unsqueeze(-1) * policy * a
    expected = terms if horizon is None else terms.sum(0)
    torch.testing.assert_close(world.objective_gradient(logits, horizon=horizon), expected)


def test_gradient_works_without_grad_and_leaves_the_logits_alone():
    world = GridWorld.named("corridor")
    logits = random_logits(world).requires_grad_()
    with torch.no_grad():
        gradient = world.objective_gradient(logits)
    assert gradient.abs().sum() > 0 and not gradient.requires_grad and logits.grad is None


@pytest.mark.parametrize("name", GRIDS)
def test_visits_by_long_iteration_and_by_sampling(name):
    world = GridWorld.named(name, gamma=0.9)
    policy = random_policy(world)
    solved = world.discounted_visitation(policy)
    by_step = world.discounted_visitation(policy, horizon=600)
    torch.testing.assert_close(solved, by_step.sum(0))
    n = 5_000
    walks = world.sample(policy, n, horizon=4, generator=seeded(2))
    for t in range(4):
        probs = by_step[t] / 0.9**t
        counts = torch.bincount(walks.states[:, t][walks.mask[:, t]], minlength=len(probs))
        z = (counts - n * probs) / (n * probs * (1 - probs)).sqrt().clamp(min=1e-9)
        assert z[probs > 0].abs().max() < 4.5
        assert (counts[probs == 0] == 0).all()


# --- the optimum -------------------------------------------------------------------------------


def test_optimal_values_are_the_published_ones():
    """Russell & Norvig's utilities of the 4x3 world for a step reward of -0.04."""
    world = GridWorld.named("four_by_three")
    published = {
        (0, 0): 0.812, (0, 1): 0.868, (0, 2): 0.918,
        (1, 0): 0.762, (1, 2): 0.660,
        (2, 0): 0.705, (2, 1): 0.655, (2, 2): 0.611, (2, 3): 0.388,
    }  # fmt: skip
    values = dict(zip(map(tuple, world.coordinates.tolist()), world.optimal_values()[0].tolist(), strict=True))
    for cell, value in published.items():
        assert values[cell] == pytest.approx(value, abs=6e-4)


@pytest.mark.parametrize("name", GRIDS)
def test_the_greedy_policy_has_the_optimal_values(name):
    world = GridWorld.named(name)
    v, q = world.optimal_values()
    greedy = torch.nn.functional.one_hot(q.argmax(-1), world.num_actions).double()
    torch.testing.assert_close(world.policy_evaluation(greedy)[0], v, atol=1e-9, rtol=0)
    for seed in range(5):
        other = world.policy_evaluation(random_policy(world, seed=seed))[0]
        assert (other <= v + 1e-9).all()


def test_optimal_values_beat_every_deterministic_policy_of_the_corridor():
    world = GridWorld.named("corridor")
    best = torch.full((3,), -torch.inf, dtype=torch.float64)
    for actions in itertools.product(range(2), repeat=3):
        policy = torch.eye(2, dtype=torch.float64)[list(actions)]
        best = torch.maximum(best, world.policy_evaluation(policy)[0])
    torch.testing.assert_close(world.optimal_values()[0], best)
    best = -torch.inf
    for actions in itertools.product(range(2), repeat=9):
        policy = torch.eye(2, dtype=torch.float64)[list(actions)].view(3, 3, 2)
        best = max(best, world.objective(policy, horizon=3).item())
    v, q = world.optimal_values(horizon=3)
    assert v.shape == (3, 3) and q.shape == (3, 3, 2)
    assert v[0, 0].item() == pytest.approx(best)


def test_value_iteration_says_when_it_cannot_converge():
    world = GridWorld("SG", step_reward=1.0, goal_reward=0.0, gamma=1.0)
    with pytest.raises(
        ValueError, match="max_sweeps must be enough for the values to converge; got 1000, and with gamma 1"
    ):
        world.optimal_values(max_sweeps=1000)
    assert world.optimal_values(horizon=7)[0][0].tolist() == [7, 0]


# --- trajectories ------------------------------------------------------------------------------


def check_conventions(world, walks):
    horizon = walks.states.shape[1]
    assert walks.mask[:, 0].all()
    assert not (walks.mask[:, 1:] & ~walks.mask[:, :-1]).any()
    both = walks.mask[:, 1:]
    assert torch.equal(walks.next_states[:, :-1][both], walks.states[:, 1:][both])
    assert not world.terminal[walks.states[walks.mask]].any()
    assert torch.equal(walks.terminated, walks.mask & world.terminal[walks.next_states])
    # A walk stops because it terminated or because the horizon cut it off, never otherwise.
    ended = walks.terminated.any(1)
    assert (walks.terminated.sum(1) <= 1).all()
    assert torch.equal(world.terminal[walks.final_states], ended)
    assert (walks.mask.sum(1)[~ended] == horizon).all()
    for x in (walks.states, walks.actions, walks.next_states, walks.rewards, walks.terminated):
        assert (x[~walks.mask] == 0).all()
    s, a, after = (x[walks.mask] for x in (walks.states, walks.actions, walks.next_states))
    assert torch.equal(walks.rewards[walks.mask], world.rewards[s, a, after])


@pytest.mark.parametrize("name", GRIDS)
def test_samples_keep_the_conventions(name):
    world = GridWorld.named(name)
    walks = world.sample(random_policy(world), 300, horizon=6, generator=seeded())
    assert len(walks) == 300 and walks.states.shape == (300, 6)
    assert walks.terminated.any() and not walks.terminated.any(1).all()
    check_conventions(world, walks)
    again = world.sample(random_policy(world), 300, horizon=6, generator=seeded())
    assert torch.equal(walks.states, again.states)


def test_a_first_cell_that_is_an_end_does_not_leak_into_masked_steps():
    world = GridWorld("GS.", slip=0.1, step_reward=-0.5)
    check_conventions(world, world.enumerate_trajectories(3))
    check_conventions(world, world.sample(world.uniform_policy(), 50, horizon=5))


def test_samples_follow_a_policy_that_depends_on_time():
    world = GridWorld("S..G", actions=("left", "right"))
    plan = torch.stack([always(world, action) for action in ("right", "left", "right")])
    walks = world.sample(plan, 5, horizon=3, generator=seeded())
    assert walks.actions.tolist() == [[1, 0, 1]] * 5
    assert walks.next_states.tolist() == [[1, 0, 1]] * 5
    assert walks.log_prob(plan.log()).tolist() == [0] * 5


@pytest.mark.parametrize("name, horizon", TINY)
def test_enumeration_is_complete_and_without_repeats(name, horizon):
    world = GridWorld.named(name)
    walks = world.enumerate_trajectories(horizon)
    check_conventions(world, walks)
    rows = torch.cat([walks.states, walks.actions, walks.next_states, walks.mask.long()], dim=1)
    assert len(rows.unique(dim=0)) == len(walks)
    for policy in (random_policy(world), random_policy(world, horizon=horizon)):
        assert walks.log_prob(policy.log()).exp().sum().item() == pytest.approx(1)
    # Every sampled walk is in the list, with the same share of the environment.
    samples = world.sample(random_policy(world), 200, horizon=horizon, generator=seeded())
    keys = [x.states * 100 + x.actions * 10 + x.next_states for x in (samples, walks)]
    match = (keys[0][:, None] == keys[1]).all(-1)
    match &= (samples.mask[:, None] == walks.mask).all(-1)
    assert (match.sum(1) == 1).all()
    torch.testing.assert_close(walks.env_log_prob[match.int().argmax(1)], samples.env_log_prob)


def test_one_trajectory_by_hand():
    world = GridWorld.named("corridor")
    walks = world.enumerate_trajectories(2)
    # From S: left always stays (1 outcome), right moves or slips (2); twice that from S again,
    # and from the middle left and right have 2 outcomes each.
    assert len(walks) == 2 * 3 + 1 * 4
    wins = walks.terminated.any(1)
    assert wins.sum() == 1
    policy = torch.tensor([[0.3, 0.7], [0.4, 0.6], [0.5, 0.5]], dtype=torch.float64)
    prob = walks.log_prob(policy.log())[wins].exp().item()
    assert prob == pytest.approx(0.7 * 0.8 * 0.6 * 0.8)
    assert walks.rewards[wins].tolist() == [pytest.approx([-0.1, 0.9])]
    assert walks.final_states[wins].tolist() == [2]


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("name, horizon", TINY)
def test_enumeration_agrees_with_backward_induction(name, horizon, timed):
    world = GridWorld.named(name)
    logits = random_logits(world, horizon=horizon if timed else None).requires_grad_()
    walks = world.enumerate_trajectories(horizon)
    probs = walks.log_prob(logits.log_softmax(-1)).exp()
    objective = (probs * discounted(walks, world.gamma)).sum()
    exact = world.objective(logits.softmax(-1), horizon=horizon)
    torch.testing.assert_close(objective, exact)
    (gradient,) = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(gradient, world.objective_gradient(logits, horizon=horizon))


def test_values_of_sampled_steps_are_read_with_a_time_index():
    world = GridWorld.named("two_by_two")
    horizon = 3
    policy = random_policy(world)
    v, _, a = world.policy_evaluation(policy, horizon=horizon)
    walks = world.enumerate_trajectories(horizon)
    time = torch.arange(horizon)
    probs = walks.log_prob(policy.log()).exp()[:, None]
    advantages = torch.where(walks.mask, a[time, walks.states, walks.actions], 0)
    torch.testing.assert_close((probs * advantages).sum(0), torch.zeros(3).double())
    # E[V_1(s_1) − (return after step 0)] = 0: both are what is left after one step.
    left = walks.rewards[:, 1] + world.gamma * walks.rewards[:, 2]
    values = torch.where(walks.mask[:, 1], v[1, walks.states[:, 1]], 0)
    torch.testing.assert_close((probs[:, 0] * (values - left)).sum(), torch.tensor(0.0).double())


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"text": "S.\nG"}, r"text must have lines of one length; got \[2, 1\]"),
        ({"text": ""}, r"text must have lines of one length; got \[\]"),
        ({"text": "SxG"}, r"text must hold only the cells S G P # and .; got \['x'\]"),
        ({"text": ".G"}, "text must have a start cell S; got '.G'"),
        ({"text": "S."}, "text must have a goal cell G; got 'S.'"),
        ({"text": "SG", "slip": 1.1}, "slip must be between 0 and 1; got 1.1"),
        ({"text": "SG", "gamma": -0.1}, "gamma must be between 0 and 1; got -0.1"),
        ({"text": "SG", "gamma": 1.5}, "gamma must be between 0 and 1; got 1.5"),
        ({"text": "SG", "actions": ("north",)}, "actions must be distinct names among .*; got .*north"),
        ({"text": "SG", "actions": ("up", "up")}, "actions must be distinct names"),
        ({"text": "SG", "actions": ()}, "actions must be distinct names"),
    ],
)
def test_impossible_worlds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GridWorld(**arguments)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name must be one of .*corridor; got 'frozen_lake'"):
        GridWorld.named("frozen_lake")


def test_what_is_no_policy_is_refused():
    world = GridWorld.named("corridor")
    good = world.uniform_policy()
    negative = torch.tensor([[0.5, 0.5], [1.5, -0.5], [0.5, 0.5]])
    for bad, message in (
        (good[:2], r"policy must have shape \(3, 2\); got \(2, 2\)"),
        (good.expand(4, 3, 2), "policy must have shape"),
        (2 * good, r"policy must be probabilities in each row; got \[1.0, 1.0\] in row \[0\]"),
        (negative, r"policy must be probabilities in each row; got \[1.5, -0.5\] in row \[1\]"),
        (good.log(), "policy must be probabilities in each row"),
        (good * torch.nan, "policy must be probabilities in each row; got .*nan"),
    ):
        with pytest.raises(ValueError, match=message):
            world.policy_evaluation(bad)
        with pytest.raises(ValueError, match=message):
            world.sample(bad, 2, horizon=3)
    with pytest.raises(ValueError, match="policy must have shape"):
        world.policy_evaluation(good.expand(4, 3, 2), horizon=5)


def test_bad_sizes_are_refused():
    world = GridWorld.named("two_by_two")
    policy = world.uniform_policy()
    for call in (
        lambda: world.sample(policy, 1, horizon=0),
        lambda: world.enumerate_trajectories(0),
        lambda: world.policy_evaluation(policy, horizon=0),
        lambda: world.optimal_values(horizon=0),
        lambda: world.discounted_visitation(policy, horizon=-1),
    ):
        with pytest.raises(ValueError, match="horizon must be at least 1; got "):
            call()
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        world.sample(policy, 0, horizon=1)
    with pytest.raises(ValueError, match="horizon must give at most 1000 trajectories; got at least "):
        world.enumerate_trajectories(5, max_trajectories=1000)
