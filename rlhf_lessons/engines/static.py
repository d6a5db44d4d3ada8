"""Sampling with fixed shapes, for a GPU: nothing is read by the host between the first token and the last.

`generation.sample_responses` lets ended rows leave the batch, for which it must look at every step whether any has
ended. On a GPU that look costs more than the rows: the host waits for the device, then the device for the host. Here
all rows take all steps and ended ones write padding, so that a step is the same work at the same addresses every time,
captured once as a CUDA graph and replayed. Without a GPU the same step runs uncaptured, which is how it is tested.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lessons.forward import cache_argument, ready_mask, takes_ready_masks
from rlhf_lessons.generation import (
    Responses,
    Sampler,
    at_temperature,
    draw_uniforms,
    sample_responses,
    sample_tokens,
)
from rlhf_lessons.masking import position_ids
from rlhf_lessons.policy_gradient import action_log_probs

PROMPT_MULTIPLE = 16  # prompts are padded to a multiple of this, so that few shapes need a graph of their own
WARM_UP_STEPS = 2  # run before capture: libraries allocate their workspaces in their first calls


class StaticSampler(Sampler):
    """Takes the place of `sample_responses` on a GPU; keeps a decoder for each shape it has met.

    The same uniform numbers give the same tokens. Models that the fixed step does not fit (no position ids, windowed
    attention) are left to `sample_responses`.
    """

    def __init__(self) -> None:
        self.decoders: dict[tuple, StaticDecoder] = {}

    @torch.no_grad()
    def __call__(
        self, lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, generator: torch.Generator | None = None,
        uniforms: Tensor | None = None, **options: Any,
    ) -> Responses:  # fmt: skip
        """Arguments and result as those of `sample_responses`."""
        if uniforms is None:
            uniforms = draw_uniforms(len(input_ids), options["max_new_tokens"], generator=generator)
        if not takes_ready_masks(lm):
            return sample_responses(lm, input_ids, attention_mask, uniforms=uniforms, **options)
        extra = -input_ids.shape[1] % PROMPT_MULTIPLE
        input_ids = F.pad(input_ids, (extra, 0), value=options["pad_id"])
        attention_mask = F.pad(attention_mask, (extra, 0))
        key = (lm, input_ids.shape, repr(sorted(options.items())))
        if key not in self.decoders:
            self.decoders[key] = StaticDecoder(lm, *input_ids.shape, **options)
        return self.decoders[key].sample(input_ids, attention_mask.bool(), uniforms)


class StaticDecoder:
    """Samples responses of one shape: B rows, P prompt positions, T steps, all buffers allocated once."""

    def __init__(
        self, lm: nn.Module, batch: int, prompt_length: int, *, max_new_tokens: int, eos_id: int | list[int],
        pad_id: int, temperature: float = 1.0,
    ) -> None:  # fmt: skip
        from transformers import StaticCache

        device, length = lm.device, prompt_length + max_new_tokens
        self.lm, self.prompt_length, self.temperature = lm, prompt_length, temperature
        self.eos_id, self.pad_id = torch.tensor(eos_id, device=device), pad_id
        self.cache, self.cache_name = StaticCache(config=lm.config, max_cache_len=length), cache_argument(lm)
        self.visible = torch.zeros(batch, 1, 1, length, dtype=torch.bool, device=device)
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.step_ids = torch.zeros_like(self.position)
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.tokens = torch.full((batch, max_new_tokens), pad_id, device=device)
        self.mask = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.uniforms = torch.zeros(batch, max_new_tokens, device=device)
        self.log_probs = torch.zeros_like(self.tokens, dtype=torch.promote_types(lm.dtype, torch.float32))
        self.graph: torch.cuda.CUDAGraph | None = None

    def sample(self, input_ids: Tensor, attention_mask: Tensor, uniforms: Tensor) -> Responses:
        """Prompts (B, P), padded on the left -> responses, cut to the longest (the one look at the device)."""
        self.uniforms.copy_(uniforms)
        self.read_prompts(input_ids, attention_mask)
        steps = self.tokens.shape[1] - 1
        if input_ids.device.type == "cuda" and steps > WARM_UP_STEPS:
            if self.graph is None:
                steps -= self.capture()
            for _ in range(steps):
                self.graph.replay()
        else:
            for _ in range(steps):
                self.step()
        length = int(self.mask.any(dim=0).sum())
        return Responses(
            self.tokens[:, :length].clone(), self.mask[:, :length].clone(), self.log_probs[:, :length].clone(),
            self.ended.clone(),
        )  # fmt: skip

    def read_prompts(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Fill the cache from the prompts, in one pass, and draw every row's first token."""
        self.cache.reset()
        self.t.zero_()
        self.ended.zero_()
        self.visible.zero_()
        self.visible[:, 0, 0, : self.prompt_length] = attention_mask
        positions = position_ids(attention_mask)
        self.position.copy_(positions[:, -1:])
        mask = ready_mask(attention_mask, self.visible.shape[-1])
        self.draw(self.logits(input_ids, mask, positions))

    def step(self) -> None:
        """Read the last token of every row, draw the next."""
        self.draw(self.logits(self.step_ids, self.visible, self.position))

    def logits(self, input_ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, V) after the last of these tokens, at the sampling temperature."""
        output = self.lm(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1,
            **{self.cache_name: self.cache},
        )  # fmt: skip
        return at_temperature(output.logits[:, -1], self.temperature)

    def draw(self, logits: Tensor) -> None:
        """Sample a token in every row, record it where the row goes on, and make it visible to the next step."""
        u = self.uniforms.index_select(1, self.t).squeeze(1)
        chosen = torch.where(self.ended, self.pad_id, sample_tokens(logits, u))
        log_probs = torch.where(self.ended, 0, action_log_probs(logits, chosen))
        self.tokens.index_copy_(1, self.t, chosen[:, None])
        self.mask.index_copy_(1, self.t, ~self.ended[:, None])
        self.log_probs.index_copy_(1, self.t, log_probs[:, None])
        self.ended.logical_or_(torch.isin(chosen, self.eos_id))
        self.step_ids.copy_(chosen[:, None])
        self.visible.index_fill_(3, self.t + self.prompt_length, True)
        self.position.add_(1)
        self.t.add_(1)

    def capture(self) -> int:
        """Record one step as a graph. Returns how many of this response's steps were taken on the way.

        The weights are read where they are, so a graph serves after every update. Autocast may not keep its copies of
        them: one made during capture would be replayed, stale, for ever.
        """
        device = self.tokens.device
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        precision = torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", precision, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP_STEPS):
                    self.step()
            torch.cuda.current_stream(device).wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
        return WARM_UP_STEPS
