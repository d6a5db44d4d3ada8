"""The commands: `python -m rlhf_lessons COMMAND --help`.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def add_settings(parser: argparse.ArgumentParser, title: str, config) -> None:
    """One option per field of a settings dataclass; the preset's value stands where none is given."""
    group = parser.add_argument_group(title)
    for item in fields(config):
        option = "--" + item.name.replace("_", "-")
        default = item.default
        help = f"{item.metadata['help']} (tiny: {default})".replace("%", "%%")
        if isinstance(default, bool):
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=help)
        else:
            kind = float if default is None else type(default)
            group.add_argument(option, type=kind, default=None, metavar=kind.__name__.upper(), help=help)


def add_sources(parser: argparse.ArgumentParser, *names: str) -> None:
    """The options that name what the learner brings; without them the tiny world serves."""
    described = {
        "corpus": (Path, "text to learn to write from, one document a line"),
        "preferences": (Path, "JSON lines with prompt, chosen, rejected"),
        "eval_preferences": (Path, "the same, held out to measure the reward model on"),
        "prompts": (Path, "one prompt a line, or JSON lines with prompt"),
        "model": (str, "language model to start from: a folder or hub name (safetensors)"),
        "reward_model": (str, "reward model: a folder or hub name (safetensors)"),
        "score": (str, "your own reward, module:function of (prompts, responses), two lists of texts -> numbers"),
    }
    group = parser.add_argument_group("your own data and models (the tiny world's where not given)")
    for name in names:
        kind, help = described[name]
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar=kind.__name__.upper(), help=help)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from rlhf_lessons.stages import StageConfig
    from rlhf_lessons.trainer import PPOConfig

    parser = argparse.ArgumentParser(
        prog="python -m rlhf_lessons",
        description="RLHF with PPO on a small language model: base model, preferences, reward model, PPO, report.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *sources: str, ppo: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        if sources:
            add_sources(sub, *sources)
        if ppo:
            sub.add_argument("--out", type=Path, help="folder to write (default: runs/ and the time)")
            sub.add_argument("--preset", choices=("tiny", "small"), default="tiny",
                             help="tiny: a laptop's CPU; small: GPT-2-sized, for a GPU")  # fmt: skip
            add_settings(sub, "models and fits", StageConfig)
            add_settings(sub, "PPO", PPOConfig)
        return sub

    own = ("corpus", "preferences", "eval_preferences", "prompts", "model", "reward_model", "score")
    whole = command("run", "the whole pipeline, from text to an aligned model and its report", *own)
    command("pretrain", "train a language model from scratch on text", "corpus")
    command("reward", "train a reward model on preferences", "model", "preferences", "eval_preferences")
    alone = command("ppo", "PPO from a language model and a reward model", "prompts", "model", "reward_model", "score")
    for sub in (whole, alone):
        sub.add_argument("--critic", choices=("shared", "separate"), default="shared",
                         help="whether the critic shares the policy's trunk")  # fmt: skip
    sample = command(
        "sample", "before and after, side by side, with scores", "model", "reward_model", "prompts", ppo=False
    )
    sample.add_argument("--policy", help="the aligned model's folder (default: the tiny world's)")
    sample.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    sample.add_argument("--count", type=int, default=8, help="responses to show (default: 8)")
    sample.add_argument("--seed", type=int, default=0)
    table = commands.add_parser(
        "summary", help="finished runs as a Markdown table", description="Finished runs, a row each."
    )
    table.add_argument("runs", nargs="+", type=Path, help="run folders")
    return parser


def settings_from(arguments: argparse.Namespace):
    """The preset's settings with what was given on the command line in their place."""
    from rlhf_lessons.stages import PRESETS

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return tuple(
        replace(config, **{f.name: given[f.name] for f in fields(config) if f.name in given})
        for config in PRESETS[arguments.preset]
    )


def run_stage(arguments: argparse.Namespace) -> None:
    """`run`, `pretrain`, `reward` or `ppo`, into one folder."""
    from datetime import datetime

    from rlhf_lessons import stages
    from rlhf_lessons.report import RunFolder

    given = vars(arguments)
    sources = stages.Sources(**{f.name: given.get(f.name) for f in fields(stages.Sources)})
    stage_config, ppo = settings_from(arguments)
    folder = RunFolder(arguments.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S"))
    base = sources.model or stages.ASSETS / "base"
    if arguments.command == "pretrain":
        stages.pretrain(sources, stage_config, ppo, folder)
    elif arguments.command == "reward":
        stages.fit_reward(sources, base, stage_config, ppo, folder)
    else:
        if arguments.command == "ppo" and sources.reward_model is None and sources.score is None:
            sources = replace(sources, reward_model=str(stages.ASSETS / "reward_model"))
        summary = stages.run(sources, stage_config, ppo, folder, arguments.critic)
        print_summary(folder.path, summary)
    print(f"\nwritten to {folder.path}")


def print_summary(folder: Path, summary: dict) -> None:
    """What came of the run: its samples, then before and after."""
    print((folder / "samples.md").read_text(encoding="utf-8"))
    before, after = summary["before"], summary["after"]
    print(f"KL from the reference: {after['kl']:.1f} nats per response (mean of the last five iterations)")
    for name, label in (("score", "proxy reward"), ("gold", "gold reward")):
        if name in after:
            print(f"{label}: {before[name]:.2f} before, {after[name]:.2f} after")


def show_samples(arguments: argparse.Namespace) -> None:
    """`sample`: two models' responses to the same prompts."""
    from rlhf_lessons import stages
    from rlhf_lessons.models import load_causal_lm, load_reward_model, load_tokenizer
    from rlhf_lessons.report import samples_table

    sources = stages.Sources(prompts=arguments.prompts)
    policy = arguments.policy or stages.ASSETS / "aligned"
    tokenizer = load_tokenizer(policy)
    prompts = arguments.prompt or stages.choose_prompts(sources, stages.StageConfig(), arguments.seed)
    ppo = stages.PPOConfig(seed=arguments.seed)
    samples = stages.compare(
        load_causal_lm(arguments.model or stages.ASSETS / "base"), load_causal_lm(policy), tokenizer, prompts,
        load_reward_model(arguments.reward_model or stages.ASSETS / "reward_model"), ppo,
        gold=arguments.prompts is None, count=arguments.count,
    )  # fmt: skip
    print(samples_table(samples))


def show_summary(arguments: argparse.Namespace) -> None:
    """`summary`: a table of finished runs."""
    from rlhf_lessons.report import summary_table

    print(summary_table(arguments.runs))


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns 0, or 2 after one line on what was wrong, or 130 when interrupted."""
    try:
        arguments = build_parser().parse_args(argv)
        commands = {"sample": show_samples, "summary": show_summary}
        commands.get(arguments.command, run_stage)(arguments)
    except KeyboardInterrupt:
        print("\nstopped; what was written so far is complete and readable", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, FloatingPointError, OSError, MemoryError) as error:
        named = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"\nerror: {named}", file=sys.stderr)
        return EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
