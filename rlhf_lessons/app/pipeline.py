"""The stages of RLHF as commands run them: language model → preferences → reward model → PPO → report.

A stage takes what is in memory and leaves a folder in the usual Hugging Face layout, so that any of them can be
replaced by one's own.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_lessons import data, tiny_reviews
from rlhf_lessons.app.inputs import (
    Inputs,
    Model,
    Records,
    check_lengths,
    choose_pairs,
    choose_prompts,
    choose_score,
    read_alike,
    warn_of_unknown,
)
from rlhf_lessons.app.options import USES
from rlhf_lessons.app.run_folder import RunFolder, draw_run, mean_of_last, samples_table
from rlhf_lessons.config import PPOConfig, Settings, require
from rlhf_lessons.display import fit_progress, progress, say
from rlhf_lessons.fitting import annotated_preferences, fit_language_model, fit_reward_model
from rlhf_lessons.forward import context_of
from rlhf_lessons.generation import eos_ids, sample_batch
from rlhf_lessons.models import CausalLMWithValueHead, RewardModel, bar_unused_ids, new_causal_lm
from rlhf_lessons.rollout import RolloutBatch
from rlhf_lessons.scoring import Scorer, as_scorer, preference_accuracy
from rlhf_lessons.trainer import PPOTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = ("critic", "sampler", "opening_words", "long_pairs")  # options that are no setting of a fit or of PPO
NUM_TEXTS = 64_000  # of the tiny world, that its base model learns to write from
NUM_HELD_OUT = 1000  # pairs of the tiny world that a reward model is measured on
NUM_SHOWN = 8  # responses read side by side


def write_config(folder: RunFolder, inputs: Inputs, settings: Settings, arguments: argparse.Namespace) -> None:
    """The settings that this command reads, and what it was given."""
    read = {
        section: {k: v for k, v in asdict(getattr(settings, section)).items() if names is None or k in names}
        for section, names in USES[arguments.command].items()
    }
    others = {name: getattr(arguments, name) for name in NAMED if name in arguments}
    folder.write_config({"sources": inputs.given, **read, **others, "threads": torch.get_num_threads()})


def run(inputs: Inputs, settings: Settings, folder: RunFolder, arguments: argparse.Namespace) -> dict[str, Any]:
    """`run` and `ppo`: the whole pipeline; a stage whose result is given is left out. Returns `optimise`'s summary."""
    ppo = settings.ppo
    words = getattr(arguments, "opening_words", 0)
    prompts = choose_prompts(inputs, opening_words=words, seed=ppo.seed, max_new_tokens=ppo.max_new_tokens)
    base = inputs.model
    if base is None:
        require("context", settings.pretrain.context, settings.pretrain.context > ppo.max_new_tokens,
                f"more than max_new_tokens = {ppo.max_new_tokens}")  # fmt: skip
        base = pretrain(inputs, settings, folder, prompts=prompts, max_new_tokens=ppo.max_new_tokens)
        policy = CausalLMWithValueHead(base.network, critic=arguments.critic)
    else:
        policy = base.network
        check_lengths(inputs, base.tokenizer, policy, prompts=prompts, max_new_tokens=ppo.max_new_tokens)
    say(f"base model: {base.name}, {millions(policy.lm)} parameters, context {context_of(policy)}")
    if inputs.prompts is not None:
        warn_of_unknown([record["prompt"] for record in prompts], base.tokenizer, inputs.given["prompts"])

    reward_model = inputs.reward_model
    if reward_model is None and inputs.score is None:
        reward_model = fit_reward(inputs, Model(policy.lm, base.tokenizer, base.name), settings, folder)
    score = choose_score(inputs, reward_model, base.tokenizer, device=ppo.device)
    say(f"PPO maximises {inputs.given['score'] or f'the scores of {reward_model.name}'}")
    if isinstance(score, nn.Module):
        data.encode_prompts(
            base.tokenizer, prompts, max_new_tokens=ppo.max_new_tokens, context=context_of(score),
            whose="the reward model",
        )  # fmt: skip
    trainer = PPOTrainer(
        ppo, policy, copy.deepcopy(policy.lm), score, prompts, base.tokenizer, sampler=sampler_named(arguments.sampler)
    )
    return optimise(trainer, folder, gold=inputs.tiny_world)


def pretrain(
    inputs: Inputs, settings: Settings, folder: RunFolder, *, prompts: Records = (), max_new_tokens: int = 0
) -> Model:
    """Train a tokenizer and a language model from scratch on a corpus (the tiny world's own without one).

    prompts, max_new_tokens: what PPO will ask of it, which its context must have room for.
    """
    config, ppo = settings.pretrain, settings.ppo
    if inputs.corpus is None:
        texts = tiny_reviews.sample_corpus(NUM_TEXTS, torch.Generator().manual_seed(ppo.seed))
        tokenizer = tiny_reviews.build_tokenizer()
    else:
        texts, tokenizer = inputs.corpus, data.train_tokenizer(inputs.corpus, vocab_size=config.vocab_size)
    lm = new_causal_lm(
        tokenizer, layers=config.layers, width=config.width, heads=config.heads, context=config.context, seed=ppo.seed
    )
    say(f"language model: {millions(lm)} parameters, {len(tokenizer)} tokens, {len(texts)} texts")
    # What does not fit is said now, not after the training.
    check_lengths(inputs, tokenizer, lm, prompts=prompts, max_new_tokens=max_new_tokens)
    cut = sum(len(ids) + 1 > config.context for ids in tokenizer(texts).input_ids)
    if cut:
        say(f"{cut} of the texts are longer than the context of {config.context} tokens and are cut there")
    fit_language_model(
        lm, texts, tokenizer, epochs=config.lm_epochs, batch_size=config.lm_batch_size,
        learning_rate=config.lm_learning_rate, max_length=config.context, seed=ppo.seed, device=ppo.device,
        precision=ppo.precision, on_step=fit_progress(label="language model"),
    )  # fmt: skip
    return Model(lm, tokenizer, str(folder.save_models("base_model", lm.cpu(), tokenizer)))


def fit_reward(inputs: Inputs, base: Model, settings: Settings, folder: RunFolder) -> Model:
    """Train a reward model on preferences, from the base model's trunk, and measure it on held-out pairs."""
    lm, tokenizer, config, ppo = base.network, base.tokenizer, settings.reward, settings.ppo
    if inputs.preferences is None:
        if not of_tiny_world(tokenizer):
            raise ValueError("give --preferences, or a --score: the tiny world's annotators read no other texts")
        pairs = annotated_preferences(lm, tokenizer, config.num_preferences + NUM_HELD_OUT, seed=ppo.seed)
        preferences, held_out = pairs[:-NUM_HELD_OUT], pairs[-NUM_HELD_OUT:]
    else:
        files = ("preferences", "eval_preferences")
        preferences, held_out = (choose_pairs(inputs, name, tokenizer, lm) for name in files)
        warn_of_unknown([pair["chosen"] for pair in preferences], tokenizer, inputs.given["preferences"])
        equal = sum(pair["chosen"] == pair["rejected"] for pair in preferences)
        if equal:
            say(f"careful: {equal} of the pairs hold the same text twice, which teaches nothing")
    model = RewardModel.from_causal_lm(lm, pad_token_id=tokenizer.pad_token_id, seed=ppo.seed)
    say(f"reward model: {millions(model)} parameters, {len(preferences)} pairs")
    fit_reward_model(
        model, preferences, tokenizer, epochs=config.reward_epochs, batch_size=config.reward_batch_size,
        learning_rate=config.reward_learning_rate, seed=ppo.seed, device=ppo.device, precision=ppo.precision,
        on_step=fit_progress(label="reward model"),
    )  # fmt: skip
    path = folder.save_models("reward_model", model, tokenizer)
    if held_out:
        accuracy = preference_accuracy(model, held_out, tokenizer)
        folder.write_json("reward_model.json", {"held_out_pairs": len(held_out), "accuracy": round(accuracy, 4)})
        say(f"reward model: right on {accuracy:.1%} of {len(held_out)} held-out pairs")
    else:
        say("reward model: not measured, since there are no --eval-preferences")
    return Model(model.cpu(), tokenizer, str(path))


def of_tiny_world(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer's words are the tiny world's, which its annotators and its gold reward read."""
    return read_alike(tokenizer, tiny_reviews.build_tokenizer())


def optimise(trainer: PPOTrainer, folder: RunFolder, *, gold: bool) -> dict[str, Any]:
    """PPO, then the report. Returns the summary: before, and the mean of the last iterations.

    gold: whether the gold reward is measured too; it means something in the tiny world alone. Raises ValueError at the
    end for parts of the report that could not be made; policy and metrics are there then, and all other parts.
    """
    history: list[dict[str, float]] = []
    shown = {"reward": "score", **({"gold": "gold"} if gold else {}), "KL": "kl"}
    show = progress(trainer.config.num_iterations, label="PPO", show=shown)

    def gold_of(batch: RolloutBatch) -> dict[str, float]:
        return {"gold": float(tiny_reviews.gold_reward(*trainer.texts(batch)).mean())} if gold else {}

    def on_step(iteration: int, metrics: dict[str, float], batch: RolloutBatch) -> None:
        metrics |= gold_of(batch)
        folder.append_metrics(iteration, metrics)
        history.append({"iteration": iteration} | metrics)
        show(iteration, metrics)

    untrained = trainer.rollout()  # the policy is still the base model
    before = {"score": float(untrained.scores.mean()), "score_std": float(untrained.scores.std())}
    before |= gold_of(untrained)
    trainer.train(on_step)
    tokenizer = trainer.tokenizer
    folder.save_models("policy", trainer.policy, tokenizer)

    models = {"before": trainer.reference, "after": trainer.lm}
    names = [name for name in ("score", "gold", "kl") if name in history[-1]]
    summary = {"before": before, "after": {name: mean_of_last(history, name) for name in names}}

    def write_samples() -> None:
        samples = compare(models, tokenizer, trainer.prompts, trainer.scorer, trainer.config, gold=gold)
        folder.write_text("samples.md", samples_table(samples))

    write_each({
        "samples.md": write_samples,
        "figures": lambda: draw_run(folder, history, *longest_response(trainer.batch, tokenizer)),
        "summary.json": lambda: folder.write_json("summary.json", summary),  # last: who has it has finished
    })  # fmt: skip
    return summary


def write_each(parts: Mapping[str, Callable[[], None]]) -> None:
    """Write the parts of a report, each by itself. Raises ValueError at the end, naming all that failed."""
    failed = []
    for name, write in parts.items():
        try:
            write()
        except Exception as error:  # whatever it is: the parts after it can be made all the same
            failed.append(name)
            say(f"{name}: not written: {type(error).__name__}: {error}")
    if failed:
        raise ValueError(f"cannot write {', '.join(failed)}; the policy and the rest of the run are written")


def compare(
    models: dict[str, nn.Module], tokenizer: "PreTrainedTokenizerBase", prompts: Records, scorer: Scorer,
    config: PPOConfig, *, gold: bool, count: int = NUM_SHOWN,
) -> list[dict[str, Any]]:  # fmt: skip
    """Responses of two models to the same prompts, each with its score, and its gold reward in the tiny world.

    Raises ValueError for no prompts.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed)).tolist()
    chosen = [prompts[order[i % len(order)]] for i in range(count)]
    records, shown = [data.as_record(prompt) for prompt in chosen], [{} for _ in chosen]
    for side, lm in models.items():
        bar_unused_ids(lm, tokenizer)
        ids = data.encode_prompts(tokenizer, chosen, max_new_tokens=config.max_new_tokens, context=context_of(lm))
        input_ids, mask = data.pad(ids, tokenizer.pad_token_id, side="left")
        samples = sample_batch(
            lm, input_ids.to(lm.device), mask.to(lm.device), records=records, max_new_tokens=config.max_new_tokens,
            temperature=config.temperature, eos_id=eos_ids(lm, tokenizer), pad_id=tokenizer.pad_token_id,
            generator=torch.Generator().manual_seed(config.seed),
        )  # fmt: skip
        asked, texts = samples.texts(tokenizer)
        with torch.no_grad():
            numbers = {"score": scorer(samples).tolist()}
        if gold:
            numbers["gold"] = tiny_reviews.gold_reward(asked, texts).tolist()
        for i, sample in enumerate(shown):
            sample["prompt"] = asked[i]
            sample[side] = {"text": texts[i]} | {name: values[i] for name, values in numbers.items()}
    return shown


def side_by_side(inputs: Inputs, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """`sample`: responses of the model before PPO and after it, as `compare` gives them."""
    require("count", arguments.count, arguments.count >= 1, "a whole number >= 1")
    config = PPOConfig(max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)
    for prompt in arguments.prompt or ():
        data.check_texts(prompt, "prompt", "--prompt")
    before, after = inputs.model, inputs.policy
    if not read_alike(before.tokenizer, after.tokenizer):
        raise ValueError("--model (before) and --policy (after) must share a tokenizer; give both, from one run")
    scorer = as_scorer(choose_score(inputs, inputs.reward_model, before.tokenizer, device="cpu"), before.tokenizer)
    prompts = arguments.prompt or choose_prompts(inputs, opening_words=0, seed=config.seed)
    gold, models = of_tiny_world(before.tokenizer), {"before": before.network, "after": after.network}
    return compare(models, before.tokenizer, prompts, scorer, config, gold=gold, count=arguments.count)


def sampler_named(name: str) -> Callable[..., Any] | None:
    """The sampler that an option names; None for the trainer's own."""
    if name == "plain":
        return None
    from rlhf_lessons.engines.static import StaticSampler

    return StaticSampler()


def longest_response(
    batch: RolloutBatch, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[str], dict[str, list[float]]]:
    """The tokens of a batch's longest response that ended, and what PPO knew of each."""
    lengths = batch.response_mask.sum(dim=1)
    row = int((lengths * batch.ended).argmax())
    steps = slice(0, int(lengths[row]))
    quantities = {
        "reward": batch.rewards, "kl": batch.log_probs - batch.ref_log_probs, "value": batch.values,
        "advantage": batch.advantages,
    }  # fmt: skip
    tokens = tokenizer.convert_ids_to_tokens(batch.responses[row, steps].tolist())
    return [token.replace("Ġ", "") for token in tokens], {k: v[row, steps].tolist() for k, v in quantities.items()}


def millions(model: nn.Module) -> str:
    """A model's parameter count, readable: 0.25 M."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
