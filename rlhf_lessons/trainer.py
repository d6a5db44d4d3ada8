"""PPO on a language model.

`PPOTrainer.step()` is one iteration: roll out a batch, then epochs of minibatches over it. Nothing here samples, scores
or computes a loss by itself: it calls `rollout` and `ppo`, the functions that the lessons teach.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rlhf_lessons.data import decode, encode_prompt, pad
from rlhf_lessons.decoding import StaticSampler
from rlhf_lessons.fitting import fit_language_model, fit_reward_model, make_accelerator
from rlhf_lessons.importance import importance_ratio
from rlhf_lessons.kl import AdaptiveKL, FixedKL, sampled_kl
from rlhf_lessons.masking import masked_mean
from rlhf_lessons.models import check_tokenizer, with_fast_gelu, without_dropout
from rlhf_lessons.policy_gradient import action_log_probs, entropy
from rlhf_lessons.ppo import clip_fraction, clipped_policy_loss, clipped_value_loss, explained_variance, ppo_loss
from rlhf_lessons.rollout import RolloutBatch, collect_rollout, policy_outputs, sample_responses

__all__ = ["PPOConfig", "PPOTrainer", "fit_language_model", "fit_reward_model"]

SEED_STRIDE = 100003  # between the seeds of parallel processes, as in Ziegler et al. 2019


def setting(default, help: str):
    """A field of PPOConfig with the sentence that explains it, here and in `--help`."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PPOConfig:
    """All numbers of PPO, in the field's usual names, checked when made (ValueError)."""

    num_iterations: int = setting(50, "PPO iterations: a batch of responses and the updates from it")
    batch_size: int = setting(128, "prompts, and responses, in an iteration, over all processes")
    minibatch_size: int = setting(32, "responses in one optimiser step, over all processes")
    gradient_accumulation_steps: int = setting(1, "pieces in which a minibatch is computed, to save memory")
    ppo_epochs: int = setting(4, "passes over each batch")
    max_new_tokens: int = setting(24, "longest response, in tokens, EOS included")
    temperature: float = setting(1.0, "of sampling and, the same, of scoring")
    learning_rate: float = setting(1e-3, "of AdamW at the start")
    lr_schedule: str = setting("linear", "linear (to 0 over the run) or constant")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    gamma: float = setting(1.0, "discount per token")
    gae_lambda: float = setting(0.95, "λ of generalised advantage estimation")
    clip_eps: float = setting(0.2, "ε of the policy's clip range")
    value_clip_eps: float = setting(0.2, "ε of the critic's clip range")
    vf_coef: float = setting(0.1, "weight of the value loss")
    ent_coef: float = setting(0.0, "weight of the entropy bonus")
    kl_coef: float = setting(0.1, "β: price of one nat of KL from the reference; the first one if adaptive")
    adaptive_kl_target: float | None = setting(None, "KL per response, in nats, that β is steered to")
    adaptive_kl_horizon: int = setting(10000, "responses over which that steering works")
    target_kl: float | None = setting(
        None, "leave an iteration's epochs early when the update's own KL per token is 1.5 times this"
    )
    whiten_advantages: bool = setting(True, "scale each batch's advantages to mean 0, variance 1")
    normalize_scores: bool = setting(False, "scale each batch's scores to variance 1, their mean kept")
    missing_eos_penalty: float = setting(1.0, "subtracted from the score of a response that did not end")
    missing_eos_mode: str = setting(
        "subtract", "subtract the penalty from the score, or replace the score by its negative"
    )
    precision: str = setting("no", "no (float32) or bf16 (autocast; log-probabilities and losses stay float32)")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    seed: int = setting(0, "of prompts, sampling and shuffling")

    def __post_init__(self) -> None:
        for name in (
            "num_iterations",
            "batch_size",
            "minibatch_size",
            "gradient_accumulation_steps",
            "ppo_epochs",
            "max_new_tokens",
            "adaptive_kl_horizon",
        ):
            self._require(
                name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "a whole number >= 1"
            )
        for name in ("temperature", "learning_rate", "max_grad_norm", "clip_eps", "value_clip_eps"):
            self._require(name, getattr(self, name) > 0, "a number > 0")
        for name in ("vf_coef", "ent_coef", "kl_coef", "missing_eos_penalty"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number >= 0")
        for name in ("gamma", "gae_lambda"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a number between 0 and 1")
        for name in ("adaptive_kl_target", "target_kl"):
            self._require(name, getattr(self, name) is None or getattr(self, name) > 0, "a number > 0, or None")
        for name, choices in (
            ("lr_schedule", ("linear", "constant")),
            ("missing_eos_mode", ("subtract", "replace")),
            ("precision", ("no", "bf16")),
            ("device", ("auto", "cpu", "cuda", "mps")),
        ):
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        self._require(
            "kl_coef", self.adaptive_kl_target is None or self.kl_coef > 0, "a number > 0 when it is adaptive"
        )
        self._require(
            "batch_size",
            self.batch_size % self.minibatch_size == 0,
            f"a multiple of minibatch_size = {self.minibatch_size}",
        )
        self._require(
            "minibatch_size",
            self.minibatch_size % self.gradient_accumulation_steps == 0,
            f"a multiple of gradient_accumulation_steps = {self.gradient_accumulation_steps}",
        )
        self._require(
            "batch_size", not self.whiten_advantages or self.batch_size >= 8, "at least 8 to whiten advantages"
        )

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {expected}; got {getattr(self, name)!r}")

    @property
    def micro_batch_size(self) -> int:
        """Responses in one forward and backward pass."""
        return self.minibatch_size // self.gradient_accumulation_steps


def as_scores(scores, count: int, device: torch.device | str = "cpu") -> Tensor:
    """What a score function returned as a tensor (count,). Raises ValueError unless it is that many finite numbers."""
    try:
        scores = torch.as_tensor(scores, dtype=torch.get_default_dtype(), device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"score_fn must return numbers, one per response; got {scores!r:.80}") from error
    if scores.shape != (count,):
        raise ValueError(f"score_fn must return one number per response, ({count},); got {tuple(scores.shape)}")
    if not scores.isfinite().all():
        raise ValueError("score_fn must return finite numbers; got NaN or infinity")
    return scores


class PPOTrainer:
    """Proximal policy optimisation of a language model against a score, on a leash to a reference.

    policy: a `CausalLMWithValueHead`, trained in place; reference: a language model of its own, frozen here;
    score_fn: a reward model that shares the tokenizer and scores the tokens themselves, or a function (prompts,
    responses) -> (B,) floats of two lists of texts, EOS stripped; prompts: texts, drawn at random for each batch.
    Raises ValueError for a reference that shares parameters with the policy, no prompts, or a prompt too long for the
    context.
    Source: Ziegler et al. 2019; Ouyang et al. 2022; Huang et al. 2024, "The N+ implementation details of RLHF with
    PPO".
    """

    def __init__(
        self, config: PPOConfig, policy: nn.Module, reference: nn.Module, score_fn, prompts: list[str], tokenizer
    ):
        self.config, self.tokenizer, self.score_fn, self.prompts = config, tokenizer, score_fn, list(prompts)
        self.accelerator = make_accelerator(config.device, config.precision)
        reference = getattr(reference, "lm", reference)
        if {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in reference.parameters()}:
            raise ValueError("reference must be a model of its own; it shares parameters with policy")
        check_tokenizer(tokenizer)
        self.prompt_ids = self._encode_prompts(policy.config.get_text_config())
        self.reference = reference.to(self.accelerator.device).requires_grad_(False).eval()
        if isinstance(score_fn, nn.Module):
            score_fn.to(self.accelerator.device).requires_grad_(False).eval()
        fused = self.accelerator.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.learning_rate, eps=1e-5, weight_decay=0.0, fused=fused
        )
        for model in (policy, reference, score_fn):
            if isinstance(model, nn.Module):
                with_fast_gelu(model)
        self.model, self.optimizer = self.accelerator.prepare(without_dropout(policy).train(), optimizer)
        self.policy = self.accelerator.unwrap_model(self.model)
        self.kl_controller = (
            FixedKL(config.kl_coef)
            if config.adaptive_kl_target is None
            else AdaptiveKL(config.kl_coef, config.adaptive_kl_target, config.adaptive_kl_horizon)
        )
        seed = config.seed + SEED_STRIDE * self.accelerator.process_index
        self.sampling = torch.Generator(self.accelerator.device).manual_seed(seed)
        self.ordering = torch.Generator().manual_seed(seed)  # prompts and shuffles are drawn on the CPU
        self.sample = StaticSampler() if self.accelerator.device.type == "cuda" else sample_responses
        self.iteration = 0

    def step(self) -> dict[str, float]:
        """One iteration: roll out a batch, learn from it, steer β. Returns the metrics as plain floats.

        Raises FloatingPointError, naming the iteration, when a loss is not finite.
        """
        started = time.perf_counter()
        self.batch = self.rollout()
        sampled = time.perf_counter()
        updates = self.update(self.batch)
        metrics = self._metrics(self.batch, updates)
        metrics |= {"seconds_rollout": sampled - started, "seconds_update": time.perf_counter() - sampled}
        self.kl_controller.update(metrics["kl"], self.config.batch_size)
        self.iteration += 1
        return metrics

    def train(self, on_step: Callable[[int, dict, RolloutBatch], None] | None = None) -> list[dict[str, float]]:
        """`num_iterations` steps; after each, on_step(step, metrics, batch), which may add to the metrics."""
        history = []
        while self.iteration < self.config.num_iterations:
            history.append(self.step())
            if on_step is not None:
                on_step(self.iteration, history[-1], self.batch)
        return history

    def rollout(self) -> RolloutBatch:
        """Draw prompts and collect one batch of responses to them, with the current policy and today's β."""
        share = self.config.batch_size // self.accelerator.num_processes
        drawn = torch.randint(len(self.prompt_ids), (share,), generator=self.ordering).tolist()
        input_ids, mask = pad([self.prompt_ids[i] for i in drawn], self.tokenizer.pad_token_id, side="left")
        device = self.accelerator.device
        with self.accelerator.autocast():
            return collect_rollout(
                self.policy,
                self.reference,
                self._score,
                input_ids.to(device),
                mask.to(device),
                config=self.config,
                kl_coef=self.kl_controller.coef,
                eos_id=self.tokenizer.eos_token_id,
                pad_id=self.tokenizer.pad_token_id,
                generator=self.sampling,
                sample=self.sample,
            )

    def update(self, batch: RolloutBatch) -> list[dict[str, Tensor]]:
        """Epochs of minibatches over one batch. Returns what each optimiser step reported."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        size = self.config.minibatch_size // self.accelerator.num_processes
        reports = []
        for _ in range(self.config.ppo_epochs):
            for minibatch in batch.minibatches(size, self.ordering):
                report = self._update_on(minibatch)
                reports.append(report)
                if "grad_norm" not in report:  # the target KL was passed
                    return reports
        return reports

    @property
    def learning_rate(self) -> float:
        """This iteration's: linear from `learning_rate` towards 0 at the end of the run, or constant."""
        done = self.iteration / self.config.num_iterations if self.config.lr_schedule == "linear" else 0.0
        return self.config.learning_rate * (1 - done)

    def texts(self, batch: RolloutBatch) -> tuple[list[str], list[str]]:
        """A batch's prompts and responses as text: begin token and final EOS stripped, any other token shown."""
        split = batch.prompt_length
        return (
            decode(self.tokenizer, batch.tokens[:, :split], batch.attention_mask[:, :split]),
            decode(self.tokenizer, batch.responses, batch.response_mask),
        )

    def losses(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The PPO loss of these rows with the current policy, and its parts. Means over their real tokens."""
        config, mask = self.config, batch.response_mask
        logits, values = policy_outputs(
            self.model, batch.tokens, batch.attention_mask, length=mask.shape[1], temperature=config.temperature
        )
        log_probs = action_log_probs(logits, batch.responses)
        policy_loss = clipped_policy_loss(log_probs, batch.log_probs, batch.advantages, mask, clip_eps=config.clip_eps)
        value_loss = clipped_value_loss(values, batch.values, batch.returns, mask, clip_eps=config.value_clip_eps)
        with contextlib.nullcontext() if config.ent_coef > 0 else torch.no_grad():
            mean_entropy = masked_mean(entropy(logits), mask)
        loss = ppo_loss(policy_loss, value_loss, mean_entropy, vf_coef=config.vf_coef, ent_coef=config.ent_coef)
        with torch.no_grad():
            ratio = importance_ratio(log_probs, batch.log_probs)
            report = {
                "loss": loss,
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "entropy": mean_entropy,
                # The samples are the old policy's, so this is KL(old policy ‖ new policy).
                "approx_kl": masked_mean(sampled_kl(batch.log_probs, log_probs, kind="k3"), mask),
                "clip_fraction": clip_fraction(ratio, mask, clip_eps=config.clip_eps, advantages=batch.advantages),
                "ratio_error": masked_mean((ratio - 1).abs(), mask),
            }
        return loss, {name: value.detach() for name, value in report.items()}

    def _update_on(self, minibatch: RolloutBatch) -> dict[str, Tensor]:
        """One optimiser step; pieces and processes weigh by their tokens: the result is the whole's gradient."""
        total = self.accelerator.reduce(minibatch.response_mask.sum(), "sum")
        pieces = list(minibatch.minibatches(self.config.micro_batch_size))
        report: dict[str, Tensor] = {}
        for number, piece in enumerate(pieces, start=1):
            synchronise = contextlib.nullcontext() if number == len(pieces) else self.accelerator.no_sync(self.model)
            with synchronise:
                loss, parts = self.losses(piece)
                share = piece.response_mask.sum() / total
                self.accelerator.backward(loss * share * self.accelerator.num_processes)
            for name, value in parts.items():
                report[name] = report.get(name, 0) + value * share
        values = self.accelerator.reduce(torch.stack(list(report.values())), "sum")
        report = dict(zip(report, values, strict=True))
        if self.config.target_kl is None or report["approx_kl"] <= 1.5 * self.config.target_kl:
            report["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return report

    def _metrics(self, batch: RolloutBatch, updates: list[dict[str, Tensor]]) -> dict[str, float]:
        """Means over the batch and over the optimiser steps, read from the device in one go."""
        sequence_kl = sampled_kl(batch.log_probs, batch.ref_log_probs, kind="k1").sum(dim=1)
        measured = {
            "score": batch.scores.mean(),
            "kl": sequence_kl.mean(),
            "reward": batch.rewards.sum(dim=1).mean(),
            "explained_variance": explained_variance(batch.values, batch.returns, batch.response_mask),
            "response_length": batch.response_mask.sum(dim=1).float().mean(),
            "ended": batch.ended.float().mean(),
            "first_ratio_error": updates[0]["ratio_error"],
        }
        for name in ("loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm"):
            reported = [update[name] for update in updates if name in update]
            measured[name] = torch.stack(reported).mean() if reported else torch.zeros_like(measured["score"])
        values = self.accelerator.reduce(torch.stack([v.detach().float() for v in measured.values()]), "mean").tolist()
        metrics = dict(zip(measured, values, strict=True))
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise FloatingPointError(
                    f"{name} is {metrics[name]} in iteration {self.iteration + 1}: a lower learning_rate or "
                    "max_grad_norm may help, and scores must be finite"
                )
        return metrics | {
            "kl_coef": self.kl_controller.coef,
            "learning_rate": self.learning_rate,
            "optimizer_steps": sum("grad_norm" in update for update in updates),
        }

    def _score(self, tokens: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        """Scores (B,) of whole responses, by the reward model on the tokens or by a function of the texts."""
        if isinstance(self.score_fn, nn.Module):
            return self.score_fn(tokens, attention_mask)
        split = tokens.shape[1] - response_mask.shape[1]
        prompts = decode(self.tokenizer, tokens[:, :split], attention_mask[:, :split])
        scores = self.score_fn(prompts, decode(self.tokenizer, tokens[:, split:], response_mask))
        return as_scores(scores, len(tokens), tokens.device)

    def _encode_prompts(self, model_config) -> list[list[int]]:
        if not self.prompts:
            raise ValueError("prompts must hold at least one prompt; got none")
        context = getattr(model_config, "max_position_embeddings", None) or math.inf
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in self.prompts]
        for number, ids in enumerate(encoded, start=1):
            if len(ids) + self.config.max_new_tokens > context:
                raise ValueError(
                    f"prompt {number} has {len(ids)} tokens; with max_new_tokens = {self.config.max_new_tokens} "
                    f"it does not fit the model's context of {context}"
                )
        return encoded
