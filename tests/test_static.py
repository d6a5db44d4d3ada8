"""Decoding with fixed shapes, uncaptured on the CPU: the same responses as the sampler whose rows leave."""

import pytest
import torch
from sampling import EOS, IDS, PAD, generator, repeated, teacher_forced
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lessons import forward
from rlhf_lessons.device import autocast
from rlhf_lessons.engines import static
from rlhf_lessons.engines.static import StaticDecoder, StaticSampler
from rlhf_lessons.forward import takes_ready_masks
from rlhf_lessons.generation import draw_uniforms
from rlhf_lessons.rollout import sample_responses

NEVER = dict(eos_id=-1, pad_id=PAD)  # no row ends


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("ids", [NEVER, IDS, IDS | {"eos_id": [EOS, 5]}], ids=["no end", "one end", "two ends"])
def test_a_seed_draws_the_same_tokens_with_either_sampler(architecture, temperature, ids, make_lm, queries):
    lm, (tokens, mask) = make_lm(architecture), repeated(queries, 10)
    options = dict(max_new_tokens=9, temperature=temperature, **ids)
    dynamic = sample_responses(lm, tokens, mask, generator=generator(), **options)
    static = StaticSampler()(lm, tokens, mask, generator=generator(), **options)
    assert torch.equal(static.tokens, dynamic.tokens) and torch.equal(static.mask, dynamic.mask)
    assert torch.equal(static.ended, dynamic.ended)
    torch.testing.assert_close(static.log_probs, dynamic.log_probs, atol=1e-5, rtol=0)


def test_log_probs_of_rows_that_end_are_the_teacher_forced_ones(architecture, make_lm, queries):
    lm, (tokens, mask) = make_lm(architecture), repeated(queries, 20)
    responses = StaticSampler()(lm, tokens, mask, max_new_tokens=7, temperature=0.8, generator=generator(), **IDS)
    lengths = responses.mask.sum(dim=1)
    assert lengths.min() < lengths.max() == responses.tokens.shape[1]
    for row in range(len(tokens)):
        real = responses.mask[row]
        response = responses.tokens[row][real].tolist()
        assert real.tolist() == [True] * len(response) + [False] * (len(real) - len(response))
        assert (EOS in response[-1:]) == bool(responses.ended[row]) and EOS not in response[:-1]
        assert (responses.tokens[row][~real] == PAD).all() and (responses.log_probs[row][~real] == 0).all()
        expected = teacher_forced(lm, tokens[row][mask[row]].tolist(), response, 0.8)
        assert responses.log_probs[row][real].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_decoder_forgets_the_batch_before(make_lm, queries):
    """The second batch of a decoder, other prompts, equals the first batch of a fresh one."""
    lm, (tokens, mask) = make_lm(), repeated(queries, 4)
    options = dict(max_new_tokens=6, temperature=1.0, **IDS)
    first, second = (draw_uniforms(len(tokens), 6, generator=generator(seed)) for seed in (0, 5))
    used = StaticDecoder(lm, *tokens.shape, **options)
    with torch.no_grad():
        used.sample(tokens, mask, first)
        again = used.sample(tokens.flip(0), mask.flip(0), second)
        fresh = StaticDecoder(lm, *tokens.shape, **options).sample(tokens.flip(0), mask.flip(0), second)
    assert torch.equal(again.tokens, fresh.tokens) and torch.equal(again.log_probs, fresh.log_probs)
    assert torch.equal(again.mask, fresh.mask) and torch.equal(again.ended, fresh.ended)


def test_a_decoder_reads_the_weights_of_today(make_lm, queries):
    """An update in place shows in the next batch; nothing of the model is kept."""
    lm, sample, draw = make_lm(), StaticSampler(), generator()
    options = dict(max_new_tokens=5, temperature=0.9, **NEVER)
    sample(lm, *queries, generator=draw, **options)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.1)
    after = sample(lm, *queries, generator=draw.manual_seed(3), **options)
    assert len(sample.decoders) == 1
    dynamic = sample_responses(lm, *queries, generator=generator(3), **options)
    assert torch.equal(after.tokens, dynamic.tokens)
    torch.testing.assert_close(after.log_probs, dynamic.log_probs, atol=1e-5, rtol=0)


def test_shapes_share_a_decoder_and_prompts_are_padded_to_few_widths(make_lm, queries):
    lm, sample, draw = make_lm(), StaticSampler(), generator()
    tokens, mask = queries
    for width in (4, 3, 4):
        sample(lm, tokens[:, -width:], mask[:, -width:], max_new_tokens=3, generator=draw, **IDS)
    assert len(sample.decoders) == 1
    assert next(iter(sample.decoders.values())).prompt_length == static.PROMPT_MULTIPLE


class Looks(TorchDispatchMode):
    """Notes every operation for which the host would wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.__name__.partition(".")[0]
        if name.startswith(self.WAITS):
            self.seen.append(name)
        return operation(*args, **(kwargs or {}))


@torch.no_grad()
def test_no_step_reads_a_value_on_the_host(architecture, make_lm, queries):
    decoder = StaticDecoder(make_lm(architecture), *queries[0].shape, max_new_tokens=5, temperature=1.0, **IDS)
    decoder.read_prompts(*queries)
    with Looks() as looks:
        decoder.step()
        decoder.step()
    assert looks.seen == []
    with Looks() as looks:  # the other sampler does, so the test can see it
        sample_responses(make_lm(architecture), *queries, max_new_tokens=3, generator=generator(), **IDS)
    assert looks.seen


def test_every_step_works_at_the_same_addresses(make_lm, queries):
    """What a graph replays it replays in place: no buffer may be replaced by another."""
    decoder = StaticDecoder(make_lm(), *queries[0].shape, max_new_tokens=5, temperature=1.0, **IDS)
    uniforms = draw_uniforms(len(queries[0]), 5)

    def addresses():
        own = {name: value for name, value in vars(decoder).items() if isinstance(value, torch.Tensor)}
        cached = [x for layer in decoder.cache.layers for x in (layer.keys, layer.values, layer.cumulative_length)]
        return [x.data_ptr() for x in (*own.values(), *cached)]

    with torch.no_grad():
        decoder.sample(*queries, uniforms)
        before = addresses()
        decoder.sample(*queries, uniforms)
    assert addresses() == before and len(before) >= 8


def test_models_with_windows_or_without_position_ids_keep_the_other_sampler(make_lm, queries):
    windowed = make_lm("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0)
    bloom = make_lm("bloom", hidden_size=32, n_layer=2, n_head=2)
    assert takes_ready_masks(make_lm()) and not takes_ready_masks(windowed) and not takes_ready_masks(bloom)
    for lm in (windowed, bloom):
        sample = StaticSampler()
        options = dict(max_new_tokens=7, **IDS)
        assert torch.equal(
            sample(lm, *queries, generator=generator(), **options).tokens,
            sample_responses(lm, *queries, generator=generator(), **options).tokens,
        )
        assert not sample.decoders


def test_a_trainer_learns_the_same_from_either_sampler(make_trainer):
    """One iteration with each: the same batch and the same losses."""
    results = []
    for sample in (sample_responses, StaticSampler()):
        trainer = make_trainer(max_new_tokens=5)
        trainer.sampler = sample
        results.append((trainer.step(), trainer.batch))
    (dynamic, first), (static, second) = results
    assert torch.equal(first.responses, second.responses)
    for name in ("loss", "policy_loss", "value_loss", "entropy", "approx_kl", "kl"):
        assert static[name] == pytest.approx(dynamic[name], abs=1e-4), name
    assert static["first_ratio_error"] < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_graph_gives_the_steps_uncaptured_log_probs(make_lm, queries):
    """On the GPU: recorded log-probabilities of two batches, the second replayed after an update, teacher-forced."""
    lm, sample, draw = make_lm().cuda(), StaticSampler(), generator()
    tokens, mask = repeated(queries, 20)
    for _ in range(2):
        responses = sample(lm, tokens.cuda(), mask.cuda(), max_new_tokens=12, generator=draw, **IDS)
        on_cpu = make_lm()
        on_cpu.load_state_dict(lm.state_dict())
        for row in range(len(tokens)):
            real = responses.mask[row]
            expected = teacher_forced(on_cpu, tokens[row][mask[row]].tolist(), responses.tokens[row][real].tolist(), 1)
            assert responses.log_probs[row][real].tolist() == pytest.approx(expected, abs=1e-3)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.mul_(1.05)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_ready_mask_gives_what_the_models_own_gives(architecture, side, make_policy, queries, monkeypatch):
    """What a GPU is given, here on the CPU: logits, values, and a whole pass without a look at the mask."""
    policy, (tokens, mask) = make_policy(architecture, head=1.0), queries
    if side == "right":
        tokens, mask = tokens.flip(1), mask.flip(1)
    logits, values = policy(tokens, mask)
    policy.values(tokens, mask)  # how either reads padding is tried out when it first reads, and looked at
    monkeypatch.setattr(
        forward,
        "mask_arguments",
        lambda model, mask: {"attention_mask": forward.ready_mask(mask)} | forward.position_arguments(model, mask),
    )
    with Looks() as looks:
        ready = policy(tokens, mask)
        only_values = policy.values(tokens, mask)
    assert looks.seen == []
    torch.testing.assert_close(ready.logits[mask], logits[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ready.values[mask], values[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(only_values[mask], values[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@torch.no_grad()
def test_values_alone_are_those_beside_the_logits(architecture, critic, make_policy, queries):
    policy = make_policy(architecture, critic=critic, head=1.0)
    for keep in (0, 2):
        both = policy(*queries, logits_to_keep=keep).values
        torch.testing.assert_close(policy.values(*queries, keep=keep), both, atol=1e-6, rtol=1e-6)
    assert both.shape == (3, 2) and both.abs().min() > 0


@pytest.mark.parametrize("static", [False, True])
def test_in_bf16_the_first_ratio_is_one_within_two_percent(static, make_trainer, make_policy, make_lm):
    """Sampled and scored under autocast, log-probabilities and losses in float32: mean |ρ − 1| < 0.02."""
    size = dict(n_embd=128, n_layer=4, n_head=4, initializer_range=0.05)
    trainer = make_trainer(
        make_policy(head=0.1, **size), make_lm(seed=1, **size), precision="bf16", batch_size=64, minibatch_size=64
    )
    trainer.sampler = StaticSampler() if static else sample_responses
    metrics, batch = trainer.step(), trainer.batch
    assert metrics["first_ratio_error"] < 0.02
    assert {x.dtype for x in (batch.log_probs, batch.ref_log_probs, batch.values, batch.rewards)} == {torch.float32}
    with autocast(trainer.device, trainer.config.precision):
        assert trainer.losses(batch)[0].dtype == torch.float32
        assert trainer.policy.lm(batch.tokens).logits.dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpus_float32_step_is_the_cpus(make_trainer):
    """The same batch, the same losses and the same parameters after one optimiser step."""
    on_cpu, on_gpu = (make_trainer(device=device, ppo_epochs=1, minibatch_size=16) for device in ("cpu", "cuda"))
    on_gpu.policy.load_state_dict(on_cpu.policy.state_dict())
    batch = on_cpu.rollout()
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in vars(batch).items()}
    expected, got = on_cpu.update(batch).reports[0], on_gpu.update(type(batch)(**moved)).reports[0]
    for name in expected:
        assert float(got[name]) == pytest.approx(float(expected[name]), abs=1e-4), name
    for mine, theirs in zip(on_gpu.policy.parameters(), on_cpu.policy.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, atol=2e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampler", [sample_responses, StaticSampler()], ids=["plain", "captured"])
@pytest.mark.parametrize(("precision", "limit"), [("no", 1e-5), ("bf16", 2e-2)])
def test_on_the_gpu_the_first_ratio_is_one(make_trainer, sampler, precision, limit):
    trainer = make_trainer(device="cuda", precision=precision)
    trainer.sampler = sampler
    for _ in range(3):
        assert trainer.step()["first_ratio_error"] < limit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu_the_captured_sampler_draws_the_plain_ones_tokens(make_lm, queries):
    """Greedily, by a temperature that leaves one choice, and by the same uniform numbers."""
    lm, (tokens, mask) = make_lm().cuda(), (x.cuda() for x in repeated(queries, 20))
    for temperature in (1e-4, 1.0):
        options = dict(max_new_tokens=12, temperature=temperature, **IDS)
        plain, captured = (
            s(lm, tokens, mask, generator=generator(), **options) for s in (sample_responses, StaticSampler())
        )
        assert torch.equal(plain.mask, captured.mask[:, : plain.mask.shape[1]])
        assert torch.equal(plain.tokens[plain.mask], captured.tokens[captured.mask])
