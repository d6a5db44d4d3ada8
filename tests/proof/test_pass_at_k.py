"""Checkable rewards. pass@k from n samples, averaged over all outcomes of the n samples; the probability of a right
answer, by teacher forcing, against the sum over all texts that a GPT-2 over 4 tokens can give; what a leash does to the
odds of a right answer, and what a step does to the entropy.
"""

import math
from itertools import combinations, product

import pytest
import torch

from proof.language_model import (
    EOS,
    LENGTH,
    PROMPTS,
    everything_after,
    four_token_tokenizer,
    reference_model,
    sequence_log_probs,
    texts,
)
from rlhf_lessons.exact import optimal_policy
from rlhf_lessons.policy_gradient import entropy
from rlhf_lessons.scoring import pass_at_k, text_log_probs

PROBABILITIES = (0.02, 0.25, 0.7)


def expectation(estimate, p, n, k):
    """Σ_c C(n, c) p^c (1 − p)^(n − c) estimate(c): every number of right samples, with its binomial probability."""
    counts = range(n + 1)
    rows = torch.tensor([[True] * c + [False] * (n - c) for c in counts])
    weights = torch.tensor([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in counts], dtype=torch.float64)
    return (weights * estimate(rows, k)).sum()


def plugged_in(rows, k):
    """The share of right samples put in p's place."""
    return 1 - (1 - rows.double().mean(dim=1)) ** k


@pytest.mark.equation("15.1")
def test_the_estimate_of_pass_at_k_is_unbiased(claim):
    worlds = [(p, n, k) for p in PROBABILITIES for n in (1, 4, 16, 64) for k in (1, 4, 16, 64) if k <= n]
    exact = [1 - (1 - p) ** k for p, _, k in worlds]
    found = [expectation(pass_at_k, *world) for world in worlds]
    text = "pass@k from n samples, over every number of right ones: E[1 − C(n−c, k)/C(n, k)] = 1 − (1 − p)^k"
    claim.equal("checkable.pass_at_k", text, exact, found, 1e-12)


def test_the_share_of_right_samples_in_p_s_place_is_not(claim):
    worlds = [(p, n, n) for p in PROBABILITIES[:2] for n in (4, 16)]
    exact, found = [1 - (1 - p) ** k for p, _, k in worlds], [expectation(plugged_in, *world) for world in worlds]
    text = "1 − (1 − c/n)^k with k = n: its expectation is not pass@k"
    claim.biased("checkable.plugged_in", text, exact, found, 0.01, digits=4)


@pytest.mark.equation("15.1")
def test_the_estimate_is_the_mean_over_all_choices_of_k_samples(claim):
    """Counted one by one, with no binomial coefficient in it."""
    rows = torch.tensor(list(product([False, True], repeat=7)))

    def share(k):
        return torch.stack([rows[:, list(c)].any(dim=1) for c in combinations(range(7), k)]).double().mean(dim=0)

    exact = [share(k) for k in range(1, 8)]
    found = [pass_at_k(rows, k) for k in range(1, 8)]
    text = "pass@k is the share of all choices of k of the n samples that hold a right one, n = 7"
    claim.equal("checkable.choices", text, exact, found, 1e-12)


def test_the_probability_of_a_finished_text_needs_no_sample(claim):
    """Of texts that a response length cuts off there is no such probability: they are left out."""
    lm, tokenizer = reference_model(dtype=torch.float64), four_token_tokenizer()
    finished = [i for i, row in enumerate(everything_after(PROMPTS[0])[0][:, -LENGTH:]) if EOS in row]
    responses = [texts()[i] for i in finished]
    exact = [sequence_log_probs(lm, prompt)[finished] for prompt in PROMPTS]
    asked = [prompt for prompt in PROMPTS for _ in responses]
    found = text_log_probs(lm, tokenizer, asked, responses * len(PROMPTS), batch_size=7)
    text = "teacher forcing, EOS included: log π(y|x) of every text that ends, two prompts of different lengths"
    claim.equal("checkable.text_log_probs", text, torch.cat(exact), found)


def test_a_leash_multiplies_the_odds_of_a_right_answer(claim):
    """Rewards 0 and 1, several texts right: all of them gain alike, and no prompt loses."""
    generator = torch.Generator().manual_seed(3)
    exact, found = [], []
    for beta in (0.2, 1.0, 5.0):
        law = torch.randn(12, generator=generator, dtype=torch.float64).log_softmax(-1)
        right = torch.arange(12) < 3
        best = optimal_policy(law, right.double(), kl_coef=beta).exp()
        before, after = law.exp()[right].sum(), best[right].sum()
        exact.append(torch.tensor(1 / beta, dtype=torch.float64))
        found.append(torch.log(after / (1 - after) * (1 - before) / before))
        assert after > before
    text = "π* for rewards 0 and 1: the log-odds of a right answer grow by 1/β, for every prompt"
    claim.equal("checkable.odds", text, exact, found, 1e-12)


@pytest.mark.parametrize("natural", [False, True])
def test_the_entropy_falls_by_a_covariance(claim, natural):
    """Prompts drawn with chances d, answers of one token: the change of H along a step, by autograd and by formula."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    rewards = (torch.rand(5, 7, generator=generator) < 0.4).double()
    d = torch.rand(5, generator=generator, dtype=torch.float64).softmax(-1)
    pi = logits.softmax(-1)
    (uphill,) = torch.autograd.grad((d[:, None] * pi * rewards).sum(), logits, retain_graph=True)
    advantages = (rewards - (pi * rewards).sum(1, keepdim=True)).detach()
    step = advantages if natural else uphill
    exact = (torch.autograd.grad(entropy(logits).sum(), logits)[0] * step).sum(1)
    pi = pi.detach()
    other = advantages if natural else d[:, None] * pi * advantages
    found = -((pi * pi.log() * other).sum(1) - (pi * pi.log()).sum(1) * (pi * other).sum(1))
    ways = ("vanilla", "−d(s) Cov(log π, π A)"), ("natural", "−Cov(log π, A)")
    name, formula = ways[natural]
    claim.equal(
        f"checkable.entropy_{name}", f"{name} gradient: dH(s)/dη = {formula}, in every state", exact, found, 1e-12
    )
