"""From prompts to a batch to learn from: first the facts of each response, then the credit that its tokens get.

Shapes: B rows, P prompt positions (padded on the left), T response positions (padded on the right).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lessons.adapters import as_reference
from rlhf_lessons.advantages import gae
from rlhf_lessons.config import PPOConfig, TrainerConfig
from rlhf_lessons.data import Tokenizer, pad
from rlhf_lessons.forward import evaluating
from rlhf_lessons.generation import Responses, Samples, sample_batch, sample_responses
from rlhf_lessons.kl import sampled_kl, shaped_rewards
from rlhf_lessons.likelihood import policy_outputs, reference_logits, token_terms  # noqa: F401
from rlhf_lessons.masking import masked_mean, masked_whiten
from rlhf_lessons.models import bar_unused_ids, check_vocabulary
from rlhf_lessons.policy_gradient import action_log_probs
from rlhf_lessons.scoring import Scorer, missing_eos_scores


@dataclass(frozen=True, kw_only=True)
class Rollout(Samples):
    """The facts of a batch, recorded once: what was sampled, how likely it was, what it scored."""

    log_probs: Tensor  # (B, T) of the sampled tokens under the policy that is about to learn
    ref_log_probs: Tensor  # (B, T) of the same tokens under the reference
    scores: Tensor  # (B,) of the whole response, before the KL penalty


@dataclass(frozen=True, kw_only=True)
class Credited(Rollout):
    """And what each token is to be credited with: all that a policy loss needs."""

    advantages: Tensor  # (B, T)


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(Credited):
    """Everything that PPO's epochs need; nothing in it changes while they run."""

    values: Tensor  # (B, T) the critic's, of the state each token was sampled in
    rewards: Tensor  # (B, T) KL penalty on every token, the score on the last
    returns: Tensor  # (B, T) GAE + values: the critic's targets


def describe(rollout: Rollout) -> dict[str, Tensor]:
    """What a batch has come to: mean score, KL from the reference per response, length, share that ended."""
    nats = sampled_kl(rollout.log_probs, rollout.ref_log_probs, kind="k1").sum(dim=1)
    length, ended = rollout.response_mask.sum(dim=1).float(), rollout.ended.float()
    return {"score": rollout.scores.mean(), "kl": nats.mean(), "response_length": length.mean(), "ended": ended.mean()}


def sampler_error(rollout: Rollout) -> Tensor:
    """Mean distance of the sampler's log-probabilities from the policy's own: mean_t |log π − log μ|."""
    return masked_mean((rollout.log_probs - rollout.sampler_log_probs).abs(), rollout.response_mask)


def joined(batches: Sequence[Rollout], *, pad_id: int) -> Rollout:
    """One batch of the rows of several, prompts padded on the left and responses on the right to the longest."""
    prompt, response = max(b.prompt_length for b in batches), max(b.responses.shape[1] for b in batches)
    parts: dict[str, Any] = {field.name: [] for field in fields(batches[0])}
    for batch in batches:
        left, right = prompt - batch.prompt_length, response - batch.responses.shape[1]
        for name, found in parts.items():
            value = getattr(batch, name)
            if isinstance(value, Tensor) and value.ndim == 2:
                of_text = name in ("tokens", "attention_mask")  # the others begin with the response
                value = F.pad(value, (left if of_text else 0, right), value=pad_id if name == "tokens" else 0)
            found.append(value)
    rows = {name: torch.cat(found) for name, found in parts.items() if isinstance(found[0], Tensor)}
    records = tuple(record for batch in batches for record in batch.records)
    return type(batches[0])(**rows, records=records, prompt_length=prompt)


def state_values(policy: nn.Module, tokens: Tensor, attention_mask: Tensor, *, length: int) -> Tensor:
    """The values of `policy_outputs` (B, T), without the logits beside them."""
    return policy.values(tokens[:, :-1], attention_mask[:, :-1], keep=length)


def by_chunks(samples: Samples, rows: int, function: Callable[[Samples], Tensor]) -> Tensor:
    """function(samples) (B, T), `rows` at a time, which bounds the memory of logits; 0 where nothing was sampled."""
    return torch.where(samples.response_mask, torch.cat([function(chunk) for chunk in samples.minibatches(rows)]), 0)


def response_log_probs(lm: nn.Module, samples: Samples, config: TrainerConfig) -> Tensor:
    """Log-probabilities (B, T) of the sampled tokens under a plain language model, in one pass over whole texts."""

    def log_probs(chunk: Samples) -> Tensor:
        mask = chunk.response_mask
        return token_terms(lm, chunk.tokens, chunk.attention_mask, mask, temperature=config.temperature).log_probs

    return by_chunks(samples, config.scored_rows, log_probs)


@torch.no_grad()
def response_values(policy: nn.Module, samples: Samples, config: TrainerConfig) -> Tensor:
    """Values (B, T) of the states that the tokens were sampled in, in one pass over whole texts."""

    def values(chunk: Samples) -> Tensor:
        return state_values(policy, chunk.tokens, chunk.attention_mask, length=chunk.responses.shape[1])

    return by_chunks(samples, config.scored_rows, values)


@torch.no_grad()
def collect(
    lm: nn.Module, reference: nn.Module | None, scorer: Scorer, input_ids: Tensor, attention_mask: Tensor, *,
    config: TrainerConfig, sample: Callable[..., Responses] = sample_responses, **options: Any,
) -> Rollout:  # fmt: skip
    """The facts of one batch: sampled by the policy's language model, read by the reference, scored.

    reference: a model of its own, or None: the policy's with its adapter off (`as_reference`); input_ids,
    attention_mask (B, P): prompts, padded on the left; options: the others of `sample_batch`.
    """
    options |= dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    samples = sample_batch(lm, input_ids, attention_mask, sample=sample, **options)
    exact = getattr(sample, "exact", True)
    log_probs = samples.sampler_log_probs if exact else response_log_probs(lm, samples, config)
    with as_reference(lm, reference) as held_to:
        ref_log_probs = response_log_probs(held_to, samples, config)
    penalty, mode = config.missing_eos_penalty, config.missing_eos_mode
    scores = missing_eos_scores(scorer(samples), samples.ended, penalty=penalty, mode=mode)
    rollout = Rollout(**vars(samples), log_probs=log_probs, ref_log_probs=ref_log_probs, scores=scores)
    tolerance = None if exact else getattr(sample, "tolerance", None)
    if tolerance is not None and not (error := float(sampler_error(rollout))) <= tolerance:
        raise ValueError(
            f"sampler's log-probabilities must be within {tolerance} of the policy's own on average; got "
            f"{error:.3g}: has it been given the weights of the last update (Sampler.update), "
            "and are temperature and precision the policy's?"
        )
    return rollout


@torch.no_grad()
def check_language_model(policy: nn.Module, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a model, with or without a value head, that means one thing and samples or learns another.

    Its ids are checked, and those that the tokenizer lacks barred. Then it samples a few tokens after short prompts and
    scores them as the loss does: either must give what the model says of each text alone, read once.
    """
    lm = getattr(policy, "lm", policy)
    check_vocabulary(lm, tokenizer)
    bar_unused_ids(lm, tokenizer)
    try:
        errors = reading_errors(policy, tokenizer)
    except Exception as error:  # each family has its own way to miss an input that is not text
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{type(lm).__name__} must read plain texts, padded or not; got {reason[:300]}") from error
    for how, error in errors.items():
        if not error <= (1e-3 if torch.finfo(lm.dtype).bits >= 32 else 0.25):
            same = f"the same log-probability {how} as in its text alone"
            raise ValueError(f"{type(lm).__name__} must give a token {same}; got {error:.2g} more or less")


def reading_errors(policy: nn.Module, tokenizer: Tokenizer) -> dict[str, float]:
    """Largest distances of log-probabilities, sampled and scored in training mode, from those of each text alone."""
    lm, pad_id = getattr(policy, "lm", policy), tokenizer.pad_token_id
    words = sorted({*tokenizer.get_vocab().values()} - {pad_id, tokenizer.eos_token_id})
    prompts = [[words[(row + 3 * i) % len(words)] for i in range(length)] for row, length in enumerate((4, 2, 1))]
    input_ids, mask = (x.to(lm.device) for x in pad(prompts, pad_id, side="left"))
    generator = torch.Generator().manual_seed(0)
    samples = sample_batch(lm, input_ids, mask, max_new_tokens=3, eos_id=words[::2], pad_id=pad_id, generator=generator)
    with torch.enable_grad():  # without, it would be read in evaluation mode
        scored = token_terms(policy, samples.tokens, samples.attention_mask, samples.response_mask).log_probs
    alone = torch.zeros_like(samples.sampler_log_probs)
    for row, real in enumerate(samples.response_mask):
        text, length = samples.tokens[row][samples.attention_mask[row]], int(real.sum())
        with evaluating(lm):
            logits = lm(input_ids=text[None], use_cache=False).logits[0, -length - 1 : -1]
        alone[row, :length] = action_log_probs(logits, text[-length:])
    found = {"when it is sampled": samples.sampler_log_probs, "in a padded batch in training mode": scored}
    return {how: float((x - alone)[samples.response_mask].abs().max()) for how, x in found.items()}


def ppo_credit(rollout: Rollout, values: Tensor, *, config: PPOConfig, kl_coef: float) -> RolloutBatch:
    """PPO's credit: rewards shaped by today's β, GAE on the critic's values (B, T), whitening."""
    mask = rollout.response_mask
    scores = masked_whiten(rollout.scores, shift_mean=False) if config.normalize_scores else rollout.scores
    kl = sampled_kl(rollout.log_probs, rollout.ref_log_probs, kind="k1")
    rewards = shaped_rewards(scores, kl, mask, kl_coef=kl_coef)
    advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.gae_lambda)
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    return RolloutBatch(**vars(rollout), values=values, rewards=rewards, advantages=advantages, returns=returns)


def collect_rollout(
    policy: nn.Module, reference: nn.Module | None, score: Scorer | Callable[[Tensor, Tensor, Tensor], Tensor],
    input_ids: Tensor, attention_mask: Tensor, *, config: PPOConfig, kl_coef: float, eos_id: int, pad_id: int,
    generator: torch.Generator | None = None, sample: Callable[..., Responses] = sample_responses,
) -> RolloutBatch:  # fmt: skip
    """One batch of PPO's, from prompts to advantages: `collect`, then `ppo_credit`.

    policy: a `CausalLMWithValueHead`; reference: the frozen language model, or None, as in `collect`; score: a
    `Scorer`, or a function (tokens, attention_mask, response_mask) -> (B,); input_ids, attention_mask (B, P): prompts,
    padded on the left; kl_coef: today's β; sample: `sample_responses`, or the `Sampler` that takes its place.
    """

    def of_tokens(samples: Samples) -> Tensor:
        return score(samples.tokens, samples.attention_mask, samples.response_mask)

    scorer, options = score if isinstance(score, Scorer) else of_tokens, dict(config=config, sample=sample)
    rollout = collect(policy.lm, reference, scorer, input_ids, attention_mask, eos_id=eos_id, pad_id=pad_id,
                      generator=generator, **options)  # fmt: skip
    return ppo_credit(rollout, response_values(policy, rollout, config), config=config, kl_coef=kl_coef)
