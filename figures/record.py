"""What is committed and shipped, made anew: the tiny world's models, the recorded runs, the README's pictures.

`python figures/record.py figures` records the runs that are missing, draws the pictures and prints the README's table;
`python figures/record.py assets` rebuilds the shipped models and compares them with the shipped ones;
`python figures/record.py ablation` trains with one setting of PPO changed at a time, which lesson 10 draws;
`python figures/record.py sums` trains on sums, whose reward is a checker, which lesson 15 draws.
"""

import argparse
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rlhf_lessons
from rlhf_lessons import plots, tiny_reviews, tiny_sums
from rlhf_lessons.app.align import TITLES, TRAINERS
from rlhf_lessons.app.cards import Card
from rlhf_lessons.app.run_folder import mean_of_last, read_metrics, summary_table
from rlhf_lessons.config import METHODS, GRPOConfig, PPOConfig, TrainerConfig
from rlhf_lessons.data import encode_prompt, pad
from rlhf_lessons.device import use_threads
from rlhf_lessons.fitting import annotated_preferences, fit_language_model, language_model_loss
from rlhf_lessons.generation import respond
from rlhf_lessons.group_trainers import GRPOTrainer
from rlhf_lessons.models import (
    ASSETS,
    CausalLMWithValueHead,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    new_causal_lm,
    quiet_transformers,
)
from rlhf_lessons.rollout import Credited
from rlhf_lessons.scoring import preference_accuracy, text_log_probs

BASE_MODEL = (
    "pretrain --seed 1 --layers 2 --width 96 --heads 3 --context 48 --lm-epochs 1 --lm-batch-size 64 "
    "--lm-learning-rate 0.004"
).split()
MADE = {"base": "base/base_model", "reward_model": "run/reward_model", "aligned": "run/policy"}  # shipped name -> where
SUMS_MODEL = dict(layers=2, width=96, heads=3, context=32, seed=2)
SUMS_FITS = (  # what the model of sums is trained on, one after the other
    dict(texts=200_000, right=1.0, learning_rate=3e-3),
    dict(texts=15_000, right=0.25, learning_rate=1e-3),
)
TOLERANCES = {
    "perplexity": 0.2,
    "accuracy": 0.04,
    "gold": 0.5,
    "pass@1": 0.05,
}  # between a rebuilt asset and the shipped one
RECORDED_FILES = ("config.json", "metrics.jsonl", "summary.json", "samples.md")
KL_COEFS = (0.0, 0.02, 0.05, 0.1, 0.2)
SEEDS = (0, 1, 2)
OTHERS = tuple(method for method in METHODS if method != "ppo")
ABLATION = {  # what is changed of PPO's default settings, one thing at a time but for one pair
    "default settings": {},
    "constant learning rate": {"lr_schedule": "constant"},
    "no price of a missing EOS": {"missing_eos_penalty": 0.0},
    "neither of the two": {"lr_schedule": "constant", "missing_eos_penalty": 0.0},
    "no whitening": {"whiten_advantages": False},
    "no value clip": {"value_clip_eps": math.inf},
    "no KL in the reward": {"kl_coef": 0.0},
    "1 epoch": {"ppo_epochs": 1},
    "8 epochs": {"ppo_epochs": 8},
    "no gradient clip": {"max_grad_norm": math.inf},
}
ABLATION_ITERATIONS = 20  # of a run
SUMS_SETTINGS = dict(  # of GRPO on sums: no leash, and a wrong answer costs nothing but its chance
    num_iterations=60, batch_size=512, samples_per_prompt=16, minibatch_size=128, ppo_epochs=1, kl_coef=0.0,
    max_new_tokens=tiny_sums.MAX_RESPONSE_TOKENS, missing_eos_penalty=0.0, learning_rate=3e-4, device="cpu",
)  # fmt: skip
SUMS_KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def type_in(folder: Path, *words: str) -> None:
    """`python -m rlhf_lessons WORDS`, typed in that folder. Raises ValueError when the command fails.

    A process of its own, so that what it writes about itself is what one would have to type.
    """
    command = ["-m", "rlhf_lessons", *words]
    paths = [str(Path(rlhf_lessons.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise ValueError(f"python {' '.join(command)} failed with exit code {done.returncode}")


def build_assets(folder: Path) -> None:
    """Train the base model, the reward model, the aligned policy, and the model of sums: fixed seeds and settings."""
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before anything is trained
    with tempfile.TemporaryDirectory() as scratch:
        type_in(Path(scratch), *BASE_MODEL, "--out", "base")
        type_in(Path(scratch), "run", "--model", MADE["base"], "--threads", "1", "--out", "run")
        for name, made in MADE.items():
            shutil.copytree(Path(scratch, made), folder / name, dirs_exist_ok=True)
    build_sums_model(folder / "sums")


def build_sums_model(folder: Path) -> None:
    """A model that can add but often says another number: first right sums, then few texts of which most are wrong.

    GRPO with `SUMS_SETTINGS` takes its pass@1 on held-out sums from .19 to .93. Others that were tried, three runs of
    GRPO each: seed 1, .20 to .89; width 64, .20 to .89 in two thirds of the time; 20,000 right sums first, .06 to .07;
    200,000 texts from the start of which a quarter is right, .20 to .53, though before GRPO its pass@k was no worse.
    """
    tokenizer, seed = tiny_sums.build_tokenizer(), SUMS_MODEL["seed"]
    lm, generator = new_causal_lm(tokenizer, **SUMS_MODEL), torch.Generator().manual_seed(seed)
    use_threads(1)
    for fit in SUMS_FITS:
        texts = tiny_sums.sample_corpus(fit["texts"], generator, right=fit["right"])
        fit_language_model(
            lm, texts, tokenizer, epochs=1, learning_rate=fit["learning_rate"], seed=seed, device="cpu"
        )  # fmt: skip
    with quiet_transformers():
        lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sums_card(lm).save_pretrained(folder)


def sums_card(lm: torch.nn.Module) -> Card:
    """What that model's README.md says."""
    texts = ", then ".join(f"{fit['texts']} sums of which {fit['right']:.0%} are right" for fit in SUMS_FITS)
    rates = " and ".join(f"{fit['learning_rate']:g}" for fit in SUMS_FITS)
    how = f"next-token prediction on {texts}, from random weights"
    return Card(lm, tiny_sums.build_tokenizer(), how, SUMS_MODEL | {"learning_rate": rates})


def measure_assets(folder: Path) -> dict[str, float]:
    """How the tiny worlds' four models behave, on texts drawn anew: what a rebuilt set is compared by.

    perplexity: of the base model, per token; accuracy: of the reward model, on annotated pairs; gold: mean gold
    reward of the aligned policy's responses; pass@1: of the model of sums, on held-out ones.
    """
    tokenizer = load_tokenizer(folder / "base")
    generator = torch.Generator().manual_seed(20_000)
    texts = tiny_reviews.sample_corpus(1000, generator)
    tokens, mask = pad(
        [encode_prompt(tokenizer, text) + [tokenizer.eos_token_id] for text in texts],
        tokenizer.pad_token_id,
        side="right",
    )
    base = load_causal_lm(folder / "base")
    pairs = annotated_preferences(base, tokenizer, 1000, seed=20_001)
    prompts = tiny_reviews.prompts(500, generator)
    responses = respond(load_causal_lm(folder / "aligned"), tokenizer, prompts, generator=generator)
    with torch.no_grad():
        return {
            "perplexity": math.exp(language_model_loss(base, tokens, mask)),
            "accuracy": preference_accuracy(load_reward_model(folder / "reward_model"), pairs, tokenizer),
            "gold": float(tiny_reviews.gold_reward(prompts, responses).mean()),
            "pass@1": float(chances(load_causal_lm(folder / "sums"), "held_out").mean()),
        }


def rebuild_assets(folder: Path) -> None:
    """Build the assets in a folder and print them beside the shipped ones. Raises ValueError where they differ."""
    build_assets(folder)
    shipped, rebuilt = measure_assets(ASSETS), measure_assets(folder)
    print("| | shipped | rebuilt | tolerance |\n| --- | ---: | ---: | ---: |")
    for name, tolerance in TOLERANCES.items():
        print(f"| {name} | {shipped[name]:.3f} | {rebuilt[name]:.3f} | {tolerance} |")
    if any(abs(shipped[name] - rebuilt[name]) > tolerance for name, tolerance in TOLERANCES.items()):
        raise ValueError(f"the models rebuilt in {folder} do not behave as the shipped ones")


def method_name(method: str, seed: int) -> str:
    """The folder of a recorded run by another method than PPO."""
    return f"{method}-seed{seed}"


def method_words(method: str, seed: int) -> list[str]:
    """What is typed for it: that method's default settings."""
    return ["run", "--method", method, "--seed", str(seed)]


def run_name(kl_coef: float, seed: int) -> str:
    """The folder of a recorded run."""
    return f"kl{kl_coef:g}-seed{seed}"


def run_words(kl_coef: float, seed: int) -> list[str]:
    """What is typed for a recorded run: default settings but for these two."""
    return ["run", "--kl-coef", f"{kl_coef:g}", "--seed", str(seed)]


def record_runs(
    folder: Path, kl_coefs: tuple[float, ...] = KL_COEFS, seeds: tuple[int, ...] = SEEDS,
    methods: tuple[str, ...] = OTHERS,
) -> None:  # fmt: skip
    """A run for each seed and each β of PPO's, and by each other method; finished ones are left as they are.

    Of a run its settings, metrics, summary and samples are kept.
    """
    for seed in seeds:
        asked = {run_name(kl_coef, seed): run_words(kl_coef, seed) for kl_coef in kl_coefs}
        asked |= {method_name(method, seed): method_words(method, seed) for method in methods}
        for name, words in asked.items():
            if (folder / name / "summary.json").exists():
                continue
            with tempfile.TemporaryDirectory() as scratch:
                type_in(Path(scratch), *words, "--out", name)
                (folder / name).mkdir(parents=True, exist_ok=True)
                for file in RECORDED_FILES:
                    shutil.copy(Path(scratch, name, file), folder / name / file)


def draw_figures(folder: Path, runs: Path) -> None:
    """The README's pictures, from the recorded runs."""
    plots.use_style()
    recorded = {b: [read_metrics(runs / run_name(b, seed)) for seed in SEEDS] for b in KL_COEFS}
    beta = PPOConfig().kl_coef
    panels = {"without a KL penalty (β = 0)": recorded[0.0], f"with it (β = {beta:g})": recorded[beta]}
    plots.save(plots.proxy_and_gold(panels), folder / "reward_hacking.png")
    plots.save(
        plots.overoptimisation({f"β = {b:g}": rows for b, rows in recorded.items()}), folder / "overoptimisation.png"
    )
    methods = {"PPO": recorded[beta]}
    methods |= {TITLES[m]: [read_metrics(runs / method_name(m, seed)) for seed in SEEDS] for m in OTHERS}
    plots.save(plots.overoptimisation(methods, rewards=("gold",)), folder / "methods.png")
    plots.save(plots.four_models(), folder / "four_models.png")
    plots.save(plots.clip_regions(), folder / "clip_regions.png")


def gold_at(rows: list[dict], nats: float) -> float | None:
    """Gold reward where a run first passes that KL, on the line between two iterations; None where it never does."""
    for before, after in itertools.pairwise(rows):
        if before["kl"] < nats <= after["kl"]:
            share = (nats - before["kl"]) / (after["kl"] - before["kl"])
            return before["gold"] + share * (after["gold"] - before["gold"])
    return None


def gold_table(runs: Path, kls: tuple[float, ...] = (2, 4, 6)) -> str:
    """A Markdown table: each method's gold reward at some KLs, the mean and the range over the seeds that get there."""
    header = [f"gold at {nats} nats" for nats in kls]
    lines = ["| method | " + " | ".join(header) + " |", "| --- |" + " --- |" * len(kls)]
    names = {"PPO": lambda seed: run_name(PPOConfig().kl_coef, seed)}
    names |= {TITLES[m]: functools.partial(method_name, m) for m in OTHERS}
    for title, name in names.items():
        rows, cells = [read_metrics(runs / name(seed)) for seed in SEEDS], []
        for nats in kls:
            found = [gold for seed in rows if (gold := gold_at(seed, nats)) is not None]
            spread = f"{sum(found) / len(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else "–"
            cells.append(spread + (f", {len(found)} of {len(rows)}" if 0 < len(found) < len(rows) else ""))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figures(folder: Path) -> None:
    """Record what is missing of the runs, draw the README's pictures and print its table."""
    runs = folder / "runs"
    record_runs(runs)
    draw_figures(folder, runs)
    shown = [run_name(b, seed) for b in (PPOConfig().kl_coef, 0.0) for seed in SEEDS]
    shown += [method_name(method, seed) for method in OTHERS for seed in SEEDS]
    print(summary_table([runs / name for name in shown]), gold_table(runs), sep="\n\n")


def write_json(path: Path, content: dict, **options: Any) -> None:
    """The file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(content, **options) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def tiny_run(
    method: str, config: TrainerConfig, prompts: list[str], measure: Callable[[Credited], dict] = lambda batch: {},
    **options: Any,
) -> list[dict[str, float]]:  # fmt: skip
    """The metrics of a run on the shipped models, with the gold reward of each batch and what `measure` says of it.

    options: of the trainer, such as its sampler.
    """
    base = ASSETS / "base"
    with torch.random.fork_rng(devices=[]):
        policy = CausalLMWithValueHead.from_pretrained(base) if method == "ppo" else load_causal_lm(base)
    trainer = TRAINERS[method](
        config, policy, load_causal_lm(base), load_reward_model(ASSETS / "reward_model"), prompts,
        load_tokenizer(base), **options,
    )  # fmt: skip

    def add(step: int, metrics: dict[str, float], batch: Credited) -> None:
        metrics |= {"gold": float(tiny_reviews.gold_reward(*trainer.texts(batch)).mean())} | measure(batch)

    return trainer.train(add)


def ablation_run(seed: int, changes: dict) -> dict[str, float]:
    """How a run of the tiny world ends with these settings: means of its last iterations."""
    config = PPOConfig(num_iterations=ABLATION_ITERATIONS, seed=seed, device="cpu", **changes)
    history = tiny_run("ppo", config, tiny_reviews.prompts(500, torch.Generator().manual_seed(10)))
    return {name: round(mean_of_last(history, name), 3) for name in ("score", "gold", "kl", "ended", "response_length")}


def ablation(folder: Path, seeds: tuple[int, ...] = SEEDS) -> None:
    """A run for each change and seed, kept in ablation.json after each change; finished ones are left as they are."""
    path = folder / "ablation.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    use_threads(1)
    for label, changes in ABLATION.items():
        if label in kept:
            continue
        kept[label] = [ablation_run(seed, changes) for seed in seeds]
        write_json(path, kept, indent=1)


def chances(lm: torch.nn.Module, split: str) -> torch.Tensor:
    """The exact probability (N,) float64 of the right answer to each sum of a split."""
    prompts = tiny_sums.problems(split)
    answers = [tiny_sums.answer(prompt) for prompt in prompts]
    return text_log_probs(lm, tiny_sums.build_tokenizer(), prompts, answers, batch_size=len(prompts)).double().exp()


def pass_at(lm: torch.nn.Module) -> dict[str, dict[str, float]]:
    """Exact pass@k, the mean over a split's sums: split -> k -> value."""
    found = {split: chances(lm, split) for split in tiny_sums.SPLITS}
    return {split: {str(k): round(float(1 - (1 - p).pow(k).mean()), 4) for k in SUMS_KS} for split, p in found.items()}


def sums_run(seed: int) -> dict:
    """One run of GRPO on the training sums: exact pass@1 before and after each iteration, pass@k at its end."""
    lm, reference = (load_causal_lm(ASSETS / "sums") for _ in range(2))
    trainer = GRPOTrainer(
        GRPOConfig(seed=seed, **SUMS_SETTINGS), lm, reference, tiny_sums.correct, tiny_sums.problems("train"),
        load_tokenizer(ASSETS / "sums"),
    )  # fmt: skip
    curves = {split: [round(float(chances(lm, split).mean()), 4)] for split in tiny_sums.SPLITS}

    def measure(step: int, metrics: dict[str, float], batch: object) -> None:
        for split, curve in curves.items():
            curve.append(round(float(chances(lm, split).mean()), 4))

    history = trainer.train(measure)
    spent = sum(row["seconds_rollout"] + row["seconds_update"] for row in history)
    kept = {name: [round(row[name], 4) for row in history] for name in ("score", "entropy", "kl")}
    return {"seed": seed, "seconds": round(spent, 1), "pass@1": curves, "after": pass_at(lm)} | kept


def sums(folder: Path, seeds: tuple[int, ...] = SEEDS) -> None:
    """A run for each seed, and the model that all of them start from, in sums.json."""
    use_threads(1)
    before = pass_at(load_causal_lm(ASSETS / "sums"))
    kept = {"settings": SUMS_SETTINGS, "before": before, "runs": [sums_run(seed) for seed in seeds]}
    write_json(folder / "sums.json", kept, indent=1)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Make what is asked for. Returns 0, or 2 after one line on what was wrong."""
    parser = Parser(prog="python figures/record.py", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("figures", "assets", "ablation", "sums"))
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="default: figures, figures/ablation, figures/tiny_sums, or runs/assets",
    )
    options = parser.parse_args(argv)
    try:
        if options.what == "figures":
            figures(options.out or Path(__file__).parent)
        elif options.what == "ablation":
            ablation(options.out or Path(__file__).parent / "ablation")
        elif options.what == "sums":
            sums(options.out or Path(__file__).parent / "tiny_sums")
        else:
            rebuild_assets(options.out or Path("runs", "assets"))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
