"""From a base model and a score to what a method makes of them, and the report: the same folder whatever the method."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lessons import data, tiny_reviews
from rlhf_lessons.app.cards import Card
from rlhf_lessons.app.inputs import Records
from rlhf_lessons.app.run_folder import RunFolder, draw_run, mean_of_last, samples_table
from rlhf_lessons.config import BestOfNConfig, DPOConfig, SamplingConfig, TrainerConfig
from rlhf_lessons.display import progress, say
from rlhf_lessons.fitting import fit_dpo, preference_log_probs
from rlhf_lessons.forward import context_of
from rlhf_lessons.generation import Samples, best_of_n, eos_ids, sample_batch
from rlhf_lessons.group_trainers import GRPOTrainer, RLOOTrainer
from rlhf_lessons.kl import best_of_n_bound
from rlhf_lessons.models import bar_unused_ids
from rlhf_lessons.rollout import Rollout, describe
from rlhf_lessons.scoring import Scorer, best_of_mean
from rlhf_lessons.trainer import PPOTrainer, Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINERS = {"ppo": PPOTrainer, "rloo": RLOOTrainer, "grpo": GRPOTrainer}
TITLES = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO", "dpo": "DPO", "best-of-n": "best-of-n"}
NUM_SHOWN = 8  # responses read side by side
NUM_READ = 256  # pairs that DPO is measured on at each look
ROWS = 1024  # of best-of-n's responses that are sampled at once


class History:
    """What a run has come to, row by row: for its folder, for who watches, and for the report at the end."""

    def __init__(self, trainer: Trainer, folder: RunFolder, *, method: str, rows: int, gold: bool) -> None:
        self.trainer, self.folder, self.gold, self.rows = trainer, folder, gold, []
        shown = {"reward": "score", **({"gold": "gold"} if gold else {}), "KL": "kl"}
        self.show = progress(rows, label=TITLES[method], show=shown)

    def gold_of(self, batch: Samples) -> Tensor:
        """The gold reward (B,) of each response."""
        return tiny_reviews.gold_reward(*batch.texts(self.trainer.tokenizer))

    def begin(self, untrained: Rollout) -> None:
        """Remember what the base model's responses were worth."""
        self.before = {"score": float(untrained.scores.mean()), "score_std": float(untrained.scores.std())}
        if self.gold:
            self.before["gold"] = float(self.gold_of(untrained).mean())

    def add(self, iteration: int, metrics: dict[str, float], batch: Rollout) -> None:
        """One more row."""
        if self.gold and "gold" not in metrics:
            metrics["gold"] = float(self.gold_of(batch).mean())
        self.folder.append_metrics(iteration, metrics)
        self.rows.append({"iteration": iteration} | metrics)
        self.show(iteration, metrics)

    def report(self, batch: Rollout, *, last: int, n: int = 1) -> dict[str, Any]:
        """Samples, pictures and the summary, which is returned: before, and the mean of the last rows.

        batch: one of whose responses is drawn; n: that each answer after is the best of. Raises ValueError at the end
        for parts that could not be made; all others are there then.
        """
        trainer, folder = self.trainer, self.folder
        models = {"before": trainer.reference, "after": trainer.lm}
        names = [name for name in ("score", "gold", "kl") if name in self.rows[-1]]
        after = {name: mean_of_last(self.rows, name, last=last) for name in names}
        summary = {"before": self.before, "after": after}

        def write_samples() -> None:
            samples = compare(
                models, trainer.tokenizer, trainer.prompts, trainer.scorer, trainer.config, gold=self.gold,
                best_of={"after": n},
            )  # fmt: skip
            folder.write_text("samples.md", samples_table(samples))

        write_each({
            "samples.md": write_samples,
            "figures": lambda: draw_run(folder, self.rows, *longest_response(batch, trainer.tokenizer)),
            "summary.json": lambda: folder.write_json("summary.json", summary),  # last: who has it has finished
        })  # fmt: skip
        return summary


def optimise(trainer: Trainer, folder: RunFolder, *, method: str = "ppo", gold: bool) -> dict[str, Any]:
    """A trainer's iterations, then the report. Returns the summary: before, and the mean of the last iterations.

    gold: whether the gold reward is measured too; it means something in the tiny world alone. Raises ValueError at the
    end for parts of the report that could not be made; policy and metrics are there then, and all other parts.
    """
    history = History(trainer, folder, method=method, rows=trainer.config.num_iterations, gold=gold)
    history.begin(trainer.rollout())  # the policy is still the base model
    trainer.train(history.add)
    goal = getattr(getattr(trainer.scorer, "function", None), "__name__", "a reward model")
    card = Card(trainer.lm, trainer.tokenizer, f"{TITLES[method]} against {goal}", asdict(trainer.config))
    folder.save_models("policy", trainer.policy, trainer.tokenizer, card)
    return history.report(trainer.batch, last=5)


def looking(config: SamplingConfig, *arguments: Any, each: int = 1, prompts: int, **options: Any) -> Trainer:
    """A trainer that only looks: it draws `prompts` prompts and `each` responses to them, as `config` samples."""
    shared = {item.name: getattr(config, item.name) for item in fields(SamplingConfig)}
    shared |= dict(batch_size=prompts * each, samples_per_prompt=each, minibatch_size=prompts * each)
    return Trainer(TrainerConfig(**shared), *arguments, **options)


def optimise_directly(
    config: DPOConfig, policy: nn.Module, *arguments: Any, pairs: Records, held_out: Records, folder: RunFolder,
    gold: bool, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """DPO: a fit to the pairs, with looks at the policy; then the report, as in `optimise`.

    arguments, options: the others of `Trainer`. held_out: pairs to measure on, the first of `pairs` without any.
    """
    trainer = looking(config, policy, *arguments, prompts=config.batch_size, **options)
    history = History(trainer, folder, method="dpo", rows=config.num_iterations, gold=gold)
    history.begin(trainer.collect())
    read, losses = (held_out or pairs)[:NUM_READ], []
    ref_chosen, ref_rejected = preference_log_probs(trainer.reference, read, trainer.tokenizer)

    def on_step(step: int, steps: int, loss: float) -> None:
        losses.append(loss)
        looks = min(steps, config.num_iterations)
        look = step * looks // steps
        if look == (step - 1) * looks // steps:
            return
        batch = trainer.collect()
        chosen, rejected = preference_log_probs(trainer.lm, read, trainer.tokenizer)
        right = (chosen - ref_chosen > rejected - ref_rejected).float()
        measured = describe(batch) | {
            "chosen_log_prob": chosen.mean(), "rejected_log_prob": rejected.mean(), "pairs_right": right.mean(),
        }  # fmt: skip
        row = {name: float(value) for name, value in measured.items()} | {"loss": sum(losses) / len(losses)}
        losses.clear()
        history.add(look, row, batch)

    fit_dpo(
        trainer.lm, trainer.reference, pairs, trainer.tokenizer, beta=config.kl_coef, loss=config.dpo_loss,
        epochs=config.dpo_epochs, batch_size=config.dpo_batch_size, learning_rate=config.dpo_learning_rate,
        seed=config.seed, device=config.device, precision=config.precision, on_step=on_step,
    )  # fmt: skip
    card = Card(trainer.lm, trainer.tokenizer, f"DPO on {len(pairs)} pairs", asdict(config))
    folder.save_models("policy", trainer.policy, trainer.tokenizer, card)
    return history.report(trainer.collect(), last=1)


def choose_among(
    config: BestOfNConfig, policy: nn.Module, *arguments: Any, folder: RunFolder, gold: bool, **options: Any
) -> dict[str, Any]:
    """Best-of-n: nothing is trained, and a row is written for n = 1, 2, 4, …; then the report, as in `optimise`.

    Each n is a mean over all ways to choose it from the `config.n` responses that each prompt gets. "kl" is the bound
    log n − (n−1)/n, which no n exceeds.
    """
    at_once = max(size for size in range(1, config.batch_size + 1)
                  if config.batch_size % size == 0 and size * config.n <= max(ROWS, config.n))  # fmt: skip
    trainer = looking(config, policy, *arguments, each=config.n, prompts=at_once, **options)
    sizes = [2**power for power in range(config.n.bit_length()) if 2**power < config.n] + [config.n]
    history = History(trainer, folder, method="best-of-n", rows=len(sizes), gold=gold)
    known: dict[str, list[Tensor]] = {}
    for number in range(config.batch_size // at_once):
        rollout = trainer.collect()
        if number == 0:
            history.begin(rollout)
        found = {"score": rollout.scores, "response_length": rollout.response_mask.sum(dim=1).float(),
                 "ended": rollout.ended.float(), **({"gold": history.gold_of(rollout)} if gold else {})}  # fmt: skip
        for name, values in found.items():
            known.setdefault(name, []).append(values.cpu().view(-1, config.n))
    values = {name: torch.cat(parts) for name, parts in known.items()}
    for row, n in enumerate(sizes, start=1):
        means = {name: float(best_of_mean(values["score"], x, n).mean()) for name, x in values.items()}
        history.add(row, means | {"kl": best_of_n_bound(n), "n": n}, rollout)
    return history.report(best_of_n(rollout, rollout.scores), last=1, n=config.n)


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
    config: SamplingConfig, *, gold: bool, count: int = NUM_SHOWN, best_of: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Responses of two models to the same prompts, each with its score, and its gold reward in the tiny world.

    best_of: of how many each side's response is the best, 1 without it. Raises ValueError for no prompts.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed)).tolist()
    chosen = [prompts[order[i % len(order)]] for i in range(count)]
    shown: list[dict[str, Any]] = [{} for _ in chosen]
    for side, lm in models.items():
        n = (best_of or {}).get(side, 1)
        each = [prompt for prompt in chosen for _ in range(n)]
        bar_unused_ids(lm, tokenizer)
        ids = data.encode_prompts(tokenizer, each, max_new_tokens=config.max_new_tokens, context=context_of(lm))
        input_ids, mask = data.pad(ids, tokenizer.pad_token_id, side="left")
        samples = sample_batch(
            lm, input_ids.to(lm.device), mask.to(lm.device), records=[data.as_record(prompt) for prompt in each],
            group=(torch.arange(len(each)) // n).to(lm.device), max_new_tokens=config.max_new_tokens,
            temperature=config.temperature, eos_id=eos_ids(lm, tokenizer), pad_id=tokenizer.pad_token_id,
            generator=torch.Generator().manual_seed(config.seed),
        )  # fmt: skip
        with torch.no_grad():
            samples = best_of_n(samples, scorer(samples)) if n > 1 else samples
            numbers = {"score": scorer(samples).tolist()}
        asked, texts = samples.texts(tokenizer)
        if gold:
            numbers["gold"] = tiny_reviews.gold_reward(asked, texts).tolist()
        for i, sample in enumerate(shown):
            sample["prompt"] = asked[i]
            sample[side] = {"text": texts[i]} | {name: values[i] for name, values in numbers.items()}
    return shown


def longest_response(batch: Rollout, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[str], dict[str, list[float]]]:
    """The tokens of a batch's longest response that ended, and what the method knew of each."""
    lengths = batch.response_mask.sum(dim=1)
    row = int((lengths * batch.ended).argmax())
    steps = slice(0, int(lengths[row]))
    quantities = {
        "reward": getattr(batch, "rewards", None), "kl": batch.log_probs - batch.ref_log_probs,
        "value": getattr(batch, "values", None), "advantage": getattr(batch, "advantages", None),
    }  # fmt: skip
    tokens = tokenizer.convert_ids_to_tokens(batch.responses[row, steps].tolist())
    shown = {name: x[row, steps].tolist() for name, x in quantities.items() if x is not None}
    return [token.replace("Ġ", "") for token in tokens], shown


def align(
    method: str, config: SamplingConfig, policy: nn.Module, score: Any, prompts: Records,
    tokenizer: "PreTrainedTokenizerBase", *, folder: RunFolder, pairs: tuple[Records, Records], gold: bool,
    sampler: Callable[..., Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """A policy, from the base model that it is, by one of `config.METHODS`. pairs: to learn from, and held out."""
    arguments = (policy, copy.deepcopy(getattr(policy, "lm", policy)), score, prompts, tokenizer)
    if method in TRAINERS:
        trainer = TRAINERS[method](config, *arguments, sampler=sampler)
        return optimise(trainer, folder, method=method, gold=gold)
    if method == "dpo":
        learnt, held_out = pairs
        return optimise_directly(
            config, *arguments, pairs=learnt, held_out=held_out, folder=folder, gold=gold, sampler=sampler
        )
    return choose_among(config, *arguments, folder=folder, gold=gold, sampler=sampler)
