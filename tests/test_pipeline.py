"""The stages between files: what a fit tells the user and leaves behind, and what is compared and shown at the end."""

import argparse
import json

import pytest
import torch

from rlhf_lessons.app.inputs import ASSETS, Model, load_model, resolve
from rlhf_lessons.app.pipeline import compare, fit_reward, longest_response, pretrain
from rlhf_lessons.app.run_folder import RunFolder
from rlhf_lessons.config import PPOConfig, PretrainConfig, RewardConfig, Settings
from rlhf_lessons.fitting import annotated_preferences
from rlhf_lessons.models import context_of, load_causal_lm
from rlhf_lessons.scoring import as_scorer

CPU = PPOConfig(device="cpu", max_new_tokens=4)
LINES = ["good film bad film .", "bad film good bad .", "film"]


# --- Fits -------------------------------------------------------------------------------------------------------------


def test_texts_cut_at_the_context_are_counted(tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("\n".join(LINES))
    sizes = PretrainConfig(layers=1, width=16, heads=2, context=6, lm_epochs=1, vocab_size=300)
    given = resolve(argparse.Namespace(command="pretrain", corpus=tmp_path / "corpus.txt"))
    base = pretrain(given, Settings(pretrain=sizes, ppo=CPU), RunFolder(tmp_path / "out"))
    said = capsys.readouterr().err
    assert "2 of the texts are longer than the context of 6 tokens" in said and "3 texts" in said
    assert context_of(base.network) == context_of(load_causal_lm(base.name)) == 6


def test_a_reward_model_is_measured_on_held_out_pairs(make_lm, tokenizer, tmp_path, capsys):
    """Trained on good over bad until it is right: all of the pairs, and none of those that say the opposite."""
    pair = {"prompt": "film", "chosen": "good .", "rejected": "bad ."}
    opposite = pair | {"chosen": "bad .", "rejected": "good ."}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(pair)] * 32))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, [pair, pair, pair, opposite])))
    files = dict(preferences=tmp_path / "train.jsonl", eval_preferences=tmp_path / "test.jsonl")
    settings = Settings(reward=RewardConfig(reward_epochs=10, reward_learning_rate=3e-3), ppo=CPU)
    given = resolve(argparse.Namespace(command="reward", **files))
    fit_reward(given, Model(make_lm(), tokenizer, "lm"), settings, RunFolder(tmp_path / "out"))
    measured = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    assert measured == {"held_out_pairs": 4, "accuracy": 0.75}
    assert "right on 75.0% of 4 held-out pairs" in capsys.readouterr().err


def test_annotators_compare_two_answers_of_the_base_model():
    base = load_model(load_causal_lm, ASSETS / "base")
    pairs, again = (annotated_preferences(base.network, base.tokenizer, 20, seed=0) for _ in range(2))
    assert len(pairs) == 20 and all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)
    assert sum(pair["chosen"] != pair["rejected"] for pair in pairs) > 15
    assert pairs == again


# --- Samples ----------------------------------------------------------------------------------------------------------


def length(prompts, responses):
    return [len(response.split()) for response in responses]


def test_samples_take_every_prompt_in_turn_and_both_models_the_same(make_lm, tokenizer):
    def sampled(after, score=length, **options):
        models = {"before": make_lm(), "after": after}
        return compare(models, tokenizer, prompts, as_scorer(score, tokenizer), CPU, **options)

    prompts = ["film", "good", "bad"]
    samples = sampled(make_lm(seed=1), gold=False, count=7)
    asked = [sample["prompt"] for sample in samples]
    assert sorted(asked[:3]) == sorted(prompts) and asked[3:] == (asked[:3] * 2)[:4]
    for sample in samples:
        for side in ("before", "after"):
            assert sample[side]["score"] == len(sample[side]["text"].split()) and "gold" not in sample[side]
    same = sampled(make_lm(), gold=True, count=3)
    assert all(sample["before"] == sample["after"] and "gold" in sample["after"] for sample in same)
    with pytest.raises(ValueError, match="scores must be one number per response"):
        sampled(make_lm(), lambda p, r: [1.0], gold=False, count=2)


def test_the_response_shown_token_by_token_is_the_longest_that_ended(make_batch, tokenizer):
    batch = make_batch([3, 5, 4])
    object.__setattr__(batch, "ended", torch.tensor([True, False, True]))
    tokens, per_token = longest_response(batch, tokenizer)
    assert tokens == tokenizer.convert_ids_to_tokens(batch.responses[2, :4].tolist())
    assert per_token["value"] == batch.values[2, :4].tolist()
    assert per_token["kl"] == (batch.log_probs - batch.ref_log_probs)[2, :4].tolist()
