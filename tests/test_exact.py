"""The oracle for sequences, held against hand-computed numbers and against second routes."""

import itertools
import math

import pytest
import torch

from rlhf_lessons.exact import (
    TabularPolicy,
    best_of_n,
    distinct_states,
    enumerate_sequences,
    eos_mask,
    exact_expectation,
    exact_moments,
    exact_values,
    optimal_policy,
    per_sample_gradients,
    prefix_ids,
    sequence_kl,
    sequence_log_prob,
    state_visitation,
)

WORLDS = [(3, 2, None), (2, 4, None), (3, 3, 2), (4, 3, 0), (3, 1, 1)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def world(vocab_size, length, eos_id, seed=0):
    """A random policy, everything it can say, and a random reward at each step."""
    generator = seeded(seed)
    policy = TabularPolicy(vocab_size, length, eos_id=eos_id, generator=generator)
    sequences, mask = policy.enumerate()
    # Rewards must be a function of state and action: one number for each prefix.
    ids = prefix_ids(sequences)[:, 1:]
    table = torch.randn(length, len(sequences), generator=generator, dtype=torch.float64)
    rewards = table.gather(1, ids.T).T
    return policy, sequences, mask, rewards


# --- enumeration -------------------------------------------------------------------------------


def test_enumeration_by_hand():
    sequences, mask = enumerate_sequences(2, 2)
    assert sequences.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert mask.all()
    sequences, mask = enumerate_sequences(2, 2, eos_id=1)
    assert sequences.tolist() == [[0, 0], [0, 1], [1, 0]]
    assert mask.tolist() == [[True, True], [True, True], [True, False]]
    sequences, mask = enumerate_sequences(2, 2, eos_id=0)
    assert sequences.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert mask.tolist() == [[True, False], [True, True], [True, True]]


@pytest.mark.parametrize("vocab_size, length, eos_id", WORLDS + [(6, 4, 3), (1, 3, None)])
def test_enumeration_has_each_sample_once(vocab_size, length, eos_id):
    sequences, mask = enumerate_sequences(vocab_size, length, eos_id=eos_id)
    words = vocab_size if eos_id is None else vocab_size - 1
    ended = 0 if eos_id is None else sum(words**t for t in range(length))
    assert len(sequences) == words**length + ended
    samples = {tuple(s[m].tolist()) for s, m in zip(sequences, mask, strict=True)}
    assert len(samples) == len(sequences)
    assert (sequences[~mask] == 0).all()


def test_eos_mask_keeps_the_first_eos():
    mask = eos_mask(torch.tensor([[5, 1, 5, 1], [1, 1, 1, 1], [2, 2, 2, 2]]), 1)
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"vocab_size": 0, "length": 2}, "vocab_size must be at least 1; got 0"),
        ({"vocab_size": 2, "length": 0}, "length must be at least 1; got 0"),
        ({"vocab_size": 2, "length": 2, "eos_id": 2}, "eos_id must be a token in 0..1; got 2"),
        ({"vocab_size": 2, "length": 2, "eos_id": -1}, "eos_id must be a token in 0..1; got -1"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        enumerate_sequences(**arguments)
    with pytest.raises(ValueError, match=message):
        TabularPolicy(**arguments)


# --- probabilities -----------------------------------------------------------------------------


@pytest.mark.equation("1.2")
def test_sequence_log_prob_by_hand():
    log_probs = torch.tensor([[0.5, 0.25], [0.1, torch.nan]]).log()
    mask = torch.tensor([[True, True], [True, False]])
    expected = torch.tensor([0.125, 0.1]).log()
    torch.testing.assert_close(sequence_log_prob(log_probs, mask), expected)


@pytest.mark.equation("1.2")
@pytest.mark.parametrize("vocab_size, length, eos_id", WORLDS)
def test_probabilities_of_all_sequences_sum_to_one(vocab_size, length, eos_id):
    policy, sequences, mask, _ = world(vocab_size, length, eos_id)
    # The chain rule, walked through one sequence at a time by a dictionary of prefixes.
    total = 0.0
    for sequence, real in zip(sequences.tolist(), mask.tolist(), strict=True):
        row, log_prob = 0, 0.0
        for token, is_real in zip(sequence, real, strict=True):
            if is_real:
                log_prob += policy.logits[row].log_softmax(0)[token].item()
                row = vocab_size * row + token + 1
        whole = policy.sequence_log_prob(torch.tensor([sequence])).item()
        assert whole == pytest.approx(log_prob, abs=1e-12)
        total += math.exp(log_prob)
    assert total == pytest.approx(1, abs=1e-12)


def test_masked_log_probs_reach_neither_value_nor_gradient():
    log_probs = torch.tensor([[-1.0, torch.nan], [-2.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    sequence_log_prob(log_probs, mask).sum().backward()
    assert log_probs.grad.tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.tensor([[1, 1], [1, 1]]), "mask must be a bool tensor; got torch.int64"),
        (torch.tensor([[True, True]]), r"mask must have shape \(2, 2\); got \(1, 2\)"),
        (torch.tensor([[True, True], [False, False]]), "mask must have a real token in each row; got none in row 1"),
        (torch.tensor([[False, True], [True, True]]), "mask must be True on a prefix of each row; got a gap in row 0"),
    ],
)
def test_bad_masks_are_refused(mask, message):
    log_probs = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=message):
        sequence_log_prob(log_probs, mask)
    with pytest.raises(ValueError, match=message):
        state_visitation(log_probs, mask)
    with pytest.raises(ValueError, match=message):
        exact_values(log_probs, log_probs, log_probs.long(), mask, gamma=1.0)


# --- expectations ------------------------------------------------------------------------------


@pytest.mark.equation("3.2")
def test_expectation_by_hand():
    sequences = torch.tensor([[0], [1], [2]])
    log_probs = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    f = torch.tensor([10.0, 20.0, -4.0])
    expected = 0.2 * 10 + 0.3 * 20 - 0.5 * 4
    assert exact_expectation(lambda _: log_probs, f, sequences).item() == pytest.approx(expected)
    both = exact_expectation(lambda _: log_probs, torch.stack([f, f**2], dim=1), sequences)
    assert both.tolist() == pytest.approx([expected, 0.2 * 100 + 0.3 * 400 + 0.5 * 16])
    length = exact_expectation(lambda _: log_probs, lambda s: s[:, 0].double(), sequences)
    assert length.item() == pytest.approx(1.3)


@pytest.mark.equation("3.2")
def test_gradient_of_the_expectation_matches_finite_differences():
    policy, sequences, _, rewards = world(3, 2, 2)
    returns = rewards.sum(dim=1)

    def objective(logits):
        def log_prob(tokens):
            return torch.func.functional_call(policy, {"logits": logits}, (tokens,))

        log_probs = log_prob(sequences).log_softmax(-1).gather(-1, sequences[..., None])[..., 0]
        log_probs = sequence_log_prob(log_probs, eos_mask(sequences, 2))
        return exact_expectation(lambda _: log_probs, returns, sequences)

    assert torch.autograd.gradcheck(objective, policy.logits)
    through_method = exact_expectation(policy.sequence_log_prob, returns, sequences)
    assert through_method.item() == pytest.approx(objective(policy.logits).item())


@pytest.mark.equation("3.2")
def test_expectation_differentiates_f_too():
    policy, sequences, _, _ = world(3, 2, None)
    entropy = exact_expectation(policy.sequence_log_prob, lambda s: -policy.sequence_log_prob(s), sequences)
    (gradient,) = torch.autograd.grad(entropy, policy.logits)
    # Second route: H = H(root) + Σ_a π(a) H(child a), differentiated by small steps.
    step, row, column = 1e-6, 1, 2
    values = []
    for sign in (1, -1):
        logits = policy.logits.detach().clone()
        logits[row, column] += sign * step
        probs = logits.softmax(-1)
        entropies = -(probs * probs.log()).sum(-1)
        values.append(entropies[0] + (probs[0] * entropies[1:]).sum())
    slope = (values[0] - values[1]) / (2 * step)
    assert gradient[row, column].item() == pytest.approx(slope.item(), rel=1e-6)


def test_what_cannot_happen_does_not_count():
    logits = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    f = torch.tensor([1.0, 3.0, torch.inf], dtype=torch.float64)
    mean = exact_expectation(lambda _: logits.log_softmax(0), f, torch.arange(3))
    mean.backward()
    assert mean.item() == 2
    assert logits.grad.tolist() == [-0.5, 0.5, 0]


def test_an_incomplete_or_repeating_enumeration_is_refused():
    policy, sequences, mask, rewards = world(3, 2, 2)
    log_probs = policy.log_probs(sequences)
    for rows in (slice(1, None), [0, *range(len(sequences))]):
        with pytest.raises(ValueError, match="must sum to 1 within 1e-06; got "):
            exact_expectation(policy.sequence_log_prob, rewards[rows], sequences[rows])
        with pytest.raises(ValueError, match="must sum to 1 within 1e-06; got "):
            exact_values(log_probs[rows], rewards[rows], sequences[rows], mask[rows], gamma=1.0)
    nan = torch.full((2,), torch.nan)
    with pytest.raises(ValueError, match="must sum to 1 within 1e-06; got "):
        exact_expectation(lambda _: nan, torch.zeros(2), torch.zeros(2, 1))


def test_a_missing_sequence_of_probability_two_millionths_is_noticed():
    for missing, complete in ((2e-6, False), (1e-7, True)):
        log_probs = torch.tensor([1 - missing], dtype=torch.float64).log()
        if complete:
            exact_expectation(lambda _, x=log_probs: x, torch.ones(1), torch.zeros(1, 1))
            continue
        with pytest.raises(ValueError, match="must sum to 1 within 1e-06; got "):
            exact_expectation(lambda _, x=log_probs: x, torch.ones(1), torch.zeros(1, 1))


def test_expectation_refuses_wrong_shapes():
    policy, sequences, _, rewards = world(3, 2, None)
    with pytest.raises(ValueError, match=r"log_prob_fn\(sequences\) must have shape \(9,\); got \(9, 2\)"):
        exact_expectation(policy.log_probs, rewards, sequences)
    with pytest.raises(ValueError, match=r"f must have shape \(9, ...\); got \(2, 9\)"):
        exact_expectation(policy.sequence_log_prob, rewards.T, sequences)


def test_moments_by_hand():
    log_probs = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    estimates = torch.tensor([[0.0, 1.0], [1.0, 5.0]], dtype=torch.float64)
    mean, variance = exact_moments(log_probs, estimates)
    assert mean.tolist() == pytest.approx([0.3, 2.2])
    assert variance.tolist() == pytest.approx([0.21, 0.21 * 16])


# --- gradients of single samples ---------------------------------------------------------------


@pytest.mark.parametrize("vocab_size, length, eos_id", WORLDS)
def test_score_vectors_are_one_hot_minus_probabilities(vocab_size, length, eos_id):
    policy, sequences, mask, _ = world(vocab_size, length, eos_id)
    scores = per_sample_gradients(policy.log_probs(sequences), policy.logits)
    rows, probs = policy.rows(sequences), policy.logits.detach().softmax(-1)
    expected = torch.zeros(*sequences.shape, *policy.logits.shape, dtype=torch.float64)
    for n, t in mask.nonzero().tolist():
        expected[n, t, rows[n, t]] = -probs[rows[n, t]]
        expected[n, t, rows[n, t], sequences[n, t]] += 1
    torch.testing.assert_close(scores, expected.flatten(2))


def test_several_parameters_are_concatenated_and_unused_ones_get_zero():
    a = torch.tensor([2.0, 3.0], requires_grad=True)
    b = torch.tensor([[5.0]], requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    gradients = per_sample_gradients(torch.stack([a[0] * b[0, 0], a.sum()]), [a, b, unused])
    assert gradients.tolist() == [[5, 0, 2, 0, 0], [1, 1, 0, 0, 0]]


def test_gradients_of_a_constant_are_refused():
    with pytest.raises(ValueError, match="outputs must be a tensor that depends on params; got a constant"):
        per_sample_gradients(torch.ones(2), torch.ones(2, requires_grad=True))


@pytest.mark.parametrize("vocab_size, length, eos_id", WORLDS)
def test_score_function_estimator_has_the_gradient_as_its_mean(vocab_size, length, eos_id):
    policy, sequences, _, rewards = world(vocab_size, length, eos_id)
    mask = eos_mask(sequences, eos_id)
    returns = torch.where(mask, rewards, 0).sum(dim=1)
    objective = exact_expectation(policy.sequence_log_prob, returns, sequences)
    (exact,) = torch.autograd.grad(objective, policy.logits)
    log_probs = policy.sequence_log_prob(sequences)
    scores = per_sample_gradients(log_probs, policy.logits)
    mean, variance = exact_moments(log_probs.detach(), scores * returns[:, None])
    torch.testing.assert_close(mean, exact.flatten())
    assert (variance > 0).any()
    torch.testing.assert_close(exact_moments(log_probs.detach(), scores)[0], torch.zeros_like(mean))


# --- the KL-regularised optimum ----------------------------------------------------------------


@pytest.mark.equation("8.4")
def test_optimal_policy_by_hand():
    ref = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    rewards = torch.tensor([2 * math.log(6), 0.0], dtype=torch.float64)
    # exp(r/β) = (6, 1): weights 1.5 and 0.75.
    probs = optimal_policy(ref, rewards, kl_coef=2.0).exp()
    assert probs.tolist() == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.equation("8.4")
@pytest.mark.parametrize("kl_coef", [0.1, 1.0, 5.0])
def test_optimal_policy_beats_every_other(kl_coef):
    generator = seeded(1)
    ref = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(0)
    rewards = torch.randn(9, generator=generator, dtype=torch.float64)

    def objective(log_probs):
        return (log_probs.exp() * (rewards - kl_coef * (log_probs - ref))).sum()

    best = optimal_policy(ref, rewards, kl_coef=kl_coef)
    log_partition = (ref.exp() * (rewards / kl_coef).exp()).sum().log()
    torch.testing.assert_close(objective(best), kl_coef * log_partition)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(50):
            noise = size * torch.randn(9, generator=generator, dtype=torch.float64)
            assert objective((best + noise).log_softmax(0)) < objective(best)


@pytest.mark.equation("8.4")
def test_optimal_policy_in_its_limits():
    ref = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]], dtype=torch.float64).log()
    rewards = torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.0, 9.0]], dtype=torch.float64)
    timid = optimal_policy(ref, rewards, kl_coef=1e9).exp()
    torch.testing.assert_close(timid, ref.exp())
    bold = optimal_policy(ref, rewards, kl_coef=1e-3).exp()
    # What the reference never says stays unsaid, whatever it would earn.
    torch.testing.assert_close(bold, torch.tensor([[0.0, 1, 0], [0, 1, 0]]).double())


def test_optimal_policy_refuses_bad_input():
    ref = torch.full((4,), 0.25).log()
    for kl_coef in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"kl_coef must be positive; got {kl_coef}"):
            optimal_policy(ref, torch.zeros(4), kl_coef=kl_coef)
    with pytest.raises(ValueError, match="rewards"):
        optimal_policy(ref, torch.zeros(3), kl_coef=1.0)
    with pytest.raises(ValueError, match=r"exp\(ref_log_probs\) over its last axis must sum to 1"):
        optimal_policy(ref[:3], torch.zeros(3), kl_coef=1.0)


def test_sequence_kl_by_hand():
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log().requires_grad_()
    q = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    kl = sequence_kl(p, q)
    kl.backward()
    assert kl.item() == pytest.approx(0.5 * math.log(2))
    assert p.grad.isfinite().all()
    assert sequence_kl(q, p).item() == math.inf
    with pytest.raises(ValueError, match=r"log_q must have shape \(3,\); got \(2,\)"):
        sequence_kl(p, q[:2])
    with pytest.raises(ValueError, match="must sum to 1 within 1e-06; got "):
        sequence_kl(p, q - 1)


def test_sequence_kl_is_the_sum_over_states_of_token_kl():
    policy, sequences, mask, _ = world(4, 3, 0)
    reference = TabularPolicy(4, 3, eos_id=0, generator=seeded(9))
    with torch.no_grad():
        log_p, log_q = (x(sequences).log_softmax(-1) for x in (policy, reference))
        token_kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        visits = state_visitation(policy.log_probs(sequences), mask)
        whole = sequence_kl(policy.sequence_log_prob(sequences), reference.sequence_log_prob(sequences))
    states = distinct_states(sequences, mask)
    torch.testing.assert_close(whole, (visits * token_kl)[states].sum())


# --- V, Q, A and the states --------------------------------------------------------------------


def test_values_by_hand():
    """Two coins; the second is read only if the first shows 1. EOS is token 0."""
    sequences, mask = enumerate_sequences(2, 2, eos_id=0)  # 0., 10, 11
    log_probs = torch.tensor([[0.4, torch.nan], [0.6, 0.5], [0.6, 0.5]]).double().log()
    rewards = torch.tensor([[1.0, torch.nan], [2.0, 10.0], [2.0, 20.0]]).double()
    v, q, a = exact_values(log_probs, rewards, sequences, mask, gamma=0.5)
    later = 0.5 * 10 + 0.5 * 20
    root = 0.4 * 1 + 0.6 * (2 + 0.5 * later)
    assert v.tolist() == [pytest.approx(x) for x in ([root, 0], [root, later], [root, later])]
    assert q.tolist() == [pytest.approx(x) for x in ([1, 0], [9.5, 10], [9.5, 20])]
    torch.testing.assert_close(a, q - v)


def bellman(policy, sequences, mask, rewards, gamma):
    """V of every prefix, by recursion over a dictionary: no grouping, no tensors."""
    table = {}
    for sequence, real, reward in zip(sequences.tolist(), mask.tolist(), rewards.tolist(), strict=True):
        for t in range(sum(real)):
            table[tuple(sequence[: t + 1])] = reward[t]

    def value(prefix, row):
        if len(prefix) == policy.length or policy.eos_id in prefix:
            return 0.0
        probs = policy.logits[row].softmax(0).tolist()
        total = 0.0
        for token, prob in enumerate(probs):
            child = (*prefix, token)
            after = value(child, policy.vocab_size * row + token + 1)
            total += prob * (table[child] + gamma * after)
        return total

    return value


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("vocab_size, length, eos_id", WORLDS)
def test_values_satisfy_the_bellman_equation(vocab_size, length, eos_id, gamma):
    policy, sequences, mask, rewards = world(vocab_size, length, eos_id)
    log_probs = policy.log_probs(sequences).detach()
    v, q, a = exact_values(log_probs, rewards, sequences, mask, gamma=gamma)
    value = bellman(policy, sequences, mask, rewards, gamma)
    rows = policy.rows(sequences)
    for n, t in mask.nonzero().tolist():
        prefix = tuple(sequences[n, :t].tolist())
        assert v[n, t].item() == pytest.approx(value(prefix, rows[n, t].item()), abs=1e-12)
        child = (*prefix, sequences[n, t].item())
        after = value(child, vocab_size * rows[n, t].item() + child[-1] + 1)
        expected = rewards[n, t].item() + gamma * after
        assert q[n, t].item() == pytest.approx(expected, abs=1e-12)
    assert (v[~mask] == 0).all() and (q[~mask] == 0).all() and (a[~mask] == 0).all()
    # An advantage is zero on average over the actions of any state, so also over sequences.
    mean = exact_expectation(policy.sequence_log_prob, a, sequences)
    torch.testing.assert_close(mean.detach(), torch.zeros(length, dtype=torch.float64))


def test_the_first_value_is_the_objective_and_differentiates():
    policy, sequences, mask, rewards = world(3, 3, 2)
    returns = torch.where(mask, rewards, 0) @ 0.9 ** torch.arange(3).double()
    objective = exact_expectation(policy.sequence_log_prob, returns, sequences)
    v = exact_values(policy.log_probs(sequences), rewards, sequences, mask, gamma=0.9)[0]
    torch.testing.assert_close(v[:, 0], objective.expand(len(v)))
    torch.testing.assert_close(
        torch.autograd.grad(v[0, 0], policy.logits), torch.autograd.grad(objective, policy.logits)
    )


def test_scores_land_on_the_last_real_token():
    policy, sequences, mask, _ = world(3, 3, 2)
    scores = torch.randn(len(sequences), generator=seeded(2), dtype=torch.float64)
    rewards = torch.zeros(sequences.shape, dtype=torch.float64)
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] = scores
    log_probs = policy.log_probs(sequences)
    short = exact_values(log_probs, scores, sequences, mask, gamma=0.9)
    full = exact_values(log_probs, rewards, sequences, mask, gamma=0.9)
    torch.testing.assert_close(short, full)
    with pytest.raises(ValueError, match="rewards"):
        exact_values(log_probs, scores[1:], sequences, mask, gamma=0.9)


def test_prefixes_of_probability_zero_have_values():
    sequences, _ = enumerate_sequences(2, 2)
    log_probs = torch.tensor([[0.0, 0.5], [0.0, 0.5], [1.0, 0.2], [1.0, 0.8]]).double().log()
    rewards = torch.tensor([[0.0, 4.0], [0.0, 8.0], [0.0, 1.0], [0.0, 2.0]]).double()
    v, q, _ = exact_values(log_probs, rewards, sequences, gamma=1.0)
    assert v[:, 0].tolist() == pytest.approx([1.8] * 4)
    assert v[:, 1].tolist() == pytest.approx([6, 6, 1.8, 1.8])
    assert q[:, 0].tolist() == pytest.approx([6, 6, 1.8, 1.8])


def test_values_match_the_mean_of_sampled_returns():
    policy, sequences, mask, rewards = world(3, 3, 2)
    v, q, _ = exact_values(policy.log_probs(sequences), rewards, sequences, mask, gamma=1.0)
    samples, _ = policy.sample(20_000, seeded(3))
    rows = (samples[:, None] == sequences).all(-1).int().argmax(1)
    returns = torch.where(mask, rewards, 0).sum(1)[rows]
    for chosen, expected in (
        (samples[:, 0] >= 0, v[0, 0]),
        (samples[:, 0] == 1, q[sequences[:, 0] == 1][0, 0]),
    ):
        x = returns[chosen]
        assert abs((x.mean() - expected) / (x.std() / len(x) ** 0.5)) < 4


def test_prefix_ids_and_distinct_states_by_hand():
    sequences, mask = enumerate_sequences(2, 2, eos_id=0)  # 0., 10, 11
    assert prefix_ids(sequences).tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 2]]
    assert distinct_states(sequences, mask).int().tolist() == [[1, 0], [0, 1], [0, 0]]
    shuffled = distinct_states(sequences.flip(0), mask.flip(0))
    assert shuffled.int().tolist() == [[1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("vocab_size, length, eos_id", WORLDS)
def test_visits_add_up_to_the_expected_length(vocab_size, length, eos_id):
    policy, sequences, mask, _ = world(vocab_size, length, eos_id)
    log_probs = policy.log_probs(sequences).detach()
    visits = state_visitation(log_probs, mask)
    states = distinct_states(sequences, mask)
    expected = exact_expectation(policy.sequence_log_prob, mask.double(), sequences)
    torch.testing.assert_close(torch.where(states, visits, 0).sum(0), expected.detach())
    words = vocab_size if eos_id is None else vocab_size - 1
    assert states.sum().item() == sum(words**t for t in range(length))
    assert (visits[~mask] == 0).all()


def test_visitation_survives_impossible_tokens():
    log_probs = torch.tensor([[0.0, 0.5, 0.5], [1.0, 1.0, 1.0]]).log()
    assert state_visitation(log_probs).tolist() == [[1, 0, 0], [1, 1, 1]]


def test_single_precision_is_summed_in_double():
    policy, sequences, mask, rewards = world(6, 4, 0)
    with torch.no_grad():
        log_probs = policy.log_probs(sequences)
    exact = exact_values(log_probs, rewards, sequences, mask, gamma=1.0)
    rough = exact_values(log_probs.float(), rewards.float(), sequences, mask, gamma=1.0)
    assert rough[0].dtype == torch.float64
    torch.testing.assert_close(rough, exact, rtol=1e-5, atol=1e-5)


# --- the tabular model -------------------------------------------------------------------------


def test_each_prefix_has_its_own_row():
    policy = TabularPolicy(3, 3)
    sequences, _ = policy.enumerate()
    rows = policy.rows(sequences)
    assert policy.logits.shape == (1 + 3 + 9, 3) and policy.logits.dtype == torch.float64
    assert rows.unique().tolist() == list(range(13))
    assert policy.rows(torch.tensor([[2, 1, 0]])).tolist() == [[0, 3, 11]]
    assert torch.equal(policy(sequences)[:, 2], policy.logits[rows[:, 2]])
    assert torch.equal(policy(sequences[:, :2]), policy(sequences)[:, :2])


def test_scale_zero_is_uniform():
    policy = TabularPolicy(4, 2, scale=0)
    log_probs = policy.sequence_log_prob(policy.enumerate()[0])
    torch.testing.assert_close(log_probs.exp(), torch.full((16,), 1 / 16, dtype=torch.float64))


@pytest.mark.parametrize("vocab_size, length, eos_id", [(3, 2, None), (3, 3, 2), (3, 3, 0)])
def test_sampled_frequencies_match_the_probabilities(vocab_size, length, eos_id):
    policy, sequences, mask, _ = world(vocab_size, length, eos_id)
    n = 20_000
    samples, sample_mask = policy.sample(n, seeded(4))
    match = (samples[:, None] == sequences).all(-1)
    assert (match.sum(1) == 1).all()
    assert torch.equal(mask[match.int().argmax(1)], sample_mask)
    probs = policy.sequence_log_prob(sequences).exp().detach()
    z = (match.sum(0) - n * probs) / (n * probs * (1 - probs)).sqrt()
    assert z.abs().max() < 4


def test_tokens_after_eos_change_nothing():
    policy = TabularPolicy(3, 3, eos_id=2, generator=seeded())
    clean, junk = torch.tensor([[1, 2, 0]]), torch.tensor([[1, 2, -100]])
    assert torch.equal(policy.log_probs(clean), policy.log_probs(junk))
    assert policy.log_probs(clean)[0, 2] == 0


@pytest.mark.parametrize(
    "sequences, message",
    [
        (torch.tensor([[0, 3]]), r"sequences must hold tokens 0..2; got 0..3"),
        (torch.tensor([[-1, 0]]), "sequences must hold tokens 0..2; got -1..0"),
        (torch.tensor([0, 1]), r"sequences must have shape \(N, 1..2\); got \("),
        (torch.zeros(1, 3, dtype=torch.long), r"sequences must have shape \(N, 1..2\); got \("),
    ],
)
def test_the_tabular_model_refuses_bad_tokens(sequences, message):
    with pytest.raises(ValueError, match=message):
        TabularPolicy(3, 2)(sequences)


# --- Best of n ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_against_all_that_n_draws_can_be(n):
    """Every n-tuple of five outcomes, two of them equal in reward: who is highest is kept, equals in turn."""
    probs = torch.tensor([0.1, 0.25, 0.3, 0.15, 0.2], dtype=torch.float64)
    rewards = [2.0, 0.5, 2.0, -1.0, 0.0]
    expected = torch.zeros(5, dtype=torch.float64)
    for draws in itertools.product(range(5), repeat=n):
        highest = [i for i in draws if rewards[i] == max(rewards[j] for j in draws)]
        chance = math.prod(probs[i].item() for i in draws)
        for i in highest:  # as likely to be kept as to be drawn
            expected[i] += chance / len(highest)
    found = best_of_n(probs.log(), torch.tensor(rewards), n).exp()
    torch.testing.assert_close(found, expected)


def test_best_of_n_s_kl_keeps_its_bound():
    log_probs, rewards = torch.randn(40, generator=seeded(), dtype=torch.float64).log_softmax(0), torch.arange(40.0)
    for n in (2, 8, 64, 1024):
        best = best_of_n(log_probs, rewards, n)
        kl = sequence_kl(best, log_probs).item()
        assert best.exp().sum().item() == pytest.approx(1) and 0 < kl < math.log(n) - (n - 1) / n


def test_best_of_n_refuses_what_it_cannot_mean():
    log_probs = torch.zeros(4).log_softmax(0)
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        best_of_n(log_probs, torch.zeros(4), 0)
    with pytest.raises(ValueError, match="rewards must have shape"):
        best_of_n(log_probs, torch.zeros(3), 2)
    with pytest.raises(ValueError, match="must sum to 1"):
        best_of_n(log_probs + 0.1, torch.zeros(4), 2)
