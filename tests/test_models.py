"""The models: left padding, the value head, the reward model, and what is loaded and saved."""

import hashlib
import inspect
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from rlhf_lessons import forward, models
from rlhf_lessons.data import pad
from rlhf_lessons.models import CausalLMWithValueHead, RewardModel, causal_lm_logits, load_reward_model

PAD, BOS, EOS = 0, 1, 2
ROWS = [[1, 6], [1, 4, 6, 7, 5], [1, 5, 5, 6, 4, 7, 7]]


@pytest.fixture(params=["left", "right"])
def side(request):
    return request.param


# --- Padding --------------------------------------------------------------------------------------


@pytest.mark.detail(1)
@torch.no_grad()
def test_padded_and_unpadded_logits_and_values_agree(architecture, side, make_policy):
    """Against each text alone, without mask or position ids, through Hugging Face's own forward."""
    policy = make_policy(architecture, head=1.0)
    tokens, mask = pad(ROWS, PAD, side=side)
    logits, values = policy(tokens, mask)
    plain = causal_lm_logits(policy.lm, tokens, mask)
    for row, ids in enumerate(ROWS):
        alone = policy.lm(torch.tensor([ids]), output_hidden_states=True)
        head = alone.hidden_states[-1][0] @ policy.value_head.weight[0] + policy.value_head.bias
        torch.testing.assert_close(logits[row][mask[row]], alone.logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(plain[row][mask[row]], alone.logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values[row][mask[row]], head, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bloom", "opt"])
def test_models_without_position_ids_or_with_offset_ones_agree_too(name):
    """BLOOM takes no position ids (ALiBi); OPT counts its learned positions from 2."""
    config = AutoConfig.for_model(
        name, vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, n_layer=2, n_head=2
    )
    torch.manual_seed(0)
    policy = CausalLMWithValueHead(AutoModelForCausalLM.from_config(config).eval())
    tokens, mask = pad(ROWS, PAD, side="left")
    logits, _ = policy(tokens, mask)
    for row, ids in enumerate(ROWS):
        alone = policy.lm(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits[row][mask[row]], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_logits_to_keep_gives_the_last_positions(architecture, critic, make_policy):
    policy = make_policy(architecture, critic=critic, head=1.0)
    tokens, mask = pad(ROWS, PAD, side="left")
    everything = policy(tokens, mask)
    last = policy(tokens, mask, logits_to_keep=3)
    assert last.logits.shape == (3, 3, 8) and last.values.shape == (3, 3)
    torch.testing.assert_close(last.logits, everything.logits[:, -3:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last.values, everything.values[:, -3:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(policy.values(tokens, mask, keep=3), last.values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(policy.values(tokens, mask), everything.values, atol=1e-5, rtol=1e-5)


# --- The value head -------------------------------------------------------------------------------


@pytest.mark.equation("9.1")
@torch.no_grad()
def test_value_is_a_linear_function_of_the_last_hidden_state(make_policy):
    """w·h + b, multiplied out by hand, with h from the plain language model."""
    policy = make_policy(head=1.0)
    policy.value_head.bias.fill_(0.75)
    ids = torch.tensor([ROWS[1]])
    h = policy.lm(ids, output_hidden_states=True).hidden_states[-1][0]
    weights = policy.value_head.weight[0].tolist()
    expected = [sum(w * x for w, x in zip(weights, state, strict=True)) + 0.75 for state in h.tolist()]
    values = policy(ids, torch.ones_like(ids)).values[0]
    torch.testing.assert_close(values, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.detail(20)
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_value_head_starts_at_zero(critic, make_lm):
    policy = CausalLMWithValueHead(make_lm(), critic=critic)
    tokens, mask = pad(ROWS, PAD, side="left")
    assert (policy(tokens, mask).values == 0).all()


@pytest.mark.parametrize(("critic", "reaches"), [("shared", True), ("separate", False)])
def test_value_gradient_reaches_the_policy_only_through_a_shared_trunk(critic, reaches, make_policy):
    policy = make_policy(critic=critic, head=1.0)
    tokens, mask = pad(ROWS, PAD, side="left")
    policy(tokens, mask).values.sum().backward()
    trunk = [p.grad for p in policy.lm.parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert bool(trunk) == reaches
    assert policy.value_head.weight.grad.abs().max() > 0
    if critic == "separate":
        assert max(p.grad.abs().max() for p in policy.critic.parameters() if p.grad is not None) > 0


def test_separate_critic_starts_as_a_copy_that_shares_no_memory(make_policy):
    policy = make_policy(critic="separate", head=1.0)
    trunk, critic = dict(policy.lm.base_model.named_parameters()), dict(policy.critic.named_parameters())
    assert trunk.keys() == critic.keys()
    assert all(torch.equal(trunk[name], critic[name]) for name in trunk)
    assert not {p.data_ptr() for p in trunk.values()} & {p.data_ptr() for p in critic.values()}


def test_values_are_float32_whatever_the_precision_of_the_trunk(make_policy):
    policy = make_policy(head=1.0)
    tokens, mask = pad(ROWS, PAD, side="left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert policy(tokens, mask).values.dtype == torch.float32
    assert policy.double()(tokens, mask).values.dtype == torch.float64


def test_another_critic_and_a_model_without_a_head_are_refused(make_lm, make_config):
    with pytest.raises(ValueError, match='critic must be "shared" or "separate"; got \'twin\''):
        CausalLMWithValueHead(make_lm(), critic="twin")
    with pytest.raises(ValueError, match="lm must have a language-model head; GPT2Model has none"):
        CausalLMWithValueHead(GPT2Model(make_config()))


# --- Dropout --------------------------------------------------------------------------------------


@pytest.mark.detail(6)
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_dropout_is_off_two_train_mode_forwards_are_identical(architecture, critic, make_policy, tmp_path):
    """A configuration with dropout 0.1, loaded: in train mode nothing is dropped, in the critic neither."""
    made = make_policy(architecture, critic=critic, head=1.0, dropout=0.1)
    made.save_pretrained(tmp_path)
    tokens, mask = pad(ROWS * 20, PAD, side="left")
    first, second = made.train()(tokens, mask), made(tokens, mask)
    assert not torch.equal(first.logits, second.logits), "the model as made does drop: the test can fail"
    loaded = CausalLMWithValueHead.from_pretrained(tmp_path).train()
    first, second = loaded(tokens, mask), loaded(tokens, mask)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.values, second.values)


@pytest.mark.detail(6)
def test_dropout_is_off_also_where_a_module_keeps_its_rate_as_a_number():
    """OPT applies dropout as a function; the rate is an attribute of the layer."""
    config = AutoConfig.for_model(
        "opt", vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, dropout=0.5, layerdrop=0.5
    )
    lm = models.without_dropout(AutoModelForCausalLM.from_config(config)).train()
    tokens, mask = pad(ROWS, PAD, side="left")
    assert torch.equal(causal_lm_logits(lm, tokens, mask), causal_lm_logits(lm, tokens, mask))


@pytest.mark.detail(6)
def test_noise_is_off_wherever_its_rate_is_read(make_lm):
    """In a module under any name, in a Dropout of one's own, and in a configuration read at every call."""

    class LockedDropout(torch.nn.Module):
        p = 0.3

    class Router(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.input_jitter, self.embd_pdrop, self.capacity = config, 0.1, 0.2, 1.25

    lm = make_lm()
    lm.router, lm.locked = Router(lm.config), LockedDropout()
    lm.config.router_jitter_noise = 0.01
    models.without_dropout(lm)
    assert (lm.router.input_jitter, lm.router.embd_pdrop, lm.router.capacity) == (0.0, 0.0, 1.25)
    assert lm.locked.p == lm.config.router_jitter_noise == 0.0


def test_evaluation_mode_is_for_a_while_and_each_module_s_mode_comes_back(make_lm):
    lm = make_lm().train()
    lm.transformer.h[0].eval()
    before = [module.training for module in lm.modules()]
    with pytest.raises(KeyError), forward.evaluating(lm):
        assert not any(module.training for module in lm.modules())
        raise KeyError
    assert [module.training for module in lm.modules()] == before and len({*before}) == 2


@torch.no_grad()
def test_what_needs_no_gradient_is_read_in_evaluation_mode(make_policy, make_reward_model):
    tokens, mask = pad(ROWS * 20, PAD, side="left")
    for model in (make_policy(head=1.0, dropout=0.3), make_reward_model(dropout=0.3)):
        expected = model.eval()(tokens, mask)
        found = model.train()(tokens, mask)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and model.training


# --- Precision, ids and lengths -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_models_in_16_bits_keep_their_heads_values_and_scores_in_float32(dtype, critic, make_policy, make_reward_model):
    tokens, mask = pad(ROWS, PAD, side="left")
    exact, scorer = make_policy(critic=critic, head=1.0), make_reward_model()
    values, scores = exact(tokens, mask).values, scorer(tokens, mask)
    weight = exact.value_head.weight.clone()
    policy = exact.to(dtype)
    assert policy.value_head.weight.dtype == torch.float32 and torch.equal(policy.value_head.weight, weight)
    halved = policy(tokens, mask)
    assert halved.logits.dtype == dtype and halved.values.dtype == torch.float32
    torch.testing.assert_close(halved.values[mask], values[mask], atol=0.3, rtol=0.1)
    score = scorer.to(dtype)(tokens, mask)
    assert score.dtype == torch.float32 and (score - scores).abs().max() < 0.2
    assert not torch.equal(score, score.to(dtype).float()), "not rounded to 16 bits at the end either"


@pytest.mark.parametrize(
    ("kind", "settings", "limit"),
    [
        ("gpt2", dict(n_positions=48), 48),
        ("llama", dict(max_position_embeddings=33), 33),
        ("mpt", dict(max_seq_len=21), 21),
        ("rwkv", dict(context_length=17), 17),
        ("bloom", {}, math.inf),
        ("xlnet", {}, math.inf),  # which says -1
    ],
)
def test_context_is_found_by_whatever_name_it_has(kind, settings, limit):
    class Model(torch.nn.Module):
        config = AutoConfig.for_model(kind, **settings)

    assert forward.context_of(Model()) == limit


def test_a_tokenizer_with_ids_beyond_a_model_s_embedding_is_refused(make_lm, make_policy, make_reward_model, tokenizer):
    """Its largest id counts, not how many it has."""
    holes = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 2, "z": 9}, unk_token="z")), pad_token="<pad>"
    )
    for model in (make_lm(), make_policy(), make_reward_model()):
        models.check_vocabulary(model, tokenizer)
        with pytest.raises(ValueError, match="tokenizer must have ids below 8, the rows of GPT2.*; got 9"):
            models.check_vocabulary(model, holes)


def test_ids_without_a_token_are_barred_and_others_left_alone(make_lm, tokenizer):
    tokens, mask = pad(ROWS, PAD, side="left")
    lm = make_lm(vocab_size=11)
    before = causal_lm_logits(lm, tokens, mask)
    for _ in range(2):
        models.bar_unused_ids(lm, tokenizer)
    after = causal_lm_logits(lm, tokens, mask)
    assert torch.equal(after[..., :8], before[..., :8]) and (after[..., 8:] == -math.inf).all()
    assert len(lm._forward_hooks) == 1 and "barred_ids" not in lm.state_dict()
    full = make_lm()
    models.bar_unused_ids(full, tokenizer)
    assert not full._forward_hooks


def test_the_last_state_is_what_the_head_reads_where_it_is_narrower(make_config):
    """OPT-350m's is projected down after its layers, and its head skips the trunk's own forward."""
    lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "opt", vocab_size=8, hidden_size=32, word_embed_proj_dim=12, num_hidden_layers=2, num_attention_heads=2
        )
    ).eval()
    read = []
    lm.lm_head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    tokens, mask = pad(ROWS, PAD, side="left")
    for critic in ("shared", "separate"):
        policy = CausalLMWithValueHead(lm, critic=critic)
        torch.nn.init.normal_(policy.value_head.weight)
        read.clear()
        values = policy(tokens, mask).values
        expected = (read[-1] @ policy.value_head.weight[0])[mask]
        torch.testing.assert_close(values[mask], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(policy.values(tokens, mask)[mask], expected, atol=1e-5, rtol=1e-5)


# --- Saving and loading a policy ------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["shared", "separate"])
@torch.no_grad()
def test_policy_survives_saving_and_loading(architecture, critic, make_policy, make_lm, tmp_path):
    policy = make_policy(architecture, critic=critic, head=1.0)
    policy.value_head.bias.fill_(0.5)
    if critic == "separate":  # as after training: no longer a copy
        policy.critic.load_state_dict(make_lm(architecture, seed=3).base_model.state_dict())
    tokens, mask = pad(ROWS, PAD, side="left")
    before = policy(tokens, mask)
    policy.save_pretrained(tmp_path / "policy")
    loaded = CausalLMWithValueHead.from_pretrained(tmp_path / "policy").eval()
    after = loaded(tokens, mask)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.values, after.values)
    assert (loaded.critic is not None) == (critic == "separate")


def test_saved_policy_is_a_plain_checkpoint_with_the_documented_keys_beside_it(make_policy, tmp_path):
    policy = make_policy(critic="separate", head=1.0)
    policy.save_pretrained(tmp_path)
    head = load_file(tmp_path / "value_head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {"weight": (1, 32), "bias": (1,)}
    lm, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), policy.lm.parameters(), strict=True))
    critic, report = GPT2Model.from_pretrained(tmp_path / "critic", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), policy.critic.parameters(), strict=True))
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt"))


def test_plain_language_model_loads_with_a_head_of_zeros_and_either_critic(make_lm, tmp_path):
    make_lm().save_pretrained(tmp_path)
    shared = CausalLMWithValueHead.from_pretrained(tmp_path)
    separate = CausalLMWithValueHead.from_pretrained(tmp_path, critic="separate")
    assert shared.critic is None and separate.critic is not None
    assert not shared.value_head.weight.any() and not separate.value_head.weight.any()


def test_another_critic_than_was_saved_starts_anew(make_policy, tmp_path):
    """A head fitted to one trunk means nothing on another."""
    make_policy(critic="separate", head=1.0).save_pretrained(tmp_path)
    loaded = CausalLMWithValueHead.from_pretrained(tmp_path, critic="shared")
    assert loaded.critic is None and not loaded.value_head.weight.any()


def test_weights_are_float32_however_they_were_saved(make_policy, tmp_path):
    make_policy(critic="separate", head=1.0).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = CausalLMWithValueHead.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


# --- What cannot be loaded ------------------------------------------------------------------------


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot load a model from .*nowhere"):
        CausalLMWithValueHead.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot load a model from .*nowhere"):
        load_reward_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot load a tokenizer from .*nowhere"):
        models.load_tokenizer(tmp_path / "nowhere")


def test_a_folder_that_is_not_there_is_not_asked_of_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("./policy", "runs/policy", "a/b/policy", str(tmp_path / "policy"), tmp_path / "policy"):
        for load in (models.load_causal_lm, models.load_tokenizer):
            with pytest.raises(ValueError, match="cannot load a .*: it must be a folder that is there; got"):
                load(path)
    models.check_source("someone/policy")
    models.check_source("gpt2")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x10\0\0\0\0\0\0\0{broken"])
def test_corrupt_weights_are_a_value_error(content, make_lm, tmp_path):
    make_lm().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="cannot load a model from"):
        models.load_causal_lm(tmp_path)


def test_corrupt_configuration_is_a_value_error(make_lm, tmp_path):
    make_lm().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="cannot load a model from"):
        models.load_causal_lm(tmp_path)


@pytest.mark.parametrize("broken", ["bytes", "shape", "keys"])
def test_corrupt_value_head_is_a_value_error_that_names_the_file(broken, make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path)
    file = tmp_path / "value_head.safetensors"
    if broken == "bytes":
        file.write_bytes(b"nothing")
    elif broken == "shape":
        save_file({"weight": torch.zeros(1, 31), "bias": torch.zeros(1)}, file)
    else:
        save_file({"v_head.weight": torch.zeros(1, 32)}, file)
    with pytest.raises(ValueError, match="value_head.safetensors"):
        CausalLMWithValueHead.from_pretrained(tmp_path)


def bert(make_config):
    return BertModel(
        BertConfig(
            vocab_size=8,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            is_decoder=True,
        )
    )


@pytest.mark.parametrize(
    "make",
    [
        bert,
        lambda make_config: GPT2Model(make_config()),
        lambda make_config: AutoModelForSequenceClassification.from_config(make_config("llama", num_labels=1)),
        lambda make_config: AutoModelForSequenceClassification.from_config(make_config(num_labels=1)),
    ],
    ids=["BertModel", "GPT2Model", "LlamaForSequenceClassification", "GPT2ForSequenceClassification"],
)
def test_checkpoint_without_a_language_model_head_is_refused(make, make_config, tmp_path):
    """Also where the head would be tied to the embedding, so that loading it misses no key."""
    model = make(make_config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"language-model head; got one saved from .*{type(model).__name__}"):
        CausalLMWithValueHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("written, read", [("gelu_new", "gelu_pytorch_tanh"), ("relu", "relu")])
def test_a_checkpoints_activation_is_asked_for_by_its_faster_name(written, read, make_lm, tmp_path):
    """GPT-2's is the same function under either name; the model that the checkpoint came from is left as it was."""
    lm = make_lm(activation_function=written)
    lm.save_pretrained(tmp_path)
    before = [type(module) for module in lm.modules()]
    loaded = models.load_causal_lm(tmp_path)
    tokens = torch.tensor([[1, 4, 5, 6]])
    assert loaded.config.activation_function == read and lm.config.activation_function == written
    torch.testing.assert_close(loaded(tokens).logits, lm(tokens).logits, atol=1e-5, rtol=1e-5)
    assert [type(module) for module in lm.modules()] == before
    loaded.save_pretrained(tmp_path / "again")
    assert f'"activation_function": "{read}"' in (tmp_path / "again" / "config.json").read_text()


def test_the_caller_s_models_keep_their_own_modules(make_lm, make_policy, make_reward_model, make_trainer):
    """Activations above all: what a trainer or a reward model is made from may be in use elsewhere."""
    parts = [make(activation_function="gelu_new") for make in (make_policy, make_lm, make_reward_model)]
    before = [[*map(id, part.modules())] for part in parts]
    RewardModel(parts[2].classifier)
    RewardModel.from_causal_lm(parts[1], pad_token_id=PAD)
    make_trainer(*parts).step()
    assert [[*map(id, part.modules())] for part in parts] == before


def test_language_model_is_no_reward_model(make_lm, tmp_path):
    make_lm().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a reward model; got a checkpoint without score.weight"):
        load_reward_model(tmp_path)


def test_code_that_comes_with_a_checkpoint_is_never_run(make_lm, tmp_path):
    """Every load says so itself, whatever the caller's settings say, and pickled weights are refused."""
    source = inspect.getsource(models)
    loads = re.findall(r"\w+\.from_pretrained\(\s*str\(path\)[^)]*\)", source)
    assert len(loads) == 3 and all("trust_remote_code=False" in load for load in loads)
    assert source.count("trust_remote_code") == 3
    lm = make_lm()
    lm.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load a model"):
        models.load_causal_lm(tmp_path)


# --- The reward model -----------------------------------------------------------------------------


@pytest.mark.equation("2.3")
@pytest.mark.detail(24)
@torch.no_grad()
def test_score_is_read_at_the_last_real_token(architecture, make_reward_model):
    """Against the trunk run on each text alone: (w·h_last − mean)/std."""
    scorer = make_reward_model(architecture)
    scorer.config.reward_mean, scorer.config.reward_std = 0.5, 2.0
    trunk, weight = scorer.classifier.base_model, scorer.classifier.score.weight[0]
    tokens, mask = pad(ROWS, PAD, side="right")
    expected = [(trunk(torch.tensor([ids])).last_hidden_state[0, -1] @ weight - 0.5) / 2.0 for ids in ROWS]
    torch.testing.assert_close(scorer(tokens, mask), torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.detail(24)
@torch.no_grad()
def test_score_does_not_depend_on_the_amount_or_side_of_padding(architecture, make_reward_model):
    """A GPT-2 scorer included, whose learned positions left padding would shift without position ids."""
    scorer = make_reward_model(architecture)
    alone = torch.cat([scorer(torch.tensor([ids]), torch.ones(1, len(ids)).bool()) for ids in ROWS])
    assert alone.std() > 0.1, "texts that score alike would prove nothing"
    for left, right in ((0, 0), (3, 0), (0, 3), (2, 4)):
        longest = max(map(len, ROWS)) + right
        tokens, mask = pad([ids + [PAD] * (longest - len(ids)) for ids in ROWS], PAD, side="right")
        mask = torch.arange(longest) < torch.tensor([len(ids) for ids in ROWS])[:, None]
        tokens = torch.nn.functional.pad(tokens, (left, 0), value=PAD)
        mask = torch.nn.functional.pad(mask, (left, 0))
        torch.testing.assert_close(scorer(tokens, mask), alone, atol=1e-5, rtol=1e-5)
        other = tokens.masked_fill(~mask, 7)
        torch.testing.assert_close(scorer(other, mask), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.detail(24)
@torch.no_grad()
def test_score_reads_the_last_real_token_even_if_it_is_the_padding_token(make_reward_model):
    """A policy can sample <pad>; what is real is for the mask to say, not for the id."""
    scorer = make_reward_model()
    ids = [1, 4, 6, PAD]
    h = scorer.classifier.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    tokens, mask = pad([ids, [1, 4, 6, 5, 5, 7]], PAD, side="right")
    torch.testing.assert_close(scorer(tokens, mask)[0], scorer.classifier.score(h)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.detail(21)
def test_reward_head_starts_with_standard_deviation_one_over_root_d_plus_one(make_lm, tmp_path):
    """64 heads of 32 weights: the standard error of the pooled deviation is 1/√(2·2048) = 1.6 % of it."""
    make_lm().save_pretrained(tmp_path)
    weights = []
    for seed in range(64):
        scorer = RewardModel.from_causal_lm(tmp_path, pad_token_id=PAD, seed=seed)
        weights.append(scorer.classifier.score.weight.detach().flatten())
    weights = torch.cat(weights)
    expected = 1 / math.sqrt(33)
    assert abs(weights.std() / expected - 1) < 4 / math.sqrt(2 * len(weights))
    assert abs(weights.mean()) < 4 * expected / math.sqrt(len(weights))
    assert scorer.classifier.score.bias is None


@torch.no_grad()
def test_reward_model_starts_from_the_language_model_s_trunk(architecture, make_lm, tmp_path):
    lm = make_lm(architecture)
    lm.save_pretrained(tmp_path)
    scorer = RewardModel.from_causal_lm(tmp_path, pad_token_id=PAD)
    trunk = scorer.classifier.base_model.state_dict()
    assert trunk.keys() == lm.base_model.state_dict().keys()
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in lm.base_model.state_dict().items())


@pytest.mark.detail(22)
@torch.no_grad()
def test_normalised_scores_have_mean_0_and_deviation_1_and_keep_it_when_saved(make_reward_model, tmp_path):
    scorer = make_reward_model()
    tokens = torch.randint(3, 8, (40, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    raw = scorer(tokens, mask)
    for _ in range(2):  # the second time on scores that are normalised already
        scorer.normalize(scorer(tokens, mask))
        scores = scorer(tokens, mask)
        torch.testing.assert_close(scores, (raw - raw.mean()) / raw.std(correction=0), atol=1e-5, rtol=1e-5)
    scorer.normalize(3 * scores + 5)  # and on scores of another scale: (s − 5)/3
    torch.testing.assert_close(scorer(tokens, mask), (scores - 5) / 3, atol=1e-5, rtol=1e-4)
    scorer.save_pretrained(tmp_path)
    assert torch.equal(load_reward_model(tmp_path).eval()(tokens, mask), scorer(tokens, mask))


@pytest.mark.parametrize(
    "scores", [[], [1.0], [2.0, 2.0], [1000.1, 1000.1 * (1 + 1.2e-7)], [1.0, math.nan], [1.0, math.inf]]
)
def test_scores_without_spread_cannot_normalise(scores, make_reward_model):
    expected = "two different values" if all(map(math.isfinite, scores)) else "finite numbers"
    with pytest.raises(ValueError, match=f"scores must .*{expected}"):
        make_reward_model().normalize(torch.tensor(scores))


def test_classifier_needs_one_label_and_a_pad_token(make_config):
    two = AutoModelForSequenceClassification.from_config(make_config(num_labels=2))
    with pytest.raises(ValueError, match="classifier must have one label; got 2"):
        RewardModel(two)
    unpadded = AutoModelForSequenceClassification.from_config(make_config(num_labels=1, pad_token_id=None))
    with pytest.raises(ValueError, match="pad_token_id must be set"):
        RewardModel(unpadded)


# --- New models and tokenizers --------------------------------------------------------------------


def weights_hash(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def test_new_model_depends_on_the_seed_alone_and_leaves_the_global_generator_as_it_was(tokenizer):
    size = dict(layers=1, width=16, heads=2, context=24)
    torch.manual_seed(1)
    first = models.new_causal_lm(tokenizer, **size, seed=0)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    assert weights_hash(models.new_causal_lm(tokenizer, **size, seed=0)) == weights_hash(first)
    assert weights_hash(models.new_causal_lm(tokenizer, **size, seed=1)) != weights_hash(first)


def test_new_model_has_the_size_asked_for_and_one_embedding(tokenizer):
    lm = models.new_causal_lm(tokenizer, layers=3, width=16, heads=4, context=24, seed=0)
    config = lm.config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (3, 16, 4, 24)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (8, BOS, EOS, PAD)
    assert lm.get_output_embeddings().weight.data_ptr() == lm.get_input_embeddings().weight.data_ptr()
    tokens, mask = pad(ROWS, PAD, side="left")
    lm.train()
    assert torch.equal(causal_lm_logits(lm, tokens, mask), causal_lm_logits(lm, tokens, mask))


def test_tokenizer_is_saved_and_loaded_padding_on_the_left(make_tokenizer, tmp_path):
    make_tokenizer(padding_side="right").save_pretrained(tmp_path)
    loaded = models.load_tokenizer(tmp_path)
    assert loaded.padding_side == "left"
    assert loaded("good film").input_ids == [BOS, 4, 6]


@pytest.mark.detail(3)
def test_padding_with_eos_is_refused(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(pad_token="<eos>")
    with pytest.raises(ValueError, match="must not use its EOS token as padding"):
        models.check_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must not use its EOS token as padding"):
        models.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("missing", "message"), [("pad_token", "have a pad token"), ("eos_token", "have an EOS token")]
)
def test_tokenizer_without_pad_or_eos_is_refused(missing, message, make_tokenizer):
    with pytest.raises(ValueError, match=message):
        models.check_tokenizer(make_tokenizer(**{missing: None}))
