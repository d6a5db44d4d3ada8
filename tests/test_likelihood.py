"""Log-probabilities and entropies without all logits at once, held against the plain way: values, gradients, steps."""

import copy

import pytest
import torch
from conftest import PROMPTS, VOCABULARY, count_good, tiny_lm, tiny_policy, tiny_trainer, word_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lessons import forward, likelihood
from rlhf_lessons.config import METHODS as CONFIGS
from rlhf_lessons.data import pad
from rlhf_lessons.fitting import fit_dpo, fit_language_model, language_model_loss
from rlhf_lessons.forward import head_of_large
from rlhf_lessons.group_trainers import GRPOTrainer, RLOOTrainer
from rlhf_lessons.likelihood import head_log_probs, token_terms
from rlhf_lessons.masking import full_precision
from rlhf_lessons.models import bar_unused_ids
from rlhf_lessons.policy_gradient import action_log_probs, entropy

F64, NAN, INF = torch.float64, float("nan"), float("inf")
WIDE = 80  # words: more than the models are wide, and than the tokenizer knows


def normal(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def relative(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


def problem(dtype=F64, *, words=37, width=8, bias="none"):
    """Rows of 5, 2 and 3 real tokens; hidden states, weight and bias want a gradient; the last six words are barred."""
    hidden = normal(3, 5, width, seed=0, dtype=dtype).requires_grad_()
    weight = normal(words, width, seed=1, dtype=dtype).requires_grad_()
    own = None if bias == "none" else normal(words, seed=2, dtype=dtype).requires_grad_()
    used = own.masked_fill(torch.arange(words) >= words - 6, -INF) if bias == "barred" else own
    actions = torch.randint(words - 6, (3, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    return hidden, weight, used, actions, mask, [x for x in (hidden, weight, own) if x is not None]


def both_ways(hidden, weight, bias, actions, mask, parameters, *, temperature, ent_coef, autocast=False):
    """Values and gradients, plain and in chunks, of a loss that weighs each token differently.

    autocast: for the way there alone, as in a trainer, which comes back outside of it.
    """
    weights = normal(*mask.shape, seed=4, dtype=full_precision(hidden).dtype)

    def plain():
        logits = full_precision(torch.nn.functional.linear(hidden, weight, bias)) / temperature
        return action_log_probs(logits, actions), entropy(logits)

    def chunked():
        return head_log_probs(hidden, weight, bias, actions, mask, temperature=temperature)

    for way in (plain, chunked):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            log_probs, entropies = way()
        terms = log_probs * weights + (ent_coef * entropies * weights.flip(0) if ent_coef else 0)
        gradients = torch.autograd.grad(torch.where(mask, terms, 0).sum(), parameters, retain_graph=True)
        yield log_probs[mask], entropies[mask], *gradients


@pytest.fixture
def few_rows(monkeypatch):
    """Chunks of two rows of 37 words, three of 25: the last is shorter."""
    monkeypatch.setattr(likelihood, "CHUNK", 75)


@pytest.fixture
def all_large(monkeypatch):
    monkeypatch.setattr(forward, "LARGE", 0)


# --- From what the head reads ---------------------------------------------------------------------


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", ["none", "trained", "barred"])
def test_values_and_gradients_are_the_plain_ones(few_rows, bias, temperature, ent_coef):
    """To rounding in float64, and a millionth of their size in float32."""
    for dtype, tolerance in ((F64, 3e-15), (torch.float32, 1e-6)):
        plain, chunked = both_ways(*problem(dtype, bias=bias), temperature=temperature, ent_coef=ent_coef)
        assert len(plain) == (4 if bias == "none" else 5)
        for x, y in zip(chunked, plain, strict=True):
            assert x.dtype is y.dtype and relative(x, y) < tolerance


def test_gradients_are_those_of_finite_differences(few_rows):
    hidden, weight, bias, actions, mask, _ = problem(bias="trained")

    def terms(*head):
        return head_log_probs(*head, actions, mask, temperature=0.7)

    assert torch.autograd.gradcheck(terms, (hidden, weight, bias))


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
def test_half_precision_is_rounded_where_the_plain_way_rounds(few_rows, ent_coef):
    """Logits in bfloat16, all else in float32: values to float32's rounding, gradients to a last place of bfloat16."""
    plain, chunked = both_ways(*problem(torch.bfloat16, bias="trained"), temperature=0.7, ent_coef=ent_coef)
    for i, (x, y) in enumerate(zip(chunked, plain, strict=True)):
        assert x.dtype is y.dtype and relative(x.float(), y.float()) < (1e-6 if i < 2 else 2**-7)


def test_autocast_makes_the_logits_in_its_own_precision(few_rows):
    given = problem(torch.float32, bias="trained")
    given[1].data *= 2  # larger logits, whose rounding shows
    plain, chunked = both_ways(*given, temperature=1.0, ent_coef=0.3, autocast=True)
    in_full = next(both_ways(*given, temperature=1.0, ent_coef=0.3))
    for i, (x, y, z) in enumerate(zip(chunked, plain, in_full, strict=True)):
        # The weights' gradients are summed in another order; hidden states', at 2, are one product a row.
        assert x.dtype is y.dtype is torch.float32 and relative(x, y) < (1e-6 if i < 3 else 2**-7)
        assert relative(y, z) > 1e-4, "float32 would give another number"


def test_a_hidden_state_under_the_mask_counts_for_nothing(few_rows):
    hidden, weight, _, actions, mask, _ = problem()
    with torch.no_grad():
        hidden[~mask] = NAN
    log_probs, entropies = head_log_probs(hidden, weight, None, actions, mask)
    (log_probs.sum() + entropies.sum()).backward()
    assert not log_probs[~mask].any() and not entropies[~mask].any() and log_probs[mask].all()
    assert hidden.grad[mask].all() and not hidden.grad[~mask].any() and weight.grad.isfinite().all()


def test_certain_and_barred_words(few_rows):
    """A word that is certain has log-probability 0 and leaves no entropy; one that is barred has −∞, even if taken."""
    hidden, weight = torch.ones(1, 2, 1, dtype=F64), torch.zeros(3, 1, dtype=F64, requires_grad=True)
    bias = torch.tensor([0.0, -INF, -INF], dtype=F64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    log_probs, entropies = head_log_probs(hidden, weight, bias, torch.tensor([[0, 1]]), mask)
    assert log_probs.tolist() == [[0, -INF]] and entropies.tolist() == [[0, 0]]
    (log_probs[0, 0] + entropies.sum()).backward()
    assert not weight.grad.any()


def test_no_row_at_all_is_no_error():
    hidden, weight, _, actions, mask, _ = problem()
    log_probs, _ = head_log_probs(hidden, weight, None, actions, torch.zeros_like(mask))
    log_probs.sum().backward()
    assert not log_probs.any() and not hidden.grad.any() and not weight.grad.any()


def test_shapes_that_disagree_are_refused():
    hidden, weight, _, actions, mask, _ = problem()
    with pytest.raises(ValueError, match=r"mask must have the shape of actions, \(3, 5\); got \(3, 4\)"):
        head_log_probs(hidden, weight, None, actions, mask[:, :4])
    with pytest.raises(ValueError, match=r"hidden must have the shape of actions, \(3, 5\); got \(3, 4\)"):
        head_log_probs(hidden[:, :4], weight, None, actions, mask)


class Largest(TorchDispatchMode):
    """Remembers the largest result of an operation, and how often two matrices were multiplied."""

    size, products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tensors = [result] if isinstance(result, torch.Tensor) else []
        self.size = max([self.size, *(x.numel() for x in tensors)])
        self.products += any(name in str(function) for name in (".mm.", ".addmm"))
        return result


def test_all_logits_are_never_held_and_a_frozen_head_costs_no_product(monkeypatch):
    """400 tokens of 1,000 words, 4,000 logits at a time: nothing grows beyond the weight's 8,000 numbers."""
    monkeypatch.setattr(likelihood, "CHUNK", 4000)
    hidden = normal(2, 200, 8, seed=0, dtype=F64).requires_grad_()
    weight = normal(1000, 8, seed=1, dtype=F64)
    actions, mask = torch.zeros(2, 200, dtype=torch.long), torch.ones(2, 200, dtype=torch.bool)
    products = {}
    for frozen in (False, True):
        with Largest() as largest:
            log_probs, entropies = head_log_probs(hidden, weight.requires_grad_(not frozen), None, actions, mask)
            (log_probs.sum() + entropies.sum()).backward()
        assert largest.size == 8000
        products[frozen] = largest.products
    assert products == {False: 100 * 4, True: 100 * 3}, "forward, again, and a gradient each"


# --- From a model ---------------------------------------------------------------------------------


def texts(words=VOCABULARY):
    """Four texts of 9 tokens, padded on the left, and which of the last 5 are asked about."""
    tokens = torch.randint(3, words, (4, 9), generator=torch.Generator().manual_seed(5))
    attention = torch.arange(9) >= torch.tensor([0, 3, 1, 2])[:, None]
    return tokens, attention, torch.arange(5) < torch.tensor([5, 2, 3, 4])[:, None]


def measured(model, *asked, ent_coef=0.1, **options):
    """Terms of the real tokens, and the gradient of a loss of all of them."""
    terms, mask = token_terms(model, *asked, entropy_gradient=ent_coef > 0, **options), asked[-1]
    parts = [x * (1 + i) for i, x in enumerate(terms) if x is not None and x.requires_grad]
    model.zero_grad()
    torch.where(mask, sum(parts), 0).square().sum().backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach()[mask] for x in terms if x is not None], copy.deepcopy(gradient)


def assert_alike(model, monkeypatch, *asked, large=True, **options):
    """The plain way and, `large`, the other one: which is taken, and that both give the same."""
    plain = measured(model, *asked, **options)
    monkeypatch.setattr(forward, "LARGE", 0)
    assert (head_of_large(getattr(model, "lm", model), 20) is not None) == large
    found = measured(model, *asked, **options)
    monkeypatch.undo()
    for x, y in zip(found[0], plain[0], strict=True):
        assert relative(x, y) < 1e-5
    assert found[1].keys() == plain[1].keys()
    size = max(gradient.abs().max() for gradient in plain[1].values())
    for name, gradient in plain[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=3e-6 * size, rtol=0)


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
@pytest.mark.parametrize("critic", [None, "shared", "separate"])
def test_a_model_says_the_same_either_way(architecture, critic, ent_coef, monkeypatch):
    """Plain or with a critic, padded in front, some words barred; a temperature of 0.7."""
    model = tiny_lm(architecture, vocab_size=WIDE) if critic is None else None
    model = model or tiny_policy(architecture, critic=critic, head=1.0, vocab_size=WIDE)
    bar_unused_ids(getattr(model, "lm", model), word_tokenizer())
    assert_alike(model.train(), monkeypatch, *texts(), temperature=0.7, ent_coef=ent_coef)


def test_small_logits_take_the_plain_way_and_so_do_vocabularies_no_larger_than_the_model_is_wide(monkeypatch):
    lm = tiny_lm(vocab_size=WIDE)
    monkeypatch.setattr(forward, "LARGE", 20 * WIDE)
    assert head_of_large(lm, 20) is None and head_of_large(lm, 21) is lm.lm_head
    monkeypatch.setattr(forward, "LARGE", 0)
    assert head_of_large(tiny_lm(vocab_size=32), 20) is None


def capped(lm):
    """Gemma's: no logit beyond 30."""
    lm.register_forward_hook(lambda lm, inputs, output: output | {"logits": 30 * (output.logits / 30).tanh()})


def scaled(lm):
    lm.register_forward_hook(lambda lm, inputs, output: output | {"logits": output.logits / 8})


def cut(lm):
    lm.register_forward_hook(lambda lm, inputs, output: output | {"logits": output.logits[..., :50]})


def masked(lm):
    bar = torch.arange(WIDE) > 60
    lm.register_forward_hook(lambda lm, inputs, output: output | {"logits": output.logits.masked_fill(bar, -1e4)})


def taken_over(lm):
    """As libraries do that move weights about: the instance's own `forward`."""
    plain = lm.lm_head.forward
    lm.lm_head.forward = lambda hidden: 2 * plain(hidden)


def hooked(lm):
    lm.lm_head.register_forward_hook(lambda head, inputs, output: output + 1)


def another_layer(lm):
    class Doubled(torch.nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    head = Doubled(32, WIDE, bias=False)
    head.weight = lm.lm_head.weight
    lm.set_output_embeddings(head)


@pytest.mark.parametrize("change", [capped, scaled, cut, masked, taken_over, hooked, another_layer])
def test_what_is_done_to_the_logits_is_noticed(change, monkeypatch):
    """Also where the model was tried out before."""
    lm = tiny_lm("llama", vocab_size=WIDE)
    assert_alike(lm, monkeypatch, *texts())
    change(lm)
    assert_alike(lm, monkeypatch, *texts(), large=False)


def test_what_is_done_before_the_head_is_part_of_what_it_reads(monkeypatch):
    lm = tiny_lm("llama", vocab_size=WIDE)
    lm.lm_head.register_forward_pre_hook(lambda head, inputs: (inputs[0] / 3,))
    assert_alike(lm, monkeypatch, *texts())


def test_the_model_is_left_as_it_was(all_large):
    """Also by an error on the way."""
    lm = tiny_lm("llama", vocab_size=WIDE)
    tokens, attention, mask = texts()
    plain = lm(input_ids=tokens).logits
    token_terms(lm, tokens, attention, mask)
    assert "forward" not in vars(lm.lm_head) and torch.equal(lm(input_ids=tokens).logits, plain)
    with pytest.raises(IndexError):
        token_terms(lm, tokens + WIDE, attention, mask)
    assert "forward" not in vars(lm.lm_head)


# --- From a trainer, or a fit ---------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch):
    """How many tokens' log-probabilities were made without their logits."""
    counts, plain = [], likelihood.head_log_probs

    def counted(*args, **options):
        counts.append(int(args[4].sum()))
        return plain(*args, **options)

    monkeypatch.setattr(likelihood, "head_log_probs", counted)
    return counts


def trainer(method, **settings):
    small = dict(num_iterations=1, batch_size=16, minibatch_size=8, max_new_tokens=6, device="cpu") | settings
    if method == "ppo":
        return tiny_trainer(tiny_policy(head=0.1, vocab_size=WIDE), tiny_lm(seed=1, vocab_size=WIDE), **small)
    config = CONFIGS[method](**small, samples_per_prompt=4)
    models = (tiny_lm(seed=seed, vocab_size=WIDE) for seed in (0, 1))
    return dict(grpo=GRPOTrainer, rloo=RLOOTrainer)[method](config, *models, count_good, PROMPTS, word_tokenizer())


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ppo", dict(ent_coef=0.05, temperature=0.7)),
        ("ppo", dict(ent_coef=0.0, gradient_accumulation_steps=2)),
        ("grpo", dict(ent_coef=0.0, kl_in="loss", kl_kind="k3")),
        ("rloo", dict(ent_coef=0.05)),
    ],
)
def test_a_trainer_s_step_is_the_plain_one(method, settings, monkeypatch, read):
    """One batch, its gradient: at the same parameters, since Adam would blow up the rounding of what is nearly 0."""
    found = []
    for large in (2**26, 0):
        monkeypatch.setattr(forward, "LARGE", large)
        one = trainer(method, **settings)
        batch = one.rollout()
        loss, report = one.losses(batch)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in one.model.parameters() if p.grad is not None])
        found.append((batch, report, gradient, one.step()))
        assert bool(read) == (large == 0)
    (batch, report, gradient, metrics), (same_batch, *others) = found
    assert torch.equal(batch.tokens, same_batch.tokens)
    torch.testing.assert_close(same_batch.ref_log_probs, batch.ref_log_probs, atol=1e-5, rtol=0)
    for name, value in report.items():
        assert others[0][name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    assert (others[1] - gradient).norm() < 1e-5 * gradient.norm()
    for name in metrics.keys() - {"seconds_rollout", "seconds_update"}:
        assert others[2][name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("large", [2**26, 0])
def test_a_language_model_s_loss_is_the_mean_over_all_tokens_after_the_first(large, monkeypatch):
    """Each text read by itself, without padding."""
    monkeypatch.setattr(forward, "LARGE", large)
    lm, rows = tiny_lm(vocab_size=WIDE), [[1, 6, 4, 2], [1, 5, 7, 7, 3, 2], [1, 2]]
    said = [
        lm(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)[i, token] for row in rows
        for i, token in enumerate(row[1:])
    ]  # fmt: skip
    loss = language_model_loss(lm, *pad(rows, 0, side="right"))
    assert loss.item() == pytest.approx(-torch.stack(said).mean().item(), rel=1e-5)


def test_fits_on_texts_and_on_pairs_take_the_same_steps(monkeypatch, read):
    pairs = [dict(prompt="film", chosen="good", rejected="bad bad ."), dict(prompt="bad", chosen=".", rejected="film")]
    options = dict(epochs=2, batch_size=2, device="cpu", learning_rate=1e-3)
    losses = []
    for large in (2**26, 0):
        monkeypatch.setattr(forward, "LARGE", large)
        lm, policy, reference = (tiny_lm(seed=seed, vocab_size=WIDE) for seed in (0, 1, 2))
        losses.append(fit_language_model(lm, ["good film .", "bad", "bad film"], word_tokenizer(), **options))
        losses.append(fit_dpo(policy, reference, pairs, word_tokenizer(), beta=0.5, **options))
        assert bool(read) == (large == 0)
    assert losses[2:] == [pytest.approx(x, rel=1e-4) for x in losses[:2]]
    assert 10 in read, "tokens of both pairs' answers with their EOS, without prompts and padding"
