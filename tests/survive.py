"""Kill a run without warning at random moments, continue it, and compare all that it leaves with a run left in peace.

    python tests/survive.py [--kills 20] [--seed 0]

The run trains a language model on a small corpus, a reward model on preferences, a policy by PPO, and writes its
report. Each kill takes the next of these stages in turn and a moment of it drawn evenly; a third of the continued runs
is killed once more. Between kill and continuation nothing in the folder may be half-written.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

from rlhf_lessons import tiny_reviews

SIZES = """--layers 2 --width 64 --heads 2 --context 48 --lm-epochs 3 --lm-batch-size 16 --reward-epochs 2
--batch-size 32 --minibatch-size 16 --num-iterations 24 --max-new-tokens 12 --checkpoint-every 3
--device cpu --threads 1""".split()
BEGIN = ("config.json", "base_model", "reward_model", "policy", "summary.json")  # what is there when a stage begins
STAGES = ("pretraining", "reward training", "PPO", "report")


def write_inputs(folder: Path, lines: int = 1200) -> None:
    """A corpus, and pairs in which the line with more gold is the better one."""
    texts = tiny_reviews.sample_corpus(lines, torch.Generator().manual_seed(0))
    (folder / "corpus.txt").write_text("\n".join(texts))
    half = len(texts) // 2
    gold = tiny_reviews.gold_reward([""] * len(texts), texts).tolist()
    pairs = [sorted((i, i + half), key=gold.__getitem__, reverse=True) for i in range(half)]
    written = [json.dumps({"prompt": "", "chosen": texts[a], "rejected": texts[b]}) for a, b in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(written[100:]))
    (folder / "held_out.jsonl").write_text("\n".join(written[:100]))


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "rlhf_lessons", "run", *map(str, arguments)]


def begin(folder: Path, out: Path, *more: object) -> list[str]:
    files = ("--corpus", folder / "corpus.txt", "--preferences", folder / "pairs.jsonl",
             "--eval-preferences", folder / "held_out.jsonl")  # fmt: skip
    return command(*files, *SIZES, "--out", out, *more)


def wait_for(path: Path, process: subprocess.Popen) -> bool:
    """Whether the path is there before the process has ended."""
    while not path.exists():
        if process.poll() is not None:
            return path.exists()
        time.sleep(0.001)
    return True


def kill_within(words: list[str], out: Path, stage: int, seconds: float) -> bool:
    """Start, wait until a stage of the run in `out` has gone on for so long, kill; whether it was still at work."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(out / BEGIN[stage], process)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pass
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def left_half_written(out: Path) -> list[str]:
    """Files under their own names that cannot be read whole."""
    broken = []
    for path in out.rglob("*"):
        if ".partial" in str(path) or not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                [json.loads(line) for line in path.read_text().splitlines()]
            elif path.suffix == ".safetensors":
                with safe_open(str(path), "pt") as file:
                    [file.get_tensor(name) for name in file.keys()]
            elif path.suffix == ".png":
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
            elif path.suffix in (".md", ".html"):
                assert path.read_text().endswith("\n")
        except Exception as error:  # whatever it is, the file is not whole
            broken.append(f"{path.relative_to(out)}: {error}")
    return broken


def without_seconds(line: str) -> dict:
    return {name: value for name, value in json.loads(line).items() if not name.startswith("seconds")}


def contents(out: Path) -> dict[str, object]:
    """All that a finished run left, but its command and its seconds."""
    found: dict[str, object] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name, data = str(path.relative_to(out)), path.read_bytes()
        if name == "config.json":
            data = {key: value for key, value in json.loads(data).items() if key != "made_by"}
        elif name.endswith(".jsonl"):
            data = [without_seconds(line) for line in data.decode().splitlines()]
        found[name] = data
    return found


def stage_seconds(out: Path) -> list[float]:
    """How long each stage of a finished run took, by the times of what it wrote."""
    times = [(out / name).stat().st_mtime for name in BEGIN]
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def survive(folder: Path, kills: int, seed: int, *more: object) -> int:
    """Kill and continue, `kills` times. Returns how many runs did not end as the one left in peace."""
    draw, failures = random.Random(seed), 0
    write_inputs(folder)
    subprocess.run(begin(folder, folder / "peace", *more), check=True, capture_output=True)
    expected, seconds = contents(folder / "peace"), stage_seconds(folder / "peace")
    print(f"seed {seed}; in peace: " + ", ".join(f"{n} {s:.1f} s" for n, s in zip(STAGES, seconds, strict=True)))
    for number in range(kills):
        out, stage, words = folder / f"killed{number}", number % len(STAGES), begin(folder, folder / f"killed{number}")
        moments = [draw.random() * seconds[stage]]
        if draw.random() < 1 / 3:
            moments.append(draw.random() * sum(seconds))
        words, said, broken = [*words, *map(str, more)], [], []
        for moment in moments:
            # The second time the folder is there from the start, and a run that continues takes a while to begin.
            hit = kill_within(words, out, stage, moment if not said else moment + 4)
            said.append(f"{moment:.2f} s" + ("" if hit else " (it had ended)"))
            broken += left_half_written(out)
            words = command("--resume", out)
        done = subprocess.run(words, capture_output=True, text=True)
        finished = done.returncode == 0 or "has finished" in done.stderr
        found = contents(out) if finished else {}
        wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        failures += bool(broken or wrong or not finished)
        verdict = "equal" if finished and not wrong else f"differs in {wrong[:4]}: {done.stderr[-200:]}"
        print(
            f"{number + 1:2} {STAGES[stage]:16} killed after {' and '.join(said)}: {verdict} {broken or ''}", flush=True
        )
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sys.exit(survive(Path(place), chosen.kills, chosen.seed) > 0)
