"""The tiny world of sums: its split, its texts, its checker, its tokenizer, and the model that is shipped for it."""

import re

import pytest
import torch

from rlhf_lessons import tiny_sums as ts
from rlhf_lessons.config import GRPOConfig
from rlhf_lessons.generation import respond
from rlhf_lessons.group_trainers import GRPOTrainer
from rlhf_lessons.models import ASSETS, load_causal_lm, load_tokenizer
from rlhf_lessons.scoring import text_log_probs

SUMS = ASSETS / "sums"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(prompt):
    """The operands of a prompt, read by other means than the world's own."""
    a, b = prompt.removesuffix(" =").split(" + ")
    return int("".join(a.split())), int("".join(b.split()))


# --- The split ----------------------------------------------------------------------------------


def test_every_sum_stands_on_one_side_of_the_split():
    pairs = [numbers(prompt) for split in ts.SPLITS for prompt in ts.problems(split)]
    assert sorted(pairs) == [(a, b) for a in range(50) for b in range(50)]


def test_a_sum_and_its_mirror_image_stand_on_the_same_side():
    train, held_out = ({numbers(prompt) for prompt in ts.problems(split)} for split in ts.SPLITS)
    assert not train & {(b, a) for a, b in held_out}


def test_the_split_is_fixed_and_spread_over_the_operands():
    assert [len(ts.problems(split)) for split in ts.SPLITS] == [2006, 494]
    assert ts.problems("held_out")[:3] == ["0 + 2 =", "0 + 3 =", "0 + 1 1 ="]
    train, held_out = ([numbers(prompt) for prompt in ts.problems(split)] for split in ts.SPLITS)
    assert {a for a, _ in train} == {a for a, _ in held_out} == set(range(50))
    assert {sum(pair) for pair in train} == set(range(99))


def test_no_held_out_sum_is_in_any_text_to_train_on():
    held_out = set(ts.problems("held_out"))
    texts = [*ts.sample_corpus(20_000, generator()), *ts.sample_corpus(20_000, generator(1), right=0.25)]
    asked = {text.split("=")[0] + "=" for text in texts} | set(ts.prompts(20_000, generator(2)))
    assert len(asked) == 2006 and not asked & held_out


# --- Texts --------------------------------------------------------------------------------------


def misses(texts):
    """By how much each text's answer misses."""
    for text in texts:
        prompt, given = re.fullmatch(r"(.* =) (.*)", text).groups()
        yield int(given.replace(" ", "")) - sum(numbers(prompt)), given


def test_clean_texts_are_right():
    assert {miss for miss, _ in misses(ts.sample_corpus(5000, generator()))} == {0}


def test_noisy_texts_are_right_as_often_as_asked_and_else_miss_by_a_slip():
    found = list(misses(ts.sample_corpus(20_000, generator(), right=0.25)))
    wrong = [miss for miss, _ in found if miss]
    assert abs(1 - len(wrong) / len(found) - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    for slip in (1, 2, 3, 10):
        share = sum(abs(miss) == slip for miss in wrong) / len(wrong)
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / len(wrong)) ** 0.5
    assert abs(sum(miss < 0 for miss in wrong) / len(wrong) - 0.48) < 0.03  # a few would have been below 0
    assert ("0", -3) in {(given, miss) for miss, given in found}  # 0 is an answer like any other
    assert all(ts.as_digits(int(given.replace(" ", ""))) == given for _, given in found)


def test_a_seed_means_the_same_texts():
    assert ts.sample_corpus(9, generator(3), right=0.5) == ts.sample_corpus(9, generator(3), right=0.5)
    assert ts.sample_corpus(9, generator(3)) != ts.sample_corpus(9, generator(4))


# --- The checker --------------------------------------------------------------------------------


def test_the_one_right_response_to_every_prompt_is_found_right():
    prompts = [prompt for split in ts.SPLITS for prompt in ts.problems(split)]
    right = [" ".join(str(sum(numbers(prompt)))) for prompt in prompts]
    assert ts.correct(prompts, right).sum() == len(prompts)
    assert [ts.answer(prompt) for prompt in prompts] == right


@pytest.mark.parametrize("prompt", ["1 7 + 5 =", "0 + 0 ="])
def test_of_all_responses_of_up_to_three_words_one_is_right(prompt):
    words = [*ts.WORDS, "<eos>", "<bos>"]
    texts = ["", *words, *(f"{a} {b}" for a in words for b in words)]
    texts += [f"{text} {word}" for text in texts if text.count(" ") == 1 for word in words]
    verdicts = ts.correct([prompt] * len(texts), texts)
    assert [text for text, right in zip(texts, verdicts, strict=True) if right] == [ts.answer(prompt)]


@pytest.mark.parametrize("response", ["22", "2  2", " 2 2", "2 2 ", "0 2 2", "2 2 2", "2", "2 3", "", "2 2\n", "2 2 ="])
def test_it_is_strict_about_the_form(response):
    assert ts.correct(["1 7 + 5 ="], [response]).tolist() == [0.0]


def test_what_did_not_end_is_wrong():
    verdicts = ts.correct(["1 7 + 5 ="] * 3, ["2 2", "2 2", "2 3"], ended=[True, False, True])
    assert verdicts.tolist() == [1.0, 0.0, 0.0] and verdicts.dtype == torch.float32


def test_what_no_checker_can_judge_is_named():
    with pytest.raises(ValueError, match=r"a prompt must be a sum such as '1 7 \+ 5 ='; got '17 \+ 5 ='"):
        ts.correct(["17 + 5 ="], ["2 2"])
    with pytest.raises(ValueError, match="must have equal lengths; got .*'prompts': 1, 'responses': 2"):
        ts.correct(["1 + 1 ="], ["2", "2"])
    with pytest.raises(ValueError, match="must have equal lengths; got .*'ended': 2"):
        ts.correct(["1 + 1 ="], ["2"], ended=[True, True])
    with pytest.raises(ValueError, match="must be lists of str; got '1 . 1 =' and "):
        ts.correct("1 + 1 =", ["2"] * 7)
    with pytest.raises(ValueError, match="split must be one of train, held_out; got 'test'"):
        ts.problems("test")
    for right in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"right must be a number between 0 and 1; got {right}"):
            ts.sample_corpus(1, generator(), right=right)


# --- Tokenizer ----------------------------------------------------------------------------------


def test_each_digit_is_a_token_and_text_survives():
    tokenizer = ts.build_tokenizer()
    assert len(tokenizer) == 16
    for text in ts.sample_corpus(300, generator()):
        ids = tokenizer(text).input_ids
        assert len(ids) == 1 + len(text.split()) and ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_longest_answer_fits():
    tokenizer = ts.build_tokenizer()
    lengths = [len(tokenizer(ts.answer(p)).input_ids) for split in ts.SPLITS for p in ts.problems(split)]
    assert max(lengths) == ts.MAX_RESPONSE_TOKENS  # <bos> in EOS's place


# --- The shipped model, and what GRPO makes of it -----------------------------------------------


def chances(lm, split):
    """The exact probability of the right answer to each sum of a split."""
    prompts = ts.problems(split)
    answers = [ts.answer(prompt) for prompt in prompts]
    return text_log_probs(lm, ts.build_tokenizer(), prompts, answers, batch_size=len(prompts)).double().exp()


@pytest.mark.parametrize("split", ts.SPLITS)
def test_the_shipped_model_is_right_one_time_in_five_and_hardly_ever_wrong_64_times(split):
    p = chances(load_causal_lm(SUMS), split)
    assert 0.17 < p.mean() < 0.21 and p.min() > 0.01
    assert (1 - (1 - p) ** 64).mean() > 0.995


def test_the_shipped_model_reads_with_the_world_s_tokenizer():
    assert load_tokenizer(SUMS).get_vocab() == ts.build_tokenizer().get_vocab()
    assert sum(p.numel() for p in load_causal_lm(SUMS).parameters()) == 228_480
    assert sum(path.stat().st_size for path in SUMS.iterdir()) < 1_000_000


def test_samples_of_the_shipped_model_are_right_as_often_as_its_probabilities_say():
    lm, prompts = load_causal_lm(SUMS), ts.problems("held_out") * 4
    responses = respond(lm, load_tokenizer(SUMS), prompts, max_new_tokens=3, generator=generator())
    right = ts.correct(prompts, responses).view(4, -1).mean(dim=0).double()
    p = chances(lm, "held_out")
    assert abs(right.mean() - p.mean()) < 4 * (p * (1 - p) / 4).sum().sqrt() / len(p)


def trained(seed, iterations):
    """The shipped model after GRPO on the training sums, with the settings of the recorded runs."""
    lm, reference = load_causal_lm(SUMS), load_causal_lm(SUMS)
    config = GRPOConfig(
        num_iterations=iterations, batch_size=512, samples_per_prompt=16, minibatch_size=128, ppo_epochs=1,
        max_new_tokens=ts.MAX_RESPONSE_TOKENS, learning_rate=3e-4, kl_coef=0.0, missing_eos_penalty=0.0, seed=seed,
        device="cpu",
    )  # fmt: skip
    GRPOTrainer(config, lm, reference, ts.correct, ts.problems("train"), load_tokenizer(SUMS)).train()
    return lm


def test_a_short_run_on_training_sums_raises_accuracy_on_held_out_ones():
    assert chances(trained(seed=0, iterations=6), "held_out").mean() > 0.4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_whole_run_solves_most_held_out_sums(seed):
    p = chances(trained(seed, iterations=60), "held_out")
    assert p.mean() > 0.85
    assert (1 - (1 - p) ** 64).mean() > 0.95
