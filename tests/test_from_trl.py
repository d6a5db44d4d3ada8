"""The page for those who come from TRL: its script runs on both sides, its tables name what is there, † is so."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from rlhf_lessons.config import PPOConfig
from rlhf_lessons.masking import masked_whiten
from rlhf_lessons.models import CausalLMWithValueHead, load_causal_lm, trunk_of
from rlhf_lessons.trainer import PPOTrainer

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "notebooks" / "from_trl.md").read_text(encoding="utf-8")
(DIFF,) = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def peer():
    """TRL's own trainer's module, where it still has one."""
    pytest.importorskip("trl.experimental.ppo")
    from trl.experimental.ppo import ppo_trainer

    return ppo_trainer


def side(mark):
    """One side of the script: the lines with that mark, and those without any."""
    return "".join(line[1:] for line in DIFF.splitlines(keepends=True) if line[0] in (" ", mark))


def run(script, folder, monkeypatch, **changes):
    """The names that a script leaves, its settings changed, what it saves put into that folder."""
    monkeypatch.chdir(ROOT)
    for name, value in changes.items():
        script, found = re.subn(rf"\b{name}=[^,]+", f"{name}={value}", script)
        script = script if found else script.replace("config = PPOConfig(", f"config = PPOConfig({name}={value},")
    exec(script.replace("runs/ported", str(folder)), names := {"__name__": "script"})
    return names


def column(section, number):
    """What stands in backticks in a column of a section's table, row by row."""
    table = PAGE[PAGE.index(f"## {section}") :].split("\n\n")[1]
    return [re.findall(r"`([^`]+)`", row.split("|")[number]) for row in table.splitlines()[2:]]


def flat(lists):
    return {name for names in lists for name in names}


# --- This side --------------------------------------------------------------------------------------------------------


def test_the_script_is_ported_in_fifteen_lines():
    lines = DIFF.splitlines()
    changed = {mark: sum(line.startswith(mark) for line in lines) for mark in "+- "}
    assert 8 <= changed["+"] <= 15 and changed["-"] <= 15 and changed[" "] >= 10


def test_the_ported_script_runs(tmp_path, monkeypatch):
    names = run(side("+"), tmp_path / "policy", monkeypatch)
    assert names["trainer"].iteration == 2
    saved, policy = load_causal_lm(tmp_path / "policy"), names["model"].lm
    assert torch.equal(saved.get_input_embeddings().weight, policy.get_input_embeddings().weight)
    assert not torch.equal(policy.get_input_embeddings().weight, names["ref_model"].get_input_embeddings().weight)
    critic = CausalLMWithValueHead.from_pretrained(names["base"], critic="separate").critic
    critic.load_state_dict(trunk_of(names["reward_model"].classifier).state_dict())  # as the page says


def test_the_tables_name_settings_arguments_and_metrics_that_are_here(make_trainer):
    arguments = {*inspect.signature(PPOTrainer).parameters} | {field.name for field in fields(PPOConfig)}
    assert flat(column("Arguments", 2)) <= arguments
    assert flat(column("Metrics", 2)) <= {*make_trainer().step()}
    defaults = PPOConfig()
    assert (defaults.kl_coef, defaults.missing_eos_penalty, defaults.temperature) == (0.1, 1.0, 1.0)
    assert (defaults.learning_rate, defaults.precision) == (1e-3, "no")
    assert make_trainer().optimizer.defaults["eps"] == 1e-5


# --- TRL's side, where it is installed --------------------------------------------------------------------------------


def test_trls_script_runs(peer, tmp_path, monkeypatch):
    names = run(side("-"), tmp_path / "policy", monkeypatch, logging_steps=1)
    (tmp_path / "policy" / "model.safetensors").stat()
    logged = names["trainer"].state.log_history
    assert len(logged) == 2 and flat(column("Metrics", 1)) <= {*logged[0]}
    config = names["config"]
    arguments = {*inspect.signature(type(names["trainer"])).parameters} | {*vars(config)}
    assert flat(column("Arguments", 1)) <= arguments
    assert names["trainer"].optimizer.optimizer.defaults["eps"] == 1e-8
    fresh = {field.name: field.default for field in fields(type(config))}
    said = dict(kl_coef=0.05, temperature=0.7, learning_rate=3e-6, missing_eos_penalty=None, stop_token=None)
    assert {name: fresh[name] for name in said} == said


@pytest.mark.parametrize(("rows", "pieces", "steps", "ratio"), [(32, 1, 4, 1.0), (8, 4, 1, 0.25)])
def test_trl_takes_a_step_every_that_many_pieces(peer, rows, pieces, steps, ratio, tmp_path, monkeypatch):
    """And clips no gradient on the way; what it logs is a mean over slots of which only some are filled."""
    made, clipped = [], []
    adam, clip = torch.optim.AdamW.step, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **o: (made.append(1), adam(self, *a, **o))[1])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **o: (clipped.append(1), clip(*a, **o))[1])
    names = run(
        side("-"), tmp_path, monkeypatch, total_episodes=32, per_device_train_batch_size=rows, num_ppo_epochs=1,
        gradient_accumulation_steps=pieces, logging_steps=1, learning_rate=1e-6,
    )  # fmt: skip
    assert (len(made), len(clipped)) == (steps, 0)
    assert names["trainer"].state.log_history[0]["val/ratio"] == pytest.approx(ratio, abs=1e-3)


def test_trl_puts_the_score_after_the_last_token(peer, tmp_path, monkeypatch):
    """With V = 0 and no KL, the last token's advantage is λ times the score; without room after it, the score.

    The value loss is a mean over the state after the last token too; whitening has Bessel's correction.
    """
    scores, given, counts = [], [], []
    reward, whiten, mean = peer.get_reward, peer.masked_whiten, peer.masked_mean

    def get_reward(model, *arguments):
        found = reward(model, *arguments)
        scores.append(found[1])
        return found

    def masked_whiten_(values, mask, shift_mean=True):
        given.append((values, mask))
        return whiten(values, mask, shift_mean)

    def masked_mean(values, mask, axis=None):
        counts.append(int(mask.sum()))
        return mean(values, mask, axis)

    monkeypatch.setattr(peer, "masked_mean", masked_mean)
    monkeypatch.setattr(peer, "get_reward", get_reward)
    monkeypatch.setattr(peer, "masked_whiten", masked_whiten_)
    script = side("-").replace("models = dict", "torch.nn.init.zeros_(value_model.score.weight)\nmodels = dict")
    changes = dict(
        kl_coef=0.0, missing_eos_penalty=0.0, response_length=9, total_episodes=64, num_ppo_epochs=1, num_mini_batches=1
    )
    run("import torch\n" + script, tmp_path, monkeypatch, **changes)
    of_values, _, of_policy, _ = counts[-4:]
    (advantages, mask), score = given[0], scores[1]  # of the value model first, then of the reward model
    last = mask.sum(dim=1) - 1
    credited = advantages[torch.arange(len(score)), last] / score
    room = last < mask.shape[1] - 1
    assert 5 < room.sum() < 64 and of_values - of_policy == room.sum()
    torch.testing.assert_close(credited, torch.where(room, 0.95, 1.0))
    ours, n = masked_whiten(advantages, mask), mask.sum()
    theirs = whiten(advantages, mask)
    torch.testing.assert_close(theirs[mask], ours[mask] * ((n - 1) / n).sqrt())


def test_trl_never_ends_a_response_unless_told_to(peer, tmp_path, monkeypatch):
    names = run(side("-"), tmp_path, monkeypatch, stop_token=None, total_episodes=64, num_ppo_epochs=1)
    assert names["model"].generation_config.eos_token_id is None
