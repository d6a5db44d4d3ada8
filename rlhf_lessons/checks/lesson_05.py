"""Lesson 05: generalised advantage estimation, in one episode and in several packed into a row."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lessons import advantages, policy_gradient
from rlhf_lessons.checks._harness import Case, Check, Wrong
from rlhf_lessons.checks._inputs import Draw, prefix_mask, transposed, under_padding
from rlhf_lessons.masking import masked_whiten

# --- Exercise: gae -----------------------------------------------------------------------------


def gae_cases() -> list[Case]:
    d, single = Draw(501), Draw(502, torch.float32)
    ragged = prefix_mask([2, 4, 1], 4)

    def plain(says: str, batch: int, steps: int, gamma: float, lam: float, layout=lambda x: x) -> Case:
        inputs = {"rewards": layout(d.normal(batch, steps)), "values": layout(d.normal(batch, steps))}
        return Case(says, inputs, {"gamma": gamma, "lam": lam})

    def masked(says: str, draw: Draw, garbage: float) -> Case:
        inputs = {name: under_padding(draw.normal(3, 4), ragged, garbage) for name in ("rewards", "values")}
        return Case(says, inputs | {"mask": ragged}, {"gamma": 0.9, "lam": 0.7})

    return [
        plain("a single step", 1, 1, 0.9, 0.95),
        plain("λ = 0", 1, 3, 0.9, 0.0),
        plain("λ = 1, γ = 1", 1, 3, 1.0, 1.0),
        plain("λ = 1", 1, 3, 0.9, 1.0),
        plain("γ = 1", 1, 4, 1.0, 0.6),
        plain("γ = 0.9, λ = 0.7", 2, 5, 0.9, 0.7),
        masked("padding, with numbers under it", d, 30.0),
        masked("padding, with NaN under it", d, math.nan),
        plain("tensors that are not contiguous", 3, 4, 0.8, 0.5, transposed),
        masked("float32", single, 5.0),
    ]


def misread(
    *,
    decay: Callable[[float, float], float] = lambda gamma, lam: gamma * lam,
    foresight: Callable[[float], float] = lambda gamma: gamma,
    minus_value: float = 1.0,
    sees_next: bool = True,
    cut_value: bool = True,
    cut_sum: bool = True,
    clean: bool = True,
    returns: Callable[..., Tensor] = lambda adv, rewards, values: adv + values,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """GAE as its recursion is written, with one thing read wrongly.

    decay, foresight: the factors of Â_{t+1} and of V(s_{t+1}); minus_value: that of V(s_t); sees_next: whether δ looks
    at V(s_{t+1}) or at V(s_t); cut_value, cut_sum: whether the padding is kept out of δ and of the sum; clean: whether
    the padding of the results is set to 0.
    """

    def wrong_gae(rewards, values, mask=None, *, gamma, lam):
        mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
        inside = F.pad(mask[:, 1:], (0, 1), value=False)
        following = F.pad(values[:, 1:], (0, 1)) if sees_next else values
        following = torch.where(inside, following, 0) if cut_value else following
        delta = rewards + foresight(gamma) * following - minus_value * values
        delta = torch.where(mask, delta, 0) if cut_sum else delta
        advantage, steps = torch.zeros_like(delta[:, 0]), []
        for t in reversed(range(delta.shape[1])):
            advantage = delta[:, t] + decay(gamma, lam) * advantage
            steps.insert(0, advantage)
        result = torch.stack(steps, dim=1)
        both = result, returns(result, rewards, values)
        return tuple(torch.where(mask, x, 0) for x in both) if clean else both

    return wrong_gae


def averaged(
    rewards: Tensor, values: Tensor, mask: Tensor | None = None, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE with the factor 1 − λ of the infinite sum of n-step advantages left on the TD residuals."""
    result, returns = advantages.gae(rewards, values, mask, gamma=gamma, lam=lam)
    return (1 - lam) * result, returns - lam * result


def mixed(weight: Callable[[int, float], float]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A sum of the n-step advantages with weights w(n, λ) that do not add up to 1."""

    def wrong_gae(rewards, values, mask=None, *, gamma, lam):
        delta, result = advantages.td_residuals(rewards, values, mask, gamma=gamma), torch.zeros_like(values)
        mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
        for t in range(delta.shape[1]):
            n_step = torch.zeros_like(delta[:, 0])
            for n in range(1, delta.shape[1] - t + 1):
                n_step = n_step + gamma ** (n - 1) * delta[:, t + n - 1]
                result[:, t] += torch.where(mask[:, t + n - 1], weight(n, lam) * n_step, 0)
        return result, torch.where(mask, result + values, 0)

    return wrong_gae


def forwards(
    rewards: Tensor, values: Tensor, mask: Tensor | None = None, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The recursion run from the first step on: every advantage collects the past."""
    delta = advantages.td_residuals(rewards, values, mask, gamma=gamma)
    carried, steps = torch.zeros_like(delta[:, 0]), []
    for t in range(delta.shape[1]):
        carried = delta[:, t] + gamma * lam * carried
        steps.append(carried)
    result = torch.stack(steps, dim=1)
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    return tuple(torch.where(mask, x, 0) for x in (result, result + values))


def with_next(following: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """GAE whose next values are made of all values in another way, the padding cut out of them first."""

    def wrong_gae(rewards, values, mask=None, *, gamma, lam):
        if mask is not None:
            rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
        delta = rewards + gamma * following(values) - values
        delta = delta if mask is None else torch.where(mask, delta, 0)
        result = policy_gradient.reward_to_go(delta, gamma=gamma * lam)
        return result, result + values

    return wrong_gae


wrapped_around = with_next(lambda values: values.roll(-1, 1))
bootstrapped = with_next(lambda values: torch.cat([values[:, 1:], values[:, -1:]], dim=1))
shifted_back = with_next(lambda values: F.pad(values[:, :-1], (1, 0)))


def multiplied(
    rewards: Tensor, values: Tensor, mask: Tensor | None = None, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The mask multiplied on rewards and values, and on the results."""
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    both = advantages.gae(rewards * mask, values * mask, gamma=gamma, lam=lam)
    return tuple(x * mask for x in both)


def whitened(
    rewards: Tensor, values: Tensor, mask: Tensor | None = None, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages with mean 0 and variance 1, and the right returns."""
    result, returns = advantages.gae(rewards, values, mask, gamma=gamma, lam=lam)
    return masked_whiten(result, torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask), returns


gae = Check(
    name="gae",
    reference=advantages.gae,
    cases=gae_cases,
    outputs=("advantages", "returns"),
    wrong=(
        Wrong(
            "λ forgotten",
            misread(decay=lambda gamma, lam: gamma),
            "λ = 1 is right, λ = 0 is not: the recursion is multiplied by γ alone. It decays by γλ.",
        ),
        Wrong(
            "γ forgotten in the recursion",
            misread(decay=lambda gamma, lam: lam),
            "γ = 1 is right, γ = 0.9 with λ = 1 is not: the recursion is multiplied by λ alone. It decays by γλ.",
        ),
        Wrong(
            "no recursion",
            misread(decay=lambda gamma, lam: 0.0),
            "λ=0 is right, λ=1 is not: is the recursion multiplied by γλ? These are the TD residuals alone.",
        ),
        Wrong(
            "no decay at all",
            misread(decay=lambda gamma, lam: 1.0),
            "λ = γ = 1 is right, λ = 0 is not: the residuals are summed without any decay. Each step back takes γλ.",
        ),
        Wrong(
            "1 − λ",
            averaged,
            "λ = 0 is right, and elsewhere everything is smaller by 1 − λ. That factor belongs to the average of "
            "n-step advantages; written with δ it has cancelled: Σ (γλ)^k δ_{t+k}.",
        ),
        *(
            Wrong(
                name,
                mixed(weight),
                f"Your n-step advantages have the weights {name}, which add up to {total}. Each has (1 − λ)λ^(n−1), "
                "and the last, which runs to the end, takes what is left, λ^(N−1).",
            )
            for name, weight, total in (
                ("λ^(n−1)", lambda n, lam: lam ** (n - 1), "more than 1"),
                ("(1 − λ)λ^(n−1)", lambda n, lam: (1 - lam) * lam ** (n - 1), "less than 1 where a text ends"),
            )
        ),
        Wrong(
            "V(s_t) not subtracted",
            misread(minus_value=0.0),
            "V(s_t) is not subtracted: a TD residual is what came minus what was expected.",
        ),
        Wrong(
            "V(s_t) added",
            misread(minus_value=-1.0),
            "V(s_t) has the wrong sign in δ: what was expected is subtracted.",
        ),
        Wrong(
            "the next value not discounted",
            misread(foresight=lambda gamma: 1.0),
            "γ = 1 is right, γ = 0.9 is not, with λ = 0 neither: V(s_{t+1}) in δ is not discounted.",
        ),
        Wrong(
            "no next value",
            misread(foresight=lambda gamma: 0.0),
            "δ lacks γ V(s_{t+1}): r_t − V(s_t) calls an action bad for everything that is still to come.",
        ),
        Wrong(
            "the same value twice",
            misread(sees_next=False, cut_value=False),
            "δ uses V(s_t) where V(s_{t+1}) is wanted, also after the last step, where it is 0. Shift the values "
            "by one.",
        ),
        Wrong(
            "λ in the TD residual",
            lambda rewards, values, mask=None, *, gamma, lam: misread(foresight=lambda gamma: gamma * lam)(
                rewards, values, mask, gamma=gamma, lam=lam
            ),
            "λ = 1 is right, λ = 0 is not: λ also multiplies V(s_{t+1}) in δ. There it is γ alone; λ decays the sum.",
        ),
        Wrong(
            "forwards in time",
            forwards,
            "λ = 0 is right, λ = 1 is not: your recursion runs forwards, so each step collects past residuals. It "
            "starts at the last step and runs back.",
        ),
        Wrong(
            "returns without the values",
            misread(returns=lambda adv, rewards, values: adv),
            "The advantages are right, the returns are not: the critic's target is Â + V, not Â.",
        ),
        Wrong(
            "returns minus the values",
            misread(returns=lambda adv, rewards, values: adv - values),
            "The advantages are right, the returns have the wrong sign of V: the critic's target is Â + V.",
        ),
        Wrong(
            "the values as returns",
            misread(returns=lambda adv, rewards, values: values),
            "The advantages are right, but the returns are the values themselves: the critic would have nothing "
            "to learn.",
        ),
        Wrong(
            "the mask dropped",
            misread(cut_value=False, cut_sum=False, clean=False),
            "Without a mask it is right, with one it is not: padding enters δ and the sum, and stands in the result.",
        ),
        Wrong(
            "masked only at the end",
            misread(cut_value=False, cut_sum=False),
            "The padding of the result is 0, as it should be, but what stood there was already in the sums: cut "
            "V(s_{t+1}) and Â_{t+1} at the last real step.",
        ),
        Wrong(
            "the value of the first pad",
            misread(cut_value=False),
            "The recursion stops at the last real step, but δ there still looks at V of the first padding token. "
            "After the end that value is 0.",
        ),
        Wrong(
            "the sum over the padding",
            misread(cut_sum=False),
            "V after the end is 0, as it should be, but the residuals of the padding are still summed: set δ to 0 "
            "where mask is False, before the recursion.",
        ),
        Wrong(
            "rolled around",
            wrapped_around,
            "The last step is wrong: values.roll(-1) puts the first value behind the last step. After the end there "
            "is no state, and V is 0: shift in a zero.",
        ),
        Wrong(
            "the last value bootstrapped",
            bootstrapped,
            "The last step is wrong: δ looks at V of the last state once more, as if the episode went on. It ends "
            "there, and the next value is 0.",
        ),
        Wrong(
            "reward-to-go as returns",
            lambda r, v, mask=None, *, gamma, lam: (
                advantages.gae(r, v, mask, gamma=gamma, lam=lam)[0],
                policy_gradient.reward_to_go(r, mask, gamma=gamma),
            ),
            "The advantages are right. Your returns are the reward-to-go, and λ = 1 agrees, but elsewhere the target "
            "is the λ-return, Â + V: less noise, and some bias.",
        ),
        Wrong(
            "the two results swapped",
            lambda r, v, mask=None, *, gamma, lam: advantages.gae(r, v, mask, gamma=gamma, lam=lam)[::-1],
            "Both are right and stand in the wrong order: return (advantages, returns).",
        ),
        Wrong(
            "rewards masked, values not",
            lambda r, v, mask=None, *, gamma, lam: misread(cut_value=False, cut_sum=False)(
                r if mask is None else torch.where(mask, r, 0), v, mask, gamma=gamma, lam=lam
            ),
            "You mask the rewards, but not the values: V under the padding enters δ of the last real step, and the "
            "sum behind it.",
        ),
        Wrong(
            "values masked, rewards not",
            lambda r, v, mask=None, *, gamma, lam: misread(cut_value=False, cut_sum=False)(
                r, v if mask is None else torch.where(mask, v, 0), mask, gamma=gamma, lam=lam
            ),
            "You mask the values, but not the rewards: what stands under the padding enters the sum of the real steps.",
        ),
        Wrong(
            "the mask multiplied on",
            multiplied,
            "Numbers under the padding of rewards and values do no harm, NaN does: 0·NaN is NaN. Replace with "
            "torch.where(mask, x, 0) "
            "instead of multiplying by the mask.",
        ),
        Wrong(
            "whitened",
            whitened,
            "Your advantages are whitened already. That is a step of its own, and the returns are made before it.",
        ),
        Wrong(
            "one-step targets",
            lambda r, v, mask=None, *, gamma, lam: (
                advantages.gae(r, v, mask, gamma=gamma, lam=lam)[0],
                advantages.gae(r, v, mask, gamma=gamma, lam=0.0)[1],
            ),
            "The advantages are right. Your returns look one step ahead, r + γV(s_{t+1}): the target is Â + V, with "
            "the same λ.",
        ),
        Wrong(
            "the value before",
            shifted_back,
            "You shift the values the wrong way: δ looks at V(s_{t−1}), which is past.",
        ),
        Wrong(
            "in reversed order",
            lambda r, v, mask=None, *, gamma, lam: tuple(
                x.flip(1) for x in advantages.gae(r, v, mask, gamma=gamma, lam=lam)
            ),
            "Advantages and returns are right and in reversed order: they were collected from the last step back "
            "and not turned "
            "round.",
        ),
        Wrong(
            "γ and λ written in",
            lambda r, v, mask=None, *, gamma, lam: advantages.gae(r, v, mask, gamma=0.99, lam=0.95),
            "γ = 0.99 and λ = 0.95 stand in your code: use the arguments.",
        ),
        Wrong(
            "the sign",
            lambda r, v, mask=None, *, gamma, lam: tuple(
                k * x for k, x in zip((-1, 1), advantages.gae(r, v, mask, gamma=gamma, lam=lam), strict=True)
            ),
            "The returns are right, the advantages have the wrong sign: what came minus what was expected.",
        ),
    ),
)


# --- Bug hunt: the next episode let in ---------------------------------------------------------


def packed_gae(rewards: Tensor, values: Tensor, terminated: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Advantages (B, T) of rows that hold several episodes; terminated is True on the last step of each."""
    return advantages.gae(rewards, values, gamma=gamma, lam=lam, terminated=terminated)[0]


def packed_cases() -> list[Case]:
    d, single = Draw(511), Draw(512, torch.float32)

    def case(says: str, draw: Draw, ends: list[list[int]], lam: float) -> Case:
        terminated = torch.tensor(ends, dtype=torch.bool)
        inputs = {"rewards": draw.normal(*terminated.shape), "values": draw.normal(*terminated.shape)}
        return Case(says, inputs | {"terminated": terminated}, {"gamma": 0.9, "lam": lam})

    return [
        case("one episode in the row", d, [[0, 0, 1]], 0.7),
        case("two episodes, λ = 0", d, [[0, 1, 0, 1]], 0.0),
        case("two episodes, λ = 0.7", d, [[0, 1, 0, 1]], 0.7),
        case("episodes of a single step", d, [[1, 1, 0, 0, 1], [0, 0, 0, 1, 1]], 0.8),
        case("float32", single, [[0, 1, 0, 0, 1], [1, 0, 0, 1, 1]], 0.9),
    ]


def misread_ends(
    *,
    value_ends: Callable[[Tensor], Tensor] = lambda end: end,
    sum_ends: Callable[[Tensor], Tensor] = lambda end: end,
    keeps: Callable[[Tensor], Tensor] = torch.ones_like,
) -> Callable[..., Tensor]:
    """Packed GAE with the flags that cut the next value, the sum and the rewards read wrongly."""

    def wrong_gae(rewards, values, terminated, *, gamma, lam):
        following = torch.where(value_ends(terminated), 0, F.pad(values[:, 1:], (0, 1)))
        delta = torch.where(keeps(terminated), rewards, 0) + gamma * following - values
        advantage, steps = torch.zeros_like(delta[:, 0]), []
        for t in reversed(range(delta.shape[1])):
            advantage = delta[:, t] + gamma * lam * torch.where(sum_ends(terminated)[:, t], 0, advantage)
            steps.insert(0, advantage)
        return torch.stack(steps, dim=1)

    return wrong_gae


def one_late(end: Tensor) -> Tensor:
    """The flag of the step after."""
    return F.pad(end[:, 1:], (0, 1))


def one_early(end: Tensor) -> Tensor:
    """The flag of the step before."""
    return F.pad(end[:, :-1], (1, 0))


def never(end: Tensor) -> Tensor:
    """No end anywhere."""
    return torch.zeros_like(end)


next_episode = Check(
    name="next_episode",
    reference=packed_gae,
    cases=packed_cases,
    explains=(
        "The fault read the flag of the next step, so that the cut fell before the last step of an episode and that "
        "step saw the next episode. A reward of 100 in the second episode lifted the advantage of the last token of "
        "the first from 0.52 to 95.53, while the tokens before it lost sight of their own end. Where rows hold a "
        "single episode nothing is wrong, and on several the loss merely looks noisy. What shows it is a test such "
        "as this one: change what must not matter, and look whether anything moves. In a log, look at the spread of "
        "the advantages on last tokens, beside that on the others."
    ),
    wrong=(
        Wrong(
            "the flag of the next step",
            misread_ends(value_ends=one_late, sum_ends=one_late),
            "The next episode still gets in: the flags are read one step late, so the cut comes before an "
            "episode's last step and not after it. Which flag says that nothing follows step t?",
        ),
        Wrong(
            "the flag of the step before",
            misread_ends(value_ends=one_early, sum_ends=one_early),
            "The flags are read one step too far the other way: now each episode's first step is cut off from its "
            "second.",
        ),
        Wrong(
            "only the value mended",
            misread_ends(sum_ends=one_late),
            "Half mended: V of the next state is cut at the right step, but the sum still reads the flag of the next "
            "step, one too early.",
        ),
        Wrong(
            "only the sum mended",
            misread_ends(value_ends=one_late),
            "Half mended: the sum is cut at the right step, but V of the next state in δ still reads the flag of the "
            "next step.",
        ),
        Wrong(
            "the value not cut",
            misread_ends(value_ends=never),
            "The sum stops at an episode's end, but its last δ still contains V of the next episode's first "
            "state: λ = 0 is wrong as well.",
        ),
        Wrong(
            "the sum not cut",
            misread_ends(sum_ends=never),
            "λ = 0 is right, λ = 0.7 is not: δ ignores the next episode, but the sum runs on into it.",
        ),
        Wrong(
            "nothing cut",
            misread_ends(value_ends=never, sum_ends=never),
            "One episode in a row is right, two are not: terminated is not used at all.",
        ),
        Wrong(
            "the flag inverted",
            misread_ends(value_ends=torch.logical_not, sum_ends=torch.logical_not),
            "The flags are used the wrong way round: terminated is True where the next step does not count.",
        ),
        Wrong(
            "the last reward cut as well",
            misread_ends(keeps=torch.logical_not),
            "You also drop the reward of the terminal step. That reward is the episode's own; what does not count "
            "is what comes after it.",
        ),
        Wrong(
            "the last step cut off",
            lambda r, v, end, *, gamma, lam: torch.where(end, 0, packed_gae(r, v, end, gamma=gamma, lam=lam)),
            "The steps before are right, but the terminal step itself is set to 0. It is real: only what comes after "
            "it does not count.",
        ),
        Wrong(
            "only the first end",
            lambda r, v, end, *, gamma, lam: packed_gae(r, v, end & (end.cumsum(1) == 1), gamma=gamma, lam=lam),
            "One episode in a row is right, several are not: only the first end is heeded.",
        ),
        Wrong(
            "everything after the first end dropped",
            lambda r, v, end, *, gamma, lam: torch.where(
                end.cumsum(1) - end.long() == 0, packed_gae(r, v, end, gamma=gamma, lam=lam), 0
            ),
            "You treat the rest of the row as padding. The second episode is as real as the first.",
        ),
        Wrong(
            "λ dropped",
            lambda r, v, end, *, gamma, lam: packed_gae(r, v, end, gamma=gamma, lam=1.0),
            "The ends are right now, but λ has gone from the recursion.",
        ),
        Wrong(
            "the value of the terminal step dropped",
            lambda r, v, end, *, gamma, lam: packed_gae(r, torch.where(end, 0, v), end, gamma=gamma, lam=lam),
            "You set V of the terminal step to 0. That state still has a value; what is 0 is the value after it.",
        ),
    ),
)
