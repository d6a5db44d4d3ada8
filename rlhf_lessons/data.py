"""Reading what the learner brings: prompts, preference files and corpora; and turning text into token ids.

Every error is a ValueError that names the file and, where there is one, the line.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PREFERENCE_FIELDS = ("prompt", "chosen", "rejected")


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
    """One document a line; empty lines are skipped."""
    return [line for _, line in read_lines(path)]


def read_preferences(path: str | Path) -> list[Record]:
    """JSON lines with the string fields `prompt` (may be empty), `chosen` and `rejected`; other fields are ignored."""
    records = [json_record(path, number, line, PREFERENCE_FIELDS) for number, line in read_lines(path)]
    return [Record({field: record[field] for field in PREFERENCE_FIELDS}, record.place) for record in records]


def read_prompts(path: str | Path) -> list[Record]:
    """One prompt a line, or JSON lines with a string field `prompt` where the file's name ends in .json or .jsonl.

    What else a JSON line holds stays beside its prompt, for a score that asks for it.
    """
    if Path(path).suffix in (".json", ".jsonl"):
        return [json_record(path, number, line, ("prompt",)) for number, line in read_lines(path)]
    return [Record({"prompt": line}, f"{path}, line {number}") for number, line in read_lines(path)]


def json_record(path: str | Path, number: int, line: str, fields: tuple[str, ...]) -> Record:
    """One JSON line; the named fields must be strings."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter, and a plain ValueError, for absurd nesting and numbers
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{path}, line {number}: not valid JSON: {reason}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: the line must be a JSON object; got {type(record).__name__}")
    for field in fields:
        if field not in record:
            raise ValueError(f'{path}, line {number}: the field "{field}" is missing; found {sorted(record)}')
        if not isinstance(record[field], str):
            raise ValueError(
                f'{path}, line {number}: the field "{field}" must be a string; got {type(record[field]).__name__}'
            )
        if any("\ud800" <= character <= "\udfff" for character in record[field]):
            raise ValueError(f'{path}, line {number}: the field "{field}" holds half of a surrogate pair, no character')
        if field != "prompt" and not record[field].strip():
            raise ValueError(f'{path}, line {number}: the field "{field}" must not be empty')
    return Record(record, f"{path}, line {number}")


def sentence_openings(texts: list[str], *, words: int) -> list[str]:
    """The first words of each text, as prompts for a corpus that has none; texts no longer than that are left out."""
    return [" ".join(text.split()[:words]) for text in texts if len(text.split()) > words]


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one becomes the begin token alone (the EOS token where there is no other)."""
    ids = tokenizer(prompt).input_ids if prompt else []
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers close every text; a prompt is to be continued
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return ids or [begin]


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str | Mapping[str, Any]], *,
    max_new_tokens: int, context: float, whose: str = "the model",
) -> list[list[int]]:  # fmt: skip
    """Token ids of each prompt, a text or a record with one.

    Raises ValueError, naming its place, for a prompt that leaves a response no room in the context, or for no prompts.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none")
    encoded = [encode_prompt(tokenizer, prompt if isinstance(prompt, str) else prompt["prompt"]) for prompt in prompts]
    for number, ids in enumerate(encoded):
        if len(ids) + max_new_tokens > context:
            raise ValueError(
                f"{getattr(prompts[number], 'place', f'prompt {number + 1}')}: a prompt must leave room for "
                f"max_new_tokens = {max_new_tokens} in {whose}'s context of {context}; got one of {len(ids)} tokens"
            )
    return encoded


def encode_preferences(
    tokenizer: "PreTrainedTokenizerBase", preferences: Sequence[Mapping[str, str]], *, context: float
) -> dict[str, list[list[int]]]:
    """Token ids of each pair's two texts, prompt, response and EOS, under "chosen" and "rejected".

    Raises ValueError, naming its place, for a text longer than the context, or for no pairs.
    """
    if not preferences:
        raise ValueError("preferences must hold at least one pair; got none")
    encoded: dict[str, list[list[int]]] = {"chosen": [], "rejected": []}
    for number, pair in enumerate(preferences):
        prompt = encode_prompt(tokenizer, pair["prompt"])
        for side, texts in encoded.items():
            texts.append(prompt + encode_response(tokenizer, pair["prompt"], pair[side]))
            if len(texts[-1]) > context:
                raise ValueError(
                    f"{getattr(pair, 'place', f'pair {number + 1}')}: prompt and {side} must fit the model's context "
                    f"of {context}, EOS included; got {len(texts[-1])} tokens"
                )
    return encoded


def encode_response(tokenizer: "PreTrainedTokenizerBase", prompt: str, response: str) -> list[int]:
    """Token ids of a response to that prompt, EOS last: just what the policy would have had to sample."""
    joined = response if not prompt or prompt[-1].isspace() or response[:1].isspace() else " " + response
    return tokenizer(joined, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def decode(tokenizer: "PreTrainedTokenizerBase", tokens: Tensor, mask: Tensor) -> list[str]:
    """Each row's real tokens as text, a begin token in front and an EOS at the end left out. tokens, mask (B, L).

    Other special tokens stay visible: a policy that samples them should be scored for it.
    """
    texts = []
    for row, real in zip(tokens.tolist(), mask.tolist(), strict=True):
        ids = [token for token, is_real in zip(row, real, strict=True) if is_real]
        ids = ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids
        ids = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
        texts.append(tokenizer.decode(ids).strip())
    return texts


def pad(sequences: list[list[int]], pad_id: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Rows of one length and their mask: token ids (B, L) long, mask (B, L) bool, padded on the "left" or "right"."""
    import torch

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

    Source: Sennrich et al. 2016, "Neural machine translation of rare words with subword units"; Radford et al. 2019.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<bos>", "<eos>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
