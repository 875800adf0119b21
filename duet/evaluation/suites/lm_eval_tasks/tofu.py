"""What the TOFU tasks ask lm-evaluation-harness to call."""

from typing import Any

from duet.evaluation import metrics


def answer_scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-L recall (stemmed) of the true answer, and whether the model declines to answer."""
    said = results[0].strip()
    return {
        "rouge_l_recall_stemmed": metrics.rouge_l(said, doc["answer"], measure="recall", stemmer=True),
        "refusal": metrics.refusal_rate([said]),
    }


def choices(doc: dict[str, Any]) -> list[str]:
    """The true answer first (in other words where the row has them), then the wrong ones."""
    return [doc.get("paraphrased_answer") or doc["answer"], *doc["perturbed_answer"]]
