"""Lesson 16: weights for what another engine sampled, and an engine that nobody told of the new ones."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf_lessons import importance
from rlhf_lessons.checks._harness import Case, Check, Wrong
from rlhf_lessons.checks._inputs import Draw, prefix_mask, under_padding
from rlhf_lessons.checks._wording import Refused

# --- Exercise: truncated_ratio -----------------------------------------------------------------


def ratio_cases() -> list[Case]:
    d = Draw(1601, torch.float32)

    def near(*shape: int, scale: float = 0.4) -> tuple[Tensor, Tensor]:
        sampler = d.log_probs(*shape)
        return sampler + d.normal(*shape, scale=scale), sampler

    def case(says: str, pair: tuple[Tensor, Tensor], mask: Tensor | None, cap: float, level: str) -> Case:
        mask = torch.ones_like(pair[0], dtype=torch.bool) if mask is None else mask
        inputs = {"log_probs": pair[0], "sampler_log_probs": pair[1], "mask": mask}
        return Case(f'{says}, cap={cap:g}, level="{level}"', inputs, {"cap": cap, "level": level})

    ragged = prefix_mask([4, 1, 3], 4)
    padded = tuple(under_padding(x, ragged, garbage) for x, garbage in zip(near(3, 4), (7.0, -3.0), strict=True))
    far = torch.tensor([[-150.0, -90.0], [-3.0, -200.0]])
    return [
        case("one token, below the cap", (torch.tensor([[-1.0]]), torch.tensor([[-1.2]])), None, 2.0, "token"),
        case("one token, above it", (torch.tensor([[-0.5]]), torch.tensor([[-3.0]])), None, 2.0, "token"),
        case("one token, far below it", (torch.tensor([[-3.0]]), torch.tensor([[-0.5]])), None, 1.5, "token"),
        case("two texts of three tokens", near(2, 3), None, 1.5, "token"),
        case("two texts of three tokens", near(2, 3), None, 1.5, "sequence"),
        case("texts whose tokens make up for each other", near(4, 5, scale=0.8), None, 2.0, "sequence"),
        case("texts of different lengths", padded, ragged, 2.0, "token"),
        case("texts of different lengths", padded, ragged, 2.0, "sequence"),
        case("texts of different lengths, a high cap", padded, ragged, 50.0, "sequence"),
        case("probabilities too small to hold", (far + 0.3, far), None, 2.0, "token"),
        case("an engine that is the policy", (near(2, 3)[1],) * 2, None, 1.0, "sequence"),
    ]


def on_real_tokens(answer: Callable) -> Callable[..., Tensor]:
    """Weights of the real tokens, 0 in the padding; refused where a gradient flows or a token has no weight."""

    def weigh(log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor, *, cap: float, level: str) -> Tensor:
        given = log_probs.detach().clone().requires_grad_()
        weights = answer(given, sampler_log_probs, mask, cap=cap, level=level)
        if not isinstance(weights, Tensor):
            return weights
        if weights.shape != mask.shape:
            raise Refused(
                f"Your function returns shape {tuple(weights.shape)}, and each token wants a weight: "
                f"{tuple(mask.shape)}. A text's weight is the same for all its tokens: .expand_as(log_probs)."
            )
        if weights.requires_grad:
            raise Refused("Your weights carry a gradient.")
        return torch.where(mask, weights, 0)

    return weigh


Difference = Callable[[Tensor, Tensor, Tensor], Tensor]  # (log_probs, sampler_log_probs, mask) -> log-ratios (B, T)


def plain_difference(log_probs: Tensor, sampler: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, log_probs.detach() - sampler, 0)


def of_text(d: Tensor, mask: Tensor) -> Tensor:
    return d.sum(dim=1, keepdim=True).expand_as(d)


def weighed(
    *,
    difference: Difference = plain_difference,
    text: Callable[[Tensor, Tensor], Tensor] = of_text,
    token: Callable[[Tensor, Tensor], Tensor] = lambda d, mask: d,
    limit: Callable[[Tensor, float], Tensor] = lambda d, cap: d.exp().clamp(max=cap),
) -> Callable[..., Tensor]:
    """A `truncated_ratio` with one of its parts done otherwise."""

    def answer(log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor, *, cap: float, level: str) -> Tensor:
        d = difference(log_probs, sampler_log_probs, mask)
        return limit((text if level == "sequence" else token)(d, mask), cap)

    return answer


def capped_first(log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor, *, cap: float, level: str) -> Tensor:
    """Each token's ratio is capped before they are multiplied."""
    w = plain_difference(log_probs, sampler_log_probs, mask).exp().clamp(max=cap)
    return w.prod(dim=1, keepdim=True).expand_as(w) if level == "sequence" else w


def divided(log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor, *, cap: float, level: str) -> Tensor:
    """Probabilities divided, which may both have rounded to 0."""
    w = torch.where(mask, log_probs.detach().exp() / sampler_log_probs.exp(), 1)
    return (w.prod(dim=1, keepdim=True).expand_as(w) if level == "sequence" else w).clamp(max=cap)


truncated_ratio = Check(
    name="truncated_ratio",
    reference=on_real_tokens(importance.truncated_ratio),
    cases=ratio_cases,
    adapt=on_real_tokens,
    wrong=(
        Wrong(
            "with a gradient",
            weighed(difference=lambda x, y, mask: torch.where(mask, x - y, 0)),
            "Your weights carry a gradient. A weight says how much a sample counts; it is no part of what is "
            "maximised: .detach().",
        ),
        Wrong(
            "upside down",
            weighed(difference=lambda x, y, mask: torch.where(mask, y - x.detach(), 0)),
            "The ratio is upside down: what sampled stands below, the policy whose gradient is wanted above.",
        ),
        Wrong(
            "no cap",
            weighed(limit=lambda d, cap: d.exp()),
            "Weights below the cap are right, those above it are not cut.",
        ),
        Wrong(
            "cut on both sides",
            weighed(limit=lambda d, cap: d.exp().clamp(1 / cap, cap)),
            "You cut at 1/cap as well. Small weights do no harm, they are what takes back a text that was sampled too "
            "often: min(w, cap) cuts above alone.",
        ),
        Wrong(
            "cut as PPO's clip does",
            weighed(limit=lambda d, cap: d.exp().clamp(max(2 - cap, 0), cap)),
            "You cut below as well, as far under 1 as the cap is above it. That is PPO's clip; min(w, cap) cuts above "
            "alone.",
        ),
        Wrong(
            "masked",
            weighed(limit=lambda d, cap: torch.where(d.exp() <= cap, d.exp(), 0)),
            "What is above the cap gets weight 0. That is masking, the lesson's other remedy; here it is to get the "
            "cap.",
        ),
        Wrong(
            "max for min",
            weighed(limit=lambda d, cap: d.exp().clamp(min=cap)),
            "You raise what is below the cap to it, and leave what is above: max for min.",
        ),
        Wrong(
            "the logarithm capped",
            weighed(limit=lambda d, cap: d.clamp(max=cap).exp()),
            "You cut the logarithm of the ratio at cap. Cut the ratio: first exp, then min.",
        ),
        Wrong(
            "the log-ratio",
            weighed(limit=lambda d, cap: d.clamp(max=cap)),
            "This is the logarithm of the weight. Equal policies should give 1, not 0.",
        ),
        Wrong(
            "tokens whatever the level",
            weighed(text=lambda d, mask: d),
            'level="token" is right, level="sequence" is not: it gives each token its own ratio. A text\'s weight is '
            "the product of them, the same for all its tokens.",
        ),
        Wrong(
            "texts whatever the level",
            weighed(token=of_text),
            'level="sequence" is right, level="token" is not: it multiplies up the whole text. There each token keeps '
            "its own ratio.",
        ),
        Wrong(
            "capped before the product",
            capped_first,
            'level="sequence" alone is wrong: you cap each token and then multiply. A token above the cap may be made '
            "good by others below 1; cap the product. (And the product of capped ones has no cap at all.)",
        ),
        Wrong(
            "the geometric mean",
            weighed(
                text=lambda d, mask: (d.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(d),
            ),
            'level="sequence" alone is wrong: you take the mean of the log-ratios, not their sum. That is GSPO\'s '
            "ratio, lesson 12's: a root of the text's weight, and biased.",
        ),
        Wrong(
            "the geometric mean over all positions",
            weighed(text=lambda d, mask: d.mean(1, keepdim=True).expand_as(d)),
            'level="sequence" alone is wrong: you average the log-ratios, over padding, too. A text\'s weight is the '
            "product of its ratios: add up their logarithms.",
        ),
        Wrong(
            "the running product",
            weighed(text=lambda d, mask: d.cumsum(dim=1)),
            'level="sequence" alone is wrong: each token gets the product so far. The reward comes at the end and '
            "depends on all tokens, so all of them get the whole text's weight.",
        ),
        Wrong(
            "the padding multiplied in",
            weighed(difference=lambda x, y, mask: x.detach() - y),
            "Texts of equal length are right, shorter ones are not: what stands in the padding is multiplied in. Put "
            "the log-ratio to 0 where mask is False.",
        ),
        Wrong(
            "the product over the batch",
            weighed(text=lambda d, mask: d.sum(dim=0, keepdim=True).expand_as(d)),
            'level="sequence" alone is wrong: you add up over dim=0, the batch. The tokens of a text are dim=1.',
        ),
        Wrong(
            "probabilities divided",
            divided,
            "Ordinary probabilities are right, tiny ones are not: both round to 0, and 0/0 is NaN. Subtract the "
            "logarithms first, then take one exponential.",
        ),
        Wrong(
            "normalised",
            weighed(limit=lambda d, cap: (d.exp() / d.exp().mean()).clamp(max=cap)),
            "You divide the weights by their mean. That is self-normalised importance sampling, another estimator; "
            "wanted are the ratios themselves.",
        ),
    ),
)

# --- Bug hunt: an engine that nobody told -------------------------------------------------------

NAMES = ("embed", "layer", "norm", "head")
Receive = Callable[[dict[str, Tensor], Iterator[tuple[str, Tensor]]], object]


def receive(held: dict[str, Tensor], weights: Iterator[tuple[str, Tensor]]) -> int:
    """Copies each weight into the tensor that has its name; how many numbers came."""
    size = 0
    for name, x in weights:
        held[name].copy_(x)
        size += x.numel()
    return size


def engine_of(answer: Receive) -> Callable[..., tuple[Tensor, ...]]:
    """What an engine's own tensors (K, 2) hold once `answer` has received others, and the dictionary; what has come.

    Before the first is read the trainer goes on and changes its weights: an engine that shares their memory shows it.
    """

    def received(held: Tensor, fresh: Tensor, order: tuple[int, ...]) -> object:
        own, sent = [row.clone() for row in held], [row.clone() for row in fresh]
        names = NAMES[: len(own)]
        held_by_name = dict(zip(names, own, strict=True))
        said = answer(held_by_name, ((names[i], sent[i]) for i in order))
        if said is NotImplemented or said is None:
            return said
        if not isinstance(said, int) and not (isinstance(said, Tensor) and said.numel() == 1):
            raise Refused(f"Your function returns a {type(said).__name__}; how many numbers came is wanted.")
        named = torch.stack([held_by_name[name].detach() for name in names])
        for x in sent:
            x += 100.0
        return torch.stack([x.detach() for x in own]), named, torch.tensor(int(said))

    return received


def engine_cases() -> list[Case]:
    d = Draw(1611)

    def case(says: str, rows: int, order: tuple[int, ...] | None = None) -> Case:
        order = tuple(range(rows)) if order is None else order
        return Case(says, {"held": d.normal(rows, 2), "fresh": d.normal(rows, 2), "order": order})

    return [
        case("a single tensor", 1),
        case("three tensors", 3),
        case("three tensors, sent in another order", 3, (2, 0, 1)),
        case("four tensors", 4, (3, 1, 0, 2)),
    ]


def twice(held: dict[str, Tensor], weights: Iterator[tuple[str, Tensor]]) -> int:
    """The hunted function: the count uses the iterator up."""
    size = sum(x.numel() for _, x in weights)
    for name, x in weights:
        held[name].copy_(x)
    return size


def loaded(put: Callable[[dict[str, Tensor], str, Tensor], object], count: Callable = Tensor.numel) -> Receive:
    """A `receive` that puts each weight, or counts it, otherwise."""

    def answer(held: dict[str, Tensor], weights: Iterator[tuple[str, Tensor]]) -> int:
        size = 0
        for name, x in weights:
            put(held, name, x)
            size += count(x)
        return size

    return answer


def in_order(held: dict[str, Tensor], weights: Iterator[tuple[str, Tensor]]) -> int:
    """By position, whatever the names."""
    pairs = list(weights)
    for own, (_, x) in zip(held.values(), pairs, strict=True):
        own.copy_(x)
    return sum(x.numel() for _, x in pairs)


def count_last(held: dict[str, Tensor], weights: Iterator[tuple[str, Tensor]]) -> int:
    """Loads first, then counts what is left."""
    for name, x in weights:
        held[name].copy_(x)
    return sum(x.numel() for _, x in weights)


def replaced(held: dict[str, Tensor], name: str, x: Tensor) -> None:
    held[name] = x.clone()


def shared(held: dict[str, Tensor], name: str, x: Tensor) -> None:
    held[name].set_(x)


stale_engine = Check(
    name="stale_engine",
    reference=engine_of(receive),
    cases=engine_cases,
    adapt=engine_of,
    outputs=("what the engine holds", "what the dictionary holds", "numbers that came"),
    explains=(
        "The fault read an iterator twice. The count for the log used it up, and a loop over nothing raises no error: "
        "the engine went on with the weights of the first day, and the log said that all of them had come. The first "
        "iteration is right, so a check before the first update finds nothing. The reward in the log is the engine's "
        "own and stands still, which has a hundred other causes. One number in a log tells: the ratio before the first "
        "step of an iteration, first_ratio_error. It is 0 to rounding where the sampler is the policy; here it was "
        "0.000 in the first iteration and 0.116 in the second. Where a sampler is known to be inexact, its "
        "log-probabilities are not used for the ratio: then look at sampler_error."
    ),
    wrong=(
        Wrong(
            "read twice",
            twice,
            "The engine still holds what it held. `weights` is an iterator: the count reads it to its end, and the "
            "loop after it finds nothing and says nothing. Count inside the loop, or make a list first (which holds "
            "all weights in memory at once).",
        ),
        Wrong(
            "counted too late",
            count_last,
            "The weights arrive now, but the count is 0: `weights` is an iterator, and the loop has read it to its "
            "end. Count inside the loop.",
        ),
        Wrong(
            "the entry replaced",
            loaded(replaced),
            "You put a new tensor into the dictionary. The model does not look there: it goes on with its own "
            "tensors. Copy into them: held[name].copy_(x).",
        ),
        Wrong(
            "the memory shared",
            loaded(shared),
            "The engine's tensors are the trainer's now, one memory for both: the next optimiser step changes them in "
            "the middle of a batch. Copy the numbers: held[name].copy_(x).",
        ),
        Wrong(
            "by position",
            in_order,
            "Each weight goes to the tensor that stands in the same place, whatever its name: sent in another order "
            "they are mixed up. Look the tensor up by its name.",
        ),
        Wrong(
            "added",
            loaded(lambda held, name, x: held[name].add_(x)),
            "The new weights are added to the old ones. Copy them: held[name].copy_(x).",
        ),
        Wrong(
            "averaged",
            loaded(lambda held, name, x: held[name].lerp_(x, 0.5)),
            "The engine holds the mean of old and new weights: a policy between the two, and neither of them.",
        ),
        Wrong(
            "tensors counted",
            loaded(lambda held, name, x: held[name].copy_(x), lambda x: 1),
            "The weights arrive now, but you count tensors: wanted is how many numbers came, x.numel() of each.",
        ),
    ),
)
