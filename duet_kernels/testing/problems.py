"""Inputs for tests: hidden states, heads, labels and a teacher, with real probability mass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..functional import linear_topk
from ..head import LMHead, TopK

LEAVES = ("hidden", "weight", "bias")


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
        exact, options = self.to(torch.float64), {"temperature": temperature, "impl": "reference"}
        top = linear_topk(exact.teacher_hidden, exact.teacher_head, k, **options)
        acc = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        tail: Any = top.tail_logsumexp  # a head's own top-k has one
        return top._replace(values=top.values.float().to(acc), tail_logsumexp=tail.float().to(acc))


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
        hidden = pick((*lead, d))
        weight = pick((v, d)) if ties == "quantised" else pick((1, d)).expand(v, d).clone()
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
