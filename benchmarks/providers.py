"""Who is measured: one record per operation and implementation, each called as its own documentation asks.

`PROVIDERS` lists them. `build(case)` returns a function of `Inputs` with the outputs of `definitions.py`.
A record whose package is missing, or that cannot run here, says so in `absent`; it never runs something else.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import OPS, Case, Inputs
from benchmarks.definitions import DEFINITIONS, fp32_logits, gathered_logits, loss_at_ids, topk_loss
from benchmarks.harness import version
from duet_kernels import (
    LMHead,
    TopK,
    linear_cross_entropy,
    linear_distill_loss,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    resolve_impl,
    topk_distill_loss,
)

OURS = "duet_kernels"
Run = Callable[[Inputs], Any]


@dataclasses.dataclass(frozen=True)
class Provider:
    """`package` is the distribution whose version counts; `module` what must be importable."""

    name: str
    impl: str
    op: str
    build: Callable[[Case], Run]
    package: str = "torch"
    module: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    divergences: tuple[str, ...] | None = None  # None: all of the operation's
    obstacle: Callable[[Case, torch.device], str | None] = lambda case, device: None
    workspace_mb: int | None = None  # that it is allowed, where that is not the default

    @property
    def label(self) -> str:
        return f"{self.name} {self.impl}"

    @property
    def version(self) -> str:
        found = version(self.package)
        return "checkout" if found == "absent" and self.name == OURS else found

    def takes(self, case: Case) -> bool:
        return self.op == case.op and (self.divergences is None or case.divergence in self.divergences)

    def absent(self, case: Case, device: torch.device | str) -> str | None:
        """The sentence that says why it does not run here, or None."""
        device = torch.device(device)
        if importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed"
        if device.type not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        return self.obstacle(case, device)


PROVIDERS: list[Provider] = []


def provider(name: str, impl: str, op: str, **fields: Any) -> Callable[[Callable[[Case], Run]], Any]:
    """Register a build function."""

    def register(build: Callable[[Case], Run]) -> Callable[[Case], Run]:
        PROVIDERS.append(Provider(name, impl, op, build, **fields))
        return build

    return register


def chosen(names: list[str] | None) -> list[Provider]:
    """Providers by name ("torch") or by name and implementation ("torch/compile"); None means all."""
    if names is None:
        return list(PROVIDERS)
    known = {p.name for p in PROVIDERS} | {f"{p.name}/{p.impl}" for p in PROVIDERS}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"providers: wanted some of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return [p for p in PROVIDERS if p.name in names or f"{p.name}/{p.impl}" in names]


# --- ours: every implementation ---------------------------------------------------------------------------------


WORKSPACES_MB = 256, 1024, 3072  # beside the one that a user gets who sets none


def _ours(
    op: str, call: Callable[[Case, Inputs, str], Any], divergences: tuple[str, ...] | None = None
) -> None:
    """Register `call(case, inputs, impl)`; `divergences`: those of which the time depends on the workspace."""
    _our_provider(op, call, "chunked", None)
    _our_provider(op, call, "triton", None)
    for workspace_mb in WORKSPACES_MB:
        _our_provider(op, call, "triton", workspace_mb, divergences=divergences)


def _our_provider(
    op: str, call: Callable[[Case, Inputs, str], Any], impl: str, workspace_mb: int | None, **fields: Any
) -> None:
    def build(case: Case) -> Run:
        return lambda x: call(case, x, impl)

    def obstacle(case: Case, device: torch.device) -> str | None:
        try:
            resolve_impl(op + "/lse" if case.has_tail else op, device, case.dtype, impl)
        except RuntimeError as error:
            return str(error).split(": ", 1)[1].split(". Use impl")[0]

    PROVIDERS.append(
        Provider(
            OURS,
            impl if workspace_mb is None else f"{impl} {size_of(workspace_mb)}",
            op,
            build,
            package="duet-kernels",
            module=OURS,
            # Triton's interpreter runs on a CPU too, but its time says nothing.
            devices=("cuda",) if impl == "triton" else ("cpu", "cuda"),
            obstacle=obstacle,
            workspace_mb=workspace_mb,
            **fields,
        )
    )


def size_of(mb: int) -> str:
    return f"{mb >> 10} GiB" if mb >= 1024 else f"{mb} MiB"


def _our_topk(case: Case, x: Inputs, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    top = linear_topk(x.teacher_hidden, x.teacher_weight, case.k, impl=impl)
    return top.values, top.indices, top.logsumexp


def _our_topk_loss(case: Case, x: Inputs, impl: str) -> Tensor:
    divergence, _, normalization = case.divergence.partition("/")
    how = {"divergence": divergence, "normalization": normalization or None}
    return topk_distill_loss(x.hidden, LMHead(x.weight), x.teacher, impl=impl, **how)


def _our_dense_loss(case: Case, x: Inputs, impl: str) -> Tensor:
    heads = x.hidden, x.weight, x.teacher_hidden, x.teacher_weight
    return linear_distill_loss(*heads, divergence=case.divergence, impl=impl)


def _our_logsumexp(case: Case, x: Inputs, impl: str) -> Tensor:
    exclude = x.teacher.indices if case.divergence == "exclude" else None
    return linear_logsumexp(x.hidden, x.weight, exclude=exclude, impl=impl)


_ours("linear_topk", _our_topk)
_ours("topk_distill_loss", _our_topk_loss, divergences=("forward_kl/tail",))
_ours("linear_distill_loss", _our_dense_loss)
_ours(
    "linear_cross_entropy",
    lambda case, x, impl: linear_cross_entropy(x.hidden, x.weight, x.labels, impl=impl),
)
_ours(
    "linear_token_stats",
    lambda case, x, impl: tuple(linear_token_stats(x.hidden, x.weight, x.labels, impl=impl)),
)
_ours("linear_logsumexp", lambda case, x, impl: (_our_logsumexp(case, x, impl),))


# --- torch ------------------------------------------------------------------------------------------------------


def _torch(op: str) -> None:
    def eager(case: Case) -> Run:
        return lambda x: DEFINITIONS[op](case, x, fp32_logits)

    def compiled(case: Case) -> Run:
        return torch.compile(eager(case), dynamic=False)

    PROVIDERS.append(Provider("torch", "eager", op, eager))
    PROVIDERS.append(Provider("torch", "compile", op, compiled))


for _op in OPS:
    _torch(_op)


class _RowChunks(torch.autograd.Function):
    """A top-k loss over a dense product in slices of tokens, the gradient made in the forward pass: the way of those
    libraries (VeOmni, axolotl) that have one."""

    @staticmethod
    def forward(ctx, case: Case, x: Inputs, hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
        dhidden, dweight = torch.empty_like(hidden), None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                logits = fp32_logits(hidden[part].detach(), weight.detach()).requires_grad_()
                top = TopK(x.teacher.values[part], x.teacher.indices[part], x.teacher.tail_logsumexp[part])
                loss = topk_loss(case, logits, top).sum() / hidden.shape[0]
            dlogits = torch.autograd.grad(loss, logits)[0].to(hidden.dtype)
            total += loss.detach()
            dhidden[part] = dlogits @ weight
            if ctx.needs_input_grad[3]:
                share = (dlogits.T @ hidden[part]).float()
                dweight = share if dweight is None else dweight.add_(share)
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return None, None, grad * dhidden, None if dweight is None else grad * dweight, None


@provider("torch", "row chunks", "topk_distill_loss")
def _torch_row_chunks(case: Case) -> Run:
    rows = max(1, (64 << 20) // (4 * case.v))  # 64 MiB of fp32 logits at a time
    return lambda x: _RowChunks.apply(case, x, x.hidden, x.weight, rows)


# What needs only the k logits, and makes no others.
ONLY_K = {"op": "topk_distill_loss", "divergences": ("huber", "forward_kl")}


@provider("torch", "gather", **ONLY_K)
def _torch_gather(case: Case) -> Run:
    def run(x: Inputs) -> Tensor:
        logits = gathered_logits(x.hidden, x.weight, x.teacher.indices)
        return loss_at_ids(case, logits, x.teacher.values).mean()

    return run


@provider("torch", "gather compile", **ONLY_K)
def _torch_gather_compiled(case: Case) -> Run:
    return torch.compile(_torch_gather(case), dynamic=False)


class _GatherChunks(torch.autograd.Function):
    """The gather in slices of tokens, the gradient made in the forward pass; dW is summed in one fp32 buffer."""

    @staticmethod
    def forward(ctx, case: Case, x: Inputs, hidden: Tensor, weight: Tensor, tokens: int) -> Tensor:
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], tokens):
            part = slice(start, start + tokens)
            ids = x.teacher.indices[part]
            rows = F.embedding(ids, weight)
            logits = (rows * hidden[part, None]).sum(-1, dtype=torch.float32).requires_grad_()
            with torch.enable_grad():
                loss = loss_at_ids(case, logits, x.teacher.values[part]).sum() / hidden.shape[0]
            dlogits = torch.autograd.grad(loss, logits)[0]
            total += loss.detach()
            dhidden[part] = rows.mul_(dlogits[:, :, None]).sum(1)
            if dweight is not None:
                share = dlogits[:, :, None] * hidden[part, None]
                dweight.index_add_(0, ids.flatten(), share.flatten(0, 1))
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _RowChunks.backward(ctx, grad)


@provider("torch", "gather chunks", **ONLY_K)
def _torch_gather_chunks(case: Case) -> Run:
    def run(x: Inputs) -> Tensor:
        room = 256 << 20 if x.hidden.is_cuda else 4 << 20  # of gathered rows: on a CPU they stay in its cache
        tokens = max(1, room // (x.weight.element_size() * case.k * case.d))
        return _GatherChunks.apply(case, x, x.hidden, x.weight, tokens)

    return run


@provider(
    "torch",
    "F.linear_cross_entropy",
    "linear_cross_entropy",
    obstacle=lambda case, device: None if hasattr(F, "linear_cross_entropy") else "comes with torch 2.13",
)
def _torch_linear_cross_entropy(case: Case) -> Run:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x: F.linear_cross_entropy(x.hidden, x.weight, x.labels, options=options)


# --- peers ------------------------------------------------------------------------------------------------------

TEACHER_SHARE = {"forward_kl": 0.0, "jsd": 0.5}  # beta of TRL and Liger: 0 is their forward KL


@provider(
    "trl", "ChunkedDivergence", "linear_distill_loss",
    divergences=tuple(TEACHER_SHARE), package="trl", module="trl",
)  # fmt: skip
def _trl(case: Case) -> Run:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = TEACHER_SHARE[case.divergence]

    def run(x: Inputs) -> Tensor:
        heads = x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None
        return ChunkedDivergenceFunction.apply(*heads, beta)[0].mean()

    return run


LIGER = {"package": "liger_kernel", "module": "liger_kernel"}
JSD = {"divergences": tuple(TEACHER_SHARE), **LIGER}


@provider("liger", "chunked JSD", "linear_distill_loss", **JSD)
def _liger_chunked(case: Case) -> Run:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=TEACHER_SHARE[case.divergence]
    )
    return lambda x: loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels)


@provider("liger", "FusedLinearJSD", "linear_distill_loss", devices=("cuda",), **JSD)
def _liger_jsd(case: Case) -> Run:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=TEACHER_SHARE[case.divergence], accum_dtype=torch.float32)
    return lambda x: loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, None)


@provider(
    "liger",
    "FusedLinearKLDiv",
    "linear_distill_loss",
    devices=("cuda",),
    divergences=("forward_kl",),
    **LIGER,
)
def _liger_kl(case: Case) -> Run:
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    loss = LigerFusedLinearKLDivLoss(accum_dtype=torch.float32)

    def run(x: Inputs) -> Tensor:
        with torch.no_grad():  # it takes the teacher's probabilities, so making them is part of the call
            probabilities = fp32_logits(x.teacher_hidden, x.teacher_weight).softmax(-1)
        return loss(x.hidden, x.weight, probabilities)

    return run


@provider("liger", "FusedLinearCrossEntropy", "linear_cross_entropy", devices=("cuda",), **LIGER)
def _liger_cross_entropy(case: Case) -> Run:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda x: loss(x.weight, x.hidden, x.labels)


def _cut(case: Case, **options: Any) -> Run:
    from cut_cross_entropy import linear_cross_entropy as cce

    return lambda x: cce(x.hidden, x.weight, x.labels, **options)


CCE = {"package": "cut_cross_entropy", "module": "cut_cross_entropy", "devices": ("cuda",)}


@provider("cut_cross_entropy", "filtered", "linear_cross_entropy", **CCE)
def _cut_filtered(case: Case) -> Run:
    return _cut(case)


@provider("cut_cross_entropy", "exact", "linear_cross_entropy", **CCE)
def _cut_exact(case: Case) -> Run:
    return _cut(case, filter_eps=None)


@provider(
    "quack",
    "chunked_linear_cross_entropy",
    "linear_cross_entropy",
    package="quack-kernels",
    module="quack",
    devices=("cuda",),
    obstacle=lambda case, device: "wants a multiple of 8 tokens" if case.n % 8 else None,
)
def _quack(case: Case) -> Run:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x: chunked_linear_cross_entropy(x.hidden, x.weight, x.labels)
