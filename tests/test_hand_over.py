"""`hand-over`: what is handed over, read in plain transformers and by a shell, says what the run's own models say.

The other engines read it in test_handed_over.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from rlhf_lessons import __main__ as commands
from rlhf_lessons import data
from rlhf_lessons.app.hand_over import hand_over
from rlhf_lessons.app.inputs import Inputs, Model
from rlhf_lessons.app.options import ENGINES
from rlhf_lessons.generation import sample_batch
from rlhf_lessons.models import CausalLMWithValueHead, load_causal_lm, load_reward_model, load_tokenizer
from rlhf_lessons.scoring import ModelScorer, TextScorer, missing_eos_scores

pytestmark = pytest.mark.usefixtures("small_world")
FAST = "--num-iterations 2 --batch-size 8 --minibatch-size 4 --ppo-epochs 3 --max-new-tokens 4 --device cpu".split()
GROUPS = "--samples-per-prompt 2 --gradient-accumulation-steps 2 --warmup-iterations 1".split()
GROUPS += "--clip-eps-high 0.3 --temperature 0.9".split()
DRAWN = {  # what runs would have been told that vLLM sampled for
    "marks": "--sampler vllm --sampler-correction mask --sampler-correction-level sequence --sampler-cap 4",
    "rloo": "--sampler vllm --sampler-correction none",
}
PAIRS = [
    {"prompt": "film", "chosen": "good .", "rejected": "bad bad ."},
    {"prompt": "", "chosen": "good", "rejected": "."},
]
CHAT = [{"role": "user", "content": "film"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m.content }} .{% endfor %}{% if add_generation_prompt %} bad{% endif %}"
)
SCORE = """
def marked(prompts, responses, mark, ended):
    rows = zip(prompts, responses, mark, ended)
    return [m * len(prompt.split()) + worth(response) + 10 * done for prompt, response, m, done in rows]

def worth(response):
    return response.count("good") - 5 * (response != response.strip())

def counted(prompts, responses):
    return [response.count("good") for response in responses]
"""
ENTRIES = {"trl": "reward", "openrlhf": "reward_func", "verl": "compute_score"}
NAMES = ("trl", "openrlhf", "verl")


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_lm, make_reward_model, make_tokenizer):
    """A folder with models, words and letters, and runs of them, each by another method."""
    folder, here, path = tmp_path_factory.mktemp("world"), os.getcwd(), sys.path.copy()
    bytes_ = data.train_tokenizer(["good film . bad film .", "bad good film ."] * 4, vocab_size=300)
    size = dict(n_positions=64, vocab_size=max(300, len(bytes_)))
    reward, letters_reward = make_reward_model(), make_reward_model("llama", vocab_size=size["vocab_size"])
    for model in (reward, letters_reward):
        model.config.reward_mean, model.config.reward_std = 0.7, 0.25
    parts = {
        "lm": (make_lm(), make_tokenizer(chat_template=TEMPLATE)), "reward": (reward, make_tokenizer()),
        "letters": (make_lm(**size), bytes_), "letters_reward": (letters_reward, bytes_),
    }  # fmt: skip
    for name, saved in parts.items():
        for part in saved:
            part.save_pretrained(folder / name)
    lines = {
        "prompts.txt": ["film", "good film", "bad bad film"],
        "marks.jsonl": [json.dumps({"prompt": p, "mark": i}) for i, p in enumerate(["film", "good film", CHAT])],
        "pairs.jsonl": map(json.dumps, PAIRS * 4), "scores.py": [SCORE],
    }  # fmt: skip
    for name, content in lines.items():
        (folder / name).write_text("\n".join(content), encoding="utf-8")
    try:
        os.chdir(folder)
        given = ["--model", "lm", "--prompts", "prompts.txt", "--reward-model", "reward"]
        marks = ["--model", "lm", "--prompts", "marks.jsonl", "--score", "scores:marked"]
        letters = ["--model", "letters", "--prompts", "prompts.txt", "--reward-model", "letters_reward"]
        learnt = ["--model", "lm", "--preferences", "pairs.jsonl", "--max-new-tokens", "4", "--device", "cpu"]
        runs = {
            "ppo": [*given, *FAST, "--critic", "separate", "--missing-eos-penalty", "0.5"],
            "spelled": [*letters, *FAST, "--missing-eos-mode", "replace"],
            "marks": [*marks, *FAST, "--method", "grpo", *GROUPS, "--kl-in", "loss", "--kl-kind", "k3"],
            "foreign": [*letters[:-1], "reward", *FAST],
            "rloo": [*given, *FAST, "--method", "rloo", *GROUPS],
            "dpo": [*learnt, *"--method dpo --dpo-batch-size 4 --num-iterations 2 --batch-size 8".split()],
            "best": [*given, *"--method best-of-n --n 4 --batch-size 4 --max-new-tokens 4 --device cpu".split()],
        }  # fmt: skip
        for name, words in runs.items():
            assert commands.main(["run", *words, "--out", name]) == 0
        for name, words in DRAWN.items():
            config = json.loads((folder / name / "config.json").read_text())
            config["made_by"]["command"] += words.split()
            (folder / name / "config.json").write_text(json.dumps(config))
        yield folder
    finally:
        os.chdir(here)
        sys.path[:] = path


@pytest.fixture
def handed(world, tmp_path, monkeypatch):
    """handed(run, to) -> its folder."""
    monkeypatch.chdir(world)
    return lambda run, to: hand_over(world / run, to, tmp_path / f"{run}-{to}")


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reward_of(folder, to):
    """The handed-over function, as the engines load it: from its file."""
    spec = importlib.util.spec_from_file_location(f"reward_{to}_{folder.name}", folder / "reward.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    sys.modules.pop("score", None)
    return getattr(module, ENTRIES[to])


def asked(folder, to, samples, rows):
    """What the engine would give its function for these samples: of the prompts as it has them, of tokens, of texts."""
    tokenizer, function = AutoTokenizer.from_pretrained(folder / "policy"), reward_of(folder, to)
    responses = data.real_ids(samples.responses, samples.response_mask)
    if to == "trl":
        return function([r["prompt"] for r in rows], responses, [r["record"] for r in rows], trainer_state=None)
    if to == "openrlhf":
        texts = [tokenizer.decode(ids) for ids in data.real_ids(samples.tokens, samples.attention_mask)]
        found = [function([q], [r["prompt"]], [r["label"]]) for q, r in zip(texts, rows, strict=True)]
        return [float(x["rewards"]) for x in found]
    return [
        function("rlhf_lessons", tokenizer.decode(ids, skip_special_tokens=True), r["reward_model"]["ground_truth"], {})
        for ids, r in zip(responses, rows, strict=True)
    ]


def ids_as_read(tokenizer, to, row):
    """A prompt's token ids, as the engine makes them."""
    if to == "verl":
        return tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    return tokenizer(row["prompt"], add_special_tokens=to == "trl").input_ids


def sampled(world, run, to, folder, count=160, longest=4):
    """Responses of the run's policy, on prompts as the engine reads them, and those prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    path = folder / ("prompts/train.jsonl" if to == "trl" else "prompts.jsonl")
    records = {"marks": data.read_prompts(world / "marks.jsonl")}.get(run, data.read_prompts(world / "prompts.txt"))
    rows = (rows_of(path)[: len(records)] * count)[:count]
    ids = [ids_as_read(tokenizer, to, row) for row in rows]
    assert ids[: len(records)] == [
        data.encode_prompt(load_tokenizer(world / "lm" if run != "spelled" else "letters"), r["prompt"])
        for r in records
    ]
    tokens, mask = data.pad(ids, tokenizer.pad_token_id, side="left")
    samples = sample_batch(
        load_causal_lm(world / run / "policy"), tokens, mask, records=[records[i % len(records)] for i in range(count)],
        max_new_tokens=longest, temperature=1.0, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return samples, rows


# --- The reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", NAMES)
@pytest.mark.parametrize(("run", "model"), [("ppo", "reward"), ("spelled", "letters_reward"), ("marks", None)])
def test_the_reward_is_the_runs_own(run, model, to, handed, world):
    """By a reward model on words and one on bytes, and by a function that reads columns; cut-off responses too."""
    folder = handed(run, to)
    samples, rows = sampled(world, run, to, folder)
    tokenizer = load_tokenizer(world / run / "policy")
    if model:
        with torch.no_grad():
            scores = ModelScorer(load_reward_model(world / model))(samples)
    else:
        sys.path.insert(0, str(world))
        from scores import marked

        scores = TextScorer(marked, tokenizer)(samples)
    penalty, mode = {"ppo": (0.5, "subtract"), "spelled": (1.0, "replace"), "marks": (1.0, "subtract")}[run]
    expected = missing_eos_scores(scores, samples.ended, penalty=penalty, mode=mode)
    found = torch.tensor(asked(folder, to, samples, rows))
    assert 9 < samples.ended.sum() < 150 or run == "spelled"
    assert json.loads((folder / "hand_over.json").read_text())["between"] == ("" if run == "spelled" else " ")
    plain = torch.ones(len(samples), dtype=torch.bool)
    if to == "verl" or run == "spelled":  # where texts are read, some of tokens sampled at random are read as others
        texts = [
            tokenizer.decode(ids, skip_special_tokens=to == "verl")
            for ids in data.real_ids(samples.responses, samples.response_mask)
        ]
        again = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        ids = data.real_ids(samples.responses, samples.response_mask)
        ids = [x[:-1] if to == "verl" and done else x for x, done in zip(ids, samples.ended.tolist(), strict=True)]
        plain = torch.tensor([a == b for a, b in zip(again, ids, strict=True)])
        assert plain.sum() > 10
    torch.testing.assert_close(found[plain], expected[plain], atol=1e-5, rtol=1e-5)


def test_a_reward_model_with_words_of_its_own_reads_texts(handed, world):
    """As in the run (`inputs.choose_score`): with its own begin and end tokens, which the policy's texts lack."""
    policy = load_tokenizer(world / "letters")
    prompts, responses, ended = ["film", "good film"], [" good .", " bad bad film"], [True, False]
    model = Model(load_reward_model(world / "reward"), load_tokenizer(world / "reward"), "reward")
    score = Inputs.choose_score(SimpleNamespace(score=None), model, policy, device="cpu")
    expected = score(prompts, responses, prompts, ended)
    ids = [policy(text, add_special_tokens=False).input_ids for text in responses]
    for to, path in (("trl", "prompts/train.jsonl"), ("openrlhf", "prompts.jsonl")):
        folder = handed("foreign", to)
        rows, function = rows_of(folder / path)[:2], reward_of(folder, to)
        if to == "trl":
            ids[0].append(policy.eos_token_id)
            found = function([row["prompt"] for row in rows], ids, [row["record"] for row in rows])
        else:
            texts = [
                row["prompt"] + text for row, text in zip(rows, (responses[0] + "<eos>", responses[1]), strict=True)
            ]
            found = [
                float(function([q], [r["prompt"]], [r["label"]])["rewards"]) for q, r in zip(texts, rows, strict=True)
            ]
        assert found == pytest.approx((expected - torch.tensor([0.0, 1.0])).tolist(), abs=1e-5)


def test_a_reward_models_normalisation_is_in_its_head(handed, world):
    folder = handed("ppo", "openrlhf") / "reward_model"
    plain, ours = AutoModelForSequenceClassification.from_pretrained(folder), load_reward_model(world / "reward")
    tokens = torch.tensor([[1, 4, 5, 2], [1, 6, 4, 2]])
    with torch.no_grad():
        scores, logits = ours(tokens, torch.ones_like(tokens)), plain(tokens).logits.squeeze(-1)
        torch.testing.assert_close(load_reward_model(folder)(tokens, torch.ones_like(tokens)), scores)
    torch.testing.assert_close(logits - 0.7 / 0.25, scores)
    assert (
        "is higher" not in (folder.parent / "README.md").read_text()
        and "2.8" in (folder.parent / "README.md").read_text()
    )


# --- The models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ENGINES)
def test_the_policy_is_the_runs(to, handed, world):
    folder, tokens = handed("ppo", to), torch.tensor([[1, 4, 5, 6]])
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder / "policy")(tokens).logits
        torch.testing.assert_close(found, load_causal_lm(world / "ppo" / "policy")(tokens).logits)


@pytest.mark.parametrize("run", ["ppo", "spelled"])
def test_the_critic_is_the_runs(run, handed, world):
    """With a trunk of its own and on the policy's; what has no bias is less by it, as is said."""
    policy = CausalLMWithValueHead.from_pretrained(world / run / "policy")
    assert (policy.critic is None) == (run == "spelled") and policy.value_head.bias.item() != 0
    tokens = torch.tensor([[1, 4, 5, 6]])
    with torch.no_grad():
        values = policy.values(tokens, torch.ones_like(tokens))
        token = AutoModelForTokenClassification.from_pretrained(handed(run, "verl") / "critic").train()
        torch.testing.assert_close(token(tokens).logits.squeeze(-1), values)
        folder = handed(run, "openrlhf")
        sequence = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
        found = sequence.score(sequence.base_model(tokens).last_hidden_state).squeeze(-1)
    torch.testing.assert_close(found + policy.value_head.bias, values)
    assert f"less {policy.value_head.bias.item():.5g}" in (folder / "README.md").read_text()


def test_an_adapter_is_merged(world, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(world)
    words = ["run", "--model", "lm", "--prompts", "prompts.txt", "--reward-model", "reward", *FAST, "--lora-rank", "2"]
    assert commands.main([*words, "--learning-rate", "0.1", "--out", str(tmp_path / "lora")]) == 0
    folder, tokens = hand_over(tmp_path / "lora", "verl"), torch.tensor([[1, 4, 5, 6]])
    assert folder == tmp_path / "lora-verl"
    assert not (folder / "policy" / "adapter_config.json").exists()  # which PEFT would put on the base model again
    trained = CausalLMWithValueHead.from_pretrained(tmp_path / "lora" / "policy")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder / "policy")(tokens).logits
        torch.testing.assert_close(found, trained.lm(tokens).logits, atol=1e-5, rtol=1e-5)
        assert (found - load_causal_lm(world / "lm")(tokens).logits).abs().max() > 0.01
        values = AutoModelForTokenClassification.from_pretrained(folder / "critic")(tokens).logits.squeeze(-1)
        torch.testing.assert_close(values, trained.values(tokens, torch.ones_like(tokens)), atol=1e-5, rtol=1e-5)


# --- Prompts and pairs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["trl", "openrlhf"])
def test_pairs_are_read_as_they_were_learnt_from(to, handed, world):
    folder, tokenizer = handed("dpo", to), load_tokenizer(world / "lm")
    rows = rows_of(folder / ("preferences/train.jsonl" if to == "trl" else "preferences.jsonl"))
    pairs = data.read_preferences(world / "pairs.jsonl")
    assert len(rows) == len(pairs) == 8
    for row, pair in zip(rows, pairs, strict=True):
        prompt, *answers = data.encode_pair(tokenizer, pair)
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            text = row["prompt"] + row[side]
            assert tokenizer(text, add_special_tokens=to == "trl").input_ids == prompt + answer
            assert row[side].endswith("<eos>")  # or the engine would add one, perhaps after a space


def test_prompts_fill_a_batch(handed):
    assert len(rows_of(handed("ppo", "verl") / "prompts.jsonl")) == 9  # three of them, in batches of 8
    assert len(rows_of(handed("marks", "trl") / "prompts" / "train.jsonl")) == 9


def test_prompts_that_would_be_read_as_others_are_refused(world, tmp_path, make_tokenizer, monkeypatch):
    """A tokenizer whose begin token is no text: none of the prompts can be written down for it."""
    from rlhf_lessons.app import hand_over as module

    monkeypatch.chdir(world)
    monkeypatch.setattr(module, "as_text", lambda tokenizer, ids, special: None)
    with pytest.raises(ValueError, match="^prompts must be texts that verl's tokenizer reads as this package does"):
        hand_over(world / "ppo", "verl", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- The commands -----------------------------------------------------------------------------------------------------


def typed(folder, script, *more, tmp_path):
    """The words that a script types, run by a shell in which each program only writes down its words."""
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("trl", "python3", "deepspeed"):
        (programs / name).write_text('#!/bin/sh\nfor word in "$0" "$@"; do printf "%s\\n" "$word"; done\n')
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["bash", str(folder / script), *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    return [os.path.basename(word) if i == 0 else word for i, word in enumerate(done.stdout.splitlines())]


def options_of(words):
    """{option: its value} of `--option value …` or `option=value`."""
    found, name = {}, None
    for word in words:
        if word.startswith("--"):
            found[name := word[2:]] = ""
        elif "=" in word and name is None:
            found.update([word.split("=", 1)])
        elif name:
            found[name] = f"{found[name]} {word}".strip()
    return found


def test_trls_command_has_the_runs_settings(handed, tmp_path):
    words = typed(handed("marks", "trl"), "run.sh", "--use_cpu", tmp_path=tmp_path)
    assert words[:2] == ["trl", "grpo"] and words[-1] == "--use_cpu"
    expected = dict(
        num_generations="2", per_device_train_batch_size="2", gradient_accumulation_steps="2", steps_per_generation="4",
        num_iterations="3", max_steps="12", warmup_steps="6", max_completion_length="4", temperature="0.9",
        learning_rate="0.001", beta="0.05", epsilon="0.2", epsilon_high="0.3", loss_type="dapo", scale_rewards="group",
        lr_scheduler_type="linear", bf16="False", reward_funcs="reward.reward", seed="0", weight_decay="0.0",
        vllm_importance_sampling_mode="sequence_mask", vllm_importance_sampling_clip_max="4.0",
        vllm_importance_sampling_clip_min="0.25", use_bias_correction_kl="False", entropy_coef="0.0",
    )  # fmt: skip
    found = options_of(words[2:])
    assert {name: found.get(name) for name in expected} == expected
    words = typed(handed("ppo", "trl"), "run.sh", tmp_path=tmp_path)
    assert words[:2] == ["trl", "grpo"] and options_of(words)["use_bias_correction_kl"] == "True"
    assert typed(handed("rloo", "trl"), "run.sh", tmp_path=tmp_path)[:2] == ["trl", "rloo"]
    folder = handed("dpo", "trl")
    for script, kind in (("run.sh", "dpo"), ("dpo.sh", "dpo"), ("reward.sh", "reward")):
        assert typed(folder, script, tmp_path=tmp_path)[:2] == ["trl", kind]
    found = options_of(typed(folder, "run.sh", tmp_path=tmp_path))
    assert (found["beta"], found["loss_type"], found["per_device_train_batch_size"]) == ("0.1", "sigmoid", "4")


def test_openrlhfs_command_has_the_runs_settings(handed, tmp_path):
    folder = handed("ppo", "openrlhf")
    words = typed(folder, "run.sh", tmp_path=tmp_path)
    assert words[:3] == ["python3", "-m", "openrlhf.cli.train_ppo_ray"]
    expected = {
        "rollout.batch_size": "8", "rollout.n_samples_per_prompt": "1", "rollout.micro_batch_size": "4",
        "train.batch_size": "4", "train.micro_batch_size": "4", "train.max_epochs": "3", "train.num_episodes": "2",
        "rollout.max_new_tokens": "4", "data.max_len": "8", "algo.kl.init_coef": "0.1", "algo.kl.estimator": "k1",
        "algo.advantage.estimator": "gae", "algo.advantage.lambd": "0.95", "algo.advantage.gamma": "1.0",
        "actor.eps_clip_low_high": "0.2 0.2", "critic.value_clip": "0.2", "actor.adam.lr": "0.001",
        "actor.lr_scheduler": "linear", "critic.model_name_or_path": str(folder / "critic"),
        "reward.remote_url": str(folder / "reward.py"), "reward.clip_range": "-1000000 1000000",
        "algo.advantage.is_correction_level": "token", "algo.advantage.is_correction_mode": "clip",
        "algo.advantage.is_correction_threshold": "0 2.0",
    }  # fmt: skip
    found = options_of(words)
    assert {name: found.get(name) for name in expected} == expected
    found = options_of(typed(handed("marks", "openrlhf"), "run.sh", tmp_path=tmp_path))
    assert found["algo.kl.use_loss"] == "" and found["algo.kl.estimator"] == "k3"
    assert (found["algo.advantage.estimator"], found["rollout.batch_size"]) == ("group_norm", "4")
    assert "critic.model_name_or_path" not in found and found["actor.lr_warmup_ratio"] == "0.5"
    assert found["algo.advantage.is_correction_threshold"] == "0.25 4.0"
    found = options_of(typed(handed("rloo", "openrlhf"), "run.sh", tmp_path=tmp_path))
    assert found["algo.advantage.is_correction_level"] == "off"
    assert typed(handed("dpo", "openrlhf"), "run.sh", tmp_path=tmp_path)[2] == "openrlhf.cli.train_dpo"


def test_verls_command_has_the_runs_settings(handed, tmp_path):
    folder = handed("ppo", "verl")
    words = typed(folder, "run.sh", tmp_path=tmp_path)
    assert words[:3] == ["python3", "-m", "verl.trainer.main_ppo"]
    actor = "actor_rollout_ref.actor"
    expected = {
        "data.train_batch_size": "8", "data.max_prompt_length": "4", "data.max_response_length": "4",
        f"{actor}.ppo_mini_batch_size": "4", f"{actor}.ppo_epochs": "3", f"{actor}.ppo_micro_batch_size_per_gpu": "4",
        "trainer.total_training_steps": "2", "trainer.total_epochs": "2", "algorithm.adv_estimator": "gae",
        "algorithm.lam": "0.95", "algorithm.use_kl_in_reward": "True", "algorithm.kl_ctrl.kl_coef": "0.1",
        "critic.cliprange_value": "0.2", "critic.model.path": str(folder / "critic"),
        f"{actor}.clip_ratio_high": "0.2", f"{actor}.optim.lr": "0.001", f"{actor}.optim.lr_scheduler_type": "cosine",
    }  # fmt: skip
    found = options_of(words[3:])
    assert {name: found.get(name) for name in expected} == expected
    found = options_of(typed(handed("marks", "verl"), "run.sh", tmp_path=tmp_path)[3:])
    assert found["algorithm.adv_estimator"] == "grpo" and found["algorithm.norm_adv_by_std_in_grpo"] == "True"
    assert found["data.train_batch_size"] == "4"
    assert "algorithm.use_kl_in_reward" not in found and found[f"{actor}.use_kl_loss"] == "True"
    assert (found[f"{actor}.kl_loss_type"], found[f"{actor}.kl_loss_coef"]) == ("k3", "0.05")
    assert (found["actor_rollout_ref.rollout.n"], found[f"{actor}.ppo_mini_batch_size"]) == ("2", "2")
    corrected = "algorithm.rollout_correction.rollout_is"
    assert (found[corrected], found[f"{corrected}_threshold"]) == ("sequence", "'0.25_4.0'")
    found = options_of(typed(handed("rloo", "verl"), "run.sh", tmp_path=tmp_path)[3:])
    assert found[corrected] == "null"
    assert found["algorithm.adv_estimator"] == "rloo" and found["algorithm.use_kl_in_reward"] == "True"


def test_best_of_n_hands_over_its_base_model(handed, world, tmp_path):
    folder, tokens = handed("best", "vllm"), torch.tensor([[1, 4, 5]])
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder / "policy")(tokens).logits
        torch.testing.assert_close(found, load_causal_lm(world / "lm")(tokens).logits)
    assert typed(folder, "run.sh", "3", tmp_path=tmp_path) == ["python3", "generate.py", "3"]
    compile((folder / "generate.py").read_text(), "generate.py", "exec")
    assert [row["prompt_token_ids"] for row in rows_of(folder / "prompts.jsonl")][0] == [1, 6]
    assert json.loads((folder / "hand_over.json").read_text())["end_ids"] == [2]
    assert not (folder / "reward.py").exists()


# --- What is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_handed_over_is_refused(world, tmp_path, monkeypatch, capsys):
    """In one line, exit code 2; nothing that is there is touched, and nothing half-made is left."""
    monkeypatch.chdir(world)
    (tmp_path / "there").mkdir()
    (tmp_path / "none").mkdir()
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "config.json").write_text((world / "ppo" / "config.json").read_text())
    new = tmp_path / "new"
    kept = (world / "prompts.txt").read_text()
    for run, to, out, said in (
        ("ppo", "trl", tmp_path / "there", f"--out must be a new folder; {tmp_path / 'there'} is there"),
        ("best", "verl", new, "--to must be vllm for a run of best-of-n; got verl"),
        ("dpo", "verl", new, "--to must be trl or openrlhf or vllm for a run of dpo; got verl"),
        (tmp_path / "none", "trl", new, f"{tmp_path / 'none'}: holds no run (No such file or directory)"),
        (stopped, "trl", new, f"{stopped}: its run must have finished to be handed over"),
    ):
        assert commands.main(["hand-over", "--to", to, str(run), "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"\nerror: {said}\n"
    try:
        (world / "prompts.txt").write_text("good film")
        assert commands.main(["hand-over", "--to", "trl", "ppo", "--out", str(new)]) == 2
        said = "prompts must be what the run was given; prompts.txt is something else now"
        assert capsys.readouterr().err == f"\nerror: {said}\n"
        (world / "prompts.txt").unlink()
        assert commands.main(["hand-over", "--to", "trl", "ppo", "--out", str(new)]) == 2
        assert capsys.readouterr().err == "\nerror: prompts.txt: cannot be read: No such file or directory\n"
    finally:
        (world / "prompts.txt").write_text(kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none", "stopped", "there"]


def test_a_folder_is_whole_or_not_there(world, tmp_path, monkeypatch, capsys):
    from rlhf_lessons.app import hand_over as module

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(world)
    monkeypatch.setattr(module, "write_texts", full)
    assert commands.main(["hand-over", "--to", "trl", "ppo", "--out", str(tmp_path / "out")]) == 2
    assert "No space left on device" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
