"""Where models run, in what precision and in how many processes: the one place that talks to accelerate."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

DEVICES = ("auto", "cpu", "cuda", "mps")


def check_device(device: str) -> str:
    """The type of device that is meant: "cpu", "cuda" or "mps". Raises ValueError when this machine lacks it."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}; got {device!r}")
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, available in found.items() if available)
    if not found[device]:
        raise ValueError(f"device must be one that this machine has; got {device!r}, which is not available")
    return device


def make_accelerator(device: str = "auto", **options: Any) -> "Accelerator":
    """An Accelerator for that device; raises ValueError when the machine lacks it. On one CPU it changes nothing.

    options: Accelerator's others. Precision is `autocast`'s alone, so that trainers of different precision can live in
    one process.
    """
    from accelerate import Accelerator  # takes seconds, and `--help` reads this module
    from accelerate.state import AcceleratorState, PartialState

    wanted = check_device(device)
    state = AcceleratorState._shared_state | PartialState._shared_state
    settled = not state or (state["device"].type == wanted and state.get("_mixed_precision", "no") == "no")
    if not settled and not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one device for the whole process
    return Accelerator(cpu=wanted == "cpu", mixed_precision="no", **options)


def known_trackers() -> dict[str, bool]:
    """The experiment trackers that accelerate knows, by name, and whether each can be imported here."""
    from accelerate import tracking, utils

    installed = [*map(str, tracking.get_available_trackers())]
    return {name: name in installed for name in utils.LoggerType.list() if name != "all"}


def share_of(accelerator: "Accelerator", count: int) -> slice:
    """Which of `count` rows are this process's: as many as every other's."""
    size = count // accelerator.num_processes
    return slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)


def gather_rows(accelerator: "Accelerator", rows: torch.Tensor, *, padding: int = 0) -> torch.Tensor:
    """All processes' rows (b, …) as one tensor (B, …), the same on each; shorter ones are padded on the right."""
    if accelerator.num_processes == 1:
        return rows
    if rows.ndim > 1:
        # Padding makes whole numbers of a mask, and each process must bring what the others do.
        rows = accelerator.pad_across_processes(rows, dim=1, pad_index=padding).to(rows.dtype)
    return accelerator.gather(rows)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which models run: bfloat16 where `precision` is "bf16", as they are where it is "no".

    Raises ValueError for another precision, or one that the device does not have.
    """
    has = {"cuda": torch.cuda.is_bf16_supported, "mps": lambda: torch.backends.mps.is_macos_or_newer(14, 0)}
    if precision != "no" and not (precision == "bf16" and has.get(device.type, lambda: True)()):
        raise ValueError(f"precision must be no, or bf16 where {device.type} has it; got {precision!r}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def use_threads(threads: int | None) -> None:
    """Let PyTorch take this many threads of the CPU, or as many as it likes (None). For the start of a process.

    Raises ValueError for less than one.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be a whole number >= 1; got {threads}")
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Teach glibc to keep freed blocks of up to 31 MB for the next iteration; for the start of a process.

    Else the system takes every large one back and hands it out again page by page, thousands of times in an iteration.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # allocated and freed, which raises glibc's threshold
