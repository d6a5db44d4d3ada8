"""Five faults that PPO runs really have, each planted in a small run and left to show itself in the metrics.

The world is a text of at most STEPS tokens from WORDS words, 0 being EOS. The policy is a table: logits of the next
word given the last one. The critic is linear in what has been written so far. The proxy score adds up the words'
sentiment; the gold score, which nothing is trained on, takes the repeated words off. Every run starts from the same
reference, with the same seed, and uses the package's own functions. Only the planted line differs.
"""

from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lessons.advantages import gae
from rlhf_lessons.importance import importance_ratio
from rlhf_lessons.kl import sampled_kl, shaped_rewards
from rlhf_lessons.masking import masked_mean, masked_whiten
from rlhf_lessons.policy_gradient import action_log_probs, entropy
from rlhf_lessons.ppo import clip_fraction, clipped_policy_loss, clipped_value_loss, explained_variance, ppo_loss

WORDS, STEPS, EOS = 6, 10, 0
SENTIMENT = torch.tensor([0.0, 1.0, 0.5, 0.0, -0.5, -1.0])
ITERATIONS, BATCH, EPOCHS = 24, 96, 4
KL_COEF, ENT_COEF, GAMMA, LAM, CLIP = 0.4, 0.6, 1.0, 0.95, 0.2


@dataclass(frozen=True)
class Fault:
    """A planted fault: what it is, how it shows, and the line that it changes."""

    name: str
    says: str
    symptom: str  # "you would see ..."
    right: str
    planted: str


FAULTS = {
    fault.name: fault
    for fault in (
        Fault(
            "score_lost",
            "the score is put one step late, on padding, and masked away",
            "a score that stays where it began, with a KL near 0: nothing pays the policy for moving",
            "last = mask.sum(dim=1) - 1",
            "last = mask.sum(dim=1)",
        ),
        Fault(
            "wrong_temperature",
            "sampled at temperature 0.7, scored at 1",
            "a ratio that is not 1 before the first update (first_ratio_error), in every iteration",
            "logits = table[last]",
            "logits = table[last] / 0.7, in sampling alone",
        ),
        Fault(
            "critic_not_trained",
            "the optimiser was not given the critic's parameters",
            "an explained variance of exactly 0 to the end, while the score rises all the same",
            "Adam([*policy.parameters(), *critic.parameters()])",
            "Adam([*policy.parameters()])",
        ),
        Fault(
            "entropy_sign",
            "the entropy is added to the loss instead of subtracted",
            "an entropy that falls almost to 0 within ten iterations: the policy writes one text only",
            "loss = policy_loss + vf_coef * value_loss - ent_coef * entropy",
            "loss = policy_loss + vf_coef * value_loss + ent_coef * entropy",
        ),
        Fault(
            "kl_sign",
            "the KL penalty is added to the reward instead of subtracted",
            "a reward above the score, and a KL that climbs beyond that of a healthy run",
            "rewards = -kl_coef * kl",
            "rewards = +kl_coef * kl",
        ),
    )
}


@dataclass
class ToyRun:
    """One PPO run on the toy world, with at most one fault in it."""

    fault: str | None = None
    table: Tensor = field(init=False)
    critic: nn.Linear = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.reference = 0.7 * torch.randn(WORDS + 1, WORDS, generator=self.generator)
        self.table = self.reference.clone().requires_grad_(True)
        self.critic = nn.utils.skip_init(nn.Linear, WORDS + STEPS, 1)
        nn.init.zeros_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)
        trained = [self.table] if self.fault == "critic_not_trained" else [self.table, *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(trained, lr=0.08)

    @torch.no_grad()
    def sample(self) -> tuple[Tensor, Tensor]:
        """BATCH texts: tokens (B, T), mask (B, T)."""
        last, alive, tokens, mask = torch.full((BATCH,), WORDS), torch.ones(BATCH, dtype=torch.bool), [], []
        for _ in range(STEPS):
            logits = self.table[last] / self.temperature(sampling=True)
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(1)
            last = torch.where(alive, drawn, EOS)
            tokens.append(last)
            mask.append(alive)
            alive = alive & (last != EOS)
        return torch.stack(tokens, 1), torch.stack(mask, 1)

    def temperature(self, *, sampling: bool) -> float:
        """1 everywhere, but for the fault that samples at another one."""
        return 0.7 if sampling and self.fault == "wrong_temperature" else 1.0

    def logits(self, table: Tensor, tokens: Tensor, *, sampling: bool = False) -> Tensor:
        """(B, T, V): what each token was drawn from."""
        before = torch.cat([torch.full_like(tokens[:, :1], WORDS), tokens[:, :-1]], dim=1)
        return table[before] / self.temperature(sampling=sampling)

    def values(self, tokens: Tensor) -> Tensor:
        """(B, T): the critic's, from the words so far and the number of the step."""
        written = F.one_hot(tokens, WORDS).cumsum(1) - F.one_hot(tokens, WORDS)
        steps = torch.eye(STEPS).expand(len(tokens), -1, -1)
        return self.critic(torch.cat([written.float(), steps], dim=-1)).squeeze(-1)

    def rewards(self, scores: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
        """Shaped rewards (B, T), as the fault has it."""
        if self.fault == "kl_sign":
            return shaped_rewards(scores, -kl, mask, kl_coef=KL_COEF)
        if self.fault == "score_lost":
            last = mask.sum(dim=1, keepdim=True)  # one too many
            late = torch.where(torch.arange(STEPS) == last, scores[:, None], 0)
            return torch.where(mask, -KL_COEF * kl + late, 0)
        return shaped_rewards(scores, kl, mask, kl_coef=KL_COEF)

    def step(self) -> dict[str, float]:
        """One iteration; returns its metrics, named as the trainer names them."""
        tokens, mask = self.sample()
        with torch.no_grad():
            old = action_log_probs(self.logits(self.table, tokens, sampling=True), tokens)
            kl = sampled_kl(old, action_log_probs(self.logits(self.reference, tokens), tokens), kind="k1")
            kl, values = torch.where(mask, kl, 0), self.values(tokens)
            proxy = torch.where(mask, SENTIMENT[tokens], 0).sum(1)
            repeats = ((tokens[:, 1:] == tokens[:, :-1]) & mask[:, 1:]).sum(1)
            rewards = self.rewards(proxy, kl, mask)
            advantages, returns = gae(rewards, values, mask, gamma=GAMMA, lam=LAM)
            advantages = masked_whiten(advantages, mask)
        reports = [self.update(tokens, mask, old, values, advantages, returns) for _ in range(EPOCHS)]
        metrics = {name: sum(report[name] for report in reports) / EPOCHS for name in reports[0]}
        measured = {
            "score": proxy.mean(),
            "gold": (proxy - repeats).mean(),
            "kl": kl.sum(1).mean(),
            "reward": rewards.sum(1).mean(),
            "explained_variance": explained_variance(values, returns, mask),
            "response_length": mask.sum(1).float().mean(),
        }
        first = {"first_ratio_error": reports[0]["ratio_error"]}
        return metrics | {name: value.item() for name, value in measured.items()} | first

    def update(self, tokens, mask, old, values, advantages, returns) -> dict[str, float]:
        """One optimiser step on the whole batch."""
        logits = self.logits(self.table, tokens)
        log_probs = action_log_probs(logits, tokens)
        policy_loss = clipped_policy_loss(log_probs, old, advantages, mask, clip_eps=CLIP)
        value_loss = clipped_value_loss(self.values(tokens), values, returns, mask, clip_eps=CLIP)
        mean_entropy = masked_mean(entropy(logits), mask)
        ent_coef = -ENT_COEF if self.fault == "entropy_sign" else ENT_COEF
        loss = ppo_loss(policy_loss, value_loss, mean_entropy, vf_coef=0.5, ent_coef=ent_coef)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        ratio = importance_ratio(log_probs, old).detach()
        report = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": mean_entropy,
            "approx_kl": masked_mean(sampled_kl(old, log_probs, kind="k3"), mask),
            "clip_fraction": clip_fraction(ratio, mask, clip_eps=CLIP, advantages=advantages),
            "ratio_error": masked_mean((ratio - 1).abs(), mask),
        }
        return {name: value.item() for name, value in report.items()}


@cache
def toy_history(fault: str | None) -> tuple[dict[str, float], ...]:
    """The metrics of a whole run, iteration by iteration; None is the healthy one."""
    run = ToyRun(fault)
    return tuple(run.step() for _ in range(ITERATIONS))
