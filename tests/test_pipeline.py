"""The stages between files: what a fit tells the user and leaves behind, and what is compared and shown at the end."""

import argparse
import json
from dataclasses import asdict

import pytest
import torch

from rlhf_lessons.app import align, pipeline
from rlhf_lessons.app.align import History, before_and_after, optimise
from rlhf_lessons.app.inputs import ASSETS, Model, load_model, resolve
from rlhf_lessons.app.pipeline import fit_reward, pretrain
from rlhf_lessons.app.run_folder import RunFolder, longest_response, read_lines, read_metrics
from rlhf_lessons.config import PPOConfig, PretrainConfig, RewardConfig, Settings
from rlhf_lessons.fitting import annotated_preferences
from rlhf_lessons.forward import context_of
from rlhf_lessons.models import load_causal_lm, load_reward_model
from rlhf_lessons.scoring import as_scorer

CPU = PPOConfig(device="cpu", max_new_tokens=4)
LINES = ["good film bad film .", "bad film good bad .", "film"]


# --- Fits -------------------------------------------------------------------------------------------------------------


def test_texts_cut_at_the_context_are_counted(tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("\n".join(LINES))
    sizes = PretrainConfig(layers=1, width=16, heads=2, context=6, lm_epochs=1, vocab_size=300)
    given = resolve(argparse.Namespace(command="pretrain", corpus=tmp_path / "corpus.txt"))
    base = pretrain(given, Settings(pretrain=sizes, method=CPU), RunFolder(tmp_path / "out"))
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
    settings = Settings(reward=RewardConfig(reward_epochs=10, reward_learning_rate=3e-3), method=CPU)
    given = resolve(argparse.Namespace(command="reward", **files))
    fit_reward(given, Model(make_lm(), tokenizer, "lm"), settings, RunFolder(tmp_path / "out"))
    measured = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    assert measured == {"held_out_pairs": 4, "accuracy": 0.75}
    assert "right on 75.0% of 4 held-out pairs" in capsys.readouterr().err


def test_a_reward_model_is_kept_when_measuring_it_fails(make_lm, tokenizer, tmp_path, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(pipeline, "preference_accuracy", fail)
    pair = json.dumps({"prompt": "film", "chosen": "good .", "rejected": "bad ."})
    (tmp_path / "pairs.jsonl").write_text("\n".join([pair] * 8))
    files = dict(preferences=tmp_path / "pairs.jsonl", eval_preferences=tmp_path / "pairs.jsonl")
    given = resolve(argparse.Namespace(command="reward", **files))
    with pytest.raises(MemoryError):
        fit_reward(given, Model(make_lm(), tokenizer, "lm"), Settings(method=CPU), RunFolder(tmp_path / "out"))
    assert load_reward_model(tmp_path / "out" / "reward_model").config.reward_std != 1


@pytest.mark.parametrize(("equal", "said"), [(0, None), (3, "careful: 3 of the pairs hold the same text twice")])
def test_pairs_of_equal_texts_are_counted(equal, said, make_lm, tokenizer, tmp_path, capsys):
    pair = {"prompt": "film", "chosen": "good .", "rejected": "bad ."}
    pairs = [pair] * 8 + [pair | {"rejected": "good ."}] * equal
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    given = resolve(argparse.Namespace(command="reward", preferences=tmp_path / "pairs.jsonl"))
    fit_reward(given, Model(make_lm(), tokenizer, "lm"), Settings(method=CPU), RunFolder(tmp_path / "out"))
    error = capsys.readouterr().err
    assert said in error if said else "same text" not in error


def test_the_annotators_are_not_asked_of_words_that_they_cannot_read(make_lm, tokenizer, tmp_path):
    """They would choose at random, and a reward model would be trained on that."""
    given = resolve(argparse.Namespace(command="reward"))
    with pytest.raises(ValueError, match="give --preferences, or a --score: the tiny world's annotators read no other"):
        fit_reward(given, Model(make_lm(), tokenizer, "lm"), Settings(method=CPU), RunFolder(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_annotators_compare_two_answers_of_the_base_model():
    base = load_model(load_causal_lm, ASSETS / "base")
    pairs, again = (annotated_preferences(base.network, base.tokenizer, 20, seed=0) for _ in range(2))
    assert len(pairs) == 20 and all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)
    assert sum(pair["chosen"] != pair["rejected"] for pair in pairs) > 15
    assert pairs == again


# --- The report -------------------------------------------------------------------------------------------------------

PARTS = {"samples.md": "before_and_after", "figures": "draw_run", "report.html": "report_page", "summary.json": None}
GOING_ON = {"config.json", "before.json", "metrics.jsonl", "rollouts.jsonl", "policy"}  # there before the report


def align_in(path, trainer, *, gold=False):
    """A run of a trainer, as a command makes it, and its report."""
    folder = RunFolder(path)
    folder.write_config({"ppo": asdict(trainer.config)}, ["ppo"])
    return optimise(trainer, folder, gold=gold)


def failing(*arguments, **options):
    raise KeyError("something that nobody thought of")


@pytest.mark.parametrize(
    "broken", [["before_and_after"], ["draw_run"], ["report_page"], ["before_and_after", "draw_run", "report_page"]]
)
def test_a_part_of_the_report_that_fails_takes_nothing_with_it(broken, make_trainer, tmp_path, monkeypatch, capsys):
    """The policy is there, and every other part; what failed is said, and the run does not pass for a success."""
    for name in broken:
        monkeypatch.setattr(align, name, failing)
    lost = [part for part, function in PARTS.items() if function in broken]
    with pytest.raises(ValueError, match=f"^cannot write {', '.join(lost)}; the policy and the rest .* are written$"):
        align_in(tmp_path / "out", make_trainer(num_iterations=2))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    samples = set() if "samples.md" in lost else {"samples.json"}  # what samples.md is made of
    assert written == GOING_ON | samples | set(PARTS) - set(lost)
    said = [line for line in capsys.readouterr().err.splitlines() if "not written" in line]
    assert said == [f"{part}: not written: KeyError: 'something that nobody thought of'" for part in lost]
    load_causal_lm(tmp_path / "out" / "policy")


def test_gold_is_measured_of_the_batch_and_of_the_evaluation_prompts_answers_apart(make_trainer, tmp_path, monkeypatch):
    """A gold reward that counts the responses it is shown tells which they were."""
    monkeypatch.setattr(align.tiny_reviews, "gold_reward", lambda asked, texts: torch.ones(len(texts)) * len(texts))
    trainer = make_trainer(num_iterations=3, eval_prompts=["film", "good"], eval_every=2)
    summary = align_in(tmp_path / "out", trainer, gold=True)
    rows = read_metrics(tmp_path / "out")
    assert [(row["gold"], row.get("eval_gold")) for row in rows] == [(16, None), (16, 2), (16, 2)]
    assert [(summary[when]["gold"], summary[when]["eval_gold"]) for when in ("before", "after")] == [(16, 2)] * 2


def test_a_summary_that_cannot_be_written_leaves_samples_and_figures(make_trainer, tmp_path, monkeypatch):
    write = RunFolder.write_json
    fails = {"summary.json": failing}
    monkeypatch.setattr(RunFolder, "write_json", lambda folder, name, x: fails.get(name, write)(folder, name, x))
    with pytest.raises(ValueError, match="^cannot write summary.json; "):
        align_in(tmp_path / "out", make_trainer(num_iterations=1))
    assert GOING_ON | {"samples.json", *PARTS} - {"summary.json"} == {x.name for x in (tmp_path / "out").iterdir()}


def test_an_interruption_is_no_failure_of_a_part(make_trainer, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(align, "before_and_after", interrupt)
    with pytest.raises(KeyboardInterrupt):
        align_in(tmp_path / "out", make_trainer(num_iterations=1))
    assert {path.name for path in (tmp_path / "out").iterdir()} == GOING_ON


# --- Samples ----------------------------------------------------------------------------------------------------------


def length(prompts, responses):
    return [len(response.split()) for response in responses]


def test_samples_take_every_prompt_in_turn_and_both_models_the_same(make_lm, tokenizer):
    def sampled(after, score=length, **options):
        models = {"before": make_lm(), "after": after}
        return before_and_after(models, tokenizer, prompts, as_scorer(score, tokenizer), CPU, **options)

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


@pytest.mark.detail(25)
def test_a_sample_shows_the_score_of_the_tokens_that_were_sampled(make_lm, make_reward_model, make_tokenizer):
    """By a reward model with another tokenizer, too, and where the response was cut off: no EOS is put behind it."""
    policy_s, own, model = make_tokenizer(), make_tokenizer(), make_reward_model(vocab_size=9)
    own.add_tokens(["plot"])
    given = resolve(argparse.Namespace(command="ppo", critic="shared"))
    score = given.choose_score(Model(model, own, "reward"), policy_s, device="cpu")
    lm = make_lm(seed=4)
    shown, exact = (
        before_and_after({"before": lm}, policy_s, ["film"], as_scorer(scorer, policy_s), CPU, gold=False, count=16)
        for scorer in (score, model)
    )
    assert [sample["before"]["text"] for sample in shown] == [sample["before"]["text"] for sample in exact]
    scores = [[sample["before"]["score"] for sample in samples] for samples in (shown, exact)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    lengths = {len(sample["before"]["text"].split()) for sample in shown}
    assert lengths >= {1, CPU.max_new_tokens}, "some should have ended, and some not"


def test_prompts_of_each_kind_are_shown_as_text(make_lm, make_tokenizer):
    tokenizer = make_tokenizer(chat_template="{{ messages[0].content }} bad")
    prompts = ["film ", [1, 4, 6], [{"role": "user", "content": "good"}]]
    samples = before_and_after(
        {"before": make_lm()}, tokenizer, prompts, as_scorer(length, tokenizer), CPU, gold=False, count=3
    )
    assert sorted(sample["prompt"] for sample in samples) == ["film ", "good film", "user: good"]
    system = [{"role": "system", "content": "bad"}, *prompts[2]]
    (sample,) = before_and_after(
        {"before": make_lm()}, tokenizer, [system], as_scorer(length, tokenizer), CPU, gold=False, count=1
    )
    assert sample["prompt"] == "system: bad / user: good"
    with pytest.raises(ValueError, match="prompts must hold at least one prompt; got none"):
        before_and_after({"before": make_lm()}, tokenizer, [], as_scorer(length, tokenizer), CPU, gold=False)


def test_a_sample_ends_where_the_model_says_and_has_no_token_that_the_tokenizer_lacks(make_lm, tokenizer):
    def written(lm):
        tokens = []

        def score(prompts, responses, tokens_of=tokens):
            tokens_of.extend(responses)
            return length(prompts, responses)

        before_and_after({"before": lm}, tokenizer, ["film"], as_scorer(score, tokenizer), CPU, gold=False, count=64)
        return tokens

    stop = tokenizer.convert_tokens_to_ids("bad")
    lm = make_lm()
    assert any("bad" in text.split()[:-1] for text in written(lm))
    lm.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    assert not any("bad" in text.split()[:-1] for text in written(lm))
    padded = make_lm(vocab_size=64)  # most of them no token of the tokenizer's
    written(padded)
    assert padded(input_ids=torch.tensor([[1]])).logits[0, -1].isfinite().sum() == len(tokenizer)


def test_the_response_shown_token_by_token_is_the_longest_that_ended(make_batch, make_trainer, tokenizer, tmp_path):
    """Of the last iteration that was recorded, wherever it stands in the batch."""
    batch, history = make_batch([3, 5, 4, 2, 5, 4]), History(
        make_trainer(), RunFolder(tmp_path), method="ppo", rows=2, gold=False
    )  # fmt: skip
    object.__setattr__(batch, "ended", torch.tensor([True, False, True, True, True, True]))
    history.add(1, {"score": 0.0, "kl": 0.0}, make_batch([6, 6], seed=1))
    history.add(2, {"score": 0.0, "kl": 0.0}, batch)
    tokens, per_token = longest_response(tmp_path)
    assert tokens == tokenizer.convert_ids_to_tokens(batch.responses[4, :5].tolist())
    assert per_token.keys() == {"reward", "kl", "value", "advantage"}
    for name, x in (("value", batch.values), ("reward", batch.rewards), ("advantage", batch.advantages),
                    ("kl", batch.log_probs - batch.ref_log_probs)):  # fmt: skip
        assert per_token[name] == pytest.approx(x[4, :5].tolist(), abs=6e-7)


def test_where_no_response_ended_the_first_is_shown(make_batch, make_trainer, tokenizer, tmp_path):
    batch = make_batch([3, 5])
    object.__setattr__(batch, "ended", torch.tensor([False, False]))
    history = History(make_trainer(), RunFolder(tmp_path), method="ppo", rows=1, gold=False)
    history.add(1, {"score": 0.0, "kl": 0.0}, batch)
    assert longest_response(tmp_path)[0] == tokenizer.convert_ids_to_tokens(batch.responses[0, :3].tolist())


@pytest.mark.parametrize(("rows", "kept"), [(1, [1]), (121, [1, *range(3, 121, 3), 121]), (7, [*range(1, 8)])])
def test_responses_are_kept_of_some_fifty_iterations(rows, kept, make_batch, make_trainer, tmp_path):
    """The first and the last among them; in each the first three of the batch, and its longest that ended."""
    batch = make_batch([1, 1, 1, 2, 3])
    history = History(make_trainer(), RunFolder(tmp_path), method="ppo", rows=rows, gold=False)
    for i in range(1, rows + 1):
        history.add(i, {"score": 0.0, "kl": 0.0}, batch)
    recorded = read_lines(tmp_path / "rollouts.jsonl")
    assert [row["iteration"] for row in recorded] == [i for i in kept for _ in range(4)]
    assert [len(row["tokens"]) for row in recorded[:4]] == [1, 1, 1, 3]
