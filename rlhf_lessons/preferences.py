"""Bradley–Terry: how comparisons of two answers become one number per answer, or a policy at once (DPO, IPO)."""

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


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float) -> Tensor:
    """Bradley–Terry on the reward that the policy itself implies, r = β log π/π_ref: no reward model, no sampling.

        L = −mean log σ(β m),   m of `margins`                                                           (Eq. 13.2)

    All (N,), log-probabilities of whole responses given their prompts, the reference's held constant -> (), in nats:
    log 2 where π = π_ref. With every pair of responses compared at its Bradley–Terry odds, the minimiser over all
    policies is π* of `exact.optimal_policy`. Raises ValueError for unequal shapes, no pair, or beta ≤ 0.
    Source: Rafailov et al. 2023, "Direct preference optimization", Eq. 7.
    """
    return -F.logsigmoid(beta * margins(chosen, rejected, ref_chosen, ref_rejected, beta)).mean()


def ipo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float) -> Tensor:
    """The margin of log-ratios is drawn to 1/(2β) and no further, where DPO's, on pairs without noise, has no end.

        L = mean (m − 1/(2β))²,   m of `margins`                                                        (Eq. 13.3)

    Arguments, shapes and errors as in `dpo_loss`. A pair that a share p of annotators prefers this way round ends at a
    margin of (2p − 1)/(2β).
    Source: Azar et al. 2023, "A general theoretical paradigm to understand learning from human preferences", Eq. 17.
    """
    return (margins(chosen, rejected, ref_chosen, ref_rejected, beta) - 1 / (2 * beta)).square().mean()


def margins(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """By how much more the policy has raised the chosen text's log-probability than the rejected one's, in nats.

        m = log π/π_ref(y_chosen) − log π/π_ref(y_rejected)                                             (Eq. 13.1)

    Arguments and errors as in `dpo_loss` -> (N,). β m is the difference of the rewards that the policy implies.
    Source: Rafailov et al. 2023, "Direct preference optimization", §4.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive; got {beta}")
    check_same_shape(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if chosen.numel() == 0:
        raise ValueError("chosen must hold at least one pair; got none")
    ours, theirs = (full_precision(a) - full_precision(b) for a, b in ((chosen, rejected), (ref_chosen, ref_rejected)))
    return ours - theirs.detach()
