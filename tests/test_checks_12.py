"""The checks of lesson 12: right answers pass however they are written, wrong ones get the hint that fits them."""

import inspect

import pytest
import torch
from test_checks import hint_of, known
from test_variants import CORRECT, REFUSED, REMARK, typo, verdict_of

from rlhf_lessons import baselines, checks
from rlhf_lessons.checks import lesson_12

# --- Right answers, written in other ways ------------------------------------------------------


def loop_group_advantages(rewards, group, *, scale):
    out = torch.zeros_like(rewards)
    for number in group.unique().tolist():
        rows = [i for i in range(len(group)) if group[i] == number]
        mean = sum(rewards[i] for i in rows) / len(rows)
        for i in rows:
            out[i] = rewards[i] - mean
    if scale == "batch":
        return out / (out.pow(2).mean().sqrt() + 1e-8)
    if scale == "group":
        for number in group.unique():
            out[group == number] /= out[group == number].std(correction=0) + 1e-8
    return out


def vector_group_advantages(rewards, group, *, scale):
    same = (group[:, None] == group).to(rewards.dtype)
    same = same / same.sum(dim=1, keepdim=True)
    centred = rewards - same @ rewards
    variance = {"none": torch.ones_like(rewards), "group": same @ centred**2, "batch": (centred**2).mean()}[scale]
    return torch.where(variance > 0, centred / variance.sqrt(), 0)


def loop_rows(rewards):
    rows = [(row - row.mean()) / (row.std(correction=0) + 1e-8) for row in rewards]
    return torch.stack(rows)


def repaired_advantages(rewards):
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-8)


RIGHT = {
    "group_advantages": [baselines.group_advantages, loop_group_advantages, vector_group_advantages],
    "one_scale_for_all": [loop_rows, repaired_advantages, lesson_12.within_rows],
}


# --- The colleague's function of the hunt, as the lesson shows it --------------------------------


def my_scaled_advantages(rewards):
    """rewards (B, G), a group a row -> (B, G)."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(correction=0) + 1e-8)


HUNTS = [("one_scale_for_all", my_scaled_advantages, "the batch's deviation")]


@pytest.mark.parametrize(("name", "buggy", "bug"), HUNTS)
def test_the_hunted_function_gets_the_hint_of_its_bug(name, buggy, bug):
    assert hint_of(getattr(checks, name), buggy) == known(getattr(checks, name), bug)
    lines = inspect.getsource(buggy).splitlines()
    assert len(lines) <= 15 and max(map(len, lines)) <= 79


# --- As they are typed ---------------------------------------------------------------------------

GROUPED = """
def my_group_advantages(rewards, group, *, scale):
    A = torch.zeros_like(rewards)
    for g in torch.unique(group):
        rows = group == g
        A[rows] = rewards[rows] - rewards[rows].mean()
        if scale == "group":
            A[rows] = A[rows] / (A[rows].std(unbiased=False) + 1e-8)
    if scale == "batch":
        A = A / (A.std(unbiased=False) + 1e-8)
    return A
"""
ROWS = "lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-8)"
VARIANTS = {
    "group_advantages": [
        (CORRECT, GROUPED),
        (CORRECT, typo(GROUPED, "A[rows].std(unbiased=False) => rewards[rows].var(unbiased=False).sqrt()")),
        (REMARK, typo(GROUPED, "zeros_like(rewards) => zeros(len(rewards), dtype=torch.float64)",
                      "rewards[rows] - rewards[rows].mean() => (rewards[rows] - rewards[rows].mean()).double()")),
        ("Bessel's deviation", typo(GROUPED, "unbiased=False => ")),
        ("Bessel's deviation in the group", typo(GROUPED, "(A[rows].std(unbiased=False) => (A[rows].std()")),
        ("the batch's mean", typo(GROUPED, "- rewards[rows].mean() => - rewards.mean()")),
        ("the deviation of the raw rewards", typo(GROUPED, "A / (A.std => A / (rewards.std")),
        ("the batch whitened as one group",
         typo(GROUPED, "A = A / (A.std => A = (rewards - rewards.mean()) / (rewards.std")),
        ("divided by nothing", typo(GROUPED, " + 1e-8 => ")),
        ("an epsilon of 0.0001", typo(GROUPED, "1e-8 => 1e-4")),
        ("an epsilon of 1e-06", typo(GROUPED, "1e-8 => 1e-6")),
        ("the variance", typo(GROUPED, ".std => .var")),
        ("group and batch swapped", typo(GROUPED, '"group" => "x"', '"batch" => "group"', '"x" => "batch"')),
        ("never scaled", "lambda r, group, *, scale: r - torch.stack([r[group == g].mean() for g in group])"),
        ("not centred", typo(GROUPED, "A[rows] = rewards[rows] - rewards[rows].mean() => "
                             'A[rows] = rewards[rows] - (0 if scale == "none" else rewards[rows].mean())')),
        (REFUSED, "lambda r, group, *, scale: r - r[group].mean()"),
        (REFUSED, typo(GROUPED, "return A => return -A")),
    ],
    "one_scale_for_all": [
        (CORRECT, ROWS),
        (CORRECT, typo(ROWS, "r.std(1, keepdim=True, correction=0) => r.var(1, keepdim=True, correction=0).sqrt()")),
        ("the batch's deviation", typo(ROWS, "r.std(1, keepdim=True, correction=0) => r.std(correction=0)")),
        ("Bessel's deviation in each row", typo(ROWS, ", correction=0 => ")),
        ("the deviation over the groups", typo(ROWS, "r.std(1, keepdim=True => r.std(0, keepdim=True")),
        ("the variance of each row", typo(ROWS, "r.std => r.var")),
        ("the batch for both", "lambda r: (r - r.mean()) / (r.std(correction=0) + 1e-8)"),
        ("0 divided by 0", typo(ROWS, " + 1e-8 => ")),
        ("not divided", "lambda r: r - r.mean(1, keepdim=True)"),
        (REFUSED, typo(ROWS, "r.std(1, keepdim=True, correction=0) => r.std(1, correction=0)")),
    ],
}  # fmt: skip
TYPED = [(name, verdict, source) for name, rows in VARIANTS.items() for verdict, source in rows]


@pytest.mark.parametrize(("name", "verdict", "source"), TYPED, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(TYPED)])
def test_an_answer_gets_its_verdict(name, verdict, source):
    assert verdict_of(getattr(checks, name), source) == verdict
