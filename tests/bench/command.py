"""The command: processes started, rounds taken in turn, what they measured written down."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import accelerate
import torch

from bench.tables import markdown
from bench.workload import GPU_WORK, Work
from rlhf_lessons.app.run_folder import versions

COMMAND = "python tests/bench"
PARTS = ("startup", "gae", "sampling", "ppo", "grpo")


def python(*arguments: str, **options) -> subprocess.Popen:
    """A new interpreter, which finds modules where this one does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **options)


class Worker:
    """A subject in its process; `run` is one round."""

    def __init__(self, subject: str, shape: str | None, work: dict) -> None:
        request = json.dumps({"subject": subject, "shape": shape, "work": work})
        self.name = subject
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = python("-m", "bench.worker", request, text=True, **pipes)

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
            if python(*command, stdout=subprocess.DEVNULL).wait():
                raise ValueError(f"the measurement {name} failed")
            results[name].append({"seconds": time.perf_counter() - started})
    return results


def measure(parts: tuple[str, ...], *, rounds: int, gpu: bool) -> Iterator[dict]:
    """What was measured so far, again after each part: what is cut off leaves the parts before."""
    work = asdict(GPU_WORK if gpu else Work())
    shapes = ("124 M",) if gpu else ("0.87 M", "7.6 M")
    measured: dict = {"machine": machine(gpu), "work": work, "rounds": rounds}
    measured["matmul"] = interleave(("matmul",), None, work, 2)

    def ppo(shape: str) -> dict[str, list[dict]]:
        counted = interleave(("ppo_flops", "ppo_flops_separate"), shape, work, 0)
        return interleave(("ppo_ours", "ppo_ours_separate", "ppo_trl", "update_bare"), shape, work, rounds) | counted

    sampling = ("sampling_ours", "sampling_static", "sampling_generate", "sampling_generate_fast")
    sampling += ("sampling_replay",) * gpu
    ways = {
        "startup": lambda: startup(rounds),
        "gae": lambda: interleave(("gae_ours", "gae_loop", "gae_torchrl"), None, asdict(Work()), rounds),
        "sampling": lambda: {
            shape: interleave(sampling, shape, work, rounds) for shape in (shapes if gpu else (*shapes, "82 M"))
        },
        "ppo": lambda: {shape: ppo(shape) for shape in shapes},
        "grpo": lambda: {shape: interleave(("grpo_ours", "grpo_trl"), shape, work, rounds) for shape in shapes},
    }
    for part in PARTS:
        if part in parts:
            say(part)
            measured[part] = ways[part]()
            yield measured


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
    found = {
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


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, each in its range; ends with code 2 and a line on what is wrong otherwise."""
    parser = Parser(prog=COMMAND, description="Speed and memory, beside peers where installed.")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for bench.json and bench.md (default: figures)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
        help=f"measured anew, out of {', '.join(PARTS)} (default: all); the others are kept",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="after a warm-up, at least 3 (default: 5)")
    parser.add_argument("--gpu", action="store_true", help="the GPU's measurements, into figures/gpu")
    options = parser.parse_args(argv)
    if options.rounds < 3:
        parser.error(f"--rounds must be at least 3; got {options.rounds}")
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device; this machine has none")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, write bench.json and bench.md, print the table. Returns 0, or 2 after saying what failed."""
    options = parse(argv)
    out = options.out or Path("figures", "gpu" if options.gpu else "")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for found in measure(options.parts, rounds=options.rounds, gpu=options.gpu):
            found["machine"]["command"] = " ".join([COMMAND, *(sys.argv[1:] if argv is None else argv)])
            found = kept_parts(out / "bench.json", found) | found
            (out / "bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (out / "bench.md").write_text(table := markdown(found), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table)
    say(f"written to {out / 'bench.json'} and {out / 'bench.md'}")
    return 0
