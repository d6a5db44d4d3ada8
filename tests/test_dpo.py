"""DPO's fit: log-probabilities of whole responses, a reference that is read once, pairs that are learnt."""

import copy
import math

import pytest
import torch
from conftest import EOS, tiny_lm, word_tokenizer

from rlhf_lessons.fitting import fit_dpo, preference_log_probs

PAIRS = [
    {"prompt": "film", "chosen": "good", "rejected": "bad bad ."},
    {"prompt": "good film", "chosen": "good good .", "rejected": "bad"},
    {"prompt": "bad bad film", "chosen": ". good", "rejected": "bad ."},
]
FIT = dict(beta=0.5, epochs=6, batch_size=2, learning_rate=3e-3, device="cpu")


def test_a_response_s_log_probability_is_the_sum_over_its_tokens_and_the_eos():
    """Against the model read once for each text, without padding; the prompt's own tokens do not count."""
    lm, tokenizer = tiny_lm(), word_tokenizer()
    found = torch.stack(preference_log_probs(lm, PAIRS, tokenizer, rows=2))
    for column, pair in enumerate(PAIRS):
        prompt = tokenizer(pair["prompt"]).input_ids
        for row, side in enumerate(("chosen", "rejected")):
            answer = tokenizer(pair[side], add_special_tokens=False).input_ids + [EOS]
            with torch.no_grad():
                log_probs = lm(torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
            expected = sum(log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))
            assert found[row, column].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_chosen_texts_gain_on_rejected_ones(loss):
    reference, tokenizer = tiny_lm(), word_tokenizer()
    policy, frozen = copy.deepcopy(reference), copy.deepcopy(reference.state_dict())
    losses = fit_dpo(policy, reference, PAIRS, tokenizer, loss=loss, **FIT | dict(epochs=20))
    before, after = (torch.stack(preference_log_probs(lm, PAIRS, tokenizer)) for lm in (reference, policy))
    margins = (after - before)[0] - (after - before)[1]
    assert (margins > 0.3).all()
    assert losses[0] == pytest.approx(math.log(2) if loss == "dpo" else 1.0, abs=1e-5), "π = π_ref at the start"
    assert sum(losses[-2:]) < sum(losses[:2])
    assert all(torch.equal(x, frozen[name]) for name, x in reference.state_dict().items())


def test_ipo_stops_where_dpo_goes_on():
    """At β = 1/2 IPO draws every margin to 1; DPO, of pairs without noise, has no end."""
    gaps = {}
    for loss in ("dpo", "ipo"):
        reference, tokenizer = tiny_lm(), word_tokenizer()
        policy = copy.deepcopy(reference)
        fit_dpo(policy, reference, PAIRS, tokenizer, loss=loss, **FIT | dict(epochs=60, batch_size=3))
        before, after = (torch.stack(preference_log_probs(lm, PAIRS, tokenizer)) for lm in (reference, policy))
        gaps[loss] = (after - before)[0] - (after - before)[1]
    assert gaps["ipo"].tolist() == pytest.approx([1.0] * 3, abs=0.05) and gaps["dpo"].min() > 3


def test_the_reference_s_probabilities_are_those_before_the_fit():
    """A reference in training mode, with dropout, is read without it and left in the mode that it was in."""
    reference, tokenizer = tiny_lm(dropout=0.5).train(), word_tokenizer()
    first = [fit_dpo(tiny_lm(), reference, PAIRS, tokenizer, **FIT)[0] for _ in range(2)]
    assert first == pytest.approx([math.log(2)] * 2, abs=1e-5) and reference.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(loss="kto"), "loss must be one of dpo, ipo; got 'kto'"),
        (dict(beta=0.0), "beta must be a number > 0; got 0.0"),
        (dict(epochs=0), "epochs must be a number > 0; got 0"),
    ],
)
def test_settings_that_make_no_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fit_dpo(tiny_lm(), tiny_lm(), PAIRS, word_tokenizer(), **FIT | settings)


def test_pairs_and_models_that_make_no_fit_are_refused():
    lm, tokenizer = tiny_lm(), word_tokenizer()
    with pytest.raises(ValueError, match="reference must be a model of its own; got one that shares parameters"):
        fit_dpo(lm, lm, PAIRS, tokenizer, **FIT)
    with pytest.raises(ValueError, match="preferences must hold at least one pair; got none"):
        fit_dpo(tiny_lm(), lm, [], tokenizer, **FIT)
    long = {"prompt": "film", "chosen": "good " * 40, "rejected": "bad"}
    with pytest.raises(ValueError, match="pair 4: prompt and chosen must fit the model's context of 32"):
        fit_dpo(tiny_lm(), lm, [*PAIRS, long], tokenizer, **FIT)
