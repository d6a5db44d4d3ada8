"""Fits to what is given: a language model on text, a reward model on preferences, a policy on preferences (DPO)."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rlhf_lessons import tiny_reviews
from rlhf_lessons.adapters import as_reference
from rlhf_lessons.checkpoint import Keeper, learnt, load_learnt
from rlhf_lessons.config import COUNT, POSITIVE
from rlhf_lessons.data import PREFERENCE_FIELDS, Tokenizer, encode_pair, encode_preferences, encode_prompt, pad
from rlhf_lessons.device import autocast, make_accelerator
from rlhf_lessons.forward import context_of
from rlhf_lessons.generation import respond
from rlhf_lessons.likelihood import token_terms
from rlhf_lessons.masking import masked_mean
from rlhf_lessons.models import check_separate, without_dropout
from rlhf_lessons.preferences import bradley_terry_loss, dpo_loss, ipo_loss
from rlhf_lessons.scoring import ids_log_probs, preference_accuracy, score_ids, score_texts, text_log_probs  # noqa: F401

OnStep = Callable[[int, int, float], None]  # (step, steps, loss)


def check_finite(measured: Mapping[str, Tensor], place: str) -> list[float]:
    """Numbers as Python's, read from the device in one go.

    Raises FloatingPointError, naming the first that is not finite and the place. To be called before an optimiser's
    step: a weight that is not finite once stays so.
    """
    values = torch.stack([value.detach() for value in measured.values()]).tolist()
    for name, value in zip(measured, values, strict=True):
        if not math.isfinite(value):
            advice = "a lower learning_rate may help; scores and models must be finite"
            raise FloatingPointError(f"{name} is {value} in {place}: {advice}")
    return values


def length_batches(lengths: list[int], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Row numbers of one epoch, `batch_size` at a time: shuffled, but rows of like length together, to pad little."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = 16 * batch_size
    batches = []
    for start in range(0, len(order), window):
        nearby = sorted(order[start : start + window], key=lengths.__getitem__)
        batches += [nearby[i : i + batch_size] for i in range(0, len(nearby), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]


def fit(
    model: nn.Module, loss_of: Callable[[list[int]], Tensor], lengths: list[int], *,
    epochs: float, batch_size: int, learning_rate: float, weight_decay: float = 0.01, seed: int = 0,
    device: torch.device, precision: str = "no", on_step: OnStep | None = None, keeper: Keeper | None = None,
) -> list[float]:  # fmt: skip
    """Minimise loss_of(row numbers) with AdamW, learning rate warmed up over 5 % of the steps, then linear to 0.

    on_step(step, steps, loss) is called after each step. keeper: keeps the fit's state; the fit continues from what it
    kept, and ends as if it had never stopped. Of several processes each does the same. Returns the losses. Raises
    FloatingPointError, naming the step, before one whose loss or gradient is not finite; ValueError for no rows or a
    setting out of range.
    """
    COUNT.check("the number of texts", len(lengths))
    COUNT.check("batch_size", batch_size)
    POSITIVE.check("epochs", epochs)
    POSITIVE.check("learning_rate", learning_rate)
    generator = torch.Generator().manual_seed(seed)
    trained, fused = [p for p in model.parameters() if p.requires_grad], device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused)
    steps = max(1, round(epochs * math.ceil(len(lengths) / batch_size)))
    losses: list[float] = []
    if kept := keeper and keeper.load():
        load_learnt(model, kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        losses = kept["losses"]
    model.train()
    batches = (rows for _ in itertools.count() for rows in length_batches(lengths, batch_size, generator))
    for step, rows in enumerate(itertools.islice(batches, len(losses), steps), start=len(losses) + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(step / max(1.0, 0.05 * steps), 1 - (step - 1) / steps)
        with autocast(device, precision):
            loss = loss_of(rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        try:
            number, _ = check_finite({"the loss": loss, "the gradient": norm}, f"step {step}")
            optimizer.step()
        finally:
            optimizer.zero_grad()
        losses.append(number)
        if on_step is not None:
            on_step(step, steps, number)
        if keeper is not None:
            keeper.offer(step, lambda: dict(model=learnt(model), optimizer=optimizer.state_dict(), losses=losses))
    model.eval()
    return losses


def language_model_loss(lm: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-probability of each real token given those before it, in nats. tokens, mask (B, L) -> ()."""
    return -masked_mean(token_terms(lm, tokens, mask, mask[:, 1:]).log_probs, mask[:, 1:])


def fit_language_model(
    lm: nn.Module, texts: Sequence[str], tokenizer: Tokenizer, *, epochs: float, batch_size: int = 64,
    learning_rate: float = 3e-3, max_length: int | None = None, seed: int = 0, device: str = "auto",
    precision: str = "no", on_step: OnStep | None = None, keeper: Keeper | None = None,
) -> list[float]:  # fmt: skip
    """Train on next-token prediction, each text a row with EOS at its end. Returns the losses, in nats per token.

    Texts longer than max_length tokens are cut there, without an EOS. Raises ValueError for no texts, and what `fit`
    does.
    """
    place = make_accelerator(device).device
    lm.to(place)
    sequences = [(encode_prompt(tokenizer, text) + [tokenizer.eos_token_id])[:max_length] for text in texts]

    def loss_of(rows: list[int]) -> Tensor:
        tokens, mask = pad([sequences[i] for i in rows], tokenizer.pad_token_id, side="right")
        return language_model_loss(lm, tokens.to(place), mask.to(place))

    return fit(lm, loss_of, [*map(len, sequences)], epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
               seed=seed, device=place, precision=precision, on_step=on_step, keeper=keeper)  # fmt: skip


def fit_reward_model(
    reward_model: nn.Module, preferences: Sequence[Mapping[str, str]], tokenizer: Tokenizer, *, epochs: float = 1,
    batch_size: int = 32, learning_rate: float = 1e-3, seed: int = 0, device: str = "auto", precision: str = "no",
    on_step: OnStep | None = None, keeper: Keeper | None = None,
) -> list[float]:  # fmt: skip
    """Train on preferences, {"prompt", "chosen", "rejected"}, by the Bradley–Terry loss. Returns the losses.

    One epoch by default: reward models overfit quickly. Afterwards its scores on these texts have mean 0, variance 1.
    Raises ValueError for no pairs or none whose texts differ, and what `fit` does.
    Source: Ouyang et al. 2022, §3.5.
    """
    place = make_accelerator(device).device
    reward_model.to(place)
    encoded = encode_preferences(tokenizer, preferences, context=context_of(reward_model))
    if encoded["chosen"] == encoded["rejected"]:
        raise ValueError("preferences must hold a pair that the tokenizer tells apart: give other texts; got none")

    def loss_of(rows: list[int]) -> Tensor:
        both = [encoded["chosen"][i] for i in rows] + [encoded["rejected"][i] for i in rows]
        tokens, mask = pad(both, tokenizer.pad_token_id, side="right")
        scores = reward_model(tokens.to(place), mask.to(place))
        return bradley_terry_loss(*scores.split(len(rows)))

    pairs = [*zip(encoded["chosen"], encoded["rejected"], strict=True)]
    lengths, texts = [max(map(len, pair)) for pair in pairs], [ids for pair in pairs for ids in pair]
    losses = fit(reward_model, loss_of, lengths, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
                 seed=seed, device=place, precision=precision, on_step=on_step, keeper=keeper)  # fmt: skip
    reward_model.normalize(score_ids(reward_model, texts, pad_id=tokenizer.pad_token_id))
    return losses


PREFERENCE_LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss}


def fit_dpo(
    policy: nn.Module, reference: nn.Module | None, preferences: Sequence[Mapping[str, str]], tokenizer: Tokenizer, *,
    beta: float, loss: str = "dpo", epochs: float = 2, batch_size: int = 32, learning_rate: float = 5e-4, seed: int = 0,
    device: str = "auto", precision: str = "no", on_step: OnStep | None = None, keeper: Keeper | None = None,
) -> list[float]:  # fmt: skip
    """Train a language model on preferences, {"prompt", "chosen", "rejected"}, directly. Returns the losses.

    policy: a plain language model; reference: a model of its own, or None: the policy with its adapter off; read once,
    before the first step; loss: "dpo" or "ipo" of `preferences`. Raises ValueError for no pairs, another loss,
    beta ≤ 0, a reference that shares parameters with the policy, and what `as_reference` and `fit` do.
    Source: Rafailov et al. 2023, "Direct preference optimization", §4.
    """
    if loss not in PREFERENCE_LOSSES:
        raise ValueError(f"loss must be one of {', '.join(PREFERENCE_LOSSES)}; got {loss!r}")
    POSITIVE.check("beta", beta)
    check_separate(policy, reference)
    place = make_accelerator(device).device
    policy = without_dropout(policy.to(place))
    encode_preferences(tokenizer, preferences, context=context_of(policy))  # what does not fit is said
    pairs = [encode_pair(tokenizer, pair) for pair in preferences]
    with as_reference(policy, reference) as held_to, autocast(place, precision):
        read = preference_log_probs(held_to.to(place), preferences, tokenizer, rows=2 * batch_size)
    ref_log_probs = torch.stack(read).to(place)

    def loss_of(rows: list[int]) -> Tensor:
        prompts, chosen, rejected = map(list, zip(*(pairs[row] for row in rows), strict=True))
        log_probs = ids_log_probs(policy, prompts * 2, chosen + rejected, pad_id=tokenizer.pad_token_id)
        return PREFERENCE_LOSSES[loss](*log_probs.split(len(rows)), *ref_log_probs[:, rows], beta=beta)

    lengths = [len(prompt) + max(map(len, answers)) for prompt, *answers in pairs]
    return fit(policy, loss_of, lengths, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed,
               weight_decay=0.0, device=place, precision=precision, on_step=on_step, keeper=keeper)  # fmt: skip


def preference_log_probs(
    lm: nn.Module, preferences: Sequence[Mapping[str, str]], tokenizer: Tokenizer, *, rows: int = 256
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) of chosen and of rejected responses, EOS included, in nats, on the CPU.

    rows: texts read at once. Raises ValueError for no pairs.
    """
    prompts, *answers = ([pair[name] for pair in preferences] for name in PREFERENCE_FIELDS)
    chosen, rejected = (text_log_probs(lm, tokenizer, prompts, side, batch_size=rows) for side in answers)
    return chosen, rejected


def annotated_preferences(lm: nn.Module, tokenizer: Tokenizer, count: int, *, seed: int) -> list[dict[str, str]]:
    """Pairs of a language model's answers to the tiny world's prompts, as its annotators chose between them.

    Raises ValueError unless count is a whole number >= 1.
    """
    COUNT.check("count", count)
    generator = torch.Generator().manual_seed(seed)
    prompts = tiny_reviews.prompts(count, generator)
    a, b = (respond(lm, tokenizer, prompts, generator=generator) for _ in range(2))
    return tiny_reviews.preference_pairs(prompts, a, b, generator)
