"""The card of a model's folder: what it is, how it was made, and lines of plain transformers that give its numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_lessons.data import encode_prompt, encode_response, text_of
from rlhf_lessons.forward import context_of
from rlhf_lessons.generation import respond
from rlhf_lessons.scoring import score_texts, text_log_probs

CARDS = Path(__file__).parent / "cards"  # beside/: what is said where the folder holds something of that name


@dataclass(frozen=True)
class Card:
    """A folder's README.md, saved as a model is, and after it: how that was trained, in words, with which settings.

    reward_model: what the folder holds where it is not the language model `lm`, which then wrote what is scored. The
    example is drawn after the begin token alone, so that nothing of anybody's data is quoted.
    """

    lm: torch.nn.Module
    tokenizer: Any
    how: str
    settings: Mapping[str, Any]
    reward_model: torch.nn.Module | None = None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write README.md. One that cannot be made says why: the model beside it is worth more."""
        main = CARDS / f"{'reward' if self.reward_model else 'language'}_model.md"
        beside = (file for file in sorted(CARDS.glob("beside/*.md")) if Path(folder, file.stem).exists())
        try:
            text = "".join(file.read_text(encoding="utf-8") for file in (main, *beside)).format(**self.facts())
        except Exception as error:  # a family's or a tokenizer's own, met here for the first time
            text = f"This model's card could not be made: {type(error).__name__}: {error}\n"
        Path(folder, "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")

    def facts(self) -> dict[str, Any]:
        """What the cards' texts leave open, with the number that the package finds for a text that it draws."""
        lm, tokenizer, name, of_model = self.lm, self.tokenizer, self.lm.name_or_path, self.reward_model
        temperature, draw = self.settings.get("temperature", 1.0), dict(generator=torch.Generator().manual_seed(0))
        prompts = respond(lm, tokenizer, [""], max_new_tokens=1, **draw)
        prompt = encode_prompt(tokenizer, *prompts)
        room = min(24, (context_of(lm) - len(prompt) - 1) // 3)  # a byte that is no text may be read as three
        answers = respond(lm, tokenizer, prompts, max_new_tokens=room, temperature=temperature, **draw)
        given, answer = (tokenizer, prompts, answers), encode_response(tokenizer, *prompts, *answers)
        number = score_texts(of_model, *given) if of_model else text_log_probs(lm, *given, temperature=temperature)
        return vars(self) | {
            "prompt": as_code(tokenizer, prompt), "answer": as_code(tokenizer, answer),
            "text": as_code(tokenizer, prompt + answer), "number": number.item(), "temperature": temperature,
            "settings": ", ".join(f"{name} {value}" for name, value in self.settings.items()),
            "base": f" Base model: `{Path(name).name}`." if name else "", "room": room,
            "hub_base": f"base_model: {name}\n" if name and not Path(name).is_dir() else "",
        }  # fmt: skip


def as_code(tokenizer: Any, ids: list[int]) -> str:
    """Python for these ids: what the tokenizer reads in their text or, where that is something else, themselves."""
    text = text_of(tokenizer, ids)
    same = tokenizer(text, add_special_tokens=False).input_ids == ids
    return f"tokenizer({text!r}, add_special_tokens=False).input_ids" if same else repr(ids)
