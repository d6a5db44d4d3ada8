"""Lesson 09: the value head, and padding on the left."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rlhf_lessons.checks._harness import Case, Check, Wrong
from rlhf_lessons.checks._inputs import Draw, prefix_mask, transposed
from rlhf_lessons.checks._wording import Refused
from rlhf_lessons.masking import position_ids
from rlhf_lessons.models import ValueHead, random_gpt2
from rlhf_lessons.rollout import reference_logits

# --- Exercise: the value head ------------------------------------------------------------------

NEW, TRAINED, AUTOCAST = "a new head", "a trained head", "under autocast to bfloat16"


def linear_parameters(head: nn.Module, hidden_size: int) -> tuple[nn.Parameter, nn.Parameter]:
    """The weight and the bias of the head's one linear layer; Refused for another set of parameters."""
    sizes = sorted(p.numel() for p in head.parameters())
    if sizes == [1, hidden_size]:
        return tuple(sorted(head.parameters(), key=torch.numel, reverse=True))
    if not sizes:
        raise Refused("The head has no parameters: make the layer in __init__ and keep it, self.linear = ...")
    if sizes == [hidden_size]:
        raise Refused("The head has no bias: V = w·h + b, and b is what a critic learns first.")
    raise Refused(
        f"The head's parameters have {sizes} numbers; one linear layer has [1, {hidden_size}], a bias and a weight."
    )


def check_start(weight: Tensor, bias: Tensor) -> None:
    """Refused unless a new head starts at 0."""
    names = [name for name, x in (("weight", weight), ("bias", bias)) if x.any()]
    if names:
        raise Refused(
            f"The {' and the '.join(names)} of a new head must be 0, so that the first advantages are the rewards "
            "alone: nn.init.zeros_(...)."
        )


def seeded(seed: int, function: Callable, *args: object) -> object:
    """What the function returns with the global generator at this seed."""
    torch.manual_seed(seed)  # whoever observes an answer puts the generator back
    return function(*args)


def head_function(head_class: Callable[[int], nn.Module]) -> Callable[..., Tensor]:
    """The learner's module as a function of the hidden states and, for a trained head, of its weight and bias."""

    def values_of(hidden, weight, bias, step):
        if isinstance(head_class, nn.Module):
            raise Refused("The class itself is wanted, not an instance of it: checks.value_head(MyValueHead).")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            head = head_class(hidden.shape[-1])
        if not isinstance(head, nn.Module):
            raise Refused("An nn.Module class is wanted: checks.value_head(MyValueHead).")
        if type(head).forward is nn.Module.forward:
            raise Refused("The head has no forward method.")
        if not list(head.parameters()) and head(hidden) is NotImplemented:
            return NotImplemented
        own_weight, own_bias = linear_parameters(head, hidden.shape[-1])
        if step == NEW:
            returned = head(hidden)
            check_start(own_weight, own_bias)
            return returned
        names = {id(p): name for name, p in head.named_parameters()}
        given = {names[id(own_weight)]: weight.view_as(own_weight), names[id(own_bias)]: bias.view_as(own_bias)}
        with torch.autocast("cpu", torch.bfloat16, enabled=step == AUTOCAST):
            first, again = (seeded(i, torch.func.functional_call, head, given, (hidden,)) for i in (1, 2))
        if isinstance(first, Tensor) and isinstance(again, Tensor) and not torch.equal(first, again):
            raise Refused("The same hidden states get other values when they come a second time: is there dropout?")
        return first

    return values_of


def head_cases() -> list[Case]:
    d = Draw(901, torch.float32)

    def case(says: str, step: str, *shape: int, change=lambda x: x) -> Case:
        weight, bias = d.normal(shape[-1]), d.normal(1)
        return Case(says, {"hidden": change(d.normal(*shape)), "weight": weight, "bias": bias, "step": step})

    return [
        case("a trained head, (B, L, D) = (2, 3, 4)", TRAINED, 2, 3, 4),
        case(NEW, NEW, 2, 3, 4),
        case("a trained head, one row", TRAINED, 1, 3, 4),
        case("a trained head, one position", TRAINED, 3, 1, 4),
        case("hidden states that are not contiguous", TRAINED, 2, 3, 5, change=transposed),
        case("hidden states in bfloat16", TRAINED, 2, 3, 4, change=lambda x: x.bfloat16()),
        case(AUTOCAST, AUTOCAST, 2, 3, 4),
    ]


class MisreadHead(nn.Module):
    """A value head with one thing read wrongly."""

    start = (0.0, 0.0)  # of weight and bias
    has_bias, cast, autocast_off = True, True, True

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, bias=self.has_bias)
        nn.init.constant_(self.linear.weight, self.start[0])
        if self.has_bias:
            nn.init.constant_(self.linear.bias, self.start[1])

    def before(self, hidden: Tensor) -> Tensor:
        return hidden

    def after(self, values: Tensor) -> Tensor:
        return values.squeeze(-1)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.float() if self.cast else hidden
        if not self.autocast_off:
            return self.after(self.linear(self.before(hidden)))
        with torch.autocast(hidden.device.type, enabled=False):
            return self.after(self.linear(self.before(hidden)))


def misread(**changes: object) -> type[MisreadHead]:
    """A MisreadHead with these attributes or methods."""
    return type("MisreadHead", (MisreadHead,), changes)


value_head = Check(
    name="value_head",
    reference=head_function(ValueHead),
    cases=head_cases,
    gradient_of=("hidden", "weight", "bias"),
    adapt=head_function,
    wrong=(
        Wrong(
            "not squeezed",
            misread(after=lambda self, values: values),
            "The values are (B, L, 1): the linear layer leaves a last dimension of 1. Squeeze it, or (B, L, 1) − "
            "(B, L) broadcasts to (B, L, L) without a word.",
        ),
        Wrong(
            "squeezed everywhere",
            misread(after=lambda self, values: values.squeeze()),
            "Most shapes are right, a batch of one row is not: squeeze() drops every dimension of size 1. "
            "squeeze(-1) drops the last alone.",
        ),
        Wrong(
            "nothing starts at 0",
            misread(start=(0.1, 0.1)),
            "A trained head is right, a new one is not: weight and bias start at random. Set both to 0, so that "
            "the first advantages are the rewards alone and no noise of the critic's.",
        ),
        Wrong(
            "the weight does not start at 0",
            misread(start=(0.1, 0.0)),
            "The bias starts at 0, the weight does not: nn.init.zeros_(self.linear.weight).",
        ),
        Wrong(
            "the bias does not start at 0",
            misread(start=(0.0, 0.1)),
            "The weight starts at 0, the bias does not: nn.init.zeros_(self.linear.bias).",
        ),
        Wrong(
            "no bias",
            misread(has_bias=False),
            "There is no bias. V = w·h + b: b is the average return, the first thing a critic learns.",
        ),
        Wrong(
            "the trunk cut off",
            misread(before=lambda self, hidden: hidden.detach()),
            "The values are right, but the hidden states are detached. With a shared trunk the value loss trains "
            "it too.",
        ),
        Wrong(
            "the last position only",
            misread(after=lambda self, values: values[:, -1, 0]),
            "You read the last position alone, as a reward model does. The critic values every state: (B, L).",
        ),
        Wrong(
            "the mean over the positions",
            misread(before=lambda self, hidden: hidden.mean(1, keepdim=True).expand_as(hidden)),
            "Every position gets the value of the mean hidden state, which has seen the future. Each state is "
            "valued by itself.",
        ),
        Wrong(
            "squashed",
            misread(after=lambda self, values: values.squeeze(-1).tanh()),
            "The value passes through tanh. A return may be any number: leave the linear layer's output as it is.",
        ),
        Wrong(
            "half precision not cast",
            misread(cast=False, autocast_off=False),
            "float32 is right, hidden states in bfloat16 are not: turn them into float32 before the layer. Values "
            "are differences of returns, and bfloat16 has three digits.",
        ),
        Wrong(
            "cast back after autocast",
            misread(autocast_off=False, after=lambda self, values: values.squeeze(-1).float()),
            "Under autocast the values are float32 in name only: the layer computed them in bfloat16, and what was "
            "rounded there does not come back. Switch autocast off around the layer.",
        ),
        Wrong(
            "autocast left on",
            misread(autocast_off=False),
            "Everything is right but under autocast: there the linear layer turns its input back into bfloat16. "
            "Switch it off around the layer: with torch.autocast(hidden.device.type, enabled=False).",
        ),
        Wrong(
            "dropout left on",
            misread(before=lambda self, hidden: nn.functional.dropout(hidden, 0.1)),
            "There is dropout in the head: the same state gets another value each time. Old and new values would then "
            "differ by noise, and a clip or an advantage cannot tell it from learning. Leave it out.",
        ),
        Wrong(
            "a dimension of the batch lost",
            misread(after=lambda self, values: values.squeeze(0).squeeze(-1)),
            "Several rows are right, one row is not: the batch dimension was squeezed away as well.",
        ),
        Wrong(
            "never negative",
            misread(after=lambda self, values: values.squeeze(-1).relu()),
            "The value passes through a ReLU. Returns may be negative: leave the linear layer's output as it is.",
        ),
        Wrong(
            "summed over the positions",
            misread(after=lambda self, values: values.squeeze(-1).sum(1)),
            "You sum over the positions. The critic values every state: (B, L).",
        ),
        Wrong(
            "the first position",
            misread(after=lambda self, values: values[:, 0, 0]),
            "You read the first position alone. The critic values every state: (B, L).",
        ),
        Wrong(
            "the sign",
            misread(after=lambda self, values: -values.squeeze(-1)),
            "The sign of the layer's output is flipped: V = w·h + b.",
        ),
        Wrong(
            "the output cut off",
            misread(after=lambda self, values: values.squeeze(-1).detach()),
            "The values are right, but detached: neither the head nor the trunk would learn from the value loss.",
        ),
        Wrong(
            "layer norm first",
            misread(before=lambda self, hidden: nn.functional.layer_norm(hidden, hidden.shape[-1:])),
            "You normalise the hidden states first. The trunk's last layer has done so; the head is w·h + b alone.",
        ),
    ),
)


# --- Bug hunt: left padding without position ids -----------------------------------------------


def response_logits(
    lm: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, responses: Tensor, response_mask: Tensor
) -> Tensor:
    """Logits (B, T, V) that the response was drawn from, of prompts padded on the left."""
    attention_mask = torch.cat([prompt_mask, response_mask], dim=1)
    tokens = torch.cat([prompt_ids, responses], dim=1)
    return reference_logits(lm, tokens, attention_mask, length=responses.shape[1], temperature=1.0)


def on_real_tokens(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The learner's function with its logits zeroed where the response is padding: there anything may stand."""

    def logits_of(lm, prompt_ids, prompt_mask, responses, response_mask):
        logits = function(lm, prompt_ids, prompt_mask, responses, response_mask)
        if not isinstance(logits, Tensor) or logits.shape[:2] != response_mask.shape:
            return logits
        return torch.where(response_mask.view(*response_mask.shape, *[1] * (logits.dim() - 2)), logits, 0)

    return logits_of


def padding_cases() -> list[Case]:
    d = Draw(921)
    # Its weights are spread ten times as far as usual: else a wrong position would hardly change what it says.
    lm = random_gpt2(
        seed=911, vocab_size=7, n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip

    def case(says: str, prompts: list[int], responses: list[int], steps: int = 3) -> Case:
        prompt_mask = prefix_mask(prompts, max(prompts)).flip(1)
        inputs = {
            "prompt_ids": d.tokens(7, *prompt_mask.shape),
            "prompt_mask": prompt_mask,
            "responses": d.tokens(7, len(responses), steps),
            "response_mask": prefix_mask(responses, steps),
        }
        return Case(says, {"lm": lm} | inputs)

    return [
        case("prompts of one length", [3, 3], [3, 3]),
        case("a prompt shorter by two", [2, 4], [3, 3]),
        case("a prompt of a single token, short responses", [1, 5, 3], [2, 3, 1]),
    ]


def misplaced(
    positions: Callable[[Tensor], Tensor | None], *, sees: Callable[[Tensor], Tensor | None] = lambda mask: mask
) -> Callable[..., Tensor]:
    """Logits with position ids, or the attention mask, made in another way from the attention mask."""

    def wrong_logits(lm, prompt_ids, prompt_mask, responses, response_mask):
        mask = torch.cat([prompt_mask, response_mask], dim=1)
        tokens = torch.cat([prompt_ids, responses], dim=1)
        logits = lm(input_ids=tokens, attention_mask=sees(mask), position_ids=positions(mask)).logits
        return logits[:, prompt_ids.shape[1] - 1 : -1]

    return wrong_logits


def placed(
    lm: nn.Module, prompt_ids: Tensor, responses: Tensor, mask: Tensor, positions: Tensor, shift: int = 1
) -> Tensor:
    """Logits of the response, read at these positions, `shift` before its tokens."""
    tokens = torch.cat([prompt_ids, responses], dim=1)
    logits = lm(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    start = prompt_ids.shape[1] - shift
    return logits[:, start : start + responses.shape[1]]


def columns(mask: Tensor) -> Tensor:
    """The column's number, in every row."""
    return torch.arange(mask.shape[1]).expand_as(mask)


left_padding = Check(
    name="left_padding",
    reference=on_real_tokens(response_logits),
    cases=padding_cases,
    adapt=on_real_tokens,
    explains=(
        "The fault left the positions to the model, which counts columns and so counts the padding. The same response "
        "to the same prompt had log-probability −6.31 alone and −5.92 beside a longer prompt: a factor of 1.5 in its "
        "probability, for nothing. "
        "Sampling and scoring with the same padding are wrong alike, so that the first ratio is 1 and no alarm "
        "sounds. What shows it is the same text scored alone and in a batch; in a log, a KL that is not 0 at the "
        "start, if policy and reference see other batches."
    ),
    wrong=(
        Wrong(
            "no position ids",
            misplaced(lambda mask: None),
            "Prompts of one length are right, a padded one is not: without position ids the model counts the "
            "padding, so the same prompt gets other positions in another batch. Count real tokens only.",
        ),
        Wrong(
            "counted from 1",
            misplaced(lambda mask: mask.long().cumsum(1)),
            "Positions count from 1: cumsum gives 1 at the first real token, where the model expects 0. Subtract 1.",
        ),
        Wrong(
            "−1 under the padding",
            misplaced(lambda mask: mask.long().cumsum(1) - 1),
            "The real tokens' positions are right, but the padding's are −1, which no embedding has: clamp at 0.",
        ),
        Wrong(
            "counted from the right",
            misplaced(lambda mask: (mask.long().flip(1).cumsum(1).flip(1) - 1).clamp(min=0)),
            "Positions count from the end of the text. They run from its start.",
        ),
        Wrong(
            "the attention mask dropped",
            misplaced(position_ids, sees=lambda mask: None),
            "The positions are right, but the attention mask is not passed any more: the tokens now attend to padding.",
        ),
        Wrong(
            "the mask as positions",
            misplaced(lambda mask: mask.long()),
            "You pass the mask itself as position ids: every real token then stands at position 1. Sum it up "
            "along the row.",
        ),
        Wrong(
            "the prompt's length forgotten",
            misplaced(lambda mask: (columns(mask) - (~mask).sum(1, keepdim=True)).clamp(min=0)),
            "With full responses it is right, with short ones it is not: you shift by all the padding of the row, "
            "also that on the right. Only the padding before a token moves it.",
        ),
        Wrong(
            "the response counted anew",
            lambda lm, ids, m, y, ym: placed(
                lm, ids, y, torch.cat([m, ym], 1), torch.cat([position_ids(m), position_ids(ym)], 1)
            ),
            "The prompt is right, the response is not: its positions start again at 0. They go on from the prompt.",
        ),
        Wrong(
            "counted over the batch",
            misplaced(lambda mask: (mask.long().cumsum(0) - 1).clamp(min=0)),
            "You sum the mask along dim 0, over the rows of the batch. Positions run along a row: dim 1.",
        ),
        Wrong(
            "the shift lost",
            lambda lm, ids, m, y, ym: placed(
                lm, ids, y, torch.cat([m, ym], 1), position_ids(torch.cat([m, ym], 1)), shift=0
            ),
            "The positions are right, but the shift by one has gone: the logits at the token itself have already read "
            "it.",
        ),
        Wrong(
            "positions in the opposite order",
            misplaced(lambda mask: position_ids(mask).flip(1)),
            "The positions run backwards: the first real token stands at 0.",
        ),
    ),
)
