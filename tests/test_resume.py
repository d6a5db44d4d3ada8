"""`run --resume`: a run that was stopped anywhere leaves what one left in peace does; another one is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from survive import begin, contents, left_half_written, survive, write_inputs

from rlhf_lessons import __main__ as commands
from rlhf_lessons import fitting
from rlhf_lessons.app import align
from rlhf_lessons.app.inputs import FILES, import_score
from rlhf_lessons.app.resume import Stage, digest, digests
from rlhf_lessons.app.run_folder import RunFolder, read_metrics

pytestmark = pytest.mark.usefixtures("small_world")
STEPS, PARTS = ["--num-iterations", "6"], ["--minibatch-size", "16"]
FEW = [*STEPS, *"--lm-epochs 1 --reward-epochs 1 --checkpoint-every 2".split()]
METHODS = {
    "ppo": [*STEPS, *PARTS, "--critic", "separate", "--adaptive-kl-target", "3", "--adaptive-kl-horizon", "100"],
    "grpo": [*STEPS, *PARTS, "--samples-per-prompt", "4"],
    "dpo": [*STEPS, "--dpo-batch-size", "16", "--dpo-epochs", "1"],
    "best-of-n": ["--n", "8"],
    "ppo with an adapter": [*STEPS, *PARTS, "--lora-rank", "2", "--warmup-iterations", "2", "--lr-schedule", "cosine",
                            "--gradient-checkpointing"],
}  # fmt: skip
SAMPLED = "--batch-size 32 --max-new-tokens 12 --checkpoint-every 2 --device cpu --threads 1".split()


@pytest.fixture(autouse=True)
def ctrl_c_is_pythons():
    """What starts the tests may ignore SIGINT, a shell's background job for one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_inputs(folder, lines=600)
    return folder


def words(place, out, *more):
    return [*begin(place, out)[3:], *FEW, *more]


@pytest.fixture(scope="module")
def in_peace(place):
    assert commands.main(words(place, place / "peace")) == 0
    return contents(place / "peace")


@pytest.fixture(scope="module")
def stopped_once(place, in_peace):
    with interrupted(align.History, "add", calls=3):
        assert commands.main(words(place, place / "stopped")) == 130
    return place / "stopped"


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A run that was interrupted in PPO's third iteration, to do with as one likes."""
    return shutil.copytree(stopped_once, tmp_path / "stopped")


class interrupted:
    """Ctrl-C in the n-th call of a function, or None of them."""

    def __init__(self, owner, name, *, calls):
        self.owner, self.name, self.calls, self.original = owner, name, calls, getattr(owner, name)

    def __enter__(self):
        def function(*arguments, **options):
            self.calls -= 1
            if self.calls == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return self.original(*arguments, **options)

        setattr(self.owner, self.name, function)

    def __exit__(self, *error):
        setattr(self.owner, self.name, self.original)


STAGES = {
    "before the language model": (fitting, "make_accelerator", 1),
    "the language model": (fitting, "language_model_loss", 30),
    "the reward model": (fitting, "bradley_terry_loss", 7),
    "the reward model's normalisation": (fitting, "score_ids", 1),
    "PPO, before its first checkpoint": (align.History, "add", 1),
    "PPO": (align.History, "add", 5),
    "PPO's last iteration": (align.History, "add", 6),
    "samples": (align, "samples_table", 1),
    "figures": (align, "draw_run", 1),
}


@pytest.mark.parametrize("stages", [[*STAGES], *(pytest.param([stage], marks=pytest.mark.slow) for stage in STAGES)])
def test_a_run_that_was_stopped_ends_as_if_it_had_not(stages, place, in_peace, tmp_path, capsys):
    """In every stage in turn; and, slow, in each alone."""
    command, out, done = words(place, tmp_path / "out"), tmp_path / "out", 0
    for stage in stages:
        owner, name, calls = STAGES[stage]
        with interrupted(owner, name, calls=calls - done if name == "add" else calls):
            assert commands.main(command) == 130
        assert left_half_written(out) == []
        assert f"run --resume {out} goes on" in capsys.readouterr().err or stage.startswith("before")
        command, done = ["run", "--resume", str(out)], calls if name == "add" else 0
    assert commands.main(command) == 0
    found = contents(out)
    assert [name for name in {**in_peace, **found} if in_peace.get(name) != found.get(name)] == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on(method, place, in_peace, tmp_path):
    """From models and prompts that are given, so that the method alone is there to be stopped."""
    prompts, out, peace = tmp_path / "prompts.txt", tmp_path / "out", tmp_path / "peace"
    prompts.write_text("the plot was\ni thought\noverall the acting\n")
    made = place / "peace"
    command = ["run", "--method", method.split()[0], "--model", str(made / "base_model"), "--prompts", str(prompts)]
    command += ["--preferences", str(place / "pairs.jsonl")] if method == "dpo" else []
    command += ["--reward-model", str(made / "reward_model"), *SAMPLED, *METHODS[method], "--out"]
    with interrupted(align.Trainer, "collect", calls=5 if method != "best-of-n" else 1):
        assert commands.main([*command, str(out)]) == 130
    assert commands.main(["run", "--resume", str(out)]) == 0
    assert commands.main([*command, str(peace)]) == 0
    found, expected = contents(out), contents(peace)
    assert [name for name in {**expected, **found} if expected.get(name) != found.get(name)] == []


def test_a_second_interruption_does_not_wait(place, in_peace, tmp_path):
    """The state of the last checkpoint stays, and that of the broken step is not kept."""
    out = tmp_path / "out"

    def twice(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "language_model_loss", twice)
        assert commands.main(words(place, out)) == 130
    assert not (out / "checkpoint" / "state.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kl-coef", "0.3"], r"give --kl-coef as the run began \(None\), or not at all, with --resume; got 0.3"),
        (["--num-iterations", "9"], r"give --num-iterations as the run began \(6\), or not at all, .* got 9"),
        (["--method", "grpo"], r"give --method as the run began \(ppo\), or not at all"),
        (["--out", "elsewhere"], r"give --out as the run began \(.*stopped\), or not at all, .* got elsewhere"),
    ],
)
def test_other_settings_are_refused(more, message, stopped, capsys):
    before = contents(stopped)
    assert commands.main(["run", "--resume", str(stopped), *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(f"^error: {message}", error) and contents(stopped) == before


def test_the_runs_own_settings_may_be_said_again(stopped, in_peace):
    again = ["--num-iterations", "6", "--method", "ppo", "--out", str(stopped)]
    assert commands.main(["run", "--resume", str(stopped), *again]) == 0


def refused(arguments, message, capsys):
    assert commands.main(arguments) == 2
    error = capsys.readouterr().err
    (said,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert re.search(f"^error: .*{message}", said), error


def test_changed_inputs_are_refused(place, tmp_path, capsys):
    for name in ("corpus.txt", "pairs.jsonl", "held_out.jsonl"):
        shutil.copy(place / name, tmp_path / name)
    out = tmp_path / "out"
    with interrupted(fitting, "language_model_loss", calls=3):
        assert commands.main(words(tmp_path, out)) == 130
    text = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(text.replace("the", "a", 1))
    refused(
        ["run", "--resume", str(out)], "preferences must be what the run began with; .*pairs.jsonl has changed", capsys
    )
    (tmp_path / "pairs.jsonl").write_text(text)
    assert commands.main(["run", "--resume", str(out)]) == 0


def test_changed_models_and_scores_are_refused(make_lm, tokenizer, tmp_path, monkeypatch, capsys):
    for part in (make_lm(), tokenizer):
        part.save_pretrained(tmp_path / "lm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "prompts.txt").write_text("film\n")
    (tmp_path / "resumed_scores.py").write_text("def good(prompts, responses):\n    return [0.0] * len(responses)\n")
    ppo = "ppo --model lm --prompts prompts.txt --score resumed_scores:good --device cpu --max-new-tokens 4 --out out"
    with interrupted(align.History, "add", calls=1):
        assert commands.main(ppo.split()) == 130
    source = (tmp_path / "resumed_scores.py").read_text()
    (tmp_path / "resumed_scores.py").write_text(source + "\n# another\n")
    refused(
        ["run", "--resume", "out"], "score must be what the run began with; resumed_scores:good has changed", capsys
    )
    (tmp_path / "resumed_scores.py").write_text(source)
    make_lm(seed=1).save_pretrained(tmp_path / "lm")
    refused(["run", "--resume", "out"], "model must be what the run began with; lm has changed", capsys)


def test_a_score_may_be_any_callable(tmp_path, monkeypatch):
    """Its file is what a continued run compares: that of its class, or of what a partial calls."""
    (tmp_path / "called.py").write_text(
        "import functools\nclass Good:\n"
        "    def __call__(self, prompts, responses):\n        return [0.0] * len(prompts)\n"
        "def of(value, prompts, responses):\n    return [value] * len(prompts)\n"
        "good, part = Good(), functools.partial(of, 1.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("good", "part", "of"):
        given = dict.fromkeys([*FILES, "model", "reward_model"]) | {"score": import_score(f"called:{name}")}
        assert digests(SimpleNamespace(**given)) == {"score": digest(tmp_path / "called.py")}


def test_a_finished_run_a_strange_folder_and_none_are_refused(place, in_peace, tmp_path, capsys):
    refused(["run", "--resume", str(place / "peace")], "peace: its run has finished; --out begins another", capsys)
    refused(
        ["run", "--resume", str(tmp_path / "none")], "none: holds no run that could go on .FileNotFoundError", capsys
    )
    (tmp_path / "config.json").write_text("{}")
    refused(["run", "--resume", str(tmp_path)], "holds no run that could go on .KeyError", capsys)


def test_a_folder_in_use_is_refused(stopped, capsys):
    holder = "import sys, time; from rlhf_lessons.app.run_folder import RunFolder\n" \
             "with RunFolder(sys.argv[1], new=False).in_use(): print('held', flush=True); time.sleep(60)"  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", holder, str(stopped)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        refused(["run", "--resume", str(stopped)], "stopped: another process is at work in this folder", capsys)
    finally:
        process.kill()
        process.communicate()
    assert commands.main(["run", "--resume", str(stopped)]) == 0


def test_a_stopped_runs_folder_is_not_taken_by_another(stopped, place, capsys):
    refused(words(place, stopped), f"already holds .*, whose run --resume {stopped} continues", capsys)


def test_a_broken_checkpoint_is_said_in_a_line(stopped, capsys):
    state = stopped / "checkpoint" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    before = contents(stopped)
    refused(["run", "--resume", str(stopped)], "cannot read the checkpoint .*state.safetensors", capsys)
    assert contents(stopped) == before
    state.unlink()  # without it, the stage begins again
    assert commands.main(["run", "--resume", str(stopped)]) == 0


def test_what_a_killed_process_left_half_written_is_removed(stopped):
    (stopped / "policy.partial").mkdir()
    (stopped / "policy.partial" / "model.safetensors").write_text("half")
    (stopped / "samples.md.partial").write_text("half")
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "kl"')
    with RunFolder(stopped, new=False).in_use():
        assert sorted(path.name for path in stopped.iterdir() if "partial" in path.name) == []
    RunFolder(stopped, new=False).go_on_after(3)
    assert [row["iteration"] for row in read_metrics(stopped)] == [1, 2, 3]


def test_a_fit_in_another_thread_leaves_signals_alone(place, tmp_path):
    codes, sizes = [], "--layers 1 --width 16 --heads 1 --context 32 --lm-epochs 0.1 --device cpu".split()
    out = tmp_path / "out"
    command = ["pretrain", *words(place, out)[1:3], *sizes, "--out", str(out)]
    thread = threading.Thread(target=lambda: codes.append(commands.main(command)))
    thread.start()
    thread.join()
    assert codes == [0] and not (out / "checkpoint").exists()


def test_another_handler_of_ctrl_c_stays(tmp_path):
    """A program's own, or none where it is ignored; a stage takes the place of Python's default alone."""
    stage = Stage(RunFolder(tmp_path), "a fit")
    for handler in (signal.SIG_IGN, lambda number, frame: None):
        before = signal.signal(signal.SIGINT, handler)
        try:
            with stage:
                assert signal.getsignal(signal.SIGINT) is handler
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)
    with stage:
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_runs_survive_being_killed(tmp_path):
    assert survive(Path(tmp_path), kills=4, seed=2) == 0


def test_config_tells_of_every_input(place, in_peace):
    config = json.loads((place / "peace" / "config.json").read_text())
    assert set(config["inputs"]) == {"corpus", "preferences", "eval_preferences"}
    assert all(len(value) == 64 for value in config["inputs"].values())
