"""The settings of every trainer and fit, in the field's usual names: a sentence a field, checked when made.

A setting out of range, or one that cannot stand beside another, raises ValueError: "x must be …; got …". Scalars of
NumPy's and PyTorch's are taken for the numbers that they hold.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple


class Allowed(NamedTuple):
    """What a setting may be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> Any:
        """The value, in Python's own type. Raises ValueError, naming the setting, unless it is allowed."""
        value = value.item() if getattr(value, "shape", None) == () else value
        require(name, value, self.holds(value), self.words)
        return value


def is_number(x: Any) -> bool:
    """A real number that is no truth value. NaN passes here, and no comparison."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def is_whole(x: Any) -> bool:
    """An integer that is no truth value."""
    return isinstance(x, int) and not isinstance(x, bool)


POSITIVE = Allowed("a number > 0", lambda x: is_number(x) and 0 < x < math.inf)
LIMIT = Allowed("a number > 0", lambda x: is_number(x) and x > 0)  # infinity: no limit
NOT_NEGATIVE = Allowed("a number >= 0", lambda x: is_number(x) and 0 <= x < math.inf)
SHARE = Allowed("a number between 0 and 1", lambda x: is_number(x) and 0 <= x <= 1)
OPTIONAL = Allowed("a number > 0, or None", lambda x: x is None or POSITIVE.holds(x))
SWITCH = Allowed("True or False", lambda x: isinstance(x, bool))
SEED = Allowed("a whole number >= 0 and below 2**63", lambda x: is_whole(x) and 0 <= x < 2**63)


def one_of(*choices: str) -> Allowed:
    """One of these words."""
    return Allowed(f"one of {', '.join(choices)}", lambda x: isinstance(x, str) and x in choices)


def at_least(smallest: int) -> Allowed:
    """A whole number that is not smaller."""
    return Allowed(f"a whole number >= {smallest}", lambda x: is_whole(x) and x >= smallest)


COUNT = at_least(1)


def setting(default: Any, allowed: Allowed, help: str) -> Any:
    """A field with what it may be and the sentence that explains it, here and in `--help`."""
    return field(default=default, metadata={"allowed": allowed, "help": help})


def require(name: str, value: Any, holds: bool, expected: str) -> None:
    """Raise ValueError, naming the setting, unless it holds."""
    if not holds:
        raise ValueError(f"{name} must be {expected}; got {value!r}")


def check_settings(config: Any) -> None:
    """Raise ValueError for the first field of a settings dataclass that is not what it may be."""
    for item in fields(config):
        value = item.metadata["allowed"].check(item.name, getattr(config, item.name))
        object.__setattr__(config, item.name, value)  # the configuration is frozen for all others


@dataclass(frozen=True)
class SamplingConfig:
    """What all methods share: how a batch of responses is sampled and scored."""

    batch_size: int = setting(128, COUNT, "responses in an iteration, over all processes; of best-of-n: those kept")
    max_new_tokens: int = setting(24, COUNT, "longest response, in tokens, EOS included")
    temperature: float = setting(1.0, POSITIVE, "of sampling and, the same, of scoring")
    missing_eos_penalty: float = setting(1.0, NOT_NEGATIVE, "subtracted from the score of a response that did not end")
    missing_eos_mode: str = setting("subtract", one_of("subtract", "replace"), "subtract the penalty from the score, "
                                    "or replace the score by its negative")  # fmt: skip
    precision: str = setting("no", one_of("no", "bf16"),
                             "no (float32) or bf16 (autocast; log-probabilities and losses stay float32)")  # fmt: skip
    device: str = setting("auto", one_of("auto", "cpu", "cuda", "mps"), "auto, cpu, cuda or mps")
    seed: int = setting(0, SEED, "of prompts, sampling and shuffling")

    def __post_init__(self) -> None:
        check_settings(self)

    def check_whole(self, whole: str, part: str) -> None:
        """Raise ValueError unless one setting is a multiple of another."""
        size = getattr(self, part)
        require(whole, getattr(self, whole), getattr(self, whole) % size == 0, f"a multiple of {part} = {size}")

    @property
    def scored_rows(self) -> int:
        """Responses in one pass without a gradient, which bounds the memory of logits."""
        return min(self.batch_size, 64)


@dataclass(frozen=True)
class TrainerConfig(SamplingConfig):
    """What all on-policy methods share."""

    num_iterations: int = setting(50, COUNT, "iterations: a batch of responses and the updates from it")
    samples_per_prompt: int = setting(1, COUNT, "responses to each prompt that is drawn")
    minibatch_size: int = setting(32, COUNT, "responses in one optimiser step, over all processes")
    gradient_accumulation_steps: int = setting(1, COUNT, "pieces in which a minibatch is computed, to save memory")
    ppo_epochs: int = setting(4, COUNT, "passes over each batch")
    eval_every: int = setting(10, COUNT, "iterations from one evaluation to the next, where there are prompts for it")
    learning_rate: float = setting(1e-3, POSITIVE, "of AdamW at the start")
    lr_schedule: str = setting("linear", one_of("linear", "constant", "cosine"),
                               "linear or cosine (to 0 over the run), or constant")  # fmt: skip
    warmup_iterations: int = setting(0, at_least(0), "iterations before it, in which the rate climbs to its height")
    max_grad_norm: float = setting(1.0, LIMIT, "gradients are scaled down to this norm")
    clip_eps: float = setting(0.2, LIMIT, "ε of the policy's clip range")
    clip_eps_high: float | None = setting(None, OPTIONAL, "ε of its upper end, where that is another (clip-higher)")
    ent_coef: float = setting(0.0, NOT_NEGATIVE, "weight of the entropy bonus")
    kl_coef: float = setting(0.1, NOT_NEGATIVE,
                             "β: price of one nat of KL from the reference; the first one if adaptive")  # fmt: skip
    adaptive_kl_target: float | None = setting(None, OPTIONAL, "KL per response, in nats, that β is steered to")
    adaptive_kl_horizon: int = setting(10000, COUNT, "responses over which that steering works")
    target_kl: float | None = setting(None, OPTIONAL, "leave an iteration's epochs early when the update's own KL per "
                                      "token is 1.5 times this")  # fmt: skip
    sampler_correction: str = setting("truncate", one_of("none", "truncate", "mask"), "a sampler's own probabilities "
                                      "are made good for by weights: none, cut off at the cap, or 0 beyond "
                                      "it")  # fmt: skip
    sampler_correction_level: str = setting("token", one_of("token", "sequence"), "a weight for each token, or one for "
                                            "each response: their product")  # fmt: skip
    sampler_cap: float = setting(2.0, Allowed("a number >= 1", lambda x: is_number(x) and x >= 1), "on those weights")
    loss_over: ClassVar[str] = "tokens"
    ratio_level: ClassVar[str] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("kl_coef", self.kl_coef, self.adaptive_kl_target is None or self.kl_coef > 0,
                "a number > 0 when it is adaptive")  # fmt: skip
        require("warmup_iterations", self.warmup_iterations, self.warmup_iterations < self.num_iterations,
                f"less than num_iterations = {self.num_iterations}")  # fmt: skip
        self.check_whole("batch_size", "samples_per_prompt")
        self.check_whole("batch_size", "minibatch_size")
        self.check_whole("minibatch_size", "gradient_accumulation_steps")
        steps = self.ppo_epochs * self.batch_size // self.minibatch_size
        require("target_kl", self.target_kl, self.target_kl is None or steps > 1,
                "None where an iteration is one step, before which nothing has moved")  # fmt: skip
        # β's largest step down is a fifth times batch_size / horizon: at 1 it would reach 0, beyond that turn negative.
        horizon, size = self.adaptive_kl_horizon, self.batch_size
        require("adaptive_kl_horizon", horizon, self.adaptive_kl_target is None or 5 * horizon > size,
                f"more than a fifth of batch_size = {size}")  # fmt: skip

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the policy's ratio may go down and up."""
        return self.clip_eps, self.clip_eps_high or self.clip_eps

    @property
    def aggregation(self) -> dict[str, Any]:
        """What `ppo.aggregate` averages the policy's loss over."""
        return {"over": self.loss_over, "constant": self.max_new_tokens if self.loss_over == "constant" else None}

    @property
    def micro_batch_size(self) -> int:
        """Responses in one forward and backward pass."""
        return self.minibatch_size // self.gradient_accumulation_steps

    @property
    def scored_rows(self) -> int:
        """Responses in one pass without a gradient: twice those of a training step, which keeps all logits."""
        return 2 * self.micro_batch_size


@dataclass(frozen=True)
class PPOConfig(TrainerConfig):
    """All numbers of PPO."""

    gamma: float = setting(1.0, SHARE, "discount per token")
    gae_lambda: float = setting(0.95, SHARE, "λ of generalised advantage estimation")
    value_clip_eps: float = setting(0.2, LIMIT, "ε of the critic's clip range")
    vf_coef: float = setting(0.1, NOT_NEGATIVE, "weight of the value loss")
    whiten_advantages: bool = setting(True, SWITCH, "scale each batch's advantages to mean 0, variance 1")
    normalize_scores: bool = setting(False, SWITCH, "scale each batch's scores to variance 1, their mean kept")

    def __post_init__(self) -> None:
        super().__post_init__()
        for whitens, what in ((self.whiten_advantages, "whiten advantages"), (self.normalize_scores, "scale scores")):
            require("batch_size", self.batch_size, not whitens or self.batch_size >= 8, f"at least 8 to {what}")


@dataclass(frozen=True)
class GroupConfig(TrainerConfig):
    """What methods share that compare several responses to one prompt instead of asking a critic."""

    samples_per_prompt: int = setting(8, at_least(2), "responses to each prompt that is drawn")
    ppo_epochs: int = setting(2, COUNT, "passes over each batch")
    kl_coef: float = setting(0.05, NOT_NEGATIVE, "β: price of one nat of KL from the reference")


@dataclass(frozen=True)
class RLOOConfig(GroupConfig):
    """All numbers of RLOO."""


@dataclass(frozen=True)
class GRPOConfig(GroupConfig):
    """All numbers of GRPO, and what makes its kin of it: Dr. GRPO, DAPO, GSPO, REINFORCE++ with a baseline."""

    advantage_scale: str = setting("group", one_of("none", "group", "batch"), "advantages over: nothing (Dr. GRPO), "
                                   "their group's standard deviation (GRPO), or the batch's (REINFORCE++)")  # fmt: skip
    loss_over: str = setting("tokens", one_of("tokens", "sequences", "constant"), "the loss is a mean over tokens "
                             "(DAPO), over responses of their tokens' means (GRPO), or a sum over max_new_tokens "
                             "(Dr. GRPO)")  # fmt: skip
    ratio_level: str = setting("token", one_of("token", "sequence"),
                               "a ratio for each token, or one for each response (GSPO)")  # fmt: skip
    kl_in: str = setting("reward", one_of("loss", "reward"),
                         "where the KL is paid: out of the reward, or (GRPO's paper, k3) in the loss")  # fmt: skip
    kl_kind: str = setting("k1", one_of("k1", "k2", "k3"), "the estimate of the KL that is paid")
    dynamic_sampling: int = setting(0, at_least(0), "more batches to sample at most, in the place of groups whose "
                                    "scores are all equal (DAPO)")  # fmt: skip


@dataclass(frozen=True)
class DPOConfig(SamplingConfig):
    """All numbers of DPO, a fit to preferences; its iterations look at what the policy has come to."""

    num_iterations: int = setting(20, COUNT, "looks at the policy while it is fitted, a batch of responses each")
    kl_coef: float = setting(0.1, POSITIVE, "β: price of one nat of KL from the reference")
    dpo_loss: str = setting("dpo", one_of("dpo", "ipo"), "log-odds without end (dpo), or up to 1/(2β) (ipo)")
    dpo_epochs: float = setting(2.0, POSITIVE, "passes over the preferences")
    dpo_batch_size: int = setting(32, COUNT, "pairs in a step")
    dpo_learning_rate: float = setting(5e-4, POSITIVE, "of AdamW, at its highest")


@dataclass(frozen=True)
class BestOfNConfig(SamplingConfig):
    """All numbers of best-of-n, a decoder: nothing is trained, and its iterations are n = 1, 2, 4, …"""

    n: int = setting(64, COUNT, "responses to each prompt, of which the one with the highest score is kept")


METHODS = {"ppo": PPOConfig, "rloo": RLOOConfig, "grpo": GRPOConfig, "dpo": DPOConfig, "best-of-n": BestOfNConfig}


@dataclass(frozen=True)
class PretrainConfig:
    """Sizes of a language model trained from scratch, and its fit. Tokens are of the tokenizer; batches count texts."""

    layers: int = setting(4, COUNT, "layers of a language model trained from scratch")
    width: int = setting(192, COUNT, "its hidden size")
    heads: int = setting(6, COUNT, "its attention heads")
    context: int = setting(128, at_least(2), "its longest text, in tokens")
    vocab_size: int = setting(4000, at_least(259), "tokens of a tokenizer trained on --corpus")
    lm_epochs: float = setting(8.0, POSITIVE, "passes over --corpus")
    lm_batch_size: int = setting(32, COUNT, "texts in a step")
    lm_learning_rate: float = setting(2e-3, POSITIVE, "of AdamW, at its highest")

    def __post_init__(self) -> None:
        check_settings(self)
        require("width", self.width, self.width % self.heads == 0, f"a multiple of heads = {self.heads}")


@dataclass(frozen=True)
class RewardConfig:
    """The fit of a reward model to preferences."""

    num_preferences: int = setting(4000, COUNT, "pairs that the tiny world's annotators compare")
    reward_epochs: float = setting(1.0, POSITIVE, "passes over the preferences")
    reward_batch_size: int = setting(16, COUNT, "pairs in a step")
    reward_learning_rate: float = setting(1e-3, POSITIVE, "of AdamW, at its highest")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ModelConfig:
    """How a policy is held in memory, and which of its weights are trained."""

    lora_rank: int = setting(0, at_least(0), "train a LoRA adapter of this rank beside frozen weights; 0: all weights")
    lora_alpha: float | None = setting(None, OPTIONAL, "the adapter counts by this over its rank; off: twice the rank")
    gradient_checkpointing: bool = setting(False, SWITCH, "save memory: compute activations twice, not keep them")
    weights: str = setting("float32", one_of("float32", "bf16"), "what weights beside an adapter are held in")

    def __post_init__(self) -> None:
        check_settings(self)
        require("lora_alpha", self.lora_alpha, self.lora_alpha is None or self.lora_rank > 0, "None without lora_rank")


@dataclass(frozen=True)
class Settings:
    """The settings of a whole run."""

    pretrain: PretrainConfig = PretrainConfig()
    reward: RewardConfig = RewardConfig()
    model: ModelConfig = ModelConfig()
    method: SamplingConfig = PPOConfig()

    def __post_init__(self) -> None:
        for item, kind in zip(fields(self), (PretrainConfig, RewardConfig, ModelConfig, SamplingConfig), strict=True):
            value = getattr(self, item.name)
            require(item.name, value, isinstance(value, kind), f"a {kind.__name__}")


PRESETS = {  # what differs from the defaults
    "tiny": {},
    "small": dict(layers=12, width=768, heads=12, context=128, vocab_size=8000, lm_epochs=6.0, lm_batch_size=64,
                  lm_learning_rate=6e-4, reward_batch_size=64, reward_learning_rate=5e-5, batch_size=512,
                  minibatch_size=128, max_new_tokens=48, learning_rate=2e-5, dpo_batch_size=64,
                  dpo_learning_rate=5e-6, precision="bf16"),
}  # fmt: skip


def make_settings(method: str = "ppo", given: Mapping[str, Any] = MappingProxyType({})) -> Settings:
    """The settings of a run by one of METHODS: those in `given` by their names, all others default."""
    kinds = {"pretrain": PretrainConfig, "reward": RewardConfig, "model": ModelConfig, "method": METHODS[method]}

    def made(kind: type) -> Any:
        return kind(**{item.name: given[item.name] for item in fields(kind) if item.name in given})

    return Settings(**{section: made(kind) for section, kind in kinds.items()})
