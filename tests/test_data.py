"""Reading files, with errors that name the line, and turning text into token ids."""

import json

import pytest
import torch

from rlhf_lessons.data import (
    decode,
    encode_prompt,
    encode_response,
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
    assert tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ") == (prompt + between + response).lstrip()
    if not prompt.endswith(" "):  # else the tokenizer would have set that space before the word
        assert ids == tokenizer(prompt + between + response).input_ids + [tokenizer.eos_token_id]


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
    assert trained.decode(ids, skip_special_tokens=True).removeprefix(" ") == text


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
    assert loaded.decode(loaded(CORPUS[1]).input_ids, skip_special_tokens=True).removeprefix(" ") == CORPUS[1]
