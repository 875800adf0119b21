"""One table of every differentiable operation with its options, as functions of a problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import (
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_topk,
    topk_distill_loss,
    topk_distill_stats,
)
from ..head import TopK
from ..options import DISTRIBUTION as DISTRIBUTIONS
from ..options import DIVERGENCES, RAW, DivergenceName, Normalization
from .problems import Problem

IGNORE = -100


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation with its options, as a function of a problem.

    Attributes:
        name: for the test report.
        call: `call(problem, impl=..., **options) -> Tensor`; a loss takes `mask`, `weights`, `reduction` and
            `num_items` as well and is called with `reduction="none"` unless a check is about reductions.
        ids: the vocabulary ids `[..., K]` whose rows of dW are judged apart.
        resolve: the name that `resolve_impl` knows the operation by.
        loss: False for the primitives, which have no reduction.
        definition: what `call` is compared with; None: `call` itself with `impl="reference"`.
        independent: the student's and the teacher's logits are made in two ways (rows gathered, a matrix product), so
            that their rounding errors do not cancel in the difference of the two.
    """

    name: str
    call: Callable[..., Tensor]
    ids: Callable[[Problem], Tensor]
    resolve: str
    loss: bool = True
    definition: Callable[..., Tensor] | None = None
    independent: bool = False

    def run(self, problem: Problem, impl: str, **options: Any) -> Tensor:
        """Per-token values, unless a reduction is asked for."""
        if self.loss:
            options = {"reduction": "none", **options}
        return self.call(problem, impl=impl, **options)

    def define(self, problem: Problem, **options: Any) -> Tensor:
        if self.definition is None:
            return self.run(problem, "reference", **options)
        return self.definition(problem, **({"reduction": "none", **options} if self.loss else options))

    def __str__(self) -> str:
        return self.name


def _k(problem: Problem) -> int:
    return min(8, problem.head.num_ids, problem.teacher_head.num_ids)


def _topk_op(divergence: DivergenceName, normalization: Normalization | None = None, **options: Any) -> Op:
    def teacher(problem: Problem) -> TopK:
        return problem.teacher_topk(_k(problem), options.get("temperature", 1.0))

    def call(problem: Problem, **more: Any) -> Tensor:
        return topk_distill_loss(
            problem.hidden,
            problem.head,
            teacher(problem),
            divergence=divergence,
            normalization=normalization,
            **{**options, **more},
        )

    with_sum = normalization not in (None, "renormalize")
    name = "-".join(["topk", divergence, *([normalization] if normalization else [])])
    resolve = "topk_distill_loss/lse" if with_sum else "topk_distill_loss"
    return Op(name, call, lambda problem: teacher(problem).indices, resolve)


def _distill_op(divergence: DivergenceName, **options: Any) -> Op:
    def call(problem: Problem, **more: Any) -> Tensor:
        live = problem.teacher_hidden, problem.teacher_head
        chosen = {"k": _k(problem)} if options.get("k") else {}
        return linear_distill_loss(
            problem.hidden, problem.head, *live, divergence=divergence, **{**options, **chosen, **more}
        )

    name = "-".join(
        ["linear", divergence, *(str(o) for n, o in options.items() if n in ("support", "normalization"))]
    )

    def ids(problem: Problem) -> Tensor:
        support = options.get("support")
        if support is None:
            return problem.labels[..., None]
        common = min(problem.head.num_ids, problem.teacher_head.num_ids)
        sides = {
            "teacher": (problem.teacher_hidden, problem.teacher_head),
            "student": (problem.hidden, problem.head),
        }
        chosen = [
            linear_topk(hidden, head.narrowed(common), _k(problem), impl="reference").indices
            for side, (hidden, head) in sides.items()
            if support in (side, "union")
        ]
        return torch.cat(chosen, -1)

    return Op(name, call, ids, "linear_distill_loss", independent="support" in options)


def _top_ids(problem: Problem) -> Tensor:
    return problem.teacher_topk(_k(problem)).indices


def _gather(problem: Problem, **options: Any) -> Tensor:
    return linear_gather(problem.hidden, problem.head, _top_ids(problem), **options)


def _logsumexp(problem: Problem, **options: Any) -> Tensor:
    return linear_logsumexp(problem.hidden, problem.head, temperature=1.5, **options)


def _complement(problem: Problem, **options: Any) -> Tensor:
    return linear_logsumexp(
        problem.hidden, problem.head, temperature=0.7, exclude=_top_ids(problem), **options
    )


def _cross_entropy(problem: Problem, *, mask: Tensor | None = None, **options: Any) -> Tensor:
    labels = problem.labels if mask is None else problem.labels.masked_fill(~mask, IGNORE)
    return linear_cross_entropy(problem.hidden, problem.head, labels, **options)


def _stats(problem: Problem, **more: Any) -> Tensor:
    """The loss and log q of a token in one sum: their gradients come in one backward pass."""
    teacher = problem.teacher_topk(_k(problem), 1.5)
    stats = topk_distill_stats(
        problem.hidden,
        problem.head,
        teacher,
        divergence="reverse_kl",
        normalization="generalized",
        temperature=1.5,
        token_ids=problem.labels,
        **more,
    )
    assert stats.logprob is not None
    return stats.loss - 0.7 * stats.logprob


OPS: tuple[Op, ...] = (
    Op("gather", _gather, _top_ids, "linear_gather", loss=False),
    Op("logsumexp", _logsumexp, _top_ids, "linear_logsumexp", loss=False),
    Op("logsumexp-exclude", _complement, _top_ids, "linear_logsumexp", loss=False),
    Op("cross-entropy", _cross_entropy, lambda problem: problem.labels[..., None], "linear_cross_entropy"),
    *(_topk_op(name, delta=0.8) for name in RAW),
    *(
        _topk_op(name, normalization, temperature=1.5, beta=0.3)
        for name in DISTRIBUTIONS
        for normalization in DIVERGENCES[name].normalizations
    ),
    Op("stats-reverse_kl-generalized", _stats, _top_ids, "topk_distill_loss/lse", loss=False),
    *(_distill_op(name, delta=0.8) for name in RAW),
    *(_distill_op(name, temperature=1.5, beta=0.3) for name in DISTRIBUTIONS),
    _distill_op("huber", k=8, support="teacher"),
    _distill_op("forward_kl", k=8, support="teacher", normalization="tail"),
    _distill_op("reverse_kl", k=8, support="student"),
    _distill_op("jsd", k=8, support="union", normalization="tail", temperature=1.5),
)
