"""Lesson 15: a function that says whether an answer is right, and one that lets the policy choose its own question."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lessons import tiny_sums
from rlhf_lessons.checks._harness import Case, Check, Wrong
from rlhf_lessons.checks._wording import Refused, describe_type

ENDED = " Nor is `ended` used: what was cut off is not yet an answer."


def verdict(answer: Callable) -> Callable[..., Tensor]:
    """A function of one prompt, one response and whether it ended that says True or False, its verdict as a tensor."""

    def judged(prompt: str, response: str, ended: bool) -> Tensor:
        said = answer(prompt, response, ended)
        if said is NotImplemented or said is None:
            return said
        if isinstance(said, str) or (isinstance(said, Tensor) and said.numel() != 1) or said not in (0, 1):
            raise Refused(f"Your function returns {describe_type(said)}; True or False is wanted.")
        return torch.tensor(bool(said))

    return judged


def cases(*triples: tuple[str, str, str]) -> Callable[[], list[Case]]:
    """One case for each (what it is, prompt, response), the response cut off where what it is says so."""
    return lambda: [
        Case(says, {"prompt": prompt, "response": response, "ended": "cut off" not in says})
        for says, prompt, response in triples
    ]


def operands(prompt: str) -> tuple[int, int]:
    """The two numbers of a prompt."""
    a, b = prompt.removesuffix(" =").split(" + ")
    return int(a.replace(" ", "")), int(b.replace(" ", ""))


def number(text: str) -> int | None:
    """The number that a text is, however it is spaced and whatever zeros lead; None for no number."""
    text = text.replace(" ", "")
    return int(text) if text.isdecimal() else None


def last_number(text: str) -> str:
    """The last run of digits in a text, as it stands there."""
    return ([""] + re.findall(r"\d(?: \d)*", text))[-1]


def loose(name: str, same: Callable[[str, str], bool], hint: str, *, ends: bool = True) -> tuple[Wrong, ...]:
    """A wrong comparison of the response with the right answer, with and without a look at `ended`."""

    def compare(prompt: str, response: str, ended: bool) -> bool:
        return ended and same(response, tiny_sums.answer(prompt))

    def compare_all(prompt: str, response: str, ended: bool) -> bool:
        return same(response, tiny_sums.answer(prompt))

    both = Wrong(name, compare, hint), Wrong(f"{name}, ended or not", compare_all, hint + ENDED)
    return both if ends else both[:1]


# --- Exercise: is_right ------------------------------------------------------------------------

TEXTS = (
    ("a right digit", "1 + 2 =", "3"),
    ("a wrong digit", "1 + 2 =", "4"),
    ("a right number of two digits", "1 7 + 5 =", "2 2"),
    ("a wrong number", "1 7 + 5 =", "2 3"),
    ("a right number that was cut off", "1 7 + 5 =", "2 2"),
    ("nothing", "1 7 + 5 =", ""),
    ("the first digit alone", "1 7 + 5 =", "2"),
    ("the right number and more", "1 7 + 5 =", "2 2 0"),
    ("the right number after another digit", "1 7 + 5 =", "1 2 2"),
    ("several numbers, one of them right", "1 7 + 5 =", "2 1 + 2 2 + 2 3"),
    ("the right digits in another order", "1 9 + 6 =", "5 2"),
    ("a leading zero", "1 7 + 5 =", "0 2 2"),
    ("digits that are not apart", "1 7 + 5 =", "22"),
    ("two spaces", "1 7 + 5 =", "2  2"),
    ("a space in front", "1 7 + 5 =", " 2 2"),
    ("a space behind", "1 7 + 5 =", "2 2 "),
    ("no number", "1 7 + 5 =", "2 + 2"),
    ("the whole sum over again", "1 7 + 5 =", "1 7 + 5 = 2 2"),
    ("another sum", "1 7 + 5 =", "0 + 0 = 0"),
    ("nothing, where the answer stands in the prompt", "0 + 7 =", ""),
    ("a right answer that stands in the prompt", "0 + 7 =", "7"),
    ("zero", "0 + 0 =", "0"),
    ("zero twice", "0 + 0 =", "0 0"),
    ("the sum of the digits", "1 7 + 5 =", "1 3"),
    ("the operands side by side", "1 7 + 5 =", "1 7 5"),
    ("the largest sum", "4 9 + 4 9 =", "9 8"),
    ("a wrong answer that was cut off", "4 9 + 4 9 =", "9 9"),
)

is_right = Check(
    name="is_right",
    reference=tiny_sums.is_right,
    cases=cases(*TEXTS),
    adapt=verdict,
    wrong=(
        Wrong(
            "ended or not",
            lambda prompt, response, ended: response == tiny_sums.answer(prompt),
            "The text is compared as it should be, but `ended` is not used: what was cut off is not yet an answer, "
            "since the policy might have gone on.",
        ),
        *loose(
            "stops at the shorter",
            lambda given, right: all(a == b for a, b in zip(given.split(), right.split(), strict=False)),
            "zip stops at the shorter of two lists, and all(...) of nothing is True: saying nothing counts as right. "
            "Compare the lengths too, or the whole texts.",
        ),
        *loose(
            "a beginning is enough",
            lambda given, right: right.startswith(given),
            "A response that is only the beginning of the answer counts as right, and so does the empty one.",
        ),
        *loose(
            "begins with it",
            lambda given, right: given.startswith(right),
            "A response counts as right that begins with the answer and goes on: 2 2 0 is another number than 2 2.",
        ),
        *loose(
            "ends with it",
            lambda given, right: given.endswith(right),
            "A response counts as right that ends with the answer: 1 2 2 is another number than 2 2.",
        ),
        *loose(
            "the last number",
            lambda given, right: last_number(given) == right,
            "You look for the last number in the response and read nothing else: 1 7 + 5 = 2 2 counts as right, and so "
            "does any text in front of it. The whole response must be the answer.",
        ),
        *loose(
            "contains it",
            lambda given, right: right in given,
            "A response counts as right that contains the answer somewhere. A policy would list many numbers.",
        ),
        *loose(
            "the same number",
            lambda given, right: number(given) == number(right),
            "You compare numbers: 0 2 2, 22 and a text with spaces of its own count as right as well. The task asks "
            "for one text, so that each prompt has one right answer and its probability can be computed.",
        ),
        *loose(
            "the same words",
            lambda given, right: given.split() == right.split(),
            "Spaces in front, behind or twice count for nothing in your comparison. Be strict: one text is right.",
        ),
        *loose(
            "stripped",
            lambda given, right: given.strip() == right,
            "You strip spaces off the response. Be strict: one text is right.",
        ),
        *loose(
            "without spaces",
            lambda given, right: given.replace(" ", "") == right.replace(" ", ""),
            "You take all spaces out before you compare, so 22 counts as 2 2. Be strict: one text is right.",
        ),
        *loose(
            "in any order",
            lambda given, right: sorted(given.split()) == sorted(right.split()),
            "The digits count in any order: 5 2 is not 2 5.",
        ),
        *loose(
            "digits that are not apart",
            lambda given, right: given == right.replace(" ", ""),
            "You compare with digits that stand together, 22. A number of this world has a space between its digits: "
            '" ".join(str(22)).',
            ends=False,
        ),
        Wrong(
            "the sum of the digits",
            lambda prompt, response, ended: (
                ended and response == tiny_sums.as_digits(sum(map(int, re.findall(r"\d", prompt))))
            ),
            "You add up the digits of the prompt. 1 7 is one number, seventeen.",
        ),
        Wrong(
            "never right",
            lambda prompt, response, ended: False,
            "It never says that a response is right. A number is compared with a text, perhaps, or a text that holds "
            "an EOS is expected?",
        ),
        Wrong(
            "always right",
            lambda prompt, response, ended: True,
            "It says of every response that it is right.",
        ),
    ),
)

# --- Bug hunt: the policy's own question -------------------------------------------------------

OWN = (
    ("a right number", "1 7 + 5 =", "2 2"),
    ("a wrong number", "1 7 + 5 =", "2 3"),
    ("a right number that was cut off", "1 7 + 5 =", "2 2"),
    ("a sum of its own", "1 7 + 5 =", "0 + 0 = 0"),
    ("nothing", "1 7 + 5 =", ""),
    ("the right number, and a sum of its own", "1 7 + 5 =", "2 2 + 1 = 2 3"),
    ("a sum of its own that ends in the right number", "1 7 + 5 =", "0 + 0 = 2 2"),
    ("the prompt over again", "1 7 + 5 =", "1 7 + 5 = 2 2"),
    ("a chain without a plus", "1 7 + 5 =", "7 = 1 2"),
    ("the right number after an =", "1 7 + 5 =", "3 = 2 2"),
    ("a leading zero", "1 7 + 5 =", "0 2 2"),
    ("digits that are not apart", "1 7 + 5 =", "22"),
    ("another right number", "4 9 + 4 9 =", "9 8"),
    ("an answer that stands in the prompt", "0 + 7 =", "7"),
    ("nothing, where the answer stands in the prompt", "0 + 7 =", ""),
)


def last_sum(prompt: str, response: str, ended: bool) -> bool:
    """The hunted function: whatever sum stands last in the whole text."""
    *_, a, b, given = re.split(r" \+ | = ", f"{prompt} {response}")
    right = [number(a), number(b)]
    return ended and None not in right and given == tiny_sums.as_digits(sum(right))


def first_sum(prompt: str, response: str, ended: bool) -> bool:
    """The first sum of the text, what follows its answer unread."""
    a, b, given, *_ = re.split(r" \+ | = ", f"{prompt} {response}")
    return ended and given == tiny_sums.as_digits(number(a) + number(b))


def last_answer(prompt: str, response: str, ended: bool) -> bool:
    """The prompt's operands, and the number that stands last in the text."""
    return ended and last_number(f"{prompt} {response}") == tiny_sums.answer(prompt)


def answer_after_equals(prompt: str, response: str, ended: bool) -> bool:
    """The prompt's operands, and whatever stands behind the last =."""
    return ended and f"{prompt} {response}".split(" = ")[-1] == tiny_sums.answer(prompt)


own_question = Check(
    name="own_question",
    reference=tiny_sums.is_right,
    cases=cases(*OWN),
    adapt=verdict,
    explains=(
        "The fault took the numbers to add from the text as a whole, and of several sums the last one. So the policy "
        "could set itself a question: 0 + 0 = 0 was right, whatever had been asked. On nearly all that the base model "
        "says the two checkers agree. In the lesson two of 7,904 answers told them apart: 1 = 4 after the prompt 6 + 3 "
        "= was taken for 3 + 1 = 4. (Both were cut off; a policy with room for more needs no better start.) What is "
        "asked has to come from where the policy cannot write. In a log, the score climbs to 1 and the responses "
        "become longer, while pass@1 by another checker falls: read the texts."
    ),
    wrong=(
        Wrong(
            "the last sum",
            last_sum,
            "It still adds the numbers of the last sum in the text, and the policy can write one: 0 + 0 = 0 counts as "
            "right after any prompt. Take the numbers from the prompt alone.",
        ),
        Wrong(
            "the first sum",
            first_sum,
            "The numbers come from the prompt now, but what follows the first answer is not read: 2 2 + 1 = 2 3 counts "
            "as right. The whole response must be the answer.",
        ),
        Wrong(
            "no plus allowed",
            lambda prompt, response, ended: "+" not in response and last_sum(prompt, response, ended),
            "A response with a + is refused, but 7 = 1 2 is not: it makes 5 + 7 = 12 of the prompt's second number. Do "
            "not list what is forbidden; take the numbers from the prompt alone.",
        ),
        Wrong(
            "no sum allowed",
            lambda prompt, response, ended: "=" not in response and last_answer(prompt, response, ended),
            "A response with an = is refused, but where the answer stands in the prompt, saying nothing counts as "
            "right: the response's number is still looked for in the whole text.",
        ),
        Wrong(
            "the last number",
            last_answer,
            "The numbers to add come from the prompt now, but the answer is the last number of the whole text: 0 + 0 = "
            "2 2 counts as right, and saying nothing may. The whole response must be the answer.",
        ),
        Wrong(
            "behind the last =",
            answer_after_equals,
            "The numbers to add come from the prompt now, but the answer is whatever stands behind the last =: 3 = 2 2 "
            "counts as right. The whole response must be the answer.",
        ),
        Wrong(
            "the answer somewhere",
            lambda prompt, response, ended: ended and tiny_sums.answer(prompt) in response,
            "The numbers to add come from the prompt now, but the answer may stand anywhere in the response.",
        ),
        Wrong(
            "the same number",
            lambda prompt, response, ended: ended and number(response) == sum(operands(prompt)),
            "The numbers to add come from the prompt now, but 0 2 2 and 22 count as right, which they did not before.",
        ),
        Wrong(
            "ended or not",
            lambda prompt, response, ended: tiny_sums.is_right(prompt, response),
            "The question is the prompt's now, but `ended` has been lost: what was cut off counts as right.",
        ),
    ),
)
