"""KL. The three one-sample estimates k1, k2, k3 as values and as losses, per token and for whole sequences, and what
becomes of ∇KL when a sum over tokens is differentiated instead of the sequence's log ratio.
"""

import pytest
import torch

from proof.worlds import expected_gradient, language_world, seeded
from rlhf_lessons.exact import optimal_policy
from rlhf_lessons.kl import AdaptiveKL, FixedKL, exact_kl, sampled_kl, shaped_rewards
from rlhf_lessons.policy_gradient import reward_to_go

BETA = 0.3


def random_pair(distance=2.0, tokens=6):
    """Logits of a policy, which require grad, and of a reference at some distance: (V,)."""
    logits = torch.randn(tokens, generator=seeded(0), dtype=torch.float64)
    step = torch.randn(tokens, generator=seeded(1), dtype=torch.float64)
    return logits.requires_grad_(), logits.detach() + distance * step


def divergence(log_p, log_q):
    """Σ p (log p − log q), the definition."""
    return (log_p.exp() * (log_p - log_q)).sum()


def sampled_worlds():
    """Language models with the token log-probabilities (N, T) of a reference at some distance."""
    worlds = [language_world(3, 4), language_world(4, 3, 0), language_world(3, 4, 2, seed=1)]
    return [(w, w.log_probs(w.logits.detach() + 0.7 * noise(w))) for w in worlds]


def noise(w):
    return torch.randn(w.logits.shape, generator=seeded(9), dtype=torch.float64)


def whole(w, token_log_probs):
    """log π(y), (N,)."""
    return torch.where(w.mask, token_log_probs, 0).sum(dim=1)


def gradient(loss, parameter):
    return torch.autograd.grad(loss, parameter, retain_graph=True)[0]


# --- One token, the state held fixed -----------------------------------------------------------


@pytest.mark.equation("8.1")
@pytest.mark.equation("8.2")
def test_values_per_token(claim):
    logits, ref_logits = random_pair()
    log_probs, ref = logits.detach().log_softmax(-1), ref_logits.log_softmax(-1)
    exact = divergence(log_probs, ref)
    claim.equal("kl.exact", "`exact_kl` of two next-token distributions", exact, exact_kl(logits, ref_logits))
    mean = {kind: log_probs.exp() @ sampled_kl(log_probs, ref, kind=kind) for kind in ("k1", "k2", "k3")}
    claim.equal("kl.k1", "the mean of k1 over the policy's tokens is KL(π‖ref)", exact, mean["k1"])
    claim.equal("kl.k3", "so is that of k3", exact, mean["k3"])
    claim.biased("kl.k2", "that of k2 is not", exact, mean["k2"], 0.01)
    text = "nor is KL(ref‖π), which a flipped sign would give"
    claim.biased("kl.reverse", text, exact, divergence(ref, log_probs), 0.01)
    assert sampled_kl(log_probs, ref, kind="k1").min() < 0 <= sampled_kl(log_probs, ref, kind="k3").min()


@pytest.mark.equation("8.2")
def test_k2_close_to_the_reference(claim):
    ratios = []
    for distance in (0.02, 0.01):
        logits, ref_logits = random_pair(distance)
        log_probs, ref = logits.detach().log_softmax(-1), ref_logits.log_softmax(-1)
        bias = log_probs.exp() @ sampled_kl(log_probs, ref, kind="k2") - divergence(log_probs, ref)
        ratios.append(bias)
    text = "k2's bias is of third order: half the distance, an eighth of it"
    claim.equal("kl.k2_order", text, 8.0, ratios[0] / ratios[1], 0.2, digits=2)


@pytest.mark.equation("8.2")
def test_losses_per_token(claim):
    # The tokens are drawn, then held; only the log-probability is differentiated. Mean over all tokens.
    logits, ref_logits = random_pair()
    log_probs, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    probs = log_probs.detach().exp()
    obtained = {kind: gradient(probs @ sampled_kl(log_probs, ref, kind=kind), logits) for kind in ("k1", "k2", "k3")}
    text = "k1 as a loss has the expected gradient 0: it does nothing"
    claim.equal("kl.loss_k1", text, torch.zeros_like(logits), obtained["k1"])
    forward, backward = gradient(divergence(log_probs, ref), logits), gradient(divergence(ref, log_probs), logits)
    claim.equal("kl.loss_k2", "k2 as a loss has ∇KL(π‖ref)", forward, obtained["k2"])
    claim.equal("kl.loss_k3", "k3 as a loss has ∇KL(ref‖π)", backward, obtained["k3"])
    claim.biased("kl.loss_k3_not_forward", "which is another vector", forward, obtained["k3"], 0.01)


# --- Whole sequences ---------------------------------------------------------------------------


def sequence_divergences(w, ref):
    """KL(π‖ref) and KL(ref‖π) over whole sequences, by their definition."""
    return divergence(whole(w, w.log_probs()), whole(w, ref)), divergence(whole(w, ref), whole(w, w.log_probs()))


@pytest.mark.equation("8.2")
def test_values_and_losses_per_sequence(claim):
    values = {kind: [] for kind in ("exact", "k1", "k3", "forward", "backward", "zero", "d1", "d2", "d3")}
    for w, ref in sampled_worlds():
        log_prob, ref_log_prob = whole(w, w.log_probs()), whole(w, ref)
        forward, backward = sequence_divergences(w, ref)
        values["exact"].append(forward)
        values["forward"].append(gradient(forward, w.logits))
        values["backward"].append(gradient(backward, w.logits))
        values["zero"].append(torch.zeros_like(w.logits))
        for kind in ("k1", "k2", "k3"):
            mean = w.probs @ sampled_kl(log_prob, ref_log_prob, kind=kind)
            values.setdefault(kind, []).append(mean)
            values["d" + kind[1]].append(gradient(mean, w.logits))
    text = "k{} of the whole log ratio has the mean KL(π‖ref) of sequences"
    claim.equal("kl.sequence_k1", text.format(1), values["exact"], values["k1"])
    claim.equal("kl.sequence_k3", text.format(3), values["exact"], values["k3"])
    claim.equal("kl.sequence_loss_k1", "as a loss k1 of it has the gradient 0", values["zero"], values["d1"])
    claim.equal("kl.sequence_loss_k2", "k2 of it ∇KL(π‖ref) of sequences", values["forward"], values["d2"])
    claim.equal("kl.sequence_loss_k3", "k3 of it ∇KL(ref‖π) of sequences", values["backward"], values["d3"])


@pytest.mark.equation("8.1")
def test_chain_rule(claim):
    exact, obtained = [], []
    for w, ref in sampled_worlds():
        ref_logits = w.logits.detach() + 0.7 * noise(w)
        by_state = torch.where(w.mask, exact_kl(w.logits[w.rows], ref_logits[w.rows]), 0)
        exact.append(sequence_divergences(w, ref)[0])
        obtained.append(w.probs @ by_state.sum(dim=1))
    text = "the KL of sequences is the mean over π's own prefixes of the summed next-token KLs"
    claim.equal("kl.chain_rule", text, exact, obtained)


@pytest.mark.equation("8.2")
def test_tokenwise_sum_misses_the_states(claim):
    # KL_seq = Σ_s d(s)·KL(s). The tokenwise loss differentiates KL(s) and holds d(s), the chance to come there.
    exact, tokenwise, missing = [], [], []
    for w, ref in sampled_worlds():
        ref_logits = w.logits.detach() + 0.7 * noise(w)
        exact.append(gradient(sequence_divergences(w, ref)[0], w.logits))
        loss = torch.where(w.mask, sampled_kl(w.log_probs(), ref.detach(), kind="k2"), 0).sum(dim=1)
        tokenwise.append(gradient(w.probs @ loss, w.logits))
        by_state = torch.where(w.mask, exact_kl(w.logits[w.rows], ref_logits[w.rows]), 0).sum(dim=1).detach()
        missing.append(gradient(whole(w, w.log_probs()).exp() @ by_state, w.logits))
    text = "k2 summed over tokens as a loss is not ∇KL(π‖ref) of sequences"
    claim.biased("kl.tokenwise", text, exact, tokenwise, 0.01)
    text = "what it lacks is Σ_s KL(s)·∇d(s): how θ changes which prefixes s are reached"
    missed = [a - b for a, b in zip(exact, tokenwise, strict=True)]
    claim.equal("kl.tokenwise_missing", text, missing, missed)


@pytest.mark.equation("8.3")
@pytest.mark.equation("4.1")
def test_k1_in_the_reward(claim):
    # The toll is held constant like any reward; reward-to-go credits each token with the tolls that follow it.
    penalty, both, exact_penalty, exact_both = [], [], [], []
    for w, ref in sampled_worlds():
        scores = w.rewards.sum(dim=1)
        toll = sampled_kl(w.log_probs(), ref, kind="k1").detach()
        for total, score in ((penalty, torch.zeros_like(scores)), (both, scores)):
            rewards = shaped_rewards(score, toll, w.mask, kl_coef=BETA)
            total.append(expected_gradient(w, reward_to_go(rewards, w.mask, gamma=1.0)))
        exact_penalty.append(gradient(-BETA * sequence_divergences(w, ref)[0], w.logits))
        objective = whole(w, w.log_probs()).exp() @ scores - BETA * sequence_divergences(w, ref)[0]
        exact_both.append(gradient(objective, w.logits))
    claim.equal("kl.reward", "k1 in the reward, with reward-to-go: exactly −β∇KL(π‖ref)", exact_penalty, penalty)
    text = "with the score on the last token: exactly ∇(E[score] − β·KL), what RLHF maximises"
    claim.equal("kl.shaped_reward", text, exact_both, both)


@pytest.mark.equation("8.3")
def test_shaped_rewards_add_up(claim):
    exact, obtained = [], []
    for w, ref in sampled_worlds():
        scores = w.random_by_state()[:, 0] + torch.arange(len(w.probs))
        kl = sampled_kl(w.log_probs(), ref, kind="k1")
        exact.append(scores - BETA * (whole(w, w.log_probs()) - whole(w, ref)))
        obtained.append(shaped_rewards(scores, kl, w.mask, kl_coef=BETA).sum(dim=1))
    text = "a response's shaped rewards add up to score − β·(log π(y|x) − log π_ref(y|x))"
    claim.equal("kl.shaped_sum", text, exact, obtained)
    rewards = shaped_rewards(torch.ones(1), torch.zeros(1, 4), torch.tensor([[True, True, True, False]]), kl_coef=BETA)
    exact = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    claim.equal("kl.last_token", "the score stands on the last real token, not after it", exact, rewards)


# --- The optimum -------------------------------------------------------------------------------


@pytest.mark.equation("8.4")
def test_nothing_pulls_at_the_optimum(claim):
    # At π* the shaped return of every sequence is the same number, β log Z.
    for w, ref in sampled_worlds()[:1]:
        scores, ref_whole = w.rewards.sum(dim=1), whole(w, ref).detach()
        best = optimal_policy(ref_whole, scores, kl_coef=BETA)
        log_z = (ref_whole + scores / BETA).logsumexp(dim=0)
        objective = best.exp() @ (scores - BETA * (best - ref_whole))
        claim.equal("kl.optimum", "π* ∝ π_ref·exp(r/β) reaches E[r] − β·KL = β log Z", BETA * log_z, objective)
        logits = best.clone().requires_grad_()  # one softmax over all sequences
        log_prob = logits.log_softmax(-1)
        toll = sampled_kl(log_prob, ref_whole, kind="k1").detach()
        shaped = shaped_rewards(scores, toll[:, None], torch.ones(len(scores), 1, dtype=torch.bool), kl_coef=BETA)
        obtained = gradient((best.exp() * log_prob) @ shaped[:, 0], logits)
        text = "at π* the shaped policy gradient is exactly 0"
        claim.equal("kl.optimum_gradient", text, torch.zeros_like(obtained), obtained)
        other = (0.9 * best).log_softmax(-1)
        lower = other.exp() @ (scores - BETA * (other - ref_whole))
        text = "and a policy near it gets less"
        claim.decreasing("kl.optimum_best", text, {"π*": objective, "π* flattened by a tenth": lower}, 1e-4)


@pytest.mark.equation("8.5")
def test_adaptive_coefficient(claim):
    # β ← β(1 + clip(KL/target − 1, ±0.2)·n/horizon), written out for four batches of 100 with target 6, horizon 1000.
    controller = AdaptiveKL(0.1, 6.0, 1000)
    obtained = []
    for kl in (6.0, 6.6, 60.0, 0.0):
        controller.update(kl, 100)
        obtained.append(controller.coef)
    exact = torch.tensor([0.1, 0.1 * 1.01, 0.1 * 1.01 * 1.02, 0.1 * 1.01 * 1.02 * 0.98], dtype=torch.float64)
    text = "β stays at the target, rises by 1 % for 10 % too much KL, and by no more than 2 % however far off"
    claim.equal("kl.adaptive", text, exact, torch.tensor(obtained, dtype=torch.float64))
    fixed = FixedKL(0.1)
    fixed.update(60.0, 100)
    claim.equal("kl.fixed", "a fixed one stays", 0.1, fixed.coef)
