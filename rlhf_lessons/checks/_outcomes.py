"""What a function did with an input, and when two functions did the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
class Outcome:
    """What a function did with one input."""

    results: tuple[Tensor, ...] = ()
    gradients: dict[str, Tensor] = field(default_factory=dict)
    problem: str = ""  # a hint: the answer cannot be compared with the truth
    remark: str = ""  # what is unusual about a return value that can be compared all the same
    error: Exception | None = None
    attempted: bool = True


def as_tuple(returned: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One tensor or several, as a tuple."""
    return (returned,) if isinstance(returned, Tensor) else tuple(returned)


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


def same(x: Tensor, y: Tensor, **tolerances: float) -> bool:
    """Whether shape, dtype and numbers agree; NaN agrees with NaN."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.allclose(x, y, equal_nan=True, **(tolerances or tolerance_of(x)))


def tolerance_of(x: Tensor) -> dict[str, float]:
    """How closely numbers of this dtype must agree."""
    return TOLERANCES.get(x.dtype, dict(rtol=0, atol=0))


def unchanged(value: object, before: object) -> bool:
    """Whether an argument still holds the numbers it came with."""
    return not isinstance(before, Tensor) or same(value, before, rtol=0, atol=0)
