"""What is measured: model shapes, the work of one iteration, and models, prompts and tokenizers made for them."""

from dataclasses import dataclass

import torch

from rlhf_lessons.models import random_gpt2


@dataclass(frozen=True)
class Shape:
    """A GPT-2 with random weights."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int


SHAPES = {
    "0.87 M": Shape(4, 128, 4, 512, 128),
    "7.6 M": Shape(6, 320, 5, 512, 128),
    "82 M": Shape(6, 768, 12, 50257, 1024),
    "124 M": Shape(12, 768, 12, 50257, 1024),
}
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class Work:
    """One PPO iteration; every response runs to its full length, so that all do the same work."""

    rows: int = 64
    prompt_tokens: int = 8
    new_tokens: int = 24
    epochs: int = 4
    minibatches: int = 4
    device: str = "cpu"
    precision: str = "no"

    @property
    def tokens(self) -> int:
        """Sampled tokens in an iteration."""
        return self.rows * self.new_tokens

    @property
    def optimizer_steps(self) -> int:
        return self.epochs * self.minibatches


GPU_WORK = Work(rows=512, prompt_tokens=16, new_tokens=48, device="cuda", precision="bf16")


def settings(shape: Shape, *, as_saved: bool) -> dict:
    """The configuration of a GPT-2 of this shape.

    as_saved: with the activation as GPT-2's checkpoints name it and peers load it, in seven operations; this package
    loads them with PyTorch's single one.
    """
    activation = "gelu_new" if as_saved else "gelu_pytorch_tanh"
    return dict(
        vocab_size=shape.vocabulary, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers,
        n_head=shape.heads, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, activation_function=activation,
    )  # fmt: skip


def language_model(shape: Shape, *, as_saved: bool = False):
    """The same weights at every call."""
    return random_gpt2(seed=0, **settings(shape, as_saved=as_saved))


def classifier(shape: Shape, *, as_saved: bool = False):
    """A trunk with one output: a reward model, or a critic of its own."""
    return random_gpt2(seed=1, classifier=True, **settings(shape, as_saved=as_saved))


def tokenizer(shape: Shape):
    """One word for each id above the special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
    words |= {f"w{i}": i for i in range(len(words), shape.vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def prompts(shape: Shape, work: Work, count: int) -> list[str]:
    """Texts of exactly `prompt_tokens` tokens."""
    draws = torch.randint(3, shape.vocabulary, (count, work.prompt_tokens), generator=torch.Generator().manual_seed(0))
    return [" ".join(f"w{i}" for i in row) for row in draws.tolist()]
