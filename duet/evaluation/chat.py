"""`duet chat`: a question a line, and what one or two models answer, side by side."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from ..data.prompts import CannotRender, Prompting, PromptRenderer
from ..model.lm import context_length, embedded_ids
from .generation import answers_to


@dataclass
class Speaker:
    """One model, and how it is asked.

    Attributes:
        label: above its answers.
        max_new_tokens: of an answer.
    """

    label: str
    model: nn.Module
    tokenizer: Any
    prompting: Prompting
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        ids = embedded_ids(self.model)
        self.renderer = PromptRenderer(self.tokenizer, **vars(self.prompting), num_ids=ids)

    def answer(self, question: str) -> str:
        """The greedy answer; in brackets why there is none."""
        try:
            prompt = self.renderer.encode((("user", question),))
        except CannotRender as error:
            return f"({error})"
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "batch_size": 1, "room": 1}
        stop = () if self.renderer.has_template else ("\n",)
        (said,) = answers_to(self.model, self.tokenizer, [prompt], stop=stop, **how)
        if said is None:
            context = context_length(self.model)
            return f"(the question has {len(prompt)} tokens, more than the {context} that the model can read)"
        if not said.finite:
            return "(NaN logits)"
        return f"{said.text} ..." if said.cut else said.text or "(says nothing)"


def visible(text: str) -> str:
    r"""The text with its control characters written out, which a terminal would obey; tabs and the ends of lines stay.

    Example:
        >>> visible("a\x1b[2J\tb\x9b\r\n")
        'a\\x1b[2J\tb\\x9b\\r\n'
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def chat(questions: Iterable[str], speakers: list[Speaker], console: Console) -> int:
    """Answers every question by itself: earlier ones are not remembered. Empty lines are left out.

    Returns:
        how many questions were asked.
    """
    asked = 0
    for question in filter(None, map(str.strip, questions)):
        table = Table(
            title=Text(visible(question), style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            expand=True,
        )
        for speaker in speakers:
            table.add_column(Text(visible(speaker.label)), ratio=1, overflow="fold")
        table.add_row(*(Text(visible(speaker.answer(question))) for speaker in speakers))
        console.print(table)
        asked += 1
    return asked
