"""A run's folder: what is written while it goes on, and the pictures and samples that it ends in.

    config.json      all settings, the command, versions
    metrics.jsonl    one line per PPO iteration
    summary.json     before and after, in numbers
    samples.md       before and after, side by side
    figures/*.png    curves, and one response token by token
    policy/ reward_model/ base_model/    Hugging Face checkpoints

Whole files are written beside their place and then moved there, so that a run that is stopped leaves none half-written.
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf_lessons.models import quiet_transformers

LAST = 5  # iterations over which "at the end" is averaged


class RunFolder:
    """Writes into one run's folder. Raises ValueError when the folder already holds a run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if (self.path / "config.json").exists():
            raise ValueError(f"--out {self.path} already holds a run; name another folder")
        self.path.mkdir(parents=True, exist_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def write_json(self, name: str, content: dict) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_config(self, settings: dict) -> None:
        """config.json: the settings, the command line and the versions that made the run."""
        import transformers

        made_by = {
            "command": ["python", "-m", "rlhf_lessons", *sys.argv[1:]],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self.write_json("config.json", settings | {"made_by": made_by})

    def append_metrics(self, iteration: int, metrics: dict[str, float]) -> None:
        """Add one line to metrics.jsonl."""
        line = json.dumps({"iteration": iteration} | {name: round(value, 6) for name, value in metrics.items()})
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save_models(self, name: str, *parts) -> Path:
        """Save models and tokenizers that share a folder (anything with save_pretrained), whole or not at all."""
        target, partial = self.path / name, self.path / f"{name}.partial"
        try:
            with quiet_transformers():
                for part in parts:
                    part.save_pretrained(partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl file, or of the one in a run's folder; a last line cut short is left out."""
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def mean_of_last(rows: list[dict], name: str, last: int = LAST) -> float:
    """Mean of one metric over the last iterations."""
    values = [row[name] for row in rows[-last:]]
    return sum(values) / len(values)


def progress(total: int, label: str) -> Callable[..., None]:
    """A progress callback: a bar with time left on a terminal, a line every tenth of the way elsewhere.

    The callback takes the number of steps done and the metrics to show, e.g. update(3, KL=2.1).
    """
    from tqdm import tqdm

    bar = tqdm(total=total, desc=label, disable=None, leave=True, dynamic_ncols=True)

    def update(done: int, **shown: float) -> None:
        text = "  ".join(f"{name} {value:.2f}" for name, value in shown.items())
        if bar.disable:
            if done * 10 // total > (done - 1) * 10 // total:
                print(f"{label} {done}/{total}  {text}", file=sys.stderr, flush=True)
            return
        bar.set_postfix_str(text, refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return update


def samples_table(samples: list[dict]) -> str:
    """Before and after as a Markdown document. samples: dicts with `prompt`, `before`, `after`, each of the last two
    a dict with `text`, `score` and perhaps `gold`."""
    numbers = ["score"] + (["gold"] if samples and "gold" in samples[0]["before"] else [])
    lines = ["# Before and after", ""]
    for sample in samples:
        lines.append(f"**{sample['prompt'] or '(begin token alone)'}** …\n")
        lines.append("| | " + " | ".join(numbers) + " | response |")
        lines.append("| --- |" + " ---: |" * len(numbers) + " --- |")
        for side in ("before", "after"):
            values = " | ".join(f"{sample[side][name]:.2f}" for name in numbers)
            text = sample[side]["text"].replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {side} | {values} | {text} |")
        lines.append("")
    return "\n".join(lines)


def draw_run(folder: RunFolder, rows: list[dict], tokens: list[str], per_token: dict[str, list[float]]) -> None:
    """Write a run's pictures: its curves, and one response token by token."""
    from rlhf_lessons import plots

    plots.use_style()
    (folder.path / "figures").mkdir(exist_ok=True)
    plots.save(plots.training_curves(rows), folder.path / "figures" / "training.png")
    plots.save(plots.token_view(tokens, per_token), folder.path / "figures" / "tokens.png")


def summary_table(folders: list[Path]) -> str:
    """A Markdown table of finished runs, one a row: β, seed, and before → after (mean of the last iterations)."""
    lines = ["| run | β | seed | proxy reward | gold reward | KL (nats) |", "| --- | ---: | ---: | --- | --- | ---: |"]
    for folder in folders:
        try:
            config, summary = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: not a finished run ({error})") from error
        before, after = summary["before"], summary["after"]
        gold = f"{before['gold']:.2f} → {after['gold']:.2f}" if "gold" in after else "–"
        lines.append(
            f"| {folder.name} | {config['ppo']['kl_coef']:g} | {config['ppo']['seed']} "
            f"| {before['score']:.2f} → {after['score']:.2f} | {gold} | {after['kl']:.1f} |"
        )
    return "\n".join(lines)
