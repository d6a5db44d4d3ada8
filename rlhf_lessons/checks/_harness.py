"""How a learner's function is judged: run beside the package's own, then beside every wrong answer that is known.

A `Check` is a table: inputs, the package's function as the only truth, and wrong answers with a hint each. A learner's
function is right when it agrees with the truth on every input, in its values, dtype and shape and, where learning
needs them, in its gradients. When it does not, the known wrong answer that agrees with it lends its hint. What no known
answer explains is refused with the smallest failing input, shown in numbers.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from textwrap import fill

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rlhf_lessons import record
from rlhf_lessons.checks._outcomes import Case, Outcome, agree, as_tuple, right_in_value, unchanged
from rlhf_lessons.checks._wording import (
    CORRECT,
    describe_type,
    dtype_remark,
    error_hint,
    explain,
    type_problem,
    with_remark,
)

HERE = str(Path(__file__).parent)
NOT_ATTEMPTED = "not attempted yet"


@dataclass(frozen=True)
class Wrong:
    """A wrong answer that people really give."""

    name: str
    function: Callable
    hint: str


def with_epsilon(function: Callable[[float], Callable], why: str) -> tuple[Wrong, ...]:
    """The wrong answers that add a small number: `function` makes one of it, and `why` says what is to be done."""
    return tuple(
        Wrong(
            f"an epsilon of {eps:g}",
            function(eps),
            f"You add {eps:g} so that nothing is 0. That changes every result a little, and the rarest a lot: {why}",
        )
        for eps in (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12)
    )


class Hint(AssertionError):
    """What a learner is told. A notebook shows it alone, without the lines of the check that it came through."""

    def _render_traceback_(self) -> list[str]:
        return [*self.of_the_answer(), str(self)]

    def of_the_answer(self) -> list[str]:
        """Where in the learner's own code an exception came from that the hint is about."""
        if self.__cause__ is None:
            return []
        frames = traceback.extract_tb(self.__cause__.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith((HERE, torch.__path__[0]))]
        return [f"in {frame.name}, line {frame.lineno}:    {frame.line}" for frame in own[-1:]]


@dataclass(frozen=True)
class Check:
    """One exercise: calling it prints "not attempted yet" or "correct", or raises AssertionError, a `Hint`."""

    name: str
    reference: Callable
    cases: Callable[[], list[Case]]  # the smallest first
    wrong: tuple[Wrong, ...]
    gradient_of: tuple[str, ...] = ()  # arguments through which the gradient must flow as in the reference
    constants: tuple[str, ...] = ()  # arguments into which none may flow
    outputs: tuple[str, ...] = ("result",)
    adapt: Callable[[object], Callable] = lambda answer: answer  # what the learner wrote -> a function of the inputs
    explains: str = ""  # of a hunt: what the fault did, why nobody noticed, and what would have shown it

    def __call__(self, answer: object) -> None:
        """Judge the learner's function."""
        if not callable(answer):
            raise Hint(
                f"checks.{self.name} wants the function itself, not what it returns: leave out the (...) after its "
                f"name. It got {describe_type(answer)}."
            )
        report(self.name, self.judge(self.adapt(answer)), self.explains)

    def judge(self, function: Callable) -> str:
        """NOT_ATTEMPTED or CORRECT; AssertionError otherwise."""
        cases = self.cases()
        truths = outcomes(self, self.reference)
        answers = []
        for case in cases:
            answers.append(self.observe(function, case))
            if not answers[0].attempted:
                return NOT_ATTEMPTED
        failing = [i for i, (a, t) in enumerate(zip(answers, truths, strict=True)) if not agree(a, t)]
        if not failing:
            return with_remark(answers[0].remark)
        first = failing[0]
        known = self.known_hint(answers, failing)
        if known is None and all(map(right_in_value, answers, truths)):
            return with_remark(answers[0].remark or dtype_remark(answers[first], truths[first]))
        where = f"It is right on {len(cases) - len(failing)} of {len(cases)} inputs; the first wrong one: "
        hint = known or explain(
            cases[first], answers[first], truths[first], outputs=self.outputs, constants=self.constants,
            where=f"{where}{cases[first].says}.",
        )  # fmt: skip
        raise Hint(hint) from answers[first].error

    def known_hint(self, answers: list[Outcome], failing: list[int]) -> str | None:
        """The hint of the known wrong answer closest to this one.

        It must do the same up to and on the first failing input, and on half of the failing ones; where the answer is
        yes or no, on all inputs, since two such answers agree too easily. Of several, the one that agrees most often.
        """
        yes_or_no = any(x.dtype == torch.bool for x in answers[failing[0]].results)
        needed = len(answers) if yes_or_no else failing[0] + 1
        # Whether arguments are held constant is a question of its own: a known mistake is known with and without it.
        for seen in (lambda outcome: outcome, self.without_constants) if self.constants else (lambda outcome: outcome,):
            best, most = None, 0
            for wrong in self.wrong:
                same_here = [agree(seen(w), seen(a)) for w, a in zip(wrong_outcomes(self, wrong), answers, strict=True)]
                if not all(same_here[:needed]) or 2 * sum(same_here[i] for i in failing) < len(failing):
                    continue
                if sum(same_here) > most:
                    best, most = wrong.hint, sum(same_here)
            if best is not None:
                return best
        return None

    def without_constants(self, outcome: Outcome) -> Outcome:
        """The outcome less the gradients that flow into what is to be held constant."""
        kept = {name: gradient for name, gradient in outcome.gradients.items() if name not in self.constants}
        return replace(outcome, gradients=kept)

    def observe(self, function: Callable, case: Case) -> Outcome:
        """Run it on fresh copies: once plainly, and once more with gradients where they matter."""
        inputs = {name: copy_of(value) for name, value in case.inputs.items()}
        try:
            with NoNumpy(), torch.random.fork_rng(devices=[]):
                returned = function(*inputs.values(), **case.options)
        except Exception as error:  # whatever the learner's code raises is to be reported, not passed on
            return Outcome(problem=error_hint(error), error=error)
        if returned is NotImplemented:
            return Outcome(problem="It returns NotImplemented for this input, but not for others.", attempted=False)
        returned, remark = self.as_tensors(returned)
        problem = type_problem(returned, self.outputs)
        if problem:
            return Outcome(problem=problem)
        results = tuple(x.detach().clone() for x in as_tuple(returned))
        changed = [name for name, value in inputs.items() if not unchanged(value, case.inputs[name])]
        if changed:
            return Outcome(
                problem=f"Your function changes its argument {changed[0]} in place: whoever called it now holds other "
                "numbers. Work on a copy: .clone(), or an expression that makes a new tensor."
            )
        if not self.gradient_of:
            return Outcome(results, remark=remark)
        return replace(self.observe_gradients(function, case, results), remark=remark)

    def as_tensors(self, returned: object) -> tuple[object, str]:
        """A list of results as a tuple, a single number as a tensor, with a remark; anything else as it is."""
        if len(self.outputs) > 1 and isinstance(returned, list) and all(isinstance(x, Tensor) for x in returned):
            return tuple(returned), "a tuple is usual where there are several results, and yours is a list"
        number = isinstance(returned, bool | int | float) or (
            type(returned).__module__ == "numpy" and returned.ndim == 0
        )
        if number and not self.gradient_of:  # else it has been cut off from the graph, and that is to be said
            return torch.as_tensor(returned), f"a tensor is usual, and yours is {describe_type(returned)}"
        return returned, ""

    def observe_gradients(self, function: Callable, case: Case, results: tuple[Tensor, ...]) -> Outcome:
        """Gradients of a fixed weighted sum of the results, by each argument that the check names."""
        leaves = {name: copy_of(value) for name, value in case.inputs.items()}
        watched = [name for name in self.gradient_of + self.constants if isinstance(leaves[name], Tensor)]
        for name in watched:
            leaves[name].requires_grad_(True)
        try:
            with NoNumpy(), torch.random.fork_rng(devices=[]):
                returned, _ = self.as_tensors(function(*leaves.values(), **case.options))
            outputs = [x for x in as_tuple(returned) if x.requires_grad]
            if not outputs:
                return Outcome(
                    results,
                    problem="The numbers are detached from the graph: no gradient comes back, so nothing would learn. "
                    "Look for .detach(), .item(), torch.no_grad() or torch.tensor(...) on the way to the result.",
                )
            total = sum((x * cotangent(x)).sum() for x in outputs)
            grads = torch.autograd.grad(total, [leaves[name] for name in watched], allow_unused=True)
        except Exception as error:
            return Outcome(problem=error_hint(error), error=error)
        zeros = (torch.zeros_like(leaves[name]) for name in watched)
        return Outcome(results, {n: z if g is None else g for n, g, z in zip(watched, grads, zeros, strict=True)})


def so_far(open_ones: Sequence[str]) -> str:
    """The verdict on answers of which all that are given are right; those that are not given are named."""
    return f"right so far; {NOT_ATTEMPTED}: {', '.join(open_ones)}" if open_ones else CORRECT


def report(name: str, verdict: str, explains: str = "") -> None:
    """Print what came of the check `name`, and what there is to know once it is solved: the one place for it."""
    print(verdict)
    if not verdict.startswith(CORRECT):
        return
    record.solved(name)
    if explains:
        print("", *(fill(paragraph, width=100) for paragraph in explains.splitlines()), sep="\n")


@cache
def outcomes(check: Check, function: Callable) -> list[Outcome]:
    """What a function does with every input of a check."""
    return [check.observe(function, case) for case in check.cases()]


@cache
def wrong_outcomes(check: Check, wrong: Wrong) -> list[Outcome]:
    """What a known wrong answer does with every input of a check."""
    return outcomes(check, check.adapt(wrong.function))


class NoNumpy(TorchFunctionMode):
    """Inside, turning a tensor into a numpy array raises: it would cut the graph and leave the device."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("numpy")
        return func(*args, **(kwargs or {}))


def copy_of(value: object) -> object:
    """A tensor with numbers of its own, laid out in memory as before; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def cotangent(x: Tensor) -> Tensor:
    """Fixed weights of x's shape, no two alike: the gradient then sees every entry of x by itself."""
    return torch.linspace(0.5, 1.5, max(x.numel(), 2), dtype=x.dtype)[: x.numel()].view(x.shape)


@dataclass(frozen=True)
class Misconception:
    """A wrong answer to a question without code: `applies` recognises it."""

    name: str
    applies: Callable[..., bool]
    hint: str


def first_misconception(misconceptions: tuple[Misconception, ...], *answer: object) -> None:
    """Raise AssertionError with the hint of the first misconception that the answer shows, if any."""
    for misconception in misconceptions:
        if misconception.applies(*answer):
            raise Hint(misconception.hint)
