"""The command line: what each command takes, and the help that a newcomer reads."""

import argparse
from dataclasses import fields
from pathlib import Path

EXIT_ERROR = 2

ABOUT = """\
RLHF with PPO on a small language model, all of it: a base model learns to write from text, a reward model learns
from preferences which of two answers is better, and PPO trains the base model to be rewarded without straying far
from where it began. Without options everything is the tiny world's: short movie reviews, simulated annotators, and
a gold reward that nobody trains on, by which reward hacking is seen. That takes minutes on a laptop's CPU.
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
    "bench": """\
  OMP_NUM_THREADS=1 python -m rlhf_lessons bench
  python -m rlhf_lessons bench --parts gae sampling --out /tmp
  python -m rlhf_lessons bench --gpu
""",
    "summary": """\
  python -m rlhf_lessons summary runs/*
""",
    "equations": """\
  python -m rlhf_lessons equations
""",
    "assets": """\
  python -m rlhf_lessons assets --out runs/assets
""",
    "figures": """\
  python -m rlhf_lessons figures
""",
}

RUN_FOLDER = """
The folder that --out names then holds config.json (all settings), metrics.jsonl (a line per iteration), summary.json,
samples.md (before and after), figures/*.png (reward, KL, entropy, clip fraction, explained variance) and the models,
as Hugging Face checkpoints. What a stopped run has written can be read; only a finished one has a summary.json.
"""

SOURCES = {  # option -> its type, how its value is called, what it is
    "corpus": (Path, "FILE", "text to learn to write from, one document a line; a base model is trained on it"),
    "preferences": (Path, "FILE", "JSON lines with prompt, chosen, rejected, to train a reward model on"),
    "eval_preferences": (Path, "FILE", "the same, held out to measure the reward model on"),
    "prompts": (Path, "FILE", "what PPO has continued: one prompt a line, or (.jsonl) JSON lines with prompt"),
    "model": (str, "MODEL", "language model to start from: a folder or hub name (safetensors)"),
    "reward_model": (str, "MODEL", "reward model that PPO maximises: a folder or hub name (safetensors)"),
    "score": (
        str,
        "MODULE:FUNCTION",
        "a reward of your own for PPO to maximise: a function of prompts and responses, two lists of texts, "
        "that returns a number for each",
    ),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and a pointer to the help, not its whole usage."""

    def __init__(self, **options) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        self.exit(EXIT_ERROR, f"error: {message}\nsee {self.prog} --help\n")


def shown(value) -> str:
    """A default as help shows it."""
    if value is None or isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def add_settings(parser: argparse.ArgumentParser, title: str, presets: dict) -> None:
    """One option per field of a settings dataclass; the preset's value stands where none is given."""
    group = parser.add_argument_group(title)
    for item in fields(presets["tiny"]):
        option = "--" + item.name.replace("_", "-")
        default, *others = (shown(getattr(preset, item.name)) for preset in presets.values())
        differs = "".join(f"; {name}: {o}" for name, o in zip(list(presets)[1:], others, strict=True) if o != default)
        help = f"{item.metadata['help']} (default: {default}{differs})".replace("%", "%%")
        if isinstance(item.default, bool):
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=help)
        else:
            kind = float if item.default is None else type(item.default)
            name = {int: "N", float: "X", str: "NAME"}[kind]
            group.add_argument(option, type=kind, default=None, metavar=name, help=help)


def add_sources(parser: argparse.ArgumentParser, *names: str) -> None:
    """The options that name what the learner brings; without them the tiny world serves."""
    group = parser.add_argument_group("your own data and models (the tiny world's where not given)")
    for name in names:
        kind, metavar, help = SOURCES[name]
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=help)


def add_command(commands, name: str, help: str, *sources: str, ppo: bool = True) -> argparse.ArgumentParser:
    """One command with its options; with `ppo` those of a run, too."""
    from rlhf_lessons.stages import PRESETS

    epilog = f"examples:\n{EXAMPLES[name]}{RUN_FOLDER if ppo else ''}"
    prog = f"python -m rlhf_lessons {name}"
    sub = commands.add_parser(
        name, prog=prog, usage=f"{prog} [options]", help=help, description=help[0].upper() + help[1:] + ".",
        epilog=epilog,
    )  # fmt: skip
    if sources:
        add_sources(sub, *sources)
    if ppo:
        sub.add_argument("--out", type=Path, metavar="FOLDER", help="new folder to write (default: runs/ and the time)")
        sub.add_argument(
            "--preset", choices=tuple(PRESETS), default="tiny",
            help="set of defaults. tiny: for a laptop's CPU; small: GPT-2-sized, for a GPU (default: tiny)",
        )  # fmt: skip
        for number, title in enumerate(("sizes and fits before PPO", "PPO")):
            add_settings(sub, title, {preset: settings[number] for preset, settings in PRESETS.items()})
    return sub


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(
        prog="python -m rlhf_lessons", description=ABOUT, epilog=f"examples:\n{EXAMPLES['']}",
        usage="python -m rlhf_lessons COMMAND [options]",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    whole = add_command(commands, "run", "the whole pipeline, from text to an aligned model and its report", *SOURCES)
    add_command(commands, "pretrain", "train a language model from scratch on text", "corpus")
    add_command(
        commands, "reward", "train a reward model on preferences, from a language model's trunk",
        "model", "preferences", "eval_preferences",
    )  # fmt: skip
    alone = add_command(
        commands, "ppo", "PPO from a language model and a reward", "prompts", "model", "reward_model", "score"
    )
    for sub in (whole, alone):
        sub.add_argument(
            "--critic", choices=("shared", "separate"), default="shared",
            help="whether the critic shares the policy's trunk or has its own (default: shared)",
        )  # fmt: skip

    sample = add_command(
        commands, "sample", "responses of a model before and after PPO, side by side, with scores",
        "prompts", "model", "reward_model", "score", ppo=False,
    )  # fmt: skip
    sample.add_argument("--policy", metavar="MODEL", help="the model after PPO (default: the tiny world's)")
    sample.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    sample.add_argument("--count", type=int, default=8, metavar="N", help="responses to show (default: 8)")
    sample.add_argument("--max-new-tokens", type=int, metavar="N", default=24, help="longest response (default: 24)")
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice and the sampling (default: 0)")
    bench = add_command(commands, "bench", "speed and memory, against peers where they are installed", ppo=False)
    bench.add_argument("--out", type=Path, metavar="FOLDER", help="where bench.json and bench.md go (default: figures)")
    bench.add_argument("--parts", nargs="+", metavar="PART", help="startup, gae, sampling, ppo (default: all)")
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="after a warm-up, at least 3 (default: 5)")
    bench.add_argument("--gpu", action="store_true", help="the GPU's measurements, into figures/gpu")
    table = add_command(commands, "summary", "runs as a Markdown table, a row each", ppo=False)
    table.usage = f"{table.prog} FOLDER [FOLDER ...]"
    table.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help="folders of runs")
    add_command(commands, "equations", "each numbered equation: its function, its tests, its lesson", ppo=False)
    assets = add_command(commands, "assets", "rebuild the shipped models and compare them with those", ppo=False)
    assets.add_argument("--out", type=Path, default=Path("runs/assets"), metavar="FOLDER", help="default: runs/assets")
    figures = add_command(
        commands, "figures", "record missing runs over β and seeds, draw the README's pictures", ppo=False
    )
    figures.add_argument("--out", type=Path, default=Path("figures"), metavar="FOLDER", help="default: figures")
    return parser
