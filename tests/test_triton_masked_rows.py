"""Rows that do not count: the kernels pass over them, whatever is in them, and copy no hidden states for it."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from duet_kernels import functional, linear_cross_entropy, linear_distill_loss, topk_distill_loss
from duet_kernels.testing import make_problem

KEEP = torch.arange(9) % 3 != 0
HOW = {"weights": KEEP.float(), "impl": "triton"}


def topk(problem, **options):
    return topk_distill_loss(problem.hidden, problem.head, problem.teacher_topk(4), **options, **HOW)


def dense(problem, **options):
    live = problem.teacher_hidden, problem.teacher_weight
    return linear_distill_loss(problem.hidden, problem.head, *live, **options, **HOW)


LOSSES = {
    "cross-entropy": lambda p, **how: linear_cross_entropy(p.hidden, p.head, p.labels, **how, **HOW),
    "raw top-k": topk,
    "top-k with a tail": partial(topk, divergence="forward_kl", normalization="tail"),
    "dense forward_kl": partial(dense, divergence="forward_kl"),
    "dense jsd": partial(dense, divergence="jsd"),
    "dense huber": partial(dense, divergence="huber"),
}


class Copies(TorchDispatchMode):
    """How often a tensor as large as the hidden states is copied with rows filled."""

    def __init__(self, problem):
        super().__init__()
        self.shape, self.filled = problem.hidden.shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.filled += func is torch.ops.aten.masked_fill.Scalar and out.shape == self.shape
        return out


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("trained", [["hidden"], ["hidden", "weight", "bias"]], ids=" ".join)
@pytest.mark.parametrize("name", LOSSES)
def test_masked_rows_are_passed_over_without_a_copy(name, trained, reduction, monkeypatch):
    """As on a GPU, where rows are not left out; with NaN and infinities in them all figures are those of the other rows."""

    def figures():
        loss = LOSSES[name](problem, reduction=reduction)
        return loss, *torch.autograd.grad(loss.sum(), [getattr(problem, leaf) for leaf in trained])

    problem = make_problem(9, 61, 8, bias=True, softcap=20.0).requiring(trained)
    wanted, inner = figures(), functional.loss_tokens

    def as_on_a_gpu(*args):
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return inner(*args)

    monkeypatch.setattr(functional, "loss_tokens", as_on_a_gpu)
    with torch.no_grad():
        for hidden in (problem.hidden, problem.teacher_hidden):
            hidden[~KEEP] = torch.tensor([math.nan, math.inf, -math.inf])[:, None]
    with Copies(problem) as copies:
        got = figures()
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert not copies.filled or "weight" in trained  # dW copies blocks of rows, within the workspace
