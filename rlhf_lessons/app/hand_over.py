"""`hand-over`: a finished run as a folder that another engine starts from, with the command that starts it.

What it holds is in plain formats: nothing in it imports this package. hand_over/TARGET/ has the texts beside this file:
commands (.sh, and .flags for one method's), README.md and METHOD.md, and the last lines of reward.py.
"""

import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_lessons.adapters import has_adapter, merged_weights
from rlhf_lessons.app.inputs import Inputs, Model, choose_prompts, load_model, resolve
from rlhf_lessons.app.options import ENGINES, build_parser, method_of, settings_from
from rlhf_lessons.app.pipeline import choose_preferences
from rlhf_lessons.app.resume import digests
from rlhf_lessons.app.run_folder import holding_a_run
from rlhf_lessons.checkpoint import written_whole
from rlhf_lessons.config import DPOConfig, GRPOConfig, Settings, TrainerConfig
from rlhf_lessons.data import as_record, encode_pair, encode_prompt, is_chat, text_of, without_begin, writes_spaces
from rlhf_lessons.forward import context_of
from rlhf_lessons.generation import eos_ids
from rlhf_lessons.models import (
    CausalLMWithValueHead,
    RewardModel,
    load_causal_lm,
    load_reward_model,
    quiet_transformers,
    value_classifier,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = Path(__file__).parent / "hand_over"
CRITICS = {"openrlhf": "sequence", "verl": "token"}  # the classifier that a target's critic is
# verl reads chats alone: a template that writes a message just as it stands, so that a prompt stays what it was.
AS_IT_STANDS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
WORDS = {  # our settings' values in a target's words
    "trl": {
        "loss_over": {"tokens": "dapo", "sequences": "grpo", "constant": "dr_grpo"},
        "lr_schedule": {"constant": "constant_with_warmup"},
        "dpo_loss": {"dpo": "sigmoid"},
    },
    "openrlhf": {
        "advantage_scale": {"none": "dr_grpo", "group": "group_norm", "batch": "reinforce_baseline"},
        "kl_in": {"reward": "", "loss": " --algo.kl.use_loss"},
        "loss_over": {"tokens": "token-mean", "sequences": "seq-mean-token-mean", "constant": "token-mean"},
        "ratio_level": {"token": "ppo", "sequence": "gspo"},
        "lr_schedule": {"constant": "constant_with_warmup"},
        "dpo_loss": {"dpo": "", "ipo": " --model.ipo_enable"},
    },
    "verl": {
        "advantage_scale": {"none": "grpo", "group": "grpo", "batch": "reinforce_plus_plus_baseline"},
        "loss_over": {
            "tokens": "token-mean", "sequences": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm",
        },
        "ratio_level": {"token": "vanilla", "sequence": "gspo"},
        "lr_schedule": {"linear": "cosine"},
    },
    "vllm": {},
}  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A run that has finished: what it was given, read anew, and what came of it."""

    method: str
    settings: Settings
    found: Inputs
    opening_words: int
    policy: Model
    reward: Model | None  # None: a score of one's own


def hand_over(run: Path, to: str, out: Path | None = None) -> Path:
    """Write a finished run's models, prompts, pairs and reward for one of ENGINES, whole or not at all: the folder.

    out: the run's name and the target's where None. Raises ValueError for a folder that is there, a run that has not
    finished or whose method the target lacks, for files that are not what the run was given, and prompts that the
    target would read as others.
    """
    target = out or run.with_name(f"{run.resolve().name}-{to}")
    if target.exists():
        raise ValueError(f"--out must be a new folder; {target} is there")
    finished = read_again(run, to)
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as folder, quiet_transformers():
        folder.mkdir()
        said = write_data(folder, to, finished) | write_models(folder, to, finished)
        write_reward(folder, to, finished)
        write_texts(folder, to, finished.method, facts_of(to, finished, said) | {"run": run.resolve().name})
    return target


def read_again(run: Path, to: str) -> Finished:
    """A finished run. Raises ValueError as `hand_over` does."""
    with holding_a_run(run):
        kept = json.loads((run / "config.json").read_text(encoding="utf-8"))
        words, before = [str(word) for word in kept["made_by"]["command"][3:]], dict(kept["inputs"])
    if not (run / "summary.json").exists():
        raise ValueError(f"{run}: its run must have finished to be handed over")
    arguments = build_parser().parse_args(words)
    arguments.device, method = "cpu", method_of(arguments)  # wherever the run was
    if method not in ENGINES[to]:
        others = " or ".join(name for name, methods in ENGINES.items() if method in methods)
        raise ValueError(f"--to must be {others} for a run of {method}; got {to}")
    settings, found = settings_from(arguments), resolve(arguments)
    for name, digest in digests(found).items():
        if digest != before.get(name):
            changed = found.given[name] or "what is shipped"
            raise ValueError(f"{name} must be what the run was given; {changed} is something else now")
    own = [path if (path := run / name).is_dir() else None for name in ("policy", "base_model", "reward_model")]
    load = CausalLMWithValueHead.from_pretrained if method == "ppo" else load_causal_lm
    policy = load_model(load, own[0] or own[1] or found.model.name)
    reward = load_model(load_reward_model, own[2]) if own[2] else found.reward_model
    return Finished(method, settings, found, getattr(arguments, "opening_words", 0), policy, reward)


# --- What it learns from ----------------------------------------------------------------------------------------------


def write_data(folder: Path, to: str, run: Finished) -> dict[str, Any]:
    """The prompts and, where the run learnt from pairs, those, as the target reads them; numbers to be said of them."""
    config, tokenizer, found, special = run.settings.method, run.policy.tokenizer, run.found, to == "trl"
    options = dict(opening_words=run.opening_words, seed=config.seed, max_new_tokens=config.max_new_tokens)
    given = {"prompts": choose_prompts(found, **options), "eval_prompts": found.eval_prompts or ()}
    if to in ("trl", "openrlhf") and (run.method == "dpo" or (found.reward_model is None and found.score is None)):
        base = found.model or run.policy
        base = Model(getattr(base.network, "lm", base.network), base.tokenizer, base.name)
        given |= zip(("preferences", "eval_preferences"), choose_preferences(found, base, run.settings), strict=True)
    said: dict[str, Any] = {"longest_prompt": 0}
    for name, records in given.items():
        rows = []
        for record in records:
            if "preferences" in name:
                row = pair_row(tokenizer, record, special=special)
            else:
                ids = encode_prompt(tokenizer, as_record(record)["prompt"])
                row = prompt_row(run, to, as_record(record), ids, index=len(rows))
                said["longest_prompt"] = max(said["longest_prompt"], len(ids))
            rows += [] if row is None else [row]
        said |= {name: len(rows), f"{name}_left_out": len(records) - len(rows)}
        if name == "prompts" and rows:
            rows *= math.ceil(config.batch_size / len(rows))  # too few of them would not fill a batch
        kind, split = name.removeprefix("eval_"), "test" if name.startswith("eval_") else "train"
        if rows:
            path = folder / (f"{kind}/{split}.jsonl" if to == "trl" else f"{name}.jsonl")
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if not said["prompts"]:
        raise ValueError(f"prompts must be texts that {to}'s tokenizer reads as this package does; got none")
    return said


def as_text(tokenizer: "PreTrainedTokenizerBase", ids: list[int], *, special: bool) -> str | None:
    """The text that a tokenizer, with its special tokens or without, reads as these very ids; None if there is none."""
    texts = text_of(tokenizer, ids), text_of(tokenizer, without_begin(tokenizer, ids))
    return next((text for text in texts if tokenizer(text, add_special_tokens=special).input_ids == ids), None)


def pair_row(tokenizer: "PreTrainedTokenizerBase", pair: Any, *, special: bool) -> dict[str, str] | None:
    """A pair as texts, EOS included, that are read as it was learnt from; None if there are none."""
    prompt, *answers = encode_pair(tokenizer, pair)
    before, *whole = (as_text(tokenizer, prompt + answer, special=special) for answer in ([], *answers))
    if before is None or not all(text and text.startswith(before) for text in whole):
        return None
    return {"prompt": before} | dict(zip(("chosen", "rejected"), (x[len(before) :] for x in whole), strict=True))


def prompt_row(run: Finished, to: str, record: Any, ids: list[int], *, index: int) -> dict[str, Any] | None:
    """A prompt in a target's columns, and beside it, as JSON, what its reward reads of it; None if it has no text."""
    tokenizer, shown = run.policy.tokenizer, record["prompt"]
    text = as_text(tokenizer, ids, special=to == "trl")
    if not isinstance(shown, str):
        shown = text_of(tokenizer, without_begin(tokenizer, ids))
    if run.found.score is not None:
        kept = json.dumps({**record, "prompt": shown})
    else:
        own = run.reward.tokenizer
        chat = is_chat(record["prompt"]) and own.chat_template
        kept = json.dumps({"prompt": text_of(own, encode_prompt(own, record["prompt"] if chat else shown))})
    return None if text is None else {
        "trl": {"prompt": text, "record": kept},
        "openrlhf": {"prompt": text, "label": kept},
        "verl": {
            "data_source": "rlhf_lessons", "prompt": [{"role": "user", "content": text}],
            "reward_model": {"style": "rule", "ground_truth": kept}, "extra_info": {"index": index},
        },
        "vllm": {"prompt": shown, "prompt_token_ids": ids},
    }[to]  # fmt: skip


# --- What is trained, and by what -------------------------------------------------------------------------------------


def write_models(folder: Path, to: str, run: Finished) -> dict[str, float]:
    """The policy, any adapter merged, the critic and the reward model; numbers to be said of them."""
    policy, tokenizer = run.policy.network, run.policy.tokenizer
    lm, said = getattr(policy, "lm", policy), {"mean": 0.0, "bias": 0.0}
    if to == "verl":
        tokenizer.chat_template = AS_IT_STANDS
    parts = {"policy": (merged(lm), tokenizer)}
    if run.method == "ppo" and to in CRITICS:
        parts["critic"] = value_classifier(policy, of=CRITICS[to]), tokenizer
        said["bias"] = policy.value_head.bias.item()
    if run.found.score is None and to != "vllm":
        parts["reward_model"] = folded(run.reward.network), run.reward.tokenizer
        said["mean"] = run.reward.network.config.reward_mean
    for name, saved in parts.items():
        for part in saved:
            part.save_pretrained(folder / name)
    return said


@torch.no_grad()
def merged(lm: nn.Module) -> nn.Module:
    """A language model whose adapter, if it has one, is added to its weights."""
    if not has_adapter(lm):
        return lm
    plain = type(lm)(lm.config)
    plain.load_state_dict(dict(merged_weights(lm)))
    plain.generation_config = lm.generation_config
    return plain


@torch.no_grad()
def folded(model: RewardModel) -> RewardModel:
    """The same scores by a head that is 1/std times the old one, in place; what is subtracted from them is mean/std.

    A head without a bias has no place for that: it stays in the configuration, as `reward_mean`.
    """
    std = model.config.reward_std
    for p in model.classifier.score.parameters():
        p /= std
    model.config.reward_mean, model.config.reward_std = model.config.reward_mean / std, 1.0
    return model


def write_reward(folder: Path, to: str, run: Finished) -> None:
    """reward.py, in the target's signature, and hand_over.json, which it reads."""
    config, policy, name = run.settings.method, run.policy, run.found.given["score"]
    ends = eos_ids(getattr(policy.network, "lm", policy.network), policy.tokenizer)
    settings = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "seed")}
    settings |= {name: getattr(config, name) for name in ("missing_eos_penalty", "missing_eos_mode")}
    settings |= {"end_ids": ends, "ends": [text_of(policy.tokenizer, [end]) for end in ends]}
    settings |= {"between": "" if writes_spaces(policy.tokenizer) else " ", "function": name and name.split(":")[1]}
    (folder / "hand_over.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if to == "vllm":
        return
    if name:
        shutil.copy(sys.modules[name.split(":")[0]].__file__, folder / "score.py")
    pieces = ("reward.txt", "function.txt" if name else "model.txt", f"{to}/reward.txt")
    (folder / "reward.py").write_text("\n\n".join((TEXTS / piece).read_text(encoding="utf-8") for piece in pieces))


# --- What starts it, and what is said of it ---------------------------------------------------------------------------


def facts_of(to: str, run: Finished, said: dict[str, Any]) -> dict[str, Any]:
    """What the texts leave open: the run's settings, in the target's words where it has others, and what follows."""
    config, own = run.settings.method, run.settings
    known = asdict(GRPOConfig()) | {"kl_in": "reward", "kl_kind": "k1"}  # of a method that has no choice there
    known |= asdict(own.model) | asdict(own.reward) | asdict(DPOConfig()) | asdict(config)
    facts = known | {name: words.get(known[name], known[name]) for name, words in WORDS[to].items() if name in known}
    facts |= said | {
        "method": run.method, "source": run.policy.name, "bf16": config.precision == "bf16",
        "length": said["longest_prompt"] + config.max_new_tokens, "context": context_of(run.policy.network),
        "dpo_passes": math.ceil(known["dpo_epochs"]), "reward_passes": math.ceil(known["reward_epochs"]),
        "in_loss": known["kl_in"] == "loss", "in_reward": known["kl_in"] == "reward",
        "by_deviation": known["advantage_scale"] == "group",
    }  # fmt: skip
    if isinstance(config, TrainerConfig):
        group, steps = config.samples_per_prompt, config.ppo_epochs * config.batch_size // config.minibatch_size
        draws = config.batch_size // group
        facts |= {
            "draws": draws, "mini_draws": max(1, config.minibatch_size // group), "micro": config.micro_batch_size,
            "group": group if group > 1 else next(n for n in (8, 4, 2, 1) if config.batch_size % n == 0),
            "pieces": config.batch_size // config.micro_batch_size, "steps": config.num_iterations * steps,
            "warmup_steps": config.warmup_iterations * steps, "high": config.clip_range[1],
            "warmup": config.warmup_iterations / config.num_iterations,
            "passes": math.ceil(config.num_iterations * draws / said["prompts"]),
        }  # fmt: skip
    return facts


def write_texts(folder: Path, to: str, method: str, facts: dict[str, Any]) -> None:
    """The commands and README.md, their gaps filled."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in (TEXTS / to).iterdir()}
    scripts = {"run.sh": texts.get(f"{method}.sh") or texts["run.sh"]}
    if facts.get("preferences"):
        scripts |= {name: texts[name] for name in ("reward.sh", "dpo.sh")}
    flags = texts.get(f"{method}.flags", "").strip().format(**facts)
    for name, text in scripts.items():
        (folder / name).write_text(text.format(flags=flags, **facts), encoding="utf-8")
    if "generate.txt" in texts:
        (folder / "generate.py").write_text(texts["generate.txt"], encoding="utf-8")
    page = "".join(texts.get(name, "") for name in ("README.md", f"{method}.md"))
    (folder / "README.md").write_text(page.format(**facts), encoding="utf-8")
