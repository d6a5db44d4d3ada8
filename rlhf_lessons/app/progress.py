"""`progress`: which exercises and hunts of their copy of the lessons a learner has solved."""

import json
import re
from pathlib import Path

from rlhf_lessons.record import KEPT, read

JUDGED = re.compile(r"^checks\.(\w+)\(\w", re.M)  # a check that is given an answer
SECTIONS = {"Your turn": "exercise", "Bug hunt": "hunt"}


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
        solved = read(folder)
        lessons = [lesson for lesson in sorted(folder.glob("[0-9][0-9]_*.ipynb")) if KEPT not in lesson.name]
    except FileNotFoundError as error:
        raise ValueError(f"{folder} must hold a copy of the lessons, which `make lab` makes; got none") from error
    rows = [(lesson.stem.replace("_", " "), kind, name, solved.get(name, ""))
            for lesson in lessons for kind, name in checks_in(lesson)]  # fmt: skip
    table = [("lesson", "kind", "check", "solved"), ("---",) * 4, *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([*lines, "", f"{sum(bool(row[3]) for row in rows)} of {len(rows)} solved"])
