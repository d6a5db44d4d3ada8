"""report.html, a run to look into: one page, made of the files in its folder, that asks nothing of the network."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf_lessons.app.options import SOURCES, TITLES
from rlhf_lessons.app.run_folder import read_lines, strict_json
from rlhf_lessons.config import METHODS, PretrainConfig, RewardConfig
from rlhf_lessons.plots.curves import METRICS

TEMPLATE = Path(__file__).with_name("report.html")


def report_page(folder: Path, summary: dict[str, Any], *, title: str, last: int) -> str:
    """The page, as HTML: curves, recorded responses, before and after, settings. What a file lacks is left out.

    summary: as `run_folder.summarise` gives it, of the last so many iterations. No times and no places are in it, so
    that a run which was stopped and continued has the page of one that was not.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = [
        {name: value for name, value in row.items() if not name.startswith("seconds_")}
        for row in read_lines(folder / "metrics.jsonl")
    ]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("iteration", "n"))
    rollouts, samples = folder / "rollouts.jsonl", folder / "samples.json"
    content = {
        "title": title, "words": in_words(config), "summary": summary, "rows": rows,
        "after": "the last iteration" if last == 1 else f"mean of the last {min(last, len(rows))} iterations",
        "labels": {name: METRICS.get(name, (name.replace("_", " "), "neutral")) for name in names},
        "rollouts": read_lines(rollouts) if rollouts.exists() else [],
        "samples": json.loads(samples.read_text(encoding="utf-8")) if samples.exists() else [],
        "settings": settings_tables(config, title),
    }  # fmt: skip
    # In ASCII, without "<": whatever a model wrote can neither end the element that holds it nor break a line.
    return TEMPLATE.read_text(encoding="utf-8").replace("{{run}}", strict_json(content).replace("<", "\\u003c"), 1)


def settings_tables(config: dict[str, Any], title: str) -> list[dict[str, Any]]:
    """The settings that a run has read, section by section, each with its sentence and whether it is the default."""
    sources, method = config.get("sources", {}), config.get("method", "ppo")
    kinds = {method: (title, METHODS[method])}
    if not (sources.get("reward_model") or sources.get("score")):
        kinds["reward"] = (TITLES["reward"], RewardConfig)
    if sources.get("corpus"):
        kinds["pretrain"] = (TITLES["pretrain"], PretrainConfig)
    given = {name: Path(source).name for name, source in sources.items() if source and name in SOURCES}
    tables = [("given", [{"name": name, "value": value, "help": SOURCES[name][2]} for name, value in given.items()])]
    for section, (heading, kind) in kinds.items():
        values = config.get(section, {})
        tables.append((heading, [
            {"name": item.name, "value": values[item.name], "changed": values[item.name] != item.default,
             "help": item.metadata["help"]} for item in fields(kind) if item.name in values
        ]))  # fmt: skip
    return [{"title": heading, "settings": settings} for heading, settings in tables if settings]


def in_words(config: dict[str, Any]) -> str:
    """How the settings of a run's method read together."""
    method = config.get("method", "ppo")
    s = SimpleNamespace(**config[method])
    end = "loses {:g} of its score" if s.missing_eos_mode == "subtract" else "scores −{:g}, whatever it says"
    missing = f"A response that has not ended after {s.max_new_tokens} tokens {end.format(s.missing_eos_penalty)}."
    if method == "best-of-n":
        return (f"Nothing is trained. Each of {s.batch_size} prompts gets {s.n} responses at temperature "
                f"{s.temperature:g}, and the one with the highest score is kept. {missing}")  # fmt: skip
    if method == "dpo":
        return (f"The policy is fitted to the pairs themselves, {s.dpo_epochs:g} times over, {s.dpo_batch_size} in a "
                f"step, with β = {s.kl_coef:g}. It is looked at {s.num_iterations} times on the way, by "
                f"{s.batch_size} responses each. {missing}")  # fmt: skip
    steps = s.ppo_epochs * s.batch_size // s.minibatch_size
    asked = f"{s.samples_per_prompt} to a prompt" if s.samples_per_prompt > 1 else "each to a prompt of its own"
    price = f"{s.kl_coef:g} for each nat of KL from the reference"
    steered = f", at first, then so that the KL stays near {s.adaptive_kl_target:g}" if s.adaptive_kl_target else ""
    rate = f"{s.learning_rate:g}" + (", falling to 0" if s.lr_schedule != "constant" else "")
    return (f"{s.num_iterations} iterations, each of {s.batch_size} responses, {asked}, at temperature "
            f"{s.temperature:g}. A response earns its score less {price}{steered}. {missing} From each batch the "
            f"policy takes {steps} steps: {s.ppo_epochs} passes, {s.minibatch_size} responses a step, at a learning rate "
            f"of {rate}.")  # fmt: skip
