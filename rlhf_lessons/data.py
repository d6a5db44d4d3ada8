"""Reading what the learner brings: prompts, preference files and corpora; and turning text into token ids.

Every error is a ValueError that names the file and, where there is one, the line.
"""

import json
import os.path
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PREFERENCE_FIELDS = ("prompt", "chosen", "rejected")
LONG = ("refuse", "drop", "cut")  # what becomes of a pair that is longer than the context
# What opens an answer where whole conversations are written as one text.
ANSWERS = ("\n\nAssistant:", "<|im_start|>assistant\n", "<|assistant|>\n", "[/INST]")

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"  # of transformers, whose import takes seconds
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]  # a text, its token ids, or the messages of a chat


class Record(dict):
    """The fields of one line of a file, and its place: "FILE, line N"."""

    def __init__(self, fields: Mapping[str, Any], place: str) -> None:
        super().__init__(fields)
        self.place = place


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """The non-empty lines of a UTF-8 text file with their numbers, counted from 1."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors open a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    # Split at newlines alone: str.splitlines also splits at characters that JSON allows inside a string.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: the file holds no text")
    return lines


def read_corpus(path: str | Path) -> list[str]:
    """One document a line, without the white space around it; empty lines are skipped."""
    return [line for _, line in read_lines(path)]


def read_preferences(path: str | Path) -> list[Record]:
    """JSON lines with `prompt` (may be empty), `chosen` and `rejected`, each a text or a list of messages.

    Without a prompt the two are whole conversations, and the prompt is what they share up to their last turn. Other
    fields are ignored; in what is returned, `chosen` and `rejected` are texts.
    """
    return [preference(json_record(path, number, line, PREFERENCE_FIELDS[1:])) for number, line in read_lines(path)]


def read_prompts(path: str | Path) -> list[Record]:
    """One prompt a line, or JSON lines with a field `prompt` where the name ends in .json, .jsonl or .ndjson.

    There it is a text, white space and all, or a list of messages; a plain line is read without the white space around
    it. What else a JSON line holds stays beside its prompt, for a score that asks for it.
    """
    if Path(path).suffix.lower() in (".json", ".jsonl", ".ndjson"):
        return [json_record(path, number, line, ("prompt",)) for number, line in read_lines(path)]
    return [Record({"prompt": line}, f"{path}, line {number}") for number, line in read_lines(path)]


def json_record(path: str | Path, number: int, line: str, fields: tuple[str, ...]) -> Record:
    """One JSON line; the named fields must be there, and they and a `prompt` hold texts, or messages with texts."""
    place = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter, and a plain ValueError, for absurd nesting and numbers
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{place}: not valid JSON: {reason}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: the line must be a JSON object; got {type(record).__name__}")
    for field in fields:
        if field not in record:
            raise ValueError(f'{place}: the field "{field}" is missing; found {sorted(record)}')
    for field in PREFERENCE_FIELDS:
        if field in fields or (field == "prompt" and field in record):
            check_texts(record[field], field, place)
    return Record(record, place)


def check_texts(value: Any, field: str, place: str) -> None:
    """Raise ValueError, naming the place, unless a field is a text, or a list of messages with texts."""
    texts = [message["content"] for message in value] if is_chat(value) else [value]
    if not all(isinstance(text, str) for text in texts):
        kind = f"{type(value).__name__}, which is no list of messages either"
        raise ValueError(f'{place}: the field "{field}" must be a string; got {kind}')
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise ValueError(f'{place}: the field "{field}" holds half of a surrogate pair, no character')


def preference(record: Record) -> Record:
    """One line's prompt and its two answers, whichever way they were written.

    Raises ValueError, naming the place, where the two share no prompt, or an answer is empty.
    """
    sides, place, prompt = PREFERENCE_FIELDS[1:], record.place, record.get("prompt")
    turns = [(text[:-1], text[-1]["content"]) if is_chat(text) else ([], text) for text in map(record.get, sides)]
    (before, chosen), (before_rejected, rejected) = turns
    if before != before_rejected:
        raise ValueError(f"{place}: chosen and rejected must be one conversation up to their last turns")
    if prompt is None and not before:
        shared = os.path.commonprefix([chosen, rejected])
        length = max((shared.rfind(opening) + len(opening) for opening in ANSWERS if opening in shared), default=0)
        if not length:
            raise ValueError(f'{place}: the field "prompt" is missing; found {sorted(record)}')
        prompt, chosen, rejected = shared[:length], chosen[length:], rejected[length:]
    for field, text in zip(sides, (chosen, rejected), strict=True):
        if not text.strip():
            raise ValueError(f'{place}: the field "{field}" must not be empty')
    return Record({"prompt": before or prompt, "chosen": chosen, "rejected": rejected}, place)


def sentence_openings(texts: list[str], *, words: int) -> list[str]:
    """The first words of each text, as prompts for a corpus that has none; texts no longer than that are left out."""
    return [" ".join(text.split()[:words]) for text in texts if len(text.split()) > words]


# --- Texts and token ids ----------------------------------------------------------------------------------------------


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, each with a `role` and a `content` in text."""
    if not isinstance(prompt, Sequence) or not all(isinstance(item, Mapping) for item in prompt):
        return False
    return len(prompt) > 0 and all(isinstance(item.get(key), str) for item in prompt for key in ("role", "content"))


def is_begun(prompt: Prompt) -> bool:
    """Whether a prompt is a chat in which the assistant has already begun to answer."""
    return is_chat(prompt) and prompt[-1]["role"] == "assistant"


class CutChat(list):
    """Token ids of a chat whose beginning was cut off."""


def opens_a_turn(prompt: Prompt) -> bool:
    """Whether an answer begins a turn of a chat: the template has set what stands between, and no space is added."""
    return isinstance(prompt, CutChat) or is_chat(prompt) and not is_begun(prompt)


def as_record(prompt: Prompt | Mapping[str, Any]) -> Mapping[str, Any]:
    """A prompt as a record: {"prompt": …}, and whatever columns a record already has beside it."""
    if isinstance(prompt, Mapping) and "prompt" not in prompt:
        raise ValueError(f'a record must hold a "prompt"; got {sorted(prompt)}')
    return prompt if isinstance(prompt, Mapping) else {"prompt": prompt}


def prompt_text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """A prompt as text: messages by the tokenizer's chat template, up to where the answer begins.

    Where the last message is the assistant's own, that is an answer begun, which is continued.
    Raises ValueError for messages that the template does not take, and for what is no prompt.
    """
    if isinstance(prompt, str):
        return prompt
    if is_chat(prompt):
        try:
            ends = {"continue_final_message" if is_begun(prompt) else "add_generation_prompt": True}
            return tokenizer.apply_chat_template(list(prompt), tokenize=False, **ends)
        except Exception as error:  # of Jinja, in which a template says what it does not take, or of having none
            reason = error if tokenizer.chat_template else "a tokenizer that has none"
            raise ValueError(f"messages must suit the tokenizer's chat template; got: {reason}") from error
    if not isinstance(prompt, Sequence) or not all(type(i) is int and i >= 0 for i in prompt):
        raise ValueError(f"prompt must be a text, a list of token ids or a list of messages; got {prompt!r:.80}")
    return text_of(tokenizer, without_begin(tokenizer, list(prompt)))


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; an empty one becomes the begin token alone (the EOS token where there is no other).

    A text has one begin token at most and no EOS at its end, whatever it or the tokenizer brings: it will be continued.
    """
    text, begin, end = prompt_text(tokenizer, prompt), tokenizer.bos_token_id, tokenizer.eos_token_id
    if isinstance(prompt, str) or is_chat(prompt):
        ids = tokenizer(text, add_special_tokens=isinstance(prompt, str)).input_ids if text else []
        while ids[-1:] == [end]:
            ids = ids[:-1]
        while ids[:2] == [begin, begin]:
            ids = ids[1:]
    else:
        ids = list(prompt)
    return ids or [end if begin is None else begin]


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt | Mapping[str, Any]], *, max_new_tokens: int, context: float,
    whose: str = "the model",
) -> list[list[int]]:  # fmt: skip
    """Token ids of each prompt, or of each record with one.

    Raises ValueError, naming its place, for a prompt that leaves a response no room in the context, or that cannot be
    read; and for no prompts.
    """
    if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts must be a list; got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none")
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        place = getattr(prompt, "place", f"prompt {number}")
        try:
            encoded.append(encode_prompt(tokenizer, as_record(prompt)["prompt"]))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if (length := len(encoded[-1])) + max_new_tokens > context:
            room = f"room for max_new_tokens = {max_new_tokens} in {whose}'s context of {context}"
            raise ValueError(f"{place}: a prompt must leave {room}; got one of {length} tokens")
    return encoded


def encode_response(
    tokenizer: Tokenizer, prompt: Prompt, response: str, *, ended: bool = True, sampled: bool = False
) -> list[int]:
    """Token ids of a response to that prompt, one EOS last: just what the policy would have had to sample.

    A word that follows a text without any white space between them gets a space, and a begin token in front is left
    out; not so what was `sampled`, which is read as it stands. ended: False for what was cut off, which has no EOS.
    """
    before = prompt_text(tokenizer, prompt)
    apart = opens_a_turn(prompt) or before[-1:].isspace() or response[:1].isspace()
    if before and response and not (sampled or apart):
        response = " " + response
    ids = continuation(tokenizer, before, response)
    ids = ids if sampled else without_begin(tokenizer, ids)
    end = tokenizer.eos_token_id
    return ids[: ids.index(end) if end in ids else None] + [end] * bool(ended)


def continuation(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """Token ids of a text that follows another one: what it adds to that one's, where those stay as they were.

    Where the tokenizer would merge across the joint, the text's ids after a mark; alone, some would add a space to it.
    """

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    for start in (before, ".", "\n"):
        first, whole = ids_of(start), ids_of(start + text)
        if whole[: len(first)] == first:
            return whole[len(first) :]
    return ids_of(text)


def encode_pair(tokenizer: Tokenizer, pair: Mapping[str, Any]) -> tuple[list[int], ...]:
    """Token ids of a pair's prompt, and of its chosen and its rejected response, EOS included.

    Raises ValueError, naming its place, for a prompt that cannot be read.
    """
    prompt = pair["prompt"]
    try:
        answers = [encode_response(tokenizer, prompt, pair[side]) for side in PREFERENCE_FIELDS[1:]]
        return encode_prompt(tokenizer, prompt), *answers
    except ValueError as error:
        raise ValueError(f"{getattr(pair, 'place', 'a pair')}: {error}") from error


def encode_preferences(
    tokenizer: Tokenizer, preferences: Sequence[Mapping[str, Any]], *, context: float
) -> dict[str, list[list[int]]]:
    """Token ids of each pair's two texts, prompt, response and EOS, under "chosen" and "rejected".

    Raises ValueError, naming its place, for a text longer than the context, or for no pairs.
    """
    if not preferences:
        raise ValueError("preferences must hold at least one pair; got none")
    encoded: dict[str, list[list[int]]] = {"chosen": [], "rejected": []}
    for number, pair in enumerate(preferences, start=1):
        prompt, *answers = encode_pair(tokenizer, pair)
        for (side, texts), answer in zip(encoded.items(), answers, strict=True):
            texts.append(prompt + answer)
            if (length := len(texts[-1])) > context:
                place, room = getattr(pair, "place", f"pair {number}"), f"the model's context of {context}"
                raise ValueError(f"{place}: prompt and {side} must fit {room}, EOS included; got {length} tokens")
    return encoded


def fitting_pairs(
    tokenizer: Tokenizer, preferences: Sequence[Mapping[str, Any]], *, context: float, long: str = "refuse"
) -> list[Mapping[str, Any]]:
    """The pairs, those whose two texts fit the context, EOS included, as they are.

    long: what becomes of one that does not. "refuse" raises ValueError, naming its place; "drop" leaves it out; "cut"
    cuts the beginning off its prompt, and leaves it out where a response alone fills the context. Raises ValueError
    where none is left, and for another `long`.
    """
    if long not in LONG:
        raise ValueError(f"long must be one of {', '.join(LONG)}; got {long!r}")
    if long == "refuse":
        encode_preferences(tokenizer, preferences, context=context)
        return list(preferences)
    kept = []
    for pair in preferences:
        prompt, *answers = encode_pair(tokenizer, pair)
        room = context - max(map(len, answers))  # for the prompt, whose begin token is never cut
        if len(prompt) <= room:
            kept.append(pair)
        elif long == "cut" and room > 1:
            whose = CutChat if opens_a_turn(pair["prompt"]) else list
            kept.append(Record({**pair, "prompt": whose(prompt[:1] + prompt[1 - room :])}, getattr(pair, "place", "")))
    if not kept:
        raise ValueError(f"preferences must hold a pair that fits the model's context of {context}; got none")
    return kept


def without_begin(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids without a begin token in front."""
    return ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids


def real_ids(tokens: Tensor, mask: Tensor) -> list[list[int]]:
    """Each row's real tokens. tokens, mask (B, L)."""
    rows = zip(tokens.tolist(), mask.tolist(), strict=True)
    return [[token for token, is_real in zip(*row, strict=True) if is_real] for row in rows]


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of these ids, white space and special tokens as they are."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def writes_spaces(tokenizer: Tokenizer) -> bool:
    """Whether tokens hold the space before a word; else decoding sets one between any two, and none was sampled."""
    return getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", True) is not None


def decode(tokenizer: Tokenizer, tokens: Tensor, mask: Tensor) -> list[str]:
    """Each row's real tokens as text, a begin token in front and an EOS at the end left out. tokens, mask (B, L).

    Other special tokens stay visible: a policy that samples them should be scored for it. So does white space.
    """
    rows = [without_begin(tokenizer, ids) for ids in real_ids(tokens, mask)]
    return [text_of(tokenizer, ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids) for ids in rows]


def decode_responses(
    tokenizer: Tokenizer, prompts: Sequence[list[int]], responses: Sequence[list[int]], ended: Tensor
) -> list[str]:
    """Each response's token ids as the text that was sampled after its prompt's: the end token alone is left out.

    ended (B,): where the last token is one that ends a response, whichever that is. Some tokenizers drop a space at the
    beginning of whatever they decode, so that a response is read off the whole.
    """
    texts = []
    for prompt, response, done in zip(prompts, responses, ended.tolist(), strict=True):
        before, ids = without_begin(tokenizer, prompt), response[:-1] if done else response
        start = text_of(tokenizer, before) if writes_spaces(tokenizer) else None
        whole = start and text_of(tokenizer, before + ids)
        texts.append(whole[len(start) :] if whole and whole.startswith(start) else text_of(tokenizer, ids))
    return texts


def pad(sequences: list[list[int]], pad_id: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Rows of one length and their mask: token ids (B, L) long, mask (B, L) bool, padded on the "left" or "right".

    Raises ValueError for no rows.
    """
    import torch

    if not sequences:
        raise ValueError("sequences must hold at least one row; got none")
    length = max(len(sequence) for sequence in sequences)
    tokens = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        tokens[row, place] = torch.tensor(sequence)
        mask[row, place] = True
    return tokens, mask


def train_tokenizer(texts: list[str], *, vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, learnt from these texts; pads on the left.

    Raises ValueError for no texts.
    Source: Sennrich et al. 2016, "Neural machine translation of rare words with subword units"; Radford et al. 2019.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if not texts:
        raise ValueError("texts must hold at least one text; got none")
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # ids and text say the same
    bpe.decoder = decoders.ByteLevel()
    how = dict(special_tokens=[*special.values()], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **how))
    begin = [("<bos>", bpe.token_to_id("<bos>"))]
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=begin)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, padding_side="left", clean_up_tokenization_spaces=False, **special
    )
