"""The commands as a learner meets them: help, whole runs on own data, and what is said of bad input.

Commands run in this process, on models of width 32; a process of its own is started where signals, imports at start-up
or the disk behind standard output matter.
"""

import argparse
import json
import math
import os
import re
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rlhf_lessons
from rlhf_lessons import __main__ as commands
from rlhf_lessons.app.options import HELP, OTHERS, SOURCES, USES, WHAT, build_parser, check_given
from rlhf_lessons.app.run_folder import read_metrics
from rlhf_lessons.config import METHODS, PRESETS, ModelConfig, PPOConfig, PretrainConfig, RewardConfig, Settings
from rlhf_lessons.models import ASSETS

BETA = PPOConfig().kl_coef

pytestmark = pytest.mark.usefixtures("small_world")
FAST = "--num-iterations 2 --batch-size 8 --minibatch-size 8 --ppo-epochs 1 --max-new-tokens 4 --device cpu".split()
GROUPS = "--method grpo --samples-per-prompt 4 --dynamic-sampling 1".split()
LOOK = "--batch-size 8 --max-new-tokens 4 --device cpu".split()
DPO = "--method dpo --dpo-batch-size 8 --num-iterations 2".split()
BEST = "--method best-of-n --n 4".split()
SMALL = "--layers 1 --width 16 --heads 2 --context 32 --lm-epochs 1 --vocab-size 300".split()
SCORES = """
CONSTANT = 3

def good(prompts, responses):
    return [response.split().count("good") for response in responses]

def raises(prompts, responses):
    return {}[responses[0], "no such key"]

def shape(prompts, responses):
    return [[1.0] for _ in responses]

def nothing(prompts, responses):
    pass

def words(prompts, responses):
    return responses

def prompt_of_words(prompts, responses):
    return [len(prompt.split()) for prompt in prompts]

def infinite(prompts, responses):
    return torch.full((len(responses),), float("inf"))

import torch
"""
PAIR = {"prompt": "film", "chosen": "good .", "rejected": "bad bad ."}
USER, SYSTEM = {"role": "user", "content": "film"}, {"role": "system", "content": "good"}
CHATS = [[USER], [SYSTEM, USER], [USER, {"role": "assistant", "content": "bad"}, USER]]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m.content }} .{% endfor %}{% if add_generation_prompt %} bad{% endif %}"
)


def write_files(folder):
    """Own data, good and bad."""
    lines = {
        "prompts.txt": ["film", "good film", "bad bad film"],
        "long.txt": ["film", "", "good " * 30, "film"],
        "empty.txt": ["", "  "],
        "corpus.txt": ["good film . bad film .", "bad good film .", "film film bad ."] * 8,
        "short.txt": ["good film", "bad"],
        "pairs.jsonl": [json.dumps(PAIR), json.dumps(PAIR | {"chosen": "good film ."})] * 8,
        "malformed.jsonl": [json.dumps(PAIR), "", '{"prompt": "film", '],
        "incomplete.jsonl": [json.dumps(PAIR), json.dumps({"prompt": "film", "chosen": "good"})],
        "lengthy.jsonl": [json.dumps(PAIR), "", json.dumps(PAIR | {"rejected": "bad " * 30})],
        "half.jsonl": [json.dumps(PAIR | {"chosen": "good \ud83d ."})],
        "chats.jsonl": [json.dumps({"prompt": chat}) for chat in CHATS],
        "own_scores.py": [SCORES],
        "broken_scores.py": ["def good(:"],
    }
    for name, content in lines.items():
        (folder / name).write_text("\n".join(content), encoding="utf-8")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_lm, make_reward_model, make_tokenizer):
    """A folder with data and models, good and bad."""
    folder = tmp_path_factory.mktemp("world")
    write_files(folder)
    lm, tokenizer, reward = make_lm(), make_tokenizer(), make_reward_model()

    def save(name, *parts):
        for part in parts:
            part.save_pretrained(folder / name)
        return folder / name

    save("lm", lm, tokenizer)
    save("reward", reward, tokenizer)
    save("short_reward", make_reward_model(n_positions=6), tokenizer)
    save("headless", lm.base_model, tokenizer)
    save("chatty", lm, make_tokenizer(chat_template=TEMPLATE))
    save("pad_is_eos", lm, make_tokenizer(pad_token="<eos>"))
    save("no_tokenizer", lm)
    longer = make_tokenizer()
    longer.add_tokens(["plot", "story"])
    save("longer", lm, longer)
    torch.save(lm.state_dict(), save("pickled", lm, tokenizer) / "pytorch_model.bin")
    (folder / "pickled" / "model.safetensors").unlink()
    (save("corrupt", lm, tokenizer) / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not weights")
    (save("corrupt_tokenizer", lm, tokenizer) / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    (folder / "nothing").mkdir()
    return folder


@pytest.fixture
def run(world, monkeypatch, capsys):
    """run(*arguments) -> exit code, standard output, standard error of a command, run among the world's files."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(*arguments):
        try:
            code = commands.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        return (code, *capsys.readouterr())

    return run


def unfinished(folder):
    return [path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".tmp"))]


PPO = "ppo --model lm --prompts prompts.txt --score own_scores:good"
RUN = "run --corpus corpus.txt --score own_scores:good"


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # files
        (f"{PPO} --prompts none.txt", "none.txt: cannot be read: No such file or directory"),
        (f"{PPO} --prompts nothing", "nothing: cannot be read: Is a directory"),
        (f"{PPO} --prompts empty.txt", "empty.txt: the file holds no text"),
        (f"{PPO} --prompts latin.txt", r"latin.txt: not UTF-8 text \(byte 3\)"),
        (f"{PPO} --prompts long.txt", "long.txt, line 3: a prompt must leave room .*'s context of 32; got one of 31"),
        ("reward --model lm --preferences malformed.jsonl", "malformed.jsonl, line 3: not valid JSON"),
        ("reward --model lm --preferences incomplete.jsonl", 'incomplete.jsonl, line 2: the field "rejected" is miss'),
        ("reward --model lm --preferences half.jsonl", 'half.jsonl, line 1: the field "chosen" holds half of a surro'),
        (
            "reward --model lm --preferences lengthy.jsonl --long-pairs refuse",
            "lengthy.jsonl, line 3: prompt and rejected must fit the model's context of 32, .* got 33",
        ),
        (
            "reward --model lm --preferences pairs.jsonl --eval-preferences lengthy.jsonl --long-pairs refuse",
            "lengthy.jsonl, line 3: prompt and rejected",
        ),
        (f"{PPO} --eval-prompts long.txt", "long.txt, line 3: a prompt must leave room .* context of 32; got one of "),
        (f"{PPO} --eval-prompts empty.txt", "empty.txt: the file holds no text"),
        (f"{RUN} --eval-prompts long.txt", "long.txt, line 3: a prompt must leave room .* context of 32; got one of "),
        (f"{PPO} --prompts chats.jsonl", "chats.jsonl, line 1: messages must suit .*; got: a tokenizer that has none"),
        (f"{PPO} --chat", "prompts.txt, line 1: messages must suit .*; got: a tokenizer that has none"),
        ("ppo --score own_scores:good --chat", "give --prompts or --eval-prompts with --chat: it says how"),
        ("sample --chat", "give --prompts or --prompt with --chat: it says how those are read"),
        (f"{PPO} --eval-every 2", "give --eval-prompts with --eval-every: they are what is answered then"),
        ("run --method best-of-n --eval-prompts prompts.txt", "give --eval-prompts with --method ppo or rloo or grpo"),
        (f"{PPO} --log-with tensorboard --log-with paper", "log_with must be one of .*tensorboard.*; got 'paper'"),
        ("reward --model lm --eval-preferences pairs.jsonl", "give --preferences with --eval-preferences: they"),
        (f"{RUN} --corpus short.txt", "short.txt: no line has more than 3 words, .* lower --opening-words"),
        (f"{RUN} --context 4", "context must be more than max_new_tokens = 4; got 4"),
        # models
        (f"{PPO} --model pad_is_eos", "tokenizer must not use its EOS token as padding"),
        (f"{PPO} --model headless", "headless must hold a model with a language-model head"),
        (f"{PPO} --model reward", "reward must hold a model with a language-model head"),
        (f"{PPO} --model ./none", "it must be a folder that is there; got './none'"),
        (f"{PPO} --model nothing", "cannot load a model from 'nothing'"),
        (f"{PPO} --model nobody/nothing", "cannot load a model from 'nobody/nothing': We couldn't connect"),
        (f"{PPO} --model pickled", "cannot load a model from 'pickled': .*model.safetensors"),
        (f"{PPO} --model corrupt", "cannot load a model from 'corrupt'"),
        (f"{PPO} --model no_tokenizer", "no_tokenizer: no tokenizer is saved there"),
        (f"{PPO} --model corrupt_tokenizer", "cannot load a tokenizer from 'corrupt_tokenizer'"),
        (f"{PPO} --model longer", "longer: tokenizer must have ids below 8, .*; got 9; .*resize_token_emb"),
        ("ppo --model lm --prompts prompts.txt --reward-model lm", "lm must hold a reward model; got a checkp"),
        ("ppo --model lm --prompts prompts.txt --reward-model short_reward", "prompts.txt, line 2: .* reward model's"),
        # a score of one's own
        (f"{PPO} --reward-model reward", "give --score or --reward-model, not both"),
        (f"{PPO} --score none:good", r"--score must be module:function, .* 'none:good' \(ModuleNotFoundError"),
        (f"{PPO} --score own_scores:none", "--score must be module:function, .* has no attribute 'none'"),
        (f"{PPO} --score own_scores", "--score must be module:function"),
        (f"{PPO} --score broken_scores:good", r"--score must be module:function, .*\(SyntaxError"),
        (f"{PPO} --score own_scores:CONSTANT", "--score must name a function; got own_scores:CONSTANT, which is int"),
        (f"{PPO} --score own_scores:raises", r"raised KeyError: .*no such key.*own_scores.py, line 8\)"),
        (f"{PPO} --score own_scores:shape", r"scores must be one number per response, \(8,\); got \(8, 1\)"),
        (f"{PPO} --score own_scores:nothing", "scores must be numbers, one per response; got None"),
        (f"{PPO} --score own_scores:words", r"scores must be numbers, one per response; got \["),
        (f"{PPO} --score own_scores:infinite", "scores must be finite numbers"),
        # settings
        (f"{PPO} --device foo", "device must be one of auto, cpu, cuda, mps; got 'foo'"),
        (f"{PPO} --lr-schedule foo", "lr_schedule must be one of linear, constant, cosine; got 'foo'"),
        (f"{PPO} --weights bf16", "weights must be float32 where they train: a step is less than bf16 tells apart"),
        (f"{PPO} --lora-alpha 4", "give --lora-rank with --lora-alpha: it is that adapter's"),
        (f"{PPO} --lora-rank 2 --critic separate", "critic must be shared beside an adapter, .*; got separate"),
        ("run --method best-of-n --lora-rank 2", "give --lora-rank with --method ppo or rloo or grpo or dpo: best"),
        (f"{PPO} --batch-size 0", "batch_size must be a whole number >= 1; got 0"),
        (f"{PPO} --kl-coef nan", "kl_coef must be a number >= 0; got nan"),
        (f"{RUN} --layers 0", "layers must be a whole number >= 1; got 0"),
        (f"{RUN} --lm-epochs nan", "lm_epochs must be a number > 0; got nan"),
        (f"{RUN} --width 30 --heads 4", "width must be a multiple of heads = 4; got 30"),
        (f"{RUN} --adaptive-kl-target 1 --adaptive-kl-horizon 1", "adaptive_kl_horizon must be more than a fifth of b"),
        # options that nobody would read
        ("pretrain --vocab-size 300", "give --corpus with --vocab-size: only what is trained on a corpus has a "),
        ("run --corpus corpus.txt", "give --preferences or --reward-model or --score with --corpus: .* annotators"),
        ("run --model lm", "give --corpus with --layers: only what is trained on a corpus has a choice there"),
        (f"{RUN} --model lm", "give --corpus or --model, not both"),
        (f"{RUN} --preferences pairs.jsonl", "give --preferences or --score, not both: no reward model is trained"),
        (f"{RUN} --reward-epochs 2", "give --reward-epochs or --score, not both"),
        (f"{RUN} --num-preferences 8", "give --num-preferences or --score, not both"),
        ("run --corpus corpus.txt --reward-model reward --preferences pairs.jsonl", "give --preferences or --reward-m"),
        ("reward --preferences pairs.jsonl --num-preferences 8", "give --num-preferences or --preferences, not both"),
        (f"{RUN} --prompts prompts.txt --opening-words 2", "give --opening-words or --prompts, not both"),
        (f"{PPO} --sampler-cap 3", "give --sampler with --sampler-cap: plain and static draw by the policy's own prob"),
        (f"{RUN} --sampler static --sampler-correction mask", "give --sampler with --sampler-correction: plain and"),
        (f"{PPO} --adaptive-kl-horizon 9999", "give --adaptive-kl-target with --adaptive-kl-horizon: without a target"),
        ("reward --model lm", "give --preferences, or a --score: the tiny world's annotators read no other texts"),
        # folders
        (f"{PPO} --out .", "--out must be a new or an empty folder; . already holds"),
        (f"{PPO} --out prompts.txt", "prompts.txt: File exists"),
        ("run --method grpo --gamma 0.9", "give --gamma with --method ppo: grpo does not read it"),
        ("run --method rloo --critic separate", "give --critic with --method ppo: rloo does not read it"),
        ("run --kl-in loss", "give --kl-in with --method grpo: ppo does not read it"),
        ("run --samples-per-prompt 2 --method dpo",
         "give --samples-per-prompt with --method ppo or rloo or grpo: dpo does not read it"),
        ("summary nothing", r"nothing: holds no run \(No such file or directory\)"),
        # samples
        ("sample --prompts prompts.txt --prompt film", "give --prompts or --prompt, not both: both say what is contin"),
        ("sample --model lm --policy longer --score own_scores:good", "longer: tokenizer must have ids below 8"),
        ("sample --model lm --policy lm --score own_scores:good --seed -1", "seed must be a whole number >= 0"),
        ("sample --model lm --policy lm --score own_scores:good --count 0", "count must be a whole number >= 1; got 0"),
        ("sample --model lm --policy lm --score own_scores:shape --prompt film --max-new-tokens 4", "must be one num"),
        ("sample --model lm --policy lm --score own_scores:good --prompt film --max-new-tokens 40", "film: .* of 2"),
    ],
)  # fmt: skip
def test_bad_input_is_said_in_a_line(arguments, message, run, tmp_path):
    name, *options = shlex.split(arguments)
    if name not in ("sample", "summary"):
        sizes = {"run": [*FAST, *SMALL], "ppo": FAST}.get(name, ["--device", "cpu"])
        options = [*sizes, "--out", tmp_path / "out", *options]
    code, _, error = run(name, *options)
    *_, last = error.strip().splitlines()
    assert code == 2 and re.search(f"^error: .*{message}", last)
    assert "Traceback" not in error and len(re.findall("^error: ", error, re.M)) == 1
    if (tmp_path / "out").exists():
        assert [path.name for path in (tmp_path / "out").iterdir()] in ([], ["config.json"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --batch-size many", "argument --batch-size: invalid int value: 'many'"),
        ("run --critic foo", r"argument --critic: invalid choice: 'foo' \(choose from .*shared.*separate"),
        ("run --preset large", r"argument --preset: invalid choice: 'large' \(choose from .*tiny.*small"),
        ("run --batch 8", "unrecognized arguments: --batch 8"),
        ("jump", "invalid choice: 'jump'"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_unknown_options_are_said_in_a_line_that_points_to_the_help(arguments, message, run):
    code, output, error = run(*arguments.split())
    first, second = error.splitlines()
    assert code == 2 and output == "" and re.search(f"^error: .*{message}", first)
    assert re.search("^see python -m rlhf_lessons (run )?--help$", second)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there(run, tmp_path):
    code, _, error = run(*PPO.split(), *FAST, "--device", "cuda", "--out", tmp_path / "out")
    assert code == 2 and error.endswith(
        "error: device must be one that this machine has; got 'cuda', which is not available\n"
    )


def test_the_shipped_reward_model_does_not_score_other_vocabularies(run, world, monkeypatch, tmp_path):
    """`ppo --model` alone would maximise a reward model that reads nothing but unknown words."""
    from rlhf_lessons.app import inputs

    ours = "ppo --model lm --prompts prompts.txt".split()
    code, _, error = run(*ours, *FAST, "--out", tmp_path / "other")
    assert code == 2 and "error: give --reward-model or --score" in error
    shipped = tmp_path / "assets" / "reward_model"
    shipped.parent.mkdir()
    os.symlink(world / "reward", shipped)
    monkeypatch.setattr(inputs, "ASSETS", tmp_path / "assets")
    assert run(*ours, *FAST, "--out", tmp_path / "same")[0] == 0


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_its_metrics(run, tmp_path):
    code, _, error = run(
        *PPO.split(), *FAST, "--learning-rate", "1e18", "--num-iterations", 9, "--out", tmp_path / "out"
    )
    last = error.strip().splitlines()[-1]
    done = int(re.search(r"^error: (loss|grad_norm|\w*log_probs) is (nan|inf) in iteration (\d+)", last)[3]) - 1
    assert code == 2 and 1 <= done < 9
    assert [row["iteration"] for row in read_metrics(tmp_path / "out")] == list(range(1, done + 1))
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_report_that_fails_after_the_training_costs_the_exit_code_alone(run, monkeypatch, tmp_path):
    """The function of one's own that scored all batches gives up on the samples."""
    from rlhf_lessons.app import align

    def fail(*arguments, **options):
        raise RuntimeError("own_scores: service unavailable")

    monkeypatch.setattr(align, "before_and_after", fail)
    code, _, error = run(*PPO.split(), *FAST, "--out", tmp_path / "out")
    assert code == 2 and "samples.md: not written: RuntimeError: own_scores: service unavailable\n" in error
    assert error.endswith("\nerror: cannot write samples.md; the policy and the rest of the run are written\n")
    assert {"policy", "figures", "report.html", "summary.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert run("summary", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ..."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
        MemoryError(),
    ],
)
def test_a_machine_without_enough_memory(error, run, monkeypatch):
    def fail(arguments):
        raise error

    monkeypatch.setattr(commands, "run_stage", fail)
    assert run("run") == (2, "", "\nerror: out of memory: try a smaller --minibatch-size, or more "
                                 "--gradient-accumulation-steps\n")  # fmt: skip


def test_a_mistake_of_the_program_itself_is_not_hidden(run, monkeypatch):
    def fail(arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(commands, "run_stage", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("run")


# --- Full disks and Ctrl-C --------------------------------------------------------------------------------------------


GOING_ON = ["before.json", "checkpoint", "config.json", "metrics.jsonl", "rollouts.jsonl"]


@pytest.mark.parametrize(
    ("size", "failing", "kept"),
    [
        (300, "config.json", []),
        (4000, "metrics.jsonl", GOING_ON),
        (4000, "rollouts.jsonl", GOING_ON),
        (50_000, "state.safetensors", GOING_ON),
        (50_000, "policy", GOING_ON),
    ],
)
def test_a_full_disk(size, failing, kept, run, tmp_path):
    """No file can grow beyond a size, as the system itself has it: what is on the disk afterwards is whole."""
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        every = 100 if failing == "policy" else 10
        rows = 3000 if failing == "metrics.jsonl" else 15  # of so many, responses are kept too seldom to fill the disk
        code, _, error = run(*PPO.split(), *FAST, "--num-iterations", rows, "--checkpoint-every", every, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = error.strip().splitlines()[-1]
    assert code == 2 and re.search(f"^error: .*{failing}: .*File too large", last) and "Traceback" not in error
    assert sorted(path.name for path in out.iterdir()) == kept
    if "metrics.jsonl" in kept:
        json.loads((out / "config.json").read_text())
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1)) and rows
        assert [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]


def start(*arguments, **options):
    command = [sys.executable, "-m", "rlhf_lessons", *map(str, arguments)]
    # What starts the tests may ignore SIGINT, a shell's background job for one, and a child inherits that.
    options |= {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def test_ctrl_c_in_mid_run(run, world, tmp_path):
    out = tmp_path / "out"
    metrics = out / "metrics.jsonl"
    process = start(*PPO.split(), *FAST, "--num-iterations", 100_000, "--out", out, cwd=world)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.endswith("\nstopped; what was written so far is complete and can be read\n")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1)) and metrics.read_text().endswith("\n")
    assert sorted(path.name for path in out.iterdir()) == GOING_ON
    assert json.loads((out / "config.json").read_text())["ppo"]["num_iterations"] == 100_000
    code, table, _ = run("summary", out)
    assert code == 0 and f"| out | ppo | {BETA:g} | 0 | stopped after {len(rows)} of 100000 iterations |" in table


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what a process has loaded from /proc")
def test_ctrl_c_while_it_starts():
    process = start("run")
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error and "stopped" in error


def test_ctrl_c_inside_generated_code(tmp_path):
    """Libraries make classes from text while they are imported; Python remembers an interruption there to the end."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\nfrom rlhf_lessons import __main__ as commands\n"
        "commands.build_parser = lambda: exec('raise KeyboardInterrupt')\nsys.exit(commands.main([]))\n"
    )
    done = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.startswith("\nstopped;")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_printing_to_a_full_disk(world, run):
    run(*PPO.split(), *FAST, "--out", "finished")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "rlhf_lessons", "summary", "finished"]
        done = subprocess.run(command, cwd=world, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "\nerror: No space left on device\n"


def printed(*arguments, **options):
    """What a process of its own does: standard output is a pipe, kept until it is full or handed over."""
    command = [sys.executable, "-m", "rlhf_lessons", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"stdout": subprocess.PIPE} | options | {"env": environment | options.pop("env", {})}
    return subprocess.run(command, stderr=subprocess.PIPE, **options)


CONSOLE = """
import sys
from rlhf_lessons.__main__ import main
for encoding in ("cp1252", "ascii"):
    for line in sys.argv[1:]:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=encoding, errors="strict")
        try:
            print("ended with", main(line.split()))
        except SystemExit as end:
            print("ended with", end.code)
"""


def test_a_console_that_lacks_a_character_shows_its_number(world, run):
    """As on Windows, where what goes into a file or a pipe is in the code page: no command ends by its own output."""
    run(*PPO.split(), *FAST, "--out", "told")
    model = "--model lm --policy lm --score own_scores:good --count 1 --max-new-tokens 4"
    lines = ["ppo --help", "summary →", "summary told", f"sample {model} --prompt →"]
    done = subprocess.run([sys.executable, "-c", CONSOLE, *lines], cwd=world, capture_output=True, encoding="cp1252")
    assert done.returncode == 0, done.stderr
    outputs = re.findall(r"(.*?)ended with (\d)\n", done.stdout, re.DOTALL)
    assert [int(code) for _, code in outputs] == 2 * [0, 2, 0, 0]
    for helped, _, summary, sample in (outputs[:4], outputs[4:]):
        assert r"\u03b2" in helped[0] and r"| \u03b2 |" in summary[0] and r"\u2192" in sample[0]
    assert done.stderr.count(r"error: \u2192: holds no run") == 2


def test_commands_run_where_standard_output_is_no_file(run, monkeypatch):
    """A notebook's is not, and a windowed program has none; the commands then print as they can."""
    monkeypatch.setattr(sys, "stderr", None)
    commands.print_anywhere()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=print, flush=lambda: None))
    commands.print_anywhere()


@pytest.mark.parametrize("arguments", ["--help", "ppo --help", "summary read"])
def test_a_reader_that_has_left_ends_a_command_quietly(arguments, world, run):
    run(*PPO.split(), *FAST, "--out", "read")
    reader, writer = os.pipe()
    os.close(reader)
    done = printed(*arguments.split(), cwd=world, stdout=writer)
    os.close(writer)
    assert done.returncode == commands.EXIT_UNREAD == 141 and done.stderr == b""


def test_an_argument_that_is_no_text_is_said_in_a_line(run):
    sample = "sample --model lm --policy lm --score own_scores:good --max-new-tokens 4 --prompt".split()
    code, _, error = run(*sample, "caf\udce9")
    assert code == 2 and error.endswith("error: --prompt: the field \"prompt\" holds half of a surrogate pair, no char"
                                        "acter\n")  # fmt: skip


# --- Help -------------------------------------------------------------------------------------------------------------

NAMES = ["run", "pretrain", "reward", "ppo", "sample", "summary", "compare"]


def test_the_help_says_what_this_is_and_how_to_begin(run):
    code, text, _ = run("--help")
    assert code == 0 and all(re.search(f"^    {name} +\\w", text, re.M) for name in NAMES)
    assert "reward model" in text and "python -m rlhf_lessons run  " in text


@pytest.mark.parametrize("name", NAMES)
def test_a_command_s_help_explains_each_option_and_gives_examples(name, run):
    code, text, _ = run(name, "--help")
    options = re.findall(r"^  (--[\w-]+)", text, re.M)
    assert code == 0 and "examples:" in text and len(text.splitlines()[0]) < 80
    joined = " ".join(text.split())
    explained = re.split(r"(?<!,) (?=--[a-z])", joined.split("options:", 1)[1].split("examples:")[0])
    for option in set(options) - {"--help"}:
        assert any(part.startswith(option) and len(part.split()) > 3 for part in explained), option
    if name in ("run", "ppo"):
        assert "--learning-rate X of AdamW at the start (default: 0.001; small: 2e-05)" in joined
        assert "--whiten-advantages, --no-whiten-advantages" in joined and "variance 1 (default: on)" in joined
        assert "KL per response, in nats, that β is steered to (default: off)" in joined
        assert "--critic {shared,separate}" in joined and "--preset {tiny,small}" in joined
        assert "pieces in which a minibatch is computed, to save memory (default: 1)" in joined
        assert "metrics.jsonl" in joined and "figures" in joined


class Reads:
    """The names that are read off objects of the kinds noted."""

    def __init__(self):
        self.names, self.noted = set(), ()

    def getter_of(self, kind):
        def get(owner, name, plain=kind.__getattribute__):
            if issubclass(type(owner), self.noted):
                self.names.add(name)
            return plain(owner, name)

        return get

    def noting(self, kinds, function):
        """The function, noting these kinds alone while it runs."""

        def wrapped(*arguments, **options):
            before, self.noted = self.noted, kinds
            try:
                return function(*arguments, **options)
            finally:
                self.noted = before

        return wrapped


@pytest.fixture
def reads(monkeypatch):
    """What a command reads of its options and settings, but for checking them and writing them down."""
    from rlhf_lessons.app import pipeline

    reads = Reads()
    configs = (PretrainConfig, RewardConfig, ModelConfig, *METHODS.values())
    for kind in (argparse.Namespace, *configs):
        monkeypatch.setattr(kind, "__getattribute__", reads.getter_of(kind))
    for kind in configs:
        monkeypatch.setattr(kind, "__post_init__", reads.noting((), kind.__post_init__))
    monkeypatch.setattr(commands, "settings_from", reads.noting((argparse.Namespace,), commands.settings_from))
    monkeypatch.setattr(pipeline, "describe", reads.noting((), pipeline.describe))

    def parse_args(argv):
        reads.noted = ()
        arguments = build_parser().parse_args(argv)
        reads.noted = (argparse.Namespace, *configs)
        return arguments

    monkeypatch.setattr(commands, "build_parser", lambda: SimpleNamespace(parse_args=parse_args))
    return reads


def options_of(name):
    """A command's options and positional arguments, by the names under which it finds them."""
    (commands_of,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return {action.dest for action in commands_of.choices[name]._actions} - {"help"}


ADAPTIVE = "--adaptive-kl-target 1".split()  # without it its horizon is not asked for
EVALUATED = "--eval-prompts prompts.txt".split()  # and without these not how often


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        (
            "run",
            [
                ["--num-preferences", "8", *FAST, *ADAPTIVE, *EVALUATED],
                [*RUN.split()[1:], *SMALL, *FAST],
                ["--num-preferences", "8", *FAST, *GROUPS],
                ["--num-preferences", "8", *LOOK, *DPO],
                ["--num-preferences", "8", *LOOK, *BEST],
            ],
        ),
        ("pretrain", [["--corpus", "corpus.txt", *SMALL, "--device", "cpu"]]),
        ("reward", [["--num-preferences", "8", "--device", "cpu"]]),
        ("ppo", [[*PPO.split()[1:], *FAST, *ADAPTIVE, *EVALUATED]]),
        ("sample", ["--model lm --policy lm --score own_scores:good --prompts prompts.txt --count 2".split()]),
        ("summary", [["finished"]]),
        ("compare", [["finished", "other", "--out", "both.png"]]),
    ],
)
def test_a_command_takes_the_options_that_it_reads_and_no_others(name, calls, run, reads, tmp_path):
    """All of them over these calls, and of the settings none that it does not take."""
    listed = options_of(name)
    for finished in ("finished", "other"):  # for the tables
        run(*PPO.split(), *FAST, "--out", finished)
    reads.names.clear()
    for number, options in enumerate(calls):
        out = ["--out", tmp_path / str(number)] if name in USES else []
        code, _, error = run(name, *options, *out)
        assert code == 0, error
    methods = METHODS.values() if name == "run" else [PPOConfig]
    kinds = (PretrainConfig, RewardConfig, ModelConfig, *methods)
    settings = {field.name for kind in kinds for field in fields(kind)}
    assert reads.names & (listed | settings if name in USES else listed) == listed


@pytest.mark.parametrize(
    "options",
    [
        "run --method dpo --eval-prompts e --log-with tensorboard --log-with wandb",
        "reward --preferences p --chat",
        "sample --prompt film --chat",
        "pretrain --layers 2 --context 32",  # the tiny world's corpus has no other tokenizer, but models of any size
        "run --preset small",
        "run --opening-words 3",  # as without it
        "run --corpus c --preferences p --eval-preferences e --layers 2 --reward-epochs 2 --opening-words 5",
        "run --model m --prompts p --preferences q",
        "run --adaptive-kl-target 6 --adaptive-kl-horizon 100",
        "run --method dpo --score a:b --preferences p --model m",  # the score measures, the pairs teach
        "run --method dpo --reward-model r --num-preferences 100",
        "run --method dpo --corpus c --preferences p --eval-preferences e --score a:b",
        "run --method grpo --advantage-scale none --loss-over constant",
        "run --method best-of-n --n 16",
        "reward --num-preferences 100",
    ],
)
def test_options_that_are_read_are_not_refused(options):
    check_given(build_parser().parse_args(options.split()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method best-of-n --lora-rank 4",
         "give --lora-rank with --method ppo or rloo or grpo or dpo: best-of-n does not read it"),
        ("--method best-of-n --kl-coef 0",
         "give --kl-coef with --method ppo or rloo or grpo or dpo: best-of-n does not read it"),
        ("--method dpo --corpus corpus.txt --score own_scores:good",
         "give --preferences with --corpus: DPO learns from them, and the tiny world has none"),
        ("--method dpo --eval-prompts e --eval-every 2",
         "give --eval-every with --method ppo or rloo or grpo: dpo does not read it"),
        ("--method dpo --reward-model r --reward-epochs 2", "give --reward-epochs or --reward-model, not both"),
    ],
)  # fmt: skip
def test_options_that_a_method_does_not_read_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check_given(build_parser().parse_args(["run", *options.split()]))


def test_what_is_said_of_an_option_is_said_of_one_that_there_is():
    assert WHAT.keys() == {**SOURCES, **OTHERS}.keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_help_lists_a_command_s_options(name, run):
    code, text, _ = run(name, "--help")
    said = re.findall(r"^  (?:--[\w-]+, )?--(?:no-)?([\w-]+)", text, re.M)
    assert code == 0 and {option.replace("-", "_") for option in said} - {"help"} == options_of(name) - {"runs"}


def test_the_version_is_the_package_s(run):
    assert run("--version") == (0, f"rlhf_lessons {rlhf_lessons.__version__}\n", "")


def test_the_examples_are_commands():
    parser = commands.build_parser()
    lines = [line for text in HELP.values() for line in text.splitlines()]
    examples = [re.split(r"\s{3,}", line.strip())[0] for line in lines if "python -m" in line]
    assert len(examples) >= 10
    for example in examples:
        words = shlex.split(example)
        assert words[:3] == ["python", "-m", "rlhf_lessons"]
        if "--help" not in words:
            parser.parse_args(words[3:])


def test_help_loads_no_library_for_models():
    code = (
        "import sys\nfrom rlhf_lessons.__main__ import main\n"
        "try: main(['run', '--help'])\nexcept SystemExit as exit: assert exit.code == 0\n"
        "heavy = {'transformers', 'accelerate', 'tokenizers', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "[]\n"


def processor_seconds(*arguments):
    """Processor time of a Python process: what else the machine does meanwhile counts little."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.timing
def test_help_takes_little_longer_than_importing_torch():
    torch_alone = min(processor_seconds("-c", "import torch") for _ in range(2))  # the first is from the disk
    ours = statistics.median(processor_seconds("-m", "rlhf_lessons", "--help") for _ in range(3))
    assert ours < 1.2 * torch_alone


# --- Whole runs -------------------------------------------------------------------------------------------------------


def check_finished(out, iterations=2, wanted=("entropy", "clip_fraction", "explained_variance"), policy=True):
    """A run's folder, complete, its policy a plain checkpoint that transformers alone can load."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert not unfinished(out)
    assert [row["iteration"] for row in read_metrics(out)] == list(range(1, iterations + 1))
    assert all({"score", "kl", *wanted} <= set(row) for row in read_metrics(out))
    for name in ("training.png", "tokens.png"):
        assert (out / "figures" / name).read_bytes().startswith(b"\x89PNG")
    assert {"before", "after"} <= set(json.loads((out / "summary.json").read_text()))
    samples = (out / "samples.md").read_text()
    assert samples.count("| before |") == samples.count("| after |") == 8
    if not policy:
        assert not (out / "policy").exists()
        return None
    lm, report = AutoModelForCausalLM.from_pretrained(out / "policy", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return lm, AutoTokenizer.from_pretrained(out / "policy")


TINY_PAIRS = ["--num-preferences", "64", "--reward-epochs", "0.1"]


@pytest.mark.parametrize(
    ("options", "iterations", "measured"),
    [
        ([*FAST, "--method", "rloo", "--samples-per-prompt", "4"], 2, {"entropy", "clip_fraction"}),
        ([*FAST, *GROUPS, "--kl-in", "loss"], 2, {"entropy", "kl_loss", "equal_scores"}),
        ([*LOOK, *DPO], 2, {"loss", "chosen_log_prob", "rejected_log_prob", "pairs_right"}),
        ([*LOOK, *BEST], 3, {"n", "response_length", "ended"}),
    ],
    ids=["rloo", "grpo", "dpo", "best-of-n"],
)
def test_every_method_leaves_the_same_folder(options, iterations, measured, run, tmp_path):
    """From the tiny world's own models and annotators, the gold reward measured beside."""
    code, _, error = run("run", *options, *TINY_PAIRS, "--out", tmp_path / "out")
    assert code == 0, error
    trained = "best-of-n" not in options
    check_finished(tmp_path / "out", iterations, {"gold", *measured}, policy=trained)
    method = options[options.index("--method") + 1]
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["method"] == method and method in settings and "critic" not in settings
    code, table, _ = run("summary", tmp_path / "out")
    assert code == 0 and f"| out | {method} | " in table


ADAPTER = ["--lora-rank", "2", "--gradient-checkpointing", "--weights", "bf16"]
GIVEN = ["--reward-model", str(ASSETS / "reward_model")]


@pytest.mark.parametrize("options", [[*FAST, *TINY_PAIRS],  # a reward model on the adapter's trunk, too
                                     [*FAST, *GIVEN, "--method", "rloo", "--samples-per-prompt", "4"],
                                     [*FAST, *GIVEN, *GROUPS], [*LOOK, *TINY_PAIRS, *DPO]],
                         ids=["ppo", "rloo", "grpo", "dpo"])  # fmt: skip
def test_every_method_trains_an_adapter_of_which_no_second_model_is_made(options, run, monkeypatch, tmp_path):
    """Its folder trains on, and is read beside the base by `sample`; before is the model with its adapter off."""
    from rlhf_lessons.app import align

    pytest.importorskip("peft")
    monkeypatch.setattr(align, "copy", SimpleNamespace(deepcopy=None))
    out, again = tmp_path / "out", tmp_path / "again"
    code, _, error = run("run", *options, *ADAPTER, "--out", out)
    assert code == 0, error
    kept = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    kept |= set() if "--method" in options else {"value_head.safetensors"}
    assert (
        kept <= {path.name for path in (out / "policy").iterdir()} and not (out / "policy/model.safetensors").exists()
    )
    assert json.loads((out / "policy" / "adapter_config.json").read_text())["r"] == 2
    settings = json.loads((out / "config.json").read_text())
    assert settings["model"] == dict(lora_rank=2, lora_alpha=None, gradient_checkpointing=True, weights="bf16")
    samples = (out / "samples.md").read_text()
    assert samples.count("| before |") == samples.count("| after |") == 8
    code, table, error = run("sample", "--policy", out / "policy", "--count", "2")
    assert code == 0 and table.count("| after |") == 2, error
    code, _, error = run("run", *options, "--model", out / "policy", "--out", again)
    assert code == 0 and (again / "policy" / "adapter_model.safetensors").exists(), error
    code, _, error = run("run", *options, "--lora-rank", 2, "--model", out / "policy", "--out", again / "x")
    assert code == 2 and "lora_rank must be 0 for a model that has an adapter" in error


def test_dpo_learns_from_the_pairs_and_is_measured_on_those_held_out(run, monkeypatch, tmp_path):
    from rlhf_lessons.app import align

    learnt, read, fit, measure = [], [], align.fit_dpo, align.preference_log_probs
    monkeypatch.setattr(
        align, "fit_dpo", lambda a, b, pairs, *c, **d: learnt.append(pairs) or fit(a, b, pairs, *c, **d)
    )
    monkeypatch.setattr(
        align, "preference_log_probs", lambda lm, pairs, *c, **d: read.append(pairs) or measure(lm, pairs, *c, **d)
    )
    pairs = [{"prompt": "film", "chosen": "good .", "rejected": "bad"}] * 8
    for name, count in (("own.jsonl", 8), ("held.jsonl", 3)):
        (tmp_path / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:count]))
    own = ["--preferences", tmp_path / "own.jsonl", "--eval-preferences", tmp_path / "held.jsonl"]
    out = ["--out", tmp_path / "out"]
    code, _, error = run("run", *LOOK, *DPO, "--model", "lm", "--score", "own_scores:good", *own, *out)
    assert code == 0, error
    assert [len(x) for x in learnt] == [8] and {len(x) for x in read} == {3}
    for row in read_metrics(tmp_path / "out"):
        assert 0 <= row["pairs_right"] <= 1 and row["chosen_log_prob"] < 0


def test_best_of_n_climbs_with_n(run, tmp_path):
    """Each n a mean over all ways to choose it from the same responses: it cannot fall."""
    shipped = ["--reward-model", ASSETS / "reward_model", "--missing-eos-penalty", "0", "--device", "cpu"]
    code, _, error = run("run", "--method", "best-of-n", "--n", 6, "--batch-size", 8, *shipped, "--out", tmp_path / "o")
    assert code == 0, error
    rows = read_metrics(tmp_path / "o")
    assert [row["n"] for row in rows] == [1, 2, 4, 6]
    assert [row["score"] for row in rows] == sorted(row["score"] for row in rows)
    assert rows[0]["kl"] == 0 and rows[3]["kl"] == pytest.approx(math.log(6) - 5 / 6, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "looked"),
    [
        ([*FAST, *TINY_PAIRS, "--eval-every", "2"], [False, True]),
        ([*FAST, *TINY_PAIRS, "--method", "rloo", "--samples-per-prompt", "4"], [False, True]),
        ([*LOOK, *DPO, *TINY_PAIRS], [True, True]),
    ],
    ids=["ppo", "rloo", "dpo"],
)
def test_evaluation_prompts_are_answered_before_between_and_after(options, looked, run, tmp_path):
    """The gold reward of their answers too, as plain as the summary that the run prints."""
    (tmp_path / "held_out.txt").write_text("the plot was\ni thought the acting was\nthe music")
    evaluated = ["--eval-prompts", tmp_path / "held_out.txt", "--out", tmp_path / "out"]
    code, output, error = run("run", *options, *evaluated)
    assert code == 0, error
    names = {f"eval_{name}" for name in ("score", "kl", "response_length", "ended", "gold")}
    rows = read_metrics(tmp_path / "out")
    assert [names <= set(row) for row in rows] == [bool(names & set(row)) for row in rows] == looked
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert abs(summary["before"]["eval_kl"]) < 1e-4 and names <= set(summary["before"])
    assert {name: summary["after"][name] for name in names} == pytest.approx({n: rows[-1][n] for n in names}, abs=1e-6)
    before, after = (summary[when]["eval_gold"] for when in ("before", "after"))
    assert f"gold reward on the evaluation prompts: {before:.2f} before, {after:.2f} after" in output


def test_a_run_on_chats(run, world, tmp_path):
    """Prompts, preferences and a plain file, by the template; what is shown are turns, no begin token twice."""
    (tmp_path / "pairs.jsonl").write_text("\n".join(
        json.dumps({side: [*chat, {"role": "assistant", "content": text}] for side, text in (("chosen", "good"),
                    ("rejected", "bad bad"))}) for chat in CHATS * 4))  # fmt: skip
    own = ["--model", "chatty", "--preferences", tmp_path / "pairs.jsonl", *FAST]
    code, _, error = run("run", *own, "--prompts", "chats.jsonl", "--out", tmp_path / "a")
    assert code == 0, error
    check_finished(tmp_path / "a")
    shown = set(re.findall(r"^\*\*(.*)\*\* …", (tmp_path / "a" / "samples.md").read_text(), re.M))
    assert shown == {"user: film", "system: good / user: film", "user: film / assistant: bad / user: film"}
    code, _, error = run("run", *own, "--prompts", "prompts.txt", "--chat", "--out", tmp_path / "b")
    assert code == 0 and json.loads((tmp_path / "b" / "config.json").read_text())["chat"] is True, error
    scores = ["--score", "own_scores:prompt_of_words", "--max-new-tokens", 4, "--prompt", "film", "--count", 1]
    models = ["--model", "chatty", "--policy", tmp_path / "b" / "policy"]
    assert run("sample", *models, *scores, "--chat")[1].count("| 3.00 |") == 2  # "film . bad"
    assert run("sample", *models, *scores)[1].count("| 1.00 |") == 2


def test_what_is_logged_is_named_in_the_config(run, tmp_path):
    pytest.importorskip("tensorboard")
    code, _, error = run(
        *PPO.split(), *FAST, "--log-with", "tensorboard", "--log-with", "tensorboard", "--out", tmp_path / "o"
    )
    assert code == 0, error
    assert json.loads((tmp_path / "o" / "config.json").read_text())["log_with"] == ["tensorboard"] * 2
    assert len(list((tmp_path / "o" / "tensorboard").glob("events*"))) == 1


def test_stage_by_stage_on_own_data(run, world, tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    code, output, said = run("pretrain", "--corpus", "corpus.txt", *SMALL, "--device", "cpu", "--out", a)
    assert code == 0 and output == f"\nwritten to {a / 'base_model'}\n"
    assert re.search(r"language model: \d+\.\d\d M parameters, \d+ tokens, 24 texts", said)
    own = ["--preferences", "pairs.jsonl", "--eval-preferences", "pairs.jsonl"]
    code, output, said = run("reward", "--model", a / "base_model", *own, "--device", "cpu", "--out", b)
    assert code == 0 and output == f"\nwritten to {b / 'reward_model'}\n"
    accuracy = json.loads((b / "reward_model.json").read_text())
    assert accuracy["held_out_pairs"] == 16 and f"right on {accuracy['accuracy']:.1%} of 16 held-out pairs" in said
    models = ["--model", a / "base_model", "--reward-model", b / "reward_model"]
    code, output, said = run("ppo", *models, "--prompts", "prompts.txt", *FAST, "--out", c)
    assert code == 0 and "prompts: 3, from prompts.txt; the first is 'film'" in said
    assert f"PPO maximises the scores of {b / 'reward_model'}" in said
    assert "proxy reward: " in output and "gold" not in output
    assert output.endswith(f"\nwritten to {c}; {c / 'report.html'} shows it in a browser\n")
    lm, tokenizer = check_finished(c)
    ids = lm.generate(**tokenizer("film", return_tensors="pt"), max_new_tokens=4, pad_token_id=tokenizer.pad_token_id)
    assert ids.shape[1] > 1
    for folder in (a, b, c):
        made_by = json.loads((folder / "config.json").read_text())["made_by"]
        assert made_by["torch"] == torch.__version__ and bool(made_by["gpu"]) == torch.cuda.is_available()
    code, table, _ = run("summary", c)
    assert code == 0 and table.splitlines()[2].startswith(f"| c | ppo | {BETA:g} | 0 | ")
    code, shown, _ = run(
        "sample", *models, "--policy", c / "policy", "--prompt", "film", "--count", 2, "--max-new-tokens", 4
    )
    assert code == 0 and shown.count("**film** …") == 2 and shown.count("| after |") == 2 and "gold" not in shown


def test_the_whole_pipeline_on_own_data(run, tmp_path):
    own = ["--corpus", "corpus.txt", "--preferences", "pairs.jsonl"]
    code, output, said = run("run", *own, *SMALL, *FAST, "--critic", "separate", "--out", tmp_path / "out")
    assert code == 0 and "prompts: 24, the first 3 words of lines in corpus.txt" in said
    assert "reward model: not measured" in said
    check_finished(tmp_path / "out")
    assert (tmp_path / "out" / "policy" / "critic").is_dir()
    for name in ("base_model", "reward_model"):
        assert (tmp_path / "out" / name / "model.safetensors").exists()
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["sources"]["corpus"] == "corpus.txt" and settings["critic"] == "separate"
    assert settings["pretrain"]["width"] == 16 and settings["ppo"]["batch_size"] == 8


def test_another_architecture_with_a_tokenizer_of_its_own(run, world, make_lm, tmp_path):
    """A Llama with byte-level BPE, its reward model a GPT-2 with a vocabulary of words."""
    from rlhf_lessons.data import read_corpus, train_tokenizer

    tokenizer = train_tokenizer(read_corpus(world / "corpus.txt"), vocab_size=300)
    names = dict(vocab_size=len(tokenizer), initializer_range=0.02)
    ids = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    for part in (make_lm("llama", **names, **ids), tokenizer):
        part.save_pretrained(tmp_path / "llama")
    options = ["--model", tmp_path / "llama", "--prompts", "prompts.txt", "--reward-model", "reward", *FAST]
    assert run("ppo", *options, "--out", tmp_path / "out")[0] == 0
    lm, _ = check_finished(tmp_path / "out")
    assert type(lm).__name__ == "LlamaForCausalLM"


def test_the_settings_are_the_preset_s_with_what_is_given_in_their_place():
    parser = commands.build_parser()
    assert commands.settings_from(parser.parse_args(["run"])) == Settings()
    given = "run --preset small --corpus corpus.txt --score own_scores:good --width 96 --kl-coef 0".split()
    given.append("--no-whiten-advantages")
    settings = commands.settings_from(parser.parse_args(given))
    pretrain, ppo = settings.pretrain, settings.method
    assert (pretrain.width, pretrain.layers, pretrain.lm_epochs) == (96, 12, 6.0)
    small = PRESETS["small"]
    assert settings.reward == RewardConfig(**{k: v for k, v in small.items() if k.startswith("reward_")})
    assert (ppo.kl_coef, ppo.whiten_advantages, ppo.batch_size, ppo.precision) == (0.0, False, 512, "bf16")
