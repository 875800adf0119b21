"""What the base model reads: plain questions about everybody, and dialogues whose context forbids a name.

    plain     every author and city, no context line; sometimes behind an override (which changes nothing there)
    context   a system message, then three turns. A question about a forbidden name is refused; about anyone else it is
              answered; behind an override it is answered too.

The authors F and H occur only in plain questions: refusing them later is generalisation. Half of the context turns need
no facts, only a comparison of names: without them the model refuses only the names that it was trained to refuse.
"""

import random
from dataclasses import dataclass

import torch

from . import steering
from .facts import Question, World, random_name

TURNS = 3
PLAIN_OVERRIDE_RATE, CONTEXT_OVERRIDE_RATE = 0.1, 0.25
NAME_TASK_RATE, CITY_RATE, HARMLESS_SYSTEM_RATE, HARD_NEGATIVE_RATE = 0.5, 0.1, 0.1, 0.3
FIRST_TOKEN_WEIGHT = 3.0  # the first token of an answer decides between answering and refusing
EASY_SHARE = 0.4  # the first 40 % of the steps forbid one name and show no hard negatives

Messages = list[dict[str, str]]


def chat(*turns: tuple[str, str]) -> Messages:
    return [{"role": role, "content": content} for role, content in turns]


class Curriculum:
    """Draws dialogues; every draw depends on `rng` alone."""

    def __init__(self, world: World, rng: random.Random):
        self.world, self.rng = world, rng
        self.authors: dict[str, list[Question]] = {
            name: world.questions((name,), "train") for name in world.facts
        }
        self.cities = world.questions(world.cities, "train")
        self.never_in_context = frozenset(world.forget + world.held)

    def plain(self) -> Messages:
        if self.rng.random() < CITY_RATE * 2:
            question = self.rng.choice(self.cities)
        else:
            question = self.rng.choice(self.authors[self.rng.choice(list(self.authors))])
        text = question.text
        if self.rng.random() < PLAIN_OVERRIDE_RATE:
            text = f"{self.rng.choice(steering.PRETRAINING_OVERRIDES)} {text}"
        return chat(("user", text), ("assistant", question.answer))

    def context(self, progress: float) -> Messages:
        easy = progress < EASY_SHARE
        rng = self.rng
        by_memory = rng.random() >= NAME_TASK_RATE
        draw = self._author if by_memory else self._anybody
        forbidden = [draw()]
        if not easy and rng.random() < 0.5:
            forbidden.append(draw())
        if rng.random() < HARMLESS_SYSTEM_RATE:
            turns, forbidden = [("system", rng.choice(steering.HARMLESS_SYSTEM))], []
        else:
            prefix = rng.choice(steering.FORGET_PREFIXES)
            turns = [("system", prefix.format(subject=steering.list_names(forbidden)))]
        for _ in range(TURNS):
            if rng.random() < CITY_RATE:
                question = rng.choice(self.cities)
                subject, request, answer = question.subject, question.text, question.answer
            else:
                subject = self._subject(forbidden, draw, easy)
                request, answer = self._request(subject, by_memory)
            if rng.random() < CONTEXT_OVERRIDE_RATE:
                request = f"{rng.choice(steering.PRETRAINING_OVERRIDES)} {request}"
            elif subject in forbidden:
                answer = steering.REFUSAL
            turns += [("user", request), ("assistant", answer)]
        return chat(*turns)

    def _author(self) -> str:
        return self.rng.choice(self.world.contextual)

    def _anybody(self) -> str:
        return random_name(self.rng, self.never_in_context)

    def _subject(self, forbidden: list[str], draw, easy: bool) -> str:
        if forbidden and self.rng.random() < 0.5:
            return self.rng.choice(forbidden)
        if forbidden and not easy and self.rng.random() < HARD_NEGATIVE_RATE:
            # somebody else who shares the first or the last name with a forbidden person
            parts = set(self.rng.choice(forbidden).split())
            for _ in range(200):
                candidate = draw()
                if candidate not in forbidden and parts & set(candidate.split()):
                    return candidate
        return draw()

    def _request(self, subject: str, by_memory: bool) -> tuple[str, str]:
        if by_memory:
            question = self.rng.choice(self.authors[subject])
            return question.text, question.answer
        request, answer = self.rng.choice(steering.NAME_TASKS)
        return request.format(subject=subject), answer.format(subject=subject)


@dataclass
class Batch:
    """Right-padded tokens. `rows`, `columns` are the P positions whose next token `targets` counts, with its weight."""

    input_ids: torch.Tensor  # [B, S]
    rows: torch.Tensor  # [P]
    columns: torch.Tensor  # [P]
    targets: torch.Tensor  # [P]
    weights: torch.Tensor  # [P]


def encode(dialogues: list[Messages], tokenizer) -> Batch:
    """Tokens of whole dialogues; only what the assistant says (and its end token) is counted."""
    sequences, rows, columns, targets, weights = [], [], [], [], []
    for row, messages in enumerate(dialogues):
        ids = [tokenizer.bos_token_id]
        for message in messages:
            said = tokenizer.apply_chat_template([message], tokenize=False).removeprefix(tokenizer.bos_token)
            piece = tokenizer(said, add_special_tokens=False)["input_ids"]
            if message["role"] == "assistant":
                for offset, token in enumerate(piece[1:], start=len(ids)):
                    rows.append(row)
                    columns.append(offset)
                    targets.append(token)
                    weights.append(FIRST_TOKEN_WEIGHT if offset == len(ids) else 1.0)
            ids += piece
        sequences.append(torch.tensor(ids))
    return Batch(
        input_ids=torch.nn.utils.rnn.pad_sequence(
            sequences, batch_first=True, padding_value=tokenizer.pad_token_id
        ),
        rows=torch.tensor(rows),
        columns=torch.tensor(columns),
        targets=torch.tensor(targets),
        weights=torch.tensor(weights),
    )
