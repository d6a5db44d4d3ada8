"""What a response is worth: a scorer, which is a reward model on the tokens or a function of the texts; never both."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lessons.data import PREFERENCE_FIELDS, Prompt, Tokenizer, encode_prompt, encode_response, pad
from rlhf_lessons.forward import context_of
from rlhf_lessons.generation import Samples
from rlhf_lessons.likelihood import token_terms
from rlhf_lessons.masking import check_same_shape, full_precision


class Scorer:
    """Scores (B,) of a whole batch, in one call, since a reward may compare responses. The base of one's own."""

    def __call__(self, samples: Samples) -> Tensor:
        """Scores (B,) of these samples, finite."""
        raise NotImplementedError


class ModelScorer(Scorer):
    """A reward model that shares the policy's tokenizer and reads its tokens; frozen here.

    rows: how many it reads at once, which bounds the memory taken; None for all.
    """

    def __init__(self, model: nn.Module, *, rows: int | None = None) -> None:
        self.model, self.rows = model.requires_grad_(False).eval(), rows

    def __call__(self, samples: Samples) -> Tensor:
        """The model's scores (B,). Raises ValueError for one that is not finite."""
        size = self.rows or len(samples)
        chunks = zip(samples.tokens.split(size), samples.attention_mask.split(size), strict=True)
        return finite(torch.cat([self.model(*chunk) for chunk in chunks]))


class TextScorer(Scorer):
    """A function (prompts, responses) -> one number each, of two lists of texts, EOS stripped.

    Where the prompts came with columns of their own, it gets those that its arguments name (all, if it takes any), as
    lists; an argument `ended` gets whether each response ended, where no column is called so.
    """

    def __init__(self, function: Callable[..., Any], tokenizer: Tokenizer) -> None:
        self.function, self.tokenizer = function, tokenizer
        parameters = inspect.signature(function).parameters
        self.texts, self.columns = list(parameters)[:2], list(parameters)[2:]
        self.takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def __call__(self, samples: Samples) -> Tensor:
        """The function's scores (B,). Raises ValueError for what is no finite number per response."""
        known = {name for record in samples.records for name in record}.difference(self.texts)
        asked = known if self.takes_all else known.intersection(self.columns)
        columns = {name: [record.get(name) for record in samples.records] for name in asked}
        if "ended" in self.columns:
            columns.setdefault("ended", samples.ended.tolist())
        scores = self.function(*samples.texts(self.tokenizer), **columns)
        return as_scores(scores, len(samples), samples.tokens.device)


def as_scorer(
    score: Scorer | nn.Module | Callable[..., Any], tokenizer: Tokenizer, *, rows: int | None = None
) -> Scorer:
    """A scorer as it is, a reward model or a function of texts as the scorer made of it."""
    if isinstance(score, nn.Module):
        return ModelScorer(score, rows=rows)
    return score if isinstance(score, Scorer) else TextScorer(score, tokenizer)


def as_scores(scores: Any, count: int, device: torch.device | str = "cpu") -> Tensor:
    """What a scorer returned as a tensor (count,). Raises ValueError unless it is that many finite numbers."""
    try:
        scores = torch.as_tensor(scores, dtype=torch.get_default_dtype(), device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"scores must be numbers, one per response; got {scores!r:.80}") from error
    if scores.shape != (count,):
        raise ValueError(f"scores must be one number per response, ({count},); got {tuple(scores.shape)}")
    return finite(scores)


def finite(scores: Tensor) -> Tensor:
    """The scores as they are. Raises ValueError when one is not finite."""
    if not scores.isfinite().all():
        raise ValueError("scores must be finite numbers; got NaN or infinity")
    return scores


def missing_eos_scores(scores: Tensor, ended: Tensor, *, penalty: float, mode: str = "subtract") -> Tensor:
    """Scores (B,) with the price of not having ended: `penalty` subtracted, or −penalty in the score's place.

    mode: "subtract" (TRL) or "replace" (Ziegler et al. 2019); raises ValueError for another.
    """
    if mode not in ("subtract", "replace"):
        raise ValueError(f'mode must be "subtract" or "replace"; got {mode!r}')
    penalised = scores - penalty if mode == "subtract" else torch.full_like(scores, -penalty)
    return torch.where(ended, scores, penalised)


def best_of_mean(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """Expected value of the response that best-of-n keeps, from m ≥ n samples of a prompt: none of them is wasted.

        Σ_j C(j−1, n−1)/C(m, n) · value of the j-th in rising order of score                            (Eq. 14.3)

    scores, values (B, m) -> (B,): the mean over all ways to pick n of the m, so unbiased for each n, and `values` may
    be the scores themselves or another reward. Equal scores share their weight. Raises ValueError for unequal shapes or
    n outside 1 … m.
    Source: Chen et al. 2021, "Evaluating large language models trained on code", §2.1, for right and wrong.
    """
    check_same_shape(scores=scores, values=values)
    m = scores.shape[-1]
    if not 1 <= n <= m:
        raise ValueError(f"n must be a whole number between 1 and the {m} samples of a prompt; got {n}")
    scores, values = full_precision(scores), full_precision(values)
    upto = (scores[..., :, None] >= scores[..., None, :]).sum(dim=-1)  # how many score no more
    ties = (scores[..., :, None] == scores[..., None, :]).sum(dim=-1)

    def chance(rank: Tensor) -> Tensor:
        """That all n picked are among the `rank` lowest: C(rank, n)/C(m, n), in float64, since it is tiny at first."""
        rank = rank.double()
        ways = torch.lgamma(rank + 1) - torch.lgamma((rank - n).clamp(min=0) + 1)
        return torch.where(rank < n, 0, (ways - (math.lgamma(m + 1) - math.lgamma(m - n + 1))).exp())

    weights = ((chance(upto) - chance(upto - ties)) / ties).to(values.dtype)
    return (weights * values).sum(dim=-1)


def score_texts(
    reward_model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[Prompt], responses: Sequence[str],
    *, ended: Sequence[bool] | None = None, sampled: bool = False, batch_size: int = 256,
) -> Tensor:  # fmt: skip
    """A reward model's scores (N,) of texts, on the CPU.

    ended: which responses are read with an EOS at their end; all, where it is not given. sampled: whether they are read
    just as they stand after their prompts (see `encode_response`). Raises ValueError for a text longer than the model's
    context, and for none.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none")
    ends = [True] * len(prompts) if ended is None else ended
    rows = [encode_prompt(tokenizer, prompt) + encode_response(tokenizer, prompt, response, ended=end, sampled=sampled)
            for prompt, response, end in zip(prompts, responses, ends, strict=True)]  # fmt: skip
    return score_ids(reward_model, rows, pad_id=tokenizer.pad_token_id, batch_size=batch_size)


@torch.no_grad()
def score_ids(reward_model: nn.Module, rows: list[list[int]], *, pad_id: int, batch_size: int = 256) -> Tensor:
    """A reward model's scores (N,) of texts given as token ids, on the CPU.

    Raises ValueError for a text longer than the model's context.
    """
    longest, context = max(map(len, rows)), context_of(reward_model)
    if longest > context:
        raise ValueError(f"texts must have at most {context} tokens, the reward model's context; got one of {longest}")
    device, starts = next(reward_model.parameters()).device, range(0, len(rows), batch_size)
    chunks = (pad(rows[start : start + batch_size], pad_id, side="right") for start in starts)
    return torch.cat([reward_model(tokens.to(device), mask.to(device)).cpu() for tokens, mask in chunks])


def preference_accuracy(
    reward_model: nn.Module, preferences: Sequence[Mapping[str, str]], tokenizer: Tokenizer
) -> float:
    """Share of the pairs in which the chosen text scores higher than the rejected one; equal scores count a half."""
    prompts, *answers = ([pair[name] for pair in preferences] for name in PREFERENCE_FIELDS)
    chosen, rejected = (score_texts(reward_model, tokenizer, prompts, side) for side in answers)
    return float(((chosen - rejected).sign() + 1).mean() / 2)


@torch.no_grad()
def text_log_probs(
    lm: nn.Module, tokenizer: Tokenizer, prompts: Sequence[Prompt], responses: Sequence[str], *,
    temperature: float = 1.0, batch_size: int = 256,
) -> Tensor:  # fmt: skip
    """Log-probability (N,) that a language model answers a prompt with this response and then ends it, in nats.

    By teacher forcing, so without sampling: where one text alone is right, its exponential p is the exact pass@1, and
    1 − (1 − p)^k the exact pass@k. On the CPU. Raises ValueError for no prompts.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none")
    asked = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    given = [encode_response(tokenizer, *pair) for pair in zip(prompts, responses, strict=True)]
    some = [slice(start, start + batch_size) for start in range(0, len(asked), batch_size)]
    options = dict(pad_id=tokenizer.pad_token_id, temperature=temperature)
    return torch.cat([ids_log_probs(lm, asked[rows], given[rows], **options).cpu() for rows in some])


def ids_log_probs(
    lm: nn.Module, prompts: list[list[int]], responses: list[list[int]], *, pad_id: int, temperature: float = 1.0
) -> Tensor:
    """Log-probability (N,) of each response, given as token ids, after its prompt; gradients flow to the model."""
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    tokens, mask = (x.to(lm.device) for x in pad(texts, pad_id, side="right"))
    first = torch.tensor([len(prompt) for prompt in prompts], device=lm.device)[:, None]
    is_response = mask[:, 1:] & (torch.arange(1, tokens.shape[1], device=lm.device) >= first)
    log_probs = token_terms(lm, tokens, mask, is_response, temperature=temperature).log_probs
    return torch.where(is_response, log_probs, 0).sum(dim=1)


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """Chance that at least one of k samples is right, estimated without bias from n >= k samples of each prompt.

        pass@k = 1 − C(n − c, k) / C(n, k),   c the number of right ones                               (Eq. 15.1)

    It counts the ways to choose k of the n samples that hold no right one, where 1 − (1 − c/n)^k would be too low.
    correct: (N, n) bool, or 0 and 1 -> (N,) float64. The counts are whole numbers, so only the division rounds.
    Raises ValueError for a k that is no whole number from 1 to n, and for an entry other than 0 and 1.
    Source: Chen et al. 2021, "Evaluating large language models trained on code", §2.1.
    """
    if correct.dim() != 2 or not ((correct == 0) | (correct == 1)).all():
        raise ValueError(f"correct must be (prompts, samples) of 0 and 1; got {tuple(correct.shape)} {correct!r:.60}")
    samples = correct.shape[1]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= samples:
        raise ValueError(f"k must be a whole number from 1 to {samples}, the samples of a prompt; got {k!r}")
    ways, wrong = math.comb(samples, k), (samples - correct.long().sum(dim=1)).tolist()
    return torch.tensor([(ways - math.comb(w, k)) / ways for w in wrong], dtype=torch.float64)
