"""Lesson 10's exercise: a solution that a learner could write passes, and each mistake planted in it gets its name."""

import functools
import json
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf_lessons import checks, models, ppo, rollout, tiny_reviews, trainer
from rlhf_lessons.checks import capstone

# What a learner could write from the lesson's text alone: nothing of the trainer, nothing of its losses.
SOLUTION = """
def my_credit(facts, values, config):
    mask, B = facts.response_mask, len(facts.scores)
    rewards = -config.kl_coef * (facts.log_probs - facts.ref_log_probs)
    last = mask.sum(1) - 1
    rewards[torch.arange(B), last] += facts.scores
    rewards = torch.where(mask, rewards, 0)
    values = torch.where(mask, values, 0)
    advantages, ahead, next_value = torch.zeros_like(values), torch.zeros(B), torch.zeros(B)
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + config.gamma * next_value - values[:, t]
        ahead = torch.where(mask[:, t], delta + config.gamma * config.gae_lambda * ahead, 0)
        advantages[:, t], next_value = ahead, values[:, t]
    returns = advantages + values
    real = advantages[mask]
    advantages = torch.where(mask, (advantages - real.mean()) / real.std(correction=0), 0)
    return rewards, advantages, returns

def my_losses(policy, batch, config):
    mask, T = batch.response_mask, batch.response_mask.shape[1]
    logits, values = policy(batch.tokens, batch.attention_mask)
    logits, values = logits[:, -T - 1 : -1], values[:, -T - 1 : -1]
    log_p = (logits / config.temperature).log_softmax(-1)
    taken = batch.tokens[:, -T:, None]
    log_probs = log_p.gather(-1, taken).squeeze(-1)
    ratio = torch.exp(torch.where(mask, log_probs - batch.log_probs, 0))
    clipped = ratio.clamp(1 - config.clip_eps, 1 + config.clip_eps)
    policy_loss = torch.max(-ratio * batch.advantages, -clipped * batch.advantages)[mask].mean()
    near = batch.values + (values - batch.values).clamp(-config.value_clip_eps, config.value_clip_eps)
    errors = torch.max((values - batch.returns) ** 2, (near - batch.returns) ** 2)
    value_loss = 0.5 * errors[mask].mean()
    entropy = -(log_p.exp() * log_p).sum(-1)[mask].mean()
    loss = policy_loss + config.vf_coef * value_loss - config.ent_coef * entropy
    return policy_loss, value_loss, loss

def my_step(policy, optimizer, facts, config, generator):
    values = rollout.response_values(policy, facts, config)
    rewards, advantages, returns = my_credit(facts, values, config)
    batch = rollout.RolloutBatch(**vars(facts), values=values, rewards=rewards, advantages=advantages, returns=returns)
    for epoch in range(config.ppo_epochs):
        for part in batch.minibatches(config.minibatch_size, generator):
            loss = my_losses(policy, part, config)[-1]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            optimizer.step()
"""


@functools.cache
def written(*changes: tuple[str, str]) -> dict:
    """The solution with these lines changed, as functions by name."""
    source = SOLUTION
    for right, wrong in changes:
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    room = {"torch": torch, "nn": nn, "rollout": rollout}
    exec(source, room)
    return room


def hint_of(name: str, function: object) -> str:
    """The message with which a check refuses an answer."""
    with pytest.raises(AssertionError) as refusal:
        getattr(checks, name)(function)
    return str(refusal.value)


@pytest.mark.parametrize("name", ["my_credit", "my_losses", "my_step"])
def test_the_solution_is_right_and_a_stub_is_open(name, capsys):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    getattr(checks, name)(written()[name])
    getattr(checks, name)(lambda *given: NotImplemented)
    assert capsys.readouterr().out == "correct\nnot attempted yet\n"
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_packages_own_functions_are_right(capsys):
    def credit(facts, values, config):
        batch = rollout.ppo_credit(facts, values, config=config, kl_coef=config.kl_coef)
        return [batch.rewards, batch.advantages, batch.returns]  # a list is as good as a tuple

    checks.my_credit(credit)
    checks.my_step(capstone.trainer_step)
    checks.my_step(capstone.faulty_step)  # with no fault
    assert capsys.readouterr().out == 3 * "correct\n"


LAST = "rewards[torch.arange(B), last] += facts.scores"
DELTA = "delta = rewards[:, t] + config.gamma * next_value - values[:, t]"
CARRY = "config.gamma * config.gae_lambda * ahead"
WHITE = "torch.where(mask, (advantages - real.mean()) / real.std(correction=0), 0)"
CREDIT_MISTAKES = {
    "whatever `values` holds there": [("    values = torch.where(mask, values, 0)\n", "")],
    "the KL is added": [("-config.kl_coef * (", "config.kl_coef * (")],
    "only the score is there": [("-config.kl_coef * (", "0 * (")],
    "multiplied by config.kl_coef": [("-config.kl_coef * (", "-1 * (")],
    "read config.kl_coef": [("-config.kl_coef * (", "-0.1 * (")],
    "the score stands on every token": [(LAST, "rewards += facts.scores[:, None]")],
    "on the last column": [(LAST, "rewards[:, -1] += facts.scores")],
    "one step before": [("mask.sum(1) - 1", "mask.sum(1) - 2")],
    "one step after": [("mask.sum(1) - 1", "(mask.sum(1)).clamp(max=mask.shape[1] - 1)"),
                       (LAST, LAST + " * (mask.sum(1) < mask.shape[1])")],
    "whitened advantages were added": [("    returns = advantages + values\n", ""),
                                       ("return rewards", "returns = advantages + values\n    return rewards")],
    "in another order": [("return rewards, advantages, returns", "return rewards, returns, advantages")],
    "these are the advantages": [("returns = advantages + values", "returns = advantages")],
    "V is subtracted once more": [("returns = advantages + values", "returns = advantages - values")],
    "plain sum": [(CARRY, "config.gamma * ahead")],
    "Â is only δ": [(CARRY, "0 * ahead")],
    "γ is 1 everywhere": [(DELTA, DELTA.replace("config.gamma *", "1 *")), (CARRY, "config.gae_lambda * ahead")],
    "γ and λ are the default": [(DELTA, DELTA.replace("config.gamma *", "1 *")), (CARRY, "0.95 * ahead")],
    "λ is the default": [(CARRY, "config.gamma * 0.95 * ahead")],
    "swapped": [(DELTA, DELTA.replace("gamma", "gae_lambda"))],
    "wraps around": [(DELTA, "delta = rewards[:, t] + config.gamma * values.roll(-1, 1)[:, t] - values[:, t]")],
    "The text has ended": [(DELTA, "next_value = torch.where(mask.roll(-1, 1)[:, t] & (t + 1 < mask.shape[1]), "
                            "next_value, values[:, t])\n        " + DELTA)],
    "multiplied by λ alone": [(CARRY, "config.gae_lambda * ahead")],
    "δ lacks": [(DELTA, "delta = rewards[:, t] - values[:, t]")],
    "not whitened": [(WHITE, "advantages")],
    "padding was counted": [("real = advantages[mask]", "real = advantages")],
    "their mean is 0": [(WHITE, "torch.where(mask, advantages - real.mean(), 0)")],
    "mean was not subtracted": [(WHITE, "advantages / real.std(correction=0)")],
    "n − 1": [("real.std(correction=0)", "real.std()")],
    "its root is wanted": [("real.std(correction=0)", "real.var(correction=0)")],
    "the returns were whitened": [("real = advantages[mask]", "advantages, real = returns, returns[mask]")],
    "in place": [("rewards = torch.where(mask, rewards, 0)", "rewards = torch.where(mask, rewards, 0)\n"
                  "    facts.log_probs.mul_(2)")],
    "raised": [("last = mask.sum(1) - 1", "last = mask.sum(1) / 0 + missing")],
    "a tuple (rewards, advantages, returns)": [("return rewards, advantages, returns", "return rewards")],
    "No known mistake": [("-config.kl_coef * (", "-3.3 * config.kl_coef * (")],
}  # fmt: skip

LOSS = "loss = policy_loss + config.vf_coef * value_loss - config.ent_coef * entropy"
POLICY = "torch.max(-ratio * batch.advantages, -clipped * batch.advantages)[mask].mean()"
ERRORS = "errors = torch.max((values - batch.returns) ** 2, (near - batch.returns) ** 2)"
VALUE = "0.5 * errors[mask].mean()"
LOGITS = "logits, values = logits[:, -T - 1 : -1], values[:, -T - 1 : -1]"
RATIO = "torch.exp(torch.where(mask, log_probs - batch.log_probs, 0))"
PARTS = "torch.max(-ratio * batch.advantages, -clipped * batch.advantages)"
AGAIN = "a = torch.where(mask, batch.advantages - batch.advantages[mask].mean(), 0) / batch.advantages[mask].std("
LOSS_MISTAKES = {
    "in another order": [("return policy_loss, value_loss, loss", "return loss, policy_loss, value_loss")],
    "Â has the wrong sign": [(POLICY, "torch.max(ratio * batch.advantages, clipped * batch.advantages)[mask].mean()")],
    "what is to be maximised": [(POLICY, "-" + POLICY)],
    "policy_loss: min where max": [("torch.max(-ratio", "torch.min(-ratio")],
    "the ratio is not clipped": [(POLICY, "(-ratio * batch.advantages)[mask].mean()")],
    "only the clipped term": [(POLICY, "(-clipped * batch.advantages)[mask].mean()")],
    "read config.clip_eps": [("clamp(1 - config.clip_eps, 1 + config.clip_eps)", "clamp(0.8, 1.2)")],
    "policy_loss: padding is counted": [(POLICY, PARTS + ".mean()")],
    "policy_loss: a mean was taken in each row": [(POLICY, f"({PARTS}.sum(1) / mask.sum(1)).mean()")],
    "policy_loss: the tokens of a row are summed": [(POLICY, f"{PARTS}.sum(1).mean()")],
    "the log-probabilities are read one position late": [
        (LOGITS, "logits, values = logits[:, -T:], values[:, -T - 1 : -1]")],
    "the ratio is 1 everywhere": [(RATIO, "torch.exp(log_probs - log_probs.detach())")],
    "the ratio is to the reference": [(RATIO, RATIO.replace("batch.log_probs", "batch.ref_log_probs"))],
    "upside down": [(RATIO, RATIO.replace("log_probs - batch.log_probs", "batch.log_probs - log_probs"))],
    "summed over the text": [(RATIO, RATIO[:-1] + ".sum(1, keepdim=True).expand_as(log_probs))")],
    "whitened again, over this minibatch": [
        (POLICY, POLICY.replace("batch.advantages", "a")), ("clipped = ratio", AGAIN + "correction=0)\n    "
                                                            "clipped = ratio")],
    "the returns stand where": [(POLICY, POLICY.replace("batch.advantages", "batch.returns"))],
    "the value clip is missing": [(ERRORS, "errors = (values - batch.returns) ** 2")],
    "the ½ before the mean": [(VALUE, "errors[mask].mean()")],
    "both the ½ and the value clip": [(ERRORS, "errors = (values - batch.returns) ** 2"),
                                      (VALUE, "errors[mask].mean()")],
    "value_loss: min where max": [(ERRORS, ERRORS.replace("max", "min"))],
    "only the clipped error": [(ERRORS, "errors = (near - batch.returns) ** 2")],
    "a clip range of its own": [(".clamp(-config.value_clip_eps, config.value_clip_eps)",
                                 ".clamp(-config.clip_eps, config.clip_eps)")],
    "value_loss: padding is counted": [(VALUE, "0.5 * torch.where(mask, errors, 0).mean()")],
    "value_loss: a mean was taken in each row": [
        (VALUE, "0.5 * (torch.where(mask, errors, 0).sum(1) / mask.sum(1)).mean()")],
    "the values are read one position late": [(LOGITS, "logits, values = logits[:, -T - 1 : -1], values[:, -T:]")],
    "the target is whitened": [(ERRORS, ERRORS.replace("batch.returns", "(batch.advantages + batch.values)"))],
    "the critic is to learn the returns": [(ERRORS, ERRORS.replace("batch.returns", "batch.advantages"))],
    "the entropy is added": [(LOSS, LOSS.replace("- config.ent", "+ config.ent"))],
    "the entropy bonus is missing": [(LOSS, LOSS[: LOSS.index(" - config.ent")])],
    "to be multiplied by config.ent_coef": [(LOSS, LOSS.replace("config.ent_coef * ", ""))],
    "to be multiplied by config.vf_coef": [(LOSS, LOSS.replace("config.vf_coef * ", ""))],
    "read config.vf_coef": [(LOSS, LOSS.replace("config.vf_coef", "0.1"))],
    "applied twice": [(LOSS, LOSS.replace("value_loss", "value_loss / 2"))],
    "the critic's error is subtracted": [(LOSS, LOSS.replace("+ config.vf", "- config.vf"))],
    "padding is counted in the mean entropy": [
        ("(log_p.exp() * log_p).sum(-1)[mask].mean()", "((log_p.exp() * log_p).sum(-1) * mask).mean()")],
    "sum over the real tokens alone": [
        ("(log_p.exp() * log_p).sum(-1)[mask].mean()", "(log_p.exp() * log_p).sum(-1).mean()")],
    "runs over all real tokens together": [
        ("(log_p.exp() * log_p).sum(-1)[mask].mean()", "((log_p.exp() * log_p).sum(-1) * mask).sum(1).mean()")],
    "H sums −π log π over the vocabulary": [("-(log_p.exp() * log_p).sum(-1)[mask].mean()", "-log_probs[mask].mean()")],
    "not divided by config.temperature": [("(logits / config.temperature)", "logits")],
    "by the temperature twice": [("(logits / config.temperature)", "(logits / config.temperature**2)")],
    "value_loss: padding is counted in the mean": [(VALUE, "0.5 * errors.mean()")],
    "no gradient comes back": [("return policy_loss", "loss = loss.detach()\n    return policy_loss")],
    "part of the critic": [(LOSS, LOSS.replace("value_loss", "value_loss.detach()"))],
    "part of the policy": [(LOSS, LOSS.replace("policy_loss", "policy_loss.detach()"))],
    "part of the entropy": [(LOSS, LOSS.replace("* entropy", "* entropy.detach()"))],
    "Only compute the loss here": [("return policy_loss", "loss.backward()\n    return policy_loss")],
}  # fmt: skip

CLIP = "nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)"
LOOP = "for part in batch.minibatches(config.minibatch_size, generator):"
AT_LOSS = "loss = my_losses(policy, part, config)[-1]"
NEW_LOG_PROBS = (
    "import dataclasses\n            with torch.no_grad():\n"
    "                logits, _ = rollout.policy_outputs(policy, part.tokens, part.attention_mask, "
    "length=part.responses.shape[1], temperature=config.temperature)\n"
    "                new = logits.log_softmax(-1).gather(-1, part.responses[..., None]).squeeze(-1)\n"
    "            part = dataclasses.replace(part, log_probs=new)\n            " + AT_LOSS
)
STEP_MISTAKES = {
    "goes uphill": [("loss.backward()", "(-loss).backward()")],
    "reaches the optimiser unclipped": [("            " + CLIP + "\n", "")],
    "clipped by itself": [(CLIP, CLIP.replace("norm_(", "value_("))],
    "at the default norm": [(CLIP, CLIP.replace("config.max_grad_norm", "1.0"))],
    "zero_grad() is missing": [("            optimizer.zero_grad()\n", "")],
    "used once": [("range(config.ppo_epochs)", "range(1)")],
    "takes the whole batch": [(LOOP, LOOP.replace("config.minibatch_size", "len(facts)"))],
    "the rows as they stand": [(LOOP, LOOP.replace(", generator", ""))],
    "every epoch has the same": [(LOOP, LOOP.replace("generator", "torch.Generator().manual_seed(1)"))],
    "computed anew in each epoch": [
        ("    values = rollout.response_values", "    for epoch in range(config.ppo_epochs):\n"
         "     values = rollout.response_values"),
        ("    rewards, advantages, returns = my_credit", "     rewards, advantages, returns = my_credit"),
        ("    batch = rollout.RolloutBatch", "     batch = rollout.RolloutBatch"),
        ("    for epoch in range(config.ppo_epochs):\n        for", "     if True:\n        for")],
    "the ratio is always 1": [(AT_LOSS, NEW_LOG_PROBS)],
    "never called": [("            optimizer.step()\n", "")],
    "8 are wanted": [("            optimizer.step()\n", "            if len(part) and epoch == 0: optimizer.step()\n"
                      "            elif torch.rand(1) < 2: nn.Identity()\n"
                      "        if epoch == 1: optimizer.step()\n")],
    "other rows": [(LOOP, LOOP.replace("generator", "torch.Generator().manual_seed(99)"))],
    "only the policy's loss": [(AT_LOSS, "loss = my_losses(policy, part, config)[0]")],
    "only the critic's loss": [(AT_LOSS, "loss = my_losses(policy, part, config)[1]")],
    "have changed places": [("rewards, advantages, returns = my_credit", "rewards, returns, advantages = my_credit")],
    "it points in another direction": [("my_credit(facts, values, config)\n    batch",
                                        "my_credit(facts, 0 * values, config)\n    batch")],
    "clip_grad_norm_ is to see all": [(CLIP, CLIP.replace("policy.parameters()", "policy.value_head.parameters()"))],
    "its norm is 0.20 where 0.4": [(CLIP, CLIP.replace("config.max_grad_norm", "config.max_grad_norm / 2"))],
    "it is 0 everywhere": [("            loss.backward()\n", "")],
    "NaN or infinity": [("loss.backward()", "(loss * float('nan')).backward()")],
    "not written yet": [(AT_LOSS, "loss = NotImplemented[-1]")],
    "does anything else write": [("    for epoch in range(config.ppo_epochs):\n        for part",
                                  "    for epoch in range(config.ppo_epochs + 1):\n"
                                  "        if epoch == config.ppo_epochs:\n"
                                  "            with torch.no_grad(): [p.add_(1) for p in policy.parameters()]\n"
                                  "            return\n        for part")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "hint", "changes"),
    [
        (name, hint, tuple(changes))
        for name, table in (("my_credit", CREDIT_MISTAKES), ("my_losses", LOSS_MISTAKES), ("my_step", STEP_MISTAKES))
        for hint, changes in table.items()
    ],
)
def test_each_planted_mistake_gets_its_hint(name, hint, changes):
    assert hint in hint_of(name, written(*changes)[name])


def test_every_known_mistake_is_told_from_the_others_and_from_the_truth():
    b = capstone.bench()
    batch = b.batch.rows(torch.arange(8))
    with torch.no_grad():
        x = capstone.spelled_out(b.moved, batch, capstone.CONFIG)
    right, _ = capstone.package_losses(b, batch)
    tables = [(tuple(wrong(b)), getattr(b.batch, stage)) for stage, wrong in capstone.CREDIT.items()]
    tables += [
        (tuple(capstone.wrong_policy_losses(batch, x, capstone.CONFIG)), right["policy_loss"]),
        (tuple(capstone.wrong_value_losses(batch, x, capstone.CONFIG)), right["value_loss"]),
        (tuple(capstone.wrong_wholes(right, batch, x, capstone.CONFIG)), right["loss"]),
    ]
    for known, truth in tables:
        for i, mistake in enumerate(known):
            assert not capstone.close(mistake.value, truth), mistake.name
            assert not any(capstone.close(mistake.value, other.value) for other in known[:i]), mistake.name


def test_every_faulty_step_is_told_from_the_others():
    traces = [capstone.right_trace(capstone.CONFIG)]
    for fault in capstone.STEP_FAULTS:
        trace = capstone.faulty_trace(fault, capstone.CONFIG)
        assert not any(trace.equals(other) for other in traces), fault
        traces.append(trace)


def test_the_packages_losses_are_what_the_solution_computes():
    b = capstone.bench()
    batch = b.batch.rows(torch.arange(8))
    right, _ = capstone.package_losses(b, batch)
    mine = written()["my_losses"](b.moved, batch, capstone.CONFIG)
    torch.testing.assert_close(mine[0], right["policy_loss"], rtol=1e-4, atol=1e-6)
    moved, _ = rollout.policy_outputs(
        b.moved, batch.tokens, batch.attention_mask, length=batch.responses.shape[1], temperature=1.0
    )
    log_probs = moved.log_softmax(-1).gather(-1, batch.responses[..., None]).squeeze(-1)
    ratio = (log_probs - batch.log_probs).exp()
    clipped = ppo.clip_fraction(ratio, batch.response_mask, clip_eps=capstone.CONFIG.clip_eps,
                                advantages=batch.advantages)  # fmt: skip
    assert clipped > 0.05  # else no clip could be missed


# ---- the bar ------------------------------------------------------------------------------------


def trained_by(step, seed):
    """The loop of the lesson."""
    config = trainer.PPOConfig(num_iterations=20, kl_coef=0.2, seed=seed, device="cpu")
    base = models.ASSETS / "base"
    with torch.random.fork_rng(devices=[]):
        policy = models.CausalLMWithValueHead.from_pretrained(base)
    run = trainer.PPOTrainer(
        config, policy, models.load_causal_lm(base), models.load_reward_model(models.ASSETS / "reward_model"),
        tiny_reviews.prompts(500, torch.Generator().manual_seed(10)), models.load_tokenizer(base),
    )  # fmt: skip
    optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5)
    history = []
    for done in range(config.num_iterations):
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - done / config.num_iterations)
        facts = run.collect()
        step(policy, optimizer, facts, config, run.generator)
        gold = tiny_reviews.gold_reward(*run.texts(facts)).mean()
        kl = (facts.log_probs - facts.ref_log_probs).sum(1).mean()
        history.append({"score": float(facts.scores.mean()), "gold": float(gold), "kl": float(kl)})
    return history


def test_the_bar_is_reached_in_one_seed(capsys):
    checks.aligned_by_you([trained_by(written()["my_step"], 0)] * 3)
    assert capsys.readouterr().out == "correct\n"


@pytest.mark.slow
def test_the_bar_is_reached_in_three_seeds(capsys):
    checks.aligned_by_you([trained_by(written()["my_step"], seed) for seed in range(3)])
    assert capsys.readouterr().out == "correct\n"


# ---- the recorded ablation, as the lesson reads it ----------------------------------------------


def test_what_the_lesson_says_of_the_ablation_is_what_was_recorded():
    figures = Path(__file__).parents[1] / "figures"
    wanted = runpy.run_path(str(figures / "record.py"))
    ended = json.loads((figures / "ablation" / "ablation.json").read_text(encoding="utf-8"))
    assert list(ended) == list(wanted["ABLATION"])
    assert all(len(seeds) == len(wanted["SEEDS"]) for seeds in ended.values())
    gold, kl = ({label: [seed[name] for seed in seeds] for label, seeds in ended.items()} for name in ("gold", "kl"))
    assert max(gold["no KL in the reward"]) < 0.9 and min(kl["no KL in the reward"]) > 17
    assert min(gold["constant learning rate"] + gold["no price of a missing EOS"]) > 1.5
    assert sorted(gold["neither of the two"])[0] < 0.64 and sorted(gold["neither of the two"])[1] > 1.5
    assert max(gold["1 epoch"]) < min(gold["default settings"])
    page = (figures / "README.md").read_text(encoding="utf-8").replace("−", "-")
    for label in ended:
        low_high = [f"{min(x):.{digits}f} to {max(x):.{digits}f}" for x, digits in ((gold[label], 2), (kl[label], 1))]
        assert f"| {label} | {' | '.join(low_high)} |" in page
