"""A folder that was handed over, read by TRL, verl, OpenRLHF and vLLM themselves; skipped where one is not installed.

`make engines` installs the first three without all that they need for training on many GPUs, and runs this; `make vllm`
runs the last part.
"""

# ruff: noqa: F811  fixtures by their names
import ast
import asyncio
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_hand_over import handed, rows_of, sampled, typed, world  # noqa: F401

from rlhf_lessons import __main__ as commands
from rlhf_lessons import data
from rlhf_lessons.app.hand_over import hand_over
from rlhf_lessons.importance import masked_ratio, truncated_ratio
from rlhf_lessons.models import (
    CausalLMWithValueHead,
    bar_unused_ids,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
)
from rlhf_lessons.scoring import ModelScorer, ids_log_probs, missing_eos_scores, score_ids

HERE = any(map(importlib.util.find_spec, ("trl", "verl", "openrlhf"))) or "VLLM_PYTHON" in os.environ
pytestmark = [
    pytest.mark.skipif(not HERE, reason="none of the engines is installed"),
    pytest.mark.filterwarnings("ignore"),
]


def expected_scores(world, samples):
    """Of the run `ppo`: its reward model's, on the tokens, less its price of a missing end token."""
    with torch.no_grad():
        scores = ModelScorer(load_reward_model(world / "reward"))(samples)
    return missing_eos_scores(scores, samples.ended, penalty=0.5)


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "script"),
    [("ppo", "run.sh"), ("rloo", "run.sh"), ("marks", "run.sh"), ("dpo", "run.sh"), ("dpo", "reward.sh")],
)
def test_trl_takes_two_steps(run, script, handed, world, tmp_path, monkeypatch):
    """By the very command, on a CPU; its first rewards are the run's scores of the same tokens."""
    pytest.importorskip("trl", minversion="1.16", exc_type=ImportError)
    datasets, seen = pytest.importorskip("datasets"), []
    folder = handed(run, "trl")
    words = typed(folder, script, tmp_path=tmp_path)[1:]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    sys.modules.pop("reward", None)
    command = importlib.import_module(f"trl.scripts.{words[0]}")
    if words[0] in ("grpo", "rloo"):
        trainer = getattr(importlib.import_module("trl"), f"{words[0].upper()}Trainer")
        calculate = trainer._calculate_rewards

        def calculated(self, inputs, prompts, completions, ids):
            seen.append((prompts, ids, calculate(self, inputs, prompts, completions, ids)))
            return seen[-1][-1]

        monkeypatch.setattr(trainer, "_calculate_rewards", calculated)
    extra = ["--max_steps", "2", "--use_cpu", "--save_strategy", "no", "--disable_tqdm", "True"]
    arguments = command.make_parser().parse_args_and_config(args=words[1:] + extra)
    assert (arguments[1].max_steps, arguments[1].use_cpu) == (2, True)  # what comes last counts
    command.main(*arguments)
    (saved,) = folder.glob("trained*/model.safetensors")
    assert saved.stat().st_size > 10_000
    if run in ("ppo", "rloo"):
        tokenizer, (prompts, ids, found) = load_tokenizer(folder / "policy"), seen[0]
        rows = [
            data.encode_prompt(tokenizer, prompt) + list(answer) for prompt, answer in zip(prompts, ids, strict=True)
        ]
        ended = torch.tensor([row[-1] == tokenizer.eos_token_id for row in rows])
        scores = score_ids(load_reward_model(world / "reward"), rows, pad_id=0)
        scores = missing_eos_scores(scores, ended, penalty=0.5 if run == "ppo" else 1.0)
        torch.testing.assert_close(found.squeeze(1).cpu(), scores, atol=1e-4, rtol=1e-4)


# --- verl -------------------------------------------------------------------------------------------------------------


def composed(folder, tmp_path):
    """verl's whole configuration with what run.sh sets."""
    verl, hydra = pytest.importorskip("verl", exc_type=ImportError), pytest.importorskip("hydra")
    place = Path(verl.__file__).parent / "trainer" / "config"
    words = typed(folder, "run.sh", tmp_path=tmp_path)
    with hydra.initialize_config_dir(config_dir=str(place), version_base=None):
        return hydra.compose("ppo_trainer", overrides=words[3:])


@pytest.mark.parametrize("run", ["ppo", "marks", "rloo"])
def test_verl_takes_the_command(run, handed, tmp_path):
    """Every setting is one that it knows, and of a kind that its dataclasses take."""
    config = composed(handed(run, "verl"), tmp_path)
    made = pytest.importorskip("verl.utils.config", exc_type=ImportError).omega_conf_to_dataclass
    actor = made(config.actor_rollout_ref.actor)
    high = 0.2 if run == "ppo" else 0.3
    assert (actor.clip_ratio_high, actor.optim.lr, actor.optim.override_optimizer_config["eps"]) == (high, 1e-3, 1e-5)
    if run == "ppo":
        critic = made(config.critic)
        assert (critic.cliprange_value, critic.optim.lr, critic.ppo_micro_batch_size_per_gpu) == (0.2, 1e-3, 4)
    algorithm = made(config.algorithm)
    assert algorithm.adv_estimator == {"ppo": "gae", "marks": "grpo", "rloo": "rloo"}[run]
    correction = {name: algorithm.rollout_correction[name] for name in ("rollout_is", "rollout_is_threshold")}
    expected = {"ppo": ("token", 2.0), "marks": ("sequence", "0.25_4.0"), "rloo": (None, 2.0)}[run]
    assert tuple(correction.values()) == expected
    if run != "rloo":
        helper = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
        ours, (level, _) = {"ppo": truncated_ratio, "marks": masked_ratio}[run], expected
        log_ratio = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        mask = torch.arange(5) < torch.tensor([5, 4, 3, 2, 1, 5])[:, None]
        found, _ = helper.compute_rollout_correction_weights(log_ratio, mask.float(), **correction)
        weights = ours(log_ratio, torch.zeros(6, 5), mask, cap=2.0 if run == "ppo" else 4.0, level=level)
        torch.testing.assert_close(found[mask], weights[mask])
        assert 0 < (weights[mask] == log_ratio.exp()[mask]).sum() < mask.sum() or level == "sequence"
    assert algorithm.use_kl_in_reward == (run != "marks") and actor.use_kl_loss == (run == "marks")


def test_verls_dataset_keeps_all_prompts_as_they_were(handed, world, tmp_path, monkeypatch):
    config = composed(folder := handed("ppo", "verl"), tmp_path)
    module = pytest.importorskip("verl.utils.dataset.rl_dataset", exc_type=ImportError)
    builder = importlib.import_module("verl.utils.tokenizer.continuous_token").ContinuousTokenBuilder
    monkeypatch.setattr(module.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = load_tokenizer(folder / "policy")
    config.data.filter_overlong_prompts = True
    dataset = module.RLHFDataset([config.data.train_files], tokenizer, config.data)
    given = data.read_prompts(world / "prompts.txt")
    assert len(dataset) == 3 * len(given)
    for i, record in enumerate(given):
        ids = builder(tokenizer).build_initial_tokens(list(dataset[i]["raw_prompt"]))
        assert ids == data.encode_prompt(tokenizer, record["prompt"])


def test_verls_reward_manager_gives_the_runs_scores(handed, world, tmp_path):
    config = composed(folder := handed("ppo", "verl"), tmp_path)
    reward = pytest.importorskip("verl.trainer.ppo.reward", exc_type=ImportError)
    protocol = importlib.import_module("verl").DataProto
    samples, rows = sampled(world, "ppo", "verl", folder, count=40)
    tokenizer = load_tokenizer(folder / "policy")
    expected, checked = expected_scores(world, samples), 0

    async def scores():
        manager = reward.load_reward_manager(config, tokenizer)
        found = []
        for i, row in enumerate(rows):
            tensors = {
                "responses": samples.responses[i : i + 1],
                "attention_mask": samples.attention_mask[i : i + 1].long(),
            }
            others = {"data_source": ["x"], "reward_model": [row["reward_model"]], "extra_info": [{}]}
            batch = protocol.from_dict(tensors=tensors, non_tensors={k: as_objects(v) for k, v in others.items()})
            found.append((await manager.run_single(batch))["reward_score"])
        return found

    specials = {*tokenizer.all_special_ids} - {tokenizer.eos_token_id}
    for i, found in enumerate(asyncio.run(scores())):
        if not specials & {*samples.responses[i][samples.response_mask[i]].tolist()}:  # which verl leaves out
            assert found == pytest.approx(expected[i].item(), abs=1e-4)
            checked += 1
    assert checked > 3


def as_objects(items):
    import numpy as np

    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def test_verls_loader_gives_the_runs_values(handed, world, monkeypatch):
    module = pytest.importorskip("verl.utils.model", exc_type=ImportError)
    from transformers import AutoConfig, AutoModelForTokenClassification

    folder = handed("ppo", "verl") / "critic"
    load = AutoModelForTokenClassification.from_pretrained

    def without_flash(*arguments, **options):  # which only a GPU has
        return load(*arguments, **{**options, "attn_implementation": "eager"})

    monkeypatch.setattr(AutoModelForTokenClassification, "from_pretrained", without_flash)
    critic = module.load_valuehead_model(str(folder), torch.float32, AutoConfig.from_pretrained(folder), False)
    policy, tokens = CausalLMWithValueHead.from_pretrained(world / "ppo" / "policy"), torch.tensor([[1, 4, 5, 6]])
    with torch.no_grad():
        values = policy.values(tokens, torch.ones_like(tokens))
        torch.testing.assert_close(critic(tokens).logits.squeeze(-1), values, atol=1e-5, rtol=1e-5)


# --- OpenRLHF ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def openrlhf(monkeypatch):
    """openrlhf(name) -> one of its modules, without those beside it that need a GPU's libraries."""
    found = importlib.util.find_spec("openrlhf")
    if found is None:
        pytest.skip("openrlhf is not installed")
    place = found.submodule_search_locations[0]
    for name in ("", ".utils", ".models", ".datasets"):
        package = types.ModuleType("openrlhf" + name)
        package.__path__ = [place + name.replace(".", "/")]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    absent = [name for name in ("deepspeed", "flash_attn") if importlib.util.find_spec(name) is None]
    for name in (*absent, "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"):
        if name.split(".")[0] in absent:
            stub = types.ModuleType(name)
            stub.__getattr__ = lambda attribute: None  # nothing here asks it
            stub.__path__, stub.__spec__ = [], importlib.util.spec_from_loader(name, None)
            monkeypatch.setitem(sys.modules, name, stub)
    before = {*sys.modules}
    yield lambda name: pytest.importorskip(f"openrlhf.{name}", exc_type=ImportError)
    for name in {*sys.modules} - before:
        if name.startswith("openrlhf."):
            del sys.modules[name]


def parsed(words, openrlhf):
    """What OpenRLHF's own command makes of these words: its parser, and its checks, without the training."""
    place, caught = Path(sys.modules["openrlhf"].__path__[0]), []
    source = ast.parse((place / "cli" / f"{words[2].rpartition('.')[2]}.py").read_text(encoding="utf-8"))
    (main,) = [node for node in source.body if isinstance(node, ast.If)]
    names = {
        "argparse": importlib.import_module("argparse"),
        "train": caught.append,
        "math": importlib.import_module("math"),
    }
    names |= {"os": os, "datetime": importlib.import_module("datetime").datetime}
    old = sys.argv
    try:
        sys.argv = words[2:]
        exec(compile(ast.Module(main.body, []), words[2], "exec"), names)
    finally:
        sys.argv = old
    return caught[0]


@pytest.mark.parametrize("run", ["ppo", "marks", "rloo"])
def test_openrlhf_takes_the_command(run, openrlhf, handed, tmp_path):
    found = parsed(typed(handed(run, "openrlhf"), "run.sh", tmp_path=tmp_path), openrlhf)
    assert found.algo.advantage.estimator == {"ppo": "gae", "marks": "group_norm", "rloo": "rloo"}[run]
    bounds = {"ppo": [0.0, 2.0], "marks": [0.25, 4.0]}.get(run)
    assert found.algo.advantage.is_correction_threshold == bounds or run == "rloo"
    assert found.reward.clip_range == [-1e6, 1e6] and len(found.reward.remote_url) == 1
    assert (found.critic.model_name_or_path is None) == (run != "ppo")
    assert found.actor.adam.lr == 1e-3 and found.train.batch_size == 4 and found.algo.kl.use_loss == (run == "marks")


@pytest.mark.parametrize(("script", "kind"), [("run.sh", "dpo"), ("dpo.sh", "dpo"), ("reward.sh", "rm")])
def test_openrlhf_takes_the_pairs_commands(script, kind, openrlhf, handed, tmp_path):
    words = typed(handed("dpo", "openrlhf"), script, tmp_path=tmp_path)
    assert words[2] == f"openrlhf.cli.train_{kind}"
    assert parsed(words, openrlhf).adam.betas == [0.9, 0.95]


def strategy_of(arguments):
    return types.SimpleNamespace(args=arguments, is_rank_0=lambda: False, print=print)


def test_openrlhfs_datasets_read_what_the_run_read(openrlhf, handed, world, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, tokenizer = handed("ppo", "openrlhf"), load_tokenizer(world / "lm")
    arguments = parsed(typed(folder, "run.sh", tmp_path=tmp_path), openrlhf)
    lines = openrlhf("datasets.utils").blending_datasets(arguments.data.prompt_dataset, None, strategy_of(arguments))
    prompts = openrlhf("datasets.prompts_dataset").PromptDataset(lines, tokenizer, strategy_of(arguments))
    given = data.read_prompts(world / "prompts.txt")
    for i, record in enumerate(given):
        _, text, label, _ = prompts[i]
        ids = tokenizer(text, add_special_tokens=False).input_ids  # as it encodes them
        assert ids == data.encode_prompt(tokenizer, record["prompt"]) and json.loads(label)["prompt"] == text
    folder = handed("dpo", "openrlhf")
    arguments = parsed(typed(folder, "reward.sh", tmp_path=tmp_path), openrlhf)
    lines = openrlhf("datasets.utils").blending_datasets(arguments.data.dataset, None, strategy_of(arguments))
    module = openrlhf("datasets.reward_dataset")
    pairs = module.RewardDataset(lines, tokenizer, 32, strategy_of(arguments), num_processors=1)
    for i, pair in enumerate(data.read_preferences(world / "pairs.jsonl")):
        prompt, *answers = data.encode_pair(tokenizer, pair)
        chosen, _, rejected, _, _ = pairs[i]
        assert [chosen[0].tolist(), rejected[0].tolist()] == [prompt + answer for answer in answers]


def test_openrlhfs_loaders_give_the_runs_scores_and_values(openrlhf, handed, world, monkeypatch):
    """In float32: it holds models in bf16 alone, which is no matter of what was handed over."""
    module, folder = openrlhf("models.model"), handed("ppo", "openrlhf")
    monkeypatch.setattr(openrlhf("utils.utils"), "convert_to_torch_dtype", lambda name: torch.float32)
    options = dict(attn_implementation="eager")
    tokens, mask = data.pad([[1, 4, 5, 2], [1, 6, 4, 4, 5, 2]], 0, side="left")
    policy = CausalLMWithValueHead.from_pretrained(world / "ppo" / "policy")
    with torch.no_grad():
        model = module.get_llm_for_sequence_regression(str(folder / "reward_model"), "reward", **options).eval()
        expected = load_reward_model(world / "reward")(tokens, mask)
        torch.testing.assert_close(model(tokens, mask) - 0.7 / 0.25, expected, atol=1e-4, rtol=1e-4)
        critic = module.get_llm_for_sequence_regression(str(folder / "critic"), "critic", **options).eval()
        found = critic(tokens, action_mask=mask[:, 1:], attention_mask=mask) + policy.value_head.bias
        values = policy.values(tokens, mask)[:, :-1]
        real = mask[:, :-1] & mask[:, 1:]
        torch.testing.assert_close(found[real], values[real], atol=1e-5, rtol=1e-5)


def test_openrlhfs_reward_call_gives_the_runs_scores(openrlhf, handed, world):
    pytest.importorskip("aiohttp", exc_type=ImportError)
    folder = handed("ppo", "openrlhf")
    executor = openrlhf("utils.agent").SingleTurnAgentExecutor([str(folder / "reward.py")])
    samples, rows = sampled(world, "ppo", "openrlhf", folder, count=12)
    tokenizer, sampling = load_tokenizer(folder / "policy"), types.SimpleNamespace(max_tokens=4, logprobs=None)

    async def reward(row, ids):
        class Engine:
            async def generate(self, prompt_ids, *arguments, **options):
                output = types.SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)
                return types.SimpleNamespace(outputs=[output])

        found = await executor.execute(row["prompt"], row["label"], sampling, 32, tokenizer, Engine())
        return torch.tensor([found["reward"]]).item()  # as it is read there

    ids = data.real_ids(samples.responses, samples.response_mask)
    found = [asyncio.run(reward(*pair)) for pair in zip(rows, ids, strict=True)]
    torch.testing.assert_close(torch.tensor(found), expected_scores(world, samples), atol=1e-4, rtol=1e-4)


# --- vLLM -------------------------------------------------------------------------------------------------------------


def test_vllm_samples_from_the_policy(world, tmp_path, make_lm, make_tokenizer, monkeypatch):
    """In its own environment, which VLLM_PYTHON names: its log-probabilities are the run's policy's."""
    program = os.environ.get("VLLM_PYTHON")
    if not program:
        pytest.skip("VLLM_PYTHON names no Python with vLLM")
    monkeypatch.chdir(world)
    for part in (make_lm(n_embd=64, vocab_size=9), make_tokenizer()):  # heads of 32, and ids that no token has
        part.save_pretrained(tmp_path / "lm")
    words = f"run --model {tmp_path / 'lm'} --prompts prompts.txt --score scores:counted --temperature 0.7".split()
    words += "--method best-of-n --n 2 --batch-size 4 --max-new-tokens 9 --device cpu --out".split()
    assert commands.main([*words, str(tmp_path / "run")]) == 0
    folder = hand_over(tmp_path / "run", "vllm")
    done = subprocess.run(
        ["bash", "run.sh", "6"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PATH": f"{Path(program).parent}:{os.environ['PATH']}", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lm, rows = load_causal_lm(folder / "policy"), rows_of(folder / "responses.jsonl")
    bar_unused_ids(lm, load_tokenizer(folder / "policy"))
    assert len(rows) == 6 and max(i for row in rows for i in row["ids"]) < 8
    asked, said = ([row[name] for row in rows] for name in ("prompt_token_ids", "ids"))
    with torch.no_grad():
        found = ids_log_probs(lm, asked, said, pad_id=0, temperature=0.7)
    torch.testing.assert_close(torch.tensor([sum(row["log_probs"]) for row in rows]), found, atol=1e-3, rtol=1e-4)
