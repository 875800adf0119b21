"""Intervals of means against what they cover, and comparisons of two models on the same rows."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from duet.evaluation import intervals, metrics

quick = settings(max_examples=60, deadline=None, derandomize=True)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        interval = intervals.bootstrap(rng.normal(2.0, 1.0, size=40), resamples=300, seed=seed)
        assert interval.low < interval.estimate < interval.high
        hits += interval.low <= 2.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99
    assert math.isnan(intervals.bootstrap([1.0]).low)
    assert intervals.bootstrap([1.0, 2.0, 5.0], np.median).estimate == 2.0


def test_a_bootstrap_has_the_confidence_and_the_seed_that_are_asked_for():
    values = np.random.default_rng(0).normal(size=40)
    wide, narrow, other = (
        intervals.bootstrap(values, confidence=confidence, seed=seed)
        for confidence, seed in ((0.95, 0), (0.5, 0), (0.95, 1))
    )
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low) and other != wide


def test_a_paired_comparison_sees_what_an_unpaired_one_cannot():
    rng = np.random.default_rng(2)
    hard = rng.normal(0.0, 10.0, size=50)
    better = intervals.compare_paired(hard, hard + 0.5 + rng.normal(0, 0.2, size=50))
    assert better.p_value < 0.01
    assert better.difference.low > 0.3
    same = intervals.compare_paired(hard, hard + rng.normal(0, 0.2, size=50))
    assert same.p_value > 0.05
    with pytest.raises(ValueError, match="b: wanted 2 rows"):
        intervals.compare_paired([1.0, 2.0], [1.0])


@quick
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=40))
def test_wilsons_interval_solves_its_equation(hits):
    share, low, high = intervals.mean_interval(hits)
    assert share == pytest.approx(np.mean(hits)) and 0 <= low <= share <= high <= 1 and low < high
    for end in (low, high):  # |share - p| = z sqrt(p (1 - p) / n)
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / len(hits)), abs=1e-5)


@quick
@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.lists(st.floats(-5, 5), min_size=20, max_size=20)
)
def test_a_comparison_with_itself_says_nothing(a, noise):
    same = intervals.compare_paired(a, a, resamples=50)
    assert same.difference == (0.0, 0.0, 0.0) and same.p_value == 1.0
    b = [x + y for x, y in zip(a, noise, strict=False)]
    there, back = (intervals.compare_paired(*pair, resamples=50) for pair in ((a, b), (b, a)))
    assert there.difference.estimate == pytest.approx(-back.difference.estimate)
    assert there.p_value == back.p_value and 0 < there.p_value <= 1


def test_large_samples_are_drawn_in_blocks(monkeypatch):
    values = list(range(50))
    whole = intervals.bootstrap(values)
    monkeypatch.setattr(intervals, "_DRAWN_AT_ONCE", 50 * 100)
    assert intervals.bootstrap(values) == pytest.approx(whole, rel=0.05)


def test_wordings_of_one_fact_share_a_fate():
    """Ten facts in five wordings: the interval of ten, around the share of the rows; a text pasted twice changes nothing."""
    rng = np.random.default_rng(0)
    facts = np.repeat(np.arange(10), 5)
    held = 0
    for _ in range(300):
        told = np.repeat((rng.random(10) < 0.2).astype(float), 5)
        interval = intervals.mean_interval(told, facts)
        assert interval == intervals.mean_interval(told[::5]) and interval.estimate == told.mean()
        held += interval.low <= 0.2 <= interval.high
    assert held > 0.92 * 300
    parts = intervals.mean_interval([1.0, 0.0, 0.0], ["a", "a", "b"])
    assert parts.estimate == pytest.approx(1 / 3) and parts.high - parts.low > 0.7
    assert intervals.mean_interval([0.9] * 10, ["a"] * 9 + ["b"]) == pytest.approx([0.9] * 3)
    loose = [0.1, 0.5, 0.9, 0.3]
    assert intervals.mean_interval(loose * 2, [0, 1, 2, 3] * 2) == pytest.approx(
        intervals.mean_interval(loose)
    )
    whole = intervals.mean_interval(loose, [None] * 4)
    assert (
        whole == intervals.mean_interval(loose)
        and whole.low == 0
        and whole.high == pytest.approx(0.9935, abs=1e-3)
    )
    assert intervals.mean_interval([0.0, 1.0], shares=False).low < -5
    assert intervals.mean_interval([0.0, 9.0], shares=False, least=0.0).low == 0.0
    curve = metrics.keep_curve([0.1] * 4, [1, 1, 1, 1], (0.0,), ["a", "a", "b", "b"])
    assert curve[0][2] == intervals.mean_interval([1.0, 1.0]) and curve[0][1] == 4
    with pytest.raises(ValueError, match="facts: wanted one for each of 2"):
        intervals.mean_interval([0.0, 1.0], ["a"])


@pytest.mark.parametrize("most", [1, 5, 20])
def test_a_fact_of_many_wordings_beside_others_of_one(most):
    """The share of the rows is mostly that one fact's, and the interval says so."""
    rng, held = np.random.default_rng(1), 0
    rows = np.array([most, *[1] * 11])
    for _ in range(300):
        told = np.repeat((rng.random(12) < 0.5).astype(float), rows)
        interval = intervals.share_interval(told, np.repeat(np.arange(12), rows))
        held += interval.low <= 0.5 <= interval.high
    assert held > 0.9 * 300


@pytest.mark.parametrize("facts", [3, 5, 12])
def test_intervals_of_few_means_cover_them_about_as_often_as_they_say(facts):
    rng, held = np.random.default_rng(2), 0
    for _ in range(400):
        found = intervals.mean_interval(
            np.repeat(rng.normal(2.0, 1.0, facts), 3), np.repeat(np.arange(facts), 3), shares=False
        )
        held += found.low <= 2.0 <= found.high
    assert 0.925 <= held / 400 <= 0.98
    values = rng.normal(2.0, 1.0, facts)
    assert intervals.mean_interval(values, shares=False, confidence=0.9)[1:] == pytest.approx(
        stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    )


def test_more_leak_has_no_lower_upper_end():
    none, some, all_half = ([0.0] * 12, [0.0] * 11 + [0.5], [0.5] * 12)
    ends = [intervals.share_interval(values).high for values in (none, some, all_half)]
    assert ends == sorted(ends) and ends[0] == pytest.approx(0.243, abs=1e-3)
    assert intervals.share_interval(all_half).low < 0.5 < ends[2]
    assert (
        intervals.share_interval([1 + 1e-12, 1.0]).estimate == 1
        and intervals.share_interval([-1e-17, 0.0]).low == 0
    )
    with pytest.raises(ValueError, match="values: wanted shares in"):
        intervals.share_interval([0.0, 1.5])


def test_differences_may_be_small_beside_one():
    a = np.zeros(10)
    far = intervals.compare_paired(a, a + 1e-14 * np.arange(1, 11))
    assert far.p_value < 0.01


def test_which_rows_are_of_one_fact():
    paris = intervals.fact_of("Capital of France?", "It is Paris.", "France", "Paris")
    assert paris == intervals.fact_of("France's capital?", "paris", "france", "Paris")
    questions = "Is France large?", "Is France old?"
    assert len({intervals.fact_of(question, "Yes.", "France") for question in questions}) == 2
    assert paris != intervals.fact_of("Capital of Texas?", "It is Paris.", "Texas", "Paris")
    five, four = "one two three four five", "one two three four"
    assert intervals.fact_of("Who?", five) == intervals.fact_of("Where?", five)
    assert intervals.fact_of("Who?", four) != intervals.fact_of("Where?", four)
    sentence = "The capital of France is Paris."
    assert intervals.fact_of("What is it?", sentence) == intervals.fact_of("Which one?", sentence)
    assert intervals.fact_of("Is Oslo large?", "Yes.") != intervals.fact_of("Is Rome old?", "Yes.")
    assert intervals.fact_of("Is Oslo large?", "Yes.") == intervals.fact_of("Is Oslo large?", "Yes.")
