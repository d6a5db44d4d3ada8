"""`hand-over`: a finished run as a folder that another engine starts from, with the command that starts it.

What it holds is in plain formats: nothing in it imports this package. The texts are in hand_over/, beside this file:
reward.txt and what is added to it make reward.py; in an engine's folder stand its commands (.sh, and .flags for one
method's part of run.sh) and its README.md (and a method's paragraph); words.json says our settings in its words.
"""

import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_lessons import data, models
from rlhf_lessons.adapters import has_adapter, merged_weights
from rlhf_lessons.app.inputs import Inputs, Model, load_model, resolve
from rlhf_lessons.app.options import ENGINES, build_parser, method_of, settings_from
from rlhf_lessons.app.pipeline import choose_preferences
from rlhf_lessons.app.resume import digests
from rlhf_lessons.app.run_folder import holding_a_run
from rlhf_lessons.checkpoint import written_whole
from rlhf_lessons.config import DPOConfig, GRPOConfig, Settings
from rlhf_lessons.forward import context_of
from rlhf_lessons.generation import eos_ids

TEXTS = Path(__file__).parent / "hand_over"
CRITICS = {"openrlhf": "sequence", "verl": "token"}  # what kind of classifier an engine's critic is
# verl reads chats alone: a template that writes a message just as it stands, so that a prompt stays what it was.
AS_IT_STANDS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Finished:
    """A run that has finished: what it was given, read anew, and what came of it."""

    method: str
    settings: Settings
    found: Inputs
    opening_words: int
    policy: Model
    reward: Model | None  # None: a score of one's own

    @property
    def lm(self) -> nn.Module:
        """The policy's language model."""
        return getattr(self.policy.network, "lm", self.policy.network)


def hand_over(run: Path, to: str, out: Path | None = None) -> Path:
    """Write a finished run's models, prompts, pairs and reward for one of ENGINES, whole or not at all: the folder.

    out: the run's name and the engine's where None. Raises ValueError for a folder that is there, a run that has not
    finished or whose method the engine lacks, for files that are not what the run was given, and prompts that the
    engine would read as others.
    """
    target = out or run.with_name(f"{run.resolve().name}-{to}")
    if target.exists():
        raise ValueError(f"--out must be a new folder; {target} is there")
    finished = read_again(run, to)
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as folder, models.quiet_transformers():
        folder.mkdir()
        said = write_data(folder, to, finished) | write_models(folder, to, finished)
        write_reward(folder, to, finished)
        write_texts(folder, to, finished, said | {"run": run.resolve().name})
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
    load = models.CausalLMWithValueHead.from_pretrained if method == "ppo" else models.load_causal_lm
    policy = load_model(load, own[0] or own[1] or found.model.name)  # best-of-n trains none
    reward = load_model(models.load_reward_model, own[2]) if own[2] else found.reward_model
    return Finished(method, settings, found, getattr(arguments, "opening_words", 0), policy, reward)


# --- What it learns from ----------------------------------------------------------------------------------------------


def write_data(folder: Path, to: str, run: Finished) -> dict[str, Any]:
    """The prompts and, where the run learnt from pairs, those, as the engine reads them; numbers to be said of them."""
    config, tokenizer, found = run.settings.method, run.policy.tokenizer, run.found
    options = dict(opening_words=run.opening_words, seed=config.seed, max_new_tokens=config.max_new_tokens)
    records = [data.as_record(prompt) for prompt in found.choose_prompts(**options)]
    ids = [data.encode_prompt(tokenizer, record["prompt"]) for record in records]
    given = {"prompts": [prompt_row(run, to, *row) for row in zip(range(len(ids)), records, ids, strict=True)]}
    if to in ("trl", "openrlhf") and (run.method == "dpo" or (found.reward_model is None and found.score is None)):
        base = found.model or run.policy
        base = Model(getattr(base.network, "lm", base.network), base.tokenizer, base.name)
        pairs, _ = choose_preferences(found, base, run.settings)
        given["preferences"] = [pair_row(tokenizer, pair, special=to == "trl") for pair in pairs]
    said = {"longest_prompt": max(map(len, ids)), "preferences": 0}
    said["left_out"] = sum(rows.count(None) for rows in given.values())
    for name, rows in given.items():
        rows = [row for row in rows if row is not None]
        if not rows:
            raise ValueError(f"{name} must be texts that {to}'s tokenizer reads as this package does; got none")
        if name == "prompts":
            rows *= math.ceil(config.batch_size / len(rows))  # too few of them would not fill a batch
        said[name], path = len(rows), folder / (f"{name}/train.jsonl" if to == "trl" else f"{name}.jsonl")
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return said


def as_text(tokenizer: data.Tokenizer, ids: list[int], *, special: bool) -> str | None:
    """The text that a tokenizer, with its special tokens or without, reads as these very ids; None if there is none."""
    texts = (data.text_of(tokenizer, some) for some in (ids, data.without_begin(tokenizer, ids)))
    return next((text for text in texts if tokenizer(text, add_special_tokens=special).input_ids == ids), None)


def pair_row(tokenizer: data.Tokenizer, pair: Any, *, special: bool) -> dict[str, str] | None:
    """A pair as texts, EOS included, that are read as it was learnt from; None if there are none."""
    prompt, *answers = data.encode_pair(tokenizer, pair)
    before, *whole = (as_text(tokenizer, prompt + answer, special=special) for answer in ([], *answers))
    if before is None or not all(text and text.startswith(before) for text in whole):
        return None
    return {"prompt": before} | dict(zip(("chosen", "rejected"), (x[len(before) :] for x in whole), strict=True))


def prompt_row(run: Finished, to: str, index: int, record: Any, ids: list[int]) -> dict[str, Any] | None:
    """A prompt in an engine's columns, beside it, as JSON, what its reward reads of it; None if it has no text."""
    tokenizer, shown = run.policy.tokenizer, record["prompt"]
    text = as_text(tokenizer, ids, special=to == "trl")
    if not isinstance(shown, str):
        shown = data.text_of(tokenizer, data.without_begin(tokenizer, ids))
    kept = {**record, "prompt": shown}
    if run.found.score is None:
        own = run.reward.tokenizer
        chat = data.is_chat(record["prompt"]) and own.chat_template
        kept = {"prompt": data.text_of(own, data.encode_prompt(own, record["prompt"] if chat else shown))}
    kept, chat = json.dumps(kept), [{"role": "user", "content": text}]
    rows = {"trl": {"prompt": text, "record": kept}, "openrlhf": {"prompt": text, "label": kept}}
    rows["verl"] = {"data_source": "rlhf_lessons", "prompt": chat, "extra_info": {"index": index}}
    rows["verl"]["reward_model"] = {"style": "rule", "ground_truth": kept}
    rows["vllm"] = {"prompt": shown, "prompt_token_ids": ids}
    return None if text is None else rows[to]


# --- What is trained, and by what -------------------------------------------------------------------------------------


def write_models(folder: Path, to: str, run: Finished) -> dict[str, float]:
    """The policy, any adapter merged, the critic and the reward model; the numbers that have no place in them."""
    said, tokenizer = {"mean": 0.0, "bias": 0.0}, run.policy.tokenizer
    if to == "verl":
        tokenizer.chat_template = AS_IT_STANDS
    parts = {"policy": (merged(run.lm), tokenizer)}
    if run.method == "ppo" and to in CRITICS:
        parts["critic"] = models.value_classifier(run.policy.network, of=CRITICS[to]), tokenizer
        said["bias"] = run.policy.network.value_head.bias.item()
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
def folded(model: models.RewardModel) -> models.RewardModel:
    """The same scores, in place, by a head that is 1/std times the old one: what is subtracted is then mean/std.

    A head without a bias has no place for that: it stays in the configuration, as `reward_mean`.
    """
    std = model.config.reward_std
    for p in model.classifier.score.parameters():
        p /= std
    model.config.reward_mean, model.config.reward_std = model.config.reward_mean / std, 1.0
    return model


def write_reward(folder: Path, to: str, run: Finished) -> None:
    """hand_over.json, what is to be known of sampling and of the reward, and reward.py, in the engine's signature."""
    config, tokenizer, score = asdict(run.settings.method), run.policy.tokenizer, run.found.given["score"]
    known = ("max_new_tokens", "temperature", "seed", "missing_eos_penalty", "missing_eos_mode")
    ends, (module, _, function) = eos_ids(run.lm, tokenizer), (score or "").partition(":")
    settings = {name: config[name] for name in known} | {"end_ids": ends, "function": function}
    settings["ends"] = [data.text_of(tokenizer, [end]) for end in ends]
    settings["between"] = "" if data.writes_spaces(tokenizer) else " "
    (folder / "hand_over.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if to == "vllm":
        return
    pieces = ("reward.txt", "function.txt" if score else "model.txt", f"{to}/reward.txt")
    code = "\n\n".join((TEXTS / piece).read_text(encoding="utf-8") for piece in pieces)
    (folder / "reward.py").write_text(code, encoding="utf-8")
    if score:
        shutil.copy(sys.modules[module].__file__, folder / "score.py")


# --- What starts it, and what is said of it ---------------------------------------------------------------------------


def write_texts(folder: Path, to: str, run: Finished, said: dict[str, Any]) -> None:
    """The commands and README.md, their gaps filled with the run's settings, in the engine's words for them."""
    texts, own = {path.name: path.read_text(encoding="utf-8") for path in (TEXTS / to).iterdir()}, run.settings
    facts = asdict(GRPOConfig()) | {"kl_in": "reward", "kl_kind": "k1"}  # of a method that has no choice there
    facts |= asdict(own.model) | asdict(own.reward) | asdict(DPOConfig()) | asdict(own.method)
    facts |= {name: of.get(facts[name], facts[name]) for name, of in json.loads(texts["words.json"]).items()} | said
    facts["high"] = facts["clip_eps_high"] or facts["clip_eps"]
    facts["warmup"], facts["floor"] = facts["warmup_iterations"] / facts["num_iterations"], 1 / facts["sampler_cap"]
    facts |= {"method": run.method, "source": run.policy.name, "context": context_of(run.policy.network)}
    facts["flags"] = texts.get(f"{run.method}.flags", "").strip().format(**facts)
    names = {"run.sh": texts.get(f"{run.method}.sh") or texts["run.sh"]}
    names |= {name: texts[name] for name in ("reward.sh", "dpo.sh") if said["preferences"]}
    names["README.md"] = texts["README.md"].replace("(method)\n", texts.get(f"{run.method}.md", ""))
    for name, text in names.items():
        (folder / name).write_text(text.format(**facts), encoding="utf-8")
    if to == "vllm":
        shutil.copy(TEXTS / to / "generate.txt", folder / "generate.py")
