"""The map from each numbered equation to the function that computes it, the tests that check it and its lesson.

Everything is read from the sources: the label "(Eq. 5.3)" in a docstring, `@pytest.mark.equation("5.3")` on a test,
the label and a call in notebook 05. `python tests/equations.py` prints it.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import notebooks

ROOT = Path(__file__).resolve().parent.parent
LABEL = re.compile(r"\(Eq\. (\d+\.\d+)\)")


@dataclass(frozen=True)
class Equation:
    """One numbered equation and where it stands."""

    label: str  # "5.4"
    function: str  # "advantages.gae"
    tests: tuple[str, ...]  # "tests/test_advantages.py::test_..."
    lesson: str | None  # "05_gae", where the lesson shows the label and calls the function

    @property
    def name(self) -> str:
        """The function's name without its module."""
        return self.function.rpartition(".")[2]


def labelled_functions() -> list[tuple[str, str]]:
    """(label, module.function) of every label in a docstring of a function, method or class of the package."""
    found = []
    for file in sorted((ROOT / "rlhf_lessons").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found += [(label, f"{file.stem}.{node.name}") for label in LABEL.findall(ast.get_docstring(node) or "")]
    return sorted(found, key=lambda pair: tuple(map(int, pair[0].split("."))))


def marked_tests(folder: Path) -> dict[str, list[str]]:
    """For each label, the tests under `folder` that are marked with it."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.equation":
                    for label in (argument.value for argument in mark.args):
                        found.setdefault(label, []).append(f"{file.relative_to(folder.parent)}::{node.name}")
    return found


def lesson_of(label: str, name: str, folder: Path) -> str | None:
    """The lesson with the label's number, if its text shows the label and its code names the function."""
    for file in sorted(folder.glob(f"{int(label.split('.')[0]):02d}_*.ipynb")):
        if label in notebooks.labels(file) and re.search(rf"\b{name}\b", notebooks.code(file)):
            return file.stem
    return None


def equation_map() -> list[Equation]:
    """All equations of the package, with their tests and lessons."""
    tests = marked_tests(ROOT / "tests")
    return [
        Equation(
            label,
            function,
            tuple(tests.get(label, ())),
            lesson_of(label, function.rpartition(".")[2], ROOT / "notebooks"),
        )
        for label, function in labelled_functions()
    ]


def map_table(equations: list[Equation]) -> str:
    """The map as a Markdown table."""
    lines = ["| equation | function | tests | lesson |", "| --- | --- | --- | --- |"]
    for eq in equations:
        first = eq.tests[0] if eq.tests else "–"
        more = f" and {len(eq.tests) - 1} more" if len(eq.tests) > 1 else ""
        lines.append(f"| {eq.label} | `{eq.function}` | `{first}`{more} | {eq.lesson or '–'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(map_table(equation_map()))
