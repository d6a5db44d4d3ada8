"""Lesson 16's checks: right answers pass however they are written, wrong ones get the hint that fits them."""

import inspect

import pytest
import torch
from test_checks import hint_of, known

from rlhf_lessons import checks, importance
from rlhf_lessons.checks._harness import Check
from rlhf_lessons.checks.lesson_16 import receive

CHECKS: dict[str, Check] = {name: getattr(checks, name) for name in ("truncated_ratio", "stale_engine")}

# --- Right answers, written in other ways -------------------------------------------------------


def loop_truncated_ratio(log_probs, sampler_log_probs, mask, *, cap, level):
    log_probs = log_probs.detach()
    weights = torch.ones_like(log_probs)
    for row in range(len(mask)):
        real = int(mask[row].sum())
        total = 0.0
        for step in range(real):
            d = float(log_probs[row, step] - sampler_log_probs[row, step])
            total += d
            weights[row, step] = min(torch.tensor(d).exp(), cap)
        if level == "sequence":
            weights[row] = min(torch.tensor(total).exp(), cap)
    return weights


def by_products(log_probs, sampler_log_probs, mask, *, cap, level):
    with torch.no_grad():
        ratio = (log_probs - sampler_log_probs).exp().masked_fill(~mask, 1)
        if level == "sequence":
            ratio = ratio.prod(dim=1, keepdim=True).repeat(1, mask.shape[1])
        return torch.minimum(ratio, torch.tensor(cap))


def zero_in_the_padding(log_probs, sampler_log_probs, mask, *, cap, level):
    return mask * importance.truncated_ratio(log_probs, sampler_log_probs, mask, cap=cap, level=level)


def by_a_list(held, weights):
    weights = list(weights)
    for name, x in weights:
        held[name].copy_(x)
    return sum(x.numel() for _, x in weights)


def by_slices(held, weights):
    count = 0
    with torch.no_grad():
        for name, x in weights:
            held[name][:] = x
            count = count + x.numel()
    return torch.tensor(count)


RIGHT = {
    "truncated_ratio": [importance.truncated_ratio, loop_truncated_ratio, by_products, zero_in_the_padding],
    "stale_engine": [receive, by_a_list, by_slices],
}


@pytest.mark.parametrize("name", CHECKS)
def test_every_hint_is_one_answer_s_own(name):
    hints = [wrong.hint for wrong in CHECKS[name].wrong]
    assert len(set(hints)) == len(hints)


@pytest.mark.parametrize(
    ("name", "answer", "part"),
    [
        ("truncated_ratio", lambda x, y, mask, *, cap, level: None, "Your function returns None"),
        ("truncated_ratio", lambda x, y, mask, *, cap, level: (x - y).detach().sum(1).exp().clamp(max=cap),
         "each token wants a weight: (1, 1)"),
        ("truncated_ratio", lambda x, y, mask, *, cap, level: (x - y).detach().exp() ** 2, "the first wrong one"),
        ("stale_engine", lambda held, weights: None, "Your function returns None"),
        ("stale_engine", lambda held, weights: held, "returns a dict; how many numbers came is wanted"),
        ("stale_engine", lambda held, weights: len(weights), "Your function raised TypeError"),
        ("stale_engine", lambda held, weights: 7, "the first wrong one"),
    ],
)  # fmt: skip
def test_other_answers_are_refused_with_an_input(name, answer, part):
    hint = hint_of(getattr(checks, name), answer)
    assert part in hint and "It is right on" in hint or part in hint and "returns" in hint


# --- The hunt, as the lesson shows it -----------------------------------------------------------


def receive_hunted(held, weights):
    size = sum(x.numel() for _, x in weights)
    for name, x in weights:
        held[name].copy_(x)
    return size


def test_the_hunted_function_gets_the_hint_of_its_bug():
    assert hint_of(checks.stale_engine, receive_hunted) == known(checks.stale_engine, "read twice")
    lines = inspect.getsource(receive_hunted).splitlines()
    assert len(lines) <= 15 and max(map(len, lines)) <= 79


def test_the_hunted_function_says_that_all_came_and_takes_nothing():
    held = {"w": torch.zeros(3)}
    assert receive_hunted(held, iter([("w", torch.ones(3))])) == 3 and not held["w"].any()
    assert receive(held, iter([("w", torch.ones(3))])) == 3 and held["w"].all()


def test_the_hunt_explains_itself_once_it_is_solved():
    explains = checks.stale_engine.explains
    assert "in a log" in explains.lower() and "first_ratio_error" in explains
    assert not checks.truncated_ratio.explains
