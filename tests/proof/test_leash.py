"""Leash. Where the KL is paid and by which estimate: expected gradients beside ∇KL(π‖π_ref) of whole texts, by
enumeration, and the two halves of which each of them is made.
"""

import pytest
import torch

from proof.worlds import expected_gradient, language_world, seeded
from rlhf_lessons.exact import sequence_kl
from rlhf_lessons.importance import importance_ratio
from rlhf_lessons.kl import exact_kl, sampled_kl, sequence_kl_loss
from rlhf_lessons.policy_gradient import reward_to_go


class Leashed:
    """A small language model, a reference at some distance, and the gradients of the leash in all its places."""

    def __init__(self, *shape, seed):
        self.w = language_world(*shape, seed=seed)
        noise = torch.randn(self.w.logits.shape, generator=seeded(100 + seed), dtype=torch.float64)
        self.ref_logits = self.w.logits.detach() + noise
        self.log_probs, self.ref = self.w.log_probs(), self.w.log_probs(self.ref_logits)
        self.exact = self.gradient(sequence_kl(self.whole(self.log_probs), self.whole(self.ref)))

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.w.logits, retain_graph=True)[0]

    def whole(self, x):
        return torch.where(self.w.mask, x, 0).sum(dim=1)

    def to_go(self, x):
        return reward_to_go(x, self.w.mask, gamma=1.0)

    def as_loss(self, terms):
        """Of a loss (N, T) or (N,) for each text, the texts held as drawn."""
        return self.gradient(self.w.probs @ (self.whole(terms) if terms.dim() == 2 else terms))

    def in_reward(self, tolls):
        """Of tolls (N, T), constant; each token is charged from its own on."""
        return -expected_gradient(self.w, self.to_go(-tolls.detach()))

    def per_token(self, kind):
        return sampled_kl(self.log_probs, self.ref, kind=kind)

    def by_state(self):
        return exact_kl(self.w.logits[self.w.rows], self.ref_logits[self.w.rows])

    def far(self, gradient):
        """Distance from ∇KL, in its lengths."""
        return float((gradient - self.exact).norm() / self.exact.norm())


WORLDS = [Leashed(*shape, seed=seed) for shape in ((3, 3), (3, 4, 2)) for seed in range(3)]
EXACT = [world.exact for world in WORLDS]


@pytest.mark.equation("11.1")
def test_right_places(claim):
    weighed = []
    for x in WORLDS:  # a mean over rows, so that row n is given N·P(n) of itself
        rows = [sequence_kl_loss(x.log_probs[[n]], x.ref[[n]], x.w.mask[[n]]) for n in range(len(x.w.probs))]
        weighed.append(x.gradient(x.w.probs @ torch.stack(rows)))
    claim.equal("leash.right", "`sequence_kl_loss` has the expected gradient ∇KL(π‖π_ref) of whole texts",
                EXACT, weighed)  # fmt: skip
    obtained = [x.in_reward(x.per_token("k1")) for x in WORLDS]
    claim.equal("leash.k1_reward", "so has k1 in the reward, from each token on", EXACT, obtained)
    obtained = [x.as_loss(sampled_kl(x.whole(x.log_probs), x.whole(x.ref), kind="k2")) for x in WORLDS]
    claim.equal("leash.k2_text", "and k2 of the whole text as a loss", EXACT, obtained)
    obtained = [-expected_gradient(x.w, -x.whole(x.per_token("k1")).detach()[:, None].expand_as(x.ref)) for x in WORLDS]
    claim.equal("leash.k1_reward_text", "and k1 of the whole text in the reward of each token", EXACT, obtained)


@pytest.mark.equation("8.2")
def test_wrong_places(claim):
    obtained = [x.as_loss(x.per_token("k1")) for x in WORLDS]
    text = "k1 as a loss, per token: gradient 0"
    claim.equal("leash.k1_loss", text, [torch.zeros_like(g) for g in EXACT], obtained)
    obtained = [x.as_loss(x.to_go(x.per_token("k1"))) for x in WORLDS]
    text = "and of the tolls to go: 0 too"
    claim.equal("leash.k1_loss_to_go", text, [torch.zeros_like(g) for g in EXACT], obtained)
    for kind in ("k2", "k3"):
        text = f"{kind} per token as a loss is not ∇KL(π‖π_ref) of texts"
        claim.biased(f"leash.{kind}_loss", text, EXACT, [x.as_loss(x.per_token(kind)) for x in WORLDS], 0.01)
        text = f"nor is {kind} in the reward"
        claim.biased(f"leash.{kind}_reward", text, EXACT, [x.in_reward(x.per_token(kind)) for x in WORLDS], 0.01)
        to_go = [x.as_loss(sampled_kl(x.to_go(x.log_probs), x.to_go(x.ref), kind=kind)) for x in WORLDS]
        text = f"nor is {kind} of the log ratios to go as a loss"
        claim.biased(f"leash.{kind}_loss_to_go", text, EXACT, to_go, 0.01)
    obtained = [x.as_loss(x.by_state()) for x in WORLDS]
    text = "nor is each state's exact KL as a loss: it is not the sampling that is at fault"
    claim.biased("leash.exact_loss", text, EXACT, obtained, 0.01)
    per_token = [x.as_loss(x.per_token("k2")) for x in WORLDS]
    text = "k2 per token as a loss has the gradient of the states' exact KL"
    claim.equal("leash.k2_loss_is", text, obtained, per_token)
    own = [-expected_gradient(x.w, -x.per_token("k1").detach()) for x in WORLDS]
    text = "and of k1 in the reward where each token is charged its own toll only"
    claim.equal("leash.k2_own_toll", text, per_token, own)


@pytest.mark.equation("8.2")
def test_two_halves(claim):
    # ∇E_π[k] = E[k ∇log π(y)] + E[∇k], the toll's half and the loss's. Where k's mean is the KL at every θ, it is ∇KL.
    for kind in ("k1", "k3"):
        halves = [x.in_reward(x.per_token(kind)) + x.as_loss(x.per_token(kind)) for x in WORLDS]
        text = f"{kind} in the reward and as a loss, both at once: ∇KL(π‖π_ref) of texts"
        claim.equal(f"leash.halves_{kind}", text, EXACT, halves)
    halves = []
    for x in WORLDS:
        later = x.to_go(x.by_state().detach()) - torch.where(x.w.mask, x.by_state().detach(), 0)
        halves.append(x.as_loss(x.by_state()) - expected_gradient(x.w, -later))
    text = "each state's exact KL as a loss, and the later states' in the reward: ∇KL(π‖π_ref) of texts"
    claim.equal("leash.halves_exact", text, EXACT, halves)
    halves = [x.in_reward(x.per_token("k2")) + x.as_loss(x.per_token("k2")) for x in WORLDS]
    claim.biased("leash.halves_k2", "k2's halves are not: its mean is another number", EXACT, halves, 0.01)


@pytest.mark.equation("8.2")
def test_ratio_times_k3(claim):
    per_sample, k2 = [], []
    for x in WORLDS:
        ratio = importance_ratio(x.log_probs, x.log_probs.detach())
        for terms, into in ((ratio * x.per_token("k3"), per_sample), (x.per_token("k2"), k2)):
            into.append(torch.autograd.grad(terms[x.w.mask].sum(), x.log_probs, retain_graph=True)[0][x.w.mask])
    text = "π/π_old × k3 has k2's gradient where π = π_old, d·∇log π, token by token"
    claim.equal("leash.ratio_k3", text, k2, per_sample)
    text_ratio = [
        x.as_loss(importance_ratio(y, y.detach()) * sampled_kl(y, x.whole(x.ref), kind="k3"))
        for x in WORLDS for y in (x.whole(x.log_probs),)
    ]  # fmt: skip
    claim.equal("leash.ratio_k3_text", "of whole texts it is exact", EXACT, text_ratio)


def test_the_order_is_the_world_s(claim):
    far = []
    for x in (Leashed(3, 3, seed=0), Leashed(3, 3, seed=17)):
        far.append({"k2 as a loss": x.far(x.as_loss(x.per_token("k2"))),
                    "k3 in the reward": x.far(x.in_reward(x.per_token("k3")))})  # fmt: skip
    text = "k3 in the reward is further from ∇KL of texts than k2 per token as a loss in one world"
    claim.decreasing("leash.order", text, {name: far[0][name] for name in ("k3 in the reward", "k2 as a loss")}, 0.1)
    claim.decreasing("leash.other_order", "and nearer in another", far[1], 0.1)


# --- A peer: TRL's `use_bias_correction_kl` -----------------------------------------------------


def trl_gradient(x, corrected):
    """What TRL's GRPO loss gives for these texts with β = 1 and no advantages, each text a batch of its own."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)
    import collections
    from types import SimpleNamespace

    total = 0
    for n, prob in enumerate(x.w.probs):
        length = int(x.w.mask[n].sum())
        row = slice(n, n + 1), slice(0, length)
        log_probs = x.log_probs[row]
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *a, now=log_probs, **o: (now, torch.zeros_like(now), None),
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            importance_sampling_level="token", beta=1.0, loss_type="dr_grpo", epsilon_low=0.2, epsilon_high=0.2,
            args=SimpleNamespace(use_bias_correction_kl=corrected, delta=None, router_aux_loss_coef=0.0),
            use_vllm=False, vllm_importance_sampling_correction=False, max_completion_length=1,
            model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False, use_adaptive_entropy=False, entropy_coef=0.0,
            _metrics={"train": collections.defaultdict(list)},
            accelerator=SimpleNamespace(
                gather=lambda y: y.detach(), num_processes=1, reduce=lambda y, **o: y.detach(), device="cpu",
            ),
        )  # fmt: skip
        ones = torch.ones(1, length)
        inputs = {
            "prompt_ids": torch.zeros(1, 1, dtype=torch.long), "prompt_mask": torch.ones(1, 1, dtype=torch.long),
            "completion_ids": x.w.actions[row], "completion_mask": ones, "advantages": torch.zeros(1),
            "ref_per_token_logps": x.ref[row],
        }  # fmt: skip
        total = total + prob * grpo.GRPOTrainer._compute_loss(trainer, None, inputs)
    return x.gradient(total)


@pytest.mark.equation("8.2")
def test_trl_s_correction(claim):
    """Recorded with TRL 1.12; another version's loss may ask its trainer for more than is given here."""
    pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)
    corrected = [trl_gradient(x, True) for x in WORLDS]
    k2 = [x.as_loss(x.per_token("k2")) for x in WORLDS]
    claim.equal("leash.trl_k2", "TRL's bias correction of the KL: the gradient of k2 per token", k2, corrected, 1e-6)
    text = "which is unbiased for each state's KL, not for that of texts"
    claim.biased("leash.trl_texts", text, EXACT, corrected, 0.01)
    k3 = [x.as_loss(x.per_token("k3")) for x in WORLDS]
    claim.equal("leash.trl_k3", "without it: k3's", k3, [trl_gradient(x, False) for x in WORLDS], 1e-6)
