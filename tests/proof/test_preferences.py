"""Preferences. The expected Bradley–Terry loss over all that an annotator can answer, beside its known optimum."""

import pytest
import torch

from proof.worlds import seeded
from rlhf_lessons.preferences import bradley_terry_loss, preference_probability


def every_comparison(rewards):
    """Every ordered pair of answers: their rewards, each (N²,)."""
    return [x.flatten() for x in torch.broadcast_tensors(rewards[:, None], rewards[None, :])]


@pytest.mark.equation("2.1")
@pytest.mark.equation("2.2")
def test_expected_loss_is_lowest_at_the_annotators_own_rewards(claim):
    true = torch.randn(5, generator=seeded(0), dtype=torch.float64)
    a, b = every_comparison(true)
    wins = 1 / (1 + (b - a).exp())  # how often the annotators prefer a to b
    claim.equal("preferences.odds", "P(a ≻ b) = e^a / (e^a + e^b)", wins, preference_probability(a, b))

    def expected_loss(rewards):
        # Each pair is as often chosen–rejected as the annotators say; over ordered pairs both outcomes occur.
        pairs = zip(*every_comparison(rewards), wins, strict=True)
        return sum(2 * share * bradley_terry_loss(x[None], y[None]) for x, y, share in pairs) / len(wins)

    entropy = -(wins * wins.log() + (1 - wins) * (1 - wins).log()).mean()
    text = "at the annotators' own rewards the expected loss is the entropy of their answers, the lowest it can be"
    claim.equal("preferences.entropy", text, entropy, expected_loss(true))
    rewards = (true + 3).requires_grad_()
    (gradient,) = torch.autograd.grad(expected_loss(rewards), rewards)
    text = "its gradient is 0 there, and at the same rewards shifted by a constant, which no comparison can see"
    claim.equal("preferences.optimum", text, torch.zeros(5), gradient)
    other = true + 0.1 * torch.randn(5, generator=seeded(1), dtype=torch.float64)
    values = {"other rewards": expected_loss(other), "the true ones": expected_loss(true)}
    claim.decreasing("preferences.elsewhere", "elsewhere the loss is higher", values, 1e-5)
