"""PPO. The clipped losses and their gradients region by region, the identity of the first minibatch with the policy
gradient, and what must not matter: padding, the order of the rows, the pieces in which a minibatch is computed.
"""

import copy
import dataclasses

import pytest
import torch

from proof.language_model import small_trainer
from proof.worlds import language_world, seeded
from rlhf_lessons.advantages import gae
from rlhf_lessons.importance import importance_ratio
from rlhf_lessons.masking import masked_mean
from rlhf_lessons.policy_gradient import entropy, policy_gradient_loss, reward_to_go
from rlhf_lessons.ppo import (
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    ppo_loss,
)

# ρ, Â, the loss −min(ρÂ, clip(ρ)Â) at ε = 0.2, and its derivative by log π: −ρÂ, or 0 where the clip is active.
REGIONS = [
    ("Â > 0 and ρ below", 0.5, 2.0, -1.0, -1.0),
    ("Â > 0 and ρ inside", 1.1, 2.0, -2.2, -2.2),
    ("Â > 0 and ρ above", 1.5, 2.0, -2.4, 0.0),
    ("Â < 0 and ρ below", 0.5, -2.0, 1.6, 0.0),
    ("Â < 0 and ρ inside", 1.1, -2.0, 2.2, 2.2),
    ("Â < 0 and ρ above", 1.5, -2.0, 3.0, 3.0),
]


def doubles(*values):
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.equation("7.1")
@pytest.mark.parametrize("number", range(1, 7))
def test_six_regions_of_the_clipped_objective(claim, number):
    region, ratio, advantage, loss, slope = REGIONS[number - 1]
    old = doubles(-1.3)
    log_prob = (old + doubles(ratio).log()).requires_grad_()
    obtained = clipped_policy_loss(log_prob, old, doubles(advantage), clip_eps=0.2)
    (gradient,) = torch.autograd.grad(obtained, log_prob)
    exact, obtained = doubles(slope, loss), torch.stack([gradient[0, 0], obtained])
    claim.equal(f"ppo.region_{number}", f"derivative and loss where {region} the range [0.8, 1.2]", exact[0], obtained)


@pytest.mark.equation("7.2")
def test_clip_fraction_counts_regions(claim):
    ratio, advantages, _, slopes = torch.tensor([region[1:] for region in REGIONS], dtype=torch.float64).T[:, None]
    text = "of the six regions two lose their gradient"
    obtained = clip_fraction(ratio, clip_eps=0.2, advantages=advantages)
    claim.equal("ppo.clip_fraction", text, (slopes == 0).double().mean(), obtained)
    text = "though in four the ratio is out of range"
    claim.equal("ppo.out_of_range", text, 4 / 6, clip_fraction(ratio, clip_eps=0.2))


@pytest.mark.equation("7.1")
@pytest.mark.equation("3.3")
@pytest.mark.parametrize("eos_id", [None, 2])
def test_first_minibatch_is_the_policy_gradient(claim, eos_id):
    # At θ = θ_old every ratio is 1. Both losses see the same rows and advantages; one sums over a row's tokens and
    # averages over rows, the other averages over tokens: a factor of (tokens / rows), the mean response length.
    w = language_world(3, 4, eos_id)
    rows = torch.multinomial(w.probs, 64, replacement=True, generator=seeded(0))
    log_probs, mask = w.log_probs()[rows], w.mask[rows]
    advantages, _ = gae(w.rewards[rows], w.random_by_state()[rows], mask, gamma=1.0, lam=0.95)
    plain = policy_gradient_loss(log_probs, advantages, mask)
    clipped = clipped_policy_loss(log_probs, log_probs.detach(), advantages, mask, clip_eps=0.2)
    exact, obtained = (torch.autograd.grad(x, w.logits, retain_graph=True)[0] for x in (plain, clipped))
    kind = "one length" if eos_id is None else "several lengths"
    text = f"the first minibatch's gradient times the mean response length is the policy gradient's ({kind})"
    claim.equal(f"ppo.first_minibatch_{kind.replace(' ', '_')}", text, exact, obtained * mask.sum() / len(mask))


@pytest.mark.equation("7.3")
def test_value_clip(claim):
    # V, V_old, R̂ -> loss ½max((V − R̂)², (V_old ± 0.2 − R̂)²) and its derivative by V.
    cases = {
        "inside the range": (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9),
        "outside, moved towards the target": (1.5, 1.0, 3.0, 0.5 * 1.8**2, 0.0),
        "outside, moved away from it": (0.5, 1.0, 3.0, 0.5 * 2.5**2, -2.5),
        "outside, past the target": (3.5, 1.0, 1.1, 0.5 * 2.4**2, 2.4),
    }
    for number, (name, (value, old, target, loss, slope)) in enumerate(cases.items(), start=1):
        values = doubles(value).requires_grad_()
        obtained = clipped_value_loss(values, doubles(old), doubles(target), clip_eps=0.2)
        (gradient,) = torch.autograd.grad(obtained, values)
        exact = torch.tensor([slope, loss], dtype=torch.float64)
        text = f"value loss and derivative {name}"
        claim.equal(f"ppo.value_clip_{number}", text, exact, torch.stack([gradient[0, 0], obtained]))


@pytest.mark.equation("7.7")
@pytest.mark.equation("7.6")
def test_entropy_bonus_keeps_entropy(claim):
    logits = torch.randn(6, 5, generator=seeded(0), dtype=torch.float64).requires_grad_()
    before = entropy(logits).mean()
    zero = torch.zeros((), dtype=torch.float64)
    loss = ppo_loss(zero, zero, before, vf_coef=0.1, ent_coef=0.01)
    (gradient,) = torch.autograd.grad(loss, logits)
    probs = logits.detach().softmax(-1)
    text = "the bonus alone has the gradient c·p·(log p + H) of −c·H"
    exact = 0.01 / 6 * probs * (probs.log() - (probs * probs.log()).sum(-1, keepdim=True))
    claim.equal("ppo.entropy_gradient", text, exact, gradient)
    after = entropy(logits - 10 * gradient).mean()
    claim.decreasing(
        "ppo.entropy_sign", "a step down that loss raises the entropy", {"after": after, "before": before}, 1e-4
    )


@pytest.mark.equation("7.4")
def test_explained_variance(claim):
    w = language_world(3, 4)
    policy_draws = torch.multinomial(w.probs, 512, replacement=True, generator=seeded(0))
    returns, values = reward_to_go(w.rewards, gamma=1.0)[policy_draws], w.v[policy_draws]
    exact = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    text = "explained variance of the exact V on 512 sampled episodes (its ε of 1e-8 is the error)"
    claim.equal("ppo.explained_variance", text, exact, explained_variance(values, returns))


# --- What must not matter ----------------------------------------------------------------------


def loss_and_gradient(w, rows, mask, pad, garbage):
    """PPO's losses of these episodes with `pad` columns of garbage on the right, and the gradient by θ and by V."""

    def padded(x, fill):
        return torch.cat([x, torch.full((len(x), pad), fill, dtype=x.dtype)], dim=1)

    garbage_where = ~mask[rows]
    log_probs = padded(w.log_probs()[rows].masked_fill(garbage_where, garbage), garbage)
    old = padded((0.7 * w.log_probs().detach()[rows]).masked_fill(garbage_where, garbage), garbage)
    values = w.random_by_state().requires_grad_()
    shown = padded(values[rows].masked_fill(garbage_where, garbage), garbage)
    rewards, real = padded(w.rewards[rows].masked_fill(garbage_where, garbage), garbage), padded(mask[rows], False)
    advantages, returns = gae(rewards, shown.detach(), real, gamma=0.9, lam=0.95)
    loss = ppo_loss(
        clipped_policy_loss(log_probs, old, advantages, real, clip_eps=0.2),
        clipped_value_loss(shown, shown.detach() + 0.1, returns, real, clip_eps=0.2),
        masked_mean(-log_probs, real),
        vf_coef=0.1,
        ent_coef=0.01,
    )
    return torch.cat([loss[None], *(x.flatten() for x in torch.autograd.grad(loss, [w.logits, values]))])


def test_padding_on_the_right(claim):
    w = language_world(3, 4, 2)
    rows = torch.multinomial(w.probs, 32, replacement=True, generator=seeded(0))
    exact = loss_and_gradient(w, rows, w.mask, 0, 0.0)
    for pad, garbage in ((3, 0.0), (5, 1e30), (2, torch.nan)):
        text = f"{pad} columns of padding that hold {garbage:g} change neither loss nor gradient"
        claim.equal(f"ppo.padding_{garbage:g}", text, exact, loss_and_gradient(w, rows, w.mask, pad, garbage))


def gradient_of(trainer, batch):
    """The trainer's own loss on these rows, and its gradient by every parameter."""
    loss, _ = trainer.losses(batch)
    gradients = torch.autograd.grad(loss, list(trainer.policy.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([loss.detach()[None], *(x.flatten() for x in gradients)])


def test_padding_of_the_language_models_prompts(claim):
    # Prompts of two lengths are padded on the left already; four more columns on the left, and three on the right.
    trainer = small_trainer(dtype=torch.float64)
    batch = trainer.rollout()
    left, right, rows = 4, 3, len(batch)
    pads = [torch.zeros(rows, n, dtype=torch.long) for n in (left, right)]
    changes = dict(
        tokens=torch.cat([pads[0], batch.tokens, pads[1]], dim=1),
        attention_mask=torch.cat([pads[0].bool(), batch.attention_mask, pads[1].bool()], dim=1),
        prompt_length=batch.prompt_length + left,
    )
    names = ("response_mask", "log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns")
    for name in names:
        value = getattr(batch, name)
        changes[name] = torch.cat([value, torch.zeros(rows, right, dtype=value.dtype)], dim=1)
    text = "GPT-2's loss and gradient with 4 more columns of padding on the left and 3 on the right"
    obtained = gradient_of(trainer, dataclasses.replace(batch, **changes))
    claim.equal("ppo.padding_gpt2", text, gradient_of(trainer, batch), obtained)


def test_padding_side_of_the_language_model(claim):
    # A padded row reads the same whether its padding stands before or behind it.
    policy = small_trainer(dtype=torch.float64).policy
    tokens = torch.tensor([[2, 3, 2, 1]])
    alone = policy(tokens, torch.ones_like(tokens))
    pad = torch.zeros(1, 3, dtype=torch.long)
    for side, order in (("left", (pad, tokens)), ("right", (tokens, pad))):
        ids = torch.cat(order, dim=1)
        real = torch.cat([torch.ones_like(x) if x is tokens else x for x in order], dim=1)
        output = policy(ids, real)
        place = slice(3, 7) if side == "left" else slice(0, 4)
        obtained = torch.cat([output.logits[0, place].flatten(), output.values[0, place]])
        exact = torch.cat([alone.logits[0].flatten(), alone.values[0]])
        text = f"GPT-2's logits and values with padding on the {side}"
        claim.equal(f"ppo.padding_side_{side}", text, exact, obtained)


def test_order_and_pieces_of_a_minibatch(claim):
    trainer = small_trainer(dtype=torch.float64)
    batch = trainer.rollout()
    exact = gradient_of(trainer, batch)
    shuffled = batch.rows(torch.randperm(len(batch), generator=seeded(3)))
    claim.equal("ppo.row_order", "loss and gradient with the rows shuffled", exact, gradient_of(trainer, shuffled))
    pieces = list(batch.minibatches(8, seeded(4)))
    tokens = [piece.response_mask.sum() for piece in pieces]
    obtained = sum(n * gradient_of(trainer, piece) for n, piece in zip(tokens, pieces, strict=True)) / sum(tokens)
    text = "minibatches in any order, weighted by their tokens, add up to the batch's gradient"
    claim.equal("ppo.minibatches", text, exact, obtained)
    obtained = sum(gradient_of(trainer, piece) for piece in pieces) / len(pieces)
    text = "a plain mean over minibatches does not, where responses differ in length"
    claim.biased("ppo.minibatches_unweighted", text, exact, obtained, 1e-5)


def test_gradient_accumulation(claim):
    trainers = {n: small_trainer(dtype=torch.float64, gradient_accumulation_steps=n) for n in (1, 2, 4)}
    batch = trainers[1].rollout()
    after = {}
    for n, trainer in trainers.items():
        trainer.generator.manual_seed(5)
        trainer.update(copy.deepcopy(batch))
        after[n] = torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])
    for n in (2, 4):
        text = f"the parameters after an update computed in {n} pieces and in one"
        claim.equal(f"ppo.accumulation_{n}", text, after[1], after[n])
    untouched = torch.cat([p.detach().flatten() for p in small_trainer(dtype=torch.float64).policy.parameters()])
    claim.biased("ppo.update_moves", "which the update did move", untouched, after[1], 1e-4)


@pytest.mark.equation("6.2")
def test_first_ratio_is_one(claim):
    # The sampler reads one token at a time through a cache; the loss reads whole rows. Both must say the same.
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        trainer = small_trainer(dtype=dtype)
        batch = trainer.rollout()
        _, report = trainer.losses(batch)
        name = str(dtype).removeprefix("torch.")
        text = f"before the first update the mean |ρ − 1| of sampled and rescored log-probabilities is 0 ({name})"
        claim.equal(f"ppo.first_ratio_{name}", text, 0.0, report["ratio_error"], tolerance)
    moved = importance_ratio(batch.log_probs, batch.ref_log_probs)[batch.response_mask]
    assert (moved - 1).abs().max() > 0.1  # the policy is not the reference, so a ratio against it would not be 1
