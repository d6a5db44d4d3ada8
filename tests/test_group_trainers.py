"""Methods without a critic: their credit on numbers done by hand, and that a run raises what nobody trains on."""

import copy

import pytest
import torch
from conftest import PROMPTS, count_good, tiny_lm, tiny_policy, word_tokenizer

from rlhf_lessons import tiny_reviews
from rlhf_lessons.config import METHODS as CONFIGS
from rlhf_lessons.config import GRPOConfig, PPOConfig, RLOOConfig, TrainerConfig
from rlhf_lessons.group_trainers import GRPOTrainer, RLOOTrainer
from rlhf_lessons.kl import sampled_kl
from rlhf_lessons.likelihood import TokenTerms
from rlhf_lessons.masking import masked_mean
from rlhf_lessons.models import ASSETS, load_causal_lm, load_reward_model, load_tokenizer
from rlhf_lessons.ppo import clipped_policy_loss
from rlhf_lessons.rollout import joined
from rlhf_lessons.trainer import PPOTrainer

SMALL = dict(num_iterations=4, batch_size=16, minibatch_size=8, ppo_epochs=2, max_new_tokens=6, device="cpu")
METHODS = {"rloo": RLOOTrainer, "grpo": GRPOTrainer, "ppo": PPOTrainer}


def make(method="rloo", *, critic="shared", **settings):
    """A trainer on tiny random models, four responses to each prompt where the method compares them."""
    group = method != "ppo"
    policy = tiny_lm() if group else tiny_policy(critic=critic, head=0.1)
    config = CONFIGS[method](**(SMALL | (dict(samples_per_prompt=4) if group else {}) | settings))
    return METHODS[method](config, policy, tiny_lm(seed=1), count_good, PROMPTS, word_tokenizer())


# --- Who is compared with whom --------------------------------------------------------------------


def test_a_prompt_s_responses_stand_side_by_side_and_share_a_group():
    rollout = make().collect()
    assert rollout.group.tolist() == [row // 4 for row in range(16)]
    prompts = [record["prompt"] for record in rollout.records]
    assert all(len(set(prompts[i : i + 4])) == 1 for i in range(0, 16, 4)) and len(set(prompts)) > 1
    assert prompts == rollout.texts(word_tokenizer())[0]
    assert len({tuple(row) for row in rollout.responses[:4].tolist()}) > 1, "four draws, not one draw four times"


def test_ppo_may_answer_a_prompt_several_times_too():
    rollout = make("ppo", samples_per_prompt=8).collect()
    assert rollout.group.tolist() == [0] * 8 + [1] * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(samples_per_prompt=3), "batch_size must be a multiple of samples_per_prompt = 3; got 16"),
        (dict(samples_per_prompt=1), "samples_per_prompt must be a whole number >= 2; got 1"),
        (dict(advantage_scale="std"), "advantage_scale must be one of none, group, batch; got 'std'"),
        (dict(loss_over="rows"), "loss_over must be one of tokens, sequences, constant; got 'rows'"),
        (dict(ratio_level="word"), "ratio_level must be one of token, sequence; got 'word'"),
        (dict(kl_in="score"), "kl_in must be one of loss, reward; got 'score'"),
        (dict(clip_eps_high=0.0), "clip_eps_high must be a number > 0, or None; got 0.0"),
        (dict(dynamic_sampling=-1), "dynamic_sampling must be a whole number >= 0; got -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make("grpo", **settings)


@pytest.mark.parametrize("method", ["rloo", "grpo"])
@pytest.mark.parametrize("kind", [PPOConfig, TrainerConfig, RLOOConfig, GRPOConfig])
def test_another_method_s_config_is_refused(method, kind):
    """Its groups could be of one, who has nobody to be compared with, or its switches stay unread."""
    own = CONFIGS[method]
    if kind is own:
        return
    with pytest.raises(ValueError, match=f"config must be a {own.__name__}; got '{kind.__name__}'"):
        METHODS[method](kind(device="cpu"), tiny_lm(), tiny_lm(seed=1), count_good, PROMPTS, word_tokenizer())


# --- Credit ---------------------------------------------------------------------------------------


def with_scores(rollout, scores):
    """The rollout with other scores, in float32."""
    return type(rollout)(**vars(rollout) | {"scores": torch.tensor(scores, dtype=torch.float32)})


def of_responses(batch):
    """The one advantage of each response; its tokens must agree, its padding be 0."""
    first = batch.advantages[:, 0]
    torch.testing.assert_close(batch.advantages, first[:, None] * batch.response_mask, atol=0, rtol=0)
    return first.tolist()


def test_rloo_subtracts_the_mean_of_the_others():
    trainer = make(kl_coef=0.0)
    rollout = with_scores(trainer.collect(), [1, 2, 3, 6, 0, 0, 0, 4, 5, 5, 5, 5, -1, 1, -1, 1])
    expected = [1 - 11 / 3, 2 - 10 / 3, 3 - 3, 6 - 2, -4 / 3, -4 / 3, -4 / 3, 4, 0, 0, 0, 0]
    expected += [-1 - 1 / 3, 1 + 1 / 3, -1 - 1 / 3, 1 + 1 / 3]
    assert of_responses(trainer.credit(rollout)) == pytest.approx(expected, abs=1e-6)


def test_rloo_pays_the_kl_out_of_the_reward():
    trainer = make(kl_coef=0.5)
    rollout = with_scores(trainer.collect(), [0.0] * 16)
    kl = (rollout.log_probs - rollout.ref_log_probs).sum(dim=1).view(4, 4)
    expected = -0.5 * (kl - (kl.sum(dim=1, keepdim=True) - kl) / 3)
    assert of_responses(trainer.credit(rollout)) == pytest.approx(expected.flatten().tolist(), abs=1e-5)


@pytest.mark.parametrize(("scale", "divisor"), [("none", 1.0), ("group", (14 / 4) ** 0.5), ("batch", (14 / 16) ** 0.5)])
def test_grpo_centres_and_scales_scores(scale, divisor):
    """One group scores 1, 2, 3, 6: deviations −2, −1, 0, 3, of squares 14; all others the same."""
    trainer = make("grpo", advantage_scale=scale, kl_coef=0.0)
    batch = trainer.credit(with_scores(trainer.collect(), [1, 2, 3, 6] + [1000.1] * 12))
    expected = [x / divisor for x in (-2, -1, 0, 3)] + [0.0] * 12
    assert of_responses(batch) == pytest.approx(expected, abs=2e-3 if scale == "batch" else 1e-5)


def test_grpo_s_loss_is_the_clipped_one_plus_beta_times_k3():
    trainer = make("grpo", kl_coef=0.7, ent_coef=0.0, kl_in="loss", kl_kind="k3")
    batch = trainer.rollout()
    trainer.update(batch)  # so that ratios are not 1
    loss, report = trainer.losses(batch)
    with torch.no_grad():
        log_probs = trainer.token_terms(batch).log_probs
        ratio = batch.ref_log_probs - log_probs
        k3 = masked_mean(ratio.exp() - 1 - ratio, batch.response_mask)
        policy_loss = clipped_policy_loss(
            log_probs, batch.log_probs, batch.advantages, batch.response_mask, clip_eps=trainer.config.clip_eps
        )
    assert report["kl_loss"].item() == pytest.approx(k3.item(), rel=1e-5) and k3 > 0.01
    assert loss.item() == pytest.approx((policy_loss + 0.7 * k3).item(), rel=1e-5)
    assert k3.item() == pytest.approx(
        masked_mean(sampled_kl(log_probs, batch.ref_log_probs, kind="k3"), batch.response_mask).item(), rel=1e-5
    )


@pytest.mark.parametrize("doubt", [100.0, 1e4, float("inf")])
def test_grpo_s_padding_reaches_no_gradient(doubt):
    """A policy that would never say the padding: its log-probability there is beyond what k3's exponential holds."""
    trainer = make("grpo", kl_in="loss", kl_kind="k3")
    batch = trainer.rollout()
    assert not batch.response_mask.all()
    plain, found = trainer.token_terms, []

    def token_terms(batch):
        log_probs = plain(batch).log_probs.detach() + torch.where(batch.response_mask, 0.0, -doubt)
        found.append(log_probs.requires_grad_())
        return TokenTerms(log_probs, torch.zeros_like(log_probs), None)

    trainer.token_terms = token_terms
    loss, _ = trainer.losses(batch)
    loss.backward()
    (log_probs,) = found
    assert loss.isfinite() and log_probs.grad.isfinite().all()
    assert log_probs.grad[batch.response_mask].any() and not log_probs.grad[~batch.response_mask].any()


# --- Resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "critic", "settings"),
    [
        ("ppo", "shared", dict(adaptive_kl_target=2.0)),
        ("ppo", "separate", dict(ent_coef=0.01)),
        ("rloo", None, {}),
        ("grpo", None, dict(lr_schedule="constant", adaptive_kl_target=2.0)),
    ],
)
def test_a_fresh_trainer_with_another_s_state_goes_on_bit_by_bit(method, critic, settings):
    def metrics(trainer):
        return {k: v for k, v in trainer.step().items() if not k.startswith("seconds")}

    first = make(method, critic=critic, **settings)
    metrics(first), metrics(first)
    state = first.state_dict()
    expected = [metrics(first), metrics(first)]
    second = make(method, critic=critic, **settings)
    second.load_state_dict(state)
    assert second.iteration == 2
    assert [metrics(second), metrics(second)] == expected
    for mine, theirs in zip(second.policy.parameters(), first.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(second.batch.tokens, first.batch.tokens)


def test_a_state_is_a_copy_that_later_steps_leave_alone():
    trainer = make("grpo")
    trainer.step()
    state = trainer.state_dict()
    kept = copy.deepcopy(state)
    trainer.step()
    for name, value in kept["policy"].items():
        assert torch.equal(state["policy"][name], value)
    assert state["iteration"] == 1 and torch.equal(state["generator"], kept["generator"])


def test_optimiser_and_schedule_can_be_given():
    policy = tiny_lm()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 0.5**done)
    config = RLOOConfig(**SMALL, samples_per_prompt=4)
    arguments = (config, policy, tiny_lm(seed=1), count_good, PROMPTS, word_tokenizer())
    history = RLOOTrainer(*arguments, optimizer=optimizer, scheduler=scheduler).train()
    assert [metrics["learning_rate"] for metrics in history] == [0.5, 0.25, 0.125, 0.0625]
    with pytest.raises(ValueError, match="optimizer must hold the policy's parameters; got another model's"):
        RLOOTrainer(*arguments, optimizer=torch.optim.SGD(tiny_lm(seed=5).parameters(), lr=0.1))
    with pytest.raises(ValueError, match="scheduler must come with the optimizer that it steers"):
        RLOOTrainer(*arguments, scheduler=scheduler)


# --- In the tiny world ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_a_run_raises_the_gold_reward_that_nobody_trains_on(method):
    """12 iterations of 64 responses; mean of the last three against the first, 0.45 at least (seen: 0.8 to 1.3)."""
    tokenizer = load_tokenizer(ASSETS / "base")
    prompts = tiny_reviews.prompts(500, torch.Generator().manual_seed(0))
    config = CONFIGS[method](
        num_iterations=12, batch_size=64, minibatch_size=32, samples_per_prompt=4, ppo_epochs=2, device="cpu",
        kl_coef=0.05 if method == "rloo" else 0.02,
    )  # fmt: skip
    trainer = METHODS[method](
        config, load_causal_lm(ASSETS / "base"), load_causal_lm(ASSETS / "base"),
        load_reward_model(ASSETS / "reward_model"), prompts, tokenizer,
    )  # fmt: skip
    gold = []
    trainer.train(lambda step, m, batch: gold.append(float(tiny_reviews.gold_reward(*trainer.texts(batch)).mean())))
    assert sum(gold[-3:]) / 3 - gold[0] > 0.45, gold


# --- GRPO's switches ------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["tokens", "sequences", "constant"])
@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_pieces_give_the_whole_minibatch_s_gradient_whatever_the_loss_is_a_mean_over(over, kl_in):
    found = {}
    for pieces in (1, 2, 4):
        trainer = make("grpo", loss_over=over, kl_in=kl_in, gradient_accumulation_steps=pieces, minibatch_size=16,
                       ppo_epochs=1, ent_coef=0.1, max_grad_norm=1e6)  # fmt: skip
        batch = trainer.rollout()
        assert len({*batch.response_mask.sum(dim=1).tolist()}) > 1, "texts of several lengths"
        report, _ = trainer._update_on(batch)
        found[pieces] = [report[name].item() for name in ("grad_norm", "loss", "policy_loss", "entropy")]
    assert found[2] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
    assert found[4] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


def test_the_loss_is_the_mean_that_was_asked_for():
    """Recomputed from log-probabilities, for each mean; the ratio is 1 here, so the loss is that of −A."""
    for over in ("tokens", "sequences", "constant"):
        trainer = make("grpo", loss_over=over, kl_coef=0.0)
        batch = trainer.rollout()
        _, report = trainer.losses(batch)
        lengths, sums = batch.response_mask.sum(dim=1), (-batch.advantages).sum(dim=1)
        expected = {"tokens": sums.sum() / lengths.sum(), "sequences": (sums / lengths).mean(),
                    "constant": (sums / trainer.config.max_new_tokens).mean()}[over]  # fmt: skip
        assert report["policy_loss"].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_kl_that_is_paid_out_of_the_reward_is_in_no_loss(kind):
    trainer = make("grpo", kl_in="reward", kl_kind=kind, kl_coef=0.5, advantage_scale="none")
    rollout = with_scores(trainer.collect(), [0.0] * 16)
    kl = torch.where(rollout.response_mask, sampled_kl(rollout.log_probs, rollout.ref_log_probs, kind=kind), 0).sum(1)
    expected = -0.5 * (kl.view(4, 4) - kl.view(4, 4).mean(dim=1, keepdim=True))
    batch = trainer.credit(rollout)
    assert of_responses(batch) == pytest.approx(expected.flatten().tolist(), abs=1e-5)
    assert "kl_loss" not in trainer.losses(batch)[1]


def test_a_kl_that_is_in_the_loss_is_not_paid_out_of_the_reward_too():
    trainer = make("grpo", kl_in="loss", kl_coef=0.5, advantage_scale="none")
    rollout = with_scores(trainer.collect(), [0.0] * 16)
    assert not torch.equal(rollout.log_probs, rollout.ref_log_probs)
    assert of_responses(trainer.credit(rollout)) == [0.0] * 16


def test_one_ratio_a_text_is_clipped_as_one():
    trainer = make("grpo", ratio_level="sequence", loss_over="sequences", clip_eps=1e-3, clip_eps_high=2e-3)
    batch = trainer.rollout()
    trainer.update(batch)
    with torch.no_grad():
        log_probs = trainer.token_terms(batch).log_probs
        loss = clipped_policy_loss(
            log_probs, batch.log_probs, batch.advantages, batch.response_mask, clip_eps=(1e-3, 2e-3),
            level="sequence", over="sequences",
        )  # fmt: skip
        _, report = trainer.losses(batch)
    assert report["policy_loss"].item() == pytest.approx(loss.item(), rel=1e-6) and report["clip_fraction"] > 0


# --- Dynamic sampling -----------------------------------------------------------------------------


def test_groups_without_a_difference_are_drawn_anew():
    """Scores of 0 for every text in the first batch, then of whether its first word is good."""
    trainer, calls = make("grpo", dynamic_sampling=3, missing_eos_penalty=0.0), []
    plain = trainer.scorer

    def scorer(samples):
        calls.append(len(samples))
        return torch.zeros(len(samples)) if len(calls) == 1 else plain(samples)

    trainer.scorer = scorer
    rollout = trainer.collect()
    assert 1 < len(calls) <= 4 and len(rollout) == 16
    counts = rollout.group.unique(return_counts=True)[1]
    assert (counts == 4).all(), "whole groups"
    grouped = rollout.scores.view(4, 4)
    varied = (grouped.amax(dim=1) > grouped.amin(dim=1)).tolist()
    assert varied == sorted(varied, reverse=True) and any(varied), "those with a difference come first"
    assert trainer.measures(trainer.credit(rollout))["equal_scores"].item() == 1 - sum(varied) / 4


def test_rows_of_several_batches_are_what_they_were():
    trainer = make("grpo", dynamic_sampling=0)
    first = trainer.collect()
    trainer.prompts, trainer.prompt_ids = trainer.prompts[:1], trainer.prompt_ids[:1]  # the shortest
    second = trainer.collect()
    assert second.prompt_length < first.prompt_length
    both = joined([first, second], pad_id=trainer.tokenizer.pad_token_id)
    prompts, responses = (a + b for a, b in zip(trainer.texts(first), trainer.texts(second), strict=True))
    assert trainer.texts(both) == (prompts, responses)
    for start, part in ((0, first), (16, second)):
        rows = slice(start, start + 16)
        for name in ("log_probs", "ref_log_probs", "sampler_log_probs"):
            assert torch.equal(
                getattr(both, name)[rows][both.response_mask[rows]], getattr(part, name)[part.response_mask]
            )
        assert torch.equal(both.scores[rows], part.scores) and torch.equal(both.ended[rows], part.ended)
        assert torch.equal(both.attention_mask[rows].sum(dim=1), part.attention_mask.sum(dim=1))
    assert both.attention_mask[:, both.prompt_length - 1].all(), "a prompt ends where its response begins"


def test_dynamic_sampling_is_bounded_and_may_find_nothing():
    trainer = make("grpo", dynamic_sampling=2, missing_eos_penalty=0.0, kl_coef=0.0)
    sizes = []
    trainer.scorer = lambda samples: sizes.append(len(samples)) or torch.ones(len(samples))
    rollout = trainer.collect()
    assert sizes == [16, 16, 16] and len(rollout) == 16
    batch = trainer.credit(rollout)
    assert not batch.advantages.any() and trainer.measures(batch)["equal_scores"] == 1
