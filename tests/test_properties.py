"""What holds for every estimator and any batch: shapes, precision, masks, padding, rows, memory layout, extreme values.

`CASES` names each estimator once, with the kinds of tensor that it takes; every property below runs over all of them.
Hypothesis draws the batches; it is derandomised, so a run repeats the last one.
"""

import ast
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lessons import advantages, baselines, importance, kl, masking, policy_gradient, ppo, preferences

MODULES = [masking, policy_gradient, baselines, advantages, importance, ppo, preferences, kl]
VOCABULARY = 5
DTYPES = [torch.float32, torch.float64]
SCALES = [1e-30, 1e-3, 1.0, 1e15]
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Case:
    """An estimator: its function, how to call it, what it takes (see `tensors`), and what shape it returns.

    output: "BT", "B" or "" for a scalar. rowwise: a row's result depends on that row alone.
    """

    function: Callable
    call: Callable
    inputs: tuple[str, ...]
    output: str
    label: str = ""
    rowwise: bool = True

    @property
    def name(self) -> str:
        return self.function.__name__ + self.label


def advantage_cases():
    """Each advantage estimator with a bootstrap value and ends within the rows."""
    settings = {
        advantages.td_residuals: {"gamma": 0.9},
        advantages.n_step_advantages: {"gamma": 0.9, "n": 3},
        advantages.gae: {"gamma": 0.9, "lam": 0.8},
        advantages.gae_recursion: {"gamma": 0.9, "lam": 0.8},
    }
    for function, kwargs in settings.items():
        for index, label in enumerate(["", " returns"] if "lam" in kwargs else [""]):

            def call(rewards, values, bootstrap, ends, mask=None, function=function, kwargs=kwargs, index=index):
                out = function(rewards, values, mask, terminated=ends, bootstrap_value=bootstrap, **kwargs)
                return out[index] if isinstance(out, tuple) else out

            yield Case(function, call, ("steps", "steps", "rows", "ends"), "BT", label)


def clipped(function):
    return lambda *x: function(*x, clip_eps=0.2)


MASKED = [
    Case(masking.masked_mean, masking.masked_mean, ("steps",), ""),
    Case(masking.masked_var, masking.masked_var, ("steps",), ""),
    Case(masking.masked_whiten, masking.masked_whiten, ("steps",), "BT", rowwise=False),
    Case(
        masking.masked_whiten,
        lambda *x: masking.masked_whiten(*x, shift_mean=False),
        ("steps",),
        "BT",
        " scale only",
        rowwise=False,
    ),
    Case(
        policy_gradient.discounted_return, lambda *x: policy_gradient.discounted_return(*x, gamma=0.9), ("steps",), "B"
    ),
    Case(policy_gradient.reward_to_go, lambda *x: policy_gradient.reward_to_go(*x, gamma=0.9), ("steps",), "BT"),
    Case(policy_gradient.policy_gradient_loss, policy_gradient.policy_gradient_loss, ("log_probs", "steps"), ""),
    *advantage_cases(),
    Case(ppo.clipped_policy_loss, clipped(ppo.clipped_policy_loss), ("log_probs", "log_probs", "steps"), ""),
    Case(ppo.clipped_value_loss, clipped(ppo.clipped_value_loss), ("steps", "steps", "steps"), ""),
    Case(ppo.clip_fraction, clipped(ppo.clip_fraction), ("positive",), ""),
    Case(
        ppo.clip_fraction,
        lambda ratio, adv, mask=None: ppo.clip_fraction(ratio, mask, clip_eps=0.2, advantages=adv),
        ("positive", "steps"),
        "",
        " with advantages",
    ),
    Case(ppo.explained_variance, ppo.explained_variance, ("steps", "steps"), ""),
    *(
        Case(
            ppo.aggregate,
            lambda *x, over=over, constant=constant: ppo.aggregate(*x, over=over, constant=constant),
            ("steps",),
            "",
            f" over {over}",
        )
        for over, constant in (("tokens", None), ("sequences", None), ("constant", 7))
    ),
    Case(importance.sequence_ratio, importance.sequence_ratio, ("log_probs", "log_probs"), "B"),
    *(
        Case(weigh, partial(weigh, cap=2.0, level=level), ("log_probs", "log_probs"), "BT", f" {level}")
        for weigh in (importance.truncated_ratio, importance.masked_ratio)
        for level in ("token", "sequence")
    ),
    Case(kl.sequence_kl_loss, kl.sequence_kl_loss, ("log_probs", "log_probs"), ""),
]
SHAPED = Case(  # its mask is not optional
    kl.shaped_rewards, lambda scores, x, mask: kl.shaped_rewards(scores, x, mask, kl_coef=0.1), ("rows", "steps"), "BT"
)
UNMASKED = [
    Case(policy_gradient.action_log_probs, policy_gradient.action_log_probs, ("logits", "actions"), "BT"),
    Case(policy_gradient.entropy, policy_gradient.entropy, ("logits",), "BT"),
    Case(baselines.leave_one_out_baseline, baselines.leave_one_out_baseline, ("samples",), "BK"),
    Case(baselines.optimal_baseline, baselines.optimal_baseline, ("weights", "rows"), ""),
    Case(importance.importance_ratio, importance.importance_ratio, ("log_probs", "log_probs"), "BT"),
    Case(importance.importance_mean, importance.importance_mean, ("rows", "weights"), ""),
    Case(
        importance.importance_mean,
        lambda f, w: importance.importance_mean(f, w, self_normalized=True),
        ("rows", "weights"),
        "",
        " self-normalised",
    ),
    Case(importance.effective_sample_size, importance.effective_sample_size, ("weights",), ""),
    Case(ppo.ppo_loss, lambda *x: ppo.ppo_loss(*x, vf_coef=0.1, ent_coef=0.01), ("scalar", "scalar", "scalar"), ""),
    Case(preferences.preference_probability, preferences.preference_probability, ("steps", "steps"), "BT"),
    Case(preferences.bradley_terry_loss, preferences.bradley_terry_loss, ("rows", "rows"), ""),
    Case(preferences.margins, lambda *x: preferences.margins(*x, beta=0.1), ("rows",) * 4, "B"),
    Case(preferences.dpo_loss, lambda *x: preferences.dpo_loss(*x, beta=0.1), ("rows",) * 4, ""),
    Case(preferences.ipo_loss, lambda *x: preferences.ipo_loss(*x, beta=0.1), ("rows",) * 4, ""),
    *(
        Case(
            baselines.group_advantages,
            lambda *x, scale=scale: baselines.group_advantages(*x, scale=scale),
            ("rows", "groups"),
            "B",
            f" over {scale}",
            rowwise=False,
        )
        for scale in ("none", "group", "batch")
    ),
    Case(kl.exact_kl, kl.exact_kl, ("logits", "logits"), "BT"),
    *(
        Case(
            kl.sampled_kl,
            lambda *x, kind=kind: kl.sampled_kl(*x, kind=kind),
            ("log_probs", "log_probs"),
            "BT",
            f" {kind}",
        )
        for kind in ("k1", "k2", "k3")
    ),
]
CASES = [*MASKED, SHAPED, *UNMASKED]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@dataclass(frozen=True)
class Batch:
    """What hypothesis draws: sizes, the real steps, and a seed and a scale for the numbers."""

    mask: tuple[tuple[bool, ...], ...]
    seed: int
    dtype: torch.dtype
    scale: float

    @property
    def steps(self) -> int:
        return len(self.mask[0])

    def mask_tensor(self) -> torch.Tensor:
        return torch.tensor(self.mask)

    def inputs(self, case: Case) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [tensor(kind, len(self.mask), self.steps, self.dtype, self.scale, generator) for kind in case.inputs]


def tensor(kind, rows, steps, dtype, scale, generator):
    """A random tensor of one kind. Ratios and log-probabilities keep a range in which their exponential is finite."""
    shape = {
        "rows": (rows,),
        "weights": (rows,),
        "groups": (rows,),
        "scalar": (),
        "samples": (rows, steps + 1),
        "logits": (rows, steps, VOCABULARY),
    }.get(kind, (rows, steps))
    if kind == "actions":
        return torch.randint(VOCABULARY, shape, generator=generator)
    if kind == "groups":
        return torch.randint(2, shape, generator=generator)
    if kind == "ends":
        return torch.rand(shape, generator=generator) < 0.2
    x = torch.randn(shape, dtype=dtype, generator=generator)
    if kind == "log_probs":
        return -x.abs() * min(scale, 5)
    if kind in ("positive", "weights"):
        return x.exp()
    return scale * x


@st.composite
def masks(draw):
    """Up to 4 rows of 1 to 9 steps: prefixes, as responses are, or with gaps; at least one real step a row."""
    rows, steps = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        row = st.integers(1, steps).map(lambda n: tuple(t < n for t in range(steps)))
    else:
        row = st.tuples(*[st.booleans()] * steps).filter(any)
    return tuple(draw(row) for _ in range(rows))


def batches(dtypes=DTYPES, scales=SCALES):
    return st.builds(Batch, masks(), st.integers(0, 10_000), st.sampled_from(dtypes), st.sampled_from(scales))


exact_batches = batches([torch.float64], [1.0])


def evaluate(case, inputs, mask=None):
    """The output and the gradient of a random weighting of it, for every input that can have one."""
    inputs = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = case.call(*inputs) if mask is None else case.call(*inputs, mask)
    # Fixed weights, the same for the same place: row and column numbers would tie the sum to the batch's size.
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    differentiable = [x for x in inputs if x.is_floating_point()]
    if not out.requires_grad:
        return out, []
    gradients = torch.autograd.grad((out * weights).sum(), differentiable, allow_unused=True)
    return out.detach(), [g for g in gradients if g is not None]


def per_step(case):
    """Which inputs have a number for each step, so that some of them can lie under the mask."""
    return [kind in ("steps", "log_probs", "positive") for kind in case.inputs]


# --- the list is complete ----------------------------------------------------------------------


def test_every_estimator_is_among_the_cases():
    """Public functions are those with an equation in their docstring, and the masked mean and variance."""
    labelled = {"masked_mean", "masked_var"}
    of_numbers = {"best_of_n_bound"}
    for module in MODULES:
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.FunctionDef) and "(Eq. " in (ast.get_docstring(node) or ""):
                labelled.add(node.name)
    assert labelled - of_numbers == {case.function.__name__ for case in CASES}
    masked = {case.function for case in (*MASKED, SHAPED)}
    assert masked == {case.function for case in CASES if "mask" in inspect.signature(case.function).parameters}


# --- shapes, precision, range ------------------------------------------------------------------


@each(CASES)
@few
@given(batch=batches())
def test_shape_dtype_and_finite_values_and_gradients(case, batch):
    mask = batch.mask_tensor()
    out, gradients = evaluate(case, batch.inputs(case), mask if case in (*MASKED, SHAPED) else None)
    rows, steps = mask.shape
    assert out.shape == {"BT": (rows, steps), "BK": (rows, steps + 1), "B": (rows,), "": ()}[case.output]
    assert out.dtype == batch.dtype
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


@each(CASES)
@pytest.mark.parametrize("steps", [1, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shortest_and_longest(case, steps, dtype):
    batch = Batch(((True,) * steps, (True,) + (False,) * (steps - 1)), 0, dtype, 1.0)
    out, gradients = evaluate(case, batch.inputs(case), batch.mask_tensor() if case in (*MASKED, SHAPED) else None)
    assert out.shape[:2] == {"BT": (2, steps), "BK": (2, steps + 1), "B": (2,), "": ()}[case.output]
    assert out.dtype == dtype and out.isfinite().all() and all(g.isfinite().all() for g in gradients)


@each(CASES)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(case, half):
    batch = Batch(((True,) * 300,) * 3, 0, torch.float32, 1.0)  # a half-precision sum of 900 would be far off
    mask = batch.mask_tensor() if case in (*MASKED, SHAPED) else None
    rounded = [x.to(half) if x.is_floating_point() else x for x in batch.inputs(case)]
    out, gradients = evaluate(case, rounded, mask)
    assert out.dtype == torch.float32
    assert all(g.dtype == half and g.isfinite().all() for g in gradients)
    again, _ = evaluate(case, [x.float() if x.is_floating_point() else x for x in rounded], mask)
    assert torch.equal(out, again)


# --- the mask ----------------------------------------------------------------------------------


@each([*MASKED, SHAPED])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@few
@given(batch=batches())
def test_nothing_under_the_mask_reaches_the_output_or_a_gradient(case, garbage, batch):
    mask, inputs = batch.mask_tensor(), batch.inputs(case)
    dirty = [
        torch.where(mask, x, garbage) if at_steps else x for x, at_steps in zip(inputs, per_step(case), strict=True)
    ]
    out, gradients = evaluate(case, inputs, mask)
    dirty_out, dirty_gradients = evaluate(case, dirty, mask)
    assert torch.equal(out, dirty_out)
    assert len(gradients) == len(dirty_gradients)
    for clean, soiled in zip(gradients, dirty_gradients, strict=True):
        assert torch.equal(clean, soiled)
        if clean.shape == mask.shape:
            assert (soiled[~mask] == 0).all()
    if case.output == "BT":
        assert (dirty_out[~mask] == 0).all()


@each([*MASKED, SHAPED])
@few
@given(batch=batches(), data=st.data())
def test_a_row_without_a_real_step_is_named(case, batch, data):
    row = data.draw(st.integers(0, len(batch.mask) - 1))
    mask = batch.mask_tensor()
    mask[row] = False
    with pytest.raises(ValueError, match=f"mask must have a real step .*; got none in row {row}"):
        case.call(*batch.inputs(case), mask)


@each(MASKED)
@few
@given(batch=batches())
def test_no_mask_is_a_mask_of_ones(case, batch):
    inputs = batch.inputs(case)
    ones = torch.ones_like(batch.mask_tensor())
    assert torch.equal(case.call(*inputs), case.call(*inputs, ones))


@each([*MASKED, SHAPED])
@few
@given(batch=exact_batches, extra=st.integers(1, 4))
def test_padding_changes_nothing(case, batch, extra):
    mask, inputs = batch.mask_tensor(), batch.inputs(case)
    wider = [
        torch.nn.functional.pad(x, (0, extra), value=9.0 if at_steps else 0) if x.ndim == 2 else x
        for x, at_steps in zip(inputs, per_step(case), strict=True)
    ]
    out = case.call(*inputs, mask)
    wide_out = case.call(*wider, torch.nn.functional.pad(mask, (0, extra)))
    if case.output == "BT":
        assert (wide_out[:, batch.steps :] == 0).all()
        wide_out = wide_out[:, : batch.steps]
    torch.testing.assert_close(wide_out, out)


# --- rows, memory ------------------------------------------------------------------------------


@each([case for case in CASES if case.output and case.rowwise])
@few
@given(batch=exact_batches)
def test_a_row_does_not_see_the_others(case, batch):
    mask, inputs = batch.mask_tensor(), batch.inputs(case)
    masks = [mask] if case in (*MASKED, SHAPED) else []
    whole = case.call(*inputs, *masks)
    for row in range(len(mask)):
        alone = case.call(*(x[row : row + 1] for x in (*inputs, *masks)))
        torch.testing.assert_close(whole[row : row + 1], alone)


@each([case for case in CASES if "scalar" not in case.inputs])
@few
@given(batch=exact_batches, data=st.data())
def test_the_order_of_the_rows_does_not_matter(case, batch, data):
    order = data.draw(st.permutations(range(len(batch.mask))))
    tensors = [*batch.inputs(case), *([batch.mask_tensor()] if case in (*MASKED, SHAPED) else [])]
    out, shuffled = case.call(*tensors), case.call(*(x[order] for x in tensors))
    torch.testing.assert_close(shuffled, out[order] if case.output else out)


def spread_out(x):
    """The same numbers, every second one of a larger tensor whose dimensions are reversed; NaN in between."""
    if x.ndim == 0:
        return x
    filler = math.nan if x.is_floating_point() else 1
    wide = torch.full([2 * size for size in reversed(x.shape)], filler).to(x.dtype)
    view = wide.permute(*reversed(range(x.ndim)))[(slice(None, None, 2),) * x.ndim]
    view.copy_(x)
    return view


@each([case for case in CASES if "scalar" not in case.inputs])
@few
@given(batch=batches(scales=[1.0]))
def test_memory_layout_does_not_matter_and_inputs_are_left_alone(case, batch):
    tensors = [*batch.inputs(case), *([batch.mask_tensor()] if case in (*MASKED, SHAPED) else [])]
    views = [spread_out(x) for x in tensors]
    assert all(view.stride(-1) != 1 for view in views)
    torch.testing.assert_close(case.call(*views), case.call(*tensors), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(x, view) for x, view in zip(tensors, views, strict=True))


# --- identities on any batch -------------------------------------------------------------------


@few
@given(batch=exact_batches, gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_the_scan_is_the_recursion(batch, gamma, lam):
    rewards, values, bootstrap, ends = batch.inputs(next(c for c in MASKED if c.function is advantages.gae))
    kwargs = {"gamma": gamma, "lam": lam, "terminated": ends, "bootstrap_value": bootstrap}
    scan = advantages.gae(rewards, values, batch.mask_tensor(), **kwargs)
    loop = advantages.gae_recursion(rewards, values, batch.mask_tensor(), **kwargs)
    torch.testing.assert_close(scan, loop)


@few
@given(batch=batches(scales=[1e-3, 1.0, 30.0]))
def test_ranges(batch):
    logits, ref_logits = batch.inputs(next(c for c in UNMASKED if c.function is kl.exact_kl))
    slack = 1e-5
    assert (policy_gradient.entropy(logits) >= -slack).all()
    assert (policy_gradient.entropy(logits) <= math.log(VOCABULARY) + slack).all()
    assert (kl.exact_kl(logits, ref_logits) >= -slack).all()
    weights = (logits - logits.max()).flatten().exp()
    assert 1 - slack <= importance.effective_sample_size(weights) <= len(weights) * (1 + slack)
    assert importance.importance_ratio(logits, logits).eq(1).all()


@few
@given(steps=st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 512)), max_size=20), target=st.floats(0.1, 20))
def test_the_adaptive_coefficient_stays_positive_and_moves_towards_the_target(steps, target):
    controller = kl.AdaptiveKL(0.2, target=target, horizon=512)
    for value, n in steps:
        before = controller.coef
        controller.update(value, n)
        assert 0.8 * before * (1 - 1e-12) <= controller.coef <= 1.2 * before * (1 + 1e-12)
        assert (controller.coef - before) * (value - target) >= 0
