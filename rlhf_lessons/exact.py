"""Exact answers for sequence models small enough to enumerate.

With a vocabulary of 3 to 6 tokens and 2 to 5 steps, every text that sampling can give fits in one
tensor. An expectation is then a sum, its gradient is autograd through that sum, and V, Q and A are
conditional means over the texts that share a prefix. Nothing here imports an estimator of the
package, so that the estimators can be held against it.

Shapes: N enumerated sequences, L steps, V tokens in the vocabulary, D parameters. A state s_t is a
prefix: the first t tokens. Token log-probabilities may come from any model, `TabularPolicy` or a
small transformer. `mask` is bool, True on real tokens (EOS included); None means that all are.
Sums over an enumeration run in float64, whatever precision comes in.
To enumerate batches of k sequences, enumerate their indices: `enumerate_sequences(N, k)`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

TOLERANCE = 1e-6  # by how much a sum of probabilities may miss 1


def enumerate_sequences(vocab_size: int, length: int, *, eos_id: int | None = None) -> tuple[Tensor, Tensor]:
    """Everything that sampling can give, each distinct sample once, in lexicographic order.

    Without `eos_id` these are the V^L sequences of `length` tokens. With it, a sequence ends at
    its first EOS: the positions after it hold token 0 and mask False.

    Returns: sequences (N, L) long, mask (N, L) bool.
    Raises: ValueError if a size is below 1 or `eos_id` is not a token.
    """
    _check_sizes(vocab_size, length, eos_id)
    tokens = torch.arange(vocab_size)
    sequences = torch.cartesian_prod(*[tokens] * length).view(-1, length)
    mask = eos_mask(sequences, eos_id)
    # Of all continuations of an EOS, keep the one that is made of zeros.
    kept = (mask | (sequences == 0)).all(dim=1)
    return sequences[kept], mask[kept]


def eos_mask(sequences: Tensor, eos_id: int | None) -> Tensor:
    """True up to and including each row's first EOS: (N, L) tokens -> (N, L) bool."""
    if eos_id is None:
        return torch.ones_like(sequences, dtype=torch.bool)
    is_eos = (sequences == eos_id).long()
    return (is_eos.cumsum(dim=1) - is_eos) == 0


def sequence_log_prob(token_log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log-probability of each whole sequence: the chain rule.

    log π(y|x) = Σ_t log π(a_t|s_t)                                     (Eq. 1.2)

    Shapes: token_log_probs (N, L), mask (N, L) -> (N,), in nats.
    Raises: ValueError on a wrong shape, a mask that is not a prefix, a row without a real token.
    Source: Sutton & Barto 2018, section 5.5 (probability of a trajectory, without the dynamics,
    which for text are deterministic).
    """
    mask = _checked_mask(token_log_probs, mask, "token_log_probs")
    return torch.where(mask, token_log_probs, 0.0).sum(dim=1)


def exact_expectation(
    log_prob_fn: Callable[[Tensor], Tensor], f: Tensor | Callable[[Tensor], Tensor], sequences: Tensor
) -> Tensor:
    """Expectation as the sum over everything that can happen; autograd gives its exact gradient.

    E_{τ~P}[f(τ)] = Σ_τ P(τ) f(τ)                                       (Eq. 3.2)

    Gradients flow through P and, where f is differentiable, through f. What f says about sequences
    of probability zero does not count, be it infinite or NaN.

    Shapes: log_prob_fn maps sequences (N, L) to log P (N,); f is a tensor (N, ...) or a function
    from sequences to one. Returns (...).
    Raises: ValueError on a wrong shape, or if the probabilities do not sum to 1 within 1e-6: the
    enumeration is then incomplete, or repeats itself.
    Source: Sutton & Barto 2018, section 13.2.
    """
    log_probs = log_prob_fn(sequences)
    _check_shape(log_probs, (len(sequences),), "log_prob_fn(sequences)")
    probs = log_probs.double().exp()
    _check_sums_to_one(probs.sum(), "the probabilities of `sequences`")
    values = f(sequences) if callable(f) else f
    if values.shape[:1] != probs.shape:
        raise ValueError(f"f must have shape ({len(probs)}, ...); got {tuple(values.shape)}")
    probs = probs.view(-1, *[1] * (values.dim() - 1))
    return (probs * torch.where(probs > 0, values, 0)).sum(dim=0)


def exact_moments(log_probs: Tensor, estimates: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and variance of an estimator that is computed from one sampled sequence.

    mean = Σ_τ P(τ) g(τ),   variance = Σ_τ P(τ) (g(τ) − mean)², each per coordinate. The sum of the
    variances is the trace of the covariance; a batch of B independent samples has 1/B of it.

    Shapes: log_probs (N,), estimates (N, ...) -> mean (...), variance (...).
    Raises: ValueError as in `exact_expectation`.
    """
    indices = torch.arange(len(log_probs))
    mean = exact_expectation(lambda _: log_probs, estimates, indices)
    variance = exact_expectation(lambda _: log_probs, (estimates - mean).square(), indices)
    return mean, variance


def per_sample_gradients(outputs: Tensor, params: Tensor | Sequence[Tensor]) -> Tensor:
    """Gradient of each element of `outputs` by all parameters, flattened and concatenated.

    For outputs = log π(a_t|s_t), (N, L), these are the score vectors (N, L, D). A policy-gradient
    estimator is then a weighted sum of them, whose moments `exact_moments` gives.

    Shapes: outputs (...), params one tensor or several, D numbers in all -> (..., D).
    Raises: ValueError if outputs is not differentiable.
    """
    if not outputs.requires_grad:
        raise ValueError("outputs must be a tensor that depends on params; got a constant")
    params = [params] if isinstance(params, Tensor) else list(params)
    flat, rows = outputs.flatten(), []
    for i in range(len(flat)):  # no vmap: this works for any model
        grads = torch.autograd.grad(flat[i], params, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows).view(*outputs.shape, -1)


def optimal_policy(ref_log_probs: Tensor, rewards: Tensor, *, kl_coef: float) -> Tensor:
    """The policy that maximises E_π[r] − β KL(π ‖ π_ref) over all distributions.

    π*(y) = π_ref(y) exp(r(y)/β) / Σ_y' π_ref(y') exp(r(y')/β)          (Eq. 8.4)

    Shapes: ref_log_probs (..., N) over all N outcomes, rewards (..., N), kl_coef = β > 0
    -> log π* (..., N), in nats. The maximum is β log Σ_y π_ref(y) exp(r(y)/β).
    Raises: ValueError if kl_coef is not positive, the shapes differ, or π_ref does not sum to 1.
    Source: Rafailov et al. 2023, "Direct Preference Optimization", section 4 and appendix A.1.
    """
    if not kl_coef > 0:
        raise ValueError(f"kl_coef must be positive; got {kl_coef}")
    _check_shape(rewards, ref_log_probs.shape, "rewards")
    totals = ref_log_probs.double().exp().sum(dim=-1)
    _check_sums_to_one(totals, "exp(ref_log_probs) over its last axis")
    return (ref_log_probs + rewards / kl_coef).log_softmax(dim=-1)


def best_of_n(log_probs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """The policy that best-of-n is: n independent samples, and the one with the highest reward kept.

    P(y) = π(y) · (F(r)ⁿ − F(r⁻)ⁿ) / (F(r) − F(r⁻))                     (Eq. 14.1)

    with r = r(y), F(r) = P(reward ≤ r), F(r⁻) = P(reward < r): samples of equal reward are as likely
    to be kept as they are to be drawn. `kl.best_of_n_bound` bounds KL(P ‖ π).

    Shapes: log_probs (N,) over all N outcomes, rewards (N,), n ≥ 1 -> (N,), in nats.
    Raises: ValueError if n is below 1, the shapes differ, or π does not sum to 1.
    Source: Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy".
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    _check_shape(rewards, log_probs.shape, "rewards")
    probs = log_probs.double().exp()
    _check_sums_to_one(probs.sum(), "exp(log_probs)")
    level = rewards.unique(return_inverse=True)[1]  # equal rewards, one level
    mass = probs.new_zeros(int(level.max()) + 1).index_add(0, level, probs)
    below = mass.cumsum(0) - mass
    # (bⁿ − aⁿ) / (b − a) as a sum of products, which loses nothing where b − a is small.
    upto = below + mass
    factor = sum(upto**k * below ** (n - 1 - k) for k in range(n))
    return log_probs.double() + factor.log()[level]


def sequence_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL divergence between two distributions over whole sequences.

    KL(p ‖ q) = Σ_y p(y) (log p(y) − log q(y)); infinite where q misses something p can give.

    Shapes: log_p (N,), log_q (N,) over the same complete enumeration -> (), in nats.
    Raises: ValueError if the shapes differ or either does not sum to 1.
    """
    _check_shape(log_q, log_p.shape, "log_q")
    log_p, log_q = log_p.double(), log_q.double()
    _check_sums_to_one(log_p.exp().sum(), "exp(log_p)")
    _check_sums_to_one(log_q.exp().sum(), "exp(log_q)")
    log_ratio = torch.where(log_p > -torch.inf, log_p - log_q, 0.0)
    return (log_p.exp() * log_ratio).sum()


def exact_values(
    token_log_probs: Tensor, rewards: Tensor, sequences: Tensor, mask: Tensor | None = None, *, gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """V, Q and A at each step of each enumerated sequence.

    With G_t = Σ_{t'≥t} γ^(t'−t) r_t':   V(s_t) = E[G_t | s_t],   Q(s_t, a_t) = E[G_t | s_t, a_t],
    A = Q − V. Each is the mean of G_t over the sequences that share the prefix, weighted by the
    probability of what follows it. Prefixes of probability zero have their values too.

    Shapes: token_log_probs (N, L), sequences (N, L), mask (N, L); rewards (N, L) for every step or
    (N,) for one reward on each sequence's last real token -> V, Q, A, each (N, L), 0 where masked.
    Raises: ValueError on wrong shapes or an incomplete enumeration.
    Source: Sutton & Barto 2018, sections 3.5 and 13.5.
    """
    mask = _checked_mask(token_log_probs, mask, "token_log_probs")
    _check_shape(sequences, mask.shape, "sequences")
    if rewards.dim() == 1:
        rewards = _on_last_token(rewards, mask)
    _check_shape(rewards, mask.shape, "rewards")
    log_probs = torch.where(mask, token_log_probs, 0.0).double()
    rewards = torch.where(mask, rewards, 0.0).double()
    ids = prefix_ids(sequences)
    future = log_probs.new_zeros(len(mask))  # log-probability of the tokens after step t
    to_go = log_probs.new_zeros(len(mask))
    v, q = [], []
    for t in reversed(range(mask.shape[1])):
        to_go = rewards[:, t] + gamma * to_go
        q.append(_group_sum(future.exp() * to_go, ids[:, t + 1]))
        future = log_probs[:, t] + future
        v.append(_group_sum(future.exp() * to_go, ids[:, t]))
        total = _group_sum(future.exp(), ids[:, t])
        _check_sums_to_one(total, f"the continuations of a prefix of {t} tokens")
    values, action_values = torch.stack(v[::-1], dim=1), torch.stack(q[::-1], dim=1)
    return values, action_values, action_values - values


def prefix_ids(sequences: Tensor) -> Tensor:
    """Numbers the states: equal ids in a column mean equal prefixes.

    Shapes: sequences (N, L) -> (N, L + 1) long. Column t belongs to the first t tokens, so column 0
    is all zeros and column L tells whole sequences apart. Ids start at 0 in each column.
    """
    tokens = sequences.unique(return_inverse=True)[1].view_as(sequences)
    columns = [torch.zeros_like(tokens[:, 0])]
    for t in range(tokens.shape[1]):
        longer = columns[-1] * tokens.numel() + tokens[:, t]
        columns.append(longer.unique(return_inverse=True)[1])
    return torch.stack(columns, dim=1)


def distinct_states(sequences: Tensor, mask: Tensor | None = None) -> Tensor:
    """True once for each state: at its first row, (N, L) -> (N, L) bool, False where masked."""
    mask = _checked_mask(sequences, mask, "sequences")
    ids = prefix_ids(sequences)[:, :-1]
    rows = torch.arange(len(ids))[:, None].expand_as(ids)
    first = torch.full_like(ids, len(ids)).scatter_reduce(0, ids, rows, "amin")
    return (first.gather(0, ids) == rows) & mask


def state_visitation(token_log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Probability P(s_t) = Π_{k<t} π(a_k|s_k) that sampling passes through each state.

    Shapes: token_log_probs (N, L) -> (N, L), 0 where masked. A state stands in every row that
    passes through it: index with `distinct_states` to have each once.
    """
    mask = _checked_mask(token_log_probs, mask, "token_log_probs")
    log_probs = torch.where(mask, token_log_probs, 0.0).double()
    before = torch.cat([torch.zeros_like(log_probs[:, :1]), log_probs[:, :-1]], dim=1)
    return torch.where(mask, before.cumsum(dim=1).exp(), 0.0)


class TabularPolicy(nn.Module):
    """The smallest language model: one row of logits for every prefix.

    `logits` (S, V) is the only parameter, float64, drawn from N(0, scale²); S = Σ_{t<L} V^t. Row 0
    is the empty prefix and the row of prefix s·a is V·row(s) + a + 1.
    Raises: ValueError if a size is below 1 or `eos_id` is not a token.
    """

    def __init__(
        self, vocab_size: int, length: int, *,
        eos_id: int | None = None, scale: float = 1.0, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_sizes(vocab_size, length, eos_id)
        self.vocab_size, self.length, self.eos_id = vocab_size, length, eos_id
        shape = (sum(vocab_size**t for t in range(length)), vocab_size)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.logits = nn.Parameter(scale * noise)

    def enumerate(self) -> tuple[Tensor, Tensor]:
        """All that `sample` can give: sequences (N, L), mask (N, L)."""
        return enumerate_sequences(self.vocab_size, self.length, eos_id=self.eos_id)

    def rows(self, sequences: Tensor) -> Tensor:
        """Row of `logits` that holds each state s_t: (N, T) -> (N, T), for T up to L."""
        if sequences.dim() != 2 or not 1 <= sequences.shape[1] <= self.length:
            raise ValueError(f"sequences must have shape (N, 1..{self.length}); got {tuple(sequences.shape)}")
        tokens = torch.where(eos_mask(sequences, self.eos_id), sequences, 0)
        if ((tokens < 0) | (tokens >= self.vocab_size)).any():
            low, high = tokens.min().item(), tokens.max().item()
            raise ValueError(f"sequences must hold tokens 0..{self.vocab_size - 1}; got {low}..{high}")
        rows = [torch.zeros_like(tokens[:, 0])]
        for t in range(tokens.shape[1] - 1):
            rows.append(self.vocab_size * rows[-1] + tokens[:, t] + 1)
        return torch.stack(rows, dim=1)

    def forward(self, sequences: Tensor) -> Tensor:
        """Logits for a_t given the tokens before it: (N, T) -> (N, T, V)."""
        return self.logits[self.rows(sequences)]

    def log_probs(self, sequences: Tensor) -> Tensor:
        """Token log-probabilities: (N, T) -> (N, T), 0 after EOS."""
        mask = eos_mask(sequences, self.eos_id)
        actions = torch.where(mask, sequences, 0).unsqueeze(-1)
        log_probs = self(sequences).log_softmax(dim=-1).gather(-1, actions).squeeze(-1)
        return torch.where(mask, log_probs, 0.0)

    def sequence_log_prob(self, sequences: Tensor) -> Tensor:
        """log π(y), a `log_prob_fn` for `exact_expectation`: (N, L) -> (N,)."""
        return sequence_log_prob(self.log_probs(sequences), eos_mask(sequences, self.eos_id))

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws n sequences token by token: sequences (n, L), mask (n, L), 0 after EOS."""
        sequences = torch.zeros(n, self.length, dtype=torch.long)
        for t in range(self.length):
            chances = self(sequences[:, : t + 1])[:, t].softmax(dim=-1)
            sequences[:, t] = torch.multinomial(chances, 1, generator=generator).squeeze(1)
        mask = eos_mask(sequences, self.eos_id)
        return torch.where(mask, sequences, 0), mask


def _check_sizes(vocab_size: int, length: int, eos_id: int | None) -> None:
    for name, size in (("vocab_size", vocab_size), ("length", length)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise ValueError(f"eos_id must be a token in 0..{vocab_size - 1}; got {eos_id}")


def _check_shape(tensor: Tensor, shape: Sequence[int], name: str) -> None:
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(tensor.shape)}")


def _check_sums_to_one(totals: Tensor, name: str) -> None:
    error = (totals.detach() - 1).abs()
    if not (error < TOLERANCE).all():  # written so that NaN fails too
        worst, asked = totals.flatten()[error.argmax()].item(), "is every outcome there, exactly once?"
        raise ValueError(f"{name} must sum to 1 within {TOLERANCE}; got {worst:.8g}; {asked}")


def _checked_mask(tensor: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """The mask, all True for None, after the checks that every function here makes."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have shape (N, L); got {tuple(tensor.shape)}")
    if mask is None:
        mask = torch.ones_like(tensor, dtype=torch.bool)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor; got {mask.dtype}")
    _check_shape(mask, tensor.shape, "mask")
    empty = (~mask).all(dim=1).nonzero().flatten()
    if len(empty):
        raise ValueError(f"mask must have a real token in each row; got none in row {empty[0]}")
    broken = (mask[:, 1:] & ~mask[:, :-1]).any(dim=1).nonzero().flatten()
    if len(broken):
        raise ValueError(f"mask must be True on a prefix of each row; got a gap in row {broken[0]}")
    return mask


def _on_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    _check_shape(scores, mask.shape[:1], "rewards")
    is_last = torch.arange(mask.shape[1]) == mask.sum(dim=1, keepdim=True) - 1
    return torch.where(is_last, scores[:, None], 0.0)


def _group_sum(x: Tensor, groups: Tensor) -> Tensor:
    """Each element replaced by the sum over its group: (N,), (N,) -> (N,)."""
    return x.new_zeros(len(x)).index_add(0, groups, x)[groups]
