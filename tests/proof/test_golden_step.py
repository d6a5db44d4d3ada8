"""Golden step. One PPO step of the package against fixtures/golden_step.json, which an independent numpy script wrote
(`golden_step.py`, from the papers); what stands in the padding is replaced by NaN first.
"""

import json

import numpy as np
import pytest
import torch

from proof.golden_step import FIXTURE, fixture
from rlhf_lessons.advantages import gae
from rlhf_lessons.importance import importance_ratio
from rlhf_lessons.kl import sampled_kl, shaped_rewards
from rlhf_lessons.masking import masked_mean, masked_whiten
from rlhf_lessons.policy_gradient import action_log_probs, entropy
from rlhf_lessons.ppo import clip_fraction, clipped_policy_loss, clipped_value_loss, ppo_loss

GOLDEN = json.loads(FIXTURE.read_text(encoding="utf-8"))


def package_step(inputs, gamma, lam, kl_coef, clip_eps, value_clip_eps, vf_coef, ent_coef):
    """The same step by the package's functions, in the order in which the trainer calls them."""
    x = {name: torch.tensor(value, dtype=torch.float64) for name, value in inputs.items()}
    mask = torch.arange(x["tokens"].shape[1]) < x["lengths"][:, None]
    for name in ("old_log_probs", "ref_log_probs", "old_values", "values"):
        x[name] = x[name].masked_fill(~mask, torch.nan)
    rewards = shaped_rewards(
        x["scores"], sampled_kl(x["old_log_probs"], x["ref_log_probs"], kind="k1"), mask, kl_coef=kl_coef
    )
    advantages, returns = gae(rewards, x["old_values"], mask, gamma=gamma, lam=lam)
    white = masked_whiten(advantages, mask)
    log_probs = action_log_probs(x["logits"], x["tokens"].long())
    policy_loss = clipped_policy_loss(log_probs, x["old_log_probs"], white, mask, clip_eps=clip_eps)
    value_loss = clipped_value_loss(x["values"], x["old_values"], returns, mask, clip_eps=value_clip_eps)
    mean_entropy = masked_mean(entropy(x["logits"]), mask)
    ratio = importance_ratio(log_probs, x["old_log_probs"])
    return {
        "rewards": rewards,
        "advantages": advantages,
        "whitened_advantages": white,
        "returns": returns,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": mean_entropy,
        "clip_fraction": clip_fraction(ratio, mask, clip_eps=clip_eps, advantages=white),
        "loss": ppo_loss(policy_loss, value_loss, mean_entropy, vf_coef=vf_coef, ent_coef=ent_coef),
    }


@pytest.mark.equation("7.7")
@pytest.mark.parametrize("name", GOLDEN["steps"])
def test_golden_step(claim, name):
    golden = GOLDEN["steps"][name]
    obtained = package_step(GOLDEN["inputs"], **golden["settings"])
    for quantity, exact in golden["expected"].items():
        settings = ", ".join(f"{key} {value}" for key, value in golden["settings"].items() if key in ("gamma", "lam"))
        text = f"{quantity.replace('_', ' ')} of one step ({settings})"
        claim.equal(f"golden.{name}_{quantity}", text, exact, obtained[quantity], 1e-6)


def test_the_fixture_is_what_the_script_writes():
    made = fixture()
    assert made["inputs"].keys() == GOLDEN["inputs"].keys() and made["steps"].keys() == GOLDEN["steps"].keys()
    for name, value in made["inputs"].items():
        np.testing.assert_allclose(GOLDEN["inputs"][name], value, rtol=0, atol=1e-12)
    for name, golden in made["steps"].items():
        assert GOLDEN["steps"][name]["settings"] == golden["settings"]
        for quantity, value in golden["expected"].items():
            np.testing.assert_allclose(GOLDEN["steps"][name]["expected"][quantity], value, rtol=0, atol=1e-12)
