"""The stages of RLHF as commands run them: language model → preferences → reward model → PPO → report.

Each stage reads and writes folders in the usual Hugging Face layout, so that any of them can be replaced by one's own.
The tiny world serves wherever nothing of one's own is given: its prompts, its annotators, its gold reward.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from rlhf_lessons import data, tiny_reviews
from rlhf_lessons.fitting import fit_language_model, fit_reward_model, preference_accuracy, score_texts
from rlhf_lessons.models import ASSETS, CausalLMWithValueHead, RewardModel, load_causal_lm, new_causal_lm
from rlhf_lessons.report import RunFolder, draw_run, mean_of_last, progress, progress_of_fit, samples_table, say
from rlhf_lessons.rollout import RolloutBatch, sample_responses
from rlhf_lessons.sources import (
    Sources,
    check_sources,
    choose_prompts,
    choose_score,
    context_of,
    load_with_tokenizer,
    read_fitting_preferences,
    require_prompts_fit,
    warn_of_unknown,
)
from rlhf_lessons.trainer import PPOConfig, PPOTrainer, as_scores, setting

NUM_HELD_OUT = 1000  # pairs of the tiny world that a reward model is measured on
NUM_SHOWN = 8  # responses read side by side


@dataclass(frozen=True)
class StageConfig:
    """Sizes of the models and of the two fits before PPO, checked when made (ValueError).

    Tokens are of the tokenizer; batches count texts.
    """

    layers: int = setting(4, "layers of a language model trained from scratch")
    width: int = setting(192, "its hidden size")
    heads: int = setting(6, "its attention heads")
    context: int = setting(128, "its longest text, in tokens")
    vocab_size: int = setting(4000, "tokens of a tokenizer trained on --corpus")
    lm_epochs: float = setting(8.0, "passes over --corpus")
    lm_batch_size: int = setting(32, "texts in a step")
    lm_learning_rate: float = setting(2e-3, "of AdamW, at its highest")
    num_preferences: int = setting(4000, "pairs that the tiny world's annotators compare")
    reward_epochs: float = setting(1.0, "passes over the preferences")
    reward_batch_size: int = setting(16, "pairs in a step")
    reward_learning_rate: float = setting(1e-3, "of AdamW, at its highest")
    opening_words: int = setting(3, "words of a corpus line that make a prompt; 0: the begin token alone")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf") and (name, value) != ("opening_words", 0):
                raise ValueError(f"{name} must be a number > 0; got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads = {self.heads}; got {self.width}")


PRESETS = {
    "tiny": (StageConfig(), PPOConfig()),
    "small": (
        StageConfig(
            layers=12, width=768, heads=12, context=128, vocab_size=8000, lm_epochs=6.0, lm_batch_size=64,
            lm_learning_rate=6e-4, reward_batch_size=64, reward_learning_rate=5e-5,
        ),
        PPOConfig(
            batch_size=512, minibatch_size=128, max_new_tokens=48, learning_rate=2e-5, precision="bf16",
        ),
    ),
}  # fmt: skip


def pretrain(
    sources: Sources, stages: StageConfig, ppo: PPOConfig, folder: RunFolder, name: str = "base_model"
) -> Path:
    """Train a tokenizer and a language model from scratch on a corpus (the tiny world's own without one)."""
    if sources.corpus is None:
        generator = torch.Generator().manual_seed(ppo.seed)
        texts, tokenizer = tiny_reviews.sample_corpus(64_000, generator), tiny_reviews.build_tokenizer()
    else:
        texts = data.read_corpus(sources.corpus)
        tokenizer = data.train_tokenizer(texts, vocab_size=stages.vocab_size)
    lm = new_causal_lm(
        tokenizer, layers=stages.layers, width=stages.width, heads=stages.heads, context=stages.context, seed=ppo.seed
    )
    say(f"language model: {millions(lm)} parameters, {len(tokenizer)} tokens, {len(texts)} texts")
    for path in (sources.preferences, sources.eval_preferences):
        if path is not None:
            read_fitting_preferences(path, tokenizer, lm)  # what does not fit is said now, not after the training
    cut = sum(len(ids) + 1 > stages.context for ids in tokenizer(texts).input_ids)
    if cut:
        say(f"{cut} of the texts are longer than the context of {stages.context} tokens and are cut there")
    show = progress_of_fit("language model")
    fit_language_model(
        lm, texts, tokenizer, epochs=stages.lm_epochs, batch_size=stages.lm_batch_size,
        learning_rate=stages.lm_learning_rate, max_length=stages.context, seed=ppo.seed, device=ppo.device,
        precision=ppo.precision, on_step=show,
    )  # fmt: skip
    return folder.save_models(name, lm.cpu(), tokenizer)


def annotated_preferences(base: str | Path, count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of answers by the base model to the tiny world's prompts, as its annotators chose between them."""
    generator = torch.Generator().manual_seed(seed)
    prompts = tiny_reviews.prompts(count, generator)
    lm, tokenizer = load_with_tokenizer(load_causal_lm, base)
    a, b = (respond(lm, tokenizer, prompts, generator=generator) for _ in range(2))
    return tiny_reviews.preference_pairs(prompts, a, b, generator)


def fit_reward(sources: Sources, base: str | Path, stages: StageConfig, ppo: PPOConfig, folder: RunFolder) -> Path:
    """Train a reward model on preferences, from the base model's trunk, and measure it on held-out pairs."""
    lm, tokenizer = load_with_tokenizer(load_causal_lm, base)
    held_out = []
    if sources.preferences is None:
        preferences = annotated_preferences(base, stages.num_preferences + NUM_HELD_OUT, ppo.seed)
        preferences, held_out = preferences[:-NUM_HELD_OUT], preferences[-NUM_HELD_OUT:]
    else:
        preferences = read_fitting_preferences(sources.preferences, tokenizer, lm)
        warn_of_unknown([pair["chosen"] for pair in preferences], tokenizer, sources.preferences)
        if sources.eval_preferences is not None:
            held_out = read_fitting_preferences(sources.eval_preferences, tokenizer, lm)
    model = RewardModel.from_causal_lm(base, pad_token_id=tokenizer.pad_token_id, seed=ppo.seed)
    say(f"reward model: {millions(model)} parameters, {len(preferences)} pairs")
    fit_reward_model(
        model, preferences, tokenizer, epochs=stages.reward_epochs, batch_size=stages.reward_batch_size,
        learning_rate=stages.reward_learning_rate, seed=ppo.seed, device=ppo.device, precision=ppo.precision,
        on_step=progress_of_fit("reward model"),
    )  # fmt: skip
    if held_out:
        accuracy = preference_accuracy(model, held_out, tokenizer)
        folder.write_json("reward_model.json", {"held_out_pairs": len(held_out), "accuracy": round(accuracy, 4)})
        say(f"reward model: right on {accuracy:.1%} of {len(held_out)} held-out pairs")
    else:
        say("reward model: not measured, since there are no --eval-preferences")
    return folder.save_models("reward_model", model.cpu(), tokenizer)


def respond(
    lm: torch.nn.Module, tokenizer, prompts: list[str], *, max_new_tokens: int = tiny_reviews.MAX_RESPONSE_TOKENS,
    temperature: float = 1.0, generator: torch.Generator | None = None, batch_size: int = 512,
) -> list[str]:  # fmt: skip
    """A sampled response to each prompt, as text. Raises ValueError for a prompt too long for the model's context."""
    require_prompts_fit(Sources(), prompts, tokenizer, lm, max_new_tokens=max_new_tokens)
    texts = []
    for start in range(0, len(prompts), batch_size):
        encoded = [data.encode_prompt(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        input_ids, mask = data.pad(encoded, tokenizer.pad_token_id, side="left")
        responses = sample_responses(
            lm, input_ids.to(lm.device), mask.to(lm.device), max_new_tokens=max_new_tokens, temperature=temperature,
            eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, generator=generator,
        )  # fmt: skip
        texts += data.decode(tokenizer, responses.tokens, responses.mask)
    return texts


def optimise(
    policy: CausalLMWithValueHead, reference: torch.nn.Module, tokenizer, prompts: list[str],
    score_fn: torch.nn.Module | Callable, ppo: PPOConfig, folder: RunFolder, *, gold: bool,
) -> dict:  # fmt: skip
    """PPO, then the report. Returns the summary: before, and the mean of the last iterations.

    gold: whether the gold reward is measured too; it means something in the tiny world alone.
    """
    trainer = PPOTrainer(ppo, policy, reference, score_fn, prompts, tokenizer)
    history: list[dict[str, float]] = []
    show = progress(ppo.num_iterations, "PPO")

    def gold_of(batch: RolloutBatch) -> dict[str, float]:
        return {"gold": float(tiny_reviews.gold_reward(*trainer.texts(batch)).mean())} if gold else {}

    def on_step(iteration: int, metrics: dict[str, float], batch: RolloutBatch) -> None:
        measured = gold_of(batch)
        metrics |= measured
        folder.append_metrics(iteration, metrics)
        history.append({"iteration": iteration} | metrics)
        show(iteration, reward=metrics["score"], **measured, KL=metrics["kl"])

    untrained = trainer.rollout()  # the policy is still the base model
    before = {"score": float(untrained.scores.mean()), "score_std": float(untrained.scores.std())}
    before |= gold_of(untrained)
    trainer.train(on_step)
    folder.save_models("policy", trainer.policy, tokenizer)

    samples = compare(reference, trainer.policy.lm, tokenizer, prompts, score_fn, ppo, gold=gold)
    folder.write_text("samples.md", samples_table(samples))
    draw_run(folder, history, *longest_response(trainer.batch, tokenizer))
    names = [name for name in ("score", "gold", "kl") if name in history[-1]]
    summary = {"before": before, "after": {name: mean_of_last(history, name) for name in names}}
    folder.write_json("summary.json", summary)  # last: a folder that has it is a finished run's
    return summary


def compare(
    before: torch.nn.Module, after: torch.nn.Module, tokenizer, prompts: list[str], score_fn, ppo: PPOConfig, *,
    gold: bool, count: int = NUM_SHOWN,
) -> list[dict]:  # fmt: skip
    """Responses of two models to the same prompts, each with its score, and its gold reward in the tiny world."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(ppo.seed)).tolist()
    prompts = [prompts[order[i % len(order)]] for i in range(count)]
    samples = [{"prompt": prompt} for prompt in prompts]
    for side, lm in (("before", before), ("after", after)):
        draw = torch.Generator(lm.device).manual_seed(ppo.seed)
        texts = respond(
            lm, tokenizer, prompts, max_new_tokens=ppo.max_new_tokens, temperature=ppo.temperature, generator=draw
        )
        is_model = isinstance(score_fn, torch.nn.Module)
        scores = score_texts(score_fn, tokenizer, prompts, texts) if is_model else score_fn(prompts, texts)
        scores = as_scores(scores, count)
        golds = tiny_reviews.gold_reward(prompts, texts) if gold else [None] * count
        for sample, text, score, gold_value in zip(samples, texts, scores, golds, strict=True):
            sample[side] = {"text": text, "score": float(score)} | ({"gold": float(gold_value)} if gold else {})
    return samples


def side_by_side(
    sources: Sources, *, policy: str | None, prompts: list[str] | None, count: int, max_new_tokens: int, seed: int
) -> list[dict]:
    """What `sample` shows: responses of the model before PPO and after it (`policy`), as `compare` gives them."""
    if count < 1:
        raise ValueError(f"count must be a whole number >= 1; got {count}")
    ppo = PPOConfig(max_new_tokens=max_new_tokens, seed=seed)
    if sources.score is None and sources.reward_model is None:
        sources = replace(sources, reward_model=str(ASSETS / "reward_model"))
    check_sources(sources, device="cpu", precision="no")
    before, tokenizer = load_with_tokenizer(load_causal_lm, sources.model or ASSETS / "base")
    after, own_tokenizer = load_with_tokenizer(load_causal_lm, policy or ASSETS / "aligned")
    if tokenizer.get_vocab() != own_tokenizer.get_vocab():
        raise ValueError("--model (before) and --policy (after) must share a tokenizer; give both, from one run")
    score_fn = choose_score(sources, sources.reward_model, tokenizer, device="cpu")
    prompts = prompts or choose_prompts(sources, opening_words=0, seed=seed)
    gold = tokenizer.get_vocab() == tiny_reviews.build_tokenizer().get_vocab()
    return compare(before, after, tokenizer, prompts, score_fn, ppo, gold=gold, count=count)


def longest_response(batch: RolloutBatch, tokenizer) -> tuple[list[str], dict[str, list[float]]]:
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


def begin(sources: Sources, stages: StageConfig, ppo: PPOConfig, folder: RunFolder, critic: str = "shared") -> None:
    """What every command does first: check what was given, then write the settings down."""
    check_sources(sources, device=ppo.device, precision=ppo.precision)
    given = {name: value and str(value) for name, value in asdict(sources).items()}
    folder.write_config({"sources": given, "stages": asdict(stages), "ppo": asdict(ppo), "critic": critic})


def run(sources: Sources, stages: StageConfig, ppo: PPOConfig, folder: RunFolder, critic: str = "shared") -> dict:
    """The whole pipeline; a stage whose result is given is left out. Returns the summary of `optimise`."""
    begin(sources, stages, ppo, folder, critic)
    prompts = choose_prompts(sources, opening_words=stages.opening_words, seed=ppo.seed)
    if sources.model is None and sources.corpus is not None:
        if stages.context <= ppo.max_new_tokens:
            raise ValueError(f"context must be more than max_new_tokens = {ppo.max_new_tokens}; got {stages.context}")
        base = pretrain(sources, stages, ppo, folder)
    else:
        base = sources.model or ASSETS / "base"
    reference, tokenizer = load_with_tokenizer(load_causal_lm, base)
    say(f"base model: {base}, {millions(reference)} parameters, context {context_of(reference)}")
    require_prompts_fit(sources, prompts, tokenizer, reference, max_new_tokens=ppo.max_new_tokens)
    if sources.prompts is not None:
        warn_of_unknown(prompts, tokenizer, sources.prompts)

    reward_model = sources.reward_model
    if reward_model is None and sources.score is None:
        reward_model = fit_reward(sources, base, stages, ppo, folder)
    score_fn = choose_score(sources, reward_model, tokenizer, device=ppo.device)
    say(f"PPO maximises {sources.score or f'the scores of {reward_model}'}")
    if isinstance(score_fn, torch.nn.Module):
        options = dict(max_new_tokens=ppo.max_new_tokens, whose="the reward model")
        require_prompts_fit(sources, prompts, tokenizer, score_fn, **options)
    policy = CausalLMWithValueHead.from_pretrained(base, critic=critic)
    return optimise(policy, reference, tokenizer, prompts, score_fn, ppo, folder, gold=sources.tiny_world)


def millions(model: torch.nn.Module) -> str:
    """A model's parameter count, readable: 0.25 M."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
