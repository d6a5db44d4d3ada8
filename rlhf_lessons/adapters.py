"""An adapter in a language model: a few weights are trained, those that they stand beside are frozen and serve twice.

With the adapter on they are the policy, with it off its reference. PEFT makes and reads adapters; it is imported where
a model is to get one, and nowhere else. What `peft.get_peft_model` gives is read as the model inside (`forward.plain`).
"""

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rlhf_lessons.forward import plain
from rlhf_lessons.masking import full_precision


def has_adapter(lm: nn.Module) -> bool:
    """Whether PEFT has put an adapter into a model's layers."""
    return hasattr(plain(lm), "peft_config")


def adapter_layers(lm: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter by their names: those that say whether it is off. None in a model without one."""
    named = plain(lm).named_modules()
    return {name: layer for name, layer in named if isinstance(getattr(layer, "disable_adapters", None), bool)}


def add_lora(lm: nn.Module, *, rank: int, alpha: float | None = None, base: str | None = None, seed: int = 0) -> None:
    """Freeze a language model and put a LoRA adapter into it, in place: W x becomes W x + (alpha/rank)·B A x, B = 0.

    So nothing changes before the first step. It goes into the layers that PEFT names for the family, into all linear
    ones of another; float32, no dropout, A drawn from `seed` without touching the global generator. alpha: twice the
    rank where None; base: where the model itself is found, noted in the adapter, by default where it was loaded from.
    Raises ValueError for a model that has an adapter, and where PEFT is not installed.
    Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models", §4.1.
    """
    if has_adapter(lm):
        raise ValueError(f"lora_rank must be 0 for a model that has an adapter, which is trained on; got {rank}")
    try:
        import peft
    except ImportError as error:
        raise ValueError(f'lora_rank must be 0 without PEFT (pip install "rlhf_lessons[lora]"); got {rank}') from error
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets = None if lm.config.model_type in known else "all-linear"
    config = peft.LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):  # of how GPT-2's matrices lie
        torch.manual_seed(seed)
        lm.add_adapter(config)
    for p in filter(lambda p: p.requires_grad, lm.parameters()):
        p.data = full_precision(p.data)  # a step is smaller than 16 bits can tell apart
    config.target_modules = sorted(config.target_modules)  # a set is saved in another order by each process
    name = base or lm.name_or_path or None
    config.base_model_name_or_path = os.path.abspath(name) if name and os.path.isdir(name) else name


@contextlib.contextmanager
def as_reference(lm: nn.Module, reference: nn.Module | None = None) -> Iterator[nn.Module]:
    """What a policy is held to, while it is read: `reference`, or (None) the policy with its adapter switched off.

    Raises ValueError for None where there is no adapter, or where weights beside it are trained, which would move.
    """
    if reference is not None:
        yield reference
        return
    layers, trained = adapter_layers(lm).values(), [(p, p.requires_grad) for p in lm.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        if not layers or any(p.requires_grad for p in lm.parameters()):
            raise ValueError("reference must be a model of its own, unless an adapter alone is trained; got None")
        yield lm
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p, was in trained:  # PEFT freezes what it switches off, and thaws what it switches on
            p.requires_grad_(was)


@torch.no_grad()
def merged_weights(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's weights by the names that they have without an adapter, which is added to them: W + (alpha/rank)·B A.

    Out of place and a layer at a time, for another engine, or a trunk like this one, to load. A plain checkpoint is
    made by PEFT: `PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(merged)`.
    """
    layers = adapter_layers(lm)
    for name, layer in layers.items():
        merged = copy.deepcopy(layer)
        merged.merge()
        yield from ((f"{name}.{leaf}", weight) for leaf, weight in merged.get_base_layer().state_dict().items())
    inside = tuple(f"{name}." for name in layers)
    rest = ((name, weight) for name, weight in plain(lm).state_dict().items() if not name.startswith(inside))
    yield from ((name, x.full_tensor() if hasattr(x, "full_tensor") else x) for name, x in rest)  # FSDP's shares
