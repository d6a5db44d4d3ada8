"""Cards of models' folders: their lines, run in plain transformers, give the numbers that the package found."""

import argparse
import re
from dataclasses import asdict

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import decoders
from transformers import AutoModelForSequenceClassification

from rlhf_lessons import data
from rlhf_lessons.app.align import optimise, optimise_directly
from rlhf_lessons.app.cards import Card, as_code
from rlhf_lessons.app.inputs import Model, load_model, resolve
from rlhf_lessons.app.pipeline import fit_reward, pretrain
from rlhf_lessons.app.run_folder import RunFolder
from rlhf_lessons.config import DPOConfig, PPOConfig, PretrainConfig, RewardConfig, Settings
from rlhf_lessons.models import ASSETS, CausalLMWithValueHead, load_causal_lm, load_reward_model, load_tokenizer
from rlhf_lessons.scoring import ids_log_probs, score_ids, score_texts, text_log_probs

CPU = PPOConfig(device="cpu", max_new_tokens=4)
PAIRS = [{"prompt": "film", "chosen": "good .", "rejected": "bad ."}] * 16


def written(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def run_card(folder, monkeypatch, capsys):
    """(what the card's lines print, what it says they print, the names they leave), run in that folder."""
    text = written(folder)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S))
    assert "rlhf_lessons" not in code
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(code, names := {})
    return float(capsys.readouterr().out.split()[0]), float(re.search(r"\)  # (-?[\d.]+)$", text, re.M)[1]), names


def save(folder, model, tokenizer, *arguments, **settings):
    lm = getattr(model, "lm", model)
    return RunFolder(folder).save_models("m", model, tokenizer, Card(lm, tokenizer, "a test", settings, *arguments))


# --- The numbers ------------------------------------------------------------------------------------------------------


FAMILIES = ("gpt2", "llama", "gpt_neox")  # not qwen2, whose folders transformers reads with Qwen's own tokenizer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_policys_lines_give_its_log_probabilities_and_values(
    critic, family, make_policy, tokenizer, tmp_path, monkeypatch, capsys
):
    """With another temperature, and ids that no token has, which are no choice."""
    policy = make_policy(family, critic=critic, head=1.0, vocab_size=12)
    if policy.critic is not None:  # which has learnt something else than the policy
        with torch.no_grad():
            policy.critic.get_input_embeddings().weight.mul_(0.5)
    folder = save(tmp_path, policy, tokenizer, temperature=0.7)
    printed, said, names = run_card(folder, monkeypatch, capsys)
    assert printed == pytest.approx(said, abs=1e-4)
    loaded = CausalLMWithValueHead.from_pretrained(folder)
    with torch.no_grad():
        given = [names["prompt"]], [names["answer"]]
        assert float(ids_log_probs(policy.lm, *given, pad_id=0, temperature=0.7)) == pytest.approx(said, abs=1e-4)
        ids = torch.tensor([names["prompt"] + names["answer"]])
        torch.testing.assert_close(names["values"].squeeze(-1), loaded(ids, torch.ones_like(ids)).values)
    assert names["answer"][-1] == tokenizer.eos_token_id and names["drawn"].shape[1] <= len(names["prompt"]) + 24


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_models_lines_give_its_score(
    family, make_lm, make_reward_model, tokenizer, tmp_path, monkeypatch, capsys
):
    model = make_reward_model(family)
    model.config.reward_mean, model.config.reward_std = 0.7, 2.5
    card = Card(make_lm(family), tokenizer, "a test", {}, model)
    folder = RunFolder(tmp_path).save_models("m", model, tokenizer, card)
    printed, said, names = run_card(folder, monkeypatch, capsys)
    assert printed == pytest.approx(said, abs=1e-4) and "`(logit - 0.7) / 2.5`" in written(folder)
    assert [names["text"][0], names["text"][-1]] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert float(score_ids(model, [names["text"]], pad_id=0)) == pytest.approx(said, abs=1e-4)


@pytest.mark.parametrize("name", ["base", "aligned", "sums", "reward_model"])
def test_the_shipped_models_cards_give_their_numbers(name, monkeypatch, capsys):
    printed, said, _ = run_card(ASSETS / name, monkeypatch, capsys)
    assert printed == pytest.approx(said, abs=1e-4)


def test_plain_transformers_needs_padding_on_the_right_of_what_a_reward_model_reads():
    """As the card says; on the left, where the tokenizer sets it, the shorter text has another score."""
    path = ASSETS / "reward_model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), load_tokenizer(path)
    texts = ["the plot was great .", "i loved the plot . it was great ."]
    ids = [data.encode_prompt(tokenizer, text) + [tokenizer.eos_token_id] for text in texts]
    scores = score_texts(load_reward_model(path), tokenizer, texts, ["", ""])
    found = {}
    with torch.no_grad():
        for side in ("left", "right"):
            tokens, mask = data.pad(ids, tokenizer.pad_token_id, side=side)
            logits = model(tokens, attention_mask=mask.long()).logits.squeeze(-1)
            found[side] = (logits - model.config.reward_mean) / model.config.reward_std
    torch.testing.assert_close(found["right"], scores)
    assert (found["left"] - scores).abs().max() > 0.1


@pytest.mark.parametrize(("decoder", "shown"), [(None, "tokenizer('<bos> good bad',"), (decoders.Fuse(), "[1, 4, 5]")])
def test_ids_stand_for_a_text_that_the_tokenizer_reads_otherwise(decoder, shown, make_tokenizer):
    """Without spaces in what it decodes two words would be read as one that it does not know."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoder
    code = as_code(tokenizer, [1, 4, 5])
    assert code.startswith(shown) and eval(code, {"tokenizer": tokenizer}) == [1, 4, 5]


def test_an_adapter_is_loaded_by_the_same_lines(make_lm, tokenizer, tmp_path, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    make_lm().save_pretrained(tmp_path / "base")
    lm = load_causal_lm(tmp_path / "base")
    lm.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True))
    folder = save(tmp_path / "out", lm, tokenizer)
    assert "adapter_config.json" in written(folder) and not (folder / "model.safetensors").exists()
    printed, said, _ = run_card(folder, monkeypatch, capsys)
    assert printed == pytest.approx(said, abs=1e-4)
    monkeypatch.chdir(tmp_path)
    without = text_log_probs(load_causal_lm(tmp_path / "base"), tokenizer, ["film"], ["good ."])
    assert float(text_log_probs(lm, tokenizer, ["film"], ["good ."])) != pytest.approx(float(without), abs=1e-2)


# --- What else it says ------------------------------------------------------------------------------------------------


def test_a_hub_reads_what_stands_above_the_card(make_lm, make_reward_model, tokenizer, tmp_path):
    lm = make_lm()
    lm.name_or_path = "openai-community/gpt2"
    folder = save(tmp_path / "a", lm, tokenizer, batch_size=8, clip_eps_high=None)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": "openai-community/gpt2",
        "tags": ["rlhf", "rlhf_lessons"],
    }  # fmt: skip
    assert "trained by a test" in card.text and "Settings: batch_size 8, clip_eps_high None." in card.text
    assert "Base model: `gpt2`." in card.text and "value_head" not in card.text and "adapter" not in card.text
    lm.name_or_path = str(tmp_path / "a")  # a folder, of which a hub knows nothing
    model = make_reward_model()
    card = Card(lm, tokenizer, "a test", {}, model)
    folder = RunFolder(tmp_path / "b").save_models("m", model, tokenizer, card)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-classification" and card.data.base_model is None
    assert "Base model: `a`." in card.text and str(tmp_path) not in card.text
    lm.name_or_path = ""
    assert "Base model" not in written(save(tmp_path / "c", lm, tokenizer))


def test_a_model_is_kept_whose_card_cannot_be_made(make_lm, make_tokenizer, tmp_path):
    class Odd(type(make_tokenizer())):
        def decode(self, *arguments, **options):
            raise KeyError("something that nobody thought of")

    tokenizer = make_tokenizer()
    tokenizer.__class__ = Odd
    folder = save(tmp_path, make_lm(), tokenizer)
    assert written(folder) == "This model's card could not be made: KeyError: 'something that nobody thought of'\n"
    load_causal_lm(folder)
    with pytest.raises(FileNotFoundError):  # a disk's own errors are not kept back
        Card(make_lm(), tokenizer, "a test", {}).save_pretrained(tmp_path / "none")


def test_every_model_that_a_run_writes_has_its_card(make_lm, make_trainer, tokenizer, tmp_path, monkeypatch, capsys):
    (tmp_path / "corpus.txt").write_text("good film .\nbad film ." * 8)
    sizes = PretrainConfig(layers=1, width=16, heads=2, context=16, lm_epochs=1, vocab_size=300)
    given = resolve(argparse.Namespace(command="pretrain", corpus=tmp_path / "corpus.txt"))
    pretrain(given, Settings(pretrain=sizes, method=CPU), RunFolder(tmp_path / "a"))
    settings = Settings(reward=RewardConfig(reward_batch_size=4), method=CPU)
    fit_reward(given, Model(make_lm(), tokenizer, "lm"), settings, RunFolder(tmp_path / "b"), (PAIRS, ()))
    trainer, dpo = (
        make_trainer(num_iterations=1),
        DPOConfig(num_iterations=1, batch_size=2, dpo_epochs=0.5, device="cpu"),
    )
    made = {"rloo": (RunFolder(tmp_path / "c"), trainer.config), "dpo": (RunFolder(tmp_path / "d"), dpo)}
    for method, (folder, config) in made.items():
        folder.write_config({"method": method, method: asdict(config)}, ["run"])
    optimise(trainer, made["rloo"][0], method="rloo", gold=False)
    optimise_directly(
        dpo, make_lm(), make_lm(), make_trainer().scorer, ["film"], tokenizer, pairs=PAIRS, held_out=[],
        folder=made["dpo"][0], gold=False,
    )  # fmt: skip
    said = {
        "a/base_model": ("next-token prediction on 9 texts, from random weights", "width 16"),
        "b/reward_model": ("the Bradley–Terry loss on 16 pairs", "reward_batch_size 4"),
        "c/policy": ("RLOO against count_good", "ppo_epochs 2"),
        "d/policy": ("DPO on 16 pairs", "dpo_epochs 0.5"),
    }
    for name, (how, setting) in said.items():
        folder = tmp_path / name
        assert f"trained by {how}\n" in written(folder) and setting in written(folder), name
        printed, number, _ = run_card(folder, monkeypatch, capsys)
        assert printed == pytest.approx(number, abs=1e-4), name
        load_model(load_reward_model if "reward" in name else load_causal_lm, folder)
