"""Execute the lesson notebooks, and check the committed files without a kernel.

    python tests/notebooks.py execute [NAMES]     run in a clean kernel and save with outputs
    python tests/notebooks.py check [NAMES]       hold the saved files to RULES
    python tests/notebooks.py copy [NAMES]        a learner's copy in lab/; NAMES are copied anew

NAMES are beginnings of file names ("05") or paths; without any, all notebooks are meant. nbval
checks that the notebooks still run; `check` rejects what nbval lets through: code edited since its
outputs were made, outputs that were stripped, cells that are skipped, and text that depends on the
machine.
"""

import argparse
import ast
import hashlib
import io
import json
import os
import re
import sys
import time
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from tempfile import gettempdir
from uuid import uuid4

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from rlhf_lessons.record import KEPT, RECORD, write

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
LAB = FOLDER.with_name("lab")  # the learner's own copy
LESSON = "[0-9][0-9]_"  # how the name of a lesson begins
HEADINGS = (
    *("Question", "Derivation", "Your turn", "In code", "Experiment"),
    *("Exact check", "Bug hunt", "Recap", "Next"),
)
VERSION = [4, 5]  # of the format, as `execute` writes it
TIMEOUT = 180  # seconds a cell may take
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


# ---- what is stored beside the cells -------------------------------------------------


def metadata(notebook) -> dict:
    """The metadata that `execute` writes: no versions; hashes of what was run and what came out."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "executed": {
            "code": _digest([cell.source for cell in code]),
            "outputs": _digest([cell.outputs for cell in code]),
        },
    }


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cell_id(index: int) -> str:
    """Ids count the cells, so that executing twice gives the same file."""
    return f"cell-{index:02d}"


def normalise(notebook) -> None:
    """Reduce, in place, metadata and cell ids to what depends on the content alone; keep tags."""
    for index, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags")
        cell.id, cell.metadata = cell_id(index), nbformat.from_dict({"tags": tags} if tags else {})
    notebook.nbformat, notebook.nbformat_minor = VERSION
    notebook.metadata = nbformat.from_dict(metadata(notebook))


# ---- execute -------------------------------------------------------------------------


class KernelOnFiles(AsyncKernelManager):
    """A kernel reached through files: a TCP port, free when drawn, may be taken when the kernel binds it."""

    def __init__(self, **options):
        super().__init__(transport="ipc", ip=f"{gettempdir()}/kernel-{uuid4().hex}", **options)


def execute(path: Path, *, timeout: int = TIMEOUT) -> None:
    """Run a notebook in a clean, offline kernel, in its own folder, and save it with its outputs.

    The file is replaced only when every cell has run. Raises nbclient's CellExecutionError,
    CellTimeoutError or DeadKernelError.
    """
    notebook = nbformat.read(path, as_version=4)
    # Without kernel folders to search, "python3" can only be the running interpreter.
    specs = KernelSpecManager(kernel_dirs=[])
    kernel = KernelOnFiles(kernel_spec_manager=specs, kernel_name="python3")
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=timeout,
        coalesce_streams=True,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
    )
    # cleanup_kc: the kernel ends with its notebook, although the client did not make its manager.
    environment = {**os.environ, **ENVIRONMENT}
    client.execute(cwd=str(path.resolve().parent), env=environment, cleanup_kc=True)
    normalise(notebook)
    save(notebook, path)


def save(notebook, path: Path) -> None:
    """Write beside the file, then rename: an interruption never leaves half a notebook."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


# ---- the learner's copy --------------------------------------------------------------


def learners_copy(path: Path) -> nbformat.NotebookNode:
    """The notebook without outputs, and with the section that shows the package's solution folded.

    JupyterLab unfolds a cell's output whenever the cell runs; a folded heading stays folded, "Run All" or not.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        elif re.search(r"^## In code\s*$", cell.source, re.M):
            cell.metadata["jp-MarkdownHeadingCollapsed"] = True
    notebook.metadata.pop("executed", None)
    return notebook


def copy(fresh: Sequence[Path] = (), *, to: Path = LAB, source: Path = FOLDER) -> list[str]:
    """Copy each notebook that is not there yet, and `fresh` ones again, the learner's file kept under another name.

    A `fresh` one may be named by its path here or in the copy. Returns what was done, a line each.
    """
    to.mkdir(exist_ok=True)
    if not (to / RECORD).exists():
        write(to, {})
    said = []
    for path in sorted(source.glob("*.ipynb")):
        target = to / path.name
        if target.exists() and path.name in {named.name for named in fresh}:
            kept = next(name for n in count(1) if not (name := to / f"{path.stem}{KEPT}{n}.ipynb").exists())
            os.replace(target, kept)
            said.append(f"{target.name}: copied anew; yours is kept as {kept.name}")
        if not target.exists():
            save(learners_copy(path), target)
    return said


# ---- the guard: what a rule sees -----------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell and its place: `index` in the file; `number` among the code cells, from 1, or None."""

    index: int
    number: int | None
    node: nbformat.NotebookNode

    @property
    def is_code(self) -> bool:
        return self.number is not None

    @property
    def source(self) -> str:
        return self.node.source

    @property
    def lines(self) -> list[str]:
        return self.source.splitlines()

    @property
    def tags(self) -> list:
        return self.node.metadata.get("tags", [])

    @property
    def outputs(self) -> list:
        return self.node.get("outputs", [])

    @property
    def output_types(self) -> set[str]:
        """Stream names, MIME types, and "error"."""
        return {kind for output in self.outputs for kind in _texts(output)}

    @property
    def output_text(self) -> str:
        """All that a reader sees in the outputs, without pixels."""
        texts = (item for output in self.outputs for item in _texts(output).items())
        return "\n".join(text for kind, text in texts if kind not in ("image/png", "image/jpeg"))

    @property
    def counts(self) -> list:
        """The execution counts of the cell and of its results."""
        results = [o.execution_count for o in self.outputs if o.output_type == "execute_result"]
        return [self.node.execution_count, *results]

    @property
    def has_error(self) -> bool:
        return "error" in self.output_types

    @property
    def has_picture(self) -> bool:
        return any(kind.startswith("image/") for kind in self.output_types)

    @property
    def may_raise(self) -> bool:
        return "raises-exception" in self.tags

    @property
    def is_checked(self) -> bool:
        return "nbval-check-output" in self.tags


def _texts(output) -> dict[str, str]:
    """An output's texts by type: the stream's name, "error", or each MIME type."""
    if output.output_type == "stream":
        return {output.name: output.text}
    if output.output_type == "error":
        return {"error": "\n".join([output.ename, output.evalue, *output.traceback])}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in output.data.items()}


@dataclass(frozen=True)
class Notebook:
    """A notebook file, opened."""

    path: Path
    node: nbformat.NotebookNode
    cells: list[Cell]

    @property
    def is_lesson(self) -> bool:
        return self.path.match(f"{LESSON}*.ipynb")

    @property
    def headings(self) -> tuple[str, ...]:
        return tuple(re.findall(r"^##[ \t]+(.*?)\s*$", _prose(self), re.M))


def _prose(notebook: Notebook) -> str:
    """The text of all markdown cells, without fenced code."""
    texts = (cell.source for cell in notebook.cells if cell.node.cell_type == "markdown")
    return re.sub(r"^```.*?^```", "", "\n\n".join(texts), flags=re.M | re.S)


def read(path: Path) -> Notebook:
    """Open a notebook; raises ValueError, in one line, where the file is none, or none of the version that is saved."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = [content[key] for key in ("nbformat", "nbformat_minor")]
        if version != VERSION:
            raise ValueError(f"nbformat and nbformat_minor must be {VERSION}; got {version}")
        nbformat.validate(nbformat.from_dict(content))
        node = nbformat.read(path, as_version=4)
    except Exception as error:  # whatever json and nbformat make of a file that is anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"not a notebook: {reason[:200]}") from None
    is_code = [cell.cell_type == "code" for cell in node.cells]
    counts = accumulate(is_code)  # accumulated, True counts 1
    numbers = [n if code else None for n, code in zip(counts, is_code, strict=True)]
    cells = [Cell(index, *pair) for index, pair in enumerate(zip(numbers, node.cells, strict=True))]
    return Notebook(path, node, cells)


# ---- the guard: questions that take more than a line ---------------------------------

# An absolute path: a well-known top folder that no word, dot, bracket or tag precedes.
TOP_FOLDERS = "home|root|tmp|work|workspace|content|mnt|opt|usr|var|private|Users"
MACHINE_PATH = re.compile(rf"(?<![\w.)\]}}<])/(?:{TOP_FOLDERS})\b|\b[A-Za-z]:\\+Users\b|\bsite-packages\b")
ALLOWED_TAGS = {"nbval-check-output", "raises-exception"}
OBJECT_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")


def _tree(source: str) -> ast.Module | None:
    """The parsed code; None where it is not plain Python: magic (%), shell escape (!), help (?)."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # no text, or absurd nesting
        return None


def _has_semicolon(source: str) -> bool:
    if _tree(source) is None:
        return False
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return any(token.string == ";" for token in tokens)


def _imports(source: str) -> bool:
    tree = _tree(source)
    return bool(tree and tree.body) and isinstance(tree.body[0], ast.Import | ast.ImportFrom)


def _words(markdown: str) -> int:
    """Words a reader reads: a display equation counts none, an inline formula one."""
    text = re.sub(r"\$\$.*?\$\$", " ", markdown, flags=re.S)
    text = re.sub(r"(?<!\\)\$[^$]+\$", "x", text)
    return len(re.findall(r"\S*\w\S*", text))


def _edited(notebook: Notebook, part: str) -> bool:
    stored = notebook.node.metadata.get("executed")
    return not isinstance(stored, dict) or stored.get(part) != metadata(notebook.node)["executed"][part]


def _foreign_metadata(notebook: Notebook) -> bool:
    stored, expected = dict(notebook.node.metadata), metadata(notebook.node)
    return {**stored, "executed": None} != {**expected, "executed": None}


# ---- the guard: the rules ------------------------------------------------------------
# Each is a name and a predicate: what was found, or just True, where the rule is broken; else nothing.

RUN_AGAIN = "run `python tests/notebooks.py execute` with its number"


def _over(limit: int, found: int) -> str:
    return f"{found}" if found > limit else ""


def _match(pattern: str | re.Pattern, text: str) -> str:
    found = re.search(pattern, text)
    return found and repr(found[0])


def _wide_lines(cell: Cell) -> str:
    wide = [f"line {n}: {len(line)}" for n, line in enumerate(cell.lines, 1) if len(line) > 79]
    return ", ".join(wide)


def _misplaced_headings(notebook: Notebook) -> str:
    if not notebook.is_lesson or notebook.headings == HEADINGS:
        return ""
    return f"wanted: {', '.join(HEADINGS)}; found: {', '.join(notebook.headings) or 'none'}"


def _unknown_tags(cell: Cell) -> str:
    allowed = ALLOWED_TAGS if cell.is_code else set()
    return ", ".join(repr(tag) for tag in cell.tags if tag not in allowed)


def _wordless_picture(cell: Cell) -> bool:
    pictures = [o for o in cell.outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]
    return any(not any(isinstance(m, dict) and m.get("alt") for m in o.metadata.values()) for o in pictures)


NOTEBOOK_RULES = (
    ("file over 1 MB", lambda nb: _over(1_000_000, nb.path.stat().st_size)),
    ("over 50 cells", lambda nb: _over(50, len(nb.cells))),
    ("no code", lambda nb: not any(cell.is_code for cell in nb.cells)),
    ("headings are not the nine in order", _misplaced_headings),
    ("code edited since it was run", lambda nb: _edited(nb, "code") and RUN_AGAIN),
    ("output edited since it was made", lambda nb: _edited(nb, "outputs") and RUN_AGAIN),
    ("metadata that execute does not write", lambda nb: _foreign_metadata(nb) and RUN_AGAIN),
)

CELL_RULES = (
    ("empty cell", lambda c: not c.source.strip()),
    ("raw cell", lambda c: c.node.cell_type == "raw"),
    ("cell id that execute does not write", lambda c: c.node.get("id") != cell_id(c.index) and RUN_AGAIN),
    ("cell metadata other than tags", lambda c: ", ".join(map(repr, set(c.node.metadata) - {"tags"}))),
    ("tag not allowed", _unknown_tags),
    ("machine path", lambda c: _match(MACHINE_PATH, f"{c.source}\n{c.output_text}")),
)

MARKDOWN_RULES = (("markdown over 120 words", lambda c: _over(120, _words(c.source))),)

CODE_RULES = (
    # how it is written
    ("prelude does not begin with imports", lambda c: c.number == 1 and not _imports(c.source)),
    ("prelude over 8 lines", lambda c: c.number == 1 and _over(8, len(c.lines))),
    ("code over 15 lines", lambda c: _over(15, len(c.lines))),
    ("code over 79 columns", _wide_lines),
    ("magic or shell escape", lambda c: _tree(c.source) is None or "get_ipython" in c.source),
    ("semicolon", lambda c: _has_semicolon(c.source)),
    ("sys.path", lambda c: re.search(r"\bsys\.path\b|\bfrom sys import\b.*\bpath\b", c.source)),
    ("pip", lambda c: re.search(r"\bpip\b", c.source)),
    ("comment in place of a tag", lambda c: _match(r"#\s*(NBVAL|PYTEST_VALIDATE)_", c.source)),
    # what came out
    ("execution count not in order", lambda c: any(count != c.number for count in c.counts) and RUN_AGAIN),
    ("stderr", lambda c: "stderr" in c.output_types),
    ("widget", lambda c: any("jupyter.widget" in kind for kind in c.output_types)),
    ("object address", lambda c: _match(OBJECT_ADDRESS, c.output_text)),
    ('picture without alt text: end the cell in plots.show("what it shows")', _wordless_picture),
    # what its tags promise
    ("error", lambda c: c.has_error and not c.may_raise),
    ("raises-exception without an error", lambda c: c.may_raise and not c.has_error),
    # nbval accepts a tagged cell that raises nothing, unless it also compares the output.
    ("raises-exception without nbval-check-output", lambda c: c.may_raise and not c.is_checked),
    ("nbval-check-output without text", lambda c: c.is_checked and not c.output_text.strip()),
    ("nbval-check-output on a picture", lambda c: c.is_checked and c.has_picture),
)

RULES = {name for name, _ in (*NOTEBOOK_RULES, *CELL_RULES, *MARKDOWN_RULES, *CODE_RULES)}


@dataclass(frozen=True)
class Complaint:
    """A broken rule; `cell` is the index in the file from 0, None for the notebook as a whole."""

    file: str
    cell: int | None
    rule: str
    found: str = ""

    def __str__(self) -> str:
        place = "notebook" if self.cell is None else f"cell {self.cell}"
        return f"{self.file}: {place}: {self.rule}" + (f" ({self.found})" if self.found else "")


def check(path: Path) -> list[Complaint]:
    """Every rule that the committed notebook breaks."""
    try:
        notebook = read(path)
    except ValueError as error:
        return [Complaint(path.name, None, str(error))]
    judged = [(None, notebook, NOTEBOOK_RULES)]
    for cell in notebook.cells:
        rules = {"code": CODE_RULES, "markdown": MARKDOWN_RULES}.get(cell.node.cell_type, ())
        judged.append((cell.index, cell, CELL_RULES + rules))
    return [
        Complaint(path.name, index, name, found if isinstance(found, str) else "")
        for index, subject, rules in judged for name, is_broken in rules if (found := is_broken(subject))
    ]  # fmt: skip


# ---- what a lesson holds, for the map of equations -----------------------------------


def labels(path: Path) -> set[str]:
    """The n.m of each "(Eq. n.m)" in the notebook's text."""
    return set(re.findall(r"\(Eq\.\s(\d+\.\d+)\)", _prose(read(path))))


def code(path: Path) -> str:
    """The source of all code cells."""
    return "\n\n".join(cell.source for cell in read(path).cells if cell.is_code)


# ---- command line --------------------------------------------------------------------


def find(names: list[str]) -> list[Path]:
    """The notebooks meant by paths or beginnings of names; ValueError for one that fits none."""
    found = []
    for name in names:
        paths = [Path(name)] if Path(name).is_file() else sorted(FOLDER.glob(f"{name}*.ipynb"))
        if not paths:
            raise ValueError(f"names: expected the beginning of a notebook's name, got {name!r}")
        found += paths
    return found


def run_all(paths: list[Path]) -> bool:
    """Execute each notebook and say how long it took; True where all succeeded."""
    succeeded = True
    for path in paths:
        start = time.perf_counter()
        try:
            execute(path)
            error = ""
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
            error = f"  failed, file left as it was\n{failure}"
            succeeded = False
        print(f"{path.name}  {time.perf_counter() - start:.1f} s{error}", flush=True)
    return succeeded


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("execute", "check", "copy"))
    parser.add_argument("names", nargs="*")
    options = parser.parse_args(arguments)
    try:
        paths = find(options.names) if options.command == "copy" else find(options.names or [""])
    except ValueError as error:
        parser.error(str(error))
    if options.command == "copy":
        print(*copy(paths), f"your copy of the lessons is in {LAB.name}/", sep="\n")
        return 0
    if options.command == "execute":
        return 0 if run_all(paths) else 1
    complaints = [complaint for path in paths for complaint in check(path)]
    print(*complaints, sep="\n", end="\n" if complaints else "")
    print(f"{len(paths)} notebooks, {len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
