"""Several processes: a batch shared out, weights shared out (FSDP 2), and a command whose first process alone speaks.

Each test starts processes that talk over gloo, as `torchrun` and `accelerate launch` start them.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, count_good, tiny_lm, tiny_policy, tiny_trainer, word_tokenizer
from safetensors.torch import load_file
from test_trainer import EVAL_PROMPTS, assert_all_close, copies, parameter_hash, without_times

from rlhf_lessons import forward
from rlhf_lessons.__main__ import main
from rlhf_lessons.adapters import merged_weights
from rlhf_lessons.checkpoint import load_state, save_state
from rlhf_lessons.config import GRPOConfig
from rlhf_lessons.device import end_processes, gather_rows, make_accelerator, process, sharded, told, whole
from rlhf_lessons.group_trainers import GRPOTrainer
from rlhf_lessons.models import ASSETS, CausalLMWithValueHead, prepare_policy

FSDP = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
SIZES = dict(batch_size=16, minibatch_size=8, gradient_accumulation_steps=2, ppo_epochs=2, max_new_tokens=6)
SHARED = SIZES | dict(target_kl=100.0, learning_rate=1e-3, device="cpu", num_iterations=4)

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of torch has no gloo",
)


def starting(count, *words, **environment):
    """A launcher of so many processes of a script or module: what `subprocess` is to start, and how."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return dict(args=[*launch, *map(str, words)], env=environment, text=True)


def launched(count, *words, cwd=None, **environment):
    """What came of it."""
    return subprocess.run(**starting(count, *words, **environment), cwd=cwd, capture_output=True, timeout=240)


def results_of(count, what, folder, **environment):
    """What each process of this file saved."""
    result = launched(count, __file__, what, folder, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


# --- A batch shared out ---------------------------------------------------------------------------


def small_trainers():
    """PPO and GRPO with much to go wrong: adaptive β, pieces, an early stop, rows that end at different steps."""
    yield "ppo", tiny_trainer(**SHARED, normalize_scores=True, adaptive_kl_target=1.0, adaptive_kl_horizon=100)
    config = GRPOConfig(**SHARED, samples_per_prompt=4, kl_in="loss", kl_kind="k3")
    yield "grpo", GRPOTrainer(config, tiny_lm(), tiny_lm(seed=1), count_good, PROMPTS, word_tokenizer())
    policy, reference = (tiny_policy(head=0.1, vocab_size=80), tiny_lm(seed=1, vocab_size=80))
    forward.LARGE = 0  # for who steps before asking for the next: the processes do, what they are held against does not
    yield "large vocabulary", tiny_trainer(policy, reference, **SHARED, ent_coef=0.1)
    forward.LARGE = 2**26


def outcome(trainer):
    """Two iterations: what was sampled, what was learnt from, where it led."""
    history, batches = [], []
    for _ in range(2):
        history.append(without_times(trainer.step()))
        batches.append({name: x for name, x in vars(trainer.batch).items() if isinstance(x, torch.Tensor)})
    return dict(
        history=history, batches=batches, parameters=copies(trainer.policy), hash=parameter_hash(trainer.policy)
    )


def evaluation_of_five():
    """One that 2 and 4 processes cannot share out evenly, in batches of 4 and 1."""
    sizes = dict(batch_size=4, minibatch_size=4, whiten_advantages=False)
    metrics, rollout = tiny_trainer(eval_prompts=EVAL_PROMPTS[:5], **sizes).evaluate()
    return metrics, rollout.tokens


def share_a_batch(folder):
    """What each process runs to share a batch."""
    results = {name: outcome(trainer) for name, trainer in small_trainers()}
    accelerator = make_accelerator("cpu")
    results["processes"], results["refused"] = accelerator.num_processes, []
    own = torch.full((2, 3 + accelerator.process_index), accelerator.process_index + 1)  # each process's are longer
    results["gathered"] = gather_rows(accelerator, own, padding=9)
    results["evaluated"] = evaluation_of_five()
    for sizes in (dict(batch_size=15, minibatch_size=5), dict(batch_size=16, samples_per_prompt=16)):
        try:
            tiny_trainer(**sizes)
        except ValueError as error:
            results["refused"].append(str(error))
    torch.save(results, f"{folder}/{accelerator.process_index}.pt")


@pytest.fixture(scope="module", params=[2, 4])
def processes(tmp_path_factory, request):
    """The results of each of several processes that share a batch."""
    return results_of(request.param, "batch", tmp_path_factory.mktemp("batch"))


@pytest.mark.detail(35)
@pytest.mark.detail(37)
@pytest.mark.parametrize("method", ["ppo", "grpo", "large vocabulary"])
def test_a_seed_means_one_run_in_any_number_of_processes(processes, method):
    """The same tokens, the same credit for them, the same steps: whitening and groups are over the whole batch."""
    expected = outcome(dict(small_trainers())[method])
    lengths = expected["batches"][0]["response_mask"].sum(dim=1)
    assert lengths.unique().numel() > 2, "rows of one length would prove less"
    for result in processes:
        assert result["processes"] == len(processes)
        result = result[method]
        for got, wanted in zip(result["batches"], expected["batches"], strict=True):
            assert torch.equal(got["tokens"], wanted["tokens"])
            for name, x in wanted.items():
                torch.testing.assert_close(got[name], x, atol=1e-5, rtol=1e-5)
        for got, wanted in zip(result["history"], expected["history"], strict=True):
            assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert_all_close(result["parameters"], expected["parameters"], atol=1e-5, rtol=0)
    assert len({result[method]["hash"] for result in processes}) == 1, "one model"


def test_evaluation_prompts_are_shared_out_and_none_counts_twice(processes):
    metrics, tokens = evaluation_of_five()
    for got, answers in (result["evaluated"] for result in processes):
        assert got == pytest.approx(metrics, abs=1e-5) and torch.equal(answers, tokens) and len(tokens) == 5


def test_rows_of_all_processes_are_gathered_padded_on_the_right(processes):
    longest = 2 + len(processes)
    wanted = [[rank + 1] * (3 + rank) + [9] * (longest - 3 - rank) for rank in range(len(processes)) for _ in range(2)]
    assert all(result["gathered"].tolist() == wanted for result in processes)


def test_sizes_that_cannot_be_shared_out_are_refused(processes):
    count = len(processes)
    for result in processes:
        assert result["refused"] == [
            f"batch_size must be a multiple of {count}, 1 for each of {count} processes; got 15",
            f"batch_size must be a multiple of {16 * count}, 16 for each of {count} processes; got 16",
        ]


# --- Weights shared out ---------------------------------------------------------------------------


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
    return folder, results_of(2, "weights", folder, **FSDP)


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


@pytest.mark.parametrize("asked", [dict(ACCELERATE_USE_DEEPSPEED="true"), dict(ACCELERATE_USE_FSDP="true")])
def test_what_accelerate_is_configured_for_otherwise_is_refused(asked, monkeypatch):
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="processes must share by data parallelism or FSDP 2"):
        make_accelerator("cpu")


# --- A command in several processes ---------------------------------------------------------------

SHORT = ["--num-iterations", "5", "--batch-size", "32", "--minibatch-size", "16", "--checkpoint-every", "2"]
COMMANDS = {
    "ppo": ["ppo", *SHORT],
    "grpo": ["run", "--method", "grpo", "--reward-model", str(ASSETS / "reward_model"), *SHORT],
}


def command(count, *words, **options):
    return launched(count, "-m", "rlhf_lessons", *words, **options)


def contents(folder):
    """What a run left, but for times: its files, metrics, tokens and the policy's parameters."""
    metrics, tokens = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("metrics.jsonl", "rollouts.jsonl")
    )
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return dict(
        files=files,
        metrics=[without_times(row) for row in metrics],
        tokens=[response["tokens"] for response in tokens],
        parameters=load_file(folder / "policy/model.safetensors"),
    )


def assert_alike(got, wanted, tolerance=1e-5):
    assert got["files"] == wanted["files"] and got["tokens"] == wanted["tokens"]
    assert [row["iteration"] for row in got["metrics"]] == [row["iteration"] for row in wanted["metrics"]]
    for row, other in zip(got["metrics"], wanted["metrics"], strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)
    for name, x in wanted["parameters"].items():
        torch.testing.assert_close(got["parameters"][name], x, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a method's command leaves in one process."""
    known = {}

    def made(method):
        if method not in known:
            folder = tmp_path_factory.mktemp("alone") / "run"
            assert main([*COMMANDS[method], "--out", str(folder)]) == 0
            known[method] = contents(folder)
        return known[method]

    return made


SLOW = pytest.mark.slow
COUNTS = [("ppo", 2, {}), ("grpo", 2, {})]
COUNTS += [pytest.param(*case, marks=SLOW) for case in (("ppo", 4, {}), ("grpo", 4, {}), ("ppo", 2, FSDP))]


@pytest.mark.parametrize(("method", "count", "environment"), COUNTS)
def test_a_command_means_one_run_in_any_number_of_processes(alone, method, count, environment, tmp_path):
    """Nor does a process wait or warn at the end; the folder is named once, by the date where nothing else is said."""
    result = command(count, *COMMANDS[method], cwd=tmp_path, PYTHONPATH=str(Path.cwd()), **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    assert_alike(contents(folder), alone(method))
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["made_by"]["processes"] == count
    assert result.stdout.count(f"written to runs/{folder.name}") == 1
    lines = result.stderr.splitlines()
    said = ("run folder", "prompts: ", "base model: ", f"{method.upper()} ")
    assert not [line for line in lines if not line.startswith(said)], result.stderr
    assert sum(line.startswith("run folder") for line in lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "dpo", "best-of-n"])
def test_the_other_methods_and_fits_mean_the_same_too(method, tmp_path):
    """Where a model is fitted each process does it alike, and the first one's is what all go on with."""
    sizes = ["--batch-size", "32", "--num-preferences", "64", "--max-new-tokens", "12"]
    sizes += ["--n", "4"] if method == "best-of-n" else ["--num-iterations", "2"]
    sizes += ["--minibatch-size", "16"] if method == "rloo" else []
    words = ["run", "--method", method, *sizes, "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    result = command(2, *words, tmp_path / "two")
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("summary.json", "samples.json", "reward_model.json"):
        texts = [(tmp_path / run / name) for run in ("one", "two") if name != "reward_model.json" or method != "dpo"]
        numbers = [re.findall(r"-?\d+\.\d+", path.read_text(encoding="utf-8")) for path in texts]
        assert not numbers or [*map(float, numbers[0])] == pytest.approx([*map(float, numbers[1])], abs=1e-4)
    models = [sorted((tmp_path / run).rglob("model.safetensors")) for run in ("one", "two")]
    for left, right in zip(*models, strict=True):
        for name, x in load_file(left).items():
            torch.testing.assert_close(load_file(right)[name], x, atol=1e-5, rtol=0)


def test_what_is_wrong_for_all_is_said_once(tmp_path):
    result = command(2, "ppo", "--batch-size", "33", "--minibatch-size", "11", "--out", tmp_path / "run")
    assert result.returncode == 1, "the launcher's own"
    said = re.findall("^error: .*", result.stderr, re.MULTILINE)
    assert said == ["error: batch_size must be a multiple of 2, 1 for each of 2 processes; got 33"]
    assert "exitcode  : 2 " in result.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


SCORE = """
import os
import time

calls = []

def score(prompts, responses):
    calls.append(1)
    other = os.environ.get("RANK") == "1"
    if other and len(calls) == int(os.environ.get("KILLED", 0)):
        os.kill(os.getpid(), 9)
    if other and len(calls) == int(os.environ.get("RAISES", 0)):
        raise KeyError("only here")
    time.sleep(float(os.environ.get("SLEEPS", 0)))
    return [float(response.count("a")) for response in responses]
"""


@pytest.fixture
def scored(tmp_path):
    """A command whose score misbehaves where the environment says so; and where it may be imported from."""
    (tmp_path / "odd.py").write_text(SCORE)
    words = ["run", "--score", "odd:score", "--method", "rloo", *SHORT]
    words[words.index("--checkpoint-every") + 1] = "1"
    return words, dict(cwd=tmp_path, PYTHONPATH=str(Path.cwd()))


@pytest.mark.slow
def test_what_goes_wrong_in_one_process_alone_is_said_by_it(scored, tmp_path):
    words, options = scored
    result = command(2, *words, "--out", tmp_path / "run", **options, RAISES="3")
    said = re.findall("^error: .*", result.stderr, re.MULTILINE)
    assert result.returncode == 1 and len(said) == 1 and "raised KeyError: 'only here'" in said[0]


@pytest.mark.slow
def test_a_run_of_which_one_process_was_killed_goes_on_as_if_it_had_not(scored, tmp_path):
    words, options = scored
    whole_run, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(2, *words, "--out", whole_run, **options).returncode == 0
    assert command(2, *words, "--out", killed, **options, KILLED="5").returncode == 1
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == 3 and (killed / "checkpoint").is_dir()
    result = command(2, "run", "--resume", killed, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_alike(contents(killed), contents(whole_run), tolerance=0)


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_after_one_step(scored, tmp_path):
    words, options = scored
    folder, metrics = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    start = starting(2, "-m", "rlhf_lessons", *words, "--out", folder, SLEEPS="2", PYTHONPATH=options["PYTHONPATH"])
    running = subprocess.Popen(**start, cwd=options["cwd"], stderr=subprocess.PIPE, start_new_session=True)
    for _ in range(600):
        if metrics.exists():
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert "stopping after this step" in said and "goes on from the last checkpoint" in said
    done = len(metrics.read_text().splitlines())
    assert load_state(folder / "checkpoint/state.safetensors")["state"]["iteration"] == done < 5
    assert command(2, "run", "--resume", folder, **options).returncode == 0


@pytest.mark.slow
def test_accelerate_launch_shares_weights_out_as_it_is_configured(alone, tmp_path):
    config = tmp_path / "fsdp.yaml"
    fsdp = dict(fsdp_version=2, fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP", fsdp_reshard_after_forward=True)
    launch = dict(distributed_type="FSDP", fsdp_config=fsdp, num_processes=2, num_machines=1, machine_rank=0)
    config.write_text(
        json.dumps(launch | dict(compute_environment="LOCAL_MACHINE", mixed_precision="no", use_cpu=True))
    )
    words = ["-m", "accelerate.commands.launch", "--config_file", config, "-m", "rlhf_lessons", *COMMANDS["ppo"]]
    subprocess.run([sys.executable, *map(str, words), "--out", str(tmp_path / "run")], check=True, timeout=240)
    assert_alike(contents(tmp_path / "run"), alone("ppo"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"batch": share_a_batch, "weights": share_weights}[sys.argv[1]](Path(sys.argv[2]))
    end_processes()
