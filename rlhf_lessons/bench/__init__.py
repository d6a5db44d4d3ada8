"""Speed and memory, against peers where they are installed: `python -m rlhf_lessons bench`.

Each subject runs in a process of its own, started once; rounds are interleaved (one of each subject, then the next
round), the first is a warm-up, and what is reported are medians and their ratios. Writes bench.json, with every round,
and bench.md. Install the peers with `pip install --no-deps trl==1.12.0` (and `datasets`) and `pip install torchrl`.
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rlhf_lessons.bench.tables import markdown

PARTS = ("startup", "gae", "sampling", "ppo")


class Worker:
    """A subject in its process; `run` is one round."""

    def __init__(self, subject: str, shape: str | None, work: dict) -> None:
        request = json.dumps({"subject": subject, "shape": shape, "work": work})
        command = [sys.executable, "-m", "rlhf_lessons.bench.worker", request]
        self.name = subject
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self) -> dict:
        """One round's measurements, or {"missing": why}. Raises ValueError when the subject fails."""
        try:
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended before it was asked; its answer says why
        answer = self.process.stdout.readline()
        if not answer:
            raise ValueError(f"the measurement {self.name} failed:\n{self.process.stderr.read()[-2000:]}")
        return json.loads(answer)

    def stop(self) -> None:
        """Close its input, which ends it."""
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        self.process.wait()


def interleave(subjects: tuple[str, ...], shape: str | None, work: dict, rounds: int) -> dict[str, list[dict]]:
    """Each subject's rounds, the warm-up first; a subject whose requirements are missing has the reason alone."""
    workers = {name: Worker(name, shape, work) for name in subjects}
    results: dict[str, list[dict]] = {name: [] for name in subjects}
    try:
        for number in range(rounds + 1):
            for name, worker in workers.items():
                if not results[name] or "missing" not in results[name][0]:
                    results[name].append(worker.run())
            say(f"  {shape or ''} round {number} of {rounds}")
    finally:
        for worker in workers.values():
            worker.stop()
    return results


def startup(rounds: int) -> dict[str, list[dict]]:
    """Seconds from nothing: `import torch`, `import rlhf_lessons`, `--help`."""
    commands = {
        "import torch": ["-c", "import torch"],
        "import rlhf_lessons": ["-c", "import rlhf_lessons"],
        "--help": ["-m", "rlhf_lessons", "--help"],
    }
    results: dict[str, list[dict]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            results[name].append({"seconds": time.perf_counter() - started})
    return results


def measure(parts: tuple[str, ...], *, rounds: int, gpu: bool) -> dict:
    """All measurements asked for, as they are written to the JSON file."""
    from rlhf_lessons.bench.workload import GPU_WORK, Work

    work = asdict(GPU_WORK if gpu else Work())
    measured: dict = {"machine": machine(gpu), "work": work, "rounds": rounds}
    measured["matmul"] = interleave(("matmul",), None, work, 2)
    if "startup" in parts:
        measured["startup"] = startup(rounds)
    if "gae" in parts:
        say("gae")
        measured["gae"] = interleave(("gae_ours", "gae_loop", "gae_torchrl"), None, asdict(Work()), rounds)
    if "sampling" in parts:
        say("sampling")
        subjects = ("sampling_ours", "sampling_generate", "sampling_generate_fast") + ("sampling_replay",) * gpu
        shapes = ("124 M",) if gpu else ("0.87 M", "7.6 M", "82 M")
        measured["sampling"] = {shape: interleave(subjects, shape, work, rounds) for shape in shapes}
    if "ppo" in parts:
        say("ppo")
        subjects = ("ppo_ours", "ppo_ours_separate", "ppo_trl")
        shapes = ("124 M",) if gpu else ("0.87 M", "7.6 M")
        counts = ("ppo_flops", "ppo_flops_separate")
        measured["ppo"] = {
            shape: interleave(subjects, shape, work, rounds) | interleave(counts, shape, work, 0) for shape in shapes
        }
    return measured


def kept_parts(path: Path, measured: dict) -> dict:
    """The parts of an earlier file that were measured on the same machine, with the same versions and rounds."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}

    def conditions(found: dict) -> dict:
        changing = ("command", "load")
        return found["work"] | {name: value for name, value in found["machine"].items() if name not in changing}

    same = conditions(earlier) == conditions(measured) and earlier["rounds"] == measured["rounds"]
    return {part: earlier[part] for part in PARTS if part in earlier} if same else {}


def machine(gpu: bool) -> dict:
    """What the numbers depend on."""
    import accelerate
    import torch

    from rlhf_lessons.report import versions

    found = {
        "command": " ".join(["python", "-m", "rlhf_lessons", *sys.argv[1:]]),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        **versions(),
        "accelerate": accelerate.__version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    return found | ({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if gpu else {})


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def say(text: str) -> None:
    """A line on what is being measured."""
    print(text, file=sys.stderr, flush=True)


def main(arguments) -> None:
    """Measure, write bench.json and bench.md into `arguments.out`, print the table. Parts not asked for are kept.

    arguments: out (folder or None), rounds (at least 3), parts (names out of PARTS, or None for all), gpu. Raises
    ValueError for fewer rounds, another part, or a GPU that is not there.
    """
    if arguments.rounds < 3:
        raise ValueError(f"--rounds must be at least 3; got {arguments.rounds}")
    parts = tuple(arguments.parts or PARTS)
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"--parts must be out of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    if arguments.gpu:
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--gpu needs a CUDA device; this machine has none")
    out = Path(arguments.out or (Path("figures") / "gpu" if arguments.gpu else "figures"))
    measured = measure(parts, rounds=arguments.rounds, gpu=arguments.gpu)
    measured = kept_parts(out / "bench.json", measured) | measured
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (out / "bench.md").write_text(table := markdown(measured), encoding="utf-8")
    print(table)
    say(f"written to {out / 'bench.json'} and {out / 'bench.md'}")
