"""What the checks of lessons 11 to 16 owe as all do: right answers pass however they are written, a stub is none, and
known wrong answers get the hint that fits them. What is each lesson's own stands in test_checks_11.py and so on.
"""

import pytest
import test_checks_11
import test_checks_12
import test_checks_13
import test_checks_14
import test_checks_15
import test_checks_16
from test_checks import hint_of

from rlhf_lessons import checks

LESSONS = (test_checks_11, test_checks_12, test_checks_13, test_checks_14, test_checks_15, test_checks_16)
RIGHT = {name: answers for lesson in LESSONS for name, answers in lesson.RIGHT.items()}
WRONG = [(name, wrong) for name in RIGHT for wrong in getattr(checks, name).wrong]
HUNTS = ("other_way", "one_scale_for_all", "lost_reference", "same_sample_twice", "own_question", "stale_engine")


@pytest.mark.parametrize(("name", "right"), [(name, right) for name, answers in RIGHT.items() for right in answers])
def test_right_answers_are_correct(name, right, capsys):
    assert getattr(checks, name)(right) is None
    verdict, *explanation = capsys.readouterr().out.split("\n", maxsplit=1)
    assert verdict == "correct" and bool(explanation[0]) == (name in HUNTS)


@pytest.mark.parametrize("name", RIGHT)
def test_a_stub_is_not_attempted(name, capsys):
    getattr(checks, name)(lambda *args, **options: NotImplemented)
    assert capsys.readouterr().out == "not attempted yet\n"


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=[f"{n}: {w.name}" for n, w in WRONG])
def test_known_wrong_answers_get_their_own_hint(name, wrong):
    assert hint_of(getattr(checks, name), wrong.function) == wrong.hint
