"""This rank's part of a sharded head, and whether all ranks were asked for the same.

Legend: N tokens, R ranks.
"""

from __future__ import annotations

import functools
import math
import sys
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .. import ranks
from ..dispatch import acc_dtype, exact_dtypes
from ..head import LMHead

_Function = TypeVar("_Function", bound=Callable[..., Any])


def collective(function: _Function) -> _Function:
    """Refuse what several ranks cannot do. Where torch.compile may break its graph, it does so around the call."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "head.group: ranks look at each other's values, which cannot be compiled; wanted fullgraph=False, or the loss "
                "outside of the compiled function"
            )
        if args[-1] == "reference":
            raise ValueError(
                "impl: 'reference' is the definition in one process, and the head has a group; wanted 'auto', or an LMHead "
                "with the whole weight"
            )
        compiler = "torch._dynamo" in sys.modules  # importing it takes seconds
        return (torch.compiler.disable(function) if compiler else function)(*args)

    return cast(_Function, call)


# --- this rank's part --------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Hidden states whose gradient is summed over the ranks, this rank's rows that count, and which ids they are."""

    hidden: Tensor
    head: LMHead
    first: int
    size: int
    group: Any

    @classmethod
    def of(cls, hidden: Tensor, head: LMHead) -> Part:
        assert head.group is not None
        rank, counts = head.group.rank(), id_counts(head)
        local = head.cut_to(slice(counts[rank]))
        hidden = ranks.replicated(hidden, head.group)
        return cls(hidden, local, sum(counts[:rank]), counts[rank], head.group)

    def own(self, ids: Tensor) -> Tensor:
        """The ids as those of the local head; -1, an absent slot, where another rank has them."""
        return torch.where((ids >= self.first) & (ids < self.first + self.size), ids - self.first, -1)

    def nothing(self) -> Tensor:
        """`[N]` zeros that hang on all leaves, so that a rank without ids takes part in the backward pass."""
        zeros = self.hidden[:, :0].sum(1, dtype=acc_dtype(self.hidden.dtype)) + self.head.weight[:0].sum()
        return zeros if self.head.bias is None else zeros + self.head.bias[:0].sum()


def id_counts(head: LMHead) -> list[int]:
    """How many ids that count each rank has."""
    assert head.shards is not None
    counts, left = [], head.num_ids
    for rows in head.shards:
        counts.append(min(rows, left))
        left -= counts[-1]
    return counts


# --- do all ranks compute the same? ------------------------------------------------------------------------------

_MOST, _DIRECTIONS = 6, 4  # tensors that are compared, projections of each


def agree(head: LMHead, call: str, options: tuple[Any, ...], **tensors: Tensor | None) -> None:
    """Refuse ranks that were called with different arguments; the first tensor is that of the hidden states.

    Projections of hidden states may differ by 1 %: those of other tokens differ by about their own size.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    described = [(name, tuple(x.shape), str(x.dtype), x.requires_grad) for name, x in given.items()]
    of_head = (head.hidden_size, head.bias is None, head.softcap, head.scale)
    ids = f"ids of each rank: {id_counts(head)}"
    signature = repr((call, options, described, of_head, ids, torch.is_grad_enabled()))
    (hidden_name, hidden), *_ = given.items()
    row = torch.zeros(2 + _MOST * (_DIRECTIONS + 1), dtype=torch.float64, device=hidden.device)
    row[0], row[1] = len(hidden), zlib.crc32(signature.encode())
    for i, x in enumerate(given.values()):
        at = 2 + i * (_DIRECTIONS + 1)
        row[at : at + _DIRECTIONS + 1] = _projections(x)
    rows = ranks.all_gather(row, head.group).cpu()  # type: ignore[arg-type]
    if bool((rows[:, 0] != rows[0, 0]).any()):
        raise ValueError(_other_tokens(hidden_name, f"{rows[:, 0].long().tolist()} tokens"))
    if bool((rows[:, 1] != rows[0, 1]).any()):
        raise ValueError(
            "head.group: wanted the same call with the same options on every rank, got different ones; this rank "
            f"{head.group.rank()} calls {signature}"  # type: ignore[union-attr]
        )
    for i, (name, x) in enumerate(given.items()):
        values = rows[:, 2 + i * (_DIRECTIONS + 1) :][:, : _DIRECTIONS + 1]
        tolerance = 1e-12 if not x.is_floating_point() else 1e-2 if "hidden" in name else 1e-6
        allowed = tolerance * values[:, -1].amax()
        if bool(((values[:, :-1] - values[0, :-1]).abs() > allowed).any()):
            if name == "factor":
                raise ValueError(
                    "num_items, weights, mask: wanted the same on every rank of head.group, got other values on other ranks. "
                    "num_items is the count over all ranks; weights and mask belong to tokens, gather them with "
                    "head.gather_tokens"
                )
            raise ValueError(_other_tokens(name, "other values on other ranks"))


def _other_tokens(name: str, what: str) -> str:
    return (
        f"{name}: wanted the same tokens on every rank of head.group, got {what}. Each rank has some ids of the vocabulary and "
        "needs all tokens: where each has tokens of its own (FSDP, data parallel), gather them first, "
        f"head.gather_tokens({name.split('.')[0]}), and so everything else that belongs to tokens (labels, mask, weights)"
    )


def _projections(x: Tensor) -> Tensor:
    """`[5]` four sums of the elements with different weights, and the size that they have."""
    x = x.detach().reshape(len(x), math.prod(x.shape[1:]))
    if not x.is_floating_point():
        x = x.double()
    columns = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    each = torch.arange(1, _DIRECTIONS + 1, dtype=torch.float64, device=x.device)
    weights = torch.cos(columns[:, None] * each.sqrt() + each).div(max(x.shape[1], 1) ** 0.5).to(x.dtype)
    with exact_dtypes(x.device):
        sums = torch.nan_to_num(x, 0.0, 0.0, 0.0) @ weights
    rows = torch.arange(len(x), dtype=torch.float64, device=x.device)
    sums = sums.double() * torch.cos(rows * 1.7 + 0.3)[:, None]
    return torch.cat([sums.sum(0), sums.square().sum().sqrt()[None]])
