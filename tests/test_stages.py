"""The stages between files: which prompts and scores are used, what the user is told, what is compared."""

import json

import pytest
import torch
from rlhf_lessons.report import RunFolder
from rlhf_lessons.sources import (
    Sources,
    choose_prompts,
    choose_score,
    context_of,
    import_score,
    warn_of_unknown,
)
from rlhf_lessons.stages import (
    PRESETS,
    StageConfig,
    annotated_preferences,
    compare,
    fit_reward,
    longest_response,
    pretrain,
    respond,
)

from rlhf_lessons import sources as sources_module
from rlhf_lessons import stages as stages_module
from rlhf_lessons.models import load_causal_lm
from rlhf_lessons.trainer import PPOConfig

CPU = PPOConfig(device="cpu", max_new_tokens=4)
LINES = ["good film bad film .", "bad film good bad .", "film"]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(LINES))
    return tmp_path / "corpus.txt"


@pytest.fixture
def pairs(tmp_path):
    pairs = [{"prompt": prompt, "chosen": "good", "rejected": "bad"} for prompt in ("film", "bad film")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return tmp_path / "pairs.jsonl"


# --- Prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_come_from_what_is_given_and_the_user_is_told(corpus, pairs, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("good\nfilm")

    def prompts(words=3, **given):
        chosen = choose_prompts(Sources(**given), opening_words=words, seed=0)
        return chosen, capsys.readouterr().err

    given = dict(corpus=corpus, preferences=pairs)
    chosen, said = prompts(prompts=tmp_path / "prompts.txt", **given)
    assert chosen == ["good", "film"] and f"prompts: 2, from {tmp_path / 'prompts.txt'}; the first is 'good'" in said
    chosen, said = prompts(**given)
    assert chosen == ["good film bad", "bad film good"] and "the first 3 words of lines in" in said
    assert prompts(words=2, **given)[0] == ["good film", "bad film"]
    chosen, said = prompts(words=0, **given)
    assert chosen == [""] and "prompts: 1, the begin token alone" in said
    chosen, said = prompts(preferences=pairs)
    assert chosen == ["film", "bad film"] and f"those in {pairs}" in said
    chosen, said = prompts()
    assert len(chosen) == sources_module.NUM_PROMPTS and "openings of tiny reviews" in said


def test_the_gold_reward_belongs_to_the_tiny_world(corpus, pairs):
    assert Sources().tiny_world and Sources(model="x", reward_model="y").tiny_world
    assert not any(Sources(**{name: pairs}).tiny_world for name in ("corpus", "preferences", "prompts"))


def test_unknown_words_are_told(tokenizer, capsys, tmp_path):
    warn_of_unknown(["good film film bad plot"], tokenizer, tmp_path)
    assert capsys.readouterr().err == ""
    warn_of_unknown(["good plot"], tokenizer, tmp_path)
    assert f"careful: 50% of the words in {tmp_path} are unknown" in capsys.readouterr().err


# --- Scores -----------------------------------------------------------------------------------------------------------


def test_a_reward_model_scores_tokens_or_texts(make_reward_model, make_tokenizer, tokenizer, tmp_path):
    """With the policy's tokenizer it is used itself; with another it reads texts, and gives the same scores."""
    model = make_reward_model()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "reward")
    shared = choose_score(Sources(), tmp_path / "reward", tokenizer, device="cpu")
    assert isinstance(shared, torch.nn.Module)
    other = make_tokenizer()
    other.add_tokens(["plot"])
    by_text = choose_score(Sources(), tmp_path / "reward", other, device="cpu")
    assert not isinstance(by_text, torch.nn.Module)
    ids = torch.tensor([[1, 6, 4, 2], [1, 6, 5, 2]])  # <bos> film good <eos>, <bos> film bad <eos>
    expected = model(ids, torch.ones_like(ids)).tolist()
    assert by_text(["film", "film"], ["good", "bad"]).tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="a text has 36 tokens, more than the reward model's context of 32"):
        by_text(["film"], ["good " * 33])


def test_a_score_s_own_modules_can_be_imported_later(tmp_path, monkeypatch):
    """The working directory stays importable: a function may import what lies beside it when it is called."""
    import sys

    (tmp_path / "late_scores.py").write_text("def f(p, r):\n    import late_words\n    return late_words.count(r)\n")
    (tmp_path / "late_words.py").write_text("def count(r):\n    return [len(x) for x in r]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert import_score("late_scores:f")(["a"], ["abc"]) == [3]


# --- Fits -------------------------------------------------------------------------------------------------------------


def test_texts_cut_at_the_context_are_counted(corpus, tmp_path, capsys):
    stages = StageConfig(layers=1, width=16, heads=2, context=6, lm_epochs=1, vocab_size=300)
    base = pretrain(Sources(corpus=corpus), stages, CPU, RunFolder(tmp_path / "out"))
    said = capsys.readouterr().err
    assert "2 of the texts are longer than the context of 6 tokens" in said and "3 texts" in said
    assert context_of(load_causal_lm(base)) == 6


def test_a_reward_model_is_measured_on_held_out_pairs(make_lm, tokenizer, tmp_path, capsys):
    """Trained on good over bad until it is right: all of the pairs, and none of those that say the opposite."""
    for part in (make_lm(), tokenizer):
        part.save_pretrained(tmp_path / "lm")
    pair = {"prompt": "film", "chosen": "good .", "rejected": "bad ."}
    opposite = pair | {"chosen": "bad .", "rejected": "good ."}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(pair)] * 32))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, [pair, pair, pair, opposite])))
    given = Sources(preferences=tmp_path / "train.jsonl", eval_preferences=tmp_path / "test.jsonl")
    stages = StageConfig(reward_epochs=10, reward_learning_rate=3e-3)
    fit_reward(given, tmp_path / "lm", stages, CPU, RunFolder(tmp_path / "out"))
    measured = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    assert measured == {"held_out_pairs": 4, "accuracy": 0.75}
    assert "right on 75.0% of 4 held-out pairs" in capsys.readouterr().err


def test_annotators_compare_two_answers_of_the_base_model():
    pairs = annotated_preferences(stages_module.ASSETS / "base", 20, seed=0)
    assert len(pairs) == 20 and all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)
    assert sum(pair["chosen"] != pair["rejected"] for pair in pairs) > 15
    assert pairs == annotated_preferences(stages_module.ASSETS / "base", 20, seed=0)


@pytest.mark.parametrize("settings", [dict(layers=0), dict(lm_epochs=-1.0), dict(heads=5), dict(opening_words=-1)])
def test_sizes_are_checked_when_made(settings):
    with pytest.raises(ValueError, match="^(layers|lm_epochs|width|opening_words) must be"):
        StageConfig(**settings)
    assert StageConfig(opening_words=0).opening_words == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_leave_a_response_room_for_its_prompt(preset):
    stages, ppo = PRESETS[preset]
    assert stages.context > ppo.max_new_tokens + 8


# --- Samples ----------------------------------------------------------------------------------------------------------


def test_long_prompts_are_refused_before_sampling(make_lm, tokenizer):
    with pytest.raises(ValueError, match="prompt 2: the prompt has 30 tokens; .* context of 32"):
        respond(make_lm(), tokenizer, ["film", "good " * 29], max_new_tokens=4)
    assert len(respond(make_lm(), tokenizer, ["film", "good " * 27], max_new_tokens=4)) == 2


def test_samples_take_every_prompt_in_turn_and_both_models_the_same(make_lm, tokenizer):
    def length(prompts, responses):
        return [len(response.split()) for response in responses]

    prompts = ["film", "good", "bad"]
    samples = compare(make_lm(), make_lm(seed=1), tokenizer, prompts, length, CPU, gold=False, count=7)
    asked = [sample["prompt"] for sample in samples]
    assert sorted(asked[:3]) == sorted(prompts) and asked[3:] == (asked[:3] * 2)[:4]
    for sample in samples:
        for side in ("before", "after"):
            assert sample[side]["score"] == len(sample[side]["text"].split()) and "gold" not in sample[side]
    same = compare(make_lm(), make_lm(), tokenizer, prompts, length, CPU, gold=True, count=3)
    assert all(sample["before"] == sample["after"] and "gold" in sample["after"] for sample in same)
    with pytest.raises(ValueError, match="must return one number per response"):
        compare(make_lm(), make_lm(), tokenizer, prompts, lambda p, r: [1.0], CPU, gold=False, count=2)


def test_the_response_shown_token_by_token_is_the_longest_that_ended(make_batch, tokenizer):
    batch = make_batch([3, 5, 4])
    object.__setattr__(batch, "ended", torch.tensor([True, False, True]))
    tokens, per_token = longest_response(batch, tokenizer)
    assert tokens == tokenizer.convert_ids_to_tokens(batch.responses[2, :4].tolist())
    assert per_token["value"] == batch.values[2, :4].tolist()
    assert per_token["kl"] == (batch.log_probs - batch.ref_log_probs)[2, :4].tolist()
