"""What the learner brings: which prompts and scores are used, and what the user is told of them."""

import argparse
import builtins
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from test_scoring import samples_of

from rlhf_lessons import data
from rlhf_lessons.__main__ import main
from rlhf_lessons.app import inputs as room
from rlhf_lessons.app.inputs import (
    Model,
    import_score,
    load_model,
    read_alike,
    resolve,
    warn_of_unknown,
)
from rlhf_lessons.models import load_causal_lm
from rlhf_lessons.scoring import as_scorer

LINES = ["good film bad film .", "bad film good bad .", "film"]
TINY_WORLD = room.ASSETS / "base"


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(LINES))
    return tmp_path / "corpus.txt"


@pytest.fixture
def pairs(tmp_path):
    pairs = [{"prompt": prompt, "chosen": "good", "rejected": "bad"} for prompt in ("film", "bad film")]
    (tmp_path / "pairs.jsonl").write_text("\n\n".join(map(json.dumps, pairs)))
    return tmp_path / "pairs.jsonl"


def brought(command="run", **given):
    """What a command is given, read."""
    return resolve(argparse.Namespace(command=command, critic="shared", **given))


# --- Prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_come_from_what_is_given_and_the_user_is_told(corpus, pairs, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("good\nfilm")

    def prompts(words=3, **given):
        chosen = brought(**given).choose_prompts(opening_words=words, seed=0)
        return [p if isinstance(p, str) else p["prompt"] for p in chosen], capsys.readouterr().err

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
    assert len(chosen) == room.NUM_PROMPTS and "openings of tiny reviews" in said
    with pytest.raises(ValueError, match="opening_words must be a whole number >= 0; got -1"):
        prompts(words=-1, **given)


def test_what_is_read_knows_its_line(pairs):
    """Prompts that are taken from preferences, too: what does not fit later is named by its place in the file."""
    found = brought(preferences=pairs)
    places = [f"{pairs}, line 1", f"{pairs}, line 3"]
    assert [pair.place for pair in found.preferences] == places
    assert [prompt.place for prompt in found.choose_prompts(opening_words=3, seed=0)] == places


def test_the_gold_reward_belongs_to_the_tiny_world(corpus, pairs):
    assert brought().tiny_world and brought(model=TINY_WORLD).tiny_world
    assert not any(brought(**given).tiny_world for given in (dict(corpus=corpus), dict(preferences=pairs)))
    assert not brought(prompts=corpus).tiny_world


def test_pairs_longer_than_the_context_are_counted(make_lm, tokenizer, tmp_path, capsys):
    """Left out or cut as was asked for, and where they give the prompts, those without room are no prompts."""
    short = {"prompt": "film", "chosen": "good", "rejected": "bad"}
    pairs = [short, short | {"prompt": "film " * 40}, short | {"chosen": "good " * 40}, short | {"prompt": "bad " * 26}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    for part in (make_lm(), tokenizer):
        part.save_pretrained(tmp_path / "lm")

    def kept(long):
        found = brought(preferences=path, model=tmp_path / "lm", long_pairs=long)
        found.check_lengths(Model(found.model.network, tokenizer, ""))
        return found.choose_pairs("preferences", Model(found.model.network, tokenizer, "")), found

    with pytest.raises(ValueError, match="pairs.jsonl, line 2: prompt and chosen must fit the model's context of 32"):
        kept("refuse")
    chosen, found = kept("drop")
    assert chosen == [pairs[0], pairs[3]]
    said = capsys.readouterr().err
    assert f"2 of the 4 pairs in {path} are longer than 32 tokens (drop: 2 are read)\n" in said
    prompts = found.choose_prompts(opening_words=3, seed=0, max_new_tokens=5)
    assert [prompt.place for prompt in prompts] == [f"{path}, line {number}" for number in (1, 3, 4)]
    assert len(found.choose_prompts(opening_words=3, seed=0, max_new_tokens=6)) == 2  # 27 tokens and 6, of 32
    with pytest.raises(ValueError, match="pairs.jsonl: none of its prompts leaves room for a response"):
        found.choose_prompts(opening_words=3, seed=0, max_new_tokens=31)
    chosen, found = kept("cut")
    assert [len(pair["prompt"]) for pair in chosen[1:2]] == [30] and len(chosen) == 3
    assert "2 of the 4 pairs" in (said := capsys.readouterr().err) and "(cut: 3 are read)\n" in said
    assert found.choose_pairs("eval_preferences", Model(found.model.network, tokenizer, "")) == []


def test_unknown_words_are_told(tokenizer, capsys, tmp_path):
    warn_of_unknown([[{"role": "user", "content": "plot"}]], tokenizer, tmp_path)  # a chat, which is not looked at
    warn_of_unknown(["good film film bad plot"], tokenizer, tmp_path)
    assert capsys.readouterr().err == ""
    warn_of_unknown(["good plot"], tokenizer, tmp_path)
    assert f"careful: 50% of the words in {tmp_path} are unknown" in capsys.readouterr().err


# --- Scores -----------------------------------------------------------------------------------------------------------


def test_a_reward_model_scores_tokens_or_texts(make_reward_model, make_tokenizer, tokenizer):
    """With the policy's tokenizer it is used itself; with another it reads texts, and gives the same scores."""
    model = make_reward_model()
    reward_model, nothing = Model(model, tokenizer, "reward"), brought()
    assert nothing.choose_score(reward_model, tokenizer, device="cpu") is model
    other = make_tokenizer()
    other.add_tokens(["plot"])
    by_text = nothing.choose_score(reward_model, other, device="cpu")
    assert not isinstance(by_text, torch.nn.Module)
    ids = torch.tensor([[1, 6, 4, 2], [1, 6, 5, 2]])  # <bos> film good <eos>, <bos> film bad <eos>
    expected = model(ids, torch.ones_like(ids)).tolist()
    assert by_text(["film", "film"], ["good", "bad"]).tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="texts must have at most 32 tokens, .*; got one of 36"):
        by_text(["film"], ["good " * 33])


def test_a_score_s_own_modules_can_be_imported_later(tmp_path, monkeypatch):
    """The working directory stays importable: a function may import what lies beside it when it is called."""
    (tmp_path / "late_scores.py").write_text("def f(p, r):\n    import late_words\n    return late_words.count(r)\n")
    (tmp_path / "late_words.py").write_text("def count(r):\n    return [len(x) for x in r]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert import_score("late_scores:f")(["a"], ["abc"]) == [3]


def test_tokenizers_read_alike_that_share_words_and_ends(make_tokenizer, tokenizer):
    """One vocabulary is not enough: the end of a response, or the beginning of a text, may be another token."""
    assert read_alike(tokenizer, make_tokenizer())
    without_begin = make_tokenizer()
    without_begin.backend_tokenizer.post_processor = None
    longer = make_tokenizer()
    longer.add_tokens(["plot"])
    for other in (make_tokenizer(eos_token="."), without_begin, longer):
        assert not read_alike(tokenizer, other) and not read_alike(other, tokenizer)


@pytest.mark.detail(25)
def test_a_reward_model_with_another_eos_reads_its_own(make_reward_model, make_tokenizer, tokenizer):
    """The policy ends by ".", which the reward model would take for a word; what never ended gets no EOS."""
    model, policy_s = make_reward_model(), make_tokenizer(eos_token=".")
    score = brought().choose_score(Model(model, tokenizer, "reward"), policy_s, device="cpu")
    batch = samples_of([[1, 6], [1, 6]], [[4, 7], [4, 5]], ended=[True, False])
    scores = as_scorer(score, policy_s)(batch).tolist()
    rows = [torch.tensor([ids]) for ids in ([1, 6, 4, 2], [1, 6, 4, 5])]
    assert scores == pytest.approx([model(ids, torch.ones_like(ids)).item() for ids in rows], abs=1e-5)


def test_a_reward_model_reads_chats_by_its_own_template(make_reward_model, make_tokenizer):
    """Where it has one; else the text that the policy was given."""
    chat = [{"role": "user", "content": "film"}]
    policy_s = make_tokenizer(eos_token=".", chat_template="good {{ messages[0].content }}")
    model, ids = make_reward_model(), [1, 4, 6]
    batch = samples_of([ids], [[5, 7]], ended=[True], records=[{"prompt": chat}])
    for template, read in ((None, [1, 4, 6, 5, 2]), ("bad bad {{ messages[0].content }}", [5, 5, 6, 5, 2])):
        own = make_tokenizer(chat_template=template)
        score = brought().choose_score(Model(model, own, "reward"), policy_s, device="cpu")
        expected = model(torch.tensor([read]), torch.ones(1, len(read))).item()
        assert as_scorer(score, policy_s)(batch).item() == pytest.approx(expected, abs=1e-5)


def test_plain_prompts_are_read_as_a_user_s_where_that_is_asked_for(tmp_path):
    """Prompts, those to evaluate with and the preferences' alike, their places and columns kept, chats as they are."""
    chat = [{"role": "user", "content": "film"}]
    (tmp_path / "a.txt").write_text("film\n\ngood film\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": 4}) + "\n" for p in ("film", chat)))
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "film", "chosen": "good", "rejected": "bad"}))
    (tmp_path / "d.txt").write_text("film good\n")
    files = dict(prompts="a.txt", eval_prompts="b.jsonl", preferences="c.jsonl", corpus="d.txt")
    given = {name: tmp_path / file for name, file in files.items()}
    plain, found = (resolve(argparse.Namespace(command="pretrain", chat=chat, **given)) for chat in (None, True))
    assert [record["prompt"] for record in plain.prompts] == ["film", "good film"]
    assert found.prompts == [{"prompt": chat}, {"prompt": [{"role": "user", "content": "good film"}]}]
    assert [record.place for record in found.prompts] == [f"{tmp_path}/a.txt, line {n}" for n in (1, 3)]
    assert found.eval_prompts == [{"prompt": chat, "answer": 4}] * 2
    assert found.preferences == [{"prompt": chat, "chosen": "good", "rejected": "bad"}]
    assert found.corpus == plain.corpus == ["film good"]


def test_a_chat_of_the_preferences_that_cannot_be_asked_is_named(folder):
    pair = {"prompt": [{"role": "user", "content": "film"}], "chosen": "good .", "rejected": "bad ."}
    (folder / "pairs.jsonl").write_text(json.dumps(pair | {"prompt": "film"}) + "\n" + json.dumps(pair))
    found = brought(model="lm", preferences="pairs.jsonl", long_pairs="drop")
    with pytest.raises(ValueError, match="pairs.jsonl, line 2: messages must suit the tokenizer's chat template"):
        found.choose_prompts(opening_words=0, seed=0)


def test_a_reward_model_with_its_own_tokenizer_reads_a_word_s_second_half(make_reward_model):
    """The policy wrote "s good" after "the plot wa": no space stands between the two."""
    policy_s, own = (data.train_tokenizer(["the plot was good ."] * 9, vocab_size=size) for size in (262, 290))
    assert not read_alike(policy_s, own)
    model = make_reward_model(vocab_size=len(own))
    ids = (
        data.encode_prompt(policy_s, "the plot wa"),
        data.encode_response(policy_s, "the plot wa", "s good", sampled=True),
    )
    score = brought().choose_score(Model(model, own, "reward"), policy_s, device="cpu")
    batch = samples_of([ids[0]], [ids[1]], records=[{"prompt": "the plot wa"}])
    read = data.encode_prompt(own, "the plot wa")
    read += data.encode_response(own, "the plot wa", "s good", sampled=True)
    assert own.decode(read) == "<bos>the plot was good<eos>"
    expected = model(torch.tensor([read]), torch.ones(1, len(read))).item()
    assert as_scorer(score, policy_s)(batch).item() == pytest.approx(expected, abs=1e-5)


# --- Read once --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch, make_lm, make_reward_model, tokenizer):
    """The working directory, with a file and a model of each kind."""
    pair = {"prompt": "film", "chosen": "good .", "rejected": "bad bad ."}
    (tmp_path / "corpus.txt").write_text("\n".join(LINES * 8))
    (tmp_path / "prompts.txt").write_text("film\ngood film")
    for name in ("pairs.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text("\n".join([json.dumps(pair)] * 8))
    for name, model in (("lm", make_lm()), ("policy", make_lm(seed=1)), ("reward", make_reward_model())):
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_tokenizer_s_largest_id_must_be_embedded(make_lm, make_tokenizer, tmp_path):
    """Where a vocabulary leaves numbers out, it has fewer tokens than its largest id says."""
    tokenizer = make_tokenizer()
    changed = json.loads(tokenizer.backend_tokenizer.to_str())
    changed["model"]["vocab"]["."] = 40
    tokenizer = make_tokenizer(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(changed)))
    assert len(tokenizer) == 8
    for part in (make_lm(), tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have ids below 8, the rows of .*; got 40; .*resize_token_embeddings"):
        load_model(load_causal_lm, tmp_path)


@pytest.fixture
def reads(monkeypatch):
    """What is opened by Python, and what transformers loads from where, as it happens."""
    from transformers import AutoTokenizer, PreTrainedModel

    opened, loaded = [], []
    plain_open = open

    def noting_open(file, *arguments, **options):
        opened.append(str(file))
        return plain_open(file, *arguments, **options)

    for place in (builtins, io):  # pathlib takes it from io
        monkeypatch.setattr(place, "open", noting_open)
    for kind, loader in (("model", PreTrainedModel), ("tokenizer", AutoTokenizer)):

        def load(cls, path, *arguments, kind=kind, plain=loader.from_pretrained.__func__, **options):
            loaded.append(f"{kind} {path}")
            return plain(cls, path, *arguments, **options)

        monkeypatch.setattr(loader, "from_pretrained", classmethod(load))
    return SimpleNamespace(opened=opened, loaded=loaded)


FIT = "--layers 1 --width 16 --heads 2 --context 32 --lm-epochs 1 --vocab-size 300".split()
PPO = "--num-iterations 2 --batch-size 8 --minibatch-size 8 --ppo-epochs 1 --max-new-tokens 4 --device cpu".split()
FILES = "--corpus corpus.txt --preferences pairs.jsonl --eval-preferences held_out.jsonl --prompts prompts.txt".split()


@pytest.mark.parametrize(
    ("arguments", "models"),
    [
        (["run", *FILES[2:], "--model", "lm", *PPO, "--out", "out"], ["lm", "out/reward_model"]),
        (["run", *FILES, *FIT, *PPO, "--out", "out"], ["out/base_model", "out/reward_model"]),  # what was just trained
        (["ppo", *FILES[-2:], "--model", "lm", "--reward-model", "reward", *PPO, "--out", "out"], ["lm", "reward"]),
        (["reward", *FILES[2:-2], "--model", "lm", "--device", "cpu", "--out", "out"], ["lm", "out/reward_model"]),
        (
            ["sample", *FILES[-2:], *"--model lm --policy policy --reward-model reward --count 2".split()],
            ["lm", "policy", "reward"],
        ),
    ],
    ids=["run with a model", "run from text", "ppo", "reward", "sample"],
)
def test_each_file_and_each_model_is_read_once(arguments, models, folder, reads):
    """A pipe can be read once alone, and a checkpoint of some gigabytes should be."""
    assert main(arguments) == 0
    given = [word for word in arguments if word.endswith((".txt", ".jsonl"))]
    assert {file: reads.opened.count(file) for file in given} == dict.fromkeys(given, 1)
    assert sorted(reads.loaded) == sorted(f"{kind} {model}" for kind in ("model", "tokenizer") for model in models)


# --- Looking changes nothing ------------------------------------------------------------------------------------------


def global_state():
    """What accelerate keeps for the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return [dict(state._shared_state) for state in (AcceleratorState, PartialState, GradientState)]


@pytest.fixture(params=["a trainer in bf16", "an accelerator in bf16"])
def live(request, make_trainer):
    """Somebody's own, at work in this process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if "trainer" in request.param:
        yield make_trainer(precision="bf16")
    else:
        AcceleratorState._reset_state(reset_partial_state=True)
        yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_looking_at_what_is_brought_changes_no_global_state(live, folder, make_tokenizer):
    """Neither for files and models nor for a reward model that reads texts, nor on another device than the one in use.

    Else the next line of a notebook that has a trainer would compute in another precision.
    """
    before = global_state()
    assert before[0] and before[1]
    given = dict(corpus="corpus.txt", preferences="pairs.jsonl", prompts="prompts.txt", reward_model="reward")
    found = brought(model="lm", **given, device="auto")
    found.choose_prompts(opening_words=3, seed=0)
    found.check_lengths(found.model, prompts=found.prompts, max_new_tokens=4)
    other = make_tokenizer()
    other.add_tokens(["plot"])
    score = found.choose_score(found.reward_model, other, device="cpu")
    assert len(score(["film"], ["good"])) == 1
    assert global_state() == before
