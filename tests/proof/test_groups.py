"""Groups. Two responses to a prompt, each the other's baseline: the trainers' own credit on all 1,600 ordered pairs of
the 40 responses that a GPT-2 over 4 tokens can give, so that the expected gradient is a sum; and where a run ends.
"""

import copy

import pytest
import torch

from proof.language_model import (
    EOS,
    PROMPTS,
    everything_after,
    four_token_tokenizer,
    reference_model,
    reward_table,
    score,
    sequence_log_probs,
    spread,
    texts,
)
from rlhf_lessons.exact import optimal_policy
from rlhf_lessons.group_trainers import GRPOTrainer, RLOOTrainer
from rlhf_lessons.rollout import Rollout, response_log_probs

BETA = 0.7
PROMPT = PROMPTS[0]


def trainer_for(method, *, dtype=torch.float32, moved=0.0, **settings):
    """A group trainer on the four-token model; its policy `moved` away from the reference."""
    defaults = dict(max_new_tokens=3, missing_eos_penalty=0.0, kl_coef=BETA, samples_per_prompt=2, device="cpu")
    reference = reference_model(dtype=dtype)
    policy = spread(copy.deepcopy(reference), moved, seed=1)
    return method(method.settings(**(defaults | settings)), policy, reference, score, PROMPTS, four_token_tokenizer())


@torch.no_grad()
def all_pairs(trainer) -> Rollout:
    """Every ordered pair of responses to the prompt as a group: 3,200 rows."""
    tokens, attention_mask, mask = everything_after(PROMPT)
    first, second = torch.cartesian_prod(torch.arange(len(mask)), torch.arange(len(mask))).unbind(1)
    rows = torch.stack([first, second], dim=1).flatten()
    ended = (tokens[:, -mask.shape[1] :] == EOS).any(dim=1)
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    facts = dict(tokens=tokens, attention_mask=attention_mask, response_mask=mask, ended=ended)
    scores = torch.tensor([reward_table()[PROMPT, text] for text in texts()], dtype=torch.float64)
    everything = Rollout(
        **facts, sampler_log_probs=zeros, log_probs=zeros, ref_log_probs=zeros, scores=scores, prompt_length=1,
        group=torch.arange(len(mask)), records=({},) * len(mask),
    )  # fmt: skip
    log_probs = response_log_probs(trainer.policy, everything, trainer.config)
    ref_log_probs = response_log_probs(trainer.reference, everything, trainer.config)
    known = vars(everything) | dict(log_probs=log_probs, ref_log_probs=ref_log_probs)
    pairs = Rollout(**known).rows(rows)
    return Rollout(**vars(pairs) | {"group": torch.arange(len(rows) // 2).repeat_interleave(2)})


def gradients(trainer, rewards):
    """∇ Σ_y π(y) R(y), R held fixed, and the expectation of mean_i A_i ∇ log π(y_i) over pairs drawn from π²."""
    pairs = all_pairs(trainer)
    advantages = trainer.credit(pairs).advantages[:, 0].view(-1, 2)
    tokens, attention_mask, mask = everything_after(PROMPT)
    facts = dict(tokens=tokens, attention_mask=attention_mask, response_mask=mask, ended=mask[:, 0], prompt_length=1)
    zeros = torch.zeros(mask.shape)
    single = Rollout(
        **facts, sampler_log_probs=zeros, log_probs=zeros, ref_log_probs=zeros, scores=zeros[:, 0],
        group=torch.arange(len(mask)), records=({},) * len(mask),
    )  # fmt: skip
    log_probs = response_log_probs(trainer.policy, single, trainer.config).sum(dim=1)
    probs = log_probs.detach().exp()
    weights = (probs[:, None] * probs[None]).reshape(-1, 1) * advantages / 2
    rows = torch.cartesian_prod(torch.arange(len(mask)), torch.arange(len(mask)))
    parameters = list(trainer.policy.parameters())

    def flat(loss):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    return flat((log_probs.exp() * rewards(log_probs.detach())).sum()), flat((weights * log_probs[rows]).sum())


def scores_alone(log_probs):
    return torch.tensor([reward_table()[PROMPT, text] for text in texts()], dtype=torch.float64)


def test_rloo_s_expected_gradient_is_that_of_the_penalised_reward(claim):
    trainer = trainer_for(RLOOTrainer, dtype=torch.float64, moved=0.1)
    reference = sequence_log_probs(trainer.reference, PROMPT)
    exact, obtained = gradients(trainer, lambda log_probs: scores_alone(None) - BETA * (log_probs - reference))
    claim.equal("groups.rloo", "RLOO, KL paid out of the reward: E[mean A ∇log π] = ∇(E[R] − β KL)", exact, obtained)


def test_grpo_without_a_scale_is_short_by_the_group_s_size(claim):
    trainer = trainer_for(GRPOTrainer, dtype=torch.float64, moved=0.1, advantage_scale="none", kl_in="loss")
    exact, obtained = gradients(trainer, scores_alone)
    text = "GRPO's mean includes the response itself: G/(G−1) E[mean A ∇log π] = ∇E[R], G = 2"
    claim.equal("groups.grpo_none", text, exact, 2 * obtained)


def test_dividing_by_the_group_s_deviation_turns_the_gradient(claim):
    """With two responses the scaled advantages are ±1: the sign of a comparison, whatever its size."""
    trainer = trainer_for(GRPOTrainer, dtype=torch.float64, moved=0.1, advantage_scale="group", kl_in="loss")
    exact, obtained = gradients(trainer, scores_alone)
    cosine = torch.nn.functional.cosine_similarity(exact, obtained, dim=0)
    text = "GRPO over its group's deviation: its expected gradient is no multiple of ∇E[R] (cosine)"
    claim.biased("groups.grpo_group", text, 1.0, cosine, 0.01, digits=3)


@pytest.mark.slow
@pytest.mark.equation("8.4")
def test_rloo_converges_to_the_optimal_policy(claim):
    settings = dict(
        num_iterations=150, batch_size=256, minibatch_size=128, ppo_epochs=2, learning_rate=2e-3, samples_per_prompt=8,
        kl_coef=1.4, seed=0,
    )  # fmt: skip
    trainer = trainer_for(RLOOTrainer, **settings)
    trainer.train()
    for prompt in PROMPTS:
        ref = sequence_log_probs(reference_model(), prompt)
        rewards = torch.tensor([reward_table()[prompt, text] for text in texts()], dtype=torch.float64)
        best = optimal_policy(ref, rewards, kl_coef=1.4)
        far, found = (
            0.5 * (p.exp() - best.exp()).abs().sum() for p in (ref, sequence_log_probs(trainer.policy, prompt))
        )
        text = f"total variation from π* after RLOO with β = 1.4, prompt “{prompt}” (the reference is {far:.2f} away)"
        claim.equal(f"groups.rloo_{prompt.replace(' ', '_')}", text, 0.0, found, 0.05, digits=3)
