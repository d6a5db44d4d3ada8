"""Plant one mistake at a time and see the tests fail: `python tests/mutants.py [WORDS]`.

The registry is `mistakes.txt` beside this file, one mistake a line: module ||| what stands there ||| what is put in
its place ||| tests that must notice. Each mistake goes into a copy of the project, never into the project itself.
WORDS choose the mistakes whose line contains one of them. Exits 1 when a mistake survives, 2 when one does not match
exactly once. With --report FILE, the outcome is written as a Markdown table.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
REGISTRY = Path(__file__).with_name("mistakes.txt")
COPIED = ("rlhf_lessons", "tests", "pyproject.toml")
SECONDS = 300  # a mistake that hangs its tests has been noticed too


@dataclass(frozen=True)
class Mistake:
    """One line of the registry; line breaks in a snippet are written as ⏎."""

    module: str
    original: str
    replacement: str
    tests: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> "Mistake":
        module, original, replacement, tests = (part.strip(" ") for part in line.rstrip("\n").split("|||"))
        return cls(module, original.replace("⏎", "\n"), replacement.replace("⏎", "\n"), tuple(tests.split()))

    @property
    def source(self) -> Path:
        """The module's path in the project."""
        return ROOT / "rlhf_lessons" / self.module


def read_registry() -> list[Mistake]:
    """All mistakes. Raises ValueError for one whose original does not stand in its module exactly once."""
    lines = REGISTRY.read_text(encoding="utf-8").split("\n")
    mistakes = [Mistake.parse(line) for line in lines if line and not line.startswith("#")]
    for mistake in mistakes:
        found = mistake.source.read_text(encoding="utf-8").count(mistake.original)
        if found != 1:
            raise ValueError(f"{mistake.module}: found {found} times, not once: {mistake.original!r}")
    return mistakes


def working_copy(folder: Path) -> Path:
    """A copy of the project to plant mistakes in."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder)
    return folder


def first_failure(copy: Path, tests: tuple[str, ...], seconds: int | None = SECONDS) -> str | None:
    """Run these tests in a copy, for so long at most. Returns the first that fails, or None."""
    paths = [f"tests/{name}" for name in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *paths]
    # Tests that start a program of their own are to find the copy too, not what is installed.
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "time limit"
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0].split(" ", 1)[1] if failed else f"exit code {done.returncode}"


def notice(mistake: Mistake, copies: Queue) -> str | None:
    """Run the tests on a copy with the mistake in it. Returns the test that noticed, or None when none did."""
    copy = copies.get()
    target = copy / "rlhf_lessons" / mistake.module
    sound = target.read_text(encoding="utf-8")
    target.write_text(sound.replace(mistake.original, mistake.replacement), encoding="utf-8")
    try:
        return first_failure(copy, mistake.tests)
    finally:
        target.write_text(sound, encoding="utf-8")
        copies.put(copy)


def check_sound(tests: list[str], copies: Queue) -> str | None:
    """Tests that fail without a mistake would notice anything: the first such failure, or None."""
    copy = copies.get()
    try:
        return first_failure(copy, tuple(tests), seconds=None)  # all of them may take longer
    finally:
        copies.put(copy)


def report(outcomes: list[tuple[Mistake, str | None]]) -> str:
    """The outcomes as a Markdown page."""
    caught = sum(test is not None for _, test in outcomes)
    lines = [
        "# Planted mistakes and the tests that notice them",
        "",
        f'{caught} of {len(outcomes)} mistakes are noticed. Made by `make mutants ARGS="--report tests/MUTANTS.md"`.',
        "",
        "| module | sound | planted | noticed by |",
        "| --- | --- | --- | --- |",
    ]
    for mistake, test in outcomes:
        cells = (mistake.original, mistake.replacement or "(nothing)")
        sound, planted = ("`" + cell.replace("\n", " ⏎ ").replace("|", "\\|") + "`" for cell in cells)
        lines.append(f"| {mistake.module} | {sound} | {planted} | {test or '**none**'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only the mistakes whose line contains one of these")
    parser.add_argument("--report", type=Path, help="write the outcome to this Markdown file")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    try:
        mistakes = read_registry()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    chosen = [m for m in mistakes if not arguments.words or any(word in repr(m) for word in arguments.words)]
    started = time.perf_counter()
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(arguments.workers) as pool:
        copies: Queue = Queue()
        for number in range(arguments.workers):
            copies.put(working_copy(Path(scratch) / str(number)))
        unsound = check_sound(sorted({test for mistake in chosen for test in mistake.tests}), copies)
        if unsound:
            print(f"fails without any mistake: {unsound}", file=sys.stderr)
            return 2
        for mistake, test in zip(chosen, pool.map(lambda m: notice(m, copies), chosen), strict=True):
            outcomes.append((mistake, test))
            print(f"{'noticed ' if test else 'SURVIVES'}  {mistake.module}: {mistake.original!r} -> "
                  f"{mistake.replacement!r}  {test or ''}", flush=True)  # fmt: skip
    survivors = sum(test is None for _, test in outcomes)
    print(f"{len(outcomes) - survivors} noticed, {survivors} survived, {time.perf_counter() - started:.0f} s")
    if arguments.report:
        arguments.report.write_text(report(outcomes), encoding="utf-8")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
