"""What a language model says of the tokens of whole texts: logits, log-probabilities, entropies and values.

Shapes: texts (B, L), padded on either side; T tokens at the end of each that are asked about; V words.
The shift by one (the logits at position t belong to token t+1) stands in this file alone.

`policy_gradient`'s functions take logits (B, T, V), of which the loss, its gradient and the entropy keep some five
copies. Where those would be large, the pass through the model ends with what its head would read, and `head_log_probs`
makes logits some rows at a time: they are read, thrown away, and made once more for the gradient.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lessons.forward import causal_lm_logits, head_of_large, in_place_of
from rlhf_lessons.generation import at_temperature
from rlhf_lessons.masking import check_same_shape
from rlhf_lessons.policy_gradient import action_log_probs, entropy

CHUNK = 2**24  # logits made at a time: enough rows for a matrix product at its full rate
FLOOR = -1e4  # no exponential of less differs from 0, and 0·(−∞) would be NaN


class TokenTerms(NamedTuple):
    """What a loss is made of, for each token that was asked about; where the mask is False, nothing is promised."""

    log_probs: Tensor  # (B, T)
    entropies: Tensor | None  # (B, T) of the distribution that the token is from
    values: Tensor | None  # (B, T) of the state before it, where the model has a value head


def policy_outputs(
    policy: nn.Module, tokens: Tensor, attention_mask: Tensor, *, length: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """What the policy says of the `length` response tokens at the end of each row, before it sees them.

    tokens, attention_mask (B, P+T) -> logits at the sampling temperature (B, T, V), values (B, T): the model's
    outputs at positions P−1 … P+T−2.
    """
    logits, values = policy(tokens[:, :-1], attention_mask[:, :-1], logits_to_keep=length)
    return at_temperature(logits, temperature), values


def reference_logits(
    reference: nn.Module, tokens: Tensor, attention_mask: Tensor, *, length: int, temperature: float
) -> Tensor:
    """The same of a plain language model: logits at the sampling temperature (B, T, V)."""
    logits = causal_lm_logits(reference, tokens[:, :-1], attention_mask[:, :-1], logits_to_keep=length)
    return at_temperature(logits, temperature)


def token_terms(
    model: nn.Module, tokens: Tensor, attention_mask: Tensor, mask: Tensor, *, temperature: float = 1.0,
    entropy_gradient: bool | None = None,
) -> TokenTerms:  # fmt: skip
    """What a model says of the last T tokens of each text, as a loss needs it. Gradients flow to the model.

    model: a plain language model, or a policy with a value head; tokens, attention_mask (B, L); mask (B, T): which of
    the tokens are asked about; entropy_gradient: whether the entropies have one, None where they are not asked for.
    """
    own = getattr(model, "module", model)  # what data parallelism wraps
    lm, actions = getattr(own, "lm", own), tokens[:, -mask.shape[1] :]
    head = head_of_large(lm, mask.numel())
    options = dict(length=mask.shape[1], temperature=temperature if head is None else 1.0)
    with contextlib.nullcontext() if head is None else in_place_of(head, lambda hidden: hidden):
        said = (reference_logits if lm is own else policy_outputs)(model, tokens, attention_mask, **options)
    logits, values = (said, None) if lm is own else said
    if head is None:
        log_probs = action_log_probs(logits, actions)
        with contextlib.nullcontext() if entropy_gradient else torch.no_grad():
            return TokenTerms(log_probs, None if entropy_gradient is None else entropy(logits), values)
    bias, barred = head.bias, getattr(lm, "barred_ids", None)
    if barred is not None:
        bias = torch.where(barred, -math.inf, 0 if bias is None else bias)
    log_probs, entropies = head_log_probs(logits, head.weight, bias, actions, mask, temperature=temperature)
    return TokenTerms(log_probs, entropies if entropy_gradient else entropies.detach(), values)


def head_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each action, and entropy, under the softmax of (hidden·weightᵀ + bias) / temperature.

    hidden (..., D), weight (V, D), bias (V,), −∞ for what cannot be chosen, actions (...) long, mask (...) bool -> two
    of (...), in nats, 0 where mask is False. The logits are in the precision of autocast, or else of `weight`, all else
    in float32 at least. Memory is that of `CHUNK` and of the gradients. Raises ValueError when the shapes disagree.
    """
    check_same_shape(actions=actions, mask=mask, hidden=hidden[..., 0])
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    head = [None if x is None else x.to(dtype) for x in (weight, bias)]
    found = HeadLogProbs.apply(hidden[mask].to(dtype), *head, actions[mask], temperature)
    return tuple(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found)


def in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, *columns: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of `hidden` (n, D) at a time, their logits (n, V), to be written over, and theirs of each column."""
    rows = max(1, CHUNK // len(weight))
    for h, *rest in zip(hidden.split(rows), *(x[:, None].split(rows) for x in columns), strict=True):
        yield h, at_temperature(F.linear(h, weight, bias), temperature), *rest


class HeadLogProbs(torch.autograd.Function):
    """`head_log_probs` of N rows; keeps what it was given, log-normalisers and entropies."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, (N,) each."""
        found = []
        for _, z, action in in_chunks(hidden, weight, bias, temperature, actions):
            p = z.softmax(dim=1)
            norm = z.amax(dim=1, keepdim=True) - p.amax(dim=1, keepdim=True).log()
            log_p = z.sub_(norm)
            log_prob = log_p.gather(1, action)
            found.append([log_prob, -p.mul_(log_p.clamp_(min=FLOOR)).sum(dim=1, keepdim=True), norm])
        log_probs, entropies, norms = (torch.cat(parts).squeeze(1) for parts in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, bias, actions, norms, entropies)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # no gradient of the entropies, none to compute
        return log_probs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_log_prob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂log p_a/∂z_v = 1[v = a] − p_v and ∂H/∂z_v = −p_v (log p_v + H), then through the head."""
        *head, actions, norms, entropies = ctx.saved_tensors
        weight, d_hidden = head[1], []
        d_weight, d_bias = (
            torch.zeros_like(x, dtype=norms.dtype) if wanted else None
            for x, wanted in zip(head[1:], ctx.needs_input_grad[1:3], strict=True)
        )
        by = [torch.zeros_like(norms) if x is None else x / ctx.temperature for x in (by_log_prob, by_entropy)]
        for h, z, action, norm, total, a, b in in_chunks(*head, ctx.temperature, actions, norms, entropies, *by):
            log_p = z.sub_(norm)
            factor = -a if by_entropy is None else log_p.clamp(min=FLOOR).add_(total).mul_(-b).sub_(a)
            slope = log_p.exp_().mul_(factor).scatter_add_(1, action, a)
            if d_bias is not None:
                d_bias += slope.sum(dim=0)
            slope = slope.to(weight.dtype)
            d_hidden.append(slope @ weight)
            if d_weight is not None and weight.dtype is norms.dtype:
                d_weight.addmm_(slope.t(), h)
            elif d_weight is not None:
                d_weight += slope.t() @ h
        return torch.cat(d_hidden), d_weight, d_bias, None, None
