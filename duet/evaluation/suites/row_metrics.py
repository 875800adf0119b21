"""The metrics that a suite file can ask for, per row: name -> function. The name says which variant it is.

    GENERATE          (what was said, answer, its value or None, question) -> number      RATIO: the row's losses -> number
    SCORE             scores of the tokens of the text `answer` -> number
    CHOICE            (log-likelihoods, lengths, index of the correct one) -> number

A metric that is undefined for a row is None, and its mean leaves the row out.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .. import metrics
from ..scoring import TokenScores

Losses = Mapping[str, float | Sequence[float]]
Said = Callable[..., float | None]


def _rouge(measure: str, stemmer: bool) -> Said:
    def rouge_l(said: str, answer: str, *_: str | None) -> float | None:
        try:
            return metrics.rouge_l(said, answer, measure=measure, stemmer=stemmer)
        except ValueError:  # a reference without a word has no ROUGE
            return None

    return rouge_l


GENERATE: dict[str, Said] = {
    "rouge_l_recall_stemmed": _rouge("recall", stemmer=True),  # TOFU
    "rouge_l_recall": _rouge("recall", stemmer=False),  # RWKU
    "rouge_l_f1": _rouge("f1", stemmer=False),  # MUSE
    "rouge_l_f1_stemmed": _rouge("f1", stemmer=True),  # OpenUnlearning
    "contains_answer": lambda *row: float(metrics.answer_recall(*row) >= metrics.TOLD),
    "refusal": lambda said, *_: metrics.refusal_rate([said]),
    "broken_refusal": lambda said, *_: metrics.broken_refusal_rate([said]),
    "fabrication": lambda said, answer, value, question="": metrics.fabrication_rate(
        [said], [answer], [value], questions=[question]
    ),
    "fluency": lambda said, *_: _number(metrics.fluency(said)),
}

JUDGED = ("contains_answer", "fabrication", "broken_refusal")  # None where they are `unknown`


def unknown(metric: str, number: float | None, said: str, kept: bool) -> bool:
    """Whether nobody knows this of an answer that was cut, or is empty.

    That it does not tell, or tells something else: more might have come. Where the row is to be kept (`kept`) this is damage, and known.
    That its refusal is broken: the sentence might have ended. Not so where it repeats itself.
    """
    if metric == "broken_refusal":
        return number == 1.0 and metrics.broken_refusal_rate([f"{said}."]) == 0.0
    return not kept and (metric, number) in (("contains_answer", 0.0), ("fabrication", 1.0))


SCORE: dict[str, Callable[[TokenScores], float | None]] = {
    "loss": lambda s: s.loss,
    "probability": lambda s: metrics.probability(s.loss),
    "exact_memorization": lambda s: metrics.exact_memorization(s.hits),
    "extraction_strength": lambda s: metrics.extraction_strength(s.hits),
    "min_k_20": lambda s: metrics.min_k(s.logprobs, 20),
    "min_k_40": lambda s: metrics.min_k(s.logprobs, 40),
    "min_k_plus_plus_20": lambda s: _number(
        metrics.min_k_plus_plus(s.logprobs, s.entropies, s.variances, 20)
    ),
    "min_k_plus_plus_40": lambda s: _number(
        metrics.min_k_plus_plus(s.logprobs, s.entropies, s.variances, 40)
    ),
}


def _listed(value: float | Sequence[float]) -> list[float]:
    return [float(value)] if isinstance(value, (int, float)) else [float(v) for v in value]


def _ratio(losses: Losses) -> float | None:
    """R; None where it is too large for a float: JSON has no infinity, and no comparison with it means anything."""
    return _number(metrics.truth_ratio(_listed(losses["paraphrased"])[0], _listed(losses["perturbed"])))


def _ratio_score(losses: Losses) -> float:
    """max(0, 1 - 1 / R), from the logarithm of R: no overflow."""
    log_ratio = float(np.mean(_listed(losses["perturbed"]))) - _listed(losses["paraphrased"])[0]
    return max(0.0, -math.expm1(-log_ratio)) if log_ratio > 0 else 0.0


# name -> (the texts it needs, function of their losses)
RATIO: dict[str, tuple[tuple[str, ...], Callable[[Losses], float | None]]] = {
    "truth_ratio": (("paraphrased", "perturbed"), _ratio),
    "truth_ratio_score": (("paraphrased", "perturbed"), _ratio_score),
    "multiple_choice_probability": (
        ("answer", "perturbed"),
        lambda x: metrics.multiple_choice_probability(_listed(x["answer"])[0], _listed(x["perturbed"])),
    ),
}


CHOICE: dict[str, Callable[[Sequence[float], Sequence[int], int], float]] = {
    "accuracy": lambda totals, lengths, correct: metrics.multiple_choice_accuracy([totals], [correct]),
    "accuracy_per_token": lambda totals, lengths, correct: metrics.multiple_choice_accuracy(
        [np.divide(totals, lengths)], [correct]
    ),
}

# Not between 0 and 1: that all their values are 0, or 1, is a coincidence, and no share of rows.
UNBOUNDED = frozenset(
    {"loss", "fluency", "truth_ratio", *(name for name in SCORE if name.startswith("min_k"))}
)
SIGNED = frozenset(name for name in SCORE if name.startswith("min_k_plus_plus"))  # all others are at least 0

METRICS_OF_KIND: dict[str, tuple[str, ...]] = {
    "generate": tuple(GENERATE),
    "score": (*SCORE, *RATIO),
    "multiple_choice": tuple(CHOICE),
}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
