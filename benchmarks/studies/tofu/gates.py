"""Before anything is unlearned: does the full model know, does it obey, and does the retrained one not know?

recall    mean ROUGE-L recall (stemmed) of the true answer, as in TOFU
refusal   share of answers that decline
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from duet.data.prompts import fill_prefix
from duet.demo import steering
from duet.evaluation import metrics
from duet.evaluation.attacks.rows import read_attack_rows
from duet.evaluation.attacks.target import AttackOptions, Target

from .rows import Corpus, Row, says_name, spread
from .settings import Size


class Asked:
    """A model that is asked rows of a kind, plainly or steered."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, size: Size):
        options = AttackOptions(max_new_tokens=size.max_new_tokens, batch_size=size.batch_size)
        self.target = Target(model, tokenizer, (), options=options)

    def __call__(self, rows: Sequence[Row], subjects: Sequence[str | None] | None = None) -> dict[str, float]:
        """Recall and refusal; `subjects`: whom the system message forbids, for each row."""
        read = read_attack_rows(list(rows), "rows")
        names = subjects or [None] * len(read)
        prompts = [
            self.target.prompt(
                row.conversation, instruction=name and fill_prefix(steering.STEERING_PREFIX, name)
            )
            for row, name in zip(read, names, strict=True)
        ]
        said = [answer.text if answer else "" for answer in self.target.say(prompts)]
        recalls = [
            metrics.rouge_l(text, row.answer, measure="recall", stemmer=True)
            for row, text in zip(read, said, strict=True)
        ]
        return {"recall": sum(recalls) / len(recalls), "refusal": metrics.refusal_rate(said)}


def measure(
    full: nn.Module, retrained: nn.Module, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, size: Size
) -> dict[str, Any]:
    """The numbers that `settings.GATES` judges, and some that only say more."""
    forget, retain = (spread(group, size.gate_rows) for group in (corpus.forget, corpus.report_retain))
    held = [row for row in spread(corpus.validation_forget, None) if says_name(row)][: size.gate_rows]
    general = list(corpus.general[:: max(1, len(corpus.general) // size.gate_rows)])
    ask, ask_retrained = Asked(full, tokenizer, size), Asked(retrained, tokenizer, size)
    names = [author.name for author in corpus.forget if author.name]
    forbidden = [names[i % len(names)] for i in range(len(retain))]
    # Without the name in the question only memory tells whom it is about: said apart.
    everything = spread(corpus.forget, None)
    named = [row for row in everything if says_name(row)][: size.gate_rows]
    unnamed = [row for row in everything if row.get("subject") and not says_name(row)][: size.gate_rows]

    found: dict[str, dict[str, float]] = {
        "forget": ask(forget),
        "retain": ask(retain),
        "general": ask(general),
        "teacher": ask(named, [row["subject"] for row in named]),
        "teacher_on_retain": ask(retain, forbidden),
        "retrained_forget": ask_retrained(forget),
        "retrained_retain": ask_retrained(retain),
    }
    for kind, rows in (("teacher_unnamed", unnamed), ("teacher_on_validation", held)):
        if rows:
            found[kind] = ask(rows, [row["subject"] for row in rows])
    return {
        "forget_recall": found["forget"]["recall"],
        "retain_recall": found["retain"]["recall"],
        "general_recall": found["general"]["recall"],
        "teacher_refusal": found["teacher"]["refusal"],
        "teacher_false_refusal": found["teacher_on_retain"]["refusal"],
        "teacher_retain_recall": found["teacher_on_retain"]["recall"],
        "retrained_forget_recall": found["retrained_forget"]["recall"],
        "retrained_retain_recall": found["retrained_retain"]["recall"],
        "asked": found,
    }


def trial_score(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, size: Size, refuses: bool
) -> dict[str, float]:
    """How well a validation author was forgotten: the product of what a method promises, 1 is perfect.

    (1 - recall of the forgotten) x recall of those kept x recall of general questions [x refusal of the forgotten]
    """
    ask = Asked(model, tokenizer, size)
    forget = ask(spread(corpus.validation_forget, size.trial_rows))
    retain = ask(spread(corpus.validation_retain, size.trial_rows))
    general = ask(list(corpus.general[:: max(1, len(corpus.general) // size.trial_rows)]))
    score = (1 - forget["recall"]) * retain["recall"] * general["recall"]
    return {
        "score": score * (forget["refusal"] if refuses else 1.0),
        "forget_recall": forget["recall"],
        "forget_refusal": forget["refusal"],
        "retain_recall": retain["recall"],
        "general_recall": general["recall"],
    }
