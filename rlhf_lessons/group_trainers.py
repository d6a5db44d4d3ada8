"""Methods without a critic: the other responses to the same prompt say what was to be expected.

The policy is a plain language model. Each method is the shared step with a credit, and perhaps a loss, of its own.
"""

from dataclasses import replace

import torch
from torch import Tensor

from rlhf_lessons.baselines import group_advantages, leave_one_out_baseline
from rlhf_lessons.config import GRPOConfig, RLOOConfig
from rlhf_lessons.kl import sampled_kl
from rlhf_lessons.ppo import aggregate
from rlhf_lessons.rollout import Credited, Rollout, joined
from rlhf_lessons.trainer import Report, Trainer, detached


class RLOOTrainer(Trainer):
    """REINFORCE with the mean of a prompt's other responses as its baseline; the KL is paid out of the reward.

    Source: Ahmadian et al. 2024, "Back to basics: revisiting REINFORCE style optimization for learning from human
    feedback in LLMs", §3.
    """

    settings = RLOOConfig

    def credit(self, rollout: Rollout) -> Credited:
        """Every token gets its response's R − b, R = score − β Σ_t log π/π_ref, b the mean of the others."""
        returns = penalised(rollout, kind="k1", kl_coef=self.kl_controller.coef)
        grouped = returns.view(-1, self.config.samples_per_prompt)  # a draw's responses stand side by side
        return per_token(rollout, (grouped - leave_one_out_baseline(grouped)).flatten())


class GRPOTrainer(Trainer):
    """Group-relative policy optimisation: scores against their group's mean and deviation.

    The KL is paid out of the reward (k1), whose expected gradient is that of the KL of whole texts; in the paper it is
    in the loss (k3), whose is not. `GRPOConfig`'s switches make that of it, and its kin. Dr. GRPO: advantage_scale
    "none", loss_over "constant". DAPO: clip_eps_high 0.28, dynamic_sampling, loss_over "tokens", kl_coef 0. GSPO:
    ratio_level and loss_over of the sequence. REINFORCE++ with a baseline: advantage_scale "batch".
    Source: Shao et al. 2024, "DeepSeekMath", §4.1; those of `baselines.group_advantages` and `ppo.aggregate`.
    """

    settings = GRPOConfig

    def collect(self) -> Rollout:
        """A batch; while groups are left whose scores are all equal, and rounds, others in their place."""
        rollout = super().collect()
        for _ in range(self.config.dynamic_sampling):
            if not equal_scores(rollout).any():
                break
            fresh = super().collect()
            fresh = replace(fresh, group=fresh.group + rollout.group.max() + 1)
            both = joined([rollout, fresh], pad_id=self.tokenizer.pad_token_id)
            # False sorts before True, and what was drawn first before what was drawn later.
            rollout = both.rows(equal_scores(both).long().argsort(stable=True)[: len(rollout)])
        return rollout

    def credit(self, rollout: Rollout) -> Credited:
        """Every token gets its response's score, less the KL if that is paid there, centred and scaled in its group."""
        in_reward = self.config.kl_in == "reward"
        rewards = penalised(rollout, kind=self.config.kl_kind, kl_coef=self.kl_controller.coef if in_reward else 0)
        return per_token(rollout, group_advantages(rewards, rollout.group, scale=self.config.advantage_scale))

    def losses(self, batch: Credited) -> tuple[Tensor, Report]:
        """The clipped policy loss and, where the KL is paid there, β times the KL from the reference."""
        config = self.config
        log_probs, entropies, _ = self.token_terms(batch)
        policy_loss, mean_entropy, report = self.policy_losses(log_probs, entropies, batch)
        loss, parts = policy_loss - config.ent_coef * mean_entropy, {"policy_loss": policy_loss}
        if config.kl_in == "loss":
            estimates = sampled_kl(log_probs, batch.ref_log_probs, kind=config.kl_kind)
            parts["kl_loss"] = aggregate(estimates, batch.response_mask, **config.aggregation)
            loss = loss + self.kl_controller.coef * parts["kl_loss"]
        return loss, detached({"loss": loss} | parts | report)

    def measures(self, batch: Credited) -> dict[str, Tensor]:
        """The share of the responses that learn nothing, since their whole group scored the same."""
        return {"equal_scores": equal_scores(batch).float().mean()}


def penalised(rollout: Rollout, *, kind: str, kl_coef: float) -> Tensor:
    """Scores less β times an estimate of the whole response's KL from the reference: (B,)."""
    kl = sampled_kl(rollout.log_probs, rollout.ref_log_probs, kind=kind)
    return rollout.scores - kl_coef * torch.where(rollout.response_mask, kl, 0).sum(dim=1)


def equal_scores(rollout: Rollout) -> Tensor:
    """True for the responses whose whole group scored the same: (B,)."""
    groups, index = rollout.group.unique(return_inverse=True)
    empty, ends = rollout.scores.new_zeros(len(groups)), ("amin", "amax")
    low, high = (empty.scatter_reduce(0, index, rollout.scores, end, include_self=False) for end in ends)
    return (low == high)[index]


def per_token(rollout: Rollout, advantages: Tensor) -> Credited:
    """One advantage per response (B,), given to each of its tokens."""
    return Credited(**vars(rollout), advantages=advantages[:, None] * rollout.response_mask)
