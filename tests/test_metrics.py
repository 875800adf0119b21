"""Metrics against values worked out by hand, and against TOFU's published evaluation logs where they are at hand.

The logs (`tofu_phi15_full.json`, `tofu_phi15_retain90.json`) are looked for in `data/golden`, or in `$DUET_DATA/golden`.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from duet.evaluation import metrics

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
        ("She was born in Oslo.", False),
        ("Nobody knows Oslo better than her.", False),
        ("", False),
    ],
)
def test_refusals(answer, refuses):
    assert metrics.refusal_rate([answer]) == float(refuses)


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


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        interval = metrics.bootstrap(rng.normal(2.0, 1.0, size=40), resamples=300, seed=seed)
        assert interval.low < interval.estimate < interval.high
        hits += interval.low <= 2.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99
    assert math.isnan(metrics.bootstrap([1.0]).low)
    assert metrics.bootstrap([1.0, 2.0, 5.0], np.median).estimate == 2.0


def test_a_paired_comparison_sees_what_an_unpaired_one_cannot():
    rng = np.random.default_rng(2)
    hard = rng.normal(0.0, 10.0, size=50)
    better = metrics.compare_paired(hard, hard + 0.5 + rng.normal(0, 0.2, size=50))
    assert better.p_value < 0.01
    assert better.difference.low > 0.3
    same = metrics.compare_paired(hard, hard + rng.normal(0, 0.2, size=50))
    assert same.p_value > 0.05
    with pytest.raises(ValueError, match="b: wanted 2 rows"):
        metrics.compare_paired([1.0, 2.0], [1.0])


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
