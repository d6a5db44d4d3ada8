"""The guard over committed notebooks complains about each defect, and about that one alone."""

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

import notebooks

CONFTEST = Path(__file__).resolve().parents[1] / "notebooks" / "conftest.py"
TRANSPORT = "import json\nimport ipykernel\nprint(json.load(open(ipykernel.get_connection_file()))['transport'])"
PRELUDE, CHECKED, PICTURE, RAISING, TEXT = 9, 10, 11, 12, 13  # indices in `lesson()`


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def display(data, alt=""):
    return new_output("display_data", data, metadata={"image/png": {"alt": alt}} if alt else {})


def error(traceback=()):
    return new_output("error", ename="ValueError", evalue="", traceback=list(traceback))


PIXELS = {"image/png": "aGVsbG8=", "text/plain": "<Figure size 640x480 with 1 Axes>"}
PNG = display(PIXELS, alt="a line that rises")
WORDLESS = 'picture without alt text: end the cell in plots.show("what it shows")'


def lesson():
    """A notebook that keeps every rule, made by hand, unstamped."""
    cells = [new_markdown_cell(f"## {heading}\n\ntext") for heading in notebooks.HEADINGS]
    cells += [
        new_code_cell("import math\n\nfrom rlhf_lessons import advantages"),
        new_code_cell("advantages.gae(math.pi)", outputs=[stream("3.14\n")]),
        new_code_cell("plot(gae=gae(1))", outputs=[PNG]),
        new_code_cell("raise ValueError", outputs=[error(["Cell In[4]"])]),
        new_markdown_cell("$$A = \\delta$$ (Eq. 5.3), then (Eq. 5.4).\n\n```\n## (Eq. 9.9)\n```"),
    ]
    cells[CHECKED].metadata = {"tags": ["nbval-check-output"]}
    cells[RAISING].metadata = {"tags": ["raises-exception", "nbval-check-output"]}
    for number, cell in enumerate((c for c in cells if c.cell_type == "code"), start=1):
        cell.execution_count = number
    return new_notebook(cells=cells)


def save(notebook, path):
    notebooks.save(notebook, path)
    return path


def complaints(notebook, folder, name="05_gae.ipynb"):
    found = notebooks.check(save(notebook, folder / name))
    return {(complaint.rule, complaint.cell) for complaint in found}


# ---- one way to break each rule ------------------------------------------------------
# (rule, source, index of the cell that gets it)
SOURCES = [
    ("empty cell", "  \n", TEXT),
    ("empty cell", "", CHECKED),
    ("markdown over 120 words", "word " * 121, TEXT),
    ("markdown over 120 words", "$a$ b " * 61, TEXT),
    ("prelude does not begin with imports", "x = 1", PRELUDE),
    ("prelude does not begin with imports", "# only a comment", PRELUDE),
    ("prelude over 8 lines", "import math\n" * 9, PRELUDE),
    ("code over 15 lines", "x = 1\n" * 16, CHECKED),
    ("code over 79 columns", f"x = {'1' * 76}", CHECKED),
    ("magic or shell escape", "%matplotlib inline", CHECKED),
    ("magic or shell escape", "%%time\nx = 1", CHECKED),
    ("magic or shell escape", "!ls", CHECKED),
    ("magic or shell escape", "files = !ls", CHECKED),
    ("magic or shell escape", "gae?", CHECKED),
    ("magic or shell escape", "get_ipython().run_line_magic('time', '')", CHECKED),
    ("semicolon", "plot(1);", CHECKED),
    ("semicolon", "plot(1);  # quiet", CHECKED),
    ("sys.path", "sys.path.append('..')", CHECKED),
    ("sys.path", "from sys import path", CHECKED),
    ("pip", "run(['pip', 'install', 'torch'])", CHECKED),
    ("comment in place of a tag", "# NBVAL_SKIP\nx = 1", CHECKED),
    ("comment in place of a tag", "x = 1\n# PYTEST_VALIDATE_IGNORE_OUTPUT", CHECKED),
    ("machine path", "load('/tmp/policy')", CHECKED),
    ("machine path", "see /home/ada/lessons", TEXT),
]

# (rule, outputs, index of the cell that gets them)
OUTPUTS = [
    ("machine path", [stream("saved to /home/ada/x\n")], PICTURE),
    ("machine path", [stream("(/root/x)")], PICTURE),
    ("machine path", [stream("/tmp/ipykernel_3/1.py:1: note")], PICTURE),
    ("machine path", [stream("'/work/x'")], PICTURE),
    ("machine path", [stream("in /Users/ada")], PICTURE),
    ("machine path", [stream("C:\\Users\\ada")], PICTURE),
    ("machine path", [display({"text/html": "<a href='file:///home/ada'>x</a>"})], PICTURE),
    ("machine path", [error(["File /usr/lib/python3/ast.py:50"])], RAISING),
    ("stderr", [stream("careful\n", name="stderr")], PICTURE),
    (WORDLESS, [display(PIXELS)], PICTURE),
    (WORDLESS, [PNG, display(PIXELS)], PICTURE),
    ("object address", [stream("<object at 0x7f3b2c1d>\n")], PICTURE),
    ("object address", [display({"text/plain": "<function gae at 0x7f3b2c1d5e40>"})], PICTURE),
    ("widget", [display({"application/vnd.jupyter.widget-view+json": {"model_id": "1"}})], PICTURE),
    ("error", [error()], PICTURE),
    (
        "execution count not in order",
        [new_output("execute_result", {"text/plain": "3"}, execution_count=7)],
        PICTURE,
    ),
    ("raises-exception without an error", [stream("nothing raised\n")], RAISING),
    ("nbval-check-output without text", [], CHECKED),
    ("nbval-check-output without text", [stream("\n")], CHECKED),
    ("nbval-check-output on a picture", [stream("3.14\n"), PNG], CHECKED),
    ("nbval-check-output on a picture", [PNG], CHECKED),
]

# Edits of other kinds. BEFORE the file is stamped with ids and hashes, as `execute` does, no other
# rule can be the one that complains; AFTER it, the stamp itself is at stake.
BEFORE, AFTER = [], []


def breaks(rule, edits=BEFORE):
    def register(edit):
        edits.append(pytest.param(rule, edit, id=edit.__name__))
        return edit

    return register


@breaks("raw cell")
def raw(nb):
    nb.cells.append(new_raw_cell("x = 1"))


@breaks("file over 1 MB")
def large_picture(nb):
    nb.cells[PICTURE].outputs = [display({"image/png": "A" * 1_000_000}, alt="large")]


@breaks("over 50 cells")
def many_cells(nb):
    nb.cells += [new_markdown_cell("text") for _ in range(51 - len(nb.cells))]


@breaks("no code")
def only_text(nb):
    nb.cells = [cell for cell in nb.cells if cell.cell_type == "markdown"]


@breaks("headings are not the nine in order")
def missing_heading(nb):
    nb.cells[5].source = "text"


@breaks("headings are not the nine in order")
def swapped_headings(nb):
    nb.cells[5].source, nb.cells[6].source = nb.cells[6].source, nb.cells[5].source


@breaks("headings are not the nine in order")
def heading_of_another_level(nb):
    nb.cells[5].source = "#" + nb.cells[5].source


@breaks("headings are not the nine in order")
def heading_inside_a_fence(nb):
    nb.cells[5].source = f"```\n{nb.cells[5].source}\n```"


@breaks("tag not allowed")
def skip_tag(nb):
    nb.cells[PICTURE].metadata = {"tags": ["nbval-skip"]}


@breaks("tag not allowed")
def skip_execution_tag(nb):
    nb.cells[PICTURE].metadata = {"tags": ["skip-execution"]}


@breaks("tag not allowed")
def tagged_text(nb):
    nb.cells[TEXT].metadata = {"tags": ["nbval-check-output"]}


@breaks("raises-exception without nbval-check-output")
def unchecked_exception(nb):
    nb.cells[RAISING].metadata = {"tags": ["raises-exception"]}


@breaks("execution count not in order")
def never_run(nb):
    nb.cells[CHECKED].execution_count = None


@breaks("execution count not in order")
def run_twice(nb):
    nb.cells[RAISING].execution_count = 5


@breaks("code edited since it was run", AFTER)
def edited_code(nb):
    nb.cells[PICTURE].source = "plot(gae=gae(2))"


@breaks("code edited since it was run", AFTER)
def reordered_code(nb):
    a, b = nb.cells[PICTURE], nb.cells[CHECKED]
    a.source, b.source = b.source, a.source


@breaks("output edited since it was made", AFTER)
def edited_output(nb):
    nb.cells[CHECKED].outputs[0].text = "3.15\n"


@breaks("output edited since it was made", AFTER)
def stripped_output(nb):
    nb.cells[PICTURE].outputs = []


@breaks("metadata that execute does not write", AFTER)
def another_kernel(nb):
    nb.metadata.kernelspec.name = "my-kernel"


@breaks("metadata that execute does not write", AFTER)
def python_version(nb):
    nb.metadata.language_info.version = "3.11.4"


@breaks("cell metadata other than tags", AFTER)
def timing(nb):
    nb.cells[CHECKED].metadata.execution = {"iopub.execute_input": "2024-01-01T00:00:00Z"}


@breaks("cell id that execute does not write", AFTER)
def random_id(nb):
    nb.cells[CHECKED].id = "8f2c61"


def test_a_lesson_in_order_passes(tmp_path):
    nb = lesson()
    notebooks.normalise(nb)
    path = save(nb, tmp_path / "05_gae.ipynb")
    assert notebooks.check(path) == []
    assert notebooks.main(["check", str(path)]) == 0


@pytest.mark.parametrize(("rule", "source", "index"), SOURCES)
def test_a_defect_in_a_source_is_named(rule, source, index, tmp_path):
    nb = lesson()
    nb.cells[index].source = source
    notebooks.normalise(nb)
    assert complaints(nb, tmp_path) == {(rule, index)}


@pytest.mark.parametrize(("rule", "outputs", "index"), OUTPUTS)
def test_a_defect_in_an_output_is_named(rule, outputs, index, tmp_path):
    nb = lesson()
    nb.cells[index].outputs = outputs
    notebooks.normalise(nb)
    assert complaints(nb, tmp_path) == {(rule, index)}


@pytest.mark.parametrize(("rule", "edit"), BEFORE)
def test_a_defect_in_the_file_is_named(rule, edit, tmp_path):
    nb = lesson()
    edit(nb)
    notebooks.normalise(nb)
    assert {found for found, _ in complaints(nb, tmp_path)} == {rule}


@pytest.mark.parametrize(("rule", "edit"), AFTER)
def test_an_edit_after_execution_is_named(rule, edit, tmp_path):
    nb = lesson()
    notebooks.normalise(nb)
    edit(nb)
    assert {found for found, _ in complaints(nb, tmp_path)} == {rule}


def test_every_rule_has_a_defect():
    named = {rule for rule, *_ in SOURCES + OUTPUTS}
    assert named | {case.values[0] for case in BEFORE + AFTER} == notebooks.RULES


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (TEXT, "word " * 120),
        (TEXT, "$$" + "a + " * 200 + "b$$ an equation is not prose, $a + b + c$ is one word " * 5),
        (TEXT, "the mean/var ratio, or 3/work, of https://example.org/home/page and <var>x</var>"),
        (TEXT, "install with pip; then edit sys.path"),
        (CHECKED, "x = 1\n" * 15),
        (CHECKED, f"x = {'1' * 75}"),
        (CHECKED, "print('a; b')  # a; b"),
        (CHECKED, "x = (7\n%3)"),
        (PRELUDE, "import math\n" * 8),
    ],
)
def test_what_is_allowed_passes(index, text, tmp_path):
    nb = lesson()
    nb.cells[index].source = text
    notebooks.normalise(nb)
    assert complaints(nb, tmp_path) == set()


def test_headings_bind_lessons_only(tmp_path):
    nb = lesson()
    del nb.cells[:3]
    notebooks.normalise(nb)
    assert complaints(nb, tmp_path, "appendix.ipynb") == set()


def test_a_complaint_names_file_cell_and_rule(tmp_path, capsys):
    nb = lesson()
    nb.cells[CHECKED].source = "plot(1);"
    notebooks.normalise(nb)
    path = save(nb, tmp_path / "05_gae.ipynb")
    assert notebooks.main(["check", str(path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"05_gae.ipynb: cell {CHECKED}: semicolon",
        "1 notebooks, 1 complaints",
    ]


@pytest.mark.parametrize(
    ("index", "text", "said"),
    [
        (TEXT, "## Derivation\n\n" + "word " * 121, "markdown over 120 words (122)"),
        (CHECKED, "x = 1\n" * 16, "code over 15 lines (16)"),
        (CHECKED, f"x = 1\n{'x' * 80}", "code over 79 columns (line 2: 80)"),
        (CHECKED, "open('/tmp/x')", "machine path ('/tmp')"),
        (TEXT, "## Derive\n\ntext", "headings are not the nine in order (wanted: Question, Derivation, Your turn, "),
    ],
)
def test_a_complaint_says_what_was_found(index, text, said, tmp_path):
    nb = lesson()
    nb.cells[index].source = text
    notebooks.normalise(nb)
    found = [str(complaint) for complaint in notebooks.check(save(nb, tmp_path / "05_gae.ipynb"))]
    assert any(said in line for line in found), found


def test_a_complaint_about_what_was_run_says_how_to_run_it(tmp_path):
    nb = lesson()
    notebooks.normalise(nb)
    nb.cells[CHECKED].source = "changed = True"
    (found,) = map(str, notebooks.check(save(nb, tmp_path / "05_gae.ipynb")))
    assert "code edited since it was run (run `python tests/notebooks.py execute` with its number)" in found


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", "null", "3", '{"cells": [', '{"cells": 1, "nbformat": 4}', '{"nbformat": 4, "nbformat_minor": 5}',
     "[" * 100_000, "\0", '{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": [{"cells": []}]}'],
)  # fmt: skip
def test_what_is_no_notebook_is_named(text, tmp_path):
    path = tmp_path / "05_gae.ipynb"
    path.write_text(text)
    (complaint,) = notebooks.check(path)
    assert str(complaint).startswith("05_gae.ipynb: notebook: not a notebook: ") and len(str(complaint)) < 250


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.ipynb").write_bytes("{é".encode("latin-1"))
    for path in (tmp_path / "none.ipynb", tmp_path, tmp_path / "latin.ipynb"):
        (complaint,) = notebooks.check(path)
        assert "notebook: not a notebook: " in str(complaint)


ANYTHING = [None, [], {}, 3, "x", "4"]


@pytest.mark.filterwarnings("ignore:Cell is missing an id field")
@pytest.mark.parametrize("value", ANYTHING)
def test_whatever_stands_in_a_notebook_is_answered_in_a_line(value, tmp_path):
    """Each value in the place of each part: the notebook's, its metadata's, a cell's, an output's; and without it."""
    saved = lesson()
    notebooks.normalise(saved)
    places: list[tuple] = [("cells", 0)]
    for parent in ((), ("metadata",), ("cells", CHECKED), ("cells", CHECKED, "outputs", 0)):
        node = saved
        for step in parent:
            node = node[step]
        places += [(*parent, key) for key in node]
    for *parent, key in places:
        for absent in {False, value is None}:
            nb = json.loads(nbformat.writes(saved))
            node = nb
            for step in parent:
                node = node[step]
            node[key] = value
            if absent:
                del node[key]
            path = tmp_path / "05_gae.ipynb"
            path.write_text(json.dumps(nb))
            lines = [str(complaint) for complaint in notebooks.check(path)]
            assert all("\n" not in line and len(line) < 250 for line in lines), (parent, key)


@pytest.mark.parametrize("source", ["x = '\0'", "(" * 5000 + ")" * 5000, "x = '\ud800'"])
def test_code_that_python_cannot_read_is_named(source, tmp_path):
    nb = lesson()
    notebooks.normalise(nb)
    nb = json.loads(nbformat.writes(nb))
    nb["cells"][CHECKED]["source"] = source
    (tmp_path / "05_gae.ipynb").write_text(json.dumps(nb))
    assert "magic or shell escape" in {complaint.rule for complaint in notebooks.check(tmp_path / "05_gae.ipynb")}


def test_an_unknown_name_is_an_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        notebooks.main(["check", "no_such_lesson"])
    assert exit_.value.code == 2
    assert "got 'no_such_lesson'" in capsys.readouterr().err


def test_labels_and_code(tmp_path):
    path = save(lesson(), tmp_path / "05_gae.ipynb")
    assert notebooks.labels(path) == {"5.3", "5.4"}
    assert notebooks.code(path).splitlines()[0] == "import math"
    assert "advantages.gae(math.pi)\n\nplot(gae=gae(1))" in notebooks.code(path)


# ---- execution -----------------------------------------------------------------------


def unexecuted(*sources):
    return new_notebook(cells=[new_code_cell(source) for source in sources])


def test_execute_saves_what_the_guard_accepts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("INTERPRETER", sys.executable)
    names = "HF_HUB_OFFLINE TRANSFORMERS_OFFLINE OMP_NUM_THREADS MPLBACKEND"
    monkeypatch.setenv("NAMES", names)
    nb = unexecuted(
        "import os\nimport sys\nfrom pathlib import Path",
        "print(sys.executable == os.environ['INTERPRETER'], Path.cwd().name)",
        "for name in os.environ['NAMES'].split():\n    print(name, os.environ[name])",
        "print('one stream', end=' ', flush=True)\nprint('of text')",
        "Path('pid').write_text(str(os.getpid()))\nprint('written')",
        TRANSPORT,
        "1 / 0",
    )
    nb.cells[-1].metadata = {"tags": ["raises-exception", "nbval-check-output"], "collapsed": True}
    path = save(nb, tmp_path / "machine.ipynb")

    assert notebooks.main(["execute", str(path)]) == 0
    assert capsys.readouterr().out.startswith("machine.ipynb  ")
    assert notebooks.check(path) == []
    outputs = [cell.outputs for cell in nbformat.read(path, as_version=4).cells]
    assert outputs[1][0].text == f"True {tmp_path.name}\n"
    assert outputs[2][0].text.splitlines() == [
        "HF_HUB_OFFLINE 1",
        "TRANSFORMERS_OFFLINE 1",
        "OMP_NUM_THREADS 1",
        "MPLBACKEND module://matplotlib_inline.backend_inline",
    ]
    assert [o.text for o in outputs[3]] == ["one stream of text\n"]
    assert outputs[5][0].text == "ipc\n"
    assert outputs[6][0].ename == "ZeroDivisionError"

    with pytest.raises(ProcessLookupError):  # the kernel has ended
        os.kill(int((tmp_path / "pid").read_text()), 0)

    first = path.read_bytes()
    assert notebooks.main(["execute", str(path)]) == 0
    assert path.read_bytes() == first


@pytest.mark.parametrize("last", ["raise ValueError('wrong')", "import os\nos._exit(1)"])
def test_a_failure_leaves_the_file_untouched(last, tmp_path, capsys):
    path = save(unexecuted("print('a new output')", last), tmp_path / "broken.ipynb")
    before = path.read_bytes()
    assert notebooks.main(["execute", str(path)]) == 1
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert "broken.ipynb" in capsys.readouterr().out


def test_a_cell_over_its_time_is_a_failure(tmp_path):
    path = save(unexecuted("import time\ntime.sleep(60)"), tmp_path / "slow.ipynb")
    with pytest.raises(notebooks.CellTimeoutError):
        notebooks.execute(path, timeout=1)


# ---- under nbval ---------------------------------------------------------------------


def executed(*cells):
    """A notebook of (source, tags, outputs), as if it had been run."""
    nb = new_notebook()
    for number, (text, tags, outputs) in enumerate(cells, start=1):
        nb.cells.append(new_code_cell(text, execution_count=number, outputs=outputs))
        nb.cells[-1].metadata = {"tags": tags}
    notebooks.normalise(nb)
    return nb


NBVAL = {
    "right": executed(
        ("print(1 + 1)", ["nbval-check-output"], [stream("2\n")]),
        ("import time\ntime.sleep(2)\nprint('ignored')", [], [stream("as it was\n")]),
    ),
    "offline": executed(
        (
            "import os\nprint(os.environ['HF_HUB_OFFLINE'], os.environ['TRANSFORMERS_OFFLINE'])",
            ["nbval-check-output"],
            [stream("1 1\n")],
        ),
        (TRANSPORT, ["nbval-check-output"], [stream("ipc\n")]),
    ),
    "failing": executed(
        ("x = 1", [], []),
        ("raise ValueError('second cell')", [], []),
        ("open('third_cell_ran', 'w').close()", [], []),
    ),
    "edited": executed(("print(1 + 1)", ["nbval-check-output"], [stream("3\n")])),
    "dying": executed(("import os\nos._exit(1)", [], []), ("x = 1", [], [])),
    "endless": executed(("import time\ntime.sleep(100)", [], []), ("x = 1", [], [])),
    "calm": executed(
        ("x = 1", ["raises-exception", "nbval-check-output"], [error()]),
    ),
}


BESIDE = """
import os
def test_beside():
    assert not {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"} & set(os.environ)
"""


@pytest.fixture(scope="module")
def nbval(tmp_path_factory):
    """Run NBVAL under pytest with the lessons' conftest, then a test beside it: the folder that holds report.xml."""
    folder = tmp_path_factory.mktemp("nbval")
    (folder / "lessons").mkdir()
    shutil.copy(CONFTEST, folder / "lessons")
    for name, nb in NBVAL.items():
        save(nb, folder / "lessons" / f"{name}.ipynb")
    (folder / "test_beside.py").write_text(BESIDE)
    options = "--nbval-lax --nbval-current-env --nbval-cell-timeout 5 -p no:cacheprovider"
    command = [sys.executable, "-m", "pytest", *options.split(), "--junitxml=report.xml", "lessons", "test_beside.py"]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=180, check=False)
    return folder


def cases(folder, name):
    """The report's entries on the cells of one notebook, in order."""
    every = ET.parse(folder / "report.xml").iter("testcase")
    return [case for case in every if name in case.get("classname")]


def outcomes(folder, name):
    return [case[0].tag if len(case) else "passed" for case in cases(folder, name)]


def text(folder, name):
    return "".join(line for case in cases(folder, name) for line in case.itertext())


def test_nbval_passes_a_right_notebook(nbval):
    assert outcomes(nbval, "right") == ["passed", "passed"]


def test_nbval_runs_a_notebook_offline_and_without_a_port_and_leaves_other_tests_alone(nbval):
    assert outcomes(nbval, "offline") == ["passed", "passed"]
    assert outcomes(nbval, "test_beside") == ["passed"]


def test_nbval_stops_at_the_first_failing_cell(nbval):
    assert outcomes(nbval, "failing") == ["passed", "failure", "skipped"]
    assert not (nbval / "lessons" / "third_cell_ran").exists()


def test_nbval_fails_an_edited_output(nbval):
    assert outcomes(nbval, "edited") == ["failure"]


def test_nbval_fails_where_nothing_raises(nbval):
    assert outcomes(nbval, "calm") == ["failure"]


def test_nbval_ends_a_cell_over_its_time(nbval):
    assert outcomes(nbval, "endless") == ["failure", "skipped"]
    assert "Timeout of 5 seconds" in text(nbval, "endless")


def test_nbval_notices_a_dead_kernel_before_the_timeout(nbval):
    assert outcomes(nbval, "dying") == ["failure", "skipped"]
    assert "the kernel died" in text(nbval, "dying")
