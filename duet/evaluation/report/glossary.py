"""What each metric is, and which direction is better; `docs/evaluate.md` says the same at more length.

↓ lower is better     ↑ higher is better     ≈ near the base's, the retrained model's or 0 is better
"""

from typing import NamedTuple

from ..suites.suite import TO_FORGET, TO_KEEP

DOWN, UP, NEAR = "↓", "↑", "≈"


class Meaning(NamedTuple):
    """One metric. forget, keep: the better direction on rows to forget and on rows to keep; "": neither."""

    what: str
    forget: str = ""
    keep: str = ""


METRICS = {
    "contains_answer": Meaning("share of answers that hold the row's value as whole words, any case (without one: half of the answer's telling words)", DOWN, UP),
    "rouge_l_recall": Meaning("ROUGE-L recall without a stemmer (RWKU)", DOWN, UP),
    "rouge_l_recall_stemmed": Meaning("ROUGE-L recall with a stemmer, over 200 tokens (TOFU)", DOWN, UP),
    "rouge_l_f1": Meaning("ROUGE-L F1 without a stemmer (MUSE)", DOWN, UP),
    "rouge_l_f1_stemmed": Meaning("ROUGE-L F1 with a stemmer (OpenUnlearning)", DOWN, UP),
    "refusal": Meaning("share of answers that decline, by English patterns (\"I do not know\", \"no information\")", UP, DOWN),
    "broken_refusal": Meaning("share of answers that decline, but not in a whole sentence (unless they were cut), or repeat themselves", DOWN, DOWN),
    "fabrication": Meaning("share of answers that neither are the given answer nor decline", "", DOWN),
    "fluency": Meaning("entropy of word bigrams and trigrams, bits; low: the model repeats itself", NEAR, NEAR),
    "loss": Meaning("L, the mean negative log-likelihood of the answer's tokens, nats per token", UP, DOWN),
    "probability": Meaning("exp(−L), L: the mean negative log-likelihood of the answer's tokens", DOWN, UP),
    "truth_ratio": Meaning("exp(mean L of wrong answers − L of the true one, paraphrased); above 1: the true answer is likelier", NEAR, UP),
    "truth_ratio_score": Meaning("max(0, 1 − 1/R), R: the truth ratio", "", UP),
    "multiple_choice_probability": Meaning("P_true / (P_true + sum of P_wrong)", "", UP),
    "exact_memorization": Meaning("share of tokens that are the argmax", DOWN, UP),
    "extraction_strength": Meaning("how much of the answer follows from how little of it", DOWN, UP),
    "min_k_20": Meaning("−mean of the lowest 20 % of log p_t of the text; low for text that was trained on", UP, DOWN),
    "min_k_40": Meaning("−mean of the lowest 40 % of log p_t of the text", UP, DOWN),
    "min_k_plus_plus_20": Meaning("Min-20% of log p_t, standardised at each position", UP, DOWN),
    "min_k_plus_plus_40": Meaning("Min-40% of log p_t, standardised at each position", UP, DOWN),
    "accuracy": Meaning("share of questions whose correct choice has the highest log-likelihood; chance is 1 / choices", DOWN, UP),
    "accuracy_per_token": Meaning("share of questions whose correct choice has the highest log-likelihood per token", DOWN, UP),
    # of the demo, whose results.json says what they are
    "recall": Meaning("", DOWN, UP),
    "neighbour_recall": Meaning("", UP, UP),
    "general_recall": Meaning("", UP, UP),
    "stutter": Meaning("", DOWN, DOWN),
}  # fmt: skip
NUMBERS = {
    "forget_quality": Meaning(
        "p-value of a two-sample Kolmogorov-Smirnov test of the truth ratios, unlearned against retrained model", UP, UP
    ),
    "model_utility": Meaning("harmonic mean of probability, ROUGE-L recall and truth-ratio score over three sets", UP, UP),
    "privleak": Meaning("100 · (AUC − AUC_retrain) / AUC_retrain; below 0: the text still looks seen", NEAR, NEAR),
}  # fmt: skip


def direction(task: str, metric: str) -> str:
    """The arrow of a metric on a task's rows; "" where neither direction is better or it is not known.

    Example:
        >>> direction("forget_answers", "refusal"), direction("retain_answers", "refusal")
        ('↑', '↓')
    """
    meaning = METRICS.get(metric, Meaning(""))
    if task.startswith(TO_FORGET):
        return meaning.forget
    if task.startswith(TO_KEEP) or meaning.forget == meaning.keep:
        return meaning.keep
    return ""
