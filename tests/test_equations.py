"""Every numbered equation belongs to one function, is checked by a test, and is shown and called in its lesson."""

import re
from collections import Counter

import pytest
from equations import ROOT, Equation, equation_map, labelled_functions, map_table, marked_tests

EQUATIONS = equation_map()
LESSONS = {int(path.name[:2]) for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}


def test_there_are_equations_of_each_lesson_that_derives_one():
    assert {int(eq.label.split(".")[0]) for eq in EQUATIONS} == {*range(1, 10), *range(11, 17)}


def test_a_label_belongs_to_one_function():
    counts = Counter(label for label, _ in labelled_functions())
    assert [label for label, count in counts.items() if count > 1] == []


def test_labels_are_numbered_without_gaps():
    by_lesson: dict[str, list[int]] = {}
    for eq in EQUATIONS:
        lesson, number = eq.label.split(".")
        by_lesson.setdefault(lesson, []).append(int(number))
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in by_lesson.values())


@pytest.mark.parametrize("equation", EQUATIONS, ids=lambda eq: eq.label)
def test_a_test_checks_it_and_calls_its_function(equation: Equation):
    assert equation.tests, f"no test is marked with equation {equation.label}"
    files = {ROOT / test.split("::")[0] for test in equation.tests}
    assert any(re.search(rf"\b{equation.name}\b", file.read_text(encoding="utf-8")) for file in files)


@pytest.mark.parametrize("equation", EQUATIONS, ids=lambda eq: eq.label)
def test_its_lesson_shows_and_calls_it(equation: Equation):
    if int(equation.label.split(".")[0]) not in LESSONS:
        pytest.skip("its lesson is not written yet")
    assert equation.lesson is not None


def test_every_mark_names_an_equation_that_exists():
    assert set(marked_tests(ROOT / "tests")) <= {eq.label for eq in EQUATIONS}


def test_the_table_has_a_row_for_each():
    table = map_table(EQUATIONS)
    assert all(f"| {eq.label} | `{eq.function}` |" in table for eq in EQUATIONS)
