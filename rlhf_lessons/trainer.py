"""The step that all on-policy methods share, and PPO.

`Trainer.step()` is one iteration: collect the facts of a batch, give its tokens credit, then epochs of minibatches over
it. A method is a subclass that says what credit is (`credit`) and what is minimised (`losses`). Nothing here samples,
scores or computes a loss by itself: it calls `rollout` and `ppo`, the functions that the lessons teach.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lessons import ppo
from rlhf_lessons.adapters import as_reference, merged_weights
from rlhf_lessons.checkpoint import learnt, load_learnt
from rlhf_lessons.config import COUNT, PPOConfig, TrainerConfig, require
from rlhf_lessons.data import Prompt, as_record, encode_prompts, pad
from rlhf_lessons.device import autocast, gather_rows, gathered, make_accelerator, share_like, share_of, whole
from rlhf_lessons.fitting import check_finite, fit_language_model, fit_reward_model
from rlhf_lessons.forward import context_of, plain
from rlhf_lessons.generation import Responses, draw_uniforms, eos_ids, sample_responses
from rlhf_lessons.importance import importance_ratio, masked_ratio, truncated_ratio
from rlhf_lessons.kl import AdaptiveKL, FixedKL, sampled_kl
from rlhf_lessons.likelihood import TokenTerms, token_terms
from rlhf_lessons.masking import masked_mean
from rlhf_lessons.models import check_separate, check_tokenizer, check_trainable, check_vocabulary, without_dropout
from rlhf_lessons.rollout import (
    Credited,
    Rollout,
    RolloutBatch,
    check_language_model,
    collect,
    describe,
    joined,
    ppo_credit,
    response_values,
    sampler_error,
)
from rlhf_lessons.scoring import ModelScorer, Scorer, as_scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PPOConfig", "PPOTrainer", "Trainer", "fit_language_model", "fit_reward_model"]

EARLY_STOP = 1.5  # times the target KL
FACTS = ("scores", "log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns")  # causes first

Report = dict[str, Tensor]
Callback = Callable[[int, dict[str, float], Credited], Any]  # (iteration, metrics, batch); True ends the training


@dataclass(frozen=True)
class Updates:
    """What an iteration's epochs reported, minibatch by minibatch."""

    reports: list[Report]
    stopped: bool  # whether the last minibatch passed the target KL, and so made no step

    @property
    def steps(self) -> int:
        """Optimiser steps that were made."""
        return len(self.reports) - self.stopped


class Trainer:
    """On-policy optimisation of a language model against a score, on a leash to a reference.

    policy: a language model, or for PPO a `CausalLMWithValueHead`, trained in place, and of it what needs a gradient;
    reference: a language model of its own, frozen here, or None: the policy with its adapter switched off
    (`adapters.as_reference`); scorer: a reward model that shares the tokenizer and scores the tokens themselves, a
    function (prompts, responses) -> (B,) floats of two lists of texts, EOS stripped, or a `Scorer`; prompts: texts,
    token ids, chats, or records with such a `prompt` and columns for the score, drawn at random for each batch.
    sampler: what takes the place of `sample_responses`; optimizer: over the policy's parameters, AdamW where none is
    given; scheduler: of that optimizer, stepped once an iteration, `lr_schedule` where none is given; eval_prompts:
    what the policy is looked at with between iterations (`evaluate`), each a prompt as the others.
    Raises ValueError for a config of another method, a reference that shares parameters with the policy, no prompts, a
    prompt too long for the context, a precision that the device lacks, or models that `check_models` refuses.
    """

    settings: type[TrainerConfig] = TrainerConfig  # that the method reads

    def __init__(
        self, config: TrainerConfig, policy: nn.Module, reference: nn.Module | None,
        scorer: Scorer | nn.Module | Callable[..., Any], prompts: Sequence[str | Mapping[str, Any]],
        tokenizer: "PreTrainedTokenizerBase", *, sampler: Callable[..., Responses] | None = None,
        optimizer: torch.optim.Optimizer | None = None, scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        eval_prompts: Sequence[Prompt | Mapping[str, Any]] = (),
    ) -> None:  # fmt: skip
        require("config", type(config).__name__, isinstance(config, self.settings), f"a {self.settings.__name__}")
        self.config, self.tokenizer = config, tokenizer
        self.accelerator = make_accelerator(config.device)
        self.device, processes = self.accelerator.device, self.accelerator.num_processes
        autocast(self.device, config.precision)  # what is not there is said now, not after the first batch
        pieces = {"batch_size": config.samples_per_prompt, "minibatch_size": config.gradient_accumulation_steps}
        for name, parts in pieces.items():
            whole, unit = getattr(config, name), parts * processes
            require(name, whole, whole % unit == 0, f"a multiple of {unit}, {parts} for each of {processes} processes")
        policy, reference = plain(policy), getattr(reference, "lm", reference)
        check_trainable(getattr(policy, "lm", policy))
        check_separate(policy, reference)
        if scheduler is not None and scheduler.optimizer is not optimizer:
            raise ValueError("scheduler must come with the optimizer that it steers; got another one or none")
        check_tokenizer(tokenizer)
        room = dict(max_new_tokens=config.max_new_tokens, context=context_of(policy))
        self.prompts, self.prompt_ids = [*map(as_record, prompts)], encode_prompts(tokenizer, prompts, **room)
        self.eval_prompts = [*map(as_record, eval_prompts)]
        self.eval_ids = encode_prompts(tokenizer, eval_prompts, **room) if eval_prompts else []
        self.reference = None if reference is None else reference.to(self.device).requires_grad_(False).eval()
        self.scorer = as_scorer(scorer, tokenizer, rows=config.scored_rows)
        if isinstance(self.scorer, ModelScorer):
            self.scorer.model.to(self.device)
        optimizer = optimizer or self.default_optimizer(policy)
        if not {*policy.parameters()} & {p for group in optimizer.param_groups for p in group["params"]}:
            raise ValueError("optimizer must hold the policy's parameters; got another model's")
        self.scheduler = scheduler or self.default_scheduler(optimizer)
        self.model, self.optimizer = self.accelerator.prepare(without_dropout(policy).train(), optimizer)
        self.policy = self.accelerator.unwrap_model(self.model)
        beta, target = config.kl_coef, config.adaptive_kl_target
        self.kl_controller = AdaptiveKL(beta, target, config.adaptive_kl_horizon) if target else FixedKL(beta)
        # The same in every process: each draws for the whole batch and takes its rows, so a seed means one batch.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.sampler = sampler or sample_responses
        self.iteration, self.unproven, self.evaluated = 0, False, None
        self.check_models()
        self.hand_weights()

    def check_models(self) -> None:
        """Raise ValueError for models that cannot learn, lack ids of the tokenizer, or score unlike they sample."""
        with gathered(self.model):
            check_language_model(self.policy, self.tokenizer)
            with as_reference(self.lm, self.reference) as held_to:
                check_language_model(held_to, self.tokenizer)
        if isinstance(self.scorer, ModelScorer):
            check_vocabulary(self.scorer.model, self.tokenizer)

    def default_optimizer(self, policy: nn.Module) -> torch.optim.Optimizer:
        """AdamW without weight decay, ε = 1e-5."""
        fused = self.device.type in ("cpu", "cuda")
        parameters = [p for p in policy.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=self.config.learning_rate, eps=1e-5, weight_decay=0.0, fused=fused)

    def default_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Up to `learning_rate` in `warmup_iterations` even steps, then `lr_schedule`: to 0 by the end, or level."""
        warm, total = self.config.warmup_iterations, self.config.num_iterations
        falls = {"linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
                 "constant": lambda x: 1}  # fmt: skip

        def height(done: int) -> float:
            after = falls[self.config.lr_schedule]
            return (done + 1) / (warm + 1) if done < warm else after((done - warm) / (total - warm))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, height)

    @property
    def lm(self) -> nn.Module:
        """The language model that samples: the policy, or the one inside it."""
        return getattr(self.policy, "lm", self.policy)

    def step(self) -> dict[str, float]:
        """One iteration: roll out a batch, learn from it, steer β. Returns the metrics as plain floats.

        Raises FloatingPointError, naming the iteration, before a number that is not finite reaches a weight.
        """
        started = time.perf_counter()
        self.batch = self.rollout()
        sampled = time.perf_counter()
        self.unproven = self.iteration == 0
        updates = self.update(self.batch)
        metrics = self.metrics(self.batch, updates)
        metrics |= {"seconds_rollout": sampled - started, "seconds_update": time.perf_counter() - sampled}
        self.kl_controller.update(metrics["kl"], self.config.batch_size)
        self.scheduler.step()
        self.hand_weights()
        self.iteration += 1
        return metrics

    def hand_weights(self) -> None:
        """Give a sampler with weights of its own the policy's, as they are now."""
        if hasattr(self.sampler, "update"):
            self.sampler.update(merged_weights(self.lm))

    def train(self, on_step: Callback | None = None, *others: Callback) -> list[dict[str, float]]:
        """The steps that are left of `num_iterations`; after each, every callback, in order. Returns their metrics.

        A callback gets (iteration, metrics, batch), may add to the metrics, and ends the training by returning True;
        another call goes on from there. With evaluation prompts, the metrics after every `eval_every`-th iteration and
        the last hold those of `evaluate`.
        """
        history, ended, last = [], False, self.config.num_iterations
        while self.iteration < last and not ended:
            metrics = self.step()
            history.append(metrics)
            if self.eval_prompts and (self.iteration % self.config.eval_every == 0 or self.iteration == last):
                metrics |= self.evaluate()[0]
            said = [call(self.iteration, metrics, self.batch) for call in (on_step, *others) if call is not None]
            ended = any(answer is True for answer in said)
        return history

    def evaluate(self) -> tuple[dict[str, float], Rollout]:
        """One response to each evaluation prompt: what `describe` says of them, under "eval_…", and the rollout.

        They are drawn by the same uniform numbers each time, so that a difference is the policy's, and nothing that
        the training depends on changes. At most `batch_size` are sampled at once. Raises ValueError without prompts.
        """
        count = len(self.eval_ids)
        COUNT.check("the number of eval_prompts", count)
        generator = torch.Generator().manual_seed(self.config.seed)
        rows = torch.arange(count + -count % self.accelerator.num_processes) % count  # as many for each process
        with gathered(self.model), autocast(self.device, self.config.precision):
            parts = [
                self.answers([self.eval_ids[i] for i in some], [self.eval_prompts[i] for i in some], some, generator)
                for some in rows.split(self.config.batch_size)
            ]
        self.evaluated = joined(parts, pad_id=self.tokenizer.pad_token_id).rows(torch.arange(count))
        return {f"eval_{name}": float(value) for name, value in describe(self.evaluated).items()}, self.evaluated

    def rollout(self) -> Credited:
        """One batch to learn from: its facts, then their credit, with the current policy and today's β.

        Raises FloatingPointError, naming the iteration, when one of them is not finite.
        """
        with gathered(self.model), autocast(self.device, self.config.precision):
            batch = self.corrected(self.credit(self.collect()))
        rows, real = (len(batch), -1), batch.response_mask
        largest = {name: torch.where(real, getattr(batch, name).view(rows), 0).abs().amax()  # NaN counts as that
                   for name in FACTS if hasattr(batch, name)}  # fmt: skip
        check_finite(largest, f"iteration {self.iteration + 1}")
        return batch

    def collect(self) -> Rollout:
        """Draw prompts and sample `samples_per_prompt` responses to each, with their facts."""
        each = self.config.samples_per_prompt
        draws = torch.randint(len(self.prompt_ids), (self.config.batch_size // each,), generator=self.generator)
        drawn, group = (x.repeat_interleave(each) for x in (draws, torch.arange(len(draws))))
        prompts = [self.prompt_ids[i] for i in drawn], [self.prompts[i] for i in drawn]
        return self.answers(*prompts, group, self.generator)

    def answers(
        self, ids: list[list[int]], records: Sequence[Mapping[str, Any]], group: Tensor, generator: torch.Generator
    ) -> Rollout:
        """A response to each of these prompts, with its facts: each process samples its rows, and gets all.

        ids: the prompts' tokens; records: the prompts themselves; group (B,): the draw of a prompt that a row answers.
        """
        config, count, pad_id = self.config, len(ids), self.tokenizer.pad_token_id
        uniforms = draw_uniforms(count, config.max_new_tokens, generator=generator)
        input_ids, mask = pad(ids, pad_id, side="left")
        records, own = tuple(records), share_of(self.accelerator, count)
        rollout = collect(
            self.lm, self.reference, self.scorer, input_ids[own].to(self.device), mask[own].to(self.device),
            config=config, sample=self.sampler, group=group[own].to(self.device), records=records[own],
            eos_id=eos_ids(self.lm, self.tokenizer), pad_id=pad_id, generator=generator, uniforms=uniforms[own],
        )  # fmt: skip
        tensors = {name: x for name, x in vars(rollout).items() if isinstance(x, Tensor)}
        padding = dict.fromkeys(tensors, 0) | {"tokens": pad_id}
        every = {name: gather_rows(self.accelerator, x, padding=padding[name]) for name, x in tensors.items()}
        return replace(rollout, **every, records=records)

    def own(self, batch: Credited) -> Credited:
        """The rows of a batch, or a minibatch, that this process computes."""
        return batch.rows(torch.arange(len(batch))[share_of(self.accelerator, len(batch))])

    def credit(self, rollout: Rollout) -> Credited:
        """What each token of these responses is to be credited with: the method's first seam."""
        raise NotImplementedError

    def corrected(self, batch: Credited) -> Credited:
        """The batch with its advantages weighted, so that a sampler that is not quite the policy misleads less.

        Weights are at least 0, so that of the clipped loss's terms the same one stays the smaller; 1 where the sampler
        is exact.
        """
        config, weigh = self.config, {"truncate": truncated_ratio, "mask": masked_ratio}
        if config.sampler_correction == "none":
            return batch
        weights = weigh[config.sampler_correction](
            batch.log_probs, batch.sampler_log_probs, batch.response_mask, cap=config.sampler_cap,
            level=config.sampler_correction_level,
        )  # fmt: skip
        return replace(batch, advantages=batch.advantages * weights)

    def losses(self, batch: Credited) -> tuple[Tensor, Report]:
        """What is minimised over these rows with the current policy, and its parts: the method's second seam.

        Here the clipped policy loss of a plain language model.
        """
        log_probs, entropies, _ = self.token_terms(batch)
        policy_loss, mean_entropy, report = self.policy_losses(log_probs, entropies, batch)
        loss = policy_loss - self.config.ent_coef * mean_entropy
        return loss, detached({"loss": loss, "policy_loss": policy_loss} | report)

    def token_terms(self, batch: Credited) -> TokenTerms:
        """Log-probabilities, entropies and, with a value head, values (B, T) of the sampled tokens, as they are now."""
        return token_terms(
            self.model, batch.tokens, batch.attention_mask, batch.response_mask, temperature=self.config.temperature,
            entropy_gradient=self.config.ent_coef > 0,
        )  # fmt: skip

    def policy_losses(self, log_probs: Tensor, entropies: Tensor, batch: Credited) -> tuple[Tensor, Tensor, Report]:
        """Clipped policy loss, mean entropy, and what is reported of them, from log-probabilities and entropies (B, T).

        Losses and entropy are what `config.aggregation` says, what is reported beside them means over real tokens.
        """
        config, mask = self.config, batch.response_mask
        level, clip_eps = config.ratio_level, config.clip_range
        policy_loss = ppo.clipped_policy_loss(
            log_probs, batch.log_probs, batch.advantages, mask, clip_eps=clip_eps, level=level, **config.aggregation
        )
        mean_entropy = ppo.aggregate(entropies, mask, **config.aggregation)
        with torch.no_grad():
            ratio = ppo.policy_ratio(log_probs, batch.log_probs, mask, level=level)
            error = (importance_ratio(log_probs, batch.log_probs) - 1).abs()
            report = {
                "entropy": masked_mean(entropies, mask),
                # The samples are the old policy's, so this is KL(old policy ‖ new policy).
                "approx_kl": masked_mean(sampled_kl(batch.log_probs, log_probs, kind="k3"), mask),
                "clip_fraction": ppo.clip_fraction(ratio, mask, clip_eps=clip_eps, advantages=batch.advantages),
                "ratio_error": masked_mean(error, mask),
            }
        return policy_loss, mean_entropy, report

    def update(self, batch: Credited) -> Updates:
        """Epochs of minibatches over one batch, left early where the target KL is passed."""
        reports: list[Report] = []
        for _ in range(self.config.ppo_epochs):
            for minibatch in batch.minibatches(self.config.minibatch_size, self.generator):
                report, stopped = self._update_on(minibatch)
                reports.append(report)
                if stopped:
                    return Updates(reports, stopped=True)
        return Updates(reports, stopped=False)

    def _update_on(self, minibatch: Credited) -> tuple[Report, bool]:
        """One optimiser step, and whether it was left out because the target KL was passed.

        Pieces and processes weigh by what the loss is a mean over: the result is the whole's gradient. Raises
        FloatingPointError, naming the iteration and leaving the weights as they were, when the loss or its gradient is
        not finite.
        """
        processes, total = self.accelerator.num_processes, minibatch.response_mask.sum()
        pieces = list(self.own(minibatch).minibatches(self.config.micro_batch_size // processes))
        report: Report = {}
        for number, piece in enumerate(pieces, start=1):
            synchronise = contextlib.nullcontext() if number == len(pieces) else self.accelerator.no_sync(self.model)
            with synchronise:
                with autocast(self.device, self.config.precision):
                    loss, parts = self.losses(piece)
                tokens = piece.response_mask.sum() / total
                share = tokens if self.config.loss_over == "tokens" else len(piece) / len(minibatch)
                self.accelerator.backward(loss * share * processes)
            for name, value in parts.items():
                report[name] = report.get(name, 0) + value * (share if name.endswith("loss") else tokens)
        values = self.accelerator.reduce(torch.stack(list(report.values())), "sum")
        report = dict(zip(report, values, strict=True))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        report["grad_norm"] = whole(norm).to(self.device)
        try:
            if self.unproven:
                self.check_first_ratio(report)
                self.unproven = False
            check_finite({name: report[name] for name in ("loss", "grad_norm")}, f"iteration {self.iteration + 1}")
            target = self.config.target_kl
            stopped = target is not None and not report["approx_kl"] <= EARLY_STOP * target
            if not stopped:
                self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
        return report, stopped

    def check_first_ratio(self, report: Report) -> None:
        """Raise ValueError where the ratio is not 1 before the first step: what is scored is not what sampled."""
        error, half = float(report["ratio_error"]), torch.finfo(self.lm.dtype).bits < 32
        limit = 5e-2 if half or self.config.precision == "bf16" else 1e-3
        if error > limit:
            raise ValueError(
                f"|ratio - 1| must be at most {limit:g} on average before the first update; got {error:.3g} from "
                f"{type(self.lm).__name__}: look for dropout or noise in training mode, a cache or masks that the "
                "sampler takes wrongly, or another temperature"
            )

    def measures(self, batch: Credited) -> dict[str, Tensor]:
        """What a method measures of its own credit, beside what all measure."""
        return {}

    def metrics(self, batch: Credited, updates: Updates) -> dict[str, float]:
        """Means over the batch and over the optimiser steps, read from the device in one go."""
        first = {"first_ratio_error": updates.reports[0]["ratio_error"]}
        measured = describe(batch) | self.measures(batch) | first
        if not getattr(self.sampler, "exact", True):
            measured["sampler_error"] = sampler_error(batch)
        for name in (name for name in updates.reports[0] if name != "ratio_error"):
            of = updates.reports[: updates.steps or 1] if name == "grad_norm" else updates.reports
            measured[name] = torch.stack([report[name] for report in of]).mean()
        values = torch.stack([value.detach().float() for value in measured.values()]).tolist()
        today = {"kl_coef": self.kl_controller.coef, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        return dict(zip(measured, values, strict=True)) | today | {"optimizer_steps": updates.steps}

    def texts(self, batch: Rollout) -> tuple[list[str], list[str]]:
        """A batch's prompts and responses as text: begin token and final EOS stripped, any other token shown."""
        return batch.texts(self.tokenizer)

    def state_dict(self, *, copied: bool = True) -> dict[str, Any]:
        """A copy of all that the next step depends on, beside what the trainer was made with and never changes.

        The same on any number of processes, each of which has to ask. `checkpoint.save_state` writes it, `load_state`
        reads it. copied: False for who writes it at once, and so needs no memory for a second policy and its moments.
        """
        state = {
            "iteration": self.iteration, "policy": whole(learnt(self.policy)),
            "optimizer": whole(self.optimizer.state_dict()), "scheduler": self.scheduler.state_dict(),
            "kl_coef": self.kl_controller.coef, "generator": self.generator.get_state(),
        }  # fmt: skip
        return copy.deepcopy(state) if copied else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the trainer was that gave this state: bit by bit on the same machine."""
        own = self.policy.state_dict()
        load_learnt(self.policy, {name: share_like(x, own.get(name)) for name, x in state["policy"].items()})
        parts = copy.deepcopy({part: state[part] for part in ("optimizer", "scheduler")})
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, moments in parts["optimizer"]["state"].items():
            moments |= {name: share_like(x, trained[number]) for name, x in moments.items()}
        for part, its in parts.items():
            getattr(self, part).load_state_dict(its)
        self.kl_controller.coef, self.iteration = state["kl_coef"], state["iteration"]
        self.generator.set_state(state["generator"])
        self.hand_weights()


class PPOTrainer(Trainer):
    """Proximal policy optimisation of a `CausalLMWithValueHead`; arguments as those of `Trainer`.

    Source: Ziegler et al. 2019; Ouyang et al. 2022; Huang et al. 2024, "The N+ implementation details of RLHF with
    PPO".
    """

    settings = PPOConfig

    def credit(self, rollout: Rollout) -> RolloutBatch:
        """The critic's values, shaped rewards, GAE, whitening."""
        values = gather_rows(self.accelerator, response_values(self.policy, self.own(rollout), self.config))
        return ppo_credit(rollout, values, config=self.config, kl_coef=self.kl_controller.coef)

    def losses(self, batch: RolloutBatch) -> tuple[Tensor, Report]:
        """The PPO loss of these rows with the current policy, and its parts. Means over their real tokens."""
        config, mask = self.config, batch.response_mask
        log_probs, entropies, values = self.token_terms(batch)
        policy_loss, mean_entropy, report = self.policy_losses(log_probs, entropies, batch)
        value_loss = ppo.clipped_value_loss(values, batch.values, batch.returns, mask, clip_eps=config.value_clip_eps)
        loss = ppo.ppo_loss(policy_loss, value_loss, mean_entropy, vf_coef=config.vf_coef, ent_coef=config.ent_coef)
        return loss, detached({"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss} | report)

    def measures(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """The shaped reward of a response, and how much of the returns' variance the critic explains."""
        explained = ppo.explained_variance(batch.values, batch.returns, batch.response_mask)
        return {"reward": batch.rewards.sum(dim=1).mean(), "explained_variance": explained}


def detached(report: Report) -> Report:
    """A report that keeps no graph alive."""
    return {name: value.detach() for name, value in report.items()}
