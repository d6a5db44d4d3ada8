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

HELP = {file.stem: file.read_text(encoding="utf-8") for file in Path(__file__).with_name("help").glob("*.txt")}

SOURCES = {  # what is one's own -> its type, how its value is called, what it is
    "corpus": (Path, "FILE", "text to learn to write from, one document a line; a base model is trained on it"),
    "preferences":
        (Path, "FILE", "JSON lines with prompt, chosen, rejected (or chats) for a reward model to learn from"),
    "eval_preferences": (Path, "FILE", "the same, held out to measure the reward model on"),
    "prompts":
        (Path, "FILE", "what PPO has continued: one prompt a line, or JSON lines (.jsonl) with prompt, or a chat"),
    "eval_prompts": (Path, "FILE", "the same, held out: the policy answers each before, between and after the updates"),
    "model": (str, "MODEL", "language model to start from: a folder or hub name (safetensors)"),
    "reward_model": (str, "MODEL", "reward model that PPO maximises: a folder or hub name (safetensors)"),
    "score": (str, "MODULE:FUNCTION", "a reward of your own for PPO to maximise: a function of prompts and responses, "
              "two lists of texts, that returns a number for each"),
}  # fmt: skip
CRITICS = ("shared", "separate")
STAGE = {  # what each command that makes a run's folder takes
    "out": dict(type=Path, metavar="FOLDER", help="new folder to write (default: runs/ and the time)"),
    "preset": dict(choices=tuple(PRESETS), default="tiny", help="set of defaults. tiny: for a laptop's CPU; "
                   "small: GPT-2-sized, for a GPU (default: tiny)"),
    "checkpoint_every": dict(type=int, default=EVERY, metavar="N", help="iterations between two checkpoints, from "
                             f"which --resume goes on; of a fit ten times as many steps (default: {EVERY})"),
}  # fmt: skip
OTHERS = {  # what some commands take, which is no setting of a stage
    "chat": dict(action="store_true", default=None,
                 help="read plain prompts as a user's messages, by the model's chat template"),
    "log_with": dict(action="append", metavar="NAME", help="tensorboard, trackio, wandb or another tracker of "
                     "accelerate's; may be given several times"),
    "long_pairs": dict(choices=("drop", "cut", "refuse"), default="drop",
                       help="what becomes of a pair of texts longer than the model's context (default: drop)"),
    "threads": dict(type=int, metavar="N", help="of the CPU (default: 1 with the tiny world's own models, else as many "
                    "as PyTorch takes)"),
    "method": dict(choices=tuple(METHODS), default="ppo", help="how the base model is aligned; options that the method "
                   "does not read are refused (default: ppo)"),
    "resume": dict(type=Path, metavar="FOLDER", help="continue the run in this folder that was stopped, whichever "
                   "command began it, as it began"),
    "opening_words": dict(type=int, default=OPENING_WORDS, metavar="N", help="words of a --corpus line that make a "
                          f"prompt; 0: the begin token alone (default: {OPENING_WORDS})"),
    "critic": dict(choices=CRITICS,
                   help="whether PPO's critic shares the policy's trunk or has its own (default: shared)"),
    "sampler": dict(choices=("plain", "static"), default="plain",
                    help="how responses are drawn; static: fixed shapes, on a GPU in a CUDA graph (default: plain)"),
    "policy": dict(metavar="MODEL", help="the model after PPO (default: the tiny world's)"),
    "prompt": dict(action="append", metavar="TEXT", help="a prompt; may be given several times"),
    "count": dict(type=int, default=8, metavar="N", help="responses to show (default: 8)"),
    "max_new_tokens": dict(type=int, default=24, metavar="N", help="longest response (default: 24)"),
    "seed": dict(type=int, default=0, metavar="N", help="of the choice and the sampling (default: 0)"),
    "runs": dict(nargs="+", type=Path, metavar="FOLDER", help="folders of runs, stopped ones too"),
    "picture": dict(option="out", type=Path, metavar="FILE", default=Path("comparison.png"),
                    help="new picture (.png) of their curves, one over another (default: comparison.png)"),
    "lessons": dict(nargs="?", type=Path, metavar="FOLDER", default=Path("lab"),
                    help="the copy that `make lab` made (default: lab)"),
}  # fmt: skip
COMMANDS = {  # what it does, how it is typed, what of SOURCES and of OTHERS it takes
    "run": ("the whole pipeline, from text to an aligned model and its report", "[options]",
            "corpus preferences eval_preferences prompts eval_prompts model reward_model score",
            "chat log_with long_pairs threads method resume opening_words critic sampler"),
    "pretrain": ("train a language model from scratch on text", "[options]", "corpus", "threads"),
    "reward": ("train a reward model on preferences, from a language model's trunk", "[options]",
               "model preferences eval_preferences", "chat long_pairs threads"),
    "ppo": ("PPO from a language model and a reward", "[options]",
            "prompts eval_prompts model reward_model score", "chat log_with threads critic sampler"),
    "sample": ("responses of a model before and after PPO, side by side, with scores", "[options]",
               "prompts model reward_model score", "chat threads policy prompt count max_new_tokens seed"),
    "summary": ("runs as a Markdown table, a row each", "FOLDER [FOLDER ...]", "", "runs"),
    "compare": ("in what runs differ, and what came of it: a table, and their curves",
                "FOLDER FOLDER [FOLDER ...] [--out FILE]", "", "runs picture"),
    "progress": ("the exercises and hunts of your copy of the lessons, and which are solved", "[FOLDER]", "",
                 "lessons"),
}  # fmt: skip


MACHINE = ("seed", "device", "precision")  # settings of a method that the fits before it share
USES = {  # command -> the settings that it reads, section by section; None for all of a section's
    "run": {"pretrain": None, "reward": None, "model": None, "method": None},
    "pretrain": {"pretrain": None, "method": MACHINE},
    "reward": {"reward": None, "method": MACHINE},
    "ppo": {"model": None, "method": None},
}
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
METAVARS = {int: "N", float: "X", str: "NAME"}
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
    found: dict[str, dict[str, Any]] = {}  # name of a setting -> whose it is -> the field
    for owner, kind in kinds.items():
        for item in fields(kind):
            found.setdefault(item.name, {})[owner] = item
    groups: dict[str, Any] = {}
    for name in found if names is None else filter(names.__contains__, found):
        owners, item = found[name], next(iter(found[name].values()))
        title = "where and from which seed" if names else TITLES.get(section) or ", ".join(owners)
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        others = {owner: shown(other.default) for owner, other in owners.items()}
        others |= {preset: shown(given[name]) for preset, given in PRESETS.items() if name in given}
        default = shown(item.default)
        said = "".join(f"; {whose}: {value}" for whose, value in others.items() if value != default)
        kind = float if item.default is None else type(item.default)
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=METAVARS[kind])
        help = f"{item.metadata['help']} (default: {default}{said})".replace("%", "%%")
        group.add_argument("--" + typed(name), default=None, help=help, **how)


def add_option(group: Any, name: str, *, option: str = "", nargs: str | None = None, **how: Any) -> None:
    """One option, typed by its name or another; or, with a number of values that are taken, what needs no option."""
    words, how = ("--" + typed(option or name), how) if nargs is None else (name, how | {"nargs": nargs})
    group.add_argument(words, **how)


def add_command(commands: Any, name: str) -> None:
    """One command with the options that it uses."""
    help, usage, sources, others = COMMANDS[name]
    prog, stage = f"python -m rlhf_lessons {name}", name in USES
    sub = commands.add_parser(
        name, prog=prog, usage=f"{prog} {usage}", help=help, description=help[0].upper() + help[1:] + ".",
        epilog=HELP[name] + (HELP["run_folder"] if stage else ""),
    )  # fmt: skip
    group = sub.add_argument_group("your own data and models (the tiny world's where not given)")
    for source in sources.split():
        add_option(group, source, **dict(zip(("type", "metavar", "help"), SOURCES[source], strict=True)))
    for option, how in STAGE.items() if stage else ():
        add_option(sub, option, **how)
    for section, names in USES[name].items() if stage else ():
        add_settings(sub, section, names, tuple(METHODS) if name == "run" else ("ppo",))
    for option in others.split():
        add_option(sub, option, **OTHERS[option])


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(
        prog="python -m rlhf_lessons", description=HELP["about"], epilog=HELP["commands"],
        usage="python -m rlhf_lessons COMMAND [options]",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"rlhf_lessons {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name in COMMANDS:
        add_command(commands, name)
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
