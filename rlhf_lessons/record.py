"""What a learner has solved, kept beside their own copy of the lessons, which `make lab` makes.

The copy's folder holds RECORD, and a lesson runs in its folder. Elsewhere, as where the lessons themselves are tested,
there is no such file, and nothing is kept.
"""

import json
import os
from datetime import date
from pathlib import Path

RECORD = "solved.json"  # check -> the day on which it was first solved
KEPT = ".kept-"  # in the name of a lesson that was started anew since


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
