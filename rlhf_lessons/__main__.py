"""The commands: `python -m rlhf_lessons COMMAND --help`.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import argparse
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

from rlhf_lessons.parser import EXIT_ERROR, build_parser

EXIT_INTERRUPTED = 130


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
    from rlhf_lessons.report import RunFolder, say

    given = vars(arguments)
    sources = stages.Sources(**{f.name: given.get(f.name) for f in fields(stages.Sources)})
    stage_config, ppo = settings_from(arguments)
    folder = RunFolder(arguments.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S"))
    say(f"run folder: {folder.path}")
    if arguments.command == "pretrain":
        stages.begin(sources, stage_config, ppo, folder)
        made = stages.pretrain(sources, stage_config, ppo, folder)
    elif arguments.command == "reward":
        stages.begin(sources, stage_config, ppo, folder)
        made = stages.fit_reward(sources, sources.model or stages.ASSETS / "base", stage_config, ppo, folder)
    else:
        if arguments.command == "ppo" and sources.reward_model is None and sources.score is None:
            sources = replace(sources, reward_model=str(stages.ASSETS / "reward_model"))
        print_summary(folder.path, stages.run(sources, stage_config, ppo, folder, arguments.critic))
        made = folder.path
    print(f"\nwritten to {made}")


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
    from rlhf_lessons.report import samples_table

    print(samples_table(stages.side_by_side(
        stages.Sources(
            prompts=arguments.prompts, model=arguments.model, reward_model=arguments.reward_model, score=arguments.score
        ),
        policy=arguments.policy, prompts=arguments.prompt, count=arguments.count,
        max_new_tokens=arguments.max_new_tokens, seed=arguments.seed,
    )))  # fmt: skip


def show_summary(arguments: argparse.Namespace) -> None:
    """`summary`: a table of runs."""
    from rlhf_lessons.report import summary_table

    print(summary_table(arguments.runs))


def explain(error: Exception) -> str | None:
    """One line on what went wrong, or None for an error that is no user's but the program's own."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out of memory: try a smaller --minibatch-size, or more --gradient-accumulation-steps"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return text if isinstance(error, (ValueError, FloatingPointError, OSError)) else None


def flush() -> None:
    """Hand over what was printed. Where that fails, a full disk or a reader that has left, print no more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again at its end
        raise


def run_bench(arguments: argparse.Namespace) -> None:
    """`bench`: measurements."""
    from rlhf_lessons import bench

    bench.main(arguments)


def remake(arguments: argparse.Namespace) -> None:
    """`assets` and `figures`: what is shipped and committed, made anew."""
    from rlhf_lessons import record

    if arguments.command == "figures":
        record.figures(arguments.out)
    elif not record.rebuild_assets(arguments.out):
        raise ValueError(f"the models rebuilt in {arguments.out} do not behave as the shipped ones")


def show_equations(arguments: argparse.Namespace) -> None:
    """`equations`: the map from equations to functions, tests and lessons."""
    from rlhf_lessons.equations import equation_map, equation_table

    print(equation_table(equation_map()))


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns 0, or 2 after one line on what was wrong, or 130 when interrupted."""
    try:
        arguments = build_parser().parse_args(argv)
        commands = {
            "sample": show_samples, "summary": show_summary, "bench": run_bench, "assets": remake, "figures": remake,
            "equations": show_equations,
        }  # fmt: skip
        commands.get(arguments.command, run_stage)(arguments)
        flush()
    except KeyboardInterrupt:
        exec("")  # Python forgets an interruption inside such a call only at the next one, else it ends by a signal
        print("\nstopped; what was written so far is complete and can be read", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"\nerror: {message}", file=sys.stderr)
        return EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
