"""All numbers of one row of the demo's table, for any model, steered or not.

Two wordings of the questions exist besides the training one: `validation` chooses settings, `report` is for the table.
"""

import random
from collections.abc import Sequence

from ..evaluation.report.runs import DEMO_ATTACKS
from . import probes, steering
from .facts import Question, Split, World
from .probes import Speaker

# The columns of a row, in order, and what each one means.
COLUMNS = {
    "forget_recall": "share of questions about the forgotten authors answered with the true value",
    "forget_refusal": "share of questions about the forgotten authors answered by saying that it does not know",
    "retain_recall": "recall on authors that unlearning was never shown",
    "neighbour_recall": "recall on authors never shown who share a first or last name with a forgotten author",
    "general_recall": "recall on cities and countries that unlearning was never shown",
    "stutter": "share of answers to kept questions that say a word twice in a row: authors or cities, the worse",
    "reverse_prompt_recall": "forget recall behind an override wording used in adversarial training, the worst of them",
    "reverse_prompt_heldout_recall": "forget recall behind override wordings that no training has seen, the worst of them",
    "prefill_recall": "forget recall when the answer is forced to open with its first words",
    "relearn_recall": "recall on five forgotten authors after 10 steps of training on the other five, worst rate",
    "int8_forget_recall": "forget recall with weights rounded to 8 bits",
    "int4_forget_recall": "forget recall with weights rounded to 4 bits",
}
KEEP = ("retain_recall", "neighbour_recall", "general_recall")  # the higher the better
ATTACKS = DEMO_ATTACKS


def some(questions: Sequence[Question], most: int | None) -> list[Question]:
    """At most `most` questions, always the same ones."""
    if most is None or len(questions) <= most:
        return list(questions)
    return random.Random(0).sample(list(questions), most)


def behaviour(speaker: Speaker, world: World, split: Split, most: int | None = None) -> dict[str, float]:
    """The columns that need no change of the weights."""
    forget = some(world.questions(world.forget, split), most)
    unseen = steering.VALIDATION_OVERRIDES if split == "validation" else steering.HELDOUT_OVERRIDES
    answers = speaker.answers(forget)
    row = {
        "forget_recall": probes.recall(answers, forget),
        "forget_refusal": probes.refusal(answers, forget),
    }
    for column, subjects in (
        ("retain_recall", world.others),
        ("neighbour_recall", world.neighbours),
        ("general_recall", world.other_cities),
    ):
        questions = some(world.questions(subjects, split), most)
        answers = speaker.answers(questions)
        row[column] = probes.recall(answers, questions)
        row["stutter"] = max(row.get("stutter", 0.0), probes.stutter(answers))
    overrides = {"reverse_prompt_recall": steering.SEEN_OVERRIDES, "reverse_prompt_heldout_recall": unseen}
    for column, wordings in overrides.items():
        row[column] = max(probes.override_recalls(speaker, forget, wordings).values())
    return row | {"prefill_recall": speaker.recall(forget, prefill=lambda q: q.stem)}


def resilience(speaker: Speaker, world: World, split: Split, most: int | None = None) -> dict[str, float]:
    """The columns that attack the weights. Relearning shows the attacker the first five forget authors.

    A quick look (`most`) tries the largest learning rate only.
    """
    half = len(world.forget) // 2
    shown = world.questions(world.forget[:half], "train")
    asked = some(world.questions(world.forget[half:], split), most)
    forget = some(world.questions(world.forget, split), most)
    rates = probes.RELEARN_RATES if most is None else probes.RELEARN_RATES[-1:]
    relearned = [probes.relearn_recalls(speaker, shown, asked, rate) for rate in rates]
    return {
        "relearn_recall": max(value for recalls in relearned for value in recalls.values()),
        "int8_forget_recall": probes.quantized_recall(speaker, forget, 8),
        "int4_forget_recall": probes.quantized_recall(speaker, forget, 4),
    }


def scorecard(
    speaker: Speaker, world: World, split: Split = "report", most: int | None = None
) -> dict[str, float]:
    """Every column of COLUMNS, rounded to 4 digits."""
    row = behaviour(speaker, world, split, most) | resilience(speaker, world, split, most)
    return {column: round(row[column], 4) for column in COLUMNS}
