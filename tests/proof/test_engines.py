"""Engines. What verl's and OpenRLHF's own functions compute of what lessons 11 to 13 teach: where they agree with the
functions here, and where an option is not what its name promises. Skipped where they are not installed.
"""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from proof.test_leash import EXACT, WORLDS
from proof.worlds import seeded
from rlhf_lessons.baselines import group_advantages, leave_one_out_baseline
from rlhf_lessons.ppo import aggregate, clipped_policy_loss
from rlhf_lessons.preferences import dpo_loss, ipo_loss

GROUP = 4


@pytest.fixture(scope="module")
def verl():
    """Its functions of PPO and its kin (0.9.1)."""
    return pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)


def openrlhf(name):
    """One of the files in OpenRLHF's models (0.11.2), without those beside it, which need a GPU's libraries."""
    found = importlib.util.find_spec("openrlhf")
    if found is None:
        pytest.skip("openrlhf is not installed")
    package = types.ModuleType("openrlhf_models")
    package.__path__ = [f"{found.submodule_search_locations[0]}/models"]
    sys.modules.setdefault(package.__name__, package)
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("deepspeed") is None:  # which they train with: nothing here asks it
            patch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
        return pytest.importorskip(f"{package.__name__}.{name}", exc_type=ImportError)


def normal(*shape, seed):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def texts(rows=12, steps=6):
    """Log-probabilities now and then, advantages of whole texts, and which tokens are real."""
    mask = torch.arange(steps) < torch.randint(1, steps + 1, (rows, 1), generator=seeded(7))
    old = -normal(rows, steps, seed=1).abs()
    return old + 0.3 * normal(rows, steps, seed=2), old, normal(rows, 1, seed=3).expand(rows, steps), mask


def test_three_means(claim, verl):
    x, _, _, mask = texts()
    modes = {"token-mean": "tokens", "seq-mean-token-mean": "sequences", "seq-mean-token-sum-norm": "constant"}
    theirs = [verl.agg_loss(x, mask, mode) for mode in modes]
    ours = [aggregate(x, mask, over=over, constant=6 if over == "constant" else None) for over in modes.values()]
    text = "verl's token-mean, seq-mean-token-mean and seq-mean-token-sum-norm are `aggregate`'s three"
    claim.equal("engines.verl_means", text, torch.stack(theirs), torch.stack(ours), 1e-7)  # it adds 1e-8 to a length


def test_group_advantages(claim, verl):
    scores, group = normal(12, seed=4), torch.arange(12) // GROUP
    mask = torch.ones(12, 1)
    index = group.numpy().astype(str).astype(object)

    def theirs(function, **options):
        return function(scores[:, None].clone(), mask, index, **options)[0][:, 0]

    plain = theirs(verl.compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False)
    claim.equal("engines.verl_centred", "verl's GRPO without its deviation: ours with scale none", plain,
                group_advantages(scores, group, scale="none"))  # fmt: skip
    scaled = theirs(verl.compute_grpo_outcome_advantage)
    bessel = ((GROUP - 1) / GROUP) ** 0.5
    claim.equal("engines.verl_grpo", "verl's GRPO: ours times √((G−1)/G), since its deviation has Bessel's correction",
                scaled, bessel * group_advantages(scores, group, scale="group"), 1e-5)  # fmt: skip
    grouped = scores.view(-1, GROUP)
    rloo = theirs(verl.compute_rloo_outcome_advantage)
    claim.equal("engines.verl_rloo", "verl's RLOO: the score less the mean of the others", rloo,
                (grouped - leave_one_out_baseline(grouped)).flatten())  # fmt: skip
    assert np.unique(index).size == 3


def gradients_of(estimate):
    """The expected gradient of a per-token loss in each world."""
    return [world.as_loss(estimate(world)) for world in WORLDS]


def test_verl_s_straight_through_kl(claim, verl):
    value = [verl.kl_penalty(x.log_probs, x.ref, "k3+").detach() for x in WORLDS]
    claim.equal("engines.verl_k3_value", "verl's k3+ has the value of k3", [x.per_token("k3") for x in WORLDS], value)
    found = gradients_of(lambda x: verl.kl_penalty(x.log_probs, x.ref, "k3+"))
    k2 = gradients_of(lambda x: x.per_token("k2"))
    claim.equal(
        "engines.verl_k3", "and as a loss the gradient of k2 per token, for which it is called unbiased", k2, found
    )
    far = min(x.far(gradient) for x, gradient in zip(WORLDS, found, strict=True))
    text = "which is not ∇KL of whole texts: relative distance, the smallest of six worlds"
    claim.biased("engines.verl_k3_texts", text, 0.0, far, 0.1, digits=2)


def test_openrlhf_s_unbiased_gradient(claim):
    utils = openrlhf("utils")

    def estimate(x):
        # It computes in float32, so the distances below are good to some 1e-6.
        return utils.compute_approx_kl(x.log_probs, x.ref, kl_estimator="k3", unbiased_gradient=True).double()

    found, k2 = gradients_of(estimate), gradients_of(lambda x: x.per_token("k2"))
    text = "OpenRLHF's unbiased_gradient as a loss: the gradient of k2 per token"
    claim.equal("engines.openrlhf_k3", text, k2, found, 1e-5)
    claim.biased("engines.openrlhf_texts", "which is not ∇KL of whole texts", EXACT, found, 0.01)


def test_openrlhf_s_losses(claim):
    loss = openrlhf("loss")
    now, then, advantages, mask = texts()
    theirs = loss.PolicyLoss(policy_loss_type="gspo")(now, then, advantages, mask)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    ours = clipped_policy_loss(now, then, advantages, mask, clip_eps=0.2, level="sequence", over="sequences")
    claim.equal("engines.openrlhf_gspo", "OpenRLHF's GSPO: one ratio a text, a mean over texts", theirs, ours)
    theirs = loss.PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28)(now, then, advantages, mask)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    ours = clipped_policy_loss(now, then, advantages, mask, clip_eps=(0.2, 0.28))
    claim.equal("engines.openrlhf_clip", "OpenRLHF's clip-higher", theirs, ours)
    four = [normal(9, seed=seed) for seed in range(4)]
    for name, ours, options in (("DPO", dpo_loss, {}), ("IPO", ipo_loss, {"ipo": True})):
        theirs = loss.DPOLoss(beta=0.3, **options)(*four)[0]
        claim.equal(f"engines.openrlhf_{name.lower()}", f"OpenRLHF's {name}", theirs, ours(*four, beta=0.3))
