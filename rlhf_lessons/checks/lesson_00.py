"""Lesson 00: who made what in one traced sample. No code, but a table to fill in."""

from collections.abc import Callable

from rlhf_lessons.checks._harness import CORRECT, NOT_ATTEMPTED, Hint, Misconception, first_misconception, report

MODELS = ("policy", "critic", "reward", "reference")
TRACE = {  # what stands in a traced sample -> the model that produced it
    "response": "policy",
    "log_probs": "policy",
    "values": "critic",
    "ref_log_probs": "reference",
    "score": "reward",
}
TRAINED = {"policy", "critic"}


def says(key: str, model: str) -> Callable[[dict], bool]:
    """Whether the answers name this model for this tensor."""
    return lambda answers: answers.get(key) == model


def trains(test: Callable[[set], bool]) -> Callable[[dict], bool]:
    """Whether what the answers say of training fulfils a test on that set; unanswered does not."""
    return lambda answers: answers.get("trained") is not None and test(set(answers["trained"]))


FOUR_MODELS = (
    Misconception(
        "the critic scores",
        says("score", "critic"),
        "score: the critic predicts, at every token, how the response will do; it judges nothing. The one number "
        "for the finished response comes from the model that was trained on comparisons.",
    ),
    Misconception(
        "the reward model values every token",
        says("values", "reward"),
        "values: there is one per token, (B, T), while the reward model gives one per response, (B,). Which model "
        "estimates the rest of the way from each state?",
    ),
    Misconception(
        "the policy is its own reference",
        says("ref_log_probs", "policy"),
        "ref_log_probs: these are log-probabilities of the same tokens under a frozen copy. Under the policy "
        "itself the KL would be 0 for ever.",
    ),
    Misconception(
        "the reference samples",
        says("response", "reference"),
        "response: the reference writes nothing. It only says how likely it would have found the tokens that "
        "another model sampled.",
    ),
    Misconception(
        "old is reference",
        says("log_probs", "reference"),
        "log_probs: these are recorded while sampling, by the model that samples. The reference's have a name of "
        "their own.",
    ),
    Misconception(
        "the reward model samples",
        says("response", "reward"),
        "response: the reward model has no vocabulary head any more, only one output. It cannot write.",
    ),
    Misconception(
        "the critic writes log-probabilities",
        lambda answers: "critic" in (answers.get("log_probs"), answers.get("ref_log_probs")),
        "log-probabilities need a head over the vocabulary; the critic has a head with one output. Who has one?",
    ),
    Misconception(
        "the policy scores itself",
        lambda answers: says("score", "policy")(answers) or says("values", "policy")(answers),
        "A policy gives probabilities of words. Numbers that judge (score) or predict (values) come from other "
        "models, even where they share its trunk.",
    ),
    Misconception(
        "everything trains",
        trains(lambda trained: trained == set(MODELS)),
        "trained: two of the four are frozen during PPO. If the judge moved along, what would be learned?",
    ),
    Misconception(
        "the reward model trains",
        trains(lambda trained: "reward" in trained),
        "trained: the reward model was trained on comparisons before PPO began. Now it only scores.",
    ),
    Misconception(
        "the reference trains",
        trains(lambda trained: "reference" in trained),
        "trained: the reference is the fixed point from which the KL is measured. It is frozen.",
    ),
    Misconception(
        "only the policy trains",
        trains(lambda trained: trained == {"policy"}),
        "trained: the policy is not alone. The advantages need a prediction of the return, and that model learns "
        "from the same batch.",
    ),
    Misconception(
        "only the critic trains",
        trains(lambda trained: trained == {"critic"}),
        "trained: the critic learns, but whose text is to become better?",
    ),
)


def four_models(answers: dict) -> None:
    """Lesson 00: which model made each part of one traced sample, and which models PPO trains.

    answers: {"response": ..., "log_probs": ..., "values": ..., "ref_log_probs": ..., "score": ...}, each "policy",
    "critic", "reward" or "reference"; "trained": a set of them. None stands for not answered. Prints "not attempted
    yet" or "correct", or raises AssertionError with a hint.
    """
    if not isinstance(answers, dict):
        raise Hint(f"answers must be the dict of the cell above; got {type(answers).__name__}.")
    questions = (*TRACE, "trained")
    if unknown := [str(key) for key in answers if key not in questions]:
        raise Hint(f"No such question: {', '.join(unknown)}. The questions are {', '.join(questions)}.")
    open_ones = [key for key in questions if answers.get(key) is None]
    if len(open_ones) == len(questions):
        report("four_models", NOT_ATTEMPTED)
        return
    check_names(answers)
    first_misconception(FOUR_MODELS, answers)
    for key, model in TRACE.items():
        if answers.get(key) not in (None, model):
            raise Hint(f"{key}: not the {answers[key]}. Who ran last before it appeared in the trace?")
    if answers.get("trained") is not None and set(answers["trained"]) != TRAINED:
        raise Hint("trained: not these. Whose parameters does PPO's optimiser hold?")
    report("four_models", f"right so far; {NOT_ATTEMPTED}: {', '.join(open_ones)}" if open_ones else CORRECT)


def check_names(answers: dict) -> None:
    """Raise AssertionError unless every answer is made of the four models' names."""
    for key, answer in answers.items():
        if answer is None:
            continue
        if key == "trained":
            if isinstance(answer, str) or not isinstance(answer, set | frozenset | list | tuple):
                raise Hint(f'trained: a set of names is wanted, such as {{"reward"}}; got {answer!r}.')
        names = answer if key == "trained" else [answer]
        for name in names:
            if name not in MODELS:
                raise Hint(f"{key}: {name!r} is not one of {', '.join(MODELS)}.")
