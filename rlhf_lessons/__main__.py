"""The commands: `python -m rlhf_lessons COMMAND --help`.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import argparse
import contextlib
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf_lessons.app.options import EXIT_ERROR, build_parser, check_given, settings_from

EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141  # as of a program that the system ends because nobody reads what it prints


def run_stage(arguments: argparse.Namespace) -> None:
    """`run`, `pretrain`, `reward` or `ppo`, into one folder."""
    from rlhf_lessons.app import inputs, pipeline, resume
    from rlhf_lessons.app.run_folder import RunFolder
    from rlhf_lessons.app.trackers import tracked
    from rlhf_lessons.device import end_processes, keep_freed_memory, make_accelerator, told, use_threads
    from rlhf_lessons.display import say

    going_on = getattr(arguments, "resume", None)
    if going_on:
        arguments = resume.original(arguments, build_parser().parse_args)
    keep_freed_memory()
    use_threads(threads_of(arguments))
    settings = settings_from(arguments)
    make_accelerator(settings.method.device)  # from here on the processes, if there are several, know of each other
    out = told(arguments.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S"))[0]
    folder = RunFolder(out, new=not going_on, every=arguments.checkpoint_every)
    say(f"run folder: {folder.path}")
    found = inputs.resolve(arguments)
    described = pipeline.describe(found, settings, arguments)
    if going_on:
        resume.check_unchanged(arguments.begun, described)
    followed = tracked({*(getattr(arguments, "log_with", None) or ())}, folder.path, device=settings.method.device)
    made = folder.path
    try:
        with contextlib.ExitStack() as held:
            if folder.first:
                held.enter_context(folder.in_use())
                if not going_on:
                    folder.write_config(described, arguments.words)
                folder.follow = held.enter_context(followed)
            if arguments.command == "pretrain":
                made = Path(pipeline.pretrain(found, settings, folder).name)
            elif arguments.command == "reward":
                made = Path(pipeline.fit_reward(found, found.model, settings, folder).name)
            elif summary := pipeline.run(found, settings, folder, arguments):  # in the first process
                print_summary(made, summary)
    except BaseException:
        if folder.state.exists():
            say(f"\nrun --resume {folder.path} goes on from the last checkpoint")
        raise
    end_processes()
    page = made / "report.html"
    print(f"\nwritten to {made}" + (f"; {page} shows it in a browser" if page.exists() else ""))


def threads_of(arguments: argparse.Namespace) -> int | None:
    """The threads asked for. The tiny world takes one: it gains little by a second and, beside other work, loses much.

    And on one thread a seed gives everybody with such a processor the same numbers.
    """
    tiny = all(getattr(arguments, name, None) is None for name in ("model", "corpus"))
    return 1 if arguments.threads is None and tiny else arguments.threads


def print_summary(folder: Path, summary: dict[str, Any]) -> None:
    """What came of the run: its samples, then before and after."""
    print((folder / "samples.md").read_text(encoding="utf-8"))
    before, after = summary["before"], summary["after"]
    print(f"KL from the reference: {after['kl']:.1f} nats per response, at the end")
    for where, on in (("", ""), ("eval_", " on the evaluation prompts")):
        for name, label in ((where + "score", "proxy reward"), (where + "gold", "gold reward")):
            if name in after:
                print(f"{label}{on}: {before[name]:.2f} before, {after[name]:.2f} after")


def show_samples(arguments: argparse.Namespace) -> None:
    """`sample`: two models' responses to the same prompts."""
    from rlhf_lessons.app import inputs, pipeline
    from rlhf_lessons.app.run_folder import samples_table
    from rlhf_lessons.device import use_threads

    check_given(arguments)
    use_threads(threads_of(arguments))
    print(samples_table(pipeline.side_by_side(inputs.resolve(arguments), arguments)))


def show_summary(arguments: argparse.Namespace) -> None:
    """`summary`: a table of runs."""
    from rlhf_lessons.app.run_folder import summary_table

    print(summary_table(arguments.runs))


def show_comparison(arguments: argparse.Namespace) -> None:
    """`compare`: in what runs differ, as a table, and a picture of their curves."""
    from rlhf_lessons.app.comparison import compare

    print(compare(arguments.runs, arguments.out))
    print(f"\nwritten to {arguments.out}")


def write_hand_over(arguments: argparse.Namespace) -> None:
    """`hand-over`: a run's folder for another engine."""
    from rlhf_lessons.app.hand_over import hand_over

    folder = hand_over(arguments.run, arguments.to, arguments.out)
    print(f"\nwritten to {folder}; its README.md says how to go on")


def show_progress(arguments: argparse.Namespace) -> None:
    """`progress`: a table of what a learner has solved."""
    from rlhf_lessons.record import progress_table

    print(progress_table(arguments.lessons))


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


def print_anywhere() -> None:
    """Let every console print what it can: a character that its encoding lacks comes out as its number."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def one_of_the_others() -> bool:
    """Whether a launcher started several processes and this is not the first, which alone speaks."""
    return "LOCAL_RANK" in os.environ and os.environ["RANK"] != "0"


def wait_for_the_launcher(error: BaseException) -> None:
    """Of several processes: leave it to the one in which an error began to say so; their launcher then ends all.

    The first says at once what befalls all; another says later what befell itself alone, and nobody that it is missed.
    """
    if one_of_the_others() or "Connection closed by peer" in str(error):
        time.sleep(5)
        sys.stderr = sys.__stderr__


def run_command(argv: list[str] | None) -> None:
    """Run a command, and hand over all that was printed, a help text too."""
    try:
        arguments = build_parser().parse_args(argv)
        arguments.words = sys.argv[1:] if argv is None else argv
        others = {"sample": show_samples, "summary": show_summary, "compare": show_comparison}
        others |= {"progress": show_progress, "hand-over": write_hand_over}
        if arguments.command not in others or not one_of_the_others():
            others.get(arguments.command, run_stage)(arguments)
    finally:
        flush()


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns 0, or 2 after one line on what was wrong, 130 when interrupted, 141 when nobody reads."""
    print_anywhere()
    if one_of_the_others():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    try:
        run_command(argv)
    except BrokenPipeError:
        return EXIT_UNREAD
    except KeyboardInterrupt:
        exec("")  # Python forgets an interruption inside such a call only at the next one, else it ends by a signal
        print("\nstopped; what was written so far is complete and can be read", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (Exception, SystemExit) as error:  # the latter is argparse's, which has spoken
        wait_for_the_launcher(error)
        message = explain(error)
        if message is None:
            raise
        print(f"\nerror: {message}", file=sys.stderr)
        return EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
