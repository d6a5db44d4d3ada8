"""What notebooks print: a function's source, a response token by token, samples side by side, progress.

Everything is plain text that comes out the same on every machine: no object addresses, no times, no colours. The
command line shares the progress and `say`.
"""

import ast
import inspect
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Sequence

from torch import Tensor
from tqdm import tqdm

REFRESH_SECONDS = 0.5  # between two updates of a notebook's progress line


# ---- source ----------------------------------------------------------------------------


def show_source(function: Callable, *, docstring: bool = False) -> None:
    """Print the source of a function or class, each docstring cut to its first line unless `docstring`.

    Raises ValueError for what has no Python source.
    """
    print(source_of(function, docstring=docstring))


def source_of(function: Callable, *, docstring: bool = False) -> str:
    """The text that `show_source` prints."""
    try:
        source = textwrap.dedent(inspect.getsource(function)).rstrip()
    except (TypeError, OSError) as error:
        raise ValueError(f"function must be a Python function or class; got {type(function).__name__}") from error
    return source if docstring else with_short_docstrings(source)


def with_short_docstrings(source: str) -> str:
    """Source code in which every docstring is its first line alone."""
    lines = source.splitlines()
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented) and ast.get_docstring(node)]
    for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):  # from below, so that line numbers stay true
        start, end = node.body[0].lineno - 1, node.body[0].end_lineno
        if end > start + 1:
            first = lines[start].rstrip()
            opens_alone = first.strip() in ('"""', 'r"""')  # the text begins on the next line
            lines[start:end] = [first + (lines[start + 1].strip() if opens_alone else "") + '"""']
    return "\n".join(lines)


# ---- tables of text --------------------------------------------------------------------


def width_of(text: str) -> int:
    """Columns that a text takes: combining marks none, wide East Asian characters two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def visible(token: str) -> str:
    """A token on one line, in characters that fonts have: a line break as ↵, other controls by their codes."""
    return "".join("↵" if x == "\n" else x if x.isprintable() else repr(x)[1:-1] for x in token)


def padded(text: str, width: int, *, right: bool = False) -> str:
    blanks = " " * (width - width_of(text))
    return blanks + text if right else text + blanks


def aligned(rows: Sequence[Sequence[str]], *, numbers_from: int | None = None) -> str:
    """Rows as lines with aligned columns, two blanks apart; columns from `numbers_from` on are set to the right."""
    widths = [max(map(width_of, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            padded(cell, width, right=numbers_from is not None and i >= numbers_from)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def token_table(tokens: Sequence[str], quantities: dict[str, Sequence | Tensor], *, digits: int = 2) -> None:
    """Print one line per token with its position and quantities: quantities[name] (T,).

    Raises ValueError when a quantity has not one number per token.
    """
    if not tokens:
        raise ValueError("tokens must hold at least one; got none")
    columns = []
    for name, values in quantities.items():
        values = values.tolist() if isinstance(values, Tensor) else list(values)
        if len(values) != len(tokens):
            raise ValueError(f"quantities[{name!r}] must have {len(tokens)} numbers, one per token; got {len(values)}")
        columns.append([number(value, digits) for value in values])
    rows = [[str(t), visible(token), *cells] for t, (token, *cells) in enumerate(zip(tokens, *columns, strict=True))]
    print(aligned([["t", "token", *quantities], *rows], numbers_from=2))


def number(value: float, digits: int) -> str:
    """A number with `digits` decimals, zero without a sign; a whole number and True or False as they are."""
    if isinstance(value, int):  # bool too
        return str(value)
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def compare_texts(
    prompts: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    *,
    scores: dict[str, tuple[Sequence | Tensor, Sequence | Tensor]] | None = None,
    width: int = 36,
) -> None:
    """Print responses to the same prompts side by side, before and after training, with their scores beneath.

    scores[name] = (of `before`, of `after`), each (N,). Raises ValueError for unequal lengths.
    """
    pairs = {name: (list(map(float, a)), list(map(float, b))) for name, (a, b) in (scores or {}).items()}
    counted = [("before", before), ("after", after)]
    counted += [(f"scores[{name!r}]", side) for name, sides in pairs.items() for side in sides]
    for name, values in counted:
        if len(values) != len(prompts):
            raise ValueError(f"{name} must have {len(prompts)} entries, one per prompt; got {len(values)}")
    print(f"{'before':<{width}} | after")
    for i, prompt in enumerate(prompts):
        print(f"{'-' * width}-+-{'-' * width}")
        print(f"> {prompt}")
        print_beside(textwrap.wrap(before[i], width), textwrap.wrap(after[i], width), width)
        columns = ["  ".join(f"{name} {number(s[k][i], 2)}" for name, s in pairs.items()) for k in (0, 1)]
        if pairs:
            print_beside([f"[{columns[0]}]"], [f"[{columns[1]}]"], width)


def print_beside(left: list[str], right: list[str], width: int) -> None:
    for i in range(max(len(left), len(right), 1)):
        a, b = (side[i] if i < len(side) else "" for side in (left, right))
        print(f"{padded(a, width)} | {b}".rstrip())


# ---- progress --------------------------------------------------------------------------


def say(text: str) -> None:
    """One line to the user on stderr, beside the progress bars."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Shows how far long work is, with its metrics: a callback, as `on_step` of `PPOTrainer.train`.

    In a notebook it is one line of text that replaces itself and at its end leaves "50/50 iterations  reward 2.1  KL
    6.4", without a time, so that a notebook's output does not depend on the machine. On a terminal it is a bar with the
    time left; elsewhere, as in a pipe, a line every tenth of the way: "PPO 5/50  reward 0.31  KL 0.02". Both are on
    stderr. label: what the work is; without one its unit is named. show: label -> name of a metric.
    """

    def __init__(
        self, total: int, *, label: str = "", unit: str = "iterations", show: dict[str, str] | None = None
    ) -> None:
        if total < 1:
            raise ValueError(f"total must be at least 1; got {total}")
        self.total, self.label, self.unit = total, label, unit
        self.show = {"reward": "score", "KL": "kl"} if show is None else show
        self.step, self.said, self.metrics = 0, 0, {}
        self.started = self.refreshed = time.monotonic()
        self.handle = notebook_line()
        on_terminal = self.handle is None and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=label or None, dynamic_ncols=True) if on_terminal else None

    def __call__(self, step: int, metrics: dict[str, float], batch: object = None) -> None:
        """Report that `step` steps are done. Closes itself after the last."""
        self.step, self.metrics = step, metrics
        if self.bar is not None:
            self.bar.set_postfix_str(self.summary(), refresh=False)
            self.bar.update(step - self.bar.n)
        next_tenth = 10 * step // self.total > 10 * self.said // self.total
        if step >= self.total or (self.handle is self.bar is None and next_tenth):
            self.close()  # which in a pipe leaves a line and closes nothing
        elif self.handle is not None and time.monotonic() - self.refreshed >= REFRESH_SECONDS:
            self.refreshed = time.monotonic()
            left = (self.refreshed - self.started) * (self.total - step) / step
            self.handle(f"{self.line()}  {left:.0f} s left")

    def summary(self) -> str:
        """The metrics that are shown, of those that there are: with one decimal in a notebook, else with two."""
        known = {label: self.metrics[name] for label, name in self.show.items() if self.metrics.get(name) is not None}
        digits = 2 if self.handle is None else 1
        return "  ".join(f"{label} {number(float(value), digits)}" for label, value in known.items())

    def line(self) -> str:
        """Steps done and metrics: what remains at the end."""
        done = f"{self.step}/{self.total}"
        done = f"{self.label} {done}" if self.label else f"{done} {self.unit}"
        return f"{done}  {self.summary()}".rstrip()

    def close(self) -> None:
        """Leave the final line; called by the last step, or by hand where the work ends early."""
        if self.bar is not None:
            self.bar.close()
        elif self.handle is not None:
            self.handle(self.line())
        elif self.said < self.step:
            self.said = self.step
            say(self.line())


progress = Progress  # how callers write it: `on_step=display.progress(50)`


def fit_progress(unit: str = "steps", *, label: str = "") -> Callable[[int, int, float], None]:
    """The same for `fit_language_model` and `fit_reward_model`, whose callbacks get (step, steps, loss)."""
    shown: list[Progress] = []

    def on_step(step: int, steps: int, loss: float) -> None:
        if not shown:
            shown.append(Progress(steps, label=label, unit=unit, show={"loss": "loss"}))
        shown[0](step, {"loss": loss})

    return on_step


def notebook_line() -> Callable[[str], None] | None:
    """A function that shows a line of text in a notebook and replaces it when called again; None outside of one."""
    if "ipykernel" not in sys.modules:  # a kernel has loaded both modules
        return None
    from IPython import get_ipython
    from IPython.display import DisplayHandle

    if not hasattr(get_ipython(), "kernel"):
        return None
    handle, shown = DisplayHandle(), []

    def show(line: str) -> None:
        data = {"text/plain": line}
        (handle.update if shown else handle.display)(data, raw=True)
        shown.append(line)

    return show
