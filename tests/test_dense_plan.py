"""The sizes of a walk keep the workspace, make every gradient once, and are those of the table in `dense_plan`."""

import gc

import pytest
import torch

pytest.importorskip("triton")

from dense_walks import columns, few_programs
from triton.runtime.interpreter import GridExecutor

from duet_kernels.head import Need
from duet_kernels.options import Divergence
from duet_kernels.testing import make_problem
from duet_kernels.triton import complement, dense, dense_plan, divergence, tiles
from duet_kernels.triton.dense_plan import Plan, Shape, sweep_bytes
from duet_kernels.triton.primitives import INTERPRETED

MIB, GIB = 2**20, 2**30
NEEDS = [Need(*need) for need in ((1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))]


def walks(plan: Plan):
    return [*([plan.folds] if plan.folds else []), *plan.sweeps]


@pytest.mark.parametrize("workspace", [MIB, 64 * MIB, 256 * MIB, 3 * GIB], ids=str)
@pytest.mark.parametrize("folds", [0, 1, 2])
@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_plans_keep_the_workspace(workspace, folds, need):
    for n in (1, 300, 1000, 8192, 32768):
        for v, d in ((1, 1), (203, 45), (32000, 2048), (128256, 4096), (262144, 8192)):
            for operand, out in ((2, 2), (2, 4), (4, 4)):
                s = Shape(n, v, d, (4, 4), operand, 4, out, folds, need, token=200, partial=24)
                plan = dense_plan.plan.__wrapped__(s, workspace)
                budget = max(workspace - n * s.token, workspace // 2)
                # One row of 16 columns, a slab of W and what is as long as it: below that nothing can be given up.
                smallest = 16 * (2 * 4 + operand) + d * (operand + 16 * 4 + 4) + 8 * v + s.partial
                for w in walks(plan):
                    assert sweep_bytes(s, w) <= max(budget, smallest)
                    assert 0 < w.rows <= n and 0 < w.columns <= v and w.kept <= w.group <= n
                    assert w.rows <= w.kept or w is plan.folds
                    # No buffer is [N, V], whatever the workspace.
                    assert n <= 256 or v <= 16 or max(w.kept, w.rows) * w.columns <= (n * v) // 2 + 16 * n
                for wanted, done in zip(need, zip(*(w.need for w in plan.sweeps), strict=True), strict=False):
                    assert sum(done) == wanted  # every gradient is made, and made once
                assert bool(plan.sweeps) == any(need)
                at_hand = [w for w in plan.sweeps if w.columns == v]
                assert plan.folds or not folds or (len(plan.sweeps) == 1 and at_hand)
                assert all(w.group == n for w in plan.sweeps if any(w.need[1:]))


@pytest.mark.parametrize("gib", [0.25, 1.25, 2.25, 3.0])
@pytest.mark.parametrize("sides, trainable, wanted", [
    (2, False, [(512, 128), (1024, 1024), (4096, 1024), (4096, 2048)]),
    (2, True, [None, None, (2048, 512), (4096, 1024)]),
    (1, False, [(512, 256), (2048, 1024), (4096, 2048), (4096, 4096)]),
    (1, True, [None, None, (2048, 1024), (4096, 2048)]),
])  # fmt: skip
def test_the_anchor(gib, sides, trainable, wanted):
    """The table in the docstring of `dense_plan`: (M, R), or None where logits are made again."""
    partial = 24 if sides == 2 else 8
    for folds in (1, 2):
        s = Shape(
            8192,
            128256,
            4096,
            (4,) * sides,
            2,
            4,
            2,
            folds,
            Need(True, trainable),
            token=200,
            partial=partial,
        )
        plan = dense_plan.plan.__wrapped__(s, int(gib * GIB))
        got = None if plan.folds else (plan.sweeps[0].kept, plan.sweeps[0].rows)
        assert got == wanted[[0.25, 1.25, 2.25, 3.0].index(gib)]


def test_a_half_dweight_lends_its_memory():
    """At the anchor M = 2048 and R = 1024 rows need no memory beside the sum of dW: they lie in the half dW."""
    s = Shape(8192, 128256, 4096, (4,), 2, 4, 2, 1, Need(True, True))
    (w,) = dense_plan.plan.__wrapped__(s, int(2.2 * GIB)).sweeps
    assert dense_plan.lent(s, w) == 128256 * 4096 * 2 == sum(dense_plan.buffers(s, w))
    assert sweep_bytes(s, w) == 128256 * 4096 * 4 + 2048 * 4096 * 2
    assert dense_plan.lent(s._replace(out=4), w) == 0  # summed in place
    assert dense_plan.placed([100, 0, 300, 200], 512) == [0, None, None, 256]


def peak_bytes(function):
    """High-water mark of the allocator while `function` runs, above what was allocated before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.skipif(not INTERPRETED, reason="the record is that of the CPU's allocator")
@pytest.mark.parametrize("kilobytes, at_hand", [(400, True), (200, False)])
@pytest.mark.parametrize("loss", ["jsd", "cross-entropy", "forward_kl-tail"])
def test_the_allocator_agrees_with_the_plan(kilobytes, at_hand, loss, monkeypatch):
    """Beyond its results a call allocates no more than the workspace. In fp32, which a CPU multiplies without copies."""
    few_programs(monkeypatch)
    columns(monkeypatch, 256)
    launch = GridExecutor.__call__
    # The interpreter leaves what a launch was given in a cycle of references.
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda *args, **how: (launch(*args, **how), gc.collect())[0]
    )
    for name, size in (
        ("DENSE_WHOLE_ROWS", 16),
        ("DENSE_LEAST_ROWS", 8 if at_hand else 64),
        ("DENSE_LEAST_SUMMED", 16),
    ):
        monkeypatch.setattr(tiles, name, size)
    monkeypatch.setattr(tiles, "DENSE_LEAST_COLUMNS", 128)
    seen = []
    plan = dense_plan.plan
    monkeypatch.setattr(
        dense, "plan", lambda shape, _: seen.append((shape, plan(shape, kilobytes << 10))) or seen[-1][1]
    )
    case = make_problem(64, 1000, 16, bias=True)
    factor, need, k = torch.ones(64), Need(True, True, True), 8
    ids, given = torch.arange(64 * k).view(64, k), (torch.randn(64, k), torch.randn(64))

    def run():
        if loss == "jsd":
            spec = Divergence("jsd", "renormalize", 1.0, 0.3, 1.0)
            return divergence.linear_divergence(
                case.hidden, case.head, case.teacher_hidden, case.teacher_head, factor, spec, need
            )
        if loss == "cross-entropy":
            return complement.linear_cross_entropy(case.hidden, case.head, case.labels, factor, need)
        spec = Divergence("forward_kl", "tail", 1.0, 0.3, 1.0)
        return complement.topk_loss_with_tail(case.hidden, case.head, ids, *given, factor, spec, need)

    gc.collect()
    gc.freeze()  # only what the launches leave is looked at
    try:
        peak = peak_bytes(run)
    finally:
        gc.unfreeze()
    results = 4 * (64 + 64 * 16 + 1000 * 16 + 1000)
    ((shape, made),) = seen
    assert (made.folds is None) == at_hand
    planned = max(sweep_bytes(shape, w) for w in walks(made))
    assert results + planned / 2 < peak <= results + (kilobytes << 10)


def test_the_plan_of_another_workspace_is_another(monkeypatch):
    """`run` asks for the workspace of its device at every call."""
    seen = []
    monkeypatch.setattr(dense, "workspace_bytes", lambda device: 12345678)
    monkeypatch.setattr(
        dense, "plan", lambda shape, workspace: seen.append(workspace) or dense_plan.plan(shape, workspace)
    )
    few_programs(monkeypatch)
    case = make_problem(5, 31, 8, device="cpu" if INTERPRETED else "cuda")
    complement.linear_cross_entropy(
        case.hidden, case.head, case.labels, torch.ones_like(case.hidden[:, 0]), Need(True)
    )
    assert seen == [12345678]


@pytest.mark.parametrize("kilobytes", [4, 16, 40, 100, 4000])
def test_the_log_sum_exp_is_made_of_the_same_products_with_and_without_dh(kilobytes, monkeypatch):
    """dW is made of it: another shape of product gives other bits, and dW would depend on who else wants a gradient."""
    few_programs(monkeypatch)
    monkeypatch.setattr(dense, "workspace_bytes", lambda device: kilobytes << 10)
    case = make_problem(37, 203, 8, device="cpu" if INTERPRETED else "cuda")
    ids, original, made = case.labels[:, None], dense._Walk._logits, []
    monkeypatch.setattr(
        dense._Walk,
        "_logits",
        lambda walk, rows, slab: made.append((rows, slab)) or original(walk, rows, slab),
    )

    def tail(need):
        made.clear()
        value = complement.complement_and_values(case.hidden, case.head, ids, 1.0, False, False, need)[0]
        return value, list(made)

    alone, products = tail(Need(False))
    beside, more = tail(Need(True))
    assert torch.equal(alone, beside)
    assert products == more[: len(products)]
