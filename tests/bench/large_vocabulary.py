"""One PPO update at 152,000 words, with all logits held and without: `python tests/bench/large_vocabulary.py`.

A Llama of the shape of SmolLM2-135M with random weights, 2 responses of 512 tokens after 16 of prompt; each way in a
process of its own, rounds in turn. Prints seconds, and the peak resident memory beyond weights, gradients and optimiser
state, with the trunk's activations kept or (gradient checkpointing) computed again. Linux alone tells this. With
--give_back memory goes back to the system as soon as it is freed, so that what is resident is what is in use; slower.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lessons import forward
from rlhf_lessons.config import PPOConfig
from rlhf_lessons.models import CausalLMWithValueHead
from rlhf_lessons.rollout import RolloutBatch
from rlhf_lessons.trainer import PPOTrainer

PROMPT, RESPONSE, ROWS = 16, 512, 2
SHAPE = dict(
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536
)


class Words:
    """What a trainer asks of a tokenizer, for ids that are never read."""

    eos_token_id, pad_token_id, bos_token_id, padding_side, chat_template = 1, 0, 2, "left", None

    def __init__(self, size: int) -> None:
        self.vocabulary = {f"w{i}": i for i in range(size)}

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def __call__(self, text: str, **options):
        return type("Encoding", (), {"input_ids": [5] * PROMPT})


def make_trainer(vocabulary: int, layers: int, checkpointing: bool, ent_coef: float) -> PPOTrainer:
    """Everything but the update's batch; the reference is a small model, since an update never reads it."""
    sizes = SHAPE | dict(num_hidden_layers=layers)
    small = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    names = dict(vocab_size=vocabulary, max_position_embeddings=1024, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    policy, reference = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **names, **shape, tie_word_embeddings=True))
        for shape in (sizes, small)
    )
    if checkpointing:
        policy.gradient_checkpointing_enable()
    config = PPOConfig(
        batch_size=8, minibatch_size=ROWS, ppo_epochs=1, max_new_tokens=RESPONSE, ent_coef=ent_coef, device="cpu"
    )
    return PPOTrainer(
        config, CausalLMWithValueHead(policy), reference, lambda prompts, responses: [0.0] * len(prompts), ["w5"],
        Words(vocabulary),
    )  # fmt: skip


def make_batch(vocabulary: int) -> RolloutBatch:
    """Random tokens, all real, with the log-probabilities of a guess."""
    tokens = torch.randint(3, vocabulary, (ROWS, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(1))
    noise = torch.randn(ROWS, RESPONSE, generator=torch.Generator().manual_seed(2))
    same = {name: noise for name in ("values", "rewards", "advantages", "returns")}
    likely = torch.full_like(noise, -torch.tensor(float(vocabulary)).log())
    return RolloutBatch(
        tokens=tokens, attention_mask=torch.ones_like(tokens) > 0, response_mask=torch.ones_like(noise) > 0,
        log_probs=likely, ref_log_probs=likely, sampler_log_probs=likely, scores=noise[:, 0], ended=noise[:, 0] > 9,
        group=torch.arange(ROWS), records=({},) * ROWS, prompt_length=PROMPT, **same,
    )  # fmt: skip


def resident(line: str) -> float:
    """MB (10⁶ bytes) that the kernel's line of this process says: VmRSS now, VmHWM at most since it was set back."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) * 1024 / 1e6


def serve(asked: argparse.Namespace) -> None:
    """In the measured process: one update for each line that comes in."""
    torch.set_num_threads(asked.threads)
    forward.LARGE = float("inf") if asked.way == "plain" else forward.LARGE
    trainer = make_trainer(asked.vocabulary, asked.layers, asked.checkpointing, asked.ent_coef)
    batch = make_batch(asked.vocabulary)
    gradients = sum(p.numel() * p.element_size() for p in trainer.model.parameters()) / 1e6
    trainer.update(batch)  # the optimiser's state is made
    for _ in sys.stdin:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before, started = resident("VmRSS"), time.perf_counter()
        updates = trainer.update(batch)
        seconds = time.perf_counter() - started
        beyond = resident("VmHWM") - before - gradients
        report = {name: float(value) for name, value in updates.reports[0].items()}
        print(json.dumps({"seconds": seconds, "beyond_mb": beyond, "report": report}), flush=True)


def compare(asked: argparse.Namespace) -> None:
    """Rounds of both ways in turn, and what came of them."""
    workers = {}
    for way in ("plain", "head"):
        options = [f"--{name}={getattr(asked, name)}" for name in ("threads", "vocabulary", "layers", "ent_coef")]
        options += [f"--way={way}", *(["--checkpointing"] if asked.checkpointing else [])]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        keeps_nothing = {"MALLOC_MMAP_THRESHOLD_": "65536"} if asked.give_back else {}
        workers[way] = subprocess.Popen([sys.executable, __file__, *options], env=os.environ | keeps_nothing, **pipes)
    found = {way: [] for way in workers}
    for _ in range(asked.rounds):
        for way, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            found[way].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    rounds = list(zip(*found.values(), strict=True))
    for name in ("seconds", "beyond_mb"):
        ratios = [head[name] / plain[name] for plain, head in rounds]
        middle = {way: statistics.median(x[name] for x in found[way]) for way in found}
        print(
            f"{name}: plain {middle['plain']:.1f}, without logits {middle['head']:.1f}, ratio "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)"
        )
    plain, head = (found[way][0]["report"] for way in found)
    print("first update's report, plain and without logits:")
    for name, value in plain.items():
        print(f"  {name} {value:.7g} {head[name]:.7g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=("plain", "head"), help="serve as the measured process")
    parser.add_argument("--checkpointing", action="store_true", help="compute the trunk's activations again")
    parser.add_argument("--give_back", action="store_true", help="return freed memory at once")
    for name, default in (("threads", 1), ("vocabulary", 152_000), ("layers", 30), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ent_coef", type=float, default=0.0)
    asked = parser.parse_args()
    (serve if asked.way else compare)(asked)


if __name__ == "__main__":
    main()
