"""One pass of any transformers model over texts padded on either side, and what has to be known of a model for it.

Architectures differ in how they are told of padding, in where their trunk is and in which arguments they take. All that
lies here; who reads texts with a model calls `one_pass`, or `causal_lm_logits` where only logits are wanted.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_lessons.masking import position_ids

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len", "max_seq_length",
                 "max_sequence_length", "max_target_positions", "context_length")  # fmt: skip

LARGE = 2**26  # logits, of which a loss keeps five copies: more than a GB, worth computing them twice

_padding_routes: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()
_plain_heads: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], bool]] = WeakKeyDictionary()


def plain(model: nn.Module) -> nn.Module:
    """The transformers model in what `peft.get_peft_model` gives, its adapter inside it; any other model as it is.

    Raises ValueError for an adapter that is not in the model's layers but around them (prompt and prefix tuning).
    """
    if not hasattr(model, "get_base_model"):
        return model
    inner = model.get_base_model()
    if not hasattr(inner, "peft_config"):
        raise ValueError(f"an adapter must be inside the model's layers, as LoRA is; got {type(model).__name__}")
    inner._hf_peft_config_loaded = True  # so that it saves its adapter, as it does after `add_adapter`
    return inner


class Pass(NamedTuple):
    """What a model says of each kept position of whole texts."""

    logits: Tensor | None  # (B, L, V); None from a trunk, which has no head
    hidden: Tensor | None  # (B, L, D) the trunk's last state, which the heads read


def context_of(model: nn.Module) -> float:
    """The longest text that a model reads, in tokens; infinite where it has no limit."""
    config = model.config.get_text_config()
    return next((limit for name in CONTEXT_NAMES if (limit := getattr(config, name, None) or 0) > 0), math.inf)


@functools.cache
def takes(model_class: type, argument: str) -> bool:
    """Whether models of this class are called with this argument; looked up once, since sampling asks at every step."""
    return argument in inspect.signature(model_class.forward).parameters


def cache_argument(model: nn.Module) -> str | None:
    """The argument by which a model is given transformers' key-value cache, which 5.24 renamed; None without one.

    What XLM calls its cache is a dictionary of its own.
    """
    own = inspect.signature(type(model).forward).parameters
    return next((x for x in ("past_key_values", "cache") if x in own and "dict" not in str(own[x])), None)


def position_arguments(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """The argument that makes left padding harmless, for models that take it (ALiBi models have no position ids)."""
    return {"position_ids": position_ids(attention_mask)} if takes(type(model), "position_ids") else {}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in every module, then the mode that each was in.

    In training mode layers may add noise, and under gradient checkpointing they keep no cache.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def padding_route(model: nn.Module) -> str:
    """How a model reads texts padded on the left as it reads them alone; tried out once, on a few tokens.

    "ready": by a mask (`ready_mask`) and positions; "mask": by the mask of tokens and positions, where it takes any;
    "packed": not at all, so that the padding must go to the right, where nothing causal looks.
    """
    from transformers import PreTrainedModel, StaticCache
    from transformers.cache_utils import StaticLayer

    if not isinstance(model, PreTrainedModel):
        return "mask"
    routes, attention = _padding_routes.setdefault(model, {}), getattr(model.config, "_attn_implementation", None)
    if attention not in routes:
        mask = torch.tensor([[0, 0, 1, 1, 1]], device=model.device)
        ways = {"ready": ready_mask(mask), "mask": mask}
        # Only PyTorch's own attention takes a bool mask, and one mask serves only layers that all see the same.
        layers = StaticCache(config=model.config, max_cache_len=1).layers if attention == "sdpa" else [None]
        if not takes(type(model), "position_ids") or {*map(type, layers)} != {StaticLayer}:
            del ways["ready"]
        routes[attention] = next((way for way, told in ways.items() if ignores_padding(model, mask, told)), "packed")
    return routes[attention]


@torch.no_grad()
def ignores_padding(model: nn.Module, attention_mask: Tensor, as_given: Tensor) -> bool:
    """Whether two padding tokens in front, told by the mask `as_given`, leave the last output alone."""
    embedding = model.get_input_embeddings()
    ids = torch.arange(attention_mask.shape[1], device=attention_mask.device)[None] % len(embedding.weight)
    positions = position_arguments(model, attention_mask)
    with evaluating(model), torch.autocast(ids.device.type, enabled=False):
        alone = model(input_ids=ids[:, 2:], use_cache=False)[0][:, -1]
        try:
            padded = model(input_ids=ids, attention_mask=as_given, use_cache=False, **positions)[0][:, -1]
        except (RuntimeError, ValueError, TypeError, IndexError):  # a mask of a shape that the model cannot read
            return False
    rounding = 1e-3 if torch.finfo(alone.dtype).bits >= 32 else 0.1
    return torch.allclose(padded, alone, rtol=0, atol=rounding * float(alone[alone.isfinite()].std()))


def takes_ready_masks(model: nn.Module) -> bool:
    """Whether a bool mask (B, 1, Q, K), True where query may see key, can stand for the mask of tokens."""
    return padding_route(model) == "ready"


def ready_mask(attention_mask: Tensor, length: int | None = None) -> Tensor:
    """Which of `length` keys (L without it) each query sees: real ones up to its own. (B, L) -> (B, 1, L, length).

    A padded position sees itself, for a row that sees nothing would come out as NaN.
    """
    queries = torch.arange(attention_mask.shape[1], device=attention_mask.device)[:, None]
    keys = torch.arange(length or len(queries), device=attention_mask.device)
    real = nn.functional.pad(attention_mask.bool(), (0, len(keys) - len(queries)))[:, None, None]
    return real & (keys <= queries) | (keys == queries)


def mask_arguments(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """Mask and positions for one pass over whole texts (B, L).

    A model that makes the mask itself looks whether anything is padded; on a GPU the host would wait for that. Texts
    that had to be packed stand as the model itself would count them, so it is told no positions.
    """
    if padding_route(model) == "packed":
        return {"attention_mask": attention_mask}
    ready = attention_mask.device.type == "cuda" and takes_ready_masks(model)
    mask = ready_mask(attention_mask) if ready else attention_mask
    return {"attention_mask": mask} | position_arguments(model, attention_mask)


def trunk_of(model: nn.Module) -> nn.Module:
    """The part whose last state the head reads: below every head, and below what reads other inputs than text.

    It is the innermost model that the words' embedding is in; transformers' `base_model` may be further out.
    """
    from transformers import PreTrainedModel

    trunk, inner = None, getattr(model, "base_model", model)
    while inner is not None:
        trunk, parts = inner, [child for child in inner.children() if isinstance(child, PreTrainedModel)]
        inner = next((part for part in parts if model.get_input_embeddings() in [*part.modules()]), None)
    return trunk


def one_pass(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, keep: int = 0) -> Pass:
    """Logits and hidden states of the last K = keep positions, or of all (0), of texts (B, L) padded on either side.

    model: with a head, or the trunk alone. Without a gradient to compute it is read in evaluation mode.
    """
    model = plain(model)  # PEFT's wrapper calls it past its hooks
    own = getattr(model, "module", model)  # what data parallelism wraps
    packed = padding_route(own) == "packed"
    if packed:
        order = attention_mask.long().argsort(dim=1, descending=True, stable=True)
        input_ids, attention_mask = (x.gather(1, order) for x in (input_ids, attention_mask))
    logits_to_keep = {"logits_to_keep": keep} if takes(type(own), "logits_to_keep") and not packed else {}
    outputs: list[Any] = []  # the trunk's, then the model's own
    hook = trunk_of(own).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with contextlib.nullcontext() if torch.is_grad_enabled() else evaluating(own):
            arguments = mask_arguments(own, attention_mask) | logits_to_keep
            outputs.append(model(input_ids=input_ids, use_cache=False, **arguments))
    finally:
        hook.remove()

    def kept(x: Tensor | None) -> Tensor | None:
        if x is not None and packed:
            x = x.gather(1, order.argsort(dim=1)[..., None].expand_as(x))
        return None if x is None else x[:, -keep:]

    logits, hidden = getattr(outputs[-1], "logits", None), getattr(outputs[0], "last_hidden_state", None)
    return Pass(kept(logits), kept(hidden))


def causal_lm_logits(lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, logits_to_keep: int = 0) -> Tensor:
    """Logits (B, K, V) of the last K = logits_to_keep positions, or of all (0), of a plain language model."""
    return one_pass(lm, input_ids, attention_mask, keep=logits_to_keep).logits


@contextlib.contextmanager
def in_place_of(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """For the time, what the head reads goes to `forward` instead; a model's logits are then what that makes of it."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def head_of_large(lm: nn.Module, positions: int) -> nn.Linear | None:
    """The head of a language model, where so many positions' logits are large and just what it gives; else None.

    None too for a head that is no plain linear layer (an adapter's, a quantised one) or whose call others have taken
    over, for logits that are capped, scaled or cut afterwards, which is tried out once, and where processes share the
    weights out.
    """
    head = lm.get_output_embeddings()
    own = type(head) is nn.Linear and "forward" not in vars(head)
    own = own and not any(hasattr(p, "full_tensor") for p in lm.parameters())
    if not own or positions * len(head.weight) <= max(LARGE, positions * head.in_features):
        return None
    tried, setting = _plain_heads.setdefault(lm, {}), (id(head), *lm._forward_hooks, *head._forward_hooks)
    if setting not in tried:
        tried[setting] = all(comes_out(lm, head, width) for width in head.weight.shape)
    return head if tried[setting] else None


@torch.no_grad()
def comes_out(lm: nn.Module, head: nn.Linear, width: int) -> bool:
    """Whether what stands in for the head, `width` large numbers a token, leaves the model as it was or barred."""
    ids = torch.arange(3, device=head.weight.device)[None] % len(head.weight)
    given = torch.linspace(-100, 100, ids.numel() * width).view(*ids.shape, width).to(head.weight)
    with evaluating(lm), torch.autocast(ids.device.type, enabled=False), in_place_of(head, lambda _: given.clone()):
        try:
            logits = lm(input_ids=ids, use_cache=False).logits.to(given.dtype)
        except (RuntimeError, ValueError, TypeError, IndexError):  # what follows the head takes V numbers alone
            return False
    return logits.shape == given.shape and bool(((logits == given) | (logits == -math.inf)).all())
