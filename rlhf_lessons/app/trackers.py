"""Experiment trackers, TensorBoard, Weights & Biases and others, fed by accelerate with what metrics.jsonl gets."""

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_lessons.config import require
from rlhf_lessons.device import known_trackers, make_accelerator
from rlhf_lessons.display import say

PROJECT = "rlhf_lessons"


def hyperparameters(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The content of config.json as every tracker takes it: "ppo/kl_coef", as text what is neither number nor text."""
    parts = {above: part if isinstance(part, dict) else {"": part} for above, part in settings.items()}
    flat = {f"{above}/{name}".strip("/"): value for above, part in parts.items() for name, value in part.items()}
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in flat.items()}


@contextlib.contextmanager
def tracked(names: Collection[str], folder: Path, *, device: str) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """The function (iteration, metrics) by which the trackers of these names follow a run, until it ends.

    folder: the run's, with its config.json, which they are told first; TensorBoard writes to `tensorboard/` in it.
    Raises ValueError for a tracker that accelerate does not know, that is not installed, or that cannot begin. One that
    fails later is left out from there on; that is said, and no reason to end a run.
    """
    known = known_trackers() if names else {}
    for name in names:
        how = f"installed: pip install {name.replace('_', '-')}" if name in known else f"one of {', '.join(known)}"
        require("log_with", name, known.get(name, False), how)
    settings = hyperparameters(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    own = {"wandb": {"name": folder.name, "dir": str(folder)}, "trackio": {"name": folder.name}}
    running = {name: make_accelerator(device, log_with=name, project_dir=str(folder)) for name in names}
    for name, accelerator in running.items():
        try:
            accelerator.init_trackers(name if name == "tensorboard" else PROJECT, settings, own)
        except Exception as error:  # each tracker has its own: no network, no login
            raise ValueError(f"log_with must name trackers that can begin; got {name}: {error}") from error

    def tell(what: str, *arguments: Any, **options: Any) -> None:
        for name, accelerator in [*running.items()]:
            try:
                getattr(accelerator, what)(*arguments, **options)
            except Exception as error:
                del running[name]
                say(f"{name}: nothing more is logged: {type(error).__name__}: {error}")

    try:
        yield lambda iteration, metrics: tell("log", metrics, step=iteration)
    finally:
        tell("end_training")
