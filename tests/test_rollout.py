"""From prompts to a batch: what is sampled is what is scored, and each number stands at its token."""

import contextlib
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from sampling import BOS, EOS, IDS, PAD, generator, repeated, teacher_forced
from transformers import GPT2LMHeadModel

from rlhf_lessons.data import encode_prompt, encode_response, pad
from rlhf_lessons.engines.static import StaticSampler
from rlhf_lessons.forward import padding_route, takes
from rlhf_lessons.generation import Sampler, answers, eos_ids, respond, sample_tokens
from rlhf_lessons.rollout import collect_rollout, policy_outputs, reference_logits, sample_responses
from rlhf_lessons.scoring import missing_eos_scores
from rlhf_lessons.trainer import PPOConfig


def unpadded(batch):
    """Each row's prompt and response as lists of ids."""
    split = batch.prompt_length
    return [
        (row[:split][mask[:split]].tolist(), row[split:][mask[split:]].tolist())
        for row, mask in zip(batch.tokens, batch.attention_mask, strict=True)
    ]


def no_score(tokens, attention_mask, response_mask):
    return torch.zeros(len(tokens))


def settings(**changes):
    """A PPOConfig that leaves scores and advantages as they are."""
    plain = dict(whiten_advantages=False, missing_eos_penalty=0.0, max_new_tokens=6)
    return PPOConfig(**(dict(batch_size=24, minibatch_size=24) | plain | changes))


def roll_out(policy, reference, queries, score=no_score, *, kl_coef=0.0, seed=0, times=8, **changes):
    return collect_rollout(
        policy,
        reference,
        score,
        *repeated(queries, times),
        config=settings(**changes),
        kl_coef=kl_coef,
        **IDS,
        generator=generator(seed),
    )


# --- One token ------------------------------------------------------------------------------------


def test_tokens_are_drawn_as_often_as_softmax_says():
    logits = torch.tensor([1.0, -2.0, 0.0, 2.0, -torch.inf])
    n = 40_000
    counts = torch.bincount(sample_tokens(logits.expand(n, 5), torch.rand(n, generator=generator())), minlength=5)
    p = logits.softmax(0)
    z = (counts - n * p)[:4] / (n * p * (1 - p))[:4].sqrt()
    assert z.abs().max() < 4 and counts[4] == 0


@pytest.mark.parametrize("u", [0.0, 1e-30, 0.5, 1 - 2**-24, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_without_probability_is_never_drawn(u, dtype):
    """Also at the ends of u's range, and where u times the sum rounds up to the sum."""
    never = -torch.inf
    logits = torch.tensor(
        [[never, 0, never, 0.3, never], [never, 0, never, never, never], [0, never, never, never, never]], dtype=dtype
    ).repeat(1, 200)
    logits[:, 1000 - 4 :] = never
    drawn = sample_tokens(logits, torch.full((3,), u, dtype=dtype))
    assert (logits[torch.arange(3), drawn] > never).all()


# --- The sampler ----------------------------------------------------------------------------------


@pytest.mark.detail(2)
def test_greedy_padded_batch_equals_greedy_single_generation(architecture, make_lm, queries):
    """At temperature → 0 the sampler is greedy; the oracle is Hugging Face's own `generate`, a text at a time."""
    lm = make_lm(architecture)
    tokens, mask = queries
    responses = sample_responses(lm, tokens, mask, max_new_tokens=8, temperature=1e-6, **IDS, generator=generator())
    for row in range(len(tokens)):
        alone = tokens[row][mask[row]][None]
        written = lm.generate(
            alone, attention_mask=torch.ones_like(alone), max_new_tokens=8, do_sample=False, **GENERATE
        )
        assert responses.tokens[row][responses.mask[row]].tolist() == written[0, alone.shape[1] :].tolist()


GENERATE = dict(eos_token_id=EOS, pad_token_id=PAD)


@pytest.mark.detail(4)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_log_probs_are_the_teacher_forced_ones(architecture, temperature, make_lm, queries):
    """The key-value cache, left padding and rows that leave: none of it moves a log-probability by 1e-5."""
    lm = make_lm(architecture)
    tokens, mask = repeated(queries, 30)
    responses = sample_responses(
        lm, tokens, mask, max_new_tokens=7, temperature=temperature, **IDS, generator=generator()
    )
    lengths = responses.mask.sum(dim=1)
    assert lengths.min() < lengths.max(), "rows of one length would prove less"
    for row in range(len(tokens)):
        real = responses.mask[row]
        expected = teacher_forced(
            lm, tokens[row][mask[row]].tolist(), responses.tokens[row][real].tolist(), temperature
        )
        assert responses.log_probs[row][real].tolist() == pytest.approx(expected, abs=1e-5)


def every_response(length):
    """All that sampling can give within `length` tokens of the vocabulary of 8."""
    others = [token for token in range(8) if token != EOS]
    for steps in range(1, length + 1):
        for opening in product(others, repeat=steps - 1):
            yield from ([*opening, last] for last in ([EOS] if steps < length else range(8)))


@pytest.mark.detail(5)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.8])
def test_frequencies_of_whole_responses_equal_exp_log_p_at_that_temperature(temperature, make_lm, tokenizer):
    """All 57 responses of up to two tokens: their probabilities sum to 1 and the counts agree, no top-k or top-p."""
    lm, n, prompt = make_lm(seed=2), 20_000, encode_prompt(tokenizer, "film")
    possible = list(every_response(2))
    probability = torch.tensor([math.exp(sum(teacher_forced(lm, prompt, y, temperature))) for y in possible])
    assert len(possible) == 57 and probability.sum() == pytest.approx(1, abs=1e-6)
    tokens = torch.tensor([prompt]).repeat(n, 1)
    responses = sample_responses(
        lm,
        tokens,
        torch.ones_like(tokens).bool(),
        max_new_tokens=2,
        temperature=temperature,
        **IDS,
        generator=generator(),
    )
    drawn = [row[:real].tolist() for row, real in zip(responses.tokens, responses.mask.sum(1).tolist(), strict=True)]
    index = {tuple(y): i for i, y in enumerate(possible)}
    rows = torch.tensor([index[tuple(y)] for y in drawn])
    torch.testing.assert_close(responses.log_probs.sum(1).exp(), probability[rows], atol=1e-5, rtol=1e-4)
    counts = torch.bincount(rows, minlength=57)
    expected = n * probability
    large = expected > 10
    z = (counts - expected)[large] / (expected * (1 - probability))[large].sqrt()
    assert z.abs().max() < 4.5 and large.sum() > 5
    chi_square = ((counts - expected).square() / expected)[large].sum()
    assert abs(chi_square - large.sum()) < 5 * (2 * large.sum()).sqrt()


@pytest.mark.detail(8)
def test_nothing_follows_eos_and_ended_says_so(make_lm, queries):
    tokens, mask = repeated(queries, 20)
    responses = sample_responses(make_lm(), tokens, mask, max_new_tokens=6, **IDS, generator=generator())
    for row, real, ended in zip(responses.tokens, responses.mask, responses.ended.tolist(), strict=True):
        length = int(real.sum())
        assert real.tolist() == [True] * length + [False] * (len(row) - length)
        assert (row[~real] == PAD).all() and EOS not in row[: length - 1]
        assert ended == (row[length - 1] == EOS)
        assert ended or length == 6
    assert responses.ended.any() and not responses.ended.all()
    assert (responses.log_probs[~responses.mask] == 0).all() and (responses.log_probs[responses.mask] < 0).all()


def test_ended_rows_leave_the_cache(make_lm, queries):
    """Each step reads the rows that go on, and no others."""
    lm, sizes = make_lm(), []
    padding_route(lm)  # tried out once, on a text of its own
    hook = lm.register_forward_pre_hook(
        lambda _, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    tokens, mask = repeated(queries, 20)
    responses = sample_responses(lm, tokens, mask, max_new_tokens=9, **IDS, generator=generator())
    hook.remove()
    assert sizes == responses.mask.sum(dim=0).tolist() and sizes[-1] < sizes[0]


def test_a_neighbour_that_ends_early_changes_no_other_row(architecture, make_lm, queries):
    """With temperature → 0 each row's response is its own: the same alone, and beside neighbours that end sooner."""
    tokens, mask = repeated(queries, 1)
    options = dict(max_new_tokens=10, temperature=1e-6, **IDS, generator=generator())
    for seed in range(20):
        lm = make_lm(architecture, seed=seed)
        together = sample_responses(lm, tokens, mask, **options)
        if together.mask.sum(dim=1).unique().numel() > 1:
            break
    else:
        pytest.fail("no model in which one row ends before another")
    for row in range(len(tokens)):
        alone = sample_responses(lm, tokens[row : row + 1], mask[row : row + 1], **options)
        assert together.tokens[row][together.mask[row]].tolist() == alone.tokens[0].tolist()
        real = together.log_probs[row][together.mask[row]]
        torch.testing.assert_close(real, alone.log_probs[0], atol=1e-5, rtol=0)


def test_one_new_token_and_one_row(make_lm):
    lm = make_lm()
    tokens = torch.tensor([[BOS]])
    responses = sample_responses(lm, tokens, tokens.bool(), max_new_tokens=1, **IDS, generator=generator())
    assert responses.tokens.shape == responses.mask.shape == responses.log_probs.shape == (1, 1)
    expected = teacher_forced(lm, [BOS], responses.tokens[0].tolist())
    assert responses.log_probs[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert responses.mask.all()


def test_sampling_stops_when_every_row_has_ended(make_lm):
    lm = make_lm()
    with torch.no_grad():  # the last hidden state is the norm's bias, whatever the text: EOS follows everything
        lm.transformer.ln_f.weight.zero_()
        lm.transformer.ln_f.bias.copy_(100 * lm.lm_head.weight[EOS])
    tokens = torch.full((4, 2), 5)
    responses = sample_responses(lm, tokens, torch.ones_like(tokens).bool(), max_new_tokens=10, **IDS)
    assert responses.tokens.tolist() == [[EOS]] * 4 and responses.ended.all()


@pytest.mark.detail(7)
def test_gradient_checkpointing_in_training_mode_changes_no_log_probability(architecture, make_lm, queries):
    """In that mode Hugging Face keeps no cache: each token would be read without those before it."""
    lm, options = make_lm(architecture), dict(max_new_tokens=6, **IDS)
    expected = sample_responses(lm, *queries, generator=generator(3), **options)
    lm.gradient_checkpointing_enable()
    lm.train()
    found = sample_responses(lm, *queries, generator=generator(3), **options)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.log_probs, expected.log_probs)
    assert lm.training


def test_answers_stand_by_their_prompts_and_each_prompt_s_together(make_lm, tokenizer):
    """In one batch; `respond` gives the same texts, batch after batch."""
    lm, prompts = make_lm(), ["film", {"prompt": "good film", "label": 3}]
    drawn = [prompt for prompt in prompts for _ in range(3)]
    samples = answers(lm, tokenizer, drawn, max_new_tokens=4, each=3, generator=generator())
    assert samples.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert [record.get("label") for record in samples.records] == [None] * 3 + [3] * 3
    asked, texts = samples.texts(tokenizer)
    assert asked == ["film"] * 3 + ["good film"] * 3 and len(set(texts)) > 1
    assert respond(lm, tokenizer, drawn, max_new_tokens=4, generator=generator()) == texts
    dice = generator()  # of which each part draws its own
    first = [answers(lm, tokenizer, part, max_new_tokens=4, generator=dice) for part in (drawn[:2], drawn[2:4])]
    parts = respond(lm, tokenizer, drawn[:4], max_new_tokens=4, generator=generator(), batch_size=2)
    assert parts == [text for part in first for text in part.texts(tokenizer)[1]]


def test_a_response_ends_at_whatever_end_the_model_names(make_lm, make_policy, make_trainer, tokenizer):
    """A tokenizer has one EOS; a chat model's generation settings may name several."""
    lm = make_lm()
    for named, ids in ((None, [EOS]), (EOS, [EOS]), (5, [EOS, 5]), ([5, EOS, 7], [EOS, 5, 7])):
        lm.generation_config.eos_token_id = named
        assert eos_ids(lm, tokenizer) == ids
    policy = make_policy()
    policy.lm.generation_config.eos_token_id = [EOS, 5, 7]
    batch = make_trainer(policy).rollout()
    ends = torch.isin(batch.responses, torch.tensor([EOS, 5, 7])) & batch.response_mask
    assert torch.equal(ends.any(dim=1), batch.ended) and (ends.sum(dim=1) <= 1).all()
    assert (batch.responses[ends] != EOS).any()
    policy.lm.generation_config.eos_token_id = list(range(8))
    assert all(len(text.split()) <= 1 for text in respond(policy.lm, tokenizer, ["film"] * 20))


def test_ids_without_a_token_are_neither_sampled_nor_scored(make_policy, make_lm, make_trainer, tokenizer):
    """The distribution is over the tokens there are, in policy and reference; texts can be decoded."""
    policy, reference = make_policy(vocab_size=40), make_lm(vocab_size=48, seed=1)
    trainer = make_trainer(policy, reference)
    batch = trainer.rollout()
    assert batch.tokens.max() < 8 and len(trainer.texts(batch)[1]) == 16
    for row, (prompt, response) in enumerate(unpadded(batch)):
        for name, lm in (("log_probs", policy.lm), ("ref_log_probs", reference)):
            logits = lm(torch.tensor([prompt + response])).logits[0, :, :8].double().log_softmax(-1)
            expected = [logits[len(prompt) + t - 1, token].item() for t, token in enumerate(response)]
            found = getattr(batch, name)[row][batch.response_mask[row]].tolist()
            assert found == pytest.approx(expected, abs=1e-5)
    assert respond(make_lm(vocab_size=40), tokenizer, ["film"] * 40, max_new_tokens=8)


class Inexact(Sampler):
    exact = False

    def __init__(self, shift, tolerance):
        self.shift, self.tolerance = shift, tolerance

    def __call__(self, *arguments, **options):
        responses = sample_responses(*arguments, **options)
        return replace(responses, log_probs=responses.log_probs + self.shift * responses.mask)


def test_an_inexact_sampler_s_log_probs_are_held_to_its_tolerance(make_policy, make_lm, queries):
    def roll(shift, tolerance):
        score, options = no_score, dict(config=settings(), kl_coef=0.0, generator=generator(), **IDS)
        sampler = Inexact(shift, tolerance)
        return collect_rollout(make_policy(), make_lm(seed=1), score, *queries, sample=sampler, **options)

    for shift, tolerance in ((0.5, None), (0.5, 0.51), (-0.04, 0.05)):
        batch = roll(shift, tolerance)
        assert (batch.sampler_log_probs - batch.log_probs)[batch.response_mask].mean().item() == pytest.approx(
            shift, abs=1e-4
        )
    with pytest.raises(
        ValueError, match="log-probabilities must be within 0.1 of the policy's own on average; got 0.5"
    ):
        roll(-0.5, 0.1)
    with pytest.raises(ValueError, match="got nan"):
        roll(float("nan"), 0.1)


def test_advantages_are_weighted_by_how_far_the_sampler_was_off(make_trainer, make_policy):
    """Its log-probabilities are too high by .5: each token weighs e^−.5, of which a mask at 1.5 leaves nothing."""

    def rolled(shift, **settings):
        trainer = make_trainer(make_policy(), **settings)
        if shift is not None:
            trainer.sampler = Inexact(shift, None)
        metrics = trainer.step()
        return trainer.batch, metrics

    exact, metrics = rolled(None)
    assert "sampler_error" not in metrics
    assert torch.equal(exact.advantages, rolled(None, sampler_correction="none")[0].advantages), "1, to the bit"
    for settings, weight in (
        ({}, math.exp(-0.5)),
        (dict(sampler_correction="none"), 1),
        (dict(sampler_correction="mask"), math.exp(-0.5)),
        (dict(sampler_correction="mask", sampler_cap=1.5), 0),
        (dict(sampler_correction_level="sequence"), (-0.5 * exact.response_mask.sum(dim=1, keepdim=True)).exp()),
    ):
        batch, metrics = rolled(0.5, **settings)
        torch.testing.assert_close(batch.advantages, exact.advantages * weight, atol=1e-5, rtol=1e-4)
        assert metrics["sampler_error"] == pytest.approx(0.5, abs=1e-5)
    batch, _ = rolled(-2.0)
    torch.testing.assert_close(batch.advantages, exact.advantages * 2, atol=1e-5, rtol=1e-4)  # e², cut off at 2


def test_a_ratio_that_is_not_one_stops_the_first_update(make_trainer, make_policy):
    """Before any step; later iterations are not asked, nor a trainer that overrides the guard."""

    def cold(*arguments, temperature, **options):
        return sample_responses(*arguments, temperature=0.9 * temperature, **options)

    def made():
        trainer = make_trainer(make_policy())
        trainer.sampler = cold
        return trainer, [p.detach().clone() for p in trainer.policy.parameters()]

    trainer, before = made()
    with pytest.raises(
        ValueError, match=r"ratio - 1\| must be at most 0.001 on average .* from GPT2LMHeadModel: look for"
    ):
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))
    trainer, _ = made()
    trainer.iteration = 1
    assert trainer.step()["first_ratio_error"] > 1e-3
    trainer, _ = made()
    trainer.check_first_ratio = lambda report: None
    assert trainer.step()["first_ratio_error"] > 1e-3


@pytest.mark.parametrize(
    ("error", "settings", "dtype", "passes"),
    [
        (9e-4, {}, torch.float32, True),
        (2e-3, {}, torch.float32, False),
        (4e-2, dict(precision="bf16"), torch.float32, True),
        (4e-2, {}, torch.bfloat16, True),
        (6e-2, {}, torch.bfloat16, False),
    ],
)
def test_how_far_from_one_a_ratio_may_be_depends_on_the_precision(error, settings, dtype, passes, make_trainer):
    trainer = make_trainer(**settings)
    trainer.policy.to(dtype)
    with contextlib.nullcontext() if passes else pytest.raises(ValueError, match="before the first update"):
        trainer.check_first_ratio({"ratio_error": torch.tensor(error)})


def test_a_policy_in_16_bits_trains(make_trainer, make_policy, make_lm, make_reward_model):
    models = (make_policy(head=0.1), make_lm(seed=1), make_reward_model())
    metrics = make_trainer(*(model.to(torch.bfloat16) for model in models)).step()
    assert metrics["first_ratio_error"] < 5e-2 and math.isfinite(metrics["loss"])


def test_models_that_cannot_learn_or_read_are_refused_when_the_trainer_is_made(
    make_trainer, make_policy, make_lm, make_reward_model, make_tokenizer
):
    frozen = make_policy()
    frozen.lm.requires_grad_(False)
    with pytest.raises(ValueError, match="policy must have parameters to train in its language model; got none"):
        make_trainer(frozen)
    small = dict(vocab_size=7)
    for parts in ((make_policy(**small),), (None, make_lm(**small)), (None, None, make_reward_model(**small))):
        with pytest.raises(ValueError, match="tokenizer must have ids below 7, the rows of GPT2.*; got 7"):
            make_trainer(*parts)
    noisy = make_policy()
    noisy.lm.transformer.drop.forward = lambda x: torch.nn.functional.dropout(
        x, 0.5, noisy.lm.transformer.drop.training
    )
    with pytest.raises(
        ValueError, match="same log-probability in a padded batch in training mode as in its text alone"
    ):
        make_trainer(noisy)


def test_right_padded_prompts_are_refused(make_lm):
    tokens, mask = pad([[1, 4], [1, 4, 6]], PAD, side="right")
    with pytest.raises(ValueError, match="pad prompts on the left"):
        sample_responses(make_lm(), tokens, mask, max_new_tokens=2, **IDS)


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"temperature": -1.0}, {"temperature": math.nan},
                                   {"max_new_tokens": 0}, {"max_new_tokens": -2}])  # fmt: skip
def test_what_nothing_can_be_drawn_with_is_refused(wrong, make_lm, queries):
    with pytest.raises(ValueError, match="temperature and max_new_tokens must be above 0; got .* and "):
        sample_responses(make_lm(), *queries, **({"max_new_tokens": 2} | wrong), **IDS)


def test_float64_models_sample_in_float64(make_lm, queries):
    lm = make_lm().double()
    responses = sample_responses(lm, *queries, max_new_tokens=5, temperature=0.8, **IDS, generator=generator())
    assert responses.log_probs.dtype == torch.float64
    tokens, mask = queries
    for row in range(3):
        real = responses.mask[row]
        expected = teacher_forced(lm, tokens[row][mask[row]].tolist(), responses.tokens[row][real].tolist(), 0.8)
        assert responses.log_probs[row][real].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_same_seed_draws_the_same_and_another_does_not(make_lm, queries):
    tokens, mask = repeated(queries, 8)
    draw = lambda seed: sample_responses(  # noqa: E731
        make_lm(), tokens, mask, max_new_tokens=6, **IDS, generator=generator(seed)
    )
    assert torch.equal(draw(0).tokens, draw(0).tokens)
    first, second = draw(0).tokens, draw(1).tokens
    assert first.shape != second.shape or not torch.equal(first, second)


# --- Scoring the same tokens ----------------------------------------------------------------------


@pytest.mark.detail(4)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_batch_holds_the_models_outputs_before_each_token(
    architecture, critic, temperature, make_policy, make_lm, queries
):
    """log-probabilities of policy and reference at the sampling temperature, and the value of the state before."""
    policy, reference = make_policy(architecture, critic=critic, head=1.0), make_lm(architecture, seed=1)
    batch = roll_out(policy, reference, queries, temperature=temperature)
    for row, (prompt, response) in enumerate(unpadded(batch)):
        real = batch.response_mask[row]
        ids = torch.tensor([prompt + response])
        values = policy(ids, torch.ones_like(ids)).values[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(batch.values[row][real], values, atol=1e-5, rtol=1e-5)
        for name, lm in (("log_probs", policy.lm), ("ref_log_probs", reference)):
            expected = teacher_forced(lm, prompt, response, temperature)
            assert getattr(batch, name)[row][real].tolist() == pytest.approx(expected, abs=1e-5)
    for name in ("log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns"):
        assert (getattr(batch, name)[~batch.response_mask] == 0).all()


@pytest.mark.detail(7)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_one_before_the_first_update(architecture, temperature, make_policy, make_lm, queries):
    """max |ρ − 1| < 1e-5 in float32, in train mode, all four architectures."""
    policy = make_policy(architecture)
    batch = roll_out(policy, make_lm(architecture, seed=1), queries, temperature=temperature)
    logits, _ = policy_outputs(
        policy.train(), batch.tokens, batch.attention_mask, length=batch.responses.shape[1], temperature=temperature
    )
    new = logits.log_softmax(-1).gather(-1, batch.responses[..., None]).squeeze(-1)
    assert ((new - batch.log_probs).exp() - 1)[batch.response_mask].abs().max() < 1e-5


def test_reference_and_policy_are_scored_alike(make_policy, queries):
    policy = make_policy()
    tokens, mask = torch.cat([queries[0]] * 2, dim=1), torch.cat([queries[1], torch.ones_like(queries[1])], dim=1)
    of_policy, _ = policy_outputs(policy, tokens, mask, length=4, temperature=0.5)
    of_reference = reference_logits(policy.lm, tokens, mask, length=4, temperature=0.5)
    torch.testing.assert_close(of_policy, of_reference, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(of_policy[2], 2 * policy.lm(tokens[2:]).logits[0, 3:7], atol=1e-5, rtol=1e-5)


def test_scoring_does_not_depend_on_the_size_of_its_pieces(make_policy, make_lm, queries):
    policy, reference = make_policy(head=1.0), make_lm(seed=1)
    score = lambda tokens, attention_mask, response_mask: tokens.sum(1).float()  # noqa: E731
    whole = roll_out(policy, reference, queries, score, kl_coef=0.1)
    pieces = roll_out(policy, reference, queries, score, kl_coef=0.1, gradient_accumulation_steps=8)
    assert torch.equal(whole.tokens, pieces.tokens) and torch.equal(whole.scores, pieces.scores)
    for name in ("values", "ref_log_probs", "rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(whole, name), getattr(pieces, name), atol=1e-5, rtol=1e-5)


@pytest.mark.detail(8)
@pytest.mark.parametrize("kind", ["reward model", "function"])
def test_tokens_after_eos_cannot_change_the_score(kind, make_trainer, make_reward_model, make_batch):
    """Whatever stands behind a response's end, a reward model and a function of the texts score the same."""
    batch = make_batch([2, 5, 4, 6])

    def vowels(prompts, responses):
        return [
            1.0 * sum(letter in "aeiou" for letter in prompt + response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    trainer = make_trainer(score_fn=make_reward_model() if kind == "reward model" else vowels)
    noise = torch.where(batch.attention_mask, batch.tokens, 7)
    assert not torch.equal(noise, batch.tokens)
    before, after = (trainer.scorer(replace(batch, tokens=tokens)) for tokens in (batch.tokens, noise))
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)
    assert before.unique().numel() > 2


@pytest.mark.detail(8)
def test_a_score_function_reads_the_text_up_to_eos(make_trainer):
    """Prompts and responses as words, one for each row and in order, EOS and padding stripped.

    A begin token that the policy wrote itself is part of its response.
    """
    seen = []

    def score(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return [0.0] * len(prompts)

    trainer = make_trainer(score_fn=score)
    batch = trainer.rollout()
    names = ["<pad>", "<bos>", "<eos>", "<unk>", "good", "bad", "film", "."]
    for (prompt, response), (prompt_ids, response_ids) in zip(seen, unpadded(batch), strict=True):
        assert prompt.split() == [names[token] for token in prompt_ids[1:]]
        assert response.split() == [names[token] for token in response_ids if token != EOS]
        assert response == response.strip()
    assert trainer.texts(batch) == ([prompt for prompt, _ in seen], [response for _, response in seen])


# --- Rewards and advantages -----------------------------------------------------------------------


@pytest.mark.detail(9)
@pytest.mark.parametrize(
    ("mode", "expected"), [("subtract", [2.0, 1.25, -3.0, -1.75]), ("replace", [2.0, -0.75, -3.0, -0.75])]
)
def test_missing_eos_costs_the_penalty_or_replaces_the_score(mode, expected):
    scores, ended = torch.tensor([2.0, 2.0, -3.0, -1.0]), torch.tensor([True, False, True, False])
    assert missing_eos_scores(scores, ended, penalty=0.75, mode=mode).tolist() == expected


def test_missing_eos_mode_is_checked():
    with pytest.raises(ValueError, match='mode must be "subtract" or "replace"; got \'clip\''):
        missing_eos_scores(torch.zeros(1), torch.ones(1).bool(), penalty=1.0, mode="clip")


def length_score(tokens, attention_mask, response_mask):
    """A score that differs between rows."""
    return 1.0 + response_mask.sum(dim=1).float()


@pytest.mark.detail(9)
@pytest.mark.parametrize("mode", ["subtract", "replace"])
def test_rollout_charges_rows_without_eos(mode, make_policy, make_lm, queries):
    batch = roll_out(
        make_policy(), make_lm(seed=1), queries, length_score, missing_eos_penalty=0.5, missing_eos_mode=mode
    )
    assert batch.ended.any() and not batch.ended.all()
    for row, (_, response) in enumerate(unpadded(batch)):
        given = 1.0 + len(response)
        charged = given - 0.5 if mode == "subtract" else -0.5
        assert bool(batch.ended[row]) == (response[-1] == EOS)
        assert batch.scores[row] == (given if response[-1] == EOS else charged)


@pytest.mark.detail(10)
@pytest.mark.detail(20)
def test_score_stands_on_the_last_real_token_only(make_policy, make_lm, queries):
    """γ = 1, λ = 0.95, V = 0, β = 0: the last token's advantage is the score, k tokens earlier 0.95^k of it."""
    batch = roll_out(make_policy(), make_lm(seed=1), queries, length_score, gamma=1.0, gae_lambda=0.95)
    for row, (_, response) in enumerate(unpadded(batch)):
        score, length = 1.0 + len(response), len(response)
        assert batch.rewards[row, :length].tolist() == [0.0] * (length - 1) + [score]
        expected = [0.95 ** (length - 1 - t) * score for t in range(length)]
        assert batch.advantages[row, :length].tolist() == pytest.approx(expected, rel=1e-5)
        assert batch.returns[row, :length].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.detail(11)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rewards_sum_to_score_minus_beta_times_log_ratio(temperature, make_policy, make_lm, queries):
    """Σ r_t = score − β (log P − log P_ref), the two from teacher forcing; each token pays for itself."""
    policy, reference = make_policy(), make_lm(seed=1)
    batch = roll_out(policy, reference, queries, length_score, kl_coef=0.3, temperature=temperature)
    for row, (prompt, response) in enumerate(unpadded(batch)):
        own = teacher_forced(policy.lm, prompt, response, temperature)
        other = teacher_forced(reference, prompt, response, temperature)
        per_token = [-0.3 * (a - b) for a, b in zip(own, other, strict=True)]
        assert batch.rewards[row].sum().item() == pytest.approx(1.0 + len(response) + sum(per_token), abs=1e-4)
        assert batch.rewards[row, : len(response) - 1].tolist() == pytest.approx(per_token[:-1], abs=1e-5)


def slow_gae(rewards, values, gamma, lam):
    """The definition, in Python's floats: Â_t = Σ_k (γλ)^k (r + γ V' − V), V after the end 0."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.detail(14)
@pytest.mark.detail(34)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_advantages_and_returns_follow_each_response_alone(gamma, lam, make_policy, make_lm, queries):
    """The critic's value after the last token is 0; returns are Â + V before whitening; padding leaks nothing."""
    policy, reference = make_policy(head=1.0), make_lm(seed=1)
    options = dict(kl_coef=0.1, gamma=gamma, gae_lambda=lam)
    batch = roll_out(policy, reference, queries, length_score, **options)
    expected = []
    for row, (_, response) in enumerate(unpadded(batch)):
        values = batch.values[row, : len(response)].tolist()
        expected.append(slow_gae(batch.rewards[row, : len(response)].tolist(), values, gamma, lam))
        assert batch.advantages[row, : len(response)].tolist() == pytest.approx(expected[-1], abs=1e-4)
        targets = [a + v for a, v in zip(expected[-1], values, strict=True)]
        assert batch.returns[row, : len(response)].tolist() == pytest.approx(targets, abs=1e-4)
    white = roll_out(policy, reference, queries, length_score, whiten_advantages=True, **options)
    assert torch.equal(white.returns, batch.returns)


@pytest.mark.detail(15)
def test_whitened_advantages_have_mean_0_and_variance_1_over_real_tokens(make_policy, make_lm, queries):
    policy, reference = make_policy(head=1.0), make_lm(seed=1)
    raw = roll_out(policy, reference, queries, length_score, kl_coef=0.1)
    white = roll_out(policy, reference, queries, length_score, kl_coef=0.1, whiten_advantages=True)
    real = raw.advantages[raw.response_mask].double()
    expected = (real - real.mean()) / (real.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(white.advantages[white.response_mask].double(), expected, atol=1e-5, rtol=1e-5)
    assert white.advantages[white.response_mask].mean().abs() < 1e-6
    assert (white.advantages[~white.response_mask] == 0).all()


@pytest.mark.detail(16)
def test_normalised_scores_have_variance_1_and_keep_their_mean(make_policy, make_lm, queries):
    """In the rewards; the batch's `scores` stay as they were given."""
    batch = roll_out(make_policy(), make_lm(seed=1), queries, length_score, normalize_scores=True)
    shown = batch.rewards.sum(dim=1)
    assert shown.mean().item() == pytest.approx(batch.scores.mean().item(), rel=1e-5)
    assert shown.var(correction=0).item() == pytest.approx(1.0, rel=1e-4)
    assert batch.scores.tolist() == [1.0 + length for length in batch.response_mask.sum(dim=1).tolist()]
    assert batch.scores.var(correction=0) > 1.2, "scores of variance 1 to begin with would prove nothing"


@pytest.mark.detail(25)
def test_a_sampled_response_and_the_same_text_encoded_have_the_same_ids(make_policy, make_lm, queries, tokenizer):
    """What the reward model reads in training is what it scores in a rollout, EOS included."""
    batch = roll_out(make_policy(seed=3), make_lm(seed=1), queries, times=200)
    words = 0
    for prompt, response in unpadded(batch):
        if response[-1] != EOS or any(token < 4 for token in response[:-1]):
            continue  # cut off, or the random policy wrote a special token, which no text contains
        words += len(response) > 1
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, response)]
        assert encode_prompt(tokenizer, texts[0]) + encode_response(tokenizer, *texts) == prompt + response
    assert words > 2


def test_nothing_in_a_batch_carries_a_gradient(make_policy, make_lm, queries):
    policy = make_policy(head=1.0).train()
    batch = roll_out(policy, make_lm(seed=1), queries, length_score, kl_coef=0.1, whiten_advantages=True)
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 13
    assert not any(tensor.requires_grad for tensor in tensors.values())


# --- Minibatches ----------------------------------------------------------------------------------


@pytest.mark.detail(35)
def test_each_pass_shuffles_afresh_and_visits_every_row_once(make_batch):
    batch, source = make_batch([3] * 12), generator()
    orders = []
    for _ in range(3):
        scores = torch.cat([minibatch.scores for minibatch in batch.minibatches(4, source)])
        orders.append([batch.scores.tolist().index(score) for score in scores.tolist()])
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != list(range(12))


def test_minibatches_without_a_generator_keep_the_order_and_all_fields(make_batch):
    batch = make_batch([3, 1, 2, 3, 2])
    pieces = list(batch.minibatches(2))
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), value)
        elif name == "records":
            assert sum((piece.records for piece in pieces), ()) == value
        else:
            assert all(getattr(piece, name) == value for piece in pieces)


def test_a_batch_is_frozen(make_batch):
    with pytest.raises(AttributeError):
        make_batch([2, 3]).tokens = torch.zeros(1)


def test_responses_are_what_follows_the_prompt(make_batch):
    batch = make_batch([2, 3], prompt_length=4)
    assert batch.responses.shape == (2, 3) and torch.equal(batch.responses, batch.tokens[:, 4:])


def test_sampler_calls_the_model_with_the_positions_of_real_tokens(queries):
    """Position ids count from the first real token, through the prompt and every step after it."""
    asked = []

    class Model(torch.nn.Module):
        dtype, config = torch.float32, SimpleNamespace()

        def forward(self, input_ids, position_ids, past_key_values, logits_to_keep):
            raise NotImplementedError

        def __call__(self, input_ids, attention_mask, past_key_values, use_cache, logits_to_keep, position_ids):
            asked.append(position_ids.tolist())
            return SimpleNamespace(logits=torch.zeros(len(input_ids), 1, 8).index_fill(2, torch.tensor([4]), 50.0))

    class Cache:
        layers = ()

        def __init__(self, config):
            pass

        def get_seq_length(self):
            return 4 + len(asked) - 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.DynamicCache", Cache)
        sample_responses(Model(), *queries, max_new_tokens=3, **IDS)
    assert asked == [[[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3]], [[2], [3], [4]], [[3], [4], [5]]]


class Renamed(GPT2LMHeadModel):
    """Takes its cache under the name that transformers gives it from 5.24 on."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, **options):
        given = dict(attention_mask=attention_mask, position_ids=position_ids)
        name = "cache" if takes(GPT2LMHeadModel, "cache") else "past_key_values"
        return super().forward(input_ids, **given, **options, **{name: cache})


@pytest.mark.parametrize("model_class", [GPT2LMHeadModel, Renamed])
@pytest.mark.parametrize("sampler", [sample_responses, StaticSampler()])
def test_every_token_is_read_once(model_class, sampler, make_config, queries):
    lm, read = model_class(make_config()).eval(), []
    padding_route(lm)  # which is tried out once
    lm.register_forward_pre_hook(lambda lm, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True)
    sampler(lm, *queries, max_new_tokens=5, generator=generator(3), eos_id=-1, pad_id=0)
    assert read[0] >= queries[0].shape[1] and read[1:] == [1] * 4


class Forgetful(GPT2LMHeadModel):
    """Takes a cache and leaves it empty."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **options):
        given = dict(attention_mask=attention_mask, position_ids=position_ids)
        return super().forward(input_ids, **given, **options | {"use_cache": False})


def test_a_model_that_keeps_no_cache_is_given_the_whole_text(make_lm, queries):
    lm = make_lm()
    forgetful = Forgetful(lm.config).eval()
    forgetful.load_state_dict(lm.state_dict())
    expected, found = (
        sample_responses(model, *queries, max_new_tokens=5, generator=generator(3), **IDS) for model in (lm, forgetful)
    )
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=1e-5)
