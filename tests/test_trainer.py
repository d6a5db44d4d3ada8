"""PPO's one step: what it learns from, by how much it moves, when it stops, and who must not move at all."""

import copy
import hashlib
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rlhf_lessons import fitting
from rlhf_lessons.checkpoint import load_state, save_state
from rlhf_lessons.config import GRPOConfig, TrainerConfig
from rlhf_lessons.data import encode_prompt, encode_response
from rlhf_lessons.device import autocast
from rlhf_lessons.generation import sample_responses
from rlhf_lessons.models import RewardModel
from rlhf_lessons.scoring import Scorer, as_scorer
from rlhf_lessons.trainer import PPOConfig, PPOTrainer, fit_language_model, fit_reward_model

PAD, BOS, EOS = 0, 1, 2
LENGTHS = [1, 6, 3, 5, 2, 6, 4, 1, 6, 2, 5, 3]


def parameter_hash(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def watch_steps(trainer):
    """What each optimiser step found: its gradients, parameters before it, and the learning rate."""
    seen = []
    original = trainer.optimizer.step

    def step():
        seen.append(
            dict(
                gradients=[
                    torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainer.policy.parameters()
                ],
                parameters=copies(trainer.policy),
                lr=trainer.optimizer.param_groups[0]["lr"],
            )
        )
        original()

    trainer.optimizer.step = step
    return seen


def gradients_of(trainer, batch):
    """∇ of the loss of these rows, with the parameters as they are."""
    loss, _ = trainer.losses(batch)
    parameters = list(trainer.policy.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_all_close(left, right, **tolerance):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


# --- The loss -------------------------------------------------------------------------------------


def slow_losses(trainer, batch, config):
    """Every part of the loss in Python's floats, a token at a time, from the unpadded texts."""
    total = dict(policy_loss=0.0, value_loss=0.0, entropy=0.0, approx_kl=0.0, clip_fraction=0.0, ratio_error=0.0)
    count = int(batch.response_mask.sum())
    for row, length in enumerate(batch.response_mask.sum(1).tolist()):
        ids = batch.tokens[row][batch.attention_mask[row]][None]
        with torch.no_grad():
            logits, values = trainer.policy(ids, torch.ones_like(ids))
        for t in range(length):
            place = ids.shape[1] - length + t
            logp = F.log_softmax(logits[0, place - 1].double() / config.temperature, dim=-1)
            old, advantage = batch.log_probs[row, t].item(), batch.advantages[row, t].item()
            ratio = math.exp(logp[ids[0, place]].item() - old)
            clipped = min(max(ratio, 1 - config.clip_eps), 1 + config.clip_eps)
            v, old_v, target = values[0, place - 1].item(), batch.values[row, t].item(), batch.returns[row, t].item()
            near = old_v + min(max(v - old_v, -config.value_clip_eps), config.value_clip_eps)
            total["policy_loss"] -= min(ratio * advantage, clipped * advantage)
            total["value_loss"] += 0.5 * max((v - target) ** 2, (near - target) ** 2)
            total["entropy"] -= sum(p * math.log(p) for p in logp.exp().tolist())
            total["approx_kl"] += ratio - 1 - math.log(ratio)
            total["clip_fraction"] += clipped * advantage < ratio * advantage
            total["ratio_error"] += abs(ratio - 1)
    return {name: value / count for name, value in total.items()}


@pytest.mark.detail(18)
@pytest.mark.detail(19)
@pytest.mark.detail(31)
@pytest.mark.detail(33)
@pytest.mark.parametrize(("ent_coef", "temperature"), [(0.0, 1.0), (0.03, 0.7)])
def test_loss_and_its_parts_equal_a_token_by_token_count(ent_coef, temperature, make_trainer, make_policy, make_batch):
    """Means over real tokens of rows of different lengths, ratios and values both inside and outside the clip."""
    settings = dict(vf_coef=0.3, ent_coef=ent_coef, temperature=temperature, clip_eps=0.15, value_clip_eps=0.4)
    trainer, batch = make_trainer(make_policy(head=0.3), **settings), make_batch(LENGTHS)
    loss, parts = trainer.losses(batch)
    expected = slow_losses(trainer, batch, trainer.config)
    assert 0.05 < expected["clip_fraction"] < 0.95
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name
    whole = expected["policy_loss"] + 0.3 * expected["value_loss"] - ent_coef * expected["entropy"]
    assert loss.item() == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_gradient_of_the_loss_is_that_of_finite_differences(critic, make_trainer, make_policy, make_lm, make_batch):
    """In float64, along each parameter's own gradient: nothing that should learn is detached, the critic included."""
    policy = make_policy(critic=critic, head=0.3).double()
    trainer = make_trainer(policy, make_lm(seed=1).double(), ent_coef=0.05, vf_coef=0.7)
    batch = make_batch(LENGTHS)
    batch = replace(
        batch, **{name: getattr(batch, name).double() for name in ("log_probs", "advantages", "values", "returns")}
    )
    silent = []
    for (name, p), gradient in zip(policy.named_parameters(), gradients_of(trainer, batch), strict=True):
        if gradient.norm() < 1e-12:
            silent.append(name)
            continue
        direction = gradient / gradient.norm()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * 1e-6)
                losses.append(trainer.losses(batch)[0].item())
                p.sub_(direction, alpha=sign * 1e-6)
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(gradient.norm().item(), rel=1e-4, abs=1e-7), name
    assert not silent


@pytest.mark.detail(12)
def test_loss_and_gradient_do_not_depend_on_padding(make_trainer, make_batch):
    """Two more columns on either side, full of noise where the mask is False."""
    trainer, batch = make_trainer(), make_batch(LENGTHS)
    wider = {}
    for name in ("log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns"):
        wider[name] = F.pad(getattr(batch, name).masked_fill(~batch.response_mask, 3.0), (0, 2), value=-5.0)
    padded = replace(
        batch,
        tokens=F.pad(batch.tokens.masked_fill(~batch.attention_mask, 5), (2, 2), value=6),
        attention_mask=F.pad(batch.attention_mask, (2, 2)),
        response_mask=F.pad(batch.response_mask, (0, 2)),
        prompt_length=batch.prompt_length + 2,
        **wider,
    )
    (loss, parts), (padded_loss, padded_parts) = trainer.losses(batch), trainer.losses(padded)
    assert padded_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert {k: v.item() for k, v in padded_parts.items()} == pytest.approx(
        {k: v.item() for k, v in parts.items()}, abs=1e-5
    )
    assert_all_close(gradients_of(trainer, padded), gradients_of(trainer, batch), atol=1e-5, rtol=1e-4)


@pytest.mark.detail(13)
def test_loss_and_gradient_do_not_depend_on_the_rows_order(make_trainer, make_batch):
    trainer, batch = make_trainer(), make_batch(LENGTHS)
    shuffled = batch.rows(torch.randperm(len(batch), generator=torch.Generator().manual_seed(3)))
    assert trainer.losses(shuffled)[0].item() == pytest.approx(trainer.losses(batch)[0].item(), abs=1e-5)
    assert_all_close(gradients_of(trainer, shuffled), gradients_of(trainer, batch), atol=1e-5, rtol=1e-4)


# --- The update -----------------------------------------------------------------------------------


@pytest.mark.detail(7)
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_first_minibatch_has_ratio_one_in_every_iteration(architecture, critic, make_trainer, make_policy, make_lm):
    """Old log-probabilities are recorded anew for each batch, at the temperature that the loss uses."""
    trainer = make_trainer(
        make_policy(architecture, critic=critic, dropout=0.1), make_lm(architecture, seed=1), temperature=0.8
    )
    for _ in range(3):
        metrics = trainer.step()
        assert metrics["first_ratio_error"] < 1e-5
        assert metrics["approx_kl"] > 1e-5, "later minibatches meet a policy that has moved"


@pytest.mark.detail(13)
@pytest.mark.detail(35)
@pytest.mark.parametrize("pieces", [2, 3, 12])
def test_accumulated_gradient_equals_that_of_one_big_minibatch(pieces, make_trainer, make_batch):
    """Rows of 1 to 6 tokens: pieces weigh by their tokens, not each the same."""
    batch, found = make_batch(LENGTHS), {}
    for number in (1, pieces):
        trainer = make_trainer(
            batch_size=12, minibatch_size=12, gradient_accumulation_steps=number, ppo_epochs=1, max_grad_norm=1e6
        )
        expected = gradients_of(trainer, batch)
        steps = watch_steps(trainer)
        reports = trainer.update(batch).reports
        assert len(steps) == len(reports) == 1
        assert_all_close(steps[0]["gradients"], expected, atol=1e-6, rtol=1e-4)
        found[number] = {name: value.item() for name, value in reports[0].items()}
    assert found[pieces] == pytest.approx(found[1], rel=1e-4, abs=1e-5)


@pytest.mark.detail(35)
def test_gradients_start_from_zero_in_each_minibatch_and_epochs_shuffle_afresh(make_trainer, make_batch):
    batch, visited = make_batch(LENGTHS), []
    trainer = make_trainer(batch_size=12, minibatch_size=4, ppo_epochs=3, max_grad_norm=1e6)
    original = trainer.losses

    def losses(minibatch):
        visited.append(minibatch)
        return original(minibatch)

    trainer.losses = losses
    steps = watch_steps(trainer)
    trainer.update(batch)
    trainer.losses = original
    assert len(steps) == len(visited) == 9
    for step, minibatch in list(zip(steps, visited, strict=True)):
        with torch.no_grad():
            for p, value in zip(trainer.policy.parameters(), step["parameters"], strict=True):
                p.copy_(value)
        assert_all_close(step["gradients"], gradients_of(trainer, minibatch), atol=1e-6, rtol=1e-4)
    order = [batch.scores.tolist().index(score) for piece in visited for score in piece.scores.tolist()]
    epochs = [order[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.detail(26)
def test_one_step_of_adam_is_the_formula_with_epsilon_1e_5(make_trainer, make_batch):
    """First step: m̂ = g, v̂ = g², so θ moves by −lr·g/(|g| + 10⁻⁵); no weight decay."""
    trainer = make_trainer(batch_size=12, minibatch_size=12, ppo_epochs=1, max_grad_norm=0.01)
    steps = watch_steps(trainer)
    trainer.update(make_batch(LENGTHS))
    gradients = steps[0]["gradients"]
    assert any((g.abs() < 1e-5).any() and (g != 0).any() for g in gradients), "gradients small enough for ε to count"
    for before, g, p in zip(steps[0]["parameters"], gradients, trainer.policy.parameters(), strict=True):
        expected = before.double() - 1e-3 * g.double() / (g.double().abs() + 1e-5)
        torch.testing.assert_close(p.detach().double(), expected, atol=2e-7, rtol=2e-7)


@pytest.mark.detail(27)
@pytest.mark.parametrize(
    ("schedule", "warm", "expected"),
    [
        ("linear", 0, [1e-3, 7.5e-4, 5e-4, 2.5e-4]),
        ("constant", 0, [1e-3] * 4),
        ("cosine", 0, [1e-3, 5e-4 * (1 + 0.5**0.5), 5e-4, 5e-4 * (1 - 0.5**0.5)]),
        ("linear", 2, [1e-3 / 3, 2e-3 / 3, 1e-3, 5e-4]),
        ("constant", 3, [2.5e-4, 5e-4, 7.5e-4, 1e-3]),
    ],
)
def test_learning_rate_climbs_and_then_falls_to_0_or_stays(schedule, warm, expected, make_trainer):
    """lr·(1 − i/N) in iteration i of N, the same for all its minibatches, and what the metrics say."""
    trainer = make_trainer(lr_schedule=schedule, num_iterations=4, warmup_iterations=warm)
    steps = watch_steps(trainer)
    history = trainer.train()
    assert [metrics["learning_rate"] for metrics in history] == pytest.approx(expected)
    assert [step["lr"] for step in steps] == pytest.approx([lr for lr in expected for _ in range(4)])


@pytest.mark.detail(29)
@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_gradients_are_scaled_down_to_the_norm_that_is_allowed(limit, make_trainer, make_batch):
    trainer = make_trainer(batch_size=12, minibatch_size=12, ppo_epochs=1, max_grad_norm=limit)
    batch = make_batch(LENGTHS)
    raw = gradients_of(trainer, batch)
    steps = watch_steps(trainer)
    report = trainer.update(batch).reports[0]
    assert report["grad_norm"].item() == pytest.approx(norm(raw), rel=1e-4)
    scale = min(1.0, limit / norm(raw))
    assert norm(steps[0]["gradients"]) == pytest.approx(scale * norm(raw), rel=1e-4)
    assert_all_close(steps[0]["gradients"], [scale * g for g in raw], atol=1e-6, rtol=1e-3)


@pytest.mark.detail(30)
def test_target_kl_leaves_the_epochs_before_the_step_that_would_go_on(make_trainer):
    """The first minibatch whose KL passes 1.5 targets makes no step; parameters are as after the one before."""
    settings = dict(learning_rate=5e-3, ppo_epochs=4)
    free = make_trainer(**settings)
    batch = free.rollout()
    steps = watch_steps(free)
    whole = free.update(batch)
    measured = [report["approx_kl"].item() for report in whole.reports]
    assert not whole.stopped and whole.steps == len(measured)
    rising = [i for i in range(2, 8) if measured[i] > 1.6 * max(measured[:i])]
    stop = rising[-1]
    target = 1.05 * max(measured[:stop]) / 1.5  # the KL before is past the target itself, and not past 1.5 of it
    stopped = make_trainer(**settings, target_kl=target)
    updates = stopped.update(stopped.rollout())
    assert [report["approx_kl"].item() for report in updates.reports] == pytest.approx(
        measured[: stop + 1], rel=1e-3, abs=1e-6
    )
    assert updates.stopped and updates.steps == stop
    assert_all_close(copies(stopped.policy), steps[stop]["parameters"], atol=1e-6, rtol=1e-5)
    assert all(p.grad is None or not p.grad.any() for p in stopped.policy.parameters())
    again = make_trainer(**settings, target_kl=target).step()
    assert again["optimizer_steps"] == stop


@pytest.mark.detail(28)
def test_adaptive_beta_follows_the_formula_and_is_used(make_trainer):
    """β grows by at most 20 % · n/horizon, by the KL that was measured; the rewards are shaped with today's β."""
    trainer = make_trainer(
        num_iterations=6,
        adaptive_kl_target=10.0,
        adaptive_kl_horizon=100,
        kl_coef=0.2,
        learning_rate=1e-2,
        missing_eos_penalty=0.0,
    )
    beta = 0.2
    for _ in range(6):
        metrics = trainer.step()
        assert metrics["kl_coef"] == pytest.approx(beta, rel=1e-5)
        assert metrics["reward"] == pytest.approx(metrics["score"] - beta * metrics["kl"], rel=1e-3, abs=1e-4)
        beta *= 1 + min(max(metrics["kl"] / 10.0 - 1, -0.2), 0.2) * 16 / 100
    assert trainer.kl_controller.coef == pytest.approx(beta, rel=1e-5)
    assert abs(beta / 0.2 - 1) > 0.01


def test_fixed_beta_stays(make_trainer):
    history = make_trainer(kl_coef=0.3).train()
    assert [metrics["kl_coef"] for metrics in history] == [0.3] * 4


# --- Who moves ------------------------------------------------------------------------------------


@pytest.mark.detail(36)
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_reference_and_reward_model_are_frozen_and_the_policy_moves(
    critic, make_trainer, make_policy, make_lm, make_reward_model
):
    policy, reference, scorer = make_policy(critic=critic, head=0.1), make_lm(seed=1), make_reward_model()
    trainer = make_trainer(policy, reference, scorer, ent_coef=0.01)
    before, moving = (parameter_hash(reference), parameter_hash(scorer)), copies(policy)
    trainer.train()
    assert (parameter_hash(reference), parameter_hash(scorer)) == before
    assert not any(p.requires_grad for model in (reference, scorer) for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(moving, policy.parameters(), strict=True))
    owned = {p.data_ptr() for group in trainer.optimizer.param_groups for p in group["params"]}
    assert owned == {p.data_ptr() for p in policy.parameters()}


@pytest.mark.detail(36)
def test_reference_that_shares_parameters_with_the_policy_is_refused(make_trainer, make_policy, make_lm):
    policy = make_policy()
    for shared in (policy, policy.lm):
        with pytest.raises(ValueError, match="reference must be a model of its own"):
            make_trainer(policy, shared)
    partly = make_lm(seed=1)
    partly.transformer.wte = policy.lm.transformer.wte
    with pytest.raises(ValueError, match="reference must be a model of its own"):
        make_trainer(policy, partly)
    make_trainer(policy, copy.deepcopy(policy))


@pytest.mark.detail(6)
def test_trainer_switches_dropout_off(make_trainer, make_policy, make_lm):
    """In a policy made with dropout 0.1: train mode, and yet two forwards are identical."""
    trainer = make_trainer(make_policy(critic="separate", head=1.0, dropout=0.1), make_lm(seed=1, dropout=0.1))
    ids = torch.randint(3, 8, (30, 8))
    assert trainer.model.training
    first, second = (trainer.model(ids, torch.ones_like(ids)) for _ in range(2))
    assert torch.equal(first.logits, second.logits) and torch.equal(first.values, second.values)


@pytest.mark.parametrize(("beta", "seeds"), [(0.0, (0, 1, 2)), (5.0, (0,))])
def test_score_rises_and_beta_holds_the_policy_near_the_reference(beta, seeds, make_trainer, make_policy, make_lm):
    """Paid for the word "good", each of three runs says it more often by two; at a high price of KL none is taken."""
    settings = dict(num_iterations=12, kl_coef=beta, learning_rate=5e-3, missing_eos_penalty=0.0, batch_size=32)
    for seed in seeds:
        policy, reference = make_policy(initializer_range=0.1), make_lm(initializer_range=0.1)
        history = make_trainer(policy, reference, seed=seed, **settings).train()
        if beta == 0:
            assert history[-1]["score"] > history[0]["score"] + 2.0 and history[-1]["kl"] > 2.0
        else:
            assert abs(history[-1]["kl"]) < 0.75


# --- Metrics, seeds, several trainers -------------------------------------------------------------


@pytest.mark.detail(32)
def test_metrics_are_plain_floats_that_describe_the_batch(make_trainer):
    trainer = make_trainer(missing_eos_penalty=0.25)
    metrics = trainer.step()
    batch = trainer.batch
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in metrics.values())
    real = batch.response_mask
    kl = (batch.log_probs - batch.ref_log_probs)[real].sum() / len(batch)
    assert metrics["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert metrics["score"] == pytest.approx(batch.scores.mean().item(), rel=1e-5)
    words = [response.split().count("good") for response in trainer.texts(batch)[1]]
    penalties = 0.25 * (~batch.ended).float().mean().item()
    assert metrics["score"] == pytest.approx(sum(words) / len(words) - penalties, rel=1e-5)
    assert metrics["response_length"] == pytest.approx(real.sum().item() / len(batch))
    assert metrics["ended"] == pytest.approx(batch.ended.float().mean().item())
    assert metrics["reward"] == pytest.approx(metrics["score"] - trainer.config.kl_coef * metrics["kl"], rel=1e-4)
    returns, values = batch.returns[real].double(), batch.values[real].double()
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0)
    assert metrics["explained_variance"] == pytest.approx(1 - unexplained.item(), rel=1e-4)
    assert metrics["optimizer_steps"] == 4
    assert metrics["seconds_rollout"] > 0 and metrics["seconds_update"] > 0


def test_on_step_sees_every_step_and_may_add_to_its_metrics(make_trainer):
    trainer, seen = make_trainer(num_iterations=3), []

    def on_step(step, metrics, batch):
        seen.append((step, len(batch)))
        metrics["gold"] = 2.0 * step

    history = trainer.train(on_step)
    assert seen == [(1, 16), (2, 16), (3, 16)]
    assert [metrics["gold"] for metrics in history] == [2.0, 4.0, 6.0]
    assert trainer.train() == [], "the run is over"


def test_several_callbacks_run_in_order_and_one_that_returns_true_ends_the_training(make_trainer):
    """All of that iteration are called, truth alone ends it, and another call goes on from there."""
    trainer, seen = make_trainer(num_iterations=4), []

    def first(step, metrics, batch):
        metrics["doubled"] = 2 * step
        return step == 2

    def second(step, metrics, batch):
        seen.append((step, metrics["doubled"], trainer.iteration, batch is trainer.batch))
        return (step, "what a lambda happens to return")

    assert [metrics["doubled"] for metrics in trainer.train(first, second)] == [2, 4]
    assert seen == [(1, 2, 1, True), (2, 4, 2, True)]
    assert len(trainer.train(on_step=first)) == 2 and trainer.iteration == 4 and len(seen) == 2


def stop_at(step):
    return lambda iteration, metrics, batch: iteration == step


def test_a_training_that_was_ended_and_went_on_is_the_one_that_was_not(make_trainer):
    whole, parts = make_trainer(), make_trainer()
    history = [without_times(metrics) for metrics in whole.train()]
    assert [without_times(metrics) for metrics in parts.train(stop_at(1)) + parts.train()] == history


# --- Evaluation prompts ---------------------------------------------------------------------------

EVAL_PROMPTS = ["good", "bad film", "film film bad", "", "good bad film", "film ."]


def log_prob_alone(lm, ids, start):
    """Of the tokens from `start` on, the whole text read once by itself."""
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None]).sum())


def test_an_evaluation_is_one_response_to_each_prompt_drawn_by_the_seed(make_trainer, tokenizer):
    """Against prompts sampled one at a time, each by its row of the numbers, and texts read one at a time."""
    trainer = make_trainer(eval_prompts=EVAL_PROMPTS, missing_eos_penalty=0.25, seed=3)
    trainer.train(stop_at(2))
    metrics, rollout = trainer.evaluate()
    uniforms = torch.rand(len(EVAL_PROMPTS), 6, generator=torch.Generator().manual_seed(3))
    scores, kls, lengths, ended = [], [], [], []
    for row, prompt in enumerate(EVAL_PROMPTS):
        ids = encode_prompt(tokenizer, prompt)
        alone = sample_responses(
            trainer.lm, torch.tensor([ids]), torch.ones(1, len(ids)), max_new_tokens=6, eos_id=EOS, pad_id=PAD,
            uniforms=uniforms[row : row + 1],
        )  # fmt: skip
        response = alone.tokens[0].tolist()
        assert rollout.tokens[row][rollout.attention_mask[row]].tolist() == ids + response
        assert rollout.records[row] == {"prompt": prompt}
        scores.append(tokenizer.decode(response).split().count("good") - 0.25 * (response[-1] != EOS))
        kls.append(log_prob_alone(trainer.lm, ids + response, len(ids)))
        kls[-1] -= log_prob_alone(trainer.reference, ids + response, len(ids))
        lengths.append(len(response))
        ended.append(response[-1] == EOS)
    assert {*ended} == {True, False} and len({*lengths}) > 2, "rows of one kind would prove less"
    expected = {"score": scores, "kl": kls, "response_length": lengths, "ended": ended}
    means = {f"eval_{name}": sum(values) / len(values) for name, values in expected.items()}
    assert metrics == pytest.approx(means, abs=1e-4)


@pytest.mark.parametrize("count", [1, 6, 16, 21])
def test_an_evaluation_samples_a_batch_at_most_at_once(count, make_trainer):
    prompts = (EVAL_PROMPTS * 4)[:count]
    few, many = (make_trainer(eval_prompts=prompts, batch_size=size, minibatch_size=8) for size in (8, 32))
    sizes, answers = [], few.answers
    few.answers = lambda ids, *others: sizes.append(len(ids)) or answers(ids, *others)
    (one, in_parts), (other, at_once) = few.evaluate(), many.evaluate()
    assert max(sizes) <= 8 and sum(sizes) == count == len(in_parts) == len(at_once)
    assert one == pytest.approx(other, abs=1e-5) and torch.equal(in_parts.tokens, at_once.tokens)


def test_an_evaluation_is_the_same_each_time_and_moves_with_the_policy(make_trainer):
    trainer = make_trainer(eval_prompts=EVAL_PROMPTS, learning_rate=1e-2)
    before, again = trainer.evaluate()[0], trainer.evaluate()[0]
    assert before == again
    trainer.step()
    assert trainer.evaluate()[0] != before


@pytest.mark.parametrize(("every", "at"), [(2, [2, 4, 5]), (1, [1, 2, 3, 4, 5]), (5, [5]), (9, [5])])
def test_looking_at_intervals_leaves_the_training_as_it_is(every, at, make_trainer):
    """To the last bit: metrics, weights, generators. And callbacks see what the evaluation found."""
    plain = make_trainer(num_iterations=5)
    looked = make_trainer(eval_prompts=EVAL_PROMPTS, num_iterations=5, eval_every=every)
    seen = []
    history = looked.train(lambda step, metrics, batch: seen.append(step) if "eval_score" in metrics else None)
    assert seen == at == [i for i, metrics in enumerate(history, start=1) if "eval_kl" in metrics]
    trained = [{k: v for k, v in without_times(m).items() if not k.startswith("eval_")} for m in history]
    assert trained == [without_times(metrics) for metrics in plain.train()]
    assert parameter_hash(plain.policy) == parameter_hash(looked.policy)
    assert torch.equal(plain.generator.get_state(), looked.generator.get_state())


def test_evaluation_prompts_are_checked_at_the_start(make_trainer):
    with pytest.raises(ValueError, match="prompt 2: a prompt must leave room for max_new_tokens = 6 in .* got one of"):
        make_trainer(eval_prompts=["film", "good " * 30])
    with pytest.raises(ValueError, match="the number of eval_prompts must be a whole number >= 1; got 0"):
        make_trainer().evaluate()
    with pytest.raises(ValueError, match="eval_every must be a whole number >= 1; got 0"):
        PPOConfig(eval_every=0)


def without_times(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("seconds")}


def test_the_seed_decides_everything(make_trainer):
    """Two runs of one seed agree to the last bit, whatever the global generator; another seed differs."""
    histories = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(histories))
        histories.append([without_times(metrics) for metrics in make_trainer(seed=seed).train()])
    assert histories[0] == histories[1] != histories[2]


def test_several_trainers_in_one_process_do_not_disturb_each_other(make_trainer):
    """Two runs whose steps alternate give what each gives by itself."""
    alone = [[without_times(m) for m in make_trainer(seed=seed).train()] for seed in (0, 1)]
    first, second = make_trainer(seed=0), make_trainer(seed=1)
    together = [(without_times(first.step()), without_times(second.step())) for _ in range(4)]
    assert [pair[0] for pair in together] == alone[0] and [pair[1] for pair in together] == alone[1]


def test_trainers_of_different_precision_follow_each_other(make_trainer):
    for precision in ("no", "bf16", "no"):
        trainer = make_trainer(precision=precision)
        types = []
        trainer.policy.lm.lm_head.register_forward_hook(
            lambda module, args, output, types=types: types.append(output.dtype)
        )
        trainer.step()
        assert set(types) == {torch.bfloat16 if precision == "bf16" else torch.float32}


# --- Precisions -----------------------------------------------------------------------------------


@pytest.mark.detail(7)
def test_float64_models_train(make_trainer, make_policy, make_lm):
    policy = make_policy(head=0.1).double()
    metrics = make_trainer(policy, make_lm(seed=1).double(), temperature=0.7).step()
    assert metrics["first_ratio_error"] < 1e-12 and metrics["approx_kl"] > 0
    assert {p.dtype for p in policy.parameters()} == {torch.float64}


def first_ratios(trainer):
    """|ρ − 1| of the real tokens of a fresh batch."""
    from rlhf_lessons.rollout import policy_outputs

    batch = trainer.rollout()
    with torch.no_grad():
        logits, _ = policy_outputs(
            trainer.model, batch.tokens, batch.attention_mask, length=batch.responses.shape[1], temperature=1.0
        )
    new = logits.log_softmax(-1).gather(-1, batch.responses[..., None]).squeeze(-1)
    return ((new - batch.log_probs).exp() - 1).abs()[batch.response_mask]


BF16_MEAN, BF16_MAX = 0.015, 0.12  # measured over 6 seeds and 4 architectures: 0.005 and 0.046


@pytest.mark.detail(7)
def test_ratio_is_near_one_in_bf16(architecture, make_trainer, make_policy, make_lm):
    """bf16 keeps 8 bits of a logit, and cached and whole-text passes round differently; the rest is float32."""
    trainer = make_trainer(
        make_policy(architecture), make_lm(architecture, seed=1), precision="bf16", batch_size=64, max_new_tokens=16
    )
    error = first_ratios(trainer)
    assert 1e-5 < error.max() < BF16_MAX and error.mean() < BF16_MEAN
    metrics = trainer.step()
    assert metrics["first_ratio_error"] < BF16_MEAN
    assert trainer.batch.log_probs.dtype == trainer.batch.values.dtype == torch.float32
    assert {p.dtype for p in trainer.policy.parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_float32_reproduces_the_cpu_s_step(make_trainer, make_batch):
    """One batch, the same parameters: parts of the loss to 1e-4, the gradient to 1e-4 of its norm.

    The gradient and not the parameters after a step: Adam divides by its size, so that where a gradient is nearly 0
    its rounding would decide the sign of a whole step.
    """
    batch = make_batch(LENGTHS)
    settings = dict(batch_size=12, minibatch_size=12, ppo_epochs=1)
    on_cpu = make_trainer(**settings, device="cpu")
    expected = gradients_of(on_cpu, batch)
    _, parts = on_cpu.losses(batch)
    on_gpu = make_trainer(**settings, device="cuda")
    moved = replace(batch, **{k: v.cuda() for k, v in vars(batch).items() if isinstance(v, torch.Tensor)})
    _, gpu_parts = on_gpu.losses(moved)
    assert {k: v.item() for k, v in gpu_parts.items()} == pytest.approx(
        {k: v.item() for k, v in parts.items()}, abs=1e-4
    )
    found = [g.cpu() for g in gradients_of(on_gpu, moved)]
    assert norm([a - b for a, b in zip(found, expected, strict=True)]) < 1e-4 * norm(expected)
    assert on_gpu.step()["first_ratio_error"] < 1e-5
    make_trainer(device="cpu").step()  # and back again in the same process


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_bf16_ratio_is_near_one(make_trainer):
    trainer = make_trainer(precision="bf16", device="cuda", batch_size=64, max_new_tokens=16)
    assert first_ratios(trainer).max() < BF16_MAX
    assert trainer.step()["first_ratio_error"] < BF16_MEAN


# --- What goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["value_head.weight", "lm.transformer.wte.weight"])
def test_a_loss_that_is_not_finite_raises_and_names_the_iteration(place, make_trainer, make_policy):
    """NaN weights in the critic, or in the model whose logits are then sampled from."""
    policy = make_policy()
    trainer = make_trainer(policy)
    trainer.step()
    with torch.no_grad():
        policy.get_parameter(place).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="is nan in iteration 2"):
        trainer.step()


def with_nan(model, place=None):
    """The model, a NaN in one of its weights."""
    weight = next(model.parameters()) if place is None else model.get_parameter(place)
    with torch.no_grad():
        weight.view(-1)[-1] = math.nan
    return model


class NotANumber(Scorer):
    """A scorer of one's own that does not look at what it returns."""

    def __call__(self, samples):
        return torch.full((len(samples),), math.nan)


def nan_gradient(trainer):
    """Nothing is wrong with the loss; its gradient is NaN for one parameter in the second minibatch of an update."""
    calls = iter([1.0, math.nan] + [1.0] * 9)
    trainer.policy.value_head.weight.register_hook(lambda gradient: gradient * next(calls))


def nan_loss(trainer):
    original = trainer.losses

    def losses(batch):
        loss, report = original(batch)
        return loss, report | {"loss": report["loss"] * math.nan}

    trainer.losses = losses


BROKEN = {  # what is not finite -> what breaks a trainer, and how the error names it
    "a weight of the reward model": (
        lambda t, rm: setattr(t, "scorer", as_scorer(with_nan(rm, "classifier.score.weight"), t.tokenizer)), "scores",
    ),
    "a function's scores": (
        lambda t, rm: setattr(t, "scorer", as_scorer(lambda p, r: [math.nan] * len(r), t.tokenizer)), "scores",
    ),
    "a function's scores, in one place": (
        lambda t, rm: setattr(t, "scorer", as_scorer(lambda p, r: [0.0] * 15 + [-math.inf], t.tokenizer)), "scores",
    ),
    "a scorer's scores": (lambda t, rm: setattr(t, "scorer", NotANumber()), "scores is nan in iteration 2"),
    "scores of 1e25": (
        lambda t, rm: setattr(t, "scorer", as_scorer(lambda p, r: [1e25 * i for i in range(16)], t.tokenizer)),
        "loss is inf in iteration 2",
    ),
    "the reference": (lambda t, rm: with_nan(t.reference, "lm_head.weight"), "ref_log_probs is nan in iteration 2"),
    "a returned loss": (lambda t, rm: nan_loss(t), "loss is nan in iteration 2"),
}  # fmt: skip


@pytest.mark.parametrize("cause", BROKEN)
def test_nothing_that_is_not_finite_reaches_a_weight(cause, make_trainer, make_reward_model):
    """In a trainer that has made steps: the error comes before the next, and weights and moments are as they were."""
    trainer = make_trainer(ppo_epochs=1, minibatch_size=16)
    trainer.step()
    break_it, message = BROKEN[cause]
    break_it(trainer, make_reward_model())
    before, moments = parameter_hash(trainer.policy), copy.deepcopy(trainer.optimizer.state_dict())
    with pytest.raises((FloatingPointError, ValueError), match=message):
        trainer.step()
    assert parameter_hash(trainer.policy) == before and trainer.iteration == 1
    for mine, theirs in zip(trainer.optimizer.state_dict()["state"].values(), moments["state"].values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert all(p.grad is None or not p.grad.any() for p in trainer.policy.parameters())


@pytest.mark.parametrize("limit", [1.0, math.inf])
def test_a_gradient_that_is_not_finite_stops_at_its_minibatch(limit, make_trainer, make_batch):
    """The minibatch before has made its step; with the loss finite, nothing but the gradient shows it."""
    trainer = make_trainer(batch_size=12, minibatch_size=4, ppo_epochs=1, max_grad_norm=limit)
    steps = watch_steps(trainer)
    nan_gradient(trainer)
    with pytest.raises(FloatingPointError, match="grad_norm is nan in iteration 1: a lower learning_rate"):
        trainer.update(make_batch(LENGTHS))
    assert len(steps) == 1 and all(p.isfinite().all() for p in trainer.policy.parameters())
    assert all(p.grad is None or not p.grad.any() for p in trainer.policy.parameters())


def test_what_stands_in_the_padding_is_nobody_s_fact(make_trainer):
    """A sampler of one's own may leave anything there."""
    trainer = make_trainer()
    plain = trainer.collect

    def collect():
        rollout = plain()
        return replace(rollout, log_probs=torch.where(rollout.response_mask, rollout.log_probs, math.nan))

    trainer.collect = collect
    assert not trainer.rollout().log_probs.isfinite().all()


def test_a_config_of_another_method_is_refused(make_policy, make_lm, tokenizer):
    for config in (TrainerConfig(device="cpu"), GRPOConfig(device="cpu"), dict(device="cpu")):
        with pytest.raises(ValueError, match=f"config must be a PPOConfig; got '{type(config).__name__}'"):
            PPOTrainer(config, make_policy(), make_lm(seed=1), lambda p, r: [0.0] * len(r), ["film"], tokenizer)


def test_a_precision_that_the_device_lacks_is_refused_before_the_first_batch(make_trainer, monkeypatch):
    monkeypatch.setattr("rlhf_lessons.trainer.autocast", lambda device, precision: autocast(device, "fp16"))
    with pytest.raises(ValueError, match="precision must be no, or bf16 where cpu has it"):
        make_trainer()


@pytest.mark.parametrize("rate", [1e5, 1e30, 1e38])
def test_a_learning_rate_far_too_high_ends_in_the_same_error(rate, make_trainer):
    """Also where a single step leaves weights so large that the next iteration samples from NaN."""
    trainer = make_trainer(learning_rate=rate, ppo_epochs=1, minibatch_size=16, num_iterations=8)
    with pytest.raises(FloatingPointError, match="in iteration [2-8]: a lower learning_rate"):
        trainer.train()


@pytest.mark.parametrize(
    ("score_fn", "message"),
    [
        (lambda prompts, responses: [1.0], r"one number per response, \(16,\); got \(1,\)"),
        (lambda prompts, responses: 0.5, r"one number per response, \(16,\); got \(\)"),
        (lambda prompts, responses: [[1.0, 2.0]] * len(responses), r"one number per response, \(16,\); got \(16, 2\)"),
        (lambda prompts, responses: [float("nan")] * len(responses), "finite numbers; got NaN"),
        (lambda prompts, responses: [float("inf")] * len(responses), "finite numbers; got NaN or infinity"),
    ],
)
def test_scores_of_the_wrong_shape_or_not_finite_are_refused(score_fn, message, make_trainer):
    with pytest.raises(ValueError, match=f"scores must be {message}"):
        make_trainer(score_fn=score_fn).step()


def test_scores_may_be_a_list_an_array_or_a_tensor(make_trainer):
    import numpy as np

    found = [
        without_times(
            make_trainer(score_fn=lambda prompts, responses, kind=kind: kind([len(r) for r in responses])).step()
        )
        for kind in (list, np.array, torch.tensor)
    ]
    assert found[0] == found[1] == found[2]


def test_a_reward_model_scores_the_tokens_themselves(make_trainer, make_reward_model):
    """The same scores as each whole text gives alone, EOS included."""
    scorer = make_reward_model()
    trainer = make_trainer(score_fn=scorer, missing_eos_penalty=0.0)
    batch = trainer.rollout()
    with torch.no_grad():
        for row, score in enumerate(batch.scores):
            ids = batch.tokens[row][batch.attention_mask[row]][None]
            assert scorer(ids, torch.ones_like(ids)).item() == pytest.approx(score.item(), abs=1e-5)
    assert batch.scores.std() > 0.1


def test_prompts_must_fit_the_context_with_their_responses(make_trainer):
    """The model's context is 32: 26 prompt tokens and 6 new ones fit, one more does not."""
    fits = " ".join(["bad"] * 25)
    with pytest.raises(
        ValueError, match="prompt 2: a prompt must leave room for .* = 6 in .* 32; got one of 27 tokens"
    ):
        make_trainer(prompts=["film", fits + " bad"])
    make_trainer(prompts=[fits]).step()


def test_empty_prompts_are_the_begin_token_alone(make_trainer):
    trainer = make_trainer(prompts=["", "film"])
    assert trainer.prompt_ids == [[BOS], [BOS, 6]]
    assert math.isfinite(trainer.step()["loss"])
    assert set(trainer.texts(trainer.batch)[0]) == {"", "film"}


def test_no_prompts_are_refused(make_trainer):
    with pytest.raises(ValueError, match="prompts must hold at least one prompt; got none"):
        make_trainer(prompts=[])


@pytest.mark.detail(3)
def test_tokenizer_whose_padding_is_its_eos_is_refused(make_trainer, make_tokenizer):
    with pytest.raises(ValueError, match="must not use its EOS token as padding"):
        make_trainer(tokenizer=make_tokenizer(pad_token="<eos>"))


def test_one_new_token_trains(make_trainer):
    metrics = make_trainer(max_new_tokens=1).step()
    assert metrics["response_length"] == 1 and metrics["first_ratio_error"] < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(batch_size=12), "batch_size must be a multiple of minibatch_size = 8; got 12"),
        (dict(gradient_accumulation_steps=3), "minibatch_size must be a multiple of gradient_accumulation_steps = 3"),
        (dict(num_iterations=0), "num_iterations must be a whole number >= 1; got 0"),
        (dict(ppo_epochs=1.5), "ppo_epochs must be a whole number >= 1; got 1.5"),
        (dict(temperature=0.0), "temperature must be a number > 0; got 0.0"),
        (dict(learning_rate=float("nan")), "learning_rate must be a number > 0; got nan"),
        (dict(gamma=1.1), "gamma must be a number between 0 and 1; got 1.1"),
        (dict(gae_lambda=-0.1), "gae_lambda must be a number between 0 and 1; got -0.1"),
        (dict(kl_coef=-1.0), "kl_coef must be a number >= 0; got -1.0"),
        (dict(target_kl=0.0), "target_kl must be a number > 0, or None; got 0.0"),
        (dict(adaptive_kl_target=6.0, kl_coef=0.0), "kl_coef must be a number > 0 when it is adaptive"),
        (dict(lr_schedule="steps"), "lr_schedule must be one of linear, constant, cosine; got 'steps'"),
        (dict(num_iterations=5, warmup_iterations=5), "warmup_iterations must be less than num_iterations = 5; got 5"),
        (dict(missing_eos_mode="clip"), "missing_eos_mode must be one of subtract, replace; got 'clip'"),
        (dict(precision="fp16"), "precision must be one of no, bf16; got 'fp16'"),
        (dict(device="tpu"), "device must be one of auto, cpu, cuda, mps; got 'tpu'"),
    ],
)
def test_settings_are_checked_when_made(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        PPOConfig(**(dict(batch_size=16, minibatch_size=8) | settings))


@pytest.mark.detail(17)
def test_whitening_needs_eight_responses():
    with pytest.raises(ValueError, match="batch_size must be at least 8 to whiten advantages; got 4"):
        PPOConfig(batch_size=4, minibatch_size=4)
    PPOConfig(batch_size=4, minibatch_size=4, whiten_advantages=False)


# --- The fits before PPO --------------------------------------------------------------------------

TEXTS = ["good film .", "bad film .", "film film good ."] * 8
PAIRS = [
    dict(prompt="film", chosen=f"{filler} good good .", rejected=f"{filler} bad bad .")
    for filler in ("film", "film film", ". film", "film .")
] * 16


def watch_learning_rates(monkeypatch):
    rates = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return rates


@pytest.mark.detail(23)
def test_reward_model_is_fitted_for_one_epoch_with_a_learning_rate_that_ends_at_0(
    monkeypatch, tokenizer, make_reward_model
):
    """One epoch by default: 64 pairs in 32 batches of 2; the last step's rate is a 32nd of the full one."""
    rates = watch_learning_rates(monkeypatch)
    losses = fit_reward_model(make_reward_model(), PAIRS, tokenizer, batch_size=2, learning_rate=1e-3, device="cpu")
    assert len(losses) == len(rates) == 32
    assert rates[-1] == pytest.approx(1e-3 / 32) and max(rates) < 1e-3
    assert all(later < earlier for earlier, later in zip(rates[2:], rates[3:], strict=False))


@pytest.mark.detail(22)
def test_fitted_reward_model_prefers_what_was_chosen_and_is_normalised(make_reward_model, tokenizer):
    """Afterwards its scores on the texts it was fitted to have mean 0 and standard deviation 1."""
    for seed in range(3):
        scorer = make_reward_model(seed=seed, initializer_range=0.05)
        losses = fit_reward_model(scorer, PAIRS, tokenizer, batch_size=8, learning_rate=1e-2, device="cpu", seed=seed)
        assert losses[-1] < 0.3
        held_out = [
            dict(prompt="film", chosen="good .", rejected="bad ."),
            dict(prompt="", chosen="film good .", rejected="film bad ."),
        ]
        assert fitting.preference_accuracy(scorer, PAIRS + held_out, tokenizer) == 1.0
        texts = [pair[side] for pair in PAIRS for side in ("chosen", "rejected")]
        scores = fitting.score_texts(scorer, tokenizer, ["film"] * len(texts), texts)
        assert scores.mean().item() == pytest.approx(0, abs=1e-4)
        assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.detail(25)
def test_reward_model_reads_in_training_the_ids_that_a_rollout_gives(make_reward_model, tokenizer):
    """Prompt and response with EOS at the end, whatever the padding around them."""
    scorer, seen = make_reward_model(), set()
    original = scorer.forward

    def forward(tokens, mask):
        seen.update(tuple(row[real].tolist()) for row, real in zip(tokens, mask, strict=True))
        return original(tokens, mask)

    scorer.forward = forward
    fit_reward_model(scorer, PAIRS, tokenizer, batch_size=8, device="cpu")
    expected = {
        tuple(encode_prompt(tokenizer, pair["prompt"]) + encode_response(tokenizer, pair["prompt"], pair[side]))
        for pair in PAIRS
        for side in ("chosen", "rejected")
    }
    assert seen == expected and all(ids[0] == BOS and ids[-1] == EOS for ids in seen)


def test_language_model_is_fitted_to_the_texts_and_to_end_them(make_lm, tokenizer):
    """Every text is one of three, so its loss can fall to that of the choice: log 3 over 4 to 5 tokens."""
    lm = make_lm(initializer_range=0.05)
    losses = fit_language_model(lm, TEXTS, tokenizer, epochs=40, batch_size=12, learning_rate=1e-2, device="cpu")
    floor = 3 * math.log(3) / (4 + 4 + 5)
    assert losses[0] > 1.5 and floor - 0.02 < losses[-1] < floor + 0.1
    written = lm.generate(torch.tensor([[BOS, 5]]), attention_mask=torch.ones(1, 2), max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(written[0]) == "<bos> bad film . <eos>"


def test_texts_are_cut_at_the_length_asked_for(make_lm, tokenizer, monkeypatch):
    shapes = []
    original = fitting.language_model_loss

    def loss(lm, tokens, mask):
        shapes.append(tokens.shape[1])
        return original(lm, tokens, mask)

    monkeypatch.setattr(fitting, "language_model_loss", loss)
    fit_language_model(make_lm(), TEXTS, tokenizer, epochs=1, max_length=3, device="cpu")
    assert set(shapes) == {3}


def test_a_fit_that_diverges_raises_and_names_the_step(make_lm, tokenizer):
    with pytest.raises(FloatingPointError, match="the loss is nan in step"):
        fit_language_model(make_lm(), TEXTS, tokenizer, epochs=10, batch_size=4, learning_rate=1e38, device="cpu")


def fits(make_lm, make_reward_model, tokenizer):
    """Each fit of a fresh tiny model: name -> (model, fit(data=…, **settings))."""
    lm, scorer = make_lm(), make_reward_model()

    def fit_lm(data=TEXTS, **settings):
        return fit_language_model(lm, data, tokenizer, **(dict(epochs=1, batch_size=4, device="cpu") | settings))

    def fit_scorer(data=PAIRS, **settings):
        return fit_reward_model(scorer, data, tokenizer, **(dict(batch_size=4, device="cpu") | settings))

    return {"language model": (lm, fit_lm), "reward model": (scorer, fit_scorer)}


FITS = pytest.mark.parametrize("name", ["language model", "reward model"])


@FITS
@pytest.mark.parametrize("broken", ["weight", "gradient"])
def test_nothing_that_is_not_finite_reaches_a_fitted_weight(name, broken, make_lm, make_reward_model, tokenizer):
    """A NaN among the weights is in the loss; one in a gradient alone, in the third step, is in no loss yet."""
    model, fit = fits(make_lm, make_reward_model, tokenizer)[name]
    weight = next(model.parameters())
    if broken == "weight":
        with_nan(model)
        message, step = "the loss is nan in step 1", 1
    else:
        calls = iter([1.0, 1.0, math.nan] + [1.0] * 99)
        weight.register_hook(lambda gradient: gradient * next(calls))
        message, step = "the gradient is nan in step 3", 3
    seen, before = [], parameter_hash(model)
    with pytest.raises(FloatingPointError, match=message):
        fit(on_step=lambda step, steps, loss: seen.append(parameter_hash(model)))
    assert len(seen) == step - 1 and parameter_hash(model) == [before, *seen][-1]
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@FITS
def test_a_fit_of_nothing_is_refused_at_once(name, make_lm, make_reward_model, tokenizer):
    model, fit = fits(make_lm, make_reward_model, tokenizer)[name]
    before = parameter_hash(model)
    message = {"language model": "the number of texts must be a whole number >= 1; got 0",
               "reward model": "preferences must hold at least one pair; got none"}[name]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fit([])
    assert parameter_hash(model) == before


def test_no_pairs_can_be_asked_of_the_annotators(make_lm, tokenizer):
    for count in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"count must be a whole number >= 1; got {count}"):
            fitting.annotated_preferences(make_lm(), tokenizer, count, seed=0)


@FITS
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(epochs=0), "epochs must be a number > 0; got 0"),
        (dict(epochs="1"), "epochs must be a number > 0; got '1'"),
        (dict(epochs=math.nan), "epochs must be a number > 0; got nan"),
        (dict(batch_size=0), "batch_size must be a whole number >= 1; got 0"),
        (dict(batch_size=2.5), "batch_size must be a whole number >= 1; got 2.5"),
        (dict(learning_rate="1e-3"), "learning_rate must be a number > 0; got '1e-3'"),
        (dict(learning_rate=math.inf), "learning_rate must be a number > 0; got inf"),
        (dict(precision="fp16"), "precision must be no, or bf16 where cpu has it; got 'fp16'"),
    ],
)
def test_a_fit_s_settings_are_checked(name, settings, message, make_lm, make_reward_model, tokenizer):
    model, fit = fits(make_lm, make_reward_model, tokenizer)[name]
    with pytest.raises(ValueError, match=message):
        fit(**settings)


@pytest.mark.parametrize("count", [1, 4, 64])
@pytest.mark.parametrize("texts", [("good .", "good ."), ("good .", "good  ."), ("story", "plot")])
def test_pairs_that_nothing_can_tell_apart_are_refused(count, texts, make_reward_model, tokenizer):
    """Equal texts, or texts that the tokenizer reads as equal: their scores would differ by rounding, if at all."""
    scorer, pair = make_reward_model(), dict(prompt="film", chosen=texts[0], rejected=texts[1])
    before, statistics = parameter_hash(scorer), (scorer.config.reward_mean, scorer.config.reward_std)
    with pytest.raises(ValueError, match="preferences must hold a pair that the tokenizer tells apart: .* got none"):
        fit_reward_model(scorer, [pair] * count, tokenizer, device="cpu")
    assert parameter_hash(scorer) == before
    assert (scorer.config.reward_mean, scorer.config.reward_std) == statistics


def test_equal_pairs_among_others_teach_nothing_and_do_no_harm(make_reward_model, tokenizer):
    """As the tiny world's annotators give them, who sometimes see one answer twice."""
    equal = dict(prompt="film", chosen="good .", rejected="good .")
    losses = fit_reward_model(make_reward_model(), [equal, *PAIRS], tokenizer, batch_size=1, device="cpu")
    assert len(losses) == 65 and any(loss == pytest.approx(math.log(2), abs=1e-6) for loss in losses)


def test_from_language_model_to_aligned_policy(make_lm, make_trainer, make_policy, tokenizer, tmp_path):
    """The stages in their order, through folders: fit a base model, a reward model from its trunk, then PPO."""
    base = make_lm(initializer_range=0.05)
    fit_language_model(base, TEXTS, tokenizer, epochs=10, batch_size=12, learning_rate=1e-2, device="cpu")
    base.save_pretrained(tmp_path)
    scorer = RewardModel.from_causal_lm(tmp_path, pad_token_id=PAD)
    fit_reward_model(scorer, PAIRS, tokenizer, batch_size=8, learning_rate=1e-2, device="cpu")
    policy = type(make_policy()).from_pretrained(tmp_path)
    history = make_trainer(
        policy, base, scorer, prompts=[""], num_iterations=8, batch_size=32, learning_rate=5e-3
    ).train()
    assert history[0]["kl"] == pytest.approx(0, abs=1e-4), "policy and reference start as one"
    assert history[-1]["score"] > history[0]["score"] + 0.2


def test_a_state_is_a_copy_unless_it_is_written_at_once(make_trainer, tmp_path):
    """A step changes what is trained, and neither the copy nor the file."""
    trainer = make_trainer()
    trainer.step()
    copied, live = trainer.state_dict(), trainer.state_dict(copied=False)
    save_state(tmp_path / "state", live)
    trainer.step()
    written = load_state(tmp_path / "state")
    moved = [not torch.equal(x, written["policy"][name]) for name, x in live["policy"].items()]
    assert any(moved) and live["policy"].keys() == copied["policy"].keys()
    for name, x in written["policy"].items():
        assert torch.equal(copied["policy"][name], x)
    for number, moments in written["optimizer"]["state"].items():
        assert all(torch.equal(copied["optimizer"]["state"][number][name], x) for name, x in moments.items())
