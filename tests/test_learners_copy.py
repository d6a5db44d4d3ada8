"""A learner's copy of the lessons: made once, never overwritten, its solved exercises kept and shown as a table."""

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import nbformat
import pytest

import notebooks
from rlhf_lessons import __main__ as commands
from rlhf_lessons import checks, importance, record
from rlhf_lessons.record import checks_in, progress_table

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted(notebooks.FOLDER.glob(notebooks.LESSON + "*.ipynb"))


@pytest.fixture
def lab(tmp_path):
    notebooks.copy(to=tmp_path / "lab")
    return tmp_path / "lab"


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_the_copy_has_every_lesson_without_outputs_and_the_solution_folded(lab):
    assert {path.name for path in lab.glob("*.ipynb")} == {path.name for path in notebooks.FOLDER.glob("*.ipynb")}
    for path in LESSONS:
        mine, theirs = code_cells(lab / path.name), code_cells(path)
        assert [cell.source for cell in mine] == [cell.source for cell in theirs]
        assert not any(cell.outputs or cell.execution_count for cell in mine)
        assert any(cell.outputs for cell in theirs), "the lessons themselves keep theirs"
        cells = nbformat.read(lab / path.name, as_version=4).cells
        folded = [cell.source for cell in cells if cell.metadata.get("jp-MarkdownHeadingCollapsed")]
        assert len(folded) == 1 and folded[0].startswith("## In code"), path.name
        assert not any("jupyter" in cell.metadata for cell in mine), "JupyterLab forgets a folded output at each run"
        nbformat.validate(nbformat.read(lab / path.name, as_version=4))


def test_a_second_copy_changes_nothing_but_adds_what_is_missing(lab):
    mine = lab / LESSONS[5].name
    mine.write_text("my work", encoding="utf-8")
    (lab / LESSONS[6].name).unlink()
    record.write(lab, {"gae": "2026-01-02"})
    assert notebooks.copy(to=lab) == []
    assert mine.read_text(encoding="utf-8") == "my work"
    assert (lab / LESSONS[6].name).exists() and record.read(lab) == {"gae": "2026-01-02"}


def test_a_lesson_is_started_anew_only_when_named_and_the_old_one_is_kept(lab):
    mine = lab / LESSONS[5].name
    for number, work in enumerate(("first", "second"), start=1):
        mine.write_text(work, encoding="utf-8")
        (said,) = notebooks.copy([LESSONS[5]], to=lab)
        kept = lab / f"{LESSONS[5].stem}.kept-{number}.ipynb"
        assert kept.read_text(encoding="utf-8") == work and kept.name in said
        assert len(code_cells(mine)) == len(code_cells(LESSONS[5]))


@pytest.mark.parametrize("named", ["notebooks/05_gae.ipynb", "lab/05_gae.ipynb"])
def test_a_lesson_to_start_anew_may_be_named_by_any_path(named, lab):
    (lab / "05_gae.ipynb").write_text("mine", encoding="utf-8")
    assert notebooks.copy([Path(named)], to=lab)
    assert (lab / "05_gae.kept-1.ipynb").read_text(encoding="utf-8") == "mine"


def test_an_unknown_lesson_to_start_anew_is_an_error_before_anything_is_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "copy", lambda *paths, **places: pytest.fail("copied"))
    with pytest.raises(SystemExit) as leaving:
        notebooks.main(["copy", "77"])
    assert leaving.value.code == 2 and "got '77'" in capsys.readouterr().err


def test_code_that_a_learner_keeps_there_is_not_linted(tmp_path):
    pytest.importorskip("ruff")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "lab").mkdir()
    for folder, code in ((tmp_path / "lab", 1), (tmp_path, 0)):  # the second time it can fail: the file is elsewhere
        (folder / "mine.py").write_text("import os;x=(", encoding="utf-8")
        lint = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
        done = subprocess.run(lint, cwd=tmp_path, capture_output=True, timeout=60)
        assert (done.returncode == 0) == bool(code), done.stdout


def test_the_kernel_is_that_of_this_environment_whatever_else_is_installed(tmp_path):
    assert "lab: export JUPYTER_PREFER_ENV_PATH = 1" in (ROOT / "Makefile").read_text(encoding="utf-8")
    other = tmp_path / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["false"], "display_name": "another", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    find = "from jupyter_client.kernelspec import KernelSpecManager as K; print(K().get_kernel_spec('python3').argv[0])"
    chosen = {}
    for prefer in ("1", "0"):
        places = {"JUPYTER_DATA_DIR": str(tmp_path), "JUPYTER_PREFER_ENV_PATH": prefer}
        done = subprocess.run(
            [sys.executable, "-c", find], env={**os.environ, **places}, capture_output=True, text=True, timeout=60
        )
        chosen[prefer] = done.stdout.strip()
    assert "python" in chosen["1"] and chosen["0"] == "false"


def test_what_a_learner_does_there_is_neither_tested_nor_linted_nor_committed():
    for tool, ignores in {".gitignore": "/lab/", "pyproject.toml": '"lab"'}.items():
        assert ignores in (ROOT / tool).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    test = makefile.partition("\ntest: ")[2].partition("\n\n")[0]
    assert "pytest tests " in test and "pytest notebooks " in test and "lab" not in test


# --- The record -------------------------------------------------------------------------------------------------------


def test_a_check_keeps_the_first_day_on_which_it_was_solved(lab, monkeypatch, capsys):
    monkeypatch.chdir(lab)
    checks.importance_ratio(lambda log_probs, old_log_probs: NotImplemented)
    with pytest.raises(AssertionError):
        checks.importance_ratio(lambda log_probs, old_log_probs: (old_log_probs - log_probs).exp())
    assert record.read(lab) == {}
    checks.importance_ratio(importance.importance_ratio)
    assert record.read(lab) == {"importance_ratio": date.today().isoformat()}
    record.write(lab, {"importance_ratio": "2026-01-02"})
    checks.importance_ratio(importance.importance_ratio)
    assert record.read(lab) == {"importance_ratio": "2026-01-02"}
    assert not [path for path in lab.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("content", [None, "", "[1]", "{", '{"gae": 3}'])
def test_without_a_record_that_can_be_read_nothing_is_kept_and_nothing_fails(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / record.RECORD).write_text(content)
    checks.importance_ratio(importance.importance_ratio)
    assert capsys.readouterr().out == "correct\n"
    assert [path.read_text() for path in tmp_path.iterdir()] == [content] * (content is not None)


def test_a_record_that_cannot_be_written_fails_no_answer(lab, monkeypatch, capsys):
    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(lab)
    monkeypatch.setattr(record.os, "replace", full)
    checks.importance_ratio(importance.importance_ratio)
    assert capsys.readouterr().out == "correct\n" and record.read(lab) == {}
    assert not [path for path in lab.iterdir() if path.suffix == ".tmp"]


def test_a_check_is_kept_under_the_name_by_which_the_table_looks_for_it():
    for path in LESSONS:
        for _, name in checks_in(path):
            assert getattr(getattr(checks, name), "name", name) == name


# --- The table --------------------------------------------------------------------------------------------------------


def test_every_lesson_has_an_exercise_and_a_hunt_that_are_judged():
    for path in LESSONS:
        kinds = {kind for kind, _ in checks_in(path)}
        assert kinds == {"exercise", "hunt"}, path.name
        assert all(callable(getattr(checks, name)) for _, name in checks_in(path))


def test_the_table_shows_what_was_solved_when(lab, capsys):
    record.write(lab, {"gae": "2026-01-02"})
    assert commands.main(["progress", str(lab)]) == 0
    table = capsys.readouterr().out
    assert "| 05 gae | exercise | gae | 2026-01-02 |" in table
    assert "| 06 importance sampling | hunt | missing_support |  |" in table
    assert f"1 of {sum(len(checks_in(path)) for path in LESSONS)} solved" in table


def test_a_lesson_that_was_started_anew_counts_once(lab):
    before = progress_table(lab)
    notebooks.copy(LESSONS[5:7], to=lab)
    assert progress_table(lab) == before


def test_without_a_copy_the_command_says_how_to_make_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_lessons", "progress"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (
        done.returncode == 2 and "lab must hold a copy of the lessons, which `make lab` makes; got none" in done.stderr
    )


@pytest.mark.parametrize("content", ["", '{"cells": [', "3", "{}", json.dumps({"cells": [3]})])
def test_a_lesson_that_is_no_notebook_is_named(content, lab):
    (lab / "05_gae.ipynb").write_text(content)
    with pytest.raises(ValueError, match="05_gae.ipynb must be a notebook; got something else .`make lab FRESH=05`"):
        progress_table(lab)
