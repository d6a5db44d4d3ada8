"""What a learner has solved, kept beside their own copy of the lessons, which `make lab` makes, and shown.

The copy's folder holds RECORD, and a lesson runs in its folder. Elsewhere, as where the lessons themselves are tested,
there is no such file, and nothing is kept.
"""

import json
import os
import re
from datetime import date
from pathlib import Path

RECORD = "solved.json"  # check -> the day on which it was first solved
KEPT = ".kept-"  # in the name of a lesson that was started anew since
JUDGED = re.compile(r"^checks\.(\w+)\(\w", re.M)  # a check that is given an answer
SECTIONS = {"Your turn": "exercise", "Bug hunt": "hunt"}


def read(folder: Path) -> dict[str, str]:
    """What was solved there. Raises OSError without a record, ValueError for one that cannot be read."""
    kept = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if not isinstance(kept, dict) or not all(isinstance(day, str) for day in kept.values()):
        raise ValueError(f"{folder / RECORD} must map names to days")
    return kept


def write(folder: Path, kept: dict[str, str]) -> None:
    """Keep it, whole or not at all."""
    unfinished = folder / f".{RECORD}.{os.getpid()}.tmp"
    try:
        unfinished.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / RECORD)
    finally:
        unfinished.unlink(missing_ok=True)


def solved(name: str) -> None:
    """Keep the day on which a check was first passed; a record that cannot be kept fails no right answer."""
    try:
        kept = read(Path())
        if name not in kept:
            write(Path(), kept | {name: date.today().isoformat()})
    except (OSError, ValueError):
        return


def checks_in(lesson: Path) -> list[tuple[str, str]]:
    """The checks of a lesson's exercises and hunts, in order: ("exercise" or "hunt", name).

    Raises ValueError, naming it, for a lesson that is no notebook.
    """
    found, section = [], ""
    try:
        for cell in json.loads(lesson.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                section = (re.findall(r"^## (.*?)\s*$", source, re.M) or [section])[-1]
            elif section in SECTIONS:
                found += [(SECTIONS[section], name) for name in JUDGED.findall(source)]
    except (KeyError, TypeError, ValueError) as error:
        again = f"`make lab FRESH={lesson.name[:2]}` starts the lesson anew and keeps this file"
        raise ValueError(f"{lesson} must be a notebook; got something else ({again})") from error
    return found


def progress_table(folder: Path) -> str:
    """A Markdown table, a row for each check of the lessons in a folder that `make lab` made, and the count.

    Raises ValueError for a folder without a record, and for a lesson that is no notebook.
    """
    try:
        done = read(folder)
        lessons = [lesson for lesson in sorted(folder.glob("[0-9][0-9]_*.ipynb")) if KEPT not in lesson.name]
    except FileNotFoundError as error:
        raise ValueError(f"{folder} must hold a copy of the lessons, which `make lab` makes; got none") from error
    rows = [(lesson.stem.replace("_", " "), kind, name, done.get(name, ""))
            for lesson in lessons for kind, name in checks_in(lesson)]  # fmt: skip
    table = [("lesson", "kind", "check", "solved"), ("---",) * 4, *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([*lines, "", f"{sum(bool(row[3]) for row in rows)} of {len(rows)} solved"])
