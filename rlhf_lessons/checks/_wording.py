"""What a learner is told of a wrong answer that no known misconception explains, and what is shown of it in numbers."""

import math

import torch
from torch import Tensor

from rlhf_lessons.checks._outcomes import Case, Outcome, same

CORRECT = "correct"


class Refused(Exception):
    """Raised by a check's own adapter: the answer cannot be tried, and the message says why."""


def with_remark(remark: str) -> str:
    """What is printed of a right answer."""
    return f"{CORRECT}; {remark}" if remark else CORRECT


def dtype_remark(answer: Outcome, truth: Outcome) -> str:
    """A remark on the first result whose dtype is not that of the inputs."""
    dtypes = ((x.dtype, y.dtype) for x, y in zip(answer.results, truth.results, strict=True))
    got, usual = next((got, usual) for got, usual in dtypes if got != usual)
    return f"{usual} is usual here, and yours is {got}: torch.zeros_like(x) or x.new_zeros(...) takes over the input's"


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


def explain(
    case: Case, answer: Outcome, truth: Outcome, *, outputs: tuple[str, ...], constants: tuple[str, ...], where: str
) -> str:
    """The hint for an answer that no known misconception explains."""
    if answer.problem:
        return f"{answer.problem} {where}"
    for name, got, expected in zip(outputs, answer.results, truth.results, strict=True):
        if not same(got, expected):
            return f"{difference(name, got, expected, case)} {where}\n{show(case)}\n{both(name, got, expected)}"
    for name, got in answer.gradients.items():
        if not same(got, truth.gradients[name]):
            return f"{gradient_difference(name, got, constants)} {where}\n{show(case)}\n" + both(
                f"gradient by {name}", got, truth.gradients[name]
            )
    raise RuntimeError("explain was asked about an answer that is right")


def gradient_difference(name: str, got: Tensor, constants: tuple[str, ...]) -> str:
    """A sentence on a wrong gradient under right values."""
    if name in constants:
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
            f"{name}: right to a few digits only. Is a small number added, as in + 1e-8, or a step computed in "
            f"lower precision than {got.dtype}? (Also torch.where of two Python numbers makes float32.)"
        )
    factor = constant_factor(got, expected)
    if factor == -1:
        return f"{name}: the sign of everything is flipped."
    if factor is not None:
        shown = next(text for digits in (3, 6, 9) if (text := f"{factor:.{digits}g}") != "1" or digits == 9)
        return f"{name}: {shown} times what it should be, everywhere."
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
