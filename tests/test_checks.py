"""The exercise checks: right answers pass however they are written, wrong ones get the hint that fits them."""

import functools
import inspect
import math
import runpy
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlhf_lessons import (
    advantages,
    baselines,
    checks,
    importance,
    kl,
    models,
    policy_gradient,
    ppo,
    preferences,
    rollout,
)
from rlhf_lessons.checks import faults, lesson_00, lesson_10
from rlhf_lessons.checks._harness import Case, Check, Wrong, outcomes

BY_GRADIENT = ("kl_loss", "other_way")  # judged by expected gradients, whatever the value: test_checks_11.py
OF_TEXTS = ("is_right", "own_question")  # judged by what they say of texts, not by tensors: test_checks_15.py
OF_ENGINES = ("truncated_ratio", "stale_engine")  # lesson 16's: test_checks_16.py
# And those of lessons 12 to 14, whose right answers and hunts stand in test_checks_12.py to test_checks_14.py.
LATER = ("group_advantages", "one_scale_for_all", "dpo_loss", "lost_reference", "best_of_n", "same_sample_twice")
FUNCTION_CHECKS = {
    name: c
    for name in checks.__all__
    if isinstance(c := getattr(checks, name), Check) and name not in BY_GRADIENT + OF_TEXTS + OF_ENGINES + LATER
}
WRONG = [(name, wrong) for name, check in FUNCTION_CHECKS.items() for wrong in check.wrong]


def hint_of(check, answer) -> str:
    """The message with which a check refuses an answer."""
    with pytest.raises(AssertionError) as refusal:
        check(answer)
    return str(refusal.value)


def known(check, name: str) -> str:
    """The hint of a known wrong answer, by its name."""
    return next(wrong.hint for wrong in check.wrong if wrong.name == name)


# --- Right answers, written in other ways ------------------------------------------------------


def loop_action_log_probs(logits, actions):
    rows = []
    for b in range(logits.shape[0]):
        row = [logits[b, t, actions[b, t]] - logits[b, t].logsumexp(0) for t in range(logits.shape[1])]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def vector_action_log_probs(logits, actions):
    chosen = F.one_hot(actions, logits.shape[-1]).to(logits.dtype)
    return (logits * chosen).sum(-1) - logits.logsumexp(-1)


def loop_response_log_probs(logits, tokens, prompt_length):
    columns = []
    for position in range(prompt_length, tokens.shape[1]):
        log_probs = logits[:, position - 1].log_softmax(-1)
        columns.append(log_probs[torch.arange(len(tokens)), tokens[:, position]])
    return torch.stack(columns, dim=1)


def vector_response_log_probs(logits, tokens, prompt_length):
    everything = vector_action_log_probs(logits[:, :-1], tokens[:, 1:])
    return everything[:, prompt_length - 1 :]


def loop_bradley_terry(chosen, rejected):
    losses = [F.softplus(r - c) for c, r in zip(chosen, rejected, strict=True)]
    return sum(losses) / len(losses)


def vector_bradley_terry(chosen, rejected):
    return torch.logaddexp(torch.zeros_like(chosen), rejected - chosen).mean()


def loop_last_score(token_scores, mask):
    return torch.stack([row[keep][-1] for row, keep in zip(token_scores, mask, strict=True)])


def vector_last_score(token_scores, mask):
    from_the_right = mask.long().flip(1).argmax(1)
    return token_scores[torch.arange(len(mask)), mask.shape[1] - 1 - from_the_right]


def loop_policy_gradient_loss(log_probs, weights, mask=None):
    total = 0.0
    for b in range(log_probs.shape[0]):
        for t in range(log_probs.shape[1]):
            if mask is None or mask[b, t]:
                total = total - log_probs[b, t] * weights[b, t].item()
    return total / log_probs.shape[0]


def vector_policy_gradient_loss(log_probs, weights, mask=None):
    if mask is not None:
        log_probs, weights = log_probs.masked_fill(~mask, 0), weights.masked_fill(~mask, 0)
    return -torch.einsum("bt,bt->b", log_probs, weights.detach()).mean()


def surprise_at_its_place(log_probs, scores, *, bonus):
    rewards = -bonus * log_probs.detach()
    returns = scores + rewards.sum(dim=1)
    return -(log_probs * returns[:, None]).sum(dim=1).mean()


def surprise_without_grad(log_probs, scores, *, bonus):
    with torch.no_grad():
        returns = scores - bonus * log_probs.sum(dim=1)
    return -(log_probs.sum(dim=1) * returns).mean()


def loop_reward_to_go(rewards, mask=None, *, gamma):
    out = torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        total = 0.0
        for t in reversed(range(rewards.shape[1])):
            if mask is None or mask[b, t]:
                total = rewards[b, t] + gamma * total
                out[b, t] = total
    return out


def vector_reward_to_go(rewards, mask=None, *, gamma):
    steps = torch.arange(rewards.shape[1])
    apart = steps - steps[:, None]
    weights = torch.where(apart >= 0, torch.tensor(gamma, dtype=rewards.dtype) ** apart.clamp(min=0), 0)
    kept = rewards if mask is None else rewards.masked_fill(~mask, 0)
    total = kept @ weights.T
    return total if mask is None else total.masked_fill(~mask, 0)


def loop_leave_one_out(returns):
    out = returns.clone()
    for b in range(returns.shape[0]):
        for k in range(returns.shape[1]):
            others = [returns[b, j] for j in range(returns.shape[1]) if j != k]
            out[b, k] = returns[b, k] - sum(others) / len(others)
    return out


def vector_leave_one_out(returns):
    k = returns.shape[1]
    return (returns - returns.mean(dim=1, keepdim=True)) * k / (k - 1)


def loop_gae(rewards, values, mask=None, *, gamma, lam):
    out, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        length = rewards.shape[1] if mask is None else int(mask[b].sum())
        carried = following = 0.0
        for t in reversed(range(length)):
            carried = rewards[b, t] + gamma * following - values[b, t] + gamma * lam * carried
            following = values[b, t]
            out[b, t], returns[b, t] = carried, carried + values[b, t]
    return out, returns


def vector_gae(rewards, values, mask=None, *, gamma, lam):
    if mask is not None:
        rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    delta = rewards + gamma * torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1) - values
    out = vector_reward_to_go(delta, mask, gamma=gamma * lam)
    return out, out + values


def loop_packed_gae(rewards, values, terminated, *, gamma, lam):
    out = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        start = 0
        for end in (terminated[b].nonzero().flatten() + 1).tolist():
            part = slice(start, end)
            out[b, part] = loop_gae(rewards[b : b + 1, part], values[b : b + 1, part], gamma=gamma, lam=lam)[0][0]
            start = end
    return out


def vector_packed_gae(rewards, values, terminated, *, gamma, lam):
    alive = (~terminated).to(rewards.dtype)
    delta = rewards + gamma * F.pad(values[:, 1:], (0, 1)) * alive - values
    out = delta
    for _ in range(rewards.shape[1]):
        out = delta + gamma * lam * alive * F.pad(out[:, 1:], (0, 1))
    return out


def loop_ratio(log_probs, old_log_probs):
    pairs = zip(log_probs.flatten(), old_log_probs.flatten(), strict=True)
    return torch.stack([torch.exp(new - old) for new, old in pairs]).reshape(log_probs.shape)


def loop_support(p, q, f):
    for i in range(len(p)):
        if p[i] * f[i] != 0 and q[i] == 0:
            raise ValueError("q must be positive wherever p·f is not 0")
    return True


def loop_clipped_loss(log_probs, old_log_probs, advantages, mask=None, *, clip_eps):
    losses, advantages = [], advantages.detach()
    for b in range(log_probs.shape[0]):
        for t in range(log_probs.shape[1]):
            if mask is None or mask[b, t]:
                ratio, adv = torch.exp(log_probs[b, t] - old_log_probs[b, t]), advantages[b, t]
                losses.append(-torch.minimum(ratio * adv, torch.clamp(ratio, 1 - clip_eps, 1 + clip_eps) * adv))
    return sum(losses) / len(losses)


def vector_clipped_loss(log_probs, old_log_probs, advantages, mask=None, *, clip_eps):
    if mask is not None:
        log_probs, old_log_probs, advantages = (x[mask] for x in (log_probs, old_log_probs, advantages))
    ratio, advantages = (log_probs - old_log_probs).exp(), advantages.detach()
    return -torch.min(ratio * advantages, advantages + clip_eps * advantages.abs()).mean()


def repaired_ppo_loss(ratio, advantages, entropy, *, clip_eps, ent_coef):
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    loss = torch.max(-ratio * advantages, -clipped * advantages).mean()
    return loss - ent_coef * entropy.mean()


def loop_sampled_kl(log_probs, ref_log_probs, *, kind):
    out = []
    for new, ref in zip(log_probs.flatten(), ref_log_probs.flatten(), strict=True):
        log_ratio = new - ref
        out.append({"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": torch.exp(ref - new) - 1 + log_ratio}[kind])
    return torch.stack(out).reshape(log_probs.shape)


def vector_sampled_kl(log_probs, ref_log_probs, *, kind):
    d = ref_log_probs - log_probs
    return -d if kind == "k1" else d.pow(2).mul(0.5) if kind == "k2" else d.exp() - d - 1


def loop_shaped_rewards(scores, kl, mask, *, kl_coef):
    out = torch.zeros_like(kl)
    for b in range(len(kl)):
        length = int(mask[b].sum())
        for t in range(length):
            out[b, t] = -kl_coef * kl[b, t]
        out[b, length - 1] += scores[b]
    return out


def vector_shaped_rewards(scores, kl, mask, *, kl_coef):
    is_last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return -kl_coef * kl.masked_fill(~mask, 0) + is_last * scores[:, None]


class PlainValueHead(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(hidden_size))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, hidden):
        return (hidden.float() * self.w).sum(-1) + self.b


class LinearValueHead(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        for parameter in self.summary.parameters():
            parameter.data.zero_()

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return self.summary(hidden.to(self.summary.weight.dtype))[..., 0]


def repaired_logits(lm, prompt_ids, prompt_mask, responses, response_mask):
    tokens = torch.cat([prompt_ids, responses], dim=1)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    places = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    logits = lm(input_ids=tokens, attention_mask=mask, position_ids=places).logits
    return logits[:, prompt_ids.shape[1] - 1 : -1]


def unpadded_logits(lm, prompt_ids, prompt_mask, responses, response_mask):
    """Each row by itself, without any padding: the independent oracle of the hunt."""
    rows = []
    for ids, keep, answer, real in zip(prompt_ids, prompt_mask, responses, response_mask, strict=True):
        logits = lm(input_ids=torch.cat([ids[keep], answer[real]])[None]).logits[0]
        logits = logits[int(keep.sum()) - 1 : -1]
        rows.append(F.pad(logits, (0, 0, 0, len(real) - len(logits))))
    return torch.stack(rows)


RIGHT = {
    "action_log_probs": [policy_gradient.action_log_probs, loop_action_log_probs, vector_action_log_probs],
    "shift_by_one": [loop_response_log_probs, vector_response_log_probs],
    "bradley_terry_loss": [preferences.bradley_terry_loss, loop_bradley_terry, vector_bradley_terry],
    "last_real_token": [loop_last_score, vector_last_score],
    "policy_gradient_loss": [
        policy_gradient.policy_gradient_loss,
        loop_policy_gradient_loss,
        vector_policy_gradient_loss,
    ],
    "gradient_through_return": [surprise_at_its_place, surprise_without_grad],
    "reward_to_go": [policy_gradient.reward_to_go, loop_reward_to_go, vector_reward_to_go],
    "peeking_baseline": [loop_leave_one_out, vector_leave_one_out],
    "gae": [advantages.gae, advantages.gae_recursion, loop_gae, vector_gae],
    "next_episode": [loop_packed_gae, vector_packed_gae],
    "importance_ratio": [importance.importance_ratio, loop_ratio, lambda new, old: torch.exp(new - old.detach())],
    "missing_support": [loop_support, lambda p, q, f: not bool(((p * f != 0) & (q == 0)).any())],
    "clipped_policy_loss": [ppo.clipped_policy_loss, loop_clipped_loss, vector_clipped_loss],
    "max_for_min": [repaired_ppo_loss],
    "sampled_kl": [kl.sampled_kl, loop_sampled_kl, vector_sampled_kl],
    "shaped_rewards": [kl.shaped_rewards, loop_shaped_rewards, vector_shaped_rewards],
    "late_score": [kl.shaped_rewards, loop_shaped_rewards, vector_shaped_rewards],
    "value_head": [models.ValueHead, PlainValueHead, LinearValueHead],
    "left_padding": [repaired_logits, unpadded_logits],
}


@pytest.mark.parametrize(("name", "right"), [(n, r) for n, all_ in RIGHT.items() for r in all_])
def test_right_answers_are_correct(name, right, capsys):
    assert FUNCTION_CHECKS[name](right) is None
    verdict, *explanation = capsys.readouterr().out.split("\n", maxsplit=1)
    assert verdict == "correct"
    assert bool(explanation[0]) == (name in {hunt[0] for hunt in HUNTS})


def test_every_check_has_right_answers():
    assert RIGHT.keys() == FUNCTION_CHECKS.keys()


# --- Not attempted -----------------------------------------------------------------------------


class StubHead(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()

    def forward(self, hidden):
        return NotImplemented


@pytest.mark.parametrize("name", FUNCTION_CHECKS)
def test_a_stub_is_not_attempted(name, capsys):
    FUNCTION_CHECKS[name](StubHead if name == "value_head" else lambda *args, **options: NotImplemented)
    assert capsys.readouterr().out == "not attempted yet\n"


def test_a_half_filled_stub_is_refused():
    def only_k1(log_probs, ref_log_probs, *, kind):
        return log_probs - ref_log_probs if kind == "k1" else NotImplemented

    assert "returns NotImplemented for this input" in hint_of(checks.sampled_kl, only_k1)


@pytest.mark.parametrize("answer", [NotImplemented, None, torch.zeros(2), 3.0])
def test_a_result_instead_of_the_function(answer):
    assert "wants the function itself" in hint_of(checks.gae, answer)


# --- Known wrong answers -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=[f"{n}: {w.name}" for n, w in WRONG])
def test_known_wrong_answers_get_their_own_hint(name, wrong):
    assert hint_of(FUNCTION_CHECKS[name], wrong.function) == wrong.hint


@pytest.mark.parametrize("name", FUNCTION_CHECKS)
def test_each_check_knows_at_least_four(name):
    wrong = FUNCTION_CHECKS[name].wrong
    assert len(wrong) >= 4
    assert len({w.hint for w in wrong}) == len({w.name for w in wrong}) == len(wrong)


def test_of_two_known_answers_the_closer_one_lends_its_hint():
    cases = [Case(f"x = {x}", {"x": torch.tensor([float(x)])}) for x in (1, 2, 3, 4)]
    near = Wrong("near", lambda x: torch.where(x < 2.5, x + 1, 7 * x), "near")
    close = Wrong("close", lambda x: x + 1, "close")
    check = Check("toy", lambda x: 3 * x, lambda: cases, (near, close))
    assert hint_of(check, lambda x: 1 + x) == "close"
    assert "no name for" in hint_of(check, lambda x: torch.where(x < 1.5, x + 1, x.square()))


def test_no_two_hints_are_alike():
    hints = [wrong.hint for _, wrong in WRONG]
    hints += [m.hint for m in lesson_00.FOUR_MODELS + lesson_10.ALIGNED_BY_YOU]
    hints += [fault.symptom for fault in checks.FAULTS.values()]
    assert len(set(hints)) == len(hints)


# --- The buggy functions of the bug hunts, as the lessons show them ----------------------------


def my_response_log_probs(logits, tokens, prompt_length):
    """logits (B, P+T, V), tokens (B, P+T) -> (B, T)."""
    response = tokens[:, prompt_length:]
    log_probs = logits[:, prompt_length:].log_softmax(dim=-1)
    return log_probs.gather(-1, response[..., None]).squeeze(-1)


def my_text_scores(token_scores, mask):
    """token_scores, mask (B, L) -> (B,): each text's score."""
    return token_scores[:, -1]


def my_surprise_loss(log_probs, scores, *, bonus):
    """log_probs (B, T), scores (B,) -> (): REINFORCE, where each
    token earns -bonus * log_prob on top of the text's score."""
    rewards = -bonus * log_probs
    returns = scores + rewards.sum(dim=1)
    return -(log_probs * returns[:, None]).sum(dim=1).mean()


def my_group_advantages(returns):
    """returns (B, K), K samples of each prompt -> (B, K)."""
    baseline = returns.mean(dim=1, keepdim=True)
    return returns - baseline


def my_packed_gae(rewards, values, terminated, *, gamma, lam):
    """All (B, T), several episodes in a row -> (B, T).
    terminated is True on the last step of each episode."""
    alive = ~F.pad(terminated[:, 1:], (0, 1))
    following = torch.where(alive, F.pad(values[:, 1:], (0, 1)), 0)
    delta = rewards + gamma * following - values
    advantages = torch.zeros_like(delta)
    carried = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        carried = delta[:, t] + gamma * lam * carried * alive[:, t]
        advantages[:, t] = carried
    return advantages


def my_has_support(p, q, f):
    """p, q, f (V,) -> bool: can samples of q give E_p[f]?"""
    ratio = torch.where(q > 0, p / q, 0)
    return bool((ratio * f).isfinite().all())


def my_ppo_loss(ratio, advantages, entropy, *, clip_eps, ent_coef):
    """All (B, T) -> (): what the optimiser minimises."""
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    terms = torch.max(ratio * advantages, clipped * advantages)
    return -terms.mean() + ent_coef * entropy.mean()


def my_rewards(scores, kl, mask, *, kl_coef):
    """scores (B,), kl (B, T), mask (B, T) -> (B, T)."""
    rewards = torch.where(mask, -kl_coef * kl, 0)
    last = mask.sum(dim=1).clamp(max=mask.shape[1] - 1)
    rows = torch.arange(len(rewards))
    rewards[rows, last] += scores
    return rewards


def my_response_logits(lm, prompt_ids, prompt_mask, responses, response_mask):
    """Prompts (B, P) padded on the left, responses (B, T) padded
    on the right -> (B, T, V): the logits they were drawn from."""
    tokens = torch.cat([prompt_ids, responses], dim=1)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    logits = lm(input_ids=tokens, attention_mask=mask).logits
    return logits[:, prompt_ids.shape[1] - 1 : -1]


HUNTS = [
    ("shift_by_one", my_response_log_probs, "not shifted"),
    ("last_real_token", my_text_scores, "the last position"),
    ("gradient_through_return", my_surprise_loss, "through the return"),
    ("peeking_baseline", my_group_advantages, "the mean over all K"),
    ("next_episode", my_packed_gae, "the flag of the next step"),
    ("missing_support", my_has_support, "always yes"),
    ("max_for_min", my_ppo_loss, "both"),
    ("late_score", my_rewards, "on the first pad"),
    ("left_padding", my_response_logits, "no position ids"),
]


@pytest.mark.parametrize(("name", "buggy", "bug"), HUNTS, ids=[hunt[0] for hunt in HUNTS])
def test_hunted_functions_get_the_hint_of_their_bug(name, buggy, bug):
    assert hint_of(FUNCTION_CHECKS[name], buggy) == known(FUNCTION_CHECKS[name], bug)


@pytest.mark.parametrize("name", [hunt[0] for hunt in HUNTS])
def test_each_hunt_explains_itself_once_it_is_solved(name, capsys):
    check = FUNCTION_CHECKS[name]
    sentences = [part for part in check.explains.split(". ") if part]
    assert 2 <= len(sentences) <= 6 and "in a log" in check.explains.lower() or "shows" in check.explains
    check(RIGHT[name][0])
    said = capsys.readouterr().out
    assert said.startswith("correct\n\n") and " ".join(said.split()[1:]) == " ".join(check.explains.split())
    assert max(map(len, said.splitlines())) <= 100
    check(lambda *args, **options: NotImplemented)
    assert capsys.readouterr().out == "not attempted yet\n"


@pytest.mark.parametrize("name", sorted(FUNCTION_CHECKS.keys() - {hunt[0] for hunt in HUNTS}))
def test_an_exercise_has_nothing_to_explain(name):
    assert not FUNCTION_CHECKS[name].explains


@pytest.mark.parametrize(("name", "buggy", "bug"), HUNTS, ids=[hunt[0] for hunt in HUNTS])
def test_hunted_functions_fit_a_notebook_cell(name, buggy, bug):
    lines = inspect.getsource(buggy).splitlines()
    assert len(lines) <= 15 and max(map(len, lines)) <= 79


# --- Wrong answers that no check has seen ------------------------------------------------------


def mapped(change):
    """A learner's function that is right but for a last change of its result."""

    def spoil(reference):
        def spoiled(*args, **options):
            result = reference(*args, **options)
            return tuple(map(change, result)) if isinstance(result, tuple) else change(result)

        return spoiled

    return spoil


SPOILED = {
    "noise": mapped(lambda x: x + 1e-3),
    "a factor": mapped(lambda x: 1.01 * x),
    "a cubed term": mapped(lambda x: x + 0.1 * x**3),
    "zeros": mapped(lambda x: 0 * x),
    "absolute": mapped(lambda x: -x.abs() - 0.1),
    "NaN": mapped(lambda x: x * math.nan),
}
PLAIN = [n for n in FUNCTION_CHECKS if n not in ("missing_support", "value_head")]


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("name", PLAIN)
def test_unseen_wrong_answers_are_refused_with_the_input(name, how):
    check = FUNCTION_CHECKS[name]
    message = hint_of(check, SPOILED[how](check.reference))
    assert message not in {wrong.hint for wrong in check.wrong}
    assert "It is right on" in message and "expected" in message


UNSEEN = {
    "action_log_probs": [lambda z, a: (z.softmax(-1) + 0.01).log().gather(-1, a[..., None]).squeeze(-1)],
    "bradley_terry_loss": [lambda c, r: F.softplus(2 * (r - c)).mean(), lambda c, r: (c - r).square().mean()],
    "policy_gradient_loss": [lambda lp, w, mask=None: -(lp.nan_to_num() * w.detach().nan_to_num().sign()).sum()],
    "reward_to_go": [lambda r, mask=None, *, gamma: r.nan_to_num() * (1 + gamma)],
    "gae": [
        lambda r, v, mask=None, *, gamma, lam: advantages.gae(r, v, mask, gamma=gamma, lam=lam**2),
        lambda r, v, mask=None, *, gamma, lam: advantages.gae(r, v, mask, gamma=gamma**2, lam=lam),
    ],
    "importance_ratio": [lambda new, old: 1 + (new - old) + (new - old) ** 2 / 2],
    "missing_support": [lambda p, q, f: bool((p * f * q).sum() > 0), lambda p, q, f: len(p) == 2],
    "clipped_policy_loss": [
        lambda n, o, a, m=None, *, clip_eps: ppo.clipped_policy_loss(n, o, a, m, clip_eps=2 * clip_eps),
        lambda n, o, a, m=None, *, clip_eps: ppo.clipped_policy_loss(n, o, a.abs(), m, clip_eps=clip_eps),
    ],
    "sampled_kl": [lambda n, r, *, kind: kl.sampled_kl(n, r, kind=kind) + 0.01 * (n - r) ** 4],
    "shaped_rewards": [
        lambda s, k, m, *, kl_coef: kl.shaped_rewards(s.tanh(), k, m, kl_coef=kl_coef),
        lambda s, k, m, *, kl_coef: kl.shaped_rewards(s, k.square(), m, kl_coef=kl_coef),
    ],
    "last_real_token": [lambda s, m: s.nan_to_num().amax(1)],
    "next_episode": [lambda r, v, end, *, gamma, lam: r - v],
}


@pytest.mark.parametrize(("name", "wrong"), [(n, w) for n, all_ in UNSEEN.items() for w in all_])
def test_more_unseen_wrong_answers_are_refused(name, wrong):
    message = hint_of(FUNCTION_CHECKS[name], wrong)
    assert message not in {w.hint for w in FUNCTION_CHECKS[name].wrong}


def test_an_unseen_value_head_is_refused():
    class Doubled(LinearValueHead):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    class TwoLayers(LinearValueHead):
        def __init__(self, hidden_size):
            super().__init__(hidden_size)
            self.first = nn.Linear(hidden_size, hidden_size)

    assert "2 times what it should be" in hint_of(checks.value_head, Doubled)
    assert "one linear layer" in hint_of(checks.value_head, TwoLayers)
    assert "The class itself" in hint_of(checks.value_head, LinearValueHead(4))
    assert "no forward" in hint_of(checks.value_head, lambda size: nn.Module())


def test_a_factor_near_one_is_not_shown_as_one():
    def near(rewards, mask=None, *, gamma):
        return 1.0004 * policy_gradient.reward_to_go(rewards, mask, gamma=gamma)

    assert "1.0004 times what it should be" in hint_of(checks.reward_to_go, near)


def test_the_generic_hint_shows_the_smallest_failing_input_in_numbers():
    message = hint_of(checks.reward_to_go, SPOILED["a cubed term"](policy_gradient.reward_to_go))
    assert "right on 0 of 9 inputs; the first wrong one: two steps, γ = 1" in message
    assert "rewards = [[" in message and "gamma = 1.0" in message
    assert message == hint_of(checks.reward_to_go, SPOILED["a cubed term"](policy_gradient.reward_to_go))


# --- Mistakes of form: each is refused, by name ------------------------------------------------

WITH_GRADIENT = [name for name in PLAIN if FUNCTION_CHECKS[name].gradient_of]
MASKED = ("policy_gradient_loss", "reward_to_go", "gae", "clipped_policy_loss", "shaped_rewards", "late_score")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.detach().tolist(), "; a t"),
        (lambda x: None, "a t|returns None"),
        (lambda x: x[None], "wrong shape|expected"),
        (lambda x: -x, "sign of|swapped|minus|objective"),
        (lambda x: x.to(torch.float32).to(x.dtype) if x.dtype == torch.float64 else x, "lower precision"),
    ],
    ids=["list", "none", "shape", "sign", "precision"],
)
def test_mistakes_of_form(name, change, said, request):
    check = FUNCTION_CHECKS[name]
    if name == "left_padding" and request.node.callspec.id.split("-")[0] == "precision":
        assert check.judge(mapped(change)(check.reference)) == "correct"  # its model computes in float32 throughout
        return
    message = hint_of(check, mapped(change)(check.reference))
    assert any(part in message for part in said.split("|")) or message in {w.hint for w in check.wrong}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_right_values_are_accepted_whatever_their_dtype(name, dtype):
    check = FUNCTION_CHECKS[name]
    said = check.judge(mapped(lambda x: x.to(dtype))(check.reference))
    usual = {x.dtype for outcome in outcomes(check, check.reference) for x in outcome.results}
    assert said == "correct" if usual == {dtype} else f"yours is {dtype}: torch.zeros_like" in said
    with pytest.raises(AssertionError):  # the dtype excuses no wrong value
        check.judge(mapped(lambda x: (1.001 * x + 0.001).to(dtype))(check.reference))


@pytest.mark.parametrize("name", [name for name in PLAIN if len(FUNCTION_CHECKS[name].outputs) > 1])
def test_a_list_of_results_is_as_good_as_a_tuple(name):
    check = FUNCTION_CHECKS[name]
    assert check.judge(lambda *a, **o: list(check.reference(*a, **o))).startswith("correct; a tuple is usual")


@pytest.mark.parametrize("convert", [bool, int, lambda x: np.bool_(bool(x))], ids=["bool", "int", "numpy"])
def test_yes_or_no_may_be_said_without_a_tensor(convert):
    check = checks.missing_support
    said = check.judge(lambda *a, **o: convert(check.reference(*a, **o)))
    assert said.startswith("correct; a tensor is usual")
    with pytest.raises(AssertionError):
        check.judge(lambda *a, **o: convert(not check.reference(*a, **o)))


def test_a_hint_is_shown_alone_with_the_learners_own_line(tmp_path):
    (tmp_path / "mine.py").write_text("def loss(chosen, rejected):\n    return chosen.no_such_method()\n")
    with pytest.raises(AssertionError) as caught:
        checks.bradley_terry_loss(runpy.run_path(str(tmp_path / "mine.py"))["loss"])
    place, hint = caught.value._render_traceback_()
    assert place == "in loss, line 2:    return chosen.no_such_method()"
    assert hint.startswith("Your function raised AttributeError")
    with pytest.raises(AssertionError) as caught:
        checks.bradley_terry_loss(lambda chosen, rejected: chosen)
    assert caught.value._render_traceback_() == [str(caught.value)]


@pytest.mark.parametrize("name", PLAIN)
def test_numpy_results_are_refused(name):
    check = FUNCTION_CHECKS[name]

    def through_numpy(*args, **options):
        result = check.reference(*args, **options)
        return np.array(result[0].tolist() if isinstance(result, tuple) else result.tolist())

    assert "numpy" in hint_of(check, through_numpy)


@pytest.mark.parametrize("convert", [lambda x: x.detach().numpy(), np.asarray, np.exp], ids=["numpy", "array", "ufunc"])
@pytest.mark.parametrize("name", PLAIN)
def test_numpy_on_the_way_is_refused(name, convert):
    check = FUNCTION_CHECKS[name]

    def by_numpy(*args, **options):
        for x in args:
            if isinstance(x, torch.Tensor):
                convert(x)
        return check.reference(*args, **options)

    assert "numpy array" in hint_of(check, by_numpy)


@pytest.mark.parametrize("name", PLAIN)
def test_changing_an_argument_is_refused(name):
    check = FUNCTION_CHECKS[name]

    def greedy(*args, **options):
        result = check.reference(*args, **options)
        tensor = next(x for x in args if isinstance(x, torch.Tensor))
        tensor += 1
        return result

    assert "in place" in hint_of(check, greedy)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_a_result_cut_off_from_the_graph_is_refused(name):
    check = FUNCTION_CHECKS[name]
    message = hint_of(check, mapped(torch.Tensor.detach)(check.reference))
    assert "detached" in message


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_right_values_with_a_wrong_gradient_are_refused(name):
    check = FUNCTION_CHECKS[name]
    half = mapped(lambda x: 0.5 * x + 0.5 * x.detach())
    assert "The value is right, but its gradient" in hint_of(check, half(check.reference))


@pytest.mark.parametrize("name", MASKED)
def test_nan_from_under_the_padding_is_named(name):
    check = FUNCTION_CHECKS[name]

    def leaking(*args, **options):
        result = check.reference(*args, **options)
        garbage = sum((x * 0).sum() for x in args if isinstance(x, torch.Tensor))
        return tuple(x + garbage for x in result) if isinstance(result, tuple) else result + garbage

    message = hint_of(check, leaking)
    assert "0·NaN is NaN" in message


@pytest.mark.parametrize("name", [n for n in MASKED if not n.endswith("loss")])
def test_numbers_left_on_the_padding_are_named(name):
    check = FUNCTION_CHECKS[name]

    def untidy(*args, **options):
        result = check.reference(*args, **options)
        mask = next((x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.bool), None)
        fill = (lambda x: x) if mask is None else (lambda x: x.masked_fill(~mask, 4.5))
        return tuple(map(fill, result)) if isinstance(result, tuple) else fill(result)

    assert "must be 0 where mask is False" in hint_of(check, untidy)


@pytest.mark.parametrize("name", FUNCTION_CHECKS)
def test_what_the_learners_code_raises_is_reported(name):
    def broken(*args, **options):
        raise ZeroDivisionError("a slip of the pen")

    with pytest.raises(AssertionError, match="Your function raised ZeroDivisionError: a slip of the pen") as refusal:
        FUNCTION_CHECKS[name](broken)
    assert isinstance(refusal.value.__cause__, ZeroDivisionError)


def test_a_missing_argument_is_reported():
    assert "raised TypeError" in hint_of(checks.gae, lambda rewards, values, *, gamma: (rewards, values))


def test_view_of_a_tensor_that_is_not_contiguous_gets_advice():
    def viewing(log_probs, old_log_probs):
        return (log_probs.view(-1) - old_log_probs.view(-1)).exp().view(log_probs.shape)

    assert ".reshape takes it" in hint_of(checks.importance_ratio, viewing)


def test_python_numbers_in_where_lose_precision():
    def vectorised(new, old, adv, mask=None, *, clip_eps):
        mask = torch.ones_like(new, dtype=torch.bool) if mask is None else mask
        adv = adv.detach()
        bound = torch.where(adv > 0, 1 + clip_eps, 1 - clip_eps) * adv
        return -torch.min((new - old).exp() * adv, bound)[mask].mean()

    assert "torch.where of two Python numbers" in hint_of(checks.clipped_policy_loss, vectorised)


def test_one_result_of_two():
    message = hint_of(checks.gae, lambda *args, **options: advantages.gae(*args, **options)[0])
    assert "(advantages, returns)" in message


def test_the_checks_leave_the_global_generator_alone():
    def noisy(new, old):
        torch.rand(3)
        return importance.importance_ratio(new, old)

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    checks.importance_ratio(noisy)
    checks.value_head(LinearValueHead)
    assert torch.equal(before, torch.random.get_rng_state())


# The package's function by which a check judges, where the check's own reference is not it but calls it.
JUDGES = {
    "shift_by_one": rollout.reference_logits,
    "last_real_token": models.RewardModel.forward,
    "gradient_through_return": policy_gradient.policy_gradient_loss,
    "peeking_baseline": baselines.leave_one_out_baseline,
    "next_episode": advantages.gae,
    "max_for_min": ppo.clipped_policy_loss,
    "value_head": models.ValueHead.forward,
    "left_padding": rollout.reference_logits,
}


def test_every_check_but_one_judges_by_the_package():
    """What support is stands in no function of the package."""
    own = [
        name for name, check in FUNCTION_CHECKS.items() if check.reference.__module__.startswith("rlhf_lessons.checks")
    ]
    assert set(own) == {*JUDGES, "missing_support"}


@pytest.mark.parametrize("name", JUDGES)
def test_a_check_judges_by_the_packages_function(name):
    """It runs on every input, and not only where it happens to be called once."""
    check, ran = FUNCTION_CHECKS[name], set()
    for case in check.cases():
        ran.clear()
        sys.setprofile(lambda frame, event, _: ran.add(frame.f_code))
        try:
            check.observe(check.reference, case)
        finally:
            sys.setprofile(None)
        assert JUDGES[name].__code__ in ran, case.says


# --- Lesson 00: no code ------------------------------------------------------------------------

FOUR = {**lesson_00.TRACE, "trained": {"policy", "critic"}}
FOUR_WRONG = {
    "the critic scores": {"score": "critic"},
    "the reward model values every token": {"values": "reward"},
    "the policy is its own reference": {"ref_log_probs": "policy"},
    "the reference samples": {"response": "reference"},
    "old is reference": {"log_probs": "reference"},
    "the reward model samples": {"response": "reward"},
    "the critic writes log-probabilities": {"log_probs": "critic"},
    "the policy scores itself": {"values": "policy"},
    "everything trains": {"trained": set(lesson_00.MODELS)},
    "the reward model trains": {"trained": {"policy", "reward"}},
    "the reference trains": {"trained": {"policy", "critic", "reference"}},
    "only the policy trains": {"trained": {"policy"}},
    "only the critic trains": {"trained": ["critic"]},
}


def test_four_models_right_open_and_half_open(capsys):
    checks.four_models(FOUR)
    checks.four_models({**FOUR, "trained": ["critic", "policy"]})
    checks.four_models(dict.fromkeys(FOUR))
    checks.four_models({})
    checks.four_models({**FOUR, "score": None})
    assert capsys.readouterr().out.splitlines() == [
        "correct",
        "correct",
        "not attempted yet",
        "not attempted yet",
        "right so far; not attempted yet: score",
    ]


@pytest.mark.parametrize("misconception", lesson_00.FOUR_MODELS, ids=lambda m: m.name)
def test_four_models_names_each_misconception(misconception):
    wrong = FOUR_WRONG[misconception.name]
    assert hint_of(checks.four_models, {**FOUR, **wrong}) == misconception.hint
    assert hint_of(checks.four_models, {**dict.fromkeys(FOUR), **wrong}) == misconception.hint


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"score": "reference"}, "not the reference"),
        ({"response": "critic"}, "not the critic"),
        ({"trained": set()}, "Whose parameters"),
        ({"score": "judge"}, "is not one of"),
        ({"trained": "policy"}, "a set of names"),
        ({"trained": {"optimizer"}}, "is not one of"),
        ({"rewards": "reward"}, "No such question"),
    ],
)
def test_four_models_refuses_the_rest(wrong, said):
    assert said in hint_of(checks.four_models, {**FOUR, **wrong})


def test_every_single_wrong_answer_about_the_four_models_is_refused():
    for key, right in lesson_00.TRACE.items():
        for model in set(lesson_00.MODELS) - {right}:
            hint_of(checks.four_models, {**FOUR, key: model})


# --- Lesson 10: aligned by your own PPO --------------------------------------------------------


def run_of(score, gold, kl, steps=20):
    """A history: each metric a function of progress in [0, 1], or a number that it stays at."""
    curves = {"score": score, "gold": gold, "kl": kl}
    progress = [i / (steps - 1) for i in range(steps)]
    return [{k: float(c(x) if callable(c) else c) for k, c in curves.items()} for x in progress]


def rising(to, start=0.0):
    return lambda x: start + (to - start) * x


GOOD = run_of(rising(2.1), lambda x: min(2.0, -0.2 + 4 * x), rising(6.5))
ALIGNED_WRONG = {
    "gold as the training reward": run_of(rising(3), rising(3), rising(6)),
    "a negative KL": run_of(rising(2), rising(2.5), rising(-4)),
    "no price on the KL": run_of(rising(2.8), rising(-3.6), rising(121)),
    "gold held by luck": run_of(rising(2.8), rising(2.5), rising(60)),
    "the peak taken for the end": run_of(rising(2.8), lambda x: 8 * x * (1 - x), rising(15)),
    "hardly moved": run_of(lambda x: 0.05 * x, -0.18, 0.1),
    "gold without a KL": run_of(rising(2.1), 2.0, 0.1),
    "nothing learned": run_of(rising(-1), 2.0, rising(6)),
    "stopped halfway": run_of(rising(1.5), rising(0.8, -0.2), rising(3)),
}


LENIENT = functools.partial(checks.aligned_by_you, gold_bar=1.0, max_kl=20.0)


def test_aligned_by_you_right_and_open(capsys):
    checks.aligned_by_you([GOOD] * 3, max_kl=7)
    checks.aligned_by_you(NotImplemented)
    checks.aligned_by_you([GOOD, NotImplemented, NotImplemented])
    checks.aligned_by_you(None)
    assert capsys.readouterr().out == "correct\n" + 3 * "not attempted yet\n"


@pytest.mark.parametrize("misconception", lesson_10.ALIGNED_BY_YOU, ids=lambda m: m.name)
def test_aligned_by_you_names_each_misconception_and_its_run(misconception):
    runs = [GOOD, ALIGNED_WRONG[misconception.name], GOOD]
    assert hint_of(LENIENT, runs) == f"Run 1: {misconception.hint}"


def test_aligned_by_you_refuses_the_rest():
    def hint(run):
        return hint_of(LENIENT, [run] * 3)

    assert "below the bar of 1" in hint(run_of(rising(2), lambda x: math.sin(9 * x) / 2, rising(5)))
    assert "at least 10 iterations" in hint(GOOD[:9])
    assert "list of dicts" in hint(2.0)
    assert "add it in the loop" in hint([{"score": 1.0, "kl": 1.0}] * 12)
    broken = [dict(step) for step in GOOD]
    broken[7]["gold"] = math.nan
    assert "nan in iteration 8" in hint(broken)
    assert "a list of 3" in hint_of(checks.aligned_by_you, GOOD)
    assert "3 runs are wanted; got 1" in hint_of(checks.aligned_by_you, [GOOD])


def test_the_bar_and_the_limit_of_aligned_by_you_count():
    for limits in ({"gold_bar": 2.1, "max_kl": 7}, {"gold_bar": 1.9, "max_kl": 5}):
        with pytest.raises(AssertionError):
            checks.aligned_by_you([GOOD] * 3, **limits)


# --- Lesson 10: the five planted faults --------------------------------------------------------


@pytest.fixture(scope="module")
def runs():
    return {fault: checks.faulty_runs()[letter] for letter, fault in lesson_10.PLANTED.items()}


@pytest.fixture(scope="module")
def healthy():
    return checks.healthy_run()


def last(history, name):
    return sum(step[name] for step in history[-5:]) / 5


def test_the_healthy_run_is_healthy(healthy):
    assert healthy[0]["kl"] == pytest.approx(0, abs=1e-5)  # the policy starts as the reference
    assert last(healthy, "score") > healthy[0]["score"] + 3
    assert last(healthy, "gold") > healthy[0]["gold"] + 2
    assert last(healthy, "explained_variance") > 0.5
    assert last(healthy, "entropy") > 1


@pytest.mark.parametrize(
    ("fault", "symptom"),
    [
        ("score_lost", lambda h, ok: abs(last(h, "score") - h[0]["score"]) < 0.5 and last(h, "kl") < 0.3),
        ("wrong_temperature", lambda h, ok: min(step["first_ratio_error"] for step in h) > 0.05),
        ("critic_not_trained", lambda h, ok: all(abs(step["explained_variance"]) < 1e-5 for step in h)),
        ("entropy_sign", lambda h, ok: max(step["entropy"] for step in h[10:]) < 0.3),
        ("kl_sign", lambda h, ok: last(h, "reward") > last(h, "score") + 1 and last(h, "kl") > 1.25 * last(ok, "kl")),
    ],
)
def test_each_symptom_shows_in_its_run_alone(fault, symptom, runs, healthy):
    assert symptom(runs[fault], healthy)
    for other, history in runs.items():
        assert other == fault or not symptom(history, healthy)
    assert not symptom(healthy, healthy)


def test_the_score_rises_without_a_critic_as_the_symptom_says(runs):
    assert last(runs["critic_not_trained"], "score") > runs["critic_not_trained"][0]["score"] + 1


def without_times(history):
    return [{name: x for name, x in step.items() if not name.startswith("seconds")} for step in history]


def test_the_runs_are_really_run_again_with_the_same_result(runs):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    again = faults.run_toy(checks.FAULTS["kl_sign"].trainer)
    assert without_times(again) == without_times(runs["kl_sign"])
    assert torch.equal(before, torch.random.get_rng_state())


def source_lines(function):
    return [line.strip() for line in inspect.getsource(function).splitlines()]


@pytest.mark.parametrize("fault", checks.FAULTS.values(), ids=lambda fault: fault.name)
def test_the_right_line_stands_in_the_package_and_the_planted_one_does_not(fault):
    lines = source_lines(fault.where)
    assert fault.where.__module__.startswith("rlhf_lessons.") and "checks" not in fault.where.__module__
    assert sum(fault.right in line for line in lines) == 1
    assert not any(fault.planted in line for line in lines)


@pytest.mark.parametrize("fault", checks.FAULTS.values(), ids=lambda fault: fault.name)
def test_an_override_does_what_the_planted_line_would_do(fault, runs, monkeypatch):
    """The line itself, put into the package's function, gives the same run to the last bit."""
    function = inspect.unwrap(fault.where)
    namespace = dict(function.__globals__)
    exec(textwrap.dedent(inspect.getsource(function)).replace(fault.right, fault.planted), namespace)
    monkeypatch.setattr(function, "__code__", inspect.unwrap(namespace[function.__name__]).__code__)
    assert without_times(faults.run_toy(faults.Unguarded)) == without_times(runs[fault.name])


def test_a_learner_cannot_spoil_the_runs(runs):
    checks.faulty_runs()["A"][0]["score"] = 99.0
    assert checks.faulty_runs()["A"][0]["score"] != 99.0


def test_diagnose_right_open_and_half_open(capsys):
    checks.diagnose(lesson_10.PLANTED)
    checks.diagnose(dict.fromkeys(lesson_10.PLANTED))
    checks.diagnose({**lesson_10.PLANTED, "B": None, "E": None})
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "correct" and "A, kl_sign:" in said[2]
    assert said[-2:] == ["not attempted yet", "right so far; not attempted yet: B, E"]
    assert "beat the healthy run in gold" in " ".join(said)


def test_what_the_solved_hunt_explains_is_what_the_runs_show(runs, healthy):
    better_gold = {fault for fault, run in runs.items() if last(run, "gold") > last(healthy, "gold")}
    assert better_gold == {"kl_sign", "wrong_temperature"}
    by_far = {fault for fault, run in runs.items() if last(run, "score") > last(healthy, "score") + 2}
    assert by_far == {"wrong_temperature", "entropy_sign"}
    assert last(runs["entropy_sign"], "score") == 10 and last(runs["entropy_sign"], "gold") == 1
    assert set(lesson_10.PLANTED.values()) == {
        line.split(",")[1].split(":")[0].strip() for line in lesson_10.EXPLAINS[:5]
    }


@pytest.mark.parametrize("letter", lesson_10.PLANTED)
def test_diagnose_says_what_the_named_fault_would_show(letter):
    hints = set()
    for fault in checks.FAULTS:
        if fault != lesson_10.PLANTED[letter]:
            hint = hint_of(checks.diagnose, {letter: fault})
            assert checks.FAULTS[fault].symptom in hint and hint.startswith(f"Run {letter} is not {fault}")
            hints.add(hint)
    assert len(hints) == 4
    assert "is not one of" in hint_of(checks.diagnose, {letter: "gremlins"})


def test_every_fault_is_planted_once():
    assert sorted(lesson_10.PLANTED.values()) == sorted(checks.FAULTS)
    assert "No such run" in hint_of(checks.diagnose, {"F": "kl_sign"})
