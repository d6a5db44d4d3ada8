"""What an adapter saves: `python tests/bench/adapter.py`.

One whole iteration of PPO, rollout and update, on a Llama of the shape of SmolLM2-135M with random weights: all weights
trained beside a reference of their own, or a LoRA adapter of rank 16 that is its own reference when switched off. Each
way in a process of its own, rounds in turn; prints the peak resident memory and the seconds of the second iteration.
Linux alone tells the first.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from large_vocabulary import SHAPE, Words, resident
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lessons.config import PPOConfig
from rlhf_lessons.models import CausalLMWithValueHead, prepare_policy
from rlhf_lessons.trainer import PPOTrainer

WORDS, RESPONSE, ROWS = 49_152, 112, 4  # and 16 tokens of prompt


def measure(way: str, checkpointing: bool, threads: int) -> None:
    """In the measured process: two iterations, and what they took."""
    torch.set_num_threads(threads)
    names = dict(vocab_size=WORDS, max_position_embeddings=1024, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **names, **SHAPE, tie_word_embeddings=True))
    reference = copy.deepcopy(lm) if way == "full" else None
    policy = CausalLMWithValueHead(lm)
    prepare_policy(policy, lora_rank=16 if way == "adapter" else 0, gradient_checkpointing=checkpointing)
    config = PPOConfig(
        batch_size=8, minibatch_size=ROWS, ppo_epochs=1, max_new_tokens=RESPONSE, device="cpu", learning_rate=1e-5
    )
    trainer = PPOTrainer(config, policy, reference, lambda p, r: [0.0] * len(p), ["w5"], Words(WORDS))
    metrics = [trainer.step() for _ in range(2)][-1]
    seconds = metrics["seconds_rollout"] + metrics["seconds_update"]
    print(json.dumps({"peak_mb": resident("VmHWM"), "seconds": seconds, "ratio_error": metrics["first_ratio_error"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=("full", "adapter"), help="be the measured process")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    if asked.way:
        return measure(asked.way, asked.checkpointing, asked.threads)
    found = {"full": [], "adapter": []}
    for _ in range(asked.rounds):
        for way, results in found.items():
            options = [f"--way={way}", f"--threads={asked.threads}", *["--checkpointing"] * asked.checkpointing]
            done = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
            results.append(json.loads(done.stdout))
    for name in ("peak_mb", "seconds"):
        middle = {way: statistics.median(result[name] for result in results) for way, results in found.items()}
        ratio = middle["adapter"] / middle["full"]
        print(f"{name}: full {middle['full']:.1f}, adapter {middle['adapter']:.1f}, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
