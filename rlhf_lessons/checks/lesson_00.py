"""Lesson 00: who made what in one traced sample. No code, but a table to fill in."""

from collections.abc import Callable

from rlhf_lessons.checks._harness import NOT_ATTEMPTED, Hint, Misconception, first_misconception, report, so_far

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
        "models, even where they share its layers.",
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
            said = "reward model" if answers[key] == "reward" else answers[key]
            raise Hint(f"{key}: not the {said}. Which box of the figure of the four models does it come out of?")
    if answers.get("trained") is not None and set(answers["trained"]) != TRAINED:
        raise Hint("trained: not these. Whose parameters does PPO's optimiser hold?")
    report("four_models", so_far(open_ones))


CAUSES = {"KL of 0": ("ref_log_probs", "reference"), "nothing explained": ("trained", "critic")}
EXPLAINED = (
    "The KL compares two models. Taken from the policy twice it is 0 by construction, whatever the policy does: the "
    "toll is never paid, and nothing keeps the policy near its start. A critic that no optimiser holds keeps its first "
    "forecast, 0 everywhere here, which explains nothing; advantages are then noisy, and nothing crashes. Her reward "
    "model learned instead: the judge itself moved. Each fault is one line in a log that stays where it began."
)


ODDITIES = (
    Misconception(
        "the two swapped",
        lambda oddities: {k: oddities[other] for k, other in zip(CAUSES, reversed(CAUSES), strict=True)} == CAUSES,
        "The two causes are right, but swapped. Which oddity is about how far the policy has moved, which about a "
        "forecast?",
    ),
    Misconception(
        "what stands there now",
        lambda oddities: oddities["KL of 0"] == ("ref_log_probs", "policy"),
        'KL of 0: the entry is right, and "policy" is what stands there now. Which model belongs there?',
    ),
    Misconception(
        "the log-probabilities of the sample",
        lambda oddities: oddities["KL of 0"][0] == "log_probs",
        "KL of 0: log_probs are recorded while sampling, by the policy, as they should be. Look at what they are "
        "compared with.",
    ),
    Misconception(
        "the values themselves",
        lambda oddities: oddities["nothing explained"][0] == "values",
        "nothing explained: the values do come from the critic. But a critic that never changes says today what it "
        "said on the first day. What would change it?",
    ),
    Misconception(
        "the reward model in training",
        lambda oddities: oddities["nothing explained"] == ("trained", "reward"),
        "nothing explained: that the reward model is trained is wrong too, but the question is which model is missing.",
    ),
    Misconception(
        "the reference in training",
        lambda oddities: oddities["nothing explained"] == ("trained", "reference"),
        "nothing explained: the reference stays as it is, and it forecasts nothing. Whose forecasts never improve?",
    ),
)


def two_oddities(oddities: dict) -> None:
    """Lesson 00: which entry of a table of models makes a KL of 0, and which an explained variance of 0.

    oddities: {"KL of 0": (entry, model), "nothing explained": (entry, model)}; None stands for not answered. Prints
    "not attempted yet" or "correct", or raises AssertionError with a hint.
    """
    if not isinstance(oddities, dict) or set(oddities) != set(CAUSES):
        raise Hint(f"The dict of the cell above is wanted, with {' and '.join(map(repr, CAUSES))}.")
    entries = (*TRACE, "trained")
    for oddity, answer in oddities.items():
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            raise Hint(f"{oddity}: a pair (entry, model) is wanted; got {answer!r}.")
        for said, known, kind in zip(answer, (entries, MODELS), ("entries", "models"), strict=True):
            if said is not None and said not in known:
                raise Hint(f"{oddity}: {said!r} is not one of the {kind} {', '.join(known)}.")
    oddities = {oddity: tuple(answer) for oddity, answer in oddities.items()}
    open_ones = [oddity for oddity, answer in oddities.items() if None in answer]
    if len(open_ones) == len(CAUSES):
        report("two_oddities", NOT_ATTEMPTED)
        return
    first_misconception(ODDITIES, oddities)
    for oddity, cause in CAUSES.items():
        if None not in oddities[oddity] and oddities[oddity] != cause:
            part = "entry" if oddities[oddity][0] != cause[0] else "model"
            raise Hint(f"{oddity}: another {part}. Follow the number back through the figure of the four models.")
    report("two_oddities", so_far(open_ones), EXPLAINED)


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
