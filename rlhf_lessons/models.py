"""The models of RLHF as wrappers around Hugging Face ones: a policy with a value head, and a reward model.

The only place that touches transformers' model classes. They are imported inside the functions, since that import takes
seconds and `--help` should not. Checkpoints are safetensors files; code that comes with a checkpoint is never run.
"""

import contextlib
import copy
import functools
import inspect
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_lessons.masking import full_precision, position_ids, rounding_variance

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ASSETS = Path(__file__).parent / "assets"  # the tiny world's models: base, reward_model, aligned
VALUE_HEAD_FILE = "value_head.safetensors"  # keys: weight (1, H), bias (1,)
CRITIC_FOLDER = "critic"  # a separate critic's trunk, itself a Hugging Face checkpoint


class LogitsAndValues(NamedTuple):
    """What the policy with a value head says of each kept position."""

    logits: Tensor  # (B, L, V)
    values: Tensor  # (B, L)


def context_of(model: nn.Module) -> float:
    """The longest text that a model reads, in tokens; infinite where it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def position_arguments(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """The argument that makes left padding harmless, for models that take it (ALiBi models have no position ids)."""
    return {"position_ids": position_ids(attention_mask)} if takes_position_ids(type(model)) else {}


@functools.cache
def takes_position_ids(model_class: type) -> bool:
    """Whether models of this class are told the positions; looked up once, since sampling asks at every step."""
    return "position_ids" in inspect.signature(model_class.forward).parameters


def takes_ready_masks(lm: nn.Module) -> bool:
    """Whether a bool mask (B, 1, Q, K), True where query may see key, can stand for the mask of tokens.

    So it is where PyTorch's own attention lets every layer see all that came before, and positions are given apart.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    if getattr(lm.config, "_attn_implementation", None) != "sdpa" or not takes_position_ids(type(lm)):
        return False
    return all(type(layer) is StaticLayer for layer in StaticCache(config=lm.config, max_cache_len=1).layers)


def ready_mask(attention_mask: Tensor, length: int | None = None) -> Tensor:
    """Which of `length` keys (L without it) each query sees: real ones up to its own. (B, L) -> (B, 1, L, length).

    A padded position sees itself, for a row that sees nothing would come out as NaN.
    """
    queries = torch.arange(attention_mask.shape[1], device=attention_mask.device)[:, None]
    keys = torch.arange(length or len(queries), device=attention_mask.device)
    real = nn.functional.pad(attention_mask.bool(), (0, len(keys) - len(queries)))[:, None, None]
    return real & (keys <= queries) | (keys == queries)


def mask_arguments(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """Mask and positions for one pass over whole texts (B, L).

    A model that makes the mask itself looks whether anything is padded; on a GPU the host would wait for that.
    """
    model = getattr(model, "module", model)  # what data parallelism wraps
    ready = attention_mask.device.type == "cuda" and takes_ready_masks(model)
    mask = ready_mask(attention_mask) if ready else attention_mask
    return {"attention_mask": mask} | position_arguments(model, attention_mask)


def causal_lm_logits(lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, logits_to_keep: int = 0) -> Tensor:
    """Logits (B, K, V) of the last K = logits_to_keep positions, or of all (0), of a plain language model."""
    return lm(
        input_ids=input_ids,
        logits_to_keep=logits_to_keep,
        use_cache=False,
        **mask_arguments(lm, attention_mask),
    ).logits


class ValueHead(nn.Linear):
    """One linear output on a hidden state, in float32 at least, that starts at 0: (..., H) -> (...)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (...) of hidden states (..., H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            weight, bias = full_precision(self.weight), full_precision(self.bias)
            return nn.functional.linear(full_precision(hidden), weight, bias).squeeze(-1)


class CausalLMWithValueHead(nn.Module):
    """A causal language model and, on its last hidden state, one linear output: the critic.

        V(s_t) = w·h_t + b                                                                              (Eq. 9.1)

    critic="shared": h_t is the policy's own last hidden state, so policy and critic train one trunk;
    critic="separate": h_t comes from a second trunk that starts as a copy. w and b start at 0, so that the first
    advantages are the rewards alone. Raises ValueError for another `critic`.
    Source: Ziegler et al. 2019 (shared); Ouyang et al. 2022, §3.5 (separate).
    """

    def __init__(self, lm: nn.Module, *, critic: str = "shared") -> None:
        super().__init__()
        if critic not in ("shared", "separate"):
            raise ValueError(f'critic must be "shared" or "separate"; got {critic!r}')
        if lm.get_output_embeddings() is None:
            raise ValueError(f"lm must have a language-model head; {type(lm).__name__} has none")
        self.lm = lm
        self.critic = copy.deepcopy(lm.base_model) if critic == "separate" else None
        self.value_head = ValueHead(lm.config.get_text_config().hidden_size)
        self.value_head.to(dtype=next(lm.parameters()).dtype)

    @property
    def config(self) -> "PretrainedConfig":
        """The language model's configuration."""
        return self.lm.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, logits_to_keep: int = 0) -> LogitsAndValues:
        """Logits (B, K, V) and values (B, K) of the last K = logits_to_keep positions, or of all (0).

        input_ids, attention_mask: (B, L), padded on either side.
        """
        inputs = self._inputs(input_ids, attention_mask)
        output = self.lm(**inputs, logits_to_keep=logits_to_keep, output_hidden_states=self.critic is None)
        hidden = output.hidden_states[-1] if self.critic is None else self.critic(**inputs).last_hidden_state
        return LogitsAndValues(output.logits, self.value_head(hidden[:, -logits_to_keep:]))

    def values(self, input_ids: Tensor, attention_mask: Tensor, *, keep: int = 0) -> Tensor:
        """The values alone, (B, K) of the last K = keep positions, or of all (0): no logits are computed for them."""
        trunk = self.lm.base_model if self.critic is None else self.critic
        return self.value_head(trunk(**self._inputs(input_ids, attention_mask)).last_hidden_state[:, -keep:])

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict:
        return dict(input_ids=input_ids, use_cache=False) | mask_arguments(self.lm, attention_mask)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy as a plain Hugging Face checkpoint, the value head and a separate critic beside it."""
        folder = Path(folder)
        with quiet_transformers():
            self.lm.save_pretrained(folder)
            if self.critic is not None:
                self.critic.save_pretrained(folder / CRITIC_FOLDER)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.value_head.state_dict().items()},
            folder / VALUE_HEAD_FILE,
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, *, critic: str | None = None) -> "CausalLMWithValueHead":
        """Load a policy from a folder or hub name; without a saved value head it starts at 0.

        critic: None keeps what was saved ("shared" for a plain language model). Raises ValueError when the
        checkpoint has no language-model head or cannot be read.
        """
        folder = Path(path)
        saved_critic = "separate" if (folder / CRITIC_FOLDER).is_dir() else "shared"
        model = cls(load_causal_lm(path), critic=critic or saved_critic)
        if (folder / VALUE_HEAD_FILE).exists() and (critic or saved_critic) == saved_critic:
            try:
                model.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))
            except (OSError, RuntimeError, SafetensorError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"cannot load a value head from {folder / VALUE_HEAD_FILE}: {reason[:300]}") from error
            if model.critic is not None:
                model.critic = read_checkpoint(type(model.critic), folder / CRITIC_FOLDER)
        return model


class RewardModel(nn.Module):
    """One number per text, read at its last real token and normalised with stored statistics.

        score(x, y) = (w·h_last − mean) / std                                                           (Eq. 2.3)

    classifier: an `AutoModelForSequenceClassification` with one label. mean and std live in its configuration as
    `reward_mean` and `reward_std`, so that they are saved and loaded with it.
    Source: Stiennon et al. 2020, "Learning to summarize from human feedback", §3.4 and its normalisation.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        if not hasattr(classifier, "score"):
            raise ValueError(f"classifier must be a causal model with a score layer; got {type(classifier).__name__}")
        if classifier.config.num_labels != 1:
            raise ValueError(f"classifier must have one label; got {classifier.config.num_labels}")
        if classifier.config.pad_token_id is None:
            raise ValueError("classifier.config.pad_token_id must be set: the score is read at the last non-pad token")
        self.classifier = classifier
        for name, default in (("reward_mean", 0.0), ("reward_std", 1.0)):
            if not hasattr(classifier.config, name):
                setattr(classifier.config, name, default)

    @property
    def config(self) -> "PretrainedConfig":
        """The classifier's configuration."""
        return self.classifier.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores (B,) of texts (B, L), padded on either side."""
        trunk = self.classifier.base_model
        hidden = trunk(
            input_ids=input_ids,
            use_cache=False,
            **mask_arguments(trunk, attention_mask),
        ).last_hidden_state
        # By the mask and not, as the classifier itself would, by the padding's id: a policy can sample that token too.
        steps = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(attention_mask.bool(), steps, 0).amax(dim=1)
        output = self.classifier.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        return (full_precision(output.squeeze(-1)) - self.config.reward_mean) / self.config.reward_std

    def normalize(self, scores: Tensor) -> None:
        """Make `scores`, given by this model, have mean 0 and standard deviation 1 from now on. scores: (N,)."""
        scores = full_precision(scores)
        if scores.numel() < 2 or not scores.var(correction=0) > rounding_variance(scores.square().mean()):
            raise ValueError("scores must hold at least two different values to normalise by; got equal ones")
        old_std = self.config.reward_std
        self.config.reward_mean += float(scores.mean()) * old_std
        self.config.reward_std = float(scores.std(correction=0)) * old_std

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain Hugging Face sequence-classification checkpoint."""
        with quiet_transformers():
            self.classifier.save_pretrained(folder)

    @classmethod
    def from_causal_lm(cls, lm: nn.Module | str | Path, *, pad_token_id: int, seed: int = 0) -> "RewardModel":
        """Start from a copy of a language model's trunk (or of a checkpoint's), with a single output as its head.

        w is drawn from `seed` with standard deviation 1/√(H+1), so that first scores are of size 1.
        Source: Stiennon et al. 2020, released code.
        """
        from transformers import AutoModelForSequenceClassification

        lm = lm if isinstance(lm, nn.Module) else load_causal_lm(lm)
        config = copy.deepcopy(lm.config)
        config.num_labels, config.pad_token_id = 1, pad_token_id
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then replaced
            classifier = AutoModelForSequenceClassification.from_config(config, dtype=lm.dtype)
        classifier.base_model.load_state_dict(lm.base_model.state_dict())
        model = cls(without_dropout(classifier).eval())
        head = classifier.score
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1), generator=generator)
        return model


def load_reward_model(path: str | Path) -> RewardModel:
    """Load a one-label sequence classifier from a folder or hub name, with its normalisation if it has one."""
    from transformers import AutoModelForSequenceClassification

    classifier, report = read_checkpoint(AutoModelForSequenceClassification, path, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"{path} must hold a reward model; got a checkpoint without {', '.join(sorted(report['missing_keys']))}"
        )
    return RewardModel(classifier)


def load_causal_lm(path: str | Path) -> nn.Module:
    """Load a causal language model from a folder or hub name, ready to train: float32, dropout off.

    Raises ValueError when nothing is found there, or what is found has no language-model head.
    """
    from transformers import AutoModelForCausalLM

    lm, report = read_checkpoint(AutoModelForCausalLM, path, output_loading_info=True)
    made_for = " ".join(lm.config.architectures or [])
    if report["missing_keys"] or (made_for and "CausalLM" not in made_for and "LMHead" not in made_for):
        raise ValueError(
            f"{path} must hold a model with a language-model head; got one saved from {made_for or 'another model'}"
        )
    return lm


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no reports of loading and saving: what matters there is raised as an error."""
    from transformers.utils import logging

    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()


def read_checkpoint(auto_class: type, path: str | Path, **options: Any) -> Any:
    """`auto_class.from_pretrained`, with what goes wrong said in one line (ValueError).

    GPT-2's activation, where the configuration asks for it as seven operations, is asked for as PyTorch's single one.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(path))
            for name in ("activation_function", "hidden_act"):
                if getattr(config, name, None) == "gelu_new":
                    setattr(config, name, "gelu_pytorch_tanh")
            loaded = auto_class.from_pretrained(
                str(path), config=config, dtype=torch.float32, use_safetensors=True, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load a model from {str(path)!r}: {reason[:300]}") from error
    without_dropout(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch dropout off for good: with it, the policy that is scored is not the one that sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, rate in vars(module).items():  # some layers keep the rate as a number and drop by a function
            if name.endswith(("dropout", "layerdrop")) and isinstance(rate, float):
                setattr(module, name, 0.0)
    return model


def new_causal_lm(
    tokenizer: "PreTrainedTokenizerBase", *, layers: int, width: int, heads: int, context: int, seed: int
) -> nn.Module:
    """A GPT-2 with random weights for this tokenizer; its embedding and vocabulary head are one matrix.

    Initialised from `seed` without touching the global generator.
    """
    return random_gpt2(
        seed=seed,
        vocab_size=len(tokenizer),
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def random_gpt2(*, seed: int, classifier: bool = False, **settings: Any) -> nn.Module:
    """A GPT-2 without dropout, weights drawn from `seed`: a language model, or a classifier with one label.

    settings: fields of its configuration; the others are those of GPT-2's checkpoints.
    """
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    settings = {"activation_function": "gelu_pytorch_tanh"} | settings  # as in `read_checkpoint`
    if classifier:
        settings["num_labels"] = 1
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2ForSequenceClassification(config) if classifier else GPT2LMHeadModel(config)


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer, padding on the left; raises ValueError when its pad token is missing or is its EOS."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # tokenizers has no exception of its own for a file that it cannot read
        raise ValueError(f"cannot load a tokenizer from {str(path)!r}: {' '.join(str(error).split())[:300]}") from error
    check_tokenizer(tokenizer)
    tokenizer.padding_side = "left"
    return tokenizer


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ValueError unless the tokenizer has an EOS and a pad token, and they differ."""
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an EOS token: without one no response ever ends")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            'tokenizer must have a pad token: add one, e.g. tokenizer.add_special_tokens({"pad_token": "<pad>"})'
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError("tokenizer must not use its EOS token as padding: masking the padding would hide every ending")
