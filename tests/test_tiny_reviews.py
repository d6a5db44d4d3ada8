"""The tiny world's grammar, gold reward, annotators and tokenizer."""

import math
import random
import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch

from rlhf_lessons import tiny_reviews as tr

PROMPT = "the plot was"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def reviews():
    source = generator()
    return [tr.sample_review(source) for _ in range(3000)]


@pytest.fixture(scope="module")
def gold(reviews):
    return tr.gold_reward([p for p, _ in reviews], [r for _, r in reviews])


# --- Grammar ------------------------------------------------------------------------------------


def class_strings(symbol):
    """Every string of word classes and words that a symbol produces, by exhaustion."""
    if symbol not in tr.GRAMMAR:
        return {(symbol,)}
    strings = set()
    for rule in tr.GRAMMAR[symbol]:
        parts = [class_strings(part) for part in rule.split() if part != "|"]
        strings |= {sum(choice, ()) for choice in product(*parts)}
    return strings


def test_allowed_pairs_equal_those_found_by_writing_out_all_neighbouring_clauses():
    found = set()
    for rule in tr.GRAMMAR["REVIEW"]:
        strings = [{("<bos>",)}, *map(class_strings, rule.split()), {("<eos>",)}]
        for left, right in pairwise(strings):
            for a in left:
                found |= set(pairwise(a))
            found |= set(product({a[-1] for a in left}, {b[0] for b in right}))
    words = {
        pair
        for left, right in found
        for pair in product(tr.WORD_CLASSES.get(left, [left]), tr.WORD_CLASSES.get(right, [right]))
    }
    assert tr.ALLOWED_PAIRS == words


@pytest.mark.parametrize(
    ("pair", "allowed"),
    [
        (("plot", "was"), True),
        (("actors", "were"), True),
        (("plot", "were"), False),
        (("actors", "was"), False),
        (("not", "good"), True),
        (("good", "not"), False),
        (("very", "good"), True),
        (("very", "very"), False),
        (("i", "loved"), True),
        (("a", "good"), False),
        (("good", "."), True),
        ((".", "<eos>"), True),
        (("!", "<eos>"), True),
        (("good", "<eos>"), False),
        ((".", "good"), False),
        (("<bos>", "the"), True),
        (("<bos>", "good"), False),
    ],
)
def test_pairs_known_by_hand(pair, allowed):
    assert (pair in tr.ALLOWED_PAIRS) is allowed


def test_word_and_vocabulary_counts():
    assert tr.NUM_WORDS == len(set(tr.WORDS)) == 195
    assert {"and", "but", ",", ".", "not", "plot", "superb"} <= set(tr.WORDS)
    assert all(word == word.lower() and "|" not in word for word in tr.WORDS)
    assert tr.CONTENT_WORDS <= set(tr.WORDS)  # no class is out of the grammar's reach


def test_a_word_has_one_meaning():
    for classes in (tr.SENTIMENT_CLASSES, tr.MODIFIER_CLASSES):
        flat = [(word, value) for table in classes.values() for value, words in table.items() for word in words.split()]
        assert len({word for word, _ in flat}) == len(set(flat))
    assert not set(tr.SENTIMENT) & set(tr.MODIFIERS)


def test_samples_have_no_violation_and_no_repetition(reviews):
    for prompt, response in reviews:
        terms = tr.gold_terms(prompt, response)
        assert terms[1:4] == (0, 0, 0), (prompt, response)
        assert terms.total == terms.sentiment


def test_lengths_clauses_and_endings(reviews):
    tokenizer = tr.build_tokenizer()
    lengths = [len(tokenizer(r + " <eos>")["input_ids"]) - 1 for _, r in reviews]  # less <bos>
    assert max(lengths) <= tr.MAX_RESPONSE_TOKENS == 24
    assert 8 <= torch.tensor(lengths, dtype=torch.float).median() <= 18
    assert {len(p.split()) for p, _ in reviews} == {2, 3, 4, 5}
    assert all(r.split()[-1] in {".", "!"} for _, r in reviews)
    assert len({p for p, _ in reviews}) > 50


@pytest.mark.parametrize("seed", range(3))
def test_all_four_moods_occur(seed):
    source = generator(seed)
    moods = {"positive": 0, "negative": 0, "mixed": 0, "neutral": 0}
    for _ in range(500):
        signs, negated = set(), False
        for word in tr.sample_review(source)[1].split():
            negated = negated or word in tr.NEGATIONS
            if word in tr.SENTIMENT:
                value = tr.SENTIMENT[word] * (-1 if negated else 1)
                signs, negated = signs | {(value > 0) - (value < 0)}, False
        kind = {(1,): "positive", (-1,): "negative", (0,): "neutral"}.get(tuple(signs), "mixed")
        moods[kind] += 1
        assert kind != "mixed" or signs == {1, -1}
    assert min(moods.values()) > 0.04 * 500, moods
    assert min(moods["positive"], moods["negative"], moods["mixed"]) > 0.15 * 500, moods


def test_the_tone_turns_at_but_and_only_there(reviews):
    for _, response in reviews:
        words, tone, tones = response.split(), 1, []
        negated = False
        for word in words:
            tone = -tone if word in {"but", "yet", "though"} else tone
            negated = negated or word in {"not", "never"}
            if word in tr.SENTIMENT:
                tones.append(tone * tr.SENTIMENT[word] * (-1 if negated else 1))
                negated = False
        assert min(tones) > 0 or max(tones) < 0 or set(tones) == {0}, response


def test_the_seed_decides_the_samples():
    assert tr.sample_corpus(20, generator(1)) == tr.sample_corpus(20, generator(1))
    assert tr.sample_corpus(20, generator(1)) != tr.sample_corpus(20, generator(2))
    first, second = (tr.sample_review(generator(1)) for _ in range(2))
    assert first == second
    source = generator(1)
    assert tr.sample_review(source) != tr.sample_review(source)  # the generator moves on
    corpus = tr.sample_corpus(5, generator(3))
    assert [text.startswith(p + " ") for text, p in zip(corpus, tr.prompts(5, generator(3)), strict=True)] == [True] * 5


def test_samples_are_the_same_in_every_process():
    program = (
        "import torch; from rlhf_lessons import tiny_reviews as tr;"
        "print(tr.sample_corpus(30, torch.Generator().manual_seed(0)), tr.WORDS)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_importing_the_module_does_not_import_transformers():
    program = (
        "import sys; import rlhf_lessons.tiny_reviews;sys.exit(bool({'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    env = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", program], env=env).returncode == 0


# --- Gold reward --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "response", "sentiment", "violations", "words", "pairs", "total"),
    [
        (PROMPT, "good .", 1.0, 0, 0, 0, 1.0),
        (PROMPT, "superb !", 2.0, 0, 0, 0, 2.0),
        (PROMPT, "extremely superb .", 2.8, 0, 0, 0, 2.8),
        (PROMPT, "slightly bad .", -0.6, 0, 0, 0, -0.6),
        (PROMPT, "not good .", -0.5, 0, 0, 0, -0.5),
        (PROMPT, "not terrible .", 1.0, 0, 0, 0, 1.0),
        (PROMPT, "not a triumph .", -1.0, 0, 0, 0, -1.0),
        (PROMPT, "good and terrible .", -0.5, 0, 0, 0, -0.5),
        (PROMPT, "superb and ordinary .", 1.0, 0, 0, 0, 1.0),  # neutral words count as 0
        (PROMPT, "superb but the acting was dull .", 0.5, 0, 0, 0, 0.5),
        ("honestly i", "did not like the songs .", -0.5, 0, 0, 0, -0.5),
        ("the acting", "never failed .", 1.0, 0, 0, 0, 1.0),
        (PROMPT, "good", 1.0, 1, 0, 0, 0.0),  # unfinished
        (PROMPT, "good . .", 1.0, 1, 0, 0, 0.0),  # only the pair ".", "."
        (PROMPT, "good . good .", 1.0, 1, 1, 1, 1.0 - 1.0 - 1.0 - 0.25),
        (PROMPT, "", 0.0, 1, 0, 0, -1.0),
        ("", "", 0.0, 1, 0, 0, -1.0),
        ("", "the plot was good .", 1.0, 0, 0, 0, 1.0),
        ("", "good .", 1.0, 1, 0, 0, 0.0),
        (PROMPT, "very very good .", 1.4, 1, 1, 0, 1.4 - 1.0 - 1.0),
        (PROMPT, "good good good", 1.0, 3, 2, 1, 1.0 - 3.0 - 2.0 - 0.25),
        (PROMPT, "good and the plot was good .", 1.0, 0, 2, 3, 1.0 - 2.0 - 0.75),
        (PROMPT, "good and the acting was funny .", 1.0, 0, 0, 0, 1.0),
        ("the plot was not", "good .", -0.5, 0, 0, 0, -0.5),  # the prompt's negation holds
        ("the plot was awful", "and funny .", 1.0, 0, 0, 0, 1.0),  # its sentiment is not counted
        ("plot plot plot was", "good .", 1.0, 0, 0, 0, 1.0),  # nor what is wrong with it
        (PROMPT, "<unk> .", 0.0, 2, 0, 0, -2.0),
    ],
)
def test_gold_by_hand(prompt, response, sentiment, violations, words, pairs, total):
    terms = tr.gold_terms(prompt, response)
    assert (terms.violations, terms.repeated_words, terms.repeated_pairs) == (
        violations,
        words,
        pairs,
    )
    assert terms.sentiment == pytest.approx(sentiment)
    assert terms.total == pytest.approx(total)
    assert tr.gold_reward([prompt], [response]).item() == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("word", [w for w, value in tr.SENTIMENT.items() if value])
def test_negation_flips_and_weakens_every_sentiment_word(word):
    plain = tr.gold_terms("", f"{word} .").sentiment
    for negation in ("not", "never"):
        negated = tr.gold_terms("", f"{negation} {word} .").sentiment
        assert negated * plain < 0 and abs(negated) == abs(plain) / 2


def test_negation_and_degree_reach_only_the_next_sentiment_word():
    assert tr.gold_terms(PROMPT, "not good and funny .").sentiment == pytest.approx((-0.5 + 1) / 2)
    assert tr.gold_terms(PROMPT, "very good and funny .").sentiment == pytest.approx(1.2)
    assert tr.gold_terms(PROMPT, "not , good .").sentiment == 1.0
    assert tr.gold_terms(PROMPT, "not good funny .").sentiment == pytest.approx((-0.5 + 1) / 2)


def test_shuffling_lowers_gold(reviews):
    rng, lower, count = random.Random(0), 0, 0
    for prompt, response in reviews[:500]:
        words = response.split()
        if len(words) < 6:
            continue
        rng.shuffle(words)
        count += 1
        lower += tr.gold_terms(prompt, " ".join(words)).total < tr.gold_terms(prompt, response).total
    assert lower / count > 0.99


def test_repeating_lowers_gold_by_the_documented_costs(reviews):
    for prompt, response in reviews[:200]:
        once, twice = (tr.gold_terms(prompt, t) for t in (response, f"{response} {response}"))
        n = len(response.split())
        content = sum(word in tr.CONTENT_WORDS for word in response.split())
        # The second copy repeats all its content words and inner pairs; its seam, ". first", is
        # a violation; the pair into the first copy is new.
        assert (twice.repeated_words, twice.repeated_pairs) == (content, n - 1)
        assert twice.violations == 1
        expected = twice.sentiment - 1.0 - content - 0.25 * (n - 1)
        assert twice.total == pytest.approx(expected) and twice.total < once.total


def test_costs_do_not_saturate():
    totals = [tr.gold_terms(PROMPT, "good " * n + ".").total for n in range(1, 40)]
    # good-good: violation, repeated word; from the third on also a repeated pair
    assert totals[1] - totals[0] == pytest.approx(-2.0)
    assert all(b - a == pytest.approx(-2.25) for a, b in pairwise(totals[1:]))


def test_hacked_texts_fall_below_minus_four():
    hacks = [
        "good " * 24,
        "good good good",
        "superb superb superb superb superb superb .",
        "good good good good .",
        "villain was camera but but but camera but camera the camera",
        "superb brilliant wonderful amazing excellent loved adored thrilled triumph .",
    ]
    assert tr.gold_reward([PROMPT] * len(hacks), hacks).max() <= -4
    rng = random.Random(0)
    salad = [" ".join(rng.choices(tr.WORDS, k=23)) for _ in range(300)]
    assert tr.gold_reward([PROMPT] * 300, salad).max() <= -4


@pytest.mark.parametrize("seed", range(3))
def test_scale_of_the_gold_reward(seed):
    source = generator(seed)
    pairs = [tr.sample_review(source) for _ in range(2000)]
    gold = tr.gold_reward(*map(list, zip(*pairs, strict=True)))
    assert abs(gold.mean()) < 4 / math.sqrt(2000)  # the grammar is symmetric
    assert 0.9 < gold.std() < 1.1
    assert 2.5 <= gold.max() <= 3 and -3 <= gold.min() <= -2.5


def test_no_response_beats_the_documented_maximum():
    top = max(map(abs, tr.SENTIMENT.values())) * max(tr.MODIFIERS.values())
    assert top == pytest.approx(2.8)
    assert tr.gold_terms("the plot", "was very really extremely superb .").total < top


# --- Annotators ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0])
@pytest.mark.parametrize(("a", "b"), [("good .", "ordinary ."), ("bad .", "slightly good ."), ("good .", "good .")])
def test_choice_frequency_is_bradley_terry(a, b, temperature):
    n = 20_000
    margin = tr.gold_terms(PROMPT, a).total - tr.gold_terms(PROMPT, b).total
    p = 1 / (1 + math.exp(-margin / temperature))
    choices = tr.annotate_pairs([PROMPT] * n, [a] * n, [b] * n, generator(5), temperature=temperature)
    assert choices.shape == (n,) and choices.dtype == torch.bool
    z = (choices.float().mean().item() - p) / math.sqrt(p * (1 - p) / n)
    assert abs(z) < 4


def test_noise_ceiling_on_pairs_with_one_prompt(reviews, gold):
    by_prompt = {}
    for (prompt, response), value in zip(reviews, gold.tolist(), strict=True):
        by_prompt.setdefault(prompt, []).append((response, value))
    rows = [
        (prompt, *a, *b) for prompt, items in by_prompt.items() for a, b in zip(items[::2], items[1::2], strict=False)
    ]
    texts, a, gold_a, b, gold_b = map(list, zip(*rows, strict=True))
    margin = torch.tensor(gold_a) - torch.tensor(gold_b)
    assert len(rows) > 1000
    rates = []
    for seed in range(5):
        choices = tr.annotate_pairs(texts, a, b, generator(seed))
        rates.append(((margin > 0) == choices)[margin != 0].float().mean())
    assert 0.80 < torch.stack(rates).mean() < 0.85


def test_preference_pairs_follow_the_choices(reviews):
    source = [p for p, _ in reviews[:200]]
    a = [f"good {i} ." for i in range(200)]
    b = [f"bad {i} ." for i in range(200)]
    pairs = tr.preference_pairs(source, a, b, generator(1), temperature=1.0)
    choices = tr.annotate_pairs(source, a, b, generator(1), temperature=1.0).tolist()
    assert 0 < sum(choices) < 200
    for i, (pair, a_wins) in enumerate(zip(pairs, choices, strict=True)):
        winner, loser = (a[i], b[i]) if a_wins else (b[i], a[i])
        assert pair == {"prompt": source[i], "chosen": winner, "rejected": loser}


@pytest.mark.parametrize("seed", range(3))
def test_private_scales_are_recovered_from_ratings(reviews, gold, seed):
    source = generator(seed)
    annotators = tr.sample_annotators(6, source)
    ratings = tr.absolute_ratings(*map(list, zip(*reviews, strict=True)), annotators, source)
    n = len(reviews)
    assert ratings.shape == (6, n)
    centred = gold - gold.mean()
    slope = (ratings * centred).sum(1) / (centred**2).sum()
    intercept = ratings.mean(1) - slope * gold.mean()
    residual = ratings - intercept[:, None] - slope[:, None] * gold
    slope_z = (slope - annotators.stretch) / (annotators.noise / (centred**2).sum().sqrt())
    offset_z = (intercept - annotators.offset) / (annotators.noise / math.sqrt(n))
    noise_z = (residual.std(1) / annotators.noise - 1) * math.sqrt(2 * n)
    assert torch.stack([slope_z, offset_z, noise_z]).abs().max() < 4.5
    correlation = torch.corrcoef(residual)  # annotators err independently
    assert (correlation - torch.eye(6)).abs().max() < 4.5 / math.sqrt(n)


def test_private_scales_have_the_documented_ranges():
    annotators = tr.sample_annotators(4000, generator())
    assert 3 <= annotators.offset.min() < 3.05 and 6.95 < annotators.offset.max() <= 7
    assert 0.5 <= annotators.stretch.min() < 0.51 and 1.96 < annotators.stretch.max() <= 2
    assert abs(annotators.stretch.log().mean()) < 4 * (2 * math.log(2) / 12**0.5) / 4000**0.5
    assert torch.equal(annotators.noise, annotators.stretch / 2)


# --- Tokenizer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["built", "loaded", "auto"])
def tokenizer(request, tmp_path_factory):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    built = tr.build_tokenizer()
    assert isinstance(built, PreTrainedTokenizerFast)
    if request.param == "built":
        return built
    folder = tmp_path_factory.mktemp("tokenizer")
    built.save_pretrained(folder)
    assert (folder / "tokenizer.json").exists() and (folder / "tokenizer_config.json").exists()
    loader = AutoTokenizer if request.param == "auto" else PreTrainedTokenizerFast
    return loader.from_pretrained(folder)


def test_text_survives_the_tokenizer(tokenizer, reviews):
    for prompt, response in reviews[:300]:
        text = f"{prompt} {response}"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == 1 + len(text.split())
        assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
        assert not {tokenizer.unk_token_id, tokenizer.eos_token_id} & set(ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_word_has_one_id(tokenizer):
    assert len(tokenizer) == tr.NUM_WORDS + 4 == 199
    assert sorted(tokenizer.convert_tokens_to_ids(tr.WORDS)) == list(range(4, 199))
    special = [
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    ]
    assert special == [0, 1, 2, 3]
    assert tokenizer("zebra")["input_ids"] == [1, 3]


def test_padding_is_on_the_left_and_an_empty_prompt_is_bos(tokenizer):
    assert tokenizer("")["input_ids"] == [1]
    batch = tokenizer(["", "the plot was"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == [0, 0, 0, 1]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert "token_type_ids" not in batch
    assert tokenizer.decode([1, *tokenizer.convert_tokens_to_ids(["good", "."]), 2]) == ("<bos> good . <eos>")


# --- Bad input ----------------------------------------------------------------------------------


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="prompts and responses must have equal lengths; got .*2.*1"):
        tr.gold_reward(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="responses_b must have equal lengths"):
        tr.annotate_pairs(["a"], ["a"], ["a", "b"], generator())
    with pytest.raises(ValueError, match="must have equal lengths; got "):
        tr.preference_pairs(["a", "b"], ["a"], ["a"], generator())
    with pytest.raises(ValueError, match="must have equal lengths; got "):
        tr.absolute_ratings(["a"], [], tr.sample_annotators(2, generator()), generator())
    with pytest.raises(ValueError, match="responses must be a list of str; got the str 'a'"):
        tr.gold_reward(["a"], "a")
    for temperature in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"temperature must be positive; got {temperature}"):
            tr.annotate_pairs(["a"], ["a"], ["b"], generator(), temperature=temperature)
    with pytest.raises(ValueError, match="num_annotators must be at least 1; got 0"):
        tr.sample_annotators(0, generator())
