"""Where models run, in what precision and in how many processes: the one place that talks to accelerate.

Several processes are started by `torchrun` or `accelerate launch`. Each holds the whole model, or under FSDP 2, which
accelerate's configuration asks for, its share of every weight (`gathered` has all at hand, `whole` writes them down).
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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


def process() -> tuple[int, int]:
    """This process's number and how many there are, as their launcher says; (0, 1) without one."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if "LOCAL_RANK" in os.environ else (0, 1)


def sharded() -> bool:
    """Whether accelerate's configuration asks for FSDP 2. Raises ValueError for other engines that it knows."""
    asked = {name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
             if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"}  # fmt: skip
    if asked - {"FSDP"} or (asked and os.environ.get("FSDP_VERSION", "1") != "2"):
        raise ValueError(f"processes must share by data parallelism or FSDP 2 (fsdp_version: 2); got {min(asked)}")
    return bool(asked) and process()[1] > 1


def make_accelerator(device: str = "auto", **options: Any) -> "Accelerator":
    """An Accelerator for that device; raises ValueError when the machine lacks it. On one CPU it changes nothing.

    options: Accelerator's others. Precision is `autocast`'s alone, so that trainers of different precision can live in
    one process. Raises ValueError for what `sharded` refuses.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin  # takes seconds, and `--help` reads this module
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    wanted, shards = check_device(device), sharded()
    if shards:
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # returns a view: of logits, which nobody writes over
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else transformers loads the first process's alone
    state = AcceleratorState._shared_state | PartialState._shared_state
    settled = not state or (state["device"].type == wanted and state.get("_mixed_precision", "no") == "no")
    if not settled and not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one device for the whole process
    accelerator = Accelerator(cpu=wanted == "cpu", mixed_precision="no", **options)
    if shards and accelerator.distributed_type is DistributedType.MULTI_CPU:  # where accelerate does not ask for it
        asked = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": FullyShardedDataParallelPlugin()}
        AcceleratorState._shared_state.update(asked)
    return accelerator


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


def told(value: Any) -> list[Any]:
    """Each process's value, in order, the same list in all; none goes on before all have come here."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def end_processes() -> None:
    """Take leave of the other processes, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights of a prepared model at hand in every process, to be read without a gradient; then its share again.

    A pass through any part of it then waits for no other process, however many each of them makes. Not to be nested.
    """
    from accelerate.state import AcceleratorState

    parts = [part for part in model.modules() if sharded() and hasattr(part, "unshard")]
    try:
        for part in parts:
            part._get_fsdp_state()._lazy_init()  # the root's first, or the part that is called takes itself for it
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(AcceleratorState().fsdp_plugin.reshard_after_forward, recurse=False)
            part.reshard()


def whole(value: Any) -> Any:
    """A state of nested dicts whose tensors, where each process holds a share of them, are all there, on the CPU."""
    known: dict[int, Tensor] = {}  # a tied weight stays one

    def gather(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {name: gather(part) for name, part in item.items()}
        if not hasattr(item, "full_tensor"):
            return item
        if id(item) not in known:
            known[id(item)] = item.detach().full_tensor().cpu()
        return known[id(item)]

    return gather(value)


def share_like(value: Any, own: Tensor | None) -> Any:
    """This process's share of a tensor that all have, laid out as `own` is; the value where that is no share."""
    if not hasattr(own, "full_tensor") or getattr(value, "shape", None) != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


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
