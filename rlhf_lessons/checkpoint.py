"""What a stopped fit or run continues from: its state in one safetensors file, whole or not at all, nothing pickled."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

FORMAT = "rlhf_lessons checkpoint 1"


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A place to write a file or a folder to; moved to `target` once all of it is there, else removed."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        yield partial
        if partial.is_dir() and target.is_dir():
            shutil.rmtree(target)  # a folder takes the place of an empty one alone
        os.replace(partial, target)
    except OSError as error:
        error.filename, error.filename2 = str(target), None  # a full disk names no file
        raise
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)


def save_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a state: dicts, lists and tuples, nested, of tensors, numbers, texts, truth values and None.

    A tensor that stands in several places, as a tied weight does, is written once. What stood there before stays until
    all is written. Raises ValueError for anything else in it, and for tensors of which one is a part of another.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple, str] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            which = (value.data_ptr(), value.dtype, value.shape, value.stride())
            name = seen.setdefault(which if value.numel() else (len(seen),), str(len(seen)))
            tensors.setdefault(name, value.detach().cpu().contiguous())
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"dict": [[key, plain(item)] for key, item in value.items()]}  # keys may be numbers
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [plain(item) for item in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError(f"state must hold tensors, numbers, texts and None; got {type(value).__name__}")

    written = json.dumps(plain(state))
    with written_whole(Path(path)) as partial:
        try:
            save_file(tensors, partial, metadata={"format": FORMAT, "state": written})
        except (SafetensorError, RuntimeError) as error:  # which have no OSError for a full disk
            raise ValueError(f"cannot write {path}: {error}") from error


def load_state(path: str | Path) -> dict[str, Any]:
    """A state that `save_state` wrote, its tensors on the CPU. Raises ValueError for a file that is not whole."""
    try:
        with safe_open(str(path), framework="pt") as file:
            written = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        if written.get("format") != FORMAT:
            raise ValueError(f"it must be of the format {FORMAT!r}; got {written.get('format')!r}")
        return restored(json.loads(written["state"]), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read the checkpoint {path}: {' '.join(str(error).split())[:200]}") from error


def restored(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `save_state` made plain, as it was."""
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: restored(item, tensors) for key, item in content}
    items = [restored(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def learnt(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state without its frozen parameters, which whoever continues has anyway."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: x for name, x in model.state_dict(keep_vars=True).items() if name not in frozen}  # a tied one is one


def load_learnt(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give a model what `learnt` gave of one like it. Raises ValueError for another model's."""
    if state.keys() != learnt(model).keys():
        raise ValueError(f"state must be of a {type(model).__name__} that trains the same parameters; got another's")
    model.load_state_dict(state, strict=False)


class Keeper:
    """Keeps the state of long work in a file, every so many steps, and gives it back to the work that continues.

    A fit takes one as its `keeper`: it asks `load` for a state to continue from, and after each step offers its own.
    Raises ValueError for every < 1.
    """

    def __init__(self, path: str | Path, *, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"every must be a whole number >= 1; got {every}")
        self.path, self.every = Path(path), every

    def load(self) -> dict[str, Any] | None:
        """The state that was kept last; None before the first."""
        return load_state(self.path) if self.path.exists() else None

    def offer(self, done: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Keep state() if `done` steps are a multiple of `every`."""
        if done % self.every == 0:
            save_state(self.path, state())
