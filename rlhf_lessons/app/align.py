"""From a base model and a score to what a method makes of them, and the report: the same folder whatever the method."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lessons import data, tiny_reviews
from rlhf_lessons.adapters import as_reference, has_adapter
from rlhf_lessons.app import run_folder
from rlhf_lessons.app.cards import Card
from rlhf_lessons.app.inputs import Records
from rlhf_lessons.app.options import MACHINE
from rlhf_lessons.app.page import report_page
from rlhf_lessons.app.resume import STEPS, Stage
from rlhf_lessons.app.run_folder import RunFolder, draw_run, longest_response, read_metrics, samples_table, summarise
from rlhf_lessons.config import BestOfNConfig, DPOConfig, SamplingConfig, TrainerConfig
from rlhf_lessons.device import autocast, gathered, sharded, whole
from rlhf_lessons.display import progress, say
from rlhf_lessons.fitting import fit_dpo, preference_log_probs
from rlhf_lessons.generation import Samples, answers, best_of_n
from rlhf_lessons.group_trainers import GRPOTrainer, RLOOTrainer
from rlhf_lessons.importance import importance_ratio
from rlhf_lessons.kl import best_of_n_bound, sampled_kl
from rlhf_lessons.rollout import Credited, Rollout, describe, response_log_probs
from rlhf_lessons.scoring import Scorer, best_of_mean
from rlhf_lessons.trainer import PPOTrainer, Trainer

Summary = dict[str, Any]  # a run's numbers before and after
TRAINERS = {"ppo": PPOTrainer, "rloo": RLOOTrainer, "grpo": GRPOTrainer}
TITLES = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO", "dpo": "DPO", "best-of-n": "best-of-n"}
NUM_SHOWN = 8  # responses read side by side
PER_TOKEN = ("value", "advantage", "reward")  # what a batch may hold, each with an s
NUM_KEPT = 3  # responses of a batch that are kept token by token, beside its longest
NUM_LOOKS = 50  # iterations of a run of which they are kept, or about as many
NUM_READ = 256  # pairs that DPO is measured on at each look
ROWS = 1024  # of best-of-n's responses that are sampled at once


class History:
    """What a run has come to, row by row: in its folder's files, for who watches, and in the report at the end."""

    def __init__(self, trainer: Trainer, folder: RunFolder, *, method: str, rows: int, gold: bool) -> None:
        self.trainer, self.folder, self.gold, self.rows, self.done = trainer, folder, gold, rows, 0
        self.title = TITLES[method]
        shown = {"reward": "score", **({"gold": "gold"} if gold else {}), "KL": "kl"}
        self.show = progress(rows, label=self.title, show=shown)

    def gold_of(self, batch: Samples) -> Tensor:
        """The gold reward (B,) of each response."""
        return tiny_reviews.gold_reward(*batch.texts(self.trainer.tokenizer))

    def begin(self, untrained: Rollout) -> None:
        """Write down what the base model's responses were worth, those to the evaluation prompts too."""
        before = {"score": float(untrained.scores.mean()), "score_std": float(untrained.scores.std())}
        before |= looked_at(self.trainer)
        self.add_gold(before, untrained)
        self.folder.write_numbers("before.json", before)

    def add_gold(self, metrics: dict[str, float], batch: Rollout) -> None:
        """The gold reward beside each score in these metrics, if it is measured: the batch's, the evaluation's."""
        for name, samples in (("gold", batch), ("eval_gold", self.trainer.evaluated)):
            if self.gold and name not in metrics and name.replace("gold", "score") in metrics:
                metrics[name] = float(self.gold_of(samples).mean())

    def go_on_after(self, iteration: int) -> None:
        """Continue after this iteration of a run that was stopped: what is later is done again."""
        self.done = iteration
        self.folder.go_on_after(iteration)

    def add(self, iteration: int, metrics: dict[str, float], batch: Rollout) -> None:
        """One more row and, every so often, a few of the batch's responses token by token."""
        self.done = iteration
        self.add_gold(metrics, batch)
        self.folder.append_metrics(iteration, metrics)
        if iteration in (1, self.rows) or iteration % math.ceil(self.rows / NUM_LOOKS) == 0:
            kept = [{"iteration": iteration} | response for response in self.responses(batch)]
            self.folder.append("rollouts.jsonl", kept)
        self.show(iteration, metrics)

    def responses(self, batch: Rollout) -> list[dict[str, Any]]:
        """The first responses of a batch and its longest that ended, each with what is known of it and of its tokens.

        "ratio", where the batch was learnt from, is π now over π that sampled. Only reads: no random number is drawn.
        """
        trainer, longest = self.trainer, int((batch.response_mask.sum(dim=1) * batch.ended).argmax())
        few = batch.rows(torch.tensor(list(dict.fromkeys([*range(min(NUM_KEPT, len(batch))), longest]))))
        known = {"log_prob": few.log_probs, "ref_log_prob": few.ref_log_probs}
        known["kl"] = sampled_kl(few.log_probs, few.ref_log_probs, kind="k1")
        known |= {name: getattr(few, f"{name}s") for name in PER_TOKEN if hasattr(few, f"{name}s")}
        if isinstance(few, Credited):
            with torch.no_grad(), gathered(trainer.model), autocast(trainer.device, trainer.config.precision):
                known["ratio"] = importance_ratio(response_log_probs(trainer.lm, few, trainer.config), few.log_probs)
        of_text = {"score": few.scores, **({"gold": self.gold_of(few)} if self.gold else {}), "ended": few.ended}
        kept = []
        for row, (prompt, text) in enumerate(zip(*few.texts(trainer.tokenizer), strict=True)):
            real = few.response_mask[row]
            tokens = [data.text_of(trainer.tokenizer, [token]) for token in few.responses[row][real].tolist()]
            numbers = {name: x[row].item() for name, x in of_text.items()}
            kept.append({"prompt": prompt, "tokens": tokens, "text": text} | numbers
                        | {name: x[row][real].tolist() for name, x in known.items()})  # fmt: skip
        return kept

    def report(self, *, last: int, n: int = 1) -> Summary:
        """Samples of both models, then from the folder's files pictures, page and the summary, which is returned.

        last: iterations that "after" is the mean of; n: that each answer after is the best of. Raises ValueError at the
        end for parts that could not be made; all others are there then.
        """
        trainer, folder, path = self.trainer, self.folder, self.folder.path
        summary = summarise(path, last=last) if folder.first else {}
        models = {"before": trainer.reference, "after": trainer.lm}

        def write_samples() -> None:
            with gathered(trainer.model):
                samples = before_and_after(models, trainer.tokenizer, trainer.prompts, trainer.scorer, trainer.config,
                                           gold=self.gold, best_of={"after": n})  # fmt: skip
            folder.write_numbers("samples.json", samples)
            folder.write_text("samples.md", samples_table(samples))

        def write_page() -> None:
            folder.write_text("report.html", report_page(path, summary, title=self.title, last=last))

        parts = {
            "samples.md": write_samples,
            "figures": lambda: draw_run(folder, read_metrics(path), *longest_response(path)),
            "report.html": write_page,
            "summary.json": lambda: folder.write_json("summary.json", summary),  # last: who has it has finished
        }
        write_each(parts if folder.first else {"samples.md": write_samples})  # which all processes draw
        return summary

    def finish(self, how: str, settings: SamplingConfig, *, last: int) -> Summary:
        """Save the policy with its card, which says how it was trained; then the report."""
        trainer = self.trainer
        card = Card(trainer.lm, trainer.tokenizer, f"{self.title} {how}", asdict(settings))
        weights = {"state_dict": whole(trainer.policy.state_dict(keep_vars=True))} if sharded() else {}
        with gathered(trainer.model):  # the card asks the policy
            self.folder.save_models("policy", trainer.policy, trainer.tokenizer, card, **weights)
        return self.report(last=last)


def optimise(trainer: Trainer, folder: RunFolder, *, method: str = "ppo", gold: bool) -> Summary:
    """A trainer's iterations, then the report. Returns the summary: before, and the mean of the last iterations.

    gold: whether the gold reward is measured too; it means something in the tiny world alone. Raises ValueError at the
    end for parts of the report that could not be made; policy and metrics are there then, and all other parts.
    """
    history = History(trainer, folder, method=method, rows=trainer.config.num_iterations, gold=gold)
    stage = Stage(folder, method)
    if kept := stage.load():
        trainer.load_state_dict(kept)
    else:
        history.begin(trainer.rollout())  # the policy is still the base model
    history.go_on_after(trainer.iteration)

    def on_step(iteration: int, metrics: dict[str, float], batch: Rollout) -> None:
        history.add(iteration, metrics, batch)
        stage.offer(iteration, lambda: trainer.state_dict(copied=False))

    with stage:
        trainer.train(on_step)
    goal = getattr(getattr(trainer.scorer, "function", None), "__name__", "a reward model")
    return history.finish(f"against {goal}", trainer.config, last=run_folder.LAST)


def looking(config: SamplingConfig, *arguments: Any, each: int = 1, prompts: int, **options: Any) -> Trainer:
    """A trainer that only looks: it draws `prompts` prompts and `each` responses to them, as `config` samples."""
    shared = {item.name: getattr(config, item.name) for item in fields(SamplingConfig)}
    shared |= dict(batch_size=prompts * each, samples_per_prompt=each, minibatch_size=prompts * each)
    return Trainer(TrainerConfig(**shared), *arguments, **options)


def of_fit(name: str, config: Any, shared: SamplingConfig) -> dict[str, Any]:
    """What a fit reads of its own settings, which begin with its name, and of those that all stages share."""
    own = {setting: getattr(config, f"{name}_{setting}") for setting in ("epochs", "batch_size", "learning_rate")}
    return own | {setting: getattr(shared, setting) for setting in MACHINE}


def looked_at(trainer: Trainer) -> dict[str, float]:
    """What the responses to the evaluation prompts have come to; nothing where there are none."""
    return trainer.evaluate()[0] if trainer.eval_prompts else {}


def optimise_directly(
    config: DPOConfig, *arguments: Any, pairs: Records, held_out: Records, folder: RunFolder, gold: bool, **options: Any
) -> Summary:
    """DPO: a fit to the pairs, with looks at the policy; then the report, as in `optimise`.

    arguments, options: those of `Trainer`. held_out: pairs to measure on, the first of `pairs` without any.
    """
    trainer = looking(config, *arguments, prompts=config.batch_size, **options)
    history = History(trainer, folder, method="dpo", rows=config.num_iterations, gold=gold)
    read, losses = (held_out or pairs)[:NUM_READ], []  # the losses since the last look
    with as_reference(trainer.lm, trainer.reference) as held_to:
        ref_chosen, ref_rejected = preference_log_probs(held_to, read, trainer.tokenizer)

    def on_step(step: int, steps: int, loss: float) -> None:
        losses.append(loss)
        looks = min(steps, config.num_iterations)
        look = step * looks // steps
        if look == (step - 1) * looks // steps:
            return
        batch = trainer.collect()
        chosen, rejected = preference_log_probs(trainer.lm, read, trainer.tokenizer)
        right = (chosen - ref_chosen > rejected - ref_rejected).float()
        of_pairs = {"chosen_log_prob": chosen, "rejected_log_prob": rejected, "pairs_right": right}
        row = {name: float(value.mean()) for name, value in (describe(batch) | of_pairs).items()}
        row["loss"] = sum(losses) / len(losses)
        losses.clear()
        history.add(look, row | looked_at(trainer), batch)

    stage = Stage(folder, "dpo", each=STEPS, beside=lambda: {
        "generator": trainer.generator.get_state(), "since_look": losses, "looks": history.done})  # fmt: skip
    if kept := stage.load():
        trainer.generator.set_state(kept["generator"])
        losses += kept["since_look"]
    else:
        history.begin(trainer.collect())
    history.go_on_after(kept["looks"] if kept else 0)
    with stage:
        fit_dpo(trainer.lm, trainer.reference, pairs, trainer.tokenizer, beta=config.kl_coef, loss=config.dpo_loss,
                **of_fit("dpo", config, config), on_step=on_step, keeper=stage)  # fmt: skip
    return history.finish(f"on {len(pairs)} pairs", config, last=1)


def choose_among(config: BestOfNConfig, *arguments: Any, folder: RunFolder, gold: bool, **options: Any) -> Summary:
    """Best-of-n: nothing is trained, and a row is written for n = 1, 2, 4, …; then the report, as in `optimise`.

    Each n is a mean over all ways to choose it from the `config.n` responses that each prompt gets. "kl" is the bound
    log n − (n−1)/n, which no n exceeds.
    """
    at_once = max(size for size in range(1, config.batch_size + 1)
                  if config.batch_size % size == 0 and size * config.n <= max(ROWS, config.n))  # fmt: skip
    trainer = looking(config, *arguments, each=config.n, prompts=at_once, **options)
    sizes = [2**power for power in range(config.n.bit_length()) if 2**power < config.n] + [config.n]
    history = History(trainer, folder, method="best-of-n", rows=len(sizes), gold=gold)
    rounds = config.batch_size // at_once
    with Stage(folder, "best-of-n") as stage:
        known = stage.load() or {"values": {}, "generator": trainer.generator.get_state(), "rounds": 0}
        trainer.generator.set_state(known["generator"])
        history.go_on_after(0)
        for number in range(known["rounds"], rounds):
            rollout = trainer.collect()
            if number == 0:
                history.begin(rollout)
            found = {"score": rollout.scores, "response_length": rollout.response_mask.sum(dim=1).float()}
            found |= {"ended": rollout.ended.float(), **({"gold": history.gold_of(rollout)} if gold else {})}
            for name, values in found.items():
                known["values"].setdefault(name, []).append(values.cpu().view(-1, config.n))
            known |= {"generator": trainer.generator.get_state(), "rounds": number + 1}
            if number + 1 < rounds:  # the report shows responses of the last
                stage.offer(number + 1, known.copy)
    values = {name: torch.cat(parts) for name, parts in known["values"].items()}
    for row, n in enumerate(sizes, start=1):
        means = {name: float(best_of_mean(values["score"], x, n).mean()) for name, x in values.items()}
        first = rollout.rows(torch.arange(len(rollout)).view(-1, config.n)[:, :n].flatten())
        history.add(row, means | {"kl": best_of_n_bound(n), "n": n}, best_of_n(first, first.scores))
    return history.report(last=1, n=config.n)


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


def before_and_after(
    models: dict[str, nn.Module | None], tokenizer: data.Tokenizer, prompts: Records, scorer: Scorer,
    config: SamplingConfig, *, gold: bool, count: int = NUM_SHOWN, best_of: Mapping[str, int] = MappingProxyType({}),
) -> list[dict[str, Any]]:  # fmt: skip
    """Responses of two models to the same prompts, each with its score, and its gold reward in the tiny world.

    models: None stands for "after" with its adapter off; best_of: of how many each side's response is the best, 1
    without it. Raises ValueError for no prompts.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed)).tolist()
    chosen = [prompts[order[i % len(order)]] for i in range(count)]
    shown: list[dict[str, Any]] = [{} for _ in chosen]
    for side, model in models.items():
        n, generator = best_of.get(side, 1), torch.Generator().manual_seed(config.seed)
        options = dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature, generator=generator)
        with as_reference(models.get("after"), model) as lm:
            samples = answers(lm, tokenizer, [prompt for prompt in chosen for _ in range(n)], each=n, **options)
        with torch.no_grad():
            samples = best_of_n(samples, scorer(samples)) if n > 1 else samples
            numbers = {"score": scorer(samples).tolist()}
        asked, texts = samples.texts(tokenizer)
        if gold:
            numbers["gold"] = tiny_reviews.gold_reward(asked, texts).tolist()
        for i, sample in enumerate(shown):
            given = data.as_record(chosen[i])["prompt"]
            turns = [f"{turn['role']}: {turn['content']}" for turn in given] if data.is_chat(given) else [asked[i]]
            sample["prompt"] = " / ".join(turns)
            sample[side] = {"text": texts[i]} | {name: values[i] for name, values in numbers.items()}
    return shown


def align(
    method: str, config: SamplingConfig, policy: nn.Module, score: Any, prompts: Records, tokenizer: data.Tokenizer, *,
    folder: RunFolder, pairs: tuple[Records, Records], gold: bool, **options: Any,
) -> Summary:  # fmt: skip
    """A policy, from the base model that it is, by one of `config.METHODS`.

    What is trained by an adapter is its own reference, with that off; best-of-n starts from what it was given. pairs:
    to learn from, and held out; options: sampler and eval_prompts of `Trainer`.
    """
    lm = getattr(policy, "lm", policy)
    reference = None if has_adapter(lm) and method != "best-of-n" else copy.deepcopy(lm)
    arguments = (config, policy, reference, score, prompts, tokenizer)
    if method in TRAINERS:
        return optimise(TRAINERS[method](*arguments, **options), folder, method=method, gold=gold)
    options |= {"folder": folder, "gold": gold}
    if method == "dpo":
        learnt, held_out = pairs
        return optimise_directly(*arguments, pairs=learnt, held_out=held_out, **options)
    return choose_among(*arguments, **options)
