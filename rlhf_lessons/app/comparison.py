"""Runs beside one another: a table of the settings in which they differ and what came of each, and their curves."""

import json
from pathlib import Path
from typing import Any

from rlhf_lessons import plots
from rlhf_lessons.app.run_folder import holding_a_run, mean_of_last, read_metrics, what_came_of


def compare(folders: list[Path], out: Path) -> str:
    """A Markdown table of runs, one a column, and in a picture, `out`, their curves, one over another.

    Rows: the settings that are not the same in all of them, "–" where a run has none such, then what came of each.
    Raises ValueError for fewer than two runs, a folder that holds none, or a picture that is there already.
    """
    short = [folder.resolve().name for folder in folders]
    labels = short if len({*short}) == len(short) else list(map(str, folders))
    if len({*labels}) < max(2, len(labels)):
        raise ValueError(f"FOLDER must name two runs or more, each once; got {', '.join(labels)}")
    if out.exists() or out.suffix != ".png":
        raise ValueError(f"--out must be a new file that ends in .png; got {out}")
    settings, cells, runs = [], [], {}
    for label, folder in zip(labels, folders, strict=True):
        with holding_a_run(folder):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            settings.append(flat(config))
            cells.append(what_came_of(folder, config[config.get("method", "ppo")]))
            runs[label] = read_metrics(folder)
            mean_of_last(runs[label], "iteration")  # refuses a run of no iteration, which has no curve
    names = dict.fromkeys(name for each in settings for name in each)
    rows = [(name, *(str(each.get(name, "–")) for each in settings)) for name in names]
    rows = [row for row in rows if len({*row[1:]}) > 1]
    rows += zip(("proxy reward", "gold reward", "KL (nats)"), *cells, strict=True)
    plots.use_style()
    plots.save(plots.training_curves(runs), out)
    table = [("", *labels), ("---", *["---"] * len(labels)), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """All settings of a config.json by their names, which differ between sections; inputs by their first digits."""
    method = config.get("method", "ppo")
    found = {"method": method} | {name: value for name, value in config.items() if not isinstance(value, dict)}
    for section in ("sources", method, "model", "reward", "pretrain"):
        found |= {name: value for name, value in config.get(section, {}).items() if value is not None}
    return found | {f"{name} (SHA-256)": str(digest)[:12] for name, digest in config.get("inputs", {}).items()}
