"""A GPT-2 over four tokens: the real sampler and trainer run on it, and everything it can say can be listed."""

import copy
import functools

import torch

from rlhf_lessons.exact import enumerate_sequences
from rlhf_lessons.models import CausalLMWithValueHead, new_causal_lm
from rlhf_lessons.policy_gradient import action_log_probs
from rlhf_lessons.rollout import reference_logits
from rlhf_lessons.trainer import PPOConfig, PPOTrainer

WORDS = ["<pad>", "<eos>", "good", "bad"]
EOS = 1
PROMPTS = ["good", "bad bad"]  # of two lengths, so that one is padded
LENGTH = 3


@functools.cache
def four_token_tokenizer():
    """Words "good" and "bad", EOS, and the padding, which this policy may say like any other word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def reference_model(*, seed: int = 0, dtype=torch.float32):
    """A random GPT-2 of one layer, its weights spread enough that its distribution is far from uniform."""
    model = new_causal_lm(four_token_tokenizer(), layers=1, width=16, heads=2, context=16, seed=seed)
    return spread(model, 0.15, seed=seed).to(dtype)


@torch.no_grad()
def spread(model, size: float, *, seed: int):
    """Add N(0, size²) to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    return model


@functools.cache
def reward_table() -> dict[tuple[str, str], float]:
    """A random reward N(0, 1) for each prompt and each of the 40 responses to it."""
    keys = [(prompt, text) for prompt in PROMPTS for text in texts()]
    rewards = torch.randn(len(keys), generator=torch.Generator().manual_seed(0)).tolist()
    return dict(zip(keys, rewards, strict=True))


def score(prompts, responses):
    """The table's entries: a score function of texts, as the trainer takes it."""
    return [reward_table()[pair] for pair in zip(prompts, responses, strict=True)]


def trainer_for(score_fn, *, seed: int = 0, dtype=torch.float32, **settings) -> PPOTrainer:
    """The package's trainer on this model; γ = 1, no whitening, no entropy bonus."""
    defaults = dict(
        max_new_tokens=LENGTH, whiten_advantages=False, missing_eos_penalty=0.0, gamma=1.0, seed=seed, device="cpu"
    )
    reference = reference_model(dtype=dtype)
    policy = CausalLMWithValueHead(copy.deepcopy(reference))
    return PPOTrainer(PPOConfig(**(defaults | settings)), policy, reference, score_fn, PROMPTS, four_token_tokenizer())


def small_trainer(*, dtype, **settings) -> PPOTrainer:
    """One whose policy has moved away from its reference and has a critic, for a single update."""
    settings = dict(batch_size=32, minibatch_size=32, ppo_epochs=1) | settings
    trainer = trainer_for(score, dtype=dtype, **settings)
    spread(trainer.policy, 0.1, seed=1)
    return trainer


def everything_after(prompt: str):
    """The prompt with each response that can be sampled: tokens (N, P+T), attention mask, response mask (N, T)."""
    ids = torch.tensor(four_token_tokenizer()(prompt).input_ids)
    responses, mask = enumerate_sequences(4, LENGTH, eos_id=EOS)
    tokens = torch.cat([ids.expand(len(responses), -1), responses], dim=1)
    return tokens, torch.cat([torch.ones(len(responses), len(ids), dtype=torch.bool), mask], dim=1), mask


@torch.no_grad()
def sequence_log_probs(lm, prompt: str) -> torch.Tensor:
    """log π(y|x) of each response that can be sampled, (N,), float64."""
    tokens, attention_mask, mask = everything_after(prompt)
    logits = reference_logits(lm, tokens, attention_mask, length=LENGTH, temperature=1.0).double()
    return torch.where(mask, action_log_probs(logits, tokens[:, -LENGTH:]), 0).sum(dim=1)


def texts() -> list[str]:
    """The responses that can be sampled as text, EOS left out; all 40 differ."""
    responses, mask = enumerate_sequences(4, LENGTH, eos_id=EOS)
    words = [[WORDS[token] for token in row[real]] for row, real in zip(responses, mask, strict=True)]
    return [" ".join(word for word in row if word != "<eos>") for row in words]
