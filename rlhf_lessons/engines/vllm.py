"""Sampling by vLLM: an engine with weights of its own, which the trainer gives it after every update.

Two engines never compute one number twice alike, so its log-probabilities are not quite the policy's: the policy scores
the tokens anew (`rollout.collect`), and importance weights make good for the rest. The engine works in this process and
takes the weights as they lie, without a file between: one engine a process, since vLLM takes down with one what others
need. `make vllm` sets up an environment that it can be imported in.
"""

import contextlib
import copy
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lessons.adapters import merged_weights
from rlhf_lessons.data import pad, real_ids
from rlhf_lessons.device import process
from rlhf_lessons.forward import plain
from rlhf_lessons.generation import Responses, Sampler, draw_uniforms

if TYPE_CHECKING:
    from types import ModuleType

CACHE_BYTES = 2**30  # for keys and values on a CPU; texts that find no room wait
GPU_SHARE = 0.3  # of a GPU's memory that the engine takes: the trainer needs the rest
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # of log-probabilities, on average


class VLLMSampler(Sampler):
    """Takes the place of `sample_responses`; its engine is made at the first call, for the model that samples there.

    options: of `vllm.LLM`, in place of those that are chosen here. Raises ValueError where vLLM cannot be imported, and
    in one of several processes.
    """

    exact = False

    def __init__(self, **options: Any) -> None:
        if (processes := process()[1]) > 1:
            raise ValueError(f"sampler must be plain or static where several processes work; got vllm in {processes}")
        self.vllm, self.options, self.engine = imported(), options, None

    @torch.no_grad()
    def __call__(
        self, lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, max_new_tokens: int,
        eos_id: int | Sequence[int], pad_id: int, temperature: float = 1.0, generator: torch.Generator | None = None,
        uniforms: Tensor | None = None,
    ) -> Responses:  # fmt: skip
        """Arguments and result as those of `sample_responses`; the same uniform numbers give the same tokens again.

        Raises ValueError for a model that vLLM cannot take.
        """
        if self.engine is None:
            self.start(plain(lm))
        if uniforms is None:
            uniforms = draw_uniforms(len(input_ids), max_new_tokens, generator=generator)
        ends = [eos_id] if isinstance(eos_id, int) else list(eos_id)
        asked = [
            self.vllm.SamplingParams(
                temperature=temperature, max_tokens=max_new_tokens, seed=seed, stop_token_ids=ends, ignore_eos=True,
                logprobs=0, detokenize=False,
            )
            for seed in seeds(uniforms)
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in real_ids(input_ids, attention_mask)]
        with undisturbed(lm.device.type):
            answers = [answer.outputs[0] for answer in self.engine.generate(prompts, asked, use_tqdm=False)]
        tokens, mask = pad([list(answer.token_ids) for answer in answers], pad_id, side="right")
        sampled = [step[token].logprob for x in answers for token, step in zip(x.token_ids, x.logprobs, strict=True)]
        log_probs = torch.zeros(mask.shape).masked_scatter(mask, torch.tensor(sampled))
        ended = torch.tensor([answer.finish_reason == "stop" for answer in answers])
        return Responses(*(x.to(input_ids.device) for x in (tokens, mask, log_probs, ended)))

    def update(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take these weights in place of those before; nothing to do where there is no engine yet."""
        if self.engine is not None:
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.engine.reset_prefix_cache()  # keys and values of the old weights

    def start(self, lm: nn.Module) -> None:
        """Make the engine for a model, in the precision that it samples in now, and give it the weights."""
        name, device = type(lm).__name__, lm.device.type
        # What vLLM has no code for it runs by the library's own, whose classes, the policy's own, it changes.
        known = getattr(self.vllm.ModelRegistry.models.get(name), "module_name", "transformers")
        if "transformers" in known:
            raise ValueError(f"sampler must have code for {name}, which vLLM has not; got vllm")
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else lm.dtype
        options = dict(
            dtype=dtype, skip_tokenizer_init=True, load_format="dummy", logprobs_mode="processed_logprobs",
            model_impl="vllm", generation_config="vllm", enforce_eager=device != "cuda", max_model_len=-1,
        )  # fmt: skip
        options |= {"gpu_memory_utilization": GPU_SHARE} if device == "cuda" else {"kv_cache_memory_bytes": CACHE_BYTES}
        config = copy.deepcopy(lm.config)
        config.architectures = [name]
        try:
            with tempfile.TemporaryDirectory() as folder, undisturbed(device):
                config.save_pretrained(folder)
                self.engine = self.vllm.LLM(folder, **options | self.options)
                self.update(merged_weights(lm))
                if hasattr(lm, "barred_ids"):
                    self.engine.apply_model(lambda model: bar(model, lm.barred_ids))
                # What does not fit a kernel, such as the size of a head, shows when it first reads.
                self.engine.generate({"prompt_token_ids": [0]}, self.vllm.SamplingParams(max_tokens=1), use_tqdm=False)
        except Exception as error:  # whatever an engine may fail of
            self.engine = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            raise ValueError(f"sampler must be an engine that starts for {name}; vLLM says {reason}") from error
        self.tolerance = TOLERANCES[self.engine.model_config.dtype]


def imported() -> "ModuleType":
    """vLLM, set to work in this process, to say nothing but what is wrong, and to report to nobody."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        with warnings.catch_warnings(action="ignore"):
            import vllm

            vllm.LLM, vllm.ModelRegistry, vllm.SamplingParams  # noqa: B018  each is imported when it is asked for
    except Exception as error:  # a broken one may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"sampler must be plain or static where vLLM is not installed (make vllm makes an environment with it); "
            f"got vllm: {reason}"
        ) from error
    return vllm


@contextlib.contextmanager
def undisturbed(device: str) -> Iterator[None]:
    """The engine's precision is its own, and what it changes of this process, generators and threads, is put back."""
    kept = torch.set_num_threads
    try:
        with torch.autocast(device, enabled=False), torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.set_num_threads = kept


def seeds(uniforms: Tensor) -> list[int]:
    """A whole number for each row of numbers from U[0, 1), (B, T) float32 with 24 bits each, made of its first two."""
    high, low = (uniforms[:, column].double().mul(2**24).long() for column in (0, min(1, uniforms.shape[1] - 1)))
    return (high * 2**24 + low).tolist()


def bar(model: nn.Module, barred: Tensor) -> None:
    """Give ids (V,) of a padded vocabulary the logit −∞, as `models.bar_unused_ids` does in the policy itself."""
    logits_of = model.compute_logits
    model.compute_logits = lambda *a, **k: logits_of(*a, **k).masked_fill(barred, -math.inf)
