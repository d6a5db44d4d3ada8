"""Lesson 15's checks: right answers pass however they are written, wrong ones get the hint that fits them."""

import inspect
import re

import pytest
import torch
from test_checks import hint_of, known

from rlhf_lessons import checks, tiny_sums
from rlhf_lessons.checks._harness import Check

CHECKS: dict[str, Check] = {name: getattr(checks, name) for name in ("is_right", "own_question")}


def by_hand(prompt, response, ended):
    a, b = prompt[:-2].split("+")
    total = int(a.replace(" ", "")) + int(b.replace(" ", ""))
    return ended and response == " ".join(str(total))


def step_by_step(prompt, response, ended):
    if not ended:
        return False
    left, right = re.match(r"(.+) \+ (.+) =", prompt).groups()
    total = str(int("".join(left.split())) + int("".join(right.split())))
    wanted = []
    for digit in total:
        wanted.append(digit)
    return " ".join(wanted) == response


ANSWERS = [
    tiny_sums.is_right,
    by_hand,
    step_by_step,
    lambda prompt, response, ended: int(ended and response == tiny_sums.answer(prompt)),
    lambda prompt, response, ended: float(tiny_sums.correct([prompt], [response], [ended])[0]),
    lambda prompt, response, ended: tiny_sums.correct([prompt], [response], [ended])[0],
]
RIGHT = dict.fromkeys(CHECKS, ANSWERS)


@pytest.mark.parametrize("name", CHECKS)
def test_every_hint_is_one_answer_s_own(name):
    hints = [wrong.hint for wrong in CHECKS[name].wrong]
    assert len(set(hints)) == len(hints)


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (lambda prompt, response, ended: None, "Your function returns None"),
        (lambda prompt, response, ended: response, "returns a str; True or False is wanted"),
        (lambda prompt, response, ended: 0.5, "returns a float; True or False is wanted"),
        (lambda prompt, response, ended: torch.zeros(2), "returns a Tensor; True or False is wanted"),
        (lambda prompt, response, ended: int(response) == 3, "Your function raised ValueError"),
        (lambda prompt, response, ended: ended and len(response) == 3, "a way that this check has no name for"),
    ],
)  # fmt: skip
def test_other_answers_are_refused_with_an_input(answer, part):
    hint = hint_of(checks.is_right, answer)
    assert part in hint and "It is right on" in hint


# --- The hunt, as the lesson shows it -----------------------------------------------------------


def graded(prompt, response, ended):
    *_, a, b, given = re.split(r" \+ | = ", f"{prompt} {response}")
    total = int(a.replace(" ", "")) + int(b.replace(" ", ""))
    return ended and given == " ".join(str(total))


def test_the_hunted_function_gets_the_hint_of_its_bug():
    assert hint_of(checks.own_question, graded) == known(checks.own_question, "the last sum")
    lines = inspect.getsource(graded).splitlines()
    assert len(lines) <= 15 and max(map(len, lines)) <= 79


def test_the_hunted_function_is_right_on_plain_numbers_and_pays_any_prompt_for_one_text():
    prompts = tiny_sums.problems("held_out")
    for miss in (0, 1, 10):
        said = [tiny_sums.as_digits(int(tiny_sums.answer(prompt).replace(" ", "")) + miss) for prompt in prompts]
        assert [graded(*pair, True) for pair in zip(prompts, said, strict=True)] == [miss == 0] * len(prompts)
    assert all(graded(prompt, "0 + 0 = 0", True) for prompt in prompts)


def test_the_hunt_explains_itself_once_it_is_solved():
    explains = checks.own_question.explains
    assert 2 <= len([part for part in explains.split(". ") if part]) <= 6 and "in a log" in explains.lower()
    assert not checks.is_right.explains
