"""The checks of lesson 14: right answers pass however they are written, wrong ones get the hint that fits them."""

import inspect
import itertools
import math

import pytest
import torch
from test_checks import hint_of, known
from test_variants import CORRECT, REFUSED, typo, verdict_of

from rlhf_lessons import checks, exact, scoring

# --- Right answers, written in other ways ------------------------------------------------------


def loop_best_of_n(log_probs, rewards, n):
    probs, law = log_probs.exp(), []
    for y in range(len(probs)):
        upto = sum(probs[j] for j in range(len(probs)) if rewards[j] <= rewards[y])
        under = sum((probs[j] for j in range(len(probs)) if rewards[j] < rewards[y]), start=0 * probs[0])
        law.append(log_probs[y] + ((upto**n - under**n) / (upto - under)).log())
    return torch.stack(law)


def binomial_best_of_n(log_probs, rewards, n):
    """How many of the n reach the level, none being above it; one of those is y in proportion."""
    probs = log_probs.exp()
    level = (rewards[:, None] == rewards).double() @ probs
    under = (rewards < rewards[:, None]).double() @ probs
    chance = sum(math.comb(n, k) * level**k * under ** (n - k) for k in range(1, n + 1))
    return (probs / level * chance).log()


def loop_mean_of_best(scores, values, n):
    rows = []
    for s, v in zip(scores, values, strict=True):
        kept = [v[max(picked, key=lambda i, s=s: s[i])] for picked in itertools.combinations(range(len(s)), n)]
        rows.append(sum(kept) / len(kept))
    return torch.stack(rows)


def repaired_mean_of_best(scores, values, n):
    m = scores.shape[1]
    ways = torch.tensor([math.comb(j, n) for j in range(m + 1)]).double()
    upto = ways / math.comb(m, n)
    return values.gather(1, scores.argsort(dim=1)) @ upto.diff()


RIGHT = {
    "best_of_n": [exact.best_of_n, loop_best_of_n, binomial_best_of_n],
    "same_sample_twice": [scoring.best_of_mean, loop_mean_of_best, repaired_mean_of_best],
}


# --- The colleague's function of the hunt, as the lesson shows it --------------------------------


def mean_of_best(scores, values, n):
    """The value of the best of n, from m samples: (B, m) -> (B,)."""
    m = scores.shape[1]
    share = torch.arange(m + 1).double() / m
    upto = share**n
    return values.gather(1, scores.argsort(dim=1)) @ upto.diff()


def test_the_hunted_function_gets_the_hint_of_its_bug():
    check = checks.same_sample_twice
    assert hint_of(check, mean_of_best) == known(check, "drawn with replacement")
    lines = inspect.getsource(mean_of_best).splitlines()
    assert len(lines) <= 15 and max(map(len, lines)) <= 79


# --- As they are typed ---------------------------------------------------------------------------

LAW = """
def my_best_of_n(log_probs, rewards, n):
    p = log_probs.exp()
    F = ((rewards <= rewards[:, None]) * p).sum(1)
    F_below = ((rewards < rewards[:, None]) * p).sum(1)
    return log_probs + torch.log((F ** n - F_below ** n) / (F - F_below))
"""
SORTED = """
def my_best_of_n(log_probs, rewards, n):
    order = torch.argsort(rewards, stable=True)
    F = torch.cumsum(log_probs[order].exp(), 0)
    below = torch.cat([torch.zeros(1, dtype=F.dtype), F[:-1]])
    law = torch.zeros_like(F)
    law[order] = F ** n - below ** n
    return law.log()
"""
MEAN = """
def my_mean(scores, values, n):
    m = scores.shape[1]
    upto = torch.tensor([math.comb(j, n) / math.comb(m, n) for j in range(m + 1)], dtype=torch.float64)
    return values.gather(1, scores.argsort(dim=1)) @ upto.diff()
"""
VARIANTS = {
    "best_of_n": [
        (CORRECT, LAW),
        (CORRECT, typo(LAW, "F_below = ((rewards < rewards[:, None]) * p).sum(1) => "
                       "F_below = F - ((rewards == rewards[:, None]) * p).sum(1)")),
        ("equal rewards in the order of the list", SORTED),
        ("each of equals gets the whole level", typo(LAW, "log_probs + torch.log((F ** n - F_below ** n) / "
                                                     "(F - F_below)) => torch.log(F ** n - F_below ** n)")),
        ("the density", typo(LAW, "(F ** n - F_below ** n) / (F - F_below) => n * F ** (n - 1)")),
        ("the density from below", typo(LAW, "(F ** n - F_below ** n) / (F - F_below) => n * F_below ** (n - 1)")),
        ("the density, made to sum to 1", "lambda lp, r, n: (lp + (n - 1) * torch.log((r <= r[:, None]).double() "
                                          "@ lp.exp())).log_softmax(0)"),
        ("y among its own rivals", "lambda lp, r, n: (lp + n * torch.log((r <= r[:, None]).double() @ lp.exp()))"
                                   ".log_softmax(0)"),
        ("the chance to be at most r", "lambda lp, r, n: n * torch.log((r <= r[:, None]).double() @ lp.exp())"),
        ("the lowest kept", typo(LAW, "<= => >=", "< rewards[ => > rewards[")),
        ("the factor alone", typo(LAW, "return log_probs + => return")),
        ("probabilities", typo(LAW, "(F - F_below)) => (F - F_below)).exp() * p", "log_probs + torch.log => torch.log",
                               ".exp() * p => * p", "torch.log( => (")),
        ("a tilt by the reward", "lambda lp, r, n: torch.log_softmax(lp + (n - 1) * r, 0)"),
        ("log-probabilities in place of probabilities", typo(LAW, "p = log_probs.exp() => log_probs = p = "
                                                             "log_probs.softmax(0)", "* p) => * p.softmax(0))",
                                                             "return log_probs + => return p.log_softmax(0) +")),
        ("n + 1 samples", typo(LAW, "** n => ** (n + 1)")),
        (REFUSED, typo(LAW, "F_below ** n) => F_below ** (n - 1))")),
        (REFUSED, "lambda lp, r, n: lp + math.log(n)"),
    ],
    "same_sample_twice": [
        (CORRECT, MEAN),
        (CORRECT, typo(MEAN, "dtype=torch.float64) => dtype=torch.float64).view(-1)")),
        ("drawn with replacement", typo(MEAN, "math.comb(j, n) / math.comb(m, n) => (j / m) ** n")),
        ("at most the j-th", typo(MEAN, "upto.diff() => upto[1:]")),
        ("one rank too low", typo(MEAN, "upto.diff() => upto[:-1]")),
        ("with the density", typo(MEAN, "math.comb(j, n) / math.comb(m, n) => n / m * (j / m) ** (n - 1)",
                                  "upto.diff() => upto[1:]")),
        ("the best values", typo(MEAN, "scores.argsort => values.argsort")),
        ("the lowest kept", typo(MEAN, "scores.argsort(dim=1) => scores.argsort(dim=1, descending=True)")),
        ("the score of the best", typo(MEAN, "values.gather => scores.gather")),
        ("averaged over the prompts", typo(MEAN, "upto.diff() => upto.diff() / len(scores)",
                                           "return values => return (values", " / len(scores) => ).mean()")),
        (REFUSED, typo(MEAN, "return values => return -values")),
    ],
}  # fmt: skip
TYPED = [(name, verdict, source) for name, rows in VARIANTS.items() for verdict, source in rows]


@pytest.mark.parametrize(("name", "verdict", "source"), TYPED, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(TYPED)])
def test_an_answer_gets_its_verdict(name, verdict, source):
    assert verdict_of(getattr(checks, name), source) == verdict
