"""A run's folder: what is written while it goes on, and the pictures and samples that it ends in.

    config.json      all settings, the command, versions
    before.json      what the base model's responses were worth
    metrics.jsonl    one line per iteration
    rollouts.jsonl   of some fifty iterations a few responses, token by token
    samples.json     before and after, side by side; samples.md: the same to read
    report.html      the run to look into, in a browser: curves, responses token by token, before and after, settings
    summary.json     before and after, in numbers; written last, so that it tells a finished run from a stopped one
    figures/*.png    curves, and one response token by token
    tensorboard/     the metrics once more, for TensorBoard, if asked for
    policy/ reward_model/ base_model/    Hugging Face checkpoints
    checkpoint/      while the run goes on, or was stopped: what it continues from

Of several processes the first alone writes; the others read what it wrote, so the folder is one that all of them see.
Whole files are written beside their place and then moved there, so that a run that is stopped leaves none half-written.
Pictures, page and summary are made of the files above them, so that they can be made again.
"""

import contextlib
import json
import math
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt

from rlhf_lessons import plots
from rlhf_lessons.app.options import EVERY
from rlhf_lessons.checkpoint import written_whole
from rlhf_lessons.device import process, told
from rlhf_lessons.models import quiet_transformers

CHECKPOINT = "checkpoint"
ITERATIONS = ("metrics.jsonl", "rollouts.jsonl")  # files with lines of an iteration
LAST = 5  # iterations over which "at the end" is averaged


def versions() -> dict[str, str]:
    """Of what a result depends on most: python, torch, transformers."""
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


class RunFolder:
    """Writes into one run's folder. Raises ValueError when a new run's already holds a run, or anything else.

    A folder with config.json alone is taken: its run ended before it made anything.
    """

    def __init__(self, path: str | Path, *, new: bool = True, every: int = EVERY) -> None:
        self.path, self.new, self.every, self.follow = Path(path), new, every, lambda iteration, metrics: None
        self.state, self.first = self.path / CHECKPOINT / "state.safetensors", process()[0] == 0
        if not self.first:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        held = sorted(item.name for item in self.path.iterdir() if item.name != "config.json")
        if held and new:
            advice = f", whose run --resume {self.path} continues" if CHECKPOINT in held else ""
            held = ", ".join(held[:5])
            raise ValueError(f"--out must be a new or an empty folder; {self.path} already holds {held}{advice}")

    def made(self) -> set[str]:
        """Names of what was made here, settings and lock aside."""
        return {item.name for item in self.path.rglob("*")} - {CHECKPOINT, "lock", "config.json"}

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep others out of the folder, and its checkpoint/ until the run has ended well or has made nothing.

        What a process that was killed left half-written is removed. Raises ValueError where another is at work.
        """
        from filelock import FileLock, Timeout

        place = self.state.parent
        ours = not place.exists()
        place.mkdir(exist_ok=True)
        lock = FileLock(place / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"{self.path}: another process is at work in this folder") from error
        if self.new and self.made():  # since it was looked at, before inputs and models were read
            lock.release()
            if ours:
                shutil.rmtree(place)
            raise ValueError(f"{self.path}: another process has been at work in this folder")
        for partial in [*self.path.glob("*.partial"), *place.glob("*.partial")]:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        ended = False
        try:
            yield
            ended = True
        finally:
            if ended or not self.made():
                shutil.rmtree(place)
            lock.release()

    def whole(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A place to write a file or a folder to; moved to `name` once all of it is there, else removed."""
        return written_whole(self.path / name) if self.first else contextlib.nullcontext(Path(os.devnull))

    def go_on_after(self, iteration: int) -> None:
        """Take back the lines of what came after an iteration."""
        for name in ITERATIONS:
            path = self.path / name
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
            if kept != lines:
                self.write_text(name, "".join(kept))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        with self.whole(name) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # what a shell passed on as no text

    def write_json(self, name: str, content: dict | list) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(name, strict_json(content, indent=2, ensure_ascii=False) + "\n")

    def write_numbers(self, name: str, content: dict | list) -> None:
        """Write a JSON file, whole or not at all, its numbers to six digits."""
        self.write_json(name, rounded(content))

    def write_config(self, settings: dict, command: Sequence[str]) -> None:
        """config.json: the settings, the command line, the versions and the GPU, if any, that made the run."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        made_by = {"command": ["python", "-m", "rlhf_lessons", *command], **versions(), "gpu": gpu}
        made_by |= {"processes": process()[1]} if process()[1] > 1 else {}
        self.write_json("config.json", settings | {"made_by": made_by})

    def append_metrics(self, iteration: int, metrics: dict[str, float]) -> None:
        """Add one line to metrics.jsonl, whole or not at all; then tell who follows the run."""
        self.append("metrics.jsonl", [{"iteration": iteration} | metrics])
        self.follow(iteration, metrics)

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to a file of JSON lines, all of them or none, their numbers to six digits."""
        lines = "".join(strict_json(rounded(row)) + "\n" for row in rows)
        path = self.path / name if self.first else Path(os.devnull)
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(lines)
        except BaseException as error:  # Ctrl-C too
            if path.exists():
                os.truncate(path, size)
            if isinstance(error, OSError):
                error.filename = str(path)
            raise

    def save_models(self, name: str, model: Any, *others: Any, **options: Any) -> Path:
        """Save what shares a folder (anything with save_pretrained), whole or not at all; then every process may read.

        options: of the first one's save_pretrained.
        """
        with self.whole(name) as partial, quiet_transformers():
            try:
                for part in (model, *others) if self.first else ():
                    part.save_pretrained(partial, **(options if part is model else {}))
            except OSError:
                raise
            except Exception as error:  # of safetensors and tokenizers, which have no OSError for a full disk
                raise ValueError(f"cannot write {self.path / name}: {error}") from error
        told(None)
        return self.path / name


def strict_json(content: Any, **options: Any) -> str:
    """The content as JSON that any program reads: null in the place of a number that is not finite."""
    finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
    return json.dumps(finite, allow_nan=False, **options)


def rounded(content: Any) -> Any:
    """The content, each number in it to six digits after the point."""
    if isinstance(content, dict):
        return {name: rounded(value) for name, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return round(content, 6) if isinstance(content, float) else content


def with_nan(numbers: dict[str, float | None]) -> dict[str, float]:
    """Numbers as `strict_json` wrote them, NaN in the place of null."""
    return {name: math.nan if value is None else value for name, value in numbers.items()}


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl file, or of the one in a run's folder; a last line cut short is left out.

    What was no finite number when it was written is NaN.
    """
    path = Path(path)
    return [with_nan(row) for row in read_lines(path / "metrics.jsonl" if path.is_dir() else path)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, up to one that was cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(dict(json.loads(line).items()))
        except (json.JSONDecodeError, AttributeError):  # half a line may be a number
            break
    return rows


def mean_of_last(rows: list[dict], name: str, last: int = LAST) -> float:
    """Mean of one metric over the last iterations. Raises ValueError for no rows."""
    if not rows:
        raise ValueError("rows must hold at least one iteration; got none")
    values = [row[name] for row in rows[-last:]]
    return sum(values) / len(values)


def summarise(path: Path, *, last: int) -> dict[str, dict[str, float]]:
    """A run's numbers before and after, from its folder's files; after: the mean of the last iterations."""
    rows, before = read_metrics(path), with_nan(json.loads((path / "before.json").read_text(encoding="utf-8")))
    names = [name for name in ("score", "gold", "kl") if rows and name in rows[-1]]
    after = rounded({name: mean_of_last(rows, name, last=last) for name in names})
    evaluated = {name: value for name, value in (rows or [{}])[-1].items() if name.startswith("eval_")}
    return {"before": before, "after": after | evaluated}


def longest_response(path: Path) -> tuple[list[str], dict[str, list[float]]]:
    """The tokens of the longest response that ended in the last iteration of rollouts.jsonl, and what is known of each.

    Where none ended, the first one.
    """
    responses = read_lines(path / "rollouts.jsonl")
    last = [response for response in responses if response["iteration"] == responses[-1]["iteration"]]
    longest = max(last, key=lambda response: len(response["tokens"]) * response["ended"])
    shown = {name: longest[name] for name in ("reward", "kl", "value", "advantage") if name in longest}
    return [token.strip(" ") for token in longest["tokens"]], shown


def samples_table(samples: list[dict]) -> str:
    """Before and after as a Markdown document. samples: dicts with `prompt`, `before`, `after`, each of the last two
    a dict with `text`, `score` and perhaps `gold`."""
    numbers = ["score"] + (["gold"] if samples and "gold" in samples[0]["before"] else [])
    lines = ["# Before and after", ""]
    for sample in samples:
        lines.append(f"**{' '.join(sample['prompt'].split()) or '(begin token alone)'}** …\n")
        lines.append("| | " + " | ".join(numbers) + " | response |")
        lines.append("| --- |" + " ---: |" * len(numbers) + " --- |")
        for side in ("before", "after"):
            values = " | ".join(f"{sample[side][name]:.2f}" for name in numbers)
            text = " ".join(sample[side]["text"].split()).replace("|", "\\|")
            lines.append(f"| {side} | {values} | {text} |")
        lines.append("")
    return "\n".join(lines)


def draw_run(folder: RunFolder, rows: list[dict], tokens: list[str], per_token: dict[str, list[float]]) -> None:
    """Write a run's pictures: its curves, and one response token by token."""
    plots.use_style()
    with folder.whole("figures") as partial:
        figures = {"training": plots.training_curves(rows), "tokens": plots.token_view(tokens, per_token)}
        for name, figure in figures.items():
            plots.save(figure, partial / f"{name}.png")
            plt.close(figure)


def summary_table(folders: list[Path]) -> str:
    """A Markdown table of runs, one a row: method, β, seed, and before → after (mean of the last iterations).

    A run that was stopped says after how many iterations. Raises ValueError for a folder that holds no run.
    """
    lines = ["| run | method | β | seed | proxy reward | gold reward | KL (nats) |",
             "| --- | --- | ---: | ---: | --- | --- | ---: |"]  # fmt: skip
    for folder in map(Path, folders):
        with holding_a_run(folder):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            method = config.get("method", "ppo")
            settings = config[method]
            beta = f"{settings['kl_coef']:g}" if "kl_coef" in settings else "–"
            start = f"| {folder.name} | {method} | {beta} | {settings['seed']} "
            lines.append(start + " ".join(f"| {cell}" for cell in what_came_of(folder, settings)) + " |")
    return "\n".join(lines)


@contextlib.contextmanager
def holding_a_run(folder: Path) -> Iterator[None]:
    """Read from a run's folder within it. Raises ValueError, naming the folder, where no run can be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder}: holds no run ({reason})") from error


def what_came_of(folder: Path, settings: dict[str, Any]) -> tuple[str, str, str]:
    """Proxy reward, gold reward and KL of a run as a table shows them; of a stopped one, after how many iterations."""
    if not (folder / "summary.json").exists():
        done, of = len(read_metrics(folder)), settings.get("num_iterations", "its")
        return f"stopped after {done} of {of} iterations", "–", "–"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    before, after = with_nan(summary["before"]), with_nan(summary["after"])
    gold = f"{before['gold']:.2f} → {after['gold']:.2f}" if "gold" in after else "–"
    return f"{before['score']:.2f} → {after['score']:.2f}", gold, f"{after['kl']:.1f}"
