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
WHAT = dict(line.split(": ", 1) for line in HELP["options"].splitlines())  # option -> what it is

FILE, FOLDER = dict(type=Path, metavar="FILE"), dict(type=Path, metavar="FOLDER")
MODEL, NUMBER = dict(metavar="MODEL"), dict(type=int, metavar="N")
CRITICS, TRAINED = ("shared", "separate"), ("ppo", "rloo", "grpo", "dpo")
# Whom a run can be handed over to -> of which methods.
ENGINES = {"trl": TRAINED, "openrlhf": TRAINED, "verl": TRAINED[:3], "vllm": tuple(METHODS)}
SOURCES = {  # what is one's own, as argparse takes it
    **dict.fromkeys(("corpus", "preferences", "eval_preferences", "prompts", "eval_prompts"), FILE),
    **dict.fromkeys(("model", "reward_model"), MODEL), "score": dict(metavar="MODULE:FUNCTION"),
}  # fmt: skip
OTHERS = {  # what some commands take, which is no setting of a stage
    "out": FOLDER,
    "preset": dict(choices=tuple(PRESETS), default="tiny"),
    "checkpoint_every": dict(default=EVERY, **NUMBER),
    "chat": dict(action="store_true", default=None),
    "log_with": dict(action="append", metavar="NAME"),
    "long_pairs": dict(choices=("drop", "cut", "refuse"), default="drop"),
    "threads": NUMBER,
    "method": dict(choices=tuple(METHODS), default="ppo"),
    "resume": FOLDER,
    "opening_words": dict(default=OPENING_WORDS, **NUMBER),
    "critic": dict(choices=CRITICS),
    "sampler": dict(choices=("plain", "static", "vllm"), default="plain"),
    "policy": MODEL,
    "prompt": dict(action="append", metavar="TEXT"),
    "count": dict(default=8, **NUMBER),
    "max_new_tokens": dict(default=24, **NUMBER),
    "seed": dict(default=0, **NUMBER),
    "runs": dict(nargs="+", **FOLDER),
    "picture": dict(option="out", default=Path("comparison.png"), **FILE),
    "run": dict(nargs=None, **FOLDER),
    "to": dict(choices=tuple(ENGINES), required=True),
    "handed": dict(option="out", **FOLDER),
    "lessons": dict(nargs="?", default=Path("lab"), **FOLDER),
}
STAGE = "out preset checkpoint_every "  # what each takes that makes a run's folder
COMMANDS = {  # how it is typed, what of SOURCES and what of OTHERS it takes
    "run": ("[options]", "corpus preferences eval_preferences prompts eval_prompts model reward_model score",
            STAGE + "chat log_with long_pairs threads method resume opening_words critic sampler"),
    "pretrain": ("[options]", "corpus", STAGE + "threads"),
    "reward": ("[options]", "model preferences eval_preferences", STAGE + "chat long_pairs threads"),
    "ppo": ("[options]", "prompts eval_prompts model reward_model score",
            STAGE + "chat log_with threads critic sampler"),
    "sample": ("[options]", "prompts model reward_model score",
               "chat threads policy prompt count max_new_tokens seed"),
    "summary": ("FOLDER [FOLDER ...]", "", "runs"),
    "compare": ("FOLDER FOLDER [FOLDER ...] [--out FILE]", "", "runs picture"),
    "hand-over": ("--to NAME FOLDER [--out FOLDER]", "", "run to handed"),
    "progress": ("[FOLDER]", "", "lessons"),
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
    (("sampler_correction", "sampler_correction_level", "sampler_cap"), ("sampler",), (),
     "plain and static draw by the policy's own probabilities, which need no weights"),
)  # fmt: skip
# What counts as not given: a default that the parser fills in, and samplers that no other option is for.
NOT_GIVEN = (("opening_words", OPENING_WORDS), ("sampler", "plain"), ("sampler", "static"))
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


def add_option(group: Any, name: str, *, option: str = "", **how: Any) -> None:
    """One option, typed by its name or another; or, with a number of values that are taken, what needs no option."""
    words = name if "nargs" in how else "--" + typed(option or name)
    group.add_argument(words, help=WHAT[name], **how)


def add_command(commands: Any, name: str) -> None:
    """One command with the options that it uses; its help text begins with a line on what it does."""
    usage, sources, others = COMMANDS[name]
    (help, epilog), prog = HELP[name].split("\n", 1), f"python -m rlhf_lessons {name}"
    sub = commands.add_parser(name, prog=prog, usage=f"{prog} {usage}", help=help,
                              description=help[0].upper() + help[1:] + ".",
                              epilog=epilog + (HELP["run_folder"] if name in USES else ""))  # fmt: skip
    group = sub.add_argument_group("your own data and models (the tiny world's where not given)")
    for source in sources.split():
        add_option(group, source, **SOURCES[source])
    for option in others.split():
        add_option(sub, option, **OTHERS[option])
    for section, names in USES.get(name, {}).items():
        add_settings(sub, section, names, tuple(METHODS) if name == "run" else ("ppo",))


def build_parser() -> Parser:
    """All commands and their options."""
    prog = "python -m rlhf_lessons"
    texts = {"usage": f"{prog} COMMAND [options]", "description": HELP["about"], "epilog": HELP["commands"]}
    parser = Parser(prog=prog, **texts)
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
    given = {k for k, v in values.items() if v is not None and (k, v) not in NOT_GIVEN}
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
