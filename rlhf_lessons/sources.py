"""What the learner brings to a run: files, models, a score of one's own; all of it checked before anything long begins.

The tiny world serves wherever nothing of one's own is given.
"""

import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rlhf_lessons import data, tiny_reviews
from rlhf_lessons.fitting import make_accelerator, score_texts
from rlhf_lessons.models import ASSETS, load_reward_model, load_tokenizer
from rlhf_lessons.report import say

NUM_PROMPTS = 2000  # drawn from the tiny world, or cut from a corpus
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
MANY_UNKNOWN = 0.2  # share of unknown tokens above which a tokenizer does not know the language it is given


@dataclass(frozen=True)
class Sources:
    """What the learner brings; None stands for the tiny world's own."""

    corpus: Path | None = None
    preferences: Path | None = None
    eval_preferences: Path | None = None
    prompts: Path | None = None
    model: str | None = None
    reward_model: str | None = None
    score: str | None = None

    @property
    def tiny_world(self) -> bool:
        """Whether the prompts are the tiny world's, where the gold reward means something."""
        return self.corpus is None and self.prompts is None and self.preferences is None


def check_sources(sources: Sources, *, device: str, precision: str) -> None:
    """Read every file, import the score and look for the device. Raises ValueError for what is wrong with one."""
    if sources.score is not None and sources.reward_model is not None:
        raise ValueError("give --score or --reward-model, not both")
    if sources.eval_preferences is not None and sources.preferences is None:
        raise ValueError("--eval-preferences measures the reward model made from --preferences; give that too")
    for path, read in (
        (sources.corpus, data.read_corpus),
        (sources.preferences, data.read_preferences),
        (sources.eval_preferences, data.read_preferences),
        (sources.prompts, data.read_prompts),
    ):
        if path is not None:
            read(path)
    if sources.score is not None:
        import_score(sources.score)
    if sources.reward_model is not None:
        load_with_tokenizer(load_reward_model, sources.reward_model)
    make_accelerator(device, precision)


def load_with_tokenizer(load: Callable[[str | Path], nn.Module], path: str | Path) -> tuple[nn.Module, object]:
    """A model, by one of `models`' loaders, and the tokenizer beside it.

    Raises ValueError when the folder or its tokenizer is missing, or the tokenizer has tokens that the model does not
    embed.
    """
    name = str(path)
    if not Path(path).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name):
        raise ValueError(f"{name}: no such folder")
    model = load(path)
    if Path(path).is_dir() and not any(any(Path(path).glob(files)) for files in TOKENIZER_FILES):
        raise ValueError(f"{name}: no tokenizer is saved there; call tokenizer.save_pretrained on the model's folder")
    tokenizer = load_tokenizer(path)
    embedding = getattr(model, "classifier", model).get_input_embeddings()
    if len(tokenizer) > embedding.num_embeddings:
        raise ValueError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens, its model embeds {embedding.num_embeddings}; "
            "after adding tokens call model.resize_token_embeddings(len(tokenizer)) and save both again"
        )
    return model, tokenizer


# --- Prompts and preferences ------------------------------------------------------------------------------------------


def choose_prompts(sources: Sources, *, opening_words: int, seed: int) -> list[str]:
    """The prompts of PPO, and a word to the user on which they are."""
    if sources.prompts is not None:
        prompts, kind = data.read_prompts(sources.prompts), f"from {sources.prompts}"
    elif sources.corpus is not None and opening_words > 0:
        prompts = data.sentence_openings(data.read_corpus(sources.corpus), words=opening_words)[:NUM_PROMPTS]
        kind = f"the first {opening_words} words of lines in {sources.corpus}"
        if not prompts:
            raise ValueError(
                f"{sources.corpus}: no line has more than {opening_words} words, so none gives a prompt; "
                "lower --opening-words or give --prompts"
            )
    elif sources.tiny_world:
        prompts = tiny_reviews.prompts(NUM_PROMPTS, torch.Generator().manual_seed(seed))
        kind = "openings of tiny reviews"
    elif sources.corpus is None:
        prompts = [pair["prompt"] for pair in data.read_preferences(sources.preferences)]
        kind = f"those in {sources.preferences}"
    else:
        prompts, kind = [""], "the begin token alone"
    say(f"prompts: {len(prompts)}, {kind}; the first is {prompts[0]!r}")
    return prompts


def context_of(model: nn.Module) -> float:
    """The longest text that a model reads, in tokens; infinite where it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def require_prompts_fit(
    sources: Sources, prompts: list[str], tokenizer, model: nn.Module, *, max_new_tokens: int, whose: str = "the model"
) -> None:
    """Raise ValueError, naming the file's line, for a prompt that leaves a response no room in the model's context."""
    file = sources.prompts or (sources.preferences if sources.corpus is None else None)
    places = [f"{file}, line {number}" for number, _ in data.read_lines(file)] if file else None
    for number, prompt in enumerate(prompts):
        length = len(data.encode_prompt(tokenizer, prompt))
        if length + max_new_tokens > context_of(model):
            raise ValueError(
                f"{places[number] if places else f'prompt {number + 1}'}: the prompt has {length} tokens; with "
                f"max_new_tokens = {max_new_tokens} it does not fit {whose}'s context of {context_of(model)}"
            )


def read_fitting_preferences(path: Path, tokenizer, model: nn.Module) -> list[dict[str, str]]:
    """Preferences from a file; raises ValueError, naming the line, for a text longer than the model's context."""
    preferences = data.read_preferences(path)
    for (number, _), pair in zip(data.read_lines(path), preferences, strict=True):
        for side in ("chosen", "rejected"):
            response = data.encode_response(tokenizer, pair["prompt"], pair[side])
            length = len(data.encode_prompt(tokenizer, pair["prompt"])) + len(response)
            if length > context_of(model):
                raise ValueError(
                    f"{path}, line {number}: prompt and {side} have {length} tokens together, EOS included; "
                    f"the model's context is {context_of(model)}"
                )
    return preferences


def warn_of_unknown(texts: list[str], tokenizer, path: Path) -> None:
    """Tell the user when a tokenizer does not know much of what a file holds."""
    if tokenizer.unk_token_id is None:
        return
    tokens = [token for ids in tokenizer(texts, add_special_tokens=False).input_ids for token in ids]
    unknown = sum(token == tokenizer.unk_token_id for token in tokens)
    if unknown > MANY_UNKNOWN * len(tokens):
        say(
            f"careful: {unknown / len(tokens):.0%} of the words in {path} are unknown to the model's tokenizer; "
            "--corpus or --model brings one that knows them"
        )


# --- What PPO maximises -----------------------------------------------------------------------------------------------


def choose_score(sources: Sources, reward_model: str | Path | None, tokenizer, *, device: str) -> nn.Module | Callable:
    """What PPO maximises: one's own function, or a reward model (on the tokens if it shares the tokenizer)."""
    if sources.score is not None:
        return import_score(sources.score)
    model, own_tokenizer = load_with_tokenizer(load_reward_model, reward_model)
    if own_tokenizer.get_vocab() == tokenizer.get_vocab():
        return model
    if Path(reward_model) == ASSETS / "reward_model":
        raise ValueError("give --reward-model or --score: the shipped reward model knows the tiny world's words only")
    model.to(make_accelerator(device).device)
    return lambda prompts, responses: score_texts(model, own_tokenizer, prompts, responses)


def import_score(name: str) -> Callable:
    """The function that `module:function` names, the module found from the working directory.

    What the function raises comes out as ValueError, with its type, its message and its place.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except Exception as error:  # whatever a module of the learner's own may raise
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"--score must be module:function, importable from here; got {name!r} ({reason})") from error
    if not callable(function):
        raise ValueError(f"--score {name} must be a function; got {type(function).__name__}")

    def score(prompts: list[str], responses: list[str]):
        try:
            return function(prompts, responses)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = ([f for f in frames if f.filename == getattr(module, "__file__", None)] or frames)[-1]
            raise ValueError(
                f"--score {name} raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
            ) from error

    return score
