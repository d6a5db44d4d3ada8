"""The recorded experiments of lessons 11 to 14 and 16, made anew by `python figures/beyond.py` and one of their names.

Each is kept as JSON in a folder of its name, with its settings, and takes three to ten minutes of one core.
"""

import argparse
import copy
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from record import SEEDS, SUMS_SETTINGS, chances, tiny_run, write_json
from torch import Tensor, nn

from rlhf_lessons import tiny_reviews, tiny_sums
from rlhf_lessons.config import METHODS, GRPOConfig, RLOOConfig, SamplingConfig
from rlhf_lessons.data import encode_prompts, pad
from rlhf_lessons.device import use_threads
from rlhf_lessons.fitting import annotated_preferences, fit_dpo, fit_reward_model, preference_log_probs
from rlhf_lessons.generation import Responses, Sampler, eos_ids, respond, sample_batch, sample_responses
from rlhf_lessons.group_trainers import GRPOTrainer, RLOOTrainer
from rlhf_lessons.kl import best_of_n_bound
from rlhf_lessons.models import (
    ASSETS,
    RewardModel,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    new_causal_lm,
)
from rlhf_lessons.rollout import Credited, response_log_probs
from rlhf_lessons.scoring import (
    ModelScorer,
    TextScorer,
    best_of_mean,
    preference_accuracy,
    score_texts,
    text_log_probs,
)

FIGURES = Path(__file__).resolve().parent


# --- Lesson 11: where the KL is paid ----------------------------------------------------------------------------------

KL_PLACES = {  # where the KL is paid, and by which estimate; β = 0 beside them
    "none": {"kl_coef": 0.0},
    **{f"{kind} in the {place}": {"kl_in": place, "kl_kind": kind}
       for place in ("loss", "reward") for kind in ("k1", "k2", "k3")},
}  # fmt: skip
# Centred scores, sums over a text's tokens: score and leash are then weighed as in E[score] − β·KL.
KL_SETTINGS = {
    "num_iterations": 30, "batch_size": 128, "samples_per_prompt": 8, "minibatch_size": 32, "ppo_epochs": 2,
    "kl_coef": 0.1, "advantage_scale": "none", "loss_over": "constant",
}  # fmt: skip


def kl_place_run(seed: int, changes: dict) -> dict[str, list[float]]:
    """Score, gold, KL and length of a run of the tiny world, iteration by iteration."""
    config = GRPOConfig(**KL_SETTINGS | changes, seed=seed, device="cpu")
    history = tiny_run("grpo", config, tiny_reviews.prompts(500, torch.Generator().manual_seed(10)))
    return {name: [round(row[name], 3) for row in history] for name in ("score", "gold", "kl", "response_length")}


def kl_places(folder: Path, seeds: tuple[int, ...] = SEEDS) -> None:
    """A run for each place and seed, kept in kl_places.json after each place; finished ones are left as they are."""
    path = folder / "kl_places.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": KL_SETTINGS, "runs": {}}
    use_threads(1)
    for label, changes in KL_PLACES.items():
        if label in kept["runs"]:
            continue
        kept["runs"][label] = [kl_place_run(seed, changes) for seed in seeds]
        write_json(path, kept, ensure_ascii=False)


# --- Lesson 12: methods without a critic ------------------------------------------------------------------------------

GROUPS_COMMON = {"num_iterations": 50, "ppo_epochs": 2, "learning_rate": 1e-3, "kl_coef": 0.05}
IN_REWARD = {"kl_in": "reward", "kl_kind": "k1"}
GROUPS = {  # what lesson 12 compares: a method, and what differs from GROUPS_COMMON
    "PPO": ("ppo", {}),
    "RLOO": ("rloo", {}),
    "GRPO": ("grpo", IN_REWARD),
    "Dr. GRPO": ("grpo", IN_REWARD | {"advantage_scale": "none", "loss_over": "constant"}),
    "batch scale": ("grpo", IN_REWARD | {"advantage_scale": "batch"}),
    "GSPO": ("grpo", IN_REWARD | {"ratio_level": "sequence", "loss_over": "sequences"}),
    "GRPO, KL in the loss": (
        "grpo",
        {"loss_over": "sequences", "kl_coef": 0.1, "kl_in": "loss", "kl_kind": "k3"},
    ),
}
GROUP_METRICS = {
    "kl": "kl",
    "score": "score",
    "length": "response_length",
    "equal_scores": "equal_scores",
    "deviation": "deviation",
}  # deviation: of the scores in a group, on average


def group_run(method: str, settings: dict, seed: int) -> dict:
    """One run on the shipped models: gold and some metrics by iteration, its tokens and seconds."""
    config = METHODS[method](**GROUPS_COMMON | settings | {"seed": seed, "device": "cpu"})

    def measure(batch: Credited) -> dict[str, float]:
        found = {"tokens": int(batch.response_mask.sum())}
        if config.samples_per_prompt > 1:
            grouped = batch.scores.view(-1, config.samples_per_prompt)
            found["deviation"] = grouped.std(dim=1, correction=0).mean().item()
        return found

    prompts = tiny_reviews.prompts(2000, torch.Generator().manual_seed(seed))
    history = tiny_run(method, config, prompts, measure)
    tokens = sum(row["tokens"] for row in history)
    seconds = sum(row["seconds_rollout"] + row["seconds_update"] for row in history)
    names = {"gold": "gold"} | {new: old for new, old in GROUP_METRICS.items() if old in history[0]}
    curves = {new: [round(row[old], 4) for row in history] for new, old in names.items()}
    return {"seed": seed, "tokens": tokens, "seconds": round(seconds, 1)} | curves


def groups(folder: Path, run=group_run) -> None:
    """Each of GROUPS with each seed, one thread, into groups.json."""
    use_threads(1)
    methods = {
        name: {
            "method": method,
            "settings": GROUPS_COMMON | settings,
            "seeds": [run(method, settings, seed) for seed in SEEDS],
        }
        for name, (method, settings) in GROUPS.items()
    }
    write_json(folder / "groups.json", methods)


# --- Lesson 13: preferences without sampling --------------------------------------------------------------------------

DPO_PAIRS, DPO_LOOKS, DPO_SHOWN = 4000, 10, 250  # pairs fitted; looks in a run; pairs whose likelihood is looked at
DPO_SETTINGS = {"epochs": 2, "batch_size": 32, "learning_rate": 5e-4}
DPO_RUNS = {
    "dpo, β = 0.1": {"beta": 0.1},
    "dpo, β = 0.03": {"beta": 0.03},
    "dpo, β = 0.3": {"beta": 0.3},
    "ipo, β = 0.1": {"beta": 0.1, "loss": "ipo"},
}


@torch.no_grad()
def looked_at(policy, reference, tokenizer, scorers, pairs, before, *, count: int = 512) -> dict[str, float]:
    """Gold, proxy and KL of texts that the policy samples; log-probabilities of pairs, less the reference's."""
    dice, config = torch.Generator().manual_seed(7), SamplingConfig(device="cpu")
    encoded = encode_prompts(tokenizer, tiny_reviews.prompts(count, dice), max_new_tokens=24, context=48)
    input_ids, mask = pad(encoded, tokenizer.pad_token_id, side="left")
    samples = sample_batch(
        policy, input_ids, mask, max_new_tokens=24, eos_id=eos_ids(policy, tokenizer), temperature=1.0,
        pad_id=tokenizer.pad_token_id, generator=dice,
    )  # fmt: skip
    ratio = response_log_probs(policy, samples, config) - response_log_probs(reference, samples, config)
    seen = {"kl": float(ratio.sum(1).mean()), "length": float(samples.response_mask.sum(1).float().mean())}
    seen |= {name: float(scorer(samples).mean()) for name, scorer in scorers.items()}
    for name, some in pairs.items():
        moved = [
            now - then for now, then in zip(preference_log_probs(policy, some, tokenizer), before[name], strict=True)
        ]
        seen |= {f"{name}_{side}": float(x.mean()) for side, x in zip(("chosen", "rejected"), moved, strict=True)}
        seen[f"{name}_right"] = float((moved[0] > moved[1]).float().mean())
    return seen


def dpo_run(seed: int, *, beta: float, loss: str = "dpo", looks: int = DPO_LOOKS, **settings) -> dict[str, list[float]]:
    """What `looked_at` sees at the start and `looks` times while a fit with annotators of its own goes on."""
    tokenizer = load_tokenizer(ASSETS / "base")
    policy, reference = (load_causal_lm(ASSETS / "base") for _ in range(2))
    scorers = {
        "gold": TextScorer(tiny_reviews.gold_reward, tokenizer),
        "score": ModelScorer(load_reward_model(ASSETS / "reward_model")),
    }
    drawn = annotated_preferences(reference, tokenizer, 5000, seed=seed)
    pairs = {"fitted": drawn[:DPO_SHOWN], "held_out": drawn[DPO_PAIRS : DPO_PAIRS + DPO_SHOWN]}
    before = {name: preference_log_probs(reference, some, tokenizer) for name, some in pairs.items()}
    rows = []

    def look(step: int = 0, steps: int = 1, _: float = 0.0) -> None:
        if step * looks // steps > (step - 1) * looks // steps:
            policy.eval()
            rows.append({"step": step} | looked_at(policy, reference, tokenizer, scorers, pairs, before))
            policy.train()

    look()
    fit_dpo(policy, reference, drawn[:DPO_PAIRS], tokenizer, beta=beta, loss=loss, seed=seed, device="cpu",
            on_step=look, **DPO_SETTINGS | settings)  # fmt: skip
    return {name: [round(row[name], 3) for row in rows] for name in rows[0]}


def offline(folder: Path, seeds: tuple[int, ...] = SEEDS, labels: tuple[str, ...] = tuple(DPO_RUNS)) -> None:
    """A run for each of DPO_RUNS and each seed, kept in offline.json after each; finished ones are left as they are."""
    path = folder / "offline.json"
    settings = DPO_SETTINGS | {"pairs": DPO_PAIRS, "texts": 512, "shown": DPO_SHOWN}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": settings, "runs": {}}
    use_threads(1)
    for seed in seeds:
        for label in labels:
            done = kept["runs"].setdefault(label, [])
            if len(done) > seed:
                continue
            done.append(dpo_run(seed, **DPO_RUNS[label]))
            write_json(path, kept, ensure_ascii=False)


# --- Lesson 14: how much to ask of a proxy ----------------------------------------------------------------------------

GOODHART_NS = tuple(2**k for k in range(11))
GOODHART = dict(prompts=24, samples=1024, steps=250, batch_size=16, held_out=1000, seed=14)
NOISELESS = 1e-6  # temperature of annotators who are never wrong
SMALL_MODEL = dict(layers=1, width=32, heads=2, context=48)
JUDGES = {  # what is compared: the pairs that a reward model learns from, and what differs from the base model's trunk
    "250 pairs": dict(pairs=250),
    "1,000 pairs": dict(pairs=1000),
    "4,000 pairs": dict(pairs=4000),
    "4,000, small": dict(pairs=4000, small=True),
    "4,000, no noise": dict(pairs=4000, temperature=NOISELESS),
}


class Pool:
    """The base model's samples: `shape` prompts × samples, each distinct text once, and what it is worth."""

    def __init__(self) -> None:
        self.base, self.tokenizer = load_causal_lm(ASSETS / "base"), load_tokenizer(ASSETS / "base")
        generator = torch.Generator().manual_seed(GOODHART["seed"])
        self.prompts = tiny_reviews.prompts(GOODHART["prompts"], generator)
        asked = [prompt for prompt in self.prompts for _ in range(GOODHART["samples"])]
        texts = respond(self.base, self.tokenizer, asked, generator=generator, batch_size=2048)
        self.shape = GOODHART["prompts"], GOODHART["samples"]
        pairs = sorted(set(zip(asked, texts, strict=True)), key=lambda pair: (len(pair[1].split()), pair))
        number = {pair: i for i, pair in enumerate(pairs)}
        self.rows = torch.tensor([number[pair] for pair in zip(asked, texts, strict=True)]).view(self.shape)
        self.texts = [list(column) for column in zip(*pairs, strict=True)]
        self.gold_raw = tiny_reviews.gold_reward(*self.texts)[self.rows]
        self.gold = standardised(self.gold_raw)
        self.probs = text_log_probs(self.base, self.tokenizer, *self.texts, batch_size=1024).double().exp()[self.rows]
        self.held_out = annotated_preferences(self.base, self.tokenizer, GOODHART["held_out"], seed=GOODHART["seed"])

    def scores(self, model: nn.Module) -> Tensor:
        """A reward model's scores of the samples, standardised."""
        return standardised(score_texts(model, self.tokenizer, *self.texts, batch_size=1024)[self.rows])


def standardised(x: Tensor) -> Tensor:
    """Each prompt's mean taken off, then divided by the deviation that is left: (prompts, samples)."""
    centred = x - x.mean(dim=1, keepdim=True)
    return centred / centred.square().mean().sqrt()


def answers(pool: Pool, seed: int) -> list[list[str]]:
    """Prompts and two answers to each, of which the annotators are to choose."""
    generator = torch.Generator().manual_seed(seed)
    prompts = tiny_reviews.prompts(max(judge["pairs"] for judge in JUDGES.values()), generator)
    return [prompts, *(respond(pool.base, pool.tokenizer, prompts, generator=generator) for _ in range(2))]


def judge_of(
    pool: Pool, asked: list[list[str]], seed: int, *, pairs: int, small: bool = False,
    temperature: float = tiny_reviews.ANNOTATOR_TEMPERATURE,
) -> nn.Module:  # fmt: skip
    """A reward model, fitted by the same number of steps whatever the number of pairs."""
    generator = torch.Generator().manual_seed(seed)
    chosen = tiny_reviews.preference_pairs(*(x[:pairs] for x in asked), generator, temperature=temperature)
    lm = new_causal_lm(pool.tokenizer, **SMALL_MODEL, seed=seed) if small else pool.base
    model = RewardModel.from_causal_lm(lm, pad_token_id=pool.tokenizer.pad_token_id, seed=seed)
    fit_reward_model(
        model, chosen, pool.tokenizer, epochs=GOODHART["steps"] * GOODHART["batch_size"] / pairs,
        batch_size=GOODHART["batch_size"], learning_rate=3e-3 if small else 1e-3, seed=seed, device="cpu",
    )  # fmt: skip
    return model


def curves(pool: Pool, scores: Tensor) -> dict[str, list[float]]:
    """Mean proxy and gold of best-of-n, in deviations, for each n."""
    twice, values = torch.cat([scores, scores]), torch.cat([scores, pool.gold])
    kept = [best_of_mean(twice, values, n).view(2, -1).mean(dim=1) for n in GOODHART_NS]
    return {name: rounded(x) for name, x in zip(("proxy", "gold"), torch.stack(kept, dim=1), strict=True)}


def rounded(x: Tensor) -> list[float]:
    return [round(value, 4) for value in x.tolist()]


def estimated_kl(pool: Pool, scores: Tensor) -> list[float]:
    """KL of best-of-n, the mean over prompts: the bound less what the texts' own chances take away.

    A text of chance p that stands at [a, b) of the order, b − a = p, has one density where the bound counts its slope;
    where it stands is read from the samples. Texts that were not sampled are too unlikely to matter.
    """
    taken = torch.zeros(len(GOODHART_NS), dtype=torch.float64)
    n = torch.tensor(GOODHART_NS, dtype=torch.float64)[:, None]

    def integral(u: Tensor) -> Tensor:
        """∫ n u^(n−1) log(n u^(n−1)) du."""
        return u**n * (n.log() + (n - 1) * u.clamp(min=1e-300).log() - (n - 1) / n)

    for row, score, prob in zip(pool.rows, scores, pool.probs, strict=True):
        _, where, count = row[score.argsort(stable=True)].unique_consecutive(return_inverse=True, return_counts=True)
        first = torch.searchsorted(where, torch.arange(len(count)))
        p = prob[score.argsort(stable=True)][first]
        middle = (count.cumsum(0) - count / 2) / len(row)
        b = torch.minimum(middle + p / 2, torch.ones_like(p))
        a = (b - p).clamp(min=0)
        mass = (b**n - a**n).clamp(min=1e-300)
        taken += (integral(b) - integral(a) - mass * (mass / (b - a)).log()).clamp(min=0).sum(dim=1)
    return rounded(torch.tensor([best_of_n_bound(k) for k in GOODHART_NS]) - taken / len(scores))


def shuffled_errors(pool: Pool, scores: Tensor, seed: int) -> Tensor:
    """What a judge says with its errors handed to other answers of the same prompt: as large, but without a pattern."""
    share = (scores * pool.gold).mean()
    errors = scores - share * pool.gold
    order = torch.rand(errors.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return standardised(share * pool.gold + errors.gather(1, order))


def kept_texts(pool: Pool, scores: Tensor, count: int = 3) -> list[dict]:
    """What the best of all samples reads like, for the first prompts."""
    best = scores.argmax(dim=1)[:count]
    return [
        {
            "prompt": pool.prompts[i], "text": pool.texts[1][int(pool.rows[i, j])],
            "proxy": round(float(scores[i, j]), 2), "gold": round(float(pool.gold_raw[i, j]), 2),
        }
        for i, j in enumerate(best.tolist())
    ]  # fmt: skip


def goodhart(folder: Path, seeds: tuple[int, ...] = SEEDS) -> None:
    """Best-of-n by each of JUDGES with each seed, all on the same samples, and two controls, into goodhart.json."""
    use_threads(1)
    started = time.process_time()
    pool = Pool()
    kept = {
        "settings": GOODHART | {"judges": JUDGES, "small": SMALL_MODEL}, "n": list(GOODHART_NS),
        "gold_deviation": round(float((pool.gold_raw - pool.gold_raw.mean(1, keepdim=True)).square().mean().sqrt()), 4),
        "gold": {"kl": estimated_kl(pool, pool.gold)} | curves(pool, pool.gold),
        "judges": {name: [] for name in JUDGES},
    }  # fmt: skip
    for seed in seeds:
        asked = answers(pool, seed)
        for name, judge in JUDGES.items():
            model = judge_of(pool, asked, seed, **judge)
            scores = pool.scores(model)
            row = {
                "seed": seed, "accuracy": round(preference_accuracy(model, pool.held_out, pool.tokenizer), 3),
                "correlation": round(float((scores * pool.gold).mean()), 3), "kl": estimated_kl(pool, scores),
            }  # fmt: skip
            row |= curves(pool, scores) | {"shuffled": curves(pool, shuffled_errors(pool, scores, seed))}
            kept["judges"][name].append(row | {"kept": kept_texts(pool, scores)})
            print(f"{time.process_time() - started:.0f} s: {seed} {name} {row}", flush=True)
    kept["cpu_seconds"] = round(time.process_time() - started)
    write_json(folder / "goodhart.json", kept)


# --- Lesson 16: samples by another engine -----------------------------------------------------------------------------

COARSE_BITS, STALE_AGE = 3, 8  # bits of a weight; iterations that the weights are old
LOOKS = 5  # iterations from one look at the policy itself to the next
STALE_SETTINGS = {"num_iterations": 50, "learning_rate": 1e-3, "kl_coef": 0.05, "ppo_epochs": 2}
ENGINES = ("coarse", "stale")  # GRPO on sums by a copy in few bits; RLOO on reviews by a copy that is late
CORRECTIONS = {  # how the samples of the other engine are weighed; None: no other engine
    "own samples": None,
    "no weights": {"sampler_correction": "none"},
    "tokens, cap 2": {"sampler_correction": "truncate"},
    "texts, cap 2": {"sampler_correction": "truncate", "sampler_correction_level": "sequence"},
    "tokens, masked at 2": {"sampler_correction": "mask"},
}


def coarse(x: Tensor, bits: int) -> Tensor:
    """Each row of a matrix rounded to 2^bits − 1 even values from minus to plus its largest weight; vectors as is."""
    if x.dim() < 2:
        return x
    top = 2 ** (bits - 1) - 1
    step = x.abs().amax(dim=-1, keepdim=True) / top
    return torch.where(step > 0, (x / step).round() * step, x)


class CopySampler(Sampler):
    """Samples with a copy of the policy."""

    exact = False

    def __init__(self, lm: nn.Module) -> None:
        self.lm = copy.deepcopy(lm)

    def __call__(self, lm: nn.Module, *inputs: Tensor, **options: Any) -> Responses:
        return sample_responses(self.lm, *inputs, **options)


class CoarseSampler(CopySampler):
    """Its weights have few bits, and are made anew before each batch."""

    def __init__(self, lm: nn.Module, bits: int) -> None:
        super().__init__(lm)
        self.bits = bits
        self.update(lm.state_dict().items())

    def update(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.lm.load_state_dict({name: coarse(x, self.bits) for name, x in weights})


class StaleSampler(CopySampler):
    """Its weights are those of `age` iterations ago, the first ones until there are older."""

    def __init__(self, lm: nn.Module, age: int) -> None:
        super().__init__(lm)
        self.age, self.kept = age, deque()

    def update(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.kept.append({name: x.clone() for name, x in weights})
        if len(self.kept) > self.age:
            self.lm.load_state_dict(self.kept.popleft())


def engine_run(engine: str, correction: dict | None, seed: int, **settings: Any) -> dict:
    """One run: by iteration what the log says, and every LOOKS iterations what the policy itself is worth.

    On sums that is its exact pass@1, on reviews the gold reward of 256 responses of its own, by the same numbers.
    """
    sums = engine == "coarse"
    base = ASSETS / ("sums" if sums else "base")
    lm, reference = (load_causal_lm(base) for _ in range(2))
    config = (
        (SUMS_SETTINGS if sums else STALE_SETTINGS) | (correction or {}) | {"seed": seed, "device": "cpu"} | settings
    )
    dice = torch.Generator().manual_seed(seed)
    prompts = tiny_sums.problems("train") if sums else tiny_reviews.prompts(2000, dice)
    shown = tiny_reviews.prompts(256, torch.Generator().manual_seed(16))
    sampler = CoarseSampler(lm, COARSE_BITS) if sums else StaleSampler(lm, STALE_AGE)
    trainer = (GRPOTrainer if sums else RLOOTrainer)(
        (GRPOConfig if sums else RLOOConfig)(**config), lm, reference,
        tiny_sums.correct if sums else load_reward_model(ASSETS / "reward_model"), prompts, load_tokenizer(base),
        sampler=sampler if correction else None,
    )  # fmt: skip

    def worth() -> dict[str, float]:
        if sums:
            return {split: float(chances(lm, split).mean()) for split in tiny_sums.SPLITS}
        own = respond(lm, trainer.tokenizer, shown, generator=torch.Generator().manual_seed(16))
        return {"gold": float(tiny_reviews.gold_reward(shown, own).mean())}

    looks = [worth()]

    def look(step: int, metrics: dict[str, float], batch: Credited) -> None:
        if not sums:
            metrics["gold"] = float(tiny_reviews.gold_reward(*trainer.texts(batch)).mean())
        if step % LOOKS == 0:
            looks.append(worth())

    started = time.process_time()
    history = trainer.train(look)
    logged = {name: [round(row[name], 4) for row in history]
              for name in ("score", "gold", "kl", "sampler_error") if name in history[0]}  # fmt: skip
    policy = {name: [round(row[name], 4) for row in looks] for name in looks[0]}
    return {"seed": seed, "seconds": round(time.process_time() - started, 1), "log": logged, "policy": policy}


def many_machines(folder: Path, seeds: tuple[int, ...] = SEEDS) -> None:
    """A run for each of ENGINES, of CORRECTIONS and seed, kept in many_machines.json after each; finished ones stay."""
    path = folder / "many_machines.json"
    settings = {
        "coarse": SUMS_SETTINGS | {"bits": COARSE_BITS}, "stale": STALE_SETTINGS | {"age": STALE_AGE}, "looks": LOOKS,
        "corrections": CORRECTIONS,
    }  # fmt: skip
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": settings, "runs": {}}
    use_threads(1)
    for seed in seeds:
        for engine in ENGINES:
            for name, correction in CORRECTIONS.items():
                done = kept["runs"].setdefault(engine, {}).setdefault(name, [])
                if len(done) > seed:
                    continue
                done.append(engine_run(engine, correction, seed))
                write_json(path, kept, ensure_ascii=False)


# --- The command ------------------------------------------------------------------------------------------------------

WHAT: dict[str, Callable[[Path], None]] = {
    function.__name__: function for function in (kl_places, groups, offline, goodhart, many_machines)
}


def main(argv: list[str] | None = None) -> int:
    """Make what is asked for, where it is kept."""
    parser = argparse.ArgumentParser(prog="python figures/beyond.py", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=tuple(WHAT))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: figures/ and the experiment's name")
    options = parser.parse_args(argv)
    WHAT[options.what](options.out or FIGURES / options.what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
