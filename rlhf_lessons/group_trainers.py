"""Methods without a critic: the other responses to the same prompt say what was to be expected.

The policy is a plain language model. Each method is the shared step with a credit, and perhaps a loss, of its own.
"""

from torch import Tensor

from rlhf_lessons.baselines import group_advantages, leave_one_out_baseline
from rlhf_lessons.config import GroupConfig
from rlhf_lessons.kl import sampled_kl
from rlhf_lessons.masking import masked_mean
from rlhf_lessons.policy_gradient import action_log_probs
from rlhf_lessons.rollout import Credited, Rollout
from rlhf_lessons.trainer import Report, Trainer, detached


class RLOOTrainer(Trainer):
    """REINFORCE with the mean of a prompt's other responses as its baseline; the KL is paid out of the reward.

    Source: Ahmadian et al. 2024, "Back to basics: revisiting REINFORCE style optimization for learning from human
    feedback in LLMs", §3.
    """

    settings = GroupConfig

    def credit(self, rollout: Rollout) -> Credited:
        """Every token gets its response's R − b, R = score − β Σ_t log π/π_ref, b the mean of the others."""
        kl = sampled_kl(rollout.log_probs, rollout.ref_log_probs, kind="k1").sum(dim=1)
        returns = rollout.scores - self.kl_controller.coef * kl
        grouped = returns.view(-1, self.config.samples_per_prompt)  # a draw's responses stand side by side
        return per_token(rollout, (grouped - leave_one_out_baseline(grouped)).flatten())


class GRPOTrainer(Trainer):
    """Group-relative policy optimisation: scores against their group's mean and deviation, the KL in the loss (k3).

    Source: Shao et al. 2024, "DeepSeekMath", §4.1.
    """

    settings = GroupConfig

    def credit(self, rollout: Rollout) -> Credited:
        """Every token gets its response's score, centred and scaled in its group."""
        return per_token(rollout, group_advantages(rollout.scores, rollout.group, scale=self.config.advantage_scale))

    def losses(self, batch: Credited) -> tuple[Tensor, Report]:
        """The clipped policy loss plus β times the KL from the reference, each a mean over real tokens."""
        logits = self.response_logits(batch)
        log_probs = action_log_probs(logits, batch.responses)
        policy_loss, mean_entropy, report = self.policy_losses(log_probs, logits, batch)
        kl = masked_mean(sampled_kl(log_probs, batch.ref_log_probs, kind="k3"), batch.response_mask)
        loss = policy_loss + self.kl_controller.coef * kl - self.config.ent_coef * mean_entropy
        return loss, detached({"loss": loss, "policy_loss": policy_loss, "kl_loss": kl} | report)


def per_token(rollout: Rollout, advantages: Tensor) -> Credited:
    """One advantage per response (B,), given to each of its tokens."""
    return Credited(**vars(rollout), advantages=advantages[:, None] * rollout.response_mask)
