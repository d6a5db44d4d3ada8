"""Peers. `gae` beside torchrl's and stable-baselines3's on random episodes with terminations inside a row and a cut at
its end, and where their conventions differ from the ones here.
"""

import pytest
import torch

from proof.worlds import seeded
from rlhf_lessons.advantages import gae
from rlhf_lessons.masking import masked_mean, masked_whiten

ROWS, STEPS, GAMMA, LAM = 6, 12, 0.97, 0.9
TOLERANCE = 1e-5  # of float32, which stable-baselines3 computes in


def random_episodes():
    """Rewards, values, ends of episodes, each (B, T), and the value after the last step (B,)."""
    rewards, values = torch.randn(2, ROWS, STEPS, generator=seeded(0))
    terminated = torch.rand(ROWS, STEPS, generator=seeded(1)) < 0.2
    assert terminated[:, :-1].any() and not terminated[:, -1].all()
    return rewards, values, terminated, torch.randn(ROWS, generator=seeded(2))


def ours():
    rewards, values, terminated, last = random_episodes()
    return gae(rewards, values, gamma=GAMMA, lam=LAM, terminated=terminated, bootstrap_value=last)


@pytest.mark.equation("5.3")
def test_torchrl(claim):
    functional = pytest.importorskip("torchrl.objectives.value.functional", exc_type=ImportError)
    rewards, values, terminated, last = random_episodes()
    # torchrl wants V(s_{t+1}) from the caller, `done` for any end, `terminated` for true ones, time as dimension −2.
    following = torch.cat([values[:, 1:], last[:, None]], dim=1)
    columns = [x[..., None] for x in (values, following, rewards, terminated, terminated)]
    theirs = functional.generalized_advantage_estimate(GAMMA, LAM, *columns)
    names = "advantages", "returns"
    for name, exact, obtained in zip(names, theirs, ours(), strict=True):
        claim.equal(f"peers.torchrl_{name}", f"{name} of torchrl and of `gae`", exact, obtained, TOLERANCE)


@pytest.mark.equation("5.3")
def test_stable_baselines3(claim):
    buffers = pytest.importorskip("stable_baselines3.common.buffers", exc_type=ImportError)
    from gymnasium import spaces

    rewards, values, terminated, last = random_episodes()
    space = spaces.Box(-1.0, 1.0, (1,))
    buffer = buffers.RolloutBuffer(STEPS, space, space, device="cpu", gamma=GAMMA, gae_lambda=LAM, n_envs=ROWS)
    # Time comes first there, and an end is marked on the first step of the next episode.
    buffer.rewards, buffer.values = rewards.T.numpy().copy(), values.T.numpy().copy()
    starts = torch.cat([torch.ones(ROWS, 1), terminated[:, :-1].float()], dim=1)
    buffer.episode_starts = starts.T.numpy().copy()
    buffer.compute_returns_and_advantage(last, terminated[:, -1].numpy())
    for name, theirs, obtained in zip(
        ("advantages", "returns"), (buffer.advantages, buffer.returns), ours(), strict=True
    ):
        exact = torch.as_tensor(theirs).T
        text = f"{name} of stable-baselines3 and of `gae`"
        claim.equal(f"peers.sb3_{name}", text, exact, obtained, TOLERANCE)


# --- Conventions that differ, and by what ------------------------------------------------------


def test_bessels_correction(claim):
    # stable-baselines3 and TRL divide by n − 1 in the variance; the code of Ziegler et al., and this package, by n.
    advantages = torch.randn(4, 16, generator=seeded(0), dtype=torch.float64)
    theirs = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    text = "whitening with Bessel's correction is ours times √((n − 1)/n), here n = 64"
    claim.equal("peers.bessel", text, theirs, masked_whiten(advantages) * (63 / 64) ** 0.5, 1e-7)


def test_mean_over_padding(claim):
    # A mean over all positions, padding included, weighs each token by how full the batch happens to be.
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 4])[:, None]
    x = torch.randn(4, 5, generator=seeded(0), dtype=torch.float64)
    theirs = torch.where(mask, x, 0).mean()
    text = "a mean over all positions is ours times the share of real tokens, here 13/20"
    claim.equal("peers.masked_mean", text, theirs, masked_mean(x, mask) * 13 / 20)


@pytest.mark.equation("5.3")
def test_score_one_step_late(claim):
    # TRL's PPO puts the score on the position after the last token: with V = 0 that token's advantage is λ·score.
    late = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    here = late.roll(-1, dims=1)
    options = dict(gamma=1.0, lam=0.95)
    values = torch.zeros_like(late)
    ours, theirs = (gae(x, values, **options)[0][:, :3] for x in (here, late))
    text = "a score one step late makes every advantage λ times what it should be, here 0.95; at λ = 1 nobody sees it"
    claim.equal("peers.score_late", text, theirs, 0.95 * ours)
    claim.equal("peers.score_last_token", "ours gives the last token the score itself", 1.0, ours[0, 2])
