"""The stages of RLHF as commands run them: language model → preferences → reward model → a method → report.

A stage takes what is in memory and leaves a folder in the usual Hugging Face layout, so that any of them can be
replaced by one's own.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from rlhf_lessons import data, models, tiny_reviews
from rlhf_lessons.app.align import TITLES, TRAINERS, align, before_and_after, of_fit
from rlhf_lessons.app.cards import Card
from rlhf_lessons.app.inputs import Inputs, Model, Records, as_chat, load_model, read_alike, warn_of_unknown
from rlhf_lessons.app.options import USES, critic_of, method_of
from rlhf_lessons.app.resume import STEPS, Stage, digests
from rlhf_lessons.app.run_folder import RunFolder
from rlhf_lessons.config import PPOConfig, Settings, require
from rlhf_lessons.device import sharded
from rlhf_lessons.display import fit_progress, say
from rlhf_lessons.fitting import annotated_preferences, fit_language_model, fit_reward_model
from rlhf_lessons.forward import context_of
from rlhf_lessons.scoring import as_scorer, preference_accuracy

# Options that are no setting of a stage.
NAMED = ("method", "sampler", "opening_words", "long_pairs", "log_with", "chat", "checkpoint_every")
NUM_TEXTS = 64_000  # of the tiny world, that its base model learns to write from
NUM_HELD_OUT = 1000  # pairs of the tiny world that a reward model is measured on


def describe(inputs: Inputs, settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that this command reads, and what it was given: a run's config.json."""
    read = {}
    for section, names in USES[arguments.command].items():
        values = asdict(getattr(settings, section))
        name = method_of(arguments) if section == "method" else section
        read[name] = values if names is None else {k: values[k] for k in values if k in names}
    others = {name: getattr(arguments, name, None) for name in NAMED} | {"critic": critic_of(arguments)}
    others = {name: value for name, value in others.items() if value is not None}
    return {"sources": inputs.given, "inputs": digests(inputs), **read, **others, "threads": torch.get_num_threads()}


def run(inputs: Inputs, settings: Settings, folder: RunFolder, arguments: argparse.Namespace) -> dict[str, Any]:
    """`run` and `ppo`: the whole pipeline; a stage whose result is given is left out. Returns the method's summary."""
    config, method, words = settings.method, method_of(arguments), getattr(arguments, "opening_words", 0)
    require("method", method, method in TRAINERS or not sharded(), f"{', '.join(TRAINERS)} under FSDP")
    # What a graph has captured it reads where it was.
    require("sampler", arguments.sampler, arguments.sampler != "static" or not sharded(), "plain under FSDP")
    sampler = sampler_named(arguments.sampler)  # what is not installed is said now, not after the fits
    room = {"max_new_tokens": config.max_new_tokens}  # that a prompt leaves its response
    prompts = inputs.choose_prompts(opening_words=words, seed=config.seed, **room)
    base, asked, critic = inputs.model, [*prompts, *(inputs.eval_prompts or ())], critic_of(arguments)
    if base is None:
        require("context", settings.pretrain.context, settings.pretrain.context > config.max_new_tokens,
                f"more than max_new_tokens = {config.max_new_tokens}")  # fmt: skip
        base = pretrain(inputs, settings, folder, prompts=asked, **room)
        policy = models.CausalLMWithValueHead(base.network, critic=critic) if critic else base.network
    else:
        policy = base.network
        inputs.check_lengths(base, prompts=asked, **room)
    lm = getattr(policy, "lm", policy)
    say(f"base model: {base.name}, {millions(lm)} parameters, context {context_of(policy)}")
    models.prepare_policy(policy, **asdict(settings.model), base=base.name, seed=config.seed)  # a new adapter adds 0
    for name in ("prompts", "eval_prompts"):
        warn_of_unknown([x["prompt"] for x in getattr(inputs, name) or ()], base.tokenizer, inputs.given[name])

    reward_model, pairs, base = inputs.reward_model, ((), ()), Model(lm, base.tokenizer, base.name)
    if method == "dpo" or (reward_model is None and inputs.score is None):
        pairs = choose_preferences(inputs, base, settings)
    if reward_model is None and inputs.score is None:
        reward_model = fit_reward(inputs, base, settings, folder, pairs)
    score = inputs.choose_score(reward_model, base.tokenizer, device=config.device)
    named = inputs.given["score"] or f"the scores of {reward_model.name}"
    say(f"{TITLES[method]} learns from {len(pairs[0])} pairs; measured by {named}" if method == "dpo"
        else f"{TITLES[method]} maximises {named}")  # fmt: skip
    if isinstance(score, nn.Module):
        if settings.model.weights == "bf16":
            score.bfloat16()
        data.encode_prompts(base.tokenizer, asked, context=context_of(score), whose="the reward model", **room)
    options = dict(sampler=sampler, eval_prompts=inputs.eval_prompts or ())
    return align(method, config, policy, score, prompts, base.tokenizer, folder=folder, pairs=pairs,
                 gold=inputs.tiny_world, **options)  # fmt: skip


def pretrain(
    inputs: Inputs, settings: Settings, folder: RunFolder, *, prompts: Records = (), max_new_tokens: int = 0
) -> Model:
    """Train a tokenizer and a language model from scratch on a corpus (the tiny world's own without one).

    prompts, max_new_tokens: what PPO will ask of it, which its context must have room for. One that the folder holds
    already is taken from there.
    """
    config, shared, path = settings.pretrain, settings.method, folder.path / "base_model"
    if path.is_dir():
        return load_model(models.load_causal_lm, path)
    if inputs.corpus is None:
        texts = tiny_reviews.sample_corpus(NUM_TEXTS, torch.Generator().manual_seed(shared.seed))
        tokenizer = tiny_reviews.build_tokenizer()
    else:
        texts, tokenizer = inputs.corpus, data.train_tokenizer(inputs.corpus, vocab_size=config.vocab_size)
    sizes = {name: getattr(config, name) for name in ("layers", "width", "heads", "context")}
    lm = models.new_causal_lm(tokenizer, **sizes, seed=shared.seed)
    say(f"language model: {millions(lm)} parameters, {len(tokenizer)} tokens, {len(texts)} texts")
    # What does not fit is said now, not after the training.
    inputs.check_lengths(Model(lm, tokenizer, ""), prompts=prompts, max_new_tokens=max_new_tokens)
    if cut := sum(len(ids) + 1 > config.context for ids in tokenizer(texts).input_ids):
        say(f"{cut} of the texts are longer than the context of {config.context} tokens and are cut there")
    with Stage(folder, "language model", each=STEPS) as stage:
        fit_language_model(lm, texts, tokenizer, **of_fit("lm", config, shared), max_length=config.context,
                           on_step=fit_progress(label="language model"), keeper=stage)  # fmt: skip
    card = Card(lm, tokenizer, f"next-token prediction on {len(texts)} texts, from random weights", asdict(config))
    # Read back, so that a run that continues has the very same model.
    return load_model(models.load_causal_lm, folder.save_models("base_model", lm.cpu(), tokenizer, card))


def choose_preferences(inputs: Inputs, base: Model, settings: Settings) -> tuple[Records, Records]:
    """Pairs to learn from and pairs held out: those given, or the tiny world's annotators' of the base's responses."""
    tokenizer = base.tokenizer
    if inputs.preferences is None:
        if not of_tiny_world(tokenizer):
            raise ValueError("give --preferences, or a --score: the tiny world's annotators read no other texts")
        count = settings.reward.num_preferences + NUM_HELD_OUT
        pairs = annotated_preferences(base.network, tokenizer, count, seed=settings.method.seed)
        return pairs[:-NUM_HELD_OUT], pairs[-NUM_HELD_OUT:]
    preferences, held_out = (inputs.choose_pairs(name, base) for name in ("preferences", "eval_preferences"))
    warn_of_unknown([pair["chosen"] for pair in preferences], tokenizer, inputs.given["preferences"])
    if equal := sum(pair["chosen"] == pair["rejected"] for pair in preferences):
        say(f"careful: {equal} of the pairs hold the same text twice, which teaches nothing")
    return preferences, held_out


def fit_reward(
    inputs: Inputs, base: Model, settings: Settings, folder: RunFolder, pairs: tuple[Records, Records] | None = None
) -> Model:
    """Train a reward model on preferences, from the base model's trunk, and measure it on held-out pairs.

    pairs: both, where they were chosen before. One that the folder holds already is taken from there.
    """
    lm, tokenizer, config, shared = base.network, base.tokenizer, settings.reward, settings.method
    preferences, held_out = pairs or choose_preferences(inputs, base, settings)
    path = folder.path / "reward_model"
    if not path.is_dir():
        model = models.RewardModel.from_causal_lm(lm, pad_token_id=tokenizer.pad_token_id, seed=shared.seed)
        say(f"reward model: {millions(model)} parameters, {len(preferences)} pairs")
        with Stage(folder, "reward model", each=STEPS) as stage:
            fit_reward_model(model, preferences, tokenizer, **of_fit("reward", config, shared),
                             on_step=fit_progress(label="reward model"), keeper=stage)  # fmt: skip
        card = Card(lm, tokenizer, f"the Bradley–Terry loss on {len(preferences)} pairs", asdict(config), model.cpu())
        folder.save_models("reward_model", model, tokenizer, card)
    fitted = load_model(models.load_reward_model, path)
    if held_out and not (folder.path / "reward_model.json").exists():
        accuracy = preference_accuracy(fitted.network, held_out, tokenizer)
        folder.write_json("reward_model.json", {"held_out_pairs": len(held_out), "accuracy": round(accuracy, 4)})
        say(f"reward model: right on {accuracy:.1%} of {len(held_out)} held-out pairs")
    elif not held_out:
        say("reward model: not measured, since there are no --eval-preferences")
    return fitted


def of_tiny_world(tokenizer: data.Tokenizer) -> bool:
    """Whether a tokenizer's words are the tiny world's, which its annotators and its gold reward read."""
    return read_alike(tokenizer, tiny_reviews.build_tokenizer())


def side_by_side(inputs: Inputs, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """`sample`: responses of the model before PPO and after it, as `before_and_after` gives them."""
    require("count", arguments.count, arguments.count >= 1, "a whole number >= 1")
    config = PPOConfig(max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)
    typed = [data.Record({"prompt": prompt}, f"--prompt {prompt}") for prompt in arguments.prompt or ()]
    for record in typed:
        data.check_texts(record["prompt"], "prompt", "--prompt")
    before, after = inputs.model, inputs.policy
    if not read_alike(before.tokenizer, after.tokenizer):
        raise ValueError("--model (before) and --policy (after) must share a tokenizer; give both, from one run")
    score = inputs.choose_score(inputs.reward_model, before.tokenizer, device="cpu")
    typed = [*map(as_chat, typed)] if arguments.chat else typed
    prompts = typed or inputs.choose_prompts(opening_words=0, seed=config.seed)
    both, tokenizer = {"before": before.network, "after": after.network}, before.tokenizer
    return before_and_after(both, tokenizer, prompts, as_scorer(score, tokenizer), config,
                            gold=of_tiny_world(tokenizer), count=arguments.count)  # fmt: skip


def sampler_named(name: str) -> Callable[..., Any] | None:
    """The sampler that an option names; None for the trainer's own."""
    if name == "plain":
        return None
    if name == "vllm":
        from rlhf_lessons.engines.vllm import VLLMSampler

        return VLLMSampler()
    from rlhf_lessons.engines.static import StaticSampler

    return StaticSampler()


def millions(model: nn.Module) -> str:
    """A model's parameter count, readable: 0.25 M."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
