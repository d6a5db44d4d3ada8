"""A claim: a sentence about an estimator, the exact answer, what was obtained, and by how much they differ.

Each test hands its numbers to `Claims`, which records the line that is printed at the end of a run and written to
CLAIMS.md, and then asserts it. What is recorded is decided by the numbers alone, so a failing claim is printed too.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

PAGE = Path(__file__).with_name("CLAIMS.md")
HEADER = """# What is proved

Every line is a test in [tests/proof](.): a sentence, the exact answer, what the package's function gave, and how the
two compare. "Exact" means that no sample is drawn: an expectation is a sum over all that can happen, in worlds small
enough to list (`worlds.py`), in float64. Where the answer has many coordinates, all of them in all worlds are compared,
their number stands under *n*, and one of them is printed: the largest one, or for a bias the one that is furthest off.
"≤" is a tolerance that the largest error stays within; ">" is a bound that a bias or a gap must exceed in every
world, so that a bias that is claimed is shown.

This page is made by a command; the peers' section needs `pip install -e ".[test,peers]"`, and a topic whose tests do
not run keeps its section:

```
python -m pytest tests/proof --write-claims
```
"""


@dataclass(frozen=True)
class Claim:
    """One line: `error` must be at most `bound`, or with `above` more than it."""

    id: str
    text: str
    exact: str
    obtained: str
    error: float
    bound: float
    above: bool = False
    count: int = 1  # of numbers compared
    equations: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Written so that a NaN fails."""
        return self.error > self.bound if self.above else self.error <= self.bound

    def line(self) -> str:
        """For the terminal: the error as measured."""
        verdict = "ok  " if self.holds else "FAIL"
        sign = ">" if self.above else "<="
        return (
            f"{verdict} {self.id}: {self.text} | exact {self.exact} | obtained {self.obtained} "
            f"| {'differ by' if self.above else 'error'} {self.error:.1e} {sign} {self.bound:g} | n = {self.count}"
        )

    def row(self) -> str:
        """For the page: rounding noise is left out, so that the page is the same on every machine."""
        verdict = f"{self.error:.4g} > {self.bound:g}" if self.above else f"≤ {self.bound:g}"
        cells = self.text, ", ".join(self.equations), self.exact, self.obtained, verdict, f"{self.count:,}"
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + f" | `{self.id}` |"


class Claims:
    """The `claim` fixture: records what a test proves as a property of its report, and asserts it."""

    def __init__(self, node) -> None:
        self.node = node
        self.equations = tuple(sorted({label for marker in node.iter_markers("equation") for label in marker.args}))

    def equal(self, id: str, text: str, exact, obtained, tolerance: float = 1e-8, *, digits: int = 6) -> None:
        """The largest error over all worlds and coordinates is at most `tolerance`."""
        exact, obtained = (torch.cat([flat(x) for x in as_list(values)]) for values in (exact, obtained))
        assert exact.shape == obtained.shape, f"{exact.shape} exact numbers, {obtained.shape} obtained"
        shown = int(exact.abs().argmax())
        self.record(
            id,
            text,
            number(exact[shown], digits),
            number(obtained[shown], digits),
            float((exact - obtained).abs().max()),
            tolerance,
            count=exact.numel(),
        )

    def biased(self, id: str, text: str, exact, obtained, bound: float, *, digits: int = 6) -> None:
        """In each world some coordinate is off by more than `bound`; the world with the least bias is shown."""
        pairs = [(flat(e), flat(o)) for e, o in zip(as_list(exact), as_list(obtained), strict=True)]
        expected, got = min(pairs, key=lambda pair: float((pair[0] - pair[1]).abs().max()))
        shown = int((expected - got).abs().argmax())
        count = sum(e.numel() for e, _ in pairs)
        bias = float((expected - got).abs().max())
        self.record(
            id, text, number(expected[shown], digits), number(got[shown], digits), bias, bound, above=True, count=count
        )

    def decreasing(self, id: str, text: str, values: dict[str, float], gap: float) -> None:
        """The named values stand in falling order, neighbours at least `gap` apart."""
        numbers = [float(flat(value)) for value in values.values()]
        least = min(a - b for a, b in zip(numbers, numbers[1:], strict=False))
        order = " > ".join(number(value, 4) for value in numbers)
        self.record(id, text, " > ".join(values), order, least, gap, above=True, count=len(numbers))

    def record(self, id: str, text: str, exact: str, obtained: str, error: float, bound: float, **more) -> None:
        """Record a finished line and assert it."""
        made = Claim(id, text, exact, obtained, error, bound, equations=self.equations, **more)
        self.node.user_properties.append(("claim", asdict(made)))
        assert made.holds, made.line()


def as_list(values) -> list:
    """One entry for each world."""
    return list(values) if isinstance(values, list | tuple) else [values]


def flat(value) -> Tensor:
    """A tensor or number as a float64 vector."""
    return torch.as_tensor(value, dtype=torch.float64).detach().flatten()


def number(value, digits: int) -> str:
    """Fixed digits, and no minus before zero."""
    text = f"{float(value):.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def write_page(topics: dict[str, tuple[str, list[Claim]]]) -> None:
    """Write CLAIMS.md from {title: (explanation, claims)}; the sections of other topics stay as they are."""
    old = PAGE.read_text(encoding="utf-8").split("\n## ")[1:] if PAGE.exists() else []
    sections = {block.split("\n", 1)[0]: block.split("\n", 1)[1].strip() for block in old}
    for title, (explanation, claims) in topics.items():
        table = ["| claim | Eq. | exact | obtained | differ by | n | id |", "| --- " * 7 + "|"]
        sections[title] = "\n".join([explanation, "", *table, *(claim.row() for claim in claims)])
    body = "".join(f"\n## {title}\n\n{sections[title]}\n" for title in sorted(sections, key=topic_order))
    PAGE.write_text(HEADER + body, encoding="utf-8")


TOPICS = [
    "Preferences", "Bias", "Variance", "Spine", "PPO", "KL", "Whole trainer", "Leash", "Groups", "Group objective",
    "Offline", "Best-of-n as a policy", "Checkable rewards", "Another sampler", "Golden step", "Peers", "Engines",
]  # fmt: skip


def topic_order(title: str) -> tuple[int, str]:
    """In the order of the course; an unknown topic last."""
    return (TOPICS.index(title) if title in TOPICS else len(TOPICS), title)
