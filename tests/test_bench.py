"""The measurements: that equal work is measured, that the figures are the ones they are called, and the table."""

import ast
import json
import subprocess
import sys
import time
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import bench
import pytest
import torch
from bench import channel as channels
from bench import command, subjects, tables, workload
from bench.workload import SHAPES, Shape, Work

ROOT = Path(__file__).resolve().parent.parent
TINY = Shape(layers=2, width=32, heads=2, vocabulary=40, context=32)
WORK = Work(rows=8, prompt_tokens=4, new_tokens=6, epochs=2, minibatches=4)


class Asked:
    """A channel in this process that asks a number of times and keeps the answers."""

    device, started = "cpu", 0.0

    def __init__(self, times):
        self.left, self.answers = times, []

    def wait(self):
        self.left -= 1
        return self.left >= 0

    def report(self, **measured):
        self.answers.append(measured)

    def clock(self):
        return time.perf_counter()

    def serve(self, run):
        while self.wait():
            self.report(**(run() or {}))


@pytest.mark.parametrize(("name", "millions"), [("0.87 M", 0.875), ("7.6 M", 7.60), ("82 M", 81.9), ("124 M", 124.4)])
def test_shapes_have_the_parameters_that_they_are_named_after(name, millions):
    with torch.device("meta"):
        lm = workload.language_model(SHAPES[name])
    assert sum(p.numel() for p in lm.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_prompts_have_their_number_of_tokens_and_models_their_weights_again():
    tokenizer = workload.tokenizer(TINY)
    texts = workload.prompts(TINY, WORK, 20)
    assert {len(tokenizer(text).input_ids) for text in texts} == {WORK.prompt_tokens} and len(set(texts)) > 15
    a, b = (workload.language_model(TINY).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_an_iteration_takes_the_stated_steps_over_full_responses(critic):
    channel = Asked(2)
    subjects.ppo_ours(channel, TINY, WORK, critic=critic)
    assert len(channel.answers) == 2
    for answer in channel.answers:
        assert answer["optimizer_steps"] == WORK.optimizer_steps == 8
        assert answer["response_length"] == WORK.new_tokens
        assert answer["first_ratio_error"] < 1e-5
        assert min(answer[name] for name in ("sampling", "scoring", "update")) > 0


def test_a_bare_update_takes_the_same_steps(monkeypatch):
    """As many as an iteration's, each over a minibatch's tokens; the head on the responses alone."""
    read = []
    lm = workload.language_model(TINY)
    lm.register_forward_hook(lambda _, inputs, options, out: read.append(out.logits.shape), with_kwargs=True)
    monkeypatch.setattr(workload, "language_model", lambda *args, **options: lm)
    before = [p.detach().clone() for p in lm.parameters()]
    channel = Asked(1)
    subjects.update_bare(channel, TINY, WORK)
    assert channel.answers == [{"optimizer_steps": 8}] and read == [(2, WORK.new_tokens + 1, TINY.vocabulary)] * 8
    assert all((p != q).any() for p, q in zip(lm.parameters(), before, strict=True))


def test_counted_operations_are_those_of_the_layers():
    """The update against the count by hand: 2 a multiplication forward, 4 backward; the head on responses alone."""
    channel = Asked(1)
    subjects.ppo_flops(channel, TINY, WORK)
    counted = channel.answers[0]
    length = WORK.prompt_tokens + WORK.new_tokens - 1
    block = 12 * TINY.width**2  # qkv 3, projection 1, the two of the MLP 8
    trunk = WORK.epochs * WORK.rows * length * TINY.layers * block
    head = WORK.epochs * WORK.rows * WORK.new_tokens * TINY.width * (TINY.vocabulary + 1)
    assert counted["update"] == pytest.approx(6 * (trunk + head), rel=0.1)
    # Scoring is three trunks (values, reference, reward model) and the reference's head on the responses.
    one = WORK.rows * length * TINY.layers * block
    vocabulary = WORK.rows * WORK.new_tokens * TINY.width * TINY.vocabulary
    assert counted["scoring"] == pytest.approx(2 * (3 * one + vocabulary), rel=0.1)
    sampled = WORK.rows * length * TINY.layers * block + vocabulary
    assert counted["sampling"] == pytest.approx(2 * sampled, rel=0.1)


def test_gae_and_its_peers_compute_the_same(monkeypatch):
    made = {}

    class Channel:
        def __init__(self, name):
            self.serve = lambda function: made.update({name: function()})

    names = ["gae_ours", "gae_loop"] + ["gae_torchrl"] * (find_spec("torchrl") is not None)
    for name in names:
        subjects.SUBJECTS[name](Channel(name), None, WORK)
    for name in names[1:]:
        for mine, other in zip(made["gae_ours"], made[name], strict=True):
            torch.testing.assert_close(mine, other.reshape(mine.shape), atol=1e-4, rtol=1e-4)


def test_all_samplers_run_to_the_end():
    for name in ("sampling_ours", "sampling_static", "sampling_generate", "sampling_generate_fast"):
        channel = Asked(1)
        subjects.SUBJECTS[name](channel, TINY, WORK)
        assert len(channel.answers) == 1


def test_workers_take_turns_and_what_is_missing_says_so(monkeypatch):
    turns = []

    class Worker:
        def __init__(self, name, shape, work):
            self.name = name

        def run(self):
            turns.append(self.name)
            return {"missing": "No module named 'peer'"} if self.name == "peer" else {"seconds": float(len(turns))}

        def stop(self):
            turns.append(f"{self.name} stopped")

    monkeypatch.setattr(command, "Worker", Worker)
    results = command.interleave(("ours", "peer", "other"), None, {}, 2)
    assert turns == ["ours", "peer", "other"] + ["ours", "other"] * 2 + [
        "ours stopped",
        "peer stopped",
        "other stopped",
    ]
    assert [len(results[name]) for name in ("ours", "peer", "other")] == [3, 1, 3]
    assert tables.median(results["peer"]) is None and tables.median(results["ours"]) == 5.0


def test_the_warm_up_does_not_count():
    rounds = [{"seconds": 100.0}, {"seconds": 1.0}, {"seconds": 5.0}, {"seconds": 2.0}]
    assert tables.median(rounds) == 2.0 and tables.ratio(3.0, 2.0) == "1.50" and tables.ratio(None, 2.0) == "–"


def test_a_worker_process_measures_and_ends():
    process = command.Worker("gae_ours", None, {})
    first, second = process.run(), process.run()
    process.stop()
    assert process.process.returncode == 0
    for measured in (first, second):
        assert measured["seconds"] > 0 and measured["cpu_seconds"] > 0 and measured["peak_mb"] > 50


def test_a_short_subject_is_repeated_as_often_in_every_round(monkeypatch):
    clock, asked, answers = [0.0], [3], []

    class Fake(channels.Channel):
        device, peak_mb = "cpu", lambda self: 1.0

        def __init__(self):
            self.answers = self

        def wait(self):
            asked[0] -= 1
            self.started, self.cpu_started = clock[0], time.process_time()
            return asked[0] >= 0

        def clock(self):
            return clock[0]

        def write(self, text):
            answers.append(text)

        def flush(self):
            pass

    calls = []

    def run():
        calls.append(1)
        clock[0] += 0.3 if len(calls) > 4 else channels.SHORTEST_ROUND / 4
        return {"steps": 7}

    Fake().serve(run)
    measured = [json.loads(answer) for answer in answers if answer.strip()]
    assert len(calls) == 3 * 4 and [m["steps"] for m in measured] == [7] * 3
    assert [m["seconds"] for m in measured] == pytest.approx([0.25, 0.3, 0.3])


def test_a_failing_worker_is_named():
    process = command.Worker("no_such_subject", None, {})
    with pytest.raises(ValueError, match="the measurement no_such_subject failed"):
        process.run()
    process.stop()


def fake_measurements():
    def rounds(seconds, **more):
        return [{"seconds": 99.0} | more] + [{"seconds": seconds, "cpu_seconds": seconds / 2} | more] * 3

    ours = dict(peak_mb=400.0, optimizer_steps=16, sampling=0.1, scoring=0.2, update=0.7)
    flops = [dict(sampling=1e9, scoring=2e9, update=21e9)]
    return {
        "machine": dict(command="c", processor="p", threads=1, python="3", torch="2", transformers="5", load=0.1),
        "work": vars(Work()) | {},
        "rounds": 3,
        "matmul": {"matmul": rounds(1.0, flops_per_second=60e9)},
        "startup": {"import torch": rounds(2.0), "--help": rounds(2.2)},
        "gae": {"gae_ours": rounds(0.0005), "gae_loop": rounds(0.0025), "gae_torchrl": [{"missing": "torchrl"}]},
        "sampling": {
            "7.6 M": dict(
                sampling_ours=rounds(1.0), sampling_static=rounds(0.5), sampling_generate=rounds(1.5),
                sampling_generate_fast=rounds(1.2),
            )
        },
        "ppo": {
            "7.6 M": dict(
                ppo_ours=rounds(1.0, **ours), ppo_ours_separate=rounds(2.0, **ours),
                ppo_trl=rounds(3.0, peak_mb=800.0, optimizer_steps=16), ppo_flops=flops, ppo_flops_separate=flops,
                update_bare=rounds(0.56),
            )
        },
        "grpo": {"7.6 M": dict(grpo_ours=rounds(1.0, **ours), grpo_trl=rounds(2.5, peak_mb=800.0, optimizer_steps=16))},
    }  # fmt: skip


def test_the_table_holds_the_ratios():
    text = tables.markdown(fake_measurements())
    for row in (
        "| `--help` | 2.20 | 1.10 |",
        "| the plain loop | 2500 | 5.00 | 5.00 |",
        "| torchrl, vectorised | – | – | – |",
        "| 7.6 M | `StaticSampler` | 3072 | 0.50 | 0.50 |",
        "| 7.6 M | `generate` with scores | 1024 | 1.50 | 1.50 |",
        "| 7.6 M | TRL 1.12 | 3.00 | 512 | 1.00 | 1.00 | 800 | 1.00 | 16 |",
        "| 7.6 M | shared trunk | 1.00 | 1536 | 3.00 | 3.00 | 400 | 0.50 | 16 |",
        "| 7.6 M | shared trunk | update | 0.700 | 21.0 | 50 % |",
        "| PPO, shared trunk: peak memory, of TRL's | 0.50 |",
        "| PPO, separate critic: tokens/s, times TRL's | 1.50 |",
        "| PPO's update: steps/s, of a bare forward, backward and AdamW | 0.80 |",
        "| 7.6 M | TRL 1.16 | 2.50 | 614 | 1.00 | 1.00 | 800 | 1.00 | 16 |",
        "| 7.6 M | `GRPOTrainer` | 1.00 | 1536 | 2.50 | 2.50 | 400 | 0.50 | 16 |",
        "| GRPO: tokens/s, times TRL's | 2.50 |",
        "| GRPO: peak memory, of TRL's | 0.50 |",
        "| sampling: tokens/s, times `generate`'s | 1.50 |",
        "| sampling, fixed shapes: tokens/s, times `generate`'s | 3.00 |",
    ):
        assert row in text.splitlines(), row


def test_the_page_of_figures_shows_what_was_measured():
    page = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "figures" / "bench.json").read_text(encoding="utf-8"))
    assert (ROOT / "figures" / "bench.md").read_text(encoding="utf-8") == tables.markdown(measured)
    assert "\n".join(tables.in_short(measured)) in page


def test_the_command_writes_json_and_markdown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "measure", lambda parts, rounds, gpu: iter([fake_measurements()]))
    out = tmp_path / "new"
    assert command.main(["--out", str(out), "--rounds", "3"]) == 0
    written = json.loads((out / "bench.json").read_text())
    assert written["rounds"] == 3
    assert written["machine"]["command"] == f"python tests/bench --out {out} --rounds 3"
    assert (out / "bench.md").read_text() in capsys.readouterr().out


def test_what_is_cut_off_leaves_the_parts_before(tmp_path, monkeypatch, capsys):
    written = fake_measurements()

    def measure(parts, rounds, gpu):
        yield {name: part for name, part in written.items() if name not in ("ppo", "grpo")}
        raise ValueError("the measurement ppo_trl failed")

    monkeypatch.setattr(command, "measure", measure)
    assert command.main(["--out", str(tmp_path), "--rounds", "3"]) == 2
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert "sampling" in kept and "ppo" not in kept and "`generate`" in (tmp_path / "bench.md").read_text()


def test_each_part_comes_as_soon_as_it_is_measured(monkeypatch):
    monkeypatch.setattr(command, "interleave", lambda subjects, *work: {name: [{"seconds": 1.0}] for name in subjects})
    monkeypatch.setattr(command, "startup", lambda rounds: {})
    monkeypatch.setattr(command, "machine", lambda gpu: {})
    seen = [[*measured][4:] for measured in command.measure(("gae", "ppo"), rounds=3, gpu=False)]
    assert seen == [["gae"], ["gae", "ppo"]]
    for gpu in (False, True):
        *_, whole = command.measure(command.PARTS, rounds=3, gpu=gpu)
        assert set(whole["ppo"]) == ({"124 M"} if gpu else {"0.87 M", "7.6 M"})
        assert {"ppo_trl", "update_bare", "ppo_flops"} <= set(next(iter(whole["ppo"].values())))
        assert ("sampling_replay" in whole["sampling"]["124 M" if gpu else "82 M"]) == gpu


def test_parts_not_measured_anew_are_kept_if_nothing_else_changed(tmp_path):
    earlier, now = fake_measurements(), fake_measurements()
    (tmp_path / "bench.json").write_text(json.dumps(earlier))
    now["machine"] |= {"load": 5.0, "command": "another"}
    assert set(command.kept_parts(tmp_path / "bench.json", now)) == set(command.PARTS)
    assert command.kept_parts(tmp_path / "none.json", now) == {}
    now["machine"]["torch"] = "3"
    assert command.kept_parts(tmp_path / "bench.json", now) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rounds 2", "--rounds must be at least 3; got 2"),
        ("--parts gea", "argument --parts: invalid choice: 'gea'"),
        pytest.param(
            "--gpu",
            "--gpu needs a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(options.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and len(error.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(command, "measure")
    (tmp_path / "file").touch()
    assert command.main(["--out", str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_it_is_run_from_the_repository():
    run = [sys.executable, "tests/bench", "--help"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("usage: python tests/bench "), done.stderr


def test_its_modules_do_not_import_each_other_in_a_circle():
    """And the command imports nothing that is measured: its process must stay small and still."""
    found = {}
    for path in Path(bench.__file__).parent.glob("[!_]*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = [f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names]
        names += [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        found[path.stem] = {name.split(".")[1] for name in names if name.startswith("bench.")}
    order = list(TopologicalSorter(found).static_order())  # raises CycleError
    assert set(order) == {
        "workload",
        "channel",
        "subjects",
        "worker",
        "tables",
        "command",
        "large_vocabulary",
        "adapter_memory",
    }
    assert found["command"] == {"tables", "workload"} and found["tables"] == {"workload"}


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_trl_takes_as_many_optimiser_steps():
    """TRL 1.12 has PPO, 1.16 no longer; GRPO is in both."""
    for subject in ("ppo_trl", "grpo_trl"):
        worker = command.Worker(subject, "0.87 M", vars(WORK) | {})
        answers = [worker.run() for _ in range(2)]
        worker.stop()
        if "missing" not in answers[0]:
            assert [answer["optimizer_steps"] for answer in answers] == [WORK.optimizer_steps] * 2
