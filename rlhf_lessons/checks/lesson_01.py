"""Lesson 01: log-probabilities of the tokens that were chosen."""

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from rlhf_lessons import policy_gradient
from rlhf_lessons.checks._harness import Case, Check, Wrong, with_epsilon
from rlhf_lessons.checks._inputs import Draw, transposed
from rlhf_lessons.rollout import reference_logits


def picked(values: Tensor, actions: Tensor) -> Tensor:
    """The entry of each distribution that belongs to the action: (B, T, V), (B, T) -> (B, T)."""
    return values.gather(-1, actions[..., None]).squeeze(-1)


# --- Exercise: action_log_probs ----------------------------------------------------------------


def action_log_prob_cases() -> list[Case]:
    d, single = Draw(101), Draw(102, torch.float32)
    logits, far = d.normal(3, 5, 4, scale=2), single.normal(2, 3, 4)
    return [
        Case("one row, two steps, three words", {"logits": d.normal(1, 2, 3), "actions": d.tokens(3, 1, 2)}),
        Case("three rows, five steps", {"logits": logits, "actions": d.tokens(4, 3, 5)}),
        Case("logits that are not contiguous", {"logits": transposed(logits), "actions": d.tokens(4, 3, 5)}),
        Case("float32", {"logits": single.normal(2, 3, 4), "actions": single.tokens(4, 2, 3)}),
        Case(
            "float32, logits hundreds apart",
            {"logits": far + torch.tensor([0.0, 300.0, 0.0, 0.0]), "actions": torch.tensor([[0, 2, 3], [2, 0, 1]])},
        ),
    ]


action_log_probs = Check(
    name="action_log_probs",
    reference=policy_gradient.action_log_probs,
    cases=action_log_prob_cases,
    gradient_of=("logits",),
    wrong=(
        Wrong(
            "the logit itself",
            picked,
            "You return the logit of the chosen token. A logit is a score up to a constant: subtract the "
            "logsumexp over the vocabulary to make it a log-probability.",
        ),
        Wrong(
            "the probability",
            lambda logits, actions: picked(logits.softmax(-1), actions),
            "These are probabilities. Take the logarithm: all results should be at most 0.",
        ),
        Wrong(
            "the sign",
            lambda logits, actions: -policy_gradient.action_log_probs(logits, actions),
            "The sign is flipped: cross-entropy is −log π, and log-probabilities are never positive.",
        ),
        Wrong(
            "normalised over time",
            lambda logits, actions: picked(logits.log_softmax(1), actions),
            "You normalise over the steps (dim 1). The probabilities that sum to 1 are those of the words at one "
            "step: the last dimension.",
        ),
        Wrong(
            "normalised over the batch",
            lambda logits, actions: picked(logits.log_softmax(0), actions),
            "You normalise over the batch (dim 0). The probabilities that sum to 1 are those of the words at one "
            "step: the last dimension.",
        ),
        Wrong(
            "the greedy token",
            lambda logits, actions: logits.log_softmax(-1).amax(-1),
            "You return the log-probability of the likeliest token. Wanted is that of the token in actions, "
            "likely or not.",
        ),
        Wrong(
            "shifted inside",
            lambda logits, actions: picked(logits[:, :-1].log_softmax(-1), actions[:, 1:]),
            "You shift by one, and lose a step. Here logits[:, t] already is the distribution that actions[:, t] "
            "was drawn from: the shift belongs where logits are cut out of a model's output.",
        ),
        Wrong(
            "the sum over the sequence",
            lambda logits, actions: policy_gradient.action_log_probs(logits, actions).sum(-1),
            "You sum over the steps. That is log P of the whole sequence; wanted is one number per token, (B, T).",
        ),
        Wrong(
            "log of softmax",
            lambda logits, actions: picked(logits.softmax(-1).log(), actions),
            "Ordinary logits are right, logits hundreds apart are not: softmax rounds to 0 there and its "
            "logarithm is −∞. log_softmax, or z − logsumexp z, does both in one stable step.",
        ),
        Wrong(
            "the mean loss",
            lambda z, a: -policy_gradient.action_log_probs(z, a).mean(),
            "You return a single number, as F.cross_entropy does by default. Wanted is log π of each token, (B, T): "
            "no mean, and no minus.",
        ),
        Wrong(
            "the whole distribution",
            lambda z, a: z.log_softmax(-1),
            "You return the log-probabilities of all words, (B, T, V). Pick the entry that belongs to the token in "
            "actions.",
        ),
        Wrong(
            "a dimension left over",
            lambda z, a: z.log_softmax(-1).gather(-1, a[..., None]),
            "gather leaves a last dimension of 1: the result is (B, T, 1). Beside a (B, T) tensor that broadcasts to "
            "something else without a word: squeeze(-1).",
        ),
        Wrong(
            "squeezed everywhere",
            lambda z, a: z.log_softmax(-1).gather(-1, a[..., None]).squeeze(),
            "Three rows are right, one row is not: squeeze() drops every dimension of size 1, the batch too. "
            "squeeze(-1) drops the last alone.",
        ),
        Wrong(
            "normalised twice",
            lambda z, a: picked(z.softmax(-1).log_softmax(-1), a),
            "You normalise twice: log_softmax wants logits, and it was given the output of softmax.",
        ),
        Wrong(
            "the wrong base",
            lambda z, a: picked(z.log_softmax(-1), a) / math.log(2),
            "Everything is 1.44 times too large: these are logarithms to the base 2. All formulas here use the "
            "natural one.",
        ),
        Wrong(
            "less the largest",
            lambda z, a: picked(z - z.amax(-1, keepdim=True), a),
            "You subtract the largest logit. That makes the sum safe to compute, but it does not normalise: subtract "
            "the logsumexp.",
        ),
        Wrong(
            "log of the picked softmax",
            lambda z, a: picked(z.softmax(-1), a).log(),
            "Ordinary logits are right, logits hundreds apart are not: the probability that you pick has been rounded "
            "to 0, and its logarithm is −∞. log_softmax, or z − logsumexp z, never holds the probability itself.",
        ),
        Wrong(
            "exponentials summed",
            lambda z, a: picked(z, a) - z.exp().sum(-1).log(),
            "Ordinary logits are right, logits hundreds apart are not: e^300 overflows to ∞ in float32. z.logsumexp "
            "takes the largest logit out first.",
        ),
        *with_epsilon(
            lambda eps: lambda z, a: (picked(z.softmax(-1), a) + eps).log(),
            "log_softmax is exact without it.",
        ),
    ),
)


# --- Bug hunt: the shift by one ----------------------------------------------------------------


class GivenLogits(nn.Module):
    """A language model whose logits are given: what is left of `reference_logits` is the shift."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, *, logits_to_keep: int, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[:, : input_ids.shape[1]][:, -logits_to_keep:])


def response_log_probs(logits: Tensor, tokens: Tensor, prompt_length: int) -> Tensor:
    """Log-probabilities of the response: logits at P−1 … L−2 belong to the tokens at P … L−1."""
    response = tokens[:, prompt_length:]
    of_response = reference_logits(
        GivenLogits(logits), tokens, torch.ones_like(tokens), length=response.shape[1], temperature=1.0
    )
    return policy_gradient.action_log_probs(of_response, response)


def shift_cases() -> list[Case]:
    d, single = Draw(111), Draw(112, torch.float32)

    def case(says: str, draw: Draw, batch: int, prompt: int, response: int) -> Case:
        length = prompt + response
        inputs = {"logits": draw.normal(batch, length, 5, scale=2), "tokens": draw.tokens(5, batch, length)}
        return Case(says, inputs | {"prompt_length": prompt})

    return [
        case("a prompt of 2, a response of 3", d, 1, 2, 3),
        case("a prompt of 4, a response of 2", d, 3, 4, 2),
        case("a prompt of 1, a response of 5", d, 2, 1, 5),
        case("a response of a single token", d, 2, 3, 1),
        case("float32", single, 2, 3, 4),
    ]


shift_by_one = Check(
    name="shift_by_one",
    reference=response_log_probs,
    cases=shift_cases,
    gradient_of=("logits",),
    explains=(
        "The fault looked each token up in the logits that were computed after it had been read. The numbers were "
        "finite, negative and of the right shape, so nothing crashed: in the lesson only, the model found its own "
        'tokens surprising, "the" at −9.80 where −0.20 was recorded. '
        "In training, old and new log-probabilities would be wrong alike: the first ratio is 1 all the same, and the "
        "gradient teaches something else. In a log, compare the mean log-probability with minus the entropy of the "
        "policy: on its own samples the two agree on average."
    ),
    wrong=(
        Wrong(
            "not shifted",
            lambda z, y, p: policy_gradient.action_log_probs(z[:, p:], y[:, p:]),
            "The shift by one is still missing: logits at position t were computed after reading token t, and "
            "predict token t+1. Which position predicts the first token of the response?",
        ),
        Wrong(
            "shifted the wrong way",
            lambda z, y, p: policy_gradient.action_log_probs(z[:, p:].roll(-1, 1), y[:, p:]),
            "You shift the wrong way: these logits come from positions after the token, which have already read it.",
        ),
        Wrong(
            "shifted the tokens back",
            lambda z, y, p: policy_gradient.action_log_probs(z[:, p - 1 : -1], y[:, p - 1 : -1]),
            "Logits and tokens are shifted together, so they still belong to the same position. Shift the logits "
            "alone.",
        ),
        Wrong(
            "wrapped around",
            lambda z, y, p: policy_gradient.action_log_probs(z.roll(2, 1)[:, p:], y[:, p:]),
            "You shift by two positions; the token at t was drawn from the logits at t−1.",
        ),
        Wrong(
            "shifted inside the response",
            lambda z, y, p: policy_gradient.action_log_probs(z[:, p:-1], y[:, p + 1 :]),
            "The shift is right, but made inside the response, which loses its first token: that one is predicted "
            "by the last position of the prompt.",
        ),
        Wrong(
            "prompt left in",
            lambda z, y, p: policy_gradient.action_log_probs(z[:, :-1], y[:, 1:]),
            "The shift is right, but the prompt's tokens are still in the result. The policy did not choose those.",
        ),
        Wrong(
            "logits instead of log-probabilities",
            lambda z, y, p: picked(z[:, p - 1 : -1], y[:, p:]),
            "The positions are right, but these are logits: the log_softmax over the vocabulary has gone.",
        ),
        Wrong(
            "probabilities",
            lambda z, y, p: picked(z[:, p - 1 : -1].softmax(-1), y[:, p:]),
            "The positions are right, but these are probabilities: the logarithm has gone.",
        ),
        Wrong(
            "the sign",
            lambda z, y, p: -picked(z[:, p - 1 : -1].log_softmax(-1), y[:, p:]),
            "The positions are right, but the sign has changed: log-probabilities are never positive.",
        ),
        Wrong(
            "cut from the start",
            lambda z, y, p: picked(z[:, : y.shape[1] - p].log_softmax(-1), y[:, p:]),
            "You take the logits at the start of the text, where the prompt is. The first that counts is at its last "
            "token, P − 1.",
        ),
        Wrong(
            "summed",
            lambda z, y, p: picked(z[:, p - 1 : -1].log_softmax(-1), y[:, p:]).sum(-1),
            "The positions are right, but you sum over them: one number per token is wanted, (B, T).",
        ),
        Wrong(
            "the last dimension lost",
            lambda z, y, p: z[:, p - 1 : -1].log_softmax(-1).gather(-1, y[:, p:, None]).squeeze(),
            "The shift is right, but squeeze() also drops a batch of one row or a response of one token: squeeze(-1).",
        ),
        Wrong(
            "the tokens of the prompt",
            lambda z, y, p: picked(z[:, :-1].log_softmax(-1), y[:, :-1]),
            "The logits are cut as they should be, and so are the tokens: each token is now looked up in the logits "
            "computed after it.",
        ),
        Wrong(
            "the tokens shifted instead",
            lambda z, y, p: picked(z[:, p:].log_softmax(-1), y[:, p - 1 : -1]),
            "You move the tokens, and the wrong way: now each is two positions from the logits it was drawn from. "
            "Leave the tokens of the response where they are, and move the logits.",
        ),
    ),
)
