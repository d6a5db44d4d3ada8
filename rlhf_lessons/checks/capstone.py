"""Lesson 10's exercise: PPO by the learner's own hands, held against `PPOTrainer` stage by stage.

Each check runs the learner's function and the package's on one small batch of the shipped models and compares what they
compute in the order in which it is computed. The first stage that differs is the one that is spoken of: by the hint of
the known mistake that gives the same numbers, else in numbers. The settings are not the default ones, so that a number
written into the code instead of being read from `config` shows.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlhf_lessons import tiny_reviews
from rlhf_lessons.advantages import gae
from rlhf_lessons.checks._harness import CORRECT, NOT_ATTEMPTED, Hint, report
from rlhf_lessons.checks._wording import describe_type, error_hint, type_problem
from rlhf_lessons.config import PPOConfig
from rlhf_lessons.forward import causal_lm_logits
from rlhf_lessons.kl import sampled_kl
from rlhf_lessons.masking import masked_mean, masked_whiten
from rlhf_lessons.models import ASSETS, CausalLMWithValueHead, load_causal_lm, load_reward_model, load_tokenizer
from rlhf_lessons.policy_gradient import action_log_probs, entropy, reward_to_go
from rlhf_lessons.rollout import Rollout, RolloutBatch, policy_outputs, ppo_credit, response_values
from rlhf_lessons.trainer import PPOTrainer

CONFIG = PPOConfig(
    batch_size=16, minibatch_size=4, ppo_epochs=2, max_new_tokens=12, learning_rate=0.3, lr_schedule="constant",
    kl_coef=0.3, gamma=0.97, gae_lambda=0.8, clip_eps=0.15, value_clip_eps=0.1, vf_coef=0.5, ent_coef=0.05,
    max_grad_norm=0.4, temperature=0.8, device="cpu", seed=10,
)  # fmt: skip


# ---- the batch that all three functions are tried on ----------------------------------------


@dataclass(frozen=True)
class Bench:
    """A policy with what it has sampled, and the same policy after some updates."""

    trainer: PPOTrainer  # its policy is the one that sampled
    facts: Rollout
    values: Tensor  # (B, T) the critic's, of the sampled states
    batch: RolloutBatch  # the facts with their credit
    moved: CausalLMWithValueHead  # another policy than the one that sampled: its ratios are not 1


@functools.cache
def bench() -> Bench:
    """From the shipped models, the same every time; the global random state is left as it was."""
    generator = torch.Generator().manual_seed(10)
    with torch.random.fork_rng(devices=[]):
        policy = CausalLMWithValueHead.from_pretrained(ASSETS / "base")
        jitter(policy, 0.03, generator)  # else it is the reference, and values nothing: both would hide mistakes
        jitter(policy.value_head, 0.1, generator)
        trainer = make_trainer(policy)
        facts = trainer.collect()
        batch = trainer.credit(facts)
        moved = copy.deepcopy(policy)
        jitter(moved, 0.02, generator)
    return Bench(trainer, facts, batch.values, batch, moved)


def make_trainer(policy: CausalLMWithValueHead, config: PPOConfig = CONFIG, **options: object) -> PPOTrainer:
    """The package's trainer of this policy in the tiny world."""
    prompts = tiny_reviews.prompts(64, torch.Generator().manual_seed(11))
    return PPOTrainer(
        config, policy, load_causal_lm(ASSETS / "base"), load_reward_model(ASSETS / "reward_model"), prompts,
        load_tokenizer(ASSETS / "base"), **options,
    )  # fmt: skip


@torch.no_grad()
def jitter(module: nn.Module, scale: float, generator: torch.Generator) -> None:
    """Move every parameter by noise of this standard deviation."""
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


# ---- how two numbers, and two chains of them, are compared ----------------------------------


@dataclass(frozen=True)
class Known:
    """What a known mistake computes, and what to say of it."""

    name: str
    value: Tensor
    hint: str


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding."""
    size = max(1e-2, float(b.detach().abs().max()))
    return a.shape == b.shape and bool(((a.double() - b.double()).abs() <= 2e-4 * size).all())  # NaN is not


def compare(stage: str, answer: Tensor, right: Tensor, known: tuple[Known, ...]) -> None:
    """Raise a hint unless the answer is right: the known mistake's, or the first number that is wrong."""
    answer = answer.detach()
    if answer.shape != right.shape:
        raise Hint(f"{stage} must have the shape {tuple(right.shape)}; yours has {tuple(answer.shape)}.")
    if close(answer, right):
        return
    for mistake in known:
        if close(answer, mistake.value):
            raise Hint(f"{stage}: {mistake.hint}")
    off = (answer.double() - right.double()).abs().nan_to_num(nan=torch.inf) > 1e-4
    place = tuple(int(i) for i in torch.unravel_index(off.int().argmax(), off.shape)) if off.ndim else ()
    where = f" in row {place[0]}, token {place[1]}" if len(place) == 2 else ""
    got, wanted = (float(x[place]) for x in (answer, right))
    raise Hint(
        f"{stage} is the first stage that differs from the trainer's{where}: yours is {got:.4f}, the trainer's "
        f"{wanted:.4f}. No known mistake gives these numbers."
    )


def refuse_another_order(answers: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """Raise a hint where the results are the right ones, each in another's place."""
    for order in itertools.permutations(right):
        pairs = [(answers[place], right[name]) for place, name in zip(right, order, strict=True)]
        if order != tuple(right) and all(x.shape == y.shape and close(x.detach(), y) for x, y in pairs):
            raise Hint(f"All are right, in another order: what is wanted is {', '.join(right)}.")


def called(name: str, function: object, *arguments: object) -> object:
    """What the learner's function returns; what it raises, as a hint."""
    if not callable(function):
        raise Hint(f"checks.{name} wants the function itself, without (...); it got {describe_type(function)}.")
    try:
        with torch.random.fork_rng(devices=[]):
            return function(*arguments)
    except Hint:
        raise
    except Exception as error:  # whatever the learner's code raises is to be reported
        if "NotImplementedType" in str(error):
            raise Hint(f"{name} calls a function that is not written yet: it returned NotImplemented.") from error
        raise Hint(error_hint(error)) from error


def answers_of(check: str, function: object, names: tuple[str, ...], *arguments: object) -> dict[str, Tensor] | None:
    """The tensors that the learner's function returns, by name; None, which is said, where it is not attempted yet."""
    returned = called(check, function, *arguments)
    if returned is NotImplemented:
        report(check, NOT_ATTEMPTED)
        return None
    returned = tuple(returned) if isinstance(returned, list) else returned
    if problem := type_problem(returned, names):
        raise Hint(problem)
    return dict(zip(names, returned, strict=True))


# ---- credit: rewards, returns, advantages ---------------------------------------------------


def on_column(facts: Rollout, column: Tensor) -> Tensor:
    """The scores on one column of each row (B, T); nothing where that is outside."""
    steps = torch.arange(facts.response_mask.shape[1])
    return torch.where(steps == column[:, None], facts.scores[:, None], 0)


def wrong_rewards(b: Bench) -> Iterator[Known]:
    facts, mask, beta = b.facts, b.facts.response_mask, CONFIG.kl_coef
    kl = torch.where(mask, facts.log_probs - facts.ref_log_probs, 0)
    k3 = torch.where(mask, sampled_kl(facts.log_probs, facts.ref_log_probs, kind="k3"), 0)
    last = mask.sum(dim=1) - 1
    score = on_column(facts, last)
    end = torch.full_like(last, mask.shape[1] - 1)
    yield Known("KL sign", score + beta * kl, "the KL is added, so leaving the reference is paid for. It is a price: a "
                "minus stands before β (log π − log π_ref).")  # fmt: skip
    yield Known("no KL", score, "only the score is there. Each token also pays β (log π − log π_ref), or nothing "
                "holds the policy near the reference.")  # fmt: skip
    yield Known("no β", score - kl, "the KL is subtracted whole: it is to be multiplied by config.kl_coef.")
    yield Known("default β", score - PPOConfig().kl_coef * kl, "β is the default one, written into the code: read "
                "config.kl_coef.")  # fmt: skip
    yield Known("k3 for k1", score - beta * k3, "the KL is k3. In the reward k1 stands, log π − log π_ref: it alone "
                "adds up to the log ratio of the whole text.")  # fmt: skip
    for spread in (facts.scores[:, None] - beta * kl, torch.where(mask, facts.scores[:, None], 0) - beta * kl):
        yield Known("score everywhere", spread, "the score stands on every token, so a long text is paid many times. "
                    "The reward model scores once: on the last real token.")  # fmt: skip
    for column in (on_column(facts, end) - beta * kl, torch.where(mask, on_column(facts, end), 0) - beta * kl):
        yield Known("score on the last column", column, "the score stands on the last column, which is padding in "
                    "shorter rows. It belongs on each row's last real token.")  # fmt: skip
    for late in (on_column(facts, last + 1) - beta * kl, torch.where(mask, on_column(facts, last + 1), 0) - beta * kl):
        yield Known("score one late", late, "the score stands one step after the last real token: that is padding.")
    yield Known("score one early", on_column(facts, last - 1) - beta * kl, "the score stands one step before the last "
                "real token. The last one is at position mask.sum() − 1.")  # fmt: skip


def wrong_returns(b: Bench) -> Iterator[Known]:
    mask, rewards, values = b.facts.response_mask, b.batch.rewards, b.values
    gamma, lam = CONFIG.gamma, CONFIG.gae_lambda
    of = functools.partial(gae, rewards, mask=mask)
    raw, right = of(values, gamma=gamma, lam=lam)
    real = functools.partial(torch.where, mask)
    yield Known("whitened + V", real(masked_whiten(raw, mask) + values, 0), "the whitened advantages were added to the "
                "values. The critic's target is in the units of the reward: add them before whitening.")  # fmt: skip
    yield Known("advantages alone", raw, "these are the advantages. The critic's target is Â + V.")
    yield Known("V subtracted", real(raw - values, 0), "V is subtracted once more. Â = R̂ − V, so R̂ = Â + V.")
    plain = reward_to_go(rewards, mask, gamma=gamma)
    yield Known("plain sum", plain, "this is the plain sum of the rewards that follow, as for λ = 1. The λ-return is "
                "Â + V, with γλ in the recursion of Â.")  # fmt: skip
    yield Known("λ = 0", of(values, gamma=gamma, lam=0.0)[1], "Â is only δ, as for λ = 0: the recursion "
                "Â_t = δ_t + γλ Â_{t+1} is missing.")  # fmt: skip
    given = given_values(b)
    behind = torch.cat([given[:, 1:], torch.zeros_like(given[:, :1])], dim=1)
    cut = backwards(real(rewards + gamma * behind - given, 0), mask, gamma * lam) + values
    for leaking in (cut, gae(rewards, given, gamma=gamma, lam=lam)[1]):
        yield Known("V behind the end", real(leaking, 0), "V is 0 after the last real token, whatever `values` holds "
                    "there: replace what stands under the padding.")  # fmt: skip
    yield Known("γ = 1", of(values, gamma=1.0, lam=lam)[1], "γ is 1 everywhere: read config.gamma, in δ and in the "
                "recursion.")  # fmt: skip
    defaults = PPOConfig()
    yield Known("defaults", of(values, gamma=defaults.gamma, lam=defaults.gae_lambda)[1], "γ and λ are the default "
                "ones, written into the code: read config.gamma and config.gae_lambda.")  # fmt: skip
    yield Known("default λ", of(values, gamma=gamma, lam=defaults.gae_lambda)[1], "λ is the default one, written into "
                "the code: read config.gae_lambda.")  # fmt: skip
    yield Known("swapped", of(values, gamma=lam, lam=gamma)[1], "γ and λ are swapped: δ holds γ alone.")
    for name, after, hint in (
        ("rolled", values.roll(-1, dims=1), "the next value wraps around to the row's first one. After the last token "
         "there is nothing to come: V = 0."),
        ("bootstrapped", real(torch.where(next_real(mask), values.roll(-1, dims=1), values), 0), "after the last token "
         "its own value is taken for the next one. The text has ended: V = 0 there."),
    ):  # fmt: skip
        delta = real(rewards + gamma * after - values, 0)
        yield Known(name, real(backwards(delta, mask, gamma * lam) + values, 0), hint)
    delta = real(rewards + gamma * real(values, 0).roll(-1, 1) * next_real(mask) - values, 0)
    yield Known("recursion without γ", real(backwards(delta, mask, lam) + values, 0), "Â_{t+1} is multiplied by λ "
                "alone: it is γλ.")  # fmt: skip
    yield Known("no next value", real(backwards(real(rewards - values, 0), mask, gamma * lam) + values, 0), "δ lacks "
                "γ V_{t+1}.")  # fmt: skip


def next_real(mask: Tensor) -> Tensor:
    """True where the next token is real."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def backwards(delta: Tensor, mask: Tensor, factor: float) -> Tensor:
    """x_t = δ_t + factor · x_{t+1}, from the end of each row."""
    total, rows = torch.zeros_like(delta[:, 0]), []
    for t in reversed(range(delta.shape[1])):
        total = torch.where(mask[:, t], delta[:, t] + factor * total, 0)
        rows.append(total)
    return torch.stack(rows[::-1], dim=1)


def wrong_advantages(b: Bench) -> Iterator[Known]:
    mask, values, returns = b.facts.response_mask, b.values, b.batch.returns
    raw = torch.where(mask, returns - values, 0)
    real = raw[mask]
    yield Known("not whitened", raw, "they are not whitened: over the batch's real tokens their mean is to be 0 and "
                "their variance 1 (masking.masked_whiten).")  # fmt: skip
    padded = (raw - raw.mean()) / raw.std(correction=0)
    for white in (padded, torch.where(mask, padded, 0)):
        yield Known("padding whitened", white, "padding was counted in their mean and variance: only real tokens "
                    "are to be.")  # fmt: skip
    yield Known("centred only", torch.where(mask, raw - real.mean(), 0), "their mean is 0, their variance not yet 1.")
    yield Known("scaled only", raw / real.std(correction=0), "they are scaled, but their mean was not subtracted.")
    yield Known("Bessel", torch.where(mask, (raw - real.mean()) / real.std(), 0), "torch.std divides by n − 1, "
                "whitening by n: pass correction=0.")  # fmt: skip
    yield Known("variance", torch.where(mask, (raw - real.mean()) / real.var(correction=0), 0), "they are divided by "
                "the variance; its root is wanted.")  # fmt: skip
    yield Known("returns whitened", masked_whiten(returns, mask), "the returns were whitened: it is Â = R̂ − V that "
                "is to be.")  # fmt: skip


def given_values(b: Bench) -> Tensor:
    """What the critic said, with a number under the padding: there it may say anything."""
    return torch.where(b.facts.response_mask, b.values, 5.0)


CREDIT = {"rewards": wrong_rewards, "returns": wrong_returns, "advantages": wrong_advantages}  # causes first


def my_credit(function: Callable) -> None:
    """Lesson 10: (facts, values, config) -> rewards, advantages, returns, each (B, T), as `PPOTrainer.credit` does.

    Prints "not attempted yet" or "correct", or raises AssertionError with a hint about the first stage that differs.
    """
    b = bench()
    facts, names = copy.deepcopy(b.facts), ("rewards", "advantages", "returns")
    answers = answers_of("my_credit", function, names, facts, given_values(b), CONFIG)
    if answers is None:
        return
    refuse_changes(facts, b.facts)
    mask, right = b.facts.response_mask, {name: getattr(b.batch, name) for name in names}
    # Padding is nobody's affair: no mean counts it.
    answers = {name: torch.where(mask, x, 0) if x.shape == mask.shape else x for name, x in answers.items()}
    refuse_another_order(answers, right)
    for stage, known in CREDIT.items():
        compare(stage, answers[stage], right[stage], tuple(known(b)))
    report("my_credit", CORRECT)


def refuse_changes(facts: Rollout, before: Rollout) -> None:
    """Raise a hint where the facts of the batch were written to."""
    for name, x in vars(facts).items():
        if isinstance(x, Tensor) and not torch.equal(x, getattr(before, name)):
            raise Hint(f"Your function changes facts.{name} in place. What was recorded is to stay: work on a copy.")


# ---- losses: of the policy, of the critic, the whole, and its gradient ----------------------


def spelled_out(policy: nn.Module, batch: RolloutBatch, config: PPOConfig) -> dict[str, Tensor]:
    """What a loss is made of: log-probabilities, values and entropies of the tokens, some also as they are misread."""
    length = batch.response_mask.shape[1]
    logits, values = policy_outputs(
        policy, batch.tokens, batch.attention_mask, length=length, temperature=config.temperature
    )
    late_logits = causal_lm_logits(policy.lm, batch.tokens, batch.attention_mask, logits_to_keep=length)
    return {
        "log_probs": action_log_probs(logits, batch.responses),
        "late": action_log_probs(late_logits / config.temperature, batch.responses),
        "undivided": action_log_probs(logits * config.temperature, batch.responses),
        "divided_twice": action_log_probs(logits / config.temperature, batch.responses),
        "values": values,
        "late_values": policy.values(batch.tokens, batch.attention_mask, keep=length),
        "entropy": entropy(logits),
    }


def surrogate(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, eps: float, *, pick: Callable = torch.max,
    average: Callable = masked_mean,
) -> Tensor:  # fmt: skip
    """The clipped loss (Eq. 7.1), with its larger term unless another is to be picked."""
    ratio = torch.where(mask, log_ratio, 0).exp()
    return average(pick(-ratio * advantages, -ratio.clamp(1 - eps, 1 + eps) * advantages), mask)


def over_all(x: Tensor, mask: Tensor) -> Tensor:
    """The mean that counts padding, as if it were zeros."""
    return torch.where(mask, x, 0).mean()


def everywhere(x: Tensor, mask: Tensor) -> Tensor:
    """The mean that counts padding with whatever stands there."""
    return x.mean()


def over_rows(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over rows of each row's mean."""
    return (torch.where(mask, x, 0).sum(dim=1) / mask.sum(dim=1)).mean()


def row_sums(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over rows of each row's sum, as in lesson 03."""
    return torch.where(mask, x, 0).sum(dim=1).mean()


def first(unclipped: Tensor, clipped: Tensor) -> Tensor:
    return unclipped


def second(unclipped: Tensor, clipped: Tensor) -> Tensor:
    return clipped


MEANS = (
    ("padding in the mean", over_all, "padding is counted in the mean: divide by the number of real tokens."),
    ("mean of row means", over_rows, "a mean was taken in each row, and then over the rows: short texts count too "
     "much. Divide once, by the number of all real tokens."),
    ("sum over tokens", row_sums, "the tokens of a row are summed, as in lesson 03; here the mean runs over all real "
     "tokens of the minibatch."),
)  # fmt: skip


def wrong_policy_losses(batch: RolloutBatch, x: Mapping[str, Tensor], config: PPOConfig) -> Iterator[Known]:
    mask, a, eps = batch.response_mask, batch.advantages, config.clip_eps
    d, late = x["log_probs"] - batch.log_probs, x["late"] - batch.log_probs
    yield Known("sign of Â", surrogate(d, -a, mask, eps), "Â has the wrong sign: this loss makes bad tokens likelier. "
                "Minimised is max(−ρÂ, −clip(ρ)Â).")  # fmt: skip
    yield Known("maximised", -surrogate(d, a, mask, eps), "this is what is to be maximised. The optimiser minimises: "
                "turn the sign of the whole.")  # fmt: skip
    yield Known("min for max", surrogate(d, a, mask, eps, pick=torch.min), "min where max belongs: once the terms have "
                "a minus, the pessimistic one is the larger.")  # fmt: skip
    yield Known("no clip", surrogate(d, a, mask, eps, pick=first), "the ratio is not clipped: the second term "
                "−clip(ρ)Â is missing.")  # fmt: skip
    yield Known("only the clip", surrogate(d, a, mask, eps, pick=second), "only the clipped term is there. Then a "
                "token far out on the wrong side gets no gradient back: take the larger of both.")  # fmt: skip
    yield Known("default ε", surrogate(d, a, mask, PPOConfig().clip_eps), "ε is the default one, written into the "
                "code: read config.clip_eps.")  # fmt: skip
    for name, average, hint in MEANS:
        yield Known(name, surrogate(d, a, mask, eps, average=average), hint)
    yield Known("positions not shifted", surrogate(late, a, mask, eps), "the log-probabilities are read one position "
                "late: the logits at position t belong to token t + 1. rollout.policy_outputs shifts.")  # fmt: skip
    yield Known("temperature ignored", surrogate(x["undivided"] - batch.log_probs, a, mask, eps), "the logits are not "
                "divided by config.temperature, at which the tokens were sampled.")  # fmt: skip
    yield Known("temperature twice", surrogate(x["divided_twice"] - batch.log_probs, a, mask, eps), "the logits are "
                "divided by the temperature twice: rollout.policy_outputs has done so already.")  # fmt: skip
    yield Known("old replaced by new", surrogate(0 * d, a, mask, eps), "the ratio is 1 everywhere: the old "
                "log-probabilities were computed anew from the policy. They are a fact of the batch, "
                "batch.log_probs.")  # fmt: skip
    yield Known("old replaced by reference", surrogate(x["log_probs"] - batch.ref_log_probs, a, mask, eps), "the "
                "ratio is to the reference. It is to the policy that sampled: batch.log_probs.")  # fmt: skip
    yield Known("ratio upside down", surrogate(-d, a, mask, eps), "the ratio is upside down: it is new over old.")
    yield Known("ratio of the whole text", surrogate(torch.where(mask, d, 0).sum(dim=1, keepdim=True).expand_as(d), a,
                mask, eps), "the log ratio is summed over the text. PPO's ratio is each token's own.")  # fmt: skip
    yield Known("whitened again", surrogate(d, masked_whiten(a, mask), mask, eps), "the advantages are whitened again, "
                "over this minibatch. That is done once, over the whole batch.")  # fmt: skip
    yield Known("returns for Â", surrogate(d, batch.returns, mask, eps), "the returns stand where the advantages "
                "belong.")  # fmt: skip


def critic_loss(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, eps: float, *, pick: Callable = torch.max,
    average: Callable = masked_mean,
) -> Tensor:  # fmt: skip
    """The clipped loss of the critic (Eq. 7.3), with its larger term unless another is to be picked."""
    clipped = old + (values - old).clamp(-eps, eps)
    return 0.5 * average(pick((values - returns).square(), (clipped - returns).square()), mask)


def wrong_value_losses(batch: RolloutBatch, x: Mapping[str, Tensor], config: PPOConfig) -> Iterator[Known]:
    mask, v, old, target = batch.response_mask, x["values"], batch.values, batch.returns
    of = functools.partial(critic_loss, mask=mask, eps=config.value_clip_eps)
    yield Known("no value clip", of(v, old, target, pick=first), "the value clip is missing: the larger of two squared "
                "errors, the second with V held within value_clip_eps of its old value, batch.values.")  # fmt: skip
    yield Known("no ½", 2 * of(v, old, target), "the ½ before the mean is missing, so that the critic learns twice as "
                "hard as vf_coef says.")  # fmt: skip
    yield Known("neither ½ nor clip", 2 * of(v, old, target, pick=first), "both the ½ and the value clip are missing.")
    yield Known("min for max", of(v, old, target, pick=torch.min), "min where max belongs: pessimistic is the larger "
                "error.")  # fmt: skip
    yield Known("only the clip", of(v, old, target, pick=second), "only the clipped error is there: a critic that has "
                "left the range gets no gradient. Take the larger of both.")  # fmt: skip
    for eps in {config.clip_eps, PPOConfig().value_clip_eps}:
        yield Known("another ε", critic_loss(v, old, target, mask, eps), "the critic has a clip range of its own: read "
                    "config.value_clip_eps.")  # fmt: skip
    for name, average, hint in (*MEANS, ("padding as it stands", everywhere, MEANS[0][-1])):
        yield Known(name, of(v, old, target, average=average), hint)
    yield Known("positions not shifted", of(x["late_values"], old, target), "the values are read one position late: "
                "V_t is of the state before token t. rollout.policy_outputs shifts.")  # fmt: skip
    yield Known("target is Â + V", of(v, old, batch.advantages + old), "the target is whitened Â + V. It is "
                "batch.returns, in the units of the reward.")  # fmt: skip
    yield Known("target is Â", of(v, old, batch.advantages), "the critic is to learn the returns, not the advantages.")


def wrong_wholes(
    right: Mapping[str, Tensor], batch: RolloutBatch, x: Mapping[str, Tensor], config: PPOConfig
) -> Iterator[Known]:
    p, v, h = (right[name] for name in ("policy_loss", "value_loss", "entropy"))
    c_v, c_h = config.vf_coef, config.ent_coef
    yield Known("entropy added", p + c_v * v + c_h * h, "the entropy is added to the loss, so it is driven out. A "
                "bonus enters what is minimised with a minus.")  # fmt: skip
    yield Known("no entropy", p + c_v * v, "the entropy bonus is missing: − config.ent_coef · H.")
    yield Known("entropy whole", p + c_v * v - h, "the entropy is to be multiplied by config.ent_coef.")
    yield Known("no c_v", p + v - c_h * h, "the critic's loss is to be multiplied by config.vf_coef.")
    yield Known("default c_v", p + PPOConfig().vf_coef * v - c_h * h, "c_v is the default one, written into the code: "
                "read config.vf_coef.")  # fmt: skip
    yield Known("½ twice", p + c_v * v / 2 - c_h * h, "the critic's ½ is applied twice.")
    yield Known("critic maximised", p - c_v * v - c_h * h, "the critic's error is subtracted: it would be made larger.")
    for name, average, _ in (*MEANS, ("padding as it stands", everywhere, "")):
        hint = "a sum or a mean was taken in each row first: the mean entropy runs over all real tokens together."
        if average in (over_all, everywhere):
            hint = "padding is counted in the mean entropy: sum over the real tokens alone, and divide by their number."
        yield Known(f"entropy: {name}", p + c_v * v - c_h * average(x["entropy"], batch.response_mask), hint)
    surprise = masked_mean(-x["log_probs"], batch.response_mask)
    yield Known("entropy of the sampled tokens", p + c_v * v - c_h * surprise, "in the entropy's place stands −log π "
                "of the sampled tokens. H sums −π log π over the vocabulary (policy_gradient.entropy).")  # fmt: skip


def my_losses(function: Callable) -> None:
    """Lesson 10: (policy, batch, config) -> policy_loss, value_loss, loss of a minibatch, as `PPOTrainer.losses` does.

    Prints "not attempted yet" or "correct", or raises AssertionError with a hint about the first stage that differs:
    the policy's loss, the critic's, the whole, its gradient.
    """
    b = bench()
    some, names = b.batch.rows(torch.arange(8)), ("policy_loss", "value_loss", "loss")
    batch, policy = copy.deepcopy(some), copy.deepcopy(b.moved)
    answers = answers_of("my_losses", function, names, policy, batch, CONFIG)
    if answers is None:
        return
    refuse_changes(batch, some)
    right, gradient = package_losses(b, batch)
    with torch.no_grad():
        x = spelled_out(b.moved, batch, CONFIG)
    tables = {
        "policy_loss": tuple(wrong_policy_losses(batch, x, CONFIG)),
        "value_loss": tuple(wrong_value_losses(batch, x, CONFIG)),
        "loss": tuple(wrong_wholes(right, batch, x, CONFIG)),
    }
    refuse_another_order(answers, {name: right[name] for name in names})
    for stage in names:
        compare(stage, answers[stage], right[stage], tables[stage])
    compare_gradients(answers["loss"], policy, gradient)
    report("my_losses", CORRECT)


def package_losses(b: Bench, batch: RolloutBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `PPOTrainer.losses` says of the moved policy, and the gradient of each of its three parts, weighted."""
    trainer = copy.copy(b.trainer)
    trainer.model = trainer.policy = b.moved
    _, parts = trainer.losses(batch)
    return parts, {name: flat_gradient(term, b.moved) for name, term in terms_of(b.moved, batch, CONFIG).items()}


def terms_of(policy: nn.Module, batch: RolloutBatch, config: PPOConfig) -> dict[str, Tensor]:
    """What the whole loss is the sum of: its three parts, weighted."""
    x, mask = spelled_out(policy, batch, config), batch.response_mask
    return {
        "policy": surrogate(x["log_probs"] - batch.log_probs, batch.advantages, mask, config.clip_eps),
        "critic": config.vf_coef * critic_loss(x["values"], batch.values, batch.returns, mask, config.value_clip_eps),
        "entropy": -config.ent_coef * masked_mean(x["entropy"], mask),
    }


def flat_gradient(loss: Tensor, policy: nn.Module) -> Tensor:
    """The gradient by all of a policy's parameters, in one row."""
    parameters = tuple(policy.parameters())
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return nn.utils.parameters_to_vector(grads)


def compare_gradients(loss: Tensor, policy: nn.Module, right: Mapping[str, Tensor]) -> None:
    """Raise a hint unless the gradient of the loss is that of its three parts."""
    if not loss.requires_grad:
        raise Hint("loss: the number is right, but no gradient comes back from it. Look for .detach(), .item(), "
                   "torch.no_grad() or torch.tensor(...).")  # fmt: skip
    try:
        got = flat_gradient(loss, policy)
    except RuntimeError as error:
        raise Hint("loss: its graph is gone, as after .backward(). Only compute the loss here: the step "
                   "differentiates it.") from error  # fmt: skip
    if close(got, sum(right.values())):
        return
    for name, missing in right.items():
        if close(got, sum(right.values()) - missing):
            raise Hint(f"gradient: the numbers are right, but nothing flows back through the part of the {name}: "
                       "it is detached, or computed under torch.no_grad().")  # fmt: skip
    raise Hint("gradient: the three losses are right, but their gradient is not the trainer's. Something is detached "
               "that learns, or something recorded at sampling time is computed anew.")  # fmt: skip


# ---- a step: the gradients that reach the optimiser, one after the other --------------------


class Watched(torch.optim.SGD):
    """Plain gradient descent that keeps what it was given: unlike Adam's, its steps show how large a gradient was."""

    def __init__(self, policy: nn.Module) -> None:
        self.gradients: list[Tensor] = []
        super().__init__(policy.parameters(), lr=CONFIG.learning_rate)

    def step(self, closure: Callable | None = None) -> None:
        of = (p.grad if p.grad is not None else torch.zeros_like(p) for p in self.param_groups[0]["params"])
        self.gradients.append(nn.utils.parameters_to_vector(of).detach())
        super().step(closure)


@dataclass(frozen=True)
class Trace:
    """What an iteration did: the gradients that reached the optimiser, and the parameters at the end."""

    gradients: tuple[Tensor, ...]
    parameters: Tensor

    def equals(self, other: "Trace") -> bool:
        """Step by step the same."""
        same = len(self.gradients) == len(other.gradients) and self.first_difference(other) is None
        return same and close(self.parameters, other.parameters)

    def first_difference(self, other: "Trace") -> int | None:
        """The first step whose gradients are not the same."""
        pairs = enumerate(zip(self.gradients, other.gradients, strict=False))
        return next((i for i, (a, b) in pairs if not float((a - b).norm()) <= 1e-2 * float(b.norm())), None)


def traced(step: Callable, config: PPOConfig) -> tuple[Trace, object]:
    """What a step does to a copy of the policy that sampled, and what it returns."""
    b = bench()
    policy, facts = copy.deepcopy(b.trainer.policy), copy.deepcopy(b.facts)
    optimizer, generator = Watched(policy), torch.Generator().manual_seed(1)
    returned = step(policy, optimizer, facts, config, generator)
    refuse_changes(facts, b.facts)
    return Trace(tuple(optimizer.gradients), nn.utils.parameters_to_vector(policy.parameters()).detach()), returned


def trainer_step(
    policy: CausalLMWithValueHead, optimizer: torch.optim.Optimizer, facts: Rollout, config: PPOConfig,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """One iteration by the package's trainer."""
    trainer = make_trainer(policy, config, optimizer=optimizer)
    trainer.generator = generator
    trainer.update(trainer.credit(facts))


def faulty_step(
    policy: CausalLMWithValueHead, optimizer: torch.optim.Optimizer, facts: Rollout, config: PPOConfig,
    generator: torch.Generator, *, fault: str = "",
) -> None:  # fmt: skip
    """One iteration as a learner would write it, with at most one fault."""

    def credited() -> RolloutBatch:
        values = response_values(policy, facts, config)
        return ppo_credit(facts, values, config=config, kl_coef=config.kl_coef)

    batch = credited()
    if fault == "swapped":
        batch = replace(batch, advantages=batch.returns, returns=batch.advantages)
    size = config.batch_size if fault == "whole batch" else config.minibatch_size
    for epoch in range(1 if fault == "one epoch" else config.ppo_epochs):
        if fault == "credit anew" and epoch > 0:
            batch = credited()
        shuffle = torch.Generator().manual_seed(1) if fault == "one order" else generator
        for part in batch.minibatches(size, None if fault == "no shuffle" else shuffle):
            if fault == "whitened again":
                part = replace(part, advantages=masked_whiten(part.advantages, part.response_mask))
            if fault == "old log-probs anew":
                with torch.no_grad():
                    part = replace(part, log_probs=spelled_out(policy, part, config)["log_probs"])
            if fault != "no zero_grad":
                optimizer.zero_grad()
            terms = terms_of(policy, part, config)
            loss = terms[fault.split()[0]] if fault in ("policy alone", "critic alone") else sum(terms.values())
            (-loss if fault == "uphill" else loss).backward()
            if fault == "clip by value":
                nn.utils.clip_grad_value_(policy.parameters(), config.max_grad_norm)
            elif fault == "default norm":
                nn.utils.clip_grad_norm_(policy.parameters(), PPOConfig().max_grad_norm)
            elif fault != "no gradient clip":
                nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            if fault != "step left out":
                optimizer.step()
        if fault == "step an epoch":
            optimizer.step()


STEP_FAULTS = {
    "uphill": "the step goes uphill: the gradient has the opposite sign. The loss is minimised, so call "
    "loss.backward() as it is.",
    "no gradient clip": "the gradient reaches the optimiser unclipped. nn.utils.clip_grad_norm_ stands between "
    "backward() and step(), with config.max_grad_norm.",
    "clip by value": "each entry of the gradient is clipped by itself, which turns its direction. clip_grad_norm_ "
    "scales the whole.",
    "default norm": "the gradient is clipped at the default norm, written into the code: read config.max_grad_norm.",
    "no zero_grad": "gradients pile up from one minibatch to the next: optimizer.zero_grad() is missing.",
    "one epoch": "each response is used once. config.ppo_epochs passes are wanted over the batch.",
    "whole batch": "each step takes the whole batch: split it into minibatches of config.minibatch_size.",
    "no shuffle": "the minibatches are the rows as they stand. Each epoch shuffles anew: "
    "batch.minibatches(config.minibatch_size, generator).",
    "one order": "every epoch has the same minibatches: the generator is seeded anew, or the shuffle made once. Pass "
    "the generator that you were given each time.",
    "credit anew": "the credit is computed anew in each epoch, with a critic that has moved. Values, advantages and "
    "returns are computed once, before the first step.",
    "old log-probs anew": "the old log-probabilities are computed anew for each minibatch, so the ratio is always 1 "
    "and nothing is ever clipped. They stay those of the facts, facts.log_probs.",
    "whitened again": "the advantages are whitened again in each minibatch. That is done once, over the whole batch.",
    "policy alone": "only the policy's loss is differentiated, so the critic learns nothing. The whole loss is the "
    "third that my_losses returns.",
    "critic alone": "only the critic's loss is differentiated, so nobody asks the policy to earn more. The whole loss "
    "is the third that my_losses returns.",
    "swapped": "advantages and returns have changed places. my_credit returns rewards, advantages, returns, in this "
    "order.",
    "step left out": "nothing has moved: optimizer.step() was never called.",
}


@functools.cache
def right_trace(config: PPOConfig) -> Trace:
    """What the package's trainer does."""
    with torch.random.fork_rng(devices=[]):
        return traced(trainer_step, config)[0]


@functools.cache
def faulty_trace(fault: str, config: PPOConfig) -> Trace:
    """What an iteration with this fault does."""
    return traced(functools.partial(faulty_step, fault=fault), config)[0]


ONE_STEP = replace(CONFIG, ppo_epochs=1, minibatch_size=CONFIG.batch_size)  # in which no order of rows can matter


def my_step(function: Callable) -> None:
    """Lesson 10: (policy, optimizer, facts, config, generator): one iteration of PPO, as `PPOTrainer` does it.

    It changes the policy, and returns nothing. First an iteration of a single step is compared, then a whole one: the
    gradient of each step as it reaches the optimiser, the parameters at the end. Prints "not attempted yet" or
    "correct", or raises AssertionError with a hint about the first stage that differs.
    """
    for config, what in ((ONE_STEP, "an iteration of one step"), (CONFIG, "a whole iteration")):
        trace, returned = traced(lambda *given: called("my_step", function, *given), config)
        if returned is NotImplemented:
            report("my_step", NOT_ATTEMPTED)
            return
        right = right_trace(config)
        if not trace.equals(right):
            raise Hint(f"In {what}, {step_hint(trace, right, config)}")
    report("my_step", CORRECT)


def step_hint(trace: Trace, right: Trace, config: PPOConfig) -> str:
    """What to say of an iteration that is not the trainer's."""
    for fault, hint in STEP_FAULTS.items():
        if trace.equals(faulty_trace(fault, config)):
            return hint
    taken, wanted = len(trace.gradients), len(right.gradients)
    at = trace.first_difference(right)
    if at == 0 and config.minibatch_size == config.batch_size:
        return (
            f"the gradient already differs: {apart(trace.gradients[0], right.gradients[0], config.max_grad_norm)} If "
            "my_credit and my_losses are correct, look at what the step hands to them: values before the first step, "
            "config as it came, the whole loss."
        )
    if taken != wanted:
        return f"the optimiser made {taken} steps; {wanted} are wanted, epochs times minibatches."
    if at == 0:
        return (
            "the first minibatch holds other rows than the trainer's. Draw them with "
            "batch.minibatches(config.minibatch_size, generator), and draw nothing else from the generator."
        )
    if at is not None:
        return (
            f"the gradient of step {at + 1} is the first that differs. What may change between two steps is the "
            "policy alone: facts, values, advantages and returns stay as they were."
        )
    return "the gradients are right, but the parameters at the end are not: does anything else write to them?"


def apart(gradient: Tensor, right: Tensor, max_norm: float) -> str:
    """In words, how a gradient differs from the right one, whose norm is `max_norm`, as it was scaled down to it."""
    if not gradient.isfinite().all():
        return "there is NaN or infinity in it."
    norm = float(gradient.norm())
    if norm == 0:
        return "it is 0 everywhere, as if nothing had been differentiated."
    if norm > 1.01 * max_norm:
        return (
            f"its norm is {norm:.2f}, more than config.max_grad_norm = {max_norm:g}. clip_grad_norm_ is to see all of "
            "policy.parameters() at once, after backward()."
        )
    chord = (gradient.double() / gradient.double().norm() - right.double() / right.double().norm()).norm()
    angle = f"{math.degrees(2 * math.asin(min(float(chord) / 2, 1))):.1f} degrees"
    if norm > 0.99 * max_norm:
        return (
            f"it points in another direction, {angle} off the trainer's. (Lengths tell nothing here: both were scaled "
            "down to config.max_grad_norm.)"
        )
    return f"its norm is {norm:.2f} where {max_norm:g} is wanted, and its direction is {angle} off the trainer's."
