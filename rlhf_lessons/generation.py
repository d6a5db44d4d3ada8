"""From prompts to responses: what a sampler is, and ours, which reads each token once through a key-value cache.

Shapes: B rows, P prompt positions (padded on the left), T response positions (padded on the right), V words.
The temperature stands here alone, for sampling and for scoring: `at_temperature`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lessons import forward
from rlhf_lessons.data import Prompt, Tokenizer, as_record, decode, decode_responses, encode_prompts, pad, real_ids
from rlhf_lessons.forward import context_of, evaluating, plain
from rlhf_lessons.masking import full_precision
from rlhf_lessons.models import bar_unused_ids, check_vocabulary
from rlhf_lessons.policy_gradient import action_log_probs

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclass(frozen=True)
class Responses:
    """What a sampler returns; T is the length of the longest response."""

    tokens: Tensor  # (B, T) padded with pad_id
    mask: Tensor  # (B, T) True on sampled tokens, EOS included
    log_probs: Tensor  # (B, T) at the sampling temperature, 0 where mask is False
    ended: Tensor  # (B,)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Prompts with a response each, before anything is said about them."""

    tokens: Tensor  # (B, P+T) prompt and response, padded with pad_id on both sides
    attention_mask: Tensor  # (B, P+T) True on real tokens
    response_mask: Tensor  # (B, T) True on sampled tokens, EOS included
    sampler_log_probs: Tensor  # (B, T) of the sampled tokens, as the sampler gave them
    ended: Tensor  # (B,) True where the response ends in EOS, False where it was cut off
    group: Tensor  # (B,) which of this iteration's draws of a prompt the row answers
    records: tuple[Mapping[str, Any], ...]  # B of them: the row's prompt and whatever columns came with it
    prompt_length: int  # P

    def __len__(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def responses(self) -> Tensor:
        """The sampled tokens, padded on the right: (B, T)."""
        return self.tokens[:, self.prompt_length :]

    def texts(self, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
        """Prompts as they were given (as text, where they were not) and responses as they were sampled, as text.

        A prompt's begin token and the token that ended a response are left out, any other is shown.
        """
        split = self.prompt_length
        parts = [slice(0, split), slice(split, None)]
        prompts, responses = (real_ids(self.tokens[:, part], self.attention_mask[:, part]) for part in parts)
        shown = [record.get("prompt") for record in self.records]
        if not all(isinstance(prompt, str) for prompt in shown):
            read = decode(tokenizer, self.tokens[:, :split], self.attention_mask[:, :split])
            shown = [prompt if isinstance(prompt, str) else text for prompt, text in zip(shown, read, strict=True)]
        return shown, decode_responses(tokenizer, prompts, responses, self.ended)

    def minibatches(self, size: int, generator: torch.Generator | None = None) -> Iterator[Self]:
        """The rows in a fresh random order (or as they stand, without a generator), `size` at a time."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for rows in order.split(size):
            yield self.rows(rows)

    def rows(self, rows: Tensor) -> Self:
        """The batch of these rows alone. rows: (N,) long."""
        values, where = {field.name: getattr(self, field.name) for field in fields(self)}, rows.to(self.tokens.device)
        values = {k: v[where] if isinstance(v, Tensor) else v for k, v in values.items()}
        return type(self)(**values | {"records": tuple(self.records[row] for row in rows.tolist())})


class Sampler:
    """Draws responses by another engine: the base of what takes the place of `sample_responses`."""

    exact = True  # False: its log-probabilities are not the policy's to 1e-4, so the policy scores its tokens anew
    tolerance: float | None = None  # of their mean distance from those, where they are scored anew; None: any

    def __call__(self, lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Responses:
        """Arguments and result of `sample_responses`."""
        raise NotImplementedError

    def update(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take the policy's weights, by name, before the next batch; nothing to do where they are read in place."""


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """The logits that are sampled from, and so the ones to score by: in float32 at least, over the temperature."""
    logits = full_precision(logits)
    return logits if temperature == 1 else logits / temperature  # over a whole vocabulary a copy is worth sparing


def draw_uniforms(rows: int, steps: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Numbers from U[0, 1) that `rows` responses are drawn by, one a token: (rows, steps) float32, on the CPU.

    Drawn there and all at once, a seed means the same responses on every device and however the rows are shared out.
    """
    device = "cpu" if generator is None else generator.device
    return torch.rand(rows, steps, generator=generator, device=device)


def sample_tokens(logits: Tensor, u: Tensor) -> Tensor:
    """One token per row from softmax(logits), by inverting the cumulative distribution. (B, V), (B,) -> (B,) long.

    The first token whose cumulative probability exceeds u ~ U[0, 1).
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    at = u[:, None].to(logits.dtype) * total
    # u·total may round up to total itself, past every token that has probability.
    at = at.minimum(total.nextafter(torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, at, right=True).squeeze(-1)
    return chosen.clamp(max=logits.shape[-1] - 1)  # only NaN goes beyond; the loss, NaN too, will tell of it


@torch.no_grad()
def sample_responses(
    lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, max_new_tokens: int, eos_id: int | Sequence[int],
    pad_id: int, temperature: float = 1.0, generator: torch.Generator | None = None, uniforms: Tensor | None = None,
) -> Responses:  # fmt: skip
    """Continue each prompt with tokens drawn from softmax(logits / temperature), until EOS or max_new_tokens.

    lm: any Hugging Face causal language model; input_ids, attention_mask (B, P), padded on the left; eos_id: the token
    that ends a response, or several; uniforms: numbers to draw by (B, max_new_tokens), else `draw_uniforms` of
    `generator`. The model is read in evaluation mode (`Reader`), and rows that have ended are read no more. No top-k or
    top-p: the log-probabilities are those of the distribution that was sampled from. Raises ValueError when a row's
    last prompt position is padding, or for a temperature or a length that is not above 0.
    """
    if not (temperature > 0 and max_new_tokens >= 1):
        raise ValueError(f"temperature and max_new_tokens must be above 0; got {temperature} and {max_new_tokens}")
    if attention_mask.device.type == "cpu" and not attention_mask[:, -1].all():
        raise ValueError("attention_mask must end in a real token in every row: pad prompts on the left; got padding")
    batch = len(input_ids)
    if uniforms is None:
        uniforms = draw_uniforms(batch, max_new_tokens, generator=generator)
    uniforms = uniforms.to(input_ids.device)
    tokens = input_ids.new_full((batch, max_new_tokens), pad_id)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    log_probs = torch.zeros_like(tokens, dtype=torch.promote_types(lm.dtype, torch.float32))
    ended = torch.zeros_like(tokens[:, 0], dtype=torch.bool)
    ends = torch.tensor(eos_id, device=tokens.device)
    rows = torch.arange(batch, device=tokens.device)  # the row of `tokens` that each row that is read belongs to
    step_ids = input_ids
    with evaluating(lm):
        reader = Reader(lm, F.pad(attention_mask.bool(), (0, max_new_tokens), value=True))
        for t in range(max_new_tokens):
            logits = at_temperature(reader.read(step_ids), temperature)
            chosen = sample_tokens(logits, uniforms[rows, t])
            tokens[rows, t] = chosen
            mask[rows, t] = True
            log_probs[rows, t] = action_log_probs(logits, chosen)
            done = torch.isin(chosen, ends)
            ended[rows] = done
            step_ids = chosen[:, None]
            if done.any():
                keep = (~done).nonzero().squeeze(-1)
                if len(keep) == 0:
                    break
                reader.keep(keep)
                rows, step_ids = rows[keep], step_ids[keep]
    length = t + 1
    return Responses(tokens[:, :length], mask[:, :length], log_probs[:, :length], ended)


class Reader:
    """Reads texts on from where they were: each token once, through the model's own key-value cache.

    Where the model keeps another memory than keys and values, or reads no padding on the left, whole texts are read
    anew at every step: slower, and as right. visible (B, L): which tokens of the whole texts are real.
    """

    def __init__(self, lm: nn.Module, visible: Tensor) -> None:
        self.lm = lm = plain(lm)
        self.visible, self.text = visible, visible.new_zeros(len(visible), 0, dtype=torch.long)
        self.seen, self.ready_masks = 0, forward.takes_ready_masks(lm)
        self.cache_name = forward.cache_argument(lm)
        cached = self.cache_name and forward.padding_route(lm) != "packed"
        self.cache = new_kv_cache(lm, visible.shape[1]) if cached else None
        self.positions = forward.position_arguments(lm, visible)

    def read(self, input_ids: Tensor) -> Tensor:
        """Logits (B, V) after the next tokens (B, N) of every row."""
        start, self.seen = self.seen, self.seen + input_ids.shape[1]
        seen = self.visible[:, : self.seen]
        if self.cache is not None:
            given = {name: whole[:, start : self.seen] for name, whole in self.positions.items()}
            given |= {"logits_to_keep": 1} if forward.takes(type(self.lm), "logits_to_keep") else {}
            mask = seen[:, None, None] if self.ready_masks and start > 0 else seen  # spares making one
            given |= {"attention_mask": mask, self.cache_name: self.cache, "use_cache": True}
            output = self.lm(input_ids=input_ids, **given)
            if self.cache.get_seq_length() == self.seen:
                return output.logits[:, -1]
            self.cache = None  # the model did not keep its keys and values there, and so has a memory of its own
        self.text = torch.cat([self.text, input_ids], dim=1)
        return forward.causal_lm_logits(self.lm, self.text, seen, logits_to_keep=1)[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone. rows: (N,) long."""
        self.visible, self.text = self.visible[rows], self.text[rows]
        self.positions = forward.position_arguments(self.lm, self.visible)
        if self.cache is not None:
            self.cache.batch_select_indices(rows)


def new_kv_cache(lm: nn.Module, length: int) -> "DynamicCache | None":
    """An empty key-value cache for texts of at most `length` tokens, which a step extends in place.

    Layers that look back over a window only keep Hugging Face's own cache, which is short. None where a layer of the
    model remembers something else, e.g. a recurrent state.
    """
    from transformers import DynamicCache, cache_utils
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):
        """Room for `length` positions from the first step on; the base class copies all of them at every step."""

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self.room = [x.new_empty(*x.shape[:2], length, x.shape[3]) for x in (keys, values)]
            seen = self.get_seq_length()
            for room, new in zip(self.room, (keys, values), strict=True):
                room[:, :, seen : seen + new.shape[2]] = new
            self.keys, self.values = (room[:, :, : seen + keys.shape[2]] for room in self.room)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            self.room = [room[indices] for room in self.room]
            self.keys, self.values = (room[:, :, : self.get_seq_length()] for room in self.room)

    cache = DynamicCache(config=lm.config)
    others = ("DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer")  # some of a later release
    if not {*map(type, cache.layers)} <= {DynamicLayer, *(getattr(cache_utils, name, None) for name in others)}:
        return None
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def eos_ids(lm: nn.Module, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a response: the tokenizer's EOS and those that the model's generation settings name."""
    named = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    return list(dict.fromkeys([tokenizer.eos_token_id, *([named] if isinstance(named, int) else named or [])]))


def sample_batch(
    lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, *,
    sample: Callable[..., Responses] | None = None, group: Tensor | None = None,
    records: Sequence[Mapping[str, Any]] | None = None, uniforms: Tensor | None = None, **options: Any,
) -> Samples:  # fmt: skip
    """Prompts (B, P) with a response each, by `sample_responses` or what takes its place.

    group (B,): the draw that each row answers, each its own without it; records: the rows' prompts with their columns;
    options and uniforms: those of `sample_responses`, the latter for a sampler that has a use for them.
    """
    prompt_mask, sample = attention_mask.bool(), sample or sample_responses
    parameters = inspect.signature(sample).parameters.values()
    if uniforms is not None and any(p.name == "uniforms" or p.kind is p.VAR_KEYWORD for p in parameters):
        options["uniforms"] = uniforms
    responses, (count, length) = sample(lm, input_ids, prompt_mask, **options), input_ids.shape
    return Samples(
        tokens=torch.cat([input_ids, responses.tokens], dim=1),
        attention_mask=torch.cat([prompt_mask, responses.mask], dim=1),
        response_mask=responses.mask, sampler_log_probs=responses.log_probs, ended=responses.ended,
        group=torch.arange(count, device=input_ids.device) if group is None else group,
        records=({},) * count if records is None else tuple(records), prompt_length=length,
    )  # fmt: skip


def best_of_n(samples: Samples, scores: Tensor) -> Samples:
    """Of each draw's responses the one with the highest score (B,), the first of equals: a policy without training.

    Where each prompt was drawn n times under one `group`, this is best-of-n. Its law is `exact.best_of_n`.
    Raises ValueError for scores of another shape.
    Source: Stiennon et al. 2020, "Learning to summarize from human feedback", §4.3.
    """
    if scores.shape != samples.group.shape:
        raise ValueError(f"scores must be (B,) = {tuple(samples.group.shape)}; got {tuple(scores.shape)}")
    order = scores.argsort(descending=True, stable=True)
    order = order[samples.group[order].argsort(stable=True)]  # by group, in it by score
    group = samples.group[order]
    first = torch.cat([torch.ones_like(group[:1], dtype=torch.bool), group[1:] != group[:-1]])
    return samples.rows(order[first].cpu())


def answers(
    lm: nn.Module, tokenizer: Tokenizer, prompts: Sequence[Prompt | Mapping[str, Any]], *, max_new_tokens: int,
    each: int = 1, **options: Any,
) -> Samples:  # fmt: skip
    """A sampled response to each prompt, or to each record with one, in one batch.

    each: how many prompts in a row are one that is drawn so often; options: the others of `sample_responses`. Raises
    ValueError for a tokenizer that is not the model's, and for a prompt too long for the model's context.
    """
    check_vocabulary(lm, tokenizer)
    bar_unused_ids(lm, tokenizer)
    ids = encode_prompts(tokenizer, prompts, max_new_tokens=max_new_tokens, context=context_of(lm))
    input_ids, mask = (x.to(lm.device) for x in pad(ids, tokenizer.pad_token_id, side="left"))
    return sample_batch(
        lm, input_ids, mask, group=torch.arange(len(ids), device=lm.device) // each, records=[*map(as_record, prompts)],
        max_new_tokens=max_new_tokens, eos_id=eos_ids(lm, tokenizer), pad_id=tokenizer.pad_token_id, **options,
    )  # fmt: skip


def respond(
    lm: nn.Module, tokenizer: Tokenizer, prompts: Sequence[Prompt | Mapping[str, Any]], *, max_new_tokens: int = 24,
    batch_size: int = 512, **options: Any,
) -> list[str]:  # fmt: skip
    """A sampled response to each prompt, as text; options and errors are those of `answers`."""
    ids = encode_prompts(tokenizer, prompts, max_new_tokens=max_new_tokens, context=context_of(lm))
    parts = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    drawn = (answers(lm, tokenizer, part, max_new_tokens=max_new_tokens, **options) for part in parts)
    return [text for samples in drawn for text in samples.texts(tokenizer)[1]]
