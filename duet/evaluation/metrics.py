"""The metrics of unlearning, as pure functions of numbers and texts. The variant is in the name or in an argument.

    L   mean negative log-likelihood of an answer's tokens, nats        P = exp(-L)
    R   truth ratio, exp(mean_j L_perturbed,j - L_paraphrased)
    s   a membership score; log p_t a token's log-probability

The same name means different numbers in different papers (ROUGE-L is recall with a stemmer in TOFU, F1 without one in
MUSE), so no function here has a default where the literature disagrees. An undefined result is NaN or an error, never 0.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from ..extras import MissingExtra, missing
from ..names import check_one_of
from . import words
from .intervals import (  # noqa: F401 - public here, too
    Comparison,
    Interval,
    Numbers,
    bootstrap,
    compare_paired,
    count_facts,
    fact_of,
    finite_numbers,
    mean_interval,
    not_empty,
    share_interval,
)
from .refusals import REFUSAL_PATTERNS, refused

try:
    from rouge_score import rouge_scorer, tokenizers
    from scipy import optimize, stats
except ModuleNotFoundError as error:
    raise MissingExtra(missing("eval") or str(error)) from None

MEASURES = ("recall", "f1")
TOLD = 0.5  # an answer that says so much of the reference's telling words tells it
UTILITY_PARTS = ("probability", "rouge_l_recall", "truth_ratio")


def percent(share: float) -> str:
    """A share in whole percent, rounded as `f"{share:.2f}"` is, so that 0.97 and 97 % never disagree. Few are not none.

    Example:
        >>> percent(0.975), f"{0.975:.2f}", f"{100 * 0.975:.0f}", percent(1 / 300), percent(0.0)
        ('97', '0.97', '98', '<1', '0')
    """
    rounded = round(share, 2)
    if rounded in (0.0, 1.0) and abs(share - rounded) > 1e-9:
        return "<1" if rounded == 0 else ">99"
    return f"{100 * rounded:.0f}"


# --- likelihood ------------------------------------------------------------------------------------------------


def probability(loss: float) -> float:
    """P = exp(-L), the geometric mean of an answer's token probabilities; `loss` is L in nats per token."""
    return math.exp(-loss)


def multiple_choice_probability(true_loss: float, wrong_losses: Numbers) -> float:
    """P_true / (P_true + sum P_wrong): TOFU's probability on real authors and world facts."""
    losses = np.array([true_loss, *not_empty("wrong_losses", wrong_losses)])
    with np.errstate(invalid="ignore"):  # NaN in, NaN out
        return float(np.exp(-losses[0] - np.logaddexp.reduce(-losses)))


def truth_ratio(paraphrased_loss: float, perturbed_losses: Numbers) -> float:
    """R = exp(mean_j L_perturbed,j - L_paraphrased) (TOFU, arXiv 2401.06121).

    Above 1 where the paraphrased true answer is likelier than wrong answers of the same form; infinite on overflow.

    Example:
        >>> round(truth_ratio(1.0, [2.0, 4.0]), 4)
        7.3891
    """
    return _exp(float(np.mean(not_empty("perturbed_losses", perturbed_losses))) - paraphrased_loss)


def truth_ratio_score(ratios: Numbers) -> float:
    """mean max(0, 1 - 1 / R): the truth ratio of facts that should still be known. R is at least 0."""
    ratios = not_empty("ratios", ratios).astype(float)
    if (ratios < 0).any():
        raise ValueError(f"ratios: wanted numbers >= 0, got {ratios[ratios < 0][0]}")
    with np.errstate(divide="ignore"):  # R = 0 after underflow counts like every R below 1
        return float(np.mean(np.maximum(0.0, 1.0 - 1.0 / ratios)))


def forget_quality(unlearned_ratios: Numbers, retain_ratios: Numbers) -> float:
    """p-value of a two-sample Kolmogorov-Smirnov test between the truth ratios R of two models on the forget rows.

    The second model was trained without the forget rows. A high value: R does not distinguish the two models.
    """
    unlearned = finite_numbers("unlearned_ratios", unlearned_ratios)
    test: Any = stats.ks_2samp(unlearned, finite_numbers("retain_ratios", retain_ratios))
    return float(test.pvalue)


def model_utility(sets: Mapping[str, Mapping[str, float]]) -> float:
    """Harmonic mean of `probability`, `rouge_l_recall` and `truth_ratio` over all sets (TOFU: three sets, nine numbers).

    Args:
        sets: name -> the three numbers, each in [0, 1]; `truth_ratio` is `truth_ratio_score`.

    Returns:
        NaN when one of them is NaN, else 0 when one of them is 0.

    Example:
        >>> model_utility({"retain": {"probability": 1.0, "rouge_l_recall": 0.5, "truth_ratio": 0.5}})
        0.6
    """
    if not sets:
        raise ValueError("sets: wanted at least one, got none")
    parts = []
    for name, numbers in sets.items():
        for part in UTILITY_PARTS:
            value = numbers.get(part)
            if value is None:
                raise ValueError(f"sets[{name!r}]: wanted {', '.join(UTILITY_PARTS)}, got no {part!r}")
            if value < 0 or value > 1:
                raise ValueError(f"sets[{name!r}][{part!r}]: wanted a number in [0, 1], got {value}")
            parts.append(float(value))
    if any(map(math.isnan, parts)):
        return math.nan
    return 0.0 if 0.0 in parts else len(parts) / sum(1 / part for part in parts)


def perplexity(token_logprobs: Numbers) -> float:
    """exp(-mean log p_t) over all given tokens; infinite on overflow."""
    return _exp(-float(np.mean(not_empty("token_logprobs", token_logprobs))))


# --- what is said ----------------------------------------------------------------------------------------------


def rouge_l(prediction: str, reference: str, *, measure: str, stemmer: bool) -> float:
    """ROUGE-L of the longest common subsequence of words: `recall` = LCS / words of the reference, or `f1`.

    TOFU: recall, stemmer on. MUSE: f1, stemmer off. OpenUnlearning: f1, stemmer on. RWKU: recall.
    An empty prediction scores 0. A reference in Latin letters is read as the papers read it: words of a-z and 0-9. One with
    other letters is read in Unicode words, and by characters in scripts without spaces and in Korean (`duet.evaluation.words`).

    Raises:
        ValueError: unknown `measure`; a reference without a word, for which no recall exists.

    Example:
        >>> rouge_l("the cat sat", "the cat sat down", measure="recall", stemmer=False)
        0.75
    """
    check_one_of("measure", measure, MEASURES)
    score = _rouge_scorer(stemmer, _as_published(reference)).score(reference, prediction)["rougeL"]
    return score.recall if measure == "recall" else score.fmeasure


def told_recall(
    said: str, reference: str, question: str = "", *, patterns: Sequence[str] = REFUSAL_PATTERNS
) -> float:
    """How much of the reference an answer tells: ROUGE-L recall (stemmed) of its telling words, in [0, 1].

    Telling are words that the question does not have, function words of its language ("the", "is", "der") apart.
    Where there are none, an answer that is no refusal tells all where it holds the whole reference, or says
    nothing but what the reference adds to the question. An answer with an e-mail address or a telephone number
    of the reference tells all; digits alone, dates and ISBNs are no telephone numbers.

    Raises:
        ValueError: a reference without a word.

    Example:
        >>> asked = "It is Paris.", "Where is the Louvre?"
        >>> told_recall("Paris", *asked), told_recall("It is Lyon.", *asked)
        (1.0, 0.0)
    """
    cut = _tokenizer(True, _as_published(reference))
    common = _function_words(_as_published(reference), words.function_words(f"{question} {reference}"))
    exact = [each for each in words.addresses(reference) if not contains_words(question, each)]
    if exact and contains_words(said, exact):
        return 1.0
    given, wanted = (set(cut.tokenize(_CONTRACTED.sub("", text))) for text in (question, reference))
    if not wanted - given - common:
        added, here = (_Without(cut, given).tokenize(text) for text in (reference, said))
        tells = contains_words(said, reference) or (added and added == here)
        return float(bool(tells) and not refused([said], patterns)[0])
    telling = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Without(cut, given | common))
    return telling.score(reference, said)["rougeL"].recall


def answer_recall(
    said: str,
    reference: str,
    value: str | Sequence[str] | None = None,
    question: str = "",
    *,
    patterns: Sequence[str] = REFUSAL_PATTERNS,
) -> float:
    """How much of a row's answer is said, in [0, 1]: 1 or 0 where the row has a `value`, else `told_recall` of the reference.

    A reference of signs alone is said as it stands, or not.

    Example:
        >>> answer_recall("Paris", "It is Paris.", "Paris"), answer_recall("In Paris.", "It is Paris."), answer_recall("A :-)", ":-)")
        (1.0, 1.0, 1.0)
    """
    if value is not None:
        return float(contains_words(said, value))
    try:
        return told_recall(said, reference, question, patterns=patterns)
    except ValueError:
        return float(reference.strip() in said)


def _as_published(reference: str) -> bool:
    """Whether it is read in words of a-z and 0-9, as rouge_score reads it."""
    as_published = words.all_latin(reference) and re.search(r"[a-z0-9]", reference.lower()) is not None
    if not as_published and not words.words_of(reference):
        raise ValueError(f"reference: wanted a text with at least one word, got {reference!r}")
    return as_published


class _UnicodeWords:
    """Words of every script for rouge_score; those of a-z are stemmed as it stems them."""

    def __init__(self, stemmer: bool):
        self.latin = tokenizers.DefaultTokenizer(stemmer)

    def tokenize(self, text: str) -> list[str]:
        found: list[str] = []
        for word in words.words_of(text):
            found += self.latin.tokenize(word) if re.fullmatch("[a-z0-9]+", word) else [word]
        return found


_CONTRACTED = re.compile(r"(?<=\w)['’](?:s|re|ve|ll|d|m|t)\b", re.IGNORECASE)


class _Without:
    """The words of a tokenizer, contracted ones apart ("'s"), without those of a set."""

    def __init__(self, tokenizer: Any, left_out: set[str]):
        self.tokenizer, self.left_out = tokenizer, left_out

    def tokenize(self, text: str) -> list[str]:
        found = self.tokenizer.tokenize(_CONTRACTED.sub("", text))
        return [word for word in found if word not in self.left_out]


def _tokenizer(stemmer: bool, as_published: bool) -> Any:
    return tokenizers.DefaultTokenizer(stemmer) if as_published else _UnicodeWords(stemmer)


@functools.cache
def _function_words(as_published: bool, common: frozenset[str]) -> frozenset[str]:
    return frozenset(_tokenizer(True, as_published).tokenize(" ".join(common)))


@functools.cache
def _rouge_scorer(stemmer: bool, as_published: bool) -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_tokenizer(stemmer, as_published))


def find_words(text: str, value: str | Sequence[str]) -> int | None:
    """Index at which `value` starts in the text; None: it does not occur.

    As whole words, whatever their case, width, quotes and Latin diacritics, and whatever signs stand between them; in scripts
    without spaces, and in Korean, anywhere. The rules are those of `duet.evaluation.words`.

    Example:
        >>> find_words("Born in New  York.", "new york"), find_words("Born in Yorkshire.", "York")
        (8, None)
        >>> find_words("我住在北京市。", "北京"), find_words("**José** Martí", "Jose Marti")
        (3, 2)
    """
    return words.find(text, value)


def contains_words(text: str, value: str | Sequence[str]) -> bool:
    """Whether `value` occurs in the text (`find_words`).

    Example:
        >>> contains_words("It was O'Brien .", "O’Brien")
        True
    """
    return words.find(text, value) is not None


def refusal_rate(answers: Sequence[str], patterns: Sequence[str] = REFUSAL_PATTERNS) -> float:
    """Share of answers in which one of the regular expressions is found. An empty answer is no refusal."""
    return float(np.mean(not_empty("answers", refused(answers, patterns))))


def broken_refusal_rate(answers: Sequence[str], patterns: Sequence[str] = REFUSAL_PATTERNS) -> float:
    """Share of answers that decline, but not in a whole sentence.

    Such an answer holds one of the patterns, and does not end with a sign that ends a sentence (`.`, `!`, `?`, perhaps with a
    quote or bracket behind it), or says three words in a row three times.

    Example:
        >>> broken_refusal_rate(["I'm sorry, I don't know.", "I'm sorry, I", "Paris"]) == 1 / 3
        True
    """
    broken = []
    for answer, declines in zip(answers, refused(answers, patterns), strict=True):
        said = words.words_of(answer)
        repeats = Counter(zip(said, said[1:], said[2:], strict=False))
        whole = re.search(r"[.!?…。！？][\"'”’»)\]*]*\s*$", answer) and max(repeats.values(), default=0) < 3
        broken.append(declines and not whole)
    return float(np.mean(not_empty("answers", broken)))


def fabrication_rate(
    answers: Sequence[str],
    references: Sequence[str],
    values: Sequence[str | Sequence[str] | None] | None = None,
    *,
    questions: Sequence[str] | None = None,
    threshold: float = TOLD,
    patterns: Sequence[str] = REFUSAL_PATTERNS,
) -> float:
    """Share of answers that are neither the reference's nor a refusal: something was invented. For unrelated questions.

    An answer is the reference's where its `answer_recall` is at least `threshold`. References are what the *base* says: what it gets wrong by
    itself is no damage.

    Raises:
        ValueError: no answers, or another number of references, values or questions.

    Example:
        >>> fabrication_rate(["Rome.", "It is Oslo.", "I do not know."], ["It is Rome."] * 3, ["Rome"] * 3) == 1 / 3
        True
    """
    values = [None] * len(answers) if values is None else values
    questions = [""] * len(answers) if questions is None else questions
    for name, given in (("references", references), ("values", values), ("questions", questions)):
        if isinstance(given, str) or len(given) != len(answers):
            raise ValueError(f"{name}: wanted one for each of {len(answers)} answers, got {len(given)}")

    declined = refused(answers, patterns)
    invented = [
        not declines and answer_recall(said, reference, value, question, patterns=patterns) < threshold
        for said, reference, value, question, declines in zip(
            answers, references, values, questions, declined, strict=True
        )
    ]
    return float(np.mean(not_empty("answers", invented)))


def word_overlap(question: str, others: Sequence[str]) -> float:
    """How near a question is to the nearest of others: the largest |A and B| / |A or B| of their sets of words, in [0, 1].

    Raises:
        ValueError: no others.

    Example:
        >>> word_overlap("What is the capital of Spain?", ["Who is he?", "What is the capital of France?"]) == 5 / 7
        True
    """
    if not others:
        raise ValueError("others: wanted at least one question, got none")
    mine = set(words.words_of(question))
    each = [set(words.words_of(other)) for other in others]
    return max(len(mine & theirs) / max(1, len(mine | theirs)) for theirs in each)


def keep_curve(
    similarities: Numbers,
    kept: Numbers,
    edges: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
    facts: Sequence[Any] | None = None,
) -> list[tuple[float, int, Interval | None]]:
    """Share of kept answers by how near their questions are to what is forgotten: (from which similarity, rows, interval).

    Args:
        similarities: of each row, such as `word_overlap`. kept: 1 or 0 for each row.
        edges: where bins begin, ascending; the last one is open. A bin without rows has no interval.
        facts: as in `mean_interval`.

    Example:
        >>> [(low, n, share and share.estimate) for low, n, share in keep_curve([0.1, 0.8, 0.9], [1, 0, 1], (0.0, 0.5, 0.95))]
        [(0.0, 1, 1.0), (0.5, 2, 0.5), (0.95, 0, None)]
    """
    near, held = np.asarray(similarities, dtype=float), np.asarray(kept, dtype=float)
    if near.shape != held.shape:
        raise ValueError(f"kept: wanted {len(near)} values like similarities, got {len(held)}")
    if list(edges) != sorted(set(edges)) or (len(near) and near.min() < edges[0]):
        raise ValueError(
            f"edges: wanted ascending numbers from {near.min() if len(near) else 0:g}, got {tuple(edges)}"
        )
    bins = np.searchsorted(np.asarray(edges), near, side="right") - 1
    facts = [None] * len(held) if facts is None else facts
    rows = [np.flatnonzero(bins == i).tolist() for i in range(len(edges))]
    return [
        (low, len(of), mean_interval(held[of], [facts[i] for i in of]) if len(of) else None)
        for low, of in zip(edges, rows, strict=True)
    ]


def leak_at_k(samples: int, told: int, k: int) -> float:
    """The chance that at least one of k drawn answers tells, from `samples` drawn answers of which `told` do.

        1 - C(samples - told, k) / C(samples, k)

    Exact and without bias: the share of all choices of k of the answers that hold one that tells. Computed in integers.
    Source: leak@k of arXiv 2511.04934; the estimator is pass@k's (arXiv 2107.03374).

    Raises:
        ValueError: not 0 <= told <= samples, or not 1 <= k <= samples.

    Example:
        >>> leak_at_k(200, 1, 32), leak_at_k(4, 0, 2), leak_at_k(4, 3, 2)
        (0.16, 0.0, 1.0)
    """
    if not 0 <= told <= samples:
        raise ValueError(f"told: wanted an integer from 0 to {samples}, got {told}")
    if not 1 <= k <= samples:
        raise ValueError(f"k: wanted an integer from 1 to {samples}, got {k}")
    return float(1 - Fraction(math.comb(samples - told, k), math.comb(samples, k)))


def fluency(text: str) -> float:
    """Weighted entropy of word n-grams, bits: (2/3 H_2 + 4/3 H_3) / 2, as in ROME and RWKU. Low: it repeats itself.

    NaN for a text of fewer than three words. In scripts without spaces a character is a word.
    """
    said = words.words_of(text) if words.without_spaces(text) else text.split()
    if len(said) < 3:
        return math.nan
    entropies = []
    for n in (2, 3):
        counts = Counter(zip(*(said[i:] for i in range(n)), strict=False))
        entropies.append(stats.entropy(list(counts.values()), base=2))
    return float((2 / 3 * entropies[0] + 4 / 3 * entropies[1]) / 2)


# --- what is memorised -----------------------------------------------------------------------------------------


def exact_memorization(hits: Numbers) -> float:
    """Share of an answer's tokens that are the argmax under teacher forcing."""
    return float(np.mean(not_empty("hits", hits)))


def extraction_strength(hits: Numbers) -> float:
    """1 - k* / L, with k* the shortest prefix after which every teacher-forced argmax is the true token.

    0 when not even the last token is.

    Example:
        >>> extraction_strength([True, False, True, True])
        0.5
    """
    hits = not_empty("hits", hits)
    wrong = np.flatnonzero(~np.asarray(hits, dtype=bool))
    return 1.0 if len(wrong) == 0 else 1.0 - float(wrong[-1] + 1) / len(hits)


def multiple_choice_accuracy(choice_scores: Sequence[Numbers], correct: Sequence[int]) -> float:
    """Share of questions whose correct choice has the highest score (a log-probability, length-normalised or not)."""
    if len(choice_scores) != len(correct) or not len(correct):
        raise ValueError(
            f"correct: wanted one index a question, got {len(correct)} for {len(choice_scores)} questions"
        )
    hits = []
    for i, (scores, index) in enumerate(zip(choice_scores, correct, strict=True)):
        if not 0 <= index < len(scores):
            raise ValueError(f"correct[{i}]: wanted 0 to {len(scores) - 1}, got {index}")
        hits.append(int(np.argmax(finite_numbers(f"choice_scores[{i}]", scores))) == index)
    return float(np.mean(hits))


# --- membership ------------------------------------------------------------------------------------------------


def min_k(token_logprobs: Numbers, k: float) -> float:
    """Min-K%: minus the mean of the lowest k % token log-probabilities (at least one token), nats.

    `k` in percent (MUSE: 40). Low for text that was trained on. Source: arXiv 2310.16789.
    """
    return -_mean_of_lowest(token_logprobs, k)


def min_k_plus_plus(token_logprobs: Numbers, entropies: Numbers, variances: Numbers, k: float) -> float:
    """Min-K%++: the same on (log p_t - mu_t) / sigma_t, with mu = -entropy and sigma^2 = Var log p of the position.

    All three come from one pass of `duet_kernels.linear_token_stats`. Positions with variance 0 are left out.
    Source: arXiv 2404.02936.
    """
    logp, entropy, variance = (np.asarray(x, dtype=float) for x in (token_logprobs, entropies, variances))
    if not logp.shape == entropy.shape == variance.shape:
        raise ValueError(
            f"entropies, variances: wanted shape {logp.shape} like token_logprobs, got {entropy.shape}, {variance.shape}"
        )
    if np.isnan([logp, entropy, variance]).any():
        return math.nan
    some = variance > 0
    scores = (logp[some] + entropy[some]) / np.sqrt(variance[some])
    return -_mean_of_lowest(scores if some.any() else [math.nan], k)


def auc(positive: Numbers, negative: Numbers) -> float:
    """P(a positive scores higher than a negative), ties counted half: the area under the ROC curve."""
    positive, negative = finite_numbers("positive", positive), finite_numbers("negative", negative)
    return float(stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def privleak(forget_scores: Numbers, holdout_scores: Numbers, auc_retrain: float) -> float:
    """PrivLeak = 100 (AUC - AUC_retrain) / AUC_retrain (MUSE, arXiv 2407.06460); scores as `min_k` returns them.

    AUC: the chance that a forget text scores higher than a holdout text. 0: like a model that never saw the forget text; above: it
    looks less seen than unseen text (over-unlearned); below: it still looks seen.
    """
    if not 0 < auc_retrain <= 1:
        raise ValueError(f"auc_retrain: wanted a number in (0, 1], got {auc_retrain}")
    forget, holdout = (
        finite_numbers("forget_scores", forget_scores),
        finite_numbers("holdout_scores", holdout_scores),
    )
    return 100 * (auc(forget, holdout) - auc_retrain) / auc_retrain


# --- summaries -------------------------------------------------------------------------------------------------


def performance_shift(base: Mapping[str, float], unlearned: Mapping[str, float]) -> float:
    """DUET's (RF_base - RF) + (RF500_base - RF500) + (RR - RR_base) + (MMLU - MMLU_base), in points.

    Keys: `forget`, `forget_500`, `retain`, `mmlu`.

    Example:
        >>> base = {"forget": 32.13, "forget_500": 39.99, "retain": 84.29, "mmlu": 61.46}
        >>> round(performance_shift(base, {"forget": 4.27, "forget_500": 5.98, "retain": 78.33, "mmlu": 61.45}), 2)
        55.9
    """
    for name, numbers in (("base", base), ("unlearned", unlearned)):
        for key in ("forget", "forget_500", "retain", "mmlu"):
            if key not in numbers:
                raise ValueError(f"{name}: wanted forget, forget_500, retain and mmlu, got no {key!r}")
    forgotten = sum(base[key] - unlearned[key] for key in ("forget", "forget_500"))
    return forgotten + sum(unlearned[key] - base[key] for key in ("retain", "mmlu"))


def auc_interval(positive: Numbers, negative: Numbers) -> Interval:
    """`auc` with its 95 % interval: the A that solve |AUC - A| = 1.96 sqrt(V(A)), which exist at 0 and 1 too.

        V(A) = A (1 - A) / (m n) (1 + M (1 - A) / (2 - A) + M A / (1 + A)),   M = (m + n) / 2 - 1

    Source: Newcombe, Statistics in Medicine 25 (2006), method 5; V is Hanley and McNeil's with m and n evened out.
    """
    m, n = len(positive), len(negative)
    area, middle = auc(positive, negative), (m + n) / 2 - 1

    def upper(area: float) -> float:
        def beyond(a: float) -> float:
            variance = a * (1 - a) / (m * n) * (1 + middle * (1 - a) / (2 - a) + middle * a / (1 + a))
            return float(a - area - stats.norm.ppf(0.975) * math.sqrt(variance))

        root: Any = optimize.brentq
        # At 0 the equation of an area of 0 has a solution that is not meant.
        return 1.0 if area == 1 else root(beyond, area or 1e-30, 1.0)

    return Interval(area, 1 - upper(1 - area), upper(area))  # V(A) = V(1 - A)


# --- checks ----------------------------------------------------------------------------------------------------


def _exp(x: float) -> float:
    return math.inf if x > 709 else math.exp(x)


def _mean_of_lowest(token_logprobs: Numbers, k: float) -> float:
    if not 0 < k <= 100:
        raise ValueError(f"k: wanted a percentage in (0, 100], got {k}")
    # A NaN is sorted to the end and would hide there.
    ordered = np.sort(not_empty("token_logprobs", token_logprobs).astype(float))
    if np.isnan(ordered).any():
        return math.nan
    return float(ordered[: max(1, int(len(ordered) * k / 100))].mean())
