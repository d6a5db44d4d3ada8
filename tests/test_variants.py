"""Learners' answers as they are typed, and what each of them is told.

Four kinds of verdict: CORRECT; REMARK (correct, with a word on its type); the name of a known wrong answer, whose hint
is shown; REFUSED (no name for it, so the smallest failing input is shown, or what is wrong with its form).

The table below holds 185 that people write by hand, COUNTS of each kind; 101 of them get the hint of a named mistake.
The 346 named mistakes of the checks themselves are variants too, each run by `test_checks.py`: with the 84 answers here
that have no name these are 430 that differ. What `test_checks.py` spoils by machine is not counted.
"""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlhf_lessons import checks
from rlhf_lessons.checks._harness import Check

CORRECT, REMARK, REFUSED = "correct", "correct, with a remark", "refused"
COUNTS = {CORRECT: 41, REMARK: 8, "named": 101, REFUSED: 35}
NAMES = {"torch": torch, "F": F, "nn": nn, "math": math}
GAE = """
def my_gae(rewards, values, mask=None, *, gamma, lam):
    B, T = rewards.shape
    mask = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    out, carried = torch.zeros(B, T, dtype=rewards.dtype), 0.0
    for t in reversed(range(T)):
        following = values[:, t + 1] if t + 1 < T else 0.0
        carried = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * carried
        carried = carried * mask[:, t]
        out[:, t] = carried
    return out, out + values
"""
TO_GO = """
def my_reward_to_go(rewards, mask=None, *, gamma):
    out = torch.zeros(rewards.shape, dtype=rewards.dtype)
    total = 0.0
    for t in reversed(range(rewards.shape[1])):
        r = rewards[:, t] if mask is None else torch.where(mask[:, t], rewards[:, t], 0)
        total = r + gamma * total
        out[:, t] = total if mask is None else total * mask[:, t]
    return out
"""
CLIP = """
def my_loss(log_probs, old_log_probs, advantages, mask=None, *, clip_eps):
    if mask is None:
        mask = torch.ones_like(log_probs, dtype=torch.bool)
    log_probs = torch.where(mask, log_probs, 0)
    old_log_probs = torch.where(mask, old_log_probs, 0)
    advantages = torch.where(mask, advantages, 0).detach()
    ratio = torch.exp(log_probs - old_log_probs)
    clipped = torch.clamp(ratio, 1 - clip_eps, 1 + clip_eps)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return (loss * mask).sum() / mask.sum()
"""
REINFORCE = """
def my_loss(log_probs, weights, mask=None):
    if mask is not None:
        log_probs, weights = torch.where(mask, log_probs, 0), torch.where(mask, weights, 0)
    return -(log_probs * weights.detach()).sum(dim=1).mean()
"""
PACKED = """
def my_packed_gae(rewards, values, terminated, *, gamma, lam):
    alive = ~terminated
    following = torch.where(alive, F.pad(values[:, 1:], (0, 1)), 0)
    delta = rewards + gamma * following - values
    advantages = torch.zeros_like(delta)
    carried = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        carried = delta[:, t] + gamma * lam * carried * alive[:, t]
        advantages[:, t] = carried
    return advantages
"""
SHAPED = """
def my_rewards(scores, kl, mask, *, kl_coef):
    rewards = torch.where(mask, -kl_coef * kl, 0)
    last = mask.sum(dim=1) - 1
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards
"""
HEAD = """
class MyHead(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).squeeze(-1)
"""
LOGITS = """
def my_logits(lm, prompt_ids, prompt_mask, responses, response_mask):
    tokens = torch.cat([prompt_ids, responses], dim=1)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    logits = lm(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    return logits[:, prompt_ids.shape[1] - 1 : -1]
"""


def typo(source: str, *changes: str) -> str:
    """The source with each of these parts, "old => new", written otherwise."""
    for change in changes:
        old, new = change.split(" => ")
        assert source.count(old) >= 1, old
        source = source.replace(old, new)
    return source


VARIANTS = {
    "action_log_probs": [
        (CORRECT, "lambda z, a: torch.gather(F.log_softmax(z, -1), -1, a.unsqueeze(-1))[..., 0]"),
        (CORRECT, "lambda z, a: -F.cross_entropy(z.transpose(1, 2), a, reduction='none')"),
        (CORRECT, "lambda z, a: torch.distributions.Categorical(logits=z).log_prob(a)"),
        (CORRECT, "lambda z, a: z.log_softmax(-1)[torch.arange(len(a))[:, None], torch.arange(a.shape[1]), a]"),
        (REMARK, "lambda z, a: z.double().log_softmax(-1).gather(-1, a[..., None]).squeeze(-1)"),
        ("the sign", "lambda z, a: F.cross_entropy(z.transpose(1, 2), a, reduction='none')"),
        ("the mean loss", "lambda z, a: F.cross_entropy(z.reshape(-1, z.shape[-1]), a.reshape(-1))"),
        ("log of the picked softmax", "lambda z, a: torch.log(torch.softmax(z, 2).gather(2, a[:, :, None])[:, :, 0])"),
        ("the logit itself", "lambda z, a: torch.take_along_dim(z, a[..., None], -1)[..., 0]"),
        ("normalised over time", "lambda z, a: F.log_softmax(z, dim=1).gather(2, a[..., None]).squeeze(2)"),
        ("the greedy token", "lambda z, a: torch.log_softmax(z, -1).max(-1).values"),
        (REFUSED, "lambda z, a: z.log_softmax(-1)[:, :, a]"),
        (REFUSED, "lambda z, a: z.log_softmax(-1).gather(-1, a)"),
        (REFUSED, "lambda z, a: z.detach().log_softmax(-1).gather(-1, a[..., None]).squeeze(-1)"),
        ("exponentials summed", "lambda z, a: z.gather(-1, a[..., None]).squeeze(-1) - z.exp().sum(-1).log()"),
        (REFUSED, "lambda z, a: z.gather(-1, a[..., None]).squeeze(-1) - z.logsumexp(-1).detach()"),
        (REFUSED, "lambda z, a: torch.tensor([[z[b, t].log_softmax(-1)[a[b, t]].item() "
                  "for t in range(a.shape[1])] for b in range(len(a))])"),
    ],
    "shift_by_one": [
        (CORRECT, "lambda z, y, p: z[:, p - 1 : -1].log_softmax(-1).gather(-1, y[:, p:, None])[..., 0]"),
        (CORRECT, "lambda z, y, p: z.log_softmax(-1).roll(1, 1).gather(-1, y[..., None])[..., 0][:, p:]"),
        ("not shifted", "lambda z, y, p: -F.cross_entropy(z[:, p:].transpose(1, 2), y[:, p:], reduction='none')"),
        ("prompt left in", "lambda z, y, p: z.log_softmax(-1)[:, :-1].gather(-1, y[:, 1:, None]).squeeze(-1)"),
        (CORRECT, "lambda z, y, p: z[:, p - 1 :].log_softmax(-1).gather(-1, y[:, p:, None]).squeeze(-1)"),
        (REFUSED, "lambda z, y, p: z[:, p - 1 : -1].log_softmax(1).gather(-1, y[:, p:, None]).squeeze(-1)"),
    ],
    "bradley_terry_loss": [
        (CORRECT, "lambda c, r: F.softplus(r - c).mean()"),
        (CORRECT, "lambda c, r: F.binary_cross_entropy_with_logits(c - r, torch.ones_like(c))"),
        (CORRECT, "lambda c, r: -torch.stack([c, r], -1).log_softmax(-1)[:, 0].mean()"),
        (CORRECT, "lambda c, r: F.cross_entropy(torch.stack([r, c], 1), torch.ones(len(c), dtype=torch.long))"),
        (CORRECT, "lambda c, r: -F.logsigmoid(c - r).sum() / c.shape[0]"),
        ("exponentials divided", "lambda c, r: -torch.log(torch.exp(c) / (torch.exp(c) + torch.exp(r))).mean()"),
        ("every chosen with every rejected", "lambda c, r: -F.logsigmoid(c.unsqueeze(1) - r).mean()"),
        ("every chosen with every rejected", "lambda c, r: F.softplus(r[:, None] - c[None]).mean()"),
        ("chosen and rejected swapped", "lambda c, r: F.softplus(c - r).mean()"),
        ("the sum", "lambda c, r: F.softplus(r - c).sum()"),
        ("one loss per pair", "lambda c, r: (1 + (r - c).exp()).log()"),
        ("log of sigmoid", "lambda c, r: -torch.log(1 / (1 + torch.exp(r - c))).mean()"),
        ("an epsilon of 1e-08", "lambda c, r: -torch.log(torch.sigmoid(c - r) + 1e-8).mean()"),
        ("log of sigmoid", "lambda c, r: (1 + (r - c).exp()).log().mean()"),
        (REFUSED, "lambda c, r: -F.logsigmoid(c.detach() - r).mean()"),
        (REFUSED, "lambda c, r: -F.logsigmoid(c - r).mean().item()"),
        (REFUSED, "lambda c, r: F.cross_entropy(torch.stack([c, r], 0), torch.zeros(2, dtype=torch.long))"),
    ],
    "last_real_token": [
        (CORRECT, "lambda s, m: s[torch.arange(len(s)), m.long().cumsum(1).argmax(1)]"),
        (CORRECT, "lambda s, m: s[torch.arange(len(s)), (torch.arange(s.shape[1]) * m).argmax(1)]"),
        (CORRECT, "lambda s, m: torch.stack([s[b, m[b].nonzero()[-1, 0]] for b in range(len(s))])"),
        (CORRECT, "lambda s, m: torch.where(m & ~F.pad(m[:, 1:], (0, 1)), s, 0).sum(1)"),
        ("right padding taken for granted", "lambda s, m: s[torch.arange(len(s)), m.sum(1) - 1]"),
        ("the first real token", "lambda s, m: s[torch.arange(len(s)), m.long().argmax(1)]"),
        ("the last position", "lambda s, m: s.select(1, s.shape[1] - 1)"),
        ("every row's end in every row", "lambda s, m: s[:, m.sum(1) - 1]"),
        (REFUSED, "lambda s, m: s[m].reshape(len(s), -1)[:, -1]"),
        ("the mean over the real tokens", "lambda s, m: (s * m).sum(1) / m.sum(1)"),
    ],
    "policy_gradient_loss": [
        (CORRECT, REINFORCE),
        (CORRECT, typo(REINFORCE, ".sum(dim=1).mean() => .sum() / len(log_probs)")),
        (CORRECT, typo(REINFORCE, ".sum(dim=1).mean() => .mean(dim=0).sum()")),
        ("the weights not held constant", typo(REINFORCE, ".detach() => ")),
        ("the sign", typo(REINFORCE, "return - => return ")),
        ("the mean over each episode", "lambda lp, w, mask=None: -((lp if mask is None else torch.where(mask, lp, 0)) "
         "* (w if mask is None else torch.where(mask, w, 0)).detach()).sum(1).div(lp.shape[1] if mask is None else "
         "mask.sum(1)).mean()"),
        ("divided by the number of steps", typo(REINFORCE, ".sum(dim=1).mean() => .sum(dim=0).mean()")),
        ("divided by the padded length", typo(REINFORCE, ".sum(dim=1).mean() => .mean(dim=1).mean()")),
        ("the log-probabilities detached", typo(REINFORCE, "log_probs * weights.detach() => "
         "log_probs.detach() * weights")),
        (REFUSED, typo(REINFORCE, "(log_probs * weights.detach()) => (log_probs.detach() * weights.detach())")),
        (REFUSED, typo(REINFORCE, "mask, log_probs, 0) => ~mask, log_probs, 0)", "mask, weights, 0) => ~mask, "
         "weights, 0)")),
    ],
    "gradient_through_return": [
        (CORRECT, "lambda lp, s, *, bonus: -(lp.sum(1) * (s - bonus * lp.sum(1)).detach()).mean()"),
        (CORRECT, "lambda lp, s, *, bonus: -(lp * (s - bonus * lp.detach().sum(1))[:, None]).sum(1).mean()"),
        ("through the return", "lambda lp, s, *, bonus: -(lp.sum(1) * (s - bonus * lp.sum(1))).mean()"),
        ("the bonus left out", "lambda lp, s, *, bonus: -(lp.sum(1) * s).mean()"),
        ("the wrong factor detached", "lambda lp, s, *, bonus: -(lp.detach().sum(1) * (s - bonus * lp.sum(1))).mean()"),
        (REFUSED, "lambda lp, s, *, bonus: -(lp.sum(1) * (s - bonus * lp.sum(1)).item()).mean()"),
    ],
    "reward_to_go": [
        (CORRECT, TO_GO),
        (REMARK, typo(TO_GO, "rewards.shape, dtype=rewards.dtype => rewards.shape")),
        (REMARK, typo(TO_GO, "rewards.shape, dtype=rewards.dtype => rewards.shape, dtype=torch.float64")),
        ("γ forgotten, 0.99 for it", typo(TO_GO, "gamma * total => 0.99 * total")),
        ("not discounted", typo(TO_GO, "gamma * total => total")),
        ("discounted once too often", typo(TO_GO, "r + gamma * total => gamma * (r + total)")),
        ("the rewards so far", typo(TO_GO, "reversed(range(rewards.shape[1])) => range(rewards.shape[1])")),
        ("masked only at the end", typo(TO_GO, "rewards[:, t] if mask is None else torch.where(mask[:, t], "
         "rewards[:, t], 0) => rewards[:, t]",
                                        "total * mask[:, t] => torch.where(mask[:, t], total, 0)")),
        ("the last step left out", typo(TO_GO, "out[:, t] = total => "
         "out[:, t] = 0 * total if t == rewards.shape[1] - 1 else total")),
        (REFUSED, typo(TO_GO, "reversed(range(rewards.shape[1])) => range(rewards.shape[1] - 1, 0, -1)")),
        (REFUSED, typo(TO_GO, "rewards.shape, dtype=rewards.dtype => rewards.shape, dtype=torch.long")),
    ],
    "peeking_baseline": [
        (CORRECT, "lambda r: r - (r.sum(1, keepdim=True) - r) / (r.shape[1] - 1)"),
        (CORRECT, "lambda r: (r.shape[1] * r - r.sum(-1)[:, None]) / (r.shape[1] - 1)"),
        (CORRECT, "lambda r: r - r @ (1 - torch.eye(r.shape[1], dtype=r.dtype)) / (r.shape[1] - 1)"),
        ("divided by K", "lambda r: r - (r.sum(1, keepdim=True) - r) / r.size(1)"),
        ("the mean over all K", "lambda r: r - r.mean(-1)[:, None]"),
        ("only the count changed", "lambda r: r - r.sum(-1, keepdim=True) / (r.size(-1) - 1)"),
        ("the sign", "lambda r: (r.sum(1, keepdim=True) - r) / (r.shape[1] - 1) - r"),
        (REFUSED, "lambda r: r - r.mean(1)"),
        (REFUSED, "lambda r: r - (r.sum(0, keepdim=True) - r) / (r.shape[0] - 1)"),
    ],
    "gae": [
        (CORRECT, GAE),
        (REMARK, typo(GAE, "torch.zeros(B, T, dtype=rewards.dtype) => torch.zeros(B, T)")),
        (REMARK, typo(GAE, "dtype=rewards.dtype => dtype=torch.float64")),
        (REMARK, typo(GAE, "return out, out + values => return [out, out + values]")),
        ("λ forgotten", typo(GAE, "gamma * lam * carried => gamma * carried")),
        ("γ forgotten in the recursion", typo(GAE, "gamma * lam * carried => lam * carried")),
        ("the next value not discounted", typo(GAE, "gamma * following => following")),
        ("V(s_t) not subtracted", typo(GAE, " - values[:, t] => ")),
        ("V(s_t) added", typo(GAE, " - values[:, t] =>  + values[:, t]")),
        ("the last value bootstrapped", typo(GAE, "else 0.0 => else values[:, t]")),
        ("rolled around", typo(GAE, "values[:, t + 1] if t + 1 < T else 0.0 => values.roll(-1, 1)[:, t]")),
        ("the value before", typo(GAE, "values[:, t + 1] if t + 1 < T else 0.0 => values[:, t - 1] if t else 0.0")),
        ("the two results swapped", typo(GAE, "return out, out + values => return out + values, out")),
        ("returns without the values", typo(GAE, "out + values => out.clone()")),
        ("the values as returns", typo(GAE, "out + values => values")),
        ("returns minus the values", typo(GAE, "out + values => out - values")),
        (REFUSED, typo(GAE, "return out, out + values => return out")),
        (REFUSED, typo(GAE, "return out, out + values => return out, rewards + values")),
        (REFUSED, typo(GAE, "reversed(range(T)) => reversed(range(T - 1))")),
        (REFUSED, typo(GAE, "gamma * lam * carried => (gamma + lam) * carried")),
    ],
    "next_episode": [
        (CORRECT, PACKED),
        (REMARK, typo(PACKED, "torch.zeros_like(delta)\n => torch.zeros(delta.shape)\n")),
        ("the flag inverted", typo(PACKED, "~terminated => terminated")),
        ("the flag of the step before", typo(PACKED, "~terminated => ~F.pad(terminated[:, :-1], (1, 0))")),
        ("the flag of the next step", typo(PACKED, "~terminated => ~terminated.roll(-1, 1)")),
        ("the sum not cut", typo(PACKED, " * alive[:, t] => ")),
        ("the value not cut", typo(PACKED, "torch.where(alive, F.pad(values[:, 1:], (0, 1)), 0) => "
         "F.pad(values[:, 1:], (0, 1))")),
        (REFUSED, typo(PACKED, "gamma * lam * carried => carried")),
    ],
    "importance_ratio": [
        (CORRECT, "lambda new, old: torch.exp(new - old)"),
        (CORRECT, "lambda new, old: math.e ** (new - old)"),
        (REMARK, "lambda new, old: (new - old).double().exp()"),
        ("upside down", "lambda new, old: torch.exp(old - new)"),
        ("probabilities divided", "lambda new, old: torch.exp(new) / torch.exp(old)"),
        ("an epsilon of 1e-08", "lambda new, old: torch.exp(new) / (torch.exp(old) + 1e-8)"),
        ("the ratio of the whole sequence", "lambda new, old: (new - old).exp().prod(-1)"),
        (REFUSED, "lambda new, old: 2 ** (new - old)"),
        (REFUSED, "lambda new, old: (new - old).expm1()"),
        (REFUSED, "lambda new, old: (new - old).exp()[:, :1]"),
    ],
    "missing_support": [
        (CORRECT, "lambda p, q, f: not ((q == 0) & (p * f != 0)).any().item()"),
        (CORRECT, "lambda p, q, f: (q[(p != 0) & (f != 0)] > 0).all()"),
        ("q positive everywhere", "lambda p, q, f: bool((p / q * f).isfinite().all())"),
        ("f forgotten", "lambda p, q, f: bool((q[p > 0] > 0).all())"),
        ("always yes", "lambda p, q, f: bool(((q > 0) & (p * f != 0)).any())"),
        (REFUSED, "lambda p, q, f: (q > 0) | (p * f == 0)"),
    ],
    "clipped_policy_loss": [
        (CORRECT, CLIP),
        (CORRECT, typo(CLIP, "loss = -torch.min(ratio * advantages, clipped * advantages) => "
         "loss = torch.max(-ratio * advantages, -clipped * advantages)")),
        ("the advantages not held constant", typo(CLIP, "0).detach() => 0)")),
        ("max for min", typo(CLIP, "-torch.min => -torch.max")),
        ("max for min", typo(CLIP, "loss = -torch.min(ratio * advantages, clipped * advantages) => "
         "loss = torch.min(-ratio * advantages, -clipped * advantages)")),
        ("the smaller of the ratios", typo(CLIP, "torch.min(ratio * advantages, clipped * advantages) => "
         "(torch.min(ratio, clipped) * advantages)")),
        ("divided by the number of rows", typo(CLIP, "/ mask.sum() => / len(mask)")),
        ("the ratio of the whole sequence", typo(CLIP, "log_probs - old_log_probs) => "
         "(log_probs - old_log_probs).sum(1, keepdim=True))")),
        ("ε written in", typo(CLIP, "1 - clip_eps, 1 + clip_eps => 0.8, 1.2")),
        ("the mean over the padding too", typo(CLIP, "(loss * mask).sum() / mask.sum() => (loss * mask).mean()")),
        ("the mean of the rows' means", typo(CLIP, "(loss * mask).sum() / mask.sum() => "
         "((loss * mask).sum(1) / mask.sum(1)).mean()")),
        ("no gradient through the ratio", typo(CLIP, "torch.exp(log_probs => torch.exp(log_probs.detach()")),
        ("always clipped", typo(CLIP, "torch.min(ratio * advantages, clipped * advantages) => (clipped * advantages)")),
        (REFUSED, typo(CLIP, "1 - clip_eps, 1 + clip_eps => 1 - clip_eps, 1 + 2 * clip_eps")),
    ],
    "max_for_min": [
        (CORRECT, "lambda ratio, adv, ent, *, clip_eps, ent_coef: torch.max(-ratio * adv, -adv * ratio.clamp("
         "1 - clip_eps, 1 + clip_eps)).mean() - (ent_coef * ent).mean()"),
        ("both", "lambda ratio, adv, ent, *, clip_eps, ent_coef: torch.min(-ratio * adv, -adv * ratio.clamp("
         "1 - clip_eps, 1 + clip_eps)).mean() + ent_coef * ent.mean()"),
        (REFUSED, "lambda ratio, adv, ent, *, clip_eps, ent_coef: -torch.min(ratio * adv, adv * ratio.clamp("
         "1 - clip_eps, 1 + clip_eps)).mean() - ent_coef * ent"),
    ],
    "sampled_kl": [
        (CORRECT, "lambda new, ref, *, kind: {'k1': new - ref, 'k2': (new - ref) ** 2 / 2, "
         "'k3': (ref - new).expm1() + new - ref}[kind]"),
        ("k2 without the half", "lambda new, ref, *, kind: {'k1': new - ref, 'k2': (new - ref) ** 2, "
         "'k3': (ref - new).exp() - 1 + new - ref}[kind]"),
        ("k3 with the sign of the other direction", "lambda new, ref, *, kind: {'k1': new - ref, "
         "'k2': (new - ref) ** 2 / 2, 'k3': (new - ref).exp() - 1 - (new - ref)}[kind]"),
        (REFUSED, "lambda new, ref, *, kind: {'k1': new - ref}[kind]"),
        (REFUSED, "lambda new, ref, *, kind: F.kl_div(new, ref, log_target=True, reduction='none')"),
    ],
    "shaped_rewards": [
        (CORRECT, SHAPED),
        ("the sign of the KL", typo(SHAPED, "-kl_coef => kl_coef")),
        ("β forgotten", typo(SHAPED, "-kl_coef * kl => -kl")),
        ("the last token pays no KL", typo(SHAPED, "+= scores => = scores")),
        ("the score left on the padding", typo(SHAPED, "last = mask.sum(dim=1) - 1 => last = -1")),
        ("the score one step early", typo(SHAPED, "mask.sum(dim=1) - 1 => (mask.sum(dim=1) - 2).clamp(min=0)")),
        ("the mask multiplied on", typo(SHAPED, "torch.where(mask, -kl_coef * kl, 0) => -kl_coef * kl * mask")),
        ("the score on the first pad", typo(SHAPED, "mask.sum(dim=1) - 1 => "
         "mask.sum(dim=1).clamp(max=mask.shape[1] - 1)")),
        (REFUSED, typo(SHAPED, "mask.sum(dim=1) - 1 => mask.sum(dim=1)")),
        (REFUSED, typo(SHAPED, "rewards[torch.arange(len(rewards)), last] => rewards[:, last]")),
    ],
    "late_score": [
        (CORRECT, typo(SHAPED, "mask.sum(dim=1) - 1 => mask.long().cumsum(1).argmax(1)")),
        ("the sign of the KL", typo(SHAPED, "-kl_coef * kl => kl * kl_coef")),
        ("overwritten", typo(SHAPED, "+= scores =>  = scores")),
        ("at the last position", typo(SHAPED, "mask.sum(dim=1) - 1 => mask.shape[1] - 1")),
    ],
    "value_head": [
        (CORRECT, HEAD),
        (CORRECT, typo(HEAD, ".squeeze(-1) => [:, :, 0]")),
        ("not squeezed", typo(HEAD, ".squeeze(-1) => ")),
        ("squeezed everywhere", typo(HEAD, ".squeeze(-1) => .squeeze()")),
        ("autocast left on", typo(HEAD, "enabled=False => dtype=torch.bfloat16, "
         "enabled=torch.is_autocast_enabled('cpu')")),
        ("dropout left on", typo(HEAD, "hidden.float() => F.dropout(hidden.float(), 0.2)")),
        ("dropout left on", typo(HEAD, "self.linear = => self.drop = nn.Dropout(0.1)\n        self.linear =",
                                 "hidden.float() => self.drop(hidden.float())")),
        ("the trunk cut off", typo(HEAD, "hidden.float() => hidden.float().detach()")),
        (REFUSED, typo(HEAD, "nn.Linear(hidden_size, 1) => nn.Linear(hidden_size, 2)")),
        (REFUSED, typo(HEAD, "hidden_size, 1) => hidden_size, hidden_size)")),
    ],
    "left_padding": [
        (CORRECT, LOGITS),
        (CORRECT, typo(LOGITS, ".clamp(min=0) => .masked_fill(~mask, 1)")),
        ("no position ids", typo(LOGITS, ", position_ids=positions => ")),
        ("counted from 1", typo(LOGITS, "mask.long().cumsum(1) - 1 => mask.long().cumsum(1)")),
        ("−1 under the padding", typo(LOGITS, ".clamp(min=0) => ")),
        ("counted over the batch", typo(LOGITS, "cumsum(1) => cumsum(0)")),
        ("the shift lost", typo(LOGITS, "prompt_ids.shape[1] - 1 : -1 => prompt_ids.shape[1] :")),
        (REFUSED, typo(LOGITS, "prompt_ids.shape[1] - 1 : -1 => prompt_ids.shape[1] - 1 :")),
    ],
}  # fmt: skip
ROWS = [(name, verdict, source) for name, rows in VARIANTS.items() for verdict, source in rows]


def typed(source: str) -> object:
    """What a learner's cell defines."""
    if source.startswith("lambda"):
        return eval(source, dict(NAMES))
    namespace = dict(NAMES)
    before = set(namespace)
    exec(source, namespace)
    return next(x for name, x in namespace.items() if name not in before and name != "__builtins__")


def verdict_of(check: Check, source: str) -> str:
    """The kind of the verdict, or the name of the mistake whose hint is shown."""
    try:
        said = check.judge(check.adapt(typed(source)))
    except AssertionError as hint:
        return next((wrong.name for wrong in check.wrong if wrong.hint == str(hint)), REFUSED)
    return CORRECT if said == "correct" else REMARK


@pytest.mark.parametrize(("name", "verdict", "source"), ROWS, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(ROWS)])
def test_an_answer_gets_its_verdict(name, verdict, source):
    assert verdict_of(getattr(checks, name), source) == verdict


def test_no_answer_stands_in_the_table_twice():
    assert len({(name, "".join(source.split())) for name, _, source in ROWS}) == len(ROWS)


def test_table_and_named_mistakes_are_many():
    kinds = Counter(v if v in (CORRECT, REMARK, REFUSED) else "named" for _, v, _ in ROWS)
    assert kinds == COUNTS
    known = sum(len(getattr(checks, name).wrong) for name in VARIANTS)
    assert (len(ROWS), known, len(ROWS) - kinds["named"] + known) == (185, 363, 447)
