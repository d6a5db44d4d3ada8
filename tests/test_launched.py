"""A command in several processes, as `torchrun` and `accelerate launch` start it: one run, and one voice."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_processes import launched, pytestmark, starting  # noqa: F401  the mark is this file's too
from test_shared_weights import FSDP
from test_trainer import without_times

from rlhf_lessons.__main__ import main
from rlhf_lessons.checkpoint import load_state
from rlhf_lessons.models import ASSETS

SHORT = ["--num-iterations", "5", "--batch-size", "32", "--minibatch-size", "16", "--checkpoint-every", "2"]
COMMANDS = {
    "ppo": ["ppo", *SHORT],
    "grpo": ["run", "--method", "grpo", "--reward-model", str(ASSETS / "reward_model"), *SHORT],
}


def command(count, *words, **options):
    return launched(count, "-m", "--", "rlhf_lessons", *words, **options)  # or it takes `--n` for an option of its own


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
COUNTS = [("ppo", 2, {})]
COUNTS += [
    pytest.param(*case, marks=SLOW) for case in (("grpo", 2, {}), ("ppo", 4, {}), ("grpo", 4, {}), ("ppo", 2, FSDP))
]


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
