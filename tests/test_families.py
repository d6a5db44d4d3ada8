"""Families of causal language models: each samples, scores, values and saves as its texts read alone, or is refused.

One row a family, made tiny from its own configuration: the sizes below where it has them, and what else it needs. The
vocabulary is padded far beyond the tokenizer's eight tokens, weights are large enough for logits to differ by whole
units. A few families, one for each way of reading, always run; the others with `-m slow`.
"""

import copy
from functools import cache

import pytest
import torch
from sampling import EOS, IDS, PAD, generator, repeated, teacher_forced
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lessons import forward
from rlhf_lessons.data import pad
from rlhf_lessons.likelihood import token_terms
from rlhf_lessons.models import CausalLMWithValueHead, RewardModel, load_reward_model, without_dropout
from rlhf_lessons.rollout import check_language_model, sample_responses

PADDED = 40  # rows of the embedding; the tokenizer has 8 tokens
NAMES = dict(vocab_size=PADDED, bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD, forced_eos_token_id=None)
WIDTHS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
INNER = ("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dff", "n_inner")
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length")
SIZES = (
    dict.fromkeys(WIDTHS, 32) | dict.fromkeys(DEPTHS, 2) | dict.fromkeys(HEADS, 4) | dict.fromkeys(INNER, 48)
    | dict.fromkeys(LENGTHS, 64) | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16)
    | dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "state_size", "rotary_dim"), 8)
    | dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "num_key_value_heads"), 2)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "attention_chunk_size"), 8)
    | dict(sliding_window=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, is_decoder=True)
)  # fmt: skip
LATENT = dict(num_key_value_heads=4)  # attention by a latent has as many keys as queries
LINEAR = dict(layer_types=["linear_attention", "full_attention"])
CONVOLUTION = dict(layer_types=["conv", "full_attention"])
TEXT = dict(
    vocab_size=PADDED, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, head_dim=8, max_position_embeddings=64, sliding_window=4,
)  # fmt: skip
EYE = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
)
SEEING = dict(text_config=TEXT, vision_config=EYE)
DROP = "left as it is"

# What always runs, and why.
CORE = {
    "bloom": {},  # ALiBi, no position ids
    "falcon": dict(head_dim=DROP, alibi=True),  # ALiBi made from the mask of tokens
    "opt": dict(word_embed_proj_dim=16),  # a last state narrower than the layers'; a head that skips the trunk
    "mistral": {},  # keys of a window only
    "mixtral": dict(router_jitter_noise=0.3),  # noise in training that no Dropout makes
    "roberta": {},  # positions that start elsewhere
    "bart": {},  # positions that nothing can tell
    "mamba": {},  # a state, no keys
    "rwkv": {},  # a state that padding would enter
    "qwen3_next": LINEAR,  # states in some layers, keys in others
    "llama4_text": {},  # a trunk by another name
    "gemma3": dict(text_config=TEXT, vision_config=EYE, image_token_index=39, boi_token_index=37, eoi_token_index=38),
}
PLAIN = """
    afmoe apertus arcee aria_text beam bert bert-generation bigbird_pegasus biogpt bitnet blenderbot
    blenderbot-small camembert codegen cohere cohere2 cohere2_moe ctrl cwm data2vec-text deepseek_v4 diffllama doge
    electra ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_mamba flex_olmo flint gemma gemma2 gemma3_text glm
    glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe
    granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax
    inkling2_text inkling_text internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama marian mbart
    megatron-bert mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text ministral ministral3 modernbert-decoder
    mpt mvp nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt pegasus persimmon phi phi3 plbart qwen2
    qwen2_moe qwen3 qwen3_moe roberta-prelayernorm roformer seed_oss smollm3 solar_open stablelm
    starcoder2 trocr vaultgemma whisper xglm xlm-roberta xlm-roberta-xl
"""
WIDE = dict.fromkeys(PLAIN.split(), {}) | {
    "axk1": LATENT,
    "axk2": LATENT,
    "bamba": dict(mamba_n_heads=8, mamba_d_head=8, attn_layer_indices=[1]),
    "big_bird": dict(attention_type="original_full"),
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": dict(n_shared_experts=1),
    "falcon_h1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8),
    "gemma4": dict(
        text_config=TEXT | dict(vocab_size_per_layer_input=40, hidden_size_per_layer_input=8), vision_config=EYE
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(mamba_n_heads=8, mamba_d_head=8, layer_types=["mamba", "attention"]),
    "jamba": dict(
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
    ),
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION,
    "longcat_flash": LATENT,
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1),
    "minicpm3": LATENT | dict(dim_model_base=32, scale_emb=1.0),
    "nemotron_h": dict(mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, chunk_size=8, n_groups=1),
    "phimoe": dict(input_jitter_noise=0.1),
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "recurrent_gemma": dict(num_hidden_layers=3),
    "xlstm": dict(v_head_dim=DROP),
    "xmod": dict(default_language="en_XX", languages=["en_XX"]),
    "youtu": LATENT,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "got_ocr2": SEEING,
    "llama4": SEEING,
    "qwen3_5": dict(text_config=TEXT | LINEAR, vision_config=EYE),
    "bailing_hybrid": LATENT | LINEAR,
    "lfm3": CONVOLUTION,
    "zamba": dict(
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        use_mamba_kernels=False,
        mamba_d_state=8,
        n_mamba_heads=2,
    ),
    "zamba2": dict(
        layers_block_type=["mamba", "hybrid"],
        mamba_headdim=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
        num_mem_blocks=1,
        hybrid_layer_ids=[1],
    ),
    "zaya": dict(num_experts_per_tok=1),
}
SETTINGS = CORE | WIDE | {"fuyu": SEEING, "xlnet": dict(max_position_embeddings=DROP)}
REFUSED = {
    "cpmant": "CpmAntForCausalLM must give a token the same log-probability when it is sampled as in its text alone",
    "xlm": "XLMWithLMHeadModel must give a token the same log-probability when it is sampled as in its text alone",
    "fuyu": "FuyuForCausalLM must give a token the same log-probability when it is sampled as in its text alone",
    "moshi": "MoshiForCausalLM must give a token the same log-probability when it is sampled as in its text alone",
    "xlnet": "XLNetLMHeadModel must read plain texts, padded or not",
    "rembert": "RemBertForCausalLM must read plain texts, padded or not; got RuntimeError: mat1 and mat2 shapes",
}
# `generate` itself leaves what the model says of a whole text: it counts positions otherwise, or fails.
ODD_GENERATE = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xlstm", "xmod",
}  # fmt: skip
FAMILIES = [*CORE, *(pytest.param(name, marks=pytest.mark.slow) for name in WIDE)]


def every(test):
    return pytest.mark.parametrize("family", FAMILIES)(test)


@cache
def made(family):
    config_class = type(AutoConfig.for_model(family))
    default, extra = config_class(), SETTINGS.get(family, {})
    sizes = {name: size for name, size in SIZES.items() if hasattr(default, name)}
    if "text_config" in extra:
        sizes = {}
    settings = (NAMES if sizes else {name: NAMES[name] for name in NAMES if name != "vocab_size"}) | sizes | extra
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config_class(**{name: value for name, value in settings.items() if value is not DROP})
        lm = AutoModelForCausalLM.from_config(config).float()
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.15)
        for module in lm.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight.data[module.padding_idx] = 0  # as loading leaves it
    return without_dropout(lm).train()  # in training mode, which sampling must not mind


@pytest.fixture
def lm(family, tokenizer):
    """A fresh model of the family, its padded vocabulary barred."""
    model = copy.deepcopy(made(family))
    check_language_model(model, tokenizer)
    return model


def texts(responses, queries):
    for row, (tokens, mask) in enumerate(zip(*queries, strict=True)):
        yield row, tokens[mask].tolist(), responses.tokens[row][responses.mask[row]].tolist()


@every
def test_greedy_is_generate_and_recorded_log_probs_are_those_of_one_pass(family, lm, queries):
    greedy = sample_responses(lm, *queries, max_new_tokens=6, temperature=1e-6, **IDS)
    drawn = repeated(queries, 8)
    responses = sample_responses(lm, *drawn, max_new_tokens=6, temperature=3.0, generator=generator(1), **IDS)
    assert lm.training and all(module.training for module in lm.modules()), "every mode is put back"
    assert responses.mask.sum(dim=1).unique().numel() > 1, "rows of one length would prove less"
    lm.eval()
    for row, prompt, response in texts(responses, drawn):
        expected = teacher_forced(lm, prompt, response, 3.0)
        assert responses.log_probs[row][responses.mask[row]].tolist() == pytest.approx(expected, abs=1e-5)
    for _, prompt, response in texts(greedy, queries):
        if family in ODD_GENERATE:
            assert greedily(lm, prompt, 6) == response
            continue
        ids = torch.tensor([prompt])
        written = lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        assert written[0, len(prompt) :].tolist() == response


@torch.no_grad()
def greedily(lm, prompt, steps):
    """The likeliest token after each text, read whole, until EOS."""
    ids = list(prompt)
    while len(ids) < len(prompt) + steps and ids[-1] != EOS:
        ids.append(int(lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


ROWS = [[1, 6], [1, 4, 6, 7, 5], [1, 5, 5, 6, 4, 7, 7]]


@every
@torch.no_grad()
def test_values_of_padded_texts_are_those_of_each_alone_and_survive_saving(family, lm, tmp_path):
    lm.eval()
    for critic in ("shared", "separate"):
        policy = CausalLMWithValueHead(lm, critic=critic)
        policy.value_head.weight.normal_(generator=generator(7))
        tokens, mask = pad(ROWS, PAD, side="left")
        logits, values = policy(tokens, mask)
        torch.testing.assert_close(policy.values(tokens, mask, keep=2), values[:, -2:], atol=1e-5, rtol=1e-5)
        for row, ids in enumerate(ROWS):
            ids = torch.tensor([ids])
            alone = lm(input_ids=ids, use_cache=False).logits[0]
            torch.testing.assert_close(logits[row][mask[row]], alone, atol=1e-5, rtol=1e-5)
            value = policy.values(ids, torch.ones_like(ids))[0]
            torch.testing.assert_close(values[row][mask[row]], value, atol=5e-5, rtol=1e-5)
        policy.save_pretrained(tmp_path / critic)
        loaded = CausalLMWithValueHead.from_pretrained(tmp_path / critic).eval()
        again, saved = loaded(tokens, mask), mask.nonzero(as_tuple=True)
        allowed = logits[saved] > -torch.inf
        torch.testing.assert_close(again.logits[saved][allowed], logits[saved][allowed], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again.values[saved], values[saved], atol=1e-5, rtol=1e-5)


@every
@torch.no_grad()
def test_a_reward_model_scores_padded_texts_as_transformers_does_each_alone(family, lm, tmp_path):
    if type(lm.config) not in CLASSIFIERS:
        with pytest.raises(ValueError, match="lm must be of a family with a sequence classifier; got "):
            RewardModel.from_causal_lm(lm, pad_token_id=PAD)
        return
    try:
        scorer = RewardModel.from_causal_lm(lm, pad_token_id=PAD)
    except ValueError as refusal:  # one that reads all of a text, as BERT's does
        assert "classifier must be a causal model with a score layer; got" in str(refusal)
        return
    for side in ("left", "right"):
        scores = scorer(*pad(ROWS, PAD, side=side))
        alone = [scorer.classifier(input_ids=torch.tensor([ids])).logits[0, 0] for ids in ROWS]
        torch.testing.assert_close(scores, torch.stack(alone), atol=1e-5, rtol=1e-5)
    assert scores.std() > 1e-3
    scorer.save_pretrained(tmp_path)
    again = load_reward_model(tmp_path).eval()(*pad(ROWS, PAD, side="right"))
    torch.testing.assert_close(again, scores, atol=1e-5, rtol=1e-5)


@every
def test_a_trainer_steps_from_a_ratio_of_one(family, lm, make_trainer):
    """In training mode, under gradient checkpointing where there is any."""
    if lm.supports_gradient_checkpointing:
        lm.gradient_checkpointing_enable()
    reference = copy.deepcopy(lm)
    trainer = make_trainer(CausalLMWithValueHead(lm), reference, batch_size=8, max_new_tokens=4, ppo_epochs=1)
    metrics = trainer.step()
    assert metrics["first_ratio_error"] < 1e-5 and abs(metrics["kl"]) < 1e-4 and metrics["grad_norm"] > 0


@every
def test_large_logits_say_the_same_without_being_held(family, lm, monkeypatch):
    """Whether the family's logits are just what a linear head gives, or are capped, scaled or made otherwise."""
    tokens, mask = pad(ROWS, PAD, side="left")
    asked, found = mask[:, -4:] & (torch.arange(4) > 0), []
    for large in (2**26, 0):
        monkeypatch.setattr(forward, "LARGE", large)
        lm.zero_grad()
        terms = token_terms(lm, tokens, mask, asked, temperature=0.7, entropy_gradient=True)
        torch.where(asked, terms.log_probs + terms.entropies, 0).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])
        found.append((terms.log_probs[asked], terms.entropies[asked], gradient))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(y, x, atol=1e-5 * x.abs().max().item(), rtol=0)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_read_right_is_refused_in_a_sentence(family, make_trainer):
    with pytest.raises(ValueError, match=REFUSED[family]):
        make_trainer(CausalLMWithValueHead(copy.deepcopy(made(family))), copy.deepcopy(made(family)))
