"""Whole trainer. `PPOTrainer`, as it runs on a real model, on a GPT-2 over 4 tokens whose 40 responses to each of two
prompts can be listed: where it ends, beside the exact optimum π* ∝ π_ref·exp(r/β) of a random reward table.
"""

import pytest
import torch

from proof.language_model import (
    PROMPTS,
    reference_model,
    reward_table,
    score,
    sequence_log_probs,
    texts,
    trainer_for,
)
from rlhf_lessons.exact import optimal_policy

SETTINGS = dict(
    num_iterations=150,
    batch_size=256,
    minibatch_size=128,
    ppo_epochs=2,
    learning_rate=2e-3,
    lr_schedule="linear",
    gae_lambda=0.95,
)
BETAS = [1.0, 1.4, 2.0]
RUNS = [(kl_coef, seed) for kl_coef in BETAS for seed in range(2)]  # the first of which is not slow


def table(prompt):
    """The rewards of a prompt's 40 responses."""
    return torch.tensor([reward_table()[prompt, text] for text in texts()], dtype=torch.float64)


def distance(p, q):
    """Total variation ½ Σ |p − q| of two distributions given by their logs."""
    return 0.5 * (p.exp() - q.exp()).abs().sum()


def trained(*, kl_coef, seed):
    trainer = trainer_for(score, kl_coef=kl_coef, seed=seed, **SETTINGS)
    trainer.train()
    return trainer.policy.lm


def test_the_world_is_what_it_says():
    reference = reference_model()
    assert len(set(texts())) == 40
    for prompt in PROMPTS:
        log_probs = sequence_log_probs(reference, prompt)
        assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-6)
        for kl_coef in BETAS:
            best = optimal_policy(log_probs, table(prompt), kl_coef=kl_coef)
            assert distance(log_probs, best) > 0.1  # far enough that staying put would be seen


@pytest.mark.equation("8.4")
@pytest.mark.parametrize(
    ("kl_coef", "seed"), [RUNS[0], *(pytest.param(*run, marks=pytest.mark.slow) for run in RUNS[1:])]
)
def test_converges_to_the_optimal_policy(claim, kl_coef, seed):
    reference, policy = reference_model(), trained(kl_coef=kl_coef, seed=seed)
    for prompt in PROMPTS:
        ref = sequence_log_probs(reference, prompt)
        best = optimal_policy(ref, table(prompt), kl_coef=kl_coef)
        found = distance(sequence_log_probs(policy, prompt), best)
        text = (
            f"total variation from π* after PPO with β = {kl_coef:g}, seed {seed}, prompt “{prompt}” "
            f"(the reference is {distance(ref, best):.2f} away)"
        )
        slug = prompt.replace(" ", "_")
        claim.equal(f"trainer.beta_{kl_coef:g}_seed_{seed}_{slug}", text, 0.0, found, 0.05, digits=3)


@pytest.mark.slow
def test_a_large_coefficient_stays_at_the_reference(claim):
    reference = reference_model()
    policy = trained(kl_coef=50.0, seed=0)
    for prompt in PROMPTS:
        found = distance(sequence_log_probs(policy, prompt), sequence_log_probs(reference, prompt))
        text = f"total variation from the reference with β = 50, prompt “{prompt}”"
        claim.equal(f"trainer.large_beta_{prompt.replace(' ', '_')}", text, 0.0, found, 0.05, digits=3)


@pytest.mark.slow
def test_without_the_leash_it_may_lock_onto_a_suboptimal_response(claim):
    # Nothing calls back what is no longer sampled: a likely, fairly good response crowds out the better ones.
    policy, prompt = trained(kl_coef=0.0, seed=0), "bad bad"
    log_probs, rewards = sequence_log_probs(policy, prompt), table(prompt)
    favourite = int(log_probs.argmax())
    text = f"with β = 0 the policy puts all on one response to “{prompt}”, “{texts()[favourite]}”"
    claim.equal("trainer.collapse", text, 1.0, log_probs.exp().max(), 0.05, digits=2)
    seen = sequence_log_probs(reference_model(), prompt).exp() > 0.01
    text = "though the reference gives one with a higher reward in more than 1 % of its samples: premature collapse"
    claim.biased("trainer.collapse_reward", text, rewards[seen].max(), rewards[favourite], 0.1, digits=3)
