"""Peak memory of one PPO iteration with a LoRA adapter, as a share of full fine-tuning's, at SmolLM2-135M's shape.

python tests/bench/adapter_memory.py [full|lora] [--checkpointing]: without a word both, each in a process of its own.
Full fine-tuning holds a copy of the base model as its reference; the adapter's reference is the policy without it.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

ROWS, PROMPT, RESPONSE = 4, 64, 64
SHAPE = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip


def measure(way: str, checkpointing: bool) -> dict[str, float]:
    """One iteration; what this process held at most, and before the model was made, in MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from conftest import word_tokenizer

    from rlhf_lessons.generation import sample_responses
    from rlhf_lessons.models import CausalLMWithValueHead, prepare_policy
    from rlhf_lessons.trainer import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch.manual_seed(0)
    lm, config = LlamaForCausalLM(LlamaConfig(**SHAPE)), LlamaConfig(**SHAPE)
    reference = None if way == "lora" else LlamaForCausalLM(config)
    policy = CausalLMWithValueHead(lm)
    prepare_policy(policy, lora_rank=16 if way == "lora" else 0, gradient_checkpointing=checkpointing)
    settings = PPOConfig(
        num_iterations=1, batch_size=ROWS, minibatch_size=ROWS, ppo_epochs=1, max_new_tokens=RESPONSE,
        whiten_advantages=False, device="cpu",
    )  # fmt: skip
    prompts = [[4 + i % 4 for i in range(PROMPT)]]

    def sample(lm: torch.nn.Module, *tokens: torch.Tensor, **options: object) -> object:
        return sample_responses(lm, *tokens, **options | {"eos_id": -1})  # all of full length

    trainer = PPOTrainer(
        settings, policy, reference, lambda _, said: [float(len(text)) for text in said], prompts, word_tokenizer(),
        sampler=sample,
    )  # fmt: skip
    metrics = trainer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak": peak, "beyond": peak - before, "ratio_error": metrics["first_ratio_error"],
            "response_length": metrics["response_length"]}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measure one way, or both and their ratio."""
    checkpointing = "--checkpointing" in arguments
    ways = [way for way in arguments if way in ("full", "lora")]
    if ways:
        print(json.dumps(measure(ways[0], checkpointing)))
        return
    found = {}
    for way in ("full", "lora"):
        command = [sys.executable, __file__, way, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
        print(way, found[way])
    for name in ("peak", "beyond"):
        print(f"{name}: {found['lora'][name] / found['full'][name]:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
