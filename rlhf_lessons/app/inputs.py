"""What the learner brings to a run: files, models, a score of one's own; each read once, before anything long begins.

The tiny world serves wherever nothing of one's own is given. What is read is carried, and each line of a file with it
the place where it stood, so that a text that does not fit can be named later.
"""

import argparse
import functools
import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_lessons import data, models, tiny_reviews
from rlhf_lessons.app.options import critic_of
from rlhf_lessons.config import require
from rlhf_lessons.device import check_device
from rlhf_lessons.display import say
from rlhf_lessons.forward import context_of
from rlhf_lessons.models import ASSETS
from rlhf_lessons.scoring import score_texts

NUM_PROMPTS = 2000  # drawn from the tiny world, or cut from a corpus
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
MANY_UNKNOWN = 0.2  # share of unknown tokens above which a tokenizer does not know the language it is given
PAIRS = dict.fromkeys(("preferences", "eval_preferences"), data.read_preferences)
FILES = {"corpus": data.read_corpus, **PAIRS} | dict.fromkeys(("prompts", "eval_prompts"), data.read_prompts)
GIVEN = (*FILES, "model", "policy", "reward_model", "score")

Records = Sequence[str | Mapping[str, Any]]
Score = nn.Module | Callable[..., Any]  # of tokens, or of texts


@dataclass(frozen=True)
class Model:
    """A model as it was loaded, the tokenizer beside it, and how it was called."""

    network: nn.Module
    tokenizer: data.Tokenizer
    name: str


@dataclass(frozen=True)
class Inputs:
    """What a command works on; None stands for what was not given and the tiny world has no need to lend."""

    given: dict[str, str | None]  # how the learner called each
    corpus: list[str] | None
    preferences: list[data.Record] | None
    eval_preferences: list[data.Record] | None
    prompts: list[data.Record] | None
    eval_prompts: list[data.Record] | None
    model: Model | None  # to start from
    policy: Model | None  # to compare with it
    reward_model: Model | None
    score: Callable[..., Any] | None
    long_pairs: str  # what becomes of a pair longer than the context; see `data.fitting_pairs`

    @property
    def tiny_world(self) -> bool:
        """Whether the prompts are the tiny world's, where the gold reward means something."""
        return self.corpus is None and self.prompts is None and self.preferences is None

    def choose_prompts(self, *, opening_words: int, seed: int, max_new_tokens: int = 0) -> Records:
        """The prompts to be continued, and a word to the user on which they are.

        Of those that come from preferences, where long pairs are not refused, the ones that leave max_new_tokens room.
        """
        given = self.given
        require("opening_words", opening_words, opening_words >= 0, "a whole number >= 0")
        if self.prompts is not None:
            prompts, kind = self.prompts, f"from {given['prompts']}"
        elif self.corpus is not None and opening_words > 0:
            prompts = data.sentence_openings(self.corpus, words=opening_words)[:NUM_PROMPTS]
            kind = f"the first {opening_words} words of lines in {given['corpus']}"
            if not prompts:
                few = f"no line has more than {opening_words} words, so none gives a prompt"
                raise ValueError(f"{given['corpus']}: {few}; lower --opening-words or give --prompts")
        elif self.tiny_world:
            prompts = tiny_reviews.prompts(NUM_PROMPTS, torch.Generator().manual_seed(seed))
            kind = "openings of tiny reviews"
        elif self.corpus is None:
            prompts, kind = self.prompts_of_pairs(max_new_tokens), f"those in {given['preferences']}"
        else:
            prompts, kind = [""], "the begin token alone"
        say(f"prompts: {len(prompts)}, {kind}; the first is {data.as_record(prompts[0])['prompt']!r}")
        return prompts

    def prompts_of_pairs(self, max_new_tokens: int) -> Records:
        """The prompts of the preferences; where long pairs are not refused, those that leave a response its room."""
        prompts = [data.Record({"prompt": pair["prompt"]}, pair.place) for pair in self.preferences]
        if self.long_pairs == "refuse":
            return prompts
        room = context_of(self.model.network) - max_new_tokens
        ids = data.encode_prompts(self.model.tokenizer, prompts, max_new_tokens=0, context=math.inf)
        prompts = [record for record, read in zip(prompts, ids, strict=True) if len(read) <= room]
        if not prompts:
            raise ValueError(f"{self.given['preferences']}: none of its prompts leaves room for a response")
        return prompts

    def check_lengths(self, base: Model, *, prompts: Records = (), max_new_tokens: int = 0) -> None:
        """Raise ValueError, naming the file's line, for a prompt or a pair that the model's context has no room for."""
        tokenizer, context = base.tokenizer, context_of(base.network)
        if prompts:
            data.encode_prompts(tokenizer, prompts, max_new_tokens=max_new_tokens, context=context)
        for pairs in (self.preferences, self.eval_preferences):
            if pairs is not None:
                data.fitting_pairs(tokenizer, pairs, context=context, long=self.long_pairs)

    def choose_pairs(self, name: str, base: Model) -> Records:
        """The pairs of one of the files, none without it, and a word to the user on those longer than the context."""
        pairs, context = getattr(self, name) or [], context_of(base.network)
        kept = data.fitting_pairs(base.tokenizer, pairs, context=context, long=self.long_pairs) if pairs else []
        count = len(pairs) - len({id(pair) for pair in kept} & {id(pair) for pair in pairs})
        if count:
            what = f"{self.long_pairs}: {len(kept)} are read"
            say(f"{count} of the {len(pairs)} pairs in {self.given[name]} are longer than {context} tokens ({what})")
        return kept

    def choose_score(self, reward_model: Model | None, tokenizer: data.Tokenizer, *, device: str) -> Score:
        """What is maximised: one's own function, or a reward model (on the tokens if its tokenizer reads them alike).

        One that reads texts goes to the device when it is first asked, when a trainer has long settled which that is.
        """
        if self.score is not None:
            return self.score
        if read_alike(reward_model.tokenizer, tokenizer):
            return reward_model.network
        if Path(reward_model.name) == ASSETS / "reward_model":
            raise ValueError(
                "give --reward-model or --score: the shipped reward model knows the tiny world's words only"
            )
        return by_its_own_tokenizer(reward_model, tokenizer, place=check_device(device))


def resolve(arguments: argparse.Namespace) -> Inputs:
    """Read every file, import the score, load every model that the command needs; look for the device.

    Raises ValueError for what is wrong with one.
    """
    given, command = {name: getattr(arguments, name, None) for name in GIVEN}, arguments.command
    check_device(getattr(arguments, "device", None) or "auto")
    found = {name: given[name] and read(given[name]) for name, read in FILES.items()}
    if getattr(arguments, "chat", None):
        found |= {name: [*map(as_chat, found[name])] for name in FILES if found[name] and name != "corpus"}
    score = given["score"] and import_score(given["score"])
    lent = {"model": command != "pretrain" and given["corpus"] is None and "base",
            "policy": command == "sample" and "aligned",
            "reward_model": command in ("ppo", "sample") and score is None and "reward_model"}  # fmt: skip
    loaders = dict.fromkeys(("model", "policy"), models.load_causal_lm) | {"reward_model": models.load_reward_model}
    if critic := critic_of(arguments):  # a policy that was trained before brings its value head
        loaders["model"] = functools.partial(models.CausalLMWithValueHead.from_pretrained, critic=critic)
    paths = {name: given[name] or (lent[name] and ASSETS / lent[name]) for name in loaders}
    loaded = {name: load_model(load, paths[name]) if paths[name] else None for name, load in loaders.items()}
    named, long_pairs = {k: v and str(v) for k, v in given.items()}, getattr(arguments, "long_pairs", data.LONG[0])
    return Inputs(given=named, score=score, long_pairs=long_pairs, **found, **loaded)


def as_chat(record: data.Record) -> data.Record:
    """The record, its prompt a chat that a user opens by it, where it is a plain text."""
    prompt = record["prompt"]
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return data.Record({**record, "prompt": chat}, record.place)


def load_model(load: Callable[[str | Path], nn.Module], path: str | Path) -> Model:
    """A model, by one of `models`' loaders, and the tokenizer beside it.

    Raises ValueError when the folder or its tokenizer is missing, or the tokenizer has tokens that the model does not
    embed.
    """
    name, network = str(path), load(path)
    if Path(path).is_dir() and not any(any(Path(path).glob(files)) for files in TOKENIZER_FILES):
        raise ValueError(f"{name}: no tokenizer is saved there; call tokenizer.save_pretrained on the model's folder")
    tokenizer = models.load_tokenizer(path)
    try:
        models.check_vocabulary(network, tokenizer)
    except ValueError as error:
        advice = "after adding tokens call model.resize_token_embeddings(len(tokenizer)) and save both again"
        raise ValueError(f"{name}: {error}; {advice}") from error
    return Model(network, tokenizer, name)


def warn_of_unknown(texts: Records, tokenizer: data.Tokenizer, path: str) -> None:
    """Tell the user when a tokenizer does not know much of what a file holds; chats are not looked at."""
    texts = [text for text in texts if isinstance(text, str)]
    if tokenizer.unk_token_id is None or not texts:
        return
    tokens = [token for ids in tokenizer(texts, add_special_tokens=False).input_ids for token in ids]
    unknown = sum(token == tokenizer.unk_token_id for token in tokens)
    if unknown > MANY_UNKNOWN * len(tokens):
        say(f"careful: {unknown / len(tokens):.0%} of the words in {path} are unknown to the model's tokenizer; "
            "--corpus or --model brings one that knows them")  # fmt: skip


def by_its_own_tokenizer(reward_model: Model, tokenizer: data.Tokenizer, *, place: str) -> Callable[..., Any]:
    """A reward model's score of what a policy with another tokenizer writes, as a function of texts."""
    network, own = reward_model.network, reward_model.tokenizer
    between = "" if data.writes_spaces(tokenizer) else " "  # a prompt's and a response's words

    def score(prompts: Sequence[str], responses: Sequence[str], prompt: Any = (), ended: Any = None) -> torch.Tensor:
        """The scores of texts as the reward model's own tokenizer writes them, chats (in `prompt`) by its template."""
        chats = [own.chat_template and data.is_chat(given) and given for given in prompt or prompts]
        asked = [chat or text for chat, text in zip(chats, prompts, strict=True)]
        said = [(text and response and between) + response for text, response in zip(prompts, responses, strict=True)]
        return score_texts(network.to(place), own, asked, said, ended=ended, sampled=True)

    return score


def read_alike(one: data.Tokenizer, other: data.Tokenizer) -> bool:
    """Whether two tokenizers have the same words, begin token and EOS, so that one's ids are the other's."""

    def written(t: data.Tokenizer) -> tuple[Any, ...]:
        return (t.get_vocab(), t.eos_token_id, [data.encode_prompt(t, text) for text in ("", "a")])

    return written(one) == written(other)


def import_score(name: str) -> Callable[..., Any]:
    """The function that `module:function` names, the module found from the working directory.

    What the function raises comes out as ValueError, with its type, its message and its place.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except (Exception, SystemExit) as error:  # whatever a module of the learner's own may raise
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"--score must be module:function, importable from here; got {name!r} ({reason})") from error
    if not callable(function):
        raise ValueError(f"--score must name a function; got {name}, which is {type(function).__name__}")

    @functools.wraps(function)
    def score(*arguments: Any, **columns: Any) -> Any:
        try:
            return function(*arguments, **columns)
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = ([f for f in frames if f.filename == getattr(module, "__file__", None)] or frames)[-1]
            where = f"{place.filename}, line {place.lineno}"
            raise ValueError(f"--score {name} raised {type(error).__name__}: {error} ({where})") from error

    return score
