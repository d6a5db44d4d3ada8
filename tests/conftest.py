"""Shared fixtures: language models of width 32 with random weights, a tokenizer of four words, policies, trainers.

Weights are drawn with a standard deviation of 0.3, ten times the usual, so that logits differ by whole units: with
nearly uniform predictions a wrong position or a wrong shift would change nothing that a test could see.
"""

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

WORDS = ["good", "bad", "film", "."]
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
PAD, BOS, EOS = 0, 1, 2
VOCABULARY = len(SPECIALS) + len(WORDS)
CONTEXT = 32
PROMPTS = ["film", "good film", "bad bad film"]  # 2 to 4 tokens, to be padded
ARCHITECTURES = ("gpt2", "llama", "qwen2", "gpt_neox")


def pytest_generate_tests(metafunc):
    """A test that names the argument `architecture` runs once for each of the four."""
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", ARCHITECTURES)


def tiny_config(architecture: str = "gpt2", *, dropout: float = 0.0, **changes):
    """A configuration of two layers of width 32."""
    from transformers import AutoConfig

    names = dict(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, vocab_size=VOCABULARY, initializer_range=0.3)
    if architecture == "gpt2":
        size = dict(n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT, activation_function="gelu_pytorch_tanh")
        size |= dict(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    else:
        size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        size |= dict(max_position_embeddings=CONTEXT, attention_dropout=dropout)
    if architecture == "qwen2":
        size |= dict(num_key_value_heads=1)
    if architecture == "gpt_neox":
        size |= dict(hidden_dropout=dropout)
    return AutoConfig.for_model(architecture, **(names | size | changes))


@pytest.fixture(scope="session")
def make_config():
    """make_config(architecture="gpt2", *, dropout=0.0, **changes): a tiny configuration."""
    return tiny_config


def tiny_lm(architecture: str = "gpt2", *, seed: int = 0, **changes):
    """A language model with random weights."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(architecture, **changes)).eval()


@pytest.fixture(scope="session")
def make_lm():
    """make_lm(architecture="gpt2", *, seed=0, dropout=0.0, **changes): a tiny language model."""
    return tiny_lm


def tiny_policy(architecture: str = "gpt2", *, critic: str = "shared", head: float = 0.0, **options):
    """A policy; `head` scales a random value head."""
    from rlhf_lessons.models import CausalLMWithValueHead

    policy = CausalLMWithValueHead(tiny_lm(architecture, **options), critic=critic)
    weight = torch.randn(policy.value_head.weight.shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        policy.value_head.weight.copy_(head * weight)
    return policy.eval()


@pytest.fixture(scope="session")
def make_policy():
    """make_policy(architecture="gpt2", *, critic="shared", head=0.0, seed=0, **changes): a tiny policy."""
    return tiny_policy


@pytest.fixture(scope="session")
def make_reward_model():
    """make_reward_model(architecture="gpt2", *, seed=5, **changes): a tiny reward model."""
    from transformers import AutoModelForSequenceClassification

    from rlhf_lessons.models import RewardModel

    def make(architecture: str = "gpt2", *, seed: int = 5, **changes):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = tiny_config(architecture, num_labels=1, **changes)
            return RewardModel(AutoModelForSequenceClassification.from_config(config).eval())

    return make


def word_tokenizer(**options):
    """A token for each of four words; texts open with <bos>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", padding_side="left")
    return PreTrainedTokenizerFast(**(dict(tokenizer_object=tokenizer) | names | options))


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(**options): the tokenizer of four words, its special tokens as given."""
    return word_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of four words."""
    return word_tokenizer()


@pytest.fixture(scope="session")
def queries(tokenizer):
    """Three prompts of different lengths as token ids and mask, (3, 4), padded on the left."""
    from rlhf_lessons.data import encode_prompt, pad

    return pad([encode_prompt(tokenizer, prompt) for prompt in PROMPTS], PAD, side="left")


def count_good(prompts: list[str], responses: list[str]) -> list[float]:
    """A score: how often a response says "good"."""
    return [float(response.split().count("good")) for response in responses]


SMALL = dict(
    num_iterations=4, batch_size=16, minibatch_size=8, ppo_epochs=2, max_new_tokens=6, learning_rate=1e-3, device="cpu"
)


def tiny_trainer(
    policy=None, reference=None, score_fn=count_good, prompts=PROMPTS, tokenizer=None, eval_prompts=(),
    sampler=None, **settings,
):  # fmt: skip
    """A trainer on the CPU. Policy and reference are different random models: the KL between them is not 0."""
    from rlhf_lessons.trainer import PPOConfig, PPOTrainer

    policy = tiny_policy(head=0.1) if policy is None else policy
    reference = tiny_lm(seed=1) if reference is None else reference
    tokenizer = word_tokenizer() if tokenizer is None else tokenizer
    arguments = PPOConfig(**(SMALL | settings)), policy, reference, score_fn, prompts, tokenizer
    return PPOTrainer(*arguments, eval_prompts=eval_prompts, sampler=sampler)


@pytest.fixture(scope="session")
def make_trainer():
    """make_trainer(policy, reference, score_fn, prompts, tokenizer, eval_prompts, **settings): none has to be given."""
    return tiny_trainer


def random_batch(lengths, *, prompt_length: int = 3, seed: int = 0):
    """A RolloutBatch of random numbers, rows of these lengths."""
    from rlhf_lessons.rollout import RolloutBatch

    generator = torch.Generator().manual_seed(seed)
    rows, steps = len(lengths), max(lengths)
    mask = torch.arange(steps) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, VOCABULARY, (rows, prompt_length + steps), generator=generator)
    tokens[:, prompt_length:][~mask] = PAD
    attention = torch.cat([torch.ones(rows, prompt_length, dtype=torch.bool), mask], dim=1)

    def noise(scale: float = 1.0, shift: float = 0.0):
        return torch.where(mask, shift + scale * torch.randn(rows, steps, generator=generator), 0)

    return RolloutBatch(
        tokens=tokens,
        attention_mask=attention,
        response_mask=mask,
        log_probs=noise(0.3, -2.0),
        ref_log_probs=noise(0.3, -2.0),
        values=noise(),
        rewards=noise(),
        advantages=noise(),
        returns=noise(),
        scores=torch.randn(rows, generator=generator),
        sampler_log_probs=noise(0.3, -2.0),
        group=torch.arange(rows),
        records=tuple({"prompt": str(row)} for row in range(rows)),
        ended=torch.ones(rows, dtype=torch.bool),
        prompt_length=prompt_length,
    )


@pytest.fixture(scope="session")
def make_batch():
    """make_batch(lengths, *, prompt_length=3, seed=0): a RolloutBatch of random numbers, rows of these lengths."""
    return random_batch


BLANK = b"\x89PNG"  # how a picture's file begins, and all that is needed of one that nobody looks at


@pytest.fixture(scope="module")
def small_world():
    """Whole runs with little of the tiny world, and pictures that are put together but not drawn."""
    from matplotlib.figure import Figure

    from rlhf_lessons.app import inputs, pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "NUM_PROMPTS", 100)
        patch.setattr(pipeline, "NUM_TEXTS", 64)
        patch.setattr(pipeline, "NUM_HELD_OUT", 8)
        patch.setattr(Figure, "savefig", lambda figure, path, **options: path.write_bytes(BLANK))
        yield
