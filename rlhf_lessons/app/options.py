"""The command line: what each command takes, and the help that a newcomer reads."""

import argparse
import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from rlhf_lessons import __version__
from rlhf_lessons.config import METHODS, PRESETS, ModelConfig, PretrainConfig, RewardConfig, Settings, make_settings

EXIT_ERROR = 2
OPENING_WORDS = 3
EVERY = 10  # iterations between two checkpoints

ABOUT = """\
RLHF with PPO on a small language model, all of it: a base model learns to write from text, a reward model learns
from preferences which of two answers is better, and PPO trains the base model to be rewarded without straying far
from where it began; or one of the methods that came after it (RLOO, GRPO, DPO, best-of-n) does. Without options
everything is the tiny world's: short movie reviews, simulated annotators, and a gold reward that nobody trains on, by
which reward hacking is seen. That takes minutes on a laptop's CPU.
"""

EXAMPLES = {
    "": """\
  python -m rlhf_lessons run                     the whole pipeline in the tiny world
  python -m rlhf_lessons sample                  what it comes to, before and after, from the models shipped here
  python -m rlhf_lessons run --kl-coef 0         the same without the leash: watch the gold reward fall
  python -m rlhf_lessons run --help              all options of a command
""",
    "run": """\
  python -m rlhf_lessons run --out runs/first
  python -m rlhf_lessons run --method grpo --samples-per-prompt 16
  python -m rlhf_lessons run --corpus texts.txt --preferences pairs.jsonl
  python -m rlhf_lessons run --model gpt2-with-pad/ --prompts prompts.txt --score my_rewards:politeness
""",
    "pretrain": """\
  python -m rlhf_lessons pretrain --corpus texts.txt --out runs/base
  (the model is then in runs/base/base_model, for `reward --model` and `ppo --model`)
""",
    "reward": """\
  python -m rlhf_lessons reward --model runs/base/base_model --preferences pairs.jsonl --out runs/reward
  (the model is then in runs/reward/reward_model, for `ppo --reward-model`)
""",
    "ppo": """\
  python -m rlhf_lessons ppo --model runs/base/base_model --reward-model runs/reward/reward_model --prompts prompts.txt
  python -m rlhf_lessons ppo --score my_rewards:shortness --num-iterations 20
""",
    "sample": """\
  python -m rlhf_lessons sample --prompt "the plot was"
  python -m rlhf_lessons sample --policy runs/first/policy --reward-model runs/first/reward_model
""",
    "summary": """\
  python -m rlhf_lessons summary runs/*
""",
    "compare": """\
  python -m rlhf_lessons compare runs/* --out figures/betas.png
""",
    "progress": """\
  python -m rlhf_lessons progress
""",
}

RUN_FOLDER = """
The folder that --out names then holds report.html (the run to look into, in a browser: its curves, responses token by
token, before and after, all settings), what that is made of (config.json, metrics.jsonl with a line per iteration,
rollouts.jsonl, samples.json), summary.json, samples.md, figures/*.png, and the models, as Hugging Face checkpoints.
What a stopped run has written can be read; only a finished one has a summary.json, and `run --resume FOLDER` continues
any other, as if it had never stopped.
"""

SOURCES = {  # option -> its type, how its value is called, what it is
    "corpus": (Path, "FILE", "text to learn to write from, one document a line; a base model is trained on it"),
    "preferences": (
        Path,
        "FILE",
        "JSON lines with prompt, chosen, rejected (or chats) for a reward model to learn from",
    ),
    "eval_preferences": (Path, "FILE", "the same, held out to measure the reward model on"),
    "prompts": (
        Path,
        "FILE",
        "what PPO has continued: one prompt a line, or JSON lines (.jsonl) with prompt, or a chat",
    ),
    "eval_prompts": (Path, "FILE", "the same, held out: the policy answers each before, between and after the updates"),
    "model": (str, "MODEL", "language model to start from: a folder or hub name (safetensors)"),
    "reward_model": (str, "MODEL", "reward model that PPO maximises: a folder or hub name (safetensors)"),
    "score": (
        str,
        "MODULE:FUNCTION",
        "a reward of your own for PPO to maximise: a function of prompts and responses, two lists of texts, "
        "that returns a number for each",
    ),
}


MACHINE = ("seed", "device", "precision")  # settings of a method that the fits before it share
USES = {  # command -> the settings that it reads, section by section; None for all of a section's
    "run": {"pretrain": None, "reward": None, "model": None, "method": None},
    "pretrain": {"pretrain": None, "method": MACHINE},
    "reward": {"reward": None, "method": MACHINE},
    "ppo": {"model": None, "method": None},
}
CRITICS = ("shared", "separate")
# DPO learns from pairs itself, whatever it is measured by.
BOTH = tuple(itertools.product(("preferences", "num_preferences"), ("score", "reward_model")))
KINDS = {"pretrain": PretrainConfig, "reward": RewardConfig, "model": ModelConfig}
PRETRAIN, REWARD, MODEL = (tuple(item.name for item in fields(kind)) for kind in KINDS.values())
# Options of a method that are no settings of it.
OWN = {"ppo": ("critic", "eval_prompts", *MODEL)} | dict.fromkeys(("rloo", "grpo", "dpo"), ("eval_prompts", *MODEL))
READ = (  # options, what they need one of, what leaves nobody to read them, why
    (("corpus",), ("preferences", "reward_model", "score"), ("model",),
     "a model is trained on the corpus from scratch, and the tiny world's annotators cannot judge its texts"),
    (("score",), (), ("reward_model",), "PPO maximises one of them"),
    (("eval_preferences",), ("preferences",), (), "they measure the reward model made from those"),
    (PRETRAIN, ("corpus",), (), "only what is trained on a corpus has a choice there"),
    (("preferences", *REWARD), (), ("score", "reward_model"), "no reward model is trained beside another score"),
    (("num_preferences",), (), ("preferences",), "the first asks the tiny world's annotators"),
    (("chat",), ("prompts", "eval_prompts", "prompt", "preferences"), (), "it says how those are read"),
    (("eval_every",), ("eval_prompts",), (), "they are what is answered then"),
    (("opening_words",), ("corpus",), ("prompts",), "they are those of a corpus's lines"),
    (("prompts",), (), ("prompt",), "both say what is continued"),
    (("lora_alpha",), ("lora_rank",), (), "it is that adapter's"),
    (("adaptive_kl_horizon",), ("adaptive_kl_target",), (), "without a target β is fixed"),
)  # fmt: skip
TITLES = {"pretrain": "a language model trained from scratch", "reward": "the reward model's fit",
          "model": "the policy's weights"}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and a pointer to the help, not its whole usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after one line."""
        self.exit(EXIT_ERROR, f"error: {message}\nsee {self.prog} --help\n")


def typed(*names: str) -> str:
    """Options as they are typed, but for the dashes in front of the first."""
    return " or --".join(names).replace("_", "-")


def shown(value: Any) -> str:
    """A default as help shows it."""
    if value is None or isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def add_settings(parser: Parser, section: str, names: tuple[str, ...] | None, methods: tuple[str, ...]) -> None:
    """One option per setting of a section; what stands where none is given is said, by method and by preset."""
    kinds = {"": KINDS[section]} if section in KINDS else {method: METHODS[method] for method in methods}
    owners: dict[str, list[str]] = {}
    for owner, kind in kinds.items():
        for item in fields(kind):
            owners.setdefault(item.name, []).append(owner)
    groups: dict[str, Any] = {}
    for name in (name for name in owners if names is None or name in names):
        title = "where and from which seed" if names else TITLES.get(section) or ", ".join(owners[name])
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        items = {owner: item for owner in owners[name] for item in fields(kinds[owner]) if item.name == name}
        item = next(iter(items.values()))
        default, said = shown(item.default), ""
        others = {owner: shown(other.default) for owner, other in items.items() if shown(other.default) != default}
        others |= {preset: shown(given[name]) for preset, given in PRESETS.items() if name in given}
        said = "".join(f"; {whose}: {value}" for whose, value in others.items() if value != default)
        help = f"{item.metadata['help']} (default: {default}{said})".replace("%", "%%")
        option = "--" + typed(name)
        if isinstance(item.default, bool):
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=help)
        else:
            kind = float if item.default is None else type(item.default)
            metavar = {int: "N", float: "X", str: "NAME"}[kind]
            group.add_argument(option, type=kind, default=None, metavar=metavar, help=help)


def add_command(commands: Any, name: str, help: str, *sources: str) -> Parser:
    """One command with the options that it uses."""
    stage = name in USES
    prog = f"python -m rlhf_lessons {name}"
    sub = commands.add_parser(
        name, prog=prog, usage=f"{prog} [options]", help=help, description=help[0].upper() + help[1:] + ".",
        epilog=f"examples:\n{EXAMPLES[name]}{RUN_FOLDER if stage else ''}",
    )  # fmt: skip
    group = sub.add_argument_group("your own data and models (the tiny world's where not given)")
    for source in sources:
        kind, metavar, text = SOURCES[source]
        group.add_argument("--" + typed(source), type=kind, metavar=metavar, help=text)
    if stage:
        sub.add_argument("--out", type=Path, metavar="FOLDER", help="new folder to write (default: runs/ and the time)")
        sub.add_argument(
            "--preset", choices=tuple(PRESETS), default="tiny",
            help="set of defaults. tiny: for a laptop's CPU; small: GPT-2-sized, for a GPU (default: tiny)",
        )  # fmt: skip
        sub.add_argument(
            "--checkpoint-every", type=int, default=EVERY, metavar="N",
            help="iterations between two checkpoints, from which --resume goes on; of a fit ten times as many steps "
            f"(default: {EVERY})",
        )  # fmt: skip
        for section, names in USES[name].items():
            add_settings(sub, section, names, tuple(METHODS) if name == "run" else ("ppo",))
    if {"prompts", "preferences"}.intersection(sources):
        help = "read plain prompts as a user's messages, by the model's chat template"
        sub.add_argument("--chat", action="store_true", default=None, help=help)
    if "eval_prompts" in sources:
        help = "tensorboard, trackio, wandb or another tracker of accelerate's; may be given several times"
        sub.add_argument("--log-with", action="append", metavar="NAME", help=help)
    if "eval_preferences" in sources:
        sub.add_argument(
            "--long-pairs", choices=("drop", "cut", "refuse"), default="drop",
            help="what becomes of a pair of texts longer than the model's context (default: drop)",
        )  # fmt: skip
    if sources:
        sub.add_argument(
            "--threads", type=int, metavar="N",
            help="of the CPU (default: 1 with the tiny world's own models, else as many as PyTorch takes)",
        )  # fmt: skip
    return sub


def add_run_options(run: Parser) -> None:
    """What `run` alone takes."""
    run.add_argument(
        "--method", choices=tuple(METHODS), default="ppo",
        help="how the base model is aligned; options that the method does not read are refused (default: ppo)",
    )  # fmt: skip
    run.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="continue the run in this folder that was stopped, whichever command began it, as it began",
    )
    run.add_argument(
        "--opening-words", type=int, default=OPENING_WORDS, metavar="N",
        help=f"words of a --corpus line that make a prompt; 0: the begin token alone (default: {OPENING_WORDS})",
    )  # fmt: skip


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(
        prog="python -m rlhf_lessons", description=ABOUT, epilog=f"examples:\n{EXAMPLES['']}",
        usage="python -m rlhf_lessons COMMAND [options]",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"rlhf_lessons {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    run = add_command(
        commands, "run", "the whole pipeline, from text to an aligned model and its report",
        "corpus", "preferences", "eval_preferences", "prompts", "eval_prompts", "model", "reward_model", "score",
    )  # fmt: skip
    add_run_options(run)
    add_command(commands, "pretrain", "train a language model from scratch on text", "corpus")
    add_command(
        commands, "reward", "train a reward model on preferences, from a language model's trunk",
        "model", "preferences", "eval_preferences",
    )  # fmt: skip
    ppo = add_command(
        commands, "ppo", "PPO from a language model and a reward",
        "prompts", "eval_prompts", "model", "reward_model", "score",
    )  # fmt: skip
    for sub in (run, ppo):
        sub.add_argument(
            "--critic", choices=CRITICS,
            help="whether PPO's critic shares the policy's trunk or has its own (default: shared)",
        )  # fmt: skip
        sub.add_argument(
            "--sampler", choices=("plain", "static", "vllm"), default="plain",
            help="how responses are drawn; static: fixed shapes, on a GPU in a CUDA graph; vllm: by that engine, in "
            "the environment that `make vllm` sets up (default: plain)",
        )  # fmt: skip
    sample = add_command(
        commands, "sample", "responses of a model before and after PPO, side by side, with scores",
        "prompts", "model", "reward_model", "score",
    )  # fmt: skip
    sample.add_argument("--policy", metavar="MODEL", help="the model after PPO (default: the tiny world's)")
    sample.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    sample.add_argument("--count", type=int, default=8, metavar="N", help="responses to show (default: 8)")
    sample.add_argument("--max-new-tokens", type=int, metavar="N", default=24, help="longest response (default: 24)")
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice and the sampling (default: 0)")
    table = add_command(commands, "summary", "runs as a Markdown table, a row each")
    table.usage = f"{table.prog} FOLDER [FOLDER ...]"
    table.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help="folders of runs")
    comparison = add_command(commands, "compare", "in what runs differ, and what came of it: a table, and their curves")
    comparison.usage = f"{comparison.prog} FOLDER FOLDER [FOLDER ...] [--out FILE]"
    comparison.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help="folders of runs, stopped ones too")
    help = "new picture (.png) of their curves, one over another (default: comparison.png)"
    comparison.add_argument("--out", type=Path, metavar="FILE", default=Path("comparison.png"), help=help)
    solved = add_command(
        commands, "progress", "the exercises and hunts of your copy of the lessons, and which are solved"
    )
    solved.usage = f"{solved.prog} [FOLDER]"
    solved.add_argument(
        "lessons", nargs="?", type=Path, metavar="FOLDER", default=Path("lab"),
        help="the copy that `make lab` made (default: lab)",
    )  # fmt: skip
    return parser


def method_of(arguments: argparse.Namespace) -> str:
    """The method that a command runs."""
    return getattr(arguments, "method", "ppo")


def critic_of(arguments: argparse.Namespace) -> str | None:
    """Which critic a command trains; None where it trains none."""
    trains = arguments.command in ("run", "ppo") and method_of(arguments) == "ppo"
    return (arguments.critic or CRITICS[0]) if trains else None


def check_given(arguments: argparse.Namespace) -> None:
    """Raise ValueError for an option that the command, beside the others, would not read: given is used, or refused."""
    values, method = vars(arguments), method_of(arguments)
    given = {k for k, v in values.items() if v is not None and (k, v) != ("opening_words", OPENING_WORDS)}
    kinds = {name: {*OWN.get(name, ()), *(item.name for item in fields(kind))} for name, kind in METHODS.items()}
    for name in values:  # in the order of the help
        readers = [other for other, read in kinds.items() if name in read]
        if name in given and readers and method not in readers:
            raise ValueError(f"give --{typed(name)} with --method {' or '.join(readers)}: {method} does not read it")
    if method == "dpo" and "corpus" in given and "preferences" not in given:
        raise ValueError("give --preferences with --corpus: DPO learns from them, and the tiny world has none")
    if method == "dpo" and values["sampler"] == "vllm":
        raise ValueError("give --sampler plain or static with --method dpo: its fit hands an engine no weights")
    if values["command"] == "pretrain":
        given &= {"corpus", "vocab_size"}  # it reads the other sizes without a corpus too
    for names, needed, others, why in READ:
        for name in filter(given.__contains__, names):
            for other in filter(given.__contains__, others):
                if method == "dpo" and (name, other) in BOTH:
                    continue
                raise ValueError(f"give --{typed(name, other)}, not both: {why}")
            if values.keys() & needed and not given.intersection(needed):
                one = typed(*filter(values.__contains__, needed))
                raise ValueError(f"give --{one} with --{typed(name)}: {why}")


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The preset's settings with what was given on the command line in their place.

    Raises ValueError for an option out of range or out of place.
    """
    check_given(arguments)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return make_settings(method_of(arguments), PRESETS[arguments.preset] | given)
