"""Lesson 13's checks: right answers pass however they are written, wrong ones get the hint that fits them."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from test_checks import hint_of, known

from rlhf_lessons import checks, preferences
from rlhf_lessons.checks._harness import Check

CHECKS: dict[str, Check] = {name: getattr(checks, name) for name in ("dpo_loss", "lost_reference")}


def loop_dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    total = 0.0
    for i in range(len(chosen)):
        better, worse = chosen[i] - ref_chosen[i].item(), rejected[i] - ref_rejected[i].item()
        total = total + F.softplus(beta * (worse - better))
    return total / len(chosen)


def stacked_dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    log_probs = torch.stack([chosen, rejected])
    ref = torch.stack([ref_chosen, ref_rejected])
    better, worse = beta * (log_probs - ref)
    return -F.logsigmoid(better - worse).mean()


def cross_entropy_dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    rewards = beta * torch.stack([chosen - ref_chosen, rejected - ref_rejected], dim=1)
    return F.cross_entropy(rewards, torch.zeros(len(chosen), dtype=torch.long))


RIGHT = dict.fromkeys(CHECKS, [preferences.dpo_loss, loop_dpo, stacked_dpo, cross_entropy_dpo])


# --- The hunt, as the lesson shows it -----------------------------------------------------------


def pair_loss(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    log_probs = torch.stack([chosen, rejected])  # (2, N)
    ref = torch.stack([ref_chosen, ref_rejected]).detach()
    better, worse = beta * (log_probs - ref.mean(0))  # (N,) each
    return -F.logsigmoid(better - worse).mean()


def test_the_hunted_function_gets_the_hint_of_its_bug():
    check = CHECKS["lost_reference"]
    assert hint_of(check, pair_loss) == known(check, "one mean for both")
    lines = inspect.getsource(pair_loss).splitlines()
    assert len(lines) <= 15 and max(map(len, lines)) <= 79


def test_the_hunt_explains_itself_once_it_is_solved():
    explains = CHECKS["lost_reference"].explains
    assert 2 <= len([part for part in explains.split(". ") if part]) <= 6 and "in a log" in explains.lower()
    assert not CHECKS["dpo_loss"].explains


# --- As they are typed --------------------------------------------------------------------------

LONG = """
def my_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    r_w = beta * (chosen - ref_chosen)
    r_l = beta * (rejected - ref_rejected)
    return -F.logsigmoid(r_w - r_l).mean()
"""
HEAD = "lambda c, r, rc, rr, *, beta: "
VARIANTS = {  # what is typed, as a change of LONG or a line: part of what is said
    "correct": [
        LONG,
        HEAD + "-F.logsigmoid(beta * ((c - r) - (rc - rr))).mean()",
        HEAD + "torch.log1p(torch.exp(-beta * (c - rc - r + rr)).clamp(max=1e300)).mean() if c.dtype == torch.float64 "
        "else F.softplus(-beta * (c - rc - r + rr)).mean()",
        HEAD + "F.binary_cross_entropy_with_logits(beta * (c - rc - r + rr), torch.ones_like(c))",
    ],
    "the sign": [LONG.replace("-F.log", "F.log"), HEAD + "F.logsigmoid(beta * (c - rc - r + rr)).mean()"],
    "chosen and rejected swapped": [LONG.replace("r_w - r_l", "r_l - r_w"),
                                    LONG.replace("(chosen - ref_chosen)", "(ref_chosen - chosen)")
                                    .replace("(rejected - ref_rejected)", "(ref_rejected - rejected)")],
    "no reference": [LONG.replace(" - ref_chosen", "").replace(" - ref_rejected", "")],
    "the reference added": [LONG.replace(" - ref", " + ref")],
    "one reference only": [LONG.replace("(rejected - ref_rejected)", "rejected")],
    "β forgotten": [LONG.replace("beta * ", "")],
    "β outside": [LONG.replace("= beta * ", "= ").replace("-F", "-beta * F")],
    "divided by β": [LONG.replace("beta * (chosen - ref_chosen)", "(chosen - ref_chosen) / beta")
                     .replace("beta * (rejected - ref_rejected)", "(rejected - ref_rejected) / beta")],
    "β on the policy alone": [HEAD + "-F.logsigmoid(beta * (c - r) - (rc - rr)).mean()",
                              LONG.replace("beta * (chosen - ref_chosen)", "beta * chosen - ref_chosen")
                              .replace("beta * (rejected - ref_rejected)", "beta * rejected - ref_rejected")],
    "no logarithm": [LONG.replace("F.logsigmoid", "torch.sigmoid")],
    "one minus the probability": [LONG.replace("-F.logsigmoid", "(1 - torch.sigmoid").replace(".mean", ").mean")],
    "no sigmoid": [LONG.replace("-F.logsigmoid(r_w - r_l)", "(r_l - r_w)")],
    "σ, then log": [LONG.replace("F.logsigmoid(r_w - r_l)", "torch.log(torch.sigmoid(r_w - r_l))")],
    "ratios without the logarithm": [LONG.replace("(chosen - ref_chosen)", "torch.exp(chosen - ref_chosen)")
                                     .replace("(rejected - ref_rejected)", "torch.exp(rejected - ref_rejected)")],
    "IPO": [HEAD + "((c - rc - r + rr - 1 / (2 * beta)) ** 2).mean()"],
    "summed": [LONG.replace("mean", "sum")],
    "not averaged": [LONG.replace(".mean()", "")],
    "returns None": [LONG.replace("return ", "loss = ")],
    "a float": [LONG.replace(".mean()", ".mean().item()")],
    "detached": [LONG.replace("r_w - r_l", "(r_w - r_l).detach()")],
    "no name for": [LONG.replace("r_w - r_l", "2 * (r_w - r_l)"), LONG.replace("-F.logsigmoid(r_w - r_l)",
                    "F.relu(1 - (r_w - r_l))")],
    "raised NameError": [LONG.replace("F.logsigmoid", "logsigmoid")],
}  # fmt: skip
ROWS = [(said, source) for said, sources in VARIANTS.items() for source in sources]


@pytest.mark.parametrize(("said", "source"), ROWS, ids=[f"{said}-{i}" for i, (said, _) in enumerate(ROWS)])
def test_an_answer_gets_its_verdict(said, source):
    namespace = {"torch": torch, "F": F}
    if source.startswith("lambda"):
        answer = eval(source, namespace)
    else:
        exec(source, namespace)
        answer = namespace["my_dpo_loss"]
    check = CHECKS["dpo_loss"]
    if said == "correct":
        assert check.judge(answer) == "correct"
    elif said in {wrong.name for wrong in check.wrong}:
        assert hint_of(check, answer) == known(check, said)
    else:
        assert said in hint_of(check, answer)


REPAIRS = {
    "correct": "ref",
    "one mean for both": "ref.mean(0)",
    "the references exchanged": "ref.flip(0)",
    "half of it": "0.5 * ref",
    "no name for": "ref.mean(1, keepdim=True)",
}


@pytest.mark.parametrize(("said", "change"), REPAIRS.items())
def test_a_repair_gets_its_verdict(said, change):
    namespace, check = {"torch": torch, "F": F}, CHECKS["lost_reference"]
    exec(inspect.getsource(pair_loss).replace("ref.mean(0)", change), namespace)
    if said == "correct":
        assert check.judge(namespace["pair_loss"]) == "correct"
    else:
        assert (known(check, said) if said != "no name for" else said) in hint_of(check, namespace["pair_loss"])
