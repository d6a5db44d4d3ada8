"""Adapters: what is trained beside frozen weights, the same weights as the reference, and what is saved of both."""

import contextlib
import json

import pytest
import torch
from conftest import BOS, EOS, PAD, PROMPTS, SMALL, count_good, tiny_lm, word_tokenizer

from rlhf_lessons import adapters, tiny_reviews
from rlhf_lessons.adapters import add_lora, as_reference, merged_weights
from rlhf_lessons.config import GRPOConfig, PPOConfig, RLOOConfig
from rlhf_lessons.fitting import fit_dpo
from rlhf_lessons.forward import causal_lm_logits, plain
from rlhf_lessons.generation import Reader, Sampler, respond, sample_responses
from rlhf_lessons.group_trainers import GRPOTrainer, RLOOTrainer
from rlhf_lessons.models import (
    ASSETS,
    CausalLMWithValueHead,
    RewardModel,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    prepare_policy,
    trunk_of,
)
from rlhf_lessons.rollout import collect
from rlhf_lessons.scoring import as_scorer
from rlhf_lessons.trainer import PPOTrainer

peft = pytest.importorskip("peft")

TEXTS = torch.tensor([[PAD, PAD, BOS, 4, 6], [BOS, 5, 5, 6, 7]])
MASK = TEXTS != PAD
METHODS = {"ppo": (PPOTrainer, PPOConfig), "rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}
PAIRS = [{"prompt": "film", "chosen": "good", "rejected": "bad ."}, {"prompt": "bad", "chosen": ".", "rejected": "bad"}]


def adapted(architecture="gpt2", *, moved=True, rank=2, **options):
    """A model with an adapter; `moved` as if it had been trained."""
    lm = tiny_lm(architecture)
    add_lora(lm, rank=rank, **options)
    return move(lm) if moved else lm


def move(lm):
    """Give B, which starts at 0, random numbers."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for name, p in lm.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
    return lm


def wrapped(architecture="gpt2", **options):
    """The same by the other of PEFT's two doors."""
    config = peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options)
    with contextlib.suppress(UserWarning):
        return peft.get_peft_model(tiny_lm(architecture), config)


def make(method, lm, reference=None, **settings):
    """A trainer by a method, of a language model with an adapter."""
    trainer, config = METHODS[method]
    policy = CausalLMWithValueHead(lm) if method == "ppo" else lm
    groups = {} if method == "ppo" else dict(samples_per_prompt=4)
    return trainer(config(**(SMALL | groups | settings)), policy, reference, count_good, PROMPTS, word_tokenizer())


@torch.no_grad()
def logits_of(lm):
    return causal_lm_logits(lm, TEXTS, MASK)[MASK]


# --- LoRA ---------------------------------------------------------------------------------------


def test_an_adapter_adds_the_product_of_two_small_matrices(architecture):
    """Every logit is that of a plain model whose weights have (alpha/rank)·B A added by hand; at first that is 0."""
    base = logits_of(tiny_lm(architecture))
    assert torch.equal(logits_of(adapted(architecture, moved=False)), base)
    for alpha in (None, 1.0):
        lm, by_hand = adapted(architecture, alpha=alpha), tiny_lm(architecture)
        found = dict(lm.named_parameters())
        for name in [name.removesuffix(".lora_A.default.weight") for name in found if ".lora_A." in name]:
            product = found[f"{name}.lora_B.default.weight"] @ found[f"{name}.lora_A.default.weight"]
            weight = by_hand.get_submodule(name).weight
            product = product.T if architecture == "gpt2" else product  # a Conv1D lies the other way
            weight.data += (alpha or 4.0) / 2 * product
        assert (logits_of(lm) - base).abs().max() > 0.1
        torch.testing.assert_close(logits_of(lm), logits_of(by_hand), atol=1e-4, rtol=1e-4)


def test_the_adapter_alone_is_trained_and_its_seed_is_nobody_else_s():
    before = torch.get_rng_state()
    one, same, other = (adapted(moved=False, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad == ("lora_" in name) for name, p in one.named_parameters())
    a, b, c = (torch.cat([p.flatten() for n, p in lm.named_parameters() if "lora_A" in n]) for lm in (one, same, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_family_that_peft_does_not_know_gets_one_in_all_linear_layers():
    lm = tiny_lm("olmo2")
    add_lora(lm, rank=2)
    kinds = {name.rpartition(".")[2] for name in adapters.adapter_layers(lm)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_second_adapter_and_one_without_peft_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="lora_rank must be 0 for a model that has an adapter, .* got 4"):
        add_lora(adapted(), rank=4)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r'lora_rank must be 0 without PEFT \(pip install "rlhf_lessons\[lora\]"\)'):
        add_lora(tiny_lm(), rank=4)


# --- The same weights as the reference ------------------------------------------------------------


@pytest.mark.parametrize("make_lm", [lambda a: adapted(a, moved=False), wrapped], ids=["add_adapter", "get_peft_model"])
@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_adapter_and_leaves_the_reference_where_it_was(method, make_lm, architecture):
    lm = make_lm(architecture)
    frozen = {name: p.clone() for name, p in lm.named_parameters() if not p.requires_grad}
    base, trainer = logits_of(tiny_lm(architecture)), make(method, lm, learning_rate=1e-2)
    assert trainer.reference is None
    flags = [p.requires_grad for p in trainer.policy.parameters()]
    history = [trainer.step() for _ in range(2)]
    assert abs(history[0]["kl"]) < 1e-6 and abs(history[1]["kl"]) > 1e-4
    assert max(metrics["first_ratio_error"] for metrics in history) < 1e-5
    with as_reference(trainer.lm) as reference:
        torch.testing.assert_close(logits_of(reference), base, atol=1e-6, rtol=0)
    assert (logits_of(trainer.lm) - base).abs().max() > 1e-2
    assert all(torch.equal(p, frozen[name]) for name, p in lm.named_parameters() if name in frozen)
    assert [p.requires_grad for p in trainer.policy.parameters()] == flags
    held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert held == sum(p.numel() for p in trainer.policy.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_with_a_reference_of_its_own(method):
    """The base model in a second copy, as without an adapter: the same numbers, and the same weights after."""
    left, right = make(method, adapted()), make(method, adapted(), tiny_lm())
    a, b = ({k: v for k, v in t.step().items() if "seconds" not in k} for t in (left, right))
    assert a["kl"] != 0 and a == pytest.approx(b, abs=1e-5)
    for p, q in zip(left.policy.parameters(), right.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_dpo_without_a_reference_is_dpo_with_a_copy_of_the_base():
    policies = [adapted(), adapted(), plain(wrapped())]
    options = dict(beta=0.5, epochs=4, batch_size=2, learning_rate=1e-2, device="cpu")
    losses = [
        fit_dpo(p, r, PAIRS, word_tokenizer(), **options)
        for p, r in zip(policies, (None, tiny_lm(), None), strict=True)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][-1] < losses[0][0]
    assert losses[2][0] == pytest.approx(0.6931472, abs=1e-5), "an adapter that adds nothing is its own reference"
    for p, q in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)


def test_facts_can_be_collected_without_a_reference(queries):
    config, options = PPOConfig(**SMALL), dict(eos_id=EOS, pad_id=PAD)
    scorer = as_scorer(count_good, word_tokenizer())
    alone, beside = (
        collect(adapted(), reference, scorer, *queries, config=config, **options,
                generator=torch.Generator().manual_seed(0)) for reference in (None, tiny_lm())
    )  # fmt: skip
    assert torch.equal(alone.tokens, beside.tokens)
    torch.testing.assert_close(alone.ref_log_probs, beside.ref_log_probs)
    assert (alone.log_probs - alone.ref_log_probs).abs().max() > 0.1


def test_what_has_no_adapter_to_turn_off_needs_a_reference(queries):
    message = "reference must be a model of its own, unless an adapter alone is trained; got None"
    for method in METHODS:
        with pytest.raises(ValueError, match=message):
            make(method, tiny_lm())
    with pytest.raises(ValueError, match=message):
        fit_dpo(tiny_lm(), None, PAIRS, word_tokenizer(), beta=0.5, device="cpu")
    lm = adapted()
    lm.get_input_embeddings().requires_grad_(True)  # then the reference would move with it
    with pytest.raises(ValueError, match=message):
        make("rloo", lm)
    assert lm.get_input_embeddings().weight.requires_grad
    with pytest.raises(ValueError, match="reference must be a model of its own; got one that shares"):
        make("rloo", (lm := adapted()), lm)


def test_an_adapter_comes_back_as_it_was_whatever_happens_meanwhile():
    lm = adapted()
    frozen = next(p for p in lm.parameters() if p.requires_grad).requires_grad_(False)
    before = logits_of(lm)
    with pytest.raises(KeyError), as_reference(lm):
        raise KeyError
    assert torch.equal(logits_of(lm), before) and not frozen.requires_grad
    own = tiny_lm()
    with as_reference(lm, own) as reference:
        assert reference is own and torch.equal(logits_of(lm), before)


# --- PEFT's own wrapper -----------------------------------------------------------------------------


def test_peft_s_wrapper_is_read_as_the_model_inside_it(queries):
    """Its signature hides the positions that padding on the left needs, and it calls the model past its hooks."""
    model = move(wrapped())
    inner = model.get_base_model()
    torch.testing.assert_close(logits_of(model), logits_of(inner))
    options = dict(max_new_tokens=5, eos_id=EOS, pad_id=PAD, temperature=1.0)
    a, b = (sample_responses(lm, *queries, **options, uniforms=torch.rand(3, 5, generator=torch.Generator()
            .manual_seed(1))) for lm in (model, inner))  # fmt: skip
    assert torch.equal(a.tokens, b.tokens)
    torch.testing.assert_close(a.log_probs, b.log_probs)
    assert Reader(model, queries[1].bool()).cache is not None, "its signature hides that too"
    padded = peft.get_peft_model(tiny_lm("llama", vocab_size=40), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert "<unk>" not in "".join(respond(padded, word_tokenizer(), ["film"] * 64, max_new_tokens=3)).split(">")[5:]
    assert (logits_of(padded)[:, 8:] == -torch.inf).all()


def test_an_adapter_around_the_layers_is_refused():
    config = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_lm("llama"), config)
    with pytest.raises(ValueError, match="an adapter must be inside the model's layers, as LoRA is; got PeftModel"):
        make("rloo", model)


# --- Saving, loading, merging -------------------------------------------------------------------------


@pytest.fixture
def base_folder(tmp_path):
    tiny_lm().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_an_adapter_is_saved_as_peft_saves_it_and_trains_on(base_folder, tmp_path, monkeypatch):
    """PEFT alone gives the same logits from the folder, and so do we; what was loaded is no longer frozen."""
    monkeypatch.chdir(tmp_path)
    policy = CausalLMWithValueHead(load_causal_lm("base"))  # a path that is right here alone
    prepare_policy(policy, lora_rank=2)
    trainer = PPOTrainer(PPOConfig(**SMALL | dict(learning_rate=1e-2)), policy, None, count_good, PROMPTS,
                         word_tokenizer())  # fmt: skip
    trainer.step()
    trainer.policy.save_pretrained(tmp_path / "policy")
    names = {path.name for path in (tmp_path / "policy").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "generation_config.json",
                     "value_head.safetensors"}  # fmt: skip
    said = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(base_folder) and said["task_type"] == "CAUSAL_LM"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    expected, base = logits_of(trainer.lm), tiny_lm()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "policy").eval()
    with torch.no_grad():
        positions = (MASK.cumsum(dim=1) - 1).clamp(min=0)
        found = theirs(input_ids=TEXTS, attention_mask=MASK, position_ids=positions).logits[MASK]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ours = CausalLMWithValueHead.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(logits_of(ours.lm), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(ours.value_head.weight, trainer.policy.value_head.weight) and ours.value_head.weight.any()
    before = [p.clone() for p in ours.lm.parameters() if p.requires_grad]
    assert len(before) == 4
    again = PPOTrainer(trainer.config, ours, None, count_good, PROMPTS, word_tokenizer())
    assert again.step()["kl"] != 0, "the reference is still the base model"
    assert not torch.equal(before[1], [p for p in ours.lm.parameters() if p.requires_grad][1])
    with pytest.raises(ValueError, match="got none: load an adapter with is_trainable=True"):
        make("rloo", peft.PeftModel.from_pretrained(tiny_lm(), tmp_path / "policy"))


def test_a_handed_in_wrapper_saves_an_adapter_too(tmp_path):
    trainer = make("rloo", wrapped(), learning_rate=1e-2)
    trainer.step()
    trainer.policy.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_lm(), tmp_path)
    torch.testing.assert_close(logits_of(theirs), logits_of(trainer.lm))


def test_a_folder_whose_adapter_or_base_is_missing_is_refused_in_a_line(base_folder, tmp_path):
    lm = load_causal_lm(base_folder)
    add_lora(lm, rank=2)
    lm.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for name, content in {"gone": saved | {"base_model_name_or_path": str(tmp_path / "gone")},
                          "none": saved | {"base_model_name_or_path": None}, "empty": {}}.items():  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"^cannot load an adapter from '.*{name}'"):
            load_causal_lm(tmp_path / name)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="^cannot load an adapter from"):
        load_causal_lm(tmp_path / "adapter")


def test_merged_weights_are_those_of_a_plain_model(architecture):
    lm, merged = adapted(architecture), tiny_lm(architecture, seed=9)
    before = {name: p.clone() for name, p in lm.state_dict().items()}
    weights = dict(merged_weights(lm))
    assert weights.keys() == merged.state_dict().keys()
    merged.load_state_dict(weights)
    torch.testing.assert_close(logits_of(merged), logits_of(lm), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in lm.state_dict().items()), "out of place"
    plain_lm = tiny_lm(architecture)
    assert all(torch.equal(x, plain_lm.state_dict()[name]) for name, x in merged_weights(plain_lm))


def test_a_reward_model_starts_from_the_merged_trunk_in_32_bits():
    lm = adapted("llama")
    model = RewardModel.from_causal_lm(lm, pad_token_id=PAD)
    hidden = trunk_of(model.classifier)(input_ids=TEXTS[1:]).last_hidden_state
    torch.testing.assert_close(hidden, trunk_of(lm)(input_ids=TEXTS[1:]).last_hidden_state, atol=1e-4, rtol=1e-4)
    prepare_policy(lm, weights="bf16")
    assert {p.dtype for p in RewardModel.from_causal_lm(lm, pad_token_id=PAD).parameters()} == {torch.float32}


def test_another_engine_gets_the_merged_weights():
    class Other(Sampler):
        exact, seen = False, None

        def __call__(self, lm, *prompts, **options):
            return sample_responses(lm, *prompts, **options)

        def update(self, weights):
            self.seen = {name: weight.clone() for name, weight in weights}

    lm, sampler = adapted(), Other()
    config = RLOOConfig(**SMALL, samples_per_prompt=4)
    RLOOTrainer(config, lm, None, count_good, PROMPTS, word_tokenizer(), sampler=sampler).step()
    engine = tiny_lm(seed=5)
    engine.load_state_dict(sampler.seen)
    torch.testing.assert_close(logits_of(engine), logits_of(lm), atol=1e-4, rtol=1e-4)


# --- Memory -----------------------------------------------------------------------------------------


def saved_bytes(trainer, batch):
    """What one forward pass keeps for the way back, weights left out."""
    weights, kept = {p.data_ptr() for p in trainer.policy.parameters()}, {}

    def pack(x):
        kept[x.data_ptr()] = x.numel() * x.element_size() * (x.data_ptr() not in weights)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        trainer.losses(batch)
    return sum(kept.values())


@pytest.mark.parametrize("with_adapter", [True, False])
def test_checkpointed_activations_change_memory_and_no_number(with_adapter, architecture):
    def trainer(checkpointing):
        policy = CausalLMWithValueHead(adapted(architecture) if with_adapter else tiny_lm(architecture))
        prepare_policy(policy, gradient_checkpointing=checkpointing)
        reference = None if with_adapter else tiny_lm(architecture, seed=1)
        return PPOTrainer(PPOConfig(**SMALL), policy, reference, count_good, PROMPTS, word_tokenizer())

    without, checkpointed = trainer(False), trainer(True)
    steps = [{k: v for k, v in t.step().items() if "seconds" not in k} for t in (without, checkpointed)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-4, abs=1e-6)
    for p, q in zip(without.policy.parameters(), checkpointed.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)
    assert saved_bytes(checkpointed, without.batch) < 0.7 * saved_bytes(without, without.batch)


def test_sampling_keeps_its_cache_under_checkpointing(monkeypatch):
    trainer = make("rloo", adapted())
    prepare_policy(trainer.policy, gradient_checkpointing=True)
    trainer.policy.train()
    lengths, read = [], Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, ids: lengths.append(ids.shape[1]) or read(self, ids))
    trainer.collect()
    assert lengths[0] > 1 and set(lengths[1:]) == {1}


def test_frozen_weights_in_16_bits(architecture):
    policy = CausalLMWithValueHead(adapted(architecture, moved=False))
    prepare_policy(policy, weights="bf16")
    kinds = {p.requires_grad: set() for p in policy.parameters()}
    for p in policy.parameters():
        kinds[p.requires_grad].add(p.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    trainer = PPOTrainer(PPOConfig(**SMALL), policy, None, count_good, PROMPTS, word_tokenizer())
    metrics = trainer.step()
    assert metrics["first_ratio_error"] < 5e-2 and metrics["grad_norm"] > 0
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)
    half = tiny_lm(architecture).bfloat16()
    add_lora(half, rank=2)  # beside weights that were loaded so
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="weights must be float32 where they train: .*; got bf16"):
        prepare_policy(tiny_lm(), weights="bf16")
    separate = CausalLMWithValueHead(tiny_lm(), critic="separate")
    with pytest.raises(ValueError, match="critic must be shared beside an adapter, .*; got separate"):
        prepare_policy(separate, lora_rank=2)
    with pytest.raises(ValueError, match='critic must be "shared" beside an adapter, .*; got "separate"'):
        CausalLMWithValueHead(adapted(), critic="separate")
    both = CausalLMWithValueHead(tiny_lm(), critic="separate")
    prepare_policy(both, gradient_checkpointing=True)
    assert both.lm.is_gradient_checkpointing and both.critic.is_gradient_checkpointing


# --- In the tiny world ------------------------------------------------------------------------------


@pytest.mark.slow
def test_ppo_raises_the_score_by_an_adapter_alone():
    """30 iterations of 64 responses; mean of the last three against the first three, 0.5 at least."""
    policy = CausalLMWithValueHead(load_causal_lm(ASSETS / "base"))
    prepare_policy(policy, lora_rank=8)
    config = PPOConfig(num_iterations=30, batch_size=64, learning_rate=2e-2, kl_coef=0.01, device="cpu")
    prompts = tiny_reviews.prompts(500, torch.Generator().manual_seed(0))
    trainer = PPOTrainer(
        config, policy, None, load_reward_model(ASSETS / "reward_model"), prompts, load_tokenizer(ASSETS / "base")
    )
    scores = [metrics["score"] for metrics in trainer.train()]
    assert sum(scores[-3:]) / 3 - sum(scores[:3]) / 3 > 0.5, (scores[:3], scores[-3:])
