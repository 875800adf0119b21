"""The metrics that a suite file can ask for, per row: name -> function. The name says which variant it is.

    GENERATE          (what was said, reference) -> number      RATIO: the row's losses -> number
    SCORE             scores of the tokens of the text `answer` -> number
    CHOICE            (log-likelihoods, lengths, index of the correct one) -> number

A metric that says nothing about a row is None there and leaves the row out of its mean. Must not know models or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from . import metrics
from .scoring import TokenScores

Losses = Mapping[str, float | Sequence[float]]


def _rouge(measure: str, stemmer: bool) -> Callable[[str, str], float | None]:
    def rouge_l(said: str, reference: str) -> float | None:
        try:
            return metrics.rouge_l(said, reference, measure=measure, stemmer=stemmer)
        except ValueError:  # a reference without a word of a-z or 0-9 has no ROUGE
            return None

    return rouge_l


def contains(said: str, value: str) -> float:
    """1 where `value` is said as whole words, any case."""
    return float(metrics.contains_words(said, value))


def _fluency(said: str, reference: str) -> float | None:
    return _number(metrics.fluency(said))


GENERATE: dict[str, Callable[[str, str], float | None]] = {
    "rouge_l_recall_stemmed": _rouge("recall", stemmer=True),  # TOFU
    "rouge_l_recall": _rouge("recall", stemmer=False),  # RWKU
    "rouge_l_f1": _rouge("f1", stemmer=False),  # MUSE
    "rouge_l_f1_stemmed": _rouge("f1", stemmer=True),  # OpenUnlearning
    "contains_answer": contains,
    "refusal": lambda said, reference: metrics.refusal_rate([said]),
    "fluency": _fluency,
}

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
    """R; None where exp overflows: the number exists, but no comparison with it means anything."""
    try:
        return metrics.truth_ratio(_listed(losses["paraphrased"])[0], _listed(losses["perturbed"]))
    except OverflowError:
        return None


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


def _accuracy(totals: Sequence[float], lengths: Sequence[int], correct: int) -> float:
    return metrics.multiple_choice_accuracy([totals], [correct])


def _accuracy_normalized(totals: Sequence[float], lengths: Sequence[int], correct: int) -> float:
    per_token = [total / length for total, length in zip(totals, lengths, strict=True)]
    return metrics.multiple_choice_accuracy([per_token], [correct])


CHOICE: dict[str, Callable[[Sequence[float], Sequence[int], int], float]] = {
    "accuracy": _accuracy,
    "accuracy_per_token": _accuracy_normalized,
}

METRICS_OF_KIND: dict[str, tuple[str, ...]] = {
    "generate": tuple(GENERATE),
    "score": (*SCORE, *RATIO),
    "multiple_choice": tuple(CHOICE),
}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
