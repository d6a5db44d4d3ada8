"""What makes a stopped run go on: its stages' states, the arguments that it began with, and that all is as it was."""

import argparse
import hashlib
import inspect
import json
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from rlhf_lessons.app.inputs import FILES, Inputs
from rlhf_lessons.app.options import typed
from rlhf_lessons.app.run_folder import CHECKPOINT, RunFolder, versions
from rlhf_lessons.checkpoint import Keeper, save_state
from rlhf_lessons.device import process, told
from rlhf_lessons.display import say

STEPS = 10  # of a fit, in the time of an iteration


class Stage(Keeper):
    """A stage's state in the folder of a run that goes on. While one is entered, Ctrl-C waits for the step's end.

    each: steps in the time of an iteration; beside: what is kept beside the state that is offered. A second Ctrl-C does
    not wait.
    """

    def __init__(self, folder: RunFolder, name: str, *, each: int = 1, beside: Callable[[], dict] = dict) -> None:
        super().__init__(folder.state, every=each * folder.every)
        self.name, self.beside, self.asked = name, beside, False

    def load(self) -> dict[str, Any] | None:
        """The state that was kept of this very stage, or None."""
        kept = super().load()
        return kept["state"] if kept and kept["stage"] == self.name else None

    def offer(self, done: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Keep the state after every so many steps, and where the user asked to stop: raises KeyboardInterrupt then."""
        self.asked = any(told(self.asked))
        if done % self.every == 0 or self.asked:
            kept = {"stage": self.name, "state": {**state(), **self.beside()}}  # which processes may have to gather
            if process()[0] == 0:
                save_state(self.path, kept)
        if self.asked:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        def ask(number: int, frame: Any) -> None:
            self.asked = True
            alone = process()[1] == 1  # of several all stop after one step, and a launcher passes on what each has got
            signal.signal(number, signal.default_int_handler if alone else signal.SIG_IGN)
            say("\nstopping after this step" + alone * "; once more, and it stops at once")

        # Where another handler is at work, or none, and outside of the main thread, Ctrl-C is not ours.
        in_main = threading.current_thread() is threading.main_thread()
        self.ours = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.ours:
            signal.signal(signal.SIGINT, ask)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if error[0] is None and any(told(self.asked)):  # in a step that was not to be kept
            raise KeyboardInterrupt


def original(arguments: argparse.Namespace, parse: Callable[[list[str]], argparse.Namespace]) -> argparse.Namespace:
    """The arguments that the run which `--resume` names began with, its folder, and (`begun`) its config.json.

    Raises ValueError for a folder that holds no run, or one that has finished; and for an option beside `--resume` that
    is not the run's own.
    """
    folder = arguments.resume
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        command = [str(word) for word in config["made_by"]["command"][3:]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: holds no run that could go on ({type(error).__name__}: {error})") from error
    if not (folder / CHECKPOINT).is_dir():
        raise ValueError(f"{folder}: its run has finished; --out begins another")
    own, unsaid = parse(command), vars(parse(["run"]))
    for name, value in vars(arguments).items():
        kept = getattr(own, name, None)
        if name not in ("command", "words", "resume") and value not in (unsaid.get(name), kept, folder):
            how = f"as the run began ({kept}), or not at all"
            raise ValueError(f"give --{typed(name)} {how}, with --resume; got {value}")
    own.resume, own.out, own.begun, own.threads = folder, folder, config, config.get("threads")
    return own


def check_unchanged(config: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    """Raise ValueError for a run whose settings or inputs are not today what its config.json says of them."""
    for section, now in json.loads(json.dumps(described)).items():
        then = config.get(section)
        then, now = (then, now) if isinstance(then, dict) else ({section: then}, {section: now})
        for name, before, after in ((name, then.get(name), now.get(name)) for name in {**then, **now}):
            if before != after and section == "inputs":
                source = described["sources"].get(name)
                raise ValueError(f"{name} must be what the run began with; {source} has changed")
            if before != after:
                raise ValueError(f"{name} must be {before!r}, as the run began, to go on; got {after!r}")
    if (then := config["made_by"]) and any(then.get(name) != version for name, version in versions().items()):
        say("careful: the run began with other versions, and may not end as it would have")


def digest(source: str) -> str | None:
    """SHA-256 of a file, or of all files of a folder; None for what is neither, such as a name on the hub."""
    path, total = Path(source), hashlib.sha256()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        return None
    for file in files:
        with open(file, "rb") as opened:
            total.update(str(file.relative_to(path)).encode() + hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


def digests(inputs: Inputs) -> dict[str, str | None]:
    """Of each input: the texts as they were read, the files of the models and of a score of one's own."""
    texts = {name: read for name in FILES if (read := getattr(inputs, name))}
    found = {name: hashlib.sha256(json.dumps(read).encode()).hexdigest() for name, read in texts.items()}
    sources = {name: model.name for name in ("model", "reward_model") if (model := getattr(inputs, name))}
    if inputs.score is not None:
        score = inspect.unwrap(inputs.score)
        score = getattr(score, "func", score)  # of a functools.partial, what it calls
        sources["score"] = inspect.getsourcefile(score if hasattr(score, "__code__") else type(score)) or ""
    return found | {name: digest(source) for name, source in sources.items()}
