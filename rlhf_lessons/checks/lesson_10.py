"""Lesson 10: three seeds aligned by the learner's own PPO, and five faulty runs to tell apart."""

import math
from collections.abc import Sequence

from rlhf_lessons.checks._harness import (
    CORRECT,
    NOT_ATTEMPTED,
    Hint,
    Misconception,
    first_misconception,
    report,
    so_far,
)
from rlhf_lessons.checks.faults import FAULTS, toy_history

# --- Exercise: align a model by your own PPO ----------------------------------------------------

NEEDED = ("score", "gold", "kl")
LAST = 5  # iterations whose mean is what a run ends with


def ending(history: Sequence[dict], name: str) -> float:
    """Mean of a metric over the last iterations."""
    return sum(step[name] for step in history[-LAST:]) / len(history[-LAST:])


def best(history: Sequence[dict], name: str) -> float:
    """Highest mean of a metric over any LAST iterations in a row."""
    return max(ending(history[: end + 1], name) for end in range(LAST - 1, len(history)))


def moved(history: Sequence[dict]) -> bool:
    """Whether the policy has left the reference at all."""
    return ending(history, "kl") >= 0.5


ALIGNED_BY_YOU = (
    Misconception(
        "gold as the training reward",
        lambda h, bar, limit: all(step["score"] == step["gold"] for step in h),
        "score and gold are the same numbers: the run was trained on the gold reward. Nothing may be, or there is "
        "no judge left. Train on the scores of the facts.",
    ),
    Misconception(
        "a negative KL",
        lambda h, bar, limit: ending(h, "kl") < -0.5,
        "The KL is clearly below 0. Its estimate may be for one token, but not as a mean over batches: the "
        "log-probabilities are not those of the policy that sampled (temperature, mask or order of the "
        "difference).",
    ),
    Misconception(
        "no price on the KL",
        lambda h, bar, limit: (
            ending(h, "kl") > limit and ending(h, "gold") < bar and ending(h, "score") > h[0]["score"]
        ),
        "The proxy has climbed, the gold reward has not, and the KL is beyond its limit: the reward model is "
        "being gamed. Is β's share of the reward there on every token, and does the learning rate fall to 0?",
    ),
    Misconception(
        "gold held by luck",
        lambda h, bar, limit: ending(h, "kl") > limit and ending(h, "gold") >= bar,
        "The gold reward is above the bar, but the KL is beyond its limit: so far from the reference nothing "
        "vouches for the proxy. Ask the same of a policy that is held nearer, by β or by fewer epochs.",
    ),
    Misconception(
        "the peak taken for the end",
        lambda h, bar, limit: best(h, "gold") >= bar > ending(h, "gold"),
        "The gold reward was above the bar on the way and is below it at the end. What counts is what the run "
        "ends with. Does the learning rate fall to 0, and does a missing EOS cost something?",
    ),
    Misconception(
        "hardly moved",
        lambda h, bar, limit: not moved(h) and ending(h, "gold") < bar,
        "The policy has hardly left the reference: the KL is near 0, and nothing has improved. Does the optimiser "
        "hold the policy's parameters, and is its step called?",
    ),
    Misconception(
        "gold without a KL",
        lambda h, bar, limit: not moved(h) and ending(h, "gold") >= bar,
        "Gold above the bar with a KL near 0: a policy that has not moved cannot have improved by so much. Was kl "
        "or gold measured against another model than the base model?",
    ),
    Misconception(
        "nothing learned",
        lambda h, bar, limit: ending(h, "score") <= h[0]["score"],
        "The proxy has not climbed: whatever the gold reward says, the run learned nothing from its reward model. "
        "Look at the sign of the advantages and at the learning rate.",
    ),
    Misconception(
        "stopped halfway",
        lambda h, bar, limit: ending(h, "gold") < bar and ending(h, "gold") >= best(h, "gold") - 1e-9,
        "The gold reward was still climbing when the run ended below the bar: were there enough iterations and epochs?",
    ),
)


def aligned_by_you(runs: Sequence, *, gold_bar: float = 1.2, max_kl: float = 6.0, seeds: int = 3) -> None:
    """Lesson 10: runs of several seeds, each of which ends with the gold reward above a bar and the KL below a limit.

    runs: for each seed its history, drawn one after the other: a dict per iteration with score, gold and kl (nats per
    response). NotImplemented or None, for all or in one's place, is "not attempted yet". Means over the last 5
    iterations count. Prints "correct" or raises AssertionError with a hint.
    """
    done = []
    for run in (None,) if runs is NotImplemented or runs is None else runs.values() if isinstance(runs, dict) else runs:
        if run is NotImplemented or run is None:  # those that follow are not asked for
            report("aligned_by_you", NOT_ATTEMPTED)
            return
        done.append(run)
    if done and isinstance(done[0], dict):
        raise Hint(f"One history is not enough: a list of {seeds} is wanted, one for each seed.")
    if len(done) < seeds:
        raise Hint(f"One lucky seed proves little: {seeds} runs are wanted; got {len(done)}.")
    for seed, history in enumerate(done):
        try:
            judge(history, gold_bar, max_kl)
        except Hint as hint:
            raise Hint(f"Run {seed}: {hint}") from None
    report("aligned_by_you", CORRECT)


def judge(history: Sequence[dict[str, float]], gold_bar: float, max_kl: float) -> None:
    """Raise a hint unless this run ends above the bar and below the limit."""
    check_history(history)
    first_misconception(ALIGNED_BY_YOU, history, gold_bar, max_kl)
    gold = ending(history, "gold")
    if gold < gold_bar:
        raise Hint(
            f"The gold reward ends at {gold:.2f}, below the bar of {gold_bar:g}, with the proxy at "
            f"{ending(history, 'score'):.2f} and a KL of {ending(history, 'kl'):.1f} nats. What differs from the "
            "lesson's settings?"
        )


def check_history(history: object) -> None:
    """Raise AssertionError unless this is a run's metrics, long enough to have an end."""
    if not isinstance(history, list | tuple) or not all(isinstance(step, dict) for step in history):
        raise Hint(f"A run's history is wanted, a list of dicts; got {type(history).__name__}.")
    if len(history) < 2 * LAST:
        raise Hint(f"A run of at least {2 * LAST} iterations is wanted, so that it has an end; got {len(history)}.")
    for number, step in enumerate(history, start=1):
        if missing := [name for name in NEEDED if name not in step]:
            advice = ": add it in the loop, metrics['gold'] = ..." if "gold" in missing else ""
            raise Hint(f"Iteration {number} has no {', '.join(missing)}{advice}.")
        for name in NEEDED:
            if not math.isfinite(step[name]):
                raise Hint(f"{name} is {step[name]} in iteration {number}: the run has broken down before its end.")


# --- Bug hunt: one of five planted faults ------------------------------------------------------

EXPLAINS = (
    "A, kl_sign: leaving the reference is paid for, so the reward lies above the score. With no price on it the policy "
    "went further than the healthy one, and in a short run the proxy still points the right way there: gold is higher, "
    "too.",
    "B, critic_not_trained: V stays 0, so every advantage carries the whole noise of the score. It learns, but slowly.",
    "C, score_lost: nothing pays for anything, so nothing moves.",
    "D, wrong_temperature: the log judges colder samples than the policy at temperature 1 would write, and those are "
    "its likelier, better paid texts. Gold beats the healthy run's, but it is not the gold of the policy that is "
    "scored, and the ratio says so before the first step.",
    "E, entropy_sign: the policy writes one text, the best word ten times. The proxy is 10, the highest there is, and "
    "gold only 1, for nine of the ten are repetitions.",
    "So two faults (A and D) beat the healthy run in gold, and two (D and E) by far in score: a good end does not show "
    "that a run is right. The invariants do.",
)
PLANTED = {"A": "kl_sign", "B": "critic_not_trained", "C": "score_lost", "D": "wrong_temperature", "E": "entropy_sign"}


def healthy_run() -> list[dict[str, float]]:
    """The metrics of the toy run without a fault, a dict per iteration."""
    return [dict(step) for step in toy_history(None)]


def faulty_runs() -> dict[str, list[dict[str, float]]]:
    """The metrics of five toy runs, a letter each, every one with another of `FAULTS` planted in it."""
    return {letter: [dict(step) for step in toy_history(fault)] for letter, fault in PLANTED.items()}


def diagnose(answers: dict) -> None:
    """Lesson 10: which fault is in which run. answers: {"A": name of a fault or None, ... "E": ...}.

    The names are those of `FAULTS`. Prints "not attempted yet" or "correct", or raises AssertionError with the symptom
    that the named fault would show and the run does not.
    """
    if not isinstance(answers, dict):
        raise Hint(f"answers must be the dict of the cell above; got {type(answers).__name__}.")
    if unknown := [str(key) for key in answers if key not in PLANTED]:
        raise Hint(f"No such run: {', '.join(unknown)}. The runs are {', '.join(PLANTED)}.")
    open_ones = [letter for letter in PLANTED if answers.get(letter) is None]
    if len(open_ones) == len(PLANTED):
        report("diagnose", NOT_ATTEMPTED)
        return
    for letter, fault in PLANTED.items():
        said = answers.get(letter)
        if said is None or said == fault:
            continue
        if said not in FAULTS:
            raise Hint(f"{letter}: {said!r} is not one of {', '.join(FAULTS)}.")
        raise Hint(f"Run {letter} is not {said}: with that you would see {FAULTS[said].symptom}.")
    report("diagnose", so_far(open_ones), "\n".join(EXPLAINS))
