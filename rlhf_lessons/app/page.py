"""report.html, a run to look into: one page, made of the files in its folder, that asks nothing of the network."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlhf_lessons.app.options import KINDS, SOURCES, TITLES, WHAT
from rlhf_lessons.app.run_folder import read_lines, strict_json
from rlhf_lessons.config import METHODS
from rlhf_lessons.plots.curves import METRICS

TEMPLATE = Path(__file__).with_name("report.html")


def report_page(folder: Path, summary: dict[str, Any], *, title: str, last: int) -> str:
    """The page, as HTML: curves, recorded responses, before and after, settings. What a file lacks is left out.

    summary: as `run_folder.summarise` gives it, of the last so many iterations. No times and no places are in it, so
    that a run which was stopped and continued has the page of one that was not.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    measured = read_lines(folder / "metrics.jsonl")
    rows = [{name: row[name] for name in row if not name.startswith("seconds_")} for row in measured]
    names, method = {name for row in rows for name in row} - {"iteration", "n"}, config.get("method", "ppo")
    rollouts, samples = folder / "rollouts.jsonl", folder / "samples.json"
    content = {
        "title": title, "method": method, "given": config[method], "summary": summary, "rows": rows,
        "after": "the last iteration" if last == 1 else f"mean of the last {min(last, len(rows))} iterations",
        "labels": {name: METRICS.get(name, (name.replace("_", " "), "neutral")) for name in sorted(names)},
        "rollouts": read_lines(rollouts) if rollouts.exists() else [],
        "samples": json.loads(samples.read_text(encoding="utf-8")) if samples.exists() else [],
        "settings": settings_tables(config, method),
    }  # fmt: skip
    # In ASCII, without "<": whatever a model wrote can neither end the element that holds it nor break a line.
    return TEMPLATE.read_text(encoding="utf-8").replace("{{run}}", strict_json(content).replace("<", "\\u003c"), 1)


def settings_tables(config: dict[str, Any], method: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """What a run was given and the settings that it has read, section by section, each with its sentence."""
    sources = config.get("sources", {})
    given = {name: Path(source).name for name, source in sources.items() if source and name in SOURCES}
    tables = [("given", [{"name": name, "value": value, "help": WHAT[name]} for name, value in given.items()])]
    made = {"model": True, "pretrain": "corpus" in given, "reward": not {"reward_model", "score"} & given.keys()}
    for section in (method, *filter(made.get, made)):
        kind = METHODS[method] if section == method else KINDS[section]
        read = [item for item in fields(kind) if item.name in config.get(section, {})]
        tables.append((TITLES.get(section, "the method"), [
            {"name": item.name, "value": (value := config[section][item.name]), "changed": value != item.default,
             "help": item.metadata["help"]} for item in read
        ]))  # fmt: skip
    return [table for table in tables if table[1]]
