"""Five faults that PPO runs really have, each planted in `PPOTrainer` and left to show itself in the metrics.

The world is a text of at most ten tokens of six, one of them EOS; the policy is a GPT-2 of a single layer. The proxy
score adds up the tokens' sentiment; the gold score, which nothing is trained on, takes the repeated ones off. Every run
starts from the same reference, with the same seed. A fault overrides one seam of the trainer, so that it does what one
wrong line in the package would do.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lessons.generation import Responses, Samples, sample_responses
from rlhf_lessons.kl import shaped_rewards
from rlhf_lessons.models import CausalLMWithValueHead, random_gpt2
from rlhf_lessons.ppo import ppo_loss
from rlhf_lessons.rollout import Credited, Rollout, RolloutBatch, collect
from rlhf_lessons.scoring import Scorer
from rlhf_lessons.trainer import PPOConfig, PPOTrainer, Report, Trainer

EOS = 1
SENTIMENT = torch.tensor([0.0, 0.0, 1.0, 0.5, -0.5, -1.0])  # of each token
TOKENIZER = SimpleNamespace(  # all that a trainer asks of it
    bos_token_id=None, eos_token_id=EOS, pad_token_id=0,
    get_vocab=lambda: {str(token): token for token in range(len(SENTIMENT))},
)  # fmt: skip
CONFIG = PPOConfig(
    num_iterations=24, batch_size=96, minibatch_size=96, max_new_tokens=10, learning_rate=1e-2, lr_schedule="constant",
    kl_coef=0.4, ent_coef=0.6, vf_coef=0.5, missing_eos_penalty=0.0, device="cpu", seed=7,
)  # fmt: skip


# --- The faults, each where the trainer lets a method differ -----------------------------------


def misread_credit(trainer: PPOTrainer, rollout: Rollout, **misread: Tensor) -> RolloutBatch:
    """PPO's credit for facts some of which are misread; the batch, and so its metrics, keep the true ones."""
    credited = PPOTrainer.credit(trainer, replace(rollout, **misread))
    return replace(credited, **{name: getattr(rollout, name) for name in misread})


class ScoreLost(PPOTrainer):
    def credit(self, rollout: Rollout) -> RolloutBatch:
        # One step after the last token is padding, where the mask takes the score away: as if there were none.
        return misread_credit(self, rollout, scores=torch.zeros_like(rollout.scores))


def sample_cold(lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Responses:
    """The trainer's sampler, which does not heed its temperature."""
    return sample_responses(lm, input_ids, attention_mask, **options | {"temperature": 0.7})


class Unguarded(PPOTrainer):
    def check_first_ratio(self, report: Report) -> None:
        """Say nothing: the run is to show its fault in the metrics."""


class CriticNotTrained(PPOTrainer):
    def default_optimizer(self, policy: nn.Module) -> torch.optim.Optimizer:
        return super().default_optimizer(policy.lm)


class EntropySign(PPOTrainer):
    def policy_losses(self, log_probs: Tensor, entropies: Tensor, batch: Credited) -> tuple[Tensor, Tensor, Report]:
        policy_loss, mean_entropy, report = super().policy_losses(log_probs, entropies, batch)
        return policy_loss, -mean_entropy, report


class KLSign(PPOTrainer):
    def credit(self, rollout: Rollout) -> RolloutBatch:
        # The other way round the difference of the log-probabilities has the other sign.
        return misread_credit(self, rollout, log_probs=rollout.ref_log_probs, ref_log_probs=rollout.log_probs)


@dataclass(frozen=True)
class Fault:
    """A planted fault: what it is, how it shows, and the line of the package that it stands for."""

    name: str
    says: str
    symptom: str  # "you would see ..."
    where: Callable[..., Any]  # the function that the line is in
    right: str
    planted: str
    trainer: Callable[..., PPOTrainer]  # does what the planted line would do


FAULTS = {
    fault.name: fault
    for fault in (
        Fault(
            "score_lost",
            "the score is put one step late, on padding, and masked away",
            "a score that stays where it began, with a KL near 0: nothing pays the policy for moving",
            shaped_rewards,
            "last = torch.where(mask, steps, -1).amax(dim=1, keepdim=True)",
            "last = torch.where(mask, steps, -1).amax(dim=1, keepdim=True) + 1",
            ScoreLost,
        ),
        Fault(
            "wrong_temperature",
            "sampled at temperature 0.7, scored at 1",
            "a ratio that is not 1 before the first update (first_ratio_error), in every iteration",
            collect,
            "temperature=config.temperature)",
            "temperature=0.7)",
            functools.partial(Unguarded, sampler=sample_cold),
        ),
        Fault(
            "critic_not_trained",
            "the optimiser was not given the critic's parameters",
            "an explained variance of exactly 0 to the end, while the score rises all the same",
            Trainer.default_optimizer,
            "[p for p in policy.parameters() if p.requires_grad]",
            "[p for p in policy.lm.parameters() if p.requires_grad]",
            CriticNotTrained,
        ),
        Fault(
            "entropy_sign",
            "the entropy is added to the loss instead of subtracted",
            "an entropy that falls almost to 0 within ten iterations: the policy writes one text only",
            ppo_loss,
            "return policy_loss + vf_coef * value_loss - ent_coef * entropy",
            "return policy_loss + vf_coef * value_loss + ent_coef * entropy",
            EntropySign,
        ),
        Fault(
            "kl_sign",
            "the KL penalty is added to the reward instead of subtracted",
            "a reward above the score, and a KL that climbs beyond that of a healthy run",
            shaped_rewards,
            "rewards = -kl_coef * kl + torch.where(steps == last, scores[:, None], 0)",
            "rewards = +kl_coef * kl + torch.where(steps == last, scores[:, None], 0)",
            KLSign,
        ),
    )
}


# --- The run -----------------------------------------------------------------------------------


class Proxy(Scorer):
    """What the runs are trained on: the sum of the tokens' sentiment."""

    def __call__(self, samples: Samples) -> Tensor:
        return torch.where(samples.response_mask, SENTIMENT[samples.responses], 0).sum(dim=1)


def add_gold(step: int, metrics: dict[str, float], batch: Rollout) -> None:
    """What they are not trained on: the proxy score less the tokens that repeat the one before."""
    repeats = (batch.responses[:, 1:] == batch.responses[:, :-1]) & batch.response_mask[:, 1:]
    metrics["gold"] = (batch.scores - repeats.sum(dim=1)).mean().item()


def run_toy(make_trainer: Callable[..., PPOTrainer] = PPOTrainer) -> list[dict[str, float]]:
    """The metrics of a whole run, iteration by iteration."""
    reference = random_gpt2(
        seed=CONFIG.seed, vocab_size=len(SENTIMENT), n_positions=16, n_embd=16, n_layer=1, n_head=2,
        initializer_range=0.1, bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # a new head's weights are drawn before they are set to 0
        policy = CausalLMWithValueHead(copy.deepcopy(reference))
    return make_trainer(CONFIG, policy, reference, Proxy(), [""], TOKENIZER).train(add_gold)


@functools.cache
def toy_history(fault: str | None) -> tuple[dict[str, float], ...]:
    """The metrics of the run with this fault in it; None is the healthy one."""
    return tuple(run_toy(FAULTS[fault].trainer if fault else PPOTrainer))
