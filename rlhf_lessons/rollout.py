"""From prompts to a batch to learn from: sample, score, shape the rewards, estimate advantages.

Shapes: B rows, P prompt positions (padded on the left), T response positions (padded on the right), V words.
The two facts that must never disagree between sampling and scoring stand in this file alone: the shift by one
(the logits at position t belong to token t+1) and the temperature.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lessons.advantages import gae
from rlhf_lessons.kl import sampled_kl, shaped_rewards
from rlhf_lessons.masking import masked_whiten
from rlhf_lessons.models import causal_lm_logits, new_kv_cache, position_arguments, takes_ready_masks
from rlhf_lessons.policy_gradient import action_log_probs, full_precision


@dataclass(frozen=True)
class RolloutBatch:
    """Everything that PPO's epochs need, recorded once; nothing in it changes while they run."""

    tokens: Tensor  # (B, P+T) prompt and response, padded with pad_id on both sides
    attention_mask: Tensor  # (B, P+T) True on real tokens
    response_mask: Tensor  # (B, T) True on sampled tokens, EOS included
    log_probs: Tensor  # (B, T) of the sampled tokens, recorded while sampling
    ref_log_probs: Tensor  # (B, T) of the same tokens under the reference
    values: Tensor  # (B, T) the critic's, of the state each token was sampled in
    rewards: Tensor  # (B, T) KL penalty on every token, the score on the last
    advantages: Tensor  # (B, T) GAE, whitened if so configured
    returns: Tensor  # (B, T) GAE + values: the critic's targets
    scores: Tensor  # (B,) of the whole response, before the KL penalty
    ended: Tensor  # (B,) True where the response ends in EOS, False where it was cut off
    prompt_length: int  # P

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def responses(self) -> Tensor:
        """The sampled tokens, padded on the right: (B, T)."""
        return self.tokens[:, self.prompt_length :]

    def minibatches(self, size: int, generator: torch.Generator | None = None) -> Iterator["RolloutBatch"]:
        """The rows in a fresh random order (or as they stand, without a generator), `size` at a time."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for rows in order.to(self.tokens.device).split(size):
            yield self.rows(rows)

    def rows(self, rows: Tensor) -> "RolloutBatch":
        """The batch of these rows alone. rows: (N,) long."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return RolloutBatch(**{k: v[rows] if isinstance(v, Tensor) else v for k, v in values.items()})


@dataclass(frozen=True)
class Responses:
    """What the sampler returns; T is the length of the longest response."""

    tokens: Tensor  # (B, T) padded with pad_id
    mask: Tensor  # (B, T) True on sampled tokens, EOS included
    log_probs: Tensor  # (B, T) at the sampling temperature, 0 where mask is False
    ended: Tensor  # (B,)


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """The logits that are sampled from, and so the ones to score by: in float32 at least, over the temperature."""
    logits = full_precision(logits)
    return logits if temperature == 1 else logits / temperature  # over a whole vocabulary a copy is worth sparing


def sample_tokens(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token per row from softmax(logits), by inverting the cumulative distribution. (B, V) -> (B,) long.

    The first token whose cumulative probability exceeds u ~ U[0, 1).
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    u = torch.rand(total.shape, generator=generator, device=logits.device, dtype=logits.dtype) * total
    # u·total may round up to total itself, past every token that has probability.
    chosen = torch.searchsorted(cumulative, u.minimum(total.nextafter(torch.zeros_like(total))), right=True).squeeze(-1)
    return chosen.clamp(max=logits.shape[-1] - 1)  # only NaN goes beyond; the loss, NaN too, will tell of it


@torch.no_grad()
def sample_responses(
    lm: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Responses:
    """Continue each prompt with tokens drawn from softmax(logits / temperature), until EOS or max_new_tokens.

    lm: any Hugging Face causal language model; input_ids, attention_mask (B, P), padded on the left. The prompt is read
    once, then each step reads one token through the model's own key-value cache; rows that have ended leave the cache.
    No top-k or top-p: the log-probabilities are those of the distribution that was sampled from.
    Raises ValueError when a row's last prompt position is padding.
    """
    if attention_mask.device.type == "cpu" and not attention_mask[:, -1].all():
        raise ValueError("attention_mask must end in a real token in every row: pad prompts on the left")
    batch, prompt_length = input_ids.shape
    tokens = input_ids.new_full((batch, max_new_tokens), pad_id)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    log_probs = torch.zeros_like(tokens, dtype=torch.promote_types(lm.dtype, torch.float32))
    ended = torch.zeros_like(tokens[:, 0], dtype=torch.bool)
    rows = torch.arange(batch, device=tokens.device)  # the row of `tokens` that each row of the cache belongs to
    visible = F.pad(attention_mask.bool(), (0, max_new_tokens), value=True)
    positions = position_arguments(lm, visible)
    cache, ready_masks = new_kv_cache(lm, visible.shape[1]), takes_ready_masks(lm)
    step_ids, read = input_ids, slice(0, prompt_length)
    for t in range(max_new_tokens):
        seen = visible[:, : read.stop]
        output = lm(
            input_ids=step_ids,
            attention_mask=seen[:, None, None] if ready_masks and t > 0 else seen,  # spares the model making one
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **{name: whole[:, read] for name, whole in positions.items()},
        )
        logits = at_temperature(output.logits[:, -1], temperature)
        chosen = sample_tokens(logits, generator)
        tokens[rows, t] = chosen
        mask[rows, t] = True
        log_probs[rows, t] = action_log_probs(logits, chosen)
        done = chosen == eos_id
        ended[rows] = done
        step_ids, read = chosen[:, None], slice(prompt_length + t, prompt_length + t + 1)
        if done.any():
            keep = (~done).nonzero().squeeze(-1)
            if len(keep) == 0:
                break
            cache.batch_select_indices(keep)
            rows, step_ids, visible = rows[keep], step_ids[keep], visible[keep]
            positions = position_arguments(lm, visible)
    length = t + 1
    return Responses(tokens[:, :length], mask[:, :length], log_probs[:, :length], ended)


def policy_outputs(
    policy: nn.Module, tokens: Tensor, attention_mask: Tensor, *, length: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """What the policy says of the `length` response tokens at the end of each row, before it sees them.

    tokens, attention_mask (B, P+T) -> logits at the sampling temperature (B, T, V), values (B, T): the model's
    outputs at positions P−1 … P+T−2.
    """
    logits, values = policy(tokens[:, :-1], attention_mask[:, :-1], logits_to_keep=length)
    return at_temperature(logits, temperature), values


def reference_logits(
    reference: nn.Module, tokens: Tensor, attention_mask: Tensor, *, length: int, temperature: float
) -> Tensor:
    """The same of a plain language model: logits at the sampling temperature (B, T, V)."""
    logits = causal_lm_logits(reference, tokens[:, :-1], attention_mask[:, :-1], logits_to_keep=length)
    return at_temperature(logits, temperature)


def state_values(policy: nn.Module, tokens: Tensor, attention_mask: Tensor, *, length: int) -> Tensor:
    """The values of `policy_outputs` (B, T), without the logits beside them."""
    return policy.values(tokens[:, :-1], attention_mask[:, :-1], keep=length)


def missing_eos_scores(scores: Tensor, ended: Tensor, *, penalty: float, mode: str = "subtract") -> Tensor:
    """Scores (B,) with the price of not having ended: `penalty` subtracted, or −penalty in the score's place.

    mode: "subtract" (TRL) or "replace" (Ziegler et al. 2019); raises ValueError for another.
    """
    if mode not in ("subtract", "replace"):
        raise ValueError(f'mode must be "subtract" or "replace"; got {mode!r}')
    penalised = scores - penalty if mode == "subtract" else torch.full_like(scores, -penalty)
    return torch.where(ended, scores, penalised)


def score_rollout(
    policy: nn.Module,
    reference: nn.Module,
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    tokens: Tensor,
    attention_mask: Tensor,
    responses: Responses,
    *,
    config,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass of each of the other three models: values (B, T), reference log-probabilities (B, T), scores (B,).

    In chunks, which bound the memory that logits take: twice the rows of a training step, which keeps them all.
    """
    length = responses.tokens.shape[1]
    values, ref_log_probs, scores = [], [], []
    for rows in torch.arange(len(tokens), device=tokens.device).split(2 * config.micro_batch_size):
        chunk = tokens[rows], attention_mask[rows]
        values.append(state_values(policy, *chunk, length=length))
        logits = reference_logits(reference, *chunk, length=length, temperature=config.temperature)
        ref_log_probs.append(action_log_probs(logits, responses.tokens[rows]))
        scores.append(score(*chunk, responses.mask[rows]))
    return (
        torch.where(responses.mask, torch.cat(values), 0),
        torch.where(responses.mask, torch.cat(ref_log_probs), 0),
        missing_eos_scores(
            torch.cat(scores), responses.ended, penalty=config.missing_eos_penalty, mode=config.missing_eos_mode
        ),
    )


@torch.no_grad()
def collect_rollout(
    policy: nn.Module,
    reference: nn.Module,
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    config,
    kl_coef: float,
    eos_id: int,
    pad_id: int,
    generator: torch.Generator | None = None,
    sample: Callable[..., Responses] = sample_responses,
) -> RolloutBatch:
    """One batch, from prompts to advantages, in the order in which it is made.

    policy: a `CausalLMWithValueHead`; reference: the frozen language model; score: (tokens, attention_mask,
    response_mask) -> (B,); input_ids, attention_mask (B, P): prompts, padded on the left; config: a `PPOConfig`;
    kl_coef: today's β; sample: `sample_responses`, or what takes its place on a GPU.
    """
    prompt_mask = attention_mask.bool()
    responses = sample(
        policy.lm,
        input_ids,
        prompt_mask,
        max_new_tokens=config.max_new_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
        temperature=config.temperature,
        generator=generator,
    )
    tokens = torch.cat([input_ids, responses.tokens], dim=1)
    attention_mask = torch.cat([prompt_mask, responses.mask], dim=1)
    values, ref_log_probs, scores = score_rollout(
        policy, reference, score, tokens, attention_mask, responses, config=config
    )
    shown = masked_whiten(scores, shift_mean=False) if config.normalize_scores else scores
    kl = sampled_kl(responses.log_probs, ref_log_probs, kind="k1")
    rewards = shaped_rewards(shown, kl, responses.mask, kl_coef=kl_coef)
    advantages, returns = gae(rewards, values, responses.mask, gamma=config.gamma, lam=config.gae_lambda)
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, responses.mask)
    return RolloutBatch(
        tokens=tokens,
        attention_mask=attention_mask,
        response_mask=responses.mask,
        log_probs=responses.log_probs,
        ref_log_probs=ref_log_probs,
        values=values,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        scores=scores,
        ended=responses.ended,
        prompt_length=input_ids.shape[1],
    )
