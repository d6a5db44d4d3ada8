"""Weights that two processes share out by FSDP 2, as accelerate is configured: learnt, kept, saved and handed on."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, count_good, tiny_lm, tiny_policy, tiny_trainer, word_tokenizer
from safetensors.torch import load_file
from test_processes import SHARED, pytestmark, results_of  # noqa: F401  the mark is this file's too
from test_trainer import without_times

from rlhf_lessons import forward
from rlhf_lessons.adapters import merged_weights
from rlhf_lessons.checkpoint import load_state, save_state
from rlhf_lessons.config import GRPOConfig
from rlhf_lessons.device import end_processes, make_accelerator, process, sharded, told, whole
from rlhf_lessons.group_trainers import GRPOTrainer
from rlhf_lessons.models import CausalLMWithValueHead, prepare_policy

FSDP = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
FSDP |= dict(FSDP_CPU_RAM_EFFICIENT_LOADING="true")  # which accelerate launch asks for unless told otherwise


def sharded_trainers():
    """Each method, an adapter that is its own reference, and logits that one process makes a few at a time."""
    yield "ppo", lambda: tiny_trainer(tiny_policy(head=0.1, critic="separate"), **SHARED, normalize_scores=True)
    config = GRPOConfig(**SHARED, samples_per_prompt=4, kl_in="loss", kl_kind="k3")
    others = count_good, PROMPTS, word_tokenizer()
    yield "grpo", lambda: GRPOTrainer(config, tiny_lm(), tiny_lm(seed=1), *others)

    def with_adapter():
        lm = tiny_lm()
        prepare_policy(lm, lora_rank=2)
        return GRPOTrainer(config, lm, None, *others)

    def with_large_vocabulary():
        return tiny_trainer(tiny_policy(head=0.1, vocab_size=80), tiny_lm(seed=1, vocab_size=80), **SHARED)

    yield "adapter", with_adapter
    yield "large vocabulary", with_large_vocabulary


def three_iterations(name, make, folder):
    """Two, a state written down, and a third: what was measured, and the policy after it, plain."""
    forward.LARGE = 0 if name == "large vocabulary" else 2**26
    trainer = make()
    history = [without_times(trainer.step()) for _ in range(2)]
    state = trainer.state_dict(copied=False)
    if process()[0] == 0:
        save_state(folder / name, state)
    history.append(without_times(trainer.step()))
    return trainer, history, whole(trainer.policy.state_dict(keep_vars=True))


def share_weights(folder):
    """What each process runs to share weights."""
    results = {"asked": sharded()}
    for name, make in sharded_trainers():
        trainer, history, parameters = three_iterations(name, make, folder)
        own = [p.to_local().numel() / p.numel() for p in trainer.policy.parameters() if p.requires_grad]
        results[name] = dict(history=history, parameters=parameters, share=sum(own) / len(own))
        if name == "grpo":
            results["merged"] = {key: x.clone() for key, x in merged_weights(trainer.lm)}
        if name != "adapter" and process()[0] == 0:
            trainer.policy.save_pretrained(folder / f"{name} policy", state_dict=dict(parameters))  # which it empties
        told(None)  # the file is there
        other = make()
        other.load_state_dict(load_state(folder / name))
        history, parameters = [without_times(other.step())], whole(other.policy.state_dict(keep_vars=True))
        results[name] |= dict(again=history, parameters_again=parameters)
    torch.save(results, folder / f"{process()[0]}.pt")


@pytest.fixture(scope="module")
def sharing(tmp_path_factory):
    """The folder of two processes that share weights, and the results of each."""
    folder = tmp_path_factory.mktemp("weights")
    return folder, results_of(2, __file__, folder, **FSDP)


NAMES = ["ppo", "grpo", "adapter", "large vocabulary"]


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_whose_weights_are_shared_out_learns_as_a_whole_one(sharing, name, tmp_path):
    _, results = sharing
    large, make = forward.LARGE, dict(sharded_trainers())[name]
    _, history, parameters = three_iterations(name, make, tmp_path)
    forward.LARGE = large
    assert all(result["asked"] for result in results)
    assert 0.4 < results[0][name]["share"] < 0.6, "each process holds half of every weight"
    for result in results:
        assert result[name]["parameters"].keys() == parameters.keys()
        for key, x in parameters.items():
            torch.testing.assert_close(result[name]["parameters"][key], x, atol=1e-4, rtol=0)
        for got, wanted in zip(result[name]["history"], history, strict=True):
            assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_whole_and_goes_on_shared_out_or_not(sharing, name):
    folder, results = sharing
    large, trainer = forward.LARGE, dict(sharded_trainers())[name]()
    trainer.load_state_dict(load_state(folder / name))
    step = without_times(trainer.step())
    forward.LARGE = large
    for result in results:
        assert result[name]["again"] == result[name]["history"][-1:], "bit by bit, the moments too"
        assert step == pytest.approx(result[name]["again"][0], rel=1e-3, abs=1e-5)
        for key, x in result[name]["parameters"].items():
            assert torch.equal(result[name]["parameters_again"][key], x)


def test_a_policy_that_was_shared_out_is_saved_as_a_plain_checkpoint(sharing):
    from transformers import AutoModelForCausalLM

    folder, results = sharing
    lm = AutoModelForCausalLM.from_pretrained(folder / "grpo policy")
    wanted = results[0]["grpo"]["parameters"]
    assert type(lm).__name__ == "GPT2LMHeadModel" and lm.config.architectures == ["GPT2LMHeadModel"]
    assert all(torch.equal(x, wanted[key]) for key, x in lm.state_dict().items())
    assert "lm_head.weight" not in load_file(folder / "grpo policy/model.safetensors"), "a tied weight is written once"
    policy = CausalLMWithValueHead.from_pretrained(folder / "ppo policy")
    assert all(torch.equal(x, results[0]["ppo"]["parameters"][key]) for key, x in policy.state_dict().items())
    assert policy.critic is not None


def test_another_engine_is_given_whole_weights(sharing):
    for result in sharing[1]:
        assert result["merged"].keys() == result["grpo"]["parameters"].keys()
        assert all(torch.equal(x, result["grpo"]["parameters"][key]) for key, x in result["merged"].items())


@pytest.mark.parametrize("asked", [dict(DEEPSPEED="true", VERSION="2"), dict(FSDP="true", VERSION="1")])
def test_what_accelerate_is_configured_for_otherwise_is_refused(asked, monkeypatch):
    for name, value in asked.items():
        monkeypatch.setenv("FSDP_VERSION" if name == "VERSION" else f"ACCELERATE_USE_{name}", value)
    with pytest.raises(ValueError, match="processes must share by data parallelism or FSDP 2"):
        make_accelerator("cpu")


if __name__ == "__main__":
    torch.set_num_threads(1)
    share_weights(Path(sys.argv[1]))
    end_processes()
