"""`duet chat`: a question a line, and what one or two models answer, side by side."""

from __future__ import annotations

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
from .generation import continuations


@dataclass
class Speaker:
    """One model, and how it is asked.

    Attributes:
        label: above its answers.
        prompting: how prompts are written.
        max_new_tokens: of an answer.
    """

    label: str
    model: nn.Module
    tokenizer: Any
    prompting: Prompting
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        self.renderer = PromptRenderer(self.tokenizer, **vars(self.prompting))
        self.renderer.num_ids = embedded_ids(self.model)

    def answer(self, question: str) -> str:
        """The greedy answer; in brackets why there is none."""
        try:
            prompt = list(self.renderer.encode((("user", question),)))
        except CannotRender as error:
            return f"({error})"
        context = context_length(self.model)
        if context is not None and len(prompt) >= context:
            return f"(the question has {len(prompt)} tokens, more than the {context} that the model can read)"
        most = self.max_new_tokens if context is None else min(self.max_new_tokens, context - len(prompt))
        stop = () if self.renderer.has_template else ("\n",)
        (said,) = continuations(self.model, self.tokenizer, [prompt], max_new_tokens=most, stop=stop)
        if not said.finite:
            return "(NaN logits)"
        return f"{said.text} ..." if said.cut(most) else said.text or "(says nothing)"


def chat(questions: Iterable[str], speakers: list[Speaker], console: Console) -> int:
    """Answers every question by itself: earlier ones are not remembered. Empty lines are left out.

    Returns:
        how many questions were asked.
    """
    asked = 0
    for question in filter(None, map(str.strip, questions)):
        table = Table(
            title=Text(question, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, expand=True
        )
        for speaker in speakers:
            table.add_column(Text(speaker.label), ratio=1, overflow="fold")
        table.add_row(*(Text(speaker.answer(question)) for speaker in speakers))
        console.print(table)
        asked += 1
    return asked
