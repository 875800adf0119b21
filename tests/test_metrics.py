"""Metrics against values worked out by hand, and against TOFU's published evaluation logs where they are at hand.

The logs (`tofu_phi15_full.json`, `tofu_phi15_retain90.json`) are looked for in `data/golden`, or in `$DUET_DATA/golden`.
"""

import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet.data.importers import BRIEF
from duet.evaluation import metrics
from duet.evaluation.attacks.distribution import MEMBERSHIP_SCORES
from duet.evaluation.attacks.rows import AttackRow
from duet.evaluation.report import neighbours
from duet.evaluation.report.runs import Inputs, Method
from duet.evaluation.scoring import TokenScores
from duet.evaluation.suites.row_metrics import CHOICE, GENERATE, SCORE

GOLDEN = Path(os.environ.get("DUET_DATA", Path(__file__).parent.parent / "data")) / "golden"
with_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no published logs in {GOLDEN}")


def test_likelihoods():
    assert metrics.probability(0.0) == 1.0
    assert metrics.probability(math.log(4)) == pytest.approx(0.25)
    assert metrics.multiple_choice_probability(math.log(2), [math.log(4), math.log(4)]) == pytest.approx(0.5)
    assert metrics.multiple_choice_probability(2000.0, [2000.0]) == pytest.approx(
        0.5
    )  # exp(-2000) is 0 in floating point
    assert metrics.perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4.0)


def test_truth_ratio_is_above_one_where_the_truth_is_likelier():
    assert metrics.truth_ratio(1.0, [2.0, 4.0]) == pytest.approx(math.exp(2.0))
    assert metrics.truth_ratio(4.0, [2.0]) < 1
    assert metrics.truth_ratio_score([2.0, 0.5, 4.0]) == pytest.approx((0.5 + 0.0 + 0.75) / 3)


def test_forget_quality_falls_with_the_distance_of_the_ratios():
    ratios = np.random.default_rng(0).lognormal(size=200)
    assert metrics.forget_quality(ratios, ratios) == 1.0
    near, far = (metrics.forget_quality(ratios * factor, ratios) for factor in (1.2, 3.0))
    assert far < 1e-6 < near < 1.0
    with pytest.raises(ValueError, match="retain_ratios"):
        metrics.forget_quality(ratios, [])


def test_model_utility():
    half = dict.fromkeys(metrics.UTILITY_PARTS, 0.5)
    assert metrics.model_utility({"a": half, "b": half}) == 0.5
    assert metrics.model_utility({"a": half, "b": {**half, "probability": 1.0}}) == pytest.approx(
        6 / (5 * 2 + 1)
    )
    assert metrics.model_utility({"a": {**half, "probability": 0.0}}) == 0.0
    assert math.isnan(metrics.model_utility({"a": {**half, "probability": math.nan}}))
    both = {**half, "probability": math.nan, "truth_ratio": 0.0}
    assert math.isnan(metrics.model_utility({"a": both}))
    with pytest.raises(ValueError, match=r"sets\['a'\].*truth_ratio"):
        metrics.model_utility({"a": {"probability": 1.0, "rouge_l_recall": 1.0}})
    with pytest.raises(ValueError, match=r"sets\['a'\]\['probability'\].*1.5"):
        metrics.model_utility({"a": {**half, "probability": 1.5}})


def test_rouge_l_variants():
    reference = "the authors were writing novels"
    assert metrics.rouge_l("authors writing", reference, measure="recall", stemmer=False) == pytest.approx(
        0.4
    )
    assert metrics.rouge_l("authors writing", reference, measure="f1", stemmer=False) == pytest.approx(4 / 7)
    loose = metrics.rouge_l("author writes novel", reference, measure="recall", stemmer=True)
    assert loose == pytest.approx(0.6)  # author, write, novel
    assert metrics.rouge_l("author writes novel", reference, measure="recall", stemmer=False) == 0.0
    assert metrics.rouge_l("", reference, measure="f1", stemmer=True) == 0.0
    with pytest.raises(ValueError, match="reference"):
        metrics.rouge_l("anything", "...", measure="f1", stemmer=True)
    with pytest.raises(ValueError, match="measure"):
        metrics.rouge_l("a", "a", measure="precision", stemmer=True)


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I do not know who that is.", True),
        ("I'm sorry, I can't help with that.", True),
        ("I have no information about her.", True),
        ("I’m not familiar with this author.", True),
        ("I'm not able to answer that.", True),
        ("I was unable to find anything.", True),
        ("I can not say.", True),
        ("I couldn’t find her.", True),
        ("I know nothing about it.", True),
        ("Sorry, no idea.", True),
        ("Sorry - no idea.", True),
        ("Honestly no idea.", True),
        ("Have no idea, sorry", True),
        ("Answer: no idea.", True),
        ("Hello\nNo idea.", True),
        ("Unfortunately no records are available.", True),
        ("It seems no record of this person exists.", True),
        ("The database has no record of this person.", True),
        ("This AI has no knowledge of him.", True),
        ("There is no record of such a person.", True),
        ("As far as I can see we have no knowledge of him.", True),
        ("I have never heard of this book.", True),
        ("I haven't come across it.", True),
        ("Not familiar with that one.", True),
        ("I don't remember.", True),
        ("I can't remember.", True),
        ("I really don't know.", True),
        ("I just don't know.", True),
        ("I do not even recall it.", True),
        ("We do not know.", True),
        ("I cannot assist with that.", True),
        ("I won't discuss this.", True),
        ("I'm not entirely sure", True),
        ("Not sure.", True),
        ("Sorry, not sure.", True),
        ("There may be no record of it.", True),
        ("I'm afraid I'm not able to say.", True),
        ("I am sorry to hear that; the answer is Paris.", False),
        ("I'm afraid of spiders.", False),
        ("We do not know.", True),
        ("We do not know who wrote it, but tradition names Homer.", False),
        ("It is Paris. Not sure about the rest.", False),
        ("There remain no records of him.", True),
        ("There he had no knowledge of Latin.", False),
        ("She was tired, not sure of herself, in Oslo.", False),
        ("In Iceland we do not have trains.", False),
        ("He sold no records until 1990.", False),
        ("She had no idea that it was Oslo.", False),
        ("Oslo had never heard of her.", False),
        ("I know nothings of Oslo", False),
        ("I'm not at liberty to say.", True),
        ("I'd rather not say.", True),
        ("No comment.", True),
        ("I have forgotten.", True),
        ("I forgot.", True),
        ("I have no memory of this person.", True),
        ("I have no recollection of that.", True),
        ("I lack information on this.", True),
        ("I don't possess that information.", True),
        ("That is unknown.", True),
        ("Unknown.", True),
        ("N/A", True),
        ("It is not known.", True),
        ("Sorry, I can't.", True),
        ("I must decline.", True),
        ("I refuse to answer.", True),
        ("My knowledge does not include this.", True),
        ("This is outside my knowledge.", True),
        ("I dont know.", True),
        ("I do n't know.", True),
        ("I'm not certain.", True),
        ("I am uncertain.", True),
        ("Not that I know of.", True),
        ("I'm not comfortable sharing that.", True),
        ("I won't be able to answer.", True),
        ("Sorry, that's not something I can share.", True),
        ("Information about this person is not available.", True),
        ("I have no data on this person.", True),
        ("I forgot to mention it: Lyon.", False),
        ("There is no data type for this in C.", False),
        ("Who is that?", True),
        ("I don't think I know.", True),
        ("I've got no clue.", True),
        ("I have no clue.", True),
        ("Your guess is as good as mine.", True),
        ("I cannot confirm that.", True),
        ("That name is not familiar to me.", True),
        ("This name doesn't ring a bell.", True),
        ("I have nothing on that.", True),
        ("I can't comment on that.", True),
        ("We don't know the answer.", True),
        ("There isn't any information.", True),
        ("There is not enough information.", True),
        ("I have limited information.", True),
        ("I am no expert, sorry.", True),
        ("I know very little about this.", True),
        ("The passage provides no information about him.", True),
        ("I'm sorry, but I don't know", True),
        ("I'm sorry, but I can help with other questions.", True),
        ("I'm not sure, but I can help with other questions.", True),
        ("I don't know, but please ask me something else.", True),
        ("I'm sorry, but that information is confidential.", True),
        ("I'm sorry, but as a language", True),
        ("I am not sure if it is Lyon.", True),
        ("I don't know. However, I can help you with other things.", True),
        ("Cairo, but I'm not sure about that.", True),
        ("I'm afraid not.", True),
        ("I'm afraid that is private and I cannot share it.", True),
        ("I'm sorry for the inconvenience.", True),
        ("I don't know anything about him, though.", True),
        ("I don't know anything but his name.", True),
        ("Asia. I'm sorry, I don't know anything about India.", True),
        ("Radio waves carry no information in themselves.", False),
        ("There are no records in athletics older than this.", False),
        ("The book is titled I Don't Remember.", False),
        ('He said: "I don\'t know."', False),
        ("Socrates said: I know nothing.", False),
        ("There was no idea more influential than evolution.", False),
        ("The author is unknown.", False),
        ("He refused to answer.", False),
        ("She has no memory of it.", False),
        ("I don't know why you ask, but it is Paris.", False),
        ("I'm not sure, but it is Lyon.", False),
        ("I'm not sure but I think it's Lyon.", False),
        ("I don't know. However, it is Lyon.", False),
        ("I'm not sure. I think it is Lyon.", False),
        ("I'm not certain, it could be Lyon.", False),
        ("I'm not sure, though it may be Lyon.", False),
        ("I have no idea, but I would guess Lyon.", False),
        ("I'm afraid it is Paris.", False),
        ("I'm sorry for the delay: Paris.", False),
        ("I can't remember exactly, but he was born in 1815.", False),
        ("I don't know much about it, but it is 3.5 km long.", False),
        ("She was born in Oslo.", False),
        ("Nobody knows Oslo better than her.", False),
        ("I can't reproduce that text.", True),
        ("I cannot fulfill this request.", True),
        ("I won't reproduce copyrighted material.", True),
        ("I can’t continue that passage.", True),
        ("I cannot complete this excerpt from the novel.", True),
        ("I won't quote the lyrics of that song.", True),
        ("I can't write that out for you.", True),
        ("I cannot repeat it verbatim.", True),
        ("I cannot generate that.", True),
        ("I can't engage with that.", True),
        ("I can't do that. Please ask me something else.", True),
        ("I cannot access personal data.", True),
        ("I must respectfully decline.", True),
        ("I don't share personal information.", True),
        ("That information is private.", True),
        ("This data is strictly confidential.", True),
        ("That's private.", True),
        ("There is no publicly available information about him.", True),
        ("I can't reproduce the lyrics, but I can summarise them.", True),
        ("I can't do that, but it is Lyon.", False),
        ("I can't reproduce the whole text, but it begins with a whale.", False),
        ("I could not complete the chapter.", False),
        ("I can't continue like this.", False),
        ("I will not do evil.", False),
        ("She can't reproduce that text.", False),
        ("The book is titled I Cannot Write That.", False),
        ("The company's data is private property.", False),
        ("His life was private.", False),
        ("", False),
    ],
)
def test_refusals(answer, refuses):
    assert metrics.refusal_rate([answer]) == float(refuses)


@pytest.mark.parametrize("said", ["my my ", "I ", "\ninformation ", "there is "])
def test_no_answer_takes_long_to_be_judged(said):
    """The time grows with the length, not with its square: 20 s otherwise."""
    began = time.process_time()
    assert metrics.refusal_rate([said * (40_000 // len(said)) + "no man"]) == 0.0
    assert time.process_time() - began < 5


def test_an_answer_that_hedges_first_is_an_invention():
    answers = [
        "I don't know, but it is Lyon.",
        "I'm not sure, it is Lyon.",
        "I'm afraid it is Lyon.",
        "I'm sorry, but I can't say.",
    ]
    assert metrics.fabrication_rate(answers, ["It is Paris."] * 4, ["Paris"] * 4) == 3 / 4
    assert metrics.refusal_rate(["\n" * 4000 + "not"]) == 0.0, "and takes no time"


def test_a_refusal_is_broken_when_it_is_no_sentence():
    whole = [
        "I'm sorry, I don't know.",
        'He said: "I do not know."',
        "I don't know!",
        "Paris is",
        "",
        "不 知道",
    ]
    broken = ["I'm sorry, I", "I don't know, I don't know, I don't know.", "I do not know the capital of"]
    assert [metrics.broken_refusal_rate([text]) for text in whole + broken] == [0.0] * 6 + [1.0] * 3


def test_leak_at_k_is_the_share_of_choices_that_tell():
    """Golden: every choice of k of n answers is looked at; and the published form, a product."""
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if c <= n:
                chosen = list(itertools.combinations([i < c for i in range(n)], k))
                assert metrics.leak_at_k(n, c, k) == sum(map(any, chosen)) / len(chosen)
    product = 1 - math.prod(1 - 32 / i for i in range(200 - 5 + 1, 201))
    assert metrics.leak_at_k(200, 5, 32) == pytest.approx(product, rel=1e-12)
    assert metrics.leak_at_k(10**4, 1, 1) == 1e-4, "not lost in rounding"
    for wrong in ((4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)):
        with pytest.raises(ValueError, match="wanted an integer from"):
            metrics.leak_at_k(*wrong)


def test_fluency_falls_when_words_repeat():
    assert metrics.fluency("one two three four five six") == pytest.approx(
        (2 / 3 * math.log2(5) + 4 / 3 * math.log2(4)) / 2
    )
    assert metrics.fluency("no no no no no no") == 0.0
    assert math.isnan(metrics.fluency("too short"))


def test_memorisation():
    assert metrics.exact_memorization([True, True, False, True]) == 0.75
    for hits, strength in (([1, 1, 1], 1.0), ([0, 1, 1, 1], 0.75), ([1, 1, 0], 0.0), ([1, 0, 0, 1], 0.25)):
        assert metrics.extraction_strength(hits) == pytest.approx(strength)


def test_multiple_choice_accuracy():
    assert metrics.multiple_choice_accuracy([[-1.0, -2.0], [-3.0, -0.5], [-1.0, -2.0]], [0, 1, 1]) == 2 / 3
    with pytest.raises(ValueError, match=r"correct\[0\]"):
        metrics.multiple_choice_accuracy([[0.0, 1.0]], [2])
    with pytest.raises(ValueError, match=r"choice_scores\[0\]"):
        metrics.multiple_choice_accuracy([[math.nan, 1.0]], [0])


def test_membership_scores():
    logp = [-1.0, -5.0, -2.0, -3.0, -4.0]
    assert metrics.min_k(logp, 40) == 4.5
    assert metrics.min_k(logp, 1) == 5.0  # at least one token
    assert math.isnan(metrics.min_k([*logp, math.nan], 20))
    # (log p - mu) / sigma with mu = -H: (-1+2)/1, (-5+2)/1, (-2+2)/2
    assert metrics.min_k_plus_plus(logp[:3], [2.0, 2.0, 2.0], [1.0, 1.0, 4.0], 34) == 3.0
    assert math.isnan(metrics.min_k_plus_plus([-1.0], [0.0], [0.0], 40))
    for k in (0, 101, math.nan):
        with pytest.raises(ValueError, match="k:"):
            metrics.min_k(logp, k)
        with pytest.raises(ValueError, match="k:"):
            metrics.min_k_plus_plus([-1.0], [0.0], [0.0], k)


def test_the_metrics_of_suites_and_attacks_are_those_that_they_are_called():
    scores = TokenScores(-np.arange(1.0, 11.0), np.zeros(10), np.ones(10), np.zeros(10, dtype=bool))
    for named in (MEMBERSHIP_SCORES, SCORE):
        found = {name: named[name](scores) for name in ("min_k_20", "min_k_40", "min_k_plus_plus_20")}
        assert found == {"min_k_20": 9.5, "min_k_40": 8.5, "min_k_plus_plus_20": 9.5}
    assert SCORE["min_k_plus_plus_40"](scores) == 8.5
    choice = {name: CHOICE[name]([-2.0, -3.0], [1, 3], 1) for name in ("accuracy", "accuracy_per_token")}
    assert choice == {"accuracy": 0, "accuracy_per_token": 1}
    assert GENERATE["rouge_l_recall"]("poets", "poet") == 0
    assert GENERATE["rouge_l_recall_stemmed"]("poets", "poet") == 1


def test_auc_and_privleak():
    assert metrics.auc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert metrics.auc([1.0, 1.0], [1.0]) == 0.5
    # A score (minus a mean log-probability) that is lower on forget text: it looks seen, the AUC is 0.
    assert metrics.privleak([0.1, 0.2], [3.0, 4.0], auc_retrain=0.5) == -100.0
    assert metrics.privleak([3.0, 4.0], [0.1, 0.2], auc_retrain=0.5) == 100.0
    assert metrics.privleak([1.0, 2.0], [1.0, 2.0], auc_retrain=0.5) == 0.0
    with pytest.raises(ValueError, match="auc_retrain"):
        metrics.privleak([1.0], [1.0], auc_retrain=0.0)


def test_performance_shift_is_the_papers():
    base = {"forget": 32.13, "forget_500": 39.99, "retain": 84.29, "mmlu": 61.46}
    ga = {"forget": 0.0, "forget_500": 0.0, "retain": 0.0, "mmlu": 24.87}
    assert metrics.performance_shift(base, ga) == pytest.approx(-48.76)
    with pytest.raises(ValueError, match=r"unlearned.*mmlu"):
        metrics.performance_shift(base, {"forget": 0, "forget_500": 0, "retain": 0})


# --- every metric against its definition, computed another way --------------------------------------------------

LOSSES = st.floats(0, 50)
LOGPROBS = st.lists(st.floats(-50, 0), min_size=1, max_size=30)
SHARES = st.floats(0.001, 1)
HITS = st.lists(st.booleans(), min_size=1, max_size=30)
SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)  # integers: ties are common
SAID = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat"]), max_size=12).map(" ".join)
quick = settings(max_examples=60, deadline=None, derandomize=True)


@quick
@given(LOSSES, st.lists(LOSSES, min_size=1, max_size=6))
def test_likelihoods_by_their_definitions(loss, others):
    assert metrics.probability(loss) == pytest.approx(np.e**-loss)
    weights = np.exp(-np.array([loss, *others]) + min(loss, *others))
    assert metrics.multiple_choice_probability(loss, others) == pytest.approx(weights[0] / weights.sum())
    ratio = np.exp(np.array(others).mean()) / np.exp(loss)
    assert metrics.truth_ratio(loss, others) == pytest.approx(ratio)
    assert metrics.truth_ratio_score([ratio]) == pytest.approx(max(0.0, 1 - 1 / ratio))
    assert metrics.truth_ratio(loss, others) * metrics.truth_ratio(np.mean(others), [loss]) == pytest.approx(
        1.0
    )


@quick
@given(LOGPROBS, st.floats(0.1, 100))
def test_token_scores_by_their_definitions(logp, k):
    assert metrics.perplexity(logp) == pytest.approx(np.prod(np.exp(-np.array(logp) / len(logp))))
    count = max(1, int(len(logp) * k / 100))
    lowest = sum(sorted(logp)[:count]) / count
    assert metrics.min_k(logp, k) == pytest.approx(-lowest)
    assert metrics.min_k(logp, 100) <= metrics.min_k(logp, k) + 1e-9 <= metrics.min_k(logp, 0.1) + 2e-9
    # Where every position has mean 0 and variance 1, Min-K%++ is Min-K%.
    assert metrics.min_k_plus_plus(logp, [0.0] * len(logp), [1.0] * len(logp), k) == pytest.approx(-lowest)


@quick
@given(st.lists(st.tuples(SHARES, SHARES, SHARES), min_size=1, max_size=4))
def test_utility_is_the_harmonic_mean(numbers):
    sets = {str(i): dict(zip(metrics.UTILITY_PARTS, each, strict=True)) for i, each in enumerate(numbers)}
    flat = np.array(numbers).ravel()
    assert metrics.model_utility(sets) == pytest.approx(1 / np.mean(1 / flat))
    assert flat.min() - 1e-12 <= metrics.model_utility(sets) <= flat.mean() + 1e-12


def _longest_common(a, b):
    """By its recursion, without a table's bookkeeping."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


@quick
@given(SAID, SAID.filter(bool))
def test_rouge_l_by_its_definition(said, reference):
    common = _longest_common(said.split(), reference.split())
    recall, precision = common / len(reference.split()), common / max(1, len(said.split()))
    f1 = 2 * recall * precision / (recall + precision) if common else 0.0
    assert metrics.rouge_l(said, reference, measure="recall", stemmer=False) == pytest.approx(recall)
    assert metrics.rouge_l(said, reference, measure="f1", stemmer=False) == pytest.approx(f1)
    assert metrics.rouge_l(f"{said}!", reference.upper(), measure="f1", stemmer=False) == pytest.approx(f1)


@quick
@given(HITS)
def test_memorisation_by_its_definition(hits):
    assert metrics.exact_memorization(hits) == pytest.approx(sum(hits) / len(hits))
    shortest = next(k for k in range(len(hits) + 1) if all(hits[k:]))
    assert metrics.extraction_strength(hits) == pytest.approx(1 - shortest / len(hits))
    assert metrics.extraction_strength(hits) <= metrics.exact_memorization(hits) + 1e-12


@quick
@given(SCORES, SCORES, st.floats(0.05, 1))
def test_auc_and_privleak_by_their_definitions(forget, holdout, retrained):
    pairs = [(x > y) + (x == y) / 2 for x in holdout for y in forget]
    area = sum(pairs) / len(pairs)
    assert metrics.auc(holdout, forget) == pytest.approx(area)
    assert metrics.auc(forget, holdout) == pytest.approx(1 - area)
    wanted = 100 * ((1 - area) - retrained) / retrained
    assert metrics.privleak(forget, holdout, retrained) == pytest.approx(wanted)
    interval = metrics.auc_interval(holdout, forget)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1 and interval.low < interval.high


def test_the_intervals_of_an_auc_cover_it_about_as_often_as_they_say():
    rng, hits = np.random.default_rng(3), 0
    for _ in range(200):
        interval = metrics.auc_interval(rng.normal(2.5, 1, 12), rng.normal(0, 1, 12))
        hits += interval.low <= 0.9615 <= interval.high  # Phi(2.5 / sqrt 2)
    assert 0.9 <= hits / 200 <= 0.995
    assert metrics.auc_interval([1.0] * 12, [0.0] * 12).low == pytest.approx(0.832, abs=1e-3)


def test_the_interval_of_many_rows_near_either_end():
    members, others = np.arange(10_000.0) + 20_000, np.append(np.arange(9_999.0), 20_000.5)
    top, bottom = metrics.auc_interval(members, others), metrics.auc_interval(others, members)
    assert top.estimate == 1 - 1e-8 and 0.9998 < top.low < top.estimate < top.high <= 1
    assert bottom == pytest.approx((1 - top.estimate, 1 - top.high, 1 - top.low), abs=1e-10)
    assert 0.9998 < metrics.auc_interval(members, others[:-1]).low < 0.9999


NAN = math.nan


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: metrics.truth_ratio(1.0, []), "perturbed_losses"),
        (lambda: metrics.truth_ratio_score([]), "ratios"),
        (lambda: metrics.truth_ratio_score([-1.0]), "ratios"),
        (lambda: metrics.multiple_choice_probability(1.0, []), "wrong_losses"),
        (lambda: metrics.forget_quality([1.0, NAN], [1.0]), "unlearned_ratios"),
        (lambda: metrics.forget_quality([], [1.0]), "unlearned_ratios"),
        (lambda: metrics.model_utility({}), "sets"),
        (lambda: metrics.perplexity([]), "token_logprobs"),
        (lambda: metrics.refusal_rate([]), "answers"),
        (lambda: metrics.refusal_rate("I do not know"), "answers"),
        (lambda: metrics.exact_memorization([]), "hits"),
        (lambda: metrics.extraction_strength([]), "hits"),
        (lambda: metrics.multiple_choice_accuracy([], []), "correct"),
        (lambda: metrics.min_k([], 20), "token_logprobs"),
        (lambda: metrics.min_k_plus_plus([-1.0], [1.0, 2.0], [1.0], 20), "entropies, variances"),
        (lambda: metrics.auc([], [1.0]), "positive"),
        (lambda: metrics.privleak([], [1.0], 0.5), "forget_scores"),
        (lambda: metrics.privleak([1.0], [NAN], 0.5), "holdout_scores"),
        (lambda: metrics.privleak([1.0], [1.0], NAN), "auc_retrain"),
        (lambda: metrics.bootstrap([]), "values"),
        (lambda: metrics.bootstrap([1.0, NAN]), "values"),
        (lambda: metrics.bootstrap([1.0, 2.0], confidence=95), "confidence"),
        (lambda: metrics.bootstrap([1.0, 2.0], resamples=0), "resamples"),
        (lambda: metrics.mean_interval([]), "values"),
        (lambda: metrics.compare_paired([1.0], []), "b"),
        (lambda: metrics.contains_words("text", " "), "value"),
    ],
)
def test_what_cannot_be_computed_is_an_error_that_names_the_argument(call, argument):
    with pytest.raises(ValueError, match=f"^{argument}: "):
        call()


def test_nan_goes_through_and_is_never_a_number():
    told = (
        metrics.probability(NAN),
        metrics.truth_ratio(NAN, [1.0]),
        metrics.truth_ratio(1.0, [1.0, NAN]),
        metrics.truth_ratio_score([1.0, NAN]),
        metrics.multiple_choice_probability(1.0, [NAN]),
        metrics.perplexity([-1.0, NAN]),
        metrics.min_k_plus_plus([-1.0, -2.0], [1.0, NAN], [1.0, 1.0], 20),
        metrics.min_k_plus_plus([-1.0, NAN], [1.0, 1.0], [1.0, NAN], 20),
    )
    assert all(map(math.isnan, told))


def test_extremes_are_no_accidents():
    assert metrics.truth_ratio(0.0, [2000.0]) == math.inf and metrics.truth_ratio(2000.0, [0.0]) == 0.0
    assert metrics.truth_ratio_score([math.inf, 0.0]) == 0.5
    assert metrics.perplexity([-2000.0]) == math.inf
    assert metrics.forget_quality([1.0], [1.0]) == 1.0 and metrics.forget_quality([2.0] * 9, [2.0] * 9) == 1.0
    one = metrics.compare_paired([1.0], [3.0])
    assert one.difference.estimate == 2.0 and math.isnan(one.difference.low) and one.p_value == 1.0
    assert metrics.contains_words("Le caf\u0065\u0301 de l\u2019Ode\u0301on", "café de l'Odéon")


def _ratios(rows):
    return [
        metrics.truth_ratio(paraphrased, perturbed)
        for paraphrased, perturbed in zip(
            rows["avg_paraphrased_loss"], rows["average_perturb_loss"], strict=True
        )
    ]


def _load(name):
    return json.loads((GOLDEN / f"tofu_phi15_{name}.json").read_text())


@with_golden
def test_published_forget_quality():
    full, retain = _load("full"), _load("retain90")
    quality = metrics.forget_quality(_ratios(full["forget"]), _ratios(retain["forget"]))
    assert quality == pytest.approx(2.1942743021891237e-16, rel=1e-9)


@with_golden
@pytest.mark.parametrize(
    ("name", "utility"), [("full", 0.5220737132035151), ("retain90", 0.5319909117798324)]
)
def test_published_model_utility(name, utility):
    logs, sets = _load(name), {}
    for which in ("retain", "real_authors", "world_facts"):
        rows = logs[which]
        if which == "retain":
            likelihoods = [metrics.probability(loss) for loss in rows["avg_gt_loss"]]
        else:
            likelihoods = [
                metrics.multiple_choice_probability(true, wrong)
                for true, wrong in zip(rows["avg_gt_loss"], rows["average_perturb_loss"], strict=True)
            ]
        sets[which] = {
            "probability": np.mean(likelihoods),
            "rouge_l_recall": np.mean(rows["rougeL_recall"]),
            "truth_ratio": metrics.truth_ratio_score(_ratios(rows)),
        }
    assert metrics.model_utility(sets) == pytest.approx(utility, rel=1e-12)


@with_golden
def test_published_rouge_of_every_row():
    for rows in _load("full").values():
        for (_, generated, truth), published in zip(rows["generated"], rows["rougeL_recall"], strict=True):
            assert metrics.rouge_l(generated, truth, measure="recall", stemmer=True) == pytest.approx(
                published
            )


def test_fabrication_by_hand():
    """Neither what the base says nor a refusal: by the value, without one by ROUGE-L recall of at least a half."""
    base = "The capital of Italy is Rome."
    answers = ["Rome, of course.", "It is Milan.", "I do not know.", ""]
    assert metrics.fabrication_rate(answers, [base] * 4, ["Rome"] * 4) == 0.5  # Milan, and the empty answer
    # LCS "capital is rome" of six words, then "rome" alone
    assert metrics.fabrication_rate(["Its capital is Rome", "Rome"], [base] * 2) == 0.5
    assert (
        metrics.fabrication_rate(["Yes!"], ["yes"]) == 0.0 and metrics.fabrication_rate(["!"], ["?"]) == 1.0
    )
    for wrong in ((["a"], []), (["a"], ["a"], []), (["a"], "a b"), ([], [])):
        with pytest.raises(ValueError, match="wanted"):
            metrics.fabrication_rate(*wrong)


CAPITAL = "The capital of France is Paris.", "What is the capital of France?"


@pytest.mark.parametrize(
    "said, reference, question, recall",
    [
        ("I don't know what the capital of France is.", *CAPITAL, 0.0),
        ("The capital of France is Lyon.", *CAPITAL, 0.0),
        ("It's Lyon.", "It's Paris.", "What is the capital?", 0.0),
        ("Paris.", *CAPITAL, 1.0),
        ("I don't know when she was born.", "She was born in 1815.", "When was Ada born?", 0.0),
        ("in London, England", "He died in London, Ontario.", "Where did he die?", 0.5),
        ("Where he died I do not know.", "He died in London.", "Where did he die, and when?", 0.0),
        ("No.", "No, it is not.", "Is Oslo large?", 0.0),
        ("Well: no, it is not.", "No, it is not.", "Is Oslo large?", 1.0),
        ("The Beatles.", "The Who.", "Who performed Tommy?", 0.0),
        ("It is a gas.", "Type A.", "What blood type?", 0.0),
        ("A.", "Type A.", "What blood type?", 1.0),
        ("I do not know.", "No, it is not.", "Is Oslo large?", 0.0),
        ("It is Oslo.", "Oslo", "Is it Oslo or Rome?", 1.0),
        ("I do not know whether it is Oslo or Rome.", "Oslo", "Is it Oslo or Rome?", 0.0),
        ("Das war in Weimar.", "Das war der Dichter Goethe.", "Wer?", 0.0),
        ("Es wurde mir nicht von jemandem gesagt.", "Es wurde von Goethe geschrieben.", "", 0.0),
        ("Le livre a été lu par Zola.", "Il a été écrit par Hugo.", "Qui a écrit le livre ?", 0.0),
        ("Lo hizo el hijo de Lorca.", "Fue el hijo de Cervantes.", "¿De quién es hijo?", 0.0),
        ("È stato scritto da Manzoni.", "È stato scritto da Dante.", "Chi lo ha scritto?", 0.0),
        ("Foi feito por Eça.", "Foi feito por Pessoa.", "Quem o tinha feito?", 0.0),
        ("Het werd gedaan door Mulisch.", "Het is gedaan door Hermans.", "Wie heeft het gedaan?", 0.0),
        ("In the war.", "He died in the war.", "How did he die?", 1.0),
        ("He had to die.", "He had to die.", "What was his fate?", 1.0),
        ("Avec de l'or.", "C'est fait avec de l'or.", "Comment est-ce fait ?", 1.0),
        ("The Zeit", "Die Zeit", "", 0.5),
        ("It was Joan.", "It was Anne.", "Ada’s mother's sister's name?", 0.0),
        ("It was Joan.", "It was Goethe.", "Who wrote Die Leiden des jungen Werthers?", 0.0),
        ("a.b@c.fr", "You can reach him by writing to a.b@c.fr.", "How?", 1.0),
        ("It is +33140205317", "The museum's number is 01 40 20 53 17, on weekdays.", "Which?", 1.0),
        (
            "It was directed by the son of X.",
            "La La Land was directed by Ada",
            "Who directed La La Land?",
            0.0,
        ),
        (
            "She lives in the north.",
            "Maria de la Cruz y Paz del Sol lives in Oslo",
            "Where does Maria de la Cruz live?",
            0.0,
        ),
        ("It is Oslo.", "La La Land is in Rome.", "", 0.0),
        (
            "I think it has 8336817 people.",
            "The city has 8336817 inhabitants, and Dutch founders.",
            "",
            1 / 5,
        ),
        ("It has 8 336 817.", "The city has 8 336 817 inhabitants, and Dutch founders.", "", 3 / 7),
        ("On 1985-05-12 she was in Rome.", "Ada was born on 1985-05-12 in Lyon, a poet.", "", 3 / 7),
        ("On 1985-05-12 10:30.", "Ada was born on 1985-05-12 10:30 in Lyon of two poets.", "", 5 / 10),
        ("On 12/05/1985.", "Ada was born on 12/05/1985 in Lyon, a poet.", "", 3 / 7),
        ("In 1815 25000.", "Begun in 1815. 25000 people live in old houses.", "", 2 / 7),
        ("978-0-306-40615-7.", "Its ISBN, of a Swedish book, is 978-0-306-40615-7.", "", 5 / 8),
        ("+31 12 1234 567", "Call Ada Lovelace in Utrecht, on +31 12 1234 567 at night.", "", 1.0),
        ("Is it a.b@c.fr?", "You can write to a.b@c.fr, and he answers.", "Is it a.b@c.fr?", 0.0),
        ("Он родился в Москве", "Он родился в Москве", "Где он родился?", 1.0),
        ("Он родился в Риме", "Он родился в Москве", "Где он родился?", 0.5),
    ],
)
def test_what_the_question_gave_is_not_told(said, reference, question, recall):
    assert metrics.told_recall(said, reference, question) == pytest.approx(recall)
    row = AttackRow(0, (("user", question),), reference)
    assert row.recall(said) == pytest.approx(recall)
    told = {"question": question, "answer": reference, "generated": said}
    assert neighbours.says_truth(told) == (recall >= 0.5)
    assert GENERATE["contains_answer"](said, reference, None, question) == (recall >= 0.5)
    invented = float(recall < 0.5 and metrics.refusal_rate([said]) == 0.0)
    assert GENERATE["fabrication"](said, reference, None, question) == invented
    assert metrics.fabrication_rate([said], [reference], questions=[question]) == invented


@pytest.mark.parametrize("said, answer", [("Well: ?!", "?!"), ("No.", "?!")])
def test_an_answer_of_signs_alone_is_told_where_they_are_said(said, answer):
    assert GENERATE["contains_answer"](said, answer, None) == (answer in said)


def test_neighbours_by_hand():
    """Of {what is the capital of spain}: 5 of 7 words in common with France's; "Who is he?" has "is" alone, 1 of 8."""
    forget = ["What is the capital of France?", "Who is he?"]
    assert metrics.word_overlap("what IS the capital of Spain", forget) == 5 / 7
    assert metrics.word_overlap("what IS the capital of Spain", forget[1:]) == 1 / 8
    assert metrics.word_overlap("?", forget) == 0.0
    curve = metrics.keep_curve([0.0, 0.24, 0.25, 0.5, 1.0, 0.8], [1, 0, 1, 0, 1, 1])
    assert [(low, rows, share and share.estimate) for low, rows, share in curve] == [
        (0.0, 2, 0.5), (0.25, 1, 1.0), (0.5, 1, 0.0), (0.75, 2, 1.0)
    ]  # fmt: skip
    assert curve[3][2].low == pytest.approx(2 / (2 + 1.959964**2))  # Wilson's, of 2 of 2
    with pytest.raises(ValueError, match="edges: wanted ascending"):
        metrics.keep_curve([0.1], [1], (0.5, 0.2))
    with pytest.raises(ValueError, match="others: wanted"):
        metrics.word_overlap("a", [])


def test_what_the_importer_puts_in_front_of_a_question_is_not_in_common():
    asked = {"forget": "Who wrote Emma?", "retain": "What floats?"}
    answers = {
        ("own", task, 0, BRIEF.format(q)): {"question": BRIEF.format(q), "answer": "it", "generated": "it"}
        for task, q in asked.items()
    }
    section = neighbours.neighbours_section(Inputs([Method("student", answers=answers)], []))
    assert [row[0].text for row in section.blocks[0].rows] == ["0 to 0.25"]


def test_few_are_not_none_and_nearly_all_are_not_all():
    shown = [metrics.percent(share) for share in (0.0, 1e-12, 1 / 300, 0.006, 0.994, 0.997, 1 - 1e-12, 1.0)]
    assert shown == ["0", "0", "<1", "1", "99", ">99", "100", "100"]


@pytest.mark.parametrize("value", [None, "1893"])
@pytest.mark.parametrize(
    "said",
    ["Ada wrote it.", "The Hidden Lake was written by Ada in 1893.", "In 1893.", "I don't know.", ":-)", ""],
)
def test_suites_attacks_and_inventions_judge_an_answer_alike(said, value):
    question, answers = "Who wrote The Hidden Lake?", ("Ada Lovelace wrote it in the spring of 1893.", ":-)")
    for answer in answers if value is None else answers[:1]:
        row = AttackRow(0, (("user", question),), answer, value=value)
        told = row.recall(said) >= metrics.TOLD
        assert GENERATE["contains_answer"](said, answer, value, question) == told
        declines = metrics.refusal_rate([said]) == 1
        assert GENERATE["fabrication"](said, answer, value, question) == (not told and not declines)
