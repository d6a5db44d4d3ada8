"""How a learner's function is judged: run beside the package's own, then beside every wrong answer that is known.

A `Check` is a table: inputs, the package's function as the only truth, and wrong answers with a hint each. A learner's
function is right when it agrees with the truth on every input, in its values, dtype and shape and, where learning
needs them, in its gradients. When it does not, the known wrong answer that agrees with it lends its hint. What no known
answer explains is refused with the smallest failing input, shown in numbers.
"""

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HERE = str(Path(__file__).parent)
NOT_ATTEMPTED = "not attempted yet"
CORRECT = "correct"
TOLERANCES = {
    torch.float64: dict(rtol=1e-10, atol=1e-12),
    torch.float32: dict(rtol=1e-4, atol=1e-5),
    torch.bfloat16: dict(rtol=2e-2, atol=1e-2),
}


@dataclass(frozen=True)
class Case:
    """One input. `says` describes it to the learner."""

    says: str
    inputs: dict[str, object]  # positional arguments by name, in order
    options: dict[str, object] = field(default_factory=dict)  # keyword arguments


@dataclass(frozen=True)
class Wrong:
    """A wrong answer that people really give."""

    name: str
    function: Callable
    hint: str


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


class Refused(Exception):
    """Raised by a check's own adapter: the answer cannot be tried, and the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What a function did with one input."""

    results: tuple[Tensor, ...] = ()
    gradients: dict[str, Tensor] = field(default_factory=dict)
    problem: str = ""  # a hint: the answer cannot be compared with the truth
    remark: str = ""  # what is unusual about a return value that can be compared all the same
    error: Exception | None = None
    attempted: bool = True


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

    def __call__(self, answer: object) -> None:
        """Judge the learner's function."""
        if not callable(answer):
            raise Hint(
                f"checks.{self.name} wants the function itself, not what it returns: leave out the (...) after its "
                f"name. It got {describe_type(answer)}."
            )
        print(self.judge(self.adapt(answer)))

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
        hint = known or explain(
            self, cases[first], answers[first], truths[first], right=len(cases) - len(failing), total=len(cases)
        )
        raise Hint(hint) from answers[first].error

    def known_hint(self, answers: list[Outcome], failing: list[int]) -> str | None:
        """The hint of the known wrong answer closest to this one.

        It must do the same up to and on the first failing input, and on half of the failing ones; where the answer is
        yes or no, on all inputs, since two such answers agree too easily. Of several, the one that agrees most often.
        """
        yes_or_no = any(x.dtype == torch.bool for x in answers[failing[0]].results)
        best, most = None, 0
        for wrong in self.wrong:
            same_here = list(map(agree, wrong_outcomes(self, wrong), answers))
            needed = len(answers) if yes_or_no else failing[0] + 1
            if not all(same_here[:needed]) or 2 * sum(same_here[i] for i in failing) < len(failing):
                continue
            if sum(same_here) > most:
                best, most = wrong.hint, sum(same_here)
        return best

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


def as_tuple(returned: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One tensor or several, as a tuple."""
    return (returned,) if isinstance(returned, Tensor) else tuple(returned)


def right_in_value(answer: Outcome, truth: Outcome) -> bool:
    """Whether the numbers agree as far as the coarser of the dtypes can tell, whatever the dtypes are."""
    if answer.problem or len(answer.results) != len(truth.results) or answer.gradients.keys() != truth.gradients.keys():
        return False
    pairs = list(zip(answer.results, truth.results, strict=True))
    coarsest = max((tolerance_of(x) for pair in pairs for x in pair), key=lambda tolerance: tolerance["rtol"])
    pairs += [(answer.gradients[name], gradient) for name, gradient in truth.gradients.items()]
    return all(
        x.shape == y.shape
        and not (y.dtype == torch.bool and x.is_floating_point())
        and torch.allclose(x.to(y.dtype), y, equal_nan=True, **coarsest)
        for x, y in pairs
    )


def dtype_remark(answer: Outcome, truth: Outcome) -> str:
    """A remark on the first result whose dtype is not that of the inputs."""
    dtypes = ((x.dtype, y.dtype) for x, y in zip(answer.results, truth.results, strict=True))
    got, usual = next((got, usual) for got, usual in dtypes if got != usual)
    return f"{usual} is usual here, and yours is {got}: torch.zeros_like(x) or x.new_zeros(...) takes over the input's"


def with_remark(remark: str) -> str:
    """What is printed of a right answer."""
    return f"{CORRECT}; {remark}" if remark else CORRECT


def copy_of(value: object) -> object:
    """A tensor with numbers of its own, laid out in memory as before; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def cotangent(x: Tensor) -> Tensor:
    """Fixed weights of x's shape, no two alike: the gradient then sees every entry of x by itself."""
    return torch.linspace(0.5, 1.5, max(x.numel(), 2), dtype=x.dtype)[: x.numel()].view(x.shape)


def unchanged(value: object, before: object) -> bool:
    """Whether an argument still holds the numbers it came with."""
    return not isinstance(before, Tensor) or same(value, before, rtol=0, atol=0)


def same(x: Tensor, y: Tensor, **tolerances: float) -> bool:
    """Whether shape, dtype and numbers agree; NaN agrees with NaN."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.allclose(x, y, equal_nan=True, **(tolerances or tolerance_of(x)))


def tolerance_of(x: Tensor) -> dict[str, float]:
    """How closely numbers of this dtype must agree."""
    return TOLERANCES.get(x.dtype, dict(rtol=0, atol=0))


def agree(one: Outcome, other: Outcome) -> bool:
    """Whether two functions did the same with an input: values, gradients, or the same problem."""
    if one.problem != other.problem or len(one.results) != len(other.results):
        return False
    if not all(map(same, one.results, other.results)):
        return False
    shared = one.gradients.keys() & other.gradients.keys()
    return len(one.gradients) == len(other.gradients) and all(
        same(one.gradients[name], other.gradients[name]) for name in shared
    )


def describe_type(value: object) -> str:
    """What a value is, for a message: "a numpy array", "a float", ..."""
    if type(value).__module__ == "numpy":
        return "a numpy array" if type(value).__name__ == "ndarray" else "a numpy number"
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def type_problem(returned: object, outputs: tuple[str, ...]) -> str:
    """The hint for a return value that is not made of tensors, or not of as many as expected; "" if it is."""
    if returned is None:
        return "Your function returns None: is its last line a return?"
    if len(outputs) == 1:
        if isinstance(returned, Tensor):
            return ""
        return f"Your function returns {describe_type(returned)}; a torch.Tensor is wanted."
    wanted = f"a tuple ({', '.join(outputs)}) of tensors is wanted"
    if not isinstance(returned, tuple):
        return f"Your function returns {describe_type(returned)}; {wanted}."
    if len(returned) != len(outputs) or not all(isinstance(x, Tensor) for x in returned):
        return f"Your function returns ({', '.join(describe_type(x) for x in returned)}); {wanted}."
    return ""


def error_hint(error: Exception) -> str:
    """What to say of an exception that the learner's code raised."""
    if isinstance(error, Refused):
        return str(error)
    text = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    if isinstance(error, TypeError) and text == "numpy":
        return (
            "Your function turns a tensor into a numpy array. That cuts it off from the gradient and from the GPU; "
            "torch has the same operation."
        )
    if "leaf Variable that requires grad" in text or "is at version" in text:
        return f"Your function changes a tensor in place that the gradient still needs: work on a copy. ({text[:160]})"
    advice = ""
    if "view size is not compatible" in text:
        advice = " The input is not contiguous in memory: .reshape takes it, .view does not."
    return f"Your function raised {type(error).__name__}: {text[:200]}.{advice}"


def explain(check: Check, case: Case, answer: Outcome, truth: Outcome, *, right: int, total: int) -> str:
    """The hint for an answer that no known misconception explains."""
    where = f"It is right on {right} of {total} inputs; the first wrong one: {case.says}."
    if answer.problem:
        return f"{answer.problem} {where}"
    for name, got, expected in zip(check.outputs, answer.results, truth.results, strict=True):
        if not same(got, expected):
            return f"{difference(name, got, expected, case)} {where}\n{show(case)}\n{both(name, got, expected)}"
    for name, got in answer.gradients.items():
        if not same(got, truth.gradients[name]):
            return f"{gradient_difference(check, name, got)} {where}\n{show(case)}\n" + both(
                f"gradient by {name}", got, truth.gradients[name]
            )
    raise RuntimeError("explain was asked about an answer that is right")


def gradient_difference(check: Check, name: str, got: Tensor) -> str:
    """A sentence on a wrong gradient under right values."""
    if name in check.constants:
        return f"The value is right, but gradient flows into {name}, which is to be held constant: .detach() it."
    if got.isnan().any():
        return (
            f"The value is right, but its gradient by {name} has NaN in it: what is masked must be replaced before it "
            "is used, not after."
        )
    return f"The value is right, but its gradient by {name} is not: is a part of the formula detached?"


def difference(name: str, got: Tensor, expected: Tensor, case: Case) -> str:
    """A sentence on how a result differs, as far as can be told without knowing the mistake."""
    if got.shape != expected.shape:
        return f"{name}: wrong shape. Expected {tuple(expected.shape)}, got {tuple(got.shape)}."
    if got.dtype != expected.dtype:
        return (
            f"{name}: wrong dtype. Expected {expected.dtype}, got {got.dtype}. A new tensor takes its dtype "
            "from an input with torch.zeros_like(x), x.new_zeros(...) or dtype=x.dtype."
        )
    mask = case.inputs.get("mask")
    masked = isinstance(mask, Tensor) and not mask.all()
    if got.isnan().any() and not expected.isnan().any():
        reason = " from under the padding: 0·NaN is NaN, so use torch.where(mask, x, 0) before" if masked else ""
        return f"{name}: there is NaN in it{reason}."
    if masked and got.shape == mask.shape and same(torch.where(mask, got, 0), torch.where(mask, expected, 0)):
        return f"{name}: right on the real tokens, but it must be 0 where mask is False."
    if same(got, expected, rtol=1e-4, atol=1e-5):
        return (
            f"{name}: right to a few digits only. Is a step computed in lower precision than {got.dtype}? (Also "
            "torch.where of two Python numbers makes float32.)"
        )
    factor = constant_factor(got, expected)
    if factor == -1:
        return f"{name}: the sign of everything is flipped."
    if factor is not None:
        return f"{name}: {factor:.3g} times what it should be, everywhere."
    return f"{name}: wrong, in a way that this check has no name for."


def constant_factor(got: Tensor, expected: Tensor) -> float | None:
    """c where got = c·expected throughout, else None."""
    if got.numel() == 0 or not expected.dtype.is_floating_point or not expected.any():
        return None
    where = expected.abs().argmax()
    factor = round((got.flatten()[where] / expected.flatten()[where]).item(), 6)
    if got.numel() == 1 and factor != -1:  # one number is always a multiple of another
        return None
    return factor if math.isfinite(factor) and factor and same(got, factor * expected, rtol=1e-4, atol=1e-6) else None


def show(case: Case) -> str:
    """The input in numbers."""
    return "\n".join(f"    {name} = {numbers(value)}" for name, value in (case.inputs | case.options).items())


def both(name: str, got: Tensor, expected: Tensor) -> str:
    """A result beside the truth, in numbers."""
    return f"    {name}: expected {numbers(expected)}\n    {' ' * len(name)}       got {numbers(got)}"


def numbers(value: object) -> str:
    """A value in at most 400 characters, its numbers to 4 digits."""
    if not isinstance(value, Tensor):
        return repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    rounded = value.tolist() if not value.dtype.is_floating_point else round_nested(value.double().tolist())
    text = str(rounded)
    return text if len(text) <= 400 else f"{text[:400]} ..., a tensor of shape {tuple(value.shape)}"


def round_nested(x: list | float) -> list | float:
    """Nested lists of floats, to 4 digits."""
    return [round_nested(y) for y in x] if isinstance(x, list) else float(f"{x:.4g}")


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
