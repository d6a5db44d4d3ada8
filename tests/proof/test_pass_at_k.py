"""Checkable rewards. pass@k from n samples, averaged over all outcomes of the n samples; and the probability of a right
answer, by teacher forcing, against the sum over all texts that a GPT-2 over 4 tokens can give.
"""

import math
from itertools import combinations, product

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
