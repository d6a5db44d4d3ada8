"""Lesson 12: advantages within a group, and a scale that must be the group's own."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lessons import baselines
from rlhf_lessons.checks._harness import Case, Check, Wrong
from rlhf_lessons.checks._inputs import Draw

SCALES = ("none", "group", "batch")

# --- Exercise: group_advantages ----------------------------------------------------------------


def group_cases() -> list[Case]:
    d = Draw(1201, torch.float32)
    scores = {
        "a single group": (d.normal(4), [0, 0, 0, 0]),
        "two groups, side by side": (d.normal(6) + 1, [0, 0, 0, 1, 1, 1]),
        "two groups, interleaved": (d.normal(6), [0, 1, 0, 1, 0, 1]),
        "groups of different sizes, whatever their numbers": (2 * d.normal(7) - 1, [9, 4, 9, 9, 4, 7, 7]),
        "right or wrong, one group all right": (torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1]), [0, 0, 0, 0, 1, 1, 1, 1]),
        "one group of far larger scores": (d.normal(8) * torch.tensor([1.0] * 4 + [100.0] * 4), [0] * 4 + [1] * 4),
        "scores that differ by thousandths": (d.normal(6, scale=1e-3), [0, 0, 0, 1, 1, 1]),
        "all scores equal": (torch.full((4,), 2.0), [0, 0, 1, 1]),
        "scores in the ten thousands, in float64": (1e4 * d.normal(6).double(), [0, 0, 1, 1, 1, 1]),
    }
    return [
        Case(f'{says}, scale="{scale}"', {"rewards": rewards, "group": torch.tensor(group)}, {"scale": scale})
        for says, (rewards, group) in scores.items()
        for scale in SCALES
    ]


Deviation = Callable[[Tensor, Tensor, Tensor], Tensor]  # (rewards, centred, group) -> what each row is divided by


def by_group(x: Tensor, group: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """`of` each group's entries, read at each of its rows."""
    out = torch.zeros_like(x)
    for number in group.unique():
        out[group == number] = of(x[group == number])
    return out


def group_deviation(rewards: Tensor, centred: Tensor, group: Tensor) -> Tensor:
    return by_group(centred, group, lambda x: x.square().mean().sqrt())


def batch_deviation(rewards: Tensor, centred: Tensor, group: Tensor) -> Tensor:
    return centred.square().mean().sqrt().expand_as(centred)


def scaled(
    *,
    centre: Callable[[Tensor, Tensor], Tensor] = lambda r, group: r - by_group(r, group, torch.mean),
    group: Deviation = group_deviation,
    batch: Deviation = batch_deviation,
    none: Deviation = lambda rewards, centred, group: torch.ones_like(rewards),
    epsilon: float = 0.0,
    guarded: bool = True,
) -> Callable[..., Tensor]:
    """A `group_advantages` with one of its parts done otherwise."""
    deviations = {"none": none, "group": group, "batch": batch}

    def answer(rewards: Tensor, group: Tensor, *, scale: str) -> Tensor:
        centred = centre(rewards, group)
        divisor = deviations[scale](rewards, centred, group)
        if guarded and not epsilon:
            divisor = torch.where(divisor > 0, divisor, 1)
        return centred / (divisor + (epsilon if scale != "none" else 0))

    return answer


def by_position(rewards: Tensor, group: Tensor, *, scale: str) -> Tensor:
    """Rows of as many as the batch holds per group, in the order in which they stand."""
    size = len(rewards) // len(group.unique())
    places = torch.arange(len(rewards)) // size
    return scaled()(rewards, places, scale=scale)


def bessel(x: Tensor) -> Tensor:
    return x.std()


group_advantages = Check(
    name="group_advantages",
    reference=baselines.group_advantages,
    cases=group_cases,
    wrong=(
        Wrong(
            "Bessel's deviation",
            scaled(
                group=lambda r, c, group: by_group(c, group, bessel), batch=lambda r, c, group: c.std().expand_as(c)
            ),
            'scale="none" is right, the others are not: std() divides by n − 1 unless told otherwise. The deviation '
            "wanted here is the biased one, correction=0.",
        ),
        Wrong(
            "Bessel's deviation in the group",
            scaled(group=lambda r, c, group: by_group(c, group, bessel)),
            'scale="group" alone is wrong, by the factor √((n−1)/n): the group\'s std() divides by n − 1 unless told '
            "otherwise. Take correction=0.",
        ),
        Wrong(
            "the batch's mean",
            scaled(centre=lambda r, group: r - r.mean()),
            "One group is right, several are not: you subtract the mean of the whole batch. A hard prompt's best "
            "response then still counts as bad. Each group has a mean of its own.",
        ),
        Wrong(
            "the deviation of the raw rewards",
            scaled(batch=lambda r, c, group: r.std(correction=0).expand_as(r)),
            'scale="batch" alone is wrong: you take the deviation of the rewards as they are, which also holds how far '
            "prompts differ from each other. Take that of the centred rewards.",
        ),
        Wrong(
            "the batch whitened as one group",
            lambda rewards, group, *, scale: scaled()(rewards, 0 * group if scale == "batch" else group, scale=scale),
            'scale="batch" alone is wrong: you subtract the batch\'s mean there. `scale` only says what to divide by: '
            "centre within the groups as before, and take the deviation of all that is centred.",
        ),
        Wrong(
            "the groups' deviations averaged",
            scaled(batch=lambda r, c, group: group_deviation(r, c, group).mean().expand_as(r)),
            'scale="batch" alone is wrong: you average the groups\' deviations. Average the squares of the centred '
            "rewards over the batch, and take the root of that.",
        ),
        Wrong(
            "divided by nothing",
            scaled(guarded=False),
            "It is right until all rewards of a group are equal: there 0/0 makes NaN, and one such group spoils the "
            "whole step. Equal rewards should give 0.",
        ),
        Wrong(
            "the mean of the others",
            scaled(
                centre=lambda r, group: (
                    (r - by_group(r, group, torch.mean))
                    * by_group(r, group, lambda x: torch.full_like(x, len(x) / (len(x) - 1)))
                ),
            ),
            'scale="none" is too large by n/(n−1): you subtract the mean of the others, as RLOO does. Here the mean '
            "is over the whole group, the response itself included.",
        ),
        Wrong(
            "always the group's",
            scaled(none=group_deviation, batch=group_deviation),
            'scale="group" is right, the other two give the same as it: `scale` is not used.',
        ),
        Wrong(
            "never scaled",
            scaled(group=lambda r, c, group: torch.ones_like(r), batch=lambda r, c, group: torch.ones_like(r)),
            'scale="none" is right, the other two give the same as it: `scale` is not used.',
        ),
        Wrong(
            "not centred",
            lambda rewards, group, *, scale: rewards if scale == "none" else scaled()(rewards, group, scale=scale),
            'scale="none" returns the rewards as they are. It only leaves out the division: the group\'s mean is '
            "subtracted all the same.",
        ),
        Wrong(
            "the variance",
            scaled(
                group=lambda r, c, group: group_deviation(r, c, group).square(),
                batch=lambda r, c, group: c.square().mean().expand_as(c),
            ),
            "You divide by the variance. Its root, the standard deviation, has the unit of a reward: only with it do "
            "advantages not depend on the rewards' scale.",
        ),
        Wrong(
            "group and batch swapped",
            scaled(group=batch_deviation, batch=group_deviation),
            'scale="none" is right; "group" gives what "batch" should, and the other way round.',
        ),
        Wrong(
            "groups by their position",
            by_position,
            "Groups that stand side by side are right, others are not: you cut the batch into pieces of equal size. "
            "`group` says who belongs together, in any order and number.",
        ),
        *(
            Wrong(
                f"an epsilon of {eps:g}",
                scaled(epsilon=eps),
                f"You add {eps:g} to the deviation. Where a group's rewards differ by little, as late in training, "
                "that is no longer small, and shrinks its advantages: add far less, or treat a deviation of 0 apart.",
            )
            for eps in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
        ),
    ),
)


# --- Bug hunt: one scale for all groups ----------------------------------------------------------


def within_rows(rewards: Tensor) -> Tensor:
    """Each row of rewards (B, G) centred, and divided by its own deviation: (B, G)."""
    group = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    return baselines.group_advantages(rewards.flatten(), group, scale="group").view_as(rewards)


def row_cases() -> list[Case]:
    d = Draw(1211, torch.float32)
    tasks = torch.tensor([[1.0], [100.0]])
    return [
        Case("one group", {"rewards": d.normal(1, 4)}),
        Case("two groups of the same scale", {"rewards": d.normal(2, 4)}),
        Case("two prompts, one much easier", {"rewards": d.normal(2, 4) + torch.tensor([[0.0], [5.0]])}),
        Case("two tasks, one scored a hundred times higher", {"rewards": tasks * d.normal(2, 4)}),
        Case("as many groups as responses", {"rewards": d.normal(3, 3)}),
        Case("a group of equal scores", {"rewards": torch.stack([torch.ones(4), d.normal(4)])}),
        Case("scores in the ten thousands, in float64", {"rewards": 1e4 * d.normal(2, 4).double()}),
    ]


def divided(by: Callable[[Tensor, Tensor], Tensor], *, guarded: bool = True) -> Callable[[Tensor], Tensor]:
    """Centred rows, divided by what `by` makes of (rewards, centred rewards)."""

    def answer(rewards: Tensor) -> Tensor:
        centred = rewards - rewards.mean(dim=1, keepdim=True)
        deviation = by(rewards, centred)
        return centred / (torch.where(deviation > 0, deviation, 1) if guarded else deviation)

    return answer


one_scale_for_all = Check(
    name="one_scale_for_all",
    reference=within_rows,
    cases=row_cases,
    explains=(
        "The fault centred each group by itself, but divided by a deviation of the whole batch. Every mean was 0 and "
        "the sizes looked right on average, so nothing seemed wrong: the task with the large scores took all of the "
        "step, and the other one a hundredth of it. In a log, the mean reward rises, since the large task makes it up. "
        "What shows it is the reward of each task by itself, or the deviation of the advantages within each group, "
        "which should be 1. One scale for the whole batch is a choice too, REINFORCE++ makes it; then the tasks' "
        "scores must have one scale already."
    ),
    wrong=(
        Wrong(
            "the batch's deviation",
            divided(lambda r, c: r.std(correction=0)),
            "The deviation is still that of the whole batch: one task with large scores makes all others small. Give "
            "std the same dim=1 as the mean.",
        ),
        Wrong(
            "the centred batch's deviation",
            divided(lambda r, c: c.std(correction=0)),
            "You now take the deviation of the centred rewards, but over the whole batch: what prompts differ by is "
            "gone, what tasks' scales differ by is not. Each row has a deviation of its own.",
        ),
        Wrong(
            "Bessel's deviation in each row",
            divided(lambda r, c: r.std(dim=1, keepdim=True)),
            "Each row has its own deviation now, but with n − 1 in it: take correction=0, as before.",
        ),
        Wrong(
            "the deviation over the groups",
            divided(lambda r, c: r.std(dim=0, correction=0) + 1e-8),
            "You take the deviation of each column, over the groups. A group is a row: dim=1, and keepdim=True.",
        ),
        Wrong(
            "not divided",
            divided(lambda r, c: torch.ones_like(r)),
            "The division has gone. That is Dr. GRPO; the task here is to divide each group by its own deviation.",
        ),
        Wrong(
            "0 divided by 0",
            divided(lambda r, c: r.std(dim=1, keepdim=True, correction=0), guarded=False),
            "Each row has its own deviation now, but a group of equal scores gives NaN: keep what was added to the "
            "divisor.",
        ),
        Wrong(
            "the variance of each row",
            divided(lambda r, c: c.square().mean(dim=1, keepdim=True)),
            "Each row is divided by its own variance now: a task paid 100 times as much gets a hundredth of the "
            "advantage. Take the root.",
        ),
        Wrong(
            "the batch for both",
            lambda r: (r - r.mean()) / r.std(correction=0).clamp(min=1e-8),
            "Now the mean is the whole batch's, too. It was the deviation that was wrong: give std dim=1 and "
            "keepdim=True, and leave the mean each row's own.",
        ),
        Wrong(
            "centred on the batch",
            lambda r: (r - r.mean()) / r.std(dim=1, keepdim=True, correction=0).clamp(min=1e-8),
            "Now the scale is each row's own, but the mean is the batch's: a prompt that is easy would have good "
            "responses only.",
        ),
    ),
)
