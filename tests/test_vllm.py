"""vLLM as a sampler, and in its place, where it is not installed, a double: whole texts read anew for every token.

The double has what the sampler has to reckon with: weights of its own, a memory of what it has read, global state that
it changes. `make vllm` runs the same tests on vLLM itself.
"""

import argparse
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import PAD, PROMPTS, SMALL, count_good, tiny_lm, tiny_policy, tiny_trainer, word_tokenizer
from sampling import EOS, IDS, generator, repeated, teacher_forced

from rlhf_lessons import adapters
from rlhf_lessons.app.options import build_parser, settings_from
from rlhf_lessons.app.pipeline import sampler_named
from rlhf_lessons.config import RLOOConfig
from rlhf_lessons.engines import vllm
from rlhf_lessons.engines.vllm import VLLMSampler
from rlhf_lessons.group_trainers import RLOOTrainer
from rlhf_lessons.models import bar_unused_ids

ENDS = IDS | {"eos_id": [EOS, 7]}
ONE_HEAD = {"gpt2": dict(n_head=1), "llama": dict(num_attention_heads=1), "qwen2": dict(num_attention_heads=1)}  # 32
CACHE = dict(kv_cache_memory_bytes=2**26)
MODULE = "vllm.sampling_params"  # of a package; a folder of that name would be importable too


class Model:
    """The double's model, that makes its logits in a method that can be replaced."""

    def __init__(self, lm):
        self.lm = lm

    def compute_logits(self, ids):
        return self.lm(torch.tensor([ids]), use_cache=False).logits[:, -1]


class Double:
    """`vllm.LLM`, as far as the sampler asks of it."""

    def __init__(self, folder, *, dtype, load_format, logprobs_mode, skip_tokenizer_init, **options):
        from transformers import AutoConfig, AutoModelForCausalLM

        assert (load_format, logprobs_mode, skip_tokenizer_init) == ("dummy", "processed_logprobs", True)
        torch.manual_seed(99)  # not the seed of a policy here
        torch.set_num_threads = lambda number: None
        config = AutoConfig.from_pretrained(folder)
        self.model = Model(AutoModelForCausalLM.from_config(config).to(dtype).eval())
        self.read, self.model_config = {}, SimpleNamespace(dtype=dtype)
        self.fits = config.hidden_size % (32 * config.num_attention_heads) == 0

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights"
        self.model.lm.load_state_dict(dict(kwargs["weights_iterator"]))

    def reset_prefix_cache(self):
        self.read.clear()

    def apply_model(self, function):
        function(self.model)

    def generate(self, prompts, asked, *, use_tqdm):
        assert not use_tqdm and not torch.is_autocast_enabled("cpu")
        if not self.fits:
            raise RuntimeError("head_dim=16")
        if not isinstance(prompts, list):
            prompts, asked = [prompts], [asked]
        return [self.answer(x["prompt_token_ids"], options) for x, options in zip(prompts, asked, strict=True)]

    @torch.no_grad()
    def answer(self, prompt, options):
        dice, ids, steps, reason = random.Random(options.seed), [], [], "length"
        torch.rand(1)  # vLLM draws from the global generator too, what it then replaces by a seed's
        for _ in range(options.max_tokens):
            text = tuple(prompt + ids)
            if text not in self.read:
                self.read[text] = self.model.compute_logits(list(text))[0].float()
            log_probs = (self.read[text] / options.temperature).log_softmax(-1)
            ids.append(dice.choices(range(len(log_probs)), log_probs.exp().tolist())[0])
            steps.append({ids[-1]: SimpleNamespace(logprob=log_probs[ids[-1]].item())})
            if ids[-1] in options.stop_token_ids:
                reason = "stop"
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids), logprobs=steps, finish_reason=reason)])


class Asked:
    """`vllm.SamplingParams`, as far as it is asked for here."""

    def __init__(self, max_tokens, *, temperature=1.0, seed=None, stop_token_ids=(), ignore_eos=False, logprobs=None,
                 detokenize=True):  # fmt: skip
        assert max_tokens == 1 or (ignore_eos and logprobs == 0 and not detokenize)
        self.max_tokens, self.temperature, self.seed = max_tokens, temperature, seed
        self.stop_token_ids = stop_token_ids


def the_double():
    """What `import vllm` gives, by the double."""
    own = {"GPT2LMHeadModel": "gpt2", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
    known = {name: SimpleNamespace(module_name=f"vllm.model_executor.models.{file}") for name, file in own.items()}
    known["GPTNeoXForCausalLM"] = SimpleNamespace(module_name="vllm.model_executor.models.transformers")
    return SimpleNamespace(LLM=Double, SamplingParams=Asked, ModelRegistry=SimpleNamespace(models=known))


@pytest.fixture(params=["double", "vllm"], autouse=True)
def engine(request, monkeypatch):
    """Each test once with the double, and once with vLLM where it is installed."""
    if request.param == "vllm":
        pytest.importorskip(MODULE)
    else:
        monkeypatch.setattr(vllm, "imported", the_double)
    return request.param


KEPT = []  # engines: vLLM cannot make one while another ends


def sampler(**options):
    """A sampler that lives as long as the tests."""
    KEPT.append(VLLMSampler(**(CACHE | options)))
    return KEPT[-1]


def checked(lm, prompts, responses, temperature, ends):
    """Largest distance of the responses' log-probabilities from those of teacher forcing; their form is asserted."""
    tokens, mask = prompts
    worst = 0.0
    for row in range(len(tokens)):
        real = responses.mask[row]
        response = responses.tokens[row][real].tolist()
        assert real.tolist() == [True] * len(response) + [False] * (len(real) - len(response))
        assert not {*response[:-1]} & {*ends} and (response[-1] in ends) == bool(responses.ended[row])
        assert (responses.tokens[row][~real] == PAD).all() and (responses.log_probs[row][~real] == 0).all()
        expected = teacher_forced(lm, tokens[row][mask[row]].tolist(), response, temperature)
        worst = max(worst, (responses.log_probs[row][real] - torch.tensor(expected)).abs().max().item())
    return worst


# --- one engine and its responses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ONE_HEAD)
def test_log_probs_are_those_of_teacher_forcing(family, queries):
    """At a temperature, of prompts of different lengths, with two tokens that end, that one included."""
    lm, prompts = tiny_lm(family, **ONE_HEAD[family]), repeated(queries, 6)
    responses = sampler()(lm, *prompts, max_new_tokens=5, temperature=1.3, generator=generator(), **ENDS)
    assert checked(lm, prompts, responses, 1.3, ENDS["eos_id"]) < 1e-5
    lengths = responses.mask.sum(dim=1)
    assert lengths.min() < lengths.max() == responses.tokens.shape[1]
    assert responses.ended.any() and not responses.ended.all()


def test_a_seed_repeats_and_rows_differ(queries):
    lm, draw, prompts = tiny_lm(n_head=1), sampler(), repeated(queries, 8)
    options = dict(max_new_tokens=4, eos_id=[], pad_id=PAD)
    first, second, third = (draw(lm, *prompts, generator=generator(seed), **options) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.log_probs, second.log_probs)
    assert not torch.equal(first.tokens, third.tokens)
    assert len({*map(tuple, first.tokens[:8].tolist())}) > 1
    uniforms = torch.rand(len(prompts[0]), 4, generator=generator(0))
    assert torch.equal(draw(lm, *prompts, uniforms=uniforms, **options).tokens, first.tokens)


def test_a_row_s_seed_is_made_of_all_the_bits_of_two_numbers():
    rows = torch.tensor([[0.0, 0.0, 0.5], [0.5, 0.0, 0.5], [0.0, 2**-24, 0.5], [1 - 2**-24, 1 - 2**-24, 0.0]])
    assert vllm.seeds(rows) == [0, 2**47, 1, 2**48 - 1]
    assert vllm.seeds(torch.tensor([[0.5], [0.25]])) == [2**47 + 2**23, 2**46 + 2**22]


def test_tokens_are_drawn_from_the_distribution_that_is_said(queries):
    """Frequencies of the first token within four standard errors, also of the unlikely ones: no top-k, no top-p."""
    tokens, mask = (x[1:2] for x in queries)
    lm, count = tiny_lm(n_head=1), 2000
    options = dict(max_new_tokens=1, temperature=1.5, **IDS)
    drawn = sampler()(lm, *repeated((tokens, mask), count), generator=generator(), **options)
    with torch.no_grad():
        p = (lm(tokens[mask][None]).logits[0, -1].double() / 1.5).softmax(-1)
    frequencies = drawn.tokens[:, 0].bincount(minlength=len(p)) / count
    assert ((frequencies - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all() and (frequencies > 0).all()


def test_ids_without_a_token_are_never_drawn(queries, tokenizer):
    """A vocabulary of 40 rows for a tokenizer of 8."""
    lm, prompts = tiny_lm(n_head=1, vocab_size=40), repeated(queries, 8)
    bar_unused_ids(lm, tokenizer)
    responses = sampler()(lm, *prompts, max_new_tokens=4, generator=generator(), **IDS)
    assert responses.tokens.max() < 8
    assert checked(lm, prompts, responses, 1.0, [EOS]) < 1e-5


def test_after_an_update_nothing_of_the_weights_before_is_left(queries):
    """Nor of what was read by them: prompts longer than a block of the engine's memory are shared."""
    lm = tiny_lm("llama", num_attention_heads=1, max_position_embeddings=512)
    draw, options = sampler(), dict(max_new_tokens=3, eos_id=[], pad_id=PAD)
    prompts = torch.tensor([[1] + [4, 5, 6, 3] * 50] * 3), torch.ones(3, 201, dtype=torch.bool)

    def error():
        return checked(lm, prompts, draw(lm, *prompts, generator=generator(), **options), 1.0, [])

    draw.update(iter(()))  # before there is an engine
    assert error() < 1e-5 and error() < 1e-5
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(1.2)
    assert error() > 0.1
    draw.update(adapters.merged_weights(lm))
    assert error() < 1e-5


def test_an_engine_leaves_generators_and_threads_as_they_were(queries):
    lm, state, threads = tiny_lm(n_head=1), torch.get_rng_state(), torch.set_num_threads
    sampler()(lm, *queries, max_new_tokens=2, generator=generator(), **IDS)
    assert torch.equal(torch.get_rng_state(), state) and torch.set_num_threads is threads


# --- in a trainer ---------------------------------------------------------------------------------------------------


def trainer_with(draw, **settings):
    """A PPO trainer whose model fits the engine's kernels."""
    return tiny_trainer(tiny_policy(head=0.1, n_head=1), tiny_lm(seed=1, n_head=1), sampler=draw, **settings)


def test_the_policy_s_own_log_probs_are_the_engine_s_in_every_iteration():
    trainer = trainer_with(sampler(), learning_rate=1e-2)
    assert [row["sampler_error"] < 1e-5 for row in trainer.train()] == [True] * 4


def test_weights_that_are_withheld_stop_the_run():
    """In the iteration after the first update, by a message that says what to look for."""
    draw = sampler()
    trainer = trainer_with(draw, learning_rate=1e-2)
    draw.start(trainer.lm)
    draw.update = lambda weights: None
    trainer.step()
    with pytest.raises(ValueError, match=r"within 0.001 of the policy's own .* given the weights of the last update"):
        trainer.step()
    assert trainer.iteration == 1


def test_an_engine_that_served_another_policy_or_a_later_one_is_given_today_s_weights():
    draw = sampler()
    trainer_with(draw, learning_rate=1e-2).step()
    other = tiny_trainer(tiny_policy(head=0.1, n_head=1, seed=3), tiny_lm(seed=1, n_head=1), sampler=draw)
    before = other.state_dict()
    other.step()
    other.load_state_dict(before)
    assert other.step()["sampler_error"] < 1e-5


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_in_bf16_the_tolerance_is_of_that_precision(how, queries):
    draw = sampler()
    if how == "autocast":
        rows = trainer_with(draw, precision="bf16", num_iterations=2).train()
        assert all(1e-5 < row["sampler_error"] < 5e-2 for row in rows)
    else:
        draw(tiny_lm(n_head=1).bfloat16(), *queries, max_new_tokens=2, generator=generator(), **IDS)
    assert draw.engine.model_config.dtype is torch.bfloat16 and draw.tolerance == 5e-2
    other = sampler(dtype=torch.bfloat16)  # in another precision than the policy
    other(tiny_lm(n_head=1), *queries, max_new_tokens=2, generator=generator(), **IDS)
    assert other.tolerance == 5e-2


def test_an_adapter_is_merged_into_what_the_engine_gets():
    pytest.importorskip("peft")
    lm = tiny_lm(n_head=1)
    adapters.add_lora(lm, rank=4, alpha=32)
    config = RLOOConfig(**(SMALL | dict(learning_rate=3e-2)), samples_per_prompt=4)
    rows = RLOOTrainer(config, lm, None, count_good, PROMPTS, word_tokenizer(), sampler=sampler()).train()
    assert all(row["sampler_error"] < 1e-5 for row in rows)
    assert rows[-1]["kl"] > 1e-3


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_family_that_the_engine_has_no_code_for_is_refused(queries):
    with pytest.raises(ValueError, match="sampler must have code for GPTNeoXForCausalLM, which vLLM has not"):
        sampler()(tiny_lm("gpt_neox"), *queries, max_new_tokens=2, **IDS)


def test_an_engine_that_does_not_start_is_told_in_a_sentence(queries):
    draw = sampler()
    with pytest.raises(ValueError, match="an engine that starts for GPT2LMHeadModel; vLLM says .*head_dim=16"):
        draw(tiny_lm(n_head=2), *queries, max_new_tokens=2, **IDS)
    assert draw.engine is None


def test_several_processes_are_refused_at_the_start(monkeypatch):
    for name, value in (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="plain or static where several processes work; got vllm in 2"):
        sampler()


def test_without_vllm_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="sampler must be plain or static where vLLM is not installed .make vllm"):
        sampler_named("vllm")


def test_the_option_names_it_and_dpo_refuses_it():
    assert type(sampler_named("vllm")) is VLLMSampler

    def given(*words):
        arguments: argparse.Namespace = build_parser().parse_args(["run", "--sampler", "vllm", *words])
        return settings_from(arguments).method

    assert given("--sampler-correction", "mask").sampler_correction == "mask"
    assert given("--method", "best-of-n").n == 64
    with pytest.raises(ValueError, match="give --sampler plain or static with --method dpo"):
        given("--method", "dpo")
