"""Test an integration as this package tests itself: inputs, an error budget, and a gradient contract.

* `make_problem` draws inputs with real probability mass: a teacher that correlates with the student, logits of
  standard deviation 2 to 4. On tiny or zero logits every softmax is flat and every wrong gradient is small.
* `assert_within_budget` asks that a result errs no more than torch itself would in that dtype, judged in fp64. An
  absolute tolerance large enough for bf16 accepts a gradient of zeros; this does not.
* `OPS` is one table of every differentiable operation with its options, `CHECKS` what each of them has to obey, and
  `gradient_contract(op, problem)` runs them. An `Op` of your own (a loss built on these, say) obeys the same.

Definition: `impl="reference"`. Uses public functions only; must not know how anything is computed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .functional import (
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_topk,
    topk_distill_loss,
)
from .head import LMHead, TopK

IGNORE = -100
LEAVES = ("hidden", "weight", "bias")


class IllConditioned(AssertionError):
    """The case says nothing: torch's own fp32 result is more than 2 % away from the truth."""


# --- inputs ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Student, teacher and labels for one call. `hidden`, `weight` and `bias` are the student's leaves."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None
    teacher_hidden: Tensor  # [..., D_t]
    teacher_weight: Tensor  # [V_t, D_t]
    teacher_bias: Tensor | None
    labels: Tensor  # [...]
    softcap: float | None = None
    scale: float = 1.0
    vocab_size: int | None = None

    @property
    def head(self) -> LMHead:
        return LMHead(self.weight, self.bias, self.softcap, self.scale, self.vocab_size)

    @property
    def teacher_head(self) -> LMHead:
        return LMHead(self.teacher_weight, self.teacher_bias, self.softcap, self.scale, self.vocab_size)

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.hidden.shape[:-1])

    @property
    def leaves(self) -> tuple[str, ...]:
        return LEAVES if self.bias is not None else LEAVES[:2]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype, detached."""
        fields = {
            name: getattr(self, name)
            for name in (*LEAVES, "teacher_hidden", "teacher_weight", "teacher_bias")
        }
        cast = {name: None if x is None else x.detach().to(dtype) for name, x in fields.items()}
        return dataclasses.replace(self, **cast)

    def requiring(self, names: Iterable[str]) -> Problem:
        """Fresh leaves, of which only `names` require grad."""
        names = set(names)
        fresh = {n: getattr(self, n).detach().clone().requires_grad_(n in names) for n in self.leaves}
        return dataclasses.replace(self, **fresh)

    def teacher_topk(self, k: int = 8, temperature: float = 1.0) -> TopK:
        """The teacher's top-k as data: the same fp32 numbers whatever dtype the problem has been cast to."""
        top = linear_topk(
            self.teacher_hidden.double(),
            _double(self.teacher_head),
            k,
            temperature=temperature,
            impl="reference",
        )
        acc = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        return top._replace(
            values=top.values.float().to(acc), tail_logsumexp=top.tail_logsumexp.float().to(acc)
        )


def _double(head: LMHead) -> LMHead:
    bias = None if head.bias is None else head.bias.detach().double()
    return dataclasses.replace(head, weight=head.weight.detach().double(), bias=bias)


def make_problem(
    lead: int | tuple[int, ...] = 37,
    v: int = 203,
    d: int = 45,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    std: float = 3.0,
    gap: float = 0.3,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    pad: int = 0,
    teacher_d: int | None = None,
    teacher_v: int | None = None,
    ties: str | None = None,
) -> Problem:
    """Draw a `Problem` whose softmaxes have real probability mass.

    Args:
        lead, v, d: leading shape, vocabulary, hidden size.
        dtype, device, seed: of all floating-point tensors; the same seed gives the same numbers (rounded).
        std: standard deviation of the student's logits before softcap.
        gap: size of what the teacher's hidden states and weights add to the student's, relative to theirs.
        bias, softcap, scale: as in `LMHead`.
        pad: rows of huge logits behind the vocabulary that `vocab_size` must keep out.
        teacher_d, teacher_v: the teacher's hidden and vocabulary size where they differ.
        ties: `quantised` (logits are small integers, exact in every dtype, so ties are exact too) or `equal` (all
            logits of a token are the same).
    """
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    lead = (lead,) if isinstance(lead, int) else tuple(lead)
    if ties is not None:
        pick = functools.partial(torch.randint, -1, 2, generator=generator, dtype=torch.float64)
        hidden, weight = (
            pick((*lead, d)),
            pick((v, d)) if ties == "quantised" else pick((1, d)).expand(v, d).clone(),
        )
        teacher_hidden, teacher_weight = pick((*lead, d)), weight.clone()
    else:
        hidden, weight = normal(*lead, d), std / scale / d**0.5 * normal(v, d)
        teacher_hidden, teacher_weight = hidden, weight
        if teacher_d is not None:
            # Orthonormal rows or columns: the teacher's logits are (nearly) the student's, seen in another basis.
            wide = torch.linalg.qr(normal(max(d, teacher_d), max(d, teacher_d))).Q[:d, :teacher_d]
            teacher_hidden, teacher_weight = hidden @ wide, weight @ wide
        if teacher_v is not None:
            more = std / scale / d**0.5 * normal(max(teacher_v - v, 0), teacher_weight.shape[1])
            teacher_weight = torch.cat([teacher_weight, more])[:teacher_v]
        teacher_hidden = teacher_hidden + gap * normal(teacher_hidden.shape)
        teacher_weight = teacher_weight + gap * weight.std() * normal(teacher_weight.shape)
    labels = torch.randint(0, min(v, teacher_weight.shape[0]), lead, generator=generator)
    bias_v = normal(v + pad) / scale if bias else None
    if pad:
        # A tenfold copy of real rows: the largest logits of every token, unless vocab_size is obeyed.
        weight = torch.cat([weight, 10 * weight[:pad]])
        teacher_weight = torch.cat([teacher_weight, 10 * teacher_weight[:pad]])
    teacher_bias = (
        None if bias_v is None else bias_v[torch.arange(teacher_weight.shape[0]) % bias_v.shape[0]] + 0.1
    )

    def rounded(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype)

    return Problem(
        hidden=rounded(hidden),
        weight=rounded(weight),
        bias=None if bias_v is None else rounded(bias_v),
        teacher_hidden=rounded(teacher_hidden),
        teacher_weight=rounded(teacher_weight),
        teacher_bias=None if teacher_bias is None else rounded(teacher_bias),
        labels=labels.to(device),
        softcap=softcap,
        scale=scale,
        vocab_size=v if pad else None,
    )


# --- the error budget ------------------------------------------------------------------------------------------


def assert_within_budget(
    actual: Tensor,
    truth: Tensor,
    baseline: Tensor,
    *,
    selected: Tensor | None = None,
    name: str = "result",
) -> None:
    """Assert that `actual` errs at most twice as much as `baseline` does, plus 4 eps of its dtype.

    `rms(actual - truth) <= 2 rms(baseline - truth) + 4 eps rms(truth)`, for the selected part and for the rest apart
    (a gradient that is right only at the chosen ids must not pass on their account), and a like bound, four times
    wider, for every single row (one stale row among thousands must not drown). Where the truth is not finite the
    result has to be the same infinity or NaN; everywhere else it has to be finite.

    Args:
        actual: the result to judge.
        truth: the definition in fp64, from inputs already rounded to the tested dtype.
        baseline: torch with fp32 logits from the same inputs, in the dtype of `actual`.
        selected: bool, of a leading shape of `actual` (`[V]` for dW): the part that is judged apart.
        name: of what is judged, for the message.

    Raises:
        IllConditioned: the baseline itself errs more than 2 %: choose another case.
        AssertionError: over budget, naming the part and both errors.

    Example:
        >>> x = torch.randn(4, 8)
        >>> assert_within_budget(x, x.double(), x)
        >>> assert_within_budget(torch.zeros_like(x), x.double(), x)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: result: relative error 1.0e+00, ...
    """
    assert actual.shape == truth.shape == baseline.shape, (
        f"{name}: shape {list(actual.shape)}, wanted {list(truth.shape)} (baseline {list(baseline.shape)})"
    )
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype}, wanted {baseline.dtype}"
    eps = torch.finfo(actual.dtype).eps
    finite = truth.isfinite()
    _assert_same_nonfinite(actual, truth, finite, name)
    truth = truth.double().where(finite, 0)
    actual_error = (actual.double().where(finite, 0) - truth).abs()
    baseline_error = (baseline.double().where(finite, 0) - truth).abs()
    parts = {"": torch.ones(truth.shape[:1] if truth.dim() else (), dtype=torch.bool, device=truth.device)}
    if selected is not None:
        parts = {" (selected)": selected, " (the rest)": ~selected}
    for part, where in parts.items():
        size = _rms(truth[where])
        ours, theirs = _rms(actual_error[where]), _rms(baseline_error[where])
        if theirs > 0.02 * size:
            raise IllConditioned(f"{name}{part}: the fp32 baseline errs by {theirs / size:.1e} itself")
        budget = 2 * theirs + 4 * eps * size
        relative = [x / (size or 1.0) for x in (ours, theirs, budget)]
        assert ours <= budget, "{}{}: relative error {:.1e}, torch's own {:.1e}, budget {:.1e}".format(
            name, part, *relative
        )
        if truth.dim() > 1 and truth[where].numel():
            _assert_rows(actual_error[where], baseline_error[where], truth[where], eps, name + part)


def _assert_same_nonfinite(actual: Tensor, truth: Tensor, finite: Tensor, name: str) -> None:
    wrong = actual.isfinite() != finite
    assert not wrong.any(), (
        f"{name}: {int((wrong & finite).sum())} entries are not finite but should be, and "
        f"{int((wrong & ~finite).sum())} are finite but should not be"
    )
    same = (actual.double() == truth.double()) | (actual.isnan() & truth.isnan())
    assert bool(same[~finite].all()), f"{name}: other infinities or NaNs than the definition's"


def _assert_rows(ours: Tensor, theirs: Tensor, truth: Tensor, eps: float, name: str) -> None:
    rows = [x.flatten(1).square().mean(1).sqrt() for x in (ours, theirs, truth)]
    excess = rows[0] - (8 * rows[1].max() + 16 * eps * rows[2])
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"{name}: row {worst} of the part errs by {float(rows[0][worst]):.1e} where its own size is "
        f"{float(rows[2][worst]):.1e} and torch's worst row errs by {float(rows[1].max()):.1e}"
    )


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


# --- the table of operations -----------------------------------------------------------------------------------


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
    """

    name: str
    call: Callable[..., Tensor]
    ids: Callable[[Problem], Tensor]
    resolve: str
    loss: bool = True
    definition: Callable[..., Tensor] | None = None

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


def _topk_op(divergence: str, normalization: str | None = None, **options: Any) -> Op:
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

    with_sum = normalization in ("tail", "zeroed", "truncated")
    name = "-".join(["topk", divergence, *([normalization] if normalization else [])])
    resolve = "topk_distill_loss/lse" if with_sum else "topk_distill_loss"
    return Op(name, call, lambda problem: teacher(problem).indices, resolve)


def _distill_op(divergence: str, **options: Any) -> Op:
    def call(problem: Problem, **more: Any) -> Tensor:
        live = problem.teacher_hidden, problem.teacher_head
        chosen = {"k": _k(problem)} if options.get("k") else {}
        return linear_distill_loss(
            problem.hidden, problem.head, *live, divergence=divergence, **{**options, **chosen, **more}
        )

    name = "-".join(
        ["linear", divergence, *(str(o) for n, o in options.items() if n in ("support", "normalization"))]
    )
    return Op(name, call, lambda problem: problem.labels[..., None], "linear_distill_loss")


def _gather(problem: Problem, **options: Any) -> Tensor:
    return linear_gather(problem.hidden, problem.head, problem.teacher_topk(_k(problem)).indices, **options)


def _logsumexp(problem: Problem, **options: Any) -> Tensor:
    return linear_logsumexp(problem.hidden, problem.head, temperature=1.5, **options)


def _complement(problem: Problem, **options: Any) -> Tensor:
    ids = problem.teacher_topk(_k(problem)).indices
    return linear_logsumexp(problem.hidden, problem.head, temperature=0.7, exclude=ids, **options)


def _cross_entropy(problem: Problem, *, mask: Tensor | None = None, **options: Any) -> Tensor:
    labels = problem.labels if mask is None else problem.labels.masked_fill(~mask, IGNORE)
    return linear_cross_entropy(problem.hidden, problem.head, labels, **options)


def _top_ids(problem: Problem) -> Tensor:
    return problem.teacher_topk(_k(problem)).indices


DISTRIBUTIONS = ("forward_kl", "reverse_kl", "jsd", "tvd")

OPS: tuple[Op, ...] = (
    Op("gather", _gather, _top_ids, "linear_gather", loss=False),
    Op("logsumexp", _logsumexp, _top_ids, "linear_logsumexp", loss=False),
    Op("logsumexp-exclude", _complement, _top_ids, "linear_logsumexp", loss=False),
    Op("cross-entropy", _cross_entropy, lambda problem: problem.labels[..., None], "linear_cross_entropy"),
    _topk_op("huber", delta=0.8),
    _topk_op("mse"),
    _topk_op("l1"),
    *(_topk_op(name, "renormalize", temperature=1.5, beta=0.3) for name in DISTRIBUTIONS),
    *(_topk_op(name, "tail", temperature=1.5, beta=0.3) for name in DISTRIBUTIONS),
    _topk_op("forward_kl", "zeroed", temperature=2.0),
    _topk_op("forward_kl", "truncated", temperature=2.0),
    _distill_op("huber", delta=0.8),
    _distill_op("mse"),
    _distill_op("l1"),
    *(_distill_op(name, temperature=1.5, beta=0.3) for name in DISTRIBUTIONS),
    _distill_op("huber", k=8, support="teacher"),
    _distill_op("forward_kl", k=8, support="teacher", normalization="tail"),
    _distill_op("reverse_kl", k=8, support="student"),
    _distill_op("jsd", k=8, support="union", normalization="tail", temperature=1.5),
)


# --- the contract ----------------------------------------------------------------------------------------------


def gradients(
    output: Tensor, problem: Problem, upstream: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Gradients of the leaves that require grad, by name."""
    names = [name for name in problem.leaves if getattr(problem, name).requires_grad]
    leaves = [getattr(problem, name) for name in names]
    return dict(zip(names, torch.autograd.grad(output, leaves, upstream, **options), strict=True))


def _upstream(output: Tensor) -> Tensor:
    """Another factor for every element, some negative and one of them 0."""
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    if upstream.dim() and upstream.shape[0] > 1:
        upstream[1] = 0
    return upstream.to(output.device)


def _selected_rows(op: Op, problem: Problem) -> Tensor:
    chosen = torch.zeros(problem.weight.shape[0], dtype=torch.bool, device=problem.weight.device)
    return chosen.index_fill(0, op.ids(problem).flatten().clamp(min=0), True)


def judge(op: Op, problem: Problem, impl: str, **options: Any) -> None:
    """Values and all gradients, with another upstream factor for each element, against the definition in fp64."""
    true, torch_, ours = (
        (problem.to(torch.float64), op.define),
        (problem, op.define),
        (problem, functools.partial(op.run, impl=impl)),
    )
    results = []
    for case, run in (true, torch_, ours):
        case = case.requiring(case.leaves)
        output = run(case, **options)
        results.append((output.detach(), gradients(output, case, _upstream(output).to(output.dtype))))
    (truth, true_grads), (baseline, torch_grads), (actual, grads) = results
    assert_within_budget(actual, truth, baseline, name=f"{op} value")
    chosen = _selected_rows(op, problem)
    for name in problem.leaves:
        assert_within_budget(
            grads[name],
            true_grads[name],
            torch_grads[name],
            selected=None if name == "hidden" else chosen,
            name=f"{op} d{name}",
        )


def check_definition(op: Op, problem: Problem, impl: str) -> None:
    """Values and gradients agree with the definition."""
    judge(op, problem, impl)


def check_backward_twice(op: Op, problem: Problem, impl: str) -> None:
    """Every backward pass over a retained graph gives the same; accumulated, exactly twice the gradient."""
    case = problem.requiring(problem.leaves)
    output = op.run(case, impl)
    upstream = _upstream(output).to(output.dtype)
    first = gradients(output, case, upstream, retain_graph=True)
    before = {name: gradient.clone() for name, gradient in first.items()}
    for _ in range(2):
        output.backward(upstream, retain_graph=True)
    for name in case.leaves:
        assert torch.equal(first[name], before[name]), f"{op}: a later backward pass wrote into d{name}"
        assert torch.equal(getattr(case, name).grad, 2 * before[name]), (
            f"{op}: d{name} twice is not twice d{name}"
        )


def check_subsets(op: Op, problem: Problem, impl: str) -> None:
    """Every subset of the leaves that require grad gets the gradients that it gets among all; nobody else gets one."""
    case = problem.requiring(problem.leaves)
    output = op.run(case, impl)
    upstream = _upstream(output).to(output.dtype)
    everything = gradients(output, case, upstream)
    for size in range(len(problem.leaves)):
        for names in itertools.combinations(problem.leaves, size):
            case = problem.requiring(names)
            output = op.run(case, impl)
            assert output.requires_grad == bool(names), (
                f"{op}: requires_grad={output.requires_grad} with {names}"
            )
            if names:
                for name, gradient in gradients(output, case, upstream).items():
                    assert torch.equal(gradient, everything[name]), (
                        f"{op}: d{name} depends on who else requires grad"
                    )


def check_layouts(op: Op, problem: Problem, impl: str) -> None:
    """Strided inputs and a leading shape of several dimensions give the gradients of the flat contiguous ones."""
    flat = problem.requiring(problem.leaves)
    output = op.run(flat, impl)
    upstream = _upstream(output).to(output.dtype)
    wanted = gradients(output, flat, upstream)
    n = problem.hidden.shape[0]
    odd = problem.requiring(problem.leaves)
    strided = {
        "hidden": torch.stack([odd.hidden, odd.hidden], 1)[:, 1].T.contiguous().T[:, None],
        "weight": torch.cat([odd.weight, odd.weight], 1)[:, : odd.weight.shape[1]],
        "bias": None if odd.bias is None else torch.stack([odd.bias, odd.bias], 1)[:, 0],
        "labels": odd.labels[:, None],
        "teacher_hidden": torch.cat([odd.teacher_hidden] * 2, 1)[:, None, : odd.teacher_hidden.shape[1]],
        "teacher_weight": odd.teacher_weight.T.contiguous().T,
    }
    output = op.run(dataclasses.replace(odd, **strided), impl)
    assert output.shape[:2] == (n, 1), f"{op}: leading shape {list(output.shape)}"
    got = gradients(output, odd, upstream[:, None])
    for name in problem.leaves:
        _assert_close(got[name], wanted[name], f"{op} strided d{name}")


def check_masked_rows(op: Op, problem: Problem, impl: str) -> None:
    """Masked tokens (even with NaN in them) add nothing; all masked is a zero loss with zero gradients."""
    if not op.loss:
        return
    n = problem.hidden.shape[0]
    mask = torch.arange(n, device=problem.hidden.device) % 3 != 1
    poisoned = problem.hidden.clone()
    poisoned[~mask] = torch.nan
    teacher = problem.teacher_hidden.clone()
    teacher[~mask] = torch.nan
    clean = dataclasses.replace(problem, hidden=problem.hidden[mask], labels=problem.labels[mask])
    clean = dataclasses.replace(clean, teacher_hidden=problem.teacher_hidden[mask]).requiring(problem.leaves)
    dirty = dataclasses.replace(problem, hidden=poisoned, teacher_hidden=teacher).requiring(problem.leaves)
    for reduction in ("none", "mean", "sum"):
        wanted, got = (
            op.define(clean, reduction=reduction),
            op.run(dirty, impl, mask=mask, reduction=reduction),
        )
        if reduction == "none":
            assert torch.equal(got[~mask], torch.zeros_like(got[~mask])), f"{op}: masked tokens have a loss"
            got = got[mask]
        _assert_close(got, wanted, f"{op} {reduction} value with a mask")
        wanted, got = gradients(wanted.sum(), clean), gradients(got.sum(), dirty)
        assert torch.equal(got["hidden"][~mask], torch.zeros_like(got["hidden"][~mask])), (
            f"{op}: masked dhidden"
        )
        got["hidden"] = got["hidden"][mask]
        for name in problem.leaves:
            _assert_close(got[name], wanted[name], f"{op} {reduction} d{name} with a mask")
    nobody = torch.zeros_like(mask)
    for reduction in ("none", "mean", "sum"):
        loss = op.run(dirty, impl, mask=nobody, reduction=reduction)
        assert torch.equal(loss, torch.zeros_like(loss)), f"{op}: all masked, loss {loss}"
        for name, gradient in gradients(loss.sum(), dirty).items():
            assert torch.equal(gradient, torch.zeros_like(gradient)), f"{op}: all masked, d{name} is not zero"


def check_reductions(op: Op, problem: Problem, impl: str) -> None:
    """mean, sum, weights and num_items are the token losses added up as documented, and so are their gradients."""
    if not op.loss:
        return
    n = problem.hidden.shape[0]
    mask = torch.arange(n, device=problem.hidden.device) % 4 != 2
    weights = torch.linspace(-0.5, 2.0, n, device=problem.hidden.device)
    case = problem.requiring(problem.leaves)
    rows = op.run(case, impl)
    count = int(mask.sum())
    wanted = {
        "sum": (rows.sum(), {"reduction": "sum"}),
        "mean": (rows.mean(), {"reduction": "mean"}),
        "weights": (
            (rows * weights)[mask].sum() / count,
            {"reduction": "mean", "mask": mask, "weights": weights},
        ),
        "num_items": (rows[mask].sum() / 1000, {"reduction": "mean", "mask": mask, "num_items": 1000}),
        "num_items tensor": (
            rows.sum() / 7,
            {"reduction": "mean", "num_items": torch.tensor(7, device=rows.device)},
        ),
    }
    for what, (truth, options) in wanted.items():
        got = op.run(case, impl, **options)
        assert got.dim() == 0, f"{op}: {what} has shape {list(got.shape)}"
        _assert_close(got, truth, f"{op} {what}")
        # An upstream factor other than 1: it has to reach gradients that were made in the forward pass.
        truth_grads = gradients(-2.5 * truth, case, retain_graph=True)
        for name, gradient in gradients(-2.5 * got, case).items():
            _assert_close(gradient, truth_grads[name], f"{op} {what} d{name}")


def check_nan_row(op: Op, problem: Problem, impl: str) -> None:
    """A NaN in one token makes its own loss NaN and leaves all others alone."""
    hidden = problem.hidden.clone()
    hidden[2, 0] = torch.nan
    case = dataclasses.replace(problem, hidden=hidden).requiring(["hidden"])
    clean = problem.requiring(["hidden"])
    got, wanted = op.run(case, impl), op.run(clean, impl)
    others = torch.arange(hidden.shape[0], device=hidden.device) != 2
    assert bool(got[2].isnan().all()), f"{op}: a NaN token has the loss {got[2]}"
    _assert_close(got[others], wanted[others], f"{op} beside a NaN row")
    got, wanted = gradients(got.sum(), case)["hidden"], gradients(wanted.sum(), clean)["hidden"]
    _assert_close(got[others], wanted[others], f"{op} dhidden beside a NaN row")


def check_second_derivative(op: Op, problem: Problem, impl: str) -> None:
    """A second derivative is refused or right, never silently wrong."""
    small = dataclasses.replace(problem, hidden=problem.hidden[:5], labels=problem.labels[:5])
    small = dataclasses.replace(small, teacher_hidden=problem.teacher_hidden[:5])

    def penalty(run: Callable[..., Tensor]) -> Tensor:
        case = small.requiring(["hidden"])
        first = gradients(run(case).sum(), case, create_graph=True)["hidden"]
        # The hidden states themselves keep the result connected where a gradient was cut off.
        return gradients(first.square().sum() + case.hidden.sum(), case)["hidden"]

    try:
        got = penalty(functools.partial(op.run, impl=impl))
    except RuntimeError as error:
        assert "derivative" in str(error) or "autograd" in str(error), error
        return
    _assert_close(got, penalty(op.define), f"{op} second derivative")


def _assert_close(got: Tensor, wanted: Tensor, name: str) -> None:
    """Equal but for the order of additions: 64 eps of the coarser dtype, relative to the whole tensor."""
    assert got.shape == wanted.shape, f"{name}: shape {list(got.shape)}, wanted {list(wanted.shape)}"
    got, wanted, eps = got.detach(), wanted.detach(), max(torch.finfo(x.dtype).eps for x in (got, wanted))
    error, size = _rms(got.double() - wanted.double()), _rms(wanted.double())
    bound = (64 if eps < 1e-4 else 4) * eps * size
    assert error <= bound, f"{name}: off by {error:.1e} where the size is {size:.1e}"


CHECKS: tuple[Callable[[Op, Problem, str], None], ...] = (
    check_definition,
    check_backward_twice,
    check_subsets,
    check_layouts,
    check_masked_rows,
    check_reductions,
    check_nan_row,
    check_second_derivative,
)


def gradient_contract(op: Op, problem: Problem, impl: str = "auto") -> None:
    """Run every check of `CHECKS` on an operation; `problem` has one leading dimension of at least 5 tokens.

    Example:
        >>> mine = Op(
        ...     "twice",
        ...     lambda problem, **options: 2 * OPS[4].call(problem, **options),
        ...     ids=OPS[4].ids,
        ...     resolve="topk_distill_loss",
        ... )
        >>> gradient_contract(mine, make_problem(9, 31, 8, bias=True))
    """
    for check in CHECKS:
        check(op, problem, impl)
