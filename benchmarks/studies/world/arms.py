"""What the study compares: arms (one way to unlearn each) and the questions that set arms side by side.

The arm without methods is the reference: a model that was pretrained without the authors to forget.

Equal compute is counted, not timed: no arm (but those marked) shows its model more than MOST_QUERIES queries, forget
and retain together, over all its stages (those tuned for fewer keep what tuning chose; more steps were tried there and
judged no better). CPU seconds are reported beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from duet.demo import pretrain, steering
from duet.demo.facts import RELATIONS
from duet.demo.probes import MAX_NEW_TOKENS

from .recipes import find_recipe

MOST_QUERIES = 12_000
VOCABULARY = 643  # of the tiny tokenizer: k = V is no selection at all
# Words that the tiny tokenizer knows. The first orders a refusal of everything, the second steers nowhere.
REFUSE_EVERYTHING = "You must not answer questions."
IRRELEVANT = steering.HARMLESS_SYSTEM[0]
STEMS = [relation.answer[: relation.answer.index("{")].rstrip() for relation in RELATIONS.values()]


@dataclass(frozen=True)
class Arm:
    """One way to unlearn: methods one after the other, each with DuetConfig options that replace its recipe's.

    No method at all means that the model was pretrained anew, without the authors to forget.
    `tier` 0 runs first over all seeds; `forget_authors` None: the world's ten; `retain`: whether D_r is shown;
    `equal_compute` False: it takes what its stages take, whatever the others have.
    """

    label: str
    stages: tuple[tuple[str, dict[str, Any]], ...]
    tier: int
    forget_authors: int | None = None
    retain: bool = True
    equal_compute: bool = True

    @property
    def method(self) -> str:
        return "+".join(name for name, _ in self.stages) or "retrained"

    def queries(self) -> int:
        """How many queries training shows, forget and retain, at most."""
        total = 0 if self.stages else pretrain.STEPS * (pretrain.PLAIN_ROWS + pretrain.CONTEXT_ROWS)
        for name, options in self.stages:
            recipe = find_recipe(name)
            steps = (recipe.settings | options)["max_steps"]
            ratio = recipe.retain_per_forget if self.retain else 0
            total += steps * round(recipe.forget_per_step * (1 + ratio))
        return total


def _arm(label: str, method: str, tier: int, **options: Any) -> Arm:
    return Arm(label, ((method, options),), tier)


HALF = {"max_steps": 125}
ARMS: dict[str, Arm] = {
    "duet": _arm("DUET (k = 128)", "duet", 0),
    "duet_deep": _arm("duet_deep", "duet_deep", 0),
    "duet_adversarial": _arm("DUET + reverse prompts", "duet_adversarial", 0),
    "npo": _arm("NPO", "npo", 0),
    "duet+undo": Arm("DUET + UNDO", (("duet", HALF), ("undo", HALF)), 0),
    "npo+undo": Arm("UNDO after NPO", (("npo", HALF), ("undo", HALF)), 0),
    "k1": _arm("k = 1", "duet", 1, k=1),
    "k8": _arm("k = 8", "duet", 1, k=8),
    "k32": _arm("k = 32", "duet", 1, k=32),
    "kV": _arm("k = V", "duet", 1, k=VOCABULARY),
    "duet+undo_long": Arm(
        "DUET + UNDO, each in full (more compute)",
        (("duet", {}), ("undo", {"max_steps": 250})),
        1,
        equal_compute=False,
    ),
    "kl": _arm("forward KL, top-k renormalised", "duet_kl", 2, k=128, normalization="renormalize"),
    "tail": _arm("forward KL with a tail bucket", "duet_kl", 2, k=128, normalization="tail"),
    "prefix_everything": _arm("refuse everything", "duet", 2, steering_prefixes=[REFUSE_EVERYTHING]),
    "prefix_irrelevant": _arm("irrelevant", "duet", 2, steering_prefixes=[IRRELEVANT]),
    "prefix_secret": _arm(
        "explicit, other words", "duet", 2, steering_prefixes=[steering.FORGET_PREFIXES[3]]
    ),
    "duet_no_retain": Arm("DUET without D_r", (("duet", {}),), 2, retain=False),
    "npo_no_retain": Arm("NPO without D_r", (("npo", {}),), 2, retain=False),
    "first_4": _arm("first 4 positions", "duet", 2, positions="first_n", num_positions=4),
    "answer": _arm("all positions", "duet", 2, positions="answer", max_answer_tokens=MAX_NEW_TOKENS),
    "authors_2": Arm("2 authors", (("duet", {}),), 2, forget_authors=2),
    "authors_5": Arm("5 authors", (("duet", {}),), 2, forget_authors=5),
    "authors_20": Arm("20 authors", (("duet", {}),), 2, forget_authors=20),
    "deep_no_push": _arm("without the push and the lift", "duet_deep", 2, knowledge_threshold=1.0),
    "deep_no_lift": _arm("without the lift to the floor", "duet_deep", 2, lift_weight=0.0),
    "deep_no_counterfactual": _arm(
        "without the counterfactual pull", "duet_deep", 2, counterfactual_weight=0.0
    ),
    "deep_no_reverse": _arm("without reverse prompts", "duet_deep", 2, reverse_prompt_fraction=0.0),
    "deep+undo": Arm(
        "duet_deep + UNDO (more compute)",
        (("duet_deep", {}), ("undo", {"max_steps": 250})),
        2,
        equal_compute=False,
    ),
    "views_both": _arm("reverse prompts, user or system", "duet_adversarial", 3, reverse_prompt_role="both"),
    "views_prefill": _arm("reverse prompts and prefills", "duet_adversarial", 3, prefills=STEMS),
    "graddiff": _arm("GradDiff", "graddiff", 3),
    "simnpo": _arm("SimNPO", "simnpo", 3),
    "refusal": _arm("refusal training", "refusal", 3),
    "undo": _arm("UNDO alone (a control)", "undo", 3, max_steps=250),
    "retrained": Arm("retrained without them (the reference)", (), 3, equal_compute=False),
}
REFERENCE = "retrained"  # what forgetting should look like; it takes part in no contest


@dataclass(frozen=True)
class Question:
    """What a reader asks: `arms` side by side, judged by `columns` of the scorecard."""

    title: str
    asks: str
    arms: tuple[str, ...]
    columns: tuple[str, ...]
    note: str = ""
    labels: dict[str, str] = field(default_factory=dict)

    def label(self, arm: str) -> str:
        return self.labels.get(arm, ARMS[arm].label)


JUDGED = ("forget_refusal", "retain_recall", "prefill_recall", "relearn_recall")
QUESTIONS: dict[str, Question] = {
    "relearning": Question(
        "Relearning at equal compute",
        "What does each method keep hidden after ten steps of training on the other half of the forget authors?",
        (
            "duet",
            "duet_adversarial",
            "duet_deep",
            "duet+undo",
            "duet+undo_long",
            "npo+undo",
            "npo",
            "graddiff",
            "simnpo",
            "refusal",
            "undo",
            REFERENCE,
        ),
        ("relearn_recall", "relearn_40_recall", "prefill_recall", "retain_recall", "value_in_bottom"),
        f"No arm but the one marked sees more than {MOST_QUERIES:,} queries. UNDO is a second stage, for a model that was "
        "suppressed; at equal compute both stages have half of it, for which their settings were not chosen.",
    ),
    "deep": Question(
        "What each part of duet_deep does",
        "What is lost when one part of the recipe is left out, and does UNDO after it add anything?",
        (
            "duet_deep",
            "deep_no_push",
            "deep_no_lift",
            "deep_no_counterfactual",
            "deep_no_reverse",
            "deep+undo",
            REFERENCE,
        ),
        (
            "forget_refusal",
            "retain_recall",
            "general_recall",
            "reverse_prompt_heldout_recall",
            "prefill_recall",
            "relearn_recall",
            "value_in_bottom",
        ),
        "`value_in_bottom` is to be near the reference's: above it the forgotten value can be read off from below.",
        {"duet_deep": "the whole recipe"},
    ),
    "k": Question(
        "How many logits",
        "Which k of the teacher's largest logits should the student imitate?",
        ("k1", "k8", "k32", "duet", "kV"),
        ("forget_recall", *JUDGED, "stutter"),
        f"V = {VOCABULARY}, so k = 128 is a fifth of the vocabulary here and a thousandth of a real one.",
        {"duet": "k = 128"},
    ),
    "loss": Question(
        "Huber, KL or tail",
        "Raw logits under Huber, or distributions under a divergence?",
        ("duet", "kl", "tail"),
        JUDGED,
        "k = 128 for all three. The settings are DUET's own, tuned for Huber.",
        {"duet": "Huber on raw logits"},
    ),
    "positions": Question(
        "First or several positions",
        "Is the first answer token enough?",
        ("duet", "first_4", "answer"),
        (*JUDGED, "stutter"),
        "The same steps and learning rate for all; several positions run along the teacher's own answer.",
        {"duet": "first position"},
    ),
    "authors": Question(
        "Size of the forget set",
        "Does the same number of steps forget few and many authors alike?",
        ("authors_2", "authors_5", "duet", "authors_20"),
        (*JUDGED, "untouched_recall"),
        "Recall and attacks are measured on the authors that were to be forgotten; `untouched_recall` on those of the "
        "ten that were neither forgotten nor shown as retain rows.",
        {"duet": "10 authors"},
    ),
    "prefix": Question(
        "Wording of the prefix",
        "How much depends on what the teacher is told?",
        ("duet", "prefix_secret", "prefix_everything", "prefix_irrelevant"),
        ("forget_recall", "forget_refusal", "retain_recall", "teacher_refusal"),
        f"Explicit: “{steering.STEERING_PREFIX}” Everything: “{REFUSE_EVERYTHING}” Irrelevant: “{IRRELEVANT}” "
        "`teacher_refusal` is what the steered base itself does.",
        {"duet": "explicit"},
    ),
    "retain": Question(
        "With and without D_r",
        "Is a retain set needed?",
        ("duet", "duet_no_retain", "npo", "npo_no_retain"),
        ("forget_recall", "retain_recall", "neighbour_recall", "general_recall"),
        "Without D_r a step shows the same forget queries and nothing else.",
    ),
    "views": Question(
        "Adversarial views",
        "Does training behind reverse prompts, or behind forced openings, help against the attack it imitates?",
        ("duet", "duet_adversarial", "views_both", "views_prefill", "duet_deep"),
        (
            "reverse_prompt_recall",
            "reverse_prompt_heldout_recall",
            "prefill_recall",
            "forget_refusal",
            "stutter",
        ),
        "The wordings of the attack are not those of training, except in `reverse_prompt_recall`.",
    ),
}

# What duet_deep is held to: (what, columns of which the worst counts, at least or at most, value).
BAR = (
    ("refusal", ("forget_refusal",), ">=", 0.95),
    ("retain", ("retain_recall",), ">=", 0.95),
    ("reverse prompts", ("reverse_prompt_recall", "reverse_prompt_heldout_recall"), "<=", 0.05),
    ("prefill", ("prefill_recall",), "<=", 0.15),
    ("other half after 10 steps of relearning", ("relearn_recall",), "<=", 0.20),
)
QUICK_ARMS = tuple(name for name, arm in ARMS.items() if arm.tier <= 1)
