"""What the processes ("ranks") of a group exchange, and how the rows of a head's weight lie on them.

Every function here is collective: all ranks of the group have to call it, in the same order. A rank that died, or that
calls something else, makes the others raise when the timeout of the group is over (`torch.distributed.new_group(timeout=)`).

Derivatives follow one convention: **every rank computes the same loss**, and calls `backward` on it. Then

    replicated    the same tensor on all ranks enters a computation of each rank's own: gradients are summed over the ranks
    summed        a sum over the ranks: the gradient of each term is the gradient of the sum, nothing is exchanged
    gathered      the tensors of all ranks: each rank takes the gradient of its own, nothing is exchanged

Legend: R ranks.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .dispatch import acc_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# --- exchange ----------------------------------------------------------------------------------------------------


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """`[R, ...]` the tensors of all ranks, which have one shape."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    _collective(dist.all_gather, parts, x.detach().contiguous(), group=group)
    return torch.stack(parts)


def all_reduce(x: Tensor, group: ProcessGroup, op: Any = None) -> Tensor:
    """The sum (or what `op` says) over the ranks; `x` is left alone."""
    out = x.detach().clone(memory_format=torch.contiguous_format)
    _collective(dist.all_reduce, out, op=op or dist.ReduceOp.SUM, group=group)
    return out


def _collective(run: Any, *args: Any, group: ProcessGroup, **options: Any) -> None:
    try:
        run(*args, group=group, **options)
    except RuntimeError as error:
        raise RuntimeError(
            f"head.group: rank {group.rank()} of {group.size()} waited for the others and got an error. One of them ended, "
            "raised an error of its own (look there first), or does not make the same calls; the group's timeout says for "
            f"how long is waited. {error}"
        ) from error


# --- with a derivative -------------------------------------------------------------------------------------------


def replicated(x: Tensor, group: ProcessGroup) -> Tensor:
    """x, whose gradient is the sum over the ranks; halves are summed in fp32."""
    return _Replicated.apply(x, group)


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the ranks."""
    return _Summed.apply(x, group)


def gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """`[R, ...]` the tensors of all ranks, which have one shape."""
    return _Gathered.apply(x, group, 1.0)


_SENT = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)  # and what is floating point


def gather_tokens(
    tensors: dict[str, Tensor], group: ProcessGroup, averaged: bool, kind: str = ""
) -> dict[str, Tensor]:
    """The tokens (the first dimension) of all ranks, one rank's after the other's; each may have another number of them.

    First each says what it gives: only the numbers of tokens may differ.
    """
    shapes = {name: (str(x.dtype).removeprefix("torch."), list(x.shape)) for name, x in tensors.items()}
    device = next(iter(tensors.values())).device
    text = json.dumps([kind, shapes]).encode().ljust(512)  # each says at most 512 characters
    row = torch.tensor(list(text), dtype=torch.uint8, device=device)
    said = [json.loads(bytes(each)) for each in all_gather(row, group).tolist()]
    kinds = {repr((k, {name: (dtype, size[1:]) for name, (dtype, size) in each.items()})) for k, each in said}
    if len(kinds) > 1 or not all(size for _, each in said for _, size in each.values()):
        told = (", ".join([k] * bool(k) + [f"{n} {t} {size}" for n, (t, size) in d.items()]) for k, d in said)
        raise ValueError(
            "x: wanted tokens in the first dimension, and on every rank the same but for their number, got "
            + "; ".join(f"{each} on rank {rank}" for rank, each in enumerate(told))
        )
    for name, x in tensors.items():
        if not x.is_floating_point() and x.dtype not in _SENT:
            raise TypeError(
                f"{name}: wanted floating point, bool, uint8, int8, int32 or int64, got {x.dtype}"
            )
    counts = {name: [each[name][1][0] for _, each in said] for name in tensors}
    return {name: _gather_rows(x, counts[name], group, averaged) for name, x in tensors.items()}


def _gather_rows(x: Tensor, counts: list[int], group: ProcessGroup, averaged: bool) -> Tensor:
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    if x.is_floating_point():
        everything = _Gathered.apply(padded, group, float(group.size()) if averaged else 1.0)
    else:
        everything = all_gather(padded, group)
    return torch.cat([everything[rank, :count] for rank, count in enumerate(counts)])


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_reduce(grad.to(acc_dtype(grad.dtype)), ctx.group).to(grad.dtype), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, factor: float) -> Tensor:
        ctx.rank, ctx.factor = group.rank(), factor
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[ctx.rank] * ctx.factor, None, None


# --- rows of a weight --------------------------------------------------------------------------------------------


def check_group(group: object) -> None:
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"head.group: wanted a torch.distributed.ProcessGroup that this process belongs to, got {type(group).__name__}"
        )


def same_ranks(a: ProcessGroup, b: ProcessGroup) -> bool:
    """Whether two groups are the same processes in the same order."""
    return a is b or dist.get_process_group_ranks(a) == dist.get_process_group_ranks(b)


def row_counts(rows: int, device: torch.device, group: ProcessGroup) -> tuple[int, ...]:
    """How many rows each rank has."""
    return tuple(all_gather(torch.tensor([rows], device=device), group)[:, 0].tolist())


def is_dtensor(x: object) -> bool:
    return type(x).__name__ == "DTensor" and hasattr(x, "placements")


def local_rows(name: str, x: Any) -> tuple[Tensor, ProcessGroup, tuple[int, ...]]:
    """(this rank's rows of a DTensor, the group of its mesh, how many rows each rank has); nothing is exchanged.

    The gradient of the DTensor is a DTensor with the same placement.
    """
    from torch.distributed.tensor import Shard

    mesh, placements = x.device_mesh, x.placements
    if len(placements) != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
        raise ValueError(
            f"{name}: wanted a DTensor with the placement Shard(0) on a mesh of one dimension, got {list(placements)}; pass "
            "the rows of this rank as a plain tensor, x.to_local(), with the group of the ranks that hold the others, "
            "LMHead(..., group=), or the whole weight, x.full_tensor()"
        )
    group = mesh.get_group()
    if mesh.get_local_rank() != group.rank():
        raise ValueError(f"{name}: wanted a mesh that has its ranks in the order of their group, got {mesh}")
    size, rows = mesh.size(), x.shape[0]
    step = -(-rows // size)  # as torch.chunk cuts
    counts = tuple(max(0, min(step, rows - rank * step)) for rank in range(size))
    local = x.to_local()
    if len(local) != counts[mesh.get_local_rank()]:
        raise ValueError(
            f"{name}: wanted the rows that Shard(0) gives this rank, {counts[mesh.get_local_rank()]}, got {len(local)}"
        )
    return local, group, counts
