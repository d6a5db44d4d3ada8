"""The stages of RLHF as commands run them: language model → preferences → reward model → PPO → report.

Each stage reads and writes folders in the usual Hugging Face layout, so that any of them can be replaced by one's own.
The tiny world serves wherever nothing of one's own is given: its prompts, its annotators, its gold reward.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rlhf_lessons import data, tiny_reviews
from rlhf_lessons.fitting import fit_language_model, fit_reward_model, preference_accuracy, score_texts
from rlhf_lessons.models import (
    ASSETS,
    CausalLMWithValueHead,
    RewardModel,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    new_causal_lm,
)
from rlhf_lessons.report import RunFolder, draw_run, mean_of_last, progress, samples_table
from rlhf_lessons.rollout import RolloutBatch, sample_responses
from rlhf_lessons.trainer import PPOConfig, PPOTrainer, setting

NUM_PROMPTS = 2000  # drawn from the tiny world, or cut from a corpus
NUM_SHOWN = 8  # responses read side by side


@dataclass(frozen=True)
class StageConfig:
    """Sizes of the models and of the two fits before PPO. Tokens are of the tokenizer; batches count texts."""

    layers: int = setting(4, "layers of a language model trained from scratch")
    width: int = setting(192, "its hidden size")
    heads: int = setting(6, "its attention heads")
    context: int = setting(96, "its longest text, in tokens")
    vocab_size: int = setting(4000, "tokens of a tokenizer trained on --corpus")
    lm_epochs: float = setting(8.0, "passes over --corpus")
    lm_batch_size: int = setting(32, "texts in a step")
    lm_learning_rate: float = setting(2e-3, "of AdamW, at its highest")
    num_preferences: int = setting(4000, "pairs that the tiny world's annotators compare")
    reward_epochs: float = setting(1.0, "passes over the preferences")
    reward_batch_size: int = setting(16, "pairs in a step")
    reward_learning_rate: float = setting(1e-3, "of AdamW, at its highest")
    opening_words: int = setting(3, "words of a corpus line that make a prompt; 0: the begin token alone")


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


@dataclass(frozen=True)
class Sources:
    """What the learner brings; None stands for the tiny world's own."""

    corpus: Path | None = None
    preferences: Path | None = None
    eval_preferences: Path | None = None
    prompts: Path | None = None
    model: str | None = None
    reward_model: str | None = None
    score: str | None = None

    @property
    def tiny_world(self) -> bool:
        """Whether the prompts are the tiny world's, where the gold reward means something."""
        return self.corpus is None and self.prompts is None and self.preferences is None


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
    lm, tokenizer = load_causal_lm(base), load_tokenizer(base)
    a, b = (respond(lm, tokenizer, prompts, generator=generator) for _ in range(2))
    return tiny_reviews.preference_pairs(prompts, a, b, generator)


def fit_reward(sources: Sources, base: str | Path, stages: StageConfig, ppo: PPOConfig, folder: RunFolder) -> Path:
    """Train a reward model on preferences, from the base model's trunk, and measure it on held-out pairs."""
    if sources.preferences is not None:
        preferences = data.read_preferences(sources.preferences)
        held_out = data.read_preferences(sources.eval_preferences) if sources.eval_preferences else []
    else:
        preferences = annotated_preferences(base, stages.num_preferences + 1000, ppo.seed)
        preferences, held_out = preferences[:-1000], preferences[-1000:]
    tokenizer = load_tokenizer(base)
    model = RewardModel.from_causal_lm(base, pad_token_id=tokenizer.pad_token_id, seed=ppo.seed)
    fit_reward_model(
        model, preferences, tokenizer, epochs=stages.reward_epochs, batch_size=stages.reward_batch_size,
        learning_rate=stages.reward_learning_rate, seed=ppo.seed, device=ppo.device, precision=ppo.precision,
        on_step=progress_of_fit("reward model"),
    )  # fmt: skip
    if held_out:
        accuracy = preference_accuracy(model, held_out, tokenizer)
        folder.write_json("reward_model.json", {"held_out_pairs": len(held_out), "accuracy": round(accuracy, 4)})
        say(f"reward model: right on {accuracy:.1%} of {len(held_out)} held-out pairs")
    return folder.save_models("reward_model", model.cpu(), tokenizer)


def respond(
    lm: torch.nn.Module, tokenizer, prompts: list[str], *, max_new_tokens: int = tiny_reviews.MAX_RESPONSE_TOKENS,
    temperature: float = 1.0, generator: torch.Generator | None = None, batch_size: int = 512,
) -> list[str]:  # fmt: skip
    """A sampled response to each prompt, as text."""
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


def choose_prompts(sources: Sources, stages: StageConfig, seed: int) -> list[str]:
    """The prompts of PPO, and a word to the user on which they are."""
    if sources.prompts is not None:
        prompts, kind = data.read_prompts(sources.prompts), f"from {sources.prompts}"
    elif sources.corpus is not None and stages.opening_words > 0:
        prompts = data.sentence_openings(data.read_corpus(sources.corpus), words=stages.opening_words)[:NUM_PROMPTS]
        kind = f"the first {stages.opening_words} words of texts in {sources.corpus}"
    elif sources.tiny_world:
        prompts = tiny_reviews.prompts(NUM_PROMPTS, torch.Generator().manual_seed(seed))
        kind = "openings of tiny reviews"
    else:
        prompts = (
            [pair["prompt"] for pair in data.read_preferences(sources.preferences)] if sources.preferences else [""]
        )
        kind = "those of the preferences" if any(prompts) else "the begin token alone"
    say(f"prompts: {len(prompts)}, {kind}")
    return prompts


def choose_score(sources: Sources, reward_model: str | Path | None, tokenizer) -> torch.nn.Module | Callable:
    """What PPO maximises: one's own function, or a reward model (on the tokens if it shares the tokenizer)."""
    if sources.score is not None:
        return import_score(sources.score)
    model, own_tokenizer = load_reward_model(reward_model), load_tokenizer(reward_model)
    if own_tokenizer.get_vocab() == tokenizer.get_vocab():
        return model
    return lambda prompts, responses: score_texts(model, own_tokenizer, prompts, responses)


def import_score(name: str) -> Callable:
    """The function that `module:function` names, the module found from the working directory."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--score must be module:function, importable from here; got {name!r} ({error})") from error
    finally:
        sys.path.remove("")


def optimise(
    sources: Sources, base: str | Path, reward_model: str | Path | None, stages: StageConfig, ppo: PPOConfig,
    folder: RunFolder, critic: str = "shared",
) -> dict:  # fmt: skip
    """PPO from the base model, then the report. Returns the summary: before, and the mean of the last iterations."""
    tokenizer = load_tokenizer(base)
    prompts = choose_prompts(sources, stages, ppo.seed)
    score_fn = choose_score(sources, reward_model, tokenizer)
    policy, reference = CausalLMWithValueHead.from_pretrained(base, critic=critic), load_causal_lm(base)
    trainer = PPOTrainer(ppo, policy, reference, score_fn, prompts, tokenizer)
    folder.write_config(
        {"stages": asdict(stages), "ppo": asdict(ppo), "critic": critic, "base": str(base)}
        | {"sources": {name: value and str(value) for name, value in asdict(sources).items()}}
    )
    history: list[dict[str, float]] = []
    show = progress(ppo.num_iterations, "PPO")

    def gold(batch: RolloutBatch) -> dict[str, float]:
        return {"gold": float(tiny_reviews.gold_reward(*trainer.texts(batch)).mean())} if sources.tiny_world else {}

    def on_step(iteration: int, metrics: dict[str, float], batch: RolloutBatch) -> None:
        metrics |= gold(batch)
        folder.append_metrics(iteration, metrics)
        history.append({"iteration": iteration} | metrics)
        show(iteration, reward=metrics["score"], **gold(batch), KL=metrics["kl"])

    untrained = trainer.rollout()  # the policy is still the base model
    before = {"score": float(untrained.scores.mean()), "score_std": float(untrained.scores.std())} | gold(untrained)
    trainer.train(on_step)
    folder.save_models("policy", trainer.policy, tokenizer)

    names = [name for name in ("score", "gold", "kl") if name in history[-1]]
    summary = {"before": before, "after": {name: mean_of_last(history, name) for name in names}}
    folder.write_json("summary.json", summary)
    samples = compare(reference, trainer.policy.lm, tokenizer, prompts, score_fn, ppo, gold=sources.tiny_world)
    folder.write_text("samples.md", samples_table(samples))
    draw_run(folder, history, *longest_response(trainer.batch, tokenizer))
    return summary


def compare(
    before: torch.nn.Module, after: torch.nn.Module, tokenizer, prompts: list[str], score_fn, ppo: PPOConfig, *,
    gold: bool, count: int = NUM_SHOWN,
) -> list[dict]:  # fmt: skip
    """Responses of two models to the same prompts, each with its score, and its gold reward in the tiny world."""
    generator = torch.Generator().manual_seed(ppo.seed)
    prompts = [prompts[i] for i in torch.randint(len(prompts), (count,), generator=generator).tolist()]
    samples = [{"prompt": prompt} for prompt in prompts]
    for side, lm in (("before", before), ("after", after)):
        draw = torch.Generator(lm.device).manual_seed(ppo.seed)
        texts = respond(
            lm, tokenizer, prompts, max_new_tokens=ppo.max_new_tokens, temperature=ppo.temperature, generator=draw
        )
        is_model = isinstance(score_fn, torch.nn.Module)
        scores = score_texts(score_fn, tokenizer, prompts, texts) if is_model else score_fn(prompts, texts)
        golds = tiny_reviews.gold_reward(prompts, texts) if gold else [None] * count
        for sample, text, score, gold_value in zip(samples, texts, scores, golds, strict=True):
            sample[side] = {"text": text, "score": float(score)} | ({"gold": float(gold_value)} if gold else {})
    return samples


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


def run(sources: Sources, stages: StageConfig, ppo: PPOConfig, folder: RunFolder, critic: str = "shared") -> dict:
    """The whole pipeline; a stage whose result is given is left out."""
    if sources.model is not None:
        base = sources.model
    elif sources.corpus is not None:
        base = pretrain(sources, stages, ppo, folder)
    else:
        base = ASSETS / "base"
    reward_model = sources.reward_model
    if reward_model is None and sources.score is None:
        reward_model = fit_reward(sources, base, stages, ppo, folder)
    return optimise(sources, base, reward_model, stages, ppo, folder, critic)


def progress_of_fit(label: str) -> Callable[[int, int, float], None]:
    """A progress display for a fit whose number of steps is known at its first one."""
    show = None

    def on_step(step: int, steps: int, loss: float) -> None:
        nonlocal show
        show = show or progress(steps, label)
        show(step, loss=loss)

    return on_step


def millions(model: torch.nn.Module) -> str:
    """A model's parameter count, readable: 0.25 M."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"


def say(text: str) -> None:
    """One line to the user, beside the progress bars."""
    print(text, file=sys.stderr, flush=True)
