"""Bradley–Terry: how comparisons of two answers become one number per answer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lessons.masking import check_same_shape, full_precision


def preference_probability(a: Tensor, b: Tensor) -> Tensor:
    """Probability that an answer with reward a is preferred to one with reward b.

        P(a ≻ b) = σ(a − b)                                                                             (Eq. 2.1)

    a, b of one shape -> that shape. Only the difference counts: adding a constant to both changes nothing.
    Source: Bradley & Terry 1952, "Rank analysis of incomplete block designs".
    """
    check_same_shape(a=a, b=b)
    return torch.sigmoid(full_precision(a) - full_precision(b))


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Negative log-likelihood of the comparisons as they were made.

        L = −mean log σ(r_chosen − r_rejected)                                                          (Eq. 2.2)

    chosen, rejected (N,) -> (), in nats: log 2 = 0.693 when the model cannot tell them apart, between 0 and that when
    it is right, above when it is wrong. Raises ValueError when the shapes disagree or there is no pair.
    Source: Ouyang et al. 2022, "Training language models to follow instructions", Eq. 1.
    """
    check_same_shape(chosen=chosen, rejected=rejected)
    if chosen.numel() == 0:
        raise ValueError("chosen must hold at least one pair; got none")
    return -F.logsigmoid(full_precision(chosen) - full_precision(rejected)).mean()
