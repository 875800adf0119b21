"""Every method on numbers that can be checked with pencil and paper.

The LM head is the identity, so that hidden states are logits. Rows are written as probabilities: `odds(1, 2, 1)` are the
logits of p = (1/4, 1/2, 1/4). Query 0 is to be forgotten, query 1 to be kept.
"""

from math import exp, log

import pytest
import torch

from duet import DuetConfig
from duet.methods.objectives import OBJECTIVES, Counts, Step
from duet.methods.objectives.baselines import least_probable, rmu_parameters
from duet_kernels import LMHead

NONE = -100


def odds(*values):
    return [log(value) for value in values]


def parts(name, student, labels, teacher=None, queries=None, prepared=None, **options):
    """The objective on `[N, V]` logits; queries: which query each position belongs to (one each if not given)."""
    student = torch.tensor(student, dtype=torch.float64)
    labels = torch.tensor(labels)
    query = torch.arange(len(student)) if queries is None else torch.tensor(queries)
    forget = torch.arange(int(query.max()) + 1) == 0
    objective = OBJECTIVES[name]
    args = DuetConfig(output_dir="unused", objective=name, **options)
    head = torch.eye(student.shape[1], dtype=torch.float64)
    targets = prepared
    if objective.targets is not None:
        hidden = student if teacher is None else torch.tensor(teacher, dtype=torch.float64)
        targets = objective.targets(hidden, LMHead(head), labels, args)
    counts = Counts.of(objective.count({"query": query, "forget": forget, "targets": targets}))
    return objective.loss(Step(student, head, targets, labels, query, forget, counts, args))


def value(*args, part="loss", **options):
    return parts(*args, **options)[part].item()


# student: p(y) = 1/4 on the forget token, 1/2 on the retain token
STUDENT = [odds(1, 2, 1), odds(2, 1, 1)]
LABELS = [0, 0]


@pytest.mark.parametrize("name", ["duet", "duet_adversarial"])
def test_duet(name):
    # differences 0.5 and 3 on the two ids of C_K: 0.5 * 0.25 + 1 * (3 - 0.5); the third id does not count
    assert value(name, [[1.5, 3.0, 9.0]], [NONE], [[1.0, 0.0, -5.0]], k=2) == pytest.approx(0.125 + 2.5)


def test_duet_reverse_kl_and_jsd():
    # p = (3/4, 1/4), q = (1/2, 1/2); with beta 1/3 the middle is (7/12, 5/12)
    student, teacher = [odds(1, 1)], [odds(3, 1)]
    expected = 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)
    assert value("duet_reverse_kl", student, [NONE], teacher, k=2) == pytest.approx(expected)
    kl_p = 0.75 * log(0.75 * 12 / 7) + 0.25 * log(0.25 * 12 / 5)
    kl_q = 0.5 * log(0.5 * 12 / 7) + 0.5 * log(0.5 * 12 / 5)
    expected = kl_p / 3 + 2 * kl_q / 3
    assert value("duet_jsd", student, [NONE], teacher, k=2, beta=1 / 3) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["duet_kl", "duet_forward_kl"])
def test_duet_kl(name):
    # C_K are the first two ids: p = (3/4, 1/4), q = (1/2, 1/2) after renormalising
    expected = 0.75 * log(1.5) + 0.25 * log(0.5)
    student, teacher = [odds(1, 1, 6)], [odds(3, 1, 0.5)]
    assert value(name, student, [NONE], teacher, k=2) == pytest.approx(expected)
    # tail: three buckets, p = (6, 2, 1) / 9, q = (1, 1, 6) / 8
    expected = sum(p * log(p / q) for p, q in ((6 / 9, 1 / 8), (2 / 9, 1 / 8), (1 / 9, 6 / 8)))
    assert value(name, student, [NONE], teacher, k=2, normalization="tail") == pytest.approx(expected)


def test_bidirectional():
    # C_K = {0, 1}, its least logit 1. The student's own two largest are ids 2 (logit 4: 3 too high) and 0 (supported).
    student, teacher = [[2.0, 1.0, 4.0, 0.0]], [[2.0, 1.0, -1.0, -1.0]]
    found = parts("bidirectional", student, [NONE], teacher, k=2, push_weight=0.5)
    assert found["pull_loss"].item() == pytest.approx(0)
    assert found["push_loss"].item() == pytest.approx(3)
    assert found["loss"].item() == pytest.approx(1.5)
    # an id outside C_K that does not stand above its least is left alone
    below = parts("bidirectional", [[2.0, 0.9, 0.95, 0.0]], [NONE], teacher, k=2)
    assert below["push_loss"].item() == 0 and below["pull_loss"].item() == pytest.approx(0.5 * 0.01)


def test_ga():
    assert value("ga", STUDENT, LABELS) == pytest.approx(-log(4))


def test_graddiff():
    assert value("graddiff", STUDENT, LABELS, retain_weight=3.0) == pytest.approx(-log(4) + 3 * log(2))


def test_npo():
    # an answer of two tokens with p = 1/4 each, where the base had 1/2 each: the log ratio is -2 log 2
    student, base = [odds(1, 2, 1)] * 2 + [odds(1, 1, 2)], [odds(2, 1, 1)] * 2 + [odds(1, 1, 2)]
    # sigma(-0.5 * -2 log 2) = 2 / (1 + 2)
    expected = -2 / 0.5 * log(2 / 3)
    found = parts("npo", student, [0, 0, 2], base, queries=[0, 0, 1], npo_beta=0.5, retain_weight=2.0)
    assert found["forget_loss"].item() == pytest.approx(expected)
    assert found["loss"].item() == pytest.approx(expected + 2 * log(2))


@pytest.mark.parametrize("name", ["graddiff_kl", "npo_kl"])
def test_a_retain_term_of_kl(name):
    # the forget term as without it; on the retain row KL((2, 1, 1) / 4 || (1, 2, 1) / 4) = (1 / 4) log 2
    student, base = [odds(1, 2, 1), odds(1, 2, 1)], [odds(2, 1, 1), odds(2, 1, 1)]
    found = parts(name, student, [0, 0], base, k=2, npo_beta=0.5, retain_weight=2.0)
    plain = parts(name.removesuffix("_kl"), student, [0, 0], base, npo_beta=0.5)
    assert found["forget_loss"].item() == pytest.approx(plain["forget_loss"].item())
    assert found["retain_loss"].item() == pytest.approx(0.25 * log(2))
    assert found["loss"].item() == pytest.approx(plain["forget_loss"].item() + 0.5 * log(2))


def test_npo_is_on_log_probabilities():
    """Adding a constant to all logits changes no probability, and so nothing here; on raw logits it would."""
    shifted = [[x + 5 for x in row] for row in STUDENT]
    base = [odds(1, 1, 1), odds(1, 1, 1)]
    assert value("npo", shifted, LABELS, base) == pytest.approx(value("npo", STUDENT, LABELS, base))


def test_simnpo():
    # two tokens at 1/4: log p / |y| = -log 4; beta 2, gamma 1: sigma(2 log 4 - 1)
    student = [odds(1, 2, 1)] * 2 + [odds(2, 1, 1)]
    expected = -2 / 2 * -log(1 + exp(-(2 * log(4) - 1)))
    options = {"simnpo_beta": 2.0, "simnpo_gamma": 1.0, "retain_weight": 0.5}
    found = parts("simnpo", student, [0, 0, 0], queries=[0, 0, 1], **options)
    assert found["forget_loss"].item() == pytest.approx(expected)
    assert found["loss"].item() == pytest.approx(expected + 0.5 * log(2))


def test_refusal():
    assert value("refusal", STUDENT, LABELS, retain_weight=3.0) == pytest.approx(log(4) + 3 * log(2))


@pytest.mark.parametrize("k", [2, 3])
def test_undial(k):
    # base (4, 2, 1, 1) / 8, answer 0, gamma log 4: the target is (1, 2, 1, 1) / 5; the student is uniform. With k = 2
    # ids 2 and 3 are one bucket of 2 / 5 against 1 / 2; with k = 3 the bucket holds id 3 alone (both have one value).
    base = [odds(4, 2, 1, 1), odds(1, 1, 1, 1)]
    target, uniform = ((1, 2, 2), (1, 1, 2)) if k == 2 else ((1, 2, 1, 1), (1, 1, 1, 1))
    expected = sum(p / 5 * log((p / 5) / (q / 4)) for p, q in zip(target, uniform, strict=True))
    student = [odds(1, 1, 1, 1)] * 2
    found = parts("undial", student, [0, 1], base, k=k, undial_gamma=log(4), retain_weight=2.0)
    assert found["forget_loss"].item() == pytest.approx(expected)
    assert found["loss"].item() == pytest.approx(expected + 2 * log(4))


def test_undial_lowers_an_answer_outside_the_top_k():
    # k = 1: id 0 is the largest, the answer is id 2 (1 / 8), which takes its place; halved: (4, 2, 1, 0.5) / 7.5
    base = [odds(4, 2, 1, 1)]
    expected = 0.5 / 7.5 * log((0.5 / 7.5) / 0.25) + 7 / 7.5 * log((7 / 7.5) / 0.75)
    assert value("undial", [odds(1, 1, 1, 1)], [2], base, k=1, undial_gamma=log(2)) == pytest.approx(expected)


def test_shred():
    # Two positions of one text, answers at 1/2 and 1/8: half of them, the second, loses its token: (4, 2, 1, 0) / 7.
    # There the student is uniform; at the first position, and on the retain row, it equals the base.
    base = [odds(4, 2, 1, 1)] * 3
    student = [odds(4, 2, 1, 1), odds(1, 1, 1, 1), odds(4, 2, 1, 1)]
    expected = sum(p / 7 * log((p / 7) / 0.25) for p in (4, 2, 1))
    found = parts("shred", student, [0, 3, 3], base, queries=[0, 0, 1], k=4, shred_percent=50)
    assert found["loss"].item() == pytest.approx(expected / 3)
    assert found["forget_loss"].item() == pytest.approx(expected / 2)
    assert found["retain_loss"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("length, percent, deleted", [(100, 15, 15), (7, 15, 2), (1, 1, 1), (5, 100, 5)])
def test_shred_deletes_that_share_rounded_up(length, percent, deleted):
    query, forget = torch.zeros(length, dtype=torch.int64), torch.tensor([True])
    nothing = torch.zeros(length, 2)
    step = Step(nothing, None, None, query, query, forget, None, None)
    assert least_probable(step, torch.arange(length).float(), percent).tolist() == [
        i >= length - deleted for i in range(length)
    ]


def test_of_equal_tokens_the_earlier_are_deleted():
    query = torch.zeros(40, dtype=torch.int64)  # enough for a sort that is not stable to move them
    step = Step(torch.zeros(40, 2), None, None, query, query, torch.tensor([True]), None, None)
    assert least_probable(step, torch.ones(40), 50).tolist() == [True] * 20 + [False] * 20


def test_rmu_is_computed_in_single_precision():
    """A mean over 300 squares of bf16 states keeps more than bf16's 8 bits."""
    hidden = torch.linspace(0.5, 1.5, 300 * 8).reshape(300, 8).bfloat16()
    query = torch.arange(300) + 1
    forget = torch.arange(301) == 0
    counts = Counts.of(OBJECTIVES["rmu"].count({"query": query, "forget": forget}))
    args = DuetConfig(output_dir="unused", objective="rmu")
    step = Step(hidden, None, torch.zeros_like(hidden), query, query, forget, counts, args)
    exact = hidden.double().square().mean().item()
    assert OBJECTIVES["rmu"].loss(step)["retain_loss"].item() == pytest.approx(exact, rel=1e-5)


def test_shred_counts_the_mass_that_the_student_leaves_on_the_deleted_token():
    base = [odds(4, 2, 1, 1)]
    sure, unsure = [odds(4, 2, 1, 93)], [odds(4, 2, 1, 0.001)]
    low, high = (value("shred", student, [3], base, k=4, shred_percent=100) for student in (unsure, sure))
    assert low == pytest.approx(0, abs=1e-3) and high == pytest.approx(log(100 / 7))


def test_rmu():
    # c u = 6 (a, b) with a^2 + b^2 = 1: |h - c u|^2 / 2 on the forget row, 100 |h - h_base|^2 / 2 on the retain row
    student, base = [[0.0, 0.0], [1.0, 2.0]], [[9.0, 9.0], [1.0, 1.0]]
    found = parts("rmu", student, [0, 0], base, rmu_scale=6.0, rmu_alpha=100.0, rmu_layer=0)
    assert found["forget_loss"].item() == pytest.approx(18)
    assert found["retain_loss"].item() == pytest.approx(0.5)
    assert found["loss"].item() == pytest.approx(68)


def test_the_control_vector_of_rmu_follows_from_the_seed():
    rows = [[1.0, 2.0], [1.0, 2.0]], [0, 0], [[0.0, 0.0], [0.0, 0.0]]
    first, again, other = (value("rmu", *rows, rmu_layer=0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_rmu_trains_no_projection_of_the_attention():
    args = DuetConfig(output_dir="unused", objective="rmu", rmu_layer=1)
    names = "transformer.h.1.attn.c_proj.weight", "transformer.h.1.mlp.c_proj.weight"
    assert [rmu_parameters(name, args) for name in names] == [False, True]


def test_entropy_weighting():
    # teacher certain (H = 0 up to rounding), student uniform over 4 (H = log 4): weight 4 / (1 + 4)
    certain = [[40.0, 0.0, 0.0, 0.0]]
    plain = value("duet_kl", [odds(1, 1, 1, 1)], [NONE], certain, k=4)
    weighed = value("duet_kl", [odds(1, 1, 1, 1)], [NONE], certain, k=4, entropy_weighting=True)
    assert plain == pytest.approx(log(4)) and weighed == pytest.approx(0.8 * log(4))
    # the other way round the token counts less: 1 / (1 + 4)
    plain = value("duet", certain, [NONE], [odds(1, 1, 1, 1)], k=4)
    assert value("duet", certain, [NONE], [odds(1, 1, 1, 1)], k=4, entropy_weighting=True) == pytest.approx(
        0.2 * plain
    )


def test_undo():
    # the whole vocabulary, T = 1: KL((2, 1, 1) / 4 || (1, 2, 1) / 4) = (1 / 2) log 2 - (1 / 4) log 2
    student, teacher = [odds(1, 2, 1), odds(1, 1, 1)], [odds(2, 1, 1), odds(1, 1, 1)]
    found = parts("undo", student, [0, 0], teacher)
    assert found["forget_loss"].item() == pytest.approx(0.25 * log(2))
    assert found["loss"].item() == pytest.approx(0.125 * log(2))


def deep_targets(rows, pushed, known, base, floor):
    logits = torch.tensor([odds(*row) for row in rows], dtype=torch.float64)
    values, indices = logits.topk(2)
    rest = logits.masked_fill(torch.zeros_like(logits).scatter(1, indices, 1).bool(), -torch.inf)
    return {
        "values": values,
        "indices": indices,
        "tail": rest.logsumexp(-1),
        "pushed": torch.tensor(pushed),
        "known": torch.tensor(known),
        "base": torch.tensor(base, dtype=torch.float64),
        "floor": torch.tensor(floor, dtype=torch.float64),
    }


# A forget query with its own answer of two tokens, whose second is known, and a retain query of one token.
DEEP = {
    "labels": [0, 1, 0],
    "queries": [0, 0, 1],
    "deep_npo_beta": 0.5,
    "counterfactual_weight": 0.3,
    "lift_weight": 0.1,
}


def test_duet_deep_pulls_and_pushes():
    targets = deep_targets(
        [(2, 1, 1), (2, 1, 1), (1, 2, 1)],
        pushed=[True, True, False],
        known=[False, True, False],
        base=[0.0, 0.0, 0.0],
        floor=[0.0, log(1 / 4), 0.0],
    )
    student = [odds(1, 2, 1), odds(1, 2, 1), odds(1, 2, 1)]
    found = {k: v.item() for k, v in parts("duet_deep", student, prepared=targets, **DEEP).items()}
    kl = 0.25 * log(2)  # as in test_undo
    assert found["pull_loss"] == pytest.approx(kl) and found["counterfactual_loss"] == pytest.approx(kl)
    # the known token fell from 1 to 1/2: sigma(0.5 log 2) = sqrt 2 / (1 + sqrt 2); it stands above its floor
    push = -4 * log(2**0.5 / (1 + 2**0.5))
    assert found["push_loss"] == pytest.approx(push) and found["lift_loss"] == 0
    assert found["retain_loss"] == pytest.approx(0, abs=1e-12)
    assert found["loss"] == pytest.approx(1.3 * kl + push)


def test_duet_deep_lifts_what_fell_under_its_floor():
    targets = deep_targets(
        [(2, 1, 1), (1, 1, 98), (1, 2, 1)],
        pushed=[True, True, False],
        known=[False, True, False],
        base=[0.0, 0.0, 0.0],
        floor=[0.0, log(1 / 4), 0.0],
    )
    student = [odds(2, 1, 1), odds(1, 1, 98), odds(1, 2, 1)]
    found = {k: v.item() for k, v in parts("duet_deep", student, prepared=targets, **DEEP).items()}
    # 1/100 is more than one nat under 1/4: the gate is shut (the constant 4 log 2), and log 25 is to be made up
    assert found["push_loss"] == pytest.approx(4 * log(2)) and found["lift_loss"] == pytest.approx(log(25))
    assert found["loss"] == pytest.approx(4 * log(2) + 0.1 * log(25))


@pytest.mark.parametrize("below, pushed", [(0.9, True), (1.1, False)])
def test_the_push_of_duet_deep_ends_one_nat_under_the_floor(below, pushed):
    targets = deep_targets(
        [(1, 1, 2)] * 2,
        pushed=[True, False],
        known=[True, False],
        base=[0.0, 0.0],
        floor=[log(1 / 4) + below, 0.0],
    )
    options = {"prepared": targets, "queries": [0, 1], "deep_npo_beta": 0.5}
    push = value("duet_deep", [odds(1, 1, 2)] * 2, [0, 0], part="push_loss", **options)
    assert (push != pytest.approx(4 * log(2))) == pushed  # the constant of a gate that is shut


def test_duet_deep_teaches_whole_refusals_by_position_and_keeps_answers_by_query():
    targets = deep_targets(
        [(2, 1, 1)] * 4,
        pushed=[False] * 4,
        known=[False] * 4,
        base=[0.0] * 4,
        floor=[0.0] * 4,
    )
    options = DEEP | {"labels": [0, 1, 0, 1], "queries": [0, 0, 1, 1], "retain_weight": 2.0}
    found = {
        k: v.item() for k, v in parts("duet_deep", [odds(1, 2, 1)] * 4, prepared=targets, **options).items()
    }
    kl = 0.25 * log(2)
    assert found["refusal_loss"] == pytest.approx(kl) and found["retain_loss"] == pytest.approx(2 * kl)
    assert found["push_loss"] == 0 and found["loss"] == pytest.approx(5 * kl)
