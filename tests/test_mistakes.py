"""The registry of planted mistakes; a file of its own, so that no mistake is noticed by its own line being gone."""

from mutants import ROOT, read_registry


def test_every_mistake_has_the_line_that_it_replaces_and_tests_to_notice_it():
    for mistake in read_registry():
        assert mistake.tests and all((ROOT / "tests" / name).exists() for name in mistake.tests), mistake
