"""The models of RLHF as wrappers around Hugging Face ones: a policy with a value head, and a reward model.

Model classes of transformers are touched here and in `forward` alone, and imported inside the functions, since that
import takes seconds and `--help` should not. Checkpoints are safetensors files; code that comes with one is never run.
"""

import contextlib
import copy
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_lessons import forward
from rlhf_lessons.adapters import add_lora, has_adapter, merged_weights
from rlhf_lessons.forward import causal_lm_logits, one_pass, plain, position_arguments, trunk_of  # noqa: F401
from rlhf_lessons.masking import full_precision, rounding_variance

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Callers know these from here, as they do those above.
context_of, evaluating = forward.context_of, forward.evaluating
padding_route, takes_ready_masks = forward.padding_route, forward.takes_ready_masks

ASSETS = Path(__file__).parent / "assets"  # the tiny world's models: base, reward_model, aligned
VALUE_HEAD_FILE = "value_head.safetensors"  # keys: weight (1, H), bias (1,)
ADAPTER_FILE = "adapter_config.json"  # of an adapter that PEFT saved
CRITIC_FOLDER = "critic"  # a separate critic's trunk, itself a Hugging Face checkpoint
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)
NOISE = re.compile("drop|jitter", re.IGNORECASE)  # in the names of what is only added in training


class LogitsAndValues(NamedTuple):
    """What the policy with a value head says of each kept position."""

    logits: Tensor  # (B, L, V)
    values: Tensor  # (B, L)


def in_full_precision(layer: nn.Module, hidden: Tensor) -> Tensor:
    """A head's output in float32 at least; a linear one's is computed so, whatever its weights are in."""
    if not isinstance(layer, nn.Linear):
        return full_precision(layer(hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        weight, bias = full_precision(layer.weight), None if layer.bias is None else full_precision(layer.bias)
        return nn.functional.linear(full_precision(hidden), weight, bias)


class ValueHead(nn.Linear):
    """One linear output on a hidden state, in float32 at least, that starts at 0: (..., D) -> (...)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (...) of hidden states (..., D)."""
        return in_full_precision(self, hidden).squeeze(-1)

    def _apply(self, move: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What takes the whole model to 16 bits leaves the head where it is: a critic's steps are smaller than that.
        return super()._apply(lambda x: x.to(y.device) if torch.finfo((y := move(x)).dtype).bits < 32 else y, recurse)


class CausalLMWithValueHead(nn.Module):
    """A causal language model and, on its last hidden state, one linear output: the critic.

        V(s_t) = w·h_t + b                                                                              (Eq. 9.1)

    critic="shared": h_t is the policy's own last hidden state, so policy and critic train one trunk;
    critic="separate": h_t comes from a second trunk that starts as a copy. w and b start at 0, so that the first
    advantages are the rewards alone. Raises ValueError for another `critic`, or a separate one beside an adapter.
    Source: Ziegler et al. 2019 (shared); Ouyang et al. 2022, §3.5 (separate).
    """

    def __init__(self, lm: nn.Module, *, critic: str = "shared") -> None:
        super().__init__()
        if critic not in ("shared", "separate"):
            raise ValueError(f'critic must be "shared" or "separate"; got {critic!r}')
        lm = plain(lm)
        if critic == "separate" and has_adapter(lm):
            raise ValueError('critic must be "shared" beside an adapter, which spares a second trunk; got "separate"')
        head = lm.get_output_embeddings()
        if getattr(head, "weight", None) is None:
            raise ValueError(f"lm must have a language-model head; {type(lm).__name__} has none")
        self.lm = lm
        self._no_split_modules = getattr(lm, "_no_split_modules", None)  # the blocks, which FSDP shards one by one
        self.critic = copy.deepcopy(trunk_of(lm)) if critic == "separate" else None
        self.value_head = ValueHead(head.weight.shape[-1])  # as wide as what the head reads, not always hidden_size
        self.value_head.to(lm.dtype)

    @property
    def config(self) -> "PretrainedConfig":
        """The language model's configuration."""
        return self.lm.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, logits_to_keep: int = 0) -> LogitsAndValues:
        """Logits (B, K, V) and values (B, K) of the last K = logits_to_keep positions, or of all (0).

        input_ids, attention_mask: (B, L), padded on either side.
        """
        logits, hidden = one_pass(self.lm, input_ids, attention_mask, keep=logits_to_keep)
        if self.critic is not None:
            hidden = one_pass(self.critic, input_ids, attention_mask, keep=logits_to_keep).hidden
        return LogitsAndValues(logits, self.value_head(hidden))

    def values(self, input_ids: Tensor, attention_mask: Tensor, *, keep: int = 0) -> Tensor:
        """The values alone, (B, K) of the last K = keep positions, or of all (0): no logits are computed for them."""
        trunk = trunk_of(self.lm) if self.critic is None else self.critic
        return self.value_head(one_pass(trunk, input_ids, attention_mask, keep=keep).hidden)

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write the policy as a plain Hugging Face checkpoint, the value head and a separate critic beside it.

        state_dict: its weights, where they are not in the model itself.
        """
        folder, state = Path(folder), self.state_dict() if state_dict is None else state_dict

        def of(part: str) -> dict[str, Tensor]:
            return {name.removeprefix(part): x for name, x in state.items() if name.startswith(part)}

        with quiet_transformers():
            self.lm.save_pretrained(folder, state_dict=of("lm."))
            if self.critic is not None:
                self.critic.save_pretrained(folder / CRITIC_FOLDER, state_dict=of("critic."))
        save_file({name: x.contiguous() for name, x in of("value_head.").items()}, folder / VALUE_HEAD_FILE)

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
            with said_in_a_line("a value head", folder / VALUE_HEAD_FILE):
                model.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))
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
        self.classifier, self.config = classifier, classifier.config
        for name, default in (("reward_mean", 0.0), ("reward_std", 1.0)):
            if not hasattr(classifier.config, name):
                setattr(classifier.config, name, default)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores (B,) of texts (B, L), padded on either side."""
        hidden = one_pass(trunk_of(self.classifier), input_ids, attention_mask).hidden
        # By the mask and not, as the classifier itself would, by the padding's id: a policy can sample that token too.
        steps = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(attention_mask.bool(), steps, 0).amax(dim=1)
        output = in_full_precision(self.classifier.score, hidden[torch.arange(len(hidden), device=hidden.device), last])
        return (output.squeeze(-1) - self.config.reward_mean) / self.config.reward_std

    def normalize(self, scores: Tensor) -> None:
        """Make `scores`, given by this model, have mean 0 and standard deviation 1 from now on. scores: (N,)."""
        scores = full_precision(scores)
        if not scores.isfinite().all():
            raise ValueError("scores must be finite numbers to normalise by; got NaN or infinity")
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

        w is drawn from `seed` with standard deviation 1/√(D+1), so that first scores are of size 1.
        Source: Stiennon et al. 2020, released code.
        """
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

        lm = lm if isinstance(lm, nn.Module) else load_causal_lm(lm)
        config = copy.deepcopy(lm.config)
        config.num_labels, config.pad_token_id = 1, pad_token_id
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise ValueError(f"lm must be of a family with a sequence classifier; got {type(lm).__name__}")
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then replaced
            wide = torch.promote_types(lm.dtype, torch.float32)
            classifier = AutoModelForSequenceClassification.from_config(config, dtype=wide)
        model = cls(without_dropout(classifier).eval())
        trunk_of(classifier).load_state_dict(dict(merged_weights(trunk_of(lm))))
        head = classifier.score
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1), generator=generator)
        return model


def value_classifier(policy: CausalLMWithValueHead, *, of: str) -> nn.Module:
    """The critic alone as a classifier with one label, whose logit at each position is V there: other trainers' critic.

    of: "token", a token classifier; "sequence", a sequence classifier, whose head has no bias: its logits are V − b.
    Raises ValueError for a family without such a classifier.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    kinds = {"token": AutoModelForTokenClassification, "sequence": AutoModelForSequenceClassification}
    config = copy.deepcopy(policy.config)
    config.num_labels, config.classifier_dropout = 1, 0.0
    classifier = kinds[of].from_config(config, dtype=torch.float32)
    trunk_of(classifier).load_state_dict(dict(merged_weights(policy.critic or trunk_of(policy.lm))))
    head = getattr(classifier, "score", None) or classifier.classifier
    head.load_state_dict(policy.value_head.state_dict(), strict=False)  # one without a bias leaves ours out
    return classifier


def load_reward_model(path: str | Path) -> RewardModel:
    """Load a one-label sequence classifier from a folder or hub name, with its normalisation if it has one."""
    from transformers import AutoModelForSequenceClassification

    classifier, report = read_checkpoint(AutoModelForSequenceClassification, path, output_loading_info=True)
    if missing := ", ".join(sorted(report["missing_keys"])):
        raise ValueError(f"{path} must hold a reward model; got a checkpoint without {missing}")
    return RewardModel(classifier)


def load_causal_lm(path: str | Path) -> nn.Module:
    """Load a causal language model from a folder or hub name, ready to train: float32, dropout off.

    A folder that holds an adapter alone gives the model that it names, with that adapter in it, which trains on.
    Raises ValueError when nothing is found there, or what is found has no language-model head.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

    if (Path(path) / ADAPTER_FILE).is_file():
        return load_adapter(path)
    lm, report = read_checkpoint(AutoModelForCausalLM, path, output_loading_info=True)
    made_for = " ".join(lm.config.architectures or [])
    has_head = not made_for or "CausalLM" in made_for or "LMHead" in made_for or made_for in FAMILIES.values()
    if report["missing_keys"] or not has_head:
        saved = f"saved from {made_for or 'another model'}"
        raise ValueError(f"{path} must hold a model with a language-model head; got one {saved}")
    return lm


def load_adapter(path: str | Path) -> nn.Module:
    """The language model that a folder's adapter was made for, that adapter in it; raises ValueError without either."""
    with said_in_a_line("an adapter", path), quiet_transformers():
        base = json.loads((Path(path) / ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
        lm = load_causal_lm(base)
        lm.load_adapter(str(path), is_trainable=True)
    return without_dropout(lm)


def prepare_policy(
    policy: nn.Module, *, lora_rank: int = 0, lora_alpha: float | None = None, gradient_checkpointing: bool = False,
    weights: str = "float32", base: str | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """Make of a policy, in place, what `config.ModelConfig` says. base, seed: those of `add_lora`.

    Raises ValueError for 16-bit weights that are trained themselves, a separate critic beside an adapter, and what
    `add_lora` does.
    """
    lm, critic = getattr(policy, "lm", policy), getattr(policy, "critic", None)
    if lora_rank:
        add_lora(lm, rank=lora_rank, alpha=lora_alpha, base=base, seed=seed)
    if has_adapter(lm) and critic is not None:
        raise ValueError("critic must be shared beside an adapter, which spares a second trunk; got separate")
    if weights == "bf16" and not has_adapter(lm):
        raise ValueError("weights must be float32 where they train: a step is less than bf16 tells apart; got bf16")
    for p in lm.parameters() if weights == "bf16" else ():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    for model in (lm, critic) if gradient_checkpointing else ():
        if model is not None:  # each block's activations are computed once more on the way back
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})


@contextlib.contextmanager
def said_in_a_line(what: str, path: str | Path, errors: tuple[type[Exception], ...] = UNREADABLE) -> Iterator[None]:
    """Whatever goes wrong when something is read from a checkpoint, as one line (ValueError)."""
    try:
        yield
    except errors as error:
        raise ValueError(f"cannot load {what} from {str(path)!r}: {' '.join(str(error).split())[:300]}") from error


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


def check_source(path: str | Path) -> None:
    """Raise ValueError for a folder that is not there, which a hub would otherwise be asked for.

    A folder is what is a `Path`, is written as one, or stands below a folder that is there: hub names are a/b or b.
    """
    name, opening = str(path), Path(path).parts[:1]
    written_as_one = name.startswith((".", "~", os.sep)) or len(Path(path).parts) > 2
    if (isinstance(path, Path) or written_as_one or Path(*opening).is_dir()) and not Path(path).is_dir():
        raise ValueError(f"it must be a folder that is there; got {name!r}")


def read_checkpoint(auto_class: type, path: str | Path, **options: Any) -> Any:
    """`auto_class.from_pretrained`, with what goes wrong said in one line (ValueError).

    GPT-2's activation, where the configuration asks for it as seven operations, is asked for as PyTorch's single one.
    """
    from transformers import AutoConfig

    with said_in_a_line("a model", path), quiet_transformers():
        check_source(path)
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        for name in ("activation_function", "hidden_act"):
            if getattr(config, name, None) == "gelu_new":
                setattr(config, name, "gelu_pytorch_tanh")
        options |= dict(dtype=torch.float32, use_safetensors=True)
        loaded = auto_class.from_pretrained(str(path), config=config, trust_remote_code=False, **options)
    without_dropout(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch dropout and noise off for good: with them, the policy that is scored is not the one that sampled.

    Wherever the rate is read: in a module, or in a configuration when the module is called.
    """
    for module in model.modules():
        if NOISE.search(type(module).__name__) and hasattr(module, "p"):
            module.p = 0.0
        config = getattr(module, "config", None)
        for owner in (module, config, getattr(config, "text_config", None)):
            for name, rate in vars(owner).items() if owner is not None else ():
                if NOISE.search(name) and isinstance(rate, float):
                    setattr(owner, name, 0.0)
    return model


def new_causal_lm(
    tokenizer: "PreTrainedTokenizerBase", *, layers: int, width: int, heads: int, context: int, seed: int
) -> nn.Module:
    """A GPT-2 with random weights for this tokenizer; its embedding and vocabulary head are one matrix.

    Initialised from `seed` without touching the global generator.
    """
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = dict(n_positions=context, n_embd=width, n_layer=layers, n_head=heads)
    return random_gpt2(seed=seed, vocab_size=len(tokenizer), **sizes, **ids)


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

    with said_in_a_line("a tokenizer", path, (Exception,)):  # tokenizers has none of its own for an unreadable file
        check_source(path)
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    check_tokenizer(tokenizer)
    tokenizer.padding_side = "left"
    return tokenizer


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ValueError unless the tokenizer has an EOS and a pad token, and they differ."""
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an EOS token: without one no response ever ends")
    if tokenizer.pad_token_id is None:
        advice = 'add one, e.g. tokenizer.add_special_tokens({"pad_token": "<pad>"})'
        raise ValueError(f"tokenizer must have a pad token: {advice}")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError("tokenizer must not use its EOS token as padding, which hides endings: save another pad_token")


def check_separate(policy: nn.Module, reference: nn.Module | None) -> None:
    """Raise ValueError for a reference that shares parameters with the policy, and so would move with it."""
    own, its = ({p.data_ptr() for p in model.parameters()} for model in (policy, reference or nn.Module()))
    if own & its:
        raise ValueError("reference must be a model of its own; got one that shares parameters with policy")


def check_trainable(lm: nn.Module) -> None:
    """Raise ValueError for a language model of which nothing would be trained."""
    if not any(p.requires_grad for p in lm.parameters()):
        advice = "load an adapter with is_trainable=True" if has_adapter(lm) else "it is frozen"
        raise ValueError(f"policy must have parameters to train in its language model; got none: {advice}")


def check_vocabulary(model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ValueError for a tokenizer with an id that the model, or the one inside it, has no embedding of."""
    inner = getattr(model, "lm", getattr(model, "classifier", model))
    largest = max(tokenizer.get_vocab().values())
    if hasattr(inner, "get_input_embeddings") and largest >= (rows := inner.get_input_embeddings().weight.shape[0]):
        raise ValueError(f"tokenizer must have ids below {rows}, the rows of {type(inner).__name__}; got {largest}")


def bar_unused_ids(lm: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give ids that the tokenizer has no token of, a padded vocabulary's, the logit −∞, in place.

    In the model's own forward, so that whoever samples from it or scores with it means one distribution.
    """
    lm = plain(lm)
    barred = torch.ones(lm.get_output_embeddings().weight.shape[0], dtype=torch.bool)
    barred[list(tokenizer.get_vocab().values())] = False
    known = hasattr(lm, "barred_ids")
    if known or barred.any():
        lm.register_buffer("barred_ids", barred.to(lm.device), persistent=False)
    if barred.any() and not known:
        lm.register_forward_hook(without_barred_ids)


def without_barred_ids(lm: nn.Module, inputs: tuple, output: Any) -> Any:
    """The forward hook of `bar_unused_ids`."""
    if output.logits.shape[-1] == len(lm.barred_ids):  # and not what the head would have read (`forward.in_place_of`)
        output.logits = output.logits.masked_fill(lm.barred_ids, -math.inf)
    return output
