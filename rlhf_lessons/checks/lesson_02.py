"""Lesson 02: the loss of a reward model, and where its score is read."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lessons import preferences
from rlhf_lessons.checks._harness import Case, Check, Wrong, with_epsilon
from rlhf_lessons.checks._inputs import Draw, prefix_mask, under_padding
from rlhf_lessons.models import RewardModel

# --- Exercise: bradley_terry_loss --------------------------------------------------------------


def bradley_terry_cases() -> list[Case]:
    d, single = Draw(201), Draw(202, torch.float32)
    return [
        Case("one pair", {"chosen": d.normal(1), "rejected": d.normal(1)}),
        Case("two pairs", {"chosen": d.normal(2), "rejected": d.normal(2)}),
        Case("seven pairs", {"chosen": d.normal(7, scale=2), "rejected": d.normal(7, scale=2)}),
        Case("scores that are not contiguous", {"chosen": d.normal(4, 2)[:, 0], "rejected": d.normal(4, 2)[:, 1]}),
        Case("float32", {"chosen": single.normal(5), "rejected": single.normal(5)}),
        Case(
            "float32, scores hundreds apart",
            {"chosen": torch.tensor([200.0, -200.0, 1.0]), "rejected": torch.tensor([-200.0, 150.0, 0.5])},
        ),
    ]


CLAMPED = (
    "Ordinary scores are right, scores hundreds apart are not: a clamp{} has cut them off, and with them the gradient "
    "of the pairs that are most wrong. F.logsigmoid is stable as it is."
)

bradley_terry_loss = Check(
    name="bradley_terry_loss",
    reference=preferences.bradley_terry_loss,
    cases=bradley_terry_cases,
    gradient_of=("chosen", "rejected"),
    wrong=(
        Wrong(
            "the sign",
            lambda chosen, rejected: F.logsigmoid(chosen - rejected).mean(),
            "This is the log-likelihood, which is to go up. A loss goes down: what is missing is the minus.",
        ),
        Wrong(
            "chosen and rejected swapped",
            lambda chosen, rejected: -F.logsigmoid(rejected - chosen).mean(),
            "The loss is low when the rejected answer scores higher: chosen and rejected are swapped.",
        ),
        Wrong(
            "no logarithm",
            lambda chosen, rejected: -torch.sigmoid(chosen - rejected).mean(),
            "This is −σ(margin), without the logarithm: its gradient vanishes where the model is most wrong.",
        ),
        Wrong(
            "one minus the probability",
            lambda chosen, rejected: (1 - torch.sigmoid(chosen - rejected)).mean(),
            "This is the expected error rate, 1 − σ(margin), not the negative log-likelihood −log σ(margin).",
        ),
        Wrong(
            "no sigmoid",
            lambda chosen, rejected: -(chosen - rejected).mean(),
            "There is no sigmoid: this loss has no floor, and rewards a pair that is long since right as much as a "
            "wrong one.",
        ),
        Wrong(
            "hinge",
            lambda chosen, rejected: F.relu(1 - (chosen - rejected)).mean(),
            "This is the hinge loss, another way to rank. Bradley–Terry is −log σ(margin).",
        ),
        Wrong(
            "log after the mean",
            lambda chosen, rejected: -torch.sigmoid(chosen - rejected).mean().log(),
            "One pair is right, several are not: you take the logarithm of the mean. The likelihood of independent "
            "comparisons is a product, so the logarithm comes first.",
        ),
        Wrong(
            "mean margin",
            lambda chosen, rejected: -F.logsigmoid((chosen - rejected).mean()),
            "One pair is right, several are not: you average the scores before the loss. Each pair has a loss of "
            "its own; then average those.",
        ),
        Wrong(
            "the sum",
            lambda chosen, rejected: -F.logsigmoid(chosen - rejected).sum(),
            "One pair is right, several are not: you sum over the pairs where the mean is wanted.",
        ),
        Wrong(
            "one loss per pair",
            lambda chosen, rejected: -F.logsigmoid(chosen - rejected),
            "You return one loss per pair; average them to a scalar.",
        ),
        Wrong(
            "absolute scores",
            lambda chosen, rejected: -(F.logsigmoid(chosen) + F.logsigmoid(-rejected)).mean(),
            "You judge each answer by itself (chosen up to 1, rejected down to 0). Only the difference of the two "
            "may matter: adding 10 to both should change nothing.",
        ),
        Wrong(
            "log of sigmoid",
            lambda chosen, rejected: -torch.sigmoid(chosen - rejected).log().mean(),
            "Ordinary scores are right, scores hundreds apart are not: sigmoid rounds to 0 there (1 + e^(−margin) "
            "overflows), and the loss is ∞. F.logsigmoid takes both steps in one and stays finite.",
        ),
        *(
            Wrong(
                f"the probability held above {least:g}",
                lambda chosen, rejected, least=least: -torch.sigmoid(chosen - rejected).clamp(min=least).log().mean(),
                CLAMPED.format(f" of the probability at {least:g}"),
            )
            for least in (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-20, 1e-30)
        ),
        *(
            Wrong(
                f"the margin held within ±{most}",
                lambda chosen, rejected, most=most: -F.logsigmoid((chosen - rejected).clamp(-most, most)).mean(),
                CLAMPED.format(f" of the margin at ±{most}"),
            )
            for most in (10, 20, 30, 50, 80)
        ),
        Wrong(
            "binary cross-entropy",
            lambda chosen, rejected: F.binary_cross_entropy(torch.sigmoid(chosen - rejected), torch.ones_like(chosen)),
            CLAMPED.format(" inside F.binary_cross_entropy"),
        ),
        Wrong(
            "every chosen with every rejected",
            lambda c, r: -F.logsigmoid(c[:, None] - r[None, :]).mean(),
            "One pair is right, several are not: you compare every chosen answer with every rejected one, (N, N), "
            "those to other prompts too. Is there a dimension too many? Pair i is chosen[i] and rejected[i].",
        ),
        Wrong(
            "exponentials divided",
            lambda c, r: -(c.exp() / (c.exp() + r.exp())).log().mean(),
            "Ordinary scores are right, scores hundreds apart are not: e^a overflows and ∞/∞ is NaN. Divide by e^a on "
            "paper: what is left depends on the difference alone, and F.logsigmoid takes it.",
        ),
        Wrong(
            "the wrong base",
            lambda c, r: -F.logsigmoid(c - r).mean() / math.log(2),
            "Everything is 1.44 times too large: this is the logarithm to the base 2, and wanted is the natural one.",
        ),
        Wrong(
            "half the loss",
            lambda c, r: -F.logsigmoid(c - r).mean() / 2,
            "Everything is half as large as it should be: you divide by the number of texts. The mean is over the "
            "pairs.",
        ),
        Wrong(
            "the loss of the square",
            lambda c, r: (1 - torch.sigmoid(c - r)).square().mean(),
            "This is the squared error of the probability (the Brier score). Its gradient vanishes where the model is "
            "most wrong; −log σ does not.",
        ),
        Wrong(
            "softmax twice",
            lambda c, r: -torch.stack([c, r], -1).softmax(-1).log_softmax(-1)[..., 0].mean(),
            "You take the softmax twice: F.cross_entropy and log_softmax want scores, not probabilities.",
        ),
        Wrong(
            "over the wrong dimension",
            lambda c, r: -torch.stack([c, r], -1).log_softmax(0)[..., 0].mean(),
            "The probabilities are taken over the pairs, not over the two answers of a pair: the softmax has the "
            "wrong dimension.",
        ),
        Wrong(
            "log-sigmoids subtracted",
            lambda c, r: -(F.logsigmoid(c) - F.logsigmoid(r)).mean(),
            "You subtract after the logarithm of the sigmoid. The difference of the two scores comes first, inside it: "
            "log σ(chosen − rejected).",
        ),
        *with_epsilon(
            lambda eps: lambda c, r: -(torch.sigmoid(c - r) + eps).log().mean(),
            "F.logsigmoid is exact without it.",
        ),
    ),
)


# --- Bug hunt: the score of the last real token ------------------------------------------------


class GivenScores(nn.Module):
    """A classifier whose score of each token is given: what is left of a reward model is where it reads."""

    def __init__(self, token_scores: Tensor) -> None:
        super().__init__()
        self.token_scores, self.score = token_scores, nn.Identity()
        self.config = SimpleNamespace(num_labels=1, pad_token_id=0)

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.token_scores[..., None])


def last_real_score(token_scores: Tensor, mask: Tensor) -> Tensor:
    """The score at each row's last real token, wherever the padding is: (B, L) -> (B,)."""
    return RewardModel(GivenScores(token_scores))(mask, mask)


def last_token_cases() -> list[Case]:
    d, single = Draw(211), Draw(212, torch.float32)

    def case(says: str, draw: Draw, mask: Tensor, garbage: float) -> Case:
        scores = under_padding(draw.normal(*mask.shape), mask, garbage)
        return Case(says, {"token_scores": scores, "mask": mask})

    right, left = prefix_mask([2, 3, 5], 5), prefix_mask([2, 5, 3], 5).flip(1)
    return [
        case("padding on the right", d, prefix_mask([2, 3, 4], 4), 1.5),
        case("no padding", d, prefix_mask([4, 4], 4), 0.0),
        case("padding on the left", d, left, 1.5),
        case("NaN under the padding", d, right, math.nan),
        case("a single token", d, prefix_mask([1, 2], 2), 7.0),
        case("float32", single, right, 3.0),
    ]


last_real_token = Check(
    name="last_real_token",
    reference=last_real_score,
    cases=last_token_cases,
    gradient_of=("token_scores",),
    explains=(
        "The fault read the score of the last position, which in a row padded on the right is a padding token. A text "
        "of full length was right, and so was every text by itself; only in a batch did the shorter ones lose, from "
        "73% of the pairs down to 62%. "
        "Nothing crashes, and in PPO the noise would look like a weak reward model: one that pays for length, or for "
        "nothing. In a log, score the same text alone and in a batch, and compare."
    ),
    wrong=(
        Wrong(
            "the last position",
            lambda s, mask: s[:, -1],
            "You still read the score at the last position. In a padded row that is a padding token.",
        ),
        Wrong(
            "the first padding token",
            lambda s, mask: s.gather(1, mask.sum(1, keepdim=True).clamp(max=s.shape[1] - 1)).squeeze(1),
            "You read one position too far: a row with n real tokens ends at index n − 1.",
        ),
        Wrong(
            "the token before the last",
            lambda s, mask: s.gather(1, (mask.sum(1, keepdim=True) - 2).clamp(min=0)).squeeze(1),
            "You read one position too early: a row with n real tokens ends at index n − 1.",
        ),
        Wrong(
            "right padding taken for granted",
            lambda s, mask: s.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1),
            "Padding on the right is right, on the left is not: the number of real tokens says where the last one "
            "is only if they start at index 0.",
        ),
        Wrong(
            "the first real token",
            lambda s, mask: s.gather(1, mask.long().argmax(1, keepdim=True)).squeeze(1),
            "You read the first real token: argmax finds the first True, and that token has not read the text.",
        ),
        Wrong(
            "the mean over the real tokens",
            lambda s, mask: torch.where(mask, s, 0).sum(1) / mask.sum(1),
            "You average over the real tokens. The score is read at one of them, the only one that has read all.",
        ),
        Wrong(
            "the sum over the real tokens",
            lambda s, mask: torch.where(mask, s, 0).sum(1),
            "You sum over the real tokens, so that long texts score more. The score is read at one of them, the last.",
        ),
        Wrong(
            "the mask multiplied on",
            lambda s, m: (s * (m & ~F.pad(m[:, 1:], (0, 1)))).sum(1),
            "Numbers under the padding do no harm, NaN does: 0·NaN is NaN. Pick the entry, or replace the others with "
            "torch.where.",
        ),
        Wrong(
            "counted from the right, not turned back",
            lambda s, m: s.gather(1, m.flip(1).long().argmax(1, keepdim=True)).squeeze(1),
            "argmax over the flipped mask counts from the right-hand end. It has to be turned back: L − 1 minus it.",
        ),
        Wrong(
            "the largest real score",
            lambda s, m: torch.where(m, s, -torch.inf).amax(1),
            "You take the largest score of a real token. Where it stands says nothing; wanted is that of the last one.",
        ),
        Wrong(
            "every row's end in every row",
            lambda s, m: s[:, m.sum(1) - 1],
            "s[:, i] reads all the positions i from every row, (B, B). Each row has a position of its own: "
            "s[torch.arange(B), i], or gather.",
        ),
        Wrong(
            "the first position",
            lambda s, m: s[:, 0],
            "You read the first position. That token has read nothing of the text after it.",
        ),
        Wrong(
            "a dimension left over",
            lambda s, m: s.gather(1, torch.where(m, torch.arange(m.shape[1]), -1).amax(1, keepdim=True)),
            "The right entry, but (B, 1): squeeze the last dimension, or a difference of two such results with a (B,) "
            "tensor becomes (B, B).",
        ),
    ),
)
