"""What is one number a text: averages over texts of unequal lengths, and the sequence ratio, by hand."""

import math

import pytest
import torch

from rlhf_lessons.importance import importance_ratio, sequence_ratio
from rlhf_lessons.ppo import aggregate, clipped_policy_loss, policy_ratio

F64 = torch.float64
MASK = torch.tensor([[True, True, True], [True, False, False]])
TERMS = torch.tensor([[1.0, 2.0, 3.0], [10.0, math.nan, math.inf]], dtype=F64)
OLD = torch.tensor([[0.5, 0.5, 0.4], [0.2, math.nan, math.nan]], dtype=F64).log()
NEW = torch.tensor([[0.5, 0.25, 0.1], [0.3, math.nan, math.nan]], dtype=F64).log()


@pytest.mark.equation("12.2")
@pytest.mark.parametrize(("over", "constant", "expected"), [
    ("tokens", None, 16 / 4), ("sequences", None, (2 + 10) / 2), ("constant", 4, (6 / 4 + 10 / 4) / 2),
    ("constant", 0.5, (12 + 20) / 2),
])  # fmt: skip
def test_averages_by_hand(over, constant, expected):
    assert aggregate(TERMS, MASK, over=over, constant=constant).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.equation("12.2")
@pytest.mark.parametrize("over", ["tokens", "sequences", "constant"])
def test_texts_of_one_length_differ_by_a_factor_at_most(over):
    x = torch.arange(12, dtype=F64).view(3, 4)
    assert aggregate(x, over=over, constant=4 if over == "constant" else None).item() == pytest.approx(x.mean().item())


@pytest.mark.parametrize(("options", "message"), [
    (dict(over="texts"), "over must be one of tokens, sequences, constant; got 'texts'"),
    (dict(over="constant"), 'constant must be a number > 0 where over is "constant"; got None'),
    (dict(over="constant", constant=0), 'constant must be a number > 0 where over is "constant"; got 0'),
])  # fmt: skip
def test_averages_refuse_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        aggregate(TERMS, MASK, **options)


@pytest.mark.equation("12.3")
def test_the_sequence_ratio_by_hand():
    """Ratios 1, 1/2 and 1/4: their geometric mean is 1/2. The padding, NaN, does not count."""
    torch.testing.assert_close(sequence_ratio(NEW, OLD, MASK), torch.tensor([0.5, 1.5], dtype=F64))
    shared = policy_ratio(NEW, OLD, MASK, level="sequence")
    torch.testing.assert_close(shared, torch.tensor([[0.5], [1.5]], dtype=F64).expand(2, 3))
    assert torch.equal(policy_ratio(NEW, OLD, MASK, level="token")[MASK], importance_ratio(NEW, OLD)[MASK])


@pytest.mark.equation("12.3")
def test_one_token_s_gradient_reaches_all_of_its_text():
    new = NEW[:1].clone().requires_grad_()
    sequence_ratio(new, OLD[:1], MASK[:1]).sum().backward()
    torch.testing.assert_close(new.grad, torch.full((1, 3), 0.5 / 3, dtype=F64))


@pytest.mark.equation("12.3")
def test_a_text_is_clipped_as_a_whole():
    """Its geometric mean, 1/2, lies below the range, though one of its tokens has ratio 1."""
    new = NEW[:1].clone().requires_grad_()
    advantages = -torch.ones(1, 3, dtype=F64)
    for level, kept in (("sequence", [False, False, False]), ("token", [True, False, False])):
        loss = clipped_policy_loss(new, OLD[:1], advantages, MASK[:1], clip_eps=0.2, level=level)
        (grad,) = torch.autograd.grad(loss, new)
        assert (grad != 0).tolist() == [kept]


def test_other_levels_and_shapes_are_refused():
    with pytest.raises(ValueError, match="level must be token or sequence; got 'text'"):
        policy_ratio(NEW, OLD, MASK, level="text")
    with pytest.raises(ValueError, match="old_log_probs must have the shape of log_probs"):
        sequence_ratio(NEW, OLD[:, :2], MASK)
