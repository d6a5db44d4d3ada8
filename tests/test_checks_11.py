"""Lesson 11's checks: every loss with the right expected gradient passes, wrong ones get the hint that fits them."""

import pytest
import torch
import torch.nn.functional as F
from test_checks import FUNCTION_CHECKS, hint_of, known

from rlhf_lessons import checks, kl
from rlhf_lessons.checks.lesson_11 import kl_loss_cases, small_world
from rlhf_lessons.exact import sequence_kl

CHECKS = {"kl_loss": checks.kl_loss, "other_way": checks.other_way}
WRONG = [(name, wrong) for name, check in CHECKS.items() for wrong in check.wrong]


def text_k2(log_probs, ref_log_probs, mask):
    d = torch.where(mask, log_probs - ref_log_probs, 0).sum(dim=1)
    return 0.5 * d.square().mean()


def reinforce(log_probs, ref_log_probs, mask):
    log_probs, ref = log_probs.masked_fill(~mask, 0), ref_log_probs.masked_fill(~mask, 0)
    with torch.no_grad():
        toll = (log_probs - ref).sum(dim=1)
    return (log_probs.sum(dim=1) * toll).mean()


def ratio_times_k3_of_the_text(log_probs, ref_log_probs, mask):
    log_prob, ref = (torch.where(mask, x, 0).sum(dim=1) for x in (log_probs, ref_log_probs))
    return ((log_prob - log_prob.detach()).exp() * kl.sampled_kl(log_prob, ref, kind="k3")).mean()


def loop_to_go(log_probs, ref_log_probs, mask):
    total = 0.0
    for b in range(len(mask)):
        toll = 0.0
        for t in reversed(range(mask.shape[1])):
            if mask[b, t]:
                toll = toll + (log_probs[b, t] - ref_log_probs[b, t]).item()
                total = total + log_probs[b, t] * toll
    return total / len(mask)


def both_halves_of_k3(log_probs, ref_log_probs, mask):
    log_probs, ref = log_probs.masked_fill(~mask, 0), ref_log_probs.masked_fill(~mask, 0)
    k3 = (kl.sampled_kl(log_probs, ref, kind="k3") * mask).sum(dim=1)
    return (k3 + k3.detach() * log_probs.sum(dim=1)).mean()


RIGHT = {
    "kl_loss": [
        kl.sequence_kl_loss, text_k2, reinforce, ratio_times_k3_of_the_text, loop_to_go, both_halves_of_k3,
    ],
    "other_way": [
        lambda lp, ref: 0.5 * (lp - ref) ** 2,
        lambda lp, ref: (lp - lp.detach()).exp() * kl.sampled_kl(lp, ref, kind="k3"),
        lambda lp, ref: (lp - lp.detach()).exp() * (lp - ref),
        lambda lp, ref: (lp - ref).detach() * lp,
        lambda lp, ref: F.mse_loss(lp, ref, reduction="none") / 2,
    ],
}  # fmt: skip


@pytest.mark.equation("11.1")
def test_the_exercise_s_truth_is_the_gradient_of_the_kl():
    for case in kl_loss_cases():
        logits = case.inputs["logits"].clone().requires_grad_()
        log_probs, ref, mask = small_world(logits, case.inputs["ref_logits"], **case.options)
        log_prob, ref = (torch.where(mask, x, 0).sum(dim=1) for x in (log_probs, ref))
        (exact,) = torch.autograd.grad(sequence_kl(log_prob, ref), logits)
        torch.testing.assert_close(checks.kl_loss.reference(**case.inputs, **case.options), exact.to(logits.dtype))


def test_no_two_hints_are_alike():
    hints = [wrong.hint for _, wrong in WRONG] + [wrong.hint for c in FUNCTION_CHECKS.values() for wrong in c.wrong]
    assert len(set(hints)) == len(hints)


def test_the_hunted_function_gets_the_hint_of_its_bug():
    def leash(log_probs, ref_log_probs):
        log_ratio = ref_log_probs - log_probs
        return log_ratio.exp() - log_ratio - 1

    assert hint_of(checks.other_way, leash) == known(checks.other_way, "k3, its tokens held")


def test_what_the_learners_code_raises_is_reported():
    for check in CHECKS.values():
        assert "raised TypeError" in hint_of(check, lambda log_probs: log_probs)


# --- As they are typed --------------------------------------------------------------------------

MASKED = "def my_loss(log_probs, ref_log_probs, mask):\n    lp = torch.where(mask, log_probs, 0)\n"
MASKED += "    d = lp - torch.where(mask, ref_log_probs, 0)\n    return "
VARIANTS = {
    "kl_loss": [
        (None, MASKED + "(d.sum(1) ** 2).mean() / 2"),
        (None, MASKED + "(d.detach().flip(1).cumsum(1).flip(1) * lp).sum() / len(mask)"),
        (None, MASKED + "(d.detach().sum(1, keepdim=True) * lp).sum(1).mean()"),
        (None, MASKED + "((lp - lp.detach()).sum(1).exp() * d.sum(1)).mean()"),
        ("k1 as a loss", MASKED + "d.sum(1).mean()"),
        ("each token for itself", MASKED + "(d ** 2 / 2).sum(1).mean()"),
        ("each token for itself", MASKED + "(d.detach() * lp).sum(1).mean()"),
        ("each token for itself", MASKED + "(d.detach().cumsum(1) * lp).sum(1).mean()"),
        ("each token for itself", MASKED + "((lp - lp.detach()).exp() * (torch.exp(-d) - 1 + d)).sum(1).mean()"),
        ("k3 of each token", MASKED + "(torch.exp(-d) - 1 + d).sum(1).mean()"),
        ("k3 of each token", MASKED + "((lp - lp).exp() * (torch.exp(-d) - 1 + d)).sum(1).mean()"),
        ("the sign", MASKED + "-(d.detach().sum(1, keepdim=True) * lp).sum(1).mean()"),
        ("the tolls not held constant", MASKED + "(d.flip(1).cumsum(1).flip(1) * lp).sum(1).mean()"),
        (
            "k3 of the tolls to go",
            MASKED + "(lambda x: torch.exp(-x) - 1 + x)(d.flip(1).cumsum(1).flip(1)).sum(1).mean()",
        ),
        ("the text's toll not held constant", MASKED + "(d.sum(1) * lp.sum(1)).mean()"),
        ("the mask forgotten in k2", "def my_loss(lp, ref, mask):\n    return ((lp - ref).sum(1) ** 2).mean() / 2"),
        ("twice too long", MASKED + "(d.sum(1) ** 2).sum() / 2"),
        ("twice too long", MASKED + "(d.sum(1) ** 2).mean()"),
        ("detached", MASKED + "(d.detach().sum(1) ** 2).mean() / 2"),
        ("(2,)", MASKED + "(d.sum(1) ** 2) / 2"),
        ("a float", MASKED + "(d.sum(1) ** 2).mean().item() / 2"),
        ("no name for", MASKED + "(d.sum(1).abs() ** 3).mean() / 6"),
    ],
    "other_way": [
        (None, "lambda lp, ref: (lp - ref).pow(2) / 2"),
        (None, "lambda lp, ref: torch.exp(lp - lp.detach()) * (torch.exp(ref - lp) - (ref - lp) - 1)"),
        ("k3, its tokens held", "lambda lp, ref: torch.exp(ref - lp) - (ref - lp) - 1"),
        ("k3, its tokens held", "lambda lp, ref: torch.exp(lp - lp).detach() * (torch.exp(ref - lp) - (ref - lp) - 1)"),
        ("the log-ratio turned round", "lambda lp, ref: torch.exp(lp - ref) - (lp - ref) - 1"),
        ("k1", "lambda lp, ref: lp - ref"),
        ("k3 as a toll", "lambda lp, ref: lp * (torch.exp(ref - lp) - (ref - lp) - 1).detach()"),
        ("k2 as a toll", "lambda lp, ref: 0.5 * ((lp - ref) ** 2).detach() * lp"),
        ("detached", "lambda lp, ref: (0.5 * (lp - ref) ** 2).detach()"),
        ("one loss a token", "lambda lp, ref: (0.5 * (lp - ref) ** 2).mean()"),
        ("returns None", "lambda lp, ref: None"),
        ("no name for", "lambda lp, ref: (lp - ref).abs()"),
    ],
}
ROWS = [(name, said, source) for name, rows in VARIANTS.items() for said, source in rows]


def typed(source):
    if source.startswith("lambda"):
        return eval(source, {"torch": torch})
    namespace = {"torch": torch}
    exec(source, namespace)
    return namespace["my_loss"]


@pytest.mark.parametrize(("name", "said", "source"), ROWS, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(ROWS)])
def test_an_answer_gets_its_verdict(name, said, source):
    """Said: nothing for a right answer, the name of a known mistake, or words of the refusal."""
    check = CHECKS[name]
    if said is None:
        check(typed(source))
        return
    message = hint_of(check, typed(source))
    assert message == known(check, said) if said in {w.name for w in check.wrong} else said in message
