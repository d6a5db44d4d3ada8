"""The tiny world of sums: prompts such as "1 7 + 5 =", and a function that says whether a response is right.

A number is written as its digits, separated by spaces, each a token. Operands are 0 to 49. A right response is the
sum's digits and then EOS, so that each prompt has exactly one right response: with p its probability, k samples hold a
right one with probability 1 − (1 − p)^k.

Of the 2,500 sums about a fifth are *held out*: nothing is trained on them, neither the shipped base model
(`ASSETS / "sums"`) nor a policy that is given `problems("train")`. A sum and its mirror image, a + b and b + a, always
stand on the same side, since who knows one of them has been told the other.
"""

import random
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_lessons import tiny_reviews

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGEST_OPERAND = 49
MAX_RESPONSE_TOKENS = 3  # two digits and EOS
HELD_OUT_SHARE = 0.2
SLIPS = (1, 2, 3, 10, -1, -2, -3, -10)  # by which a wrong text of `sample_corpus` misses
WORDS = [*"0123456789", "+", "="]
SPLITS = ("train", "held_out")
PROMPT = re.compile(r"(\d(?: \d)*) \+ (\d(?: \d)*) =")

# --- Sums and their texts -----------------------------------------------------------------------


def as_digits(number: int) -> str:
    """17 -> "1 7"."""
    return " ".join(str(number))


def as_prompt(a: int, b: int) -> str:
    """17, 5 -> "1 7 + 5 ="."""
    return f"{as_digits(a)} + {as_digits(b)} ="


def answer(prompt: str) -> str:
    """The one right response: "1 7 + 5 =" -> "2 2". Raises ValueError for what is no such prompt."""
    match = PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"a prompt must be a sum such as '1 7 + 5 ='; got {prompt!r}")
    return as_digits(sum(int(number.replace(" ", "")) for number in match.groups()))


# --- The split ----------------------------------------------------------------------------------


def _held_out() -> set[tuple[int, int]]:
    """The pairs (a, b), a <= b, that stand for held-out sums, the same on every machine.

    Of the first seeds the one that leaves every operand and every answer among the training sums too.
    """
    rng, numbers = random.Random(2), range(LARGEST_OPERAND + 1)
    return {(a, b) for a in numbers for b in numbers if a <= b and rng.random() < HELD_OUT_SHARE}


HELD_OUT = _held_out()


def problems(split: str) -> list[str]:
    """All prompts of one side of the split, "train" or "held_out", in rising order. Raises ValueError for another."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    numbers = range(LARGEST_OPERAND + 1)
    pairs = [(a, b) for a in numbers for b in numbers]
    return [as_prompt(a, b) for a, b in pairs if ((min(a, b), max(a, b)) in HELD_OUT) == (split == "held_out")]


def prompts(n: int, generator: torch.Generator) -> list[str]:
    """Draw n training prompts."""
    known = problems("train")
    return [known[i] for i in torch.randint(len(known), (n,), generator=generator).tolist()]


def sample_corpus(n: int, generator: torch.Generator, *, right: float = 1.0) -> list[str]:
    """Draw n training sums with an answer, "1 7 + 5 = 2 2": text to pretrain on.

    right: the share of right answers; a wrong one misses by a number of `SLIPS`, in the other direction where it would
    be negative. Raises ValueError unless it lies between 0 and 1.
    """
    if not 0 <= right <= 1:
        raise ValueError(f"right must be a number between 0 and 1; got {right}")
    drawn = prompts(n, generator)
    slips = torch.tensor(SLIPS)[torch.randint(len(SLIPS), (n,), generator=generator)]
    slips = torch.where(torch.rand(n, generator=generator) < right, 0, slips)
    totals = [int(answer(prompt).replace(" ", "")) for prompt in drawn]
    written = [total + slip if total + slip >= 0 else total - slip
               for total, slip in zip(totals, slips.tolist(), strict=True)]  # fmt: skip
    return [f"{prompt} {as_digits(number)}" for prompt, number in zip(drawn, written, strict=True)]


# --- The checker --------------------------------------------------------------------------------


def is_right(prompt: str, response: str, ended: bool = True) -> bool:
    """Whether a response is the sum's digits, one space between them, and nothing else, and has ended.

    No leading zero, no other space. Raises ValueError for a prompt that is no sum.
    """
    return bool(ended) and response == answer(prompt)


def correct(prompts: Sequence[str], responses: Sequence[str], ended: Iterable[bool] | None = None) -> Tensor:
    """1.0 where a response is right, else 0.0 (`is_right`): B prompts, B responses -> (B,) float32.

    ended: whether each response ended, as a trainer says it; one that did not is wrong, whatever it says so far.
    Raises ValueError if lengths differ or a prompt is no sum.
    """
    ended = [True] * len(responses) if ended is None else list(ended)
    lengths = {"prompts": len(prompts), "responses": len(responses), "ended": len(ended)}
    if isinstance(prompts, str) or isinstance(responses, str):
        raise ValueError(f"prompts and responses must be lists of str; got {prompts!r:.40} and {responses!r:.40}")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"prompts, responses and ended must have equal lengths; got {lengths}")
    return torch.tensor([*map(is_right, prompts, responses, ended)], dtype=torch.float32)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Word-level tokenizer of the digits, "+" and "=": otherwise that of `tiny_reviews`. 16 entries."""
    return tiny_reviews.build_tokenizer(WORDS)
