"""Reading files, with errors that name the line, and turning text into token ids."""

import copy
import json

import pytest
import torch

from rlhf_lessons.data import (
    decode,
    decode_responses,
    encode_preferences,
    encode_prompt,
    encode_prompts,
    encode_response,
    fitting_pairs,
    pad,
    read_corpus,
    read_lines,
    read_preferences,
    read_prompts,
    sentence_openings,
    train_tokenizer,
)

PAD, BOS, EOS = 0, 1, 2
PAIR = {"prompt": "the film was", "chosen": "good .", "rejected": "bad ."}
READERS = [read_corpus, read_preferences, read_prompts]


def write(folder, *lines, name="data.jsonl"):
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


# --- Files ----------------------------------------------------------------------------------------


def test_preferences_are_read_without_their_other_fields(tmp_path):
    path = write(tmp_path, PAIR | {"margin": 3}, "", "   ", PAIR | {"prompt": ""})
    assert read_preferences(path) == [PAIR, PAIR | {"prompt": ""}]


def test_corpus_is_a_document_a_line(tmp_path):
    path = write(tmp_path, "one film", "", "  two films \r", name="corpus.txt")
    assert read_corpus(path) == ["one film", "two films"]
    assert read_lines(path) == [(1, "one film"), (3, "two films")]


def test_lines_are_split_at_newlines_alone(tmp_path):
    """U+2028 and U+0085 end a line for str.splitlines, yet may stand inside a JSON string."""
    pair = PAIR | {"chosen": "a\u2028b\u0085c"}
    path = write(tmp_path, json.dumps(pair, ensure_ascii=False), PAIR)
    assert read_preferences(path) == [pair, PAIR]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.json"])
def test_prompts_are_json_lines_by_the_file_s_name(name, tmp_path):
    path = write(tmp_path, {"prompt": "the film"}, {"prompt": "", "other": 1}, name=name)
    assert read_prompts(path) == [{"prompt": "the film"}, {"prompt": "", "other": 1}]
    assert [record.place for record in read_prompts(path)] == [f"{path}, line 1", f"{path}, line 2"]


def test_prompts_are_plain_lines_otherwise(tmp_path):
    path = write(tmp_path, "the film", '{"prompt": "x"}', name="prompts.txt")
    assert read_prompts(path) == [{"prompt": "the film"}, {"prompt": '{"prompt": "x"}'}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", ', r"data.jsonl, line 3: not valid JSON: .* at column \d+"),
        ("the film was good", "data.jsonl, line 3: not valid JSON"),
        ("[1, 2]", "data.jsonl, line 3: the line must be a JSON object; got list"),
        ('"text"', "data.jsonl, line 3: the line must be a JSON object; got str"),
        ({"prompt": "a", "chosen": "b"}, 'data.jsonl, line 3: the field "rejected" is missing; found .*chosen'),
        ({"chosen": "a", "rejected": "b"}, 'data.jsonl, line 3: the field "prompt" is missing'),
        (PAIR | {"chosen": 3}, 'data.jsonl, line 3: the field "chosen" must be a string; got int'),
        (PAIR | {"prompt": None}, 'data.jsonl, line 3: the field "prompt" must be a string; got NoneType'),
        (PAIR | {"rejected": "  "}, 'data.jsonl, line 3: the field "rejected" must not be empty'),
    ],
)
def test_a_bad_line_is_named_with_its_number(line, message, tmp_path):
    """The second line is empty: lines are counted as an editor counts them."""
    with pytest.raises(ValueError, match=message):
        read_preferences(write(tmp_path, PAIR, "", line, PAIR))


def test_a_prompt_file_s_bad_line_is_named_too(tmp_path):
    with pytest.raises(ValueError, match='line 2: the field "prompt" is missing'):
        read_prompts(write(tmp_path, {"prompt": "a"}, {"text": "b"}))


@pytest.mark.parametrize("read", READERS)
def test_unreadable_files_are_named(read, tmp_path):
    with pytest.raises(ValueError, match="missing.txt: cannot be read: No such file"):
        read(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt: not UTF-8 text \(byte 3\)"):
        read(tmp_path / "latin.txt")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_empty_files_are_refused(read, content, tmp_path):
    with pytest.raises(ValueError, match="empty.txt: the file holds no text"):
        read(write(tmp_path, content, name="empty.txt"))


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    """Some Windows editors open a UTF-8 file with one."""
    path = tmp_path / "marked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode())
    assert read_preferences(path) == [PAIR]


def test_openings_are_the_first_words_of_longer_texts():
    texts = ["one two three four", "one two three", "one", "a b c d e"]
    assert sentence_openings(texts, words=3) == ["one two three", "a b c"]


# --- Conversations ----------------------------------------------------------------------------------------------------


def turns(*contents):
    """Messages of a user and an assistant by turns."""
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, contents, strict=False)]


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"chosen": HH + " See you.", "rejected": HH + " So what."}, (HH, " See you.", " So what.")),
        # The answers begin alike, or one is the other's beginning: the prompt ends where the last turn opens.
        ({"chosen": HH + " See you.", "rejected": HH + " See"}, (HH, " See you.", " See")),
        ({"chosen": turns("Hi", "Hello."), "rejected": turns("Hi", "No.")}, (turns("Hi"), "Hello.", "No.")),
        ({"prompt": "Hi", "chosen": turns("Hi", "a"), "rejected": turns("Hi", "b")}, (turns("Hi"), "a", "b")),
        (
            {"prompt": turns("Hi"), "chosen": turns("", "a")[1:], "rejected": turns("", "b")[1:]},
            (turns("Hi"), "a", "b"),
        ),
        (
            {"chosen": turns("Hi", "Hello.", "Bye", "a"), "rejected": turns("Hi", "Hello.", "Bye", "b")},
            (turns("Hi", "Hello.", "Bye"), "a", "b"),
        ),
        ({"prompt": turns("Hi"), "chosen": "a", "rejected": "b"}, (turns("Hi"), "a", "b")),
    ],
    ids=["texts", "alike", "messages", "with a prompt", "answers alone", "several turns", "texts to messages"],
)
def test_preferences_may_be_whole_conversations(line, expected, tmp_path):
    (record,) = read_preferences(write(tmp_path, line))
    assert record == dict(zip(("prompt", "chosen", "rejected"), expected, strict=True))
    assert record.place == f"{tmp_path / 'data.jsonl'}, line 1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"chosen": turns("Hi", "a"), "rejected": turns("Ho", "b")}, "must be one conversation up to their last turns"),
        ({"chosen": turns("Hi", "a"), "rejected": "b"}, "must be one conversation up to their last turns"),
        ({"chosen": turns("", "a")[1:], "rejected": turns("", "b")[1:]}, 'the field "prompt" is missing'),
        ({"chosen": "Human: Hi a", "rejected": "Human: Hi b"}, 'the field "prompt" is missing'),
        ({"chosen": HH + " a", "rejected": HH + " "}, 'the field "rejected" must not be empty'),
        ({"chosen": turns("Hi", " "), "rejected": turns("Hi", "b")}, 'the field "chosen" must not be empty'),
        (PAIR | {"chosen": []}, 'the field "chosen" must be a string; got list'),
        (PAIR | {"chosen": [{"role": "user"}]}, 'the field "chosen" must be a string; got list'),
        (PAIR | {"prompt": [{"role": "user", "content": 3}]}, 'the field "prompt" must be a string; got list'),
        ({"chosen": turns("Hi", "\ud83d"), "rejected": turns("Hi", "b")}, 'the field "chosen" holds half of a surr'),
    ],
)
def test_what_is_no_conversation_is_named_with_its_line(line, message, tmp_path):
    with pytest.raises(ValueError, match=f"data.jsonl, line 2: .*{message}"):
        read_preferences(write(tmp_path, PAIR, line))


def test_prompts_in_a_file_may_be_messages(tmp_path):
    lines = [{"prompt": turns("Hi"), "answer": 4}, {"prompt": "film"}]
    assert read_prompts(write(tmp_path, *lines)) == lines


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}bad{% endif %}"
)


def test_messages_are_read_by_the_tokenizer_s_template(make_tokenizer):
    """Up to where the answer begins, which no space then parts from it: the template writes what stands between."""
    tokenizer = make_tokenizer(chat_template="<bos> " + TEMPLATE)
    assert encode_prompt(tokenizer, turns("film")) == [BOS, 3, 6, 5]  # one begin token; "user" is unknown
    assert encode_prompt(make_tokenizer(chat_template=TEMPLATE), turns("film", "good", "film")) == [3, 6, 3, 4, 3, 6, 5]
    system = [{"role": "system", "content": "good"}, *turns("film")]
    assert encode_prompt(make_tokenizer(chat_template=TEMPLATE), system) == [3, 4, 3, 6, 5]
    assert encode_response(tokenizer, turns("film"), "good") == [4, EOS]
    with pytest.raises(
        ValueError, match="messages must suit the tokenizer's chat template; got: a tokenizer that has no"
    ):
        encode_prompt(make_tokenizer(), turns("film"))
    picky = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="prompt 2: messages must suit .*; got: roles must alternate"):
        encode_prompts(picky, ["film", turns("film")], max_new_tokens=1, context=9)


def test_an_answer_that_the_assistant_has_begun_is_continued(trained, make_tokenizer):
    """No second turn of its own is opened for it, and a word that goes on is parted from it by a space."""
    assert encode_prompt(make_tokenizer(chat_template=TEMPLATE), turns("film", "good")) == [3, 6, 3, 4]
    tokenizer = copy.deepcopy(trained)
    tokenizer.chat_template = TEMPLATE
    begun = turns("the plot", "was")
    assert tokenizer.decode(encode_prompt(tokenizer, begun)) == "user the plot assistant was"
    assert tokenizer.decode(encode_response(tokenizer, begun, "good")) == " good<eos>"


def test_a_pair_whose_messages_cannot_be_read_is_named(tokenizer, tmp_path):
    pairs = read_preferences(write(tmp_path, PAIR, {"chosen": turns("Hi", "a"), "rejected": turns("Hi", "b")}))
    for call in (encode_preferences, fitting_pairs):
        with pytest.raises(
            ValueError, match="data.jsonl, line 2: messages must suit the tokenizer's chat template; got"
        ):
            call(tokenizer, pairs, context=99)


def test_no_space_is_put_behind_a_chat(trained):
    """A text that ends in a word is continued by another word, a template by whatever it leaves open."""
    tokenizer = copy.deepcopy(trained)
    tokenizer.chat_template = "{{ messages[0].content }}:"
    alone, apart = (trained(text, add_special_tokens=False).input_ids + [EOS] for text in ("good", " good"))
    assert encode_response(tokenizer, turns("plot"), "good") == alone != apart
    assert encode_response(tokenizer, "plot:", "good") == apart


def test_prompts_may_be_token_ids(tokenizer):
    """They are taken as they are, in records too; none of them are the begin token, as an empty text is."""
    prompts = [[BOS, 4, 6], {"prompt": [4, EOS]}, []]
    assert encode_prompts(tokenizer, prompts, max_new_tokens=1, context=9) == [[BOS, 4, 6], [4, EOS], [BOS]]
    assert encode_response(tokenizer, [BOS, 4, 6], "bad") == [5, EOS]
    for wrong in ([1.5], [-1], [True], 3, None, [{"role": "user"}], ["film"]):
        with pytest.raises(ValueError, match="prompt 1: prompt must be a text, a list of token ids or a list of mess"):
            encode_prompts(tokenizer, [wrong], max_new_tokens=1, context=9)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("film", "prompts must be a list; got str"),
        ((text for text in ("film",)), "prompts must be a list; got generator"),
        ([{"text": "film"}], r"""prompt 1: a record must hold a "prompt"; got \['text'\]"""),
        (
            [{"role": "user", "content": "film"}],
            r"""prompt 1: a record must hold a "prompt"; got \['content', 'role'\]""",
        ),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(prompts, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        encode_prompts(tokenizer, prompts, max_new_tokens=1, context=9)


# --- Pairs that are too long ------------------------------------------------------------------------------------------

LENGTHY = {"prompt": "film " * 9 + "good", "chosen": "good", "rejected": "bad bad"}  # 11 + 3 tokens
SHORT = {"prompt": "film", "chosen": "good", "rejected": "bad"}


def test_long_pairs_are_refused_left_out_or_cut(tokenizer):
    pairs = [SHORT, LENGTHY, SHORT | {"rejected": "bad " * 8}]
    with pytest.raises(ValueError, match="pair 2: prompt and chosen must fit the model's context of 8, .* got 13 tok"):
        fitting_pairs(tokenizer, pairs, context=8)
    assert fitting_pairs(tokenizer, pairs, context=8, long="drop") == [SHORT]
    whole, cut = fitting_pairs(tokenizer, pairs, context=8, long="cut")
    assert whole is pairs[0] and cut == LENGTHY | {"prompt": [BOS, 6, 6, 6, 4]}
    encoded = encode_preferences(tokenizer, [whole, cut], context=8)
    assert encoded["rejected"][1] == [BOS, 6, 6, 6, 4, 5, 5, EOS] and encoded["chosen"][1] == [BOS, 6, 6, 6, 4, 4, EOS]
    assert fitting_pairs(tokenizer, pairs, context=14) == pairs
    for long in ("drop", "cut"):
        with pytest.raises(ValueError, match="preferences must hold a pair that fits the model's context of 2; got no"):
            fitting_pairs(tokenizer, pairs, context=2, long=long)
    with pytest.raises(ValueError, match="long must be one of refuse, drop, cut; got 'keep'"):
        fitting_pairs(tokenizer, pairs, context=8, long="keep")


def test_an_answer_to_a_chat_that_was_cut_has_the_tokens_that_it_had(trained):
    tokenizer = copy.deepcopy(trained)
    tokenizer.chat_template = "{{ messages[0].content }}:"  # no white space before the answer
    pair = {"prompt": turns("plot " * 9 + "plot"), "chosen": "good", "rejected": "good plot"}
    whole = {side: encode_response(tokenizer, pair["prompt"], pair[side]) for side in ("chosen", "rejected")}
    (cut,) = fitting_pairs(tokenizer, [pair], context=10, long="cut")
    assert isinstance(cut["prompt"], list) and len(cut["prompt"]) == 10 - len(whole["rejected"])
    assert {side: encode_response(tokenizer, cut["prompt"], cut[side]) for side in whole} == whole


# --- Nothing at all ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t: pad([], PAD, side="left"), "sequences must hold at least one row"),
        (lambda t: train_tokenizer([], vocab_size=300), "texts must hold at least one text"),
        (lambda t: encode_prompts(t, [], max_new_tokens=1, context=9), "prompts must hold at least one prompt"),
        (lambda t: encode_preferences(t, [], context=9), "preferences must hold at least one pair"),
        (lambda t: fitting_pairs(t, [], context=9), "preferences must hold at least one pair"),
        (lambda t: fitting_pairs(t, [], context=9, long="drop"), "preferences must hold a pair"),
    ],
)
def test_nothing_is_refused(function, message, tokenizer):
    with pytest.raises(ValueError, match=f"{message}.*; got none"):
        function(tokenizer)


# --- Token ids ------------------------------------------------------------------------------------


def test_prompt_opens_with_the_begin_token(tokenizer):
    assert encode_prompt(tokenizer, "good film") == [BOS, 4, 6]


def test_empty_prompt_is_the_begin_token_alone(tokenizer, make_tokenizer):
    assert encode_prompt(tokenizer, "") == [BOS]
    assert encode_prompt(tokenizer, "  ") == [BOS]
    without_begin = make_tokenizer(bos_token=None)
    assert encode_prompt(without_begin, "") == [EOS]


def test_prompt_is_left_open_by_a_tokenizer_that_closes_every_text(make_tokenizer):
    from tokenizers import processors

    closing = make_tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", EOS)]
    )
    assert closing("good film").input_ids == [4, 6, EOS]
    assert encode_prompt(closing, "good film") == [4, 6]
    assert encode_response(closing, "good", "film") == [6, EOS]


@pytest.mark.detail(25)
def test_response_ends_in_one_eos_and_has_no_begin_token(tokenizer):
    assert encode_response(tokenizer, "film", "good bad") == [4, 5, EOS]
    assert encode_response(tokenizer, "film", "") == [EOS]


@pytest.mark.detail(25)
@pytest.mark.parametrize("prompt", ["the film was", "the film was ", ""])
@pytest.mark.parametrize("response", ["good and long .", " good and long ."])
def test_prompt_and_response_join_as_one_text_of_whole_words(prompt, response):
    """A response that the tokenizer had seen after its prompt: a word keeps the space that stands before it."""
    tokenizer = train_tokenizer(["the film was good and long .", "the plot was bad ."] * 5, vocab_size=400)
    ids = encode_prompt(tokenizer, prompt) + encode_response(tokenizer, prompt, response)
    between = "" if not prompt or prompt.endswith(" ") or response.startswith(" ") else " "
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + between + response
    if not prompt.endswith(" "):  # else the tokenizer would have set that space before the word
        assert ids == tokenizer(prompt + between + response).input_ids + [tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["good film", "<bos> good film", "good film <eos>", "<bos> good film <eos> <eos>"])
@pytest.mark.parametrize("template", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
def test_a_text_has_one_begin_token_and_one_eos_whatever_it_and_the_tokenizer_bring(text, template, make_tokenizer):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    names = [("<bos>", BOS), ("<eos>", EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=names)
    begun = "<bos>" in template or "<bos>" in text
    assert encode_prompt(tokenizer, text) == [BOS] * begun + [4, 6]
    assert encode_response(tokenizer, "film", text) == [4, 6, EOS]


@pytest.mark.detail(25)
def test_nothing_follows_the_first_eos_of_a_response(tokenizer, trained):
    assert encode_response(tokenizer, "film", "good <eos> bad") == [4, EOS]
    assert encode_response(tokenizer, "film", "<bos>") == encode_response(tokenizer, "film", "<eos>") == [EOS]
    assert encode_response(trained, "the plot", "") == encode_response(trained, "", "") == [EOS]
    assert encode_response(tokenizer, "film", "good", ended=False) == [4]
    assert encode_response(tokenizer, "film", "", ended=False) == []


def test_a_model_s_begin_token_may_be_its_eos(make_tokenizer):
    """As GPT-2's is: in front it opens a text, at the end it closes one."""
    tokenizer = make_tokenizer(bos_token="<eos>")
    tokenizer.backend_tokenizer.post_processor = None
    assert encode_prompt(tokenizer, "<eos> good <eos>") == [EOS, 4]
    assert encode_prompt(tokenizer, "") == encode_prompt(tokenizer, "<eos>") == [EOS]
    assert encode_response(tokenizer, "film", "<eos> good <eos>") == [4, EOS]


CODE = "def f(x):\n    "
CONTINUED = [
    ("the plot was", " good ."), ("the plot wa", "s good"), ("the plot", "ing"), ("the plot", " ing"),
    (CODE, "return x\n"), (CODE[:-4], "    return x\n\n"), ("tabs", "\tand  two spaces "), ("", "good"), ("", " good"),
    ("naïve ca", "fé — 5 €"), ("x = ", "\n"),
]  # fmt: skip


def llama_like():
    """SentencePiece's manner: a space belongs to the word behind it, the first word gets one, decoding drops it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    specials = ["<pad>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "def f(x): return x", "the plot was"] * 5, trainer)
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.detail(25)
@pytest.mark.parametrize(("prompt", "response"), CONTINUED)
@pytest.mark.parametrize("kind", ["bytes", "llama"])
def test_what_was_sampled_is_read_back_token_for_token(kind, prompt, response, trained):
    """From text to ids and back, white space at both ends and a word's second half included."""
    tokenizer = trained if kind == "bytes" else llama_like()
    before, ids = encode_prompt(tokenizer, prompt), encode_response(tokenizer, prompt, response, sampled=True)
    text = decode_responses(tokenizer, [before, before], [ids, ids[:-1]], torch.tensor([True, False]))
    if prompt or kind == "bytes" or not response.startswith(" "):  # else Llama's own first space
        assert text == [response, response]
    first, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, prompt + response))
    if whole[: len(first)] == first:
        assert ids == whole[len(first) :] + [tokenizer.eos_token_id]


def test_text_keeps_its_white_space(trained):
    for text in ("\n    a = x\n    return a\n", "ing", " ing", "<answer>\n4\n</answer>\n", "\n\n\n", "  "):
        ids = torch.tensor([trained(text, add_special_tokens=False).input_ids + [EOS]])
        assert decode(trained, ids, torch.ones_like(ids).bool()) == [text]


def test_the_token_that_ended_a_response_is_left_out_whichever_it_is(tokenizer):
    """Any other stays, a second end token and a begin token too; what was cut off loses nothing."""
    ids, ended = [[4, EOS], [4, 7], [4, EOS, 7], [BOS, 4], [7], [4, EOS]], [True, True, True, False, True, False]
    texts = decode_responses(tokenizer, [[BOS, 6]] * 6, ids, torch.tensor(ended))
    assert texts == ["good", "good", "good <eos>", "<bos> good", "", "good <eos>"]


@pytest.mark.detail(3)
@pytest.mark.parametrize(
    ("side", "rows", "real"),
    [
        ("left", [[0, 0, 5], [6, 7, EOS]], [[False, False, True], [True, True, True]]),
        ("right", [[5, 0, 0], [6, 7, EOS]], [[True, False, False], [True, True, True]]),
    ],
)
def test_padding_stands_on_the_side_asked_for_and_eos_is_real(side, rows, real):
    tokens, mask = pad([[5], [6, 7, EOS]], PAD, side=side)
    assert tokens.tolist() == rows and mask.tolist() == real
    assert tokens.dtype == torch.long and mask.dtype == torch.bool


def test_padding_id_inside_a_row_is_real():
    assert pad([[PAD, 5], [5]], PAD, side="left")[1].tolist() == [[True, True], [False, True]]


def test_decoded_is_what_is_real_without_begin_token_and_final_eos(tokenizer):
    """Other special tokens stay visible, wherever they stand."""
    tokens = torch.tensor([[BOS, 4, 6, EOS, 5], [7, 7, BOS, 4, 5], [4, PAD, 3, BOS, 6], [BOS, 5, 5, 5, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    assert decode(tokenizer, tokens, mask) == ["good film", "good bad", "good <pad> <unk> <bos> film", ""]


# --- A tokenizer trained on the spot --------------------------------------------------------------

CORPUS = ["the plot was good .", "naïve café — 5 €, “quoted” 電影 🙂", "tabs\tand  two spaces", "don't , won't !"]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(CORPUS * 20, vocab_size=400)


@pytest.mark.parametrize("text", [*CORPUS, "unseen: Ω≈ç√ \U0001f600 zebra"])
def test_trained_tokenizer_round_trips_text(trained, text):
    """Byte-level: nothing is unknown, seen in training or not."""
    ids = trained(text).input_ids
    assert ids[0] == trained.bos_token_id and trained.bos_token_id not in ids[1:]
    assert trained.decode(ids, skip_special_tokens=True) == text


def test_trained_tokenizer_merges_frequent_words_and_keeps_its_size(trained):
    assert len(trained) <= 400
    assert len(trained("the plot was good .", add_special_tokens=False).input_ids) == 5
    assert len({trained.pad_token_id, trained.bos_token_id, trained.eos_token_id}) == 3
    assert trained.padding_side == "left"


def test_trained_tokenizer_is_saved_and_loaded(trained, tmp_path):
    from rlhf_lessons.models import load_tokenizer

    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert [loaded(text).input_ids for text in CORPUS] == [trained(text).input_ids for text in CORPUS]
    assert loaded.decode(loaded(CORPUS[1]).input_ids, skip_special_tokens=True) == CORPUS[1]
