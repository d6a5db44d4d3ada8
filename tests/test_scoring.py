"""What a scorer is given: the texts that were sampled, their columns, and an EOS where one was sampled."""

import inspect
import itertools

import pytest
import torch

from rlhf_lessons.data import pad
from rlhf_lessons.generation import Samples, best_of_n, sample_responses
from rlhf_lessons.scoring import (
    TextScorer,
    best_of_mean,
    pass_at_k,
    preference_accuracy,
    score_texts,
    text_log_probs,
)

PAD, BOS, EOS = 0, 1, 2


def samples_of(prompts, responses, *, ended=None, records=None):
    """Samples of these token ids; where nothing else is said, those that end in EOS have ended."""
    before, before_mask = pad(prompts, PAD, side="left")
    after, after_mask = pad(responses, PAD, side="right")
    return Samples(
        tokens=torch.cat([before, after], dim=1),
        attention_mask=torch.cat([before_mask, after_mask], dim=1),
        response_mask=after_mask,
        sampler_log_probs=torch.zeros(after.shape),
        ended=torch.tensor([ids[-1] == EOS for ids in responses] if ended is None else ended),
        group=torch.arange(len(prompts)),
        records=({},) * len(prompts) if records is None else tuple(records),
        prompt_length=before.shape[1],
    )


# --- Texts and columns ------------------------------------------------------------------------------------------------


def test_a_score_gets_what_was_sampled(tokenizer):
    """A prompt as it was given, or its tokens' text; a response without the token that ended it, whichever it was."""
    samples = samples_of(
        [[BOS, 6], [BOS, 4, 6], [BOS, 6]],
        [[4, EOS], [BOS, 5, 7], [5, 7]],
        ended=[True, False, True],
        records=[{"prompt": "film"}, {"prompt": [BOS, 4, 6]}, {"prompt": " film\n"}],
    )
    assert samples.texts(tokenizer) == (["film", "good film", " film\n"], ["good", "<bos> bad .", "bad"])


RECORDS = [{"prompt": "film", "answer": 3, "level": "a"}, {"prompt": "film", "answer": 4}]


def given_to(function, tokenizer, records=RECORDS):
    """What a score function is given beside the texts."""
    seen = {}

    def noting(*arguments, **columns):
        seen.update(columns)
        return [0.0, 0.0]

    noting.__signature__ = inspect.signature(function)
    TextScorer(noting, tokenizer)(samples_of([[BOS, 6], [BOS, 6]], [[4, EOS], [5, 5]], records=records))
    return seen


def test_a_score_gets_the_columns_that_it_names(tokenizer):
    answer, level, prompt, ended = [3, 4], ["a", None], ["film", "film"], [True, False]
    assert given_to(lambda prompts, responses: 0, tokenizer) == {}
    assert given_to(lambda p, r, answer, other=1: 0, tokenizer) == {"answer": answer}
    assert given_to(lambda p, r, *, level, prompt: 0, tokenizer) == {"level": level, "prompt": prompt}
    assert given_to(lambda p, r, **columns: 0, tokenizer) == {"answer": answer, "level": level, "prompt": prompt}
    assert given_to(lambda prompt, answer, **rest: 0, tokenizer) == {"level": level}
    assert given_to(lambda p, r, ended=None: 0, tokenizer) == {"ended": ended}
    own = [{"prompt": "film", "ended": "mine"}] * 2
    assert given_to(lambda p, r, ended: 0, tokenizer, own) == {"ended": ["mine", "mine"]}


@pytest.mark.parametrize("scores", [[[1.0], [2.0]], [1.0], [1.0, 2.0, 3.0], 1.0, []])
def test_scores_are_one_number_for_each_response(scores, tokenizer):
    samples = samples_of([[BOS, 6], [BOS, 6]], [[4, EOS], [5, 5]])
    with pytest.raises(ValueError, match=r"scores must be one number per response, \(2,\); got \("):
        TextScorer(lambda prompts, responses: scores, tokenizer)(samples)


# --- A reward model on texts ------------------------------------------------------------------------------------------


@pytest.mark.detail(25)
def test_only_what_ended_is_scored_with_an_eos(make_reward_model, tokenizer):
    model = make_reward_model()

    def scored(*ids):
        return model(torch.tensor([ids]), torch.ones(1, len(ids))).item()

    scores = score_texts(model, tokenizer, ["film"] * 2, ["good"] * 2, ended=torch.tensor([True, False])).tolist()
    assert scores == pytest.approx([scored(BOS, 6, 4, EOS), scored(BOS, 6, 4)], abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-3
    both = score_texts(model, tokenizer, ["film"] * 2, ["good"] * 2, ended=[False, True]).tolist()
    assert both == pytest.approx(scores[::-1], abs=1e-5)
    assert score_texts(model, tokenizer, ["film"], ["good"]).item() == pytest.approx(scores[0], abs=1e-5)


def test_nothing_to_score_is_refused(make_reward_model, tokenizer):
    with pytest.raises(ValueError, match="prompts must hold at least one prompt; got none"):
        score_texts(make_reward_model(), tokenizer, [], [])
    with pytest.raises(ValueError, match="prompts must hold at least one prompt; got none"):
        preference_accuracy(make_reward_model(), [], tokenizer)


def test_equal_scores_are_right_half_the_time(make_reward_model, tokenizer):
    equal, model = {"prompt": "film", "chosen": "good .", "rejected": "good ."}, make_reward_model()
    assert preference_accuracy(model, [equal] * 3, tokenizer) == 0.5
    apart = {"prompt": "film", "chosen": "good .", "rejected": "bad bad ."}
    turned = apart | {"chosen": apart["rejected"], "rejected": apart["chosen"]}
    assert preference_accuracy(model, [apart, turned, equal], tokenizer) == 0.5
    assert {preference_accuracy(model, [pair], tokenizer) for pair in (apart, turned)} == {0, 1}


# --- Best of n --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 6))
def test_no_sample_is_wasted(n):
    """The mean over all ways to pick n of five, two of them equal in score."""
    scores = torch.tensor([[0.3, 2.0, -1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    values = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = []
    for row in range(2):
        kept = []
        for picked in itertools.combinations(range(5), n):
            best = max(scores[row, i].item() for i in picked)
            of = [values[row, i].item() for i in picked if scores[row, i] == best]
            kept.append(sum(of) / len(of))
        expected.append(sum(kept) / len(kept))
    assert best_of_mean(scores, values, n).tolist() == pytest.approx(expected)


def test_many_samples_lose_no_precision():
    """Ranks as values: the mean of the highest of n of m is n(m + 1)/(n + 1)."""
    ranks = torch.arange(1.0, 1025.0)[None]
    for n in (1, 2, 64, 1000, 1024):
        assert best_of_mean(ranks, ranks, n).item() == pytest.approx(n * 1025 / (n + 1), rel=1e-5)


def test_more_than_there_are_cannot_be_picked():
    for n in (0, 4):
        with pytest.raises(
            ValueError, match=f"n must be a whole number between 1 and the 3 samples of a prompt; got {n}"
        ):
            best_of_mean(torch.zeros(2, 3), torch.zeros(2, 3), n)
    with pytest.raises(ValueError, match="values must have the shape of scores"):
        best_of_mean(torch.zeros(2, 3), torch.zeros(2, 4), 1)


def test_the_best_of_each_draw_is_kept_and_the_first_of_equals():
    samples = samples_of([[BOS]] * 6, [[4, EOS], [5, EOS], [6, EOS], [7, EOS], [4, EOS], [5, EOS]])
    samples = type(samples)(**vars(samples) | {"group": torch.tensor([3, 3, 1, 1, 1, 2])})
    kept = best_of_n(samples, torch.tensor([0.0, 1.0, 5.0, 2.0, 5.0, -9.0]))
    assert kept.responses[:, 0].tolist() == [6, 5, 5] and kept.group.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"scores must be \(B,\) = \(6,\); got \(5,\)"):
        best_of_n(samples, torch.zeros(5))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_probability_of_a_text_is_its_share_of_the_samples(make_lm, tokenizer, temperature):
    lm, prompts = make_lm(seed=11), ["film", "bad good film"]
    p = text_log_probs(lm, tokenizer, prompts, ["", "good"], temperature=temperature).exp()
    input_ids, mask = pad([tokenizer(prompt).input_ids for prompt in prompts for _ in range(4000)], 0, side="left")
    drawn = sample_responses(
        lm, input_ids, mask, max_new_tokens=3, eos_id=tokenizer.eos_token_id, pad_id=0, temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    ids = [[tokenizer.eos_token_id, 0, 0], [*tokenizer("good", add_special_tokens=False).input_ids, 2, 0]]
    equal = torch.tensor([drawn.tokens[row].tolist() == ids[row // 4000] for row in range(8000)]).view(2, 4000)
    share = equal.double().mean(dim=1)
    assert (p > 0.005).all() and ((share - p).abs() < 4 * (p * (1 - p) / 4000).sqrt()).all(), (share, p)


def test_batches_change_no_probability(make_lm, tokenizer):
    lm, prompts, responses = make_lm(), ["film", "bad bad film", "good film"] * 3, ["good", "bad bad .", ""] * 3
    whole = text_log_probs(lm, tokenizer, prompts, responses)
    assert torch.allclose(text_log_probs(lm, tokenizer, prompts, responses, batch_size=2), whole, atol=1e-5)
    with pytest.raises(ValueError, match="prompts must hold at least one prompt; got none"):
        text_log_probs(lm, tokenizer, [], [])


@pytest.mark.equation("15.1")
def test_pass_at_k_known_by_hand():
    rows = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
    assert pass_at_k(rows, 1).tolist() == [0, 1 / 4, 2 / 4, 1]
    assert pass_at_k(rows.bool(), 2).tolist() == [0, 1 / 2, 5 / 6, 1]
    assert pass_at_k(rows.float(), 4).tolist() == [0, 1, 1, 1]


def test_pass_at_k_of_many_samples_is_right_to_the_last_digit():
    """C(20,000, 10,000) is beyond any float."""
    rows = torch.zeros(1, 20_000, dtype=torch.bool)
    rows[0, :1] = True
    assert pass_at_k(rows, 10_000).tolist() == [0.5] and pass_at_k(rows, 1).tolist() == [1 / 20_000]


@pytest.mark.parametrize("k", [0, 5, 2.0, True])
def test_a_k_that_the_samples_cannot_give_is_refused(k):
    with pytest.raises(ValueError, match=f"k must be a whole number from 1 to 4, the samples of a prompt; got {k}"):
        pass_at_k(torch.zeros(2, 4), k)


@pytest.mark.parametrize("correct", [torch.zeros(4), torch.full((2, 4), 0.5), torch.full((2, 4), float("nan"))])
def test_what_is_neither_right_nor_wrong_is_refused(correct):
    with pytest.raises(ValueError, match=r"correct must be \(prompts, samples\) of 0 and 1; got "):
        pass_at_k(correct, 1)
